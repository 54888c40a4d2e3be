import struct

import numpy as np
import pytest

from smallcap.images.decode import decode_image
from smallcap.images.tiff_directory import byte_order, entries, without_stray_values
from tests.bad_images import encode, gradient


@pytest.mark.parametrize("is_big", [False, True])
def test_the_tags_of_a_directory_are_those_that_pillow_wrote(is_big: bool) -> None:
    tiff = encode(gradient(24, 16), "TIFF", big_tiff=is_big)
    tags = {entry.tag: entry for entry in entries(tiff)}
    assert {256, 257, 258, 259, 262, 273, 277, 278, 279} <= set(tags)
    assert int.from_bytes(tags[256].value, "little") == 24
    assert tags[258].number == 3


@pytest.mark.parametrize(
    "block",
    [b"", b"II", b"PK\x03\x04", b"II*\0\xff\xff\xff\xff", b"MM\0+" + b"\xff" * 12, b"II*\0\x08\0\0\0\xff\xff" * 2],
)
def test_what_is_no_directory_has_no_tags_or_as_many_as_are_there(block: bytes) -> None:
    assert len(list(entries(block))) <= 1
    assert without_stray_values(block) == block


def test_a_file_with_all_its_values_is_left_as_it_is() -> None:
    tiff = encode(gradient(24, 16), "TIFF")
    assert without_stray_values(tiff) is tiff
    assert byte_order(tiff) == "<"


@pytest.mark.parametrize("options", [{}, {"big_tiff": True}, {"compression": "tiff_lzw"}, {"compression": "jpeg"}])
def test_a_tag_whose_value_is_missing_hides_no_other(options: dict[str, object]) -> None:
    whole = encode(gradient(24, 16), "TIFF", description="a gradient of 24 by 16", **options)
    (entry,) = (entry for entry in entries(whole) if entry.tag == 270)
    at = entry.place + (12 if len(entry.value) > 4 else 8)
    stray = whole[:at] + struct.pack("<I", 10**6) + whole[at + 4 :]
    assert np.array_equal(np.asarray(decode_image(stray)), np.asarray(decode_image(whole)))
