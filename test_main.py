"""The tests of main.py. Run them with `pytest`.

The first section has one short test for each part of the exercise. The others look for trouble:
changes during a wait, races, full queues, failing work, poison values, shutdown.

Tests that are decorated with `@virtual_time` run on an event loop whose clock jumps to the next
timer instead of waiting for it. So ten minutes take no time, and a test can look at a task exactly
at its deadline. Such a loop knows nothing of threads, programs and sockets. A test whose work uses
one of them has to be decorated with `@real_time` instead.
"""

import asyncio
import functools
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
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from random import Random
from typing import Any, ParamSpec, TypeAlias
from uuid import UUID

import httpx
import pytest
from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from httpx import ASGITransport, AsyncClient
from pydantic import BaseModel, ValidationError
from pytest import LogCaptureFixture, MonkeyPatch
from starlette.exceptions import HTTPException
from typing_extensions import Self

# `import main` reads the settings, and the shell must not change any result.
OF_THE_SHELL = ("TASKS_", "UVICORN_", "WEB_CONCURRENCY", "FORWARDED_ALLOW_IPS", "FORCE_COLOR")
for exported in [name for name in os.environ if name.startswith(OF_THE_SHELL)]:
    del os.environ[exported]

import main
from main import (
    EXAMPLES,
    FINAL,
    TRANSITIONS,
    RateLimiter,
    Report,
    Settings,
    Status,
    Task,
    TaskFailedError,
    TaskManager,
    create_app,
)

if not __debug__:
    raise RuntimeError("these tests need assert statements: run them without -O")

parametrize = pytest.mark.parametrize
P = ParamSpec("P")
Json: TypeAlias = dict[str, Any]
Test: TypeAlias = Callable[P, Coroutine[Any, Any, None]]

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


def run(coroutine: Coroutine[Any, Any, None], seed: int | None = None) -> None:
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


def virtual_time(test: Test[P]) -> Callable[P, None]:
    """Run a test in virtual time."""

    @functools.wraps(test)
    def run_test(*args: P.args, **kwargs: P.kwargs) -> None:
        run(test(*args, **kwargs))

    return run_test


def real_time(test: Test[P]) -> Callable[P, None]:
    """Run a test in real time. Its work can use threads, programs and sockets."""

    @functools.wraps(test)
    def run_test(*args: P.args, **kwargs: P.kwargs) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 60))

    return run_test


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
        """Poll a task until its status is final."""
        task = await self.get(task_id)
        while task["status"] not in FINAL:
            task = await self.get(task_id, wait=True)
        return task

    async def cancel(self, task_id: str) -> httpx.Response:
        return await self.http.delete(f"/tasks/{task_id}")

    async def tasks(self, **query: Any) -> list[Json]:
        response = await self.http.get("/tasks", params=query)
        assert response.status_code == 200, response.text
        return list(response.json())

    async def health(self) -> Json:
        response = await self.http.get("/health")
        assert response.status_code == 200, response.text
        return dict(response.json())

    def check(self) -> None:
        """Assert that /health and the list agree."""
        statuses = [task["status"] for task in self.manager.iterate()]
        health = self.manager.health()
        for status in TRANSITIONS:
            assert health["tasks"][status] == statuses.count(status)
        assert health["queue"]["size"] == statuses.count("queued")
        assert health["workers"]["busy"] == statuses.count("processing")
        assert health["workers"]["busy"] <= health["workers"]["total"]


def asyncio_tasks() -> set[asyncio.Task[Any]]:
    """Return the asyncio tasks that are running, without the current one."""
    return {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}


@asynccontextmanager
async def running(execute: Any = None, **settings: Any) -> AsyncIterator[Api]:
    """Run an app with a limit that no test reaches. After that, everything has ended."""
    settings = {"rate_limit": 1_000_000, **settings}
    api = Api(create_app(Settings(**settings), execute))
    before = asyncio_tasks()
    async with api.app.router.lifespan_context(api.app), api.http:
        yield api
    for task in api.manager.iterate():
        assert task["status"] in FINAL
    await ticks()
    assert asyncio_tasks() <= before


@pytest.fixture(autouse=True)
def expected_errors(caplog: LogCaptureFixture) -> Iterator[list[str]]:
    """Fail a test that logs an error it doesn't expect, or doesn't log one that it expects."""
    expected: list[str] = []
    caplog.set_level(logging.INFO)
    yield expected
    gc.collect(1)  # asyncio logs an exception that was never retrieved when its task is collected
    records = caplog.get_records("call") + caplog.get_records("teardown")
    messages = [record.getMessage() for record in records if record.levelno >= logging.ERROR]
    for message in messages:
        assert any(part in message for part in expected), message
    for part in expected:
        assert any(part in message for message in messages), part


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
    for _turn in range(4):
        await asyncio.sleep(0)
    return "done"


async def fail(*_: Any) -> None:
    for _turn in range(4):
        await asyncio.sleep(0)
    raise TaskFailedError("failed")


async def resist(*_: Any) -> str:
    for _turn in range(8):
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0)
    return "done"


async def forever(*_: Any) -> None:
    await asyncio.Event().wait()


async def instantly(*_: Any) -> str:
    return "done"


# === The exercise =================================================================================


@virtual_time
async def test_submission() -> None:
    """A submission is accepted with 202, the id of the task, and its location."""
    async with running() as api:
        response = await api.http.post("/tasks", json=SUM)
        task_id = response.json()["task_id"]
        assert response.status_code == 202
        assert response.json() == {"task_id": task_id, "status": "queued"}
        assert response.headers["location"] == f"/tasks/{task_id}"
        assert UUID(task_id).version == 4


@virtual_time
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


@virtual_time
async def test_rate_limit() -> None:
    """The eleventh request within a minute is refused, and Retry-After says when to come back."""
    async with running(rate_limit=10) as api:
        for _ in range(10):
            assert (await api.http.get("/tasks")).status_code == 200
        response = await api.http.get("/tasks")
        assert response.status_code == 429
        await asyncio.sleep(int(response.headers["retry-after"]))
        assert (await api.http.get("/tasks")).status_code == 200


@virtual_time
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


@virtual_time
async def test_concurrency() -> None:
    """Five tasks are processed at the same time, and a free worker takes the next one."""
    async with running() as api:
        ids = [await api.submit() for _ in range(7)]
        tasks = [await api.final(task_id) for task_id in ids]
        assert [second(task["started_at"]) for task in tasks] == [0, 0, 0, 0, 0, 5, 5]


@virtual_time
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


@virtual_time
async def test_invalid_parameters() -> None:
    """An invalid submission is refused with 400 and a pointer to the error."""
    async with running() as api:
        response = await api.post(parameters={"numbers": [1, "two"]})
        (error,) = problem_of(response, 400)["errors"]
        assert error["pointer"] == "/parameters/numbers/1"
        assert await api.tasks() == []


@virtual_time
async def test_concurrent_polls() -> None:
    """All clients that wait for a task are woken in the moment in which it finishes."""
    async with running() as api:
        task_id = await api.submit()
        await ticks()
        polls = [api.get(task_id, wait=True) for _ in range(100)]
        for task in await asyncio.gather(*polls):
            assert task["status"] == "completed"
        assert clock() == pytest.approx(5)


@parametrize("task", [SUM, {"task_type": "simulate_failure"}, None])
@virtual_time
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
        problem_of(await api.http.get(f"/tasks/{task_id}"), 404)
        problem_of(await api.cancel(task_id), 404)


# === Submission and results =======================================================================


@virtual_time
async def test_a_task_has_the_same_fields_in_every_state() -> None:
    """All twelve fields exist from queued to completed, and are null until they have a value."""
    async with running(workers=1, retention=600) as api:
        await api.submit()
        await asyncio.sleep(1)
        body = {"task_type": "generate_report", "parameters": {"title": "T"}}
        task_id = await api.submit(**body)
        queued = await api.get(task_id)
        await asyncio.sleep(5)
        processing = await api.get(task_id)
        completed = await api.final(task_id)
    empty = {"result": None, "error": None, "finished_at": None, "expires_at": None}
    assert queued == queued | empty | {"status": "queued", "progress": 0, "started_at": None}
    assert processing == processing | empty | {"status": "processing", "progress": 0}
    assert completed["status"] == "completed"
    assert completed["error"] is None
    for task in (queued, processing, completed):
        assert list(task) == list(Task.__annotations__)
        assert task["task_type"] == "generate_report"
        assert task["parameters"] == {"title": "T", "sections": 3}
        assert task["priority"] == "normal"
        assert second(task["created_at"]) == 1
    assert second(processing["started_at"]) == 5
    assert second(completed["finished_at"]) == pytest.approx(20)
    assert completed["created_at"] == "2026-01-01T00:00:01.000000Z"


@virtual_time
async def test_a_report() -> None:
    """A report takes five seconds for each section, and contains its title."""
    async with running() as api:
        task_id = await api.submit(**EXAMPLES["generate_report"]["value"])
        await asyncio.sleep(9.5)
        task = await api.get(task_id)
        assert (task["status"], task["progress"]) == ("processing", 90)
        await asyncio.sleep(0.51)
        task = await api.get(task_id)
        assert (task["status"], task["progress"]) == ("completed", 100)
        assert task["result"] == "Figures\n2 sections"


@parametrize("message", [None, "no disk"])
@virtual_time
async def test_a_failure(message: str | None) -> None:
    """simulate_failure fails after 5 s with the message of the client, or with the default one."""
    body: Json = {"task_type": "simulate_failure"}
    if message:
        body["parameters"] = {"message": message}
    async with running() as api:
        response = await api.http.post("/tasks", json=body)
        task = await api.final(response.json()["task_id"])
        expected = {"code": "task_failed", "message": message or "simulated failure"}
        assert task["error"] == expected
        assert (task["status"], task["result"], task["progress"]) == ("failed", None, 90)
        assert clock() == pytest.approx(5)


@parametrize(
    ("numbers", "result"),
    [
        ([1, 2, 3], 6),
        ([2**60 + 1, 10**300], 2**60 + 1 + 10**300),
        ([0.1] * 10, 1.0),
        ([1e300] * 1000, math.fsum([1e300] * 1000)),
        ([-1e300, 0.5, 1e300], 0.5),
    ],
)
@virtual_time
async def test_sums(numbers: list[float], result: float) -> None:
    """Integers stay integers, also in the parameters. The sum of floats is correctly rounded."""
    async with running() as api:
        task = await api.final(await api.submit(parameters={"numbers": numbers}))
        assert task["parameters"] == {"numbers": numbers}
        assert [type(number) for number in task["parameters"]["numbers"]] == list(
            map(type, numbers)
        )
        assert task["result"] == result
        assert type(task["result"]) is type(result)


@virtual_time
async def test_progress() -> None:
    """Progress is an integer that never falls, and odd values of the work change nothing."""
    seen: list[int] = []

    async def work(_: str, __: Json, report: Report) -> None:
        for percent in (-5, math.nan, -math.inf, 40.7, 20, math.nan, 250, math.inf, 100):
            report(percent)
            (task,) = api.manager.iterate()
            seen.append(task["progress"])

    async with running(work) as api:
        task = await api.final(await api.submit())
        assert seen == [0, 0, 0, 40, 40, 40, 40, 40, 99]
        assert task["status"] == "completed"


@virtual_time
async def test_progress_of_a_wrong_type(expected_errors: list[str]) -> None:
    """A report that is not a number is an error of the work."""

    async def work(_: str, __: Json, report: Any) -> None:
        report("x")

    expected_errors.append("unexpected exception")
    async with running(work) as api:
        task = await api.final(await api.submit())
        assert task["error"]["code"] == "internal_error"


@virtual_time
async def test_the_wall_clock_decides_nothing() -> None:
    """If the wall clock is set, later times change, but no deadline does."""
    async with running(retention=600) as api:
        task_id = await api.submit()
        await ticks()
        time.time = lambda: BEGIN.timestamp() + 400 * 24 * 3600  # `virtual_time` restores it
        task = await api.final(task_id)
        assert second(task["finished_at"]) == 400 * 24 * 3600
        await asyncio.sleep(599.5)
        assert await api.get(task_id) == task


def test_times_have_six_decimal_places() -> None:
    """A time is in RFC 3339 format with microseconds, even if they are zero."""
    assert main.timestamp(BEGIN.timestamp()) == "2026-01-01T00:00:00.000000Z"


@virtual_time
async def test_execute_is_called_with_three_arguments() -> None:
    """`execute` gets the type, a copy of the parameters that it may change, and `report`."""
    kept: list[Any] = []

    async def work(*args: Any) -> list[Any]:
        task_type, parameters, report = args
        assert task_type == "compute_sum"
        assert parameters == SUM["parameters"]
        report(50)
        parameters["numbers"].append(object())
        return kept

    async with running(work) as api:
        task = await api.final(await api.submit())
        kept.append(object())
        assert task["parameters"] == SUM["parameters"]
        assert await api.tasks() == [task]
        assert task["result"] == []


@virtual_time
async def test_submitted_parameters_are_copied() -> None:
    """A caller of `submit` cannot change the task through the parameters."""
    async with running(forever) as api:
        parameters: Json = {"numbers": [1]}
        task = api.manager.submit("compute_sum", parameters)
        parameters["numbers"].append(object())
        assert task["parameters"] == {"numbers": [1]}


# === The list =====================================================================================


@virtual_time
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
        assert [task["task_id"] for task in tasks] == ids
        for task, status in zip(
            tasks, ["completed", "processing", "cancelled", "queued", "queued"]
        ):
            assert task["status"] == status
            assert await api.get(task["task_id"]) == task
        assert await api.tasks(status="cancelled") == tasks[2:3]
        assert await api.tasks(status="queued", limit=1) == tasks[3:4]
        assert await api.tasks(limit=2) == tasks[:2]
        assert await api.tasks(status="failed") == []
        assert await api.tasks(status="queued", limit=10**30) == tasks[3:]


@parametrize("count", [0, 1, 2, 99, 100, 101, 500])
@virtual_time
async def test_the_list_is_json_at_every_length(count: int) -> None:
    """A list is valid JSON, with one task on each line, in parts that are never empty."""
    async with running(forever, queue_size=1000) as api:
        for _ in range(count):
            api.manager.submit("compute_sum", {})
        parts = [part async for part in main.stream_tasks(api.manager.iterate(), None)]
        lines = b"".join(parts).splitlines()
        assert len(json.loads(b"".join(parts))) == count
        assert lines[0] == b"["
        assert lines[-1] == b"]"
        for line in lines[1:-1]:
            assert json.loads(line.removesuffix(b","))["task_type"] == "compute_sum"
        assert all(parts)
        assert len(parts) == count // 100 + 1
        for limit in {1, 100, count} - {0}:
            assert len(await api.tasks(limit=limit)) == min(limit, count)


@virtual_time
async def test_other_clients_get_a_turn_during_a_list() -> None:
    """While a list is made, other coroutines run."""
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await real_sleep(0)

    async with running(forever, queue_size=1000) as api:
        for _ in range(1000):
            api.manager.submit("compute_sum", {})
        other = asyncio.create_task(count_turns())
        async for _part in main.stream_tasks(api.manager.iterate(), None):
            pass
        other.cancel()
        assert turns >= 9


@virtual_time
async def test_tasks_change_while_a_list_is_read() -> None:
    """A slow reader sees each task as it is when its part is made, and no expired ones."""
    async with running(forever, queue_size=1000, retention=10) as api:
        ids = [api.manager.submit("compute_sum", {})["task_id"] for _ in range(500)]
        stream = main.stream_tasks(api.manager.iterate("queued"), None)
        body = await anext(stream)
        new = api.manager.submit("compute_sum", {})
        api.manager.cancel(ids[-1])
        async for part in stream:
            body += part
        seen = {task["task_id"]: task for task in json.loads(body)}
        assert ids[-1] not in seen
        assert new["task_id"] not in seen
        api.manager.cancel(ids[-2])
        stream = main.stream_tasks(api.manager.iterate(), None)
        body = await anext(stream)
        await asyncio.sleep(10)
        async for part in stream:
            body += part
        assert ids[-2] not in body.decode()


# === Polling ======================================================================================


@virtual_time
async def test_a_long_poll_ends_with_the_change() -> None:
    """A long poll is answered at the moment of the next change, or immediately if there is none."""
    async with running(workers=1) as api:
        await api.submit()
        task_id = await api.submit()
        assert (await api.get(task_id, wait=True))["status"] == "processing"
        assert clock() == pytest.approx(5)
        assert (await api.get(task_id, wait=True))["status"] == "completed"
        assert clock() == pytest.approx(10)
        await api.get(task_id, wait=True)
        assert clock() == pytest.approx(10)
        problem_of(await api.http.get(f"/tasks/{NO_TASK}?wait=true"), 404)


@parametrize("long_poll", [0, 3, 10])
@virtual_time
async def test_a_long_poll_has_a_timeout(long_poll: float) -> None:
    """Without a change, a long poll returns the task after `long_poll` seconds."""
    async with running(forever, workers=1, long_poll=long_poll) as api:
        task_id = await api.submit()
        await ticks()
        assert (await api.get(task_id, wait=True))["status"] == "processing"
        assert clock() == pytest.approx(long_poll)
        assert (await api.get(task_id, wait=False))["status"] == "processing"
        assert clock() == pytest.approx(long_poll)


@virtual_time
async def test_a_client_that_leaves() -> None:
    """If a poll is cancelled, the others go on."""
    async with running(workers=1) as api:
        task = api.manager.submit("compute_sum", SUM["parameters"])
        await ticks()
        leaving = asyncio.create_task(api.manager.wait(task["task_id"]))
        staying = asyncio.create_task(api.manager.wait(task["task_id"]))
        await ticks()
        leaving.cancel()
        assert (await staying)["status"] == "completed"
        assert leaving.cancelled()


@virtual_time
async def test_a_task_expires_before_its_poll_goes_on() -> None:
    """A poll returns the final task, even if it has expired before the poll could go on."""
    async with running(forever, retention=1) as api:
        task = api.manager.submit("compute_sum", {})
        await ticks()
        poll = asyncio.create_task(api.manager.wait(task["task_id"]))
        await ticks()
        api.manager.cancel(task["task_id"])
        asyncio.get_running_loop().moment += 2  # type: ignore[attr-defined]  # the loop was busy
        api.manager.expire()
        assert (await poll)["status"] == "cancelled"


# === Cancellation =================================================================================


@parametrize("interruption", ["DELETE", "timeout", "shutdown"])
@virtual_time
async def test_cancelled_work_cleans_up_undisturbed(interruption: str) -> None:
    """Work is cancelled only once, whatever happens during its clean-up."""
    cleaned = []

    async def work(*_: Any) -> None:
        try:
            await asyncio.sleep(100)
        finally:
            await asyncio.sleep(2)
            cleaned.append(clock())

    async with running(work, task_timeout=10) as api:
        task = api.manager.submit("compute_sum", {})
        await asyncio.sleep(9)
        cancelled = api.manager.cancel(task["task_id"]).copy()
        await asyncio.sleep(1)
        if interruption == "DELETE":
            assert api.manager.cancel(task["task_id"]) == cancelled
        if interruption != "shutdown":
            await asyncio.sleep(2)
    assert cleaned == [pytest.approx(11)]
    assert task == cancelled


@virtual_time
async def test_a_cancelled_task_frees_its_worker() -> None:
    """DELETE interrupts the work, so that the worker takes the next task immediately."""
    async with running(forever, workers=1) as api:
        task_id = await api.submit()
        following = await api.submit()
        await ticks()
        await api.cancel(task_id)
        await ticks()
        assert (await api.get(following))["status"] == "processing"
        assert clock() == 0


@virtual_time
async def test_cancelled_work_cannot_change_its_task(expected_errors: list[str]) -> None:
    """Neither progress nor an exception of cancelled work is stored. The exception is logged."""

    async def work(_: str, __: Json, report: Report) -> None:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(9)
        report(50)
        raise ValueError("in the clean-up")

    expected_errors.append("unexpected exception")
    async with running(work) as api:
        task_id = await api.submit()
        await asyncio.sleep(1)
        cancelled = (await api.cancel(task_id)).json()
        await asyncio.sleep(1)
        assert await api.get(task_id) == cancelled
        assert cancelled["progress"] == 0


async def race(work: Any, tick: int) -> None:
    """Cancel a task at one tick of its life, and compare everything that is said about its end."""
    async with running(work, workers=1) as api:
        task_id = await api.submit()
        following = await api.submit()
        poll = asyncio.create_task(api.final(task_id))
        await ticks(tick)
        response = await api.cancel(task_id)
        body = response.json()
        task = body.get("task", body)
        assert await poll == task
        assert clock() == 0
        await asyncio.sleep(1)
        assert await api.get(task_id) == task
        assert response.status_code == (200 if task["status"] == "cancelled" else 409)
        assert task["result"] == ("done" if task["status"] == "completed" else None)
        assert (await api.get(following))["status"] in ("completed", "failed")
        api.check()


@parametrize("tick", range(24))
@parametrize("work", [complete, fail, resist])
@virtual_time
async def test_the_race_of_cancel_and_finish(work: Any, tick: int) -> None:
    """At whichever tick DELETE comes, a task has one end. DELETE and the poll report it."""
    await race(work, tick)


@parametrize("following", TRANSITIONS)
@parametrize("status", TRANSITIONS)
@virtual_time
async def test_transitions(status: Status, following: Status) -> None:
    """Only the five transitions of the state diagram are possible. Others change nothing."""
    ways: dict[Status, list[Status]] = {"queued": [], "cancelled": ["cancelled"]}
    async with running(forever, workers=1) as api:
        await api.submit()
        await ticks()
        task = api.manager.submit("compute_sum", {})
        for step in ways.get(status, ["processing", status]):
            api.manager._set_status(task, step)
        before = task.copy()
        changed = api.manager._set_status(task, following, result=1)
        assert changed == (following in TRANSITIONS[status])
        assert task["status"] == (following if changed else status)
        assert changed or task == before
        assert (task["progress"] == 100) == (task["status"] == "completed")


# === The queue ====================================================================================


@virtual_time
async def test_too_many_tasks() -> None:
    """With `max_tasks` tasks, a submission is refused until one of them has expired."""
    async with running(workers=1, max_tasks=3, retention=20) as api:
        for _ in range(3):
            await api.submit()
        response = await api.post()
        assert problem_of(response, 503)["detail"] == "There are too many tasks."
        assert response.headers["retry-after"] != "5"
        await asyncio.sleep(25.01)
        await api.submit()


@parametrize("victim", range(6))
@virtual_time
async def test_removal_keeps_the_order(victim: int) -> None:
    """Whichever queued task is cancelled, the others start in the order that they had."""
    async with running(workers=1) as api:
        await api.submit()
        await ticks()
        ids = []
        for priority in ("high", "high", "normal", "normal", "high", "high"):
            ids.append(await api.submit(priority=priority))
        order = [ids[number] for number in (0, 1, 4, 5, 2, 3)]
        await api.cancel(ids[victim])
        order.remove(ids[victim])
        tasks = [await api.final(task_id) for task_id in order]
        starts = [second(task["started_at"]) for task in tasks]
        assert starts == pytest.approx([5, 10, 15, 20, 25])


@virtual_time
async def test_priorities() -> None:
    """A higher priority starts first, `normal` is the default, and then the older task starts."""
    async with running(workers=1) as api:
        for priority in ("low", "normal", "high", "low", None, "high"):
            await api.submit(**({"priority": priority} if priority else {}))
        await asyncio.sleep(40)
        starts = [second(task["started_at"]) for task in await api.tasks()]
        assert starts == pytest.approx([20, 10, 0, 25, 15, 5])


@parametrize(("later", "low_first"), [(59.5, False), (60, True), (60.5, True)])
@virtual_time
async def test_no_task_starves(later: float, low_first: bool) -> None:
    """A level of priority is worth 30 s: a low task can only be overtaken for 60 s."""
    async with running(workers=1, task_timeout=1000, time_scale=20) as api:
        await api.submit()
        await ticks()
        low = await api.submit(priority="low")
        await asyncio.sleep(later)
        high = await api.submit(priority="high")
        await api.final(low)
        await api.final(high)
        started = [(await api.get(task_id))["started_at"] for task_id in (low, high)]
        assert (started[0] < started[1]) == low_first


@virtual_time
async def test_a_queued_task_is_always_found() -> None:
    """At no tick is a task neither in the queue nor being processed."""
    async with running(forever, workers=2) as api:
        for _ in range(3):
            await api.submit()
        for _ in range(10):
            api.check()
            await ticks(1)
        assert (await api.health())["workers"] == {"busy": 2, "total": 2}


# === Workers ======================================================================================


class StrangeError(BaseException):
    """Neither an Exception nor a cancellation."""


class UnspeakableError(TaskFailedError):
    """An exception that has no text."""

    def __str__(self) -> str:
        raise SystemExit("no text")


class Group(Exception):
    """Has the shape of an exception group, which Python 3.10 doesn't have."""

    def __init__(self, *exceptions: BaseException) -> None:
        super().__init__("unhandled errors")
        self.exceptions = exceptions


def raising(exception: BaseException) -> Any:
    """Return work that raises an exception."""

    async def work(*_: Any) -> None:
        raise exception

    return work


def returning(value: Any) -> Any:
    """Return work that returns a value."""

    async def work(*_: Any) -> Any:
        return value

    return work


async def await_something_cancelled(*_: Any) -> None:
    part = asyncio.create_task(forever())
    asyncio.get_running_loop().call_soon(part.cancel)
    await part


async def cancel_itself(*_: Any) -> None:
    task = asyncio.current_task()
    assert task
    task.cancel()
    await real_sleep(0)


FAILED = TaskFailedError("no disk \ud800")
BUGS: dict[str, Any] = {
    "ValueError": raising(ValueError("secret")),
    "SystemExit": raising(SystemExit(3)),
    "KeyboardInterrupt": raising(KeyboardInterrupt()),
    "GeneratorExit": raising(GeneratorExit()),
    "StopIteration": raising(StopIteration()),
    "BaseException": raising(StrangeError("secret")),
    "CancelledError": raising(asyncio.CancelledError("secret")),
    "cancelled part": await_something_cancelled,
    "cancels itself": cancel_itself,
    "no text": raising(UnspeakableError()),
    "timeout of a part": raising(TimeoutError("secret")),
    "group with a bug first": raising(Group(ValueError("secret"), FAILED)),
    "strange group": raising(Group(5)),  # type: ignore[arg-type]  # on purpose
    "not a coroutine function": lambda *_: None,
}


@parametrize("name", BUGS)
@virtual_time
async def test_a_bug_in_the_work(
    name: str, expected_errors: list[str], caplog: LogCaptureFixture
) -> None:
    """Work with a bug has failed, the log has the exception, and the worker goes on."""
    expected_errors.append("compute_sum raised an unexpected exception")
    work = BUGS[name]
    async with running(lambda *args: work(*args), workers=1) as api:
        task = await api.final(await api.submit())
        assert task["status"] == "failed"
        assert task["error"]["code"] == "internal_error"
        assert "secret" not in task["error"]["message"]
        work = complete
        assert (await api.final(await api.submit()))["status"] == "completed"
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert errors[0].exc_info


@parametrize(
    "exception", [FAILED, Group(FAILED), Group(FAILED, ValueError()), Group(Group(FAILED))]
)
@virtual_time
async def test_a_failure_in_a_group(exception: Exception) -> None:
    """A TaskFailedError keeps its message if it is the first exception of a group."""
    async with running(raising(exception)) as api:
        task = await api.final(await api.submit())
        assert task["error"] == {"code": "task_failed", "message": "no disk ?"}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no TaskGroup")
@parametrize("delay", [0, 1])
@virtual_time
async def test_two_failures_in_a_task_group(delay: float) -> None:
    """Two failing children give the same error, whether they fail together or one by one."""

    async def child(message: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        raise TaskFailedError(message)

    async def work(*_: Any) -> None:
        async with getattr(asyncio, "TaskGroup")() as group:  # noqa: B009  # mypy on Python 3.10
            group.create_task(child("first", 1))
            group.create_task(child("second", 1 + delay))

    async with running(work) as api:
        task = await api.final(await api.submit())
        assert task["error"] == {"code": "task_failed", "message": "first"}


@virtual_time
async def test_work_that_is_cancelled_before_it_starts(
    monkeypatch: MonkeyPatch, expected_errors: list[str]
) -> None:
    """Even if none of its code has run, the work has failed, and the worker goes on."""
    create_task = asyncio.create_task

    def create_cancelled_task(coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = create_task(coroutine)
        task.cancel()
        return task

    expected_errors.append("unexpected exception")
    async with running(complete, workers=1) as api:
        await ticks()
        task = api.manager.submit("compute_sum", {})
        with monkeypatch.context() as patch:
            patch.setattr(asyncio, "create_task", create_cancelled_task)
            await ticks()
        assert task["error"] == main.INTERNAL_ERROR
        assert (await api.final(await api.submit()))["status"] == "completed"


@pytest.mark.skipif(sys.version_info < (3, 12), reason="there are no eager tasks")
@parametrize(("work", "status"), [(instantly, "completed"), (raising(FAILED), "failed")])
@virtual_time
async def test_eager_tasks(work: Any, status: str) -> None:
    """Work that has ended before `create_task` returns is stored like any other."""
    eager_task_factory = getattr(asyncio, "eager_task_factory")  # noqa: B009  # mypy on Python 3.10
    asyncio.get_running_loop().set_task_factory(eager_task_factory)
    async with running(work, workers=2) as api:
        for _ in range(5):
            task = await api.final(await api.submit())
            assert task["status"] == status
            assert task["started_at"]


@parametrize(("timeout", "status"), [(4.9, "failed"), (5.1, "completed")])
@virtual_time
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
            assert task["error"] == main.TIMEOUT
            assert task["progress"] == 90


@parametrize("end", ["failed", "cancelled"])
@virtual_time
async def test_work_that_ignores_its_cancellation(end: str, caplog: LogCaptureFixture) -> None:
    """Such work keeps its worker until the timeout and 5 s of grace have passed, not longer."""

    async def work(*_: Any) -> str:
        while clock() < 100:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(100 - clock())
        return "late"

    async with running(work, workers=1, task_timeout=10) as api:
        task_id = await api.submit()
        following = await api.submit()
        await asyncio.sleep(2)
        if end == "cancelled":
            await api.cancel(task_id)
        await asyncio.sleep(8 + 4.99)
        assert (await api.get(task_id))["status"] == end
        assert (await api.get(following))["status"] == "queued"
        await asyncio.sleep(0.02)
        assert (await api.get(following))["status"] == "processing"
        assert "is abandoned" in caplog.text
        await asyncio.sleep(100)
        assert (await api.get(task_id))["result"] is None


@parametrize("exception", [RuntimeError("a bug"), asyncio.CancelledError(), StrangeError()])
@virtual_time
async def test_a_worker_that_fails(
    exception: BaseException, monkeypatch: MonkeyPatch, expected_errors: list[str]
) -> None:
    """If a worker fails, all stop, no task is left unfinished, and the server says so."""
    if isinstance(exception, RuntimeError):
        expected_errors.append("a worker failed, so all workers stop")
    async with running(forever, workers=2) as api:
        ids = [await api.submit()]
        await ticks()
        monkeypatch.setattr(main.TaskQueue, "get", raising(exception))
        ids += [await api.submit() for _ in range(3)]
        await api.cancel(ids[0])  # its worker asks for the next task
        await ticks(20)
        problem_of(await api.http.get("/health"), 503)
        problem_of(await api.post(), 503)
        for task_id in ids:
            assert (await api.get(task_id))["status"] == "cancelled"


@parametrize("task_type", EXAMPLES)
@virtual_time
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


@virtual_time
async def test_an_unknown_task_type(expected_errors: list[str]) -> None:
    """A task type without a `case` doesn't complete."""
    expected_errors.append("unexpected exception")
    async with running() as api:
        task = api.manager.submit("mistake", {})
        await api.final(task["task_id"])
        assert task["error"] == main.INTERNAL_ERROR


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
@virtual_time
async def test_a_result_without_a_json_form(
    name: str, wrap: Callable[[Any], Any], expected_errors: list[str]
) -> None:
    """Such a result fails its task, wherever it is nested, and the list stays valid."""
    expected_errors.append("unexpected exception")
    async with running(returning(wrap(NOT_JSON[name]))) as api:
        task = await api.final(await api.submit())
        assert task["error"] == main.INTERNAL_ERROR
        assert await api.tasks() == [task]


@parametrize("name", NOT_JSON)
@virtual_time
async def test_parameters_without_a_json_form(name: str) -> None:
    """Such parameters are refused, so that even free-form parameters cannot break the list."""
    async with running() as api:
        with pytest.raises(main.InvalidJsonError):
            api.manager.submit("compute_sum", {"free": NOT_JSON[name]})
        assert await api.tasks() == []


@virtual_time
async def test_parameters_without_a_json_form_are_a_bad_request(monkeypatch: MonkeyPatch) -> None:
    """The client gets a 400 that points to the parameters."""
    monkeypatch.setattr(BaseModel, "model_dump", lambda _: {"free": math.nan})
    async with running() as api:
        (error,) = problem_of(await api.post(), 400)["errors"]
        assert error["pointer"] == "/parameters"


@parametrize(
    ("value", "stored"),
    [
        (nested(190), nested(190)),
        ((1, (2, 3)), [1, [2, 3]]),
        (
            {"a": [1.5, None, True, "\N{GRINNING FACE}"]},
            {"a": [1.5, None, True, "\N{GRINNING FACE}"]},
        ),
        (10**300, 10**300),
    ],
    ids=["deep", "tuples", "all types", "large"],
)
@virtual_time
async def test_a_result_with_a_json_form(value: Any, stored: Any) -> None:
    """Every value with a JSON form is a result that clients can read."""
    async with running(returning(value)) as api:
        task = await api.final(await api.submit())
        assert task["result"] == stored
        assert await api.tasks() == [task]


# === Health, clean-up, log ========================================================================


@virtual_time
async def test_health() -> None:
    """/health counts every status, is not limited, and must not be cached."""
    async with running(workers=1, queue_size=7, rate_limit=6) as api:
        ids = [await api.submit() for _ in range(4)]
        response = await api.http.post("/tasks", json={"task_type": "simulate_failure"})
        await api.cancel(ids[3])
        await asyncio.sleep(5.01)
        response = await api.http.get("/health")
        assert response.headers["cache-control"] == "no-store"
        assert "ratelimit" not in response.headers
        assert response.json() == {
            "status": "ok",
            "tasks": {"queued": 2, "processing": 1, "completed": 1, "failed": 0, "cancelled": 1},
            "queue": {"size": 2, "capacity": 7},
            "workers": {"busy": 1, "total": 1},
        }
        await asyncio.sleep(15)
        assert (await api.health())["tasks"]["failed"] == 1


@virtual_time
async def test_no_reader_sees_an_expired_task() -> None:
    """The list and /health forget a task at the same instant as a poll does."""
    async with running(retention=10, cleanup_interval=100_000) as api:
        for read in (api.tasks, api.health):
            empty = await read()
            await api.cancel(await api.submit())
            await asyncio.sleep(9.75)
            assert await read() != empty
            await asyncio.sleep(0.25)
            assert await read() == empty


@virtual_time
async def test_the_timer_frees_memory_and_survives_an_exception(
    monkeypatch: MonkeyPatch, expected_errors: list[str], caplog: LogCaptureFixture
) -> None:
    """The clean-up runs without requests, and an exception in one round doesn't end it."""
    expected_errors.append("the clean-up failed")
    async with running(retention=1, cleanup_interval=30) as api:
        await api.cancel(await api.submit())
        with monkeypatch.context() as patch:
            patch.setattr(RateLimiter, "sweep", raising(RuntimeError("a bug")))
            patch.setattr(TaskManager, "expire", lambda _: 1 / 0)
            await asyncio.sleep(31)
        assert "expired" not in caplog.text
        await asyncio.sleep(30)
        assert "compute_sum expired after 1.0 s" in caplog.text


@virtual_time
async def test_the_log(caplog: LogCaptureFixture) -> None:
    """Each step of a task is a line with its short id, its type, and how long the status lasted."""
    async with running(raising(TaskFailedError("a\nb")), workers=1, retention=9) as api:
        task_id = await api.submit()
        await asyncio.sleep(9)
        await api.tasks()
    async with running(workers=1) as api:
        await api.submit()
        other = await api.submit(priority="high")
        await ticks()
        await asyncio.sleep(7)
    lines = [line for line in caplog.messages if line.startswith("task ")]
    name = f"task {task_id[:8]} compute_sum"
    assert lines[:4] == [
        f"{name} queued with priority normal",
        f"{name} processing after 0.0 s",
        f"{name} failed after 0.0 s: 'a\\nb'",
        f"{name} expired after 9.0 s",
    ]
    assert any(line.endswith(" completed after 5.0 s") for line in lines)
    assert any(line.endswith(" cancelled after 2.0 s") for line in lines)
    assert f"task {other[:8]} compute_sum queued with priority high" in lines


# === Without workers ==============================================================================


async def assert_closed(client: AsyncClient) -> None:
    """Assert that no task is accepted."""
    problem_of(await client.post("/tasks", json=SUM), 503)
    problem_of(await client.get("/health"), 503)
    assert (await client.get("/tasks")).json() == []


@virtual_time
async def test_without_a_lifespan() -> None:
    """Before the workers start and after they have stopped, no task is accepted."""
    api = Api(create_app(Settings()))
    await assert_closed(api.http)
    async with api.app.router.lifespan_context(api.app):
        assert (await api.final(await api.submit()))["status"] == "completed"
    await asyncio.sleep(1000)
    await assert_closed(api.http)


@virtual_time
async def test_a_mount() -> None:
    """In a mount, links have the prefix, and the parent has to run the lifespan."""
    parent = FastAPI()
    app = create_app(Settings(rate_limit=4))
    parent.mount("/api", app)
    transport = ASGITransport(parent)
    async with AsyncClient(transport=transport, base_url="http://test") as client:
        problem_of(await client.post("/api/tasks", json=SUM), 503)
        async with app.router.lifespan_context(app):
            response = await client.post("/api/tasks", json=SUM)
            location = response.headers["location"]
            assert location.startswith("/api/tasks/")
            assert (await client.get(location)).status_code == 200
            assert (await client.get("/api/")).headers["location"] == "/api/docs"
            for _ in range(9):
                assert (await client.get("/api/health")).status_code == 200


# === Rate limit ===================================================================================


@virtual_time
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
        assert response.headers["retry-after"] == "40"
        assert response.headers["ratelimit"] == '"default";r=0;t=40'
        await asyncio.sleep(39.5)
        assert (await api.http.get(LIMITED)).headers["retry-after"] == "1"
        await asyncio.sleep(0.5)
        assert (await api.http.get(LIMITED)).status_code == 404
        assert (await api.http.get(LIMITED)).headers["retry-after"] == "2"
        await asyncio.sleep(300)
        assert (await api.http.get(LIMITED)).headers["ratelimit"] == '"default";r=9;t=60'


@virtual_time
async def test_retry_after_is_never_5() -> None:
    """Retry-After doesn't coincide with the 5 s after which uvicorn closes idle connections."""
    async with running(rate_limit=1) as api:
        await api.http.get(LIMITED)
        waits = []
        for _ in range(60):
            waits.append(int((await api.http.get(LIMITED)).headers["retry-after"]))
            await asyncio.sleep(1)
        assert waits == [*range(60, 5, -1), 6, 4, 3, 2, 1]


@virtual_time
async def test_retry_after_is_enough() -> None:
    """A client that waits as long as it was told is accepted, whatever the rounding errors are."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    for seed in range(500):
        random = Random(seed)
        # The errors are largest where the clock passes a power of two.
        loop.moment = 2.0 ** random.randrange(6, 24) - random.uniform(0, 60)
        limiter = RateLimiter(3, 60)
        for left in (2, 1, 0):
            assert await limiter.hit("client")
            quota = await limiter.quota("client")
            assert quota[0] == left, f"seed {seed}"
            assert 1 <= quota[1] <= 60, f"seed {seed}"
            loop.moment += random.choice([0, random.uniform(0, 10)])
        assert not await limiter.hit("client"), f"seed {seed}"
        loop.moment += (await limiter.quota("client"))[1]
        assert await limiter.hit("client"), f"seed {seed}"


@virtual_time
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


@parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/tasks", b"{", 400),
        ("POST", "/tasks", b"x" * 70_000, 413),
        ("GET", LIMITED, None, 404),
        ("PUT", f"/tasks/{NO_TASK}", None, 405),
        ("GET", f"/tasks/{NO_TASK}?wait=maybe", None, 400),
        ("DELETE", "/tasks/x", None, 400),
    ],
)
@virtual_time
async def test_every_response_counts(
    method: str, path: str, body: bytes | None, status: int
) -> None:
    """Errors count like successes, but refused requests don't."""
    async with running(rate_limit=2) as api:
        for left, expected in ((1, status), (0, status), (0, 429), (0, 429)):
            response = await api.http.request(method, path, content=body)
            problem_of(response, expected)
            assert response.headers["ratelimit"] == f'"default";r={left};t=60'
            assert ("retry-after" in response.headers) == (expected == 429)


@virtual_time
async def test_the_limit_comes_before_the_body() -> None:
    """The body of a refused request is not read."""

    async def receive() -> Json:
        raise AssertionError("the body was read")

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async with running(rate_limit=1) as api:
        await api.http.get(LIMITED)
        client = ("10.0.0.1", 1)
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/tasks",
            "headers": [],
            "client": client,
        }
        await api.app({**scope, "query_string": b""}, receive, send)
        assert sent[0]["status"] == 429


@virtual_time
async def test_websockets_are_not_limited() -> None:
    """Anything that is not an HTTP request passes both middlewares."""
    sent: list[Any] = []

    async def receive() -> Json:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    async with running() as api:
        scope = {"type": "websocket", "path": "/tasks", "headers": [], "query_string": b""}
        await api.app(scope, receive, send)
        assert sent[0]["type"] == "websocket.close"


@parametrize("prefix", ["", "/api", "/api/"])
@parametrize("path", ["/", "/docs", "/redoc", "/openapi.json", "/health", "/favicon.ico"])
@virtual_time
async def test_free_paths(path: str, prefix: str) -> None:
    """The documentation and /health neither need quota nor use it, behind a prefix too."""
    base = f"http://test{prefix.rstrip('/')}"
    async with running(rate_limit=1) as api, api.client(root_path=prefix) as client:
        for _ in range(3):
            response = await client.get(base + path)
            assert response.status_code in (200, 307, 404)
            assert "ratelimit" not in response.headers
        assert (await client.get(base + LIMITED)).status_code == 404
        assert (await client.get(base + LIMITED)).status_code == 429


@virtual_time
async def test_who_shares_a_limit() -> None:
    """An IPv4 address, an IPv6 /64 network, and all that is neither have one limit each."""
    hosts: dict[str, list[str | None]] = {
        "IPv4": ["192.0.2.1", "::ffff:192.0.2.1"],
        "another IPv4": ["192.0.2.2"],
        "IPv6": ["2001:db8::1", "2001:db8:0:0:ffff::9"],
        "another IPv6": ["2001:db8:0:1::1"],
        "with a zone": ["fe80::1%eth0", "fe80::2"],
        "neither": [None, "not an ip", "x" * 20_000, "", "300.1.1.1"],
    }
    async with running(rate_limit=1) as api:
        for name, shared in hosts.items():
            for number, host in enumerate(shared):
                async with api.client(host) as client:
                    response = await client.get(LIMITED, headers={"X-Forwarded-For": "192.0.2.9"})
                    assert response.status_code == (429 if number else 404), name


@virtual_time
async def test_the_limiter_forgets_quiet_clients() -> None:
    """After a sweep, the limiter keeps only the clients that have a request in the window."""
    limiter = RateLimiter(3, 60)
    for number in range(1000):
        assert await limiter.hit(f"client {number}")
    await asyncio.sleep(59)
    await limiter.hit("late")
    await limiter.sweep()
    assert len(limiter._times) == 1001
    await asyncio.sleep(1)
    await limiter.sweep()
    assert list(limiter._times) == ["late"]
    assert await limiter.quota("late") == (2, 59)
    assert await limiter.quota("other") == (3, 0)


# === Middleware of the user =======================================================================


@virtual_time
async def test_cors_goes_around_the_limits() -> None:
    """With CORSMiddleware, preflight requests are not counted, and a browser can read refusals."""
    origin = {"Origin": "http://example.com"}
    preflight = {**origin, "Access-Control-Request-Method": "POST"}
    app = create_app(Settings(rate_limit=2))
    app.add_middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["*"])
    client = Api(app).http
    for _ in range(5):
        assert (await client.options("/tasks", headers=preflight)).status_code == 200
    for status, body in ((413, b"x" * 70_000), (400, b""), (429, b"")):
        response = await client.post("/tasks", content=body, headers=origin)
        problem_of(response, status)
        assert response.headers["access-control-allow-origin"] == "*"


@virtual_time
async def test_function_middleware_goes_around_the_limits() -> None:
    """With `@app.middleware("http")`, refusals are seen, and a chunked body is still a 413."""
    app = create_app(Settings(rate_limit=2, max_body=1000))
    seen = []

    @app.middleware("http")
    async def correlate(request: Any, call_next: Any) -> Any:
        response = await call_next(request)
        seen.append(response.status_code)
        return response

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(11):
            yield b"x" * 100

    client = Api(app).http
    problem_of(await client.post("/tasks", content=chunks()), 413)
    problem_of(await client.post("/tasks", content=b"x" * 1001), 413)
    problem_of(await client.post("/tasks"), 429)
    assert seen == [413, 413, 429]


# === Bad input ====================================================================================


def body_of(task_type: str, fields: str) -> bytes:
    """Return the body of a submission with these parameters."""
    return f'{{"task_type": "{task_type}", "parameters": {{{fields}}}}}'.encode()


def numbers_of(numbers: str) -> bytes:
    return body_of("compute_sum", f'"numbers": [{numbers}]')


def report_of(fields: str) -> bytes:
    return body_of("generate_report", fields)


NUMBER = "Input should be a number from -1e300 to 1e300"
OBJECT = "Input should be an object, sent as application/json"
TYPES = "Input should be one of compute_sum, generate_report, simulate_failure"
EXTRA = "Extra inputs are not permitted"
UTF_8 = "The body should be JSON in UTF-8"
FIRST = "/parameters/numbers/0"
MESSAGE = "/parameters/message"
BAD_BODIES: dict[str, tuple[bytes, str, str]] = {
    "empty": (b"", "", "Field required"),
    "malformed": (b'{"a":', "", "Malformed JSON at character 5: Expecting value"),
    "array": (b"[]", "", OBJECT),
    "null": (b"null", "", OBJECT),
    "not UTF-8": (b'{"task_type": "\xff"}', "", "without deep nesting"),
    "UTF-16": (numbers_of("1").decode().encode("utf-16"), "", UTF_8),
    "UTF-32": (numbers_of("1").decode().encode("utf-32-be"), "", UTF_8),
    "deep": (b"[" * 60_000, "", ""),
    "deep numbers": (numbers_of("[" * 30_000 + "]" * 30_000), "", ""),
    "NaN": (numbers_of("NaN"), FIRST, NUMBER),
    "infinity": (numbers_of("-Infinity"), FIRST, NUMBER),
    "1e400": (numbers_of("1e400"), FIRST, NUMBER),
    "4000 digits": (numbers_of("9" * 4000), FIRST, NUMBER),
    "5000 digits": (numbers_of("9" * 5000), "", "without deep nesting"),
    "true": (numbers_of("true"), FIRST, NUMBER),
    "string": (numbers_of('"5"'), FIRST, NUMBER),
    "null number": (numbers_of("1, null"), "/parameters/numbers/1", NUMBER),
    "no numbers": (numbers_of(""), "/parameters/numbers", "at least 1 item"),
    "1001 numbers": (numbers_of("1," * 1000 + "1"), "/parameters/numbers", "at most 1000 items"),
    "surrogate": (body_of("simulate_failure", '"message": "\\ud800"'), MESSAGE, "valid string"),
    "surrogate key": (b'{"task_type": "simulate_failure", "\\ud800": 1}', "", "valid string"),
    "surrogate type": (b'{"task_type": "\\ud800"}', "/task_type", TYPES),
    "no type": (b'{"parameters": {}}', "/task_type", TYPES),
    "list as type": (b'{"task_type": ["compute_sum"]}', "/task_type", TYPES),
    "long type": (b'{"task_type": "%b"}' % (b"x" * 9000), "/task_type", TYPES),
    "no parameters": (b'{"task_type": "compute_sum"}', "/parameters", "Field required"),
    "parameters 5": (b'{"task_type": "simulate_failure", "parameters": 5}', "/parameters", OBJECT),
    "unknown field": (b'{"task_type": "simulate_failure", "prority": 1}', "/prority", EXTRA),
    "unknown parameter": (body_of("simulate_failure", '"m": 1'), "/parameters/m", EXTRA),
    "odd key": (body_of("simulate_failure", '"~a/b": 1'), "/parameters/~0a~1b", EXTRA),
    "long key": (body_of("simulate_failure", f'"{"k" * 9000}": 1'), "/parameters/kkk", EXTRA),
    "priority": (b'{"task_type": "simulate_failure", "priority": "x"}', "/priority", "'high'"),
    "no message": (body_of("simulate_failure", '"message": ""'), MESSAGE, "at least 1"),
    "no title": (report_of('"title": ""'), "/parameters/title", "at least 1 character"),
    "title 5": (report_of('"title": 5'), "/parameters/title", "valid string"),
    "long title": (report_of(f'"title": "{"t" * 201}"'), "/parameters/title", "at most 200"),
    "sections 0": (report_of('"title": "t", "sections": 0'), "/parameters/sections", "greater"),
    "sections 7": (report_of('"title": "t", "sections": 7'), "/parameters/sections", "less"),
    "sections true": (
        report_of('"title": "t", "sections": true'),
        "/parameters/sections",
        "integer",
    ),
    "sections '3'": (report_of('"title": "t", "sections": "3"'), "/parameters/sections", "integer"),
    "sections 2.5": (report_of('"title": "t", "sections": 2.5'), "/parameters/sections", "integer"),
}


@parametrize("name", BAD_BODIES)
@virtual_time
async def test_bad_bodies(name: str) -> None:
    """A bad body gets a short 400 that points to the error, and leaves nothing behind."""
    body, pointer, detail = BAD_BODIES[name]
    async with running() as api:
        response = await api.send(body)
        problem = problem_of(response, 400)
        assert problem["detail"] == "The request is invalid."
        (error,) = problem["errors"]
        if name not in ("deep", "deep numbers"):  # depends on the version of Python
            assert error["pointer"].startswith(pointer)
            assert len(error["pointer"]) <= 200
            assert pointer or not error["pointer"]
        assert detail in error["detail"]
        assert len(response.content) < 600
        assert await api.tasks() == []


@parametrize(
    "body",
    [
        numbers_of("1e300, -1e300, 0.1, -0.0"),
        numbers_of("1," * 999 + "1"),
        report_of(f'"title": "{"t" * 200}", "sections": 6'),
        report_of('"title": "\\u0000\\ud83d\\ude00", "sections": 1'),
        b"\xef\xbb\xbf" + body_of("simulate_failure", ""),
    ],
    ids=["numbers", "1000 numbers", "lengths", "characters", "byte order mark"],
)
@virtual_time
async def test_good_bodies_at_the_bounds(body: bytes) -> None:
    """A body that is just valid is accepted, and the list is valid JSON afterwards."""
    async with running() as api:
        assert (await api.send(body)).status_code == 202
        assert len(await api.tasks()) == 1


@parametrize("content_type", ["text/plain", "", "application/x-www-form-urlencoded"])
@virtual_time
async def test_a_wrong_content_type(content_type: str) -> None:
    """A body that is not declared as JSON gets a 400 that says how to send it."""
    async with running() as api:
        problem = problem_of(await api.send(numbers_of("1"), content_type), 400)
        assert problem["errors"] == [{"detail": OBJECT, "pointer": ""}]


@virtual_time
async def test_zero_bytes_that_are_not_json() -> None:
    """Only a body that is declared as JSON is checked for zero bytes."""
    async with running() as api:
        problem = problem_of(await api.send(b"\0", "application/octet-stream"), 400)
        assert problem["errors"] == [{"detail": OBJECT, "pointer": ""}]


@virtual_time
async def test_at_most_ten_errors_are_listed() -> None:
    """A response lists ten errors, however many there are."""
    async with running() as api:
        response = await api.post(**{f"field{number}": number for number in range(1000)})
        assert len(problem_of(response, 400)["errors"]) == 10


@parametrize("size", [1000, 1001])
@parametrize("chunked", [False, True])
@virtual_time
async def test_the_size_of_a_body(size: int, chunked: bool) -> None:
    """A body of one byte more than `max_body` is a 413, whether its length is declared or not."""

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, size, 100):
            yield b"x" * min(100, size - start)

    async with running(max_body=1000) as api:
        response = await api.http.post("/tasks", content=chunks() if chunked else b"x" * size)
        problem = problem_of(response, 400 if size == 1000 else 413)
        if size == 1001:
            assert problem["detail"] == "The body is larger than 1000 bytes."


@parametrize(
    ("path", "pointer", "detail"),
    [
        ("/tasks?limit=0", "limit", "greater than or equal to 1"),
        ("/tasks?limit=" + "9" * 5000, "limit", "integer"),
        ("/tasks?limit=x", "limit", "integer"),
        ("/tasks?status=", "status", "'queued'"),
        ("/tasks?status=%ff", "status", "'queued'"),
        ("/tasks?state=failed", "state", EXTRA),
        ("/tasks?" + "k" * 5000, "k" * 200, EXTRA),
        ("/tasks/x", "task_id", "valid UUID"),
        ("/tasks/%00", "task_id", "valid UUID"),
        ("/tasks/" + "a" * 5000, "task_id", "valid UUID"),
        (f"/tasks/{NO_TASK}?wait=maybe", "wait", "boolean"),
        (f"/tasks/{NO_TASK}?wiat=true", "wiat", EXTRA),
    ],
    ids=lambda value: str(value)[:40],
)
@virtual_time
async def test_bad_queries_and_ids(path: str, pointer: str, detail: str) -> None:
    """A bad or unknown parameter gets a 400 that names it."""
    async with running() as api:
        response = await api.http.get(path)
        (error,) = problem_of(response, 400)["errors"]
        assert error["pointer"] == pointer
        assert detail in error["detail"]
        assert len(response.content) < 600


# === HTTP =========================================================================================


@parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/tasks/", 404),
        ("GET", "//", 404),
        ("PUT", "/tasks", 405),
        ("PATCH", f"/tasks/{NO_TASK}", 405),
    ],
)
@virtual_time
async def test_unknown_paths_and_methods(method: str, path: str, status: int) -> None:
    """They get a problem document, and never a redirect that contains the Host header."""
    async with running() as api:
        response = await api.http.request(method, "http://evil.test" + path)
        problem_of(response, status)
        assert "evil" not in str(response.headers)
        assert ("allow" in response.headers) == (status == 405)


@parametrize(("root_path", "prefix"), [("", ""), ("/api", "/api"), ("/a b/ü", "/a%20b/%C3%BC")])
@virtual_time
async def test_links_behind_a_proxy(root_path: str, prefix: str) -> None:
    """Behind `--root-path`, the location and the redirect contain the prefix, quoted for a URL."""
    async with running() as api, api.client(root_path=root_path) as client:
        response = await client.post("/tasks", json=SUM)
        assert response.headers["location"].startswith(f"{prefix}/tasks/")
        response = await client.get(f"http://test{root_path}/")
        assert response.headers["location"] == f"{prefix}/docs"


@parametrize("validation", [False, True])
@virtual_time
async def test_a_bug_is_a_500(validation: bool, monkeypatch: MonkeyPatch) -> None:
    """A bug, even a ValidationError of pydantic, is a 500 that shows nothing, and is raised."""

    def bug(*_: Any) -> None:
        if validation:
            main.SumParameters.model_validate({})
        raise RuntimeError("secret")

    async with running() as api:
        monkeypatch.setattr(api.manager, "get", bug)
        response = await api.http.get(f"/tasks/{NO_TASK}")
        assert problem_of(response, 500)["detail"] == "The server failed."
        assert response.headers["ratelimit"]
        assert "secret" not in response.text
        monkeypatch.setattr(api.manager, "health", bug)
        problem_of(await api.http.get("/health"), 500)
        monkeypatch.setattr(main, "to_json", bug)
        api.manager.submit("compute_sum", {})
        with suppress(RuntimeError):  # the list breaks after its start
            await api.http.get("/tasks")
        transport = ASGITransport(api.app)  # this one raises what uvicorn logs
        async with AsyncClient(transport=transport, base_url="http://test") as client:
            with pytest.raises((RuntimeError, ValidationError)):
                await client.get(f"/tasks/{NO_TASK}")


@virtual_time
async def test_a_route_of_the_user() -> None:
    """The HTTPException of a user's route keeps its status, text and headers."""
    app = create_app(Settings())

    @app.get("/tea")
    async def tea() -> None:
        raise HTTPException(499, "short and stout", {"X-Pot": "1"})

    @app.get("/coffee")
    async def coffee() -> None:
        raise HTTPException(400, "too hot") from ValueError()

    assert problem_of(await Api(app).http.get("/coffee"), 400)["detail"] == "too hot"
    response = await Api(app).http.get("/tea")
    assert problem_of(response, 499)["detail"] == "short and stout"
    assert response.headers["x-pot"] == "1"
    assert "/tea" in app.openapi()["paths"]


# === OpenAPI ======================================================================================

DOCUMENT = create_app(Settings()).openapi()
OPERATIONS: dict[tuple[str, str], tuple[str, list[str]]] = {
    ("/tasks", "post"): ("202", ["400", "413", "429", "503"]),
    ("/tasks", "get"): ("200", ["400", "429"]),
    ("/tasks/{task_id}", "get"): ("200", ["400", "404", "429"]),
    ("/tasks/{task_id}", "delete"): ("200", ["400", "404", "409", "429"]),
    ("/health", "get"): ("200", ["503"]),
}


def test_the_document_has_all_operations() -> None:
    """Five operations are documented, and the redirect is not."""
    found = [(path, method) for path, methods in DOCUMENT["paths"].items() for method in methods]
    assert sorted(found) == sorted(OPERATIONS)


@parametrize(("path", "method"), OPERATIONS)
def test_the_responses_of_an_operation(path: str, method: str) -> None:
    """Each response is described, errors are problem documents, and there is no 422."""
    success, errors = OPERATIONS[path, method]
    operation = DOCUMENT["paths"][path][method]
    assert operation["description"]
    assert sorted(operation["responses"]) == sorted([success, *errors, "default"])
    for status, response in operation["responses"].items():
        assert response["description"] != "Successful Response"
        if status == success:
            schema = response["content"]["application/json"]["schema"]
            assert "$ref" in schema or schema["items"]["$ref"] == "#/components/schemas/Task"
        else:
            schema = response["content"]["application/problem+json"]["schema"]
            assert schema["$ref"] == "#/components/schemas/Problem"
    assert "The queue is full" in operation["responses"].get("503", {}).get(
        "description", "The queue is full"
    )


def test_the_examples_of_the_document() -> None:
    """The examples of a submission are named by task type, and every schema that is used exists."""
    body = DOCUMENT["paths"]["/tasks"]["post"]["requestBody"]["content"]["application/json"]
    assert list(body["examples"]) == list(EXAMPLES)
    assert body["examples"]["compute_sum"] == {"value": SUM}
    text = json.dumps(DOCUMENT)
    for name in re.findall('"#/components/schemas/([^"]+)"', text):
        assert name in DOCUMENT["components"]["schemas"]
    assert "HTTPValidationError" not in text


@parametrize("task_type", EXAMPLES)
@virtual_time
async def test_every_example_is_accepted(task_type: str) -> None:
    """The examples in /docs are accepted as they are."""
    async with running(instantly) as api:
        response = await api.http.post("/tasks", json=EXAMPLES[task_type]["value"])
        assert response.status_code == 202


# === Settings =====================================================================================


def test_the_defaults() -> None:
    """Without variables, the settings are those of the contract."""
    assert main.read_settings().model_dump() == {
        "workers": 5,
        "queue_size": 100,
        "max_tasks": 10_000,
        "rate_limit": 10,
        "rate_window": 60,
        "long_poll": 10,
        "retention": 600,
        "cleanup_interval": 30,
        "task_timeout": 60,
        "priority_step": 30,
        "max_body": 65_536,
        "time_scale": 1,
    }


@parametrize("value", ["", "x", "nan", "inf", "-1", "1e10"])
@parametrize("name", Settings.model_fields)
def test_a_bad_setting(name: str, value: str, monkeypatch: MonkeyPatch) -> None:
    """A bad value stops the server with one line that names the variable and what is allowed."""
    variable = f"TASKS_{name.upper()}"
    monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit, match=rf"^{variable}: Input should be [^\n]+$"):
        create_app()


def test_too_many_workers() -> None:
    """A number of workers that no machine could run is refused."""
    assert Settings(workers=1000).workers == 1000
    with pytest.raises(ValidationError):
        Settings(workers=1001)


@parametrize(
    ("name", "least", "below"),
    [
        ("workers", "1", "0"),
        ("long_poll", "0", "-0.1"),
        ("time_scale", "0", "-1"),
        ("cleanup_interval", "0.1", "0.09"),
        ("rate_window", "1", "0.5"),
    ],
)
def test_the_least_value_of_a_setting(
    name: str, least: str, below: str, monkeypatch: MonkeyPatch
) -> None:
    """A setting accepts its least value and refuses less, and all bad settings are named."""
    variable = f"TASKS_{name.upper()}"
    monkeypatch.setenv(variable, least)
    assert getattr(main.read_settings(), name) == float(least)
    monkeypatch.setenv(variable, below)
    monkeypatch.setenv("TASKS_WORKER", "2")
    with pytest.raises(SystemExit, match=f"{variable}: .*\nTASKS_WORKER: Extra inputs"):
        create_app()


# === Start and shutdown ===========================================================================


@virtual_time
async def test_shutdown_with_tasks_and_polls() -> None:
    """Shutdown cancels all tasks, answers their polls, and takes no time."""
    async with running(forever) as api:
        ids = [api.manager.submit("compute_sum", {})["task_id"] for _ in range(20)]
        await ticks()
        polls = [asyncio.create_task(api.manager.wait(task_id)) for task_id in ids]
        await ticks()
    assert clock() == 0
    for task in await asyncio.gather(*polls):
        assert task["status"] == "cancelled"


@virtual_time
async def test_everything_is_cancelled_after_a_signal() -> None:
    """After a second Ctrl-C, asyncio cancels all its tasks, and the tasks are still cancelled."""
    async with running(forever, workers=2) as api:
        ids = [await api.submit() for _ in range(3)]
        await ticks()
        api.manager.stop_waiting()
        for asyncio_task in asyncio_tasks():
            asyncio_task.cancel()
        await ticks(20)
        for task_id in ids:
            assert (await api.get(task_id))["status"] == "cancelled"


@virtual_time
async def test_shutdown_right_after_the_start() -> None:
    """If the app is stopped before its workers have run, no task is left queued."""
    api = Api(create_app(Settings()))
    async with api.manager.working():
        task = api.manager.submit("compute_sum", {})
    assert task["status"] == "cancelled"
    assert not asyncio_tasks()


@virtual_time
async def test_polls_end_when_the_server_shuts_down() -> None:
    """`stop_waiting` answers all polls without a change, and later polls don't wait."""
    async with running(forever, workers=1) as api:
        task_id = await api.submit()
        await ticks()
        poll = asyncio.create_task(api.get(task_id, wait=True))
        await asyncio.sleep(1)
        api.manager.stop_waiting()
        assert (await poll)["status"] == "processing"
        assert (await api.get(task_id, wait=True))["status"] == "processing"
        assert clock() == 1
        problem_of(await api.post(), 503)


@virtual_time
async def test_shutdown_waits_for_clean_up_but_not_forever(caplog: LogCaptureFixture) -> None:
    """Shutdown waits for the clean-up of cancelled work, for at most 5 s."""
    cleaned = []

    async def work(_: str, parameters: Json, __: Report) -> None:
        try:
            await asyncio.sleep(100)
        finally:
            await asyncio.sleep(parameters["seconds"])
            cleaned.append(parameters["seconds"])

    api = Api(create_app(Settings(), work))
    async with api.app.router.lifespan_context(api.app):
        for seconds in (2, 50):
            api.manager.submit("compute_sum", {"seconds": seconds})
        await asyncio.sleep(1)
    assert clock() == pytest.approx(6)
    assert cleaned == [2]
    await asyncio.sleep(50)
    assert cleaned == [2, 50]


def test_start_again_in_another_loop() -> None:
    """An app can be started again in another event loop."""
    api = Api(create_app(Settings()))

    async def once() -> None:
        async with api.app.router.lifespan_context(api.app):
            await ticks()
            assert (await api.final(await api.submit()))["status"] == "completed"

    run(once())
    run(once())


def test_in_another_thread() -> None:
    """Outside of the main thread, where no signal handler can be set, an app works all the same."""
    statuses = []

    async def once() -> None:
        async with running(instantly) as api:
            statuses.append((await api.final(await api.submit()))["status"])

    thread = threading.Thread(target=lambda: asyncio.run(once()), daemon=True)
    thread.start()
    thread.join(60)
    assert statuses == ["completed"]


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


@parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@virtual_time
async def test_a_signal_ends_the_polls(signum: int, received: list[int]) -> None:
    """A signal answers the open polls, reaches the former handler, which is restored at the end."""
    former = signal.getsignal(signum)
    async with running(forever, workers=1) as api:
        task_id = await api.submit()
        await ticks()
        poll = asyncio.create_task(api.get(task_id, wait=True))
        await ticks()
        signal.raise_signal(signum)
        assert (await poll)["status"] == "processing"
        assert clock() == 0
        assert received == [signum]
    assert signal.getsignal(signum) is former


def test_a_signal_after_one_of_two_apps_has_ended(received: list[int]) -> None:
    """Two apps, started a, b and stopped a, b: a signal reaches b, then the former handler."""

    async def overlap() -> None:
        first, second = create_app(Settings()), create_app(Settings())
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
    signal.raise_signal(signal.SIGINT)
    assert received == [signal.SIGTERM, signal.SIGINT]


@virtual_time
async def test_no_handler_is_added_if_there_is_none() -> None:
    """Without a server that handles signals, a signal still ends the process."""
    former = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        async with running():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, former)


# === Any order of the event loop ==================================================================
#
# asyncio runs callbacks in the order in which they became ready, and a program can be correct by
# chance in that order only. These tests shuffle the order, and print the seed that failed.
# `SCHEDULES=500 pytest` tries 500 orders.

SCHEDULES = int(os.environ.get("SCHEDULES", "24"))


def in_any_order(scenario: Callable[[Random], Coroutine[Any, Any, None]]) -> None:
    """Run a scenario in many orders. Its generator is for its own choices."""
    for seed in range(SCHEDULES):
        try:
            run(scenario(Random(seed)), seed)
        except BaseException as exc:
            raise AssertionError(f"failed with seed {seed}") from exc


def test_the_race_in_any_order() -> None:
    """Whenever a task is cancelled, it has one end, and every client sees the same one."""

    async def scenario(random: Random) -> None:
        work = random.choice([complete, fail, resist])
        await race(work, random.randrange(16))

    in_any_order(scenario)


async def random_work(_: str, parameters: Json, report: Report) -> str:
    """Work that takes some time, and ends in one of several ways."""
    seconds = parameters["numbers"][0]
    for percent in (20, 60, 90):
        report(percent)
        await asyncio.sleep(seconds / 3)
    if seconds == 3:
        raise TaskFailedError("3")
    return "done"


async def walk(random: Random) -> None:
    """Do things at random, and compare each task with how it was before."""
    settings = Settings(workers=3, queue_size=6, retention=20, long_poll=4)
    api = Api(create_app(settings, random_work))
    seen: dict[str, Task] = {}
    polls = []

    async def poll(task: Task) -> None:
        before, start = task["status"], clock()
        after = await api.manager.wait(task["task_id"])
        if after["status"] != before:
            # A missed change would be reported late.
            moments = [second(text) for text in (after["started_at"], after["finished_at"]) if text]
            assert clock() == start or any(abs(clock() - moment) < 0.001 for moment in moments)

    def check() -> None:
        present = {task["task_id"]: task for task in api.manager.iterate()}
        for task_id, old in list(seen.items()):
            if task_id not in present:
                assert second(seen.pop(task_id)["expires_at"] or "") <= clock() + 0.001
                continue
            new = present[task_id]
            assert old["status"] not in FINAL or new == old
            assert new["status"] != "queued" or old["status"] == "queued"
            assert new["progress"] >= old["progress"]
            assert (new["progress"] == 100) == (new["status"] == "completed")
            seen[task_id] = new.copy()
        assert list(seen) == list(present)

    async with api.app.router.lifespan_context(api.app):
        for _ in range(60):
            for _ in range(random.randrange(5)):
                action = random.random()
                task = random.choice(list(seen.values())) if seen else None
                if action < 0.5:
                    waiting = api.manager.health()["queue"]["size"]
                    try:
                        priority = random.choice(list(main.PRIORITY_LEVELS))
                        parameters = {"numbers": [random.choice([0, 1, 3, 7])]}
                        new = api.manager.submit("compute_sum", parameters, priority)
                        seen[new["task_id"]] = new.copy()
                    except main.UnavailableError:
                        assert waiting == 6
                elif task and action < 0.7:
                    with suppress(main.ManagerError):
                        assert api.manager.cancel(task["task_id"])["status"] == "cancelled"
                elif task:
                    with suppress(main.TaskNotFoundError):
                        polls.append(asyncio.create_task(poll(api.manager.get(task["task_id"]))))
            await real_sleep(random.choice([0, 0, 0.5, 1, 3]))
            check()
            api.check()
    check()
    assert all(task["status"] in FINAL for task in seen.values())
    await asyncio.gather(*polls)
    await ticks()
    assert not asyncio_tasks()


def test_a_random_walk_in_any_order(caplog: LogCaptureFixture) -> None:
    """No task is lost, ends twice or goes back, and no poll misses a change."""
    caplog.set_level(logging.ERROR)
    in_any_order(walk)


def test_a_storm_in_any_order(caplog: LogCaptureFixture) -> None:
    """Many clients submit, poll and cancel at the same time, and every task has one end."""
    caplog.set_level(logging.ERROR)

    async def scenario(random: Random) -> None:
        async with running(random_work, workers=2) as api:

            async def client() -> None:
                numbers = [random.choice([0, 1, 3])]
                task_id = await api.submit(parameters={"numbers": numbers})
                if random.random() < 0.5:
                    await real_sleep(random.choice([0, 1, 2]))
                    response = await api.cancel(task_id)
                    task = response.json()
                    assert (await api.final(task_id)) == task.get("task", task)
                else:
                    task = await api.final(task_id)
                    assert task["status"] == ("failed" if numbers == [3] else "completed")

            await asyncio.gather(*[client() for _ in range(20)])
            api.check()

    in_any_order(scenario)


# === Real threads, programs and servers ===========================================================


@real_time
async def test_work_in_a_thread() -> None:
    """Work that blocks a thread blocks nothing else, and can report from there."""

    async def work(_: str, __: Json, report: Report) -> str:
        loop = asyncio.get_running_loop()

        def block() -> str:
            loop.call_soon_threadsafe(report, 50)
            time.sleep(0.01)
            return "done"

        return await asyncio.to_thread(block)

    async with running(work) as api:
        task = await api.final(await api.submit())
        assert (task["status"], task["result"]) == ("completed", "done")


@real_time
async def test_work_in_a_program() -> None:
    """A program dies with its task."""
    processes = []

    async def work(*_: Any) -> None:
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", "input()", stdin=-1)
        processes.append(process)
        try:
            await process.wait()
        finally:
            process.kill()
            await process.wait()

    async with running(work) as api:
        task_id = await api.submit()
        while not processes:
            await real_sleep(0.01)
        await api.cancel(task_id)
        assert await processes[0].wait() != 0


class Server:
    """A uvicorn in a process of its own, started as in the README, under `python -X dev`."""

    def __init__(self, *options: str, **settings: Any) -> None:
        ours = {f"TASKS_{name.upper()}": str(value) for name, value in settings.items()}
        command = [sys.executable, "-X", "dev", "-m", "uvicorn", "main:app", "--port", "0"]
        self.process = subprocess.Popen(
            [*command, "--no-access-log", *options],
            cwd=Path(main.__file__).parent,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONOPTIMIZE": "", **ours},
            stderr=subprocess.PIPE,
            text=True,
        )
        self.http = httpx.Client(timeout=60, trust_env=False)
        self.port = 0
        self.log = ""
        self.started = threading.Event()
        self.reader = threading.Thread(target=self.read_log, daemon=True)
        self.reader.start()

    def __enter__(self) -> Self:
        """Wait until the server is listening or has ended."""
        self.started.wait(60)
        self.http.base_url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *_: object) -> None:
        """End the process, whatever has happened."""
        self.http.close()
        self.process.kill()
        self.process.wait()
        self.reader.join(10)
        if self.process.stderr:
            self.process.stderr.close()

    def read_log(self) -> None:
        """Read the log until the process ends, so that its pipe is never full."""
        assert self.process.stderr
        for line in self.process.stderr:
            self.log += line
            found = re.search(r"running on http://127.0.0.1:(\d+)", line)
            if found:
                self.port = int(found[1])
                self.started.set()
        self.started.set()

    def submit(self, body: Json) -> str:
        """Submit a task and return its path."""
        response = self.http.post("/tasks", json=body)
        assert response.status_code == 202
        return response.headers["location"]

    def connect(self, *lines: str, body: bytes = b"") -> socket.socket:
        """Open a connection and send a request; the caller closes the connection."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        head = "\r\n".join([*lines, "Host: x", "Content-Type: application/json", "", ""])
        connection.sendall(head.encode() + body)
        return connection

    def stop(self, signum: int = signal.SIGTERM) -> int:
        """End the process with a signal, and return its exit code."""
        self.process.send_signal(signum)
        code = self.process.wait(30)
        self.reader.join(10)
        return code


UGLY = re.compile("Traceback|never|destroyed|Warning|ERROR|CRITICAL")
LONG_CHUNK = b"10001\r\n" + b"x" * 0x10001 + b"\r\n"
needs_signals = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")


def read_all(connection: socket.socket) -> bytes:
    """Read until the server closes the connection."""
    with connection:
        return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server for the tests that only talk to it."""
    with Server(rate_limit=100_000, queue_size=1000, long_poll=0.2) as server:
        yield server
        server.stop()
        assert not UGLY.search(server.log), server.log


def test_the_list_arrives_in_parts(server: Server) -> None:
    """The list is sent in several chunks, which are one JSON array together."""
    paths = [server.submit(SLOW) for _ in range(300)]
    answer = read_all(server.connect("GET /tasks HTTP/1.1", "Connection: close"))
    head, _, body = answer.partition(b"\r\n\r\n")
    parts = []
    while body:
        size, _, rest = body.partition(b"\r\n")
        parts.append(rest[: int(size, 16)])
        body = rest[int(size, 16) + 2 :]
    assert b"transfer-encoding: chunked" in head.lower()
    assert len(parts) >= 4
    found = {f"/tasks/{task['task_id']}" for task in json.loads(b"".join(parts))}
    assert found >= set(paths)
    for path in paths:
        assert server.http.delete(path).status_code == 200


def test_a_body_does_not_break_a_list(server: Server) -> None:
    """A body that is too large is ignored if the request is a GET."""
    lines = ("GET /tasks HTTP/1.1", "Transfer-Encoding: chunked", "Connection: close")
    answer = read_all(server.connect(*lines, body=LONG_CHUNK + b"0\r\n\r\n"))
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b"\r\n0\r\n\r\n")


def test_clients_that_disconnect(server: Server) -> None:
    """A client that disconnects during a long poll, a list or its own body breaks nothing."""
    path = server.submit(SLOW)
    server.connect(f"GET {path}?wait=true HTTP/1.1").close()
    server.connect("GET /tasks HTTP/1.1").close()
    server.connect("POST /tasks HTTP/1.1", "Content-Length: 100").close()
    assert server.http.get(f"{path}?wait=true").status_code == 200
    assert server.http.delete(path).json()["status"] == "cancelled"


def test_bodies_that_are_too_large(server: Server) -> None:
    """A 413 is sent while the body is read, whether its length is declared or not."""
    declared = ("POST /tasks HTTP/1.1", "Content-Length: 65537", "Connection: close")
    assert read_all(server.connect(*declared, body=b"x" * 65537)).startswith(b"HTTP/1.1 413 ")
    chunked = ("POST /tasks HTTP/1.1", "Transfer-Encoding: chunked", "Connection: close")
    assert read_all(server.connect(*chunked, body=LONG_CHUNK)).startswith(b"HTTP/1.1 413 ")


@needs_signals
@parametrize(("signum", "code"), [(signal.SIGTERM, -15), (signal.SIGINT, 0)])
def test_shutdown_of_a_server(signum: int, code: int) -> None:
    """A signal ends the server although polls are open, cancels all tasks, and the log is clean."""
    with Server(rate_limit=10_000, long_poll=3600) as server:
        paths = [server.submit(SLOW) for _ in range(20)]
        while server.http.get("/health").json()["workers"]["busy"] < 5:
            pass
        poll = f"GET {paths[0]}?wait=true HTTP/1.1"
        server.connect(poll).close()
        connection = server.connect(poll)
        sent = 20
        received = 0
        while received < sent + 2:  # until both polls have been received
            sent += 1
            quota = server.http.get(paths[0]).headers["ratelimit"]
            received = 10_000 - int(quota.split(";")[1].removeprefix("r="))
        assert server.stop(signum) == code
        assert b'"status":"processing"' in read_all(connection)
        assert len(re.findall(r"INFO: +task \w{8} generate_report cancelled", server.log)) == 20
        assert not UGLY.search(server.log), server.log


def test_a_server_without_lifespan() -> None:
    """With `--lifespan off`, no task is accepted."""
    with Server("--lifespan", "off") as server:
        assert server.http.post("/tasks", json=SUM).status_code == 503
        assert server.http.get("/health").status_code == 503


@parametrize(("name", "value"), [("workers", "many"), ("worker", "2")])
def test_a_server_with_a_bad_setting(name: str, value: str) -> None:
    """The server doesn't start, and its output names the variable."""
    with Server(**{name: value}) as server:
        assert server.process.wait(60) == 1
        server.reader.join(10)
        assert f"TASKS_{name.upper()}: " in server.log
        assert "Traceback" not in server.log
