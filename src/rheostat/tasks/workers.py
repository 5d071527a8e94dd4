"""A pool of worker processes that can be killed: verifiers hang, crash and eat memory, and only a process can be ended.

The workers are plain subprocesses that speak JSON lines over pipes, not multiprocessing: that works from threads,
asyncio, daemonic processes and scripts without a main guard, and imports nobody's ``__main__`` again. They guard
against accidents, not against malice: a worker has the rights of its parent.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, LifoQueue
from threading import Lock
from typing import Any, Self

from rheostat.errors import RheostatError

_PROGRAM = Path(__file__).with_name("worker.py")
_START = 120.0  # seconds for the imports of a worker, on a machine that has other things to do


class CallFailed(RheostatError):
    """The function gave no answer: this call broke it, the infrastructure is sound."""


class Hung(CallFailed):
    """The call took longer than the pool's timeout; its worker was killed."""


class Crashed(CallFailed):
    """The call ended its worker, and a fresh one once more."""


@dataclass(frozen=True, slots=True)
class Raised:
    """What the function raised: the name of the exception's class, and its message."""

    type: str
    message: str


class _Ended(Exception):
    """The worker's end of the pipes is closed."""


class _Late(Exception):
    """The deadline has passed."""


class _Worker:
    """One process, used by one thread at a time."""

    def __init__(self) -> None:
        # Python's hash seed shapes the order in which sympy rewrites: one seed, one verdict
        environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONHASHSEED": "0"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=environment,
            process_group=0,  # Ctrl-C is the parent's; and what a worker starts can be killed with it
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout
        os.set_blocking(self._requests.fileno(), False)

    def ask(self, request: object, seconds: float) -> dict[str, Any]:
        """The reply to a request.

        Raises:
            _Ended: the process ended first.
            _Late: the reply took longer than ``seconds``.
        """
        deadline = time.monotonic() + seconds
        unsent = memoryview(json.dumps(request).encode() + b"\n")
        received = bytearray()
        ready = select.poll()  # select.select refuses descriptors above 1023
        ready.register(self._replies, select.POLLIN)
        ready.register(self._requests, select.POLLOUT)
        while not received.endswith(b"\n"):
            events = dict(ready.poll(max(0.0, deadline - time.monotonic()) * 1000))
            if self._requests.fileno() in events:
                unsent = unsent[self._send(unsent) :]
                if not unsent:
                    ready.unregister(self._requests)
            if self._replies.fileno() in events:
                received += self._receive()
            if not events:
                raise _Late
        reply: dict[str, Any] = json.loads(received)
        return reply

    def _send(self, data: memoryview) -> int:
        try:
            return self._requests.write(data) or 0
        except BrokenPipeError as error:
            raise _Ended from error

    def _receive(self) -> bytes:
        data: bytes = self._replies.read(1 << 20)
        if not data:
            raise _Ended
        return data

    def kill(self) -> None:
        """Ends the process and what it started; waits until it is gone."""
        if self._process.returncode is None:  # not yet waited for: the number still belongs to it
            with suppress(ProcessLookupError, PermissionError):  # another thread was faster
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()  # where the group could not be signalled, nobody waits for ever
            self._process.wait()

    def forget(self) -> None:
        """Closes this end of the pipes."""
        self._requests.close()
        self._replies.close()


class WorkerPool:
    """Calls one function in worker processes, with a time limit and a memory limit; for any number of threads.

    Workers start when they are first needed. They end with ``close``, the ``with`` block, the interpreter, or, should
    that be killed, as soon as their call is over. A child made by ``os.fork`` starts workers of its own.

    Args:
        target: ``package.module:function`` or ``path/to/file.py:function``. Takes and returns JSON values; what it
            prints goes to the standard error stream.
        timeout: seconds that one call may take, above 0; imports do not count.
        workers: how many processes at most, from 1; default: one for each core that this process may use.
        memory: bytes of address space that a worker may take beyond its imports (on Linux).
    """

    def __init__(self, target: str, timeout: float, workers: int | None = None, memory: int = 2 << 30) -> None:
        self.target, self.timeout = target, timeout
        self._workers = workers or _cores()
        self._memory = memory
        self._begin()
        os.register_at_fork(after_in_child=_reset(weakref.WeakMethod(self._after_fork)))

    def _begin(self) -> None:
        self._lock = Lock()
        self._closed = False
        self._running: set[_Worker] = set()
        self._idle: LifoQueue[_Worker | None] = LifoQueue()  # None: a worker that may be started
        for _ in range(self._workers):
            self._idle.put(None)
        self._end = weakref.finalize(self, _end_all, self._running, self._idle)

    def _after_fork(self) -> None:
        """The parent's workers are not the child's: neither its pipes, nor its business to kill."""
        self._end.detach()
        for worker in self._running:
            worker.forget()
        self._begin()

    def call(self, *args: object) -> object:
        """The function's value, or what it raised; waits for a free worker first.

        Raises:
            Hung: the call took longer than the timeout.
            Crashed: its process ended (a crash, out of memory), twice.
            RheostatError: the workers cannot start, or the pool is closed.
        """
        worker = self._idle.get()
        try:
            try:
                worker = worker or self._start()
                reply = worker.ask(args, self.timeout)
            except _Ended:
                self._drop(worker)
                worker = None
                worker = self._start()
                reply = worker.ask(args, self.timeout)
        except BaseException as error:  # even Ctrl-C leaves a worker in the middle of a call: it cannot go on
            self._drop(worker)
            worker = None
            if isinstance(error, _Late):
                raise Hung(f"{self.target} took longer than {self.timeout:g} s") from None
            if isinstance(error, _Ended):
                self._require_open()
                raise Crashed(f"{self.target} ended its process") from None
            raise
        finally:
            self._idle.put(worker)
        return Raised(*reply["raised"]) if "raised" in reply else reply["value"]

    def check(self) -> None:
        """Starts a worker, so that a target that cannot be called is refused before anything depends on it.

        Raises:
            RheostatError: as :meth:`call`.
        """
        worker = self._idle.get()
        try:
            worker = worker or self._start()
        finally:
            self._idle.put(worker)

    def _start(self) -> _Worker:
        with self._lock:
            self._require_open()
            try:
                worker = _Worker()
            except OSError as error:
                raise RheostatError(f"{self.target}: its worker process cannot start: {error}") from error
            self._running.add(worker)
        try:
            setup = {
                "target": self.target,
                "path": [*map(str, sys.path)],
                "timeout": self.timeout,
                "memory": self._memory,
            }
            failed = worker.ask(setup, _START).get("failed")
        except _Ended:
            failed = "its worker process ended at the import"
        except _Late:
            failed = f"its import took longer than {_START:g} s"
        except BaseException:
            self._drop(worker)
            raise
        if failed is not None:
            self._drop(worker)
            self._require_open()
            raise RheostatError(
                f"{self.target} cannot be called ({' '.join(str(failed).split())}); it must be package.module:function "
                "or path/to/file.py:function"
            )
        return worker

    def _drop(self, worker: _Worker | None) -> None:
        if worker is not None:
            with self._lock:
                self._running.discard(worker)
            worker.kill()
            worker.forget()

    def _require_open(self) -> None:
        if self._closed:
            raise RheostatError(f"the pool of workers for {self.target} is closed")

    def close(self) -> None:
        """Ends all workers; calls under way, and calls to come, raise ``RheostatError``."""
        with self._lock:
            self._closed = True
            self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _end_all(running: set[_Worker], idle: LifoQueue[_Worker | None]) -> None:
    for worker in list(running):
        worker.kill()
    for _ in range(idle.qsize()):
        with suppress(Empty):  # those that another thread takes, it forgets
            if (unused := idle.get_nowait()) is not None:
                unused.forget()
            idle.put(None)


def _reset(method: "weakref.WeakMethod[Callable[[], None]]") -> Callable[[], None]:
    def after_fork() -> None:
        if (reset := method()) is not None:
            reset()

    return after_fork


def _cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
