"""Adapters as folders of three files: ``adapter.safetensors``, ``adapter.json`` and a model card, ``README.md``."""

import hashlib
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, Literal, TypeVar, overload

import safetensors.torch
import torch
from pydantic import JsonValue
from safetensors import SafetensorError

from rheostat.adapters import hub
from rheostat.adapters.autodeco import AutoDeco, AutoDecoConfig
from rheostat.adapters.card import model_card
from rheostat.adapters.description import BaseModel, Config, Kind, describe, kind_of, read
from rheostat.adapters.sequence import SequenceAdapter, SequenceConfig
from rheostat.adapters.token import TokenAdapter
from rheostat.decoding.strategy import ActionSpace
from rheostat.errors import AdapterError, ConfigError
from rheostat.files import atomic_write, disk_error, make_folder, sync_folder

__all__ = ["BaseModel", "LoadedAdapter", "load_adapter", "push_adapter", "save_adapter", "write_card"]

WEIGHTS, DESCRIPTION, CARD = "adapter.safetensors", "adapter.json", "README.md"

Adapter = SequenceAdapter | TokenAdapter | AutoDeco
AdapterT = TypeVar("AdapterT", bound=Adapter, covariant=True)


@dataclass(frozen=True, slots=True)
class LoadedAdapter(Generic[AdapterT]):
    """An adapter in evaluation mode, what it was trained for and how, and the folder it was read from."""

    adapter: AdapterT
    base: BaseModel
    training: Mapping[str, JsonValue]
    metrics: Mapping[str, JsonValue]
    folder: Path


def save_adapter(
    folder: str | Path,
    adapter: Adapter,
    base: BaseModel,
    training: Mapping[str, object],
    metrics: Mapping[str, object],
) -> None:
    """Write an adapter as a folder; one that is there is replaced as a whole or, whatever happens, stays as it is.

    The new folder is written and synced under a hidden name beside the old one, which then moves to ``.<name>.old``
    and is deleted. A process killed between the two renames leaves the old adapter there, and
    :func:`load_adapter` finds it. Files that others put into the folder move along.

    Args:
        folder: a new or empty folder, or an adapter to replace.
        adapter: what was learned.
        base: the model it was learned for, with the adapter's hidden size.
        training: a summary of the training, of JSON values; numbers that are not finite become null.
        metrics: measured results, likewise; what of them the model card shows, :mod:`.card` says.

    Raises:
        AdapterError: the folder holds something else, a weight is not finite, another hidden size, no JSON values.
        StoreError: full disk, missing permission.
    """
    folder = Path(folder).expanduser().resolve()
    if base.hidden_size != adapter.config.hidden_size:
        raise AdapterError(
            f"{folder}: the adapter reads embeddings of {adapter.config.hidden_size} numbers, "
            f"but {base} has {base.hidden_size}"
        )
    tensors = {name: tensor.detach().to("cpu", torch.float32) for name, tensor in adapter.state_dict().items()}
    _require_finite(tensors, folder)
    weights = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
    sha256 = hashlib.sha256(weights).hexdigest()
    space = None if isinstance(adapter, AutoDeco) else adapter.space
    description = describe(folder / DESCRIPTION, adapter.config, space, base, training, metrics, sha256)
    card = model_card(base.id, adapter.config, space, description.training, description.metrics)
    make_folder(folder.parent)
    new = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    try:
        others = _files_of_others(folder)
        new.mkdir()
        for other in others:
            if other.is_dir() and not other.is_symlink():
                shutil.copytree(other, new / other.name, symlinks=True)
            else:
                shutil.copy2(other, new / other.name, follow_symlinks=False)
        atomic_write(new / WEIGHTS, weights)
        atomic_write(new / DESCRIPTION, description.model_dump_json(indent=2, exclude_unset=True) + "\n")
        atomic_write(new / CARD, card)
        _swap(new, folder)
    except OSError as error:
        raise disk_error("write the adapter", folder, error) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def write_card(folder: Path, metrics: Mapping[str, object], card: Path | None = None) -> Path:
    """Write the model card of an adapter anew, from what was measured since; the adapter stays as it is.

    Args:
        folder: an adapter.
        metrics: measured results, as for :func:`save_adapter`.
        card: the file to write; by default that of the adapter's folder.

    Raises:
        AdapterError: no adapter, or a description that is not valid.
        StoreError: full disk, missing permission.
    """
    path = folder / DESCRIPTION
    description, config, space = read(path, _read_bytes(path))
    card = card or folder / CARD
    atomic_write(card, model_card(description.base_model.id, config, space, description.training, metrics))
    return card


@overload
def load_adapter(
    folder_or_hub_id: str | Path, base: BaseModel | None = None, revision: str | None = None, kind: None = None
) -> LoadedAdapter[Adapter]: ...
@overload
def load_adapter(
    folder_or_hub_id: str | Path,
    base: BaseModel | None = None,
    revision: str | None = None,
    *,
    kind: Literal["sequence"],
) -> LoadedAdapter[SequenceAdapter]: ...
@overload
def load_adapter(
    folder_or_hub_id: str | Path,
    base: BaseModel | None = None,
    revision: str | None = None,
    *,
    kind: Literal["token"],
) -> LoadedAdapter[TokenAdapter]: ...
@overload
def load_adapter(
    folder_or_hub_id: str | Path,
    base: BaseModel | None = None,
    revision: str | None = None,
    *,
    kind: Literal["autodeco"],
) -> LoadedAdapter[AutoDeco]: ...
def load_adapter(
    folder_or_hub_id: str | Path,
    base: BaseModel | None = None,
    revision: str | None = None,
    kind: Kind | None = None,
) -> LoadedAdapter[Adapter]:
    """Read an adapter and check all of it. Nothing in its files is ever executed.

    Args:
        folder_or_hub_id: a folder, or ``owner/name`` on the Hugging Face Hub where no such folder exists.
        base: the model it is to be used with; by default it is not compared.
        revision: branch, tag or commit on the Hub.
        kind: what is needed: an adapter of the level ``sequence`` or ``token``, or ``autodeco``; by default any.

    Raises:
        AdapterError: in one line: no adapter, a damaged one, one of another kind or format, or for another model.
    """
    loaded = _read(_locate(folder_or_hub_id, revision))
    found = kind_of(loaded.adapter.config)
    if kind is not None and found != kind:
        raise AdapterError(
            f"{folder_or_hub_id}: this is {_NAMES[found]}, {_NAMES[kind]} is needed: name another adapter or train one "
            f"with 'rheostat train {kind}'"
        )
    trained = loaded.base
    if base is not None and (trained.fingerprint, trained.hidden_size) != (base.fingerprint, base.hidden_size):
        raise AdapterError(
            f"{folder_or_hub_id}: this adapter was trained for {trained} (fingerprint {trained.fingerprint}, hidden "
            f"size {trained.hidden_size}), not for {base} (fingerprint {base.fingerprint}, hidden size "
            f"{base.hidden_size}): load it with {trained} or train one for {base}"
        )
    return loaded


_NAMES: dict[Kind, str] = {
    "sequence": "a sequence-level adapter",
    "token": "a token-level adapter",
    "autodeco": "an AutoDeco adapter",
}


def push_adapter(
    folder: str | Path, repo_id: str, private: bool = False, endpoint: str | None = None, token: str | None = None
) -> str:
    """Upload an adapter folder to the Hugging Face Hub, after checking it as :func:`load_adapter` does.

    Args:
        folder: an adapter on this machine.
        repo_id: ``owner/name``; the repository is created where it does not exist.
        private: make a new repository private.
        endpoint: another Hub than huggingface.co (or than ``HF_ENDPOINT`` names).
        token: by default the one of ``hf auth login`` or ``HF_TOKEN``.

    Returns:
        The repository's address.

    Raises:
        AdapterError: in one line: no adapter, no token, a token that may not write there, or a Hub out of reach.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such folder; name the folder of the adapter to push")
    _read(folder)
    return hub.upload(folder, [WEIGHTS, DESCRIPTION, CARD], repo_id, private, endpoint, token)


def _files_of_others(folder: Path) -> list[Path]:
    """What a folder that is to be replaced holds beside the adapter; a folder that is no adapter is refused."""
    if not folder.exists():
        return []
    if not folder.is_dir():
        raise AdapterError(f"{folder}: a file has this name; choose another folder for the adapter")
    entries = sorted(folder.iterdir())
    if entries and not (folder / DESCRIPTION).is_file():
        raise AdapterError(f"{folder}: it holds other files ({entries[0].name}); choose another folder for the adapter")
    return [entry for entry in entries if entry.name not in (WEIGHTS, DESCRIPTION, CARD)]


def _old_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _swap(new: Path, folder: Path) -> None:
    """Put ``new`` in the place of ``folder``. At every moment one whole adapter stands there or at ``_old_of``."""
    old = _old_of(folder)
    sync_folder(new)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _locate(folder_or_hub_id: str | Path, revision: str | None) -> Path:
    try:
        folder = Path(folder_or_hub_id).expanduser()
        if folder.is_dir():
            if revision is not None:
                raise AdapterError(f"{folder}: a folder has no revision '{revision}'; leave the revision out")
            return folder
        if folder.exists():
            raise AdapterError(f"{folder}: an adapter is a folder, this is a file")
        if _old_of(folder.absolute()).is_dir():  # a save was killed between its two renames
            return _old_of(folder.absolute())
    except (OSError, RuntimeError, ValueError) as error:  # names too long, a home nobody has, a null character
        raise AdapterError(f"{folder_or_hub_id}: no usable name of a folder ({error})") from error
    if isinstance(folder_or_hub_id, str) and hub.is_id(folder_or_hub_id):
        return hub.download([WEIGHTS, DESCRIPTION, CARD], folder_or_hub_id, revision)
    raise AdapterError(f"{folder}: no such folder; give an adapter's folder, or owner/name on the Hub")


def _read(folder: Path) -> LoadedAdapter[Adapter]:
    path = folder / DESCRIPTION
    description, config, space = read(path, _read_bytes(path))
    try:
        adapter = _read_weights(folder / WEIGHTS, description.weights_sha256, config, space)
    except ConfigError as error:
        raise AdapterError(f"{path}: {error}") from error
    base = BaseModel(**description.base_model.model_dump())
    return LoadedAdapter(adapter, base, description.training, description.metrics, folder)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise AdapterError(f"{path.parent} is no adapter: it has no {path.name}") from None
    except OSError as error:
        raise AdapterError(f"cannot read {path}: {error.strerror or error}") from error


def _read_weights(path: Path, sha256: str, config: Config, space: ActionSpace | None) -> Adapter:
    data = _read_bytes(path)
    try:
        tensors: dict[str, torch.Tensor] = safetensors.torch.load(data)
    except (SafetensorError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise AdapterError(f"{path}: damaged or cut short ({reason}); get the adapter again") from error
    # Before anything of that size is built: the larger matrices alone must fit into the file.
    if 4 * _least_weights(config, 0 if space is None else len(space)) > len(data):
        raise AdapterError(f"{path}: it is too small for the sizes that {DESCRIPTION} names")
    adapter = _build(config, space)
    expected = adapter.state_dict()
    for name in sorted(set(expected) | set(tensors)):
        if name not in tensors:
            raise AdapterError(f"{path}: tensor {name} is missing")
        if name not in expected:
            raise AdapterError(f"{path}: unknown tensor {name}")
        shape, wanted = tuple(tensors[name].shape), tuple(expected[name].shape)
        if shape != wanted:
            raise AdapterError(f"{path}: tensor {name} has shape {shape}, {DESCRIPTION} asks for {wanted}")
        if tensors[name].dtype != torch.float32:
            raise AdapterError(f"{path}: tensor {name} is {tensors[name].dtype}, it must be torch.float32")
    _require_finite(tensors, path)
    for name in expected:
        if name.endswith("standardizer.scale_H") and bool((tensors[name] <= 0).any()):
            raise AdapterError(f"{path}: tensor {name} must be above 0")
    if hashlib.sha256(data).hexdigest() != sha256:
        raise AdapterError(f"{path}: these are not the weights that {DESCRIPTION} describes; get the adapter again")
    adapter.load_state_dict(tensors)
    return adapter.eval()


def _build(config: Config, space: ActionSpace | None) -> Adapter:
    if isinstance(config, AutoDecoConfig):
        return AutoDeco(config)
    assert space is not None, "the description of every other kind has one"
    return SequenceAdapter(config, space) if isinstance(config, SequenceConfig) else TokenAdapter(config, space)


def _least_weights(config: Config, actions: int) -> int:
    """How many numbers the square and the wide matrices of a network hold, known without building it."""
    if isinstance(config, AutoDecoConfig):
        return 2 * config.width * config.hidden_size
    if isinstance(config, SequenceConfig):
        hidden_size, encoders = config.inputs, int(config.with_budget)
    else:
        hidden_size = config.hidden_size if config.reads_hidden else 0
        encoders = config.reads_entropy + config.with_budget + bool(config.budgets)
        if config.start is not None:
            return _least_weights(config.start, actions) + _least_weights(replace(config, start=None), actions)
    inputs = hidden_size + encoders * config.budget_width
    return config.width * (inputs + config.width + actions) + encoders * config.budget_width**2


def _require_finite(tensors: Mapping[str, torch.Tensor], place: Path) -> None:
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise AdapterError(f"{place}: tensor {name} holds values that are not finite")
