"""A step's attention and norms on a CPU as compiled C: ``kernels.c``, which torch would do in some twenty operations.

The machine's own C compiler makes them for one model's heads and this processor, which takes less than a second, and
the cache keeps the library. Where there is none, torch does the same with other rounding.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rheostat.engines.models import cache_folder
from rheostat.errors import StoreError
from rheostat.files import atomic_write, make_folder

_LANES = {torch.bfloat16: 32, torch.float32: 16}  # numbers that a head's size must be a multiple of
_MOST_SHARED = 16  # queries that share a head of keys: more would not stay in registers
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")
_SECONDS = 120


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
        self._attend.argtypes = [number] * 4 + [ctypes.c_float] * 2 + [pointer] * 11
        self._norm.argtypes = [number] * 2 + [ctypes.c_float] + [pointer] * 3
        self._attend.restype = self._norm.restype = None

    def norm(self, x: Float[Tensor, "*N H"], weight_H: Float[Tensor, " H"], epsilon: float) -> Float[Tensor, "*N H"]:
        """RMSNorm of dense ``x`` over its last axis, computed in float32."""
        out = torch.empty_like(x)
        size = x.shape[-1]
        self._norm(x.numel() // size, size, epsilon, x.data_ptr(), weight_H.data_ptr(), out.data_ptr())
        return out

    def attend(
        self,
        qkv_BN: Float[Tensor, "B N"],
        cos_BD: Float[Tensor, "B D"],
        sin_BD: Float[Tensor, "B D"],
        scaling: float,
        place: Place,
        head_norm_KD: Float[Tensor, "K D"] | None = None,
        epsilon: float = 0.0,
    ) -> Float[Tensor, "B Q"]:
        """One token per row: turn queries and keys by their positions, append keys and values, attend.

        Args:
            qkv_BN: queries, keys and values of all heads, side by side.
            cos_BD: of each row's position; ``sin_BD`` likewise, its first half negative.
            scaling: of the scores.
            place: keys and values, which grow by these.
            head_norm_KD: weights of an RMSNorm of each query and key by itself, or None; ``epsilon`` is the norm's.
        """
        rows, groups, room, size = place.keys_BGCD.shape
        assert size == self._size
        heads = groups * self._shared
        out = torch.empty(rows, heads * size, dtype=qkv_BN.dtype)
        keys, values = place.prefix or (None, None)
        self._attend(
            rows,
            groups,
            room,
            0 if keys is None else keys.shape[1],
            scaling,
            epsilon,
            place.start_B.data_ptr(),
            place.end_B.data_ptr(),
            qkv_BN.data_ptr(),
            cos_BD.data_ptr(),
            sin_BD.data_ptr(),
            None if head_norm_KD is None else head_norm_KD.data_ptr(),
            place.keys_BGCD.data_ptr(),
            place.values_BGCD.data_ptr(),
            None if keys is None else keys.data_ptr(),
            None if values is None else values.data_ptr(),
            out.data_ptr(),
        )
        return out


@cache
def kernels(dtype: torch.dtype, size: int, shared: int) -> Kernels | None:
    """The functions for heads of ``size`` numbers of which ``shared`` queries share a key; None: torch must do it.

    Where a compiler is missing or fails, a warning says so, once.
    """
    if sys.platform == "win32" or dtype not in _LANES or size % _LANES[dtype] or shared > _MOST_SHARED:
        return None
    try:
        return Kernels(_library(dtype, size, shared), size, shared)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        reason = next((line for line in said.splitlines() if "error" in line), said.strip().splitlines()[0])
        warnings.warn(
            f"no C compiler makes the engine's kernels here, so that its steps are slower: install gcc ({reason})",
            stacklevel=2,
        )
        return None


def _library(dtype: torch.dtype, size: int, shared: int) -> ctypes.CDLL:
    """The compiled library, from the cache if it is there and can be loaded."""
    source = files("rheostat.engines").joinpath("kernels.c").read_text()
    compiler = os.environ.get("CC") or shutil.which("cc") or "gcc"
    sizes = [f"-DHEAD_SIZE={size}", f"-DSHARED={shared}", *(["-DBFLOAT16"] if dtype == torch.bfloat16 else [])]
    command = [*compiler.split(), *_FLAGS, *sizes]
    known = hashlib.sha256("\n".join([source, *command, platform.machine(), _processor()]).encode()).hexdigest()
    path = cache_folder() / "kernels" / f"{known[:32]}.so"
    with contextlib.suppress(OSError):
        return ctypes.CDLL(str(path))
    with tempfile.TemporaryDirectory() as folder:
        code, made = Path(folder, "kernels.c"), Path(folder, "kernels.so")
        code.write_text(source)
        command += ["-o", str(made), str(code), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS)
        library = ctypes.CDLL(str(made))  # stays when the folder goes
        with contextlib.suppress(StoreError):  # a cache that cannot be written: next time again
            atomic_write(make_folder(path.parent) / path.name, made.read_bytes())
    return library


def _processor() -> str:
    """What the processor can do: a home folder may be used by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
