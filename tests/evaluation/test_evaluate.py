"""Two problems, two strategies, four samples: every number by hand.

pass@1 of c right samples out of four is c/4; pass@2 is 0, 1/2, 5/6, 1, 1 for c = 0 … 4. BEST, chosen on validation, is
greedy at k = 1 and warm at k = 2, and the best single strategy is greedy, where the test problems alone would have
chosen warm throughout.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from rheostat.decoding.strategy import ActionSpace, Order, Strategy
from rheostat.errors import ConfigError
from rheostat.evaluation.evaluate import Comparison, Row, compare, groups_of
from rheostat.evaluation.judged import Judged, Measured, sequence_choices, token_judged
from rheostat.rollouts.sweep import PolicySweep, Sweep
from rheostat.statistics import (
    Interval,
    bootstrap_interval,
    equivalent_samples,
    holm,
    maj_at_k,
    oracle_at_k,
    paired_difference,
    paired_p_value,
    proportion_interval,
    sign_test,
    tokens_per_solved,
)
from rheostat.types import Problem, Prompt

COLD, WARM = "T=0.5", "T=1"
SPACE = ActionSpace((Strategy(0.5), Strategy(1.0)))
BUDGETS, GRID = (1, 2), (1, 2, 4)
VALIDATION_RIGHT, TEST_RIGHT = [[4, 1], [2, 2]], [[2, 0], [1, 4]]  # right samples, by strategy and problem
EMBEDDING_PH = torch.tensor([[1.0, 0.0], [0.0, 1.0]])

# values of the two test problems
STATIC = {COLD: {1: [1 / 2, 0], 2: [5 / 6, 0]}, WARM: {1: [1 / 4, 1], 2: [1 / 2, 1]}}
DRAWN = {1: [0.75 / 2 + 0.25 / 4, 0.75], 2: [0.4 * 5 / 6 + 0.6 / 2, 0.1]}
COMMITTED = {1: [1 / 2, 1], 2: [1 / 2, 0]}
BEST = {1: STATIC[COLD][1], 2: STATIC[WARM][2]}
MIXED = {1: [3 / 8, 1 / 2], 2: [2 / 3, 1 / 2]}


# chosen on one half of the four samples, valued on the other, both ways: the first problem has cold 11|00, warm 10|00
ORACLE = {k: oracle_at_k(np.array([[[1, 1, 0, 0], [1, 0, 0, 0]], [[0] * 4, [1] * 4]]), k).tolist() for k in BUDGETS}


class Lookup:
    """A policy that reads the problem off its embedding: [chance of cold, chance of warm] at each budget."""

    space = SPACE

    def __init__(self, pi: dict[int, list[list[float]]]) -> None:
        self.pi = pi

    def probabilities(self, embedding_PH: Tensor, budget_P: Tensor) -> Tensor:
        [budget] = set(budget_P.tolist())
        return embedding_PH @ torch.tensor(self.pi[budget])


def policy() -> Lookup:
    return Lookup({1: [[0.75, 0.25], [0.25, 0.75]], 2: [[0.4, 0.6], [0.9, 0.1]]})


def sweep_of(right_AP: list[list[int]], space: ActionSpace = SPACE) -> Sweep:
    problems = tuple(Problem(f"p{i}", "t", member, f"q{i}", "a") for i, member in enumerate(("sums", "words")))
    rewards_PAS = np.array([[[float(s < right) for s in range(4)] for right in of] for of in np.array(right_AP).T])
    lengths_PAS = np.ones(rewards_PAS.shape, dtype=np.int64)
    return Sweep(
        problems, space, rewards_PAS.astype(np.float32), lengths_PAS, lengths_PAS < 0, -lengths_PAS, 16, 32, 0, 0
    )


def compare_prompts(
    validation: Sweep, test: Sweep, adapters: dict[str, Lookup], commit: bool, space: ActionSpace | None = None
) -> Comparison:
    """Sequence-level adapters and nothing else; ``space``: what MIXED is uniform over."""
    measured = Measured.of(test, BUDGETS, GRID)
    judged = {
        name: measured.mixture("adapter", sequence_choices(name, adapter, test.space, EMBEDDING_PH, BUDGETS, commit))
        for name, adapter in adapters.items()
    }
    mixed = {"MIXED": measured.uniform("mixed", space or test.space, BUDGETS)}
    groups = groups_of(test.problems, ["direct"] * len(test.problems))
    return compare(validation, measured, judged, mixed, groups)


def compared(commit: bool = False) -> Comparison:
    return compare_prompts(sweep_of(VALIDATION_RIGHT), sweep_of(TEST_RIGHT), {"adapter": policy()}, commit)


def with_mean(values: dict[int, list[float]]) -> dict[int | str, NDArray[np.float64]]:
    arrays: dict[int | str, NDArray[np.float64]] = {k: np.array(own) for k, own in values.items()}
    mean = (arrays[1] + arrays[2]) / 2  # of two budgets the area is the same
    return arrays | {"mean": mean, "area": mean}


def interval_of(k: int | str, values_P: NDArray[np.float64]) -> Interval:
    """The area has a bootstrap interval; where all problems are alike it would be empty."""
    drawn = k == "area" and len(set(values_P.tolist())) > 1
    return bootstrap_interval(lambda mean: mean, values_P) if drawn else proportion_interval(values_P)


def expected(commit: bool) -> dict[tuple[str, str], dict[int | str, NDArray[np.float64]]]:
    return {
        ("adapter", "adapter"): with_mean(COMMITTED if commit else DRAWN),
        ("BEST", "best"): with_mean(BEST),
        ("best single strategy", "best"): with_mean(STATIC[COLD]),
        ("MIXED", "mixed"): with_mean(MIXED),
        ("oracle", "oracle"): with_mean(ORACLE),
        (COLD, "static"): with_mean(STATIC[COLD]),
        (WARM, "static"): with_mean(STATIC[WARM]),
    }


def numbers(row: object) -> tuple[float, float, float]:
    return tuple(getattr(row, name) for name in ("estimate", "low", "high"))  # type: ignore[return-value]


@pytest.mark.parametrize("commit", [False, True])
def test_rows_by_hand(commit: bool) -> None:
    rows = {(row.policy, row.kind, row.k): row for row in compared(commit).rows}
    values = expected(commit)
    assert set(rows) == {(*name, k) for name in values for k in (1, 2, "mean", "area")}
    for (policy_name, kind, k), row in rows.items():
        values_P = values[policy_name, kind][k]
        assert numbers(row)[0] == pytest.approx(values_P.mean(), abs=1e-6)
        interval = interval_of(k, values_P)
        assert numbers(row) == pytest.approx((interval.estimate, interval.low, interval.high), abs=1e-6)
        assert (row.n_problems, row.n_samples, row.member) == (2, 4, None)


def test_a_few_estimates_in_figures() -> None:
    drawn, committed = compared(), compared(commit=True)
    estimate = {(row.policy, row.k): row.estimate for row in drawn.rows}
    assert estimate["adapter", 1] == 0.59375
    assert estimate["adapter", 2] == 0.366667
    assert estimate["adapter", "mean"] == 0.480208
    assert estimate["BEST", "mean"] == 0.5
    assert estimate["MIXED", 2] == 0.583333
    assert {row.k: row.estimate for row in committed.rows if row.policy == "adapter"} == {
        1: 0.75,
        2: 0.25,
        "mean": 0.5,
        "area": 0.5,
    }


def test_best_is_chosen_on_validation_even_where_test_would_choose_otherwise() -> None:
    def chosen(comparison: Comparison, name: str) -> dict[int | str, str | None]:
        return {row.k: row.chosen for row in comparison.rows if row.policy == name}

    assert chosen(compared(), "BEST") == {1: COLD, 2: WARM, "mean": None, "area": None}
    assert chosen(compared(), "best single strategy") == {1: COLD, 2: COLD, "mean": COLD, "area": COLD}
    assert (
        chosen(compared(), "MIXED") == chosen(compared(), "adapter") == {1: None, 2: None, "mean": None, "area": None}
    )
    on_test = compare_prompts(sweep_of(TEST_RIGHT), sweep_of(TEST_RIGHT), {}, commit=False)
    assert chosen(on_test, "BEST") == {1: WARM, 2: WARM, "mean": None, "area": None}
    assert chosen(on_test, "best single strategy") == {1: WARM, 2: WARM, "mean": WARM, "area": WARM}


@pytest.mark.parametrize("commit", [False, True])
def test_differences_are_paired_by_problem(commit: bool) -> None:
    values = expected(commit)
    differences = {(d.policy, d.baseline, d.k): d for d in compared(commit).differences}
    kinds = {"best single strategy": "best", "BEST": "best", "MIXED": "mixed"}
    assert set(differences) == {("adapter", name, k) for name in kinds for k in (1, 2, "mean")}
    for (_, baseline, k), difference in differences.items():
        interval = paired_difference(values["adapter", "adapter"][k], values[baseline, kinds[baseline]][k])
        assert numbers(difference) == pytest.approx((interval.estimate, interval.low, interval.high), abs=1e-6)
        assert difference.n_problems == 2
    assert differences["adapter", "BEST", 2].baseline_strategy == WARM
    assert differences["adapter", "BEST", "mean"].baseline_strategy is None
    assert differences["adapter", "best single strategy", "mean"].baseline_strategy == COLD
    assert differences["adapter", "MIXED", 1].baseline_strategy is None


def test_rows_by_member() -> None:
    got: dict[tuple[str | None, str, int | str], Row] = {
        (row.member, row.policy, row.k): row for row in compared().by_member
    }
    values = expected(commit=False)
    assert len(got) == 2 * len(values) * 4
    for (member, policy_name, k), row in got.items():
        of_problem = values[policy_name, row.kind][k][["sums", "words"].index(str(member))]
        assert row.estimate == pytest.approx(of_problem, abs=1e-6)
        assert (row.n_problems, row.n_samples) == (1, 4)


def test_choices_of_adapters_are_drawn_or_committed() -> None:
    other = Lookup({k: [[1.0, 0.0], [1.0, 0.0]] for k in BUDGETS})
    for commit, first in (
        (False, {1: [[0.75, 0.25], [0.25, 0.75]], 2: [[0.4, 0.6], [0.9, 0.1]]}),
        (True, {1: [[1, 0], [0, 1]], 2: [[0, 1], [1, 0]]}),
    ):
        pi = sequence_choices("adapter", policy(), SPACE, EMBEDDING_PH, BUDGETS, commit)
        for k in BUDGETS:
            np.testing.assert_allclose(pi[k], first[k], atol=1e-6)
        adapters = {"adapter": policy(), "other": other}
        got = compare_prompts(sweep_of(VALIDATION_RIGHT), sweep_of(TEST_RIGHT), adapters, commit)
        assert {d.policy for d in got.differences} == {"adapter", "other"}


def test_a_missing_verdict_counts_as_wrong() -> None:
    test = sweep_of(TEST_RIGHT)
    rewards_PAS = test.rewards_PAS.copy()
    rewards_PAS[1, 1, 0] = np.nan
    got = compare_prompts(sweep_of(VALIDATION_RIGHT), replace(test, rewards_PAS=rewards_PAS), {}, False)
    assert {row.policy: row.estimate for row in got.rows if row.k == 1}[WARM] == (1 / 4 + 3 / 4) / 2


def test_without_adapters_only_static_strategies_are_compared() -> None:
    got = compare_prompts(sweep_of(VALIDATION_RIGHT), sweep_of(TEST_RIGHT), {}, commit=True)
    assert got.differences == []
    assert {row.policy for row in got.rows} == {"BEST", "best single strategy", "MIXED", "oracle", COLD, WARM}


def test_adapters_of_several_spaces_are_compared_among_all_that_was_measured() -> None:
    """A reversed space changes nothing; one with a single strategy is that strategy."""
    reversed_policy = Lookup({k: [row[::-1] for row in rows] for k, rows in policy().pi.items()})
    reversed_policy.space = ActionSpace((Strategy(1.0), Strategy(0.5)))
    warm = Lookup({k: [[1.0], [1.0]] for k in BUDGETS})
    warm.space = ActionSpace((Strategy(1.0),))
    adapters = {"adapter": policy(), "reversed": reversed_policy, "warm": warm}
    got = compare_prompts(sweep_of(VALIDATION_RIGHT), sweep_of(TEST_RIGHT), adapters, False)
    value = {(row.policy, row.k): row.estimate for row in got.rows}
    for k in (*BUDGETS, "mean"):
        assert value["reversed", k] == value["adapter", k]
        assert value["warm", k] == value[WARM, k] != value["adapter", k]
    against = {(d.policy, d.baseline, d.k): d.estimate for d in got.differences}
    assert against["warm", "adapter", "mean"] == pytest.approx(
        value["warm", "mean"] - value["adapter", "mean"], abs=1e-6
    )
    assert ("adapter", "adapter", "mean") not in against


def test_a_strategy_more_leaves_mixed_as_it_is() -> None:
    """Uniform over the two of an action space, whatever else was measured; MIXED of three would be warmer."""
    hot, cold = Strategy(1.25), Strategy(0)
    more = ActionSpace((hot, *SPACE, cold))
    right_AP = {"validation": [[0, 0], *VALIDATION_RIGHT, [4, 4]], "test": [[0, 0], *TEST_RIGHT, [4, 4]]}
    sweeps = [sweep_of(own, more) for own in right_AP.values()]
    rows = {(row.policy, row.k): row.estimate for row in compare_prompts(*sweeps, {}, True, SPACE).rows}
    for k, values_P in with_mean(MIXED).items():
        assert rows["MIXED", k] == pytest.approx(values_P.mean(), abs=1e-6)
    with pytest.raises(ConfigError, match="the uniform mixture: it has strategies that were not measured"):
        compare_prompts(sweep_of(VALIDATION_RIGHT), sweep_of(TEST_RIGHT), {}, True, more)


@pytest.mark.parametrize(
    "space",
    [
        ActionSpace((Strategy(0.5), Strategy(1.25))),
        ActionSpace((Strategy(0.5), Strategy(1.0)), Order.TRANSFORMERS),
    ],
)
def test_an_adapter_with_another_space_is_refused(space: ActionSpace) -> None:
    stranger = policy()
    stranger.space = space
    with pytest.raises(ConfigError, match="stranger: it has"):
        compare_prompts(sweep_of(VALIDATION_RIGHT), sweep_of(TEST_RIGHT), {"stranger": stranger}, True)


# --- Token level: pass@k over samples that were drawn under B = k ---


def policy_sweep(right_P: list[int], samples: int) -> PolicySweep:
    rewards_PS = np.array([[float(s < right) for s in range(samples)] for right in right_P], dtype=np.float32)
    ones_PS = np.ones(rewards_PS.shape, dtype=np.int64)
    return PolicySweep(sweep_of(TEST_RIGHT).problems, rewards_PS, ones_PS, ones_PS < 0, -ones_PS, 0, 0, 0, 0)


# pass@1 from the samples under B = 1, pass@2 from those under B = 2; of five samples 1 - C(5 - c, 2) / 10
AWARE = {1: policy_sweep([1, 3], 4), 2: policy_sweep([2, 4], 5)}
BLIND = dict.fromkeys(BUDGETS, policy_sweep([0, 2], 4))
UNIFORM = policy_sweep([1, 2], 4)
TOKEN = {
    ("aware", "adapter"): with_mean({1: [1 / 4, 3 / 4], 2: [7 / 10, 1]}),
    ("blind", "adapter"): with_mean({1: [0, 1 / 2], 2: [0, 5 / 6]}),
    ("BEST", "best"): with_mean(BEST),
    ("best single strategy", "best"): with_mean(STATIC[COLD]),
    ("MIXED", "mixed"): with_mean({1: [1 / 4, 1 / 2], 2: [1 / 2, 5 / 6]}),
    ("oracle", "oracle"): with_mean(ORACLE),
    (COLD, "static"): with_mean(STATIC[COLD]),
    (WARM, "static"): with_mean(STATIC[WARM]),
}


def test_strategies_of_validation_and_test_are_the_same() -> None:
    turned = sweep_of(VALIDATION_RIGHT[::-1], ActionSpace(tuple(SPACE)[::-1]))
    with pytest.raises(ConfigError, match=r"validation measured \[T=1, T=0.5\] and test \[T=0.5, T=1\]"):
        compare_prompts(turned, sweep_of(TEST_RIGHT), {}, True)


def compare_tokens(
    test: Sweep,
    sweeps: dict[str, dict[int, PolicySweep]],
    mixed: PolicySweep,
    cot: Sequence[bool],
    kind: str = "adapter",
) -> Comparison:
    """Token-level policies and nothing else; the second of several is of ``kind``."""
    kinds = {name: kind if number == 1 else "adapter" for number, name in enumerate(sweeps)}
    judged = {name: token_judged(kinds[name], own, GRID) for name, own in sweeps.items()}
    at_random = {"MIXED": token_judged("mixed", dict.fromkeys(BUDGETS, mixed), GRID)}
    measured, groups = (
        Measured.of(test, BUDGETS, GRID),
        groups_of(test.problems, ["cot" if asked else "direct" for asked in cot]),
    )
    return compare(sweep_of(VALIDATION_RIGHT), measured, judged, at_random, groups)


def token_compared(cot: tuple[bool, bool] = (False, False), kind: str = "adapter") -> Comparison:
    return compare_tokens(sweep_of(TEST_RIGHT), {"aware": AWARE, "blind": BLIND}, UNIFORM, cot, kind)


def test_token_rows_by_hand() -> None:
    rows = {(row.policy, row.kind, row.k): row for row in token_compared().rows}
    assert set(rows) == {(*name, k) for name in TOKEN for k in (1, 2, "mean", "area")}
    for (name, kind, k), row in rows.items():
        interval = interval_of(k, TOKEN[name, kind][k])
        assert numbers(row) == pytest.approx((interval.estimate, interval.low, interval.high), abs=1e-6)
        assert (row.n_problems, row.n_samples, row.style) == (2, 4, None)
    assert rows["aware", "adapter", 2].estimate == 0.85
    assert rows["MIXED", "mixed", 1].estimate == 0.375  # the given sweep; the mean over strategies would be 0.4375
    assert rows["BEST", "best", 2].chosen == WARM


def test_token_differences_are_paired_by_problem() -> None:
    kinds = {"best single strategy": "best", "BEST": "best", "MIXED": "mixed", "aware": "adapter"}
    differences = {(d.policy, d.baseline, d.k): d for d in token_compared().differences}
    pairs = {(n, b) for n in ("aware", "blind") for b in kinds if n != b}  # the second adapter also against the first
    assert set(differences) == {(*pair, k) for pair in pairs for k in (1, 2, "mean")}
    for (name, baseline, k), difference in differences.items():
        interval = paired_difference(TOKEN[name, "adapter"][k], TOKEN[baseline, kinds[baseline]][k])
        assert numbers(difference) == pytest.approx((interval.estimate, interval.low, interval.high), abs=1e-6)
    assert differences["aware", "MIXED", 1].estimate == pytest.approx(0.125)
    assert differences["blind", "MIXED", 2].estimate == pytest.approx(-0.25)


def test_token_rows_by_style_need_two_styles_and_two_problems_of_one() -> None:
    assert token_compared().by_style == token_compared((True, True)).by_style == []
    assert token_compared((True, False)).by_style == []

    double = Sweep(
        *(lambda s: (s.problems * 2, s.space, *(
            np.tile(own_PAS, (2, 1, 1)) for own_PAS in (s.rewards_PAS, s.length_PAS, s.truncated_PAS, s.label_PAS)
        )))(sweep_of(TEST_RIGHT)),
        32, 64, 0, 0,
    )  # fmt: skip
    adapter = {k: policy_sweep([0, 4, 1, 3], 4) for k in BUDGETS}
    got = compare_tokens(double, {"own": adapter}, policy_sweep([4, 0, 2, 2], 4), [True, False, False, True])
    rows = {(row.style, row.policy, row.k): row for row in got.by_style}
    assert {style for style, *_ in rows} == {"cot", "direct"}
    assert rows["cot", "own", 1].estimate == pytest.approx((0 + 3 / 4) / 2)
    assert rows["direct", "own", 1].estimate == pytest.approx((1 + 1 / 4) / 2)
    assert rows["cot", "MIXED", 2].estimate == pytest.approx((1 + 5 / 6) / 2, abs=1e-6)
    assert rows["direct", COLD, 1].estimate == pytest.approx((0 + 1 / 2) / 2)
    assert all(row.n_problems == 2 for row in got.by_style)


# --- What it costs, how sure it is, and who is compared with whom ---


def test_p_values_are_those_of_the_tests_and_corrected_over_a_rival() -> None:
    differences = token_compared().differences
    for rival in ("BEST", "MIXED"):
        family = [d for d in differences if d.baseline == rival]
        kind = {"BEST": "best", "MIXED": "mixed"}[rival]
        for d in family:
            pair = TOKEN[d.policy, "adapter"][d.k], TOKEN[rival, kind][d.k]
            assert d.p == pytest.approx(paired_p_value(*pair), rel=5e-3)
            assert d.p_sign == pytest.approx(sign_test(*pair), rel=5e-3)
        assert [d.p_holm for d in family] == pytest.approx(holm([d.p for d in family]), rel=5e-3)
        assert any(d.p_holm > d.p for d in family)


def test_a_baseline_is_a_rival_and_no_adapter() -> None:
    differences = token_compared(kind="baseline").differences
    pairs = {(d.policy, d.baseline) for d in differences}
    static = {"best single strategy", "BEST", "MIXED"}
    assert pairs == {("aware", name) for name in (*static, "blind")} | {("blind", name) for name in static}


def test_costs_by_hand() -> None:
    """Answers of three tokens (cold) and one (warm); greedy decoding needs one sample whatever k is."""
    test = sweep_of(TEST_RIGHT, ActionSpace((Strategy(0), Strategy(1.0))))
    lengths_PAS = np.broadcast_to(np.array([3, 1])[None, :, None], test.length_PAS.shape)
    test = replace(test, length_PAS=lengths_PAS)
    validation = sweep_of(VALIDATION_RIGHT, test.space)
    measured = Measured.of(test, BUDGETS, GRID)
    half = {k: np.full((2, 2), 0.5) for k in BUDGETS}
    judged = {"half": measured.mixture("adapter", half)}
    got = compare(
        validation,
        measured,
        judged,
        {"MIXED": measured.mixture("mixed", half)},
        groups_of(test.problems, ["direct"] * 2),
    )
    cost = {(c.policy, c.k): c for c in got.costs}
    assert (cost["greedy", 1].tokens, cost["greedy", 2].tokens) == (3, 3)
    assert (cost[WARM, 1].tokens, cost[WARM, 2].tokens) == (1, 2)
    assert (cost["half", 1].tokens, cost["half", 2].tokens) == (2, 2.5)
    assert ("oracle", 1) not in cost
    solved_P = np.array([(1 / 2 + 1 / 4) / 2, 1 / 2])
    interval = tokens_per_solved(np.array([2.0, 2.0]), solved_P)
    assert cost["half", 1].tokens_per_solved == pytest.approx(
        (interval.estimate, interval.low, interval.high), abs=1e-3
    )
    plain_PK = np.stack([test.pass_at(k)[:, 0] for k in (1, 2, 3, 4)], axis=1)  # greedy is the best single strategy
    equal = equivalent_samples(plain_PK, solved_P)
    assert cost["half", 1].equal_to == (
        pytest.approx(equal.estimate, abs=1e-3), pytest.approx(equal.low, abs=1e-3), None
    )  # fmt: skip
    assert cost["BEST", 1].equal_to is None


def test_accuracy_within_tokens() -> None:
    """Nothing is right within one token where answers take two; everything that ever is, within four."""
    test = sweep_of(TEST_RIGHT)
    test = replace(test, length_PAS=np.full(test.length_PAS.shape, 2))
    got = compare_prompts(sweep_of(VALIDATION_RIGHT), test, {"adapter": policy()}, commit=False)
    within = {item.policy: item for item in got.within}
    assert within["adapter"].tokens == GRID
    assert within["adapter"].accuracy == pytest.approx((0, np.mean(DRAWN[1]), np.mean(DRAWN[1])), abs=1e-6)
    assert within["adapter"].area[0] == pytest.approx(0.75 * np.mean(DRAWN[1]), abs=1e-6)  # rises over the first of two
    assert "oracle" not in within


def test_the_area_over_parallel_budgets_counts_doublings() -> None:
    """Cold is right in 4 and in none of 8 samples: of three heights the middle one counts as much as both others."""
    test = sweep_of(TEST_RIGHT)
    arrays = ("rewards_PAS", "length_PAS", "truncated_PAS", "label_PAS")
    test = replace(test, **{name: np.tile(getattr(test, name), 2) for name in arrays})
    budgets = (1, 2, 4)
    got = {}
    for chosen in (budgets, (1, 4), (2,)):
        measured = Measured.of(test, chosen, GRID)
        mixed = {"MIXED": measured.uniform("mixed", SPACE, chosen)}
        rows = compare(test, measured, {}, mixed, groups_of(test.problems, ["direct"] * 2)).rows
        got[chosen] = {(row.policy, row.k): row for row in rows}
    of_cold_P = {1: [1 / 2, 0], 2: [1 - 6 / 28, 0], 4: [1 - 1 / 70, 0]}
    mean = {k: np.mean(values_P) for k, values_P in of_cold_P.items()}
    for k in budgets:
        assert got[budgets][COLD, k].estimate == pytest.approx(mean[k], abs=1e-6)
    assert got[budgets][COLD, "area"].estimate == pytest.approx((mean[1] / 2 + mean[2] + mean[4] / 2) / 2, abs=1e-6)
    assert got[1, 4][COLD, "area"].estimate == pytest.approx((mean[1] + mean[4]) / 2, abs=1e-6)
    assert (COLD, "area") not in got[2,]
    assert got[budgets][COLD, "area"].low < got[budgets][COLD, "area"].estimate < got[budgets][COLD, "area"].high


def test_groups_by_level_and_subject() -> None:
    problems = [
        Problem(f"p{i}", "math", "math", f"q{i}", "a", {"level": f"Level {1 + i % 2}", "type": "Algebra"})
        for i in range(4)
    ]
    groups = groups_of(problems, ["cot"] * 4)
    assert set(groups) == {"member", "level"}  # one subject, one style: nothing to tell apart
    assert groups["level"]["Level 2"].tolist() == [False, True, False, True]
    prompts = [Prompt("p", "?", (), cot, thinking) for cot, thinking in ((False, True), (True, False), (False, False))]
    styles = groups_of(problems[:3], [prompt.style for prompt in prompts])["style"]
    assert {name: own_P.tolist().index(True) for name, own_P in styles.items()} == {
        "thinking": 0,
        "cot": 1,
        "direct": 2,
    }


def test_a_judged_policy_keeps_what_it_was_given() -> None:
    judged = token_judged("adapter", AWARE, GRID)
    assert isinstance(judged, Judged)
    assert judged.samples == 4
    assert {k: value.tolist() for k, value in judged.solved.items()} == {1: [1 / 4, 3 / 4], 2: [pytest.approx(0.7), 1]}
    assert {k: value.tolist() for k, value in (judged.tokens or {}).items()} == {1: [1, 1], 2: [2, 2]}


def test_majorities_have_their_own_best_and_no_oracle() -> None:
    """Cold answers alike and mostly wrong, warm differently: with three votes warm wins where single samples do not."""
    label_PAS = np.array([[[1, 1, 1, 0, 1, 0], [0, 0, 2, 3, 4, 5]], [[0, 0, 0, 1, 1, 0], [0, 1, 2, -1, -1, 3]]])
    ones_PAS, rewards_PAS = np.ones_like(label_PAS), (label_PAS == 0).astype(np.float32)
    plain = sweep_of(TEST_RIGHT)
    sweep = replace(
        plain, rewards_PAS=rewards_PAS, length_PAS=ones_PAS, truncated_PAS=ones_PAS < 0, label_PAS=label_PAS
    )
    measured = Measured.of(sweep, (1, 3), GRID)
    mixed = {"MIXED": measured.uniform("mixed", SPACE, (1, 3))}
    policies = {"half": measured.mixture("adapter", {1: np.eye(2), 3: np.array([[0.25, 0.75], [1, 0]])})}
    got = compare(sweep, measured, policies, mixed, groups_of(sweep.problems, ["direct"] * 2)).majority
    assert got is not None
    alone = np.array([maj_at_k(label_PAS[:, a], np.zeros(2, dtype=int), 3) for a in range(2)])
    rows = {(row.policy, row.k): row for row in got.rows}
    assert "oracle" not in {policy for policy, _ in rows}
    assert rows[COLD, 3].estimate == pytest.approx(alone[0].mean())
    assert rows["half", 3].estimate == pytest.approx((alone[0, 0] * 0.25 + alone[1, 0] * 0.75 + alone[0, 1]) / 2)
    assert rows["half", 1].estimate == pytest.approx((2 / 6 + 1 / 6) / 2)
    assert rows["BEST", 1].chosen == (COLD if rows[COLD, 1].estimate > rows[WARM, 1].estimate else WARM)
    assert rows["BEST", 3].chosen == (COLD if alone[0].mean() > alone[1].mean() else WARM)
    assert {(d.policy, d.baseline) for d in got.differences} == {
        ("half", rival) for rival in ("BEST", "best single strategy", "MIXED")
    }


def test_without_answers_there_is_no_majority() -> None:
    assert token_compared().majority is None
