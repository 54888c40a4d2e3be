"""What a run's captions are like as a whole: sums of their scores, in memory that does not grow with the run."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from smallcap.output.reading import read_captions
from smallcap.phrasing import describe_count
from smallcap.records import Record

_COLUMNS = ("caption", "clip_score", "copied_share")
_CELL = 1e-4  # cosines are counted in cells of this width, so the percentile is as exact as that
_PERCENT = 5


class Scores(Record):
    """The scores of a run's captions; None where no caption has the score."""

    captions: int
    empty: int  # captions without text
    clip_score: float | None  # mean
    clip_score_p5: float | None  # 5th percentile
    copied_share: float | None  # mean

    @classmethod
    def of(cls, run: str) -> Scores:
        """Reads the scores of a run's captions, one batch after the other.

        Raises:
            SchemaError: A part is damaged.
            StorageError: The service fails.
        """
        captions = empty = 0
        clip, copied = _Values(), _Values()
        for batch in read_captions(run, _COLUMNS, status="ok"):
            captions += len(batch)
            empty += pc.sum(pc.equal(batch["caption"], "")).as_py() or 0
            clip.add(batch["clip_score"])
            copied.add(batch["copied_share"])
        return cls(
            captions=captions,
            empty=empty,
            clip_score=clip.mean,
            clip_score_p5=clip.percentile(_PERCENT),
            copied_share=copied.mean,
        )

    def describe(self) -> Iterator[str]:
        """Yields lines for people; none where there are no captions."""
        if self.clip_score is not None:
            yield f"Clip score: {self.clip_score:.3f} on average, 5th percentile {self.clip_score_p5:.3f}."
        if self.copied_share is not None:
            yield f"Copied from retrieved captions: {self.copied_share:.0%} of a caption on average."
        if self.captions:
            yield f"Empty captions: {self.empty:,} of {describe_count(self.captions, 'caption')}."


class _Values:
    """Numbers from -1 to 1, by their sum and by cells."""

    def __init__(self) -> None:
        self._cells = np.zeros(round(2 / _CELL) + 1, np.int64)
        self._sum = 0.0

    def add(self, column: pa.Array) -> None:
        """Counts the values that are not null."""
        values = column.drop_null().to_numpy().astype(np.float64)
        cells = np.clip(np.rint((values + 1) / _CELL), 0, len(self._cells) - 1).astype(np.int64)
        self._cells += np.bincount(cells, minlength=len(self._cells))
        self._sum += float(values.sum())

    @property
    def mean(self) -> float | None:
        count = int(self._cells.sum())
        return round(self._sum / count, 6) if count else None

    def percentile(self, percent: float) -> float | None:
        """Returns the least value that at least so many percent do not exceed."""
        count = int(self._cells.sum())
        if not count:
            return None
        cell = int(np.searchsorted(self._cells.cumsum(), max(1.0, count * percent / 100)))
        return round(cell * _CELL - 1, 6)
