"""Copies a run's captions into one file of another format: JSON Lines or CSV.

The file appears whole or not at all, and each image is in it once, also while the run goes on (`reading`). It streams:
memory does not grow with the run.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Literal, cast

from smallcap import storage
from smallcap.output.reading import Captions
from smallcap.output.webdataset import plain_values

ExportFormat = Literal["jsonl", "csv"]

_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")  # of texts that a spreadsheet would run


def export_captions(captions: Captions, file: str, kind: ExportFormat, raw: bool = False) -> int:
    """Writes the rows to a file, which replaces one that is there; returns how many there are.

    Values are as JSON has them: bytes are base64, numbers that are not finite are null, dates and decimals are text.

    Args:
        captions: The rows, with the columns to write.
        file: The file's URI; one that ends with `.gz` is compressed.
        kind: `jsonl` is an object per line. `csv` has a line of names; lists are JSON in their fields, and nulls are
            empty.
        raw: Whether CSV has texts as they are. Otherwise an apostrophe precedes those that a spreadsheet would run as
            formulas.

    Raises:
        SchemaError: A part of the run is damaged.
        StorageError: The service fails.
    """
    with storage.scratch_folder() as folder:
        path = folder / "export"
        with _open_text(path, compressed=file.endswith(".gz")) as text:
            write = _line_writer(text) if kind == "jsonl" else _csv_writer(text, captions.schema.names, raw)
            count = 0
            for row in captions.rows():
                write(plain_values(row))
                count += 1
        storage.move_in(path, file)
    return count


def _open_text(path: Path, compressed: bool) -> IO[str]:
    if not compressed:
        return path.open("w", encoding="utf-8", newline="")
    return cast("IO[str]", gzip.open(path, "wt", encoding="utf-8", newline=""))


def _line_writer(text: IO[str]) -> Callable[[dict[str, Any]], object]:
    return lambda row: text.write(json.dumps(row, ensure_ascii=False) + "\n")


def _csv_writer(text: IO[str], names: list[str], raw: bool) -> Callable[[dict[str, Any]], object]:
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([_field(name, raw) for name in names])
    return lambda row: writer.writerow([_field(row[name], raw) for name in names])


def _field(value: Any, raw: bool) -> Any:
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, str) and not raw and value.startswith(_FORMULA_STARTS):
        return f"'{value}"
    return value
