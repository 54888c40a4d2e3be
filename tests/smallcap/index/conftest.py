"""What tests of searching share."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smallcap.index.retriever import Retriever
from tests.index_files import OpenIndex, PublishIndex


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


@pytest.fixture
def open_index(tmp_path: Path, cache: str, publish_index: PublishIndex) -> OpenIndex:
    """A function that publishes an index of vectors and opens it; the captions are `text 0`, `text 1` and so on."""

    def publish_and_open(vectors: np.ndarray, *arguments: Any, **settings: Any) -> Retriever:
        uri = f"{tmp_path}/index-{len(list(tmp_path.iterdir()))}"
        publish_index(uri, vectors, [f"text {number}" for number in range(len(vectors))], *arguments, **settings)
        return Retriever.open(uri, cache_dir=cache)

    return publish_and_open
