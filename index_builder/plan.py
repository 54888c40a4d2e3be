"""Decides what to build from sizes alone: index key, number of lists, training sample, shards and their memory.

No data is read here. The thresholds follow measurements on CPU (docs/benchmarks.md); `--index-key` overrides them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log2
from typing import Literal

from index_builder.embedding.slices import SLICE_ROWS
from smallcap.errors import ConfigError

ROWS_PER_SHARD = 1_000_000
MOST_FLAT = 1_000_000  # vectors; with more, exact search is slower than the encoders
MOST_FLOAT16 = 10_000_000  # vectors; with more, lists in float16 take more memory than a node usually has to spare
HNSW_FROM_NLIST = 32_768  # from here on, comparing a vector with every list's centroid dominates the build
K_FACTOR = 4  # candidates per neighbour that are ranked again behind a lossy codec
_LARGEST_NLIST = 65_536
_SAMPLE_PER_LIST = 64
_LEAST_PER_LIST = 39  # with fewer, faiss warns of poor centroids
_BASE_BYTES = 512 << 20  # memory of a process with faiss and Arrow
_OPEN_NLIST = re.compile(r"IVF,(SQfp16|SQ8|Flat)")
_CHOSEN_NLIST = re.compile(r"IVF\d+(_HNSW32)?,(SQfp16|SQ8|Flat)")
_NLIST = re.compile(r"IVF(\d+)")
_NUMBER = re.compile(r"(IVF|x)?([0-9]+)")
_MOST_LISTS, _MOST_BITS, _MOST = 1 << 22, 16, 1 << 16  # in a key; faiss itself would allocate whatever it says


@dataclass(frozen=True)
class IndexPlan:
    """What is built.

    Attributes:
        index_key: The key for faiss's index factory, with its number of lists.
        rows: The number of captions, or its upper bound while they have not been counted.
        dim: Length of a vector.
        training_rows: How many captions train the template; 0 where nothing is trained.
        shards: The range [first, stop) of new captions in each shard.
    """

    index_key: str
    rows: int
    dim: int
    training_rows: int
    shards: tuple[tuple[int, int], ...]

    @property
    def nlist(self) -> int | None:
        """The number of lists of an inverted file; None for other indexes."""
        return nlist_of(self.index_key)

    @property
    def codec(self) -> str:
        """How a vector is stored: `float32`, `float16`, or what the key says."""
        last = self.index_key.rsplit(",", 1)[-1]
        return {"Flat": "float32", "SQfp16": "float16"}.get(last, last)

    @property
    def training_bytes(self) -> int:
        """Memory of the training task: the sample as float32, faiss's copy of it, and the centroids."""
        return 2 * self.training_rows * self.dim * 4 + 2 * (self.nlist or 0) * self.dim * 4 + _BASE_BYTES

    @property
    def shard_bytes(self) -> int:
        """Memory of writing the largest shard: its vectors, at most in float32, and a few slices of embeddings."""
        largest = max((stop - first for first, stop in self.shards), default=0)
        return largest * self.dim * 4 + 4 * SLICE_ROWS * self.dim * 4 + _BASE_BYTES

    @property
    def serving_bytes(self) -> int:
        """Bytes that a node maps to search the index, without re-ranking vectors and texts."""
        return self.rows * bytes_per_vector(self.index_key, self.dim) + (self.nlist or 0) * self.dim * 4


def plan_index(
    rows: int, dim: int, index_key: str, shards: int | Literal["auto"], memory_budget_bytes: float | None = None
) -> IndexPlan:
    """Chooses how to index a number of captions.

    Args:
        rows: How many captions to index.
        dim: Length of a vector.
        index_key: `auto`, `IVF,CODEC`, or any string for faiss's index factory.
        shards: How many shards.
        memory_budget_bytes: For `auto`, the most memory that searching may take on a node.
    """
    key = _choose_key(rows, dim, memory_budget_bytes) if index_key == "auto" else _with_nlist(index_key, rows)
    nlist = nlist_of(key)
    if nlist is not None and rows < nlist:
        raise ConfigError(
            "There are fewer captions than lists.",
            where=f"index_key={key}",
            expected=f"at least {nlist} captions",
            found=str(rows),
            remedy="Use --index-key auto, or fewer lists.",
        )
    training = 0 if key == "Flat" else min(rows, max(_SAMPLE_PER_LIST * (nlist or 0), 100_000))
    return IndexPlan(key, rows, dim, training, tuple(plan_shards(rows, shards)))


def with_one_list(index_key: str) -> str:
    """Returns a key with one list in place of those that it names or leaves open: a cheap index of the same kind.

    Raises:
        ConfigError: A number in the key is 0, or out of reason.
    """
    for kind, number in _NUMBER.findall(index_key):
        most = {"IVF": _MOST_LISTS, "x": _MOST_BITS}.get(kind, _MOST)
        if not 1 <= int(number[:20]) <= most:
            raise ConfigError(
                "A number in the index key is out of reason.",
                where=f"index_key={index_key}",
                expected={"IVF": f"1 to {most:,} lists", "x": f"1 to {most} bits"}.get(kind, f"1 to {most:,}"),
                found=f"{kind}{number}",
                remedy="Use --index-key auto, Flat, IVF,SQfp16 or IVF,SQ8, which choose the number of lists.",
            )
    return re.sub(r"^(.*,)?IVF[0-9]*(?=[_,])", r"\1IVF1", index_key)


def check_trainable(plan: IndexPlan, needed: int) -> None:
    """Checks that there are enough captions to train an index.

    Args:
        plan: The plan.
        needed: How many vectors its codes need at least.

    Raises:
        ConfigError: There are fewer.
    """
    if plan.rows < needed:
        raise ConfigError(
            "There are too few captions to train an index of this key.",
            where=f"index_key={plan.index_key}",
            expected=f"at least {needed:,} captions",
            found=f"{plan.rows:,}",
            remedy="Use --index-key auto, or a key with coarser or no codes.",
        )


def _choose_key(rows: int, dim: int, budget: float | None) -> str:
    keys = [
        key
        for key, most in (("Flat", MOST_FLAT), ("IVF,SQfp16", MOST_FLOAT16), ("IVF,SQ8", float("inf")))
        if rows <= most
    ]
    fitting = [key for key in keys if budget is None or rows * bytes_per_vector(key, dim) <= budget]
    if not fitting:
        raise ConfigError(
            "No index of these captions fits the memory budget.",
            where="memory_budget_gb",
            expected=f"at least {rows * bytes_per_vector(keys[-1], dim) / 1e9:.1f}",
            found=f"{(budget or 0) / 1e9:g}",
            remedy="Raise the budget, or give a coarser --index-key, such as IVF65536_HNSW32,PQ64.",
        )
    return _with_nlist(fitting[0], rows)


def bytes_per_vector(index_key: str, dim: int) -> int:
    """Returns how many bytes one vector and its id take in a shard; for codecs unknown here, as float32."""
    listed = 8 if "IVF" in index_key else 0
    if index_key.endswith("SQfp16"):
        return 2 * dim + listed
    if index_key.endswith("SQ8"):
        return dim + listed
    quantised = re.search(r"PQ(\d+)(x4fs)?$", index_key)
    if quantised:
        return int(quantised[1]) // (2 if quantised[2] else 1) + listed
    return 4 * dim + listed


def choose_nlist(rows: int) -> int:
    """Returns the number of lists: the power of two nearest to 4 √rows, at most one list per 39 captions."""
    wanted = 1 << round(2 + log2(rows) / 2)
    most = 1 << int(log2(max(1, rows // _LEAST_PER_LIST)))
    return max(1, min(wanted, most, _LARGEST_NLIST))


def _with_nlist(key: str, rows: int) -> str:
    """Fills the number of lists into `IVF,CODEC`; where there are many, a graph finds them."""
    match = _OPEN_NLIST.fullmatch(key)
    if not match:
        return key
    nlist = choose_nlist(rows)
    return f"IVF{nlist}{'_HNSW32' if nlist >= HNSW_FROM_NLIST else ''},{match[1]}"


def with_open_nlist(key: str) -> str:
    """Returns `IVF,CODEC` for a key whose number of lists can be chosen again for another size; else the key itself."""
    match = _CHOSEN_NLIST.fullmatch(key)
    return f"IVF,{match[2]}" if match else key


def nlist_of(index_key: str) -> int | None:
    """Returns the number of lists in a key; None where it is not an inverted file."""
    match = _NLIST.search(index_key)
    return int(match[1]) if match else None


def plan_shards(rows: int, requested: int | Literal["auto"]) -> Sequence[tuple[int, int]]:
    """Returns each shard's [first, stop): the requested number of shards, or one per million; no shard is empty."""
    count = -(-rows // ROWS_PER_SHARD) if requested == "auto" else min(requested, rows)
    bounds = [rows * number // count for number in range(count + 1)] if count else [0]
    return list(pairwise(bounds))
