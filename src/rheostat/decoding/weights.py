"""What a temperature makes of a whole vocabulary: weights, by way of their sums over blocks of tokens."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rheostat.decoding.compiled_sampling import compiled_sampling
from rheostat.decoding.support import take_rows

BLOCK = 256  # tokens summed at once: a vocabulary of 50,000 has 200 block sums
_ROWS = 16  # rows that torch weighs at once: 16 of 50,000 numbers stay in a processor's cache


def weigh(
    logits_BV: Float[Tensor, "B V"], row_D: Int[Tensor, " D"], temperature_D: Float[Tensor, " D"]
) -> tuple[Float[Tensor, " D"], Float[Tensor, "D N"]]:
    """Of D pairs of a row and a temperature above zero: the row's largest logit, and exp((logit − largest) / T) summed
    over each block of tokens, in float32.
    """
    at_once = _ROWS if logits_BV.device.type == "cpu" else max(1, len(row_D))
    parts = [
        _weighed(take_rows(logits_BV, row_R), temperature_R)
        for row_R, temperature_R in zip(torch.split(row_D, at_once), torch.split(temperature_D, at_once), strict=True)
    ]
    return torch.cat([largest_R for largest_R, _ in parts]), torch.cat([sum_RN for _, sum_RN in parts])


def entropies(logits_BV: Float[Tensor, "B V"]) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"], Float[Tensor, " B"]]:
    """Of each row: the largest logit, Σ exp(logit − largest), and the entropy in nats, in float32."""
    compiled = compiled_sampling(logits_BV)
    if compiled is not None:
        return compiled.entropies(logits_BV)
    parts = []
    for chunk_RV in torch.split(logits_BV.float(), _ROWS):
        largest_R = chunk_RV.amax(-1)
        below_RV = chunk_RV - largest_R[:, None]
        # what lies 80 below has no weight in float32; the limit keeps 0 · inf out of the entropy
        below_RV.clamp_(min=-80)
        weight_RV = exponentiate(below_RV, torch.ones(()))
        total_R = weight_RV.sum(-1)
        entropy_R = total_R.log() - torch.linalg.vecdot(weight_RV, below_RV) / total_R
        parts.append((largest_R, total_R, entropy_R.clamp(min=0)))
    largest_B, total_B, entropy_B = (torch.cat(part) for part in zip(*parts, strict=True))
    return largest_B, total_B, entropy_B


def exponentiate(
    below_RV: Float[Tensor, "R V"], temperature: Tensor, out: Float[Tensor, "R V"] | None = None
) -> Float[Tensor, "R V"]:
    """exp(x / T) of float32 x ≤ 0 and temperatures above zero, one or such that they broadcast.

    By way of exp2: on CPUs torch's exp takes three times as long, and twenty times as long where results have less than
    the smallest normal number, as most tokens of a vocabulary have at low temperatures.
    """
    # T stays a float32 above zero, so that the smallest T cannot give 0 / 0
    scale = math.log2(math.e) / temperature.float().clamp(min=torch.finfo(torch.float32).tiny)
    return torch.mul(below_RV, scale, out=out).exp2_()


def _weighed(logits_RV: Tensor, temperature_R: Tensor) -> tuple[Tensor, Tensor]:
    # The maximum goes first, so that the smallest T cannot give inf - inf.
    logits_RV = logits_RV.float()
    rows, vocabulary = logits_RV.shape
    largest_R = logits_RV.amax(-1)
    weight_RV = logits_RV.new_empty(rows, vocabulary + -vocabulary % BLOCK)
    weight_RV[:, vocabulary:] = 0
    scaled_RV = weight_RV[:, :vocabulary]  # in place: fresh memory for every step would cost more than the arithmetic
    torch.sub(logits_RV, largest_R[:, None], out=scaled_RV)
    exponentiate(scaled_RV, temperature_R[:, None], out=scaled_RV)
    return largest_R, weight_RV.view(rows, -1, BLOCK).sum(-1)
