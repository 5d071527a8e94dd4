"""Complete one prompt under an adapter or a fixed strategy: what an application calls."""

from typing import Any

import torch

from rheostat.adapters.files import load_adapter
from rheostat.decoding.strategy import Order, Strategy
from rheostat.engines.base import Pooling, Request
from rheostat.engines.local import LocalEngine
from rheostat.errors import ConfigError
from rheostat.seeding import derive_seed
from rheostat.types import Prompt
from rheostat.verbs import base_of, open_engine


def generate(
    prompt: str,
    *,
    model: str = "smollm2",
    adapter: str | None = None,
    strategy: str | None = None,
    budget: int = 1,
    max_tokens: int = 64,
    stop: tuple[str, ...] = (),
    chat: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """``budget`` completions of a prompt.

    Args:
        prompt: the text, or with ``chat`` the user's message.
        model: base model: a name, a folder, or a Hub id.
        adapter: folder or Hub id; it picks the strategy from the prompt and the budget.
        strategy: a fixed strategy instead, like ``greedy`` or ``T=0.7,p=0.9`` (default ``T=1``).
        budget: parallel budget B of at least 1.
        max_tokens: token budget b of at least 1.
        stop: strings that end a completion.
        chat: wrap the prompt in the model's chat template.
        seed: every draw is a function of it.

    Returns:
        ``strategy``, ``probabilities`` (of the adapter's strategies; empty without one), and ``completions``
        with ``text``, ``tokens`` and ``finish_reason``.

    Raises:
        RheostatError: see its children; each says what to do.
    """
    if budget < 1:
        raise ConfigError(f"budget must be a whole number of at least 1, got {budget}")
    if adapter is not None and strategy is not None:
        raise ConfigError("give --adapter or --strategy, not both: an adapter picks the strategy itself")
    fixed = Strategy.parse(strategy or "T=1")
    engine = open_engine(model)
    if chat:
        if not isinstance(engine, LocalEngine):
            raise ConfigError(f"chat: the model {model!r} has no chat template")
        prompt = engine.chat_text(prompt)
    asked = Prompt(f"prompt-{derive_seed(prompt):016x}", prompt, stop)
    order, probabilities = Order.VLLM, {}
    if adapter is not None:
        policy = load_adapter(adapter, base=base_of(engine.info)).adapter
        embedding_PH = engine.embed([asked], Pooling(policy.config.pooling))
        budget_P = torch.tensor([budget])
        action = int(policy.choose(embedding_PH, budget_P))
        pi_A = policy.probabilities(embedding_PH, budget_P)[0].tolist()
        fixed, order = policy.space.strategies[action], policy.space.order
        probabilities = {str(s): round(p, 6) for s, p in zip(policy.space, pi_A, strict=True)}
    requests = [Request(asked, fixed, sample, seed, max_tokens) for sample in range(budget)]
    return {
        "strategy": str(fixed),
        "probabilities": probabilities,
        "completions": [
            {"text": item.text, "tokens": len(item.token_ids), "finish_reason": str(item.finish_reason)}
            for item in engine.generate(requests, order=order)
        ],
    }
