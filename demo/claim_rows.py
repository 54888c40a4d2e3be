"""Scores one row of the claims: captions of test scenes, by CIDEr and by the objects that they name."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from demo.drawn_scenes import DrawnScenes, is_right
from smallcap.evaluation.bootstrap import interval, mean_statistics, resample
from smallcap.evaluation.caption_metrics import score_captions
from smallcap.index.retriever import Neighbours, NeighbourSearch, Retriever

RESAMPLES = 1_000


@dataclass(frozen=True)
class Row:
    """CIDEr (1.0 is what papers print as 100), and the share of scenes whose caption names exactly their objects.

    `low` and `high` are the ends of 95% bootstrap intervals over scenes.
    """

    cider: float
    cider_low: float
    cider_high: float
    accuracy: float
    accuracy_low: float
    accuracy_high: float

    def as_json(self) -> dict[str, float]:
        """Returns the figures, rounded to what the number of scenes supports."""
        return {name: round(value, 4) for name, value in asdict(self).items()}


class RandomCaptions(NeighbourSearch):
    """Draws captions of a datastore, whatever the query: a control that shows the effect of a longer prompt."""

    def __init__(self, retriever: Retriever, captions: Sequence[str], seed: int = 0) -> None:
        self.manifest, self.index_id, self.dim = retriever.manifest, retriever.index_id, retriever.dim
        self._captions = captions
        self._rng = np.random.default_rng(seed)

    def nearest(self, queries: np.ndarray, k: int, exclude_image_ids: Sequence[str | None] | None = None) -> Neighbours:
        """Returns k captions for each query, drawn without regard to it; their scores are NaN."""
        drawn = np.stack([self._rng.choice(len(self._captions), size=k, replace=False) for _ in queries])
        texts = pa.array([self._captions[row] for row in drawn.ravel().tolist()], pa.string())
        sources = pa.array([[]] * len(texts), pa.list_(pa.string()))
        return Neighbours(drawn, np.full(drawn.shape, np.nan, np.float32), texts, sources)


def score(captions: Sequence[str], scenes: DrawnScenes) -> Row:
    """Scores one caption per scene."""
    by_scene = {str(scene.seed): caption for scene, caption in zip(scenes.scenes, captions, strict=True)}
    right = list(map(is_right, scenes.scenes, captions))
    statistics: dict[str, Any] = {
        "cider": score_captions(by_scene, scenes.references, ["cider"])["cider"].statistics,
        "accuracy": mean_statistics(np.array(right, dtype=np.float64)),
    }
    draws = resample(statistics, RESAMPLES, seed=0)
    (cider_low, cider_high), (low, high) = interval(draws["cider"]), interval(draws["accuracy"])
    return Row(statistics["cider"].value, cider_low, cider_high, statistics["accuracy"].value, low, high)
