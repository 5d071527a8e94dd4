"""Rows of a data set, from a JSON Lines file or from the Hugging Face Hub, and the splits they belong to."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from rheostat.errors import ConfigError
from rheostat.seeding import derive_seed
from rheostat.tasks.base import Split
from rheostat.types import Problem

_TENTHS = {Split.TRAIN: range(0, 5), Split.VALIDATION: range(5, 7), Split.TEST: range(7, 10)}
_VALIDATION_OF_TRAIN = range(8, 10)  # tenths of a training file that serve as validation where no file does


@dataclass(frozen=True, slots=True)
class Source:
    """Where rows come from.

    Attributes:
        location: a path that ends in ``.jsonl`` (or ``.json``, one object per line), or a Hub id ``owner/name``.
        split: the Hub's name of the split.
        subset: the Hub's name of the subset (configuration); several with commas; empty: the default one.
        revision: a commit, tag or branch of the Hub repository.
    """

    location: str
    split: str = "train"
    subset: str = ""
    revision: str = "main"

    @property
    def is_file(self) -> bool:
        return Path(self.location).suffix in (".jsonl", ".json")

    @classmethod
    def parse(cls, text: str) -> Self:
        """``FILE.jsonl``, or ``owner/name[/subset][@revision][:split]``.

        Raises:
            ConfigError: neither.
        """
        if Path(text).suffix in (".jsonl", ".json"):
            return cls(text)
        where, _, split = text.partition(":")
        where, _, revision = where.partition("@")
        parts = where.split("/", 2)
        if len(parts) < 2 or not all(parts):
            raise ConfigError(
                f"--data {text}: give a file that ends in .jsonl, or a data set of the Hub as "
                "owner/name[/subset][@revision][:split]"
            )
        subset = parts[2] if len(parts) == 3 else ""
        return cls("/".join(parts[:2]), split or "train", subset, revision or "main")

    def __str__(self) -> str:
        if self.is_file:
            return self.location
        return f"{self.location}{'/' + self.subset if self.subset else ''}@{self.revision}:{self.split}"


@dataclass(frozen=True, slots=True)
class Record:
    """One row: its fields, and where it stands, for messages."""

    fields: Mapping[str, Any]
    where: str

    def first(self, *names: str) -> Any:
        """The first of these fields that the row has.

        Raises:
            ConfigError: it has none; names those that it has.
        """
        for name in names:
            if self.fields.get(name) is not None:
                return self.fields[name]
        raise ConfigError(f"{self.where}: no field {' or '.join(map(repr, names))}; there are {', '.join(self.fields)}")


def read(source: Source) -> Iterator[Record]:
    """The rows of a source, one at a time.

    Raises:
        ConfigError: a file that is not there, a line that is no JSON object (names the line), an empty source, or a
            data set that the Hub does not give.
    """
    count = 0
    for record in _read_file(Path(source.location)) if source.is_file else _read_hub(source):
        count += 1
        yield record
    if count == 0:
        raise ConfigError(f"{source}: no rows")


def _read_file(path: Path) -> Iterator[Record]:
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                where = f"{path}:{number}"
                text = _decoded(line, where)
                if text.strip():
                    yield Record(_row(text, where), where)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8-sig")  # Windows' editors begin a file with a mark
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start + 1} of the line)") from error


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if "\\ud" in line.lower():  # half of a surrogate pair is no text: no tokenizer and no store takes it
            whole = json.dumps(row, ensure_ascii=False).encode("utf-16-le", "surrogatepass")
            row = json.loads(whole.decode("utf-16-le", "replace"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: no JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, brackets within brackets
        raise ConfigError(f"{where}: cannot be read ({error})") from error
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: a JSON object per line is wanted, got {type(row).__name__}")
    return row


def _read_hub(source: Source) -> Iterator[Record]:
    import datasets  # slow to import

    for subset in source.subset.split(","):
        try:
            rows = datasets.load_dataset(
                source.location, subset or None, split=source.split, revision=source.revision, streaming=True
            )
            for number, row in enumerate(rows):
                yield Record(row, f"{replace(source, subset=subset)} row {number}")
        except ConfigError:
            raise
        except Exception as error:  # what `datasets`, the Hub's client and the network raise has no common class
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(
                f"{source}: the Hub does not give it ({reason}); without a network give local files: "
                "--data train=FILE.jsonl test=FILE.jsonl"
            ) from error


def sources_of(data: Sequence[str]) -> dict[Split | None, Source]:
    """What ``--data`` names: ``SPLIT=SOURCE`` each, or a single source for all splits (key None).

    Raises:
        ConfigError: an unknown or repeated split, or a single source beside named ones.
    """
    found: dict[Split | None, Source] = {}
    for text in data:
        name, equals, rest = text.partition("=")
        named = bool(equals) and "/" not in name  # a folder's name may hold an equals sign
        if named and name not in set(Split):
            raise ConfigError(f"--data {text}: the splits are {', '.join(Split)}")
        split = Split(name) if named else None
        if split in found or (found and None in (split, *found)):
            raise ConfigError("--data: give one source for all splits, or one SPLIT=SOURCE for each")
        found[split] = Source.parse(rest if named else text)
    return found


def split_problems(
    problems: Mapping[Split | None, Iterable[tuple[Problem, str]]],
    refuse_shared: bool = True,
) -> tuple[dict[Split, list[Problem]], int]:
    """Problems by split, in an order that does not depend on their sources' (which often sort them by subject).

    A source for all splits is divided by a hash of the question: 5 tenths train, 2 validation, 3 test; where only
    train has a source, 2 of its tenths are validation. Of equal questions in one split the first is kept.

    Args:
        problems: of each source, each with where it stands.
        refuse_shared: refuse a question that stands in two splits. Published data sets have such questions (three of
            MBPP's), which no user can take out: without this, they stay in the first source of ``problems`` and leave
            the others.

    Returns:
        The problems of each split, and how many were left out as repeated.

    Raises:
        ConfigError: one question in two splits, or two problems with one id; says where they stand.
    """
    found: dict[Split, list[Problem]] = {split: [] for split in Split}
    asked: dict[str, tuple[Split, str]] = {}
    named: dict[str, str] = {}
    repeated = 0
    for given, own in problems.items():
        for problem, where in own:
            question = " ".join(problem.question.split())
            split = _split_of(given, question, has_validation=Split.VALIDATION in problems)
            if question in asked:
                other, there = asked[question]
                if other is not split and refuse_shared:
                    raise ConfigError(f"{where}: the same problem stands in {other} at {there}; take one of them out")
                repeated += 1
                continue
            if problem.id in named:
                raise ConfigError(f"{where}: the id {problem.id!r} stands also at {named[problem.id]}; ids are unique")
            asked[question], named[problem.id] = (split, where), where
            found[split].append(problem)
    for split, members in found.items():
        members.sort(key=lambda problem: derive_seed("order", split.value, problem.question))
    return found, repeated


def _split_of(given: Split | None, question: str, has_validation: bool) -> Split:
    tenth = derive_seed("split", question) % 10
    if given is None:
        return next(split for split, tenths in _TENTHS.items() if tenth in tenths)
    if given is Split.TRAIN and not has_validation and tenth in _VALIDATION_OF_TRAIN:
        return Split.VALIDATION
    return given
