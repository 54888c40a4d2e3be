from itertools import pairwise
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from smallcap import storage
from smallcap.errors import IndexIntegrityError
from smallcap.index.faiss_index import is_lossy
from smallcap.index.manifest import ShardEntry
from smallcap.index.vector_shard import VectorShard, assign
from tests.conftest import train_quickly
from tests.index_files import unit_vectors

DIM = 32
LOSSLESS = ["Flat", "IVF16,Flat", "IVF16_HNSW8,Flat", "IVF16,SQfp16"]
OF_CODES = ["IVF16,SQ8", "IVF16,PQ8", "IVF16,PQ8x4fs", "IVF16,RaBitQ", "OPQ8,IVF16,PQ8"]


def write_shard(
    folder: Path, trained: Any, key: str, vectors: np.ndarray, first_id: int = 0, order: np.ndarray | None = None
) -> VectorShard:
    """Writes a shard of all `vectors`, of an inverted file in the given order, and opens it."""
    index = faiss.clone_index(trained)
    if key.startswith(("IVF", "OPQ")):
        order = np.arange(len(vectors)) if order is None else order
        index.add_with_ids(vectors[order], first_id + order)
    else:
        index.add(vectors)
    folder.mkdir(exist_ok=True)
    faiss.write_index(index, str(folder / f"{first_id}.faiss"))
    np.save(folder / f"{first_id}.npy", vectors.astype(np.float16))
    vectors_file = folder / f"{first_id}.npy" if is_lossy(key) else None
    return open_shard(folder / f"{first_id}.faiss", key, len(vectors), first_id, vectors_file)


def open_shard(
    file: Path, key: str, rows: int, first_id: int = 0, vectors_file: Path | None = None, dim: int = DIM
) -> VectorShard:
    sha256 = storage.sha256_file(file)
    entry = ShardEntry(file="files/x", bytes=file.stat().st_size, sha256=sha256, rows=rows, first_id=first_id)
    return VectorShard(file, entry, key, dim, vectors_file)


@pytest.mark.parametrize(
    ("key", "lossy"),
    [(key, False) for key in (*LOSSLESS, "IVF4096,Flat", "IVF65536_HNSW32,SQfp16")]
    + [(key, True) for key in (*OF_CODES, "SQ8", "SQfp16", "PQ8", "HNSW32", "HNSW32_SQ8", "OPQ8,IVF16,Flat", "Flat,x")],
)
def test_which_keys_need_vectors(key: str, lossy: bool) -> None:
    assert is_lossy(key) == lossy


def assert_best(found: list[tuple[np.ndarray, np.ndarray]], scores: np.ndarray, ids: np.ndarray) -> None:
    """Compares the best of what the shards found."""
    all_scores, all_ids = (np.concatenate(columns, axis=1) for columns in zip(*found, strict=True))
    order = np.lexsort((all_ids, -all_scores), axis=-1)[:, : ids.shape[1]]
    np.testing.assert_array_equal(np.take_along_axis(all_ids, order, 1), ids)
    np.testing.assert_array_equal(np.take_along_axis(all_scores, order, 1), scores)


@pytest.mark.parametrize("key", [*LOSSLESS[1:], *OF_CODES])
def test_several_shards_are_one_index_bit_by_bit(tmp_path: Path, key: str) -> None:
    """Lists chosen once, by this library, give the scores that faiss gives over everything in one index."""
    vectors, queries = unit_vectors(3000), unit_vectors(40, seed=1)
    trained = train_quickly(key, vectors)
    whole = write_shard(tmp_path / "whole", trained, key, vectors)
    assigned = assign(whole.index, queries, 5)
    assert assigned is not None
    expected = whole.candidates(queries, 30, 5, assigned)
    bounds = [0, 700, 1900, 3000]
    shards = [
        write_shard(tmp_path / "parts", trained, key, vectors[first:stop], first) for first, stop in pairwise(bounds)
    ]
    assert_best([shard.candidates(queries, 30, 5, assigned) for shard in shards], *expected)


def test_the_answer_is_that_of_faisss_own_sharding(tmp_path: Path) -> None:
    key = "IVF16,Flat"
    vectors, queries = unit_vectors(3000), unit_vectors(40, seed=1)
    trained = train_quickly(key, vectors)
    shards = [write_shard(tmp_path, trained, key, vectors[first : first + 1000], first) for first in (0, 1000, 2000)]
    together = faiss.IndexShardsIVF(trained.quantizer, trained.nlist, False, False)
    for shard in shards:
        shard.index.nprobe = 5
        together.add_shard(shard.index)
    expected_scores, expected_ids = together.search(queries, 10)
    assert_best([shard.candidates(queries, 10, 5) for shard in shards], expected_scores, expected_ids)


class TestAssignment:
    def test_it_is_by_exact_scores_and_list_numbers(self) -> None:
        vectors, queries = unit_vectors(3000), unit_vectors(40, seed=1)
        trained = train_quickly("IVF16,Flat", vectors)
        centroids = trained.quantizer.reconstruct_n(0, 16)
        scores = (queries.astype(np.float64)[:, None] * centroids).sum(axis=2).astype(np.float32)
        assigned = assign(trained, queries, 6)
        assert assigned is not None
        expected = np.lexsort((np.broadcast_to(np.arange(16), scores.shape), -scores), axis=-1)[:, :6]
        np.testing.assert_array_equal(assigned.lists, expected)
        np.testing.assert_array_equal(assigned.scores, np.take_along_axis(scores, expected, 1))
        assert assign(train_quickly("Flat", vectors), queries, 6) is None
        everything = assign(trained, queries, 999)
        assert everything is not None
        assert everything.lists.shape == (40, 16)

    @pytest.mark.parametrize("key", ["IVF16,Flat", "IVF16_HNSW8,Flat", "OPQ8,IVF16,PQ8"])
    def test_the_batch_does_not_enter_it(self, key: str) -> None:
        vectors, queries = unit_vectors(3000), unit_vectors(70, seed=1)
        trained = train_quickly(key, vectors)
        together = assign(trained, queries, 6)
        assert together is not None
        for row in range(70):
            alone = assign(trained, queries[row : row + 1], 6)
            assert alone is not None
            for name in ("queries", "lists", "scores"):
                np.testing.assert_array_equal(getattr(alone, name)[0], getattr(together, name)[row])


class TestVectors:
    @pytest.mark.parametrize("by_residual", [True, False])
    @pytest.mark.parametrize("key", [*LOSSLESS, "IVF16,SQ8", "HNSW8"])
    def test_they_come_in_the_order_of_their_ids_and_score_them(
        self, tmp_path: Path, key: str, by_residual: bool
    ) -> None:
        vectors, queries = unit_vectors(500), unit_vectors(3, seed=1)
        trained = train_quickly(key, vectors)
        if key == "IVF16,SQfp16":
            trained.by_residual = by_residual
        order = np.random.default_rng(0).permutation(500)
        shard = write_shard(tmp_path, trained, key, vectors, 1000, order)
        for first, stop in ((0, 500), (123, 200), (499, 500), (7, 7)):
            stored = shard.stored_vectors(first, stop)
            exact = key.endswith("Flat")
            assert stored.dtype == (np.float32 if exact else np.float16)
            assert stored.shape == (stop - first, DIM)
            np.testing.assert_allclose(stored, vectors[first:stop], atol=0 if exact else 6e-4)
        ids = np.array([[1000, 1499, -1], [1007, 1007, 1008], [-1, -1, -1]])
        everything = shard.stored_vectors(0, 500).astype(np.float64)
        scores = (queries[:, None].astype(np.float64) * everything[(ids - 1000).clip(0)]).sum(axis=2)
        np.testing.assert_array_equal(shard.rank(queries, ids), np.where(ids < 0, -np.inf, scores).astype(np.float32))

    def test_a_lossy_shard_needs_a_file_of_its_own(self, tmp_path: Path) -> None:
        vectors = unit_vectors(500)
        write_shard(tmp_path, train_quickly("SQ8", vectors), "SQ8", vectors)
        shard = open_shard(tmp_path / "0.faiss", "SQ8", 500)
        assert shard.candidates(vectors[:2], 3)[1][:, 0].tolist() == [0, 1]
        with pytest.raises(IndexIntegrityError, match="`vectors` file is missing"):
            shard.stored_vectors(0, 3)
        half = np.float16
        for wrong in (np.zeros((500, DIM)), np.zeros((499, DIM), half), np.zeros((DIM, 500), half).T):
            np.save(tmp_path / "wrong.npy", wrong)
            with pytest.raises(IndexIntegrityError, match="contradicts the manifest"):
                open_shard(tmp_path / "0.faiss", "SQ8", 500, vectors_file=tmp_path / "wrong.npy")

    def test_a_list_that_holds_an_id_twice(self, tmp_path: Path) -> None:
        vectors = unit_vectors(500)
        index = train_quickly("IVF16,Flat", vectors)
        index.add_with_ids(vectors, np.arange(500).clip(max=498))
        faiss.write_index(index, str(tmp_path / "x.faiss"))
        with pytest.raises(IndexIntegrityError, match="each of its vectors once"):
            open_shard(tmp_path / "x.faiss", "IVF16,Flat", 500).stored_vectors(0, 1)


class TestUnreadable:
    @pytest.mark.parametrize(
        ("claimed", "written", "message"),
        [
            ("Flat", "IVF2,Flat", "kind of a shard"),
            ("Flat", "Flat-l2", "kind of a shard"),
            ("Flat", "Flat-dim", "dimension, metric"),
            ("Flat", "Flat-rows", "dimension, metric"),
            ("IVF2,Flat", "IVF2,SQfp16", "kind of a shard"),
            ("IVF2,Flat", "IVF2,Flat-l2", "dimension, metric"),
            ("IVF2,Flat", "IVF2,Flat-cut", "faiss cannot read"),
            ("IVF2,SQfp16", "IVF2,SQ8", "kind of a shard"),
            ("SQ8", "LSQ2x4", "does not read"),
            ("PQ4x4,Refine(Flat)", "PQ4x4,Refine(Flat)", "does not read"),
        ],
    )
    def test_a_file_of_another_kind_with_a_right_checksum(
        self, tmp_path: Path, claimed: str, written: str, message: str
    ) -> None:
        factory, _, fault = written.partition("-")
        dim = 8 if fault == "dim" else DIM
        metric = faiss.METRIC_L2 if fault == "l2" else faiss.METRIC_INNER_PRODUCT
        index = faiss.index_factory(dim, factory, metric)
        vectors = np.ascontiguousarray(unit_vectors(99 if fault == "rows" else 100)[:, :dim])
        index.train(vectors)
        index.add(vectors)
        faiss.write_index(index, str(tmp_path / "x.faiss"))
        if fault == "cut":
            (tmp_path / "x.faiss").write_bytes((tmp_path / "x.faiss").read_bytes()[:-99])
        with pytest.raises(IndexIntegrityError, match=message):
            open_shard(tmp_path / "x.faiss", claimed, 100)

    def test_ids_outside_the_shard(self, tmp_path: Path) -> None:
        vectors = unit_vectors(100)
        index = train_quickly("IVF2,Flat", vectors)
        for first, name in ((0, "low"), (1001, "high")):
            index.reset()
            index.add_with_ids(vectors, np.arange(first, first + 100))
            faiss.write_index(index, str(tmp_path / f"{name}.faiss"))
            shard = open_shard(tmp_path / f"{name}.faiss", "IVF2,Flat", 100, 1000)
            with pytest.raises(IndexIntegrityError, match="outside its shard"):
                shard.candidates(vectors, 3, 2)
            with pytest.raises(IndexIntegrityError, match="outside its shard"):
                shard.stored_vectors(0, 1)
