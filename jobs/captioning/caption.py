"""The second stage, in actors: captions the crops that `jobs.captioning.load` cuts."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.captioning.layout import CaptionLayout
from jobs.captioning.load import RETRIEVAL_PIXELS, VISION_PIXELS
from jobs.captioning.monitor import MonitorClient
from jobs.captioning.retrieval_actors import PartitionedRetriever, Partitions
from jobs.captioning.stage_report import StageReport
from jobs.cluster.errors import GuardedActor
from jobs.cluster.resources import limit_torch_threads
from smallcap.batch_size import largest_batch_here
from smallcap.captioner import Captioner, CaptionResult
from smallcap.config import CaptionConfig
from smallcap.images.crops import Pixels
from smallcap.index.manifest import load_manifest
from smallcap.index.node_cache import missing_files
from smallcap.index.partition import files_of
from smallcap.machine.process_memory import keep_freed_memory
from smallcap.output.schema import CAPTION_COLUMNS, EMBEDDING_COLUMN, STATUS_OK

_FROM_LOADING = ("image_id", "image_uri", "status", "error_code", "error_message")
_FROM_CAPTIONING = pa.schema([field for field in CAPTION_COLUMNS if field.name not in _FROM_LOADING])


@dataclass(frozen=True)
class CaptionerSpec:
    """What an actor needs to load its captioner: the config, and what the driver pinned for the whole run."""

    config: CaptionConfig
    layout: CaptionLayout
    index_id: str | None
    retrieval_encoder: str | None
    monitor: MonitorClient
    partitions: Partitions | None = None  # of an index that no actor holds alone


class CaptionImages(GuardedActor):
    """Captions batches of decoded images; one captioner per actor."""

    def load(self, spec: CaptionerSpec) -> None:
        """Loads the captioner, and reports that the actor is ready."""
        started = time.perf_counter()
        limit_torch_threads()
        keep_freed_memory()
        self.limit_stalls(spec.config.compute.stall_timeout_s)
        self._monitor, self._embeds = spec.monitor, spec.config.output.save_embeddings
        self._name = uuid.uuid4().hex
        self._excludes = spec.config.retrieval.exclude_own_captions
        _count_cached_files(spec)
        self._captioner = _load_captioner(spec)
        self._batch_size = spec.layout.batch_size
        if spec.config.compute.batch_size == "auto":
            self._batch_size = min(self._batch_size, largest_batch_here(self._captioner, spec.layout.actors_on_device))
        start_s = time.perf_counter() - started
        spec.monitor.report(StageReport(stage="caption", start_s=start_s, worker=self._name))

    def process(self, batch: pa.Table) -> pa.Table:
        """Maps a batch of `load_images` to rows of the newest schema and the further columns that the writer needs."""
        started = time.perf_counter()
        good = np.flatnonzero(pc.equal(batch["status"], STATUS_OK).to_numpy()).tolist()
        pixels = pixels_of(batch, good)
        exclude = [batch["image_id"][row].as_py() for row in good] if self._excludes else None
        batches = self.note_each(self._captioner.caption_batches(_split(pixels, exclude, self._batch_size)))
        captioned = dict(zip(good, (result for results in batches for result in results), strict=True))
        results = [captioned.get(row) for row in range(len(batch))]
        table = self._table(batch, results)
        self._report(list(captioned.values()), len(batch), started)
        return table

    def _table(self, batch: pa.Table, results: list[CaptionResult | None]) -> pa.Table:
        rows = [_caption_columns(result) if result else {} for result in results]
        table = pa.Table.from_pylist(rows, schema=_FROM_CAPTIONING)
        for name in batch.column_names:
            if name not in (VISION_PIXELS, RETRIEVAL_PIXELS, "width", "height"):
                table = table.append_column(batch.schema.field(name), batch[name])
        if self._embeds:
            vectors = [
                result.embedding.astype(np.float16) if result and result.embedding is not None else None
                for result in results
            ]
            table = table.append_column(EMBEDDING_COLUMN, pa.array(vectors, pa.list_(pa.float16())))
        return table

    def _report(self, results: list[CaptionResult], images: int, started: float) -> None:
        retriever = self._captioner.retriever
        report = StageReport(
            stage="caption",
            images=images,
            seconds=time.perf_counter() - started,
            worker=self._name,
            tokens=sum(result.num_tokens or 0 for result in results),
            searched_by=frozenset([retriever.search_backend] if retriever else []),
        )
        self._monitor.report(report, [result.neighbours[0].score for result in results if result.neighbours])


def _split(
    pixels: list[Pixels], exclude: list[str] | None, size: int
) -> Iterator[tuple[list[Pixels], list[str] | None]]:
    """Cuts images, and with them the ids whose captions they must not retrieve, into the model's batches."""
    for start in range(0, len(pixels), size):
        batch = slice(start, start + size)
        yield pixels[batch], exclude[batch] if exclude else None


def _count_cached_files(spec: CaptionerSpec) -> None:
    """Tells the metrics how many index files this node has already."""
    index, cache_dir = spec.config.index, spec.config.retrieval.cache_dir
    if spec.index_id is None or index is None or spec.partitions is not None:
        return
    manifest = load_manifest(index, spec.index_id)
    files = files_of(manifest)
    misses = len(missing_files(index, manifest, cache_dir, files))
    spec.monitor.record_index_cache(len(files) - misses, misses)


def _load_captioner(spec: CaptionerSpec) -> Captioner:
    config = spec.config
    cache_dir = config.retrieval.cache_dir
    return Captioner.from_pretrained(
        config.model,
        PartitionedRetriever.open(spec.partitions, cache_dir) if spec.partitions else config.index,
        **config.generation.model_dump(),
        k=config.retrieval.k,
        device=spec.layout.actors.device,
        dtype=spec.layout.actors.dtype,
        retrieval_encoder=spec.retrieval_encoder,
        cache_dir=cache_dir,
        index_id=spec.index_id,
        compile_encoders=config.compute.compile,
        search_device=config.retrieval.search_device,
        clip_score=config.output.clip_score,
    )


def pixels_of(batch: pa.Table, rows: Sequence[int]) -> list[Pixels]:
    """Returns the crops of the given rows of a batch of `load_images`, as views into the batch."""
    vision = _tensor(batch[VISION_PIXELS])
    retrieval = _tensor(batch[RETRIEVAL_PIXELS]) if RETRIEVAL_PIXELS in batch.column_names else None
    widths, heights = batch["width"].to_pylist(), batch["height"].to_pylist()
    return [
        Pixels(vision[row], None if retrieval is None else retrieval[row], widths[row], heights[row]) for row in rows
    ]


def _tensor(column: pa.ChunkedArray) -> np.ndarray:
    """Returns a tensor column as [B, S, S, 3]; copies only where it has several chunks."""
    chunks = [chunk.to_numpy_ndarray() for chunk in column.chunks]
    return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)


def _caption_columns(result: CaptionResult) -> dict[str, Any]:
    """Returns the columns that captioning adds to a row."""
    return {
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
