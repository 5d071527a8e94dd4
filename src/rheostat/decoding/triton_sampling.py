"""``draw`` on a GPU: one Triton program per sequence, which neither sorts the vocabulary nor waits for the host.

Every truncation keeps a prefix of the tokens sorted by logit (:mod:`rheostat.decoding.transforms`), so that a support
is a threshold, and how many of the tokens that tie with it fall away. A threshold is bisected over the 2^32 float32
numbers in their order, with a count (top-k) or a sum of weights in float64 (top-p) over the row at each of 32 looks; a
row of 150,000 logits stays in the GPU's cache meanwhile.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from rheostat.decoding.policy import Decision
from rheostat.decoding.strategy import Order
from rheostat.decoding.transforms import sigma_as_top_k

_BLOCK = 2048


def draw(
    logits_BV: Float[Tensor, "B V"],
    row_S: Int[Tensor, " S"],
    decision: Decision,
    uniform_S: Float[Tensor, " S"],
    order: Order,
) -> Int[Tensor, " S"]:
    """See :func:`rheostat.decoding.sampling.draw`."""
    parameters, choice_S = decision.parameters, decision.choice_S
    if parameters.top_n_sigma_K is not None:  # becomes a top-k of the row, so that every sequence has its own set
        parameters = sigma_as_top_k(logits_BV, row_S, parameters[choice_S])
        choice_S = torch.arange(len(row_S), device=row_S.device)
    token_S = torch.empty_like(row_S)
    if len(row_S):
        _draw[(len(row_S),)](
            logits_BV,
            row_S,
            choice_S,
            uniform_S,
            parameters.temperature_K,
            parameters.top_k_K,
            parameters.top_p_K,
            parameters.min_p_K,
            token_S,
            logits_BV.shape[1],
            logits_BV.stride(0),
            MIN_P_FIRST=order is Order.VLLM,
            BLOCK=_BLOCK,
            num_warps=8,
        )
    return token_S


@triton.jit
def _key(x):  # type: ignore[no-untyped-def]
    """An integer in the order of the numbers; both zeros are one."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit  # type: ignore[untyped-decorator]
def _block(logits, start, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Indices and logits of a block, −∞ beyond the end."""
    index = start + tl.arange(0, BLOCK)
    return index, tl.load(logits + index, index < size, other=float("-inf"))


@triton.jit  # type: ignore[untyped-decorator]
def _weigh(x, key, most, temperature, log_min_p, kth, USES_MIN_P: tl.constexpr):  # type: ignore[no-untyped-def]
    """exp(x / T) over the largest, in float64, of the tokens that top-k (and min-p) keep."""
    x = x.to(tl.float64)
    keep = key >= kth
    if USES_MIN_P:
        keep = keep & ((x - most) / temperature >= log_min_p)
    return tl.where(keep, tl.exp((x - most) / temperature), 0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _draw(  # type: ignore[no-untyped-def]
    logits_BV,
    row_S,
    choice_S,
    uniform_S,
    temperature_K,
    top_k_K,
    top_p_K,
    min_p_K,
    token_S,
    size,
    stride,
    MIN_P_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0)
    logits = logits_BV + tl.load(row_S + sequence) * stride
    choice = tl.load(choice_S + sequence)
    temperature = tl.load(temperature_K + choice)

    most_f = tl.full((), float("-inf"), tl.float32)
    for start in range(0, size, BLOCK):
        _, x = _block(logits, start, size, BLOCK)
        most_f = tl.maximum(most_f, tl.max(x, 0))
    most = most_f.to(tl.float64)
    nobody = size + 0

    if temperature == 0:
        first = nobody
        for start in range(0, size, BLOCK):
            index, x = _block(logits, start, size, BLOCK)
            first = tl.minimum(first, tl.min(tl.where(x == most_f, index, nobody), 0))
        tl.store(token_S + sequence, first.to(tl.int64))
    else:
        top_k = tl.load(top_k_K + choice)
        top_p = tl.load(top_p_K + choice)
        min_p = tl.load(min_p_K + choice)
        uniform = tl.load(uniform_S + sequence)
        log_min_p = tl.where(min_p > 0, tl.log(tl.where(min_p > 0, min_p, 1.0)), float("-inf"))
        least = tl.full((), -(1 << 31) - 1, tl.int64)
        largest = tl.max(_key(most_f + tl.zeros((2,), tl.float32)), 0)

        # top-k: the largest key that at least k tokens reach
        kth = least
        if (top_k > 0) & (top_k < size):
            above = largest + 1
            while above - kth > 1:
                middle = (kth + above) >> 1
                count = tl.zeros((BLOCK,), tl.int32)
                for start in range(0, size, BLOCK):
                    index, x = _block(logits, start, size, BLOCK)
                    count += ((_key(x) >= middle) & (index < size)).to(tl.int32)
                if tl.sum(count, 0) >= top_k:
                    kth = middle
                else:
                    above = middle

        # top-p: the smallest key above which lies less than p of the mass, then how many that tie with it are dropped
        nucleus = least
        dropped = tl.zeros((), tl.int32)
        if top_p < 1:
            mass = tl.zeros((BLOCK,), tl.float64)
            for start in range(0, size, BLOCK):
                _, x = _block(logits, start, size, BLOCK)
                mass += _weigh(x, _key(x), most, temperature, log_min_p, kth, MIN_P_FIRST)
            wanted = top_p * tl.sum(mass, 0)
            nucleus = largest
            below = least
            while nucleus - below > 1:
                middle = (nucleus + below) >> 1
                mass = tl.zeros((BLOCK,), tl.float64)
                for start in range(0, size, BLOCK):
                    _, x = _block(logits, start, size, BLOCK)
                    key = _key(x)
                    weight = _weigh(x, key, most, temperature, log_min_p, kth, MIN_P_FIRST)
                    mass += tl.where(key > middle, weight, 0.0)
                if tl.sum(mass, 0) < wanted:
                    nucleus = middle
                else:
                    below = middle
            mass = tl.zeros((BLOCK,), tl.float64)
            tie = tl.zeros((BLOCK,), tl.float64)
            ties = tl.zeros((BLOCK,), tl.int32)
            for start in range(0, size, BLOCK):
                index, x = _block(logits, start, size, BLOCK)
                key = _key(x)
                weight = _weigh(x, key, most, temperature, log_min_p, kth, MIN_P_FIRST)
                mass += tl.where(key > nucleus, weight, 0.0)
                is_tie = (key == nucleus) & (index < size)
                tie = tl.maximum(tie, tl.where(is_tie, weight, 0.0))
                ties += is_tie.to(tl.int32)
            one = tl.max(tie, 0)
            count = tl.sum(ties, 0)
            kept = tl.ceil((wanted - tl.sum(mass, 0)) / tl.where(one > 0, one, 1.0))
            kept = tl.minimum(tl.maximum(kept, 1.0), count.to(tl.float64))  # of the ties those with the highest index
            dropped = tl.where(one > 0, count - kept.to(tl.int32), 0)

        # twice over what is left, in vocabulary order: its mass, then the token
        total = tl.zeros((), tl.float64)
        token = nobody
        for look in range(2):
            target = uniform * total
            before = tl.zeros((), tl.float64)
            seen = tl.zeros((), tl.int32)
            last = tl.zeros((), tl.int32)
            for start in range(0, size, BLOCK):
                index, x = _block(logits, start, size, BLOCK)
                key = _key(x)
                is_tie = ((key == nucleus) & (index < size)).to(tl.int32)
                number = seen + tl.cumsum(is_tie, 0)
                weight = _weigh(x, key, most, temperature, log_min_p, kth, True)
                keep = (key > nucleus) | ((is_tie == 1) & (number > dropped))
                weight = tl.where(keep, weight, 0.0)
                cdf = before + tl.cumsum(weight, 0)
                if look == 1:
                    token = tl.minimum(token, tl.min(tl.where((cdf > target) & (weight > 0), index, nobody), 0))
                    last = tl.maximum(last, tl.max(tl.where(weight > 0, index, 0), 0))
                before += tl.sum(weight, 0)
                seen += tl.sum(is_tie, 0)
            total = before
            if look == 1:
                tl.store(token_S + sequence, tl.minimum(token, last).to(tl.int64))
