from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from index_builder.dumps.formats import Columns, DumpRow, read_rows
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


EMBEDDED = Columns("caption", "image", "embedding")
UNIT = [[0.6, 0.8], [1.0, 0.0]]


def parquet_rows(path: Path, embeddings: pa.Array, columns: Columns = EMBEDDED) -> list[DumpRow]:
    table = pa.table({"embedding": embeddings, "caption": [f"text {row}" for row in range(len(embeddings))]})
    pq.write_table(table, path / "d.parquet")
    return list(read_rows(path / "d.parquet", "d", columns))


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (pa.list_(pa.float32()), "<f4"),
        (pa.large_list(pa.float32()), "<f4"),
        (pa.list_(pa.float32(), 2), "<f4"),
        (pa.list_(pa.float64()), "<f4"),
        (pa.list_(pa.float16()), "<f2"),
        (pa.list_(pa.float16(), 2), "<f2"),
    ],
)
def test_parquet_embeddings_become_unit_vectors(tmp_path: Path, kind: pa.DataType, dtype: str) -> None:
    half = np.float16 if dtype == "<f2" else float
    values = [[half(number) for number in vector] for vector in ([3.0, 4.0], [1.0, 0.0], [0.0, 0.0], [1.0, math.nan])]
    rows = parquet_rows(tmp_path, pa.array([values[0], None, values[1], values[2], values[3], [half(1), None]], kind))
    unit = [np.array(vector, dtype).tobytes() for vector in UNIT]
    assert [row.vector for row in rows] == [unit[0], None, unit[1], None, None, None]
    assert [row.problem for row in rows] == ["", "", "", "bad_embedding", "bad_embedding", "bad_embedding"]
    assert [(row.text, row.line) for row in rows] == [(f"text {row}", row + 1) for row in range(6)]


def test_parquet_embeddings_over_many_batches(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(2500, 3)).astype(np.float32)
    rows = parquet_rows(tmp_path, pa.array([None if row % 7 == 0 else list(vectors[row]) for row in range(2500)]))
    for number, row in enumerate(rows):
        if number % 7 == 0:
            assert row.vector is None
        else:
            unit = vectors[number] / np.linalg.norm(vectors[number])
            np.testing.assert_allclose(np.frombuffer(row.vector or b"", "<f4"), unit, atol=1e-3)
    assert not any(row.problem for row in rows)


def test_parquet_without_the_embedding_column_or_without_any_embedding(tmp_path: Path) -> None:
    nothing = parquet_rows(tmp_path, pa.nulls(2, pa.list_(pa.float32())))
    assert nothing == parquet_rows(tmp_path, pa.array([1, 2]), Columns("caption", None, "other"))
    assert nothing == [DumpRow("text 0", None, 1), DumpRow("text 1", None, 2)]


@pytest.mark.parametrize(
    ("embeddings", "dim", "message"),
    [
        (pa.array(["a"]), None, r"wrong type(.|\n)*d: embedding(.|\n)*found: string"),
        (pa.array([[1, 2]]), None, r"wrong type(.|\n)*found: list<.*int64>"),
        (pa.array([[1.0, 2.0], [1.0]]), None, r"wrong length(.|\n)*d: embedding(.|\n)*2 numbers(.|\n)*found: 1"),
        (pa.array([[1.0, 2.0]]), 3, r"wrong length(.|\n)*3 numbers(.|\n)*found: 2"),
        (pa.array([[1.0, 2.0], []]), None, r"wrong length(.|\n)*found: 0"),
        (pa.array([[]], pa.list_(pa.float32())), None, r"wrong length(.|\n)*at least one"),
    ],
)
def test_parquet_embeddings_of_a_wrong_type_or_length(
    tmp_path: Path, embeddings: pa.Array, dim: int | None, message: str
) -> None:
    with pytest.raises(SchemaError, match=message):
        parquet_rows(tmp_path, embeddings, EMBEDDED._replace(dim=dim))


def test_damaged_parquet_is_an_error_and_no_fault(tmp_path: Path) -> None:
    table = pa.table(
        {"caption": [f"text {row}" for row in range(500)], "embedding": [[1.0, float(row)] for row in range(500)]}
    )
    pq.write_table(table, tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    random = Random(0)
    for cut in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        with pytest.raises(SchemaError):
            rows_of(tmp_path / "d.parquet", whole[:cut], EMBEDDED)
    for _ in range(100):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[random.randrange(4, len(whole) - 8)] = random.randrange(256)
        with suppress(SchemaError):
            rows_of(tmp_path / "d.parquet", bytes(damaged), EMBEDDED)


def test_parquet_text_that_is_not_utf8(tmp_path: Path) -> None:
    text = pa.array([b"caf\xe9"]).view(pa.string())
    pq.write_table(pa.table({"caption": text}), tmp_path / "d.parquet")
    with pytest.raises(SchemaError, match=r"not UTF-8(.|\n)*d: caption(.|\n)*0xe9"):
        list(read_rows(tmp_path / "d.parquet", "d", COLUMNS))


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


def test_json_list_of_strings(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "d.json", json.dumps(["a", 5, None]).encode())
    assert rows == [DumpRow("a", None, 1), DumpRow("", None, 2, "malformed"), DumpRow("", None, 3)]


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
