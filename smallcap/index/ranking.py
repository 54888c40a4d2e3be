"""Scores vectors exactly by their inner product with queries, and orders and merges rankings of them.

Every ranking is ordered by (score descending, id ascending). This module knows nothing of faiss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Ranking = tuple[np.ndarray, np.ndarray]
"""Scores [B, k] float32, best first, and ids [B, k] int64; an empty place is (-inf, -1)."""

NOTHING = -1  # the id of an empty place
_VALUES_AT_ONCE = 4 << 20  # float64 values of gathered vectors; bounds the memory of exact scoring
_PLACES_AT_ONCE = 8 << 20  # candidates of all queries together; bounds the memory of a search that must fetch many
_GROWTH = 4  # how many times more is fetched for queries that are not settled

Attempted = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Which of b queries are settled [b], and the scores and ids [settled, n] of these queries."""
Attempt = Callable[[np.ndarray, int], Attempted]
"""Takes rows of the queries [b] and a number of candidates to fetch for each."""


def best_of(scores: np.ndarray, ids: np.ndarray, k: int) -> Ranking:
    """Returns the k best columns of each row by (score descending, id ascending)."""
    order = np.lexsort((ids, -scores), axis=-1)[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)


def merge_rankings(rankings: Sequence[Ranking], k: int) -> Ranking:
    """Merges rankings of the same queries over disjoint ids into their k best."""
    merged = rankings[0]
    for scores, ids in rankings[1:]:  # two at a time: k may be large, and the rankings many
        merged = best_of(np.concatenate([merged[0], scores], axis=1), np.concatenate([merged[1], ids], axis=1), k)
    return best_of(*merged, k)


def settle(queries: int, wanted: int, fetch: int, total: int, attempt: Attempt) -> Ranking:
    """Fetches more and more candidates until each query's best ones are certain.

    Args:
        queries: The number of queries.
        wanted: The number of candidates that each query wants.
        fetch: The number of candidates to fetch at first.
        total: The number of all candidates; an attempt that fetches them all must settle every query.
        attempt: Fetches candidates for some of the queries.

    Returns:
        A ranking [queries, wanted].
    """
    scores = np.full((queries, wanted), -np.inf, np.float32)
    ids = np.full((queries, wanted), NOTHING, np.int64)
    pending = np.arange(queries if wanted else 0)
    while pending.size:
        fetch = min(fetch, total)
        unsettled = []
        batch_queries = max(1, _PLACES_AT_ONCE // fetch)
        for start in range(0, len(pending), batch_queries):
            rows = pending[start : start + batch_queries]
            settled, fetched_scores, fetched_ids = attempt(rows, fetch)
            best_scores, best_ids = best_of(fetched_scores, fetched_ids, wanted)
            scores[rows[settled], : best_ids.shape[1]] = best_scores
            ids[rows[settled], : best_ids.shape[1]] = best_ids
            unsettled.append(rows[~settled])
        pending = np.concatenate(unsettled)
        assert not (pending.size and fetch == total)
        fetch *= _GROWTH
    return scores, ids


def padded(scores: np.ndarray, ids: np.ndarray, k: int) -> Ranking:
    """Returns a ranking of exactly k columns: the first ones, then empty places."""
    missing = ((0, 0), (0, max(0, k - ids.shape[1])))
    return (
        np.pad(scores[:, :k], missing, constant_values=-np.inf),
        np.pad(ids[:, :k], missing, constant_values=NOTHING),
    )


def exact_scores(queries: np.ndarray, rows: np.ndarray, vectors_of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Computes inner products in float64 and rounds them to float32; a pair scores the same in every batch.

    Args:
        queries: [B, dim] float32.
        rows: [B, K] rows of the vectors to score for each query; `NOTHING` scores -inf.
        vectors_of: A function from n rows to their vectors [n, dim].

    Returns:
        [B, K] float32.
    """
    scores = np.full(rows.shape, -np.inf, np.float32)
    query_numbers, columns = np.nonzero(rows != NOTHING)
    batch_pairs = max(1, _VALUES_AT_ONCE // queries.shape[1])
    for start in range(0, len(query_numbers), batch_pairs):
        query, column = query_numbers[start : start + batch_pairs], columns[start : start + batch_pairs]
        products = vectors_of(rows[query, column]).astype(np.float64)  # [n, dim]
        products *= queries[query]
        scores[query, column] = products.sum(axis=1)
    return scores
