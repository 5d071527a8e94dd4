"""`rheostat bench report`: seconds, peak memory and size of the report on 100,000 rollouts, judged and interrupted.

The rollouts are made up: every problem has an ease, and every completion a length and some text. They are stored and
judged as real ones; the report is written by a process of its own, start included.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rheostat.bench.rows import row
from rheostat.console import Console
from rheostat.decoding.spaces import strategies_named
from rheostat.decoding.strategy import ActionSpace, Order
from rheostat.environment import machine, versions
from rheostat.evaluation.evaluate import MIXED, compare, groups_of
from rheostat.evaluation.judged import Measured, token_grid
from rheostat.reports.folders import FORMAT
from rheostat.rollouts.store import Rollout, RolloutStore
from rheostat.rollouts.sweep import Sweep
from rheostat.types import FinishReason, Problem

_SAMPLES, _BATCH, _LONGEST = 16, 768, 256
_PROBLEMS = {"validation": 241, "test": 801}  # times 6 strategies and 16 samples: 100,032 rollouts
_BUDGETS = (1, 2, 4, 8)
_WORDS = ("so the answer is", "one two", "three then", "we add", "and take away", "what is left", "over of it all")


def bench_report(repeats: int, console: Console) -> dict[str, Any]:
    """Both cases, ``repeats`` times; medians and ranges."""
    with tempfile.TemporaryDirectory() as folder:
        judged, broken = Path(folder) / "judged", Path(folder) / "interrupted"
        count = make_run(judged)
        broken.mkdir()
        (broken / "rollouts").symlink_to(judged / "rollouts")
        measured: dict[str, dict[str, list[float]]] = {}
        with console.progress("reports", 2 * repeats, "") as bar:
            for repeat in range(repeats):
                for number, (case, run) in enumerate((("report 100k", judged), ("report 100k, interrupted", broken))):
                    for unit, value in _one(run).items():
                        measured.setdefault(case, {}).setdefault(unit, []).append(value)
                    bar(2 * repeat + number + 1, 2 * repeats, 0)
    return {
        "bench": "report",
        "machine": machine(),
        "versions": versions(),
        "rollouts": count,
        "rows": [row(case, values, unit) for case, units in measured.items() for unit, values in units.items()],
        "ratios": {},
    }


def make_run(folder: Path) -> int:
    """A folder as ``rheostat evaluate`` leaves it, with made-up rollouts; returns how many."""
    rng = np.random.default_rng(0)
    space = ActionSpace(strategies_named(("table13",)), Order.VLLM)
    sweeps = {}
    with RolloutStore(folder / "rollouts") as store:
        for split, problems in _PROBLEMS.items():
            asked = [Problem(f"{split}-{n}", "made up", f"kind {n % 6}", f"{n}?", f"{n}") for n in range(problems)]
            rollouts = _rollouts(asked, space, rng)
            for start in range(0, len(rollouts), _BATCH):
                batch = [replace(rollout, batch=f"{split}-{start}") for rollout in rollouts[start : start + _BATCH]]
                store.append(batch, {"engine": json.dumps({"model": "made up", "fingerprint": "made up"})})
            sweeps[split] = Sweep.of(asked, space, _SAMPLES, rollouts)
        count = len(store)
    test = sweeps["test"]
    measured = Measured.of(test, _BUDGETS, token_grid(_LONGEST))
    mixed = {MIXED: measured.uniform("mixed", space, _BUDGETS)}
    ours = {"adapter with budget": measured.static("adapter", dict(zip(_BUDGETS, (5, 0, 0, 3), strict=True)))}
    groups = groups_of(test.problems, ["direct"] * len(test.problems))
    results = {
        "kind": "sequence",
        "format": FORMAT,
        "model": {"model": "made up"},
        "task": "made up",
        "order": str(space.order),
        "strategies": [str(strategy) for strategy in space],
        "budgets": list(_BUDGETS),
        **compare(sweeps["validation"], measured, ours, mixed, groups).to_dict(),
    }
    (folder / "results.json").write_text(json.dumps(results))
    return count


def _rollouts(problems: list[Problem], space: ActionSpace, rng: np.random.Generator) -> list[Rollout]:
    """In the order problem, strategy, sample."""
    found = []
    for problem in problems:
        ease = rng.beta(0.6, 0.8)
        for strategy in space:
            for sample in range(_SAMPLES):
                tokens = int(rng.integers(8, _LONGEST + 1))
                correct = bool(rng.random() < ease)
                found.append(
                    Rollout(
                        key=f"{problem.id}-{strategy}-{sample}",
                        problem_id=problem.id,
                        task=problem.task,
                        member=problem.member,
                        strategy=str(strategy),
                        order=str(space.order),
                        sample=sample,
                        seed=0,
                        max_tokens=_LONGEST,
                        text=" ".join(rng.choice(_WORDS, tokens // 3)),
                        tokens=tokens,
                        finish_reason=FinishReason.LENGTH if tokens == _LONGEST else FinishReason.STOP,
                        correct=None if rng.random() < 0.001 else correct,
                        detail="",
                        answer=problem.answer if correct else str(int(rng.integers(9))),
                        batch="",
                    )
                )
    return found


_CHILD = """
import sys
from rheostat.bench.report import peak_mib
from rheostat.cli import main
assert main(sys.argv[1:]) == 0
print(peak_mib())
"""


def _one(run: Path) -> dict[str, float]:
    """Write the report of a run in a process of its own: seconds, its peak memory, and the size of the page."""
    out = run / "report"
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, "report", str(run), "--out", str(out)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return {
        "s": time.perf_counter() - start,
        "MiB peak": float(done.stdout),
        "MiB page": (out / "report.html").stat().st_size / 2**20,
    }


def peak_mib() -> float:
    """The most memory that this process has held."""
    try:  # a process begins with the maximum of its parent in getrusage, and not here
        status = Path("/proc/self/status").read_text()
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 2**10
