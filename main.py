"""A rate-limited asynchronous task manager with polling: one file, to be read from top to bottom.

Clients submit tasks over HTTP, poll or long-poll them, list them and cancel them. Five workers take
the tasks from a priority queue in memory, ended tasks are kept for ten minutes, and each client
address may send ten requests a minute. To run it: `uvicorn main:app --reload`, then open /docs.


The path of a task
------------------

    POST /tasks -> HeadMiddleware -> RateLimitMiddleware -> BodyLimitMiddleware
        -> a Submission (validated) -> TaskManager.submit -> TaskQueue -> a worker -> _run_task
        -> _work -> _execute -> _change_status -> ten minutes later: expire

    queued ---> processing ---> completed | failed
       |            |
       +------------+---------> cancelled

A status only ever moves along these arrows. The three on the right are final.


Three facts of asyncio
----------------------

Everything below rests on them. An *asyncio task* is what `asyncio.create_task` makes: a coroutine
that runs beside the others. A plain *task* in this file is always a record: what a client submits.
The *work* of a task is the asyncio task that runs its code.

1.  The *event loop* runs all coroutines, in one thread. It changes from one to another only where
    one of them really waits, which can happen at an `await`, at an `async with` or `async for`,
    which await for you, and at the `yield` of an async generator, whose reader may wait. The code
    between two waits is called a *stretch* here. A stretch is atomic: nobody else runs in the
    middle of it. To `await` a coroutine that itself never waits ends no stretch.
2.  `asyncio_task.cancel()` does not stop anything by itself. When that asyncio task next gets its
    turn, `asyncio.CancelledError` is raised in it, at the await where it waits; and if that awaits
    another asyncio task (`await other`), the other one is cancelled too. The code may clean up, may
    take its time, may even ignore it. If it is cancelled before its first step, not a line of it
    ever runs: no `except`, no `finally`.
3.  An `asyncio.Event` is a flag with a waiting room. `set()` lets all who wait go on, each when the
    loop comes to it, and whoever comes later does not wait at all. `clear()` closes the room again.


Six rules
---------

The code cites them where it relies on them.

R1  A stretch is atomic, so whatever must be seen whole happens in one stretch. Every change of a
    record is such a stretch, and needs no lock.
R2  One method, `_change_status`, changes a status, and it wakes those who wait for the change.
    Whoever waits takes the task's Event from the dict `_changed`, or puts a new one there, in the
    same stretch in which it reads the status. `_change_status` takes the Event out of the dict and
    sets it. Nobody clears an Event. (`stop_waiting` takes out and sets all of them, though no
    status changes.)
R3  A final status is final. To stop a task, mark its record, then cancel the asyncio task that
    works on it. Whatever that one reports afterwards is ignored.
R4  A task leaves the queue exactly once: to a worker, or by cancellation (the stop cancels all). A
    cancelled task leaves nothing behind in the queue and occupies no place there.
R5  A worker survives its task. The work runs in an asyncio task of its own, and the worker waits
    for it with `asyncio.wait`. That returns when the work has ended in any way, by cancellation
    too, and raises CancelledError only when the worker itself is cancelled.
R6  What is stored can be sent. Parameters and results are stored as copies, encoded to JSON and
    decoded again. Parameters that cannot be encoded are refused, a result that cannot be encoded
    fails its task, and what the work still holds of either is not part of the record.


What this file does not do
--------------------------

It keeps nothing over a restart, it runs as one process only (`--workers 2` would be two managers,
each with half of the tasks), it knows no users, so anybody may see and cancel everything, and it
cannot stop work that blocks the event loop or ignores its cancellation. README.md names systems
without these limits, and which parts of this file they replace.


Map
---

    The engine, which knows no HTTP          The API, which translates
    -------------------------------          -------------------------
    Vocabulary    words, the record          Models        what comes in and goes out
    Errors        who raises what            Problems      one shape for all errors
    Settings      the environment            Middleware    HEAD, rate limit, size of a body
    Rate limiter  a sliding window           Stream        the list of tasks
    Task queue    the next one, by priority  OpenAPI       data for /docs
    Task manager  a task's life, in order    Routes        one call of the manager each
                                             The app       starts and stops all of it
"""

import asyncio
import heapq
import ipaddress
import itertools
import json
import logging
import math
import os
import signal
import textwrap
import traceback
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import datetime, timedelta, timezone
from fractions import Fraction
from functools import lru_cache, partial
from http import HTTPStatus
from types import FrameType
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, get_args
from urllib.parse import quote
from uuid import UUID, uuid4

from fastapi import Body, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import RedirectResponse, StreamingResponse
from fastapi.routing import APIRoute
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    with_config,
)
from pydantic_core import PydanticCustomError, from_json, to_json, to_jsonable_python
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from typing_extensions import NotRequired, Self, TypeAliasType, TypedDict

# A plain `getLogger(__name__)` would show nothing under uvicorn, which configures its own loggers
# and leaves the root logger alone. A child of one of uvicorn's appears beside its lines.
log = logging.getLogger("uvicorn.error.tasks")


# ==================================================================================================
# Vocabulary
#
# A task is one dict from its submission to its end, and that dict is what clients get. It is a
# TypedDict: a plain dict at run time, which is what the JSON encoder is fastest with, and a checked
# type for mypy. The docstrings below its fields are for two readers: pydantic carries them into the
# OpenAPI document, so /docs says the same as this file.
# ==================================================================================================

# `TypeAliasType` is `type Status = ...` for Pythons before 3.12. Unlike a plain alias it has a name
# at run time, under which it appears in the OpenAPI document: once, and not in every field.
Status = TypeAliasType(
    "Status",
    Literal["queued", "processing", "completed", "failed", "cancelled"],
)
Priority = TypeAliasType(
    "Priority",
    Literal["high", "normal", "low"],
)
ErrorCode = TypeAliasType(
    "ErrorCode",
    Literal["task_failed", "timeout", "internal_error"],
)

STATUSES: tuple[Status, ...] = get_args(Status.__value__)

# The drawing at the top of the file, as data: which statuses may follow a status.
TRANSITIONS: Mapping[Status, tuple[Status, ...]] = {
    "queued": ("processing", "cancelled"),
    "processing": ("completed", "failed", "cancelled"),
    "completed": (),
    "failed": (),
    "cancelled": (),
}
FINAL = frozenset(status for status in STATUSES if not TRANSITIONS[status])

Parameters: TypeAlias = dict[str, Any]
Timestamp: TypeAlias = Annotated[
    str,
    Field(json_schema_extra={"format": "date-time"}),
]
TaskId: TypeAlias = Annotated[
    str,
    Field(json_schema_extra={"format": "uuid"}),
]

# Without this, pydantic would leave out the docstrings of the fields.
documented = with_config(ConfigDict(use_attribute_docstrings=True))


@documented
class TaskError(TypedDict):
    """Why a task has failed."""

    code: ErrorCode
    """`task_failed`: the work says that it cannot be done; `timeout`: it took too long;
    `internal_error`: a fault of the server, whose log tells more."""

    message: str
    """For a person to read. With `task_failed` it is the work's own."""


@documented
class Task(TypedDict):
    """A task: the same twelve fields in every state, and null where there is no value yet."""

    task_id: TaskId
    """A random UUID (version 4), made by the server."""

    task_type: str
    """As submitted. It decides what `parameters` and `result` are."""

    parameters: Parameters
    """As submitted, with the defaults filled in. They never change."""

    priority: Priority
    """As submitted. It decides when the task starts, and nothing else."""

    status: Status
    """Only ever moves forward: queued, processing, then completed, failed or cancelled."""

    progress: int
    """Percent. It never falls, and is 100 if and only if the task is completed."""

    result: Any
    """Null unless completed."""

    error: TaskError | None
    """Null unless failed."""

    created_at: Timestamp
    """When the task was submitted: UTC, RFC 3339, always with six digits and a Z."""

    started_at: Timestamp | None
    """Null until processing, and for ever if the task was cancelled before."""

    finished_at: Timestamp | None
    """Null until the task is completed, failed or cancelled."""

    expires_at: Timestamp | None
    """Null until `finished_at` is set; from this moment on the task is no longer there (404)."""


@documented
class Health(TypedDict):
    """What `GET /health` answers while the workers run."""

    status: Literal["ok"]
    """Always `ok`; a server without workers answers 503."""

    tasks: dict[Status, int]
    """How many tasks there are in each status."""

    queue: dict[Literal["size", "capacity"], int]
    """How many tasks wait for a worker, and how many may; beyond that, a submission gets 503."""

    workers: dict[Literal["busy", "total"], int]
    """How many workers have a task in hand, and how many there are."""


# Two clocks, each read through one name, so that a test can own both. The loop's clock never jumps:
# every deadline is measured on it. The wall clock may be changed at any time, so it is only used
# for the dates that are shown.


def now() -> float:
    """Return the event loop's time, in seconds since some moment in the past."""
    return asyncio.get_running_loop().time()


def utc_now() -> datetime:
    """Return the date and time of the wall clock."""
    return datetime.now(timezone.utc)


def timestamp(moment: datetime) -> str:
    """Return a UTC date as RFC 3339 writes it, with six digits also where they are zero."""
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def json_form(value: Any) -> Any:
    """Return what `json.dumps` shall write for a value of a type that JSON does not have."""
    if isinstance(value, bytes | bytearray | memoryview):
        # Pydantic would guess that they are text.
        raise TypeError("bytes are no text: encode them, in base64 for example")
    return to_jsonable_python(value)  # dates, dataclasses, models, sets, iterators


def json_copy(value: Any, *, allow_nan: bool = False) -> Any:
    """Return a copy of `value` that has been through JSON (R6).

    Raise TypeError, ValueError or RecursionError for what cannot be sent: an object that JSON has
    no form for, bytes, half a surrogate pair (a piece of a character, which UTF-8 cannot encode), a
    value inside itself, more than 200 levels (pydantic's bound). NaN and infinity, which JSON
    lacks, are refused too; with `allow_nan` they pass, and are sent as null: better a result with a
    hole in it than no result.
    """
    text = json.dumps(value, default=json_form)
    return from_json(text, allow_inf_nan=allow_nan)


def printable(text: str) -> str:
    """Return `text` with a question mark for each half of a surrogate pair, which UTF-8 lacks."""
    return text.encode(errors="replace").decode()


# ==================================================================================================
# Errors
#
# The manager refuses with a ManagerError and knows no HTTP; `handle_error`, far below, gives each
# its HTTP status. TaskFailedError stands apart: it ends in a record, and never in an HTTP status.
# ==================================================================================================


class ManagerError(Exception):
    """What the manager refuses. The base of the next four."""


class InvalidParametersError(ManagerError):
    """400: raised by `submit` for parameters that could not be sent out again (R6)."""


class TaskNotFoundError(ManagerError):
    """404: raised by whatever takes a task's id; there is no such task, or no longer."""


class TaskFinishedError(ManagerError):
    """409: raised by `cancel` for a task that has completed or failed."""

    def __init__(self, task: Task) -> None:
        super().__init__(task["task_id"])
        self.task = task


class UnavailableError(ManagerError):
    """503: raised by `submit` and `health` where nobody would do the work, or there is no room."""

    def __init__(self, detail: str, retry_after: int | None = None) -> None:
        """Take the reason, and after how many seconds a client may try again, if that is known."""
        super().__init__(detail)
        self.retry_after = retry_after


class TaskFailedError(Exception):
    """Raised by work that cannot be done. Its message is for the client to read."""


INTERNAL_ERROR: TaskError = {
    "code": "internal_error",
    "message": "The task failed unexpectedly.",
}


TIMED_OUT: TaskError = {
    "code": "timeout",
    "message": "The task took too long.",
}


def classify_failure(exc: BaseException) -> TaskError:
    """Return what the client may know of the exception that has ended a task's work."""
    # An ExceptionGroup, as asyncio.TaskGroup raises it: if there is only one exception in it, that
    # is the reason. (Python 3.10 has no such class.)
    inner: tuple[BaseException, ...] = getattr(exc, "exceptions", ())
    if len(inner) == 1:
        return classify_failure(inner[0])
    match exc:
        case TaskFailedError():
            return {"code": "task_failed", "message": printable(str(exc))}
        case _:
            # A TimeoutError too: it comes from something within the work, and not from us.
            return INTERNAL_ERROR


def traceback_text(exc: BaseException) -> str:
    """Return a traceback for the log, with a bar in front of each line.

    An exception's text may hold what a client has sent, line breaks included. Without the bar:

        ValueError: no such file: x
        INFO:     task 4711 completed                                  <-- forged by a client
    """
    lines = traceback.format_exception(exc)
    return textwrap.indent("".join(lines), "| ")


# ==================================================================================================
# Settings
#
# Read from the environment once, at the start. With a bad value the server does not start, and the
# error names the variable. All numbers are finite, since asyncio keeps its timers in a heap, and
# one at `nan` would corrupt the order of the heap; and bounded, since dates are. To add a setting,
# add a line.
# ==================================================================================================

LARGEST_SETTING = 1_000_000_000  # 30 years of seconds are enough

Count: TypeAlias = Annotated[int, Field(ge=1, le=LARGEST_SETTING)]
Seconds: TypeAlias = Annotated[float, Field(gt=0, le=LARGEST_SETTING)]
SecondsOrZero: TypeAlias = Annotated[float, Field(ge=0, le=LARGEST_SETTING)]


class Settings(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """What can be tuned: `Settings(workers=2)` in a test, `TASKS_WORKERS=2` in the environment."""

    workers: Annotated[int, Field(ge=1, le=1000)] = 5
    """How many tasks run at a time: a worker has one in hand."""

    queue_size: Count = 100
    """How many tasks may wait for a worker."""

    max_tasks: Count = 10_000
    """How many tasks are kept in all, whatever their status."""

    rate_limit: Count = 10
    """How many requests one client may send in any `rate_window`."""

    rate_window: Count = 60
    """Whole seconds, since the RateLimit header fields know no fractions."""

    long_poll: SecondsOrZero = 10
    """How many seconds a request with `wait=true` is held at most."""

    retention: Seconds = 600
    """For how many seconds after its end a task can still be asked for."""

    cleanup_interval: Annotated[Seconds, Field(ge=0.1)] = 30
    """Seconds between two rounds of the clean-up; much less would only keep the processor busy."""

    task_timeout: Seconds = 60
    """How many seconds the work of a task may take, its time in the queue not included."""

    priority_step: SecondsOrZero = 30
    """How many seconds of waiting one level of priority is worth: see the task queue."""

    max_body: Count = 65_536
    """How many bytes the body of a request may have."""

    time_scale: SecondsOrZero = 1
    """What the duration of the simulated work is multiplied by; 0 for none."""

    @classmethod
    def from_environment(cls) -> Self:
        """Read the `TASKS_*` variables; raise SystemExit with a line for each bad one."""
        variables = {name: f"TASKS_{name.upper()}" for name in cls.model_fields}
        given: dict[str, str] = {}
        for name, variable in variables.items():
            if variable in os.environ:
                given[name] = os.environ[variable]
        try:
            return cls.model_validate(given)
        except ValidationError as exc:
            lines = []
            for error in exc.errors():
                variable = variables[str(error["loc"][0])]
                message = error["msg"]
                lines.append(f"{variable}: {message}")
            raise SystemExit("\n".join(lines)) from None


# ==================================================================================================
# Rate limiter
#
# A sliding window: at most `limit` requests in any `window` seconds. For each key (a client's
# address) a deque holds the times of the requests that were let through, oldest first: the new ones
# are appended on the right, the old ones leave on the left (a list would move all the others when
# its first one leaves). A fixed window, a counter that is reset every minute, would do this:
#
#   11:59:59  client: ten requests, counted in the first minute
#   12:00:00  the counter is reset
#   12:00:00  client: ten more               <-- twenty within a second
#
# A refused request is not counted, so a client that keeps knocking gets in as soon as one that
# waits.
# ==================================================================================================


class RateLimiter:
    """Counts requests in a sliding window, for each key."""

    def __init__(self, limit: int, window: int) -> None:
        """Allow `limit` requests in any `window` seconds."""
        self.limit = limit
        self.window = window
        # key -> the times of its counted requests, at most `limit`, oldest first.
        self._hits: dict[str, deque[float]] = {}
        # A lock between coroutines, not threads. Today it is always free, since nobody waits while
        # holding it: each method is one stretch (R1), and right even without. It is for the day
        # when the times are in a store that is awaited. Then, without it:
        #
        #   request 1: sees nine hits, awaits the store
        #   request 2: sees nine hits, awaits the store
        #   both:      append theirs                                  <-- eleven in a minute
        self._lock = asyncio.Lock()

    async def hit(self, key: str) -> int:
        """Count a request and return 0; or count nothing, and return the seconds to wait."""
        async with self._lock:
            moment = now()
            hits = self._hits.setdefault(key, deque())
            self._drop_old(hits, moment)
            if len(hits) < self.limit:
                hits.append(moment)
                return 0
            # At least 1, since what `_drop_old` has left is still within the window.
            return self._seconds_left(hits, moment)

    async def quota(self, key: str) -> tuple[int, int]:
        """Return how many requests `key` has left, and in how many seconds there is one more."""
        async with self._lock:
            moment = now()
            hits = self._hits.get(key, deque())
            self._drop_old(hits, moment)
            left = self.limit - len(hits)
            seconds = self._seconds_left(hits, moment)
            return left, seconds

    async def sweep(self) -> None:
        """Forget the keys that have gone quiet: an empty deque costs nearly a kilobyte."""
        async with self._lock:
            moment = now()
            for key, hits in list(self._hits.items()):
                self._drop_old(hits, moment)
                if not hits:
                    del self._hits[key]

    # The next two methods both compute `hits[0] + window`. In the first one,
    # `hits[0] <= moment - window` means the same, but floats may round it the other way, and the
    # two would disagree about a client that has waited exactly as long as it was told.

    def _drop_old(self, hits: deque[float], moment: float) -> None:
        """Remove the times that have left the window by `moment`."""
        while hits and hits[0] + self.window <= moment:
            hits.popleft()

    def _seconds_left(self, hits: deque[float], moment: float) -> int:
        """Return in how many seconds the oldest time leaves the window; 0 if there is none."""
        if not hits:
            return 0
        # Rounded up, or the client would come too early. `min`, since floats may make this a hair
        # more than the window.
        seconds = hits[0] + self.window - moment
        return min(math.ceil(seconds), self.window)


# ==================================================================================================
# Task queue
#
# The tasks that wait for a worker, the one that is due first in front. A task's due time is the
# time of its submission plus some seconds that depend on its priority. It never has to be computed
# again, and nothing starves. With a `priority_step` of 30 s:
#
#   low,  submitted at  0: due at 60
#   high, submitted at 59: due at 59, so it is first
#   high, submitted at 61: due at 61, so it is second: the low one has waited long enough
#
# So nothing that comes more than two steps after a task can overtake it.
#
# asyncio.PriorityQueue orders the entries (a heap), bounds their number and lets workers wait. It
# lacks a way to take out an entry in the middle, and a cancelled task must not stay (R4). Without:
#
#   client: submits 100 tasks and cancels them all; they stay in the queue, marked "cancelled"
#   client: submits one more: 503, the queue is full       <-- of nothing
# ==================================================================================================

# Due time, sequence number, id of the task. No two entries have the same sequence number, so a tie
# in the due time is first come first served, and a comparison never gets to the ids.
Entry: TypeAlias = tuple[float, int, str]

PRIORITY_STEPS: Mapping[Priority, int] = {
    "high": 0,
    "normal": 1,
    "low": 2,
}


class TaskQueue(asyncio.PriorityQueue[Entry]):
    """A priority queue from which a task can be removed."""

    # The heap of asyncio.PriorityQueue: private, but there since asyncio began.
    _queue: list[Entry]

    def remove(self, task_id: str) -> None:
        """Take a task out, wherever it stands (R4), in time proportional to the queue's length."""
        others = [entry for entry in self._queue if entry[2] != task_id]
        heapq.heapify(others)
        self._queue = others


# ==================================================================================================
# Task manager
#
# All tasks, from submission to removal; the methods stand in the order of a task's life. A method
# without `async` is one stretch (R1). That is why no lock is to be seen here, although five
# workers, the clean-up and any number of requests change the same dicts. A check and what relies on
# it stand in one stretch. Without R1:
#
#   request 1: sees 99 tasks in the queue, awaits something
#   request 2: sees 99 tasks in the queue, awaits something
#   request 1: puts its task into the queue: 100
#   request 2: puts its task into the queue: 101       <-- one more than there are places
# ==================================================================================================

# Seconds that work gets to end after its time-out, or at the stop. Then it is abandoned: its worker
# goes on without it.
CANCEL_GRACE = 5.0
RETRY_AFTER = 5  # seconds, the duration of the shortest task: by then the queue may have moved

# Work calls it, in percent.
ReportProgress: TypeAlias = Callable[[float], None]

AsyncioTask: TypeAlias = asyncio.Task[None]


class TaskManager:
    """Keeps the tasks, and has them worked on while `working` is entered."""

    def __init__(self, settings: Settings) -> None:
        """Make an empty manager; nothing runs yet."""
        self._settings = settings
        # Whether tasks are accepted and polls are held: from the start of the workers until the
        # server is told to stop, or a worker has died.
        self._open = False
        # All records by id, in order of submission.
        self._tasks: dict[str, Task] = {}
        # How many records there are in each status: kept, since /health is not limited and must not
        # take longer with more tasks.
        self._counts: dict[Status, int] = dict.fromkeys(STATUSES, 0)
        # An entry for each task with the status queued, and none for any other (R4).
        self._queue = TaskQueue(settings.queue_size)
        self._sequence = itertools.count()
        # id -> what is set when the status changes: made by the first who waits, removed by the
        # next change (R2).
        self._changed: dict[str, asyncio.Event] = {}
        # id -> the asyncio task that does the work, until it has really ended.
        self._running: dict[str, AsyncioTask] = {}
        # How many workers have a task in hand. (`_running` may have more: work that was abandoned.)
        self._busy = 0
        # (when to remove it, id) of each final task. The retention is the same for all, so the task
        # that ends first is removed first, and appending keeps the deque sorted.
        self._finished: deque[tuple[float, str]] = deque()

    # --- What clients ask for ---------------------------------------------------------------------

    def submit(
        self,
        task_type: str,
        parameters: Parameters,
        priority: Priority = "normal",
    ) -> Task:
        """Queue a task and return its record.

        Raise InvalidParametersError or UnavailableError; then no trace of the task is left.
        """
        self._check_room()
        try:
            parameters = json_copy(parameters)
        except (TypeError, ValueError, RecursionError) as exc:
            raise InvalidParametersError("The parameters cannot be stored as JSON.") from exc
        task = self._new_record(task_type, parameters, priority)
        task_id = task["task_id"]
        steps = PRIORITY_STEPS[priority]
        due = now() + steps * self._settings.priority_step
        # One stretch (R1): no worker can take the entry before the record is there.
        entry = (due, next(self._sequence), task_id)
        self._queue.put_nowait(entry)
        self._tasks[task_id] = task
        self._counts["queued"] += 1
        log.info("task %s queued: %s, priority %s", task_id, task_type, priority)
        return task

    def _check_room(self) -> None:
        """Raise UnavailableError where a task would wait for ever, or would be one too many."""
        self._check_open()
        self.expire()
        if self._queue.full():
            raise UnavailableError("The queue is full.", RETRY_AFTER)
        if len(self._tasks) >= self._settings.max_tasks:
            retry_after = RETRY_AFTER
            if self._finished:
                removal, _ = self._finished[0]
                seconds = math.ceil(removal - now())
                retry_after = max(1, seconds)
            raise UnavailableError("No more tasks can be kept.", retry_after)

    def _check_open(self) -> None:
        """Raise UnavailableError if no workers run, or the server is stopping."""
        if not self._open:
            raise UnavailableError("No tasks are accepted now.")

    @staticmethod
    def _new_record(task_type: str, parameters: Parameters, priority: Priority) -> Task:
        """Return the record of a task that is about to be queued."""
        return {
            "task_id": str(uuid4()),
            "task_type": task_type,
            "parameters": parameters,
            "priority": priority,
            "status": "queued",
            "progress": 0,
            "result": None,
            "error": None,
            "created_at": timestamp(utc_now()),
            "started_at": None,
            "finished_at": None,
            "expires_at": None,
        }

    def find(self, task_id: str) -> Task | None:
        """Return a task, or None if there is no such task or it has expired."""
        self.expire()
        return self._tasks.get(task_id)

    def get(self, task_id: str) -> Task:
        """Return a task; raise TaskNotFoundError if there is none."""
        task = self.find(task_id)
        if task is None:
            raise TaskNotFoundError(task_id)
        return task

    async def wait(self, task_id: str, since: Status | None = None) -> Task:
        """Return a task when its status changes; raise TaskNotFoundError if there is none.

        At once if the status is not `since`, if it is final, or if the server is stopping;
        unchanged after `long_poll` seconds. The status that a client saw last is a cursor: if it
        changes between two polls, the second one sees that and does not wait.
        A client that hangs up ends nothing: its poll lasts until the change or the bound.

        Two ways to sleep through the change, without R2:

            poller: reads "processing", then awaits something else
            worker: says "completed"; there is no Event to set
            poller: makes an Event and waits for the next change       <-- there is none

            poller: reads "processing", starts an asyncio task that is to wait for the Event
            worker: says "completed", sets the Event, clears it for the next change
            poller: that asyncio task takes its first step and waits   <-- in vain
        """
        task = self.get(task_id)
        changed_already = since is not None and since != task["status"]
        if changed_already or task["status"] in FINAL or not self._open:
            return task
        # The same stretch in which the status was read: no `await` may ever come between.
        changed = self._changed.setdefault(task_id, asyncio.Event())
        # Where the change and the time-out fall together, `wait_for` may report either. It does not
        # matter: what is returned is the record as it is by then.
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(changed.wait(), self._settings.long_poll)
        return task  # not looked up again: it may have expired while the loop was busy

    def snapshot(self) -> list[str]:
        """Return the ids of all tasks, in order of submission: see the section on the stream."""
        return list(self._tasks)

    def health(self) -> Health:
        """Return counts of tasks, places and workers; raise UnavailableError without workers."""
        self._check_open()
        self.expire()
        return {
            "status": "ok",
            "tasks": self._counts.copy(),
            "queue": {
                "size": self._queue.qsize(),
                "capacity": self._settings.queue_size,
            },
            "workers": {
                "busy": self._busy,
                "total": self._settings.workers,
            },
        }

    def cancel(self, task_id: str) -> Task:
        """Cancel a task and return it; raise TaskNotFoundError or, too late, TaskFinishedError.

        A task that is cancelled already is returned as it is. Without R3:

            client: DELETE; the asyncio task is cancelled, the client is told "cancelled"
            work:   catches CancelledError, and returns a result all the same
            work:   says "completed"                                   <-- two ends of one task
        """
        task = self.get(task_id)
        if task["status"] in ("completed", "failed"):
            raise TaskFinishedError(task)
        if task["status"] == "queued":
            self._queue.remove(task_id)
        self._cancel(task)
        return task

    def _cancel(self, task: Task) -> None:
        """Mark a task as cancelled, then cancel its work (R3)."""
        # Only once: a second time would interrupt the clean-up that the first has begun.
        cancelled_now = self._change_status(task, "cancelled")
        work = self._running.get(task["task_id"])
        if cancelled_now and work is not None:
            work.cancel()

    # --- The workers ------------------------------------------------------------------------------

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """Run the workers during the body of an `async with`; after it, every task is final."""
        self._open = True
        workers = []
        for _ in range(self._settings.workers):
            workers.append(asyncio.create_task(self._worker()))
        supervisor = asyncio.create_task(self._supervise(workers))
        try:
            yield
        finally:
            await self._stop([supervisor, *workers])

    async def _supervise(self, workers: list[AsyncioTask]) -> None:
        """Wait for the workers, which never end by themselves; if one dies, log it and stop all.

        `gather` waits for five endless workers, and not for five submitted tasks. If it did, then:

            tasks:  four take 5 s, the fifth takes 30 s
            gather: returns after 30 s
            next:   five more tasks start; four places stood empty for 25 s  <-- the slowest rules
        """
        try:
            await asyncio.gather(*workers)
        except BaseException as exc:
            # `gather` raises CancelledError when it is cancelled, which `_stop` does, or when one
            # of its workers is, which nobody should do. `_stop` sets `_open` to False before.
            if isinstance(exc, asyncio.CancelledError) and not self._open:
                raise
            log.critical("a worker died, so all stop", exc_info=True)
        # The others must be stopped too: `gather` raises the first failure and lets them go on.
        #
        #   worker 1: dies; gather raises, nobody looks at the others any more
        #   worker 2: takes the next task, and dies unseen               <-- /health says "ok"
        await self._stop(workers)

    async def _stop(self, asyncio_tasks: list[AsyncioTask]) -> None:
        """Cancel every task, and the workers; wait for the end of all work, for some seconds."""
        self._open = False
        for task in self._tasks.values():
            self._cancel(task)
        # The entries of the cancelled tasks go with the old queue (R4), which is bound to this
        # event loop: the app may be started again in another.
        self._queue = TaskQueue(self._settings.queue_size)
        for asyncio_task in asyncio_tasks:
            asyncio_task.cancel()
        # Work may clean up. What has not ended in time is abandoned.
        ending = [*asyncio_tasks, *self._running.values()]
        await asyncio.wait(ending, timeout=CANCEL_GRACE)

    def stop_waiting(self) -> None:
        """Answer all long polls now, and accept no more tasks: the server has been told to stop."""
        self._open = False
        for task_id in list(self._changed):
            self._wake(task_id)

    async def _worker(self) -> None:
        """Take one task after the other, until cancelled.

        CancelledError is not caught here, nor in `_run_task`. (A `finally` does not catch.) Else:

            server: stops, cancels the worker, waits for its end
            worker: catches CancelledError, believes that its task was cancelled, goes on
            server: has waited 5 s in vain                             <-- the worker never ends
        """
        while True:
            _, _, task_id = await self._queue.get()
            # One stretch (R1), from where `get` takes the entry out to the first wait in
            # `_run_task`. So a DELETE finds each task either in the queue or processing.
            self._busy += 1
            try:
                await self._run_task(self._tasks[task_id])
            finally:
                self._busy -= 1

    async def _run_task(self, task: Task) -> None:
        """Have the work of one task done; return when it has ended, or has been given up (R5).

        `await work` would raise CancelledError both when the work is cancelled (a DELETE) and when
        this worker is (the stop), and could not tell which. `asyncio.wait` raises it only in the
        second case; in the first it just returns, since the work has ended.
        """
        task_id = task["task_id"]
        # Before `create_task`, since an eager asyncio task (Python 3.12) begins inside of that.
        self._change_status(task, "processing")
        work = asyncio.create_task(self._work(task))
        # Here a DELETE and the stop find it to cancel it. And the event loop itself keeps only a
        # weak reference: work that has been abandoned could be garbage-collected.
        self._running[task_id] = work
        work.add_done_callback(lambda _: self._running.pop(task_id))
        await asyncio.wait({work}, timeout=self._settings.task_timeout)
        if not work.done():
            await self._time_out(task, work)
        elif task["status"] not in FINAL:
            # It has ended without a word: cancelled before its first step, and not by us (fact 2).
            self._fail(task, asyncio.CancelledError("cancelled before its first step"))

    async def _time_out(self, task: Task, work: AsyncioTask) -> None:
        """Stop work that has used up its time, and abandon it if it does not end."""
        # First mark, then cancel (R3). If a DELETE has cancelled it before, it is cleaning up, and
        # is not cancelled again.
        if self._change_status(task, "failed", error=TIMED_OUT):
            work.cancel()
        await asyncio.wait({work}, timeout=CANCEL_GRACE)
        if not work.done():
            log.warning("task %s: its work does not end, and is abandoned", task["task_id"])

    async def _work(self, task: Task) -> None:
        """Do the work of a task, and write into the record how it has ended."""
        try:
            result = await self._execute(
                task["task_type"],
                json_copy(task["parameters"]),  # a copy of its own, to do with as it likes (R6)
                partial(self._report_progress, task),
            )
            result = json_copy(result, allow_nan=True)
        except asyncio.CancelledError as exc:
            # Who cancels a task marks its record first (R3). If it is not marked, nobody has: then
            # something inside the work was cancelled, which is a fault and no cancellation.
            if task["status"] not in FINAL:
                self._fail(task, exc)
            # Raised again, or this asyncio task would look as if it had ended normally.
            raise
        except BaseException as exc:  # noqa: BLE001 - `_fail` records and logs it
            # Not only Exception: `sys.exit()` in some library would end the server, since asyncio
            # lets SystemExit out of the event loop.
            self._fail(task, exc)
        else:
            self._change_status(task, "completed", result=result)

    async def _execute(
        self,
        task_type: str,
        parameters: Parameters,
        report: ReportProgress,
    ) -> Any:
        """Do a task's work and return its result, or raise TaskFailedError with the reason.

        `parameters` are as the task's model has validated them. `report(percent)` tells progress;
        it is not for other threads (R1).
        This is the place for real work. What it must not do is block the event loop, for then
        nobody else runs: what blocks goes through `await asyncio.to_thread(...)`. (To cancel that
        ends the `await`, and not the thread.)
        """
        match task_type:
            case "compute_sum":
                await self._simulate(5, report)
                return exact_sum(parameters["numbers"])
            case "generate_report":
                title = parameters["title"]
                sections = parameters["sections"]
                await self._simulate(5 * sections, report)
                return f"{title}\nSections: {sections}"
            case "simulate_failure":
                await self._simulate(5, report)
                raise TaskFailedError(parameters["message"])
            case _:
                # Without this case a type that was forgotten above would "complete" with None.
                raise NotImplementedError(f"there is no work for {task_type!r}")

    async def _simulate(self, seconds: float, report: ReportProgress) -> None:
        """Take the time that real work would take, in ten steps."""
        step = seconds * self._settings.time_scale / 10
        for percent in range(0, 100, 10):
            report(percent)
            await asyncio.sleep(step)

    def _report_progress(self, task: Task, percent: float) -> None:
        """Set the progress of a task that is processing. It never falls; only the end sets 100."""
        if task["status"] == "processing":
            whole_percent = int(min(percent, 99))
            task["progress"] = max(task["progress"], whole_percent)

    def _fail(self, task: Task, exc: BaseException) -> None:
        """Mark a task as failed by an exception, and log what the client is not told."""
        try:
            error = classify_failure(exc)
        except BaseException:  # noqa: BLE001 - `str(exc)` may raise anything
            error = INTERNAL_ERROR
        self._change_status(task, "failed", error=error)
        if error["code"] == "internal_error":
            log.error("task %s: unexpected end\n%s", task["task_id"], traceback_text(exc))

    # --- The status, and the end ------------------------------------------------------------------

    def _change_status(
        self, task: Task, status: Status, result: Any = None, error: TaskError | None = None
    ) -> bool:
        """Change a status, with all that goes with it, and wake those who wait for it (R2).

        Return False and change nothing if TRANSITIONS does not allow it: so a final task stays as
        it is, whoever still wants to say something about it (R3).
        """
        if status not in TRANSITIONS[task["status"]]:
            return False
        self._counts[task["status"]] -= 1
        self._counts[status] += 1
        task["status"] = status
        match status:
            case "processing":
                task["started_at"] = timestamp(utc_now())
            case "completed":
                task["result"] = result
                task["progress"] = 100
            case "failed":
                task["error"] = error
            # "cancelled" has nothing more.
        if status in FINAL:
            self._keep_for_a_while(task)
        self._wake(task["task_id"])
        # A dict shows its strings as `repr` does, so that no line break in them forges a log line.
        reason = f" {error}" if error else ""
        log.info("task %s %s%s", task["task_id"], status, reason)
        return True

    def _wake(self, task_id: str) -> None:
        """Let all go on who wait for a change of this task, and forget their Event (R2)."""
        changed = self._changed.pop(task_id, None)
        if changed is not None:
            changed.set()

    def _keep_for_a_while(self, task: Task) -> None:
        """Write down when a task has ended, and remember when to remove it."""
        finished_at = utc_now()
        retention = self._settings.retention
        task["finished_at"] = timestamp(finished_at)
        task["expires_at"] = timestamp(finished_at + timedelta(seconds=retention))
        # The two above are for the client. The removal goes by the loop's clock, which nobody sets.
        removal = now() + retention
        self._finished.append((removal, task["task_id"]))

    def expire(self) -> None:
        """Remove the final tasks whose time has come.

        Whoever reads calls it first, so that a task is gone at its `expires_at` and not up to
        `cleanup_interval` seconds later.
        """
        moment = now()
        while self._finished:
            removal, task_id = self._finished[0]
            if removal > moment:
                break
            self._finished.popleft()
            task = self._tasks.pop(task_id)
            self._counts[task["status"]] -= 1
            log.info("task %s removed", task_id)

    async def clean_up(self) -> None:
        """Remove what has expired, though nobody asks; `async` because the timer awaits it."""
        self.expire()


def exact_sum(numbers: list[float]) -> float:
    """Return the sum: of integers an integer, else a float that is correct to its last digit.

    A float is a fraction, so fractions add up exactly, in every order, and only the end is rounded.
    (`math.fsum` does so too, but first makes a float of each integer, which rounds the large ones.)
    """
    if all(isinstance(number, int) for number in numbers):
        return sum(numbers)
    return float(sum(Fraction(number) for number in numbers))


# ==================================================================================================
# Models
#
# Here the engine ends and the API begins. What passes these models is stored and sent out again to
# anybody who asks, so their numbers are strict: pydantic would take `true` for 1 and "5" for 5, and
# would let NaN through. It would also ignore a field that is misspelt.
#
# A new type of task touches three places: its model with its example, the union below, and its
# `case` in `TaskManager._execute`. A test fails if one of the three is forgotten.
# ==================================================================================================

LARGEST_NUMBER = 1e300  # a thousand of these still add up to a finite float

Text: TypeAlias = Annotated[str, Field(min_length=1, max_length=200)]
BoundedFloat: TypeAlias = Annotated[float, Field(ge=-LARGEST_NUMBER, le=LARGEST_NUMBER)]


def finite_number(value: Any) -> Any:
    """Return a number as it is, an integer or a float; raise PydanticCustomError for others."""
    # A bool is an int to `isinstance`, and NaN is not <= anything.
    if type(value) in (int, float) and abs(value) <= LARGEST_NUMBER:
        return value
    raise PydanticCustomError("number", "Input should be a number from -1e300 to 1e300")


def whole_number(value: Any) -> Any:
    """Return 3 for 3.0, since JSON has one kind of number; leave all else to the next validator."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


# `int | float` with constraints would report two errors for one bad item, and point at the branches
# of the union, which the client does not know of.
Number: TypeAlias = Annotated[
    BoundedFloat, PlainValidator(finite_number, json_schema_input_type=BoundedFloat)
]
SectionCount: TypeAlias = Annotated[
    int, Field(strict=True, ge=1, le=6), BeforeValidator(whole_number)
]


class ClosedModel(BaseModel, extra="forbid", use_attribute_docstrings=True):
    """The base of all that comes in: an unknown field is an error, or a typo would pass unseen."""


class SubmissionBase(ClosedModel):
    """What all submissions have in common."""

    example: ClassVar[dict[str, Any]]  # each model has its own, which /docs shows and tests submit

    priority: Priority = "normal"
    """A higher one starts first, unless a lower one has waited long enough: 30 s a level."""


class SumParameters(ClosedModel):
    """The parameters of `compute_sum`."""

    numbers: Annotated[list[Number], Field(min_length=1, max_length=1000)]
    """What is added up: integers exactly, floats to the last digit."""


class SumSubmission(SubmissionBase):
    """Add up numbers. Takes 5 s; the result is the sum."""

    example = {"task_type": "compute_sum", "parameters": {"numbers": [1, 2, 3.5]}}

    task_type: Literal["compute_sum"]
    parameters: SumParameters


class ReportParameters(ClosedModel):
    """The parameters of `generate_report`."""

    title: Text
    """Stands in the first line of the report."""

    sections: SectionCount = 3
    """How many sections the report has; each takes 5 s."""


class ReportSubmission(SubmissionBase):
    """Write a report. Takes 5 s a section; the result is one string that contains the title."""

    example = {"task_type": "generate_report", "parameters": {"title": "Figures", "sections": 2}}

    task_type: Literal["generate_report"]
    parameters: ReportParameters


class FailureParameters(ClosedModel):
    """The parameters of `simulate_failure`."""

    message: Text = "simulated failure"
    """What `error.message` will be."""


class FailureSubmission(SubmissionBase):
    """Fail after 5 s, with the code `task_failed`. The `parameters` may be left out."""

    example = {"task_type": "simulate_failure", "priority": "high"}

    task_type: Literal["simulate_failure"]
    parameters: FailureParameters = Field(default_factory=FailureParameters)


AnySubmission: TypeAlias = SumSubmission | ReportSubmission | FailureSubmission
SUBMISSION_MODELS: tuple[type[SubmissionBase], ...] = get_args(AnySubmission)
TASK_TYPES = [model.example["task_type"] for model in SUBMISSION_MODELS]
EXAMPLES: dict[str, Any] = {
    model.example["task_type"]: {"summary": model.__doc__, "value": model.example}
    for model in SUBMISSION_MODELS
}
Submission: TypeAlias = Annotated[
    AnySubmission, Body(discriminator="task_type", openapi_examples=EXAMPLES)
]


class NoQuery(ClosedModel):
    """The query of a request that has none: declared, so that an unknown parameter is refused."""


class PollQuery(ClosedModel):
    """The query of a poll."""

    wait: bool = False
    """Hold the answer until the status changes, for 10 seconds at most; then the task is answered
    as it is. A task that has ended is answered at once. Your own time-out should be longer."""

    since: Status | None = None
    """With `wait`: the status that you saw last. If the task has another one by now, the answer
    comes at once, so that no change between two polls is lost."""


class ListQuery(ClosedModel):
    """The query of a list."""

    status: Status | None = None
    """Only the tasks with this status."""

    limit: Annotated[int | None, Field(ge=1)] = None
    """How many tasks at most; all of them if it is left out."""


NoQueryArguments: TypeAlias = Annotated[NoQuery, Query()]
PollArguments: TypeAlias = Annotated[PollQuery, Query()]
ListArguments: TypeAlias = Annotated[ListQuery, Query()]


@documented
class Accepted(TypedDict):
    """A task has been queued."""

    task_id: TaskId
    """Poll the task at `/tasks/{task_id}`, which is in `Location` too."""

    status: Literal["queued"]
    """Always `queued`; give it as `since` in the first poll."""


@documented
class InvalidItem(TypedDict):
    """One thing that is wrong with a request."""

    detail: str
    """What is wrong, for a person to read."""

    pointer: str
    """Where: a JSON pointer into the body, as a URI fragment (`#/parameters/numbers/1`), or the
    name of the parameter."""


@documented
class Problem(TypedDict):
    """An error (RFC 9457)."""

    type: Literal["about:blank"]
    """Always `about:blank`: `status` says what kind of error it is."""

    title: str
    """The status in words."""

    status: int
    """The HTTP status."""

    detail: str
    """What went wrong, for a person to read."""

    errors: NotRequired[list[InvalidItem]]
    """With 400: what is wrong with the request, ten things at most."""

    task: NotRequired[Task]
    """With 409: the task, which has completed or failed."""


# ==================================================================================================
# Problems
#
# Every error answer is made by `problem`, and has one shape. `handle_error` decides which exception
# becomes which; it says where a request is wrong, and never repeats at length what was in it.
# ==================================================================================================

PROBLEM_JSON = "application/problem+json"
INVALID = "The request is not valid."
NOT_FOUND = "There is no such task. It may have expired."
NO_STORE = {"Cache-Control": "no-store"}  # a status is out of date a second later

JsonObject: TypeAlias = dict[str, Any]
Fields: TypeAlias = Mapping[str, str]
NO_FIELDS: Fields = {}


def encode(value: Any) -> bytes:
    """Return `value` as JSON."""
    return to_json(value, inf_nan_mode="null")


def problem_body(status: int, detail: str, **members: Any) -> JsonObject:
    """Return a problem document (RFC 9457); `members` are further ones of `Problem`."""
    return {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        **members,
    }


def problem(status: int, detail: str, headers: Fields = NO_FIELDS, **members: Any) -> Response:
    """Return an error answer; `headers` are further fields, `members` as in `problem_body`."""
    body = encode(problem_body(status, detail, **members))
    return Response(body, status, {**NO_STORE, **headers}, PROBLEM_JSON)


def json_pointer(path: list[int | str]) -> str:
    """Return the pointer to a place in the body, as a URI fragment (RFC 6901, section 6)."""
    fragment = "#"
    for key in path:
        escaped = short(key).replace("~", "~0").replace("/", "~1")
        fragment += "/" + quote(escaped, safe="")
    return fragment


def short(key: int | str) -> str:
    """Return a key fit to be shown: it may be the client's own, of any length."""
    return str(key)[:50]


def invalid_item(error: Mapping[str, Any]) -> InvalidItem:
    """Translate an error of pydantic's, without `input` and `ctx`, which hold what was sent."""
    kind = error["type"]
    # For example "body", then "compute_sum" (the tag of the union), "parameters", "numbers", 1.
    place, *path = error["loc"]
    detail = error["msg"][:200]
    if kind.startswith("union_tag") and not path:
        # Pydantic would repeat the unknown tag, at any length.
        detail = f"Input should be one of {', '.join(TASK_TYPES)}"
        return {"detail": detail, "pointer": "#/task_type"}
    if kind.startswith("model"):
        # Pydantic would name our class.
        detail = "Input should be an object"
        if not path:
            detail += " sent as application/json"
    if place != "body":
        return {"detail": detail, "pointer": short(path[-1])}
    # Without the tag, which is not in the body.
    return {"detail": detail, "pointer": json_pointer(path[1:])}


def allowed_methods(request: Request) -> str:
    """Return the methods of the request's path, for `Allow` (RFC 9110, section 10.2.1).

    Starlette's own 405 names those of the first route that fits the path, and there may be two.
    """
    methods: set[str] = set()
    for route in request.app.routes:
        if route.matches(request.scope)[0] != Match.NONE:
            methods |= getattr(route, "methods", set())  # a Mount has none
    if "GET" in methods:
        methods.add("HEAD")
    return ", ".join(sorted(methods))


# `async` although it awaits nothing: a plain function would be run in a thread, against R1.
async def handle_error(request: Request, exc: Exception) -> Response:
    """Return the answer to a request that has raised an exception."""
    match exc:
        case RequestValidationError():
            # Not pydantic's ValidationError: that one would be a fault of our own code, so a 500.
            items = [invalid_item(error) for error in exc.errors()[:10]]
            return problem(400, INVALID, errors=items)
        case HTTPException(status_code=400, detail=detail):
            return problem(400, INVALID, errors=[{"detail": detail, "pointer": "#"}])
        case HTTPException(status_code=405):
            allow = {"Allow": allowed_methods(request)}
            return problem(405, "This path has other methods: see Allow.", allow)
        case HTTPException():
            return problem(exc.status_code, str(exc.detail), exc.headers or NO_FIELDS)
        case InvalidParametersError():
            item = {"detail": str(exc), "pointer": "#/parameters"}
            return problem(400, INVALID, errors=[item])
        case TaskNotFoundError():
            return problem(404, NOT_FOUND)
        case TaskFinishedError(task=task):
            return problem(409, f"The task has already {task['status']}.", task=task)
        case UnavailableError(retry_after=None):
            return problem(503, str(exc))
        case UnavailableError(retry_after=seconds):
            return problem(503, str(exc), {"Retry-After": str(seconds)})
        case _:
            return problem(500, "The server failed.")  # uvicorn logs the traceback


class JsonRequest(Request):
    """A request whose body is parsed by pydantic's parser in place of `json.loads`.

    `json.loads` takes more than can be sent out again: UTF-16, and halves of surrogate pairs. And
    from Python 3.14 on it takes any depth: then a body of 60,000 opening brackets holds up the loop
    for a fifth of a second.
    """

    async def json(self) -> Any:
        """Return the parsed body (RFC 8259, and NaN, which the models refuse); or HTTPException."""
        body = await self.body()
        try:
            return from_json(body.removeprefix(b"\xef\xbb\xbf"))  # a byte order mark of Windows
        except ValueError as exc:
            raise HTTPException(400, f"Malformed JSON: {exc}") from None


class JsonRoute(APIRoute):
    """A route that reads a JsonRequest, in the way that FastAPI provides for that."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler of a request."""
        handler = super().get_route_handler()

        async def json_handler(request: Request) -> Response:
            return await handler(JsonRequest(request.scope, request.receive))

        return json_handler


# ==================================================================================================
# Middleware
#
# What has to happen around FastAPI. HEAD becomes GET; the two limits come before anybody reads a
# body. The rate limit as a FastAPI dependency would be too late:
#
#   client:  POST /tasks with a malformed body
#   FastAPI: reads the body, parses it, answers 400
#   FastAPI: would now call the dependency that counts       <-- never does: bad requests are free
#
# A dependency is not called for 404 and 405 either. Therefore these are ASGI middleware: objects
# that are called with the scope (a dict that describes the request), a function to receive the body
# and one to send the answer, and that call the next object with the same three, or others.
# ==================================================================================================

FREE_PATHS = frozenset({"/", "/docs", "/redoc", "/openapi.json", "/health"})  # not limited


class HeadMiddleware:
    """Answers HEAD as GET is answered (RFC 9110, section 9.3.2).

    The server leaves out the body: it goes by its own scope, which still says HEAD.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a HEAD on as a GET."""
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)


class RateLimitMiddleware:
    """Counts requests by address, refuses what is too much, and tells each client what it has left.

    The header fields RateLimit and RateLimit-Policy are those of the IETF's draft
    draft-ietf-httpapi-ratelimit-headers.
    """

    def __init__(self, app: ASGIApp, limiter: RateLimiter) -> None:
        self._app = app
        self._limiter = limiter
        self._policy = f'"default";q={limiter.limit};w={limiter.window}'

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it with 429."""
        if scope["type"] != "http" or path_of(scope) in FREE_PATHS:
            await self._app(scope, receive, send)
            return
        # The peer's address, as uvicorn gives it. X-Forwarded-For is not read here: anybody can
        # send it. uvicorn reads it where the peer is a proxy that it has been told to trust.
        host, _ = scope.get("client") or ("", 0)
        key = client_key(host)

        # The answer goes out through `send`, its header fields in the first message.
        async def send_with_fields(message: Message) -> None:
            if message["type"] == "http.response.start":
                await self._add_fields(MutableHeaders(scope=message), key)
            await send(message)

        retry_after = await self._limiter.hit(key)
        if retry_after == 0:
            await self._app(scope, receive, send_with_fields)
        else:
            headers = {"Retry-After": str(retry_after)}
            refusal = problem(429, f"Try again in {retry_after} s.", headers)
            await refusal(scope, receive, send_with_fields)

    async def _add_fields(self, headers: MutableHeaders, key: str) -> None:
        """Add the limit's fields as they are when the answer starts; a long poll starts it late."""
        left, reset = await self._limiter.quota(key)
        headers.append("RateLimit-Policy", self._policy)
        headers.append("RateLimit", f'"default";r={left};t={reset}')
        # A client that comes back after a 503 shall not run into a 429. (A date is left as it is.)
        retry_after = headers.get("Retry-After", "")
        if left == 0 and retry_after.isdecimal():
            headers["Retry-After"] = str(max(reset, int(retry_after)))


def path_of(scope: Scope) -> str:
    """Return the path of a request without the prefix under which a proxy or mount has put us."""
    path: str = scope["path"]
    rest = path.removeprefix(scope.get("root_path", ""))
    return rest if rest.startswith("/") else path


@lru_cache(maxsize=256)  # to parse an address takes longer than all the rest of the counting
def client_key(host: str) -> str:
    """Return the limiter's key for the address of a client."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "unknown"  # a unix socket, or what a proxy made up: one bucket for all of them
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    # A client that has one IPv6 address has the whole /64, and could take another for each request.
    return str(ipaddress.IPv6Network((address, 64), strict=False))


class BodyLimitMiddleware:
    """Bounds the body of a request: without a bound, one of 200 MB is 200 MB of memory."""

    def __init__(self, app: ASGIApp, max_body: int) -> None:
        self._app = app
        self._max_body = max_body
        self._detail = f"The body is longer than {max_body} bytes."

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; answer 413 at once if it declares a body that is too long."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._declares_too_much(Headers(scope=scope)):
            # Nothing has been received yet. The first `receive` would make uvicorn tell a client
            # that asks with `Expect: 100-continue` to send it all.
            await problem(413, self._detail)(scope, receive, send)
        elif scope["method"] == "GET":
            # The body of a GET is not read. A stream calls `receive` too, but only to learn that
            # its client has left, and an answer that has begun cannot become a 413.
            await self._app(scope, receive, send)
        else:
            await self._app(scope, self._bounded(receive), send)

    def _declares_too_much(self, headers: Headers) -> bool:
        """Return whether the Content-Length is too large; one that is no number says nothing."""
        try:
            return int(headers.get("Content-Length", "0")) > self._max_body
        except ValueError:
            return False

    def _bounded(self, receive: Receive) -> Receive:
        """Wrap `receive` so that it raises HTTPException(413) for a body that grows too long."""
        size = 0

        async def bounded_receive() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._max_body:
                raise HTTPException(413, self._detail)  # FastAPI makes a 400 of any other exception
            return message

        return bounded_receive


# ==================================================================================================
# Stream
#
# The list of tasks is sent while it is made, so a long one needs no more memory than a short one,
# and others get their turn in between. While they run, tasks change, come and go. Therefore the
# stream goes through a snapshot. Without it:
#
#   stream:  is at the third item of the dict, waits for a slow client
#   request: submits a task, which grows the dict
#   stream:  RuntimeError, dictionary changed size during iteration     <-- after a 200, in mid-list
#
# The snapshot has ids only, and each record is looked up when its line is written. So the line says
# what is true then, and a task that has expired meanwhile is left out.
# ==================================================================================================

CHUNK_BYTES = 65_536  # sent at once, more or less
CHUNK_TASKS = 200  # looked at, before others get their turn


async def stream_tasks(
    manager: TaskManager, status: Status | None, limit: int | None
) -> AsyncIterator[bytes]:
    """Yield the tasks with `status` (None: any), `limit` at most, as a JSON array, one a line."""
    chunk = bytearray(b"[")
    separator = b"\n"
    written = 0
    for looked_at, task_id in enumerate(manager.snapshot(), start=1):
        task = manager.find(task_id)
        if task is not None and status in (None, task["status"]):
            chunk += separator + encode(task)
            separator = b",\n"
            written += 1
        if written == limit:
            break
        if len(chunk) > CHUNK_BYTES or looked_at % CHUNK_TASKS == 0:
            if chunk:  # empty if nothing has matched the filter
                yield bytes(chunk)
                chunk.clear()
            # To send a chunk need not wait, so this does: others get a turn.
            await asyncio.sleep(0)
    yield bytes(chunk) + (b"\n]\n" if written else b"]\n")


# ==================================================================================================
# OpenAPI
#
# What /docs and generated clients are told of the answers: data, to be skipped at first. FastAPI
# finds out by itself what the routes take, but not what they answer, since they make their answers
# themselves.
# ==================================================================================================

LIMIT_FIELDS: JsonObject = {
    "RateLimit": {
        "description": '`"default";r=7;t=42`: you have 7 requests left; in 42 s there is one more.',
        "schema": {"type": "string"},
    },
    "RateLimit-Policy": {
        "description": '`"default";q=10;w=60`: you have 10 requests in any 60 seconds.',
        "schema": {"type": "string"},
    },
}
RETRY_FIELD: JsonObject = {
    "Retry-After": {
        "description": "In how many seconds to try again, if that is known.",
        "schema": {"type": "integer", "minimum": 1},
    },
}
LOCATION_FIELD: JsonObject = {
    "Location": {
        "description": "The path of the task.",
        "schema": {"type": "string"},
    },
}
EXAMPLE_TASK: Task = {
    "task_id": "2667d366-af2b-4988-974f-cba005fa3340",
    "task_type": "compute_sum",
    "parameters": {"numbers": [1, 2, 3.5]},
    "priority": "normal",
    "status": "completed",
    "progress": 100,
    "result": 6.5,
    "error": None,
    "created_at": "2026-01-01T12:00:00.000000Z",
    "started_at": "2026-01-01T12:00:00.004213Z",
    "finished_at": "2026-01-01T12:00:05.011307Z",
    "expires_at": "2026-01-01T12:10:05.011307Z",
}
EXAMPLE_CANCELLED = {**EXAMPLE_TASK, "status": "cancelled", "progress": 40, "result": None}
EXAMPLE_HEALTH: Health = {
    "status": "ok",
    "tasks": {"queued": 3, "processing": 5, "completed": 40, "failed": 1, "cancelled": 2},
    "queue": {"size": 3, "capacity": 100},
    "workers": {"busy": 5, "total": 5},
}
EXAMPLE_ITEM = {"detail": "Extra inputs are not permitted", "pointer": "dry_run"}

# An example of each error; "default" stands for those that have no entry here.
EXAMPLE_PROBLEMS: Mapping[str, JsonObject] = {
    "400": problem_body(400, INVALID, errors=[EXAMPLE_ITEM]),
    "404": problem_body(404, NOT_FOUND),
    "409": problem_body(409, "The task has already completed.", task=EXAMPLE_TASK),
    "413": problem_body(413, "The body is longer than 65536 bytes."),
    "429": problem_body(429, "Try again in 42 s."),
    "503": problem_body(503, "No tasks are accepted now."),
    "default": problem_body(500, "The server failed."),
}
SCHEMAS = "#/components/schemas/"


def answer_with(schema: JsonObject, media_type: str = "application/json") -> JsonObject:
    """Return what a route declares of one of its answers.

    FastAPI would make this of `{"model": Task}`, but always as `application/json`, and would build
    a validator for each, which nobody needs.
    """
    return {"content": {media_type: {"schema": schema}}}


ACCEPTED = answer_with({"$ref": SCHEMAS + "Accepted"})
ONE_TASK = answer_with({"$ref": SCHEMAS + "Task"})
TASK_LIST = answer_with({"type": "array", "items": {"$ref": SCHEMAS + "Task"}})
HEALTH = answer_with({"$ref": SCHEMAS + "Health"})
REFUSAL = answer_with({"$ref": SCHEMAS + "Problem"}, PROBLEM_JSON)

# All routes have these. Without a `default` FastAPI would document a 422 of its own.
COMMON_REFUSALS: dict[int | str, JsonObject] = {
    400: REFUSAL,
    "default": REFUSAL,
}


def complete_document(document: JsonObject) -> None:
    """Add to the OpenAPI document what FastAPI cannot be told by declarations."""
    answers = TypeAdapter[Any](Accepted | Task | Health | Problem)
    schemas = answers.json_schema(ref_template=SCHEMAS + "{model}")["$defs"]
    schemas["Task"]["example"] = EXAMPLE_TASK
    schemas["Health"]["example"] = EXAMPLE_HEALTH
    document["components"]["schemas"] |= schemas
    for path, operations in document["paths"].items():
        for operation in operations.values():
            for status, answer in operation["responses"].items():
                complete_answer(answer, status, limited=path not in FREE_PATHS)
            # The example of the schema is a completed task, which a DELETE never answers.
            if operation["operationId"] == "cancel_task":
                cancelled = operation["responses"]["200"]
                cancelled["content"]["application/json"]["example"] = EXAMPLE_CANCELLED
    document["security"] = []  # nobody needs a key


def complete_answer(answer: JsonObject, status: str, *, limited: bool) -> None:
    """Add the header fields of an answer, and the example of an error."""
    fields: JsonObject = {}
    if limited:
        fields |= LIMIT_FIELDS
        if status in ("429", "503"):
            fields |= RETRY_FIELD
    if status == "202":
        fields |= LOCATION_FIELD
    answer["headers"] = fields
    content = answer.get("content", {})
    if PROBLEM_JSON in content and status in EXAMPLE_PROBLEMS:
        content[PROBLEM_JSON]["example"] = EXAMPLE_PROBLEMS[status]


# ==================================================================================================
# Routes
#
# They translate: a request into a call of the manager, and what it returns into an answer. What the
# manager raises goes past them to `handle_error`. Answers are not validated: mypy has checked them.
# ==================================================================================================


def json_answer(value: Any, status: int = 200) -> Response:
    """Return `value` as a JSON answer that nobody may cache."""
    return Response(encode(value), status, NO_STORE, "application/json")


def root_of(request: Request) -> str:
    """Return the prefix under which a proxy or a mount has put this app, fit for a URL."""
    prefix = request.scope.get("root_path", "").strip("/")
    return "/" + quote(prefix) if prefix else ""


def add_routes(app: FastAPI, manager: TaskManager) -> None:
    """Give `app` its routes."""

    @app.post(
        "/tasks",
        status_code=202,
        responses={202: ACCEPTED, 413: REFUSAL, 429: REFUSAL, 503: REFUSAL},
    )
    async def submit_task(
        submission: Submission, query: NoQueryArguments, request: Request
    ) -> Response:
        """Queue a task. Poll it at `Location`."""
        prefix = root_of(request)
        parameters = submission.parameters.model_dump()
        task = manager.submit(submission.task_type, parameters, submission.priority)
        task_id = task["task_id"]
        accepted: Accepted = {"task_id": task_id, "status": "queued"}
        answer = json_answer(accepted, 202)
        answer.headers["Location"] = f"{prefix}/tasks/{task_id}"
        return answer

    @app.get("/tasks", responses={200: TASK_LIST, 429: REFUSAL})
    async def list_tasks(query: ListArguments) -> Response:
        """List the tasks, oldest first."""
        lines = stream_tasks(manager, query.status, query.limit)
        return StreamingResponse(lines, headers=NO_STORE, media_type="application/json")

    @app.get("/tasks/{task_id}", responses={200: ONE_TASK, 404: REFUSAL, 429: REFUSAL})
    async def get_task(task_id: UUID, query: PollArguments) -> Response:
        """Return a task: at once, or with `wait=true` when its status changes."""
        if query.wait:
            return json_answer(await manager.wait(str(task_id), query.since))
        return json_answer(manager.get(str(task_id)))

    @app.delete(
        "/tasks/{task_id}",
        response_description="The task, which is cancelled now.",
        responses={200: ONE_TASK, 404: REFUSAL, 409: REFUSAL, 429: REFUSAL},
    )
    async def cancel_task(task_id: UUID, query: NoQueryArguments) -> Response:
        """Cancel a task; twice is no error. It can still be asked for until its `expires_at`."""
        return json_answer(manager.cancel(str(task_id)))

    @app.get("/health", responses={200: HEALTH, 503: REFUSAL})
    async def health(query: NoQueryArguments) -> Response:
        """Count tasks, places and workers. Not limited."""
        return json_answer(manager.health())

    @app.get("/", include_in_schema=False)
    async def root(query: NoQueryArguments, request: Request) -> Response:
        return RedirectResponse(root_of(request) + "/docs")


# ==================================================================================================
# The app
#
# `create_app` makes one world: a manager, a limiter, an app that knows both. No code uses a global
# that changes (the cache of `client_key` apart, which changes no answer), so two apps in one
# process do not touch, and each test has its own.
#
# The lifespan owns what runs in the background. What happens on Ctrl-C or SIGTERM, step by step:
#
#   1. The handler of `on_stop_signal` runs. It schedules `stop_waiting` (answer the long polls,
#      accept no more tasks), then calls uvicorn's handler. Without `stop_waiting`, step 2 would
#      take as long as the longest poll.
#   2. uvicorn stops listening, lets the requests in hand finish, and ends the lifespan. (A client
#      that does not read its answer can hold it up here, for ever; `--timeout-graceful-shutdown`.)
#   3. The timers are cancelled, then the manager stops. It marks each task that is not final and
#      cancels its work (R3), cancels the workers, and waits for clean-ups, 5 seconds at most.
#   4. The process ends. After SIGTERM that is at once, since uvicorn lets the signal kill it; after
#      Ctrl-C Python first waits for the threads that `asyncio.to_thread` has started.
# ==================================================================================================

DESCRIPTION = """\
Submit a task, then poll it until it is `completed`, `failed` or `cancelled`.

* **Rate limit**: 10 requests a minute from one address (an IPv6 client is its /64); bad requests
  count, refused ones (429) do not. `/`, `/docs`, `/redoc`, `/openapi.json`, `/health` are free.
* **Long poll**: `GET /tasks/{task_id}?wait=true&since=queued` is held until the status is no longer
  `queued`, at most 10 seconds. Give the status that you saw last, and you miss no change.
* **Retention**: a task can be asked for until 10 minutes after its end (`expires_at`); after that
  the answer is 404. A restart of the server loses all tasks.
* **Priority**: five tasks run at a time; `high` before `normal` before `low`, then the oldest
  first. One level is worth 30 seconds of waiting, so nothing waits for ever.
* **Failure**: `error.code` is `task_failed` (see its message), `timeout` (after 60 seconds) or
  `internal_error`.
* **Errors** are problem documents (RFC 9457). With 429 and 503 wait for `Retry-After` seconds; a
  503 without it: no tasks are accepted now. An unknown field or query parameter is a 400.
* Anybody can see and cancel every task. HEAD is answered wherever GET is.

These are the defaults; whoever runs the server may have set others.
"""


Handler: TypeAlias = Callable[[int, FrameType | None], Any]


@contextmanager
def on_stop_signal(callback: Callable[[], None]) -> Iterator[None]:
    """Call `callback` in the event loop when SIGINT or SIGTERM comes, before the server acts on it.

    A server tells the lifespan of a stop only after it has sent all answers, and a poll that is
    held would delay that. So this puts a handler before the server's, and calls that one too. Where
    no handler is set, or this is not the main thread, polls are just held to their end.
    """
    loop = asyncio.get_running_loop()
    former: dict[int, Handler] = {}

    def handle(signum: int, frame: FrameType | None) -> None:
        # Not called right here: a handler may interrupt the loop anywhere.
        loop.call_soon_threadsafe(callback)
        former[signum](signum, frame)

    with suppress(ValueError):  # which `signal.signal` raises outside of the main thread
        for signum in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(signum)
            if callable(handler):
                former[signum] = handler
                signal.signal(signum, handle)
    try:
        yield
    finally:
        for number, former_handler in former.items():
            if signal.getsignal(number) is handle:
                signal.signal(number, former_handler)


async def timer(seconds: float, job: Callable[[], Awaitable[None]]) -> None:
    """Do a job every so many seconds, until cancelled. An exception ends its round only."""
    while True:
        await asyncio.sleep(seconds)
        try:
            await job()
        except Exception:
            # Without this the timer would be dead from now on, and nobody would see it.
            # CancelledError is no Exception, and ends it.
            log.exception("a round of %s failed", job.__qualname__)


@asynccontextmanager
async def background(coroutine: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run a coroutine beside the body of an `async with`; then cancel it and wait for its end."""
    asyncio_task = asyncio.create_task(coroutine)
    try:
        yield
    finally:
        asyncio_task.cancel()
        # Without this a round could still be going on when the manager stops.
        await asyncio.wait({asyncio_task})


class TaskApp(FastAPI):
    """FastAPI with our middleware around it, and the schemas of our answers in its document."""

    def build_middleware_stack(self) -> ASGIApp:
        """Return what the server calls; the outermost comes last here."""
        # `add_middleware` would put ours inside of Starlette's outermost one, which answers 500,
        # and such an answer would then lack the fields of the rate limit.
        app = super().build_middleware_stack()
        app = BodyLimitMiddleware(app, self.state.settings.max_body)
        app = RateLimitMiddleware(app, self.state.limiter)
        return HeadMiddleware(app)

    def openapi(self) -> JsonObject:
        """Return the OpenAPI document."""
        if self.openapi_schema is None:
            complete_document(super().openapi())  # which keeps it in `openapi_schema`
        return super().openapi()


def create_app(settings: Settings | None = None) -> FastAPI:
    """Return a new app with a world of its own; settings come from the environment if not given."""
    settings = settings or Settings.from_environment()
    manager = TaskManager(settings)
    limiter = RateLimiter(settings.rate_limit, settings.rate_window)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # Two timers, so that a fault of one clean-up does not keep the other from its turn.
        async with (
            manager.working(),
            background(timer(settings.cleanup_interval, manager.clean_up)),
            background(timer(settings.cleanup_interval, limiter.sweep)),
        ):
            with on_stop_signal(manager.stop_waiting):
                yield

    app = TaskApp(
        title="Task manager",
        description=DESCRIPTION,
        version="2.0.0",
        lifespan=lifespan,
        responses=COMMON_REFUSALS,
        openapi_tags=[{"name": "tasks", "description": "Submit, poll, list, cancel, count."}],
        generate_unique_id_function=lambda route: route.name,
        redirect_slashes=False,  # the redirect would repeat the Host header, which is the client's
        swagger_ui_oauth2_redirect_url=None,
    )
    app.state.settings = settings
    app.state.manager = manager
    app.state.limiter = limiter
    app.router.route_class = JsonRoute
    app.router.tags = ["tasks"]
    for error in (ManagerError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(error, handle_error)
    add_routes(app, manager)
    return app


app = create_app()
