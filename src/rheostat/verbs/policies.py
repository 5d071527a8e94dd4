"""Fixed strategies on a task's test problems, as they are: nothing is trained and nothing is chosen."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from rheostat.config import PolicyRunConfig
from rheostat.console import Console
from rheostat.engines.base import Engine
from rheostat.files import atomic_write
from rheostat.rollouts.sweep import Sweep
from rheostat.statistics import proportion_interval
from rheostat.tasks.base import Split
from rheostat.verbs.run import open_run, require_own_results

_STYLES = {"thinking": "thinking", "cot": "with chain of thought", "direct": "without"}


def evaluate_policies(
    config: PolicyRunConfig, out: Path, console: Console, engine: Engine | None = None
) -> dict[str, Any]:
    """`rheostat evaluate --policy`: pass@k of each strategy, overall, by data set and by prompt style."""
    require_own_results(out, "policies")
    with open_run(config, out, console, engine) as run, run.under_way():
        sweep = run.sweep(Split.TEST, config.space, config.samples)
        styles = [run.task.prompt(problem).style for problem in sweep.problems]
        groups = {"all": np.ones(len(styles), dtype=bool)}
        members = [problem.member for problem in sweep.problems]
        if len(set(members)) > 1:
            groups |= {name: np.array([name == own for own in members]) for name in dict.fromkeys(members)}
        if len(set(styles)) > 1:
            named = {name: np.array([style == own for own in styles]) for style, name in _STYLES.items()}
            groups |= {name: own_P for name, own_P in named.items() if own_P.any()}
        results: dict[str, Any] = {
            "kind": "policies",
            **run.facts(),
            "rows": [row for name, own_P in groups.items() for row in _rows(sweep, name, own_P)],
            **run.bounds(sweep, (1,)),
            "config": config.model_dump(mode="json"),
            "wall_seconds": dict(run.wall_seconds),
        }
        atomic_write(run.out / "results.json", json.dumps(results, indent=1))
        return results


def _rows(sweep: Sweep, group: str, own_P: np.ndarray) -> list[dict[str, object]]:
    rows = []
    samples = sweep.rewards_PAS.shape[2]
    for index, strategy in enumerate(sweep.space):
        for k in (k for k in (1, 2, 4, 8, 16, 32) if k == 1 or 2 * k <= samples):
            value = proportion_interval(sweep.pass_at(k)[own_P, index])
            rows.append(
                {
                    "policy": str(strategy),
                    "group": group,
                    "k": k,
                    "estimate": round(value.estimate, 6),
                    "low": round(value.low, 6),
                    "high": round(value.high, 6),
                    "problems": value.n,
                    "samples": 1 if strategy.is_greedy else samples,
                    "truncated": round(float(sweep.truncated_PAS[own_P, index].mean()), 6),
                    "tokens": round(float(sweep.length_PAS[own_P, index].mean()), 3),
                }
            )
    return rows
