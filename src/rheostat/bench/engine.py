"""`rheostat bench engine`: tokens per second of the local engine over transformers' `generate`.

Same weights, dtype, rows, prompts, strategy (temperature 1, nothing truncated) and token budgets; EOS is ignored
on both sides, so that both write the same number of tokens. On a GPU `generate` has a static cache and compiles its
step, and both sides run once before they are timed. What the machine could do at most: ``roofline.py``; what a draw
takes of a step: ``draws.py``.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

from rheostat.adapters.token import AdaptiveDecoding, TokenAdapter, TokenConfig
from rheostat.bench.draws import bench_draws
from rheostat.bench.roofline import bench_roofline
from rheostat.bench.rows import row
from rheostat.console import Console
from rheostat.decoding.recording import Recorder
from rheostat.decoding.spaces import TABLE_14
from rheostat.decoding.strategy import Order, Strategy
from rheostat.engines import models
from rheostat.engines.base import Request
from rheostat.engines.local import LocalEngine
from rheostat.environment import machine, versions
from rheostat.types import Prompt

_ROWS, _TOKENS = 64, 128
_QUEUE_TOKENS = 80
_PREFIX_TOKENS = 300
_SENTENCE = "The dial of a rheostat sets how much current flows, from a faint glow to full light. "


class _Budgets(transformers.StoppingCriteria):  # type: ignore[misc]  # transformers is untyped
    """Ends row i of `generate` after its own number of tokens."""

    def __init__(self, prompt_tokens: int, budgets: list[int]) -> None:
        self.ends = torch.tensor(budgets) + prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        length_B = torch.full((len(input_ids),), input_ids.shape[1], device=input_ids.device)
        return length_B >= self.ends.to(input_ids.device)


def bench_engine(model: str, repeats: int, console: Console) -> dict[str, Any]:
    """All cases, ``repeats`` times in turn; the medians, their ranges, and the median ratios."""
    path = models.locate(model)
    engine = LocalEngine(path, name=model)
    engine.vocabulary.eos_ids = frozenset()
    dtype = getattr(torch, engine.info.dtype)
    peer = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
    peer = peer.to(engine.device).eval()
    peer.generation_config.eos_token_id = None

    uniform = [f"{index:02d} bottles of water stand on the table." for index in range(_ROWS)]
    questions = [f" Question {index}:" + " why" * (3 * index) + "?" for index in range(8)]
    queue = [_prefix(engine, f"Dial {number}: ") + text for number in range(4) for text in questions]
    cases = {
        f"uniform {_ROWS}": ([Prompt(text, text) for text in uniform], 1, [_TOKENS] * _ROWS),
        "shared prefix 8x8": (
            [Prompt(text, _prefix(engine, "") + text) for text in questions],
            8,
            [8 + (37 * index) % (_TOKENS - 8) for index in range(64)],
        ),
        "queue 256": (
            [Prompt(text, text) for text in queue],
            8,
            [8 + (37 * index) % (_QUEUE_TOKENS - 8) for index in range(64)] * 4,
        ),
    }
    rows, ratios = [], {}
    for case, (prompts, samples, budgets) in cases.items():
        sides: dict[str, Callable[[int], int]] = {
            "local": lambda _, p=prompts, s=samples, b=budgets: _local(engine, p, s, b),  # type: ignore[misc]
            "generate": lambda turn, p=prompts, s=samples, b=budgets: _generate(  # type: ignore[misc]
                peer, engine, *_batch(p, s, b, turn)
            ),
        }
        if engine.device.type == "cuda":
            for turn in range(repeats):  # graphs, and kernels for every shape
                for run in sides.values():
                    run(turn)
        rates: dict[str, list[float]] = {side: [] for side in sides}
        with console.progress(f"{case} rows", 2 * repeats, "") as bar:
            for repeat in range(repeats):
                for side, run in sides.items():
                    start = time.perf_counter()
                    tokens = run(repeat)
                    rates[side].append(tokens / (time.perf_counter() - start))
                    bar(2 * repeat + (side == "generate") + 1, 2 * repeats, 0)
        rows += [row(f"{case}: {side}", values, "tokens/s") for side, values in rates.items()]
        pairs = [ours / peers for ours, peers in zip(rates["local"], rates["generate"], strict=True)]
        ratios[f"{case}: local/generate"] = round(statistics.median(pairs), 3)
    adapted_rows, adapted_ratios = _adapted(engine, cases[f"uniform {_ROWS}"][0], repeats, console)
    rows, ratios = rows + adapted_rows, ratios | adapted_ratios
    for measure in (bench_draws, bench_roofline):
        more_rows, more_ratios = measure(engine, repeats, console)
        rows, ratios = rows + more_rows, ratios | more_ratios
    return {
        "bench": "engine",
        "machine": machine() | {"device": engine.info.device, "threads": engine.info.threads},
        "versions": versions() | {"model": f"{model} {engine.info.dtype}"},
        "rows": rows,
        "ratios": ratios,
    }


def _adapted(
    engine: LocalEngine, prompts: list[Prompt], repeats: int, console: Console
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Adapted decoding, and adapted decoding that is recorded for training, over a fixed temperature."""
    adapter = TokenAdapter(TokenConfig(engine.info.hidden_size, budgets=(1, 2, 4, 8)), TABLE_14).eval()
    policy = AdaptiveDecoding(adapter.to(engine.device))
    fixed = [Request(prompt, Strategy(), 0, 0, _TOKENS) for prompt in prompts]
    free = [Request(prompt, None, 0, 0, _TOKENS) for prompt in prompts]
    sides: dict[str, Callable[[], object]] = {
        "static": lambda: engine.generate(fixed),
        "adapted": lambda: engine.generate(free, policy),
        "recorded": lambda: engine.generate(free, policy, observer=Recorder(Order.VLLM)),
    }
    rates: dict[str, list[float]] = {side: [] for side in sides}
    with console.progress("adapted decoding", len(sides) * repeats, "") as bar:
        for repeat in range(repeats):
            for number, (side, run) in enumerate(sides.items()):
                engine.forget_prefixes()
                start = time.perf_counter()
                run()
                rates[side].append(len(prompts) * _TOKENS / (time.perf_counter() - start))
                bar(len(sides) * repeat + number + 1, len(sides) * repeats, 0)
    ratios = {
        f"{side}/static": round(statistics.median(a / b for a, b in zip(rates[side], rates["static"], strict=True)), 3)
        for side in ("adapted", "recorded")
    }
    return [row(side, values, "tokens/s") for side, values in rates.items()], ratios


def _prefix(engine: LocalEngine, head: str) -> str:
    return str(engine.tokenizer.decode(engine.tokenizer(head + _SENTENCE * 40)["input_ids"][:_PREFIX_TOKENS]))


def _batch(prompts: list[Prompt], samples: int, budgets: list[int], turn: int) -> tuple[list[Prompt], int, list[int]]:
    """What `generate` gets in one repetition: 64 rows, the next each time. The queue's batches have equal budgets."""
    count = 64 // samples
    first = turn * count % len(prompts)
    return prompts[first : first + count], samples, budgets[first * samples : (first + count) * samples]


def _local(engine: LocalEngine, prompts: list[Prompt], samples: int, budgets: list[int]) -> int:
    """Generate with the local engine; the prefixes of earlier repetitions are forgotten."""
    engine.forget_prefixes()
    pairs = [(prompt, sample) for prompt in prompts for sample in range(samples)]
    requests = [Request(p, Strategy(), s, 0, budget) for (p, s), budget in zip(pairs, budgets, strict=True)]
    return sum(len(completion.token_ids) for completion in engine.generate(requests))


@torch.inference_mode()
def _generate(
    peer: transformers.PreTrainedModel, engine: LocalEngine, prompts: list[Prompt], samples: int, budgets: list[int]
) -> int:
    """Generate with transformers; a row counts the tokens of its own budget."""
    tokenizer = engine.tokenizer
    inputs = tokenizer([prompt.text for prompt in prompts], return_tensors="pt", padding=True, padding_side="left")
    peer.generate(
        **inputs.to(engine.device),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=samples,
        max_new_tokens=max(budgets),
        cache_implementation="static" if engine.device.type == "cuda" else None,
        pad_token_id=tokenizer.pad_token_id,
        stopping_criteria=transformers.StoppingCriteriaList([_Budgets(inputs["input_ids"].shape[1], budgets)]),
    )
    return sum(budgets)
