"""What is recorded of a rollout, against the reference transforms and float64 arithmetic."""

from dataclasses import fields

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor

from rheostat.baselines.uniform import UniformMixture
from rheostat.decoding import recording
from rheostat.decoding.policy import Decision, SamplingParameters, StepState
from rheostat.decoding.recording import (
    Recorder,
    Steps,
    bytes_per_token,
    marginal_log_probability,
    row_statistics,
    token_log_probabilities,
)
from rheostat.decoding.spaces import candidate_grid
from rheostat.decoding.strategy import ActionSpace, Order, Strategy
from rheostat.decoding.transforms import transform
from rheostat.engines.base import Request
from rheostat.engines.fake import EOS, FakeEngine
from rheostat.types import Prompt

pytestmark = pytest.mark.usefixtures("way")
ALL = (*candidate_grid(), Strategy(0), Strategy(2.0, top_n_sigma=1.5), Strategy(0.8, 7, 0.9, 0.05, top_n_sigma=2.5))
SPACE = ActionSpace((Strategy(0), Strategy(2.0), Strategy(1.0, top_k=2)))


def some_logits(rows: int, size: int, spread: float, rounded: bool = False) -> Tensor:
    logits_BV = spread * torch.randn(rows, size, generator=torch.Generator().manual_seed(size))
    return logits_BV.bfloat16().float() if rounded else logits_BV


@pytest.mark.parametrize("spread", [0.0, 0.01, 3.0, 30.0, 300.0])
def test_row_statistics(spread: float) -> None:
    logits_BV = some_logits(35, 700, spread) + 50
    kept_BV, found = logits_BV.clone(), row_statistics(logits_BV)
    p_BV = scipy.special.softmax(logits_BV.double().numpy(), axis=1)
    np.testing.assert_allclose(
        found.log_total_B, scipy.special.logsumexp(logits_BV.double().numpy(), axis=1), rtol=2e-6
    )
    np.testing.assert_allclose(found.entropy_B, scipy.stats.entropy(p_BV, axis=1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.p_max_B, p_BV.max(1), rtol=1e-5)
    assert torch.equal(found.peak_B, logits_BV.amax(1))
    assert torch.equal(logits_BV, kept_BV)
    assert bool((found.entropy_B >= 0).all())


def test_row_statistics_where_a_token_is_impossible() -> None:
    found = row_statistics(torch.tensor([[0.0, -torch.inf, 0.0], [-torch.inf, 3.0, -torch.inf]]))
    assert found.entropy_B.tolist() == pytest.approx([np.log(2), 0], abs=1e-6)
    assert found.p_max_B.tolist() == pytest.approx([0.5, 1])


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize(
    ("size", "spread", "rounded"), [(40, 1.0, False), (40, 3.0, True), (1500, 0.01, True), (1500, 3.0, True)]
)
def test_log_probabilities_are_those_of_the_reference(size: int, spread: float, rounded: bool, order: Order) -> None:
    """All candidate strategies and greedy; tokens from the most to the least likely, on shared rows, with ties."""
    logits_BV = some_logits(3, size, spread, rounded)
    logits_BV[1, 5] = logits_BV[1, 7] = logits_BV[1].max()  # greedy takes the first of these
    token_S = torch.cat([logits_BV.argsort(dim=1, descending=True)[:, :14], torch.tensor([[5, 7]] * 3)], 1).flatten()
    row_S = torch.arange(3).repeat_interleave(16)
    turn_S = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    row_S, token_S = row_S[turn_S], token_S[turn_S]
    parameters = SamplingParameters.of(ALL)
    found_SK = token_log_probabilities(logits_BV, row_S, token_S, parameters, order)
    for row in range(3):
        p_KV = transform(logits_BV[row].expand(len(ALL), -1), parameters, order)
        own_S = row_S == row
        expected_SK = p_KV[:, token_S[own_S]].T.log()
        assert torch.equal(found_SK[own_S].isinf(), expected_SK.isinf())
        torch.testing.assert_close(found_SK[own_S].double(), expected_SK, rtol=1e-5, atol=2e-5)
    assert 0.02 < float(found_SK.isinf().float().mean()) < 0.98


def test_more_rows_than_are_looked_at_at_once() -> None:
    logits_BV, strategies = some_logits(2 * recording._SORTED + 5, 20, 3.0), (Strategy(1.5), Strategy(1.0, 3, 0.9))
    row_S = torch.arange(len(logits_BV)).flip(0)
    token_S = torch.arange(len(logits_BV)) % 4
    found_SK = token_log_probabilities(logits_BV, row_S, token_S, SamplingParameters.of(strategies), Order.VLLM)
    for k, strategy in enumerate(strategies):
        p_SV = transform(logits_BV[row_S], SamplingParameters.of([strategy] * len(row_S)), Order.VLLM)
        torch.testing.assert_close(found_SK[:, k].exp().double(), p_SV.gather(1, token_S[:, None]).squeeze(1))


def test_extreme_temperatures() -> None:
    logits_BV = some_logits(1, 50, 3.0)
    parameters = SamplingParameters.of([Strategy(1e-30), Strategy(1e30)])
    first, last = int(logits_BV.argmax()), int(logits_BV.argmin())
    found_SK = token_log_probabilities(
        logits_BV, torch.zeros(2, dtype=torch.int64), torch.tensor([first, last]), parameters, Order.VLLM
    )
    assert found_SK[:, 0].exp().tolist() == [1.0, 0.0]
    assert found_SK[:, 1].tolist() == pytest.approx([-np.log(50)] * 2, abs=1e-5)


def scrambled(rows: int, count: int, shared: bool) -> tuple[StepState, Decision, Tensor]:
    """One step of ``count`` sequences on ``rows`` distributions, each shared or with a row of its own."""
    generator = torch.Generator().manual_seed(1)
    hidden_BH, logits_BV = torch.randn(rows, 4, generator=generator), 4 * torch.randn(rows, 9, generator=generator)
    row_S = torch.randint(rows, (count,), generator=generator)
    choice_S = torch.randint(len(SPACE), (count,), generator=generator)
    log_pi_SK = torch.randn(count, len(SPACE), generator=generator).log_softmax(1)
    parameters = SamplingParameters.of(SPACE.strategies)
    p_SV = transform(logits_BV[row_S], parameters[choice_S], Order.VLLM)
    token_S = torch.multinomial(p_SV, 1, generator=generator).squeeze(1)
    if not shared:
        hidden_BH, logits_BV, row_S = hidden_BH[row_S], logits_BV[row_S], torch.arange(count)
    number_S = torch.randperm(count, generator=generator)
    state = StepState(
        hidden_BH, logits_BV, row_S, number_S, torch.full_like(row_S, 3), number_S + 5, number_S % 3 + 1,
        np.zeros(count, dtype=np.uint64),
    )  # fmt: skip
    return state, Decision(parameters, choice_S, log_pi_SK), token_S


def log_mu(steps: Steps) -> Tensor:
    return marginal_log_probability(steps.log_pi_NA, steps.log_p_NA)


def test_a_step_as_it_was() -> None:
    state, decision, token_S = scrambled(12, 60, shared=True)
    recorder = Recorder(Order.VLLM, mask_above=0.7)
    recorder.observe(state, decision, token_S)
    steps = recorder.steps()
    p_BV = state.logits_BV.double().softmax(1)
    keep_S = p_BV.amax(1)[state.row_S] <= 0.7
    assert 10 < int(keep_S.sum()) < 50
    turn_S = keep_S.nonzero().squeeze(1)
    turn_S = turn_S[state.request_S[turn_S].argsort()]
    assert steps is not None
    assert len(steps) == len(turn_S)
    row_S = state.row_S[turn_S]
    assert torch.equal(steps.hidden_NH, state.hidden_BH[row_S].bfloat16())
    for name in ("request", "t", "budget", "parallel"):
        assert torch.equal(getattr(steps, f"{name}_N"), getattr(state, f"{name}_S")[turn_S]), name
    assert torch.equal(steps.action_N, decision.choice_S[turn_S])
    assert torch.equal(steps.log_pi_NA, decision.log_pi_SK[turn_S])
    torch.testing.assert_close(steps.p_max_N.double(), p_BV.amax(1)[row_S])
    torch.testing.assert_close(steps.entropy_N.double(), -(p_BV * p_BV.log()).sum(1)[row_S])
    for action in range(len(SPACE)):
        chosen = decision.parameters[torch.full((len(row_S),), action)]
        p_N = transform(state.logits_BV[row_S], chosen, Order.VLLM).gather(1, token_S[turn_S, None]).squeeze(1)
        torch.testing.assert_close(steps.log_p_NA[:, action].exp().double(), p_N)
    mu_N = (decision.log_pi_SK[turn_S].exp() * steps.log_p_NA.exp()).sum(1)
    torch.testing.assert_close(log_mu(steps).exp(), mu_N)
    assert bool(log_mu(steps).isfinite().all())


def test_rows_may_be_shared_or_not() -> None:
    recorded = []
    for shared in (True, False):
        recorder = Recorder(Order.VLLM)
        recorder.observe(*scrambled(12, 60, shared))
        recorded.append(recorder.steps())
    for field in fields(Steps):
        torch.testing.assert_close(*(getattr(steps, field.name) for steps in recorded), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mask_above", [1.0, 0.6])
def test_a_rollout_is_recorded_by_request_and_step(mask_above: float) -> None:
    engine = FakeEngine((EOS, "a", "b", "c"), hidden_size=6)
    requests = [Request(Prompt(f"p{i % 3}", f"p{i % 3}"), None, i, 2, 2 + i % 5, 1 + i % 4) for i in range(40)]
    recorder = Recorder(Order.VLLM, mask_above)
    completions = engine.generate(requests, UniformMixture(SPACE), observer=recorder)
    steps = recorder.steps()
    assert steps is not None
    written = sum(len(completion.token_ids) for completion in completions)
    wanted = [
        (i, t)
        for i, completion in enumerate(completions)
        for t in range(len(completion.token_ids))
        if engine.logits(f"p{i % 3}", completion.token_ids[:t]).softmax(0).max() <= mask_above
    ]
    assert list(zip(steps.request_N.tolist(), steps.t_N.tolist(), strict=True)) == wanted
    assert (len(wanted) == written) == (mask_above == 1)
    for n, (i, t) in enumerate(wanted):
        tokens = completions[i].token_ids
        assert torch.equal(steps.hidden_NH[n], engine.features(f"p{i % 3}", tokens[:t]).bfloat16())
        assert (int(steps.budget_N[n]), int(steps.parallel_N[n])) == (2 + i % 5, 1 + i % 4)
        p_AV = transform(
            engine.logits(f"p{i % 3}", tokens[:t]).expand(3, -1), SamplingParameters.of(SPACE.strategies), Order.VLLM
        )
        torch.testing.assert_close(steps.log_p_NA[n].exp().double(), p_AV[:, tokens[t]])
        assert float(log_mu(steps)[n].exp()) == pytest.approx(float(p_AV[:, tokens[t]].mean()), rel=1e-5)


def test_strategies_of_their_own_are_recorded_too() -> None:
    """Without log π, π is the choice itself, and μ the chosen strategy's own distribution."""
    engine = FakeEngine((EOS, "a", "b", "c"))
    requests = [Request(Prompt("p", "p"), SPACE.strategies[i % 3], i, 0, 4) for i in range(30)]
    recorder = Recorder(Order.VLLM, 1.0)
    engine.generate(requests, observer=recorder)
    steps = recorder.steps()
    assert steps is not None
    assert torch.equal(steps.action_N, steps.request_N % 3)
    assert torch.equal(steps.log_pi_NA.exp(), torch.nn.functional.one_hot(steps.action_N, 3).float())
    torch.testing.assert_close(log_mu(steps), steps.log_p_NA.gather(1, steps.action_N[:, None]).squeeze(1))
    assert bool(log_mu(steps).isfinite().all())


def test_nothing_is_recorded_where_every_token_is_masked() -> None:
    recorder = Recorder(Order.VLLM, mask_above=0.01)
    assert recorder.steps() is None
    recorder.observe(*scrambled(4, 8, shared=True))
    assert recorder.steps() is None


def test_memory_of_a_token() -> None:
    recorder = Recorder(Order.VLLM, 1.0)
    recorder.observe(*scrambled(4, 8, shared=True))
    steps = recorder.steps()
    assert steps is not None
    used = sum(getattr(steps, field.name).nbytes for field in fields(Steps))
    assert used <= len(steps) * bytes_per_token(4, 3) <= used + len(steps) * 8
