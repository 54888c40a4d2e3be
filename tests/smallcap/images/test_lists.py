import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smallcap.config import InputConfig
from smallcap.errors import SchemaError
from smallcap.images import lists as image_lists
from smallcap.images.lists import ImageList


def read(file: Path, keep: tuple[str, ...] = (), **options: str) -> list[dict[str, object]]:
    tables = list(ImageList(str(file), InputConfig(**options), keep).tables())
    return pa.concat_tables(tables).to_pylist() if tables else []


def write(file: Path, rows: list[dict[str, object]]) -> None:
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif file.suffix in (".jsonl", ".ndjson"):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows, indent=1))
    else:
        mark = {".csv": ",", ".tsv": "\t"}[file.suffix]
        lines = [mark.join(rows[0]), *(mark.join(f'"{value}"' for value in row.values()) for row in rows)]
        file.write_text("\n".join(lines))


SUFFIXES = [".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_ids_uris_and_kept_columns(tmp_path: Path, suffix: str) -> None:
    rows = [{"image_id": "007", "image_uri": "rel/1, one.jpg", "alt": "ü"}]
    rows += [{"image_id": "8", "image_uri": f"s3://b/{n}.jpg", "alt": "x"} for n in range(3)]
    write(tmp_path / f"list{suffix}", rows)
    expected = [{**rows[0], "image_uri": f"{tmp_path}/rel/1, one.jpg"}, *rows[1:]]
    assert read(tmp_path / f"list{suffix}", ("alt",)) == expected
    named = read(tmp_path / f"list{suffix}", image_column="image_uri", id_column="alt")
    assert [row["image_id"] for row in named] == ["ü", "x", "x", "x"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / f"list{suffix}", [{"url": "a.jpg", "alt": "x"}])
    with pytest.raises(SchemaError, match=r"input\.image_column") as missing:
        read(tmp_path / f"list{suffix}")
    assert "url, alt" in str(missing.value)
    with pytest.raises(SchemaError, match="column to keep is missing") as missing:
        read(tmp_path / f"list{suffix}", ("text",), image_column="url")
    assert "url, alt" in str(missing.value)
    assert f"list{suffix}" in str(missing.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_a_row_without_uri_or_id_is_named_by_its_number(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_lists, "BATCH_ROWS", 2)
    rows: list[dict[str, object]] = [{"image_id": str(n), "image_uri": f"{n}.jpg"} for n in range(5)]
    empty = "" if suffix == ".csv" else None
    write(tmp_path / f"a{suffix}", [*rows, {"image_id": "x", "image_uri": empty}])
    with pytest.raises(SchemaError, match="row 6"):
        read(tmp_path / f"a{suffix}")
    write(tmp_path / f"b{suffix}", [*rows[:2], {"image_id": empty, "image_uri": "a.jpg"}])
    with pytest.raises(SchemaError, match="no id") as missing:
        read(tmp_path / f"b{suffix}")
    assert "row 3" in str(missing.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.parquet", b"not parquet"),
        ("list.csv", b"image_uri,alt\na.jpg,x\nb.jpg\n"),
        ("list.csv", b""),
        ("list.jsonl", b'{"image_uri": "a.jpg"}\n{"image_uri": \n'),
        ("list.json", b'[{"image_uri": "a.jpg"}, {"image_uri":'),
        ("list.json", b'{"images": []}'),
        ("list.json", b"[1, 2]"),
        ("list.txt", b"a.jpg\n\xff\xfe\n"),
    ],
)
def test_a_damaged_list_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SchemaError, match="cannot be read") as damaged:
        read(tmp_path / name)
    assert name in str(damaged.value)


def test_text_and_json_arrays_of_strings_need_no_column_and_long_ones_are_read_in_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "list.txt").write_text("s3://b/b.jpg\r\n\n  \na b.jpg\n")
    (tmp_path / "list.json").write_text('["s3://b/b.jpg", "a b.jpg"]')
    for name in ("list.txt", "list.json"):
        rows = read(tmp_path / name, image_column="url")
        assert [row["image_uri"] for row in rows] == ["s3://b/b.jpg", f"{tmp_path}/a b.jpg"]
        assert [row["image_id"] for row in rows] == ["s3://b/b.jpg", "a b.jpg"]
    monkeypatch.setattr(image_lists, "_BLOCK_BYTES", 16)
    monkeypatch.setattr(image_lists, "BATCH_ROWS", 3)
    write(tmp_path / "list.json", [{"image_uri": f"s3://b/{n}.jpg", "text": '],"{'} for n in range(10)])
    assert len(read(tmp_path / "list.json", ("text",))) == 10


def test_kept_types_are_the_files_own(tmp_path: Path) -> None:
    labels = pa.array(["a", "b"]).dictionary_encode()
    table = pa.table({"image_uri": ["1.jpg", "2.jpg"], "width": pa.array([1, None], pa.int16()), "label": labels})
    pq.write_table(table, tmp_path / "list.parquet")
    (tmp_path / "list.csv").write_text("image_uri,width,label\n1.jpg,1,\n2.jpg,,a\n")
    found = next(ImageList(f"{tmp_path}/list.parquet", InputConfig(), ("width", "label")).tables())
    assert [found.field(name).type for name in ("width", "label")] == [pa.int16(), pa.string()]
    assert [row["width"] for row in read(tmp_path / "list.csv", ("width",))] == ["1", None]
