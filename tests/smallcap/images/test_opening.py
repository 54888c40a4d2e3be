"""What is refused before it is decoded, in every container, and what a decoder that is not there is called."""

import importlib
import struct
import zlib
from importlib.util import find_spec

import pytest
from PIL import Image

from smallcap.errors import ErrorCode, RowError
from smallcap.images import opening
from smallcap.images.decode import decode_image, decode_scaled
from smallcap.images.opening import damaged
from tests.bad_images import encode, gradient, png_chunk, png_header
from tests.image_files import icon, photoshop, whole_files

SIDE = 400
LIMIT = SIDE * SIDE - 1
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def refusal(data: bytes, max_pixels: int = LIMIT) -> RowError:
    """The error of a file, which is the same in both modes."""
    errors = []
    for decode in (decode_image, lambda *args: decode_scaled(args[0], 8, args[1])):
        with pytest.raises(RowError) as caught:
            decode(data, max_pixels)
        errors.append(caught.value)
    assert str(errors[0]) == str(errors[1])
    return errors[0]


def ico_of(content: bytes) -> bytes:
    """An ICO whose directory says 16 by 16."""
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(content), 22) + content


def large_files() -> dict[str, bytes]:
    image = Image.new("RGB", (SIDE, SIDE), (1, 2, 3))
    kinds = ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "JPEG2000", "PPM", "TGA", "PCX", "SGI", "DDS", "AVIF"]
    files = {kind: encode(image, kind) for kind in kinds}
    small = gradient(16, 16)
    files["MPO"] = encode(image, "MPO", save_all=True, append_images=[small])
    files["ICNS with a PNG"] = icon(b"icp4", encode(image, "PNG"))
    files["ICNS with a JPEG 2000"] = icon(b"ic08", encode(image, "JPEG2000"))
    files["ICO with a PNG"] = ico_of(encode(image, "PNG"))
    files["ICO with a bitmap"] = ico_of(encode(image, "BMP")[14:])
    files["PSD"] = photoshop()[:14] + struct.pack(">II", SIDE, SIDE) + photoshop()[22:]
    gif = encode(small, "GIF")
    at = gif.index(b",\0\0\0\0") + 5  # the first frame reaches beyond the screen
    files["GIF frame"] = gif[:at] + struct.pack("<HH", SIDE, SIDE) + gif[at + 4 :]
    files["WebP canvas"] = canvas(SIDE)
    return files


def canvas(side: int) -> bytes:
    """An animated WebP with a screen of this size."""
    webp = encode(gradient(16, 16), "WEBP", save_all=True, append_images=[gradient(16, 16).rotate(90)])
    return webp[:24] + (side - 1).to_bytes(3, "little") * 2 + webp[30:]


LARGE = large_files()


@pytest.mark.parametrize("name", LARGE)
def test_too_many_pixels_are_refused_wherever_they_lie(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    new = Image.core.new
    monkeypatch.setattr(Image.core, "new", lambda mode, size: made.append(size) or new(mode, size))
    error = refusal(LARGE[name])
    assert error.code == ErrorCode.TOO_LARGE
    assert f"{SIDE * SIDE:,} pixels; at most {LIMIT:,}" in str(error)
    assert "input.max_image_pixels" in error.remedy
    assert (SIDE, SIDE) not in made  # no pixels were made room for


# Not whole files, one whose decoder is written in Python, and one of which the lower half is a mask.
WHOLE = [name for name in LARGE if name not in ("GIF frame", "PSD", "WebP canvas", "DDS", "ICO with a bitmap")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WHOLE)
def test_images_up_to_the_limit_are_read(name: str) -> None:
    if name.startswith("ICNS"):  # Pillow refuses icons of another size than their kind's, once decoded
        assert refusal(LARGE[name], LIMIT + 1).code == ErrorCode.TRUNCATED
    else:
        assert decode_image(LARGE[name], LIMIT + 1).size == (SIDE, SIDE)


def test_a_file_of_too_many_bytes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "MAX_IMAGE_BYTES", 1000)
    error = refusal(encode(gradient(64, 64), "BMP"), 10**8)
    assert error.code == ErrorCode.TOO_LARGE
    assert "at most 1,000" in str(error)


def test_decoders_written_in_python_have_a_lower_limit() -> None:
    qoi = encode(Image.new("RGB", (200, 200)), "QOI")
    assert decode_image(qoi, 160_000).size == (200, 200)
    assert "40,000 pixels; at most 39,999" in str(refusal(qoi, 159_999))


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    jpeg = encode(gradient(64, 64), "JPEG", progressive=True)
    start = jpeg.rindex(b"\xff\xda")
    many = jpeg[:start] + jpeg[start:-2] * 300 + jpeg[-2:]
    assert refusal(many).code == ErrorCode.TOO_LARGE
    assert decode_image(jpeg[:start] + jpeg[start:-2] * 3 + jpeg[-2:]).size == (64, 64)


def test_a_jpeg_2000_that_contradicts_itself_is_not_decoded() -> None:
    jpeg = encode(Image.new("L", (SIDE, SIDE)), "JPEG2000")
    lying = jpeg.replace(b"ihdr" + struct.pack(">II", SIDE, SIDE), b"ihdr" + struct.pack(">II", 8, 8))
    assert lying != jpeg
    assert refusal(lying).code == ErrorCode.TRUNCATED


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("value", [0, 1, 2**16 - 1, 2**31, 2**32 - 1])
@pytest.mark.parametrize("tag", [257, 273, 278, 279])  # length, strips' offsets, rows of a strip, strips' bytes
def test_a_tiff_whose_strips_lie_is_an_error_or_its_pixels(tag: int, value: int) -> None:
    for compression in ("raw", "tiff_lzw", "jpeg"):
        tiff = encode(gradient(24, 16), "TIFF", compression=compression)
        (start,) = struct.unpack_from("<I", tiff, 4)
        (count,) = struct.unpack_from("<H", tiff, start)
        places = [start + 2 + 12 * number for number in range(count)]
        (place,) = (place for place in places if struct.unpack_from("<H", tiff, place) == (tag,))
        lying = tiff[: place + 2] + struct.pack("<HII", 4, 1, value) + tiff[place + 12 :]
        try:
            assert decode_image(lying, 10**6).size[0] == 24
        except RowError as error:
            assert error.code in (ErrorCode.TRUNCATED, ErrorCode.TOO_LARGE)


def test_pixel_types_without_a_decoder_are_unsupported() -> None:
    tiff = encode(Image.new("F", (16, 16)), "TIFF")
    (start,) = struct.unpack_from("<I", tiff, 4)
    bits = tiff.index(struct.pack("<HHI", 258, 3, 1), start)
    floats_of_64_bits = tiff[: bits + 8] + struct.pack("<I", 64) + tiff[bits + 12 :]
    unknown = tiff.replace(struct.pack("<HHIHH", 259, 3, 1, 1, 0), struct.pack("<HHIHH", 259, 3, 1, 60_000, 0))
    jpeg = encode(gradient(16, 16), "JPEG")
    frame = jpeg.index(b"\xff\xc0")
    for data in (
        floats_of_64_bits,
        unknown,
        photoshop(mode=13),
        jpeg[: frame + 4] + b"\x0c" + jpeg[frame + 5 :],  # 12 bits
        b"II\xbc\x01" + tiff[4:],  # JPEG XR
    ):
        error = refusal(data)
        assert error.code in (ErrorCode.UNSUPPORTED, ErrorCode.NOT_AN_IMAGE), error


def test_memory_that_is_not_there_is_the_images_error() -> None:
    assert damaged(MemoryError(), "", "a.tif").code == ErrorCode.TOO_LARGE


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic", "HEIC"),
        (b"\x00\x00\x00\x18ftypmif1\x00\x00\x00\x00mif1heic", "HEIC"),
        (b"\x00\x00\x00\x0cJXL \r\n\x87\n" + bytes(40), "JPEG XL"),
        (b"\xff\x0a" + bytes(40), "JPEG XL"),
    ],
)
def test_a_format_without_its_decoder_names_the_extra(data: bytes, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    opening._plugin_is_there.cache_clear()
    error = refusal(data)
    opening._plugin_is_there.cache_clear()
    assert error.code == ErrorCode.UNSUPPORTED
    assert name in str(error)
    assert "smallcap[formats]" in error.remedy


@pytest.mark.skipif(not find_spec("pillow_heif"), reason="needs smallcap[formats]")
def test_heic_is_read_and_bounded() -> None:
    heic = whole_files()["HEIF"]
    image = decode_image(heic)
    assert image.size == (16, 24)  # turned by the file's own rotation, once
    assert refusal(heic, 300).code == ErrorCode.TOO_LARGE
    large = encode(Image.new("RGB", (SIDE, SIDE)), "HEIF")
    sides = b"ispe\0\0\0\0" + struct.pack(">II", SIDE, SIDE)
    lying = large.replace(sides, b"ispe\0\0\0\0" + struct.pack(">II", 64, 64))
    assert lying != large
    assert refusal(lying).code == ErrorCode.TOO_LARGE


@pytest.mark.skipif(not find_spec("pillow_jxl"), reason="needs smallcap[formats]")
def test_jpeg_xl_is_read_and_bounded() -> None:
    jxl = whole_files()["JXL"]
    assert decode_image(jxl).size == (24, 16)
    assert refusal(jxl, 300).code == ErrorCode.TOO_LARGE


def test_a_png_that_says_more_than_it_holds_is_no_bomb() -> None:
    assert refusal(png_header(SIDE, SIDE)).code == ErrorCode.TOO_LARGE
    short = PNG_SIGNATURE + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    endless = short + png_chunk(b"IDAT", zlib.compress(bytes(10**7))) + png_chunk(b"IEND", b"")
    assert decode_image(endless).size == (8, 8)
