"""What the machine could do at most, and the share that the local engine reaches: part of `rheostat bench engine`.

The ceilings are measured: the bandwidth of a large copy, and the rate of the model's own matrix products, laid out as
the engine lays them out. A step has to read the weights and the rows' keys and values once, and to multiply: the time
of the longer of the two is the roofline (Williams et al., 2009). Activations, norms and the sampler are left out, so
that nothing can be faster.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from rheostat.bench.rows import row
from rheostat.console import Console
from rheostat.decoding.policy import Decision, StepState
from rheostat.decoding.strategy import Strategy
from rheostat.engines.base import Request
from rheostat.engines.layers import Linear
from rheostat.engines.local import LocalEngine
from rheostat.types import Prompt

_ROWS, _GPU_ROWS = (1, 16, 64, 128), (1, 64, 256, 512)
_TOKENS = 64
_MATRIX_ROWS = (128, 512)  # at 512 the weights are read once for four times the products
_COPY_BYTES = 256 << 20
_TRIES = 3  # of a ceiling in one repetition; the best counts


@dataclass(frozen=True, slots=True)
class Step:
    """What one step of a model, a token for every row, takes at least.

    Attributes:
        bytes: of weights, keys and values, to or from memory.
        operations: multiplications and additions.
    """

    bytes: int
    operations: int

    def seconds(self, bandwidth: float, rate: float) -> float:
        """At ``bandwidth`` bytes and ``rate`` operations a second, both at the same time."""
        return max(self.bytes / bandwidth, self.operations / rate)


def matrix_weights(config: Any) -> int:
    """Weights that a token is multiplied with, by a Llama-like model's config: attention, gated MLP, lm_head."""
    size, head = config.hidden_size, _head_size(config)
    attention = 2 * size * head * (config.num_attention_heads + config.num_key_value_heads)
    layer = attention + 3 * size * config.intermediate_size
    return int(config.num_hidden_layers * layer + size * config.vocab_size)


def step_of(config: Any, rows: int, context: int, itemsize: int) -> Step:
    """One step of ``rows`` rows, each of which attends to ``context`` tokens, its own new one among them.

    Args:
        config: of a Llama-like model.
        rows: at least 1.
        context: tokens; every row's keys and values are its own.
        itemsize: bytes of a weight, a key or a value.
    """
    weights, head = matrix_weights(config), _head_size(config)
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * head  # numbers that a token leaves behind
    scores_and_sums = 4 * context * config.num_hidden_layers * config.num_attention_heads * head
    return Step(itemsize * (weights + rows * context * cached), rows * (2 * weights + scores_and_sums))


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def bench_roofline(
    engine: LocalEngine, repeats: int, console: Console
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows and ratios: ceilings, the step that follows at several numbers of rows, the engine's own, the share.

    A ceiling is the best of all repetitions; the engine's step (model, sampler, bookkeeping) is the median. The engine
    must ignore EOS. Nothing for a model whose matrices are not those of :func:`matrix_weights`.
    """
    config, layers = engine.model.config.get_text_config(), linears(engine.model)
    if sum(inputs * outputs for _, inputs, outputs in layers) != matrix_weights(config):
        console.say(f"no roofline: {engine.info.model} is not built like Llama")
        return [], {}
    copies: list[float] = []
    rates: dict[int, list[float]] = {rows: [] for rows in _MATRIX_ROWS}
    sizes = _GPU_ROWS if engine.device.type == "cuda" else _ROWS
    steps: dict[int, list[float]] = {rows: [] for rows in sizes}
    with console.progress("roofline", len(sizes) * repeats, "") as bar:
        for repeat in range(repeats):
            copies += copy_bandwidths(engine.device)
            for rows in _MATRIX_ROWS:
                rates[rows] += matrix_rates(layers, rows, engine.model.dtype, engine.device)
            for number, rows in enumerate(sizes):
                steps[rows].append(step_seconds(engine, rows))
                bar(len(sizes) * repeat + number + 1, len(sizes) * repeats, 0)
    bandwidth, rate = max(copies), max(value for values in rates.values() for value in values)
    found = [row("copy", [value / 1e9 for value in copies], "GB/s")]
    found += [row(f"matrices, {rows} rows", [v / 1e9 for v in values], "GFLOP/s") for rows, values in rates.items()]
    context = len(engine.tokenizer(numbered_prompt(0).text)["input_ids"]) + _TOKENS // 2
    ratios = {}
    for rows, seconds in steps.items():
        step = step_of(config, rows, context, engine.model.dtype.itemsize)
        least = step.seconds(bandwidth, rate)
        found += [
            row(f"step of {rows}: bytes", [step.bytes / 1e6], "MB"),
            row(f"step of {rows}: operations", [step.operations / 1e9], "GFLOP"),
            row(f"step of {rows}: roofline", [1e3 * least], "ms"),
            row(f"step of {rows}: local", [1e3 * value for value in seconds], "ms"),
        ]
        ratios[f"step of {rows}: local/roofline"] = round(least / statistics.median(seconds), 3)
    return found, ratios


def linears(model: nn.Module) -> list[tuple[nn.Module, int, int]]:
    """The linear layers, in the model's order, with the numbers of their inputs and outputs."""
    found: list[tuple[nn.Module, int, int]] = []
    for module in model.modules():
        if isinstance(module, Linear | nn.Linear):
            outputs, inputs = module.weight.shape
            found.append((module, inputs, outputs))
    return found


def copy_bandwidths(device: torch.device) -> list[float]:
    """Bytes read and written per second by copies of a large tensor."""
    source = torch.ones(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return [2 * _COPY_BYTES / _seconds(lambda: target.copy_(source), device) for _ in range(_TRIES)]


@torch.inference_mode()
def matrix_rates(
    layers: list[tuple[nn.Module, int, int]], rows: int, dtype: torch.dtype, device: torch.device
) -> list[float]:
    """Operations per second of all linear layers one after the other; each has its own weights to read."""
    inputs_of = {inputs: torch.ones(rows, inputs, dtype=dtype, device=device) for _, inputs, _ in layers}
    operations = 2 * rows * sum(inputs * outputs for _, inputs, outputs in layers)

    def products() -> None:
        for layer, inputs, _ in layers:
            layer(inputs_of[inputs])

    products()
    return [operations / _seconds(products, device) for _ in range(_TRIES)]


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Clock:
    """Notes when each step of the decode loop has drawn its tokens."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def observe(self, state: StepState, decision: Decision, token_S: Int[Tensor, " S"]) -> None:
        """See :class:`rheostat.decoding.policy.StepObserver`."""
        _wait(token_S.device)
        self.times.append(time.perf_counter())


def step_seconds(engine: LocalEngine, rows: int) -> float:
    """The median step of ``rows`` different prompts; the prompts' own pass is left out."""
    clock = _Clock()
    engine.generate([Request(numbered_prompt(row), Strategy(), 0, 0, _TOKENS) for row in range(rows)], observer=clock)
    return statistics.median(b - a for a, b in zip(clock.times, clock.times[1:], strict=False))


def numbered_prompt(row: int) -> Prompt:
    """Prompts of equal length for rows below 1,000, all different."""
    text = f"{row:03d} bottles of water stand on the table."
    return Prompt(text, text)
