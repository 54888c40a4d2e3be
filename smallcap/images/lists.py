"""Reads lists of image URIs as a stream of tables, from Parquet, CSV, TSV, JSONL, JSON and text.

It knows the file formats and the columns asked for; it never opens a URI.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from smallcap import storage
from smallcap.config import InputConfig
from smallcap.errors import SchemaError

BATCH_ROWS = 65_536
_BLOCK_BYTES = 16 << 20
TEXT_COLUMN = "image_uri"  # the one column of a .txt list, and of a JSON array of strings

# A reader passes the list's column names to `_Choose`, and then yields tables with the columns that it returns.
_Rows = Iterator[pa.Table]
_Open = Callable[[], IO[bytes]]
_Choose = Callable[[Sequence[str]], list[str]]
_Reader = Callable[[_Open, _Choose], _Rows]


@dataclass(frozen=True)
class ImageList:
    """One list of URIs.

    Attributes:
        uri: The absolute URI of the list.
        config: The input's config, which names the columns of URIs and ids.
        keep_columns: Other columns to read.
    """

    uri: str
    config: InputConfig
    keep_columns: tuple[str, ...] = ()

    def tables(self) -> Iterator[pa.Table]:
        """Yields `image_id` and `image_uri` (string, absolute, never null) and the kept columns.

        Raises:
            SchemaError: The list is damaged or lacks a column, or a row has no URI or id.
            StorageError: The list cannot be read.
        """
        suffix = storage.suffix_of(self.uri)
        first_row = 1
        buffer_bytes = 0 if suffix == ".parquet" else _BLOCK_BYTES
        with ExitStack() as opened:
            rows = _READERS[suffix](
                lambda: opened.enter_context(storage.open_ranged(self.uri, buffer_bytes)), self._columns_to_read
            )
            while True:
                try:
                    table = next(rows, None)
                except (pa.ArrowException, UnicodeDecodeError, json.JSONDecodeError, OSError) as error:
                    text = str(error)[:500]
                    raise SchemaError("The list of images cannot be read.", where=self.uri, found=text) from error
                if table is None:
                    return
                yield self._images(table, first_row)
                first_row += table.num_rows

    def _columns_to_read(self, names: Sequence[str]) -> list[str]:
        """Returns the needed columns of a list that has the columns `names`."""
        image = self.config.image_column if self.config.image_column in names else None
        if image is None and list(names) == [TEXT_COLUMN]:
            image = TEXT_COLUMN
        if image is None:
            raise SchemaError(
                "The list of images lacks the column of URIs.",
                where=self.uri,
                expected=self.config.image_column,
                found=", ".join(names),
                remedy="Name the column: --set input.image_column=NAME.",
            )
        check_kept_columns(self.keep_columns, names, self.uri)
        ids = [self.config.id_column] if self.config.id_column in names else []
        return list(dict.fromkeys([image, *ids, *self.keep_columns]))

    def _images(self, table: pa.Table, first_row: int) -> pa.Table:
        names = table.column_names
        uris = self._strings(table, names[0], first_row)
        ids = self._strings(table, self.config.id_column, first_row) if self.config.id_column in names else uris
        kept = {name: plain(table[name]) for name in self.keep_columns}
        return pa.table({"image_id": ids, "image_uri": self._absolute(uris), **kept})

    def _strings(self, table: pa.Table, name: str, first_row: int) -> pa.ChunkedArray:
        """Returns a column of URIs or ids as strings; each row must have one."""
        what = "id" if name == self.config.id_column and name != table.column_names[0] else "URI"
        try:
            values = plain(table[name]).cast(pa.string())
        except pa.ArrowException as error:
            raise SchemaError(
                f"The list has {what}s that are not strings.",
                where=self.uri,
                expected=name,
                found=str(table[name].type),
            ) from error
        missing = pc.fill_null(pc.equal(values, ""), True)
        row = pc.index(missing, True).as_py()
        if row >= 0:
            raise SchemaError(
                f"A row of the list has no {what}.", where=f"{self.uri}, row {first_row + row}", expected=name
            )
        return values

    def _absolute(self, uris: pa.ChunkedArray) -> pa.ChunkedArray:
        """Makes URIs absolute; relative ones start from the folder of the list."""
        is_absolute = pc.or_(pc.match_substring(uris, "://"), pc.starts_with(uris, "/"))
        if pc.all(is_absolute, min_count=0).as_py():
            return uris
        folder = self.uri.rsplit("/", 1)[0]
        below = pc.binary_join_element_wise(folder, pc.utf8_rtrim(uris, "/"), "/")
        return pc.if_else(is_absolute, uris, below)


def check_kept_columns(keep_columns: Sequence[str], names: Sequence[str], where: str) -> None:
    """Checks that the column `names` of a file include all columns to keep.

    Raises:
        SchemaError: One is missing.
    """
    missing = [name for name in keep_columns if name not in names]
    if missing:
        raise SchemaError(
            "A column to keep is missing.",
            where=where,
            expected=", ".join(missing),
            found=", ".join(names) or "no columns",
            remedy="Check --keep-columns.",
        )


def plain(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Decodes a dictionary column, so that all batches have one type; a column of type null becomes strings."""
    if pa.types.is_dictionary(values.type):
        return values.cast(values.type.value_type)
    return values.cast(pa.string()) if pa.types.is_null(values.type) else values


def _read_parquet(open_file: _Open, choose: _Choose) -> _Rows:
    parquet = pq.ParquetFile(open_file(), buffer_size=8 << 20)
    columns = choose(parquet.schema_arrow.names)
    for batch in parquet.iter_batches(BATCH_ROWS, columns=columns):
        yield pa.Table.from_batches([batch]).select(columns)


def _read_csv(open_file: _Open, choose: _Choose, delimiter: str = ",") -> _Rows:
    parse = pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    columns = choose(pa.csv.open_csv(open_file(), parse_options=parse).schema.names)
    # A CSV has no types. As strings, late rows cannot contradict the first ones, and 007 stays 007.
    convert = pa.csv.ConvertOptions(
        column_types=dict.fromkeys(columns, pa.string()),
        include_columns=columns,
        null_values=[""],
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
    )
    options = pa.csv.ReadOptions(block_size=_BLOCK_BYTES)
    for batch in pa.csv.open_csv(open_file(), read_options=options, parse_options=parse, convert_options=convert):
        yield pa.Table.from_batches([batch])


def _read_jsonl(open_file: _Open, choose: _Choose) -> _Rows:
    options = pa.json.ReadOptions(block_size=_BLOCK_BYTES)
    schema = pa.json.open_json(open_file(), read_options=options).schema
    columns = choose(schema.names)
    fields = [schema.field(name) for name in columns]
    types = pa.schema([field.with_type(pa.string()) if field.type == pa.null() else field for field in fields])
    parse = pa.json.ParseOptions(explicit_schema=types, unexpected_field_behavior="ignore")
    for batch in pa.json.open_json(open_file(), read_options=options, parse_options=parse):
        yield pa.Table.from_batches([batch]).select(columns)


def _read_text(open_file: _Open, choose: _Choose) -> _Rows:
    choose([TEXT_COLUMN])
    lines: list[str] = []
    for line in _text(open_file):
        if line.strip():
            lines.append(line.rstrip("\r\n"))
        if len(lines) == BATCH_ROWS:
            yield pa.table({TEXT_COLUMN: pa.array(lines, pa.string())})
            lines = []
    if lines:
        yield pa.table({TEXT_COLUMN: pa.array(lines, pa.string())})


def _read_json(open_file: _Open, choose: _Choose) -> _Rows:
    """Reads an array of objects or of strings; holds only one block and one batch of it."""
    columns: list[str] = []
    schema: pa.Schema | None = None
    for items in _json_batches(_text(open_file)):
        rows = [item if isinstance(item, dict) else {TEXT_COLUMN: item} for item in items]
        if not columns:
            columns = choose(list(dict.fromkeys(chain.from_iterable(rows))))
        needed = [{name: row.get(name) for name in columns} for row in rows]
        table = pa.Table.from_pylist(needed, schema=schema)
        if schema is None:
            table = pa.table({name: plain(table[name]) for name in columns})
            schema = table.schema
        yield table


def _json_batches(text: io.TextIOWrapper) -> Iterator[list[Any]]:
    """Yields the elements of a JSON array, which must be objects or strings, in batches."""
    decoder = json.JSONDecoder()
    buffer = text.read(_BLOCK_BYTES).lstrip()
    if not buffer.startswith("["):
        raise json.JSONDecodeError("not an array of objects or strings", buffer[:100], 0)
    buffer = buffer[1:]
    items: list[Any] = []
    position = 0
    while True:
        while position < len(buffer) and buffer[position] in " \t\r\n,":
            position += 1
        if buffer.startswith("]", position):
            break
        try:
            if not buffer.startswith(("{", '"'), position):
                raise json.JSONDecodeError("expected an object or a string", buffer[position : position + 100], 0)
            item, position = decoder.raw_decode(buffer, position)
        except json.JSONDecodeError:
            more = text.read(_BLOCK_BYTES)
            if not more:
                raise
            buffer, position = buffer[position:] + more, 0
            continue
        items.append(item)
        if len(items) == BATCH_ROWS:
            yield items
            items = []
    if items:
        yield items


def _text(open_file: _Open) -> io.TextIOWrapper:
    return io.TextIOWrapper(open_file(), encoding="utf-8-sig")


_READERS: dict[str, _Reader] = {
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".txt": _read_text,
}
LIST_SUFFIXES = tuple(_READERS)
