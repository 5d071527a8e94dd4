"""What a token-level update descends on: the clipped surrogate of equation (2) over recorded tokens."""

import torch
from jaxtyping import Float
from torch import Tensor

from rheostat.adapters.token import TokenAdapter, TokenInputs
from rheostat.decoding.recording import Steps, marginal_log_probability
from rheostat.training.objectives import clipped_surrogate, entropy
from rheostat.training.token_config import TokenEstimator, TokenTrainingConfig


def inputs_of(
    steps: Steps, device: torch.device | str = "cpu", start_RA: Float[Tensor, "R A"] | None = None
) -> TokenInputs:
    """What the policy saw at recorded tokens; ``start_RA`` is the sequence level's log π for each request."""
    return TokenInputs(
        steps.hidden_NH.to(device),
        steps.entropy_N.to(device),
        (steps.budget_N - steps.t_N).to(device),
        steps.budget_N.to(device),
        steps.parallel_N.to(device),
        None if start_RA is None else start_RA.to(device)[steps.request_N.to(device)],
    )


def surrogate_loss(
    adapter: TokenAdapter,
    steps: Steps,
    advantage_N: Float[Tensor, " N"],
    rollouts: int,
    config: TokenTrainingConfig,
    start_RA: Float[Tensor, "R A"] | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The loss whose descent ascends equation (2) with entropy regularisation, and sums over its tokens for metrics.

    Sums over tokens and divides by the number of rollouts: a mean over tokens would weigh the tokens of short
    rollouts more, which is no gradient of the expected reward. Ratios are per token, of μ for ``marginal`` and of
    π for ``action``; they correct for the policy at that token and not for the drift of states. With dropout, the
    ratio is that of the network without, and the gradient is taken through the network with dropout.

    Args:
        adapter: in training mode if dropout is wanted.
        steps: recorded tokens.
        advantage_N: of the rollout that each token belongs to.
        rollouts: how many rollouts the batch has, recorded tokens or not.
        config: estimator, clip and β.
        start_RA: as for :func:`inputs_of`.
    """
    inputs = inputs_of(steps, adapter.output.weight.device, start_RA)
    log_pi_NA = adapter(inputs)
    device = log_pi_NA.device
    action_N1, log_p_NA = steps.action_N.to(device)[:, None], steps.log_p_NA.to(device)

    def log_probability(log_pi_NA: Tensor) -> Tensor:
        if config.estimator is TokenEstimator.MARGINAL:
            return marginal_log_probability(log_pi_NA, log_p_NA)
        return log_pi_NA.gather(1, action_N1).squeeze(1)

    new_N, old_N = log_probability(log_pi_NA), log_probability(steps.log_pi_NA.to(device))
    if adapter.training and adapter.config.dropout > 0:
        with torch.no_grad():
            exact_N = log_probability(adapter.log_probabilities(inputs))
        log_ratio_N = exact_N - old_N + (new_N - new_N.detach())
    else:
        log_ratio_N = new_N - old_N
    advantage_N = advantage_N.to(device)
    surrogate_N = clipped_surrogate(log_ratio_N, advantage_N, config.clip)
    entropy_N = entropy(log_pi_NA)
    loss = -(surrogate_N.sum() + config.beta * entropy_N.sum()) / rollouts
    clipped_N = (log_ratio_N.detach().exp() - 1).abs() > config.clip
    sums = {"entropy": float(entropy_N.detach().sum()), "clipped": float(clipped_N.sum())}
    return loss, sums
