"""The tests of main.py. Run them with `pytest`.

The first section has one short test for each part of the exercise. The others look for trouble:
changes during a wait, races, full queues, failing work, poison values, shutdown.

Asynchronous tests run in virtual time, on an event loop whose clock jumps to the next timer instead
of waiting for it. So ten minutes take no time, and a test can look at a task exactly when it times
out. Such a loop knows nothing of threads, programs and sockets. A test whose work uses one of them
has to be decorated with `@real_time`.
"""

import asyncio
import functools
import gc
import inspect
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
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import datetime, timezone
from http.client import HTTPResponse
from pathlib import Path
from random import Random
from typing import Any, TypeAlias
from unittest.mock import AsyncMock, Mock
from uuid import UUID

import httpx
import pytest
from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from httpx import ASGITransport, AsyncClient
from pydantic import BaseModel, ValidationError
from pydantic_core import to_json
from pytest import LogCaptureFixture, MonkeyPatch
from typing_extensions import Self

# `import main` reads the settings, and the shell must not change any result.
OF_THE_SHELL = ("TASKS_", "UVICORN_", "WEB_CONCURRENCY", "FORWARDED_ALLOW_IPS", "FORCE_COLOR")
for exported in [name for name in os.environ if name.startswith(OF_THE_SHELL)]:
    del os.environ[exported]

import main
from main import EXAMPLES, FINAL, TRANSITIONS, Report, Settings, Task, TaskManager, create_app

if not __debug__:
    raise RuntimeError("these tests need assert statements: run them without -O")

parametrize = pytest.mark.parametrize
Json: TypeAlias = dict[str, Any]
Scenario: TypeAlias = Coroutine[Any, Any, None]

# --- Virtual time ---------------------------------------------------------------------------------

START = 1000.0  # where the virtual clock starts
BEGIN = datetime(2026, 1, 1, tzinfo=timezone.utc)  # the wall clock at that moment
real_sleep = asyncio.sleep


class JumpingSelector(selectors.SelectSelector):
    """Moves the clock of its loop to the next timer instead of waiting for it."""

    loop: "VirtualLoop"
    turns = 0  # of the loop since the clock has moved

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Return the sockets that are ready, or let virtual time pass."""
        self.loop.shuffle()
        self.turns += 1
        if self.turns > 20_000:
            raise AssertionError("the loop is busy, but virtual time doesn't pass")
        events = super().select(0)
        if not events and timeout is None:
            raise AssertionError("everything waits forever: use @real_time for threads and sockets")
        if not events and timeout:
            self.turns = 0
            self.loop.moment += timeout
        return events


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop with a virtual clock. With a seed, it shuffles its callbacks."""

    def __init__(self, seed: int | None = None) -> None:
        self.moment = START
        self.random = None if seed is None else Random(seed)
        selector = JumpingSelector()
        selector.loop = self
        super().__init__(selector)
        self._clock_resolution = 1e-9

    def time(self) -> float:
        """Return the virtual time in seconds."""
        return self.moment

    def shuffle(self) -> None:
        """Change the order of the callbacks that are ready."""
        if self.random is not None:
            self.random.shuffle(self._ready)  # type: ignore[attr-defined]  # of BaseEventLoop


def run(coroutine: Scenario, seed: int | None = None) -> None:
    """Run a coroutine in virtual time, with `asyncio.sleep` and the wall clock patched."""
    loop = VirtualLoop(seed)

    def wall_clock() -> float:
        return BEGIN.timestamp() + loop.moment - START

    with MonkeyPatch.context() as patch:
        patch.setattr(time, "time", wall_clock)
        try:
            loop.run_until_complete(coroutine)
        finally:
            for task in asyncio.all_tasks(loop):
                task.cancel()
            loop.run_until_complete(real_sleep(0))
            loop.close()


def synchronous(test: Any, run: Callable[[Scenario], None]) -> Any:
    """Return a test that pytest can call, and that runs the coroutine of `test`."""

    @functools.wraps(test)
    def run_test(*args: Any, **kwargs: Any) -> None:
        run(test(*args, **kwargs))

    return run_test


def real_time(test: Any) -> Any:
    """Run a test in real time. Its work can use threads, programs and sockets."""
    return synchronous(test, lambda coroutine: asyncio.run(asyncio.wait_for(coroutine, 60)))


def second(text: str) -> float:
    """Return how many seconds after the start of the test a time is."""
    moment = datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=timezone.utc)
    return (moment - BEGIN).total_seconds()


def clock() -> float:
    """Return the seconds since the start of the test."""
    return asyncio.get_running_loop().time() - START


async def ticks(count: int = 10) -> None:
    """Let everything run that is ready, without letting time pass."""
    for _ in range(count):
        await real_sleep(0)


# --- Helpers --------------------------------------------------------------------------------------

SUM = EXAMPLES["compute_sum"]["value"]
SLOW = {"task_type": "generate_report", "parameters": {"title": "T", "sections": 6}}
NO_TASK = "00000000-0000-4000-8000-000000000000"
INTERNAL_ERROR = {"code": "internal_error", "message": "An internal error occurred."}
LIMITED = "/nowhere"  # a path that doesn't exist, but is limited


class Api:
    """An app that is running, and a client of it."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app
        self.manager: TaskManager = app.state.manager
        self.http = self.client()

    def client(self, host: str | None = "10.0.0.1", **options: Any) -> AsyncClient:
        """Return a client with an address of its own."""
        transport = ASGITransport(self.app, raise_app_exceptions=False, **options)
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
        response = await self.http.get(f"/tasks/{task_id}", params=query)
        assert response.status_code == 200, response.text
        return dict(response.json())

    async def final(self, task_id: str) -> Json:
        """Wait until the status of a task is final, and return the task."""
        await final(self.manager, self.manager.get(task_id))
        return await self.get(task_id)

    async def cancel(self, task_id: str) -> httpx.Response:
        return await self.http.delete(f"/tasks/{task_id}")

    async def tasks(self, **query: Any) -> list[Json]:
        response = await self.http.get("/tasks", params=query)
        assert response.status_code == 200, response.text
        return list(response.json())


def asyncio_tasks() -> set[asyncio.Task[Any]]:
    """Return the asyncio tasks that are running, without the current one."""
    return {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}


@asynccontextmanager
async def ending(manager: TaskManager) -> AsyncIterator[None]:
    """Assert that everything that was started in the body of `async with` has ended."""
    before = asyncio_tasks()
    yield
    assert {task["status"] for task in manager.iterate()} <= set(FINAL)
    await ticks()
    assert asyncio_tasks() <= before


@asynccontextmanager
async def running(execute: Any = None, **settings: Any) -> AsyncIterator[Api]:
    """Run an app with a rate limit that no test reaches."""
    settings = {"rate_limit": 1_000_000, **settings}
    api = Api(create_app(Settings(**settings), execute))
    async with ending(api.manager), api.app.router.lifespan_context(api.app), api.http:
        yield api


@asynccontextmanager
async def managing(execute: Any, **settings: Any) -> AsyncIterator[TaskManager]:
    """Run a manager without HTTP, for tests of the engine."""
    manager = TaskManager(Settings(**settings), execute)
    async with ending(manager), manager.working():
        yield manager


async def final(manager: TaskManager, task: Task) -> Task:
    """Wait until a task is final."""
    for _ in range(100):
        if task["status"] in FINAL:
            return task
        await manager.wait(task["task_id"])
    raise AssertionError("the task doesn't finish")


def check(manager: TaskManager) -> None:
    """Assert that /health and the list agree."""
    statuses = [task["status"] for task in manager.iterate()]
    health = manager.health()
    for status in TRANSITIONS:
        assert health["tasks"][status] == statuses.count(status)
    assert health["queue"]["size"] == statuses.count("queued")
    assert health["workers"]["busy"] == statuses.count("processing")
    assert health["workers"]["busy"] <= health["workers"]["total"]


@pytest.fixture(autouse=True)
def expected_errors(caplog: LogCaptureFixture) -> Iterator[list[str]]:
    """Fail a test whose errors in the log, each with a traceback, are not those it expects."""
    expected: list[str] = []
    caplog.set_level(logging.INFO)
    yield expected
    gc.collect(1)  # asyncio logs an exception that was never retrieved when its task is collected
    records = caplog.get_records("call") + caplog.get_records("teardown")
    errors = [record for record in records if record.levelno >= logging.ERROR]
    messages = [record.getMessage() for record in errors]
    assert all(record.exc_info for record in errors), messages
    for message in messages:
        assert any(message.endswith(part) for part in expected), message
    for part in expected:
        assert any(message.endswith(part) for message in messages), part


def problem_of(response: httpx.Response, status: int) -> Json:
    """Return a problem document, and assert that it has that status."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["cache-control"] == "no-store"
    body = dict(response.json())
    assert body["type"] == "about:blank"
    assert body["status"] == status
    assert body["title"]
    return body


async def complete(*_: Any) -> str:
    await ticks(4)
    return "done"


async def fail(*_: Any) -> None:
    await ticks(4)
    raise main.TaskFailedError("failed")


async def resist(*_: Any) -> str:
    for _turn in range(8):
        with suppress(asyncio.CancelledError):
            await ticks(1)
    return "done"


async def hundred_seconds(*_: Any) -> None:
    await asyncio.sleep(100)


async def forever(*_: Any) -> None:
    await asyncio.Event().wait()


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
        async with running(cleanup_interval=1000) as api:
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
    async with running(rate_limit=10) as api:
        for _ in range(10):
            assert (await api.http.get("/tasks")).status_code == 200
        response = await api.http.get("/tasks")
        assert response.status_code == 429
        await asyncio.sleep(int(response.headers["retry-after"]))
        assert (await api.http.get("/tasks")).status_code == 200


async def test_cancellation() -> None:
    """Queued and processing tasks can be cancelled, finished tasks cannot."""
    async with running(workers=1) as api:
        processing = await api.submit()
        queued = await api.submit()
        await ticks()
        for task_id in (queued, processing, queued):
            response = await api.cancel(task_id)
            assert response.status_code == 200
            assert response.json() == await api.get(task_id)
            assert response.json()["status"] == "cancelled"
        completed = await api.submit()
        task = await api.final(completed)
        problem = problem_of(await api.cancel(completed), 409)
        assert problem["detail"] == "The task has already completed."
        assert problem["task"] == task
        problem_of(await api.cancel(NO_TASK), 404)


async def test_concurrency() -> None:
    """Five tasks are processed at the same time, and a free worker takes the next one."""
    async with running() as api:
        ids = [await api.submit() for _ in range(7)]
        tasks = [await api.final(task_id) for task_id in ids]
        starts = [second(task["started_at"]) for task in tasks]
        assert starts == [0, 0, 0, 0, 0, 5, 5]


async def test_full_queue() -> None:
    """If the queue is full, a submission is refused with 503 and leaves no trace."""
    async with running(workers=1, queue_size=2) as api:
        await api.submit()
        await ticks()
        waiting = await api.submit()
        await api.submit()
        response = await api.post()
        assert problem_of(response, 503)["detail"] == "The queue is full."
        assert int(response.headers["retry-after"]) >= 1
        assert len(await api.tasks()) == 3
        await api.cancel(waiting)  # gives its place back
        await api.submit()


async def test_invalid_parameters() -> None:
    """An invalid submission is refused with 400 and a pointer to the error."""
    async with running() as api:
        response = await api.post(parameters={"numbers": [1, "two"]})
        (error,) = problem_of(response, 400)["errors"]
        assert error["pointer"] == "/parameters/numbers/1"
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
        assert clock() == pytest.approx(5)


@parametrize("task", [SUM, {"task_type": "simulate_failure"}, None])
async def test_clean_up(task: Json | None) -> None:
    """A completed, failed or cancelled task can be read until its `expires_at`, not longer."""
    async with running(retention=600, cleanup_interval=100_000) as api:
        response = await api.http.post("/tasks", json=task or SUM)
        task_id = response.json()["task_id"]
        if task is None:
            await api.cancel(task_id)
        finished = await api.final(task_id)
        assert second(finished["expires_at"]) == second(finished["finished_at"]) + 600
        await asyncio.sleep(599.75)
        assert await api.get(task_id) == finished
        await asyncio.sleep(0.25)
        problem = problem_of(await api.http.get(f"/tasks/{task_id}"), 404)
        assert problem["detail"] == "There is no such task. It may have expired."
        problem_of(await api.cancel(task_id), 404)


# === Submission and results =======================================================================


async def test_a_task_has_the_same_fields_in_every_state() -> None:
    """All twelve fields exist from queued to completed, and are null until they have a value."""
    async with running(workers=1) as api:
        await api.submit()
        await asyncio.sleep(1)
        task_id = await api.submit(task_type="generate_report", parameters={"title": "T"})
        queued = await api.get(task_id)
        await asyncio.sleep(13.5)
        processing = await api.get(task_id)
        completed = await api.final(task_id)
    empty = {"result": None, "error": None, "finished_at": None, "expires_at": None}
    assert queued == queued | empty | {"status": "queued", "progress": 0, "started_at": None}
    assert processing == processing | empty | {"status": "processing", "progress": 60}
    assert completed == completed | {"status": "completed", "progress": 100, "error": None}
    assert completed["result"] == "T\n3 sections"
    for task in (queued, processing, completed):
        assert list(task) == list(Task.__annotations__)
        assert task["task_type"] == "generate_report"
        assert task["parameters"] == {"title": "T", "sections": 3}
        assert task["priority"] == "normal"
        assert task["created_at"] == "2026-01-01T00:00:01.000000Z"
    assert second(processing["started_at"]) == pytest.approx(5)
    assert second(completed["finished_at"]) == pytest.approx(20)


@parametrize("message", ["simulated failure", "no disk"])
async def test_a_failure(message: str) -> None:
    """simulate_failure fails after 5 s with the message of the client, or with the default one."""
    parameters = {"message": message} if message == "no disk" else {}
    async with running(main.execute) as api:
        task = await api.final(
            await api.submit(task_type="simulate_failure", parameters=parameters)
        )
        assert task["error"] == {"code": "task_failed", "message": message}
        assert (task["status"], task["result"], task["progress"]) == ("failed", None, 90)
        assert clock() == pytest.approx(5)


SUMS: list[tuple[list[float], float]] = [
    ([1, 2, 3], 6),
    ([2**60 + 1, 10**300], 2**60 + 1 + 10**300),
    ([0.1] * 10, 1.0),
    ([1e300] * 1000, math.fsum([1e300] * 1000)),
    ([1e300, 1e150, 0.5, -1e300, -1e150], 0.5),
]


@parametrize(("numbers", "result"), SUMS)
async def test_sums(numbers: list[float], result: float) -> None:
    """Integers stay integers, also in the parameters. The sum of floats is correctly rounded."""
    async with running() as api:
        task = await api.final(await api.submit(parameters={"numbers": numbers}))
        # Unlike `==`, `repr` tells 1 from 1.0.
        assert repr(task["parameters"]) == repr({"numbers": numbers})
        assert repr(task["result"]) == repr(result)


async def test_progress() -> None:
    """Progress is an integer that never falls, and odd values of the work change nothing."""
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


async def test_the_wall_clock_decides_nothing() -> None:
    """If the wall clock is set, later times change, but no deadline does."""
    async with running(retention=600) as api:
        task_id = await api.submit()
        await ticks()
        time.time = lambda: BEGIN.timestamp() + 400 * 24 * 3600  # `run` restores it
        task = await api.final(task_id)
        assert second(task["finished_at"]) == 400 * 24 * 3600
        await asyncio.sleep(599.5)
        assert await api.get(task_id) == task


async def test_nothing_outside_can_change_a_task() -> None:
    """The caller of `submit` and the work have copies of the parameters and of the result."""
    parameters: Json = {"numbers": [1]}
    result: list[Any] = []

    async def work(task_type: str, copy: Json, _: Report) -> list[Any]:
        assert (task_type, copy) == ("test", {"numbers": [1]})
        copy["numbers"].append(object())
        return result

    async with managing(work) as manager:
        task = manager.submit("test", parameters)
        parameters["numbers"].append(object())
        await final(manager, task)
        result.append(object())
        assert task["parameters"] == {"numbers": [1]}
        assert task["result"] == []


# === The list =====================================================================================


async def test_the_list() -> None:
    """The list is in the order of submission, and `limit` is applied after the filter."""
    async with running(workers=1) as api:
        response = await api.http.get("/tasks")
        assert response.json() == []
        assert response.headers["content-type"] == "application/json"
        assert response.headers["cache-control"] == "no-store"
        ids = [await api.submit() for _ in range(5)]
        await asyncio.sleep(5.01)
        await api.cancel(ids[2])
        tasks = await api.tasks()
        assert tasks == [await api.get(task_id) for task_id in ids]
        statuses = [task["status"] for task in tasks]
        assert statuses == ["completed", "processing", "cancelled", "queued", "queued"]
        assert await api.tasks(status="cancelled") == tasks[2:3]
        assert await api.tasks(status="queued", limit=1) == tasks[3:4]
        assert await api.tasks(limit=2) == tasks[:2]
        assert await api.tasks(status="failed") == []
        assert await api.tasks(status="queued", limit=10**30) == tasks[3:]


@parametrize("count", [0, 1, 99, 100, 101, 500])
async def test_the_list_at_every_length(count: int) -> None:
    """A list is valid JSON with a task on each line, and others get a turn after 100 tasks."""
    async with managing(forever, queue_size=1000) as manager:
        tasks = [manager.submit("test", {}) for _ in range(count)]
        await ticks()
        for limit in (None, 1, 100, count or 1):
            turns: list[None] = []
            parts = []
            async for part in main.stream_tasks(manager.iterate(), limit):
                asyncio.get_running_loop().call_soon(turns.append, None)
                parts.append(part)
            body = b"".join(parts)
            assert json.loads(body) == tasks[:limit]
            assert len(body.splitlines()) == len(tasks[:limit]) + 2
            assert all(parts)
            assert len(turns) == len(parts) - 1
            assert limit or len(turns) == count // 100


async def test_tasks_change_while_a_list_is_read() -> None:
    """A slow reader sees each task as it is when its part is made, and no expired ones."""
    async with managing(forever, queue_size=1000, retention=10) as manager:
        ids = [manager.submit("test", {})["task_id"] for _ in range(500)]
        manager.cancel(ids[-1])
        stream = main.stream_tasks(manager.iterate(), None)
        body = await anext(stream)
        manager.submit("test", {})
        await asyncio.sleep(10)
        manager.cancel(ids[-2])
        body += b"".join([part async for part in stream])
        statuses = {task["task_id"]: task["status"] for task in json.loads(body)}
        assert list(statuses) == ids[:-1]
        assert statuses[ids[-2]] == "cancelled"


# === Polling ======================================================================================


async def test_a_long_poll_ends_with_the_change() -> None:
    """A long poll is answered at the moment of the next change, or immediately if there is none."""
    async with running(workers=1) as api:
        await api.submit()
        task_id = await api.submit()
        for status, moment in (("processing", 5), ("completed", 10), ("completed", 10)):
            assert (await api.get(task_id, wait=True))["status"] == status
            assert clock() == pytest.approx(moment)
        problem_of(await api.http.get(f"/tasks/{NO_TASK}?wait=true"), 404)


@parametrize("long_poll", [0, 3, 10])
async def test_a_long_poll_has_a_timeout(long_poll: float) -> None:
    """Without a change, a long poll returns the task after `long_poll` seconds."""
    async with running(forever, long_poll=long_poll) as api:
        task_id = await api.submit()
        await ticks()
        for wait in (True, False):
            assert (await api.get(task_id, wait=wait))["status"] == "processing"
            assert clock() == pytest.approx(long_poll)


async def test_a_task_expires_before_its_poll_goes_on() -> None:
    """A poll returns the final task, even if it has expired before the poll could go on."""
    async with managing(forever, retention=1) as manager:
        task = manager.submit("test", {})
        await ticks()
        poll = asyncio.create_task(manager.wait(task["task_id"]))
        await ticks()
        manager.cancel(task["task_id"])
        asyncio.get_running_loop().moment += 2  # type: ignore[attr-defined]  # the loop was busy
        manager.expire()
        assert (await poll)["status"] == "cancelled"


# === Cancellation =================================================================================


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

    expected_errors.append("unexpected exception")
    async with managing(work, task_timeout=10) as manager:
        task = manager.submit("test", {})
        await asyncio.sleep(9.5)
        cancelled = manager.cancel(task["task_id"]).copy()
        assert manager.cancel(task["task_id"]) == cancelled
        await asyncio.sleep(1)  # the timeout passes, and then the shutdown begins
    assert cleaned == [11.5]
    assert task == cancelled


# === The queue ====================================================================================


async def test_too_many_tasks() -> None:
    """With `max_tasks` tasks, a submission is refused until one of them has expired."""
    async with running(workers=1, max_tasks=3, retention=20) as api:
        for _ in range(3):
            await api.submit()
        response = await api.post()
        assert problem_of(response, 503)["detail"] == "There are too many tasks."
        assert response.headers["retry-after"] == "10"
        await asyncio.sleep(25.01)
        await api.submit()


async def starts(manager: TaskManager, tasks: list[Task]) -> list[float]:
    """Wait until the tasks are final, and return the seconds at which they started."""
    return [second((await final(manager, task))["started_at"] or "") for task in tasks]


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
        assert await starts(manager, order) == [100, 200, 300, 400, 500, 600]


@parametrize(("later", "low_first"), [(59.5, False), (60, True), (60.5, True)])
async def test_no_task_starves(later: float, low_first: bool) -> None:
    """A level of priority is worth 30 s: a low task can only be overtaken for 60 s."""
    async with managing(hundred_seconds, workers=1, task_timeout=1000) as manager:
        manager.submit("test", {})
        await ticks()
        low = manager.submit("test", {}, "low")
        await asyncio.sleep(later)
        high = manager.submit("test", {}, "high")
        low_start, high_start = await starts(manager, [low, high])
        assert (low_start < high_start) == low_first


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


def raising(exception: BaseException) -> Any:
    """Return work that raises an exception."""
    return AsyncMock(side_effect=exception)


async def cancel_itself(*_: Any) -> None:
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
    "KeyboardInterrupt": raising(KeyboardInterrupt()),
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
async def test_a_bug_in_the_work(name: str, expected_errors: list[str]) -> None:
    """Work with a bug has failed, the log has the exception, and the worker goes on."""
    expected_errors.append("test raised an unexpected exception")
    work = BUGS[name]
    async with managing(lambda *args: work(*args), workers=1) as manager:
        task = await final(manager, manager.submit("test", {}))
        assert task["status"] == "failed"
        assert task["error"] == INTERNAL_ERROR
        work = complete
        task = await final(manager, manager.submit("test", {}))
        assert task["status"] == "completed"


GROUPS = [FAILED, Group(FAILED), Group(FAILED, ValueError()), Group(Group(FAILED))]


@parametrize("exception", GROUPS)
async def test_a_failure_in_a_group(exception: Exception) -> None:
    """A TaskFailedError keeps its message if it is the first exception of a group."""
    async with managing(raising(exception)) as manager:
        task = await final(manager, manager.submit("test", {}))
        assert task["error"] == {"code": "task_failed", "message": "no disk ?"}


@parametrize(("timeout", "status"), [(4.9, "failed"), (5.1, "completed")])
async def test_a_timeout(timeout: float, status: str) -> None:
    """A task that takes longer than `task_timeout` fails then, and the worker goes on."""
    async with running(workers=1, task_timeout=timeout) as api:
        task_id = await api.submit()
        following = await api.submit()
        task = await api.final(task_id)
        await ticks()
        assert task["status"] == status
        assert clock() == pytest.approx(min(timeout, 5))
        assert (await api.get(following))["status"] == "processing"
        if status == "failed":
            assert task["error"] == {"code": "timeout", "message": "The task took too long."}
            assert task["progress"] == 90


@parametrize("end", ["failed", "cancelled"])
async def test_work_that_ignores_its_cancellation(end: str, caplog: LogCaptureFixture) -> None:
    """Such work keeps its worker until the timeout and 5 s of grace have passed, not longer."""

    async def work(*_: Any) -> str:
        while clock() < 100:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(100 - clock())
        return "late"

    async with managing(work, workers=1, task_timeout=10) as manager:
        task = manager.submit("test", {})
        following = manager.submit("test", {})
        await asyncio.sleep(2)
        if end == "cancelled":
            manager.cancel(task["task_id"])
        await asyncio.sleep(8 + 4.99)
        assert (task["status"], following["status"]) == (end, "queued")
        await asyncio.sleep(0.02)
        assert following["status"] == "processing"
        assert "is abandoned, because it ignores its cancellation\n" in caplog.text
        await asyncio.sleep(100)
        assert task["result"] is None


@parametrize("exception", [RuntimeError("a bug"), asyncio.CancelledError(), BaseException()])
async def test_a_worker_that_fails(
    exception: BaseException, monkeypatch: MonkeyPatch, expected_errors: list[str]
) -> None:
    """If a worker fails, all stop, no task is left unfinished, and the server says so."""
    if isinstance(exception, RuntimeError):
        expected_errors.append("a worker failed, so all workers stop")
    async with running(forever, workers=2) as api:
        ids = [await api.submit() for _ in range(4)]
        await ticks()
        gets = iter([raising(exception), forever])
        monkeypatch.setattr(main.TaskQueue, "get", lambda _: next(gets)())
        await api.cancel(ids[0])  # its worker asks for the next task
        await ticks(20)
        problem_of(await api.http.get("/health"), 503)
        problem_of(await api.post(), 503)
        for task_id in ids:
            assert (await api.get(task_id))["status"] == "cancelled"


@parametrize("task_type", EXAMPLES)
async def test_every_task_type_has_a_case(task_type: str) -> None:
    """`execute` knows every task type. Only its first step runs, so nothing is really done."""

    class Reached(Exception):
        """The work has looked at its parameters."""

    class Parameters(dict[str, Any]):
        def __getitem__(self, key: str) -> Any:
            raise Reached

    coroutine = main.execute(task_type, Parameters(), lambda _: None)
    with suppress(Reached, StopIteration):
        coroutine.send(None)
    coroutine.close()


def test_every_model_is_in_the_union() -> None:
    """A model for a submission has an example that is valid, and is in `AnySubmission`."""
    models = [model for model in main.BaseSubmission.__subclasses__() if model.__module__ == "main"]
    assert {model.example["task_type"] for model in models} == set(EXAMPLES)
    for model in models:
        assert model.model_validate(model.example)


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
    "integer key": {1: 2},
    "tuple key": {(1, 2): 3},
    "date": BEGIN,
    "itself": ITSELF,
    "deep": nested(250),
    "very deep": nested(5000),
    "5000 digits": 10**5000,
}


@parametrize("wrap", [lambda value: value, lambda value: {"a": ({"b": [value]},)}])
@parametrize("name", NOT_JSON)
async def test_a_value_without_a_json_form(
    name: str, wrap: Callable[[Any], Any], expected_errors: list[str]
) -> None:
    """Such a value is refused as a parameter, and fails its task as a result, at any depth."""
    expected_errors.append("unexpected exception")
    value = wrap(NOT_JSON[name])
    async with managing(AsyncMock(return_value=value)) as manager:
        with pytest.raises(main.InvalidJsonError):
            manager.submit("test", {"free": value})
        task = await final(manager, manager.submit("test", {}))
        assert task["error"] == INTERNAL_ERROR
        assert json.loads(to_json(list(manager.iterate()))) == [task]


async def test_parameters_without_a_json_form_are_a_bad_request(monkeypatch: MonkeyPatch) -> None:
    """The client gets a 400 that points to the parameters."""
    monkeypatch.setattr(BaseModel, "model_dump", lambda _: {"free": math.nan})
    async with running() as api:
        assert_one_error(await api.post(), "/parameters", "The value has no JSON form.")


async def test_a_result_with_a_json_form() -> None:
    """Every value with a JSON form is a result that clients can read. A tuple becomes a list."""
    values = [1.5, None, True, "\N{GRINNING FACE}", 10**300, nested(190)]
    async with running(AsyncMock(return_value={"a": tuple(values)})) as api:
        task = await api.final(await api.submit())
        assert task["result"] == {"a": values}
        assert await api.tasks() == [task]


# === Health, clean-up, log ========================================================================


async def test_health() -> None:
    """/health counts the tasks by status until they expire, and must not be cached."""
    async with running(workers=1, queue_size=7, retention=10, time_scale=0.2) as api:
        await api.submit(task_type="simulate_failure", parameters={})
        ids = [await api.submit() for _ in range(5)]
        await api.cancel(ids[4])
        await asyncio.sleep(2.25)
        response = await api.http.get("/health")
        assert response.headers["cache-control"] == "no-store"
        assert response.json() == {
            "status": "ok",
            "tasks": {"queued": 2, "processing": 1, "completed": 1, "failed": 1, "cancelled": 1},
            "queue": {"size": 2, "capacity": 7},
            "workers": {"busy": 1, "total": 1},
        }
        await asyncio.sleep(7.5)
        assert api.manager.health()["tasks"]["cancelled"] == 1
        await asyncio.sleep(0.25)
        assert api.manager.health()["tasks"]["cancelled"] == 0


async def test_the_timer(
    monkeypatch: MonkeyPatch, expected_errors: list[str], caplog: LogCaptureFixture
) -> None:
    """The clean-up runs without requests, and an exception in one round doesn't end it."""
    expected_errors.append("the clean-up failed")
    async with running(retention=1, cleanup_interval=30) as api:
        with monkeypatch.context() as patch:
            patch.setattr(main.RateLimiter, "sweep", raising(RuntimeError("a bug")))
            await asyncio.sleep(31)
        await api.cancel(await api.submit())
        await asyncio.sleep(30)
        assert "compute_sum expired after 1.0 s" in caplog.text


async def test_the_log(caplog: LogCaptureFixture) -> None:
    """Each step of a task is a line with its short id, its type, and how long the status lasted."""
    async with running(workers=1, retention=1) as api:
        body = {"task_type": "simulate_failure", "parameters": {"message": "a\nb"}}
        failing = f"task {(await api.submit(**body))[:8]} simulate_failure"
        await asyncio.sleep(1)
        urgent = f"task {(await api.submit(priority='high'))[:8]} compute_sum"
        await asyncio.sleep(6)
        await api.tasks()
    assert [line for line in caplog.messages if line.startswith("task ")] == [
        f"{failing} queued with priority normal",
        f"{failing} processing after 0.0 s",
        f"{urgent} queued with priority high",
        f"{failing} failed after 5.0 s: 'a\\nb'",
        f"{urgent} processing after 4.0 s",
        f"{failing} expired after 1.0 s",
        f"{urgent} cancelled after 2.0 s",
    ]


# === Rate limit ===================================================================================


@contextmanager
def naming(case: object) -> Iterator[None]:
    """Name the row of a table, or the seed, with which a test fails."""
    try:
        yield
    except BaseException as exc:
        raise AssertionError(f"failed with {case}") from exc


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
            waits.append(int((await api.http.get(LIMITED)).headers["retry-after"]))
            await asyncio.sleep(1)
        # Not 5, because uvicorn closes idle connections after 5 s.
        assert waits == [*range(40, 5, -1), 6, 4, 3, 2, 1]
        assert (await api.http.get(LIMITED)).status_code == 404
        assert (await api.http.get(LIMITED)).headers["retry-after"] == "2"
        await asyncio.sleep(300)
        assert (await api.http.get(LIMITED)).headers["ratelimit"] == '"default";r=9;t=60'


async def test_retry_after_is_enough() -> None:
    """A client that waits as long as it was told is accepted, despite rounding errors."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
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
        assert (await api.http.get(LIMITED)).headers["retry-after"] == "1"


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


async def test_every_response_counts() -> None:
    """Errors count like successes, but refused requests don't."""
    requests = [
        ("POST", "/tasks", b"{", 400),
        ("POST", "/tasks", b"x" * 70_000, 413),
        ("GET", LIMITED, b"", 404),
        ("PUT", f"/tasks/{NO_TASK}", b"", 405),
        ("GET", f"/tasks/{NO_TASK}?wait=maybe", b"", 400),
        ("DELETE", "/tasks/x", b"", 400),
    ]
    async with running(rate_limit=2) as api:
        for number, (method, path, body, status) in enumerate(requests):
            client = api.client(f"192.0.2.{number}")
            for left, expected in ((1, status), (0, status), (0, 429), (0, 429)):
                response = await client.request(method, path, content=body)
                with naming(path):
                    problem_of(response, expected)
                    assert response.headers["ratelimit"] == f'"default";r={left};t=60'
                    assert ("retry-after" in response.headers) == (expected == 429)


async def test_the_limit_comes_before_the_body() -> None:
    """The body of a refused request is not read."""

    async def body() -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""

    async with running(rate_limit=1) as api:
        await api.http.get(LIMITED)
        problem_of(await api.http.post("/tasks", content=body()), 429)


async def test_free_paths() -> None:
    """The documentation and /health neither need quota nor use it, behind a prefix too."""
    paths = ["/", "/docs", "/redoc", "/openapi.json", "/health", "/favicon.ico"]
    async with running(rate_limit=1) as api:
        for number, prefix in enumerate(["", "/api", "/api/"]):
            client = api.client(f"192.0.2.{number}", root_path=prefix)
            client.base_url = f"http://test{prefix}"
            for path in [*paths, LIMITED, *paths]:
                response = await client.get(path)
                assert ("ratelimit" in response.headers) == (path == LIMITED), prefix + path
                assert response.status_code in (200, 307, 404), prefix + path
            problem_of(await client.get(LIMITED), 429)


async def test_who_shares_a_limit() -> None:
    """An IPv4 address, an IPv6 /64 network, and all that is neither have one limit each."""
    groups: list[list[str | None]] = [
        ["192.0.2.1", "::ffff:192.0.2.1"],
        ["192.0.2.2"],
        ["2001:db8::1", "2001:db8:0:0:ffff::9"],
        ["2001:db8:0:1::1"],
        ["fe80::1%eth0", "fe80::2"],
        [None, "not an ip", "x" * 20_000, "", "300.1.1.1"],
    ]
    header = {"X-Forwarded-For": "192.0.2.9"}  # every client can send it
    async with running(rate_limit=1) as api:
        for hosts in groups:
            for number, host in enumerate(hosts):
                response = await api.client(host).get(LIMITED, headers=header)
                assert response.status_code == (429 if number else 404), host


async def test_the_limiter_forgets_quiet_clients() -> None:
    """After a sweep, the limiter keeps only the clients that have a request in the window."""
    limiter = main.RateLimiter(3, 60)
    for number in range(1000):
        await limiter.hit(f"client {number}")
    await asyncio.sleep(59)
    await limiter.hit("late")
    await limiter.sweep()
    assert len(limiter._times) == 1001
    await asyncio.sleep(1)
    await limiter.sweep()
    assert list(limiter._times) == ["late"]
    assert await limiter.quota("late") == (2, 59)
    assert await limiter.quota("other") == (3, 0)


async def chunks(size: int) -> AsyncIterator[bytes]:
    """Yield a body in parts, so that its length is not declared."""
    for _ in range(size):
        yield b"x"


async def test_middleware_goes_around_the_limits() -> None:
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
    for body, status in ((chunks(11), 413), (b"", 400), (b"", 429)):
        response = await client.post("/tasks", content=body)
        problem_of(response, status)
        assert response.headers["access-control-allow-origin"] == "*"
    assert seen == [200] * 5 + [413, 400, 429]


# === Bad input ====================================================================================

NUMBER = "Input should be a number from -1e300 to 1e300"
OBJECT = "Input should be an object, sent as application/json"
TYPES = f"Input should be one of {', '.join(EXAMPLES)}"
EXTRA = "Extra inputs are not permitted"
UNREADABLE = "The body should be JSON in UTF-8, without deep nesting or very long numbers."
BAD_NUMBERS = ["NaN", "-Infinity", "1e400", "-1.1e300", "9" * 4000, "true", "null", '"5"', "[1]"]
# Parameters, the end of the pointer, and a regular expression for the end of the message.
BAD_PARAMETERS: dict[str, list[tuple[str, str, str]]] = {
    "compute_sum": [
        *[(f'"numbers": [1, {number}]', "numbers/1", NUMBER) for number in BAD_NUMBERS],
        ('"numbers": []', "numbers", "at least 1 item .*"),
        (f'"numbers": [{"1, " * 1000} 1]', "numbers", "at most 1000 items .*"),
    ],
    "simulate_failure": [
        ('"message": "\\ud800"', "message", "valid string, .*"),
        ('"message": ""', "message", "at least 1 character"),
        ('"~a/b": 1', "~0a~1b", EXTRA),
        (f'"{"k" * 9000}": 1', "k" * 188, EXTRA),
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
    (b"", "", "Field required"),
    (b'{"a":', "", "Malformed JSON at character 5: Expecting value"),
    (b"[]", "", OBJECT),
    (b'{"task_type": "\xff"}', "", UNREADABLE),
    (b'{"task_type": %s}' % (b"9" * 5000), "", UNREADABLE),
    (json.dumps(SUM).encode("utf-16"), "", UNREADABLE),
    (json.dumps(SUM).encode("utf-32-be"), "", UNREADABLE),
    (b'{"task_type": "simulate_failure", "\\ud800": 1}', "", "valid string, .*"),
    (b'{"task_type": "\\ud800"}', "/task_type", TYPES),
    (b'{"parameters": {}}', "/task_type", TYPES),
    (b'{"task_type": ["compute_sum"]}', "/task_type", TYPES),
    (b'{"task_type": "%s"}' % (b"x" * 9000), "/task_type", TYPES),
    (b'{"task_type": "compute_sum"}', "/parameters", "Field required"),
    (b'{"task_type": "simulate_failure", "parameters": 5}', "/parameters", OBJECT),
    (b'{"task_type": "simulate_failure", "prority": 1}', "/prority", EXTRA),
    (b'{"task_type": "simulate_failure", "priority": "x"}', "/priority", "'high', .* or 'low'"),
]


def body_of(task_type: str, parameters: str) -> bytes:
    """Return the body of a submission."""
    return f'{{"task_type": "{task_type}", "parameters": {{{parameters}}}}}'.encode()


def assert_one_error(response: httpx.Response, pointer: str, detail: str) -> None:
    """Assert that a response is a short 400 with this error."""
    problem = problem_of(response, 400)
    assert problem["detail"] == "The request is invalid."
    (error,) = problem["errors"]
    assert error["pointer"] == pointer
    assert re.search(f"{detail}$", error["detail"]), error
    assert len(response.content) < 600


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
        deep = "[" * 30_000 + "]" * 30_000  # its message depends on the version of Python
        for body in (deep.encode(), body_of("compute_sum", f'"numbers": {deep}')):
            assert len(problem_of(await api.send(body), 400)["errors"]) == 1
        response = await api.post(**{f"field{number}": number for number in range(1000)})
        assert len(problem_of(response, 400)["errors"]) == 10
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
    """Only a body that is declared as JSON is read as JSON, and it has to be in UTF-8."""
    body = json.dumps(SUM).encode()
    async with running() as api:
        for content_type in ("text/plain", "", "application/x-www-form-urlencoded"):
            assert_one_error(await api.send(body, content_type), "", OBJECT)
        assert_one_error(await api.send(b"\0", "application/octet-stream"), "", OBJECT)
        body = json.dumps(SUM).encode("utf-16")
        assert_one_error(await api.send(body, "application/JSON"), "", UNREADABLE)


async def test_the_size_of_a_body() -> None:
    """A body of one byte more than `max_body` is a 413, whether its length is declared or not."""
    async with running(max_body=1000) as api:
        for body in (b"x" * 1000, chunks(1000)):
            problem_of(await api.http.post("/tasks", content=body), 400)
        for body in (b"x" * 1001, chunks(1001)):
            problem = problem_of(await api.http.post("/tasks", content=body), 413)
            assert problem["detail"] == "The body is larger than 1000 bytes."
        # The body of a GET is ignored. A server would log an exception that is raised here.
        transport = ASGITransport(api.app)
        async with AsyncClient(transport=transport, base_url="http://test") as client:
            response = await client.request("GET", "/tasks", content=chunks(1001))
        assert response.json() == []


async def test_bad_queries_and_ids() -> None:
    """A bad or unknown parameter gets a 400 that names it."""
    rows = [
        ("?limit=0", "limit", "greater than or equal to 1"),
        ("?limit=" + "9" * 5000, "limit", "integer, .*"),
        ("?status=%ff", "status", "'queued', .* or 'cancelled'"),
        ("?state=failed", "state", EXTRA),
        ("?" + "k" * 5000, "k" * 200, EXTRA),
        ("/%00", "task_id", "valid UUID, .*"),
        ("/" + "a" * 5000, "task_id", "valid UUID, .*"),
        (f"/{NO_TASK}?wait=maybe", "wait", "boolean, .*"),
        (f"/{NO_TASK}?wiat=true", "wiat", EXTRA),
    ]
    async with running() as api:
        for path, pointer, detail in rows:
            with naming(path[:100]):
                assert_one_error(await api.http.get("/tasks" + path), pointer, detail)


# === HTTP =========================================================================================


async def test_unknown_paths_and_methods() -> None:
    """They get a problem document, and never a redirect that contains the Host header."""
    async with running() as api:
        for path in ("/nowhere", "/tasks/", "//"):
            response = await api.http.get("http://evil.test" + path)
            problem_of(response, 404)
            assert "location" not in response.headers, path
        for path in ("/tasks", f"/tasks/{NO_TASK}"):
            response = await api.http.put(path)
            problem_of(response, 405)
            assert response.headers["allow"], path


async def test_links_behind_a_prefix() -> None:
    """With `--root-path` or in a mount, the location and the redirect contain the prefix."""
    prefixes = {"": "", "/api": "/api", "/a b/ü": "/a%20b/%C3%BC"}
    async with running() as api:
        for root_path, prefix in prefixes.items():
            client = api.client(root_path=root_path)
            response = await client.post("/tasks", json=SUM)
            assert response.headers["location"].startswith(f"{prefix}/tasks/")
            response = await client.get(f"http://test{root_path}/")
            assert response.headers["location"] == f"{prefix}/docs"


async def test_a_bug_is_a_500(monkeypatch: MonkeyPatch) -> None:
    """A bug, even a ValidationError of pydantic, is a 500 that shows nothing."""
    with pytest.raises(ValidationError) as invalid:
        Settings(workers=0)
    async with running() as api:
        for bug in (RuntimeError("secret"), invalid.value):
            monkeypatch.setattr(api.manager, "get", Mock(side_effect=bug))
            monkeypatch.setattr(api.manager, "health", Mock(side_effect=bug))
            for path in ("/health", f"/tasks/{NO_TASK}"):
                response = await api.http.get(path)
                assert problem_of(response, 500)["detail"] == "The server failed."
            assert "errors" not in response.json()
            assert response.headers["ratelimit"]


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


# === OpenAPI ======================================================================================


def test_the_operations_of_the_document() -> None:
    """Each response is described, errors are problem documents, and there is no 422."""
    document = create_app(Settings()).openapi()
    assert document["info"]["title"] == "Task manager"
    found = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            found[f"{method} {path}"] = " ".join(sorted(operation["responses"]))
            assert operation["description"]
            for status, response in operation["responses"].items():
                assert response["description"].endswith(".")
                if status in ("200", "202"):
                    schema = response["content"]["application/json"]["schema"]
                    assert "$ref" in schema or schema["items"]["$ref"].endswith("/Task")
                else:
                    schema = response["content"]["application/problem+json"]["schema"]
                    assert schema["$ref"].endswith("/Problem")
    assert found == {
        "post /tasks": "202 400 413 429 503 default",
        "get /tasks": "200 400 429 default",
        "get /tasks/{task_id}": "200 400 404 429 default",
        "delete /tasks/{task_id}": "200 400 404 409 429 default",
        "get /health": "200 503 default",
    }


def test_the_schemas_of_the_document() -> None:
    """Every schema that is used is in the document, and the bounds of numbers are too."""
    document = create_app(Settings()).openapi()
    schemas = document["components"]["schemas"]
    names = re.findall('"#/components/schemas/([^"]+)"', json.dumps(document))
    assert set(names) <= set(schemas)
    assert "HTTPValidationError" not in names
    numbers = schemas["SumParameters"]["properties"]["numbers"]
    assert numbers["items"] == {"type": "number", "minimum": -1e300, "maximum": 1e300}
    assert schemas["Problem"]["example"].keys() <= schemas["Problem"]["properties"].keys()


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

# The default, a value that is too small, and the smallest one.
SETTINGS = {
    "workers": (5, "0", "1"),
    "queue_size": (100, "0", "1"),
    "max_tasks": (10_000, "0", "1"),
    "rate_limit": (10, "0", "1"),
    "rate_window": (60, "0", "1"),
    "long_poll": (10, "-0.1", "0"),
    "retention": (600, "0.09", "0.1"),
    "cleanup_interval": (30, "0.09", "0.1"),
    "task_timeout": (60, "0.09", "0.1"),
    "priority_step": (30, "-0.1", "0"),
    "max_body": (65_536, "0", "1"),
    "time_scale": (1, "-0.1", "0"),
}


@parametrize("name", Settings.model_fields)
def test_a_setting(name: str, monkeypatch: MonkeyPatch) -> None:
    """A bad value raises SystemExit with one line that names the variable and what is allowed."""
    default, too_small, smallest = SETTINGS[name]
    largest = 1000 if name == "workers" else 1_000_000_000
    assert getattr(main.read_settings(), name) == default
    variable = f"TASKS_{name.upper()}"
    for value in (smallest, str(largest)):
        monkeypatch.setenv(variable, value)
        assert getattr(main.read_settings(), name) == float(value)
    for bad in (too_small, str(largest + 1), "", "x", "nan", "inf"):
        monkeypatch.setenv(variable, bad)
        with pytest.raises(SystemExit, match=rf"^{variable}: Input should be [^\n]+$"):
            main.read_settings()


# === Start and shutdown ===========================================================================


@pytest.fixture
def received() -> Iterator[list[int]]:
    """Install handlers for SIGINT and SIGTERM that only note the signals."""
    received: list[int] = []
    former = {}
    for signum in (signal.SIGINT, signal.SIGTERM):
        former[signum] = signal.signal(signum, lambda number, _: received.append(number))
    yield received
    for signum, handler in former.items():
        signal.signal(signum, handler)


@pytest.mark.usefixtures("received")
def test_start_and_stop_twice() -> None:
    """Only a started app accepts tasks. It can be started again, in another thread too."""
    api = Api(create_app(Settings(rate_limit=100)))

    async def assert_closed() -> None:
        for response in (await api.post(), await api.http.get("/health")):
            detail = problem_of(response, 503)["detail"]
            assert detail == "The server does not accept tasks at the moment."
        assert await api.tasks() == []

    async def once() -> None:
        await assert_closed()
        async with api.app.router.lifespan_context(api.app):
            await ticks()
            assert (await api.final(await api.submit()))["status"] == "completed"
        await asyncio.sleep(1000)
        await assert_closed()

    run(once())
    with ThreadPoolExecutor() as pool:  # no signal handler can be set there
        pool.submit(run, once()).result()


@parametrize("turns", [0, 1, 10])
async def test_shutdown_with_tasks_and_polls(turns: int) -> None:
    """Shutdown cancels all tasks, answers their polls, and takes no time, even after the start."""
    manager = TaskManager(Settings(), forever)
    async with manager.working():
        tasks = [manager.submit("compute_sum", {}) for _ in range(20)]
        polls = [asyncio.create_task(manager.wait(task["task_id"])) for task in tasks]
        await ticks(turns)
    assert await asyncio.gather(*polls) == tasks
    assert {task["status"] for task in tasks} == {"cancelled"}
    assert clock() == 0
    assert not asyncio_tasks()


async def test_everything_is_cancelled_after_a_signal() -> None:
    """After a second Ctrl-C, asyncio cancels all its tasks, and the tasks are still cancelled."""
    manager = TaskManager(Settings(workers=2), forever)
    async with manager.working():
        tasks = [manager.submit("compute_sum", {}) for _ in range(3)]
        await ticks()
        manager.stop_waiting()
        for asyncio_task in asyncio_tasks():
            asyncio_task.cancel()
        await ticks(20)
        assert [task["status"] for task in tasks] == ["cancelled"] * 3


async def test_shutdown_does_not_wait_forever() -> None:
    """Shutdown waits for the clean-up of cancelled work, but for at most 5 s."""

    async def work(*_: Any) -> None:
        try:
            await forever()
        finally:
            await asyncio.sleep(50)

    manager = TaskManager(Settings(), work)
    async with manager.working():
        manager.submit("compute_sum", {})
        await ticks()
    assert clock() == 5


@parametrize("signum", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_ends_the_polls(signum: int, received: list[int]) -> None:
    """A signal answers the polls, reaches the former handler, and closes the app for new tasks."""
    former = signal.getsignal(signum)
    async with running(forever, workers=1) as api:
        task_id = await api.submit()
        await ticks()
        poll = asyncio.create_task(api.get(task_id, wait=True))
        await ticks()
        signal.raise_signal(signum)
        assert (await poll)["status"] == "processing"
        assert (await api.get(task_id, wait=True))["status"] == "processing"
        problem_of(await api.post(), 503)
        assert clock() == 0
        assert received == [signum]
    assert signal.getsignal(signum) is former


def test_a_signal_after_one_of_two_apps_has_ended(received: list[int]) -> None:
    """Two apps, started a, b and stopped a, b: a signal reaches b, then the former handler."""

    async def overlap() -> None:
        first = create_app(Settings())
        second = create_app(Settings())
        one = first.router.lifespan_context(first)
        two = second.router.lifespan_context(second)
        await one.__aenter__()
        await two.__aenter__()
        await one.__aexit__(None, None, None)
        signal.raise_signal(signal.SIGTERM)
        await ticks()
        with pytest.raises(main.UnavailableError):
            second.state.manager.health()
        await two.__aexit__(None, None, None)

    run(overlap())
    signal.raise_signal(signal.SIGINT)  # reaches a handler of the first app, whose loop is closed
    assert received == [signal.SIGTERM, signal.SIGINT]


async def test_no_handler_is_added_if_there_is_none(received: list[int]) -> None:
    """Without a server that handles signals, a signal still ends the process."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the fixture restores the handler
    async with running():
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


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


async def race(work: Any, tick: int) -> None:
    """Cancel a task at one tick of its life, and compare everything that is said about its end."""
    async with managing(work, workers=1) as manager:
        task = manager.submit("test", {})
        following = manager.submit("test", {})
        poll = asyncio.create_task(final(manager, task))
        start = clock()
        await ticks(tick)
        try:
            end = manager.cancel(task["task_id"]).copy()
            assert end["status"] == "cancelled"
        except main.TaskFinishedError as exc:
            end = exc.task.copy()
            assert end["status"] == ("failed" if work is fail else "completed")
        assert await poll == end
        assert clock() == start
        await asyncio.sleep(1)
        assert task == end
        assert task["result"] == ("done" if task["status"] == "completed" else None)
        assert following["status"] == ("failed" if work is fail else "completed")
        check(manager)


@parametrize("work", [complete, fail, resist])
def test_the_race_of_cancel_and_finish(work: Any) -> None:
    """At whichever tick a task is cancelled, it has one end, and every client sees the same one."""
    for tick in range(16):
        run(race(work, tick))
    in_any_order(lambda random: race(work, random.randrange(16)))


async def random_work(_: str, parameters: Json, report: Report) -> None:
    """Work that takes some time, and fails if it takes 3 s."""
    for percent in (20, 60, 90):
        report(percent)
        await asyncio.sleep(parameters["seconds"] / 3)
    if parameters["seconds"] == 3:
        raise main.TaskFailedError("3")


async def poll(manager: TaskManager, task: Task) -> None:
    """Poll a task until it has finished, and assert that no change is reported late."""
    while task["status"] not in FINAL:
        assert clock() < 10_000
        before = task["status"]
        await manager.wait(task["task_id"])
        if task["status"] != before:
            times = [text for text in (task["started_at"], task["finished_at"]) if text]
            assert any(abs(clock() - second(text)) < 0.001 for text in times)


async def submit_and_poll(manager: TaskManager, random: Random) -> None:
    """Submit a task, cancel some tasks, and poll the task from two clients."""
    await real_sleep(random.choice([0, 0, 0.5, 1, 20]))
    seconds = random.choice([0, 1, 3, 7])
    priority = random.choice(list(main.PRIORITY_LEVELS))
    expected = "failed" if seconds == 3 else "completed"
    try:
        task = manager.submit("test", {"seconds": seconds}, priority)
    except main.UnavailableError:
        assert manager.health()["queue"]["size"] == 6
        return
    polls = asyncio.gather(poll(manager, task), poll(manager, task))
    if random.random() < 0.4:
        await real_sleep(random.choice([0, 1, 2, 5]))
        with suppress(main.TaskFinishedError):
            manager.cancel(task["task_id"])
            expected = "cancelled"
    await polls
    assert task["status"] == expected


def compare(manager: TaskManager, seen: dict[str, Task]) -> None:
    """Compare the tasks with how they were, and remember how they are."""
    for task in manager.iterate():
        old = seen.get(task["task_id"], task)
        assert old["status"] not in FINAL or task == old
        assert task["status"] != "queued" or old["status"] == "queued"
        assert task["progress"] >= old["progress"]
        assert (task["progress"] == 100) == (task["status"] == "completed")
        seen[task["task_id"]] = task.copy()


def test_a_storm_in_any_order(caplog: LogCaptureFixture) -> None:
    """No task is lost, ends twice or goes back, and no poll misses a change."""
    caplog.set_level(logging.ERROR)

    async def scenario(random: Random) -> None:
        settings = Settings(workers=3, queue_size=6, retention=10, long_poll=4)
        manager = TaskManager(settings, random_work)
        seen: dict[str, Task] = {}
        async with manager.working():
            clients = asyncio.gather(*[submit_and_poll(manager, random) for _ in range(40)])
            while not clients.done():
                await real_sleep(random.choice([0, 0, 0.5, 1, 3]))
                compare(manager, seen)
                check(manager)
            await clients
            for _ in range(5):
                manager.submit("compute_sum", {"seconds": 1})
            await ticks(random.randrange(10))
        assert all(task["status"] in FINAL for task in manager.iterate())
        assert not asyncio_tasks()

    in_any_order(scenario)


# === Real threads, programs and servers ===========================================================


@real_time
async def test_work_in_a_thread() -> None:
    """Work that blocks a thread blocks nothing else."""
    finish = threading.Event()

    async def work(*_: Any) -> bool:
        return await asyncio.to_thread(finish.wait, 30)

    async with running(work) as api:
        task_id = await api.submit()
        assert (await api.get(task_id))["result"] is None
        finish.set()
        assert (await api.final(task_id))["result"] is True


@real_time
async def test_work_in_a_program() -> None:
    """A program dies with its task."""
    processes: asyncio.Queue[asyncio.subprocess.Process] = asyncio.Queue()

    async def work(*_: Any) -> None:
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", "input()", stdin=-1)
        processes.put_nowait(process)
        try:
            await process.wait()
        finally:
            process.kill()
            await process.wait()

    async with managing(work) as manager:
        task = manager.submit("test", {})
        process = await processes.get()
        manager.cancel(task["task_id"])
        assert await process.wait() != 0


PATIENCE = 15  # seconds for one step of a server, which only end a hang
UGLY = re.compile("Traceback|never|destroyed|ResourceWarning|ERROR|CRITICAL")


class Server:
    """A uvicorn in a process of its own, started as in the README, under `python -X dev`."""

    def __init__(self, **settings: Any) -> None:
        """Start the server, and wait until it is listening or has ended."""
        command = [sys.executable, "-X", "dev", "-m", "uvicorn", "main:app", "--port", "0"]
        variables = {f"TASKS_{name.upper()}": str(value) for name, value in settings.items()}
        folder = Path(main.__file__).parent
        self.process = subprocess.Popen(
            command, env=os.environ | variables, cwd=folder, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stderr
        self.stderr = self.process.stderr
        watchdog = threading.Timer(PATIENCE, self.process.kill)
        watchdog.start()
        self.log = ""
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
        poll = f"GET {path}?wait=true HTTP/1.1"
        connection = self.connect("GET /health HTTP/1.1", "Host: x", "", poll)
        # The server starts the second request when it has responded to the first.
        health = HTTPResponse(connection)
        health.begin()
        assert b"busy" in health.read()
        return connection

    def stop(self, signum: int = signal.SIGTERM) -> int:
        """End the process with a signal, and return its exit code. Its log must be clean."""
        self.process.send_signal(signum)
        code = self.process.wait(PATIENCE)
        self.log += self.stderr.read()
        assert not UGLY.search(self.log), self.log
        return code


needs_signals = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")


def read_all(connection: socket.socket) -> bytes:
    """Read until the server closes the connection."""
    with connection:
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_the_list_arrives_in_parts() -> None:
    """The list is sent in several chunks, which are one JSON array together."""
    with Server(rate_limit=1000, queue_size=1000) as server:
        paths = [server.submit() for _ in range(150)]
        answer = read_all(server.connect("GET /tasks HTTP/1.1", "Connection: close"))
        _, *parts, _ = re.split(rb"\r\n[0-9a-f]+\r\n", answer)
        assert len(parts) >= 2
        assert [f"/tasks/{task['task_id']}" for task in json.loads(b"".join(parts))] == paths


def test_clients_that_disconnect() -> None:
    """A client that disconnects during a long poll, a list or its own body breaks nothing."""
    with Server(long_poll=0.2) as server:
        path = server.submit()
        server.long_poll(path).close()
        server.connect("GET /tasks HTTP/1.1").close()
        server.connect("POST /tasks HTTP/1.1", "Content-Length: 100").close()
        assert server.http.get(f"{path}?wait=true").status_code == 200
        assert server.http.delete(path).json()["status"] == "cancelled"
        server.stop()


@needs_signals
@parametrize(("signum", "code"), [(signal.SIGTERM, -15), (signal.SIGINT, 0)])
def test_shutdown_of_a_server(signum: int, code: int) -> None:
    """A signal ends the server although polls are open, cancels all tasks, and the log is clean."""
    with Server(rate_limit=10_000, long_poll=3600) as server:
        paths = [server.submit() for _ in range(20)]
        server.long_poll(paths[0]).close()
        connection = server.long_poll(paths[0])
        assert server.stop(signum) == code
        assert b'"status":"processing"' in read_all(connection)
        assert len(re.findall(r"INFO: +task \w{8} generate_report cancelled", server.log)) == 20


def test_a_server_with_bad_settings() -> None:
    """The server doesn't start, and its output names each bad or unknown variable."""
    with Server(workers="many", worker=2) as server:
        assert server.process.wait(PATIENCE) == 1
        assert re.search("^TASKS_WORKERS: Input should be ", server.log, re.MULTILINE)
        assert "\nTASKS_WORKER: Extra inputs are not permitted\n" in server.log
        assert "Traceback" not in server.log


# === Virtual time for all asynchronous tests ======================================================

# This has to be the end of the file, because it wraps the tests that are defined above.
for name, function in list(globals().items()):
    if name.startswith("test_") and inspect.iscoroutinefunction(function):
        globals()[name] = synchronous(function, run)
