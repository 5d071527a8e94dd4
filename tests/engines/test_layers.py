"""The engine's faster layers against transformers' and against float64; test_local.py runs them in float32."""

import pytest
import torch
import transformers
from test_local import CONTEXT, config_of, save_model
from torch import Tensor, nn

from rheostat.decoding.policy import Decision, StepState
from rheostat.decoding.strategy import Strategy
from rheostat.engines import layers
from rheostat.engines.base import Request
from rheostat.engines.layers import Layer, Linear, PackedLinear, speed_up
from rheostat.engines.local import LocalEngine
from rheostat.types import Prompt

KINDS = [(Linear, torch.bfloat16), (Linear, torch.float32)]
if torch.backends.mkldnn.is_available():
    KINDS.append((PackedLinear, torch.float32))
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        KINDS.append((PackedLinear, torch.bfloat16))


def assert_near(found: Tensor, exact: Tensor) -> None:
    """Within what two roundings lose."""
    tolerance = 2**-6 if found.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.double(), exact, rtol=tolerance / 2, atol=tolerance)


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (2, 7)])
def test_linear_layers_and_what_follows_them(
    kind: type[Linear], dtype: torch.dtype, has_bias: bool, shape: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(1)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    x, other, weight, bias = random(*shape, 24), random(*shape, 40), random(40, 24) / 5, random(40)
    layer = kind(weight, bias if has_bias else None)
    exact = x.double() @ weight.double().T + (bias.double() if has_bias else 0)
    assert_near(layer(x), exact)
    assert_near(layer.silu(x), exact * exact.sigmoid())
    assert_near(layer.times(x, other), exact * other.double())
    assert_near(layer.plus(x, other), exact + other.double())


@pytest.mark.parametrize(
    "architecture", ["llama", "qwen2", "qwen3", "mistral", "llama-wide", "qwen2-wide", "qwen3-wide"]
)
@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 4), (torch.bfloat16, 1.3)])
def test_a_pass_errs_like_transformers(
    architecture: str, dtype: torch.dtype, factor: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    fields = {"sliding_window": None} if architecture == "mistral" else {}
    folder = save_model(tmp_path_factory.mktemp(architecture), config_of(architecture, **fields))
    engine = LocalEngine(folder, dtype=dtype, device="cpu")
    assert all(isinstance(layer, Layer) for layer in engine.model.base_model.layers)
    assert all((layer.kernels is not None) == architecture.endswith("wide") for layer in engine.model.base_model.layers)
    seen: list[Tensor] = []

    class Watch:
        def observe(self, state: StepState, decision: Decision, token_S: Tensor) -> None:
            seen.append(state.hidden_BH[0].double())

    text = "the dial turns and the current flows"
    (done,) = engine.generate([Request(Prompt(text, text), Strategy(), 0, 0, 40)], observer=Watch())
    ids = engine.encode(text) + list(done.token_ids)
    assert len(ids) < CONTEXT

    def plain(of: torch.dtype) -> Tensor:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(of)
        with torch.inference_mode():
            hidden_LH = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
        return hidden_LH[len(ids) - len(seen) - 1 : -1].double()

    exact_LH = plain(torch.float64)

    def error(found_LH: Tensor) -> float:
        return float(((found_LH - exact_LH).norm(dim=-1) / exact_LH.norm(dim=-1)).mean())

    assert error(torch.stack(seen)) < factor * error(plain(dtype))


def test_layers_of_another_kind_stay() -> None:
    model = transformers.AutoModelForCausalLM.from_config(config_of("gemma"), dtype=torch.float32)
    before = list(model.base_model.layers)
    speed_up(model)
    assert list(model.base_model.layers) == before
    assert type(model.base_model.layers[0].mlp.up_proj) is nn.Linear


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN here")
def test_a_large_lm_head_is_packed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformers.AutoModelForCausalLM.from_config(config_of("llama"), dtype=torch.float32).eval()
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        expected_LV = model(ids).logits
        monkeypatch.setattr(layers, "_MANY_OUTPUTS", model.config.vocab_size)
        model.lm_head = layers._kind(model.lm_head)(model.lm_head.weight, None)
        torch.testing.assert_close(model(ids).logits, expected_LV, rtol=1e-4, atol=1e-5)
    assert type(model.lm_head) is PackedLinear


def test_one_layer_of_another_kind_keeps_them_all() -> None:
    """Rotated positions are made once for all layers."""
    model = transformers.AutoModelForCausalLM.from_config(config_of("llama"), dtype=torch.float32)
    model.base_model.layers[1].mlp.act_fn = nn.GELU()
    speed_up(model)
    assert not any(isinstance(module, Layer) for module in model.modules())
