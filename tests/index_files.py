"""What tests of indexes share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from smallcap.config import IndexConfig
from smallcap.index.manifest import IndexManifest
from smallcap.index.retriever import Retriever

PublishIndex = Callable[..., IndexManifest]  # of the fixture `publish_index`
OpenIndex = Callable[..., Retriever]  # of the fixture `open_index`


def unit_vectors(rows: int, dim: int = 32, seed: int = 0) -> np.ndarray:
    """Returns random float32 vectors of unit length, [rows, dim]."""
    vectors = np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def build_text_index(folder: Path, encoder: Path, rows: Iterable[str]) -> str:
    """Builds an index of two shards from lines of `image,caption`; returns its folder."""
    from index_builder.build import build_index

    (folder / "dump.csv").write_text("\n".join(["image,caption", *rows]))
    dumps = (str(folder / "dump.csv"),)
    build_index(IndexConfig(dumps=dumps, out=str(folder / "index"), encoder=f"hf:{encoder}", shards=2))
    return str(folder / "index")
