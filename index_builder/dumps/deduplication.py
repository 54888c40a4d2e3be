"""Joins rows that are the same caption: it keeps the first row's text, and the sources and image ids of all rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Row(NamedTuple):
    """One cleaned row.

    Attributes:
        key: What duplicates have in common; see `cleaning.caption_key`.
        text: The caption.
        sources: The source files that have the caption, as positions among the build's source files.
        image_ids: The images that the caption was written for.
        vector: The embedding where it is known: float16 or float32 bytes.
        known_id: The caption's id in the index that is added to; None for rows from elsewhere.
        lends_vector: Whether the row is not a caption, and only offers its vector to a caption with the same text.
    """

    key: bytes
    text: str
    sources: Sequence[int] = ()
    image_ids: Sequence[str] = ()
    vector: bytes | None = None
    known_id: int | None = None
    lends_vector: bool = False


@dataclass
class UniqueCaption:
    """A caption with all its duplicates."""

    key: bytes
    text: str
    vector: bytes | None
    known_id: int | None
    sources: dict[int, None] = field(default_factory=dict)  # sets that keep their order
    image_ids: dict[str, None] = field(default_factory=dict)
    has_grown: bool = False  # whether it is a known caption that gained a source or an image from other rows

    def absorb(self, row: Row) -> None:
        """Takes over a row's sources and images, and its vector where the text is the same."""
        before = len(self.sources) + len(self.image_ids)
        self.sources.update(dict.fromkeys(row.sources))
        self.image_ids.update(dict.fromkeys(row.image_ids))
        self.has_grown |= self.known_id is not None and len(self.sources) + len(self.image_ids) > before
        self.lend(row)

    def lend(self, row: Row) -> None:
        """Takes a row's vector where it has none and the texts are equal; rows with equal keys may have other texts."""
        if self.vector is None and row.text == self.text:
            self.vector = row.vector


class Deduplicator:
    """Joins rows with equal keys.

    Rows must come in this order: those of the index that is added to, then the others by (source, row), then lenders.
    The result then does not depend on how the work was scheduled.

    Attributes:
        duplicates: How many rows were joined with an earlier one.
    """

    def __init__(self) -> None:
        self._unique: dict[bytes, UniqueCaption] = {}
        self.duplicates = 0

    def add(self, rows: Iterable[Row]) -> None:
        """Adds rows in order."""
        for row in rows:
            caption = self._unique.get(row.key)
            if row.lends_vector:
                if caption is not None:
                    caption.lend(row)
                continue
            if caption is None:
                self._unique[row.key] = UniqueCaption(
                    row.key,
                    row.text,
                    row.vector,
                    row.known_id,
                    dict.fromkeys(row.sources),
                    dict.fromkeys(row.image_ids),
                )
            else:
                caption.absorb(row)
                self.duplicates += 1

    def captions(self) -> Iterator[UniqueCaption]:
        """Yields the captions, sorted by key."""
        for key in sorted(self._unique):
            yield self._unique[key]
