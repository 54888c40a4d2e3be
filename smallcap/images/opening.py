"""Opens image files: tells their format, refuses what has no decoder, and bounds what is decoded before it is.

Pillow checks the size of each image that it opens, and of what lies inside of ICNS, ICO, GIF, MIC and TIFF, against a
limit that is global. It is set here to the caller's.
"""

from __future__ import annotations

import functools
import importlib
import io
import re
import warnings
from collections.abc import Callable
from typing import NoReturn

import simplejpeg
from PIL import AvifImagePlugin, Image, UnidentifiedImageError

from smallcap.errors import ErrorCode, RowError
from smallcap.images import jpeg_xl
from smallcap.images.decoding_room import bytes_per_pixel
from smallcap.images.kinds import AVIF_BRANDS, HEIF_BRANDS, MAX_IMAGE_BYTES
from smallcap.images.tiff_directory import without_stray_values

Reserve = Callable[[int, int, int], None]
"""Makes room for decoding an image of this width and height in px with so many bytes for a pixel, or raises."""

MAX_IMAGE_PIXELS = 100_000_000
_MAX_SCANS = 200  # of a progressive JPEG; each is a pass over all pixels, and cameras and encoders write at most 20
_SHARE_IN_PYTHON = 4  # decoders written in Python take about a second for a million pixels

_FORMATS = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG": "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\x00": "TIFF",
    b"MM\x00*": "TIFF",
    b"II+\x00": "TIFF",
    b"MM\x00+": "TIFF",
    b"\x00\x00\x01\x00": "ICO",
    b"icns": "ICNS",
    b"8BPS": "PSD",
    b"\xff\x4f\xff\x51": "JPEG2000",
    b"\x00\x00\x00\x0cjP  ": "JPEG2000",
    b"DDS ": "DDS",
    b"qoif": "QOI",
}
_EXIF_START = re.compile(rb"(?:II\*\0\x08\0\0\0|MM\0\*\0\0\0\x08)..", re.DOTALL)  # with the number of its tags
_JPEG_XL_BYTES = 24  # for a pixel, as `bytes_per_pixel` counts them, if it is RGB
_OPTIONAL = {"HEIF": "pillow_heif", "JXL": "pillow_jxl"}
# Pillow knows these by name, but would run Ghostscript on them, or has no decoder for them.
_NEVER_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
_SNIFFED_BYTES = 2048  # an SVG's own tag comes after comments and a document type
# How Pillow's plugins and libheif word what they have no code for, and what exceeds a bound of theirs.
_WITHOUT_CODE = (
    *("unsupported", "not supported", "not yet supported", "cannot handle", "unknown pixel mode"),
    *("unable to determine", "unrecognized image mode", "unknown raw mode", "not available", "not installed"),
)
_BEYOND_A_BOUND = ("decompression bomb", "security limit exceeded", "decompressed data too large")


def open_image(data: bytes, max_pixels: int, where: str, reserve: Reserve = lambda *_: None) -> Image.Image:
    """Opens an image file whose pixels may be decoded.

    Args:
        data: The file's bytes.
        max_pixels: The most pixels of the image, and of anything inside of it.
        where: The image's URI, for messages.
        reserve: Called before anything is decoded.

    Raises:
        RowError: `empty`, `not_an_image`, `truncated`, `too_large` or `unsupported`.
    """
    if not data:
        raise RowError(ErrorCode.EMPTY, "The file is empty.", where=where)
    if len(data) > MAX_IMAGE_BYTES:
        what = f"The file has {len(data):,} bytes; at most {MAX_IMAGE_BYTES:,} are decoded."
        raise RowError(ErrorCode.TOO_LARGE, what, where=where)
    _prepare_pillow()
    Image.MAX_IMAGE_PIXELS = max_pixels / 2  # type: ignore[assignment] # Pillow raises beyond twice its value
    format_name = _format_of(data)
    if format_name in _OPTIONAL:
        _check_optional(format_name, data, max_pixels, where, reserve)
    try:
        image = _open_by_pillow(data, format_name)
    except UnidentifiedImageError:
        _raise_unidentified(data, format_name, where)
    except Exception as error:  # the plugin of a format can raise nearly anything for a damaged header
        raise damaged(error, "The image's header is damaged", where) from error
    if image.format in _NEVER_DECODED:
        raise RowError(ErrorCode.UNSUPPORTED, f"Images in the format {image.format} are not decoded.", where=where)
    _check_work(image, data, max_pixels, where)
    if format_name != "JXL":  # that was decoded when it was opened
        reserve(image.width, image.height, bytes_per_pixel(image))
    return image


def damaged(error: Exception, what: str, where: str) -> RowError:
    """Returns the row's error for whatever a decoder raised.

    Args:
        error: What it raised.
        what: What is wrong with the file, if nothing else is known.
        where: The image's URI.
    """
    text = str(error).lower()
    if isinstance(error, MemoryError):
        what = "Decoding the image takes more memory than there is"
        code = ErrorCode.TOO_LARGE
    elif isinstance(error, Image.DecompressionBombError) and (pixels := re.search(r"\d+", text)):
        return too_many_pixels(int(pixels[0]), int(2 * (Image.MAX_IMAGE_PIXELS or 0)), where)
    elif any(words in text for words in _BEYOND_A_BOUND):
        what = "What lies in the image file is too large"
        code = ErrorCode.TOO_LARGE
    elif _lacks_code(error):
        what = "The decoder does not know this kind of pixels or compression"
        code = ErrorCode.UNSUPPORTED
    else:
        code = ErrorCode.TRUNCATED
    return RowError(code, f"{what}: {error or type(error).__name__}", where=where)


def _lacks_code(error: Exception) -> bool:
    # Pillow's plugins look modes and compressions up in dicts; a KeyError means that theirs is not there.
    text = str(error).lower()
    known_missing = isinstance(error, NotImplementedError) or isinstance(error.__cause__, KeyError)
    return known_missing or any(words in text for words in _WITHOUT_CODE)


def too_many_pixels(pixels: int, max_pixels: int, where: str) -> RowError:
    """Returns the error of an image of `pixels`, or of a file with such an image in it."""
    return RowError(
        ErrorCode.TOO_LARGE,
        f"The image has {pixels:,} pixels; at most {max_pixels:,} are decoded.",
        where=where,
        remedy="Raise input.max_image_pixels, and mind the memory of the decoding tasks.",
    )


@functools.cache
def _prepare_pillow() -> None:
    # One damaged file may cause 65,535 warnings, and an image of more than half the limit causes one.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    # A decoding task has one CPU.
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1


def _check_work(image: Image.Image, data: bytes, max_pixels: int, where: str) -> None:
    """Refuses what would take too much memory or time to decode."""
    pixels = image.width * image.height
    tiles = getattr(image, "tile", [])
    if tiles and tiles[0][0] in Image.DECODERS and pixels > max_pixels // _SHARE_IN_PYTHON:
        raise too_many_pixels(pixels, max_pixels // _SHARE_IN_PYTHON, where)
    if image.format not in ("JPEG", "MPO"):
        return
    if image.info.get("progressive") and data.count(b"\xff\xda") > _MAX_SCANS:
        what = f"The JPEG has more than {_MAX_SCANS} scans, each a pass over its pixels."
        raise RowError(ErrorCode.TOO_LARGE, what, where=where)
    try:
        height, width = simplejpeg.decode_jpeg_header(data, strict=False)[:2]
    except (KeyError, ValueError):  # simplejpeg does not know all kinds of JPEG
        return
    if width * height > max_pixels:
        raise too_many_pixels(width * height, max_pixels, where)


def _open_by_pillow(data: bytes, format_name: str) -> Image.Image:
    if format_name == "TIFF":
        data = without_stray_values(data)
    formats = [format_name] if format_name in _OPTIONAL else None  # others are told apart by Pillow
    try:
        return Image.open(io.BytesIO(data), formats=formats)
    except Exception:
        if format_name != "AVIF":
            raise
        # Pillow writes an AVIF's EXIF anew, and fails at malformed tags. The format's own rotation is what counts.
        return Image.open(io.BytesIO(_EXIF_START.sub(lambda start: start[0][:8] + b"\0\0", data)), formats=["AVIF"])


def _format_of(data: bytes) -> str:
    """Returns Pillow's name of the format that a file's first bytes tell; empty for rarer ones."""
    if data.startswith((jpeg_xl.BARE, jpeg_xl.CONTAINER)):
        return "JXL"
    if data[4:8] == b"ftyp":
        brands = data[8 : min(int.from_bytes(data[:4], "big"), _SNIFFED_BYTES)]
        if any(brand in brands for brand in AVIF_BRANDS):
            return "AVIF"
        return "HEIF" if data[8:12] in HEIF_BRANDS else ""
    if data.startswith(b"RIFF") and b"WEBP".startswith(data[8:12]):
        return "WEBP"
    return next((name for signature, name in _FORMATS.items() if data.startswith(signature)), "")


def _check_optional(format_name: str, data: bytes, max_pixels: int, where: str, reserve: Reserve) -> None:
    if not _plugin_is_there(format_name):
        known_as = {"HEIF": "HEIC", "JXL": "JPEG XL"}[format_name]
        raise RowError(
            ErrorCode.UNSUPPORTED,
            f"No decoder for {known_as} is installed.",
            where=where,
            remedy="pip install 'smallcap[formats]' on every node",
        )
    if format_name == "JXL":
        size = jpeg_xl.declared_size(data)
        if size is not None and size[0] * size[1] > max_pixels:
            raise too_many_pixels(size[0] * size[1], max_pixels, where)
        if size is not None:
            reserve(*size, _JPEG_XL_BYTES)


@functools.cache
def _plugin_is_there(format_name: str) -> bool:
    """Registers the plugin of a format with Pillow."""
    try:
        plugin = importlib.import_module(_OPTIONAL[format_name])
    except ImportError:
        return False
    if format_name == "HEIF":
        plugin.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False, decode_threads=1)
    else:
        plugin.JpegXLImagePlugin.DECODE_THREADS = 0  # in the thread that calls
    return True


def _raise_unidentified(data: bytes, format_name: str, where: str) -> NoReturn:
    """Raises the error for bytes that no plugin of Pillow takes for an image."""
    head = data[:_SNIFFED_BYTES].lower()
    if data.startswith(b"%PDF") or (b"<svg" in head and b"<html" not in head):
        raise RowError(ErrorCode.UNSUPPORTED, "Vector graphics and documents are not decoded.", where=where)
    if not format_name:
        raise RowError(ErrorCode.NOT_AN_IMAGE, "The bytes are not those of a known image format.", where=where)
    what = "The image's header ends early or is damaged"
    try:
        Image.OPEN[format_name][0](io.BytesIO(data), "")
    except Exception as error:  # why the plugin refused it, which Image.open() does not say
        raise damaged(error, what, where) from error
    raise RowError(ErrorCode.TRUNCATED, f"{what}.", where=where)
