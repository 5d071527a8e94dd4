"""Attention and key-value cache of the local engine: one shared prefix, and each row's own tokens.

The prefix that all prompts of a batch share is computed and held once; its scores are one matrix product for
all rows together. A row's own keys and values lie in buffers with room to grow. Rows are selected (forked,
dropped) by their parents.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache

from rheostat.engines.slots import SlotCache

NAME = "rheostat"
_ROOM = 64  # tokens by which a buffer grows: copies stay rare, waste stays small


class Prefix:
    """Keys and values of the shared prefix: per layer a pair of shape (KV heads, tokens, head size)."""

    def __init__(self, layers: list[tuple[Tensor, Tensor]], length: int, hidden_sum_H: Tensor | None = None) -> None:
        self.layers, self.length, self.hidden_sum_H = layers, length, hidden_sum_H


class RowCache(Cache):  # type: ignore[misc]  # transformers is untyped
    """The rows' own keys and values: per layer a pair of shape (rows, KV heads, room, head size)."""

    def __init__(self, prefix: Prefix) -> None:
        super().__init__(layers=[])
        self.prefix = prefix
        self.buffers: list[tuple[Tensor, Tensor]] = []
        self.length = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append at ``length`` and return all of the rows' own keys and values; ``step`` moves ``length``."""
        end = self.length + key_states.shape[2]
        if layer_idx == len(self.buffers):
            self.buffers.append((key_states[:, :, :0], value_states[:, :, :0]))
        buffers = self.buffers[layer_idx]
        if buffers[0].shape[2] < end:
            keys, values = (_grown(buffer, self.length, end) for buffer in buffers)
            buffers = self.buffers[layer_idx] = (keys, values)
        for buffer, new in zip(buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.length : end] = new
        return buffers[0][:, :, :end], buffers[1][:, :, :end]

    def step(self, tokens: int) -> None:
        """All layers have appended ``tokens`` tokens."""
        self.length += tokens

    def select(self, parent_B: Tensor) -> None:
        """Row i becomes a copy of row ``parent_B[i]``."""
        for index, (keys, values) in enumerate(self.buffers):
            self.buffers[index] = (
                _grown(keys[:, :, : self.length][parent_B], self.length, self.length + 1),
                _grown(values[:, :, : self.length][parent_B], self.length, self.length + 1),
            )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.prefix.length + self.length


def _grown(buffer: Tensor, used: int, needed: int) -> Tensor:
    """A copy of the first ``used`` tokens of ``buffer`` with room for at least ``needed``."""
    rows, heads, _, size = buffer.shape
    room = -(-needed // _ROOM) * _ROOM
    grown = buffer.new_empty(rows, heads, room, size)
    grown[:, :, :used] = buffer[:, :, :used]
    return grown


def attend(
    module: nn.Module,
    query: Float[Tensor, "B Q L D"],
    key: Float[Tensor, "B G C D"],
    value: Float[Tensor, "B G C D"],
    attention_mask: Float[Tensor, "B 1 L C"] | None,
    scaling: float,
    rheostat_prefix: Prefix | None = None,
    rheostat_slots: SlotCache | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Grouped-query attention over the shared prefix and the rows' own tokens.

    Queries are grouped by their KV head, so a step is two small batched matrix products per layer; torch's own
    kernel costs an order of magnitude more on a CPU with one query per row. The mask is additive; the prefix
    is visible to every query. The rows of a running batch attend by themselves (:mod:`rheostat.engines.slots`).
    """
    if rheostat_slots is not None:
        return rheostat_slots.attend(query, key, value, scaling), None
    rows, heads, length, size = query.shape
    groups = key.shape[1]
    per_group = heads // groups * length
    query = (query * scaling).reshape(rows, groups, per_group, size)
    own = torch.matmul(query, key.transpose(2, 3)).float()
    if attention_mask is not None:
        own = (own.view(rows, heads, length, -1) + attention_mask).view(rows, groups, per_group, -1)
    if rheostat_prefix is None or rheostat_prefix.length == 0:
        out = torch.matmul(own.softmax(-1).to(value.dtype), value)
    else:
        prefix_key, prefix_value = rheostat_prefix.layers[int(module.layer_idx)]  # type: ignore[arg-type]
        tokens = rheostat_prefix.length
        flat = query.transpose(0, 1).reshape(groups, rows * per_group, size)
        shared = torch.matmul(flat, prefix_key.transpose(1, 2)).view(groups, rows, per_group, tokens)
        weight = torch.cat((shared.transpose(0, 1).float(), own), dim=-1).softmax(-1).to(value.dtype)
        flat = weight[..., :tokens].transpose(0, 1).reshape(groups, rows * per_group, tokens)
        from_prefix = torch.matmul(flat, prefix_value).view(groups, rows, per_group, size).transpose(0, 1)
        out = torch.matmul(weight[..., tokens:], value) + from_prefix
    return out.reshape(rows, heads, length, size).transpose(1, 2), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, lambda *_, **__: None)  # the engine brings its own mask


class PackedLinear(nn.Module):
    """A linear layer whose bfloat16 weight oneDNN has laid out for its kernels: 1.1 to 2 times as fast on CPUs."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 64)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")  # type: ignore[no-any-return]


def pack_linears(model: nn.Module) -> None:
    """Replace every linear layer of a bfloat16 CPU model by its packed form. The model is for inference only."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and child.weight.dtype == torch.bfloat16:
                setattr(module, name, PackedLinear(child))
