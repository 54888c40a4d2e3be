"""Reads a new version back as its readers will, and measures recall.

Exact neighbours come from the embeddings by brute force, not from the index, whose codec may round and whose lists may
hide them. The queries are images, since the index is for them. Their embeddings lie far from all texts, so that they
need several times the lists that caption-like queries need. Recall measured with captions would therefore flatter, as
would an imitated image that finds the caption it was made from.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import sqrt

import numpy as np

from index_builder.embedding.slices import VectorSlices
from index_builder.stored import StoredIndex
from smallcap.errors import IndexIntegrityError
from smallcap.index.manifest import RecallEntry
from smallcap.index.ranking import NOTHING, Ranking, best_of, merge_rankings, padded
from smallcap.index.vector_shard import VectorShard

RECALL_AT = (4, 10)
IMAGE_QUERIES = "images"
GAP_QUERIES = "captions with a modality gap"
GAP_COSINE = 0.3  # between an image and a text that describes it, as CLIP embeds them
CEILING_QUERIES = 256
_Z = 1.6449  # for the one-sided 95% interval
_SEED = 20
_SCORE_TOLERANCE = 1e-5  # between an exact score in float32 and a stored one
_NORM_TOLERANCE = 1e-2  # of a vector's score with itself, after float16
_ROWS_AT_ONCE = 16_384
_OVER_FETCH = 4  # times the candidates, where captions have been removed


@dataclass(frozen=True)
class Embeddings:
    """Where a shard's exact vectors are: in `vectors` from `first_row` on; where that is None, in the shard's files."""

    vectors: VectorSlices | None
    first_row: int = 0


@dataclass(frozen=True)
class CheckTask:
    """A shard of a draft version to read back.

    Attributes:
        index: The draft.
        shard: The shard's number.
        rows: The shard's rows that queries are made from, sorted.
        embeddings: The vectors that it was filled with; a shard of an earlier version has them in its files.
    """

    index: StoredIndex
    shard: int
    rows: np.ndarray
    embeddings: Embeddings


def check_shard(task: CheckTask) -> np.ndarray:
    """Reads one shard back and checks it; returns the vectors of the rows asked for, [Q, dim] float32.

    Raises:
        IndexIntegrityError: A file does not hold what was written.
    """
    task.index.captions(task.shard)
    shard = task.index.vectors(task.shard)
    rows = task.rows
    source = task.embeddings
    if source.vectors is not None:
        vectors = source.vectors.take(source.first_row + rows)
        scores = shard.rank(vectors, (shard.entry.first_id + rows)[:, None])[:, 0]
        wrong = np.flatnonzero(~(np.abs(scores - (vectors**2).sum(axis=1)) < _NORM_TOLERANCE))
        if wrong.size:
            raise IndexIntegrityError(
                "A shard does not hold the vector that was written.",
                where=f"{task.index.uri}: caption {shard.entry.first_id + rows[wrong[0]]}",
                expected="score 1 with itself",
                found=f"score {scores[wrong[0]]:.6f}, and {wrong.size - 1} others of {len(rows)}",
                remedy="This is a defect of the build. Report it, and run the build again.",
            )
        return vectors
    pieces = [np.zeros((0, shard.dim), np.float32)]
    for start, vectors in _stored_blocks(shard):
        pieces.append(vectors[rows[(rows >= start) & (rows < start + len(vectors))] - start])
    return np.concatenate(pieces)


def imitate_images(vectors: np.ndarray) -> np.ndarray:
    """Moves caption embeddings as far from the captions as images are: to cosine 0.3, in a random direction.

    Args:
        vectors: [Q, dim] float32 unit vectors.

    Returns:
        [Q, dim] float32 unit vectors; the same input always gives the same vectors.
    """
    noise = np.random.default_rng(_SEED).standard_normal(vectors.shape).astype(np.float32)
    noise -= (noise * vectors).sum(axis=1, keepdims=True) * vectors
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    return GAP_COSINE * vectors + np.float32(sqrt(1 - GAP_COSINE**2)) * noise


@dataclass(frozen=True)
class SearchTask:
    """A shard of a draft version to search.

    Attributes:
        index: The draft, with the k_factor to search with.
        shard: The shard's number.
        queries: [Q, dim] float32.
        origin_ids: [Q] ids of the captions that queries were made from, or -1; a query does not find its origin.
        nprobes: Numbers of lists to search; (None,) where there are no lists.
        embeddings: Where the vectors for exact search are.
        with_exact: Whether to search exactly as well.
    """

    index: StoredIndex
    shard: int
    queries: np.ndarray
    origin_ids: np.ndarray
    nprobes: tuple[int | None, ...]
    embeddings: Embeddings
    with_exact: bool = True


@dataclass(frozen=True)
class Candidates:
    """One shard's answer at one nprobe."""

    approximate: Ranking
    exact_scores: np.ndarray | None  # [Q, n] of the same candidates; None where the approximate scores are exact
    search_s: float


@dataclass(frozen=True)
class ShardAnswer:
    """One shard's answers, in the order of the task's nprobes, and its exact neighbours."""

    found: tuple[Candidates, ...]
    exact: Ranking | None


def search_shard(task: SearchTask) -> ShardAnswer:
    """Searches one shard at every nprobe, and exactly.

    Raises:
        IndexIntegrityError: The shard's files are damaged.
    """
    removed = task.index.removed_ids()
    manifest = task.index.manifest
    count = manifest.k_factor * max(RECALL_AT) + 1  # one candidate may be the query's origin
    shard = task.index.vectors(task.shard)
    fetch = min(shard.entry.rows, count * (_OVER_FETCH if removed.size else 1))
    found = []
    for nprobe in task.nprobes:
        shard.candidates(task.queries[:1], fetch, nprobe)  # not measured: this maps the pages and starts the threads
        start = time.perf_counter()
        approximate = shard.candidates(task.queries, fetch, nprobe)
        scores = shard.rank(task.queries, approximate[1]) if manifest.k_factor > 1 else None
        search_s = time.perf_counter() - start
        found.append(_allowed(task.origin_ids, removed, Candidates(approximate, scores, search_s)))
    exact = _search_exactly(task, shard, removed) if task.with_exact else None
    return ShardAnswer(tuple(found), exact)


def _allowed(origin_ids: np.ndarray, removed: np.ndarray, candidates: Candidates) -> Candidates:
    """Takes removed captions and the queries' origins out of the running."""
    scores, ids = candidates.approximate
    left_out = np.isin(ids, removed) | (ids == origin_ids[:, None])
    return replace(candidates, approximate=(np.where(left_out, -np.inf, scores), ids))


def _search_exactly(task: SearchTask, shard: VectorShard, removed: np.ndarray) -> Ranking:
    """Searches a shard's embeddings by brute force, a block of rows at a time."""
    k = max(RECALL_AT)
    best: Ranking | None = None
    first_id = shard.entry.first_id
    for vectors in _embeddings(task, shard):
        scores = task.queries @ vectors.T  # [Q, rows]
        ids = np.arange(first_id, first_id + len(vectors))
        scores[:, np.isin(ids, removed)] = -np.inf
        with_origin = np.flatnonzero((task.origin_ids >= first_id) & (task.origin_ids < first_id + len(vectors)))
        scores[with_origin, task.origin_ids[with_origin] - first_id] = -np.inf
        found = _best_columns(scores, ids, k) if best is None else _better_columns(scores, ids, best[0][:, -1])
        best = merge_rankings([found] if best is None else [best, found], k)
        if best[0].shape[1] < k:  # the first block is small: its worst score does not bound the others
            best = padded(*best, k)
        first_id += len(vectors)
    assert best is not None  # no shard is empty
    return best[0][:, : shard.entry.rows], best[1][:, : shard.entry.rows]


def _best_columns(scores: np.ndarray, ids: np.ndarray, k: int) -> Ranking:
    """Returns each query's k best scores and their ids, unordered; scores: [Q, rows], ids: [rows]."""
    if len(ids) <= k:
        return scores, np.broadcast_to(ids, scores.shape)
    top = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    return np.take_along_axis(scores, top, axis=1), ids[top]


def _better_columns(scores: np.ndarray, ids: np.ndarray, bounds: np.ndarray) -> Ranking:
    """Returns each query's scores above its bound and their ids; after the first blocks there are few."""
    queries, columns = np.nonzero(scores > bounds[:, None])
    counts = np.bincount(queries, minlength=len(scores))
    places = np.arange(len(queries)) - np.repeat(np.cumsum(counts) - counts, counts)
    shape = (len(scores), int(counts.max(initial=0)))
    found = np.full(shape, -np.inf, np.float32), np.full(shape, NOTHING, np.int64)
    found[0][queries, places], found[1][queries, places] = scores[queries, columns], ids[columns]
    return found


def _embeddings(task: SearchTask, shard: VectorShard) -> Iterator[np.ndarray]:
    source = task.embeddings
    if source.vectors is not None:
        yield from source.vectors.read(source.first_row, source.first_row + shard.entry.rows)
    else:
        yield from (vectors for _, vectors in _stored_blocks(shard))


def _stored_blocks(shard: VectorShard) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (first row, vectors as float32) of a shard in order."""
    for start in range(0, shard.entry.rows, _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, shard.entry.rows)
        yield start, shard.stored_vectors(start, stop).astype(np.float32)


@dataclass(frozen=True)
class Measured:
    """Agreement with exact search at one setting."""

    nprobe: int | None
    k_factor: int
    recall: dict[int, np.ndarray]  # by k; [Q], each query's recall
    queries_per_s: float


def measure(
    answers: Sequence[ShardAnswer], exact: Ranking, setting: int, nprobe: int | None, k_factor: int
) -> Measured:
    """Merges the shards' answers at one setting as a reader does, and compares them with the exact neighbours.

    A neighbour counts as right even when only its score equals that of the last exact one: equal vectors have no order.

    Args:
        answers: The answers of all shards.
        exact: Exact neighbours over all shards, at least max(RECALL_AT).
        setting: Position of the nprobe in each answer.
        nprobe: The number of lists searched.
        k_factor: How many candidates per neighbour are ranked again.
    """
    found = [answer.found[setting] for answer in answers]
    recall = {}
    for k in RECALL_AT:
        scores, ids = _top(found, k, k_factor)
        last = np.take_along_axis(exact[0], np.full((len(exact[0]), 1), min(k, exact[0].shape[1]) - 1), axis=1)
        right = (ids[:, :, None] == exact[1][:, None, :k]).any(axis=2) | (scores >= last - _SCORE_TOLERANCE)
        neighbours = np.isfinite(exact[0][:, :k]).sum(axis=1)  # fewer than k where there are fewer captions
        hits = (right & np.isfinite(scores)).sum(axis=1)
        recall[k] = np.where(neighbours, hits / np.maximum(neighbours, 1), 1.0)  # nothing to find: nothing is missed
    search_s = sum(candidates.search_s for candidates in found)
    return Measured(nprobe, k_factor, recall, len(exact[0]) / search_s)


def _top(found: Sequence[Candidates], k: int, k_factor: int) -> Ranking:
    """Returns the k best over all shards: the k_factor·k best approximate ones, ranked by their exact scores."""
    scores = np.concatenate([candidates.approximate[0] for candidates in found], axis=1)
    ids = np.concatenate([candidates.approximate[1] for candidates in found], axis=1)
    order = np.lexsort((ids, -scores), axis=-1)[:, : k * k_factor]
    scores, ids = np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)
    if k_factor > 1:
        exact = np.concatenate([candidates.exact_scores for candidates in found], axis=1)
        scores = np.where(np.isfinite(scores), np.take_along_axis(exact, order, axis=1), -np.inf)
    return best_of(scores, ids, k)


def lower_bound(recalls: np.ndarray) -> float:
    """Returns the lower end of the one-sided 95% Wilson interval of a mean recall.

    Args:
        recalls: [Q], each query's recall. Queries are the sample: the neighbours of one query are not independent.
    """
    n, mean = len(recalls), float(recalls.mean())
    centre = mean + _Z**2 / (2 * n)
    spread = _Z * sqrt(mean * (1 - mean) / n + _Z**2 / (4 * n**2))
    return (centre - spread) / (1 + _Z**2 / n)


def recall_entries(measured: Measured, ceiling: Measured | None, held_out: slice) -> tuple[RecallEntry, ...]:
    """Returns the manifest's entries: recall@4 and @10 on the held-out queries."""
    return tuple(
        RecallEntry(
            k=k,
            recall=float(measured.recall[k][held_out].mean()),
            recall_low=lower_bound(measured.recall[k][held_out]),
            ceiling=None if ceiling is None else float(ceiling.recall[k].mean()),
            queries=len(measured.recall[k][held_out]),
            queries_per_s=round(measured.queries_per_s, 1),
            nprobe=measured.nprobe,
        )
        for k in RECALL_AT
    )


def nprobe_ladder(nlist: int | None) -> tuple[int | None, ...]:
    """Returns the numbers of lists to try, rising by powers of two; (None,) where there are no lists."""
    if nlist is None:
        return (None,)
    powers = [1 << power for power in range(nlist.bit_length()) if 1 << power < nlist]
    return (*powers, nlist)
