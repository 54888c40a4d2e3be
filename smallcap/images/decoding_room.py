"""Says what decoding an image takes before it is decoded, and bounds what the large images of a node take together.

A loading task reserves enough for photographs of usual sizes. An image of a hundred megapixels takes several times as
much, and as many of them at once as there are tasks would be more than a node has. Such an image waits until the others
that are decoded on its node leave room. The system frees what a process holds here when the process ends.
"""

from __future__ import annotations

import fcntl
import functools
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from PIL import Image

from smallcap.errors import ErrorCode, RowError
from smallcap.machine.process_memory import return_freed_memory, total_bytes
from smallcap.phrasing import describe_gb

OWN_BYTES = 256 << 20
"""What any process may take for an image without waiting: a photograph of 33 megapixels."""
_SLOT_BYTES = 256 << 20  # large images take room in such portions
_SHARE, _MOST = 0.25, 0.5  # of the node's memory: for all its large images together, and for one image
_LOOK_EVERY_S = 0.05

# Bytes for a pixel in Pillow's memory, by mode; all others take 4.
_STORED = {"1": 1, "L": 1, "P": 1}
_WIDE = ("I", "F")  # and I;16: grey values that become 8 bits by way of an array
_RGB_BYTES, _TURNED_BYTES = 4, 4  # Pillow's RGB, and a second copy of it that is turned upright
# What decoders hold besides, as measured (tests): planes of their own, coefficients of all scans, canvases.
_BY_DECODER = {"AVIF": 16, "HEIF": 16, "JPEG2000": 16, "JXL": 16, "WEBP": 12, "PSD": 4, "TIFF": 4, "GIF": 8}
_PROGRESSIVE_BYTES = 8


def bytes_per_pixel(image: Image.Image) -> int:
    """Returns how many bytes decoding an opened image to upright RGB takes at most, for each of its pixels."""
    wide = image.mode.startswith("I;16") or image.mode in _WIDE
    needed = (2 if image.mode.startswith("I;16") else _STORED.get(image.mode, 4)) + _TURNED_BYTES
    if image.mode != "RGB":
        needed += _RGB_BYTES + wide + (4 if image.mode == "P" else 0)  # a palette may become RGBA first
    if image.format in ("JPEG", "MPO") and image.info.get("progressive"):
        needed += _PROGRESSIVE_BYTES
    return needed + _BY_DECODER.get(image.format or "", 0)


class DecodingRoom:
    """The room that one image has; see `decoding_room`.

    Args:
        where: The image's URI, for messages.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._file: IO[bytes] | None = None

    def take(self, needed: int) -> None:
        """Waits until the node has room for `needed` bytes; to be called once.

        Raises:
            RowError: `too_large`: the node will never have as much.
        """
        if needed <= OWN_BYTES:
            return
        memory = total_bytes()
        if needed > _MOST * memory:
            what = f"Decoding the image takes about {describe_gb(needed)}; this node has {describe_gb(memory)}."
            raise RowError(ErrorCode.TOO_LARGE, what, where=self._where)
        path = _slots_file()
        if path is None:
            return
        slots = max(1, int(_SHARE * memory / _SLOT_BYTES))
        self._file = path.open("wb")
        fcntl.lockf(self._file, fcntl.LOCK_EX, 1, 0)  # one at a time gathers slots, so that two never wait crosswise
        left = min(slots, -(-(needed - OWN_BYTES) // _SLOT_BYTES))
        free = set(range(1, slots + 1))
        while left:
            for slot in sorted(free):
                if left and _lock(self._file, slot):
                    free.remove(slot)
                    left -= 1
            if left:
                time.sleep(_LOOK_EVERY_S)
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, 0)

    def release(self) -> None:
        """Gives the room back."""
        if self._file is not None:
            return_freed_memory()  # else it would stay with this process
            self._file.close()


def _lock(file: IO[bytes], slot: int) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, slot)
    except OSError:
        return False
    return True


@functools.cache
def _slots_file() -> Path | None:
    """Returns the file whose locks the processes of this user share; None where there is no folder for it."""
    try:
        path = Path(tempfile.gettempdir()) / f"smallcap-decoding-{os.getuid()}.lock"
        path.touch()
    except OSError:
        return None
    return path


@contextmanager
def decoding_room(where: str) -> Iterator[DecodingRoom]:
    """Gives an image its room on this node for the time of the block.

    Args:
        where: The image's URI, for messages.
    """
    room = DecodingRoom(where)
    try:
        yield room
    finally:
        room.release()
