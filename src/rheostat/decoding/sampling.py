"""Draw one token per sequence by inverse CDF, in vocabulary order, without sorting the vocabulary.

On a GPU with Triton, :mod:`rheostat.decoding.triton_sampling` draws, on a CPU with a compiler
:mod:`rheostat.decoding.compiled_sampling`. Elsewhere torch does: greedy sequences take the argmax, untruncated ones
walk a two-level sum over blocks of the vocabulary, and truncated ones draw among the tokens that
:mod:`rheostat.decoding.support` finds. Sequences that share a row and a parameter set share the distribution.
"""

import warnings
from collections.abc import Callable, Iterator
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rheostat.decoding.compiled_sampling import compiled_sampling
from rheostat.decoding.policy import Decision, SamplingParameters
from rheostat.decoding.strategy import Order, Strategy
from rheostat.decoding.support import supports, take_rows
from rheostat.decoding.transforms import tempered
from rheostat.decoding.weights import BLOCK, exponentiate, weigh

_CHUNK = 64  # rows of the vocabulary held at once: 64 rows of 50,000 float32 are 13 MB
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
    if logits_BV.is_cuda:
        kernel = _kernel(logits_BV.device)
    else:
        compiled = compiled_sampling(logits_BV)
        kernel = None if compiled is None else compiled.draw
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


def argmax(logits_RV: Float[Tensor, "R V"]) -> Int[Tensor, " R"]:
    """The lowest index of each row's largest logit: the block where it stands, then the place in the block.

    On CPUs torch finds largest values several times faster than their indices.
    """
    vocabulary = logits_RV.shape[1]
    blocks = vocabulary // BLOCK
    if not blocks:
        return logits_RV.argmax(-1)
    end = blocks * BLOCK
    peak_RN = logits_RV[:, :end].view(-1, blocks, BLOCK).amax(-1)
    if end < vocabulary:
        peak_RN = torch.cat([peak_RN, logits_RV[:, end:].amax(-1, keepdim=True)], 1)
    # what is left at the end begins inside the last block, so that it is a whole one; nothing as large stands before it
    first_R = (peak_RN.argmax(-1) * BLOCK).clamp(max=vocabulary - BLOCK)
    inside_RK = logits_RV.gather(1, first_R[:, None] + torch.arange(BLOCK, device=logits_RV.device))
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
    largest_D, block_DN = weigh(logits_BV, row_D, parameters.temperature_K)
    block_DN = block_DN.double()
    cdf_DN = block_DN.cumsum(-1)
    target_S = uniform_S * cdf_DN[pair_S, -1]
    block_S = _first_above(cdf_DN[pair_S], target_S)
    before_S = cdf_DN[pair_S, block_S] - block_DN[pair_S, block_S]
    vocabulary = logits_BV.shape[1]
    token_SK = block_S[:, None] * BLOCK + torch.arange(BLOCK, device=logits_BV.device)
    below_SK = logits_BV[row_D[pair_S][:, None], token_SK.clamp(max=vocabulary - 1)].float() - largest_D[pair_S, None]
    inside_SK = exponentiate(below_SK, parameters.temperature_K[pair_S, None]).double()
    inside_SK.masked_fill_(token_SK >= vocabulary, 0)
    return block_S * BLOCK + _first_above(inside_SK.cumsum(-1), target_S - before_S)


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
