"""Attention and key-value cache of the local engine: one shared prefix, and each row's own tokens.

The prefix that all prompts of a batch share is computed and held once; its scores are one matrix product for
all rows together. A row's own keys and values lie in buffers with room to grow. Rows are selected (forked,
dropped) by their parents.

Attention looks at all of the room, and a mask hides what is unused: a CPU's matrix products copy what is not dense,
which costs two to four times what the unused room does.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache

from rheostat.engines.kernels import Place
from rheostat.engines.slots import SlotCache

NAME = "rheostat"
_ROOM = 32  # tokens by which a buffer grows: copies stay rare, waste stays small


class Prefix:
    """Keys and values of the shared prefix: per layer a pair of shape (KV heads, tokens, head size)."""

    def __init__(self, layers: list[tuple[Tensor, Tensor]], length: int, hidden_sum_H: Tensor | None = None) -> None:
        self.layers, self.length, self.hidden_sum_H = layers, length, hidden_sum_H


class RowCache(Cache):  # type: ignore[misc]  # transformers is untyped
    """The rows' own keys and values: per layer a pair of shape (rows, KV heads, room, head size).

    Unused room holds zeros.

    Args:
        prefix: what all rows share.
        padding_B: how many of each row's first tokens nobody sees.
    """

    def __init__(self, prefix: Prefix, padding_B: Int[Tensor, " B"]) -> None:
        super().__init__(layers=[])
        self.prefix, self.padding_B = prefix, padding_B
        self.buffers: list[tuple[Tensor, Tensor]] = []
        self.length = 0
        self._end_B: Tensor | None = None

    def _room(self, tokens: int) -> int:
        """What the buffers need for ``tokens`` more tokens."""
        return -(-(self.length + tokens) // _ROOM) * _ROOM

    def places(self, layer: int, states: Tensor, groups: int, size: int) -> list[Place] | None:
        """Where kernels work for ``layer``, given the pass's hidden states; None: more than a token for each row."""
        rows, length, _ = states.shape
        if length != 1:
            return None
        if layer == len(self.buffers):
            self.buffers.append((states.new_zeros(rows, groups, 0, size),) * 2)
        keys, values = self._with_room(layer, 1)
        if self._end_B is None:
            self._end_B = torch.full((rows,), self.length + 1)
        prefix = self.prefix.layers[layer] if self.prefix.length else None
        return [Place(keys, values, self.padding_B, self._end_B, prefix)]

    def mask_of_step(self) -> Float[Tensor, "B 1 1 P+room"]:
        """The mask of a pass of one token for each row."""
        own_C = torch.arange(self.length + 1, device=self.padding_B.device)
        return self.mask((own_C < self.padding_B[:, None])[:, None, None])

    def mask(self, hidden: Bool[Tensor, "B 1 L C"]) -> Float[Tensor, "B 1 L P+room"]:
        """What :func:`attend` adds to the scores of a pass of L tokens; C counts the rows' own tokens, these included.

        Hidden ones, and the room that is not used, are not seen.
        """
        *shape, end = hidden.shape
        before = self.prefix.length
        mask = torch.full((*shape, before + self._room(shape[-1])), -torch.inf, device=hidden.device)
        mask[..., :before] = 0
        mask[..., before : before + end].masked_fill_(~hidden, 0)
        return mask

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append at ``length`` and return the buffers; ``step`` moves ``length``."""
        end = self.length + key_states.shape[2]
        if layer_idx == len(self.buffers):
            self.buffers.append((key_states[:, :, :0], value_states[:, :, :0]))
        keys, values = self._with_room(layer_idx, key_states.shape[2])
        keys[:, :, self.length : end] = key_states
        values[:, :, self.length : end] = value_states
        return keys, values

    def _with_room(self, layer: int, tokens: int) -> tuple[Tensor, Tensor]:
        """The layer's buffers, grown where ``tokens`` more do not fit."""
        room = self._room(tokens)
        if self.buffers[layer][0].shape[2] != room:
            keys, values = self.buffers[layer]
            self.buffers[layer] = _grown(keys, room), _grown(values, room)
        return self.buffers[layer]

    def step(self, tokens: int) -> None:
        """All layers have appended ``tokens`` tokens."""
        self.length += tokens
        self._end_B = None

    def select(self, parent_B: Tensor) -> None:
        """Row i becomes a copy of row ``parent_B[i]``."""
        self.padding_B, self._end_B = self.padding_B[parent_B], None
        for layer, (keys, values) in enumerate(self.buffers):  # one at a time: not all layers are there twice
            self.buffers[layer] = keys[parent_B], values[parent_B]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.prefix.length + self.length


class Parts(Cache):  # type: ignore[misc]  # transformers is untyped
    """The caches of batches that take their steps together, one after the other: each with its own prefix and length.

    Steps of one token for each row, by compiled kernels, and nothing else.
    """

    prefix = None

    def __init__(self, first: RowCache, second: RowCache) -> None:
        super().__init__(layers=[])
        self.parts = [first, second]

    def join(self, part: RowCache) -> None:
        """``part``'s rows come after all others."""
        self.parts.append(part)

    def places(self, layer: int, states: Tensor, groups: int, size: int) -> list[Place] | None:
        """See :meth:`RowCache.places`."""
        found, first = [], 0
        for part in self.parts:
            end = first + len(part.padding_B)
            places = part.places(layer, states[first:end], groups, size)
            if places is None:
                return None
            found += places
            first = end
        return found

    def step(self, tokens: int) -> None:
        """See :meth:`RowCache.step`."""
        for part in self.parts:
            part.step(tokens)

    def select(self, parent_B: Tensor) -> None:
        """See :meth:`RowCache.select`; rising parents keep every row in its part. Parts without rows are let go."""
        bounds = torch.tensor([len(part.padding_B) for part in self.parts]).cumsum(0)
        counts = torch.bincount(torch.searchsorted(bounds, parent_B, right=True), minlength=len(self.parts)).tolist()
        kept, first = [], 0
        for part, end, own_B in zip(self.parts, bounds.tolist(), torch.split(parent_B, counts), strict=True):
            if len(own_B):
                part.select(own_B - first)
                kept.append(part)
            first = end
        self.parts = kept

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(part.get_seq_length() for part in self.parts)


def _grown(buffer: Tensor, room: int) -> Tensor:
    """A copy with more room."""
    rows, heads, used, size = buffer.shape
    grown = buffer.new_empty(rows, heads, room, size)
    grown[:, :, :used] = buffer
    grown[:, :, used:] = 0
    return grown


def attend(
    module: nn.Module,
    query: Float[Tensor, "B Q L D"],
    key: Float[Tensor, "B G C D"],
    value: Float[Tensor, "B G C D"],
    attention_mask: Float[Tensor, "B 1 L P+C"],
    scaling: float,
    rheostat_prefix: Prefix | None = None,
    rheostat_slots: SlotCache | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Grouped-query attention over the shared prefix and the rows' own tokens.

    Queries are grouped by their KV head, so a step is two small batched matrix products per layer; torch's own
    kernel costs an order of magnitude more on a CPU with one query per row. The mask is additive and float32; its
    columns are those of prefix and room. The rows of a running batch attend by themselves
    (:mod:`rheostat.engines.slots`).
    """
    if rheostat_slots is not None:
        return rheostat_slots.attend(query, key, value, scaling), None
    rows, heads, length, size = query.shape
    groups = key.shape[1]
    per_group = heads // groups * length
    query = query.reshape(rows, groups, per_group, size)
    score = torch.matmul(query, key.mT)
    tokens = 0 if rheostat_prefix is None else rheostat_prefix.length
    if rheostat_prefix is not None and tokens:
        prefix_key, prefix_value = rheostat_prefix.layers[int(module.layer_idx)]  # type: ignore[arg-type]
        flat = query.transpose(0, 1).reshape(groups, rows * per_group, size)
        shared = torch.matmul(flat, prefix_key.mT).view(groups, rows, per_group, tokens).transpose(0, 1)
        score = torch.cat((shared, score), dim=-1)
    score = score.view(rows, heads, length, -1)
    score = attention_mask.add(score, alpha=scaling)  # scaled, masked and made float32 in one pass
    weight = score.softmax(-1).to(value.dtype).view(rows, groups, per_group, -1)
    out = torch.matmul(weight[..., tokens:], value)
    if tokens:
        flat = weight[..., :tokens].transpose(0, 1).reshape(groups, rows * per_group, tokens)
        out += torch.matmul(flat, prefix_value).view(groups, rows, per_group, size).transpose(0, 1)
    return out.reshape(rows, heads, length, size).transpose(1, 2), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, lambda *_, **__: None)  # the engine brings its own mask
