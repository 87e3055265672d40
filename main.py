"""A rate-limited asynchronous task manager with polling, in a single file.

Clients submit tasks over HTTP, poll or long-poll their status, list them and cancel them. Each
client can send 10 requests a minute. Five workers take the tasks from a priority queue in memory. A
task that is still running after 60 s fails. All of these numbers are settings.

To run it: `uvicorn main:app --reload`, then open http://127.0.0.1:8000/docs.

    queued ----> processing ----> completed | failed
       |             |
       +-------------+----------> cancelled

Read the file from top to bottom. Everything before "Models" is the engine, which knows nothing of
HTTP. The rest is the HTTP API around it. A task passes through these functions:

    submit_task     the route, which is called with a validated request
    submit          stores the task and puts it into the queue
    _worker         takes it from the queue and starts its work
    execute         does the work
    _finish         stores the result, or the reason why the work failed
    _set_status     called for each change of the status: wakes the clients in `wait`

A *task* is a dict whose `status` moves along the arrows above. An *asyncio task* is what
`asyncio.create_task` returns. The *work* of a task is the asyncio task that computes its result.
Some comments show what would happen without a precaution, and `<--` marks the step that goes wrong.

FOUR FACTS ABOUT ASYNCIO

1.  **Code between two awaits is atomic.** The event loop runs all coroutines in one thread. It can
    switch from one to another only where the current one waits: at an `await`, an `async with` or
    an `async for`. A `yield` counts as well, because the caller can wait before it goes on.

        if len(tasks) < 100:        # These two lines cannot be interrupted,
            tasks.append(task)      # so there are never more than 100 tasks. No lock is needed.

        if len(tasks) < 100:        # Suppose there are 99.
            await save(task)        # Another coroutine runs here and counts 99 tasks as well.
            tasks.append(task)      # <-- There can be 101 tasks now.

    `await f()` switches only if something inside `f` waits. Otherwise it is like a function call.
    (So is `asyncio.create_task(f())` until `f` waits, if the loop has an eager task factory.)
    Handlers of `signal.signal` and other threads can run at any time, so they hand their changes
    over to the event loop, with `call_soon_threadsafe`.

2.  **There are several ways to wait for asyncio tasks.** `await asyncio_task` returns its result or
    raises its exception. `await asyncio.gather(...)` does this for several: it raises the first
    exception, and the others go on. `await asyncio.wait(...)` raises none of their exceptions.

3.  **Cancellation is a request.** `asyncio_task.cancel()` returns immediately. Soon after, the event
    loop raises `asyncio.CancelledError` at the `await` where that asyncio task is suspended. An
    asyncio task that is cancelled before it starts runs none of its code. Code cleans up in a
    `finally`. Code that catches CancelledError (`except Exception` does not) should raise it again,
    because otherwise its asyncio task goes on, and a shutdown has to wait for it. If A is cancelled
    while it awaits asyncio task B, directly or through `gather`, B is cancelled first. If B ignores
    that, a direct `await` just returns B's result to A. With `asyncio.wait`, only A is cancelled.

4.  **An `asyncio.Event` wakes all its waiters.** `await event.wait()` suspends a coroutine until
    another one calls `event.set()`. After that, `wait` returns immediately, until `event.clear()`.

WHAT THIS FILE DOES NOT DO

Tasks are lost when the process restarts. There can be only one process, because a second one would
have its own tasks. There are no users: every client can see and cancel every task. A shutdown does
not wait for tasks to complete. Work that blocks the event loop or a thread cannot be stopped. Work
that ignores its cancellation keeps its worker until 5 s after its timeout and, after Ctrl-C, the
process. README.md names systems without these limits and the parts of this file that they replace.
"""

import asyncio
import http.client
import inspect
import ipaddress
import itertools
import json
import logging
import math
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import datetime, timezone
from functools import partial
from os import environ
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeAlias, Union
from urllib.parse import quote
from uuid import UUID, uuid4

from fastapi import Body, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse, StreamingResponse
from pydantic import BaseModel, Field, PlainValidator, ValidationError
from pydantic_core import PydanticCustomError, from_json, to_json
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from typing_extensions import TypedDict  # pydantic needs this TypedDict before 3.12


class TaskLog(logging.LoggerAdapter):  # type: ignore[type-arg]  # not generic in Python 3.10
    """A logger that raises nothing. A filter's exception would otherwise interrupt a task."""

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Log a message, or drop it if a filter raises anything. `info` and `error` call this."""
        with suppress(BaseException):
            super().log(*args, stacklevel=2, **kwargs)


# Under `uvicorn.error`, because uvicorn shows INFO messages only from its own loggers.
log = TaskLog(logging.getLogger("uvicorn.error.tasks"))


# === Types ========================================================================================
# At run time, a task is a plain dict. The TypedDicts are for type checkers and for FastAPI, which
# checks most responses against them and shows their docstrings in /docs.

Status: TypeAlias = Literal["queued", "processing", "completed", "failed", "cancelled"]
Priority: TypeAlias = Literal["high", "normal", "low"]
Parameters: TypeAlias = dict[str, Any]

TaskId: TypeAlias = Annotated[str, Field(json_schema_extra={"format": "uuid"})]  # for /docs
Time: TypeAlias = Annotated[str, Field(json_schema_extra={"format": "date-time"})]

# The state diagram as data: the statuses that can follow each status.
TRANSITIONS: Mapping[Status, tuple[Status, ...]] = {
    "queued": ("processing", "cancelled"),
    "processing": ("completed", "failed", "cancelled"),
    "completed": (),
    "failed": (),
    "cancelled": (),
}
FINAL = [status for status, following in TRANSITIONS.items() if not following]


class TaskError(TypedDict):
    """Why a task failed: its work could not be done (`task_failed`; `message` says why), it took
    too long (`timeout`), or it has a bug, which only the log describes (`internal_error`).
    """

    code: Literal["task_failed", "timeout", "internal_error"]
    message: str


class Task(TypedDict):
    """A task. It has the same fields in every state. Fields that have no value yet are null.

    `status` is `queued`, then `processing`, then `completed` or `failed`. A queued or processing
    task can become `cancelled`. `progress` is a percentage, 100 only if the task is completed.
    `result` is set if it is completed, and `error` if it has failed. All times are in UTC
    (RFC 3339). A finished task can be read until `expires_at`.
    """

    task_id: TaskId
    task_type: str
    parameters: Parameters
    priority: Priority
    status: Status
    progress: int
    result: Any
    error: TaskError | None
    created_at: Time
    started_at: Time | None
    finished_at: Time | None
    expires_at: Time | None


class Health(TypedDict):
    """Task counts by status, and the load. A worker is also busy while cancelled work cleans up."""

    status: Literal["ok"]
    tasks: dict[Status, int]
    queue: dict[Literal["size", "capacity"], int]
    workers: dict[Literal["busy", "total"], int]


# === Settings =====================================================================================

# The upper bound is about 32 years in seconds. Added to a date, it cannot overflow.
WholeNumber: TypeAlias = Annotated[int, Field(ge=1, le=1_000_000_000)]
Seconds: TypeAlias = Annotated[float, Field(ge=0.1, le=1_000_000_000)]
NonNegative: TypeAlias = Annotated[float, Field(ge=0, le=1_000_000_000)]


class Settings(BaseModel, frozen=True, extra="forbid"):
    """The settings: `Settings(workers=2)`, or `TASKS_WORKERS=2` in the environment."""

    workers: Annotated[int, Field(ge=1, le=1000)] = 5  # tasks that are processed at the same time
    queue_size: WholeNumber = 100  # tasks that can wait for a worker
    max_tasks: WholeNumber = 10_000  # tasks in memory, whatever their status
    rate_limit: WholeNumber = 10  # requests that a client can send in `rate_window` seconds
    rate_window: WholeNumber = 60  # seconds, whole because a header contains it
    long_poll: NonNegative = 10  # seconds that `?wait=true` waits for a change
    retention: Seconds = 600  # seconds that a finished task can be read
    cleanup_interval: Seconds = 30  # seconds between two runs of the clean-up
    task_timeout: Seconds = 60  # seconds that the work of a task can take
    priority_step: NonNegative = 30  # seconds of waiting that make up for a level of priority
    max_body: WholeNumber = 65_536  # bytes in the body of a request
    time_scale: NonNegative = 1  # multiplies the duration of the simulated work


def read_settings() -> Settings:
    """Read the `TASKS_*` variables. Print a line for each invalid one, then raise SystemExit(3)."""
    known = {f"TASKS_{name.upper()}": name for name in Settings.model_fields}
    unknown = [name for name in environ if name.startswith("TASKS_") and name not in known]
    if unknown:
        # Only a warning, because Kubernetes sets TASKS_PORT if there is a service called `tasks`.
        log.warning("unknown settings are ignored: %s", ", ".join(sorted(unknown)))
    values = {known[key]: value for key, value in environ.items() if key in known}
    try:
        return Settings.model_validate(values)
    except ValidationError as exc:
        for error in exc.errors():
            print(f"TASKS_{str(error['loc'][0]).upper()}: {error['msg']}", file=sys.stderr)
        raise SystemExit(3) from None  # uvicorn and gunicorn do not retry after a 3


# === Errors =======================================================================================
# (No asyncio here.) The manager raises subclasses of ManagerError, and the API turns them into HTTP
# responses. TaskFailedError is different: work raises it, and its message is stored in the task.


class ManagerError(Exception):
    """The base class of the errors that the task manager raises."""


class InvalidJsonError(ManagerError):
    """A value has no JSON form: the parameters of a task (400), or its result (the task fails)."""


class TaskNotFoundError(ManagerError):
    """There is no task with this id, or it has expired (404)."""


class TaskFinishedError(ManagerError):
    """The task cannot be cancelled, because it has completed or failed (409)."""

    def __init__(self, task: Task) -> None:
        super().__init__(f"The task has already {task['status']}.")
        self.task = task


class UnavailableError(ManagerError):
    """The task cannot be accepted: there are too many, or no workers are running (503)."""


class TaskFailedError(Exception):
    """Work raises this to make its task fail. Clients can read the message."""


TIMEOUT: TaskError = {"code": "timeout", "message": "The task took too long."}
INTERNAL_ERROR: TaskError = {"code": "internal_error", "message": "An internal error occurred."}


def describe_failure(exc: BaseException) -> TaskError:
    """Return what clients are told about an exception that ended the work of a task."""
    with suppress(BaseException):  # the `__str__` of an exception can raise anything
        match exc:
            case TaskFailedError():
                return {"code": "task_failed", "message": printable(exc)}
            # An exception group, as asyncio.TaskGroup raises it. Tell clients about its first one.
            case BaseException(exceptions=[first, *_]):  # type: ignore[misc]  # new in Python 3.11
                return describe_failure(first)
    # The text of any other exception can contain secrets. Only the log shows it.
    return INTERNAL_ERROR


def printable(text: object, length: int | None = None) -> str:
    """Return at most `length` characters of a text. `?` replaces those that UTF-8 cannot encode."""
    return str(text)[:length].encode(errors="replace").decode()


# === Work =========================================================================================
# Replace this section with your own work. A new task type needs a `case` here, two models such as
# SumParameters and SumSubmission, and a place in SUBMISSIONS. Or pass your own to `create_app`.

# The types of the function that does the work, and of the one that it calls with its progress in %.
Report: TypeAlias = Callable[[float], None]
Execute: TypeAlias = Callable[[str, Parameters, Report], Awaitable[Any]]


async def execute(
    task_type: str, parameters: Parameters, report: Report, time_scale: float = 1
) -> Any:
    """Do the work of a task and return its result, which must have a JSON form.

    `parameters` are JSON that has been validated, and the work may change them. Raise
    TaskFailedError if the work cannot be done. If the task is cancelled or takes too long, the
    current `await` raises CancelledError: clean up in a `finally` and let the exception pass.
    Never block the event loop, because everything else would have to wait: call a blocking function
    with `await asyncio.to_thread(function, ...)`. It cannot be stopped and must not call `report`.
    """
    match task_type:
        case "compute_sum":
            await simulate(5 * time_scale, report)
            return sum(parameters["numbers"])
        case "generate_report":
            sections = parameters["sections"]
            await simulate(5 * sections * time_scale, report)
            return f"{parameters['title']}\n{sections} sections"
        case "simulate_failure":
            await simulate(5 * time_scale, report)
            raise TaskFailedError(parameters["message"])
        case _:
            # Otherwise, a forgotten task type would "complete" with the result None.
            raise NotImplementedError(f"no work for task type {task_type!r}")


async def simulate(seconds: float, report: Report) -> None:
    """Sleep in ten steps, and report the progress before each of them."""
    for percent in range(0, 100, 10):
        report(percent)
        await asyncio.sleep(seconds / 10)


def scaled_execute(time_scale: float) -> Execute:
    """Return `execute` with a time scale, so that it takes three arguments like other work."""
    return partial(execute, time_scale=time_scale)


# === Rate limiter =================================================================================
# A sliding window: for each client, a deque holds the times at which its requests leave the window.
# New times are appended on the right and old ones are removed on the left. A deque is fast at both
# ends. A counter that is reset every minute would be simpler but wrong:
#
#     11:59:59  client: sends 10 requests, which count for the first minute
#     12:00:00  limiter: resets the counter
#     12:00:01  client: sends 10 requests     <-- 20 requests in two seconds


def now() -> float:
    """Return the time of the event loop's clock, which never jumps, unlike the wall clock."""
    return asyncio.get_running_loop().time()


class RateLimiter:
    """Allows each client `limit` requests in any `window` seconds."""

    def __init__(self, limit: int, window: int) -> None:
        self.limit = limit
        self.window = window
        self._leaving: dict[str, deque[float]] = {}
        # With a lock, only one coroutine at a time is inside `async with self._lock`. Today it is
        # not necessary, because no block waits. It is here for the day when there is an `await`
        # between a check and its change, for example a call of a database. Otherwise:
        #
        #     request 1: counts 9 requests, awaits the database
        #     request 2: counts 9 requests, awaits the database
        #     both:      add their own time                      <-- 11 requests are accepted
        self._lock = asyncio.Lock()

    async def hit(self, client: str) -> bool:
        """Count a request and return True, or refuse it, without counting, and return False."""
        async with self._lock:
            times = self._prune(client)
            if len(times) >= self.limit:
                return False
            times.append(now() + self.window)
            return True

    async def quota(self, client: str) -> tuple[int, int]:
        """Return how many requests are left, and the seconds until the oldest expires."""
        async with self._lock:
            times = self._prune(client)
            # Rounded up, because after a shorter wait the client would be refused again. `min`,
            # because float addition is inexact: the difference can be a little over `window`.
            seconds = math.ceil(times[0] - now()) if times else 0
            return self.limit - len(times), min(seconds, self.window)

    async def sweep(self) -> None:
        """Forget the clients that have no request in the window."""
        async with self._lock:
            for client in list(self._leaving):  # a copy, because the loop deletes keys
                if not self._prune(client):
                    del self._leaving[client]

    def _prune(self, client: str) -> deque[float]:
        """Remove the requests of a client that have left the window, and return the others."""
        times = self._leaving.setdefault(client, deque())
        while times and times[0] <= now():
            times.popleft()
        return times


# === Task queue ===================================================================================
# If a free worker always took a high task first, a low task would never run while high tasks keep
# coming: it would starve. So each task has a rank, which is the time of its submission plus a
# handicap of 30 s (`priority_step`) for `normal` or 60 s for `low`. A free worker takes the task
# with the lowest rank. A task can overtake a low one only if it is submitted less than 60 s later:
#
#     second 0   A is submitted, low:  rank 60
#     second 59  B is submitted, high: rank 59, so it overtakes A
#     second 61  C is submitted, high: rank 61, so it does not
#
# A cancelled task is removed from the queue immediately. Otherwise:
#
#     clients: submit 100 tasks and cancel all of them
#     client:  submits another task
#     server:  responds with 503, the queue is full    <-- although it holds only cancelled tasks

LEVELS: Mapping[Priority, int] = {"high": 0, "normal": 1, "low": 2}


class Entry(NamedTuple):
    """A queued task. The queue compares the ranks first, then the numbers."""

    rank: float
    number: int  # tasks with the same rank run in the order of their submission
    task_id: str


class TaskQueue(asyncio.PriorityQueue[Entry]):
    """A bounded queue that returns the smallest entry first, and can remove an entry."""

    def remove(self, task_id: str) -> None:
        """Remove the entry of a task."""
        # asyncio.PriorityQueue has no public method for this. Without an `await`, it is atomic.
        entries = [self.get_nowait() for _ in range(self.qsize())]
        for entry in entries:
            if entry.task_id != task_id:
                self.put_nowait(entry)


# === Task manager =================================================================================
# Requests, workers and the clean-up all change the same dicts. No lock is needed, because there is
# no `await` in the middle of a change.

GRACE = 5  # seconds that cancelled work gets to clean up, after a timeout or at shutdown


def timestamp(seconds: float) -> str:
    """Convert a time of the wall clock (`time.time()`) to RFC 3339, with six decimal places."""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def label(task: Task) -> str:
    """Return a short name of a task for the log."""
    return f"task {task['task_id'][:8]} {task['task_type']}"


def json_copy(value: Any) -> Any:
    """Convert a value to JSON and back, or raise InvalidJsonError.

    Parameters and results are stored as such copies. So everything that is stored can be sent, and
    a task does not change when the work or the caller of `submit` changes the original.
    """
    try:
        # `by_alias` and `round_trip`, because work can make the model from the JSON again.
        if isinstance(value, BaseModel):
            value = value.model_dump(mode="json", by_alias=True, round_trip=True)
        # `from_json` is stricter than the encoder of responses: no surrogates, no deep nesting.
        return from_json(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as exc:
        raise InvalidJsonError("The value has no JSON form.") from exc


class TaskManager:
    """Stores the tasks and runs them inside `async with manager.working()`.

    Call its methods in the event loop's thread only, and do not change the tasks that they return.
    """

    def __init__(self, settings: Settings, execute: Execute) -> None:
        self._settings = settings
        self._execute = execute
        # All tasks by id, in the order of their submission.
        self._tasks: dict[str, Task] = {}
        # The expiry time and the id of each final task, sorted because the retention is constant.
        self._expiring: deque[tuple[float, str]] = deque()
        # True from the start of the workers until a shutdown begins or a worker fails.
        self._accepting = False
        self._workers: list[asyncio.Task[None]] = []
        self._reset()

    def _reset(self) -> None:
        """Drop everything that belongs to a run of the workers, except for finished tasks."""
        finished = [task for task in self._tasks.values() if task["status"] in FINAL]
        self._tasks = {task["task_id"]: task for task in finished}
        self._queue = TaskQueue(self._settings.queue_size)
        self._numbers = itertools.count()  # for the entries of the queue
        self._busy = 0  # workers that have a task
        # The asyncio task that does the work of a task, until it has ended.
        self._works: dict[str, asyncio.Task[Any]] = {}
        # When a task got its present status. Final tasks are not in this dict.
        self._since: dict[str, float] = {}
        # The Event that the next change of a task sets, if a client has waited for it.
        self._next_change: dict[str, asyncio.Event] = {}

    # --- What clients ask for ---------------------------------------------------------------------

    def submit(
        self, task_type: str, parameters: Parameters | BaseModel, priority: Priority = "normal"
    ) -> Task:
        """Queue a new task and return it, or raise UnavailableError or InvalidJsonError."""
        if not self._accepting:
            raise UnavailableError("The server does not accept tasks at the moment.")
        self.expire()
        if len(self._tasks) >= self._settings.max_tasks:
            raise UnavailableError("There are too many tasks.")
        if self._queue.full():
            raise UnavailableError("The queue is full.")

        # There is no `await` from the first check to the last change. So the queue still has room,
        # and no worker takes the entry before the task is in the dict.
        task = new_task(task_type, json_copy(parameters), priority)
        task_id = task["task_id"]
        rank = now() + LEVELS[priority] * self._settings.priority_step
        self._queue.put_nowait(Entry(rank, next(self._numbers), task_id))
        self._tasks[task_id] = task
        self._since[task_id] = now()

        log.info("%s queued with priority %s", label(task), priority)
        return task

    def get(self, task_id: str) -> Task:
        """Return a task, or raise TaskNotFoundError."""
        self.expire()
        if task_id not in self._tasks:
            raise TaskNotFoundError(task_id)
        return self._tasks[task_id]

    async def wait(self, task_id: str) -> Task:
        """Return a task as soon as its status changes, or raise TaskNotFoundError.

        Return immediately if the status is final or the server is shutting down, and after
        `long_poll` seconds if it does not change. Each change has an Event of its own, which
        `_set_status` takes out of the dict and sets. It stays set, because before Python 3.12,
        `wait_for` starts to wait a moment later, when a `clear` could have undone the `set`.
        There is no `await` between reading the status and registering the Event. Otherwise:

            client: reads "processing", awaits something
            work:   ends; `_set_status` finds no Event to set
            client: registers an Event and waits for it         <-- although the task has finished
        """
        task = self.get(task_id)
        if task["status"] in FINAL or not self._accepting:
            return task
        next_change = self._next_change.setdefault(task_id, asyncio.Event())
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(next_change.wait(), self._settings.long_poll)
        return task  # not `self.get(task_id)`, because the task may have expired in the meantime

    def iterate(self, status: Status | None = None) -> Iterator[Task]:
        """Return an iterator over all tasks, or those with this status, the newest first.

        The dict can change while the caller awaits something between two tasks. So this iterates
        over a copy of the ids, and looks up each task when it is reached. Otherwise:

            server: sends some tasks of a list, awaits a slow client
            client: submits a task, which is added to the dict
            server: RuntimeError, dictionary changed size during iteration    <-- half a response
        """
        ids = list(reversed(self._tasks))  # here, because `tasks` starts later

        def tasks() -> Iterator[Task]:
            for task_id in ids:
                self.expire()  # time passes while the caller waits
                task = self._tasks.get(task_id)
                if task is not None and (status is None or task["status"] == status):
                    yield task

        return tasks()

    def cancel(self, task_id: str) -> Task:
        """Cancel a task and return it, or raise TaskNotFoundError or TaskFinishedError."""
        task = self.get(task_id)
        if task["status"] in ("completed", "failed"):
            raise TaskFinishedError(task)
        self._queue.remove(task_id)  # if it is still there
        self._stop(task, "cancelled")  # changes nothing if the task is already cancelled
        return task

    def health(self) -> Health:
        """Return the load, or raise UnavailableError if the server does not accept tasks."""
        if not self._accepting:
            raise UnavailableError("The server does not accept tasks at the moment.")
        self.expire()
        statuses = [task["status"] for task in self._tasks.values()]
        return {
            "status": "ok",
            "tasks": {status: statuses.count(status) for status in TRANSITIONS},
            "queue": {"size": self._queue.qsize(), "capacity": self._settings.queue_size},
            "workers": {"busy": self._busy, "total": self._settings.workers},
        }

    # --- How a status changes ---------------------------------------------------------------------

    def _set_status(
        self, task: Task, status: Status, result: Any = None, error: TaskError | None = None
    ) -> bool:
        """Change the status of a task and what depends on it, and wake the waiting clients.

        This is the only place where a status changes. If TRANSITIONS doesn't allow the change,
        return False and change nothing, so a final status stays. Otherwise:

            work:   returns its result; the event loop will call `_finish` soon
            client: sends DELETE; the response says "cancelled"
            work:   `_finish` sets the status to "completed"    <-- the response was wrong
        """
        task_id = task["task_id"]
        # A task that is not in `_since` is final, or `_reset` has dropped it.
        if status not in TRANSITIONS[task["status"]] or task_id not in self._since:
            return False
        lasted = now() - self._since.pop(task_id)

        task["status"] = status
        task["result"] = result
        task["error"] = error
        if status == "completed":
            task["progress"] = 100

        if status == "processing":
            task["started_at"] = timestamp(time.time())
            self._since[task_id] = now()
        else:
            finished_at = time.time()
            task["finished_at"] = timestamp(finished_at)
            task["expires_at"] = timestamp(finished_at + self._settings.retention)
            self._expiring.append((now() + self._settings.retention, task_id))

        if task_id in self._next_change:
            self._next_change.pop(task_id).set()

        # `!r` quotes the message, so a line break in it doesn't start a new line in the log.
        reason = f": {error['message']!r}" if error else ""
        log.info("%s %s after %.1f s%s", label(task), status, lasted, reason)
        return True

    def _stop(self, task: Task, status: Status, error: TaskError | None = None) -> None:
        """Make a task final now, without waiting for its work to end, and cancel the work.

        The work is cancelled only by the call that changes the status, because another
        CancelledError would interrupt its clean-up.
        """
        if self._set_status(task, status, error=error) and task["task_id"] in self._works:
            self._works[task["task_id"]].cancel()

    def expire(self) -> None:
        """Remove the final tasks whose retention has ended.

        Called before every read, so that a task disappears on time, and by a timer (`clean_up`), so
        that memory is freed even if no client sends a request.
        """
        while self._expiring and self._expiring[0][0] <= now():
            _, task_id = self._expiring.popleft()
            task = self._tasks.pop(task_id)
            log.info("%s expired after %.1f s", label(task), self._settings.retention)

    def stop_waiting(self) -> None:
        """Wake all waiting clients and accept no more tasks: the server is shutting down."""
        self._accepting = False
        for next_change in self._next_change.values():
            next_change.set()  # it can stay in the dict, because `wait` registers no client now

    # --- How the workers run a task ---------------------------------------------------------------
    # Each worker takes the next task as soon as it is free. If the manager gathered five tasks at a
    # time instead, four places would stay empty until the slowest has ended.

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """Run the workers while the body of `async with` runs. After that, all tasks are final.

        The manager can be used again, even in another event loop.
        """
        self._reset()
        # Stop the workers of a previous run that was interrupted before it could do so.
        with suppress(RuntimeError):  # `cancel` raises it if their event loop is closed
            self._stop_all(self._workers)
        workers = [asyncio.create_task(self._worker()) for _ in range(self._settings.workers)]
        self._workers = workers
        self._accepting = True
        supervisor = asyncio.create_task(self._supervise(workers))
        try:
            yield
        finally:
            self._stop_all(workers)
            # `cancel` only asks. Without this wait, `asyncio.run` would interrupt the clean-up of
            # work. Work that takes longer goes on. After Ctrl-C, `asyncio.run` waits for it.
            await asyncio.wait([supervisor, *workers, *self._works.values()], timeout=GRACE)

    async def _supervise(self, workers: list[asyncio.Task[None]]) -> None:
        """Stop all workers as soon as one of them fails. Otherwise:

            workers: fail one by one, because of a bug in this class; nothing awaits them
            clients: submit tasks and poll them                             <-- forever

        They are not restarted, because that would hide the bug.
        """
        try:
            # Raises the exception of the first worker that fails, and leaves the others running.
            await asyncio.gather(*workers)
        except Exception as exc:  # not for a CancelledError, because a shutdown is no failure
            log.critical("a worker failed, so all workers stop", exc_info=exc)
        finally:
            self._stop_all(workers)  # changes nothing if `working` has called it before

    def _stop_all(self, workers: list[asyncio.Task[None]]) -> None:
        """Make all tasks final, and cancel their work and the workers."""
        if workers is not self._workers:
            return  # `working` has been entered again, and the tasks are those of the new run
        self._accepting = False
        for task in self._tasks.values():
            self._stop(task, "cancelled")
        for worker in workers:
            worker.cancel()

    async def _worker(self) -> None:
        """Run one task after the other, until cancelled.

        A worker goes on, whatever the work does. The work is an asyncio task of its own, and
        `asyncio.wait` leaves its exceptions to `_finish`. So a CancelledError always means that
        the worker itself is cancelled. With `await work`, the first DELETE would end a worker that
        does not catch CancelledError. One that does can mistake a shutdown for a DELETE:

            client: sends DELETE, which cancels the work
            worker: `await work` raises CancelledError; the worker catches it and goes on
            server: shuts down, which cancels the worker
            worker: `await work` raises CancelledError; the worker catches it and goes on
            server: waits for the worker                        <-- for GRACE seconds
        """
        while True:
            entry = await self._queue.get()
            self._busy += 1

            # There is no `await` until the work is in `_works`, so a DELETE finds every task there
            # or in the queue.
            task = self._tasks[entry.task_id]
            self._set_status(task, "processing")
            work = asyncio.create_task(self._work(task))
            # Work that ignores its cancellation ends when its worker has already gone on. So the
            # dict keeps it alive (asyncio has only weak references), and a callback finishes it.
            self._works[entry.task_id] = work
            work.add_done_callback(partial(self._finish, task))

            await asyncio.wait({work}, timeout=self._settings.task_timeout)
            if not work.done():
                self._stop(task, "failed", TIMEOUT)
                await asyncio.wait({work}, timeout=GRACE)
            if not work.done():
                log.warning("%s is abandoned, because it ignores its cancellation", label(task))
            self._busy -= 1
            del entry, task, work  # otherwise they would stay in memory until the next task comes

    async def _work(self, task: Task) -> Any:
        """Do the work of a task and return the result."""
        parameters = json_copy(task["parameters"])
        try:
            return await self._execute(task["task_type"], parameters, partial(self._report, task))
        except SystemExit as exc:
            # `sys.exit()` in a library raises SystemExit, which would end the event loop.
            raise RuntimeError("the work has called sys.exit()") from exc

    def _report(self, task: Task, percent: float) -> None:
        """Increase the progress, to 99 at most. Ignore late reports and values such as NaN or 250."""
        if task["status"] == "processing" and task["progress"] < percent <= 100:
            task["progress"] = int(min(percent, 99))

    def _finish(self, task: Task, work: asyncio.Task[Any]) -> None:
        """Store the result or the error of work that has ended."""
        self._works.pop(task["task_id"], None)  # `None`, because `_reset` may have dropped it
        if work.cancelled() and task["task_id"] not in self._since:
            return  # cancelled by `_stop`; work that cancels itself gets an internal error
        try:
            result = json_copy(work.result())
        except BaseException as exc:  # work can raise anything
            error = describe_failure(exc)
            self._set_status(task, "failed", error=error)
            # A failure whose text can be shown is not logged. A group is: it can contain a bug.
            if not isinstance(exc, TaskFailedError) or error is INTERNAL_ERROR:
                log.error("%s raised an unexpected exception", label(task), exc_info=exc)
        else:
            self._set_status(task, "completed", result=result)


def new_task(task_type: str, parameters: Parameters, priority: Priority) -> Task:
    """Return a task that is about to be queued."""
    return {
        "task_id": str(uuid4()),
        "task_type": task_type,
        "parameters": parameters,
        "priority": priority,
        "status": "queued",
        "progress": 0,
        "result": None,
        "error": None,
        "created_at": timestamp(time.time()),
        "started_at": None,
        "finished_at": None,
        "expires_at": None,
    }


# === Models =======================================================================================
# Here the HTTP API begins. The models decide what clients can send. Unknown fields are an error,
# because a misspelt `priority` must not be ignored.


def check_number(value: Any) -> Any:
    """Return a number of at most 1e300 unchanged. Raise PydanticCustomError for anything else."""
    # `type`, because `isinstance(True, int)` is true. NaN fails the comparison.
    if type(value) in (int, float) and abs(value) <= 1e300:
        return value
    raise PydanticCustomError("number", "Input should be a number from -1e300 to 1e300")


# At most 1e300, so that the sum of 1,000 numbers is finite. With pydantic's own checks, a wrong value
# can have two errors, one for each type, and their texts contain all 301 digits of the bound.
Bounded: TypeAlias = Annotated[float, Field(ge=-1e300, le=1e300)]  # only for /docs
Number = Annotated[int | float, PlainValidator(check_number, json_schema_input_type=Bounded)]
Text: TypeAlias = Annotated[str, Field(min_length=1, max_length=200)]


class StrictModel(BaseModel, extra="forbid"):
    """A model that refuses unknown fields.

    Fields can have an `alias` and every type that pydantic converts to JSON and back, for example
    `datetime`. The work gets the JSON. Not supported: `validation_alias`, `serialization_alias`,
    and types that hide their value or have no JSON form, such as `SecretStr`.
    """


class SumParameters(StrictModel):
    numbers: Annotated[list[Number], Field(min_length=1, max_length=1000)]


class ReportParameters(StrictModel):
    title: Text
    sections: Annotated[int, Field(strict=True, ge=1, le=6)] = 3


class FailureParameters(StrictModel):
    message: Text = "simulated failure"


class BaseSubmission(StrictModel):
    """What a client submits. Each subclass describes a task type, with an example for /docs."""

    example: ClassVar[dict[str, Any]]
    priority: Priority = "normal"


class SumSubmission(BaseSubmission):
    """Add numbers."""

    example = {"task_type": "compute_sum", "parameters": {"numbers": [1, 2, 3.5]}}
    task_type: Literal["compute_sum"]
    parameters: SumParameters


class ReportSubmission(BaseSubmission):
    """Write a report. Each section takes the same time."""

    example = {"task_type": "generate_report", "parameters": {"title": "Figures", "sections": 2}}
    task_type: Literal["generate_report"]
    parameters: ReportParameters


class FailureSubmission(BaseSubmission):
    """Fail with a message."""

    example = {"task_type": "simulate_failure"}
    task_type: Literal["simulate_failure"]
    parameters: FailureParameters = FailureParameters()


SUBMISSIONS = (SumSubmission, ReportSubmission, FailureSubmission)


class PollQuery(StrictModel):
    wait: Annotated[bool, Field(description="Wait until the status changes.")] = False


class ListQuery(StrictModel):
    status: Annotated[Status | None, Field(description="Only tasks with this status.")] = None
    limit: Annotated[int | None, Field(ge=1, description="The maximum number of tasks.")] = None


class Accepted(TypedDict):
    task_id: TaskId
    status: Literal["queued"]


# === Errors in HTTP ===============================================================================
PROBLEM_JSON = "application/problem+json"
INVALID = "The request is invalid."
ESCAPES = str.maketrans({"~": "~0", "/": "~1"})  # for JSON pointers (RFC 6901)
NO_STORE = {"Cache-Control": "no-store"}  # because the status of a task can change at any time


def problem(status: int, detail: str, headers: Any = None, **members: Any) -> Response:
    """Return an error response. `members` are the optional members of `Problem`."""
    title = http.client.responses.get(status, "Error")
    content = {"type": "about:blank", "title": title, "status": status, "detail": detail, **members}
    return JSONResponse(content, status, NO_STORE | dict(headers or {}), media_type=PROBLEM_JSON)


MISSING = {"detail": "Field required", "pointer": "/parameters"}
EXAMPLE = json.loads(bytes(problem(400, INVALID, errors=[MISSING]).body))


class Problem(BaseModel, json_schema_extra={"example": EXAMPLE}):
    """An error (RFC 9457). Usual values of `status`:

    - 400: The request is invalid. `errors` says why, if it can be read. A `pointer` is a JSON
      pointer into the body (RFC 6901), or the name of a parameter.
    - 404: There is no such path or task. The task may have expired.
    - 409: The task has already completed or failed. `task` is the task.
    - 413: The body is too large.
    - 429: There were too many requests. The header `Retry-After` says how many seconds to wait.
    - 503: The server cannot accept tasks at the moment. `Retry-After` says when to try again.
    """

    type: Literal["about:blank"]
    title: str
    status: int
    detail: str
    errors: list[dict[Literal["detail", "pointer"], str]] = []
    task: Task | None = None


def invalid_item(error: Mapping[str, Any], body: Any) -> dict[str, str]:
    """Convert a pydantic error, without its `input`, which repeats what the client has sent."""
    match error["type"], error["loc"]:
        case "json_invalid", ("body", int(position)):
            detail = f"Malformed JSON at character {position}: {error['ctx']['error']}"
            return {"detail": detail, "pointer": ""}
        case "union_tag_invalid", _:
            detail = f"Input should be one of {error['ctx']['expected_tags']}"
        case "union_tag_not_found", _:
            detail = "Field required"
        case "model_attributes_type", _:
            detail = "Input should be an object, sent as application/json"
        case _:
            detail = printable(error["msg"], 200)
    return {"detail": detail, "pointer": printable(pointer(error, body), 200)}


def pointer(error: Mapping[str, Any], body: Any) -> str:
    """Return a JSON pointer to what a pydantic error is about, or the name of a parameter."""
    source, *path = error["loc"]
    if source != "body":
        return str(error["loc"][-1])
    # In the body, `path` is for example ["compute_sum", "parameters", "numbers", 1]. It also names
    # the chosen member of each union, here the task type. Such names are not keys of the body.
    keys = []
    for key in path:
        with suppress(LookupError, TypeError):
            body = body[key]
            keys.append(key)
    if error["type"] == "missing":
        keys += path[-1:]  # the missing key
    if "discriminator" in error.get("ctx", {}):
        keys.append(error["ctx"]["discriminator"].strip("'"))  # pydantic puts it in quotes
    return "".join("/" + str(key).translate(ESCAPES) for key in keys)


# `async`, because FastAPI would call a plain function in a thread, where a task can change meanwhile.
async def handle_error(_: Request, exc: Exception) -> Response:
    """Return the response for an exception that a route has raised."""
    match exc:
        case RequestValidationError():
            items = [invalid_item(error, exc.body) for error in exc.errors()[:10]]
            return problem(400, INVALID, errors=items)
        case InvalidJsonError():
            return problem(400, INVALID, errors=[{"detail": str(exc), "pointer": "/parameters"}])
        case HTTPException():
            return problem(exc.status_code, printable(exc.detail), exc.headers)
        case TaskNotFoundError():
            return problem(404, "There is no such task. It may have expired.")
        case TaskFinishedError():
            return problem(409, str(exc), task=exc.task)
        case UnavailableError():
            return problem(503, str(exc), {"Retry-After": "10"})  # seconds, arbitrary
        case _:
            return problem(500, "The server failed.")  # the server logs the exception


# === Middleware ===================================================================================
# An ASGI middleware is called with a description of the request (the scope), a function that
# receives the body in parts, and a function that sends the response. It calls the next application
# with these or with its own. The rate limit cannot be a FastAPI dependency:
#
#     client:  sends POST /tasks with a malformed body
#     FastAPI: reads and parses the body, responds with 400
#     FastAPI: does not call the dependency                <-- malformed requests are not counted
#
# The middleware that is added last is called first. So if you add CORSMiddleware to the app, it
# wraps these two: preflight requests are not counted, and a browser can read a 429.

FREE_PATHS = ("/", "/docs", "/redoc", "/openapi.json", "/health", "/favicon.ico")  # not limited


class RateLimitMiddleware:
    """Limits each client's requests. For the headers, see draft-ietf-httpapi-ratelimit-headers."""

    def __init__(self, app: ASGIApp, limiter: RateLimiter) -> None:
        self.app = app
        self.limiter = limiter
        self.policy = f'"default";q={limiter.limit};w={limiter.window}'

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # The path begins with the prefix under which a proxy or a mount serves this app.
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or path in FREE_PATHS:
            await self.app(scope, receive, send)
            return

        # The address of the peer, because every client can send X-Forwarded-For. If the peer is a
        # proxy that uvicorn trusts, uvicorn has already taken the address from that header.
        host, _ = scope.get("client") or ("", 0)
        client = client_key(host)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Asked only now, because the quota may have changed while a long poll was waiting.
                left, seconds = await self.limiter.quota(client)
                message.setdefault("headers", [])  # ASGI allows a response without headers
                headers = MutableHeaders(scope=message)
                headers["RateLimit-Policy"] = self.policy
                headers["RateLimit"] = f'"default";r={left};t={seconds}'
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        if await self.limiter.hit(client):
            await self.app(scope, receive, send_with_headers)
            return

        # The body of a refused request is never read.
        _, seconds = await self.limiter.quota(client)
        seconds = max(1, seconds)  # 0 if all requests have left the window since `hit`
        refusal = problem(429, f"Try again in {seconds} s.", {"Retry-After": str(seconds)})
        await refusal(scope, receive, send_with_headers)


def client_key(host: str) -> str:
    """Return the name under which the requests of an address are counted."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "unknown"  # a Unix socket, or a wrong header of a trusted proxy
    if isinstance(address, ipaddress.IPv4Address):
        return host
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    # The first 64 bits, because an IPv6 client usually has all the addresses of a /64 network.
    return address.packed[:8].hex(":", 2)


class BodyLimitMiddleware:
    """Refuses bodies that are too large, because FastAPI reads a whole body into memory."""

    def __init__(self, app: ASGIApp, max_body: int) -> None:
        self.app = app
        self.max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # No route reads the body of a GET. Under uvicorn, StreamingResponse calls `receive` to notice
        # a disconnect, and an exception there would cut off the list.
        if scope["type"] != "http" or scope["method"] == "GET":
            await self.app(scope, receive, send)
            return
        size = 0

        async def limited_receive() -> Message:
            # The bytes are counted, because a chunked body has no Content-Length. HTTPException,
            # because FastAPI responds to any other exception here with 400.
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.max_body:
                raise HTTPException(413, f"The body is larger than {self.max_body} bytes.")
            return message

        await self.app(scope, limited_receive, send)


# === App ==========================================================================================

# All errors have the same form, so they are documented once: as the `default` response.
DEFAULT_RESPONSE = {
    "description": inspect.getdoc(Problem),
    "model": Problem,
    "content": {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/Problem"}}},
}


async def stream_tasks(tasks: Iterator[Task], limit: int | None) -> AsyncIterator[bytes]:
    """Yield at most `limit` tasks as a JSON array, with one task on each line."""
    chunk = bytearray(b"[")
    for number, task in enumerate(tasks, start=1):
        chunk += b"\n" if number == 1 else b",\n"
        chunk += to_json(task)
        if number == limit:
            break
        # Sending each task alone would be slow. Converting all at once would block the event loop.
        if number % 100 == 0:
            yield bytes(chunk)
            chunk.clear()
            # Let others run. The `yield` alone may not, because only a slow client makes it wait.
            await asyncio.sleep(0)
    yield bytes(chunk) + b"\n]\n"


def prefix(request: Request) -> str:
    """Return the prefix under which a proxy or a mount serves this app, such as /api."""
    return quote(request.scope.get("root_path", "").rstrip("/"))


def add_routes(app: FastAPI, manager: TaskManager, submissions: tuple[Any, ...]) -> None:
    """Add the routes to an app. Each of them converts a request into a call of the manager."""

    async def submit_task(submission: Any, request: Request, response: Response) -> Accepted:
        """Queue a task, and return its id. Poll the task to get its result."""
        task = manager.submit(submission.task_type, submission.parameters, submission.priority)
        response.headers["Location"] = f"{prefix(request)}/tasks/{task['task_id']}"
        return {"task_id": task["task_id"], "status": "queued"}

    # The type of the body depends on `submissions`. Type checkers refuse such a type in a signature,
    # so it is set here: FastAPI reads the annotations when the route is added.
    examples: Any = {model.example["task_type"]: {"value": model.example} for model in submissions}
    body = Body(discriminator="task_type", openapi_examples=examples)
    submit_task.__annotations__["submission"] = Annotated[Union[submissions], body]  # noqa: UP007
    app.post("/tasks", status_code=202, response_description="The id.")(submit_task)

    @app.get("/tasks", response_model=list[Task], response_description="The tasks.")
    async def list_tasks(query: Annotated[ListQuery, Query()]) -> StreamingResponse:
        """Return all tasks, or those with one `status`, as a JSON array. The newest come first."""
        tasks = manager.iterate(query.status)
        return StreamingResponse(stream_tasks(tasks, query.limit), media_type="application/json")

    @app.get("/tasks/{task_id}", response_description="The task.")
    async def get_task(task_id: UUID, query: Annotated[PollQuery, Query()]) -> Task:
        """Return a task. With `wait=true`, wait for its status to change, by default up to 10 s."""
        if query.wait:
            return await manager.wait(str(task_id))
        return manager.get(str(task_id))

    @app.delete("/tasks/{task_id}", response_description="The task.")
    async def cancel_task(task_id: UUID) -> Task:
        """Cancel a task and return it. It is not an error if the task is already cancelled."""
        return manager.cancel(str(task_id))

    @app.get("/health", response_description="The load.")
    async def get_health(response: Response) -> Health:
        """Return the number of tasks and busy workers. This request is not limited."""
        response.headers.update(NO_STORE)
        return manager.health()

    @app.get("/", include_in_schema=False)
    async def redirect_to_docs(request: Request) -> RedirectResponse:
        return RedirectResponse(prefix(request) + "/docs")


async def clean_up(manager: TaskManager, limiter: RateLimiter, interval: float) -> None:
    """Free memory every `interval` seconds, until cancelled."""
    while True:
        await asyncio.sleep(interval)
        try:
            manager.expire()
            await limiter.sweep()
        except Exception:  # CancelledError is not an Exception, so a shutdown ends the timer
            # Otherwise the first exception would end it, and memory would fill up slowly.
            log.exception("the clean-up failed")


@asynccontextmanager
async def in_background(coroutine: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run a coroutine as an asyncio task while the body of `async with` runs, then cancel it."""
    asyncio_task = asyncio.create_task(coroutine)
    try:
        yield
    finally:
        asyncio_task.cancel()
        # `wait`, because `await asyncio_task` would raise its CancelledError here.
        await asyncio.wait({asyncio_task})


@contextmanager
def before_handler(signum: int, callback: Callable[[], None]) -> Iterator[None]:
    """When a signal is received, schedule `callback`, then call the current handler (uvicorn's)."""
    former = signal.getsignal(signum)
    # Only the main thread can set a handler. SIG_DFL and SIG_IGN cannot be called: leave them alone.
    if threading.current_thread() is not threading.main_thread() or not callable(former):
        yield
        return

    def handle(*args: Any) -> None:
        # A signal can arrive in the middle of anything, so only schedule the callback (fact 1).
        with suppress(RuntimeError):  # the event loop has stopped, but the process goes on
            asyncio.get_running_loop().call_soon_threadsafe(callback)
        former(*args)

    signal.signal(signum, handle)  # asyncio's own handlers do not restore `former`
    try:
        yield
    finally:
        # Another app in this process may have added its own handler, which calls this one.
        if signal.getsignal(signum) is handle:
            signal.signal(signum, former)


def create_app(
    settings: Settings | None = None,
    execute: Execute | None = None,
    submissions: tuple[type[BaseSubmission], ...] = SUBMISSIONS,
) -> FastAPI:
    """Return a new app. The defaults are the settings from the environment, and the work above.

    For task types of your own, pass subclasses of BaseSubmission and an `execute` that knows them,
    because the one above fails with an internal error. `app.state.manager` is the manager.
    """
    settings = settings or read_settings()
    manager = TaskManager(settings, execute or scaled_execute(settings.time_scale))
    limiter = RateLimiter(settings.rate_limit, settings.rate_window)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with (
            manager.working(),
            in_background(clean_up(manager, limiter, settings.cleanup_interval)),
        ):
            # A shutdown by a signal has three steps:
            #
            # 1. Our signal handler schedules `stop_waiting`, then calls uvicorn's handler.
            # 2. uvicorn waits for the open responses, then ends this lifespan.
            # 3. The timer ends, then `working` ends, which cancels all tasks and the workers.
            # Without step 1, a long poll would delay step 2 by up to `long_poll` seconds.
            stop = manager.stop_waiting
            with before_handler(signal.SIGINT, stop), before_handler(signal.SIGTERM, stop):
                yield

    app = FastAPI(
        title="Task manager",
        description="Submit a task, then poll it until it is completed, failed or cancelled.",
        lifespan=lifespan,
        responses={"default": DEFAULT_RESPONSE},
        generate_unique_id_function=lambda route: route.name,  # `get_task` in generated clients
        redirect_slashes=False,  # a redirect would repeat a forged Host header
    )
    app.state.manager = manager
    for exception in (RequestValidationError, HTTPException, ManagerError, Exception):
        app.add_exception_handler(exception, handle_error)
    add_routes(app, manager, submissions)
    app.add_middleware(BodyLimitMiddleware, max_body=settings.max_body)
    app.add_middleware(RateLimitMiddleware, limiter=limiter)  # added last, so called first
    return app


app = create_app()
