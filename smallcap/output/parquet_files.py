"""Writes and reads Parquet files of rows that are sorted by image id: parts and their sidecars, whole."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from smallcap import storage
from smallcap.errors import SchemaError
from smallcap.output.schema import CAPTION_COLUMNS

# Where dictionaries make files smaller, by measurement (docs/log.md); ids, captions and texts are mostly distinct.
_DICTIONARY_COLUMNS = ("width", "height", "caption_tokens", "status", "error_code")
_DICTIONARY_PATHS = {"neighbours": "neighbours.list.element.sources.list.element"}
_FEW_VALUES = 10  # rows per distinct value from which a kept column gets a dictionary
_ZSTD_LEVEL = 6


def write_parquet(uri: str, table: pa.Table, rows_per_row_group: int) -> None:
    """Writes a file of rows that are sorted by image id."""
    buffer = io.BytesIO()
    pq.write_table(
        table,
        buffer,
        row_group_size=rows_per_row_group,
        compression="zstd",
        compression_level=_ZSTD_LEVEL,
        use_dictionary=_dictionary_columns(table),
        write_page_index=True,
        sorting_columns=[pq.SortingColumn(table.column_names.index("image_id"))],
    )
    storage.write_bytes(uri, buffer.getvalue())


def _dictionary_columns(table: pa.Table) -> list[str]:
    """Returns the columns whose values repeat; a column kept from the input must be of strings with few values."""
    few = [
        name
        for name, column in zip(table.column_names, table.columns, strict=True)
        if name not in CAPTION_COLUMNS.names
        and (pa.types.is_string(column.type) or pa.types.is_large_string(column.type))
        and pc.count_distinct(column).as_py() * _FEW_VALUES <= len(column)
    ]
    paths = [path for name, path in _DICTIONARY_PATHS.items() if name in table.column_names]
    return [*(name for name in (*_DICTIONARY_COLUMNS, *few) if name in table.column_names), *paths]


def read_parquet(uri: str) -> tuple[pa.Table, int]:
    """Returns a file's rows, and how many of them its first row group has."""
    try:
        file = pq.ParquetFile(io.BytesIO(storage.read_bytes(uri)))
        return file.read(), file.metadata.row_group(0).num_rows
    except (pa.ArrowInvalid, OSError) as error:
        raise damaged_part(uri, error) from error


def damaged_part(uri: str, error: Exception) -> SchemaError:
    """Returns the error for a part that cannot be read."""
    return SchemaError(
        "A part cannot be read as Parquet.",
        where=uri,
        found=str(error),
        remedy="Delete the part, and start the run again to redo its images.",
    )
