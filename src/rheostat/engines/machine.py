"""What the machine gives an engine: memory, processor cores, and what its C library does with memory given back."""

import ctypes
import math
import os
import sys
from pathlib import Path

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")
_TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"

# glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_KEEP = ((_ARENA_MAX, 1), (_MMAP_THRESHOLD, 32 << 20), (_TRIM_THRESHOLD, 512 << 20))


def keep_freed_memory() -> bool:
    """Let this process keep up to 512 MiB of what it frees; returns whether its C library can be told so (glibc).

    Every step of a model takes and frees the same megabytes. By default they go back to the system and come again as
    pages that must be zeroed, most of all in threads other than the first: docs/benchmarks.md, "serve".
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    return all(mallopt(name, value) == 1 for name, value in _KEEP)


def free_memory(device: torch.device) -> int:
    """Bytes that could be had now: of the GPU, else of the machine, within the limit of a container (cgroup v2)."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(int(psutil.virtual_memory().available), _left_to_container())


def _left_to_container() -> int:
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):  # no such control group, or "max"
        return sys.maxsize
    cached = next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
    return max(0, limit - used + cached)


def steady(size: int) -> int:
    """The largest power of two up to ``size``: what is planned from memory that is free right now stays the same
    from run to run, and with it how batches are made up and their sums are rounded.
    """
    return 1 << (size.bit_length() - 1) if size > 0 else 0


def usable_cores() -> int:
    """Physical cores that this process may run on, no more than a container's quota of processor time (cgroup v2)."""
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = {_siblings(cpu) for cpu in mine}
    return max(1, min(len(cores), _quota()))


def _siblings(cpu: int) -> str:
    """Logical processors of the same core name the same ones."""
    try:
        return Path(_TOPOLOGY.format(cpu)).read_text().strip()
    except OSError:
        return str(cpu)


def _quota() -> int:
    try:
        quota, period = (_CGROUP / "cpu.max").read_text().split()
        return max(1, math.floor(int(quota) / int(period)))
    except (OSError, ValueError):  # no such control group, or "max"
        return sys.maxsize


def use_usable_cores() -> None:
    """Let torch run as many threads as there are :func:`usable_cores`, unless ``OMP_NUM_THREADS`` says how many.

    On its own, torch starts a thread for every logical processor: two on a core are slower than one, and many more
    than a container's quota wait for each other at every layer. Counted and not timed: docs/architecture.md.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
