"""Exact transforms T_a of the model's distribution: one parameter set per row, in either engine's order.

Every truncation keeps a prefix of the tokens sorted by descending logit, so a parameter set is the size of
that prefix and nothing else. Ties are those of a stable ascending sort read backwards, as transformers and
vLLM have them: top-k, min-p and top-nσ keep all tokens that tie with the last one kept, top-p drops the tied
tokens with the lowest index first.
"""

import math
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rheostat.decoding.policy import SamplingParameters
from rheostat.decoding.strategy import Order


def sort_descending(
    logits_BV: Float[Tensor, "B V"],
) -> tuple[Float[Tensor, "B V"], Int[Tensor, "B V"]]:
    """Values and indices by descending logit; among ties the higher index comes first."""
    values_BV, indices_BV = torch.sort(logits_BV, dim=-1, stable=True)
    return values_BV.flip(-1), indices_BV.flip(-1)


def tempered(logits_BV: Float[Tensor, "B V"], temperature_B: Float[Tensor, " B"]) -> Float[Tensor, "B V"]:
    """(logit − largest) / T of each row, for temperatures above 0: no T is so small that it gives ∞ − ∞."""
    return (logits_BV - logits_BV.amax(-1, keepdim=True)).div_(temperature_B[:, None])


def sigma_as_top_k(
    logits_RV: Float[Tensor, "R V"], row_D: Int[Tensor, " D"], parameters: SamplingParameters
) -> SamplingParameters:
    """The same transforms of these rows without top-nσ, which keeps k tokens of a row, with their ties, as top-k does.

    It comes first and no order puts top-p before top-k, so that one top-k, the smaller of the two, is both.

    Args:
        logits_RV: untempered logits; the standard deviation is that of the finite ones (as in llama.cpp), in float64.
        row_D: the row that each set is applied to.
        parameters: D sets.
    """
    sigma_D = parameters.top_n_sigma_K
    if sigma_D is None:
        return parameters
    top_k_D = parameters.top_k_K.clone()
    for sigma in torch.unique(sigma_D[sigma_D > 0]):
        own_D = sigma_D == sigma
        row_N, of_N = torch.unique(row_D[own_D], return_inverse=True)
        logits_NV = logits_RV[row_N].double()
        around_NV = logits_NV - logits_NV.mean(-1, keepdim=True)
        # four times as fast as torch.std
        deviation_N = torch.linalg.vector_norm(around_NV, dim=-1) / math.sqrt(logits_NV.shape[1])
        for row in (~deviation_N.isfinite()).nonzero().squeeze(1).tolist():
            deviation_N[row] = logits_NV[row][logits_NV[row].isfinite()].std(correction=0)
        kept_N = (logits_NV >= (logits_NV.amax(-1) - sigma * deviation_N)[:, None]).sum(-1)
        own_k_D, kept_D = top_k_D[own_D], kept_N[of_N]
        top_k_D[own_D] = torch.where(own_k_D > 0, torch.minimum(own_k_D, kept_D), kept_D)
    return replace(parameters, top_k_K=top_k_D, top_n_sigma_K=None)


def uncut_nucleus(parameters: SamplingParameters, order: Order) -> Bool[Tensor, " B"]:
    """Which sets apply top-p to the whole vocabulary, because nothing cuts before it."""
    uncut_B = parameters.top_k_K == 0
    if order == Order.VLLM:
        uncut_B = uncut_B & (parameters.min_p_K == 0)
    return uncut_B & (parameters.top_p_K < 1)


def support_size(
    top_BK: Float[Tensor, "B K"],
    log_total_B: Float[Tensor, " B"],
    parameters: SamplingParameters,
    order: Order,
    complete: bool,
) -> tuple[Int[Tensor, " B"], Bool[Tensor, " B"]]:
    """How many of the largest logits each row's transform keeps.

    Args:
        top_BK: the K largest logits of each row, descending, untempered, in float64.
        log_total_B: log Σ exp over the whole vocabulary, :func:`tempered`; needed where top-p cuts, and of incomplete
            candidates only where nothing cuts before it (:func:`uncut_nucleus`); ∞ elsewhere.
        parameters: one set per row, with temperatures above 0 and without top-nσ (:func:`sigma_as_top_k`).
        order: in which order the truncations apply.
        complete: whether the K candidates are the whole vocabulary.

    Returns:
        The sizes (1 to K), and whether the K candidates were enough to know the size and which tied tokens
        it covers; a size that is not known must be computed from more candidates.
    """
    candidates = top_BK.shape[1]
    scaled_BK = tempered(top_BK, parameters.temperature_K)
    by_min_p_B = (scaled_BK >= parameters.min_p_K.log()[:, None]).sum(-1)
    limited_B = (parameters.top_k_K > 0) & (parameters.top_k_K <= candidates)
    kth_B = scaled_BK.gather(1, torch.where(limited_B, parameters.top_k_K - 1, candidates - 1)[:, None])
    by_top_k_B = torch.where(limited_B, (scaled_BK >= kth_B).sum(-1), candidates)

    before_top_p_B = by_top_k_B if order == Order.TRANSFORMERS else torch.minimum(by_top_k_B, by_min_p_B)
    position_K = torch.arange(candidates, device=top_BK.device)
    kept_BK = scaled_BK.masked_fill(position_K >= before_top_p_B[:, None], -torch.inf)
    truncated_B = before_top_p_B < candidates
    total_B = torch.where(truncated_B, kept_BK.logsumexp(-1), log_total_B)
    probability_BK = (kept_BK - total_B[:, None]).exp()
    mass_above_BK = probability_BK.cumsum(-1) - probability_BK
    nucleus_B = (mass_above_BK < parameters.top_p_K[:, None]).sum(-1)
    nucleus_B = torch.where(parameters.top_p_K < 1, nucleus_B, candidates)

    size_B = torch.minimum(torch.minimum(nucleus_B, by_min_p_B), by_top_k_B)
    if complete:
        return size_B, torch.ones_like(truncated_B)
    # Tokens that tie with the last candidate may be missing, so the last one kept must lie above it; and the
    # mass that top-p divides by is known when the cut before it lies inside, or when there is no such cut.
    uncut_B = uncut_nucleus(parameters, order)
    last_kept_B = top_BK.gather(1, (size_B - 1)[:, None]).squeeze(1)
    known_B = (last_kept_B > top_BK[:, -1]) & (truncated_B | uncut_B | (parameters.top_p_K == 1))
    return size_B, known_B


def transform(logits_BV: Float[Tensor, "B V"], parameters: SamplingParameters, order: Order) -> Float[Tensor, "B V"]:
    """p_a of each row: the distribution that its parameter set samples from (paper, section 2.1).

    Args:
        logits_BV: untempered logits; computed and returned in float64.
        parameters: one set per row.
        order: the order in which the truncations apply.

    This is the reference: it sorts the vocabulary. :func:`rheostat.decoding.sampling.draw` does not.
    """
    logits_BV = logits_BV.double()
    greedy_B = parameters.temperature_K == 0
    temperature_B = torch.where(greedy_B, 1.0, parameters.temperature_K)
    row_B = torch.arange(len(logits_BV), device=logits_BV.device)
    safe = replace(sigma_as_top_k(logits_BV, row_B, parameters), temperature_K=temperature_B)
    scaled_BV = tempered(logits_BV, temperature_B)
    top_BV, index_BV = sort_descending(logits_BV)
    size_B, _ = support_size(top_BV, scaled_BV.logsumexp(-1), safe, order, complete=True)
    dropped_BV = torch.arange(logits_BV.shape[1], device=logits_BV.device) >= size_B[:, None]
    dropped_BV = torch.zeros_like(dropped_BV).scatter(1, index_BV, dropped_BV)
    probability_BV = scaled_BV.masked_fill(dropped_BV, -torch.inf).softmax(-1)
    argmax_BV = torch.nn.functional.one_hot(logits_BV.argmax(-1), logits_BV.shape[1]).double()
    return torch.where(greedy_B[:, None], argmax_BV, probability_BV)
