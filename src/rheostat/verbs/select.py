"""`rheostat select`: a compact action space from a sweep over candidate strategies (paper, section 2.4, Appendix C)."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rheostat.config import SelectConfig
from rheostat.console import Console
from rheostat.decoding.selection import (
    BestOfN,
    Candidates,
    Selection,
    best_of_n,
    greedy_selection,
    selection_stability,
    top_selection,
)
from rheostat.decoding.strategy import ActionSpace, Strategy
from rheostat.engines.base import Engine
from rheostat.errors import ConfigError
from rheostat.files import atomic_write
from rheostat.rollouts.sweep import Sweep, sweep
from rheostat.seeding import derive_seed
from rheostat.statistics import Interval
from rheostat.tasks.base import Split
from rheostat.types import Problem
from rheostat.verbs.run import Run, open_run


@dataclass(frozen=True, slots=True)
class Round:
    """One sweep of a search: the first ``problems`` of a fixed order, and how many strategies go on from it."""

    strategies: int
    problems: int
    samples: int


def rounds_of(strategies: int, problems: int, samples: int, actions: int, most: int | None) -> list[Round]:
    """The rounds of a search that asks for at most ``most`` rollouts; one where these suffice, the full sweep.

    Successive halving (Jamieson and Talwalkar, 2016): each round has half of the strategies and twice the rollouts of
    each, more problems first and then more samples. The last one has all problems and samples of those that are left,
    at least twice the ``actions`` to be chosen.

    Raises:
        ConfigError: even the longest search asks for more; says how many it takes.
    """
    plan = [Round(strategies, problems, samples)]
    while most is not None and rollouts_of(plan) > most:
        halvings = len(plan)
        left = strategies >> halvings
        cells = (problems * samples) >> halvings
        if left < 2 * actions or cells < 2 * min(problems, 8):
            raise ConfigError(
                f"max_rollouts: {most:,} are too few; the shortest search of {strategies} strategies on {problems} "
                f"problems with {samples} samples takes {rollouts_of(plan):,}: allow these, or ask for fewer"
            )
        plan = []
        for number in range(halvings + 1):
            share = (problems * samples) >> (halvings - number)
            asked = max(2, share // problems)
            plan.append(Round(strategies >> number, min(problems, share // asked), min(samples, asked)))
    return plan


def rollouts_of(plan: Sequence[Round]) -> int:
    """How many rollouts a search asks for, those that a round finds from the one before counted once."""
    total, before = 0, 0
    for item in plan:
        total += item.strategies * (item.problems * item.samples - before)
        before = item.problems * item.samples
    return total


def select(config: SelectConfig, out: Path, console: Console, engine: Engine | None = None) -> dict[str, Any]:
    """Sweep the candidates on validation problems, choose, and write ``action_space.toml`` and ``results.json``."""
    with open_run(config, out, console, engine) as run:
        problems = _shuffled(run.splits[Split.VALIDATION], config.seed)
        space, most = config.space, config.max_rollouts
        if config.max_time is not None:
            rate = _measured_rate(run, problems, space)
            allowed = int(rate * config.max_time * 60)
            most = min(most, allowed) if most is not None else allowed
            console.say(f"measured {rate:.0f} rollouts/s: {config.max_time:g} minutes allow {allowed:,}")
        plan = rounds_of(len(space), len(problems), config.samples, config.actions, most)
        shown = (f"{r.strategies} strategies × {r.problems} problems × {r.samples} samples" for r in plan)
        full = rollouts_of(_full(config, problems))
        console.say(f"plan: {', then '.join(shown)}: {rollouts_of(plan):,} rollouts (full sweep: {full:,})")
        last = _search(run, config, problems, plan)
        results = _results(run, config, last, plan)
        atomic_write(run.out / "action_space.toml", _toml(results))
        atomic_write(run.out / "results.json", json.dumps(results, indent=1))
        return results


def _full(config: SelectConfig, problems: Sequence[Problem]) -> list[Round]:
    return [Round(len(config.space), len(problems), config.samples)]


def _shuffled(problems: Sequence[Problem], seed: int) -> list[Problem]:
    """A fixed order in which every first part is a sample of all data sets."""
    return sorted(problems, key=lambda problem: derive_seed("selection order", seed, problem.id))


def _measured_rate(run: Run, problems: Sequence[Problem], space: ActionSpace) -> float:
    """Rollouts per second, from a first batch that the search needs anyway."""
    start, before = time.perf_counter(), len(run.store)
    _sweep(run, problems[: max(2, 768 // (2 * len(space)))], space, 2)
    seconds, made = time.perf_counter() - start, len(run.store) - before
    if not made:
        raise ConfigError("max_time: what would measure the rate is stored already; give max_rollouts to go on")
    return made / seconds


def _sweep(run: Run, problems: Sequence[Problem], space: ActionSpace, samples: int) -> Sweep:
    # in the task's order, so that prompts of one data set follow each other and share their batches
    members = list(dict.fromkeys(problem.member for problem in run.splits[Split.VALIDATION]))
    asked = sorted(problems, key=lambda problem: members.index(problem.member))
    total = len(asked) * len(space) * samples
    with run.phase("rollouts"), run.console.progress(f"{len(space)} strategies", total, "tokens") as bar:
        return sweep(run.engine, run.task, asked, space, samples, run.config.seed, run.store, bar)


def _search(run: Run, config: SelectConfig, problems: Sequence[Problem], plan: Sequence[Round]) -> Sweep:
    alive = config.space.strategies
    for number, item in enumerate(plan):
        done = _sweep(run, problems[: item.problems], ActionSpace(alive, config.order), item.samples)
        if number == len(plan) - 1:
            run.sweeps.append(done)
            return done
        candidates = Candidates.of(done.rewards_PAS, alive)
        keep = worth_keeping(candidates, config.actions, plan[number + 1].strategies)
        alive = tuple(alive[index] for index in sorted(keep))
    raise AssertionError("a plan has a last round")


def worth_keeping(candidates: Candidates, actions: int, count: int) -> list[int]:
    """The ``count`` strategies that may still belong to the best action space.

    These are the greedy choice of today and those with the highest upper bound on what they could add to it: the mean
    of max(0, value − coverage) over problems, which noise can only raise, and twice its standard error. Never their
    own mean: a strategy that solves few problems, but other ones, is what an action space is for.
    """
    chosen = greedy_selection(candidates, min(actions, len(candidates.strategies))).chosen
    value_AP = np.nan_to_num(candidates.choosing_AP)
    covered_P = value_AP[list(chosen)].max(0)
    gain_AP = np.maximum(value_AP - covered_P, 0)
    bound_A = gain_AP.mean(1) + 2 * gain_AP.std(1) / np.sqrt(gain_AP.shape[1])
    bound_A[list(chosen)] = np.inf
    order = np.lexsort((-value_AP.mean(1), -bound_A))  # equal bounds, as of strategies that add nothing: by their mean
    return [int(index) for index in order[:count]]


def _results(run: Run, config: SelectConfig, done: Sweep, plan: Sequence[Round]) -> dict[str, Any]:
    candidates = Candidates.of(done.rewards_PAS, done.space.strategies, config.parallel_budget, config.seed)
    chosen = greedy_selection(candidates, config.actions)
    top = top_selection(candidates, config.actions)
    half = derive_seed("halves", config.seed)
    order = np.random.default_rng(half % 2**63).permutation(len(done.problems))
    first, second = order[: len(order) // 2].tolist(), order[len(order) // 2 :].tolist()
    curve = best_of_n(candidates, config.actions, first, second)
    share_A = selection_stability(candidates, config.actions, seed=config.seed)
    facts = run.facts() | {"strategies": [str(strategy) for strategy in chosen.strategies]}
    return {
        "kind": "selection",
        **facts,
        "objective": "mean reward" if config.parallel_budget is None else f"pass@{config.parallel_budget}",
        "problems": len(done.problems),
        "samples": config.samples,
        "plan": [[item.strategies, item.problems, item.samples] for item in plan],
        "rollouts_asked": rollouts_of(plan),
        "full_sweep": rollouts_of(_full(config, done.problems)),
        "greedy": _described(chosen),
        "top": _described(top),
        "held_out": _curve(curve),
        "chosen_in_resamples": {
            str(strategy): round(float(share), 4)
            for strategy, share in zip(candidates.strategies, share_A, strict=True)
            if share > 0
        },
        "heat": heat(done),
        "config": config.model_dump(mode="json"),
        "wall_seconds": dict(run.wall_seconds),
    }


def _described(selection: Selection) -> dict[str, object]:
    rounded = None if selection.held_out is None else [round(value, 6) for value in selection.held_out]
    return {
        "strategies": [str(strategy) for strategy in selection.strategies],
        "coverage": [round(value, 6) for value in selection.coverage],
        "held_out": rounded,
    }


def _curve(curve: BestOfN) -> dict[str, list[list[float]]]:
    def numbers(intervals: Sequence[Interval]) -> list[list[float]]:
        return [[round(i.estimate, 6), round(i.low, 6), round(i.high, 6)] for i in intervals]

    return {name: numbers(getattr(curve, name)) for name in ("greedy", "top", "difference")}


def heat(done: Sweep) -> list[dict[str, object]]:
    """Mean reward of each strategy that the last round held, for a map of temperature against truncation."""
    mean_A: NDArray[np.float64] = np.nanmean(done.rewards_PAS, axis=(0, 2), dtype=np.float64)
    return [
        {"temperature": s.temperature, "truncation": _truncation(s), "reward": round(float(mean), 6)}
        for s, mean in zip(done.space, mean_A, strict=True)
    ]


def _truncation(strategy: Strategy) -> str:
    return str(strategy).partition(",")[2]


def _toml(results: Mapping[str, Any]) -> str:
    """The action space as ``--strategies`` reads it, and where it comes from."""
    greedy, text = results["greedy"], json.dumps  # a JSON string is a TOML string
    return "\n".join(
        [
            "# Written by `rheostat select`; give it to `rheostat train` as --strategies action_space.toml.",
            f"order = {text(results['order'])}",
            f"strategies = {text(greedy['strategies'])}",
            "",
            "[provenance]",
            f"model = {text(results['model']['model'])}",
            f"fingerprint = {text(results['model']['fingerprint'])}",
            f"task = {text(results['task'])}",
            'split = "validation"',
            f"seed = {results['seeds']['run']}",
            f"problems = {results['problems']}",
            f"samples = {results['samples']}",
            f"objective = {text(results['objective'])}",
            f"rollouts = {results['rollouts_asked']}",
            f"coverage = {text(greedy['coverage'])}",
            "",
        ]
    )
