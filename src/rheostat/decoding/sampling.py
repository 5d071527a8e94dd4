"""Draw one token per sequence by inverse CDF, in vocabulary order, without sorting the vocabulary.

On a GPU with Triton, :mod:`rheostat.decoding.triton_sampling` draws. Elsewhere greedy sequences take the argmax, and
untruncated ones walk a two-level sum over blocks of the vocabulary. Truncated ones look at the largest few logits only,
and where these do not settle the support at thresholds in the whole vocabulary. Sequences that share a row and a
parameter set share the distribution.
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
from rheostat.decoding.transforms import sigma_as_top_k, support_size, tempered, uncut_nucleus

_BLOCK = 256  # tokens summed at once: a vocabulary of 50,000 has 200 block sums
_CANDIDATES = 256  # largest logits looked at where top-p or min-p cuts
_MOST_CANDIDATES = 4096  # and where top-k or top-nσ does: sets that keep more look at the whole vocabulary
_LINES = 16
_CHUNK = 64  # rows of the vocabulary held at once: 64 rows of 50,000 float32 are 13 MB
_EXPONENTIATED = 16  # and in float32 where all tokens are weighed: 16 of 150,000 are 10 MB, which is not given back
_BINS, _BINS_PER_NAT = (
    2048,
    64,
)  # of a histogram of weight: 32 nats below the largest logit, and all the rest in the last
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


def _first_above(cdf_SK: Float[Tensor, "S K"], target_S: Float[Tensor, " S"]) -> Int[Tensor, " S"]:
    """The first position whose cumulative weight exceeds the target, never one without weight."""
    last_S1 = torch.searchsorted(cdf_SK, cdf_SK[:, -1:].contiguous())
    return torch.minimum(torch.searchsorted(cdf_SK, target_S[:, None], right=True), last_S1).squeeze(1)


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
    block_S = _first_above(cdf_DN[pair_S], target_S)
    inside_SK = weight_DNK[pair_S, block_S].double()
    before_S = cdf_DN[pair_S, block_S] - block_DN[pair_S, block_S]
    return block_S * _BLOCK + _first_above(inside_SK.cumsum(-1), target_S - before_S)


def supports(
    logits_BV: Tensor, row_D: Tensor, parameters: SamplingParameters, order: Order
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """What D truncating sets keep of the rows ``row_D``, without sorting the vocabulary.

    Yields groups whose members together are all D: the members' positions (ascending), the logits (float64) of tokens
    among which are all that the sets keep, these tokens in ascending order, and which of them are kept. What sets of
    one row share is computed once.
    """
    row_R, of_D = torch.unique(row_D, return_inverse=True)
    logits_RV = take_rows(logits_BV, row_R)
    parameters = sigma_as_top_k(logits_RV, of_D, parameters)
    vocabulary = logits_BV.shape[1]
    # A set with top-k needs little more than k candidates, whatever else cuts.
    most_k = int(parameters.top_k_K.max()) if bool((parameters.top_k_K > 0).all()) else _CANDIDATES
    needed = min(vocabulary, most_k + 16, _MOST_CANDIDATES)
    index_RK = _largest(logits_RV, needed)
    top_RK, index_RK = descending(logits_RV.gather(1, index_RK), index_RK)
    top_DK = top_RK[of_D]
    complete = needed == vocabulary
    wanted_D = parameters.top_p_K < 1 if complete else uncut_nucleus(parameters, order)
    log_total_D = _log_totals(logits_RV, of_D, parameters.temperature_K, wanted_D)
    size_D, known_D = support_size(top_DK, log_total_D, parameters, order, complete=complete)
    settled_D, open_D = known_D.nonzero().squeeze(1), (~known_D).nonzero().squeeze(1)
    if len(settled_D):
        size_D = size_D[settled_D]
        width = int(size_D.max())
        index_DK, place_DK = index_RK[of_D[settled_D], :width].sort(-1)
        yield settled_D, top_DK[settled_D].gather(1, place_DK), index_DK, place_DK < size_D[:, None]
    for part_D in torch.split(open_D, _EXPONENTIATED) if len(open_D) else ():
        logits_DV = take_rows(logits_RV, of_D[part_D]).double()
        index_DV = torch.arange(vocabulary, device=logits_DV.device).expand(len(part_D), -1)
        yield part_D, logits_DV, index_DV, _kept(logits_DV, parameters[part_D], order)


def _kept(logits_DV: Tensor, parameters: SamplingParameters, order: Order) -> Tensor:
    """What the sets keep of whole rows, one each, as a mask: often thousands of tokens, which nobody needs sorted."""
    scaled_DV = tempered(logits_DV, parameters.temperature_K)
    by_min_p_DV = scaled_DV >= parameters.min_p_K.log()[:, None]
    before_DV = by_min_p_DV if order == Order.VLLM else torch.ones_like(by_min_p_DV)
    limited_D = (parameters.top_k_K > 0) & (parameters.top_k_K < scaled_DV.shape[1])
    if bool(limited_D.any()):
        k_D = torch.where(limited_D, parameters.top_k_K, 1)
        kth_D = scaled_DV.topk(int(k_D.max()), dim=-1).values.gather(1, k_D[:, None] - 1)
        before_DV = before_DV & ((scaled_DV >= kth_D) | ~limited_D[:, None])
    if bool((parameters.top_p_K < 1).any()):
        before_DV = _nucleus(logits_DV, scaled_DV.masked_fill(~before_DV, -torch.inf), parameters.top_p_K)
    return before_DV & by_min_p_DV


def _nucleus(logits_DV: Tensor, scaled_DV: Tensor, top_p_D: Tensor) -> Tensor:
    """The largest logits of each row until their share of exp(scaled) reaches top-p; of ties the higher tokens first.

    ``scaled_DV`` is −∞ where something has cut before. A histogram of the weight by distance from the largest logit
    says in which bin the last token lies; only tokens of that bin are sorted.
    """
    finite_DV = scaled_DV > -torch.inf
    weight_DV = scaled_DV.exp()
    bin_DV = (scaled_DV * -_BINS_PER_NAT).clamp(max=_BINS - 1).long()
    rows = torch.arange(len(scaled_DV), device=scaled_DV.device)
    flat = (bin_DV + rows[:, None] * _BINS).flatten()
    cdf_DN = torch.bincount(flat, weight_DV.flatten(), minlength=len(rows) * _BINS).view(-1, _BINS).cumsum(-1)
    target_D = top_p_D * cdf_DN[:, -1]
    bin_D = (cdf_DN < target_D[:, None]).sum(-1).clamp(max=_BINS - 1)
    before_D = torch.where(bin_D > 0, cdf_DN.gather(1, (bin_D - 1).clamp(min=0)[:, None]).squeeze(1), 0.0)

    # the bin's tokens, row by row, side by side from the left
    row_N, index_N = ((bin_DV == bin_D[:, None]) & finite_DV).nonzero().unbind(1)
    count_D = torch.bincount(row_N, minlength=len(rows))
    place_N = torch.arange(len(row_N), device=row_N.device) - (count_D.cumsum(0) - count_D)[row_N]
    shape = len(rows), int(count_D.max())
    logits_DK = logits_DV.new_full(shape, -torch.inf)
    index_DK = torch.zeros(shape, dtype=torch.int64, device=row_N.device)
    logits_DK[row_N, place_N], index_DK[row_N, place_N] = logits_DV[row_N, index_N], index_N
    _, index_DK = descending(logits_DK, index_DK)
    weight_DK = weight_DV.gather(1, index_DK)
    is_there_DK = torch.arange(shape[1], device=row_N.device) < count_D[:, None]
    mass_above_DK = before_D[:, None] + weight_DK.cumsum(-1) - weight_DK
    is_kept_DK = is_there_DK & (mass_above_DK < target_D[:, None])
    kept_DV = bin_DV < bin_D[:, None]
    row_N, place_N = is_kept_DK.nonzero().unbind(1)
    kept_DV[row_N, index_DK[row_N, place_N]] = True
    return torch.where((top_p_D < 1)[:, None], kept_DV, finite_DV)


def descending(
    logits_RK: Float[Tensor, "R K"], index_RK: Int[Tensor, "R K"] | Int[Tensor, " K"]
) -> tuple[Float[Tensor, "R K"], Int[Tensor, "R K"]]:
    """float32 logits in descending order (float64), and the tokens they belong to; among ties the higher one first.

    As :func:`rheostat.decoding.transforms.sort_descending`, in any order of the tokens: one sort of integers, whose
    upper half is a logit and whose lower half is its token, is two to six times as fast as a stable one of numbers.
    """
    bits_RK = (logits_RK.float() + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0, with which it ties
    key_RK = _rising(bits_RK).long() << 32 | index_RK
    key_RK = key_RK.sort(-1, descending=True).values
    return _rising((key_RK >> 32).int()).view(torch.float32).double(), key_RK & 0xFFFFFFFF


def _rising(bits: Int[Tensor, "R K"]) -> Int[Tensor, "R K"]:
    """The bits of float32 numbers as int32 that rise with these, and back."""
    return bits ^ (bits >> 31 & 0x7FFFFFFF)


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
        totals = [
            tempered(take_rows(logits_RV, part_N).double(), temperature.expand(len(part_N))).exp_().sum(-1)
            for part_N in torch.split(row_N, _EXPONENTIATED)
        ]
        result_D[own_D] = torch.cat(totals).log()[of_N]
    return result_D


def _draw_truncated(
    logits_BV: Tensor, row_D: Tensor, parameters: SamplingParameters, pair_S: Tensor, uniform_S: Tensor, order: Order
) -> Tensor:
    """Settle the support, then draw in vocabulary order among its tokens."""
    token_S = torch.empty_like(pair_S)
    for member_D, logits_DK, index_DK, kept_DK in supports(logits_BV, row_D, parameters, order):
        inside_S = torch.isin(pair_S, member_D)
        local_S = torch.searchsorted(member_D, pair_S[inside_S])
        weight_DK = tempered(logits_DK, parameters.temperature_K[member_D]).exp() * kept_DK
        cdf_SK = take_rows(weight_DK.cumsum(-1), local_S)
        chosen_S = _first_above(cdf_SK, uniform_S[inside_S] * cdf_SK[:, -1])
        token_S[inside_S] = index_DK[local_S, chosen_S]
    return token_S
