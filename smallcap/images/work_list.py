"""The stored list of a run's work: what there is to caption, cut into fragments, written once below `OUT/_work`.

A listing is Parquet files with the images that have URIs of their own, sorted by id; a table of all fragments; and at
last a marker: a listing without its marker does not exist and is written over. Listing images again adds a listing
with what is new. The format is described in docs/formats.md. This module knows nothing of what is done already.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from smallcap import storage
from smallcap.config import InputConfig
from smallcap.errors import ConfigError, SchemaError
from smallcap.images.fragments import (
    FRAGMENT_COLUMNS,
    FRAGMENT_ROWS,
    Fragment,
    FragmentKind,
    FragmentTable,
    InputBatch,
)
from smallcap.images.kinds import IMAGE_SUFFIXES
from smallcap.images.parquet import read_parquet
from smallcap.images.row_ranges import RowRanges
from smallcap.images.sorting import (
    DuplicateExample,
    Duplicates,
    UnsortedError,
    checked_order,
    sort_images,
    unique_images,
    without_known,
)
from smallcap.images.sources import IMAGE_COLUMNS, ImageSources
from smallcap.images.tars import choose_tar_ids, read_tar

__all__ = [
    "FRAGMENT_ROWS",
    "Fragment",
    "FragmentKind",
    "FragmentTable",
    "InputBatch",
    "WorkList",
    "count_images",
    "extend_work_list",
    "load_work_list",
    "make_work_list",
    "read_fragment",
]

FORMAT_VERSION = 1
WORK_FOLDER = "_work"
FILE_ROWS = 1 << 16  # of one file of images: its 256 row groups keep the footer within one small read


@dataclass(frozen=True)
class WorkList:
    """What a run has to caption.

    Attributes:
        listed_at: When the newest listing was made.
        fragments: All fragments, by their numbers.
        images: How many images there are; None while tars make it unknown.
        duplicates: Images with URIs that were left out because their ids had been named before.
        kept_columns: Columns that pass through to the output.
        examples: At most five of the duplicates whose id stood for another URI.
        sources: Of the newest listing.
    """

    listed_at: str
    fragments: FragmentTable
    images: int | None
    duplicates: int
    kept_columns: pa.Schema
    examples: tuple[DuplicateExample, ...] = ()
    sources: tuple[str, ...] = ()


def make_work_list(sources: Sequence[str], config: InputConfig, out: str, keep_columns: Sequence[str] = ()) -> WorkList:
    """Lists all images and stores the list in `out`, in place of a listing that was not finished.

    Args:
        sources: Folders, prefixes, globs, images, tars, Parquet files with image bytes, or lists of URIs.
        config: The columns of lists, and the ids of tars.
        out: The run's output folder, without a finished listing.
        keep_columns: Columns that pass through to the output.

    Raises:
        ConfigError: There are no images, or columns to keep clash among the sources.
        SchemaError: A list is damaged, or has not a column that it must have.
        StorageError: A source does not exist, or the service fails.
    """
    assert not _load_markers(out), "a finished listing is never written over"
    listing = _Listing(out, 0, ImageSources(sources, config, tuple(keep_columns)))
    listing.write()
    if not listing.fragments:
        raise no_images(sources)
    listing.finish()
    return _loaded(out)


def extend_work_list(sources: Sequence[str], config: InputConfig, out: str) -> WorkList:
    """Lists again, and adds the images whose ids are not in the stored list, as new fragments.

    Tars and Parquet files with images are known by their URIs. Where nothing is new, nothing is written.

    Raises:
        ConfigError: There is no stored list to extend, or columns to keep have other types than before.
        SchemaError: A list is damaged, or has not a column that it must have.
        StorageError: A source does not exist, or the service fails.
    """
    known = load_work_list(out)
    if known is None:
        raise ConfigError("There is no stored list of images to extend.", where=out, remedy="Run without --relist.")
    markers = _load_markers(out)
    listing = _Listing(
        out,
        len(markers),
        ImageSources(sources, config, tuple(known.kept_columns.names), kept=known.kept_columns),
        known=known.fragments.table,
        tar_ids=next((marker["tar_ids"] for marker in markers if marker["tar_ids"]), None),
    )
    listing.write()
    if not listing.fragments:
        return known
    listing.finish()
    return _loaded(out)


def load_work_list(out: str) -> WorkList | None:
    """Returns the stored list of a run; None where none was finished.

    Raises:
        SchemaError: It was written by a newer release, or is damaged.
    """
    markers = _load_markers(out)
    if not markers:
        return None
    tables = [_read_fragments(out, number) for number in range(len(markers))]
    fragments = FragmentTable(pa.concat_tables(tables))
    kept = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(markers[-1]["kept_schema"])))
    return WorkList(
        listed_at=markers[-1]["listed_at"],
        fragments=fragments,
        images=fragments.images,
        duplicates=sum(marker["duplicates"] for marker in markers),
        kept_columns=kept,
        examples=tuple(DuplicateExample(**example) for marker in markers for example in marker["examples"]),
        sources=tuple(markers[-1]["sources"]),
    )


def _loaded(out: str) -> WorkList:
    work = load_work_list(out)
    assert work is not None  # its marker has just been written
    return work


def read_fragment(
    fragment: Fragment, wanted: RowRanges | None, config: InputConfig, kept_columns: pa.Schema
) -> Iterator[InputBatch]:
    """Yields the images of a fragment in their order, at most 256 at a time.

    Args:
        fragment: What to read.
        wanted: The rows to yield; None yields all, and at least one: what cannot be read is an error row.
        config: The columns of Parquet files with images.
        kept_columns: Of the work list.

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


def count_images(fragment: Fragment, most: int, config: InputConfig) -> int:
    """Reads a fragment, whose length is known only so, until it has had `most` images; returns how many it had."""
    counted = 0
    for images in read_fragment(fragment, None, config, pa.schema([])):
        counted += len(images.rows)
        if counted >= most:
            break
    return counted


def no_images(sources: Sequence[str]) -> ConfigError:
    """Returns the error of sources that hold nothing."""
    return ConfigError(
        "There are no images.",
        where=", ".join(sources),
        expected=f"files ending in {' '.join(IMAGE_SUFFIXES)}, tars, or Parquet files with images",
        remedy="Check the path; name other files in a list of URIs.",
    )


class _Listing:
    """Writes one listing: images and fragments first, the marker last.

    Args:
        out: The run's output folder.
        number: Of the listing.
        sources: What to list.
        known: Fragments of the listings before.
        tar_ids: What they settled; None lets this one settle it.
    """

    def __init__(
        self, out: str, number: int, sources: ImageSources, known: pa.Table | None = None, tar_ids: str | None = None
    ) -> None:
        self._out, self._number, self._sources, self._tar_ids = storage.absolute(out), number, sources, tar_ids
        self._known = known if known is not None else FRAGMENT_COLUMNS.empty_table()
        self._duplicates = Duplicates()
        self.fragments: list[pa.Table] = []

    def write(self) -> None:
        """Lists the sources and writes the images that have URIs."""
        self._clear()
        with storage.scratch_folder() as scratch:
            try:
                # Most folders and many lists are in order already: they need no copy in between.
                self._write_images(checked_order(self._sources.tables()), scratch)
            except UnsortedError:
                self._write_images(sort_images(self._sources.tables(), scratch), scratch)
        self._add_tars()
        self._add_parquet()

    def finish(self) -> None:
        """Writes the fragments and then the marker, from which on the listing exists."""
        fragments = pa.concat_tables(self.fragments)
        buffer = pa.BufferOutputStream()
        pq.write_table(_with_relative_uris(fragments, self._out), buffer, compression="zstd")
        file = f"{_name(self._number)}-fragments.parquet"
        storage.write_bytes(_work_uri(self._out, file), buffer.getvalue().to_pybytes())
        kept = self._sources.kept if self._sources.kept is not None else pa.schema([])
        marker = {
            "format_version": FORMAT_VERSION,
            "sources": list(self._sources.sources),
            "listed_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "images": FragmentTable(fragments).images,
            "duplicates": self._duplicates.count,
            "examples": [asdict(example) for example in self._duplicates.examples],
            "kept_columns": {column.name: str(column.type) for column in kept},
            "kept_schema": base64.b64encode(kept.serialize().to_pybytes()).decode(),
            "tar_ids": self._tar_ids,
        }
        text = json.dumps(marker, indent=2, ensure_ascii=False) + "\n"
        storage.write_bytes(_work_uri(self._out, f"{_name(self._number)}.json"), text.encode())

    def _clear(self) -> None:
        """Removes what an unfinished listing of this number left."""
        for uri in storage.list_folder(_work_uri(self._out)):
            if uri.rsplit("/", 1)[-1].startswith(f"{_name(self._number)}-"):
                storage.remove(uri)

    def _write_images(self, tables: Iterator[pa.Table], scratch: Path) -> None:
        self._duplicates, self.fragments = Duplicates(), []
        for listing in range(self._number):
            tables = without_known(tables, _stored_ids(self._out, listing))
        for number, table in enumerate(_regrouped(unique_images(tables, self._duplicates))):
            file = f"{_name(self._number)}-images-{number:05d}.parquet"
            # No statistics and dictionaries: a row group is read whole, and each would lengthen the footer 256 times.
            pq.write_table(
                table,
                scratch / file,
                row_group_size=FRAGMENT_ROWS,
                compression="zstd",
                use_dictionary=False,
                write_statistics=False,
            )
            storage.move_in(scratch / file, _work_uri(self._out, file))
            starts = np.arange(0, table.num_rows, FRAGMENT_ROWS)
            rows = np.minimum(table.num_rows - starts, FRAGMENT_ROWS)
            self._add("uris", _work_uri(self._out, file), list(range(len(starts))), rows.tolist())

    def _add_tars(self) -> None:
        known = self._known_uris("tar")
        tars = [tar for uri, tar in self._sources.tars.items() if uri not in known]
        if tars and self._tar_ids is None:
            chosen = self._sources.config.tar_ids
            self._tar_ids = choose_tar_ids([tar.uri for tar in tars]) if chosen == "auto" else chosen
        for tar in tars:
            self._add("tar", tar.uri, [0], [None], f"{tar.name}/" if self._tar_ids == "tar/key" else "")

    def _add_parquet(self) -> None:
        known = self._known_uris("parquet")
        for uri, images in self._sources.parquet.items():
            if uri in known:
                continue
            rows = images.outline.rows if not images.outline.problem else (1,)
            groups = [group for group, count in enumerate(rows) if count]
            self._add("parquet", uri, groups, [rows[group] for group in groups], f"{images.name}/")

    def _known_uris(self, kind: FragmentKind) -> set[str]:
        return set(self._known.filter(pc.equal(self._known["kind"], kind))["uri"].unique().to_pylist())

    def _add(
        self, kind: FragmentKind, uri: str, row_groups: list[int], rows: list[int | None], id_prefix: str = ""
    ) -> None:
        if row_groups:
            count = len(row_groups)
            columns = [[kind] * count, [uri] * count, row_groups, rows, [id_prefix] * count]
            arrays = [pa.array(values, column.type) for values, column in zip(columns, FRAGMENT_COLUMNS, strict=True)]
            self.fragments.append(pa.table(arrays, schema=FRAGMENT_COLUMNS))


def _read_uris(fragment: Fragment, kept_columns: pa.Schema) -> InputBatch:
    with storage.open_ranged(fragment.uri) as file:
        try:
            table = pq.ParquetFile(file, pre_buffer=True).read_row_group(fragment.row_group)
            table = table.cast(pa.schema([*IMAGE_COLUMNS, *kept_columns]))
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


def _regrouped(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Yields the rows in tables of one file's length, the last one excepted."""
    held: list[pa.Table] = []
    rows = 0
    for table in tables:
        held.append(table)
        rows += table.num_rows
        while rows >= FILE_ROWS:
            joined = pa.concat_tables(held)
            yield joined.slice(0, FILE_ROWS).combine_chunks()
            held, rows = [joined.slice(FILE_ROWS)], rows - FILE_ROWS
    if rows:
        yield pa.concat_tables(held).combine_chunks()


def _stored_ids(out: str, listing: int) -> Iterator[pa.Array]:
    """Yields the ids of a stored listing in their order."""
    fragments = _read_fragments(out, listing)
    for uri in fragments.filter(pc.equal(fragments["kind"], "uris"))["uri"].unique().to_pylist():
        with storage.open_ranged(uri) as file:
            yield pq.ParquetFile(file).read(columns=["image_id"])["image_id"].combine_chunks()


def _load_markers(out: str) -> list[dict[str, Any]]:
    """Reads the markers of all finished listings, oldest first."""
    markers: list[dict[str, Any]] = []
    names = {uri.rsplit("/", 1)[-1] for uri in storage.list_folder(_work_uri(out))}
    while (name := f"{_name(len(markers))}.json") in names:
        uri = _work_uri(out, name)
        try:
            marker = json.loads(storage.read_bytes(uri))
            version = marker["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(uri, repr(error)) from error
        if version != FORMAT_VERSION:
            raise SchemaError(
                "The stored list of images has an unknown format.",
                where=uri,
                expected=str(FORMAT_VERSION),
                found=str(version),
                remedy="Go on with the smallcap release that began the run, or a newer one.",
            )
        markers.append(marker)
    return markers


def _read_fragments(out: str, listing: int) -> pa.Table:
    """Reads the fragments of one listing, with absolute URIs."""
    uri = _work_uri(out, f"{_name(listing)}-fragments.parquet")
    try:
        table = pq.read_table(pa.BufferReader(storage.read_bytes(uri))).cast(FRAGMENT_COLUMNS)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _damaged(uri, str(error)) from error
    uris = pc.binary_join_element_wise(storage.absolute(out), table["uri"], "/")
    return table.set_column(1, FRAGMENT_COLUMNS.field("uri"), pc.if_else(_is_stored(table), uris, table["uri"]))


def _with_relative_uris(table: pa.Table, out: str) -> pa.Table:
    """Makes the URIs of the stored list's own files relative to `out`, so that the folder can be moved."""
    uris = pc.utf8_slice_codeunits(table["uri"], len(out) + 1)
    return table.set_column(1, FRAGMENT_COLUMNS.field("uri"), pc.if_else(_is_stored(table), uris, table["uri"]))


def _is_stored(table: pa.Table) -> pa.ChunkedArray:
    return pc.equal(table["kind"], "uris")


def _work_uri(out: str, *names: str) -> str:
    return storage.join(storage.absolute(out), WORK_FOLDER, *names)


def _name(listing: int) -> str:
    return f"listing-{listing:03d}"


def _damaged(uri: str, found: str) -> SchemaError:
    return SchemaError(
        "The stored list of images cannot be read.",
        where=uri,
        found=found,
        remedy="Restore it, or caption into another folder.",
    )
