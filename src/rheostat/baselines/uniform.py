"""MIXED: every strategy of an action space with equal probability (paper, sections 3.1 and 4)."""

import math

import torch

from rheostat.decoding.policy import Decision, SamplingParameters, StepState, draw_actions
from rheostat.decoding.strategy import ActionSpace


class UniformMixture:
    """The token policy that draws an action uniformly at every token; an untrained token adapter is the same.

    Args:
        space: the actions.
        device: the engine's.
    """

    def __init__(self, space: ActionSpace, device: torch.device | str = "cpu") -> None:
        self._space = space
        self._parameters = SamplingParameters.of(space.strategies, device)

    @property
    def replayable(self) -> bool:
        """See :class:`rheostat.decoding.policy.ReplayedPolicy`."""
        return self._parameters.top_n_sigma_K is None

    @property
    def key(self) -> str:
        """Names its actions."""
        return f"uniform mixture of {'; '.join(map(str, self._space))}"

    def decide(self, state: StepState) -> Decision:
        """See :class:`rheostat.decoding.policy.TokenPolicy`."""
        actions = len(self._space)
        log_pi_SA = torch.full((len(state.row_S), actions), -math.log(actions), device=state.row_S.device)
        return Decision(self._parameters, draw_actions(state, log_pi_SA.exp()), log_pi_SA)
