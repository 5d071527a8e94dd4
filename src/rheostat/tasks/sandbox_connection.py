"""The caller's side of the sandbox's processes: start them, talk with them, and see them end.

One *launcher* per Python process, started with the first sandbox, has the interpreter and the common modules loaded
and forks the sandbox of each program: that takes a tenth of the time that starting Python does.
"""

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from rheostat.errors import RheostatError

_PATIENCE_S = 30.0  # to start, to answer beyond a run's wall time, and to end: generous, for machines under load
_SOURCES = str(Path(__file__).parents[2])
_START = "import sys; sys.path.insert(0, sys.argv[1]); from rheostat.tasks.sandbox_child import main; main()()"


class _Launcher:
    """The process that forks sandboxes; it ends when this process does."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._line: socket.socket | None = None
        atexit.register(self.stop)

    def connect(self) -> socket.socket:
        """A connection to a new sandbox."""
        ours, theirs = socket.socketpair()
        with theirs, self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            assert self._line is not None
            socket.send_fds(self._line, [b"+"], [theirs.fileno()])
        return ours

    def _start(self) -> None:
        if self._line is not None:
            self._line.close()
        self._line, theirs = socket.socketpair()
        python = str(Path(sys.executable).resolve())  # no virtual environment's: the sandbox holds no other packages
        with theirs:
            self._process = subprocess.Popen(
                [python, "-s", "-P", "-S", "-X", "utf8", "-c", _START, _SOURCES],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={"PYTHONHASHSEED": "0"},
                cwd="/",
                start_new_session=True,
            )

    def stop(self) -> None:
        with self._lock:
            if self._line is not None and self._process is not None:
                self._line.close()
                self._process.kill()
                self._process.wait()
            self._process = self._line = None


_launcher = _Launcher()


class Connection:
    """One sandbox: requests, and a reply to each.

    Raises:
        RheostatError: from every method, when the sandbox fails.
    """

    def __init__(self, line: socket.socket, wall_seconds: float) -> None:
        line.settimeout(wall_seconds + _PATIENCE_S)
        self._line, self._replies = line, line.makefile("rb")
        self._process: int | None = None

    def start(self, **settings: object) -> None:
        """Build the sandbox; to be asked first."""
        pid = self.ask(**settings)["pid"]
        if settings["isolated"]:
            self._process = os.pidfd_open(pid)

    def ask(self, **request: object) -> dict[str, Any]:
        try:
            self._line.sendall(json.dumps(request).encode() + b"\n")
            reply = self._replies.readline()
        except OSError as error:
            raise RheostatError(f"the sandbox does not answer ({error or type(error).__name__}); try again") from error
        if not reply:
            raise RheostatError("the sandbox ended unexpectedly; try again, with less memory in use on this machine")
        answer: dict[str, Any] = json.loads(reply)
        if "failed" in answer:
            raise RheostatError(f"the sandbox does not start: {answer['failed']}")
        return answer

    def end(self) -> None:
        """End the sandbox with all its processes; returns when they are gone."""
        with suppress(OSError):
            self._line.shutdown(socket.SHUT_WR)
        if self._process is None:
            self._line.settimeout(_PATIENCE_S)
            with suppress(OSError):
                while self._replies.read(1 << 16):
                    pass
            return
        gone = select.poll()
        gone.register(self._process, select.POLLIN)
        if not gone.poll(_PATIENCE_S * 1000):
            signal.pidfd_send_signal(self._process, signal.SIGKILL)  # takes process 1 along
        os.close(self._process)


@contextmanager
def connected(limits: dict[str, Any], isolated: bool) -> Iterator[Connection]:
    """A sandbox, ready for requests; nothing of it is left afterwards.

    Raises:
        RheostatError: it does not start.
    """
    directory = nullcontext("") if isolated else tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    with directory as path:
        try:
            line = _launcher.connect()
        except OSError as error:
            raise RheostatError(f"the sandbox does not start: {error}") from error
        with line:
            connection = Connection(line, limits["wall_seconds"])
            try:
                connection.start(**limits, directory=path, isolated=isolated)
                yield connection
            finally:
                connection.end()
