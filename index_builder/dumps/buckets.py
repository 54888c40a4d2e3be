"""Turns rows into unique captions: rows are dealt into hash buckets, and each bucket is deduplicated separately.

A bucket is a range of key prefixes and is sorted by key, so the captions of all buckets are sorted as a whole. The same
captions therefore get the same ids, however the dumps are divided into files and the work into buckets and tasks.
Dealing holds one chunk of rows in memory, deduplicating one bucket. Rows come from caption dumps (`deal_dumps`) and
from indexes (`stored.deal_shard`); a row that has an embedding carries it.

    WORK/rows/00003-0001.arrow      one record batch for each bucket, with rows in their order
    WORK/unique/bucket-00007.arrow  new captions, sorted by key
    WORK/grown/bucket-00007.arrow   captions that the index has already, and that gained a source or an image
    WORK/images/bucket-00007.npy    a hash for each (caption, image) pair
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate, islice, starmap
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from index_builder.dumps.cleaning import KEY_BYTES, Cleaner
from index_builder.dumps.deduplication import Deduplicator, Row, UniqueCaption
from index_builder.dumps.files import DumpScan, open_dump
from index_builder.work.reports import report_rows
from smallcap import storage
from smallcap.captions.rows import CaptionColumns
from smallcap.config import CleaningConfig
from smallcap.index.caption_store import open_arrow

BYTES_PER_BUCKET = 16 << 20  # of input; about 200,000 captions without embeddings
MAX_BUCKETS = 4096
_CHUNK_BYTES = 256 << 20  # rows that one dealing task holds in memory
_ROW_OVERHEAD_BYTES = 400  # what a row takes as Python objects, its text and vector not counted
_CLEANED_AT_ONCE = 10_000
_IMAGES_PER_COUNT = 20_000_000  # (caption, image) pairs that one counting task holds

_ROW_COLUMNS = pa.schema(
    [
        ("key", pa.binary(KEY_BYTES)),
        ("text", pa.string()),
        ("source", pa.list_(pa.int32())),
        ("image_id", pa.list_(pa.string())),
        ("vector", pa.binary()),
        ("known_id", pa.int64()),
        ("lends_vector", pa.bool_()),
    ]
)
_UNIQUE_COLUMNS = pa.schema([_ROW_COLUMNS.field(name) for name in ("key", "text", "source", "image_id", "vector")])
_GROWN_COLUMNS = pa.schema([_ROW_COLUMNS.field(name) for name in ("known_id", "source", "image_id")])


class ChunkWriter:
    """Deals one task's rows into buckets, in chunk files of bounded size.

    Args:
        work_uri: The build's work folder.
        task: The task's number among all dealing tasks; deduplication reads rows in this order.
        buckets: Number of buckets.
    """

    def __init__(self, work_uri: str, task: int, buckets: int) -> None:
        self._work_uri, self._task, self._buckets = work_uri, task, buckets
        self._held: list[Row] = []
        self._held_bytes = 0
        self._chunks: list[str] = []

    def add(self, rows: Iterable[Row]) -> None:
        """Takes rows in order."""
        for row in rows:
            self._held.append(row)
            self._held_bytes += _ROW_OVERHEAD_BYTES + len(row.text) + len(row.vector or b"")
            if self._held_bytes >= _CHUNK_BYTES:
                self._write()

    def close(self) -> tuple[str, ...]:
        """Writes the remaining rows; returns all chunk files in order."""
        if self._held:
            self._write()
        return tuple(self._chunks)

    def _write(self) -> None:
        dealt: list[list[Row]] = [[] for _ in range(self._buckets)]
        for row in self._held:
            dealt[int.from_bytes(row.key[:4]) * self._buckets >> 32].append(row)
        self._chunks.append(storage.join(self._work_uri, "rows", f"{self._task:05d}-{len(self._chunks):04d}.arrow"))
        _write_batches(self._chunks[-1], _ROW_COLUMNS, (_batch(_ROW_COLUMNS, rows) for rows in dealt))
        self._held, self._held_bytes = [], 0


@dataclass(frozen=True)
class DealTask:
    """Dump files to clean and deal.

    Attributes:
        work_uri: The build's work folder.
        number: This task's number among all dealing tasks.
        dumps: The files, each with its position among the build's source files.
        columns: Which columns to read.
        cleaning: Which rows to keep.
        buckets: Number of buckets.
    """

    work_uri: str
    number: int
    dumps: tuple[tuple[DumpScan, int], ...]
    columns: CaptionColumns
    cleaning: CleaningConfig
    buckets: int


@dataclass(frozen=True)
class Dealt:
    """The result of a dealing task: chunk files in the order of their rows, and counts."""

    chunks: tuple[str, ...]
    rows: tuple[int, ...]  # in each dump file
    dropped: dict[str, int]


def plan_buckets(input_bytes: int) -> int:
    """Returns the number of buckets for inputs of this size, embeddings included."""
    return min(MAX_BUCKETS, 1 + input_bytes // BYTES_PER_BUCKET)


def plan_dealing(
    scans: Sequence[DumpScan],
    work_uri: str,
    columns: CaptionColumns,
    cleaning: CleaningConfig,
    buckets: int,
    first_task: int,
    sources: Sequence[int],
) -> list[DealTask]:
    """Groups neighbouring dump files so that small ones share a task; keeps their order."""
    groups: list[list[tuple[DumpScan, int]]] = []
    for scan, source in zip(scans, sources, strict=True):
        if not groups or sum(other.bytes for other, _ in groups[-1]) + scan.bytes > BYTES_PER_BUCKET:
            groups.append([])
        groups[-1].append((scan, source))
    return [
        DealTask(work_uri, first_task + number, tuple(group), columns, cleaning, buckets)
        for number, group in enumerate(groups)
    ]


def deal_dumps(task: DealTask) -> Dealt:
    """Cleans the rows of a task's dump files and deals them into buckets.

    Raises:
        SchemaError: A dump's content does not match its suffix; see `captions.reader`.
    """
    cleaner = Cleaner(task.cleaning)
    writer = ChunkWriter(task.work_uri, task.number, task.buckets)
    rows, dropped = [0] * len(task.dumps), Counter[str]()
    for number, (scan, source) in enumerate(task.dumps):
        with open_dump(scan.dump, task.columns) as reader:
            while batch := list(islice(reader, _CLEANED_AT_ONCE)):
                kept, reasons = cleaner.clean(batch, (source,))
                rows[number] += len(batch)
                report_rows(sum(rows))
                dropped += reasons
                writer.add(kept)
    return Dealt(writer.close(), tuple(rows), dict(dropped))


@dataclass(frozen=True)
class DedupeTask:
    """A bucket to deduplicate, with all chunks in the order of their rows."""

    work_uri: str
    bucket: int
    chunks: tuple[str, ...]


@dataclass(frozen=True)
class Deduped:
    """Counts of one bucket."""

    captions: int  # new ones
    embedded: int  # new captions that have an embedding
    grown: int  # captions that the index has already, and that gained a source or an image
    duplicates: int
    image_pairs: int


def dedupe_bucket(task: DedupeTask) -> Deduped:
    """Writes a bucket's new captions, sorted by key, its grown captions, and its image hashes."""
    deduplicator = Deduplicator()
    for chunk in task.chunks:
        with open_arrow(chunk) as source:
            batch = pa.ipc.open_file(source).get_batch(task.bucket)
            deduplicator.add(starmap(Row, zip(*(column.to_pylist() for column in batch.columns), strict=True)))
    new: list[UniqueCaption] = []
    grown: list[UniqueCaption] = []
    hashes: list[int] = []
    for caption in deduplicator.captions():
        hashes += map(_image_hash, caption.image_ids)
        if caption.known_id is None:
            new.append(caption)
        elif caption.has_grown:
            grown.append(caption)
    new_uri, grown_uri = (_bucket_uri(task.work_uri, kind, task.bucket) for kind in ("unique", "grown"))
    _write_batches(new_uri, _UNIQUE_COLUMNS, [_batch(_UNIQUE_COLUMNS, map(_new, new))])
    if grown:
        _write_batches(grown_uri, _GROWN_COLUMNS, [_batch(_GROWN_COLUMNS, map(_grown, grown))])
    buffer = io.BytesIO()
    np.save(buffer, np.array(hashes, dtype=np.uint64))
    storage.write_bytes(_bucket_uri(task.work_uri, "images", task.bucket), buffer.getvalue())
    embedded = sum(caption.vector is not None for caption in new)
    return Deduped(len(new), embedded, len(grown), deduplicator.duplicates, len(hashes))


def _new(caption: UniqueCaption) -> tuple[object, ...]:
    return caption.key, caption.text, list(caption.sources), list(caption.image_ids) or None, caption.vector


def _grown(caption: UniqueCaption) -> tuple[object, ...]:
    return caption.known_id, list(caption.sources), list(caption.image_ids) or None


def _image_hash(image_id: str) -> int:
    return int.from_bytes(blake2b(image_id.encode(), digest_size=8).digest())


@dataclass(frozen=True)
class CountTask:
    """One share of the image hashes to count; `shares` is their number."""

    work_uri: str
    buckets: int
    share: int
    shares: int


def plan_counting(work_uri: str, deduped: Sequence[Deduped]) -> list[CountTask]:
    """Divides the counting of captions per image so that each task's memory is bounded."""
    shares = 1 + sum(bucket.image_pairs for bucket in deduped) // _IMAGES_PER_COUNT
    return [CountTask(work_uri, len(deduped), share, shares) for share in range(shares)]


def count_captions_per_image(task: CountTask) -> int:
    """Returns the largest number of unique captions that one image of this share has."""
    share = []
    for bucket in range(task.buckets):
        hashes = np.load(io.BytesIO(storage.read_bytes(_bucket_uri(task.work_uri, "images", bucket))))
        share.append(hashes[hashes % np.uint64(task.shares) == task.share])
    _, counts = np.unique(np.concatenate(share), return_counts=True)
    return int(counts.max(initial=0))


class UniqueCaptions:
    """All unique captions of a build by global id, read from the bucket files; the object is small and picklable.

    Args:
        work_uri: The build's work folder.
        counts: The number of captions in each bucket, in order.
    """

    def __init__(self, work_uri: str, counts: Sequence[int]) -> None:
        self._work_uri = work_uri
        self._bounds = [0, *accumulate(counts)]

    def __len__(self) -> int:
        return self._bounds[-1]

    def read(self, first_id: int, stop_id: int) -> pa.Table:
        """Returns the captions with ids in [first_id, stop_id): key, text, source (positions), image_id, vector."""
        pieces = []
        bucket = bisect_right(self._bounds, first_id) - 1
        while first_id < stop_id:
            start, stop = self._bounds[bucket], min(stop_id, self._bounds[bucket + 1])
            with open_arrow(_bucket_uri(self._work_uri, "unique", bucket)) as source:
                batch = pa.ipc.open_file(source).get_batch(0)
                pieces.append(batch.slice(first_id - start, stop - first_id))
            first_id, bucket = stop, bucket + 1
        return pa.Table.from_batches(pieces, _UNIQUE_COLUMNS)


@dataclass(frozen=True)
class Grown:
    """A caption that the index has already, with all its sources (positions) and images after the addition."""

    sources: list[int]
    image_ids: list[str]


def read_grown(work_uri: str, deduped: Sequence[Deduped], first_id: int, stop_id: int) -> dict[int, Grown]:
    """Returns the captions in [first_id, stop_id) that have grown, by id."""
    grown: dict[int, Grown] = {}
    for bucket in [number for number, counts in enumerate(deduped) if counts.grown]:
        with open_arrow(_bucket_uri(work_uri, "grown", bucket)) as source:
            for row in pa.ipc.open_file(source).get_batch(0).to_pylist():
                if first_id <= row["known_id"] < stop_id:
                    grown[row["known_id"]] = Grown(row["source"], row["image_id"] or [])
    return grown


def _bucket_uri(work_uri: str, kind: Literal["unique", "grown", "images"], bucket: int) -> str:
    suffix = ".npy" if kind == "images" else ".arrow"
    return storage.join(work_uri, kind, f"bucket-{bucket:05d}{suffix}")


def _batch(schema: pa.Schema, rows: Iterable[tuple[object, ...]]) -> pa.RecordBatch:
    columns: list[Sequence[Any]] = list(zip(*rows, strict=True)) or [()] * len(schema)
    arrays = [pa.array(values, field.type) for values, field in zip(columns, schema, strict=True)]
    return pa.record_batch(arrays, schema=schema)


def _write_batches(uri: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Writes an Arrow file by way of a temporary local file, so that a reader of `uri` sees all of it or nothing."""
    with storage.scratch_folder() as folder:
        path = folder / "batches.arrow"
        with pa.ipc.new_file(str(path), schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        storage.upload(path, uri)
