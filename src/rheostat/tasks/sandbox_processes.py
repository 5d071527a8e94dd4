"""What the processes that run inside the sandbox do, and the files that they read and write.

Each of these processes is forked from process 1 (``sandbox_child.py``) and has given up its privileges before.
"""

import atexit
import gc
import marshal
import os
import socket
import sys
import threading
import types
from contextlib import suppress
from typing import Any

from rheostat.tasks import sandbox_calls

_ERROR_BYTES = 4096


class Files:
    """Standard input, output and error of one run: files without a name."""

    def __init__(self, given: bytes = b"") -> None:
        self.descriptors = tuple(_nameless_file() for _ in range(3))
        with open(self.descriptors[0], "wb", closefd=False) as file:
            file.write(given)
        os.lseek(self.descriptors[0], 0, os.SEEK_SET)

    def read(self, number: int, last: int = 0) -> bytes:
        """All, or the ``last`` bytes, of what was written."""
        with open(self.descriptors[number], "rb", closefd=False) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - last) if last else 0)
            return file.read()

    @property
    def error(self) -> str:
        lines = self.read(2, _ERROR_BYTES).decode(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "")

    def close(self) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)


def _nameless_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("file")
    import tempfile  # slow to import

    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def compile_program(program: str) -> None:
    """Write the program's code object to standard output."""
    os.write(1, marshal.dumps(compile(program, "<program>", "exec")))
    os._exit(0)


def _execute(code: bytes, name: str) -> dict[str, Any]:
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(marshal.loads(code), module.__dict__)
    return module.__dict__


def run_program(code: bytes) -> None:
    """Run a program, and end as Python would, in a third of the time: it takes every module apart."""
    namespace = _execute(code, "__main__")
    with suppress(Exception):  # what goes wrong here is left to Python's own way out
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stdout = sys.__stdout__ or sys.stdout
        namespace.clear()  # files that the program has not closed are written now
        gc.collect()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def serve_program(code: bytes) -> None:
    """Run a program, then call what the tests at the other end of descriptor 3 ask for."""
    with socket.socket(fileno=3) as end:
        sandbox_calls.serve(_execute(code, "program"), end.makefile("rb"), end.makefile("wb"))


def run_tests(tests: str, entry_point: str) -> None:
    """Run tests against the program at the other end of descriptor 3; exit code 0 says that they passed."""
    with socket.socket(fileno=3) as end:
        program = sandbox_calls.Program(end.makefile("rb"), end.makefile("wb"))
        sandbox_calls.run_tests(tests, entry_point, program)
    os._exit(0)
