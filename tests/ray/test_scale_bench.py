"""The scaling benchmark: what it calls busy is what its engines slept."""

import time

import pytest

from rheostat.bench import scale
from rheostat.bench.scale import SleepingEngine, fill, length_of, update_seconds
from rheostat.decoding.strategy import Strategy
from rheostat.engines.base import Request
from rheostat.types import Prompt


def requests(most: int = 512) -> list[Request]:
    return [Request(Prompt(f"p{n}", "x"), Strategy(1.0), sample, 0, most) for n in range(40) for sample in range(8)]


def test_lengths_are_uneven_and_within_the_budget() -> None:
    lengths = [length_of(request) for request in requests()]
    assert 4 <= min(lengths) < 100 < 300 < max(lengths) <= 512
    assert [length_of(request) for request in requests(60)] == [min(length, 60) for length in lengths]


def test_the_engine_is_busy_as_long_as_its_longest_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "_STEP", 1e-3)
    asked = requests(200)[:16]
    start = time.perf_counter()
    written = SleepingEngine().generate(asked)
    seconds = time.perf_counter() - start
    assert [len(done.token_ids) for done in written] == [length_of(request) for request in asked]
    assert max(len(done.token_ids) for done in written) * 1e-3 <= seconds < 1


def test_workers_are_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "_BATCHES", 6)
    monkeypatch.setattr(scale, "_MOST", 120)
    found = fill(2)
    assert 0.5 < found.efficiency <= 1
    assert 0 < found.driver < 1
    assert found.rollouts > 1
    assert found.broadcast < 20


def test_an_update_of_more_tokens_takes_longer() -> None:
    assert 0 < min(update_seconds(64, 100) for _ in range(3)) < min(update_seconds(64, 20_000) for _ in range(3))
