"""`rheostat bench select`: the choice of an action space, seconds and peak memory, beside a choice that is not lazy.

Rewards are random: the ease of a problem is Beta-distributed, and so is each strategy's rate of success around it; one
verdict in a hundred is missing.
"""

import statistics
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rheostat.bench.rows import row
from rheostat.console import Console
from rheostat.decoding.selection import Candidates, greedy_selection, selection_stability
from rheostat.decoding.spaces import candidate_grid
from rheostat.environment import machine, versions

_PROBLEMS, _SAMPLES = 12_000, 8
_BOOTSTRAP = 1_000  # problems
_ACTIONS = 10
_BUDGET = 3  # two halves of 4 samples leave one to lose


def bench_select(repeats: int, console: Console) -> dict[str, Any]:
    """All cases, ``repeats`` times in turn; the medians, their ranges, and the median ratio of eager to lazy."""
    pool = candidate_grid()
    rewards_PAS = random_rewards(_PROBLEMS, len(pool), _SAMPLES)
    candidates = Candidates.of(rewards_PAS, pool)
    some = candidates.on(range(_BOOTSTRAP))
    shape = f"{_PROBLEMS}x{len(pool)}x{_SAMPLES}"
    sides: dict[str, Callable[[], object]] = {
        f"greedy {shape}": lambda: greedy_selection(Candidates.of(rewards_PAS, pool), _ACTIONS),
        f"greedy {shape}, pass@{_BUDGET} cross-fitted": lambda: greedy_selection(
            Candidates.of(rewards_PAS, pool, _BUDGET), _ACTIONS
        ),
        f"bootstrap {_BOOTSTRAP}x{len(pool)}, 100 resamples": lambda: selection_stability(some, _ACTIONS),
        "choice alone: lazy": lambda: greedy_selection(candidates, _ACTIONS),
        "choice alone: eager": lambda: eager_choice(candidates.choosing_AP, _ACTIONS),
    }
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    with console.progress("selection", len(sides) * repeats, "") as bar:
        for repeat in range(repeats):
            for number, (side, run) in enumerate(sides.items()):
                start = time.perf_counter()
                run()
                seconds[side].append(time.perf_counter() - start)
                bar(len(sides) * repeat + number + 1, len(sides) * repeats, 0)
    rows = [row(side, values, "s") for side, values in seconds.items()]
    rows += [
        row(f"{side}: peak memory", [_peak_gib(run) + rewards_PAS.nbytes / 2**30], "GiB")
        for side, run in list(sides.items())[:2]
    ]
    pairs = zip(seconds["choice alone: eager"], seconds["choice alone: lazy"], strict=True)
    return {
        "bench": "select",
        "machine": machine(),
        "versions": versions(),
        "rows": rows,
        "ratios": {"choice alone: eager/lazy": round(statistics.median(eager / lazy for eager, lazy in pairs), 3)},
    }


def random_rewards(problems: int, actions: int, samples: int, seed: int = 0) -> NDArray[np.float32]:
    """Verdicts P × A × S, one in a hundred of them missing."""
    rng = np.random.default_rng(seed)
    ease_P1 = rng.beta(0.6, 0.8, (problems, 1)).clip(0.01, 0.99)
    rate_PA1 = rng.beta(4 * ease_P1, 4 * (1 - ease_P1), (problems, actions)).astype(np.float32)[..., None]
    rewards_PAS = (rng.random((problems, actions, samples), dtype=np.float32) < rate_PA1).astype(np.float32)
    rewards_PAS[rng.random(rewards_PAS.shape, dtype=np.float32) < 0.01] = np.nan
    return rewards_PAS


def eager_choice(values_AP: NDArray[np.float64], actions: int) -> list[int]:
    """The peer: every gain anew at every step."""
    values_AP = np.nan_to_num(values_AP)
    covered_P = np.zeros(values_AP.shape[1])
    chosen: list[int] = []
    for _ in range(actions):
        gain_A = np.maximum(values_AP - covered_P, 0).mean(1)
        gain_A[chosen] = -np.inf
        chosen.append(int(gain_A.argmax()))
        covered_P = np.maximum(covered_P, values_AP[chosen[-1]])
    return chosen


def _peak_gib(run: Callable[[], object]) -> float:
    """What ``run`` allocates at most, in a run that is not timed."""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1] / 2**30
    finally:
        tracemalloc.stop()
