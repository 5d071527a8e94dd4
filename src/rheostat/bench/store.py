"""`rheostat bench store`: the rollout store beside one file of JSON lines, with 10,000 and with 100,000 rollouts.

Rollouts are made up and come in batches of 768. The peer appends a batch's lines to its file, flushed and synced, and
has to read all of it to find anything. Whoever reads starts from closed files, which the system still has in memory.
"""

import hashlib
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rheostat.bench.rows import row
from rheostat.console import Console
from rheostat.decoding.spaces import TABLE_13
from rheostat.environment import machine, versions
from rheostat.rollouts.shards import SCHEMA, as_rows
from rheostat.rollouts.store import Rollout, RolloutStore
from rheostat.types import FinishReason

_BATCH = 768
_SAMPLES, _LONGEST = 16, 256
_WORDS = 2_000
_RATES = ("append", "find all")  # told in rollouts per second, the rest in seconds
_ACCURACY = "SELECT strategy, avg(correct::INT) FROM rollouts GROUP BY strategy"


def bench_store(repeats: int, console: Console, counts: Sequence[int] = (10_000, 100_000)) -> dict[str, Any]:
    """All operations on both sides, ``repeats`` times in turn; medians, ranges, and the median ratios of speed."""
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    for count in counts:
        batches = made_up_batches(count)
        seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
        sizes: dict[str, int] = {}
        with console.progress(f"{count} rollouts", repeats, "") as bar:
            for repeat in range(repeats):
                with tempfile.TemporaryDirectory() as folder:
                    sides = {"store": _store(Path(folder), batches), "jsonl": _jsonl(Path(folder), batches)}
                    for operation in sides["store"]:
                        for side, operations in sides.items():
                            start = time.perf_counter()
                            operations[operation]()
                            seconds[operation, side].append(time.perf_counter() - start)
                    sizes["store"] = sum(path.stat().st_size for path in (Path(folder) / "store").glob("*.parquet"))
                    sizes["jsonl"] = (Path(folder) / "rollouts.jsonl").stat().st_size
                bar(repeat + 1, repeats, 0)
        for (operation, side), values in seconds.items():
            is_rate = operation in _RATES
            shown = [count / value for value in values] if is_rate else values
            rows.append(row(f"{count} {operation}: {side}", shown, "rollouts/s" if is_rate else "s"))
            if side == "store":
                pairs = zip(seconds[operation, "jsonl"], values, strict=True)
                speed = statistics.median(theirs / ours for theirs, ours in pairs)
                ratios[f"{count} {operation}: store/jsonl"] = round(speed, 3)
        rows += [row(f"{count} on disk: {side}", [size / 2**20], "MiB") for side, size in sizes.items()]
        ratios[f"{count} on disk: jsonl/store"] = round(sizes["jsonl"] / sizes["store"], 3)
    return {"bench": "store", "machine": machine(), "versions": versions(), "rows": rows, "ratios": ratios}


def _store(folder: Path, batches: Sequence[Sequence[Rollout]]) -> dict[str, Callable[[], object]]:
    path = folder / "store"

    def append() -> None:
        with RolloutStore(path) as store:
            for batch in batches:
                store.append(batch)

    def size() -> int:
        with RolloutStore(path) as store:
            return len(store)

    def find(keys: Sequence[str]) -> dict[str, Rollout]:
        with RolloutStore(path) as store:
            return store.find(keys)

    def accuracy() -> dict[str, float]:
        with RolloutStore(path) as store:
            return dict(store.query(_ACCURACY).fetchall())

    return _operations(batches, append, size, find, accuracy)


def _jsonl(folder: Path, batches: Sequence[Sequence[Rollout]]) -> dict[str, Callable[[], object]]:
    path = folder / "rollouts.jsonl"

    def append() -> None:
        with path.open("a") as file:
            for batch in batches:
                for row in as_rows(batch):
                    file.write(json.dumps(dict(zip(SCHEMA.names, row, strict=True))) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def read() -> dict[str, dict[str, Any]]:
        with path.open() as file:
            return {row["key"]: row for row in map(json.loads, file)}

    def find(keys: Sequence[str]) -> dict[str, Rollout]:
        rows = read()
        found = {key: rows[key] for key in keys if key in rows}
        return {
            key: Rollout(**row | {"finish_reason": FinishReason(row["finish_reason"])}) for key, row in found.items()
        }

    def accuracy() -> dict[str, float]:
        verdicts: dict[str, list[bool]] = defaultdict(list)
        for found in read().values():
            if found["correct"] is not None:
                verdicts[found["strategy"]].append(found["correct"])
        return {strategy: statistics.fmean(values) for strategy, values in verdicts.items()}

    return _operations(batches, append, lambda: len(read()), find, accuracy)


def _operations(
    batches: Sequence[Sequence[Rollout]],
    append: Callable[[], None],
    size: Callable[[], int],
    find: Callable[[Sequence[str]], dict[str, Rollout]],
    accuracy: Callable[[], dict[str, float]],
) -> dict[str, Callable[[], object]]:
    """What is timed, in the order in which it is."""
    keys = [rollout.key for batch in batches for rollout in batch]
    middle = [rollout.key for rollout in batches[len(batches) // 2]]
    return {
        "append": append,
        "open": size,
        "find a batch": lambda: find(middle),
        "find all": lambda: find(keys),
        "query": accuracy,
    }


def made_up_batches(count: int, seed: int = 0) -> list[list[Rollout]]:
    """``count`` rollouts: texts of up to 153 words, some of them frequent; one verdict in a thousand is missing."""
    rng = np.random.default_rng(seed)
    letters = rng.choice(list("etaoinshrdlu"), (_WORDS, 8))
    words = np.array(["".join(word[:length]) for word, length in zip(letters, rng.integers(1, 9, _WORDS), strict=True)])
    tokens_N = rng.integers(8, _LONGEST + 1, count)
    word_counts_N = tokens_N * 3 // 5
    drawn = words[(_WORDS * rng.random(word_counts_N.sum()) ** 3).astype(int)].tolist()
    ends_N = word_counts_N.cumsum()
    correct_N, missing_N = rng.random(count) < 0.4, rng.random(count) < 0.001
    strategies = [str(strategy) for strategy in TABLE_13]
    rollouts = []
    for n in range(count):
        problem, strategy = divmod(n // _SAMPLES, len(strategies))
        tokens = int(tokens_N[n])
        rollouts.append(
            Rollout(
                key=hashlib.blake2b(f"{seed} {n}".encode(), digest_size=16).hexdigest(),
                problem_id=f"train-{problem}",
                task="made up",
                member=f"kind {problem % 6}",
                strategy=strategies[strategy],
                order="vllm",
                sample=n % _SAMPLES,
                seed=seed,
                max_tokens=_LONGEST,
                text=" ".join(drawn[ends_N[n] - word_counts_N[n] : ends_N[n]]),
                tokens=tokens,
                finish_reason=FinishReason.LENGTH if tokens == _LONGEST else FinishReason.STOP,
                correct=None if missing_N[n] else bool(correct_N[n]),
                detail="" if correct_N[n] else "not equal",
                answer=str(problem % 97),
                batch=f"batch-{n // _BATCH:06}",
            )
        )
    return [rollouts[start : start + _BATCH] for start in range(0, count, _BATCH)]
