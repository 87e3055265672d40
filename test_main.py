"""The proof that `main.py` keeps its contract and its rules R1 to R5.

Time is virtual. Every test runs on a `VirtualLoop`, whose clock stands still while anything can run
and then jumps to the next timer, so that a 30 s report, a 60 s window and a retention of 10 minutes
are instant and exact: a test can look one instant before, at, and after. `asyncio.sleep` is patched
on top of it by a `Sleeper`, which records what the program sleeps. If all that is left would wait
for ever, the loop raises instead of hanging.

Each test makes a world of its own with `world(**settings)`, which starts the app through its
lifespan, and in the end checks that nothing is left behind and that all books agree. What an
in-process transport cannot show is tested at the end, against a uvicorn on loopback.

The sections: helpers; submission and results; polling (R2); final is final (R3); the queue (R4);
workers (R5); clean-up; rate limit; bad input and errors; settings; start and stop; a random walk;
a real server.
"""

import asyncio
import contextlib
import gc
import http.client
import json
import logging
import os
import random
import re
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import datetime, timedelta
from http import HTTPStatus
from pathlib import Path
from typing import Any, get_args
from uuid import UUID

import httpx
import pytest

import main
from main import NEXT, Settings, Status, Task, TaskFailedError, TaskManager, create_app

pytestmark = pytest.mark.anyio

# --- Helpers --------------------------------------------------------------------------------------

STATUSES: tuple[Status, ...] = get_args(Status)
NOBODY = "00000000-0000-4000-8000-000000000000"
LIMIT_FIELDS = {"ratelimit", "ratelimit-policy"}
real_sleep = asyncio.sleep  # the tests' own: advances the virtual clock, or with 0 gives a turn


class JumpingSelector(selectors.SelectSelector):
    """Never blocks: where the loop would wait for its next timer, it moves the loop's clock there."""

    loop: "VirtualLoop"

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        if not events and timeout is None:
            raise AssertionError("everything waits for ever")
        if not events and timeout:
            self.loop.moment += timeout
        return events


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop that reads its time from an attribute."""

    def __init__(self) -> None:
        self.moment = 1000.0
        selector = JumpingSelector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.moment


class Sleeper:
    """Stands in for `asyncio.sleep` and remembers what it was asked for."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    async def __call__(self, delay: float, result: Any = None) -> Any:
        self.slept.append(delay)
        return await real_sleep(delay, result)


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """Give anyio's plugin the virtual loop."""
    return "asyncio", {"loop_factory": VirtualLoop}


@pytest.fixture(autouse=True)
def sleeper(monkeypatch: pytest.MonkeyPatch) -> Sleeper:
    """Patch `asyncio.sleep` in every test."""
    sleeper = Sleeper()
    monkeypatch.setattr(asyncio, "sleep", sleeper)
    return sleeper


@pytest.fixture(autouse=True)
def expected_errors(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """Fail a test after which something was logged at ERROR that it did not expect."""
    expected: list[str] = []
    caplog.set_level(logging.INFO)
    yield expected
    gc.collect(1)  # an exception that nobody retrieved is logged when its task is collected
    errors = [r.getMessage() for r in caplog.get_records("call") if r.levelno >= logging.ERROR]
    assert [e for e in errors if not any(part in e for part in expected)] == []
    assert [part for part in expected if not any(part in e for e in errors)] == []


class World:
    """An app that has been started, and a client of it."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.manager: TaskManager = app.state.manager
        self.limiter: main.RateLimiter = app.state.limiter
        self.http = self.client("10.0.0.1")

    def client(self, host: str | None) -> httpx.AsyncClient:
        """Return a client with that address; None is a peer that has none."""
        transport = httpx.ASGITransport(
            self.app,
            raise_app_exceptions=False,
            client=(host, 1),  # type: ignore[arg-type]  # None is made of it below
        )
        if host is None:
            transport.client = None  # type: ignore[assignment]  # as on a unix socket
        return httpx.AsyncClient(transport=transport, base_url="http://test")

    async def submit(self, kind: str = "compute_sum", priority: str = "normal", **more: Any) -> str:
        """Submit a task and return its id."""
        defaults = {"compute_sum": {"numbers": [1, 2, 3]}, "generate_report": {"title": "T"}}
        body = {
            "task_type": kind,
            "parameters": more or defaults.get(kind, {}),
            "priority": priority,
        }
        answer = await self.http.post("/tasks", json=body)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["task_id"])

    async def get(self, task_id: str, **query: Any) -> dict[str, Any]:
        """Poll a task."""
        answer = await self.http.get(f"/tasks/{task_id}", params=query)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def cancel(self, task_id: str) -> httpx.Response:
        return await self.http.delete(f"/tasks/{task_id}")

    async def list(self, **query: Any) -> list[dict[str, Any]]:
        answer = await self.http.get("/tasks", params=query)
        assert answer.status_code == 200, answer.text
        return list(answer.json())

    async def health(self) -> dict[str, Any]:
        return dict((await self.http.get("/health")).json())

    def check_books(self) -> None:
        """Assert that the manager's collections agree with its records, whatever has happened."""
        manager = self.manager
        ids = {s: {i for i, t in manager._tasks.items() if t["status"] == s} for s in STATUSES}
        final = ids["completed"] | ids["failed"] | ids["cancelled"]
        assert {entry[2] for entry in manager._queue._queue} == ids["queued"]
        assert ids["processing"] <= set(manager._running)
        assert len(ids["processing"]) <= manager._settings.workers
        assert {task_id for _, task_id in manager._finished} == final
        assert set(manager._changed) <= ids["queued"] | ids["processing"]


@contextlib.asynccontextmanager
async def world(**settings: Any) -> AsyncIterator[World]:
    """Start an app, by default with a limit that no test reaches, and stop it; leave nothing."""
    here = World(create_app(Settings(**{"rate_limit": 10**6, **settings})))
    before = asyncio.all_tasks()
    async with here.app.router.lifespan_context(here.app), here.http:
        await ticks()  # the workers have started, and wait
        yield here
        here.check_books()
    here.check_books()
    assert all(task["status"] not in NEXT for task in here.manager._tasks.values())
    await ticks()  # a cancelled waiter of a long poll takes one to end
    assert asyncio.all_tasks() == before


async def ticks(count: int = 5) -> None:
    """Let everything that is ready run, without letting time pass."""
    for _ in range(count):
        await real_sleep(0)


def work(monkeypatch: pytest.MonkeyPatch, job: Callable[[Task], Awaitable[Any]]) -> None:
    """Let `job` be the work of every task."""

    async def execute(_: TaskManager, task: Task) -> Any:
        return await job(task)

    monkeypatch.setattr(TaskManager, "_execute", execute)


def problem_of(answer: httpx.Response) -> dict[str, Any]:
    """Return an error's body, and assert that it is a problem document of the answer's status."""
    body = dict(answer.json())
    assert answer.headers["content-type"] == "application/problem+json"
    assert body["type"] == "about:blank" and body["status"] == answer.status_code
    assert body["title"] == HTTPStatus(answer.status_code).phrase
    return body


# --- Submission and results -----------------------------------------------------------------------


async def test_submission_is_accepted_with_its_place() -> None:
    """A submission answers 202 with id, status and Location, and nothing else."""
    async with world() as here:
        body = {"task_type": "compute_sum", "parameters": {"numbers": [1]}}
        answer = await here.http.post("/tasks", json=body)
        task_id = answer.json()["task_id"]
        assert answer.status_code == 202
        assert answer.json() == {"task_id": task_id, "status": "queued"}
        assert answer.headers["location"] == f"/tasks/{task_id}"
        assert answer.headers["content-type"] == "application/json"
        assert UUID(task_id).version == 4 and str(UUID(task_id)) == task_id


async def test_location_has_the_prefix_of_a_proxy() -> None:
    """Behind `--root-path` the Location and the redirect have the prefix, and /docs is unlimited."""
    app = create_app(Settings())
    transport = httpx.ASGITransport(app, root_path="/api")
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answer = await client.post("/api/tasks", json={"task_type": "simulate_failure"})
        assert answer.headers["location"] == f"/api/tasks/{answer.json()['task_id']}"
        assert (await client.get("/api/")).headers["location"] == "/api/docs"
        assert "ratelimit" not in (await client.get("/api/docs")).headers


@pytest.mark.parametrize(
    ("kind", "parameters", "seconds", "result"),
    [
        ("compute_sum", {"numbers": [1, 2, 3]}, 5, 6),
        ("compute_sum", {"numbers": [0.5, 1]}, 5, 1.5),
        ("compute_sum", {"numbers": [2**60, 1, 10**300]}, 5, 2**60 + 1 + 10**300),
        ("compute_sum", {"numbers": [1e300] * 10_000}, 5, sum([1e300] * 10_000)),
        (
            "generate_report",
            {"title": "T"},
            15,
            "T\nSection 1 of 3\nSection 2 of 3\nSection 3 of 3",
        ),
        ("generate_report", {"title": "é", "sections": 6}, 30, None),
    ],
)
async def test_work_takes_its_time_and_gives_its_result(
    kind: str, parameters: dict[str, Any], seconds: float, result: Any, sleeper: Sleeper
) -> None:
    """Each type of task takes its time, neither less nor more, in ten steps, and has its result."""
    async with world(max_body=10**6) as here:
        task_id = await here.submit(kind, **parameters)
        await real_sleep(seconds - 0.001)
        assert (await here.get(task_id))["status"] == "processing"
        await real_sleep(0.001)
        await ticks()
        task = await here.get(task_id)
        assert (task["status"], task["progress"], task["error"]) == ("completed", 100, None)
        assert task["result"] == result or (result is None and "é" in task["result"])
        assert sleeper.slept.count(seconds / 10) == 10


async def test_simulated_failure_is_the_clients_to_read() -> None:
    """A failed task says its message, or the default one when `parameters` was left out."""
    async with world() as here:
        ids = [await here.submit("simulate_failure", message="no disk\nINFO: forged")]
        answer = await here.http.post("/tasks", json={"task_type": "simulate_failure"})
        ids.append(answer.json()["task_id"])
        await real_sleep(5.001)
        for task_id, message in zip(
            ids, ["no disk\nINFO: forged", "simulated failure"], strict=True
        ):
            task = await here.get(task_id)
            assert (task["status"], task["result"], task["progress"]) == ("failed", None, 90)
            assert task["error"] == {"code": "task_failed", "message": message}


async def test_a_task_has_one_shape_in_every_state() -> None:
    """All twelve fields are there from queued to final, dates in UTC, and as they were validated."""
    async with world(workers=1, retention=600) as here:
        await here.submit(numbers=[1])
        task_id = await here.submit("generate_report", title="T")
        queued = await here.get(task_id)
        await real_sleep(5.001)
        processing = await here.get(task_id)
        await real_sleep(15)
        completed = await here.get(task_id)
        assert list(queued) == list(processing) == list(completed) == list(Task.__annotations__)
        assert queued["parameters"] == {"title": "T", "sections": 3}
        empty = {"progress": 0, "result": None, "error": None}
        dates = dict.fromkeys(["started_at", "finished_at", "expires_at"])
        assert queued | {"status": "queued", "priority": "normal"} | empty | dates == queued
        assert processing["started_at"] and processing["finished_at"] is None
        moments = [completed[f"{n}_at"] for n in ("created", "started", "finished", "expires")]
        created, started, finished, expires = map(datetime.fromisoformat, (m[:-1] for m in moments))
        assert all(moment.endswith("Z") for moment in moments)
        assert started - created == timedelta(seconds=5)
        assert finished - started == timedelta(seconds=15)
        assert expires - finished == timedelta(seconds=600)


async def test_dates_are_those_of_the_wall_clock() -> None:
    """The loop's clock is anchored in the real date, by `time.monotonic`."""
    shown = main.utc(time.monotonic())
    assert abs(shown - datetime.now(shown.tzinfo)) < timedelta(seconds=5)


async def test_progress_rises_in_ten_steps() -> None:
    """Progress is an integer that rises from 0 by tens and is 100 only when completed."""
    async with world() as here:
        task_id, seen = await here.submit(), []
        await real_sleep(0.25)
        for _ in range(11):
            seen.append((await here.get(task_id))["progress"])
            await real_sleep(0.5)
        assert seen == [*range(0, 100, 10), 100]


async def test_reported_progress_never_falls_nor_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """What work reports is kept below 100, and a lower report is ignored."""
    async with world() as here:

        async def job(task: Task) -> list[int]:
            seen = []
            for percent in (40, 20, 250):
                here.manager._report(task, percent)
                seen.append(task["progress"])
            return seen

        work(monkeypatch, job)
        task_id = await here.submit()
        assert (await here.get(task_id, wait=True))["result"] == [40, 40, 99]


@pytest.mark.parametrize("scale", [0, 0.5, 2])
async def test_time_scale_multiplies_the_work(scale: float) -> None:
    """`time_scale` multiplies the simulated time; with 0 there is none."""
    async with world(time_scale=scale) as here:
        task_id = await here.submit()
        await real_sleep(5 * scale)
        await ticks(30)
        task = await here.get(task_id)
        assert task["status"] == "completed"
        duration = datetime.fromisoformat(task["finished_at"][:-1]) - datetime.fromisoformat(
            task["started_at"][:-1]
        )
        assert duration == timedelta(seconds=5 * scale)


async def test_list_filters_and_limits_in_order_of_submission() -> None:
    """The list is in order of submission, by status and up to a limit, however many there are."""
    async with world(workers=1, queue_size=10**4) as here:
        answer = await here.http.get("/tasks")
        assert (answer.text, answer.headers["content-type"]) == ("[]\n", "application/json")
        ids = [await here.submit() for _ in range(4)]
        await real_sleep(5.001)
        await here.cancel(ids[2])
        assert [t["task_id"] for t in await here.list()] == ids
        assert [t["status"] for t in await here.list()] == [
            *("completed", "processing", "cancelled", "queued")
        ]
        for status in STATUSES:
            assert {t["status"] for t in await here.list(status=status)} <= {status}
        assert [t["task_id"] for t in await here.list(limit=2)] == ids[:2]
        assert [t["task_id"] for t in await here.list(status="queued", limit=10**30)] == ids[3:]
        assert (await here.list(status="completed"))[0] == await here.get(ids[0])


async def list_of(here: World, count: int) -> list[Task]:
    """Submit tasks past HTTP, and return them all."""
    for _ in range(count):
        here.manager.submit("compute_sum", {"numbers": [1]}, "normal")
    return here.manager.snapshot()


@pytest.mark.parametrize("count", [0, 1, 2, 1000])
async def test_the_stream_is_json_of_every_length(count: int) -> None:
    """A list is valid JSON at every length, one task a line, in chunks of bounded size."""
    async with world(queue_size=10**4) as here:
        tasks = await list_of(here, count)
        chunks = [chunk async for chunk in main.stream(tasks, None, count)]
        body, line = b"".join(chunks), len(main.encode(tasks[0])) + 2 if tasks else 0
        assert [task["task_id"] for task in json.loads(body)] == [t["task_id"] for t in tasks]
        assert len(body.splitlines()) == (count + 2 if count else 1)
        assert all(main.CHUNK < len(chunk) <= main.CHUNK + line for chunk in chunks[:-1])
        assert len(chunks) == len(body) // main.CHUNK + 1
        for limit in {1, count // 2, count} - {0}:
            assert len(await here.list(limit=limit)) == min(limit, count)


async def test_large_tasks_are_sent_one_by_one() -> None:
    """Others get a turn after 64 KiB, whether these are many tasks or one."""
    async with world(queue_size=10**4) as here:
        for _ in range(5):
            here.manager.submit("compute_sum", {"numbers": [0.123456] * 9000}, "normal")
        chunks = [chunk async for chunk in main.stream(here.manager.snapshot(), None, 5)]
        assert [chunk.count(b"task_id") for chunk in chunks] == [1, 1, 1, 1, 1, 0]


async def test_the_stream_gives_others_a_turn_and_keeps_its_filter() -> None:
    """Between two chunks others run, and a task that changed meanwhile is not listed as it was."""
    async with world(queue_size=10**4) as here:
        tasks, turns = await list_of(here, 1000), 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await real_sleep(0)

        task = asyncio.create_task(other())
        stream = main.stream(tasks, "queued", len(tasks))
        chunks = [await stream.__anext__()]
        here.manager.cancel(tasks[-1]["task_id"])
        chunks += [chunk async for chunk in stream]
        task.cancel()
        assert turns >= len(chunks) - 1 > 3
        assert len(json.loads(b"".join(chunks))) == len(tasks) - 1


async def test_the_stream_stops_at_its_limit() -> None:
    """What comes after the limit is not even looked at."""
    async with world(queue_size=10**4) as here:
        tasks: list[Any] = [*await list_of(here, 3), "not a task"]
        chunks = [chunk async for chunk in main.stream(tasks, None, 3)]
        assert len(json.loads(b"".join(chunks))) == 3


async def test_health_counts_everything() -> None:
    """/health counts by status, places in the queue and workers, and needs no quota."""
    async with world(workers=2, queue_size=7, rate_limit=5) as here:
        ids = [await here.submit() for _ in range(4)]
        await here.cancel(ids[3])
        await ticks()
        answer = await here.http.get("/health")
        assert answer.status_code == 200 and not LIMIT_FIELDS & set(answer.headers)
        assert answer.json() == {
            "status": "ok",
            "tasks": {"queued": 1, "processing": 2, "completed": 0, "failed": 0, "cancelled": 1},
            "queue": {"size": 1, "capacity": 7},
            "workers": {"busy": 2, "total": 2},
        }


async def test_the_root_leads_to_the_docs() -> None:
    """/ redirects to /docs, and the docs are there."""
    async with world() as here:
        answer = await here.http.get("/")
        assert answer.status_code == 307 and answer.headers["location"] == "/docs"
        for path in ("/docs", "/redoc", "/openapi.json"):
            assert (await here.http.get(path)).status_code == 200


OPERATIONS = {
    "submit_task": {"202", "400", "413", "429", "503", "default"},
    "list_tasks": {"200", "400", "429", "default"},
    "get_task": {"200", "400", "404", "429", "default"},
    "cancel_task": {"200", "400", "404", "409", "429", "default"},
    "health": {"200", "503"},
}


async def test_openapi_names_every_answer() -> None:
    """The OpenAPI document has each operation's answers, with their media type, and no 422."""
    async with world() as here:
        document = (await here.http.get("/openapi.json")).json()
        found = [item for path in document["paths"].values() for item in path.values()]
        assert {item["operationId"]: set(item["responses"]) for item in found} == OPERATIONS
        assert document["info"]["title"] == "Task manager" and document["info"]["description"]
        for operation in found:
            assert operation["description"] and operation["summary"]
            for status, answer in operation["responses"].items():
                kind = "json" if status in ("200", "202") else "problem+json"
                assert answer["content"][f"application/{kind}"]["schema"]
                limited = operation["operationId"] != "health"
                assert limited == (
                    {"RateLimit", "RateLimit-Policy"} <= set(answer.get("headers", ()))
                )
                assert ("Location" in answer.get("headers", ())) == (status == "202")
                assert ("Retry-After" in answer.get("headers", ())) == (limited and kind != "json")
                for header in answer.get("headers", {}).values():
                    assert header["schema"] == {"type": "string"}


async def test_openapi_describes_what_to_send() -> None:
    """The OpenAPI document has the poll's query, the bounds of a number, and examples that work."""
    async with world() as here:
        document = (await here.http.get("/openapi.json")).json()
        query = document["paths"]["/tasks/{task_id}"]["get"]["parameters"]
        assert [(p["name"], p["in"]) for p in query] == [
            *[("task_id", "path"), ("wait", "query"), ("since", "query")]
        ]
        assert all(p["schema"] and p["description"] for p in query[1:])
        numbers = document["components"]["schemas"]["SumParameters"]["properties"]["numbers"]
        assert numbers["items"] == {"type": "number", "minimum": -1e300, "maximum": 1e300}
        texts = {"task_id": "string", "code": "string", "message": "string"}
        for name in ("Accepted", "TaskError"):
            for field, schema in document["components"]["schemas"][name]["properties"].items():
                assert schema["type"] == texts.pop(field, None) or schema["const"] == "queued"
        assert not texts
        body = document["paths"]["/tasks"]["post"]["requestBody"]
        examples = body["content"]["application/json"]["examples"]
        for example in examples.values():
            assert (await here.http.post("/tasks", json=example["value"])).status_code == 202
        kinds = [task["task_type"] for task in await here.list()]
        assert kinds == ["compute_sum", "generate_report", "simulate_failure"]


async def test_the_life_of_a_task_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Each step of a task's life is one line, in which a client cannot forge another."""
    async with world(workers=1, retention=1, cleanup_interval=100) as here:
        first = await here.submit()
        await ticks()
        second = await here.submit("simulate_failure", "low", message="a\nb")
        third = await here.submit("simulate_failure", "low")
        await here.cancel(third)
        await real_sleep(100.5)
        assert [r.getMessage() for r in caplog.records if r.name == "uvicorn.error.tasks"] == [
            f"task {first} queued: compute_sum, priority normal",
            f"task {first} processing after 0.0 s",
            f"task {second} queued: simulate_failure, priority low",
            f"task {third} queued: simulate_failure, priority low",
            f"task {third} cancelled after 0.0 s",
            f"task {first} completed after 5.0 s",
            f"task {second} processing after 5.0 s",
            f"task {second} failed after 5.0 s: task_failed, 'a\\nb'",
            "3 expired tasks removed",
        ]


# --- Polling (R2) ---------------------------------------------------------------------------------


async def clock(job: Awaitable[Any]) -> tuple[float, Any]:
    """Await `job` and return how long that took, in virtual seconds, and its result."""
    start = main.now()
    result = await job
    return main.now() - start, result


async def test_a_long_poll_ends_with_the_change() -> None:
    """R2: a poll with `wait=true` is held until the status changes, at that very moment."""
    async with world(workers=1) as here:
        first, second = await here.submit(), await here.submit()
        took, task = await clock(here.get(second, wait=True))
        assert (took, task["status"]) == (5, "processing")
        took, task = await clock(here.get(second, wait=True))
        assert (took, task["status"]) == (5, "completed")
        took, task = await clock(here.get(first, wait=True))
        assert (took, task["status"]) == (0, "completed")


@pytest.mark.parametrize("long_poll", [0, 3, 10])
async def test_a_long_poll_has_its_bound(long_poll: float) -> None:
    """A poll of a task that does not change answers after `long_poll` seconds, with the task."""
    async with world(workers=1, long_poll=long_poll) as here:
        await here.submit("generate_report", title="T", sections=6)
        task_id = await here.submit()
        took, task = await clock(here.get(task_id, wait=True))
        assert (took, task["status"]) == (long_poll, "queued")


async def test_a_poll_without_wait_answers_at_once() -> None:
    """Only `wait=true` waits; `since` alone, and `wait=false`, do not."""
    async with world(workers=1) as here:
        await here.submit()
        task_id = await here.submit()
        for query in ({}, {"since": "queued"}, {"wait": False}):
            took, task = await clock(here.get(task_id, **query))
            assert (took, task["status"]) == (0, "queued")


@pytest.mark.parametrize("since", STATUSES)
async def test_since_is_a_cursor(since: Status) -> None:
    """R2: with `since`, a poll waits only while the status is still that one and not final."""
    async with world(workers=1, long_poll=4) as here:
        await here.submit()
        task_id = await here.submit()
        held, task = await clock(here.get(task_id, wait=True, since=since))
        assert held == (4 if since == "queued" else 0)
        assert task["status"] == "queued"
        await real_sleep(6 - held)
        held, _ = await clock(here.get(task_id, wait=True, since=since))
        assert held == (4 if since == "processing" else 0)
        await real_sleep(5)
        held, task = await clock(here.get(task_id, wait=True, since=since))
        assert (held, task["status"]) == (0, "completed")


async def test_a_change_while_nobody_waits_is_not_lost() -> None:
    """R2: a client that names what it saw last gets each change, though it polls in between."""
    async with world() as here:
        task_id = await here.submit()
        seen: list[str] = ["queued"]
        while seen[-1] in NEXT:
            await real_sleep(1)
            seen.append((await here.get(task_id, wait=True, since=seen[-1]))["status"])
        assert seen == ["queued", "processing", "completed"]


async def test_a_change_between_the_read_and_the_wait() -> None:
    """R2: a task that changes before the poll's waiter has taken a step still ends the poll."""
    async with world(workers=1) as here:
        await here.submit()
        task_id = await here.submit()
        poll = asyncio.create_task(clock(here.manager.wait(task_id)))
        await real_sleep(0)  # it has read the status and taken the Event; its waiter has not run
        here.manager.cancel(task_id)
        took, task = await poll
        assert (took, task["status"]) == (0, "cancelled")


@pytest.mark.parametrize("delay", range(6))
async def test_a_change_at_any_tick_of_a_poll(delay: int) -> None:
    """R2: at whichever tick after the start of a poll the task changes, the poll sees it."""
    async with world(workers=1) as here:
        await here.submit()
        task_id = await here.submit()
        poll = asyncio.create_task(clock(here.manager.wait(task_id, "queued")))
        await ticks(delay)
        here.manager.cancel(task_id)
        took, task = await poll
        assert (took, task["status"]) == (0, "cancelled")


async def test_any_number_may_poll_one_task() -> None:
    """R2: one change wakes all that wait for it, and the next one all that wait again."""
    async with world(workers=1) as here:
        await here.submit()
        task_id = await here.submit()
        for status in ("processing", "completed"):
            polls = [asyncio.create_task(clock(here.manager.wait(task_id))) for _ in range(200)]
            assert {(took, t["status"]) for took, t in await asyncio.gather(*polls)} == {
                (5, status)
            }
        assert task_id not in here.manager._changed


async def test_an_event_is_set_once_and_never_cleared() -> None:
    """R2: a change sets the Event that was there before it, and the next waiter gets a new one."""
    async with world(workers=1) as here:
        await here.submit()
        task_id, events = await here.submit(), []
        for _ in range(2):
            poll = asyncio.create_task(here.manager.wait(task_id))
            await ticks()
            events.append(here.manager._changed[task_id])
            assert not events[-1].is_set()
            await poll
        assert events[0] is not events[1] and all(event.is_set() for event in events)


async def test_a_poller_may_leave() -> None:
    """A cancelled poll is cancelled at once, leaves no waiter, and the others go on."""
    async with world(workers=1) as here:
        await here.submit()
        task_id = await here.submit()
        polls = [asyncio.create_task(here.manager.wait(task_id)) for _ in range(2)]
        await ticks()
        polls[0].cancel()
        await ticks()
        assert polls[0].cancelled() and not polls[1].done()
        assert len(here.manager._changed[task_id]._waiters) == 1
        assert (await polls[1])["status"] == "processing"


async def test_a_poller_outlives_the_record() -> None:
    """A poll answers with the final task though that has expired before the poll could resume."""
    async with world(long_poll=100, retention=1) as here:
        task_id = await here.submit()
        await ticks()
        poll = asyncio.create_task(here.manager.wait(task_id))
        await ticks()
        here.manager.cancel(task_id)
        here.manager._tasks.pop(here.manager._finished.popleft()[1])  # as a late clean-up would
        assert (await poll)["status"] == "cancelled"


async def test_polls_do_not_keep_what_has_ended() -> None:
    """A final task has no Event and no handle, also if polls of it had timed out."""
    async with world(long_poll=1) as here:
        task_id = await here.submit()
        await ticks()
        await here.get(task_id, wait=True)
        assert task_id in here.manager._changed
        await real_sleep(5)
        assert not here.manager._changed and not here.manager._running


# --- Final is final (R3) --------------------------------------------------------------------------


PATHS: dict[Status, list[Status]] = {"queued": [], "cancelled": ["cancelled"]}
PATHS |= {"processing": ["processing"], "completed": ["processing", "completed"]}
PATHS |= {"failed": ["processing", "failed"]}
ALLOWED: set[tuple[Status, Status]] = {("queued", "processing"), ("queued", "cancelled")}
ALLOWED |= {("processing", "completed"), ("processing", "failed"), ("processing", "cancelled")}


@pytest.mark.parametrize("before", STATUSES)
@pytest.mark.parametrize("after", STATUSES)
async def test_only_the_tables_transitions_happen(before: Status, after: Status) -> None:
    """R3: of all ordered pairs of statuses only five are possible; the others change nothing."""
    manager = TaskManager(Settings())
    task = manager.submit("compute_sum", {"numbers": [1]}, "normal")
    error = {"code": "timeout", "message": "m"}
    for status in PATHS[before]:
        assert manager._move(task, status, error)
    copy = task.copy()
    assert manager._move(task, after, error) == ((before, after) in ALLOWED)
    if (before, after) in ALLOWED:
        assert task["status"] == after != before
    else:
        assert task == copy


async def test_the_cancel_table() -> None:
    """DELETE: 200 queued, 200 processing, 200 again, 409 completed or failed, 404 unknown."""
    async with world(workers=1) as here:
        done, bad = await here.submit(), await here.submit("simulate_failure")
        await real_sleep(10.5)
        running, queued = await here.submit(), await here.submit()
        await ticks()
        for task_id, started in ((queued, False), (running, True), (queued, False)):
            answer = await here.cancel(task_id)
            assert answer.status_code == 200 and answer.json() == await here.get(task_id)
            assert (answer.json()["status"], answer.json()["error"]) == ("cancelled", None)
            assert bool(answer.json()["started_at"]) == started and answer.json()["expires_at"]
        for task_id, status in ((done, "completed"), (bad, "failed")):
            body = problem_of(answer := await here.cancel(task_id))
            assert answer.status_code == 409
            assert body["detail"] == f"The task has already {status}."
            assert body["task"] == await here.get(task_id) and body["task"]["status"] == status
        assert problem_of(await here.cancel(NOBODY))["status"] == 404


async def test_cancelled_twice_is_cancelled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second DELETE changes nothing: it does not disturb the clean-up that the first began."""
    cleaned = []

    async def job(task: Task) -> None:
        try:
            await asyncio.sleep(9)
        finally:
            await asyncio.sleep(2)
            cleaned.append(task["task_id"])

    work(monkeypatch, job)
    async with world() as here:
        task_id = await here.submit()
        await real_sleep(1)
        first = (await here.cancel(task_id)).json()
        await real_sleep(1)
        assert (await here.cancel(task_id)).json() == first
        await real_sleep(1.5)
        assert cleaned == [task_id]


async def complete(task: Task) -> str:
    for _ in range(4):
        await asyncio.sleep(0)
    return "done"


async def fail(task: Task) -> None:
    for _ in range(4):
        await asyncio.sleep(0)
    raise TaskFailedError("failed")


async def swallow(task: Task) -> str:
    for _ in range(8):
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0)
    return "swallowed"


@pytest.mark.parametrize("tick", range(20))
@pytest.mark.parametrize("job", [complete, fail, swallow])
async def test_the_race_of_cancel_and_finish(
    tick: int, job: Callable[[Task], Awaitable[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """R3: at whichever tick DELETE comes, there is one final state, and it is what DELETE said."""
    work(monkeypatch, job)
    async with world(workers=1) as here:
        task_id, after = await here.submit(), await here.submit()
        moves = []
        move = TaskManager._move

        def spy(manager: TaskManager, task: Task, status: Status, outcome: Any = None) -> bool:
            moved = move(manager, task, status, outcome)
            moves.extend([status] if moved and task["task_id"] == task_id else [])
            return moved

        monkeypatch.setattr(TaskManager, "_move", spy)
        await ticks(tick)
        answer = await here.cancel(task_id)
        said = answer.json().get("task", answer.json())
        await real_sleep(1)
        assert await here.get(task_id) == said
        assert answer.status_code == (200 if said["status"] == "cancelled" else 409)
        assert len([status for status in moves if status not in NEXT]) <= 1
        assert (said["result"] == "done") == (said["status"] == "completed" and job is complete)
        assert (await here.get(after))["status"] in ("completed", "failed")


async def test_cancelled_work_is_interrupted(sleeper: Sleeper) -> None:
    """R3: DELETE also stops the work, so that its worker takes the next task at once."""
    async with world(workers=1) as here:
        task_id, after = await here.submit("generate_report", title="T"), await here.submit()
        await real_sleep(1.25)
        await here.cancel(task_id)
        await ticks()
        assert (await here.get(after))["status"] == "processing"
        assert sleeper.slept.count(1.5) == 1
        task = await here.get(task_id)
        assert (task["progress"], task["result"]) == (0, None)


async def test_what_work_says_after_its_cancellation_is_ignored(
    monkeypatch: pytest.MonkeyPatch, expected_errors: list[str]
) -> None:
    """R3: neither a result nor progress, nor an exception, of cancelled work is recorded."""
    async with world() as here:

        async def job(task: Task) -> str:
            try:
                await asyncio.sleep(9)
            except asyncio.CancelledError:
                here.manager._report(task, 50)
                if task["priority"] == "high":
                    raise ValueError("in the clean-up") from None
            return "late"

        work(monkeypatch, job)
        expected_errors.append("raised an unexpected exception")
        for priority in ("low", "high"):
            task_id = await here.submit(priority=priority)
            await real_sleep(1)
            said = (await here.cancel(task_id)).json()
            await real_sleep(1)
            assert await here.get(task_id) == said
            assert (said["status"], said["progress"], said["result"]) == ("cancelled", 0, None)


# --- The queue (R4) -------------------------------------------------------------------------------


async def test_a_full_queue_leaves_no_trace() -> None:
    """R4: beyond its capacity the queue answers 503 with Retry-After, and the task is nowhere."""
    async with world(workers=1, queue_size=2) as here:
        await here.submit()
        await ticks()
        ids = [await here.submit(), await here.submit()]
        answer = await here.http.post("/tasks", json={"task_type": "simulate_failure"})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert problem_of(answer)["detail"] == "The queue is full."
        health = await here.health()
        assert sum(health["tasks"].values()) == 3 and health["queue"] == {"size": 2, "capacity": 2}
        assert (await here.cancel(ids[0])).status_code == 200
        ids.append(await here.submit())
        await real_sleep(15.5)
        assert [(await here.get(i))["status"] for i in ids] == [
            "cancelled",
            "completed",
            "completed",
        ]


async def test_a_storm_of_submit_and_cancel_leaves_the_queue_empty() -> None:
    """R4: a cancelled task gives its place back at once, a thousand times over."""
    async with world(workers=1, queue_size=3) as here:
        running = await here.submit()
        await ticks()
        for _ in range(1000):
            tasks = [here.manager.submit("compute_sum", {"numbers": [1]}, "low") for _ in range(3)]
            for task in random.sample(tasks, 3):
                here.manager.cancel(task["task_id"])
            assert here.manager._queue.empty()
        assert (await here.get(running, wait=True))["status"] == "completed"


@pytest.mark.parametrize("victim", range(6))
async def test_removal_keeps_the_order_of_the_rest(victim: int) -> None:
    """R4: whichever queued task is cancelled, the others start in the order that they had."""
    async with world(workers=1, priority_step=30) as here:
        await here.submit()
        await ticks()
        ids = []
        for priority in ("high", "high", "normal", "normal", "high", "high"):
            ids.append(await here.submit(priority=priority))
        await here.cancel(ids[victim])
        await real_sleep(60)
        tasks = [await here.get(ids[i]) for i in (0, 1, 4, 5, 2, 3) if i != victim]
        starts = [task["started_at"] for task in tasks]
        assert starts == sorted(starts) and len(set(starts)) == 5


async def test_cancelled_between_the_wake_and_the_take() -> None:
    """R4: a worker that was woken for a task that is cancelled meanwhile takes the next one."""
    async with world(workers=1) as here:
        await ticks()
        first = here.manager.submit("compute_sum", {"numbers": [1]}, "normal")
        here.manager.cancel(first["task_id"])
        second = here.manager.submit("compute_sum", {"numbers": [1]}, "normal")
        await ticks()
        assert (first["status"], second["status"]) == ("cancelled", "processing")
        assert first["started_at"] is None


async def test_a_task_is_queued_until_it_is_processing() -> None:
    """R1, R4: at no tick has a task left the queue and is not processing yet."""
    async with world(workers=2) as here:
        for _ in range(3):
            here.manager.submit("compute_sum", {"numbers": [1]}, "normal")
        for _ in range(10):
            here.check_books()
            await ticks(1)
        assert here.manager.health()["workers"]["busy"] == 2


async def starts(here: World, ids: list[str]) -> list[float]:
    """Return when the tasks started, in seconds after the first submission."""
    tasks = [await here.get(task_id) for task_id in ids]
    zero = min(datetime.fromisoformat(task["created_at"][:-1]) for task in tasks)
    dates = [datetime.fromisoformat(task["started_at"][:-1]) for task in tasks]
    return [(date - zero).total_seconds() for date in dates]


async def test_five_at_once_and_never_six(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five tasks run at a time, a sixth starts when the first ends, in order of submission."""
    running, most = 0, 0

    async def job(task: Task) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(5)
        running -= 1

    work(monkeypatch, job)
    async with world() as here:
        ids = [await here.submit() for _ in range(12)]
        await real_sleep(30)
        assert await starts(here, ids) == [0.0] * 5 + [5.0] * 5 + [10.0] * 2
        assert most == 5


async def test_a_free_worker_does_not_wait_for_a_slow_task() -> None:
    """Beside one slow task the other worker goes on, task after task."""
    async with world(workers=2) as here:
        ids = [await here.submit("generate_report", title="T", sections=6)]
        ids += [await here.submit() for _ in range(5)]
        await real_sleep(40)
        assert await starts(here, ids) == [0, 0, 5, 10, 15, 20]


async def test_priority_then_first_come_first_served() -> None:
    """The higher priority starts first, and within one the older task."""
    async with world(workers=1) as here:
        await here.submit()
        await ticks()
        ids: dict[str, list[str]] = {"low": [], "normal": [], "high": []}
        for priority in [*ids, *ids]:
            ids[priority].append(await here.submit(priority=priority))
        await real_sleep(40)
        order = [*ids["high"], *ids["normal"], *ids["low"]]
        assert await starts(here, order) == [5, 10, 15, 20, 25, 30]


@pytest.mark.parametrize(
    ("later", "first", "second"),
    [(59.5, "high", "low"), (60, "low", "high"), (60.5, "low", "high")],
)
async def test_nothing_starves(later: float, first: str, second: str) -> None:
    """A level is worth `priority_step` seconds: low overtakes high after two of them, not before."""
    async with world(workers=1, task_timeout=1000, time_scale=20, priority_step=30) as here:
        await here.submit()
        await ticks()
        ids = {"low": await here.submit(priority="low")}
        await real_sleep(later)
        ids["high"] = await here.submit(priority="high")
        await real_sleep(320)
        started = {name: (await here.get(ids[name]))["started_at"] for name in ids}
        assert started[first] < started[second]


async def test_without_a_priority_step_the_queue_is_a_queue() -> None:
    """With `priority_step` 0, who came first starts first."""
    async with world(workers=1, priority_step=0) as here:
        ids = [await here.submit(priority=p) for p in ("low", "normal", "high")]
        await real_sleep(16)
        assert await starts(here, ids) == [0, 5, 10]


# --- Workers (R5) ---------------------------------------------------------------------------------


class Strange(BaseException):
    """Neither an Exception nor a cancellation."""


async def raise_value_error(task: Task) -> None:
    raise ValueError("secret /etc/passwd")


async def raise_system_exit(task: Task) -> None:
    sys.exit(3)


async def return_an_object(task: Task) -> object:
    return object()


async def return_a_surrogate(task: Task) -> str:
    return "\ud800"


UNEXPECTED = [raise_value_error, raise_system_exit, return_an_object, return_a_surrogate]


@pytest.mark.parametrize("job", UNEXPECTED)
async def test_an_unexpected_exception_stays_inside(
    job: Callable[[Task], Awaitable[Any]],
    monkeypatch: pytest.MonkeyPatch,
    expected_errors: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """R5: a bug in a task is logged with its traceback; its client learns only that it failed."""
    work(monkeypatch, job)
    async with world(workers=1) as here:
        task_id = await here.submit()
        expected_errors.append(f"task {task_id} raised an unexpected exception")
        task = await here.get(task_id, wait=True)
        message = "The task failed unexpectedly."
        assert task["error"] == {"code": "internal_error", "message": message}
        assert "secret" not in (await here.http.get("/tasks")).text
        assert "Traceback" in caplog.text
        monkeypatch.undo()
        assert (await here.get(await here.submit(), wait=True))["status"] == "processing"


async def raise_cancelled(task: Task) -> None:
    raise asyncio.CancelledError


async def raise_strange(task: Task) -> None:
    raise Strange


@pytest.mark.parametrize("job", [raise_cancelled, raise_strange])
async def test_work_that_ends_without_a_word_is_cancelled(
    job: Callable[[Task], Awaitable[Any]],
    monkeypatch: pytest.MonkeyPatch,
    expected_errors: list[str],
) -> None:
    """R5: a task that cancels itself, or dies of what nobody may catch, ends, and its worker does not."""
    expected_errors += ["never retrieved"] if job is raise_strange else []
    work(monkeypatch, job)
    async with world(workers=1) as here:
        ids = [await here.submit(), await here.submit()]
        await ticks(20)
        assert [(await here.get(task_id))["status"] for task_id in ids] == ["cancelled"] * 2


async def test_a_result_that_is_no_number_is_null(monkeypatch: pytest.MonkeyPatch) -> None:
    """A NaN in a result is null in the answer, so that the answer is JSON."""

    async def job(task: Task) -> list[float]:
        return [float("nan"), float("inf")]

    work(monkeypatch, job)
    async with world() as here:
        assert (await here.get(await here.submit(), wait=True))["result"] == [None, None]
        assert (await here.list())[0]["result"] == [None, None]


async def test_a_failure_message_is_made_fit_for_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lone surrogate in the message of a TaskFailedError breaks neither the task nor the list."""

    async def job(task: Task) -> None:
        raise TaskFailedError("file \udcff")

    work(monkeypatch, job)
    async with world() as here:
        task = await here.get(await here.submit(), wait=True)
        assert task["error"] == {"code": "task_failed", "message": "file ?"}
        assert await here.list() == [task]


@pytest.mark.parametrize(("timeout", "status"), [(4.9, "failed"), (5.1, "completed")])
async def test_a_task_has_its_time_and_no_more(timeout: float, status: str) -> None:
    """R5: a task that runs longer than `task_timeout` fails then, and its worker goes on."""
    async with world(workers=1, task_timeout=timeout) as here:
        ids = [await here.submit(), await here.submit()]
        await real_sleep(min(timeout, 5) + 0.01)
        task = await here.get(ids[0])
        assert task["status"] == status
        assert (await here.get(ids[1]))["status"] == "processing"
        if status == "failed":
            message = "The task took too long."
            assert task["error"] == {"code": "timeout", "message": message}
            assert task["progress"] == 90


@pytest.mark.parametrize("error", [TimeoutError, asyncio.TimeoutError])
async def test_a_timeout_within_the_work_is_one_too(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the work itself calls a timeout is told as one, without its words."""

    async def job(task: Task) -> None:
        raise error("of 10.1.2.3")

    work(monkeypatch, job)
    async with world() as here:
        task = await here.get(await here.submit(), wait=True)
        assert task["error"] == {"code": "timeout", "message": "The task took too long."}


async def test_an_unknown_type_fails(expected_errors: list[str]) -> None:
    """A type that the executor does not know does not complete."""
    expected_errors.append("unexpected exception")
    async with world() as here:
        task = here.manager.submit("mistake", {}, "normal")  # type: ignore[arg-type]  # that is it
        await ticks(20)
        assert task["status"] == "failed" and task["error"]
        assert task["error"]["code"] == "internal_error"


@pytest.mark.parametrize("end", ["timeout", "cancel"])
async def test_work_that_ignores_its_cancellation(
    end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R5: it keeps its worker no longer than its time-out and grace; its record is final at once."""

    async def job(task: Task) -> str:
        until = main.now() + (60 if task["priority"] == "low" else 1)
        while main.now() < until:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(until - main.now())
        return "late"

    work(monkeypatch, job)
    async with world(workers=1, task_timeout=10) as here:
        task_id, after = await here.submit(priority="low"), await here.submit(priority="low")
        await real_sleep(2)
        if end == "cancel":
            await here.cancel(task_id)
        await real_sleep(8 + 5 - 0.01)  # what is left of the time-out, and the grace
        status = {"timeout": "failed", "cancel": "cancelled"}[end]
        assert (await here.get(task_id))["status"] == status
        assert (await here.get(after))["status"] == "queued"
        await real_sleep(0.02)
        assert (await here.get(after))["status"] == "processing"
        assert (await here.health())["workers"] == {"busy": 2, "total": 1}
        await real_sleep(100)
        assert (await here.get(task_id))["result"] is None
        assert (await here.health())["workers"]["busy"] == 0


async def test_cancelled_work_keeps_its_worker_while_it_cleans_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Never six: the place of a task that timed out is free only when its clean-up has ended."""

    async def job(task: Task) -> None:
        try:
            await asyncio.sleep(100)
        finally:
            await asyncio.sleep(3)

    work(monkeypatch, job)
    async with world(workers=1, task_timeout=10) as here:
        ids = [await here.submit(), await here.submit()]
        await real_sleep(30)
        assert await starts(here, ids) == [0, 13]


async def test_a_dead_batch_turns_health_red(
    monkeypatch: pytest.MonkeyPatch, expected_errors: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """When a worker dies, all stop: /health and POST answer 503, and no task is left hanging."""
    async with world(workers=2) as here:
        running = await here.submit()
        await ticks()

        async def die(_: TaskManager, task: Task) -> None:
            raise RuntimeError("a bug")

        monkeypatch.setattr(TaskManager, "_run", die)
        expected_errors.append("a worker died, so all stop")
        queued = [await here.submit() for _ in range(3)]
        await ticks(10)
        for answer in (
            await here.http.get("/health"),
            await here.http.post("/tasks", json={"task_type": "simulate_failure"}),
        ):
            assert answer.status_code == 503 and problem_of(answer)["detail"] == "No workers."
        assert "RuntimeError: a bug" in caplog.text
        assert {(await here.get(i))["status"] for i in [running, *queued]} == {"cancelled"}


# --- Clean-up -------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["completed", "failed", "cancelled"])
async def test_a_final_task_goes_at_its_instant(end: str) -> None:
    """A final task is there until `retention` seconds after its end, and not a moment longer."""
    async with world(retention=600, cleanup_interval=10**6) as here:
        task_id = await here.submit("simulate_failure" if end == "failed" else "compute_sum")
        await real_sleep(2)
        if end == "cancelled":
            await here.cancel(task_id)
        else:
            await real_sleep(3)
            await ticks()
        assert (await here.get(task_id))["status"] == end
        await real_sleep(599.875)
        assert (await here.get(task_id))["status"] == end
        await real_sleep(0.125)
        answer = await here.http.get(f"/tasks/{task_id}")
        assert answer.status_code == 404
        assert problem_of(answer)["detail"] == "There is no such task. It may have expired."
        assert (await here.cancel(task_id)).status_code == 404


@pytest.mark.parametrize("reader", ["snapshot", "health"])
async def test_no_reader_sees_an_expired_task(reader: str) -> None:
    """The list and the counts end at the same instant as the single task."""
    async with world(retention=10, cleanup_interval=10**6) as here:
        await here.cancel(await here.submit())
        for wait, count in ((9.5, 1), (0.5, 0)):
            await real_sleep(wait)
            if reader == "snapshot":
                assert len(await here.list()) == count
            else:
                assert (await here.health())["tasks"]["cancelled"] == count


async def test_the_timer_gives_memory_back() -> None:
    """Every `cleanup_interval` seconds what has expired is dropped, though nobody asks for it."""
    async with world(retention=45, cleanup_interval=30, rate_limit=50, rate_window=20) as here:
        for _ in range(3):
            await here.cancel(await here.submit())
            await real_sleep(10)
        assert (len(here.manager._tasks), len(here.limiter._hits)) == (3, 1)
        await real_sleep(29)
        assert (len(here.manager._tasks), len(here.limiter._hits)) == (3, 1)
        await real_sleep(1.5)
        assert (len(here.manager._tasks), len(here.limiter._hits)) == (1, 0)
        await real_sleep(30)
        assert not here.manager._tasks and not here.manager._finished


async def test_what_is_not_final_never_expires() -> None:
    """A queued and a processing task stay, however short the retention is."""
    async with world(workers=1, retention=1, cleanup_interval=1, time_scale=10) as here:
        ids = [await here.submit(), await here.submit()]
        await real_sleep(45)
        assert [(await here.get(task_id))["status"] for task_id in ids] == ["processing", "queued"]


# --- Rate limit -----------------------------------------------------------------------------------


async def test_ten_requests_a_minute() -> None:
    """Ten requests pass, the eleventh is refused with an honest Retry-After, which is enough."""
    async with world(rate_limit=10) as here:
        start = main.now()
        for number in range(10):
            answer = await here.http.get("/tasks")
            assert answer.status_code == 200
            assert answer.headers["ratelimit"] == f'"default";r={9 - number};t={60 - 2 * number}'
            await real_sleep(2)
        answer = await here.http.get("/tasks")
        assert answer.status_code == 429 and answer.headers["retry-after"] == "40"
        assert problem_of(answer)["detail"] == "Try again in 40 s."
        assert answer.headers["ratelimit"] == '"default";r=0;t=40'
        await real_sleep(39.5)
        assert (await here.http.get("/tasks")).headers["retry-after"] == "1"
        await real_sleep(0.5)
        assert main.now() == start + 60
        assert (await here.http.get("/tasks")).status_code == 200
        answer = await here.http.get("/tasks")
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "2")


async def test_retry_after_is_enough_for_any_fraction() -> None:
    """Whoever waits as long as Retry-After says is let in, at whatever fractions of a second."""
    generator = random.Random(7)
    limiter = main.RateLimiter(3, 60)
    for _ in range(500):
        await real_sleep(generator.uniform(0, 30))
        allowed, left, reset = await limiter.hit("key")
        assert left == 3 - len(limiter._hits["key"]) and reset >= 1
        if not allowed:
            await real_sleep(reset)
            assert (await limiter.hit("key"))[0]


async def test_a_refused_request_does_not_count() -> None:
    """A client that keeps knocking is let in as soon as one that waits."""
    async with world(rate_limit=2, rate_window=10) as here:
        answers = [(await here.http.get("/tasks")).status_code for _ in range(50)]
        await real_sleep(10)
        answers += [(await here.http.get("/tasks")).status_code for _ in range(3)]
        assert answers == [200, 200, *[429] * 48, 200, 200, 429]


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/tasks", b"{", 400),
        ("POST", "/tasks", b"x" * 70_000, 413),
        ("POST", "/tasks", b"\xff\xfe{\0}\0", 400),
        ("GET", "/nowhere", None, 404),
        ("PUT", "/tasks", None, 405),
        ("GET", "/tasks/", None, 404),
        ("GET", "/tasks/x", None, 400),
        ("GET", f"/tasks/{NOBODY}?wait=maybe", None, 400),
        ("GET", f"/tasks/{NOBODY}", None, 404),
        ("DELETE", f"/tasks/{NOBODY}", None, 404),
        ("GET", "/docs/oauth2-redirect", None, 404),
    ],
)
async def test_every_answer_counts_and_says_so(
    method: str, path: str, body: bytes | None, status: int
) -> None:
    """Errors count as much as successes, and each limited answer has the limit's header fields."""
    async with world(rate_limit=2) as here:
        headers = {"Content-Type": "application/json"}
        for expected, left in ((status, 1), (status, 0), (429, 0)):
            answer = await here.http.request(method, path, content=body, headers=headers)
            assert answer.status_code == expected and problem_of(answer)
            assert answer.headers["ratelimit-policy"] == '"default";q=2;w=60'
            assert answer.headers["ratelimit"] == f'"default";r={left};t=60'
            assert answer.headers["cache-control"] == "no-store"
            assert ("retry-after" in answer.headers) == (expected == 429)


async def test_a_refused_body_is_not_read() -> None:
    """The limit is decided before anyone reads the body."""
    app = create_app(Settings(rate_limit=1))
    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/tasks", "root_path": ""}
    scope |= {"client": ("10.0.0.1", 1), "query_string": b"", "headers": []}
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        raise AssertionError("the body was read")

    async def send(message: Any) -> None:
        sent.append(message)

    await app.state.limiter.hit("10.0.0.1")
    await app(scope, receive, send)
    assert sent[0]["status"] == 429


async def test_what_is_not_http_passes_by() -> None:
    """A WebSocket handshake on any path is refused by the router, and does not count."""
    app = create_app(Settings(rate_limit=1))
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope: dict[str, Any] = {"type": "websocket", "path": "/tasks", "root_path": "", "headers": []}
    await app(scope | {"client": ("10.0.0.1", 1), "query_string": b""}, receive, send)
    assert sent[0]["type"] == "websocket.close" and not app.state.limiter._hits


@pytest.mark.parametrize("path", ["/", "/docs", "/redoc", "/openapi.json", "/health"])
async def test_some_paths_are_free(path: str) -> None:
    """Documentation and health neither need quota nor use it."""
    async with world(rate_limit=1) as here:
        for _ in range(3):
            answer = await here.http.get(path)
            assert answer.status_code < 400 and not LIMIT_FIELDS & set(answer.headers)
        assert (await here.http.get("/tasks")).status_code == 200
        assert (await here.http.get("/tasks")).status_code == 429
        assert (await here.http.get(path)).status_code < 400


@pytest.mark.parametrize(
    ("host", "same", "other"),
    [
        ("192.0.2.1", ["192.0.2.1", "::ffff:192.0.2.1"], ["192.0.2.2", "2001:db8::1", None]),
        ("2001:db8::1", ["2001:db8:0:0:ffff::9"], ["2001:db8:0:1::1", "192.0.2.1", None]),
        ("::1", ["::2"], ["0:0:0:1::", None]),
        (None, ["not an ip", "x" * 20_000, "", "300.1.1.1"], ["192.0.2.1", "::1"]),
    ],
)
async def test_who_shares_a_bucket(
    host: str | None, same: list[str | None], other: list[str | None]
) -> None:
    """One bucket an IPv4 address, mapped or not, one an IPv6 /64, and one for all that is neither."""
    async with world(rate_limit=1) as here:
        async with here.client(host) as client:
            assert (await client.get("/tasks")).status_code == 200
        for hosts, status in ((same, 429), (other, 200)):
            for address in hosts:
                async with here.client(address) as client:
                    assert (await client.get("/tasks")).status_code == status, address


async def test_the_header_of_a_proxy_is_not_read() -> None:
    """X-Forwarded-For is uvicorn's to trust: here it changes nothing."""
    async with world(rate_limit=1) as here:
        for number, status in ((1, 200), (2, 429)):
            headers = {"X-Forwarded-For": f"192.0.2.{number}", "Forwarded": f"for=192.0.2.{number}"}
            assert (await here.http.get("/tasks", headers=headers)).status_code == status


async def test_the_limiter_keeps_only_what_it_needs() -> None:
    """At most `limit` times a key, and no key whose window is empty after a sweep."""
    limiter = main.RateLimiter(3, 60)
    for number in range(1000):
        await limiter.hit(f"once {number}")
        await limiter.hit("often")
    assert len(limiter._hits) == 1001 and len(limiter._hits["often"]) == 3
    await real_sleep(59)
    await limiter.hit("late")
    await limiter.sweep()
    assert len(limiter._hits) == 1002
    await real_sleep(1)
    await limiter.sweep()
    assert set(limiter._hits) == {"late"}


async def test_the_limiter_works_for_many_at_once() -> None:
    """Of many requests at the same moment exactly `limit` pass."""
    async with world(rate_limit=10) as here:
        answers = await asyncio.gather(*(here.http.get("/tasks") for _ in range(50)))
        assert Counter(answer.status_code for answer in answers) == {200: 10, 429: 40}


# --- Bad input and errors -------------------------------------------------------------------------


def of_sum(numbers: str) -> bytes:
    return b'{"task_type": "compute_sum", "parameters": {"numbers": %b}}' % numbers.encode()


def of_report(more: str) -> bytes:
    return b'{"task_type": "generate_report", "parameters": {%b}}' % more.encode()


NUMBER = "Input should be a number from -1e300 to 1e300"
PLAIN = "Input should be an object"
OBJECT = "Input should be an object sent as application/json"
NOT_JSON = "Not JSON in UTF-8, or nested too deep, or a number with too many digits"
TYPE = "Input should be one of compute_sum, generate_report, simulate_failure"
EXTRA = "Extra inputs are not permitted"
MALFORMED = "Malformed JSON at character 13"
# Our own texts, which are compared to the letter; the others are pydantic's.
OURS = {MALFORMED, NUMBER, OBJECT, NOT_JSON, TYPE, EXTRA, "Field required", PLAIN}
# fmt: off
BAD_BODIES = [
    (b"", "#", "Field required"),
    (b'{"task_type":', "#", MALFORMED),
    (b"[]", "#", OBJECT),
    (b"null", "#", OBJECT),
    (b'{"task_type": "\xe9"}', "#", NOT_JSON),
    (of_sum("[1]").decode().encode("utf-16"), "#", NOT_JSON),
    (of_sum("[1]").decode().encode("utf-16-le"), "#", NOT_JSON),
    (of_sum("[1]").decode().encode("utf-32"), "#", NOT_JSON),
    (b"[" * 30_000, "#", NOT_JSON),
    (of_sum("[%s]" % ("9" * 5000)), "#", NOT_JSON),
    (of_sum("[NaN]"), "#/parameters/numbers/0", NUMBER),
    (of_sum("[0, Infinity]"), "#/parameters/numbers/1", NUMBER),
    (of_sum("[-Infinity]"), "#/parameters/numbers/0", NUMBER),
    (of_sum("[1e400]"), "#/parameters/numbers/0", NUMBER),
    (of_sum("[%s]" % ("9" * 4000)), "#/parameters/numbers/0", NUMBER),
    (of_sum("[1.1e300]"), "#/parameters/numbers/0", NUMBER),
    (of_sum("[-1.1e300]"), "#/parameters/numbers/0", NUMBER),
    (of_sum("[true]"), "#/parameters/numbers/0", NUMBER),
    (of_sum('["5"]'), "#/parameters/numbers/0", NUMBER),
    (of_sum("[null, true]"), "#/parameters/numbers/0", NUMBER),
    (of_sum("[]"), "#/parameters/numbers", "at least 1 item"),
    (of_sum("[%s]" % ("1," * 10_000 + "1")), "#/parameters/numbers", "at most 10000 items"),
    (of_sum('{"a": 1}'), "#/parameters/numbers", "valid list"),
    (b'{"task_type": "compute_sum"}', "#/parameters", "Field required"),
    (b'{"task_type": "compute_sum", "parameters": {}}', "#/parameters/numbers", "Field required"),
    (b'{"task_type": "compute_sum", "parameters": 5}', "#/parameters", PLAIN),
    (of_sum('[1], "~a/b%": 1'), "#/parameters/~0a~1b%25", EXTRA),
    (of_sum('[1], "\\ud800": 1'), "#/parameters", "unicode"),
    (b'{"task_type": "simulate_failure", "prority": 1}', "#/prority", EXTRA),
    (b'{"task_type": "simulate_failure", "parameters": {"m": 1}}', "#/parameters/m", EXTRA),
    (b'{"task_type": "compute_sum", "parameters": {"numbers": [1]}, "x": 1}', "#/x", EXTRA),
    (b'{"task_type": "generate_report", "parameters": {"title": "t"}, "x": 1}', "#/x", EXTRA),
    (of_report('"title": "t", "x": 1'), "#/parameters/x", EXTRA),
    (b'{"task_type": "simulate_failure", "%b": 1}' % (b"k" * 9000), "#/" + "k" * 50, EXTRA),
    (b'{"task_type": "simulate_failure", "priority": "urgent"}', "#/priority", "'low'"),
    (b'{"task_type": "simulate_failure", "priority": 1}', "#/priority", "'low'"),
    (b'{"task_type": "simulate_failure", "parameters": {"message": ""}}', "#/parameters/message", ""),
    (b'{"parameters": {}}', "#/task_type", TYPE),
    (b'{"task_type": "%b"}' % (b"x" * 9000), "#/task_type", TYPE),
    (b'{"task_type": "\\ud800"}', "#/task_type", TYPE),
    (b'{"task_type": 5}', "#/task_type", TYPE),
    (of_report('"title": ""'), "#/parameters/title", "at least 1 character"),
    (of_report('"title": "%s"' % ("t" * 201)), "#/parameters/title", "at most 200 characters"),
    (of_report('"title": "\\ud800"'), "#/parameters/title", "unicode"),
    (of_report('"title": 5'), "#/parameters/title", "valid string"),
    (of_report('"title": "t", "sections": true'), "#/parameters/sections", "valid integer"),
    (of_report('"title": "t", "sections": "3"'), "#/parameters/sections", "valid integer"),
    (of_report('"title": "t", "sections": 0'), "#/parameters/sections", "greater than or equal to 1"),
    (of_report('"title": "t", "sections": 7'), "#/parameters/sections", "less than or equal to 6"),
]
# fmt: on


@pytest.mark.parametrize(("body", "pointer", "detail"), BAD_BODIES)
async def test_bad_bodies_are_refused_at_the_door(body: bytes, pointer: str, detail: str) -> None:
    """Poison gets a short 400 that points at it, and leaves nothing in the store."""
    async with world() as here:
        headers = {"Content-Type": "application/json"}
        answer = await here.http.post("/tasks", content=body, headers=headers)
        assert answer.status_code == 400 and len(answer.content) < 500
        problem = problem_of(answer)
        assert problem["detail"] == "The request is not valid."
        assert [error["pointer"] for error in problem["errors"]] == [pointer]
        found = problem["errors"][0]["detail"]
        assert found == detail if detail in OURS else detail in found
        assert await here.list() == []


@pytest.mark.parametrize(
    "body",
    [
        of_sum("[1e300, -1e300, 0.1, -0.0]"),
        of_sum(f"[{'1,' * 9_999}1]"),
        of_report(f'"title": "{"t" * 200}", "sections": 6'),
        of_report('"title": "\\u0000\\ud83d\\ude00"'),
        b'\xef\xbb\xbf{"task_type": "simulate_failure"}',
        b'{"task_type": "simulate_failure", "parameters": {}}',
    ],
)
async def test_good_bodies_at_the_edge_are_taken(body: bytes) -> None:
    """What is just within the bounds is accepted, and comes back in valid JSON."""
    async with world() as here:
        for kind in ("application/json", "application/json; charset=utf-8", "application/x+json"):
            answer = await here.http.post("/tasks", content=body, headers={"Content-Type": kind})
            assert answer.status_code == 202, answer.text
        assert len(await here.list()) == 3


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
async def test_json_has_to_say_that_it_is(kind: str | None) -> None:
    """A body that is not sent as JSON gets a 400 that says how to send it."""
    async with world() as here:
        headers = {"Content-Type": kind} if kind else {}
        answer = await here.http.post("/tasks", content=of_sum("[1]"), headers=headers)
        assert problem_of(answer)["errors"] == [{"detail": OBJECT, "pointer": "#"}]


async def test_a_pointer_is_ascii_whatever_the_key() -> None:
    """Should pydantic ever report a key with a lone surrogate, the pointer is fit for JSON."""
    error = {"type": "extra_forbidden", "msg": "m", "loc": ("body", "compute_sum", "\ud800é")}
    assert main.problem_item(error) == {"detail": "m", "pointer": "#/%3F%C3%A9"}


async def test_many_errors_are_not_all_listed() -> None:
    """Ten errors are told, however many there are."""
    async with world() as here:
        body = {"task_type": "simulate_failure"} | {f"field{n}": n for n in range(1000)}
        errors = problem_of(await here.http.post("/tasks", json=body))["errors"]
        assert [error["pointer"] for error in errors] == [f"#/field{n}" for n in range(10)]


@pytest.mark.parametrize(("size", "status"), [(1000, 400), (1001, 413)])
@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_has_its_limit(size: int, status: int, chunked: bool) -> None:
    """One byte more than `max_body` is a 413, whether or not the length was declared."""

    async def parts() -> AsyncIterator[bytes]:
        for start in range(0, size, 100):
            yield b"x" * min(100, size - start)

    async with world(max_body=1000) as here:
        headers = {"Content-Type": "application/json"}
        content = parts() if chunked else b"x" * size
        answer = await here.http.post("/tasks", content=content, headers=headers)
        assert answer.status_code == status
        if status == 413:
            assert problem_of(answer)["detail"] == "The body is longer than 1000 bytes."


@pytest.mark.parametrize(
    ("path", "pointer", "detail"),
    [
        ("/tasks?limit=0", "limit", "greater than or equal to 1"),
        ("/tasks?limit=-1", "limit", "greater than or equal to 1"),
        ("/tasks?limit=x", "limit", "valid integer"),
        ("/tasks?limit=" + "9" * 5000, "limit", "integer"),
        ("/tasks?status=", "status", "'queued'"),
        ("/tasks?status=%ff", "status", "'queued'"),
        ("/tasks/x", "task_id", "valid UUID"),
        ("/tasks/" + "a" * 5000, "task_id", "valid UUID"),
        ("/tasks/%00", "task_id", "valid UUID"),
        (f"/tasks/{NOBODY}?wait=maybe", "wait", "valid boolean"),
        (f"/tasks/{NOBODY}?wait=true&since=", "since", "'queued'"),
    ],
)
async def test_bad_queries_and_ids(path: str, pointer: str, detail: str) -> None:
    """A bad parameter of path or query gets a 400 that names it."""
    async with world() as here:
        answer = await here.http.get(path)
        problem = problem_of(answer)
        assert answer.status_code == 400 and len(answer.content) < 400
        assert [error["pointer"] for error in problem["errors"]] == [pointer]
        assert detail in problem["errors"][0]["detail"]


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("PUT", "/tasks", "GET, POST"),
        ("HEAD", "/tasks", "GET, POST"),
        ("POST", f"/tasks/{NOBODY}", "DELETE, GET"),
        ("PATCH", "/tasks/x", "DELETE, GET"),
        ("DELETE", "/health", "GET"),
        ("POST", "/", "GET"),
        ("POST", "/docs", "GET, HEAD"),
    ],
)
async def test_405_names_every_method(method: str, path: str, allow: str) -> None:
    """RFC 9110: Allow has all methods of the path, not those of one route."""
    async with world() as here:
        answer = await here.http.request(method, path)
        assert answer.status_code == 405 and answer.headers["allow"] == allow
        if method != "HEAD":
            assert problem_of(answer)["detail"] == "This path has other methods: see Allow."


@pytest.mark.parametrize("path", ["/nowhere", "/tasks/", "/tasks/a/b", "//", "/health/", "/Tasks"])
async def test_404_is_a_problem_too(path: str) -> None:
    """Unknown paths get a problem, and never a redirect built from the Host header."""
    async with world() as here:
        answer = await here.http.get("http://evil.test" + path)
        assert answer.status_code == 404 and "evil" not in str(answer.headers) + answer.text
        assert problem_of(answer)["detail"] == "Not Found"


async def test_a_bug_is_a_500_that_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unexpected exception in a route is a problem without a trace, with the limit's fields."""

    def bug(_: TaskManager) -> None:
        raise RuntimeError("secret /etc/passwd")

    async with world(rate_limit=10) as here:
        monkeypatch.setattr(TaskManager, "snapshot", bug)
        answers = [await here.http.get("/tasks"), await here.http.get("/health")]
        monkeypatch.undo()
        for answer, fields in zip(answers, (LIMIT_FIELDS, set()), strict=True):
            assert answer.status_code == 500 and "secret" not in answer.text
            assert problem_of(answer)["detail"] == "The server failed."
            assert LIMIT_FIELDS & set(answer.headers) == fields


# --- Settings -------------------------------------------------------------------------------------

VALID = {
    "WORKERS": "7",
    "QUEUE_SIZE": "8",
    "RATE_LIMIT": "9",
    "RATE_WINDOW": "11",
    "LONG_POLL": "0",
    "RETENTION": "1.5",
    "CLEANUP_INTERVAL": "2.5",
    "TASK_TIMEOUT": "3.5",
    "PRIORITY_STEP": "0",
    "MAX_BODY": "12",
    "TIME_SCALE": "0",
}


def test_the_defaults_are_those_of_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any variable the settings are the contract's."""
    for name in VALID:
        monkeypatch.delenv(f"TASKS_{name}", raising=False)
    numbers = [5, 100, 10, 60, 10, 600, 30, 60, 30, 65536, 1]
    assert list(Settings.from_environment().model_dump().values()) == numbers


def test_every_setting_has_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each setting is read from `TASKS_` and its name, and others are none of our business."""
    for name, value in VALID.items():
        monkeypatch.setenv(f"TASKS_{name}", value)
    monkeypatch.setenv("TASKS_SERVICE_HOST", "10.0.0.1")  # Kubernetes sets this for a service
    found = Settings.from_environment().model_dump()
    assert {name.upper(): f"{value:g}" for name, value in found.items()} == VALID


@pytest.mark.parametrize("value", ["", "x", "nan", "inf", "-1", "1e10", "1001000000"])
@pytest.mark.parametrize("name", VALID)
def test_a_bad_setting_stops_the_start(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad value is one error that names the variable and what is allowed, and no server."""
    monkeypatch.setenv(f"TASKS_{name}", value)
    with pytest.raises(SystemExit, match=rf"^TASKS_{name}: Input should be [^\n]+$"):
        create_app()


@pytest.mark.parametrize("name", VALID)
def test_every_setting_has_its_greatest_value(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The upper bound of a setting is accepted, and one more is not."""
    most = 1000 if name == "WORKERS" else 10**9
    monkeypatch.setenv(f"TASKS_{name}", str(most))
    assert getattr(Settings.from_environment(), name.lower()) == most
    monkeypatch.setenv(f"TASKS_{name}", str(most + 1))
    with pytest.raises(SystemExit, match=f"less than or equal to {most}"):
        create_app()


@pytest.mark.parametrize("name", sorted(set(VALID) - {"LONG_POLL", "PRIORITY_STEP", "TIME_SCALE"}))
def test_some_settings_cannot_be_zero(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A size or time for which 0 makes no sense refuses it, and all bad settings are named."""
    monkeypatch.setenv(f"TASKS_{name}", "0")
    monkeypatch.setenv("TASKS_TIME_SCALE", "-1")
    with pytest.raises(SystemExit, match=f"^TASKS_{name}: .*\nTASKS_TIME_SCALE: .*$"):
        create_app()


def test_a_mistyped_setting_is_an_error() -> None:
    """`Settings` refuses an unknown name, and cannot be changed."""
    with pytest.raises(ValueError, match="worker"):
        Settings(worker=1)  # type: ignore[call-arg]  # that is the test
    with pytest.raises(ValueError, match="frozen"):
        Settings().workers = 1  # type: ignore[misc]  # that is the test


# --- Start and stop -------------------------------------------------------------------------------


async def test_stop_with_work_in_hand() -> None:
    """Stopping cancels what runs and what waits, and the polls of it, and ends at once."""
    async with world() as here:
        ids = [await here.submit() for _ in range(20)]
        await ticks()
        polls = [asyncio.create_task(here.manager.wait(task_id)) for task_id in ids]
        await ticks()
        assert here.manager._queue.qsize() == 15
        start = main.now()
    assert main.now() == start
    assert {task["status"] for task in await asyncio.gather(*polls)} == {"cancelled"}


async def test_start_stop_and_start_again() -> None:
    """An app that was stopped can be started again, and has not forgotten its final tasks."""
    async with world() as here:
        task_id = await here.submit()
    async with here.app.router.lifespan_context(here.app):
        await ticks()
        task = here.manager.submit("compute_sum", {"numbers": [1]}, "normal")
        await real_sleep(6)
        assert task["status"] == "completed" and here.manager.health()["status"] == "ok"
        assert here.manager.get(task_id)["status"] == "cancelled"


def test_start_again_in_another_loop() -> None:
    """An app outlives its event loop: nothing in it is bound to the first one."""
    app = create_app(Settings(time_scale=0, workers=2))

    async def once() -> None:
        async with app.router.lifespan_context(app):
            await ticks()  # the workers wait for the queue
            task = app.state.manager.submit("compute_sum", {"numbers": [2]}, "normal")
            assert (await app.state.manager.wait(task["task_id"]))["status"] == "processing"
            assert (await app.state.manager.wait(task["task_id"]))["result"] == 2

    for _ in range(2):
        loop = VirtualLoop()
        loop.run_until_complete(once())
        loop.close()


async def test_a_stop_that_is_cut_short_leaves_no_entry(
    monkeypatch: pytest.MonkeyPatch, expected_errors: list[str]
) -> None:
    """R4: a batch that has died and is stopped while it still waits leaves nothing in the queue."""

    async def job(task: Task) -> None:
        try:
            await asyncio.sleep(100)
        finally:
            await asyncio.sleep(2)

    async def die(_: TaskManager, task: Task) -> None:
        raise RuntimeError("a bug")

    work(monkeypatch, job)
    expected_errors.append("a worker died")
    here = World(create_app(Settings(workers=2)))
    async with here.app.router.lifespan_context(here.app):
        await here.submit()
        await ticks()
        monkeypatch.setattr(TaskManager, "_run", die)
        ids = [await here.submit() for _ in range(3)]
        await ticks()
        assert here.manager._stopped and here.manager._running
    assert here.manager._queue.empty()
    assert {here.manager._tasks[task_id]["status"] for task_id in ids} == {"cancelled"}
    await real_sleep(3)


async def test_stopping_waits_for_clean_up_but_not_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopping awaits the clean-up of cancelled work, for five seconds."""
    cleaned = []

    async def job(task: Task) -> None:
        try:
            await asyncio.sleep(100)
        finally:
            await asyncio.sleep(2 if task["priority"] == "high" else 50)
            cleaned.append(task["priority"])

    work(monkeypatch, job)
    here = World(create_app(Settings()))
    async with here.app.router.lifespan_context(here.app):
        for priority in ("high", "low"):
            await here.submit(priority=priority)
        await real_sleep(1)
        start = main.now()
    assert main.now() == start + 5 and cleaned == ["high"]
    await real_sleep(50)
    assert cleaned == ["high", "low"] and not here.manager._running


async def test_two_worlds_do_not_touch() -> None:
    """`create_app` makes a world of its own each time."""
    async with world() as one, world() as two:
        task_id = await one.submit()
        assert (await two.http.get(f"/tasks/{task_id}")).status_code == 404
        assert len(await one.list()) == 1 and await two.list() == []
        await one.cancel(task_id)


# --- A random walk --------------------------------------------------------------------------------


class Model:
    """What must be true of a manager, whatever is asked of it."""

    def __init__(self, manager: TaskManager) -> None:
        self.manager = manager
        self.seen: dict[str, Task] = {}  # id -> the task as it was when last looked at

    def step(self, generator: random.Random) -> None:
        """Submit or cancel something."""
        if generator.random() < 0.6:
            room = self.manager._queue.qsize() < self.manager._settings.queue_size
            kind = generator.choice(list(get_args(main.TaskType)))
            parameters = {"numbers": [1], "title": "T", "sections": 1, "message": "m"}
            try:
                task = self.manager.submit(kind, parameters, generator.choice(list(main.RANK)))
                assert room
                self.seen[task["task_id"]] = task.copy()
            except main.UnavailableError:
                assert not room
        elif self.seen:
            before = self.manager._tasks.get(generator.choice(list(self.seen)), None)
            status = before["status"] if before else None
            try:
                assert before is None or self.manager.cancel(before["task_id"]) is before
                assert before is None or before["status"] == "cancelled"
            except main.TaskFinishedError:
                assert status in ("completed", "failed")

    def check(self) -> None:
        """Compare each task with how it was before, and the books with each other."""
        now = main.utc(main.now())
        statuses = Counter(task["status"] for task in self.manager.snapshot())
        assert statuses["queued"] == 0 or statuses["processing"] == self.manager._settings.workers
        for task_id, old in list(self.seen.items()):
            new = self.manager._tasks.get(task_id)
            if new is None:  # it was final, and its time had come
                assert old["expires_at"] and old["expires_at"] <= now
                del self.seen[task_id]
                continue
            if old["status"] not in NEXT:
                assert new == old and new["expires_at"] and new["expires_at"] > now
            assert STATUSES.index(new["status"]) >= STATUSES.index(old["status"])
            assert new["progress"] >= old["progress"]
            assert (new["progress"] == 100) == (new["status"] == "completed")
            self.seen[task_id] = new.copy()
        assert set(self.seen) == set(self.manager._tasks)


@pytest.mark.parametrize("seed", range(4))
async def test_a_random_walk(seed: int) -> None:
    """No accepted task is lost, none ends twice, and the limits hold, whatever comes in which order."""
    generator = random.Random(seed)
    async with world(workers=3, queue_size=6, retention=20, priority_step=5) as here:
        model, polls = Model(here.manager), []
        for step in range(1000):
            try:
                for _ in range(generator.choice([0, 1, 1, 2, 5])):
                    model.step(generator)
                    here.check_books()
                if model.seen and generator.random() < 0.3:
                    polled = generator.choice(list(model.seen))
                    polls.append(asyncio.create_task(here.manager.wait(polled)))
                await real_sleep(generator.choice([0, 0, 0.5, 1, 3]))
                await ticks()
                model.check()
                here.check_books()
            except Exception as exc:
                raise AssertionError(f"seed {seed}, step {step}") from exc
        await real_sleep(60)
        await asyncio.gather(*polls)


# --- A real server --------------------------------------------------------------------------------


class Server:
    """A uvicorn in a process of its own, started as the README says, under `python -X dev`."""

    def __init__(self, **settings: Any) -> None:
        environment = {f"TASKS_{name.upper()}": str(value) for name, value in settings.items()}
        command = [sys.executable, "-X", "dev", "-m", "uvicorn", "main:app", "--port", "0"]
        self.process = subprocess.Popen(
            [*command, "--no-access-log"],
            cwd=Path(__file__).parent,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log: list[str] = []
        self.port = 0
        self.started = threading.Event()
        self.reader = threading.Thread(target=self.read_log)
        self.reader.start()
        assert self.started.wait(15)

    def read_log(self) -> None:
        """Read the log until it ends, so that its pipe never fills."""
        assert self.process.stderr
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r"running on http://127.0.0.1:(\d+)", line):
                self.port = int(found[1])
                self.started.set()
        self.started.set()

    def ask(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[int, dict[str, str], Any]:
        """Send a request and return status, headers and decoded body."""
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=15)
        data = json.dumps(body).encode() if body is not None else None
        link.request(method, path, data, {"Content-Type": "application/json", **headers})
        with contextlib.closing(link):
            answer = link.getresponse()
            fields = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, fields, json.loads(answer.read() or "null")

    def connect(self, data: bytes) -> socket.socket:
        """Open a connection and send raw bytes."""
        link = socket.create_connection(("127.0.0.1", self.port), timeout=15)
        link.sendall(data)
        return link

    def stop(self, signum: signal.Signals = signal.SIGTERM) -> str:
        """End the process and return all that it logged."""
        self.process.send_signal(signum)
        return self.wait()

    def wait(self) -> str:
        """Wait for the end of the process and return all that it logged."""
        self.process.wait(15)
        self.reader.join(15)
        assert self.process.stderr
        self.process.stderr.close()
        return "".join(self.log)


FAILURE = {"task_type": "simulate_failure"}
SLOW = {"task_type": "generate_report", "parameters": {"title": "T", "sections": 6}}
UGLY = re.compile("Traceback|never|destroyed|Warning|ERROR|CRITICAL")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One server for the tests that only talk to it; it has logged nothing ugly in the end."""
    server = Server(rate_limit=3000, queue_size=1000, long_poll=0.2)
    yield server
    assert not UGLY.search(server.stop())


def read_all(link: socket.socket) -> bytes:
    with link:
        return b"".join(iter(lambda: link.recv(65536), b""))


def test_the_list_arrives_in_parts(server: Server) -> None:
    """The stream is chunked on the wire, and what is in the chunks is one JSON array."""
    ids = [server.ask("POST", "/tasks", SLOW)[2]["task_id"] for _ in range(500)]
    request = b"GET /tasks HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    head, _, body = read_all(server.connect(request)).partition(b"\r\n\r\n")
    parts = []
    while body:
        size, _, body = body.partition(b"\r\n")
        parts.append(body[: int(size, 16)])
        body = body[int(size, 16) + 2 :]
    assert b"transfer-encoding: chunked" in head.lower() and b"application/json" in head
    assert len([part for part in parts if b"task_id" in part]) >= 3
    assert [task["task_id"] for task in json.loads(b"".join(parts))][-len(ids) :] == ids
    for task_id in ids:
        assert server.ask("DELETE", f"/tasks/{task_id}")[0] == 200


@pytest.mark.parametrize("body", [b"", b"\0", b"{}", b"x" * 70_000])
def test_a_body_does_not_break_a_list(server: Server, body: bytes) -> None:
    """The body of a GET is of no interest, neither to the route nor to the stream of a list."""
    head = f"GET /tasks HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}"
    answer = read_all(server.connect(head.encode() + b"\r\n\r\n" + body))
    assert answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"\r\n0\r\n\r\n")


def test_a_client_may_leave(server: Server) -> None:
    """A client that leaves a long poll, a list or its own body breaks nothing."""
    task_id = server.ask("POST", "/tasks", SLOW)[2]["task_id"]
    for request in (
        f"GET /tasks/{task_id}?wait=true HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET /tasks HTTP/1.1\r\nHost: x\r\n\r\n",
        "POST /tasks HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{",
    ):
        server.connect(request.encode()).close()
    status, _, task = server.ask("GET", f"/tasks/{task_id}?wait=true&since=processing")
    assert (status, task["status"]) == (200, "processing")
    assert server.ask("DELETE", f"/tasks/{task_id}")[0] == 200
    assert server.ask("GET", "/health")[2]["workers"] == {"busy": 0, "total": 5}


def test_a_chunked_body_has_its_limit_on_the_wire(server: Server) -> None:
    """A chunked body that is too long is answered with 413 before all of it was sent."""
    head = b"POST /tasks HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    link = server.connect(head + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n")
    link.sendall(b"10001\r\n" + b"x" * 0x10001 + b"\r\n")
    answer = link.recv(65536)
    link.close()
    assert answer.startswith(b"HTTP/1.1 413 ") and b"application/problem+json" in answer


def test_the_peer_is_uvicorns_to_say(server: Server) -> None:
    """uvicorn believes the X-Forwarded-For of a proxy on loopback; garbage shares one bucket."""
    left = []
    for address in ("192.0.2.1", "192.0.2.1", "192.0.2.2", "garbage", "more of it"):
        fields = server.ask("GET", f"/tasks/{NOBODY}", **{"X-Forwarded-For": address})[1]
        left.append(fields["ratelimit"].split(";")[1])
    assert left == ["r=2999", "r=2998", "r=2999", "r=2999", "r=2998"]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, -15), (signal.SIGINT, 0)])
def test_a_signal_ends_it_cleanly(signum: signal.Signals, code: int) -> None:
    """Stopped with twenty tasks and a long poll in hand, the server ends them and logs nothing ugly."""
    server = Server(rate_limit=100, long_poll=0.2)
    ids = [server.ask("POST", "/tasks", SLOW)[2]["task_id"] for _ in range(20)]
    poll = f"GET /tasks/{ids[0]}?wait=true&since=processing HTTP/1.1\r\nHost: x\r\n\r\n"
    link = server.connect(poll.encode())
    assert server.ask("GET", "/health")[0] == 200  # so the poll has been read
    log = server.stop(signum)
    assert b'"status":"processing"' in read_all(link)
    assert server.process.returncode == code
    assert log.count(" cancelled after ") == 20 and not UGLY.search(log)
    assert [log.count(f"task {task_id} queued") for task_id in ids] == [1] * 20


def test_a_bad_setting_means_no_server() -> None:
    """uvicorn ends with the message that names the variable, and without a traceback."""
    server = Server(workers="many")
    log = server.wait()
    assert server.port == 0 and server.process.returncode == 1
    assert "TASKS_WORKERS: Input should be a valid integer" in log and "Traceback" not in log
