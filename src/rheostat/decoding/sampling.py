"""Draw one token per sequence by inverse CDF, in vocabulary order, without sorting the vocabulary.

On a GPU with Triton, :mod:`rheostat.decoding.triton_sampling` draws. Elsewhere greedy sequences take the argmax, and
untruncated ones walk a two-level sum over blocks of the vocabulary. Truncated ones look at the largest few logits only,
and fall back to the sorted reference where these do not settle the support. Sequences that share a row and a parameter
set share the distribution.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rheostat.decoding.policy import Decision, SamplingParameters
from rheostat.decoding.strategy import Order, Strategy
from rheostat.decoding.transforms import sigma_as_top_k, sort_descending, support_size, tempered, uncut_nucleus

_BLOCK = 256  # tokens summed at once: a vocabulary of 50,000 has 200 block sums
_CANDIDATES = 256  # largest logits looked at where top-p or min-p cuts
_MOST_CANDIDATES = 4096  # and where top-k or top-nσ does: sets that keep more sort the vocabulary, fewer rows at once
_LINES = 16
_CHUNK = 64  # rows of the vocabulary held at once: 64 rows of 50,000 float32 are 13 MB
_EXPONENTIATED = 16  # and in float32 where all tokens are weighed: 16 of 150,000 are 10 MB, which is not given back
_PAIRS = 1024  # pairs of a row and a truncating set held at once: 1,024 times 272 candidates in float64 are 2 MB


def draw(
    logits_BV: Float[Tensor, "B V"],
    row_S: Int[Tensor, " S"],
    decision: Decision,
    uniform_S: Float[Tensor, " S"],
    order: Order,
) -> Int[Tensor, " S"]:
    """The next token of each sequence.

    Args:
        logits_BV: untempered logits of the B rows.
        row_S: the row that each sequence stands on.
        decision: each sequence's sampling parameters.
        uniform_S: one uniform in [0, 1) per sequence, float64.
        order: the order in which the truncations apply.

    Returns:
        The smallest token whose cumulative probability in vocabulary order exceeds the uniform; for greedy
        sequences the argmax (the lowest index among ties).
    """
    kernel = _kernel(logits_BV.device) if logits_BV.is_cuda else None
    if kernel is not None:
        return kernel(logits_BV, row_S, decision, uniform_S, order)
    sets = len(decision.parameters)
    pair_D, pair_S = torch.unique(row_S * sets + decision.choice_S, return_inverse=True)
    row_D, parameters = pair_D // sets, decision.parameters[pair_D % sets]
    greedy_D = parameters.temperature_K == 0
    truncated_D = parameters.truncates_K

    token_S = torch.empty_like(row_S)
    greedy_S = greedy_D[pair_S]
    if greedy_S.any():
        row_R, of_S = torch.unique(row_S[greedy_S], return_inverse=True)
        token_S[greedy_S] = argmax(take_rows(logits_BV, row_R))[of_S]
    for kind_D, draw_kind in ((~greedy_D & ~truncated_D, _draw_plain), (~greedy_D & truncated_D, _draw_truncated)):
        for chunk_D in _chunks(kind_D.nonzero().squeeze(1), row_D):
            # unique() sorts the pairs, so each chunk is a contiguous range among the pairs of its kind
            inside_S = kind_D[pair_S] & (pair_S >= chunk_D[0]) & (pair_S <= chunk_D[-1])
            local_S = torch.searchsorted(chunk_D, pair_S[inside_S])
            token_S[inside_S] = draw_kind(
                logits_BV, row_D[chunk_D], parameters[chunk_D], local_S, uniform_S[inside_S], order
            )
    return token_S


@cache
def _kernel(device: torch.device) -> Callable[..., Tensor] | None:
    """The GPU's sampler, if Triton is installed and can compile it here; tried once."""
    try:
        from rheostat.decoding.triton_sampling import draw as kernel
    except ImportError:
        return None
    try:
        one = torch.zeros(1, dtype=torch.int64, device=device)
        decision = Decision(SamplingParameters.of([Strategy(1.0, 2, 0.9, 0.1)], device), one)
        kernel(torch.zeros(1, 4, device=device), one, decision, torch.zeros(1, device=device).double(), Order.VLLM)
    except Exception as error:  # whatever a compiler may raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        warnings.warn(f"the sampler's kernel does not compile here, PyTorch samples instead ({reason})", stacklevel=2)
        return None
    return kernel


def take_rows(logits_BV: Float[Tensor, "B V"], row_N: Int[Tensor, " N"]) -> Float[Tensor, "N V"]:
    """The rows ``row_N``, not copied where they follow each other: a copy takes a third of a draw's time."""
    if len(row_N) and bool((row_N.diff() == 1).all()):
        return logits_BV[int(row_N[0]) : int(row_N[-1]) + 1]
    return logits_BV.index_select(0, row_N)  # on a CPU three times as fast as indexing


def argmax(logits_RV: Float[Tensor, "R V"]) -> Int[Tensor, " R"]:
    """The lowest index of each row's largest logit: the block where it stands, then the place in the block.

    On CPUs torch finds largest values several times faster than their indices.
    """
    vocabulary = logits_RV.shape[1]
    blocks = vocabulary // _BLOCK
    if not blocks:
        return logits_RV.argmax(-1)
    end = blocks * _BLOCK
    peak_RN = logits_RV[:, :end].view(-1, blocks, _BLOCK).amax(-1)
    if end < vocabulary:
        peak_RN = torch.cat([peak_RN, logits_RV[:, end:].amax(-1, keepdim=True)], 1)
    # what is left at the end begins inside the last block, so that it is a whole one; nothing as large stands before it
    first_R = (peak_RN.argmax(-1) * _BLOCK).clamp(max=vocabulary - _BLOCK)
    inside_RK = logits_RV.gather(1, first_R[:, None] + torch.arange(_BLOCK, device=logits_RV.device))
    return first_R + inside_RK.argmax(-1)


def _chunks(members_D: Int[Tensor, " N"], row_D: Int[Tensor, " D"]) -> Iterator[Int[Tensor, " C"]]:
    """The members in parts of at most ``_CHUNK`` rows and ``_PAIRS`` pairs; those of a row follow each other."""
    if len(members_D):
        part_N = torch.unique_consecutive(row_D[members_D], return_inverse=True)[1] // _CHUNK
        for part in torch.split(members_D, torch.bincount(part_N).tolist()):
            yield from torch.split(part, _PAIRS)


def _first_above(cdf_SK: Float[Tensor, "S K"], target_S: Float[Tensor, " S"], weight_SK: Tensor) -> Tensor:
    """The first position whose cumulative weight exceeds the target, never one without weight."""
    last_S = weight_SK.shape[1] - 1 - (weight_SK.flip(1) > 0).int().argmax(1)
    return torch.minimum((cdf_SK <= target_S[:, None]).sum(1), last_S)


def _draw_plain(
    logits_BV: Tensor, row_D: Tensor, parameters: SamplingParameters, pair_S: Tensor, uniform_S: Tensor, order: Order
) -> Tensor:
    """Temperature only: find the block by its sum, then the token inside the block."""
    del order  # nothing to order
    token_S = torch.empty_like(pair_S)
    for first in range(0, len(row_D), _EXPONENTIATED):  # a row may have more temperatures than one
        inside_S = (pair_S >= first) & (pair_S < first + _EXPONENTIATED)
        part = slice(first, first + _EXPONENTIATED)
        temperature_D = parameters.temperature_K[part]
        token_S[inside_S] = _draw_at(
            take_rows(logits_BV, row_D[part]), temperature_D, pair_S[inside_S] - first, uniform_S[inside_S]
        )
    return token_S


def exponentiate(
    below_RV: Float[Tensor, "R V"], temperature: Tensor, out: Float[Tensor, "R V"] | None = None
) -> Float[Tensor, "R V"]:
    """exp(x / T) of float32 x ≤ 0 and temperatures above zero.

    By way of exp2: on CPUs torch's exp takes three times as long, and twenty times as long where results have less than
    the smallest normal number, as most tokens of a vocabulary have at low temperatures.
    """
    # T stays a float32 above zero, so that the smallest T cannot give 0 / 0
    scale = math.log2(math.e) / temperature.float().clamp(min=torch.finfo(torch.float32).tiny)
    return torch.mul(below_RV, scale, out=out).exp2_()


def _draw_at(logits_DV: Tensor, temperature_D: Tensor, pair_S: Tensor, uniform_S: Tensor) -> Tensor:
    # The maximum goes first, so that the smallest T cannot give inf - inf.
    logits_DV = logits_DV.float()
    rows, vocabulary = logits_DV.shape
    weight_DV = logits_DV.new_empty(rows, vocabulary + -vocabulary % _BLOCK)
    weight_DV[:, vocabulary:] = 0
    scaled_DV = weight_DV[:, :vocabulary]  # in place: fresh memory for every step would cost more than the arithmetic
    torch.sub(logits_DV, logits_DV.amax(-1, keepdim=True), out=scaled_DV)
    exponentiate(scaled_DV, temperature_D[:, None], out=scaled_DV)
    weight_DNK = weight_DV.view(len(weight_DV), -1, _BLOCK)
    block_DN = weight_DNK.sum(-1).double()
    cdf_DN = block_DN.cumsum(-1)
    target_S = uniform_S * cdf_DN[pair_S, -1]
    block_S = _first_above(cdf_DN[pair_S], target_S, block_DN[pair_S])
    inside_SK = weight_DNK[pair_S, block_S].double()
    before_S = cdf_DN[pair_S, block_S] - block_DN[pair_S, block_S]
    return block_S * _BLOCK + _first_above(inside_SK.cumsum(-1), target_S - before_S, inside_SK)


def supports(
    logits_BV: Tensor, row_D: Tensor, parameters: SamplingParameters, order: Order
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """What D truncating sets keep of the rows ``row_D``, without sorting the vocabulary where that can be avoided.

    Yields groups whose members together are all D: the members' positions (ascending), their row's largest logits in
    descending order (float64), the tokens these belong to, and how many of them the set keeps. What sets of one row
    share is computed once.
    """
    row_R, of_D = torch.unique(row_D, return_inverse=True)
    logits_RV = take_rows(logits_BV, row_R)
    parameters = sigma_as_top_k(logits_RV, of_D, parameters)
    vocabulary = logits_BV.shape[1]
    # A set with top-k needs little more than k candidates, whatever else cuts.
    most_k = int(parameters.top_k_K.max()) if bool((parameters.top_k_K > 0).all()) else _CANDIDATES
    needed = min(vocabulary, most_k + 16, _MOST_CANDIDATES)
    index_RK = _largest(logits_RV, needed)
    # Ties in the order of `sort_descending`: sort by index, then stably by value.
    index_RK = index_RK.sort(dim=-1).values
    top_RK, position_RK = sort_descending(logits_RV.gather(1, index_RK).double())
    index_RK = index_RK.gather(1, position_RK)
    top_DK = top_RK[of_D]
    complete = needed == vocabulary
    wanted_D = parameters.top_p_K < 1 if complete else uncut_nucleus(parameters, order)
    log_total_D = _log_totals(logits_RV, of_D, parameters.temperature_K, wanted_D)
    size_D, known_D = support_size(top_DK, log_total_D, parameters, order, complete=complete)
    settled_D, open_D = known_D.nonzero().squeeze(1), (~known_D).nonzero().squeeze(1)
    if len(settled_D):
        yield settled_D, top_DK[settled_D], index_RK[of_D[settled_D]], size_D[settled_D]
    for part_D in torch.split(open_D, _CHUNK) if len(open_D) else ():
        top_DV, index_DV = sort_descending(logits_RV[of_D[part_D]].double())
        log_total_D = tempered(top_DV, parameters.temperature_K[part_D]).logsumexp(-1)
        size_D, _ = support_size(top_DV, log_total_D, parameters[part_D], order, complete=True)
        yield part_D, top_DV, index_DV, size_D


def _largest(logits_RV: Tensor, count: int) -> Tensor:
    """Where the ``count`` largest logits of each row stand, in any order.

    They stand in the ``count`` columns of largest peak, of a row written in 16 lines: two selections among a few
    thousand numbers instead of one among all.
    """
    vocabulary = logits_RV.shape[1]
    columns = vocabulary // _LINES
    if 2 * count > columns:
        return logits_RV.topk(count, dim=-1, sorted=False).indices
    device, end = logits_RV.device, columns * _LINES
    peak_RC = logits_RV[:, :end].view(-1, _LINES, columns).amax(1)
    column_RK = peak_RC.topk(count, dim=-1, sorted=False).indices
    index_RN = (column_RK[:, None] + columns * torch.arange(_LINES, device=device)[:, None]).flatten(1)
    rest_RN = torch.arange(end, vocabulary, device=device).expand(len(logits_RV), -1)
    index_RN = torch.cat([index_RN, rest_RN], 1)
    return index_RN.gather(1, logits_RV.gather(1, index_RN).topk(count, dim=-1, sorted=False).indices)


def _log_totals(logits_RV: Tensor, of_D: Tensor, temperature_D: Tensor, wanted_D: Tensor) -> Tensor:
    """log Σ exp, tempered, of the pairs that are wanted, once for each row and temperature; ∞ for the others."""
    result_D = torch.full_like(temperature_D, torch.inf)
    for temperature in torch.unique(temperature_D[wanted_D]):
        own_D = wanted_D & (temperature_D == temperature)
        row_N, of_N = torch.unique(of_D[own_D], return_inverse=True)
        result_D[own_D] = tempered(logits_RV[row_N].double(), temperature.expand(len(row_N))).logsumexp(-1)[of_N]
    return result_D


def _draw_truncated(
    logits_BV: Tensor, row_D: Tensor, parameters: SamplingParameters, pair_S: Tensor, uniform_S: Tensor, order: Order
) -> Tensor:
    """Settle the support from the largest logits, then draw among these."""
    token_S = torch.empty_like(pair_S)
    for member_D, top_DK, index_DK, size_D in supports(logits_BV, row_D, parameters, order):
        inside_S = torch.isin(pair_S, member_D)
        local_S = torch.searchsorted(member_D, pair_S[inside_S])
        token_S[inside_S] = _draw_among(top_DK, index_DK, size_D, parameters[member_D], local_S, uniform_S[inside_S])
    return token_S


def _draw_among(
    top_DK: Tensor, index_DK: Tensor, size_D: Tensor, parameters: SamplingParameters, pair_S: Tensor, uniform_S: Tensor
) -> Tensor:
    """Inverse CDF in vocabulary order over the ``size_D`` largest logits of each distribution."""
    width = int(size_D.max())
    top_DK, index_DK = top_DK[:, :width], index_DK[:, :width]
    weight_DK = tempered(top_DK, parameters.temperature_K).exp()
    weight_DK = weight_DK * (torch.arange(width, device=top_DK.device) < size_D[:, None])
    index_DK, position_DK = index_DK.sort(-1)
    weight_DK = weight_DK.gather(1, position_DK)
    cdf_SK = weight_DK.cumsum(-1)[pair_S]
    chosen_S = _first_above(cdf_SK, uniform_S * cdf_SK[:, -1], weight_DK[pair_S])
    return index_DK[pair_S].gather(1, chosen_S[:, None]).squeeze(1)
