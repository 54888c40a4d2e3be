"""How this process treats memory that it has freed."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
_MOST_KEPT = 2**31 - 1  # bytes, free at the top of the heap


def keep_freed_memory() -> None:
    """Makes malloc keep large blocks for reuse, where it is glibc's.

    By default it gives blocks like a batch's activations back to the system at once, and each next one costs thousands
    of page faults. Meant for a process that does nothing but run a model on a CPU: its memory stays at its peak.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_MAX, 0)
            mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT)
