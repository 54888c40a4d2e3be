"""Exact nearest captions of query vectors over a published index; never imports Ray.

Scores are inner products of unit vectors. They are recomputed in float64 for the candidates that faiss returns, and
ties are ordered by id, so that a result depends neither on the number of shards nor on the other queries of the batch
(BLAS rounds by the shape of its operands).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from smallcap.caption_store import CaptionStore
from smallcap.errors import IndexIntegrityError, ManifestError, RunError
from smallcap.index_cache import DEFAULT_CACHE_DIR, open_version_folder
from smallcap.index_manifest import EncoderIdentity, IndexManifest, ShardEntry, load_manifest

__all__ = ["Neighbour", "Ranking", "Retriever", "VectorShard", "merge_shards"]

# What the file of a readable key starts with. Checked before faiss reads on, because an index with on-disk lists
# ("ilod") would make it open a path of the writer's choice.
_FOURCC = {"Flat": b"IxFI"}

_SCORE_TOLERANCE = 2e-6  # most that BLAS in fp32 errs on unit vectors, with room; 9e-8 was seen at d=512
_CANDIDATE_MARGIN = 4  # fetched beyond k, so that near ties at the cut are ranked by their exact scores
_RANKED_AT_ONCE = 64  # queries; bounds the gathered candidate vectors

Ranking = tuple[np.ndarray, np.ndarray]
"""scores [B, k] float32, best first, and ids [B, k] int64."""


@dataclass(frozen=True)
class Neighbour:
    """A caption near a query; `score` is the cosine."""

    caption_id: int
    text: str
    score: float


class VectorShard:
    """One memory-mapped Flat shard.

    Args:
        file: Local path; its sha256 has been checked.
        entry: Its manifest entry.
        index_key: The manifest's key.
        dim: The manifest's dimension.

    Raises:
        ManifestError: This release cannot read the key.
        IndexIntegrityError: The file's type, dimension, metric or row count contradict the manifest.
    """

    def __init__(self, file: Path, entry: ShardEntry, index_key: str, dim: int) -> None:
        check_faiss()
        self.entry = entry
        self._index = _read_shard(file, index_key)
        found = (self._index.d, self._index.metric_type, self._index.ntotal)
        expected = (dim, faiss.METRIC_INNER_PRODUCT, entry.rows)
        if found != expected:
            raise IndexIntegrityError(
                "A shard's dimension, metric or number of vectors is not what the manifest says.",
                where=str(file),
                expected=str(expected),
                found=str(found),
            )
        # A view of the mapped pages, valid as long as self._index lives.
        self.vectors: np.ndarray = faiss.rev_swig_ptr(self._index.get_xb(), entry.rows * dim).reshape(entry.rows, dim)

    def search(self, queries: np.ndarray, k: int) -> Ranking:
        """Returns each query's min(k, rows) best vectors; queries: [B, dim] float32."""
        wanted = min(k, self.entry.rows)
        scores = np.empty((len(queries), wanted), np.float32)
        ids = np.empty((len(queries), wanted), np.int64)
        pending = np.arange(len(queries))
        fetch = min(self.entry.rows, wanted + _CANDIDATE_MARGIN)
        while pending.size:
            near, rows = self._index.search(queries[pending], fetch)
            self._check_rows(rows)
            settled = near[:, wanted - 1] - near[:, -1] > 2 * _SCORE_TOLERANCE
            if fetch == self.entry.rows:
                settled[:] = True
            done = pending[settled]
            scores[done], ids[done] = self._rank(queries[done], rows[settled], wanted)
            pending = pending[~settled]
            fetch = min(self.entry.rows, 4 * fetch)
        return scores, ids

    def _rank(self, queries: np.ndarray, rows: np.ndarray, wanted: int) -> Ranking:
        exact = np.empty(rows.shape, np.float32)
        for start in range(0, len(queries), _RANKED_AT_ONCE):
            part = slice(start, start + _RANKED_AT_ONCE)
            candidates = self.vectors[rows[part]].astype(np.float64)  # [b, fetch, dim]
            exact[part] = (candidates * queries[part, None, :]).sum(axis=-1)
        return _best(exact, rows + self.entry.first_id, wanted)

    def _check_rows(self, rows: np.ndarray) -> None:
        if rows.size and not (rows.min() >= 0 and rows.max() < self.entry.rows):
            raise IndexIntegrityError(
                "A search returned an id outside its shard.",
                where=self.entry.file,
                expected=f"0 to {self.entry.rows - 1}",
                found=f"{rows.min()} to {rows.max()}",
                remedy="Restore the index from where it was published, or rebuild it.",
            )


class Retriever:
    """The nearest captions of image or text embeddings in one version of a published index.

    Use `open`. All files are memory-mapped; the processes of a node share their pages.
    """

    def __init__(self, manifest: IndexManifest, folder: Path) -> None:
        self.manifest = manifest
        self.index_id = manifest.index_id
        self.dim = manifest.dim
        _check_ids(manifest)
        self._shards = [
            VectorShard(folder / entry.file, entry, manifest.index_key, manifest.dim) for entry in manifest.shards
        ]
        self.captions = CaptionStore([folder / entry.file for entry in manifest.captions], manifest.captions)

    @classmethod
    def open(
        cls,
        index_uri: str,
        *,
        encoder: EncoderIdentity | None = None,
        cache_dir: str = DEFAULT_CACHE_DIR,
        index_id: str | None = None,
    ) -> Retriever:
        """Opens a published index: manifest, encoder check, verified local files, memory maps, in this order.

        Args:
            index_uri: The index's folder or prefix.
            encoder: Identity of the encoder that makes the queries; `None` only where nothing is searched.
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
        return cls(manifest, open_version_folder(index_uri, manifest, cache_dir))

    def search(
        self, queries: np.ndarray, k: int, exclude_image_ids: Sequence[str | None] | None = None
    ) -> list[list[Neighbour]]:
        """Returns each query's k nearest captions, best first, ties by id.

        Args:
            queries: [B, dim] float32 unit vectors of the index's encoder.
            k: Neighbours of each; fewer come back only when the index holds fewer that are allowed.
            exclude_image_ids: For each query an image whose own captions are left out, or `None`.

        Raises:
            RunError: The queries have another dimension, are not finite, or the exclusions another length.
            IndexIntegrityError: The index returns ids that it does not have.
        """
        queries = self._check_queries(queries)
        excluded = [None] * len(queries) if exclude_image_ids is None else list(exclude_image_ids)
        if len(excluded) != len(queries):
            raise RunError(
                "There must be one excluded image id, or None, for each query.",
                expected=str(len(queries)),
                found=str(len(excluded)),
            )
        if k < 1 or not len(queries):
            return [[] for _ in excluded]
        own = self.manifest.max_captions_per_image if any(image is not None for image in excluded) else 0
        scores, ids = merge_shards([shard.search(queries, k + own) for shard in self._shards], k + own)
        allowed = self._allowed(ids, excluded)
        return self._neighbours(scores, ids, allowed, k)

    def _check_queries(self, queries: np.ndarray) -> np.ndarray:
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise RunError("Queries do not fit the index.", expected=f"[B, {self.dim}]", found=str(list(queries.shape)))
        if not np.isfinite(queries).all():
            raise RunError(
                "A query vector has a value that is not finite.",
                found=f"rows {np.flatnonzero(~np.isfinite(queries).all(axis=1))[:5].tolist()}",
                remedy="Check the encoder's weights and precision.",
            )
        return np.ascontiguousarray(queries, dtype=np.float32)

    def _allowed(self, ids: np.ndarray, excluded: Sequence[str | None]) -> np.ndarray:
        """Says which of the ids [B, K] are not captions of their query's own image."""
        allowed = np.ones(ids.shape, bool)
        for row in [row for row, image in enumerate(excluded) if image is not None]:
            images = self.captions.image_ids(ids[row])
            allowed[row] = [excluded[row] not in own for own in images]
        return allowed

    def _neighbours(self, scores: np.ndarray, ids: np.ndarray, allowed: np.ndarray, k: int) -> list[list[Neighbour]]:
        keep = allowed & (allowed.cumsum(axis=1) <= k)
        texts = iter(self.captions.texts(ids[keep]))  # in row order, as the loop below
        return [
            [
                Neighbour(int(caption_id), next(texts), float(score))
                for caption_id, score in zip(ids[row][keep[row]], scores[row][keep[row]], strict=True)
            ]
            for row in range(len(ids))
        ]


def merge_shards(rankings: Sequence[Ranking], k: int) -> Ranking:
    """Merges the shards' rankings of the same queries into the k best by (score descending, id ascending)."""
    scores = np.concatenate([scores for scores, _ in rankings], axis=1)
    ids = np.concatenate([ids for _, ids in rankings], axis=1)
    return _best(scores, ids, k)


def _best(scores: np.ndarray, ids: np.ndarray, k: int) -> Ranking:
    order = np.lexsort((ids, -scores), axis=-1)[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)


def check_faiss() -> None:
    """Checks that one working faiss is installed, and chooses BLAS for batches of every size.

    Raises:
        RunError: faiss lacks what it must have; typically two of its packages overwrote each other.
    """
    missing = [
        name for name in ("IO_FLAG_MMAP_IFC", "read_index", "IndexFlatIP", "rev_swig_ptr") if not hasattr(faiss, name)
    ]
    if missing:
        raise RunError(
            "The installed faiss is broken or too old.",
            where=str(getattr(faiss, "__file__", None)),
            found=f"no {', '.join(missing)}",
            remedy="Uninstall every faiss package, then install exactly one of faiss-gpu and faiss-cpu, 1.15 or newer.",
        )
    # By default BLAS is used from nq·d = 128000 on, which makes usual batches 10-20 times slower on few threads.
    faiss.cvar.distance_compute_blas_threshold = 1


def _read_shard(file: Path, index_key: str) -> Any:
    if index_key not in _FOURCC:
        raise ManifestError(
            "This release cannot read the index's key.",
            where=str(file),
            expected=", ".join(_FOURCC),
            found=index_key,
            remedy="Upgrade smallcap, or rebuild the index.",
        )
    with file.open("rb") as opened:
        fourcc = opened.read(4)
    if fourcc != _FOURCC[index_key]:
        raise IndexIntegrityError(
            "A shard is of another kind than the manifest's key.",
            where=str(file),
            expected=f"{index_key} ({_FOURCC[index_key]!r})",
            found=repr(fourcc),
        )
    try:
        return faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise IndexIntegrityError("faiss cannot read a shard.", where=str(file), found=str(error)) from error


def _check_ids(manifest: IndexManifest) -> None:
    """Checks that vectors and captions both cover the ids 0 to ntotal - 1 without gap or overlap."""
    for name, shards in (("shards", manifest.shards), ("captions", manifest.captions)):
        first_id = 0
        for entry in shards:
            if entry.first_id != first_id or not entry.rows:
                raise ManifestError(
                    f"The manifest's {name} do not cover contiguous ids.",
                    where=entry.file,
                    expected=f"rows from id {first_id}",
                    found=f"{entry.rows} rows from id {entry.first_id}",
                )
            first_id += entry.rows
        if first_id != manifest.ntotal:
            raise ManifestError(
                "The manifest has not one caption for each vector.",
                expected=f"{manifest.ntotal} captions",
                found=str(first_id),
            )
