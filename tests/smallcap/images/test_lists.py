import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smallcap import tables
from smallcap.config import InputConfig
from smallcap.errors import ErrorCode, RowError, SchemaError
from smallcap.images import lists as image_lists
from smallcap.images.fetching import fetch_objects
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
        quote = '"' if file.suffix == ".csv" else ""
        lines = [mark.join(rows[0]), *(mark.join(f"{quote}{value}{quote}" for value in row.values()) for row in rows)]
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


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_row_without_uri_or_id_is_a_row_of_its_own(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_lists, "BATCH_ROWS", 2)
    nothing = "" if suffix in (".csv", ".tsv") else None
    file = tmp_path / f"list{suffix}"
    rows: list[dict[str, object]] = [{"image_id": str(n), "image_uri": f"/{n}.jpg"} for n in range(3)]
    write(file, [*rows, {"image_id": "x", "image_uri": nothing}, {"image_id": nothing, "image_uri": "/a.jpg"}])
    assert read(file)[3:] == [{"image_id": "x", "image_uri": ""}, {"image_id": "/a.jpg", "image_uri": "/a.jpg"}]
    write(file, [*rows, {"image_id": nothing, "image_uri": nothing}, *rows])
    assert read(file) == [*rows, {"image_id": f"{file}#row=4", "image_uri": ""}, *rows]
    [problem] = fetch_objects([""]).data
    assert isinstance(problem, RowError)
    assert problem.code == ErrorCode.INVALID_URI


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.csv", b'image_uri,alt\n/a.jpg,x\n/b.jpg,"open\n/c.jpg,z\n'),
        ("list.csv", b"image_uri,alt\n/a.jpg,x\n/b.jpg\n/c.jpg,z\n"),
        ("list.tsv", b"image_uri\talt\n/a.jpg\tx\n/b.jpg\n/c.jpg\tz\n"),
        ("list.jsonl", b'{"image_uri": "/a.jpg", "alt": "x"}\n{"image_uri": \n{"image_uri": "/c.jpg", "alt": "z"}\n'),
        (
            "list.jsonl",
            b'{"image_uri": "/a.jpg", "alt": "x"}\n{"image_uri": "/b", "alt": "\\ud800"}\n'
            b'{"image_uri": "/c.jpg", "alt": "z"}\n',
        ),
        (
            "list.jsonl",
            b'{"image_uri": "/a.jpg", "alt": "x"}\n{"image_uri": "/b", "image_id": ' + b"9" * 5000 + b"}\n"
            b'{"image_uri": "/c.jpg", "alt": "z"}\n',
        ),
        (
            "list.json",
            b'[{"image_uri": "/a.jpg", "alt": "x"}, {"image_uri": "/b", "image_id": ' + b"9" * 5000 + b"},"
            b'{"image_uri": "/c.jpg", "alt": "z"}]',
        ),
        ("list.csv", b"image_id,image_uri,alt\n,/a.jpg,x\na\x01,/b.jpg,\n,/c.jpg,z\n"),
        ("list.tsv", "image_id\timage_uri\talt\n\t/a.jpg\tx\na\x85\x80\t/b.jpg\t\n\t/c.jpg\tz\n".encode()),
        (
            "list.jsonl",
            b'{"image_uri": "/a.jpg", "alt": "x"}\n{"image_id": "\\udfff", "image_uri": "/b", "alt": "y"}\n'
            b'{"image_uri": "/c.jpg", "alt": "z"}\n',
        ),
    ],
)
def test_a_malformed_row_takes_no_other_with_it(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name, ("alt",)) == [
        {"image_id": "/a.jpg", "image_uri": "/a.jpg", "alt": "x"},
        {"image_id": f"{tmp_path}/{name}#row=2", "image_uri": "", "alt": None},
        {"image_id": "/c.jpg", "image_uri": "/c.jpg", "alt": "z"},
    ]


@pytest.mark.parametrize("column", ["image_uri", "image_id", "alt", "tags"])
def test_a_row_of_parquet_that_is_not_utf8_takes_no_other_with_it(tmp_path: Path, column: str) -> None:
    columns = {
        name: pa.array([f"/{name}{row}" for row in range(3)]) for name in ("image_uri", "image_id", "alt", "tags")
    }
    columns[column] = pa.array([b"/fine", b"/caf\xe9", b"/fine too"]).view(pa.string())
    columns["tags"] = pa.ListArray.from_arrays([0, 1, 2, 3], columns["tags"])
    pq.write_table(pa.table(columns), tmp_path / "list.parquet")
    rows = read(tmp_path / "list.parquet", ("alt", "tags"))
    assert rows[1] == {"image_id": f"{tmp_path}/list.parquet#row=2", "image_uri": "", "alt": None, "tags": None}
    assert [rows[0][column], rows[2][column]] == (
        [["/fine"], ["/fine too"]] if column == "tags" else ["/fine", "/fine too"]
    )


@pytest.mark.parametrize(
    ("name", "content", "uris"),
    [
        ("quotes.tsv", b'image_uri\tcap\n/0\t"hello\n/1\tworld\n/2\tz\n', ["/0", "/1", "/2"]),
        ("cr.csv", b"image_uri,a\r/1,x\r/2,y\r", ["/1", "/2"]),
        ("semicolons.csv", b"image_uri;a\n/1;x\n", ["/1"]),
        ("utf16.csv", "image_uri,a\n/\u00fc,x\n".encode("utf-16"), ["/\u00fc"]),
        ("cc3m.tsv", b"a bus\thttp://x/1\n", ["http://x/1"]),
        ("zipped.txt.gz", gzip.compress(b"/1  \n\n/2\t\n", mtime=0), ["/1", "/2"]),
        ("blanks.txt", "/\u30001\u00a0\n".encode(), ["/\u30001\u00a0"]),
        ("zipped.jsonl.gz", gzip.compress(b'{"image_uri": "/1"}\n', mtime=0), ["/1"]),
        ("zipped.json.gz", gzip.compress(b'["/1"]', mtime=0), ["/1"]),
    ],
)
def test_shapes_of_the_field_need_no_options(tmp_path: Path, name: str, content: bytes, uris: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    assert [row["image_uri"] for row in read(tmp_path / name)] == uris


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_json_values_stay_what_they_are(tmp_path: Path, suffix: str) -> None:
    ids = [1, 2**53 + 1, 2**64, "2024-01-02T03:04:05", 7.0]
    notes = [2**64, 1, "", "x", {"a": 1}]
    rows = [{"image_id": each, "image_uri": f"/{n}", "note": notes[n]} for n, each in enumerate(ids)]
    write(tmp_path / f"list{suffix}", rows)
    found = read(tmp_path / f"list{suffix}", ("note",))
    assert [row["image_id"] for row in found] == ["1", "9007199254740993", str(2**64), "2024-01-02T03:04:05", "7"]
    assert [row["note"] for row in found] == [str(2**64), "1", "", "x", '{"a": 1}']


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize("column", ["image_uri", "image_id", "note"])
@pytest.mark.parametrize("value", ["1e999", "true", "[1]", '"\\ud800"'])
def test_what_is_no_name_and_a_number_out_of_range_is_a_malformed_row(
    tmp_path: Path, suffix: str, column: str, value: str
) -> None:
    rows = [
        {"image_id": '"i"', "image_uri": '"/i"', "note": "1.5"},
        {"image_id": '""', "image_uri": '"/j"', "note": "2"},
    ]
    rows.insert(1, {**rows[0], column: value})
    lines = ["{" + ", ".join(f'"{name}": {text}' for name, text in row.items()) + "}" for row in rows]
    file = tmp_path / f"list{suffix}"
    file.write_text("\n".join(lines) if suffix == ".jsonl" else f"[{','.join(lines)}]")
    first, wrong, last = read(file, ("note",))
    assert (first["image_uri"], last["image_uri"], last["image_id"]) == ("/i", "/j", "/j")
    if column != "note" or value in ("1e999", '"\\ud800"'):
        assert (wrong["image_uri"], wrong["image_id"]) == ("", f"{file}#row=2")
    else:  # any JSON is a note
        assert (wrong["image_uri"], wrong["image_id"]) == ("/i", "i")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.parquet", b"not parquet", "cannot be read"),
        ("list.csv", b"", "lacks the column"),
        ("list.json", b'[{"image_uri": "a.jpg"}, {"image_uri":', "cannot be read"),
        ("list.json", b'{"images": []}', "cannot be read"),
        ("list.json", b"[1, 2]", "cannot be read"),
        ("list.json", b'[{"a":' * 100_000, "cannot be read"),
        ("list.txt", b"a.jpg\n\xff\xfe\n", "not UTF-8"),
    ],
)
def test_a_damaged_list_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SchemaError, match=message) as damaged:
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


@pytest.mark.parametrize("name", ["list.txt", "list.csv", "list.tsv", "list.jsonl", "list.json"])
@pytest.mark.parametrize("compressed", [False, True])
def test_a_row_without_end_stops_the_reading(
    tmp_path: Path, name: str, compressed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compressed list of kilobytes may hold one of gigabytes."""
    monkeypatch.setattr(tables, "_LONGEST_LINE", 10_000)
    monkeypatch.setattr(image_lists, "_BLOCK_BYTES", 10_000)
    monkeypatch.setattr(image_lists, "_LONGEST_ELEMENT", 10_000)
    start = {"list.txt": "a.jpg\n", "list.csv": "image_uri,n\n", "list.tsv": "image_uri\tn\n", "list.jsonl": ""}.get(
        name
    )
    content = (start if start is not None else '[{"image_uri": "') + "x" * 50_000
    file = tmp_path / (f"{name}.gz" if compressed else name)
    file.write_bytes(gzip.compress(content.encode()) if compressed else content.encode())
    with pytest.raises(SchemaError, match=r"too long|cannot be read") as error:
        read(file)
    assert len(str(error.value)) < 2_000


def test_rows_of_parquet_come_in_batches_of_few_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_lists, "_BATCH_BYTES", 10_000)
    pq.write_table(pa.table({"image_uri": [f"{n:04d}" * 100 for n in range(100)]}), tmp_path / "list.parquet")
    lengths = [len(table) for table in ImageList(str(tmp_path / "list.parquet"), InputConfig()).tables()]
    assert sum(lengths) == 100
    assert max(lengths) <= 30
