"""Carries rows of a run over into its refresh: those whose prompts another index leaves as they are; without Ray.

A caption follows from its image and from the texts that are retrieved for it. The embeddings that a run has saved tell
what the new index retrieves, and no image is read for that. Rows whose texts are the same are written as parts of the
new run, whose footers say which rows they hold. The others are in no part of it: to the captioning job they are images
that are not done yet.

`_refresh/` keeps the other rows as they were until `changes` compares them with the new ones. A file there is written
after its part, and says that this part is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.captioning.record import Attempt, check_attempt
from jobs.captioning.routes import Routes
from smallcap import storage
from smallcap.images.row_ranges import RowRanges
from smallcap.index.merged import CaptionSearch, find_nearest
from smallcap.index.retriever import Neighbours
from smallcap.output.parquet_files import read_parquet, write_parquet
from smallcap.output.part_files import (
    EMBEDDINGS_FOLDER,
    PartInfo,
    PartOptions,
    part_name,
    sidecar_uri,
    write_part,
)
from smallcap.output.schema import CAPTION_COLUMNS, EMBEDDING_COLUMN, PLACE_COLUMNS, STATUS_OK

BEFORE_FOLDER = "_refresh"
BEFORE_COLUMNS = pa.schema([CAPTION_COLUMNS.field(name) for name in ("image_id", "image_uri", "caption", "neighbours")])
_QUERIES_AT_ONCE = 1024
_CARRIED = 0  # in the names of parts: the number of no attempt


@dataclass(frozen=True)
class PromptSearch:
    """How a run retrieves.

    Attributes:
        k: Captions in a prompt.
        exclude_own: Whether an image's own captions are not retrieved for it.
        routes: Where a column says which index is searched.
    """

    k: int
    exclude_own: bool
    routes: Routes | None = None

    def nearest(self, retriever: CaptionSearch, embedded: pa.Table, names: Sequence[str | None] | None) -> Neighbours:
        """Returns what is retrieved for the images of embeddings, at least one, in the indexes of these names."""
        vectors = embedded[EMBEDDING_COLUMN].combine_chunks().flatten().to_numpy().reshape(len(embedded), -1)
        ids = embedded["image_id"].to_pylist() if self.exclude_own else None
        found = []
        for start in range(0, len(vectors), _QUERIES_AT_ONCE):
            rows = slice(start, start + _QUERIES_AT_ONCE)
            found.append(find_nearest(retriever, vectors[rows], self.k, ids and ids[rows], names and names[rows]))
        return Neighbours.join(found)


@dataclass(frozen=True)
class OldPart:
    """A part of the old run; `number` counts its parts."""

    number: int
    name: str
    info: PartInfo


@dataclass(frozen=True)
class Split:
    """The rows of a part.

    Attributes:
        same: Those to carry over, with the new index's neighbours, their embeddings and places.
        info: What is true of them.
        others: Those whose images must be captioned again, as they were.
        searched: Whether there were embeddings to search with.
    """

    same: pa.Table
    info: PartInfo
    others: pa.Table
    searched: bool = True


@dataclass(frozen=True)
class CarrySpec:
    """What carrying a part over takes, besides the part and the index.

    Attributes:
        run: The old run's folder.
        out: The new run's folder.
        attempt: The attempt that carries.
        search: How both runs retrieve.
        schema: The schema of the new run's parts.
        rows_per_row_group: The most rows of a row group.
    """

    run: str
    out: str
    attempt: Attempt
    search: PromptSearch
    schema: pa.Schema
    rows_per_row_group: int


def carry_part(part: OldPart, spec: CarrySpec, retriever: CaptionSearch) -> None:
    """Writes the rows of a part that stay as they are, and then the others for the comparison.

    Raises:
        SchemaError: The part or its embeddings are damaged.
        ConflictError: Another process has started the run again.
        StorageError: The service fails.
    """
    split = split_part(spec.run, part, spec.search, retriever)
    check_attempt(spec.out, spec.attempt)
    if len(split.same):
        options = PartOptions(spec.rows_per_row_group, embeddings=EMBEDDING_COLUMN in split.same.column_names)
        write_part(spec.out, part_name(_CARRIED, part.number), split.same, split.info, spec.schema, options)
    write_parquet(_before_uri(spec.out, part), split.others, spec.rows_per_row_group)


def split_part(run: str, part: OldPart, search: PromptSearch, retriever: CaptionSearch) -> Split:
    """Tells the rows of a part that stay as they are from those whose images must be captioned again.

    The rows of errors stay; without embeddings to search with, no others. Rows that name an index which is no more are
    captioned again, and then become errors.
    """
    rows, _ = read_parquet(storage.join(run, part.name))
    before = rows.select(BEFORE_COLUMNS.names).cast(BEFORE_COLUMNS)
    captioned = pc.equal(rows["status"], STATUS_OK)
    embedded = _read_embeddings(run, part, rows)
    if embedded is None:
        errors = part.info.without(part.info.captioned, 0, part.info.errors)
        return Split(rows.filter(pc.invert(captioned)), errors, before.filter(captioned), searched=False)
    names, is_refused = _routed(rows.filter(captioned), search.routes)
    found = search.nearest(retriever, embedded, names)
    differs = texts_differ(rows.filter(captioned)["neighbours"], pa.chunked_array([found.to_column()])) | is_refused
    gone = np.zeros(len(rows), bool)
    gone[captioned.to_numpy()] = differs
    fragments, numbers = (embedded[name].to_numpy()[differs] for name in PLACE_COLUMNS.values())
    places = {int(one): RowRanges.of(numbers[fragments == one]) for one in np.unique(fragments)}
    info = part.info.without(places, part.info.ok - int(gone.sum()), part.info.errors)
    same = _with_searched(rows, captioned, embedded, found).filter(pa.array(~gone))
    return Split(same, info, before.filter(pa.array(gone)))


def _routed(rows: pa.Table, routes: Routes | None) -> tuple[list[str | None] | None, np.ndarray]:
    """Returns the names of the indexes to search for each row, and which rows name one that is not there: [n] bool."""
    if routes is None:
        return None, np.zeros(len(rows), bool)
    names = routes.of_rows(rows)
    refusals = routes.refusals(names)
    known = [None if refusal else name for name, refusal in zip(names, refusals, strict=True)]
    return known, np.array([refusal is not None for refusal in refusals], bool)


def is_carried(name: str) -> bool:
    """Says of a part's name whether the part was carried over."""
    return name.startswith(part_name(_CARRIED, 0).rpartition("-")[0])


def parts_done(out: str) -> set[int]:
    """Returns the numbers of the old parts that are carried over already."""
    uris = storage.list_folder(storage.join(out, BEFORE_FOLDER))
    return {int(uri.rpartition("-")[2].removesuffix(".parquet")) for uri in uris if uri.endswith(".parquet")}


def _before_uri(out: str, part: OldPart) -> str:
    return storage.join(out, BEFORE_FOLDER, f"before-{part.number:06d}.parquet")


def _read_embeddings(run: str, part: OldPart, rows: pa.Table) -> pa.Table | None:
    """Returns the embeddings and places of a part's captioned rows, in their order.

    None where there are none, or where they are rounded: near ties would be decided otherwise than in a full run.
    """
    uri = sidecar_uri(run, EMBEDDINGS_FOLDER, part.name)
    if not storage.exists(uri):
        return None
    embedded, _ = read_parquet(uri)
    names = ["image_id", EMBEDDING_COLUMN, *PLACE_COLUMNS.values()]
    if embedded.column_names != names or embedded.schema.field(EMBEDDING_COLUMN).type.value_type != pa.float32():
        return None
    captioned = rows.filter(pc.equal(rows["status"], STATUS_OK))["image_id"]
    return embedded if embedded["image_id"].to_pylist() == captioned.to_pylist() else None


def texts_differ(old: pa.ChunkedArray, new: pa.ChunkedArray) -> np.ndarray:
    """Says for two columns of neighbours which images have other texts, or the same in another order: [n] bool."""
    return np.array([one != other for one, other in zip(_texts(old), _texts(new), strict=True)], bool)


def _texts(neighbours: pa.ChunkedArray) -> list[list[str] | None]:
    lists = neighbours.combine_chunks()
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    offsets = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
    texts = pc.struct_field(lists.flatten(), "text")
    column: pa.Array = pa.ListArray.from_arrays(offsets, texts, mask=lists.is_null())
    return column.to_pylist()


def _with_searched(rows: pa.Table, captioned: pa.ChunkedArray, embedded: pa.Table, found: Neighbours) -> pa.Table:
    """Returns rows with what was found for the captioned ones, and with their embeddings and places."""
    places = np.cumsum(captioned.to_numpy()) - 1
    take = pa.array(places, mask=~captioned.to_numpy())
    for name, column in (("neighbours", found.to_column()), ("retrieval_score", found.mean_scores())):
        rows = rows.set_column(rows.column_names.index(name), CAPTION_COLUMNS.field(name), column.take(take))
    rows = rows.append_column(EMBEDDING_COLUMN, embedded[EMBEDDING_COLUMN].combine_chunks().take(take))
    for name, stored in PLACE_COLUMNS.items():
        rows = rows.append_column(name, embedded[stored].combine_chunks().take(take))
    return rows
