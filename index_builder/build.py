"""Builds and publishes an index: scan, clean, dedupe, embed, shard, verify, publish.

The driver holds plans and counts, never texts or vectors. Stages meet in files below the index's staging folder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeVar

from index_builder.buckets import (
    Dealt,
    Deduped,
    DedupeTask,
    UniqueCaptions,
    count_captions_per_image,
    deal_rows,
    dedupe_bucket,
    plan_buckets,
    plan_counting,
    plan_dealing,
)
from index_builder.cleaning import RULES_VERSION
from index_builder.dump_formats import Columns
from index_builder.dumps import DumpScan, find_dumps, scan_dump
from index_builder.embedding import EmbedParts, VectorParts
from index_builder.publish import Staging, load_current, publish_version
from index_builder.sharding import ShardTask, WrittenShard, plan_shards, shard_memory_bytes, write_shard, write_template
from index_builder.tasks import node_resources, run_actors, run_tasks
from index_builder.verification import VerifyTask, draw_sample, measure_recall, verify_shard
from smallcap import storage
from smallcap.actor_plan import plan_actors
from smallcap.config import IndexConfig
from smallcap.errors import ConfigError
from smallcap.index_manifest import EncoderIdentity, IndexManifest, SourceEntry, utc_now

Result = TypeVar("Result")

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, and how many of how many units of it are done."""


@dataclass(frozen=True)
class BuildReport:
    """What a build did.

    Attributes:
        manifest: Of the version that is now current.
        index_uri: Where it is published.
        seconds: Wall time of each stage, in their order.
        no_op: The current version had been built from the same dumps with the same options, so nothing was done.
    """

    manifest: IndexManifest
    index_uri: str
    seconds: dict[str, float]
    no_op: bool


def build_index(config: IndexConfig, progress: Progress | None = None) -> BuildReport:
    """Builds an index from caption dumps and publishes it as the current version; Ray must be connected.

    A build that fails or dies leaves the former version current and untouched.

    Raises:
        ConfigError: There are no dumps, or no caption passes the filters.
        SchemaError: A dump cannot be read, or lacks the text column.
        CheckpointError: The encoder or the tokenizer cannot be found or loaded.
        StorageError: A dump or the index's folder cannot be read or written.
        IndexIntegrityError: The staged files are not what was written.
    """
    return _Build(config, progress or _ignore).run()


def _ignore(stage: str, done: int, total: int) -> None:
    """The progress of a caller that wants none."""


class _Build:
    """One build's options and clock; each stage is a method."""

    def __init__(self, config: IndexConfig, progress: Progress) -> None:
        self._config = config
        self._progress = progress
        self._index_uri = storage.absolute(config.out)
        self._columns = Columns(config.text_column, config.image_id_column)
        self._dtype = "float32" if config.compute.dtype == "auto" else config.compute.dtype
        self._seconds: dict[str, float] = {}

    def run(self) -> BuildReport:
        from smallcap.clip_encoder import resolve_encoder_identity  # loads torch

        current = load_current(self._index_uri)
        identity = resolve_encoder_identity(self._config.encoder)
        scans = self._scan()
        if current is not None and self._is_same(current, scans, identity):
            return BuildReport(current, self._index_uri, self._seconds, no_op=True)
        with Staging(self._index_uri) as staging:
            dealt, deduped = self._clean(scans, staging), []
            if any(part.chunks for part in dealt):
                deduped = self._dedupe(scans, dealt, staging)
            dropped = _count_dropped(dealt, deduped)
            captions = UniqueCaptions(staging.work_uri, [bucket.captions for bucket in deduped])
            if not len(captions):
                raise ConfigError(
                    "No caption of the dumps passes the filters.",
                    where=", ".join(self._config.dumps),
                    found=", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "no rows",
                    remedy="Check --text-column and the cleaning options.",
                )
            most = self._count_images(deduped, staging)
            vectors = self._embed(captions, identity, staging)
            shards = self._shard(captions, vectors, scans, staging)
            draft = IndexManifest(
                encoder=identity,
                dim=identity.dim,
                index_key=self._index_key,
                template=write_template(staging.version_uri, identity.dim),
                shards=tuple(shard.vectors for shard in shards),
                captions=tuple(shard.captions for shard in shards),
                max_captions_per_image=most,
                sources=_sources(scans, dealt),
                filters=self._filters(),
                dropped=dropped,
                embedding_dtype=self._dtype,
                builder_version=version("smallcap"),
                created_at=utc_now(),
            )
            manifest = self._verify(draft, vectors, staging).with_index_id()
            with self._stage("publish"):
                publish_version(self._index_uri, staging, manifest)
        return BuildReport(manifest, self._index_uri, self._seconds, no_op=False)

    @property
    def _index_key(self) -> str:
        return "Flat" if self._config.index_key == "auto" else self._config.index_key

    def _filters(self) -> dict[str, Any]:
        return {
            "rules": RULES_VERSION,
            "text_column": self._config.text_column,
            "image_id_column": self._config.image_id_column,
            **self._config.cleaning.model_dump(mode="json"),
        }

    def _is_same(self, current: IndexManifest, scans: Sequence[DumpScan], identity: EncoderIdentity) -> bool:
        """Says whether this build would make the current version again."""
        return (
            current.encoder.weights_sha256 == identity.weights_sha256
            and current.embedding_dtype == self._dtype
            and current.index_key == self._index_key
            and current.filters == self._filters()
            and len(current.shards) == len(plan_shards(current.ntotal, self._config.shards))
            and [(source.uri, source.sha256) for source in current.sources]
            == [(scan.dump.uri, scan.sha256) for scan in scans]
        )

    def _scan(self) -> list[DumpScan]:
        with self._stage("scan"):
            tasks = [(dump, self._columns) for dump in find_dumps(self._config.dumps)]
            return self._collect("scan", run_tasks(scan_dump, tasks), len(tasks))

    def _clean(self, scans: Sequence[DumpScan], staging: Staging) -> list[Dealt]:
        with self._stage("clean"):
            tasks = plan_dealing(scans, staging.work_uri, self._columns, self._config.cleaning)
            return self._collect("clean", run_tasks(deal_rows, tasks), len(tasks))

    def _dedupe(self, scans: Sequence[DumpScan], dealt: Sequence[Dealt], staging: Staging) -> list[Deduped]:
        with self._stage("dedupe"):
            chunks = tuple(chunk for part in dealt for chunk in part.chunks)
            tasks = [DedupeTask(staging.work_uri, bucket, chunks) for bucket in range(plan_buckets(scans))]
            return self._collect("dedupe", run_tasks(dedupe_bucket, tasks), len(tasks))

    def _count_images(self, deduped: Sequence[Deduped], staging: Staging) -> int:
        with self._stage("count images"):
            tasks = plan_counting(staging.work_uri, deduped)
            return max(self._collect("count images", run_tasks(count_captions_per_image, tasks), len(tasks)))

    def _embed(self, captions: UniqueCaptions, identity: EncoderIdentity, staging: Staging) -> VectorParts:
        with self._stage("embed"):
            vectors = VectorParts(staging.work_uri, len(captions), identity.dim)
            plan = plan_actors(self._config.compute, node_resources())
            arguments = (self._config.encoder, plan.device, self._dtype, captions, staging.work_uri)
            done = 0
            for _, rows in run_actors(EmbedParts, arguments, range(vectors.count), plan):
                done += rows
                self._progress("embed", done, len(captions))
            return vectors

    def _shard(
        self, captions: UniqueCaptions, vectors: VectorParts, scans: Sequence[DumpScan], staging: Staging
    ) -> list[WrittenShard]:
        with self._stage("shard"):
            names = tuple(scan.dump.name for scan in scans)
            ranges = plan_shards(len(captions), self._config.shards)
            tasks = [
                ShardTask(number, first_id, stop_id, staging.version_uri, captions, vectors, names)
                for number, (first_id, stop_id) in enumerate(ranges)
            ]
            memory = shard_memory_bytes(ranges, vectors.dim)
            return self._collect("shard", run_tasks(write_shard, tasks, memory), len(tasks))

    def _verify(self, draft: IndexManifest, vectors: VectorParts, staging: Staging) -> IndexManifest:
        with self._stage("verify"):
            sample = draw_sample(vectors, draft.ntotal)
            tasks = [
                VerifyTask(staging.version_uri, draft.index_key, shard, captions, vectors, sample)
                for shard, captions in zip(draft.shards, draft.captions, strict=True)
            ]
            checks = self._collect("verify", run_tasks(verify_shard, tasks), len(tasks))
            return draft.model_copy(update={"recall": measure_recall(checks, sample)})

    def _collect(self, stage: str, results: Iterable[tuple[int, Result]], total: int) -> list[Result]:
        """Gathers results in the order of their tasks, telling the caller of each."""
        found: dict[int, Result] = {}
        for position, result in results:
            found[position] = result
            self._progress(stage, len(found), total)
        return [found[position] for position in range(total)]

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[name] = time.perf_counter() - start


def _count_dropped(dealt: Sequence[Dealt], deduped: Sequence[Deduped]) -> dict[str, int]:
    dropped = {"duplicate": sum(bucket.duplicates for bucket in deduped)}
    for part in dealt:
        for reason, count in part.dropped.items():
            dropped[reason] = dropped.get(reason, 0) + count
    return dict(sorted(dropped.items()))


def _sources(scans: Sequence[DumpScan], dealt: Sequence[Dealt]) -> tuple[SourceEntry, ...]:
    rows = [count for part in dealt for count in part.rows]
    return tuple(
        SourceEntry(uri=scan.dump.uri, rows=count, sha256=scan.sha256) for scan, count in zip(scans, rows, strict=True)
    )
