"""Pixels of every type as 8-bit RGB. docs/inputs.md states how grey values of more than 8 bits are scaled."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

_STRIP_PIXELS = 1 << 18
_RANGES = (1.0, 255.0, 65535.0)
_FINITE = 1.7e38  # the difference of two such numbers is a float32
_LEAST_RANGE = 1e-30  # 255 times its reciprocal is a float32


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image to 8-bit RGB; transparency is dropped.

    Raises:
        ValueError: Pillow does not convert this mode.
    """
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):  # convert() would clip these at 255, not scale them
        return Image.fromarray(_grey(image)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _grey(image: Image.Image) -> np.ndarray:
    """Returns [H, W] uint8 of an image of 16-bit, 32-bit or float pixels."""
    if image.mode.startswith("I;16") and image.format != "TIFF":  # other formats say that this is the range
        low, high = 0.0, 65535.0
    else:
        low, high = _range(image)
    low, high = max(low, -_FINITE), min(high, _FINITE)
    grey = np.empty((image.height, image.width), np.uint8)
    for top, values in _strips(image):
        np.nan_to_num(values, copy=False, nan=low, posinf=high, neginf=low)
        values.clip(low, high, out=values)
        np.subtract(values, np.float32(low), out=values)
        np.multiply(values, np.float32(255.0 / max(high - low, _LEAST_RANGE)), out=values)
        grey[top : top + len(values)] = values.astype(np.uint8)
    return grey


def _strips(image: Image.Image) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the first row and the values, [h, W] float32, of one strip after the other: whole images are large."""
    rows = max(1, _STRIP_PIXELS // max(1, image.width))
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        yield top, np.array(strip, dtype=np.float32)


def _range(image: Image.Image) -> tuple[float, float]:
    """Returns which values are black and white: a usual range if the values fill a quarter of it, or else their own."""
    low, high = np.inf, -np.inf
    for _, values in _strips(image):
        finite = np.isfinite(values)
        low = min(low, float(values.min(where=finite, initial=np.inf)))
        high = max(high, float(values.max(where=finite, initial=-np.inf)))
    if low > high:  # not a single number
        return 0.0, 1.0
    for top in _RANGES if image.mode == "F" else _RANGES[1:]:
        if low >= 0 and top / 4 <= high <= top:
            return 0.0, top
    return (low, high) if low < high else (min(low, 0.0), max(high, 0.0))
