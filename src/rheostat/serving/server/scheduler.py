"""The thread that owns the engine, and how the event loop talks to it."""

import asyncio
import math
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Sequence

from rheostat.engines.jobs import Failed, Job, ServedEngine, Written
from rheostat.errors import RheostatError
from rheostat.serving.server import limits
from rheostat.serving.server.errors import ApiError, internal
from rheostat.serving.server.metrics import Metrics


def shutting_down() -> ApiError:
    headers = {"Retry-After": "5", "Connection": "close"}
    return ApiError(503, "the server is shutting down", code="shutting_down", headers=headers)


class Ticket:
    """The jobs of one HTTP request, and the queue on which their tokens arrive. It belongs to one event loop."""

    def __init__(self, scheduler: "Scheduler", jobs: Sequence[Job]) -> None:
        self.jobs = jobs
        self.loop = asyncio.get_running_loop()
        self.started = time.perf_counter()
        self.samples = sum(job.samples for job in jobs)
        self.left = self.samples  # the scheduler's count
        self.is_cancelled = False
        self._scheduler = scheduler
        self._queue: asyncio.Queue[Sequence[Written | Failed]] = asyncio.Queue()

    def put(self, events: Sequence[Written | Failed]) -> None:
        """Called in the event loop."""
        self._queue.put_nowait(events)

    def cancel(self) -> None:
        """The client is gone: its rows leave at the next step, and :meth:`events` ends. Called in the event loop."""
        if not self.is_cancelled:
            self.is_cancelled = True
            self._scheduler.cancel(self)
            self._queue.put_nowait(())

    async def events(self) -> AsyncIterator[Written]:
        """Every token as it is written, until all samples are complete or the ticket is cancelled.

        Raises:
            ApiError: a job failed.
        """
        left = self.samples
        while left and not self.is_cancelled:
            for event in await self._queue.get():
                if isinstance(event, Failed):
                    raise _api_error(event.error)
                left -= event.completion is not None
                yield event


def _api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RheostatError):
        return ApiError(500, "the adapter failed on this request", code="adapter_failed")
    return internal()


class Scheduler:
    """Runs a batch of the engine's (:class:`rheostat.engines.jobs.Batch`) in a thread of its own.

    Args:
        engine: used by this thread only, but for tokenising.
        rows: completions that run at a time.
        waiting: completions that may wait.
        metrics: counted here.
    """

    def __init__(
        self, engine: ServedEngine, metrics: Metrics, rows: int = limits.ROWS, waiting: int = limits.WAITING
    ) -> None:
        self.metrics = metrics
        self._batch = engine.open_batch(rows)
        self._most_waiting = waiting
        self._wake = threading.Condition()
        self._arrived: deque[Ticket] = deque()
        self._tickets: dict[Job, Ticket] = {}
        self._is_stopping = self._is_closed = False
        self._seconds_each = 1.0  # between two completions, lately
        self._last_done = time.perf_counter()
        metrics.watch(lambda: self.running, lambda: self.waiting)
        self._thread = threading.Thread(target=self._run, name="rheostat-engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        return self._batch.running

    @property
    def waiting(self) -> int:
        jobs = tuple(self._tickets)
        return sum(job.samples - job.admitted for job in jobs if not job.cancelled)

    def submit(self, jobs: Sequence[Job]) -> Ticket:
        """Queue the jobs of one request, all or none. Called in the event loop.

        Raises:
            ApiError: 429, the queue is full; 503, the server is shutting down.
        """
        ticket = Ticket(self, jobs)
        with self._wake:
            if self._is_stopping:
                raise shutting_down()
            waiting = self.waiting
            if waiting and waiting + ticket.left > self._most_waiting:
                seconds = min(60, max(1, math.ceil(waiting * self._seconds_each)))
                raise ApiError(
                    429,
                    f"{waiting} completions are waiting already: try again in {seconds} s",
                    code="queue_full",
                    headers={"Retry-After": str(seconds)},
                )
            self._arrived.append(ticket)
            self._tickets.update(dict.fromkeys(jobs, ticket))
            self._wake.notify()
        self.metrics.prompt_tokens.inc(sum(len(job.token_ids) for job in jobs))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """The ticket's rows leave at the next step."""
        with self._wake:
            for job in ticket.jobs:
                job.cancelled = True
                if self._tickets.pop(job, None) is not None:
                    self.metrics.cancelled.inc()
            self._wake.notify()

    def stop(self) -> None:
        """Take nothing new; what was accepted goes on."""
        self._is_stopping = True

    def close(self, seconds: float = 10.0) -> None:
        """End what still runs, and the thread."""
        with self._wake:
            self._is_stopping = self._is_closed = True
            self._wake.notify()
        self._thread.join(seconds)

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._arrived or self._batch.running or self._batch.waiting or self._is_closed):
                    self._wake.wait()
                if self._is_closed:
                    break
                self._take()
            self._deliver(self._step())
        self._batch.clear()
        self._deliver([Failed(job, shutting_down()) for job in tuple(self._tickets)])

    def _take(self) -> None:
        while self._arrived:
            for job in self._arrived.popleft().jobs:
                self._batch.add(job)

    def _step(self) -> Sequence[Written | Failed]:
        start = time.perf_counter()
        try:
            return self._batch.step()
        except Exception as error:
            traceback.print_exc()  # for the server's log; the clients are told that it failed
            self._batch.clear()
            return [Failed(job, error) for job in tuple(self._tickets)]
        finally:
            self.metrics.step.observe(time.perf_counter() - start)

    def _deliver(self, events: Sequence[Written | Failed]) -> None:
        """Hand each event to its ticket, with one call into each event loop."""
        now = time.perf_counter()
        by_loop: dict[asyncio.AbstractEventLoop, dict[Ticket, list[Written | Failed]]] = {}
        for event in events:
            ticket = self._tickets.get(event.job)
            if ticket is None:
                continue
            by_loop.setdefault(ticket.loop, {}).setdefault(ticket, []).append(event)
            if isinstance(event, Failed):
                self._tickets.pop(event.job, None)
                continue
            if ticket.started:
                self.metrics.first_token.observe(now - ticket.started)
                ticket.started = 0.0
            if event.completion is not None:
                self._done(ticket, event.job, now)
        self.metrics.tokens.inc(sum(isinstance(event, Written) for event in events))
        for loop, parts in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put, parts)
            except RuntimeError:  # the loop is closed: nobody is there to read
                for ticket in parts:
                    self.cancel(ticket)

    def _done(self, ticket: Ticket, job: Job, now: float) -> None:
        self._seconds_each += 0.1 * (min(now - self._last_done, 60.0) - self._seconds_each)
        self._last_done = now
        ticket.left -= 1
        if not ticket.left:
            for own in ticket.jobs:
                self._tickets.pop(own, None)


def _put(parts: dict[Ticket, list[Written | Failed]]) -> None:
    for ticket, events in parts.items():
        ticket.put(events)
