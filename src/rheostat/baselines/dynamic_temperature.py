"""llama.cpp's dynamic temperature: hot where the model is unsure, between two temperatures.

``llama_sampler_init_temp_ext``, ``--dynatemp-range`` and ``--dynatemp-exp``, https://github.com/ggml-org/llama.cpp
(pull request 4972), from koboldcpp. Of the n candidates that the truncations leave, at temperature 1,

    T = lo + (hi − lo) · (H / ln n)^e

with H the entropy of their renormalised distribution. ``--temp t --dynatemp-range r`` is lo = max(0, t − r) and
hi = t + r.
"""

import math
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rheostat.decoding.policy import Decision, SamplingParameters, StepState
from rheostat.decoding.recording import row_statistics
from rheostat.decoding.strategy import Order, Strategy
from rheostat.decoding.support import supports
from rheostat.errors import ConfigError

_ROWS = 64  # looked at at once: 64 of 50,000 float32 logits are 13 MB


class DynamicTemperature:
    """The token policy of dynamic temperature. A single candidate is left as it is.

    Truncations come first, as in llama.cpp: top-nσ, top-k, top-p, min-p, of the untempered distribution. Among tokens
    that tie at a cut, those of :mod:`rheostat.decoding.transforms` stay.

    Args:
        low: lo ≥ 0; a temperature of 0 is greedy.
        high: hi ≥ lo.
        exponent: e > 0.
        truncation: its temperature must be 1.

    Raises:
        ConfigError: an argument outside its range.
    """

    def __init__(self, low: float, high: float, exponent: float = 1.0, truncation: Strategy | None = None) -> None:
        truncation = truncation or Strategy()
        if not 0 <= low <= high < math.inf:
            raise ConfigError(f"dynamic temperature: give 0 ≤ low ≤ high, got {low} and {high}")
        if not 0 < exponent < math.inf:
            raise ConfigError(f"dynamic temperature: exponent must be above 0, got {exponent}")
        if truncation.temperature != 1:
            raise ConfigError(f"dynamic temperature: the truncation's temperature must be 1, got '{truncation}'")
        self.low, self.high, self.exponent = float(low), float(high), float(exponent)
        self.truncation = truncation

    @property
    def key(self) -> str:
        """Names the range, the exponent and the truncation."""
        return f"dynamic temperature {self.low!r} to {self.high!r} exponent={self.exponent!r} of {self.truncation}"

    def temperatures(self, entropy_B: Float[Tensor, " B"], count_B: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
        """T of each entropy (nats) over ``count_B`` ≥ 1 candidates, float64; 1 where there is a single one."""
        share_B = (entropy_B.double() / count_B.double().log()).clamp(0, 1)
        temperature_B = self.low + (self.high - self.low) * share_B**self.exponent
        return torch.where(count_B > 1, temperature_B, 1.0)

    def decide(self, state: StepState) -> Decision:
        """See :class:`rheostat.decoding.policy.TokenPolicy`; parameter set b is that of row b."""
        logits_BV = state.logits_BV
        rows, vocabulary = logits_BV.shape
        of_B = torch.zeros(rows, dtype=torch.int64, device=logits_BV.device)
        plain = SamplingParameters.of([Strategy()], logits_BV.device)[of_B]
        if not self.truncation.is_truncated:
            entropy_B = row_statistics(logits_BV).entropy_B
            temperature_B = self.temperatures(entropy_B, torch.full_like(of_B, vocabulary))
            return Decision(replace(plain, temperature_K=temperature_B), state.row_S)
        sets = SamplingParameters.of([self.truncation], logits_BV.device)[of_B]
        for row_B in torch.split(torch.arange(rows, device=logits_BV.device), _ROWS):
            for member_B, logits_BK, _, is_kept_BK in supports(logits_BV, row_B, sets[row_B], Order.TRANSFORMERS):
                own_B, size_B = row_B[member_B], is_kept_BK.sum(-1)
                kept_BK = logits_BK.masked_fill(~is_kept_BK, -torch.inf)
                last_B1 = logits_BK.masked_fill(~is_kept_BK, torch.inf).amin(-1, keepdim=True)
                tied_B = (logits_BV[own_B] >= last_B1).sum(-1)
                temperature_B, top_p_B = self._scaled(kept_BK, last_B1, size_B, tied_B)
                plain.temperature_K[own_B] = temperature_B
                plain.top_k_K[own_B] = torch.where(size_B < vocabulary, size_B, 0)
                plain.top_p_K[own_B] = top_p_B
        return Decision(plain, state.row_S)

    def _scaled(self, kept_BK: Tensor, last_B1: Tensor, size_B: Tensor, tied_B: Tensor) -> tuple[Tensor, Tensor]:
        """The temperature of rows of which the logits ``kept_BK`` (else −∞) survive, and the top-p that parts ties.

        An engine scales first and truncates then, which changes what top-p and min-p keep. But the survivors are the n
        largest logits at any temperature, so that top-k = n says the same. Only top-p may have parted tokens that tie,
        of which top-k keeps all (``tied_B``): a top-p at the new temperature, halfway into the last token's mass, parts
        them again.
        """
        temperature_B = self.temperatures(torch.special.entr(kept_BK.softmax(-1)).sum(-1), size_B)
        at_B1 = temperature_B.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
        peak_B1 = kept_BK.amax(-1, keepdim=True)
        mass_B = ((kept_BK - peak_B1) / at_B1).exp().sum(-1)
        last_B = ((last_B1 - peak_B1) / at_B1).exp().squeeze(1)
        through_B = (mass_B - last_B / 2) / (mass_B + (tied_B - size_B) * last_B)
        return temperature_B, torch.where(tied_B > size_B, through_B, 1.0)
