"""Policies against static strategies, and against each other, on the same problems and the same rollouts.

What is chosen (BEST, the best single strategy) is chosen on validation and reported on test. Every difference is paired
by problem; p-values are Holm-corrected over all policies and budgets that are compared with the same rival.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from rheostat.decoding.strategy import ActionSpace
from rheostat.errors import ConfigError
from rheostat.evaluation.judged import Judged, Measured, PerProblem, has_answers
from rheostat.rollouts.sweep import Sweep
from rheostat.statistics import (
    Interval,
    area_under_curve,
    bootstrap_interval,
    equivalent_samples,
    holm,
    oracle_at_k,
    paired_difference,
    paired_p_value,
    proportion_interval,
    sign_test,
    tokens_per_solved,
)
from rheostat.types import Problem

Groups = Mapping[str, Mapping[str, Bool[NDArray[np.bool_], " P"]]]
"""Which problems belong together: by a property (``member``, ``style``, ``level``, ``subject``), each of its values."""

BEST, SINGLE, ORACLE = "BEST", "best single strategy", "oracle"
MIXED, MIXED_PER_TOKEN = "MIXED", "MIXED per token"
AREA = "area"


@dataclass(frozen=True, slots=True)
class Row:
    """One number of the results: a policy's pass@k with its 95 % interval, clustered by problem.

    ``k`` is a budget, ``mean`` for the average over the budgets, or ``area`` for that over log2 of the budget: the area
    under the curve over its width, where there are several budgets. ``chosen``: the strategy that validation chose.
    ``member``, ``style``, ``level`` or ``subject``: the group of problems, where the row is that of a group.
    """

    policy: str
    kind: str
    k: int | str
    estimate: float
    low: float
    high: float
    n_problems: int
    n_samples: int
    chosen: str | None = None
    member: str | None = None
    style: str | None = None
    level: str | None = None
    subject: str | None = None


@dataclass(frozen=True, slots=True)
class Difference:
    """Policy − baseline at k over the same problems, with its 95 % interval.

    ``p`` belongs to the paired t test, ``p_holm`` to the same after Holm's correction over all policies and budgets of
    this baseline, and ``p_sign`` to the exact sign test.
    """

    policy: str
    baseline: str
    baseline_strategy: str | None
    k: int | str
    estimate: float
    low: float
    high: float
    n_problems: int
    p: float
    p_holm: float
    p_sign: float


@dataclass(frozen=True, slots=True)
class Cost:
    """What k samples of a policy cost.

    Attributes:
        tokens: of k samples of a problem, on average.
        tokens_per_solved: all tokens over the problems solved, with its 95 % interval; None: without end.
        equal_to: how many samples of the best single strategy solve as many problems, with its 95 % interval; None:
            more than were sampled. Only of adapters and baselines.
    """

    policy: str
    k: int
    tokens: float
    tokens_per_solved: tuple[float | None, float | None, float | None]
    equal_to: tuple[float | None, float | None, float | None] | None


@dataclass(frozen=True, slots=True)
class Within:
    """Accuracy of single samples within t tokens, for a grid of t, and the area under that curve over log2 t."""

    policy: str
    tokens: tuple[int, ...]
    accuracy: tuple[float, ...]
    area: tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Majority:
    """maj@k (self-consistency): the answer with most votes among k samples is right, ties split fairly.

    BEST and the best single strategy are chosen anew on validation, by maj@k.
    """

    rows: list[Row]
    differences: list[Difference]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything that evaluation finds out; lists of plain values. ``majority`` is None where answers cannot vote."""

    rows: list[Row]
    by_member: list[Row]
    by_style: list[Row]
    by_level: list[Row]
    by_subject: list[Row]
    differences: list[Difference]
    majority: Majority | None
    costs: list[Cost]
    within: list[Within]

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def groups_of(problems: Sequence[Problem], styles: Sequence[str]) -> Groups:
    """By data set, by prompt style (:attr:`rheostat.types.Prompt.style`), and by level and subject where problems have
    these; a property with one value is left out, but for the data set."""
    properties: dict[str, list[str | None]] = {
        "member": [problem.member for problem in problems],
        "style": list(styles),
        "level": [_text(problem.metadata.get("level")) for problem in problems],
        "subject": [_text(problem.metadata.get("type")) for problem in problems],
    }
    found: dict[str, dict[str, NDArray[np.bool_]]] = {}
    for name, values in properties.items():
        distinct = [value for value in dict.fromkeys(values) if value is not None]
        if name == "member" or len(distinct) > 1:
            found[name] = {value: np.array([own == value for own in values]) for value in distinct}
    return found


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _named(space: ActionSpace) -> str:
    return ", ".join(map(str, space))


def compare(
    validation: Sweep,
    measured: Measured,
    policies: Mapping[str, Judged],
    mixed: Mapping[str, Judged],
    groups: Groups,
) -> Comparison:
    """Everything about ``policies`` (adapters and baselines) and every static strategy on the test problems.

    Args:
        validation: the same strategies on validation problems; chooses BEST at each k, and the best single strategy by
            its mean over the budgets.
        measured: the strategies on the test problems.
        policies: by the name that results show.
        mixed: the uniform mixtures, by name likewise.
        groups: of the test problems.

    Raises:
        ConfigError: ``validation`` measured other strategies, or in another order.
    """
    budgets, tests = list(measured.solved), measured.test
    if validation.space != tests.space:
        raise ConfigError(
            f"evaluation: validation measured [{_named(validation.space)}] and test [{_named(tests.space)}]; "
            "measure the same strategies, in the same order, on both"
        )
    oracle = {k: oracle_at_k(np.nan_to_num(tests.rewards_PAS), k) for k in budgets}
    choice = _Choice.of({k: validation.pass_at(k) for k in budgets}, tests.space)
    table = _Table.of(measured, policies, mixed, choice, lambda judged: judged.solved, oracle)

    def by(group: str) -> list[Row]:
        parts = groups.get(group, {}).items()
        fewest = 1 if group == "member" else 2  # every data set has its row
        return [row for name, own_P in parts if own_P.sum() >= fewest for row in table.rows(own_P, **{group: name})]

    most = int(tests.rewards_PAS.shape[2])
    plain_PK = np.stack([tests.pass_at(k)[:, choice.single] for k in range(1, most + 1)], axis=1)
    return Comparison(
        rows=table.rows(),
        **{f"by_{group}": by(group) for group in ("member", "style", "level", "subject")},
        differences=table.differences(),
        majority=_majority(validation, measured, policies, mixed),
        costs=[
            _cost(name, k, judged, plain_PK if name in policies else None)
            for name, judged in table.judged.items()
            if judged.tokens is not None
            for k in budgets
        ],
        within=[
            _within(name, measured.grid, judged.within_PT)
            for name, judged in table.judged.items()
            if judged.within_PT is not None and len(measured.grid) > 1
        ],
    )


def _majority(
    validation: Sweep, measured: Measured, policies: Mapping[str, Judged], mixed: Mapping[str, Judged]
) -> Majority | None:
    """The same under maj@k; None where completions have no answers that could vote."""
    if not measured.majority or not has_answers(validation.label_PAS):
        return None
    choice = _Choice.of({k: validation.maj_at(k) for k in measured.majority}, measured.test.space)
    table = _Table.of(measured, policies, mixed, choice, lambda judged: judged.majority)
    return Majority(table.rows(), table.differences())


@dataclass(frozen=True, slots=True)
class _Choice:
    """The strategies that validation chose: for each budget, and by the mean over the budgets."""

    names: list[str]
    best: Mapping[int, int]
    single: int

    @classmethod
    def of(cls, validation: Mapping[int, Float[NDArray[np.float64], "P A"]], space: ActionSpace) -> "_Choice":
        mean_A = {k: value_PA.mean(0) for k, value_PA in validation.items()}
        best = {k: int(own_A.argmax()) for k, own_A in mean_A.items()}
        return cls([str(strategy) for strategy in space], best, int(np.mean([*mean_A.values()], axis=0).argmax()))

    def told(self, policy: str, k: int | str) -> str | None:
        """The strategy behind a row of BEST or of the best single strategy."""
        if policy == SINGLE:
            return self.names[self.single]
        return self.names[self.best[k]] if policy == BEST and isinstance(k, int) else None


@dataclass(frozen=True, slots=True)
class _Table:
    """Everything that is compared under one metric, in the order of the results; ``values`` with mean and area."""

    judged: Mapping[str, Judged]
    values: Mapping[str, Mapping[int | str, PerProblem]]
    policies: Sequence[str]
    choice: _Choice

    @classmethod
    def of(
        cls,
        measured: Measured,
        policies: Mapping[str, Judged],
        mixed: Mapping[str, Judged],
        choice: _Choice,
        metric: Callable[[Judged], Mapping[int, PerProblem]],
        oracle: Mapping[int, PerProblem] | None = None,
    ) -> "_Table":
        budgets = list(measured.solved)
        plain = measured.static("best", dict.fromkeys(budgets, choice.single))
        judged = {**policies, BEST: measured.static("best", choice.best), SINGLE: plain, **mixed}
        if oracle is not None:
            judged[ORACLE] = replace(plain, kind="oracle", solved=oracle, tokens=None, within_PT=None)
        for a, name in enumerate(choice.names):
            judged[name] = measured.static("static", dict.fromkeys(budgets, a))
        return cls(judged, {name: _summed_up(metric(own)) for name, own in judged.items()}, list(policies), choice)

    def rows(self, own_P: Any = slice(None), **group: Any) -> list[Row]:
        """Of the problems ``own_P``, which are those of ``group``."""
        return [
            replace(
                Row(name, judged.kind, k, *_numbers(share), share.n, judged.samples, self.choice.told(name, k)),
                **group,
            )
            for name, judged in self.judged.items()
            for k, value_P in self.values[name].items()
            for share in [_interval(k, value_P[own_P])]
        ]

    def differences(self) -> list[Difference]:
        """Each policy against each rival; p-values are corrected over all that are compared with the same rival."""
        differences: list[Difference] = []
        for rival in _rivals(self.judged):
            found = [
                _difference(name, rival, self.choice.told(rival, k), k, self.values[name][k], self.values[rival][k])
                for name in self.policies
                if name != rival and (self.judged[name].kind == "adapter" or rival not in self.policies)
                for k in self.values[name]
                if k != AREA
            ]
            if found:
                corrected_N = holm([item.p for item in found])
                differences += [replace(item, p_holm=_p(p)) for item, p in zip(found, corrected_N, strict=True)]
        return differences


def _summed_up(solved: Mapping[int, PerProblem]) -> dict[int | str, PerProblem]:
    """With the mean over the budgets, and over their logarithms."""
    values_PK, budgets = np.stack(list(solved.values()), axis=1), list(solved)
    found: dict[int | str, PerProblem] = dict(solved.items())
    found["mean"] = values_PK.mean(1)
    return found | ({AREA: area_under_curve(values_PK, budgets)} if len(budgets) > 1 else {})


def _interval(k: int | str, value_P: PerProblem) -> Interval:
    """The interval of a share; of an area the bootstrap's, as long as problems differ and resamples with them."""
    if k == AREA and np.ptp(value_P) > 0:
        return bootstrap_interval(lambda mean: mean, value_P)
    return proportion_interval(value_P)


def _rivals(table: Mapping[str, Judged]) -> list[str]:
    """What policies are compared with: the static choices, every baseline, and the first adapter."""
    mixed, baselines, adapters = (
        [name for name, judged in table.items() if judged.kind == kind] for kind in ("mixed", "baseline", "adapter")
    )
    return [SINGLE, BEST, *mixed, *baselines, *adapters[:1]]


def _difference(
    policy: str, rival: str, strategy: str | None, k: int | str, ours_P: PerProblem, theirs_P: PerProblem
) -> Difference:
    interval, p = paired_difference(ours_P, theirs_P), paired_p_value(ours_P, theirs_P)
    numbers = _numbers(interval)
    return Difference(policy, rival, strategy, k, *numbers, interval.n, _p(p), 1.0, _p(sign_test(ours_P, theirs_P)))


def _cost(name: str, k: int, judged: Judged, plain_PK: NDArray[np.float64] | None) -> Cost:
    assert judged.tokens is not None, "a policy without tokens has no cost"
    solved_P, tokens_P = judged.solved[k], judged.tokens[k]
    equal = None if plain_PK is None else _open(equivalent_samples(plain_PK, solved_P))
    return Cost(name, k, round(float(tokens_P.mean()), 3), _open(tokens_per_solved(tokens_P, solved_P)), equal)


def _within(name: str, grid: tuple[int, ...], within_PT: NDArray[np.float64]) -> Within:
    area = proportion_interval(area_under_curve(within_PT, grid))
    return Within(name, grid, tuple(round(float(value), 6) for value in within_PT.mean(0)), _numbers(area))


def _numbers(interval: Interval) -> tuple[float, float, float]:
    """Estimate, low, high, rounded to what can matter: a millionth."""
    return round(interval.estimate, 6), round(interval.low, 6), round(interval.high, 6)


def _open(interval: Interval) -> tuple[float | None, float | None, float | None]:
    """The same with None where there is no end."""
    low, middle, high = (
        round(value, 3) if math.isfinite(value) else None for value in (interval.low, interval.estimate, interval.high)
    )
    return middle, low, high


def _p(value: float) -> float:
    """A p-value to three digits."""
    return float(f"{value:.3g}")
