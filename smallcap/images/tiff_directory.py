"""The first directory of a TIFF structure, which holds the tags of a TIFF or of EXIF."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

_BYTES_OF_TYPE = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
_NO_TYPE = b"\0\0"


class Entry(NamedTuple):
    """A tag of a directory."""

    place: int  # of the entry, in bytes from the start
    tag: int
    kind: int  # the type of its values: 3 is SHORT, 4 is LONG
    number: int  # of values
    value: bytes  # 4 bytes, of BigTIFF 8: the values, or where they lie


def byte_order(block: bytes) -> str:
    """Returns the byte order of a TIFF structure as `struct` names it; empty if the bytes are none."""
    return {b"II": "<", b"MM": ">"}.get(block[:2], "")


def entries(block: bytes) -> Iterator[Entry]:
    """Yields the tags of the first directory, as far as it goes."""
    order = byte_order(block)
    if not order:
        return
    is_big = block[2:4] in (b"\x2b\0", b"\0\x2b")
    offset_format, count_format, entry_format = ("Q", "Q", "HHQ8s") if is_big else ("I", "H", "HHI4s")
    try:
        (offset,) = struct.unpack_from(order + offset_format, block, 8 if is_big else 4)
        (count,) = struct.unpack_from(order + count_format, block, offset)
        offset += struct.calcsize(order + count_format)
        step = struct.calcsize(order + entry_format)
        for place in range(offset, min(offset + count * step, len(block)), step):
            yield Entry(place, *struct.unpack_from(order + entry_format, block, place))
    except (struct.error, OverflowError):  # it ends early, or lies outside
        return


def without_stray_values(data: bytes) -> bytes:
    """Returns a TIFF in which tags whose values lie outside of the file have no type.

    Readers pass over a tag without a type. Pillow reads no tags behind one whose values are missing.
    """
    order, changed = byte_order(data), None
    for place, _, kind, number, value in entries(data):
        size = number * _BYTES_OF_TYPE.get(kind, 0)
        (offset,) = struct.unpack(order + ("Q" if len(value) > 4 else "I"), value)
        if size > len(value) and offset + size > len(data):
            changed = changed or bytearray(data)
            changed[place + 2 : place + 4] = _NO_TYPE
    return bytes(changed) if changed else data
