"""Searches an index that is too large for one machine: each actor holds a partition, and the retriever asks them all.

A partition is a contiguous share of the shards and of the caption files. `PartitionedRetriever` searches as on one
machine, over a partition that scatters every query and gathers the answers; the results are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from jobs.cluster.errors import GuardedActor
from jobs.cluster.resources import on_working_nodes, set_faiss_threads
from smallcap.config import CaptionConfig
from smallcap.index.caption_store import gather, open_removed
from smallcap.index.manifest import IndexManifest, load_manifest, load_manifests, share_of
from smallcap.index.merged import CaptionSearch, merge_searches
from smallcap.index.node_cache import open_version_folder
from smallcap.index.partition import LocalPartition
from smallcap.index.ranking import Ranking, merge_rankings
from smallcap.index.retriever import NeighbourSearch
from smallcap.retrieval_config import NamedIndex, RetrievalConfig


@dataclass(frozen=True)
class Partitions:
    """The running actors of one index version, for those that search it."""

    index_uri: str
    index_id: str
    actors: tuple[Any, ...]  # handles, in the order of their ids


class _PartitionActor(GuardedActor):
    """Holds one partition; a call takes a method of `IndexPartition` and its arguments."""

    def load(self, index_uri: str, index_id: str, cache_dir: str, partition: tuple[int, int]) -> None:
        set_faiss_threads()  # the actor asks Ray for no CPU, so Ray would let it use only one
        self._partition = LocalPartition.open(index_uri, load_manifest(index_uri, index_id), cache_dir, partition)

    def process(self, method: str, *arguments: Any) -> Any:
        return getattr(self._partition, method)(*arguments)


@contextmanager
def shared_indexes(config: CaptionConfig, index_id: str | None) -> Iterator[tuple[Partitions, ...]]:
    """Runs the actors that share each index, where no process is to hold all of it; yields none where it is.

    Args:
        config: The run's config.
        index_id: The version that the run has pinned, of all its indexes.
    """
    retrieval = config.retrieval
    if index_id is None or retrieval.partitions == 1:
        yield ()
        return
    with ExitStack() as running:
        partitions = []
        for uri, manifest in zip(config.index, load_manifests(config.index, index_id), strict=True):
            count = retrieval.partitions if len(config.index) == 1 else min(retrieval.partitions, len(manifest.shards))
            shared = run_partitions(uri, manifest.index_id, retrieval.model_copy(update={"partitions": count}))
            partitions.append(running.enter_context(shared))
        yield tuple(partitions)


@contextmanager
def run_partitions(index_uri: str, index_id: str, retrieval: RetrievalConfig) -> Iterator[Partitions]:
    """Starts the actors that hold an index's partitions, spread over the nodes, and ends them afterwards.

    Args:
        index_uri: The index.
        index_id: The index's version.
        retrieval: The number of partitions, and where nodes keep copies of remote indexes.

    Yields:
        The partitions, all of them open.

    Raises:
        ConfigError: The index has fewer shards than partitions.
        IndexIntegrityError: The index's files contradict its manifest.
    """
    count = retrieval.partitions
    share_of(load_manifest(index_uri, index_id).shards, (0, count))  # raises before any actor starts
    # The actors ask for no CPU, since the captioners need them all. A query that a dying actor got is asked again.
    options: dict[str, Any] = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, **on_working_nodes()}
    actor = ray.remote(scheduling_strategy="SPREAD", **options)(_PartitionActor)
    actors = [actor.remote(index_uri, index_id, retrieval.cache_dir, (number, count)) for number in range(count)]
    try:
        ray.get([partition.check.remote() for partition in actors])
        yield Partitions(index_uri, index_id, tuple(actors))
    finally:
        for partition in actors:
            ray.kill(partition)


def open_partitioned(partitions: Sequence[Partitions], indexes: Sequence[NamedIndex], cache_dir: str) -> CaptionSearch:
    """Connects to the running partitions of each index; see `PartitionedRetriever.open`."""
    return merge_searches(indexes, [PartitionedRetriever.open(one, cache_dir) for one in partitions])


class PartitionedRetriever(NeighbourSearch):
    """Searches an index whose partitions other actors hold."""

    @classmethod
    def open(cls, partitions: Partitions, cache_dir: str) -> PartitionedRetriever:
        """Connects to running partitions.

        Args:
            partitions: The partitions that `run_partitions` yields.
            cache_dir: Where this node keeps the list of removed ids, if there is one.
        """
        manifest = load_manifest(partitions.index_uri, partitions.index_id)
        removed = [manifest.removed] if manifest.removed else []
        folder = open_version_folder(partitions.index_uri, manifest, cache_dir, removed)
        return cls(manifest, _ScatteredPartition(manifest, partitions.actors), open_removed(manifest, folder))


class _ScatteredPartition:
    """An `IndexPartition` that is the whole index: it asks the actors."""

    backend = "partitions"

    def __init__(self, manifest: IndexManifest, actors: Sequence[Any]) -> None:
        self.k_factor = manifest.k_factor
        self.ranks_again = bool(manifest.vectors)
        self._actors = actors
        count = len(actors)
        shares = [share_of(manifest.captions, (number, count)) for number in range(count)]
        self._first_ids = np.array([share[0].first_id for share in shares])

    def candidates(self, queries: np.ndarray, count: int) -> Ranking:
        """Returns the best [B, count] over all partitions."""
        return merge_rankings(self._ask_all("candidates", queries, count), count)

    def rank(self, queries: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Scores ids [B, K] by their stored vectors, in the partitions that have them."""
        return np.max(self._ask_all("rank", queries, ids), axis=0)

    def image_ids(self, caption_ids: np.ndarray) -> pa.ListArray:
        """Returns the images that have the caption of each id [n], null where there are none."""
        return self._ask_owners("image_ids", caption_ids, pa.list_(pa.string()))

    def texts(self, caption_ids: np.ndarray) -> pa.StringArray:
        """Returns the text of each id [n]."""
        return self._ask_owners("texts", caption_ids, pa.string())

    def sources(self, caption_ids: np.ndarray) -> pa.ListArray:
        """Returns the dump files that have the caption of each id [n]."""
        return self._ask_owners("sources", caption_ids, pa.list_(pa.string()))

    def _ask_all(self, method: str, *arguments: Any) -> list[Any]:
        arguments = tuple(map(ray.put, arguments))  # stored once, not for every actor
        return ray.get([actor.__call__.remote(method, *arguments) for actor in self._actors])

    def _ask_owners(self, method: str, caption_ids: np.ndarray, kind: pa.DataType) -> pa.Array:
        owner_of = np.searchsorted(self._first_ids, caption_ids, side="right") - 1
        owners = np.unique(owner_of).tolist()
        positions_of = [np.flatnonzero(owner_of == owner) for owner in owners]
        answers = ray.get(
            [
                self._actors[owner].__call__.remote(method, caption_ids[positions])
                for owner, positions in zip(owners, positions_of, strict=True)
            ]
        )
        return gather(answers, positions_of, kind)
