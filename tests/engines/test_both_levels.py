"""A token-level adapter that starts from a sequence-level one: before training it is that one, wherever it decodes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_local import config_of, save_model
from torch import Tensor

from rheostat.adapters.files import BaseModel, load_adapter, save_adapter
from rheostat.adapters.sequence import PromptFeatures, SequenceAdapter, SequenceConfig
from rheostat.adapters.token import AdaptiveDecoding, TokenAdapter, TokenConfig, TokenInputs
from rheostat.decoding.recording import Recorder, Steps
from rheostat.decoding.spaces import TABLE_14
from rheostat.decoding.strategy import Order
from rheostat.engines.base import Engine, Request
from rheostat.engines.fake import FakeEngine
from rheostat.engines.local import LocalEngine
from rheostat.errors import AdapterError, ConfigError
from rheostat.training.prompts import represent
from rheostat.training.surrogate import inputs_of
from rheostat.types import Prompt

TEXTS = ("12+3=", "a", "zebra crossing")
BASE = BaseModel("owner/base-model", None, 16, "f00d")


def sequence_of(hidden_size: int = 16, features: str = "hidden", **fields: Any) -> SequenceAdapter:
    config = SequenceConfig(hidden_size, width=8, budget_width=4, features=PromptFeatures(features), **fields)
    adapter = SequenceAdapter(config, TABLE_14, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        adapter.output.weight.normal_(std=2, generator=generator)
    adapter.standardizer.fit(torch.randn(30, config.inputs, generator=generator))
    return adapter.eval()


def both_levels(sequence: SequenceAdapter, is_trained: bool = False, **fields: Any) -> TokenAdapter:
    config = TokenConfig(sequence.config.hidden_size, width=8, budget_width=4, budgets=(1, 4), **fields)
    adapter = TokenAdapter.starting_from(sequence, config, seed=5).eval()
    if is_trained:
        with torch.no_grad():
            adapter.output.weight.normal_(generator=torch.Generator().manual_seed(6))
    return adapter


def requests_of(samples: int = 3) -> list[Request]:
    return [
        Request(Prompt(text, text), None, sample, 0, 5, budget)
        for text in TEXTS
        for sample in range(samples)
        for budget in (1, 4)
    ]


def recorded(engine: Engine, requests: list[Request], policy: AdaptiveDecoding) -> Steps:
    recorder = Recorder(Order.VLLM, mask_above=1.0)
    engine.generate(requests, policy, observer=recorder)
    steps = recorder.steps()
    assert steps is not None
    return steps


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> LocalEngine:
    folder = tmp_path_factory.mktemp("tiny")
    save_model(folder, config_of("llama"))
    return LocalEngine(folder, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("kind", ["fake", "local"])
@pytest.mark.parametrize("features", ["hidden", "entropy"])
def test_before_training_every_token_is_drawn_as_the_sequence_level_chooses(
    kind: str, features: str, request: pytest.FixtureRequest
) -> None:
    engine: Engine = FakeEngine() if kind == "fake" else request.getfixturevalue("local")
    sequence, requests = sequence_of(engine.info.hidden_size, features), requests_of()
    steps = recorded(engine, requests, AdaptiveDecoding(both_levels(sequence)))
    read_RH = represent(engine, [item.prompt for item in requests], sequence.config)
    pi_RA = sequence.probabilities(read_RH, torch.tensor([item.parallel_budget for item in requests]))
    np.testing.assert_allclose(steps.log_pi_NA.exp().numpy(), pi_RA[steps.request_N].numpy(), atol=1e-5)
    assert int(steps.t_N.max()) > 1
    assert pi_RA.std(0).max() > 0.05  # prompts and budgets differ


def test_an_update_sees_the_policy_that_drew() -> None:
    engine, policy = FakeEngine(), AdaptiveDecoding(both_levels(sequence_of(), is_trained=True))
    recorded(engine, requests_of(samples=5), policy)  # a larger call before
    steps = recorded(engine, requests_of(), policy)
    inputs = inputs_of(steps, "cpu", policy.start_RA)
    with torch.no_grad():
        np.testing.assert_allclose(policy.adapter.log_probabilities(inputs), steps.log_pi_NA, atol=1e-6)
    with pytest.raises(AdapterError, match="starts from a sequence-level one"):
        policy.adapter.log_probabilities(inputs_of(steps))
    assert AdaptiveDecoding(TokenAdapter(TokenConfig(16), TABLE_14)).start_RA is None


def test_what_a_request_gets_does_not_depend_on_the_others() -> None:
    engine, policy, requests = FakeEngine(), AdaptiveDecoding(both_levels(sequence_of(), True)), requests_of()
    together = engine.generate(requests, policy)
    assert together == [engine.generate([item], policy)[0] for item in requests]
    assert together[::-1] == engine.generate(requests[::-1], policy)


def test_its_policy_is_the_plain_formula() -> None:
    """π ∝ π_sequence · exp(MLP([h, codes, 4 · π_sequence] )), where the last layer alone is taken apart."""
    adapter = both_levels(sequence_of(), is_trained=True, with_budget=False, temperature=0.5)
    draws = torch.Generator().manual_seed(3)
    ones_N, hidden_NH = torch.ones(9, dtype=torch.int64), torch.randn(9, 16, generator=draws)
    start_NA = torch.randn(9, 4, generator=draws).log_softmax(1)
    inputs = TokenInputs(hidden_NH, torch.zeros(9), ones_N, ones_N, ones_N * 4, start_NA)

    def mlp(z_NZ: Tensor) -> Tensor:
        for layer in (adapter.hidden_1, adapter.hidden_2):
            z_NZ = torch.nn.functional.silu(layer(z_NZ))
        found: Tensor = adapter.output(z_NZ)
        return found

    assert adapter.standardizer is not None
    assert adapter.parallel_encoder is not None
    read_NZ = [adapter.standardizer(hidden_NH) / 2, adapter.parallel_encoder(ones_N * 4), 2 * start_NA.exp()]
    with torch.no_grad():
        weight_NA = start_NA.exp() * (mlp(torch.cat(read_NZ, dim=1)) / 0.5).exp()
        found_NA = adapter.log_probabilities(inputs).exp()
        np.testing.assert_allclose(found_NA, weight_NA / weight_NA.sum(1, keepdim=True), atol=1e-5)
        other_NA = adapter.log_probabilities(replace(inputs, start_NA=start_NA.roll(1, 0))).exp()
    assert (found_NA - other_NA).abs().max() > 0.05


def test_the_sequence_level_stays_frozen() -> None:
    adapter = both_levels(sequence_of(), is_trained=True)
    learned = {name for name, parameter in adapter.named_parameters() if parameter.requires_grad}
    assert not any(name.startswith("start.") for name in learned)
    assert {"output.weight", "hidden_1.weight", "parallel_encoder.output.bias"} <= learned


def test_it_comes_back_as_it_was(tmp_path: Path) -> None:
    adapter = both_levels(sequence_of(features="entropy"), is_trained=True)
    save_adapter(tmp_path / "a", adapter, BASE, {}, {})
    loaded = load_adapter(tmp_path / "a", base=BASE, kind="token").adapter
    assert loaded.config == adapter.config
    assert AdaptiveDecoding(loaded).key == AdaptiveDecoding(adapter).key
    other = both_levels(sequence_of(features="entropy"), is_trained=True)
    assert other.start is not None
    torch.nn.init.zeros_(other.start.output.weight)
    assert AdaptiveDecoding(other).key != AdaptiveDecoding(adapter).key
    fields = json.loads((tmp_path / "a" / "adapter.json").read_text())
    assert fields["features"]["start"]["features"] == "entropy"
    assert "a sequence-level adapter, a part of it" in (tmp_path / "a" / "README.md").read_text()
    fields["features"]["start"]["width"] = 10**12
    (tmp_path / "a" / "adapter.json").write_text(json.dumps(fields))
    with pytest.raises(AdapterError, match="too small for the sizes"):
        load_adapter(tmp_path / "a")


def test_an_adapter_without_a_start_says_nothing_of_one(tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", TokenAdapter(TokenConfig(16), TABLE_14), BASE, {}, {})
    assert "start" not in json.loads((tmp_path / "a" / "adapter.json").read_text())["features"]


def test_a_start_that_decoding_does_not_show_is_refused() -> None:
    with pytest.raises(ConfigError, match="train the sequence level with --pooling last"):
        both_levels(sequence_of(pooling="mean"))
    both_levels(sequence_of(pooling="mean", features="entropy"))  # reads no hidden state
    with pytest.raises(ConfigError, match="16 hidden numbers, not 15"):
        TokenConfig(15, start=SequenceConfig(16))
