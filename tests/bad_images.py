"""Files that no image can be read from, each with the code of its error; and how images are made for tests."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from smallcap.errors import ErrorCode


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))


def bomb() -> bytes:
    """A 20,000 × 20,000 PNG of one bit per pixel: 50 kB that would decode to 1.2 GB of RGB."""
    return encode(Image.new("1", (20_000, 20_000)), "PNG")


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(b""))


def with_text_bomb(png: bytes) -> bytes:
    """A comment of 100 MB in 100 kB."""
    place = png.index(b"IDAT") - 4
    return png[:place] + png_chunk(b"zTXt", b"k\x00\x00" + zlib.compress(bytes(100_000_000))) + png[place:]


JPEG = encode(gradient(120, 80), "JPEG")
PNG = encode(gradient(120, 80), "PNG")
BAD_IMAGES = {
    "empty file": (b"", ErrorCode.EMPTY),
    "text renamed .jpg": (b"This is not an image, whatever its name says.", ErrorCode.NOT_AN_IMAGE),
    "HTML error page": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", ErrorCode.NOT_AN_IMAGE),
    "truncated JPEG": (JPEG[: len(JPEG) // 2], ErrorCode.TRUNCATED),
    "JPEG cut in its header": (JPEG[:20], ErrorCode.TRUNCATED),
    "truncated PNG": (PNG[: len(PNG) // 2], ErrorCode.TRUNCATED),
    "PNG with flipped bytes": (PNG[:60] + bytes(255 - b for b in PNG[60:90]) + PNG[90:], ErrorCode.TRUNCATED),
    "bomb": (bomb(), ErrorCode.TOO_LARGE),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', ErrorCode.UNSUPPORTED),
    "SVG after a document type": (
        b'<?xml version="1.0"?>\n<!-- drawn by hand -->\n<!DOCTYPE svg SYSTEM "svg11.dtd">\n<svg/>',
        ErrorCode.UNSUPPORTED,
    ),
    "HTML page with an SVG in it": (b"<!DOCTYPE html><HTML><body><svg></svg></body></html>", ErrorCode.NOT_AN_IMAGE),
    "error of an object store": (
        b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
        ErrorCode.NOT_AN_IMAGE,
    ),
    "pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", ErrorCode.NOT_AN_IMAGE),
    "EPS": (encode(gradient(20, 20), "EPS"), ErrorCode.UNSUPPORTED),
    "sound file": (b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(30), ErrorCode.NOT_AN_IMAGE),
    "video": (b"\x00\x00\x00\x18ftypmp42\x00\x00\x00\x00mp42isom", ErrorCode.NOT_AN_IMAGE),
    "WebP cut in its header": (encode(gradient(120, 80), "WEBP")[:10], ErrorCode.TRUNCATED),
    "truncated GIF": (encode(gradient(120, 80), "GIF")[:500], ErrorCode.TRUNCATED),
    "zeros": (bytes(1000), ErrorCode.NOT_AN_IMAGE),
    "PNG that says 2^31 by 2^31": (png_header(2**31 - 1, 2**31 - 1), ErrorCode.TOO_LARGE),
    "PNG without pixels": (png_header(0, 5), ErrorCode.TRUNCATED),
    "GIF with a screen of 65535²": (
        b"GIF89a" + b"\xff" * 4 + bytes(3) + b",\x00\x00\x00\x00\x01\x00\x01\x00\x00\x02;",
        ErrorCode.TOO_LARGE,
    ),
    "PNG with a bomb of text": (with_text_bomb(encode(gradient(120, 80), "PNG")), ErrorCode.TOO_LARGE),
}
