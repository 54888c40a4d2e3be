from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smallcap import storage
from smallcap.config import InputConfig
from smallcap.errors import ErrorCode, RowError, SchemaError
from smallcap.images import parquet as parquet_images
from smallcap.images.fragments import Fragment, InputBatch
from smallcap.images.parquet import ids_repeat, image_bytes_column, read_outlines, read_parquet
from smallcap.images.row_ranges import RowRanges

NOTHING = pa.schema([])
HF_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def hf_table(rows: int) -> pa.Table:
    """As Hugging Face's datasets write one: every third path is missing."""
    images = [{"bytes": b"image %d" % n, "path": None if n % 3 == 2 else f"{n}.jpg"} for n in range(rows)]
    return pa.table({"image": pa.array(images, HF_IMAGE), "label": pa.array(range(rows), pa.int64())})


def read(
    uri: Path | str,
    row_group: int,
    rows: int,
    wanted: RowRanges | None = None,
    kept: pa.Schema = NOTHING,
    **options: str,
) -> list[InputBatch]:
    fragment = Fragment(0, "parquet", str(uri), row_group, rows, "sub/file/")
    return list(read_parquet(fragment, wanted, InputConfig(**options), kept))  # type: ignore[arg-type]


def test_hugging_face_images(tmp_path: Path) -> None:
    file = tmp_path / "file.parquet"
    pq.write_table(hf_table(10), file, row_group_size=4)
    kept = pa.schema([("label", pa.int64())])
    (batch,) = read(file, 1, 4, kept=kept)
    assert batch.image_ids == ["4.jpg", "sub/file/5", "6.jpg", "7.jpg"]
    assert batch.image_uris == [f"{file}#row={n}" for n in range(4, 8)]
    assert batch.data == [b"image %d" % n for n in range(4, 8)]
    assert batch.rows.tolist() == [0, 1, 2, 3]
    assert batch.kept is not None
    assert batch.kept.to_pydict() == {"label": [4, 5, 6, 7]}
    assert batch.ends_fragment


def test_ids_that_repeat_are_qualified_by_their_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        pq.write_table(hf_table(3), tmp_path / f"{name}.parquet")
    both = [str(tmp_path / f"{name}.parquet") for name in ("a", "b")]
    assert ids_repeat(both, InputConfig())
    assert not ids_repeat(both[:1], InputConfig())
    assert not ids_repeat([*both[:1], str(tmp_path / "none.parquet")], InputConfig())
    assert ids_repeat(both, InputConfig(id_column="label"))
    fragment = Fragment(0, "parquet", both[0], 0, 3, "sub/a/", qualified=True)
    (batch,) = read_parquet(fragment, None, InputConfig(), NOTHING)
    assert batch.image_ids == ["sub/a/0.jpg", "sub/a/1.jpg", "sub/a/2"]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_plain_bytes_with_ids(tmp_path: Path, kind: pa.DataType) -> None:
    table = pa.table({"jpg": pa.array([b"a", None, b""], kind), "key": [7, 8, None]})
    pq.write_table(table, tmp_path / "file.parquet")
    (batch,) = read(tmp_path / "file.parquet", 0, 3, id_column="key")
    assert batch.image_ids == ["7", "8", "sub/file/2"]
    assert batch.data is not None
    assert (batch.data[0], batch.data[2]) == (b"a", b"")
    assert isinstance(batch.data[1], RowError)
    assert batch.data[1].code == ErrorCode.EMPTY


BROKEN = pa.array([b"fine", b"caf\xe9", None, b"\xed\xa0\x80", b"a\x01", b"a\tb"]).view(pa.string())


@pytest.mark.parametrize("place", ["id", "path", "kept"])
def test_an_id_or_a_kept_text_that_is_none_is_its_rows_error(tmp_path: Path, place: str) -> None:
    files = pa.array([b"%d" % n for n in range(6)])
    paths = BROKEN if place == "path" else pa.array([f"{n}.jpg" for n in range(6)])
    columns = {"image": pa.StructArray.from_arrays([files, paths], ["bytes", "path"])}
    columns |= {"image_id": BROKEN} if place == "id" else {"text": BROKEN} if place == "kept" else {}
    pq.write_table(pa.table(columns), tmp_path / "file.parquet")
    kept = pa.schema([("text", pa.string())]) if place == "kept" else NOTHING
    (batch,) = read(tmp_path / "file.parquet", 0, 6, kept=kept)
    wrong = [1, 3] if place == "kept" else [1, 3, 4]  # what is kept may hold any code
    assert batch.data is not None
    assert [row for row, data in enumerate(batch.data) if isinstance(data, RowError)] == wrong
    assert {data.code for data in batch.data if isinstance(data, RowError)} == {ErrorCode.INVALID_URI}
    if place == "kept":
        assert batch.image_ids == [f"{n}.jpg" for n in range(6)]
        assert batch.kept is not None
        assert batch.kept["text"].to_pylist() == ["fine", None, None, None, "a\x01", "a\tb"]
    else:
        assert batch.image_ids == ["fine", *(f"sub/file/{n}" for n in range(1, 5)), "a\tb"]
    assert not ids_repeat([str(tmp_path / "file.parquet")], InputConfig())


def test_a_whole_number_of_a_float_column_is_written_without_a_point(tmp_path: Path) -> None:
    table = pa.table({"image": [b"x"] * 4, "image_id": [7.0, None, 0.5, float("nan")]})
    pq.write_table(table, tmp_path / "file.parquet")
    (batch,) = read(tmp_path / "file.parquet", 0, 4)
    assert batch.image_ids == ["7", "sub/file/1", "0.5", "sub/file/3"]
    assert not any(isinstance(data, RowError) for data in batch.data or ())


def test_a_column_with_a_name_that_is_no_text_spoils_its_file(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"x"], "xxxx": [1]}), tmp_path / "file.parquet")
    data = (tmp_path / "file.parquet").read_bytes().replace(b"xxxx", b"x\xff\xfex")
    (tmp_path / "file.parquet").write_bytes(data)
    (outline,) = read_outlines([str(tmp_path / "file.parquet")])
    assert outline.problem


def test_a_long_row_group_comes_in_batches_of_what_is_wanted(tmp_path: Path) -> None:
    pq.write_table(hf_table(600), tmp_path / "file.parquet")
    batches = read(tmp_path / "file.parquet", 0, 600)
    assert [(len(batch.rows), batch.ends_fragment) for batch in batches] == [(256, False), (256, False), (88, True)]
    batches = read(tmp_path / "file.parquet", 0, 600, RowRanges([(250, 260), (590, 599)]))
    assert [row for batch in batches for row in batch.rows.tolist()] == [*range(250, 260), *range(590, 599)]
    assert not batches[-1].ends_fragment


def test_on_s3(s3: str, tmp_path: Path) -> None:
    pq.write_table(hf_table(10), tmp_path / "file.parquet", row_group_size=4)
    storage.upload(tmp_path / "file.parquet", f"{s3}/file.parquet")
    assert [outline.rows for outline in read_outlines([f"{s3}/file.parquet"])] == [(4, 4, 2)]
    (batch,) = read(f"{s3}/file.parquet", 2, 2)
    assert batch.image_uris == [f"{s3}/file.parquet#row=8", f"{s3}/file.parquet#row=9"]


def test_what_cannot_be_read_is_an_error_of_each_row(tmp_path: Path, s3: str) -> None:
    for uri in (f"{tmp_path}/none.parquet", f"{s3}/none.parquet"):
        batches = read(uri, 0, 300)
        assert [(len(batch.rows), batch.ends_fragment) for batch in batches] == [(256, False), (44, True)]
        assert {error.code for batch in batches for error in batch.data or () if isinstance(error, RowError)} == {
            ErrorCode.NOT_FOUND
        }
        assert len({image_id for batch in batches for image_id in batch.image_ids}) == 300


def test_a_damaged_page_leaves_the_rows_before_it(tmp_path: Path) -> None:
    file = tmp_path / "file.parquet"
    images = pa.table({"jpg": [b"%05d" % n * 200 for n in range(2000)]})
    pq.write_table(images, file, compression="none", use_dictionary=False, data_page_size=64 << 10)
    data = bytearray(file.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 200_000] = b"\xff" * 200_000
    file.write_bytes(data)
    batches = read(file, 0, 2000, kept=NOTHING)
    codes = [error.code for batch in batches for error in batch.data or () if isinstance(error, RowError)]
    assert [row for batch in batches for row in batch.rows.tolist()] == list(range(2000))
    assert set(codes) == {ErrorCode.TRUNCATED}
    assert 500 < len(codes) < 1500
    assert [batch.ends_fragment for batch in batches] == [False] * (len(batches) - 1) + [True]


def test_which_column_holds_images() -> None:
    schema = pa.schema([("image", HF_IMAGE), ("thumb", pa.binary()), ("image_uri", pa.string())])
    assert image_bytes_column(schema, InputConfig(), "f") is None  # a list of URIs
    assert image_bytes_column(schema, InputConfig(image_column="thumb"), "f") == "thumb"
    assert image_bytes_column(schema.remove(1).remove(1), InputConfig(), "f") == "image"
    with pytest.raises(SchemaError, match="Several columns") as several:
        image_bytes_column(schema.remove(2), InputConfig(), "f")
    assert "image, thumb" in str(several.value)


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view(), HF_IMAGE])
@pytest.mark.parametrize("dictionary", [True, False])
def test_an_image_beyond_the_limit_is_a_row_and_the_others_have_theirs(
    tmp_path: Path, kind: pa.DataType, dictionary: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_images, "MAX_IMAGE_BYTES", 1000)
    monkeypatch.setattr(parquet_images, "_BATCH_BYTES", 1500)
    files = [b"a" * 700, b"b" * 1001, None, b"c" * 1000, b"a" * 700, b"d"]
    cells = [{"bytes": file, "path": None} for file in files] if kind == HF_IMAGE else files
    table = pa.table({"image": pa.array(cells, kind)})
    pq.write_table(table, tmp_path / "file.parquet", use_dictionary=dictionary)
    batches = read(tmp_path / "file.parquet", 0, 6)
    data = [file for batch in batches for file in batch.data or ()]
    assert [file if isinstance(file, bytes) else file.code for file in data] == [
        *(files[0], ErrorCode.TOO_LARGE, ErrorCode.EMPTY),
        *files[3:],
    ]
    assert "1,001 bytes" in str(data[1])
    assert [row for batch in batches for row in batch.rows.tolist()] == list(range(6))
    assert all(sum(len(file) for file in batch.data or () if isinstance(file, bytes)) <= 1700 for batch in batches)
    assert [batch.ends_fragment for batch in batches] == [False] * (len(batches) - 1) + [True]


def test_an_image_that_is_repeated_is_not_held_for_each_row(tmp_path: Path) -> None:
    """200 rows of one image of 2 MB are 2 MB in the file, and would be 400 MB in memory."""
    images = pa.DictionaryArray.from_arrays(pa.array([0] * 200, pa.int32()), pa.array([bytes(2 << 20)]))
    pq.write_table(pa.table({"image": images}), tmp_path / "file.parquet", store_schema=False)
    before = pa.total_allocated_bytes()
    rows = 0
    fragment = Fragment(0, "parquet", str(tmp_path / "file.parquet"), 0, 200, "")
    for batch in read_parquet(fragment, None, InputConfig(), NOTHING):
        rows += len(batch.rows)
        assert sum(len(file) for file in batch.data or () if isinstance(file, bytes)) <= 66 << 20
        assert pa.total_allocated_bytes() - before < 20 << 20
    assert rows == 200
