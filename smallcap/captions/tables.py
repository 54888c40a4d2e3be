"""Reads captions from text files with one row per line: CSV, TSV, their kin, and JSONL."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO

from smallcap.captions.rows import CaptionColumns, CaptionRow, accepted_names, find_column, json_row, malformed_row
from smallcap.tables import announce, json_lines, read_table


def read_csv(file: IO[bytes], uri: str, columns: CaptionColumns) -> Iterator[CaptionRow]:
    """Reads a table with or without a line of names; see `reader.read_captions`."""
    table = read_table(file, uri, accepted_names(columns))
    caption = table.names.index(table.caption or find_column(table.names, columns, uri, table.seen))
    image_id, image_path = (
        table.names.index(name) if name in table.names else None
        for name in ((table.image if columns.image_id else None) or columns.image_id, columns.image_path)
    )
    if table.note:
        announce(table.note)
    for line, fields in table.rows:
        if isinstance(fields, str):
            yield malformed_row(line, fields)
        else:
            image = None if image_id is None else fields[image_id]
            path = None if image_path is None else fields[image_path]
            yield CaptionRow(fields[caption], image, line, "", None, path)


def read_jsonl(file: IO[bytes], uri: str, columns: CaptionColumns) -> Iterator[CaptionRow]:
    """Reads a JSON object from each line; see `reader.read_captions`."""
    caption = None
    for number, entry in json_lines(file, uri):
        if isinstance(entry, str):
            yield malformed_row(number, entry)
            continue
        caption = caption or find_column(entry, columns, uri)
        texts, image_id = entry.get(caption), entry.get(columns.image_id or "")
        path = entry.get(columns.image_path or "")
        for text in (texts or [None]) if columns.several and isinstance(texts, list) else [texts]:
            yield json_row(text, image_id, number, entry, image_path=path if isinstance(path, str) else None)
