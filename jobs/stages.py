"""The library's steps as Ray Data callables: fetch and decode, caption, write.

Each stage is a pure function of its rows and of immutable artefacts, so that Ray may repeat it. Only here does a
`RowError` become a row's status, in `error_columns`.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ray.data import Datasink
from ray.data.block import BlockAccessor

from index_builder.tasks import use_own_cores
from jobs.retrieval_actors import PartitionedRetriever, Partitions
from smallcap import storage
from smallcap.captioner import Captioner, CaptionResult, CropPlan, Pixels
from smallcap.config import CaptionConfig
from smallcap.errors import RowError, RunError
from smallcap.process_memory import keep_freed_memory
from smallcap.schema import CAPTION_COLUMNS, STATUS_ERROR, STATUS_OK

Batch = dict[str, np.ndarray]
_FETCHED_TOGETHER = storage.FETCH_CONCURRENCY  # files held in memory at once; their crops are small
# Seconds that a row took in a stage; they travel with the row to the writer, which sums and drops them.
_TIMINGS = ("decode_s", "caption_s")
_BY_PILLOW = "by_pillow"  # 1 where Pillow decoded the image; counted and dropped there, too
_SEARCHED_BY = "searched_by"  # the backend of the actor's search; gathered and dropped there, too
_COLUMNS_FROM_DECODING = ("image_id", "image_uri", "status", "error_code", "error_message")
_MEASURED = pa.schema(
    [
        *(pa.field(name, pa.float32()) for name in _TIMINGS),
        pa.field(_BY_PILLOW, pa.int8()),
        pa.field(_SEARCHED_BY, pa.string()),
    ]
)
_MEASURED_ROW = pa.schema([*CAPTION_COLUMNS, *_MEASURED])


def error_columns(error: RowError | None) -> dict[str, Any]:
    """Returns a row's `status`, `error_code` and `error_message`."""
    if error is None:
        return {"status": STATUS_OK, "error_code": None, "error_message": None}
    return {"status": STATUS_ERROR, "error_code": str(error.code), "error_message": str(error)}


def fetch_and_decode(batch: Batch, plan: CropPlan, max_pixels: int) -> dict[str, Any]:
    """Fetches a batch's images and cuts the crops the model needs; runs in CPU tasks.

    Args:
        batch: `image_id` and `image_uri`.
        plan: The crops.
        max_pixels: Larger images become `too_large` rows.

    Returns:
        Those columns and `width`, `height`, `status`, `error_code`, `error_message`, `decode_s`, `by_pillow`, and
        [B, S, S, 3] uint8 `vision_pixels`, also `retrieval_pixels` where the plan has them. A failed row's pixels are
        zeros.
    """
    started = time.perf_counter()
    uris = [str(uri) for uri in batch["image_uri"]]
    rows: list[Pixels | RowError] = []
    for start in range(0, len(uris), _FETCHED_TOGETHER):
        some = uris[start : start + _FETCHED_TOGETHER]
        fetched = zip(storage.fetch_objects(some), some, strict=True)
        rows += [_decode(data, plan, max_pixels, uri) for data, uri in fetched]
    errors = [error_columns(row if isinstance(row, RowError) else None) for row in rows]
    images = [_blank(plan) if isinstance(row, RowError) else row for row in rows]
    out: dict[str, Any] = {
        "image_id": batch["image_id"],
        "image_uri": batch["image_uri"],
        "width": np.array([image.width for image in images], np.int32),
        "height": np.array([image.height for image in images], np.int32),
        "vision_pixels": np.stack([image.vision for image in images]),
        _BY_PILLOW: np.array([image.by_pillow for image in images], np.int8),
        # "" and not None: Ray would hand a column of nothing but nulls on as floats
        **{name: np.array([error[name] or "" for error in errors]) for name in errors[0]},
    }
    if plan.retrieval:
        out["retrieval_pixels"] = np.stack([image.retrieval for image in images if image.retrieval is not None])
    out["decode_s"] = np.full(len(rows), (time.perf_counter() - started) / len(rows), np.float32)
    return out


def _decode(data: bytes | RowError, plan: CropPlan, max_pixels: int, uri: str) -> Pixels | RowError:
    if isinstance(data, RowError):
        return data
    try:
        return plan.crop(data, max_pixels, uri)
    except RowError as error:
        return error


def _blank(plan: CropPlan) -> Pixels:
    """Returns what stands in a failed row's place, so that a batch's pixels remain one array."""
    vision = np.zeros((plan.vision.size_px, plan.vision.size_px, 3), np.uint8)
    size = plan.retrieval.size_px if plan.retrieval else 0
    return Pixels(vision, np.zeros((size, size, 3), np.uint8) if plan.retrieval else None, 0, 0, by_pillow=False)


@dataclass(frozen=True)
class CaptionerSpec:
    """What an actor needs to load its captioner: the config, and what the driver pinned for the whole run."""

    config: CaptionConfig
    device: str
    dtype: str
    index_id: str | None
    retrieval_encoder: str | None
    batch_size: int  # images that go through the model together
    partitions: Partitions | None = None  # of an index that no actor holds by itself


class CaptionImages:
    """Captions batches of decoded images; one captioner per actor."""

    def __init__(self, spec: CaptionerSpec) -> None:
        use_own_cores()
        keep_freed_memory()
        self.batch_size = spec.batch_size
        self.exclude_own_captions = spec.config.retrieval.exclude_own_captions
        self.captioner: Captioner | RunError
        try:
            self.captioner = _load_captioner(spec)
        except RunError as error:  # kept for the first batch: Ray would call a failing constructor again and again
            self.captioner = error

    def __call__(self, batch: Batch) -> pa.Table:
        """Maps one batch to rows of the newest schema and what was measured of them."""
        if isinstance(self.captioner, RunError):
            raise self.captioner
        started = time.perf_counter()
        good = np.flatnonzero(batch["status"] == STATUS_OK).tolist()
        pixels = [_pixels(batch, row) for row in good]
        exclude = [str(batch["image_id"][row]) for row in good] if self.exclude_own_captions else None
        batches = self.captioner.caption_batches(_split(pixels, exclude, self.batch_size))
        captioned = dict(zip(good, (result for results in batches for result in results), strict=True))
        rows = [_schema_row(batch, row, captioned.get(row)) for row in range(len(batch["image_id"]))]
        seconds = (time.perf_counter() - started) / len(rows)
        retriever = self.captioner.retriever
        of_actor = {"caption_s": seconds, _SEARCHED_BY: retriever.search_backend if retriever else None}
        return pa.Table.from_pylist(
            [
                row | of_actor | {name: batch[name][i] for name in ("decode_s", _BY_PILLOW)}
                for i, row in enumerate(rows)
            ],
            schema=_MEASURED_ROW,
        )


def _split(
    pixels: list[Pixels], exclude: list[str] | None, size: int
) -> Iterator[tuple[list[Pixels], list[str] | None]]:
    """Cuts images, and with them the ids whose captions they must not retrieve, into the model's batches."""
    for start in range(0, len(pixels), size):
        some = slice(start, start + size)
        yield pixels[some], exclude[some] if exclude else None


def _load_captioner(spec: CaptionerSpec) -> Captioner:
    config = spec.config
    cache_dir = config.retrieval.cache_dir
    return Captioner.from_pretrained(
        config.model,
        config.index,
        k=config.retrieval.k,
        generation=config.generation,
        device=spec.device,
        dtype=spec.dtype,
        retrieval_encoder=spec.retrieval_encoder,
        cache_dir=cache_dir,
        index_id=spec.index_id,
        compile_encoders=config.compute.compile,
        search_device=config.retrieval.search_device,
        retriever=PartitionedRetriever.open(spec.partitions, cache_dir) if spec.partitions else None,
    )


def _pixels(batch: Batch, row: int) -> Pixels:
    retrieval = batch["retrieval_pixels"][row] if "retrieval_pixels" in batch else None
    return Pixels(batch["vision_pixels"][row], retrieval, int(batch["width"][row]), int(batch["height"][row]))


def _schema_row(batch: Batch, row: int, result: CaptionResult | None) -> dict[str, Any]:
    """Returns one row of the newest schema; a failed image has no result."""
    columns = {name: batch[name][row] or None for name in _COLUMNS_FROM_DECODING}
    if result is None:
        return columns
    return columns | {
        "width": result.width,
        "height": result.height,
        "caption": result.caption,
        "caption_logprob": result.logprob,
        "caption_tokens": result.num_tokens,
        "clip_score": result.clip_score,
        "alternatives": [
            {"caption": other.caption, "logprob": other.logprob, "tokens": other.num_tokens}
            for other in result.alternatives
        ],
        "neighbours": [{"caption_id": n.caption_id, "text": n.text, "score": n.score} for n in result.neighbours],
    }


@dataclass(frozen=True)
class PartStats:
    """What one write task wrote."""

    rows: int
    decode_s: float  # CPU task seconds, summed over the rows
    caption_s: float  # actor seconds, summed over the rows
    by_pillow: int  # images that Pillow decoded
    searched_by: frozenset[str] = frozenset()  # backends of the actors' searches


class PartSink(Datasink[PartStats]):
    """Writes parts: sorted by id, atomically, under names that a repeated task overwrites.

    Attributes:
        totals: After the write, the sums over all tasks.
    """

    def __init__(self, out: str, schema: pa.Schema, attempt: int, rows_per_part: int, rows_per_row_group: int) -> None:
        self.out, self.schema, self.attempt = out, schema, attempt
        self.rows_per_part, self.rows_per_row_group = rows_per_part, rows_per_row_group
        self.totals = PartStats(0, 0.0, 0.0, 0)

    def write(self, blocks: Iterable[Any], ctx: Any) -> PartStats:
        """Writes one task's blocks as one part."""
        tables = [BlockAccessor.for_block(block).to_arrow() for block in blocks]
        table = pa.concat_tables(table for table in tables if table.num_rows) if any(map(len, tables)) else None
        if table is None:
            return PartStats(0, 0.0, 0.0, 0)
        decode_s, caption_s = (float(np.sum(table[name].to_numpy())) for name in _TIMINGS)
        rows = table.select(self.schema.names).cast(self.schema).sort_by("image_id")
        buffer = io.BytesIO()
        pq.write_table(rows, buffer, row_group_size=self.rows_per_row_group, compression="zstd")
        name = f"part-{self.attempt:03d}-{ctx.task_idx:06d}.parquet"
        storage.write_bytes(storage.join(self.out, name), buffer.getvalue())
        by_pillow = int(np.sum(table[_BY_PILLOW].to_numpy()))
        searched_by = frozenset(table[_SEARCHED_BY].drop_null().unique().to_pylist())
        return PartStats(rows.num_rows, decode_s, caption_s, by_pillow, searched_by)

    def on_write_complete(self, write_result: Any) -> None:
        """Sums what the tasks report, on the driver."""
        parts = write_result.write_returns
        self.totals = PartStats(
            sum(part.rows for part in parts),
            sum(part.decode_s for part in parts),
            sum(part.caption_s for part in parts),
            sum(part.by_pillow for part in parts),
            frozenset().union(*(part.searched_by for part in parts)),
        )

    @property
    def min_rows_per_write(self) -> int:
        """How many rows Ray gathers for one part."""
        return self.rows_per_part
