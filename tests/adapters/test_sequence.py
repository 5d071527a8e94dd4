"""The sequence adapter against a plain numpy MLP, the uniform start, and its seeds."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rheostat.adapters.features import BudgetEncoder, Standardizer
from rheostat.adapters.sequence import SequenceAdapter, SequenceConfig
from rheostat.decoding.spaces import TABLE_13
from rheostat.errors import AdapterError, ConfigError

H = 5


def adapter_of(trained: bool = True, seed: int = 3, **fields: Any) -> SequenceAdapter:
    """A small adapter; ``trained`` gives its last layer and its standardizer values other than the initial ones."""
    adapter = SequenceAdapter(SequenceConfig(H, width=7, budget_width=3, **fields), TABLE_13, seed)
    if trained:
        generator = torch.Generator().manual_seed(8)
        with torch.no_grad():
            adapter.output.weight.normal_(generator=generator)
            adapter.output.bias.normal_(generator=generator)
        adapter.standardizer.fit(embeddings(40)[:, : adapter.config.inputs] * 3 + 2)
    return adapter


def embeddings(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, H, generator=torch.Generator().manual_seed(seed))


def plain_probabilities(adapter: SequenceAdapter, embedding_PH: torch.Tensor, budget_P: torch.Tensor) -> Any:
    """Algorithm 1 in float64 numpy, from the tensors of the state dict alone."""
    tensors = {name: tensor.double().numpy() for name, tensor in adapter.state_dict().items()}

    def linear(name: str, x: Any) -> Any:
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def silu(x: Any) -> Any:
        return x / (1 + np.exp(-x))

    z = (embedding_PH.double().numpy() - tensors["standardizer.mean_H"]) / tensors["standardizer.scale_H"]
    z = z * np.sqrt(adapter.config.budget_width / embedding_PH.shape[1])
    if adapter.config.with_budget:
        log = np.log2(budget_P.numpy().astype(float))[:, None]
        z = np.concatenate([z, linear("budget_encoder.output", silu(linear("budget_encoder.hidden", log)))], axis=1)
    logits = linear("output", silu(linear("hidden_2", silu(linear("hidden_1", z))))) / adapter.config.temperature
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("fields", [{}, {"with_budget": False}, {"temperature": 0.4}, {"features": "entropy"}])
def test_probabilities_are_those_of_a_plain_mlp(fields: dict[str, Any]) -> None:
    adapter = adapter_of(**fields)
    inputs = 2 if "features" in fields else H
    embedding_PH, budget_P = embeddings(20)[:, :inputs] * 3, torch.tensor([1, 2, 3, 8] * 5)
    pi_PA = adapter.probabilities(embedding_PH, budget_P)
    assert pi_PA.dtype == torch.float32
    np.testing.assert_allclose(pi_PA.numpy(), plain_probabilities(adapter, embedding_PH, budget_P), atol=2e-6)
    np.testing.assert_allclose(pi_PA.sum(1).numpy(), 1, atol=1e-6)
    assert pi_PA.std(0).max() > 0.01  # the comparison has something to compare


def test_it_starts_as_the_uniform_mixture() -> None:
    pi_PA = adapter_of(trained=False).probabilities(embeddings(9) * 100, torch.arange(1, 10))
    assert torch.equal(pi_PA, pi_PA[:1, :1].expand(9, 6))
    assert pi_PA[0, 0].item() == pytest.approx(1 / 6, abs=1e-7)


def test_forward_gives_the_logarithms_with_gradients_and_with_dropout_in_training_only() -> None:
    adapter, embedding_PH, budget_P = adapter_of(dropout=0.5), embeddings(30), torch.ones(30, dtype=torch.int64)
    log_PA = adapter.train()(embedding_PH, budget_P)
    assert log_PA.requires_grad
    assert not torch.allclose(log_PA.exp(), adapter.probabilities(embedding_PH, budget_P), atol=1e-3)
    assert adapter.training, "probabilities left the training mode as it was"
    assert torch.equal(adapter.eval()(embedding_PH, budget_P).exp(), adapter.probabilities(embedding_PH, budget_P))
    assert not adapter.probabilities(embedding_PH, budget_P).requires_grad


def test_every_parameter_is_reached_by_the_gradient() -> None:
    adapter = adapter_of()
    adapter(embeddings(8), torch.arange(1, 9))[:, 0].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())


def test_the_budget_matters_only_with_budget() -> None:
    embedding_PH, one_P, eight_P = embeddings(4), torch.full((4,), 1), torch.full((4,), 8)
    for with_budget in (True, False):
        adapter = adapter_of(with_budget=with_budget)
        same = torch.equal(adapter.probabilities(embedding_PH, one_P), adapter.probabilities(embedding_PH, eight_P))
        assert same is not with_budget
    adapter.probabilities(embedding_PH, torch.zeros(4, dtype=torch.int64))  # ignored, whatever it is


def test_choosing_is_argmax_or_inverse_cdf() -> None:
    adapter, embedding_PH, budget_P = adapter_of(), embeddings(500), torch.full((500,), 4)
    pi_PA = adapter.probabilities(embedding_PH, budget_P).double().numpy()
    assert adapter.choose(embedding_PH, budget_P).tolist() == pi_PA.argmax(1).tolist()
    uniform_P = np.random.default_rng(1).random(500)
    uniform_P[:2] = 0, np.nextafter(1, 0)
    cdf_PA = np.cumsum(pi_PA / pi_PA.sum(1, keepdims=True), axis=1)
    cdf_PA[:, -1] = 1  # the sum may end a rounding below it
    expected = [int(np.searchsorted(cdf, u, side="right")) for cdf, u in zip(cdf_PA, uniform_P, strict=True)]
    assert adapter.choose(embedding_PH, budget_P, torch.tensor(uniform_P)).tolist() == expected
    assert set(expected) == set(range(6))


def test_choosing_the_best_of_equals_takes_the_first_and_never_one_without_probability() -> None:
    adapter = adapter_of(trained=False)
    with torch.no_grad():
        adapter.output.bias.copy_(torch.tensor([-200.0, 0, 0, -200, 0, -200]))
    embedding_PH, budget_P = embeddings(3), torch.tensor([1, 1, 1])
    assert adapter.choose(embedding_PH, budget_P).tolist() == [1, 1, 1]
    uniform_P = torch.tensor([0.0, 0.7, 1 - 2.0**-53], dtype=torch.float64)
    assert adapter.choose(embedding_PH, budget_P, uniform_P).tolist() == [1, 4, 4]


def test_equal_seeds_give_equal_weights_and_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = adapter_of(trained=False).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    again, other = (adapter_of(trained=False, seed=seed).state_dict() for seed in (3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["hidden_1.weight"], other["hidden_1.weight"])
    assert not torch.equal(first["budget_encoder.output.weight"], other["budget_encoder.output.weight"])


def test_initial_weights_have_the_distribution_of_torch() -> None:
    weight = SequenceAdapter(SequenceConfig(300, with_budget=False), TABLE_13).hidden_1.weight
    reference = torch.nn.Linear(300, 128).weight
    assert weight.abs().max() <= reference.new_tensor(300**-0.5)
    assert weight.std().item() == pytest.approx(reference.std().item(), rel=0.02)


def test_wrong_inputs_are_refused_in_one_line() -> None:
    adapter = adapter_of()
    with pytest.raises(AdapterError, match=r"embeddings of 5 numbers, got 6"):
        adapter.probabilities(torch.zeros(2, 6), torch.tensor([1, 2]))
    with pytest.raises(AdapterError, match=r"embeddings of 2 numbers, got 5"):
        adapter_of(features="entropy").probabilities(torch.zeros(2, H), torch.tensor([1, 2]))
    with pytest.raises(AdapterError, match="one embedding per row"):
        adapter.probabilities(torch.zeros(5), torch.tensor([1]))
    with pytest.raises(ConfigError, match="budget must be at least 1, got 0"):
        adapter(torch.zeros(2, H), torch.tensor([1, 0]))
    with pytest.raises(ConfigError, match="one budget per prompt"):
        adapter(torch.zeros(2, H), torch.tensor([1]))
    for uniform_P in (torch.tensor([0.5]), torch.tensor([0.5, 1.0]), torch.tensor([float("nan"), 0.1])):
        with pytest.raises(ConfigError, match="one uniform"):
            adapter.choose(torch.zeros(2, H), torch.tensor([1, 2]), uniform_P)


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": 0},
        {"hidden_size": True},
        {"width": 1.5},
        {"budget_width": -1},
        {"dropout": 1.0},
        {"dropout": "0.1"},
        {"temperature": 0},
        {"temperature": float("inf")},
        {"temperature": float("nan")},
        {"pooling": "first"},
        {"budgets": ()},
        {"budgets": (2, 1)},
        {"budgets": (1, 1)},
        {"budgets": (0, 1)},
        {"with_budget": 1},
        {"features": "eyes"},
        {"features": "hidden+entropy"},
    ],
)
def test_a_config_that_cannot_be_used_is_refused_in_one_line(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))) as caught:
        SequenceConfig(**{"hidden_size": 8, **fields})
    assert "\n" not in str(caught.value)


def test_the_budget_code_is_that_of_its_logarithm() -> None:
    encoder = BudgetEncoder(4, torch.Generator().manual_seed(0))
    code_PW = encoder(torch.tensor([2, 8]))
    hidden = torch.nn.functional.silu(encoder.hidden(torch.tensor([[1.0], [3.0]])))
    assert torch.equal(code_PW, encoder.output(hidden))


@given(scale=st.floats(1e-4, 1e4), shift=st.floats(-1e3, 1e3), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_standardized_embeddings_have_mean_zero_and_spread_one(scale: float, shift: float, seed: int) -> None:
    embedding_PH = embeddings(64, seed).double() * scale + shift
    standardizer = Standardizer(H)
    assert torch.equal(standardizer(embedding_PH.float()), embedding_PH.float()), "the identity before it is fitted"
    standardizer.fit(embedding_PH)
    result_PH = (embedding_PH - standardizer.mean_H) / standardizer.scale_H
    rounding = 1e-5 * (1 + abs(shift) / scale)
    assert result_PH.mean(0).abs().max() < rounding
    assert (result_PH.std(0, correction=0) - 1).abs().max() < rounding


def test_constant_dimensions_do_not_explode() -> None:
    standardizer, embedding_PH = Standardizer(H), embeddings(50)
    embedding_PH[:, 0] = 0.3
    embedding_PH[:, 1] *= 1e-9
    standardizer.fit(embedding_PH)
    embedding_PH[:, :2] += 0.5
    assert standardizer(embedding_PH).abs().max() < 10
    standardizer.fit(torch.full((3, H), 0.1))  # nothing moves at all
    assert torch.equal(standardizer.scale_H, torch.ones(H))
    assert standardizer(torch.ones(1, H)).abs().max() < 1


def test_what_cannot_be_standardized_is_refused() -> None:
    for wrong, message in (
        (torch.ones(3, 4), "got 4"),
        (torch.ones(0, H), "no training"),
        (torch.ones(2, H) / 0, "finite"),
    ):
        with pytest.raises(AdapterError, match=message):
            Standardizer(H).fit(wrong)
