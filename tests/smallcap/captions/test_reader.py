import csv
import gzip
import io
import json
import math
from contextlib import suppress
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smallcap import storage
from smallcap.captions.reader import open_captions
from smallcap.captions.rows import CaptionColumns, CaptionRow
from smallcap.errors import ConfigError, SchemaError, StorageError

COLUMNS = CaptionColumns("caption", "image")


def read(path: Path, columns: CaptionColumns = COLUMNS) -> list[CaptionRow]:
    with open_captions(str(path), columns) as rows:
        return list(rows)


def rows_of(path: Path, content: bytes, columns: CaptionColumns = COLUMNS) -> list[CaptionRow]:
    path.write_bytes(content)
    return read(path, columns)


def test_csv_with_quotes_commas_newlines_bom_and_crlf(tmp_path: Path) -> None:
    content = '\ufeffimage,caption\r\na.jpg,"a ""big"" dog, running"\r\nb.jpg,"two\r\nlines"\r\n\r\nc.jpg,café\r\n'
    assert rows_of(tmp_path / "d.csv", content.encode()) == [
        CaptionRow('a "big" dog, running', "a.jpg", 2),
        CaptionRow("two\r\nlines", "b.jpg", 3),
        CaptionRow("café", "c.jpg", 6),
    ]
    assert rows_of(tmp_path / "d.tsv", b"caption\timage\na dog, here\tx\n") == [CaptionRow("a dog, here", "x", 2)]
    no_image = [CaptionRow("a", None, 2)]
    assert rows_of(tmp_path / "d.csv", b"caption\na\n") == no_image
    assert rows_of(tmp_path / "d.csv", b"caption,image\na,b\n", CaptionColumns("caption")) == no_image


def test_csv_rows_and_quotes_that_are_malformed(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "d.csv", b'image,caption\na,one, two\nb\nc,"x"y\nd,fine\n')
    assert [(row.line, row.problem) for row in rows] == [(2, "malformed"), (3, "malformed"), (4, "malformed"), (5, "")]
    rows = rows_of(tmp_path / "d.csv", b'image,caption\na,fine\nb,"no end\nc,kept\nd,"a ""quote"""\n')
    assert [(row.text, row.line, row.problem) for row in rows] == [
        ("fine", 2, ""),
        ("", 3, "malformed"),
        ("kept", 4, ""),
        ('a "quote"', 5, ""),
    ]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_not_utf8_names_line_and_byte(tmp_path: Path, suffix: str) -> None:
    content = {".csv": b"image,caption\na,caf\xe9\n", ".jsonl": b'{"caption": "a"}\n{"caption": "caf\xe9"}\n'}[suffix]
    with pytest.raises(SchemaError, match=r"not UTF-8(.|\n)*line 2(.|\n)*0xe9(.|\n)*iconv"):
        rows_of(tmp_path / f"d{suffix}", content)


def test_jsonl_counts_what_is_no_object_or_no_string(tmp_path: Path) -> None:
    lines = ['{"caption": "a", "image": 7}', "nonsense", "[1]", '{"caption": 5}', "", '{"image": "x"}']
    rows = rows_of(tmp_path / "d.jsonl", "\n".join(lines).encode())
    assert [row[:4] for row in rows] == [
        ("a", "7", 1, ""),
        ("", None, 2, "malformed"),
        ("", None, 3, "malformed"),
        ("", None, 4, "malformed"),
        ("", "x", 6, ""),
    ]
    assert [row.found for row in rows] == ["", "'nonsense\\n'", "'[1]\\n'", "{'caption': 5}", "{'image': 'x'}"]


def test_remote_files_and_unknown_kinds(tmp_path: Path, s3: str) -> None:
    pq.write_table(pa.table({"caption": ["a", "b"], "image": ["x", "y"]}), tmp_path / "d.parquet")
    (tmp_path / "d.csv").write_text("caption,image\na,x\nb,y\n")
    for name in ("d.csv", "d.parquet"):
        storage.upload(tmp_path / name, f"{s3}/{name}")
        with open_captions(f"{s3}/{name}", COLUMNS) as rows:
            assert list(rows) == read(tmp_path / name)
    storage.write_bytes(f"{s3}/d.md", b"a")
    with pytest.raises(ConfigError, match="captions file is unknown"), open_captions(f"{s3}/d.md", COLUMNS):
        pass
    with pytest.raises(StorageError, match="does not exist"), open_captions(f"{s3}/none.csv", COLUMNS):
        pass


def test_lists_of_captions_are_a_row_each(tmp_path: Path) -> None:
    texts = [["a", "b"], None, [], ["c", None]]
    expected = [("a", "0", 1), ("b", "0", 1), ("", "1", 2), ("", "2", 3), ("c", "3", 4), ("", "3", 4)]
    (tmp_path / "d.jsonl").write_text(
        "\n".join(json.dumps({"captions": text, "image": number}) for number, text in enumerate(texts))
    )
    for kind in (pa.list_(pa.string()), pa.large_list(pa.string())):
        table = pa.table({"captions": pa.array(texts, kind), "image": range(4), "path": ["p", None, "q", "r"]})
        pq.write_table(table, tmp_path / "d.parquet")
        for name in ("d.jsonl", "d.parquet"):
            assert [row[:3] for row in read(tmp_path / name)] == expected
    paths = [row.image_path for row in read(tmp_path / "d.parquet", COLUMNS._replace(image_path="path"))]
    assert paths == ["p", "p", None, "q", "r", "r"]
    with pytest.raises(SchemaError, match="wrong type"):  # a row's embedding belongs to one caption
        read(tmp_path / "d.parquet", COLUMNS._replace(several=False))


def test_parquet_with_dictionary_texts_and_integer_ids(tmp_path: Path) -> None:
    table = pa.table(
        {"caption": pa.array(["a", None, "a"]).dictionary_encode(), "image": [1, 2, 3], "other": [0, 0, 0]}
    )
    pq.write_table(table, tmp_path / "d.parquet")
    assert read(tmp_path / "d.parquet") == [CaptionRow("a", "1", 1), CaptionRow("", "2", 2), CaptionRow("a", "3", 3)]


EMBEDDED = COLUMNS._replace(embedding="embedding")
UNIT = [[0.6, 0.8], [1.0, 0.0]]


def parquet_rows(path: Path, embeddings: pa.Array, columns: CaptionColumns = EMBEDDED) -> list[CaptionRow]:
    table = pa.table({"embedding": embeddings, "caption": [f"text {row}" for row in range(len(embeddings))]})
    pq.write_table(table, path / "d.parquet")
    return read(path / "d.parquet", columns)


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
    assert nothing == parquet_rows(tmp_path, pa.array([1, 2]), CaptionColumns("caption", embedding="other"))
    assert nothing == [CaptionRow("text 0", None, 1), CaptionRow("text 1", None, 2)]


@pytest.mark.parametrize(
    ("embeddings", "dim", "message"),
    [
        (pa.array(["a"]), None, r"wrong type(.|\n)*d.parquet: embedding(.|\n)*found: string"),
        (pa.array([[1, 2]]), None, r"wrong type(.|\n)*found: list<.*int64>"),
        (pa.array([[1.0, 2.0], [1.0]]), None, r"wrong length(.|\n)*parquet: embedding(.|\n)*2 numbers(.|\n)*found: 1"),
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (pa.array([b"caf\xe9"]).view(pa.string()), r"not UTF-8(.|\n)*d.parquet: caption(.|\n)*0xe9"),
        (pa.array([[1.0]]), r"wrong type(.|\n)*double"),
    ],
)
def test_parquet_text_that_cannot_be_read(tmp_path: Path, text: pa.Array, message: str) -> None:
    pq.write_table(pa.table({"caption": text}), tmp_path / "d.parquet")
    with pytest.raises(SchemaError, match=message):
        read(tmp_path / "d.parquet")


def test_coco_joins_file_names(tmp_path: Path) -> None:
    content = {
        "images": [{"id": 1, "file_name": "one.jpg"}, {"file_name": "nameless.jpg"}, {"id": 3}],
        "annotations": [
            {"image_id": "1", "caption": "a"},
            {"image_id": 2, "caption": "b"},
            {"image_id": 3},
            5,
            {"image_id": [1]},
        ],
    }
    rows = rows_of(tmp_path / "d.json", json.dumps(content).encode())
    strings = rows_of(tmp_path / "e.json", json.dumps(["a", 5, None]).encode())
    assert [(row.place, row.text, row.problem) for row in strings] == [
        ("[0]", "a", ""),
        ("[1]", "", "malformed"),
        ("[2]", "", ""),
    ]
    assert [(row.place, row.text, row.image_id, row.dataset_id, row.problem) for row in rows] == [
        ("images[1]", "", None, None, "malformed"),
        ("annotations[0]", "a", "one.jpg", "1", ""),
        ("annotations[1]", "b", "2", "2", ""),
        ("annotations[2]", "", "3", "3", ""),
        ("annotations[3]", "", None, None, "malformed"),
        ("annotations[4]", "", None, None, "malformed"),
    ]


def test_numbers_of_coco_and_karpathy_are_one_whether_whole_or_not(tmp_path: Path) -> None:
    long = "9" * 5000
    content = f"""{{"images": [{{"id": 7.0, "file_name": "one.jpg"}}, {{"id": {long}}}],
        "annotations": [{{"image_id": 7, "caption": "a"}}, {{"image_id": 7.0, "caption": "b"}},
        {{"image_id": 1e999, "caption": "c"}}, {{"image_id": {long}, "caption": "d"}},
        {{"image_id": "\\ud800", "caption": "e"}}, {{"image_id": 7, "caption": "\\udfff"}}]}}"""
    rows = rows_of(tmp_path / "d.json", content.encode())
    assert [(row.image_id, row.text, row.problem) for row in rows] == [
        (None, "", "malformed"),
        ("one.jpg", "a", ""),
        ("one.jpg", "b", ""),
        *[(None, "", "malformed")] * 4,
    ]
    sentence = '{"raw": "x"}'
    for number, problem in (("7", ""), ("7.0", ""), ("1e999", "malformed"), (long, "malformed"), ("null", "")):
        content = f'{{"images": [{{"filename": "a.jpg", "cocoid": {number}, "sentences": [{sentence}]}}]}}'
        (row,) = rows_of(tmp_path / "d.json", content.encode())
        assert (row.problem, row.dataset_id) == (problem, "7" if number.startswith("7") else None)


def test_karpathy_sentences(tmp_path: Path) -> None:
    sentences = [{"raw": "A.", "tokens": ["a"]}, {"raw": "b"}, {"tokens": ["c"]}, 5]
    image = {"filename": "one.jpg", "filepath": "2014", "cocoid": 7, "split": "val", "sentences": sentences}
    content = json.dumps({"images": [image, {"filename": "two.jpg", "sentences": []}, {"filename": "x"}]}).encode()
    rows = rows_of(tmp_path / "d.json", content)
    assert [(row.place, row.text, row.problem) for row in rows] == [
        ("images[0].sentences[0]", "A.", ""),
        ("images[0].sentences[1]", "b", ""),
        ("images[0].sentences[2]", "", ""),
        ("images[0].sentences[3]", "", "malformed"),
        ("images[2]", "", "malformed"),
    ]
    assert rows[1][5:8] == ("2014/one.jpg", "7", "val")
    assert rows[1].image_id == "one.jpg"
    tokens = rows_of(tmp_path / "d.json", content, COLUMNS._replace(tokens=True))
    assert [row.text for row in tokens] == ["a", "b", "c", "", ""]


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
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"), [("d.json", b"[1]"), ("d.json", b"{"), ("d.parquet", b"PAR1"), ("d.csv", b"")]
)
def test_files_that_are_not_what_their_suffix_says(tmp_path: Path, name: str, content: bytes) -> None:
    with pytest.raises(SchemaError):
        rows_of(tmp_path / name, content)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("cr.csv", b"image,caption\r1.jpg,a dog\r2.jpg,a cat\r", [("a dog", "1.jpg"), ("a cat", "2.jpg")]),
        ("utf16.csv", "image,caption\n1.jpg,a d\u00f6g\n".encode("utf-16"), [("a d\u00f6g", "1.jpg")]),
        ("utf16.tsv", b"\xfe\xff" + "caption\nx\n".encode("utf-16-be"), [("x", None)]),
        ("bom.jsonl", '\ufeff{"caption": "x", "image": 1}'.encode(), [("x", "1")]),
        ("semicolons.csv", b'image;caption\n1.jpg;"a; dog"\n', [("a; dog", "1.jpg")]),
        ("tabs.csv", b"image\tcaption\n1.jpg\ta dog, here\n", [("a dog, here", "1.jpg")]),
        ("cc3m.tsv", b"a bus, red\thttp://x/1.jpg\na top\thttp://x/2\n", [("a bus, red", "http://x/1.jpg"), ("a top", "http://x/2")]),
        ("cc12m.tsv", b"https://x/1#2\ta bus\n", [("a bus", "https://x/1#2")]),
        ("results.csv", b"image_name| comment_number| comment\n1.jpg| 0| Two, \"men\n", [('Two, "men', "1.jpg")]),
        ("Flickr8k.token.txt", b"1.jpg#0\tA dog , so\n1.jpg#1\tA .\n", [("A dog , so", "1.jpg"), ("A .", "1.jpg")]),
        ("captions.txt", b"image,caption\n1.jpg,A dog\n", [("A dog", "1.jpg")]),
        ("pairs.csv", b"1.jpg,a dog\n2.jpg,a cat\n", [("a dog", "1.jpg"), ("a cat", "2.jpg")]),
        ("quotes.tsv", b'image\tcaption\n1\t"a dog\n2\t"yes" he\n', [('"a dog', "1"), ('"yes" he', "2")]),
        ("zipped.csv.gz", gzip.compress(b"image,caption\n1,x\n", mtime=0), [("x", "1")]),
        ("zipped.json.gz", gzip.compress(b'["x"]', mtime=0), [("x", None)]),
    ],
)  # fmt: skip
def test_shapes_of_the_field_need_no_options(
    tmp_path: Path, name: str, content: bytes, expected: list[tuple[str, str | None]]
) -> None:
    assert [(row.text, row.image_id) for row in rows_of(tmp_path / name, content)] == expected


def test_tables_without_a_header_are_announced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows_of(tmp_path / "d.tsv", b"a bus\thttp://x/1.jpg\n")
    assert f"{tmp_path}/d.tsv: read as caption, url without a header." in caplog.text


@pytest.mark.parametrize(
    ("content", "seen"),
    [
        (b"1|2|3\n", "1, 2, 3 (UTF-8, separated by |; first line '1|2|3')"),
        (b"a.jpg,one, two\n", "separated by commas; first line 'a.jpg,one, two'"),
        ("a;b\n".encode("utf-16"), "a, b (UTF-16, separated by semicolons; first line 'a;b')"),
    ],
)
def test_an_unknown_table_is_described(tmp_path: Path, content: bytes, seen: str) -> None:
    with pytest.raises(SchemaError, match=r"--text-column(.|\n)*line of names") as error:
        rows_of(tmp_path / "d.csv", content)
    assert seen in error.value.found


def test_a_long_line_and_codes_that_are_no_text_spoil_one_row(tmp_path: Path) -> None:
    long = ("image,caption\n1," + "x" * 140_000 + '\n2,"' + "y" * 140_000 + "\n3,a cat\n").encode()
    assert [(len(row.text), row.problem) for row in rows_of(tmp_path / "d.csv", long)] == [
        (140_000, ""),
        (0, "malformed"),
        (5, ""),
    ]
    codes = b'{"caption": "\\ud800"}\n{"caption": "a\\u0000"}\n{"caption": "x", "image": "\\ud800"}\n'
    codes += b'{"caption": "x", "image": 1e999}\n{"caption": "x\\n", "image": 18446744073709551616}\n'
    rows = rows_of(tmp_path / "d.jsonl", codes)
    assert [row.problem for row in rows] == [*["malformed"] * 4, ""]
    assert rows[-1][:2] == ("x\n", "18446744073709551616")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00\xd8\x41\x00", gzip.compress(b"image,caption\n" * 99, mtime=0)[:-9]])
def test_damaged_text_is_named(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(SchemaError, match=r"not UTF-16|compressed file is damaged"):
        rows_of(tmp_path / "d.csv", content)


TEXT = st.text(st.sampled_from("a1\"',;\t| \r\\é\x00\x1c\u2028\u200b"), max_size=12)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(TEXT, TEXT)))
def test_every_line_of_a_tsv_is_a_row(tmp_path: Path, fields: list[tuple[str, str]]) -> None:
    lines = [f"{image}\t{caption}" for image, caption in fields]
    rows = rows_of(tmp_path / "d.tsv", "\n".join(["image\tcaption", *lines]).encode())
    assert [row.line for row in rows] == list(range(2, len(lines) + 2))
    for row, line in zip(rows, lines, strict=True):
        if not row.problem:
            assert f"{row.image_id}\t{row.text}" == line.rstrip("\r")
        else:
            assert line.count("\t") != 1 or "\x00" in line


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(TEXT, TEXT, st.booleans())))
def test_a_stray_quote_takes_no_record_with_it(tmp_path: Path, fields: list[tuple[str, str, bool]]) -> None:
    content, expected = b"image,caption\n", []
    for number, (image, caption, is_record) in enumerate(fields):
        text = io.StringIO()
        quoting = csv.QUOTE_ALL if "\r" in image + caption else csv.QUOTE_MINIMAL  # CR at a line's end is a line end
        csv.writer(text, lineterminator="\n", quoting=quoting).writerow([f"{number}{image}", f"c{caption}"])
        if is_record:
            expected += [] if "\x00" in image + caption else [(f"{number}{image}", f"c{caption}")]
        content += text.getvalue().encode() if is_record else b'stray,"open\n'
    rows = rows_of(tmp_path / "d.csv", content + b'last,"closed"\n')
    assert [(row.image_id, row.text) for row in rows if not row.problem] == [*expected, ("last", "closed")]
    assert len(rows) == len(fields) + 1


def test_lines_that_a_stray_quote_joins_into_too_many_fields_are_read_again(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "d.csv", b'image,caption\na,"open\nb,",so"\nc,"kept"\n')
    assert [(row.text, row.line, row.problem) for row in rows] == [
        ("", 2, "malformed"),
        (",so", 3, ""),
        ("kept", 4, ""),
    ]


def test_images_of_hugging_face_and_ids_with_nulls(tmp_path: Path) -> None:
    images = [{"bytes": b"x", "path": "a.jpg"}, None, {"bytes": b"y", "path": None}]
    for name in ("image", "picture"):
        pq.write_table(pa.table({name: images, "caption": ["a", "b", "c"]}), tmp_path / "d.parquet")
        assert [row[:2] for row in read(tmp_path / "d.parquet")] == [("a", "a.jpg"), ("b", None), ("c", None)]
    ids = [pa.array([1.0, None, math.nan, 1.5]), pa.nulls(4)]
    expected = [["1", None, None, "1.5"], [None] * 4]
    for column, names in zip(ids, expected, strict=True):
        pq.write_table(pa.table({"image": column, "caption": ["a"] * 4}), tmp_path / "d.parquet")
        assert [row.image_id for row in read(tmp_path / "d.parquet")] == names
