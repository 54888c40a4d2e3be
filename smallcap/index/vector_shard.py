"""One memory-mapped shard of vectors: its candidates for a query, and its vectors.

An answer depends only on the query and the shard, not on the batch. Where faiss rounds by the shape of its operands
(BLAS), the scores are computed again in float64: those of the vectors of a Flat shard, and those of the centroids by
which an inverted file chooses its lists. The lists are chosen once for all shards, which are copies of one trained
template.

Two kinds of index are exceptions, by faiss's design. HNSW searches a graph, and each shard has its own. RaBitQ of
several bits stops refining a code once it looks hopeless, so that its scores depend on how many candidates are fetched.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from smallcap.errors import IndexIntegrityError
from smallcap.index.faiss_index import check_faiss, inverted_file_of, is_flat, is_lossy, read_index, transforms_of
from smallcap.index.manifest import ShardEntry
from smallcap.index.ranking import NOTHING, Attempted, Ranking, best_of, exact_scores, padded, settle

_SCORE_TOLERANCE = 2e-6  # bound on the error of BLAS in fp32 on unit vectors; 9e-8 was seen at d=512
_CANDIDATE_MARGIN = 4  # fetched beyond those wanted, so that near ties at the cut are ranked by their exact scores


@dataclass(frozen=True)
class Assignment:
    """The lists of the inverted files that B queries search."""

    queries: np.ndarray  # [B, d'] float32, after the index's transforms
    lists: np.ndarray  # [B, nprobe] int64, best first
    scores: np.ndarray  # [B, nprobe] float32, scores of the lists' centroids

    def take(self, rows: np.ndarray) -> Assignment:
        """Returns the assignment of some rows of the queries."""
        return Assignment(self.queries[rows], self.lists[rows], self.scores[rows])


class ExactFlat:
    """Exact search of a Flat index: BLAS proposes in float32, and float64 decides.

    Args:
        index: The index; it must outlive this object, which reads its memory.
        where: The index's file, for messages.
    """

    def __init__(self, index: Any, where: str) -> None:
        self._index, self._where = index, where
        rows, dim = index.ntotal, index.d
        self.vectors: np.ndarray = faiss.rev_swig_ptr(index.get_xb(), rows * dim).reshape(rows, dim)

    def search(self, queries: np.ndarray, k: int) -> Ranking:
        """Returns each query's min(k, ntotal) best rows."""
        total = len(self.vectors)
        wanted = min(k, total)

        def attempt(rows: np.ndarray, fetch: int) -> Attempted:
            near_scores, near_rows = self._index.search(queries[rows], fetch)
            _check_bounds(near_rows, 0, total, self._where)
            settled = near_scores[:, wanted - 1] - near_scores[:, -1] > 2 * _SCORE_TOLERANCE
            settled |= fetch == total
            near_rows = near_rows[settled]
            return settled, exact_scores(queries[rows[settled]], near_rows, self.vectors.__getitem__), near_rows

        return settle(len(queries), wanted, wanted + _CANDIDATE_MARGIN, total, attempt)


class CoarseQuantizer:
    """Chooses the lists that queries search; the same for every shard of an index.

    Args:
        index: An index with an inverted file: a shard or the template. It must outlive this object.
        where: The index's file, for messages.
    """

    def __init__(self, index: Any, where: str = "") -> None:
        self._transforms = transforms_of(index)
        self._inverted_file = inverted_file_of(index)
        assert self._inverted_file is not None
        self._quantizer = faiss.downcast_index(self._inverted_file.quantizer)
        self._flat = ExactFlat(self._quantizer, where) if is_flat(self._quantizer) else None

    def assign(self, queries: np.ndarray, nprobe: int | None) -> Assignment:
        """Chooses each query's nprobe best lists by (centroid's score, list number).

        Args:
            queries: [B, dim] float32.
            nprobe: The number of lists per query; None takes the index's own.
        """
        assert self._inverted_file is not None
        for transform in self._transforms:  # one by one, because BLAS rounds by the number of rows
            rows = [transform.apply(query[None]) for query in queries]
            queries = np.concatenate([np.empty((0, transform.d_out), np.float32), *rows])
        nprobe = min(nprobe or self._inverted_file.nprobe, self._inverted_file.nlist)
        if self._flat is not None:
            scores, lists = self._flat.search(queries, nprobe)
        else:  # a graph search takes the queries one by one
            scores, lists = best_of(*self._quantizer.search(queries, nprobe), nprobe)
        return Assignment(queries, lists, scores)


def assign(index: Any, queries: np.ndarray, nprobe: int | None) -> Assignment | None:
    """Chooses the lists that queries search in every copy of an index; None where it has no inverted file."""
    return CoarseQuantizer(index).assign(queries, nprobe) if inverted_file_of(index) is not None else None


class VectorShard:
    """One memory-mapped shard.

    Args:
        file: The local path of the shard; its sha256 has been checked.
        entry: The shard's manifest entry.
        index_key: The manifest's key.
        dim: The manifest's dimension.
        vectors_file: The local path of the shard's `vectors` file, where it has one.

    Attributes:
        index: The faiss index.
        lossy: Whether the candidates' scores are approximate, and `rank` has better ones.

    Raises:
        IndexIntegrityError: The file's type, dimension, metric or row count contradicts the manifest.
    """

    def __init__(
        self, file: Path, entry: ShardEntry, index_key: str, dim: int, vectors_file: Path | None = None
    ) -> None:
        check_faiss()
        self.file = file
        self.entry = entry
        self.dim = dim
        self.lossy = is_lossy(index_key)
        self.index = read_index(file, index_key)
        found = (self.index.d, self.index.metric_type, self.index.ntotal)
        expected = (dim, faiss.METRIC_INNER_PRODUCT, entry.rows)
        if found != expected:
            raise IndexIntegrityError(
                "The dimension, metric or row count of a shard contradicts the manifest.",
                where=str(file),
                expected=str(expected),
                found=str(found),
            )
        self._inverted_file = inverted_file_of(self.index)
        self._quantizer = CoarseQuantizer(self.index, str(file)) if self._inverted_file is not None else None
        self._flat = ExactFlat(self.index, str(file)) if is_flat(self.index) else None
        self._vectors = _open_vectors(vectors_file, entry.rows, dim) if vectors_file is not None else None

    def assign(self, queries: np.ndarray, nprobe: int | None) -> Assignment | None:
        """Chooses the lists that the queries search in every shard; None where there are no lists."""
        return self._quantizer.assign(queries, nprobe) if self._quantizer is not None else None

    def candidates(
        self, queries: np.ndarray, count: int, nprobe: int | None = None, assigned: Assignment | None = None
    ) -> Ranking:
        """Returns each query's best vectors by the shard's codes; for a Flat shard that is exact.

        Args:
            queries: [B, dim] float32.
            count: How many vectors each query wants; where fewer can be reached, (-inf, -1) fills the rest.
            nprobe: The number of lists to search, or of candidates that HNSW keeps. None takes the index's own.
            assigned: The result of `assign` for these queries, where it is known already.

        Returns:
            [B, count] scores and global ids, by (score descending, id ascending).

        Raises:
            IndexIntegrityError: The search returns ids outside the shard.
        """
        first_id = self.entry.first_id
        if self._flat is not None:
            scores, rows = self._flat.search(queries, count)
            return padded(scores, rows + first_id, count)
        if assigned is None:
            assigned = self.assign(queries, nprobe)
        chosen, total = assigned, self.entry.rows
        wanted = min(count, total)

        def attempt(rows: np.ndarray, fetch: int) -> Attempted:
            scores, ids = self._search(queries[rows], fetch, nprobe, chosen.take(rows) if chosen else None)
            scores[ids == NOTHING] = -np.inf
            _check_bounds(ids[ids != NOTHING], first_id, first_id + total, self.entry.file)
            # faiss returns any of the vectors with equal scores: fetch until the last is worse than the cut.
            settled = (scores[:, wanted - 1] > scores[:, -1]) | (ids[:, -1] == NOTHING) | (fetch == total)
            return settled, scores[settled], ids[settled]

        return padded(*settle(len(queries), wanted, wanted + _CANDIDATE_MARGIN, total, attempt), count)

    def _search(self, queries: np.ndarray, fetch: int, nprobe: int | None, assigned: Assignment | None) -> Ranking:
        """Returns faiss's answer, with global ids."""
        if assigned is not None:
            assert self._inverted_file is not None
            self._inverted_file.nprobe = assigned.lists.shape[1]  # search_preassigned takes no parameters
            return self._inverted_file.search_preassigned(assigned.queries, fetch, assigned.lists, assigned.scores)
        parameters = None
        if isinstance(self.index, faiss.IndexHNSW):
            parameters = faiss.SearchParametersHNSW(  # type: ignore[attr-defined]
                efSearch=max(nprobe or self.index.hnsw.efSearch, fetch)
            )
        scores, rows = self.index.search(queries, fetch, params=parameters)
        return scores, np.where(rows == NOTHING, NOTHING, rows + self.entry.first_id)

    def rank(self, queries: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Scores global ids of this shard by their stored vectors.

        Args:
            queries: [B, dim] float32.
            ids: [B, K] int64; -1 scores -inf.

        Returns:
            [B, K] float32: inner products in float64, rounded.
        """
        rows = np.where(ids == NOTHING, NOTHING, ids - self.entry.first_id)
        return exact_scores(queries, rows, self._vectors_of)

    def stored_vectors(self, first_row: int, stop_row: int) -> np.ndarray:
        """Returns the vectors of rows in the order of their ids.

        Returns:
            [stop_row - first_row, dim], float32 for Flat and IVF,Flat, else float16.

        Raises:
            IndexIntegrityError: The shard's lists do not hold each of its ids once, or it is lossy and has no
                `vectors` file.
        """
        mapped = self._flat.vectors if self._flat is not None else self._vectors
        if mapped is not None:
            return np.array(mapped[first_row:stop_row])
        return self._vectors_of(np.arange(first_row, stop_row))

    def _vectors_of(self, rows: np.ndarray) -> np.ndarray:
        if self._flat is not None:
            return self._flat.vectors[rows]
        if self._vectors is not None:
            return self._vectors[rows]
        if self.lossy:
            raise IndexIntegrityError(
                "A shard has lossy codes, and its `vectors` file is missing.",
                where=self.entry.file,
                remedy="Rebuild the index.",
            )
        return self._listed.take(rows)

    @cached_property
    def _listed(self) -> ListedVectors:
        return ListedVectors(self._inverted_file, self.entry)


class ListedVectors:
    """Reads vectors by row from the inverted lists of a float32 or float16 codec.

    Raises:
        IndexIntegrityError: The lists do not hold each row once.
    """

    def __init__(self, inverted_file: Any, entry: ShardEntry) -> None:
        self._inverted_file = inverted_file
        self._lists = inverted_file.invlists
        is_half = isinstance(inverted_file, faiss.IndexIVFScalarQuantizer)
        self.dtype: type[np.floating] = np.float16 if is_half else np.float32
        self._list_number = np.full(entry.rows, NOTHING, np.int32)
        self._place_in_list = np.zeros(entry.rows, np.int32)
        for number in range(inverted_file.nlist):
            size = self._lists.list_size(number)
            if size:
                rows = faiss.rev_swig_ptr(self._lists.get_ids(number), size) - entry.first_id
                _check_bounds(rows, 0, entry.rows, entry.file)
                self._list_number[rows] = number
                self._place_in_list[rows] = np.arange(size)
        if (self._list_number == NOTHING).any():  # ntotal has been checked, so another row is there twice
            raise IndexIntegrityError(
                "A shard's lists do not hold each of its vectors once.", where=entry.file, remedy="Rebuild the index."
            )

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Returns the vectors [n, dim] of n rows."""
        vectors = np.empty((len(rows), self._inverted_file.d), self.dtype)
        order = np.argsort(self._list_number[rows], kind="stable")
        numbers, starts = np.unique(self._list_number[rows[order]], return_index=True)
        for number, positions in zip(numbers.tolist(), np.split(order, starts[1:]), strict=True) if len(rows) else ():
            vectors[positions] = self._decode(number, self._place_in_list[rows[positions]])
        return vectors

    def _decode(self, number: int, places: np.ndarray) -> np.ndarray:
        size, code_size = self._lists.list_size(number), self._lists.code_size
        codes = faiss.rev_swig_ptr(self._lists.get_codes(number), size * code_size).reshape(size, code_size)
        vectors = codes[places].view(self.dtype)
        if self.dtype is np.float16 and self._inverted_file.by_residual:
            return vectors.astype(np.float32) + self._inverted_file.quantizer.reconstruct(number)
        return vectors


def _open_vectors(file: Path, rows: int, dim: int) -> np.ndarray:
    """Memory-maps a `vectors` file and checks its outline."""
    try:
        vectors = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise IndexIntegrityError("A `vectors` file cannot be read.", where=str(file), found=str(error)) from error
    if vectors.shape != (rows, dim) or vectors.dtype != np.float16 or not vectors.flags.c_contiguous:
        raise IndexIntegrityError(
            "A `vectors` file contradicts the manifest.",
            where=str(file),
            expected=f"float16 {(rows, dim)}",
            found=f"{vectors.dtype} {vectors.shape}",
        )
    return vectors


def _check_bounds(ids: np.ndarray, first: int, stop: int, where: str) -> None:
    if ids.size and not (ids.min() >= first and ids.max() < stop):
        raise IndexIntegrityError(
            "A search returned an id outside its shard.",
            where=where,
            expected=f"{first} to {stop - 1}",
            found=f"{ids.min()} to {ids.max()}",
            remedy="Restore the index from where it was published, or rebuild it.",
        )
