"""What sampling asks of whole vocabularies, on a CPU: ``sampling.c``, which sorts nothing and computes in float64."""

import ctypes
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rheostat.compiled import library
from rheostat.decoding.policy import Decision, SamplingParameters
from rheostat.decoding.strategy import Order


class CompiledSampling:
    """The compiled functions, for float32 logits on the CPU whose rows are dense."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.scratch.restype = ctypes.c_int64

    def draw(
        self, logits_BV: Tensor, row_S: Tensor, decision: Decision, uniform_S: Tensor, order: Order
    ) -> Int[Tensor, " S"]:
        """See :func:`rheostat.decoding.sampling.draw`."""
        sets, choice_S = decision.parameters, decision.choice_S
        sorted_S = (row_S * len(sets) + choice_S).argsort()
        token_S = logits_BV.new_empty(len(row_S), dtype=torch.int64)
        self._call(
            "draw",
            logits_BV,
            *_columns(sets, order),
            len(row_S),
            sorted_S,
            row_S,
            choice_S,
            uniform_S.double(),
            token_S,
        )
        return token_S

    def log_probabilities(
        self, logits_BV: Tensor, row_S: Tensor, token_S: Tensor, sets: SamplingParameters, order: Order
    ) -> Float[Tensor, "S K"]:
        """log p_a(y) of each sequence's token under each of K sets, float32; −inf where a set excludes it."""
        log_p_SK = logits_BV.new_empty(len(row_S), len(sets))
        sequences = len(row_S), row_S.argsort(), row_S, len(sets), token_S, log_p_SK
        self._call("log_probabilities", logits_BV, *_columns(sets, order), *sequences)
        return log_p_SK

    def entropies(self, logits_BV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :func:`rheostat.decoding.weights.entropies`."""
        largest_B, total_B, entropy_B = (logits_BV.new_empty(len(logits_BV)) for _ in range(3))
        self._call("entropies", logits_BV, len(logits_BV), largest_B, total_B, entropy_B)
        return largest_B, total_B, entropy_B

    def _call(self, name: str, logits_BV: Tensor, *parts: Tensor | int | None) -> None:
        """Every function begins with threads, size of the vocabulary, distance of two rows, logits, and memory.

        Integers are 64 bits wide; tensors are float32, float64 or int64, as ``sampling.c`` has them.
        """
        threads, vocabulary = torch.get_num_threads(), logits_BV.shape[1]
        memory = logits_BV.new_empty(threads * self._library.scratch(ctypes.c_int64(vocabulary)), dtype=torch.uint8)
        dense = [_dense(part) if isinstance(part, Tensor) else part for part in parts]  # kept until it returns
        getattr(self._library, name)(
            *map(ctypes.c_int64, (threads, vocabulary, logits_BV.stride(0))),
            *(
                ctypes.c_int64(part)
                if isinstance(part, int)
                else ctypes.c_void_p(None if part is None else part.data_ptr())
                for part in (logits_BV, memory, *dense)
            ),
        )


def _dense(part: Tensor) -> Tensor:
    return (part if part.is_floating_point() else part.long()).contiguous()


def _columns(sets: SamplingParameters, order: Order) -> tuple[Tensor | int | None, ...]:
    sigma_K = sets.top_n_sigma_K
    return (
        sets.temperature_K.double(),
        sets.top_k_K,
        sets.top_p_K.double(),
        sets.min_p_K.double(),
        None if sigma_K is None else sigma_K.double(),
        int(order is Order.VLLM),
    )


def compiled_sampling(logits_BV: Tensor) -> CompiledSampling | None:
    """The functions, if these logits fit and a compiler is there."""
    if logits_BV.device.type != "cpu" or logits_BV.dtype != torch.float32 or logits_BV.stride(1) != 1:
        return None
    return _functions()


@cache
def _functions() -> CompiledSampling | None:
    found = library("rheostat.decoding", "sampling.c")
    return None if found is None else CompiledSampling(found)
