from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from index_builder.dump_formats import Columns, DumpRow, read_rows
from smallcap.errors import SchemaError

COLUMNS = Columns("caption", "image")


def rows_of(path: Path, content: bytes, columns: Columns = COLUMNS) -> list[DumpRow]:
    path.write_bytes(content)
    return list(read_rows(path, str(path), columns))


def test_csv_with_quotes_commas_newlines_bom_and_crlf(tmp_path: Path) -> None:
    content = '\ufeffimage,caption\r\na.jpg,"a ""big"" dog, running"\r\nb.jpg,"two\r\nlines"\r\n\r\nc.jpg,café\r\n'
    assert rows_of(tmp_path / "d.csv", content.encode()) == [
        DumpRow('a "big" dog, running', "a.jpg", 2),
        DumpRow("two\r\nlines", "b.jpg", 3),
        DumpRow("café", "c.jpg", 6),
    ]


def test_csv_rows_with_a_wrong_number_of_fields_are_malformed(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "d.csv", b'image,caption\na,one, two\nb\nc,"x"y\nd,fine\n')
    assert [(row.line, row.problem) for row in rows] == [(2, "malformed"), (3, "malformed"), (4, "malformed"), (5, "")]


def test_csv_quote_that_never_ends_names_its_line(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match=r"never ends(.|\n)*line 3"):
        rows_of(tmp_path / "d.csv", b'image,caption\na,fine\nb,"no end\nc,swallowed\n')


def test_tsv(tmp_path: Path) -> None:
    assert rows_of(tmp_path / "d.tsv", b"caption\timage\na dog, here\tx\n") == [DumpRow("a dog, here", "x", 2)]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_not_utf8_names_line_and_byte(tmp_path: Path, suffix: str) -> None:
    content = {".csv": b"image,caption\na,caf\xe9\n", ".jsonl": b'{"caption": "a"}\n{"caption": "caf\xe9"}\n'}[suffix]
    with pytest.raises(SchemaError, match=r"not UTF-8(.|\n)*line 2(.|\n)*0xe9(.|\n)*iconv"):
        rows_of(tmp_path / f"d{suffix}", content)


def test_jsonl_counts_what_is_no_object_or_no_string(tmp_path: Path) -> None:
    lines = ['{"caption": "a", "image": 7}', "nonsense", "[1]", '{"caption": 5}', "", '{"image": "x"}']
    rows = rows_of(tmp_path / "d.jsonl", "\n".join(lines).encode())
    assert rows == [
        DumpRow("a", "7", 1),
        DumpRow("", None, 2, "malformed"),
        DumpRow("", None, 3, "malformed"),
        DumpRow("", None, 4, "malformed"),
        DumpRow("", "x", 6),
    ]


def test_parquet_with_dictionary_texts_and_integer_ids(tmp_path: Path) -> None:
    table = pa.table(
        {"caption": pa.array(["a", None, "a"]).dictionary_encode(), "image": [1, 2, 3], "other": [0, 0, 0]}
    )
    pq.write_table(table, tmp_path / "d.parquet")
    rows = list(read_rows(tmp_path / "d.parquet", "d", COLUMNS))
    assert rows == [DumpRow("a", "1", 1), DumpRow("", "2", 2), DumpRow("a", "3", 3)]


def test_parquet_text_of_a_wrong_type(tmp_path: Path) -> None:
    pq.write_table(pa.table({"caption": [["a"]]}), tmp_path / "d.parquet")
    with pytest.raises(SchemaError, match=r"wrong type(.|\n)*list"):
        list(read_rows(tmp_path / "d.parquet", "d", COLUMNS))


def test_coco_joins_file_names(tmp_path: Path) -> None:
    content = {
        "images": [{"id": 1, "file_name": "one.jpg"}],
        "annotations": [{"image_id": 1, "caption": "a"}, {"image_id": 2, "caption": "b"}, 5, {"image_id": [1]}],
    }
    rows = rows_of(tmp_path / "d.json", json.dumps(content).encode())
    assert rows[:2] == [DumpRow("a", "one.jpg", 1), DumpRow("b", "2", 2)]
    assert [row.problem for row in rows[2:]] == ["malformed", "malformed"]


def test_karpathy_sentences(tmp_path: Path) -> None:
    content = {"images": [{"filename": "one.jpg", "sentences": [{"raw": "a"}, {"raw": "b"}]}]}
    rows = rows_of(tmp_path / "d.json", json.dumps(content).encode())
    assert rows == [DumpRow("a", "one.jpg", 1), DumpRow("b", "one.jpg", 2)]


@pytest.mark.parametrize(
    ("name", "content"),
    [("d.csv", b"image,text\na,b\n"), ("d.csv", b""), ("d.jsonl", b'{"text": "a"}\n'), ("d.parquet", None)],
)
def test_missing_text_column_names_found_columns_and_remedy(tmp_path: Path, name: str, content: bytes | None) -> None:
    if content is None:
        pq.write_table(pa.table({"text": ["a"]}), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SchemaError, match=r"expected: caption(.|\n)*found: (.*text|no columns)(.|\n)*--text-column"):
        list(read_rows(tmp_path / name, name, COLUMNS))


@pytest.mark.parametrize(("name", "content"), [("d.json", b"[1]"), ("d.json", b"{"), ("d.parquet", b"PAR1")])
def test_files_that_are_not_what_their_suffix_says(tmp_path: Path, name: str, content: bytes) -> None:
    with pytest.raises(SchemaError):
        rows_of(tmp_path / name, content)


def test_dumps_without_an_image_column_have_no_ids(tmp_path: Path) -> None:
    assert rows_of(tmp_path / "d.csv", b"caption\na\n") == [DumpRow("a", None, 2)]
    assert rows_of(tmp_path / "e.csv", b"caption,image\na,b\n", Columns("caption", None)) == [DumpRow("a", None, 2)]
