"""The decode loop that the engines share: policy, draw, stop, and which rows the model computes next.

Sequences of one prompt that have written the same tokens get the same distribution from a frozen model, so
they stand on one row until they part: n samples share their prompt's prefill, and short answers sampled many
times cost little more than the distinct ones among them. Forking rows and dropping finished ones are the same
operation, a selection of parent rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from rheostat.decoding.policy import StepObserver, StepState, TokenPolicy
from rheostat.decoding.sampling import draw
from rheostat.decoding.strategy import Order
from rheostat.engines.base import Request
from rheostat.errors import ConfigError
from rheostat.seeding import Purpose, uniforms
from rheostat.types import Completion, FinishReason

# Rows that have finished are dropped from the cache, a copy of what remains, once they are more than this share.
IDLE_SHARE = 1 / 8


class Rows(Protocol):
    """The model's side of the loop: a batch of rows, each a prompt and the tokens written so far."""

    def begin(self) -> tuple[Tensor, Tensor]:
        """hidden_BH and logits_BV (float32) of the prompts, one row each."""
        ...

    def advance(self, parent_B: Tensor | None, token_B: Tensor) -> tuple[Tensor, Tensor]:
        """Row i becomes row ``parent_B[i]`` (None: row i) continued by ``token_B[i]``; returns as ``begin``.

        Parents rise: rows stay in their order.
        """
        ...

    def join(self, other: Self) -> tuple[Tensor, Tensor]:
        """The prompts of ``other``, which has not begun, become rows after these; returns as their ``begin``."""
        ...


class Vocabulary(Protocol):
    """How tokens become text, and which of them end a completion."""

    @property
    def eos_ids(self) -> frozenset[int]: ...

    @property
    def texts(self) -> Sequence[str]:
        """The text of each token by itself."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str: ...


@dataclass(frozen=True, slots=True)
class Batch:
    """Requests that begin together: request i on prompt row ``row_of_request[i]``; policy and observer know it as
    ``positions[i]``.
    """

    rows: Rows
    requests: Sequence[Request]
    row_of_request: Sequence[int]
    positions: Sequence[int]


class _Running:
    """All sequences that have begun, as columns, and what they have written."""

    def __init__(self, endings: Callable[[tuple[str, ...]], Tensor]) -> None:
        self._endings = endings
        self._stops: list[tuple[str, ...]] = []
        self._history: list[tuple[Tensor, Tensor]] = []  # who wrote what, step by step
        self.requests: list[Request] = []
        self.tokens: list[list[int]] = []  # of each, filled when a text is due
        self.stream_N = np.empty(0, dtype=np.uint64)
        none_N = torch.empty(0, dtype=torch.int64)
        self.position_N = self.budget_N = self.parallel_N = self.stop_N = self.start_N = none_N
        self.ends_KV = torch.empty(0)

    @property
    def step(self) -> int:
        """How many steps there were."""
        return len(self._history)

    def add(self, batch: Batch) -> Tensor:
        """The numbers of the batch's sequences, which begin at the next step."""
        requests, first = batch.requests, len(self.requests)
        self.requests += requests
        self.tokens += [[] for _ in requests]
        new = [stop for stop in dict.fromkeys(request.prompt.stop for request in requests) if stop not in self._stops]
        if new:
            self._stops += new
            self.ends_KV = torch.stack([self._endings(stop) for stop in self._stops])
        self.stream_N = np.append(self.stream_N, np.array([request.stream for request in requests], dtype=np.uint64))
        self.position_N = _longer(self.position_N, batch.positions)
        self.budget_N = _longer(self.budget_N, [request.max_tokens for request in requests])
        self.parallel_N = _longer(self.parallel_N, [request.parallel_budget for request in requests])
        self.stop_N = _longer(self.stop_N, [self._stops.index(request.prompt.stop) for request in requests])
        self.start_N = _longer(self.start_N, [self.step] * len(requests))
        return torch.arange(first, len(self.requests))

    def write(self, active_S: Tensor, token_S: Tensor) -> Tensor:
        """The active sequences' next tokens; returns which of them these may have ended."""
        self._history.append((active_S, token_S))
        is_last_S = self.budget_N[active_S] <= self.step - self.start_N[active_S]
        return self.ends_KV[self.stop_N[active_S], token_S] | is_last_S

    def fill(self, due: list[int]) -> None:
        """Bring the token lists of the ``due`` sequences up to date."""
        wanted = torch.tensor(due)
        start = self.start_N[wanted].tolist()
        for step in range(min(a + len(self.tokens[index]) for a, index in zip(start, due, strict=True)), self.step):
            active_S, token_S = self._history[step]
            # active_S rises: finished sequences leave, and who joins comes last
            at_N = torch.searchsorted(active_S, wanted).clamp(max=len(active_S) - 1)
            for index, first, token in zip(due, start, token_S[at_N].tolist(), strict=True):
                if first + len(self.tokens[index]) == step:
                    self.tokens[index].append(token)


def _longer(column_N: Tensor, values: Sequence[int]) -> Tensor:
    return torch.cat([column_N, torch.tensor(values, dtype=torch.int64)])


def ending_tokens(vocabulary: Vocabulary, stop: tuple[str, ...]) -> Tensor:
    """Which tokens may complete a stop string or end the text: a mask over the vocabulary.

    A token that completes a stop string holds its last character, or a piece of one (shown as U+FFFD), so
    that text need be looked at only where one of these was drawn.
    """
    if "" in stop:
        raise ConfigError("a stop string is empty: every completion would end before its first token; leave it out")
    last = {text[-1] for text in stop}
    pieces = any(ord(character) > 127 for character in last)
    mask = [
        index in vocabulary.eos_ids or any(c in text for c in last) or (pieces and "\ufffd" in text)
        for index, text in enumerate(vocabulary.texts)
    ]
    return torch.tensor(mask)


def finish(vocabulary: Vocabulary, request: Request, tokens: Sequence[int]) -> Completion | None:
    """The completion, if the last token ended it."""
    text = vocabulary.decode(tokens)
    cuts = [at for at in (text.find(stop) for stop in request.prompt.stop) if at >= 0]
    if cuts or tokens[-1] in vocabulary.eos_ids:
        return Completion(text[: min(cuts, default=len(text))], tuple(tokens), FinishReason.STOP)
    if len(tokens) >= request.max_tokens:
        return Completion(text, tuple(tokens), FinishReason.LENGTH)
    return None


def decode(
    batch: Batch,
    vocabulary: Vocabulary,
    endings: Callable[[tuple[str, ...]], Tensor],
    order: Order,
    policy: TokenPolicy,
    observer: StepObserver | None = None,
    more: Callable[[Tensor], Batch | None] | None = None,
) -> dict[int, Completion]:
    """Complete the requests of ``batch``, and of the batches that join it; by their positions.

    ``endings`` gives :func:`ending_tokens` of a stop tuple (engines keep it). ``more`` is told the positions of the
    running requests whenever some have ended, and says who joins them, if anybody. One pass of the model per step;
    Python touches only the sequences whose token may have ended them.
    """
    running, rows, completions = _Running(endings), batch.rows, dict[int, Completion]()
    active_S, row_S = running.add(batch), torch.tensor(batch.row_of_request)
    hidden_BH, logits_BV = rows.begin()
    device = logits_BV.device
    has_room = True
    while len(active_S):
        while has_room and more is not None and (joining := more(running.position_N[active_S])) is not None:
            new = rows.join(joining.rows)
            row_S = torch.cat([row_S, torch.tensor(joining.row_of_request) + len(logits_BV)])
            hidden_BH, logits_BV = torch.cat([hidden_BH, new[0]]), torch.cat([logits_BV, new[1]])
            active_S = torch.cat([active_S, running.add(joining)])
        t_S = running.step - running.start_N[active_S]
        streams_S = running.stream_N[active_S.numpy()]
        state = StepState(
            hidden_BH,
            logits_BV,
            row_S.to(device),
            running.position_N[active_S].to(device),
            t_S.to(device),
            running.budget_N[active_S].to(device),
            running.parallel_N[active_S].to(device),
            streams_S,
        )
        uniform_S = torch.from_numpy(uniforms(streams_S, t_S.numpy(), Purpose.TOKEN)).to(device)
        decision = policy.decide(state)
        token_S = draw(logits_BV, state.row_S, decision, uniform_S, order)
        if observer is not None:
            observer.observe(state, decision, token_S)
        token_S = token_S.cpu()

        due_S = running.write(active_S, token_S)
        alive_S = torch.ones_like(due_S)
        due = active_S[due_S].tolist()
        if due:
            running.fill(due)
        for place, index in zip(due_S.nonzero().squeeze(1).tolist(), due, strict=True):
            completion = finish(vocabulary, running.requests[index], running.tokens[index])
            if completion is not None:
                completions[int(running.position_N[index])] = completion
                alive_S[place] = False
        has_room = not bool(alive_S.all())
        active_S, row_S, token_S = active_S[alive_S], row_S[alive_S], token_S[alive_S]
        if len(active_S):
            parent_B, token_B, row_S = _next_rows(row_S, token_S, len(logits_BV), len(running.ends_KV[0]))
            hidden_BH, logits_BV = rows.advance(None if parent_B is None else parent_B.to(device), token_B.to(device))
    return completions


def _next_rows(row_S: Tensor, token_S: Tensor, rows: int, vocabulary: int) -> tuple[Tensor | None, Tensor, Tensor]:
    """Parents and tokens of the next rows (parents None: the rows stay where they are), and each sequence's row."""
    key_B, row_of_S = torch.unique(row_S * vocabulary + token_S, return_inverse=True)
    parent_B, token_B = key_B // vocabulary, key_B % vocabulary
    forked = len(torch.unique(parent_B)) < len(parent_B)
    if not forked and len(parent_B) >= rows * (1 - IDLE_SHARE):
        all_B = torch.zeros(rows, dtype=torch.int64)
        all_B[parent_B] = token_B
        return None, all_B, parent_B[row_of_S]
    return parent_B, token_B, row_of_S
