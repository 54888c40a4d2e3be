"""Reads captions from files of any known format, one row at a time.

Nothing is lost silently. An entry that is not a caption (too many or too few fields, no JSON object, a text that is not
a string, a quote that never closes, control codes) becomes a row with `problem` set, which the caller counts or
refuses. What makes the rest of the file doubtful (wrong encoding, a missing column) is an error that names the line.

To add a format, add a function to `FORMATS`; to add a layout of JSON, add a case to `json_files.read_json`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

from smallcap import storage
from smallcap.captions.json_files import read_json
from smallcap.captions.parquet import read_parquet
from smallcap.captions.rows import CaptionColumns, CaptionRow, accepted_names, readable
from smallcap.captions.tables import read_csv, read_jsonl
from smallcap.errors import ConfigError
from smallcap.tables import TABLE_SUFFIXES, format_of, read_table

FORMATS: dict[str, Callable[[IO[bytes], str, CaptionColumns], Iterator[CaptionRow]]] = {
    ".csv": read_csv,
    ".tsv": read_csv,
    ".txt": read_csv,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".parquet": read_parquet,
    ".json": read_json,
}
_BUFFER_BYTES = 1 << 20  # for text, which is read from front to back


@contextmanager
def open_captions(uri: str, columns: CaptionColumns) -> Iterator[Iterator[CaptionRow]]:
    """Gives a file's rows in order, to be read before the context ends; raises what `read_captions` raises.

    Raises:
        StorageError: The file is missing, or the service fails.
    """
    buffer_bytes = 0 if storage.suffix_of(uri) == ".parquet" else _BUFFER_BYTES
    with storage.open_ranged(uri, buffer_bytes) as file:
        yield read_captions(file, uri, columns)


def read_captions(file: IO[bytes], uri: str, columns: CaptionColumns) -> Iterator[CaptionRow]:
    """Reads the rows of an open file in order.

    Args:
        file: The file, opened for reading bytes.
        uri: The file's URI, for errors; its suffix names the format.
        columns: The columns to read from a table.

    Raises:
        ConfigError: The suffix does not name a known format.
        SchemaError: The file contradicts its suffix, is not UTF-8, or lacks the column of captions; or its embeddings
            have the wrong length.
    """
    suffix = format_of(uri)
    if suffix not in FORMATS:
        raise ConfigError(
            "The format of this captions file is unknown.",
            where=uri,
            expected=f"a file ending in {', '.join(TABLE_SUFFIXES)}",
            remedy="Convert the file to one of these.",
        )
    return map(readable, FORMATS[suffix](file, uri, columns))


def note_of(file: IO[bytes], uri: str, columns: CaptionColumns) -> str:
    """Returns how a table is read, where its first line does not say it; else an empty text.

    Raises:
        SchemaError: The file contradicts its suffix.
    """
    return read_table(file, uri, accepted_names(columns)).note if FORMATS[format_of(uri)] is read_csv else ""
