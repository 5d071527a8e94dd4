"""Which strategies make a good action space: a few that together cover the problems (paper, section 2.4, Appendix C).

The value of a set S of strategies is its coverage, the mean over problems of what its best strategy is worth there:

    F(S) = 1/P · Σ_x max_{s ∈ S} value(x, s)

F is monotone and submodular, so that the greedy choice reaches at least 1 − 1/e ≈ 63 % of the best set of the same size
(Nemhauser, Wolsey and Fisher, 1978, *An analysis of approximations for maximizing submodular set functions*). The
guarantee is about the values as they were estimated; what the chosen set is worth is another question, and is answered
by samples, or problems, that the choice has not seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from rheostat.decoding.strategy import Strategy
from rheostat.errors import ConfigError
from rheostat.seeding import derive_seed
from rheostat.statistics import Interval, paired_difference, pass_at_k, proportion_interval

_TIED = 1e-12  # gains closer than this differ by rounding only


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """The pool to choose from, and what each strategy is worth on each problem.

    Attributes:
        strategies: the A candidates.
        choosing_AP: the estimates in [0, 1] that choices are made by; NaN without one.
        valuing_AP: independent estimates of the same, from samples that no choice sees; None where not cross-fitted.
    """

    strategies: tuple[Strategy, ...]
    choosing_AP: Float[NDArray[np.float64], "A P"]
    valuing_AP: Float[NDArray[np.float64], "A P"] | None

    @classmethod
    def of(
        cls,
        rewards_PAS: Float[NDArray[np.floating], "P A S"],
        strategies: Sequence[Strategy],
        budget: int | None = None,
        seed: int = 0,
    ) -> Self:
        """Estimate what each strategy is worth on each problem.

        Without ``budget`` that is the mean reward r(x, s), the paper's objective (equation 3). With a parallel budget B
        it is the unbiased pass@B, cross-fitted: the samples of each problem are split at random into two halves, the
        same ones for every strategy, because sample i of two strategies may be drawn with the same uniforms; one half
        to choose by, the other to value what was chosen.

        Cross-fitting is needed because a maximum over noisy estimates is biased upward: E[max_s X_s] ≥ max_s E[X_s],
        and strictly so even where all strategies are equally good, by more the more there are; among 180 of them the
        luckiest looks like a find. The half that was not looked at owes nothing to that luck: its mean is an unbiased
        estimate of what the choice is worth, hence on average at most the coverage of a chooser who knows the truth.

        A cell without a sample (for pass@B: with fewer than 2B, since each half needs B) has no estimate and covers
        nothing: to give it one could only raise F, which is a lower bound where cells are missing. Within a cell that
        has enough samples, those without a verdict are left out.

        Args:
            rewards_PAS: rewards in [0, 1], for pass@B 0 or 1; NaN where there is no sample or no verdict. Cells may
                hold different numbers of samples.
            strategies: what each column of ``rewards_PAS`` was sampled with.
            budget: the parallel budget B, at least 1.
            seed: of the split.

        Raises:
            ConfigError: a strategy listed twice; rewards of another shape or outside their range; a problem or a
                strategy without any estimate; a budget below 1.
        """
        rewards_PAS, strategies = np.asarray(rewards_PAS), tuple(strategies)
        known_PAS = _known(rewards_PAS, strategies, budget)
        samples_AP = known_PAS.sum(2).T
        enough_AP = samples_AP >= _samples_needed(budget)
        _check_estimates(enough_AP, strategies, budget)
        total_AP = np.where(known_PAS, rewards_PAS, 0).sum(2, dtype=np.float64).T
        if budget is None:
            return cls(strategies, _where(enough_AP, total_AP[enough_AP] / samples_AP[enough_AP]), None)
        seen_AP = _right_in_first_half(rewards_PAS, known_PAS, derive_seed("selection", "split", seed))
        samples_N, right_N = samples_AP[enough_AP], total_AP[enough_AP].astype(np.int64)
        half_N, seen_N = samples_N // 2, seen_AP[enough_AP]
        return cls(
            strategies,
            _where(enough_AP, pass_at_k(seen_N, half_N, budget)),
            _where(enough_AP, pass_at_k(right_N - seen_N, samples_N - half_N, budget)),
        )

    def on(self, problems: Sequence[int] | Int[NDArray[np.int64], " N"]) -> Self:
        """The same candidates on some of the problems."""
        valuing_AP = None if self.valuing_AP is None else np.take(self.valuing_AP, problems, axis=1)
        return type(self)(self.strategies, np.take(self.choosing_AP, problems, axis=1), valuing_AP)


@dataclass(frozen=True, slots=True)
class Selection:
    """Strategies in the order in which they were chosen, and what the first 1, 2, … of them cover.

    Attributes:
        chosen: their indices in the pool.
        coverage: F(S) in [0, 1] by the estimates that they were chosen by: never falls, and flatters the choice.
        held_out: the same choice, and on each problem the same best strategy (the earlier one where several tie),
            valued on the other half of the samples; may fall. None where the candidates are not cross-fitted.
        missing: pairs of a problem and a chosen strategy without an estimate, which cover nothing.
    """

    strategies: tuple[Strategy, ...]
    chosen: tuple[int, ...]
    coverage: tuple[float, ...]
    held_out: tuple[float, ...] | None
    missing: int


@dataclass(frozen=True, slots=True)
class BestOfN:
    """Coverage of the first 1, 2, … actions on problems that had no part in choosing them, with 95 % intervals.

    Attributes:
        greedy: chosen by greedy coverage.
        top: the strategies with the highest means.
        difference: greedy − top, paired by problem.
    """

    greedy: tuple[Interval, ...]
    top: tuple[Interval, ...]
    difference: tuple[Interval, ...]


def greedy_selection(candidates: Candidates, actions: int) -> Selection:
    """Add, ``actions`` times, the strategy that raises coverage most (paper, Appendix C).

    Ties go to the simpler strategy (fewer parameters set, greedy decoding first), then to the smaller index. Once
    nothing raises coverage any more, that rule alone names the rest.

    Raises:
        ConfigError: fewer than one action or more than candidates; all estimates 0 or all 1.
    """
    _check_choice(candidates, actions)
    return coverage(candidates, _greedy(_reachable(candidates), _rank(candidates.strategies), actions))


def top_selection(candidates: Candidates, actions: int) -> Selection:
    """The ``actions`` strategies with the highest means over problems, the paper's baseline; ties as in greedy.

    Raises:
        ConfigError: as in :func:`greedy_selection`.
    """
    _check_choice(candidates, actions)
    mean_A = _reachable(candidates).mean(1)
    rank_A = _rank(candidates.strategies)
    chosen: list[int] = []
    for _ in range(actions):
        chosen.append(_best(mean_A, rank_A))
        mean_A[chosen[-1]] = -np.inf
    return coverage(candidates, chosen)


def coverage(candidates: Candidates, chosen: Sequence[int]) -> Selection:
    """What the first 1, 2, … of the strategies with these indices cover, however they were chosen.

    Raises:
        ConfigError: no index, or one that is not in the pool.
    """
    pool = len(candidates.strategies)
    outside = [index for index in chosen if not 0 <= index < pool]
    if outside or not len(chosen):
        told = f"there is no candidate {outside[0]}" if outside else "no candidate is named"
        raise ConfigError(f"coverage: {told}; name indices from 0 to {pool - 1}")
    return Selection(
        strategies=tuple(candidates.strategies[index] for index in chosen),
        chosen=tuple(int(index) for index in chosen),
        coverage=tuple(_covered(candidates, chosen).mean(1).tolist()),
        held_out=None if candidates.valuing_AP is None else tuple(_held_out(candidates, chosen).mean(1).tolist()),
        missing=int(np.isnan(candidates.choosing_AP[list(chosen)]).sum()),
    )


def selection_stability(
    candidates: Candidates, actions: int, resamples: int = 100, seed: int = 0
) -> Float[NDArray[np.float64], " A"]:
    """How often the greedy choice names each strategy, in [0, 1], when the problems are drawn anew (bootstrap).

    A strategy near 1 is chosen whichever problems were sampled; several near each other's share are interchangeable.

    Raises:
        ConfigError: as in :func:`greedy_selection`, or fewer than one resample.
    """
    _check_choice(candidates, actions)
    if resamples < 1:
        raise ConfigError(f"selection: draw at least 1 resample, got {resamples}")
    values_AP, rank_A = _reachable(candidates), _rank(candidates.strategies)
    problems = values_AP.shape[1]
    rng = np.random.default_rng(derive_seed("selection", "bootstrap", seed))
    times_A = np.zeros(len(candidates.strategies))
    for _ in range(resamples):
        drawn_P = rng.integers(problems, size=problems)
        times_A[_greedy(np.take(values_AP, drawn_P, axis=1), rank_A, actions)] += 1
    return times_A / resamples


def best_of_n(
    candidates: Candidates,
    actions: int,
    choose_on: Sequence[int] | Int[NDArray[np.int64], " N"],
    value_on: Sequence[int] | Int[NDArray[np.int64], " N"],
) -> BestOfN:
    """Best-of-N over the number of actions, greedy beside top-K, as in Figure 6 but valued on other problems.

    Cross-fitted candidates are valued on the held-out half of the samples as well. Without that, the best strategy of
    each problem is still found by the estimates that value it.

    Args:
        candidates: on all problems.
        actions: how many to choose.
        choose_on: indices of the problems that both choices are made on.
        value_on: indices of the problems that both are valued on, none of them in ``choose_on``.

    Raises:
        ConfigError: as in :func:`greedy_selection`; an empty set of problems, one with an index that does not exist or
            is listed twice, or two sets that overlap.
    """
    _check_problems(candidates.choosing_AP.shape[1], np.asarray(choose_on), np.asarray(value_on))
    seen, other = candidates.on(choose_on), candidates.on(value_on)
    value = _covered if candidates.valuing_AP is None else _held_out
    greedy_NP = value(other, greedy_selection(seen, actions).chosen)
    top_NP = value(other, top_selection(seen, actions).chosen)
    return BestOfN(
        greedy=tuple(proportion_interval(values_P) for values_P in greedy_NP),
        top=tuple(proportion_interval(values_P) for values_P in top_NP),
        difference=tuple(
            paired_difference(ours_P, theirs_P) for ours_P, theirs_P in zip(greedy_NP, top_NP, strict=True)
        ),
    )


def _greedy(values_AP: NDArray[np.float64], rank_A: NDArray[np.int64], actions: int) -> list[int]:
    """Greedy choice with lazy evaluation (Minoux, 1978, *Accelerated greedy algorithms*).

    Gains only shrink as the set grows, so a gain computed earlier bounds the gain of today: going down the bounds, the
    search ends at the first one below the best gain found. On simulated rewards of 180 strategies, ten choices still
    computed 62 to 85 % of all gains: coverage rises so much at first that the early bounds are loose.
    """
    gain_A = values_AP.mean(1)
    covered_P = np.zeros(values_AP.shape[1])
    chosen: list[int] = []
    for _ in range(actions):
        best = -np.inf
        for action in np.argsort(-gain_A):
            if gain_A[action] < best - _TIED:
                break
            gain_A[action] = np.maximum(values_AP[action] - covered_P, 0).mean()
            best = max(best, gain_A[action])
        chosen.append(_best(gain_A, rank_A))
        gain_A[chosen[-1]] = -np.inf
        np.maximum(covered_P, values_AP[chosen[-1]], out=covered_P)
    return chosen


def _best(gain_A: NDArray[np.float64], rank_A: NDArray[np.int64]) -> int:
    """The simplest of those that tie for the highest gain."""
    tied = np.flatnonzero(gain_A >= gain_A.max() - _TIED)
    return int(tied[rank_A[tied].argmin()])


def _rank(strategies: Sequence[Strategy]) -> NDArray[np.int64]:
    """Place of each strategy when the simplest comes first."""
    parameters_A = [
        0 if strategy.is_greedy else sum(value is not None for value in strategy.to_dict().values())
        for strategy in strategies
    ]
    return np.argsort(np.argsort(parameters_A, kind="stable"))


def _reachable(candidates: Candidates) -> NDArray[np.float64]:
    """The estimates that choices are made by, 0 without one: such a cell covers nothing."""
    return np.nan_to_num(candidates.choosing_AP)


def _covered(candidates: Candidates, chosen: Sequence[int]) -> Float[NDArray[np.float64], "N P"]:
    """What the first 1, 2, … N of ``chosen`` are worth on each problem; one estimate finds the best and values it."""
    best_NP: NDArray[np.float64] = np.maximum.accumulate(np.nan_to_num(candidates.choosing_AP[list(chosen)]))
    return best_NP


def _held_out(candidates: Candidates, chosen: Sequence[int]) -> Float[NDArray[np.float64], "N P"]:
    """As :func:`_covered`, but the best strategy, found on one half of the samples, is valued on the other."""
    assert candidates.valuing_AP is not None, "only cross-fitted candidates have a held-out half"
    nothing = -1.0  # below every estimate: a strategy that is known to fail goes before one that is not known
    seen_NP = np.nan_to_num(candidates.choosing_AP[list(chosen)], nan=nothing)
    best_NP = np.maximum.accumulate(seen_NP)
    rises_NP = seen_NP[1:] > best_NP[:-1]
    pick_NP = np.zeros(seen_NP.shape, dtype=np.int64)
    pick_NP[1:] = np.maximum.accumulate(rises_NP * np.arange(1, len(chosen))[:, None])
    return np.take_along_axis(np.nan_to_num(candidates.valuing_AP[list(chosen)]), pick_NP, axis=0)


def _where(enough_AP: NDArray[np.bool_], values_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """The values at the places that have one, NaN elsewhere."""
    values_AP = np.full(enough_AP.shape, np.nan)
    values_AP[enough_AP] = values_N
    return values_AP


def _right_in_first_half(
    rewards_PAS: NDArray[np.floating], known_PAS: NDArray[np.bool_], seed: int
) -> Int[NDArray[np.int64], "A P"]:
    """How many right samples lie in the first half of each cell's known ones, in an order of the samples drawn anew for
    each problem and shared by all strategies."""
    problems, _, samples = rewards_PAS.shape
    order_PS = np.random.default_rng(seed).random((problems, samples)).argsort(1)
    known_PAS = np.take_along_axis(known_PAS, order_PS[:, None], axis=2)
    right_PAS = known_PAS & (np.take_along_axis(rewards_PAS, order_PS[:, None], axis=2) == 1)
    place_PAS = known_PAS.cumsum(2, dtype=np.int16)
    first_PAS = place_PAS <= place_PAS[:, :, -1:] // 2
    seen_AP: NDArray[np.int64] = (right_PAS & first_PAS).sum(2).T
    return seen_AP


def _samples_needed(budget: int | None) -> int:
    """Of a cell that shall have an estimate: one for a mean, B in each half for pass@B."""
    return 1 if budget is None else 2 * budget


def _known(
    rewards_PAS: NDArray[np.floating], strategies: tuple[Strategy, ...], budget: int | None
) -> NDArray[np.bool_]:
    """Where there is a reward; what cannot be rewards of these strategies is refused."""
    if len(set(strategies)) < len(strategies):
        twice = next(strategy for index, strategy in enumerate(strategies) if strategy in strategies[:index])
        raise ConfigError(f"candidates: strategy '{twice}' is listed twice; drop one of the two")
    if rewards_PAS.ndim != 3 or rewards_PAS.shape[1] != len(strategies) or not rewards_PAS.size:
        raise ConfigError(
            f"rewards: shape {rewards_PAS.shape} is not problems × {len(strategies)} candidates × samples; "
            "give one column per candidate"
        )
    if budget is not None and budget < 1:
        raise ConfigError(f"candidates: the parallel budget must be at least 1, got {budget}")
    known_PAS: NDArray[np.bool_] = ~np.isnan(rewards_PAS)
    fit_PAS = (rewards_PAS >= 0) & (rewards_PAS <= 1) if budget is None else (rewards_PAS == 0) | (rewards_PAS == 1)
    wrong_PAS = known_PAS & ~fit_PAS
    if wrong_PAS.any():
        problem, action, sample = np.argwhere(wrong_PAS)[0]
        wanted = "must lie in [0, 1]" if budget is None else f"must be 0 or 1 for pass@{budget}"
        raise ConfigError(
            f"rewards: problem {problem}, strategy '{strategies[action]}' has a reward of "
            f"{rewards_PAS[problem, action, sample]:g}; rewards {wanted}, or NaN where one is missing"
        )
    return known_PAS


def _check_estimates(enough_AP: NDArray[np.bool_], strategies: tuple[Strategy, ...], budget: int | None) -> None:
    """A problem that nothing can cover tells nothing; a strategy that can cover nothing was never a candidate."""
    needed = (
        "a sample" if budget is None else f"the {_samples_needed(budget)} samples that two halves of pass@{budget} need"
    )
    empty = np.flatnonzero(~enough_AP.any(0))
    if len(empty):
        others = f" (nor on {len(empty) - 1} others)" if len(empty) > 1 else ""
        raise ConfigError(
            f"rewards: no strategy has {needed} on problem {empty[0]}{others}; sample more, or leave it out"
        )
    unused = np.flatnonzero(~enough_AP.any(1))
    if len(unused):
        raise ConfigError(
            f"rewards: strategy '{strategies[unused[0]]}' has {needed} on no problem; sample more, or drop the strategy"
        )


def _check_choice(candidates: Candidates, actions: int) -> None:
    """As many as asked for can be chosen, and there is something to prefer one for."""
    pool = len(candidates.strategies)
    if actions < 1:
        raise ConfigError(f"selection: choose at least 1 action, got {actions}")
    if actions > pool:
        raise ConfigError(
            f"selection: cannot choose {actions} actions from {pool} candidates; choose fewer, or widen the pool"
        )
    if np.nanmax(candidates.choosing_AP) == 0:
        raise ConfigError(
            "selection: by these rewards no strategy ever solves a problem, so that none can be preferred; "
            "take easier problems, or a larger token budget"
        )
    if np.nanmin(candidates.choosing_AP) == 1:
        raise ConfigError(
            "selection: by these rewards every strategy always solves every problem, so that none can be preferred; "
            "take harder problems"
        )


def _check_problems(problems: int, choose_on: NDArray[np.int64], value_on: NDArray[np.int64]) -> None:
    """Both sets name problems that exist, each once, and none of the other set."""
    for name, index_N in (("choose_on", choose_on), ("value_on", value_on)):
        if not index_N.size or not ((index_N >= 0) & (index_N < problems)).all() or len(set(index_N)) < len(index_N):
            raise ConfigError(f"best of N: {name} must name different problems, each from 0 to {problems - 1}")
    shared = np.intersect1d(choose_on, value_on)
    if len(shared):
        raise ConfigError(
            f"best of N: problem {shared[0]} is in choose_on and in value_on; value on problems that chose nothing"
        )
