"""Fills copies of the template and writes them, with their captions, to the index's files.

Writing a shard again gives the same bytes under the same name, so repeating a task does no harm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from index_builder.dumps.buckets import Deduped, UniqueCaptions, read_grown
from index_builder.embedding.slices import VectorSlices
from index_builder.stored import StoredIndex
from index_builder.work.reports import report_rows
from smallcap import storage
from smallcap.errors import ConfigError
from smallcap.index.caption_store import CAPTION_STORE_COLUMNS, write_caption_file
from smallcap.index.faiss_index import check_faiss, inverted_file_of, is_lossy
from smallcap.index.manifest import FileEntry, ShardEntry
from smallcap.index.node_cache import check_file
from smallcap.index.vector_shard import CoarseQuantizer

_MAX_TEXT_BYTES = 2**31 - 1  # in one Arrow string column
_NEARLY_AS_GOOD = 8e-6  # a difference of scores that float32 may not resolve


@dataclass(frozen=True)
class ShardTask:
    """One shard to write: the new captions [first_row, stop_row), with ids from first_id on.

    Attributes:
        index_uri: Where to write.
        index_key: The template's key.
        template: The trained, empty index.
        first_id: Id of the first caption.
        first_row: Its row among the build's new captions.
        stop_row: One past the last row.
        captions: The new captions.
        vectors: Their embeddings.
        source_names: Names of the build's source files, by position.
    """

    index_uri: str
    index_key: str
    template: FileEntry
    first_id: int
    first_row: int
    stop_row: int
    captions: UniqueCaptions
    vectors: VectorSlices
    source_names: tuple[str, ...]


@dataclass(frozen=True)
class WrittenShard:
    """The manifest entries of a shard's files."""

    shard: ShardEntry
    captions: ShardEntry
    vectors: ShardEntry | None


def write_shard(task: ShardTask) -> WrittenShard:
    """Writes one shard's vectors and captions.

    Raises:
        ConfigError: The captions' text is too large for one shard.
        IndexIntegrityError: The template is damaged.
    """
    ids = {"first_id": task.first_id, "rows": task.stop_row - task.first_row}
    with storage.scratch_folder() as folder:

        def publish(path: Path, kind: str) -> ShardEntry:
            return ShardEntry.adopt(path, task.index_uri, kind, **ids)

        write_caption_file(folder / "captions.arrow", _caption_batch(task))
        captions = publish(folder / "captions.arrow", "captions")
        lossy = is_lossy(task.index_key)
        _write_vectors(task, folder / "shard.faiss", folder / "vectors.npy" if lossy else None)
        shard = publish(folder / "shard.faiss", "shard")
        return WrittenShard(shard, captions, publish(folder / "vectors.npy", "vectors") if lossy else None)


def _write_vectors(task: ShardTask, shard_path: Path, vectors_path: Path | None) -> None:
    """Writes the filled index, and, where its codec is coarser, the vectors as float16."""
    check_faiss()
    rows = task.stop_row - task.first_row
    exact = None
    if vectors_path is not None:
        exact = np.lib.format.open_memmap(vectors_path, "w+", np.float16, (rows, task.vectors.dim))
    with storage.local_file(storage.join(task.index_uri, task.template.file)) as template:
        check_file(template, task.template)
        index = faiss.read_index(str(template))
    start = 0
    for vectors in task.vectors.read(task.first_row, task.stop_row):
        add_vectors(index, vectors, task.first_id + start)
        if exact is not None:
            exact[start : start + len(vectors)] = vectors
        start += len(vectors)
        report_rows(start)
    if exact is not None:
        exact.flush()
    faiss.write_index(index, str(shard_path))


def add_vectors(index: Any, vectors: np.ndarray, first_id: int) -> None:
    """Adds vectors to a copy of the template.

    A vector's list must not depend on the rest of its batch (BLAS rounds by shape), so float64 decides where two
    centroids are nearly as good. Several shards then hold what a single one would hold.

    Args:
        index: A copy of the template. An inverted file gets global ids; other indexes number their rows.
        vectors: [n, dim] float32.
        first_id: Global id of the first vector.
    """
    inverted_file = inverted_file_of(index)
    if inverted_file is None:
        index.add(vectors)
        return
    ids = np.arange(first_id, first_id + len(vectors))
    if inverted_file is not index:  # it is behind a transform, whose result is rounded by shape as well
        index.add_with_ids(vectors, ids)
        return
    scores, lists = inverted_file.quantizer.search(vectors, min(2, inverted_file.nlist))
    close = np.flatnonzero(scores[:, 0] - scores[:, -1] < _NEARLY_AS_GOOD)
    nearest = np.ascontiguousarray(lists[:, 0])
    nearest[close] = CoarseQuantizer(index).assign(vectors[close], 1).lists[:, 0]
    inverted_file.add_core(len(vectors), faiss.swig_ptr(vectors), faiss.swig_ptr(ids), faiss.swig_ptr(nearest))


def _caption_batch(task: ShardTask) -> pa.RecordBatch:
    captions = task.captions.read(task.first_row, task.stop_row)
    text_bytes = pc.sum(pc.binary_length(captions["text"])).as_py()
    if text_bytes > _MAX_TEXT_BYTES:
        raise ConfigError(
            "A shard's captions are too long for one file.",
            where=f"captions {task.first_id} to {task.first_id + captions.num_rows - 1}",
            expected=f"at most {_MAX_TEXT_BYTES} bytes of text",
            found=str(text_bytes),
            remedy="Give more --shards.",
        )
    columns = [
        pa.array(np.arange(task.first_id, task.first_id + captions.num_rows, dtype=np.int64)),
        captions["text"].combine_chunks(),
        _names(captions["source"].combine_chunks(), task.source_names),
        captions["image_id"].combine_chunks(),
    ]
    return pa.record_batch(columns, schema=CAPTION_STORE_COLUMNS)


def _names(positions: pa.ListArray, names: tuple[str, ...]) -> pa.ListArray:
    """Replaces lists of positions with lists of names."""
    flat = pa.array(names, pa.string()).take(positions.flatten())
    lengths = pc.list_value_length(positions).to_numpy(zero_copy_only=False)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    return pa.ListArray.from_arrays(offsets, flat)


@dataclass(frozen=True)
class GrowTask:
    """A caption file of the index that is added to, in which some captions have gained sources or images."""

    index: StoredIndex
    shard: int
    work_uri: str
    deduped: tuple[Deduped, ...]
    source_names: tuple[str, ...]


def grow_captions(task: GrowTask) -> ShardEntry:
    """Rewrites a caption file where a caption has grown; returns the entry of the new file, or of the old one."""
    entry = task.index.manifest.captions[task.shard]
    grown = read_grown(task.work_uri, task.deduped, entry.first_id, entry.first_id + entry.rows)
    changes = {
        caption_id: {
            "source": [task.source_names[position] for position in caption.sources],
            "image_id": caption.image_ids,
        }
        for caption_id, caption in grown.items()
    }
    return rewrite_captions(task.index, task.shard, changes)


def rewrite_captions(index: StoredIndex, shard: int, changes: Mapping[int, Mapping[str, list[str]]]) -> ShardEntry:
    """Rewrites a caption file in which captions get other sources or images; texts and ids stay.

    Args:
        index: The index that has the file.
        shard: The shard's number.
        changes: The new values of the columns `source` and `image_id` where they change, by caption id.

    Returns:
        The entry of the new file, or of the old one where there are no changes.
    """
    entry = index.manifest.captions[shard]
    if not changes:
        return entry
    captions = index.captions(shard)
    columns: dict[str, Any] = {name: captions.column(name).to_pylist() for name in ("source", "image_id")}
    for caption_id, change in changes.items():
        for name, values in change.items():
            columns[name][caption_id - entry.first_id] = values or None
    fields = [CAPTION_STORE_COLUMNS.field(name) for name in ("source", "image_id")]
    arrays = [pa.array(columns[field.name], field.type) for field in fields]
    batch = pa.record_batch([captions.column("caption_id"), captions.column("text"), *arrays], CAPTION_STORE_COLUMNS)
    with storage.scratch_folder() as folder:
        write_caption_file(folder / "captions.arrow", batch)
        ids = {"first_id": entry.first_id, "rows": entry.rows}
        return ShardEntry.adopt(folder / "captions.arrow", index.uri, "captions", **ids)
