"""How much memory a process can still take, and whether it keeps what it has freed."""

from __future__ import annotations

import ctypes
import functools
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

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


def return_freed_memory() -> None:
    """Gives what this process has freed back to the system at once, where malloc is glibc's.

    By itself glibc gives back only what lies at the end of the heap.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def available_bytes(root: Path = Path("/")) -> int:
    """Returns the memory that this process could take now: what the machine has left, or less in a container.

    Args:
        root: Folder that holds `proc` and `sys`.
    """
    left = [_machine_bytes(root)]
    for limit_file, used_file, stat_file, reclaimable in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),  # control groups, version 2
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        folder = root / "sys/fs/cgroup"
        try:
            limit, used = ((folder / name).read_text().strip() for name in (limit_file, used_file))
            group_stat = dict(line.split() for line in (folder / stat_file).read_text().splitlines())
            if limit != "max":  # version 1 writes a number larger than any memory
                left.append(int(limit) - int(used) + int(group_stat.get(reclaimable, 0)))
        except (OSError, ValueError):
            continue
    return max(0, min(left))


@functools.cache
def total_bytes(root: Path = Path("/")) -> int:
    """Returns the memory of this machine, or less in a container with a limit.

    Args:
        root: Folder that holds `sys`.
    """
    total = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit_file in ("memory.max", "memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # no such file, or `max`
            total.append(int((root / "sys/fs/cgroup" / limit_file).read_text()))
    return min(total)


def private_bytes() -> int:
    """Returns the bytes that only this process holds, without pages of files, which a node's processes share."""
    private = status_bytes("RssAnon")
    if private is None:  # not Linux: all of it at its peak, macOS counts bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return private


def status_bytes(field: str) -> int | None:
    """Returns a field of this process's status on Linux, such as `VmHWM`, the most resident memory; None elsewhere."""
    return _field_bytes(Path("/proc/self/status"), field)


def _machine_bytes(root: Path) -> int:
    available = _field_bytes(root / "proc/meminfo", "MemAvailable")
    if available is None:  # not Linux: all there is
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return available


def _field_bytes(path: Path, field: str) -> int | None:
    """Returns a field that a file of Linux's gives in kB; None where there is no such file or field."""
    try:
        for line in path.read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
