"""From dump rows to unique captions: rows are dealt into hash buckets, and each bucket is deduplicated on its own.

A bucket is a range of key prefixes, so that the buckets' captions, each sorted by key, are sorted as a whole: the same
captions get the same ids whatever the dumps' files, the buckets and the scheduling. Memory is bounded by a chunk of
rows when dealing and by one bucket when deduplicating.

    WORK/rows/00003-0001.arrow      one record batch for each bucket, rows in the dump's order
    WORK/unique/bucket-00007.arrow  sorted by key
    WORK/images/bucket-00007.npy    a hash for each (caption, image) pair
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate, islice

import numpy as np
import pyarrow as pa

from index_builder.cleaning import KEY_BYTES, Cleaner, CleanRow, Deduplicator, UniqueCaption
from index_builder.dump_formats import Columns, read_rows
from index_builder.dumps import DumpScan, local_copy
from smallcap import storage
from smallcap.caption_store import open_arrow
from smallcap.config import CleaningConfig

BYTES_PER_BUCKET = 16 << 20  # of the dumps; about 200,000 captions
MAX_BUCKETS = 4096
_CHUNK_ROWS = 1_000_000  # that one dealing task holds in memory
_CLEANED_AT_ONCE = 10_000
_IMAGES_PER_COUNT = 20_000_000  # (caption, image) pairs that one counting task holds

_ROW_COLUMNS = pa.schema(
    [("key", pa.binary(KEY_BYTES)), ("text", pa.string()), ("source", pa.int32()), ("image_id", pa.string())]
)
_UNIQUE_COLUMNS = pa.schema(
    [("key", pa.binary(KEY_BYTES)), ("text", pa.string()), ("source", pa.int32()), ("image_id", pa.list_(pa.string()))]
)


@dataclass(frozen=True)
class DealTask:
    """Dump files to clean and deal; `first_source` is the first one's position among all."""

    work_uri: str
    scans: tuple[DumpScan, ...]
    first_source: int
    columns: Columns
    cleaning: CleaningConfig
    buckets: int


@dataclass(frozen=True)
class Dealt:
    """What a dealing task made: chunk files in the order of their rows, and counts."""

    chunks: tuple[str, ...]
    rows: tuple[int, ...]  # of each dump file
    dropped: Counter[str]


def plan_buckets(scans: Sequence[DumpScan]) -> int:
    """Returns the number of buckets for dumps of this size."""
    return min(MAX_BUCKETS, 1 + sum(scan.bytes for scan in scans) // BYTES_PER_BUCKET)


def plan_dealing(
    scans: Sequence[DumpScan], work_uri: str, columns: Columns, cleaning: CleaningConfig
) -> list[DealTask]:
    """Groups neighbouring dump files so that many small ones share a task; order is kept."""
    buckets = plan_buckets(scans)
    groups: list[list[DumpScan]] = []
    for scan in scans:
        if groups and sum(other.bytes for other in groups[-1]) + scan.bytes <= BYTES_PER_BUCKET:
            groups[-1].append(scan)
        else:
            groups.append([scan])
    firsts = accumulate((len(group) for group in groups), initial=0)
    return [
        DealTask(work_uri, tuple(group), first, columns, cleaning, buckets)
        for first, group in zip(firsts, groups, strict=False)
    ]


def deal_rows(task: DealTask) -> Dealt:
    """Cleans the rows of a task's dump files and deals them into buckets.

    Raises:
        SchemaError: A dump is not what its suffix says; see `dump_formats`.
    """
    cleaner = Cleaner(task.cleaning)
    chunks: list[str] = []
    rows, dropped = [0] * len(task.scans), Counter[str]()
    held: list[tuple[int, CleanRow]] = []

    def write_chunk() -> None:
        chunks.append(storage.join(task.work_uri, "rows", f"{task.first_source:05d}-{len(chunks):04d}.arrow"))
        _write_batches(chunks[-1], _ROW_COLUMNS, _row_batches(held, task.buckets))
        held.clear()

    for number, scan in enumerate(task.scans):
        with local_copy(scan.dump.uri) as path:
            reader = read_rows(path, scan.dump.uri, task.columns)
            while batch := list(islice(reader, _CLEANED_AT_ONCE)):
                kept, reasons = cleaner.clean(batch)
                rows[number] += len(batch)
                dropped += reasons
                held.extend((task.first_source + number, row) for row in kept)
                if len(held) >= _CHUNK_ROWS:
                    write_chunk()
    if held:
        write_chunk()
    return Dealt(tuple(chunks), tuple(rows), dropped)


def _row_batches(held: Sequence[tuple[int, CleanRow]], buckets: int) -> Iterator[pa.RecordBatch]:
    dealt: list[list[tuple[int, CleanRow]]] = [[] for _ in range(buckets)]
    for source, row in held:
        dealt[int.from_bytes(row.key[:4]) * buckets >> 32].append((source, row))
    for bucket in dealt:
        columns = (
            [row.key for _, row in bucket],
            [row.text for _, row in bucket],
            [source for source, _ in bucket],
            [row.image_id for _, row in bucket],
        )
        yield _batch(_ROW_COLUMNS, columns)


@dataclass(frozen=True)
class DedupeTask:
    """A bucket to deduplicate, and all chunks in the order of their rows."""

    work_uri: str
    bucket: int
    chunks: tuple[str, ...]


@dataclass(frozen=True)
class Deduped:
    """Counts of one bucket."""

    captions: int
    duplicates: int
    image_pairs: int


def dedupe_bucket(task: DedupeTask) -> Deduped:
    """Writes a bucket's unique captions, sorted by key, and its image hashes."""
    deduplicator = Deduplicator()
    for chunk in task.chunks:
        with open_arrow(chunk) as source:
            batch = pa.ipc.open_file(source).get_batch(task.bucket)
            for key, text, dump, image_id in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                deduplicator.add(key, text, dump, image_id)
    captions = deduplicator.captions()
    _write_batches(_unique_uri(task.work_uri, task.bucket), _UNIQUE_COLUMNS, [_unique_batch(captions)])
    hashes = np.array([_image_hash(image) for caption in captions for image in caption.image_ids], dtype=np.uint64)
    buffer = io.BytesIO()
    np.save(buffer, hashes)
    storage.write_bytes(_images_uri(task.work_uri, task.bucket), buffer.getvalue())
    return Deduped(len(captions), deduplicator.duplicates, len(hashes))


def _unique_batch(captions: Sequence[UniqueCaption]) -> pa.RecordBatch:
    columns = (
        [caption.key for caption in captions],
        [caption.text for caption in captions],
        [caption.source for caption in captions],
        [list(caption.image_ids) or None for caption in captions],
    )
    return _batch(_UNIQUE_COLUMNS, columns)


def _image_hash(image_id: str) -> int:
    return int.from_bytes(blake2b(image_id.encode(), digest_size=8).digest())


@dataclass(frozen=True)
class CountTask:
    """One of `parts` shares of the image hashes to count."""

    work_uri: str
    buckets: int
    part: int
    parts: int


def plan_counting(work_uri: str, deduped: Sequence[Deduped]) -> list[CountTask]:
    """Divides the counting of captions per image so that each task's memory is bounded."""
    parts = 1 + sum(bucket.image_pairs for bucket in deduped) // _IMAGES_PER_COUNT
    return [CountTask(work_uri, len(deduped), part, parts) for part in range(parts)]


def count_captions_per_image(task: CountTask) -> int:
    """Returns the largest number of unique captions that one image of this share has."""
    shares = []
    for bucket in range(task.buckets):
        hashes = np.load(io.BytesIO(storage.read_bytes(_images_uri(task.work_uri, bucket))))
        shares.append(hashes[hashes % np.uint64(task.parts) == task.part])
    _, counts = np.unique(np.concatenate(shares), return_counts=True)
    return int(counts.max(initial=0))


class UniqueCaptions:
    """All unique captions of a build by global id, read from the bucket files; small and picklable itself.

    Args:
        work_uri: The build's work folder.
        counts: Captions of each bucket, in order.
    """

    def __init__(self, work_uri: str, counts: Sequence[int]) -> None:
        self._work_uri = work_uri
        self._bounds = [0, *accumulate(counts)]

    def __len__(self) -> int:
        return self._bounds[-1]

    def read(self, first_id: int, stop_id: int) -> pa.Table:
        """Returns the captions with ids in [first_id, stop_id): key, text, source (dump position), image_id."""
        pieces = []
        bucket = bisect_right(self._bounds, first_id) - 1
        while first_id < stop_id:
            start, stop = self._bounds[bucket], min(stop_id, self._bounds[bucket + 1])
            with open_arrow(_unique_uri(self._work_uri, bucket)) as source:
                batch = pa.ipc.open_file(source).get_batch(0)
                pieces.append(batch.slice(first_id - start, stop - first_id))
            first_id, bucket = stop, bucket + 1
        return pa.Table.from_batches(pieces, _UNIQUE_COLUMNS)


def _unique_uri(work_uri: str, bucket: int) -> str:
    return storage.join(work_uri, "unique", f"bucket-{bucket:05d}.arrow")


def _images_uri(work_uri: str, bucket: int) -> str:
    return storage.join(work_uri, "images", f"bucket-{bucket:05d}.npy")


def _batch(schema: pa.Schema, columns: Iterable[Sequence[object]]) -> pa.RecordBatch:
    arrays = [pa.array(values, field.type) for values, field in zip(columns, schema, strict=True)]
    return pa.record_batch(arrays, schema=schema)


def _write_batches(uri: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Writes an Arrow file through a temporary local one, so that a reader of `uri` sees all of it or nothing."""
    with storage.scratch_folder() as folder:
        path = folder / "batches.arrow"
        with pa.ipc.new_file(str(path), schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        storage.upload(path, uri)
