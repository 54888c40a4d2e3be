"""Chooses how a new version is searched so that it reaches its recall target, and reports the recall on other queries.

One half of the queries chooses, the other half reports. The choice is the smallest nprobe with which both halves reach
the target at the lower end of their 95% interval.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from index_builder.plan import K_FACTOR
from index_builder.recall.measurement import (
    CEILING_QUERIES,
    GAP_QUERIES,
    IMAGE_QUERIES,
    RECALL_AT,
    CheckTask,
    Embeddings,
    Measured,
    SearchTask,
    ShardAnswer,
    check_shard,
    imitate_images,
    lower_bound,
    measure,
    nprobe_ladder,
    recall_entries,
    search_shard,
)
from index_builder.shards.template import uniform_sample
from index_builder.stored import StoredIndex
from smallcap.config import RecallConfig
from smallcap.errors import RunError
from smallcap.index.faiss_index import is_lossy
from smallcap.index.manifest import IndexManifest
from smallcap.index.ranking import NOTHING, Ranking, merge_rankings

_K_FACTORS = (K_FACTOR, 4 * K_FACTOR, 16 * K_FACTOR)
_CHEAP_NPROBE = 32  # numbers of lists up to this one are tried in one round: a round costs more than its searches
_TARGET_AT = 4  # neighbours in the paper's prompt

Run = Callable[[str, Callable[[Any], Any], Sequence[Any]], list[Any]]
"""Runs a named stage's function over its items; returns the results in order."""


@dataclass(frozen=True)
class Queries:
    """Queries, [Q, dim] float32, and for each the id of the caption that it was made from, or -1."""

    vectors: np.ndarray
    origin_ids: np.ndarray


class Calibration:
    """Checks and calibrates one draft version.

    Args:
        index: The index, with the draft as its manifest.
        embeddings: Where each shard's exact vectors are.
        config: The number of queries, and whether to accept a miss.
        target: The least recall@4, at its lower bound.
        run: What runs work items.
    """

    def __init__(
        self,
        index: StoredIndex,
        embeddings: Sequence[Embeddings],
        config: RecallConfig,
        target: float,
        run: Run,
    ) -> None:
        self._index, self._draft = index, index.manifest
        self._embeddings, self._config = embeddings, config
        self._target, self._run = target, run

    def run(self, image_queries: np.ndarray | None) -> IndexManifest:
        """Returns the draft with nprobe, k_factor and the measured recall.

        Args:
            image_queries: [Q, dim] float32 embeddings of images like those to caption; None to imitate images.

        Raises:
            IndexIntegrityError: A file does not hold what was written.
            RunError: No setting reaches the target, and the config does not accept that.
        """
        origin_ids, vectors = self._check()
        if image_queries is None:
            queries = Queries(imitate_images(vectors), origin_ids)
        else:
            queries = Queries(image_queries, np.full(len(image_queries), NOTHING))
        k_factor, ceiling = self._choose_k_factor(queries)
        measured = self._choose_nprobe(queries, k_factor)
        held_out = slice(1, None, 2)
        missed = self._bound(measured, held_out) < self._target
        if missed and self._draft.index_key != "Flat" and not self._config.accept:  # Flat is exact, however few queries
            raise self._missed(measured, held_out)
        return self._draft.model_copy(
            update={
                "nprobe": measured.nprobe,
                "k_factor": k_factor,
                "recall": recall_entries(measured, ceiling, held_out),
                "recall_target": self._target,
                "recall_queries": GAP_QUERIES if image_queries is None else IMAGE_QUERIES,
            }
        )

    def _check(self) -> tuple[np.ndarray, np.ndarray]:
        """Reads every shard back; returns evenly drawn ids [2 Q] of live captions and their vectors, float32."""
        draft = self._draft
        ids = uniform_sample(draft.id_count, 2 * self._config.queries)  # repeats ids where there are fewer captions
        removed = self._index.removed_ids()
        live = ids[~np.isin(ids, removed)]
        if not live.size:
            live = np.setdiff1d(np.arange(draft.id_count), removed)[: 2 * self._config.queries]
        tasks = [
            CheckTask(
                self._index,
                number,
                live[(live >= shard.first_id) & (live < shard.first_id + shard.rows)] - shard.first_id,
                source,
            )
            for number, (shard, source) in enumerate(zip(draft.shards, self._embeddings, strict=True))
        ]
        return live, np.concatenate(self._run("verify", check_shard, tasks))

    def _search(
        self, queries: Queries, nprobes: tuple[int | None, ...], k_factor: int, with_exact: bool
    ) -> list[ShardAnswer]:
        index = replace(self._index, manifest=self._draft.model_copy(update={"k_factor": k_factor}))
        tasks = [
            SearchTask(index, number, queries.vectors, queries.origin_ids, nprobes, source, with_exact)
            for number, source in enumerate(self._embeddings)
        ]
        return self._run("calibrate", search_shard, tasks)

    def _choose_k_factor(self, queries: Queries) -> tuple[int, Measured | None]:
        """Returns the least re-ranking with which the codec allows the target, and what it reaches over all lists."""
        lossy = is_lossy(self._draft.index_key)
        if self._draft.nlist is None and not lossy:
            return 1, None
        sample = Queries(queries.vectors[1::2][:CEILING_QUERIES], queries.origin_ids[1::2][:CEILING_QUERIES])
        factors = _K_FACTORS if lossy else (1,)
        answers = self._search(sample, (self._draft.nlist,), factors[-1], with_exact=True)
        exact = _merge_exact(answers)
        for factor in factors:
            ceiling = measure(answers, exact, 0, self._draft.nlist, factor)
            if float(ceiling.recall[_TARGET_AT].mean()) >= self._target:
                break
        return factor, ceiling

    def _choose_nprobe(self, queries: Queries, k_factor: int) -> Measured:
        """Returns what was measured at the first nprobe that reaches the target, or at the last one there is."""
        ladder = nprobe_ladder(self._draft.nlist)
        exact: Ranking | None = None
        for nprobes in _rounds(ladder):
            answers = self._search(queries, nprobes, k_factor, with_exact=exact is None)
            exact = _merge_exact(answers) if exact is None else exact
            for setting, nprobe in enumerate(nprobes):
                measured = measure(answers, exact, setting, nprobe, k_factor)
                halves = (slice(0, None, 2), slice(1, None, 2))
                if all(self._bound(measured, half) >= self._target for half in halves):
                    return measured
        return measured

    def _bound(self, measured: Measured, half: slice) -> float:
        return lower_bound(measured.recall[_TARGET_AT][half])

    def _missed(self, measured: Measured, half: slice) -> RunError:
        recall = float(measured.recall[_TARGET_AT][half].mean())
        lists = "" if measured.nprobe is None else f", with all {measured.nprobe} lists searched"
        return RunError(
            "The index misses its recall target; nothing was published.",
            where=f"index_key={self._draft.index_key}",
            expected=f"recall@{_TARGET_AT} of at least {self._target} at the lower end of its 95% interval",
            found=f"{self._bound(measured, half):.4f} (mean {recall:.4f}){lists}",
            remedy="Give a finer --index-key (IVF,SQfp16 or Flat) or more queries, lower --recall-target, or "
            "publish the index as it is with --accept-recall. What has been built is kept for that.",
        )


def _rounds(ladder: Sequence[int | None]) -> list[tuple[int | None, ...]]:
    """Divides a ladder into rounds: the cheap steps together, the others one by one.

    Each step costs as much as all before it, so trying one in vain would double the time of calibration.
    """
    cheap = tuple(nprobe for nprobe in ladder if nprobe is None or nprobe <= _CHEAP_NPROBE)
    return [cheap, *((nprobe,) for nprobe in ladder[len(cheap) :])]


def _merge_exact(answers: Sequence[ShardAnswer]) -> Ranking:
    return merge_rankings([answer.exact for answer in answers if answer.exact is not None], max(RECALL_AT))
