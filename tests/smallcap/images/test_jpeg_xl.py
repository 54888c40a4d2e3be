import struct

import pytest

from smallcap.images.jpeg_xl import BARE, CONTAINER, declared_size

# The first bytes of files that libjxl wrote, and the sizes that it was given.
WRITTEN = {
    "ff0a03070013080100": (24, 16),
    "ff0a31070013080100": (300, 200),
    "ff0a0080cec7001308": (1000, 1),
    "ff0afa7c00c2001308": (17, 4000),
    "ff0af8be0100130801": (640, 480),
    "ff0aba211d00130801": (1920, 1080),
    "ff0a3c192120296e04": (9000, 9000),
}


def head(height: int, width: int, selector: int = 3) -> bytes:
    """A bare codestream's size: each side after the number of the form that it takes."""
    widths = (9, 13, 18, 30)
    bits = place = 0
    for value, length in ((0, 1), (selector, 2), (height - 1, widths[selector]), (0, 3), (selector, 2)):
        bits |= value << place
        place += length
    bits |= (width - 1) << place
    return BARE + bits.to_bytes(20, "little")


@pytest.mark.parametrize("start", WRITTEN)
def test_the_size_that_libjxl_writes_is_read(start: str) -> None:
    assert declared_size(bytes.fromhex(start) + bytes(20)) == WRITTEN[start]


@pytest.mark.parametrize(("selector", "size"), [(0, (512, 1)), (1, (8000, 3)), (2, (200_000, 7)), (3, (2**30, 2**30))])
def test_every_form_of_a_side_is_read(selector: int, size: tuple[int, int]) -> None:
    assert declared_size(head(size[1], size[0], selector)) == size


def test_a_side_in_eighths_and_a_ratio_are_read() -> None:
    assert declared_size(BARE + (1 | 31 << 1 | 5 << 6).to_bytes(8, "little")) == (455, 256)  # 16:9


@pytest.mark.parametrize("kind", [b"jxlc", b"jxlp"])
def test_the_codestream_is_found_behind_other_boxes(kind: bytes) -> None:
    stream = bytes(4 if kind == b"jxlp" else 0) + head(30, 40)
    other = struct.pack(">I4s", 20, b"Exif") + b"jxlc" + bytes(8)
    long_form = struct.pack(">I4sQ", 1, kind, 16 + len(stream)) + stream
    for box in (struct.pack(">I4s", 8 + len(stream), kind) + stream, long_form):
        assert declared_size(CONTAINER + other + box) == (40, 30)


@pytest.mark.parametrize("data", [CONTAINER, CONTAINER + bytes(40), CONTAINER + b"\0\0\0\x10jxlc" + bytes(8)])
def test_a_container_without_a_codestream_has_no_size(data: bytes) -> None:
    assert declared_size(data) is None
