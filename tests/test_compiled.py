"""C compiled when it is first needed: kept, made anew where it is damaged, and done without."""

import ctypes
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rheostat.compiled import library
from rheostat.files import cache_folder

pytestmark = pytest.mark.usefixtures("forget_compiled")
CODE = """#include <stdint.h>
#ifdef TWICE
#define N 2
#else
#define N 1
#endif
int64_t times(int64_t x) { return N * x; }
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package that holds ``code.c``."""
    folder = tmp_path / "packed"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "code.c").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "packed", raising=False)
    return "packed"


def times(found: ctypes.CDLL | None, x: int) -> int:
    assert found is not None
    found.times.argtypes, found.times.restype = [ctypes.c_int64], ctypes.c_int64
    return int(found.times(x))


def kept() -> list[Path]:
    return sorted((cache_folder() / "compiled").iterdir())


def test_functions_for_each_definition(package: str) -> None:
    assert times(library(package, "code.c"), 3) == 3
    assert times(library(package, "code.c", ("TWICE",)), 3) == 6
    assert len(kept()) == 2


def test_what_is_kept_is_not_made_again(
    package: str, forget_compiled: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    library(package, "code.c")
    forget_compiled()
    monkeypatch.setattr(subprocess, "run", None)
    assert times(library(package, "code.c"), 3) == 3


def test_other_code_and_another_processor_are_others(
    package: str, forget_compiled: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library(package, "code.c")
    (tmp_path / package / "code.c").write_text(CODE.replace("N * x", "N * x + 1"))
    forget_compiled()
    assert times(library(package, "code.c"), 3) == 4
    monkeypatch.setattr("rheostat.compiled._processor", lambda: "flags: none")
    forget_compiled()
    library(package, "code.c")
    assert len(kept()) == 3


def test_a_damaged_library_is_made_anew(package: str, forget_compiled: Callable[[], None]) -> None:
    library(package, "code.c")
    (path,) = kept()
    whole = path.read_bytes()
    path.unlink()  # what is mapped stays as it is
    path.write_bytes(whole[:100])
    forget_compiled()
    assert times(library(package, "code.c"), 3) == 3
    assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written(package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RHEOSTAT_CACHE", str(tmp_path / "file"))
    assert times(library(package, "code.c"), 3) == 3


@pytest.mark.parametrize(
    ("compiler", "code", "reason"),
    [
        ("no-such-compiler", CODE, ".*no-such-compiler"),
        ("false", CODE, "exit status"),
        ("cc", "int x = y;\n", "error: .*y"),
    ],
)
def test_one_warning_where_nothing_compiles(
    compiler: str, code: str, reason: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / package / "code.c").write_text(code)
    monkeypatch.setenv("CC", compiler)
    with pytest.warns(UserWarning, match=rf"its steps are slower: install gcc \({reason}") as caught:
        assert [library(package, "code.c", macros) for macros in ((), ("TWICE",))] == [None, None]
    assert len(caught) == 1
