"""Reads from a library for which GPUs it holds code, as NVIDIA's cuobjdump lists it; nothing is loaded."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from mmap import ACCESS_READ, mmap
from pathlib import Path

_MAGIC = struct.pack("<I", 0xBA55ED50)
_HEADER = struct.Struct("<4sHHQ")  # magic, version, bytes of the header, bytes after it
_ENTRY = struct.Struct("<HHIQ12xI")  # kind, version, bytes of the entry's header, bytes of code, …, architecture
_KINDS = {1: "compute", 2: "sm"}  # PTX, which any later GPU compiles for itself; machine code


def architectures_of(library: Path) -> set[str]:
    """Returns a library's architectures, such as `sm_80` and `compute_90`; none if it has no code for GPUs.

    Code that is bound to exactly one architecture (`sm_90a`) is not told from other code (`sm_90`).
    """
    found: set[str] = set()
    with library.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
        at = data.find(_MAGIC)
        while at >= 0:
            found.update(_container(data, at))
            at = data.find(_MAGIC, at + len(_MAGIC))
    return found


def _container(data: mmap, at: int) -> Iterator[str]:
    """Yields the architectures of the container at a place; of bytes that only look like one, few or none."""
    if at + _HEADER.size > len(data):
        return
    _, version, header, size = _HEADER.unpack_from(data, at)
    if (version, header) != (1, _HEADER.size):
        return
    entry, end = at + header, min(at + header + size, len(data) - _ENTRY.size)
    while entry <= end:
        kind, _, entry_header, code, number = _ENTRY.unpack_from(data, entry)
        if kind not in _KINDS or entry_header < _ENTRY.size:
            return
        yield f"{_KINDS[kind]}_{number}"
        entry += entry_header + code
