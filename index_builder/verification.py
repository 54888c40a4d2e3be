"""Verifies a staged version as a reader would meet it, and measures its recall against exact search.

Every shard is read back from storage, checked against its manifest entries, and searched for a sample of the build's
own vectors. Exact neighbours come from the embeddings by brute force, not from the shard, whose codec may round.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from index_builder.embedding import PART_ROWS, VectorParts
from smallcap import storage
from smallcap.caption_store import open_caption_file
from smallcap.errors import IndexIntegrityError
from smallcap.index_cache import check_file
from smallcap.index_manifest import RecallEntry, ShardEntry
from smallcap.retriever import Ranking, VectorShard, merge_shards

RECALL_AT = (4, 10)
_SAMPLE_QUERIES = 256
_SAMPLE_PARTS = 16  # that queries are drawn from, so that few files are read
_SCORE_TOLERANCE = 1e-5  # of an exact score in float32 against a stored one


@dataclass(frozen=True)
class Sample:
    """Stored vectors used as queries, and their ids."""

    ids: np.ndarray
    queries: np.ndarray  # [Q, dim] float32


@dataclass(frozen=True)
class VerifyTask:
    """One staged shard to verify."""

    version_uri: str
    index_key: str
    vectors_entry: ShardEntry
    captions_entry: ShardEntry
    vectors: VectorParts
    sample: Sample


@dataclass(frozen=True)
class ShardCheck:
    """The sample's neighbours in one shard, found and exact, and the time that finding took."""

    found: Ranking
    exact: Ranking
    search_s: float


def draw_sample(vectors: VectorParts, rows: int) -> Sample:
    """Draws evenly spaced stored vectors from evenly spaced parts."""
    parts = sorted({number * vectors.count // _SAMPLE_PARTS for number in range(_SAMPLE_PARTS)})
    each = _SAMPLE_QUERIES // len(parts)
    ids, queries = [], []
    for part in parts:
        first_id, stop_id = part * PART_ROWS, min((part + 1) * PART_ROWS, rows)
        offsets = np.unique(np.linspace(0, stop_id - first_id - 1, each).astype(np.int64))
        ids.append(first_id + offsets)
        queries.append(next(vectors.read(first_id, stop_id))[offsets])
    return Sample(np.concatenate(ids), np.concatenate(queries))


def verify_shard(task: VerifyTask) -> ShardCheck:
    """Reads one shard back, checks it, and searches the sample in it.

    Raises:
        IndexIntegrityError: What was stored is not what was written.
    """
    k = max(RECALL_AT)
    with storage.scratch_folder() as folder:
        vectors_file, captions_file = folder / "shard", folder / "captions"
        for entry, path in ((task.vectors_entry, vectors_file), (task.captions_entry, captions_file)):
            storage.download(storage.join(task.version_uri, entry.file), path)
            check_file(path, entry)
        open_caption_file(captions_file, task.captions_entry)
        shard = VectorShard(vectors_file, task.vectors_entry, task.index_key, task.vectors.dim)
        shard.search(task.sample.queries, k)  # once unmeasured: maps the pages, starts the threads
        start = time.perf_counter()
        found = shard.search(task.sample.queries, k)
        search_s = time.perf_counter() - start
        return ShardCheck(found, _exact_search(task, k), search_s)


def _exact_search(task: VerifyTask, k: int) -> Ranking:
    """Searches the embeddings of a shard's ids by brute force, a part at a time."""
    first_id = task.vectors_entry.first_id
    best: list[Ranking] = []
    for vectors in task.vectors.read(first_id, first_id + task.vectors_entry.rows):
        scores = task.sample.queries @ vectors.T  # [Q, rows of the part]
        ids = np.broadcast_to(np.arange(first_id, first_id + len(vectors)), scores.shape)
        best = [merge_shards([*best, (scores, ids)], k)]
        first_id += len(vectors)
    return best[0]


def measure_recall(checks: Sequence[ShardCheck], sample: Sample) -> tuple[RecallEntry, ...]:
    """Merges the shards' answers and compares them with exact search.

    A neighbour also counts as right when its score equals the last exact one's: equal vectors have no order.

    Raises:
        IndexIntegrityError: A stored vector is not among its own nearest neighbours.
    """
    search_s = sum(check.search_s for check in checks)
    entries = []
    for k in RECALL_AT:
        scores, ids = merge_shards([check.found for check in checks], k)
        exact_scores, exact_ids = merge_shards([check.exact for check in checks], k)
        _check_self(scores, ids, sample)
        right = (ids[:, :, None] == exact_ids[:, None, :]).any(axis=2) | (
            scores >= exact_scores[:, -1:] - _SCORE_TOLERANCE
        )
        entries.append(
            RecallEntry(k=k, recall=float(right.mean()), queries=len(ids), queries_per_s=round(len(ids) / search_s, 1))
        )
    return tuple(entries)


def _check_self(scores: np.ndarray, ids: np.ndarray, sample: Sample) -> None:
    own_scores = (sample.queries.astype(np.float64) ** 2).sum(axis=1)
    lost = ~(ids == sample.ids[:, None]).any(axis=1) & (scores[:, -1] < own_scores - _SCORE_TOLERANCE)
    if lost.any():
        raise IndexIntegrityError(
            "A stored vector does not find itself.",
            where=f"caption {sample.ids[lost][0]}",
            expected=f"itself, with score {own_scores[lost][0]:.6f}",
            found=f"{lost.sum()} of {len(ids)} vectors lost",
            remedy="This is a defect of the build; run it again and report it.",
        )
