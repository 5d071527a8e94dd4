import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rheostat.errors import StoreError
from rheostat.files import atomic_write, make_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_writes_bytes_and_text_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    atomic_write(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    atomic_write(path, "µ\r\n")
    assert path.read_bytes() == "µ\r\n".encode()
    assert names(tmp_path) == ["report.html"]


def test_the_file_obeys_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        atomic_write(tmp_path / "results.json", "{}")
    finally:
        os.umask(before)
    assert (tmp_path / "results.json").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EROFS, "choose a folder that can be written"),
        (errno.EACCES, "change the permissions"),
        (errno.EIO, os.strerror(errno.EIO)),
    ],
)
def test_a_refusing_disk_is_one_line_and_the_old_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, advice: str
) -> None:
    path = tmp_path / "results.json"
    atomic_write(path, "old")

    def refuse(_descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StoreError) as caught:
        atomic_write(path, "new")
    assert str(tmp_path) in str(caught.value)
    assert advice in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["results.json"]


def test_an_interruption_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        atomic_write(tmp_path / "results.json", "new")
    assert names(tmp_path) == []


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"nowhere/results\.json: the folder does not exist"):
        atomic_write(tmp_path / "nowhere" / "results.json", "new")


def test_a_folder_in_the_place_of_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").mkdir()
    with pytest.raises(StoreError, match="a folder stands where the file should be"):
        atomic_write(tmp_path / "results.json", "new")
    assert names(tmp_path) == ["results.json"]


def test_make_folder(tmp_path: Path) -> None:
    assert make_folder(tmp_path / "a" / "b").is_dir()
    assert make_folder(str(tmp_path / "a" / "b")).is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="a file stands where the folder should be"):
        make_folder(tmp_path / "file")
    with pytest.raises(StoreError, match="a part of the path is a file"):
        make_folder(tmp_path / "file" / "b")


@pytest.mark.skipif(sys.platform == "win32", reason="resource limits are POSIX")
def test_a_real_limit_on_the_file_size(tmp_path: Path) -> None:
    """The kernel itself refuses the write half-way (as a full disk does), in a process of its own."""
    code = (
        "import resource, signal, sys\n"
        "from rheostat.errors import StoreError\n"
        "from rheostat.files import atomic_write\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n"
        "    atomic_write(sys.argv[1], b'x' * 5000)\n"
        "except StoreError as error:\n"
        "    print(error)\n"
    )
    path = tmp_path / "big"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60, check=True
    )
    assert "exceeds the largest size" in done.stdout
    assert names(tmp_path) == []
