"""One shard of the rollout store: the schema, and a batch of rollouts to and from Parquet bytes."""

import operator
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rheostat.errors import StoreError
from rheostat.files import disk_error
from rheostat.types import FinishReason

FORMAT_VERSION = 4
"""Stands in every shard's Parquet metadata; a store of another version is refused."""

_FORMAT_KEY = b"rheostat.rollouts.format"

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("problem_id", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("member", pa.string(), nullable=False),
        pa.field("strategy", pa.string(), nullable=False),
        pa.field("order", pa.string(), nullable=False),
        pa.field("sample", pa.int32(), nullable=False),
        pa.field("seed", pa.uint64(), nullable=False),
        pa.field("max_tokens", pa.int32(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("tokens", pa.int32(), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("correct", pa.bool_()),
        pa.field("detail", pa.string(), nullable=False),
        pa.field("answer", pa.string()),
        pa.field("batch", pa.string(), nullable=False),
        pa.field("cot", pa.bool_(), nullable=False),
    ],
    metadata={_FORMAT_KEY: str(FORMAT_VERSION).encode()},
)
"""The columns of a shard, the fields of :class:`Rollout` in their order."""

Row = tuple[Any, ...]
"""A rollout in memory, its fields in the order of :data:`SCHEMA`: half the memory traffic of an object, and the garbage
collector looks at a tuple of plain values only once."""

_FINISH_REASONS = {reason.value: reason for reason in FinishReason}
_as_row = operator.attrgetter(*SCHEMA.names)
_REPEATED = ("task", "member", "strategy", "order", "problem_id", "batch", "detail", "answer")  # by many rows


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled and judged completion.

    Attributes:
        key: content hash of everything that shapes the completion; unique in a store.
        problem_id: the problem that was asked.
        task: its task.
        member: its data set inside a mixture.
        strategy: the decoding strategy, as ``str(Strategy)`` writes it, or the token policy's key and parallel budget.
        order: the order of the transforms.
        sample: the sample's number, from 0.
        seed: the run's seed, 0 to 2**64 - 1.
        max_tokens: the token budget b.
        text: what the model wrote.
        tokens: how many tokens it generated.
        finish_reason: its own end, or the token budget.
        correct: the verdict; None when the infrastructure failed to give one.
        detail: what the verifier said about it.
        answer: what the verifier took for the answer; None where nothing could vote in self-consistency.
        batch: the batch that was generated together, which is also the name of the shard.
        cot: whether the prompt asked for a chain of thought.
    """

    key: str
    problem_id: str
    task: str
    member: str
    strategy: str
    order: str
    sample: int
    seed: int
    max_tokens: int
    text: str
    tokens: int
    finish_reason: FinishReason
    correct: bool | None
    detail: str
    answer: str | None
    batch: str
    cot: bool = False


class DamagedShardError(Exception):
    """A shard's content cannot be read. It never leaves the store, which sets the shard aside."""


def encode(rollouts: Sequence[Rollout], provenance: Mapping[str, str], path: Path) -> bytes:
    """A batch as the bytes of one Parquet file, with page checksums; ``path`` is where they will go.

    Raises:
        StoreError: a value does not fit its column.
    """
    metadata = {f"rheostat.{name}": value for name, value in provenance.items()}
    schema = SCHEMA.with_metadata({**metadata, **SCHEMA.metadata})
    sink = pa.BufferOutputStream()
    try:
        columns = zip(zip(*as_rows(rollouts), strict=True), schema, strict=True)
        arrays = [pa.array(column, type=field.type) for column, field in columns]
        pq.write_table(pa.table(arrays, schema=schema), sink, compression="zstd", write_page_checksum=True)
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise StoreError(
            f"cannot write {path}: a rollout holds a value that does not fit its column: {error}"
        ) from error
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def read_table(path: Path, columns: list[str] | None = None) -> Any:
    """A shard, or some columns of it, as an Arrow table, page checksums verified.

    Raises:
        DamagedShardError: it is no Parquet file, is cut short, or a checksum differs.
        StoreError: a foreign file or format version, or the operating system refuses to read it.
    """
    try:
        with pa.OSFile(str(path)) as source:
            file = pq.ParquetFile(source, page_checksum_verification=True)
            _check_format(path, file.schema_arrow)
            return file.read(columns=columns, use_threads=False)
    except (OSError, ValueError, pa.ArrowException) as error:
        # What the operating system refuses carries an error number; what Arrow cannot make sense of does not.
        if isinstance(error, OSError) and error.errno is not None:
            raise disk_error("read", path, error) from error
        raise DamagedShardError(str(error).splitlines()[0] if str(error) else type(error).__name__) from error


def _check_format(path: Path, schema: Any) -> None:
    version = (schema.metadata or {}).get(_FORMAT_KEY)
    if version is None:
        raise StoreError(f"{path} is no shard of a rollout store; move it out of the folder or choose another folder")
    if version != SCHEMA.metadata[_FORMAT_KEY]:
        raise StoreError(
            f"{path} has format version {version.decode(errors='replace')} and this Rheostat reads {FORMAT_VERSION}; "
            "choose another folder or the Rheostat that wrote it"
        )
    if not schema.equals(SCHEMA):
        raise StoreError(f"{path} has other columns than a rollout store's; move it out of the folder")


def decode(table: Any) -> list[Row]:
    """The rows of a whole shard; texts that they share are held once. ``Rollout(*row)`` makes a rollout of one."""
    columns = {name: table.column(name).to_pylist() for name in SCHEMA.names}
    for name in _REPEATED:
        columns[name] = [value if value is None else sys.intern(value) for value in columns[name]]
    columns["finish_reason"] = [_FINISH_REASONS[value] for value in columns["finish_reason"]]
    return list(zip(*columns.values(), strict=True))


def as_rows(rollouts: Sequence[Rollout]) -> list[Row]:
    """The same rows from rollouts: what :func:`decode` gives after :func:`encode`."""
    return [_as_row(rollout) for rollout in rollouts]
