"""C that is compiled for this processor when it is first needed, by the machine's own compiler.

That takes less than a second, and the cache keeps what was made. Where there is no compiler, whoever asks does without.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from importlib.resources import files
from pathlib import Path

from rheostat.errors import StoreError
from rheostat.files import atomic_write, cache_folder, make_folder

# Where torch has loaded the same OpenMP, its threads do the work. Sums change their order only where the code says so.
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")
_SECONDS = 120


@cache
def library(package: str, name: str, defined: tuple[str, ...] = ()) -> ctypes.CDLL | None:
    """The functions of a C file of a package, for its macros ``defined`` (``NAME=VALUE``), after ``compiled.h``.

    None where nothing can compile it; then a warning says so, once for each reason.
    """
    if sys.platform == "win32":
        return None
    try:
        head, code = files("rheostat").joinpath("compiled.h"), files(package).joinpath(name)
        return _loaded(head.read_text() + code.read_text(), defined)
    except (OSError, subprocess.SubprocessError) as error:
        _warn(_reason(error))
        return None


def _loaded(source: str, defined: tuple[str, ...]) -> ctypes.CDLL:
    """From the cache, if it is there and can be loaded."""
    compiler = os.environ.get("CC") or shutil.which("cc") or "gcc"
    command = [*compiler.split(), *_FLAGS, *(f"-D{macro}" for macro in defined)]
    known = hashlib.sha256("\n".join([source, *command, platform.machine(), _processor()]).encode()).hexdigest()
    path = cache_folder() / "compiled" / f"{known[:32]}.so"
    with contextlib.suppress(OSError):
        return ctypes.CDLL(str(path))
    with tempfile.TemporaryDirectory() as folder:
        code, made = Path(folder, "code.c"), Path(folder, "code.so")
        code.write_text(source)
        command += ["-o", str(made), str(code), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS)
        result = ctypes.CDLL(str(made))  # stays when the folder goes
        with contextlib.suppress(StoreError):  # a cache that cannot be written: next time again
            atomic_write(make_folder(path.parent) / path.name, made.read_bytes())
    return result


def _processor() -> str:
    """What the processor can do: a home folder may be used by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _reason(error: Exception) -> str:
    """The first error that a compiler names, or how it ended."""
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line for line in error.stderr.splitlines() if "error" in line]
        return lines[0][lines[0].index("error") :] if lines else f"exit status {error.returncode}"
    return (str(error) or type(error).__name__).splitlines()[0]


@cache
def _warn(reason: str) -> None:
    warnings.warn(
        f"no C compiler makes the engine's kernels here, so that its steps are slower: install gcc ({reason})",
        stacklevel=3,
    )
