"""What a policy update needs of a rollout, written down while the logits are there (paper, section 2.3).

An update never runs the language model: features, budgets, and the log-probability of the sampled token under
*every* action are recorded at each step, so that π and μ(y|x) = Σ_a π(a|x) p_a(y) can be computed again for other
weights of the policy. Tokens whose distribution is concentrated (p_max above a threshold) are left out: the
paper's second stabilisation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rheostat.decoding.compiled_sampling import compiled_sampling
from rheostat.decoding.policy import Decision, SamplingParameters, StepState
from rheostat.decoding.sampling import argmax
from rheostat.decoding.strategy import Order
from rheostat.decoding.support import supports, take_rows
from rheostat.decoding.transforms import tempered
from rheostat.decoding.weights import entropies, weigh

_SORTED = 64  # rows looked at at once where logits are sorted, in float64: 64 of 50,000 are 26 MB


@dataclass(frozen=True, slots=True)
class RowStatistics:
    """Of each row's untempered distribution: largest logit, log Σ exp(logit), entropy in nats, largest probability."""

    peak_B: Float[Tensor, " B"]
    log_total_B: Float[Tensor, " B"]
    entropy_B: Float[Tensor, " B"]
    p_max_B: Float[Tensor, " B"]


def row_statistics(logits_BV: Float[Tensor, "B V"]) -> RowStatistics:
    """One pass over the vocabulary, in float32."""
    peak_B, total_B, entropy_B = entropies(logits_BV)
    return RowStatistics(peak_B, peak_B + total_B.log(), entropy_B, 1 / total_B)


def token_log_probabilities(
    logits_BV: Float[Tensor, "B V"],
    row_S: Int[Tensor, " S"],
    token_S: Int[Tensor, " S"],
    parameters: SamplingParameters,
    order: Order,
    statistics: RowStatistics | None = None,
) -> Float[Tensor, "S K"]:
    """log p_a(y) of each sequence's token y under every one of K parameter sets; −inf where a set excludes the token.

    Args:
        logits_BV: untempered logits of the B rows.
        row_S: the row that each sequence stands on.
        token_S: each sequence's token.
        parameters: the K sets.
        order: the order in which the truncations apply.
        statistics: of the rows, where they are known already.
    """
    statistics = statistics or row_statistics(logits_BV)
    compiled = compiled_sampling(logits_BV)
    if compiled is not None:
        others_K = (parameters.temperature_K != 1) | parameters.truncates_K
        log_p_SK = (logits_BV[row_S, token_S] - statistics.log_total_B[row_S])[:, None].repeat(1, len(parameters))
        if bool(others_K.any()):
            log_p_SK[:, others_K] = compiled.log_probabilities(logits_BV, row_S, token_S, parameters[others_K], order)
        return log_p_SK
    row_R, of_S = torch.unique(row_S, return_inverse=True)
    logit_S = logits_BV[row_S, token_S].float()
    log_p_SK = torch.full((len(row_S), len(parameters)), -torch.inf, device=logits_BV.device)
    truncated_K = parameters.truncates_K
    plain: list[int] = []
    for k, temperature in enumerate(parameters.temperature_K.tolist()):
        if temperature == 0:
            argmax_R = argmax(take_rows(logits_BV, row_R))
            log_p_SK[:, k] = torch.where(argmax_R[of_S] == token_S, 0.0, -torch.inf)
        elif truncated_K[k]:
            logits_RV = take_rows(logits_BV, row_R)
            log_p_SK[:, k] = _truncated(logits_RV, of_S, token_S, parameters[torch.tensor([k])], order)
        elif temperature == 1:
            log_p_SK[:, k] = logit_S - statistics.log_total_B[row_S]
        else:
            plain.append(k)
    if plain:
        temperature_K = parameters.temperature_K[plain].float().clamp(min=torch.finfo(torch.float32).tiny)
        sums = [weigh(logits_BV, row_R, temperature.expand(len(row_R)))[1].sum(-1) for temperature in temperature_K]
        log_total_RK = torch.stack(sums, dim=1).log()
        below_S = logit_S - statistics.peak_B[row_S]
        log_p_SK[:, plain] = below_S[:, None] / temperature_K - log_total_RK[of_S]
    return log_p_SK


def _truncated(
    logits_RV: Tensor, of_S: Tensor, token_S: Tensor, parameters: SamplingParameters, order: Order
) -> Tensor:
    """log p_a(y) under one truncating set."""
    log_p_S = torch.full((len(of_S),), -torch.inf, device=logits_RV.device)
    for first in range(0, len(logits_RV), _SORTED):
        logits_DV = logits_RV[first : first + _SORTED]
        row_D = torch.arange(len(logits_DV), device=logits_DV.device)
        for member_D, logits_DK, index_DK, kept_DK in supports(logits_DV, row_D, parameters[0 * row_D], order):
            inside_S = torch.isin(of_S, member_D + first)
            local_S = torch.searchsorted(member_D, of_S[inside_S] - first)
            scaled_DK = tempered(logits_DK, parameters.temperature_K).masked_fill(~kept_DK, -torch.inf)
            log_p_DK = scaled_DK.log_softmax(-1)
            is_token_SK = index_DK[local_S] == token_S[inside_S][:, None]
            found_S = log_p_DK[local_S].masked_fill(~is_token_SK, -torch.inf).amax(-1)
            log_p_S[inside_S] = found_S.float()
    return log_p_S


@dataclass(frozen=True, slots=True)
class Steps:
    """N recorded tokens, in the order in which they were drawn.

    Attributes:
        hidden_NH: h_t, bfloat16.
        request_N: whose token it is: a position among the requests of the call.
        t_N: tokens written before it.
        budget_N: the token budget b; what remains is b − t.
        parallel_N: the parallel budget B.
        action_N: the action a_t.
        log_pi_NA: log π(a | x_t) over all actions, as it was when the action was drawn.
        log_p_NA: log p_a(y_t) of the sampled token under every action; −inf where an action excludes it.
        entropy_N: of the untempered distribution, in nats.
        p_max_N: its largest probability.
    """

    hidden_NH: Float[Tensor, "N H"]
    request_N: Int[Tensor, " N"]
    t_N: Int[Tensor, " N"]
    budget_N: Int[Tensor, " N"]
    parallel_N: Int[Tensor, " N"]
    action_N: Int[Tensor, " N"]
    log_pi_NA: Float[Tensor, "N A"]
    log_p_NA: Float[Tensor, "N A"]
    entropy_N: Float[Tensor, " N"]
    p_max_N: Float[Tensor, " N"]

    def __len__(self) -> int:
        return len(self.request_N)

    def __getitem__(self, index: Tensor | slice) -> Self:
        """The tokens at ``index`` (positions, a mask or a range)."""
        return type(self)(*(getattr(self, field.name)[index] for field in fields(self)))

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Several as one (at least one)."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))


def marginal_log_probability(log_pi_NA: Float[Tensor, "N A"], log_p_NA: Float[Tensor, "N A"]) -> Float[Tensor, " N"]:
    """log μ(y|x) = log Σ_a π(a|x) p_a(y), of tokens that at least one action can draw."""
    return (log_pi_NA + log_p_NA).logsumexp(1)


def bytes_per_token(hidden_size: int, actions: int) -> int:
    """Memory of one recorded token: bfloat16 hidden state, two float32 per action, seven further numbers of 8 bytes."""
    return 2 * hidden_size + 8 * actions + 7 * 8


class Recorder:
    """Observes a decode loop and keeps its unmasked tokens.

    Memory: at most requests × token budget × :func:`bytes_per_token`, on the CPU.

    Args:
        order: the order of the transforms.
        mask_above: tokens whose p_max lies above are left out; 1 records every token.
    """

    def __init__(self, order: Order, mask_above: float = 0.95) -> None:
        self._order = order
        self._mask_above = mask_above
        self._parts: list[Steps] = []

    def observe(self, state: StepState, decision: Decision, token_S: Int[Tensor, " S"]) -> None:
        """Record one step."""
        statistics = row_statistics(state.logits_BV)
        keep_S = (statistics.p_max_B <= self._mask_above)[state.row_S]
        if not bool(keep_S.any()):
            return
        row_S, token_S, choice_S = state.row_S[keep_S], token_S[keep_S], decision.choice_S[keep_S]
        if decision.log_pi_SK is not None:
            log_pi_SA = decision.log_pi_SK[keep_S].float()
        else:  # a policy that draws nothing is certain of its choice
            log_pi_SA = torch.nn.functional.one_hot(choice_S, len(decision.parameters)).float().log()
        log_p_SA = token_log_probabilities(
            state.logits_BV, row_S, token_S, decision.parameters, self._order, statistics
        )
        self._parts.append(
            Steps(
                *(
                    tensor.cpu()
                    for tensor in (
                        state.hidden_BH[row_S].bfloat16(),
                        state.request_S[keep_S],
                        state.t_S[keep_S],
                        state.budget_S[keep_S],
                        state.parallel_S[keep_S],
                        choice_S,
                        log_pi_SA,
                        log_p_SA,
                        statistics.entropy_B[row_S],
                        statistics.p_max_B[row_S],
                    )
                )
            )
        )

    def steps(self) -> Steps | None:
        """What was recorded, sorted by request and step; None if every token was masked."""
        if not self._parts:
            return None
        steps = Steps.joined(self._parts)
        order_N = torch.argsort(steps.request_N * (int(steps.t_N.max()) + 1) + steps.t_N)
        return steps[order_N]
