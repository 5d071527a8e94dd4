"""Many requests on few rows that stay in place: who sits where, who has ended, who comes next.

The host does not follow the steps. It knows how far each row has come, because a row writes a token at every step until
its budget is spent, and looks at the tokens every few steps, one look late, so that the device never waits for it. What
a row wrote after its end is thrown away; the tokens are those of :func:`rheostat.engines.decode.decode`.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from rheostat.decoding.policy import NOT_FINITE, Decision, FixedStrategies, StepObserver, StepState, TokenPolicy
from rheostat.decoding.strategy import Order
from rheostat.engines.base import Request
from rheostat.engines.decode import IDLE_SHARE, finish
from rheostat.engines.static import STEPS, Read, StaticRows, seen_of
from rheostat.errors import AdapterError
from rheostat.types import Completion

if TYPE_CHECKING:
    from rheostat.engines.local import LocalEngine

_FEW = 8  # rows for which a step takes about as long as for one: it reads the weights


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A few steps: whose rows they were, how many tokens each had and wrote, and these on their way."""

    request_R: NDArray[np.int64]
    t_R: NDArray[np.int64]
    count_R: NDArray[np.int64]
    read: Read


class Refill:
    """One call's requests on ``rows``.

    Args:
        engine: reads the prompts, all but their last tokens, which the first steps write.
        rows: begun for these requests.
        count: how many rows there are.
        requests: what to complete.
        prompts: their distinct prompts' tokens.
        prompt_of: each request's prompt.
    """

    def __init__(
        self,
        engine: "LocalEngine",
        rows: StaticRows,
        count: int,
        requests: Sequence[Request],
        prompts: Sequence[list[int]],
        prompt_of: Mapping[int, int],
    ) -> None:
        self._engine, self._rows, self._requests = engine, rows, requests
        self._prompts, self._prompt_of = prompts, prompt_of
        stops = list(dict.fromkeys(request.prompt.stop for request in requests))
        self._ends_KV = torch.stack([engine.ending_tokens_of(stop) for stop in stops]).numpy()
        self._stop_N = np.array([stops.index(request.prompt.stop) for request in requests])
        self._budget_N = np.array([request.max_tokens for request in requests])
        self._length_N = np.array([len(prompts[prompt_of[index]]) for index in range(len(requests))])
        self._token_NT = np.zeros((len(requests), int(self._budget_N.max())), dtype=np.int32)
        self._done: dict[int, Completion] = {}
        self._is_open_N = np.ones(len(requests), dtype=np.bool_)
        # samples of a prompt follow each other: nobody waits for a prompt that was read but the last one
        self._waiting = deque(sorted(range(len(requests)), key=lambda index: (prompt_of[index], index)))
        self._standing = (-1, -1)  # that prompt, and a row that it stands on
        # of each row: its request, and how many tokens it has written and may still write; none left: it is free
        self._request_R, self._t_R, self._left_R = (np.zeros(count, dtype=np.int64) for _ in range(3))

    def complete(self, policy: TokenPolicy, order: Order, observer: StepObserver | None) -> list[Completion]:
        """One completion per request, in their order. An observer is shown every step, which waits for the device."""
        most, late = (STEPS, 1) if observer is None else (1, 0)
        chunks: deque[_Chunk] = deque()
        while self._is_open_N.any():
            self._seat(policy)
            self._shrink()
            steps = min(most, int(self._left_R.max()))
            if not steps:  # all budgets are spent: what is left is to be read
                self._settle(chunks.popleft())
                continue
            chunk, decision = self._run(steps, policy, order)
            chunks.append(chunk)
            if len(chunks) > late:
                self._settle(chunks.popleft())
            if observer is not None:
                self._show(observer, chunk, decision, policy)
        return [self._done[index] for index in range(len(self._requests))]

    def _run(self, steps: int, policy: TokenPolicy, order: Order) -> tuple[_Chunk, Decision]:
        rows, is_taken_R = len(self._request_R), self._left_R > 0
        count_R = np.minimum(self._left_R, steps)
        longest = int((self._used_R + count_R)[is_taken_R].max())
        for _ in range(steps):
            decision = self._rows.run(rows, seen_of(longest), policy, order)
        chunk = _Chunk(self._request_R.copy(), self._t_R.copy(), count_R, self._rows.read(rows, steps))
        self._t_R += count_R
        self._left_R -= count_R
        return chunk, decision

    @property
    def _used_R(self) -> NDArray[np.int64]:
        """How many tokens stand in a row's room: all but the last one of its sequence."""
        used_R: NDArray[np.int64] = self._length_N[self._request_R] - 1 + self._t_R
        return used_R

    def _settle(self, chunk: _Chunk) -> None:
        """Write down the tokens of those who had not ended, and see who has now."""
        row_S = (self._is_open_N[chunk.request_R] & (chunk.count_R > 0)).nonzero()[0]
        request_S, t_S, count_S = chunk.request_R[row_S], chunk.t_R[row_S], chunk.count_R[row_S]
        token_ST = chunk.read.values().numpy()[:, row_S].T
        step_T = np.arange(token_ST.shape[1])
        is_there_ST = step_T < count_S[:, None]
        at_ST = t_S[:, None] + step_T
        request_ST = np.broadcast_to(request_S[:, None], at_ST.shape)
        self._token_NT[request_ST[is_there_ST], at_ST[is_there_ST]] = token_ST[is_there_ST]
        is_due_ST = self._ends_KV[self._stop_N[request_S][:, None], token_ST] | (token_ST < 0)
        is_due_ST |= at_ST + 1 >= self._budget_N[request_S][:, None]
        for position, step in zip(*(is_due_ST & is_there_ST).nonzero(), strict=True):
            index = int(request_S[position])
            if not self._is_open_N[index]:
                continue  # what it wrote after its end
            if token_ST[position, step] < 0:
                raise AdapterError(NOT_FINITE)
            tokens = self._token_NT[index, : at_ST[position, step] + 1].tolist()
            completion = finish(self._engine.vocabulary, self._requests[index], tokens)
            if completion is not None:
                self._done[index], self._is_open_N[index] = completion, False
                self._left_R[self._request_R == index] = 0

    def _seat(self, policy: TokenPolicy) -> None:
        """Who waits takes the rows that are free, once these are enough to be worth the prompts' pass."""
        free = (self._left_R == 0).nonzero()[0].tolist()
        if not self._waiting or len(free) < max(1, IDLE_SHARE * len(self._left_R)):
            return
        new = [(row, self._waiting.popleft()) for row in free[: len(self._waiting)]]
        of_prompt: dict[int, list[int]] = {}
        for row, index in new:
            of_prompt.setdefault(self._prompt_of[index], []).append(row)
        # before somebody else sits down there
        self._copy([(self._standing[1], row) for row in of_prompt.get(self._standing[0], [])])
        fresh = [prompt for prompt in of_prompt if prompt != self._standing[0]]
        long = [prompt for prompt in fresh if len(self._prompts[prompt]) > 1]
        for batch, cache in self._engine.read([self._prompts[prompt][:-1] for prompt in long]):
            self._rows.take(cache, [of_prompt[long[position]][0] for position in batch])
        self._copy([(of_prompt[prompt][0], row) for prompt in fresh for row in of_prompt[prompt][1:]])
        last = next(reversed(of_prompt))
        self._standing = last, of_prompt[last][0]
        for row, index in new:
            self._request_R[row], self._t_R[row], self._left_R[row] = index, 0, self._budget_N[index]
        self._tell(new, policy)

    def _tell(self, new: list[tuple[int, int]], policy: TokenPolicy) -> None:
        """The device's side of it."""
        numbers = []
        for _, index in new:
            request, prompt = self._requests[index], self._prompts[self._prompt_of[index]]
            stream = request.stream - (request.stream >> 63 << 64)  # the same bits with a sign
            budgets = request.max_tokens, request.parallel_budget
            numbers.append((prompt[-1], len(prompt) - 1, 0, *budgets, index, stream))
        sets = None
        if isinstance(policy, FixedStrategies):
            sets = policy.sets(torch.tensor([index for _, index in new], device=self._rows.device))
        self._rows.seat([row for row, _ in new], numbers, sets)

    def _copy(self, pairs: list[tuple[int, int]]) -> None:
        """Prompts from row to row."""
        if pairs:
            sources, targets = zip(*pairs, strict=True)
            self._rows.copy(sources, targets, int(self._length_N.max()) - 1)

    def _shrink(self) -> None:
        """With nobody waiting, half the rows do where half of them are free: those of the upper half move down."""
        while not self._waiting and len(self._left_R) > _FEW and 2 * (self._left_R > 0).sum() <= len(self._left_R):
            half = len(self._left_R) // 2
            moving = half + (self._left_R[half:] > 0).nonzero()[0]
            target = (self._left_R[:half] == 0).nonzero()[0][: len(moving)]
            if len(moving):
                self._rows.copy(moving.tolist(), target.tolist(), int(self._used_R[moving].max()))
            for numbers in (self._request_R, self._t_R, self._left_R):
                numbers[target] = numbers[moving]
            self._request_R, self._t_R, self._left_R = self._request_R[:half], self._t_R[:half], self._left_R[:half]

    def _show(self, observer: StepObserver, chunk: _Chunk, decision: Decision, policy: TokenPolicy) -> None:
        """The step that was taken, as :func:`rheostat.engines.decode.decode` shows it."""
        row_S = chunk.count_R.nonzero()[0]
        device = self._rows.device
        requests = [self._requests[index] for index in chunk.request_R[row_S]]
        at_S = _on(device, row_S)
        rows = len(chunk.count_R)
        state = StepState(
            self._rows.hidden_RH[:rows],
            self._rows.logits_RV[:rows],
            at_S,
            _on(device, chunk.request_R[row_S]),
            _on(device, chunk.t_R[row_S]),
            _on(device, [request.max_tokens for request in requests]),
            _on(device, [request.parallel_budget for request in requests]),
            np.array([request.stream for request in requests], dtype=np.uint64),
        )
        if isinstance(policy, FixedStrategies):
            decision = policy.decide(state)
        else:
            log_pi_SK = None if decision.log_pi_SK is None else decision.log_pi_SK[at_S]
            decision = Decision(decision.parameters, decision.choice_S[at_S], log_pi_SK)
        observer.observe(state, decision, chunk.read.values()[-1].to(device)[at_S])


def _on(device: torch.device, numbers: Sequence[int] | NDArray[np.int64]) -> Int[Tensor, " S"]:
    return torch.tensor(np.asarray(numbers), device=device)
