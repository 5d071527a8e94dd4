"""What 95 % intervals and p-values promise, measured on simulated experiments whose truth is known.

Problems differ in how often they are solved (Beta-distributed rates), and each brings several samples.
"""

import numpy as np
import pytest
from numpy.typing import NDArray

from rheostat.statistics import (
    Interval,
    area_under_curve,
    bootstrap_interval,
    equivalent_samples,
    mean_interval,
    paired_difference,
    paired_p_value,
    pass_at_k,
    proportion_interval,
    sign_test,
    tokens_per_solved,
)

RATES = {"broad": (0.4, 0.6), "skewed": (0.5, 4.5), "very skewed": (0.2, 1.8)}
SAMPLES = 8


def rates(rng: np.random.Generator, kind: str, problems: int, experiments: int = 3000) -> NDArray[np.float64]:
    return rng.beta(*RATES[kind], size=(experiments, problems))


def mean_rate(kind: str, power: int = 1) -> float:
    """E[p^power] of a Beta distribution."""
    a, b = RATES[kind]
    return float(np.prod([(a + i) / (a + b + i) for i in range(power)]))


def coverage(intervals: list[Interval], truth: float) -> float:
    return float(np.mean([interval.low <= truth <= interval.high for interval in intervals]))


@pytest.mark.parametrize("problems", [30, 100, 500])
@pytest.mark.parametrize("kind", RATES)
def test_proportion_interval_holds_the_truth(kind: str, problems: int) -> None:
    rng = np.random.default_rng([problems, len(kind)])
    values_RP = rng.binomial(SAMPLES, rates(rng, kind, problems)) / SAMPLES
    assert 0.93 <= coverage([proportion_interval(values_P) for values_P in values_RP], mean_rate(kind)) <= 0.97


@pytest.mark.parametrize("kind", ["skewed", "very skewed"])
def test_students_interval_is_too_short_for_few_skewed_shares(kind: str) -> None:
    """Why shares have an interval of their own; should this ever fail, one function is enough."""
    rng = np.random.default_rng(len(kind))
    values_RP = rng.binomial(SAMPLES, rates(rng, kind, 30, 4000)) / SAMPLES
    student = [mean_interval(values_P, bounds=(0, 1)) for values_P in values_RP]
    assert coverage(student, mean_rate(kind)) < 0.93


@pytest.mark.parametrize("problems", [30, 100, 500])
def test_proportion_interval_of_one_sample_holds_the_truth_on_average_over_rates(problems: int) -> None:
    """Exact, without simulation: at a single rate, the coverage of any interval of a count jumps up and down."""
    intervals = [proportion_interval((np.arange(problems) < right).astype(float)) for right in range(problems + 1)]
    low_C, high_C = np.array([(interval.low, interval.high) for interval in intervals]).T
    p_N = np.linspace(0.02, 0.98, 193)[:, None]
    right_C = np.arange(problems + 1)
    log_choose_C = np.concatenate([[0], np.cumsum(np.log((problems - right_C[:-1]) / (right_C[:-1] + 1)))])
    chance_NC = np.exp(log_choose_C + right_C * np.log(p_N) + (problems - right_C) * np.log(1 - p_N))
    covered_N = (chance_NC * ((low_C <= p_N) & (p_N <= high_C))).sum(1)
    assert 0.94 <= covered_N.mean() <= 0.96
    assert covered_N.min() > 0.83  # the known weak spots, near 0 and 1


@pytest.mark.parametrize("problems", [30, 100, 500])
@pytest.mark.parametrize("kind", RATES)
def test_paired_difference_holds_the_truth(kind: str, problems: int) -> None:
    """An adapter that helps on some problems: it solves a third of what is left, on 30 % of them."""
    rng = np.random.default_rng([problems, len(kind), 1])
    p_RP = rates(rng, kind, problems)
    better_RP = np.where(rng.random(p_RP.shape) < 0.3, p_RP + (1 - p_RP) / 3, p_RP)
    ours_RP, theirs_RP = (rng.binomial(SAMPLES, chance_RP) / SAMPLES for chance_RP in (better_RP, p_RP))
    intervals = [paired_difference(ours_P, theirs_P) for ours_P, theirs_P in zip(ours_RP, theirs_RP, strict=True)]
    assert 0.93 <= coverage(intervals, 0.3 * (1 - mean_rate(kind)) / 3) <= 0.97


def costs(
    rng: np.random.Generator, kind: str, problems: int, experiments: int = 3000
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Tokens and share solved of each problem (hard ones take longer, by a lognormal factor), and tokens per solved."""
    p_RP = rates(rng, kind, problems, experiments)
    tokens_RP = rng.lognormal(5, 0.5, p_RP.shape) * (1.5 - p_RP)
    truth = np.exp(5 + 0.5**2 / 2) * (1.5 - mean_rate(kind)) / mean_rate(kind)
    return tokens_RP, rng.binomial(SAMPLES, p_RP) / SAMPLES, float(truth)


@pytest.mark.parametrize("problems", [30, 100, 500])
@pytest.mark.parametrize("kind", RATES)
def test_tokens_per_solved_hold_the_truth(kind: str, problems: int) -> None:
    tokens_RP, solved_RP, truth = costs(np.random.default_rng([problems, len(kind), 2]), kind, problems)
    intervals = [tokens_per_solved(tokens_P, own_P) for tokens_P, own_P in zip(tokens_RP, solved_RP, strict=True)]
    assert 0.93 <= coverage(intervals, truth) <= 0.97


def areas(
    rng: np.random.Generator, kind: str, problems: int, experiments: int = 1000
) -> tuple[NDArray[np.float64], float]:
    """Areas under pass@1, 2, 4, 8 of each problem, from 16 samples, and their mean over all problems there could be."""
    budgets, (a, b) = (1, 2, 4, 8), RATES[kind]
    right_RP = rng.binomial(16, rates(rng, kind, problems, experiments))
    none_right = [np.prod([(b + i) / (a + b + i) for i in range(k)]) for k in budgets]  # E[(1 - p)^k]
    values_RPK = np.stack([pass_at_k(right_RP, 16, k) for k in budgets], axis=2)
    return area_under_curve(values_RPK, budgets), float(area_under_curve(1 - np.array(none_right), budgets))


@pytest.mark.parametrize("problems", [30, 100, 500])
@pytest.mark.parametrize("kind", RATES)
def test_bootstrap_of_an_area_holds_the_truth(kind: str, problems: int) -> None:
    areas_RP, truth = areas(np.random.default_rng([problems, len(kind), 7]), kind, problems)
    intervals = [bootstrap_interval(lambda mean: mean, area_P, resamples=400) for area_P in areas_RP]
    assert 0.93 <= coverage(intervals, truth) <= 0.97


@pytest.mark.parametrize("kind", ["broad", "skewed"])
def test_bootstrap_of_a_ratio_holds_the_truth(kind: str) -> None:
    """At 30 problems, where it is hardest; 1,000 experiments are exact to 1.5 points."""
    tokens_RP, solved_RP, truth = costs(np.random.default_rng([len(kind), 3]), kind, 30, 1000)
    intervals = [
        bootstrap_interval(lambda tokens, solved: solved / tokens, *values_NP, resamples=300)
        for values_NP in zip(tokens_RP, solved_RP, strict=True)
    ]
    assert 0.92 <= coverage(intervals, 1 / truth) <= 0.97


@pytest.mark.parametrize("problems", [30, 100, 500])
def test_equivalent_samples_hold_the_truth(problems: int) -> None:
    """Of an adapter whose four samples fail as often as six of plain sampling, by problem: break-even at 6."""
    rng = np.random.default_rng([problems, 4])
    p_RP = rates(rng, "skewed", problems, 1000)
    plain_RP, ours_RP = rng.binomial(16, p_RP), rng.binomial(16, 1 - (1 - p_RP) ** (6 / 4))
    plain_RPK = np.stack([pass_at_k(plain_RP, 16, k) for k in range(1, 17)], axis=2)
    target_RP = pass_at_k(ours_RP, 16, 4)
    intervals = [equivalent_samples(*experiment) for experiment in zip(plain_RPK, target_RP, strict=True)]
    assert 0.93 <= coverage(intervals, 6.0) <= 0.97


def test_a_paired_test_finds_what_an_unpaired_one_misses() -> None:
    rng = np.random.default_rng(5)
    theirs_RP = rates(rng, "broad", 100, 500)
    ours_RP = np.clip(theirs_RP + rng.normal(0.03, 0.08, theirs_RP.shape), 0, 1)
    paired = np.mean([paired_p_value(*pair) < 0.05 for pair in zip(ours_RP, theirs_RP, strict=True)])
    signs = np.mean([sign_test(*pair) < 0.05 for pair in zip(ours_RP, theirs_RP, strict=True)])
    unpaired = np.mean(
        [
            abs(ours_P.mean() - theirs_P.mean()) > 1.96 * np.sqrt((ours_P.var() + theirs_P.var()) / 100)
            for ours_P, theirs_P in zip(ours_RP, theirs_RP, strict=True)
        ]
    )
    assert paired > 0.8
    assert signs > 0.5
    assert unpaired < 0.15


def test_where_nothing_differs_tests_find_something_in_5_percent() -> None:
    rng = np.random.default_rng(6)
    p_RP = rates(rng, "broad", 60, 1500)
    ours_RP, theirs_RP = (rng.binomial(SAMPLES, p_RP) / SAMPLES for _ in range(2))
    assert 0.04 <= np.mean([paired_p_value(*pair) < 0.05 for pair in zip(ours_RP, theirs_RP, strict=True)]) <= 0.06
    # exact tests of a count keep below their level
    assert 0.015 <= np.mean([sign_test(*pair) < 0.05 for pair in zip(ours_RP, theirs_RP, strict=True)]) <= 0.05
