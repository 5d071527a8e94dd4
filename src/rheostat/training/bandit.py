"""Training of sequence-level adapters: a contextual bandit over decoding strategies (paper, section 2.2)."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from rheostat.adapters.sequence import SequenceAdapter
from rheostat.errors import RheostatError
from rheostat.rollouts.sweep import Sweep
from rheostat.seeding import derive_seed
from rheostat.training.budgets import ParallelBudgets
from rheostat.training.objectives import entropy, full_information_loss, reinforce_loss


class Estimator(StrEnum):
    """How the policy gradient is estimated."""

    ONLINE = "online"  # the paper's: actions drawn from π, fresh rollouts at every update
    FULL_INFORMATION = "full_information"  # all actions of a prompt, from one sweep that every update reads again


class BanditConfig(BaseModel):
    """How a sequence-level adapter is trained."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    estimator: Estimator = Field(
        Estimator.FULL_INFORMATION,
        description="full_information reads one sweep of all strategies; online draws actions and samples afresh",
    )
    budgets: ParallelBudgets = Field((1, 2, 4, 8), description="parallel budgets B that training draws from")
    epochs: int = Field(80, ge=1, description="passes over the training problems")
    batch_size: int = Field(64, ge=1, description="problems in one update")
    learning_rate: float = Field(5e-4, gt=0, description="Adam's step size at the start")
    decay: float = Field(0.97, gt=0, le=1, description="factor on the step size after each epoch")
    beta: float = Field(0.01, ge=0, description="weight of the policy's entropy in the objective, equation (1)")
    group: int = Field(4, ge=2, description="actions drawn per prompt and update (online only)")
    width: int = Field(128, ge=1, description="hidden units of each layer of the adapter")


@dataclass(frozen=True, slots=True)
class BanditData:
    """What a bandit sees of P problems: embeddings, and each action's pass@B for each of K budgets."""

    embedding_PH: Float[Tensor, "P H"]
    reward_KPA: Float[Tensor, "K P A"]

    @classmethod
    def of(cls, embedding_PH: Float[Tensor, "P H"], sweep: Sweep, budgets: tuple[int, ...]) -> Self:
        """Rewards from a sweep; it needs at least max(budgets) samples per cell."""
        reward_KPA = np.stack([sweep.pass_at(budget) for budget in budgets])
        return cls(embedding_PH, torch.from_numpy(reward_KPA).float())


@dataclass(frozen=True, slots=True)
class Epoch:
    """One line of the training history; rewards and probabilities are means over the validation problems."""

    epoch: int
    loss: float
    entropy: float
    validation_reward: float
    action_probability: dict[str, list[float]]

    def to_dict(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self.__slots__}


DrawRewards = Callable[[Tensor, Tensor, Tensor, int], Float[Tensor, "P G"]]
"""Rewards (1 if one of B fresh samples is right) of actions: called with problem_P, action_PG, budget_P, round."""


def expected_reward(
    adapter: SequenceAdapter, data: BanditData, budgets: tuple[int, ...]
) -> tuple[float, dict[str, list[float]]]:
    """Σ_a π(a|x, B)·pass@B(x, a), averaged over problems and budgets; and the mean π at each budget."""
    rewards, shares = [], {}
    for reward_PA, budget in zip(data.reward_KPA, budgets, strict=True):
        pi_PA = adapter.probabilities(data.embedding_PH, torch.full((len(reward_PA),), budget))
        rewards.append(float((pi_PA * reward_PA).sum(-1).mean()))
        shares[str(budget)] = [round(float(share), 6) for share in pi_PA.mean(0)]
    return sum(rewards) / len(rewards), shares


def train_bandit(
    adapter: SequenceAdapter,
    train: BanditData,
    validation: BanditData,
    config: BanditConfig,
    seed: int,
    draw_rewards: DrawRewards | None = None,
    progress: Callable[[int, int, int], None] | None = None,
) -> tuple[list[Epoch], int]:
    """Train ``adapter`` in place; it ends with the weights of the epoch that did best on validation.

    Args:
        adapter: from its seed; features are standardised on the training embeddings first.
        train: the rewards are read by ``full_information`` only.
        validation: for the history and the choice of the epoch; never learned from.
        config: see :class:`BanditConfig`.
        seed: order of problems, budgets, actions and dropout are functions of it alone.
        draw_rewards: where ``online`` gets its rewards from.
        progress: called with epoch, epochs, and 0 (nothing is generated).

    Returns:
        The history (epoch 0 is the untrained, uniform policy) and the epoch that was kept.

    Raises:
        RheostatError: the loss became non-finite.
    """
    adapter.standardizer.fit(train.embedding_PH)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, config.decay)
    history: list[Epoch] = []
    best, kept, weights = -1.0, 0, {name: value.clone() for name, value in adapter.state_dict().items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "bandit") % 2**63)
        for epoch in range(config.epochs + 1):
            losses = [0.0] if epoch == 0 else _one_epoch(adapter, train, config, optimizer, draw_rewards, epoch)
            reward, shares = expected_reward(adapter, validation, config.budgets)
            history.append(
                Epoch(epoch, float(np.mean(losses)), _mean_entropy(adapter, validation, config.budgets), reward, shares)
            )
            if epoch:
                schedule.step()
            if reward > best + 1e-9:
                best, kept = reward, epoch
                weights = {name: value.clone() for name, value in adapter.state_dict().items()}
            if progress:
                progress(epoch, config.epochs, 0)
    adapter.load_state_dict(weights)
    adapter.eval()
    return history, kept


def _mean_entropy(adapter: SequenceAdapter, data: BanditData, budgets: tuple[int, ...]) -> float:
    values = [
        entropy(
            adapter.probabilities(data.embedding_PH, torch.full((len(data.embedding_PH),), b)).clamp_min(1e-12).log()
        )
        for b in budgets
    ]
    return float(torch.stack(values).mean())


def _one_epoch(
    adapter: SequenceAdapter,
    train: BanditData,
    config: BanditConfig,
    optimizer: torch.optim.Optimizer,
    draw_rewards: DrawRewards | None,
    epoch: int,
) -> list[float]:
    adapter.train()
    losses = []
    for problem_P in torch.split(torch.randperm(len(train.embedding_PH)), config.batch_size):
        if config.estimator is Estimator.FULL_INFORMATION:
            loss = _full_information(adapter, train, config, problem_P)
        else:
            assert draw_rewards is not None, "the online estimator needs draw_rewards"
            loss = _online(adapter, train, config, problem_P, draw_rewards, epoch)
        if not torch.isfinite(loss):
            raise RheostatError(
                f"training: the loss became {loss.item()} in epoch {epoch}; lower bandit.learning_rate "
                f"(now {config.learning_rate:g})"
            )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def _full_information(
    adapter: SequenceAdapter, train: BanditData, config: BanditConfig, problem_P: Int[Tensor, " P"]
) -> Tensor:
    """The loss summed exactly over actions and averaged over all budgets."""
    losses = [
        full_information_loss(
            adapter(train.embedding_PH[problem_P], torch.full((len(problem_P),), budget)),
            reward_PA[problem_P],
            config.beta,
        )
        for budget, reward_PA in zip(config.budgets, train.reward_KPA, strict=True)
    ]
    return torch.stack(losses).mean()


def _online(
    adapter: SequenceAdapter,
    train: BanditData,
    config: BanditConfig,
    problem_P: Int[Tensor, " P"],
    draw_rewards: DrawRewards,
    epoch: int,
) -> Tensor:
    """A budget drawn per prompt, G actions drawn from π, fresh rollouts under each."""
    budgets = torch.tensor(config.budgets)
    budget_P = budgets[torch.randint(len(budgets), (len(problem_P),))]
    log_pi_PA = adapter(train.embedding_PH[problem_P], budget_P)
    action_PG = torch.multinomial(log_pi_PA.detach().exp(), config.group, replacement=True)
    reward_PG = draw_rewards(problem_P, action_PG, budget_P, epoch)
    return reinforce_loss(log_pi_PA, action_PG, reward_PG, config.beta)
