"""The token adapter against a plain numpy MLP, and its choices against the streams they are drawn from."""

import copy
import itertools
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from rheostat.adapters.token import AdaptiveDecoding, Features, TokenAdapter, TokenConfig, TokenInputs
from rheostat.decoding.policy import SamplingParameters, StepState
from rheostat.decoding.recording import Recorder
from rheostat.decoding.spaces import TABLE_14
from rheostat.decoding.strategy import ActionSpace, Order, Strategy
from rheostat.errors import AdapterError, ConfigError
from rheostat.seeding import Purpose, uniforms

H, V, A = 5, 11, len(TABLE_14)
VARIANTS = [
    {"features": features, "with_budget": with_budget, "budgets": budgets}
    for features, with_budget, budgets in itertools.product(Features, (True, False), ((), (1, 4)))
]
EVERYTHING: dict[str, Any] = {"features": "hidden+entropy", "with_budget": True, "budgets": (1, 4)}
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))


def adapter_of(trained: bool = True, seed: int = 3, **config: Any) -> TokenAdapter:
    """A small adapter; ``trained`` gives its last layer and its standardizer values other than the initial ones."""
    adapter = TokenAdapter(TokenConfig(H, width=7, budget_width=3, **config), TABLE_14, seed)
    if trained:
        generator = torch.Generator().manual_seed(8)
        if adapter.standardizer is not None:
            adapter.standardizer.fit(torch.randn(40, H, generator=generator) * 3 + 2)
        with torch.no_grad():
            adapter.output.weight.normal_(std=0.5, generator=generator)
            adapter.output.bias.sub_(adapter.log_probabilities(inputs_of()).mean(0))  # no action is always the best
    return adapter


def inputs_of(count: int = 24, seed: int = 0) -> TokenInputs:
    draw = np.random.default_rng(seed)
    budget_N = draw.integers(1, 300, count)
    return TokenInputs(
        torch.tensor(draw.normal(2, 3, (count, H)), dtype=torch.float32),
        torch.tensor(draw.exponential(1.5, count), dtype=torch.float32),
        torch.tensor(draw.integers(1, budget_N + 1)),
        torch.tensor(budget_N),
        torch.tensor(draw.choice([1, 2, 4, 8], count)),
    )


def state_of(sequences: int = 60, rows: int = 7, seed: int = 0) -> StepState:
    """Sequences that share rows, at steps, budgets and streams of their own."""
    draw = np.random.default_rng(seed)
    budget_S = draw.integers(2, 300, sequences)
    return StepState(
        hidden_BH=torch.tensor(draw.normal(2, 3, (rows, H)), dtype=torch.float32),
        logits_BV=torch.tensor(draw.normal(0, 3, (rows, V)) * draw.random((rows, 1)), dtype=torch.float32),
        row_S=torch.tensor(draw.permutation(np.arange(sequences) % rows)),
        request_S=torch.tensor(draw.permutation(sequences)),
        t_S=torch.tensor(draw.integers(0, budget_S)),
        budget_S=torch.tensor(budget_S),
        parallel_S=torch.tensor(draw.choice([1, 2, 4, 8], sequences)),
        streams_S=draw.integers(0, 2**64, sequences, dtype=np.uint64),
    )


def taken(state: StepState, index: Any) -> StepState:
    """The sequences at ``index``, on the same rows."""
    index = torch.as_tensor(index)
    names = ("row_S", "request_S", "t_S", "budget_S", "parallel_S")
    return replace(state, **{n: getattr(state, n)[index] for n in names}, streams_S=state.streams_S[index.numpy()])


def unshared(state: StepState) -> StepState:
    """The same sequences, each on a row of its own."""
    return replace(
        state,
        hidden_BH=state.hidden_BH[state.row_S],
        logits_BV=state.logits_BV[state.row_S],
        row_S=torch.arange(len(state.row_S)),
    )


def plain_log_probabilities(adapter: TokenAdapter, inputs: TokenInputs) -> Any:
    """Algorithm 2 in float64 numpy, from the tensors of the state dict alone."""
    config = adapter.config
    tensors = {name: tensor.double().numpy() for name, tensor in adapter.state_dict().items()}

    def linear(name: str, x: Any) -> Any:
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def silu(x: Any) -> Any:
        return x / (1 + np.exp(-x))

    def code(name: str, *columns: Any) -> Any:
        return linear(f"{name}.output", silu(linear(f"{name}.hidden", np.stack(columns, axis=1))))

    def log2(budget_N: torch.Tensor) -> Any:
        return np.log2(budget_N.double().numpy())

    parts = []
    if "hidden" in config.features:
        z = (inputs.hidden_NH.double().numpy() - tensors["standardizer.mean_H"]) / tensors["standardizer.scale_H"]
        parts.append(z * np.sqrt(config.budget_width / config.hidden_size))
    if "entropy" in config.features:
        parts.append(code("entropy_encoder", inputs.entropy_N.double().numpy()))
    if config.with_budget:
        total = log2(inputs.budget_N)
        parts.append(code("budget_encoder", log2(inputs.remaining_N) - total, (total - 6) / 2))
    if config.budgets:
        parts.append(code("parallel_encoder", log2(inputs.parallel_N)))
    z = np.concatenate(parts, axis=1)
    logits = linear("output", silu(linear("hidden_2", silu(linear("hidden_1", z))))) / config.temperature
    return logits - scipy.special.logsumexp(logits, axis=1, keepdims=True)


def inputs_seen(state: StepState) -> TokenInputs:
    """x_t of each sequence, in plain numpy: h_t as it is recorded, the entropy of its untempered distribution."""
    p_BV = scipy.special.softmax(state.logits_BV.double().numpy(), axis=1)
    entropy_B = torch.tensor(scipy.stats.entropy(p_BV, axis=1))
    return TokenInputs(
        state.hidden_BH.bfloat16()[state.row_S],
        entropy_B[state.row_S],
        state.budget_S - state.t_S,
        state.budget_S,
        state.parallel_S,
    )


@every_variant
@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_log_probabilities_are_those_of_a_plain_mlp(variant: dict[str, Any], temperature: float) -> None:
    adapter, inputs = adapter_of(**variant, temperature=temperature), inputs_of()
    log_pi_NA = adapter.log_probabilities(inputs).detach()
    assert log_pi_NA.dtype == torch.float32
    np.testing.assert_allclose(log_pi_NA.numpy(), plain_log_probabilities(adapter, inputs), atol=2e-5)
    np.testing.assert_allclose(log_pi_NA.exp().sum(1).numpy(), 1, atol=1e-6)
    assert log_pi_NA.exp().std(0).max() > 0.01  # the comparison has something to compare


@every_variant
def test_it_reads_what_its_configuration_names_and_nothing_else(variant: dict[str, Any]) -> None:
    adapter, inputs = adapter_of(**variant), inputs_of()
    is_read = {
        "hidden_NH": adapter.config.reads_hidden,
        "entropy_N": adapter.config.reads_entropy,
        "remaining_N": variant["with_budget"],
        "budget_N": variant["with_budget"],
        "parallel_N": bool(variant["budgets"]),
    }
    before_NA = adapter.log_probabilities(inputs)
    assert {field.name for field in fields(inputs)} == {*is_read, "start_NA"}
    for name, wanted in is_read.items():
        other = replace(inputs, **{name: getattr(inputs, name) * 3})
        assert torch.equal(adapter.log_probabilities(other), before_NA) is not wanted, name


@every_variant
def test_it_starts_as_the_uniform_mixture(variant: dict[str, Any]) -> None:
    adapter, inputs = adapter_of(trained=False, **variant), inputs_of()
    log_pi_NA = adapter.log_probabilities(replace(inputs, hidden_NH=inputs.hidden_NH * 100))
    assert torch.equal(log_pi_NA, torch.full((24, A), 1 / A).log())


def test_equal_seeds_give_equal_weights_and_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = adapter_of(trained=False, **EVERYTHING).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    again, other = (adapter_of(trained=False, seed=seed, **EVERYTHING).state_dict() for seed in (3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = [name for name in first if not name.startswith(("output.", "standardizer."))]
    assert len(drawn) == 16
    assert not any(torch.equal(first[name], other[name]) for name in drawn)


def test_dropout_is_for_forward_in_training_mode_only() -> None:
    adapter, inputs = adapter_of(**EVERYTHING, dropout=0.5), inputs_of()
    plain_NA = plain_log_probabilities(adapter, inputs)
    dropped_NA = adapter.train()(inputs)
    assert dropped_NA.requires_grad
    assert not torch.allclose(dropped_NA, adapter(inputs), atol=1e-3), "another draw, another mask"
    assert not np.allclose(dropped_NA.detach().numpy(), plain_NA, atol=1e-3)
    exact_NA = adapter.log_probabilities(inputs)
    assert exact_NA.requires_grad
    np.testing.assert_allclose(exact_NA.detach().numpy(), plain_NA, atol=2e-5)
    assert adapter.training, "log_probabilities left the training mode as it was"
    assert torch.equal(adapter.eval()(inputs), exact_NA)
    assert torch.equal(adapter_of(**EVERYTHING, dropout=0.0).train()(inputs), exact_NA)


@every_variant
def test_every_parameter_is_reached_by_the_gradient(variant: dict[str, Any]) -> None:
    adapter = adapter_of(**variant, dropout=0.0).train()
    adapter(inputs_of())[:, 0].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())


def test_wrong_inputs_are_refused_in_one_line() -> None:
    adapter, inputs = adapter_of(**EVERYTHING), inputs_of(3)
    with pytest.raises(AdapterError, match=r"embeddings of 5 numbers, got 6"):
        adapter.log_probabilities(replace(inputs, hidden_NH=torch.zeros(3, 6)))
    with pytest.raises(AdapterError, match="one embedding per row"):
        adapter(replace(inputs, hidden_NH=torch.zeros(5)))
    for name in ("remaining_N", "budget_N", "parallel_N"):
        with pytest.raises(ConfigError, match="budget must be at least 1, got 0"):
            adapter(replace(inputs, **{name: torch.tensor([2, 0, 1])}))
    blind = adapter_of(with_budget=False)  # what is not read may be anything
    blind(replace(inputs, remaining_N=torch.zeros(3), budget_N=torch.zeros(3), parallel_N=torch.zeros(3)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"hidden_size": 0},
        {"hidden_size": True},
        {"features": "both"},
        {"features": None},
        {"width": 1.5},
        {"budget_width": -1},
        {"dropout": 1.0},
        {"dropout": "0.1"},
        {"temperature": 0},
        {"temperature": float("inf")},
        {"temperature": float("nan")},
        {"budgets": (2, 1)},
        {"budgets": (1, 1)},
        {"budgets": (0, 1)},
        {"with_budget": 1},
    ],
)
def test_a_config_that_cannot_be_used_is_refused_in_one_line(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))) as caught:
        TokenConfig(**{"hidden_size": 8, **wrong})
    assert "\n" not in str(caught.value)


def test_one_action_is_no_choice() -> None:
    with pytest.raises(ConfigError, match="at least two actions to choose from, got 1"):
        TokenAdapter(TokenConfig(H), ActionSpace((Strategy(1.0),)))


@every_variant
def test_a_decision_is_the_networks_for_what_the_step_shows(variant: dict[str, Any]) -> None:
    adapter, state = adapter_of(**variant), state_of()
    decision = AdaptiveDecoding(adapter).decide(state)
    assert decision.log_pi_SK is not None
    assert not decision.log_pi_SK.requires_grad
    plain_SA = plain_log_probabilities(adapter, inputs_seen(state))
    np.testing.assert_allclose(decision.log_pi_SK.numpy(), plain_SA, atol=2e-5)
    uniform_S = uniforms(state.streams_S, state.t_S.numpy(), Purpose.ACTION)
    cdf_SA = np.exp(plain_SA).cumsum(1)
    assert decision.choice_S.tolist() == (uniform_S[:, None] >= cdf_SA[:, :-1]).sum(1).tolist()
    assert set(decision.choice_S.tolist()) == set(range(A))
    expected = SamplingParameters.of(TABLE_14.strategies)
    for field in fields(expected):
        found_K, expected_K = (getattr(sets, field.name) for sets in (decision.parameters, expected))
        assert found_K is expected_K is None or torch.equal(found_K, expected_K), field.name


@pytest.mark.parametrize("commit", [False, True])
def test_choices_depend_neither_on_order_nor_on_company_nor_on_shared_rows(commit: bool) -> None:
    policy, state = AdaptiveDecoding(adapter_of(**EVERYTHING), commit), state_of()
    choice_S = policy.decide(state).choice_S
    assert len(set(choice_S.tolist())) > 1
    order_S = np.random.default_rng(1).permutation(len(choice_S))
    assert torch.equal(policy.decide(taken(state, order_S)).choice_S, choice_S[order_S])
    assert torch.equal(policy.decide(unshared(state)).choice_S, choice_S)
    assert torch.equal(policy.decide(unshared(taken(state, order_S))).choice_S, choice_S[order_S])
    alone = [int(policy.decide(taken(state, [s])).choice_S) for s in range(len(choice_S))]
    assert alone == choice_S.tolist()
    other = policy.decide(replace(state, streams_S=state.streams_S[::-1].copy())).choice_S
    assert torch.equal(other, choice_S) is commit, "drawn from the streams; a committed choice needs none"
    on_device = replace(state, streams_S=torch.from_numpy(state.streams_S.view(np.int64)))
    assert torch.equal(policy.decide(on_device).choice_S, choice_S)


def test_what_is_not_finite_is_told_where_the_host_may_look() -> None:
    adapter, state = adapter_of(), state_of()
    adapter.output.bias.data.fill_(torch.nan)
    with pytest.raises(AdapterError, match="not finite"):
        AdaptiveDecoding(adapter).decide(state)
    decision = AdaptiveDecoding(adapter).decide(
        replace(state, streams_S=torch.from_numpy(state.streams_S.view(np.int64)))
    )
    assert decision.log_pi_SK is not None
    assert decision.log_pi_SK.isnan().all()
    assert ((decision.choice_S >= 0) & (decision.choice_S < A)).all()  # a table of actions is read there


@pytest.mark.parametrize("over", ["streams", "steps"])
def test_actions_are_drawn_with_their_probabilities(over: str) -> None:
    draws, pi_A = 20_000, np.array([0.5, 0.05, 0.15, 0.3])
    adapter = adapter_of(trained=False)
    with torch.no_grad():
        adapter.output.bias.copy_(torch.tensor(pi_A).log())
    state, many = taken(state_of(), [3] * draws), np.arange(draws)
    if over == "streams":
        state = replace(state, streams_S=many.astype(np.uint64))
    else:
        state = replace(state, t_S=torch.tensor(many), budget_S=torch.tensor(many + 9))
    decision = AdaptiveDecoding(adapter).decide(state)
    counts_A = torch.bincount(decision.choice_S, minlength=A).numpy()
    assert scipy.stats.chisquare(counts_A, draws * pi_A).pvalue > 1e-3


def test_committing_takes_the_first_of_the_most_probable_actions() -> None:
    adapter, state = adapter_of(**EVERYTHING), state_of()
    choice_S = AdaptiveDecoding(adapter, commit=True).decide(state).choice_S
    plain_SA = plain_log_probabilities(adapter, inputs_seen(state))
    assert choice_S.tolist() == plain_SA.argmax(1).tolist()
    with torch.no_grad():
        adapter.output.weight.zero_()
        adapter.output.bias.copy_(torch.tensor([-1.0, 2, 2, 0]))
    assert AdaptiveDecoding(adapter, commit=True).decide(state).choice_S.tolist() == [1] * 60


def test_an_action_without_probability_is_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = adapter_of(trained=False)
    with torch.no_grad():
        adapter.output.bias.copy_(torch.tensor([-200.0, 0, -200, 0]))
    policy = AdaptiveDecoding(adapter)
    assert set(policy.decide(state_of(2_000)).choice_S.tolist()) == {1, 3}
    for uniform, first in ((0.0, 1), (0.5, 3), (1 - 2.0**-53, 3)):  # the boundaries themselves
        monkeypatch.setattr("rheostat.decoding.policy.uniforms", lambda *_, u=uniform: np.full(2, u))
        assert policy.decide(state_of(2)).choice_S.tolist() == [first] * 2


def test_the_entropy_variant_sees_the_entropy_of_the_logits_and_nothing_else_of_the_model() -> None:
    policy, state = AdaptiveDecoding(adapter_of(features="entropy")), state_of()

    def log_pi(**changes: Any) -> torch.Tensor:
        log_pi_SA = policy.decide(replace(state, **changes)).log_pi_SK
        assert log_pi_SA is not None
        return log_pi_SA

    logits_BV = state.logits_BV
    before_SA = log_pi()
    assert torch.equal(log_pi(hidden_BH=state.hidden_BH.flip(0)), before_SA)
    for alike_BV in (logits_BV + 5, logits_BV.flip(1)):
        assert torch.allclose(log_pi(logits_BV=alike_BV), before_SA, atol=1e-5)
    for other_BV in (logits_BV * 2, logits_BV.flip(0)):
        assert not torch.allclose(log_pi(logits_BV=other_BV), before_SA, atol=1e-2)


@every_variant
def test_an_update_computes_the_same_policy_from_what_was_recorded(variant: dict[str, Any]) -> None:
    adapter, state = adapter_of(**variant, dropout=0.5).train(), state_of()
    decision = AdaptiveDecoding(adapter).decide(state)
    recorder = Recorder(Order.VLLM, mask_above=1.0)
    recorder.observe(state, decision, state.logits_BV.argmax(1)[state.row_S])
    steps = recorder.steps()
    assert steps is not None
    inputs = TokenInputs(steps.hidden_NH, steps.entropy_N, steps.budget_N - steps.t_N, steps.budget_N, steps.parallel_N)
    assert torch.allclose(adapter.log_probabilities(inputs), steps.log_pi_NA, rtol=1e-6, atol=1e-6)


def key_of(adapter: TokenAdapter, commit: bool = False) -> str:
    return AdaptiveDecoding(adapter, commit).key


def test_the_key_names_weights_features_actions_and_commitment() -> None:
    adapter = adapter_of(**EVERYTHING)
    keys = [key_of(adapter), key_of(adapter, commit=True)]
    for name in adapter.state_dict():
        other = copy.deepcopy(adapter)
        value = other.state_dict()[name].view(-1)[-1]
        value.copy_(torch.nextafter(value, torch.tensor(torch.inf)))
        keys.append(key_of(other))
    for changed in ({"features": "hidden"}, {"with_budget": False}, {"budgets": ()}):
        keys.append(key_of(adapter_of(**EVERYTHING | changed)))
    same_weights = [
        TokenAdapter(replace(adapter.config, temperature=0.4), TABLE_14),
        TokenAdapter(adapter.config, ActionSpace(TABLE_14.strategies[::-1])),
        TokenAdapter(adapter.config, ActionSpace((*TABLE_14.strategies[:-1], Strategy(1.3)))),
    ]
    for other in same_weights:
        other.load_state_dict(adapter.state_dict())
        keys.append(key_of(other))
    assert len(set(keys)) == len(keys)


def test_the_key_names_nothing_else() -> None:
    adapter = adapter_of(**EVERYTHING)
    before = key_of(adapter)
    other = TokenAdapter(replace(adapter.config, temperature=1), TABLE_14, seed=99)  # an int, as a user may write it
    other.load_state_dict(adapter.state_dict())
    assert key_of(other) == before
    AdaptiveDecoding(adapter).decide(state_of())
    assert key_of(adapter.train().requires_grad_(False)) == before
