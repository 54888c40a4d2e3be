"""Confidence intervals of figures over a set of images, by resampling the images.

A figure is computed from sums over images: a mean from a sum and a count, corpus BLEU from n-gram counts and lengths.
Resampling repeats the sums, not the scoring. Several figures share their resamples, so that the differences of two runs
on the same images are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

NameT = TypeVar("NameT")


class Interval(NamedTuple):
    """The ends of a confidence interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Statistics:
    """The counts that a figure is computed from.

    Args:
        counts: [images, C] float64; one row for each image.
        figure: Takes sums of rows, [..., C], and returns the figure of each, [...].
    """

    counts: np.ndarray
    figure: Callable[[np.ndarray], np.ndarray]

    @property
    def value(self) -> float:
        """The figure of all images."""
        return float(self.figure(self.counts.sum(axis=0)))


def mean_statistics(values: np.ndarray) -> Statistics:
    """Returns the statistics of a mean.

    Args:
        values: [images]; an image without a value has NaN, and is left out of the mean.
    """
    known = ~np.isnan(values)
    return Statistics(np.stack([np.where(known, values, 0.0), known], axis=1).astype(np.float64), _ratio)


def _ratio(sums: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # no image has a value: NaN
        return sums[..., 0] / sums[..., 1]


def resample(statistics: Mapping[NameT, Statistics], resamples: int, seed: int) -> dict[NameT, np.ndarray]:
    """Draws the images again, with replacement, and returns the figures of each draw.

    Args:
        statistics: Statistics of the same images in the same order, by name.
        resamples: Number of draws.
        seed: Seed of the draws.

    Returns:
        [resamples] float64 for each name; entry i of all of them comes from the same draw.
    """
    counts = np.concatenate([entry.counts for entry in statistics.values()], axis=1)
    images = len(counts)
    generator = np.random.default_rng(seed)
    sums = np.empty((resamples, counts.shape[1]))
    for row in sums:
        row[:] = np.bincount(generator.integers(images, size=images), minlength=images) @ counts
    ends = np.cumsum([entry.counts.shape[1] for entry in statistics.values()])
    split_sums = np.split(sums, ends[:-1], axis=1)
    return {name: entry.figure(part) for (name, entry), part in zip(statistics.items(), split_sums, strict=True)}


def interval(figures: np.ndarray, level: float = 0.95) -> Interval:
    """Returns the percentile interval of resampled figures; draws without a figure (NaN) are left out.

    Source: Efron & Tibshirani, An Introduction to the Bootstrap, chapter 13.
    """
    known = figures[~np.isnan(figures)]
    if not len(known):
        return Interval(float("nan"), float("nan"))
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))
