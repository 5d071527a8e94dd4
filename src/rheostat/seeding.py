"""Randomness that belongs to the request.

Every draw is a pure function of who asks for it: a 64-bit *stream* is hashed from names and numbers
(:func:`derive_seed`), and the uniform at step t for a purpose is hashed from stream, t and purpose
(:func:`uniforms`). Nothing depends on batch position, batch size, order of arrival or number of workers.
"""

import hashlib
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # the ground floor loads no torch
    from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


class Purpose(IntEnum):
    """What a uniform is spent on; streams of different purposes are independent."""

    TOKEN = 0
    ACTION = 1


def derive_seed(*parts: str | int | float | bool | None) -> int:
    """A stable 64-bit seed from ``parts``; equal parts in equal order give equal seeds on every machine."""
    text = "\x1f".join(f"{type(part).__name__}:{part!r}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea and Flood, 2014): a bijection that avalanches every bit."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def uniforms(streams: NDArray[np.uint64], t: int | NDArray[np.int64], purpose: Purpose) -> NDArray[np.float64]:
    """One uniform in [0, 1) per stream at step ``t`` (shared, or one per stream) for ``purpose``.

    A counter-based generator: random access in t, no state to keep, vectorised over streams.
    """
    counter = np.asarray(t, dtype=np.uint64) * np.uint64(len(Purpose)) + np.uint64(purpose) + np.uint64(1)
    with np.errstate(over="ignore"):
        bits = _mix(_mix(streams) + counter * _GOLDEN)
        bits = _mix(bits)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def tensor_uniforms(streams_S: "Tensor", t_S: "Tensor", purpose: Purpose) -> "Tensor":
    """:func:`uniforms`, bit for bit, on the device of tensors: streams are the same 64 bits as int64."""
    counter_S = t_S * len(Purpose) + (int(purpose) + 1)
    bits_S = _mix_tensor(_mix_tensor(_mix_tensor(streams_S) + counter_S * _signed(_GOLDEN)))
    return _shifted(bits_S, 11).double() * 2.0**-53


def _mix_tensor(x: "Tensor") -> "Tensor":
    x = (x ^ _shifted(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shifted(x, 27)) * _signed(_MIX_2)
    return x ^ _shifted(x, 31)


def _shifted(x: "Tensor", places: int) -> "Tensor":
    """To the right, zeros coming in: int64 has its sign there."""
    return x >> places & (1 << 64 - places) - 1


def _signed(constant: np.uint64) -> int:
    return int(constant.astype(np.int64))
