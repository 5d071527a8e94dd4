"""The store's benchmark: both sides keep and find the same rollouts, and every operation is timed on both."""

from pathlib import Path
from typing import Any

import pytest

from rheostat.bench import store
from rheostat.bench.store import _jsonl, _store, bench_store, made_up_batches
from rheostat.console import Console

OPERATIONS = ("append", "open", "find a batch", "find all", "query")


def test_both_sides_find_what_was_appended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_BATCH", 300)
    batches = made_up_batches(2_000)
    rollouts = [rollout for batch in batches for rollout in batch]
    verdicts: dict[str, list[bool]] = {}
    for rollout in rollouts:
        if rollout.correct is not None:
            verdicts.setdefault(rollout.strategy, []).append(rollout.correct)
    assert len(verdicts) > 3
    assert sum(map(len, verdicts.values())) < len(rollouts)
    for operations in (_store(tmp_path, batches), _jsonl(tmp_path, batches)):
        assert tuple(operations) == OPERATIONS
        operations["append"]()
        assert operations["open"]() == 2_000
        assert operations["find a batch"]() == {rollout.key: rollout for rollout in batches[3]}
        assert operations["find all"]() == {rollout.key: rollout for rollout in rollouts}
        found: Any = operations["query"]()
        assert found == pytest.approx({name: sum(values) / len(values) for name, values in verdicts.items()})


def test_made_up_rollouts_are_as_they_say() -> None:
    batches = made_up_batches(2_000)
    assert [len(batch) for batch in batches] == [768, 768, 464]
    assert all(len({rollout.batch for rollout in batch}) == 1 for batch in batches)
    rollouts = [rollout for batch in batches for rollout in batch]
    assert len({rollout.key for rollout in rollouts}) == 2_000
    assert len({(rollout.problem_id, rollout.strategy, rollout.sample) for rollout in rollouts}) == 2_000
    assert all(len(rollout.text.split()) == rollout.tokens * 3 // 5 for rollout in rollouts)
    assert len({rollout.text for rollout in rollouts}) > 1_990
    assert batches == made_up_batches(2_000)


def test_ratios_are_those_of_speed_and_of_size() -> None:
    result = bench_store(1, Console(quiet=True), (900,))
    value = {row["case"]: row["value"] for row in result["rows"]}
    assert all(row["low"] <= row["value"] <= row["high"] for row in result["rows"])
    ratios = result["ratios"]
    assert set(ratios) == {
        *(f"900 {operation}: store/jsonl" for operation in OPERATIONS),
        "900 on disk: jsonl/store",
    }
    for operation in ("append", "find all"):  # rates: ours over theirs
        ours, theirs = value[f"900 {operation}: store"], value[f"900 {operation}: jsonl"]
        assert ratios[f"900 {operation}: store/jsonl"] == pytest.approx(ours / theirs, rel=0.02, abs=0.01)
    for operation in ("open", "query"):  # seconds: theirs over ours
        ours, theirs = value[f"900 {operation}: store"], value[f"900 {operation}: jsonl"]
        assert ratios[f"900 {operation}: store/jsonl"] == pytest.approx(theirs / ours, rel=0.1, abs=0.01)
    characters = sum(len(rollout.text) for batch in made_up_batches(900) for rollout in batch)
    assert characters < value["900 on disk: jsonl"] * 2**20 < characters + 900 * 600
    assert ratios["900 on disk: jsonl/store"] > 1.5
