"""Reads the captions of a published index, with their embeddings, as rows for a build.

As for any reader, a shard's files come from the node's cache, and are verified before they are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from index_builder.dumps.buckets import ChunkWriter, Dealt
from index_builder.dumps.cleaning import caption_key
from index_builder.dumps.deduplication import Row
from index_builder.work.reports import report_rows
from smallcap import storage
from smallcap.errors import IndexIntegrityError
from smallcap.index.caption_store import open_caption_file, open_removed
from smallcap.index.manifest import FileEntry, IndexManifest, ShardEntry
from smallcap.index.node_cache import open_version_folder
from smallcap.index.vector_shard import VectorShard

_ROWS_AT_ONCE = 20_000

Role = Literal["known", "input", "lender"]
"""What a shard's captions are to a build: those of the index that is added to, input, or lenders of embeddings."""


@dataclass(frozen=True)
class StoredIndex:
    """One version of a published index.

    Attributes:
        uri: The index's folder or prefix.
        manifest: The version's manifest.
        cache_dir: The node's cache of remote indexes.
    """

    uri: str
    manifest: IndexManifest
    cache_dir: str = storage.DEFAULT_CACHE_DIR

    def removed_ids(self) -> np.ndarray:
        """Returns the sorted int64 ids of the removed captions."""
        removed = [self.manifest.removed] if self.manifest.removed else []
        return open_removed(self.manifest, open_version_folder(self.uri, self.manifest, self.cache_dir, removed))

    def checked_file(self, entry: FileEntry) -> Path:
        """Returns the local path of one of the version's files, verified by its sha256.

        Raises:
            IndexIntegrityError: The file is damaged.
        """
        return open_version_folder(self.uri, self.manifest, self.cache_dir, [entry]) / entry.file

    def captions(self, number: int) -> pa.RecordBatch:
        """Returns a shard's rows of the caption store, memory-mapped."""
        entry = self.manifest.captions[number]
        return open_caption_file(self.checked_file(entry), entry)

    def texts(self, number: int, caption_ids: Sequence[int]) -> list[str]:
        """Returns the texts of captions of a shard."""
        rows = np.array(caption_ids, np.int64) - self.manifest.captions[number].first_id
        texts: list[str] = self.captions(number).column("text").take(pa.array(rows)).to_pylist()
        return texts

    def vectors(self, number: int) -> VectorShard:
        """Returns a shard's vectors, opened as a reader opens them."""
        manifest = self.manifest
        exact = self.checked_file(manifest.vectors[number]) if manifest.vectors else None
        entry = manifest.shards[number]
        return VectorShard(self.checked_file(entry), entry, manifest.index_key, manifest.dim, exact)

    def check_pairs(self) -> None:
        """Checks that each caption file holds the same ids as the vector file of its shard.

        Raises:
            IndexIntegrityError: One does not.
        """
        for shard, captions in zip(self.manifest.shards, self.manifest.captions, strict=False):
            if (shard.first_id, shard.rows) != (captions.first_id, captions.rows):
                raise IndexIntegrityError(
                    "The caption files of an index are divided at other ids than its shards.",
                    where=f"{self.uri}: {captions.file}",
                    expected=_ids(shard),
                    found=_ids(captions),
                    remedy="Rebuild the index from its dumps.",
                )


def _ids(entry: ShardEntry) -> str:
    return f"ids {entry.first_id} to {entry.first_id + entry.rows - 1}"


@dataclass(frozen=True)
class DealStoredTask:
    """One shard of an index to deal.

    Attributes:
        work_uri: The build's work folder.
        number: This task's number among all dealing tasks.
        index: The index.
        shard: The shard's number.
        role: What its captions are to the build.
        sources: Positions among the build's source files, by the names that the index has for them.
        buckets: Number of buckets.
        with_vectors: Whether the embeddings were made by the build's encoder.
    """

    work_uri: str
    number: int
    index: StoredIndex
    shard: int
    role: Role
    sources: dict[str, int]
    buckets: int
    with_vectors: bool


def deal_shard(task: DealStoredTask) -> Dealt:
    """Deals one shard's captions into buckets, without those that have been removed.

    Raises:
        IndexIntegrityError: The shard's files are damaged.
    """
    removed = task.index.removed_ids()
    writer = ChunkWriter(task.work_uri, task.number, task.buckets)
    captions = task.index.captions(task.shard)
    vectors = task.index.vectors(task.shard) if task.with_vectors else None
    for start in range(0, captions.num_rows, _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, captions.num_rows)
        batch_vectors = None if vectors is None else vectors.stored_vectors(start, stop)
        rows = _rows(task, captions.slice(start, stop - start), batch_vectors)
        first_id = task.index.manifest.captions[task.shard].first_id + start
        live = ~np.isin(np.arange(first_id, first_id + stop - start), removed, assume_unique=True)
        writer.add(row for row, is_live in zip(rows, live, strict=True) if is_live)
        report_rows(stop)
    return Dealt(writer.close(), (), {})


def _rows(task: DealStoredTask, captions: pa.RecordBatch, vectors: np.ndarray | None) -> Iterator[Row]:
    columns = (captions.column(name).to_pylist() for name in ("caption_id", "text", "source", "image_id"))
    for number, (caption_id, text, sources, image_ids) in enumerate(zip(*columns, strict=True)):
        yield Row(
            caption_key(text),
            text,
            tuple(task.sources[name] for name in sources) if task.role != "lender" else (),
            tuple(image_ids or ()) if task.role != "lender" else (),
            None if vectors is None else vectors[number].tobytes(),
            caption_id if task.role == "known" else None,
            lends_vector=task.role == "lender",
        )
