"""Damaged and lying image files: whatever their bytes say, they are pixels or a row's error, in both modes alike."""

import resource
import zlib
from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from smallcap.errors import ErrorCode, RowError
from smallcap.images.decode import decode_image, decode_scaled
from tests.image_files import SIZE, whole_files

FILES = whole_files()
CASES = 20_000
MAX_PIXELS = 1_000_000
MAX_MORE_BYTES = 512 << 20
CODES = {ErrorCode.EMPTY, ErrorCode.NOT_AN_IMAGE, ErrorCode.TRUNCATED, ErrorCode.TOO_LARGE, ErrorCode.UNSUPPORTED}
TELLING = [
    b"\0",
    b"\1",
    b"\2",
    b"\6",
    b"\x7f",
    b"\x80",
    b"\xff",
    b"\0\0",
    b"\xff\xff",
    b"\0\0\0\0",
    b"\xff\xff\xff\xff",
]
TELLING += [b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\x40\0", b"\0\x40\0\0", b"Exif", b"II*\0", b"MM\0*"]


@st.composite
def mutated(draw: st.DrawFn, name: str) -> bytes:
    """A file of this name with one to four changes, most of them in its headers."""
    data = bytearray(FILES[name])
    for _ in range(draw(st.integers(1, 4))):
        end = draw(st.sampled_from([64, 256, 1024, len(data)]))
        last = max(0, min(end, len(data)) - 1)
        place = draw(st.integers(min(draw(st.sampled_from([0, 12, 12, 12])), last), last))  # signatures seldom
        change = draw(st.sampled_from(["write", "write", "write", "random", "insert", "delete", "cut", "repeat"]))
        if change == "cut":
            del data[place:]
        elif change == "delete":
            del data[place : place + draw(st.integers(1, 16))]
        elif change == "repeat":
            data[place:place] = data[place : place + draw(st.integers(1, 64))]
        else:
            new = draw(st.binary(min_size=1, max_size=8) if change == "random" else st.sampled_from(TELLING))
            data[place : place + (0 if change == "insert" else len(new))] = new
    return with_right_checksums(data) if data.startswith(b"\x89PNG\r\n\x1a\n") else bytes(data)


def with_right_checksums(png: bytearray) -> bytes:
    """Lets damage of a PNG's chunks come past their checksums."""
    place = 8
    while place + 12 <= len(png):
        end = place + 8 + int.from_bytes(png[place : place + 4], "big")
        png[end : end + 4] = zlib.crc32(png[place + 4 : end]).to_bytes(4, "big")
        place = end + 4
    return bytes(png)


def outcome(data: bytes, scaled: bool) -> tuple[str, tuple[int, int]]:
    """Decodes a file, and returns the error's code and the image's size."""
    try:
        if scaled:
            small = decode_scaled(data, 8, MAX_PIXELS)
            assert small.image.mode == "RGB"
            return "", (small.width, small.height)
        image = decode_image(data, MAX_PIXELS)
    except RowError as error:
        assert error.code in CODES
        return str(error.code), (0, 0)
    assert image.mode == "RGB"
    assert len(image.tobytes()) == 3 * image.width * image.height
    return "", image.size


def try_damaged_files(name: str, cases: int) -> Counter[str]:
    """Decodes damaged files in both modes, and returns how often each error came."""
    seen: Counter[str] = Counter()

    @settings(
        max_examples=cases,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )
    @given(mutated(name))
    def check(data: bytes) -> None:
        exact, scaled = outcome(data, scaled=False), outcome(data, scaled=True)
        assert exact == scaled
        seen[exact[0] or "decoded"] += 1

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    check()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < MAX_MORE_BYTES
    return seen


@pytest.mark.parametrize("name", FILES)
def test_whole_files_decode(name: str) -> None:
    code, size = outcome(FILES[name], scaled=False)
    assert not code
    assert sorted(size) == sorted(SIZE) or (16, 16) == size


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_pixels_or_a_documented_error(name: str) -> None:
    assert sum(try_damaged_files(name, 10).values()) >= 5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FILES)
def test_many_damaged_files_are_pixels_or_documented_errors(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    cases = -(-CASES // len(FILES))
    seen = try_damaged_files(name, cases)
    with capsys.disabled():
        print(f"\n{name}: {sum(seen.values()):,} damaged files: {dict(seen.most_common())}")
    assert sum(seen.values()) >= cases
