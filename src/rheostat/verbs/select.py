"""`rheostat select`: a compact action space from a sweep over candidate strategies (paper, section 2.4, Appendix C)."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray

from rheostat.config import SelectConfig
from rheostat.console import Console
from rheostat.decoding.selection import (
    BestOfN,
    Candidates,
    Selection,
    best_of_n,
    coverage,
    greedy_selection,
    selection_stability,
    top_selection,
)
from rheostat.decoding.strategy import ActionSpace
from rheostat.engines.base import Engine
from rheostat.errors import ConfigError, StoreError
from rheostat.files import atomic_write
from rheostat.reports.page import write_report
from rheostat.rollouts.shards import DamagedShardError, read_table
from rheostat.rollouts.sweep import Sweep, sweep
from rheostat.seeding import derive_seed
from rheostat.statistics import Interval
from rheostat.tasks.base import Split
from rheostat.types import Problem
from rheostat.verbs.run import Run, open_run, require_own_results


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


@dataclass(slots=True, eq=False)
class Searched:
    """What all rounds of a search sampled, each rollout once.

    Every round asks for all that the rounds before sampled of its strategies, and more. What stands here of a strategy
    is therefore what its last round held.

    Attributes:
        problems: the P problems, in the order in which rounds take them.
        space: the A candidates.
        samples: S, the largest number of samples of a round.
        rewards_PAS: 1 right, 0 wrong, NaN without a verdict or where nothing was sampled.
        length_PAS: tokens written; -1 where nothing was sampled.
        truncated_PAS: ended at the token budget.
        round_A: the last round that each strategy was in, from 1.
    """

    problems: Sequence[Problem]
    space: ActionSpace
    samples: int
    rewards_PAS: Float[NDArray[np.float32], "P A S"] = field(init=False)
    length_PAS: Int[NDArray[np.int64], "P A S"] = field(init=False)
    truncated_PAS: Bool[NDArray[np.bool_], "P A S"] = field(init=False)
    round_A: Int[NDArray[np.int64], " A"] = field(init=False)

    def __post_init__(self) -> None:
        shape = (len(self.problems), len(self.space), self.samples)
        self.rewards_PAS = np.full(shape, np.nan, dtype=np.float32)
        self.length_PAS = np.full(shape, -1, dtype=np.int64)
        self.truncated_PAS = np.zeros(shape, dtype=bool)
        self.round_A = np.zeros(len(self.space), dtype=np.int64)

    def add(self, done: Sweep, number: int) -> None:
        """Note down a round; 0 is the batch that measures the rate."""
        rows = {problem.id: row for row, problem in enumerate(self.problems)}
        columns = {strategy: column for column, strategy in enumerate(self.space)}
        held = np.array([columns[strategy] for strategy in done.space])
        asked = np.array([rows[problem.id] for problem in done.problems])
        cells = np.ix_(asked, held, np.arange(done.rewards_PAS.shape[2]))
        for own_PAS, new_PAS in (
            (self.rewards_PAS, done.rewards_PAS),
            (self.length_PAS, done.length_PAS),
            (self.truncated_PAS, done.truncated_PAS),
        ):
            own_PAS[cells] = new_PAS
        greedy = [column for strategy, column in columns.items() if strategy.is_greedy]
        self.rewards_PAS[:, greedy, 1:] = np.nan  # repetitions of the one completion
        self.length_PAS[:, greedy, 1:] = -1
        self.round_A[held] = number

    def counts(self) -> dict[str, int]:
        """Rollouts, their tokens, how many were truncated, how many have no verdict."""
        drawn_PAS = self.length_PAS >= 0
        return {
            "rollouts": int(drawn_PAS.sum()),
            "tokens": int(self.length_PAS[drawn_PAS].sum()),
            "truncated": int(self.truncated_PAS[drawn_PAS].sum()),
            "without_verdict": int(np.isnan(self.rewards_PAS[drawn_PAS]).sum()),
        }

    def heat(self) -> list[dict[str, object]]:
        """Mean reward of each strategy by the last round that held it, for a map of temperature against truncation."""
        found: list[dict[str, object]] = []
        for index, strategy in enumerate(self.space):
            known = self.rewards_PAS[:, index][~np.isnan(self.rewards_PAS[:, index])]
            found.append(
                {
                    "strategy": str(strategy),
                    "temperature": strategy.temperature,
                    "truncation": str(strategy).partition(",")[2],
                    "reward": round(float(known.mean(dtype=np.float64)), 6) if known.size else None,
                    "rollouts": int((self.length_PAS[:, index] >= 0).sum()),
                    "round": int(self.round_A[index]),
                }
            )
        return found


def select(config: SelectConfig, out: Path, console: Console, engine: Engine | None = None) -> dict[str, Any]:
    """`rheostat select`: sweep the candidates on validation problems and choose; writes ``action_space.toml``,
    ``results.json`` and ``report.html``.

    Raises:
        ConfigError: more is asked for than the candidates, problems or limits allow, or nothing can be chosen.
        StoreError: the folder holds rollouts of another model or task.
    """
    require_own_results(out, "selection")
    with open_run(config, out, console, engine) as run:
        _check_store(run)
        problems = _shuffled(run.splits[Split.VALIDATION], config.seed)
        space, most = config.space, config.max_rollouts
        searched = Searched(problems, space, config.samples)
        plan = rounds_of(len(space), len(problems), config.samples, config.actions, most)
        rate, tokens = _first_batch(run, searched, plan[0])
        if config.max_time is not None:
            if rate is None:
                raise ConfigError("max_time: what would measure the rate is stored already; give max_rollouts to go on")
            allowed = int(rate * config.max_time * 60)
            most = min(most, allowed) if most is not None else allowed
            console.say(f"measured {rate:.0f} rollouts/s: {config.max_time:g} minutes allow {allowed:,}")
            plan = rounds_of(len(space), len(problems), config.samples, config.actions, most)
        console.say(_told(plan, Round(len(space), len(problems), config.samples), rate, tokens))
        last = _search(run, config, searched, plan)
        with run.phase("choice"):
            results = _results(run, config, searched, last, plan)
        results["wall_seconds"] = dict(run.wall_seconds)
        atomic_write(run.out / "action_space.toml", _toml(results))
        atomic_write(run.out / "results.json", json.dumps(results, indent=1))
        write_report(results, run.out / "report.html")
        return results


def _check_store(run: Run) -> None:
    """A folder holds one selection: what was sampled for another model or task would stand beside it unused."""
    folder, model = run.store.folder, run.engine.info
    tasks = {problem.task for problem in run.splits[Split.VALIDATION]}
    for path in sorted(folder.glob("*.parquet")):
        try:
            table = read_table(path, ["task"])
        except DamagedShardError:  # the store sets it aside once its rows are asked for
            continue
        stored = json.loads(table.schema.metadata.get(b"rheostat.engine", b"{}"))
        if stored and stored["fingerprint"] != model.fingerprint:
            raise StoreError(
                f"{folder} holds rollouts of the model {stored['model']!r}, not of {model.model!r}; "
                "give another folder as --out"
            )
        other = set(table.column("task").to_pylist()) - tasks
        if other:
            raise StoreError(
                f"{folder} holds rollouts of the task {min(other)!r}, not of {run.config.task!r}; "
                "give another folder as --out"
            )


def _shuffled(problems: Sequence[Problem], seed: int) -> list[Problem]:
    """A fixed order in which every first part is a sample of all data sets."""
    return sorted(problems, key=lambda problem: derive_seed("selection order", seed, problem.id))


def _told(plan: Sequence[Round], full: Round, rate: float | None, tokens: float) -> str:
    """The plan in words: rounds, rollouts, tokens, and the time that they take at the measured rate."""
    shown = (f"{r.strategies} strategies × {r.problems} problems × {r.samples} samples" for r in plan)
    rollouts = rollouts_of(plan)
    words = f"plan: {', then '.join(shown)}: {rollouts:,} rollouts (full sweep: {rollouts_of([full]):,})"
    words += f", about {rollouts * tokens:,.0f} tokens"
    return (
        words
        if rate is None
        else f"{words}, about {max(1, round(rollouts / rate / 60)):,} min at {rate:.0f} rollouts/s"
    )


def _first_batch(run: Run, searched: Searched, first: Round) -> tuple[float | None, float]:
    """Rollouts per second (None: all were stored) and tokens per rollout, from a batch that the search needs anyway."""
    start, before = time.perf_counter(), len(run.store)
    problems = searched.problems[: min(first.problems, max(2, 768 // (2 * len(searched.space))))]
    done = _sweep(run, problems, searched.space, min(2, first.samples))
    searched.add(done, 0)
    seconds, made = time.perf_counter() - start, len(run.store) - before
    return made / seconds if made else None, done.tokens / max(done.sampled, 1)


def _sweep(run: Run, problems: Sequence[Problem], space: ActionSpace, samples: int) -> Sweep:
    # in the task's order, so that prompts of one data set follow each other and share their batches
    members = list(dict.fromkeys(problem.member for problem in run.splits[Split.VALIDATION]))
    asked = sorted(problems, key=lambda problem: members.index(problem.member))
    total = len(asked) * len(space) * samples
    with run.phase("rollouts"), run.console.progress(f"{len(space)} strategies", total, "tokens") as bar:
        return sweep(run.engine, run.task, asked, space, samples, run.config.seed, run.store, bar)


def _search(run: Run, config: SelectConfig, searched: Searched, plan: Sequence[Round]) -> Sweep:
    """All rounds, noted down in ``searched``; the last one, which is chosen from."""
    alive = config.space.strategies
    for number, item in enumerate(plan, start=1):
        done = _sweep(run, searched.problems[: item.problems], ActionSpace(alive, config.order), item.samples)
        searched.add(done, number)
        if number == len(plan):
            return done
        candidates = Candidates.of(done.rewards_PAS, alive)
        keep = worth_keeping(candidates, config.actions, plan[number].strategies)
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


def _results(run: Run, config: SelectConfig, searched: Searched, done: Sweep, plan: Sequence[Round]) -> dict[str, Any]:
    candidates = Candidates.of(done.rewards_PAS, done.space.strategies, config.parallel_budget, config.seed)
    chosen = greedy_selection(candidates, config.actions)
    top = top_selection(candidates, config.actions)
    half = derive_seed("halves", config.seed)
    order = np.random.default_rng(half % 2**63).permutation(len(done.problems))
    first, second = order[: len(order) // 2].tolist(), order[len(order) // 2 :].tolist()
    curve = best_of_n(candidates, config.actions, first, second)
    share_A = selection_stability(candidates, config.actions, seed=config.seed)
    facts = run.facts() | {
        "strategies": [str(strategy) for strategy in chosen.strategies],
        "counts": searched.counts(),
    }
    return {
        "kind": "selection",
        **facts,
        "objective": "mean reward" if config.parallel_budget is None else f"pass@{config.parallel_budget}",
        "problems": len(done.problems),
        "samples": config.samples,
        "plan": [[item.strategies, item.problems, item.samples] for item in plan],
        "rollouts_asked": rollouts_of(plan),
        "full_sweep": rollouts_of([Round(len(searched.space), len(searched.problems), config.samples)]),
        "greedy": _described(chosen),
        "top": _described(top),
        "held_out": _curve(curve),
        "held_out_problems": {"chosen_on": len(first), "valued_on": len(second)},
        **_bounds(done, chosen, config),
        "chosen_in_resamples": {
            str(strategy): round(float(share), 4)
            for strategy, share in zip(candidates.strategies, share_A, strict=True)
            if share > 0
        },
        "heat": searched.heat(),
        "config": config.model_dump(mode="json"),
    }


def _described(selection: Selection) -> dict[str, object]:
    rounded = None if selection.held_out is None else [round(value, 6) for value in selection.held_out]
    return {
        "strategies": [str(strategy) for strategy in selection.strategies],
        "coverage": [round(value, 6) for value in selection.coverage],
        "held_out": rounded,
        "cells_without_estimate": selection.missing,
    }


def _curve(curve: BestOfN) -> dict[str, list[list[float]]]:
    def numbers(intervals: Sequence[Interval]) -> list[list[float]]:
        return [[round(i.estimate, 6), round(i.low, 6), round(i.high, 6)] for i in intervals]

    return {name: numbers(getattr(curve, name)) for name in ("greedy", "top", "difference")}


def _bounds(done: Sweep, chosen: Selection, config: SelectConfig) -> dict[str, object]:
    """What the choice covers with missing verdicts counted wrong and right; empty where none is missing."""
    if not np.isnan(done.rewards_PAS).any():
        return {}
    bounds = {}
    for name, value in (("missing_wrong", 0.0), ("missing_right", 1.0)):
        rewards_PAS = np.nan_to_num(done.rewards_PAS, nan=value)
        candidates = Candidates.of(rewards_PAS, done.space.strategies, config.parallel_budget, config.seed)
        bounds[name] = round(coverage(candidates, chosen.chosen).coverage[-1], 6)
    return {"bounds": bounds}


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
