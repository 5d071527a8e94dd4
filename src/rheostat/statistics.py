"""Intervals and tests that count problems, not samples, and the estimators of one problem's value.

Which interval for what, by simulation (``tests/test_statistics_coverage.py``): how many of the 95 % intervals hold the
truth, with 30 to 500 problems whose success rates are Beta-distributed, also skewed with mean 0.1, and several samples
of each:

- shares (pass@k, accuracy): :func:`proportion_interval`. 94 % on 30 skewed problems, Student's t 90 to 92 %.
- differences: :func:`paired_difference`, Student's t. 94 to 96 % on 30 problems, the BCa bootstrap 75 to 91 %.
- tokens per solved problem: :func:`tokens_per_solved`. 94 to 96 %.
- break-even: :func:`equivalent_samples`. 94 to 97 %.
- areas under pass@k, and other functions of means over problems: :func:`bootstrap_interval`. 95 to 96 % of areas and 93
  to 95 % of ratios on 30 problems; the percentile bootstrap 93 to 94 % of areas.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.special
import scipy.stats
from jaxtyping import Float
from numpy.typing import NDArray

from rheostat.errors import ConfigError
from rheostat.estimators import (
    TIED,
    accuracy_within,
    area_under_curve,
    avg_at_n,
    best_of_k,
    maj_at_k,
    oracle_at_k,
    pass_at_k,
)

__all__ = [
    "Interval",
    "accuracy_within",
    "area_under_curve",
    "avg_at_n",
    "best_of_k",
    "bootstrap_interval",
    "equivalent_samples",
    "holm",
    "maj_at_k",
    "mean_interval",
    "oracle_at_k",
    "paired_difference",
    "paired_p_value",
    "pass_at_k",
    "proportion_interval",
    "sign_test",
    "tokens_per_solved",
]


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its 95 % interval over ``n`` problems."""

    estimate: float
    low: float
    high: float
    n: int


def mean_interval(values_P: Float[NDArray[np.float64], " P"], bounds: tuple[float, float] | None = None) -> Interval:
    """Mean over problems with Student's 95 % interval, clipped to ``bounds``.

    Each problem brings one value, whatever number of samples it was estimated from, so the interval is
    clustered by problem. It is conditional on the policy: a trained adapter is not resampled. For values in [0, 1] use
    :func:`proportion_interval`: with few problems and a mean near 0 or 1, the symmetric interval covers too little, and
    where all values are 0 it is empty.
    """
    n = len(values_P)
    if n == 1 and bounds is not None:  # one problem tells nothing of the others
        return Interval(float(values_P[0]), *bounds, n)
    mean = float(values_P.mean())
    spread = float(values_P.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
    half = _student(n) * spread
    low, high = mean - half, mean + half
    if bounds is not None:
        low, high = max(low, bounds[0]), min(high, bounds[1])
    return Interval(mean, low, high, n)


def proportion_interval(values_P: Float[NDArray[np.floating], " P"]) -> Interval:
    """Mean over problems of values in [0, 1] with a 95 % score interval, clustered by problem.

    Values that are all 0 or 1 (one sample per problem) have Wilson's interval. Others have Wilson's interval with
    Student's quantile and the effective number of problems p(1 − p) / v, where v is the variance of the mean as the
    spread between problems shows it: of so many coin throws the mean would be as exact as this one is. It stays inside
    [0, 1] without clipping, and is not empty where every problem fails.

    Source: Wilson, 1927, *Probable Inference, the Law of Succession, and Statistical Inference*; the effective number:
    Korn and Graubard, 1998, *Confidence Intervals for Proportions with Small Expected Number of Positive Counts
    Estimated from Survey Data*; with Wilson's interval: Franco et al., 2019, *Comparative Study of Confidence Intervals
    for Proportions in Complex Sample Surveys*.

    Raises:
        ConfigError: no values, or one outside [0, 1] by more than rounding.
    """
    values_P = np.asarray(values_P, dtype=np.float64)
    n = len(values_P)
    nearly_P = np.round(values_P, 6)  # float32 probabilities, that pass@k is weighted by, sum to 1 within this
    if not n or not ((nearly_P >= 0) & (nearly_P <= 1)).all():
        raise ConfigError("proportion: give at least one problem, and values in [0, 1] without NaN")
    values_P = np.clip(values_P, 0, 1)
    mean = float(values_P.mean())
    if np.isin(nearly_P, (0, 1)).all():
        ci = scipy.stats.binomtest(int(nearly_P.sum()), n).proportion_ci(0.95, method="wilson")
        return Interval(mean, float(ci.low), float(ci.high), n)
    if n == 1:  # one problem tells nothing of the others
        return Interval(mean, 0.0, 1.0, n)
    throw = mean * (1 - mean)  # variance of one coin throw
    square = _student(n) ** 2 * float(values_P.var(ddof=1)) / n / throw  # Wilson's z² / n, with the effective number
    middle = (mean + square / 2) / (1 + square)
    half = float(np.sqrt(square * throw + square**2 / 4)) / (1 + square)
    return Interval(mean, middle - half, middle + half, n)


def bootstrap_interval(
    statistic: Callable[..., NDArray[np.float64]],
    *values_P: Float[NDArray[np.floating], " P"],
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """``statistic`` of means over problems, with a 95 % interval from drawing the problems anew (BCa bootstrap).

    For what has no interval of its own, as the ratio of two policies' costs. The level is widened to Student's quantile
    ("expanded"), because a bootstrap of few problems is too narrow: on 30 skewed problems, coverage of a mean and of a
    ratio rises by a point, to about 94 %. Percentile-t was not taken: where most values are 0, some resamples have no
    spread, and the interval no end.

    Args:
        statistic: takes one array of means for each of ``values_P``, elementwise, and returns finite numbers:
            ``lambda tokens, solved: solved / tokens``.
        values_P: one value per problem; all are of the same problems, which are drawn together.

    Source: Efron, 1987, *Better Bootstrap Confidence Intervals*; expanded: Hesterberg, 2015, *What Teachers Should Know
    About the Bootstrap*.

    Raises:
        ConfigError: fewer than two problems, values of different lengths, or a statistic that is not finite everywhere.
    """
    if not values_P or len({len(own_P) for own_P in values_P}) > 1 or len(values_P[0]) < 2:
        raise ConfigError("bootstrap: give values of the same problems, at least two")
    values_NP = np.stack([np.asarray(own_P, dtype=np.float64) for own_P in values_P])
    n = values_NP.shape[1]
    estimate = float(statistic(*values_NP.mean(1)))
    level = 2 * scipy.stats.norm.cdf(np.sqrt(n / (n - 1)) * _student(n)) - 1

    def of_problems(index_RP: NDArray[np.int64], axis: int) -> NDArray[np.float64]:
        found = np.asarray(statistic(*values_NP[:, index_RP].mean(axis)))
        if not np.isfinite(found).all():
            raise ConfigError("bootstrap: the statistic is not finite on some resample; try its inverse")
        return found

    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.stats.DegenerateDataWarning)
        found = scipy.stats.bootstrap(
            (np.arange(n),),
            of_problems,
            n_resamples=resamples,
            batch=max(1, 2**20 // values_NP.size),
            vectorized=True,
            confidence_level=level,
            method="BCa",
            rng=np.random.default_rng(seed),
        )
    low, high = found.confidence_interval
    if np.isnan([low, high]).any():  # BCa is undefined where all resamples agree
        low, high = np.quantile(found.bootstrap_distribution, [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate, float(low), float(high), n)


def paired_difference(
    values_P: Float[NDArray[np.floating], " P"], baseline_P: Float[NDArray[np.floating], " P"]
) -> Interval:
    """Mean of value − baseline over the same problems, with its 95 % interval."""
    return mean_interval(np.asarray(values_P, dtype=np.float64) - np.asarray(baseline_P))


def paired_p_value(values_P: Float[NDArray[np.floating], " P"], baseline_P: Float[NDArray[np.floating], " P"]) -> float:
    """Two-sided p-value of :func:`paired_difference` (paired t-test): below 0.05 where the interval excludes 0.

    1 where the test can say nothing: fewer than two problems, or no difference on any.

    Raises:
        ConfigError: values of different problems.
    """
    difference_P = _differences(values_P, baseline_P)
    if len(difference_P) < 2 or not difference_P.any():
        return 1.0
    if np.ptp(difference_P) <= TIED:
        return 0.0
    return float(scipy.stats.ttest_1samp(difference_P, 0.0).pvalue)


def sign_test(values_P: Float[NDArray[np.floating], " P"], baseline_P: Float[NDArray[np.floating], " P"]) -> float:
    """Two-sided p-value of the exact sign test: is one better on more problems than the other; ties are dropped.

    It asks how often, not by how much, and needs no assumption on how differences are distributed. 1 where all tie.

    Raises:
        ConfigError: values of different problems.
    """
    difference_P = _differences(values_P, baseline_P)
    better, worse = int((difference_P > 0).sum()), int((difference_P < 0).sum())
    return float(scipy.stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0


def holm(p_values: Sequence[float] | Float[NDArray[np.floating], " N"]) -> Float[NDArray[np.float64], " N"]:
    """P-values adjusted for being a family, in the order given: those below 0.05 hold together, with 5 % for any error.

    Source: Holm, 1979, *A Simple Sequentially Rejective Multiple Test Procedure*. No assumption on dependence.

    Raises:
        ConfigError: a p-value outside [0, 1].
    """
    p_N = np.asarray(p_values, dtype=np.float64)
    if not ((p_N >= 0) & (p_N <= 1)).all():
        raise ConfigError("Holm's correction: give p-values in [0, 1] without NaN")
    order_N = np.argsort(p_N)
    adjusted_N = np.empty_like(p_N)
    adjusted_N[order_N] = np.minimum(np.maximum.accumulate(p_N[order_N] * np.arange(len(p_N), 0, -1)), 1)
    return adjusted_N


def tokens_per_solved(
    tokens_P: Float[NDArray[np.floating], " P"], solved_P: Float[NDArray[np.floating], " P"]
) -> Interval:
    """Tokens spent per problem solved: all tokens / problems solved, with a 95 % interval clustered by problem.

    The interval is Student's on the logarithm of the ratio (delta method, linearised per problem). Of 95 % intervals on
    30 skewed problems it held the truth in 94 to 95 %, Fieller's in 92 to 93 %, BCa's as often.

    Args:
        tokens_P: tokens spent on each problem, for all k samples where ``solved_P`` is pass@k; positive.
        solved_P: 0 or 1, or the estimated chance that the problem is solved, as pass@k.

    Returns:
        Where none is solved, the estimate and the upper end are infinite, and the lower end is what the highest share
        that :func:`proportion_interval` admits would cost. One problem tells nothing of the others: 0 to ∞.

    Raises:
        ConfigError: values of different problems, tokens that are not positive, solved outside [0, 1].
    """
    tokens_P, solved_P = np.asarray(tokens_P, dtype=np.float64), np.asarray(solved_P, dtype=np.float64)
    if tokens_P.shape != solved_P.shape or not (tokens_P > 0).all():
        raise ConfigError("tokens per solved problem: give the tokens of the same problems, each above 0")
    share, n = proportion_interval(solved_P), len(tokens_P)
    tokens = float(tokens_P.mean())
    estimate = tokens / share.estimate if share.estimate > 0 else np.inf
    if n == 1:
        return Interval(estimate, 0.0, np.inf, n)
    if not share.estimate:
        return Interval(np.inf, tokens / share.high, np.inf, n)
    relative_P = tokens_P / tokens - solved_P / share.estimate
    factor = float(np.exp(_student(n) * relative_P.std(ddof=1) / np.sqrt(n)))
    return Interval(estimate, estimate / factor, estimate * factor, n)


def equivalent_samples(
    plain_PK: Float[NDArray[np.floating], "P K"], target_P: Float[NDArray[np.floating], " P"]
) -> Interval:
    """Break-even: how many samples of plain sampling reach ``target_P`` on average, as an adapter's pass@B.

    Linear between whole numbers of samples, from none, which solve nothing. The interval holds the numbers at which
    :func:`paired_difference` to plain sampling does not exclude 0 (an inverted test, so that it needs no spread of its
    own, and is open where plain sampling may never get there).

    Args:
        plain_PK: pass@1 … pass@K of plain sampling, each on the same problems.
        target_P: what is to be reached.

    Returns:
        A number of samples from 0 to K; infinite stands for more than K.

    Raises:
        ConfigError: values of different problems, or none.
    """
    plain_PK, target_P = np.asarray(plain_PK, dtype=np.float64), np.asarray(target_P, dtype=np.float64)
    if plain_PK.ndim != 2 or not plain_PK.size or target_P.shape != plain_PK.shape[:1]:
        raise ConfigError("equivalent samples: give pass@1 … pass@K of plain sampling on the problems of the target")
    gaps = [paired_difference(target_P, plain_P) for plain_P in (np.zeros(len(target_P)), *plain_PK.T)]
    estimate = _first_zero([gap.estimate for gap in gaps])
    if len(target_P) == 1:  # one problem tells nothing of the others
        return Interval(estimate, 0.0, np.inf, 1)
    reached = gaps[-1].high <= TIED
    # the last zero of a curve is the first one from its far end
    high = plain_PK.shape[1] - _first_zero([-gap.high for gap in reversed(gaps)]) if reached else np.inf
    return Interval(estimate, _first_zero([gap.low for gap in gaps]), high, len(target_P))


def _first_zero(heights: Sequence[float]) -> float:
    """Where a piecewise linear curve over 0, 1, … first is at or below zero; infinite if nowhere."""
    height_K = np.asarray(heights)
    reached_N = np.flatnonzero(height_K <= TIED)
    if not len(reached_N):
        return float("inf")
    after = int(reached_N[0])
    if after == 0:
        return 0.0
    above, below = height_K[after - 1], min(height_K[after], 0.0)
    return float(after - 1 + above / (above - below))


def _student(n: int) -> float:
    """Student's 97.5 % point for n problems."""
    return float(scipy.special.stdtrit(max(n - 1, 1), 0.975))


def _differences(values_P: NDArray[np.floating], baseline_P: NDArray[np.floating]) -> NDArray[np.float64]:
    """Value − baseline on each problem; 0 where they differ by rounding only."""
    values_P, baseline_P = np.asarray(values_P, dtype=np.float64), np.asarray(baseline_P, dtype=np.float64)
    if values_P.shape != baseline_P.shape or values_P.ndim != 1:
        raise ConfigError(f"paired test: {values_P.shape} values, {baseline_P.shape} baselines; pair the same problems")
    difference_P = values_P - baseline_P
    difference_P[np.abs(difference_P) <= TIED] = 0
    return difference_P
