"""Finds the column of image bytes in Parquet files, and reads the images of one row group as a stream.

The column is binary, or a struct of `bytes` and `path` as Hugging Face datasets have it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from smallcap import storage
from smallcap.config import InputConfig
from smallcap.errors import ErrorCode, RowError, SchemaError, StorageError
from smallcap.images.fragments import FRAGMENT_ROWS, Fragment, InputBatch, unreadable_file
from smallcap.images.lists import plain
from smallcap.images.row_ranges import RowRanges

_BUFFER_BYTES = 8 << 20  # read ahead of each column: a row group of gigabytes is never held whole
_FOOTERS_AT_ONCE = 32
_DAMAGED = (pa.ArrowException, OSError)


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
        except _DAMAGED as error:
            return ParquetOutline(uri, pa.schema([]), (), problem=str(error))
        metadata = parquet.metadata
        rows = tuple(metadata.row_group(number).num_rows for number in range(metadata.num_row_groups))
        return ParquetOutline(uri, parquet.schema_arrow, rows)


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
            values = table[0].combine_chunks()
            return (
                _ids(pc.struct_field(values, "path") if pa.types.is_struct(values.type) else values)
                .drop_null()
                .to_pylist()
            )
    except (StorageError, *_DAMAGED):
        return []


def _ids(values: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray:
    """Returns ids as strings; a null stands where a row has none."""
    chunks = values if isinstance(values, pa.ChunkedArray) else pa.chunked_array([values])
    strings = plain(chunks).cast(pa.string())
    return pc.if_else(pc.equal(strings, ""), None, strings)


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
            for batch in _row_group(parquet, fragment, config, kept_columns):
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
    for start in range(read, fragment.rows, FRAGMENT_ROWS):
        rows = np.arange(start, min(start + FRAGMENT_ROWS, fragment.rows), dtype=np.int32)
        uris = [f"{fragment.uri}#row_group={fragment.row_group},row={row}" for row in rows]
        kept = pa.Table.from_pylist([{}] * len(rows), schema=kept_columns) if len(kept_columns) else None
        errors = InputBatch(rows, uris, uris, [problem] * len(rows), kept, bool(rows[-1] == fragment.rows - 1))
        if (chosen := errors.only(wanted)) is not None:
            yield chosen


def _row_group(
    parquet: pq.ParquetFile, fragment: Fragment, config: InputConfig, kept_columns: pa.Schema
) -> Iterator[InputBatch]:
    schema = parquet.schema_arrow
    column = image_bytes_column(schema, config, fragment.uri)
    if column is None:
        raise SchemaError(
            "This Parquet file has no column of images.", where=fragment.uri, found=", ".join(schema.names)
        )
    ids = [config.id_column] if config.id_column in schema.names else []
    columns = list(dict.fromkeys([column, *ids, *kept_columns.names]))
    groups = [parquet.metadata.row_group(number).num_rows for number in range(fragment.row_group + 1)]
    before = list(accumulate(groups, initial=0))[fragment.row_group]  # rows of the file before this row group
    read = 0
    for batch in parquet.iter_batches(FRAGMENT_ROWS, row_groups=[fragment.row_group], columns=columns):
        table = pa.Table.from_batches([batch])
        rows = np.arange(read, read + len(table), dtype=np.int32)
        read += len(table)
        uris = [f"{fragment.uri}#row={before + row}" for row in rows]
        data, paths = _contents(table[column].combine_chunks(), uris)
        numbered = [f"{fragment.id_prefix}{before + row}" for row in rows]
        named = _ids(table[ids[0]]).to_pylist() if ids else paths
        start = fragment.id_prefix if fragment.qualified else ""
        kept = [plain(table[name]).cast(kept_columns.field(name).type) for name in kept_columns.names]
        yield InputBatch(
            rows=rows,
            image_ids=[start + name if name else number for name, number in zip(named, numbered, strict=True)],
            image_uris=uris,
            data=data,
            kept=pa.table(kept, schema=kept_columns) if kept else None,
            ends_fragment=read == groups[-1],
        )


def _contents(images: pa.Array, uris: list[str]) -> tuple[list[bytes | RowError], list[str | None]]:
    """Returns the image files of a column and their paths, where it has paths."""
    paths: list[str | None] = [None] * len(images)
    if pa.types.is_struct(images.type):
        if images.type.get_field_index("path") >= 0:
            paths = pc.struct_field(images, "path").cast(pa.string()).to_pylist()
        images = pc.struct_field(images, "bytes")
    return [
        RowError(ErrorCode.EMPTY, "The row has no image bytes.", where=uri) if value is None else value
        for value, uri in zip(images.to_pylist(), uris, strict=True)
    ], paths
