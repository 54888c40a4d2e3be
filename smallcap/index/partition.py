"""The interface through which a search reads an index, and the partition of an index that one process holds.

A partition is all shards, or a contiguous share of them where an index is too large for one machine. `retriever`
searches a partition without knowing where it lies; `LocalPartition` is memory-mapped by this process.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import faiss
import numpy as np
import pyarrow as pa

from smallcap.errors import ManifestError
from smallcap.index.caption_store import CaptionStore
from smallcap.index.faiss_index import is_lossy
from smallcap.index.manifest import FileEntry, IndexManifest, ShardEntry, share_of
from smallcap.index.node_cache import open_version_folder
from smallcap.index.ranking import NOTHING, Ranking, merge_rankings
from smallcap.index.vector_shard import VectorShard

if TYPE_CHECKING:
    from smallcap.index.gpu_search import GpuSearch


class IndexPartition(Protocol):
    """Vectors and captions that a search can ask for; ids are global."""

    @property
    def backend(self) -> str:
        """The search backend: `cpu`, `gpu-exact` or `faiss-gpu`."""

    @property
    def k_factor(self) -> int:
        """Candidates for each neighbour wanted; 1 where candidates are neighbours already."""

    @property
    def ranks_again(self) -> bool:
        """Whether the candidates' scores are approximate, and `rank` has better ones."""

    def candidates(self, queries: np.ndarray, count: int) -> Ranking:
        """Returns the partition's best [B, count], tombstones included, filled up with (-inf, -1)."""

    def rank(self, queries: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Scores ids [B, K] by their stored vectors; -1 and ids of another partition score -inf."""

    def image_ids(self, caption_ids: np.ndarray) -> pa.ListArray:
        """Returns the images that have the caption of each id [n], null where there are none."""

    def texts(self, caption_ids: np.ndarray) -> pa.StringArray:
        """Returns the text of each id [n]."""

    def sources(self, caption_ids: np.ndarray) -> pa.ListArray:
        """Returns the dump files that have the caption of each id [n]."""


class LocalPartition:
    """The shards and captions that this process has mapped.

    Args:
        manifest: The manifest of the index version.
        folder: The folder that holds the version's files, verified.
        partition: The share to map: (i, n) takes the i-th of n contiguous shares.

    Attributes:
        threads: Threads of a search on the CPU; None leaves them to OpenMP.

    Raises:
        ManifestError: The manifest contradicts itself.
        ConfigError: There are fewer shards than partitions.
        IndexIntegrityError: A file contradicts its entry.
    """

    def __init__(self, manifest: IndexManifest, folder: Path, partition: tuple[int, int] = (0, 1)) -> None:
        check_layout(manifest)
        self.manifest = manifest
        vectors = {entry.first_id: folder / entry.file for entry in manifest.vectors}
        self.shards = [
            VectorShard(
                folder / entry.file, entry, manifest.index_key, manifest.dim, vectors_file=vectors.get(entry.first_id)
            )
            for entry in share_of(manifest.shards, partition)
        ]
        captions = share_of(manifest.captions, partition)
        self.captions = CaptionStore([folder / entry.file for entry in captions], captions)
        self._gpu: GpuSearch | None = None
        self.threads: int | None = None

    @classmethod
    def open(
        cls, index_uri: str, manifest: IndexManifest, cache_dir: str, partition: tuple[int, int] = (0, 1)
    ) -> LocalPartition:
        """Verifies the files of one partition, downloads those that this node lacks, and maps them.

        Args:
            index_uri: The index's folder or prefix.
            manifest: The version's manifest.
            cache_dir: Where this node keeps copies of remote indexes and remembers what it has verified.
            partition: The share to map: (i, n) takes the i-th of n contiguous shares.

        Raises:
            ManifestError: The manifest contradicts itself.
            ConfigError: There are fewer shards than partitions.
            IndexIntegrityError: The files contradict the manifest.
            StorageError: The store or the cache folder fails.
        """
        return cls(
            manifest, open_version_folder(index_uri, manifest, cache_dir, files_of(manifest, partition)), partition
        )

    def use_gpu(self, device: str) -> None:
        """Puts the vectors on a GPU in the best way that fits; does nothing where they do not fit.

        Args:
            device: A CUDA device, on which the model is loaded already.
        """
        import torch

        from smallcap.index.gpu_search import open_gpu_search

        self._gpu = open_gpu_search(self.shards, self.manifest.nprobe, torch.device(device), self.rank)

    @property
    def backend(self) -> str:
        """The search backend: `cpu`, `gpu-exact` or `faiss-gpu`."""
        return self._gpu.backend if self._gpu is not None else "cpu"

    @property
    def k_factor(self) -> int:
        """Candidates for each neighbour wanted; 1 where candidates are neighbours already."""
        return 1 if self._gpu is not None and self._gpu.exact else self.manifest.k_factor

    @property
    def ranks_again(self) -> bool:
        """Whether the candidates' scores are approximate, and `rank` has better ones."""
        return not self._gpu.exact if self._gpu is not None else bool(self.manifest.vectors)

    def candidates(self, queries: np.ndarray, count: int) -> Ranking:
        """Returns the partition's best [B, count], tombstones included, filled up with (-inf, -1)."""
        gpu_ranking = self._gpu.candidates(queries, count) if self._gpu is not None else None
        if gpu_ranking is not None:
            return gpu_ranking
        if self.threads is not None:
            faiss.omp_set_num_threads(
                self.threads
            )  # OpenMP keeps the number for each thread, and others search as well
        nprobe = self.manifest.nprobe
        assigned = self.shards[0].assign(queries, nprobe)  # the lists of all shards have the same centroids
        best = self.shards[0].candidates(queries, count, nprobe, assigned)
        for shard in self.shards[1:]:
            best = merge_rankings([best, shard.candidates(queries, count, nprobe, assigned)], count)
        return best

    def rank(self, queries: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Scores ids [B, K] by their stored vectors; -1 and ids of another partition score -inf."""
        scores = np.full(ids.shape, -np.inf, np.float32)
        for shard in self.shards:
            first_id = shard.entry.first_id
            is_here = (ids >= first_id) & (ids < first_id + shard.entry.rows)
            if is_here.any():
                scores = np.where(is_here, shard.rank(queries, np.where(is_here, ids, NOTHING)), scores)
        return scores

    def image_ids(self, caption_ids: np.ndarray) -> pa.ListArray:
        """Returns the images that have the caption of each id [n], null where there are none."""
        return self.captions.image_ids(caption_ids)

    def texts(self, caption_ids: np.ndarray) -> pa.StringArray:
        """Returns the text of each id [n]."""
        return self.captions.texts(caption_ids)

    def sources(self, caption_ids: np.ndarray) -> pa.ListArray:
        """Returns the dump files that have the caption of each id [n]."""
        return self.captions.sources(caption_ids)


def files_of(manifest: IndexManifest, partition: tuple[int, int] = (0, 1)) -> tuple[FileEntry, ...]:
    """Returns the files that one partition reads: all except the template, which every shard repeats."""
    shards = share_of(manifest.shards, partition)
    first_ids = {entry.first_id for entry in shards}
    vectors = [entry for entry in manifest.vectors if entry.first_id in first_ids]
    removed = [manifest.removed] if manifest.removed else []
    return (*shards, *vectors, *share_of(manifest.captions, partition), *removed)


def check_layout(manifest: IndexManifest) -> None:
    """Checks that shards and captions cover the ids from 0 without gap or overlap, and that `vectors` fit the shards.

    Raises:
        ManifestError: A check fails.
    """
    for name, entries in (("shards", manifest.shards), ("captions", manifest.captions)):
        first_id = 0
        for entry in entries:
            if entry.first_id != first_id or not entry.rows:
                raise ManifestError(
                    f"The manifest's {name} do not cover contiguous ids.",
                    where=entry.file,
                    expected=f"rows from id {first_id}",
                    found=f"{entry.rows} rows from id {entry.first_id}",
                )
            first_id += entry.rows
        if first_id != manifest.id_count:
            raise ManifestError(
                "The manifest does not have one caption for each vector.",
                expected=f"{manifest.id_count} captions",
                found=str(first_id),
            )
    id_ranges = _id_ranges(manifest.shards) if is_lossy(manifest.index_key) else []
    if _id_ranges(manifest.vectors) != id_ranges:
        raise ManifestError(
            "The `vectors` files of the manifest do not fit its shards.",
            where=manifest.index_key,
            expected=f"{len(id_ranges)} files, with the shards' ids",
            found=f"{len(manifest.vectors)} files",
            remedy="Rebuild the index.",
        )


def _id_ranges(entries: Sequence[ShardEntry]) -> list[tuple[int, int]]:
    return [(entry.first_id, entry.rows) for entry in entries]
