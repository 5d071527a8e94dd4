"""What the C library does with memory that a step gives back."""

import ctypes
import sys

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
