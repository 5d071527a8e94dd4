"""Run programs that nobody has read, within limits, and say how each run ended.

What the sandbox covers, on Linux with user namespaces, for root and for any other user:

- **Processes.** A process namespace of its own: a program sees and can signal only its own processes. When its main
  process ends, or has to be stopped, all others are killed at once, whatever they ignore and however they detached.
- **Files.** A file system of its own, with the Python installation and the system's libraries, read-only, a few
  devices, and an empty working directory of limited size that is gone after each run. Nothing else of the host is
  there: no home, no data sets, no temporary files.
- **Privileges.** An unprivileged user without capabilities, who can get none and can create no user namespace.
- **Network.** A network namespace of its own without any interface, so that not even localhost is reached.
- **Environment.** Nothing of the caller's: variables, descriptors, standard input, terminal.
- **Limits.** CPU and wall time, memory, processes and threads, open files, sizes of files and output.
- **Verdicts.** What judges shares nothing writable with the program: output is compared by the caller, and tests that
  call functions run in a process of their own, to which only plain values come back (see ``sandbox_calls.py``).

What it does not cover:

- Errors of the kernel: a program makes any system call that an unprivileged user can make. Against an adversary who
  has those, use a virtual machine.
- Reading: whatever is readable by everyone in the Python installation and under /usr is readable.
- Time: a program can warm the machine for its wall time with as many processes as it may have, and learn the time of
  day and the machine's load.
- Memory is limited per process; all processes together are stopped when they are seen above the limit, which is
  looked at every few milliseconds. Nameless files (``memfd_create``) count file by file only: at worst processes ×
  open files × file size.
- Without isolation (``require_isolation=False`` on macOS, or where user namespaces are off) only the limits are left.

Programs see Python's standard library and no other package. Sets and dictionaries of strings have the same order in
every run.
"""

import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from rheostat.errors import RheostatError
from rheostat.tasks.sandbox_connection import Connection, connected


@dataclass(frozen=True, slots=True)
class Limits:
    """What one run of a program may use; all above 0.

    Attributes:
        cpu_seconds: CPU time of a process, in whole seconds.
        wall_seconds: time on the clock of the whole run, for programs that sleep or wait.
        memory_bytes: address space of a process, and resident memory of all of them.
        processes: processes and threads at a time.
        open_files: descriptors of a process.
        file_bytes: size of a file, and of what it prints.
        directory_bytes: all files in the working directory together.
    """

    cpu_seconds: int = 10
    wall_seconds: float = 30.0
    memory_bytes: int = 1 << 30
    processes: int = 8
    open_files: int = 64
    file_bytes: int = 4 << 20
    directory_bytes: int = 16 << 20


class Ending(StrEnum):
    """How a run ended: by itself with exit code 0, by itself otherwise, or at a limit."""

    EXITED = "exited"
    CRASHED = "crashed"
    TIMED_OUT = "timed out"
    OVER_MEMORY = "over memory"
    OVER_OUTPUT = "over output"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run.

    Attributes:
        exit_code: negative: the signal that ended the program.
        output: standard output, with U+FFFD for what is no UTF-8; empty for tests.
        error: the last line of standard error.
        cpu_seconds: of the main process.
    """

    ending: Ending
    exit_code: int
    output: str
    error: str
    cpu_seconds: float


class Sandbox:
    """Runs Python programs; one object serves any number of threads.

    Args:
        limits: of each run.
        require_isolation: refuse where :func:`missing_protections` are missing; otherwise warn.

    Raises:
        RheostatError: isolation is required and missing.
    """

    def __init__(self, limits: Limits | None = None, require_isolation: bool = True) -> None:
        self._limits = limits or Limits()
        missing = missing_protections()
        self._isolated = not missing
        if missing and require_isolation:
            raise RheostatError(
                f"programs cannot be isolated on this system ({missing[0]}): turn on user namespaces, or accept with "
                "require_isolation=False that programs can read and write files, use the network and leave processes"
            )
        if missing:
            warnings.warn(f"programs run without isolation: {'; '.join(missing)}", RuntimeWarning, stacklevel=2)

    def run(self, program: str, inputs: Iterable[str]) -> Iterator[Outcome]:
        """Run a program on one standard input after the other; leaving the loop early saves the remaining runs.

        The program is compiled once. One that does not compile has a single outcome, that of compiling it.

        Raises:
            RheostatError: the sandbox failed, not the program.
        """
        with connected(asdict(self._limits), self._isolated) as sandbox:
            compiled = _compile(sandbox, program)
            if compiled.ending is not Ending.EXITED:
                yield compiled
                return
            for given in inputs:
                yield _outcome(sandbox.ask(do="run", given=given))

    def test(self, program: str, tests: str, entry_point: str) -> Outcome:
        """Run tests that call the program's functions; they passed exactly if the outcome's ending is EXITED.

        The tests are trusted and run in a process of their own. ``entry_point`` is the program's; other names that
        the tests do not define are built-in, the standard library's modules, or else the program's too. What is the
        program's runs in the program's process: arguments and results are copies, and results other than plain values
        cannot be compared. The program's ``__name__`` is not ``"__main__"``.

        Raises:
            RheostatError: the sandbox failed, not the program.
        """
        with connected(asdict(self._limits), self._isolated) as sandbox:
            compiled = _compile(sandbox, program)
            if compiled.ending is not Ending.EXITED:
                return compiled
            sandbox.ask(do="load")
            return _outcome(sandbox.ask(do="test", tests=tests, entry_point=entry_point))


def missing_protections() -> tuple[str, ...]:
    """What the sandbox cannot do on this system, the reason first; empty where it does all that it promises."""
    if not sys.platform.startswith("linux"):
        reason = f"{sys.platform} has no namespaces"
    else:
        try:
            with connected(asdict(Limits()), isolated=True):
                return ()
        except RheostatError as error:
            reason = str(error)
    return reason, "the file system", "the network", "other processes", "processes that a program leaves behind"


def _compile(sandbox: Connection, program: str) -> Outcome:
    return _outcome(sandbox.ask(do="compile", program=program))


def _outcome(reply: dict[str, Any]) -> Outcome:
    return Outcome(**(reply | {"ending": Ending(reply["ending"])}))
