"""What tests of indexes share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from smallcap.index.manifest import IndexManifest
from smallcap.index.retriever import Retriever

PublishIndex = Callable[..., IndexManifest]  # of the fixture `publish_index`
OpenIndex = Callable[..., Retriever]  # of the fixture `open_index`


def unit_vectors(rows: int, dim: int = 32, seed: int = 0) -> np.ndarray:
    """Returns random float32 vectors of unit length, [rows, dim]."""
    vectors = np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
