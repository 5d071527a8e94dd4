"""Who uses vLLM's engine, and what happens at every pass of the model meanwhile: tokens are drawn, states are read."""

from collections.abc import Sequence
from dataclasses import dataclass, field
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

    def rows(self, last_B: Sequence[int]) -> list[tuple[int, Float[Tensor, "C H"]]]:
        """Of every row, the position where it begins in this pass and its states; ``last_B`` is where each ends."""
        position_L = self.position_L.tolist()
        parts, first = [], 0
        for last in last_B:
            end = first + last + 1 - position_L[first]
            parts.append((position_L[first], self.hidden_LH[first:end]))
            first = end
        return parts


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
    """A call that wants hidden states: of the prompts' last tokens, or the mean over all of them.

    Attributes:
        engine: whose passes it reads; its prefix cache is empty when the call begins.
        tokens: of every prompt.
        result_PH: filled in.
        block: tokens that vLLM keeps together; what a prompt shares with one before it is a multiple of this.
    """

    engine: "VllmEngine"
    pooling: Pooling
    tokens: Sequence[Sequence[int]]
    result_PH: Tensor
    block: int
    # sums over the first tokens of prompts that have run, by these tokens: what vLLM need not compute again
    _sums: dict[tuple[int, ...], Float[Tensor, " H"]] = field(default_factory=dict)

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
            return
        slots = slot_S.tolist()
        last_B = [len(self.tokens[slot]) - 1 for slot in slots]
        if self.engine.whole_pass is not None:
            rows = self.engine.whole_pass.rows(last_B)
        else:  # a GPU may replay a pass of one token per row, and nothing watches that; the logits are of these tokens
            rows = list(zip(last_B, hidden_BH[row_S][:, None], strict=True))
        # what a prompt shares may be another one's in the same pass, which begins earlier
        for index in sorted(range(len(rows)), key=lambda index: rows[index][0]):
            tokens = self.tokens[slots[index]]
            self.result_PH[slots[index]] = self._sum(tuple(tokens), *rows[index]) / len(tokens)

    def _sum(self, tokens: tuple[int, ...], start: int, hidden_CH: Tensor) -> Tensor:
        """Over all tokens of a prompt, of which those from ``start`` on ran in this pass."""
        sum_H = self._sums[tokens[:start]] if start else torch.zeros(hidden_CH.shape[1])
        for part_CH in torch.split(hidden_CH, self.block):
            sum_H = sum_H + part_CH.float().sum(0).cpu()
            start += len(part_CH)
            self._sums[tokens[:start]] = sum_H
        return sum_H
