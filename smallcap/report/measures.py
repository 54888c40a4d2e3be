"""What is measured of captions and texts, and how their values lie: in counts that do not grow with the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from smallcap.evaluation.shared_words import COPIED_WORDS

_ROUNDING = 1e-4  # of a cell; 0.7 in float32 is a little less
_FEWEST_BARS, _MOST_BARS = 12, 32
_QUANTILES = {"low": 0.05, "median": 0.5, "high": 0.95}


@dataclass(frozen=True)
class Measure:
    """A number that captions or texts have.

    Attributes:
        name: Its column in the run, or the name under which the report computes it.
        label: What the page calls it.
        about: What it is, in a phrase.
        low, high: The bounds of its usual values; values beyond them count at the bounds.
        step: The width of the cells in which values are counted; every quantile is as exact as that.
        digits: Decimal places to show.
    """

    name: str
    label: str
    about: str
    low: float
    high: float
    step: float
    digits: int


CLIP_SCORE = Measure("clip_score", "CLIP score", "cosine of image and caption", -1, 1, 0.001, 3)
NEIGHBOUR_SCORE = Measure(
    "neighbour_score", "Best neighbour", "cosine of the image and its nearest retrieved caption", -1, 1, 0.001, 3
)
COPIED_SHARE = Measure(
    "copied_share",
    "Copied",
    f"share of the caption's {COPIED_WORDS}-word sequences that a neighbour has",
    0,
    1,
    0.02,
    2,
)
AGREEMENT = Measure(
    "neighbour_agreement",
    "Agreement",
    "share of content words that the retrieved captions have in common",
    0,
    1,
    0.02,
    2,
)
ALT_CLIP_SCORE = Measure("alt_clip_score", "CLIP score of given text", "cosine of image and text", -1, 1, 0.001, 3)
LOGPROB = Measure("caption_logprob", "Log-probability", "natural log of the caption's probability", -100, 0, 0.1, 1)
TOKENS = Measure("caption_tokens", "Tokens", "tokens generated, the end token included", 0, 512, 1, 0)
COLUMN_MEASURES = (CLIP_SCORE, ALT_CLIP_SCORE, COPIED_SHARE, AGREEMENT, LOGPROB, TOKENS)  # which are columns of a run
RUN_MEASURES = (*COLUMN_MEASURES, NEIGHBOUR_SCORE)
WORDS = Measure("words", "Words", "words of a caption, separated by spaces", 0, 512, 1, 0)
CHARACTERS = Measure("characters", "Characters", "characters of a caption", 0, 4096, 1, 0)


class Distribution:
    """How the values of a measure lie, counted in its cells.

    Args:
        measure: The measure.
    """

    def __init__(self, measure: Measure) -> None:
        self.measure = measure
        self._cells = np.zeros(round((measure.high - measure.low) / measure.step) + 1, np.int64)
        self._sum = 0.0

    def add(self, values: np.ndarray) -> None:
        """Counts values, a flat array of numbers; those that are not finite are left out."""
        values = np.asarray(values, np.float64)
        values = values[np.isfinite(values)]
        cells = np.floor((values - self.measure.low) / self.measure.step + _ROUNDING).astype(np.int64)
        self._cells += np.bincount(np.clip(cells, 0, len(self._cells) - 1), minlength=len(self._cells))
        self._sum += float(values.sum())

    @property
    def count(self) -> int:
        """The number of values."""
        return int(self._cells.sum())

    def quantile(self, fraction: float) -> float | None:
        """Returns the lower bound of the cell in which this fraction of the values is reached; None without values."""
        if not self.count:
            return None
        cell = int(np.searchsorted(np.cumsum(self._cells), max(1.0, fraction * self.count)))
        return self._bound(cell)

    def summary(self) -> dict[str, float | int | None]:
        """Returns `count`, `mean`, and the quantiles `low` (5%), `median` and `high` (95%)."""
        mean = self._sum / self.count if self.count else None
        quantiles = {name: self.quantile(fraction) for name, fraction in _QUANTILES.items()}
        return {"count": self.count, "mean": mean, **quantiles}

    def occupied(self) -> tuple[int, int] | None:
        """Returns the first and the last cell that has values; None where none has."""
        found = np.flatnonzero(self._cells)
        return (int(found[0]), int(found[-1])) if len(found) else None

    def bars(self, first: int, width: int, count: int) -> list[int]:
        """Returns the sums of `count` groups of `width` cells each, from the cell `first` on."""
        padded = np.zeros(width * count, np.int64)
        cells = self._cells[first : first + width * count]
        padded[: len(cells)] = cells
        return [int(total) for total in padded.reshape(count, width).sum(axis=1)]

    def _bound(self, cell: int) -> float:
        return round(self.measure.low + cell * self.measure.step, 6)


def histogram(distributions: Sequence[Distribution]) -> dict[str, Any] | None:
    """Returns a measure's histogram over one or several runs, with the same bars for all; None where none has values.

    `start` and `width` say which values a bar has, and `runs` holds for each run its `bars` and its `summary`.
    """
    measure = distributions[0].measure
    ranges = [found for one in distributions if (found := one.occupied())]
    if not ranges:
        return None
    first, last = min(low for low, _ in ranges), max(high for _, high in ranges)
    most = min(_MOST_BARS, max(_FEWEST_BARS, int(2 * max(one.count for one in distributions) ** 0.5)))
    width = next(width for width in _round_numbers() if last // width - first // width < most)
    first -= first % width
    bars = (last - first) // width + 1
    return {
        "name": measure.name,
        "label": measure.label,
        "about": measure.about,
        "digits": measure.digits,
        "start": round(measure.low + first * measure.step, 6),
        "width": round(width * measure.step, 6),
        "runs": [{"bars": one.bars(first, width, bars), **one.summary()} for one in distributions],
    }


def _round_numbers() -> Iterator[int]:
    """Yields 1, 2, 5, 10, 20, 50 and so on."""
    for power in count():
        yield from (10**power, 2 * 10**power, 5 * 10**power)
