"""pass@k, and intervals that count problems, not samples."""

from dataclasses import dataclass

import numpy as np
import scipy.stats
from jaxtyping import Float, Int
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its 95 % interval over ``n`` problems."""

    estimate: float
    low: float
    high: float
    n: int


def pass_at_k(
    correct: Int[NDArray[np.int64], "..."], samples: int | Int[NDArray[np.int64], "..."], k: int
) -> Float[NDArray[np.float64], "..."]:
    """The unbiased estimate 1 − C(n − c, k) / C(n, k) of the chance that one of k samples is right.

    Args:
        correct: right samples c of each problem (any shape).
        samples: samples n, shared or one per problem; at least k.
        k: how many samples may be drawn, at least 1.

    Source: Chen et al., 2021, *Evaluating Large Language Models Trained on Code*, section 2.1.

    Raises:
        ValueError: k below 1, or above the number of samples.
    """
    correct, total = np.broadcast_arrays(np.asarray(correct), np.asarray(samples))
    if k < 1 or (total < k).any():
        fewest = int(total.min()) if total.size else 0
        raise ValueError(f"pass@{k} needs 1 ≤ k ≤ samples, and there are {fewest} samples")
    wrong = (total - correct).astype(np.float64)
    none_right = np.ones(correct.shape)
    for drawn in range(k):
        none_right *= np.clip(wrong - drawn, 0, None) / (total - drawn)
    return 1.0 - none_right


def mean_interval(values_P: Float[NDArray[np.float64], " P"], bounds: tuple[float, float] | None = None) -> Interval:
    """Mean over problems with Student's 95 % interval, clipped to ``bounds``.

    Each problem brings one value, whatever number of samples it was estimated from, so the interval is
    clustered by problem. It is conditional on the policy: a trained adapter is not resampled.
    """
    n = len(values_P)
    if n == 1 and bounds is not None:  # one problem tells nothing of the others
        return Interval(float(values_P[0]), *bounds, n)
    mean = float(values_P.mean())
    spread = float(values_P.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
    half = float(scipy.stats.t.ppf(0.975, max(n - 1, 1))) * spread
    low, high = mean - half, mean + half
    if bounds is not None:
        low, high = max(low, bounds[0]), min(high, bounds[1])
    return Interval(mean, low, high, n)


def paired_difference(
    values_P: Float[NDArray[np.float64], " P"], baseline_P: Float[NDArray[np.float64], " P"]
) -> Interval:
    """Mean of value − baseline over the same problems, with its 95 % interval."""
    return mean_interval(np.asarray(values_P, dtype=np.float64) - baseline_P)
