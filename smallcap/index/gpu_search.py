"""Search of an index's vectors on a GPU, for captioning that would otherwise wait for the CPU's search.

All vectors as float16 blocks beside the model where they fit: a matrix product and a running top-k, which is exact.
Else, for the inverted files that faiss has on GPUs, faiss's own search of the same lists as on the CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import faiss
import numpy as np
import torch
from torch import Tensor

from smallcap.index.faiss_index import inverted_file_of
from smallcap.index.ranking import NOTHING, Attempted, Ranking, best_of, padded, settle
from smallcap.index.vector_shard import VectorShard

MEMORY_SHARE = 0.5  # of the memory that is free once the model is loaded; generating needs the rest
_ROWS_AT_ONCE = 65_536  # vectors uploaded together
_SCORES_AT_ONCE = 64 << 20  # scores of all queries with one block: 256 MiB
_VALUES_AT_ONCE = 16 << 20  # float64 values of gathered vectors
_MARGIN = 64  # candidates beyond what is wanted, so that rounding to float16 seldom asks for more
_FAISS_TEMPORARY_BYTES = 512 << 20  # it takes 1.5 GiB where it is not told
_FAISS_MOST = 2048  # neighbours, and lists, of faiss's GPU kernels
_FAISS_KINDS = (faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer, faiss.IndexIVFPQ)

Rank = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""From queries [B, dim] and ids [B, K] (-1: none) to exact scores [B, K] float32."""

_log = logging.getLogger(__name__)


class GpuSearch(Protocol):
    """A search that takes the place of the shards' own."""

    backend: str
    exact: bool  # its candidates are the neighbours; else `rank` orders them

    def candidates(self, queries: np.ndarray, count: int) -> Ranking | None:
        """Returns [B, count] as `VectorShard.candidates` does; None where this search cannot give so many."""


class ExactBlocks:
    """Exact search over all of the shards' vectors, kept as float16 on one device.

    The products tell which vectors can be among the best, by a bound on what rounding can have changed; those are then
    scored exactly. Of a Flat index the answers are therefore the CPU's own. Of another key they are the neighbours by
    the stored vectors, whatever lists they are in.

    Args:
        shards: Contiguous shards.
        device: A torch device; any will do.
        rank: Scores ids by the stored vectors; used where those are finer than float16.
    """

    backend = "gpu-exact"
    exact = True

    def __init__(self, shards: Sequence[VectorShard], device: torch.device, rank: Rank) -> None:
        self._rank = rank
        self._first_id = shards[0].entry.first_id
        rows, dim = sum(shard.entry.rows for shard in shards), shards[0].dim
        self._vectors = torch.empty((rows, dim), dtype=torch.float16, device=device)  # [N, dim]
        self._lost = 0.0  # the largest norm of what float16 took from a vector
        self._norm = 0.0  # the largest norm of a float16 vector
        row = 0
        for shard in shards:
            for start in range(0, shard.entry.rows, _ROWS_AT_ONCE):
                stored = shard.stored_vectors(start, min(start + _ROWS_AT_ONCE, shard.entry.rows))
                halves = stored.astype(np.float16)
                lost = np.linalg.norm(stored.astype(np.float32) - halves, axis=1)
                self._lost = max(self._lost, float(lost.max()))
                self._norm = max(self._norm, float(np.linalg.norm(halves.astype(np.float32), axis=1).max()))
                self._vectors[row : row + len(halves)] = torch.from_numpy(halves).to(device)
                row += len(halves)

    def candidates(self, queries: np.ndarray, count: int) -> Ranking:
        """Returns each query's best vectors by (exact score descending, id ascending).

        Args:
            queries: [B, dim] float32.
            count: Wanted of each.

        Returns:
            [B, count] scores and global ids, filled up with (-inf, -1).
        """
        total = len(self._vectors)
        wanted = min(count, total)
        tolerance = self._tolerance(queries)

        def attempt(rows: np.ndarray, fetch: int) -> Attempted:
            near, found = self._nearest(queries[rows], fetch)
            cut = near[:, wanted - 1] - 2 * tolerance[rows]  # what is below cannot be among the wanted
            settled = (near[:, -1] < cut) | (fetch == total)
            found[near < cut[:, None]] = NOTHING
            return settled, *self._exactly(queries[rows[settled]], found[settled])

        return padded(*settle(len(queries), wanted, wanted + _MARGIN, total, attempt), count)

    def _tolerance(self, queries: np.ndarray) -> np.ndarray:
        """Returns for each query [B] the most by which a product of float16 can be off."""
        halves = queries.astype(np.float16).astype(np.float32)
        query_error = np.linalg.norm(queries - halves, axis=1) * self._norm
        norms = np.linalg.norm(queries, axis=1)
        vector_error = norms * self._lost
        sum_error = queries.shape[1] * 2.0**-23 * norms * self._norm  # of float32 sums in any order
        return (query_error + vector_error + sum_error) * 1.01 + 1e-6

    def _nearest(self, queries: np.ndarray, fetch: int) -> Ranking:
        """Returns the products' best rows; rounded, in no reliable order where they are close."""
        halves = torch.from_numpy(queries).to(self._vectors.device, torch.float16)  # [B, dim]
        best = torch.empty((len(queries), 0), device=halves.device)
        rows = torch.empty((len(queries), 0), dtype=torch.int64, device=halves.device)
        at_once = max(1, _SCORES_AT_ONCE // len(queries))
        for start in range(0, len(self._vectors), at_once):
            products = _products(halves, self._vectors[start : start + at_once])  # [B, block]
            block_best, places = products.topk(min(fetch, products.shape[1]), dim=1)
            best, rows = torch.cat([best, block_best], dim=1), torch.cat([rows, places + start], dim=1)
            if best.shape[1] > fetch:
                best, places = best.topk(fetch, dim=1)
                rows = rows.gather(1, places)
        best, order = best.sort(dim=1, descending=True)
        return best.cpu().numpy(), rows.gather(1, order).cpu().numpy()

    def _exactly(self, queries: np.ndarray, rows: np.ndarray) -> Ranking:
        """Scores rows [B, K] by the stored vectors: here where float16 holds them exactly, else where they lie."""
        ids = np.where(rows == NOTHING, NOTHING, rows + self._first_id)
        if self._lost:
            return self._rank(queries, ids), ids
        device = self._vectors.device
        chosen = torch.from_numpy(rows).to(device)
        exact = torch.from_numpy(queries).to(device, torch.float64)
        scores = torch.empty(chosen.shape, dtype=torch.float32, device=device)
        at_once = max(1, _VALUES_AT_ONCE // max(1, rows.shape[1] * queries.shape[1]))
        for start in range(0, len(chosen), at_once):
            batch = slice(start, start + at_once)
            gathered = self._vectors[chosen[batch].clamp(min=0)].to(torch.float64)  # [b, K, dim]
            scores[batch] = (gathered * exact[batch, None]).sum(dim=-1).to(torch.float32)
        scores[chosen == NOTHING] = -torch.inf
        return scores.cpu().numpy(), ids


def _products(queries: Tensor, block: Tensor) -> Tensor:
    """Multiplies float16 [B, dim] by [n, dim] into float32 [B, n]: a float16 result would lose the order."""
    if block.is_cuda:
        return torch.mm(queries, block.T, out_dtype=torch.float32)
    return queries.to(torch.float32) @ block.to(torch.float32).T


class FaissGpu:
    """The shards' inverted lists as one index of faiss's on a GPU.

    Args:
        shards: Shards of an inverted file that faiss has for GPUs.
        nprobe: Lists that a query searches.
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
        options.useFloat16 = True  # of PQ's tables
        options.allowCpuCoarseQuantizer = True  # a graph's
        number = device.index if device.index is not None else torch.cuda.current_device()
        self._index: Any = faiss.index_cpu_to_gpu(self._resources, number, merged_index(shards), options)
        faiss.GpuParameterSpace().set_index_parameter(self._index, "nprobe", nprobe)

    def candidates(self, queries: np.ndarray, count: int) -> Ranking | None:
        """Returns each query's best vectors by faiss's scores; None where more are wanted than its kernels give."""
        wanted = min(count, self._total)
        if wanted > _FAISS_MOST:
            return None
        scores, ids = self._index.search(queries, wanted)
        scores = np.where(ids == NOTHING, -np.inf, scores).astype(np.float32)
        return padded(*best_of(scores, ids, wanted), count)


def merged_index(shards: Sequence[VectorShard]) -> Any:
    """Returns one index in this process's memory with the inverted lists of all shards."""
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
    """Puts an index on a GPU in the best way that fits beside the model; call it when the model is loaded.

    Args:
        shards: Contiguous shards.
        nprobe: Lists that a query searches.
        device: A CUDA device.
        rank: As of `ExactBlocks`.

    Returns:
        The search, or None where there is no room, or faiss has no such index for GPUs.
    """
    room = int(torch.cuda.mem_get_info(device)[0] * MEMORY_SHARE)
    rows = sum(shard.entry.rows for shard in shards)
    needed = rows * shards[0].dim * 2 + 4 * _SCORES_AT_ONCE
    if needed <= room:
        try:
            return ExactBlocks(shards, device, rank)
        except torch.OutOfMemoryError:  # another process of the GPU was quicker
            torch.cuda.empty_cache()
    _log.info("Exact search on the GPU needs %d bytes, and may take %d.", needed, room)
    reason = _why_not_faiss(shards, nprobe, room)
    if not reason:
        try:
            return FaissGpu(shards, nprobe or 1, device)
        except RuntimeError as error:
            reason = str(error)
    _log.info("faiss does not search this index on the GPU: %s.", reason)
    return None


def _why_not_faiss(shards: Sequence[VectorShard], nprobe: int | None, room: int) -> str:
    """Returns what keeps an index from faiss's GPU search; empty where nothing does."""
    lists = inverted_file_of(shards[0].index)
    if not isinstance(lists, _FAISS_KINDS):
        return "its type has no GPU version"
    if not getattr(faiss, "get_num_gpus", int)():
        return "the installed faiss has no GPU support"
    if (nprobe or 1) > _FAISS_MOST:
        return f"it searches more than {_FAISS_MOST} lists"
    needed = sum(shard.entry.rows for shard in shards) * (lists.code_size + 8) + _FAISS_TEMPORARY_BYTES
    return "" if needed <= room else f"it needs {needed} bytes, and may take {room}"
