"""What a sequence-level adapter reads of prompts: their embeddings, or how sure the model is of what follows them."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rheostat.adapters.sequence import PromptFeatures, SequenceConfig
from rheostat.decoding.policy import Decision, StepState
from rheostat.decoding.recording import row_statistics
from rheostat.decoding.strategy import Strategy
from rheostat.engines.base import Engine, Pooling, Request
from rheostat.types import Prompt


def represent(engine: Engine, prompts: Sequence[Prompt], config: SequenceConfig) -> Float[Tensor, "P H"]:
    """``config.inputs`` numbers of each prompt, float32 on the CPU.

    Raises:
        ModelError: as :meth:`rheostat.engines.base.Engine.embed`.
    """
    if config.features is PromptFeatures.ENTROPY:
        return prompt_entropy(engine, prompts)
    return engine.embed(prompts, Pooling(config.pooling))


def prompt_entropy(engine: Engine, prompts: Sequence[Prompt]) -> Float[Tensor, "P 2"]:
    """Entropy (nats) and largest probability of the model's untempered next-token distribution after each prompt.

    One greedy step of decoding shows both, so that an engine needs no method of its own for them.

    Raises:
        ModelError: a prompt is empty, or leaves no room for a token in the context.
    """
    observer = _FirstStep(len(prompts))
    if prompts:
        engine.generate([Request(prompt, Strategy(0), 0, 0, 1) for prompt in prompts], observer=observer)
    return observer.found_P2


class _FirstStep:
    def __init__(self, prompts: int) -> None:
        self.found_P2 = torch.full((prompts, 2), torch.nan)

    def observe(self, state: StepState, decision: Decision, token_S: Int[Tensor, " S"]) -> None:
        del decision, token_S  # whatever is drawn
        statistics = row_statistics(state.logits_BV)
        found_B2 = torch.stack([statistics.entropy_B, statistics.p_max_B], dim=1)
        self.found_P2[state.request_S.cpu()] = found_B2[state.row_S].cpu()
