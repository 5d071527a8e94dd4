"""Complete one prompt under an adapter or a fixed strategy: what an application calls."""

from collections.abc import Sequence
from typing import Any

import torch

from rheostat.adapters.autodeco import AutoDeco, AutoDecoding
from rheostat.adapters.files import load_adapter
from rheostat.adapters.token import AdaptiveDecoding, TokenAdapter
from rheostat.config import EngineName
from rheostat.decoding.strategy import Order, Strategy
from rheostat.engines.base import Request
from rheostat.errors import ConfigError
from rheostat.evaluation.behaviour import traced
from rheostat.seeding import derive_seed
from rheostat.training.prompts import represent
from rheostat.types import Completion, Prompt
from rheostat.verbs.run import base_of, open_engine


def generate(
    prompt: str,
    *,
    model: str = "smollm2",
    engine: EngineName = "local",
    adapter: str | None = None,
    strategy: str | None = None,
    budget: int = 1,
    max_tokens: int = 64,
    stop: tuple[str, ...] = (),
    chat: bool = False,
    seed: int = 0,
    commit: bool = False,
    trace: bool = False,
) -> dict[str, Any]:
    """``budget`` completions of a prompt.

    Args:
        prompt: the text, or with ``chat`` the user's message.
        model: base model: a name, a folder, or a Hub id.
        engine: what opened it; ``vllm`` is an extra.
        adapter: folder or Hub id; a sequence-level one picks the strategy from the prompt and the budget, a token-level
            one an action at every token, AutoDeco heads a temperature and a top-p at every token.
        strategy: a fixed strategy instead, like ``greedy`` or ``T=0.7,p=0.9`` (default ``T=1``).
        budget: parallel budget B of at least 1.
        max_tokens: token budget b of at least 1.
        stop: strings that end a completion.
        chat: wrap the prompt in the model's chat template.
        seed: every draw is a function of it.
        commit: a token-level adapter takes its most probable action, instead of drawing one.
        trace: with a token-level adapter, also return ``traces``: what it decided at every token.

    Returns:
        ``strategy`` (None where it changes from token to token), ``probabilities`` (of a sequence-level adapter's
        strategies; else empty), and ``completions`` with ``text``, ``tokens`` and ``finish_reason``.

    Raises:
        RheostatError: see its children; each says what to do.
    """
    if budget < 1:
        raise ConfigError(f"budget must be a whole number of at least 1, got {budget}")
    if adapter is not None and strategy is not None:
        raise ConfigError("give --adapter or --strategy, not both: an adapter picks the strategy itself")
    fixed = Strategy.parse(strategy or "T=1")
    opened = open_engine(model, engine)
    if chat:
        prompt = opened.chat_text([{"role": "user", "content": prompt}])
    asked = Prompt(f"prompt-{derive_seed(prompt):016x}", prompt, stop)
    policy = None if adapter is None else load_adapter(adapter, base=base_of(opened.info)).adapter
    if isinstance(policy, TokenAdapter):
        decoding = AdaptiveDecoding(policy.to(opened.info.device), commit)
        free: dict[str, Any] = {"strategy": None, "probabilities": {}}
        if trace:
            completions, traces = traced(opened, asked, decoding, str(adapter), budget, max_tokens, seed)
            return free | {"completions": _plain(completions), "traces": traces}
        requests = [Request(asked, None, sample, seed, max_tokens, budget) for sample in range(budget)]
        return free | {"completions": _plain(opened.generate(requests, decoding, policy.space.order))}
    if trace or commit:
        raise ConfigError("--trace and --commit need --adapter with a token-level adapter")
    if isinstance(policy, AutoDeco):
        requests = [Request(asked, None, sample, seed, max_tokens, budget) for sample in range(budget)]
        completions = opened.generate(requests, AutoDecoding(policy.to(opened.info.device)))
        return {"strategy": None, "probabilities": {}, "completions": _plain(completions)}
    order, probabilities = Order.VLLM, {}
    if policy is not None:
        embedding_PH = represent(opened, [asked], policy.config)
        budget_P = torch.tensor([budget])
        action = int(policy.choose(embedding_PH, budget_P))
        pi_A = policy.probabilities(embedding_PH, budget_P)[0].tolist()
        fixed, order = policy.space.strategies[action], policy.space.order
        probabilities = {str(s): round(p, 6) for s, p in zip(policy.space, pi_A, strict=True)}
    requests = [Request(asked, fixed, sample, seed, max_tokens) for sample in range(budget)]
    completions = opened.generate(requests, order=order)
    return {"strategy": str(fixed), "probabilities": probabilities, "completions": _plain(completions)}


def _plain(completions: Sequence[Completion]) -> list[dict[str, Any]]:
    return [
        {"text": item.text, "tokens": len(item.token_ids), "finish_reason": str(item.finish_reason)}
        for item in completions
    ]
