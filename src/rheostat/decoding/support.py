"""Which tokens truncating parameter sets keep, without sorting the vocabulary.

A set keeps a prefix of the tokens in descending order (:mod:`rheostat.decoding.transforms`). Mostly the largest few
logits settle how many. Where they do not, thresholds in the whole vocabulary do.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rheostat.decoding.policy import SamplingParameters
from rheostat.decoding.strategy import Order
from rheostat.decoding.transforms import sigma_as_top_k, support_size, tempered, uncut_nucleus

_CANDIDATES = 256  # largest logits looked at where top-p or min-p cuts
_MOST_CANDIDATES = 4096  # and where top-k or top-nσ does: sets that keep more look at the whole vocabulary
_LINES = 16
_ROWS = 16  # rows of the vocabulary looked at at once in float64: 16 of 150,000 are 19 MB
_BINS, _BINS_PER_NAT = 2048, 64  # of weight: 32 nats below the largest logit, and all the rest in the last


def take_rows(logits_BV: Float[Tensor, "B V"], row_N: Int[Tensor, " N"]) -> Float[Tensor, "N V"]:
    """The rows ``row_N``, not copied where they follow each other: a copy takes a third of a draw's time."""
    if len(row_N) and bool((row_N.diff() == 1).all()):
        return logits_BV[int(row_N[0]) : int(row_N[-1]) + 1]
    return logits_BV.index_select(0, row_N)  # on a CPU three times as fast as indexing


def supports(
    logits_BV: Float[Tensor, "B V"], row_D: Int[Tensor, " D"], parameters: SamplingParameters, order: Order
) -> Iterator[tuple[Int[Tensor, " M"], Float[Tensor, "M K"], Int[Tensor, "M K"], Bool[Tensor, "M K"]]]:
    """What D truncating sets keep of the rows ``row_D``.

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
    for part_D in torch.split(open_D, _ROWS) if len(open_D) else ():
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
            for part_N in torch.split(row_N, _ROWS)
        ]
        result_D[own_D] = torch.cat(totals).log()[of_N]
    return result_D
