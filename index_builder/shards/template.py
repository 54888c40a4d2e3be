"""Trains the template: the empty index, with centroids and codec, of which every shard is a filled copy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np

from index_builder.embedding.slices import VectorSlices
from index_builder.plan import IndexPlan, with_one_list
from smallcap import storage
from smallcap.errors import ConfigError
from smallcap.index.faiss_index import check_faiss, inverted_file_of, is_readable, transforms_of
from smallcap.index.manifest import FileEntry

_SEED = 20


@dataclass(frozen=True)
class TrainTask:
    """The one training of a build."""

    index_uri: str
    plan: IndexPlan
    vectors: VectorSlices


def train_template(task: TrainTask) -> FileEntry:
    """Trains the template on a uniform sample and writes it to the index's files.

    Raises:
        ConfigError: faiss refuses the key, or cannot train it on this sample.
    """
    check_faiss()  # its way of multiplying decides the last bits of the centroids
    index = make_index(task.plan.index_key, task.plan.dim)
    try:
        if not index.is_trained:
            index.train(task.vectors.take(uniform_sample(task.plan.rows, task.plan.training_rows)))
    except RuntimeError as error:
        raise ConfigError(
            "The index cannot be trained on these captions.",
            where=f"index_key={task.plan.index_key}",
            found=_first_line(error),
            remedy="Use --index-key auto, or a key with fewer lists or codes.",
        ) from error
    with storage.scratch_folder() as folder:
        path = folder / "template.faiss"
        faiss.write_index(index, str(path))
        return FileEntry.adopt(path, task.index_uri, "template")


def make_index(index_key: str, dim: int, asked_key: str = "") -> Any:
    """Makes an untrained index for a key.

    Args:
        index_key: The key.
        dim: Length of a vector.
        asked_key: The key that errors name, if it is another one.

    Raises:
        ConfigError: faiss does not know the key, or this release cannot serve such an index.
    """
    where = f"index_key={asked_key or index_key}"
    try:
        index = faiss.index_factory(dim, index_key, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ConfigError(
            "faiss does not know this index key.",
            where=where,
            expected="such as Flat, IVF,SQfp16, IVF4096,SQ8 or IVF65536_HNSW32,PQ64",
            found=_first_line(error),
        ) from error
    if not is_readable(index):
        raise ConfigError(
            "An index with this key can be built, but not served.",
            where=where,
            expected="Flat, SQ, PQ, HNSW or RaBitQ codes, with or without IVF and a transform before it",
            found=type(index).__name__,
            remedy="Leave out IDMap and Refine: smallcap does ids and re-ranking itself.",
        )
    if contradiction := _contradiction(index):
        raise ConfigError("faiss cannot train an index of this key.", where=where, **contradiction)
    inverted = inverted_file_of(index)
    if isinstance(inverted, faiss.IndexIVFScalarQuantizer) and inverted.sq.qtype == faiss.ScalarQuantizer.QT_fp16:
        inverted.by_residual = False  # a list then holds float16(vector), which can be read back unchanged
    if inverted is not None:
        inverted.cp.min_points_per_centroid = 1  # small samples are the user's choice; faiss would warn on stderr
    for nested in _nested_indexes(index):
        if hasattr(nested, "do_polysemous_training"):
            nested.do_polysemous_training = False  # it orders codes for a Hamming filter, which no search here uses
    return index


def _contradiction(index: Any) -> dict[str, str]:
    """Returns what faiss would find only in training, as `expected` and `found`; empty where there is nothing."""
    for transform in transforms_of(index):
        if isinstance(transform, faiss.PCAMatrix) and transform.d_out > transform.d_in:
            return {"expected": f"PCA to at most {transform.d_in} dimensions", "found": str(transform.d_out)}
    inverted = inverted_file_of(index)
    if inverted is None:
        return {}
    quantizer = faiss.downcast_index(inverted.quantizer)
    if isinstance(quantizer, faiss.ResidualCoarseQuantizer) and 1 << quantizer.rq.tot_bits != inverted.nlist:
        return {"expected": f"IVF{1 << quantizer.rq.tot_bits} with this quantizer", "found": f"IVF{inverted.nlist}"}
    return {}


def check_index_key(index_key: str, dim: int) -> None:
    """Checks that faiss can build an index of a key, before any caption is read.

    Args:
        index_key: The key, or `auto`.
        dim: Length of a vector.

    Raises:
        ConfigError: faiss does not know the key, it does not suit the vectors, or this release cannot serve it.
    """
    if index_key != "auto":
        make_index(with_one_list(index_key), dim, index_key)


def least_training_rows(index: Any) -> int:
    """Returns how many vectors the codes of an untrained index need at least: one for each of a quantizer's centroids.

    OPQ makes a quantizer of 8 bits of its own.
    """
    chain = transforms_of(index)
    quantizers = [getattr(nested, "pq", None) for nested in _nested_indexes(index)]
    needed = [quantizer.ksub for quantizer in quantizers if quantizer is not None]
    return max([0, *needed, *(256 for transform in chain if isinstance(transform, faiss.OPQMatrix))])


def _nested_indexes(index: Any) -> Iterator[Any]:
    """Yields an index and those inside it that hold its vectors."""
    yield index
    for name in ("index", "storage", "quantizer"):
        inner = getattr(index, name, None)
        if isinstance(inner, faiss.Index):
            yield from _nested_indexes(faiss.downcast_index(inner))


def uniform_sample(rows: int, count: int) -> np.ndarray:
    """Draws `count` of the rows [0, rows), sorted: one at random from each of `count` equal strata."""
    strata = np.arange(count) + np.random.default_rng(_SEED).random(count)
    return np.minimum((strata * rows / max(count, 1)).astype(np.int64), rows - 1)


def _first_line(error: Exception) -> str:
    """Returns faiss's message, without its C++ source lines."""
    return str(error).splitlines()[0].split(": Error: ")[-1][:300]
