"""Files that are either whole or not there, and operating-system errors that say what to do."""

import contextlib
import errno
import os
import secrets
from pathlib import Path

import platformdirs

from rheostat.errors import StoreError

_ADVICE = {
    errno.ENOSPC: "the disk is full; free some space and run again",
    errno.EDQUOT: "your disk quota is used up; free some space and run again",
    errno.EFBIG: "the file exceeds the largest size allowed here; raise the limit (ulimit -f) and run again",
    errno.EROFS: "it is on a read-only file system; choose a folder that can be written",
    errno.EACCES: "permission denied; change the permissions of the folder or choose another one",
    errno.EPERM: "permission denied; change the permissions of the folder or choose another one",
    errno.ENOENT: "the folder does not exist; create it or correct the path",
    errno.ENOTDIR: "a part of the path is a file; choose another path",
    errno.EEXIST: "a file stands where the folder should be; move it away or choose another path",
    errno.EISDIR: "a folder stands where the file should be; move it away or choose another path",
}


def disk_error(action: str, path: Path, error: OSError) -> StoreError:
    """The one line for an operating-system error: what was tried, where, and what to do about it.

    Args:
        action: what was tried, as in ``cannot <action> <path>``.
        path: the file or folder it was tried on.
        error: what the operating system said.
    """
    advice = _ADVICE.get(error.errno or 0, error.strerror or str(error))
    return StoreError(f"cannot {action} {path}: {advice}")


def expanded(name: str | Path) -> Path:
    """``name`` as an absolute path, ``~`` replaced."""
    with contextlib.suppress(RuntimeError):  # ~ of a user whom nobody knows
        return Path(name).expanduser().absolute()
    return Path(name).absolute()


def cache_folder() -> Path:
    """Where what can be had again lives: ``RHEOSTAT_CACHE``, or the user's cache folder of this system."""
    chosen = os.environ.get("RHEOSTAT_CACHE")
    return expanded(chosen) if chosen else platformdirs.user_cache_path("rheostat")


def make_folder(folder: str | Path) -> Path:
    """Create ``folder`` and its parents where they are missing.

    Raises:
        StoreError: it cannot be created, or a file has that name.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error("create the folder", folder, error) from error
    return folder


def atomic_write(path: str | Path, content: str | bytes) -> None:
    """Write a file so that, whatever happens, either the old content or all of the new one is there, on the disk.

    The content goes to a hidden temporary file of the same folder (``.<name>.<random>.tmp``), which then takes the
    place of ``path``. The folder must exist. A power failure after the return loses nothing; a killed process leaves
    at most a temporary file behind.

    Args:
        path: the file to write or replace.
        content: bytes as they are, or text, which is written as UTF-8 with its line ends unchanged.

    Raises:
        StoreError: full disk, read-only folder, missing permission, missing folder; the temporary file is gone and
            an earlier file of that name stands as it was.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise disk_error("write", path, error) from error


def sync_folder(folder: Path) -> None:
    """Bring a folder's own entries to the disk, so that a rename in it survives a power failure.

    Raises:
        OSError: as the operating system says.
    """
    if os.name == "nt":  # Windows cannot open a folder and keeps its entries by itself
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have no such call
            raise
    finally:
        os.close(descriptor)
