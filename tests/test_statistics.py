"""Estimators against enumeration, intervals and tests against closed forms; what they cover stands in another file."""

from collections import Counter
from fractions import Fraction
from itertools import combinations
from math import comb, exp, inf, nan, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import brentq

from rheostat.errors import ConfigError
from rheostat.statistics import (
    Interval,
    accuracy_within,
    area_under_curve,
    avg_at_n,
    best_of_k,
    bootstrap_interval,
    equivalent_samples,
    holm,
    maj_at_k,
    mean_interval,
    oracle_at_k,
    paired_difference,
    paired_p_value,
    pass_at_k,
    proportion_interval,
    sign_test,
    tokens_per_solved,
)


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


def subsets_of(samples: int, k: int) -> list[list[int]]:
    return [list(subset) for subset in combinations(range(samples), k)]


def test_average_leaves_out_what_is_missing_and_is_pass_at_1() -> None:
    got = avg_at_n(np.array([[1, 0, nan, 1], [nan, nan, nan, nan], [0.25, 0.5, 0.75, 0.5]]))
    assert got == pytest.approx([2 / 3, nan, 0.5], nan_ok=True)
    rewards_PS = np.random.default_rng(0).integers(0, 2, (5, 7)).astype(float)
    assert avg_at_n(rewards_PS) == pytest.approx(pass_at_k(rewards_PS.sum(1).astype(np.int64), 7, 1))
    with pytest.raises(ConfigError, match=r"outside \[0, 1\]"):
        avg_at_n(np.array([[0.0, 1.5]]))


def majority_by_enumeration(labels: list[int], right: int, k: int) -> float:
    won = 0.0
    subsets = subsets_of(len(labels), k)
    for subset in subsets:
        votes = Counter(labels[sample] for sample in subset if labels[sample] != -1)
        winners = [label for label, count in votes.items() if count == max(votes.values())]
        won += (right in winners) / max(len(winners), 1)
    return won / len(subsets)


@given(st.lists(st.integers(-1, 4), min_size=1, max_size=9), st.integers(-1, 5), st.data())
def test_majority_is_the_mean_over_subsets(labels: list[int], right: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(labels)))
    got = maj_at_k(np.array([labels]), np.array([right]), k)
    assert got == pytest.approx([majority_by_enumeration(labels, right, k)], abs=1e-12)


def test_majority_of_several_problems_is_that_of_each() -> None:
    labels_PS = np.random.default_rng(3).integers(-1, 4, (12, 8))
    right_P = np.arange(12) % 4
    for k in range(1, 9):
        expected = [majority_by_enumeration(list(own), int(r), k) for own, r in zip(labels_PS, right_P, strict=True)]
        assert maj_at_k(labels_PS, right_P, k) == pytest.approx(expected, abs=1e-12)


def test_majority_of_one_is_the_average_and_of_all_is_the_vote() -> None:
    labels_PS = np.array([[0, 0, 1, 2, -1, 1, 0, 3], [4, 4, 5, 5, -1, -1, -1, -1], [-1] * 8])
    right_P = np.array([0, 5, 0])
    assert maj_at_k(labels_PS, right_P, 1) == pytest.approx([3 / 8, 2 / 8, 0])
    assert maj_at_k(labels_PS, right_P, 8) == pytest.approx([1, 1 / 2, 0])


def test_majority_of_no_answer_is_never_right() -> None:
    for k in (1, 2, 3):
        assert maj_at_k(np.array([[-1, 0, -1]]), np.array([-1]), k) == 0


def test_majority_of_many_samples_keeps_its_precision() -> None:
    """Two answers and an odd k: the right one wins where a hypergeometric number of its votes is above k / 2."""
    labels_PS = np.repeat([0, 1], [120, 136])[None]
    exact = Fraction(sum(comb(120, v) * comb(136, 63 - v) for v in range(32, 64)), comb(256, 63))
    assert maj_at_k(labels_PS, np.array([0]), 63) == pytest.approx([float(exact)], abs=1e-12)


@pytest.mark.parametrize(
    ("labels", "right", "k", "told"),
    [
        ([[0, 1]], [0], 3, "k is 3, and there are 2 samples"),
        ([[0, 1]], [0], 0, "k is 0"),
        ([[0, -2]], [0], 1, "a label is -2"),
        ([[0, 1]], [0, 1], 1, "one right each"),
        ([0, 1], [0], 1, "problems × samples"),
    ],
)
def test_majority_refuses(labels: list[object], right: list[int], k: int, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        maj_at_k(np.array(labels), np.array(right), k)


def best_by_enumeration(correct: list[float], scores: list[float], k: int) -> float:
    found = []
    for subset in subsets_of(len(correct), k):
        top = max(scores[sample] for sample in subset)
        found.append(np.mean([correct[sample] for sample in subset if scores[sample] == top]))
    return float(np.mean(found))


@given(st.lists(st.tuples(st.sampled_from([0, 1, 0.5]), st.sampled_from([-inf, 0, 1, 2, 3])), min_size=1, max_size=9))
def test_best_of_k_is_the_mean_over_subsets(samples: list[tuple[float, float]]) -> None:
    correct, scores = [list(column) for column in zip(*samples, strict=True)]
    for k in range(1, len(samples) + 1):
        got = best_of_k(np.array([correct]), np.array([scores]), k)
        assert got == pytest.approx([best_by_enumeration(correct, scores, k)], abs=1e-12)


def test_best_of_k_of_a_perfect_and_of_an_ignorant_verifier() -> None:
    correct_PS = np.random.default_rng(1).integers(0, 2, (6, 16)).astype(float)
    for k in (1, 4, 16):
        passed = pass_at_k(correct_PS.sum(1).astype(np.int64), 16, k)
        assert best_of_k(correct_PS, correct_PS, k) == pytest.approx(passed)
        assert best_of_k(correct_PS, np.zeros((6, 16)), k) == pytest.approx(correct_PS.mean(1))


def test_best_of_k_refuses() -> None:
    right = np.array([[1.0, 0.0]])
    with pytest.raises(ConfigError, match="score for each sample"):
        best_of_k(right, np.array([[nan, 1.0]]), 1)
    with pytest.raises(ConfigError, match="score for each sample"):
        best_of_k(right, np.array([[1.0]]), 1)
    with pytest.raises(ConfigError, match="1 rewards are NaN"):
        best_of_k(np.array([[1.0, nan]]), right, 1)
    with pytest.raises(ConfigError, match="k is 3, and there are 2"):
        best_of_k(right, right, 3)


def test_accuracy_within_tokens_by_hand() -> None:
    lengths_PS = np.array([[1, 5, 9, 9], [3, 3, 20, 20]])
    correct_PS = np.array([[1.0, 0, 1, 1], [0, 1, 1, 0]])
    got = accuracy_within(lengths_PS, correct_PS, [1, 2, 9, 100])
    assert got == pytest.approx(np.array([[1 / 4, 1 / 4, 3 / 4, 3 / 4], [0, 0, 1 / 4, 1 / 2]]))
    with pytest.raises(ConfigError, match="one per sample"):
        accuracy_within(lengths_PS[:, :2], correct_PS, [1])
    with pytest.raises(ConfigError, match="NaN"):
        accuracy_within(lengths_PS, correct_PS * nan, [1])


def test_area_counts_every_doubling_the_same() -> None:
    assert area_under_curve(np.array([0.0, 1.0, 1.0]), [1, 2, 8]) == pytest.approx((0.5 + 2 * 1) / 3)
    assert area_under_curve(np.full((3, 4), 0.7), [1, 2, 4, 100]) == pytest.approx([0.7] * 3)
    k_K = 2.0 ** np.linspace(0, 6, 2001)
    assert area_under_curve(np.log2(k_K) ** 2 / 36, k_K) == pytest.approx(1 / 3, abs=1e-6)  # ∫ t² dt


@pytest.mark.parametrize("at", [[1], [0, 1], [1, 1], [2, 1], [1, 2, 4]])
def test_area_refuses_budgets_that_do_not_rise(at: list[int]) -> None:
    with pytest.raises(ConfigError, match="budgets"):
        area_under_curve(np.zeros(min(len(at), 2)), at)


def oracle_slowly(rewards_AS: NDArray[np.float64], k: int) -> float:
    """Choose on one half by enumerating its subsets of k, value on the other; both ways."""
    cells = [[value for value in cell if value == value] for cell in rewards_AS]
    cells = [cell for cell in cells if len(cell) // 2 >= k]
    if not cells:
        return nan
    found = []
    for side in (0, 1):
        seen, other = (
            [float(np.mean([max(drawn) for drawn in combinations(cell[half::2], k)])) for cell in cells]
            for half in (side, 1 - side)
        )
        best = [action for action, value in enumerate(seen) if value > max(seen) - 1e-9]
        found.append(np.mean([other[action] for action in best]))
    return float(np.mean(found))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_oracle_is_chosen_on_one_half_and_valued_on_the_other(k: int) -> None:
    rng = np.random.default_rng(k)
    rewards_PAS = rng.binomial(1, rng.random((60, 4, 1)), (60, 4, 9)).astype(np.float32)
    rewards_PAS[rng.random(rewards_PAS.shape) < 0.35] = nan
    rewards_PAS[0] = nan
    got_P = oracle_at_k(rewards_PAS, k)
    assert np.isnan(got_P[0])
    assert got_P == pytest.approx([oracle_slowly(own, k) for own in rewards_PAS.astype(float)], nan_ok=True)


def test_oracle_never_promises_more_than_there_is() -> None:
    """Three equally good actions: no headroom, though the best of three noisy means looks like some."""
    rewards_PAS = np.random.default_rng(0).binomial(1, 0.4, (20_000, 3, 8)).astype(float)
    assert rewards_PAS.mean(2).max(1).mean() > 0.5
    honest = mean_interval(oracle_at_k(rewards_PAS))
    assert honest.low < 0.4 < honest.high


def test_oracle_finds_headroom_that_is_there() -> None:
    """Each of two actions is right on half of the problems: 1/2 for either alone, 1 for who knows which."""
    rewards_PAS = np.repeat(np.eye(2)[np.arange(10) % 2][:, :, None], 4, axis=2)
    assert oracle_at_k(rewards_PAS, 2) == pytest.approx(np.ones(10))


def test_oracle_refuses() -> None:
    with pytest.raises(ConfigError, match="rewards 0 or 1"):
        oracle_at_k(np.full((1, 1, 4), 0.5), 2)
    with pytest.raises(ConfigError, match="problems × actions × samples"):
        oracle_at_k(np.zeros((2, 4)))
    with pytest.raises(ConfigError, match="k of at least 1"):
        oracle_at_k(np.zeros((1, 2, 4)), 0)


def score_interval_by_inversion(mean: float, throws: float, quantile: float) -> list[float]:
    """The shares p whose normal test of ``mean`` over ``throws`` does not exceed ``quantile``: by bisection."""

    def excess(p: float) -> float:
        return (mean - p) ** 2 * throws - quantile**2 * p * (1 - p)

    return [brentq(excess, 0, mean), brentq(excess, mean, 1)]


def test_proportion_of_zeros_and_ones_is_wilsons() -> None:
    got = proportion_interval(np.repeat([1.0, 0.0], [7, 23]))
    assert [got.low, got.high] == pytest.approx(score_interval_by_inversion(7 / 30, 30, 1.959964), abs=1e-6)
    assert (got.estimate, got.n) == (pytest.approx(7 / 30), 30)


def test_proportion_uses_the_effective_number_of_problems() -> None:
    values_P = np.array([0, 0, 0.25, 0.5, 0, 0, 0.125, 1, 0, 0.25])
    mean, variance = values_P.mean(), values_P.var(ddof=1) / 10
    got = proportion_interval(values_P)
    expected = score_interval_by_inversion(mean, mean * (1 - mean) / variance, 2.262157)
    assert [got.low, got.high] == pytest.approx(expected, abs=1e-6)
    assert got.estimate - got.low < got.high - got.estimate


def test_proportion_of_problems_that_all_fail_is_not_certain() -> None:
    nothing, everything = proportion_interval(np.zeros(30)), proportion_interval(np.ones(30))
    assert (nothing.low, nothing.high) == pytest.approx((0, 1.959964**2 / (30 + 1.959964**2)), abs=1e-6)
    assert (everything.low, everything.high) == pytest.approx((1 - nothing.high, 1))
    assert proportion_interval(np.full(5, 0.5)) == Interval(0.5, 0.5, 0.5, 5)
    assert proportion_interval(np.array([0.5])) == Interval(0.5, 0, 1, 1)


def test_proportion_does_not_mind_rounding() -> None:
    exact, rounded = proportion_interval(np.ones(30)), proportion_interval(np.tile([1 + 1e-7, 1 - 1e-7], 15))
    assert (rounded.low, rounded.high) == (exact.low, exact.high)
    assert rounded.estimate == pytest.approx(1, abs=1e-7)


@given(st.lists(st.integers(0, 8), min_size=1, max_size=40))
def test_proportion_stays_inside_and_is_symmetric(right: list[int]) -> None:
    values_P = np.array(right) / 8
    got, mirrored = proportion_interval(values_P), proportion_interval(1 - values_P)
    assert -1e-12 <= got.low <= got.estimate + 1e-12
    assert got.estimate - 1e-12 <= got.high <= 1 + 1e-12
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((got.low, got.high), abs=1e-9)


@pytest.mark.parametrize("values", [[], [0.5, 1.5], [0.5, nan]])
def test_proportion_refuses(values: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"values in \[0, 1\]"):
        proportion_interval(np.array(values))


def test_bootstrap_of_a_mean_is_near_students() -> None:
    values_P = np.random.default_rng(0).normal(3, 1, 200)
    got, student = bootstrap_interval(lambda mean: mean, values_P), mean_interval(values_P)
    assert got.estimate == student.estimate
    assert (got.low, got.high) == pytest.approx((student.low, student.high), abs=0.01)
    assert got == bootstrap_interval(lambda mean: mean, values_P)
    assert got != bootstrap_interval(lambda mean: mean, values_P, seed=1)


def test_bootstrap_draws_all_values_of_a_problem_together() -> None:
    values_P = np.random.default_rng(0).lognormal(size=50)
    got = bootstrap_interval(lambda one, other: one / other, 2 * values_P, values_P)
    assert (got.low, got.estimate, got.high) == pytest.approx((2, 2, 2))
    constant = bootstrap_interval(lambda mean: mean, np.full(5, 0.3))
    assert (constant.low, constant.estimate, constant.high) == pytest.approx((0.3, 0.3, 0.3))


def test_bootstrap_refuses() -> None:
    with pytest.raises(ConfigError, match="at least two"):
        bootstrap_interval(lambda mean: mean, np.array([1.0]))
    with pytest.raises(ConfigError, match="same problems"):
        bootstrap_interval(lambda one, other: one / other, np.ones(3), np.ones(4))
    with pytest.raises(ConfigError, match="not finite"), np.errstate(divide="ignore"):
        bootstrap_interval(lambda mean: 1 / mean, np.array([0.0, 0.0, 1.0]))


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=2, max_size=30))
def test_p_value_is_below_5_percent_where_the_interval_excludes_0(pairs: list[tuple[int, int]]) -> None:
    values_P, baseline_P = np.array(pairs).T / 8
    interval = paired_difference(values_P, baseline_P)
    assert (paired_p_value(values_P, baseline_P) < 0.05) == (interval.low > 1e-12 or interval.high < -1e-12)


def test_p_values_by_hand() -> None:
    """Differences 1, 2, 6: t = 3 / (√7 / √3), of two degrees of freedom, whose distribution function is algebraic."""
    t = 3 * sqrt(3) / sqrt(7)
    two_sided = 1 - t / sqrt(2 + t**2)
    assert paired_p_value(np.array([1.0, 2.0, 6.0]), np.zeros(3)) == pytest.approx(two_sided)
    # signs + + + + − and a tie: at least four of five heads, or at most one
    values_P = np.array([1, 2, 3, 4, -5, 0.1 + 0.2])
    baseline_P = np.array([0, 0, 0, 0, 0, 0.3])
    assert sign_test(values_P, baseline_P) == pytest.approx(2 * (5 + 1) / 32)


def test_p_values_where_nothing_can_be_said() -> None:
    same = np.array([0.1, 0.5])
    assert paired_p_value(same, same) == sign_test(same, same) == paired_p_value(same[:1], same[1:]) == 1
    assert paired_p_value(same + 0.25, same) == 0
    for test in (paired_p_value, sign_test):
        with pytest.raises(ConfigError, match="same problems"):
            test(same, same[:1])


@given(st.lists(st.floats(0, 1), max_size=7))
def test_holm_is_the_closure_of_bonferroni(p_values: list[float]) -> None:
    """A hypothesis holds at a level where Bonferroni rejects every family that it is in (Marcus et al., 1976)."""
    family = range(len(p_values))
    expected = [
        max(
            min(1.0, size * min(p_values[i] for i in subset))
            for size in range(1, len(p_values) + 1)
            for subset in combinations(family, size)
            if one in subset
        )
        for one in family
    ]
    assert holm(p_values).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("p_values", [[0.5, nan], [-0.1], [1.1]])
def test_holm_refuses(p_values: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"p-values in \[0, 1\]"):
        holm(p_values)


def test_tokens_per_solved_by_hand() -> None:
    tokens_P, solved_P = np.array([100.0, 200, 300]), np.array([1.0, 0.5, 0])
    got = tokens_per_solved(tokens_P, solved_P)
    assert (got.estimate, got.n) == (pytest.approx(400), 3)
    # the logarithm's derivative: token shares 1/2, 1, 3/2 less solved shares 2, 1, 0, deviation 3/2
    factor = exp(4.302653 * 1.5 / sqrt(3))
    assert (got.low, got.high) == pytest.approx((400 / factor, 400 * factor), rel=1e-5)


def test_tokens_of_what_is_never_solved_have_no_end() -> None:
    none = tokens_per_solved(np.full(30, 50.0), np.zeros(30))
    assert (none.estimate, none.high) == (inf, inf)
    assert none.low == pytest.approx(50 / proportion_interval(np.zeros(30)).high)
    assert tokens_per_solved(np.array([50.0]), np.array([0.5])) == Interval(100, 0, inf, 1)


@pytest.mark.parametrize(("tokens", "solved"), [([1, 2], [1]), ([0, 2], [1, 1]), ([1, nan], [1, 1]), ([1, 2], [2, 0])])
def test_tokens_per_solved_refuses(tokens: list[float], solved: list[float]) -> None:
    with pytest.raises(ConfigError):
        tokens_per_solved(np.array(tokens), np.array(solved))


def test_equivalent_samples_by_hand() -> None:
    """All problems alike, so that nothing is uncertain: plain sampling reaches 0.4, 0.6, 0.7."""
    plain_PK = np.tile([0.4, 0.6, 0.7], (4, 1))
    for target, samples in ((0, 0), (0.1, 0.25), (0.4, 1), (0.55, 1.75), (0.7, 3), (0.71, inf)):
        got = equivalent_samples(plain_PK, np.full(4, target))
        assert (got.low, got.estimate, got.high) == pytest.approx((samples,) * 3)
    flat = equivalent_samples(np.tile([0.4, 0.4, 0.7], (4, 1)), np.full(4, 0.4))
    assert (flat.low, flat.estimate, flat.high) == pytest.approx((1, 1, 2))


def test_equivalent_samples_hold_the_numbers_that_the_paired_difference_allows() -> None:
    rng = np.random.default_rng(2)
    correct_P = rng.binomial(16, rng.beta(0.5, 1.5, 80))
    plain_PK = np.stack([pass_at_k(correct_P, 16, k) for k in range(1, 17)], axis=1)
    target_P = pass_at_k(rng.binomial(16, np.clip(correct_P / 16 + 0.05, 0, 1)), 16, 4)
    got = equivalent_samples(plain_PK, target_P)
    for k in range(1, 17):
        gap = paired_difference(target_P, plain_PK[:, k - 1])
        assert (gap.low <= 0 <= gap.high) == (got.low <= k <= got.high)
        assert (gap.estimate > 0) == (k < got.estimate)
    assert 4 < got.estimate < 16


def test_equivalent_samples_of_one_problem_or_of_others() -> None:
    assert equivalent_samples(np.array([[0.5, 1.0]]), np.array([0.75])) == Interval(1.5, 0, inf, 1)
    for plain_PK in (np.ones((2, 0)), np.ones((3, 1)), np.ones(2)):
        with pytest.raises(ConfigError, match="problems of the target"):
            equivalent_samples(plain_PK, np.ones(2))
