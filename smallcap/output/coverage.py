"""Tells which rows of a run's input its parts hold and which are left, by ranges of rows instead of ids.

The footer of a part says which rows of which fragments it accounts for. Two parts may account for the same row: a
worker can outlive its killed driver and write after the next attempt has begun, and a repeated failure has two rows
until its attempt ends. `settle` removes the superfluous rows.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from smallcap import storage
from smallcap.images.fragments import Fragment, LeftOut, qualified_id
from smallcap.images.row_ranges import RowRanges
from smallcap.output.part_files import PartInfo, drop_rows, rename_rows
from smallcap.output.schema import STATUS_ERROR

_MAX_ROWS = np.iinfo(np.int32).max  # assumed for a fragment that has not been read to its end
_HASHES_AT_ONCE = 1 << 24  # 8 bytes each

NamedPart = tuple[str, PartInfo]  # the part's name within the output, and what its footer says


@dataclass(frozen=True, slots=True)
class WorkItem:
    """The rows of one fragment that have no row in the output yet."""

    fragment: Fragment
    wanted: RowRanges | None  # None: all rows


class Coverage:
    """The rows of each fragment for which parts account.

    Args:
        parts: All parts of the run.
        retry_failed: Whether a failed row counts as not done.

    Attributes:
        images: How many rows are done.
        left_out: What fragments hold besides their rows, where that is known from the part with the last row. All
            parts that have this row say the same, however often a tar was read.
    """

    def __init__(self, parts: Iterable[NamedPart], retry_failed: bool = False) -> None:
        self._done: dict[int, RowRanges] = {}
        self._row_counts: dict[int, int] = {}  # for fragments whose end is known from a part
        self.left_out: dict[int, LeftOut] = {}
        for _, info in parts:
            self.left_out |= info.left_out
            for fragment, rows in info.rows.items():
                done = rows.subtract(info.failed[fragment]) if retry_failed and fragment in info.failed else rows
                self._done[fragment] = self._done[fragment].union(done) if fragment in self._done else done
                if fragment in info.ends and done.stop == rows.stop:  # else the last row is tried again
                    self._row_counts[fragment] = rows.stop
        self.images = sum(map(len, self._done.values()))

    def rows_of(self, fragment: Fragment) -> int | None:
        """Returns how many rows a fragment has; None where that is unknown."""
        return self._row_counts.get(fragment.number) if fragment.rows is None else fragment.rows

    def left(self, fragment: Fragment, asked: int | None = None) -> WorkItem | None:
        """Returns the rows still to do among the first `asked` ones of a fragment, by default all; None for none."""
        done, known = self._done.get(fragment.number), self.rows_of(fragment)
        stop = min(_MAX_ROWS if known is None else known, _MAX_ROWS if asked is None else asked)
        if done is None:
            return WorkItem(fragment, None if stop in (known, _MAX_ROWS) else RowRanges.span(0, stop))
        if done.covers(stop):  # so it is with millions of fragments
            return None
        left = RowRanges.span(0, stop).subtract(done)
        return WorkItem(fragment, left) if left else None


def work_left(
    fragments: Iterable[Fragment], coverage: Coverage, limit: int | None, count_images: Callable[[Fragment, int], int]
) -> Iterator[WorkItem]:
    """Yields the work that is left among the first `limit` images.

    Args:
        fragments: The run's fragments, in their order.
        coverage: The rows that are done.
        limit: The number of images; None for all.
        count_images: A function that counts a fragment's images, up to a number, where the count is unknown.
    """
    room = limit
    for fragment in fragments:
        asked = None
        if room is not None:
            if room <= 0:
                return
            rows = coverage.rows_of(fragment)
            asked = min(room, count_images(fragment, room) if rows is None else rows)
            room -= asked
        item = coverage.left(fragment, asked)
        if item is not None:
            yield item


def count_rows(table: pa.Table) -> dict[str, Any]:
    """Counts a part's rows by `status` and `error_code`, as the `ok` and `errors` of its `PartInfo`."""
    counted = table.filter(_failed(table))["error_code"].value_counts().to_pylist()
    errors = {entry["values"]: entry["counts"] for entry in counted}
    return {"ok": len(table) - sum(errors.values()), "errors": errors}


@dataclass(frozen=True)
class Superseded:
    """The rows of a part whose images another part keeps."""

    name: str  # the part's name within the output
    image_ids: pa.Array  # strings, of these rows
    left: PartInfo  # what is true of the part without them


def is_settled(parts: Sequence[NamedPart]) -> bool:
    """Says whether no row of the input is in two parts."""
    return not _losing_rows([info for _, info in parts])


def find_superseded(out: str, parts: Sequence[NamedPart], fragments: Sequence[Fragment]) -> Iterator[Superseded]:
    """Finds the rows that two parts have, in the part that does not keep them.

    A caption is kept rather than an error, the older of two captions, and the newer of two errors.

    Args:
        out: The run's folder.
        parts: The run's parts, oldest first.
        fragments: The run's fragments.
    """
    for position, losing in _losing_rows([info for _, info in parts]).items():
        name, info = parts[position]
        table = _read(out, name)
        superseded = _superseded(out, parts, position, [fragments[number] for number in losing], table)
        for number in losing:
            superseded = pc.or_(superseded, _ends_unread_shard(fragments[number], table))
        left = info.without(losing, **count_rows(table.filter(pc.invert(superseded))))
        yield Superseded(name, table.filter(superseded)["image_id"].combine_chunks(), left)


def settle(out: str, parts: Sequence[NamedPart], fragments: Sequence[Fragment]) -> int:
    """Removes what `find_superseded` finds; returns how many rows it removed."""
    found = list(find_superseded(out, parts, fragments))  # before a part disappears with which others are compared
    for part in found:
        drop_rows(out, part.name, part.image_ids, part.left)
    return sum(len(part.image_ids) for part in found)


def forget_rows(out: str, parts: Iterable[NamedPart], images: pa.Table) -> None:
    """Removes rows of parts, which thereby are not done any more.

    Args:
        out: The run's folder.
        parts: The run's parts.
        images: `image_id`, `image_uri`, `fragment` and `fragment_row` of images that have URIs of their own.
    """
    fragments, rows = images["fragment"].to_numpy(), images["fragment_row"].to_numpy()
    unwanted = {int(number): RowRanges.of(rows[fragments == number]) for number in np.unique(fragments)}
    names = list(zip(images["image_id"].to_pylist(), images["image_uri"].to_pylist(), strict=True))
    # A file with images may have had the id first.
    ids = pa.array({name for name, _ in names} | {qualified_id(*name) for name in names}, pa.string())
    for name, info in parts:
        gone = {number: info.rows[number].common(unwanted[number]) for number in unwanted if number in info.rows}
        if any(gone.values()):
            table = _read(out, name)
            left = table.filter(pc.invert(pc.is_in(table["image_id"], value_set=ids)))
            drop_rows(out, name, ids, info.without(gone, **count_rows(left)))


def _superseded(
    out: str, parts: Sequence[NamedPart], position: int, losing: Sequence[Fragment], table: pa.Table
) -> pa.ChunkedArray:
    """Says for each row of a part whether another part keeps its image, by the rule of `find_superseded`."""
    ids, failed = _names(table, losing), _failed(table)
    superseded = pc.and_(failed, False)
    for other, (name, info) in enumerate(parts):
        if other == position or not any(fragment.number in info.rows for fragment in losing):
            continue
        theirs = _read(out, name)
        their_ids, their_failed = _names(theirs, losing), _failed(theirs)
        captioned = pc.is_in(ids, value_set=their_ids.filter(pc.invert(their_failed)))
        if other > position:  # the older of two captions stays, and the newer of two errors
            captioned = pc.and_(captioned, failed)
            also_failed = pc.is_in(ids, value_set=their_ids.filter(their_failed))
            captioned = pc.or_(captioned, pc.and_(failed, also_failed))
        superseded = pc.or_(superseded, captioned)
    return superseded


def _names(table: pa.Table, fragments: Sequence[Fragment]) -> pa.ChunkedArray:
    """Returns what names each row's image in all parts: its URI if it lies in one of these files, else its id.

    `qualify_repeated_ids` may have changed the id of an image in a tar or a Parquet file in one of the parts.
    """
    names = table["image_id"]
    for file in {fragment.uri for fragment in fragments if fragment.kind != "uris"}:
        is_inside = pc.starts_with(table["image_uri"], f"{file}#")
        names = pc.if_else(is_inside, table["image_uri"], names)
    return names


def _ends_unread_shard(fragment: Fragment, table: pa.Table) -> pa.ChunkedArray:
    """Says for each row of a part whether it is the error of a shard that could not be read to its end.

    Such a row has the shard's id; the image that is read instead the next time has its own.
    """
    ids = table["image_id"]
    if fragment.kind == "tar":
        return pc.equal(ids, fragment.uri)
    if fragment.kind == "parquet":
        return pc.starts_with(ids, f"{fragment.uri}#row_group={fragment.row_group},")
    return pc.is_null(ids)  # no row: a list names all its images


def _read(out: str, name: str) -> pa.Table:
    """Returns a part's ids, URIs, statuses and error codes."""
    data = io.BytesIO(storage.read_bytes(storage.join(out, name)))
    return pq.read_table(data, columns=["image_id", "image_uri", "status", "error_code"])


def _failed(table: pa.Table) -> pa.ChunkedArray:
    return pc.equal(table["status"], STATUS_ERROR)


def _losing_rows(infos: Sequence[PartInfo]) -> dict[int, dict[int, RowRanges]]:
    """Returns the rows that another part keeps, by the position of the part and then by fragment."""
    losing: dict[int, dict[int, RowRanges]] = {}
    kept: dict[int, RowRanges] = {}

    def keep(position: int, rows: Mapping[int, RowRanges]) -> None:
        for number, ranges in rows.items():
            before = kept.get(number)
            if before is None:
                kept[number] = ranges
                continue
            again = ranges.common(before)
            if again:
                losing_here = losing.setdefault(position, {})
                losing_here[number] = losing_here[number].union(again) if number in losing_here else again
            kept[number] = before.union(ranges)

    for position, info in enumerate(infos):
        keep(position, info.captioned)
    for position in reversed(range(len(infos))):
        keep(position, infos[position].failed)
    return losing


def qualify_repeated_ids(out: str, parts: Sequence[NamedPart]) -> None:
    """Leaves an id that several images have to the first of them, and gives the others `qualified_id`.

    The ids of lists are unique by their listing. Those of tars and of Parquet files with image bytes are known only
    when these have been read. They are compared by 64-bit hashes, and then in full. No part has an id twice.
    """
    repeated = _repeated_hashes(out, parts)
    seen: set[str] = set()
    for name, _ in parts if len(repeated) else ():
        table = _read(out, name)
        ids, uris = table["image_id"].to_pylist(), table["image_uri"].to_pylist()
        again: dict[str, str] = {}
        for row in np.flatnonzero(np.isin(_hash(ids), repeated)).tolist():
            if ids[row] in seen:
                again[ids[row]] = qualified_id(ids[row], uris[row])
            seen.add(ids[row])
        if again:
            rename_rows(out, name, again)


def _repeated_hashes(out: str, parts: Sequence[NamedPart]) -> np.ndarray:
    """Returns the hashes of ids that occur more than once; each part is read once.

    Hashes wait on the local disk, 8 bytes each, in files of which each holds all that are equal.
    """
    total = sum(info.ok + sum(info.errors.values()) for _, info in parts)
    repeated = [np.empty(0, np.uint64)]
    with storage.scratch_folder() as folder, ExitStack() as opened:
        paths = [folder / f"{number}" for number in range(-(-total // _HASHES_AT_ONCE))]
        files = [opened.enter_context(path.open("wb")) for path in paths]
        for name, _ in parts:
            hashes = _hash(_read(out, name)["image_id"].to_pylist())
            for number, file in enumerate(files):
                file.write(hashes[hashes % np.uint64(len(files)) == number].tobytes())
        for path, file in zip(paths, files, strict=True):
            file.close()
            ordered = np.sort(np.fromfile(path, np.uint64))
            repeated.append(ordered[1:][ordered[1:] == ordered[:-1]])
    return np.concatenate(repeated)


def _hash(ids: Sequence[str]) -> np.ndarray:
    digests = (blake2b(image_id.encode(), digest_size=8).digest() for image_id in ids)
    return np.array([int.from_bytes(digest) for digest in digests], np.uint64)
