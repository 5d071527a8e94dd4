"""T_a against transformers' own warpers, against plain numpy from vLLM's documented semantics, and its laws."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rheostat.decoding.policy import SamplingParameters
from rheostat.decoding.spaces import candidate_grid
from rheostat.decoding.strategy import Order, Strategy
from rheostat.decoding.transforms import sigma_as_top_k, sort_descending, transform

GRID = candidate_grid()
SIZES = (2, 5, 17, 64, 300)
LOGITS = st.integers(1, 30).flatmap(
    lambda size: arrays(np.float64, size, elements=st.integers(-80, 80).map(lambda i: i / 8))  # many ties
)
TEMPERATURES = st.floats(0.05, 5)


def one(logits_V: np.ndarray, strategy: Strategy, order: Order) -> np.ndarray:
    return transform(torch.from_numpy(logits_V)[None], SamplingParameters.of([strategy]), order)[0].numpy()


def random_logits(size: int, seed: int, spread: float, rounded: bool = False) -> Tensor:
    logits_V = spread * torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return logits_V.bfloat16().double() if rounded else logits_V


def by_transformers(logits_V: Tensor, strategy: Strategy) -> Tensor:
    """Composed as ``GenerationMixin._get_logits_processor`` does."""
    warpers = LogitsProcessorList()
    if strategy.temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(strategy.temperature))
    if strategy.top_k is not None:
        warpers.append(TopKLogitsWarper(strategy.top_k, min_tokens_to_keep=1))
    if strategy.top_p is not None:
        warpers.append(TopPLogitsWarper(strategy.top_p, min_tokens_to_keep=1))
    if strategy.min_p is not None:
        warpers.append(MinPLogitsWarper(strategy.min_p, min_tokens_to_keep=1))
    return warpers(torch.zeros(1, 1, dtype=torch.int64), logits_V[None].clone())[0].softmax(-1)


def softmax(logits_V: np.ndarray) -> np.ndarray:
    weight_V = np.exp(logits_V - logits_V.max())
    return weight_V / weight_V.sum()


def by_vllm(logits_V: np.ndarray, strategy: Strategy) -> tuple[np.ndarray, float]:
    """temperature, min-p, top-k, top-p, token by token; and how near top-p came to a rounding decision."""
    scaled_V = logits_V / strategy.temperature
    margin = np.inf
    if strategy.min_p is not None:
        probability_V = softmax(scaled_V)
        scaled_V = np.where(probability_V < strategy.min_p * probability_V.max(), -np.inf, scaled_V)
    if strategy.top_k is not None and strategy.top_k < len(scaled_V):
        threshold = np.sort(scaled_V)[-strategy.top_k]
        scaled_V = np.where(scaled_V < threshold, -np.inf, scaled_V)  # what ties with the k-th stays
    if strategy.top_p is not None:
        ascending = np.argsort(scaled_V, kind="stable")
        probability_V = softmax(scaled_V)
        scaled_V = scaled_V.copy()
        mass = 0.0
        for token in ascending[:-1]:  # the last one stays whatever its mass
            mass += probability_V[token]
            margin = min(margin, abs(mass - (1 - strategy.top_p)))
            if mass <= 1 - strategy.top_p:
                scaled_V[token] = -np.inf
    return softmax(scaled_V), margin


@pytest.mark.parametrize("size", SIZES)
def test_order_transformers_is_transformers_own(size: int) -> None:
    for seed in range(3):
        logits_V = random_logits(size, seed, spread=(0.3, 2.0, 6.0)[seed])
        got_AV = transform(logits_V.expand(len(GRID), -1), SamplingParameters.of(GRID), Order.TRANSFORMERS)
        expected_AV = torch.stack([by_transformers(logits_V, strategy) for strategy in GRID])
        torch.testing.assert_close(got_AV, expected_AV, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rounded", [False, True], ids=["float64", "bfloat16-ties"])
@pytest.mark.parametrize("size", SIZES)
def test_order_vllm_is_the_documented_one(size: int, rounded: bool) -> None:
    compared = ties = 0
    for seed in range(3):
        logits_V = random_logits(size, 10 + seed, (0.3, 2.0, 6.0)[seed], rounded)
        ties += size - len(logits_V.unique())
        got_AV = transform(logits_V.expand(len(GRID), -1), SamplingParameters.of(GRID), Order.VLLM).numpy()
        for got_V, strategy in zip(got_AV, GRID, strict=True):
            expected_V, margin = by_vllm(logits_V.numpy(), strategy)
            if margin > 1e-9:
                np.testing.assert_allclose(got_V, expected_V, rtol=0, atol=1e-12, err_msg=str(strategy))
                compared += 1
    assert compared > 0.99 * 3 * len(GRID)
    assert ties > 0 or not rounded or size < 64


def cut_by_sigma(logits_V: Tensor, sigmas: float) -> Tensor:
    """Top-nσ by itself, token by token; what it drops is impossible for all that follows."""
    values = logits_V.tolist()
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
    kept = [v if v >= max(values) - sigmas * deviation else -math.inf for v in values]
    return torch.tensor(kept, dtype=torch.float64)


@pytest.mark.parametrize("sigmas", [0.3, 1.0, 2.1, 50.0])
@pytest.mark.parametrize("size", SIZES)
def test_top_n_sigma_cuts_before_the_others_in_both_orders(size: int, sigmas: float) -> None:
    grid = [replace(strategy, top_n_sigma=sigmas) for strategy in (*GRID, Strategy(1.3))]
    compared, sizes = 0, set()
    for seed in range(2):
        for order in Order:
            # transformers sorts for top-p unstably: without ties for it
            logits_V = random_logits(size, 20 + seed, (0.5, 3.0)[seed], rounded=order == Order.VLLM)
            cut_V = cut_by_sigma(logits_V, sigmas)
            sizes.add(int(cut_V.isfinite().sum()))
            got_AV = transform(logits_V.expand(len(grid), -1), SamplingParameters.of(grid), order)
            for got_V, strategy in zip(got_AV, grid, strict=True):
                if order == Order.TRANSFORMERS:
                    expected_V, margin = by_transformers(cut_V, strategy).numpy(), math.inf
                else:
                    expected_V, margin = by_vllm(cut_V.numpy(), strategy)
                if margin > 1e-9:
                    np.testing.assert_allclose(got_V, expected_V, rtol=0, atol=1e-12, err_msg=f"{strategy}, {order}")
                    compared += 1
    assert compared > 0.99 * 4 * len(grid)
    assert size < 17 or (sizes == {size}) == (sigmas == 50)


def test_top_n_sigma_by_hand() -> None:
    """Logits 5, 3, 3, 1: mean 3, σ = √2. So σ/√2 of them reach 1 below the peak, 2σ/√2 reach 2, and 2√2 σ all of it."""
    logits_V = np.array([1.0, 5.0, 3.0, 3.0])
    for order in Order:
        for sigmas, kept in ((0.5, [1]), (1.4, [1]), (1.42, [1, 2, 3]), (2.8, [1, 2, 3]), (2.9, [0, 1, 2, 3])):
            for temperature in (0.1, 1.0, 10.0):  # of untempered logits: the temperature does not matter
                probability_V = one(logits_V, Strategy(temperature, top_n_sigma=sigmas), order)
                assert np.flatnonzero(probability_V).tolist() == kept
        np.testing.assert_allclose(
            one(logits_V, Strategy(2.0, top_n_sigma=1.42), order), softmax(np.array([-np.inf, 2.5, 1.5, 1.5]))
        )


def test_impossible_tokens_have_no_part_in_sigma() -> None:
    logits_V = np.array([1.0, -np.inf, 5.0, 3.0, -np.inf, 3.0])
    for order in Order:
        assert (one(logits_V, Strategy(1, top_n_sigma=1.42), order) > 0).tolist() == [0, 0, 1, 1, 0, 1]


def test_without_top_n_sigma_nothing_is_computed() -> None:
    parameters = SamplingParameters.of(GRID)
    assert parameters.top_n_sigma_K is None
    assert sigma_as_top_k(torch.empty(0), torch.empty(0, dtype=torch.int64), parameters) is parameters


def test_ties_at_the_edge_of_each_truncation() -> None:
    logits_V = np.log([0.4, 0.2, 0.2, 0.2])
    for order in Order:
        assert (one(logits_V, Strategy(1, 2), order) > 0).tolist() == [True] * 4  # all that tie with the 2nd
        assert (one(logits_V, Strategy(1, None, None, 0.5), order) > 0).tolist() == [True] * 4
        # top-p drops tied tokens with the lowest index first
        assert (one(logits_V, Strategy(1, None, 0.7), order) > 0).tolist() == [True, False, True, True]
        assert (one(logits_V, Strategy(1, None, 0.5), order) > 0).tolist() == [True, False, False, True]


def test_the_two_orders_differ() -> None:
    """min-p 0.3 leaves 0.5 and 0.3 of the mass; top-p 0.6 over the rest alone keeps one, over all of it two."""
    logits_V = np.log([0.5, 0.3, 0.1, 0.1])
    strategy = Strategy(1.0, None, 0.6, 0.3)
    np.testing.assert_allclose(one(logits_V, strategy, Order.VLLM), [1, 0, 0, 0], atol=1e-12)
    np.testing.assert_allclose(one(logits_V, strategy, Order.TRANSFORMERS), [0.625, 0.375, 0, 0], atol=1e-12)


def test_order_may_be_written_as_text() -> None:
    logits_V = np.log([0.5, 0.3, 0.1, 0.1])
    for order in Order:
        expected_V = one(logits_V, Strategy(1.0, None, 0.6, 0.3), order)
        np.testing.assert_array_equal(one(logits_V, Strategy(1.0, None, 0.6, 0.3), order.value), expected_V)  # type: ignore[arg-type]


def test_rows_have_their_own_parameters() -> None:
    logits_AV = torch.stack([random_logits(40, seed, 2.0) for seed in range(len(GRID))])
    for order in Order:
        together_AV = transform(logits_AV, SamplingParameters.of(GRID), order)
        for row in range(0, len(GRID), 7):
            alone_V = transform(logits_AV[row : row + 1], SamplingParameters.of(GRID[row : row + 1]), order)[0]
            torch.testing.assert_close(together_AV[row], alone_V, rtol=0, atol=1e-15)


def test_float32_and_bfloat16_logits_are_computed_in_float64() -> None:
    logits_V = random_logits(50, 3, 2.0, rounded=True)
    for dtype in (torch.float32, torch.bfloat16):
        got_BV = transform(logits_V.to(dtype)[None], SamplingParameters.of([Strategy(0.3)]), Order.VLLM)
        assert got_BV.dtype == torch.float64
        torch.testing.assert_close(got_BV[0], (logits_V / 0.3).softmax(-1), rtol=0, atol=1e-14)


def test_impossible_tokens_stay_impossible() -> None:
    logits_V = np.array([1.0, -np.inf, 0.5, -np.inf])
    for order in Order:
        for strategy in (*GRID, Strategy(0)):
            probability_V = one(logits_V, strategy, order)
            assert probability_V[[1, 3]].tolist() == [0, 0]
            assert probability_V.sum() == pytest.approx(1)


def test_sort_descending_puts_the_higher_index_first_among_ties() -> None:
    values_BV, index_BV = sort_descending(torch.tensor([[1.0, 3.0, 1.0, 3.0, 2.0]]))
    assert values_BV.tolist() == [[3, 3, 2, 1, 1]]
    assert index_BV.tolist() == [[3, 1, 4, 2, 0]]


@given(LOGITS, st.sampled_from((*GRID, Strategy(0), Strategy(2, top_n_sigma=1))), st.sampled_from(Order))
def test_distribution_and_argmax(logits_V: np.ndarray, strategy: Strategy, order: Order) -> None:
    probability_V = one(logits_V, strategy, order)
    assert probability_V.min() >= 0
    assert probability_V.sum() == pytest.approx(1, abs=1e-12)
    assert probability_V[logits_V == logits_V.max()].max() == probability_V.max() > 0
    # nothing kept is less likely than something dropped
    if (probability_V == 0).any() and not strategy.is_greedy:
        assert logits_V[probability_V > 0].min() >= logits_V[probability_V == 0].max()


@given(LOGITS, TEMPERATURES, st.integers(1, 40), st.integers(0, 10), st.sampled_from(Order))
def test_support_grows_with_k(logits_V: np.ndarray, temperature: float, k: int, more: int, order: Order) -> None:
    small = one(logits_V, Strategy(temperature, k, None, 0.01), order) > 0
    large = one(logits_V, Strategy(temperature, k + more, None, 0.01), order) > 0
    assert (small <= large).all()
    alone_V = one(logits_V, Strategy(temperature, k), order)
    assert (alone_V > 0).sum() >= min(k, len(logits_V))
    threshold = np.sort(logits_V)[-min(k, len(logits_V))]
    np.testing.assert_array_equal(alone_V > 0, logits_V >= threshold)


@given(LOGITS, TEMPERATURES, st.floats(0.01, 0.99), st.floats(0.01, 0.99), st.sampled_from(Order))
def test_support_grows_with_p(logits_V: np.ndarray, temperature: float, p: float, q: float, order: Order) -> None:
    small_V = one(logits_V, Strategy(temperature, None, min(p, q)), order) > 0
    large_V = one(logits_V, Strategy(temperature, None, max(p, q)), order) > 0
    assert (small_V <= large_V).all()
    # the smallest set of likeliest tokens whose mass reaches p
    full_V = one(logits_V, Strategy(temperature), order)
    assert full_V[small_V].sum() >= min(p, q) - 1e-9
    assert full_V[small_V].sum() - full_V[small_V].min() < min(p, q) + 1e-9


@given(LOGITS, TEMPERATURES, st.floats(0.01, 1), st.floats(0.01, 1), st.sampled_from(Order))
def test_support_shrinks_with_min_p(logits_V: np.ndarray, temperature: float, m: float, n: float, order: Order) -> None:
    large_V = one(logits_V, Strategy(temperature, None, None, min(m, n)), order) > 0
    small_V = one(logits_V, Strategy(temperature, None, None, max(m, n)), order) > 0
    assert (small_V <= large_V).all()
    ratio_V = np.exp((logits_V - logits_V.max()) / temperature)
    assert large_V[ratio_V > min(m, n) + 1e-9].all()
    assert not large_V[ratio_V < min(m, n) - 1e-9].any()


@given(LOGITS, st.sampled_from(Order))
def test_greedy_is_the_first_argmax(logits_V: np.ndarray, order: Order) -> None:
    expected_V = np.zeros_like(logits_V)
    expected_V[np.argmax(logits_V)] = 1
    np.testing.assert_array_equal(one(logits_V, Strategy(0), order), expected_V)


@given(LOGITS, TEMPERATURES, st.sampled_from(Order))
def test_temperature_divides_the_logits(logits_V: np.ndarray, temperature: float, order: Order) -> None:
    np.testing.assert_allclose(
        one(logits_V, Strategy(temperature), order), softmax(logits_V / temperature), rtol=1e-12, atol=1e-15
    )
    # a probability ratio r becomes r^(1/T)
    np.testing.assert_allclose(
        one(logits_V * 2, Strategy(temperature * 2), order), one(logits_V, Strategy(temperature), order), atol=1e-12
    )


@pytest.mark.parametrize("temperature", [1e-3, 1e-8, 1e-40, 1e-300, 5e-324])
def test_small_temperatures_tend_to_greedy(temperature: float) -> None:
    logits_V = random_logits(30, 1, 2.0).numpy()
    for order in Order:
        for strategy in (Strategy(temperature), Strategy(temperature, 5, 0.9, 0.1)):
            np.testing.assert_allclose(
                one(logits_V, strategy, order), one(logits_V, Strategy(0), order), rtol=0, atol=1e-3
            )
