"""Losses as pure functions. Minimising a loss ascends equation (1) of the paper, entropy term included."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rheostat.statistics import pass_at_k


def entropy(log_pi_PA: Float[Tensor, "P A"]) -> Float[Tensor, " P"]:
    """Entropy of each row in nats."""
    return -(log_pi_PA.exp() * log_pi_PA).sum(-1)


def leave_one_out_advantage(reward_PG: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """Each reward minus the mean of its prompt's G − 1 others (G ≥ 2); no reward is its own baseline: no bias."""
    others = reward_PG.shape[1] - 1
    return reward_PG - (reward_PG.sum(1, keepdim=True) - reward_PG) / others


def reinforce_loss(
    log_pi_PA: Float[Tensor, "P A"], action_PG: Tensor, reward_PG: Float[Tensor, "P G"], beta: float
) -> Float[Tensor, ""]:
    """`online`: REINFORCE with a leave-one-out baseline over G actions drawn from π per prompt, and entropy bonus β.

    The mean of its gradient is that of −E[r] − β·H (paper, equation 1).
    """
    advantage_PG = leave_one_out_advantage(reward_PG)
    return -(advantage_PG * log_pi_PA.gather(1, action_PG)).mean() - beta * entropy(log_pi_PA).mean()


def full_information_loss(
    log_pi_PA: Float[Tensor, "P A"], reward_PA: Float[Tensor, "P A"], beta: float
) -> Float[Tensor, ""]:
    """`full_information`: the expectation of `online` over actions, from estimated rewards of all of them.

    −Σ_a π(a|x) r(x, a) − β·H: no draw of actions, hence no variance from it.
    """
    return -(log_pi_PA.exp() * reward_PA).sum(-1).mean() - beta * entropy(log_pi_PA).mean()


def pass_at_k_advantage(reward_PG: Float[Tensor, "P G"], budget_P: Int[Tensor, " P"]) -> Float[Tensor, "P G"]:
    """Each rollout's share in its group's pass@B: A_i = G · (ρ(all G) − ρ(all but i)), ρ a group's unbiased pass@B.

    ρ(all but i) does not depend on rollout i, so that it is a baseline: (1/G) Σ_i A_i ∇log p(rollout i) is an unbiased
    gradient of pass@B. At B = 1 it is :func:`leave_one_out_advantage`.

    Args:
        reward_PG: 0 or 1, G ≥ max B + 1.
        budget_P: the parallel budget B of each prompt, at least 1.
    """
    group = reward_PG.shape[1]
    advantage_PG = torch.empty_like(reward_PG)
    for budget in sorted(set(budget_P.tolist())):
        own_P = budget_P == budget
        right_PG = reward_PG[own_P].long().cpu().numpy()
        right_P1 = right_PG.sum(1, keepdims=True)
        gain_PG = pass_at_k(right_P1, group, budget) - pass_at_k(right_P1 - right_PG, group - 1, budget)
        advantage_PG[own_P] = torch.from_numpy(group * gain_PG).to(advantage_PG)
    return advantage_PG


def clipped_surrogate(
    log_ratio_N: Float[Tensor, " N"], advantage_N: Float[Tensor, " N"], clip: float
) -> Float[Tensor, " N"]:
    """PPO's surrogate of each token, to maximise: min(ρ A, clip(ρ, 1 − ε, 1 + ε) A). At ρ = 1 its gradient is A ∇log ρ.

    Args:
        log_ratio_N: log of the new probability over the recorded one.
        advantage_N: of the rollout that the token belongs to.
        clip: ε; ``math.inf`` never clips.
    """
    ratio_N = log_ratio_N.exp()
    if clip == math.inf:
        return ratio_N * advantage_N
    return torch.minimum(ratio_N * advantage_N, ratio_N.clamp(1 - clip, 1 + clip) * advantage_N)
