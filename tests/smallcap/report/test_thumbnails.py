"""Pictures from every place that a run reads: small, in bounds, and a reason where one cannot be had."""

import base64
import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from smallcap import storage
from smallcap.config import InputConfig
from smallcap.errors import ErrorCode, RowError
from smallcap.images.fragments import Fragment
from smallcap.report import thumbnails
from smallcap.report.thumbnails import Containers, read_thumbnails
from tests.report_runs import noise, photo, write_photos

NOWHERE = Containers(())
CONFIG = InputConfig()


def opened(thumbnail: str | RowError) -> Image.Image:
    assert isinstance(thumbnail, str)
    return Image.open(io.BytesIO(base64.b64decode(thumbnail.removeprefix("data:image/webp;base64,"))))


def test_images_are_read_from_wherever_they_lie(anywhere: str) -> None:
    uris = write_photos(anywhere, 70)
    found = read_thumbnails(uris, 10_000_000, NOWHERE, CONFIG)
    assert list(found) == uris
    for thumbnail in found.values():
        assert opened(thumbnail).size == (60, 40)


@pytest.mark.parametrize(("count", "most_bytes"), [(1, 1_000_000), (20, 400_000), (100, 400_000), (100, 150_000)])
def test_all_pictures_together_stay_within_the_bytes(count: int, most_bytes: int, tmp_path: Path) -> None:
    (tmp_path / "noise.png").write_bytes(noise(300))
    for number in range(1, count):
        (tmp_path / f"{number}.png").hardlink_to(tmp_path / "noise.png")
    uris = [str(path) for path in tmp_path.iterdir()]
    found = read_thumbnails(uris, most_bytes, NOWHERE, CONFIG)
    assert sum(len(str(thumbnail)) for thumbnail in found.values()) <= most_bytes
    sides = {max(opened(thumbnail).size) for thumbnail in found.values()}
    assert min(sides) >= 32


def test_many_pictures_are_smaller_than_few(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(photo(900, 600))
    uri = str(tmp_path / "a.jpg")
    few, many = (opened(read_thumbnails([uri], most, NOWHERE, CONFIG)[uri]).size for most in (1_000_000, 3_000))
    assert (few, many) == ((384, 256), (128, 85))


def test_a_very_long_image_loses_its_ends(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(photo(3000, 20, kind="PNG"))
    uri = str(tmp_path / "a.png")
    assert opened(read_thumbnails([uri], 1_000_000, NOWHERE, CONFIG)[uri]).size == (80, 20)


def test_what_cannot_be_read_has_a_reason(tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(photo()[:200])
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "fine.jpg").write_bytes(photo())
    uris = [str(tmp_path / name) for name in ("broken.jpg", "text.jpg", "gone.jpg", "fine.jpg")]
    found = read_thumbnails([*uris, "nosuchscheme://a"], 1_000_000, NOWHERE, CONFIG)
    codes = [one.code if isinstance(one, RowError) else None for one in found.values()]
    assert codes == [ErrorCode.TRUNCATED, ErrorCode.NOT_AN_IMAGE, ErrorCode.NOT_FOUND, None, ErrorCode.INVALID_URI]


def test_a_store_that_is_gone_leaves_a_report_without_pictures(s3_server: str, tmp_path: Path) -> None:
    (tmp_path / "fine.jpg").write_bytes(photo())
    uris = ["s3://no-such-bucket/a.jpg", "s3://no-such-bucket/b.jpg"]
    found = read_thumbnails(uris, 1_000_000, NOWHERE, CONFIG)
    assert [one.code for one in found.values() if isinstance(one, RowError)] == [ErrorCode.UNAVAILABLE] * 2


def write_tar(path: Path, count: int) -> Fragment:
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            data = photo(60 + number % 90, 40)
            info = tarfile.TarInfo(f"{number:03d}#x.jpg")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return Fragment(0, "tar", str(path), 0, None)


def test_images_in_tars_and_parquet_files_are_found_there(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a#1.tar", 300)
    file = str(tmp_path / "a.parquet")
    table = pa.table({"image": [photo(100 + n, 40) for n in range(20)]})
    pq.write_table(table, file, row_group_size=8)
    groups = [Fragment(number, "parquet", file, number, rows) for number, rows in enumerate((8, 8, 4))]
    containers = Containers([tar, *groups])
    assert containers.has_all
    members = [f"{tar.uri}#{number:03d}#x.jpg" for number in (0, 299)]
    rows = [f"{file}#row={row}" for row in (0, 9, 19)]
    gone = [f"{tar.uri}#gone.jpg", f"{file}#row=20"]
    found = read_thumbnails([*rows, *members, *gone], 1_000_000, containers, CONFIG)
    assert [opened(found[uri]).width for uri in (*members, *rows)] == [60, 89, 100, 109, 119]
    assert [found[uri].code for uri in gone] == [ErrorCode.NOT_FOUND] * 2  # type: ignore[union-attr]


def test_only_some_of_many_large_tars_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fragments = [write_tar(tmp_path / f"{number}.tar", 3) for number in range(10)]
    size = storage.size(fragments[0].uri)
    assert size
    monkeypatch.setattr(thumbnails, "_MOST_CONTAINER_BYTES", 3 * size)
    containers = Containers(fragments)
    uris = [f"{fragment.uri}#000#x.jpg" for fragment in fragments]
    readable = [uri for uri in uris if containers.is_readable(uri)]
    assert (containers.has_all, len(readable)) == (False, 3)
    found = read_thumbnails(uris, 1_000_000, containers, CONFIG)
    assert [uri for uri in uris if isinstance(found[uri], str)] == readable


def test_a_tar_that_is_gone_or_damaged_has_reasons(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", 30)
    other = Fragment(1, "tar", str(tmp_path / "gone.tar"), 0, None)
    Path(tar.uri).write_bytes(Path(tar.uri).read_bytes()[:20_000])
    uris = [f"{tar.uri}#000#x.jpg", f"{tar.uri}#029#x.jpg", f"{other.uri}#000#x.jpg"]
    found = read_thumbnails(uris, 1_000_000, Containers([tar, other]), CONFIG)
    assert [isinstance(one, RowError) for one in found.values()] == [False, True, True]
