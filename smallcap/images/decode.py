"""Decodes fetched bytes to the pixels that an encoder takes, or to a row's error.

Decoding and cropping give uint8 pixels, in CPU tasks that do not need torch; the encoder normalises them on its device.
Resizing is Pillow's bicubic with CLIP's rounding, as in the training of the encoders.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import simplejpeg
from PIL import Image

from smallcap.errors import ErrorCode, RowError
from smallcap.images.opening import MAX_IMAGE_PIXELS, Reserve, damaged, open_image
from smallcap.images.orientation import exchanges_sides, read_orientation, upright
from smallcap.images.pixel_types import to_rgb


@dataclass(frozen=True)
class Preprocessing:
    """How images are prepared for an encoder: resize the shorter side, crop the centre, normalise."""

    size_px: int
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    crop_rounding: Literal["floor", "nearest"] = "floor"  # transformers floors an odd margin, torchvision rounds it


def decode_image(
    data: bytes, max_pixels: int = MAX_IMAGE_PIXELS, where: str = "", reserve: Reserve = lambda *_: None
) -> Image.Image:
    """Decodes the first frame of an image file to 8-bit RGB, upright.

    Args:
        data: The file's bytes.
        max_pixels: The most pixels; larger images are refused before they are decoded.
        where: The image's URI, for messages.
        reserve: Called before anything is decoded.

    Raises:
        RowError: `empty`, `not_an_image`, `truncated`, `too_large` or `unsupported`.
    """
    return _load(open_image(data, max_pixels, where, reserve), data, where)


@dataclass(frozen=True)
class ScaledImage:
    """An image that was decoded at a fraction of its size, or at full size where that was not possible."""

    image: Image.Image  # RGB, upright
    width: int  # px of the whole image, upright
    height: int  # px of the whole image, upright
    by_pillow: bool  # whether Pillow decoded it, at full size

    @classmethod
    def whole(cls, image: Image.Image) -> ScaledImage:
        """Wraps an image that Pillow decoded at full size."""
        return cls(image, image.width, image.height, by_pillow=True)


def decode_scaled(
    data: bytes,
    least_px: int,
    max_pixels: int = MAX_IMAGE_PIXELS,
    where: str = "",
    reserve: Reserve = lambda *_: None,
) -> ScaledImage:
    """Decodes a JPEG file at the smallest scale of libjpeg whose shorter side has `least_px`; other files with Pillow.

    Other arguments and errors are those of `decode_image`; Pillow decodes or explains what simplejpeg refuses.
    """
    image = open_image(data, max_pixels, where, reserve)
    if image.format == "JPEG" and image.mode in ("RGB", "L"):
        try:
            pixels = simplejpeg.decode_jpeg(
                data, fastdct=True, fastupsample=True, min_height=least_px, min_width=least_px
            )
        except (KeyError, ValueError, MemoryError):
            pass
        else:
            orientation = read_orientation(image, data)
            width, height = image.size[::-1] if exchanges_sides(orientation) else image.size
            return ScaledImage(upright(Image.fromarray(pixels), orientation), width, height, by_pillow=False)
    return ScaledImage.whole(_load(image, data, where))


def _load(image: Image.Image, data: bytes, where: str) -> Image.Image:
    """Decodes an opened image to RGB, upright."""
    try:
        if image.format == "TIFF":
            orientation = read_orientation(image, data)
            _forget_tags(image)
            image.load()
            if image.size != image.im.size:  # Pillow has exchanged the sides for a turn; a copy has the pixels' sides
                copy = image.copy()
                copy.format = image.format
                image = copy
        else:
            image.load()  # a PNG's EXIF may follow its pixels
            orientation = read_orientation(image, data)
    except Exception as error:  # the plugin of a format can raise nearly anything for a damaged file
        raise damaged(error, "The image data ends early or is damaged", where) from error
    return upright(as_rgb(image, where), orientation)


def as_rgb(image: Image.Image, where: str = "") -> Image.Image:
    """Converts an image's pixels to 8-bit RGB; docs/inputs.md says how wider grey values are scaled.

    Raises:
        RowError: `unsupported`, `truncated`, or `too_large` for the memory.
    """
    try:
        return to_rgb(image)
    except ValueError as error:
        what = f"Pixels of the type {image.mode} are not converted to RGB: {error}"
        raise RowError(ErrorCode.UNSUPPORTED, what, where=where) from error
    except Exception as error:  # a palette or its transparency may be damaged
        raise damaged(error, "The image's colours are damaged", where) from error


def _forget_tags(image: Image.Image) -> None:
    """Empties a TIFF's EXIF: loading would read all of it, turn the image by it, and fail where it is malformed."""
    image.info.pop("xmp", None)
    exif = image.getexif()
    for tag in list(exif):
        del exif[tag]


def crop_pixels(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """Resizes the shorter side to the encoder's size and crops the centre.

    Args:
        image: The image, RGB.
        preprocessing: The encoder's preprocessing.

    Returns:
        [S, S, 3] uint8.
    """
    size = preprocessing.size_px
    resized = resized_sides(image.width, image.height, size)
    if math.prod(resized) > MAX_IMAGE_PIXELS:  # very long and narrow: cut off what the crop would cut off anyway
        image, resized = _middle_square(image), (size, size)
    if image.size != resized:
        image = image.resize(resized, Image.Resampling.BICUBIC)
    left, top = (_margin(side, size, preprocessing.crop_rounding) for side in resized)
    return np.array(image.crop((left, top, left + size, top + size)), dtype=np.uint8)


def resized_sides(width: int, height: int, shorter_px: int) -> tuple[int, int]:
    """Returns the width and height in px of an image whose shorter side has become `shorter_px`."""
    if width <= height:
        return shorter_px, max(shorter_px, int(shorter_px * height / width))
    return max(shorter_px, int(shorter_px * width / height)), shorter_px


def _middle_square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    return image.crop((left, top, left + side, top + side))


def _margin(side: int, size: int, rounding: Literal["floor", "nearest"]) -> int:
    return (side - size) // 2 if rounding == "floor" else round((side - size) / 2.0)
