"""Reads captions from text files with one row per line: CSV, TSV and JSONL."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from typing import IO, Any

from smallcap.captions.rows import CaptionColumns, CaptionRow, find_column, json_row, malformed_row
from smallcap.errors import SchemaError


def read_csv(file: IO[bytes], uri: str, columns: CaptionColumns, delimiter: str = ",") -> Iterator[CaptionRow]:
    """Reads a table whose first line names the columns; see `reader.read_captions`."""
    records = _csv_records(csv.reader(_decoded_lines(file, uri), delimiter=delimiter, strict=True), uri)
    _, header = next(records, (1, []))
    names = [name.strip() for name in header or []]
    caption = names.index(find_column(names, columns, uri))
    image_id, image_path = (
        names.index(name) if name in names else None for name in (columns.image_id, columns.image_path)
    )
    for line, record in records:
        if record is None or len(record) != len(names):
            yield malformed_row(line, record)
        else:
            image = None if image_id is None else record[image_id]
            path = None if image_path is None else record[image_path]
            yield CaptionRow(record[caption], image, line, "", None, path)


def _csv_records(reader: Any, uri: str) -> Iterator[tuple[int, list[str] | None]]:
    """Yields each record with the line on which it starts; the record is None where it breaks the rules of CSV."""
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
                    remedy='Close the quote, or double it ("") if it belongs to the text.',
                ) from error
            yield line, None
            continue
        if record:
            yield line, record


def _decoded_lines(file: IO[bytes], uri: str) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise SchemaError(
                "The file is not UTF-8.",
                where=f"{uri}: line {number}",
                found=f"byte 0x{line[error.start]:02x} in column {error.start + 1}",
                remedy="Convert the file first, for example with iconv -f latin1 -t utf-8.",
            ) from error


def read_jsonl(file: IO[bytes], uri: str, columns: CaptionColumns) -> Iterator[CaptionRow]:
    """Reads a JSON object from each line; see `reader.read_captions`."""
    caption = None
    for number, line in enumerate(_decoded_lines(file, uri), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict):
            yield malformed_row(number, line)
            continue
        caption = caption or find_column(entry, columns, uri)
        texts, image_id = entry.get(caption), entry.get(columns.image_id or "")
        path = entry.get(columns.image_path or "")
        for text in (texts or [None]) if columns.several and isinstance(texts, list) else [texts]:
            yield json_row(text, image_id, number, entry, image_path=path if isinstance(path, str) else None)
