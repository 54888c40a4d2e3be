import gzip
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from smallcap import storage
from smallcap.errors import ErrorCode, RowError, StorageError
from smallcap.images import tars as tar_shards
from smallcap.images.fragments import Fragment, InputBatch
from smallcap.images.row_ranges import RowRanges
from smallcap.images.tars import choose_tar_ids, read_tar
from tests.input_files import make_tar

TEXTS = pa.schema([("json", pa.string()), ("txt", pa.string()), ("width", pa.string()), ("url", pa.string())])
NOTHING = pa.schema([])


def sample(key: str, **fields: object) -> list[tuple[str, bytes]]:
    """The three members that img2dataset writes of an image."""
    text = json.dumps({"key": key, **fields}).encode()
    return [(f"{key}.jpg", f"image {key}".encode()), (f"{key}.json", text), (f"{key}.txt", f"text {key}".encode())]


def read(uri: Path | str, wanted: RowRanges | None = None, kept: pa.Schema = NOTHING) -> list[InputBatch]:
    return list(read_tar(Fragment(0, "tar", str(uri), 0, None), wanted, kept))


def images(batches: list[InputBatch]) -> dict[str, object]:
    """Id to data, or to an error's code."""
    return {
        image_id: data.code if isinstance(data, RowError) else data
        for batch in batches
        for image_id, data in zip(batch.image_ids, batch.data or [], strict=True)
    }


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    members = [*sample("000", width=3, url="u"), *sample("sub.d/001", width=None, tags=["a"]), *sample("002")]
    (tmp_path / "00000.tar").write_bytes(make_tar(*members))
    return tmp_path / "00000.tar"


def test_images_by_their_keys_all_or_those_wanted(shard: Path) -> None:
    (batch,) = read(shard)
    assert batch.image_ids == ["000", "sub.d/001", "002"]
    assert batch.image_uris == [f"{shard}#{name}.jpg" for name in batch.image_ids]
    assert batch.data == [b"image 000", b"image sub.d/001", b"image 002"]
    assert batch.rows.tolist() == [0, 1, 2]
    assert batch.rows.dtype == np.int32
    assert batch.kept is None
    assert batch.ends_fragment
    (batch,) = read(shard, RowRanges.span(1, 2), TEXTS)
    assert (batch.image_ids, batch.rows.tolist(), batch.ends_fragment) == (["sub.d/001"], [1], False)
    (batch,) = read(shard, RowRanges.of(np.array([0, 2])))
    assert (batch.image_ids, batch.rows.tolist(), batch.ends_fragment) == (["000", "002"], [0, 2], True)
    assert read(shard, RowRanges.span(7, 9)) == []


def test_kept_texts_and_fields_of_the_json(shard: Path, tmp_path: Path) -> None:
    (batch,) = read(shard, kept=TEXTS)
    assert batch.kept is not None
    assert batch.kept.schema == TEXTS
    assert batch.kept["txt"].to_pylist() == ["text 000", "text sub.d/001", "text 002"]
    assert json.loads(batch.kept["json"][0].as_py()) == {"key": "000", "width": 3, "url": "u"}
    assert batch.kept["width"].to_pylist() == ["3", None, None]
    (batch,) = read(shard, kept=pa.schema([("tags", pa.string())]))
    assert batch.kept is not None
    assert batch.kept["tags"].to_pylist() == [None, '["a"]', None]
    (tmp_path / "a.tar").write_bytes(make_tar(("0.json", b"{oh"), ("0.png", b"x")))  # before its image, too
    (batch,) = read(tmp_path / "a.tar", kept=TEXTS)
    assert batch.kept is not None
    assert batch.kept.to_pylist() == [{"json": "{oh", "txt": None, "width": None, "url": None}]


def test_a_repeated_key_is_read_once_and_counted(tmp_path: Path) -> None:
    members = [*sample("a"), ("a.png", b"second"), *sample("b"), *sample("a"), *sample("c")]
    (tmp_path / "a.tar").write_bytes(make_tar(*members))
    (batch,) = read(tmp_path / "a.tar")
    assert images([batch]) == {key: f"image {key}".encode() for key in "abc"}
    assert batch.duplicates == 2
    for row, duplicates in enumerate((1, 1, 0)):
        (batch,) = read(tmp_path / "a.tar", RowRanges.span(row, row + 1))
        assert batch.duplicates == duplicates


def test_what_is_no_image_is_passed_over(tmp_path: Path) -> None:
    folder, link = tarfile.TarInfo("dir.jpg"), tarfile.TarInfo("link.jpg")
    folder.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.SYMTYPE, "x"
    members = [("./a.JPG", b"x"), ("._b.jpg", b"mac"), ("c.mask.png", b"m"), ("d", b"d"), ("e.cls", b"1")]
    members.append(("é" * 120 + ".webp", b"long"))
    (tmp_path / "a.tar").write_bytes(folder.tobuf() + link.tobuf() + make_tar(*members))
    assert images(read(tmp_path / "a.tar")) == {"a": b"x", "é" * 120: b"long"}


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar"])
def test_compressed_tars(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(make_tar(*sample("a"))))
    assert images(read(tmp_path / name)) == {"a": b"image a"}


def test_batches_end_at_256_images_or_by_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.tar").write_bytes(make_tar(*((f"{n:04d}.jpg", b"xx") for n in range(512))))
    batches = read(tmp_path / "a.tar")
    assert [(len(batch.rows), batch.ends_fragment) for batch in batches] == [(256, False), (256, True)]
    assert batches[1].rows.tolist() == list(range(256, 512))
    monkeypatch.setattr(tar_shards, "_BATCH_BYTES", 600 // 3)
    assert {len(batch.rows) for batch in read(tmp_path / "a.tar")} == {100, 12}


WHOLE = make_tar(*(member for key in "abc" for member in sample(key)))


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", {"U": ErrorCode.NOT_AN_IMAGE}),
        (b"this is no tar at all" * 100, {"U": ErrorCode.NOT_AN_IMAGE}),
        (make_tar(), {"U": ErrorCode.EMPTY}),
        (make_tar(("a.txt", b"x")), {"U": ErrorCode.EMPTY}),
        (WHOLE[:512], {"U": ErrorCode.NOT_AN_IMAGE}),
        (WHOLE[: 512 + 4], {"U": ErrorCode.NOT_AN_IMAGE}),  # in the first image
        (WHOLE[:1024], {"a": b"image a", "U": ErrorCode.TRUNCATED}),  # after it
        (WHOLE[: 3 * 1024 + 100], {"a": b"image a", "U": ErrorCode.TRUNCATED}),  # in a header
        (WHOLE[: 3 * 1024 + 514], {"a": b"image a", "U": ErrorCode.TRUNCATED}),  # in the second image
        (WHOLE[: 9 * 1024], {"a": b"image a", "b": b"image b", "c": b"image c", "U": ErrorCode.TRUNCATED}),  # no end
        (WHOLE[: 3 * 1024] + b"\x07" * 512 + WHOLE[3 * 1024 + 512 :], {"a": b"image a", "U": ErrorCode.TRUNCATED}),
        (gzip.compress(WHOLE, mtime=0)[:-30], None),
        (gzip.compress(WHOLE, mtime=0)[:20], {"U": ErrorCode.NOT_AN_IMAGE}),
    ],
)
def test_a_damaged_tar_gives_its_images_and_an_error(
    tmp_path: Path, content: bytes, found: dict[str, object] | None
) -> None:
    uri = str(tmp_path / "a.tar")
    Path(uri).write_bytes(content)
    batches = read(uri, kept=TEXTS)
    result = images(batches)
    assert isinstance(result[uri], ErrorCode)
    if found is not None:
        assert result == {uri if image_id == "U" else image_id: data for image_id, data in found.items()}
    assert batches[-1].ends_fragment
    assert [row for batch in batches for row in batch.rows.tolist()] == list(range(len(result)))
    again = read(uri, RowRanges.span(len(result) - 1, len(result)))
    assert list(images(again)) == [uri]
    assert again[-1].ends_fragment


def test_a_missing_tar_is_a_row(tmp_path: Path, s3: str) -> None:
    for uri in (f"{tmp_path}/a.tar", f"{s3}/a.tar"):
        assert images(read(uri)) == {uri: ErrorCode.NOT_FOUND}


def test_tars_on_s3_are_read_in_blocks(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_bytes(f"{s3}/a.tar", make_tar(*((f"{n}.jpg", bytes([n]) * 3000) for n in range(40))))
    monkeypatch.setattr(tar_shards, "_BLOCK_BYTES", 10_000)
    assert images(read(f"{s3}/a.tar")) == {str(n): bytes([n]) * 3000 for n in range(40)}


def test_a_failing_service_stops_the_run(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import obstore
    from obstore.exceptions import GenericError

    storage.write_bytes(f"{s3}/a.tar", WHOLE)
    calls: list[int] = []
    real = obstore.get

    def sometimes(*args: object, **options: object) -> object:
        calls.append(1)
        if len(calls) < fails:
            raise GenericError("connection reset")
        return real(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(obstore, "get", sometimes)
    monkeypatch.setattr("smallcap.s3.time.sleep", lambda seconds: None)
    fails = 4
    assert len(images(read(f"{s3}/a.tar"))) == 3
    fails = 1000
    with pytest.raises(StorageError, match="fails after retries"):
        read(f"{s3}/a.tar")


def test_tars_that_begin_alike_need_their_names(tmp_path: Path) -> None:
    for name, key in (("0.tar", "000"), ("1.tar", "100"), ("2.tar", "000")):
        (tmp_path / name).write_bytes(make_tar(*sample(key)))
    (tmp_path / "3.tar.gz").write_bytes(gzip.compress(make_tar(*sample("100"))))
    (tmp_path / "bad.tar").write_bytes(b"x")
    uris = {name: f"{tmp_path}/{name}" for name in ("0.tar", "1.tar", "2.tar", "3.tar.gz", "bad.tar", "none.tar")}
    assert choose_tar_ids([uris["0.tar"], uris["1.tar"], uris["bad.tar"], uris["none.tar"]]) == "key"
    assert choose_tar_ids([uris["0.tar"], uris["2.tar"]]) == "tar/key"
    assert choose_tar_ids([uris["1.tar"], uris["3.tar.gz"]]) == "tar/key"
