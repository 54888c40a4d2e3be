"""The second stage, in actors: captions the crops that `jobs.captioning.load` cuts.

torch and faiss are imported only in the actors: the driver, which sends this module to them, needs neither.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING

import pyarrow as pa

from jobs.captioning.distinct_rows import ranges_of
from jobs.captioning.layout import CaptionLayout
from jobs.captioning.monitor import MonitorClient
from jobs.captioning.stage_report import StageReport
from jobs.cluster.errors import GuardedActor
from jobs.cluster.resources import use_threads
from smallcap.config import CaptionConfig
from smallcap.index.manifest import load_manifests
from smallcap.index.node_cache import missing_files
from smallcap.machine.process_memory import keep_freed_memory
from smallcap.output.schema import FRAGMENT, FRAGMENT_ROW

if TYPE_CHECKING:
    from jobs.captioning.caption_table import TableCaptioner
    from jobs.captioning.retrieval_actors import Partitions
    from smallcap.captioned import CaptionedBatch
    from smallcap.captioner import Captioner
    from smallcap.captioner_setup import CaptionerOptions
    from smallcap.index.merged import CaptionSearch

# Takes a table of `load_images`; returns its captioned rows, and what became of the images by each captioner.
TableFunction = Callable[[pa.Table], "tuple[pa.Table, *tuple[CaptionedBatch, ...]]"]


@dataclass(frozen=True)
class CaptionerSpec:
    """What an actor needs to load its captioner: the config, and what the driver pinned for the whole run."""

    config: CaptionConfig
    layout: CaptionLayout
    index_id: str | None
    retrieval_encoder: str | None
    monitor: MonitorClient
    partitions: tuple[Partitions, ...] = ()  # of the indexes, where no actor is to hold them alone


class CaptionImages(GuardedActor):
    """Captions batches of decoded images; one captioner per actor."""

    def load(self, spec: CaptionerSpec) -> None:
        """Loads the captioner, and reports that the actor is ready."""
        started = time.perf_counter()
        from jobs.captioning.caption_table import TableCaptioner
        from smallcap.batch_size import largest_batch_here
        from smallcap.index.merged import MergedSearch
        from smallcap.index.retriever import Retriever
        from smallcap.machine.gpu_memory import limit_to_share

        threads = use_threads(spec.layout.actors.threads)
        if spec.layout.actors.device == "cuda":
            limit_to_share(spec.layout.gpu_share)
        keep_freed_memory()
        self.limit_stalls(spec.config.compute.stall_timeout_s)
        self._monitor, self._name = spec.monitor, uuid.uuid4().hex
        self._busy, self._halvings = BusyTime(), Growth()
        _count_cached_files(spec)
        captioners = self.load_captioners(spec)
        self._captioner = captioners[0]
        if isinstance(self._captioner.retriever, Retriever | MergedSearch):
            self._captioner.retriever.use_threads(threads)
        batch_size = spec.layout.batch_size
        if spec.config.compute.batch_size == "auto":
            batch_size = min(batch_size, *(largest_batch_here(one, spec.layout.actors_on_node) for one in captioners))
        tables = [
            TableCaptioner(
                captioner,
                batch_size,
                exclude_own=spec.config.retrieval.exclude_own_captions,
                embeds=spec.config.output.save_embeddings,
                score_column=spec.config.score_column,
                note_batch=self.note_progress,
            )
            for captioner in captioners
        ]
        self._tables = self.join_tables(tables)
        start_s = time.perf_counter() - started
        dtypes = frozenset([str(self._captioner.model.dtype).removeprefix("torch.")])
        spec.monitor.report(StageReport(stage="caption", start_s=start_s, worker=self._name, dtypes=dtypes))

    def load_captioners(self, spec: CaptionerSpec) -> Sequence[Captioner]:
        """Loads what captions the images."""
        return [_load_captioner(spec)]

    def join_tables(self, tables: Sequence[TableCaptioner]) -> TableFunction:
        """Returns what captions tables with the captioners that were loaded."""
        (table,) = tables
        return table

    def process(self, batch: pa.Table) -> pa.Table:
        """Maps a batch of `load_images` to rows of the newest schema and the further columns that the writer needs.

        Several threads may call it: on a GPU, one call's batches are prepared while another's are decoded.
        """
        self._busy.begin()
        table, *captioned = self._tables(batch)
        retriever, neighbours = self._captioner.retriever, captioned[0].neighbours
        report = StageReport(
            stage="caption",
            images=len(batch),
            rows=ranges_of(batch[FRAGMENT].to_numpy(), batch[FRAGMENT_ROW].to_numpy()),
            seconds=self._busy.end(),
            halvings=self._halvings.new(self._captioner.halvings),
            worker=self._name,
            tokens=sum(int(one.captions.num_tokens[:, 0].sum()) for one in captioned),
            searched_by=frozenset([retriever.search_backend] if retriever else []),
        )
        self._monitor.report(report, neighbours.scores[:, :1][neighbours.found[:, :1]].tolist())
        return table


class BusyTime:
    """Shares out among calls the time in which an actor is busy; what several calls have in common counts once."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._calls = 0
        self._counted_to = 0.0

    def begin(self) -> None:
        """Notes that a call begins."""
        with self._lock:
            if not self._calls:
                self._counted_to = time.perf_counter()
            self._calls += 1

    def end(self) -> float:
        """Notes that a call ends; returns the seconds of busy time that no call before it was given."""
        with self._lock:
            self._calls -= 1
            now = time.perf_counter()
            seconds, self._counted_to = now - self._counted_to, now
            return seconds


class Growth:
    """Shares out among calls by how much a count has grown."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._before = 0

    def new(self, count: int) -> int:
        """Returns what of a count no call before it was given."""
        with self._lock:
            grown = max(0, count - self._before)  # another thread may have read a later count first
            self._before += grown
            return grown


def _count_cached_files(spec: CaptionerSpec) -> None:
    """Tells the metrics how many index files this node has already."""
    if spec.index_id is None or spec.partitions:
        return
    from smallcap.index.partition import files_of

    for index, manifest in zip(spec.config.index, load_manifests(spec.config.index, spec.index_id), strict=True):
        files = files_of(manifest)
        misses = len(missing_files(index, manifest, spec.config.retrieval.cache_dir, files))
        spec.monitor.record_index_cache(len(files) - misses, misses)


def _load_captioner(spec: CaptionerSpec) -> Captioner:
    from smallcap.captioner import Captioner

    return Captioner.from_pretrained(spec.config.model, open_index(spec), captioner_options(spec.config, spec))


def open_index(spec: CaptionerSpec) -> Sequence[str] | CaptionSearch | None:
    """Returns what an actor searches: URIs of indexes, or their partitions, which other actors hold."""
    from jobs.captioning.retrieval_actors import open_partitioned

    config = spec.config
    cache_dir = config.retrieval.cache_dir
    return open_partitioned(spec.partitions, config.indexes, cache_dir) if spec.partitions else config.index or None


def captioner_options(config: CaptionConfig, spec: CaptionerSpec) -> CaptionerOptions:
    """Returns how to load and to caption as a config says, and as was pinned for the whole run."""
    from smallcap.captioner_setup import CaptionerOptions

    return CaptionerOptions(
        **config.generation.model_dump(),
        k=config.retrieval.k,
        device=spec.layout.actors.device,
        dtype=spec.layout.actors.dtype,
        retrieval_encoder=spec.retrieval_encoder,
        cache_dir=config.retrieval.cache_dir,
        index_id=spec.index_id,
        index_names=config.retrieval.index_names,
        index_weights=config.retrieval.index_weights,
        compile_encoders=config.compute.compile,
        search_device=config.retrieval.search_device,
        clip_score=config.output.clip_score,
    )
