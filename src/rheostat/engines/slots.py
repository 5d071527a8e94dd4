"""Rows of a running batch in the local engine: each with a length of its own, joining and leaving at any pass.

A pass of the model runs over one flat list of tokens: the next token of every running row, and pieces of the prompts
that are joining. Everything but attention treats them alike, so that the weights are read once for all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import Cache

from rheostat.engines.continuous import Fed
from rheostat.engines.kernels import Place

if TYPE_CHECKING:
    from rheostat.engines.local import LocalEngine

_CACHE_BYTES = 2 << 30  # keys and values of all rows on a CPU
_ROOM, _ROWS = 64, 8  # tokens and rows by which buffers grow: copies stay rare, waste stays small


@dataclass(frozen=True, slots=True)
class _Piece:
    """``count`` tokens of one row that begin at ``start`` in the row and at ``first`` in the pass."""

    row: int
    start: int
    first: int
    count: int


class SlotCache(Cache):  # type: ignore[misc]  # transformers is untyped
    """Keys and values: per layer a pair of shape (rows, KV heads, room, head size), of which row i uses ``lengths[i]``.

    Unused room holds zeros or what an earlier row left there: finite, so that a weight of zero silences it.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.buffers: list[tuple[Tensor, Tensor]] = []
        self.lengths: list[int] = []
        self._rows = self._room = 0
        self._single = 0  # rows at the front that are continued by one token
        self._pieces: list[_Piece] = []
        self._position_S = torch.empty(0, dtype=torch.int64)
        self._mask_SC = torch.empty(0)

    def begin(self, counts: Sequence[int], device: torch.device) -> None:
        """The next pass continues row i by ``counts[i]`` tokens; rows beyond the known ones are new."""
        self.lengths += [0] * (len(counts) - len(self.lengths))
        self._single = next((i for i, count in enumerate(counts) if count != 1), len(counts))
        self._pieces, first = [], self._single
        for row in range(self._single, len(counts)):
            self._pieces.append(_Piece(row, self.lengths[row], first, counts[row]))
            first += counts[row]
        self.reserve(len(counts), max(a + b for a, b in zip(self.lengths, counts, strict=True)))
        self._position_S = torch.tensor(self.lengths[: self._single], dtype=torch.int64, device=device)
        end = max(self.lengths[: self._single], default=0) + 1
        # matrix products first copy what is not dense, so that a part of the room is looked at only where it is small
        width = self._room if 2 * end > self._room else end
        hidden_SC = torch.arange(width, device=device) > self._position_S[:, None]
        self._mask_SC = torch.zeros(hidden_SC.shape, device=device).masked_fill_(hidden_SC, -torch.inf)

    def reserve(self, rows: int, room: int) -> None:
        """Room for so many rows and tokens."""
        if rows <= self._rows and room <= self._room:
            return
        used, longest = min(self._rows, rows, len(self.lengths)), max(self.lengths, default=0)
        room = max(room, longest)
        self._rows, self._room = -(-rows // _ROWS) * _ROWS, -(-room // _ROOM) * _ROOM
        for index, pair in enumerate(self.buffers):
            self.buffers[index] = (self._grown(pair[0], used, longest), self._grown(pair[1], used, longest))

    def _grown(self, buffer: Tensor, rows: int, tokens: int) -> Tensor:
        grown = buffer.new_zeros(self._rows, buffer.shape[1], self._room, buffer.shape[3])
        grown[:rows, :, :tokens] = buffer[:rows, :, :tokens]
        return grown

    def places(self, layer: int, states: Tensor, groups: int, size: int) -> list[Place] | None:
        """Where kernels work for ``layer``, given the pass's hidden states; None: pieces of prompts are among them."""
        if self._pieces:
            return None
        if layer == len(self.buffers):
            shape = (self._rows, groups, self._room, size)
            self.buffers.append((states.new_zeros(shape), states.new_zeros(shape)))
        keys, values = (buffer[: self._single] for buffer in self.buffers[layer])
        return [Place(keys, values, torch.zeros_like(self._position_S), self._position_S + 1, None)]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the pass's keys and values, of shape (1, KV heads, tokens, head size), into their rows."""
        if layer_idx == len(self.buffers):
            shape = (self._rows, key_states.shape[1], self._room, key_states.shape[3])
            self.buffers.append((key_states.new_zeros(shape), value_states.new_zeros(shape)))
        row_S = torch.arange(self._single, device=key_states.device)
        for buffer, (new,) in zip(self.buffers[layer_idx], (key_states, value_states), strict=True):
            buffer[row_S, :, self._position_S] = new[:, : self._single].transpose(0, 1)
            for piece in self._pieces:
                end = piece.start + piece.count
                buffer[piece.row, :, piece.start : end] = new[:, piece.first : piece.first + piece.count]
        return self.buffers[layer_idx]

    def attend(
        self,
        query: Float[Tensor, "1 Q N D"],
        key: Float[Tensor, "B G C D"],
        value: Float[Tensor, "B G C D"],
        scaling: float,
    ) -> Float[Tensor, "1 N Q D"]:
        """Every token of the pass sees its own row up to itself. Queries are grouped by their KV head."""
        heads, tokens, size = query.shape[1:]
        groups = key.shape[1]
        out_NQD = torch.empty(tokens, heads, size, dtype=query.dtype, device=query.device)
        if self._single:
            rows, width = self._mask_SC.shape
            query_S = query[0, :, :rows].transpose(0, 1).reshape(rows, groups, heads // groups, size)
            score_S = torch.matmul(query_S, key[:rows, :, :width].mT)
            score_S = self._mask_SC[:, None, None].add(score_S, alpha=scaling)
            mixed_S = torch.matmul(score_S.softmax(-1).to(value.dtype), value[:rows, :, :width])
            out_NQD[:rows] = mixed_S.reshape(rows, heads, size)
        for piece in self._pieces:
            last, end = piece.first + piece.count, piece.start + piece.count
            query_G = query[0, :, piece.first : last].reshape(groups, -1, size)
            score_G = torch.matmul(query_G, key[piece.row, :, :end].mT).float().mul_(scaling)
            at_C = torch.arange(end, device=query.device)
            hidden_LC = at_C > at_C[piece.start :, None]
            score_G = score_G.view(groups, -1, piece.count, end).masked_fill_(hidden_LC, -torch.inf)
            weight_G = score_G.softmax(-1).to(value.dtype).view(groups, -1, end)
            mixed_G = torch.matmul(weight_G, value[piece.row, :, :end])
            out_NQD[piece.first : last] = mixed_G.view(heads, piece.count, size).transpose(0, 1)
        return out_NQD[None]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(self.lengths, default=0)


class LocalSlots:
    """See :class:`rheostat.engines.continuous.Slots`."""

    def __init__(self, engine: "LocalEngine") -> None:
        self._engine = engine
        self._cache = SlotCache()
        most = min(engine.batch_bytes, _CACHE_BYTES) if engine.device.type == "cpu" else engine.batch_bytes
        self.capacity = max(1, most // engine.bytes_per_token)

    @torch.inference_mode()
    def feed(self, tokens: Sequence[Sequence[int]]) -> Fed:
        cache, device = self._cache, self._engine.device
        counts = [len(own) for own in tokens]
        cache.begin(counts, device)
        positions = [
            at for row, count in enumerate(counts) for at in range(cache.lengths[row], cache.lengths[row] + count)
        ]
        ends = torch.tensor(counts).cumsum(0) - 1
        hidden_NH, logits_BV = self._engine.run_flat(
            torch.tensor([token for own in tokens for token in own], device=device),
            torch.tensor(positions, device=device),
            ends.to(device),
            cache,
        )
        cache.lengths = [length + count for length, count in zip(cache.lengths, counts, strict=True)]
        single = next((i for i, count in enumerate(counts) if count != 1), len(counts))
        sum_BH = hidden_NH[ends].float()
        for row in range(single, len(counts)):
            sum_BH[row] = hidden_NH[ends[row] + 1 - counts[row] : ends[row] + 1].float().sum(0)
        return Fed(hidden_NH[ends], logits_BV, sum_BH)

    @torch.inference_mode()
    def copy(self, source: int, target: int) -> None:
        cache = self._cache
        length = cache.lengths[source]
        cache.lengths += [0] * (target + 1 - len(cache.lengths))
        cache.reserve(len(cache.lengths), length)
        for pair in cache.buffers:
            for buffer in pair:
                buffer[target, :, :length] = buffer[source, :, :length]
        cache.lengths[target] = length

    def keep(self, rows: int) -> None:
        del self._cache.lengths[rows:]
        if not rows:
            self._cache = SlotCache()
