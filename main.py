"""A rate-limited asynchronous task manager API with polling, in a single file.

Clients submit tasks over HTTP, poll or long-poll their status, list them and cancel
them. Five workers take the tasks from a priority queue in memory. Finished tasks are
removed after ten minutes. Each client address can send 10 requests a minute to /tasks.

Needs Python 3.10. Run `uvicorn main:app --reload`, and open http://127.0.0.1:8000/docs.

    queued ----> processing ----> completed | failed
       |             |
       +-------------+----------> cancelled

The part before "Models" is a task manager and a rate limiter that work without a web
server. The rest is the HTTP API around them. The path of a task:

    submit_task               the route, called with a validated request
    TaskManager.submit        stores the task and puts it into the queue
    TaskManager._worker       takes it from the queue and starts its work
    TaskManager._work         awaits `execute`, and stores the result or the error
    TaskManager._set_status   called at each change of the status, wakes waiting clients

A *task* is a dict. An *asyncio task* is what `asyncio.create_task` returns. The *work*
of a task is the asyncio task that computes its result. In comments that show what would
happen without a precaution, an arrow `<--` marks the step at which things go wrong.

FOUR FACTS ABOUT ASYNCIO

1.  **Code between two awaits is atomic.** The event loop runs all coroutines in one
    thread. It switches between them only at an `await`, an `async with`, an
    `async for`, or a `yield` in an async generator, where the caller can await.

        if len(tasks) < 100:        # These two lines cannot be interrupted, so there
            tasks.append(task)      # are never more than 100 tasks. No lock is needed.

        if len(tasks) < 100:        # Suppose there are 99.
            await save(task)        # Another coroutine runs here and counts 99 as well.
            tasks.append(task)      # <-- Both append a task. Now there are 101.

2.  **`await` passes on a cancellation.** `await asyncio_task` returns its result or
    raises its exception. `await asyncio.gather(...)` does the same for several, and
    raises the first exception. If the *waiting* coroutine is cancelled, these asyncio
    tasks are cancelled too. `await asyncio.wait(...)` only waits and passes on nothing.

3.  **Cancellation is a request.** `asyncio_task.cancel()` returns immediately. Soon
    after, `asyncio.CancelledError` is raised at the `await` where the asyncio task is
    suspended. Code that catches it should clean up and raise it again, because
    otherwise the asyncio task goes on. (`except Exception` does not catch it.) An
    asyncio task that is cancelled before it starts runs none of its code.

4.  **An `asyncio.Event` wakes all its waiters.** `await event.wait()` suspends a
    coroutine until another one calls `event.set()`. After that, the Event stays set.

WHAT THIS FILE DOES NOT DO

Tasks are lost when the process ends. There can be only one process, because a second
one would have its own tasks. There are no users: every client can see and cancel every
task. README.md lists more assumptions, and alternatives without these limits.

A shutdown cancels all tasks, and usually takes less than a second. It gives their work
5 s to clean up. Work that ignores its cancellation keeps its worker. After Ctrl-C (not
SIGTERM), it also keeps the process from ending. So does a thread. A client that stops
in the middle of a request or a response can delay a shutdown without limit, unless
uvicorn is started with `--timeout-graceful-shutdown 5`.
"""

import asyncio
import itertools
import json
import logging
import math
import signal
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, suppress
from datetime import datetime, timezone
from functools import partial
from os import environ
from typing import Annotated, Any, Literal
from uuid import UUID, uuid4

from fastapi import Body, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse, StreamingResponse
from pydantic import BaseModel, Field, ValidationError
from pydantic_core import from_json, to_json
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from typing_extensions import NotRequired, TypedDict  # pydantic needs these before 3.12

# Under `uvicorn.error`, because uvicorn shows INFO messages only of its own loggers.
log = logging.getLogger("uvicorn.error.tasks")


# === Types ============================================================================
# A task is a dict, in the form that is sent. Type checkers and FastAPI use its types.

Status = Literal["queued", "processing", "completed", "failed", "cancelled"]
Priority = Literal["high", "normal", "low"]
Parameters = dict[str, Any]

Time = Annotated[str, Field(json_schema_extra={"format": "date-time"})]

# The state diagram as data: the statuses that can follow each status.
TRANSITIONS: dict[Status, list[Status]] = {
    "queued": ["processing", "cancelled"],
    "processing": ["completed", "failed", "cancelled"],
    "completed": [],
    "failed": [],
    "cancelled": [],
}
FINAL = [status for status, following in TRANSITIONS.items() if not following]


class TaskError(TypedDict):
    """Why a task failed: its work could not be done (`task_failed`), took too long
    (`timeout`), or has a bug, which is described only in the log (`internal_error`).
    """

    code: Literal["task_failed", "timeout", "internal_error"]
    message: str


class Task(TypedDict):
    """A task. It has the same fields in every state. Fields without a value are null.

    `progress` is a percentage, 100 only if the task is completed. `result` is set if it
    is completed, and `error` if it has failed. Times are in UTC (RFC 3339). A finished
    task is removed soon after `expires_at`, unless the server's clock is changed.
    """

    task_id: str
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


# === Settings =========================================================================

# Seconds are limited to about 32 years, so that `expires_at` is always a valid date.
Count = Annotated[int, Field(ge=1, le=1_000_000_000)]
Seconds = Annotated[float, Field(ge=0.1, le=1_000_000_000)]


class Settings(BaseModel, frozen=True, extra="forbid"):
    """The settings, for example `Settings(workers=2)`. Durations are in seconds."""

    workers: Annotated[int, Field(ge=1, le=1000)] = 5
    # Tasks that wait for a worker.
    queue_size: Count = 100
    # Tasks in memory, finished ones included.
    max_tasks: Count = 10_000
    # Requests under /tasks that a client address can send in `rate_window`.
    rate_limit: Count = 10
    rate_window: Seconds = 60
    # How long `?wait=true` waits for a change.
    long_poll: Seconds = 10
    # How long a finished task can be read, and how often the timer removes old tasks.
    retention: Seconds = 600
    cleanup_interval: Seconds = 30
    task_timeout: Seconds = 60
    # Waiting this long outweighs one level of priority.
    priority_step: Seconds = 30
    max_body: Count = 65_536  # bytes


def read_settings() -> Settings:
    """Return the settings from the environment, or exit and name the invalid ones.

    `workers` is TASKS_WORKERS. Other variables, such as TASKS_PORT, are ignored.
    """
    names = {f"TASKS_{name.upper()}": name for name in Settings.model_fields}
    values = {names[key]: value for key, value in environ.items() if key in names}
    try:
        return Settings.model_validate(values)
    except ValidationError as exc:
        raise SystemExit(str(exc)) from None


# === Errors ===========================================================================


class ManagerError(Exception):
    """The manager cannot do what it is asked to do. The API responds with an error."""


class TaskNotFoundError(ManagerError):
    """There is no task with this id, or it has been removed (404)."""


class TaskFinishedError(ManagerError):
    """The task cannot be cancelled, because it has completed or failed (409)."""


class UnavailableError(ManagerError):
    """There are too many tasks, or no workers are running (503)."""


class TaskFailedError(Exception):
    """Work raises this to make its task fail. Clients can read the message."""


# === Work =============================================================================
# Replace this section with your own work. For a new task type, add a `case` here, and
# extend the models, `Submission` and `EXAMPLES` under "Models".

Report = Callable[[float], None]
Execute = Callable[[str, Parameters, Report], Awaitable[Any]]


async def execute(task_type: str, parameters: Parameters, report: Report) -> Any:
    """Do the work of a task and return its result, which must have a JSON form.

    Call `report` with the progress in percent. Raise TaskFailedError if the work cannot
    be done. If the task is cancelled or takes too long, CancelledError is raised at the
    current `await`: clean up in a `finally`. Never block the event loop, because
    everything else would have to wait: call `await asyncio.to_thread(function, ...)`.
    Its thread cannot be stopped, and must not call `report`, which is not thread-safe.
    """
    match task_type:
        case "compute_sum":
            await simulate(5, report)
            return sum(parameters["numbers"])
        case "generate_report":
            sections = parameters["sections"]
            await simulate(5 * sections, report)
            return f"{parameters['title']}\n{sections} sections"
        case "simulate_failure":
            await simulate(5, report)
            raise TaskFailedError(parameters["message"])
        case _:
            # Without this, a type without a `case` would complete with the result None.
            raise NotImplementedError(f"no work for task type {task_type!r}")


async def simulate(seconds: float, report: Report) -> None:
    """Sleep in ten steps, and report the progress before each of them."""
    for percent in range(0, 100, 10):
        report(percent)
        await asyncio.sleep(seconds / 10)


# === Rate limiter =====================================================================
# A sliding window: for each client, a deque holds the times at which its requests leave
# the window, `window` seconds after they arrive. New times are appended on the right,
# old ones are removed on the left, and a deque is fast at both ends. A counter that is
# reset every minute would be wrong:
#
#     11:59:59  client:  sends 10 requests, which count for the first minute
#     12:00:00  limiter: resets the counter
#     12:00:01  client:  sends 10 requests     <-- 20 requests in two seconds


def loop_time() -> float:
    """Return the time in seconds of the event loop's clock, which never jumps."""
    return asyncio.get_running_loop().time()


class RateLimiter:
    """Allows each client `limit` requests in any `window` seconds."""

    def __init__(self, limit: int, window: float) -> None:
        self._limit = limit
        self._window = window
        # By client: the times at which requests leave the window.
        self._leaving: dict[str, deque[float]] = {}
        # Only one coroutine at a time can be inside `async with self._lock`. The
        # methods have no `await` inside, so they are atomic even without it. They need
        # it as soon as they await something, such as a database. Without the lock:
        #
        #     request 1: counts 9 requests, awaits the database
        #     request 2: counts 9 requests, awaits the database
        #     both:      add their own time                 <-- 11 requests are accepted
        self._lock = asyncio.Lock()

    async def hit(self, client: str) -> int:
        """Count a request and return 0, or refuse it and return the seconds to wait."""
        async with self._lock:
            now = loop_time()
            times = self._leaving.setdefault(client, deque())
            while times and times[0] <= now:
                times.popleft()
            if len(times) >= self._limit:
                # Round up. After a shorter wait, the request would be refused again.
                return math.ceil(times[0] - now)
            times.append(now + self._window)
            return 0

    async def sweep(self) -> None:
        """Forget the clients that have no request in the window."""
        async with self._lock:
            now = loop_time()
            for client, times in list(self._leaving.items()):
                if times[-1] <= now:  # `hit` never leaves a deque empty
                    del self._leaving[client]


# === Task queue =======================================================================
# If a free worker always took a high-priority task first, a low-priority task would
# starve while high-priority tasks come in faster than they are finished. So each task
# has a rank, which is the time of its submission plus a handicap of 30 s for `normal`
# or 60 s for `low` (with a `priority_step` of 30). The task with the lowest rank is
# next, so only tasks of the next 60 s can overtake a low-priority task:
#
#     second 0   A is submitted, low:  rank 60
#     second 59  B is submitted, high: rank 59, so it overtakes A
#     second 61  C is submitted, high: rank 61, so it does not

LEVELS: dict[Priority, int] = {"high": 0, "normal": 1, "low": 2}

# A rank, an ascending number, and the id of a task. Tuples are compared from left to
# right, so tasks with the same rank run in the order of their submission.
Entry = tuple[float, int, str]


class TaskQueue(asyncio.PriorityQueue[Entry]):
    """A bounded queue that returns the smallest entry first, and can remove any."""

    def remove(self, task_id: str) -> None:
        """Remove the entry of a cancelled task.

        If it stayed in the queue while all workers are busy:

            clients: submit 100 tasks and cancel all of them
            client:  submits another task
            server:  responds with 503, the queue is full   <-- only cancelled tasks
        """
        # asyncio has no method for this. Take all entries out and put the others back.
        entries = [self.get_nowait() for _ in range(self.qsize())]
        for entry in entries:
            if entry[2] != task_id:
                self.put_nowait(entry)


# === Task manager =====================================================================
# No lock is needed here, because there is no `await` in the middle of a change.

INTERNAL: TaskError = {"code": "internal_error", "message": "An internal error occurred."}
TIMEOUT: TaskError = {"code": "timeout", "message": "The task took too long."}


def timestamp(seconds: float) -> str:
    """Convert a time of the wall clock to RFC 3339, in UTC with six decimal places."""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def json_copy(value: Any) -> Any:
    """Return a plain JSON copy of a value, or raise an exception if there is none.

    Results are stored as such copies, because a result that is not JSON would break
    every list. `dumps` refuses NaN, `from_json` lone surrogates and over 200 levels.
    """
    return from_json(json.dumps(value, allow_nan=False))


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


class TaskManager:
    """Stores the tasks, and processes them while `run` is running. Not thread-safe."""

    def __init__(self, settings: Settings, execute: Execute) -> None:
        self._settings = settings
        self._execute = execute
        # All tasks by id, in the order of their submission.
        self._tasks: dict[str, Task] = {}
        # The tasks that wait for a worker, and a counter that numbers them.
        self._queue = TaskQueue(settings.queue_size)
        self._numbers = itertools.count()
        # The work of the tasks that have a worker.
        self._running: dict[str, asyncio.Task[None]] = {}
        # By task id: the Event that clients wait for.
        self._changes: dict[str, asyncio.Event] = {}
        # Expiry times of final tasks, in order, because all have the same retention.
        self._expiring: deque[tuple[float, str]] = deque()
        # True while the workers run and no shutdown has begun.
        self._open = False

    def submit(self, task_type: str, parameters: Parameters, priority: Priority) -> Task:
        """Queue a new task and return it, or raise UnavailableError."""
        # There is no `await` between the first check and the last change. So the queue
        # still has room, and no worker takes the entry before the task is in the dict.
        self._check_open()
        if len(self._tasks) >= self._settings.max_tasks:
            raise UnavailableError("There are too many tasks.")
        if self._queue.full():
            raise UnavailableError("The queue is full.")
        task = new_task(task_type, parameters, priority)
        task_id = task["task_id"]
        rank = loop_time() + LEVELS[priority] * self._settings.priority_step
        self._queue.put_nowait((rank, next(self._numbers), task_id))
        self._tasks[task_id] = task
        log.info("task %s queued", task_id)
        return task

    def get(self, task_id: str) -> Task:
        """Return a task, or raise TaskNotFoundError."""
        if task_id not in self._tasks:
            raise TaskNotFoundError("There is no such task. It may have expired.")
        return self._tasks[task_id]

    async def wait(self, task_id: str) -> Task:
        """Return a task after its next change, or raise TaskNotFoundError.

        Does not wait if the status is final or the server is shutting down, and waits
        at most `long_poll` seconds. There is no `await` between reading the status and
        registering an Event. With an `await`:

            client: reads "processing", awaits something
            work:   ends; `_set_status` finds no Event to set
            client: registers an Event and waits   <-- although the task has finished

        An Event stays set (fact 4). So `_set_status` sets it and removes it, and the
        next poll registers a new one. It would be wrong to keep it and clear it: before
        Python 3.12, `wait_for` starts a new asyncio task that waits. If that starts
        after `set` and `clear`, it misses the change.
        """
        task = self.get(task_id)
        if task["status"] in FINAL or not self._open:
            return task
        change = self._changes.setdefault(task_id, asyncio.Event())
        with suppress(asyncio.TimeoutError):  # the built-in TimeoutError since 3.11
            await asyncio.wait_for(change.wait(), self._settings.long_poll)
        return task

    def iterate(self, status: Status | None = None) -> Iterator[Task]:
        """Return an iterator over all tasks, or those with a status, the newest first.

        It iterates over a list of the tasks (so clients see their latest status),
        because the dict can change while the caller awaits something. Without the list:

            server: sends some tasks of a list, awaits a slow client
            client: submits a task, which is added to the dict
            server: RuntimeError, dictionary changed size   <-- half a response
        """
        tasks = list(reversed(self._tasks.values()))
        return (task for task in tasks if status is None or task["status"] == status)

    def cancel(self, task_id: str) -> Task:
        """Cancel a task and return it, or raise TaskNotFoundError or TaskFinishedError."""
        task = self.get(task_id)
        if task["status"] in ("completed", "failed"):  # cancelling twice is fine
            raise TaskFinishedError(f"The task has already {task['status']}.")
        if task["status"] == "queued":
            self._queue.remove(task_id)
        self._stop(task, "cancelled")
        return task

    def count_tasks(self) -> dict[Status, int]:
        """Return the number of tasks by status, or raise UnavailableError."""
        self._check_open()
        counts = dict.fromkeys(TRANSITIONS, 0)
        for task in self._tasks.values():
            counts[task["status"]] += 1
        return counts

    def _check_open(self) -> None:
        if not self._open:
            raise UnavailableError("The server does not accept tasks at the moment.")

    def _set_status(
        self, task: Task, status: Status, result: Any = None, error: TaskError | None = None
    ) -> None:
        """Change a task's status and dependent fields, and wake waiting clients.

        This is the only place where a status changes. A change that the state diagram
        does not allow is ignored, so a final status stays. Without this check:

            client: sends DELETE; the response says "cancelled"
            work:   gets a CancelledError; its clean-up raises another exception
            server: sets the status "failed"          <-- the response was wrong
        """
        if status not in TRANSITIONS[task["status"]]:
            return
        task_id = task["task_id"]
        task["status"] = status
        task["result"] = result
        task["error"] = error
        if status == "completed":
            task["progress"] = 100
        now = time.time()
        if status in FINAL:
            # Clients see the wall clock. The deadline uses a clock that never jumps.
            task["finished_at"] = timestamp(now)
            task["expires_at"] = timestamp(now + self._settings.retention)
            self._expiring.append((loop_time() + self._settings.retention, task_id))
        else:
            task["started_at"] = timestamp(now)
        if task_id in self._changes:
            self._changes.pop(task_id).set()
        log.info("task %s %s", task_id, status)

    def _stop(self, task: Task, status: Status, error: TaskError | None = None) -> None:
        """Make a task final, then cancel its work."""
        if task["status"] in FINAL:
            return  # a second `cancel` would interrupt the work's clean-up
        self._set_status(task, status, error=error)
        if task["task_id"] in self._running:
            self._running[task["task_id"]].cancel()

    def _report(self, task: Task, percent: float) -> None:
        """Increase the progress of a task. Ignore late reports and impossible values."""
        if task["status"] != "processing":
            return
        # A task that is not completed yet has at most 99. NaN fails every comparison.
        if task["progress"] < percent <= 100:
            task["progress"] = min(int(percent), 99)

    def expire(self) -> None:
        """Remove the tasks that have expired."""
        now = loop_time()
        while self._expiring and self._expiring[0][0] <= now:
            _, task_id = self._expiring.popleft()
            del self._tasks[task_id]
            log.info("task %s expired", task_id)

    async def run(self) -> None:
        """Run the workers until cancelled. After that, all tasks are final.

        `gather` raises the exception of a worker that fails. Without `gather`:

            workers: fail one after the other, because of a bug in this class
            clients: submit tasks and poll them        <-- but no task is processed

        Restarting the workers would hide the bug. Instead, /health responds with 503.
        """
        # A queue belongs to one event loop, and an app can be started in another one.
        self._queue = TaskQueue(self._settings.queue_size)
        workers = [asyncio.create_task(self._worker()) for _ in range(self._settings.workers)]
        self._open = True
        try:
            await asyncio.gather(*workers)
        except Exception:
            log.critical("a worker failed, so all workers stop", exc_info=True)
        finally:
            # At a shutdown, `gather` has already cancelled the workers. After a
            # failure, the other workers still run.
            self.close()
            for task in self._tasks.values():
                self._stop(task, "cancelled")
            for worker in workers:
                worker.cancel()
            await self._wait_until_stopped([*workers, *self._running.values()])
            self._running.clear()

    def close(self) -> None:
        """Accept no more tasks, and wake all waiting clients."""
        self._open = False
        for change in self._changes.values():
            change.set()

    async def _worker(self) -> None:
        """Process tasks one at a time, until cancelled.

        The work is an asyncio task of its own, and `asyncio.wait` raises none of its
        exceptions. So no Exception in the work ends the worker, and a CancelledError
        here always means that the worker is cancelled. A worker that awaits the work
        directly cannot easily tell its own cancellation from that of the work:

            client: sends DELETE, which cancels the work
            worker: `await work` raises CancelledError; the worker catches it, goes on
            server: shuts down, which cancels the worker
            worker: `await work` raises CancelledError; the worker catches it, goes on
            server: waits for the worker                                 <-- forever
        """
        while True:
            _, _, task_id = await self._queue.get()
            # There is no `await` until the work is in `_running`. So `cancel` finds
            # each task either in the queue or in `_running`.
            task = self._tasks[task_id]
            self._set_status(task, "processing")
            work = asyncio.create_task(self._work(task))
            self._running[task_id] = work

            await asyncio.wait({work}, timeout=self._settings.task_timeout)
            if not work.done():
                self._stop(task, "failed", TIMEOUT)
                await self._wait_until_stopped([work])
                await asyncio.wait({work})  # so it keeps its worker until it ends
            del self._running[task_id]
            if task["status"] not in FINAL:
                # The work has cancelled itself, or raised a BaseException that `_work`
                # does not catch.
                exc = None if work.cancelled() else work.exception()
                log.error("task %s: its work ended unexpectedly", task_id, exc_info=exc)
                self._set_status(task, "failed", error=INTERNAL)

    async def _work(self, task: Task) -> None:
        """Do the work of a task, and store its outcome."""
        parameters = json_copy(task["parameters"])  # the work may change them
        report = partial(self._report, task)
        try:
            result = await self._execute(task["task_type"], parameters, report)
            result = json_copy(result)
        except asyncio.CancelledError:
            # Usually, `_stop` has made the task final before. Raise the exception again
            # (fact 3). Swallowed, it would break an `asyncio.timeout` around it.
            log.info("task %s: its work has stopped", task["task_id"])
            raise
        except TaskFailedError as exc:
            # A lone surrogate cannot be sent. It is replaced by a question mark.
            message = str(exc).encode(errors="replace").decode()
            error: TaskError = {"code": "task_failed", "message": message}
            self._set_status(task, "failed", error=error)
        except (Exception, SystemExit):
            # SystemExit, for example from `sys.exit()`, would end the event loop.
            log.exception("task %s: its work raised an exception", task["task_id"])
            self._set_status(task, "failed", error=INTERNAL)
        else:
            self._set_status(task, "completed", result=result)

    async def _wait_until_stopped(self, asyncio_tasks: list[asyncio.Task[None]]) -> None:
        """Wait up to 5 s for cancelled asyncio tasks, and log the work that still runs."""
        _, pending = await asyncio.wait(asyncio_tasks, timeout=5)
        for task_id, work in self._running.items():
            if work in pending:
                log.warning("task %s: its cancelled work still runs", task_id)


async def clean_up(manager: TaskManager, limiter: RateLimiter, interval: float) -> None:
    """Remove expired tasks and idle clients every `interval` seconds, until cancelled."""
    # Without this, `max_tasks` would be reached, and `submit` would refuse new tasks.
    while True:
        await asyncio.sleep(interval)
        try:
            manager.expire()
            await limiter.sweep()
        except Exception:
            # Without this, the first exception would end the timer.
            log.exception("the clean-up failed")


# === Models ===========================================================================
# The HTTP API begins here. pydantic checks requests with models. Responses are dicts.


class StrictModel(BaseModel, extra="forbid"):
    """A model that rejects unknown fields, so that a typo is not ignored."""


# `strict` refuses booleans and strings. Integers become floats.
SumNumber = Annotated[float, Field(strict=True, ge=-1e15, le=1e15)]
Text = Annotated[str, Field(min_length=1, max_length=200)]


class SumParameters(StrictModel):
    numbers: Annotated[list[SumNumber], Field(min_length=1, max_length=1000)]


class ReportParameters(StrictModel):
    title: Text
    sections: Annotated[int, Field(strict=True, ge=1, le=6)] = 3


class FailureParameters(StrictModel):
    message: Text = "simulated failure"


class BaseSubmission(StrictModel):
    priority: Priority = "normal"


class SumSubmission(BaseSubmission):
    task_type: Literal["compute_sum"]
    parameters: SumParameters


class ReportSubmission(BaseSubmission):
    task_type: Literal["generate_report"]
    parameters: ReportParameters


class FailureSubmission(BaseSubmission):
    task_type: Literal["simulate_failure"]
    parameters: FailureParameters = FailureParameters()


# An example of each task type, for /docs.
EXAMPLES: list[dict[str, Any]] = [
    {"task_type": "compute_sum", "parameters": {"numbers": [1, 2, 3.5]}},
    {"task_type": "generate_report", "parameters": {"title": "Figures", "sections": 2}},
    {"task_type": "simulate_failure", "parameters": {"message": "out of paper"}},
]

# The body of a submission. Its `task_type` decides which of the models it has to match.
Submission = Annotated[
    SumSubmission | ReportSubmission | FailureSubmission,
    Body(
        discriminator="task_type",
        openapi_examples={example["task_type"]: {"value": example} for example in EXAMPLES},
    ),
]


class Accepted(TypedDict):
    task_id: str
    status: Literal["queued"]


class Error(TypedDict):
    """Why a request failed. `errors` lists up to ten invalid fields (`loc`, `msg`)."""

    detail: str
    errors: NotRequired[list[dict[str, Any]]]


# === Middleware =======================================================================
# An ASGI application gets a description of the request (the scope), a function that
# receives the body in parts, and a function that sends the response. A middleware is an
# application that calls another one:
#
#     uvicorn -> RateLimitMiddleware -> BodyLimitMiddleware -> FastAPI -> a route
#
# The rate limit is not a dependency of the routes, because it counts all requests under
# /tasks, even if there is no route or the JSON is malformed. As a dependency:
#
#     client:  sends POST /tasks with malformed JSON
#     FastAPI: responds with 400 before it calls a dependency   <-- not counted


class RateLimitMiddleware:
    """Responds with 429 to a client that has sent too many requests under /tasks."""

    def __init__(self, app: ASGIApp, limiter: RateLimiter) -> None:
        self.app = app
        self.limiter = limiter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Behind a proxy or in a mount, the path is, for example, /api/tasks.
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or not path.startswith("/tasks"):
            await self.app(scope, receive, send)
            return
        # The client's address, from X-Forwarded-For if uvicorn trusts the proxy. A Unix
        # socket has none, so all its clients share a limit.
        host, _ = scope.get("client") or ("", 0)
        seconds = await self.limiter.hit(host)
        if seconds == 0:
            await self.app(scope, receive, send)
            return
        content = {"detail": f"Too many requests. Try again in {seconds} s."}
        response = JSONResponse(content, 429, {"Retry-After": str(seconds)})
        await response(scope, receive, send)


class BodyLimitMiddleware:
    """Responds with 413 to a large body, which FastAPI would keep in memory."""

    def __init__(self, app: ASGIApp, max_body: int) -> None:
        self.app = app
        self.max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A GET is not limited. StreamingResponse calls `receive` to notice a
        # disconnect, and an exception in `receive` would cut off the list.
        if scope["type"] != "http" or scope["method"] == "GET":
            await self.app(scope, receive, send)
            return
        size = 0

        async def limited_receive() -> Message:
            # Count the bytes, because a chunked body has no Content-Length. FastAPI
            # calls this function, and turns the HTTPException into a response.
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.max_body:
                raise HTTPException(413, f"The body is larger than {self.max_body} bytes.")
            return message

        await self.app(scope, limited_receive, send)


# === Routes ===========================================================================
# The routes translate requests into calls of the manager. All are `async`, because
# FastAPI calls a plain function in a thread, where code is not atomic (fact 1).

ERRORS = {
    400: "The request is invalid.",
    404: "There is no such task. It may have expired.",
    409: "The task has already completed or failed.",
    413: "The body is too large.",
    429: "Too many requests. `Retry-After` is the number of seconds to wait.",
    503: "The server does not accept tasks at the moment. See `Retry-After`.",
}


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the documentation of these error responses."""
    return {status: {"model": Error, "description": ERRORS[status]} for status in statuses}


def add_routes(app: FastAPI, manager: TaskManager) -> None:
    @app.post("/tasks", status_code=202, responses=error_responses(400, 413, 429, 503))
    async def submit_task(body: Submission, request: Request, response: Response) -> Accepted:
        """Queue a task, and return its id. Poll the task to get its result."""
        task = manager.submit(body.task_type, body.parameters.model_dump(), body.priority)
        task_id = task["task_id"]
        root_path = request.scope.get("root_path", "")
        response.headers["Location"] = f"{root_path}/tasks/{task_id}"
        return {"task_id": task_id, "status": "queued"}

    @app.get("/tasks", response_model=list[Task], responses=error_responses(400, 429))
    async def list_tasks(status: Status | None = None, limit: Count | None = None) -> Response:
        """Return the tasks as a JSON array, the newest first."""
        tasks = itertools.islice(manager.iterate(status), limit)
        return StreamingResponse(stream_tasks(tasks), media_type="application/json")

    @app.get("/tasks/{task_id}", responses=error_responses(400, 404, 429))
    async def get_task(task_id: UUID, wait: bool = False) -> Task:
        """Return a task. With `wait=true`, wait some seconds for its status to change."""
        if wait:
            return await manager.wait(str(task_id))
        return manager.get(str(task_id))

    @app.delete("/tasks/{task_id}", responses=error_responses(400, 404, 409, 429))
    async def cancel_task(task_id: UUID) -> Task:
        """Cancel a task and return it. A task can be cancelled more than once."""
        return manager.cancel(str(task_id))

    @app.head("/health", include_in_schema=False)
    @app.get("/health", responses=error_responses(503))
    async def get_health() -> dict[Status, int]:
        """Return the number of tasks by status. This request is not limited."""
        return manager.count_tasks()

    @app.get("/", include_in_schema=False)
    async def redirect_to_docs(request: Request) -> RedirectResponse:
        return RedirectResponse(request.scope.get("root_path", "") + "/docs")


async def stream_tasks(tasks: Iterator[Task]) -> AsyncIterator[bytes]:
    """Yield tasks as a JSON array, with one task on each line."""
    yield b"["
    separator = b"\n"
    # 100 tasks at a time, because sending each of them alone would be slow.
    batch = list(itertools.islice(tasks, 100))
    while batch:
        yield separator + b",\n".join(to_json(task) for task in batch)
        separator = b",\n"
        # Let others run. The `yield` does not, if the client reads fast.
        await asyncio.sleep(0)
        batch = list(itertools.islice(tasks, 100))
    yield b"\n]\n"


async def handle_error(_: Request, exc: Exception) -> JSONResponse:
    """Return the response for an exception that a request has raised."""
    match exc:
        case RequestValidationError():
            # FastAPI's own handler repeats the `input`. If that is NaN or a lone
            # surrogate, it cannot be sent, and the response is a 500.
            errors = []
            for error in exc.errors()[:10]:
                errors.append({"loc": error["loc"], "msg": error["msg"]})
            return JSONResponse({"detail": "The request is invalid.", "errors": errors}, 400)
        case TaskNotFoundError():
            return JSONResponse({"detail": str(exc)}, 404)
        case TaskFinishedError():
            return JSONResponse({"detail": str(exc)}, 409)
        case _:  # UnavailableError
            return JSONResponse({"detail": str(exc)}, 503, {"Retry-After": "10"})


# === App ==============================================================================


@asynccontextmanager
async def in_background(coroutine: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run a coroutine as an asyncio task while the body of `async with` runs."""
    asyncio_task = asyncio.create_task(coroutine)
    try:
        # Let it start. Otherwise, `cancel` might skip its `finally` (fact 3), and the
        # first request might come before `run` accepts tasks.
        await asyncio.sleep(0)
        yield
    finally:
        asyncio_task.cancel()
        # `wait`, because `await asyncio_task` would raise its CancelledError here.
        await asyncio.wait({asyncio_task})


@asynccontextmanager
async def on_signal(signum: int, callback: Callable[[], None]) -> AsyncIterator[None]:
    """When a signal is received, schedule `callback`, then call the former handler."""
    former = signal.getsignal(signum)
    # Only the main thread can set a handler, and SIG_DFL and SIG_IGN cannot be called.
    if threading.current_thread() is not threading.main_thread() or not callable(former):
        yield
        return
    loop = asyncio.get_running_loop()

    def handle(*args: Any) -> None:
        # A signal handler can run in the middle of code that is otherwise atomic, so
        # the callback is not called here, but soon after.
        if not loop.is_closed():
            loop.call_soon_threadsafe(callback)
        former(*args)

    signal.signal(signum, handle)
    try:
        yield
    finally:
        signal.signal(signum, former)


def create_app(settings: Settings | None = None, execute: Execute = execute) -> FastAPI:
    """Return a new app. By default, the settings come from the environment."""
    settings = settings or read_settings()
    manager = TaskManager(settings, execute)
    limiter = RateLimiter(settings.rate_limit, settings.rate_window)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # A shutdown has three steps:
        # 1. A signal calls `close`, which ends the long polls. Otherwise, step 2 would
        #    wait for them, for up to `long_poll` seconds.
        # 2. uvicorn waits for the open responses, then leaves this block. Otherwise,
        #    these responses could show their tasks as cancelled.
        # 3. The timer ends, then `run`, which cancels the tasks and waits for them.
        #    Otherwise, the process could end in the middle of their clean-up.
        async with (
            in_background(manager.run()),
            in_background(clean_up(manager, limiter, settings.cleanup_interval)),
            on_signal(signal.SIGINT, manager.close),
            on_signal(signal.SIGTERM, manager.close),
        ):
            yield

    app = FastAPI(
        title="Task manager",
        lifespan=lifespan,
        # FastAPI documents a 422, which never happens, unless there is a `default`.
        responses={"default": {"model": Error, "description": "Any other error."}},
        generate_unique_id_function=lambda route: route.name,  # for generated clients
    )
    app.state.manager = manager  # for tests
    app.add_exception_handler(RequestValidationError, handle_error)
    app.add_exception_handler(ManagerError, handle_error)
    add_routes(app, manager)
    # The middleware that is added last is called first.
    app.add_middleware(BodyLimitMiddleware, max_body=settings.max_body)
    app.add_middleware(RateLimitMiddleware, limiter=limiter)
    return app


app = create_app()
