"""Who uses vLLM's engine, and what happens at every pass of the model meanwhile: tokens are drawn, states are read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from rheostat.decoding.policy import StepObserver, StepState, TokenPolicy
from rheostat.decoding.sampling import draw
from rheostat.decoding.strategy import Order
from rheostat.engines.base import Pooling
from rheostat.seeding import Purpose, uniforms

if TYPE_CHECKING:
    from rheostat.engines.vllm import VllmEngine


class Call(Protocol):
    """Whoever uses the engine, and what happens at every pass of the model meanwhile."""

    def sample(
        self,
        logits_BV: Float[Tensor, "B V"],
        hidden_BH: Float[Tensor, "B H"],
        row_S: NDArray[np.int64],
        slot_S: NDArray[np.int64],
        t_S: NDArray[np.int64],
    ) -> Tensor | None:
        """The next token of rows ``row_S``, number ``t_S`` of the requests in slots ``slot_S``; None: vLLM's own."""
        ...


@dataclass(frozen=True, slots=True)
class WholePass:
    """The hidden states and positions of all tokens of a pass, row after row; there may be more at the end."""

    hidden_LH: Float[Tensor, "L H"]
    position_L: Int[Tensor, " L"]

    def means(self, rows: Sequence[int], last_B: Sequence[int]) -> Float[Tensor, "P H"]:
        """Of each of ``rows``, over its tokens in this pass; ``last_B`` is the last token's position, of every row."""
        position_L = self.position_L.tolist()
        parts, first = [], 0
        for last in last_B:
            end = first + last + 1 - position_L[first]
            parts.append(slice(first, end))
            first = end
        return torch.stack([self.hidden_LH[parts[row]].float().mean(0) for row in rows]).cpu()


@dataclass(slots=True)
class Decoding:
    """A call whose steps are ours."""

    policy: TokenPolicy
    observer: StepObserver | None
    budget_N: Tensor
    parallel_N: Tensor
    streams_N: NDArray[np.uint64]

    def sample(
        self,
        logits_BV: Tensor,
        hidden_BH: Tensor,
        row_S: NDArray[np.int64],
        slot_S: NDArray[np.int64],
        t_S: NDArray[np.int64],
    ) -> Tensor:
        device = logits_BV.device
        request_S = torch.from_numpy(slot_S)
        streams_S = self.streams_N[slot_S]
        state = StepState(
            hidden_BH,
            logits_BV,
            torch.from_numpy(row_S).to(device),
            request_S.to(device),
            torch.from_numpy(t_S).to(device),
            self.budget_N[request_S].to(device),
            self.parallel_N[request_S].to(device),
            streams_S,
        )
        uniform_S = torch.from_numpy(uniforms(streams_S, t_S, Purpose.TOKEN)).to(device)
        decision = self.policy.decide(state)
        token_S = draw(logits_BV, state.row_S, decision, uniform_S, Order.VLLM)
        if self.observer is not None:
            self.observer.observe(state, decision, token_S)
        return token_S


@dataclass(slots=True)
class Embedding:
    """A call that wants hidden states: of the prompts' last tokens, or the mean over all of them."""

    engine: "VllmEngine"
    pooling: Pooling
    lengths: Sequence[int]
    result_PH: Tensor

    def sample(
        self,
        logits_BV: Tensor,
        hidden_BH: Tensor,
        row_S: NDArray[np.int64],
        slot_S: NDArray[np.int64],
        t_S: NDArray[np.int64],
    ) -> None:
        if self.pooling is Pooling.LAST:
            self.result_PH[slot_S] = hidden_BH[row_S].float().cpu()
        else:
            last_B = [self.lengths[slot] - 1 for slot in slot_S]
            self.result_PH[slot_S] = self.engine.whole_pass.means(range(len(last_B)), last_B)
