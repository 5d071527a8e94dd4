"""Losses as pure functions. Minimising a loss ascends equation (1) of the paper, entropy term included."""

from jaxtyping import Float
from torch import Tensor


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
