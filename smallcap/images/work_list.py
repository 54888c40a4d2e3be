"""Reads the stored work list of a run in `OUT/_work`: all images to caption, cut into fragments.

It is made of listings, which `listing` writes. A listing has Parquet files with the images that have URIs,
sorted by id; a table of its fragments; and a marker, without which it does not count. docs/formats.md describes the
format. This module knows nothing of what is done already.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from smallcap import storage
from smallcap.config import InputConfig
from smallcap.errors import RowError, SchemaError
from smallcap.images.fragments import FRAGMENT_COLUMNS, Fragment, FragmentTable, InputBatch
from smallcap.images.parquet import read_parquet, unread_images
from smallcap.images.row_ranges import RowRanges
from smallcap.images.sorting import DuplicateExample
from smallcap.images.sources import IMAGE_COLUMNS
from smallcap.images.tars import read_tar
from smallcap.records import VersionedRecord, parse_record

WORK_FOLDER = "_work"


@dataclass(frozen=True)
class Relisted:
    """What a relist has found out about stored images.

    Attributes:
        overwritten: The images whose objects have another state than when they were listed: `image_id`, `image_uri`,
            the new state, `fragment` and `fragment_row`.
        gone: How many images the sources have no more.
    """

    overwritten: pa.Table
    gone: int


@dataclass(frozen=True)
class WorkList:
    """All that a run has to caption.

    Attributes:
        listed_at: The time of the newest listing.
        fragments: All fragments, by their numbers.
        images: The number of images; None while tars make it unknown.
        duplicates: The number of images with URIs that were left out because their ids came before.
        kept_columns: Columns that pass through to the output.
        examples: Duplicates whose id stood for another URI, at most five for each listing.
        sources: The sources of the newest listing.
        passed_over: How many files the newest listing left out though they look like images, by the reason.
        relisted: What the newest listing has found out about the images of earlier ones; None for the first.
    """

    listed_at: str
    fragments: FragmentTable
    images: int | None
    duplicates: int
    kept_columns: pa.Schema
    examples: tuple[DuplicateExample, ...] = ()
    sources: tuple[str, ...] = ()
    passed_over: Mapping[str, int] = field(default_factory=dict)
    relisted: Relisted | None = None


class Marker(VersionedRecord):
    """The content of a listing's marker; docs/formats.md explains the fields."""

    format_version: Literal[1] = 1
    sources: tuple[str, ...]
    listed_at: str
    images: int | None
    duplicates: int
    examples: tuple[DuplicateExample, ...]
    kept_columns: dict[str, str]
    kept_schema: str
    tar_ids: str | None
    passed_over: dict[str, int] = Field(default_factory=dict)


def load_work_list(out: str) -> WorkList | None:
    """Returns the stored list of a run; None where no listing was finished.

    Raises:
        SchemaError: The list is damaged, or has another format version.
    """
    markers = load_markers(out)
    if not markers:
        return None
    tables = [read_fragments(out, number) for number in range(len(markers))]
    fragments = FragmentTable(pa.concat_tables(tables))
    return WorkList(
        listed_at=markers[-1].listed_at,
        fragments=fragments,
        images=fragments.images,
        duplicates=sum(marker.duplicates for marker in markers),
        kept_columns=pa.ipc.read_schema(pa.py_buffer(base64.b64decode(markers[-1].kept_schema))),
        examples=tuple(example for marker in markers for example in marker.examples),
        sources=markers[-1].sources,
        passed_over=markers[-1].passed_over,
    )


def copy_work_list(run: str, out: str) -> None:
    """Copies the stored list of a run to another run, whose own list it replaces; the markers come last.

    Raises:
        StorageError: The service fails.
    """
    storage.remove(work_uri(out))
    update_work_list(run, out)


def update_work_list(run: str, out: str) -> None:
    """Copies what is new in the list of a run to another run with a copy of it; the markers come last.

    Raises:
        StorageError: The service fails.
    """
    for uri in sorted(storage.list_folder(work_uri(run)), key=lambda uri: uri.endswith(".json")):
        storage.write_bytes(work_uri(out, uri.rpartition("/")[2]), storage.read_bytes(uri))


def read_fragment(
    fragment: Fragment, wanted: RowRanges | None, config: InputConfig, kept_columns: pa.Schema
) -> Iterator[InputBatch]:
    """Yields the images of a fragment in their order, at most 256 at a time.

    Args:
        fragment: The fragment to read.
        wanted: The rows to yield. None yields all, and at least one: a file that cannot be read gives an error row.
        config: The input's config, which names the columns of Parquet files with images.
        kept_columns: The kept columns of the work list.

    Raises:
        SchemaError: The stored list is damaged.
        StorageError: The stored list is missing, or the service fails.
    """
    if fragment.kind == "tar":
        yield from read_tar(fragment, wanted, kept_columns)
    elif fragment.kind == "parquet":
        yield from read_parquet(fragment, wanted, config, kept_columns)
    elif (batch := _read_uris(fragment, kept_columns).only(wanted)) is not None:
        yield batch


def unread_rows(
    fragment: Fragment, wanted: RowRanges | None, read: int, problem: RowError, kept_columns: pa.Schema
) -> Iterator[InputBatch]:
    """Yields an error in place of what is left of a tar or a Parquet file; it is not opened.

    Args:
        fragment: The fragment.
        wanted: The rows to yield; None for all.
        read: The number of rows that have been read.
        problem: Why there are no more.
        kept_columns: The kept columns of the work list.
    """
    if fragment.kind == "parquet":
        yield from unread_images(fragment, wanted, read, problem, kept_columns)
        return
    left = None if wanted is None else wanted.subtract(RowRanges.span(0, read))
    if left is None or left:  # a tar has one row for all that cannot be read, and ends there unless its end is known
        row = read if left is None else int(left.ranges[0, 0])
        kept = pa.Table.from_pylist([{}], schema=kept_columns) if len(kept_columns) else None
        ends = left is None or left.stop == np.iinfo(np.int32).max
        yield InputBatch(np.array([row], np.int32), [fragment.uri], [fragment.uri], [problem], kept, ends)


def count_images(fragment: Fragment, most: int, config: InputConfig) -> int:
    """Counts the images of a fragment by reading it, and stops once there are `most` or more."""
    counted = 0
    for images in read_fragment(fragment, None, config, pa.schema([])):
        counted += len(images.rows)
        if counted >= most:
            break
    return counted


def _read_uris(fragment: Fragment, kept_columns: pa.Schema) -> InputBatch:
    with storage.open_ranged(fragment.uri) as file:
        try:
            table = pq.ParquetFile(file, pre_buffer=True).read_row_group(fragment.row_group)
            wanted = pa.schema([*IMAGE_COLUMNS, *kept_columns])
            table = table.select(wanted.names).cast(wanted)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise _damaged(fragment.uri, str(error)) from error
    return InputBatch(
        rows=np.arange(table.num_rows, dtype=np.int32),
        image_ids=table["image_id"].to_pylist(),
        image_uris=table["image_uri"].to_pylist(),
        data=None,
        kept=table.select(kept_columns.names) if len(kept_columns) else None,
        ends_fragment=True,
    )


def load_markers(out: str) -> list[Marker]:
    """Reads the markers of all finished listings, oldest first.

    Raises:
        SchemaError: A marker is malformed, or has another format version.
    """
    markers: list[Marker] = []
    names = {uri.rsplit("/", 1)[-1] for uri in storage.list_folder(work_uri(out))}
    while (name := f"{listing_name(len(markers))}.json") in names:
        uri = work_uri(out, name)
        markers.append(parse_record(Marker, storage.read_bytes(uri), uri, SchemaError))
    return markers


def read_fragments(out: str, listing: int) -> pa.Table:
    """Reads the fragments of one listing, with absolute URIs."""
    uri = work_uri(out, f"{listing_name(listing)}-fragments.parquet")
    try:
        table = pq.read_table(pa.BufferReader(storage.read_bytes(uri)))
        if "qualified" not in table.column_names:  # written before there was this column
            table = table.append_column(FRAGMENT_COLUMNS.field("qualified"), pa.array([False] * len(table)))
        table = table.cast(FRAGMENT_COLUMNS)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _damaged(uri, str(error)) from error
    uris = pc.binary_join_element_wise(storage.absolute(out), table["uri"], "/")
    return _with_stored_uris(table, uris)


def write_fragments(out: str, listing: int, table: pa.Table) -> None:
    """Writes the fragments of one listing; URIs of the stored list become relative, so that the folder can move."""
    relative = _with_stored_uris(table, pc.utf8_slice_codeunits(table["uri"], len(storage.absolute(out)) + 1))
    buffer = pa.BufferOutputStream()
    pq.write_table(relative, buffer, compression="zstd")
    storage.write_bytes(work_uri(out, f"{listing_name(listing)}-fragments.parquet"), buffer.getvalue().to_pybytes())


def _with_stored_uris(table: pa.Table, uris: pa.ChunkedArray) -> pa.Table:
    """Replaces the URIs of the fragments that lie in the stored list."""
    is_stored = pc.equal(table["kind"], "uris")
    return table.set_column(1, FRAGMENT_COLUMNS.field("uri"), pc.if_else(is_stored, uris, table["uri"]))


def work_uri(out: str, *names: str) -> str:
    """Returns the absolute URI of the list's folder, or of a file in it."""
    return storage.join(storage.absolute(out), WORK_FOLDER, *names)


def listing_name(listing: int) -> str:
    """Returns the start of the names of a listing's files."""
    return f"listing-{listing:03d}"


def _damaged(uri: str, found: str) -> SchemaError:
    return SchemaError(
        "The stored list of images cannot be read.",
        where=uri,
        found=found,
        remedy="Restore the file, or caption into another folder.",
    )
