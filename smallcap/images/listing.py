"""Lists a run's input and stores it as a listing of the work list (`work_list`).

Images and fragments are written first, the marker last. A listing without its marker does not count and is
overwritten. Listing again adds a listing with the new images.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from itertools import chain, count, islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from smallcap import storage
from smallcap.config import InputConfig
from smallcap.errors import ConfigError
from smallcap.images.fragments import FRAGMENT_COLUMNS, FRAGMENT_ROWS, FragmentKind, FragmentTable
from smallcap.images.kinds import IMAGE_SUFFIXES
from smallcap.images.lists import LIST_SUFFIXES
from smallcap.images.parquet import ids_repeat
from smallcap.images.relisting import Comparison, write_images
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
from smallcap.images.tars import choose_tar_ids
from smallcap.images.work_list import (
    Marker,
    WorkList,
    listing_name,
    load_markers,
    load_work_list,
    work_uri,
    write_fragments,
)

_FILES_DESCRIBED = 10_000
_NO_FRAGMENTS = FRAGMENT_COLUMNS.empty_table()
FILE_ROWS = 1 << 16  # in one file of images: its 256 row groups keep the footer within one small read


def make_work_list(sources: Sequence[str], config: InputConfig, out: str, keep_columns: Sequence[str] = ()) -> WorkList:
    """Lists all images and stores the list in `out`; overwrites a listing that was not finished.

    Args:
        sources: Folders, prefixes, globs, images, tars, Parquet files with image bytes, or lists of URIs.
        config: The input's config: the columns of lists, and the ids of tars.
        out: The run's output folder, without a finished listing.
        keep_columns: Columns that pass through to the output.

    Raises:
        ConfigError: There are no images, or columns to keep clash among the sources.
        SchemaError: A list is damaged, or lacks a column.
        StorageError: A source does not exist, or the service fails.
    """
    assert not load_markers(out), "a finished listing is never overwritten"
    listing = _Listing(out, 0, ImageSources(sources, config, tuple(keep_columns), out))
    listing.write()
    if not listing.fragments:
        raise no_images(sources)
    listing.finish()
    return _loaded(out)


def extend_work_list(sources: Sequence[str], config: InputConfig, out: str) -> WorkList:
    """Lists again, and adds the images that are not in the stored list as new fragments.

    An image is known by its id and its URI, a tar or a Parquet file with images by its URI. Nothing is written where
    nothing is new. `relisted` tells which stored images were overwritten since, and how many are gone.

    Raises:
        ConfigError: There is no stored list to extend, or columns to keep have other types than before.
        SchemaError: A list is damaged, or lacks a column.
        StorageError: A source does not exist, or the service fails.
    """
    known = load_work_list(out)
    if known is None:
        raise ConfigError("There is no stored list of images to extend.", where=out, remedy="Run without --relist.")
    markers = load_markers(out)
    listing = _Listing(
        out,
        len(markers),
        ImageSources(sources, config, tuple(known.kept_columns.names), out, kept=known.kept_columns),
        known=known.fragments.table,
        tar_ids=next((marker.tar_ids for marker in markers if marker.tar_ids), None),
    )
    listing.write()
    relisted = listing.comparison.result()
    if not listing.fragments:
        return replace(known, passed_over=listing.passed_over, relisted=relisted)
    listing.finish()
    return replace(_loaded(out), relisted=relisted)


def _loaded(out: str) -> WorkList:
    work = load_work_list(out)
    assert work is not None  # its marker has just been written
    return work


def no_images(sources: Sequence[str]) -> ConfigError:
    """Returns the error for sources without images."""
    return ConfigError(
        "There are no images.",
        where=", ".join(sources),
        expected=f"files ending in {' '.join(IMAGE_SUFFIXES)}, tars, Parquet files with images, or a list's own name "
        f"({' '.join(LIST_SUFFIXES)}, also with .gz)",
        found=_endings(sources),
        remedy="Check the path; name other files in a list of URIs.",
    )


def _endings(sources: Sequence[str]) -> str:
    """Says which files the sources hold, by their endings; of many files the first ones."""
    files = chain.from_iterable(map(storage.iter_files, sources))
    endings = Counter(storage.suffix_of(file) or "no ending" for file in islice(files, _FILES_DESCRIBED))
    return ", ".join(f"{count} × {ending}" for ending, count in endings.most_common(8)) or "no files"


class _Listing:
    """Writes one listing: images and fragments first, the marker last.

    Args:
        out: The run's output folder.
        number: The listing's number.
        sources: The sources to list.
        known: The fragments of earlier listings.
        tar_ids: How earlier listings tell the images of tars apart; None lets this listing choose.
    """

    def __init__(
        self, out: str, number: int, sources: ImageSources, known: pa.Table | None = None, tar_ids: str | None = None
    ) -> None:
        self._out, self._number, self._sources, self._tar_ids = storage.absolute(out), number, sources, tar_ids
        self._known = known if known is not None else _NO_FRAGMENTS
        self._repeats = 0
        self._examples: list[DuplicateExample] = []
        self.fragments: list[pa.Table] = []
        self.comparison = Comparison(self._known)

    @property
    def passed_over(self) -> dict[str, int]:
        """How many files were left out though they look like images, by the reason."""
        return dict(sorted(self._sources.passed_over.items()))

    def write(self) -> None:
        """Lists the sources and writes the images that have URIs of their own."""
        self._clear()
        with storage.scratch_folder() as scratch:
            try:
                # Most folders and many lists are in order already, and need no sorted copy.
                self._write_images(checked_order(self._sources.tables()), scratch)
            except UnsortedError:
                self._write_images(sort_images(self._sources.tables(), scratch), scratch)
        self._add_tars()
        self._add_parquet()

    def finish(self) -> None:
        """Writes the fragments and then the marker, which makes the listing valid."""
        fragments = pa.concat_tables(self.fragments)
        write_fragments(self._out, self._number, fragments)
        kept = self._sources.kept if self._sources.kept is not None else pa.schema([])
        marker = Marker(
            sources=tuple(self._sources.sources),
            listed_at=datetime.now(UTC).isoformat(timespec="seconds"),
            images=FragmentTable(fragments).images,
            duplicates=self._repeats,
            examples=tuple(self._examples),
            kept_columns={column.name: str(column.type) for column in kept},
            kept_schema=base64.b64encode(kept.serialize().to_pybytes()).decode(),
            tar_ids=self._tar_ids,
            passed_over=self.passed_over,
        )
        marker.write(work_uri(self._out, f"{listing_name(self._number)}.json"))

    def _clear(self) -> None:
        """Removes the files that an unfinished listing of this number left."""
        for uri in storage.list_folder(work_uri(self._out)):
            if uri.rsplit("/", 1)[-1].startswith(f"{listing_name(self._number)}-"):
                storage.remove(uri)

    def _write_images(self, tables: Iterator[pa.Table], scratch: Path) -> None:
        """Writes the images of tables in the order of id and URI; those whose ids others have, under qualified ids."""
        self._repeats, self._examples, self.fragments = 0, [], []
        self.comparison = Comparison(self._known)
        for turn in count():
            name = "images" if turn == 0 else f"qualified{turn if turn > 1 else ''}"
            duplicates = Duplicates(scratch / f"{name}.arrow")
            self._write_files(name, unique_images(self._without_stored(tables, duplicates), duplicates), scratch)
            self._repeats += duplicates.count
            self._examples = self._examples or duplicates.examples
            if not duplicates.aside:
                break
            # Their ids are new, so they are sorted again. One may be the URI by which a list names the same image, or,
            # in an odd list, the id of another.
            folder = scratch / name
            folder.mkdir(exist_ok=True)
            tables = sort_images(duplicates.rows_aside(), folder)

    def _without_stored(self, tables: Iterator[pa.Table], duplicates: Duplicates) -> Iterator[pa.Table]:
        """Leaves out the images of earlier listings, and those that this one has written."""
        for files in _image_files(self._known):
            stored, compare = self.comparison.stored_images(files), partial(self.comparison.compare, files[0])
            tables = without_known(tables, stored, duplicates, repeats=False, compare=compare)
        for files in _image_files(pa.concat_tables([_NO_FRAGMENTS, *self.fragments])):
            tables = without_known(tables, _stored_images(files), duplicates, repeats=True)
        return tables

    def _write_files(self, name: str, tables: Iterator[pa.Table], scratch: Path) -> None:
        """Writes image files and adds their fragments."""
        for number, table in enumerate(_regrouped(tables)):
            file = f"{listing_name(self._number)}-{name}-{number:05d}.parquet"
            write_images(work_uri(self._out, file), table)
            starts = np.arange(0, table.num_rows, FRAGMENT_ROWS)
            rows = np.minimum(table.num_rows - starts, FRAGMENT_ROWS)
            self._add("uris", work_uri(self._out, file), list(range(len(starts))), rows.tolist())

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
        added = {uri: images for uri, images in self._sources.parquet.items() if uri not in known}
        before = self._known.filter(pc.equal(self._known["kind"], "parquet"))["qualified"]
        qualified = before[0].as_py() if len(before) else ids_repeat(list(added), self._sources.config)
        for uri, images in added.items():
            rows = images.outline.rows if not images.outline.problem else (1,)
            groups = [group for group, count in enumerate(rows) if count]
            self._add("parquet", uri, groups, [rows[group] for group in groups], f"{images.name}/", qualified)

    def _known_uris(self, kind: FragmentKind) -> set[str]:
        return set(self._known.filter(pc.equal(self._known["kind"], kind))["uri"].unique().to_pylist())

    def _add(
        self,
        kind: FragmentKind,
        uri: str,
        row_groups: list[int],
        rows: list[int | None],
        id_prefix: str = "",
        qualified: bool = False,
    ) -> None:
        if row_groups:
            count = len(row_groups)
            columns = [[kind] * count, [uri] * count, row_groups, rows, [id_prefix] * count, [qualified] * count]
            arrays = [pa.array(values, column.type) for values, column in zip(columns, FRAGMENT_COLUMNS, strict=True)]
            self.fragments.append(pa.table(arrays, schema=FRAGMENT_COLUMNS))


def _regrouped(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Yields the rows in tables with the length of a file; the last one may be shorter."""
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


def _image_files(fragments: pa.Table) -> list[list[str]]:
    """Returns the URIs of stored images files; those of one list are sorted by id as a whole."""
    files: dict[str, list[str]] = {}
    for uri in fragments.filter(pc.equal(fragments["kind"], "uris"))["uri"].unique().to_pylist():
        files.setdefault(uri.rpartition("-")[0], []).append(uri)
    return list(files.values())


def _stored_images(files: Sequence[str]) -> Iterator[pa.Table]:
    """Yields the ids and URIs in images files, in their order."""
    for uri in files:
        with storage.open_ranged(uri) as file:
            yield pq.ParquetFile(file).read(columns=IMAGE_COLUMNS.names)
