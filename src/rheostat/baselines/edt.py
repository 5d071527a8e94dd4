"""EDT: one temperature per token, from the entropy of the model's distribution alone.

Zhang, Bao and Huang, 2024, *EDT: Improving Large Language Models' Generation by Entropy-based Dynamic Temperature
Sampling*, arXiv:2403.14541:

    T_t = T0 · N^(θ / H_t),  N = 0.8

It is hot, up to T0, where the model is unsure, and tends to greedy where it is certain. θ = 0 is plain sampling at T0.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from rheostat.decoding.policy import Decision, SamplingParameters, StepState
from rheostat.decoding.recording import row_statistics
from rheostat.errors import ConfigError

N = 0.8  # as published; another N in (0, 1) is another θ


class EntropyBasedTemperature:
    """The token policy of EDT.

    Args:
        t0: T0 > 0, the temperature that high entropies approach.
        theta: θ ≥ 0, how fast it cools as the entropy falls.
        floor: greedy where H is below, in nats, above 0.

    Raises:
        ConfigError: an argument outside its range.
    """

    def __init__(self, t0: float, theta: float, floor: float = 1e-4) -> None:
        for name, value, fits in (("t0", t0, t0 > 0), ("theta", theta, theta >= 0), ("floor", floor, floor > 0)):
            if not (fits and math.isfinite(value)):
                raise ConfigError(f"EDT: {name} must be {'at least' if name == 'theta' else 'above'} 0, got {value}")
        self.t0, self.theta, self.floor = float(t0), float(theta), float(floor)

    @property
    def key(self) -> str:
        """Names T0, θ and the floor."""
        return f"EDT T0={self.t0!r} theta={self.theta!r} floor={self.floor!r}"

    def temperatures(self, entropy_B: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """T of each entropy (nats), float64; 0 is greedy."""
        entropy_B = entropy_B.double()
        temperature_B = self.t0 * N ** (self.theta / entropy_B.clamp(min=self.floor))
        return torch.where(entropy_B < self.floor, 0.0, temperature_B)

    def decide(self, state: StepState) -> Decision:
        """See :class:`rheostat.decoding.policy.TokenPolicy`; parameter set b is that of row b."""
        temperature_B = self.temperatures(row_statistics(state.logits_BV).entropy_B)
        off_B = torch.zeros_like(temperature_B)
        return Decision(SamplingParameters(temperature_B, off_B.long(), off_B + 1, off_B), state.row_S)
