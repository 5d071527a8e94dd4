"""Judging: adapters of both levels and static strategies on the same test problems; what ``results.json`` says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rheostat.adapters.autodeco import AutoDeco, AutoDecoding
from rheostat.adapters.description import kind_of
from rheostat.adapters.files import Adapter
from rheostat.adapters.sequence import SequenceAdapter
from rheostat.adapters.token import AdaptiveDecoding, TokenAdapter
from rheostat.baselines.uniform import UniformMixture
from rheostat.config import EvaluateConfig
from rheostat.console import Console
from rheostat.decoding.policy import NamedPolicy
from rheostat.decoding.strategy import ActionSpace
from rheostat.engines.base import Engine
from rheostat.errors import AdapterError
from rheostat.evaluation.behaviour import behaviour
from rheostat.evaluation.evaluate import BEST, MIXED, MIXED_PER_TOKEN, Comparison, Groups, compare, groups_of
from rheostat.evaluation.judged import Judged, Measured, sequence_choices, token_grid, token_judged
from rheostat.rollouts.collect import policy_device
from rheostat.rollouts.sweep import PolicySweep, Sweep
from rheostat.statistics import mean_interval
from rheostat.tasks.base import Split
from rheostat.types import Problem
from rheostat.verbs.baselines import Tuned, tune
from rheostat.verbs.run import Run, open_run, require_own_results

_NOTHING = Tuned()


@dataclass(frozen=True)
class Rivals:
    """Who is judged, by the names that results show.

    Attributes:
        sequence: adapters that choose once per prompt.
        token: policies that choose at every token, learned or not.
        commit: sequence-level adapters take their most probable action instead of drawing one.
    """

    sequence: Mapping[str, SequenceAdapter] = field(default_factory=dict)
    token: Mapping[str, NamedPolicy] = field(default_factory=dict)
    commit: bool = True

    @classmethod
    def of(cls, adapters: Mapping[str, Adapter], device: str, commit: bool | None = None) -> "Rivals":
        """Loaded adapters of both levels; ``commit`` None: at the sequence level only.

        Raises:
            AdapterError: their action spaces have different orders of transforms.
        """
        orders = {name: item.space.order for name, item in adapters.items() if not isinstance(item, AutoDeco)}
        for name, order in orders.items():
            first = next(iter(orders))
            if order != orders[first]:
                raise AdapterError(
                    f"{name}: its order of transforms is {order}, that of {first} {orders[first]}; evaluate it alone"
                )
        return cls(
            {name: item for name, item in adapters.items() if isinstance(item, SequenceAdapter)},
            {
                name: AutoDecoding(item.to(device))
                if isinstance(item, AutoDeco)
                else AdaptiveDecoding(item.to(device), bool(commit))
                for name, item in adapters.items()
                if not isinstance(item, SequenceAdapter)
            },
            commit is None or commit,
        )

    @property
    def _token_adapters(self) -> list[TokenAdapter]:
        return [policy.adapter for policy in self.token.values() if isinstance(policy, AdaptiveDecoding)]

    @property
    def _adapters(self) -> list[SequenceAdapter | TokenAdapter]:
        return [*self.sequence.values(), *self._token_adapters]

    @property
    def see_budgets(self) -> list[bool]:
        """Of each token-level policy, whether it sees the parallel budget, and is sampled under each."""
        return [
            isinstance(item, AdaptiveDecoding) and bool(item.adapter.config.budgets) for item in self.token.values()
        ]

    @property
    def described(self) -> dict[str, dict[str, object]]:
        """What each learned policy is (``kind``: sequence, token, both or autodeco), reads, and chooses from."""
        found: dict[str, dict[str, object]] = {}
        for name, policy in (*self.sequence.items(), *self.token.items()):
            if isinstance(policy, AutoDecoding):
                found[name] = {"kind": "autodeco"}
            elif isinstance(policy, SequenceAdapter | AdaptiveDecoding):
                adapter = policy.adapter if isinstance(policy, AdaptiveDecoding) else policy
                kind = "both" if getattr(adapter.config, "start", None) else kind_of(adapter.config)
                reads = {"features": str(adapter.config.features), "with_budget": adapter.config.with_budget}
                found[name] = {"kind": kind, **reads, "actions": len(adapter.space)}
        return found

    @property
    def space(self) -> ActionSpace | None:
        """All strategies that the adapters choose from, in their order; None without adapters."""
        spaces = [adapter.space for adapter in self._adapters]
        if not spaces:
            return None
        return ActionSpace(tuple(dict.fromkeys(strategy for space in spaces for strategy in space)), spaces[0].order)

    def mixed(self, asked: ActionSpace) -> dict[str, ActionSpace]:
        """What MIXED draws from: the action space of the first adapter, at the token level of the first one there.

        A rival more, or another strategy to measure, leaves it as it is. Without an adapter that has actions:
        ``asked``, the strategies that were asked for.
        """
        spaces = [adapter.space for adapter in self._adapters]
        at_tokens = [adapter.space for adapter in self._token_adapters] or spaces
        found = {MIXED: next(iter(spaces), asked)}
        return found | ({MIXED_PER_TOKEN: next(iter(at_tokens), asked)} if self.token else {})

    @property
    def budgets(self) -> tuple[int, ...] | None:
        """The parallel budgets that the adapters were trained for; None where none was."""
        return tuple(sorted({k for adapter in self._adapters for k in adapter.config.budgets})) or None


def evaluate(
    config: EvaluateConfig, out: Path, console: Console, rivals: Rivals, engine: Engine | None = None
) -> dict[str, Any]:
    """`rheostat evaluate`: sample what the store lacks, compare, write results and report."""
    require_own_results(out, "sequence")
    with open_run(config, out, console, engine, splits=(Split.VALIDATION, Split.TEST)) as run, run.under_way():
        budgets = config.judged_budgets
        tuned = tune(run, config.baselines, budgets, config.samples.validation)
        more = (*tuned.strategies.values(), *tuned.majority.values())
        space = ActionSpace(tuple(dict.fromkeys((*config.space, *more))), config.order)
        on_validation = run.sweep(Split.VALIDATION, space, config.samples.validation)
        on_test = run.sweep(Split.TEST, space, config.samples.test)
        results = judge(run, budgets, on_validation, on_test, rivals, tuned)
        return run.write(results | {"config": config.model_dump(mode="json")})


def judge(
    run: Run, budgets: Sequence[int], on_validation: Sweep, on_test: Sweep, rivals: Rivals, tuned: Tuned = _NOTHING
) -> dict[str, Any]:
    """Sample the test problems under the token policies, and compare; the content of ``results.json``."""
    problems, space = on_test.problems, on_test.space
    samples = int(on_test.rewards_PAS.shape[2])
    sweeps = _token_sweeps(run, rivals, problems, budgets, samples)
    for name, policy in tuned.policies.items():
        sweeps[name] = dict.fromkeys(budgets, run.sample(name, problems, policy, 1, samples))
    longest = max(int(on_test.length_PAS.max()), 1)
    measured = Measured.of(on_test, budgets, token_grid(longest))
    groups = groups_of(problems, [run.task.prompt(problem).style for problem in problems])
    policies, choices = _sequence_level(run, rivals, measured, budgets, groups)
    for name, own in sweeps.items():
        kind = "adapter" if isinstance(rivals.token.get(name), AdaptiveDecoding) else "baseline"
        policies[name] = token_judged(kind, own, measured.grid)
    for name, strategy in tuned.strategies.items():
        alone, voting = (
            measured.static("baseline", dict.fromkeys(budgets, space.strategies.index(own)))
            for own in (strategy, tuned.majority[name])
        )
        policies[name] = replace(alone, majority=voting.majority)
    spaces = rivals.mixed(run.config.space)
    mixed = {MIXED: measured.uniform("mixed", spaces[MIXED], budgets)}
    if MIXED_PER_TOKEN in spaces:
        uniform = UniformMixture(spaces[MIXED_PER_TOKEN], policy_device(run.engine))
        at_random = run.sample(MIXED_PER_TOKEN, problems, uniform, 1, samples)
        mixed[MIXED_PER_TOKEN] = token_judged("mixed", dict.fromkeys(budgets, at_random), measured.grid)
    with run.phase("evaluation"):
        comparison = compare(on_validation, measured, policies, mixed, groups)
    results: dict[str, Any] = {
        "kind": "token" if rivals.token else "sequence",
        **run.facts(),
        "adapters": rivals.described,
        "strategies": [str(strategy) for strategy in space],
        "budgets": list(budgets),
        **comparison.to_dict(),
        "by_group": _by_group(next(iter(rivals.described), None), comparison, measured, policies, groups),
        "mixed": {name: [str(strategy) for strategy in own] for name, own in spaces.items()},
        "choices": choices,
        "tuned": dict(tuned.chosen),
        **run.bounds(on_test, tuple(budgets)),
    }
    if sweeps:
        results["lengths"] = _lengths(run.task.max_tokens, on_test, sweeps)
    first = next((name for name, policy in rivals.token.items() if isinstance(policy, AdaptiveDecoding)), None)
    if first is not None:
        with run.phase("behaviour"):
            policy = rivals.token[first]
            assert isinstance(policy, AdaptiveDecoding)
            results |= behaviour(run.engine, run.task, problems, policy, first, run.config.seed)
    results["wall_seconds"] = dict(run.wall_seconds)
    results["milliseconds_per_token"] = _rates(run, [*rivals.sequence, *tuned.strategies, MIXED])
    return results


def _rates(run: Run, applying: Sequence[str]) -> dict[str, float]:
    """Milliseconds per token of everything sampled; who applies strategies has the rate of their sweep, in which they
    shared batches."""
    rates = run.milliseconds_per_token
    swept = rates.get(f"strategies on {Split.TEST}")
    return rates | ({} if swept is None else dict.fromkeys(applying, swept))


def _token_sweeps(
    run: Run, rivals: Rivals, problems: Sequence[Problem], budgets: Sequence[int], samples: int
) -> dict[str, dict[int, PolicySweep]]:
    """Each token policy's samples under B = k; one that does not see B draws once for all."""
    found: dict[str, dict[int, PolicySweep]] = {}
    for (name, policy), sees_budget in zip(rivals.token.items(), rivals.see_budgets, strict=True):
        if sees_budget:
            found[name] = {k: run.sample(f"{name}, B = {k}", problems, policy, k, max(2 * k, samples)) for k in budgets}
        else:
            found[name] = dict.fromkeys(budgets, run.sample(name, problems, policy, 1, samples))
    return found


def _sequence_level(
    run: Run, rivals: Rivals, measured: Measured, budgets: Sequence[int], groups: Groups
) -> tuple[dict[str, Judged], list[dict[str, object]]]:
    """Sequence-level adapters, and what the first of them chooses by data set and budget."""
    policies: dict[str, Judged] = {}
    choices: list[dict[str, object]] = []
    space: ActionSpace = measured.test.space
    problems = measured.test.problems
    read: dict[tuple[str, str], Tensor] = {}  # adapters of one kind read the same of a prompt
    for name, adapter in rivals.sequence.items():
        what = (adapter.config.features, adapter.config.pooling)
        embedding_PH = read[what] = read[what] if what in read else run.embed(problems, adapter.config)
        pi = sequence_choices(name, adapter, space, embedding_PH, budgets, rivals.commit)
        policies[name] = measured.mixture("adapter", pi)
        if not choices:
            choices = [
                {"member": member, "budget": k, "probability": [round(float(p), 6) for p in pi[k][own_P].mean(0)]}
                for k in budgets
                for member, own_P in groups["member"].items()
            ]
    return policies, choices


def _by_group(
    first: str | None, comparison: Comparison, measured: Measured, policies: Mapping[str, Judged], groups: Groups
) -> list[dict[str, object]]:
    """The first adapter minus BEST on the problems of each group of at least two, at each budget and in the mean."""
    if first is None:
        return []
    chosen = {row.k: row.chosen for row in comparison.rows if row.policy == BEST}
    names = [str(strategy) for strategy in measured.test.space]
    gaps: dict[int | str, NDArray[np.float64]] = {
        k: policies[first].solved[k] - solved_PA[:, names.index(str(chosen[k]))]
        for k, solved_PA in measured.solved.items()
    }
    gaps["mean"] = np.mean(list(gaps.values()), axis=0)
    found: list[dict[str, object]] = []
    for group, value, own_P in ((group, value, own_P) for group, own in groups.items() for value, own_P in own.items()):
        for k, gap_P in gaps.items() if own_P.sum() > 1 else ():
            gap = mean_interval(gap_P[own_P])
            ends = {name: round(getattr(gap, name), 6) for name in ("estimate", "low", "high")}
            found.append({"group": group, "value": value, "policy": first, "k": k, **ends})
    return found


def _lengths(most: int, on_test: Sweep, sweeps: Mapping[str, Mapping[int, PolicySweep]]) -> dict[str, list[int]]:
    """How many completions have 0, 1, …, ``most`` tokens, of each strategy and each policy (all budgets together)."""
    lengths: dict[str, NDArray[np.int64]] = {
        str(strategy): on_test.length_PAS[:, index].ravel() for index, strategy in enumerate(on_test.space)
    }
    for name, own in sweeps.items():
        distinct = {id(sweep): sweep for sweep in own.values()}.values()
        lengths[name] = np.concatenate([sweep.length_PS.ravel() for sweep in distinct])
    return {name: np.bincount(values, minlength=most + 1).tolist() for name, values in lengths.items()}
