"""Compares a new listing with the stored list: which images were overwritten since, and how many are gone.

Only images that folders and prefixes list have a state to compare. A list names URIs and says nothing of their objects.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from smallcap import storage
from smallcap.images.fragments import FRAGMENT_ROWS
from smallcap.images.sources import IMAGE_COLUMNS, STATE_COLUMN
from smallcap.images.work_list import Relisted

_STORED = pa.schema(
    [*IMAGE_COLUMNS, (STATE_COLUMN, pa.string()), ("fragment", pa.int32()), ("fragment_row", pa.int32())]
)


class Comparison:
    """Takes the images of a new listing that are stored already.

    Args:
        known: The fragments of earlier listings.
    """

    def __init__(self, known: pa.Table) -> None:
        uris = known["uri"].to_pylist()
        self._first = {uri: number for number, uri in reversed(list(enumerate(uris)))}
        rows = known.filter(pc.equal(known["kind"], "uris"))["rows"]
        self._stored = pc.sum(rows, min_count=0).as_py()
        self._found = 0
        self._last: dict[str, tuple[int, int]] = {}  # the place of the image that was compared last, by stored list
        self._overwritten: list[pa.Table] = []

    def stored_images(self, files: Sequence[str]) -> Iterator[pa.Table]:
        """Yields the rows of stored files of images, with their places in the list of work."""
        for uri in files:
            with storage.open_ranged(uri) as file:
                parquet = pq.ParquetFile(file)
                table = parquet.read([name for name in _STORED.names[:3] if name in parquet.schema_arrow.names])
            if STATE_COLUMN not in table.column_names:  # no image of the file has one
                table = table.append_column(STATE_COLUMN, pa.nulls(len(table), pa.string()))
            rows = np.arange(len(table), dtype=np.int32)
            places = (self._first[uri] + rows // FRAGMENT_ROWS, rows % FRAGMENT_ROWS)
            columns = [*table.select(_STORED.names[:3]).columns, *(pa.array(place, pa.int32()) for place in places)]
            yield pa.table(columns, schema=_STORED)

    def compare(self, name: str, listed: pa.Table, stored: pa.Table) -> None:
        """Takes rows of the new listing and the rows of the same images in a stored list, both in order.

        Args:
            name: A name of the stored list.
            listed: Rows of the new listing; an image may repeat.
            stored: The stored row of each of them, see `stored_images`.
        """
        if not len(stored):
            return
        places = list(zip(stored["fragment"].to_pylist(), stored["fragment_row"].to_pylist(), strict=True))
        before = [self._last.get(name), *places]
        is_new = pa.array([place != last for last, place in zip(before, places, strict=False)])
        self._last[name] = places[-1]
        self._found += pc.sum(is_new, min_count=0).as_py()
        differs = pc.fill_null(pc.not_equal(listed[STATE_COLUMN], stored[STATE_COLUMN]), False)
        overwritten = stored.set_column(2, _STORED.field(STATE_COLUMN), listed[STATE_COLUMN])
        self._overwritten.append(overwritten.filter(pc.and_(differs, is_new)))

    def result(self) -> Relisted:
        """Returns what was found when the whole listing has been compared."""
        return Relisted(pa.concat_tables([_STORED.empty_table(), *self._overwritten]), self._stored - self._found)


def store_states(fragments: pa.Table, overwritten: pa.Table) -> None:
    """Stores the new states of overwritten images, whose rows in the list of work stay what they are.

    Args:
        fragments: All fragments of the run.
        overwritten: The images, see `Relisted`.
    """
    first = {uri: number for number, uri in reversed(list(enumerate(fragments["uri"].to_pylist())))}
    numbers = overwritten["fragment"].to_numpy()
    for uri in sorted({fragments["uri"][number].as_py() for number in np.unique(numbers).tolist()}):
        with storage.open_ranged(uri) as file:
            table = pq.ParquetFile(file).read()
        rows = (numbers - first[uri]) * FRAGMENT_ROWS + overwritten["fragment_row"].to_numpy()
        here = (rows >= 0) & (rows < len(table)) & pc.equal(fragments["uri"].take(pa.array(numbers)), uri).to_numpy()
        states = np.array(table[STATE_COLUMN].to_pylist(), object)
        states[rows[here]] = np.array(overwritten[STATE_COLUMN].to_pylist(), object)[here]
        place = table.column_names.index(STATE_COLUMN)
        write_images(uri, table.set_column(place, _STORED.field(STATE_COLUMN), pa.array(states, pa.string())))


def write_images(uri: str, table: pa.Table) -> None:
    """Writes a stored file of images: a row group is a fragment. States that are all null are left out."""
    if STATE_COLUMN in table.column_names and table[STATE_COLUMN].null_count == len(table):
        table = table.drop_columns(STATE_COLUMN)
    with storage.scratch_folder() as folder:
        path = folder / "images.parquet"
        # A row group is read whole, and statistics or dictionaries would lengthen the footer 256 times.
        pq.write_table(
            table, path, row_group_size=FRAGMENT_ROWS, compression="zstd", use_dictionary=False, write_statistics=False
        )
        storage.move_in(path, uri)
