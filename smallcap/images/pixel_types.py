"""Pixels of every type as 8-bit RGB. docs/inputs.md states how grey values of more than 8 bits are scaled."""

from __future__ import annotations

import numpy as np
from PIL import Image

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
    values = np.array(image, dtype=np.float32)
    if image.mode.startswith("I;16") and image.format != "TIFF":  # other formats say that this is the range
        low, high = 0.0, 65535.0
    else:
        low, high = _range(values, image.mode)
    low, high = max(low, -_FINITE), min(high, _FINITE)
    np.nan_to_num(values, copy=False, nan=low, posinf=high, neginf=low)
    values.clip(low, high, out=values)
    values -= np.float32(low)
    values *= np.float32(255.0 / max(high - low, _LEAST_RANGE))
    return values.astype(np.uint8)


def _range(values: np.ndarray, mode: str) -> tuple[float, float]:
    """Returns which values are black and white: a usual range if the values fill a quarter of it, or else their own."""
    finite = np.isfinite(values)
    low = float(values.min(where=finite, initial=np.inf))
    high = float(values.max(where=finite, initial=-np.inf))
    if low > high:  # not a single number
        return 0.0, 1.0
    for top in _RANGES if mode == "F" else _RANGES[1:]:
        if low >= 0 and top / 4 <= high <= top:
            return 0.0, top
    return (low, high) if low < high else (min(low, 0.0), max(high, 0.0))
