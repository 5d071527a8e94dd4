"""The sampler that the benchmark compares with draws from the distributions that it should."""

from collections import Counter

import pytest
import torch
from scipy.stats import chisquare

from rheostat.bench import sampler
from rheostat.bench.sampler import bench_sampler, made_up_logits, sorting_draw
from rheostat.console import Console
from rheostat.decoding.policy import SamplingParameters
from rheostat.decoding.spaces import TABLE_11, TABLE_12, TABLE_13, TABLE_14
from rheostat.decoding.strategy import Order, Strategy
from rheostat.decoding.transforms import transform

DRAWS = 20_000


@pytest.mark.parametrize("strategy", dict.fromkeys([*TABLE_11, *TABLE_12, *TABLE_13, *TABLE_14]), ids=str)
def test_the_peer_draws_what_it_should(strategy: Strategy) -> None:
    torch.manual_seed(0)
    logits_V = made_up_logits(3, 24)[1]
    p_V = transform(logits_V[None].double(), SamplingParameters.of([strategy]), Order.VLLM)[0]
    counts = Counter(sorting_draw(logits_V.expand(DRAWS, -1), SamplingParameters.of([strategy] * DRAWS)).tolist())
    kept = p_V.nonzero().squeeze(1).tolist()
    assert set(counts) <= set(kept)
    if len(kept) > 1:
        assert chisquare([counts[token] for token in kept], (p_V[kept] * DRAWS).numpy()).pvalue > 1e-3


def test_made_up_logits_are_as_peaked_as_they_say() -> None:
    log_p_BV = made_up_logits(64, 49_152).log_softmax(-1)
    entropy_B = -(log_p_BV.exp() * log_p_BV).sum(-1)
    assert 0.6 < entropy_B.min() < 0.8
    assert 5 < entropy_B.max() < 6
    assert len(set(log_p_BV.argmax(-1).tolist())) > 60


def test_both_sides_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "_VOCABULARIES", (300,))
    result = bench_sampler(2, Console(quiet=True))
    assert len(result["rows"]) == 6
    assert all(0 < row["low"] <= row["value"] <= row["high"] for row in result["rows"])
    assert all(ratio > 0 for ratio in result["ratios"].values())
