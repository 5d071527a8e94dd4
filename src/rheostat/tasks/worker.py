"""The program of a worker process: one function, called on the JSON values of one line, answered by one line.

Runs by its path and imports nothing of Rheostat, so that the function's own import path is all that it needs.
"""

import importlib
import importlib.util
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Function = Callable[..., object]

_FILE = "rheostat_target"  # the name of a module from a file, which may itself be called json.py


def load(target: str) -> Function:
    """The function that ``package.module:function`` or ``path/to/file.py:function`` names."""
    place, _, name = target.rpartition(":")
    if place.endswith(".py"):
        path = Path(place).expanduser().resolve(strict=True)
        spec = importlib.util.spec_from_file_location(_FILE, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} is no Python file")
        module = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(path.parent))  # it may import its neighbours, as a script does
        sys.modules[_FILE] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    function: Function = getattr(module, name)
    if not callable(function):
        raise TypeError(f"{name} is not a function")
    return function


def limit(memory: int) -> None:
    """At most ``memory`` bytes of address space beyond what the imports took, and no core dumps."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        size = pages * resource.getpagesize() + memory
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        size = size if hard == resource.RLIM_INFINITY else min(size, hard)
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


def outcome(function: Function, args: list[Any]) -> str:
    """The reply to one request."""
    try:
        return json.dumps({"value": function(*args)})
    except MemoryError:
        # what fills the memory may be what earlier calls left behind: a fresh process tries again
        os._exit(1)
    except BaseException as error:  # SystemExit, too, is only what the function did
        return json.dumps({"raised": [type(error).__name__, _message(error)]})


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return "its message cannot be shown"


def main() -> None:
    requests, replies = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    # what the function reads and prints must not meet the protocol
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)

    def reply(line: str) -> None:
        try:
            replies.write(line + "\n")
            replies.flush()
        except BrokenPipeError:
            os._exit(1)

    setup = json.loads(requests.readline())
    sys.path[:] = setup["path"]
    try:
        function = load(setup["target"])
        limit(setup["memory"])
    except BaseException as error:
        reply(json.dumps({"failed": f"{type(error).__name__}: {_message(error)}"}))
        return
    reply(json.dumps({"ready": True}))
    for line in requests:
        # The parent kills what hangs. Should the parent itself be gone, the kernel does it, even in C code that never
        # comes back to Python; a death signal would follow the thread that started us, not the process.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, setup["timeout"] + 5)
        reply(outcome(function, json.loads(line)))
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main()
