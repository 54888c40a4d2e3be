import bz2
import gzip
import json
import lzma
import tarfile
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smallcap import storage
from smallcap.errors import ErrorCode, RowError, StorageError
from smallcap.images import bounded_tar
from smallcap.images import tars as tar_shards
from smallcap.images.fragments import Fragment, InputBatch, LeftOut
from smallcap.images.kinds import begins_like_image, ends_like_image
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
    assert batch.left_out == LeftOut(repeats=1, passed_over=1)
    for row, left_out in enumerate([LeftOut(), LeftOut(), LeftOut(1, 1)]):  # it is said with the last row
        (batch,) = read(tmp_path / "a.tar", RowRanges.span(row, row + 1))
        assert batch.left_out == left_out


def test_what_is_no_image_is_passed_over(tmp_path: Path) -> None:
    folder, link = tarfile.TarInfo("dir.jpg"), tarfile.TarInfo("link.jpg")
    folder.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.SYMTYPE, "x"
    members = [("./a.JPG", b"x"), ("._b.jpg", b"mac"), ("c.mask.png", b"m"), ("d", b"d"), ("e.cls", b"1")]
    members.append(("é" * 120 + ".webp", b"long"))
    (tmp_path / "a.tar").write_bytes(folder.tobuf() + link.tobuf() + make_tar(*members))
    (batch,) = read(tmp_path / "a.tar")
    assert images([batch]) == {"a": b"x", "c.mask": b"m", "é" * 120: b"long"}
    assert batch.left_out.passed_over == 1  # the link; a folder is none, nor is what macOS adds


def test_names_with_dots(tmp_path: Path) -> None:
    names = ["22.05.jpg", "22.06.jpg", "plain.jpg", "photo 2.0 (Clean).jpg", "e.jfif"]
    (tmp_path / "in.tar").write_bytes(make_tar(*((name, name.encode()) for name in names), ("22.06.json", b"{}")))
    (batch,) = read(tmp_path / "in.tar")
    assert images([batch]) == {name.rpartition(".")[0]: name.encode() for name in names}
    assert batch.image_uris == [f"{tmp_path}/in.tar#{name}" for name in names]
    assert batch.left_out.passed_over == 0


def test_a_sample_with_an_image_of_its_own_has_no_other(tmp_path: Path) -> None:
    members = [("0.depth.png", b"d"), ("0.jpg", b"0"), ("0.mask.png", b"m"), ("0.json", b"{}"), ("1.jpg", b"1")]
    (tmp_path / "in.tar").write_bytes(make_tar(*members))
    (batch,) = read(tmp_path / "in.tar", kept=pa.schema([("json", pa.string())]))
    assert images([batch]) == {"0": b"0", "1": b"1"}
    assert batch.left_out.passed_over == 2
    assert batch.kept is not None
    assert batch.kept["json"].to_pylist() == ["{}", None]


def test_many_images_before_their_first_dot(tmp_path: Path) -> None:
    members = [(f"IMG.{n}.{ending}", b"%d" % n) for n in range(30) for ending in ("jpg", "txt")]
    (tmp_path / "in.tar").write_bytes(make_tar(*members, ("IMG.jpg", b"own")))
    (batch,) = read(tmp_path / "in.tar", kept=pa.schema([("txt", pa.string())]))
    assert images([batch]) == {**{f"IMG.{n}": b"%d" % n for n in range(30)}, "IMG": b"own"}
    assert batch.kept is not None
    assert batch.kept["txt"].to_pylist() == [*map(str, range(30)), None]
    (batch,) = read(tmp_path / "in.tar", RowRanges.span(29, 31))
    assert batch.image_ids == ["IMG.29", "IMG"]


def test_equal_names_of_other_images(tmp_path: Path) -> None:
    members = [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.jpg", b"3"), ("a.png", b"4"), ("c.jpg", b"5"), ("a.png", b"6")]
    (tmp_path / "in.tar").write_bytes(make_tar(*members))
    (batch,) = read(tmp_path / "in.tar")
    assert images([batch]) == {"a": b"1", "b": b"2", "a.jpg#2": b"3", "c": b"5", "a.png": b"6"}
    assert len(set(batch.image_uris)) == 5
    assert batch.left_out == LeftOut(repeats=0, passed_over=1)


def test_names_that_are_not_utf8_stay_different(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "in.tar", "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as tar:
        for name in ("caf\xe9.jpg", "caf\xe8.jpg"):
            tar.addfile(tarfile.TarInfo(name))
    assert list(images(read(tmp_path / "in.tar"))) == ["caf\\xe9", "caf\\xe8"]


def test_members_that_only_begin_like_images_are_counted(tmp_path: Path) -> None:
    png = b"\x89PNG\r\n\x1a\n and more"
    members = [("a.jpg", b"a"), ("b", png), ("c.data", png), ("d.txt", b"d"), ("e.psd", b"e"), (".f.jpg", b"f")]
    (tmp_path / "in.tar").write_bytes(make_tar(*members))
    (batch,) = read(tmp_path / "in.tar")
    assert (images([batch]), batch.left_out.passed_over) == ({"a": b"a"}, 4)
    (tmp_path / "in.tar").write_bytes(make_tar(*members[1:]))
    (batch,) = read(tmp_path / "in.tar")
    assert batch.left_out.passed_over == 4
    assert batch.data is not None
    assert "it has 4 members like images" in str(batch.data[0])


NAMES = ("a.jpg", "a.png", "A.JPG", "a.mask.png", "a.json", "22.05.jpg", "22.06.jpg", "b", "c.data", "d.psd", ".e.jpg")
CONTENTS = (b"1", b"2", b"\x89PNG\r\n\x1a\n and more")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(CONTENTS)), max_size=30))
def test_every_member_like_an_image_is_a_row_a_repeat_or_passed_over(
    tmp_path: Path, members: list[tuple[str, bytes]]
) -> None:
    (tmp_path / "in.tar").write_bytes(make_tar(*members))
    batches = read(tmp_path / "in.tar")
    rows = [data for batch in batches for data in batch.data or () if isinstance(data, bytes)]
    like_images = [name for name, content in members if ends_like_image(name) or begins_like_image(content)]
    assert len(like_images) == len(rows) + sum(batches[-1].left_out)
    ids = [image_id for batch in batches for image_id in batch.image_ids]
    assert len(set(ids)) == len(ids)


def test_a_field_of_the_json_that_is_no_text_is_its_images_error(tmp_path: Path) -> None:
    fields = {
        "half": '"\\ud800"',
        "inside": '["\\udfff"]',
        "large": "1e999",
        "long": "9" * 5000,
        "fine": '"\\ud83d\\ude00"',
    }
    members = [(f"{key}.{end}", text.encode()) for key, value in fields.items() for end, text in
               (("jpg", key), ("json", f'{{"url": {value}, "width": 3}}'))]  # fmt: skip
    members += [("deep.jpg", b"deep"), ("deep.json", b"[" * 100_000)]
    (tmp_path / "a.tar").write_bytes(make_tar(*members))
    (batch,) = read(tmp_path / "a.tar", kept=TEXTS)
    assert images([batch]) == {
        **dict.fromkeys(("half", "inside", "large", "long"), ErrorCode.INVALID_URI),
        "fine": b"fine",
        "deep": b"deep",
    }
    assert batch.kept is not None
    assert batch.kept["url"].to_pylist() == [None, None, None, None, "😀", None]
    assert batch.kept["width"].to_pylist() == ["3", "3", "3", "3", "3", None]
    (batch,) = read(tmp_path / "a.tar", kept=pa.schema([("width", pa.string())]))
    assert set(images([batch])) == {*fields, "deep"}
    assert ErrorCode.INVALID_URI not in images([batch]).values()  # what is not asked for does not matter


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_a_tar_of_zero_bytes_is_empty(tmp_path: Path, name: str) -> None:
    for content in (b"", gzip.compress(b"")):
        (tmp_path / name).write_bytes(content)
        assert images(read(tmp_path / name)) == {str(tmp_path / name): ErrorCode.EMPTY}


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_parts_one_after_the_other(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    """As pigz, pbzip2 and `cat a.gz b.gz` write them."""
    data = make_tar(*sample("a"), *sample("b"))
    parts = [data[start : start + 700] for start in range(0, len(data), 700)]
    (tmp_path / "a.tar").write_bytes(b"".join(map(compress, parts)))
    assert images(read(tmp_path / "a.tar")) == {key: f"image {key}".encode() for key in "ab"}


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_in_pax_and_gnu_headers(tmp_path: Path, kind: int) -> None:
    names = ["d/" * 90 + "旅行.jpg", "x" * 300 + ".png", "soft\u00ad\u202f.jpg"]
    with tarfile.open(tmp_path / "a.tar", "w", format=kind) as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name))
    assert list(images(read(tmp_path / "a.tar"))) == [name.rpartition(".")[0] for name in names]


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
        (b"", {"U": ErrorCode.EMPTY}),
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
            raise GenericError("Server returned non-2xx status code: 500 Internal Server Error")
        return real(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(obstore, "get", sometimes)
    fails = 4
    assert len(images(read(f"{s3}/a.tar"))) == 3
    fails = 1000
    with pytest.raises(StorageError, match="in every attempt for"):
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


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def zeros(count: int) -> Iterator[bytes]:
    """The bytes 0, a piece at a time."""
    for start in range(0, count, 1 << 20):
        yield bytes(min(1 << 20, count - start))


def write_compressed(path: Path, pieces: Iterable[bytes], kind: str) -> None:
    openers: dict[str, Any] = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open}
    with openers[kind](path, "wb", **({"preset": 1} if kind == "xz" else {"compresslevel": 1})) as file:
        for piece in pieces:
            file.write(piece)


@pytest.mark.parametrize("compression", ["", "gz", "bz2", "xz"])
@pytest.mark.parametrize("kind", ["plain", "pax", "gnu-sparse", "pax-sparse"])
def test_a_member_beyond_the_limit_is_a_row_and_the_others_have_theirs(
    tmp_path: Path, compression: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tar_shards, "MAX_IMAGE_BYTES", 1000)
    size, stored = 3000, 3000
    if kind == "plain":
        head = header("huge.jpg", size)
    elif kind == "pax":
        head = pax({"size": str(size)}) + header("huge.jpg", 0)
    elif kind == "gnu-sparse":  # one block of data at the start, and then a hole of terabytes
        size, stored = 5 << 40, 512
        block = bytearray(header("huge.jpg", stored, tarfile.GNUTYPE_SPARSE))
        block[386:410] = b"%011o\0%011o\0" % (0, 512)
        block[483:495] = b"\x80" + size.to_bytes(11)
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        head = bytes(block)
    else:
        size, stored = 5 << 40, 512
        head = pax({"GNU.sparse.realsize": str(size), "GNU.sparse.map": "0,512"}) + header("huge.jpg", stored)
    content = make_tar(*sample("a"))[:3072] + head + bytes(stored + -stored % 512) + make_tar(*sample("b"))
    path = tmp_path / "a.tar"
    if compression:
        write_compressed(path, [content], compression)
    else:
        path.write_bytes(content)
    assert images(read(path)) == {"a": b"image a", "huge": ErrorCode.TOO_LARGE, "b": b"image b"}
    (batch,) = read(path, RowRanges.span(1, 2))
    assert f"{size:,} bytes" in str((batch.data or [])[0])


def pax(fields: dict[str, str], kind: bytes = tarfile.XHDTYPE) -> bytes:
    return tarfile.TarInfo._create_pax_generic_header(fields, kind, "utf-8")  # type: ignore[attr-defined]


LONG = bounded_tar._HEADER_BYTES + 1
HEADERS = {
    "a name of terabytes": header("././@LongLink", 5 << 40, tarfile.GNUTYPE_LONGNAME),
    "a long name": header("././@LongLink", LONG, tarfile.GNUTYPE_LONGNAME) + b"x" * (LONG + 511),
    "names without end": (header("././@LongLink", 4, tarfile.GNUTYPE_LONGNAME) + b"name".ljust(512, b"\0")) * 2000,
    "a pax header of terabytes": header("pax", 5 << 40, tarfile.XHDTYPE),
    "a long pax header": pax({"comment": "x" * LONG}),
    "pax headers without end": pax({"comment": "x"}) * 2000,
    "global headers without end": b"".join(
        pax({f"a{number}.{field}": "x" for field in range(9)}, tarfile.XGLTYPE) + header(f"{number}.txt", 0)
        for number in range(100)
    ),
    "a sparse map without end": header("x.jpg", 0, tarfile.GNUTYPE_SPARSE)[:482] + b"\1" + b"\1" * 1_000_000,
    "a sparse map of a billion": pax({"GNU.sparse.major": "1", "GNU.sparse.minor": "0"})
    + header("x.jpg", 512)
    + b"1000000000\n".ljust(512, b"\0"),
    "a sparse map that is none": pax({"GNU.sparse.map": "a,b"}) + header("x.jpg", 512),
    "a size that is none": pax({"GNU.sparse.size": "many"}) + header("x.jpg", 512),
    "a negative size": pax({"size": "-5"}) + header("x.jpg", 512),
}


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", sorted(HEADERS))
def test_headers_without_measure_end_the_tar(tmp_path: Path, name: str, compressed: bool) -> None:
    uri = str(tmp_path / "a.tar")
    content = make_tar(*sample("a"))[:3072] + HEADERS[name]
    if name == "a sparse map without end":  # with the checksum of what was changed
        block = bytearray(content[3072 : 3072 + 512])
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        content = content[:3072] + bytes(block) + content[3072 + 512 :]
    Path(uri).write_bytes(gzip.compress(content) if compressed else content)
    assert images(read(uri)) == {"a": b"image a", uri: ErrorCode.TRUNCATED}
    choose_tar_ids([uri, uri])  # which reads only the first headers


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_a_compressed_tar_of_absurdly_many_bytes_is_given_up(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its images before that have their rows. 40 MB of zeros take 40 kB at most."""
    monkeypatch.setattr(bounded_tar, "_INFLATED_BYTES", 10 << 20)
    uri = str(tmp_path / "a.tar")
    size = 40 << 20
    head = make_tar(*sample("a"))[:3072] + header("clip.mp4", size)
    write_compressed(Path(uri), chain([head], zeros(size), [make_tar(*sample("b"))]), kind)
    found = read(uri)
    assert images(found) == {"a": b"image a", uri: ErrorCode.TOO_LARGE}
    assert "not read on after 1 image" in str((found[-1].data or [])[-1])
    monkeypatch.setattr(bounded_tar, "_INFLATED_BYTES", 50 << 20)
    assert images(read(uri)) == {"a": b"image a", "b": b"image b"}  # a film beside the images is no bomb


def test_the_first_key_of_a_bomb_costs_no_memory(tmp_path: Path) -> None:
    """The first 16 KiB of it hold 64 MB: all of a name that never ends."""
    uri = str(tmp_path / "a.tar.bz2")
    write_compressed(
        Path(uri), chain([header("././@LongLink", 5 << 40, tarfile.GNUTYPE_LONGNAME)], zeros(1 << 26)), "bz2"
    )
    tracemalloc.start()
    choose_tar_ids([uri, uri])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


def test_an_xz_that_wants_much_memory_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = str(tmp_path / "a.tar.xz")
    Path(uri).write_bytes(lzma.compress(make_tar(*sample("a")), preset=6))
    monkeypatch.setattr(bounded_tar, "_XZ_BYTES", 1 << 20)
    assert images(read(uri)) == {uri: ErrorCode.TOO_LARGE}


def test_texts_beyond_the_limit_are_their_images_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_shards, "_SAMPLE_TEXT_BYTES", 1000)
    path = tmp_path / "a.tar"
    path.write_bytes(make_tar(*sample("a"), ("b.jpg", b"image b"), ("b.json", b" " * 1001), *sample("c")))
    expected = {"a": b"image a", "b": ErrorCode.TOO_LARGE, "c": b"image c"}
    assert images(read(path, kept=TEXTS)) == expected
    assert images(read(path)) == expected | {"b": b"image b"}  # what is not kept is not read


def test_the_images_of_one_key_are_held_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond it each has a row of its own."""
    monkeypatch.setattr(tar_shards, "MAX_IMAGE_BYTES", 1000)
    members = [(f"a.{number}.jpg", bytes([number]) * 400) for number in range(4)]
    (tmp_path / "a.tar").write_bytes(make_tar(*members, ("a.jpg", b"own")))
    assert len(images(read(tmp_path / "a.tar"))) == 5
    (tmp_path / "a.tar").write_bytes(make_tar(*members[:2], ("a.jpg", b"own")))
    assert images(read(tmp_path / "a.tar")) == {"a": b"own"}
