"""Reads captions from Parquet files, with or without embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import IO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from smallcap.captions.rows import CaptionColumns, CaptionRow, find_column
from smallcap.captions.vectors import ROWS_AT_ONCE, check_dim, unit_vectors
from smallcap.errors import SchemaError
from smallcap.field_values import holds_path, id_strings

_BATCH_ROWS = 10_000


def read_parquet(file: IO[bytes], uri: str, columns: CaptionColumns) -> Iterator[CaptionRow]:
    """Reads the rows of a Parquet file; see `reader.read_captions`."""
    parquet = open_parquet(file, uri)
    names = parquet.schema_arrow.names
    caption = find_column(names, columns, uri)
    embedding = columns.embedding if columns.embedding in names else None
    images = [name if name in names else None for name in (columns.image_id, columns.image_path)]
    if columns.image_id and images == [None, None]:  # Hugging Face's images hold their paths
        structs = [field.name for field in parquet.schema_arrow if holds_path(field.type)]
        images[0] = structs[0] if len(structs) == 1 else None
    wanted = [
        f"{name}.path" if holds_path(parquet.schema_arrow.field(name).type) else name  # never the images' bytes
        for name in dict.fromkeys((caption, *images, embedding))
        if name is not None
    ]
    several, dim = columns.several and embedding is None, columns.dim
    line = 0
    for batch in _batches(parquet, uri, wanted, _BATCH_ROWS if embedding is None else ROWS_AT_ONCE):
        texts = _texts(batch.column(caption), f"{uri}: {caption}", several, columns.remedy)
        ids, paths = (
            repeat(None) if name is None else _ids(batch.column(name), f"{uri}: {name}", columns.remedy)
            for name in images
        )
        vectors: Iterable[bytes | None] = repeat(None)
        problems: Iterable[str] = repeat("")
        if embedding is not None:
            vectors, problems, dim = _vectors(batch.column(embedding), f"{uri}: {embedding}", dim)
        for captions, image_id, path, vector, problem in zip(texts, ids, paths, vectors, problems, strict=False):
            line += 1
            for text in captions:
                yield CaptionRow(text or "", image_id, line, problem, vector, path)


def open_parquet(file: IO[bytes], uri: str) -> pq.ParquetFile:
    """Opens a Parquet file for reading.

    Raises:
        SchemaError: The file is not Parquet.
    """
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last for a column's name
        raise SchemaError("This is not a Parquet file.", where=uri, found=str(error)) from error


def _batches(parquet: pq.ParquetFile, uri: str, columns: list[str], rows: int) -> Iterator[pa.RecordBatch]:
    try:
        yield from parquet.iter_batches(rows, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise SchemaError("The Parquet file is damaged.", where=uri, found=str(error)) from error


def _texts(column: pa.Array, where: str, several: bool, remedy: str) -> list[list[str | None]]:
    """Returns the captions of each row; a row without captions has None."""
    if not (several and _is_list(column.type)):
        return [[text] for text in _strings(column, where, remedy)]
    texts = iter(_strings(column.flatten(), where, remedy))
    lengths = pc.list_value_length(column).to_pylist()
    return [[next(texts) for _ in range(length)] if length else [None] for length in lengths]


def _ids(column: pa.Array, where: str, remedy: str) -> list[str | None]:
    """Returns the names of images."""
    try:
        names = id_strings(column)
    except pa.ArrowException as error:
        raise _wrong_type(column, where, remedy) from error
    return _strings(names, where, remedy)


def _strings(column: pa.Array, where: str, remedy: str) -> list[str | None]:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if not (is_text or pa.types.is_integer(kind)):
        raise _wrong_type(column, where, remedy)
    try:
        strings: list[str | None] = column.cast(pa.string()).to_pylist()
    except UnicodeDecodeError as error:
        raise SchemaError(
            "The file is not UTF-8.",
            where=where,
            found=f"byte 0x{error.object[error.start]:02x}",
            remedy="Write the column again as UTF-8 strings.",
        ) from error
    return strings


def _wrong_type(column: pa.Array, where: str, remedy: str) -> SchemaError:
    return SchemaError(
        "A column has the wrong type.", where=where, expected="string", found=str(column.type), remedy=remedy
    )


def _vectors(column: pa.Array, where: str, dim: int | None) -> tuple[list[bytes | None], list[str], int | None]:
    """Returns each row's unit vector, its problem, and the vectors' length; a null is a row without an embedding."""
    kind = column.type
    if not (_is_list(kind) and pa.types.is_floating(kind.value_type)):
        raise SchemaError(
            "The embedding column has the wrong type.",
            where=where,
            expected="list<float>, list<double> or list<halffloat>, with or without a fixed size",
            found=str(kind),
            remedy="Name another column of embeddings, or none.",
        )
    present = column.is_valid().to_pylist()
    lengths = pc.unique(pc.list_value_length(column.drop_null())).to_pylist()
    for length in lengths:
        check_dim(length, dim, where)
        dim = length
    if dim is None:  # nulls only
        return [None] * len(column), [""] * len(column), None
    numbers = column.flatten().to_numpy(zero_copy_only=False)  # a null number becomes NaN
    units = iter(unit_vectors(numbers.reshape(-1, dim)))
    vectors = [next(units) if valid else None for valid in present]
    problems = ["bad_embedding" if valid and not vector else "" for valid, vector in zip(present, vectors, strict=True)]
    return vectors, problems, dim


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))
