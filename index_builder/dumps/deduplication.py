"""Which rows are the same caption: the first one's text, everyone's sources and image ids. No storage, no Ray."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Row(NamedTuple):
    """One cleaned row on its way to its caption.

    Attributes:
        key: What duplicates have in common; see `cleaning.caption_key`.
        text: The caption.
        sources: Positions, among the build's source files, of those that have it.
        image_ids: The images that it was written for.
        vector: Its embedding where that is known: float16 or float32 bytes.
        known_id: Its id in the index that is added to, where it comes from there.
        lends_vector: It only offers its vector to a caption of the same text, and is no caption itself.
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
    has_grown: bool = False  # a known caption that other rows brought a source or an image

    def absorb(self, row: Row) -> None:
        """Takes over a row's sources and images, and its vector where the text is the same."""
        before = len(self.sources) + len(self.image_ids)
        self.sources.update(dict.fromkeys(row.sources))
        self.image_ids.update(dict.fromkeys(row.image_ids))
        self.has_grown |= self.known_id is not None and len(self.sources) + len(self.image_ids) > before
        self.lend(row)

    def lend(self, row: Row) -> None:
        """Takes a row's vector when it needs one; the key may be the same and the text, which is embedded, not."""
        if self.vector is None and row.text == self.text:
            self.vector = row.vector


class Deduplicator:
    """Joins rows with equal keys.

    Rows must come in the order of (source, row), those of the index that is added to before them, and lenders last; the
    result is then the same however the work was scheduled.

    Attributes:
        duplicates: Rows that were no caption of their own.
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
        """Yields the captions in the order of their keys."""
        for key in sorted(self._unique):
            yield self._unique[key]
