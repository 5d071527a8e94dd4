import errno
import logging
import os
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rheostat.errors import StoreError
from rheostat.rollouts.shards import DamagedShardError, as_rows, decode, encode, read_table
from rheostat.rollouts.store import SCHEMA, Rollout, RolloutStore
from rheostat.types import FinishReason


def rollout(number: int, batch: str = "b0", **changes: object) -> Rollout:
    base = Rollout(
        key=f"key-{number}",
        problem_id=f"problem-{number // 4}",
        task="sums",
        member="small",
        strategy="T=0.7",
        order="vllm",
        sample=number % 4,
        seed=2**64 - 1,
        max_tokens=32,
        text=f"text {number} µ\x00\n",
        tokens=number,
        finish_reason=FinishReason.LENGTH if number % 2 else FinishReason.STOP,
        correct=(True, False, None)[number % 3],
        detail="",
        answer=(None, "", "µ 3")[number % 3],
        batch=batch,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def batch(name: str, *numbers: int) -> list[Rollout]:
    return [rollout(number, name) for number in numbers]


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def test_the_schema_is_the_rollouts_fields() -> None:
    assert tuple(SCHEMA.names) == tuple(field.name for field in fields(Rollout))


def test_rollouts_come_back_equal_in_any_order_from_another_opening(tmp_path: Path) -> None:
    first, second = batch("b0", 0, 1, 2), batch("b1", 3, 4)
    with RolloutStore(tmp_path / "new" / "store") as store:
        store.append(first)
        store.append(second)
        assert store.get(["key-4", "key-0"]) == [second[1], first[0]]
    with RolloutStore(tmp_path / "new" / "store") as store:
        assert len(store) == 5
        assert "key-3" in store
        assert "key-9" not in store
        assert store.get(["key-4", "key-0", "key-4"]) == [second[1], first[0], second[1]]
        assert store.get(f"key-{number}" for number in range(5)) == [*first, *second]
        assert isinstance(store.get(["key-1"])[0].finish_reason, FinishReason)
        assert list(store.find(["key-3", "nobody", "key-1"])) == ["key-3", "key-1"]
        with pytest.raises(StoreError, match="lacks 1 of 2 rollouts, the first nobody"):
            store.get(["key-1", "nobody"])


@pytest.mark.parametrize(
    ("rollouts", "message"),
    [
        ([], "empty batch"),
        (batch("b1", 5, 5), "key-5 stands twice"),
        (batch("b1", 6, 1), r"key-1 is already stored in b0\.parquet"),
        ([rollout(6, "b1"), rollout(7, "b2")], "one shard holds one batch"),
        (batch("../b1", 6), "a batch is named by letters"),
        (batch("b0", 6), "already a shard for the batch 'b0'"),
        ([rollout(6, "b1", seed=-1)], "does not fit its column"),
        ([rollout(6, "b1", text=None)], "does not fit its column"),
        ([rollout(6, "b1", text="\ud800")], "does not fit its column"),
    ],
)
def test_append_refuses_and_stores_nothing(tmp_path: Path, rollouts: list[Rollout], message: str) -> None:
    with RolloutStore(tmp_path) as store:
        store.append(batch("b0", 0, 1))
        with pytest.raises(StoreError, match=message):
            store.append(rollouts)
        assert len(store) == 2
    assert shards(tmp_path) == ["b0.parquet"]


def test_query_sees_every_shard_also_those_of_later(tmp_path: Path) -> None:
    folder = tmp_path / "it's [a] *store?"
    with RolloutStore(folder) as store:
        assert store.query("SELECT count(*), max(seed) FROM rollouts").fetchall() == [(0, None)]
        store.append(batch("b0", 0, 1, 2))
        assert store.query('SELECT count(*), any_value("order") FROM rollouts').fetchall() == [(3, "vllm")]
        early = store.query("SELECT sum(tokens) FROM rollouts")
        store.append(batch("b1", 3))
        assert store.query("SELECT batch, seed FROM rollouts WHERE tokens = 3").fetchall() == [("b1", 2**64 - 1)]
        assert early.fetchall() in ([(3,)], [(6,)])
        with pytest.raises(StoreError, match="nothing"):
            store.query("SELECT nothing FROM rollouts")


def test_provenance_stands_in_the_metadata(tmp_path: Path) -> None:
    with RolloutStore(tmp_path) as store:
        store.append(batch("b0", 0), provenance={"engine": '{"threads": 2}'})
        rows = store.query(f"SELECT key, value FROM parquet_kv_metadata('{tmp_path}/*.parquet')").fetchall()
    metadata = dict(rows)
    assert metadata[b"rheostat.engine"] == b'{"threads": 2}'
    assert metadata[b"rheostat.rollouts.format"] == b"4"


def test_the_time_of_a_batch_belongs_to_its_tokens(tmp_path: Path) -> None:
    """Batches of 10 + 30 and of 5 tokens, which took two seconds and one: 0.5 and 1.5 for the first two rollouts."""
    tokens = {0: 10, 1: 30, 2: 5, 3: 7}
    rows = {n: rollout(n, f"b{n // 2}", tokens=size) for n, size in tokens.items()}
    for reopened in (False, True):
        with RolloutStore(tmp_path) as store:
            if not reopened:
                store.append([rows[0], rows[1]], {"seconds": "2"})
                store.append([rows[2]], {"seconds": "1"})
                store.append([replace(rows[3], batch="b9")])
            keys = [own.key for own in rows.values()]
            assert [store.seconds(keys[n : n + 1]) for n in range(3)] == [0.5, 1.5, 1.0]
            assert store.seconds([*keys[:3], keys[0]]) == 3.0  # a key that is asked for twice counts once
            assert store.seconds(keys) is None  # the last batch was stored before batches knew their time
            with pytest.raises(StoreError, match="lacks 1 of 1"):
                store.seconds(["absent"])


def damage_tail(data: bytes) -> bytes:
    return data[: len(data) // 2]


def damage_page(data: bytes) -> bytes:
    """One flipped bit in the pages of the column ``text``, which opening does not read."""
    column = pq.ParquetFile(pa.BufferReader(data)).metadata.row_group(0).column(SCHEMA.names.index("text"))
    start = column.dictionary_page_offset or column.data_page_offset
    position = start + column.total_compressed_size - 4
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


def damage_all(_data: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [damage_tail, damage_page, damage_all])
def test_a_damaged_shard_is_set_aside_once_and_counts_as_not_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: object
) -> None:
    for round_number in (1, 2):
        with RolloutStore(tmp_path) as store:
            if round_number == 1:
                store.append(batch("b1", 2, 3))
            store.append(batch("b0", 0, 1))
        path = tmp_path / "b0.parquet"
        path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
        caplog.clear()
        with caplog.at_level(logging.WARNING), RolloutStore(tmp_path) as store:
            assert list(store.find(["key-0", "key-2", "key-1", "key-3"])) == ["key-2", "key-3"]
            assert "key-0" not in store
            assert len(store) == 2
            assert store.query("SELECT count(*) FROM rollouts").fetchall() == [(2,)]
        assert len(caplog.records) == 1
        assert str(path) in caplog.text
    assert shards(tmp_path) == ["b0.parquet.2.damaged", "b0.parquet.damaged", "b1.parquet"]


def test_no_flipped_bit_of_a_page_changes_a_rollout_unnoticed(tmp_path: Path) -> None:
    rollouts = batch("b0", 0, 1, 2)
    path = tmp_path / "b0.parquet"
    data = encode(rollouts, {}, path)
    columns = pq.ParquetFile(pa.BufferReader(data)).metadata.row_group(0)
    last = columns.column(columns.num_columns - 1)
    pages_end = (last.dictionary_page_offset or last.data_page_offset) + last.total_compressed_size
    noticed = 0
    for position in range(4, pages_end, 3):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1 << position % 8]) + data[position + 1 :])
        try:
            assert decode(read_table(path)) == as_rows(rollouts)  # the bit did not matter
        except DamagedShardError:
            noticed += 1
    assert noticed > 100


def test_foreign_files_and_versions_are_refused(tmp_path: Path) -> None:
    for name, metadata, message in (
        ("version", {b"rheostat.rollouts.format": b"1"}, "has format version 1 and this Rheostat reads 4"),
        ("foreign", None, "is no shard of a rollout store"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        pq.write_table(pa.table({"key": ["a"]}).replace_schema_metadata(metadata), folder / "x.parquet")
        for _ in range(2):  # the second time shows that a refusal lets go of the lock and changes nothing
            with pytest.raises(StoreError, match=message):
                RolloutStore(folder)


def test_a_key_in_two_shards_names_both(tmp_path: Path) -> None:
    with RolloutStore(tmp_path) as store:
        store.append(batch("b0", 0, 1))
    (tmp_path / "copy.parquet").write_bytes((tmp_path / "b0.parquet").read_bytes())
    with pytest.raises(StoreError, match=r"b0\.parquet and copy\.parquet both hold the rollout key-0"):
        RolloutStore(tmp_path)


def test_leftover_temporary_files_are_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".b0.parquet.1234abcd.tmp", "notes.tmp"):
        (tmp_path / name).write_text("half")
    RolloutStore(tmp_path).close()
    assert shards(tmp_path) == ["notes.tmp"]


def test_a_closed_store_says_so_and_lets_go(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path)
    with pytest.raises(StoreError, match="in use by another Rheostat process; wait for it to end or choose"):
        RolloutStore(tmp_path)
    store.close()
    store.close()
    with pytest.raises(StoreError, match="is closed"):
        store.append(batch("b0", 0))
    with pytest.raises(StoreError, match="is closed"):
        store.find([])
    with pytest.raises(StoreError, match="is closed"):
        store.query("SELECT 1")
    RolloutStore(tmp_path).close()


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX")
def test_a_killed_owner_leaves_no_lock(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from rheostat.rollouts.store import RolloutStore\n"
        "store = RolloutStore(sys.argv[1])\n"
        "print('open', flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "open\n"
        with pytest.raises(StoreError, match="in use"):
            RolloutStore(tmp_path)
        owner.send_signal(signal.SIGKILL)
        owner.wait(timeout=20)
    RolloutStore(tmp_path).close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_refusing_disk_costs_only_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(_descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    with RolloutStore(tmp_path) as store:
        store.append(batch("b0", 0, 1))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", refuse)
            with pytest.raises(StoreError, match=str(tmp_path)):
                store.append(batch("b1", 2))
        assert shards(tmp_path) == ["b0.parquet"]
        assert len(store) == 2
        store.append(batch("b1", 2))
    with RolloutStore(tmp_path) as store:
        assert store.get(["key-0", "key-1", "key-2"]) == [rollout(0), rollout(1), rollout(2, "b1")]


@pytest.fixture
def mount(tmp_path: Path) -> object:
    """A file system of 1 MB that is really full or really read-only; needs the right to mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=20)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True, timeout=20)


def test_a_disk_that_is_really_full(mount: Path) -> None:
    noise = os.urandom(2_000_000).hex()
    with RolloutStore(mount) as store:
        store.append(batch("b0", 0, 1))
        with pytest.raises(StoreError, match="the disk is full; free some space and run again"):
            store.append([rollout(2, "b1", text=noise)])
        assert shards(mount) == ["b0.parquet"]
        store.append(batch("b1", 2))
    with RolloutStore(mount) as store:
        assert len(store) == 3


def test_a_disk_that_is_really_read_only(mount: Path) -> None:
    with RolloutStore(mount) as store:
        store.append(batch("b0", 0, 1))
    subprocess.run(["mount", "-o", "remount,ro", str(mount)], check=True, timeout=20)
    with pytest.raises(StoreError, match="read-only file system; choose a folder that can be written"):
        RolloutStore(mount)
    with pytest.raises(StoreError, match="read-only file system"):
        RolloutStore(mount / "new")
