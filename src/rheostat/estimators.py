"""What one problem is worth, estimated from its samples; :mod:`rheostat.statistics` is where these are imported from.

Where an estimator does not say otherwise, it refuses a missing verdict (NaN): fill it with 0 and with 1, for both
bounds.
"""

from collections.abc import Sequence

import numpy as np
import scipy.stats
from jaxtyping import Float, Int
from numpy.typing import NDArray

from rheostat.errors import ConfigError

TIED = 1e-12  # values closer than this differ by rounding only


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


def avg_at_n(rewards_PS: Float[NDArray[np.floating], "P S"]) -> Float[NDArray[np.float64], " P"]:
    """avg@n: the mean reward of each problem's samples; of rewards 0 and 1 it is pass@1.

    Args:
        rewards_PS: in [0, 1]; NaN is left out, and a problem without any reward has NaN.

    Raises:
        ConfigError: a reward outside [0, 1].
    """
    rewards_PS = _rewards("avg@n", rewards_PS, missing=True)
    known_PS = ~np.isnan(rewards_PS)
    with np.errstate(invalid="ignore"):
        mean_P: NDArray[np.float64] = np.where(known_PS, rewards_PS, 0).sum(1) / known_PS.sum(1)
    return mean_P


def maj_at_k(
    labels_PS: Int[NDArray[np.integer], "P S"], right_P: Int[NDArray[np.integer], " P"], k: int
) -> Float[NDArray[np.float64], " P"]:
    """maj@k, self-consistency: the chance that the answer with most votes among k of the S samples is right.

    Exact, over all subsets of k samples; where several answers tie, each wins as often as the others. No vote at all
    is wrong. The votes of a random subset have a multivariate hypergeometric distribution, which is that of independent
    binomial votes (each sample drawn with chance k / S) given that they are k in total: so the other answers are added
    one by one, keeping count of how many samples are drawn and how many answers tie with the right one.

    Args:
        labels_PS: which answer each sample gave, equal answers under equal numbers ≥ 0; −1 for none, which has no vote.
        right_P: the number of the right answer; one that no sample gave (as −1) where none is right.
        k: how many samples vote, 1 to S.

    Source: Wang et al., 2023, *Self-Consistency Improves Chain of Thought Reasoning in Language Models*.

    Raises:
        ConfigError: shapes that do not fit, a label below −1, k outside 1 to S.
    """
    labels_PS, right_P = np.asarray(labels_PS), np.asarray(right_P)
    if labels_PS.ndim != 2 or right_P.shape != labels_PS.shape[:1]:
        raise ConfigError(f"maj@k: give labels of problems × samples, not {labels_PS.shape}, and one right each")
    if (labels_PS < -1).any():
        raise ConfigError(f"maj@k: a label is {labels_PS.min()}; number answers from 0, with -1 for none")
    problems, samples = labels_PS.shape
    _check_drawn("maj@k", k, samples)
    voted_PS = labels_PS >= 0
    right_PS = voted_PS & (labels_PS == right_P[:, None])
    others = [
        np.sort(np.unique(labels_S[other_S], return_counts=True)[1])[::-1]
        for labels_S, other_S in zip(labels_PS, voted_PS & ~right_PS, strict=True)
    ]
    votes_PL = np.zeros((problems, max(map(len, others), default=0)), dtype=np.int64)
    for own_L, votes_L in zip(votes_PL, others, strict=True):
        own_L[: len(votes_L)] = votes_L

    drawn_D = np.arange(k + 1)
    right_PD = scipy.stats.binom.pmf(drawn_D, right_PS.sum(1)[:, None], k / samples)
    silent_PD = scipy.stats.binom.pmf(drawn_D, (~voted_PS).sum(1)[:, None], k / samples)
    other_PLD = scipy.stats.binom.pmf(drawn_D, votes_PL[:, :, None], k / samples)
    wins_P = np.zeros(problems)
    for votes in range(1, min(k, int(right_PS.sum(1).max(initial=0))) + 1):
        wins_P += right_PD[:, votes] * _wins(votes, silent_PD[:, : k - votes + 1], other_PLD)
    chance_P: NDArray[np.float64] = wins_P / scipy.stats.binom.pmf(k, samples, k / samples)
    return chance_P


def _wins(votes: int, silent_PD: NDArray[np.float64], other_PLD: NDArray[np.float64]) -> NDArray[np.float64]:
    """The chance that the other samples drawn are D − 1, of which no answer has more than ``votes``, over 1 + ties."""
    problems, drawn_D = silent_PD.shape
    ties_T = min((drawn_D - 1) // votes, other_PLD.shape[1]) + 1
    chance_PTD = np.zeros((problems, ties_T, drawn_D))
    chance_PTD[:, 0] = silent_PD
    for other in range(other_PLD.shape[1]):
        before_PTD, chance_PTD = chance_PTD, np.zeros_like(chance_PTD)
        for drawn in np.flatnonzero(other_PLD[:, other, : min(votes + 1, drawn_D)].any(0)):
            tie = int(drawn == votes)
            moved_PTD = before_PTD[:, : ties_T - tie, : drawn_D - drawn] * other_PLD[:, other, drawn, None, None]
            chance_PTD[:, tie:, drawn:] += moved_PTD
    shared_P: NDArray[np.float64] = (chance_PTD[:, :, -1] / np.arange(1, ties_T + 1)).sum(1)
    return shared_P


def best_of_k(
    correct_PS: Float[NDArray[np.floating], "P S"], scores_PS: Float[NDArray[np.floating], "P S"], k: int
) -> Float[NDArray[np.float64], " P"]:
    """Best-of-k under a verifier: the expected reward of the highest-scored among k of the S samples.

    Exact, over all subsets of k samples; among equal scores each is taken as often as the others. A perfect verifier
    scores right samples above wrong ones, which makes this pass@k; one whose scores are all equal makes it pass@1.

    Args:
        correct_PS: rewards in [0, 1].
        scores_PS: by the verifier, on any scale; −∞ is allowed.
        k: how many samples are drawn, 1 to S.

    Raises:
        ConfigError: shapes that differ, a reward outside [0, 1], a reward or score that is NaN, k outside 1 to S.
    """
    correct_PS, scores_PS = _rewards("best of k", correct_PS), np.asarray(scores_PS)
    if scores_PS.shape != correct_PS.shape or np.isnan(scores_PS).any():
        raise ConfigError("best of k: give a score for each sample; -inf for one that shall not be taken")
    samples = correct_PS.shape[1]
    _check_drawn("best of k", k, samples)
    below_PS = scipy.stats.rankdata(scores_PS, method="min", axis=1).astype(np.int64) - 1
    up_to_PS = scipy.stats.rankdata(scores_PS, method="max", axis=1).astype(np.int64)
    # the best of k has this score if all k are up to it, and not all are below; pass@k is 1 − the chance of "all k are"
    taken_PS = pass_at_k(samples - below_PS, samples, k) - pass_at_k(samples - up_to_PS, samples, k)
    mean_P: NDArray[np.float64] = (taken_PS / (up_to_PS - below_PS) * correct_PS).sum(1)
    return mean_P


def accuracy_within(
    lengths_PS: Int[NDArray[np.integer], "P S"], correct_PS: Float[NDArray[np.floating], "P S"], budgets: Sequence[int]
) -> Float[NDArray[np.float64], "P K"]:
    """The share of each problem's samples that are right within b tokens, for each of K token budgets b.

    That is what the same samples would score if generation stopped at b. A policy that knows of its token budget might
    write otherwise under b, so for such a policy this is a lower bound on what it could do, not a measurement of it.

    Args:
        lengths_PS: tokens written, the one that ended the answer included.
        correct_PS: rewards in [0, 1].
        budgets: the values of b; an answer of exactly b tokens is within b.

    Raises:
        ConfigError: shapes that differ, a reward that is NaN or outside [0, 1].
    """
    lengths_PS, correct_PS = np.asarray(lengths_PS), _rewards("accuracy within b tokens", correct_PS)
    if lengths_PS.shape != correct_PS.shape:
        raise ConfigError(
            f"accuracy within b tokens: lengths {lengths_PS.shape}, rewards {correct_PS.shape}; give one per sample"
        )
    return np.stack([np.where(lengths_PS <= budget, correct_PS, 0).mean(1) for budget in budgets], axis=1)


def area_under_curve(
    values: Float[NDArray[np.floating], "*batch K"], at: Sequence[float] | Float[NDArray[np.floating], " K"]
) -> Float[NDArray[np.float64], "*batch"]:
    """The mean height of a curve over log2 of k or b, by trapezoids; in [0, 1] where the values are.

    On the logarithmic scale every doubling of the budget counts the same. The area is linear in the values: take it per
    problem, then an interval or a paired difference over problems.

    Args:
        values: the curve along the last axis.
        at: the budgets that it was measured at, positive and rising, at least two.

    Raises:
        ConfigError: budgets that are not.
    """
    scale_K = np.asarray(at, dtype=np.float64)
    values = np.asarray(values, dtype=np.float64)
    if scale_K.ndim != 1 or len(scale_K) < 2 or scale_K[0] <= 0 or (np.diff(scale_K) <= 0).any():
        raise ConfigError("area under a curve: give at least two budgets, positive and rising")
    if values.shape[-1:] != scale_K.shape:
        raise ConfigError(f"area under a curve: there are {len(scale_K)} budgets; give a value for each")
    log_K = np.log2(scale_K)
    area: NDArray[np.float64] = np.asarray(np.trapezoid(values, log_K, axis=-1) / (log_K[-1] - log_K[0]))
    return area


def oracle_at_k(rewards_PAS: Float[NDArray[np.floating], "P A S"], k: int = 1) -> Float[NDArray[np.float64], " P"]:
    """What an oracle that knows each problem's best action would reach: cross-fitted pass@k (k = 1: mean reward).

    The best action is found on one half of the samples and valued on the other, both ways, averaged; where several are
    best, so are their values. A maximum over noisy estimates would flatter the oracle. This is on average at most what
    it could reach, and the nearer, the more samples there are. Headroom is the paired difference to a policy's values.

    Args:
        rewards_PAS: in [0, 1], for k above 1 only 0 or 1; NaN where there is no sample or no verdict. Samples without
            NaN go to the two halves in turn; an action with fewer than k in either half cannot be chosen there.
        k: at least 1.

    Returns:
        One value per problem; NaN where no action has 2k rewards.

    Raises:
        ConfigError: rewards of another shape or range, k below 1.
    """
    rewards_PAS = _rewards("oracle", rewards_PAS, missing=True)
    if rewards_PAS.ndim != 3 or k < 1:
        raise ConfigError(f"oracle at k = {k}: give rewards of problems × actions × samples, and k of at least 1")
    known_PAS = ~np.isnan(rewards_PAS)
    if k > 1 and not np.isin(rewards_PAS[known_PAS], (0, 1)).all():
        raise ConfigError(f"oracle at k = {k}: give rewards 0 or 1; others have a mean (k = 1), but no pass@k")
    turn_PAS = known_PAS.cumsum(2) % 2
    halves_PAS = [known_PAS & (turn_PAS == half) for half in (0, 1)]
    enough_PA = np.minimum(*(half_PAS.sum(2) for half_PAS in halves_PAS)) >= k
    values_PA = []
    for half_PAS in halves_PAS:
        total_PA = np.where(half_PAS, rewards_PAS, 0).sum(2)
        own_PA = np.full(enough_PA.shape, -np.inf)
        own_PA[enough_PA] = pass_at_k(total_PA[enough_PA], half_PAS.sum(2)[enough_PA], k)
        values_PA.append(own_PA)
    found_P = np.zeros(len(rewards_PAS))
    for seen_PA, other_PA in (values_PA, values_PA[::-1]):
        best_PA = enough_PA & (seen_PA >= seen_PA.max(1, keepdims=True) - TIED)
        with np.errstate(invalid="ignore"):
            found_P += np.where(best_PA, other_PA, 0).sum(1) / best_PA.sum(1) / 2
    return found_P


def _rewards(name: str, rewards: NDArray[np.floating], missing: bool = False) -> NDArray[np.float64]:
    """As float64; what cannot be rewards is refused."""
    known: NDArray[np.float64] = np.asarray(rewards, dtype=np.float64)
    unknown = np.isnan(known)
    if not ((known >= 0) & (known <= 1) | unknown).all():
        raise ConfigError(f"{name}: a reward lies outside [0, 1]; scale rewards to that range")
    if unknown.any() and not missing:
        raise ConfigError(f"{name}: {unknown.sum()} rewards are NaN; fill them with 0 and with 1, for both bounds")
    return known


def _check_drawn(name: str, k: int, samples: int) -> None:
    if not 1 <= k <= samples:
        raise ConfigError(f"{name}: k is {k}, and there are {samples} samples; sample more, or take k from 1 to that")
