"""A rate-limited asynchronous task manager with polling, in a single file.

Clients submit tasks over HTTP, poll or long-poll their status, list them and cancel them. Five
workers take the tasks from a priority queue in memory. Read the file from top to bottom: the first
half is the engine, which is plain asyncio, and the second half is the HTTP API around it.

To run it: `uvicorn main:app --reload`, then open http://127.0.0.1:8000/docs.

    queued ----> processing ----> completed | failed
       |             |
       +-------------+----------> cancelled

A *task* is what a client submits: a dict whose `status` moves along these arrows. The *work* of a
task is the coroutine that computes its result. What `asyncio.create_task` returns is always called
an *asyncio task* here.

FOUR FACTS ABOUT ASYNCIO

1.  **Code between two awaits is atomic.** The event loop runs all coroutines in one thread. It can
    switch from one to another only where the current one has to wait: at an `await`, an `async
    with` or an `async for`. While a generator is paused at a `yield`, its caller can wait.

        if len(tasks) < 100:        # These two lines cannot be interrupted,
            tasks.append(task)      # so there are never more than 100 tasks. No lock is needed.

        if len(tasks) < 100:
            await save(task)        # Another coroutine runs here, and also sees 99 tasks.
            tasks.append(task)      # <-- There can be 101 tasks now.

    Awaiting a coroutine that never waits doesn't switch. It is like a function call.

2.  **There are several ways to wait.** `asyncio.create_task(coroutine)` only schedules a coroutine.
    `await asyncio_task` waits and returns its result or raises its exception. `asyncio.gather` does
    this for several: it raises the first exception while others go on. `asyncio.wait` only waits.

3.  **Cancellation is a request.** After `asyncio_task.cancel()`, the event loop raises
    `asyncio.CancelledError` at the `await` where that asyncio task is suspended. The coroutine can
    clean up before it ends, and it can even ignore the request. An asyncio task that awaits another
    one, directly or through `asyncio.gather`, passes the request on to it. `asyncio.wait` does not.
    If the asyncio task has not started yet, none of its code runs, not even a `finally`.

4.  **An `asyncio.Event` wakes all its waiters.** `await event.wait()` suspends a coroutine until
    another one calls `event.set()`. After that, `wait` returns immediately, until `event.clear()`.

Some comments show a run *without* the precaution that they explain. In such a run, the arrow `<--`
marks the step that goes wrong.

WHAT THIS FILE DOES NOT DO

Tasks are lost when the process restarts. There can be only one process, because a second one would
have its own tasks. There are no users: every client can see and cancel every task. Work that blocks
the event loop cannot be stopped, and work that ignores its cancellation keeps its worker until 5 s
after its timeout. README.md names systems without these limits, and what they replace here.
"""

import asyncio
import http.client
import ipaddress
import itertools
import json
import logging
import math
import os
import signal
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import datetime, timezone
from functools import lru_cache, partial
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, get_args
from urllib.parse import quote
from uuid import UUID, uuid4

from fastapi import Body, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse, StreamingResponse
from pydantic import BaseModel, Field, PlainValidator, ValidationError
from pydantic_core import PydanticCustomError, from_json, to_json
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from typing_extensions import TypedDict

# uvicorn only shows the INFO messages of its own loggers and their children.
log = logging.getLogger("uvicorn.error.tasks")


# === Types ========================================================================================
# A task is a plain dict with a checked type. The engine stores it and the API sends it as it is.
# The docstrings of these classes are shown to clients in /docs.

Status: TypeAlias = Literal["queued", "processing", "completed", "failed", "cancelled"]
Priority: TypeAlias = Literal["high", "normal", "low"]
Parameters: TypeAlias = dict[str, Any]

# The state diagram as data: the statuses that can follow each status.
TRANSITIONS: Mapping[Status, tuple[Status, ...]] = {
    "queued": ("processing", "cancelled"),
    "processing": ("completed", "failed", "cancelled"),
    "completed": (),
    "failed": (),
    "cancelled": (),
}
FINAL = ("completed", "failed", "cancelled")


class TaskError(TypedDict):
    """Why a task failed: its work could not be done (`task_failed`; `message` says why), it took
    too long (`timeout`), or it has a bug, which only the log describes (`internal_error`).
    """

    code: Literal["task_failed", "timeout", "internal_error"]
    message: str


class Task(TypedDict):
    """A task. It has the same fields in every state. Fields that have no value yet are null.

    `status` changes from `queued` to `processing`, then to `completed`, `failed` or `cancelled`.
    `progress` is a percentage, and 100 only if the task is completed. `result` is set if it is
    completed, and `error` if it has failed. All times are in UTC (RFC 3339). A finished task can be
    read until `expires_at`.
    """

    task_id: str
    task_type: str
    parameters: Parameters
    priority: Priority
    status: Status
    progress: int
    result: Any
    error: TaskError | None
    created_at: str
    started_at: str | None
    finished_at: str | None
    expires_at: str | None


class Health(TypedDict):
    """The number of tasks by status, and the load. A worker with a processing task is busy."""

    status: Literal["ok"]
    tasks: dict[Status, int]
    queue: dict[Literal["size", "capacity"], int]
    workers: dict[Literal["busy", "total"], int]


# === Settings =====================================================================================

# With this bound, `expires_at` stays far from the year 9999, in which Python's dates end.
Count: TypeAlias = Annotated[int, Field(ge=1, le=1_000_000_000)]
Seconds: TypeAlias = Annotated[float, Field(ge=0.1, le=1_000_000_000)]
SecondsOrZero: TypeAlias = Annotated[float, Field(ge=0, le=1_000_000_000)]


class Settings(BaseModel, frozen=True, extra="forbid"):
    """The settings: `Settings(workers=2)`, or `TASKS_WORKERS=2` in the environment."""

    workers: Annotated[int, Field(ge=1, le=1000)] = 5  # tasks that are processed at the same time
    queue_size: Count = 100  # tasks that can wait for a worker
    max_tasks: Count = 10_000  # tasks in memory, whatever their status
    rate_limit: Count = 10  # requests of one client in `rate_window` seconds
    rate_window: Count = 60  # seconds, a whole number
    long_poll: SecondsOrZero = 10  # how long `?wait=true` waits for a change
    retention: Seconds = 600  # how long a finished task can be read
    cleanup_interval: Seconds = 30  # between two runs of the clean-up
    task_timeout: Seconds = 60  # for the work of a task
    priority_step: SecondsOrZero = 30  # see the task queue
    max_body: Count = 65_536  # bytes in the body of a request
    time_scale: SecondsOrZero = 1  # multiplies the duration of the simulated work


def read_settings() -> Settings:
    """Read the `TASKS_*` variables, or raise SystemExit with a line for each invalid one."""
    names = [name for name in os.environ if name.startswith("TASKS_")]
    values = {name.removeprefix("TASKS_").lower(): os.environ[name] for name in names}
    try:
        return Settings.model_validate(values)
    except ValidationError as exc:
        lines = []
        for error in exc.errors():
            name = str(error["loc"][0])
            lines.append(f"TASKS_{name.upper()}: {error['msg']}")
        raise SystemExit("\n".join(lines)) from None


# === Errors =======================================================================================
# The manager raises subclasses of ManagerError, and the API turns them into HTTP responses.
# TaskFailedError is different. Work raises it, and its message is stored in the task.


class ManagerError(Exception):
    """The base class of the errors that the task manager raises."""


class InvalidJsonError(ManagerError):
    """A value has no JSON form (400, if it is a parameter)."""


class TaskNotFoundError(ManagerError):
    """There is no task with this id, or it has expired (404)."""


class TaskFinishedError(ManagerError):
    """The task cannot be cancelled, because it has completed or failed (409)."""

    def __init__(self, task: Task) -> None:
        super().__init__(f"The task has already {task['status']}.")
        self.task = task


class UnavailableError(ManagerError):
    """The task cannot be accepted, because there is no room or no worker (503)."""


class TaskFailedError(Exception):
    """Raised by work that cannot be done. Clients can read its message."""


TIMEOUT: TaskError = {"code": "timeout", "message": "The task took too long."}
INTERNAL_ERROR: TaskError = {"code": "internal_error", "message": "An internal error occurred."}


def describe_failure(exc: BaseException) -> TaskError:
    """Return what clients are told about an exception that ended the work of a task."""
    with suppress(BaseException):  # an exception can fail to show its text or its parts
        match exc, getattr(exc, "exceptions", None):
            case TaskFailedError(), _:
                return {"code": "task_failed", "message": printable(exc)}
            case _, [first, *_]:
                # A group of asyncio.TaskGroup. Usually, its first exception cancelled the others.
                return describe_failure(first)
    # The text of any other exception can contain secrets. Only the log shows it.
    return INTERNAL_ERROR


def printable(text: object, length: int | None = None) -> str:
    """Return the beginning of a text, without the lone surrogates that UTF-8 cannot encode."""
    return str(text)[:length].encode(errors="replace").decode()


# === Work =========================================================================================
# Replace this section with your own work. A new task type needs a `case` here and two models below.

# The task manager calls an Execute, which calls a Report with its progress in percent.
Report: TypeAlias = Callable[[float], None]
Execute: TypeAlias = Callable[[str, Parameters, Report], Awaitable[Any]]


async def execute(
    task_type: str, parameters: Parameters, report: Report, time_scale: float = 1
) -> Any:
    """Do the work of a task and return its result, which must have a JSON form.

    `parameters` have been validated, and the work may change them. Raise TaskFailedError if the
    work cannot be done. Never block the event loop, because everything else would have to wait:
    call a blocking function with `await asyncio.to_thread(function, ...)`.
    """
    match task_type:
        case "compute_sum":
            await simulate(5 * time_scale, report)
            numbers = parameters["numbers"]
            if all(isinstance(number, int) for number in numbers):
                return sum(numbers)
            return math.fsum(numbers)  # rounded only once, whatever the order of the numbers
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


def scaled_execute(time_scale: float) -> Execute:
    """Return `execute` as the task manager calls it, with three arguments."""
    return partial(execute, time_scale=time_scale)


async def simulate(seconds: float, report: Report) -> None:
    """Sleep in ten steps, and report the progress before each of them."""
    for percent in range(0, 100, 10):
        report(percent)
        await asyncio.sleep(seconds / 10)


# === Rate limiter =================================================================================
# At most `limit` requests in any `window` seconds: a sliding window. For each client, a deque holds
# the times of the requests that were accepted. New times are appended on the right, old ones are
# removed on the left, and a deque is fast at both ends. A counter that is reset every minute would
# be simpler, but wrong:
#
#     11:59:59  client: sends 10 requests, which count for the first minute
#     12:00:00  limiter: resets the counter
#     12:00:01  client: sends 10 requests     <-- 20 requests in two seconds


def now() -> float:
    """Return the time of the event loop's clock, which cannot be set like the wall clock."""
    return asyncio.get_running_loop().time()


class RateLimiter:
    """Allows each client `limit` requests in any `window` seconds."""

    def __init__(self, limit: int, window: int) -> None:
        self.limit = limit
        self.window = window
        self._times: dict[str, deque[float]] = {}
        # A lock lets one coroutine at a time into its `async with` blocks. As written, these blocks
        # never wait, so they are atomic even without it. The lock becomes necessary as soon as the
        # times live in a store that has to be awaited. Otherwise:
        #
        #     request 1: counts 9 requests, awaits the store
        #     request 2: counts 9 requests, awaits the store
        #     both:      add their own time                      <-- 11 requests are accepted
        self._lock = asyncio.Lock()

    async def hit(self, client: str) -> bool:
        """Count a request and return True, or refuse it, without counting, and return False."""
        async with self._lock:
            times = self._recent(client)
            if len(times) >= self.limit:
                return False
            times.append(now())
            return True

    async def quota(self, client: str) -> tuple[int, int]:
        """Return how many requests are left, and the seconds until there is one more."""
        async with self._lock:
            times = self._recent(client)
            left = self.limit - len(times)
            if not times:
                return left, 0
            # Rounded up, because after a shorter wait the client would be refused again.
            seconds = math.ceil(times[0] + self.window - now())
            return left, min(seconds, self.window)  # a rounding error could make it 61 s

    async def sweep(self) -> None:
        """Forget the clients that have no request in the window."""
        async with self._lock:
            for client in list(self._times):
                if not self._recent(client):
                    del self._times[client]

    def _recent(self, client: str) -> deque[float]:
        """Return the times of a client that are still in the window."""
        times = self._times.setdefault(client, deque())
        # The same sum as in `quota`. `times[0] <= now() - window` could be rounded differently, and
        # refuse a client that has waited exactly as long as it was told.
        while times and times[0] + self.window <= now():
            times.popleft()
        return times


# === Task queue ===================================================================================
# A free worker takes the task with the earliest due time, even before that time. The due time of a
# task is the time of its submission, plus 30 s (`priority_step`) for `normal` or 60 s for `low`. It
# never changes, so a low task can only be overtaken by tasks that are submitted in the next 60 s:
#
#     second 0   A is submitted, low:  due at 60
#     second 59  B is submitted, high: due at 59, so it overtakes A
#     second 61  C is submitted, high: due at 61, so it does not
#
# A cancelled task is removed from the queue immediately. Otherwise:
#
#     client: submits 100 tasks and cancels all of them
#     client: submits another task
#     server: responds with 503, the queue is full     <-- but none of its tasks will ever run

PRIORITY_LEVELS: Mapping[Priority, int] = {"high": 0, "normal": 1, "low": 2}

# The due time, a sequence number, and the id of the task. The sequence number keeps tasks that are
# due at the same time in the order of their submission.
Entry: TypeAlias = tuple[float, int, str]


class TaskQueue(asyncio.PriorityQueue[Entry]):
    """A bounded queue that returns the smallest entry first, and can remove an entry."""

    def remove(self, task_id: str) -> None:
        """Remove the entry of a task."""
        # asyncio.PriorityQueue has no such method. There is no `await` here, so this is atomic.
        entries = [self.get_nowait() for _ in range(self.qsize())]
        for entry in entries:
            if entry[2] != task_id:
                self.put_nowait(entry)


# === Task manager =================================================================================
# Requests, workers and the clean-up all change the same dicts. No lock is needed, because no change
# contains an `await`.

# How many seconds a worker waits for work that has timed out, and a shutdown for all work.
GRACE = 5


def timestamp(seconds: float) -> str:
    """Convert a time of the wall clock (`time.time()`) to RFC 3339, with six decimal places."""
    moment = datetime.fromtimestamp(seconds, timezone.utc)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def label(task: Task) -> str:
    """Return a short name of a task for the log."""
    return f"task {task['task_id'][:8]} {task['task_type']}"


def json_copy(value: Any) -> Any:
    """Return a copy of a value that has been converted to JSON and back, or raise InvalidJsonError.

    Parameters and results are stored as copies. So everything that is stored can be sent, and the
    code that has supplied a value cannot change the task afterwards.
    """
    try:
        text = json.dumps(value, allow_nan=False)
        check_keys(value)
        return from_json(text)  # refuses lone surrogates, and more than 200 levels of nesting
    except (TypeError, ValueError, RecursionError) as exc:
        raise InvalidJsonError("The value has no JSON form.") from exc


def check_keys(value: Any) -> None:
    """Raise TypeError for a key that is not a string. `json.dumps` would convert 1 to "1"."""
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("keys must be strings")
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            check_keys(item)


@asynccontextmanager
async def in_background(coroutine: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run a coroutine as an asyncio task while the body of `async with` runs, then cancel it."""
    asyncio_task = asyncio.create_task(coroutine)
    try:
        yield
    finally:
        asyncio_task.cancel()
        await asyncio.wait({asyncio_task})


class TaskManager:
    """Stores the tasks, and runs them inside `async with manager.working()`."""

    def __init__(self, settings: Settings, execute: Execute) -> None:
        self._settings = settings
        self._execute = execute
        # True from the start of the workers until a shutdown begins or a worker fails.
        self._accepting = False
        # All tasks by id, in the order of their submission.
        self._tasks: dict[str, Task] = {}
        # The entries of the queued tasks. `working` makes the queue.
        self._queue: TaskQueue
        self._sequence = itertools.count()
        # The asyncio tasks that do the work, by task id, until they have ended.
        self._works: dict[str, asyncio.Task[Any]] = {}
        # When the status of each task that is not final last changed.
        self._changed_at: dict[str, float] = {}
        # An Event for each task that clients wait for. The next change of the task sets it.
        self._changed: dict[str, asyncio.Event] = {}
        # When to remove each final task, and its id. This is sorted, because the retention is the
        # same for all tasks.
        self._expiring: deque[tuple[float, str]] = deque()

    # --- What clients ask for ---------------------------------------------------------------------

    def submit(self, task_type: str, parameters: Parameters, priority: Priority = "normal") -> Task:
        """Queue a new task and return it, or raise UnavailableError or InvalidJsonError."""
        if not self._accepting:
            raise UnavailableError("The server does not accept tasks at the moment.")
        self.expire()
        if len(self._tasks) >= self._settings.max_tasks:
            raise UnavailableError("There are too many tasks.")
        task = new_task(task_type, json_copy(parameters), priority)
        task_id = task["task_id"]
        due = now() + PRIORITY_LEVELS[priority] * self._settings.priority_step
        # First the queue, which can be full, so that a refused task leaves no trace. Without an
        # `await`, no worker can take the entry before the task is in the dict.
        try:
            self._queue.put_nowait((due, next(self._sequence), task_id))
        except asyncio.QueueFull:
            raise UnavailableError("The queue is full.") from None
        self._tasks[task_id] = task
        self._changed_at[task_id] = now()
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
        `long_poll` seconds in any case. There is no `await` between reading the status and
        registering the Event, and an Event is never cleared: `_set_status` removes it from the dict
        and sets it. Otherwise a change can be missed in one of two ways:

            client: reads "processing", awaits something
            worker: sets the status to "completed"; there is no Event to set
            client: registers an Event and waits for it         <-- although the task has finished

            client: reads "processing"; `wait_for` (before Python 3.12) schedules `event.wait()`
            worker: sets the status to "completed", sets the Event and clears it
            client: the asyncio task starts to wait             <-- although the task has finished
        """
        task = self.get(task_id)
        if task["status"] in FINAL or not self._accepting:
            return task
        changed = self._changed.setdefault(task_id, asyncio.Event())
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(changed.wait(), self._settings.long_poll)
        return task  # `get` could fail here, because the task may have expired in the meantime

    def iterate(self, status: Status | None = None) -> Iterator[Task]:
        """Yield the tasks with this status, or all tasks, in the order of their submission.

        The dict can change while the caller awaits something between two tasks. So this iterates
        over a copy of the ids, and looks up each task when it is needed. Otherwise:

            server: sends some tasks of a list, awaits a slow client
            client: submits a task, which is added to the dict
            server: RuntimeError, dictionary changed size during iteration    <-- half a response
        """
        for task_id in list(self._tasks):
            self.expire()
            task = self._tasks.get(task_id)
            if task is not None and status in (None, task["status"]):
                yield task

    def cancel(self, task_id: str) -> Task:
        """Cancel a task and return it, or raise TaskNotFoundError or TaskFinishedError."""
        task = self.get(task_id)
        if task["status"] in ("completed", "failed"):
            raise TaskFinishedError(task)
        if task["status"] == "queued":
            self._queue.remove(task_id)
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
            "workers": {"busy": statuses.count("processing"), "total": self._settings.workers},
        }

    # --- How a status changes ---------------------------------------------------------------------

    def _set_status(
        self, task: Task, status: Status, result: Any = None, error: TaskError | None = None
    ) -> bool:
        """Change the status of a task and what depends on it, and wake the waiting clients.

        This is the only place where a status changes. If TRANSITIONS doesn't allow the change,
        return False and change nothing. So the status of a final task never changes again.
        """
        if status not in TRANSITIONS[task["status"]]:
            return False
        task_id = task["task_id"]
        lasted = now() - self._changed_at.pop(task_id)
        task["status"] = status
        task["result"] = result
        task["error"] = error
        if status == "completed":
            task["progress"] = 100
        if status == "processing":
            task["started_at"] = timestamp(time.time())
            self._changed_at[task_id] = now()
        else:
            finished_at = time.time()
            task["finished_at"] = timestamp(finished_at)
            task["expires_at"] = timestamp(finished_at + self._settings.retention)
            self._expiring.append((now() + self._settings.retention, task_id))
        if task_id in self._changed:
            self._changed.pop(task_id).set()
        # `!r` quotes the message, so a line break in it doesn't start a new line in the log.
        reason = f": {error['message']!r}" if error else ""
        log.info("%s %s after %.1f s%s", label(task), status, lasted, reason)
        return True

    def stop_waiting(self) -> None:
        """Wake all waiting clients and accept no more tasks: the server is shutting down."""
        self._accepting = False
        for changed in self._changed.values():
            changed.set()

    def expire(self) -> None:
        """Remove the final tasks whose retention has ended.

        Called before every read, so that a task disappears as soon as its retention has ended, and
        by a timer (`clean_up`), so that memory is freed even if no client sends a request.
        """
        while self._expiring and self._expiring[0][0] <= now():
            _, task_id = self._expiring.popleft()
            task = self._tasks.pop(task_id)
            log.info("%s expired after %.1f s", label(task), self._settings.retention)

    def _stop(self, task: Task, status: Status, error: TaskError | None = None) -> None:
        """Stop a task: first change its status, then cancel its work.

        The status changes now, and not when the work has ended. Otherwise:

            client: sends DELETE; the work is cancelled, the response says "cancelled"
            work:   catches CancelledError and returns a result
            worker: sets the status to "completed"              <-- the response was wrong

        The work is cancelled only once, by the call that changes the status. Another CancelledError
        would interrupt the clean-up that the first one has started.
        """
        if self._set_status(task, status, error=error) and task["task_id"] in self._works:
            self._works[task["task_id"]].cancel()

    # --- How the workers run a task ---------------------------------------------------------------

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """Run the workers while the body of `async with` runs. After that, all tasks are final."""
        # A new queue, because the old one may belong to another event loop and hold old tasks.
        self._queue = TaskQueue(self._settings.queue_size)
        started = asyncio.Event()
        async with in_background(self._run_workers(started)):
            # An asyncio task that is cancelled before it starts doesn't run its `finally`.
            await started.wait()
            yield

    async def _run_workers(self, started: asyncio.Event) -> None:
        """Run the workers until this is cancelled or a worker fails, then stop everything."""
        workers = [asyncio.create_task(self._worker()) for _ in range(self._settings.workers)]
        self._accepting = True
        started.set()
        try:
            # A worker never returns, so this waits until the server shuts down. Don't gather tasks
            # instead, because a batch of tasks takes as long as its slowest one:
            #
            #     tasks:  four take 5 s, the fifth takes 30 s
            #     gather: returns after 30 s            <-- four workers had nothing to do for 25 s
            await asyncio.gather(*workers)
        except Exception:
            # A bug in this class. All workers stop, so clients get a 503 and don't wait forever.
            log.critical("a worker failed, so all workers stop", exc_info=True)
        finally:
            self._accepting = False
            for task in self._tasks.values():
                self._stop(task, "cancelled")
            for worker in workers:  # because `gather` lets the others go on after a failure
                worker.cancel()
            await asyncio.wait([*workers, *self._works.values()], timeout=GRACE)

    async def _worker(self) -> None:
        """Run one task after the other, until cancelled.

        The work is an asyncio task of its own, so it can be cancelled without its worker. And
        `asyncio.wait` raises CancelledError only if the worker itself is cancelled. `await work`
        would also raise it if the work is cancelled, and it is hard to tell the difference:

            client: sends DELETE, which cancels the work
            worker: `await work` raises CancelledError; the worker catches it and goes on
            server: shuts down, which cancels the worker
            worker: `await work` raises CancelledError; the worker catches it and goes on
            server: waits for the worker                        <-- forever
        """
        while True:
            _, _, task_id = await self._queue.get()
            # There is no `await` until the work is in the dict, so a DELETE finds every task either
            # in the queue or being processed.
            task = self._tasks[task_id]
            self._set_status(task, "processing")
            work = asyncio.create_task(self._work(task))
            # The dict also keeps the work alive, because the event loop has only weak references.
            self._works[task_id] = work
            # A callback, because abandoned work ends when its worker has already gone on.
            work.add_done_callback(partial(self._finish, task))
            await asyncio.wait({work}, timeout=self._settings.task_timeout)
            if not work.done():
                self._stop(task, "failed", TIMEOUT)
                await asyncio.wait({work}, timeout=GRACE)
            if not work.done():
                log.warning("%s is abandoned, because it ignores its cancellation", label(task))

    async def _work(self, task: Task) -> Any:
        """Do the work of a task and return the result."""
        parameters = json_copy(task["parameters"])
        report = partial(self._report, task)
        try:
            return await self._execute(task["task_type"], parameters, report)
        except (SystemExit, KeyboardInterrupt) as exc:
            # asyncio lets these two end the server. `sys.exit()` in a library raises SystemExit.
            raise RuntimeError(f"the work raised {type(exc).__name__}") from exc

    def _report(self, task: Task, percent: float) -> None:
        """Increase the progress of a task, to 99 at most. Ignore odd values and late reports."""
        if task["status"] == "processing" and task["progress"] < percent <= 100:
            task["progress"] = int(min(percent, 99))

    def _finish(self, task: Task, work: asyncio.Task[Any]) -> None:
        """Store how the work of a task ended. The event loop calls this when it has ended."""
        del self._works[task["task_id"]]
        if work.cancelled() and (task["status"] in FINAL or not self._accepting):
            # `_stop` has changed the status and cancelled the work, or asyncio cancels everything
            # after a second Ctrl-C, and `_run_workers` will change the status. Any other
            # cancellation is a bug, and `result` raises it.
            return
        try:
            result = json_copy(work.result())
        except BaseException as exc:  # work can raise anything
            error = describe_failure(exc)
            if error is INTERNAL_ERROR:
                log.error("%s raised an unexpected exception", label(task), exc_info=exc)
            self._set_status(task, "failed", error=error)
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
# Here the HTTP API begins. These models decide what clients can send. Unknown fields are an error,
# because a misspelt `priority` must not be ignored. A new task type needs a model for its
# parameters, and one for its submission in `AnySubmission`.


def check_number(value: Any) -> Any:
    """Return a number of at most 1e300 unchanged. Raise PydanticCustomError for anything else."""
    # `type`, because `isinstance(True, int)` is true. NaN fails the comparison.
    if type(value) in (int, float) and abs(value) <= 1e300:
        return value
    raise PydanticCustomError("number", "Input should be a number from -1e300 to 1e300")


# `int | float` would accept strings, and report two errors for each wrong value.
Bounded: TypeAlias = Annotated[float, Field(ge=-1e300, le=1e300)]  # how /docs describes a number
Number: TypeAlias = Annotated[float, PlainValidator(check_number, json_schema_input_type=Bounded)]
Text: TypeAlias = Annotated[str, Field(min_length=1, max_length=200)]


class StrictModel(BaseModel, extra="forbid"):
    """A model that refuses unknown fields."""


class SumParameters(StrictModel):
    numbers: Annotated[list[Number], Field(min_length=1, max_length=1000)]


class ReportParameters(StrictModel):
    title: Text
    sections: Annotated[int, Field(strict=True, ge=1, le=6)] = 3


class FailureParameters(StrictModel):
    message: Text = "simulated failure"


class BaseSubmission(StrictModel):
    """The fields of all submissions, and the example that /docs shows."""

    example: ClassVar[dict[str, Any]]
    priority: Priority = "normal"


class SumSubmission(BaseSubmission):
    """Add numbers. This takes 5 s."""

    example = {"task_type": "compute_sum", "parameters": {"numbers": [1, 2, 3.5]}}
    task_type: Literal["compute_sum"]
    parameters: SumParameters


class ReportSubmission(BaseSubmission):
    """Write a report. This takes 5 s for each section."""

    example = {"task_type": "generate_report", "parameters": {"title": "Figures", "sections": 2}}
    task_type: Literal["generate_report"]
    parameters: ReportParameters


class FailureSubmission(BaseSubmission):
    """Fail after 5 s."""

    example = {"task_type": "simulate_failure"}
    task_type: Literal["simulate_failure"]
    parameters: FailureParameters = FailureParameters()


AnySubmission: TypeAlias = SumSubmission | ReportSubmission | FailureSubmission
EXAMPLES: dict[str, Any] = {
    model.example["task_type"]: {"value": model.example} for model in get_args(AnySubmission)
}
Submission: TypeAlias = Annotated[
    AnySubmission, Body(discriminator="task_type", openapi_examples=EXAMPLES)
]


class PollQuery(StrictModel):
    wait: bool = False


class ListQuery(StrictModel):
    status: Status | None = None
    limit: Annotated[int, Field(ge=1)] | None = None


class Accepted(TypedDict):
    task_id: str
    status: Literal["queued"]


# Without the example, /docs would show all fields of a task for each error.
class Problem(BaseModel, json_schema_extra={"example": {"title": "string", "status": 0}}):
    """An error (RFC 9457). A `pointer` in `errors` is a JSON pointer into the body (RFC 6901), or
    the name of a parameter. With 409, `task` is the task.
    """

    type: Literal["about:blank"]
    title: str
    status: int
    detail: str
    errors: list[dict[Literal["detail", "pointer"], str]] = []
    task: Task | None = None


# === Errors in HTTP ===============================================================================

PROBLEM_JSON = "application/problem+json"
NO_STORE = {"Cache-Control": "no-store"}  # because the status of a task can change at any time
UNREADABLE = "There was an error parsing the body"  # the text of FastAPI


def problem(
    status: int, detail: str, headers: Mapping[str, str] | None = None, **members: Any
) -> JSONResponse:
    """Return an error response. `members` are the optional members of `Problem`."""
    title = http.client.responses.get(status, "Error")
    content = {"type": "about:blank", "title": title, "status": status, "detail": detail}
    return JSONResponse(content | members, status, NO_STORE | dict(headers or {}), PROBLEM_JSON)


def invalid_item(error: Mapping[str, Any]) -> dict[str, str]:
    """Convert an error of pydantic, without the value that the client has sent."""
    # `loc` is for example ("query", "limit") or ("body", "compute_sum", "parameters", "numbers").
    # In the body, its second item is the task type, which is not a key of the body.
    source, *path = error["loc"]
    detail = error["msg"]
    match error["type"]:
        case "union_tag_invalid" | "union_tag_not_found" if not path:
            path = ["", "task_type"]  # the first item is skipped below
            detail = f"Input should be one of {', '.join(EXAMPLES)}"
        case "json_invalid":
            detail = f"Malformed JSON at character {path[0]}: {error['ctx']['error']}"
        case "model_attributes_type":
            detail = "Input should be an object, sent as application/json"
    if source == "body":
        pointer = ""
        for key in path[1:]:
            pointer += "/" + str(key).replace("~", "~0").replace("/", "~1")
    else:
        pointer = str(path[-1])
    # Both can contain parts of the request, which can have any length.
    return {"detail": printable(detail, 200), "pointer": printable(pointer, 200)}


# `async`, although it awaits nothing, because FastAPI would call a plain function in a thread.
async def handle_error(_: Request, exc: Exception) -> Response:
    """Return the response for an exception that a route has raised."""
    match exc:
        case RequestValidationError():
            items = [invalid_item(error) for error in exc.errors()[:10]]
        case HTTPException() if exc.detail == UNREADABLE:
            detail = "The body should be JSON in UTF-8, without deep nesting or very long numbers."
            items = [{"detail": detail, "pointer": ""}]
        case InvalidJsonError():
            items = [{"detail": str(exc), "pointer": "/parameters"}]
        case HTTPException():
            return problem(exc.status_code, str(exc.detail), exc.headers)
        case TaskNotFoundError():
            return problem(404, "There is no such task. It may have expired.")
        case TaskFinishedError():
            return problem(409, str(exc), task=exc.task)
        case UnavailableError():
            return problem(503, str(exc), {"Retry-After": "10"})
        case _:
            return problem(500, "The server failed.")  # uvicorn logs the exception
    return problem(400, "The request is invalid.", errors=items)


# === Middleware ===================================================================================
# An ASGI middleware is called with a description of the request (the scope), a function that
# receives the body, and a function that sends the response. It calls the next application with the
# same three, or with its own versions of them. The rate limit is a middleware, because a dependency
# of FastAPI would be called too late:
#
#     client:  sends POST /tasks with a malformed body
#     FastAPI: reads and parses the body, responds with 400
#     FastAPI: does not call the dependency                <-- malformed requests are not counted
#
# The middleware that was added last is called first. So if you add CORSMiddleware to the app,
# preflight requests are not counted, and a browser can read the refusals of the middleware below.

FREE_PATHS = ("/", "/docs", "/redoc", "/openapi.json", "/health", "/favicon.ico")  # not limited


class RateLimitMiddleware:
    """Limits the requests of each client, and tells it how many are left."""

    def __init__(self, app: ASGIApp, limiter: RateLimiter) -> None:
        self._app = app
        self._limiter = limiter
        # The format is that of draft-ietf-httpapi-ratelimit-headers.
        self._policy = f'"default";q={limiter.limit};w={limiter.window}'

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(root_path(scope))
        if scope["type"] != "http" or path in FREE_PATHS:
            await self._app(scope, receive, send)
            return
        # Every client can send X-Forwarded-For. uvicorn reads it if it was told to trust the peer.
        host, _ = scope.get("client") or ("", 0)
        client = client_key(host)
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            # The quota may have changed since the request, because a long poll responds late.
            if message["type"] == "http.response.start":
                started = True
                left, seconds = await self._limiter.quota(client)
                headers = MutableHeaders(scope=message)
                headers["RateLimit-Policy"] = self._policy
                headers["RateLimit"] = f'"default";r={left};t={seconds}'
                headers.update(NO_STORE)
            await send(message)

        if not await self._limiter.hit(client):
            _, seconds = await self._limiter.quota(client)
            # Not 5, because uvicorn closes idle connections after 5 s, and the request could fail.
            seconds = 6 if seconds == 5 else max(1, seconds)
            wait = {"Retry-After": str(seconds)}  # RFC 9110, section 10.2.3
            refusal = problem(429, f"Try again in {seconds} s.", wait)
            await refusal(scope, receive, send_with_headers)
            return
        try:
            await self._app(scope, receive, send_with_headers)
        except Exception:
            # A bug. Starlette handles it outside of all middleware, without adding the headers.
            if not started:
                await problem(500, "The server failed.")(scope, receive, send_with_headers)
            raise


def root_path(scope: Scope) -> str:
    """Return the prefix under which a proxy or a mount serves this app, such as /api."""
    return str(scope.get("root_path", "")).rstrip("/")


@lru_cache(maxsize=1000)  # because parsing an address takes longer than counting a request
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
    # An IPv6 client usually has a whole /64 network, so it could often change its address.
    return str(ipaddress.IPv6Network((address, 64), strict=False))


class BodyLimitMiddleware:
    """Refuses bodies that are too large, because FastAPI reads a whole body into memory."""

    def __init__(self, app: ASGIApp, max_body: int) -> None:
        self._app = app
        self._max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] == "GET":  # no route reads the body of a GET
            await self._app(scope, receive, send)
            return
        is_json = "json" in Headers(scope=scope).get("Content-Type", "").lower()
        size = 0

        async def limited_receive() -> Message:
            # The bytes are counted, because a chunked body has no Content-Length. FastAPI passes an
            # HTTPException on, but would respond to any other exception with 400.
            nonlocal size
            message = await receive()
            body = message.get("body", b"")
            size += len(body)
            if size > self._max_body:
                raise HTTPException(413, f"The body is larger than {self._max_body} bytes.")
            # Only UTF-8 is allowed (RFC 8259). Python's parser would accept UTF-16 too, in which
            # JSON always contains zero bytes.
            if is_json and b"\0" in body:
                raise HTTPException(400, UNREADABLE)
            return message

        await self._app(scope, limited_receive, send)


# === App ==========================================================================================

ERRORS = {
    400: "The request is invalid. `errors` says why.",
    404: "There is no such task, or it has expired.",
    409: "The task has already completed or failed.",
    413: "The body is too large.",
    429: "There were too many requests. `Retry-After` says how many seconds to wait.",
    503: "The queue is full, or no more tasks are accepted. Try again after `Retry-After` seconds.",
}
Responses: TypeAlias = dict[int | str, dict[str, Any]]
PROBLEM_CONTENT = {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/Problem"}}}
# With "default", FastAPI doesn't document its own 422. With `model`, it documents the schema.
OTHER_ERRORS = {"model": Problem, "content": PROBLEM_CONTENT, "description": "Any other error."}


def documented(success: int, description: str, *errors: int) -> Responses:
    """Return the documentation of the responses of a route: a success, and errors."""
    responses: Responses = {success: {"description": description}}
    for error in errors:
        responses[error] = {"description": ERRORS[error], "content": PROBLEM_CONTENT}
    return responses


async def stream_tasks(tasks: Iterator[Task], limit: int | None) -> AsyncIterator[bytes]:
    """Yield at most `limit` tasks as a JSON array, with one task on each line."""
    chunk = bytearray(b"[")
    separator = b"\n"
    for number, task in enumerate(tasks, start=1):
        chunk += separator + to_json(task)
        separator = b",\n"
        if number == limit:
            break
        # Single tasks would be slow to send. All tasks at once would block the other clients.
        if number % 100 == 0:
            yield bytes(chunk)
            chunk.clear()
            await asyncio.sleep(0)  # always switches, but sending a chunk doesn't always wait
    yield bytes(chunk) + b"\n]\n"


def add_routes(app: FastAPI, manager: TaskManager) -> None:
    """Add the routes to an app. Each of them converts a request into a call of the manager."""

    @app.post(
        "/tasks",
        status_code=202,
        responses=documented(202, "The id.", 400, 413, 429, 503),
    )
    async def submit_task(submission: Submission, request: Request, response: Response) -> Accepted:
        """Queue a task, and return its id. Poll the task to get its result."""
        parameters = submission.parameters.model_dump()
        task = manager.submit(submission.task_type, parameters, submission.priority)
        prefix = quote(root_path(request.scope))
        response.headers["Location"] = f"{prefix}/tasks/{task['task_id']}"
        return {"task_id": task["task_id"], "status": "queued"}

    @app.get(
        "/tasks",
        response_model=list[Task],
        responses=documented(200, "The tasks.", 400, 429),
    )
    async def list_tasks(query: Annotated[ListQuery, Query()]) -> StreamingResponse:
        """Return all tasks, or those with one `status`, as a JSON array. The oldest come first."""
        tasks = manager.iterate(query.status)
        return StreamingResponse(stream_tasks(tasks, query.limit), media_type="application/json")

    @app.get("/tasks/{task_id}", responses=documented(200, "The task.", 400, 404, 429))
    async def get_task(task_id: UUID, query: Annotated[PollQuery, Query()]) -> Task:
        """Return a task. With `wait=true`, wait until its status changes, for at most 10 s."""
        if query.wait:
            return await manager.wait(str(task_id))
        return manager.get(str(task_id))

    @app.delete("/tasks/{task_id}", responses=documented(200, "The task.", 400, 404, 409, 429))
    async def cancel_task(task_id: UUID) -> Task:
        """Cancel a task and return it. It is not an error if the task is already cancelled."""
        return manager.cancel(str(task_id))

    @app.get("/health", responses=documented(200, "The load.", 503))
    async def get_health(response: Response) -> Health:
        """Return the number of tasks and busy workers. This request is not limited."""
        response.headers.update(NO_STORE)
        return manager.health()

    @app.get("/", include_in_schema=False)
    async def redirect_to_docs(request: Request) -> RedirectResponse:
        return RedirectResponse(quote(root_path(request.scope)) + "/docs")


async def clean_up(manager: TaskManager, limiter: RateLimiter, interval: float) -> None:
    """Free memory every `interval` seconds, until cancelled."""
    while True:
        await asyncio.sleep(interval)
        try:
            manager.expire()
            await limiter.sweep()
        except Exception:
            # Otherwise the first exception would end the timer, and memory would fill up slowly.
            log.exception("the clean-up failed")


@contextmanager
def before_handler(signum: int, callback: Callable[[], None]) -> Iterator[None]:
    """When a signal is received, schedule `callback`, then call the current handler."""
    former = signal.getsignal(signum)
    # Only the main thread can set a handler. If no server has set one, the signal keeps its effect.
    if threading.current_thread() is not threading.main_thread() or not callable(former):
        yield
        return
    loop = asyncio.get_running_loop()

    def handle(*args: Any) -> None:
        with suppress(RuntimeError):  # the event loop is closed, but the process goes on
            loop.call_soon_threadsafe(callback)
        former(*args)

    signal.signal(signum, handle)
    try:
        yield
    finally:
        # Another app in this process may have added its own handler, which calls this one.
        if signal.getsignal(signum) is handle:
            signal.signal(signum, former)


def create_app(settings: Settings | None = None, execute: Execute | None = None) -> FastAPI:
    """Return a new app. The defaults are the settings from the environment, and the work above."""
    settings = settings or read_settings()
    manager = TaskManager(settings, execute or scaled_execute(settings.time_scale))
    limiter = RateLimiter(settings.rate_limit, settings.rate_window)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with (
            manager.working(),
            in_background(clean_up(manager, limiter, settings.cleanup_interval)),
        ):
            # A shutdown has three steps. Without the first one, an open long poll would delay the
            # second one by up to 10 s:
            #
            #     signal handler: schedules `stop_waiting`, and calls the handler of uvicorn
            #     uvicorn:        waits until all responses have been sent, then ends this lifespan
            #     lifespan:       cancels the timer, the tasks and the workers, and waits for them
            stop = manager.stop_waiting
            with before_handler(signal.SIGINT, stop), before_handler(signal.SIGTERM, stop):
                yield

    handled = (RequestValidationError, HTTPException, ManagerError, Exception)
    app = FastAPI(
        title="Task manager",
        description="Submit a task, then poll it until it is completed, failed or cancelled.",
        lifespan=lifespan,
        responses={"default": OTHER_ERRORS},
        exception_handlers=dict.fromkeys(handled, handle_error),
        redirect_slashes=False,  # a redirect would repeat the Host header, which can be anything
    )
    app.state.manager = manager
    app.add_middleware(BodyLimitMiddleware, max_body=settings.max_body)
    app.add_middleware(RateLimitMiddleware, limiter=limiter)
    add_routes(app, manager)
    return app


app = create_app()
