"""Finds the column of image bytes in Parquet files, and reads the images of one row group as a stream.

The column is binary, or a struct of `bytes` and `path` as Hugging Face datasets have it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from smallcap import storage
from smallcap.config import InputConfig
from smallcap.errors import ErrorCode, RowError, SchemaError, StorageError
from smallcap.field_values import holds_path, id_strings, no_text, undecodable
from smallcap.images.fragments import FRAGMENT_ROWS, Fragment, InputBatch
from smallcap.images.kinds import MAX_IMAGE_BYTES
from smallcap.images.lists import plain, with_nulls
from smallcap.images.place_check import note_served, unreadable_file
from smallcap.images.row_ranges import RowRanges

_BUFFER_BYTES = 8 << 20  # read ahead of each column: a row group of gigabytes is never held whole
_FOOTERS_AT_ONCE = 32
_BATCH_BYTES = 64 << 20  # of images that are held at once, and one more
_DAMAGED = (pa.ArrowException, OSError, UnicodeDecodeError)  # the last for a column's name


@dataclass(frozen=True)
class ParquetOutline:
    """The outline of a Parquet file from its footer; `problem` says why the footer cannot be read."""

    uri: str
    schema: pa.Schema
    rows: tuple[int, ...]  # number of rows of each row group
    problem: str = ""


def read_outlines(uris: Sequence[str]) -> Iterator[ParquetOutline]:
    """Reads the footers of many Parquet files in the order of the URIs, several at once.

    Raises:
        StorageError: A file is missing, or the service fails.
    """
    if not uris:
        return
    with ThreadPoolExecutor(min(_FOOTERS_AT_ONCE, len(uris))) as pool:
        yield from pool.map(_read_outline, uris)


def _read_outline(uri: str) -> ParquetOutline:
    with storage.open_ranged(uri) as file:
        try:
            parquet = pq.ParquetFile(file)
            schema = parquet.schema_arrow
            len(schema.names)  # which decodes them
        except _DAMAGED as error:
            return ParquetOutline(uri, pa.schema([]), (), problem=str(error))
        metadata = parquet.metadata
        rows = tuple(metadata.row_group(number).num_rows for number in range(metadata.num_row_groups))
        return ParquetOutline(uri, schema, rows)


def with_images(uris: Sequence[str], config: InputConfig) -> Iterator[str]:
    """Yields those of many Parquet files that hold images; one that cannot be read holds none."""
    if not uris:
        return
    with ThreadPoolExecutor(min(_FOOTERS_AT_ONCE, len(uris))) as pool:
        for uri, holds in zip(uris, pool.map(lambda uri: _holds_images(uri, config), uris), strict=True):
            if holds:
                yield uri


def _holds_images(uri: str, config: InputConfig) -> bool:
    try:
        return image_bytes_column(_read_outline(uri).schema, config, uri) is not None
    except StorageError as error:
        unreadable_file(error, uri)
        return False
    except SchemaError:  # in several columns
        return True


def ids_repeat(uris: Sequence[str], config: InputConfig) -> bool:
    """Says whether an id comes twice among those of the first row groups of Parquet files with images.

    Only reading all rows would tell whether all ids differ. But a writer that numbers or names the images of each file
    from the same start shows it at once. An id that repeats elsewhere is found when the images have been read.
    """
    if not uris:
        return False
    with ThreadPoolExecutor(min(_FOOTERS_AT_ONCE, len(uris))) as pool:
        first_ids = list(chain.from_iterable(pool.map(lambda uri: _first_ids(uri, config), uris)))
    return len(set(first_ids)) < len(first_ids)


def _first_ids(uri: str, config: InputConfig) -> list[str]:
    """Returns the ids in the first row group; none where it has none or cannot be read, which reading it tells."""
    try:
        with storage.open_ranged(uri) as file:
            parquet = pq.ParquetFile(file)
            schema = parquet.schema_arrow
            column = config.id_column
            if column not in schema.names:
                images = image_bytes_column(schema, config, uri)
                if images is None or not pa.types.is_struct(schema.field(images).type):
                    return []
                column = f"{images}.path"
            table = parquet.read_row_group(0, columns=[column]) if parquet.num_row_groups else None
            if table is None or not table.num_columns:
                return []
            return list(filter(None, _names(table[0].combine_chunks())[0]))
    except StorageError as error:
        unreadable_file(error, uri)
        return []
    except _DAMAGED:
        return []


def _names(values: pa.Array) -> tuple[list[str | None], np.ndarray]:
    """Returns the ids of n rows, and which of them are not text, [n] bool; these, too, are None."""
    strings = id_strings(values)
    wrong = no_text(strings)
    return pc.if_else(pa.array(wrong), None, strings).to_pylist(), wrong


def check_id_column(schema: pa.Schema, config: InputConfig, where: str) -> None:
    """Checks that the column of ids, if there is one, can hold ids.

    Raises:
        SchemaError: It cannot.
    """
    if config.id_column in schema.names:
        kind = schema.field(config.id_column).type
        try:
            id_strings(pa.array([], kind))
        except pa.ArrowException as error:
            raise SchemaError(
                "The column of ids has the wrong type.",
                where=f"{where}: {config.id_column}",
                expected="strings, numbers, dates or images",
                found=str(kind),
                remedy="Name another column: --set input.id_column=NAME.",
            ) from error


def image_bytes_column(schema: pa.Schema, config: InputConfig, where: str) -> str | None:
    """Returns the column that holds image files; None where there is none: the file may be a list of URIs.

    Raises:
        SchemaError: Several columns may hold the images.
    """
    if config.image_column in schema.names:
        return config.image_column if _holds_bytes(schema.field(config.image_column).type) else None
    with_bytes = [field.name for field in schema if _holds_bytes(field.type)]
    if len(with_bytes) > 1:
        raise SchemaError(
            "Several columns may hold the images.",
            where=where,
            expected=config.image_column,
            found=", ".join(with_bytes),
            remedy="Name the column: --set input.image_column=NAME.",
        )
    return with_bytes[0] if with_bytes else None


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _holds_bytes(kind.value_type)
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def read_parquet(
    fragment: Fragment, wanted: RowRanges | None, config: InputConfig, kept_columns: pa.Schema
) -> Iterator[InputBatch]:
    """Yields the images of one row group.

    Where the file cannot be read to its end, each missing row becomes an error, so that there are as many rows as were
    listed.

    Args:
        fragment: The row group.
        wanted: The rows to yield; None yields all.
        config: The input's config, which names the columns of images and ids.
        kept_columns: Other columns to read.

    Raises:
        SchemaError: The file no longer has a column of images.
        StorageError: The service fails; a file that is missing or forbidden gives error rows.
    """
    assert fragment.rows is not None
    read = 0
    try:
        with storage.open_ranged(fragment.uri) as file:
            parquet = pq.ParquetFile(file, buffer_size=_BUFFER_BYTES)
            note_served(fragment.uri)
            for batch in _row_group(
                _with_dictionaries(parquet, file, fragment, config), fragment, config, kept_columns
            ):
                read += len(batch.rows)
                if (chosen := batch.only(wanted)) is not None:
                    yield chosen
            problem = RowError(
                ErrorCode.TRUNCATED, "The row group has fewer rows than were listed.", where=fragment.uri
            )
    except StorageError as error:
        problem = unreadable_file(error, fragment.uri)
    except _DAMAGED as error:
        problem = RowError(ErrorCode.TRUNCATED, f"The Parquet file is damaged: {error}", where=fragment.uri)
    yield from unread_images(fragment, wanted, read, problem, kept_columns)


def unread_images(
    fragment: Fragment, wanted: RowRanges | None, read: int, problem: RowError, kept_columns: pa.Schema
) -> Iterator[InputBatch]:
    """Yields an error for each image of a row group behind those that were read; it is not opened.

    Args:
        fragment: The row group.
        wanted: The rows to yield; None for all.
        read: The number of rows that have been read.
        problem: The error.
        kept_columns: The kept columns of the work list.
    """
    assert fragment.rows is not None
    for start in range(read, fragment.rows, FRAGMENT_ROWS):
        rows = np.arange(start, min(start + FRAGMENT_ROWS, fragment.rows), dtype=np.int32)
        uris = [f"{fragment.uri}#row_group={fragment.row_group},row={row}" for row in rows]
        kept = pa.Table.from_pylist([{}] * len(rows), schema=kept_columns) if len(kept_columns) else None
        errors = InputBatch(rows, uris, uris, [problem] * len(rows), kept, bool(rows[-1] == fragment.rows - 1))
        if (chosen := errors.only(wanted)) is not None:
            yield chosen


def _image_chunk(parquet: pq.ParquetFile, fragment: Fragment, column: str) -> tuple[str, pq.ColumnChunkMetaData]:
    """Returns the path within the schema of a column of image bytes, and what the footer says of it."""
    group = parquet.metadata.row_group(fragment.row_group)
    chunks = {chunk.path_in_schema: chunk for chunk in map(group.column, range(group.num_columns))}
    path = column if column in chunks else f"{column}.bytes"
    return path, chunks[path]


def _with_dictionaries(
    parquet: pq.ParquetFile, file: IO[bytes], fragment: Fragment, config: InputConfig
) -> pq.ParquetFile:
    """Opens a file again so that repeated images stay what they are in it: one image, and places.

    Written out, a file of megabytes may be terabytes.
    """
    column = _column(parquet, fragment, config)
    path, chunk = _image_chunk(parquet, fragment, column)
    if not chunk.has_dictionary_page:
        return parquet
    return pq.ParquetFile(file, metadata=parquet.metadata, buffer_size=_BUFFER_BYTES, read_dictionary=[path])


def _column(parquet: pq.ParquetFile, fragment: Fragment, config: InputConfig) -> str:
    schema = parquet.schema_arrow
    column = image_bytes_column(schema, config, fragment.uri)
    if column is None:
        raise SchemaError(
            "This Parquet file has no column of images.", where=fragment.uri, found=", ".join(schema.names)
        )
    return column


def _row_group(
    parquet: pq.ParquetFile, fragment: Fragment, config: InputConfig, kept_columns: pa.Schema
) -> Iterator[InputBatch]:
    schema = parquet.schema_arrow
    column = _column(parquet, fragment, config)
    names = config.id_column if config.id_column in schema.names else None
    kind = schema.field(column).type
    if names is None and holds_path(kind):
        names = column
    columns = list(dict.fromkeys([column, *([names] if names else []), *kept_columns.names]))
    groups = [parquet.metadata.row_group(number).num_rows for number in range(fragment.row_group + 1)]
    before = list(accumulate(groups, initial=0))[fragment.row_group]  # rows of the file before this row group
    read = 0
    for batch in _portions(parquet, fragment, column, columns):
        rows = np.arange(read, read + len(batch), dtype=np.int32)
        read += len(batch)
        uris = [f"{fragment.uri}#row={before + row}" for row in rows]
        data = _contents(batch.column(column), uris)
        numbered = [f"{fragment.id_prefix}{before + row}" for row in rows]
        named, wrong = _names(batch.column(names)) if names else ([None] * len(rows), np.zeros(len(rows), bool))
        start = fragment.id_prefix if fragment.qualified else ""
        kept = [plain(batch.column(name)).cast(kept_columns.field(name).type) for name in kept_columns.names]
        wrong = np.logical_or.reduce([wrong, *(undecodable(values) for values in kept)])
        for row in np.flatnonzero(wrong).tolist():
            data[row] = RowError(
                ErrorCode.INVALID_URI, "The row's id or a column to keep is not text.", where=uris[row]
            )
        yield InputBatch(
            rows=rows,
            image_ids=[start + name if name else number for name, number in zip(named, numbered, strict=True)],
            image_uris=uris,
            data=data,
            kept=with_nulls(pa.table(kept, schema=kept_columns), wrong) if kept else None,
            ends_fragment=read == groups[-1],
        )


def _portions(parquet: pq.ParquetFile, fragment: Fragment, column: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Yields the rows of a row group in batches of few enough bytes of images."""
    _, chunk = _image_chunk(parquet, fragment, column)
    mean_bytes = chunk.total_uncompressed_size / max(1, chunk.num_values)
    most = max(1, min(FRAGMENT_ROWS, int(_BATCH_BYTES / max(mean_bytes, 1))))
    for batch in parquet.iter_batches(most, row_groups=[fragment.row_group], columns=columns):
        start = held = 0
        for row, size in enumerate(_sizes(batch.column(column)).tolist()):
            if row > start and held + size > _BATCH_BYTES:
                yield batch.slice(start, row - start)
                start, held = row, 0
            held += size if size <= MAX_IMAGE_BYTES else 0
        yield batch.slice(start)


def _cells(images: pa.Array) -> pa.Array:
    """Returns the binary values of a column of images, which may be a dictionary's."""
    cells = pc.struct_field(images, "bytes") if pa.types.is_struct(images.type) else images
    return cells.cast(pa.large_binary()) if pa.types.is_binary_view(cells.type) else cells


def _sizes(images: pa.Array) -> np.ndarray:
    """Returns the bytes of each image, [n] int64; 0 where there is none."""
    cells = _cells(images)
    if pa.types.is_dictionary(cells.type):
        sizes = pc.binary_length(cells.dictionary).take(cells.indices)
    else:
        sizes = pc.binary_length(cells)
    return np.asarray(pc.fill_null(sizes.cast(pa.int64()), 0))


def _contents(images: pa.Array, uris: list[str]) -> list[bytes | RowError]:
    """Returns the image files of a column."""
    cells = _cells(images)
    return [_content(cells, row, size, uri) for row, (size, uri) in enumerate(zip(_sizes(images), uris, strict=True))]


def _content(cells: pa.Array, row: int, size: int, uri: str) -> bytes | RowError:
    if size > MAX_IMAGE_BYTES:
        what = f"The row has {size:,} bytes; at most {MAX_IMAGE_BYTES:,} are read."
        return RowError(ErrorCode.TOO_LARGE, what, where=uri)
    value: bytes | None = cells[row].as_py()
    return RowError(ErrorCode.EMPTY, "The row has no image bytes.", where=uri) if value is None else value
