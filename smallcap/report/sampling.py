"""Chooses rows by keys in one pass, so that a report of many million rows reads them once and holds few.

Keys are hashes of names: which rows are drawn depends neither on their order nor on the parts they are in, and two runs
over the same images give the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa

Row = dict[str, Any]


def name_keys(names: Iterable[str | None]) -> np.ndarray:
    """Returns a random-looking number for each name, [n] uint64; equal names have equal ones."""
    digests = b"".join(blake2b((name or "").encode(), digest_size=8).digest() for name in names)
    return np.frombuffer(digests, "<u8")


class Smallest:
    """Keeps the rows with the smallest keys.

    Args:
        count: The most rows to keep.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._kept: list[tuple[float, Row]] = []

    def offer(self, batch: pa.RecordBatch, keys: np.ndarray, wanted: np.ndarray) -> None:
        """Takes the wanted rows of a batch that are among the smallest so far.

        Args:
            batch: n rows.
            keys: The key of each row, [n].
            wanted: Which rows may be taken at all, [n] bool.
        """
        places = np.flatnonzero(wanted)
        if len(self._kept) == self._count:
            places = places[keys[places] < self._kept[-1][0]] if self._kept else places[:0]
        places = places[np.argsort(keys[places], kind="stable")][: self._count]
        rows = batch.take(pa.array(places, pa.int64())).to_pylist()
        merged = [*self._kept, *zip(keys[places].tolist(), rows, strict=True)]
        self._kept = sorted(merged, key=lambda kept: kept[0])[: self._count]

    def rows(self) -> list[Row]:
        """Returns the rows, that with the smallest key first."""
        return [row for _, row in self._kept]
