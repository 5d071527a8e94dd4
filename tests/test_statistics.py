"""pass@k against enumeration, and intervals against what they promise."""

from fractions import Fraction
from itertools import combinations
from math import comb, nan, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from rheostat.statistics import Interval, mean_interval, paired_difference, pass_at_k


@pytest.mark.parametrize("samples", range(1, 9))
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_sample(samples: int) -> None:
    for correct in range(samples + 1):
        right = [True] * correct + [False] * (samples - correct)
        for k in range(1, samples + 1):
            subsets = [any(subset) for subset in combinations(right, k)]
            assert pass_at_k(np.array(correct), samples, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-14)


@st.composite
def counts(draw: st.DrawFn) -> tuple[int, int, int]:
    samples = draw(st.integers(1, 1000))
    return draw(st.integers(0, samples)), samples, draw(st.integers(1, samples))


@given(counts())
def test_pass_at_k_is_the_closed_form(case: tuple[int, int, int]) -> None:
    correct, samples, k = case
    exact = 1 - Fraction(comb(samples - correct, k), comb(samples, k))
    assert float(pass_at_k(np.array(correct), samples, k)) == pytest.approx(float(exact), abs=1e-11)


@given(st.floats(0, 1), st.integers(1, 12), st.data())
def test_pass_at_k_is_unbiased(chance: float, samples: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, samples))
    shares = [comb(samples, c) * chance**c * (1 - chance) ** (samples - c) for c in range(samples + 1)]
    mean = float(shares @ pass_at_k(np.arange(samples + 1), samples, k))
    assert mean == pytest.approx(1 - (1 - chance) ** k, abs=1e-12)


def test_pass_at_k_of_arrays_and_of_one_number_of_samples_per_problem() -> None:
    got = pass_at_k(np.array([[0, 1], [2, 4]]), 4, 2)
    assert got == pytest.approx(np.array([[0, 1 / 2], [5 / 6, 1]]))
    assert pass_at_k(np.array([1, 1, 1]), np.array([2, 4, 8]), 2) == pytest.approx([1, 1 / 2, 1 / 4])
    assert pass_at_k(np.array([], dtype=np.int64), 4, 2).shape == (0,)


@pytest.mark.parametrize(
    ("samples", "k", "told"),
    [(8, 0, "pass@0.*8 samples"), (8, -1, "pass@-1.*8 samples"), (8, 9, "8 samples"), ([8, 3], 4, "3 samples")],
)
def test_pass_at_k_refuses_what_cannot_be_drawn(samples: int | list[int], k: int, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        pass_at_k(np.array([1, 1]), np.asarray(samples), k)


def test_interval_by_hand() -> None:
    """Values 1, 2, 6: mean 3, deviation √7, and Student's 97.5 % point of two degrees of freedom, 4.302653."""
    half = 4.302653 * sqrt(7) / sqrt(3)
    got = mean_interval(np.array([1.0, 2.0, 6.0]))
    assert (got.estimate, got.n) == (3.0, 3)
    assert (got.low, got.high) == pytest.approx((3 - half, 3 + half), abs=1e-5)


def test_interval_is_clipped_to_bounds_only_where_asked() -> None:
    values_P = np.array([0.0, 0.0, 1.0])
    free, clipped = mean_interval(values_P), mean_interval(values_P, bounds=(0.0, 1.0))
    assert free.low < 0
    assert free.high > 1
    assert clipped == Interval(free.estimate, 0.0, 1.0, 3)
    inside = np.array([0.4, 0.5, 0.6, 0.5])
    assert mean_interval(inside, bounds=(0.0, 1.0)) == mean_interval(inside)


@pytest.mark.parametrize(("bounds", "expected"), [(None, (nan, nan)), ((0.0, 1.0), (0.0, 1.0))])
def test_one_problem_says_nothing_of_the_others(
    bounds: tuple[float, float] | None, expected: tuple[float, float]
) -> None:
    got = mean_interval(np.array([0.25]), bounds=bounds)
    assert (got.estimate, got.n) == (0.25, 1)
    assert [got.low, got.high] == pytest.approx(expected, nan_ok=True)


def problem_values(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.float64]:
    """pass@4 of 16 samples whose chance of being right differs between problems: mostly near 0 or near 1."""
    return pass_at_k(rng.binomial(16, rng.beta(0.4, 0.6, size=shape)), 16, 4)


@pytest.mark.parametrize("problems", [30, 100, 500])
@pytest.mark.parametrize("kind", ["one sample", "pass@4 of 16"])
def test_interval_covers_the_true_mean_as_often_as_it_says(problems: int, kind: str) -> None:
    rng = np.random.default_rng([problems, len(kind)])
    if kind == "one sample":
        values_RP, truth = rng.binomial(1, 0.35, size=(3000, problems)).astype(np.float64), 0.35
    else:
        values_RP = problem_values(rng, (3000, problems))
        # of Beta(0.4, 0.6), the mean of (1 − p)⁴ is a product of four ratios
        truth = 1 - np.prod([(0.6 + i) / (1 + i) for i in range(4)])
    intervals = [mean_interval(values_P, bounds=(0.0, 1.0)) for values_P in values_RP]
    covered = np.mean([interval.low <= truth <= interval.high for interval in intervals])
    assert 0.93 <= covered <= 0.97


def test_difference_is_that_of_each_problem() -> None:
    got = paired_difference(np.array([0.5, 1.0, 0.25]), np.array([0.25, 0.5, 0.5]))
    assert got == mean_interval(np.array([0.25, 0.5, -0.25]))
    assert got.estimate == pytest.approx(1 / 6)


def test_pairing_uses_that_problems_are_hard_for_everyone() -> None:
    rng = np.random.default_rng(5)
    baseline_P = problem_values(rng, (1, 400))[0]
    values_P = np.clip(baseline_P + rng.normal(0.03, 0.05, 400), 0, 1)
    paired = paired_difference(values_P, baseline_P)
    ours, theirs = mean_interval(values_P), mean_interval(baseline_P)
    unpaired_half = sqrt((ours.high - ours.estimate) ** 2 + (theirs.high - theirs.estimate) ** 2)
    assert paired.high - paired.estimate < unpaired_half / 4
    assert paired.estimate == pytest.approx(ours.estimate - theirs.estimate)
    assert paired.low > 0 > ours.estimate - theirs.estimate - unpaired_half
