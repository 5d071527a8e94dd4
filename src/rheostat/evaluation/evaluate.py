"""Policies against static strategies on the same problems and the same rollouts.

At the sequence level a strategy is applied to all B samples of a prompt, so a policy's pass@k is
Σ_a π(a|x, B=k)·pass@k(x, a), with the unbiased pass@k of each strategy over all its samples; MIXED is the same with a
uniform π. What is chosen (BEST, the best single strategy) is chosen on validation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from rheostat.decoding.policy import SequencePolicy
from rheostat.decoding.strategy import ActionSpace
from rheostat.errors import ConfigError
from rheostat.rollouts.sweep import PolicySweep, Sweep
from rheostat.statistics import mean_interval, paired_difference

Values = dict[int | str, Float[NDArray[np.float64], " P"]]
"""A policy's value on each problem, at each budget k and for their average ("mean")."""


@dataclass(frozen=True, slots=True)
class Row:
    """One number of the results: a policy's pass@k with its 95 % interval, clustered by problem."""

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


@dataclass(frozen=True, slots=True)
class Difference:
    """Policy − baseline at k over the same problems, with its 95 % interval."""

    policy: str
    baseline: str
    baseline_strategy: str | None
    k: int | str
    estimate: float
    low: float
    high: float
    n_problems: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything that evaluation finds out; lists of plain values."""

    rows: list[Row]
    by_member: list[Row]
    by_style: list[Row]
    differences: list[Difference]
    choices: list[dict[str, object]]

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def _with_mean(values: Values) -> Values:
    return values | {"mean": np.mean([values[k] for k in values], axis=0)}


def compare(
    validation: Sweep,
    test: Sweep,
    adapters: Mapping[str, SequencePolicy],
    embedding_PH: Float[Tensor, "P H"],
    budgets: Sequence[int],
    commit: bool,
) -> Comparison:
    """Evaluate sequence-level ``adapters`` and every static strategy on the test problems.

    Args:
        validation: chooses BEST at each k, and the best single strategy by its mean over the budgets.
        test: judges; at least 2 · max(budgets) samples per cell make its pass@k steady.
        adapters: policies by the name that results show.
        embedding_PH: of the test problems.
        budgets: the values of k.
        commit: adapters take their most probable action, instead of drawing one.

    Raises:
        ConfigError: an adapter chooses from strategies that were not swept.
    """
    space = test.space
    static = {k: test.pass_at(k) for k in budgets}
    values: dict[str, Values] = {}
    choices: list[dict[str, object]] = []
    for name, policy in adapters.items():
        own_A = _positions(name, policy.space, space)
        own: Values = {}
        for k in budgets:
            pi_PA = policy.probabilities(embedding_PH, torch.full((len(test.problems),), k)).double().numpy()
            if commit:
                pi_PA = np.eye(len(own_A))[pi_PA.argmax(1)]
            pi_PA = pi_PA @ np.eye(len(space))[own_A]  # over all that were measured
            own[k] = (pi_PA * static[k]).sum(1)
            if name == next(iter(adapters)):
                choices += [
                    {"member": m, "budget": k, "probability": [round(float(p), 6) for p in pi_PA[own_P].mean(0)]}
                    for m, own_P in _members(test).items()
                ]
        values[name] = own
    samples = dict.fromkeys(values, int(test.rewards_PAS.shape[2]))
    mixed: Values = {k: static[k].mean(1) for k in budgets}
    return _compare(validation, test, values, samples, mixed, budgets, choices, {})


def compare_token(
    validation: Sweep,
    test: Sweep,
    adapters: Mapping[str, Mapping[int, PolicySweep]],
    mixed: PolicySweep,
    budgets: Sequence[int],
    cot_P: Bool[NDArray[np.bool_], " P"],
) -> Comparison:
    """Evaluate token-level adapters and every static strategy on the test problems.

    A token policy draws anew at every token, so its pass@k is the unbiased estimate over samples drawn under B = k.

    Args:
        validation: as for :func:`compare`.
        test: the static strategies on the test problems.
        adapters: by the name that results show, for each k the samples that were drawn under B = k (an adapter that
            does not see B has the same for all).
        mixed: samples of the uniform mixture, drawn anew at every token.
        budgets: the values of k.
        cot_P: which test problems were asked with a chain of thought.
    """
    values: dict[str, Values] = {name: {k: sweeps[k].pass_at(k) for k in budgets} for name, sweeps in adapters.items()}
    samples = {name: min(sweep.rewards_PS.shape[1] for sweep in sweeps.values()) for name, sweeps in adapters.items()}
    styles = {"cot": cot_P, "direct": ~cot_P} if cot_P.any() and not cot_P.all() else {}
    return _compare(validation, test, values, samples, {k: mixed.pass_at(k) for k in budgets}, budgets, [], styles)


def _positions(name: str, own: ActionSpace, measured: ActionSpace) -> list[int]:
    """Where an adapter's strategies stand among those that were measured."""
    unknown = [strategy for strategy in own if strategy not in measured.strategies]
    if unknown or own.order != measured.order:
        what = f"strategies that were not measured, like {unknown[0]}" if unknown else f"the order {own.order}"
        raise ConfigError(f"{name}: it has {what}; measure them as well, or evaluate it on its own")
    return [measured.strategies.index(strategy) for strategy in own]


def _members(sweep: Sweep) -> dict[str, NDArray[np.bool_]]:
    """Which problems belong to each member."""
    members = [problem.member for problem in sweep.problems]
    return {member: np.array([own == member for own in members]) for member in dict.fromkeys(members)}


def _compare(
    validation: Sweep,
    test: Sweep,
    adapters: Mapping[str, Values],
    samples: Mapping[str, int],
    mixed: Values,
    budgets: Sequence[int],
    choices: list[dict[str, object]],
    styles: Mapping[str, NDArray[np.bool_]],
) -> Comparison:
    """Rows and paired differences of adapters whose values are known."""
    space = test.space
    static = {k: test.pass_at(k) for k in budgets}
    on_validation = {k: validation.pass_at(k).mean(0) for k in budgets}
    single = int(np.mean([on_validation[k] for k in budgets], axis=0).argmax())
    chosen = {k: int(on_validation[k].argmax()) for k in budgets}
    names = [str(strategy) for strategy in space]

    values: dict[tuple[str, str], Values] = {(name, "adapter"): _with_mean(own) for name, own in adapters.items()}
    values["BEST", "best"] = _with_mean({k: static[k][:, chosen[k]] for k in budgets})
    values["best single strategy", "best"] = _with_mean({k: static[k][:, single] for k in budgets})
    values["MIXED", "mixed"] = _with_mean(mixed)
    for index, name in enumerate(names):
        values[name, "static"] = _with_mean({k: static[k][:, index] for k in budgets})

    def choice_of(policy: str, k: int | str) -> str | None:
        if policy == "best single strategy":
            return names[single]
        return names[chosen[k]] if policy == "BEST" and isinstance(k, int) else None

    def rows(own_P: Any, member: str | None = None, style: str | None = None) -> list[Row]:
        found = []
        for (name, kind), own in values.items():
            for k in own:
                interval = mean_interval(own[k][own_P], bounds=(0.0, 1.0))
                count = samples.get(name, test.rewards_PAS.shape[2])
                found.append(
                    Row(name, kind, k, *_numbers(interval), interval.n, count, choice_of(name, k), member, style)
                )
        return found

    ks: list[int | str] = [*budgets, "mean"]
    first = next(iter(adapters), "")
    differences = [
        Difference(name, baseline, choice_of(baseline, k), k, *_numbers(interval), interval.n)
        for name in adapters
        for baseline, kind in (
            ("best single strategy", "best"),
            ("BEST", "best"),
            ("MIXED", "mixed"),
            *([(first, "adapter")] if name != first else []),
        )
        for k in ks
        for interval in [paired_difference(values[name, "adapter"][k], values[baseline, kind][k])]
    ]
    return Comparison(
        rows=rows(slice(None)),
        by_member=[row for member, own_P in _members(test).items() for row in rows(own_P, member=member)],
        by_style=[row for style, own_P in styles.items() if own_P.sum() > 1 for row in rows(own_P, style=style)],
        differences=differences,
        choices=choices,
    )


def _numbers(interval: object) -> tuple[float, float, float]:
    """Estimate, low, high, rounded to what can matter: a millionth."""
    return tuple(round(float(getattr(interval, name)), 6) for name in ("estimate", "low", "high"))  # type: ignore[return-value]
