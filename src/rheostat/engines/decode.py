"""The decode loop that the engines share: policy, draw, stop, and which rows the model computes next.

Sequences of one prompt that have written the same tokens get the same distribution from a frozen model, so
they stand on one row until they part: n samples share their prompt's prefill, and short answers sampled many
times cost little more than the distinct ones among them. Forking rows and dropping finished ones are the same
operation, a selection of parent rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

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
        """Row i becomes row ``parent_B[i]`` (None: row i) continued by ``token_B[i]``; returns as ``begin``."""
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


@dataclass(slots=True)
class _Sequence:
    """A completion under way."""

    request: Request
    tokens: list[int]
    completion: Completion | None = None


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
    rows: Rows,
    vocabulary: Vocabulary,
    requests: Sequence[Request],
    row_of_request: Sequence[int],
    endings: Callable[[tuple[str, ...]], Tensor],
    order: Order,
    policy: TokenPolicy,
    positions: Sequence[int],
    observer: StepObserver | None = None,
) -> list[Completion]:
    """Complete ``requests``, where request i starts on prompt row ``row_of_request[i]``.

    ``endings`` gives :func:`ending_tokens` of a stop tuple (engines keep it). Policy and observer know request i as
    ``positions[i]``. One pass of the model per step; Python touches only the sequences whose token may have ended them.
    """
    sequences = [_Sequence(request, []) for request in requests]
    hidden_BH, logits_BV = rows.begin()
    device = logits_BV.device
    streams = np.array([request.stream for request in requests], dtype=np.uint64)
    budget_N = torch.tensor([request.max_tokens for request in requests])
    parallel_N = torch.tensor([request.parallel_budget for request in requests])
    stops = list(dict.fromkeys(request.prompt.stop for request in requests))
    ends_KV = torch.stack([endings(stop) for stop in stops])
    stop_N = torch.tensor([stops.index(request.prompt.stop) for request in requests])

    position_N = torch.tensor(positions, device=device)
    active_S = torch.arange(len(requests))
    row_S = torch.tensor(row_of_request)
    history: list[tuple[Tensor, Tensor]] = []  # (who, what) of every step; lists are filled when a text is due
    t = 0
    while len(active_S):
        streams_S = streams[active_S.numpy()]
        state = StepState(
            hidden_BH,
            logits_BV,
            row_S.to(device),
            position_N[active_S],
            torch.full_like(active_S, t, device=device),
            budget_N[active_S].to(device),
            parallel_N[active_S].to(device),
            streams_S,
        )
        uniform_S = torch.from_numpy(uniforms(streams_S, t, Purpose.TOKEN)).to(device)
        decision = policy.decide(state)
        token_S = draw(logits_BV, state.row_S, decision, uniform_S, order)
        if observer is not None:
            observer.observe(state, decision, token_S)
        token_S = token_S.cpu()
        history.append((active_S, token_S))
        t += 1

        due_S = ends_KV[stop_N[active_S], token_S] | (budget_N[active_S] <= t)
        alive_S = torch.ones_like(due_S)
        due = active_S[due_S].tolist()
        if due:
            _fill(sequences, history, due)
        for position, index in zip(due_S.nonzero().squeeze(1).tolist(), due, strict=True):
            sequences[index].completion = finish(vocabulary, requests[index], sequences[index].tokens)
            alive_S[position] = sequences[index].completion is None
        active_S, row_S, token_S = active_S[alive_S], row_S[alive_S], token_S[alive_S]
        if len(active_S):
            parent_B, token_B, row_S = _next_rows(row_S, token_S, len(logits_BV), len(ends_KV[0]))
            hidden_BH, logits_BV = rows.advance(None if parent_B is None else parent_B.to(device), token_B.to(device))
    return [sequence.completion for sequence in sequences if sequence.completion is not None]


def _fill(sequences: list[_Sequence], history: list[tuple[Tensor, Tensor]], due: list[int]) -> None:
    """Bring the token lists of the ``due`` sequences up to date."""
    wanted = torch.tensor(due)
    for step in range(min(len(sequences[index].tokens) for index in due), len(history)):
        active_S, token_S = history[step]
        # active_S is ascending: finished sequences leave, none joins
        for index, token in zip(due, token_S[torch.searchsorted(active_S, wanted)].tolist(), strict=True):
            if len(sequences[index].tokens) == step:
                sequences[index].tokens.append(token)


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
