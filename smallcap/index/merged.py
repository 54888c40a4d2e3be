"""Searches several indexes of one encoder together: each answers for itself, and the best of their captions are taken.

Scores are cosines by one encoder, so captions of different indexes can be compared. An index's weight multiplies its
scores for this comparison only: what is returned stays the cosine. A text that several indexes have found counts once,
where it scores best. Sources are qualified by the index: `NAME/dump`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from smallcap.captions.normal_form import fold_caption
from smallcap.errors import ConfigError, RunError
from smallcap.index.manifest import IndexManifest, join_index_ids
from smallcap.index.ranking import NOTHING
from smallcap.index.retriever import Neighbours, NeighbourSearch, Retriever
from smallcap.retrieval_config import NamedIndex, SearchDevice


@dataclass(frozen=True)
class _Places:
    """Captions of B queries in M places each, in their order; an empty place has the id -1."""

    ids: np.ndarray  # [B, M] int64
    scores: np.ndarray  # [B, M] float32, cosines
    ranked: np.ndarray  # [B, M] float64, what the captions are compared by; -inf in empty places
    rows: np.ndarray  # [B, M] int64, where a place's text and sources are among all; -1 in empty places

    @classmethod
    def beside(cls, parts: Sequence[_Places]) -> _Places:
        """Puts the places of the same queries beside each other."""
        columns = ([getattr(part, name) for part in parts] for name in ("ids", "scores", "ranked", "rows"))
        return cls(*(np.concatenate(arrays, axis=1) for arrays in columns))

    def best_first(self) -> _Places:
        """Orders each query's places by what they are compared by; equal ones keep their order."""
        order = np.argsort(-self.ranked, axis=1, kind="stable")
        columns = (self.ids, self.scores, self.ranked, self.rows)
        return _Places(*(np.take_along_axis(array, order, axis=1) for array in columns))


class MergedSearch:
    """The nearest captions of image or text embeddings in several indexes; use `merge_searches`.

    Args:
        indexes: The indexes.
        searches: A search in each of them.

    Attributes:
        manifests: The manifests of the versions that are searched.
        index_id: The ids of these versions.
        dim: The length of a query.
    """

    def __init__(self, indexes: Sequence[NamedIndex], searches: Sequence[NeighbourSearch]) -> None:
        self._members = list(zip(indexes, searches, strict=True))
        self.manifests: tuple[IndexManifest, ...] = tuple(search.manifest for search in searches)
        self.index_id = join_index_ids(self.manifests)
        self.dim = searches[0].dim

    @property
    def search_backend(self) -> str:
        """The search backends, as `NeighbourSearch` names them."""
        return ", ".join(sorted({search.search_backend for _, search in self._members}))

    def use_threads(self, threads: int) -> None:
        """Gives searches on the CPU so many threads; see `Retriever`."""
        for _, search in self._members:
            if isinstance(search, Retriever):
                search.use_threads(threads)

    def use_device(self, device: str, search_device: SearchDevice = "auto") -> None:
        """Moves the searches to the model's GPU, each where that is wanted and fits; see `Retriever`.

        Raises:
            ConfigError: `cuda` is asked for, and an index does not fit.
        """
        for _, search in self._members:
            if isinstance(search, Retriever):
                search.use_device(device, search_device)

    def nearest(
        self,
        queries: np.ndarray,
        k: int,
        exclude_image_ids: Sequence[str | None] | None = None,
        names: Sequence[str | None] | None = None,
    ) -> Neighbours:
        """Returns each query's k nearest captions of all indexes, best first, ties in the order of the indexes.

        Args:
            queries: [B, dim] float32 unit vectors of the indexes' encoder.
            k: The number of neighbours per query; fewer come back where the indexes find fewer different texts.
            exclude_image_ids: For each query, an image whose own captions are left out, or `None`.
            names: For each query the name of the only index to search, or `None` for all.

        Raises:
            ConfigError: There is no index of such a name.
            RunError: See `NeighbourSearch.nearest`.
        """
        if names is not None:
            self._check_names(names, len(queries))
        if k < 1 or not len(queries):
            return Neighbours.none(len(queries))
        parts: list[_Places] = []
        texts: list[pa.StringArray] = []
        sources: list[pa.ListArray] = []
        for index, search in self._members:
            asked = np.flatnonzero([name in (None, index.name) for name in names or [None] * len(queries)])
            exclude = exclude_image_ids and [exclude_image_ids[query] for query in asked.tolist()]
            found = search.nearest(queries[asked], k, exclude)
            parts.append(_spread(found, index.weight, asked, (len(queries), k), sum(map(len, texts))))
            texts.append(found.texts)
            sources.append(_qualified(found.sources, index.name))
        return _take_best(_Places.beside(parts), pa.concat_arrays(texts), pa.concat_arrays(sources), k)

    def _check_names(self, names: Sequence[str | None], queries: int) -> None:
        if len(names) != queries:
            raise RunError(
                "Each query needs the name of an index, or None.", expected=f"{queries} names", found=str(len(names))
            )
        known = [index.name for index, _ in self._members]
        if unknown := set(names) - {None, *known}:
            raise ConfigError(
                "There is no index of this name.", expected=", ".join(known), found=", ".join(map(str, unknown))
            )


CaptionSearch = NeighbourSearch | MergedSearch
"""A search in one index or in several."""


def merge_searches(indexes: Sequence[NamedIndex], searches: Sequence[NeighbourSearch]) -> CaptionSearch:
    """Returns a search in all of the indexes; that of the only one as it is."""
    return searches[0] if len(searches) == 1 else MergedSearch(indexes, searches)


def open_indexes(indexes: Sequence[NamedIndex], manifests: Sequence[IndexManifest], cache_dir: str) -> CaptionSearch:
    """Opens versions of indexes; see `Retriever.open`.

    Args:
        indexes: The indexes.
        manifests: The manifest of each version, whose encoder is checked.
        cache_dir: Where this node keeps copies of remote indexes and remembers what it has verified.

    Raises:
        ManifestError: This release cannot read an index.
        IndexIntegrityError: The files of an index contradict its manifest.
        StorageError: The store or the cache folder fails.
    """
    searches = [
        Retriever.open(index.uri, cache_dir=cache_dir, index_id=manifest.index_id)
        for index, manifest in zip(indexes, manifests, strict=True)
    ]
    return merge_searches(indexes, searches)


def find_nearest(
    search: CaptionSearch,
    queries: np.ndarray,
    k: int,
    exclude_image_ids: Sequence[str | None] | None = None,
    names: Sequence[str | None] | None = None,
) -> Neighbours:
    """Returns each query's k nearest captions; see `MergedSearch.nearest`. With one index, names choose nothing."""
    if isinstance(search, MergedSearch):
        return search.nearest(queries, k, exclude_image_ids, names)
    return search.nearest(queries, k, exclude_image_ids)


def _spread(found: Neighbours, weight: float, asked: np.ndarray, shape: tuple[int, int], first_row: int) -> _Places:
    """Returns what one index has found in places for all queries.

    Args:
        found: What it has found.
        weight: Its weight.
        asked: The queries that it was asked.
        shape: The number of all queries, and of places for each.
        first_row: The number of texts of indexes before it.
    """
    ids, scores, rows = np.full(shape, NOTHING), np.zeros(shape, np.float32), np.full(shape, -1)
    width = found.ids.shape[1]
    ids[asked, :width], scores[asked, :width] = found.ids, found.scores
    is_found = ids != NOTHING
    rows[is_found] = first_row + np.arange(len(found.texts))
    return _Places(ids, scores, np.where(is_found, scores.astype(np.float64) * weight, -np.inf), rows)


def _qualified(sources: pa.ListArray, name: str) -> pa.ListArray:
    lengths = sources.value_lengths().to_numpy()
    offsets = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, pc.binary_join_element_wise(name, sources.flatten(), "/"))


def _take_best(places: _Places, texts: pa.StringArray, sources: pa.ListArray, k: int) -> Neighbours:
    """Takes the k best different texts of each query; a text gets the sources of all its places.

    Args:
        places: All that was found for each query.
        texts: The texts of all places.
        sources: Their sources.
        k: The number of captions for each query.
    """
    places = places.best_first()
    columns = np.arange(places.ids.shape[1])
    is_found = places.rows >= 0
    codes = np.append(_codes(texts), 0)[places.rows]
    first = _first_alike(np.where(is_found, codes, -1 - columns))  # an empty place is like no other
    rank = np.take_along_axis(np.cumsum(first == columns, axis=1) - 1, first, axis=1)  # of a place's text
    queries, taken = np.nonzero(is_found & (rank < k))
    order = np.lexsort((taken, rank[queries, taken], queries))  # places of one text beside each other, the best first
    queries, taken = queries[order], taken[order]
    is_first = first[queries, taken] == taken
    rows = places.rows[queries, taken]
    chosen = queries[is_first], taken[is_first]
    target = chosen[0], rank[chosen]
    ids, scores = np.full((len(places.ids), k), NOTHING), np.full((len(places.ids), k), -np.inf, np.float32)
    ids[target], scores[target] = places.ids[chosen], places.scores[chosen]
    united = _united(sources.take(pa.array(rows)), is_first)
    return Neighbours(ids, scores, texts.take(pa.array(rows[is_first])), united)


def _codes(texts: pa.StringArray) -> np.ndarray:
    """Returns a number for each text, the same for those that are the same caption: [n] int64."""
    encoded = texts.dictionary_encode()
    numbers: dict[str, int] = {}
    folded = [numbers.setdefault(fold_caption(text), len(numbers)) for text in encoded.dictionary.to_pylist()]
    return np.array(folded, np.int64)[encoded.indices.to_numpy()]


def _first_alike(codes: np.ndarray) -> np.ndarray:
    """Returns for each place of a row, [B, M], the first place in that row with the same code: [B, M]."""
    order = np.argsort(codes, axis=1, kind="stable")
    ordered = np.take_along_axis(codes, order, axis=1)
    is_new = np.concatenate([np.ones((len(codes), 1), bool), ordered[:, 1:] != ordered[:, :-1]], axis=1)
    starts = np.maximum.accumulate(np.where(is_new, np.arange(codes.shape[1]), 0), axis=1)
    first = np.empty_like(order)
    np.put_along_axis(first, order, np.take_along_axis(order, starts, axis=1), axis=1)
    return first


def _united(sources: pa.ListArray, begins: np.ndarray) -> pa.ListArray:
    """Joins lists, [n], to the list before them unless `begins`, [n] bool, says that a new one begins."""
    ends = np.concatenate([[0], sources.value_lengths().to_numpy().cumsum()])
    offsets = ends[np.concatenate([np.flatnonzero(begins), [len(begins)]])].astype(np.int32)
    return pa.ListArray.from_arrays(offsets, sources.flatten())
