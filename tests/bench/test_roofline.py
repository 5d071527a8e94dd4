"""The roofline's arithmetic against SmolLM2-135M by hand, and its measurements on a tiny model."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rheostat.bench import roofline
from rheostat.bench.engine import _batch
from rheostat.bench.roofline import Step, bench_roofline, linears, matrix_rates, matrix_weights, step_of
from rheostat.console import Console
from rheostat.engines.layers import speed_up
from rheostat.engines.local import LocalEngine
from rheostat.types import Prompt

SMOLLM2 = SimpleNamespace(
    hidden_size=576,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    intermediate_size=1536,
    vocab_size=49_152,
)
# a layer: q and o 331,776 each, k and v 110,592 each, gate, up and down 884,736 each: 3,538,944; lm_head 28,311,552
WEIGHTS = 30 * 3_538_944 + 28_311_552


def test_weights_by_hand() -> None:
    assert WEIGHTS == 134_479_872
    assert matrix_weights(SMOLLM2) == WEIGHTS
    # the published count of parameters has the norms, 61 of 576, beside them; the embedding is lm_head's
    assert matrix_weights(SMOLLM2) + 61 * 576 == 134_515_008


def test_a_step_of_one_row_by_hand() -> None:
    step = step_of(SMOLLM2, 1, 1, 2)
    assert step.bytes == 2 * WEIGHTS + 23_040  # 30 layers × 3 heads × 64 × (key and value) × 2 bytes
    assert step.operations == 2 * WEIGHTS + 30 * 9 * (2 * 64 + 2 * 64)  # a score and a weighted sum of 64 in each head


def test_a_step_of_128_rows_by_hand() -> None:
    step = step_of(SMOLLM2, 128, 43, 4)
    assert step.bytes == 537_919_488 + 128 * 43 * 46_080
    assert step.operations == 128 * (268_959_744 + 43 * 69_120)


def test_heads_may_have_a_size_of_their_own() -> None:
    wide = SimpleNamespace(**vars(SMOLLM2) | {"head_dim": 128})
    assert matrix_weights(wide) == WEIGHTS + 30 * 884_736  # q, o, k and v are twice as large
    assert step_of(wide, 1, 1, 2).bytes == 2 * matrix_weights(wide) + 46_080


def test_the_longer_of_reading_and_multiplying_counts() -> None:
    step = Step(bytes=300, operations=4000)
    assert step.seconds(bandwidth=100, rate=4000) == 3
    assert step.seconds(bandwidth=300, rate=2000) == 2


def test_linear_layers_are_found_as_the_engine_lays_them_out() -> None:
    model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.ReLU(), nn.Sequential(nn.Linear(4, 9)))
    assert [sizes for _, *sizes in linears(model)] == [[6, 4], [4, 9]]
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        speed_up(model.bfloat16())
        found = linears(model)
        assert [sizes for _, *sizes in found] == [[6, 4], [4, 9]]
        assert not any(isinstance(layer, nn.Linear) for layer, *_ in found)


def test_the_rate_counts_two_operations_a_weight_and_row(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = linears(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 9)))
    monkeypatch.setattr(roofline, "_seconds", lambda run, device: run() or 0.5)
    assert matrix_rates(layers, 7, torch.float32, torch.device("cpu")) == [2 * 7 * 60 / 0.5] * 3


def test_bandwidth_counts_what_is_read_and_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_COPY_BYTES", 1000)
    monkeypatch.setattr(roofline, "_seconds", lambda run, device: 0.25 if run() is not None else 0)
    assert roofline.copy_bandwidths(torch.device("cpu")) == [8000] * 3


@pytest.mark.model
def test_roofline_of_smollm2(smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = LocalEngine(smollm2_path)
    engine.vocabulary.eos_ids = frozenset()
    assert sum(inputs * outputs for _, inputs, outputs in linears(engine.model)) == WEIGHTS
    monkeypatch.setattr(roofline, "_ROWS", (1, 3))
    monkeypatch.setattr(roofline, "_TOKENS", 6)
    monkeypatch.setattr(roofline, "_MATRIX_ROWS", (8,))
    monkeypatch.setattr(roofline, "_COPY_BYTES", 1 << 24)
    rows, ratios = bench_roofline(engine, 1, Console(quiet=True))
    found = {row["case"]: row["value"] for row in rows}
    assert set(ratios) == {"step of 1: local/roofline", "step of 3: local/roofline"}
    for count in (1, 3):
        ratio = found[f"step of {count}: roofline"] / found[f"step of {count}: local"]
        assert ratios[f"step of {count}: local/roofline"] == pytest.approx(ratio, abs=2e-3)
        assert 0 < ratio < 1
    context = len(engine.tokenizer("000 bottles of water stand on the table.")["input_ids"]) + 3
    expected = step_of(engine.model.config, 3, context, engine.model.dtype.itemsize)
    assert found["step of 3: bytes"] == pytest.approx(expected.bytes / 1e6, abs=1e-3)


def test_a_model_of_another_build_has_no_roofline(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Linear(3, 3)
    model.config = SimpleNamespace(get_text_config=lambda: SMOLLM2)  # type: ignore[assignment]
    engine = SimpleNamespace(model=model, info=SimpleNamespace(model="tiny"))
    assert bench_roofline(engine, 1, Console()) == ([], {})  # type: ignore[arg-type]
    assert "no roofline: tiny is not built like Llama" in capsys.readouterr().err


def test_generate_takes_the_queue_in_turn() -> None:
    prompts = [Prompt(str(number), str(number)) for number in range(32)]
    budgets = [100 * prompt + sample for prompt in range(32) for sample in range(8)]
    seen = []
    for turn in range(5):
        some, samples, their_budgets = _batch(prompts, 8, budgets, turn)
        assert samples == 8
        assert their_budgets == [100 * int(p.text) + sample for p in some for sample in range(8)]
        seen.append([int(p.text) for p in some])
    assert seen == [[*range(0, 8)], [*range(8, 16)], [*range(16, 24)], [*range(24, 32)], [*range(0, 8)]]
    assert _batch(prompts, 1, budgets[:32], 3) == (prompts, 1, budgets[:32])
