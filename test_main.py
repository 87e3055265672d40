"""The tests of main.py. Run them with `pytest`.

The first section has one short test for each part of the exercise. The others look for trouble:
changes during a wait, races, full queues, failing work, poison values, shutdown. The last section
is the place for tests of your own work.

The pytest plugin of anyio runs asynchronous tests in virtual time, on an event loop whose clock
jumps to the next timer instead of waiting for it. So ten minutes take no time, and a test can look
at a task exactly when it times out. This clock does not wait for threads, programs and sockets. A
test whose work uses one of them has to be decorated with `@real_time`.
"""

import asyncio
import gc
import json
import logging
import math
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import date, datetime, timezone
from decimal import Decimal
from enum import Enum
from http.client import HTTPResponse, responses
from pathlib import Path
from random import Random
from typing import Annotated, Any, ClassVar, Literal, TypeAlias
from unittest.mock import AsyncMock, Mock
from uuid import UUID

import anyio
import httpx
import pydantic
import pytest
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from httpx import ASGITransport, AsyncClient
from pydantic import BaseModel, Field, ValidationError
from pydantic_core import to_json
from pytest import CaptureFixture, LogCaptureFixture, MonkeyPatch
from typing_extensions import Self

# `import main` reads the settings, and nothing that the shell exports must change a result.
OF_THE_SHELL = ("TASKS_", "UVICORN_", "WEB_CONCURRENCY", "FORWARDED_ALLOW_IPS", "FORCE_COLOR")
for exported in [name for name in os.environ if name.startswith(OF_THE_SHELL)]:
    del os.environ[exported]
os.environ["TZ"] = "XXX-5:30"  # not UTC, so that a local time is noticed
if hasattr(time, "tzset"):  # not on Windows
    time.tzset()

import main
from main import FINAL, SUBMISSIONS, TRANSITIONS, Report, Settings, Task, TaskManager, create_app

if not __debug__:
    raise RuntimeError("these tests need assert statements: run them without -O")

pytestmark = pytest.mark.anyio
parametrize = pytest.mark.parametrize
Json: TypeAlias = dict[str, Any]
Scenario: TypeAlias = Coroutine[Any, Any, None]

logging.getLogger("httpx").setLevel(logging.WARNING)  # otherwise it logs every request

# --- Virtual time ---------------------------------------------------------------------------------

START = 1000.0  # where the virtual clock starts
BEGIN = datetime(2026, 1, 1, tzinfo=timezone.utc)  # the wall clock at that moment
NEEDS_REAL_TIME = "virtual time does not wait for threads, programs and sockets: use @real_time"
real_sleep = asyncio.sleep  # for tests that patch it


def refuse(*_: Any, **__: Any) -> Any:
    """Take the place of a function that needs real time."""
    raise RuntimeError(NEEDS_REAL_TIME)


class JumpingSelector(selectors.SelectSelector):
    """Moves the clock of its loop to the next timer instead of waiting for it."""

    loop: "VirtualLoop"
    turns = 0  # calls of `select` since the clock has moved

    def select(self, timeout: float | None = None) -> list[Any]:
        """Return the sockets that are ready, or let virtual time pass."""
        self.loop.shuffle()  # here, because the loop calls `select` once in each turn
        self.turns += 1
        assert self.turns < 20_000, "the loop is busy, but virtual time doesn't pass"
        events = super().select(0)
        if events or timeout == 0:
            return events
        assert set(threading.enumerate()) <= self.loop.threads, NEEDS_REAL_TIME
        assert timeout is not None, "everything waits forever"
        self.turns = 0
        self.loop.moment = round(self.loop.moment + timeout, 9)  # rounding errors would add up
        return events


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop with a virtual clock. With a seed, it shuffles its callbacks."""

    run_in_executor: Any = refuse
    create_connection: Any = refuse
    create_server: Any = refuse
    subprocess_exec: Any = refuse
    subprocess_shell: Any = refuse

    def __init__(self, seed: int | None = None) -> None:
        self.moment = START
        self.random = None if seed is None else Random(seed)
        self.threads = set(threading.enumerate())
        selector = JumpingSelector()
        selector.loop = self
        super().__init__(selector)
        self._clock_resolution = 1e-9  # a coarser one would run timers early

    def time(self) -> float:
        """Return the virtual time in seconds."""
        return self.moment

    def wall_clock(self) -> float:
        """Return what `time.time` returns while this loop is running."""
        return BEGIN.timestamp() + self.moment - START

    def run_forever(self) -> None:
        """Run the loop with the wall clock patched, and without `time.sleep`."""
        with MonkeyPatch.context() as patch:
            patch.setattr(time, "time", self.wall_clock)
            patch.setattr(time, "sleep", refuse)
            super().run_forever()

    def shuffle(self) -> None:
        """Change the order of the callbacks that are ready."""
        if self.random is not None:
            self.random.shuffle(self._ready)  # type: ignore[attr-defined]  # of BaseEventLoop


@pytest.fixture
def anyio_backend() -> tuple[str, Json]:
    """Tell the plugin of anyio to run each test in virtual time."""
    return "asyncio", {"loop_factory": VirtualLoop}


real_time = parametrize("anyio_backend", ["asyncio"])


def run(coroutine: Scenario, seed: int | None = None) -> None:
    """Run a coroutine in a virtual loop of its own."""
    loop = VirtualLoop(seed)
    try:
        loop.run_until_complete(coroutine)
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(ticks())  # in which the cancelled asyncio tasks end
        loop.close()


def second(text: str | None) -> float:
    """Return how many seconds after the start of the test a time is."""
    assert text, "there is no time"
    moment = datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=timezone.utc)
    return (moment - BEGIN).total_seconds()


def virtual_loop() -> VirtualLoop:
    """Return the event loop of the test."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    return loop


def clock() -> float:
    """Return the seconds since the start of the test, in virtual time."""
    return asyncio.get_running_loop().time() - START


async def ticks(count: int = 10) -> None:
    """Let everything run that is ready, without letting time pass."""
    for _ in range(count):
        await real_sleep(0)


# --- Helpers --------------------------------------------------------------------------------------

EXAMPLES: dict[str, Json] = {model.example["task_type"]: model.example for model in SUBMISSIONS}
SUM = EXAMPLES["compute_sum"]
SLOW = {"task_type": "generate_report", "parameters": {"title": "T", "sections": 6}}
FAILING = {"task_type": "simulate_failure", "parameters": {}}
NO_TASK = "00000000-0000-4000-8000-000000000000"
INTERNAL_ERROR = {"code": "internal_error", "message": "An internal error occurred."}
BUG = "raised an unexpected exception"  # the end of its line in the log
LIMITED = "/nowhere"  # a path that doesn't exist, but is limited


class Api:
    """An app that is running, and a client of it."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app
        self.manager: TaskManager = app.state.manager
        self.http = self.client()

    def client(self, host: str | None = "10.0.0.1", **options: Any) -> AsyncClient:
        """Return a client with an address of its own."""
        transport = ASGITransport(self.app, **options)
        transport.client = (host, 1) if host is not None else None  # type: ignore[assignment]
        return AsyncClient(transport=transport, base_url="http://test")

    async def post(self, **changes: Any) -> httpx.Response:
        """Submit a compute_sum with some fields changed."""
        return await self.http.post("/tasks", json=SUM | changes)

    async def submit(self, **changes: Any) -> str:
        """Submit a task and return its id."""
        response = await self.post(**changes)
        assert response.status_code == 202, response.text
        return str(response.json()["task_id"])

    async def send(self, body: bytes, content_type: str = "application/json") -> httpx.Response:
        """Submit a body of any bytes."""
        headers = {"Content-Type": content_type}
        return await self.http.post("/tasks", content=body, headers=headers)

    async def get(self, task_id: str, **query: Any) -> Json:
        """Return a task."""
        response = await self.http.get(f"/tasks/{task_id}", params=query)
        assert response.status_code == 200, response.text
        return dict(response.json())

    async def get_final(self, task_id: str) -> Json:
        """Wait until the status of a task is final, and return the task."""
        await final(self.manager, self.manager.get(task_id))
        return await self.get(task_id)

    async def run(self, **changes: Any) -> Json:
        """Submit a task, wait until its status is final, and return it."""
        return await self.get_final(await self.submit(**changes))

    async def retry_after(self) -> int:
        """Send a request that is refused by the limiter, and return its Retry-After."""
        response = await self.http.get(LIMITED)
        problem_of(response, 429)
        return int(response.headers["retry-after"])

    async def cancel(self, task_id: str) -> httpx.Response:
        """Cancel a task and return the response."""
        return await self.http.delete(f"/tasks/{task_id}")

    async def tasks(self, **query: Any) -> list[Json]:
        """Return the list of tasks."""
        response = await self.http.get("/tasks", params=query)
        assert response.status_code == 200, response.text
        return list(response.json())


def asyncio_tasks() -> set[asyncio.Task[Any]]:
    """Return the asyncio tasks that are running, but the current one and anyio's own."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    return {task for task in tasks if task and not task.get_name().startswith("AnyIO")}


@asynccontextmanager
async def ending(manager: TaskManager) -> AsyncIterator[None]:
    """Assert that everything that is started in the body of `async with` has ended after it."""
    before = asyncio_tasks()
    yield
    unfinished = [task for task in manager.iterate() if task["status"] not in FINAL]
    assert unfinished == []
    await ticks()
    assert asyncio_tasks() - before == set(), "these asyncio tasks have not ended"


@asynccontextmanager
async def running(
    execute: Any = None, submissions: Any = SUBMISSIONS, **settings: Any
) -> AsyncIterator[Api]:
    """Run an app with a rate limit that no test reaches."""
    settings = {"rate_limit": 1_000_000, **settings}
    api = Api(create_app(Settings(**settings), execute, submissions))
    # `ending` comes first, so that it looks when the lifespan has ended.
    lifespan = api.app.router.lifespan_context(api.app)
    async with ending(api.manager), lifespan, api.http:
        yield api


@asynccontextmanager
async def managing(execute: Any, **settings: Any) -> AsyncIterator[TaskManager]:
    """Run a manager without HTTP, for tests of the engine."""
    manager = TaskManager(Settings(**settings), execute)
    async with ending(manager), manager.working():
        yield manager


async def final(manager: TaskManager, task: Task) -> Task:
    """Wait until a task is final, for at most 1,000 long polls, and return it."""
    for _ in range(1000):
        if task["status"] in FINAL:
            return task
        await manager.wait(task["task_id"])
    raise AssertionError(f"not final after 1,000 polls: {task}")


async def outcome(manager: TaskManager, parameters: Json | None = None) -> Task:
    """Submit a task of the type "test", wait until it is final, and return it."""
    return await final(manager, manager.submit("test", parameters or {}))


def assert_counts_agree(manager: TaskManager) -> None:
    """Assert that the counts of /health agree with the list."""
    statuses = [task["status"] for task in manager.iterate()]
    health = manager.health()
    assert health["tasks"] == {status: statuses.count(status) for status in TRANSITIONS}
    assert health["queue"]["size"] == statuses.count("queued")
    # A worker is also busy while cancelled work cleans up.
    assert statuses.count("processing") <= health["workers"]["busy"] <= health["workers"]["total"]


@pytest.fixture(autouse=True)
def expected_errors(caplog: LogCaptureFixture) -> Iterator[list[str]]:
    """Fail a test whose errors in the log are not those that it has put into this list.

    An item is a part of a message. Each error needs an item of its own, and a traceback.
    """
    expected: list[str] = []
    caplog.set_level(logging.INFO)
    yield expected
    # asyncio logs an exception that was never read when its asyncio task is freed. The oldest
    # generation is left out, because collecting it takes longer than the test.
    gc.collect(1)
    missing = list(expected)
    for record in caplog.get_records("call") + caplog.get_records("teardown"):
        if record.levelno < logging.ERROR:
            continue
        message = record.getMessage()
        assert record.exc_info, f"logged without a traceback: {message}"
        found = [part for part in missing if part in message]
        assert found, f"logged, but not expected: {message}: {record.exc_info[1]!r}"
        missing.remove(found[0])
    assert missing == [], "expected, but not logged"


def problem_of(response: httpx.Response, status: int) -> Json:
    """Return a problem document, and assert that it has that status."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["cache-control"] == "no-store"
    body = dict(response.json())
    head = {name: body[name] for name in ("type", "title", "status")}
    assert head == {"type": "about:blank", "title": responses[status], "status": status}
    return body


def assert_unavailable(response: httpx.Response, detail: str) -> None:
    """Assert that a response is a 503 with this detail, and that it says when to try again."""
    assert problem_of(response, 503)["detail"] == detail
    assert response.headers["retry-after"] == "10"


def assert_one_error(response: httpx.Response, pointer: str, detail: str) -> None:
    """Assert that a response is a short 400 with this pointer, and a detail that ends like this."""
    problem = problem_of(response, 400)
    assert problem["detail"] == "The request is invalid."
    (error,) = problem["errors"]
    assert error["pointer"] == pointer
    assert error["detail"].endswith(detail)
    assert len(response.content) < 600


async def assert_closed(api: Api) -> None:
    """Assert that an app accepts no tasks, because no workers are running."""
    for response in (await api.post(), await api.http.get("/health")):
        assert_unavailable(response, "The server does not accept tasks at the moment.")


@contextmanager
def naming(case: object) -> Iterator[None]:
    """Say with which row of a table, or with which seed, a test fails."""
    try:
        yield
    except Exception as exc:
        raise AssertionError(f"with {case}: {type(exc).__name__}: {exc}") from exc


def messages(caplog: LogCaptureFixture) -> list[str]:
    """Return the lines of the log that are about tasks."""
    return [line for line in caplog.messages if line.startswith("task ")]


# Work for tests.


async def complete(*_: Any) -> str:
    """Complete after four turns of the event loop."""
    await ticks(4)
    return "done"


async def fail(*_: Any) -> None:
    """Fail after four turns of the event loop."""
    await ticks(4)
    raise main.TaskFailedError("failed")


async def resist(*_: Any) -> str:
    """Complete after eight turns. Each cancellation only ends one of them."""
    for _turn in range(8):
        with suppress(asyncio.CancelledError):
            await ticks(1)
    return "done"


async def hundred_seconds(*_: Any) -> None:
    """Take 100 s."""
    await asyncio.sleep(100)


async def forever(*_: Any) -> None:
    """Wait until cancelled."""
    await asyncio.Event().wait()


async def deaf(*_: Any) -> str:
    """Ignore every cancellation until second 100."""
    while clock() < 100:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(100 - clock())
    return "late"


def raising(exception: BaseException) -> Any:
    """Return work that raises an exception."""
    return AsyncMock(side_effect=exception)


def returning(value: Any) -> Any:
    """Return work that returns a value."""
    return AsyncMock(return_value=value)


# === The exercise =================================================================================


async def test_submission() -> None:
    """A submission is accepted with 202, the id of the task, and its location."""
    async with running() as api:
        response = await api.http.post("/tasks", json=SUM)
        task_id = response.json()["task_id"]
        assert response.status_code == 202
        assert response.json() == {"task_id": task_id, "status": "queued"}
        assert response.headers["location"] == f"/tasks/{task_id}"
        assert UUID(task_id).version == 4


async def test_polling_with_patched_sleep() -> None:
    """A task is processed in the background, and polling shows its progress and its result."""
    slept = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        await real_sleep(0)  # it has to give other coroutines a turn

    with MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "sleep", sleep)
        async with running() as api:
            task_id = await api.submit(parameters={"numbers": [1, 2, 3]})
            task = await api.get(task_id)
            while task["status"] in ("queued", "processing"):
                await real_sleep(0)
                task = await api.get(task_id)
    assert task["status"] == "completed"
    assert task["result"] == 6
    assert slept.count(0.5) == 10


async def test_rate_limit() -> None:
    """The eleventh request within a minute is refused, and Retry-After says when to come back."""
    async with running(rate_limit=Settings().rate_limit) as api:
        for _ in range(10):
            assert (await api.http.get("/tasks")).status_code == 200
        response = await api.http.get("/tasks")
        problem_of(response, 429)
        assert response.headers["retry-after"] == "60"
        await asyncio.sleep(60)
        assert (await api.http.get("/tasks")).status_code == 200


async def test_cancellation() -> None:
    """A queued or processing task is cancelled, and the response is the task as it stays."""
    async with running(workers=1) as api:
        processing = await api.submit()
        queued = await api.submit()
        await ticks()
        for task_id in (queued, processing):
            response = await api.cancel(task_id)
            assert response.status_code == 200
            assert response.json()["status"] == "cancelled"
            assert response.json() == await api.get(task_id)


async def test_concurrency() -> None:
    """Five tasks are processed at the same time, and a free worker takes the next one."""
    async with running() as api:
        ids = [await api.submit() for _ in range(7)]
        tasks = [await api.get_final(task_id) for task_id in ids]
        starts = [second(task["started_at"]) for task in tasks]
        assert starts == [0, 0, 0, 0, 0, 5, 5]


async def test_full_queue(caplog: LogCaptureFixture) -> None:
    """If the queue is full, a submission is refused with 503 and leaves no trace."""
    async with running(workers=1, queue_size=2) as api:
        await api.submit()
        await ticks()
        waiting = await api.submit()
        await api.submit()
        before = messages(caplog)
        assert_unavailable(await api.post(), "The queue is full.")
        assert len(await api.tasks()) == 3
        assert messages(caplog) == before
        await api.cancel(waiting)  # gives its slot back
        await api.submit()


async def test_invalid_parameters() -> None:
    """An invalid submission is refused with 400 and a pointer to the error."""
    async with running() as api:
        response = await api.post(parameters={"numbers": [1, "two"]})
        assert_one_error(response, "/parameters/numbers/1", NUMBER)
        assert await api.tasks() == []


async def test_concurrent_polls() -> None:
    """All clients that wait for a task are woken when it finishes, although one has left."""
    async with running() as api:
        task_id = await api.submit()
        await ticks()
        polls = [asyncio.create_task(api.get(task_id, wait=True)) for _ in range(100)]
        await asyncio.sleep(1)
        polls.pop().cancel()
        for task in await asyncio.gather(*polls):
            assert task["status"] == "completed"
        assert clock() == 5


@parametrize("status", FINAL)
async def test_clean_up(status: str) -> None:
    """A completed, failed or cancelled task can be read until its `expires_at`, not longer."""
    async with running(retention=600, cleanup_interval=100_000) as api:  # the timer never runs
        task_id = await api.submit(**(FAILING if status == "failed" else SUM))
        if status == "cancelled":
            await api.cancel(task_id)
        task = await api.get_final(task_id)
        assert task["status"] == status
        assert second(task["expires_at"]) == second(task["finished_at"]) + 600
        await asyncio.sleep(599.75)
        assert await api.get(task_id) == task
        await asyncio.sleep(0.25)
        problem = problem_of(await api.http.get(f"/tasks/{task_id}"), 404)
        assert problem["detail"] == "There is no such task. It may have expired."
        problem_of(await api.cancel(task_id), 404)


# === Submission and parameters ====================================================================


NEW_REPORT = {
    "task_type": "generate_report",
    "parameters": {"title": "T", "sections": 3},
    "priority": "normal",
    "status": "queued",
    "progress": 0,
    "result": None,
    "error": None,
    "created_at": "2026-01-01T00:00:01.000000Z",
    "started_at": None,
    "finished_at": None,
    "expires_at": None,
}


async def test_a_task_has_the_same_fields_in_every_state() -> None:
    """All twelve fields exist from queued to completed, and are null until they have a value."""
    async with running(workers=1) as api:
        await api.submit()
        await asyncio.sleep(1)
        task_id = await api.submit(task_type="generate_report", parameters={"title": "T"})
        queued = await api.get(task_id)
        await asyncio.sleep(13.5)
        processing = await api.get(task_id)
        completed = await api.get_final(task_id)
    assert queued == {"task_id": task_id, **NEW_REPORT}
    started = {"started_at": "2026-01-01T00:00:05.000000Z"}
    assert processing == queued | started | {"status": "processing", "progress": 60}
    assert completed == processing | {
        "status": "completed",
        "progress": 100,
        "result": "T\n3 sections",
        "finished_at": "2026-01-01T00:00:20.000000Z",
        "expires_at": "2026-01-01T00:10:20.000000Z",
    }


@parametrize("priority", main.LEVELS)
async def test_a_priority_is_stored(priority: main.Priority) -> None:
    """A task has the priority with which it was submitted, and `normal` is the default."""
    async with running(complete) as api:
        assert (await api.run(priority=priority))["priority"] == priority
        assert api.manager.submit("test", {})["priority"] == "normal"


async def test_concurrent_submissions() -> None:
    """Of several submissions at the same time, each gets the id of its own task."""
    async with running() as api:
        bodies = [{"numbers": [number]} for number in range(10)]
        responses = await asyncio.gather(*[api.post(parameters=body) for body in bodies])
        for body, response in zip(bodies, responses, strict=True):
            assert (await api.get(response.json()["task_id"]))["parameters"] == body


async def test_nothing_outside_can_change_a_task() -> None:
    """The caller of `submit` and the work have copies of the parameters and of the result."""
    parameters: Json = {"numbers": [1]}
    result: list[Any] = []

    async def work(task_type: str, copy: Json, _: Report) -> list[Any]:
        assert task_type == "test"
        assert copy == {"numbers": [1]}
        copy["numbers"].append(object())
        return result

    async with managing(work) as manager:
        task = manager.submit("test", parameters)
        parameters["numbers"].append(object())
        await final(manager, task)
        result.append(object())
        assert task["parameters"] == {"numbers": [1]}
        assert task["result"] == []


async def test_progress() -> None:
    """Progress is an integer that never falls, and values that are no percentage change nothing."""
    seen: list[int] = []

    async def work(_: str, __: Json, report: Report) -> None:
        for percent in (-5, math.nan, -math.inf, 40.7, 20, math.nan, 101, math.inf, 100):
            report(percent)
            seen.append(task["progress"])

    async with managing(work) as manager:
        task = manager.submit("test", {})
        await final(manager, task)
    assert seen == [0, 0, 0, 40, 40, 40, 40, 40, 99]
    assert task["status"] == "completed"
    assert task["progress"] == 100


async def test_the_wall_clock_decides_nothing() -> None:
    """If the wall clock is set, later times change, but no order, limit or deadline does."""
    year = 400 * 24 * 3600
    async with running(workers=1, rate_limit=5, retention=600) as api:
        first = await api.submit()
        await ticks()
        low = await api.submit(priority="low")
        time.time = lambda: BEGIN.timestamp() + year  # the loop restores it
        high = await api.submit(priority="high")
        assert (await api.http.get(LIMITED)).headers["ratelimit"] == '"default";r=1;t=60'
        await final(api.manager, api.manager.get(low))
        starts = [second(api.manager.get(task_id)["started_at"]) for task_id in (high, low)]
        assert starts == sorted(starts)
        assert clock() == 15
        await asyncio.sleep(590 - 0.25)
        assert second(api.manager.get(first)["finished_at"]) == year
        await asyncio.sleep(0.25)
        with pytest.raises(main.TaskNotFoundError):
            api.manager.get(first)


# === Task types ===================================================================================
#
# For a new task type in main.py, the first three tests name what was forgotten, and RESULTS is the
# place for what it should return.

RESULTS: list[tuple[str, Json, Any]] = [
    ("compute_sum", {"numbers": [1, 2, 3]}, 6),
    ("compute_sum", {"numbers": [2**60 + 1, 10**300]}, 2**60 + 1 + 10**300),
    ("compute_sum", {"numbers": [1, 0.5]}, 1.5),
    ("compute_sum", {"numbers": [2.0]}, 2.0),
    ("compute_sum", {"numbers": [1e300] * 1000}, sum([1e300] * 1000)),
    ("generate_report", {"title": " T ", "sections": 2}, " T \n2 sections"),
]


def test_every_submission_is_in_the_tuple() -> None:
    """Each model of a submission in main.py is in SUBMISSIONS, and its example is valid."""
    models = main.BaseSubmission.__subclasses__()
    assert [model for model in models if model.__module__ == "main"] == list(SUBMISSIONS)
    for model in SUBMISSIONS:
        assert model.model_validate(model.example)


@parametrize("task_type", EXAMPLES)
async def test_every_task_type_has_a_case(task_type: str) -> None:
    """`execute` raises no NotImplementedError. Only its first step runs, so nothing is done."""

    class Reached(Exception):
        """The work has looked at its parameters."""

    class Parameters(dict[str, Any]):
        def __getitem__(self, key: str) -> Any:
            raise Reached

    coroutine = main.execute(task_type, Parameters(), lambda _: None)
    with suppress(Reached, StopIteration):  # StopIteration: it has returned without a step
        coroutine.send(None)
    coroutine.close()


@parametrize("task_type", EXAMPLES)
def test_every_task_type_has_a_result(task_type: str) -> None:
    """RESULTS has a row for every task type, apart from the one that always fails."""
    assert task_type in {row[0] for row in RESULTS} | {"simulate_failure"}


@parametrize(("task_type", "parameters", "result"), RESULTS, ids=range(len(RESULTS)))
async def test_a_result(task_type: str, parameters: Json, result: Any) -> None:
    """A task keeps its parameters as they were sent, and has the right result."""
    async with running() as api:
        task = await api.run(task_type=task_type, parameters=parameters)
        # Unlike `==`, `repr` tells 1 from 1.0.
        assert repr(task["parameters"]) == repr(parameters)
        assert repr(task["result"]) == repr(result)


@parametrize(
    ("parameters", "message"), [({}, "simulated failure"), ({"message": "m" * 200}, "m" * 200)]
)
async def test_a_failure(parameters: Json, message: str) -> None:
    """simulate_failure fails after 5 s with the message of the client, or with the default one."""
    async with running(main.execute) as api:  # without a time scale, which is 1 by default
        task = await api.run(task_type="simulate_failure", parameters=parameters)
        assert task["error"] == {"code": "task_failed", "message": message}
        assert (task["status"], task["result"], task["progress"]) == ("failed", None, 90)
        assert clock() == 5


@parametrize(("time_scale", "seconds"), [(0, 0), (0.5, 5), (1, 10)])
async def test_the_time_scale(time_scale: float, seconds: float) -> None:
    """The time scale multiplies the duration of the simulated work, and 0 means no duration."""
    async with running(time_scale=time_scale) as api:
        await api.run(task_type="generate_report", parameters={"title": "T", "sections": 2})
        assert clock() == seconds


# === Task types of one's own ======================================================================


class Color(Enum):
    """An enumeration."""

    RED = "red"


class Point(main.StrictModel):
    """A nested model, with a name that is not its name in JSON."""

    x_value: int = Field(alias="x")


class Circle(main.StrictModel):
    """A member of a union."""

    shape: Literal["circle"]
    radius: float


class Square(main.StrictModel):
    """Another member of a union."""

    shape: Literal["square"]
    side: float


class RichParameters(main.StrictModel):
    """Parameters of many types."""

    when: datetime
    day: date
    key: UUID
    amount: Decimal
    color: Color
    folder: Path
    tags: set[int]
    pair: tuple[int, str]
    raw: bytes
    ratio: float
    point: Point
    choice: int | Literal["none"]
    drawing: Annotated[Circle | Square, Field(discriminator="shape")]
    note: str | None = "x"
    blob: pydantic.Json[list[int]]
    free: dict[str, Any]


RICH: Json = {
    "when": "2026-02-03T04:05:06Z",
    "day": "2026-02-03",
    "key": NO_TASK,
    "amount": "1.50",
    "color": "red",
    "folder": "a/b",
    "tags": [7],
    "pair": [1, "b"],
    "raw": "bytes",
    "ratio": 2,
    "point": {"x": 5},
    "choice": "none",
    "drawing": {"shape": "circle", "radius": 1.5},
    "note": "n",
    "blob": "[1,2]",
    "free": {"a": [1, None]},
}


class RichSubmission(main.BaseSubmission):
    """Do something with rich parameters."""

    example: ClassVar[Json] = {"task_type": "rich", "parameters": RICH}
    task_type: Literal["rich"]
    parameters: RichParameters


class PlainParameters(main.StrictModel):
    """Parameters that can all be left out."""

    count: int = 1


class PlainSubmission(main.BaseSubmission):
    """Do something with parameters that can be left out."""

    example: ClassVar[Json] = {"task_type": "plain"}
    task_type: Literal["plain"]
    parameters: PlainParameters = PlainParameters()


OWN: dict[str, tuple[Any, ...]] = {
    "one type": (PlainSubmission,),
    "several types": (RichSubmission, PlainSubmission),
    "with those of the file": (*SUBMISSIONS, RichSubmission, PlainSubmission),
}


async def echo(task_type: str, parameters: Json, _: Report) -> Json:
    """Return what the work has received."""
    return {"task_type": task_type, "parameters": parameters}


@parametrize("submissions", OWN.values(), ids=OWN)
async def test_types_of_ones_own(submissions: tuple[Any, ...]) -> None:
    """An app has the types that it was given, in its requests, errors, examples and OpenAPI."""
    async with running(echo, submissions) as api:
        types = [model.example["task_type"] for model in submissions]
        task = await api.run(task_type="plain", parameters={})
        assert task["result"] == {"task_type": "plain", "parameters": {"count": 1}}
        for response in (await api.post(task_type="other"), await api.post(task_type=5)):
            detail = ", ".join(repr(name) for name in types)
            assert_one_error(response, "/task_type", f"Input should be one of {detail}")
        response = await api.http.post("/tasks", json={"parameters": {}})
        assert_one_error(response, "/task_type", "Field required")

        operation = api.app.openapi()["paths"]["/tasks"]["post"]
        content = operation["requestBody"]["content"]["application/json"]
        assert list(content["examples"]) == types
        assert list(content["schema"]["discriminator"]["mapping"]) == types
        for model, example in zip(submissions, content["examples"].values(), strict=True):
            assert example == {"value": model.example}
            assert (await api.http.post("/tasks", json=example["value"])).status_code == 202


async def test_two_apps_with_different_types() -> None:
    """Two apps in one process don't know each other's types."""
    async with running(echo, (PlainSubmission,)) as one, running() as two:
        await one.submit(task_type="plain", parameters={})
        await two.submit()
        assert_one_error(await one.post(), "/task_type", "Input should be one of 'plain'")
        problem_of(await two.post(task_type="plain", parameters={}), 400)


async def test_types_of_ones_own_without_work(expected_errors: list[str]) -> None:
    """Without an `execute` for it, a type of one's own fails with an internal error."""
    expected_errors.append(f"plain {BUG}")
    async with running(submissions=(PlainSubmission,)) as api:
        task = await api.run(task_type="plain", parameters={})
        assert task["error"] == INTERNAL_ERROR


async def test_parameters_of_every_type() -> None:
    """Parameters are stored in the JSON form of their types, from which the model can be made."""
    sent = RICH | {"note": None}
    stored = sent | {"ratio": 2.0}
    async with running(echo, (RichSubmission,)) as api:
        task = await api.run(task_type="rich", parameters=sent)
        assert repr(task["parameters"]) == repr(stored)
        assert task["result"]["parameters"] == stored
        model = RichParameters.model_validate(task["parameters"])
        assert model == RichParameters.model_validate(sent)
        assert (model.point.x_value, model.amount) == (5, Decimal("1.50"))


BAD_RICH: list[tuple[Json, str, str]] = [
    ({"when": "soon"}, "/when", "input is too short"),
    ({"point": {"x": "five"}}, "/point/x", "unable to parse string as an integer"),
    ({"point": {}}, "/point/x", "Field required"),
    ({"pair": [1]}, "/pair/1", "Field required"),
    ({"drawing": {"shape": "circle"}}, "/drawing/radius", "Field required"),
    ({"drawing": {"shape": "x"}}, "/drawing/shape", "one of 'circle', 'square'"),
    ({"drawing": {}}, "/drawing/shape", "Field required"),
    ({"ratio": math.nan}, "", "The value has no JSON form."),
    ({"free": {"a": "\ud800"}}, "", "The value has no JSON form."),
]


@parametrize(("change", "pointer", "detail"), BAD_RICH, ids=range(len(BAD_RICH)))
async def test_bad_parameters_of_every_type(change: Json, pointer: str, detail: str) -> None:
    """The pointer of an error leads to a place in the body, in nested models and unions too."""
    async with running(echo, (RichSubmission,)) as api:
        body = {"task_type": "rich", "parameters": RICH | change}
        response = await api.send(json.dumps(body).encode())
        assert_one_error(response, f"/parameters{pointer}", detail)


class CheckedParameters(main.StrictModel):
    """Parameters with a check of one's own, whose error has a long text."""

    @pydantic.model_validator(mode="after")
    def check(self) -> Self:
        raise ValueError("m" * 500)


class CheckedSubmission(main.BaseSubmission):
    """Do something with parameters that are never valid."""

    example: ClassVar[Json] = {"task_type": "checked", "parameters": {}}
    task_type: Literal["checked"]
    parameters: CheckedParameters


async def test_the_length_of_a_detail() -> None:
    """An error is told with at most 200 characters of its text, because it can repeat the input."""
    async with running(echo, (CheckedSubmission,)) as api:
        response = await api.post(task_type="checked", parameters={})
        (error,) = problem_of(response, 400)["errors"]
        assert error["pointer"] == "/parameters"
        assert error["detail"] == ("Value error, " + "m" * 500)[:200]


async def test_an_error_in_each_member_of_a_union() -> None:
    """If no member of a union fits, there is an error for each, with the same pointer."""
    async with running(echo, (RichSubmission,)) as api:
        response = await api.post(task_type="rich", parameters=RICH | {"choice": []})
        errors = problem_of(response, 400)["errors"]
        assert [error["pointer"] for error in errors] == ["/parameters/choice"] * 2


# === The list =====================================================================================


async def test_the_list() -> None:
    """The newest task comes first, and `limit` is applied after the filter."""
    async with running(workers=1) as api:
        response = await api.http.get("/tasks")
        assert response.json() == []
        assert response.headers["content-type"] == "application/json"
        assert response.headers["cache-control"] == "no-store"
        ids = [await api.submit() for _ in range(5)]
        await asyncio.sleep(5.01)
        await api.cancel(ids[2])
        tasks = await api.tasks()
        assert tasks == [await api.get(task_id) for task_id in reversed(ids)]
        statuses = [task["status"] for task in tasks]
        assert statuses == ["queued", "queued", "cancelled", "processing", "completed"]
        assert await api.tasks(status="cancelled") == tasks[2:3]
        assert await api.tasks(status="queued", limit=1) == tasks[:1]
        assert await api.tasks(limit=2) == tasks[:2]
        assert await api.tasks(status="failed") == []
        assert await api.tasks(status="queued", limit=10**30) == tasks[:2]


LENGTHS = [
    (0, None, 1),
    (1, None, 1),
    (99, None, 1),
    (100, None, 2),
    (101, None, 2),
    (500, None, 6),
    (500, 1, 1),
    (500, 100, 1),  # the list ends before a part is full
    (500, 101, 2),
    (99, 1000, 1),
]


@parametrize(("count", "limit", "count_of_parts"), LENGTHS)
async def test_the_list_at_every_length(count: int, limit: int | None, count_of_parts: int) -> None:
    """A list is valid JSON with a task on each line, and others get a turn after 100 tasks."""
    async with managing(forever, queue_size=1000) as manager:
        tasks = [manager.submit("test", {}) for _ in range(count)]
        await ticks()
        turns: list[None] = []
        parts = []
        async for part in main.stream_tasks(manager.iterate(), limit):
            virtual_loop().call_soon(turns.append, None)
            parts.append(part)
        expected = tasks[::-1][:limit]
        lines = b"".join(parts).decode().splitlines()
        assert [json.loads(line.rstrip(",")) for line in lines[1:-1]] == expected
        assert json.loads("".join(lines)) == expected
        assert lines[0] == "["
        assert lines[-1] == "]"
        assert all(parts)
        assert len(parts) == count_of_parts
        assert len(turns) == count_of_parts - 1  # others get a turn between two parts
        assert clock() == 0
        assert len(turns) == (len(expected) // 100 if limit != 100 else 0)


async def test_tasks_change_while_a_list_is_read() -> None:
    """A slow reader sees each task as it is when its part is made, no expired and no new ones."""
    async with managing(forever, queue_size=1000, retention=10) as manager:
        ids = [manager.submit("test", {})["task_id"] for _ in range(500)]
        manager.cancel(ids[0])
        tasks = manager.iterate()
        manager.submit("test", {})  # after the request, before the first part
        stream = main.stream_tasks(tasks, None)
        body = await anext(stream)
        manager.submit("test", {})
        await asyncio.sleep(10)
        manager.cancel(ids[1])
        body += await anext(stream)
        manager.cancel(ids[2])
        await asyncio.sleep(10)  # ids[1] and ids[2] expire in the middle of the list
        manager.cancel(ids[3])
        body += b"".join([part async for part in stream])
        statuses = {task["task_id"]: task["status"] for task in json.loads(body)}
        assert list(statuses) == ids[:2:-1]
        assert statuses[ids[3]] == "cancelled"


async def test_a_list_filters_when_a_task_is_reached() -> None:
    """A task that gets or loses the status during the list is judged when it is reached."""
    async with managing(forever, workers=1) as manager:
        ids = [manager.submit("test", {})["task_id"] for _ in range(3)]
        await ticks()
        tasks = manager.iterate("queued")
        assert next(tasks)["task_id"] == ids[2]
        manager.cancel(ids[1])
        assert list(tasks) == []
        tasks = manager.iterate("cancelled")
        manager.cancel(ids[2])
        assert [task["task_id"] for task in tasks] == [ids[2], ids[1]]


# === Polling ======================================================================================


async def test_a_long_poll_ends_with_the_change() -> None:
    """A long poll is answered at the moment of the next change, and not by progress."""
    async with running(workers=1) as api:
        await api.submit()
        task_id = await api.submit()
        for status, moment in (("processing", 5), ("completed", 10)):
            assert (await api.get(task_id, wait=True))["status"] == status
            assert clock() == moment


@parametrize("status", FINAL)
async def test_a_long_poll_of_a_final_task(status: str) -> None:
    """A final task is returned immediately, whatever its status is."""
    async with running() as api:
        task_id = await api.submit(**(FAILING if status == "failed" else SUM))
        if status == "cancelled":
            await api.cancel(task_id)
        await api.get_final(task_id)
        before = clock()
        assert (await api.get(task_id, wait=True))["status"] == status
        assert clock() == before
        problem_of(await api.http.get(f"/tasks/{NO_TASK}?wait=true"), 404)
        assert clock() == before


@parametrize("long_poll", [0, 3, 10])
async def test_a_long_poll_has_a_timeout(long_poll: float) -> None:
    """Without a change, a long poll returns the task after `long_poll` seconds."""
    async with running(forever, long_poll=long_poll) as api:
        task_id = await api.submit()
        await ticks()
        for wait in (True, False):
            assert (await api.get(task_id, wait=wait))["status"] == "processing"
            assert clock() == long_poll


async def test_a_poll_that_times_out_takes_nothing_from_others() -> None:
    """When one poll of a task times out, another one still ends with the change."""
    async with managing(forever, long_poll=10) as manager:
        task = manager.submit("test", {})
        await ticks()
        first = asyncio.create_task(manager.wait(task["task_id"]))
        await asyncio.sleep(9)
        later = asyncio.create_task(manager.wait(task["task_id"]))
        await first
        manager.cancel(task["task_id"])
        await later
        assert clock() == 10


async def test_a_task_expires_before_its_poll_goes_on() -> None:
    """A poll returns the final task, even if it has expired before the poll could go on."""
    async with managing(forever, retention=1) as manager:
        task = manager.submit("test", {})
        await ticks()
        poll = asyncio.create_task(manager.wait(task["task_id"]))
        await ticks()
        manager.cancel(task["task_id"])
        virtual_loop().moment += 2  # something has blocked the loop
        manager.expire()
        assert (await poll)["status"] == "cancelled"


def count_events() -> int:
    """Return how many objects of asyncio.Event exist."""
    gc.collect()
    return sum(isinstance(thing, asyncio.Event) for thing in gc.get_objects())


async def test_polls_leave_nothing_behind() -> None:
    """After polls of final, unknown and unfinished tasks, no Event is held."""
    async with managing(complete) as manager:
        before = count_events()
        tasks = [manager.submit("test", {}) for _ in range(50)]
        await asyncio.gather(*[final(manager, task) for task in tasks])
        for task in tasks:
            await manager.wait(task["task_id"])
        with pytest.raises(main.TaskNotFoundError):
            await manager.wait(NO_TASK)
        assert count_events() == before


# === Cancellation =================================================================================


async def test_cancelling_twice() -> None:
    """Cancelling a cancelled task is not an error, and changes nothing."""
    async with running(forever) as api:
        task_id = await api.submit()
        await ticks()
        first = await api.cancel(task_id)
        await asyncio.sleep(1)
        again = await api.cancel(task_id)
        assert again.status_code == 200
        assert again.json() == first.json()


@parametrize(("body", "status"), [(SUM, "completed"), (FAILING, "failed")])
async def test_cancelling_a_finished_task(body: Json, status: str) -> None:
    """A completed or failed task cannot be cancelled: 409 with the task."""
    async with running() as api:
        task = await api.run(**body)
        problem = problem_of(await api.cancel(task["task_id"]), 409)
        assert problem["detail"] == f"The task has already {status}."
        assert problem["task"] == task
        problem_of(await api.cancel(NO_TASK), 404)


async def test_the_times_of_cancelled_tasks() -> None:
    """A task that was processed keeps its `started_at`. One that was only queued has none."""
    async with managing(forever, workers=1) as manager:
        processed, queued = manager.submit("test", {}), manager.submit("test", {})
        await asyncio.sleep(3)
        for task, start in ((queued, None), (processed, "2026-01-01T00:00:00.000000Z")):
            manager.cancel(task["task_id"])
            assert task["started_at"] == start
            assert task["finished_at"] == "2026-01-01T00:00:03.000000Z"


async def test_cancelled_work_cleans_up_undisturbed(expected_errors: list[str]) -> None:
    """Work is cancelled only once, and cannot change its task while it cleans up."""
    cleaned = []

    async def work(_: str, __: Json, report: Report) -> None:
        try:
            await forever()
        finally:
            await asyncio.sleep(2)
            cleaned.append(clock())
            report(50)
            raise ValueError("in the clean-up")

    expected_errors.append(BUG)
    async with managing(work, task_timeout=10) as manager:
        task = manager.submit("test", {})
        await asyncio.sleep(9.5)
        cancelled = manager.cancel(task["task_id"]).copy()
        assert manager.cancel(task["task_id"]) == cancelled
        await asyncio.sleep(1)  # the timeout passes, and then the shutdown begins
    assert cleaned == [11.5]
    assert task == cancelled


# === The queue ====================================================================================


async def test_retry_after_of_a_503() -> None:
    """A client that is refused because the server is unavailable should try again after 10 s."""
    async with running(workers=1, max_tasks=1) as api:
        await api.submit()
        assert (await api.post()).headers["retry-after"] == "10"


async def test_too_many_tasks() -> None:
    """With `max_tasks` tasks, finished ones included, a submission is refused until one expires."""
    async with running(workers=1, max_tasks=3, retention=20) as api:
        for _ in range(3):
            await api.submit()
        await asyncio.sleep(24.99)  # the first task has finished at 5, and expires at 25
        assert_unavailable(await api.post(), "There are too many tasks.")
        await asyncio.sleep(0.01)
        await api.submit()


async def start_times(manager: TaskManager, tasks: list[Task]) -> list[float]:
    """Wait until the tasks are final, and return the seconds at which they started."""
    return [second((await final(manager, task))["started_at"]) for task in tasks]


@parametrize("victim", range(7))
async def test_priorities(victim: int) -> None:
    """Higher priorities start first, then older tasks, also if a queued task is cancelled."""
    priorities: list[main.Priority] = ["low", "normal", "high", "low", "normal", "high", "high"]
    async with managing(hundred_seconds, workers=1, task_timeout=1000) as manager:
        manager.submit("test", {})
        await ticks()
        tasks = [manager.submit("test", {}, priority) for priority in priorities]
        order = [tasks[number] for number in (2, 5, 6, 1, 4, 0, 3)]
        manager.cancel(tasks[victim]["task_id"])
        order.remove(tasks[victim])
        assert await start_times(manager, order) == [100, 200, 300, 400, 500, 600]


@parametrize(
    ("step", "priority", "later", "overtaken"),
    [
        (30, "low", 59.5, True),
        (30, "low", 60, False),  # a tie: the older one is first
        (30, "normal", 29.5, True),
        (30, "normal", 30, False),
        (10.5, "low", 20.5, True),
        (10.5, "low", 21, False),
        (0, "low", 0.5, False),
    ],
)
async def test_no_task_starves(
    step: float, priority: main.Priority, later: float, overtaken: bool
) -> None:
    """A level of priority is worth `priority_step` seconds of waiting."""
    settings = {"workers": 1, "task_timeout": 1000, "priority_step": step}
    async with managing(hundred_seconds, **settings) as manager:
        manager.submit("test", {})
        await ticks()
        older = manager.submit("test", {}, priority)
        await asyncio.sleep(later)
        high = manager.submit("test", {}, "high")
        start, high_start = await start_times(manager, [older, high])
        assert (high_start < start) == overtaken


# === Workers ======================================================================================


class UnspeakableError(main.TaskFailedError):
    """An exception that has no text."""

    def __str__(self) -> str:
        raise SystemExit("no text")


class Group(Exception):
    """Has the shape of an exception group, which Python 3.10 doesn't have."""

    def __init__(self, *exceptions: Any) -> None:
        super().__init__("unhandled errors")
        self.exceptions = exceptions


async def cancel_itself(*_: Any) -> None:
    """Cancel the asyncio task of the work from inside."""
    task = asyncio.current_task()
    assert task
    task.cancel()
    await real_sleep(0)


FAILED = main.TaskFailedError("no disk \ud800")
ENDLESS = Group()
ENDLESS.exceptions = (ENDLESS,)
BUGS: dict[str, Any] = {
    "ValueError": raising(ValueError("secret")),
    "SystemExit": raising(SystemExit(3)),
    "GeneratorExit": raising(GeneratorExit()),
    "StopIteration": raising(StopIteration()),
    "BaseException": raising(BaseException("secret")),
    "CancelledError": raising(asyncio.CancelledError("secret")),
    "cancels itself": cancel_itself,
    "no text": raising(UnspeakableError()),
    "timeout of a part": raising(TimeoutError("secret")),
    "group with a bug first": raising(Group(ValueError("secret"), FAILED)),
    "strange group": raising(Group(5)),
    "empty group": raising(Group()),
    "group that contains itself": raising(ENDLESS),
    "report of a wrong type": lambda _, __, report: report("x"),
    "not a coroutine function": lambda *_: None,
    "unknown task type": main.execute,
}


@parametrize("name", BUGS)
async def test_a_bug_in_the_work(
    name: str, expected_errors: list[str], caplog: LogCaptureFixture
) -> None:
    """Work with a bug has failed, the log has the exception, and the worker goes on."""
    expected_errors.append(f"test {BUG}")
    works = iter([BUGS[name], complete])
    async with managing(lambda *args: next(works)(*args), workers=1) as manager:
        task = await outcome(manager)
        assert task["status"] == "failed"
        assert task["error"] == INTERNAL_ERROR
        assert (await outcome(manager))["status"] == "completed"
    (logged,) = [record.exc_info for record in caplog.records if record.exc_info]
    # The mock, asyncio or `json_copy` replaces the exceptions of the other rows.
    raised = getattr(BUGS[name], "side_effect", None)
    if isinstance(raised, ValueError | SystemExit | GeneratorExit | Group):
        assert logged[1]
        assert raised in (logged[1], logged[1].__cause__)


GROUPS = {
    "group": Group(FAILED),
    "with a bug": Group(FAILED, ValueError("secret")),
    "in a group": Group(Group(FAILED)),
}


@parametrize("name", GROUPS)
async def test_a_failure_in_a_group(
    name: str, expected_errors: list[str], caplog: LogCaptureFixture
) -> None:
    """A TaskFailedError keeps its message as the first exception of a group, which is logged."""
    expected_errors.append(BUG)
    async with managing(raising(GROUPS[name])) as manager:
        task = await outcome(manager)
        assert task["error"] == {"code": "task_failed", "message": "no disk ?"}
    (logged,) = [record.exc_info for record in caplog.records if record.exc_info]
    assert logged[1] is GROUPS[name]


class OwnError(main.TaskFailedError):
    """A failure of one's own."""


FAILURES = {"no disk ?": FAILED, "own": OwnError("own"), "": main.TaskFailedError()}


@parametrize("message", FAILURES)
async def test_a_failure_is_no_error_in_the_log(message: str) -> None:
    """A TaskFailedError alone is told to the client, and the log has no traceback."""
    async with managing(raising(FAILURES[message])) as manager:
        task = await outcome(manager)
        assert task["error"] == {"code": "task_failed", "message": message}


@parametrize(("timeout", "status"), [(4.9, "failed"), (5.1, "completed")])
async def test_a_timeout(timeout: float, status: str, caplog: LogCaptureFixture) -> None:
    """A task that takes longer than `task_timeout` fails then, and the worker goes on."""
    async with running(workers=1, task_timeout=timeout) as api:
        task_id = await api.submit()
        following = await api.submit()
        task = await api.get_final(task_id)
        await ticks()
        assert task["status"] == status
        assert clock() == pytest.approx(min(timeout, 5))
        assert (await api.get(following))["status"] == "processing"
        if status == "failed":
            assert task["error"] == {"code": "timeout", "message": "The task took too long."}
            assert task["progress"] == 90
            assert "compute_sum failed after 4.9 s: 'The task took too long.'" in caplog.text
        # The time in the queue does not count.
        task = await api.get_final(following)
        assert task["status"] == status
        assert clock() == pytest.approx(2 * min(timeout, 5))


@parametrize("end", ["failed", "cancelled"])
async def test_work_that_ignores_its_cancellation(end: str, caplog: LogCaptureFixture) -> None:
    """Such work keeps its worker until the timeout and 5 s of grace have passed, not longer."""
    async with managing(deaf, workers=1, task_timeout=10) as manager:
        task = manager.submit("test", {})
        following = manager.submit("test", {})
        await asyncio.sleep(2)
        if end == "cancelled":
            manager.cancel(task["task_id"])
        await asyncio.sleep(13 - 0.01)  # 10 s of timeout and 5 s of grace, less the 2 s of before
        assert task["status"] == end
        assert manager.health()["tasks"]["queued"] == 1
        await asyncio.sleep(0.02)
        assert following["status"] == "processing"
        label = f"task {task['task_id'][:8]} test"
        warnings = [
            record.getMessage() for record in caplog.records if record.levelname == "WARNING"
        ]
        assert warnings == [f"{label} is abandoned, because it ignores its cancellation"]
        await asyncio.sleep(100)
        assert task["result"] is None


async def test_busy_workers() -> None:
    """A worker is busy until it waits for the next task, also while cancelled work cleans up."""

    async def work(*_: Any) -> None:
        try:
            await forever()
        finally:
            await asyncio.sleep(3)

    async with managing(work, workers=2) as manager:
        tasks = [manager.submit("test", {}) for _ in range(3)]
        assert manager.health()["workers"] == {"busy": 0, "total": 2}
        await ticks()
        for task in tasks[:2]:
            manager.cancel(task["task_id"])
        await asyncio.sleep(2.99)
        assert manager.health()["workers"] == {"busy": 2, "total": 2}
        assert manager.health()["tasks"]["queued"] == 1
        await asyncio.sleep(0.02)
        assert manager.health()["workers"] == {"busy": 1, "total": 2}
        assert manager.health()["tasks"]["processing"] == 1
        manager.cancel(tasks[2]["task_id"])
        await asyncio.sleep(3.01)
        assert manager.health()["workers"] == {"busy": 0, "total": 2}


async def test_abandoned_work_keeps_no_worker_busy() -> None:
    """When the grace has passed, the worker is free, although the work goes on."""
    async with managing(deaf, workers=1, task_timeout=1) as manager:
        manager.submit("test", {})
        await asyncio.sleep(5.99)
        assert manager.health()["workers"]["busy"] == 1
        await asyncio.sleep(0.02)
        assert manager.health()["workers"]["busy"] == 0
        await asyncio.sleep(100)  # in which the work ends


WORKER_ERRORS = [RuntimeError("a bug"), asyncio.CancelledError(), BaseException()]


@parametrize("exception", WORKER_ERRORS, ids=lambda exception: type(exception).__name__)
async def test_a_worker_that_fails(
    exception: BaseException,
    monkeypatch: MonkeyPatch,
    expected_errors: list[str],
    caplog: LogCaptureFixture,
) -> None:
    """If a worker fails, all stop, no task is left unfinished, and the server says so."""
    if isinstance(exception, RuntimeError):
        expected_errors.append("a worker failed, so all workers stop")
    elif not isinstance(exception, asyncio.CancelledError):
        expected_errors.append("exception=BaseException()")  # asyncio's own "never retrieved"
    async with running(forever, workers=2) as api:
        ids = [await api.submit() for _ in range(4)]
        await ticks()
        gets = iter([raising(exception), forever])
        monkeypatch.setattr(main.TaskQueue, "get", lambda _: next(gets)())
        await api.cancel(ids[0])  # its worker asks for the next task
        await ticks(20)
        await assert_closed(api)
        for task_id in ids:
            assert (await api.get(task_id))["status"] == "cancelled"
    levels = [record.levelname for record in caplog.records if record.exc_info]
    if isinstance(exception, RuntimeError):
        assert levels == ["CRITICAL"]
    gc.collect()  # now asyncio logs the BaseException, which was never read


# === What is stored ===============================================================================


def nested(levels: int) -> list[Any]:
    """Return a list in a list in a list."""
    value: list[Any] = []
    for _ in range(levels - 1):
        value = [value]
    return value


ITSELF: list[Any] = []
ITSELF.append(ITSELF)
NOT_JSON: dict[str, Any] = {
    "object": object(),
    "bytes": b"abc",
    "set": {1},
    "NaN": math.nan,
    "infinity": -math.inf,
    "surrogate": "\ud800",
    "surrogate key": {"\ud800": 1},
    "tuple key": {(1, 2): 3},
    "date": BEGIN,
    "itself": ITSELF,
    "deep": nested(250),
    "very deep": nested(5000),
    "5000 digits": 10**5000,
}


@parametrize("name", NOT_JSON)
@parametrize("depth", ["alone", "nested"])
async def test_a_value_without_a_json_form(
    name: str, depth: str, expected_errors: list[str]
) -> None:
    """Such a value is refused as a parameter, and fails its task as a result, at any depth."""
    expected_errors.append(BUG)
    value = NOT_JSON[name] if depth == "alone" else {"a": ({"b": [NOT_JSON[name]]},)}
    async with managing(returning(value)) as manager:
        with pytest.raises(main.InvalidJsonError):
            manager.submit("test", {"free": value})
        task = await outcome(manager)
        assert task["error"] == INTERNAL_ERROR
        assert json.loads(to_json(list(manager.iterate()))) == [task]


async def test_a_result_with_a_json_form() -> None:
    """Clients can read every value with a JSON form, in the form that `json.dumps` gives it."""
    values = [1.5, None, True, "\N{GRINNING FACE}", 10**300, nested(190)]
    async with running(returning({"a": tuple(values), 1: "one"})) as api:
        task = await api.run()
        assert task["result"] == {"a": values, "1": "one"}
        assert await api.tasks() == [task]


async def test_a_model_is_converted() -> None:
    """A model of pydantic is stored as JSON, as the parameters or the result of a task."""
    async with managing(returning(Point(x=5))) as manager:
        task = await final(manager, manager.submit("test", Point(x=6)))
        assert task["parameters"] == {"x": 6}
        assert task["result"] == {"x": 5}


# === Memory =======================================================================================


def memory() -> int:
    """Return the bytes that Python holds, as tracemalloc counts them."""
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


@contextmanager
def bounded(size: int) -> Iterator[None]:
    """Assert that no more than `size` bytes stay allocated."""
    tracemalloc.start()
    try:
        before = memory()
        yield
        assert memory() - before < size
    finally:
        tracemalloc.stop()


async def test_expired_tasks_leave_nothing_behind(monkeypatch: MonkeyPatch) -> None:
    """Of many tasks that have ended, been refused or expired, nothing is held."""
    monkeypatch.setattr(main.log.logger, "disabled", True)  # caplog holds each line

    async def storm(manager: TaskManager, count: int) -> None:
        for number in range(count):
            task = manager.submit("test", {})
            with pytest.raises(main.UnavailableError):
                manager.submit("test", {})
            if number % 3 == 0:
                manager.cancel(task["task_id"])
            await final(manager, task)
        await asyncio.sleep(10)
        assert list(manager.iterate()) == []

    async with managing(complete, queue_size=1, retention=1) as manager:
        await storm(manager, 100)  # the first time, Python itself fills some caches
        with bounded(200_000):  # one entry in a dict for each task would take that much alone
            await storm(manager, 1500)


class Large:
    """Something that work holds."""


async def test_a_worker_forgets_its_last_work() -> None:
    """While a worker waits for a task, nothing of its last work stays in memory."""
    references = []

    async def work(*_: Any) -> None:
        large = Large()
        references.append(weakref.ref(large))
        raise main.TaskFailedError("failed")  # the traceback refers to the local variables

    async with managing(work) as manager:
        await outcome(manager)
        await ticks()
        gc.collect()
        assert references[0]() is None


async def test_the_limiter_forgets_quiet_clients() -> None:
    """After a sweep, the limiter holds only the clients that have a request in the window."""
    limiter = main.RateLimiter(3, 60)
    await limiter.hit("early")
    with bounded(100_000):  # 1,000 clients take ten times as much
        for number in range(1000):
            await limiter.hit(main.client_key(f"10.0.{number // 250}.{number % 250}"))
        await asyncio.sleep(59)
        await limiter.hit("late")
        await limiter.sweep()
        assert (await limiter.quota("10.0.0.7"))[0] == 2
        await asyncio.sleep(1)
        await limiter.sweep()
    assert await limiter.quota("late") == (2, 59)
    assert await limiter.quota("10.0.0.7") == (3, 0)


# === Health, clean-up, log ========================================================================


async def test_health() -> None:
    """/health counts the tasks by status until they expire, and must not be cached."""
    async with running(workers=1, queue_size=7, retention=10, time_scale=0.2) as api:
        await api.submit(**FAILING)
        ids = [await api.submit() for _ in range(6)]
        await api.cancel(ids[4])
        await api.cancel(ids[5])
        await asyncio.sleep(2.25)
        response = await api.http.get("/health")
        assert response.headers["cache-control"] == "no-store"
        assert response.json() == {
            "status": "ok",
            "tasks": {"queued": 2, "processing": 1, "completed": 1, "failed": 1, "cancelled": 2},
            "queue": {"size": 2, "capacity": 7},
            "workers": {"busy": 1, "total": 1},
        }
        await asyncio.sleep(7.5)
        assert api.manager.health()["tasks"]["cancelled"] == 2
        await asyncio.sleep(0.25)
        assert api.manager.health()["tasks"]["cancelled"] == 0


async def test_the_timer(
    monkeypatch: MonkeyPatch, expected_errors: list[str], caplog: LogCaptureFixture
) -> None:
    """The clean-up runs every `cleanup_interval` seconds, also after an exception in one round."""
    expected_errors.append("the clean-up failed")
    rounds: list[float] = []

    async def sweep(_: main.RateLimiter) -> None:
        rounds.append(clock())
        if len(rounds) == 1:
            raise RuntimeError("a bug")

    monkeypatch.setattr(main.RateLimiter, "sweep", sweep)
    async with running(retention=7, cleanup_interval=30) as api:
        await api.cancel(await api.submit())
        await asyncio.sleep(29.5)
        assert "compute_sum expired after 7.0 s" not in caplog.text
        await asyncio.sleep(62)
        assert "compute_sum expired after 7.0 s" in caplog.text
    assert rounds == [30, 60, 90]


async def test_the_log(caplog: LogCaptureFixture) -> None:
    """Each step of a task is a line with its short id, its type, and how long the status lasted."""
    async with running(workers=1, retention=1) as api:
        body = {"task_type": "simulate_failure", "parameters": {"message": "a\nb"}}
        failing = f"task {(await api.submit(**body))[:8]} simulate_failure"
        await asyncio.sleep(1)
        urgent = f"task {(await api.submit(priority='high'))[:8]} compute_sum"
        await asyncio.sleep(6)
        await api.tasks()
        await asyncio.sleep(3.5)
        last = f"task {(await api.submit())[:8]} compute_sum"
        await asyncio.sleep(1)
    assert messages(caplog) == [
        f"{failing} queued with priority normal",
        f"{failing} processing after 0.0 s",
        f"{urgent} queued with priority high",
        f"{failing} failed after 5.0 s: 'a\\nb'",
        f"{urgent} processing after 4.0 s",
        f"{failing} expired after 1.0 s",
        f"{urgent} completed after 5.0 s",
        f"{last} queued with priority normal",
        f"{last} processing after 0.0 s",
        f"{last} cancelled after 1.0 s",
        f"{urgent} expired after 1.0 s",
    ]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="logging counts frames differently")
async def test_the_log_names_its_caller(caplog: LogCaptureFixture) -> None:
    """A format with `%(funcName)s` shows the function that has logged a line."""
    async with managing(complete) as manager:
        await outcome(manager)
    assert {record.funcName for record in caplog.records} == {"submit", "_set_status"}


@contextmanager
def filtering(words: tuple[str, ...], exception: BaseException) -> Iterator[list[str]]:
    """Add a filter of the user that raises an exception on lines with one of these words."""
    raised = []

    def raise_on(record: logging.LogRecord) -> bool:
        if any(word in record.getMessage() for word in words):
            raised.append(record.getMessage())
            raise exception
        return True

    logger = logging.getLogger("uvicorn.error.tasks")
    logger.addFilter(raise_on)
    try:
        yield raised
    finally:
        logger.removeFilter(raise_on)


LINES = ["queued", "processing", "completed", "failed", "cancelled", "expired", BUG, "abandoned"]
FILTERS = {line: (line,) for line in LINES} | {"all": tuple(LINES)}
FILTER_ERRORS = [ValueError("a bug"), SystemExit(3), asyncio.CancelledError()]


@parametrize("exception", FILTER_ERRORS, ids=lambda exception: type(exception).__name__)
@parametrize("words", FILTERS.values(), ids=FILTERS)
async def test_the_log_changes_nothing(
    words: tuple[str, ...], exception: BaseException, expected_errors: list[str]
) -> None:
    """Whatever a logging filter raises, on any line, tasks, workers and responses are the same."""

    async def work(_: str, parameters: Json, __: Report) -> str:
        kind = parameters["kind"]
        if kind == "deaf":
            await deaf()
        if kind in ("timeout", "cancelled"):
            await forever()
        if kind == "failed":
            raise main.TaskFailedError("failed")
        if kind == "bug":
            raise ValueError("a bug")
        return "done"

    if BUG not in words:
        expected_errors.append(BUG)
    codes = {"completed": None, "failed": "task_failed", "bug": "internal_error"}
    codes |= {"timeout": "timeout", "deaf": "timeout"}
    with filtering(words, exception) as raised:
        async with managing(work, workers=2, task_timeout=2, retention=5) as manager:
            stopped = manager.submit("test", {"kind": "cancelled"})
            await ticks()
            assert manager.cancel(stopped["task_id"])["status"] == "cancelled"
            for kind, code in codes.items():
                task = await outcome(manager, {"kind": kind})
                assert (task["error"] and task["error"]["code"]) == code, kind
            await asyncio.sleep(6)
            assert manager.health()["workers"] == {"busy": 0, "total": 2}
            assert list(manager.iterate()) == []
            await asyncio.sleep(100)  # in which the deaf work ends
    assert raised, "the filter has seen no such line"


async def test_a_filter_and_the_timer() -> None:
    """A logging filter that raises on the error of the clean-up doesn't end its timer."""
    sweep = AsyncMock(side_effect=[RuntimeError("a bug"), None, None])
    with MonkeyPatch.context() as patch, filtering(("clean-up",), ValueError("a bug")) as raised:
        patch.setattr(main.RateLimiter, "sweep", sweep)
        async with running(cleanup_interval=30):
            await asyncio.sleep(91)
    assert sweep.await_count == 3
    assert raised == ["the clean-up failed"]


# === Rate limit ===================================================================================


async def test_the_window_slides() -> None:
    """Every response says how many requests are left, and when there is one more."""
    async with running(rate_limit=10) as api:
        for number in range(10):
            response = await api.http.get(LIMITED)
            assert response.status_code == 404
            assert response.headers["ratelimit-policy"] == '"default";q=10;w=60'
            assert response.headers["ratelimit"] == f'"default";r={9 - number};t={60 - 2 * number}'
            assert response.headers["cache-control"] == "no-store"
            await asyncio.sleep(2)
        response = await api.http.get(LIMITED)
        assert problem_of(response, 429)["detail"] == "Try again in 40 s."
        assert response.headers["ratelimit"] == '"default";r=0;t=40'
        waits = []
        for _ in range(40):
            waits.append(await api.retry_after())
            await asyncio.sleep(1)
        assert waits == list(range(40, 0, -1))
        assert (await api.http.get(LIMITED)).status_code == 404
        assert await api.retry_after() == 2
        await asyncio.sleep(300)
        assert (await api.http.get(LIMITED)).headers["ratelimit"] == '"default";r=9;t=60'


@parametrize("window", [1, 7, 3600])
async def test_the_length_of_the_window(window: int) -> None:
    """A request counts for `rate_window` seconds, to the exact instant."""
    async with running(rate_limit=1, rate_window=window) as api:
        response = await api.http.get(LIMITED)
        assert response.headers["ratelimit-policy"] == f'"default";q=1;w={window}'
        await asyncio.sleep(window - 0.001)
        assert await api.retry_after() == 1
        await asyncio.sleep(0.001)
        assert (await api.http.get(LIMITED)).status_code == 404


async def test_retry_after_is_enough() -> None:
    """A client that waits as long as it was told is accepted, despite rounding errors."""
    loop = virtual_loop()
    for seed in range(500):
        with naming(f"seed {seed}"):
            random = Random(seed)
            # The errors are largest where the clock passes a power of two.
            loop.moment = 2.0 ** random.randrange(6, 24) - random.uniform(0, 60)
            limiter = main.RateLimiter(1, 60)
            assert await limiter.hit("client")
            assert await limiter.quota("client") == (0, 60)
            loop.moment += random.choice([0, random.uniform(0, 30)])
            assert not await limiter.hit("client")
            _, seconds = await limiter.quota("client")
            loop.moment += seconds
            assert await limiter.hit("client")


async def test_retry_after_is_at_least_one_second(monkeypatch: MonkeyPatch) -> None:
    """A refused client waits for a second, even if its quota is renewed in the meantime."""
    monkeypatch.setattr(main.RateLimiter, "quota", AsyncMock(return_value=(1, 0)))
    async with running(rate_limit=1) as api:
        await api.http.get(LIMITED)
        assert await api.retry_after() == 1


async def test_requests_at_the_same_time() -> None:
    """Of twenty requests at the same time, exactly ten are accepted."""
    async with running(rate_limit=10) as api:
        polls = [api.http.get(LIMITED) for _ in range(20)]
        statuses = [response.status_code for response in await asyncio.gather(*polls)]
        assert (statuses.count(404), statuses.count(429)) == (10, 10)
    limiter = main.RateLimiter(10, 60)
    hits = await asyncio.gather(*[limiter.hit("client") for _ in range(20)])
    assert hits.count(True) == 10


async def test_two_clients_in_flight() -> None:
    """Two clients whose requests overlap get their own quota and their own Retry-After."""
    async with running(forever, rate_limit=3) as api:
        task_id = await api.submit()
        await ticks()
        await asyncio.sleep(2)
        other = api.client("10.0.0.2")
        poll = asyncio.create_task(api.http.get(f"/tasks/{task_id}?wait=true"))
        await asyncio.sleep(1)
        polls = [asyncio.create_task(other.get(f"/tasks/{task_id}?wait=true")) for _ in range(3)]
        await asyncio.sleep(1)
        refused = await other.get(LIMITED)
        assert refused.headers["retry-after"] == "59"
        assert refused.headers["ratelimit"] == '"default";r=0;t=59'
        await api.cancel(task_id)
        assert (await poll).headers["ratelimit"] == '"default";r=0;t=56'
        for response in await asyncio.gather(*polls):
            assert response.headers["ratelimit"] == '"default";r=0;t=59'


async def test_a_long_poll_reports_the_present_quota() -> None:
    """The headers of a response that starts late are those of the moment in which it starts."""
    async with running(workers=1, rate_limit=10) as api:
        task_id = await api.submit()
        await ticks()
        poll = asyncio.create_task(api.http.get(f"/tasks/{task_id}?wait=true"))
        await asyncio.sleep(1)
        for _ in range(5):
            await api.http.get(LIMITED)
        assert (await poll).headers["ratelimit"] == '"default";r=3;t=55'


REQUESTS = [
    ("POST", "/tasks", b"{", 400),
    ("POST", "/tasks", b"x" * 70_000, 413),
    ("GET", LIMITED, b"", 404),
    ("PUT", f"/tasks/{NO_TASK}", b"", 405),
    ("HEAD", "/tasks", b"", 405),
    ("OPTIONS", "/tasks", b"", 405),
    ("GET", f"/tasks/{NO_TASK}?wait=maybe", b"", 400),
    ("DELETE", "/tasks/x", b"", 400),
    ("DELETE", f"/tasks/{NO_TASK}", b"", 404),
    ("GET", "/health/", b"", 404),
    ("GET", "/docs/oauth2-redirect", b"", 200),
    ("GET", "/redoc/x", b"", 404),
    ("GET", "/apihealth", b"", 404),
]


async def test_every_response_counts() -> None:
    """Errors count like successes, but refused requests don't."""
    async with running(rate_limit=2) as api:
        for number, (method, path, body, status) in enumerate(REQUESTS):
            client = api.client(f"192.0.2.{number}")
            for left, expected in ((1, status), (0, status), (0, 429), (0, 429)):
                response = await client.request(method, path, content=body)
                with naming(f"{method} {path}"):
                    assert response.status_code == expected
                    assert response.headers["ratelimit"] == f'"default";r={left};t=60'
                    assert response.headers["cache-control"] == "no-store"
                    assert ("retry-after" in response.headers) == (expected == 429)


async def test_the_limit_comes_before_the_body() -> None:
    """The body of a refused request is not read."""

    async def body() -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""

    async with running(rate_limit=1) as api:
        await api.http.get(LIMITED)
        problem_of(await api.http.post("/tasks", content=body()), 429)


FREE = {"/": 307, "/docs": 200, "/redoc": 200, "/openapi.json": 200, "/health": 200}


@parametrize("prefix", ["", "/api", "/api/", "/a/b", "/a/b/"])
async def test_free_paths(prefix: str) -> None:
    """The documentation and /health neither need quota nor use it, behind a prefix too."""
    async with running(rate_limit=1) as api:
        # Like uvicorn with `--root-path`, put the prefix in front of the path as it is.
        client = api.client(root_path=prefix)
        rows = [*FREE.items(), ("/favicon.ico", 404)]
        for path, status in [*rows, (LIMITED, 404), *rows]:
            response = await client.get(f"http://test{prefix}{path}")
            with naming(path):
                assert response.status_code == status
                assert ("ratelimit" in response.headers) == (path == LIMITED)
        problem_of(await client.get(f"http://test{prefix}{LIMITED}"), 429)


async def test_free_paths_in_a_mount() -> None:
    """In a parent application, /health is free, and the location contains the path of the mount."""
    async with running(rate_limit=2) as api:
        parent = FastAPI()
        parent.mount("/a/jobs", api.app)
        client = AsyncClient(transport=ASGITransport(parent, root_path="/api"))
        for _ in range(5):
            assert (await client.get("http://test/api/a/jobs/health")).status_code == 200
        response = await client.post("http://test/api/a/jobs/tasks", json=SUM)
        location = response.headers["location"]
        assert location.startswith("/api/a/jobs/tasks/")
        assert (await client.get(f"http://test{location}")).json()["task_type"] == "compute_sum"
        problem_of(await client.get(f"http://test{location}"), 429)


async def test_who_shares_a_limit() -> None:
    """An IPv4 address, an IPv6 /64 network, and all that is neither have one limit each."""
    groups: list[list[str | None]] = [
        ["192.0.2.1", "::ffff:192.0.2.1"],
        ["192.0.2.2"],
        ["2001:db8::1", "2001:db8:0:0:ffff::9"],
        ["2001:db8:0:1::1"],
        ["2001:db8:1::1"],
        ["fe80::1%eth0", "fe80::2"],
        ["127.0.0.1", "127.0.0.1"],
        [None, "not an ip", "x" * 20_000, "", "300.1.1.1"],
    ]
    header = {"X-Forwarded-For": "192.0.2.9"}  # every client can send it
    async with running(rate_limit=1) as api:
        for hosts in groups:
            for number, host in enumerate(hosts):
                response = await api.client(host).get(LIMITED, headers=header)
                assert response.status_code == (429 if number else 404), str(host)[:50]


async def test_the_port_of_a_client_does_not_count() -> None:
    """Two connections from the same address share a limit."""
    async with running(rate_limit=1) as api:
        for port, status in ((1, 404), (2, 429)):
            transport = ASGITransport(api.app, client=("10.0.0.1", port))
            client = AsyncClient(transport=transport, base_url="http://test")
            assert (await client.get(LIMITED)).status_code == status


# === Bad input ====================================================================================

NUMBER = "Input should be a number from -1e300 to 1e300"
OBJECT = "Input should be an object, sent as application/json"
TYPES = f"Input should be one of {', '.join(map(repr, EXAMPLES))}"
EXTRA = "Extra inputs are not permitted"
REQUIRED = "Field required"
NO_BODY = "There was an error parsing the body"  # the text of FastAPI
BAD_NUMBERS = ["NaN", "-Infinity", "1e400", "-1.1e300", "9" * 4000, "true", "null", '"5"', "[1]"]
LONG_KEY = "k" * 9000
# Parameters, the end of the pointer, and the end of the detail.
BAD_PARAMETERS: dict[str, list[tuple[str, str, str]]] = {
    "compute_sum": [
        *[(f'"numbers": [1, {number}]', "numbers/1", NUMBER) for number in BAD_NUMBERS],
        ('"numbers": []', "numbers", "at least 1 item after validation, not 0"),
        (
            f'"numbers": [{"1, " * 1000} 1]',
            "numbers",
            "at most 1000 items after validation, not 1001",
        ),
    ],
    "simulate_failure": [
        ('"message": "\\ud800"', "message", "unable to parse raw data as a unicode string"),
        ('"message": ""', "message", "at least 1 character"),
        ('"~a/b": 1', "~0a~1b", EXTRA),
        (f'"{LONG_KEY}": 1', LONG_KEY[: 200 - len("/parameters/")], EXTRA),
    ],
    "generate_report": [
        ('"title": ""', "title", "at least 1 character"),
        ('"title": 5', "title", "valid string"),
        (f'"title": "{"t" * 201}"', "title", "at most 200 characters"),
        ('"title": "t", "sections": 0', "sections", "greater than or equal to 1"),
        ('"title": "t", "sections": 7', "sections", "less than or equal to 6"),
        ('"title": "t", "sections": true', "sections", "valid integer"),
        ('"title": "t", "sections": "3"', "sections", "valid integer"),
    ],
}
BAD_BODIES: list[tuple[bytes, str, str]] = [
    (b"", "", REQUIRED),
    (b'{"a":', "", "Malformed JSON at character 5: Expecting value"),
    (b"[]", "", OBJECT),
    (b'{"task_type": "simulate_failure", "\\ud800": 1}', "", "raw data as a unicode string"),
    (b'{"task_type": "\\ud800"}', "/task_type", TYPES),
    (b'{"parameters": {}}', "/task_type", REQUIRED),
    (b'{"task_type": ["compute_sum"]}', "/task_type", TYPES),
    (b'{"task_type": "%s"}' % (b"x" * 9000), "/task_type", TYPES),
    (b'{"task_type": "compute_sum"}', "/parameters", REQUIRED),
    (b'{"task_type": "compute_sum", "parameters": {}}', "/parameters/numbers", REQUIRED),
    (b'{"task_type": "simulate_failure", "parameters": 5}', "/parameters", OBJECT),
    (b'{"task_type": "simulate_failure", "prority": 1}', "/prority", EXTRA),
    (b'{"task_type": "simulate_failure", "priority": "x"}', "/priority", "'normal' or 'low'"),
]


def body_of(task_type: str, parameters: str) -> bytes:
    """Return the body of a submission."""
    return ('{"task_type": "%s", "parameters": {%s}}' % (task_type, parameters)).encode()  # noqa: UP031


async def test_bad_bodies() -> None:
    """A bad body gets a short 400 that points to the error, and leaves nothing behind."""
    rows = list(BAD_BODIES)
    for task_type, bad in BAD_PARAMETERS.items():
        for parameters, end, detail in bad:
            rows.append((body_of(task_type, parameters), f"/parameters/{end}", detail))
    async with running() as api:
        for body, pointer, detail in rows:
            with naming(body[:100]):
                assert_one_error(await api.send(body), pointer, detail)
        response = await api.post(**{f"field{number}": number for number in range(1000)})
        assert len(problem_of(response, 400)["errors"]) == 10
        assert await api.tasks() == []


@parametrize(("sections", "status"), [(0, 400), (1, 202), (6, 202), (7, 400)])
async def test_the_bounds_of_sections(sections: int, status: int) -> None:
    """A report has 1 to 6 sections."""
    async with running() as api:
        parameters = {"title": "T", "sections": sections}
        response = await api.post(task_type="generate_report", parameters=parameters)
        assert response.status_code == status


async def test_bodies_that_cannot_be_parsed() -> None:
    """A body that FastAPI cannot parse is a 400 with its text."""
    async with running() as api:
        for body in (b'{"task_type": "\xff"}', b'{"task_type": %s}' % (b"9" * 5000)):
            assert problem_of(await api.send(body), 400)["detail"] == NO_BODY
        # Whether deep nesting can be parsed depends on the version of Python.
        deep = "[" * 30_000 + "]" * 30_000
        for body in (deep.encode(), body_of("compute_sum", f'"numbers": {deep}')):
            assert (await api.send(body)).status_code == 400
        assert await api.tasks() == []


async def test_good_bodies_at_the_bounds() -> None:
    """A body that is just valid is accepted, and the list is valid JSON afterwards."""
    bodies = [
        body_of("compute_sum", '"numbers": [1e300, -1e300, 0.1, -0.0]'),
        body_of("compute_sum", f'"numbers": [{"1, " * 999} 1]'),
        body_of("generate_report", f'"title": "{"t" * 200}", "sections": 6'),
        body_of("generate_report", '"title": "\\u0000\\ud83d\\ude00", "sections": 1'),
        b"\xef\xbb\xbf" + body_of("simulate_failure", ""),  # with a byte order mark
    ]
    async with running() as api:
        for body in bodies:
            assert (await api.send(body)).status_code == 202, body[:100]
        assert len(await api.tasks()) == len(bodies)


async def test_content_types() -> None:
    """Only a body that is declared as JSON is read as JSON."""
    body = json.dumps(SUM).encode()
    async with running() as api:
        for content_type in ("text/plain", "", "application/x-www-form-urlencoded"):
            assert_one_error(await api.send(body, content_type), "", OBJECT)
        assert_one_error(await api.send(b"\0", "application/octet-stream"), "", OBJECT)
        assert (await api.send(body, "application/problem+json")).status_code == 202


class Chunks:
    """A body whose length is not declared, sent one byte at a time."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.sent = 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while self.sent < self.size:
            self.sent += 1
            yield b"x"


async def test_the_size_of_a_body() -> None:
    """A body of one byte more than `max_body` is a 413, whether its length is declared or not."""
    async with running(max_body=1000) as api:
        for body in (b"x" * 1000, Chunks(1000)):
            problem_of(await api.http.post("/tasks", content=body), 400)
        endless = Chunks(10_000)
        for body in (b"x" * 1001, Chunks(1001), endless):
            problem = problem_of(await api.http.post("/tasks", content=body), 413)
            assert problem["detail"] == "The body is larger than 1000 bytes."
        assert endless.sent == 1001  # it is refused as soon as it is too large
        # The body of a GET is ignored.
        assert (await api.http.request("GET", "/tasks", content=Chunks(1001))).json() == []


BAD_QUERIES = [
    ("?limit=0", "limit", "greater than or equal to 1"),
    ("?limit=" + "9" * 5000, "limit", "exceeded maximum size"),
    ("?status=%ff", "status", "'completed', 'failed' or 'cancelled'"),
    ("?state=failed", "state", EXTRA),
    ("?" + "k" * 5000, "k" * 200, EXTRA),
    ("/%00", "task_id", "found `\0` at 0"),
    ("/" + "a" * 5000, "task_id", "found 5000"),
    (f"/{NO_TASK}?wait=maybe", "wait", "unable to interpret input"),
    (f"/{NO_TASK}?wiat=true", "wiat", EXTRA),
]


@parametrize(("path", "pointer", "detail"), BAD_QUERIES, ids=[row[0][:20] for row in BAD_QUERIES])
async def test_bad_queries_and_ids(path: str, pointer: str, detail: str) -> None:
    """A bad or unknown parameter gets a 400 that names it."""
    async with running() as api:
        assert_one_error(await api.http.get("/tasks" + path), pointer, detail)


# === HTTP =========================================================================================


async def test_unknown_paths_and_methods() -> None:
    """They get a problem document, and never a redirect that contains the Host header."""
    async with running() as api:
        for path in ("/nowhere", "/tasks/", "//"):
            response = await api.http.get("http://evil.test" + path)
            problem_of(response, 404)
            assert "location" not in response.headers, path
        for path, allowed in (("/tasks", "POST"), (f"/tasks/{NO_TASK}", "GET")):
            response = await api.http.put(path)
            problem_of(response, 405)
            assert response.headers["allow"] == allowed


PREFIXES = {"": "", "/api": "/api", "/api/": "/api", "/a b/ü": "/a%20b/%C3%BC"}


@parametrize(("root_path", "prefix"), PREFIXES.items(), ids=PREFIXES)
async def test_links_behind_a_prefix(root_path: str, prefix: str) -> None:
    """With `--root-path`, the location and the redirect to /docs contain the prefix."""
    async with running() as api:
        client = api.client(root_path=root_path)
        response = await client.post("/tasks", json=SUM)
        task_id = response.json()["task_id"]
        assert response.headers["location"] == f"{prefix}/tasks/{task_id}"
        response = await client.get(f"http://test{root_path}/")
        assert response.headers["location"] == f"{prefix}/docs"


async def test_an_error_of_the_user() -> None:
    """An HTTPException of a route of the user is a problem document, whatever its status is."""
    async with running() as api:

        @api.app.get("/own/{status}")
        async def raise_error(status: int) -> None:
            raise HTTPException(status, "own \ud800", {"X-Own": "1"})

        response = await api.http.get("/own/418")
        assert problem_of(response, 418)["detail"] == "own ?"
        assert response.headers["x-own"] == "1"
        assert (await api.http.get("/own/499")).json()["title"] == "Error"


async def test_a_bug_is_a_500(monkeypatch: MonkeyPatch) -> None:
    """A bug, even a ValidationError of pydantic, is a 500 that shows nothing."""
    with pytest.raises(ValidationError) as invalid:
        Settings(workers=0)
    async with running() as api:
        client = api.client(raise_app_exceptions=False)
        for bug in (RuntimeError("secret"), invalid.value):
            monkeypatch.setattr(api.manager, "get", Mock(side_effect=bug))
            monkeypatch.setattr(api.manager, "health", Mock(side_effect=bug))
            for path in ("/health", f"/tasks/{NO_TASK}"):
                problem = problem_of(await client.get(path), 500)
                assert problem["detail"] == "The server failed."
                assert "errors" not in problem
                with pytest.raises(type(bug)):  # the server gets the exception for its log
                    await api.http.get(path)


async def test_a_bug_in_the_middle_of_a_response(monkeypatch: MonkeyPatch) -> None:
    """The response just breaks off, and the server gets the exception for its log."""
    scope = {"type": "http", "method": "GET", "path": "/tasks", "query_string": b"", "headers": []}
    send = AsyncMock()
    async with running() as api:
        with monkeypatch.context() as patch:
            patch.setattr(api.manager, "iterate", lambda _: (1 / 0 for _ in "x"))
            with pytest.raises(ZeroDivisionError):
                await api.app({**scope, "asgi": {"spec_version": "2.4"}}, AsyncMock(), send)
    assert send.await_count == 1  # the status and the headers


# === An application of one's own around it ========================================================


async def test_middleware_of_the_user_goes_around_ours() -> None:
    """Middleware of the user sees refusals, and CORS works for them and for preflight requests."""
    app = create_app(Settings(rate_limit=2, max_body=10))
    app.add_middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["*"])
    seen = []

    @app.middleware("http")
    async def note_status(request: Any, call_next: Any) -> Any:
        response = await call_next(request)
        seen.append(response.status_code)
        return response

    client = Api(app).http
    client.headers["Origin"] = "http://example.com"
    for _ in range(5):
        await client.options("/tasks", headers={"Access-Control-Request-Method": "POST"})
    for body, status in ((Chunks(11), 413), (b"", 400), (b"", 429)):
        response = await client.post("/tasks", content=body)
        problem_of(response, status)
        assert response.headers["access-control-allow-origin"] == "*"
    assert seen == [200] * 5 + [413, 400, 429]


async def test_an_application_without_headers() -> None:
    """A response without any headers, which ASGI allows, gets ours."""

    async def bare(_: Any, __: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"bare"})

    async with running(rate_limit=2) as api:
        api.app.mount("/bare", bare)
        response = await api.http.get("/bare/x")
        assert response.content == b"bare"
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["ratelimit"] == '"default";r=1;t=60'


async def test_a_route_of_the_user() -> None:
    """A route of the user keeps its `Cache-Control`, and its errors have a right pointer."""

    class Hook(BaseModel):
        """The body of the route."""

        url: str
        retries: int | None = None

    async with running() as api:

        @api.app.post("/hooks")
        async def add_hook(hook: Hook, response: Response) -> Hook:
            response.headers["Cache-Control"] = "max-age=86400"
            return hook

        response = await api.http.post("/hooks", json={"url": "x"})
        assert response.headers["cache-control"] == "max-age=86400"
        assert response.headers["ratelimit"] == '"default";r=999999;t=60'
        assert_one_error(await api.http.post("/hooks", json={}), "/url", REQUIRED)
        response = await api.http.post("/hooks", json={"url": "x", "retries": "many"})
        assert_one_error(response, "/retries", "unable to parse string as an integer")


async def test_the_body_of_a_route_of_the_user() -> None:
    """The limit of bodies holds for every method that has one."""
    async with running(max_body=10) as api:

        @api.app.put("/hooks")
        @api.app.delete("/hooks")
        async def read(request: Request) -> int:
            return len(await request.body())

        for method in ("PUT", "DELETE"):
            assert (await api.http.request(method, "/hooks", content=Chunks(10))).json() == 10
            problem_of(await api.http.request(method, "/hooks", content=Chunks(11)), 413)


async def test_a_handler_of_the_user() -> None:
    """A handler of the user for `Exception` takes the place of ours."""
    async with running() as api:

        @api.app.exception_handler(Exception)
        async def teapot(_: Request, exc: Exception) -> Response:
            return JSONResponse({"bug": str(exc)}, 418)

        @api.app.get("/bug")
        async def bug() -> None:
            raise ValueError("a bug")

        response = await api.client(raise_app_exceptions=False).get("/bug")
        assert (response.status_code, response.json()) == (418, {"bug": "a bug"})


# === OpenAPI ======================================================================================


def operations() -> dict[str, Json]:
    """Return the operations of the document by method and path."""
    found = {}
    for path, methods in create_app(Settings()).openapi()["paths"].items():
        for method, operation in methods.items():
            found[f"{method} {path}"] = operation
    return found


def test_the_operations_of_the_document() -> None:
    """Each operation has the name of its function, and errors are documented once."""
    names = {
        key: (operation["operationId"], *operation["responses"])
        for key, operation in operations().items()
    }
    assert names == {
        "post /tasks": ("submit_task", "202", "default"),
        "get /tasks": ("list_tasks", "200", "default"),
        "get /tasks/{task_id}": ("get_task", "200", "default"),
        "delete /tasks/{task_id}": ("cancel_task", "200", "default"),
        "get /health": ("get_health", "200", "default"),
    }


def test_the_texts_of_the_document() -> None:
    """The app, each operation, each parameter of a query and each response has a text."""
    info = create_app(Settings()).openapi()["info"]
    assert info["title"] == "Task manager"
    assert info["description"].startswith("Submit a task, then poll it")
    for key, operation in operations().items():
        with naming(key):
            assert operation["description"].endswith(".")
            for parameter in operation.get("parameters", []):
                assert parameter["in"] == "path" or parameter["description"].endswith(".")
            success, error = operation["responses"].values()
            assert success["description"] in ("The id.", "The task.", "The tasks.", "The load.")
            assert success["content"]["application/json"]["schema"]
            content = error["content"]["application/problem+json"]
            assert content["schema"] == {"$ref": "#/components/schemas/Problem"}
            legend = re.findall(r"^- (\d+): .+", error["description"], re.MULTILINE)
            assert legend == ["400", "404", "409", "413", "429", "503"]


def test_the_schemas_of_the_document() -> None:
    """Every schema that is used is in the document, with formats and the bounds of numbers."""
    document = create_app(Settings()).openapi()
    schemas = document["components"]["schemas"]
    names = re.findall('"#/components/schemas/([^"]+)"', json.dumps(document))
    assert set(names) == set(schemas)
    numbers = schemas["SumParameters"]["properties"]["numbers"]
    assert numbers["items"] == {"type": "number", "minimum": -1e300, "maximum": 1e300}
    members = {"type", "title", "status", "detail", "errors", "task"}
    assert set(schemas["Problem"]["properties"]) == members
    sections = schemas["ReportParameters"]["properties"]["sections"]
    assert sections == {**sections, "minimum": 1, "maximum": 6, "default": 3}
    texts = [schemas[model.__name__]["description"] for model in SUBMISSIONS]
    assert texts == [model.__doc__ for model in SUBMISSIONS]
    task = schemas["Task"]["properties"]
    formats = {name: json.dumps(field).count('"format"') for name, field in task.items()}
    formatted = [name for name, count in formats.items() if count]
    assert formatted == ["task_id", "created_at", "started_at", "finished_at", "expires_at"]
    assert task["task_id"]["format"] == schemas["Accepted"]["properties"]["task_id"]["format"]
    assert task["task_id"]["format"] == "uuid"
    assert task["started_at"]["anyOf"][0]["format"] == "date-time"


async def test_the_example_of_an_error() -> None:
    """The example of an error is what the API responds to a bad request."""
    async with running() as api:
        response = await api.http.post("/tasks", json={"task_type": "compute_sum"})
        schemas = api.app.openapi()["components"]["schemas"]
        assert schemas["Problem"]["example"] == response.json()


async def test_the_examples_of_the_document() -> None:
    """The examples of a submission are named by task type, and are accepted as they are."""
    async with running(complete) as api:
        operation = api.app.openapi()["paths"]["/tasks"]["post"]
        examples = operation["requestBody"]["content"]["application/json"]["examples"]
        assert list(examples) == list(EXAMPLES)
        for task_type, example in examples.items():
            assert example["value"]["task_type"] == task_type
            assert (await api.http.post("/tasks", json=example["value"])).status_code == 202


# === Settings =====================================================================================

# The default, a value that is too small, the smallest one and the largest one.
SETTINGS = {
    "workers": (5, "0", "1", "1000"),
    "queue_size": (100, "0", "1", "1000000000"),
    "max_tasks": (10_000, "0", "1", "1000000000"),
    "rate_limit": (10, "0", "1", "1000000000"),
    "rate_window": (60, "0", "1", "1000000000"),
    "long_poll": (10, "-0.1", "0", "1000000000"),
    "retention": (600, "0.09", "0.1", "1000000000"),
    "cleanup_interval": (30, "0.09", "0.1", "1000000000"),
    "task_timeout": (60, "0.09", "0.1", "1000000000"),
    "priority_step": (30, "-0.1", "0", "1000000000"),
    "max_body": (65_536, "0", "1", "1000000000"),
    "time_scale": (1, "-0.1", "0", "1000000000"),
}


def test_every_setting_has_a_row() -> None:
    """SETTINGS above has a row for every setting."""
    assert list(SETTINGS) == list(Settings.model_fields)


@parametrize("name", SETTINGS)
def test_a_setting(
    name: str, monkeypatch: MonkeyPatch, capsys: CaptureFixture[str], caplog: LogCaptureFixture
) -> None:
    """Its default and its bounds are these, and a bad value ends the program with status 3."""
    default, too_small, smallest, largest = SETTINGS[name]
    assert getattr(main.read_settings(), name) == default
    variable = f"TASKS_{name.upper()}"
    for value in (smallest, largest):
        monkeypatch.setenv(variable, value)
        assert getattr(main.read_settings(), name) == float(value)
    for bad in (too_small, f"{largest}1", "", "x", "nan", "inf"):
        monkeypatch.setenv(variable, bad)
        with pytest.raises(SystemExit) as exit_:
            main.read_settings()
        assert exit_.value.code == 3
        assert re.fullmatch(rf"{variable}: Input should be [^\n]+\n", capsys.readouterr().err)
    assert caplog.messages == []


def test_two_bad_settings(monkeypatch: MonkeyPatch, capsys: CaptureFixture[str]) -> None:
    """Each bad value has a line of its own."""
    monkeypatch.setenv("TASKS_WORKERS", "many")
    monkeypatch.setenv("TASKS_MAX_BODY", "0")
    with pytest.raises(SystemExit):
        main.read_settings()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["TASKS_WORKERS", "TASKS_MAX_BODY"]


def test_settings_are_constant() -> None:
    """Settings cannot be changed."""
    with pytest.raises(ValidationError):
        Settings().workers = 2  # type: ignore[misc]  # this is the point


async def test_settings_that_are_passed(monkeypatch: MonkeyPatch) -> None:
    """With settings of its own, an app doesn't look at the environment."""
    monkeypatch.setenv("TASKS_WORKERS", "9")
    async with running() as api:
        assert api.manager.health()["workers"]["total"] == 5


def test_unknown_settings(monkeypatch: MonkeyPatch, caplog: LogCaptureFixture) -> None:
    """Unknown variables are named in one warning, and stop nothing, unlike unknown arguments."""
    monkeypatch.setenv("TASKS_WORKERS", "2")
    monkeypatch.setenv("TASKS_WORKER", "3")
    monkeypatch.setenv("TASKS_PORT", "tcp://10.0.0.1:80")
    assert main.read_settings() == Settings(workers=2)
    assert caplog.messages == ["unknown settings are ignored: TASKS_PORT, TASKS_WORKER"]
    assert caplog.records[0].levelname == "WARNING"
    with pytest.raises(ValidationError):
        Settings(worker=3)  # type: ignore[call-arg]  # this is the point


# === Start and shutdown ===========================================================================


@pytest.fixture
def received() -> Iterator[list[int]]:
    """Install handlers for SIGINT and SIGTERM that only note the signals."""
    signals: list[int] = []
    former = {}
    for signum in (signal.SIGINT, signal.SIGTERM):
        former[signum] = signal.signal(signum, lambda number, _: signals.append(number))
    yield signals
    for signum, handler in former.items():
        signal.signal(signum, handler)


async def test_no_tasks_without_workers() -> None:
    """An app accepts tasks only while its lifespan is running."""
    api = Api(create_app(Settings()))
    api.manager.stop_waiting()  # changes nothing
    await assert_closed(api)
    async with api.app.router.lifespan_context(api.app):
        task = await api.run()
    await assert_closed(api)
    assert await api.tasks() == [task]


@parametrize("turns", [0, 1, 10])
async def test_shutdown_with_tasks_and_polls(turns: int) -> None:
    """Shutdown cancels all tasks, answers their polls, and takes no time, even after the start."""
    manager = TaskManager(Settings(), forever)
    async with ending(manager):
        async with manager.working():
            tasks = [manager.submit("test", {}) for _ in range(20)]
            polls = [asyncio.create_task(manager.wait(task["task_id"])) for task in tasks]
            await ticks(turns)
        assert {task["status"] for task in tasks} == {"cancelled"}
        assert await asyncio.gather(*polls) == tasks
        assert clock() == 0


async def test_a_body_that_fails() -> None:
    """If the body of the lifespan raises an exception, the workers and the timer end as well."""
    before = asyncio_tasks()
    with pytest.raises(KeyError):
        async with running():
            raise KeyError
    await ticks()
    assert asyncio_tasks() == before


async def test_a_coroutine_in_the_background() -> None:
    """After `in_background`, its asyncio task has ended."""
    before = asyncio_tasks()
    async with main.in_background(forever()):
        await ticks()
        assert len(asyncio_tasks() - before) == 1
    assert asyncio_tasks() == before


async def test_shutdown_does_not_wait_forever() -> None:
    """Shutdown waits for the clean-up of cancelled work, but for at most 5 s."""

    async def work(*_: Any) -> None:
        try:
            await forever()
        finally:
            await asyncio.sleep(50)

    manager = TaskManager(Settings(), work)
    async with manager.working():
        manager.submit("test", {})
        await ticks()
    assert clock() == 5


@parametrize("cancellations", [1, 2, 3])
async def test_a_shutdown_that_is_cancelled(cancellations: int) -> None:
    """All tasks are final when `working` has ended, even if its end was cancelled."""
    manager = TaskManager(Settings(workers=2), deaf)

    statuses: list[str] = []

    async def program() -> None:
        try:
            async with manager.working():
                for _ in range(4):
                    manager.submit("test", {})
                await forever()
        finally:
            statuses.extend(task["status"] for task in manager.iterate())

    program_task = asyncio.create_task(program())
    await asyncio.sleep(1)
    for _ in range(cancellations):
        program_task.cancel()
        await real_sleep(0)
    await asyncio.wait({program_task})
    assert statuses == ["cancelled"] * 4
    assert clock() == (6 if cancellations == 1 else 1)
    await asyncio.sleep(100)


@parametrize("signum", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_ends_the_polls(signum: int, received: list[int]) -> None:
    """A signal answers the polls, reaches the former handler, and closes the app for new tasks."""
    former = signal.getsignal(signum)
    async with running(forever, workers=1) as api:
        ids = [await api.submit() for _ in range(3)]
        await ticks()
        polls = [asyncio.create_task(api.get(task_id, wait=True)) for task_id in ids[:2]]
        await ticks()
        signal.raise_signal(signum)
        assert received == [signum]
        # The handler can run in the middle of anything, so it has changed nothing itself.
        assert api.manager.health()["status"] == "ok"
        tasks = await asyncio.gather(*polls)
        assert [task["status"] for task in tasks] == ["processing", "queued"]
        for task_id in ids:  # polls that begin after the signal, also of the third task
            await api.get(task_id, wait=True)
        await assert_closed(api)
        assert clock() == 0
    assert signal.getsignal(signum) is former


@real_time
async def test_a_signal_wakes_an_idle_event_loop(received: list[int]) -> None:
    """A signal ends a poll while the event loop has nothing else to do."""
    async with running(forever, long_poll=1000, cleanup_interval=1000, task_timeout=1000) as api:
        task_id = await api.submit()
        await asyncio.sleep(0.01)
        loop = asyncio.get_running_loop()
        woken = Mock(wraps=loop.call_soon_threadsafe)
        with MonkeyPatch.context() as patch:
            patch.setattr(loop, "call_soon_threadsafe", woken)
            signal.raise_signal(signal.SIGTERM)
            assert (await api.get(task_id, wait=True))["status"] == "processing"
        assert woken.call_count == 1


async def test_a_signal_after_one_of_two_apps_has_ended(received: list[int]) -> None:
    """Two apps, started a, b and stopped a, b: a signal reaches b, then the former handler."""
    first, other = create_app(Settings()), create_app(Settings())
    one = first.router.lifespan_context(first)
    two = other.router.lifespan_context(other)
    await one.__aenter__()
    await two.__aenter__()
    await one.__aexit__(None, None, None)
    signal.raise_signal(signal.SIGTERM)
    await ticks()
    with pytest.raises(main.UnavailableError):
        other.state.manager.health()
    await two.__aexit__(None, None, None)
    assert received == [signal.SIGTERM]


def test_a_signal_after_the_loop_of_an_app_is_closed(received: list[int]) -> None:
    """A handler that was left behind, because another one is in front of it, raises nothing."""

    async def overlap() -> None:
        first, other = create_app(Settings()), create_app(Settings())
        one = first.router.lifespan_context(first)
        two = other.router.lifespan_context(other)
        await one.__aenter__()
        await two.__aenter__()
        await one.__aexit__(None, None, None)
        await two.__aexit__(None, None, None)

    run(overlap())
    signal.raise_signal(signal.SIGINT)
    assert received == [signal.SIGINT]


async def test_no_handler_is_added_if_there_is_none(received: list[int]) -> None:
    """Without a server that handles signals, a signal still ends the process."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the fixture restores the handler
    async with running():
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# === A manager that is used again =================================================================


async def test_the_same_loop_again() -> None:
    """Of a former run, only its finished tasks are left, until they expire."""
    async with running(complete, workers=1, retention=10) as api:
        await api.run()
    async with api.app.router.lifespan_context(api.app):
        client = Api(api.app)
        (former,) = await client.tasks()
        assert former["status"] == "completed"
        task = await client.run()
        assert (await client.tasks()) == [task, former]
        assert api.manager.health()["tasks"]["completed"] == 2
        await asyncio.sleep(10)
        assert await client.tasks() == []


@pytest.mark.usefixtures("received")
def test_another_loop_and_another_thread() -> None:
    """An app can be started again in another event loop, in another thread too."""
    api = Api(create_app(Settings()))

    async def once() -> None:
        async with api.app.router.lifespan_context(api.app):
            assert (await api.run())["status"] == "completed"
        await asyncio.sleep(600)
        assert await api.tasks() == []

    run(once())
    run(once())
    with ThreadPoolExecutor() as pool:  # no signal handler can be set there
        pool.submit(run, once()).result()


async def test_abandoned_work_of_a_former_run(expected_errors: list[str]) -> None:
    """When it ends at last, it changes no task, figure or worker, and its bug is in the log."""

    async def work(*_: Any) -> None:
        await deaf()
        raise ValueError("a bug")

    works = iter([work, work, complete, forever])
    settings = Settings(workers=2, task_timeout=1000)
    manager = TaskManager(settings, lambda *args: next(works)(*args))
    expected_errors.extend([BUG, BUG])
    async with manager.working():
        former = [manager.submit("test", {}) for _ in range(2)]
        await asyncio.sleep(1)
    assert clock() == 6
    async with manager.working():
        assert (await outcome(manager))["status"] == "completed"
        task = manager.submit("test", {})
        await asyncio.sleep(95)  # the abandoned work ends at 100
        assert [task["status"] for task in former] == ["cancelled", "cancelled"]
        assert task["status"] == "processing"
        assert manager.health()["workers"] == {"busy": 1, "total": 2}
    assert clock() == 101


def test_abandoned_work_in_another_loop() -> None:
    """A shutdown doesn't wait for the work that a former run has abandoned in another loop."""
    works = iter([deaf, complete])
    manager = TaskManager(Settings(), lambda *args: next(works)(*args))

    async def once(seconds: float) -> None:
        async with manager.working():
            manager.submit("test", {})
            await asyncio.sleep(1)
        assert clock() == seconds

    loop = VirtualLoop()
    loop.run_until_complete(once(6))
    run(once(1))
    loop.run_until_complete(asyncio.sleep(100))  # in which the deaf work ends
    loop.close()


@parametrize("same_loop", [True, False])
def test_a_run_that_was_interrupted(same_loop: bool) -> None:
    """If a KeyboardInterrupt has stopped the event loop, the next run drops what was unfinished."""

    async def two_seconds() -> None:
        await asyncio.sleep(2)

    works = iter([forever, two_seconds, forever])
    manager = TaskManager(Settings(workers=1, queue_size=2), lambda *_: next(works)())

    async def interrupted() -> None:
        async with manager.working():
            finished = manager.submit("test", {})
            await ticks()
            manager.cancel(finished["task_id"])
            await ticks()
            manager.submit("test", {})
            await ticks()
            manager.submit("test", {})
            asyncio.get_running_loop().call_soon(Mock(side_effect=KeyboardInterrupt))
            await asyncio.sleep(1000)

    async def again() -> None:
        async with manager.working():
            assert [task["status"] for task in manager.iterate()] == ["cancelled"]
            tasks = [manager.submit("test", {}) for _ in range(2)]
            await asyncio.sleep(5)  # in which the work of the previous run ends
            assert [task["status"] for task in tasks] == ["processing", "queued"]
            assert manager.health()["workers"] == {"busy": 1, "total": 1}
            assert manager.health()["queue"]["size"] == 1
        assert [task["status"] for task in tasks] == ["cancelled", "cancelled"]

    loops = [VirtualLoop()]
    with pytest.raises(KeyboardInterrupt):
        loops[0].run_until_complete(interrupted())
    if not same_loop:
        loops.append(VirtualLoop())
    loops[-1].run_until_complete(again())
    for loop in loops:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(ticks(20))
        loop.close()


async def test_the_limiter_goes_on_counting() -> None:
    """A restart of the workers gives no client a new quota."""
    async with running(rate_limit=2) as api:
        await api.http.get(LIMITED)
    async with api.app.router.lifespan_context(api.app):
        client = Api(api.app).http
        assert (await client.get(LIMITED)).headers["ratelimit"] == '"default";r=0;t=60'


# === Any order of the event loop ==================================================================
#
# asyncio runs callbacks in the order in which they became ready, and a program can be correct by
# chance in that order only. These tests shuffle the order, and print the seed that failed.
# `SCHEDULES=500 pytest` tries 500 orders.

SCHEDULES = int(os.environ.get("SCHEDULES", "24"))


def in_any_order(scenario: Callable[[Random], Scenario]) -> None:
    """Run a scenario in many orders. Its generator is for its own choices."""
    for seed in range(SCHEDULES):
        with naming(f"seed {seed}"):
            run(scenario(Random(seed)), seed)


async def race(work: Any, status: str, tick: int) -> None:
    """Cancel a task at one tick of its life, and compare everything that is said about its end."""
    async with managing(work, workers=1) as manager:
        task = manager.submit("test", {})
        following = manager.submit("test", {})
        poll = asyncio.create_task(final(manager, task))
        await ticks(tick)
        try:
            end = manager.cancel(task["task_id"]).copy()
            assert end["status"] == "cancelled"
        except main.TaskFinishedError as exc:
            end = exc.task.copy()
            assert end["status"] == status
        assert await poll == end
        assert clock() == 0
        await asyncio.sleep(1)
        assert task == end
        assert task["result"] == ("done" if task["status"] == "completed" else None)
        assert following["status"] == status
        assert_counts_agree(manager)


RACES = {"complete": (complete, "completed"), "fail": (fail, "failed")}
RACES["resist"] = (resist, "completed")


@parametrize("name", RACES)
def test_the_race_of_cancel_and_finish(name: str) -> None:
    """At whichever tick a task is cancelled, it has one end, and every client sees the same one."""
    work, status = RACES[name]
    for tick in range(16):
        with naming(f"tick {tick}"):
            run(race(work, status, tick))
    in_any_order(lambda random: race(work, status, random.randrange(16)))


async def random_work(_: str, parameters: Json, report: Report) -> None:
    """Work that takes some time, and fails if it takes 3 s."""
    for percent in (20, 60, 90):
        report(percent)
        await asyncio.sleep(parameters["seconds"] / 3)
    if parameters["seconds"] == 3:
        raise main.TaskFailedError("3")


async def poll_until_final(manager: TaskManager, task: Task) -> None:
    """Poll a task until it has finished, and assert that no change is reported late."""
    while task["status"] not in FINAL:
        before = task["status"]
        await manager.wait(task["task_id"])
        if task["status"] != before:
            changed = task["finished_at"] or task["started_at"]
            # The task can have started and finished before this client goes on.
            assert clock() == pytest.approx(second(changed), abs=0.001), task


async def submit_and_poll(manager: TaskManager, random: Random) -> None:
    """Submit a task, cancel some tasks, and poll the task from two clients."""
    await asyncio.sleep(random.choice([0, 0, 0.5, 1, 20]))
    seconds = random.choice([0, 1, 3, 7])
    priority = random.choice(list(main.LEVELS))
    expected = "failed" if seconds == 3 else "completed"
    try:
        task = manager.submit("test", {"seconds": seconds}, priority)
    except main.UnavailableError:
        queue = manager.health()["queue"]
        assert queue["size"] == queue["capacity"]
        return
    polls = asyncio.gather(*[poll_until_final(manager, task) for _ in range(2)])
    if random.random() < 0.4:
        await asyncio.sleep(random.choice([0, 1, 2, 5]))
        with suppress(main.TaskFinishedError):
            manager.cancel(task["task_id"])
            expected = "cancelled"
    await polls
    assert task["status"] == expected, task


def compare(manager: TaskManager, seen: dict[str, Task]) -> None:
    """Compare the tasks with how they were, and remember how they are."""
    for task in manager.iterate():
        old = seen.get(task["task_id"], task)
        if old["status"] in FINAL:
            assert task == old
        if task["status"] == "queued":
            assert old["status"] == "queued"
        assert task["progress"] >= old["progress"], task
        assert (task["progress"] == 100) == (task["status"] == "completed"), task
        seen[task["task_id"]] = task.copy()


async def storm(random: Random) -> None:
    """Submit, poll and cancel tasks from 40 clients, and stop in the middle of five tasks."""
    seen: dict[str, Task] = {}
    async with managing(random_work, workers=3, queue_size=6, retention=10, long_poll=4) as manager:
        clients = asyncio.gather(*[submit_and_poll(manager, random) for _ in range(40)])
        while not clients.done():
            await asyncio.sleep(random.choice([0, 0, 0.5, 1, 3]))
            with naming(f"second {clock()}"):
                compare(manager, seen)
                assert_counts_agree(manager)
        await clients
        for _ in range(5):
            manager.submit("test", {"seconds": 1})
        await ticks(random.randrange(10))


def test_a_storm_in_any_order(caplog: LogCaptureFixture) -> None:
    """No task is lost, ends twice or goes back, and no poll misses a change."""
    caplog.set_level(logging.ERROR)
    in_any_order(storm)


# === Real servers =================================================================================

PATIENCE = 20  # seconds for one step of a server, which only end a hang
UGLY = re.compile("Traceback|never|destroyed|ResourceWarning|ERROR|CRITICAL")
FOLDER = Path(main.__file__).parent
needs_signals = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")


class Server:
    """A uvicorn in a process of its own, started as in the README, under `python -X dev`."""

    def __init__(self, **settings: Any) -> None:
        """Start the server, and wait until it is listening or has ended."""
        command = [sys.executable, "-X", "dev", "-m", "uvicorn", "main:app", "--port", "0"]
        variables = {f"TASKS_{name.upper()}": str(value) for name, value in settings.items()}
        self.process = subprocess.Popen(
            command, env=os.environ | variables, cwd=FOLDER, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stderr
        self.stderr = self.process.stderr
        self.log = ""
        watchdog = threading.Timer(PATIENCE, self.process.kill)
        watchdog.start()
        for line in self.stderr:
            self.log += line
            if "running on" in line:
                break
        watchdog.cancel()
        found = re.search(r"http://127.0.0.1:(\d+)", self.log)
        self.port = int(found[1]) if found else 0
        url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=url, timeout=PATIENCE, trust_env=False)

    def __enter__(self) -> Self:
        if not self.port:
            self.__exit__()
            pytest.fail(f"the server has not started:\n{self.log}", pytrace=False)
        return self

    def __exit__(self, *_: object) -> None:
        """End the process, even if it hangs."""
        self.http.close()
        self.process.kill()
        self.process.communicate()

    def submit(self) -> str:
        """Submit a task that takes 30 s, and return its path."""
        return str(self.http.post("/tasks", json=SLOW).headers["location"])

    def connect(self, *lines: str) -> socket.socket:
        """Send a request on a new connection, which the caller has to close."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)
        connection.sendall("\r\n".join([*lines, "Host: x", "", ""]).encode())
        return connection

    def long_poll(self, path: str) -> socket.socket:
        """Return a connection with a long poll that the server has received."""
        # Two requests on one connection. The server starts the second one when it has responded to
        # the first one.
        poll = f"GET {path}?wait=true HTTP/1.1"
        connection = self.connect("GET /health HTTP/1.1", "Host: x", "", poll)
        health = HTTPResponse(connection)
        health.begin()
        assert b"busy" in health.read()
        return connection

    def wait(self) -> int:
        """Wait until the process has ended, and return its exit code."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(PATIENCE)
        code = self.process.poll()
        self.process.kill()
        self.log += self.stderr.read()
        if code is None:
            pytest.fail(f"the server does not stop:\n{self.log}", pytrace=False)
        return code

    def stop(self, signum: int = signal.SIGTERM) -> int:
        """End the process with a signal, and return its exit code. Its log must be clean."""
        self.process.send_signal(signum)
        code = self.wait()
        assert not UGLY.search(self.log), self.log
        return code


def read_all(connection: socket.socket) -> bytes:
    """Read until the server closes the connection."""
    with connection:
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_the_list_arrives_in_parts() -> None:
    """The list is sent in several chunks, which are one JSON array together."""
    with Server(rate_limit=1000, queue_size=1000) as server:
        paths = [server.submit() for _ in range(101)]
        answer = read_all(server.connect("GET /tasks HTTP/1.1", "Connection: close"))
        # In the chunked encoding, the size of each chunk stands on a line before it.
        _, *parts, _ = re.split(rb"\r\n[0-9a-f]+\r\n", answer)
        assert len(parts) == 2
        found = [f"/tasks/{task['task_id']}" for task in json.loads(b"".join(parts))]
        assert found == paths[::-1]


def test_clients_that_disconnect() -> None:
    """A client that disconnects during a long poll, a list or its own body breaks nothing."""
    with Server(long_poll=0.2) as server:
        path = server.submit()
        server.long_poll(path).close()
        server.connect("GET /tasks HTTP/1.1").close()
        server.connect("POST /tasks HTTP/1.1", "Content-Length: 100").close()
        assert server.http.get(f"{path}?wait=true").json()["status"] == "processing"
        assert server.http.delete(path).json()["status"] == "cancelled"
        server.stop()


@needs_signals
@parametrize(("signum", "code"), [(signal.SIGTERM, -15), (signal.SIGINT, 0)])
def test_shutdown_of_a_server(signum: int, code: int) -> None:
    """A signal ends the server although polls are open, cancels all tasks, and the log is clean."""
    with Server(rate_limit=10_000, long_poll=3600) as server:
        paths = [server.submit() for _ in range(20)]
        server.long_poll(paths[0]).close()  # also with a poll whose client has left
        connection = server.long_poll(paths[0])
        assert server.stop(signum) == code
        assert b'"status":"processing"' in read_all(connection)
        assert len(re.findall(r"INFO: +task \w{8} generate_report cancelled", server.log)) == 20


def test_a_server_with_bad_settings() -> None:
    """The server ends by itself with status 3, and its output names each bad variable."""
    server = Server(workers="many", retention=0, worker=2)
    try:
        assert server.wait() == 3
        assert re.search("^TASKS_WORKERS: Input should be ", server.log, re.MULTILINE)
        assert re.search("^TASKS_RETENTION: Input should be ", server.log, re.MULTILINE)
        assert "unknown settings are ignored: TASKS_WORKER\n" in server.log
        assert "Traceback" not in server.log
    finally:
        server.__exit__()


PROGRAM = """
import asyncio, signal, sys, time
import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the shell has done to it

async def work(task_type, parameters, report):
    print("working", flush=True)
    if {computes}:
        end = time.monotonic() + 0.2  # a signal arrives in the meantime
        while time.monotonic() < end:
            pass
    await asyncio.sleep(3600)

tasks = []
manager = main.TaskManager(main.Settings(), work)

async def program():
    async with manager.working():
        tasks.append(manager.submit("test", {{}}))
        await asyncio.sleep(3600)

try:
    if {runs}:
        asyncio.run(program())
    else:
        asyncio.new_event_loop().run_until_complete(program())
except KeyboardInterrupt:
    print(tasks[0]["status"])
    sys.exit(42)
"""


@needs_signals
@parametrize(
    ("runs", "computes"),
    [(True, False), (True, True), (False, True)],
    ids=["asyncio.run waits", "asyncio.run computes", "run_until_complete computes"],
)
def test_ctrl_c_with_the_engine_alone(runs: bool, computes: bool) -> None:
    """Ctrl-C ends a program that uses the engine without a server."""
    source = PROGRAM.format(computes=computes, runs=runs)
    with subprocess.Popen(
        [sys.executable, "-c", source],
        cwd=FOLDER,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        watchdog = threading.Timer(PATIENCE, process.kill)
        watchdog.start()
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == "working\n"
        process.send_signal(signal.SIGINT)
        output = process.stdout.read()
        errors = process.stderr.read()
        assert process.wait() == 42, errors
        watchdog.cancel()
    # `run_until_complete` does not end the tasks. Before 3.11, asyncio.run cancels the work, too.
    if runs and sys.version_info >= (3, 11):
        assert output == "cancelled\n"
        assert errors == ""


# === Your own tests ===============================================================================
#
# Tests of your own can stand here, or in a file of their own:
#
#     from test_main import anyio_backend, expected_errors  # pytest uses these two as fixtures
#     from test_main import clock, final, managing, real_time, running
#
#     pytestmark = pytest.mark.anyio
#
# An asynchronous test runs in virtual time. `running` runs an app, and `managing` only the engine.


async def test_my_report() -> None:
    """This runs a `case` of `execute`, with the parameters as a client sends them."""
    async with running() as api:
        task = await api.run(task_type="generate_report", parameters={"title": "T", "sections": 6})
        assert task["result"] == "T\n6 sections"
        assert clock() == 30  # seconds, which have taken no time


@real_time
async def test_my_thread() -> None:
    """Work that uses a thread, a program or a socket needs real time."""
    finish = threading.Event()

    async def work(_: str, parameters: Json, __: Report) -> Any:
        await anyio.to_thread.run_sync(finish.wait, 30)
        return parameters["numbers"]

    async with running(work) as api:
        task_id = await api.submit(parameters={"numbers": [1, 2]})
        assert (await api.get(task_id))["result"] is None  # the thread blocks nothing else
        finish.set()
        assert (await api.get_final(task_id))["result"] == [1, 2]


def block(*_: Any) -> None:
    """Block a thread for a moment."""
    threading.Event().wait(0.01)


USES: dict[str, Any] = {
    "a thread of asyncio": lambda *_: asyncio.to_thread(block),
    "a thread of anyio": lambda *_: anyio.to_thread.run_sync(block),
    "a program": lambda *_: asyncio.create_subprocess_exec("true"),
    "a socket": lambda *_: asyncio.open_connection("127.0.0.1", 9),
}


@parametrize("name", USES)
def test_a_forgotten_real_time(name: str) -> None:
    """In virtual time, work that needs real time fails with a message that says so."""

    async def test() -> None:
        await USES[name]()
        await asyncio.sleep(60)

    with pytest.raises((RuntimeError, AssertionError), match="use @real_time"):
        run(test())
