"""EDT against its formula by hand and in plain Python, and at work on the fake engine."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from rheostat.baselines.edt import EntropyBasedTemperature
from rheostat.decoding.policy import StepState
from rheostat.decoding.strategy import Order
from rheostat.decoding.transforms import transform
from rheostat.engines.base import Request
from rheostat.engines.fake import EOS, FakeEngine
from rheostat.errors import ConfigError
from rheostat.types import Prompt


def state_of(logits_BV: Tensor, row_S: Tensor) -> StepState:
    one_S = torch.ones_like(row_S)
    streams_S = np.arange(len(row_S), dtype=np.uint64)
    return StepState(
        torch.zeros(len(logits_BV), 1), logits_BV, row_S, torch.arange(len(row_S)), one_S, 9 * one_S, one_S, streams_S
    )


def by_hand(logits: list[float], t0: float, theta: float) -> list[float]:
    """The distribution that EDT samples from, as the paper writes it."""
    weights = [math.exp(logit - max(logits)) for logit in logits]
    p = [weight / sum(weights) for weight in weights]
    temperature = t0 * 0.8 ** (theta / -sum(q * math.log(q) for q in p))
    powers = [weight ** (1 / temperature) for weight in weights]
    return [power / sum(powers) for power in powers]


def test_by_hand() -> None:
    """Two and four equal tokens: H is ln 2 and ln 4; a certain one is greedy."""
    logits_BV = torch.log(torch.tensor([[0.5, 0.5, 0, 0], [0.25, 0.25, 0.25, 0.25], [1, 0, 0, 0]]))
    decision = EntropyBasedTemperature(1.5, 0.7).decide(state_of(logits_BV, torch.tensor([2, 0, 1, 1])))
    expected = [1.5 * 0.8 ** (0.7 / math.log(2)), 1.5 * 0.8 ** (0.7 / math.log(4)), 0]
    assert expected[:2] == pytest.approx([1.19736, 1.34016], abs=1e-5)
    assert decision.parameters.temperature_K.tolist() == pytest.approx(expected, rel=1e-6)
    assert decision.choice_S.tolist() == [2, 0, 1, 1]
    assert not bool(decision.parameters.truncates_K.any())
    assert decision.log_pi_SK is None


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize(("t0", "theta"), [(1.0, 0.1), (0.6, 1.0), (2.0, 0.0)])
def test_random_rows(t0: float, theta: float, order: Order) -> None:
    spread_B1 = torch.linspace(0.1, 6, 12)[:, None]
    logits_BV = spread_B1 * torch.randn(12, 40, generator=torch.Generator().manual_seed(1))
    row_S = torch.arange(12).flip(0).repeat(2)
    decision = EntropyBasedTemperature(t0, theta).decide(state_of(logits_BV, row_S))
    got_SV = transform(logits_BV[row_S], decision.parameters[decision.choice_S], order)
    expected_SV = [by_hand(logits_BV[row].tolist(), t0, theta) for row in row_S]
    np.testing.assert_allclose(got_SV, expected_SV, rtol=1e-4, atol=1e-6)


def test_greedy_below_the_floor() -> None:
    policy = EntropyBasedTemperature(1.0, 0.0, floor=0.5)
    assert policy.temperatures(torch.tensor([0.0, 0.499, 0.5, 3.0])).tolist() == [0, 0, 1, 1]
    assert EntropyBasedTemperature(1.0, 5.0).temperatures(torch.tensor([0.0, 1e-5, 0.01]))[:2].tolist() == [0, 0]


def test_it_samples_what_it_says() -> None:
    table = {(): [0.0, 2.0, 1.0, -1.0]}
    engine = FakeEngine((EOS, "a", "b", "c"), logits=lambda _, tokens: table.get(tokens, [9.0, 0, 0, 0]))
    requests = [Request(Prompt("p", "p"), None, i, 3, 1) for i in range(8000)]
    completions = engine.generate(requests, EntropyBasedTemperature(1.4, 0.3))
    seen_V = np.bincount([completion.token_ids[0] for completion in completions], minlength=4)
    assert chisquare(seen_V, 8000 * np.array(by_hand(table[()], 1.4, 0.3))).pvalue > 1e-3
    assert chisquare(seen_V, 8000 * np.array(by_hand(table[()], 1.4, 0.6))).pvalue < 1e-6


def test_the_key_names_all_that_decides() -> None:
    policies = [EntropyBasedTemperature(*a) for a in ((1.0, 0.1), (1.0, 0.2), (0.9, 0.1), (1.0, 0.1, 0.01))]
    assert len({policy.key for policy in policies}) == 4
    assert EntropyBasedTemperature(1, 0.1).key == policies[0].key


@pytest.mark.parametrize(("name", "value"), [("t0", 0), ("t0", math.inf), ("theta", -0.1), ("floor", 0)])
def test_what_is_out_of_range_is_named(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name):
        EntropyBasedTemperature(**({"t0": 1.0, "theta": 0.1} | {name: value}))
