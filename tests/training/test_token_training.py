"""Token-level training: its gradient against every rollout enumerated, and small worlds whose best policy is known."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tiny import (
    CONFIG,
    NEVER,
    QUICK,
    SPACE,
    CountingEngine,
    TinyTask,
    adapter_for,
    problems,
    run_of,
    same_weights,
    tiny_engine,
    tiny_features,
    without_rates,
)
from torch import Tensor

from rheostat.adapters.token import AdaptiveDecoding, Features, TokenAdapter, TokenConfig
from rheostat.decoding.policy import Decision, SamplingParameters, StepState
from rheostat.decoding.recording import Recorder, Steps
from rheostat.decoding.strategy import ActionSpace, Order, Strategy
from rheostat.decoding.transforms import transform
from rheostat.engines.base import Request
from rheostat.engines.fake import EOS, FakeEngine
from rheostat.errors import RheostatError, StoreError
from rheostat.training import token as training
from rheostat.training import update as updates
from rheostat.training.groups import collect_groups
from rheostat.training.objectives import pass_at_k_advantage
from rheostat.training.surrogate import inputs_of, surrogate_loss
from rheostat.training.token import TokenHistory, describe, informative_prompts, train_token
from rheostat.training.token_config import Objective, TokenEstimator, TokenTrainingConfig
from rheostat.types import Completion

# --- The gradient, by enumeration of every rollout of (actions, tokens) ---

WORLD_SPACE = ActionSpace((Strategy(0), Strategy(1.5), Strategy(1.0, top_k=2)))
WORLD_BUDGET = 3
RIGHT = {(1, 1, 2), (2, 0), (2, 2, 1), (1, 1, 1)}


def world_logits(_: str, tokens: tuple[int, ...]) -> list[float]:
    if tokens == (1,):
        return [NEVER, 0.0, NEVER]  # here all actions agree
    return [0.3 * len(tokens) - 0.5, 0.7, 0.4 - 0.5 * (tokens[-1:] == (1,))]


WORLD = FakeEngine((EOS, "a", "b"), world_logits, hidden_size=3)


@dataclass(frozen=True)
class Rollouts:
    """Every rollout of the world, its probability under the adapter, and what the recorder keeps of it."""

    chance_R: Tensor
    reward_R: Tensor
    steps: Steps

    def of(self, number: int) -> Steps:
        return self.steps[self.steps.request_N == number]


def world_adapter() -> TokenAdapter:
    """Some policy, in float64; the world's features go through it as rollouts and updates see them."""
    config = TokenConfig(3, width=4, budget_width=2, dropout=0.0)
    adapter = TokenAdapter(config, WORLD_SPACE, seed=1).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in (adapter.output.weight, adapter.output.bias):
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return adapter


def world_state(prefixes: Sequence[tuple[int, ...]], number_S: Sequence[int]) -> StepState:
    count, t = len(prefixes), len(prefixes[0])
    ones_S = torch.ones(count, dtype=torch.int64)
    return StepState(
        torch.stack([WORLD.features("x", prefix) for prefix in prefixes]),
        torch.stack([WORLD.logits("x", prefix) for prefix in prefixes]),
        torch.arange(count), torch.tensor(number_S), t * ones_S, WORLD_BUDGET * ones_S, ones_S,
        np.zeros(count, dtype=np.uint64),
    )  # fmt: skip


def world_policy(adapter: TokenAdapter, state: StepState) -> Tensor:
    """log π of each sequence, with a gradient."""
    recorder = Recorder(Order.VLLM, 1.0)
    nowhere_S = torch.zeros_like(state.row_S)
    log_pi_SK = torch.zeros(len(nowhere_S), len(WORLD_SPACE))
    recorder.observe(state, Decision(SamplingParameters.of(WORLD_SPACE.strategies), nowhere_S, log_pi_SK), nowhere_S)
    steps = recorder.steps()
    assert steps is not None
    log_pi_NA: Tensor = adapter(inputs_of(steps))
    return log_pi_NA


def world_probabilities(prefix: tuple[int, ...]) -> Tensor:
    logits_AV = WORLD.logits("x", prefix).expand(len(WORLD_SPACE), -1)
    return transform(logits_AV, SamplingParameters.of(WORLD_SPACE.strategies), Order.VLLM)


def has_ended(tokens: tuple[int, ...]) -> bool:
    return len(tokens) == WORLD_BUDGET or tokens[-1:] == (0,)


def every_rollout(adapter: TokenAdapter) -> Rollouts:
    def extend(actions: tuple[int, ...], tokens: tuple[int, ...], chance: float) -> Iterator[tuple[Any, ...]]:
        if has_ended(tokens):
            yield actions, tokens, chance
            return
        pi_A = world_policy(adapter, world_state([tokens], [0])).exp().squeeze(0)
        joint_AV = pi_A[:, None] * world_probabilities(tokens)
        for action, token in joint_AV.nonzero().tolist():
            yield from extend((*actions, action), (*tokens, token), chance * float(joint_AV[action, token]))

    with torch.no_grad():
        rollouts = list(extend((), (), 1.0))
        recorder = Recorder(Order.VLLM, 1.0)
        for t in range(WORLD_BUDGET):
            alive = [number for number, (_, tokens, _) in enumerate(rollouts) if len(tokens) > t]
            state = world_state([rollouts[number][1][:t] for number in alive], alive)
            action_S = torch.tensor([rollouts[number][0][t] for number in alive])
            token_S = torch.tensor([rollouts[number][1][t] for number in alive])
            parameters = SamplingParameters.of(WORLD_SPACE.strategies)
            recorder.observe(state, Decision(parameters, action_S, world_policy(adapter, state)), token_S)
    steps = recorder.steps()
    assert steps is not None
    assert len(steps) == sum(len(tokens) for _, tokens, _ in rollouts)
    steps = replace(steps, log_pi_NA=steps.log_pi_NA.double(), log_p_NA=steps.log_p_NA.double())
    chance_R = torch.tensor([chance for *_, chance in rollouts], dtype=torch.float64)
    assert float(chance_R.sum()) == pytest.approx(1, abs=1e-12)
    reward_R = torch.tensor([float(tokens in RIGHT) for _, tokens, _ in rollouts], dtype=torch.float64)
    return Rollouts(chance_R, reward_R, steps)


def expected_reward(adapter: TokenAdapter) -> Tensor:
    """E[r] = Σ over texts of r · Π μ(y_t | x_t), with a gradient."""

    def value(tokens: tuple[int, ...]) -> Tensor:
        if has_ended(tokens):
            return torch.tensor(float(tokens in RIGHT), dtype=torch.float64)
        pi_A = world_policy(adapter, world_state([tokens], [0])).exp().squeeze(0)
        mu_V = pi_A @ world_probabilities(tokens)
        return torch.stack([mu_V[token] * value((*tokens, token)) for token in mu_V.nonzero().flatten().tolist()]).sum()

    return value(())


def flat_gradient(loss: Tensor, adapter: TokenAdapter) -> Tensor:
    adapter.zero_grad()
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in adapter.parameters() if parameter.grad is not None])


def scores_of(adapter: TokenAdapter, rollouts: Rollouts, config: TokenTrainingConfig) -> Tensor:
    """Minus the gradient of each rollout's own loss at advantage 1."""
    scores = []
    for number in range(len(rollouts.chance_R)):
        steps = rollouts.of(number)
        loss, _ = surrogate_loss(adapter, steps, torch.ones(len(steps), dtype=torch.float64), 1, config)
        scores.append(-flat_gradient(loss, adapter))
    return torch.stack(scores)


WORLD_CONFIG = TokenTrainingConfig(beta=0.0, dropout=0.0, objective=Objective.PASS_1)


@pytest.mark.parametrize("clip", [0.2, math.inf])
@pytest.mark.parametrize("estimator", TokenEstimator)
def test_mean_gradient_over_every_rollout(estimator: TokenEstimator, clip: float) -> None:
    adapter = world_adapter()
    rollouts = every_rollout(adapter)
    exact = flat_gradient(expected_reward(adapter), adapter)
    config = WORLD_CONFIG.model_copy(update={"estimator": estimator, "clip": clip})
    score_RD = scores_of(adapter, rollouts, config)
    found = (rollouts.chance_R * rollouts.reward_R) @ score_RD
    assert exact.abs().max() > 1e-2
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6 * float(exact.abs().max()))
    # what is no function of the rollout drops out: a baseline does no harm
    assert float((rollouts.chance_R @ score_RD).abs().max()) < 1e-6


@pytest.mark.parametrize("estimator", TokenEstimator)
def test_mean_gradient_of_pass_at_k_over_every_group(estimator: TokenEstimator) -> None:
    """Groups of three rollouts: the mean over all of them is the gradient of 1 − (1 − E[r])²."""
    adapter, budget, group = world_adapter(), 2, 3
    rollouts = every_rollout(adapter)
    exact = flat_gradient(1 - (1 - expected_reward(adapter)) ** budget, adapter)
    score_RD = scores_of(adapter, rollouts, WORLD_CONFIG.model_copy(update={"estimator": estimator}))
    own_RC = torch.stack([1 - rollouts.reward_R, rollouts.reward_R], 1) * rollouts.chance_R[:, None]
    chance_C, score_CD = own_RC.sum(0), own_RC.T @ score_RD  # of wrong and right rollouts
    found = torch.zeros_like(exact)
    for outcome in product((0, 1), repeat=group):
        (advantage_G,) = pass_at_k_advantage(torch.tensor([outcome], dtype=torch.float64), torch.tensor([budget]))
        for number, right in enumerate(outcome):
            others = math.prod(float(chance_C[o]) for i, o in enumerate(outcome) if i != number)
            found += advantage_G[number] / group * others * score_CD[right]
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6 * float(exact.abs().max()))


def test_marginal_has_never_more_variance() -> None:
    adapter = world_adapter()
    rollouts = every_rollout(adapter)
    square = {}
    for estimator in TokenEstimator:
        score_RD = scores_of(adapter, rollouts, WORLD_CONFIG.model_copy(update={"estimator": estimator}))
        square[estimator] = rollouts.chance_R @ (rollouts.reward_R[:, None] * score_RD) ** 2
    marginal_D, action_D = square[TokenEstimator.MARGINAL], square[TokenEstimator.ACTION]
    assert bool((marginal_D <= action_D + 1e-12).all())
    assert float(marginal_D.sum()) < 0.8 * float(action_D.sum())


def test_where_all_actions_agree_marginal_learns_nothing() -> None:
    adapter = world_adapter()
    steps = every_rollout(adapter).steps
    agreed = steps[(steps.log_p_NA == steps.log_p_NA[:, :1]).all(1)]
    assert len(agreed) > 10
    advantage_N = torch.linspace(-1, 2, len(agreed), dtype=torch.float64)
    largest = {}
    for estimator in TokenEstimator:
        config = WORLD_CONFIG.model_copy(update={"estimator": estimator})
        loss, _ = surrogate_loss(adapter, agreed, advantage_N, 1, config)
        largest[estimator] = float(flat_gradient(loss, adapter).abs().max())
    assert largest[TokenEstimator.MARGINAL] < 1e-13
    assert largest[TokenEstimator.ACTION] > 1e-2


def test_a_longer_rollout_weighs_more() -> None:
    """The loss is a sum over tokens, divided by rollouts, those without a recorded token among them."""
    adapter = world_adapter()
    rollouts = every_rollout(adapter)
    lengths = torch.bincount(rollouts.steps.request_N)
    long, short = int((lengths == 3).nonzero()[5]), int((lengths == 1).nonzero()[0])
    both = Steps.joined([rollouts.of(long), rollouts.of(short)])
    advantage_N = torch.tensor([0.5, 0.5, 0.5, -2.0], dtype=torch.float64)
    config = WORLD_CONFIG.model_copy(update={"beta": 0.3})
    loss, sums = surrogate_loss(adapter, both, advantage_N, 5, config)
    entropy_N = torch.stack([-(row.exp() * row).sum() for row in adapter(inputs_of(both)).detach()])
    assert loss.item() == pytest.approx(-(3 * 0.5 - 2.0 + 0.3 * float(entropy_N.sum())) / 5, abs=1e-6)
    assert sums == {"entropy": pytest.approx(float(entropy_N.sum())), "clipped": 0}
    by_token = sum(
        flat_gradient(surrogate_loss(adapter, both[torch.tensor([n])], advantage_N[n : n + 1], 5, config)[0], adapter)
        for n in range(4)
    )
    torch.testing.assert_close(flat_gradient(loss, adapter), by_token)


@pytest.mark.parametrize("estimator", TokenEstimator)
def test_dropout_is_in_the_gradient_and_not_in_the_ratio(estimator: TokenEstimator) -> None:
    adapter = world_adapter()
    rollouts = every_rollout(adapter)
    adapter.config = replace(adapter.config, dropout=0.5)
    config = WORLD_CONFIG.model_copy(update={"estimator": estimator})
    steps, advantage_N = rollouts.steps, rollouts.reward_R[rollouts.steps.request_N] - 0.4
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = [surrogate_loss(adapter.train(mode), steps, advantage_N, 7, config) for mode in (True, False)]
    values = [loss.item() for loss, _ in found]
    assert values == pytest.approx([-float(advantage_N.sum()) / 7] * 2, rel=1e-5)
    assert [sums["clipped"] for _, sums in found] == [0, 0]
    noisy, plain = (flat_gradient(loss, adapter) for loss, _ in found)
    assert float((noisy - plain).norm()) > 0.1 * float(plain.norm())


@pytest.mark.parametrize("estimator", TokenEstimator)
def test_ratios_are_per_token_and_clipped(estimator: TokenEstimator) -> None:
    """After a step away from the policy of the rollouts, against min and clip written out."""
    adapter = world_adapter()
    rollouts = every_rollout(adapter)
    steps, advantage_N = rollouts.steps, rollouts.reward_R[rollouts.steps.request_N] - 0.4
    with torch.no_grad():
        adapter.output.bias += torch.tensor([0.5, -0.4, 0.0])
    config = WORLD_CONFIG.model_copy(update={"estimator": estimator, "clip": 0.1})
    loss, sums = surrogate_loss(adapter, steps, advantage_N, 7, config)
    expected, clipped = 0.0, 0
    pi_NA = adapter(inputs_of(steps)).detach().exp()
    for n in range(len(steps)):
        weight_A = steps.log_p_NA[n].exp()
        if estimator is TokenEstimator.ACTION:
            weight_A = torch.eye(3, dtype=torch.float64)[steps.action_N[n]]
        ratio = float((pi_NA[n] * weight_A).sum() / (steps.log_pi_NA[n].exp() * weight_A).sum())
        advantage = float(advantage_N[n])
        expected += min(ratio * advantage, min(max(ratio, 0.9), 1.1) * advantage)
        clipped += abs(ratio - 1) > 0.1
    assert loss.item() == pytest.approx(-expected / 7, rel=1e-5)
    assert sums["clipped"] == clipped > 10


# --- Training in small worlds ---

HOT = 1 / (1 + math.exp(1 / 4))  # the chance of the second best of two tokens at T = 4


def policy_at(adapter: TokenAdapter, text: str, tokens: tuple[int, ...] = (), parallel: int = 1) -> Tensor:
    """π over the actions."""
    state = StepState(
        torch.tensor([tiny_features(text, tokens)]), torch.zeros(1, 3), torch.tensor([0]), torch.tensor([0]),
        torch.tensor([len(tokens)]), torch.tensor([2]), torch.tensor([parallel]), np.zeros(1, dtype=np.uint64),
    )  # fmt: skip
    log_pi_SA = AdaptiveDecoding(adapter).decide(state).log_pi_SK
    assert log_pi_SA is not None
    return log_pi_SA[0].exp()


def value_of(adapter: TokenAdapter) -> float:
    """The exact chance of a right answer over both kinds of prompt."""
    total = 0.0
    for text, answer in (("x!!", (1, 2)), ("y!!", (2, 1))):
        chance = 1.0
        for t, token in enumerate(answer):
            p_A = torch.tensor([[1.0, 1 - HOT], [0.0, HOT]])[token - 1]
            chance *= float(policy_at(adapter, text, answer[:t]) @ p_A)
        total += chance / 2
    return total


@pytest.mark.parametrize("estimator", TokenEstimator)
def test_training_finds_a_policy_that_no_static_strategy_is(estimator: TokenEstimator, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"estimator": estimator})
    adapter = adapter_for(config)
    uniform, best_static = value_of(adapter), max(0.0, (1 - HOT) * HOT)
    assert uniform == pytest.approx((1 - HOT / 2) * HOT / 2)
    config = config.model_copy(update={"validation_samples": 32})
    history = train_token(adapter, run_of(tmp_path, config))
    assert value_of(adapter) > 0.93 * HOT > best_static + 0.15
    assert history.validation_reward == pytest.approx(HOT, abs=0.1)
    assert history.kept_step > 0
    assert not adapter.training


def test_one_adapter_for_every_parallel_budget(tmp_path: Path) -> None:
    """Prompts that look alike, half of them with the unlikely answer: certain at B = 1, diverse at B = 8."""
    config = CONFIG.model_copy(update={"objective": Objective.PASS_K, "budgets": (1, 8), "steps": 35, "prompts": 16})
    logits = lambda _, __: [NEVER, 1.0, 0.5, 0.5]  # noqa: E731
    engine = FakeEngine((EOS, "a", "b", "c"), logits, lambda *_: [1.0, 0, 0, 0, 0], hidden_size=5)
    adapter = adapter_for(config)
    train, validation = (problems(16, prefix, ("a", "b")) for prefix in ("train", "validation"))
    run = run_of(tmp_path, config, engine=engine, task=TinyTask(1), train=train, validation=validation)
    history = train_token(adapter, run)
    certain, diverse = (policy_at(adapter, "x!!", (), parallel)[0] for parallel in (1, 8))
    assert float(certain) > 0.8
    assert float(diverse) < 0.25
    assert set(history.lines[0]["validation"]["by_budget"]) == {"1", "8"}
    best = next(line for line in history.lines if line["step"] == history.kept_step)["validation"]["by_budget"]
    assert best["8"] > best["1"] + 0.2


@pytest.mark.parametrize("objective", Objective)
@pytest.mark.parametrize("fails_at", [1, 4, 9])
def test_interrupted_and_resumed_is_undisturbed(objective: Objective, fails_at: int, tmp_path: Path) -> None:
    config = QUICK.model_copy(update={"objective": objective, "budgets": (1, 4), "with_budget": True})
    folders = [tmp_path / name for name in ("whole", "broken")]
    for folder in folders:
        folder.mkdir()
    whole, broken, resumed = (adapter_for(config) for _ in range(3))
    history = train_token(whole, run_of(folders[0], config))
    with pytest.raises(KeyboardInterrupt):
        train_token(broken, run_of(folders[1], config, engine=CountingEngine(fails_at)))
    torch.rand(3)
    again = train_token(resumed, run_of(folders[1], config, engine=(engine := CountingEngine())))
    assert engine.calls < 6 + 4 * (1 + (objective is Objective.PASS_K)) or fails_at == 1
    assert same_weights(whole, resumed)
    assert without_rates(again.lines) == without_rates(history.lines)
    assert again.kept_step == history.kept_step
    for folder, lines in zip(folders, (history.lines, again.lines), strict=True):
        written = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert written == lines
    assert [line["step"] for line in history.lines] == list(range(7))


def test_an_interruption_between_batches_repeats_nothing(tmp_path: Path) -> None:
    told: list[tuple[int, int, int]] = []

    def interrupt(*line: int) -> None:
        told.append(line)  # type: ignore[arg-type]
        if line[0] == 3:
            raise KeyboardInterrupt

    first, second = CountingEngine(), CountingEngine()
    with pytest.raises(KeyboardInterrupt):
        train_token(adapter_for(QUICK), run_of(tmp_path, engine=first), interrupt)
    assert told == [(1, 6, 64), (2, 6, 128), (3, 6, 192)]
    train_token(adapter_for(QUICK), run_of(tmp_path, engine=second))
    assert (first.calls, second.calls) == (1 + 3 + 1, 3 + 2)  # validation, batches, validations


def test_more_steps_continue_a_finished_run(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("whole", "parts")]
    for folder in folders:
        folder.mkdir()
    whole, part, longer = (adapter_for(QUICK) for _ in range(3))
    history = train_token(whole, run_of(folders[0]))
    train_token(part, run_of(folders[1], QUICK.model_copy(update={"steps": 4})))
    again = train_token(longer, run_of(folders[1], engine=(engine := CountingEngine())))
    assert engine.calls == 2 + 1
    assert same_weights(whole, longer)
    assert without_rates(again.lines) == without_rates(history.lines)
    finished = adapter_for(QUICK)
    assert train_token(finished, run_of(folders[1], engine=CountingEngine(1))).lines == again.lines
    assert same_weights(finished, whole)


def test_a_run_is_a_function_of_its_seed_and_leaves_the_generators_alone(tmp_path: Path) -> None:
    adapters = [adapter_for(QUICK) for _ in range(3)]
    for number, (adapter, seed) in enumerate(zip(adapters, (0, 0, 1), strict=True)):
        (folder := tmp_path / str(number)).mkdir()
        state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
        train_token(adapter, run_of(folder, seed=seed))
        assert torch.equal(torch.get_rng_state(), state)
        assert (np.random.get_state()[1] == numpy_state).all()
        torch.rand(5)
    assert same_weights(adapters[0], adapters[1])
    assert not same_weights(adapters[0], adapters[2])


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"config": QUICK.model_copy(update={"clip": 0.3})},
        {"train": problems(12)},
        {"validation": problems(6, "validation")},
        {"task": TinyTask(3)},
    ],
    ids=lambda other: next(iter(other)),
)
def test_the_checkpoint_of_another_run_is_refused(other: dict[str, Any], tmp_path: Path) -> None:
    train_token(adapter_for(QUICK), run_of(tmp_path, QUICK.model_copy(update={"steps": 1})))
    metrics = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(StoreError, match="belongs to a run with other settings"):
        train_token(adapter_for(QUICK), run_of(tmp_path, **other))
    assert (tmp_path / "metrics.jsonl").read_text() == metrics


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"nonsense")
    with pytest.raises(StoreError, match="damaged or no checkpoint; delete it to train anew"):
        train_token(adapter_for(QUICK), run_of(tmp_path))


def test_the_best_batch_on_validation_is_kept(tmp_path: Path) -> None:
    """Where training only hurts, the uniform policy; else the weights of a run that ends there."""
    (tmp_path / "hurt").mkdir()
    adapter = adapter_for(CONFIG)
    harmed = problems(8, "validation", ("ba", "ab"))
    history = train_token(adapter, run_of(tmp_path / "hurt", CONFIG, validation=harmed))
    assert history.kept_step == 0
    assert history.validation_reward > history.lines[-1]["validation"]["reward"]
    torch.testing.assert_close(policy_at(adapter, "x!!"), torch.tensor([0.5, 0.5]))
    (tmp_path / "short").mkdir()
    config = QUICK.model_copy(update={"steps": 10})
    (tmp_path / "long").mkdir()
    long, short = adapter_for(config), adapter_for(config)
    history = train_token(long, run_of(tmp_path / "long", config))
    looks = {line["step"]: line["validation"]["reward"] for line in history.lines if "validation" in line}
    assert list(looks) == [0, 2, 4, 6, 8, 10]
    assert history.kept_step == max(looks, key=lambda step: (looks[step], -step))
    train_token(short, run_of(tmp_path / "short", config.model_copy(update={"steps": history.kept_step})))
    assert same_weights(long, short)


@pytest.mark.filterwarnings("error")
def test_batches_without_reward_variance_are_skipped(tmp_path: Path) -> None:
    adapter, untouched = adapter_for(QUICK), adapter_for(QUICK)
    never = problems(16, answers=("c", "c"))
    history = train_token(adapter, run_of(tmp_path, train=never))
    assert [line["skipped"] for line in history.lines[1:]] == ["no reward variance"] * 6
    assert all(line["reward"] == 0 for line in history.lines[1:])
    assert same_weights(adapter, untouched)
    config = QUICK.model_copy(update={"steps": 100})
    engine = CountingEngine()
    with pytest.raises(RheostatError, match=r"10 batches in a row taught nothing.*no reward variance; take prompts"):
        train_token(adapter_for(QUICK), run_of(tmp_path, config, train=never, engine=engine))
    assert engine.calls == 4 + 1  # batches 7 to 10, and a look at the validation problems after the eighth


def test_masked_batches_are_skipped(tmp_path: Path) -> None:
    config = QUICK.model_copy(update={"mask_above": 0.5, "steps": 2})
    history = train_token(adapter_for(config), run_of(tmp_path, config))
    assert [(line["skipped"], line["recorded"]) for line in history.lines[1:]] == [("every token is masked", 0)] * 2


def test_a_group_with_a_missing_verdict_is_left_out(tmp_path: Path) -> None:
    """Two prompts, one of them without verdicts, teach what the other teaches alone."""
    adapters, histories = [], []
    pair = problems(2)
    for name, train, prompts in (("both", pair, 2), ("one", pair[:1], 1)):
        (tmp_path / name).mkdir()
        config = QUICK.model_copy(
            update={"features": Features.ENTROPY, "with_budget": True, "prompts": prompts, "steps": 3, "beta": 0.1}
        )
        adapters.append(adapter_for(config))
        run = run_of(tmp_path / name, config, train=train, task=TinyTask(broken=["train-1"]))
        histories.append(train_token(adapters[-1], run))
    for name in ("reward", "loss", "gradient_norm", "entropy", "clipped"):
        both, one = ([line[name] for line in history.lines[1:]] for history in histories)
        assert both == one, name
    assert same_weights(*adapters)
    assert [line["without_verdict"] for line in histories[0].lines[1:]] == [8] * 3


def test_without_any_verdict_training_stops(tmp_path: Path) -> None:
    task = TinyTask(broken=[problem.id for problem in problems(16)])
    config = QUICK.model_copy(update={"steps": 20})
    with pytest.raises(RheostatError, match="taught nothing, the last because: no group has all its verdicts"):
        train_token(adapter_for(config), run_of(tmp_path, config, task=task))
    json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1], parse_constant=pytest.fail)


@pytest.mark.parametrize("passes", [1, 2])
def test_weights_that_run_away_end_training(passes: int, tmp_path: Path) -> None:
    config = QUICK.model_copy(update={"learning_rate": 1e37, "passes": passes})
    state = torch.get_rng_state()
    message = r"the policy became (nan|-inf) at step 1; lower learning_rate .*checkpoint\.pt holds the state before"
    with pytest.raises(RheostatError, match=message):
        train_token(adapter_for(config), run_of(tmp_path, config))
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(KeyboardInterrupt):  # the checkpoint loads, and its validation is not repeated
        train_token(adapter_for(config), run_of(tmp_path, config, engine=CountingEngine(1)))
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [0]


@pytest.mark.parametrize("damage", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_ends_training_at_the_last_good_batch(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = adapter_for(QUICK)
    (tmp_path / "whole").mkdir()
    history = train_token(whole, run_of(tmp_path / "whole"))
    calls = 0

    def broken(adapter: TokenAdapter, *others: Any) -> tuple[Tensor, dict[str, float]]:
        nonlocal calls
        calls += 1
        loss, sums = surrogate_loss(adapter, *others)
        if calls <= 2 * 3 + 1:  # two passes per batch: the second one of the fourth batch breaks
            return loss, sums
        if damage == "loss":
            return loss * math.nan, sums
        adapter.output.bias.register_hook(lambda gradient: gradient * math.nan)
        return loss, sums

    (folder := tmp_path / "broken").mkdir()
    monkeypatch.setattr(updates, "surrogate_loss", broken)
    with pytest.raises(RheostatError, match=rf"the {damage} became nan at step 4; lower learning_rate"):
        train_token(adapter_for(QUICK), run_of(folder))
    monkeypatch.undo()
    resumed = adapter_for(QUICK)
    again = train_token(resumed, run_of(folder, engine=(engine := CountingEngine())))
    assert engine.calls == 3 + 2  # batches 4, 5 and 6, and two looks
    assert same_weights(resumed, whole)
    assert without_rates(again.lines) == without_rates(history.lines)


def test_features_that_are_not_finite_end_training(tmp_path: Path) -> None:
    """From the first batch on, and in a later one only."""
    (tmp_path / "first").mkdir()
    with pytest.raises(RheostatError, match="not finite"):
        train_token(adapter_for(QUICK), run_of(tmp_path / "first", engine=tiny_engine(lambda *_: [math.nan] * 5)))
    (tmp_path / "later").mkdir()
    features = lambda text, tokens: [math.inf] * 5 if text == "x!!!" else tiny_features(text, tokens)  # noqa: E731
    with pytest.raises(RheostatError, match=r"not finite|became nan at step [234]"):
        train_token(
            adapter_for(QUICK),
            run_of(tmp_path / "later", engine=tiny_engine(features), validation=problems(2, "validation"), seed=2),
        )


def test_the_size_of_a_chunk_changes_rounding_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = QUICK.model_copy(update={"dropout": 0.0, "steps": 1})
    adapters, lines = [adapter_for(config) for _ in range(2)], []
    for adapter, chunk in zip(adapters, (updates._CHUNK, 7), strict=True):
        (tmp_path / str(chunk)).mkdir()
        monkeypatch.setattr(updates, "_CHUNK", chunk)
        lines.append(train_token(adapter, run_of(tmp_path / str(chunk), config)).lines[1])
    for name in ("loss", "gradient_norm", "entropy", "clipped"):
        assert lines[0][name] == pytest.approx(lines[1][name], rel=1e-4, abs=1e-6), name


def test_learning_rate_and_prompts_follow_the_plan(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    class Watch(CountingEngine):
        def generate(self, requests: Sequence[Request], *others: Any) -> list[Completion]:
            seen.append([request.prompt.problem_id for request in requests[:: QUICK.group]])
            assert {request.sample for request in requests} >= {request.sample for request in requests[: QUICK.group]}
            return super().generate(requests, *others)

    config = QUICK.model_copy(update={"steps": 8, "validate_every": 100, "decay": 0.5})
    history = train_token(adapter_for(config), run_of(tmp_path, config, engine=Watch()))
    assert [line["learning_rate"] for line in history.lines[1:]] == pytest.approx([1e-2 * 0.5**i for i in range(8)])
    batches = seen[1:9]
    for epoch in (batches[:4], batches[4:]):
        assert sorted(name for batch in epoch for name in batch) == sorted(problem.id for problem in problems(16))
    assert batches[:4] != batches[4:]


def test_every_batch_draws_anew_and_validation_draws_the_same(tmp_path: Path) -> None:
    samples: list[tuple[int, frozenset[tuple[str, int, int]]]] = []

    class Watch(CountingEngine):
        def generate(self, requests: Sequence[Request], *others: Any) -> list[Completion]:
            streams = frozenset(request.stream for request in requests)
            samples.append((len(requests), streams))  # type: ignore[arg-type]
            return super().generate(requests, *others)

    train_token(adapter_for(QUICK), run_of(tmp_path, engine=Watch()))
    training_streams = [streams for count, streams in samples if count == 4 * 8 and streams]
    assert sum(count for count, _ in samples) == sum(len(streams) for _, streams in samples)
    # eight validation problems × four samples are 32 requests too: looks come first, and after every second batch
    looks = [samples[i][1] for i in (0, 3, 6, 9)]
    batches = [samples[i][1] for i in (1, 2, 4, 5, 7, 8)]
    assert len(training_streams) == len(samples) == 10
    assert len(set(looks)) == 1
    assert len(frozenset().union(looks[0], *batches)) == 7 * 32


def test_metrics_of_a_batch_by_hand() -> None:
    adapter = adapter_for(QUICK)
    owners = [replace(problem, member="cot") if i < 1 else problem for i, problem in enumerate(problems(3))]
    groups = collect_groups(
        tiny_engine(), TinyTask(broken=["train-2"]), owners, AdaptiveDecoding(adapter), SPACE.order,
        torch.tensor([1, 1, 1]), 4, 0, 0, Recorder(SPACE.order, 1.0),
    )  # fmt: skip
    assert groups.cot_P.tolist() == [True, False, False]
    assert groups.steps is not None
    found = describe(groups, adapter)
    assert found["rollouts"] == 12
    assert found["tokens"] == found["recorded"] == 24
    assert (found["length"], found["truncated"], found["without_verdict"]) == (2, 1, 4)
    assert found["reward"] == pytest.approx(float(groups.reward_PG[:2].mean()))
    action_N, is_cot_N = groups.steps.action_N, groups.steps.request_N < 4
    for name, own_N in (("actions", is_cot_N | True), ("actions_cot", is_cot_N), ("actions_direct", ~is_cot_N)):
        assert found[name] == pytest.approx([float((action_N[own_N] == a).float().mean()) for a in (0, 1)], abs=1e-5)


def test_groups_are_what_the_engine_wrote() -> None:
    adapter, budget_P = adapter_for(QUICK), torch.tensor([1, 3])
    asked: list[Request] = []

    class Watch(CountingEngine):
        def generate(self, requests: Sequence[Request], *others: Any) -> list[Completion]:
            asked.extend(requests)
            self.completions = super().generate(requests, *others)
            return self.completions

    engine, task = Watch(), TinyTask()
    groups = collect_groups(
        engine, task, problems(2), AdaptiveDecoding(adapter), SPACE.order, budget_P, 3, 30, 5, Recorder(SPACE.order)
    )
    expected = [
        Request(task.prompt(problem), None, 30 + g, 5, 2, int(budget))
        for problem, budget in zip(problems(2), budget_P, strict=True)
        for g in range(3)
    ]
    assert asked == expected
    answers = [problem.answer for problem in problems(2) for _ in range(3)]
    right = [float(done.text == answer) for done, answer in zip(engine.completions, answers, strict=True)]
    assert groups.reward_PG.flatten().tolist() == right
    assert (groups.rollouts, groups.tokens) == (6, 12)
    assert groups.steps is not None
    assert groups.steps.parallel_N.tolist() == [1] * 6 + [3] * 6
    unrecorded = collect_groups(
        tiny_engine(), task, problems(2), AdaptiveDecoding(adapter), SPACE.order, budget_P, 3, 30, 5
    )
    assert unrecorded.steps is None
    assert torch.equal(unrecorded.reward_PG, groups.reward_PG)


def test_informative_prompts_lie_strictly_between_the_limits() -> None:
    rates = np.array([0.0, 0.25, 0.5, 1.0])
    some = problems(4)
    assert informative_prompts(some, rates, QUICK) == some[1:3]
    assert informative_prompts(some, rates, QUICK.model_copy(update={"filter_low": 0.25})) == some[2:3]
    with pytest.raises(RheostatError, match=r"none of 4 prompts .*between 0\.5 and 1 .*mean is 0\.438.*filter_low"):
        informative_prompts(some, rates, QUICK.model_copy(update={"filter_low": 0.5}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budgets": ()}, "rising order"),
        ({"budgets": (0, 1)}, "rising order"),
        ({"budgets": (8, 1)}, "rising order"),
        ({"budgets": (4, 4)}, "rising order"),
        ({"budgets": (1, 8), "group": 8}, "group must exceed the largest parallel budget, 8"),
        ({"group": 1, "objective": "pass@1"}, "group"),
        ({"estimator": "both"}, "estimator"),
        ({"clip": 0}, "clip"),
        ({"mask_above": 0}, "mask_above"),
        ({"dropout": 1}, "dropout"),
        ({"momentum": 0.9}, "momentum"),
    ],
)
def test_config_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TokenTrainingConfig(**fields)


def test_pass_at_1_sees_no_parallel_budget() -> None:
    config = TokenTrainingConfig(objective=Objective.PASS_1, group=2)
    assert config.seen_budgets == ()
    assert TokenTrainingConfig().seen_budgets == (1, 2, 4, 8)
    assert TokenHistory([{"step": 0, "validation": {"reward": 1}}], 0).validation_reward == 1.0


# --- Scales of parallel budgets ---


def test_advantages_are_scaled_by_earlier_batches_of_their_budget() -> None:
    trainer = object.__new__(training._Trainer)
    trainer.mean_squares = {}
    budget_P = torch.tensor([1, 8, 1, 8])
    all_P = torch.ones(4, dtype=torch.bool)
    first_PG = torch.tensor([[0.5, -0.5], [8.0, -2.0], [0.25, -0.25], [0.0, 0.0]])
    of_1 = (0.5**2 * 2 + 0.25**2 * 2) / 4
    of_8 = (8.0**2 + 2.0**2) / 4
    scaled_PG = trainer._scaled(first_PG, budget_P, all_P)
    torch.testing.assert_close(scaled_PG[[0, 2]], first_PG[[0, 2]] / of_1**0.5)
    torch.testing.assert_close(scaled_PG[[1, 3]], first_PG[[1, 3]] / of_8**0.5)
    assert trainer.mean_squares == pytest.approx({"1": of_1, "8": of_8})
    second_PG = 3 * first_PG  # its own scale does not enter: a scale that it shaped would be no constant
    torch.testing.assert_close(trainer._scaled(second_PG, budget_P, all_P), 3 * scaled_PG)
    assert trainer.mean_squares == pytest.approx({"1": of_1 * (0.9 + 0.9), "8": of_8 * (0.9 + 0.9)})


def test_groups_without_all_verdicts_and_budgets_without_variance_are_left_alone() -> None:
    trainer = object.__new__(training._Trainer)
    trainer.mean_squares = {}
    budget_P = torch.tensor([1, 1, 8])
    advantage_PG = torch.tensor([[1.0, -1.0], [5.0, 5.0], [0.0, 0.0]])
    scaled_PG = trainer._scaled(advantage_PG, budget_P, torch.tensor([True, False, True]))
    assert scaled_PG.tolist() == [[1.0, -1.0], [0.0, 0.0], [0.0, 0.0]]
    assert trainer.mean_squares == {"1": 1.0}
