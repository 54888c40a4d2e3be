"""Sets of row numbers, held as ranges: the rows of a fragment that are wanted, done or failed.

The rows of a fragment are mostly done in order, so that a set of thousands is a handful of ranges. This module knows
nothing of fragments or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from smallcap.errors import SchemaError


class RowRanges:
    """An immutable set of row numbers ≥ 0, as sorted, disjoint, half-open ranges that do not touch each other.

    Sets with the same rows have the same ranges, so that they are equal and have the same hash.
    """

    __slots__ = ("_ranges",)
    _ranges: np.ndarray  # [n, 2] int64, read-only: first row, and the row after the last

    def __init__(self, ranges: np.ndarray | Sequence[Sequence[int]] = ()) -> None:
        """Makes the set of the rows in half-open ranges, which may overlap and come in any order.

        Args:
            ranges: [n, 2] integers: first row, and the row after the last. Empty ranges are dropped.
        """
        bounds = np.asarray(ranges, dtype=np.int64).reshape(-1, 2)
        object.__setattr__(self, "_ranges", _merged(bounds[bounds[:, 0] < bounds[:, 1]]))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("RowRanges cannot be changed")

    def __reduce__(self) -> tuple[type[RowRanges], tuple[np.ndarray]]:
        return RowRanges, (self._ranges,)

    @classmethod
    def of(cls, rows: np.ndarray) -> RowRanges:
        """Returns the set of these row numbers, [n] integers in any order, which may repeat."""
        first = np.asarray(rows, dtype=np.int64).reshape(-1)
        return cls(np.stack([first, first + 1], axis=1))

    @classmethod
    def span(cls, first: int, stop: int) -> RowRanges:
        """Returns the rows from `first` up to, but without, `stop`."""
        return cls([(first, stop)])

    @classmethod
    def from_json(cls, value: Any) -> RowRanges:
        """Reads the value of `to_json`.

        Raises:
            SchemaError: The value is not a list of pairs of numbers.
        """
        try:
            ranges = np.asarray(value, dtype=np.int64)
            if ranges.size and (ranges.ndim != 2 or ranges.shape[1] != 2):
                raise ValueError("not pairs")
        except (TypeError, ValueError, OverflowError) as error:
            raise SchemaError(
                "Ranges of rows cannot be read.", expected="[[first, stop], …]", found=repr(value)[:200]
            ) from error
        return cls(ranges)

    @property
    def ranges(self) -> np.ndarray:
        """The ranges, [n, 2] int64, read-only: first row, and the row after the last."""
        return self._ranges

    @property
    def stop(self) -> int:
        """The row after the last one; 0 where there is none."""
        return int(self._ranges[-1, 1]) if len(self._ranges) else 0

    def to_json(self) -> list[list[int]]:
        """Returns `[[first, stop], …]`."""
        return self._ranges.tolist()

    def rows(self) -> np.ndarray:
        """Returns all row numbers, [len(self)] int64, rising."""
        lengths = self._ranges[:, 1] - self._ranges[:, 0]
        before = np.cumsum(lengths) - lengths  # rows in the ranges before each
        return np.arange(len(self)) + np.repeat(self._ranges[:, 0] - before, lengths)

    def union(self, other: RowRanges) -> RowRanges:
        """Returns the rows in either set."""
        return RowRanges(np.concatenate([self._ranges, other._ranges]))

    def subtract(self, other: RowRanges) -> RowRanges:
        """Returns the rows that are not in `other`."""
        if not self or not other:
            return self
        # Between two neighbouring bounds, every row is in the same sets as the first one.
        bounds = np.unique(np.concatenate([self._ranges, other._ranges]))
        first = bounds[:-1]
        kept = self.contains(first) & ~other.contains(first)
        return RowRanges(np.stack([first[kept], bounds[1:][kept]], axis=1))

    def common(self, other: RowRanges) -> RowRanges:
        """Returns the rows in both sets."""
        return self.subtract(self.subtract(other))

    def covers(self, stop: int) -> bool:
        """Says whether all rows up to, but without, `stop` are in the set."""
        return len(self._ranges) > 0 and self._ranges[0, 0] == 0 and bool(self._ranges[0, 1] >= stop)

    def contains(self, rows: np.ndarray) -> np.ndarray:
        """Says for each of the rows, [n] integers, whether it is in the set: [n] bool."""
        place = np.searchsorted(self._ranges[:, 0], rows, side="right") - 1  # the last range that begins by then
        if not len(self._ranges):
            return np.zeros(len(rows), dtype=bool)
        return np.asarray((place >= 0) & (rows < self._ranges[place, 1]))

    def __len__(self) -> int:
        return int((self._ranges[:, 1] - self._ranges[:, 0]).sum())

    def __bool__(self) -> bool:
        return len(self._ranges) > 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RowRanges) and np.array_equal(self._ranges, other._ranges)

    def __hash__(self) -> int:
        return hash(self._ranges.tobytes())

    def __repr__(self) -> str:
        return f"RowRanges({self.to_json()})"


def _merged(ranges: np.ndarray) -> np.ndarray:
    """Sorts ranges, [n, 2], and joins those that overlap or touch."""
    if len(ranges) > 1:
        ranges = ranges[np.argsort(ranges[:, 0], kind="stable")]
        reach = np.maximum.accumulate(ranges[:, 1])  # the furthest end of this range and those before it
        begins = np.concatenate([[True], ranges[1:, 0] > reach[:-1]])
        ends = np.concatenate([begins[1:], [True]])
        ranges = np.stack([ranges[begins, 0], reach[ends]], axis=1)
    ranges = ranges.copy()
    ranges.setflags(write=False)
    return ranges
