"""A rate-limited asynchronous task manager with polling, in one file to be read from top to bottom.

Clients submit tasks, poll or long-poll them, list them and cancel them. Workers take the tasks from
an in-memory priority queue, ended tasks expire, and each address may send 10 requests a minute. The
path of a task through this file, and its states, which only ever move forward:

    POST /tasks -> Gate (limits) -> Submission (validation) -> TaskManager.submit -> TaskQueue
        -> _worker -> _run -> _work -> _execute -> _move -> expire

    queued ---> processing ---> completed | failed
       |            |
       +------------+---------> cancelled

Five rules make it correct, and are cited where the code relies on them:

R1  There is one event loop, so a stretch of code without `await` is atomic. Every change of a
    record is such a stretch, and needs no lock.
R2  One method, `TaskManager._move`, changes a status, and it wakes the waiters: it takes the task's
    Event away, so that whoever comes later gets a fresh one, and sets it. A waiter gets the Event
    in the same stretch in which it read the status. Nobody else sets one, and nobody clears one.
R3  A final status is final. Whoever stops a task marks the record first and then cancels the
    asyncio task; whatever that still says is ignored.
R4  A task leaves the queue exactly once: to a worker or by cancellation, without a tombstone.
R5  A worker survives its task. The work runs in an asyncio task of its own, and the worker waits
    with `asyncio.wait`, which returns when that was cancelled and raises only when the worker is.

There is one clock, the event loop's: `now` reads it, `asyncio.sleep` and all timers wait on it.
What this file does not do: keep anything over a restart, run as several processes (`--workers 2`
would be two managers), know users, stop work that blocks the loop or ignores its cancellation. An
engine that does would keep the same HTTP contract. To run it: `uvicorn main:app --reload`.
"""

import asyncio
import heapq
import ipaddress
import itertools
import logging
import math
import os
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from datetime import datetime, timedelta, timezone
from functools import lru_cache, partial
from http import HTTPStatus
from typing import Annotated, Any, Literal, TypeAlias, get_args
from urllib.parse import quote
from uuid import UUID, uuid4

from fastapi import Body, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import RedirectResponse, StreamingResponse
from pydantic import BaseModel, FailFast, Field, PlainValidator, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError, to_json
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from typing_extensions import NotRequired, TypedDict  # typing's is not enough for pydantic on 3.10

# A child of uvicorn's logger, so that its lines show, once, under a plain `uvicorn main:app`.
log = logging.getLogger("uvicorn.error.tasks")

# --- Settings -------------------------------------------------------------------------------------
# Checked once, at start. All numbers are bounded: a timer of `nan` would corrupt the loop's heap.
Count: TypeAlias = Annotated[int, Field(ge=1, le=10**9)]
Seconds: TypeAlias = Annotated[float, Field(gt=0, le=10**9)]
Span: TypeAlias = Annotated[float, Field(ge=0, le=10**9)]  # seconds of which 0 makes sense


class Settings(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """What can be tuned: `Settings(workers=2)` in a test, `TASKS_WORKERS=2` in the environment."""

    workers: Annotated[int, Field(ge=1, le=1000)] = 5  # tasks at a time
    queue_size: Count = 100  # pending tasks
    rate_limit: Count = 10  # requests from one address in rate_window
    rate_window: Count = 60  # whole seconds, since the RateLimit fields have no fractions
    long_poll: Span = 10  # how long `wait=true` is held at most
    retention: Seconds = 600  # how long a final task can still be asked for
    cleanup_interval: Seconds = 30  # between two rounds of the timer
    task_timeout: Seconds = 60  # for the work of a task, without its time in the queue
    priority_step: Span = 30  # how much waiting a level of priority is worth
    max_body: Count = 65536  # bytes
    time_scale: Span = 1  # multiplies the time that simulated work takes

    @classmethod
    def from_environment(cls) -> "Settings":
        """Read the `TASKS_*` variables; SystemExit with a message that names each bad one."""
        names = {name: f"TASKS_{name.upper()}" for name in cls.model_fields}
        given = {name: os.environ[key] for name, key in names.items() if key in os.environ}
        try:
            return cls.model_validate(given)
        except ValidationError as exc:
            errors = [f"{names[str(error['loc'][0])]}: {error['msg']}" for error in exc.errors()]
            raise SystemExit("\n".join(errors)) from None


# --- Vocabulary -----------------------------------------------------------------------------------
# A task is one dict from its submission to its end, and is what clients get: pydantic takes the
# TypedDict for the schema, and writes the dict as it stands. Only `_move` and `_report` change it.
TaskType: TypeAlias = Literal["compute_sum", "generate_report", "simulate_failure"]
Priority: TypeAlias = Literal["high", "normal", "low"]
Status: TypeAlias = Literal["queued", "processing", "completed", "failed", "cancelled"]
Parameters: TypeAlias = dict[str, Any]
TaskError = TypedDict("TaskError", {"code": str, "message": str})
NEXT: Mapping[Status, tuple[Status, ...]] = {  # what may follow; a status that is no key is final
    "queued": ("processing", "cancelled"),
    "processing": ("completed", "failed", "cancelled"),
}


class Task(TypedDict):
    """A task: the same keys in every state, with null for what there is not, or not yet."""

    task_id: str  # a UUID of version 4
    task_type: TaskType  # decides what `parameters` and `result` are
    parameters: Parameters  # as validated, defaults filled in
    priority: Priority  # decides when it starts, and nothing else
    status: Status  # moves along NEXT
    progress: int  # percent, never falls, 100 if and only if completed
    result: Any  # None unless completed
    error: TaskError | None  # None unless failed
    created_at: datetime  # in UTC, like the others
    started_at: datetime | None  # None until processing, and so for ever if cancelled before
    finished_at: datetime | None  # None until final
    expires_at: datetime | None  # None until final; the record is gone from this instant on


Tasks: TypeAlias = dict[str, Task]  # by id, in order of submission
encode = partial(to_json, inf_nan_mode="null")  # value -> JSON in bytes; ValueError if it has none
_ZERO = datetime.now(timezone.utc) - timedelta(seconds=time.monotonic())  # date of the loop's 0


def now() -> float:
    """Return the event loop's time in seconds: the one name through which time is read."""
    return asyncio.get_running_loop().time()


def utc(moment: float) -> datetime:
    """Return the date of a `now()`; anchored once, so a step of the wall clock reorders nothing."""
    return _ZERO + timedelta(seconds=moment)


# --- Errors ---------------------------------------------------------------------------------------
# The manager raises ManagerErrors and knows no HTTP; `handle_error` gives each its status.
# TaskFailedError stands apart: work raises it, and it ends in a record, never in HTTP.
class ManagerError(Exception): ...  # the base of what the manager refuses


class TaskNotFoundError(ManagerError): ...  # 404: there is no such task, or no more


class TaskFinishedError(ManagerError): ...  # 409: the task, its argument, completed or failed


class UnavailableError(ManagerError): ...  # 503: the queue is full, or the workers have stopped


class TaskFailedError(Exception): ...  # fails the task whose work raises it; the client reads it


def classify_failure(exc: BaseException) -> TaskError:
    """Return what the client may know of the exception that failed a task."""
    match exc:
        case TaskFailedError():
            # A lone surrogate in a message would break off every list with this task.
            return {"code": "task_failed", "message": str(exc).encode(errors="replace").decode()}
        case TimeoutError() | asyncio.TimeoutError():  # one class from Python 3.11 on
            return {"code": "timeout", "message": "The task took too long."}
        case _:
            return {"code": "internal_error", "message": "The task failed unexpectedly."}


# --- API models -----------------------------------------------------------------------------------
# What passes here is stored and sent out again, so poison is refused at the door: json.loads takes
# NaN, 1e400 and lone surrogates; pydantic takes true for 1, "5" for 5 and ignores unknown fields.
def finite_number(value: Any) -> Any:
    """Return an int or a float as it is: it is not converted, so that integers add up exactly."""
    if type(value) in (int, float) and abs(value) <= 1e300:  # a bool is no int here; NaN is not <=
        return value
    raise PydanticCustomError("number", "Input should be a number from -1e300 to 1e300")


Real: TypeAlias = Annotated[float, Field(ge=-1e300, le=1e300)]  # 10,000 add up to a finite float
Number: TypeAlias = Annotated[Real, PlainValidator(finite_number, json_schema_input_type=Real)]
Text: TypeAlias = Annotated[str, Field(min_length=1, max_length=200)]
Limit: TypeAlias = Annotated[int | None, Query(ge=1)]


class SumParameters(BaseModel, extra="forbid"):
    numbers: Annotated[list[Number], Field(min_length=1, max_length=10_000), FailFast()]


class ReportParameters(BaseModel, extra="forbid"):
    title: Text
    sections: Annotated[int, Field(strict=True, ge=1, le=6)] = 3


class FailureParameters(BaseModel, extra="forbid"):
    message: Text = "simulated failure"


class SumSubmission(BaseModel, extra="forbid"):
    task_type: Literal["compute_sum"]
    parameters: SumParameters
    priority: Priority = "normal"


class ReportSubmission(BaseModel, extra="forbid"):
    task_type: Literal["generate_report"]
    parameters: ReportParameters
    priority: Priority = "normal"


class FailureSubmission(BaseModel, extra="forbid"):
    task_type: Literal["simulate_failure"]
    parameters: FailureParameters = FailureParameters()
    priority: Priority = "normal"


EXAMPLES: dict[str, Any] = {
    "sum": {"value": {"task_type": "compute_sum", "parameters": {"numbers": [1, 2, 3.5]}}},
    "report": {"value": {"task_type": "generate_report", "parameters": {"title": "Figures"}}},
    "failure": {"value": {"task_type": "simulate_failure", "priority": "high"}},
}
Submission: TypeAlias = Annotated[
    SumSubmission | ReportSubmission | FailureSubmission,
    Body(discriminator="task_type", openapi_examples=EXAMPLES),
]


class Poll(BaseModel):
    wait: bool = Field(default=False, description="Hold the answer until the status changes.")
    since: Status | None = Field(default=None, description="The status you saw last.")


Counts: TypeAlias = dict[str, int]
Accepted = TypedDict("Accepted", {"task_id": str, "status": Literal["queued"]})
Health = TypedDict("Health", {"status": str, "tasks": Counts, "queue": Counts, "workers": Counts})


class Problem(TypedDict):
    type: str  # "about:blank": the status says what kind of problem it is
    title: str  # the status in words
    status: int
    detail: str  # for a person to read
    errors: NotRequired[list[dict[Literal["detail", "pointer"], str]]]  # with 400
    task: NotRequired[dict[str, Any]]  # with 409: the Task


# --- Rate limiter ---------------------------------------------------------------------------------
# A sliding window: at most `limit` requests in any `window` seconds for each key. Only those that
# were let through count, so a client that keeps knocking gets in as soon as one that waits.
class RateLimiter:
    def __init__(self, limit: int, window: int) -> None:
        self.limit, self.window = limit, window
        self._hits: dict[str, deque[float]] = {}  # key -> its last 1 to `limit` times, oldest first
        self._lock = asyncio.Lock()  # R1 would do, until the day when the times move to a store

    async def hit(self, key: str) -> tuple[bool, int, int]:
        """Count a request if there is room: (counted?, left, whole seconds until one more)."""
        async with self._lock:
            moment = now()
            hits = self._hits.setdefault(key, deque())
            # The sum that `reset` has: another form could round to refuse who waited just so long.
            while hits and hits[0] + self.window <= moment:
                hits.popleft()
            if allowed := len(hits) < self.limit:
                hits.append(moment)
            reset = max(1, math.ceil(hits[0] + self.window - moment))
            return allowed, self.limit - len(hits), reset

    async def sweep(self) -> None:
        """Forget the keys that have gone quiet; a deque costs most of a kilobyte."""
        async with self._lock:
            moment = now()
            quiet = [key for key, hits in self._hits.items() if hits[-1] + self.window <= moment]
            for key in quiet:
                del self._hits[key]


@lru_cache(maxsize=256)  # parsing an address takes longer than all of `hit`
def client_key(host: str) -> str:
    """Return the limiter's key for a peer's address; an IPv6 client owns a whole /64."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # a unix socket, or what a proxy made up: one bucket for all of them
        return "unknown"
    if isinstance(address, ipaddress.IPv6Address):
        return str(address.ipv4_mapped or f"{int(address) >> 64:x}::/64")
    return str(address)


# --- Queue ----------------------------------------------------------------------------------------
# The queued tasks, the earliest due first. asyncio.PriorityQueue has the bound, the order, and
# getters that look again if the entry that woke them is gone; it lacks a way to take one out.
Entry: TypeAlias = tuple[float, int, str]  # due time, sequence number that breaks ties, task id
RANK: Mapping[Priority, int] = {"high": 0, "normal": 1, "low": 2}


class TaskQueue(asyncio.PriorityQueue[Entry]):
    _queue: list[Entry]  # PriorityQueue's heap

    def remove(self, task_id: str) -> None:
        """Take a task out, wherever it stands (R4), in time proportional to the queue's length."""
        self._queue[:] = [entry for entry in self._queue if entry[2] != task_id]
        heapq.heapify(self._queue)


# --- Task manager ---------------------------------------------------------------------------------
# All tasks, in the order of a task's life. A method without `async` is atomic (R1).
CANCEL_GRACE = 5.0  # seconds that work has to clean up after its time-out, or when all stop


class TaskManager:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._tasks: Tasks = {}
        self._queue = TaskQueue(settings.queue_size)  # the tasks with status queued, and no others
        self._sequence = itertools.count()
        self._changed: dict[str, asyncio.Event] = {}  # id -> its next change, if awaited (R2)
        self._running: dict[str, asyncio.Task[None]] = {}  # id -> its work, until that has ended
        self._finished: deque[tuple[datetime, str]] = deque()  # (expires_at, id), next first
        self._stopped = False  # from the end of `run` to its next start

    def submit(self, task_type: TaskType, parameters: Parameters, priority: Priority) -> Task:
        """Queue a task and return it; UnavailableError, which leaves no trace of the task."""
        if self._stopped or self._queue.full():
            raise UnavailableError("No workers." if self._stopped else "The queue is full.")
        task_id, moment = str(uuid4()), now()
        # A time plus a constant, so it stays, and low goes before a high that is two steps younger.
        due = moment + RANK[priority] * self._settings.priority_step
        self._queue.put_nowait((due, next(self._sequence), task_id))  # stored in one stretch: R1
        task = self._tasks[task_id] = {
            "task_id": task_id, "task_type": task_type, "parameters": parameters,
            "priority": priority, "status": "queued", "progress": 0, "result": None, "error": None,
            "created_at": utc(moment), "started_at": None, "finished_at": None, "expires_at": None,
        }  # fmt: skip
        log.info("task %s queued: %s, priority %s", task_id, task_type, priority)
        return task

    def get(self, task_id: str) -> Task:
        """Return a task; TaskNotFoundError."""
        self.expire()
        if task := self._tasks.get(task_id):
            return task
        raise TaskNotFoundError(task_id)

    async def wait(self, task_id: str, since: Status | None = None) -> Task:
        """Return a task when it is final or no longer `since` (None: as now), or after `long_poll`.

        poller: reads "processing" and takes Event 1, in one stretch
        worker: moves the task to "completed", sets Event 1
        poller: waits for Event 1, which stays set; had it been cleared, for ever
        """
        task = self.get(task_id)
        if task["status"] not in NEXT or since not in (None, task["status"]):
            return task
        changed = self._changed.setdefault(task_id, asyncio.Event())
        waiter = asyncio.create_task(changed.wait())
        try:
            await asyncio.wait({waiter}, timeout=self._settings.long_poll)  # 3.10's wait_for races
        finally:
            waiter.cancel()
        return task  # not `self.get`: it may have expired meanwhile (see `expire`)

    def snapshot(self) -> list[Task]:
        """Return all tasks in order of submission; the list will not change, its tasks may."""
        self.expire()
        return list(self._tasks.values())

    def health(self) -> Health:
        """Return the counts of tasks, queue and workers; UnavailableError."""
        if self._stopped:
            raise UnavailableError("No workers.")
        counts = Counter(task["status"] for task in self.snapshot())
        return {
            "status": "ok",
            "tasks": {status: counts[status] for status in get_args(Status)},
            "queue": {"size": self._queue.qsize(), "capacity": self._settings.queue_size},
            "workers": {"busy": len(self._running), "total": self._settings.workers},
        }

    def cancel(self, task_id: str) -> Task:
        """Cancel a task and return it; TaskNotFoundError, TaskFinishedError.

        work:   returns 6, so its asyncio task is about to say "completed"
        client: DELETE; the record is marked "cancelled", and that is the answer
        work:   says "completed", which NEXT does not allow: ignored (R3)
        """
        task = self.get(task_id)
        if task["status"] in ("completed", "failed"):
            raise TaskFinishedError(task)
        if task["status"] == "queued":
            self._queue.remove(task_id)
        if self._move(task, "cancelled") and (work := self._running.get(task_id)):
            work.cancel()  # marked above: before its first step, work cannot even catch this
        return task

    async def run(self) -> None:
        """Run the workers until cancelled, or until one dies; then every task is final."""
        self._stopped = False
        workers = [asyncio.create_task(self._worker()) for _ in range(self._settings.workers)]
        try:
            await asyncio.gather(*workers)
        except Exception:
            log.critical("a worker died, so all stop", exc_info=True)
        finally:
            self._stopped = True
            for task in self.snapshot():
                self._move(task, "cancelled")
            jobs = [*workers, *self._running.values()]
            for job in jobs:  # the workers too: when one dies, gather leaves the others running
                job.cancel()
            self._queue = TaskQueue(self._settings.queue_size)  # for the next start, and its loop
            await asyncio.wait(jobs, timeout=CANCEL_GRACE)

    async def _worker(self) -> None:
        while True:
            _, _, task_id = await self._queue.get()
            await self._run(self._tasks[task_id])

    async def _run(self, task: Task) -> None:
        """Run one task; return when its work has ended, or has been given up (R5)."""
        task_id = task["task_id"]
        work = self._running[task_id] = asyncio.create_task(self._work(task))
        work.add_done_callback(lambda _: self._running.pop(task_id))
        self._move(task, "processing")
        await asyncio.wait({work}, timeout=self._settings.task_timeout)
        if not work.done():
            self._move(task, "failed", classify_failure(TimeoutError()))
            work.cancel()
            await asyncio.wait({work}, timeout=CANCEL_GRACE)
        self._move(task, "cancelled")  # what nobody has marked was cancelled from within

    async def _work(self, task: Task) -> None:
        """Execute a task and mark its end, unless it is cancelled: who cancels has marked it."""
        try:
            result = await self._execute(task)
            encode(result)  # what cannot be sent fails here, not in each list with this task
        except (Exception, SystemExit) as exc:
            error = classify_failure(exc)
            if error["code"] == "internal_error":
                log.exception("task %s raised an unexpected exception", task["task_id"])
            self._move(task, "failed", error)
        else:
            self._move(task, "completed", result)

    async def _execute(self, task: Task) -> Any:
        """Do a task's work and return its result; TaskFailedError. New types of task go here."""
        match task:
            case {"task_type": "compute_sum", "parameters": {"numbers": numbers}}:
                await self._simulate(task, 5)
                return sum(numbers)
            case {"task_type": "generate_report", "parameters": {"title": title, "sections": n}}:
                await self._simulate(task, 5 * n)
                return "\n".join([title, *(f"Section {i} of {n}" for i in range(1, n + 1))])
            case {"task_type": "simulate_failure", "parameters": {"message": message}}:
                await self._simulate(task, 5)
                raise TaskFailedError(message)
            case _:
                raise NotImplementedError(task["task_type"])

    async def _simulate(self, task: Task, seconds: float) -> None:
        """Take the time that real work would take, and report progress."""
        for percent in range(0, 100, 10):
            self._report(task, percent)
            await asyncio.sleep(seconds * self._settings.time_scale / 10)

    def _report(self, task: Task, percent: int) -> None:
        """Set the progress of a running task, in percent; 100 is for `_move` to say."""
        if task["status"] == "processing":
            task["progress"] = max(task["progress"], min(percent, 99))

    def _move(self, task: Task, status: Status, outcome: Any = None) -> bool:
        """Change a status, if NEXT allows (R3), with its result or error; wake the waiters (R2)."""
        if status not in NEXT.get(task["status"], ()):
            return False
        task_id, moment = task["task_id"], now()
        took = utc(moment) - (task["started_at"] or task["created_at"])
        task["status"], why = status, ""
        if status == "processing":
            task["started_at"] = utc(moment)
        else:
            task["finished_at"] = utc(moment)
            task["expires_at"] = expires_at = utc(moment + self._settings.retention)
            self._finished.append((expires_at, task_id))
        if status == "completed":
            task["result"], task["progress"] = outcome, 100
        elif status == "failed":
            # %r, since a line break in a client's message would forge a line of the log.
            task["error"], why = outcome, f": {outcome['code']}, {outcome['message']!r}"
        if changed := self._changed.pop(task_id, None):
            changed.set()
        log.info("task %s %s after %.1f s%s", task_id, status, took.total_seconds(), why)
        return True

    def expire(self) -> None:
        """Remove the tasks whose time has come; every reader calls it, so `expires_at` is exact.

        worker:   moves a task to "completed", sets its Event
        clean-up: removes the task, if the retention is short and the loop is busy
        poller:   wakes up and answers with the record, which it still holds
        """
        moment, before = utc(now()), len(self._tasks)
        while self._finished and self._finished[0][0] <= moment:
            del self._tasks[self._finished.popleft()[1]]
        if expired := before - len(self._tasks):
            log.info("%d expired tasks removed", expired)


# --- HTTP layer -----------------------------------------------------------------------------------
# Dull on purpose: routes translate, `handle_error` says what an exception means, and `problem`
# makes every error answer. FastAPI parses a body before it runs a dependency, and runs none for 404
# and 405, so the limits are ASGI middleware.
TASK = "/tasks/{task_id}"
UNLIMITED = frozenset({"/", "/docs", "/redoc", "/openapi.json", "/health"})  # not counted
INVALID = "The request is not valid."  # the `errors` of the problem tell more
CHUNK = 65536  # bytes of a list between two turns for others
TYPES = ", ".join(get_args(TaskType))
answer = partial(Response, media_type="application/json")
TEXT = {"schema": {"type": "string"}}
LIMITS = {"RateLimit": TEXT, "RateLimit-Policy": TEXT}
PROBLEM: dict[str, Any] = {
    "content": {"application/problem+json": {"schema": TypeAdapter(Problem).json_schema()}},
    "headers": {"Retry-After": TEXT | {"description": "With 429 and 503"}, **LIMITS},
}


def problem(code: int, detail: str, headers: dict[str, str] | None = None, **more: Any) -> Response:
    """Return an error answer (RFC 9457); `more` are further members of `Problem`."""
    title = HTTPStatus(code).phrase
    body = {"type": "about:blank", "title": title, "status": code, "detail": detail, **more}
    return Response(encode(body), code, headers, "application/problem+json")


def problem_item(error: Mapping[str, Any]) -> dict[str, str]:
    """Translate one of pydantic's errors; not its `input` and `ctx`, which are the client's."""
    kind, detail, (where, *path) = error["type"], error["msg"], error["loc"]
    if kind == "json_invalid":
        return {"detail": f"Malformed JSON at character {path[0]}", "pointer": "#"}
    if kind.startswith("union_tag"):  # pydantic would echo the tag
        return {"detail": f"Input should be one of {TYPES}", "pointer": "#/task_type"}
    if kind.startswith("model"):  # and here name our class
        detail = "Input should be an object" + ("" if path else " sent as application/json")
    if where != "body":
        return {"detail": detail, "pointer": error["loc"][-1]}
    # path[0] is the union's tag. An unknown field's name is the client's: long, or with surrogates.
    keys = [str(key)[:50].replace("~", "~0").replace("/", "~1") for key in path[1:]]
    return {"detail": detail, "pointer": quote("/".join(["#", *keys]), "#/", errors="replace")}


async def handle_error(request: Request, exc: Exception) -> Response:
    """Give an exception its HTTP status and words."""
    match exc:
        case RequestValidationError() | ValidationError():
            return problem(400, INVALID, errors=[problem_item(e) for e in exc.errors()[:10]])
        case HTTPException(status_code=400):
            detail = "Not JSON in UTF-8, or nested too deep, or a number with too many digits"
            return problem(400, INVALID, errors=[{"detail": detail, "pointer": "#"}])
        case HTTPException(status_code=405):
            # The router's own Allow has the methods of one route, RFC 9110 wants the path's.
            routes = [r for r in request.app.routes if r.matches(request.scope)[0] != Match.NONE]
            allow = ", ".join(sorted({method for route in routes for method in route.methods}))
            return problem(405, "This path has other methods: see Allow.", {"Allow": allow})
        case HTTPException():
            return problem(exc.status_code, exc.detail)
        case TaskNotFoundError():
            return problem(404, "There is no such task. It may have expired.")
        case TaskFinishedError(args=(task,)):
            return problem(409, f"The task has already {task['status']}.", task=task)
        case UnavailableError():
            return problem(503, str(exc), {"Retry-After": "5"})  # the time of the shortest task
        case _:
            # Sent from outside of the Gate, so it is here that the Gate's headers are added.
            return problem(500, "The server failed.", request.scope.get("gate.headers"))


class Gate:
    """ASGI middleware: counts a request, and bounds its body, before anyone reads that."""

    def __init__(self, app: ASGIApp, limiter: RateLimiter, max_body: int) -> None:
        self._app, self._limiter, self._max_body = app, limiter, max_body
        self._policy = f'"default";q={limiter.limit};w={limiter.window}'

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        prefix = scope.get("root_path", "")  # of a proxy; the path begins with it
        if scope["type"] != "http" or scope["path"].removeprefix(prefix) in UNLIMITED:
            return await self._app(scope, receive, send)
        host, _ = scope.get("client") or ("", 0)  # uvicorn knows which X-Forwarded-For to trust
        allowed, left, reset = await self._limiter.hit(client_key(host))
        headers = scope["gate.headers"] = {
            "ratelimit-policy": self._policy,
            "ratelimit": f'"default";r={left};t={reset}',
            "cache-control": "no-store",
        }
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *raw]
            await send(message)

        if allowed:
            # No GET has its body read, but a stream listens on `receive` for the client to leave.
            body = receive if scope["method"] == "GET" else self._bounded(receive)
            return await self._app(scope, body, send_with_headers)
        refusal = problem(429, f"Try again in {reset} s.", {"Retry-After": str(reset)})
        return await refusal(scope, receive, send_with_headers)

    def _bounded(self, receive: Receive) -> Receive:
        """Wrap `receive`: HTTPException 413 for a body that is too long, 400 for one with a NUL."""
        size = 0

        async def bounded_receive() -> Message:
            nonlocal size
            message = await receive()
            size += len(body := message.get("body", b""))
            if size > self._max_body:
                raise HTTPException(413, f"The body is longer than {self._max_body} bytes.")
            if b"\0" in body:  # json.loads takes UTF-16 and UTF-32, which RFC 8259 does not
                raise HTTPException(400)
            return message

        return bounded_receive


async def stream(tasks: list[Task], status: Status | None, limit: int) -> AsyncIterator[bytes]:
    """Yield the tasks in `status` (None: in any) as a JSON array, a task a line, many a chunk."""
    chunk, separator = bytearray(b"["), b"\n"
    for task in tasks:
        # Filtered as late as this, so that each line agrees with the filter when it is written.
        if status in (None, task["status"]):
            chunk += separator + encode(task)
            separator, limit = b",\n", limit - 1
        if len(chunk) > CHUNK:
            yield bytes(chunk)
            chunk.clear()
            await asyncio.sleep(0)  # a generator that never waits would hold up everybody else
        if not limit:
            break
    yield bytes(chunk) + (b"]\n" if separator == b"\n" else b"\n]\n")


def answers(success: int, *errors: int, **headers: Any) -> dict[Any, Any]:
    """Return what OpenAPI is to say of a route's answers, beside the schema of its success."""
    return {success: {"headers": LIMITS | headers}, **dict.fromkeys((*errors, "default"), PROBLEM)}


def add_routes(app: FastAPI, manager: TaskManager) -> None:
    """Give `app` its routes."""
    accepted = answers(202, 400, 413, 429, 503, Location=TEXT)
    fields = [(n, s, s["description"]) for n, s in Poll.model_json_schema()["properties"].items()]
    query = [{"name": n, "in": "query", "schema": s, "description": d} for n, s, d in fields]
    poll = {"parameters": query}

    @app.post("/tasks", status_code=202, response_model=Accepted, responses=accepted)
    async def submit_task(submission: Submission, request: Request) -> Response:
        """Queue a task; poll it at `Location`. Unknown fields are errors.

        The highest priority starts first, then the oldest; waiting raises the priority.
        """
        parameters = dict(submission.parameters)
        task = manager.submit(submission.task_type, parameters, submission.priority)
        location = {"Location": f"{request.scope['root_path']}/tasks/{task['task_id']}"}
        return answer(encode({"task_id": task["task_id"], "status": "queued"}), 202, location)

    @app.get("/tasks", response_model=list[Task], responses=answers(200, 400, 429))
    async def list_tasks(status: Status | None = None, limit: Limit = None) -> Response:
        """List the tasks in order of submission, streamed, one a line."""
        tasks = manager.snapshot()
        lines = stream(tasks, status, limit or len(tasks))
        return StreamingResponse(lines, media_type="application/json")

    @app.get(TASK, response_model=Task, responses=answers(200, 400, 404, 429), openapi_extra=poll)
    async def get_task(task_id: UUID, request: Request) -> Response:
        """Return a task: at once, or with `wait=true` when its status changes, for some seconds.

        With the status you saw last as `since`, no change between two polls is lost.
        """
        # Read by hand: FastAPI's own reading of two parameters takes a tenth of the whole request.
        asked = Poll.model_validate(dict(request.query_params))
        if asked.wait:
            return answer(encode(await manager.wait(str(task_id), asked.since)))
        return answer(encode(manager.get(str(task_id))))

    @app.delete(TASK, response_model=Task, responses=answers(200, 400, 404, 409, 429))
    async def cancel_task(task_id: UUID) -> Response:
        """Cancel a task, which stays until `expires_at`; 409 if it has completed or failed."""
        return answer(encode(manager.cancel(str(task_id))))

    @app.get("/health", responses={503: {"content": PROBLEM["content"]}})
    async def health() -> Health:
        """Count tasks by status, places in the queue, and workers; 503 if these have died."""
        return manager.health()

    @app.get("/", include_in_schema=False)
    async def root(request: Request) -> Response:
        return RedirectResponse(request.scope["root_path"] + "/docs")


@asynccontextmanager
async def background(job: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run `job` beside the body of an `async with`; then cancel it and wait for its end."""
    task = asyncio.create_task(job)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


def create_app(settings: Settings | None = None) -> FastAPI:
    """Return a new app with a world of its own; settings come from the environment if not given."""
    settings = settings or Settings.from_environment()
    manager, limiter = TaskManager(settings), RateLimiter(settings.rate_limit, settings.rate_window)

    async def clean_up() -> None:
        """Give back the memory of expired tasks and quiet addresses."""
        while True:
            await asyncio.sleep(settings.cleanup_interval)
            manager.expire()
            await limiter.sweep()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with (
            background(manager.run()),
            background(clean_up()),
        ):
            yield

    app = FastAPI(
        title="Task manager",
        description="Submit a task, then poll it until it is completed, failed or cancelled.",
        generate_unique_id_function=lambda route: route.name,
        lifespan=lifespan,
        redirect_slashes=False,  # one would repeat the Host header, which is the client's
        swagger_ui_oauth2_redirect_url=None,
    )
    app.add_middleware(Gate, limiter=limiter, max_body=settings.max_body)
    for error in (ManagerError, RequestValidationError, ValidationError, HTTPException, Exception):
        app.add_exception_handler(error, handle_error)
    add_routes(app, manager)
    app.state.manager, app.state.limiter = manager, limiter
    return app


app = create_app()
