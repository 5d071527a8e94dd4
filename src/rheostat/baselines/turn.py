"""TURN: one temperature for a model and its prompts, chosen without labels, where its entropy turns.

Du, Yang and Welleck, 2025, *Optimizing Temperature for Language Models with Multi-Sample Inference*, arXiv:2502.05234;
the authors' code: https://github.com/StigLidu/TURN. As the temperature rises, the logarithm of the entropy H(T) that
the model samples with rises ever more slowly, and then, where the text falls apart, ever faster: the turning point is
the first T where ln H is convex, and the temperature to use lies β above it.

    H(T) = mean over prompts of the mean over samples of the mean over tokens of the entropy of p_T
"""

from collections.abc import Sequence
from enum import StrEnum

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from rheostat.decoding.policy import Decision, StepState
from rheostat.decoding.recording import row_statistics
from rheostat.errors import ConfigError

TEMPERATURES = tuple(round(0.1 * i, 1) for i in range(1, 15))
"""0.1, 0.2, … 1.4: where the authors measure."""

_PAIRS = 64  # tempered rows held at once: 64 of 50,000 float32 are 13 MB


class Aggregation(StrEnum):
    """What is done with the samples of a prompt."""

    BEST_OF_N = "best-of-n"  # one right among them is enough, as in pass@k
    MAJORITY = "majority"


_BETA = {Aggregation.BEST_OF_N: 0.1, Aggregation.MAJORITY: 0.0}


def turning_point(temperatures: Sequence[float], entropy_T: ArrayLike, aggregation: Aggregation) -> float:
    """The temperature that TURN predicts to be best.

    Args:
        temperatures: at least 3, rising.
        entropy_T: H(T) at each, above 0.
        aggregation: β is 0.1 for best-of-N and 0 for majority voting.

    Returns:
        β above the first temperature, neither the lowest nor the highest, where the second differences of ln H
        (``np.gradient`` twice, as the authors do) are positive; above the last such temperature where they never are.

    Raises:
        ConfigError: too few temperatures, not rising, or an entropy that is not above 0.
    """
    x_T, h_T = np.asarray(temperatures, dtype=np.float64), np.asarray(entropy_T, dtype=np.float64)
    if x_T.ndim != 1 or len(x_T) < 3 or x_T.shape != h_T.shape or not (np.diff(x_T) > 0).all():
        raise ConfigError("TURN: give at least three rising temperatures, and one entropy for each")
    if not (np.isfinite(h_T) & (h_T > 0)).all():
        at = int(np.argmin(np.isfinite(h_T) & (h_T > 0)))
        raise ConfigError(
            f"TURN: the mean entropy at T = {x_T[at]:g} is {h_T[at]:g}, and it needs one above 0 at every temperature; "
            "where the model is certain of all its answers, give it other or more problems (--task, "
            "--problems.validation), or leave turn out of --baselines"
        )
    second_T = np.gradient(np.gradient(np.log(h_T), x_T), x_T)
    convex = np.flatnonzero(second_T[1:-1] > 0)
    at = int(convex[0]) + 1 if len(convex) else len(x_T) - 2
    return round(float(x_T[at]) + _BETA[Aggregation(aggregation)], 10)  # 0.7 + 0.1 is 0.8


class TokenEntropy:
    """Observes a decode loop: the mean entropy of the distributions that each request's tokens were drawn from.

    They are tempered, over the whole vocabulary; in nats, of greedy decoding 0. Memory: twelve bytes a token.
    """

    def __init__(self) -> None:
        self._request: list[Int[Tensor, " S"]] = []
        self._entropy: list[Float[Tensor, " S"]] = []

    def observe(self, state: StepState, decision: Decision, token_S: Int[Tensor, " S"]) -> None:
        """See :class:`rheostat.decoding.policy.StepObserver`.

        Raises:
            ConfigError: sampling parameters that truncate.
        """
        if bool(decision.parameters.truncates_K.any()):
            raise ConfigError("token entropy: sample with a temperature alone, without top-k, top-p, min-p or top-nσ")
        sets = len(decision.parameters)
        pair_D, pair_S = torch.unique(state.row_S * sets + decision.choice_S, return_inverse=True)
        parts = []
        for part_D in torch.split(pair_D, _PAIRS):
            temperature_D = decision.parameters.temperature_K[part_D % sets].float()
            logits_DV = state.logits_BV[part_D // sets].float()
            logits_DV -= logits_DV.amax(-1, keepdim=True)
            logits_DV /= temperature_D.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
            parts.append(torch.where(temperature_D > 0, row_statistics(logits_DV).entropy_B, 0.0))
        self._request.append(state.request_S.cpu())
        self._entropy.append(torch.cat(parts)[pair_S].cpu())

    def mean_N(self, requests: int) -> Float[NDArray[np.float64], " N"]:
        """Mean over the tokens of each request, in the order of the call; NaN for one that was not watched."""
        if not self._request:
            return np.full(requests, np.nan)
        request, entropy = torch.cat(self._request).numpy(), torch.cat(self._entropy).double().numpy()
        tokens_N = np.bincount(request, minlength=requests)
        with np.errstate(invalid="ignore"):
            return np.bincount(request, weights=entropy, minlength=requests) / tokens_N
