"""`rheostat bench check`: whether a ratio has become worse than the committed one, beyond the noise.

Of the benchmarks that take seconds, ratios alone: machines differ in speed, and by the hour. ``ratios.json`` holds the
median and the lowest of several runs; ``python -m rheostat.bench.check RUNS`` prints such a file.
"""

import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rheostat.bench.sampler import bench_sampler
from rheostat.bench.select import bench_select
from rheostat.bench.store import bench_store
from rheostat.bench.verify import bench_verify
from rheostat.console import Console
from rheostat.environment import machine, versions
from rheostat.errors import RheostatError

_FILE = Path(__file__).with_name("ratios.json")
_SLACK = 3  # times as far below the median as the lowest run
_BENCHMARKS: dict[str, Callable[[Console], dict[str, Any]]] = {
    "sampler": lambda console: bench_sampler(1, console),
    "select": lambda console: bench_select(3, console),
    "store": lambda console: bench_store(3, console, counts=(10_000,)),
    "verify": lambda console: bench_verify(2, console, hanging=False),
}


@dataclass(frozen=True, slots=True)
class Known:
    """A committed ratio: median and lowest of its runs; more is better."""

    median: float
    lowest: float

    @property
    def least(self) -> float:
        """What is still noise: below the median by the lowest run's factor, three times over; at least by 5 %."""
        return self.median * min((self.lowest / self.median) ** _SLACK, 0.95)


def bench_check(console: Console) -> dict[str, Any]:
    """Run the benchmarks once, and once more where a ratio looks worse; the better of the two counts.

    Raises:
        RheostatError: there are no committed ratios; or a ratio is worse both times, has no committed one, or was
            committed and is not measured: the console says which, a line each.
    """
    if not _FILE.exists():
        raise RheostatError(f"{_FILE} is missing: make it with 'python -m rheostat.bench.check 5 > {_FILE}'")
    committed = json.loads(_FILE.read_text())
    known = {name: Known(**values) for name, values in committed["ratios"].items()}
    runs: dict[str, list[float]] = {}
    for bench, run in _BENCHMARKS.items():
        found = _ratios(bench, run(console))
        tries = [found]
        if complaints(found, {name: known[name] for name in found if name in known}):
            console.say(f"{bench}: looks worse than the committed ratios, once more")
            tries.append(_ratios(bench, run(console)))
        runs |= {name: [ratios[name] for ratios in tries] for name in found}
    best = {name: max(values) for name, values in runs.items()}
    lines = complaints(best, known)
    for line in lines:
        console.say(line)
    if lines:
        raise RheostatError(
            f"{len(lines)} of {len(known)} ratios are not as committed ({committed['machine']['cpu']}); find what made "
            "them worse, or record anew with 'python -m rheostat.bench.check 5'"
        )
    rows = [
        {"case": name, "value": best[name], "unit": "ratio", "low": min(values), "high": max(values)}
        for name, values in runs.items()
    ]
    return {"bench": "check", "machine": _machine(), "versions": versions(), "rows": rows, "ratios": best}


def complaints(ratios: Mapping[str, float], known: Mapping[str, Known]) -> list[str]:
    """A line for each ratio below the noise of the committed one, and for each that only one side has."""
    lines = []
    for name in [*known, *(name for name in ratios if name not in known)]:
        if name not in known:
            lines.append(f"{name}: no committed ratio")
        elif name not in ratios:
            lines.append(f"{name}: not measured any more")
        elif ratios[name] < known[name].least:
            lines.append(
                f"{name}: {ratios[name]:.3g}, below {known[name].least:.3g} "
                f"(committed: {known[name].median:.3g}, lowest run {known[name].lowest:.3g})"
            )
    return lines


def record(runs: int, console: Console) -> dict[str, Any]:
    """What ``ratios.json`` holds: of each ratio the median and the lowest of ``runs`` runs of all benchmarks."""
    loads, measured = [os.getloadavg()[0]], []
    for _ in range(runs):
        together: dict[str, float] = {}
        for bench, run in _BENCHMARKS.items():
            together |= _ratios(bench, run(console))
        measured.append(together)
        loads.append(os.getloadavg()[0])
    values = {name: [ratios[name] for ratios in measured] for name in measured[0]}
    return {
        "made_by": f"python -m rheostat.bench.check {runs}",
        "machine": _machine() | {"load": f"{min(loads):.1f} to {max(loads):.1f}"},
        "versions": versions(),
        "runs": runs,
        "ratios": {
            name: {"median": round(statistics.median(of_name), 3), "lowest": min(of_name)}
            for name, of_name in values.items()
        },
    }


def _ratios(bench: str, result: Mapping[str, Any]) -> dict[str, float]:
    return {f"{bench}: {name}": ratio for name, ratio in result["ratios"].items()}


def _machine() -> dict[str, str | int]:
    cores = {"cores used": len(os.sched_getaffinity(0))} if sys.platform == "linux" else {}
    return machine() | cores | {"threads": torch.get_num_threads()}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(record(int(sys.argv[1]), Console()), indent=1) + "\n")
