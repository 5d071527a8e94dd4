"""What share of a step the draw takes: part of `rheostat bench engine`, on a CPU. On a GPU one graph does both."""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from rheostat.bench.roofline import numbered_prompt
from rheostat.bench.rows import row
from rheostat.console import Console
from rheostat.decoding.policy import Decision, SamplingParameters, StepState
from rheostat.decoding.spaces import TABLE_11, TABLE_12, TABLE_13, TABLE_14
from rheostat.decoding.strategy import Strategy
from rheostat.engines.base import Request
from rheostat.engines.local import LocalEngine

_ROWS, _TOKENS = 64, 64
_MIXES: dict[str, Sequence[Strategy]] = {
    "temperature 1": [Strategy()],
    "greedy": [Strategy(0)],
    "Table 11": list(TABLE_11),
    "Table 12": list(TABLE_12),
    "Table 13": list(TABLE_13),
    "Table 14": list(TABLE_14),
    "Tables 11 to 14": [*TABLE_11, *TABLE_12, *TABLE_13, *TABLE_14],
}


class _Stopwatch:
    """Mixes strategies row by row, and notes when a token is asked for and when it is there."""

    def __init__(self, strategies: Sequence[Strategy]) -> None:
        self.sets = SamplingParameters.of(strategies)
        self.asked: list[float] = []
        self.drawn: list[float] = []

    def decide(self, state: StepState) -> Decision:
        """See :class:`rheostat.decoding.policy.TokenPolicy`."""
        decision = Decision(self.sets, state.request_S % len(self.sets))
        self.asked.append(time.perf_counter())
        return decision

    def observe(self, state: StepState, decision: Decision, token_S: Int[Tensor, " S"]) -> None:
        """See :class:`rheostat.decoding.policy.StepObserver`."""
        self.drawn.append(time.perf_counter())


def bench_draws(engine: LocalEngine, repeats: int, console: Console) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows and ratios: medians of a draw and of a step of 64 rows, for each mix of strategies. EOS must be ignored."""
    if engine.device.type != "cpu":
        return [], {}
    requests = [Request(numbered_prompt(number), None, 0, 0, _TOKENS) for number in range(_ROWS)]
    draws: dict[str, list[float]] = {mix: [] for mix in _MIXES}
    steps: dict[str, list[float]] = {mix: [] for mix in _MIXES}
    with console.progress("draws", len(_MIXES) * repeats, "") as bar:
        for repeat in range(repeats):
            for number, (mix, strategies) in enumerate(_MIXES.items()):
                watch = _Stopwatch(strategies)
                engine.generate(requests, watch, observer=watch)
                draws[mix].append(statistics.median(b - a for a, b in zip(watch.asked, watch.drawn, strict=True)))
                steps[mix].append(statistics.median(torch.tensor(watch.drawn, dtype=torch.float64).diff().tolist()))
                bar(len(_MIXES) * repeat + number + 1, len(_MIXES) * repeats, 0)
    rows = [row(f"draw, {mix}", [1e3 * value for value in values], "ms") for mix, values in draws.items()]
    rows += [row(f"step, {mix}", [1e3 * value for value in values], "ms") for mix, values in steps.items()]
    shares = {mix: [a / b for a, b in zip(draws[mix], steps[mix], strict=True)] for mix in _MIXES}
    return rows, {f"draw/step, {mix}": round(statistics.median(values), 4) for mix, values in shares.items()}
