"""The fragments into which a run's input is cut, and the batches of images that are read from them.

The images of a fragment have an order that never changes, so that (fragment, row) names an image for the whole run.
This module holds only the types; it reads nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, overload

import numpy as np
import pyarrow as pa

from smallcap.errors import RowError
from smallcap.images.row_ranges import RowRanges

FRAGMENT_ROWS = 256  # images of a fragment of a stored list, and the most images of a batch
_READ_ROWS = 4_096  # of the table of fragments at a time
FragmentKind = Literal["uris", "tar", "parquet"]

FRAGMENT_COLUMNS = pa.schema(
    [
        pa.field("kind", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("row_group", pa.int32(), nullable=False),
        pa.field("rows", pa.int32()),
        pa.field("id_prefix", pa.string(), nullable=False),
        pa.field("qualified", pa.bool_(), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True)  # there are millions of them
class Fragment:
    """Images of the input that are read together.

    Attributes:
        number: The fragment's number, unique in the run, rising from 0.
        kind: `uris` of a stored list, a `tar`, or a row group of a `parquet` file with image bytes.
        uri: The absolute URI of the file: a Parquet file of the stored list, a tar, or a Parquet file with images.
        row_group: The row group of that file; 0 for a tar.
        rows: The number of images; None where only reading can tell it (tar).
        id_prefix: The start of the images' ids, before a tar member's key or a Parquet row's number.
        qualified: Whether the ids that a Parquet file gives its images also begin with `id_prefix`.
    """

    number: int
    kind: FragmentKind
    uri: str
    row_group: int
    rows: int | None
    id_prefix: str = ""
    qualified: bool = False


class FragmentTable(Sequence[Fragment]):
    """All fragments of a run by their numbers, held as columns.

    Args:
        table: Fragments as `FRAGMENT_COLUMNS`, with absolute URIs.
        first: The number of the first fragment.
    """

    def __init__(self, table: pa.Table, first: int = 0) -> None:
        self._table = table.combine_chunks()
        self._first = first

    def __len__(self) -> int:
        return self._table.num_rows

    @overload
    def __getitem__(self, key: int) -> Fragment: ...
    @overload
    def __getitem__(self, key: slice) -> FragmentTable: ...
    def __getitem__(self, key: int | slice) -> Fragment | FragmentTable:
        """Returns the fragment at a place, or the fragments of a slice without a step; they keep their numbers."""
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step != 1:
                raise ValueError("a slice of fragments cannot have a step")
            return FragmentTable(self._table.slice(start, max(stop - start, 0)), self._first + start)
        place = range(len(self))[key]
        values = {name: self._table[name][place].as_py() for name in FRAGMENT_COLUMNS.names}
        return Fragment(number=self._first + place, **values)

    def __iter__(self) -> Iterator[Fragment]:
        shared: dict[str, str] = {}  # the same files over and over
        for start in range(0, len(self), _READ_ROWS):
            rows = self._table.slice(start, _READ_ROWS).to_pylist()
            for number, row in enumerate(rows, start=self._first + start):
                uri = shared.setdefault(row["uri"], row["uri"])
                yield Fragment(
                    number, row["kind"], uri, row["row_group"], row["rows"], row["id_prefix"], row["qualified"]
                )
            shared = {uri: uri}

    @property
    def rows(self) -> np.ndarray:
        """The number of rows of each fragment, [len(self)] int64; -1 where it is unknown."""
        return np.asarray(self._table["rows"].cast(pa.int64()).fill_null(-1).to_numpy())

    @property
    def images(self) -> int | None:
        """The number of rows of all fragments; None while tars make it unknown."""
        rows = self.rows
        return None if (rows < 0).any() else int(rows.sum())

    @property
    def table(self) -> pa.Table:
        """The fragments as `FRAGMENT_COLUMNS`."""
        return self._table


class LeftOut(NamedTuple):
    """What a tar holds besides its images.

    Attributes:
        repeats: Images that came before in it, with the same name and content.
        passed_over: Members that look like images and are none of the tar's.
    """

    repeats: int = 0
    passed_over: int = 0


_NOTHING = LeftOut()


@dataclass(frozen=True)
class InputBatch:
    """At most 256 images of one fragment.

    Attributes:
        rows: [n] int32, the row of each image within the fragment, rising.
        image_ids: The id of each image.
        image_uris: The URI of each image; in a tar `URI-OF-TAR#MEMBER`, in a Parquet file `URI#row=N`.
        data: The bytes or the error of each image; None where they are to be fetched by their URIs.
        kept: n rows of the kept columns; None where there are none.
        ends_fragment: Whether the fragment's last row is among these.
        left_out: What was left out of the whole fragment, where its last row is among these.
    """

    rows: np.ndarray
    image_ids: list[str]
    image_uris: list[str]
    data: list[bytes | RowError] | None
    kept: pa.Table | None
    ends_fragment: bool
    left_out: LeftOut = _NOTHING

    def only(self, wanted: RowRanges | None) -> InputBatch | None:
        """Returns the wanted rows of the batch, all of them for None; None where there are none."""
        if wanted is None:
            return self
        places = np.flatnonzero(wanted.contains(self.rows))
        if len(places) == len(self.rows):
            return self
        if not len(places):
            return None
        return replace(
            self,
            rows=self.rows[places],
            image_ids=[self.image_ids[place] for place in places],
            image_uris=[self.image_uris[place] for place in places],
            data=None if self.data is None else [self.data[place] for place in places],
            kept=None if self.kept is None else self.kept.take(places),
            ends_fragment=self.ends_fragment and places[-1] == len(self.rows) - 1,
        )


def qualified_id(image_id: str, image_uri: str) -> str:
    """Returns the id of an image whose own id another image has: its URI, and its id where the URI does not say it.

    It is always another id than the one before.
    """
    says_id = image_uri.endswith(image_id) or image_uri.partition("#")[2].startswith(image_id)
    return image_uri if says_id and image_uri != image_id else f"{image_uri}#{image_id}"
