"""The rollout store: what was sampled and judged, kept in Parquet shards that are whole or not there.

A store is a folder. Every batch of rollouts is one shard, ``<batch>.parquet``, written in one atomic step, so a killed
run loses the batch that was under way and nothing else. Shards are never changed. Any tool that reads Parquet reads
them; inside Rheostat, DuckDB does::

    with RolloutStore("runs/demo/rollouts") as store:
        store.query("SELECT strategy, avg(correct::INT) AS accuracy, count(*) AS n FROM rollouts GROUP BY 1").show()
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from filelock import FileLock, Timeout

from rheostat.errors import StoreError
from rheostat.files import atomic_write, disk_error, make_folder, sync_folder
from rheostat.rollouts.shards import SCHEMA, DamagedShardError, Rollout, Row, as_rows, decode, encode, read_table

if TYPE_CHECKING:
    import duckdb

logger = logging.getLogger(__name__)

__all__ = ["SCHEMA", "Rollout", "RolloutStore"]


_TOKENS = SCHEMA.names.index("tokens")


@dataclass(slots=True, eq=False)
class _Shard:
    """One file of the store: the seconds that its batch took, at which position each key stands, and the rows once one
    was asked for."""

    path: Path
    seconds: float | None = None
    positions: dict[str, int] = field(default_factory=dict)
    rows: list[Row] | None = None


class RolloutStore:
    """A folder of rollouts that one process at a time reads and extends.

    Opening reads the keys of all shards, under a millisecond each; the rows of a shard are read, some milliseconds for
    768, when one of them is first asked for, and stay in memory. A rollout costs about 0.15 kB of memory from the
    opening on, and 0.3 kB and its text more once it is read. One thread at a time may use a store.

    A shard that cannot be read (a disk error, a copy that broke off) is renamed to ``*.damaged`` with one warning in
    the log, and its rollouts count as not there, so that the next collection samples them again.

    Args:
        folder: the store; created where it is missing.

    Raises:
        StoreError: another process has the store open, the folder cannot be used, a shard is no shard of this format
            version, or two shards hold the same key.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = make_folder(folder)
        self._shards: list[_Shard] = []
        self._index: dict[str, _Shard] = {}
        self._database: duckdb.DuckDBPyConnection | None = None
        self._view_is_current = False
        # The operating system holds the lock for the process: a killed owner cannot leave it behind.
        self._lock = FileLock(self.folder / ".lock", thread_local=False)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise StoreError(
                f"{self.folder} is in use by another Rheostat process; wait for it to end or choose another folder"
            ) from None
        except OSError as error:
            raise disk_error("open the rollout store", self.folder, error) from error
        try:
            self._open_shards()
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __contains__(self, key: object) -> bool:
        return key in self._index

    def __len__(self) -> int:
        return len(self._index)

    def close(self) -> None:
        """Let go of the folder; a second call does nothing. Relations of :meth:`query` end here."""
        if self._database is not None:
            self._database.close()
            self._database = None
        self._lock.release()

    def append(self, rollouts: Sequence[Rollout], provenance: Mapping[str, str] | None = None) -> None:
        """Store one batch as one shard; when this returns, it is on the disk.

        Args:
            rollouts: at least one, all of one ``batch``, with keys that are not stored yet.
            provenance: facts about the whole batch (such as the engine's), kept in the shard's Parquet metadata
                under ``rheostat.<name>``; ``seconds`` is the time that it took.

        Raises:
            StoreError: the batch is empty, mixed, holds a stored key or one twice, a value does not fit its column,
                or the disk refuses; nothing of the batch is stored then, and all that was stored stays.
        """
        self._check_open()
        name = self._check_batch(rollouts)
        shard = _Shard(self.folder / f"{name}.parquet", _seconds((provenance or {}).get("seconds")))
        atomic_write(shard.path, encode(rollouts, provenance or {}, shard.path))
        shard.rows = as_rows(rollouts)
        self._add(shard, [rollout.key for rollout in rollouts])

    def find(self, keys: Iterable[str]) -> dict[str, Rollout]:
        """Those rollouts of ``keys`` that are stored and readable, by key, in the order of ``keys``.

        Raises:
            StoreError: the store is closed, or the operating system refuses a file.
        """
        self._check_open()
        found = {}
        for key in keys:
            if (shard := self._index.get(key)) is None:
                continue
            rows = shard.rows or self._load(shard)
            if rows is not None:
                found[key] = Rollout(*rows[shard.positions[key]])
        return found

    def get(self, keys: Iterable[str]) -> list[Rollout]:
        """The rollouts of ``keys``, in their order; a key may be asked for twice.

        Raises:
            StoreError: a key is not stored, or the shard that holds it turns out to be damaged.
        """
        wanted = list(keys)
        found = self.find(wanted)
        missing = [key for key in wanted if key not in found]
        if missing:
            raise StoreError(
                f"{self.folder} lacks {len(missing)} of {len(wanted)} rollouts, the first {missing[0]}; "
                "run the collection again to sample them"
            )
        return [found[key] for key in wanted]

    def seconds(self, keys: Iterable[str]) -> float | None:
        """How long these rollouts took to sample and to judge, in whichever run did it: of the time of each batch, the
        share of its tokens that is theirs. None where the time of a batch is not known.

        Raises:
            StoreError: as :meth:`get`.
        """
        own = {rollout.key: rollout.tokens for rollout in self.get(dict.fromkeys(keys))}
        rate: dict[int, float] = {}  # seconds per token of each batch
        for key in own:
            shard = self._index[key]
            if shard.seconds is None or shard.rows is None:
                return None
            if id(shard) not in rate:
                rate[id(shard)] = shard.seconds / (sum(row[_TOKENS] for row in shard.rows) or 1)
        return sum(tokens * rate[id(self._index[key])] for key, tokens in own.items())

    def query(self, sql: str) -> "duckdb.DuckDBPyRelation":
        """Ask all stored rollouts, as the table ``rollouts`` with the columns of :data:`SCHEMA`, in DuckDB's SQL.

        Example:
            >>> store.query("SELECT strategy, avg(tokens) FROM rollouts GROUP BY strategy").fetchall()
            [('T=1', 212.5), ('greedy', 180.0)]

        The column ``order`` is a word of SQL; write it ``"order"``.

        Returns:
            A relation that reads the shards when it is evaluated (``fetchall``, ``df``, ``arrow``, ``show``), to be
            evaluated before the next :meth:`append` and before the store is closed.

        Raises:
            StoreError: the store is closed, or DuckDB does not understand the statement.
        """
        import duckdb  # only here: it costs 50 ms of every start, and few commands ask

        self._check_open()
        if self._database is None:
            # Names in SQL mean tables, never the variables of whoever calls.
            self._database = duckdb.connect(config={"python_enable_replacements": False})
        try:
            if not self._view_is_current:
                self._create_view(self._database)
            return self._database.sql(sql)
        except duckdb.Error as error:
            raise StoreError(f"query on {self.folder}: {error}") from error

    def _create_view(self, database: "duckdb.DuckDBPyConnection") -> None:
        if self._shards:
            # read_parquet takes paths for patterns, in which a bracketed character stands for itself.
            paths = [re.sub(r"[*?\[]", r"[\g<0>]", str(shard.path)) for shard in self._shards]
            listed = ", ".join("'" + path.replace("'", "''") + "'" for path in paths)
            source = f"read_parquet([{listed}])"
        else:
            database.register("no_rollouts", SCHEMA.empty_table())
            source = "no_rollouts"
        database.execute(f"CREATE OR REPLACE VIEW rollouts AS SELECT * FROM {source}")
        self._view_is_current = True

    def _check_open(self) -> None:
        if not self._lock.is_locked:
            raise StoreError(f"the rollout store {self.folder} is closed; open it again")

    def _check_batch(self, rollouts: Sequence[Rollout]) -> str:
        """The batch's name, if it can be stored."""
        if not rollouts:
            raise StoreError(f"{self.folder}: an empty batch of rollouts cannot be stored")
        name = rollouts[0].batch
        if not re.fullmatch(r"[\w-]+", name):
            raise StoreError(f"{self.folder}: a batch is named by letters, digits, '-' and '_', got {name!r}")
        seen: set[str] = set()
        for rollout in rollouts:
            if rollout.batch != name:
                raise StoreError(f"{self.folder}: one shard holds one batch, got {name!r} and {rollout.batch!r}")
            if rollout.key in self._index:
                raise StoreError(
                    f"{self.folder}: rollout {rollout.key} is already stored in {self._index[rollout.key].path.name}"
                )
            if rollout.key in seen:
                raise StoreError(f"{self.folder}: rollout {rollout.key} stands twice in the batch {name!r}")
            seen.add(rollout.key)
        if (self.folder / f"{name}.parquet").exists():
            raise StoreError(f"{self.folder}: there is already a shard for the batch {name!r}")
        return name

    def _open_shards(self) -> None:
        try:
            for leftover in self.folder.glob(".*.parquet.*.tmp"):  # of a process that was killed while it wrote
                leftover.unlink(missing_ok=True)
            paths = sorted(self.folder.glob("*.parquet"))
        except OSError as error:
            raise disk_error("open the rollout store", self.folder, error) from error
        for path in paths:
            shard = _Shard(path)
            try:
                table = read_table(path, ["key"])
            except DamagedShardError as error:
                self._set_aside(shard, error)
            else:
                shard.seconds = _seconds((table.schema.metadata or {}).get(b"rheostat.seconds"))
                self._add(shard, table.column("key").to_pylist())

    def _add(self, shard: _Shard, keys: list[str]) -> None:
        for position, key in enumerate(keys):
            if (other := self._index.setdefault(key, shard)) is not shard or key in shard.positions:
                raise StoreError(
                    f"{self.folder}: {other.path.name} and {shard.path.name} both hold the rollout {key}; "
                    "move one of the two files out of the folder"
                )
            shard.positions[key] = position
        self._shards.append(shard)
        self._view_is_current = False

    def _load(self, shard: _Shard) -> list[Row] | None:
        """Bring a shard's rows into memory; None when it is damaged."""
        try:
            shard.rows = decode(read_table(shard.path))
        except DamagedShardError as error:
            self._set_aside(shard, error)
        return shard.rows

    def _set_aside(self, shard: _Shard, reason: Exception) -> None:
        aside = shard.path.with_name(f"{shard.path.name}.damaged")
        number = 1
        while aside.exists():
            number += 1
            aside = shard.path.with_name(f"{shard.path.name}.{number}.damaged")
        try:
            shard.path.rename(aside)
            sync_folder(self.folder)
        except OSError as error:
            raise disk_error("set aside the damaged shard", shard.path, error) from error
        logger.warning("%s cannot be read (%s): renamed to %s, to be sampled again", shard.path, reason, aside.name)
        for key in shard.positions:
            self._index.pop(key, None)
        if shard in self._shards:
            self._shards.remove(shard)
        self._view_is_current = False


def _seconds(told: str | bytes | None) -> float | None:
    return None if told is None else float(told)
