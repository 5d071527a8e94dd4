"""The choice of actions against exact search, a plain quadratic reference in fractions, and counting by hand."""

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import combinations, pairwise
from math import comb, e, nan

import numpy as np
import pytest
import scipy.stats
from numpy.typing import NDArray

from rheostat.bench import select
from rheostat.console import Console
from rheostat.decoding.selection import (
    Candidates,
    best_of_n,
    coverage,
    greedy_selection,
    selection_stability,
    top_selection,
)
from rheostat.decoding.spaces import GREEDY, candidate_grid
from rheostat.decoding.strategy import Strategy
from rheostat.errors import ConfigError
from rheostat.statistics import paired_difference, proportion_interval

GRID = candidate_grid()
T1, T2, T3, T4 = (Strategy(temperature) for temperature in (0.3, 0.5, 0.75, 1.25))


def one_sample(*rows: Sequence[float]) -> NDArray[np.float64]:
    """Rewards P × A × 1, a row per problem."""
    return np.array(rows, dtype=np.float64)[:, :, None]


def random_rewards(rng: np.random.Generator, problems: int, actions: int, samples: int) -> NDArray[np.float64]:
    """Verdicts around Beta-distributed rates; a third of the columns copy others, so that high means are redundant."""
    rate_PA = rng.beta(0.5, 0.9, (problems, actions))
    rewards_PAS = (rng.random((problems, actions, samples)) < rate_PA[:, :, None]).astype(np.float64)
    for action in range(actions - actions // 3, actions):
        rewards_PAS[:, action] = rewards_PAS[:, rng.integers(actions - actions // 3)]
    return rewards_PAS


def with_missing(rng: np.random.Generator, rewards_PAS: NDArray[np.float64]) -> NDArray[np.float64]:
    """A third of the cells lose a random number of their samples; each problem and strategy keeps a whole cell."""
    problems, actions, samples = rewards_PAS.shape
    loses_PA = rng.random((problems, actions)) < 1 / 3
    left_PA = np.where(loses_PA, rng.integers(0, samples + 1, (problems, actions)), samples)
    left_PA[np.arange(problems), np.arange(problems) % actions] = samples
    left_PA[np.arange(actions) % problems, np.arange(actions)] = samples
    order_PAS = rng.permuted(np.broadcast_to(np.arange(samples), rewards_PAS.shape), axis=2)
    return np.where(order_PAS >= left_PA[:, :, None], np.nan, rewards_PAS)


def plain_greedy(values: list[list[Fraction]], strategies: Sequence[Strategy], count: int) -> list[int]:
    """Every gain anew at every step, in fractions; ``values[x][s]``."""
    chosen: list[int] = []
    for _ in range(count):
        best: tuple[Fraction, int, int] | None = None
        for action, strategy in enumerate(strategies):
            if action in chosen:
                continue
            gain = Fraction(0)
            for row in values:
                gain += max([row[s] for s in [*chosen, action]]) - max([row[s] for s in chosen], default=Fraction(0))
            set_parameters = sum(v is not None for v in (strategy.top_k, strategy.top_p, strategy.min_p))
            key = (-gain, -1 if strategy.is_greedy else set_parameters, action)
            best = key if best is None else min(best, key)
        assert best is not None
        chosen.append(best[2])
    return chosen


def plain_coverage(values: list[list[Fraction]], chosen: Sequence[int]) -> Fraction:
    return sum((max(row[s] for s in chosen) for row in values), Fraction(0)) / len(values)


def exact_optimum(values_AP: NDArray[np.float64], count: int) -> float:
    """The best coverage of any ``count`` strategies."""
    values_AP = np.nan_to_num(values_AP)
    return max(values_AP[list(some)].max(0).mean() for some in combinations(range(len(values_AP)), count))


def test_by_hand() -> None:
    """Strategy 0 solves three of five problems, 1 two of the same and 2 the two others, 3 nothing new."""
    rewards_PAS = one_sample([1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 1, 0], [0, 0, 1, 0])
    candidates = Candidates.of(rewards_PAS, (T1, T2, T3, T4))
    greedy, top = greedy_selection(candidates, 3), top_selection(candidates, 3)
    assert (greedy.chosen, greedy.strategies) == ((0, 2, 1), (T1, T3, T2))
    assert greedy.coverage == pytest.approx((3 / 5, 1, 1))
    assert (top.chosen, top.coverage) == ((0, 1, 2), pytest.approx((3 / 5, 3 / 5, 1)))
    assert greedy.held_out is None
    assert greedy.missing == 0


def test_paper_objective_is_the_mean_reward_of_the_best_strategy() -> None:
    rewards_PAS = np.array([[[1, 0, nan], [0.5, 0.5, 0.5]], [[0, nan, nan], [nan, nan, nan]]])
    candidates = Candidates.of(rewards_PAS, (T1, T2))
    np.testing.assert_allclose(candidates.choosing_AP, [[0.5, 0], [0.5, nan]])
    assert coverage(candidates, [1]).coverage == (0.25,)
    assert coverage(candidates, [1]).missing == 1
    assert coverage(candidates, [0, 1]).missing == 1


@pytest.mark.parametrize("seed", range(100))
def test_chooses_as_the_plain_reference_by_mean_reward(seed: int) -> None:
    rng = np.random.default_rng([1, seed])
    problems, actions, samples = int(rng.integers(2, 13)), int(rng.integers(2, 9)), int(rng.integers(1, 6))
    rewards_PAS = with_missing(rng, random_rewards(rng, problems, actions, samples))
    rewards_PAS[0, 0, :] = 1  # some reward, and not all of them
    rewards_PAS[1, :, 0] = 0
    strategies = tuple(GRID[index] for index in rng.permutation(len(GRID))[:actions])
    values = [
        [Fraction(int(np.nansum(cell)), max(int((~np.isnan(cell)).sum()), 1)) for cell in row] for row in rewards_PAS
    ]
    got = greedy_selection(Candidates.of(rewards_PAS, strategies), actions)
    assert list(got.chosen) == plain_greedy(values, strategies, actions)
    exact = [float(plain_coverage(values, got.chosen[: n + 1])) for n in range(actions)]
    assert got.coverage == pytest.approx(exact, abs=1e-12)


def pass_at(correct: int, samples: int, k: int) -> Fraction:
    return 1 - Fraction(comb(samples - correct, k), comb(samples, k))


def halves_of(
    candidates: Candidates, rewards_PAS: NDArray[np.float64], budget: int
) -> list[list[tuple[Fraction, ...] | None]]:
    """pass@B of the two halves of each cell, in fractions: the one split into halves that both estimates agree with."""
    assert candidates.valuing_AP is not None
    found: list[list[tuple[Fraction, ...] | None]] = []
    for problem, row in enumerate(rewards_PAS):
        found.append([])
        for action, cell in enumerate(row):
            total, right = int((~np.isnan(cell)).sum()), int(np.nansum(cell))
            estimates = (candidates.choosing_AP[action, problem], candidates.valuing_AP[action, problem])
            if total < 2 * budget:
                assert np.isnan(estimates).all()
                found[-1].append(None)
                continue
            half = total // 2
            splits = [
                (pass_at(seen, half, budget), pass_at(right - seen, total - half, budget))
                for seen in range(max(0, right - (total - half)), min(right, half) + 1)
            ]
            agreeing = {
                split for split in splits if estimates == pytest.approx([float(part) for part in split], abs=1e-12)
            }
            assert len(agreeing) == 1
            found[-1] += agreeing
    return found


@pytest.mark.parametrize("seed", range(100))
def test_chooses_and_values_as_the_plain_reference_by_pass_at_b(seed: int) -> None:
    rng = np.random.default_rng([2, seed])
    problems, actions = int(rng.integers(2, 13)), int(rng.integers(2, 9))
    budget = int(rng.integers(1, 4))
    samples = 2 * budget + int(rng.integers(0, 4))
    rewards_PAS = with_missing(rng, random_rewards(rng, problems, actions, samples))
    rewards_PAS[0, 0, :] = 1
    rewards_PAS[1, :, :] = np.where(np.isnan(rewards_PAS[1]), nan, 0)
    strategies = tuple(GRID[index] for index in rng.permutation(len(GRID))[:actions])
    candidates = Candidates.of(rewards_PAS, strategies, budget, seed)
    halves = halves_of(candidates, rewards_PAS, budget)
    choosing = [[cell[0] if cell else Fraction(0) for cell in row] for row in halves]
    got = greedy_selection(candidates, actions)
    assert list(got.chosen) == plain_greedy(choosing, strategies, actions)
    assert got.held_out is not None
    for n in range(1, actions + 1):
        value = Fraction(0)
        for row in halves:
            pairs = [cell for cell in (row[s] for s in got.chosen[:n]) if cell]
            value += max(pairs, key=lambda pair: pair[0])[1] if pairs else 0  # max keeps the first of those that tie
        assert got.coverage[n - 1] == pytest.approx(float(plain_coverage(choosing, got.chosen[:n])), abs=1e-12)
        assert got.held_out[n - 1] == pytest.approx(float(value / problems), abs=1e-12)
    assert got.missing == sum(cell is None for row in halves for cell in row)


def test_split_of_a_cell_is_a_uniformly_random_half() -> None:
    """Of 8 samples with 3 right, how many fall in the first half is hypergeometric; 9 samples split into 4 and 5."""
    for samples, right in ((8, 3), (9, 5)):
        rewards_PAS = np.zeros((20_000, 1, samples))
        rewards_PAS[:, :, :right] = 1
        candidates = Candidates.of(rewards_PAS, (T1,), budget=1)
        assert candidates.valuing_AP is not None
        seen_P, half = np.rint(candidates.choosing_AP[0] * (samples // 2)).astype(int), samples // 2
        np.testing.assert_allclose(seen_P + candidates.valuing_AP[0] * (samples - half), right)
        expected = scipy.stats.hypergeom(samples, right, half).pmf(np.arange(half + 1)) * len(rewards_PAS)
        seen = np.bincount(seen_P, minlength=half + 1)
        possible = expected > 1e-9
        assert seen[~possible].sum() == 0
        assert scipy.stats.chisquare(seen[possible], expected[possible]).pvalue > 1e-3


def test_split_is_shared_by_strategies() -> None:
    """Strategies with the same samples get the same estimates from both halves: none looks better by its split."""
    rewards_PAS = random_rewards(np.random.default_rng(0), 40, 1, 9).repeat(3, axis=1)
    rewards_PAS[::2, :, 3] = nan
    candidates = Candidates.of(rewards_PAS, GRID[:3], 1)
    assert candidates.valuing_AP is not None
    for estimates_AP in (candidates.choosing_AP, candidates.valuing_AP):
        np.testing.assert_array_equal(estimates_AP, estimates_AP[:1].repeat(3, axis=0))


def test_split_is_the_seed_s() -> None:
    rewards_PAS = random_rewards(np.random.default_rng(0), 30, 5, 8)
    one, same, other = (Candidates.of(rewards_PAS, GRID[:5], 2, seed).choosing_AP for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


@pytest.mark.parametrize("seed", range(60))
def test_greedy_reaches_what_nemhauser_wolsey_and_fisher_guarantee(seed: int) -> None:
    rng = np.random.default_rng([3, seed])
    for _ in range(5):
        problems, actions = int(rng.integers(4, 13)), int(rng.integers(4, 9))
        rewards_PAS = with_missing(rng, random_rewards(rng, problems, actions, 2))
        rewards_PAS[0, 0], rewards_PAS[1, 0] = 1, 0
        candidates = Candidates.of(rewards_PAS, GRID[:actions])
        got = greedy_selection(candidates, 4).coverage
        for count in range(1, 5):
            best = exact_optimum(candidates.choosing_AP, count)
            assert (1 - 1 / e) * best - 1e-12 <= got[count - 1] <= best + 1e-12
            assert got[count - 1] >= (1 - (1 - 1 / count) ** count) * best - 1e-12


def test_greedy_meets_its_bound_where_top_k_and_the_optimum_lie_far_apart() -> None:
    """Ten copies of the best strategy: top-K takes them all. Greedy takes one, then must split two complements."""
    copies = [[1] * 10 + [1, 0]] * 2 + [[1] * 10 + [0, 1]] * 2 + [[0] * 10 + [1, 0]] + [[0] * 10 + [0, 1]]
    candidates = Candidates.of(one_sample(*copies), GRID[:12])
    greedy, top = greedy_selection(candidates, 2), top_selection(candidates, 2)
    assert exact_optimum(candidates.choosing_AP, 2) == 1
    assert greedy.coverage == pytest.approx((4 / 6, 5 / 6))
    assert top.coverage == pytest.approx((4 / 6, 4 / 6))


@pytest.mark.parametrize("seed", range(20))
def test_lazy_choice_is_the_eager_one(seed: int) -> None:
    rng = np.random.default_rng([4, seed])
    candidates = Candidates.of(random_rewards(rng, 150, 60, 3), GRID[:60])
    covered_P, chosen = np.zeros(150), []
    parameters = [sum(value is not None for value in strategy.to_dict().values()) for strategy in GRID[:60]]
    for _ in range(40):
        gain_A = np.maximum(candidates.choosing_AP - covered_P, 0).mean(1).round(10)
        rest = [action for action in range(60) if action not in chosen]
        chosen.append(min(rest, key=lambda action: (-gain_A[action], parameters[action], action)))
        covered_P = np.maximum(covered_P, candidates.choosing_AP[chosen[-1]])
    assert list(greedy_selection(candidates, 40).chosen) == chosen


def test_coverage_is_monotone_and_submodular() -> None:
    rng = np.random.default_rng(5)
    for _ in range(200):
        candidates = Candidates.of(with_missing(rng, random_rewards(rng, 10, 7, 3)), GRID[:7])
        order = rng.permutation(7).tolist()
        curve = (0.0, *coverage(candidates, order).coverage)
        assert all(0 <= low <= high <= 1 for low, high in pairwise(curve))
        small, large = sorted(rng.choice(np.arange(1, 7), 2, replace=False))
        gain_of_small, gain_of_large = (
            coverage(candidates, [*order[:size], order[6]]).coverage[-1]
            - coverage(candidates, order[:size]).coverage[-1]
            for size in (small, large)
        )
        assert gain_of_small >= gain_of_large - 1e-12


def test_ties_go_to_the_simpler_strategy_then_to_the_smaller_index() -> None:
    rewards_PAS = one_sample([1, 1, 1, 1, 1], [0, 0, 0, 0, 0])
    pool = (Strategy(1.0, 50, 0.9, 0.1), Strategy(1.0, 50), T2, T1, GREEDY)
    assert greedy_selection(Candidates.of(rewards_PAS, pool), 5).chosen == (4, 2, 3, 1, 0)
    assert top_selection(Candidates.of(rewards_PAS, pool), 5).chosen == (4, 2, 3, 1, 0)


def test_a_difference_of_rounding_is_a_tie() -> None:
    """The same rewards in another order have sums that differ in the last bit; the simpler strategy still wins."""
    rng = np.random.default_rng(6)
    higher = 0
    for _ in range(50):
        rewards_P = rng.random(9)
        rewards_PAS = np.stack([rewards_P, rng.permutation(rewards_P)], axis=1)[:, :, None]
        candidates = Candidates.of(rewards_PAS, (Strategy(1.0, 50), T1))
        higher += candidates.choosing_AP[0].mean() > candidates.choosing_AP[1].mean()
        assert greedy_selection(candidates, 1).chosen == (1,)
        assert top_selection(candidates, 1).chosen == (1,)
    assert higher  # else this tests nothing


@pytest.mark.parametrize("budget", [1, 3])
def test_cross_fitted_value_of_pure_noise_is_unbiased_and_the_naive_one_is_not(budget: int) -> None:
    """Ten equal strategies with rate p: whatever is chosen is worth 1 − (1 − p)^B."""
    rng, rate = np.random.default_rng(7), 0.3
    truth = 1 - (1 - rate) ** budget
    naive, honest = [], []
    for seed in range(300):
        rewards_PAS = (rng.random((20, 10, 8)) < rate).astype(np.float64)
        got = greedy_selection(Candidates.of(rewards_PAS, GRID[:10], budget, seed), 5)
        assert got.held_out is not None
        naive.append(got.coverage)
        honest.append(got.held_out)
    naive_RN, honest_RN = np.array(naive), np.array(honest)
    error_N = honest_RN.std(0) / np.sqrt(len(honest_RN))
    assert (np.abs(honest_RN.mean(0) - truth) < 4 * error_N).all()
    assert error_N.max() < 0.01
    assert (naive_RN.mean(0) > truth + 0.02).all()
    assert naive_RN.mean(0)[-1] > truth + 0.2


def test_held_out_value_is_that_of_the_strategy_that_the_other_half_picks() -> None:
    """Two strategies that differ for certain: a chooser finds the right one of each problem, and is paid in full."""
    rewards_PAS = np.zeros((6, 2, 8))
    rewards_PAS[:4, 0], rewards_PAS[4:, 1] = 1, 1
    got = greedy_selection(Candidates.of(rewards_PAS, (T1, T2), budget=4), 2)
    assert got.coverage == got.held_out == pytest.approx((4 / 6, 1))


def test_cell_without_an_estimate_covers_nothing() -> None:
    rewards_PAS = np.ones((3, 2, 4))
    rewards_PAS[0, :, 3] = 0
    rewards_PAS[1, 0, 1:] = nan  # one sample: enough for a mean, too few for two halves of pass@1
    mean, halves = Candidates.of(rewards_PAS, (T1, T2)), Candidates.of(rewards_PAS, (T1, T2), budget=1)
    assert not np.isnan(mean.choosing_AP).any()
    assert np.argwhere(np.isnan(halves.choosing_AP)).tolist() == [[0, 1]]
    assert (coverage(mean, [0]).missing, coverage(halves, [0]).missing, coverage(halves, [1]).missing) == (0, 1, 0)
    got = coverage(halves, [0])
    assert got.held_out is not None
    assert got.coverage[0] <= 2 / 3
    assert got.held_out[0] <= 2 / 3


def test_a_pick_that_is_known_to_fail_comes_before_one_that_is_not_known() -> None:
    """By the choosing half strategy 1 never solves problem 0; what it is worth there is what the other half says."""
    candidates = Candidates((T1, T2), np.array([[nan, 1.0], [0.0, 0.0]]), np.array([[nan, 1.0], [1.0, 0.0]]))
    got = coverage(candidates, [0, 1])
    assert got.coverage == (0.5, 0.5)
    assert got.held_out == (0.5, 1.0)


def test_bootstrap_always_finds_a_dominant_strategy_and_a_coin_flip_pair_half_the_time() -> None:
    """Strategy 2 solves half of 400 problems, and all that 3 solves; 0 and 1 share the rest, and one place is left."""
    rewards_PA = np.zeros((400, 4))
    rewards_PA[:200, 2] = rewards_PA[:50, 3] = rewards_PA[200:300, 0] = rewards_PA[300:, 1] = 1
    candidates = Candidates.of(rewards_PA[:, :, None], (T1, T2, T3, T4))
    share_A = selection_stability(candidates, 2, resamples=400)
    assert share_A[2] == 1
    assert share_A[3] == 0
    assert share_A[0] + share_A[1] == pytest.approx(1)
    assert share_A[0] == pytest.approx(0.5, abs=0.1)
    np.testing.assert_array_equal(share_A, selection_stability(candidates, 2, resamples=400))
    assert (share_A != selection_stability(candidates, 2, resamples=400, seed=1)).any()
    assert selection_stability(candidates, 4, resamples=3).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("budget", [None, 2])
def test_best_of_n_chooses_on_some_problems_and_values_on_others(budget: int | None) -> None:
    rng = np.random.default_rng(8)
    rewards_PAS = random_rewards(rng, 60, 12, 4)
    candidates = Candidates.of(rewards_PAS, GRID[:12], budget)
    choose_on, value_on = np.arange(0, 60, 2), np.arange(1, 60, 2)
    got = best_of_n(candidates, 5, choose_on, value_on)
    expected = {}
    for name, choose in (("greedy", greedy_selection), ("top", top_selection)):
        chosen = choose(candidates.on(choose_on), 5).chosen
        curves = []
        for n in range(1, 6):
            per_problem = [coverage(candidates.on([problem]), chosen[:n]) for problem in value_on]
            curves.append(
                np.array([one.coverage[-1] if one.held_out is None else one.held_out[-1] for one in per_problem])
            )
        expected[name] = curves
    assert got.greedy == tuple(proportion_interval(values_P) for values_P in expected["greedy"])
    assert got.top == tuple(proportion_interval(values_P) for values_P in expected["top"])
    pairs = zip(expected["greedy"], expected["top"], strict=True)
    assert got.difference == tuple(paired_difference(*pair) for pair in pairs)
    assert got.greedy[0] == got.top[0]
    assert got.greedy[-1].n == 30

    # rewards of the problems that value have no part in the choice, and the other way round
    swapped = replace(candidates, choosing_AP=candidates.choosing_AP.copy())
    swapped.choosing_AP[:, value_on] = 1 - swapped.choosing_AP[:, value_on]
    assert greedy_selection(swapped.on(choose_on), 5) == greedy_selection(candidates.on(choose_on), 5)


def test_best_of_n_rewards_what_complements() -> None:
    """Three copies of one strategy and one that solves the rest: top-K needs all four."""
    row_1, row_2 = [1, 1, 1, 0], [0, 0, 0, 1]
    candidates = Candidates.of(one_sample(*[row_1, row_1, row_2] * 20), (T1, T2, T3, T4))
    got = best_of_n(candidates, 4, range(30), range(30, 60))
    assert [point.estimate for point in got.greedy] == pytest.approx([2 / 3, 1, 1, 1])
    assert [point.estimate for point in got.top] == pytest.approx([2 / 3, 2 / 3, 2 / 3, 1])
    assert got.difference[1].low > 0


MIXED = one_sample([1, 0, 1], [0, 1, 0], [0, 0, 1])


def changed(
    place: tuple[int, ...] | int, value: float, rewards_PAS: NDArray[np.float64] = MIXED
) -> NDArray[np.float64]:
    rewards_PAS = rewards_PAS.copy()
    rewards_PAS[place] = value
    return rewards_PAS


@pytest.mark.parametrize(
    ("rewards_PAS", "pool", "budget", "told"),
    [
        (MIXED, (T1, T2, T1), None, r"strategy 'T=0\.3' is listed twice"),
        (MIXED, (T1, T2), None, r"shape \(3, 3, 1\) is not problems × 2 candidates × samples"),
        (MIXED[:, :, 0], (T1, T2, T3), None, r"shape \(3, 3\)"),
        (MIXED[:0], (T1, T2, T3), None, r"shape \(0, 3, 1\)"),
        (changed((1, 2), 1.5), (T1, T2, T3), None, r"problem 1, strategy 'T=0\.75' has a reward of 1\.5.*\[0, 1\]"),
        (changed((1, 2), -0.1), (T1, T2, T3), None, r"has a reward of -0\.1"),
        (changed((1, 2), np.inf), (T1, T2, T3), None, r"has a reward of inf"),
        (changed((1, 2), 0.5), (T1, T2, T3), 1, r"has a reward of 0\.5.*0 or 1 for pass@1"),
        (changed(1, nan), (T1, T2, T3), None, r"no strategy has a sample on problem 1; sample more, or leave it out"),
        (changed(1, nan, changed(2, nan)), (T1, T2, T3), None, r"problem 1 \(nor on 1 others\)"),
        (MIXED, (T1, T2, T3), 1, r"no strategy has the 2 samples that two halves of pass@1 need on problem 0"),
        (
            np.moveaxis(changed(1, nan, np.moveaxis(MIXED, 1, 0)), 0, 1),
            (T1, T2, T3),
            None,
            r"'T=0\.5' has a sample on no",
        ),
        (MIXED, (T1, T2, T3), 0, "budget must be at least 1, got 0"),
    ],
)
def test_refuses_rewards_that_are_none(
    rewards_PAS: NDArray[np.float64], pool: tuple[Strategy, ...], budget: int | None, told: str
) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        Candidates.of(rewards_PAS, pool, budget)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("choose", [greedy_selection, top_selection, selection_stability])
@pytest.mark.parametrize(
    ("rewards_PAS", "actions", "told"),
    [
        (MIXED, 0, "at least 1 action, got 0"),
        (MIXED, 4, "cannot choose 4 actions from 3 candidates"),
        (np.zeros((3, 3, 1)), 2, "no strategy ever solves a problem.*easier"),
        (changed((0, 0), nan, np.ones((3, 3, 1))), 2, "every strategy always solves every problem.*harder"),
    ],
)
def test_refuses_a_choice_that_cannot_be_made(
    choose: object, rewards_PAS: NDArray[np.float64], actions: int, told: str
) -> None:
    assert callable(choose)
    candidates = Candidates.of(rewards_PAS, (T1, T2, T3))
    with pytest.raises(ConfigError, match=told) as caught:
        choose(candidates, actions)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("chosen", [[], [3], [-1]])
def test_coverage_refuses_what_is_not_in_the_pool(chosen: list[int]) -> None:
    with pytest.raises(ConfigError, match="name indices from 0 to 2"):
        coverage(Candidates.of(MIXED, (T1, T2, T3)), chosen)


def test_bootstrap_refuses_no_resamples() -> None:
    with pytest.raises(ConfigError, match="at least 1 resample, got 0"):
        selection_stability(Candidates.of(MIXED, (T1, T2, T3)), 1, resamples=0)


@pytest.mark.parametrize(
    ("choose_on", "value_on", "told"),
    [
        ([], [1], "choose_on must name different problems, each from 0 to 2"),
        ([0], [3], "value_on must name different problems"),
        ([-1], [1], "choose_on must name different"),
        ([0, 0], [1], "choose_on must name different"),
        ([0, 1], [2, 1], "problem 1 is in choose_on and in value_on"),
    ],
)
def test_best_of_n_refuses_problems_that_overlap_or_do_not_exist(
    choose_on: list[int], value_on: list[int], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        best_of_n(Candidates.of(MIXED, (T1, T2, T3)), 1, choose_on, value_on)


def test_bench_select_measures_the_choice_that_its_eager_peer_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    rewards_PAS = select.random_rewards(300, len(GRID), 8)
    candidates = Candidates.of(rewards_PAS, GRID)
    chosen = greedy_selection(candidates, 10).chosen
    assert list(chosen) == select.eager_choice(candidates.choosing_AP, 10)
    assert greedy_selection(candidates, 10).coverage[-1] < 0.95  # else there was little to choose

    monkeypatch.setattr(select, "_PROBLEMS", 40)
    monkeypatch.setattr(select, "_BOOTSTRAP", 20)
    result = select.bench_select(1, Console(quiet=True))
    assert {"bench", "machine", "versions", "rows", "ratios"} == set(result)
    assert result["rows"][0]["case"] == "greedy 40x180x8"
    assert all({"case", "value", "unit", "low", "high"} == set(row) for row in result["rows"])
