"""A step's attention and norms on a CPU as compiled C: ``kernels.c``, which torch would do in some twenty operations.

They are made for one model's heads (:mod:`rheostat.compiled`). Where they cannot be, torch does the same, with other
rounding.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rheostat.compiled import library

_LANES = {torch.bfloat16: 32, torch.float32: 16}  # numbers that a head's size must be a multiple of
_MOST_SHARED = 16  # queries that share a head of keys: more would not stay in registers


class Place(NamedTuple):
    """Where one layer's step finds and leaves keys and values.

    Attributes:
        keys_BGCD: of rows × KV heads × room × head size, dense; ``values_BGCD`` likewise. The step writes at
            ``end_B`` − 1 of the room, and sees the tokens from ``start_B`` on.
        prefix: keys and values that all rows see before their own, of KV heads × tokens × head size, dense; or None.
    """

    keys_BGCD: Tensor
    values_BGCD: Tensor
    start_B: Int[Tensor, " B"]
    end_B: Int[Tensor, " B"]
    prefix: tuple[Tensor, Tensor] | None


class Kernels:
    """The compiled functions, for tensors of one dtype and heads of one size."""

    def __init__(self, library: ctypes.CDLL, size: int, shared: int) -> None:
        self._size, self._shared = size, shared
        number, pointer = ctypes.c_int64, ctypes.c_void_p
        self._attend, self._norm = library.attend, library.norm
        self._attend.argtypes = [ctypes.c_int] + [number] * 4 + [ctypes.c_float] * 2 + [pointer] * 11
        self._norm.argtypes = [ctypes.c_int] + [number] * 2 + [ctypes.c_float] + [pointer] * 3
        self._attend.restype = self._norm.restype = None

    def norm(self, x: Float[Tensor, "*N H"], weight_H: Float[Tensor, " H"], epsilon: float) -> Float[Tensor, "*N H"]:
        """RMSNorm of dense ``x`` over its last axis, computed in float32."""
        out = torch.empty_like(x)
        size = x.shape[-1]
        pointers = x.data_ptr(), weight_H.data_ptr(), out.data_ptr()
        self._norm(torch.get_num_threads(), x.numel() // size, size, epsilon, *pointers)
        return out

    def attend(
        self,
        qkv_BN: Float[Tensor, "B N"],
        cos_BD: Float[Tensor, "B D"],
        sin_BD: Float[Tensor, "B D"],
        scaling: float,
        places: Sequence[Place],
        head_norm_KD: Float[Tensor, "K D"] | None = None,
        epsilon: float = 0.0,
    ) -> Float[Tensor, "B Q"]:
        """One token per row: turn queries and keys by their positions, append keys and values, attend.

        Args:
            qkv_BN: queries, keys and values of all heads, side by side.
            cos_BD: of each row's position; ``sin_BD`` likewise, its first half negative.
            scaling: of the scores.
            places: keys and values, which grow by these; those of the first rows, then those of the next.
            head_norm_KD: weights of an RMSNorm of each query and key by itself, or None; ``epsilon`` is the norm's.
        """
        out = torch.empty(len(qkv_BN), qkv_BN.shape[1] * self._shared // (self._shared + 2), dtype=qkv_BN.dtype)
        norm = None if head_norm_KD is None else head_norm_KD.data_ptr()
        threads, first = torch.get_num_threads(), 0
        for place in places:
            rows, groups, room, size = place.keys_BGCD.shape
            assert size == self._size
            keys, values = place.prefix or (None, None)
            part = slice(first, first + rows)
            first += rows
            self._attend(
                threads,
                rows,
                groups,
                room,
                0 if keys is None else keys.shape[1],
                scaling,
                epsilon,
                place.start_B.data_ptr(),
                place.end_B.data_ptr(),
                qkv_BN[part].data_ptr(),
                cos_BD[part].data_ptr(),
                sin_BD[part].data_ptr(),
                norm,
                place.keys_BGCD.data_ptr(),
                place.values_BGCD.data_ptr(),
                None if keys is None else keys.data_ptr(),
                None if values is None else values.data_ptr(),
                out[part].data_ptr(),
            )
        return out


@cache
def kernels(dtype: torch.dtype, size: int, shared: int) -> Kernels | None:
    """The functions for heads of ``size`` numbers of which ``shared`` queries share a key; None: torch must do it."""
    if dtype not in _LANES or size % _LANES[dtype] or shared > _MOST_SHARED:
        return None
    macros = [f"HEAD_SIZE={size}", f"SHARED={shared}", *(["BFLOAT16"] if dtype == torch.bfloat16 else [])]
    found = library("rheostat.engines", "kernels.c", tuple(macros))
    return None if found is None else Kernels(found, size, shared)
