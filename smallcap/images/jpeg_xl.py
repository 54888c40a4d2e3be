"""The size that a JPEG XL file declares.

The plugin decodes a file as soon as it is opened. What is too large must be refused before that.
"""

from __future__ import annotations

import struct

BARE = b"\xff\x0a"
CONTAINER = b"\x00\x00\x00\x0cJXL \r\n\x87\n"
_HEAD_BYTES = 24  # more than a size takes: 2 bytes, and at most 69 bits
_WIDTH_TO_HEIGHT = {1: (1, 1), 2: (12, 10), 3: (4, 3), 4: (3, 2), 5: (16, 9), 6: (5, 4), 7: (2, 1)}


class _Bits:
    """Bits in JPEG XL's order: from the least significant of each byte."""

    def __init__(self, data: bytes) -> None:
        self._left = int.from_bytes(data, "little")

    def take(self, bits: int) -> int:
        value = self._left & ((1 << bits) - 1)
        self._left >>= bits
        return value

    def side(self, in_eighths: bool) -> int:
        return 8 * (1 + self.take(5)) if in_eighths else 1 + self.take((9, 13, 18, 30)[self.take(2)])


def declared_size(data: bytes) -> tuple[int, int] | None:
    """Returns width and height in px, or None if the file has no codestream where one should be.

    Source: ISO/IEC 18181-1, SizeHeader; 18181-2, boxes `jxlc` and `jxlp`.
    """
    head = data[:_HEAD_BYTES] if data.startswith(BARE) else _codestream(data)
    if not head.startswith(BARE):
        return None
    bits = _Bits(head[2:])
    in_eighths = bool(bits.take(1))
    height = bits.side(in_eighths)
    ratio = bits.take(3)
    if ratio:
        wide, high = _WIDTH_TO_HEIGHT[ratio]
        return height * wide // high, height
    return bits.side(in_eighths), height


def _codestream(data: bytes) -> bytes:
    """Returns the first bytes of the codestream in a container."""
    place = 0
    while place + 16 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        header = 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, place + 8)
            header = 16
        if kind in (b"jxlc", b"jxlp"):
            start = place + header + (4 if kind == b"jxlp" else 0)  # a part starts with its number
            return data[start : start + _HEAD_BYTES]
        if length < header:
            break
        place += length
    return b""
