"""How an image must be turned to stand upright: EXIF's orientation, read without regard to other tags.

Pillow's `exif_transpose` reads and writes all tags, and fails at the first that is malformed. It serves no image here.
"""

from __future__ import annotations

import re
import struct

from PIL import Image

from smallcap.images import tiff_directory

_ORIENTATION_TAG = 0x0112
_FORMAT_OF_TYPE = {3: "H", 4: "I"}  # SHORT, which EXIF demands, and LONG, which some writers use
_IN_XMP = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_orientation(image: Image.Image, data: bytes) -> int:
    """Reads an image's orientation from its EXIF, or else from its XMP.

    Args:
        image: The image as its plugin opened it, loaded if it is a PNG, whose EXIF may follow the pixels.
        data: The file's bytes.

    Returns:
        1 to 8, as in EXIF. 1, upright, also for a tag of another type or value, and for what cannot be read.
    """
    if image.format == "JXL" and not getattr(image, "jpeg", False):
        return 1  # the decoder has turned it; the standard says that EXIF does not count
    tag = _tag_of_directory(data if image.format == "TIFF" else _exif_block(image))
    if tag is None:
        xmp = image.info.get("XML:com.adobe.xmp") or image.info.get("xmp") or b""
        found = _IN_XMP.search(xmp if isinstance(xmp, bytes) else str(xmp).encode(errors="replace"))
        tag = int(found[1]) if found else 1
    return tag if tag in _TURNS else 1


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """Turns an image; an orientation that is not 2 to 8 leaves it as it is."""
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def exchanges_sides(orientation: int) -> bool:
    """Returns whether turning exchanges width and height."""
    return 5 <= orientation <= 8


def _exif_block(image: Image.Image) -> bytes:
    """Returns the TIFF structure in which EXIF lies; empty where there is none."""
    block = image.info.get("exif")
    if block is None:  # ImageMagick's PNGs hold it as text: a name, its length and hexadecimal lines
        lines = str(image.info.get("Raw profile type exif", "")).split("\n")[3:]
        try:
            block = bytes.fromhex("".join(lines))
        except ValueError:
            return b""
    if not isinstance(block, bytes):
        return b""
    while block.startswith(b"Exif\0\0"):
        block = block[6:]
    return block


def _tag_of_directory(block: bytes) -> int | None:
    """Returns the orientation in a TIFF structure's first directory: None without the tag, 0 if it is malformed."""
    for entry in tiff_directory.entries(block):
        if entry.tag == _ORIENTATION_TAG:
            if entry.number != 1 or entry.kind not in _FORMAT_OF_TYPE:
                return 0
            return int(
                struct.unpack_from(tiff_directory.byte_order(block) + _FORMAT_OF_TYPE[entry.kind], entry.value)[0]
            )
    return None
