"""Whole image files of every format that Pillow or the optional plugins write here, small, with metadata."""

import functools
import struct
from importlib import import_module
from importlib.util import find_spec

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.bad_images import encode, gradient

SIZE = (24, 16)


def exif_block(*entries: bytes, tail: bytes = b"") -> bytes:
    """EXIF of these entries of 12 bytes, and of what lies behind them."""
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + bytes(4) + tail


def orientation_entry(value: int, kind: int = 3, count: int = 1) -> bytes:
    return struct.pack("<HHI", 0x0112, kind, count) + struct.pack("<I", value)


def jpeg_with_exif(exif: bytes, width: int = 48, height: int = 32) -> bytes:
    """A JPEG with EXIF that Pillow would not write."""
    jpeg = encode(gradient(width, height), "JPEG", quality=95)
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]


def icon(kind: bytes, content: bytes) -> bytes:
    """An ICNS of one image; the kind says its size."""
    entry = kind + struct.pack(">I", len(content) + 8) + content
    return b"icns" + struct.pack(">I", len(entry) + 8) + entry


def photoshop(mode: int = 3, channels: int = 3) -> bytes:
    """A PSD without layers."""
    header = b"8BPS" + struct.pack(">H6xHIIHH", 1, channels, SIZE[1], SIZE[0], 8, mode)
    return header + bytes(12) + bytes(2) + bytes(range(128)) * (SIZE[0] * SIZE[1] * channels // 128)


@functools.cache
def whole_files() -> dict[str, bytes]:
    """Each file by its format and kind."""
    image, exif = gradient(*SIZE), exif_block(orientation_entry(6))
    text = PngInfo()
    text.add_text("Comment", "a gradient", zip=True)
    grey16 = Image.fromarray(np.arange(SIZE[0] * SIZE[1], dtype=np.uint16).reshape(SIZE[::-1]) * 100)
    files = {
        "JPEG": encode(image, "JPEG", exif=exif),
        "JPEG progressive": encode(image, "JPEG", progressive=True),
        "JPEG CMYK": encode(image.convert("CMYK"), "JPEG"),
        "MPO": _of_two_frames("MPO"),
        "PNG": encode(image, "PNG", exif=exif, pnginfo=text),
        "PNG palette": encode(image.quantize(16), "PNG", transparency=0),
        "PNG 16 bits": encode(grey16, "PNG"),
        "APNG": _of_two_frames("PNG"),
        "GIF": _of_two_frames("GIF"),
        "WEBP": encode(image, "WEBP", exif=exif),
        "WEBP animated": _of_two_frames("WEBP", lossless=True),
        "BMP": encode(image, "BMP"),
        "ICO": encode(image, "ICO", sizes=[(16, 16), SIZE]),
        "ICO bitmap": encode(image, "ICO", sizes=[SIZE], bitmap_format="bmp"),
        "ICNS": icon(b"icp4", encode(image.resize((16, 16)), "PNG")),
        "TIFF": encode(image, "TIFF", exif=exif),
        "TIFF big": encode(image, "TIFF", big_tiff=True),
        "TIFF LZW": _of_two_frames("TIFF", compression="tiff_lzw"),
        "TIFF JPEG": encode(image, "TIFF", compression="jpeg"),
        "TIFF float": encode(grey16.convert("F"), "TIFF"),
        "TIFF 16 bits": encode(grey16, "TIFF"),
        "PSD": photoshop(),
        "JPEG2000": encode(image, "JPEG2000"),
        "JPEG2000 bare": encode(image, "JPEG2000", no_jp2=True),
        "PPM": encode(image, "PPM"),
        "TGA": encode(image, "TGA", compression="tga_rle"),
        "PCX": encode(image, "PCX"),
        "SGI": encode(image, "SGI"),
        "DDS": encode(image, "DDS"),
        "QOI": encode(image, "QOI"),
        "AVIF": encode(image, "AVIF", exif=exif),
    }
    if find_spec("pillow_heif"):
        import_module("pillow_heif").register_heif_opener()
        files["HEIF"] = encode(image, "HEIF", exif=exif)
    if find_spec("pillow_jxl"):
        import_module("pillow_jxl")
        files["JXL"] = encode(image, "JXL", exif=exif)
    return files


def _of_two_frames(kind: str, **options: object) -> bytes:
    first = gradient(*SIZE)
    return encode(first, kind, save_all=True, append_images=[first.transpose(Image.Transpose.ROTATE_180)], **options)
