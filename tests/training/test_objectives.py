"""Losses against hand calculation, and `online` against `full_information` by enumeration of every draw."""

from collections.abc import Callable
from itertools import product
from math import inf, log

import pytest
import torch
from torch import Tensor

from rheostat.decoding.recording import marginal_log_probability
from rheostat.training.objectives import (
    clipped_surrogate,
    entropy,
    full_information_loss,
    leave_one_out_advantage,
    pass_at_k_advantage,
    reinforce_loss,
)

LOGITS_PA = torch.tensor([[0.3, -0.7, 1.1], [-0.2, 0.9, 0.4]], dtype=torch.float64)
CHANCE_PA = torch.tensor([[0.2, 0.9, 0.5], [0.7, 0.1, 0.4]], dtype=torch.float64)


def gradient(loss_of: Callable[[Tensor], Tensor], logits_PA: Tensor) -> Tensor:
    leaf_PA = logits_PA.clone().requires_grad_()
    loss_of(leaf_PA.log_softmax(-1)).backward()
    assert leaf_PA.grad is not None
    return leaf_PA.grad


def test_advantage_by_hand() -> None:
    reward_PG = torch.tensor([[1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    third = 1 / 3
    expected = torch.tensor([[third, -1.0, third, third], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(leave_one_out_advantage(reward_PG), expected)
    torch.testing.assert_close(leave_one_out_advantage(torch.tensor([[1.0, 0.0]])), torch.tensor([[1.0, -1.0]]))


def test_no_reward_is_in_its_own_baseline() -> None:
    reward_PG = torch.tensor([[0.3, 0.8, 0.1]], dtype=torch.float64)
    changed = reward_PG + torch.tensor([[1.0, 0.0, 0.0]])
    difference = leave_one_out_advantage(changed) - leave_one_out_advantage(reward_PG)
    torch.testing.assert_close(difference, torch.tensor([[1.0, -0.5, -0.5]], dtype=torch.float64))


def test_entropy_by_hand() -> None:
    pi_PA = torch.tensor([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]], dtype=torch.float64)
    got = entropy(pi_PA.log()).tolist()
    assert got == pytest.approx([1.5 * log(2), log(3)], abs=1e-12)
    nearly_one = torch.tensor([[900.0, 0.0]]).log_softmax(-1)
    assert entropy(nearly_one).item() == 0.0


def test_gradient_of_the_entropy_bonus() -> None:
    """dH/dz_j = −π_j (log π_j + H); a loss subtracts β·H, averaged over problems."""
    beta, no_reward_PA = 0.3, torch.zeros_like(LOGITS_PA)
    log_pi_PA = LOGITS_PA.log_softmax(-1)
    expected = beta * log_pi_PA.exp() * (log_pi_PA + entropy(log_pi_PA)[:, None]) / 2
    action_PG = torch.tensor([[0, 1], [2, 2]])
    for loss_of in (
        lambda log_pi: full_information_loss(log_pi, no_reward_PA, beta),
        lambda log_pi: reinforce_loss(log_pi, action_PG, torch.zeros(2, 2, dtype=torch.float64), beta),
    ):
        torch.testing.assert_close(gradient(loss_of, LOGITS_PA), expected, rtol=0, atol=1e-12)


def test_full_information_by_hand() -> None:
    """A uniform policy over three actions: the mean reward of each problem, and log 3 of entropy."""
    log_pi_PA = torch.zeros(2, 3, dtype=torch.float64).log_softmax(-1)
    loss = full_information_loss(log_pi_PA, torch.tensor([[1.0, 0.5, 0.0], [0.3, 0.0, 0.0]]), beta=0.1)
    assert loss.item() == pytest.approx(-(0.5 + 0.1) / 2 - 0.1 * log(3), abs=1e-7)


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("group", [2, 3])
def test_mean_gradient_of_online_over_every_draw_of_actions_and_rewards(group: int, beta: float) -> None:
    """One problem; each of G actions is drawn from π and answered right with its own chance: (3·2)^G outcomes."""
    logits_PA, chance_A = LOGITS_PA[:1], CHANCE_PA[0]
    pi_A = logits_PA.softmax(-1)[0]
    cells = [(a, r, pi_A[a] * (chance_A[a] if r else 1 - chance_A[a])) for a, r in product(range(3), (0, 1))]
    mean, total = torch.zeros_like(logits_PA), torch.tensor(0.0, dtype=torch.float64)
    for outcome in product(cells, repeat=group):
        actions, rewards, chances = zip(*outcome, strict=True)
        chance = torch.stack(chances).prod()
        action_PG = torch.tensor([actions])
        reward_PG = torch.tensor([rewards], dtype=torch.float64)
        mean += chance * gradient(
            lambda log_pi, a=action_PG, r=reward_PG: reinforce_loss(log_pi, a, r, beta),  # type: ignore[misc]
            logits_PA,
        )
        total += chance
    assert total.item() == pytest.approx(1, abs=1e-12)
    exact = gradient(lambda log_pi: full_information_loss(log_pi, CHANCE_PA[:1], beta), logits_PA)
    torch.testing.assert_close(mean, exact, rtol=0, atol=1e-10)
    assert exact.abs().max() > 1e-3


@pytest.mark.parametrize("group", [2, 3])
def test_mean_gradient_of_online_over_two_problems(group: int) -> None:
    """Fixed rewards; every joint draw of both problems' actions: 3^2G of them."""
    pi_PA, mean = LOGITS_PA.softmax(-1), torch.zeros_like(LOGITS_PA)
    for flat in product(range(3), repeat=2 * group):
        action_PG = torch.tensor(flat).view(2, group)
        mean += pi_PA.gather(1, action_PG).prod() * gradient(
            lambda log_pi, a=action_PG: reinforce_loss(log_pi, a, CHANCE_PA.gather(1, a), 0.05),  # type: ignore[misc]
            LOGITS_PA,
        )
    exact = gradient(lambda log_pi: full_information_loss(log_pi, CHANCE_PA, 0.05), LOGITS_PA)
    torch.testing.assert_close(mean, exact, rtol=0, atol=1e-10)


def all_rewards(group: int) -> Tensor:
    return torch.tensor(list(product((0.0, 1.0), repeat=group)), dtype=torch.float64)


@pytest.mark.parametrize("group", [2, 3, 5])
def test_pass_at_k_advantage_at_one_sample_is_leave_one_out(group: int) -> None:
    reward_PG = all_rewards(group)
    found_PG = pass_at_k_advantage(reward_PG, torch.ones(len(reward_PG), dtype=torch.int64))
    torch.testing.assert_close(found_PG, leave_one_out_advantage(reward_PG), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("budget", "group"), [(b, g) for b in (1, 2, 3) for g in range(b + 1, 6)])
@pytest.mark.parametrize("p", [0.2, 0.5, 0.9])
def test_mean_gradient_of_pass_at_k_over_every_outcome(budget: int, group: int, p: float) -> None:
    """G rollouts, each right with chance p: the mean of (1/G) Σ A_i ∂log p_i is the derivative of 1 − (1 − p)^B."""
    reward_PG = all_rewards(group)
    advantage_PG = pass_at_k_advantage(reward_PG, torch.full((len(reward_PG),), budget))
    chance_P = (reward_PG * p + (1 - reward_PG) * (1 - p)).prod(1)
    score_PG = reward_PG / p - (1 - reward_PG) / (1 - p)
    found = float((chance_P * (advantage_PG * score_PG).mean(1)).sum())
    assert found == pytest.approx(budget * (1 - p) ** (budget - 1), abs=1e-12)


def test_pass_at_k_advantage_by_hand_with_a_budget_of_its_own_for_each_prompt() -> None:
    """Four rollouts, two right: pass@1 is 1/2, pass@2 is 1 − 1/6; without a right one 1/3 and 2/3, else 2/3 and 1."""
    reward_PG = torch.tensor([[1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    right, wrong = 4 * (5 / 6 - 2 / 3), 4 * (5 / 6 - 1)
    expected = [[2 / 3, -2 / 3, 2 / 3, -2 / 3], [right, wrong, right, wrong], [0.0] * 4]
    found_PG = pass_at_k_advantage(reward_PG, torch.tensor([1, 2, 2]))
    assert found_PG.dtype == torch.float32
    torch.testing.assert_close(found_PG, torch.tensor(expected))


def test_marginal_by_hand() -> None:
    log_pi_NA = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.3, 0.5]]).log()
    log_p_NA = torch.tensor([[0.1, 0.4, 0.0], [0.0, 0.0, 0.6]]).log()
    torch.testing.assert_close(marginal_log_probability(log_pi_NA, log_p_NA).exp(), torch.tensor([0.15, 0.3]))


def test_a_token_that_an_action_excludes_gives_a_finite_gradient() -> None:
    leaf_NA = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    log_p_NA = torch.tensor([[0.5, 0.0]], dtype=torch.float64).log()
    marginal_log_probability(leaf_NA.log_softmax(1), log_p_NA).sum().backward()
    assert leaf_NA.grad is not None
    torch.testing.assert_close(leaf_NA.grad, torch.tensor([[0.5, -0.5]], dtype=torch.float64))


@pytest.mark.parametrize(
    ("ratio", "advantage", "clip", "value", "slope"),  # slope: of the value by log ratio
    [
        (1.0, 2.0, 0.2, 2.0, 2.0),
        (1.0, -2.0, 0.2, -2.0, -2.0),
        (1.5, 2.0, 0.2, 2.4, 0.0),
        (1.5, -2.0, 0.2, -3.0, -3.0),
        (0.5, 2.0, 0.2, 1.0, 1.0),
        (0.5, -2.0, 0.2, -1.6, 0.0),
        (1.5, 2.0, inf, 3.0, 3.0),
        (0.1, -2.0, inf, -0.2, -0.2),
        (1.5, 0.0, 0.2, 0.0, 0.0),
    ],
)
def test_clipped_surrogate_by_hand(ratio: float, advantage: float, clip: float, value: float, slope: float) -> None:
    log_ratio_N = torch.tensor([log(ratio)], dtype=torch.float64, requires_grad=True)
    found_N = clipped_surrogate(log_ratio_N, torch.tensor([advantage], dtype=torch.float64), clip)
    assert found_N.item() == pytest.approx(value, abs=1e-12)
    found_N.sum().backward()
    assert log_ratio_N.grad is not None
    assert log_ratio_N.grad.item() == pytest.approx(slope, abs=1e-12)
