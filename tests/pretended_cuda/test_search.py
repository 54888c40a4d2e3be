"""Exact search on the pretended device: the CPU's answers bit by bit, whichever side orders the candidates."""

from pathlib import Path

import numpy as np
import pytest
import torch

from smallcap.index import gpu_search
from smallcap.index.retriever import Retriever
from tests.index_files import PublishIndex, unit_vectors
from tests.pretended_cuda.checks import Mutation, mutated
from tests.pretended_cuda.torch_cuda import pretended_cuda

ROWS = 700


@pytest.fixture(params=["float16 holds the vectors", "float16 rounds them"])
def vectors(request: pytest.FixtureRequest) -> np.ndarray:
    """Vectors that the device orders by exact scores, and vectors that the CPU must order; with a long tie."""
    vectors = unit_vectors(ROWS)
    if request.param == "float16 holds the vectors":
        vectors = vectors.astype(np.float16).astype(np.float32)
    vectors[300:420] = vectors[7]
    return vectors


@pytest.fixture
def queries(vectors: np.ndarray) -> np.ndarray:
    return np.concatenate([unit_vectors(12, seed=1), vectors[5:10]])


@pytest.fixture
def retriever(publish_index: PublishIndex, vectors: np.ndarray, tmp_path: Path) -> Retriever:
    texts, images = [f"text {number}" for number in range(ROWS)], [[f"img{number // 2}"] for number in range(ROWS)]
    publish_index(f"{tmp_path}/index", vectors, texts, images, shards=3, removed=range(100, 150))
    return Retriever.open(f"{tmp_path}/index", cache_dir=f"{tmp_path}/cache")


def test_answers_are_the_cpus_bit_by_bit(
    retriever: Retriever, queries: np.ndarray, vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_search, "_SCORES_AT_ONCE", 1700)  # several blocks
    monkeypatch.setattr(gpu_search, "_ROWS_AT_ONCE", 100)
    exclude = [None if row % 2 else f"img{row}" for row in range(len(queries))]
    expected = retriever.search(queries, 10, exclude)
    with pretended_cuda() as cuda:
        retriever.use_device("cuda")
        assert retriever.search_backend == "gpu-exact"
        cuda.clear_events()
        assert retriever.search(queries, 10, exclude) == expected
        on_device = any(event.function == "ExactBlocks._score_exactly" for event in cuda.events)
        assert on_device == np.array_equal(vectors, vectors.astype(np.float16))


def check_order(retriever: Retriever, queries: np.ndarray, mutation: Mutation | None = None) -> None:
    """An index that has been opened can be searched on any stream."""
    expected = retriever.search(queries, 4)
    with mutated(mutation) as cuda:
        retriever.use_device("cuda")
        assert retriever.search_backend == "gpu-exact"
        with torch.cuda.stream(torch.cuda.Stream()):
            assert retriever.search(queries, 4) == expected
        assert not cuda.hazards, f"{[*map(str, cuda.hazards)]}"


def test_an_opened_index_is_ready_for_any_stream(retriever: Retriever, queries: np.ndarray) -> None:
    check_order(retriever, queries)


def test_an_index_that_is_not_waited_for_is_noticed(retriever: Retriever, queries: np.ndarray) -> None:
    def wait_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)

    with pytest.raises(AssertionError, match="uses what the default stream may not have written yet"):
        check_order(retriever, queries, wait_for_nothing)


def test_an_index_without_room_is_searched_on_the_cpu(retriever: Retriever, queries: np.ndarray) -> None:
    expected = retriever.search(queries, 4)
    with pretended_cuda(total_bytes=1 << 20):
        retriever.use_device("cuda")
        assert retriever.search_backend == "cpu"
    assert retriever.search(queries, 4) == expected
