"""Decodes fetched bytes to the pixels that an encoder takes, or to a row's error.

Decoding and cropping give uint8 pixels, in CPU tasks that do not need torch; the encoder normalises them on its device.
Resizing is Pillow's bicubic with CLIP's rounding, as in the training of the encoders.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from smallcap.errors import ErrorCode, RowError

_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\x00", b"MM\x00*", b"\x00\x00\x01\x00")
_WITHOUT_DECODER = (b"\xff\x0a", b"\x00\x00\x00\x0cJXL ", b"%PDF")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
# Pillow knows these by name, but would run Ghostscript on them, or has no decoder for them.
_NEVER_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
_SNIFFED_BYTES = 2048  # an SVG's own tag comes after comments and a document type
MAX_IMAGE_PIXELS = 100_000_000
_FIRST_TURNED = 5  # EXIF orientations from here on exchange width and height


@dataclass(frozen=True)
class Preprocessing:
    """How images are prepared for an encoder: resize the shorter side, crop the centre, normalise."""

    size_px: int
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    crop_rounding: Literal["floor", "nearest"] = "floor"  # transformers floors an odd margin, torchvision rounds it


def decode_image(data: bytes, max_pixels: int = MAX_IMAGE_PIXELS, where: str = "") -> Image.Image:
    """Decodes the first frame of an image file to 8-bit RGB, upright.

    Args:
        data: The file's bytes.
        max_pixels: The most pixels; larger images are refused before they are decoded.
        where: The image's URI, for messages.

    Raises:
        RowError: `empty`, `not_an_image`, `truncated`, `too_large` or `unsupported`.
    """
    return _load(_open(data, max_pixels, where), where)


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


def decode_scaled(data: bytes, least_px: int, max_pixels: int = MAX_IMAGE_PIXELS, where: str = "") -> ScaledImage:
    """Decodes a JPEG file at the smallest scale of libjpeg whose shorter side has `least_px`; other files with Pillow.

    Other arguments and errors are those of `decode_image`; Pillow decodes or explains what simplejpeg refuses.
    """
    image = _open(data, max_pixels, where)
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1) if image.format == "JPEG" else 1
    width, height = image.size if orientation < _FIRST_TURNED else image.size[::-1]
    if image.format == "JPEG" and image.mode in ("RGB", "L"):
        try:
            pixels = simplejpeg.decode_jpeg(
                data, fastdct=True, fastupsample=True, min_height=least_px, min_width=least_px
            )
        except ValueError:
            pass
        else:
            small = Image.fromarray(pixels)
            small.getexif()[ExifTags.Base.Orientation] = orientation
            return ScaledImage(ImageOps.exif_transpose(small), width, height, by_pillow=False)
    return ScaledImage(_load(image, where), width, height, by_pillow=True)


def _open(data: bytes, max_pixels: int, where: str) -> Image.Image:
    """Reads an image file's header and refuses what is too large."""
    if not data:
        raise RowError(ErrorCode.EMPTY, "The file is empty.", where=where)
    image = _read_header(data, where)
    width, height = image.size
    if width * height > max_pixels:
        raise RowError(
            ErrorCode.TOO_LARGE,
            f"The image has {width} × {height} pixels; at most {max_pixels:,} are decoded.",
            where=where,
            remedy="Raise input.max_image_pixels, and mind the memory of the decoding tasks.",
        )
    return image


def _load(image: Image.Image, where: str) -> Image.Image:
    try:
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))
    except MemoryError:
        raise
    except Exception as error:  # the plugin of a format can raise nearly anything for a damaged file
        raise RowError(ErrorCode.TRUNCATED, f"The image data ends early or is damaged: {error}", where=where) from error


def _read_header(data: bytes, where: str) -> Image.Image:
    # Pillow's limit is process-wide, and only warns up to twice its value; ours is checked against the header.
    Image.MAX_IMAGE_PIXELS = None
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise _unidentified(data, where) from None
    except Exception as error:  # the plugin of a format can raise nearly anything for a damaged header
        raise RowError(ErrorCode.TRUNCATED, f"The image's header is damaged: {error}", where=where) from error
    if image.format in _NEVER_DECODED:
        raise RowError(ErrorCode.UNSUPPORTED, f"Images in the format {image.format} are not decoded.", where=where)
    return image


def _unidentified(data: bytes, where: str) -> RowError:
    """Returns the error for bytes that Pillow does not take for an image."""
    head = data[:_SNIFFED_BYTES].lower()
    in_box, brand = data[4:8] == b"ftyp", data[8:12]
    is_svg = b"<svg" in head and b"<html" not in head
    if data.startswith(_WITHOUT_DECODER) or (in_box and brand in _HEIF_BRANDS) or is_svg:
        return RowError(ErrorCode.UNSUPPORTED, "No decoder for this format is installed.", where=where)
    is_webp = data.startswith(b"RIFF") and b"WEBP".startswith(brand)
    if data.startswith(_SIGNATURES) or is_webp or (in_box and brand in (b"avif", b"avis")):
        return RowError(ErrorCode.TRUNCATED, "The image's header ends early or is damaged.", where=where)
    return RowError(ErrorCode.NOT_AN_IMAGE, "The bytes are not those of a known image format.", where=where)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):  # convert() would clip these at 255, not scale them
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        top = 65535.0 if image.mode.startswith("I;16") or values.max(initial=0) > 255 else 255.0
        return Image.fromarray((values.clip(0, top) * (255.0 / top)).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def crop_pixels(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """Resizes the shorter side to the encoder's size and crops the centre.

    Args:
        image: The image, RGB.
        preprocessing: The encoder's preprocessing.

    Returns:
        [S, S, 3] uint8.
    """
    size = preprocessing.size_px
    width, height = image.size
    if width <= height:
        resized = (size, max(size, int(size * height / width)))
    else:
        resized = (max(size, int(size * width / height)), size)
    if math.prod(resized) > MAX_IMAGE_PIXELS:  # very long and narrow: cut off what the crop would cut off anyway
        image, resized = _middle_square(image), (size, size)
    if image.size != resized:
        image = image.resize(resized, Image.Resampling.BICUBIC)
    left, top = (_margin(side, size, preprocessing.crop_rounding) for side in resized)
    return np.array(image.crop((left, top, left + size, top + size)), dtype=np.uint8)


def _middle_square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    return image.crop((left, top, left + side, top + side))


def _margin(side: int, size: int, rounding: Literal["floor", "nearest"]) -> int:
    return (side - size) // 2 if rounding == "floor" else round((side - size) / 2.0)
