import struct
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from PIL import ImageOps
from PIL.PngImagePlugin import PngInfo

from smallcap.images.decode import decode_image, decode_scaled
from tests.bad_images import encode, gradient
from tests.image_files import exif_block, jpeg_with_exif, orientation_entry

UPRIGHT, TURNED = (48, 32), (32, 48)
BAD_RATIONAL = (struct.pack("<HHII", 0x11A, 10, 1, 38), struct.pack("<ii", -1, 0))  # 38: behind two entries
BAD_TAGS = {
    "a rational of -1/0": BAD_RATIONAL,
    "a resolution in words": (struct.pack("<HHI", 0x11A, 2, 4) + b"72\0\0", b""),
    "a type that is none": (struct.pack("<HHII", 0x11A, 99, 1, 0), b""),
    "a value far outside": (struct.pack("<HHII", 0x10F, 2, 400, 99_999), b""),
    "a huge count": (struct.pack("<HHII", 0x10F, 12, 2**32 - 1, 8), b""),
    "an EXIF directory outside": (struct.pack("<HHII", 0x8769, 4, 1, 99_999), b""),
    "a GPS directory in words": (struct.pack("<HHI", 0x8825, 2, 4) + b"GPS\0", b""),
}


def with_bad_tag(name: str) -> bytes:
    bad, tail = BAD_TAGS[name]
    return exif_block(*sorted([orientation_entry(6), bad], key=lambda entry: entry[:2]), tail=tail)


def sizes(data: bytes) -> tuple[tuple[int, int], tuple[int, int]]:
    """The upright sizes in exact and in fast mode."""
    scaled = decode_scaled(data, 16)
    return decode_image(data).size, (scaled.width, scaled.height)


def as_tiff(exif: bytes) -> bytes:
    """A TIFF with these tags besides its own."""
    tiff = encode(gradient(*UPRIGHT), "TIFF")
    (start,) = struct.unpack_from("<I", tiff, 4)
    (count,) = struct.unpack_from("<H", tiff, start)
    (more,) = struct.unpack_from("<H", exif, 14)
    places = [(tiff, start + 2 + 12 * n) for n in range(count)] + [(exif, 16 + 12 * n) for n in range(more)]
    entries = sorted((data[place : place + 12] for data, place in places), key=lambda e: struct.unpack("<H", e[:2]))
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return tiff[:4] + struct.pack("<I", len(tiff)) + tiff[8:] + directory


def as_avif(exif: bytes) -> bytes:
    """An AVIF with these bytes as EXIF, which Pillow itself would not write."""
    stand_in = b"Exif\0\0" + exif_block(tail=b"x" * (len(exif) - 20))[6:]
    avif = encode(gradient(*UPRIGHT), "AVIF", exif=stand_in)
    assert avif.count(stand_in[6:]) == 1
    return avif.replace(stand_in[6:], exif[6:])


CONTAINERS: dict[str, Callable[[bytes], bytes]] = {
    "JPEG": lambda exif: jpeg_with_exif(exif, *UPRIGHT),
    "PNG": lambda exif: encode(gradient(*UPRIGHT), "PNG", exif=exif),
    "WebP": lambda exif: encode(gradient(*UPRIGHT), "WEBP", exif=exif),
    "TIFF": as_tiff,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("container", "tag"), list(product(CONTAINERS, BAD_TAGS)))
def test_other_tags_do_not_matter(container: str, tag: str) -> None:
    assert sizes(CONTAINERS[container](with_bad_tag(tag))) == (TURNED, TURNED)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tag", BAD_TAGS)
def test_an_avif_stands_as_its_own_rotation_says_whatever_its_exif_holds(tag: str) -> None:
    assert sizes(as_avif(with_bad_tag(tag))) == (UPRIGHT, UPRIGHT)


@pytest.mark.parametrize(
    "entry",
    [
        struct.pack("<HHI", 0x112, 2, 2) + b"6\0\0\0",  # text, as an issue of the field had it
        struct.pack("<HHI", 0x112, 1, 1) + b"\6\0\0\0",  # BYTE
        struct.pack("<HHIf", 0x112, 11, 1, 6.0),
        orientation_entry(6, count=0),
        orientation_entry(6 | 6 << 16, count=2),
        orientation_entry(0),
        orientation_entry(9),
        orientation_entry(65535),
        orientation_entry(2**32 - 1, kind=4),
    ],
)
@pytest.mark.parametrize("container", CONTAINERS)
def test_other_values_and_types_mean_none(container: str, entry: bytes) -> None:
    assert sizes(CONTAINERS[container](exif_block(entry))) == (UPRIGHT, UPRIGHT)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0II", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0nothing here"]
)
def test_exif_that_cannot_be_read_means_none(exif: bytes) -> None:
    assert sizes(jpeg_with_exif(exif, *UPRIGHT)) == (UPRIGHT, UPRIGHT)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("value", range(1, 9))
def test_each_orientation_is_turned_as_pillow_turns_it(container: str, value: int) -> None:
    data = CONTAINERS[container](exif_block(orientation_entry(value, kind=4 if value % 2 else 3)))
    plain = decode_image(CONTAINERS[container](exif_block()))
    plain.getexif()[0x0112] = value
    assert np.array_equal(np.asarray(decode_image(data)), np.asarray(ImageOps.exif_transpose(plain)))
    assert sizes(data) == (decode_image(data).size,) * 2


@pytest.mark.parametrize("big_endian", [False, True])
def test_both_byte_orders(big_endian: bool) -> None:
    block = b"MM\0*" + struct.pack(">IHHHIHH", 8, 1, 0x112, 3, 1, 6, 0) + bytes(4)
    exif = b"Exif\0\0" + block if big_endian else exif_block(orientation_entry(6))
    assert sizes(jpeg_with_exif(exif, *UPRIGHT)) == (TURNED, TURNED)


def test_xmp_counts_where_exif_has_no_orientation() -> None:
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    assert sizes(encode(gradient(*UPRIGHT), "JPEG", xmp=xmp)) == (TURNED, TURNED)
    with_both = encode(gradient(*UPRIGHT), "JPEG", xmp=xmp, exif=exif_block(orientation_entry(1)))
    assert sizes(with_both) == (UPRIGHT, UPRIGHT)


def test_the_exif_of_imagemagicks_pngs_is_read() -> None:
    text = PngInfo()
    block = exif_block(orientation_entry(6))
    text.add_text("Raw profile type exif", f"\nexif\n{len(block):8}\n{block.hex()}\n", zip=True)
    assert sizes(encode(gradient(*UPRIGHT), "PNG", pnginfo=text)) == (TURNED, TURNED)
    broken = PngInfo()
    broken.add_text("Raw profile type exif", "\nexif\n8\nno hexadecimal\n")
    assert sizes(encode(gradient(*UPRIGHT), "PNG", pnginfo=broken)) == (UPRIGHT, UPRIGHT)


def test_an_orientation_behind_the_pixels_of_a_png_counts() -> None:
    png = encode(gradient(*UPRIGHT), "PNG", exif=exif_block(orientation_entry(6)))
    start = png.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(png[start : start + 4], "big")
    last = png.index(b"IEND") - 4
    assert sizes(png[:start] + png[end:last] + png[start:end] + png[last:]) == (TURNED, TURNED)
