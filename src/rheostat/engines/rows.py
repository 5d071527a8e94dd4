"""What the local engine's decode loop runs on: rows of prompts that share a prefix, and who comes next."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from rheostat.engines.attention import Parts, RowCache
from rheostat.engines.base import Pooling, Request
from rheostat.engines.continuous import Fed
from rheostat.engines.decode import Batch
from rheostat.types import Prompt

if TYPE_CHECKING:
    from rheostat.engines.local import LocalEngine

_JOINING = 4  # a batch that others join begins with a quarter of its memory, and gets the rest quarter by quarter


class LocalRows:
    """The rows of one batch: prompts that share a prefix, each with its own tokens, left-padded."""

    def __init__(self, engine: "LocalEngine", prompts: Sequence[list[int]]) -> None:
        self.engine = engine
        device = engine.device
        shared = _shared(prompts)
        self.lengths = torch.tensor([len(ids) for ids in prompts], device=device)
        own = max(map(len, prompts)) - shared
        self.ids_BL = torch.tensor([[0] * (own - len(ids) + shared) + ids[shared:] for ids in prompts], device=device)
        self.prefix, padding_B = engine.prefix(tuple(prompts[0][:shared])), own + shared - self.lengths
        self.cache: RowCache | Parts = RowCache(self.prefix, padding_B)
        self.position_B = self.lengths - 1  # of the last token in the cache

    def prefill(self, *, logits: bool) -> Fed:
        start = self.lengths - self.ids_BL.shape[1]
        own = torch.arange(self.ids_BL.shape[1], device=self.ids_BL.device)
        position_BL = (start[:, None] + own).clamp(min=0)
        return self.engine.prefill(self.ids_BL, position_BL, self.cache, logits=logits)

    def embed(self, pooling: Pooling) -> Tensor:
        fed = self.prefill(logits=False)
        if pooling is Pooling.LAST:
            return fed.hidden_BH
        prefix_sum_H = self.prefix.hidden_sum_H
        assert prefix_sum_H is not None  # the engine's prefixes carry it
        return (fed.sum_BH + prefix_sum_H.to(fed.sum_BH.device)) / self.lengths[:, None]

    def begin(self) -> tuple[Tensor, Tensor]:
        fed = self.prefill(logits=True)
        return fed.hidden_BH, fed.logits_BV

    def advance(self, parent_B: Tensor | None, token_B: Tensor) -> tuple[Tensor, Tensor]:
        if parent_B is not None:
            self.cache.select(parent_B)
            self.position_B = self.position_B[parent_B]
        self.position_B = self.position_B + 1
        return self.engine.step(token_B, self.position_B, self.cache)

    def join(self, other: Self) -> tuple[Tensor, Tensor]:
        first = other.begin()
        assert isinstance(other.cache, RowCache)  # who has not begun has not been joined
        if isinstance(self.cache, Parts):
            self.cache.join(other.cache)
        else:
            self.cache = Parts(self.cache, other.cache)
        self.position_B = torch.cat([self.position_B, other.position_B])
        return first


@dataclass(frozen=True, slots=True)
class Part:
    """A prompt with its tokens, some of the call's requests for it, and the largest of their token budgets."""

    prompt: Prompt
    tokens: list[int]
    members: list[int]
    budget: int


def asked(engine: "LocalEngine", requests: Sequence[Request]) -> list[Part]:
    """The requests of a call by their prompts.

    Raises:
        ModelError: a prompt is empty, or does not fit in the context with its token budget.
    """
    of_prompt: dict[Prompt, list[int]] = {}
    for index, request in enumerate(requests):
        of_prompt.setdefault(request.prompt, []).append(index)
    budgets = [max(requests[index].max_tokens for index in members) for members in of_prompt.values()]
    tokens = engine.tokenize(list(of_prompt), budgets)
    return [Part(*part) for part in zip(of_prompt, tokens, of_prompt.values(), budgets, strict=True)]


class Waiting:
    """The requests of a call that have not begun, in batches of one shared prefix each.

    Where compiled kernels attend, and one batch cannot hold them all, batches are small and join the running one as its
    rows end. Elsewhere every batch runs by itself, and is as large as memory allows.
    """

    def __init__(self, engine: "LocalEngine", requests: Sequence[Request], whole: list[Part]) -> None:
        self._engine, self._requests = engine, requests
        self._own_tokens_N = torch.zeros(len(requests), dtype=torch.int64)  # what each keeps beside the shared prefix
        self._queue = self._split(whole)
        self._joins = engine.has_kernels and len(self._queue) > 1
        if self._joins:
            self._queue = self._split(whole, _JOINING)

    def _split(self, whole: list[Part], share: int = 1) -> deque[list[Part]]:
        """Batches, each within a ``share``-th of the memory."""
        parts: list[Part] = []
        for part in whole:
            most = max(1, self._engine.most_samples(part.prompt, len(part.tokens), part.budget) // share)
            members = part.members
            parts += [replace(part, members=members[first : first + most]) for first in range(0, len(members), most)]
        tokens, budgets = [part.tokens for part in parts], [part.budget for part in parts]
        batches = self._engine.batches(tokens, [len(part.members) for part in parts], budgets, share)
        return deque([[parts[index] for index in batch] for batch in batches])

    def next(self) -> Batch | None:
        """The next batch."""
        if not self._queue:
            return None
        parts = self._queue.popleft()
        rows = LocalRows(self._engine, [part.tokens for part in parts])
        for part in parts:
            self._own_tokens_N[part.members] = len(part.tokens) + part.budget - rows.prefix.length
        members = [(row, index) for row, part in enumerate(parts) for index in part.members]
        return Batch(rows, [self._requests[index] for _, index in members], *map(list, zip(*members, strict=True)))

    def next_beside(self, position_S: Tensor) -> Batch | None:
        """The next batch, if it fits beside the running requests."""
        if not self._joins or not self._queue:
            return None
        parts = self._queue[0]
        shared = _shared([part.tokens for part in parts])
        tokens = sum(len(part.members) * (len(part.tokens) + part.budget - shared) for part in parts)
        rows = sum(len(part.members) for part in parts)
        running = int(self._own_tokens_N[position_S].sum())
        return self.next() if self._engine.fits(running + tokens, len(position_S) + rows) else None


def _shared(prompts: Sequence[list[int]]) -> int:
    """How many tokens all prompts begin with; every one keeps one of its own."""
    return min(*(common_prefix(prompts[0], ids) for ids in prompts), min(map(len, prompts)) - 1)


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens both begin with."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))
