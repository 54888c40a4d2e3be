"""Cuts the ids into shards and writes each one's vectors and captions.

Writing a shard again gives the same bytes, so a task that Ray repeats does no harm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from index_builder.buckets import UniqueCaptions
from index_builder.embedding import PART_ROWS, VectorParts
from smallcap import storage
from smallcap.caption_store import CAPTION_STORE_COLUMNS, write_caption_file
from smallcap.errors import ConfigError
from smallcap.index_manifest import TEMPLATE_FILE, FileEntry, ShardEntry

ROWS_PER_SHARD = 1_000_000
_MAX_TEXT_BYTES = 2**31 - 1  # of one Arrow string column


@dataclass(frozen=True)
class ShardTask:
    """One shard to write: the ids [first_id, stop_id) below `version_uri`."""

    number: int
    first_id: int
    stop_id: int
    version_uri: str
    captions: UniqueCaptions
    vectors: VectorParts
    sources: tuple[str, ...]  # names of the dump files by position


@dataclass(frozen=True)
class WrittenShard:
    """The manifest entries of a shard's two files."""

    vectors: ShardEntry
    captions: ShardEntry


def plan_shards(rows: int, requested: int | Literal["auto"]) -> list[tuple[int, int]]:
    """Returns each shard's [first_id, stop_id): as many as requested, or one per million, and none of them empty."""
    count = -(-rows // ROWS_PER_SHARD) if requested == "auto" else min(requested, rows)
    bounds = [rows * number // count for number in range(count + 1)]
    return list(pairwise(bounds))


def shard_memory_bytes(shards: Sequence[tuple[int, int]], dim: int) -> int:
    """Estimates what writing the largest shard takes: its vectors, and a part beside them."""
    return max(stop - first for first, stop in shards) * dim * 4 + 3 * PART_ROWS * dim * 4 + (512 << 20)


def write_template(version_uri: str, dim: int) -> FileEntry:
    """Writes the empty index that every shard is a filled copy of."""
    return _write_file(version_uri, TEMPLATE_FILE, lambda path: faiss.write_index(faiss.IndexFlatIP(dim), str(path)))


def write_shard(task: ShardTask) -> WrittenShard:
    """Writes one shard's vectors and captions to the staged version.

    Raises:
        ConfigError: The captions' text is too large for one shard.
    """

    def write_vectors(path: Path) -> None:
        index = faiss.IndexFlatIP(task.vectors.dim)
        for vectors in task.vectors.read(task.first_id, task.stop_id):
            index.add(vectors)
        faiss.write_index(index, str(path))

    def write_captions(path: Path) -> None:
        write_caption_file(path, _caption_batch(task))

    vectors = _write_file(task.version_uri, f"shards/shard-{task.number:05d}.faiss", write_vectors)
    captions = _write_file(task.version_uri, f"captions/captions-{task.number:05d}.arrow", write_captions)
    ids = {"first_id": task.first_id, "rows": task.stop_id - task.first_id}
    return WrittenShard(ShardEntry(**vectors.model_dump(), **ids), ShardEntry(**captions.model_dump(), **ids))


def _caption_batch(task: ShardTask) -> pa.RecordBatch:
    captions = task.captions.read(task.first_id, task.stop_id)
    text_bytes = pc.sum(pc.binary_length(captions["text"])).as_py()
    if text_bytes > _MAX_TEXT_BYTES:
        raise ConfigError(
            "A shard's captions are too long for one file.",
            where=f"shard {task.number}",
            expected=f"at most {_MAX_TEXT_BYTES} bytes of text",
            found=str(text_bytes),
            remedy="Give more --shards.",
        )
    columns = [
        np.arange(task.first_id, task.stop_id, dtype=np.int64),
        captions["text"].combine_chunks(),
        pa.array(task.sources, pa.string()).take(captions["source"].combine_chunks()),
        captions["image_id"].combine_chunks(),
    ]
    return pa.record_batch([pa.array(column) for column in columns], schema=CAPTION_STORE_COLUMNS)


def _write_file(version_uri: str, name: str, write: Callable[[Path], None]) -> FileEntry:
    """Lets `write` make a local file, uploads it, and describes it."""
    with storage.scratch_folder() as folder:
        path = folder / "file"
        write(path)
        storage.upload(path, storage.join(version_uri, name))
        return FileEntry.describe(path, name)
