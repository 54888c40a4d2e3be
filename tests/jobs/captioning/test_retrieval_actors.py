"""An index shared by actors answers as the same index on one machine does."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from jobs.captioning.retrieval_actors import PartitionedRetriever, run_partitions
from jobs.cluster.errors import unwrapped_errors
from smallcap.errors import ConfigError, IndexIntegrityError
from smallcap.index.manifest import IndexManifest
from smallcap.index.retriever import Retriever
from smallcap.retrieval_config import RetrievalConfig
from tests.index_files import PublishIndex, unit_vectors

ROWS, DIM = 400, 16
KEYS: dict[str, dict[str, Any]] = {
    "Flat": {},
    "IVF8,Flat": {"nprobe": 3},
    "IVF8,SQfp16": {"nprobe": 3},
    "IVF8,SQ8": {"nprobe": 3, "k_factor": 2},
    "SQ8": {"k_factor": 2},
    "IVF8,PQ4x4": {"nprobe": 3, "k_factor": 4},
    "HNSW16": {"nprobe": 400, "k_factor": 2},
    "OPQ4,IVF8,PQ4x4": {"nprobe": 3, "k_factor": 4},
}


@pytest.fixture
def publish(publish_index: PublishIndex) -> Callable[..., IndexManifest]:
    def publish_one(uri: str, index_key: str = "Flat", shards: int = 7, **settings: Any) -> IndexManifest:
        vectors = unit_vectors(ROWS, DIM)
        vectors[100:130] = vectors[7]
        texts = [f"text {number}" for number in range(ROWS)]
        images = [[f"img{number // 3}"] for number in range(ROWS)]
        settings = {"removed": [7, *range(100, 110), 399]} | settings
        return publish_index(uri, vectors, texts, images, shards, index_key=index_key, **settings)

    return publish_one


@pytest.mark.parametrize(("key", "count"), [(key, 2 + number % 2) for number, key in enumerate(KEYS)])
def test_the_answers_are_those_of_one_machine(
    tmp_path: Path, publish: Callable[..., IndexManifest], key: str, count: int
) -> None:
    uri, cache = f"{tmp_path}/index", f"{tmp_path}/cache"
    manifest = publish(uri, key, **KEYS[key])
    queries = np.concatenate([unit_vectors(10, DIM, seed=1), unit_vectors(10, DIM)])
    exclude = [None if row % 3 == 0 else f"img{row // 3}" for row in range(20)]
    alone = Retriever.open(uri, cache_dir=cache)
    with run_partitions(uri, manifest.index_id, RetrievalConfig(cache_dir=cache, partitions=count)) as partitions:
        together = PartitionedRetriever.open(partitions, cache)
        assert len(partitions.actors) == count
        for k in (1, 5):
            assert together.search(queries, k) == alone.search(queries, k)
            assert together.search(queries, k, exclude) == alone.search(queries, k, exclude)
        assert together.search(queries, 0) == [[]] * 20
    assert (together.index_id, together.dim, together.search_backend) == (manifest.index_id, 16, "partitions")


def test_a_partition_downloads_its_own_files(s3: str, tmp_path: Path, publish: Callable[..., IndexManifest]) -> None:
    manifest = publish(f"{s3}/index", "IVF8,SQ8", shards=3, nprobe=8, k_factor=2)
    retrieval = RetrievalConfig(cache_dir=f"{tmp_path}/cache", partitions=2)
    with run_partitions(f"{s3}/index", manifest.index_id, retrieval) as partitions:
        found = PartitionedRetriever.open(partitions, f"{tmp_path}/other-node").search(unit_vectors(3, DIM), 4)
    assert found == Retriever.open(f"{s3}/index", cache_dir=f"{tmp_path}/cache").search(unit_vectors(3, DIM), 4)
    assert manifest.removed is not None
    assert [path.name for path in Path(tmp_path, "other-node", "files").iterdir()] == [Path(manifest.removed.file).name]


@pytest.mark.ray
@pytest.mark.slow
def test_an_actor_that_dies_is_started_again(tmp_path: Path, publish: Callable[..., IndexManifest]) -> None:
    uri, cache = f"{tmp_path}/index", f"{tmp_path}/cache"
    manifest = publish(uri, "IVF8,SQ8", nprobe=3, k_factor=2)
    expected = Retriever.open(uri, cache_dir=cache).search(unit_vectors(5, DIM), 3)
    with run_partitions(uri, manifest.index_id, RetrievalConfig(cache_dir=cache, partitions=2)) as partitions:
        together = PartitionedRetriever.open(partitions, cache)
        assert together.search(unit_vectors(5, DIM), 3) == expected
        for actor in partitions.actors:
            os.kill(ray.get(actor.__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)
            assert together.search(unit_vectors(5, DIM), 3) == expected


@pytest.mark.ray
def test_the_actors_end_with_the_run(tmp_path: Path, publish: Callable[..., IndexManifest]) -> None:
    uri = f"{tmp_path}/index"
    manifest = publish(uri)
    retrieval = RetrievalConfig(cache_dir=f"{tmp_path}/cache", partitions=2)
    with (
        pytest.raises(KeyError, match="stopped"),
        run_partitions(uri, manifest.index_id, retrieval) as partitions,
    ):
        raise KeyError("stopped")
    deadline = time.monotonic() + 60
    with pytest.raises(ray.exceptions.RayActorError):
        while time.monotonic() < deadline:  # Ray ends an actor some time after it was asked to
            ray.get(partitions.actors[0].check.remote())
            time.sleep(0.1)


def test_more_partitions_than_shards(tmp_path: Path, publish: Callable[..., IndexManifest]) -> None:
    uri = f"{tmp_path}/index"
    manifest = publish(uri, shards=2)
    retrieval = RetrievalConfig(cache_dir=f"{tmp_path}/cache", partitions=3)
    with pytest.raises(ConfigError, match="fewer shards"), run_partitions(uri, manifest.index_id, retrieval):
        pass


@pytest.mark.ray
def test_a_damaged_shard_is_its_own_error(tmp_path: Path, publish: Callable[..., IndexManifest]) -> None:
    uri = f"{tmp_path}/index"
    manifest = publish(uri)
    path = Path(uri, manifest.shards[5].file)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    retrieval = RetrievalConfig(cache_dir=f"{tmp_path}/cache", partitions=2)
    with (
        pytest.raises(IndexIntegrityError, match="damaged"),
        unwrapped_errors(),
        run_partitions(uri, manifest.index_id, retrieval),
    ):
        pass
