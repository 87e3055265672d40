"""The proof that `main.py` keeps its contract and its rules R1 to R6.

The first test below shows the usual way to test code that sleeps, and how far it carries. Then come
the virtual clock that all other tests use, and the helpers. The sections after that follow the
rules: submission and results; polling (R1, R2); final is final (R3); the queue (R4); workers (R5);
what is stored (R6); clean-up; no workers, no promises; rate limit; bad input; HTTP; the OpenAPI
document; settings; start and stop; every order of the loop; a new type of task; a real server.
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
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from functools import partial
from http import HTTPStatus
from pathlib import Path
from random import Random
from typing import Any, TypeAlias
from uuid import UUID

import httpx
import pytest
from fastapi import FastAPI
from httpx import ASGITransport, AsyncClient, Response
from pydantic import BaseModel
from pytest import LogCaptureFixture, MonkeyPatch
from starlette.exceptions import HTTPException
from typing_extensions import Self

# What the shell exports shall change no result, and `import main` reads the settings.
OF_THE_SHELL = ("TASKS_", "UVICORN_", "WEB_CONCURRENCY", "FORWARDED_ALLOW_IPS", "FORCE_COLOR")
for exported in [name for name in os.environ if name.startswith(OF_THE_SHELL)]:
    del os.environ[exported]

import main
from main import (
    CHUNK_TASKS,
    FINAL,
    STATUSES,
    RateLimiter,
    ReportProgress,
    Settings,
    Status,
    Task,
    TaskFailedError,
    TaskManager,
    create_app,
    now,
    stream_tasks,
    timestamp,
)

pytestmark = pytest.mark.anyio
parametrize = pytest.mark.parametrize

real_sleep = asyncio.sleep  # `asyncio.sleep` is patched in every test; this one is the tests' own


# --- The simplest test, and why it is not enough --------------------------------------------------


async def test_five_seconds_without_the_seconds(monkeypatch: MonkeyPatch) -> None:
    """With `asyncio.sleep` patched to give a turn and not wait, a task of 5 s ends at once."""

    async def sleep_no_longer(_seconds: float) -> None:
        await real_sleep(0)  # it must give a turn, or `while True: await asyncio.sleep(30)` hangs

    monkeypatch.setattr(asyncio, "sleep", sleep_no_longer)
    app = create_app(Settings())
    transport = ASGITransport(app)
    async with (
        app.router.lifespan_context(app),  # httpx does not run it
        AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        body = {"task_type": "compute_sum", "parameters": {"numbers": [1, 2, 3]}}
        answer = await client.post("/tasks", json=body)
        path = answer.headers["location"]
        for _ in range(30):
            await real_sleep(0)
        answer = await client.get(path)
        assert answer.json()["result"] == 6


# It is not enough, because time does not pass in it. The minute of the rate limit, the 10 s of a
# long poll, the time-out of a task and its retention are no sleeps but deadlines on the loop's
# clock; and nobody can look at a task after 2 s and after 4.999 s. So the tests get a clock of
# their own: a loop that reads its time from an attribute, and whose selector, in place of waiting
# for the next timer, moves that attribute to the timer. A retention of ten minutes takes no time,
# and everything is exact: a test can look at the instant before, at, and after.


Ready: TypeAlias = list[tuple[selectors.SelectorKey, int]]
START = 1000.0  # where the virtual clock begins: some moment that is not 0


class JumpingSelector(selectors.SelectSelector):
    """In place of waiting for the next timer, it moves the loop's clock there."""

    loop: "VirtualLoop"
    turns = 0  # of the loop since the time has moved

    def select(self, timeout: float | None = None) -> Ready:
        """Return what is ready; if that is nothing, let virtual time pass, or real time for I/O."""
        self.loop.shuffle_ready()
        self.turns += 1
        if self.turns > 20_000:
            raise AssertionError("something goes round and round, and no time passes")
        events = super().select(0)
        if events or timeout == 0:
            return events
        self.turns = 0
        if self.loop.in_threads:
            # Virtual time stands still while a thread works; but a thread that waits for a test to
            # go on must not stop it for ever.
            events = super().select(5)
            if events:
                return events
        if timeout is None:
            events = super().select(1)  # perhaps it is a socket that all wait for
            if not events:
                raise AssertionError("everything waits for ever")
            return events
        self.loop.moment += timeout
        return events


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop with a clock of its own; with a seed, what is ready runs in a random order."""

    def __init__(self, seed: int | None = None) -> None:
        """Start the clock."""
        self.moment = START
        self.in_threads = 0
        self._generator = Random(seed) if seed is not None else None
        selector = JumpingSelector()
        selector.loop = self
        super().__init__(selector)
        # The real clock's would be 15.6 ms on Windows, and fire timers early.
        self._clock_resolution = 1e-9

    def time(self) -> float:
        """Return the virtual time, in seconds."""
        return self.moment

    def shuffle_ready(self) -> None:
        """Change the order of the callbacks that are ready in this turn."""
        if self._generator is not None:
            self._generator.shuffle(self._ready)  # type: ignore[attr-defined]  # of BaseEventLoop

    def run_in_executor(self, *arguments: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """Count the threads that are at work, since their time is real. (Ignore: fewer types.)"""
        future = super().run_in_executor(*arguments)
        self.in_threads += 1
        future.add_done_callback(self._thread_ended)
        return future

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """Wait for the threads to end, in real time."""
        self.in_threads += 1
        await super().shutdown_default_executor()
        self.in_threads -= 1

    def _thread_ended(self, _: asyncio.Future[Any]) -> None:
        self.in_threads -= 1


def run(
    coroutine: Coroutine[Any, Any, None],
    seed: int | None = None,
) -> None:
    """Run a coroutine in a virtual loop of its own."""
    loop = VirtualLoop(seed)
    try:
        loop.run_until_complete(coroutine)
    finally:
        loop.close()


class Sleeper:
    """Stands in for `asyncio.sleep`, and remembers what the program has slept."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    async def __call__(self, delay: float, result: Any = None) -> Any:
        self.slept.append(delay)
        return await real_sleep(delay, result)


BEGIN = datetime(2026, 1, 1, tzinfo=timezone.utc)
real_utc_now = main.utc_now


def virtual_utc_now() -> datetime:
    """Stand in for `main.utc_now`: the wall clock goes with the loop's."""
    return BEGIN + timedelta(seconds=now() - START)


def second(text: str) -> float:
    """Return how long after the start of the test a date of a record is."""
    date = datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%f%z")
    return (date - BEGIN).total_seconds()


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """Give anyio's plugin the virtual loop."""
    return "asyncio", {"loop_factory": VirtualLoop}


@pytest.fixture(autouse=True)
def sleeper(monkeypatch: MonkeyPatch) -> Sleeper:
    """Patch `asyncio.sleep` and the wall clock in every test."""
    sleeper = Sleeper()
    monkeypatch.setattr(asyncio, "sleep", sleeper)
    monkeypatch.setattr(main, "utc_now", virtual_utc_now)
    return sleeper


@pytest.fixture(autouse=True)
def expected_errors(caplog: LogCaptureFixture) -> Iterator[list[str]]:
    """Fail a test that logs an ERROR it does not expect, or expects one that does not come."""
    expected: list[str] = []
    caplog.set_level(logging.INFO)
    yield expected
    gc.collect(1)  # asyncio logs an exception that nobody has retrieved when its task is collected
    records = caplog.get_records("call") + caplog.get_records("teardown")
    errors = []
    for record in records:
        if record.levelno >= logging.ERROR:
            errors.append(record.getMessage())
    for error in errors:
        assert any(part in error for part in expected), error
    for part in expected:
        assert any(part in error for error in errors), part


# --- Helpers --------------------------------------------------------------------------------------

Json: TypeAlias = dict[str, Any]
Job: TypeAlias = Callable[[Json, ReportProgress], Awaitable[Any]]
Poll: TypeAlias = asyncio.Task[tuple[float, str]]

LIMIT_FIELDS = {"ratelimit", "ratelimit-policy"}
NOBODY = "00000000-0000-4000-8000-000000000000"
EXAMPLES: dict[str, Json] = {
    model.example["task_type"]: model.example for model in main.SUBMISSION_MODELS
}
SUM = EXAMPLES["compute_sum"]
SLOW: Json = {"parameters": {"title": "T", "sections": 6}}  # a generate_report of 30 s
KNOCK = "/nowhere"  # a path that nobody will exempt from the limit

# Three levels of priority, each a step from the next; the second is the default.
PRIORITIES: tuple[main.Priority, ...] = ("high", "normal", "low")
HIGH, NORMAL, LOW = PRIORITIES


class World:
    """An app that has been started, and a client of it."""

    def __init__(self, app: FastAPI, work: Job | None = None) -> None:
        """Take an app, and what is to be done as the work of every task."""
        self.app = app
        self.manager: TaskManager = app.state.manager
        self.limiter: RateLimiter = app.state.limiter
        self.http = self.client("10.0.0.1")
        if work is not None:
            self.use(work)

    def use(self, work: Job) -> None:
        """Let `work` be the work of every task."""

        async def execute(task_type: str, parameters: Json, report: ReportProgress) -> Any:
            return await work(parameters, report)

        self.manager._execute = execute  # type: ignore[method-assign]  # that is meant

    def client(self, host: str | None, **more: Any) -> AsyncClient:
        """Return a client with that address; None is a peer that has none, as on a unix socket."""
        transport = ASGITransport(self.app, raise_app_exceptions=False, **more)
        transport.client = (host, 1) if host is not None else None  # type: ignore[assignment]
        return AsyncClient(transport=transport, base_url="http://test")

    async def post(self, task_type: str = "compute_sum", **fields: Any) -> Response:
        """Submit the example of that type, with some fields changed."""
        submission = EXAMPLES[task_type] | fields
        return await self.http.post("/tasks", json=submission)

    async def send(self, body: bytes, **fields: str) -> Response:
        """Post a body as JSON, with further header fields."""
        headers = {"Content-Type": "application/json", **fields}
        return await self.http.post("/tasks", content=body, headers=headers)

    async def submit(self, task_type: str = "compute_sum", **fields: Any) -> str:
        """Submit a task and return its id."""
        answer = await self.post(task_type, **fields)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["task_id"])

    async def get(self, task_id: str, **query: Any) -> Json:
        answer = await self.http.get(f"/tasks/{task_id}", params=query)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def hold(self, task_id: str, **query: Any) -> tuple[float, str]:
        """Poll with `wait=true`; return how long that was held, and the status that it told."""
        return await held(self.get(task_id, wait=True, **query))

    async def status(self, task_id: str) -> str:
        return str((await self.get(task_id))["status"])

    async def final(self, task_id: str) -> Json:
        """Poll a task until it is final."""
        task = await self.get(task_id)
        for _ in range(100):
            if task["status"] in FINAL:
                return task
            task = await self.get(task_id, wait=True, since=task["status"])
        raise AssertionError("the task does not end")

    async def do(self, task_type: str = "compute_sum") -> Json:
        """Submit the example of that type, and return the task when it is final."""
        return await self.final(await self.submit(task_type))

    async def knock(self) -> Response:
        return await self.http.get(KNOCK)

    async def cancel(self, task_id: str) -> Response:
        return await self.http.delete(f"/tasks/{task_id}")

    async def tasks(self, **query: Any) -> list[Json]:
        answer = await self.http.get("/tasks", params=query)
        assert answer.status_code == 200, answer.text
        return list(answer.json())

    async def chunks(self, status: Status | None = None) -> list[bytes]:
        """Return the parts in which a list is sent."""
        stream = stream_tasks(self.manager, status, None)
        return [chunk async for chunk in stream]

    async def health(self) -> Json:
        return dict((await self.http.get("/health")).json())

    def enqueue(self, count: int = 1) -> list[Task]:
        """Submit sums past HTTP, and return their records."""
        tasks = []
        for _ in range(count):
            tasks.append(self.manager.submit("compute_sum", SUM["parameters"]))
        return tasks

    def poll(self, task: Task, since: Status | None = None) -> Poll:
        """Start a long poll; await it for how long it was held, and the status."""
        answer = self.manager.wait(task["task_id"], since)
        return asyncio.create_task(held(answer))

    def check_books(self) -> None:
        """Assert that the manager's collections agree with its records, whatever has happened."""
        manager = self.manager
        ids: dict[str, set[str]] = defaultdict(set)
        for task_id, task in manager._tasks.items():
            ids[task["status"]].add(task_id)
        queued = {task_id for _, _, task_id in manager._queue._queue}
        finished = {task_id for _, task_id in manager._finished}
        assert queued == ids["queued"]
        assert finished == ids["completed"] | ids["failed"] | ids["cancelled"]
        assert len(finished) == len(manager._finished)
        assert ids["processing"] <= set(manager._running)
        assert len(ids["processing"]) <= manager._busy <= manager._settings.workers
        assert set(manager._changed) <= ids["queued"] | ids["processing"]
        for status in STATUSES:
            assert manager._counts[status] == len(ids[status])


@asynccontextmanager
async def world(work: Job | None = None, **settings: Any) -> AsyncIterator[World]:
    """Start an app, by default with a limit that no test reaches, and stop it; leave nothing."""
    settings.setdefault("rate_limit", 1_000_000)
    here = World(create_app(Settings(**settings)), work)
    before = strays()
    async with here.app.router.lifespan_context(here.app), here.http:
        await ticks()  # the workers have started, and wait
        yield here
        here.check_books()
    here.check_books()
    assert set(statuses(here.manager._tasks.values())) <= FINAL
    await ticks()
    assert strays() == before


def strays() -> set[asyncio.Task[Any]]:
    """Return the asyncio tasks that there are, but for those of the test runner and the test."""
    others = set()
    for task in asyncio.all_tasks():
        if "TestRunner" not in repr(task):
            others.add(task)
    return others - {asyncio.current_task()}


@pytest.fixture
async def here() -> AsyncIterator[World]:
    """A world with the program's own settings, but for the limit."""
    async with world() as here:
        yield here


@pytest.fixture
async def single() -> AsyncIterator[World]:
    """A world with one worker, so that one task runs and the others wait."""
    async with world(workers=1) as here:
        yield here


async def ticks(count: int = 5) -> None:
    """Let everything that is ready run, without letting time pass."""
    for _ in range(count):
        await real_sleep(0)


async def clock(job: Awaitable[Any]) -> tuple[float, Any]:
    """Await `job` and return how long that took, in virtual seconds, and its result."""
    start = now()
    result = await job
    return now() - start, result


async def held(poll: Awaitable[Any]) -> tuple[float, str]:
    """Await a poll and return how long it was held, and the status that it told."""
    took, task = await clock(poll)
    return took, task["status"]


def statuses(tasks: Iterable[Any]) -> list[str]:
    """Return the statuses of tasks."""
    return [task["status"] for task in tasks]


def starts(tasks: Iterable[Any]) -> list[float]:
    """Return at which second each task has started."""
    return [second(task["started_at"]) for task in tasks]


def problem_of(answer: Response) -> Json:
    """Return an error's body, and assert that it is a problem document of the answer's status."""
    body = dict(answer.json())
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["cache-control"] == "no-store"
    assert body["type"] == "about:blank"
    assert body["status"] == answer.status_code
    assert body["title"] == HTTPStatus(answer.status_code).phrase
    return body


def detail_of(answer: Response, status: int) -> str:
    """Return the detail of an error that has that status."""
    assert answer.status_code == status, answer.text
    return str(problem_of(answer)["detail"])


def pointers_of(answer: Response) -> list[str]:
    """Return where a 400 says that something is wrong."""
    assert answer.status_code == 400, answer.text
    return [item["pointer"] for item in problem_of(answer)["errors"]]


# --- Submission and results: what a task is, and what its work gives ------------------------------


async def test_submission_is_accepted_with_its_place(here: World) -> None:
    """A submission answers 202 with id, status and Location, and nothing else."""
    answer = await here.post()
    task_id = answer.json()["task_id"]
    assert answer.status_code == 202
    assert answer.json() == {"task_id": task_id, "status": "queued"}
    assert answer.headers["location"] == f"/tasks/{task_id}"
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    assert UUID(task_id).version == 4
    assert str(UUID(task_id)) == task_id


@parametrize("task_type", EXAMPLES)
async def test_every_example_does_what_it_says(here: World, task_type: str) -> None:
    """Each type's own example is accepted, has its work done, and ends as work ends."""
    task = await here.do(task_type)
    assert task["task_type"] == task_type
    if task["status"] == "failed":
        assert task["error"]["code"] == "task_failed"
    else:
        assert task["status"] == "completed"


async def test_work_takes_its_time_and_gives_its_result(here: World, sleeper: Sleeper) -> None:
    """A report takes five seconds a section, neither less nor more, slept in ten steps."""
    task_id = await here.submit("generate_report")
    await real_sleep(9.999)
    assert await here.status(task_id) == "processing"
    await real_sleep(0.001)
    await ticks()
    task = await here.get(task_id)
    assert task["status"] == "completed"
    assert task["progress"] == 100
    assert task["result"] == "Figures\nSections: 2"
    assert sleeper.slept.count(1) == 10


EXACT = 2**53 + 1  # the first integer that no float is
HUGE = 10**300


@parametrize(
    ("numbers", "result"),
    [
        ([1, 2, 3], 6),
        ([HUGE, 1], HUGE + 1),
        ([0.5, EXACT, 1 - EXACT], 1.5),
        ([0.25, HUGE, -HUGE], 0.25),
        ([0.1] * 10, 1.0),
        ([1e300] * 1000, math.fsum([1e300] * 1000)),
    ],
)
def test_sums_are_exact(numbers: list[float], result: float) -> None:
    """Integers add up exactly; with floats the sum is right to the last digit, in every order."""
    for order in (numbers, numbers[::-1], sorted(numbers)):
        found = main.exact_sum(order)
        assert found == result
        assert type(found) is type(result)


async def test_a_failure_is_the_clients_to_read(here: World) -> None:
    """A failed task says the message of its work, here the default one."""
    task = await here.do("simulate_failure")
    assert task["error"] == {"code": "task_failed", "message": "simulated failure"}
    assert task["status"] == "failed"
    assert task["result"] is None
    assert task["progress"] == 90


async def test_a_task_has_one_shape_in_every_state() -> None:
    """All twelve fields are there from queued to final, and null where there is nothing yet."""
    async with world(workers=1, retention=600) as here:
        await here.submit()
        await real_sleep(1)
        task_id = await here.submit("generate_report", parameters={"title": "T"})
        queued = await here.get(task_id)
        await real_sleep(5)
        processing = await here.get(task_id)
        completed = await here.final(task_id)
    for task in (queued, processing, completed):
        assert list(task) == list(Task.__annotations__)
        assert task["parameters"] == {"title": "T", "sections": 3}
        assert second(task["created_at"]) == 1
    for task in (queued, processing):
        for name in ("result", "error", "finished_at", "expires_at"):
            assert task[name] is None
    assert queued["started_at"] is None
    assert starts([processing, completed]) == [5, 5]
    assert second(completed["finished_at"]) == 20
    assert second(completed["expires_at"]) == 620


def test_a_date_has_six_digits_also_of_zeros() -> None:
    """One date in a million has no microseconds, and is written like the others."""
    assert timestamp(BEGIN) == "2026-01-01T00:00:00.000000Z"
    difference = real_utc_now() - datetime.now(timezone.utc)
    assert abs(difference) < timedelta(seconds=5)


async def test_a_step_of_the_wall_clock_expires_nothing(monkeypatch: MonkeyPatch) -> None:
    """Deadlines are the loop's: a wall clock that is set changes the next dates, and only those."""
    async with world(retention=600) as here:
        task_id = await here.submit()
        await ticks()
        monkeypatch.setattr(main, "utc_now", lambda: BEGIN + timedelta(days=400))
        task = await here.final(task_id)
        assert second(task["created_at"]) == 0
        assert second(task["finished_at"]) == 400 * 24 * 3600
        await real_sleep(599.5)
        assert await here.get(task_id) == task


async def test_reported_progress_never_falls_nor_lies(here: World) -> None:
    """What work reports is an integer below 100 at last, and a lower report is ignored."""
    seen = []

    async def job(_: Json, report: ReportProgress) -> None:
        for percent in (-5, 40.7, 20, 250, math.inf):
            report(percent)
            seen.append(task["progress"])

    here.use(job)
    (task,) = here.enqueue()
    await ticks()
    assert seen == [0, 40, 40, 99, 99]


async def test_the_list_filters_and_limits_in_order_of_submission(single: World) -> None:
    """The list is in order of submission, by status and up to a limit."""
    answer = await single.http.get("/tasks")
    assert answer.text == "[]\n"
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    ids = [await single.submit() for _ in range(4)]
    await real_sleep(5.001)
    await single.cancel(ids[2])
    tasks = await single.tasks()
    assert [task["task_id"] for task in tasks] == ids
    assert statuses(tasks) == ["completed", "processing", "cancelled", "queued"]
    for task in tasks:
        assert await single.tasks(status=task["status"]) == [task]
        assert await single.get(task["task_id"]) == task
    assert await single.tasks(status="failed") == []
    assert await single.tasks(limit=2) == tasks[:2]
    queued = await single.tasks(status="queued", limit=10**30)
    assert queued == tasks[3:]


@parametrize(
    "count",
    [0, 1, 2, CHUNK_TASKS, 1000],
)
async def test_the_stream_is_json_of_every_length(count: int) -> None:
    """A list is valid JSON at every length, one task a line, in chunks of bounded size."""
    async with world(queue_size=10**4, workers=1) as here:
        tasks = here.enqueue(count)
        await ticks()
        chunks = await here.chunks()
        body = b"".join(chunks)
        assert json.loads(body) == tasks
        lines = count + 2 if count else 1
        assert len(body.splitlines()) == lines
        assert all(b"task_id" in chunk for chunk in chunks[:-1])
        assert all(chunk.count(b"task_id") <= CHUNK_TASKS for chunk in chunks)
        for limit in {1, count // 2, count} - {0}:
            assert await here.tasks(limit=limit) == tasks[:limit]


async def test_large_tasks_are_sent_one_by_one(here: World) -> None:
    """Others get a turn after 64 KiB, whether these are many tasks or one."""
    for _ in range(3):
        here.manager.submit("compute_sum", {"numbers": [0.123456] * 9000})
    chunks = await here.chunks()
    counts = [chunk.count(b"task_id") for chunk in chunks]
    assert counts == [1, 1, 1, 0]


@parametrize("status", ["queued", "failed"])
async def test_the_stream_gives_others_a_turn(status: Status) -> None:
    """Between two parts of a list others run, also while nothing matches the filter."""
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await real_sleep(0)

    async with world(queue_size=10**4) as here:
        here.enqueue(1000)
        beside = asyncio.create_task(other())
        await ticks(1)
        turns = 0
        chunks = await here.chunks(status)
        beside.cancel()
        assert turns >= 1000 // CHUNK_TASKS
        assert all(chunks)  # an empty chunk would end a chunked answer


async def test_a_line_is_true_when_it_is_written() -> None:
    """A slow reader sees no task under a status that it has left, nor one that has expired."""
    async with world(queue_size=10**4, retention=10) as here:
        tasks = here.enqueue(1000)[5:]
        await ticks()
        stream = stream_tasks(here.manager, "queued", None)
        body = await anext(stream)
        here.manager.cancel(tasks[-1]["task_id"])
        async for chunk in stream:
            body += chunk
        assert json.loads(body) == tasks[:-1]


async def test_a_slow_reader_keeps_no_records() -> None:
    """What expires while a list is read is neither sent nor kept: a list holds on to ids only."""
    async with world(queue_size=10**4, retention=10) as here:
        for task in here.enqueue(1000):
            here.manager.cancel(task["task_id"])
        stream = stream_tasks(here.manager, None, None)
        body = await anext(stream)
        await real_sleep(10)
        async for chunk in stream:
            body += chunk
        assert 0 < len(json.loads(body)) <= CHUNK_TASKS
        assert not here.manager._tasks


async def test_health_counts_everything() -> None:
    """/health counts by status, places in the queue and workers; it needs no quota, nor a cache."""
    async with world(workers=2, queue_size=7, rate_limit=5) as here:
        ids = [await here.submit() for _ in range(4)]
        await here.cancel(ids[3])
        await ticks()
        answer = await here.http.get("/health")
        health = answer.json()
        assert answer.status_code == 200
        assert answer.headers["cache-control"] == "no-store"
        assert not LIMIT_FIELDS & set(answer.headers)
        assert health["status"] == "ok"
        assert health["tasks"]["queued"] == 1
        assert health["tasks"]["processing"] == 2
        assert health["tasks"]["cancelled"] == 1
        assert health["queue"] == {"size": 1, "capacity": 7}
        assert health["workers"] == {"busy": 2, "total": 2}


async def test_health_looks_at_no_task(here: World, monkeypatch: MonkeyPatch) -> None:
    """The cost of /health does not grow with the tasks: counts are kept and not counted."""
    here.enqueue(3)
    with monkeypatch.context() as patch:
        patch.setattr(here.manager, "_tasks", None)
        health = here.manager.health()
    assert health["tasks"]["queued"] == 3


async def test_the_life_of_a_task_is_logged(caplog: LogCaptureFixture) -> None:
    """Each step of a task's life is one line, in which a client cannot forge another."""
    async with world(work=Raises(TaskFailedError("a\nb")), retention=1) as here:
        (task,) = here.enqueue()
        await real_sleep(1)
        here.manager.expire()
    lines = [line for line in caplog.messages if line.startswith("task ")]
    name = f"task {task['task_id']}"
    steps = [line.split()[2] for line in lines]
    assert steps == ["queued:", "processing", "failed", "removed"]
    assert lines[0] == f"{name} queued: compute_sum, priority {NORMAL}"
    assert lines[2] == f"{name} failed {task['error']}"
    assert r"a\nb" in lines[2]


# --- Polling (R1, R2): no change is slept through -------------------------------------------------


async def test_a_long_poll_ends_with_the_change(single: World) -> None:
    """R2: a poll with `wait=true` is held until the status changes, at that very moment."""
    first = await single.submit()
    second = await single.submit()
    assert await single.hold(second) == (5, "processing")
    assert await single.hold(second) == (5, "completed")
    assert await single.hold(first) == (0, "completed")


@parametrize("long_poll", [0, 3, 10])
async def test_a_long_poll_has_its_bound(long_poll: float) -> None:
    """A poll of a task that does not change answers after `long_poll` seconds, with the task."""
    async with world(workers=1, long_poll=long_poll) as here:
        await here.submit("generate_report", **SLOW)
        task_id = await here.submit()
        assert await here.hold(task_id) == (long_poll, "queued")


@parametrize("since", STATUSES)
async def test_since_is_a_cursor(since: Status) -> None:
    """R2: with `since`, a poll waits only while the status is still that one and not final."""
    async with world(workers=1, long_poll=4) as here:
        await here.submit()
        task_id = await here.submit()
        steps = ((0, "queued"), (5.5, "processing"), (12, "completed"))
        for moment, status in steps:
            await real_sleep(1000 + moment - now())
            seconds = 4 if since == status and status not in FINAL else 0
            assert await here.hold(task_id, since=since) == (seconds, status)


async def test_a_poller_may_leave(single: World) -> None:
    """A cancelled poll is cancelled at once, leaves no waiter, and the others go on."""
    _, task = single.enqueue(2)
    leaving = single.poll(task)
    staying = single.poll(task)
    await ticks()
    leaving.cancel()
    await ticks()
    assert leaving.cancelled()
    assert not staying.done()
    assert len(single.manager._changed[task["task_id"]]._waiters) == 1
    assert await staying == (5, "processing")


async def test_a_poller_outlives_the_record() -> None:
    """A poll answers with the final task though that has expired before the poll could resume."""
    async with world(retention=1) as here:
        (task,) = here.enqueue()
        await ticks()
        poll = here.poll(task)
        await ticks()
        here.manager.cancel(task["task_id"])
        asyncio.get_running_loop().moment += 2  # type: ignore[attr-defined]  # a busy loop
        here.manager.expire()
        assert await poll == (2, "cancelled")


# --- Final is final (R3): one end, and the one that was told --------------------------------------

WAYS: dict[Status, list[Status]] = {
    "queued": [],
    "processing": ["processing"],
    "completed": ["processing", "completed"],
    "failed": ["processing", "failed"],
    "cancelled": ["cancelled"],
}
ALLOWED: set[tuple[Status, Status]] = {
    ("queued", "processing"),
    ("queued", "cancelled"),
    ("processing", "completed"),
    ("processing", "failed"),
    ("processing", "cancelled"),
}
SOME_ERROR: main.TaskError = {"code": "timeout", "message": "m"}


@parametrize("before", STATUSES)
@parametrize("after", STATUSES)
async def test_only_five_transitions_happen(here: World, before: Status, after: Status) -> None:
    """R3: of all ordered pairs of statuses only five are possible; the others change nothing."""
    (task,) = here.enqueue()
    change_status = here.manager._change_status
    for status in WAYS[before]:
        assert change_status(task, status, error=SOME_ERROR)
    copy = task.copy()
    changed = change_status(task, after, result=1, error=SOME_ERROR)
    assert changed == ((before, after) in ALLOWED)
    assert task["status"] == (after if changed else before)
    assert changed or task == copy
    assert (task["progress"] == 100) == (task["status"] == "completed")
    here.manager._queue.remove(task["task_id"])
    change_status(task, "cancelled")


async def test_the_cancel_table(single: World) -> None:
    """DELETE: 200 queued, 200 processing, 200 again, 409 completed or failed, 404 unknown."""
    completed = await single.submit()
    failed = await single.submit("simulate_failure")
    await single.final(failed)
    await single.final(completed)
    running = await single.submit()
    queued = await single.submit()
    await ticks()
    for task_id in (queued, running, queued):
        answer = await single.cancel(task_id)
        task = answer.json()
        assert answer.status_code == 200
        assert task == await single.get(task_id)
        assert task["status"] == "cancelled"
        assert task["error"] is None
        assert task["result"] is None
        assert (task["started_at"] is not None) == (task_id == running)
        assert task["expires_at"]
    for task_id, status in ((completed, "completed"), (failed, "failed")):
        answer = await single.cancel(task_id)
        assert detail_of(answer, 409) == f"The task has already {status}."
        assert answer.json()["task"] == await single.get(task_id)
    answer = await single.cancel(NOBODY)
    assert answer.status_code == 404


@parametrize("interruption", ["DELETE", "time-out", "stop"])
async def test_cancelled_work_cleans_up_undisturbed(interruption: str) -> None:
    """R3: work is cancelled once, whatever comes while it cleans up."""
    cleaned = []

    async def job(*_: Any) -> None:
        try:
            await asyncio.sleep(100)
        finally:
            await asyncio.sleep(2)
            cleaned.append(now() - START)

    async with world(work=job, task_timeout=10) as here:
        (task,) = here.enqueue()
        await real_sleep(9)
        said = here.manager.cancel(task["task_id"]).copy()
        await real_sleep(1)
        if interruption == "DELETE":
            assert here.manager.cancel(task["task_id"]) == said
        if interruption != "stop":
            await real_sleep(2)
    assert cleaned == [11]
    assert task == said


async def complete(*_: Any) -> str:
    for _turn in range(4):
        await asyncio.sleep(0)
    return "done"


async def fail(*_: Any) -> None:
    for _turn in range(4):
        await asyncio.sleep(0)
    raise TaskFailedError("failed")


async def swallow(*_: Any) -> str:
    for _turn in range(8):
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0)
    return "done"


async def race(job: Job, tick: int) -> None:
    """Cancel a task at one tick of its life, and compare all that is said of its end."""
    async with world(work=job, workers=1) as here:
        task, after = here.enqueue(2)
        poll = here.poll(task, "queued")
        await ticks(tick)
        answer = await here.cancel(task["task_id"])
        said = answer.json().get("task", answer.json())
        took, _ = await poll
        await real_sleep(1)
        assert took == 0
        assert await here.get(task["task_id"]) == said
        assert answer.status_code == (200 if said["status"] == "cancelled" else 409)
        assert said["result"] == ("done" if said["status"] == "completed" else None)
        assert after["status"] in ("completed", "failed")


@parametrize("tick", range(20))
@parametrize("job", [complete, fail, swallow])
async def test_the_race_of_cancel_and_finish(job: Job, tick: int) -> None:
    """R3: at whichever tick DELETE comes, there is one final state, and it is what DELETE said."""
    await race(job, tick)


async def test_cancelled_work_is_interrupted(single: World) -> None:
    """R3: DELETE also stops the work, so that its worker takes the next task at once."""
    task_id = await single.submit("generate_report", **SLOW)
    after = await single.submit()
    await real_sleep(3.25)
    work = single.manager._running[task_id]
    await single.cancel(task_id)
    await ticks()
    assert work.cancelled()  # the CancelledError was raised again
    assert await single.status(after) == "processing"
    assert (await single.get(task_id))["progress"] == 10


async def test_what_cancelled_work_says_is_ignored(here: World, expected_errors: list[str]) -> None:
    """R3: neither progress nor an exception of cancelled work is recorded."""

    async def job(_: Json, report: ReportProgress) -> None:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(9)
        report(50)
        raise ValueError("in the clean-up")

    expected_errors.append("ValueError: in the clean-up")
    here.use(job)
    (task,) = here.enqueue()
    await real_sleep(1)
    said = here.manager.cancel(task["task_id"]).copy()
    await real_sleep(1)
    assert task == said
    assert task["status"] == "cancelled"
    assert task["progress"] == 0


# --- The queue (R4): who comes next, and nobody twice ---------------------------------------------


async def test_a_full_queue_leaves_no_trace() -> None:
    """R4: beyond its capacity the queue answers 503 with Retry-After, and the task is nowhere."""
    async with world(workers=1, queue_size=2) as here:
        await here.submit()
        await ticks()
        first = await here.submit()
        await here.submit()
        answer = await here.post()
        assert detail_of(answer, 503) == "The queue is full."
        assert answer.headers["retry-after"] == "5"
        assert len(await here.tasks()) == 3
        await here.cancel(first)
        await here.submit()


async def test_the_store_is_bounded() -> None:
    """Beyond `max_tasks` records, whatever their state, a submission is a 503 until one expires."""
    async with world(workers=1, max_tasks=3, retention=20) as here:
        done, _, waiting = here.enqueue(3)
        answer = await here.post()
        assert detail_of(answer, 503) == "No more tasks can be kept."
        assert answer.headers["retry-after"] == "5"
        await real_sleep(7.5)
        assert done["status"] == "completed"
        answer = await here.post()
        assert answer.headers["retry-after"] == "18"  # 20 s after 5 s, rounded up
        here.manager.cancel(waiting["task_id"])
        await real_sleep(17.5)
        answer = await here.post()
        assert answer.status_code == 202


@parametrize("victim", range(6))
async def test_removal_keeps_the_order_of_the_rest(single: World, victim: int) -> None:
    """R4: whichever queued task is cancelled, the others start in the order that they had."""
    await single.submit()
    await ticks()
    ids = []
    for priority in (HIGH, HIGH, NORMAL, NORMAL, HIGH, HIGH):
        ids.append(await single.submit(priority=priority))
    due = (0, 1, 4, 5, 2, 3)
    order = [ids[number] for number in due]
    await single.cancel(ids[victim])
    order.remove(ids[victim])
    for task_id in order:
        await single.final(task_id)
    tasks = [await single.get(task_id) for task_id in order]
    assert starts(tasks) == [5, 10, 15, 20, 25]


async def test_a_task_is_queued_until_it_is_processing() -> None:
    """R1, R4: at no tick has a task left the queue and is not processing yet."""
    async with world(workers=2) as here:
        here.enqueue(3)
        for _ in range(10):
            here.check_books()
            await ticks(1)
        assert here.manager.health()["workers"]["busy"] == 2


async def test_five_at_once_and_never_six(here: World) -> None:
    """Five tasks run at a time, a sixth starts when the first ends, in order of submission."""
    tasks = here.enqueue(7)
    await real_sleep(30)
    assert starts(tasks) == [0, 0, 0, 0, 0, 5, 5]


async def test_priority_then_first_come_first_served(single: World) -> None:
    """The higher priority starts first, and within one the older task."""
    for priority in (LOW, NORMAL, HIGH, LOW, NORMAL, HIGH):
        await single.submit(priority=priority)
    await real_sleep(40)
    tasks = await single.tasks()
    assert starts(tasks) == [20, 10, 0, 25, 15, 5]


@parametrize(
    ("later", "low", "high"),
    [
        (59.5, 200, 100),
        (60, 100, 200),
        (60.5, 100, 200),
    ],
)
async def test_nothing_starves(later: float, low: float, high: float) -> None:
    """A level is worth `priority_step` seconds: low goes before a high two steps younger."""
    async with world(workers=1, task_timeout=1000, time_scale=20, priority_step=30) as here:
        await here.submit()
        await ticks()
        await here.submit(priority=LOW)
        await real_sleep(later)
        await here.submit(priority=HIGH)
        await real_sleep(320)
        assert starts(await here.tasks()) == [0, low, high]


# --- Workers (R5): they survive whatever work does, and its end is told truly ---------------------


class StrangeError(BaseException):
    """Neither an Exception nor a cancellation."""


class UnspeakableError(TaskFailedError):
    """An exception that cannot be turned into words."""

    def __str__(self) -> str:
        raise SystemExit("no words")


@dataclass
class Raises:
    """Work that raises an exception."""

    exception: BaseException

    async def __call__(self, *_: Any) -> None:
        raise self.exception


@dataclass
class Returns:
    """Work that returns a value."""

    value: Any

    async def __call__(self, *_: Any) -> Any:
        return self.value


async def await_something_cancelled(*_: Any) -> None:
    """Work of which a part is cancelled, by whomever."""
    part = asyncio.create_task(real_sleep(100))
    asyncio.get_running_loop().call_soon(part.cancel)
    await part


UNEXPECTED: dict[str, Job] = {
    "ValueError": Raises(ValueError("secret /etc/passwd")),
    "SystemExit": Raises(SystemExit(3)),
    "KeyboardInterrupt": Raises(KeyboardInterrupt()),
    "GeneratorExit": Raises(GeneratorExit()),
    "BaseException": Raises(StrangeError("secret")),
    "CancelledError": Raises(asyncio.CancelledError("secret")),
    "cancelled part": await_something_cancelled,
    "unspeakable": Raises(UnspeakableError()),
}
UNEXPECTED_ERROR = {
    "code": "internal_error",
    "message": "The task failed unexpectedly.",
}


@parametrize("name", UNEXPECTED)
async def test_a_crash_is_a_failure(
    single: World,
    name: str,
    expected_errors: list[str],
) -> None:
    """R5: work that crashes has failed, with a traceback in the log; its worker goes on."""
    single.use(UNEXPECTED[name])
    task_id = await single.submit()
    expected_errors.append(f"task {task_id}: unexpected end\n| Traceback")
    task = await single.final(task_id)
    assert task["status"] == "failed"
    assert task["error"] == UNEXPECTED_ERROR
    single.use(complete)
    after = await single.submit()
    assert (await single.final(after))["status"] == "completed"


async def test_a_traceback_cannot_forge_a_line_of_the_log(
    expected_errors: list[str], caplog: LogCaptureFixture
) -> None:
    """Each line of a traceback has a bar before it, also those of the exception's own text."""
    expected_errors.append("ValueError: x")
    async with world(work=Raises(ValueError("x\nINFO: forged\rINFO: forged"))) as here:
        await here.do()
    lines = [line for line in caplog.text.splitlines() if "forged" in line]
    assert len(lines) == 2
    assert all(line.startswith("| INFO") for line in lines)


def group(*exceptions: BaseException) -> BaseException:
    """Return what a task group raises; on Python 3.10 something of the same shape."""
    if sys.version_info >= (3, 11):
        return BaseExceptionGroup("unhandled errors", exceptions)  # noqa: F821 - not for 3.10
    found = StrangeError("unhandled errors")
    found.exceptions = exceptions  # type: ignore[attr-defined]  # that is the shape
    return found


FAILED = TaskFailedError("no disk")
FAILURES: dict[str, tuple[BaseException, str]] = {
    "plain": (FAILED, "task_failed"),
    "half a character": (TaskFailedError("no disk \udcff"), "task_failed"),
    "group": (group(FAILED), "task_failed"),
    "nested groups": (group(group(FAILED)), "task_failed"),
    "group of two": (group(FAILED, FAILED), "internal_error"),
    "group with a bug": (group(ValueError()), "internal_error"),
    "time-out within": (TimeoutError("of 10.1.2.3"), "internal_error"),
}


@parametrize("name", FAILURES)
async def test_a_failure_is_told_by_what_it_is(
    here: World, name: str, expected_errors: list[str]
) -> None:
    """A TaskFailedError is one also in a task group; the words of others stay in the log."""
    exception, code = FAILURES[name]
    if code == "internal_error":
        expected_errors.append("unexpected end")
    here.use(Raises(exception))
    task = await here.do()
    assert task["error"]["code"] == code
    assert ("no disk" in task["error"]["message"]) == (code == "task_failed")
    assert "10.1.2.3" not in task["error"]["message"]


async def test_work_that_is_cancelled_before_its_first_step(
    single: World, monkeypatch: MonkeyPatch, expected_errors: list[str]
) -> None:
    """R5: also where not a line of the work has run, the task has an end, and a true one."""
    create_task = asyncio.create_task

    def create_cancelled(coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = create_task(coroutine)
        task.cancel()
        return task

    expected_errors.append("cancelled before its first step")
    (task,) = single.enqueue()
    monkeypatch.setattr(asyncio, "create_task", create_cancelled)
    await ticks()
    monkeypatch.undo()
    assert task["status"] == "failed"
    assert task["error"] == UNEXPECTED_ERROR
    after = await single.submit()
    assert (await single.final(after))["status"] == "completed"


@pytest.mark.skipif(sys.version_info < (3, 12), reason="there is no eager task factory")
@parametrize(
    ("job", "status"),
    [(Returns(7), "completed"), (Raises(FAILED), "failed")],
)
async def test_work_without_an_await_under_eager_tasks(job: Job, status: str) -> None:
    """Work that has ended when `create_task` returns has its end recorded like any other."""
    eager_task_factory = getattr(asyncio, "eager_task_factory")  # noqa: B009 - not for mypy on 3.10
    asyncio.get_running_loop().set_task_factory(eager_task_factory)
    async with world(work=job, workers=2) as here:
        for task in here.enqueue(5):
            await here.final(task["task_id"])
            assert task["status"] == status
            assert task["started_at"]
            assert task["result"] == (7 if status == "completed" else None)
        await ticks()
        assert not here.manager._running


@parametrize(
    ("timeout", "status"),
    [
        (4.9, "failed"),
        (5.1, "completed"),
    ],
)
async def test_a_task_has_its_time_and_no_more(timeout: float, status: str) -> None:
    """R5: a task that runs longer than `task_timeout` fails then, and its worker goes on."""
    async with world(workers=1, task_timeout=timeout) as here:
        task, after = here.enqueue(2)
        await real_sleep(min(timeout, 5) + 0.01)
        assert statuses([task, after]) == [status, "processing"]
        if status == "failed":
            message = "The task took too long."
            assert task["error"] == {"code": "timeout", "message": message}
            assert task["progress"] == 90


async def test_an_unknown_type_fails(here: World, expected_errors: list[str]) -> None:
    """A type that the executor does not know does not complete."""
    expected_errors.append("NotImplementedError: there is no work for 'mistake'")
    task = here.manager.submit("mistake", {})
    await here.final(task["task_id"])
    assert task["error"] == UNEXPECTED_ERROR


@parametrize("end", ["failed", "cancelled"])
async def test_work_that_ignores_its_cancellation(end: str, caplog: LogCaptureFixture) -> None:
    """R5: it keeps its worker for its time-out and grace at most; its record is final at once."""

    async def job(*_: Any) -> str:
        until = now() + 100
        while now() < until:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(until - now())
        return "late"

    async with world(work=job, workers=1, task_timeout=10) as here:
        task, after = here.enqueue(2)
        await real_sleep(2)
        if end == "cancelled":
            here.manager.cancel(task["task_id"])
        await real_sleep(8 + main.CANCEL_GRACE - 0.01)
        assert statuses([task, after]) == [end, "queued"]
        await real_sleep(0.02)
        assert statuses([task, after]) == [end, "processing"]
        assert "does not end, and is abandoned" in caplog.text
        await real_sleep(200)
        assert task["result"] is None
        assert here.manager._busy == 0


@parametrize(
    ("exception", "stopping"),
    [
        (RuntimeError("a bug"), False),
        (RuntimeError("a bug"), True),
        (StrangeError(), False),
        (asyncio.CancelledError(), False),
    ],
)
async def test_a_dead_worker_turns_health_red(
    exception: BaseException,
    stopping: bool,
    monkeypatch: MonkeyPatch,
    expected_errors: list[str],
) -> None:
    """When a worker dies, the log says so, all stop, and no task is left hanging."""
    expected_errors.append("a worker died, so all stop")
    async with world(workers=2) as here:
        tasks = here.enqueue()
        await ticks()
        monkeypatch.setattr(here.manager, "_run_task", Raises(exception))
        tasks += here.enqueue(3)
        if stopping:
            here.manager.stop_waiting()
        await ticks(10)
        refused = [await here.http.get("/health"), await here.post()]
        for answer in refused:
            assert detail_of(answer, 503) == "No tasks are accepted now."
            assert "retry-after" not in answer.headers
        assert set(statuses(tasks)) == {"cancelled"}


# --- What is stored (R6): it can be sent, and nobody changes it behind our back -------------------


def nested(levels: int) -> list[Any]:
    """Return a list in a list in a list."""
    value: list[Any] = []
    for _ in range(levels - 1):
        value = [value]
    return value


ITSELF: list[Any] = []
ITSELF.append(ITSELF)
UNSENDABLE: dict[str, Any] = {
    "object": object(),
    "bytes": {"a": [b"abc"]},
    "surrogate": "\ud800",
    "surrogate key": {"\ud800": 1},
    "itself": ITSELF,
    "202 deep": nested(202),
    "5000 deep": nested(5000),
    "5000 digits": 10**5000,
}


@parametrize("name", UNSENDABLE)
async def test_a_result_that_cannot_be_sent_fails_its_task(
    here: World, name: str, expected_errors: list[str]
) -> None:
    """R6: the task has failed, and it, its cancellation and the list can be sent."""
    expected_errors.append("unexpected end")
    here.use(Returns(UNSENDABLE[name]))
    task_id = await here.submit()
    task = await here.final(task_id)
    assert task["error"] == UNEXPECTED_ERROR
    assert await here.tasks() == [task]
    assert problem_of(await here.cancel(task_id))["task"] == task


@parametrize("name", UNSENDABLE)
async def test_parameters_that_cannot_be_sent_are_refused(here: World, name: str) -> None:
    """R6: so a task type whose parameters are free-form cannot break a list either."""
    with pytest.raises(main.InvalidParametersError):
        here.manager.submit("compute_sum", {"free": UNSENDABLE[name]})
    assert await here.tasks() == []


async def test_refused_parameters_are_a_400(here: World, monkeypatch: MonkeyPatch) -> None:
    """R6: what the manager refuses to store is the client's fault, and points at the parameters."""
    monkeypatch.setattr(BaseModel, "model_dump", lambda _: {"free": math.nan})
    assert pointers_of(await here.post()) == ["#/parameters"]
    assert await here.tasks() == []


SENDABLE: dict[str, tuple[Any, Any]] = {
    "201 deep": (nested(201), nested(201)),
    "generator": (iter(range(3)), [0, 1, 2]),
    "set": ({1}, [1]),
    "date": (BEGIN, "2026-01-01T00:00:00Z"),
    "dataclass": (Returns(7), {"value": 7}),
    "numbers as keys": ({1: 2}, {"1": 2}),
    "no number": ([math.nan, math.inf], [None, None]),
    "emoji": ("\N{GRINNING FACE}", "\N{GRINNING FACE}"),
}


@parametrize("name", SENDABLE)
async def test_a_result_is_sent_as_json(here: World, name: str) -> None:
    """R6: a result has been through JSON once; what JSON has a form for arrives in it."""
    value, sent = SENDABLE[name]
    here.use(Returns(value))
    task = await here.do()
    assert task["result"] == sent
    assert await here.tasks() == [task]


async def test_what_work_still_holds_changes_no_record(here: World) -> None:
    """R6: neither the parameters that work got, nor the result that it gave, are the record's."""
    kept: list[Any] = []

    async def job(parameters: Json, _report: ReportProgress) -> list[Any]:
        parameters["numbers"].append(object())
        parameters["more"] = object()
        return kept

    here.use(job)
    given: Json = {"numbers": [1]}
    task = here.manager.submit("compute_sum", given)
    given["numbers"].append(object())
    await here.final(task["task_id"])
    kept.append(object())
    assert task["parameters"] == {"numbers": [1]}
    assert task["result"] == []
    assert await here.tasks() == [task]


# --- Clean-up: not a moment too early, and for ever -----------------------------------------------


@parametrize("end", sorted(FINAL))
async def test_a_final_task_goes_at_its_instant(end: str) -> None:
    """A final task is there until `retention` seconds after its end, and not a moment longer."""
    async with world(retention=600, cleanup_interval=1_000_000) as here:
        task_type = "simulate_failure" if end == "failed" else "compute_sum"
        task_id = await here.submit(task_type)
        if end == "cancelled":
            await here.cancel(task_id)
        await here.final(task_id)
        await real_sleep(599.875)
        assert await here.status(task_id) == end
        await real_sleep(0.125)
        answer = await here.http.get(f"/tasks/{task_id}")
        assert detail_of(answer, 404) == "There is no such task. It may have expired."
        answer = await here.cancel(task_id)
        assert answer.status_code == 404


async def test_no_reader_sees_an_expired_task() -> None:
    """The list and the counts end at the same instant as the single task."""
    async with world(retention=10, cleanup_interval=1_000_000) as here:
        for reader in (here.tasks, here.health):
            await here.cancel(await here.submit())
            await real_sleep(9.5)
            before = await reader()
            await real_sleep(0.5)
            assert await reader() != before
            assert await here.tasks() == []


@parametrize("broken", ["manager", "limiter"])
async def test_the_timer_survives_an_exception(
    broken: str, monkeypatch: MonkeyPatch, expected_errors: list[str]
) -> None:
    """A round that fails is logged; the next one comes, and the other clean-up is not disturbed."""
    expected_errors.append("a round of ")
    async with world(retention=1, cleanup_interval=30, rate_window=1) as here:
        (task,) = here.enqueue()
        here.manager.cancel(task["task_id"])
        await here.limiter.hit("quiet")
        with monkeypatch.context() as patch:
            if broken == "manager":
                patch.setattr(here.manager, "_finished", [None])
            else:
                patch.setattr(here.limiter, "_hits", None)
            await real_sleep(31)
        assert bool(here.manager._tasks) == (broken == "manager")
        assert bool(here.limiter._hits) == (broken == "limiter")
        await real_sleep(30)
        assert not here.manager._tasks
        assert not here.limiter._hits


async def test_a_timer_may_be_stopped_in_a_round() -> None:
    """A stop that comes while a round waits for something ends that round and the timer."""
    rounds = []

    async def job() -> None:
        rounds.append(now())
        await real_sleep(100)

    async with main.background(main.timer(1, job)):
        await real_sleep(2)
    assert not strays()
    assert rounds == [START + 1]
    assert now() == START + 2


# --- No workers, no promises ----------------------------------------------------------------------


async def assert_closed(client: AsyncClient) -> None:
    """Assert that nothing is promised."""
    for answer in (
        await client.post("/tasks", json=SUM),
        await client.get("/health"),
        await client.head("/health"),
    ):
        assert answer.status_code == 503
        assert answer.headers["cache-control"] == "no-store"
        assert "retry-after" not in answer.headers
    answer = await client.get("/tasks")
    assert answer.json() == []


async def test_without_a_lifespan_nothing_is_accepted() -> None:
    """POST and /health are 503 before the start and after the stop; in between, from the first."""
    here = World(create_app(Settings()))
    async with here.http:
        await assert_closed(here.http)
        async with here.app.router.lifespan_context(here.app):
            await here.do()
        await real_sleep(1000)
        await assert_closed(here.http)
        assert here.manager._queue.empty()


async def test_a_mount_whose_lifespan_nobody_runs_accepts_nothing() -> None:
    """`parent.mount("/api", app)` runs no lifespan of the app, so it is 503 there."""
    parent = FastAPI()
    parent.mount("/api", create_app(Settings()))
    transport = ASGITransport(parent)
    async with AsyncClient(transport=transport, base_url="http://test/api") as client:
        await assert_closed(client)


# --- Rate limit: ten a minute, and honest about it ------------------------------------------------


async def test_ten_requests_a_minute() -> None:
    """Ten requests pass, the eleventh is refused with an honest Retry-After, which is enough."""
    async with world(rate_limit=10) as here:
        start = now()
        for number in range(10):
            answer = await here.knock()
            left = 9 - number
            reset = 60 - 2 * number
            assert answer.status_code == 404
            assert answer.headers["ratelimit-policy"] == '"default";q=10;w=60'
            assert answer.headers["ratelimit"] == f'"default";r={left};t={reset}'
            await real_sleep(2)
        answer = await here.knock()
        assert detail_of(answer, 429) == "Try again in 40 s."
        assert answer.headers["retry-after"] == "40"
        assert answer.headers["ratelimit"] == '"default";r=0;t=40'
        await real_sleep(39.5)
        assert (await here.knock()).headers["retry-after"] == "1"
        await real_sleep(0.5)
        assert now() == start + 60
        answer = await here.knock()
        assert answer.status_code == 404
        assert (await here.knock()).headers["retry-after"] == "2"


async def test_retry_after_is_enough_for_any_fraction() -> None:
    """Whoever waits as long as Retry-After says is let in, and is never told more than a window."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    for seed in range(500):
        generator = Random(seed)
        # Where the clock crosses a power of two, `hit + window - now` can round to over a window.
        border = 2.0 ** generator.randrange(6, 24)
        loop.moment = border - generator.uniform(0, 60)
        limiter = RateLimiter(3, 60)
        for _ in range(3):
            assert await limiter.hit("key") == 0
            left, reset = await limiter.quota("key")
            assert left == 3 - len(limiter._hits["key"])
            assert 1 <= reset <= 60
            loop.moment += generator.choice([0, generator.uniform(0, 10)])
        seconds = await limiter.hit("key")
        assert 1 <= seconds <= 60
        loop.moment += seconds
        assert await limiter.hit("key") == 0
        assert limiter._hits["key"][-1] == now(), f"seed {seed}"


async def test_the_fields_are_those_of_the_moment_of_the_answer() -> None:
    """A long poll says what is left when it is answered, not what was left when it came."""
    async with world(workers=1, rate_limit=10) as here:
        _, task = here.enqueue(2)
        path = f"/tasks/{task['task_id']}"
        poll = asyncio.create_task(here.http.get(f"{path}?wait=true"))
        await real_sleep(1)
        for _ in range(5):
            await here.knock()
        answer = await poll
        assert answer.headers["ratelimit"] == '"default";r=4;t=55'


async def test_a_503_does_not_send_a_client_into_a_429() -> None:
    """With the last request of the window spent, Retry-After of a 503 is that of the limit."""
    async with world(workers=1, queue_size=1, rate_limit=4) as here:
        await here.submit()
        await ticks()
        await here.submit()
        assert (await here.post()).headers["retry-after"] == "5"
        answer = await here.post()
        assert answer.status_code == 503
        assert answer.headers["ratelimit"] == '"default";r=0;t=60'
        assert answer.headers["retry-after"] == "60"


@parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/tasks", b"{", 400),
        ("POST", KNOCK, b"x" * 70_000, 413),
        ("GET", "/nowhere", None, 404),
        ("PUT", f"/tasks/{NOBODY}", None, 405),
        ("GET", f"/tasks/{NOBODY}?wait=maybe", None, 400),
        ("GET", "/docs/oauth2-redirect", None, 404),
    ],
)
async def test_every_answer_counts_and_says_so(
    method: str, path: str, body: bytes | None, status: int
) -> None:
    """Errors count as much as successes, and each limited answer has the limit's header fields."""
    async with world(rate_limit=2) as here:
        told = ((1, status), (0, status), (0, 429))
        for left, expected in told:
            answer = await here.http.request(method, path, content=body)
            assert detail_of(answer, expected)
            assert answer.headers["ratelimit"] == f'"default";r={left};t=60'
            assert ("retry-after" in answer.headers) == (expected == 429)


async def call(app: FastAPI, scope: Json, *received: Json) -> list[Json]:
    """Call an app as a server does, with what it may receive; return what it sends."""
    sent: list[Any] = []
    messages = iter(received)

    async def receive() -> Json:
        message = next(messages, None)
        assert message is not None, "the body was read"
        return message

    async def send(message: Any) -> None:
        sent.append(message)

    base = {
        "path": "/tasks",
        "headers": [],
        "query_string": b"",
        "client": ("10.0.0.1", 1),
    }
    await app(base | scope, receive, send)
    return sent


async def test_a_refused_body_is_not_read() -> None:
    """The limit is decided before anyone reads the body."""
    app = create_app(Settings(rate_limit=1))
    await app.state.limiter.hit("10.0.0.1")
    sent = await call(app, {"type": "http", "method": "POST", "path": KNOCK})
    assert sent[0]["status"] == 429


async def test_what_is_not_http_passes_by() -> None:
    """A WebSocket handshake on any path is refused by the router, and does not count."""
    app = create_app(Settings(rate_limit=1))
    sent = await call(app, {"type": "websocket"}, {"type": "websocket.connect"})
    assert sent[0]["type"] == "websocket.close"
    assert not app.state.limiter._hits


@parametrize("root_path", ["/h", "/", "/health", "/api"])
def test_a_prefix_ends_at_a_slash(root_path: str) -> None:
    """A path that only begins with the letters of the prefix does not have the prefix."""
    for path in ("/health", f"{root_path}/health"):
        assert main.path_of({"path": path, "root_path": root_path}) == "/health"


@parametrize("path", sorted(main.FREE_PATHS))
@parametrize("prefix", ["", "/api", "/"])
async def test_some_paths_are_free(path: str, prefix: str) -> None:
    """Documentation and health neither need quota nor use it, behind a prefix too."""
    base = f"http://test{prefix}"
    async with world(rate_limit=1) as here, here.client("10.0.0.1", root_path=prefix) as client:
        for _ in range(3):
            answer = await client.get(base + path)
            assert answer.status_code < 400
            assert not LIMIT_FIELDS & set(answer.headers)
        answer = await client.get(base + KNOCK)
        assert answer.status_code == 404
        answer = await client.get(base + KNOCK)
        assert answer.status_code == 429
        assert (await client.get(base + path)).status_code < 400


BUCKETS: dict[str, list[str | None]] = {
    "IPv4": ["192.0.2.1", "::ffff:192.0.2.1"],
    "another IPv4": ["192.0.2.2"],
    "IPv6": ["2001:db8::1", "2001:db8:0:0:ffff::9"],
    "another IPv6": ["2001:db8:0:1::1"],
    "with a zone": ["fe80::1%eth0", "fe80::2"],
    "neither": [None, "not an ip", "x" * 20_000, "", "300.1.1.1"],
}


async def test_who_shares_a_bucket() -> None:
    """One bucket an IPv4 address, mapped or not, one an IPv6 /64, one for all that is neither."""
    async with world(rate_limit=1) as here:
        for name, hosts in BUCKETS.items():
            for number, host in enumerate(hosts):
                async with here.client(host) as client:
                    answer = await client.get(KNOCK)
                    assert answer.status_code == (429 if number else 404), name


async def test_the_header_of_a_proxy_is_not_read() -> None:
    """X-Forwarded-For is uvicorn's to trust: here it changes nothing."""
    async with world(rate_limit=1) as here:
        for address, status in (("192.0.2.1", 404), ("192.0.2.2", 429)):
            headers = {"X-Forwarded-For": address, "Forwarded": f"for={address}"}
            answer = await here.http.get(KNOCK, headers=headers)
            assert answer.status_code == status


async def test_the_limiter_keeps_only_what_it_needs() -> None:
    """At most `limit` times a key, and no key whose window is empty after a sweep."""
    limiter = RateLimiter(3, 60)
    for number in range(1000):
        await limiter.hit(f"once {number}")
        await limiter.hit("often")
    assert len(limiter._hits) == 1001
    assert len(limiter._hits["often"]) == 3
    await real_sleep(59)
    await limiter.hit("late")
    await limiter.sweep()
    assert len(limiter._hits) == 1002
    await real_sleep(1)
    await limiter.sweep()
    assert set(limiter._hits) == {"late"}
    await real_sleep(59)
    assert await limiter.quota("late") == (3, 0)


# --- Bad input: refused at the door, in one shape, and told where ---------------------------------


def of_sum(numbers: str) -> bytes:
    """Return the body of a compute_sum."""
    return b'{"task_type": "compute_sum", "parameters": {"numbers": %b}}' % numbers.encode()


def of_report(more: str) -> bytes:
    """Return the body of a generate_report."""
    return b'{"task_type": "generate_report", "parameters": {"title": "t", %b}}' % more.encode()


def of_failure(more: bytes) -> bytes:
    """Return the body of a simulate_failure."""
    return b'{"task_type": "simulate_failure", %b}' % more


FIRST = "#/parameters/numbers/0"
NUMBER = "Input should be a number from -1e300 to 1e300"
OBJECT = "Input should be an object sent as application/json"
TYPE = f"Input should be one of {', '.join(EXAMPLES)}"
EXTRA = "Extra inputs are not permitted"
DEEP = "Malformed JSON: recursion limit"
BAD_BODIES: dict[str, tuple[bytes, str, str]] = {
    "empty": (b"", "#", "Field required"),
    "array": (b"[]", "#", OBJECT),
    "UTF-16": ("{}".encode("utf-16"), "#", "Malformed JSON"),
    "deep": (b"[" * 60_000, "#", DEEP),
    "deep type": (b'{"task_type": %b' % (b"[" * 60_000), "#", DEEP),
    "deep numbers": (of_sum("[" * 60_000), "#", DEEP),
    "NaN": (of_sum("[NaN]"), FIRST, NUMBER),
    "4000 digits": (of_sum(f"[{'9' * 4000}]"), FIRST, NUMBER),
    "true": (of_sum("[true]"), FIRST, NUMBER),
    "no numbers": (of_sum("[]"), "#/parameters/numbers", "at least 1 item"),
    "1001 numbers": (of_sum(f"[{'1,' * 1000}1]"), "#/parameters/numbers", "at most 1000 items"),
    "parameters 5": (of_failure(b'"parameters": 5'), "#/parameters", "Input should be an object"),
    "odd key": (of_sum('[1], "~a/b#%": 1'), "#/parameters/~0a~1b%23%25", EXTRA),
    "surrogate key": (of_sum('[1], "\\ud800": 1'), "#", "Malformed JSON"),
    "typo": (of_failure(b'"prority": 1'), "#/prority", EXTRA),
    "inner typo": (of_failure(b'"parameters": {"m": 1}'), "#/parameters/m", EXTRA),
    "long key": (of_failure(b'"%b": 1' % (b"k" * 9000)), "#/" + "k" * 50, EXTRA),
    "priority": (of_failure(b'"priority": "urgent"'), "#/priority", "Input should be"),
    "no type": (b'{"parameters": {}}', "#/task_type", TYPE),
    "long type": (b'{"task_type": "%b"}' % (b"x" * 9000), "#/task_type", TYPE),
    "long title": (of_report(f'"title": "{"t" * 201}"'), "#/parameters/title", "at most 200"),
    "sections true": (of_report('"sections": true'), "#/parameters/sections", "valid integer"),
    "sections '3'": (of_report('"sections": "3"'), "#/parameters/sections", "valid integer"),
    "sections 7": (of_report('"sections": 7.0'), "#/parameters/sections", "less than"),
}


@parametrize("name", BAD_BODIES)
async def test_bad_bodies_are_refused_at_the_door(here: World, name: str) -> None:
    """Poison gets a short 400 that points at it, in little time, and leaves nothing behind."""
    body, pointer, detail = BAD_BODIES[name]
    start = time.process_time()
    answer = await here.send(body)
    assert time.process_time() - start < 0.1  # a body that is parsed to its depth takes more
    assert pointers_of(answer) == [pointer]
    assert len(answer.content) < 500
    problem = problem_of(answer)
    assert problem["detail"] == "The request is not valid."
    assert detail in problem["errors"][0]["detail"]
    assert await here.tasks() == []


@parametrize(
    "body",
    [
        of_sum("[1e300, -1e300, 0.1, -0.0]"),
        of_sum(f"[{'1,' * 999}1]"),
        of_report(f'"title": "{"t" * 200}", "sections": 6.0'),
        of_report('"title": "\\u0000\\ud83d\\ude00", "sections": 1'),
        b"\xef\xbb\xbf" + of_failure(b'"parameters": {}'),
    ],
    ids=["numbers", "1000", "lengths", "characters", "byte order mark"],
)
async def test_good_bodies_at_the_edge_are_taken(here: World, body: bytes) -> None:
    """What is just within the bounds is accepted, and comes back in valid JSON."""
    answer = await here.send(body)
    assert answer.status_code == 202, answer.text
    assert len(await here.tasks()) == 1


@parametrize("headers", [{"Content-Type": "text/plain"}, {}])
async def test_json_has_to_say_that_it_is(here: World, headers: dict[str, str]) -> None:
    """A body that is not sent as JSON gets a 400 that says how to send it."""
    body = of_sum("[1]")
    answer = await here.http.post("/tasks", content=body, headers=headers)
    assert problem_of(answer)["errors"] == [{"detail": OBJECT, "pointer": "#"}]


def test_a_union_within_the_parameters_is_pointed_at() -> None:
    """A type of somebody's own may have a union with a tag inside: the pointer leads there."""
    place = ("body", "draw", "parameters", "shape")
    error = {"type": "union_tag_invalid", "msg": "no such tag" * 100, "loc": place}
    item = main.invalid_item(error)
    assert item["pointer"] == "#/parameters/shape"
    assert len(item["detail"]) == 200


async def test_many_errors_are_not_all_listed(here: World) -> None:
    """Ten errors are told, however many there are."""
    fields: Json = {f"field{number}": number for number in range(1000)}
    answer = await here.post("simulate_failure", **fields)
    assert len(pointers_of(answer)) == 10


@parametrize("size", [1000, 1001])
@parametrize("chunked", [False, True])
async def test_a_body_has_its_limit(size: int, chunked: bool) -> None:
    """One byte more than `max_body` is a 413, whether or not the length was declared."""

    async def parts() -> AsyncIterator[bytes]:
        for start in range(0, size, 100):
            yield b"x" * min(100, size - start)

    async with world(max_body=1000) as here:
        content = parts() if chunked else b"x" * size
        answer = await here.http.post("/tasks", content=content)
        if size == 1000:
            assert answer.status_code == 400
        else:
            assert detail_of(answer, 413) == "The body is longer than 1000 bytes."


@parametrize("length", ["x", "-5", "9" * 5000])
async def test_a_declared_length_that_is_none_is_ignored(here: World, length: str) -> None:
    """A Content-Length that is no number decides nothing: what comes is what counts."""
    headers = {"Content-Length": length}
    answer = await here.send(of_sum("[1]"), **headers)
    assert answer.status_code == 202


@parametrize(
    ("method", "path", "pointer", "detail"),
    [
        ("GET", "/tasks?limit=0", "limit", "greater than or equal to 1"),
        ("GET", "/tasks?limit=" + "9" * 5000, "limit", "integer"),
        ("GET", "/tasks?status=%ff", "status", "'queued'"),
        ("GET", "/tasks?state=failed", "state", EXTRA),
        ("GET", "/tasks?" + "k" * 5000, "k" * 50, EXTRA),
        ("GET", "/tasks/%00", "task_id", "valid UUID"),
        ("DELETE", "/tasks/" + "a" * 5000, "task_id", "valid UUID"),
        ("GET", f"/tasks/{NOBODY}?wait=true&since=", "since", "'queued'"),
        ("GET", f"/tasks/{NOBODY}?wiat=true", "wiat", EXTRA),
        ("DELETE", f"/tasks/{NOBODY}?wait=true", "wait", EXTRA),
        ("GET", "/health?x", "x", EXTRA),
        ("GET", "/?x=1", "x", EXTRA),
        ("POST", "/tasks?dry=true", "dry", EXTRA),
    ],
    ids=lambda value: value[:40],
)
async def test_bad_queries_and_ids(
    here: World,
    method: str,
    path: str,
    pointer: str,
    detail: str,
) -> None:
    """A bad or unknown parameter of path or query gets a 400 that names it."""
    answer = await here.http.request(method, path, json=SUM)
    assert pointers_of(answer) == [pointer]
    assert detail in problem_of(answer)["errors"][0]["detail"]
    assert len(answer.content) < 400


# --- HTTP: methods, paths, prefixes and faults of our own -----------------------------------------


@parametrize(
    ("method", "path", "allow"),
    [
        ("PUT", "/tasks", "GET, HEAD, POST"),
        ("PATCH", "/tasks/x", "DELETE, GET, HEAD"),
        ("POST", "/", "GET, HEAD"),
        ("POST", "/docs", "GET, HEAD"),
    ],
)
async def test_405_names_every_method(
    here: World,
    method: str,
    path: str,
    allow: str,
) -> None:
    """RFC 9110: Allow has all methods of the path, not those of one route."""
    answer = await here.http.request(method, path)
    assert detail_of(answer, 405) == "This path has other methods: see Allow."
    assert answer.headers["allow"] == allow


@parametrize(
    "path",
    ["/", "/docs", "/health", "/tasks", "/tasks/id", "/nowhere"],
)
async def test_head_is_get_without_a_body(here: World, path: str) -> None:
    """RFC 9110: HEAD has the status and the fields of GET, wherever GET is."""
    path = path.replace("id", await here.submit())
    head = await here.http.head(path)
    get = await here.http.get(path)
    assert head.status_code == get.status_code
    assert head.content == b""
    for name in ("content-type", "content-length", "cache-control", "location"):
        assert head.headers.get(name) == get.headers.get(name)


@parametrize("path", ["/nowhere", "/tasks/", "//", "/health/", "/Tasks"])
async def test_404_is_a_problem_too(here: World, path: str) -> None:
    """Unknown paths get a problem, and never a redirect built from the Host header."""
    answer = await here.http.get("http://evil.test" + path)
    assert detail_of(answer, 404) == "Not Found"
    assert "evil" not in str(answer.headers)


@parametrize(
    ("root_path", "prefix"),
    [
        ("", ""),
        ("/", ""),
        ("/api", "/api"),
        ("//api/", "/api"),
        ("/a b/ü", "/a%20b/%C3%BC"),
        ("/50%", "/50%25"),
    ],
)
async def test_links_have_the_prefix_of_a_proxy(root_path: str, prefix: str) -> None:
    """Behind `--root-path` the Location and the redirect have the prefix, fit for a URL."""
    async with world() as here, here.client("10.0.0.1", root_path=root_path) as client:
        answer = await client.post("/tasks", json=SUM)
        task_id = answer.json()["task_id"]
        assert answer.headers["location"] == f"{prefix}/tasks/{task_id}"
        answer = await client.get(f"http://test{root_path}/")
        assert answer.headers["location"] == f"{prefix}/docs"


@parametrize("mount", ["/api", "/a b", "/ü"])
async def test_links_have_the_prefix_of_a_mount(here: World, mount: str) -> None:
    """In a mount, whose lifespan somebody runs, the Location leads to the task."""
    parent = FastAPI()
    parent.mount(mount, here.app)
    transport = ASGITransport(parent)
    async with AsyncClient(transport=transport, base_url="http://test") as client:
        answer = await client.post(f"{mount}/tasks", json=SUM)
        location = answer.headers["location"]
        assert location.isascii()
        task = (await client.get(location)).json()
        assert task["task_id"] == answer.json()["task_id"]
        answer = await client.put(f"{mount}/tasks")
        assert answer.headers["allow"] == "GET, HEAD, POST"


def bug(*_: Any) -> None:
    """Break a route."""
    raise RuntimeError("secret /etc/passwd")


def invalid_model(*_: Any) -> None:
    """Break a route by validation of our own."""
    main.SumParameters.model_validate({})


@parametrize("fault", [bug, invalid_model])
async def test_a_bug_is_a_500_that_tells_nothing(
    here: World,
    fault: Callable[..., None],
    monkeypatch: MonkeyPatch,
) -> None:
    """A fault of ours, pydantic's ValidationError included, is a 500 with the limit's fields."""
    for method in ("submit", "get", "health"):
        monkeypatch.setattr(here.manager, method, fault)
    answer = await here.http.get(f"/tasks/{NOBODY}")
    assert detail_of(answer, 500) == "The server failed."
    assert "secret" not in answer.text
    assert set(answer.headers) >= LIMIT_FIELDS
    answer = await here.http.get("/health")
    assert answer.status_code == 500
    transport = ASGITransport(here.app)  # this one raises what the server would log
    async with AsyncClient(transport=transport, base_url="http://test") as client:
        with pytest.raises((RuntimeError, ValueError)):
            await client.post("/tasks", json=SUM)


async def test_a_route_of_somebodys_own(here: World) -> None:
    """Its HTTPException keeps its words and fields, its 405 its methods, and /docs work."""

    @here.app.post("/tea", responses={404: {"description": "no tea"}})
    async def tea() -> None:
        raise HTTPException(418, "short and stout", {"X-Pot": "1"})

    answer = await here.http.post("/tea")
    assert detail_of(answer, 418) == "short and stout"
    assert answer.headers["x-pot"] == "1"
    assert (await here.http.get("/tea")).headers["allow"] == "POST"
    answer = await here.http.get("/openapi.json")
    assert answer.status_code == 200


# --- The OpenAPI document: what /docs and generated clients see -----------------------------------

OPERATIONS = {
    "submit_task": {"202", "400", "413", "429", "503", "default"},
    "list_tasks": {"200", "400", "429", "default"},
    "get_task": {"200", "400", "404", "429", "default"},
    "cancel_task": {"200", "400", "404", "409", "429", "default"},
    "health": {"200", "400", "503", "default"},
}
HOLDS = {
    "submit_task": "/Accepted",
    "list_tasks": "/Task",
    "get_task": "/Task",
    "cancel_task": "/Task",
    "health": "/Health",
}
DOCUMENT = create_app(Settings()).openapi()
SCHEMAS = DOCUMENT["components"]["schemas"]


def operations() -> dict[str, Json]:
    """Return the operations of the document by id."""
    found: list[Json] = []
    for path in DOCUMENT["paths"].values():
        found += path.values()
    return {operation["operationId"]: operation for operation in found}


def test_openapi_names_every_answer() -> None:
    """Each operation has its answers, and no 422; what is limited has the limit's fields."""
    assert "/" not in DOCUMENT["paths"]
    for name, expected in OPERATIONS.items():
        answers = operations()[name]["responses"]
        assert set(answers) == expected
        limited = "429" in answers
        for status, answer in answers.items():
            fields = {field.lower() for field in answer["headers"]}
            assert (fields >= LIMIT_FIELDS) == limited
            assert ("location" in fields) == (status == "202")
            assert ("retry-after" in fields) == (status in ("429", "503") and limited)


def test_openapi_tells_what_each_answer_holds() -> None:
    """A success has its schema; an error is a Problem, with an example of its own."""
    for name, operation in operations().items():
        for status, answer in operation["responses"].items():
            ((kind, content),) = answer["content"].items()
            schema = content["schema"]
            if status in ("200", "202"):
                assert kind == "application/json"
                schema = schema.get("items", schema)
                assert schema.get("$ref", "").endswith(HOLDS.get(name, ""))
            else:
                assert kind == "application/problem+json"
                assert schema["$ref"].endswith("/Problem")
                assert str(content["example"]["status"]) in (status, "500")


async def test_openapi_examples_are_true() -> None:
    """What the document shows of an answer is what such an answer has, and is described."""
    async with world(rate_limit=6) as here:
        task_id = await here.submit()
        await real_sleep(6)
        task = await here.get(task_id)
        health = await here.health()
        assert SCHEMAS["Task"]["example"].keys() == task.keys()
        for name in ("Task", "SumParameters"):
            for field in SCHEMAS[name]["properties"].values():
                assert field["description"]
        assert SCHEMAS["Health"]["example"].keys() == health.keys()
        for status, answer in {
            "400": await here.post(parameters=5),
            "404": await here.http.get(f"/tasks/{NOBODY}"),
            "409": await here.cancel(task_id),
            "413": await here.http.post("/tasks", content=b"x" * 70_000),
            "429": await here.knock(),
        }.items():
            assert main.EXAMPLE_PROBLEMS[status].keys() == problem_of(answer).keys()


# --- Settings -------------------------------------------------------------------------------------

DEFAULTS: Json = {
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
NUMERIC = [
    name for name, field in Settings.model_fields.items() if field.annotation in (int, float)
]


def test_the_defaults_are_those_of_the_contract(monkeypatch: MonkeyPatch) -> None:
    """Without any variable of ours the settings are the contract's."""
    monkeypatch.setenv("TASKS_SERVICE_HOST", "10.0.0.1")  # Kubernetes sets this for a service
    found = Settings.from_environment().model_dump()
    assert found.items() >= DEFAULTS.items()


def test_a_new_setting_is_one_line(monkeypatch: MonkeyPatch) -> None:
    """A setting of any simple type, a string too, works from the environment."""

    class More(Settings, frozen=True):
        greeting: str = "hello"
        shout: bool = False
        ratio: float = 0.5

    monkeypatch.setenv("TASKS_GREETING", "hi")
    monkeypatch.setenv("TASKS_SHOUT", "yes")
    found = More.from_environment()
    assert isinstance(found, More)
    assert (found.greeting, found.shout) == ("hi", True)
    monkeypatch.setenv("TASKS_RATIO", "nan")  # refused without a bound of its own
    with pytest.raises(SystemExit, match="^TASKS_RATIO: "):
        More.from_environment()


@parametrize(
    "value",
    ["", "x", "nan", "inf", "-1", "1e10"],
)
@parametrize("name", NUMERIC)
def test_a_bad_setting_stops_the_start(name: str, value: str, monkeypatch: MonkeyPatch) -> None:
    """A bad value is one error that names the variable and what is allowed, and no server."""
    variable = f"TASKS_{name.upper()}"
    monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit, match=rf"^{variable}: Input should be [^\n]+$"):
        create_app()


@parametrize(
    ("name", "least", "below"),
    [
        ("workers", "1", "0"),
        ("max_tasks", "1", "0"),
        ("long_poll", "0", "-0.1"),
        ("cleanup_interval", "0.1", "0.09"),
        ("rate_window", "1", "0.5"),
    ],
)
def test_a_setting_has_its_least_value(
    name: str, least: str, below: str, monkeypatch: MonkeyPatch
) -> None:
    """A size or time for which 0 makes no sense refuses it, and all bad settings are named."""
    variable = f"TASKS_{name.upper()}"
    monkeypatch.setenv(variable, least)
    assert getattr(Settings.from_environment(), name) == float(least)
    monkeypatch.setenv(variable, below)
    monkeypatch.setenv("TASKS_TIME_SCALE", "-1")
    with pytest.raises(SystemExit, match=f"^{variable}: .*\nTASKS_TIME_SCALE: .*$"):
        create_app()


# --- Start and stop -------------------------------------------------------------------------------


async def test_stop_with_work_in_hand() -> None:
    """Stopping cancels what runs and what waits, answers the polls of it, and ends at once."""
    async with world() as here:
        tasks = here.enqueue(20)
        await ticks()
        polls = [here.poll(task) for task in tasks]
        await ticks()
        assert here.manager._queue.qsize() == 15
        start = now()
    assert now() == start
    for poll in polls:
        assert await poll == (0, "cancelled")


async def test_polls_are_answered_when_the_server_is_told_to_stop(single: World) -> None:
    """R2: the stop wakes the waiters and changes no status; later polls do not wait at all."""
    running, queued = single.enqueue(2)
    await ticks()
    poll = single.poll(queued)
    await real_sleep(1)
    single.manager.stop_waiting()
    assert await poll == (1, "queued")
    assert await single.hold(queued["task_id"]) == (0, "queued")
    assert await single.hold(running["task_id"]) == (0, "processing")
    answer = await single.post()
    assert answer.status_code == 503
    answer = await single.http.get("/health")
    assert answer.status_code == 503


@parametrize("signum", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_wakes_the_polls_and_goes_on_to_the_server(signum: int) -> None:
    """The handler calls the one that was there, and is gone after the stop."""
    received: list[int] = []
    before = signal.signal(signum, lambda number, _: received.append(number))
    server_handler = signal.getsignal(signum)
    try:
        async with world(workers=1) as here:
            _, queued = here.enqueue(2)
            poll = here.poll(queued)
            await ticks()
            signal.raise_signal(signum)
            assert await poll == (0, "queued")
            assert received == [signum]
        assert signal.getsignal(signum) is server_handler
    finally:
        signal.signal(signum, before)


async def test_where_no_handler_is_set_none_is_added() -> None:
    """Without a server that handles signals, none of ours keeps them from ending the process."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        async with world():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_in_another_thread_the_app_does_without_signals() -> None:
    """Only the main thread may set a handler; elsewhere, as under a TestClient, all else works."""
    ended = []

    async def run_one() -> None:
        async with world() as here:
            task = await here.do()
            ended.append(task["status"])

    target = partial(run, run_one())
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join(10)
    assert ended == ["completed"]


def test_start_again_in_another_loop() -> None:
    """An app outlives its event loop: nothing in it is bound to the first one."""
    here = World(create_app(Settings()))

    async def once() -> None:
        async with here.app.router.lifespan_context(here.app):
            await ticks()  # the workers wait for the queue
            task = await here.do()
            assert task["status"] == "completed"

    run(once())
    run(once())


async def test_stopping_waits_for_clean_up_but_not_for_ever() -> None:
    """Stopping awaits the clean-up of cancelled work, for `CANCEL_GRACE` seconds."""
    cleaned = []

    async def job(parameters: Json, _report: ReportProgress) -> None:
        try:
            await asyncio.sleep(100)
        finally:
            await asyncio.sleep(parameters["seconds"])
            cleaned.append(parameters["seconds"])

    here = World(create_app(Settings()), work=job)
    async with here.app.router.lifespan_context(here.app):
        for seconds in (2, 50):
            here.manager.submit("compute_sum", {"seconds": seconds})
        await real_sleep(1)
        start = now()
    assert now() == start + main.CANCEL_GRACE
    assert cleaned == [2]
    await real_sleep(50)
    assert cleaned == [2, 50]
    assert not here.manager._running


# --- Every order of the loop ----------------------------------------------------------------------
#
# asyncio calls what is ready in the order in which it became ready, and a program may by chance be
# right in that order only. Here each turn of the loop shuffles what is ready, from a seed; a
# failure names the seed. SCHEDULES=500 tries that many (CI does).

SCHEDULES = int(os.environ.get("SCHEDULES", "24"))


Scenario: TypeAlias = Callable[[Random], Coroutine[Any, Any, None]]


def in_every_order(scenario: Scenario) -> None:
    """Run a scenario under many schedules; it gets a generator of its own for its choices."""
    for seed in range(SCHEDULES):
        try:
            run(scenario(Random(seed)), seed)
        except BaseException as exc:
            raise AssertionError(f"seed {seed}") from exc


def test_the_race_in_every_order() -> None:
    """R1, R2, R3: cancel against finish, with a poll, at a random tick of a random work."""

    async def scenario(generator: Random) -> None:
        job = generator.choice([complete, fail, swallow])
        await race(job, generator.randrange(16))

    in_every_order(scenario)


SUBMISSIONS: list[Any] = [model.model_validate(model.example) for model in main.SUBMISSION_MODELS]


class Model:
    """What must be true of a manager, whatever is asked of it."""

    def __init__(self, here: World, generator: Random) -> None:
        self.here = here
        self.manager = here.manager
        self.generator = generator
        self.seen: dict[str, Task] = {}  # id -> the task as it was when last looked at
        self.polls: list[asyncio.Task[None]] = []

    def submit(self) -> None:
        """Submit the example of a random type."""
        full = self.manager._queue.full()
        submission = self.generator.choice(SUBMISSIONS)
        parameters = submission.parameters.model_dump()
        priority = self.generator.choice(PRIORITIES)
        try:
            task = self.manager.submit(submission.task_type, parameters, priority)
        except main.UnavailableError:
            assert full
        else:
            assert not full
            self.seen[task["task_id"]] = task.copy()

    def cancel(self) -> None:
        """Cancel a random task."""
        task_id = self.generator.choice([*self.seen, NOBODY])
        task = self.manager.find(task_id)
        before = task["status"] if task else None
        try:
            assert self.manager.cancel(task_id)["status"] == "cancelled"
        except main.TaskFinishedError:
            assert before in ("completed", "failed")
        except main.TaskNotFoundError:
            assert before is None

    def poll(self) -> None:
        """Start a poll of a random task."""
        if self.seen:
            task_id = self.generator.choice(list(self.seen))
            task = self.manager.find(task_id)
            if task is not None:
                poll = self.check_poll(task_id, task["status"])
                self.polls.append(asyncio.create_task(poll))

    async def check_poll(self, task_id: str, since: Status) -> None:
        """Poll a task, and check that the answer has come when there was a reason to."""
        took, task = await clock(self.manager.wait(task_id, since))
        if task["status"] != since:
            # A change that was slept through would be told late.
            changed_at = task["finished_at"] or task["started_at"]
            assert took == 0 or changed_at == timestamp(main.utc_now())
        elif since not in FINAL:
            assert took == self.manager._settings.long_poll or not self.manager._open

    async def step(self) -> None:
        """Do a few things at random, let some time pass, and look whether all is well."""
        actions = [self.submit, self.submit, self.cancel, self.poll]
        for _ in range(self.generator.randrange(5)):
            action = self.generator.choice(actions)
            action()
        if self.generator.random() < 0.1:
            await self.list()
        pause = self.generator.choice([0, 0, 0.5, 1, 3])
        await real_sleep(pause)
        self.check()

    async def list(self) -> None:
        """Read a whole list, slowly."""
        body = b""
        async for chunk in stream_tasks(self.manager, None, None):
            body += chunk
            await ticks(self.generator.randrange(3))
        ids = [task["task_id"] for task in json.loads(body)]
        assert len(set(ids)) == len(ids)
        assert set(ids) <= set(self.seen)

    def check(self) -> None:
        """Compare each task with how it was before, and the books with each other."""
        self.here.check_books()
        self.manager.expire()
        for task_id, old in list(self.seen.items()):
            new = self.manager._tasks.get(task_id)
            if new is None:
                assert old["expires_at"]
                assert old["expires_at"] <= timestamp(main.utc_now())
                del self.seen[task_id]
                continue
            if old["status"] in FINAL:
                assert new == old
            assert new["status"] != "queued" or old["status"] == "queued"
            assert new["progress"] >= old["progress"]
            assert (new["progress"] == 100) == (new["status"] == "completed")
            self.seen[task_id] = new.copy()
        assert set(self.seen) == set(self.manager._tasks)


async def walk(generator: Random, steps: int) -> None:
    """Submit, cancel, poll, list, expire, stop and start again, at random."""
    settings = Settings(workers=3, queue_size=6, retention=20, long_poll=4)
    here = World(create_app(settings))
    model = Model(here, generator)
    for _ in range(2):
        async with here.app.router.lifespan_context(here.app):
            for _ in range(steps):
                await model.step()
            if generator.random() < 0.5:
                here.manager.stop_waiting()
        model.check()
        assert set(statuses(here.manager._tasks.values())) <= FINAL
        await asyncio.gather(*model.polls)
    await ticks()
    assert not strays()


def test_a_random_walk_in_every_order(caplog: LogCaptureFixture) -> None:
    """R1 to R4: no task is lost, none ends twice, no change is slept through, in whatever order."""
    caplog.set_level(logging.ERROR)  # or a failure would print each step of the walk
    in_every_order(lambda generator: walk(generator, 60))


def test_a_long_random_walk(caplog: LogCaptureFixture) -> None:
    """R1 to R4: the same, for a long time, in the loop's own order."""
    caplog.set_level(logging.ERROR)
    run(walk(Random(7), 3000))


# --- A new type of task ---------------------------------------------------------------------------
#
# A new type touches three places: its model with its example, the union, and its `case`. The first
# test here tells whoever forgets the union; `test_every_example_does_what_it_says` tells whoever
# forgets the `case`. The second one is the test to copy for work of one's own.


def test_every_model_is_in_the_union() -> None:
    """A model of a submission that is missing in the union is found here, and not by a client."""
    models = {model for model in main.SubmissionBase.__subclasses__() if model.__module__ == "main"}
    assert models == set(main.SUBMISSION_MODELS)
    for model in models:
        assert model.model_validate(model.example)
        assert model.example["task_type"] in main.TASK_TYPES


async def test_a_sum_from_its_submission_to_its_result(here: World) -> None:
    """A sum is accepted, takes its five seconds, and has its result."""
    parameters = {"numbers": [1, 2, 3]}
    task_id = await here.submit("compute_sum", parameters=parameters)
    took, task = await clock(here.final(task_id))
    assert took == 5
    assert task["status"] == "completed"
    assert task["result"] == 6


async def test_work_in_a_thread(here: World) -> None:
    """Work that blocks in a thread holds up nobody, and the virtual clock waits for it."""

    async def job(_: Json, report: ReportProgress) -> str:
        report(50)
        await asyncio.to_thread(time.sleep, 0.01)
        return "done"

    here.use(job)
    ids = [await here.submit() for _ in range(5)]
    for task_id in ids:
        took, task = await clock(here.final(task_id))
        assert (took, task["result"]) == (0, "done")


# --- A real server: streaming, disconnects, signals -----------------------------------------------


class Server:
    """A uvicorn in a process of its own, started as the README says, under `python -X dev`."""

    def __init__(self, *options: str, **settings: Any) -> None:
        """Start it, and wait until it listens or has ended."""
        ours = {f"TASKS_{name.upper()}": str(value) for name, value in settings.items()}
        python = {"PYTHONUNBUFFERED": "1", "PYTHONOPTIMIZE": ""}
        command = [sys.executable, "-X", "dev", "-m", "uvicorn", "main:app", "--port", "0"]
        self.process = subprocess.Popen(
            [*command, "--no-access-log", *options],
            cwd=Path(main.__file__).parent,
            env={**os.environ, **python, **ours},
            stderr=subprocess.PIPE,
            text=True,
        )
        self.http = httpx.Client(timeout=15, trust_env=False)
        self.log: list[str] = []
        self.port = 0
        self.started = threading.Event()
        self.reader = threading.Thread(target=self.read_log, daemon=True)
        self.reader.start()

    def __enter__(self) -> Self:
        """Wait until it listens or has ended."""
        if not self.started.wait(15):
            self.__exit__()
            raise AssertionError("the server does not start")
        self.http.base_url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *_: object) -> None:
        """End it, whatever has happened."""
        self.http.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(5)
        self.reader.join(5)
        if self.process.stderr:
            self.process.stderr.close()

    def read_log(self) -> None:
        """Read the log until it ends, so that its pipe never fills."""
        assert self.process.stderr
        with suppress(ValueError):  # it was closed
            for line in self.process.stderr:
                self.log.append(line)
                found = re.search(r"running on http://127.0.0.1:(\d+)", line)
                if found:
                    self.port = int(found[1])
                    self.started.set()
        self.started.set()

    def submit(self, task_type: str = "compute_sum", **fields: Any) -> str:
        """Submit a task and return its path."""
        submission = EXAMPLES[task_type] | fields
        answer = self.http.post("/tasks", json=submission)
        assert answer.status_code == 202
        return answer.headers["location"]

    def connect(self, *lines: str, body: bytes = b"") -> socket.socket:
        """Open a connection and send a request; the caller closes it."""
        link = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        head = "\r\n".join([*lines, "Host: x", "Content-Type: application/json", "", ""])
        link.sendall(head.encode() + body)
        return link

    def stop(self, signum: int = signal.SIGTERM) -> tuple[float, str]:
        """End the process; return the seconds that this took, and all that it has logged."""
        start = time.monotonic()
        self.process.send_signal(signum)
        self.process.wait(10)
        took = time.monotonic() - start
        self.reader.join(5)
        return took, "".join(self.log)


LONG_CHUNK = b"10001\r\n" + b"x" * 0x10001 + b"\r\n"
UGLY = re.compile("Traceback|never|destroyed|Warning|ERROR|CRITICAL")
SIGNALS = [(signal.SIGTERM, -15), (signal.SIGINT, 0)]
needs_signals = pytest.mark.skipif(
    sys.platform == "win32", reason="Windows cannot send these signals to another process"
)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One server for the tests that only talk to it; it has logged nothing ugly in the end."""
    with Server(rate_limit=3000, queue_size=1000, long_poll=0.2) as server:
        yield server
        _, log = server.stop()
        assert not UGLY.search(log)


def read_all(link: socket.socket) -> bytes:
    """Read until the server closes."""
    with link:
        return b"".join(iter(lambda: link.recv(65536), b""))


def test_the_list_arrives_in_parts(server: Server) -> None:
    """The stream is chunked on the wire, and what is in the chunks is one JSON array."""
    paths = [server.submit() for _ in range(500)]
    with server.http.stream("GET", "/tasks") as answer:
        parts = list(answer.iter_raw())
    for path in paths:
        assert server.http.delete(path).status_code == 200
    tasks = json.loads(b"".join(parts))[-500:]  # others may have been there before
    assert answer.headers["transfer-encoding"] == "chunked"
    assert len(parts) >= 3
    assert [f"/tasks/{task['task_id']}" for task in tasks] == paths


def test_a_body_does_not_break_a_list(server: Server) -> None:
    """The body of a GET is of no interest, neither to the route nor to the stream of a list."""
    lines = ("GET /tasks HTTP/1.1", "Transfer-Encoding: chunked", "Connection: close")
    answer = read_all(server.connect(*lines, body=LONG_CHUNK + b"0\r\n\r\n"))
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b"\r\n0\r\n\r\n")


def test_a_client_may_leave(server: Server) -> None:
    """A client that leaves a long poll, a list or its own body breaks nothing."""
    path = server.submit("generate_report", **SLOW)
    server.connect(f"GET {path}?wait=true HTTP/1.1").close()
    server.connect("GET /tasks HTTP/1.1").close()
    server.connect("POST /tasks HTTP/1.1", "Content-Length: 100").close()
    answer = server.http.get(f"{path}?wait=true&since=processing")
    assert answer.json()["status"] == "processing"
    assert server.http.delete(path).status_code == 200
    assert server.http.get("/health").status_code == 200


@parametrize("method", ["POST", "GET"])
def test_a_declared_length_is_refused_before_the_body(server: Server, method: str) -> None:
    """A client that asks with `Expect: 100-continue` is told 413, and not to go on."""
    lines = (f"{method} /tasks HTTP/1.1", "Expect: 100-continue", "Content-Length: 99999999")
    link = server.connect(*lines, "Connection: close")
    answer = read_all(link)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"100 Continue" not in answer


@needs_signals
@parametrize(("signum", "code"), SIGNALS)
def test_a_signal_ends_it_at_once_and_cleanly(signum: int, code: int) -> None:
    """With twenty tasks and open long polls, also of a client that left, it ends in a second."""
    with Server(rate_limit=100, long_poll=60) as server:
        paths = [server.submit("generate_report", **SLOW) for _ in range(20)]
        poll = f"GET {paths[0]}?wait=true&since=processing HTTP/1.1"
        server.connect(poll).close()
        link = server.connect(poll)
        assert server.http.get("/health").status_code == 200  # so the poll has been read
        took, log = server.stop(signum)
        assert took < 1
        assert b'"status":"processing"' in read_all(link)
        assert server.process.returncode == code
        assert len(re.findall(r"INFO: +task \S+ cancelled", log)) == 20
        assert not UGLY.search(log)


def test_without_a_lifespan_there_is_no_service() -> None:
    """Under `--lifespan off` no task is accepted, and /health says so."""
    with Server("--lifespan", "off") as server:
        assert server.http.post("/tasks", json=SUM).status_code == 503
        assert server.http.get("/health").status_code == 503


def test_a_bad_setting_means_no_server() -> None:
    """uvicorn ends with the message that names the variable, and without a traceback."""
    with Server(workers="many") as server:
        assert server.process.wait(10) == 1
        server.reader.join(5)
        log = "".join(server.log)
    assert server.port == 0
    assert "TASKS_WORKERS: Input should be a valid integer" in log
    assert "Traceback" not in log
