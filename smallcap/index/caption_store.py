"""The caption store: texts and their sources by global caption id, in memory-mapped Arrow files.

Each file has one uncompressed record batch, so that a lookup touches only the pages of its rows, and the processes of a
node share them. This module knows nothing of vectors, caches or checksums.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from smallcap import storage
from smallcap.errors import IndexIntegrityError
from smallcap.index.manifest import IndexManifest, ShardEntry, load_manifest

CAPTION_STORE_COLUMNS = pa.schema(
    [
        pa.field("caption_id", pa.int64(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("source", pa.list_(pa.string()), nullable=False),  # every dump file that has this caption
        pa.field("image_id", pa.list_(pa.string())),  # every image that has this caption in any dump; null if none
    ]
)
_TEXTS_AT_ONCE = 10_000


@dataclass(frozen=True)
class CaptionRow:
    """One row of the store."""

    caption_id: int
    text: str
    sources: tuple[str, ...]
    image_ids: tuple[str, ...]


class CaptionStore:
    """Captions by global id over the caption files of one index version.

    Args:
        files: The local path of each caption file, in the order of `shards`.
        shards: The files' manifest entries, contiguous.

    Raises:
        IndexIntegrityError: A file's schema, row count or ids contradict its entry.
    """

    def __init__(self, files: Sequence[Path], shards: Sequence[ShardEntry]) -> None:
        self._batches = [open_caption_file(file, shard) for file, shard in zip(files, shards, strict=True)]
        self._first_ids = np.array([shard.first_id for shard in shards], dtype=np.int64)
        self._rows = sum(shard.rows for shard in shards)
        self._ids = range(shards[0].first_id, shards[0].first_id + self._rows)

    def __len__(self) -> int:
        return self._rows

    def texts(self, caption_ids: np.ndarray) -> pa.StringArray:
        """Returns the text of each id; `caption_ids` is a flat int64 array."""
        return self._take("text", caption_ids)

    def sources(self, caption_ids: np.ndarray) -> pa.ListArray:
        """Returns the dump files that have each caption; `caption_ids` is a flat int64 array."""
        return self._take("source", caption_ids)

    def image_ids(self, caption_ids: np.ndarray) -> pa.ListArray:
        """Returns the images that have each caption, null where there are none; `caption_ids` is a flat int64 array."""
        return self._take("image_id", caption_ids)

    def rows(self, caption_ids: Sequence[int]) -> list[CaptionRow]:
        """Returns whole rows, in the order of `caption_ids`."""
        ids = np.asarray(caption_ids, dtype=np.int64)
        by_position: dict[int, CaptionRow] = {}
        for batch, positions, rows in self._located(ids):
            for position, row in zip(positions, batch.take(rows).to_pylist(), strict=True):
                by_position[int(position)] = _caption_row(row)
        return [by_position[position] for position in range(len(ids))]

    def sample(self, count: int) -> list[CaptionRow]:
        """Returns up to `count` rows, evenly spaced over all ids."""
        return self.rows([self._ids[row] for row in _evenly_spaced(self._rows, count)])

    def _take(self, column: str, caption_ids: np.ndarray) -> pa.Array:
        located = list(self._located(caption_ids))
        values = [batch.column(column).take(rows) for batch, _, rows in located]
        return gather(values, [positions for _, positions, _ in located], CAPTION_STORE_COLUMNS.field(column).type)

    def _located(self, caption_ids: np.ndarray) -> Iterator[tuple[pa.RecordBatch, np.ndarray, pa.Array]]:
        """Yields each shard's batch, the positions of its ids in `caption_ids`, and their rows in the batch."""
        if caption_ids.size and not (caption_ids.min() >= self._ids[0] and caption_ids.max() <= self._ids[-1]):
            raise IndexIntegrityError(
                "A caption id is outside the caption store.",
                expected=f"{self._ids[0]} to {self._ids[-1]}",
                found=f"{caption_ids.min()} to {caption_ids.max()}",
                remedy="Rebuild the index, or restore it from where it was published.",
            )
        shards = np.searchsorted(self._first_ids, caption_ids, side="right") - 1
        for shard in np.unique(shards):
            positions = np.flatnonzero(shards == shard)
            yield self._batches[shard], positions, pa.array(caption_ids[positions] - self._first_ids[shard])


def gather(values: Sequence[pa.Array], positions: Sequence[np.ndarray], kind: pa.DataType) -> pa.Array:
    """Joins arrays of one type, each of whose values has a position in the result.

    Args:
        values: The arrays, perhaps none.
        positions: For each array, the positions of its values; together they are 0 … n - 1.
        kind: The arrays' type.
    """
    if not values:
        return pa.array([], kind)
    if len(values) == 1:  # in order already: positions rise within an array
        return values[0]
    return pa.concat_arrays(values).take(pa.array(np.argsort(np.concatenate(positions))))


def write_caption_file(path: Path, batch: pa.RecordBatch) -> None:
    """Writes the rows of one shard as the one record batch of a caption file."""
    with pa.ipc.new_file(str(path), CAPTION_STORE_COLUMNS) as writer:
        writer.write_batch(batch)


def open_caption_file(file: Path, shard: ShardEntry) -> pa.RecordBatch:
    """Memory-maps one caption file and checks its outline against its manifest entry.

    Raises:
        IndexIntegrityError: The file's schema, row count or ids contradict the entry.
    """
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(file)))
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
    except (pa.ArrowInvalid, OSError) as error:
        raise IndexIntegrityError("A caption file cannot be read.", where=str(file), found=str(error)) from error
    if reader.schema != CAPTION_STORE_COLUMNS:
        raise IndexIntegrityError(
            "The columns of a caption file are wrong.",
            where=str(file),
            expected=", ".join(CAPTION_STORE_COLUMNS.names),
            found=", ".join(reader.schema.names),
        )
    row_counts = [batch.num_rows for batch in batches]
    if row_counts != [shard.rows]:
        raise IndexIntegrityError(
            "The number of rows in a caption file contradicts the manifest.",
            where=str(file),
            expected=f"one batch of {shard.rows} rows",
            found=f"batches of {row_counts} rows",
        )
    ids = batches[0].column("caption_id")
    if ids[0].as_py() != shard.first_id or ids[-1].as_py() != shard.first_id + shard.rows - 1:
        raise IndexIntegrityError(
            "The ids in a caption file contradict the manifest.",
            where=str(file),
            expected=f"{shard.first_id} to {shard.first_id + shard.rows - 1}",
            found=f"{ids[0]} to {ids[-1]}",
        )
    return batches[0]


def open_removed(manifest: IndexManifest, folder: str | Path) -> np.ndarray:
    """Returns the sorted int64 ids that are no longer retrieved, perhaps none; a local file is memory-mapped.

    Args:
        manifest: The version's manifest.
        folder: The path or URI of the folder that holds the version's files.

    Raises:
        IndexIntegrityError: The file contradicts the manifest.
    """
    if manifest.removed is None:
        return np.empty(0, np.int64)
    file = storage.join(str(folder), manifest.removed.file)
    is_local = storage.is_local(file)
    source = storage.absolute(file) if is_local else io.BytesIO(storage.read_bytes(file))
    try:
        removed = np.load(source, mmap_mode="r" if is_local else None, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise IndexIntegrityError("The removed ids cannot be read.", where=file, found=str(error)) from error
    sound = removed.shape == (manifest.removed.rows,) and removed.dtype == np.int64
    if not (sound and removed[0] >= 0 and removed[-1] < manifest.id_count and (np.diff(removed) > 0).all()):
        raise IndexIntegrityError(
            "The file of removed ids contradicts the manifest.",
            where=file,
            expected=f"{manifest.removed.rows} rising int64 ids below {manifest.id_count}",
            found=f"{removed.dtype} {removed.shape}",
        )
    return np.asarray(removed)


def load_caption_sample(
    index_uri: str, count: int, index_id: str | None = None
) -> tuple[IndexManifest, list[CaptionRow]]:
    """Reads a version's manifest and a few live captions of its first shard, without fetching the index.

    Returns:
        The manifest, and up to `count` rows evenly spaced over the first caption file.

    Raises:
        ManifestError: There is no such index or version.
        StorageError: The caption file cannot be read.
    """
    manifest = load_manifest(index_uri, index_id)
    shard = manifest.captions[0]
    removed = open_removed(manifest, index_uri)
    with open_arrow(storage.join(index_uri, shard.file)) as source:
        batch = pa.ipc.open_file(source).get_batch(0)
        live = np.setdiff1d(np.arange(batch.num_rows), removed - shard.first_id)
        rows = batch.take(pa.array(live[_evenly_spaced(len(live), count)])).to_pylist()
    return manifest, [_caption_row(row) for row in rows]


def read_texts(index_uri: str, index_id: str | None = None) -> Iterator[list[str]]:
    """Reads all live captions of a version, up to ten thousand at a time, without fetching its vectors.

    Raises:
        ManifestError: There is no such index or version.
        StorageError: A caption file cannot be read.
    """
    manifest = load_manifest(index_uri, index_id)
    removed = open_removed(manifest, index_uri)
    for shard in manifest.captions:
        with open_arrow(storage.join(index_uri, shard.file)) as source:
            texts = pa.ipc.open_file(source).get_batch(0).column("text")
            live = np.setdiff1d(np.arange(len(texts)), removed - shard.first_id)
            for start in range(0, len(live), _TEXTS_AT_ONCE):
                yield texts.take(pa.array(live[start : start + _TEXTS_AT_ONCE])).to_pylist()


def open_arrow(uri: str) -> pa.NativeFile:
    """Opens an Arrow file for random access: memory-mapped when it is local, else with ranged reads."""
    if storage.is_local(uri):
        return pa.memory_map(storage.absolute(uri))
    return pa.PythonFile(storage.open_ranged(uri), mode="r")


def _caption_row(row: dict[str, Any]) -> CaptionRow:
    return CaptionRow(
        caption_id=row["caption_id"],
        text=row["text"],
        sources=tuple(row["source"]),
        image_ids=tuple(row["image_id"] or ()),
    )


def _evenly_spaced(total: int, count: int) -> list[int]:
    count = min(total, count)
    return [number * total // count for number in range(count)]
