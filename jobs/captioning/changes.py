"""Compares the rows of a refresh that were captioned again with what they were before: `_changes.parquet`; no Ray.

Its memory does not grow with the run: rows are compared in ranges of ids.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.captioning.carry import BEFORE_COLUMNS, BEFORE_FOLDER, is_carried, texts_differ
from smallcap import storage
from smallcap.output.part_files import list_parts

CHANGES_FILE = "_changes.parquet"  # hidden from readers that take the whole output as a data set
_CHANGES = pa.schema(
    [
        *list(BEFORE_COLUMNS)[:2],
        *(
            BEFORE_COLUMNS.field(name).with_name(f"{name}_{when}")
            for name in ("caption", "neighbours")
            for when in ("before", "after")
        ),
    ]
)
_ROWS_AT_ONCE = 200_000


@dataclass(frozen=True)
class Changes:
    """How many rows have another caption or other retrieved texts than before, and how many another caption."""

    rows: int
    captions: int


def write_changes(out: str) -> Changes | None:
    """Writes what a refresh has changed, sorted by image id.

    Returns:
        The counts; None where `remove_before` was called already.

    Raises:
        StorageError: The service fails.
    """
    before = [uri for uri in storage.list_folder(storage.join(out, BEFORE_FOLDER)) if uri.endswith(".parquet")]
    if not before:
        return None
    after = [uri for uri in list_parts(out) if not is_carried(uri.rpartition("/")[2])]
    rows = captions = 0
    with storage.scratch_folder() as folder:
        path = folder / CHANGES_FILE
        with pq.ParquetWriter(path, _CHANGES, compression="zstd") as writer:
            for first, stop in _ranges(before):
                changes = _compared(_read(before, first, stop), _read(after, first, stop))
                writer.write_table(changes)
                rows += len(changes)
                captions += pc.sum(_differ(changes["caption_before"], changes["caption_after"]), min_count=0).as_py()
        storage.move_in(path, storage.join(out, CHANGES_FILE))
    return Changes(rows, captions)


def remove_before(out: str) -> None:
    """Removes what a refresh has kept for the comparison; call it when the counts are recorded."""
    storage.remove(storage.join(out, BEFORE_FOLDER))


def _ranges(uris: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Yields half-open ranges of ids with about equally many rows; the last one has no end."""
    ids = pa.concat_arrays([_read_file(uri, ["image_id"])["image_id"].combine_chunks() for uri in uris]).sort()
    bounds = [ids[start].as_py() for start in range(0, len(ids), _ROWS_AT_ONCE)]
    yield from zip(bounds, [*bounds, None][1:], strict=True)


def _read(uris: Sequence[str], first: str, stop: str | None) -> pa.Table:
    """Returns the rows with ids of a range."""
    tables = [BEFORE_COLUMNS.empty_table()]
    for uri in uris:
        rows = _read_file(uri, BEFORE_COLUMNS.names).cast(BEFORE_COLUMNS)
        wanted = pc.greater_equal(rows["image_id"], first)
        if stop is not None:
            wanted = pc.and_(wanted, pc.less(rows["image_id"], stop))
        tables.append(rows.filter(wanted))
    return pa.concat_tables(tables).sort_by("image_id")


def _read_file(uri: str, columns: Sequence[str]) -> pa.Table:
    return pq.read_table(io.BytesIO(storage.read_bytes(uri)), columns=list(columns))


def _compared(before: pa.Table, after: pa.Table) -> pa.Table:
    """Returns the changes among the rows that both have."""
    both = before.filter(pc.is_in(before["image_id"], value_set=after["image_id"]))
    after = after.take(pc.index_in(both["image_id"], value_set=after["image_id"]))
    columns = [both["image_id"], both["image_uri"]]
    columns += [table[name] for name in ("caption", "neighbours") for table in (both, after)]
    other_texts = pa.array(texts_differ(both["neighbours"], after["neighbours"]))
    differs = pc.or_(_differ(both["caption"], after["caption"]), other_texts)
    return pa.table(columns, schema=_CHANGES).filter(differs)


def _differ(before: pa.ChunkedArray, after: pa.ChunkedArray) -> pa.ChunkedArray:
    """Says which texts differ; null is a text of its own."""
    both_null = pc.and_(pc.is_null(before), pc.is_null(after))
    return pc.fill_null(pc.not_equal(before, after), pc.invert(both_null))
