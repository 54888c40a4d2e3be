"""Readers of caption dumps: CSV, TSV, JSONL, Parquet, COCO captions and Karpathy's splits, one row at a time.

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
import pyarrow.parquet as pq

from smallcap.errors import SchemaError

_PARQUET_BATCH_ROWS = 10_000


class Columns(NamedTuple):
    """The columns of a dump that matter."""

    text: str
    image_id: str | None


class DumpRow(NamedTuple):
    """One row of a dump, as it stands there."""

    text: str
    image_id: str | None
    line: int  # counted from 1; a row number where the format has no lines
    problem: str = ""


def read_rows(path: Path, uri: str, columns: Columns) -> Iterator[DumpRow]:
    """Reads a dump's rows in order.

    Args:
        path: Local copy; its suffix names the format.
        uri: What errors call it.
        columns: The columns to read; the image id's is ignored where the dump has none.

    Raises:
        SchemaError: The file is not of its suffix's format, not UTF-8, or lacks the text column.
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
            yield _json_row(row.get(columns.text), row.get(columns.image_id or ""), number)


def _read_parquet(path: Path, uri: str, columns: Columns) -> Iterator[DumpRow]:
    try:
        file = pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise SchemaError("This is not a Parquet file.", where=uri, found=str(error)) from error
    names = file.schema_arrow.names
    _position(names, columns.text, uri)
    wanted = [name for name in dict.fromkeys((columns.text, columns.image_id)) if name in names]
    line = 0
    for batch in file.iter_batches(_PARQUET_BATCH_ROWS, columns=wanted):
        texts = _parquet_strings(batch.column(columns.text), columns.text, uri)
        image_ids: list[str | None] = [None] * len(texts)
        if columns.image_id is not None and columns.image_id in wanted:
            image_ids = _parquet_strings(batch.column(columns.image_id), columns.image_id, uri)
        for text, image_id in zip(texts, image_ids, strict=True):
            line += 1
            yield DumpRow(text or "", image_id, line)


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
    strings: list[str | None] = column.cast(pa.string()).to_pylist()
    return strings


def _read_coco(path: Path, uri: str, columns: Columns) -> Iterator[DumpRow]:
    """Reads COCO captions (`annotations`, joined with `images`) or Karpathy's splits (`images[].sentences[].raw`)."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:  # UnicodeDecodeError is one
        raise SchemaError("This is not a JSON file.", where=uri, found=str(error)) from error
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
            expected="COCO's annotations[].caption, or images[].sentences[].raw",
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
        yield _json_row(annotation.get("caption"), image_id, number)


def _karpathy_rows(images: list[Any]) -> Iterator[DumpRow]:
    number = 0
    for image in images:
        sentences = image.get("sentences") if isinstance(image, dict) else None
        for sentence in sentences if isinstance(sentences, list) else [None]:
            number += 1
            if isinstance(sentence, dict):
                yield _json_row(sentence.get("raw"), image.get("filename"), number)
            else:
                yield DumpRow("", None, number, problem="malformed")


def _json_row(text: Any, image_id: Any, line: int) -> DumpRow:
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
    ".json": _read_coco,
}
