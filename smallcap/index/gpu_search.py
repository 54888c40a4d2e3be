"""Searches an index's vectors on a GPU, for captioning that would otherwise wait for the CPU's search.

Where all vectors fit next to the model, they lie there as float16, and a matrix product with a running top-k searches
them exactly. Otherwise faiss searches the same lists as on the CPU, for the inverted files that it has on GPUs.
"""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import faiss
import numpy as np
import torch

from smallcap.index.faiss_index import inverted_file_of
from smallcap.index.ranking import NOTHING, Attempted, Ranking, best_of, padded, settle
from smallcap.index.vector_shard import VectorShard
from smallcap.machine.gpu_memory import room_bytes, set_aside
from smallcap.machine.precision import float32_products
from smallcap.machine.process_memory import return_freed_memory

MEMORY_SHARE = 0.5  # share of the memory that is free once the model is loaded; generating needs the rest
_ROWS_AT_ONCE = 65_536  # vectors uploaded together
_SCORES_AT_ONCE = 64 << 20  # scores of all queries with one block: 256 MiB
_VALUES_AT_ONCE = 16 << 20  # float64 values of gathered vectors
_MARGIN = 64  # candidates fetched beyond those wanted, so that rounding to float16 seldom asks for more
_FAISS_TEMPORARY_BYTES = 512 << 20  # faiss takes 1.5 GiB by default
_FAISS_LIMIT = 2048  # neighbours, and lists, that faiss's GPU kernels can handle
_FAISS_KINDS = (faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer, faiss.IndexIVFPQ)

Rank = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Takes queries [B, dim] and ids [B, K] (-1: none), and returns exact scores [B, K] float32."""

_log = logging.getLogger(__name__)


class GpuSearch(Protocol):
    """A search that replaces the shards' own."""

    backend: str
    exact: bool  # whether its candidates are the neighbours; else `rank` orders them

    def candidates(self, queries: np.ndarray, count: int) -> Ranking | None:
        """Returns [B, count] as `VectorShard.candidates` does; None where this search cannot give `count`."""


class ExactBlocks:
    """Exact search over all of the shards' vectors, kept as float16 on one device.

    The products, with a bound on their rounding error, tell which vectors can be among the best; those are then scored
    exactly. The answers of a Flat index are therefore the same as on the CPU. For another key they are the neighbours
    by the stored vectors, whichever lists hold them.

    Args:
        shards: Contiguous shards.
        device: Any torch device.
        rank: The function that scores ids by the stored vectors; used where those are finer than float16.
    """

    backend = "gpu-exact"
    exact = True

    def __init__(self, shards: Sequence[VectorShard], device: torch.device, rank: Rank) -> None:
        self._rank = rank
        self._first_id = shards[0].entry.first_id
        rows, dim = sum(shard.entry.rows for shard in shards), shards[0].dim
        self._vectors = torch.empty((rows, dim), dtype=torch.float16, device=device)  # [N, dim]
        self._max_loss = 0.0  # the largest norm of what a vector lost to float16
        self._max_norm = 0.0  # the largest norm of a float16 vector
        row = 0
        for shard in shards:
            for start in range(0, shard.entry.rows, _ROWS_AT_ONCE):
                stored = shard.stored_vectors(start, min(start + _ROWS_AT_ONCE, shard.entry.rows))
                halves = stored.astype(np.float16)
                losses = np.linalg.norm(stored.astype(np.float32) - halves, axis=1)
                self._max_loss = max(self._max_loss, float(losses.max()))
                self._max_norm = max(self._max_norm, float(np.linalg.norm(halves.astype(np.float32), axis=1).max()))
                self._vectors[row : row + len(halves)] = torch.from_numpy(halves).to(device)
                row += len(halves)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # searches run on other streams, which would not wait for the copies

    def candidates(self, queries: np.ndarray, count: int) -> Ranking:
        """Returns each query's best vectors by (exact score descending, id ascending).

        Args:
            queries: [B, dim] float32.
            count: How many vectors each query wants.

        Returns:
            [B, count] scores and global ids, filled up with (-inf, -1).
        """
        total = len(self._vectors)
        wanted = min(count, total)
        tolerance = self._tolerance(queries)

        def attempt(rows: np.ndarray, fetch: int) -> Attempted:
            products, near_rows = self._nearest(queries[rows], fetch)
            cut = products[:, wanted - 1] - 2 * tolerance[rows]  # a vector below it cannot be among the wanted
            settled = (products[:, -1] < cut) | (fetch == total)
            near_rows[products < cut[:, None]] = NOTHING
            return settled, *self._score_exactly(queries[rows[settled]], near_rows[settled])

        return padded(*settle(len(queries), wanted, wanted + _MARGIN, total, attempt), count)

    def _tolerance(self, queries: np.ndarray) -> np.ndarray:
        """Returns the largest possible error of a float16 product for each query: [B]."""
        halves = queries.astype(np.float16).astype(np.float32)
        query_error = np.linalg.norm(queries - halves, axis=1) * self._max_norm
        norms = np.linalg.norm(queries, axis=1)
        vector_error = norms * self._max_loss
        sum_error = queries.shape[1] * 2.0**-23 * norms * self._max_norm  # float32 sums in any order
        return (query_error + vector_error + sum_error) * 1.01 + 1e-6

    def _nearest(self, queries: np.ndarray, fetch: int) -> Ranking:
        """Returns the best rounded products and their rows; the order of close ones is not reliable."""
        halves = torch.from_numpy(queries).to(self._vectors.device, torch.float16)  # [B, dim]
        best = torch.empty((len(queries), 0), device=halves.device)
        rows = torch.empty((len(queries), 0), dtype=torch.int64, device=halves.device)
        block_rows = max(1, _SCORES_AT_ONCE // len(queries))
        for start in range(0, len(self._vectors), block_rows):
            products = float32_products(halves, self._vectors[start : start + block_rows].T)  # [B, block]
            block_best, places = products.topk(min(fetch, products.shape[1]), dim=1)
            best, rows = torch.cat([best, block_best], dim=1), torch.cat([rows, places + start], dim=1)
            if best.shape[1] > fetch:
                best, places = best.topk(fetch, dim=1)
                rows = rows.gather(1, places)
        best, order = best.sort(dim=1, descending=True)
        return best.cpu().numpy(), rows.gather(1, order).cpu().numpy()

    def _score_exactly(self, queries: np.ndarray, rows: np.ndarray) -> Ranking:
        """Scores rows [B, K] by the stored vectors: on the device where float16 holds them exactly, else by `rank`."""
        ids = np.where(rows == NOTHING, NOTHING, rows + self._first_id)
        if self._max_loss:
            return self._rank(queries, ids), ids
        device = self._vectors.device
        chosen = torch.from_numpy(rows).to(device)
        exact = torch.from_numpy(queries).to(device, torch.float64)
        scores = torch.empty(chosen.shape, dtype=torch.float32, device=device)
        batch_rows = max(1, _VALUES_AT_ONCE // max(1, rows.shape[1] * queries.shape[1]))
        for start in range(0, len(chosen), batch_rows):
            batch = slice(start, start + batch_rows)
            gathered = self._vectors[chosen[batch].clamp(min=0)].to(torch.float64)  # [b, K, dim]
            scores[batch] = (gathered * exact[batch, None]).sum(dim=-1).to(torch.float32)
        scores[chosen == NOTHING] = -torch.inf
        return scores.cpu().numpy(), ids


class FaissGpu:
    """The inverted lists of all shards as one faiss index on a GPU.

    Args:
        shards: Shards of an inverted file that faiss has for GPUs.
        nprobe: The number of lists that a query searches.
        device: A CUDA device.

    Raises:
        RuntimeError: faiss has no such index for GPUs, or no room for it.
    """

    backend = "faiss-gpu"
    exact = False

    def __init__(self, shards: Sequence[VectorShard], nprobe: int, device: torch.device) -> None:
        self._total = sum(shard.entry.rows for shard in shards)
        self._resources: Any = faiss.StandardGpuResources()
        self._resources.setTempMemory(_FAISS_TEMPORARY_BYTES)
        options: Any = faiss.GpuClonerOptions()
        options.use_cuvs = False  # it cannot search lists whose coarse quantizer is on the CPU
        options.useFloat16 = True  # for PQ's tables
        options.allowCpuCoarseQuantizer = True  # where it is a graph
        gpu_number = device.index if device.index is not None else torch.cuda.current_device()
        with _one_at_a_time():
            merged = merged_index(shards)
            self._index: Any = faiss.index_cpu_to_gpu(self._resources, gpu_number, merged, options)
            del merged
            return_freed_memory()
        faiss.GpuParameterSpace().set_index_parameter(self._index, "nprobe", nprobe)
        set_aside(_faiss_bytes(shards), device)

    def candidates(self, queries: np.ndarray, count: int) -> Ranking | None:
        """Returns each query's best vectors by faiss's scores; None where its kernels cannot give `count`."""
        wanted = min(count, self._total)
        if wanted > _FAISS_LIMIT:
            return None
        scores, ids = self._index.search(queries, wanted)
        scores = np.where(ids == NOTHING, -np.inf, scores).astype(np.float32)
        return padded(*best_of(scores, ids, wanted), count)


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Lets one process of this user and node merge and upload at a time, so that the node holds one merged copy."""
    with (Path(tempfile.gettempdir()) / f"smallcap-upload-{os.getuid()}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed, or the process dies
        yield


def merged_index(shards: Sequence[VectorShard]) -> Any:
    """Returns one index in memory that has the inverted lists of all shards.

    faiss's view of several lists as one (`HStackInvertedLists`) would need no copy, but its upload does not free what
    that view gives out: every list would leak.
    """
    merged: Any = faiss.read_index(str(shards[0].file))  # not mapped: its lists must grow
    lists = inverted_file_of(merged)
    for shard in shards[1:]:
        source = inverted_file_of(shard.index)
        assert source is not None and lists is not None
        kind = faiss.InvertedLists.SUBSET_TYPE_ID_RANGE  # type: ignore[attr-defined]
        source.copy_subset_to(lists, kind, shard.entry.first_id, shard.entry.first_id + shard.entry.rows)
        merged.ntotal = lists.ntotal
    return merged


def open_gpu_search(
    shards: Sequence[VectorShard], nprobe: int | None, device: torch.device, rank: Rank
) -> GpuSearch | None:
    """Puts an index on a GPU in the best way that fits next to the model; call it when the model is loaded.

    Args:
        shards: Contiguous shards.
        nprobe: The number of lists that a query searches.
        device: A CUDA device.
        rank: The function that scores ids by the stored vectors.

    Returns:
        The search, or None where there is no room, or faiss has no such index for GPUs.
    """
    room = int(room_bytes(device) * MEMORY_SHARE)
    rows = sum(shard.entry.rows for shard in shards)
    needed = rows * shards[0].dim * 2 + 4 * _SCORES_AT_ONCE
    if needed <= room:
        try:
            return ExactBlocks(shards, device, rank)
        except torch.OutOfMemoryError:  # another process took the memory first
            torch.cuda.empty_cache()
    _log.info("Exact search on the GPU needs %d bytes; %d are available.", needed, room)
    reason = _why_not_faiss(shards, nprobe, room)
    if not reason:
        try:
            return FaissGpu(shards, nprobe or 1, device)
        except RuntimeError as error:
            reason = str(error)
    _log.info("faiss does not search this index on the GPU: %s.", reason)
    return None


def _why_not_faiss(shards: Sequence[VectorShard], nprobe: int | None, room: int) -> str:
    """Returns why faiss cannot search an index on the GPU; empty where it can."""
    lists = inverted_file_of(shards[0].index)
    if not isinstance(lists, _FAISS_KINDS):
        return "its type has no GPU version"
    if not getattr(faiss, "get_num_gpus", int)():
        return "the installed faiss has no GPU support"
    if (nprobe or 1) > _FAISS_LIMIT:
        return f"a query searches more than {_FAISS_LIMIT} lists"
    needed = _faiss_bytes(shards)
    return "" if needed <= room else f"it needs {needed} bytes; {room} are available"


def _faiss_bytes(shards: Sequence[VectorShard]) -> int:
    """Returns the bytes of an inverted file's codes and ids on a GPU, and of faiss's scratch space."""
    lists = inverted_file_of(shards[0].index)
    assert lists is not None
    return sum(shard.entry.rows for shard in shards) * (lists.code_size + 8) + _FAISS_TEMPORARY_BYTES
