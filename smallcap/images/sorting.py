"""Sorts listed images by id, each id once, in memory that does not grow with their number.

Sorted runs are spilled to a local folder as Arrow files and merged as a stream. This module knows nothing of sources,
nor of how the list is stored: it takes and gives tables that begin with the columns `image_id` and `image_uri`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from smallcap.images.fragments import qualified_id

RUN_ROWS = 500_000  # images that are sorted in memory
RUN_BYTES = 256 << 20  # or fewer, where kept columns are large
_MERGED_ROWS = 1 << 20  # that runs give together at a time
BATCH_ROWS = 65_536  # in a batch of a spilled run, and in most tables that are yielded
EXAMPLES = 5
_ORDER = [("image_id", "ascending"), ("image_uri", "ascending")]


class UnsortedError(Exception):
    """The images are not in the expected order; caught where they are listed."""


@dataclass(frozen=True)
class DuplicateExample:
    """One id that stands for two images."""

    image_id: str
    taken: str  # URI
    left_out: str  # URI


class Duplicates:
    """The images whose ids came before.

    Args:
        aside: A local file for rows that are set aside; it is written only if there are some.

    Attributes:
        count: How many rows named an image again, and were left out.
        aside: How many rows were set aside.
        examples: Ids that stood for two images, at most five.
    """

    def __init__(self, aside: Path) -> None:
        self.count = self.aside = 0
        self.examples: list[DuplicateExample] = []
        self._aside = aside
        self._writer: pa.ipc.RecordBatchFileWriter | None = None

    def set_aside(self, table: pa.Table) -> None:
        """Keeps rows in the file."""
        self.aside += len(table)
        if self._writer is None:
            self._writer = pa.ipc.new_file(str(self._aside), table.schema)
        self._writer.write_table(table, max_chunksize=BATCH_ROWS)

    def rows_aside(self) -> Iterator[pa.Table]:
        """Yields what was set aside; nothing can be added then."""
        if self._writer is None:
            return
        self._writer.close()
        with pa.ipc.open_file(pa.memory_map(str(self._aside))) as reader:
            for number in range(reader.num_record_batches):
                yield pa.Table.from_batches([reader.get_batch(number)])


def checked_order(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Passes on tables that are in the order of id and URI.

    Raises:
        UnsortedError: They are not in this order.
    """
    before: tuple[str, str] | None = None
    for table in tables:
        if not table.num_rows:
            continue
        if (before is not None and _key(table, 0) < before) or not _in_order(table):
            raise UnsortedError
        before = _key(table, table.num_rows - 1)
        yield table


def sort_images(tables: Iterable[pa.Table], scratch: Path) -> Iterator[pa.Table]:
    """Yields all rows in the order of id and URI.

    Args:
        tables: Tables of one schema, in any order.
        scratch: An empty local folder with room for about as many bytes as the tables have.
    """
    runs: list[Path] = []
    for table in _gathered(tables):
        if runs or table.num_rows >= RUN_ROWS or table.nbytes >= RUN_BYTES:
            runs.append(_spill(sort_table(table), scratch / f"run-{len(runs):05d}.arrow"))
        else:
            yield from _slices(sort_table(table))  # the only run
    if runs:
        yield from _merge([_Run(path) for path in runs])


def unique_images(tables: Iterable[pa.Table], duplicates: Duplicates) -> Iterator[pa.Table]:
    """Yields the first row of each id. A row that names the same image again is left out.

    A row with the id of another image, which has another URI, is set aside with the id that `qualified_id` gives it.

    Args:
        tables: Tables in the order of id and URI.
        duplicates: The object that counts the rows left out, and takes those set aside.
    """
    before_id = before_uri = None  # id and URI of the row before
    taken = ""  # the URI that this id stands for
    for table in tables:
        if not table.num_rows:
            continue
        ids, uris = table["image_id"].combine_chunks(), table["image_uri"].combine_chunks()
        again = _equals_previous(ids, before_id)
        last_taken = uris[-1].as_py()
        if again.any():
            other = again & ~_equals_previous(uris, before_uri)
            duplicates.count += int((again & ~other).sum())
            first = np.maximum.accumulate(np.where(again, -1, np.arange(len(again))))  # the first row of each id
            for row in np.flatnonzero(other)[: EXAMPLES - len(duplicates.examples)]:
                known = taken if first[row] < 0 else uris[int(first[row])].as_py()
                duplicates.examples.append(DuplicateExample(ids[int(row)].as_py(), known, uris[int(row)].as_py()))
            if other.any():
                duplicates.set_aside(_qualified(table.filter(pa.array(other))))
            last_taken = taken if first[-1] < 0 else uris[int(first[-1])].as_py()
        before_id, before_uri, taken = ids[-1].as_py(), uris[-1].as_py(), last_taken
        if not again.all():
            yield table.filter(pa.array(~again)) if again.any() else table


def _qualified(table: pa.Table) -> pa.Table:
    named = zip(table["image_id"].to_pylist(), table["image_uri"].to_pylist(), strict=True)
    ids = pa.array([qualified_id(image_id, uri) for image_id, uri in named], pa.string())
    return table.set_column(0, table.schema.field("image_id"), ids)


def without_known(
    tables: Iterable[pa.Table],
    known: Iterable[pa.Table],
    duplicates: Duplicates,
    *,
    repeats: bool,
    compare: Callable[[pa.Table, pa.Table], None] | None = None,
) -> Iterator[pa.Table]:
    """Leaves out the images that are known; another image with the id of a known one is set aside.

    Args:
        tables: Tables in the order of id and URI.
        known: `image_id` and `image_uri` of known images, each id once, in the order of the ids, in tables of any
            length; only a few of them are held at a time.
        duplicates: The object that takes the images set aside, with the id that `qualified_id` gives them.
        repeats: Whether it also counts the known images, as named again.
        compare: A function that is called with the rows that name known images, and with the known rows.
    """
    chunks = (chunk.combine_chunks() for chunk in known if len(chunk))
    chunk = next(chunks, None)
    for table in tables:
        if not table.num_rows:
            continue
        ids, uris = table["image_id"].combine_chunks(), table["image_uri"].combine_chunks()
        last = ids[-1].as_py()
        taken, same = np.zeros((2, len(ids)), dtype=bool)
        while chunk is not None:
            places = pc.index_in(ids, value_set=chunk["image_id"].combine_chunks())
            taken |= places.is_valid().to_numpy(zero_copy_only=False)
            equal = pc.equal(uris, chunk["image_uri"].combine_chunks().take(places))
            same |= pc.fill_null(equal, False).to_numpy(zero_copy_only=False)
            if compare is not None:
                compare(table.filter(equal), chunk.take(places.filter(equal)))
            if chunk["image_id"][-1].as_py() >= last:
                break  # the next table may have ids of this chunk
            chunk = next(chunks, None)
        duplicates.count += int(same.sum()) if repeats else 0
        if (other := taken & ~same).any():
            duplicates.set_aside(_qualified(table.filter(pa.array(other))))
        if not taken.all():
            yield table.filter(pa.array(~taken)) if taken.any() else table


def sort_table(table: pa.Table) -> pa.Table:
    """Sorts one table by id and URI, in memory."""
    table = table.combine_chunks()
    if not table.num_rows or _in_order(table):
        return table
    ids = table["image_id"].combine_chunks()
    # One key sorts several times faster than two; the second matters only where an id repeats.
    order = pc.array_sort_indices(ids)
    if _equals_previous(ids.take(order), None).any():
        order = pc.sort_indices(table, sort_keys=_ORDER)
    return table.take(order).combine_chunks()


def _gathered(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Joins tables until they have the size of a run; the last one may be smaller."""
    held: list[pa.Table] = []
    rows = size = 0
    for table in tables:
        held.append(table)
        rows, size = rows + table.num_rows, size + table.nbytes
        if rows >= RUN_ROWS or size >= RUN_BYTES:
            yield pa.concat_tables(held)
            held, rows, size = [], 0, 0
    if rows:
        yield pa.concat_tables(held)


def _spill(table: pa.Table, path: Path) -> Path:
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=BATCH_ROWS)
    return path


class _Run:
    """A spilled run that is read from front to back; the kernel keeps or drops its pages."""

    def __init__(self, path: Path) -> None:
        self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self._next = 0
        self.head: pa.Table | None = None  # the rows of the current batch that have not been taken
        self._advance()

    def _advance(self) -> None:
        self.head = None
        if self._next < self._reader.num_record_batches:
            self.head = pa.Table.from_batches([self._reader.get_batch(self._next)])
            self._next += 1

    def key_at(self, row: int) -> tuple[str, str]:
        """Returns the key of a row of the current batch, or of its last one."""
        assert self.head is not None
        return _key(self.head, min(row, self.head.num_rows - 1))

    def take_until(self, key: tuple[str, str]) -> pa.Table:
        """Takes the rows of the current batch up to `key`, perhaps none."""
        assert self.head is not None
        head = self.head
        count = bisect_right(range(head.num_rows), key, key=lambda row: _key(head, row))
        if count == head.num_rows:
            self._advance()
        else:
            self.head = head.slice(count)
        return head.slice(0, count)


def _merge(runs: list[_Run]) -> Iterator[pa.Table]:
    """Merges runs: each gives its rows up to a key that comes soon in all of them, and these are sorted and yielded.

    Thousands of runs give few rows each. Whole batches of all would be most of a billion images at once.
    """
    while runs := [run for run in runs if run.head is not None]:
        soon = _MERGED_ROWS // len(runs)
        key = min(run.key_at(soon) for run in runs)
        yield from _slices(sort_table(pa.concat_tables([run.take_until(key) for run in runs])))


def _slices(table: pa.Table) -> Iterator[pa.Table]:
    for start in range(0, table.num_rows, BATCH_ROWS):
        yield table.slice(start, BATCH_ROWS)


def _key(table: pa.Table, row: int) -> tuple[str, str]:
    return table["image_id"][row].as_py(), table["image_uri"][row].as_py()


def _in_order(table: pa.Table) -> bool:
    ids, uris = table["image_id"].combine_chunks(), table["image_uri"].combine_chunks()
    if not pc.all(pc.less_equal(ids[:-1], ids[1:]), min_count=0).as_py():
        return False
    return bool(pc.all(pc.or_(pc.less(ids[:-1], ids[1:]), pc.less_equal(uris[:-1], uris[1:])), min_count=0).as_py())


def _equals_previous(values: pa.Array, before: str | None) -> np.ndarray:
    """Says for each value whether it equals the one before it; `before` comes before the first."""
    equal = np.zeros(len(values), dtype=bool)
    if len(values):
        equal[0] = before is not None and values[0].as_py() == before
        equal[1:] = pc.equal(values[1:], values[:-1]).to_numpy(zero_copy_only=False)
    return equal
