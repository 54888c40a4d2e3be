"""Reads lists of image URIs as a stream of tables, from Parquet, CSV, TSV, JSONL, JSON and text.

It knows the file formats and the columns asked for; it never opens a URI.
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, islice
from typing import IO, Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from smallcap import storage
from smallcap.config import InputConfig
from smallcap.errors import SchemaError
from smallcap.field_values import decode_json, id_strings, id_text, no_text, undecodable
from smallcap.images.list_places import with_refusals
from smallcap.tables import announce, format_of, json_lines, open_text, read_table, text_lines

BATCH_ROWS = 65_536
_BLOCK_BYTES = 16 << 20
_LONGEST_ELEMENT = 16 << 20  # characters, of a JSON array
_BATCH_BYTES = 64 << 20  # of a batch of Parquet rows, on average
_BLANKS = " \t\r\n\f\v"  # names may end with others
TEXT_COLUMN = "image_uri"  # the one column of a .txt list, and of a JSON array of strings

_DAMAGED = (pa.ArrowException, UnicodeError, json.JSONDecodeError, RecursionError, OSError, EOFError, zlib.error)
_UNFIT = (pa.ArrowException, OverflowError, UnicodeEncodeError)  # of a value that a column cannot hold

# A reader passes the list's column names to `_Choose`, and then yields tables with the columns that it returns. A row
# that cannot be read is one of nulls.
_T = TypeVar("_T")
_Rows = Iterator[pa.Table]
_Open = Callable[[], IO[bytes]]
_Reader = Callable[[_Open, str, InputConfig, "_Choose"], _Rows]


class _Choose(Protocol):
    def __call__(self, names: Sequence[str], seen: str = "", image: str | None = None) -> list[str]: ...


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

        A row without an id has its URI as id. A row without a URI, or one that cannot be read or whose id is not text,
        has an empty URI, whose image is an error, and where it has no id either, that of its place: `LIST#row=ROW`. A
        URI that the list may not name begins with `list_places.REFUSED`; its image is an error as well.

        Raises:
            SchemaError: The list is damaged or lacks a column.
            StorageError: The list cannot be read.
        """
        suffix = format_of(self.uri)
        first_row = 1
        buffer_bytes = 0 if suffix == ".parquet" else _BLOCK_BYTES
        with ExitStack() as opened:
            rows = _READERS[suffix](
                lambda: opened.enter_context(storage.open_ranged(self.uri, buffer_bytes)),
                self.uri,
                self.config,
                self._columns_to_read,
            )
            while True:
                try:
                    table = next(rows, None)
                except _DAMAGED as error:
                    text = str(error)[:500]
                    raise SchemaError("The list of images cannot be read.", where=self.uri, found=text) from error
                if table is None:
                    return
                yield self._images(table, first_row)
                first_row += table.num_rows

    def _columns_to_read(self, names: Sequence[str], seen: str = "", image: str | None = None) -> list[str]:
        """Returns the needed columns of a list that has the columns `names`; the first is that of the images."""
        image = self.config.image_column if self.config.image_column in names else image
        if image is None and list(names) == [TEXT_COLUMN]:
            image = TEXT_COLUMN
        if image is None:
            raise SchemaError(
                "The list of images lacks the column of URIs.",
                where=self.uri,
                expected=self.config.image_column,
                found=(", ".join(names) or "no columns") + (f" ({seen})" if seen else ""),
                remedy="Name the column: --set input.image_column=NAME.",
            )
        check_kept_columns(self.keep_columns, names, self.uri)
        ids = [self.config.id_column] if self.config.id_column in names else []
        return list(dict.fromkeys([image, *ids, *self.keep_columns]))

    def _images(self, table: pa.Table, first_row: int) -> pa.Table:
        names = table.column_names
        uris = ids = self._strings(table, names[0])
        if self.config.id_column in names:
            ids = self._strings(table, self.config.id_column)
            if (wrong := no_text(ids)).any():
                uris, ids = (pc.if_else(pa.array(wrong), "", column) for column in (uris, ids))
        missing = pc.equal(uris, "")
        absolute = pc.if_else(missing, "", self._absolute(uris))
        if not (self.config.trust_lists or storage.is_local(self.uri)):
            absolute = pa.array(with_refusals(absolute.to_pylist(), self.uri), pa.string())
        ids = pc.if_else(pc.equal(ids, ""), uris, ids)
        nameless = pc.equal(ids, "")
        if pc.any(nameless, min_count=0).as_py():
            rows = [
                f"{self.uri}#row={first_row + row}" for row in np.flatnonzero(nameless.to_numpy(zero_copy_only=False))
            ]
            ids = pc.replace_with_mask(ids, nameless, pa.array(rows, pa.string()))
        kept = {name: plain(table[name]) for name in self.keep_columns}
        return pa.table({"image_id": ids, "image_uri": absolute, **kept})

    def _strings(self, table: pa.Table, name: str) -> pa.Array:
        """Returns a column of URIs or ids as strings; a missing one is empty."""
        try:
            values = id_strings(table[name].combine_chunks())
        except pa.ArrowException as error:
            raise SchemaError(
                "The list has URIs or ids that are not strings.",
                where=self.uri,
                expected=name,
                found=str(table[name].type),
            ) from error
        return pc.fill_null(values, "")

    def _absolute(self, uris: pa.Array) -> pa.Array:
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


def plain(values: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Decodes a dictionary column, so that all batches have one type; a column of type null becomes strings."""
    if pa.types.is_dictionary(values.type):
        return values.cast(values.type.value_type)
    return values.cast(pa.string()) if pa.types.is_null(values.type) else values


def _read_parquet(open_file: _Open, uri: str, config: InputConfig, choose: _Choose) -> _Rows:
    parquet = pq.ParquetFile(open_file(), buffer_size=8 << 20)
    columns = choose(parquet.schema_arrow.names)
    metadata = parquet.metadata
    mean_bytes = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)) / max(
        1, metadata.num_rows
    )
    rows = max(1, min(BATCH_ROWS, int(_BATCH_BYTES / max(mean_bytes, 1))))
    for batch in parquet.iter_batches(rows, columns=columns):
        table = pa.Table.from_batches([batch]).select(columns)
        yield with_nulls(table, np.logical_or.reduce([undecodable(column) for column in batch.columns]))


def _batches(rows: Iterable[_T]) -> Iterator[list[_T]]:
    rows = iter(rows)
    while batch := list(islice(rows, BATCH_ROWS)):
        yield batch


def _read_csv(open_file: _Open, uri: str, config: InputConfig, choose: _Choose) -> _Rows:
    table = read_table(open_file(), uri, (config.image_column,))
    if table.note:
        announce(table.note)
    columns = choose(table.names, table.seen, table.image)
    places = [table.names.index(name) for name in columns]
    nothing = [""] * len(table.names)
    for batch in _batches(table.rows):
        rows = [nothing if isinstance(row, str) else row for _, row in batch]
        # A CSV has no types. As strings, late rows cannot contradict the first ones, and 007 stays 007.
        arrays = [pa.array([row[place] for row in rows], pa.string()) for place in places]
        yield pa.table([pc.if_else(pc.equal(array, ""), None, array) for array in arrays], columns)


def _read_text(open_file: _Open, uri: str, config: InputConfig, choose: _Choose) -> _Rows:
    choose([TEXT_COLUMN])
    lines = (line.strip(_BLANKS) for _, line in text_lines(open_file(), uri))
    for rows in _batches(filter(None, lines)):
        yield pa.table({TEXT_COLUMN: pa.array(rows, pa.string())})


def _read_jsonl(open_file: _Open, uri: str, config: InputConfig, choose: _Choose) -> _Rows:
    return _json_tables((entry for _, entry in json_lines(open_file(), uri)), config, choose)


def _read_json(open_file: _Open, uri: str, config: InputConfig, choose: _Choose) -> _Rows:
    """Reads an array of objects or of strings; holds only one block and one batch of it."""
    items = _json_items(open_text(open_file()))
    return _json_tables((item if isinstance(item, dict) else {TEXT_COLUMN: item} for item in items), config, choose)


def _json_tables(entries: Iterator[dict[str, Any] | str], config: InputConfig, choose: _Choose) -> _Rows:
    """Yields the chosen columns of JSON objects; what is not an object, or has a value of no use, is a row of nulls."""
    columns: list[str] = []
    kinds: dict[str, pa.DataType] = {}
    for batch in _batches(entries):
        objects = [entry if isinstance(entry, dict) else {} for entry in batch]
        if not columns:
            columns = choose(list(dict.fromkeys(chain.from_iterable(objects))))
        arrays = {}
        for name in columns:
            values = [entry.get(name) for entry in objects]
            is_name = name in (columns[0], config.id_column)
            arrays[name] = _json_names(values) if is_name else _json_column(values, kinds.get(name))
        kinds = {name: array.type for name, (array, _) in arrays.items()}
        wrong = np.zeros(len(batch), bool)
        for _, rows in arrays.values():
            wrong[rows] = True
        yield with_nulls(pa.table({name: array for name, (array, _) in arrays.items()}), wrong)


def with_nulls(table: pa.Table, wrong: np.ndarray) -> pa.Table:
    """Returns a table whose rows are nulls where they cannot be read."""
    if not wrong.any():
        return table
    return pa.table([pc.if_else(pa.array(wrong), None, column) for column in table.columns], table.schema)


def _json_names(values: list[Any]) -> tuple[pa.Array, list[int]]:
    """Returns a column of URIs or ids, and the rows whose values are none."""
    names = [id_text(value) for value in values]
    array, wrong = _json_column(names, pa.string())
    return array, wrong + [row for row, value in enumerate(values) if value is not None and names[row] is None]


def _json_column(values: list[Any], kind: pa.DataType | None) -> tuple[pa.Array, list[int]]:
    """Returns a column of JSON values, and the rows whose values do not fit its type or are not text.

    The first values decide the type; values without a common type make it a column of strings.
    """
    if kind == pa.string():
        values = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
    try:
        array = pa.array(values, kind)
    except _UNFIT:
        if kind is None:
            return _json_column(values, pa.string())
    else:
        if pa.types.is_floating(array.type):  # 1e999 is out of range
            return array, np.flatnonzero(pc.fill_null(pc.is_inf(array), False)).tolist()
        return (array.cast(pa.string()) if pa.types.is_null(array.type) else array), []
    wrong = []
    for row, value in enumerate(values):
        try:
            pa.scalar(value, kind)
        except _UNFIT:
            values[row] = None
            wrong.append(row)
    return pa.array(values, kind), wrong


def _json_items(text: io.TextIOWrapper) -> Iterator[dict[str, Any] | str]:
    """Yields the elements of a JSON array, which must be objects or strings."""
    buffer = text.read(_BLOCK_BYTES).lstrip()
    if not buffer.startswith("["):
        raise json.JSONDecodeError("not an array of objects or strings", buffer[:100], 0)
    buffer = buffer[1:]
    position = 0
    while True:
        while position < len(buffer) and buffer[position] in " \t\r\n,":
            position += 1
        if buffer.startswith("]", position):
            break
        try:
            if not buffer.startswith(("{", '"'), position):
                raise json.JSONDecodeError("expected an object or a string", buffer[position : position + 100], 0)
            item, position = decode_json(buffer, position)
        except json.JSONDecodeError:  # the block may end within the element
            more = text.read(_BLOCK_BYTES) if len(buffer) - position <= _LONGEST_ELEMENT else ""
            if not more:
                raise
            buffer, position = buffer[position:] + more, 0
            continue
        yield item


_READERS: dict[str, _Reader] = {
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".txt": _read_text,
}
LIST_SUFFIXES = tuple(_READERS)
