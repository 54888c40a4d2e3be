"""Chooses the retrieved captions that a training prompt holds: the nearest, or a draw from the nearest 50.

A model that is always prompted with the nearest captions learns to copy what they share; one that sees drawn ones
learns to look at the image where they mislead.

Source: Li et al. 2024, "Understanding Retrieval Robustness for Retrieval-augmented Image Captioning", section 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypeVar

if TYPE_CHECKING:  # the command line imports this module, and must start quickly
    import numpy as np

Caption = TypeVar("Caption")
RetrievalMode = Literal["top-k", "sample-k", "c-sample-k"]
SAMPLED_FROM = 50  # candidates, as in the source


def candidates_needed(mode: RetrievalMode, k: int) -> int:
    """Returns how many candidates of each image a mode may draw from."""
    return k if mode == "top-k" or k == 0 else max(k, SAMPLED_FROM)


def choose_retrieved(
    candidates: Sequence[Caption], k: int, mode: RetrievalMode, rng: np.random.Generator
) -> list[Caption]:
    """Returns the k captions for one prompt, nearest first; all candidates if there are at most k.

    Args:
        candidates: Nearest first.
        k: Number of captions to choose.
        mode: `top-k` takes the nearest k; `sample-k` draws k uniformly without replacement from the nearest 50;
            `c-sample-k` takes the nearest one and draws k - 1 of the others.
        rng: Its state decides the draw.
    """
    pool = candidates[: candidates_needed(mode, k)]
    if mode == "top-k" or len(pool) <= k or k == 0:
        return list(pool[:k])
    kept = 1 if mode == "c-sample-k" else 0
    drawn = kept + rng.choice(len(pool) - kept, size=k - kept, replace=False)
    return [pool[place] for place in sorted([*range(kept), *drawn.tolist()])]
