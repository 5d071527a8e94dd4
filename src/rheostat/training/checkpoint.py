"""Checkpoints: all that a training run needs to go on as if it had never stopped, in one file.

The first line is JSON: the format's version, the run that the file belongs to, and a digest of what follows, which is
torch's.
"""

import hashlib
import io
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rheostat.errors import StoreError
from rheostat.files import atomic_write, disk_error

FORMAT_VERSION = 2


def save_checkpoint(path: Path, identity: str, state: Mapping[str, Any]) -> None:
    """Replace the checkpoint as a whole.

    Args:
        path: the file; its folder must exist.
        identity: names everything that shapes the run; only a run with the same one continues from here.
        state: tensors, numbers, texts, and lists and dictionaries of these.

    Raises:
        StoreError: full disk, missing permission.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    header = {"format_version": FORMAT_VERSION, "identity": identity, "digest": _digest(buffer.getvalue())}
    atomic_write(path, json.dumps(header).encode() + b"\n" + buffer.getvalue())


def load_checkpoint(path: Path, identity: str) -> dict[str, Any] | None:
    """The state in ``path``; None where there is no checkpoint. Nothing in the file is executed.

    Raises:
        StoreError: it is damaged, of another version, or belongs to another run.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise disk_error("read the checkpoint", path, error) from error
    header, _, content = data.partition(b"\n")
    try:
        described = json.loads(header)
        version, owner, digest = (described[name] for name in ("format_version", "identity", "digest"))
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(_damaged(path)) from error
    if version != FORMAT_VERSION:
        raise StoreError(
            f"{path}: format version {version!r}, this Rheostat reads {FORMAT_VERSION}; delete it to train anew"
        )
    if digest != _digest(content):
        raise StoreError(_damaged(path))
    if owner != identity:
        raise StoreError(
            f"{path} belongs to a run with other settings, model or problems; "
            "choose another --out, or delete it to train anew"
        )
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise StoreError(_damaged(path)) from error
    return state


def _damaged(path: Path) -> str:
    return f"{path}: damaged or no checkpoint; delete it to train anew"


def _digest(content: bytes) -> str:
    """torch's own reader accepts flipped bits in a tensor."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()
