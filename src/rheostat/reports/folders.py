"""What lies in the folder of a run: its results, how its adapters came about, and how much its store holds."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rheostat.adapters.description import Description, read
from rheostat.decoding.strategy import Strategy
from rheostat.errors import StoreError
from rheostat.files import disk_error
from rheostat.reports import reading
from rheostat.reports.reading import ADAPTER, NATURES, PLAIN_ADAPTER, Results
from rheostat.rollouts.shards import DamagedShardError, read_table
from rheostat.types import FinishReason

FORMAT = 1  # of results.json
UNFINISHED = "unfinished.json"  # the configuration of a run that makes results, as long as it has not made them

_COLUMNS = ["strategy", "problem_id", "task", "correct", "tokens", "finish_reason", "seed"]


@dataclass(frozen=True, slots=True)
class Stored:
    """What a rollout store holds: a row for each policy, its columns those of :meth:`_by_policy`."""

    model: str | None
    fingerprint: str | None
    tasks: list[str]
    seeds: list[int]
    rows: list[Mapping[str, Any]]
    damaged: int

    def total(self, key: str) -> int:
        return sum(int(row[key]) for row in self.rows)


@dataclass(frozen=True, slots=True)
class Run:
    """The folder of one run.

    Attributes:
        path: of the folder, as it was given.
        results: ``results.json``; None where there is none.
        trainings: every ``training.json``, as the training of one adapter leaves it, here or beside its adapter.
        batches: of a token-level training that stands or stood here: the lines of ``metrics.jsonl``.
        adapters: adapter folders inside this one, with their descriptions.
        stored: what the rollout store holds; None where there is none.
        unread: why the store of a judged run cannot be read; empty where it can.
        is_outdated: the results are those of the run before one that was interrupted, or is still going on.
    """

    path: Path
    results: Results | None
    trainings: list[Mapping[str, Any]]
    batches: list[Mapping[str, Any]]
    adapters: dict[Path, Description]
    stored: Stored | None
    unread: str = ""
    is_outdated: bool = False


def read_run(folder: Path) -> Run:
    """Read a folder that demo, train, evaluate or select wrote, or was writing when it was interrupted.

    Nothing is locked and nothing is changed: a run may go on meanwhile.

    Raises:
        StoreError: no such folder, nothing of a run in it, a file that is no JSON or of another format.
    """
    if not folder.is_dir():
        raise StoreError(f"{folder} is no folder; give a folder that demo, train, evaluate or select wrote")
    results = _json(folder / "results.json")
    paths = sorted({path.parent for pattern in ("*", "*/*") for path in folder.glob(f"{pattern}/adapter.json")})
    trainings = [found for path in (folder, *paths) if (found := _json(path / "training.json")) is not None]
    if results is not None and results.get("format") != FORMAT:
        raise StoreError(
            f"{folder / 'results.json'} has the format {results.get('format')!r} and this rheostat reads {FORMAT}; "
            "write the report with the version that made the results"
        )
    batches = _lines(folder / "metrics.jsonl") or _lines(folder / "token" / "metrics.jsonl")
    stored, unread = None, ""
    try:
        stored = _stored(folder / "rollouts")
    except StoreError as error:
        if results is None:
            raise
        unread = str(error)  # the results stand by themselves
    if results is None and not trainings and not batches and stored is None:
        raise StoreError(
            f"{folder} is no run: it holds no results.json, training.json, metrics.jsonl or rollouts/; "
            "give a folder that demo, train, evaluate or select wrote"
        )
    adapters = {path: read(path / "adapter.json", _bytes(path / "adapter.json"))[0] for path in paths}
    is_outdated = results is not None and (folder / UNFINISHED).is_file()
    return Run(folder, results, trainings, batches, adapters, stored, unread, is_outdated)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise disk_error("read", path, error) from error


def _json(path: Path) -> Mapping[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(_bytes(path))
    except (ValueError, RecursionError) as error:
        raise StoreError(
            f"{path} is no valid JSON ({error}): it was cut short or changed; run the command that wrote it again, "
            "which samples nothing twice"
        ) from error
    if not isinstance(found, dict):
        raise StoreError(f"{path} holds no object; run the command that wrote it again, which samples nothing twice")
    return found


def _lines(path: Path) -> list[Mapping[str, Any]]:
    """The whole lines; the last one of a killed run may be cut."""
    found: list[Mapping[str, Any]] = []
    for line in _bytes(path).splitlines() if path.is_file() else ():
        try:
            item = json.loads(line)
        except ValueError:
            break
        if isinstance(item, dict):
            found.append(item)
    return found


def _stored(folder: Path) -> Stored | None:
    paths = sorted(folder.glob("*.parquet")) if folder.is_dir() else []
    parts: list[Any] = []
    engine: dict[str, str] = {}
    damaged = 0
    for path in paths:
        try:
            table = read_table(path, _COLUMNS)
        except DamagedShardError:
            damaged += 1
            continue
        engine = engine or json.loads((table.schema.metadata or {}).get(b"rheostat.engine", b"{}"))
        parts.append(table.replace_schema_metadata(None))
    if not parts:
        return None
    table = pa.concat_tables(parts)
    return Stored(
        model=engine.get("model"),
        fingerprint=engine.get("fingerprint"),
        tasks=sorted(set(table.column("task").unique().to_pylist())),
        seeds=sorted(table.column("seed").unique().to_pylist()),
        rows=_by_policy(table),
        damaged=damaged,
    )


def _by_policy(table: Any) -> list[Mapping[str, Any]]:
    """Per strategy or token policy: rollouts, problems, mean of the verdicts and of the tokens, what is missing."""
    cut = pc.equal(table.column("finish_reason"), FinishReason.LENGTH.value)
    right = pc.cast(table.column("correct"), pa.float64())
    table = table.append_column("right", right).append_column("cut", pc.cast(cut, pa.int64()))
    grouped = table.group_by("strategy", use_threads=False).aggregate(
        [
            ("tokens", "count"),
            ("problem_id", "count_distinct"),
            ("right", "mean"),
            ("right", "count"),
            ("tokens", "sum"),
            ("cut", "sum"),
        ]
    )
    rows: list[Mapping[str, Any]] = [
        {
            "policy": row["strategy"],
            "rollouts": row["tokens_count"],
            "problems": row["problem_id_count_distinct"],
            "right": row["right_mean"],
            "tokens": row["tokens_sum"],
            "cut": row["cut_sum"],
            "missing": row["tokens_count"] - row["right_count"],
        }
        for row in grouped.to_pylist()
    ]
    return sorted(rows, key=lambda row: (-row["rollouts"], row["policy"]))


def histories(run: Run) -> dict[str, Mapping[str, Any]]:
    """How the adapters of a run came about that left a ``training.json``, by what they are called."""
    found: dict[str, Mapping[str, Any]] = {}
    for training in run.trainings:
        own = reading.mapping(training, "training")
        if reading.items(own, "history"):
            found[str(training.get("kind") or ADAPTER)] = {**own, "strategies": _space(run, "sequence")}
        elif reading.items(training, "history"):  # as `train autodeco` leaves it
            found[NATURES["autodeco"]] = {key: training.get(key) for key in ("history", "kept_epoch")}
    return found


def histories_so_far(run: Run) -> dict[str, Mapping[str, Any]]:
    """The same of a run that was not judged, with the batches of its token level."""
    found = histories(run)
    if run.batches:
        sizes = [len(line["actions"]) for line in run.batches if isinstance(line.get("actions"), list)]
        names = _space(run, "token") or [f"action {n}" for n in range(1, max(sizes, default=0) + 1)]
        found[NATURES["token"]] = {"history": run.batches, "strategies": names}
    return found


def _space(run: Run, kind: str) -> list[str]:
    """The actions of the first adapter of a kind, by name."""
    for description in run.adapters.values():
        if description.kind == kind and description.action_space is not None:
            return [str(Strategy(**strategy.model_dump())) for strategy in description.action_space.strategies]
    return []


def adapters_of(run: Run) -> dict[Path, tuple[Results, str]]:
    """The folders of the adapters that a run judged, inside it or where `evaluate` found them, with the level that
    judged them and their name there. One that lies there no longer, or on the Hub, is left out."""
    if run.results is None:
        return {}
    token = reading.mapping(run.results, "token")
    found: dict[Path, tuple[Results, str]] = {}
    for results in (run.results, token):
        for policy in reading.learned(results):
            at_token = results is token
            names = {ADAPTER: "adapter", PLAIN_ADAPTER: "adapter-without-budget"}
            own = run.path / "token/adapter" if at_token else run.path / names.get(policy, policy)
            given = Path(policy)  # `evaluate` calls adapters by their folders
            inside = (path for path in run.adapters if path == own or path.resolve() == given.resolve())
            outside = given if (given / "adapter.json").is_file() else None
            if (folder := next(inside, outside)) is not None:
                found.setdefault(folder, (results, policy))
    return found
