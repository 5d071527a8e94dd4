"""AutoDeco's heads: against the plain formula, at work in the decode loop, and as a folder."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rheostat.adapters.autodeco import AutoDeco, AutoDecoConfig, AutoDecoding
from rheostat.adapters.files import BaseModel, load_adapter, save_adapter
from rheostat.adapters.token import TokenAdapter, TokenConfig
from rheostat.decoding.policy import Decision, SamplingParameters, StepState
from rheostat.decoding.sampling import draw
from rheostat.decoding.spaces import TABLE_14
from rheostat.decoding.strategy import Order
from rheostat.decoding.transforms import transform
from rheostat.engines.base import Request
from rheostat.engines.fake import FakeEngine
from rheostat.errors import AdapterError, ConfigError
from rheostat.types import Prompt

H, V = 5, 9
BASE = BaseModel("owner/base-model", "main", H, "f00d")


def heads(trained: bool = True, seed: int = 3) -> AutoDeco:
    adapter = AutoDeco(AutoDecoConfig(H, width=7), seed)
    if trained:
        generator = torch.Generator().manual_seed(8)
        adapter.standardizer.fit(torch.randn(40, H, generator=generator) * 3 + 2)
        with torch.no_grad():
            for layer in (adapter.temperature_output, adapter.top_p_output):
                layer.weight.normal_(std=0.7, generator=generator)
                layer.bias.normal_(generator=generator)
    return adapter.eval()


def state_of(sequences: int = 40, rows: int = 7) -> StepState:
    draws = np.random.default_rng(0)
    ones_S = torch.ones(sequences, dtype=torch.int64)
    return StepState(
        torch.tensor(draws.normal(2, 3, (rows, H)), dtype=torch.float32).bfloat16(),
        torch.tensor(draws.normal(0, 3, (rows, V)), dtype=torch.float32),
        torch.tensor(draws.permutation(np.arange(sequences) % rows)),
        torch.arange(sequences), 0 * ones_S, 5 * ones_S, ones_S,
        draws.integers(0, 2**64, sequences, dtype=np.uint64),
    )  # fmt: skip


def plain(adapter: AutoDeco, hidden_NH: torch.Tensor) -> tuple[Any, Any]:
    """T = 2σ(MLP(h)), p = σ(MLP([h, T])) in float64 numpy."""
    weights = {name: tensor.double().numpy() for name, tensor in adapter.state_dict().items()}

    def mlp(name: str, x: Any) -> Any:
        z = np.maximum(x @ weights[f"{name}_hidden.weight"].T + weights[f"{name}_hidden.bias"], 0)
        return 1 / (1 + np.exp(-(z @ weights[f"{name}_output.weight"].T + weights[f"{name}_output.bias"])))

    h = (hidden_NH.double().numpy() - weights["standardizer.mean_H"]) / weights["standardizer.scale_H"]
    temperature = 2 * mlp("temperature", h)
    return temperature[:, 0], mlp("top_p", np.concatenate([h, temperature], axis=1))[:, 0]


def test_a_decision_is_the_plain_formula_of_each_row() -> None:
    adapter, state = heads(), state_of()
    decision = AutoDecoding(adapter).decide(state)
    temperature_B, top_p_B = plain(adapter, state.hidden_BH)
    parameters = decision.parameters[decision.choice_S]
    np.testing.assert_allclose(parameters.temperature_K.numpy(), temperature_B[state.row_S], atol=1e-6)
    np.testing.assert_allclose(parameters.top_p_K.numpy(), top_p_B[state.row_S], atol=1e-6)
    assert temperature_B.std() > 0.05
    assert top_p_B.std() > 0.03
    assert not parameters.top_k_K.any()
    assert not parameters.min_p_K.any()


def test_it_starts_near_the_models_own_distribution_whatever_it_reads() -> None:
    temperature_N, top_p_N = heads(trained=False)(torch.randn(9, H) * 100)
    assert torch.equal(temperature_N, torch.ones(9))
    np.testing.assert_allclose(top_p_N.detach().numpy(), 1 / (1 + np.exp(-3)), atol=1e-6)


@pytest.mark.parametrize("order", Order)
def test_tokens_are_drawn_from_the_distribution_of_their_row(order: Order) -> None:
    """Many sequences on each row: frequencies against the reference transform, in either order."""
    state, adapter = state_of(sequences=7 * 2000), heads()
    decision = AutoDecoding(adapter).decide(state)
    uniform_S = torch.tensor(np.random.default_rng(1).random(len(state.row_S)))
    token_S = draw(state.logits_BV, state.row_S, decision, uniform_S, order)
    temperature_B, top_p_B = plain(adapter, state.hidden_BH)
    off_B = torch.zeros(7)
    sets = SamplingParameters.of(TABLE_14.strategies)[torch.zeros(7, dtype=torch.int64)]
    sets = type(sets)(torch.tensor(temperature_B), sets.top_k_K * 0, torch.tensor(top_p_B), off_B.double())
    p_BV = transform(state.logits_BV, sets, order)
    for row in range(7):
        share_V = torch.bincount(token_S[state.row_S == row], minlength=V) / 2000
        assert (share_V - p_BV[row]).abs().max() < 0.05
    assert ((p_BV > 0).sum(1) < V).any()  # top-p cuts


def test_a_saturated_head_keeps_one_token() -> None:
    """A sigmoid of less than -104 is 0 in float32, and a top-p of 0 would keep none, or all."""
    state, adapter = state_of(), heads()
    torch.nn.init.constant_(adapter.top_p_output.bias, -300)
    uniform_S, decision = torch.full((len(state.row_S),), 0.9, dtype=torch.float64), AutoDecoding(adapter).decide(state)
    assert bool((decision.parameters.top_p_K > 0).all())
    for order in Order:
        token_S = draw(state.logits_BV, state.row_S, decision, uniform_S, order)
        assert torch.equal(token_S, state.logits_BV.argmax(1)[state.row_S])


def test_it_drives_the_decode_loop_and_draws_do_not_depend_on_the_batch() -> None:
    engine = FakeEngine(hidden_size=H)
    requests = [Request(Prompt(text, text), None, sample, 0, 6) for text in ("12", "a") for sample in range(5)]
    policy = AutoDecoding(heads())
    together = engine.generate(requests, policy)
    assert together == [engine.generate([request], policy)[0] for request in requests]
    assert len({done.token_ids for done in together}) > 2


def test_the_key_is_that_of_the_weights() -> None:
    assert AutoDecoding(heads()).key == AutoDecoding(heads()).key
    keys = {AutoDecoding(adapter).key for adapter in (heads(), heads(trained=False), heads(trained=False, seed=4))}
    assert len(keys) == 3


def test_damaged_hidden_states_are_refused() -> None:
    state = state_of()
    state.hidden_BH[2, 1] = torch.nan
    with pytest.raises(AdapterError, match="not finite"):
        AutoDecoding(heads()).decide(state)
    with pytest.raises(AdapterError, match="embeddings of 5 numbers, got 6"):
        heads()(torch.zeros(2, 6))


@pytest.mark.parametrize("fields", [{"hidden_size": 0}, {"width": 1.5}, {"budgets": (1,)}])
def test_a_config_that_cannot_be_used_is_refused_in_one_line(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))) as caught:
        AutoDecoConfig(**{"hidden_size": 8, **fields})
    assert "\n" not in str(caught.value)


def saved(folder: Path) -> Path:
    save_adapter(folder, heads(), BASE, {"task": "steps"}, {})
    return folder


def refusal(folder: Path, **arguments: Any) -> str:
    with pytest.raises(AdapterError) as caught:
        load_adapter(folder, **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_heads_come_back_as_they_were(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a")
    for loaded in (load_adapter(folder, base=BASE), load_adapter(folder, kind="autodeco")):
        assert isinstance(loaded.adapter, AutoDeco)
        assert loaded.adapter.config == heads().config
        assert AutoDecoding(loaded.adapter).key == AutoDecoding(heads()).key
        assert not loaded.adapter.training
        assert loaded.training == {"task": "steps"}
    fields = json.loads((folder / "adapter.json").read_text())
    assert (fields["kind"], fields["action_space"], fields["budgets"]) == ("autodeco", None, [])
    assert fields["features"] == {"width": 7}
    card = " ".join((folder / "README.md").read_text().split())
    assert "predict the temperature and the top-p of that token" in card
    assert "Wang et al., 2025" in card
    assert "## Strategies" not in card
    assert "rheostat generate" in card


def test_another_kind_is_refused_where_one_is_needed(tmp_path: Path) -> None:
    said = refusal(saved(tmp_path / "a"), kind="token")
    assert "this is an AutoDeco adapter, a token-level adapter is needed" in said
    save_adapter(tmp_path / "t", TokenAdapter(TokenConfig(H), TABLE_14), BASE, {}, {})
    assert "this is a token-level adapter, an AutoDeco adapter is needed" in refusal(tmp_path / "t", kind="autodeco")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.update(action_space={"order": "vllm", "strategies": []}), r"action_space"),
        (lambda f: f.update(budgets=[1]), "budgets must be empty"),
        (lambda f: f["features"].update(dropout=0.1), r"features\.dropout: unknown key"),
        (lambda f: f["features"].update(width=10**12), "too small for the sizes"),
        (lambda f: f["base_model"].update(hidden_size=10**12), "too small for the sizes"),
        (lambda f: f["features"].update(width=6), r"has shape"),
        (lambda f: f.update(kind="token"), r"features\.with_budget: is missing"),
        (lambda f: f.update(weights_sha256="0" * 64), "not the weights that"),
    ],
)
def test_a_damaged_description_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    path = saved(tmp_path / "a") / "adapter.json"
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))
    said = refusal(tmp_path / "a")
    assert re.search(message, said), said


def test_a_decision_has_no_distribution_over_its_sets() -> None:
    decision = AutoDecoding(heads()).decide(state_of())
    assert isinstance(decision, Decision)
    assert decision.log_pi_SK is None
