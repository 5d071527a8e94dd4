"""The sampler in C against the reference, on whole vocabularies, and on logits that nobody should send."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_sampling import ALL, BELOW_ONE, SPREADS, reference, some_logits, some_uniforms
from torch import Tensor

from rheostat.decoding.compiled_sampling import CompiledSampling, compiled_sampling
from rheostat.decoding.policy import Decision, SamplingParameters
from rheostat.decoding.sampling import draw
from rheostat.decoding.strategy import Order, Strategy
from rheostat.decoding.transforms import transform

SIZE = 20_011
SOME = (
    Strategy(0.0), Strategy(0.3), Strategy(1.0), Strategy(1.5, None, 0.95), Strategy(1.0, None, 0.5),
    Strategy(0.5, None, 0.999), Strategy(3.0, None, 0.9, 1e-4), Strategy(1.0, 40), Strategy(1.0, 15_000, 0.9),
    Strategy(1.25, 700, 0.9, 0.05), Strategy(0.8, None, None, 0.1), Strategy(2.0, None, 0.7, top_n_sigma=1.5),
)  # fmt: skip


def compiled() -> CompiledSampling:
    found = compiled_sampling(torch.zeros(1, 1, dtype=torch.float32))
    assert found is not None
    return found


def large_logits(kind: str) -> Tensor:
    if kind in SPREADS:
        return some_logits(SIZE, SPREADS[kind], 3, rounded=False)
    ties_V = (2 * some_logits(SIZE, 3.0, 4, rounded=True)).round()
    return {
        "ties": ties_V,
        "equal": torch.zeros(SIZE),
        "rising": some_logits(SIZE, 3.0, 5, rounded=False).sort().values,
        "organ pipe": some_logits(SIZE, 3.0, 5, rounded=False).sort().values[torch.arange(SIZE).sub(SIZE // 2).abs()],
        "falling": some_logits(SIZE, 3.0, 5, rounded=False).sort(descending=True).values,
        "signed zeros": torch.where(ties_V > 0, -0.0, torch.where(ties_V == 0, 0.0, ties_V)),
        "mostly impossible": torch.where(torch.arange(SIZE) % 601 == 7, ties_V, -torch.inf),
    }[kind]


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize(
    "kind", [*SPREADS, "ties", "equal", "rising", "organ pipe", "falling", "signed zeros", "mostly impossible"]
)
def test_whole_vocabularies_to_float64(kind: str, order: Order) -> None:
    """Draws differ from the reference's only where rounding in float64 decides, and supports nowhere."""
    logits_BV, parameters = large_logits(kind)[None], SamplingParameters.of(SOME)
    probability_AV = transform(logits_BV.expand(len(SOME), -1), parameters, order)
    every_S, zeros_S = torch.arange(SIZE), torch.zeros(SIZE, dtype=torch.int64)
    log_p_SA = compiled().log_probabilities(logits_BV, zeros_S, every_S, parameters, order)
    assert torch.equal(log_p_SA.T.isfinite(), probability_AV > 0)
    torch.testing.assert_close(log_p_SA.T.double(), probability_AV.log(), rtol=1e-6, atol=1e-6)

    choice_S = torch.arange(len(SOME)).repeat(50)
    uniform_S = some_uniforms(len(choice_S), kind, order.value)
    uniform_S[: len(SOME)] = BELOW_ONE
    row_S = torch.zeros_like(choice_S)
    token_S = compiled().draw(logits_BV, row_S, Decision(parameters, choice_S), uniform_S, order)
    assert bool((probability_AV[choice_S, token_S] > 0).all())
    expected_S, _ = reference(probability_AV[choice_S], uniform_S)
    cdf_SV = probability_AV[choice_S].cumsum(-1)
    safe_S = ((cdf_SV - uniform_S[:, None] * cdf_SV[:, -1:]).abs() > 1e-12).all(-1)
    assert float(safe_S.float().mean()) > 0.95
    assert torch.equal(token_S[safe_S], expected_S[safe_S])


def test_weights_are_exact_to_1e_14() -> None:
    """Of two tokens the first is drawn just below its probability, and the second just above it."""
    below_B = torch.linspace(0, 30, 2_000)
    logits_BV = torch.stack([-below_B, torch.zeros(2_000)], 1)
    weight_B = (-logits_BV[:, 0].double() / -0.7).exp()
    p_B = weight_B / (1 + weight_B)
    row_S, decision = torch.arange(2_000), Decision(SamplingParameters.of([Strategy(0.7)]), torch.zeros(2_000).long())
    for side, token in ((1 - 2e-14, 0), (1 + 2e-14, 1)):
        assert compiled().draw(logits_BV, row_S, decision, p_B * side, Order.VLLM).unique().tolist() == [token]


def test_a_uniform_on_the_edge_belongs_to_the_next_token() -> None:
    """As in the reference; 1, which is none, gives the last token that has weight."""
    logits_BV = torch.full((1, 600), -torch.inf)
    logits_BV[0, [3, 100, 290, 450]] = 1.0
    uniform_S = torch.tensor([0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    decision = Decision(SamplingParameters.of([Strategy(1.0)]), torch.zeros(5).long())
    token_S = compiled().draw(logits_BV, torch.zeros(5).long(), decision, uniform_S, Order.VLLM)
    assert token_S.tolist() == [3, 100, 290, 450, 450]


def neighbours(x: float) -> Tensor:
    """Seven float32 numbers that follow each other, around ``x``."""
    near = np.float32(x)
    around = [near]
    for _ in range(3):
        around = [np.nextafter(around[0], np.float32(-np.inf)), *around, np.nextafter(around[-1], np.float32(np.inf))]
    return torch.from_numpy(np.array(around))


@pytest.mark.parametrize("largest", [0.0, 17.3, -250.0])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 1.7])
def test_thresholds_lie_between_the_right_float32_numbers(largest: float, temperature: float) -> None:
    """Of neighbours around where min-p or top-nσ cuts those are kept that the reference keeps in float64."""
    for share in np.linspace(0.01, 0.9, 40):
        low_V = neighbours(np.float32(largest) + temperature * math.log(share))
        logits_V = torch.cat([torch.tensor([largest]), low_V, torch.tensor([largest - 60])])
        exact_V = logits_V.double()
        deviation = float(exact_V.std(correction=0))
        sigmas = [float(exact_V[0] - (exact_V[i] + exact_V[i + 1]) / 2) / deviation for i in (3, 4)]
        strategies = [Strategy(temperature, min_p=float(share)), *(Strategy(1.0, top_n_sigma=s) for s in sigmas)]
        parameters, token_S = SamplingParameters.of(strategies), torch.arange(len(logits_V))
        log_p_SA = compiled().log_probabilities(logits_V[None], 0 * token_S, token_S, parameters, Order.VLLM)
        kept_AV = transform(logits_V.expand(len(strategies), -1), parameters, Order.VLLM) > 0
        assert torch.equal(log_p_SA.T.isfinite(), kept_AV)
        assert 0 < int(kept_AV[1:, 1:-1].sum()) < 14


@pytest.mark.parametrize(
    ("strategy", "logits"),
    [
        (Strategy(1e46), [0.0, 1.0, -math.inf]),  # 1 / T is 0 in float32
        (Strategy(1e46, 2), [0.0, 1.0, -math.inf]),
        (Strategy(1e-320), [0.0, -1e-45]),  # infinite
        (Strategy(1e44), [3e38, -3e38, 0.0]),
        (Strategy(1.3, min_p=9.797783966128938e-05), [12.0, 0.0, -0.0]),  # 12 + T log(min-p) is 0 but for rounding
        (Strategy(1.0, None, 1e-300), [1.0, 1.0, 0.5]),
        (Strategy(1.0, None, 0.5, 1.0), [1.0, 1.0, 0.5]),
        (Strategy(1.0, 3), [0.1, 0.2, 0.3]),
    ],
    ids=str,
)
def test_the_ends_of_what_float32_and_float64_tell_apart(strategy: Strategy, logits: list[float]) -> None:
    logits_BV, parameters = torch.tensor([logits]), SamplingParameters.of([strategy])
    token_S = torch.arange(len(logits), dtype=torch.int32)  # not the type that C reads
    for order in Order:
        log_p_S = compiled().log_probabilities(logits_BV, 0 * token_S, token_S, parameters, order).squeeze(1)
        torch.testing.assert_close(log_p_S.double(), transform(logits_BV, parameters, order)[0].log())


def test_a_nucleus_holds_a_token_at_least() -> None:
    """No strategy has a top-p of 0."""
    sets = replace(SamplingParameters.of([Strategy(1.0, None, 0.5)]), top_p_K=torch.zeros(1, dtype=torch.float64))
    logits_BV, zeros_S = torch.tensor([[0.0, 1.0, 0.5]]), torch.zeros(3, dtype=torch.int64)
    log_p_S = compiled().log_probabilities(logits_BV, zeros_S, torch.arange(3), sets, Order.VLLM).squeeze(1)
    assert log_p_S.tolist() == [-math.inf, 0.0, -math.inf]


def test_the_default_type_of_tensors_does_not_matter() -> None:
    """Whoever loads a model with transformers changes it for the process meanwhile."""
    logits_BV, parameters = some_logits(300, 2.0, 1, rounded=False)[None], SamplingParameters.of(SOME)
    token_S = torch.arange(300)
    before = compiled().log_probabilities(logits_BV, 0 * token_S, token_S, parameters, Order.VLLM)
    entropies = compiled().entropies(logits_BV)
    torch.set_default_dtype(torch.float64)
    try:
        after = compiled().log_probabilities(logits_BV, 0 * token_S, token_S, parameters, Order.VLLM)
        assert torch.equal(after, before)
        assert all(map(torch.equal, compiled().entropies(logits_BV), entropies))
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("order", Order)
def test_top_p_parts_tokens_that_tie_at_the_threshold_of_min_p(order: Order) -> None:
    low_V = neighbours(math.log(0.3))
    least = float(low_V[low_V.double() >= math.log(0.3)][0])
    logits_V = torch.tensor([0.0, *[least] * 10, float(np.nextafter(np.float32(least), np.float32(-1)))])
    parameters, token_S = SamplingParameters.of([Strategy(1.0, None, 0.61, 0.3)]), torch.arange(len(logits_V))
    log_p_S = compiled().log_probabilities(logits_V[None], 0 * token_S, token_S, parameters, order).squeeze(1)
    assert torch.equal(log_p_S.isfinite(), transform(logits_V[None], parameters, order)[0] > 0)
    assert bool(log_p_S[10].isfinite())
    assert not bool(log_p_S[1].isfinite())


def test_threads_share_nothing() -> None:
    """Each works in memory of its own: any number of them draws, and records, the same."""
    logits_BV = torch.stack([some_logits(3_000, 2.0, row, rounded=row % 2 == 0) for row in range(40)])
    row_S = torch.arange(800) % 40
    decision = Decision(SamplingParameters.of(ALL), torch.arange(800) % len(ALL))
    uniform_S, token_S = some_uniforms(800, "threads"), torch.arange(800)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            drawn_S = compiled().draw(logits_BV, row_S, decision, uniform_S, Order.VLLM)
            log_p_SA = compiled().log_probabilities(logits_BV, row_S, token_S, decision.parameters, Order.VLLM)
            results.append((drawn_S, log_p_SA, *compiled().entropies(logits_BV)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for mine, theirs in zip(results[0], other, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    "values",
    [
        [math.nan], [-math.inf], [math.inf], [math.nan, 1.0], [math.nan, -math.inf], [math.inf, 1.0, math.nan],
        [3e38, -3e38], [math.inf, -math.inf], [0.0, 1e-45, -1e-45],
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [1, 127, 300])
def test_logits_that_nobody_should_send(values: list[float], size: int) -> None:
    """It ends, with tokens of the vocabulary; of them none is impossible or no number, if there is another."""
    logits_V = torch.tensor(values).repeat(size)[:size]
    ends = Strategy(1e300, None, None, 0.5), Strategy(1e-320, None, 0.5), Strategy(1.0, 2, top_n_sigma=1e300)
    wide = (*ALL, Strategy(1.0, 100), *ends)
    parameters, row_S = SamplingParameters.of(wide), torch.zeros(2 * len(wide), dtype=torch.int64)
    choice_S = torch.arange(len(wide)).repeat(2)
    uniform_S = torch.tensor([0.3, BELOW_ONE], dtype=torch.float64).repeat_interleave(len(wide))
    for order in Order:
        token_S = compiled().draw(logits_V[None], row_S, Decision(parameters, choice_S), uniform_S, order)
        assert bool(((token_S >= 0) & (token_S < size)).all())
        if bool((logits_V > -torch.inf).any()):
            assert bool((logits_V[token_S] > -torch.inf).all())
        compiled().log_probabilities(logits_V[None], row_S, token_S, parameters, order)
    compiled().entropies(logits_V[None])


@pytest.mark.parametrize("layout", ["part of a wider tensor", "every other number", "float64"])
def test_any_layout_of_logits_is_drawn_from(layout: str) -> None:
    """Rows may lie apart; what the compiled function cannot read, torch does."""
    whole_BV = torch.stack([some_logits(800, 2.0, row, rounded=True) for row in range(6)])
    logits_BV = {
        "part of a wider tensor": whole_BV[1::2, 5:405],
        "every other number": whole_BV[:, ::2],
        "float64": whole_BV.double(),
    }[layout]
    assert (compiled_sampling(logits_BV) is None) == (layout != "part of a wider tensor")
    row_S = torch.arange(300) % len(logits_BV)
    decision = Decision(SamplingParameters.of(SOME), torch.arange(300) % len(SOME))
    uniform_S = some_uniforms(300, "layout")
    token_S = draw(logits_BV, row_S, decision, uniform_S, Order.VLLM)
    probability_SV = transform(logits_BV[row_S], decision.parameters[decision.choice_S], Order.VLLM)
    expected_S, safe_S = reference(probability_SV, uniform_S)
    assert float(safe_S.float().mean()) > 0.9
    assert torch.equal(token_S[safe_S], expected_S[safe_S])
