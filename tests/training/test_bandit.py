"""Training on synthetic bandits whose best policy is known."""

import json
from collections.abc import Callable
from math import inf, log, nan

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from rheostat.adapters.sequence import SequenceAdapter, SequenceConfig
from rheostat.decoding.strategy import ActionSpace, Strategy
from rheostat.errors import RheostatError
from rheostat.rollouts.sweep import Sweep
from rheostat.seeding import derive_seed
from rheostat.training.bandit import BanditConfig, BanditData, DrawRewards, Estimator, expected_reward, train_bandit
from rheostat.types import Problem

SPACE = ActionSpace((Strategy(0), Strategy(0.5), Strategy(1.0)))
BUDGETS = (1, 8)
HIDDEN = 4

# Rewards of three actions by budget and kind of problem. Problems of the first kind want action 0 at B = 1 and
# action 1 at B = 8; those of the second kind always want action 2.
REWARD_K2A = torch.tensor([[[0.5, 0.1, 0.1], [0.1, 0.2, 0.6]], [[0.5, 0.94, 0.1], [0.1, 0.3, 0.9]]])
OPTIMUM = (0.5 + 0.6 + 0.94 + 0.9) / 4
BEST_STATIC = (0.1 + 0.6 + 0.1 + 0.9) / 4
BEST_WITHOUT_BUDGET = ((0.1 + 0.94) / 2 + (0.6 + 0.9) / 2) / 2

CONFIG = BanditConfig(budgets=BUDGETS, epochs=15, learning_rate=1e-2, width=32)
QUICK = CONFIG.model_copy(update={"epochs": 3})


def bandit(problems: int = 128, seed: int = 0, reward_K2A: Tensor = REWARD_K2A) -> BanditData:
    """The sign of the second feature tells a problem's kind; the others are noise."""
    embedding_PH = torch.randn(problems, HIDDEN, generator=torch.Generator().manual_seed(seed))
    kind_P = torch.arange(problems) % 2
    embedding_PH[:, 1] = embedding_PH[:, 1].abs().add(0.5) * (1 - 2 * kind_P)
    return BanditData(embedding_PH, reward_K2A[:, kind_P])


def adapter_of(budgets: tuple[int, ...] = BUDGETS, with_budget: bool = True, seed: int = 0) -> SequenceAdapter:
    return SequenceAdapter(SequenceConfig(HIDDEN, with_budget, width=32, budgets=budgets), SPACE, seed)


def coin_flips(data: BanditData, budgets: tuple[int, ...], seed: int = 0) -> DrawRewards:
    """1 with the cell's reward as its chance: what B fresh samples would give."""
    position = {budget: index for index, budget in enumerate(budgets)}

    def draw(problem_P: Tensor, action_PG: Tensor, budget_P: Tensor, round_: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(seed, round_, str(problem_P.tolist())))
        k_P = torch.tensor([position[int(budget)] for budget in budget_P])
        chance_PG = data.reward_KPA[k_P[:, None], problem_P[:, None], action_PG]
        return (torch.rand(chance_PG.shape, generator=generator) < chance_PG).float()

    return draw


def refuse(*_: object) -> Tensor:
    raise AssertionError("full_information draws no rewards")


def trained(config: BanditConfig = CONFIG, with_budget: bool = True, seed: int = 0) -> tuple[SequenceAdapter, float]:
    """An adapter, and its value on problems that it has not seen."""
    train, adapter = bandit(256), adapter_of(config.budgets, with_budget)
    draw = coin_flips(train, config.budgets) if config.estimator is Estimator.ONLINE else refuse
    train_bandit(adapter, train, bandit(64, seed=1), config, seed, draw)
    return adapter, expected_reward(adapter, bandit(500, seed=2), BUDGETS)[0]


def same_weights(one: SequenceAdapter, other: SequenceAdapter) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_full_information_finds_the_optimum_with_budget_and_only_with_budget() -> None:
    with_budget, without = trained()[1], trained(with_budget=False)[1]
    assert with_budget >= 0.95 * OPTIMUM > BEST_WITHOUT_BUDGET
    assert BEST_STATIC + 0.15 < without <= BEST_WITHOUT_BUDGET + 1e-6


def test_online_beats_the_best_static_strategy_clearly() -> None:
    config = CONFIG.model_copy(update={"estimator": Estimator.ONLINE, "epochs": 25})
    assert trained(config)[1] > BEST_STATIC + 0.15


def test_online_learns_from_drawn_rewards_alone() -> None:
    """Training data without rewards, as `rheostat train` hands them over; the right arguments at every draw."""
    train, calls = bandit(96), []
    flip = coin_flips(train, BUDGETS)

    def draw(problem_P: Tensor, action_PG: Tensor, budget_P: Tensor, round_: int) -> Tensor:
        calls.append((problem_P, action_PG, budget_P, round_))
        return flip(problem_P, action_PG, budget_P, round_)

    config = QUICK.model_copy(update={"estimator": Estimator.ONLINE, "group": 3})
    train_bandit(adapter_of(), BanditData(train.embedding_PH, torch.empty(0)), bandit(16, seed=1), config, 0, draw)
    assert [(len(problem_P), round_) for problem_P, _, _, round_ in calls] == [
        (size, epoch) for epoch in (1, 2, 3) for size in (64, 32)
    ]
    for epoch in range(3):
        seen = torch.cat([problem_P for problem_P, *_ in calls[2 * epoch : 2 * epoch + 2]])
        assert sorted(seen.tolist()) == list(range(96))
    assert all(action_PG.shape == (len(problem_P), 3) for problem_P, action_PG, _, _ in calls)
    assert set(torch.cat([action_PG.flatten() for _, action_PG, _, _ in calls]).tolist()) == {0, 1, 2}
    assert set(torch.cat([budget_P for _, _, budget_P, _ in calls]).tolist()) == set(BUDGETS)


def test_trained_at_a_single_budget() -> None:
    config = CONFIG.model_copy(update={"budgets": (8,)})
    adapter, train = adapter_of((8,)), bandit(256, reward_K2A=REWARD_K2A[1:])
    history, _ = train_bandit(adapter, train, bandit(64, seed=1, reward_K2A=REWARD_K2A[1:]), config, 0)
    value, shares = expected_reward(adapter, bandit(500, seed=2, reward_K2A=REWARD_K2A[1:]), (8,))
    assert value >= 0.95 * (0.94 + 0.9) / 2
    assert list(shares) == ["8"]
    assert list(history[-1].action_probability) == ["8"]


@pytest.mark.parametrize("estimator", list(Estimator))
def test_a_run_is_a_function_of_its_seed(estimator: Estimator) -> None:
    config = QUICK.model_copy(update={"estimator": estimator})
    first, _ = trained(config, seed=3)
    torch.manual_seed(99)
    torch.rand(7)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    again, _ = trained(config, seed=3)
    assert same_weights(first, again)
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()
    other, _ = trained(config, seed=4)
    assert not same_weights(first, other)


def test_the_best_epoch_on_validation_is_kept_and_its_weights_restored() -> None:
    """Validation agrees with training on what is learned first, and disagrees on what is learned later."""
    learned = torch.tensor([[[0.0, 0.0, 1.0], [0.7, 0.0, 0.0]]])
    judged = torch.tensor([[[0.0, 0.0, 0.5], [0.0, 1.0, 1.0]]])
    config = BanditConfig(budgets=(4,), epochs=10, learning_rate=1e-2, width=32, beta=0.05)
    train, validation = bandit(reward_K2A=learned), bandit(64, seed=1, reward_K2A=judged)
    adapter = adapter_of((4,))
    history, kept = train_bandit(adapter, train, validation, config, 0)
    rewards = [epoch.validation_reward for epoch in history]
    assert kept == int(np.argmax(rewards))
    assert 0 < kept < config.epochs
    assert expected_reward(adapter, validation, (4,))[0] == rewards[kept] > rewards[-1] + 0.01
    assert not adapter.training
    shorter = adapter_of((4,))
    _, kept_again = train_bandit(shorter, train, validation, config.model_copy(update={"epochs": kept}), 0)
    assert kept_again == kept
    assert same_weights(adapter, shorter)


def test_where_training_only_hurts_the_uniform_policy_is_kept() -> None:
    adapter, train = adapter_of(), bandit()
    _, kept = train_bandit(adapter, train, bandit(64, seed=1, reward_K2A=1 - REWARD_K2A), QUICK, 0)
    assert kept == 0
    pi_PA = adapter.probabilities(train.embedding_PH, torch.ones(128, dtype=torch.int64))
    torch.testing.assert_close(pi_PA, torch.full((128, 3), 1 / 3))
    torch.testing.assert_close(adapter.standardizer.mean_H, train.embedding_PH.mean(0))  # the file's features are whole


def test_history_begins_with_the_uniform_policy_and_follows_every_epoch() -> None:
    told: list[tuple[int, int, int]] = []
    tell: Callable[[int, int, int], None] = lambda *line: told.append(line)  # noqa: E731
    history, _ = train_bandit(adapter_of(), bandit(), bandit(64, seed=1), QUICK, 0, progress=tell)
    assert [epoch.epoch for epoch in history] == [0, 1, 2, 3]
    assert told == [(epoch, 3, 0) for epoch in range(4)]
    first = history[0]
    assert first.validation_reward == pytest.approx(float(REWARD_K2A.mean()), abs=1e-6)
    assert first.entropy == pytest.approx(log(3), abs=1e-6)
    assert first.action_probability == {"1": [0.333333] * 3, "8": [0.333333] * 3}
    last = history[-1]
    assert last.entropy < log(3) - 0.01
    assert all(sum(shares) == pytest.approx(1, abs=1e-5) for shares in last.action_probability.values())
    assert json.loads(json.dumps(last.to_dict()))["validation_reward"] == last.validation_reward


def test_expected_reward_by_hand() -> None:
    """A uniform policy: the mean over actions, then problems, then budgets."""
    data = BanditData(torch.zeros(1, HIDDEN), torch.tensor([[[0.0, 0.3, 0.9]], [[0.3, 0.6, 0.9]]]))
    value, shares = expected_reward(adapter_of(), data, BUDGETS)
    assert value == pytest.approx((0.4 + 0.6) / 2)
    assert shares == {"1": [0.333333] * 3, "8": [0.333333] * 3}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("broken", [nan, inf])
def test_a_loss_that_is_not_finite_ends_training(broken: float) -> None:
    train = bandit()
    train.reward_KPA[0, 5, 1] = broken
    state = torch.get_rng_state()
    with pytest.raises(RheostatError, match=r"loss became (nan|-inf) in epoch 1; lower bandit\.learning_rate"):
        train_bandit(adapter_of(), train, bandit(16, seed=1), QUICK, 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_data_of_a_sweep_by_hand() -> None:
    problems = tuple(Problem(str(i), "t", "m", "q", "a") for i in range(2))
    rewards_PAS = np.array(
        [[[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]], [[0, 0, 0, 0], [1, 1, 0, 0], [1, np.nan, 1, 1]]], dtype=np.float32
    )
    lengths_PAS = np.zeros(rewards_PAS.shape, dtype=np.int64)
    sweep = Sweep(problems, SPACE, rewards_PAS, lengths_PAS, lengths_PAS > 0, -lengths_PAS, 24, 0, 0, 1)
    data = BanditData.of(torch.zeros(2, HIDDEN), sweep, (1, 2))
    expected = [[[1, 1 / 4, 0], [0, 1 / 2, 3 / 4]], [[1, 1 / 2, 0], [0, 5 / 6, 1]]]
    assert data.reward_KPA.dtype == torch.float32
    torch.testing.assert_close(data.reward_KPA, torch.tensor(expected))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("budgets", ()),
        ("budgets", (0, 1)),
        ("budgets", (-2,)),
        ("budgets", (1.5,)),
        ("budgets", (8, 1)),
        ("budgets", (4, 4)),
        ("estimator", "both"),
        ("epochs", 0),
        ("batch_size", 0),
        ("learning_rate", 0),
        ("decay", 0),
        ("decay", 1.01),
        ("beta", -0.1),
        ("group", 1),
        ("width", 0),
        ("momentum", 0.9),
    ],
)
def test_config_refuses(field: str, value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        BanditConfig(**{field: value})  # type: ignore[arg-type]
    assert caught.value.errors()[0]["loc"][0] == field


def test_config_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        CONFIG.epochs = 1  # type: ignore[misc]
