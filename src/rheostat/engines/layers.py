"""A model's layers with fewer and larger operations than transformers has, for inference.

A step for a few rows is small: on a CPU half of it goes into some fifty operations per layer around the matrix
products. Here queries, keys and values are one product, queries and keys turn together, and where oneDNN runs the
linear layers, activation, gating and residual sums happen where these write. Layers of another kind stay as they
are, their linear layers packed.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from rheostat.engines.attention import attend
from rheostat.engines.kernels import Kernels, kernels

_MANY_OUTPUTS = 30_000  # more than layers have, as many as vocabularies
_KINDS = (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer, Qwen3DecoderLayer)


class Linear(nn.Module):
    """x W^T + b, and what often follows it."""

    def __init__(self, weight: Float[Tensor, "O I"], bias: Float[Tensor, " O"] | None) -> None:
        super().__init__()
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        outputs, inputs = self.weight.shape
        return outputs, inputs

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)

    def silu(self, x: Tensor) -> Tensor:
        """silu of the layer's output."""
        return functional.silu(self.forward(x), inplace=True)

    def times(self, x: Tensor, factor: Tensor) -> Tensor:
        """The layer's output times ``factor``, element by element."""
        return self.forward(x).mul_(factor)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """The layer's output and ``residual``, summed."""
        return self.forward(x).add_(residual)


class PackedLinear(Linear):
    """The same on a CPU, with the weight laid out for oneDNN's kernels.

    In bfloat16 1.1 to 2 times as fast; in float32 (AVX2) 1.5 to 2.9 times for an lm_head, no faster for a layer's own.
    """

    def __init__(self, weight: Float[Tensor, "O I"], bias: Float[Tensor, " O"] | None) -> None:
        super().__init__(torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 64), bias)

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x, "none")

    def silu(self, x: Tensor) -> Tensor:
        return self._product(x, "swish")

    def times(self, x: Tensor, factor: Tensor) -> Tensor:
        return self._product_with(x, factor, "mul")

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        return self._product_with(x, residual, "add")

    def _product(self, x: Tensor, activation: str) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, activation, [], "")  # type: ignore[no-any-return]

    def _product_with(self, x: Tensor, other: Tensor, operation: str) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, operation)  # type: ignore[no-any-return]


class Norm(nn.Module):
    """RMSNorm of a layer of transformers', computed in float32."""

    def __init__(self, norm: Any, kernels: Kernels | None) -> None:
        super().__init__()
        self.weight, self.epsilon = norm.weight.detach(), norm.variance_epsilon
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        if self.kernels is not None and x.is_contiguous():
            return self.kernels.norm(x, self.weight, self.epsilon)
        return functional.rms_norm(x, x.shape[-1:], self.weight, self.epsilon)


class Layer(nn.Module):
    """A decoder layer as Llama, Mistral, Qwen2 and Qwen3 have it; called as transformers calls its own.

    Its ``position_embeddings`` are those of :class:`Rotary`.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        attention, feed_forward = layer.self_attn, layer.mlp
        self.size: int = attention.head_dim
        self.scaling: float = attention.scaling
        self.layer_idx: int = attention.layer_idx
        parts = [attention.q_proj, attention.k_proj, attention.v_proj]
        self.heads, self.groups = (len(part.weight) // self.size for part in parts[:2])
        kind = _kind(parts[0])
        bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
        self.qkv = kind(torch.cat([part.weight for part in parts]), bias)
        self.out = kind(attention.o_proj.weight, attention.o_proj.bias)
        self.gate = kind(feed_forward.gate_proj.weight, feed_forward.gate_proj.bias)
        self.up = kind(feed_forward.up_proj.weight, feed_forward.up_proj.bias)
        self.down = kind(feed_forward.down_proj.weight, feed_forward.down_proj.bias)
        weight = parts[0].weight
        self.kernels = (
            kernels(weight.dtype, self.size, self.heads // self.groups) if weight.device.type == "cpu" else None
        )
        self.before_attention = Norm(layer.input_layernorm, self.kernels)
        self.before_feed_forward = Norm(layer.post_attention_layernorm, self.kernels)
        self.head_norm_KD: Tensor | None = None
        self.epsilon = 0.0
        if hasattr(attention, "q_norm"):  # Qwen3: of every query and key by itself
            norms = [attention.q_norm] * self.heads + [attention.k_norm] * self.groups
            self.head_norm_KD = torch.stack([norm.weight.detach() for norm in norms])
            self.epsilon = attention.q_norm.variance_epsilon

    def forward(
        self,
        hidden_states: Float[Tensor, "B L H"],
        attention_mask: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Any,
        **kwargs: Any,
    ) -> Float[Tensor, "B L H"]:
        rows, length, _ = hidden_states.shape
        qkv = self.qkv(self.before_attention(hidden_states))
        mixed = self._step(qkv, hidden_states, position_embeddings, past_key_values)
        if mixed is None:
            mixed = self._attention(qkv, attention_mask, position_embeddings, past_key_values, **kwargs)
        hidden_states = self.out.plus(mixed.reshape(rows, length, -1), hidden_states)
        x = self.before_feed_forward(hidden_states)
        return self.down.plus(self.up.times(x, self.gate.silu(x)), hidden_states)

    def _step(self, qkv: Tensor, hidden_states: Tensor, positions: tuple[Tensor, Tensor], cache: Any) -> Tensor | None:
        """Attention of a token for each row, where kernels can do it."""
        if self.kernels is None:
            return None
        places = cache.places(self.layer_idx, hidden_states, self.groups, self.size)
        if places is None:
            return None
        qkv, cos, sin = (part.view(-1, part.shape[-1]) for part in (qkv, *positions))
        return self.kernels.attend(qkv, cos, sin, self.scaling, places, self.head_norm_KD, self.epsilon)

    def _attention(
        self,
        qkv: Tensor,
        attention_mask: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Attention as torch does it."""
        qkv = qkv.view(*qkv.shape[:2], -1, self.size)
        turning, value = qkv[:, :, : -self.groups], qkv[:, :, -self.groups :]
        if self.head_norm_KD is not None:
            turning = functional.rms_norm(turning, (self.size,), eps=self.epsilon) * self.head_norm_KD
        cos, sin = position_embeddings
        turned = torch.addcmul(turning * cos, turning.roll(self.size // 2, -1), sin)
        query, key = turned[:, :, : self.heads].transpose(1, 2), turned[:, :, self.heads :].transpose(1, 2)
        keys, values = past_key_values.update(key, value.transpose(1, 2), self.layer_idx)
        return attend(self, query, keys, values, attention_mask, self.scaling, **kwargs)[0]


class Rotary(nn.Module):
    """cos and sin of a model's positions for all heads, the first half of sin negative.

    With these x cos + roll(x) sin is the rotation: rolled by half, a head's second half stands where it is subtracted.
    """

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Float[Tensor, "B L 1 D"], Float[Tensor, "B L 1 D"]]:
        cos, sin = self.rotary(x, position_ids=position_ids)
        sin[..., : sin.shape[-1] // 2].neg_()
        return cos[:, :, None], sin[:, :, None]


def speed_up(model: nn.Module) -> bool:
    """Replace what this module has a faster form of, in place. What a layer was made of is let go.

    Returns whether its steps are those of :mod:`rheostat.engines.kernels`.
    """
    base: Any = getattr(model, "base_model", model)
    layers = getattr(base, "layers", None)
    if layers is not None and all(_is_known(layer) for layer in layers):
        for index, layer in enumerate(layers):
            layers[index] = Layer(layer)
        base.rotary_emb = Rotary(base.rotary_emb)
        base.norm = Norm(base.norm, base.layers[0].kernels)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and _kind(child) is PackedLinear:
                setattr(module, name, PackedLinear(child.weight, child.bias))
    return any(isinstance(module, Layer) and module.kernels is not None for module in model.modules())


def _is_known(layer: Any) -> bool:
    if type(layer) not in _KINDS:
        return False
    linears = [child for name, child in layer.named_modules() if name.endswith("_proj")]
    return all(type(linear) is nn.Linear for linear in linears) and type(layer.mlp.act_fn) is type(ACT2FN["silu"])


def _kind(linear: nn.Linear) -> type[Linear]:
    weight = linear.weight
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return Linear
    if weight.dtype == torch.bfloat16:
        return PackedLinear if torch.ops.mkldnn._is_mkldnn_bf16_supported() else Linear
    return PackedLinear if weight.dtype == torch.float32 and len(weight) >= _MANY_OUTPUTS else Linear
