"""`rheostat bench sampler`: milliseconds of one draw for 64 rows, beside the usual sampler that sorts the vocabulary.

On the first GPU if there is one, else on the CPU.

Logits are made up: the token of rank r has probability ∝ r^−s, with s between 1.2 and 3 from row to row (entropies of
5.4 to 0.7 nats, as a language model's are), in random order. Strategies are mixed, row by row: all of Tables 11 to
14.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rheostat.bench.rows import row
from rheostat.console import Console
from rheostat.decoding.policy import Decision, SamplingParameters
from rheostat.decoding.sampling import draw
from rheostat.decoding.spaces import TABLE_11, TABLE_12, TABLE_13, TABLE_14
from rheostat.decoding.strategy import Order, Strategy
from rheostat.environment import machine, versions

_ROWS = 64
_VOCABULARIES = (49_152, 151_936)  # of SmolLM2 and of Qwen
_ROUNDS = 8  # draws in one repetition
_MIXES: dict[str, list[Strategy]] = {
    "mixed": [s for table in (TABLE_11, TABLE_12, TABLE_13, TABLE_14) for s in table],
    "temperatures": [s for s in TABLE_14 if s.temperature > 0],
    "greedy": [s for s in TABLE_14 if s.temperature == 0],
}


def bench_sampler(repeats: int, console: Console) -> dict[str, Any]:
    """All mixes and vocabularies, both samplers in turn; the medians, their ranges, and the median ratios."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[dict[str, Any]] = []
    ratios = {}
    total = len(_VOCABULARIES) * len(_MIXES) * repeats
    with console.progress("sampler", total, "") as bar:
        done = 0
        for vocabulary in _VOCABULARIES:
            logits_BV = made_up_logits(_ROWS, vocabulary).to(device)
            for mix, strategies in _MIXES.items():
                row_B = torch.arange(_ROWS, device=device)
                choice_B = row_B % len(strategies)
                parameters = SamplingParameters.of(strategies, device)
                uniform_B = torch.rand(_ROWS, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(
                    device
                )
                decision = Decision(parameters, choice_B)
                own = parameters[choice_B]
                sides: dict[str, Callable[[], object]] = {
                    "ours": lambda b=logits_BV, r=row_B, d=decision, u=uniform_B: draw(b, r, d, u, Order.VLLM),  # type: ignore[misc]
                    "sorting": lambda b=logits_BV, p=own: sorting_draw(b, p),  # type: ignore[misc]
                }
                seconds: dict[str, list[float]] = {side: [] for side in sides}
                for run in sides.values():
                    run()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                for _ in range(repeats):
                    for side, run in sides.items():
                        start = time.perf_counter()
                        for _ in range(_ROUNDS):
                            run()
                        if device.type == "cuda":
                            torch.cuda.synchronize(device)
                        seconds[side].append((time.perf_counter() - start) / _ROUNDS)
                    done += 1
                    bar(done, total, 0)
                case = f"{_ROWS} x {vocabulary}, {mix}"
                rows += [
                    row(f"{case}: {side}", [1e3 * value for value in values], "ms") for side, values in seconds.items()
                ]
                pairs = zip(seconds["sorting"], seconds["ours"], strict=True)
                ratios[f"{case}: sorting/ours"] = round(statistics.median(peer / ours for peer, ours in pairs), 3)
    return {
        "bench": "sampler",
        "machine": machine() | {"device": device.type, "threads": torch.get_num_threads()},
        "versions": versions(),
        "rows": rows,
        "ratios": ratios,
    }


def made_up_logits(rows: int, vocabulary: int, seed: int = 0) -> Float[Tensor, "B V"]:
    """Zipf's law in every row, with exponents from 1.2 to 3."""
    generator = torch.Generator().manual_seed(seed)
    exponent_B1 = torch.linspace(1.2, 3, rows)[:, None]
    ranked_BV = -exponent_B1 * torch.arange(1, vocabulary + 1).log()
    order_BV = torch.rand(rows, vocabulary, generator=generator).argsort(-1)
    return ranked_BV.gather(1, order_BV)


def sorting_draw(logits_BV: Float[Tensor, "B V"], parameters: SamplingParameters) -> Int[Tensor, " B"]:
    """The peer: temperature, min-p, top-k and top-p over the sorted vocabulary, then an exponential race, in float32.

    What serving engines do where no kernel of theirs fits; greedy rows are drawn with the others, and replaced.
    """
    greedy_B = parameters.temperature_K == 0
    temperature_B1 = parameters.temperature_K.float().masked_fill(greedy_B, 1.0)[:, None]
    logits_BV = logits_BV.float() / temperature_B1
    if bool((parameters.min_p_K > 0).any()):
        p_BV = logits_BV.softmax(-1)
        low_BV = p_BV < parameters.min_p_K.float()[:, None] * p_BV.amax(-1, keepdim=True)
        logits_BV = logits_BV.masked_fill(low_BV, -torch.inf)
    if bool(((parameters.top_k_K > 0) | (parameters.top_p_K < 1)).any()):
        vocabulary = logits_BV.shape[1]
        sorted_BV, index_BV = logits_BV.sort(-1)  # rising
        top_k_B = parameters.top_k_K.masked_fill(parameters.top_k_K == 0, vocabulary).clamp(max=vocabulary)
        least_B1 = sorted_BV.gather(1, (vocabulary - top_k_B)[:, None])
        sorted_BV = sorted_BV.masked_fill(sorted_BV < least_B1, -torch.inf)
        cut_BV = sorted_BV.softmax(-1).cumsum(-1) <= 1 - parameters.top_p_K.float()[:, None]
        cut_BV[:, -1] = False
        sorted_BV = sorted_BV.masked_fill(cut_BV, -torch.inf)
        logits_BV = torch.empty_like(logits_BV).scatter_(1, index_BV, sorted_BV)
    p_BV = logits_BV.softmax(-1)
    drawn_B = (p_BV / torch.empty_like(p_BV).exponential_()).argmax(-1)
    return torch.where(greedy_B, logits_BV.argmax(-1), drawn_B)
