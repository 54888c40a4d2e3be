"""Finds bounds on the scores of captions by references: which captions to leave out, and what that is worth.

A bound is found on one half of the images and measured on the other, so that its worth is not that of a lucky choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal
from zlib import crc32

import numpy as np

from smallcap.evaluation.bootstrap import Statistics, interval, resample

Side = Literal["least", "most"]

# The side on which a score of a run is bounded.
SCORES: dict[str, Side] = {
    "clip_score": "least",
    "copied_share": "most",
    "retrieval_score": "least",
    "neighbour_agreement": "least",
}


@dataclass(frozen=True)
class Threshold:
    """A bound on a score, and what it is worth on images that did not choose it.

    Args:
        bound: The bound; None where it is best to accept all, or where no image has the score.
        accepted: The share of the captions that it accepts.
        quality: Mean quality of the captions that it accepts.
        gain: That mean minus the mean of all captions, with the ends of its 95% interval.
    """

    bound: float | None
    accepted: float
    quality: float
    gain: float
    low: float
    high: float

    @property
    def pays(self) -> bool:
        """Whether accepted captions are better than all, beyond chance."""
        return self.low > 0


def find_threshold(
    scores: Mapping[str, float], quality: Mapping[str, float], side: Side, keep: float, resamples: int, seed: int
) -> Threshold:
    """Finds the bound with the best captions among those that accept enough.

    Args:
        scores: A score of each image; one without it has NaN, which is rejected below a least score and accepted
            below a largest one, as by `smallcap.output.accepting`.
        quality: The quality of each image's caption, for the same images.
        side: Whether the score is to be least or at most the bound.
        keep: The least share of the captions to accept.
        resamples: Draws of the bootstrap.
        seed: Seed of the draws.
    """
    sign = 1.0 if side == "least" else -1.0
    values = np.array([sign * scores[image] for image in quality])
    values[np.isnan(values)] = -np.inf if side == "least" else np.inf
    worth = np.array(list(quality.values()))
    chooses = np.array([crc32(image.encode()) % 2 == 0 for image in quality])
    bound = _choose(values[chooses], worth[chooses], keep)
    values, worth = values[~chooses], worth[~chooses]
    accepted = values >= bound
    counts = np.stack([accepted * worth, accepted, worth, np.ones(len(worth))], axis=1)
    gain = Statistics(counts.astype(np.float64), _gain)
    low, high = interval(resample({"gain": gain}, resamples, seed)["gain"])
    return Threshold(
        bound=float(sign * bound) if np.isfinite(bound) else None,
        accepted=float(accepted.mean()),
        quality=float(worth[accepted].mean()),
        gain=gain.value,
        low=low,
        high=high,
    )


def _choose(values: np.ndarray, worth: np.ndarray, keep: float) -> float:
    """Returns the bound whose accepted values are worth most, with at least the share `keep` accepted."""
    order = np.argsort(-values, kind="stable")
    values, means = values[order], worth[order].cumsum() / np.arange(1, len(worth) + 1)
    is_last = np.append(values[1:] != values[:-1], True)  # equal values are accepted together
    allowed = is_last & (np.arange(1, len(values) + 1) >= keep * len(values)) & (values < np.inf)
    means = np.where(allowed, means, -np.inf)
    best = len(means) - 1 - int(np.argmax(means[::-1]))  # of equal ones, the one that accepts most
    return float(values[best]) if best < len(values) - 1 else -np.inf


def _gain(sums: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # nothing is accepted in a draw: NaN
        return sums[..., 0] / sums[..., 1] - sums[..., 2] / sums[..., 3]
