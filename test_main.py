"""The tests of main.py. Run them with `pytest`.

The first section has a short test for each part of the exercise. Its helpers follow in "Virtual
time" and "Helpers": `running` runs an app, `managing` only a manager, and `ticks` lets everything
run that is ready. The other sections look for trouble. The last one starts real servers.

The pytest plugin of anyio runs asynchronous tests in virtual time, on an event loop whose clock
jumps to the next timer instead of waiting for it. So ten minutes take no time.
"""

from __future__ import annotations

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
from collections.abc import AsyncIterator, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from datetime import datetime, timezone
from http.client import HTTPResponse
from pathlib import Path
from random import Random
from typing import Any, get_args
from unittest.mock import AsyncMock, Mock
from uuid import UUID

import httpx
import pytest
from fastapi import FastAPI, Request, WebSocket
from fastapi.middleware.cors import CORSMiddleware
from httpx import ASGITransport, AsyncClient
from pydantic import ValidationError
from pydantic_core import to_json
from pytest import LogCaptureFixture, MonkeyPatch
from typing_extensions import Self

# Settings and debug modes of the shell must not change a result.
for variable in list(os.environ):
    if variable.startswith(
        ("TASKS_", "UVICORN_", "WEB_CONCURRENCY", "PYTHONASYNCIODEBUG", "PYTHONSAFEPATH")
    ):
        del os.environ[variable]

os.environ["TZ"] = "XXX-5:30"  # not UTC, so that a local time is noticed
if hasattr(time, "tzset"):  # not on Windows
    time.tzset()

import main
from main import FINAL, Settings, Task, TaskManager, create_app

pytestmark = pytest.mark.anyio  # the plugin of anyio runs all asynchronous tests
parametrize = pytest.mark.parametrize


# === The exercise =================================================================================


async def test_submission() -> None:
    """A submission is accepted with 202, the id of the task, and its location."""
    async with running() as api:
        response = await api.http.post("/tasks", json=SUM)
        assert response.status_code == 202, response.text
        task_id = response.json()["task_id"]
        assert response.json() == {"task_id": task_id, "status": "queued"}
        assert response.headers["location"] == f"/tasks/{task_id}"
        assert UUID(task_id).version == 4


async def test_polling(monkeypatch: MonkeyPatch) -> None:
    """A task is processed in the background, and polling shows its status and its result."""
    slept = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        await real_sleep(0)  # gives other coroutines a turn

    async with running() as api:
        monkeypatch.setattr(asyncio, "sleep", sleep)
        task_id, polled = await api.submit(), []
        for _ in range(50):
            task = await api.get(task_id)
            polled.append((task["status"], task["result"]))
            await asyncio.sleep(0)
    assert list(dict.fromkeys(polled)) == [
        ("queued", None),
        ("processing", None),
        ("completed", 6),
    ]
    assert slept.count(0.5) == 10  # the simulated work


async def test_rate_limit() -> None:
    """The eleventh request within a minute is refused, and Retry-After says when to come back."""
    async with running(rate_limit=10) as api:
        for _ in range(10):
            assert (await api.http.get("/tasks")).status_code == 200
        response = await api.http.get("/tasks")
        assert response.status_code == 429
        assert response.headers["retry-after"] == "60"
        await asyncio.sleep(60)
        assert (await api.http.get("/tasks")).status_code == 200


async def test_cancellation() -> None:
    """A queued or processing task is cancelled, and the response is the task as it stays."""
    async with running(workers=1) as api:
        processing, queued = await api.submit(), await api.submit()
        await asyncio.sleep(3)
        for task_id, start in ((queued, None), (processing, "2026-01-01T00:00:00.000000Z")):
            response = await api.cancel(task_id)
            assert (response.status_code, response.json()["status"]) == (200, "cancelled")
            assert response.json()["started_at"] == start
            assert response.json()["finished_at"] == "2026-01-01T00:00:03.000000Z"
            await ticks()
            assert await api.get(task_id) == response.json()
    assert clock() == 3  # the work has stopped, so the shutdown has not waited for it


async def test_concurrency() -> None:
    """Five tasks are processed at the same time, and a free worker takes the next one."""
    async with running() as api:
        ids = [await api.submit() for _ in range(7)]
        tasks = [await api.final(task_id) for task_id in ids]
        assert [second(task["started_at"]) for task in tasks] == [0, 0, 0, 0, 0, 5, 5]


@parametrize("status", FINAL)
async def test_clean_up(status: str) -> None:
    """A finished task is kept for ten minutes, and is removed at most 30 s after that."""
    async with running() as api:
        task = await api.end(status)
        assert second(task["expires_at"]) == second(task["finished_at"]) + 600
        await asyncio.sleep(599)
        assert await api.get(task["task_id"]) == task
        await asyncio.sleep(31)
        for method, query in (("GET", ""), ("GET", "?wait=true"), ("DELETE", "")):
            response = await api.http.request(method, f"/tasks/{task['task_id']}{query}")
            assert_error(response, 404, "There is no such task. It may have expired.")


async def test_progress() -> None:
    """Progress is reported in steps of ten percent, and is 100 when the task is completed."""
    async with running() as api:
        fast = await api.submit()
        slow = await api.submit(task_type="generate_report", parameters={"title": "T"})
        for percent in range(0, 101, 10):
            await ticks()
            assert (await api.get(fast))["progress"] == percent
            assert (await api.get(slow))["progress"] == percent // 30 * 10  # it takes 15 s
            await asyncio.sleep(0.5)


async def test_priority() -> None:
    """Higher priorities start first, then older tasks, also if a queued task is cancelled."""
    async with running(workers=1) as api:
        await api.submit()  # keeps the worker busy
        await ticks()
        ids = [await api.submit(priority=priority) for priority in ["high", "low", "normal"] * 3]
        await api.cancel(ids[3])
        tasks = [await api.final(ids[index]) for index in (0, 6, 2, 5, 8, 1, 4, 7)]
        assert [second(task["started_at"]) for task in tasks] == [*range(5, 41, 5)]


@parametrize(("count", "batches"), [(0, []), (1, [1]), (100, [100]), (250, [100, 100, 50])])
async def test_streaming(count: int, batches: list[int]) -> None:
    """The list is sent in parts of 100 tasks, as a JSON array with a task on each line."""
    async with running(forever, queue_size=250) as api:
        tasks = [submit(api.manager) for _ in range(count)]
        await ticks()
        parts = [part async for part in main.stream_tasks(api.manager.iterate())]
        assert [part.count(b"task_id") for part in parts] == [0, *batches, 0]
        lines = b"".join(parts).decode().splitlines()
        assert (lines[0], lines[-1]) == ("[", "]")
        assert [json.loads(line.rstrip(",")) for line in lines[1:-1]] == tasks[::-1]
        assert await api.tasks() == tasks[::-1]


# === Virtual time =================================================================================

START = 1000.0  # where the virtual clock starts
BEGIN = datetime(2026, 1, 1, tzinfo=timezone.utc)  # the wall clock at that moment
real_sleep = asyncio.sleep  # for the test that patches it


class JumpingSelector(selectors.SelectSelector):
    """Moves the clock of its loop to the next timer instead of waiting for it."""

    loop: VirtualLoop
    turns = 0  # of the event loop, in one test

    def select(self, timeout: float | None = None) -> list[Any]:
        self.loop.shuffle()  # here, because the loop calls `select` once in each turn
        self.turns += 1
        assert self.turns < 5_000, "the test does not end"
        events = super().select(0)
        if not events and timeout != 0:
            assert timeout is not None, "everything waits forever"
            self.loop.moment = round(self.loop.moment + timeout, 9)  # rounding errors would add up
        return events


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop with a virtual clock. With a seed, it shuffles its callbacks."""

    def __init__(self, seed: int | None = None) -> None:
        self.moment = START
        self.random = None if seed is None else Random(seed)
        selector = JumpingSelector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.moment

    def run_forever(self) -> None:
        with MonkeyPatch.context() as patch:
            patch.setattr(time, "time", lambda: BEGIN.timestamp() + self.moment - START)
            super().run_forever()

    def shuffle(self) -> None:
        if self.random is not None:
            self.random.shuffle(self._ready)  # type: ignore[attr-defined]  # of BaseEventLoop

    def refuse(self, *_: Any) -> Any:
        raise RuntimeError('threads need real time: parametrize("anyio_backend", ["asyncio"])')

    run_in_executor: Any = refuse


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """Tell the plugin of anyio to run each test in virtual time."""
    return "asyncio", {"loop_factory": VirtualLoop}


def in_a_new_loop(coroutine: Coroutine[Any, Any, None], seed: int | None = None) -> None:
    """Run a coroutine in a virtual loop of its own."""
    loop = VirtualLoop(seed)
    try:
        loop.run_until_complete(coroutine)
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(ticks())  # in which the cancelled asyncio tasks end
        loop.close()


def clock() -> float:
    return asyncio.get_running_loop().time() - START


def second(text: str | None) -> float:
    """Return how many seconds after the start of the test a time of a task is."""
    assert text, "there is no time"
    moment = datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=timezone.utc)
    return (moment - BEGIN).total_seconds()


async def ticks(count: int = 10) -> None:
    """Let everything run that is ready, without letting time pass."""
    for _ in range(count):
        await real_sleep(0)


# === Helpers ======================================================================================

SUM = {"task_type": "compute_sum", "parameters": {"numbers": [1, 2, 3]}}
FAILURE = {"task_type": "simulate_failure", "parameters": {"message": "no paper"}}
INTERNAL_ERROR = {"code": "internal_error", "message": "An internal error occurred."}


class Api:
    """An app, and a client of it."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app
        self.manager: TaskManager = app.state.manager
        self.http = self.client()

    def client(self, host: str = "10.0.0.1", port: int = 1, **options: Any) -> AsyncClient:
        transport = ASGITransport(self.app, client=(host, port), **options)
        return AsyncClient(transport=transport, base_url="http://test")

    async def post(self, body: Any = SUM, **changes: Any) -> httpx.Response:
        return await self.http.post("/tasks", json={**body, **changes})

    async def send(self, body: Any) -> httpx.Response:
        headers = {"Content-Type": "application/json"}
        return await self.http.post("/tasks", content=body, headers=headers)

    async def submit(self, body: Any = SUM, **changes: Any) -> str:
        response = await self.post(body, **changes)
        assert response.status_code == 202, response.text
        return str(response.json()["task_id"])

    async def get(self, task_id: str, **query: Any) -> Any:
        response = await self.http.get(f"/tasks/{task_id}", params=query)
        assert response.status_code == 200, response.text
        return response.json()

    async def final(self, task_id: str) -> Any:
        """Wait until a task is final, and return it."""
        await until_final(self.manager, self.manager.get(task_id))
        return await self.get(task_id)

    async def process(self, body: Any = SUM, **changes: Any) -> Any:
        """Submit a task, wait until it is final, and return it."""
        return await self.final(await self.submit(body, **changes))

    async def cancel(self, task_id: str) -> httpx.Response:
        return await self.http.delete(f"/tasks/{task_id}")

    async def end(self, status: str) -> Any:
        """Submit a task that ends with this status, and return it then."""
        if status != "cancelled":
            return await self.process(FAILURE if status == "failed" else SUM)
        return (await self.cancel(await self.submit())).json()

    async def tasks(self, **query: Any) -> Any:
        response = await self.http.get("/tasks", params=query)
        assert response.status_code == 200, response.text
        return response.json()


@asynccontextmanager
async def ending(manager: TaskManager) -> AsyncIterator[None]:
    """Assert that everything that is started in the body of `async with` has ended after it."""
    before = asyncio.all_tasks()
    yield
    unfinished = [task for task in manager.iterate() if task["status"] not in FINAL]
    assert unfinished == []
    await ticks()
    assert asyncio.all_tasks() <= before, "some asyncio tasks have not ended"


@asynccontextmanager
async def running(execute: Any = main.execute, **settings: Any) -> AsyncIterator[Api]:
    """Run an app with a rate limit that no test reaches."""
    api = Api(create_app(Settings(**{"rate_limit": 1_000_000, **settings}), execute))
    async with ending(api.manager), api.app.router.lifespan_context(api.app), api.http:
        yield api


@asynccontextmanager
async def managing(execute: Any, **settings: Any) -> AsyncIterator[TaskManager]:
    """Run a manager without HTTP."""
    manager = TaskManager(Settings(**settings), execute)
    async with ending(manager), main.in_background(manager.run()):
        await ticks()  # the workers may start late if the loop shuffles its callbacks
        yield manager


def submit(manager: TaskManager, priority: main.Priority = "normal", **parameters: Any) -> Task:
    """Submit a task of the type "test"."""
    return manager.submit("test", parameters, priority)


async def until_final(manager: TaskManager, task: Task) -> Task:
    """Wait until a task is final, and return it."""
    for _ in range(1000):
        if task["status"] in FINAL:
            return task
        await manager.wait(task["task_id"])
    raise AssertionError(f"not final after 1,000 polls: {task}")


@pytest.fixture(autouse=True)
def expected_errors(caplog: LogCaptureFixture) -> Iterator[list[str]]:
    """Fail a test whose errors in the log are not those in its list, by parts of their texts."""
    expected: list[str] = []
    logging.getLogger("httpx").setLevel(logging.WARNING)  # otherwise it logs every request
    caplog.set_level(logging.INFO)
    if hasattr(signal, "alarm"):  # not on Windows
        signal.signal(signal.SIGALRM, lambda *_: pytest.fail("the test hangs"))
        signal.alarm(4 * PATIENCE)
    yield expected
    # asyncio logs an exception that was never read when its asyncio task is freed. The oldest
    # generation is left out, because collecting it takes longer than the test.
    gc.collect(1)
    records = caplog.get_records("call") + caplog.get_records("teardown")
    for record in [record for record in records if record.levelno >= logging.ERROR]:
        found = [part for part in expected if part in record.getMessage()]
        assert found, f"logged, but not expected: {record.getMessage()}: {record.exc_info}"
        expected.remove(found[0])
    assert expected == [], "expected, but not logged"


def assert_error(response: httpx.Response, status: int, detail: str) -> None:
    """Assert that a response is an error with this detail alone."""
    assert (response.status_code, response.json()) == (status, {"detail": detail})
    assert response.headers["content-type"] == "application/json"
    assert ("retry-after" in response.headers) == (status in (429, 503))


def assert_invalid(response: httpx.Response, loc: list[Any], msg: str) -> None:
    """Assert that a response is a 400 with one error at this place, whose text ends like this."""
    sent = (response.url, response.request.content[:99])
    assert response.status_code == 400, (sent, response.text)
    (error,) = response.json()["errors"]
    assert response.json() == {"detail": "The request is invalid.", "errors": [error]}
    assert error == {"loc": loc, "msg": error["msg"]}
    assert error["msg"].endswith(msg), (sent, error)


async def assert_closed(api: Api) -> None:
    """Assert that an app accepts no tasks, because no workers are running."""
    for response in (await api.post(), await api.http.get("/health")):
        assert_error(response, 503, "The server does not accept tasks at the moment.")
        assert response.headers["retry-after"] == "10"


async def complete(*_: Any) -> str:
    """Complete after four turns of the event loop."""
    await ticks(4)
    return "done"


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
    return AsyncMock(side_effect=exception)


# === Tasks and their types ========================================================================

# A task type, the parameters that a client sends, seconds, the parameters of the task (`...` if
# they are the same), and its result or the message of its error.
LONG = "\0\N{GRINNING FACE}" * 100
RESULTS: list[tuple[str, Any, float, Any, Any]] = [
    ("compute_sum", {"numbers": [1, 2]}, 5, {"numbers": [1.0, 2.0]}, 3.0),
    ("compute_sum", {"numbers": [1e15] * 1000}, 5, {"numbers": [1e15] * 1000}, 1e18),
    ("compute_sum", {"numbers": [-1e15, 0.5]}, 5, {"numbers": [-1e15, 0.5]}, 0.5 - 1e15),
    ("generate_report", {"title": "T"}, 15, {"title": "T", "sections": 3}, "T\n3 sections"),
    ("generate_report", {"title": LONG, "sections": 6}, 30, ..., f"{LONG}\n6 sections"),
    ("simulate_failure", {}, 5, {"message": "simulated failure"}, "simulated failure"),
    ("simulate_failure", {"message": LONG}, 5, ..., LONG),
]


def test_every_task_type_has_an_example_and_a_result() -> None:
    """Each model of the union has a row in EXAMPLES and in RESULTS."""
    union, _ = get_args(main.Submission)
    types = [get_args(model.model_fields["task_type"].annotation)[0] for model in get_args(union)]
    assert [example["task_type"] for example in main.EXAMPLES] == types
    assert list(dict.fromkeys(row[0] for row in RESULTS)) == types


@parametrize("row", RESULTS, ids=range(len(RESULTS)))
async def test_a_result(row: tuple[Any, ...]) -> None:
    """A task of each type fills in missing parameters, and has its result or error in time."""
    task_type, sent, seconds, parameters, result = row
    async with running() as api:
        task = await api.process(task_type=task_type, parameters=sent)
        assert clock() == seconds, "finished, or noticed, at the wrong second"
        # Unlike `==`, `repr` tells 1 from 1.0.
        assert repr(task["parameters"]) == repr(sent if parameters is ... else parameters)
        if task_type == "simulate_failure":
            assert task["error"] == {"code": "task_failed", "message": result}
            assert (task["status"], task["progress"], task["result"]) == ("failed", 90, None)
        else:
            assert repr(task["result"]) == repr(result)
            assert (task["status"], task["progress"], task["error"]) == ("completed", 100, None)


NEW_TASK = {
    "task_type": "compute_sum",
    "parameters": {"numbers": [1, 2, 3]},
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
        task_id = await api.submit()
        queued = await api.get(task_id)
        await asyncio.sleep(7.25)
        processing = await api.get(task_id)
        completed = await api.final(task_id)
    assert queued == {"task_id": task_id, **NEW_TASK}
    started = {"started_at": "2026-01-01T00:00:05.000000Z"}
    assert processing == queued | started | {"status": "processing", "progress": 60}
    assert completed == processing | {
        "status": "completed",
        "progress": 100,
        "result": 6,
        "finished_at": "2026-01-01T00:00:10.000000Z",
        "expires_at": "2026-01-01T00:10:10.000000Z",
    }


async def test_work_cannot_change_its_task() -> None:
    """The work has copies of the parameters and of the result."""
    result: list[Any] = []

    async def work(task_type: str, parameters: Any, _: Any) -> list[Any]:
        assert (task_type, parameters) == ("test", {"numbers": [1]})
        parameters["numbers"].append(object())
        return result

    async with managing(work) as manager:
        task = await until_final(manager, submit(manager, numbers=[1]))
        result.append(object())
        assert task["parameters"] == {"numbers": [1]}
        assert task["result"] == []


async def test_odd_progress() -> None:
    """Progress is an integer that never falls, and values that are no percentage change nothing."""
    seen: list[Any] = []

    async def work(_: str, __: Any, report: main.Report) -> None:
        for percent in (-5, math.nan, -math.inf, 40.7, 20, math.nan, 101, math.inf, 100):
            report(percent)
            seen.append(task["progress"])

    async with managing(work) as manager:
        task = submit(manager)
        await until_final(manager, task)
    assert repr(seen) == repr([0, 0, 0, 40, 40, 40, 40, 40, 99])


async def test_the_wall_clock_decides_nothing() -> None:
    """If the wall clock is set, later times change, but no order, limit or deadline does."""
    async with running(workers=1, rate_limit=3) as api:
        first = api.manager.get(await api.submit())
        await ticks()
        low = api.manager.get(await api.submit(priority="low"))
        a_year_later = BEGIN.timestamp() + 365 * 24 * 3600
        time.time = lambda: a_year_later  # the loop restores it
        high = api.manager.get(await api.submit(priority="high"))
        assert (await api.post()).headers["retry-after"] == "60"
        for task, moment in ((first, 5), (high, 10), (low, 15)):
            await until_final(api.manager, task)
            assert clock() == moment
            assert task["finished_at"] == "2027-01-01T00:00:00.000000Z"
        await asyncio.sleep(629 - 15)  # the timer runs at second 630
        assert list(api.manager.iterate()) == [high, low, first]
        await asyncio.sleep(2)
        assert list(api.manager.iterate()) == []


# === The list =====================================================================================


async def test_the_list() -> None:
    """The newest task comes first, and `limit` is applied after the filter."""
    async with running(workers=1) as api:
        response = await api.http.get("/tasks")
        assert response.headers["content-type"] == "application/json"
        assert response.json() == []
        ids = [await api.submit() for _ in range(5)]
        await asyncio.sleep(5.01)
        await api.cancel(ids[2])
        tasks = await api.tasks()
        assert tasks == [await api.get(task_id) for task_id in reversed(ids)]
        statuses = [task["status"] for task in tasks]
        assert statuses == ["queued", "queued", "cancelled", "processing", "completed"]
        assert await api.tasks(status="queued") == tasks[:2]
        assert await api.tasks(status="cancelled", limit=1) == tasks[2:3]
        assert await api.tasks(limit=2) == tasks[:2]
        assert await api.tasks(limit=1_000_000_000, unknown="x") == tasks


async def test_tasks_change_while_a_list_is_read() -> None:
    """A list has the tasks of its start, each as it is when its part is made."""
    async with managing(forever, queue_size=1000) as manager:
        tasks = [submit(manager) for _ in range(300)]
        listed, queued = manager.iterate(), manager.iterate("queued")
        submit(manager)  # after the request, before the first part
        stream = main.stream_tasks(listed)
        body = await anext(stream) + await anext(stream)
        submit(manager)
        for task in (tasks[299], tasks[0]):  # the first one has been sent
            asyncio.get_running_loop().call_soon(manager.cancel, task["task_id"])
        body += await anext(stream)
        assert tasks[0]["status"] == "cancelled", "nothing else runs while a list is sent"
        body += b"".join([part async for part in stream])
        found = json.loads(body)
        assert [task["task_id"] for task in found] == [task["task_id"] for task in tasks[::-1]]
        assert (found[0]["status"], found[-1]["status"]) == ("queued", "cancelled")
        assert tasks[299] not in queued  # the filter looks at the present status, too


# === Polling ======================================================================================


async def test_a_long_poll_ends_with_the_change() -> None:
    """A long poll is answered at the moment of the next change, and not by progress."""
    async with running(workers=1) as api:
        await api.submit()
        task_id = await api.submit()
        for status, moment in (("processing", 5), ("completed", 10)):
            assert (await api.get(task_id, wait=True))["status"] == status
            assert clock() == moment, "the poll was not woken"


async def test_polls_of_one_task() -> None:
    """All polls end with the change, although one has timed out and one client has left."""
    async with running(forever, long_poll=10) as api:
        task_id = await api.submit()
        await ticks()
        early = asyncio.create_task(api.get(task_id, wait=True))
        await asyncio.sleep(9)
        polls = [asyncio.create_task(api.get(task_id, wait=True)) for _ in range(100)]
        assert (await early)["status"] == "processing"
        assert clock() == 10
        polls[0].cancel()
        await api.cancel(task_id)
        assert [task["status"] for task in await asyncio.gather(*polls[1:])] == ["cancelled"] * 99
        assert polls[0].cancelled()
        assert clock() == 10, "the polls were not woken"


# === Cancellation =================================================================================


@parametrize("status", FINAL)
async def test_a_final_task(status: str) -> None:
    """A final task is returned immediately and stays. Cancelling it is a 409, unless it was."""
    async with running() as api:
        task = await api.end(status)
        before = clock()
        assert task["status"] == status
        assert await api.get(task["task_id"], wait=True) == task
        response = await api.cancel(task["task_id"])
        if status == "cancelled":
            assert (response.status_code, response.json()) == (200, task)
        else:
            assert_error(response, 409, f"The task has already {status}.")
        assert await api.tasks() == [task]
        assert clock() == before


async def test_cancelled_work_cleans_up_undisturbed(expected_errors: list[str]) -> None:
    """Work is cancelled only once, and cannot change its task while it cleans up."""
    cleaned = []

    async def work(_: str, __: Any, report: main.Report) -> None:
        try:
            await forever()
        finally:
            await asyncio.sleep(2)
            cleaned.append(clock())
            report(50)
            raise ValueError("in the clean-up")

    expected_errors.append("raised an exception")
    async with managing(work, task_timeout=10) as manager:
        task = submit(manager)
        await asyncio.sleep(9.5)
        cancelled = manager.cancel(task["task_id"]).copy()
        assert manager.cancel(task["task_id"]) == cancelled
        await asyncio.sleep(1)  # the timeout passes, and then the shutdown begins
    assert cleaned == [11.5]
    assert task == cancelled


# === The queue ====================================================================================


async def test_a_full_queue() -> None:
    """If the queue is full, a submission is refused with 503 and leaves no trace."""
    async with running(workers=1, queue_size=2) as api:
        await api.submit()
        await ticks()
        waiting = await api.submit()
        await api.submit()
        assert_error(await api.post(), 503, "The queue is full.")
        assert len(await api.tasks()) == 3
        await api.cancel(waiting)  # gives its slot back
        await api.submit()


async def test_too_many_tasks() -> None:
    """With `max_tasks` tasks, finished ones included, a submission is refused until one expires."""
    async with running(workers=1, max_tasks=3, retention=10, cleanup_interval=1) as api:
        for _ in range(3):
            await api.submit()
        await asyncio.sleep(14.5)  # the first task has finished at 5, and expires at 15
        assert_error(await api.post(), 503, "There are too many tasks.")
        await asyncio.sleep(1)
        await api.submit()


@parametrize(("priority", "overtaken_until"), [("low", 20), ("normal", 10)])
async def test_no_task_starves(priority: main.Priority, overtaken_until: float) -> None:
    """A level of priority is worth `priority_step` seconds of waiting. At a tie, the older task is first."""
    for later in (overtaken_until - 0.5, overtaken_until):
        async with managing(forever, workers=1, task_timeout=100, priority_step=10) as manager:
            submit(manager)  # works for 100 s, like the others
            await ticks()
            older = submit(manager, priority)
            await asyncio.sleep(later)
            high = submit(manager, "high")
            await asyncio.sleep(250)
            overtaken = second(high["started_at"]) < second(older["started_at"])
            assert overtaken == (later < overtaken_until)


# === Workers ======================================================================================


async def cancel_itself(*_: Any) -> None:
    """Cancel the asyncio task of the work."""
    task = asyncio.current_task()
    assert task
    task.cancel()
    await real_sleep(0)


RAISED = [ValueError("secret"), SystemExit(3), TimeoutError(), BaseException(), GeneratorExit()]
BUGS: dict[str, Any] = {
    **{type(exc).__name__: raising(exc) for exc in RAISED},
    "CancelledError": raising(asyncio.CancelledError()),
    "cancels itself": cancel_itself,
    "unknown task type": main.execute,
    "not a coroutine function": lambda *_: None,
    "object": AsyncMock(return_value={"a": (object(),)}),
    "NaN": AsyncMock(return_value=[math.nan]),
    "surrogate": AsyncMock(return_value=["\ud800"]),
    "deep": AsyncMock(return_value=json.loads("[" * 250 + "]" * 250)),
}


@parametrize("name", BUGS)
async def test_a_bug_in_the_work(
    name: str, expected_errors: list[str], caplog: LogCaptureFixture
) -> None:
    """Work with a bug fails its task, the log has the exception, and the worker goes on."""
    expected_errors.append("its work")
    works = iter([BUGS[name], complete])
    async with managing(lambda *args: next(works)(*args), workers=1) as manager:
        task = await until_final(manager, submit(manager))
        assert (task["status"], task["error"]) == ("failed", INTERNAL_ERROR)
        following = await until_final(manager, submit(manager))
        assert following["result"] == "done"
        assert json.loads(to_json(list(manager.iterate()))) == [following, task]
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert task["task_id"] in record.getMessage()
    exception = record.exc_info and record.exc_info[1]
    assert (exception is None) == ("ancel" in name), "the log has a traceback where there is one"
    raised = getattr(BUGS[name], "side_effect", None)
    assert raised not in RAISED or exception is raised


def test_ctrl_c_in_the_work() -> None:
    """A KeyboardInterrupt is not caught, so it ends the program."""

    async def program() -> None:
        async with managing(raising(KeyboardInterrupt())) as manager:
            submit(manager)
            await asyncio.sleep(1)

    with pytest.raises(KeyboardInterrupt):
        in_a_new_loop(program())


@parametrize(("message", "told"), [("no disk \ud800", "no disk ?"), ("", "")])
async def test_a_failure_is_no_error_in_the_log(message: str, told: str) -> None:
    """A TaskFailedError is told to the client, and the log has no traceback."""
    async with running(raising(main.TaskFailedError(message))) as api:
        task = await api.process()
        assert task["error"] == {"code": "task_failed", "message": told}


async def test_a_timeout() -> None:
    """A task that takes longer than `task_timeout` fails then, and the worker goes on."""
    async with running(workers=1, task_timeout=4.9) as api:
        ids = [await api.submit(), await api.submit()]
        for task_id, moment in zip(ids, (4.9, 9.8), strict=True):  # waiting does not count
            task = await api.final(task_id)
            assert clock() == pytest.approx(moment)
            assert task["error"] == {"code": "timeout", "message": "The task took too long."}
            assert (task["status"], task["progress"], task["result"]) == ("failed", 90, None)


@parametrize("end", ["failed", "cancelled"])
async def test_work_that_ignores_its_cancellation(end: str, caplog: LogCaptureFixture) -> None:
    """Work that ignores it keeps its worker until it ends. The log warns 5 s after the timeout."""
    async with running(deaf, workers=1, task_timeout=10) as api:
        task, following = submit(api.manager), submit(api.manager)
        await asyncio.sleep(2)
        if end == "cancelled":
            await api.cancel(task["task_id"])
        await asyncio.sleep(13 - 0.01)
        assert "still runs" not in caplog.text
        assert task["status"] == end
        await asyncio.sleep(0.02)
        assert caplog.messages[-1] == f"task {task['task_id']}: its cancelled work still runs"
        await asyncio.sleep(84)
        before = following["status"]
        await asyncio.sleep(2)
        assert (before, following["status"]) == ("queued", "completed")
        assert caplog.text.count("still runs") == 1
        assert (task["status"], task["result"]) == (end, None)


async def test_a_worker_that_fails(
    monkeypatch: MonkeyPatch, expected_errors: list[str], caplog: LogCaptureFixture
) -> None:
    """If a worker fails, all stop, no task is left unfinished, and the server says so."""
    expected_errors.append("a worker failed, so all workers stop")
    async with running(forever, workers=2) as api:
        ids = [await api.submit() for _ in range(4)]
        await ticks()
        gets = iter([raising(RuntimeError("a bug")), forever])
        monkeypatch.setattr(main.TaskQueue, "get", lambda _: next(gets)())
        await api.cancel(ids[0])  # its worker asks for the next task
        await ticks(20)
        await assert_closed(api)
        assert [(await api.get(task_id))["status"] for task_id in ids] == ["cancelled"] * 4
    (record,) = [record for record in caplog.records if record.exc_info]
    assert record.levelname == "CRITICAL"


def sizes(thing: object) -> dict[str, int]:
    """Return how many items each container in the attributes of an object has."""
    found = {}
    for name, value in vars(thing).items():
        if isinstance(value, asyncio.Queue):
            found[name] = value.qsize()
        elif hasattr(value, "__len__"):
            found[name] = len(value)
    return found


async def test_expired_tasks_leave_nothing_behind() -> None:
    """Of tasks that have ended, been polled, been refused or expired, nothing is held."""
    async with managing(sleeping, queue_size=1, retention=100, task_timeout=5) as manager:
        before = sizes(manager)
        for number in range(10):
            task = submit(manager, seconds=number)  # half of the tasks time out
            with pytest.raises(main.UnavailableError):
                submit(manager)
            if number % 3 == 0:
                manager.cancel(task["task_id"])
                manager.cancel(task["task_id"])
            await until_final(manager, task)
            await manager.wait(task["task_id"])
        await asyncio.sleep(100)
        assert len(list(manager.iterate())) == 10
        manager.expire()
        assert sizes(manager) == before
        assert len(before) >= 5, "the containers have not been found"


# === Health, clean-up, log ========================================================================


async def test_health() -> None:
    """/health counts the tasks by status, and answers HEAD, which `wget --spider` sends."""
    async with running(workers=1) as api:
        await api.submit(FAILURE)
        for _ in range(5):
            await api.submit()
        await asyncio.sleep(16)
        counts = {"queued": 2, "processing": 1, "completed": 2, "failed": 1, "cancelled": 0}
        assert (await api.http.get("/health")).json() == counts
        assert (await api.http.head("/health")).status_code == 200


async def test_the_timer(
    monkeypatch: MonkeyPatch, expected_errors: list[str], caplog: Any
) -> None:
    """The clean-up goes on after an exception, and removes a task at the instant it expires."""
    expected_errors.append("the clean-up failed")
    sweep = AsyncMock(side_effect=[RuntimeError("a bug"), *[None] * 20])
    monkeypatch.setattr(main.RateLimiter, "sweep", sweep)
    async with running(retention=20, cleanup_interval=5) as api:
        await api.end("cancelled")
        await asyncio.sleep(3)
        later = await api.end("cancelled")
        await asyncio.sleep(16.5)
        assert len(await api.tasks()) == 2
        await asyncio.sleep(1)
        assert await api.tasks() == [later]
        assert sweep.await_count == 4
    assert "RuntimeError: a bug" in caplog.text, "the log has no traceback"


async def test_the_log(caplog: LogCaptureFixture) -> None:
    """Each step of a task is a line, under a logger whose lines uvicorn shows."""
    async with running(workers=1, retention=1, cleanup_interval=7) as api:
        one, two = await api.submit(), await api.submit(FAILURE)
        await asyncio.sleep(13)
        three = await api.submit()
        await ticks()
    assert {record.name for record in caplog.records} == {"uvicorn.error.tasks"}
    assert caplog.messages == [
        f"task {one} queued",
        f"task {two} queued",
        f"task {one} processing",
        f"task {one} completed",
        f"task {two} processing",
        f"task {one} expired",
        f"task {two} failed",
        f"task {three} queued",
        f"task {three} processing",
        f"task {three} cancelled",
        f"task {three}: its work has stopped",
    ]


# === Rate limit ===================================================================================


async def retry_after(client: AsyncClient) -> int:
    """Send a request, and return the seconds that the limiter tells to wait, or 0."""
    response = await client.get("/tasks/x")
    if response.status_code == 400:
        return 0
    seconds = int(response.headers["retry-after"])
    assert_error(response, 429, f"Too many requests. Try again in {seconds} s.")
    return seconds


async def test_the_window_slides() -> None:
    """Each request leaves the window 60 s after it was sent, and refused ones do not count."""
    async with running(rate_limit=10) as api:
        for _ in range(10):
            assert await retry_after(api.http) == 0
            await asyncio.sleep(2)
        waits = []
        for _ in range(45):
            waits.append(await retry_after(api.http))
            await asyncio.sleep(1)
        # The first request leaves at second 60, the second one at 62, ...
        assert waits == [*range(40, 0, -1), 0, 1, 0, 1, 0]
        await asyncio.sleep(300)
        # The same holds for requests at the same time.
        waits = await asyncio.gather(*[retry_after(api.http) for _ in range(20)])
        assert waits == [0] * 10 + [60] * 10


@parametrize("window", [0.5, 7, 3600])
async def test_the_length_of_the_window(window: float) -> None:
    """A request counts for `rate_window` seconds, to the exact instant."""
    async with running(rate_limit=1, rate_window=window) as api:
        assert await retry_after(api.http) == 0
        assert await retry_after(api.http) == math.ceil(window)
        await asyncio.sleep(window - 0.001)
        assert await retry_after(api.http) == 1
        await asyncio.sleep(0.001)
        assert await retry_after(api.http) == 0


async def test_the_limiter_forgets_quiet_clients() -> None:
    """After a sweep, the limiter holds only the clients that have a request in the window."""
    limiter = main.RateLimiter(1, 60)
    await limiter.hit("early")
    await asyncio.sleep(59)
    await limiter.hit("late")
    for moment, count in ((0, 2), (1, 1)):
        await asyncio.sleep(moment)
        await limiter.sweep()
        assert list(sizes(limiter).values()) == [count]
    assert await limiter.hit("late") == 59


async def chunks(size: int, sent: list[bytes]) -> AsyncIterator[bytes]:
    """Yield a body whose length is not declared, one byte at a time."""
    for _ in range(size):
        sent.append(b"x")
        yield b"x"


REQUESTS = [
    ("POST", "/tasks", b"{", 400),
    ("POST", "/tasks", b"x" * 70_000, 413),
    ("GET", "/tasks/x/y", b"", 404),
    ("PUT", "/tasks", b"", 405),
    ("DELETE", "/tasks/%00", b"", 400),
]
FREE = {"/": 307, "/docs": 200, "/openapi.json": 200, "/health": 200, "/nowhere": 404}


@parametrize("prefix", ["", "/api", "/a/b/"])
async def test_what_is_limited(prefix: str) -> None:
    """All requests under /tasks count, before their body is read, also behind a prefix."""
    async with running(rate_limit=1) as api:
        for number, (method, path, body, status) in enumerate(REQUESTS):
            client = api.client(f"192.0.2.{number}", root_path=prefix)
            response = await client.request(method, f"{prefix}{path}", content=body)
            assert response.status_code == status, (method, path)
            sent: list[bytes] = []
            unread = chunks(1, sent)
            response = await client.request(method, f"{prefix}{path}", content=unread)
            assert (response.status_code, sent) == (429, []), (method, path)
        for path, status in FREE.items():
            response = await api.client("192.0.2.1", root_path=prefix).get(f"{prefix}{path}")
            assert response.status_code == status, path


async def test_who_shares_a_limit() -> None:
    """A limit belongs to the address of the peer, and all peers without one share one."""
    async with running(rate_limit=1) as api:
        header = {"X-Forwarded-For": "192.0.2.9"}  # every client can send it
        for host in ("192.0.2.1", "192.0.2.2", ""):
            for port, status in ((1, 200), (2, 429)):
                client = api.client(host, port)
                if not host:  # as on a Unix socket
                    client._transport.client = None  # type: ignore[attr-defined]
                response = await client.get("/tasks", headers=header)
                assert response.status_code == status, host


# === Bad input ====================================================================================

# Of each task type: parameters, the field with the error, and the end of the text.
LOW = "greater than or equal to -1000000000000000"
HIGH = "less than or equal to 1000000000000000"
PARAMETERS: dict[str, list[tuple[str, list[Any], str]]] = {
    "compute_sum": [
        ('"numbers": [1, NaN]', ["numbers", 1], HIGH),
        ('"numbers": [1e400]', ["numbers", 0], HIGH),
        ('"numbers": [1000000000000001]', ["numbers", 0], HIGH),
        ('"numbers": [-1.1e15]', ["numbers", 0], LOW),
        (f'"numbers": [{"9" * 4000}]', ["numbers", 0], "valid number"),
        ('"numbers": [true]', ["numbers", 0], "valid number"),
        ('"numbers": [1], "x": 1', ["x"], "Extra inputs are not permitted"),
        ('"numbers": []', ["numbers"], "at least 1 item after validation, not 0"),
        (f'"numbers": [{"1, " * 1000} 1]', ["numbers"], "after validation, not 1001"),
    ],
    "generate_report": [
        ('"title": "t", "x": 1', ["x"], "Extra inputs are not permitted"),
        ('"title": ""', ["title"], "at least 1 character"),
        (f'"title": "{"t" * 201}"', ["title"], "at most 200 characters"),
        ('"title": "t", "sections": 0', ["sections"], "greater than or equal to 1"),
        ('"title": "t", "sections": 7', ["sections"], "less than or equal to 6"),
        ('"title": "t", "sections": true', ["sections"], "valid integer"),
    ],
    "simulate_failure": [
        ('"message": "\\ud800"', ["message"], "raw data as a unicode string"),
        ('"mesage": "m"', ["mesage"], "Extra inputs are not permitted"),
    ],
}
# A body, where the error is, and the end of the text.
FAIL = "simulate_failure"
BODIES: list[tuple[str, list[Any], str]] = [
    ("", [], "Field required"),
    ('{"a":', [5], "JSON decode error"),
    ('{"task_type": "\\ud800"}', [], "'simulate_failure'"),
    ('{"parameters": {}}', [], "Unable to extract tag using discriminator 'task_type'"),
    ('{"task_type": "compute_sum"}', ["compute_sum", "parameters"], "Field required"),
    ('{"task_type": "simulate_failure", "\\ud800": NaN}', [FAIL], "a unicode string"),
    ('{"task_type": "simulate_failure", "prority": 1}', [FAIL, "prority"], "not permitted"),
    ('{"task_type": "simulate_failure", "priority": 1}', [FAIL, "priority"], "or 'low'"),
]


async def test_bad_bodies() -> None:
    """A bad body gets a 400 that names the field, and leaves nothing behind."""
    rows = list(BODIES)
    for task_type, bad in PARAMETERS.items():
        for parameters, loc, msg in bad:
            body = f'{{"task_type": "{task_type}", "parameters": {{{parameters}}}}}'
            rows.append((body, [task_type, "parameters", *loc], msg))
    async with running() as api:
        for body, loc, msg in rows:
            assert_invalid(await api.send(body), ["body", *loc], msg)
        for unparsable in (b'{"task_type": "\xff"}', b"9" * 5000):
            response = await api.send(unparsable)
            assert_error(response, 400, "There was an error parsing the body")
        response = await api.post(**{f"field{number}": math.pi for number in range(1000)})
        assert len(response.json()["errors"]) == 10
        assert await api.tasks() == []


BAD_QUERIES = [
    ("?limit=0", ["query", "limit"], "greater than or equal to 1"),
    ("?limit=" + "9" * 23, ["query", "limit"], "less than or equal to 1000000000"),
    ("?status=%ff", ["query", "status"], "'completed', 'failed' or 'cancelled'"),
    ("/abc", ["path", "task_id"], "found 3"),
    (f"/{UUID(int=0)}?wait=maybe", ["query", "wait"], "unable to interpret input"),
]


@parametrize(("path", "loc", "msg"), BAD_QUERIES, ids=range(len(BAD_QUERIES)))
async def test_bad_queries_and_ids(path: str, loc: list[Any], msg: str) -> None:
    """A bad parameter gets a 400 that names it."""
    async with running() as api:
        assert_invalid(await api.http.get(f"/tasks{path}"), loc, msg)


async def test_the_size_of_a_body() -> None:
    """A body of one byte more than `max_body` is a 413, whether its length is declared or not."""
    async with running(max_body=1000) as api:
        for body in (b"x" * 1000, chunks(1000, [])):
            assert (await api.send(body)).status_code == 400
        sent: list[bytes] = []
        for body in (b"x" * 1001, chunks(1001, []), chunks(10_000, sent)):
            assert_error(await api.send(body), 413, "The body is larger than 1000 bytes.")
        assert len(sent) == 1001  # it is refused as soon as it is too large
        response = await api.http.request("GET", "/tasks", content=chunks(1001, []))
        assert response.json() == []  # the body of a GET is ignored


# === HTTP and OpenAPI =============================================================================


async def test_a_mounted_app() -> None:
    """Behind a prefix, the limit holds, and the location and the redirect contain the prefix."""
    async with running(rate_limit=2) as api:
        parent = FastAPI()
        parent.mount("/jobs", api.app)
        transport = ASGITransport(parent, root_path="/api")
        client = AsyncClient(transport=transport, base_url="http://test")
        response = await client.post("/api/jobs/tasks", json=SUM)
        location = response.headers["location"]
        assert location == f"/api/jobs/tasks/{response.json()['task_id']}"
        assert (await client.get(location)).json()["task_type"] == "compute_sum"
        assert (await client.get(location)).status_code == 429
        response = await client.get("/api/jobs/")
        assert (response.status_code, response.headers["location"]) == (307, "/api/jobs/docs")


async def test_middleware_of_the_user_goes_around_ours() -> None:
    """Middleware of the user sees refusals, and CORS works for them and for preflight requests."""
    app = create_app(Settings(rate_limit=2, max_body=10))
    app.add_middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["*"])
    seen = []

    @app.middleware("http")
    async def note_status(request: Request, call_next: Any) -> Any:
        response = await call_next(request)
        seen.append(response.status_code)
        return response

    client = Api(app).http
    client.headers["Origin"] = "http://example.com"
    for _ in range(5):
        await client.options("/tasks", headers={"Access-Control-Request-Method": "POST"})
    for body, status in ((chunks(11, []), 413), (b"", 400), (b"", 429)):
        response = await client.post("/tasks", content=body)
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == "*"
    assert seen == [200] * 5 + [413, 400, 429]


async def test_a_websocket_of_the_user() -> None:
    """A WebSocket is neither counted nor limited."""
    app = create_app(Settings(rate_limit=1, max_body=1))
    received = []

    @app.websocket("/tasks/socket")
    async def read(websocket: WebSocket) -> None:
        await websocket.accept()
        received.append(await websocket.receive_text())

    scope = {"type": "websocket", "path": "/tasks/socket", "query_string": b"", "headers": []}
    for _ in range(2):
        messages = [{"type": "websocket.connect"}, {"type": "websocket.receive", "text": "long"}]
        await app(scope, AsyncMock(side_effect=messages), AsyncMock())
    assert received == ["long", "long"]


ROUTES = {
    "post /tasks": ("submit_task", ["202", "400", "413", "429", "503"]),
    "get /tasks": ("list_tasks", ["200", "400", "429"]),
    "get /tasks/{task_id}": ("get_task", ["200", "400", "404", "429"]),
    "delete /tasks/{task_id}": ("cancel_task", ["200", "400", "404", "409", "429"]),
    "get /health": ("get_health", ["200", "503"]),
}


def test_the_operations_of_the_document() -> None:
    """Operations have names, a text, and their own errors with a text, and times have a format."""
    found = {}
    document = create_app(Settings()).openapi()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            statuses = sorted(operation["responses"])
            assert statuses.pop() == "default"
            found[f"{method} {path}"] = (operation["operationId"], statuses)
            assert operation["description"].endswith(".")
            for status in statuses[1:]:
                response = operation["responses"][status]
                assert response["description"] == main.ERRORS[int(status)]
                schema = response["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/Error"}
    assert found == ROUTES
    task = document["components"]["schemas"]["Task"]["properties"]
    formatted = [name for name, field in task.items() if "date-time" in json.dumps(field)]
    assert formatted == ["created_at", "started_at", "finished_at", "expires_at"]


async def test_the_examples_of_the_document() -> None:
    """The examples of a submission are named by task type, and are accepted as they are."""
    async with running() as api:
        operation = api.app.openapi()["paths"]["/tasks"]["post"]
        examples = operation["requestBody"]["content"]["application/json"]["examples"]
        assert list(examples) == [example["task_type"] for example in main.EXAMPLES]
        for task_type, example in examples.items():
            assert (await api.process(example["value"]))["task_type"] == task_type


# === Settings =====================================================================================

# The default, a value that is too small, the smallest one and the largest one.
COUNT = ("0", "1", "1000000000")
SECONDS = ("0.09", "0.1", "1000000000")
SETTINGS = {
    "workers": (5, "0", "1", "1000"),
    "queue_size": (100, *COUNT),
    "max_tasks": (10_000, *COUNT),
    "rate_limit": (10, *COUNT),
    "rate_window": (60, *SECONDS),
    "long_poll": (10, *SECONDS),
    "retention": (600, *SECONDS),
    "cleanup_interval": (30, *SECONDS),
    "task_timeout": (60, *SECONDS),
    "priority_step": (30, *SECONDS),
    "max_body": (65_536, *COUNT),
}


@parametrize("name", Settings.model_fields)
def test_a_setting(name: str, monkeypatch: MonkeyPatch) -> None:
    """Its default and its bounds are these, and a bad value ends the program with its name."""
    default, too_small, smallest, largest = SETTINGS[name]
    assert getattr(main.read_settings(), name) == default
    for value in (smallest, largest):
        monkeypatch.setenv(f"TASKS_{name.upper()}", value)
        assert getattr(main.read_settings(), name) == float(value)
    for bad in (too_small, f"{largest}1", "", "nan"):
        monkeypatch.setenv(f"TASKS_{name.upper()}", bad)
        with pytest.raises(SystemExit, match=f"1 validation error for Settings\n{name}\n"):
            main.read_settings()


def test_settings_from_python(monkeypatch: MonkeyPatch) -> None:
    """Settings are constant, and unknown ones are an error, but not in the environment."""
    monkeypatch.setenv("TASKS_WORKERS", "2")
    monkeypatch.setenv("TASKS_PORT", "tcp://10.0.0.1:80")  # as Kubernetes does
    assert main.read_settings() == Settings(workers=2)
    with pytest.raises(ValidationError):
        Settings().workers = 2  # type: ignore[misc]  # this is the point
    with pytest.raises(ValidationError):
        Settings(worker=3)  # type: ignore[call-arg]  # this is the point


# === Start and shutdown ===========================================================================


async def test_no_tasks_without_workers() -> None:
    """An app accepts tasks only while its lifespan runs, and keeps its tasks afterwards."""
    api = Api(create_app(Settings(rate_limit=9)))
    await assert_closed(api)
    async with api.app.router.lifespan_context(api.app):
        former = await api.process()
    await assert_closed(api)
    assert await api.tasks() == [former]
    # It can be started again. The limiter has counted eight requests, the first at second 0.
    async with ending(api.manager), api.app.router.lifespan_context(api.app):
        task = await api.process()
        assert await api.tasks() == [task, former]
        assert [await retry_after(api.http) for _ in range(2)] == [0, 50]


@parametrize("turns", [0, 1, 10])
async def test_shutdown_with_tasks_and_polls(turns: int) -> None:
    """Shutdown cancels all tasks, answers their polls, and takes no time, even after the start."""
    manager = TaskManager(Settings(), forever)
    async with ending(manager):
        async with main.in_background(manager.run()):
            tasks = [submit(manager) for _ in range(20)]
            polls = [asyncio.create_task(manager.wait(task["task_id"])) for task in tasks]
            await ticks(turns)
        assert {task["status"] for task in tasks} == {"cancelled"}
        assert await asyncio.gather(*polls) == tasks
        assert clock() == 0


async def test_shutdown_does_not_wait_forever(caplog: LogCaptureFixture) -> None:
    """Shutdown waits for the clean-up of cancelled work for at most 5 s, and names the rest."""

    async def work(_: str, parameters: Any, __: Any) -> None:
        try:
            await forever()
        finally:
            with suppress(main.UnavailableError):
                submit(manager, seconds=0)  # refused, so it is not in `tasks`
            await asyncio.sleep(parameters["seconds"])

    manager = TaskManager(Settings(), work)
    async with main.in_background(manager.run()):
        tasks = [submit(manager, seconds=seconds) for seconds in (4, 50)]
        await ticks()
    assert list(manager.iterate()) == tasks[::-1]
    assert clock() == 5
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [f"task {tasks[1]['task_id']}: its cancelled work still runs"]
    async with main.in_background(manager.run()):
        pass  # the next shutdown has nothing to wait for
    assert clock() == 5


@pytest.mark.usefixtures("received")
def test_another_loop_and_another_thread() -> None:
    """An app can be started again in another event loop, in another thread too."""
    api = Api(create_app(Settings()))

    async def once() -> None:
        async with ending(api.manager), api.app.router.lifespan_context(api.app):
            assert (await api.process())["status"] == "completed"

    in_a_new_loop(once())
    in_a_new_loop(once())
    with ThreadPoolExecutor() as pool:  # no signal handler can be set there
        pool.submit(in_a_new_loop, once()).result()


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


@parametrize("signum", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_ends_the_polls(signum: int, received: list[int]) -> None:
    """A signal answers the polls, reaches the former handler, and closes the app for new tasks."""
    former = signal.getsignal(signum)
    async with running(forever, workers=1) as api:
        ids = [await api.submit() for _ in range(3)]
        await ticks()
        polls = [asyncio.create_task(api.get(task_id, wait=True)) for task_id in ids[:2]]
        await ticks()
        loop = asyncio.get_running_loop()
        with MonkeyPatch.context() as patch:  # only this method wakes an idle event loop
            patch.setattr(loop, "call_soon_threadsafe", Mock(wraps=loop.call_soon_threadsafe))
            signal.raise_signal(signum)
            assert loop.call_soon_threadsafe.call_count == 1  # type: ignore[attr-defined]
        assert received == [signum]
        # The handler can run in the middle of anything, so it has changed nothing itself.
        assert api.manager.count_tasks()["queued"] == 2
        tasks = await asyncio.gather(*polls)
        assert [task["status"] for task in tasks] == ["processing", "queued"]
        for task_id in ids:  # polls that begin after the signal, also of the third task
            await api.get(task_id, wait=True)
        await assert_closed(api)
        assert clock() == 0
    assert signal.getsignal(signum) is former


def test_signals_after_an_app_has_ended(received: list[int]) -> None:
    """A handler that stays, because two apps stop in the order of their start, does no harm."""

    async def overlap() -> None:
        lifespans = []
        for app in (create_app(Settings()), create_app(Settings())):
            lifespans.append(app.router.lifespan_context(app))
            await lifespans[-1].__aenter__()
        for lifespan in lifespans:
            await lifespan.__aexit__(None, None, None)
            signal.raise_signal(signal.SIGTERM)
            await ticks()

    in_a_new_loop(overlap())
    signal.raise_signal(signal.SIGTERM)  # the event loop is closed
    assert received == [signal.SIGTERM] * 3


@pytest.mark.usefixtures("received")
@parametrize("default", [signal.SIG_DFL, signal.SIG_IGN])
async def test_no_handler_is_added_if_there_is_none(default: signal.Handlers) -> None:
    """Without a server that handles signals, a signal still ends the process, or is ignored."""
    signal.signal(signal.SIGTERM, default)  # the fixture restores the handler
    async with running():
        assert signal.getsignal(signal.SIGTERM) is default


# === Any order of the event loop ==================================================================
# asyncio runs callbacks in the order in which they became ready, and a program can be correct by
# chance in that order only. `SCHEDULES=500 pytest` tries 500 random orders.

SCHEDULES = int(os.environ.get("SCHEDULES", "24"))


async def race(tick: int) -> None:
    """Cancel a task at one tick of its life, and compare everything that is said about its end."""
    ended = []

    async def work(*_: Any) -> str:
        ended.append(await complete())
        return "done"

    async with managing(work, workers=1) as manager:
        task, following = submit(manager), submit(manager)
        poll = asyncio.create_task(until_final(manager, task))
        await ticks(tick)
        try:
            end = manager.cancel(task["task_id"]).copy()
            assert end["status"] == "cancelled"
        except main.TaskFinishedError:
            end = task.copy()
            assert end["status"] == "completed"
        assert await poll == end
        assert clock() == 0
        await asyncio.sleep(1)
        assert task == end
        assert task["result"] == ("done" if task["status"] == "completed" else None)
        assert following["status"] == "completed"
        assert len(ended) == 2 - (task["status"] == "cancelled"), "cancelled work has gone on"


@parametrize("tick", range(16))
@parametrize("seed", [None, 1, 2])
def test_the_race_of_cancel_and_finish(tick: int, seed: int | None) -> None:
    """At whichever tick a task is cancelled, it has one end, and every client sees the same one."""
    in_a_new_loop(race(tick), seed)


async def sleeping(_: str, parameters: Any, __: Any) -> None:
    """Take some seconds."""
    await asyncio.sleep(parameters["seconds"])


async def submit_and_poll(manager: TaskManager, random: Random) -> None:
    """Submit a task, maybe cancel it, and poll it from two clients until its end."""

    async def poll() -> None:
        end = (await until_final(manager, task)).copy()
        assert clock() == pytest.approx(second(end["finished_at"]), abs=0.001), "told late"
        await asyncio.sleep(20)
        assert task == end, "changed after its end"

    await asyncio.sleep(random.choice([0, 0, 0.5, 1, 20]))
    seconds = random.choice([0, 1, 3, 7])
    task = submit(manager, random.choice(list(main.LEVELS)), seconds=seconds)
    polls = asyncio.gather(poll(), poll())
    expected = "completed"
    if random.random() < 0.4:
        await asyncio.sleep(random.choice([0, 1, 2, 5]))
        with suppress(main.TaskFinishedError):
            manager.cancel(task["task_id"])
            expected = "cancelled"
    await polls
    assert task["status"] == expected


async def storm(random: Random) -> None:
    """Submit, poll and cancel tasks from 40 clients, and stop in the middle of five tasks."""
    async with managing(sleeping, workers=3, long_poll=4) as manager:
        await asyncio.gather(*[submit_and_poll(manager, random) for _ in range(40)])
        for _ in range(5):
            submit(manager, seconds=1)
        await ticks(random.randrange(10))


@parametrize("seed", range(SCHEDULES))
def test_a_storm_in_any_order(seed: int) -> None:
    """No task is lost or changes after its end, and no poll misses a change."""
    in_a_new_loop(storm(Random(seed)), seed)


# === Real servers =================================================================================

PATIENCE = 15  # seconds for one step of a server, which only end a hang
UGLY = re.compile("Traceback|never|destroyed|ResourceWarning|ERROR|CRITICAL")
SLOW = {"task_type": "generate_report", "parameters": {"title": "T", "sections": 6}}
needs_signals = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")


class Server:
    """A uvicorn in a process of its own, started as in the README, under `python -X dev`."""

    def __init__(self, **settings: Any) -> None:
        command = [sys.executable, "-X", "dev", "-m", "uvicorn", "main:app", "--port", "0"]
        variables = {f"TASKS_{name.upper()}": str(value) for name, value in settings.items()}
        self.process = subprocess.Popen(
            command,
            env=os.environ | variables,
            cwd=Path(main.__file__).parent,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log = ""
        watchdog = threading.Timer(PATIENCE, self.process.kill)
        watchdog.start()
        assert self.process.stderr
        self.stderr = self.process.stderr
        while "running on" not in self.log:
            line = self.stderr.readline()
            assert line, f"the server has not started:\n{self.log}"
            self.log += line
        watchdog.cancel()
        (self.port,) = map(int, re.findall(r"http://127.0.0.1:(\d+)", self.log))
        url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=url, timeout=PATIENCE, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self.process.kill()
        self.process.communicate()

    def submit(self) -> str:
        return str(self.http.post("/tasks", json=SLOW).raise_for_status().headers["location"])

    def connect(self, *lines: str) -> socket.socket:
        """Send a request on a new connection, which the caller has to close."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)
        connection.sendall("\r\n".join([*lines, "Host: x", "", ""]).encode())
        return connection

    def long_poll(self, path: str) -> socket.socket:
        """Return a connection with a long poll that the server has received."""
        # Two requests on one connection. The server starts the second one when it has responded
        # to the first one.
        poll = f"GET {path}?wait=true HTTP/1.1"
        connection = self.connect("GET /health HTTP/1.1", "Host: x", "", poll)
        health = HTTPResponse(connection)
        health.begin()
        assert (health.status, b"processing" in health.read()) == (200, True)
        return connection

    def stop(self, signum: int = signal.SIGTERM) -> int:
        """End the process with a signal, and return its exit code. Its log must be clean."""
        self.process.send_signal(signum)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(PATIENCE)
        code = self.process.poll()
        self.process.kill()
        self.log += self.stderr.read()
        assert code is not None, f"the server does not stop:\n{self.log}"
        assert not UGLY.search(self.log), self.log
        return code


def read_all(connection: socket.socket) -> bytes:
    with connection:
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_clients_that_disconnect() -> None:
    """A client that disconnects during a long poll, a list or its own body breaks nothing."""
    with Server(long_poll=0.2) as server:
        path = server.submit()
        server.long_poll(path).close()
        server.connect("GET /tasks HTTP/1.1").close()
        server.connect("POST /tasks HTTP/1.1", "Content-Length: 100").close()
        assert server.http.get(f"{path}?wait=true").json()["status"] == "processing"
        assert server.http.delete(path).json()["status"] == "cancelled"
        answer = read_all(server.connect("GET /tasks HTTP/1.1", "Connection: close"))
        assert b"Transfer-Encoding: chunked" in answer
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
        assert len(re.findall(r"INFO: +task \S{36} cancelled", server.log)) == 20
