"""The program that runs inside the sandbox: process 1, and the processes that it forks for each run.

:mod:`rheostat.tasks.sandbox_connection` starts it as the launcher, which forks a sandbox for each socket that it is
sent; over that socket they talk, one JSON object per line each way. It needs the standard library only.

Process 1 runs no code of the judged program. It forks a process to compile it and then one for every run, watches
that process, kills whatever is left of it, and reads what it wrote from files without a name. A run gets its input and
output as files, so that nothing can block on a pipe, and no other descriptor.
"""

import builtins
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from rheostat.tasks import sandbox_isolation
from rheostat.tasks.sandbox_processes import Files, compile_program, run_program, run_tests, serve_program

_PAUSE_S, _LONGEST_PAUSE_S = 0.0005, 0.01
_SUPERVISION = 3  # processes of ours that may count against the program's number of processes

_HIGHEST_DESCRIPTOR = min(os.sysconf("SC_OPEN_MAX"), 1 << 16)

_COMMON_MODULES = (  # what programs often import: loaded once, for all of them
    *("array", "bisect", "collections", "copy", "datetime", "decimal", "fractions", "functools", "heapq", "io"),
    *("itertools", "math", "operator", "queue", "random", "re", "statistics", "string", "threading", "typing"),
)

Reply = dict[str, Any]
Body = Callable[[], None]


class _Become(Exception):
    """In a forked process: leave process 1's stack and do this instead."""

    def __init__(self, body: Body) -> None:
        self.body = body


def main() -> Body:
    """Fork a sandbox for each connection that standard input brings, until it closes; returns in forked processes
    only, with what they are to do."""
    sys.path.pop(0)  # what found this module
    for module in _COMMON_MODULES:
        importlib.import_module(module)
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]  # what the module `site` adds
    gc.freeze()
    with socket.socket(fileno=os.dup(0)) as line:
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        while True:
            _, received, _, _ = socket.recv_fds(line, 1, 1)
            if not received:
                os._exit(0)
            if os.fork() == 0:
                break
            os.close(received[0])
            while _reap({}, os.WNOHANG):
                pass
    return _sandbox(_Control(received[0]))


def _sandbox(control: "_Control") -> Body:
    """Become a sandbox: this process stays outside and waits, its child is the sandbox's process 1."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # process 1 is deaf to signals that it has no handler for
    limits, pid = control.read(), os.getpid()
    isolated = limits.pop("isolated")
    try:
        if isolated:
            sandbox_isolation.leave_host()
            if inside := os.fork():
                os._exit(os.waitstatus_to_exitcode(os.waitpid(inside, 0)[1]) & 255)
            sandbox_isolation.build_root()
    except OSError as error:
        control.write({"failed": error.strerror or str(error)})
        os._exit(1)
    control.write({"pid": pid})
    try:
        _Supervisor(control, limits, isolated).serve()
    except _Become as become:
        return become.body


class _Control:
    """The line to the parent. Plain descriptors: a file object would live on in forked processes."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._buffer = b""

    def read(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            chunk = os.read(self.descriptor, 1 << 16)
            if not chunk:  # the parent is done, or dead
                os._exit(0)
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\n", 1)
        return dict(json.loads(line))

    def write(self, reply: Reply) -> None:
        data = json.dumps(reply).encode() + b"\n"
        while data:
            data = data[os.write(self.descriptor, data) :]


class _Run(NamedTuple):
    """How the processes of one run ended: each one's wait status and CPU seconds, and what process 1 stopped it for."""

    first: int
    ended: dict[int, tuple[int, float]]
    stopped: str


class _Supervisor:
    """What process 1 does. ``served`` is the program whose functions are to be called: its process, its files, and
    the tests' end of the socket."""

    def __init__(self, control: _Control, limits: dict[str, Any], isolated: bool) -> None:
        self._control, self._limits, self._isolated = control, limits, isolated
        self._code = b""
        self._served: tuple[int, Files, int] | None = None

    def serve(self) -> NoReturn:
        actions: dict[str, Callable[..., Reply]] = {
            "compile": self._compile,
            "run": self._run,
            "load": self._load,
            "test": self._test,
        }
        while True:
            request = self._control.read()
            try:
                reply = actions[request.pop("do")](**request)
            except OSError as error:
                reply = {"failed": error.strerror or str(error)}
            self._control.write(reply)

    def _compile(self, program: str) -> Reply:
        files = Files()
        pid = self._fork(lambda: compile_program(program), files)
        reply = self._reply(self._watch(pid), files)
        self._code = files.read(1)
        files.close()
        return reply | {"output": ""}

    def _run(self, given: str) -> Reply:
        files = Files(given.encode(errors="surrogatepass"))
        pid = self._fork(lambda: run_program(self._code), files)
        reply = self._reply(self._watch(pid), files)
        files.close()
        return reply

    def _load(self) -> Reply:
        """Start the program before its tests are here: what it can see of this process's memory does not hold them."""
        files = Files()
        theirs, ours = (end.detach() for end in socket.socketpair())
        pid = self._fork(lambda: serve_program(self._code), files, keep=theirs)
        os.close(theirs)
        self._served = pid, files, ours
        return {}

    def _test(self, tests: str, entry_point: str) -> Reply:
        assert self._served is not None
        program, program_files, connection = self._served
        files = Files()
        pid = self._fork(lambda: run_tests(tests, entry_point), files, keep=connection)
        os.close(connection)
        run = self._watch(pid, program)
        reply = self._reply(run, files)
        status, cpu_s = run.ended.get(program, (0, 0.0))
        if reply["ending"] != "exited" and _exit_code(status) not in (0, -signal.SIGKILL):  # they failed for lack of it
            reply = self._reply(_Run(program, {program: (status, cpu_s)}, run.stopped), program_files)
        return reply | {"output": ""}

    def _fork(self, body: Body, files: Files, keep: int | None = None) -> int:
        """A new process that does ``body`` within the limits; ``keep`` becomes its only descriptor above 2."""
        trouble, tell = os.pipe()
        if pid := os.fork():
            os.close(tell)
            message = os.read(trouble, 1000)
            os.close(trouble)
            if message:
                raise OSError(0, message.decode())
            return pid
        try:
            self._confine()
        except (OSError, ValueError) as error:  # ours to fail: it must not look like a program that crashed
            os.write(tell, str(error).encode())
            os._exit(1)
        for number, descriptor in enumerate((*files.descriptors, *([] if keep is None else [keep]))):
            os.dup2(descriptor, number)
        os.closerange(3 if keep is None else 4, _HIGHEST_DESCRIPTOR)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
        sys.stdout = open(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        raise _Become(body)

    def _confine(self) -> None:
        limits = self._limits
        if self._isolated:
            sandbox_isolation.enter_work_directory(limits["directory_bytes"])
            sandbox_isolation.drop_privileges()
        else:
            os.setsid()
            os.chdir(limits["directory"])
        for name, soft, hard in (
            ("CPU", limits["cpu_seconds"], limits["cpu_seconds"] + 1),
            ("AS", limits["memory_bytes"], limits["memory_bytes"]),
            ("NPROC", limits["processes"] + _SUPERVISION, limits["processes"] + _SUPERVISION),
            ("NOFILE", limits["open_files"], limits["open_files"]),
            ("FSIZE", limits["file_bytes"], limits["file_bytes"]),
            ("CORE", 0, 0),
        ):
            try:
                resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (soft, hard))
            except (OSError, ValueError):  # macOS has limits that cannot be set
                if self._isolated:
                    raise

    def _watch(self, first: int, second: int | None = None) -> _Run:
        """Wait until ``first`` has ended or must be stopped, then end whatever is left of the run."""
        ended: dict[int, tuple[int, float]] = {}
        deadline, pause, stopped = time.monotonic() + self._limits["wall_seconds"], _PAUSE_S, ""
        while first not in ended:
            if not _reap(ended, os.WNOHANG):
                if time.monotonic() > deadline:
                    stopped = "timed out"
                elif self._isolated and pause == _LONGEST_PAUSE_S and _resident_bytes() > self._limits["memory_bytes"]:
                    stopped = "over memory"
                if stopped:
                    break
                if select.select([self._control.descriptor], [], [], pause)[0]:  # the parent is done, or dead
                    self._end(first, second)
                    os._exit(0)
                pause = min(1.5 * pause, _LONGEST_PAUSE_S)
        self._end(first, second)
        while _reap(ended, 0):
            pass
        return _Run(first, ended, stopped)

    def _end(self, *pids: int | None) -> None:
        if self._isolated and os.getpid() == 1:
            try:
                os.kill(-1, signal.SIGKILL)
            except ProcessLookupError:
                return
        else:
            for pid in filter(None, pids):
                try:
                    os.killpg(pid, signal.SIGKILL)
                except OSError:
                    continue

    def _reply(self, run: _Run, files: Files) -> Reply:
        status, cpu_s = run.ended[run.first]
        code, error, limits = _exit_code(status), files.error, self._limits
        output = files.read(1)
        if run.stopped:
            ending = run.stopped
        elif code == -signal.SIGXCPU or cpu_s >= limits["cpu_seconds"]:
            ending = "timed out"
        elif len(output) >= limits["file_bytes"]:
            ending = "over output"
        elif code != 0 and error.startswith("MemoryError"):
            ending = "over memory"
        else:
            ending = "exited" if code == 0 else "crashed"
        text = output.decode(errors="replace")
        return {"ending": ending, "exit_code": code, "output": text, "error": error, "cpu_seconds": cpu_s}


def _reap(ended: dict[int, tuple[int, float]], options: int) -> bool:
    try:
        pid, status, usage = os.wait4(-1, options)
    except ChildProcessError:
        return False
    if pid:
        ended[pid] = status, usage.ru_utime + usage.ru_stime
    return pid != 0


def _exit_code(status: int) -> int:
    return os.waitstatus_to_exitcode(status)


def _resident_bytes() -> int:
    """What all processes of the sandbox hold together; 0 where there is no /proc."""
    pages = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            pages += int((process / "statm").read_text().split()[1])
        except (OSError, IndexError):  # it has just ended
            continue
    return pages * resource.getpagesize()
