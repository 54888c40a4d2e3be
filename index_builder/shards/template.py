"""Trains the template: the empty index, with centroids and codec, of which every shard is a filled copy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np

from index_builder.embedding.slices import VectorSlices
from index_builder.plan import IndexPlan
from smallcap import storage
from smallcap.errors import ConfigError
from smallcap.index.faiss_index import check_faiss, inverted_file_of, is_readable
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


def make_index(index_key: str, dim: int) -> Any:
    """Makes an untrained index for a key.

    Raises:
        ConfigError: faiss does not know the key, or this release cannot serve such an index.
    """
    try:
        index = faiss.index_factory(dim, index_key, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ConfigError(
            "faiss does not know this index key.",
            where=f"index_key={index_key}",
            expected="such as Flat, IVF,SQfp16, IVF4096,SQ8 or IVF65536_HNSW32,PQ64",
            found=_first_line(error),
        ) from error
    if not is_readable(index):
        raise ConfigError(
            "An index with this key can be built, but not served.",
            where=f"index_key={index_key}",
            expected="Flat, SQ, PQ, HNSW or RaBitQ codes, with or without IVF and a transform before it",
            found=type(index).__name__,
            remedy="Leave out IDMap and Refine: smallcap does ids and re-ranking itself.",
        )
    inverted = inverted_file_of(index)
    if isinstance(inverted, faiss.IndexIVFScalarQuantizer) and inverted.sq.qtype == faiss.ScalarQuantizer.QT_fp16:
        inverted.by_residual = False  # a list then holds float16(vector), which can be read back unchanged
    if inverted is not None:
        inverted.cp.min_points_per_centroid = 1  # small samples are the user's choice; faiss would warn on stderr
    for nested in _nested_indexes(index):
        if hasattr(nested, "do_polysemous_training"):
            nested.do_polysemous_training = False  # it orders codes for a Hamming filter, which no search here uses
    return index


def _nested_indexes(index: Any) -> Iterator[Any]:
    """Yields an index and those inside it that hold its vectors."""
    yield index
    for name in ("index", "storage"):
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
