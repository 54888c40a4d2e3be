"""Counts each row of a run's input once in each stage: after a lost node its rows are loaded and captioned again.

What has gone through both stages costs a bit for each fragment, so that the driver's memory does not grow with the run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

RowsOfFragments = tuple[tuple[int, tuple[tuple[int, int], ...]], ...]
"""Rows by the number of their fragment, as half-open ranges."""


def ranges_of(fragments: np.ndarray, rows: np.ndarray) -> RowsOfFragments:
    """Returns the rows of a batch.

    Args:
        fragments: The number of each row's fragment, [n] integers.
        rows: The row in it, [n] integers; none comes twice.
    """
    found = []
    for number in np.unique(fragments).tolist():
        own = np.sort(rows[fragments == number])
        breaks = np.flatnonzero(np.diff(own) != 1) + 1
        pieces = np.split(own, breaks)
        found.append((number, tuple((int(piece[0]), int(piece[-1]) + 1) for piece in pieces)))
    return tuple(found)


class DistinctRows:
    """The rows that were loaded, and those that were captioned."""

    def __init__(self) -> None:
        self._loaded = _Rows()
        self._captioned = _Rows()
        self._ended: dict[int, int] = {}  # how many rows of a fragment that was loaded to its end the actors will get

    def add_loaded(self, rows: RowsOfFragments, ends: bool) -> int:
        """Notes rows of one fragment, and whether its last one is among them; returns how many are new."""
        new = self._loaded.add(rows)
        if ends:
            for number, _ in rows:
                if not self._loaded.is_whole(number):
                    self._ended[number] = self._loaded.count(number)
                    self._loaded.close(number)
                self._close_captioned(number)
        return new

    def add_captioned(self, rows: RowsOfFragments) -> int:
        """Notes rows; returns how many are new."""
        new = self._captioned.add(rows)
        for number, _ in rows:
            self._close_captioned(number)
        return new

    def _close_captioned(self, number: int) -> None:
        if number in self._ended and self._captioned.count(number) >= self._ended[number]:
            del self._ended[number]
            self._captioned.close(number)


class _Rows:
    """Sets of rows: a bit for each row of a fragment, until all of them are there."""

    def __init__(self) -> None:
        self._bits: dict[int, int] = {}
        self._whole = bytearray()  # a bit for each fragment

    def add(self, rows: Iterable[tuple[int, Sequence[tuple[int, int]]]]) -> int:
        """Adds rows; returns how many are new."""
        new = 0
        for number, ranges in rows:
            if self.is_whole(number):
                continue
            before = self._bits.get(number, 0)
            bits = before
            for first, stop in ranges:
                bits |= ((1 << (stop - first)) - 1) << first
            self._bits[number] = bits
            new += (bits ^ before).bit_count()
        return new

    def count(self, number: int) -> int:
        """Returns how many rows of a fragment that is not whole are there."""
        return self._bits.get(number, 0).bit_count()

    def is_whole(self, number: int) -> bool:
        """Returns whether a fragment was closed."""
        return number // 8 < len(self._whole) and bool(self._whole[number // 8] >> number % 8 & 1)

    def close(self, number: int) -> None:
        """Notes that all rows of a fragment are there."""
        self._bits.pop(number, None)
        self._whole += bytes(max(0, number // 8 + 1 - len(self._whole)))
        self._whole[number // 8] |= 1 << number % 8
