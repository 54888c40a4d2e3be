"""Finds the nearest captions of query vectors in a published index; never imports Ray.

Scores are inner products of unit vectors. An answer depends only on the query, its exclusion and the index: the first
`k * k_factor` candidates that may be retrieved, in the order of their approximate scores, ranked again by their stored
vectors where those are better, and cut to k. The number of shards, their place and the other queries of the batch do
not matter; `vector_shard` names the exceptions, which are faiss's.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from smallcap import storage
from smallcap.errors import ConfigError, RunError
from smallcap.index.caption_store import CaptionStore, open_removed
from smallcap.index.manifest import EncoderIdentity, IndexManifest, load_manifest
from smallcap.index.node_cache import open_version_folder
from smallcap.index.partition import IndexPartition, LocalPartition, files_of
from smallcap.index.ranking import NOTHING, Attempted, Ranking, best_of, settle
from smallcap.output.schema import NEIGHBOUR_TYPE
from smallcap.retrieval_config import SearchDevice

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Neighbour:
    """A caption near a query; `score` is the cosine, `sources` are the dump files that have the caption.

    With several indexes a source is `NAME/dump`, and `caption_id` is that of the first source's index.
    """

    caption_id: int
    text: str
    score: float
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class Neighbours:
    """The captions nearest to B queries, as columns: a job has no Python object for each."""

    ids: np.ndarray  # [B, K] int64, the best first; -1 is an empty place
    scores: np.ndarray  # [B, K] float32, cosines; those of empty places mean nothing
    texts: pa.StringArray  # of all places that are not empty, one query after the other
    sources: pa.ListArray  # the dump files that have each of these captions

    @classmethod
    def none(cls, queries: int) -> Neighbours:
        """Returns no neighbours for each query."""
        nothing = np.empty((queries, 0))
        texts, sources = pa.array([], pa.string()), pa.array([], pa.list_(pa.string()))
        return cls(nothing.astype(np.int64), nothing.astype(np.float32), texts, sources)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def found(self) -> np.ndarray:
        """Says which places are not empty, [B, K]."""
        return self.ids != NOTHING

    @property
    def offsets(self) -> np.ndarray:
        """Where each query's texts begin, and the last one's end: [B + 1] int32."""
        return np.concatenate([[0], self.found.sum(axis=1).cumsum()]).astype(np.int32)

    def mean_scores(self) -> pa.Array:
        """Returns the mean score of each query's neighbours, [B] float32; null where it has none."""
        counts = self.found.sum(axis=1)
        sums = np.where(self.found, self.scores, 0).sum(axis=1)
        means = np.full(len(self), np.nan, np.float32)
        np.divide(sums, counts, out=means, where=counts > 0)
        return pa.array(means, from_pandas=True)  # NaN is null

    def to_column(self) -> pa.ListArray:
        """Returns each query's neighbours as a run's parts have them."""
        found = self.found
        arrays = [pa.array(self.ids[found]), self.texts, pa.array(self.scores[found]), self.sources]
        return pa.ListArray.from_arrays(self.offsets, pa.StructArray.from_arrays(arrays, fields=list(NEIGHBOUR_TYPE)))

    @classmethod
    def join(cls, parts: Sequence[Neighbours]) -> Neighbours:
        """Puts the neighbours of several batches together, at least one, which were searched for alike."""
        return cls(
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.scores for part in parts]),
            pa.concat_arrays([part.texts for part in parts]),
            pa.concat_arrays([part.sources for part in parts]),
        )

    def to_rows(self) -> list[list[Neighbour]]:
        """Returns each query's neighbours as objects."""
        found = self.found
        sources = map(tuple, self.sources.to_pylist())
        columns = (self.ids[found].tolist(), self.texts.to_pylist(), self.scores[found].tolist(), sources)
        flat = list(map(Neighbour, *columns))
        return [flat[start:end] for start, end in pairwise(self.offsets.tolist())]


class NeighbourSearch:
    """The nearest captions of image or text embeddings in one version of an index, wherever its shards lie.

    Args:
        manifest: The version's manifest.
        partition: All vectors and captions of the version.
        removed: The sorted ids that are no longer retrieved.
    """

    def __init__(self, manifest: IndexManifest, partition: IndexPartition, removed: np.ndarray) -> None:
        self.manifest = manifest
        self.index_id = manifest.index_id
        self.dim = manifest.dim
        self._partition = partition
        self._removed = removed

    @property
    def manifests(self) -> tuple[IndexManifest, ...]:
        """The version's manifest, as a search in several indexes has theirs."""
        return (self.manifest,)

    @property
    def search_backend(self) -> str:
        """The search backend: `cpu`, `gpu-exact` or `faiss-gpu`."""
        return self._partition.backend

    def search(
        self, queries: np.ndarray, k: int, exclude_image_ids: Sequence[str | None] | None = None
    ) -> list[list[Neighbour]]:
        """Returns each query's k nearest captions, best first, as objects; see `nearest`."""
        return self.nearest(queries, k, exclude_image_ids).to_rows()

    def nearest(self, queries: np.ndarray, k: int, exclude_image_ids: Sequence[str | None] | None = None) -> Neighbours:
        """Returns each query's k nearest captions, best first, ties by id.

        Args:
            queries: [B, dim] float32 unit vectors of the index's encoder.
            k: The number of neighbours per query; fewer come back only when the lists that a query searches hold
                fewer allowed ones.
            exclude_image_ids: For each query, an image whose own captions are left out, or `None`.

        Raises:
            RunError: The queries have the wrong dimension or are not finite, or the exclusions have the wrong length.
            IndexIntegrityError: The index returns ids that it does not have.
        """
        queries = self._check_queries(queries)
        excluded = pa.nulls(len(queries), pa.string())
        if exclude_image_ids is not None:
            excluded = pa.array(exclude_image_ids, pa.string())
        if len(excluded) != len(queries):
            raise RunError(
                "The number of excluded image ids is not the number of queries.",
                expected=str(len(queries)),
                found=str(len(excluded)),
            )
        if k < 1 or not len(queries):
            return Neighbours.none(len(queries))
        k = min(k, self.manifest.id_count)
        scores, ids = self._allowed_candidates(queries, k * self._partition.k_factor, excluded)
        if self._partition.ranks_again:
            scores, ids = best_of(self._partition.rank(queries, ids), ids, k)
        scores, ids = scores[:, :k], ids[:, :k]
        found = ids[ids != NOTHING]
        return Neighbours(ids, scores, self._partition.texts(found), self._partition.sources(found))

    def _check_queries(self, queries: np.ndarray) -> np.ndarray:
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise RunError(
                "The dimension of the queries does not fit the index.",
                expected=f"[B, {self.dim}]",
                found=str(list(queries.shape)),
            )
        if not np.isfinite(queries).all():
            raise RunError(
                "A query vector has a value that is not finite.",
                found=f"rows {np.flatnonzero(~np.isfinite(queries).all(axis=1))[:5].tolist()}",
                remedy="Check the encoder's weights and precision.",
            )
        return np.ascontiguousarray(queries, dtype=np.float32)

    def _allowed_candidates(self, queries: np.ndarray, wanted: int, excluded: pa.StringArray) -> Ranking:
        """Returns each query's first candidates that may be retrieved: [B, wanted].

        The number fetched depends only on the query's own exclusion: an index whose answer depends on that number
        (HNSW) thus gives a query the same answer in every batch.
        """
        total = self.manifest.id_count
        excludes = excluded.is_valid().to_numpy(zero_copy_only=False)
        live = max(1, total - len(self._removed))
        first_fetch = -(-wanted * total // live)
        scores = np.empty((len(queries), wanted), np.float32)
        ids = np.empty((len(queries), wanted), np.int64)
        for group, fetch in (
            (~excludes, first_fetch),
            (excludes, first_fetch + self.manifest.max_captions_per_image),
        ):
            members = np.flatnonzero(group)

            def attempt(rows: np.ndarray, fetch: int, members: np.ndarray = members) -> Attempted:
                near_scores, near_ids = self._partition.candidates(queries[members[rows]], fetch)
                allowed = self._allowed(near_ids, excluded.take(pa.array(members[rows])))
                settled = (allowed.sum(axis=1) >= wanted) | (near_ids[:, -1] == NOTHING) | (fetch == total)
                kept_scores, kept_ids = np.where(allowed, near_scores, -np.inf), np.where(allowed, near_ids, NOTHING)
                return settled, kept_scores[settled], kept_ids[settled]

            scores[members], ids[members] = settle(len(members), wanted, fetch, total, attempt)
        return scores, ids

    def _allowed(self, ids: np.ndarray, excluded: pa.StringArray) -> np.ndarray:
        """Says which of the ids [B, K] exist, are not removed, and are not captions of their query's own image."""
        allowed = ids != NOTHING
        if len(self._removed):
            place = np.minimum(np.searchsorted(self._removed, ids), len(self._removed) - 1)
            allowed &= self._removed[place] != ids
        to_check = allowed & excluded.is_valid().to_numpy(zero_copy_only=False)[:, None]
        rows, columns = np.nonzero(to_check)
        if len(rows):
            images = self._partition.image_ids(ids[rows, columns])
            places = pc.list_parent_indices(images).to_numpy()  # a caption can have several images
            is_own = pc.equal(pc.list_flatten(images), excluded.take(pa.array(rows[places])))
            own = places[is_own.fill_null(False).to_numpy(zero_copy_only=False)]
            allowed[rows[own], columns[own]] = False
        return allowed


class Retriever(NeighbourSearch):
    """The nearest captions in an index whose files all lie on this node; its processes share the mapped pages.

    Use `open`.

    Attributes:
        captions: The index's texts.
    """

    def __init__(self, manifest: IndexManifest, folder: Path) -> None:
        self._local = LocalPartition(manifest, folder)
        super().__init__(manifest, self._local, open_removed(manifest, folder))
        self.captions: CaptionStore = self._local.captions

    @classmethod
    def open(
        cls,
        index_uri: str,
        *,
        encoder: EncoderIdentity | None = None,
        cache_dir: str = storage.DEFAULT_CACHE_DIR,
        index_id: str | None = None,
    ) -> Retriever:
        """Opens a published index: manifest, encoder check, verified local files, memory maps, in this order.

        Args:
            index_uri: The index's folder or prefix.
            encoder: The identity of the encoder that makes the queries; `None` only where nothing is searched.
            cache_dir: Where this node keeps copies of remote indexes and remembers what it has verified.
            index_id: A version other than the current one.

        Raises:
            ManifestError: There is no such index, or this release cannot read it.
            IndexIntegrityError: Another encoder built it, or its files contradict its manifest.
            StorageError: The store or the cache folder fails.
        """
        manifest = load_manifest(index_uri, index_id)
        if encoder is not None:
            manifest.check_encoder(encoder, where=index_uri)
        return cls(manifest, open_version_folder(index_uri, manifest, cache_dir, files_of(manifest)))

    def use_threads(self, threads: int) -> None:
        """Gives searches on the CPU so many threads, whichever thread of this process searches."""
        self._local.threads = threads

    def use_device(self, device: str, search_device: SearchDevice = "auto") -> None:
        """Moves the search to the model's GPU where that is wanted and fits; call it when the model is loaded.

        Args:
            device: The model's device.
            search_device: `auto` takes the model's GPU, or the CPU where the vectors do not fit next to the model;
                `cuda` insists on the GPU.

        Raises:
            ConfigError: `cuda` is asked for, but the model is not on a GPU or the vectors do not fit.
        """
        if search_device != "cpu" and device.startswith("cuda"):
            self._local.use_gpu(device)
        if search_device == "cuda" and self.search_backend == "cpu":
            raise ConfigError(
                "The index cannot be searched on the GPU.",
                where="retrieval.search_device",
                expected="a GPU with room for the index next to the model",
                found=f"the model is on {device}",
                remedy="Give --set retrieval.search_device=auto.",
            )
        _log.info("Searching the index with %s.", self.search_backend)
