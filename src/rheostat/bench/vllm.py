"""`rheostat bench vllm`: what adapted decoding costs inside vLLM, over vLLM without it; and the local engine over vLLM.

Same prompts, rows and token budgets; EOS is ignored where vLLM draws, so that all sides write the same number of
tokens. ``plain`` samples at temperature 1; ``adapted`` is the plug-in (``rheostat.serving.vllm_plugin``); ``policy`` is
the engine's own step under the same adapter, and ``recorded`` adds what training keeps of every token. ``local`` is the
local engine at temperature 1, in the same process.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rheostat.adapters.files import BaseModel, save_adapter
from rheostat.adapters.token import AdaptiveDecoding, TokenAdapter, TokenConfig
from rheostat.bench.rows import row
from rheostat.console import Console
from rheostat.decoding.recording import Recorder
from rheostat.decoding.spaces import TABLE_14
from rheostat.decoding.strategy import Order, Strategy
from rheostat.engines import models
from rheostat.engines.base import Request
from rheostat.engines.local import LocalEngine
from rheostat.environment import machine, versions
from rheostat.serving.vllm_entry import ADAPTER
from rheostat.types import Prompt

_ROWS, _TOKENS = (16, 64), 32


def bench_vllm(model: str, repeats: int, console: Console) -> dict[str, Any]:
    """All sides, ``repeats`` times in turn; the medians, their ranges, and the median ratios.

    Raises:
        ConfigError: no vLLM, or an unsupported version.
    """
    from rheostat.engines.vllm import VllmEngine, checkpoint_fingerprint
    from rheostat.serving.vllm_plugin import install

    path = models.locate(model)
    local = LocalEngine(path, model)
    local.vocabulary.eos_ids = frozenset()
    tokenizer, hidden_size = _tokenizer_and_size(path)
    adapter = TokenAdapter(TokenConfig(hidden_size, budgets=(1, 2, 4, 8)), TABLE_14).eval()
    with tempfile.TemporaryDirectory() as folder:
        base = BaseModel(model, None, hidden_size, checkpoint_fingerprint(path, tokenizer))
        save_adapter(Path(folder) / "adapter", adapter, base, {}, {})
        before = os.environ.get(ADAPTER)
        os.environ[ADAPTER] = str(Path(folder) / "adapter")
        try:
            install()
            engine = VllmEngine(path, name=model)
        finally:
            os.environ.pop(ADAPTER) if before is None else os.environ.update({ADAPTER: before})
        rows: list[dict[str, Any]] = []
        ratios: dict[str, float] = {}
        for count in _ROWS:
            rates = _interleaved(
                _sides(engine, local, AdaptiveDecoding(adapter.to(engine.info.device)), count), repeats, console
            )
            rows += [row(f"{count} rows: {side}", values, "tokens/s") for side, values in rates.items()]
            for side, peer in (("adapted", "plain"), ("policy", "plain"), ("recorded", "policy"), ("local", "plain")):
                pairs = [a / b for a, b in zip(rates[side], rates[peer], strict=True)]
                ratios[f"{count} rows: {side}/{peer}"] = round(statistics.median(pairs), 3)
    return {
        "bench": "vllm",
        "machine": machine() | {"device": engine.info.device, "threads": engine.info.threads},
        "versions": versions() | {"model": f"{model} {engine.info.dtype}", "vllm": _version()},
        "rows": rows,
        "ratios": ratios,
    }


def _sides(engine: Any, local: LocalEngine, policy: AdaptiveDecoding, count: int) -> dict[str, Callable[[], int]]:
    from vllm import SamplingParams

    texts = [f"{index:02d} bottles of water stand on the table." for index in range(count)]
    requests = [Request(Prompt(text, text), None, 0, 0, _TOKENS) for text in texts]
    fixed = [replace(request, strategy=Strategy()) for request in requests]

    def vllm(extra: dict[str, Any] | None) -> int:
        params = SamplingParams(max_tokens=_TOKENS, ignore_eos=True, detokenize=False, extra_args=extra)
        outputs = engine.llm.generate(texts, params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    def ours(recorder: Recorder | None) -> int:
        return sum(len(done.token_ids) for done in engine.generate(requests, policy, observer=recorder))

    return {
        "plain": lambda: vllm(None),
        "adapted": lambda: vllm({"rheostat": "adapt"}),
        "policy": lambda: ours(None),
        "recorded": lambda: ours(Recorder(Order.VLLM)),
        "local": lambda: sum(len(done.token_ids) for done in local.generate(fixed)),
    }


def _interleaved(sides: dict[str, Callable[[], int]], repeats: int, console: Console) -> dict[str, list[float]]:
    """Tokens per second of each side, after one round that warms up."""
    rates: dict[str, list[float]] = {side: [] for side in sides}
    total = len(sides) * (repeats + 1)
    with console.progress("vllm", total, "") as bar:
        for repeat in range(repeats + 1):
            for number, (side, run) in enumerate(sides.items()):
                start = time.perf_counter()
                tokens = run()
                if repeat:
                    rates[side].append(tokens / (time.perf_counter() - start))
                bar(len(sides) * repeat + number + 1, total, 0)
    return rates


def _tokenizer_and_size(path: Path) -> tuple[Any, int]:
    import transformers

    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True).get_text_config()
    return transformers.AutoTokenizer.from_pretrained(path, local_files_only=True), config.hidden_size


def _version() -> str:
    import vllm

    return str(vllm.__version__)
