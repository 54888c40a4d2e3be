"""Search on a GPU: its blocks run here on CPU tensors; what only a GPU can run is marked `gpu`."""

import fcntl
import os
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import faiss
import numpy as np
import pytest
import torch

from smallcap.errors import ConfigError
from smallcap.index import gpu_search
from smallcap.index.gpu_search import ExactBlocks, FaissGpu, merged_index, open_gpu_search
from smallcap.index.retriever import Retriever
from tests.index_files import OpenIndex, unit_vectors

DIM = 32
ROWS = 700


@pytest.fixture
def vectors() -> np.ndarray:
    vectors = unit_vectors(ROWS)
    vectors[300:420] = vectors[7]  # a tie longer than the margin
    vectors[420:540] = vectors[7] + 1e-5 * unit_vectors(120, seed=3)  # and vectors that float16 cannot tell apart
    return vectors


@pytest.fixture
def queries(vectors: np.ndarray) -> np.ndarray:
    return np.concatenate([unit_vectors(12, seed=1), vectors[5:10]])


@pytest.fixture
def open_keyed(open_index: OpenIndex, vectors: np.ndarray) -> OpenIndex:
    """A function that publishes an index of `vectors` with a key and opens it."""
    images = [[f"img{number // 2}"] for number in range(ROWS)]
    return lambda index_key="Flat", shards=3, **settings: open_index(
        vectors, images, shards, index_key=index_key, **settings
    )


@pytest.fixture
def on_cpu_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes exact blocks of what would go to a GPU, on the CPU, and small enough that there are several."""
    monkeypatch.setattr(gpu_search, "_SCORES_AT_ONCE", 1700)
    monkeypatch.setattr(gpu_search, "_ROWS_AT_ONCE", 100)
    monkeypatch.setattr(
        gpu_search, "open_gpu_search", lambda shards, _, __, rank: ExactBlocks(shards, torch.device("cpu"), rank)
    )


@pytest.mark.usefixtures("on_cpu_tensors")
class TestExactBlocks:
    @pytest.mark.parametrize("k", [1, 4, 130])
    @pytest.mark.parametrize("removed", [(), (*range(300, 400), 7, 8)])
    def test_flat_answers_are_the_cpus_bit_by_bit(
        self, open_keyed: OpenIndex, queries: np.ndarray, k: int, removed: tuple[int, ...]
    ) -> None:
        retriever = open_keyed(removed=removed)
        exclude = [None if row % 2 else f"img{row}" for row in range(len(queries))]
        expected = retriever.search(queries, k, exclude)
        retriever.use_device("cuda")
        assert retriever.search_backend == "gpu-exact"
        assert retriever.search(queries, k, exclude) == expected
        for row in range(len(queries)):
            assert retriever.search(queries[row : row + 1], k, exclude[row : row + 1]) == expected[row : row + 1]

    @pytest.mark.parametrize("key", ["IVF8,Flat", "IVF8,SQfp16", "IVF8,SQ8", "SQ8", "HNSW16"])
    def test_of_other_keys_they_are_exact_by_the_stored_vectors(
        self, open_keyed: OpenIndex, queries: np.ndarray, key: str
    ) -> None:
        retriever = open_keyed(key, nprobe=1, k_factor=2)
        stored = np.concatenate([s.stored_vectors(0, s.entry.rows) for s in retriever._local.shards])
        retriever.use_device("cuda")
        found = retriever.search(queries, 10)
        scores = (queries[:, None].astype(np.float64) * stored.astype(np.float64)).sum(axis=2).astype(np.float32)
        for row, neighbours in enumerate(found):
            expected = sorted(range(ROWS), key=lambda caption: (-scores[row, caption], caption))[:10]
            assert [n.caption_id for n in neighbours] == expected
            assert [n.score for n in neighbours] == scores[row, expected].tolist()

    def test_more_than_there_are(self, open_keyed: OpenIndex, queries: np.ndarray) -> None:
        retriever = open_keyed(removed=range(10, ROWS))
        retriever.use_device("cuda")
        assert all(sorted(n.caption_id for n in of_one) == list(range(10)) for of_one in retriever.search(queries, 99))


class TestChoice:
    @pytest.fixture
    def room(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
        return lambda free: monkeypatch.setattr(gpu_search, "room_bytes", lambda _: free)

    def open(self, retriever: Retriever, device: str = "cpu") -> Any:
        local = retriever._local
        return open_gpu_search(local.shards, local.manifest.nprobe, torch.device(device), local.rank)

    @pytest.mark.parametrize(
        ("key", "nprobe", "gpus", "opens"),
        [
            ("IVF8,Flat", 2, 1, True),
            ("IVF8,Flat", 2, 0, False),
            ("IVF8,Flat", 4096, 1, False),
            ("IVF8,SQ8", 2, 1, True),
            ("IVF8,RaBitQ", 2, 1, False),
            ("SQ8", None, 1, False),
            ("Flat", None, 1, False),
        ],
    )
    def test_exact_where_there_is_room_else_faiss_where_it_can(
        self,
        open_keyed: OpenIndex,
        room: Callable[[int], None],
        monkeypatch: pytest.MonkeyPatch,
        key: str,
        nprobe: int | None,
        gpus: int,
        opens: bool,
    ) -> None:
        retriever = open_keyed(key, nprobe=nprobe)
        room(4 << 30)
        assert self.open(retriever).backend == "gpu-exact"
        room(1200 << 20)
        monkeypatch.setattr(gpu_search, "_SCORES_AT_ONCE", 1 << 30)
        monkeypatch.setattr(gpu_search.faiss, "get_num_gpus", lambda: gpus)
        made: list[int] = []
        monkeypatch.setattr(gpu_search, "FaissGpu", lambda *arguments: made.append(arguments[1]) or "made")
        assert self.open(retriever) == ("made" if opens else None)
        assert made == ([nprobe] if opens else [])

    def test_faiss_that_fails_and_no_room_leave_the_cpu(
        self, open_keyed: OpenIndex, room: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        retriever = open_keyed("IVF8,Flat", nprobe=2)
        monkeypatch.setattr(gpu_search, "_SCORES_AT_ONCE", 1 << 30)
        monkeypatch.setattr(gpu_search.faiss, "get_num_gpus", lambda: 1)

        def fails(*_: Any) -> None:
            raise RuntimeError("not implemented for GPUs")

        monkeypatch.setattr(gpu_search, "FaissGpu", fails)
        for free in (1200 << 20, 0):
            room(free)
            retriever.use_device("cuda:0")
            assert retriever.search_backend == "cpu"
        with pytest.raises(ConfigError, match="cannot be searched on the GPU"):
            retriever.use_device("cuda:0", "cuda")

    def test_a_model_on_the_cpu_is_searched_for_there(self, open_keyed: OpenIndex) -> None:
        retriever = open_keyed()
        retriever.use_device("cpu")
        retriever.use_device("cuda", "cpu")
        assert retriever.search_backend == "cpu"
        with pytest.raises(ConfigError, match="model is on cpu"):
            retriever.use_device("cpu", "cuda")


@pytest.mark.parametrize("key", ["IVF8,Flat", "IVF8,SQfp16", "IVF8,SQ8", "IVF8,PQ4x4", "OPQ4,IVF8,PQ4x4"])
def test_shards_are_merged_for_faiss(open_keyed: OpenIndex, queries: np.ndarray, key: str) -> None:
    [whole] = open_keyed(key, shards=1, nprobe=8, k_factor=1)._local.shards
    merged = merged_index(open_keyed(key, shards=3, nprobe=8, k_factor=1)._local.shards)
    assert merged.ntotal == ROWS
    expected, found = whole.index.search(queries, ROWS), merged.search(queries, ROWS)
    np.testing.assert_array_equal(np.sort(found[0]), np.sort(expected[0]))


def test_one_process_of_a_node_uploads_at_a_time_and_keeps_no_copy(
    open_keyed: OpenIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = open_keyed("IVF8,SQ8", shards=3)._local.shards
    merged: list[weakref.ref[Any]] = []
    aside: list[int] = []

    def upload(_resources: Any, _number: int, index: Any, _options: Any) -> str:
        assert index.ntotal == ROWS
        merged.append(weakref.ref(index))
        with lock.open("w") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return "uploaded"

    lock = Path(tempfile.gettempdir()) / f"smallcap-upload-{os.getuid()}.lock"
    for name in ("StandardGpuResources", "GpuClonerOptions", "GpuParameterSpace"):
        monkeypatch.setattr(gpu_search.faiss, name, MagicMock(), raising=False)
    monkeypatch.setattr(gpu_search.faiss, "index_cpu_to_gpu", upload, raising=False)
    monkeypatch.setattr(gpu_search, "set_aside", lambda taken, _: aside.append(taken))
    FaissGpu(shards, 2, torch.device("cuda:0"))
    assert merged[0]() is None
    assert aside == [ROWS * (DIM + 8) + (512 << 20)]
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestOnGpu:
    def test_exact_blocks(self, open_keyed: OpenIndex, queries: np.ndarray) -> None:
        retriever = open_keyed()
        expected = retriever.search(queries, 10)
        retriever.use_device("cuda", "cuda")
        assert retriever.search_backend == "gpu-exact"
        assert retriever.search(queries, 10) == expected

    @pytest.mark.skipif(not hasattr(faiss, "StandardGpuResources"), reason="needs a faiss with GPU support")
    @pytest.mark.parametrize("key", ["IVF8,Flat", "IVF8,SQfp16", "IVF8,SQ8", "IVF8,PQ8"])
    def test_faiss(self, open_keyed: OpenIndex, queries: np.ndarray, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu_search, "MEMORY_SHARE", 0.05)
        monkeypatch.setattr(gpu_search, "_SCORES_AT_ONCE", 1 << 40)
        retriever = open_keyed(key, nprobe=4, k_factor=4)
        expected = retriever.search(queries, 10)
        retriever.use_device("cuda", "cuda")
        assert retriever.search_backend == "faiss-gpu"
        found = retriever.search(queries, 10)
        agree = [
            len({n.caption_id for n in a} & {n.caption_id for n in b}) for a, b in zip(found, expected, strict=True)
        ]
        assert np.mean(agree) > 9
