"""Dynamic temperature: truncate, look at the entropy, scale; against a token-by-token reference, ties included."""

import math
from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from rheostat.baselines.dynamic_temperature import DynamicTemperature
from rheostat.decoding import support
from rheostat.decoding.policy import StepState
from rheostat.decoding.sampling import draw
from rheostat.decoding.strategy import Order, Strategy
from rheostat.decoding.transforms import transform
from rheostat.engines.base import Request
from rheostat.engines.fake import EOS, FakeEngine
from rheostat.errors import ConfigError
from rheostat.types import Prompt

TRUNCATIONS = (
    *(Strategy(1, k, p, m) for k, p, m in product((None, 3, 20), (None, 0.5, 0.9), (None, 0.2))),
    Strategy(1, top_n_sigma=1.0),
    Strategy(1, None, 0.8, top_n_sigma=1.5),
)


def state_of(logits_BV: Tensor, row_S: Tensor) -> StepState:
    one_S = torch.ones_like(row_S)
    streams_S = np.arange(len(row_S), dtype=np.uint64)
    return StepState(
        torch.zeros(len(logits_BV), 1), logits_BV, row_S, torch.arange(len(row_S)), one_S, 9 * one_S, one_S, streams_S
    )


def softmax(logits: dict[int, float]) -> dict[int, float]:
    weights = {token: math.exp(logit - max(logits.values())) for token, logit in logits.items()}
    return {token: weight / sum(weights.values()) for token, weight in weights.items()}


def reference(
    logits: Sequence[float], low: float, high: float, exponent: float, cut: Strategy
) -> tuple[list[float], float]:
    """llama.cpp's chain, one sampler after the other over a list of candidates; and how near top-p came to rounding."""
    left, margin = dict(enumerate(logits)), math.inf
    if cut.top_n_sigma is not None:
        mean = sum(logits) / len(logits)
        deviation = math.sqrt(sum((logit - mean) ** 2 for logit in logits) / len(logits))
        left = {t: logit for t, logit in left.items() if logit >= max(logits) - cut.top_n_sigma * deviation}
    if cut.top_k is not None:
        kth = sorted(left.values(), reverse=True)[: cut.top_k][-1]
        left = {t: logit for t, logit in left.items() if logit >= kth}
    if cut.top_p is not None:
        p, above, kept = softmax(left), 0.0, {}
        for token in sorted(left, key=lambda t: (left[t], t), reverse=True):  # of equals the last goes first
            margin = min(margin, abs(above - cut.top_p))
            if above < cut.top_p:
                kept[token] = left[token]
            above += p[token]
        left = kept
    if cut.min_p is not None:
        p = softmax(left)
        left = {t: logit for t, logit in left.items() if p[t] >= cut.min_p * max(p.values())}
    temperature = 1.0
    if len(left) > 1:
        entropy = -sum(q * math.log(q) for q in softmax(left).values() if q)
        temperature = low + (high - low) * min(entropy / math.log(len(left)), 1) ** exponent
    p = softmax({token: logit / temperature for token, logit in left.items()})
    return [p.get(token, 0.0) for token in range(len(logits))], margin


def some_logits(size: int, rounded: bool) -> Tensor:
    """From flat to peaked rows; ``rounded`` to quarters, so that most tokens tie with another."""
    spread_B1 = torch.tensor([0.3, 1.0, 2.0, 4.0, 9.0])[:, None]
    logits_BV = spread_B1 * torch.randn(5, size, generator=torch.Generator().manual_seed(size))
    return (4 * logits_BV).round() / 4 if rounded else logits_BV


def test_by_hand() -> None:
    """Of 1/2, 1/4, 1/8, 1/8 top-k 2 leaves 2/3 and 1/3, whose entropy is 0.918 of ln 2; of two equal ones it is all."""
    logits_BV = torch.log(torch.tensor([[0.125, 0.5, 0.25, 0.125], [0.1, 0.1, 0.4, 0.4]]))
    decision = DynamicTemperature(0.5, 2.0, 2.0, Strategy(1, 2)).decide(state_of(logits_BV, torch.tensor([1, 0])))
    share = (math.log(3) - 2 / 3 * math.log(2)) / math.log(2)
    assert share == pytest.approx(0.9183, abs=1e-4)
    temperature = 0.5 + 1.5 * share**2
    assert decision.parameters.temperature_K.tolist() == pytest.approx([temperature, 2.0], rel=1e-6)
    odds = 2 ** (1 / temperature)
    expected = [[0, 0, 0.5, 0.5], [0, odds / (1 + odds), 1 / (1 + odds), 0]]
    for order in Order:
        got_SV = transform(logits_BV[[1, 0]], decision.parameters[decision.choice_S], order)
        np.testing.assert_allclose(got_SV, expected, rtol=1e-6)


@pytest.mark.parametrize("rounded", [False, True], ids=["float32", "ties"])
@pytest.mark.parametrize("size", [2, 7, 60, 700])
@pytest.mark.parametrize(("low", "high", "exponent"), [(0.5, 1.5, 1.0), (0.1, 3.0, 0.5), (1.2, 1.2, 1.0)])
def test_truncated_then_scaled(size: int, low: float, high: float, exponent: float, rounded: bool) -> None:
    logits_BV = some_logits(size, rounded)
    row_S = torch.tensor([4, 0, 1, 2, 3, 0])
    compared = parted = 0
    for cut in TRUNCATIONS:
        decision = DynamicTemperature(low, high, exponent, cut).decide(state_of(logits_BV, row_S))
        parted += int((decision.parameters.top_p_K < 1).sum())
        own = decision.parameters[decision.choice_S]
        expected = [reference(logits_BV[row].double().tolist(), low, high, exponent, cut) for row in row_S.tolist()]
        for order in Order:
            got_SV = transform(logits_BV[row_S], own, order)
            for got_V, (expected_V, margin) in zip(got_SV, expected, strict=True):
                if margin > 1e-9:
                    # without truncation the entropy is that of float32
                    rtol = 1e-9 if cut.is_truncated else 1e-4
                    np.testing.assert_allclose(got_V, expected_V, rtol=rtol, atol=1e-7, err_msg=str(cut))
                    assert ((got_V.numpy() > 0) == (np.array(expected_V) > 0)).all(), str(cut)
                    compared += 1
    assert compared > 0.8 * len(TRUNCATIONS) * 12
    assert (parted > 0) == rounded  # there were ties for top-p to part


@pytest.mark.parametrize("most", [4096, 40])
def test_draws_are_of_that_distribution(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the loop's own draw, which sees a few candidates only, on tied rows."""
    monkeypatch.setattr(support, "_MOST_CANDIDATES", most)
    logits_BV = some_logits(700, rounded=True)
    row_S = torch.arange(5).repeat_interleave(60)
    uniform_S = torch.rand(300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for cut in TRUNCATIONS:
        decision = DynamicTemperature(0.4, 1.6, 1.0, cut).decide(state_of(logits_BV, row_S))
        token_S = draw(logits_BV, row_S, decision, uniform_S, Order.VLLM)
        references = [reference(logits_BV[row].double().tolist(), 0.4, 1.6, 1.0, cut)[0] for row in range(5)]
        cdf_SV = torch.tensor(references, dtype=torch.float64)[row_S].cumsum(1)
        expected_S = torch.searchsorted(cdf_SV, uniform_S[:, None], right=True).squeeze(1)
        safe_S = ((cdf_SV - uniform_S[:, None]).abs() > 1e-5).all(1)
        assert torch.equal(token_S[safe_S], expected_S[safe_S])
        assert safe_S.float().mean() > 0.9


def test_more_rows_than_are_looked_at_at_once() -> None:
    logits_BV = torch.randn(150, 30, generator=torch.Generator().manual_seed(3)) * 2
    policy = DynamicTemperature(0.2, 1.8, 1.0, Strategy(1, 12, 0.8))
    together = policy.decide(state_of(logits_BV, torch.arange(150))).parameters
    for row in (0, 63, 64, 149):
        alone = policy.decide(state_of(logits_BV[row : row + 1], torch.tensor([0]))).parameters
        assert float(alone.temperature_K[0]) == pytest.approx(float(together.temperature_K[row]))
        assert int(alone.top_k_K[0]) == int(together.top_k_K[row])


def test_a_single_candidate_is_left_as_it_is() -> None:
    """Also where it has equals: top-p keeps the last of these."""
    logits_BV = torch.tensor([[0.0, 3.0, 3.0, 1.0], [9.0, 0.0, 0.0, 0.0]])
    decision = DynamicTemperature(0.0, 2.0, 1.0, Strategy(1, None, 0.3)).decide(state_of(logits_BV, torch.arange(2)))
    assert decision.parameters.temperature_K.tolist() == [1, 1]
    for order in Order:
        assert transform(logits_BV, decision.parameters, order).tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]


def test_it_samples_what_it_says() -> None:
    logits = [0.0, 2.0, 1.0, -1.0, 0.5]
    engine = FakeEngine((EOS, "a", "b", "c", "d"), logits=lambda _, tokens: logits if not tokens else [9.0, 0, 0, 0, 0])
    requests = [Request(Prompt("p", "p"), None, i, 3, 1) for i in range(8000)]
    cut = Strategy(1, 4, 0.95)
    for order in Order:
        completions = engine.generate(requests, DynamicTemperature(0.5, 2.5, 1.0, cut), order)
        seen_V = np.bincount([completion.token_ids[0] for completion in completions], minlength=5)
        expected_V = 8000 * np.array(reference(logits, 0.5, 2.5, 1.0, cut)[0])
        assert seen_V[expected_V == 0].sum() == 0
        assert chisquare(seen_V[expected_V > 0], expected_V[expected_V > 0]).pvalue > 1e-3


def test_the_key_names_all_that_decides() -> None:
    cut = Strategy(1, 40)
    different = [(0.5, 1.5), (0.4, 1.5), (0.5, 1.6), (0.5, 1.5, 2.0), (0.5, 1.5, 1.0, cut)]
    assert len({DynamicTemperature(*arguments).key for arguments in different}) == 5  # type: ignore[arg-type]
    assert DynamicTemperature(0.5, 1.5, 1, Strategy()).key == DynamicTemperature(0.5, 1.5).key


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((-0.1, 1.0), "low"),
        ((1.0, 0.5), "low"),
        ((0.5, math.inf), "high"),
        ((0.5, 1.0, 0.0), "exponent"),
        ((0.5, 1.0, 1.0, Strategy(0.7, 5)), "must be 1"),
        ((0.5, 1.0, 1.0, Strategy(0)), "must be 1"),
    ],
)
def test_what_is_out_of_range_is_named(arguments: tuple[float, ...], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        DynamicTemperature(*arguments)  # type: ignore[arg-type]
