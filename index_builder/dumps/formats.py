"""Readers of caption dumps: CSV, TSV, JSONL, Parquet, COCO captions, Karpathy's splits and lists, one row at a time.

Nothing is lost silently. A row that cannot be read (too many or too few fields, no JSON object, a text that is no
string) comes out as a row with `problem` set, to be counted as dropped; what makes the rest of the file doubtful (wrong
encoding, a quote that never closes, a missing column) is an error that names the line.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from index_builder.dumps.vectors import ROWS_AT_ONCE, check_dim, unit_vectors
from smallcap.errors import SchemaError

_PARQUET_BATCH_ROWS = 10_000


class Columns(NamedTuple):
    """The columns of a dump that matter."""

    text: str
    image_id: str | None
    embedding: str | None = None  # of a Parquet file
    dim: int | None = None  # that embeddings must have; by default the first one's


class DumpRow(NamedTuple):
    """One row of a dump, as it stands there.

    `vector` is the text's embedding where the dump brings one: a unit vector as raw little-endian float16 or float32,
    told apart by their length (2 or 4 bytes for each dimension).
    """

    text: str
    image_id: str | None
    line: int  # counted from 1; a row number where the format has no lines
    problem: str = ""
    vector: bytes | None = None


def read_rows(path: Path, uri: str, columns: Columns) -> Iterator[DumpRow]:
    """Reads a dump's rows in order.

    Args:
        path: Local copy; its suffix names the format.
        uri: What errors call it.
        columns: The columns to read; those of the image id and the embedding are ignored where the dump has none.

    Raises:
        SchemaError: The file is not of its suffix's format, not UTF-8, or lacks the text column; or its embeddings have
            the wrong length.
    """
    return FORMATS[path.suffix.lower()](path, uri, columns)


def _read_csv(path: Path, uri: str, columns: Columns, delimiter: str = ",") -> Iterator[DumpRow]:
    with path.open("rb") as file:
        records = _csv_records(csv.reader(_decoded_lines(file, uri), delimiter=delimiter, strict=True), uri)
        _, header = next(records, (1, []))
        names = [name.strip() for name in header or []]
        text = _position(names, columns.text, uri)
        image_id = names.index(columns.image_id) if columns.image_id in names else None
        for line, record in records:
            if record is None or len(record) != len(names):
                yield DumpRow("", None, line, problem="malformed")
            else:
                yield DumpRow(record[text], None if image_id is None else record[image_id], line)


def _read_tsv(path: Path, uri: str, columns: Columns) -> Iterator[DumpRow]:
    return _read_csv(path, uri, columns, delimiter="\t")


def _csv_records(reader: Any, uri: str) -> Iterator[tuple[int, list[str] | None]]:
    """Yields each record with the line it starts on; `None` for one that the CSV rules do not allow."""
    while True:
        line = reader.line_num + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "end of data" in str(error) or "field limit" in str(error):
                raise SchemaError(
                    "A quoted field never ends.",
                    where=f"{uri}: line {line}",
                    found=str(error),
                    remedy='Close the quote, or double it ("") where it belongs to the text.',
                ) from error
            yield line, None
            continue
        if record:
            yield line, record


def _decoded_lines(file: Any, uri: str) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise SchemaError(
                "The dump is not UTF-8.",
                where=f"{uri}: line {number}",
                found=f"byte 0x{line[error.start]:02x} in column {error.start + 1}",
                remedy="Convert it first, for example with iconv -f latin1 -t utf-8.",
            ) from error


def _read_jsonl(path: Path, uri: str, columns: Columns) -> Iterator[DumpRow]:
    seen_object = False
    with path.open("rb") as file:
        for number, line in enumerate(_decoded_lines(file, uri), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                yield DumpRow("", None, number, problem="malformed")
                continue
            if not seen_object:
                _position(list(row), columns.text, uri)
                seen_object = True
            yield json_row(row.get(columns.text), row.get(columns.image_id or ""), number)


def _read_parquet(path: Path, uri: str, columns: Columns) -> Iterator[DumpRow]:
    file = open_parquet(path, uri)
    names = file.schema_arrow.names
    _position(names, columns.text, uri)
    embedding = columns.embedding if columns.embedding in names else None
    wanted = [name for name in dict.fromkeys((columns.text, columns.image_id, embedding)) if name and name in names]
    dim = columns.dim
    line = 0
    for batch in _parquet_batches(file, uri, wanted, _PARQUET_BATCH_ROWS if embedding is None else ROWS_AT_ONCE):
        texts = _parquet_strings(batch.column(columns.text), columns.text, uri)
        image_ids: list[str | None] = [None] * len(texts)
        if columns.image_id is not None and columns.image_id in wanted:
            image_ids = _parquet_strings(batch.column(columns.image_id), columns.image_id, uri)
        if embedding is None:
            for text, image_id in zip(texts, image_ids, strict=True):
                line += 1
                yield DumpRow(text or "", image_id, line)
            continue
        vectors, problems, dim = _parquet_vectors(batch.column(embedding), f"{uri}: {embedding}", dim)
        for row in zip(texts, image_ids, vectors, problems, strict=True):
            line += 1
            yield DumpRow(row[0] or "", row[1], line, row[3], row[2])


def open_parquet(path: Path, uri: str) -> pq.ParquetFile:
    """Opens a Parquet file for reading.

    Raises:
        SchemaError: It is none.
    """
    try:
        return pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last of a column's name
        raise SchemaError("This is not a Parquet file.", where=uri, found=str(error)) from error


def _parquet_batches(file: pq.ParquetFile, uri: str, columns: list[str], rows: int) -> Iterator[pa.RecordBatch]:
    try:
        yield from file.iter_batches(rows, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise SchemaError("The Parquet file is damaged.", where=uri, found=str(error)) from error


def _parquet_vectors(column: pa.Array, where: str, dim: int | None) -> tuple[list[bytes | None], list[str], int | None]:
    """Returns each row's unit vector, its problem, and the vectors' length; a null is a row without an embedding."""
    kind = column.type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not (lists and pa.types.is_floating(kind.value_type)):
        raise SchemaError(
            "The embedding column has the wrong type.",
            where=where,
            expected="list<float>, list<double> or list<halffloat>, of any or of fixed size",
            found=str(kind),
            remedy="Name another column as the embedding's, or none.",
        )
    present = column.is_valid().to_pylist()
    lengths = pc.unique(pc.list_value_length(column.drop_null())).to_pylist()
    for length in lengths:
        check_dim(length, dim, where)
        dim = length
    if dim is None:  # nulls only
        return [None] * len(column), [""] * len(column), None
    numbers = column.flatten().to_numpy(zero_copy_only=False)  # a null number becomes NaN
    units = iter(unit_vectors(numbers.reshape(-1, dim)))
    vectors = [next(units) if there else None for there in present]
    problems = ["bad_embedding" if there and not vector else "" for there, vector in zip(present, vectors, strict=True)]
    return vectors, problems, dim


def _parquet_strings(column: pa.Array, name: str, uri: str) -> list[str | None]:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if not (text or pa.types.is_integer(kind)):
        raise SchemaError(
            "A column of the dump has the wrong type.",
            where=f"{uri}: {name}",
            expected="string",
            found=str(column.type),
            remedy="Name another column with --text-column or --image-id-column.",
        )
    try:
        strings: list[str | None] = column.cast(pa.string()).to_pylist()
    except UnicodeDecodeError as error:
        raise SchemaError(
            "The dump is not UTF-8.",
            where=f"{uri}: {name}",
            found=f"byte 0x{error.object[error.start]:02x}",
            remedy="Write the column again as UTF-8 strings.",
        ) from error
    return strings


def _read_json(path: Path, uri: str, columns: Columns) -> Iterator[DumpRow]:
    """Reads COCO captions (`annotations`, joined with `images`), Karpathy's `images[].sentences[].raw`, or a list."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is one
        raise SchemaError("This is not a JSON file.", where=uri, found=str(error)) from error
    if isinstance(content, list) and content and isinstance(content[0], str):
        yield from (json_row(text, None, number) for number, text in enumerate(content, start=1))
        return
    content = content if isinstance(content, dict) else {}
    images, annotations = content.get("images"), content.get("annotations")
    if isinstance(annotations, list):
        yield from _coco_rows(annotations, images if isinstance(images, list) else [])
    elif isinstance(images, list) and images and isinstance(images[0], dict) and "sentences" in images[0]:
        yield from _karpathy_rows(images)
    else:
        raise SchemaError(
            "This JSON file holds no captions.",
            where=uri,
            expected="COCO's annotations[].caption, images[].sentences[].raw, or a list of strings",
            found=", ".join(list(content)[:10]) or "no JSON object",
            remedy="Write one JSON object per line and name the file .jsonl.",
        )


def _coco_rows(annotations: list[Any], images: list[Any]) -> Iterator[DumpRow]:
    named = [image for image in images if isinstance(image, dict) and "file_name" in image]
    names = {image["id"]: image["file_name"] for image in named if isinstance(image.get("id"), str | int)}
    for number, annotation in enumerate(annotations, start=1):
        if not isinstance(annotation, dict):
            yield DumpRow("", None, number, problem="malformed")
            continue
        image_id = annotation.get("image_id")
        if isinstance(image_id, str | int):
            image_id = names.get(image_id, image_id)
        yield json_row(annotation.get("caption"), image_id, number)


def _karpathy_rows(images: list[Any]) -> Iterator[DumpRow]:
    number = 0
    for image in images:
        sentences = image.get("sentences") if isinstance(image, dict) else None
        for sentence in sentences if isinstance(sentences, list) else [None]:
            number += 1
            if isinstance(sentence, dict):
                yield json_row(sentence.get("raw"), image.get("filename"), number)
            else:
                yield DumpRow("", None, number, problem="malformed")


def json_row(text: Any, image_id: Any, line: int) -> DumpRow:
    """Makes a row of JSON values; a missing text is an empty one, and an id may be a number."""
    if not (text is None or isinstance(text, str)) or not (image_id is None or isinstance(image_id, str | int)):
        return DumpRow("", None, line, problem="malformed")
    return DumpRow(text or "", None if image_id is None else str(image_id), line)


def _position(names: list[str], wanted: str, uri: str) -> int:
    if wanted not in names:
        raise SchemaError(
            "The dump lacks the text column.",
            where=uri,
            expected=wanted,
            found=", ".join(names[:20]) or "no columns",
            remedy="Name the column of the texts with --text-column.",
        )
    return names.index(wanted)


FORMATS: dict[str, Callable[[Path, str, Columns], Iterator[DumpRow]]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".parquet": _read_parquet,
    ".json": _read_json,
}
