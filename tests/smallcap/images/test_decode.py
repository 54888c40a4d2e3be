import io
import struct
import zlib
from functools import partial

import numpy as np
import pytest
from PIL import Image

from smallcap.errors import ErrorCode, RowError
from smallcap.images.decode import Preprocessing, crop_pixels, decode_image, decode_scaled


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
    "JPEG XL": (b"\x00\x00\x00\x0cJXL \r\n\x87\n" + bytes(40), ErrorCode.UNSUPPORTED),
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
    "PNG with a bomb of text": (with_text_bomb(encode(gradient(120, 80), "PNG")), ErrorCode.TRUNCATED),
    "HEIC": (b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic", ErrorCode.UNSUPPORTED),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_is_a_row_error_with_its_code(name: str) -> None:
    data, code = BAD_IMAGES[name]
    for decode in (decode_image, partial(decode_scaled, least_px=10)):
        with pytest.raises(RowError) as caught:
            decode(data, where="s3://bucket/bad.jpg")
        assert caught.value.code == code
        assert "s3://bucket/bad.jpg" in str(caught.value)


def test_cmyk_becomes_rgb() -> None:
    image = decode_image(encode(gradient(64, 64).convert("CMYK"), "JPEG", quality=95))
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image, int) - np.asarray(gradient(64, 64), int)).mean() < 12


def test_sixteen_bit_png_is_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    pixels = np.asarray(decode_image(encode(Image.fromarray(ramp), "PNG")))
    assert pixels.shape == (64, 64, 3)
    assert np.abs(pixels[:, :, 0].astype(int) - (ramp / 257).astype(int)).max() <= 1


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    red, blue = Image.new("RGB", (32, 32), (255, 0, 0)), Image.new("RGB", (32, 32), (0, 0, 255))
    image = decode_image(encode(red, kind, save_all=True, append_images=[blue]))
    assert np.abs(np.subtract(image.getpixel((16, 16)), (255, 0, 0))).max() < 3


def test_values_that_are_no_numbers_are_black() -> None:
    image = decode_image(encode(Image.fromarray(np.full((8, 8), np.nan, np.float32)), "TIFF"))
    assert image.getpixel((4, 4)) == (0, 0, 0)


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_exif_rotation_is_applied(orientation: int) -> None:
    upright = gradient(600, 400)
    turned = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(upright.transpose(turned[orientation]), "JPEG", quality=95, exif=exif)
    image = decode_image(data)
    assert image.size == upright.size
    assert np.abs(np.asarray(image, int) - np.asarray(upright, int)).mean() < 4
    scaled = decode_scaled(data, 100)
    assert (scaled.width, scaled.height) == upright.size
    assert scaled.image.size == (150, 100)
    assert np.abs(np.asarray(scaled.image, int) - np.asarray(upright.resize((150, 100)), int)).mean() < 4


def test_scaled_decoding_keeps_the_encoders_pixels() -> None:
    photo = gradient(1000, 800)
    for image in (photo, photo.convert("L")):
        scaled = decode_scaled(encode(image, "JPEG", quality=95), 224)
        assert not scaled.by_pillow
        assert min(scaled.image.size) >= 224
        assert max(scaled.image.size) < 400
        assert (scaled.width, scaled.height) == photo.size
        exact = crop_pixels(image.convert("RGB"), Preprocessing(224)).astype(int)
        assert np.abs(crop_pixels(scaled.image, Preprocessing(224)) - exact).mean() < 3


def test_what_only_pillow_decodes_is_left_to_it() -> None:
    for data in (PNG, encode(gradient(64, 64).convert("CMYK"), "JPEG", quality=95)):
        scaled = decode_scaled(data, 10)
        assert scaled.by_pillow
        assert np.array_equal(np.asarray(scaled.image), np.asarray(decode_image(data)))


def test_a_palette_with_transparency_and_a_grey_image_are_rgb() -> None:
    palette = gradient(40, 40).quantize(16)
    assert decode_image(encode(palette, "PNG", transparency=0)).mode == "RGB"
    assert decode_image(encode(gradient(40, 40).convert("LA"), "PNG")).mode == "RGB"


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (3, 50_000), (224, 224), (225, 224), (640, 427)])
def test_every_size_is_cropped_to_the_encoders(size: tuple[int, int]) -> None:
    pixels = crop_pixels(Image.new("RGB", size, (10, 20, 30)), Preprocessing(224))
    assert pixels.shape == (224, 224, 3)
    assert pixels.dtype == np.uint8
    assert (pixels == (10, 20, 30)).all()


@pytest.mark.parametrize("size", [(150, 200), (201, 150), (640, 427), (427, 640), (224, 224), (500, 333)])
def test_crops_are_those_of_transformers_clip(size: tuple[int, int]) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    image = gradient(*size)
    theirs = CLIPImageProcessorPil(do_normalize=False, do_rescale=False)(image, return_tensors="np")["pixel_values"][0]
    assert np.array_equal(crop_pixels(image, Preprocessing(224)), theirs.transpose(1, 2, 0).astype(np.uint8))


@pytest.mark.parametrize("size", [(150, 200), (201, 150), (640, 427), (427, 640), (500, 333), (337, 229)])
def test_crops_are_those_of_open_clip(size: tuple[int, int]) -> None:
    from open_clip.transform import image_transform

    image = gradient(*size)
    theirs = image_transform(224, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))(image)  # [3, S, S], 0 to 1
    expected = (theirs.numpy().transpose(1, 2, 0) * 255).round().astype(np.uint8)
    assert np.array_equal(crop_pixels(image, Preprocessing(224, crop_rounding="nearest")), expected)


def test_the_pixel_limit_is_the_callers() -> None:
    decode_image(PNG, max_pixels=120 * 80)
    with pytest.raises(RowError, match="120 × 80"):
        decode_image(PNG, max_pixels=120 * 80 - 1)
