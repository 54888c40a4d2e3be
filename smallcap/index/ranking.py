"""Rankings of vectors by their inner product with queries: how they are scored exactly, ordered and merged.

A ranking's order is (score descending, id ascending), whatever it was made from. This module knows nothing of faiss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Ranking = tuple[np.ndarray, np.ndarray]
"""scores [B, k] float32, best first, and ids [B, k] int64; a place that nothing fills is (-inf, -1)."""

NOTHING = -1  # stands for an id where there is none
_VALUES_AT_ONCE = 4 << 20  # float64 values of gathered vectors; bounds the memory of exact scoring
_PLACES_AT_ONCE = 8 << 20  # candidates of all queries together; bounds the memory of a search that must fetch many
_GROWTH = 4  # of what is fetched, for queries that it was not enough for

Attempted = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Which of b queries are settled [b], and the scores and ids [settled, n] of those."""
Attempt = Callable[[np.ndarray, int], Attempted]
"""Fetches so many candidates for some rows of the queries [b]."""


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
        queries: How many there are.
        wanted: Candidates of each.
        fetch: How many to fetch at first.
        total: How many there are to fetch; an attempt that does is to settle everything.
        attempt: Fetches for some of the queries.

    Returns:
        [queries, wanted].
    """
    scores = np.full((queries, wanted), -np.inf, np.float32)
    ids = np.full((queries, wanted), NOTHING, np.int64)
    pending = np.arange(queries if wanted else 0)
    while pending.size:
        fetch = min(fetch, total)
        left = []
        at_once = max(1, _PLACES_AT_ONCE // fetch)
        for start in range(0, len(pending), at_once):
            rows = pending[start : start + at_once]
            settled, found_scores, found_ids = attempt(rows, fetch)
            best_scores, best_ids = best_of(found_scores, found_ids, wanted)
            scores[rows[settled], : best_ids.shape[1]] = best_scores
            ids[rows[settled], : best_ids.shape[1]] = best_ids
            left.append(rows[~settled])
        pending = np.concatenate(left)
        assert not (pending.size and fetch == total)
        fetch *= _GROWTH
    return scores, ids


def padded(scores: np.ndarray, ids: np.ndarray, k: int) -> Ranking:
    """Returns a ranking of exactly k columns: the first ones, then places that nothing fills."""
    missing = ((0, 0), (0, max(0, k - ids.shape[1])))
    return (
        np.pad(scores[:, :k], missing, constant_values=-np.inf),
        np.pad(ids[:, :k], missing, constant_values=NOTHING),
    )


def exact_scores(queries: np.ndarray, rows: np.ndarray, vectors_of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Computes inner products in float64 and rounds them to float32: the same for a pair in every batch.

    Args:
        queries: [B, dim] float32.
        rows: [B, K] rows of the vectors that each query meets; `NOTHING` scores -inf.
        vectors_of: Returns the vectors [n, dim] of n rows.

    Returns:
        [B, K] float32.
    """
    scores = np.full(rows.shape, -np.inf, np.float32)
    query_of, column_of = np.nonzero(rows != NOTHING)
    at_once = max(1, _VALUES_AT_ONCE // queries.shape[1])
    for start in range(0, len(query_of), at_once):
        query, column = query_of[start : start + at_once], column_of[start : start + at_once]
        products = vectors_of(rows[query, column]).astype(np.float64)  # [n, dim]
        products *= queries[query]
        scores[query, column] = products.sum(axis=1)
    return scores
