"""Builds an index, or adds to one: scan, clean, dedupe, embed, train, shard, verify, calibrate, publish.

The driver holds plans and counts, never texts or vectors. Stages exchange files below the build's staging folder. They
record there what they have finished, so that a build that was stopped resumes where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from index_builder.dumps.cleaning import RULES_VERSION, describe_filters
from index_builder.dumps.files import check_columns, find_dumps, scan_dump
from index_builder.embedding.encoding import Encoding
from index_builder.embedding.image_queries import plan_image_queries
from index_builder.embedding.slices import VectorSlices
from index_builder.gathering import GatheredCaptions, gather_captions, most_captions_per_image
from index_builder.inputs import open_inputs, resolve_encoder
from index_builder.plan import IndexPlan, check_trainable, plan_index, plan_shards, with_open_nlist
from index_builder.recall.calibration import Calibration
from index_builder.recall.measurement import Embeddings
from index_builder.shards.filling import GrowTask, ShardTask, WrittenShard, grow_captions, write_shard
from index_builder.shards.template import (
    TrainTask,
    check_index_key,
    least_training_rows,
    make_index,
    train_template,
)
from index_builder.stored import StoredIndex
from index_builder.versions.publish import load_current, publish_version
from index_builder.versions.removal import draft_removal
from index_builder.work.stage_runner import Progress, Sizes, StageRunner
from index_builder.work.staging import Staging
from index_builder.work.task_runner import LocalRunner, TaskRunner
from smallcap import storage
from smallcap.captions.rows import CaptionColumns
from smallcap.config import IndexConfig
from smallcap.index.manifest import FileEntry, IndexManifest, ShardEntry, utc_now
from smallcap.model.encoder_spec import check_encoder_spec
from smallcap.tables import announce

DEFAULT_RECALL = 0.99  # of recall@4


@dataclass(frozen=True)
class BuildReport:
    """What a build did.

    Attributes:
        manifest: The manifest of the version that is now current.
        index_uri: Where it is published.
        seconds: Wall time of each stage, in the order of the stages.
        no_op: Whether the current version already was what was asked for, so that nothing was done.
        new_captions: How many captions this build added.
        embedded: How many of the new captions were embedded by this build.
    """

    manifest: IndexManifest
    index_uri: str
    seconds: dict[str, float]
    no_op: bool
    new_captions: int = 0
    embedded: int = 0


@dataclass(frozen=True)
class BuildPlan:
    """What a build would do: the result of a dry run.

    Attributes:
        index_uri: Where the index would be published.
        rows: How many rows the dumps have.
        dropped: How many rows would be left out, by reason.
        new_captions: How many captions would be added.
        to_embed: How many of them have no embedding yet.
        embed_s: Estimated seconds to embed them on this cluster, from a calibration batch.
        index: Key, lists, training sample, shards, and their memory.
    """

    index_uri: str
    rows: int
    dropped: dict[str, int]
    new_captions: int
    to_embed: int
    embed_s: float
    index: IndexPlan


def build_index(config: IndexConfig, runner: TaskRunner | None = None, progress: Progress | None = None) -> BuildReport:
    """Builds an index from caption dumps, or changes one, and publishes it as the current version.

    A build that fails or dies leaves the former version current and untouched. The same call resumes it.

    Args:
        config: What to build or change.
        runner: Where work items run; by default this process. `jobs.cluster.tasks.RayRunner` runs them on a cluster.
        progress: A function that is told how far each stage is.

    Raises:
        ConfigError: The options contradict the index, there are no dumps, or no caption passes the filters.
        SchemaError: A dump cannot be read, or lacks the text column.
        CheckpointError: The encoder or the tokenizer cannot be found or loaded.
        StorageError: A dump or the index's folder cannot be read or written.
        ConflictError: The same build is already running, or another one has published in the meantime.
        IndexIntegrityError: The files do not hold what was written.
        RunError: The index misses its recall target.
    """
    return Build(config, runner, progress).run()


def _ignore(stage: str, done: int, total: int) -> None:
    """Ignores progress, for callers that want none."""


class Build:
    """One build's options and inputs; each stage is a method. The constructor only finds wrong options.

    Args:
        config: See `build_index`.
        runner: See `build_index`.
        progress: See `build_index`.

    Raises:
        ConfigError: The options contradict the index, or there are no dumps.
        CheckpointError: The encoder or the tokenizer cannot be found.
        StorageError: A dump does not exist, or cannot be listed.
        ManifestError, IndexIntegrityError: An index does not exist, or was made by another encoder.
    """

    def __init__(self, config: IndexConfig, runner: TaskRunner | None = None, progress: Progress | None = None) -> None:
        self._config = config
        self._index_uri = storage.absolute(config.out)
        if config.encoder is not None:
            check_encoder_spec(config.encoder)
        self._current = load_current(self._index_uri)
        self._inputs = open_inputs(config, self._index_uri, self._current)
        self._dumps = find_dumps(config.dumps) if config.dumps else []
        columns = CaptionColumns(config.text_column, config.image_id_column, embedding=config.embedding_column)
        check_columns(self._dumps, columns)
        images, queries = config.recall.calibration_images, 2 * config.recall.queries
        self._image_queries = plan_image_queries(images, queries) if images else []
        identity = resolve_encoder(config, self._inputs)
        if self._inputs.base is None:
            check_index_key(config.index_key, identity.dim)
        dtype = "float32" if config.compute.dtype == "auto" else config.compute.dtype
        self._runner = StageRunner(runner or LocalRunner(), config.compute, progress or _ignore)
        self._encoding = Encoding(identity, dtype, self._runner, config.cache_dir)
        self._columns = columns._replace(dim=identity.dim)
        self._filters = {  # read once: if the blocklist changes meanwhile, the manifest must not contradict itself
            "rules": RULES_VERSION,
            "text_column": config.text_column,
            "image_id_column": config.image_id_column,
            **describe_filters(config.cleaning),
        }

    def run(self) -> BuildReport:
        """Builds, adds or removes, and publishes; see `build_index`."""
        return self._remove() if self._config.remove else self._build()

    def _build(self) -> BuildReport:
        self._scan()
        base = self._inputs.base
        known = {(source.uri, source.sha256) for source in base.manifest.sources} if base else set()
        added_before = base is not None and not self._inputs.indexes
        if added_before and all((scan.dump.uri, scan.sha256) in known for scan in self._inputs.scans):
            return self._no_op()
        if self._current is not None and (
            self._current.fingerprint == self._version_fingerprint() or self._is_compact()
        ):
            return self._no_op()
        with Staging(self._index_uri, self._files_fingerprint()) as staging:
            gathered = self._gather(staging)
            if base is not None and gathered.changes_nothing:
                return self._no_op()
            draft, embeddings = self._fill(gathered, staging)
            manifest = self._calibrate(draft, embeddings)
            with self._runner.stage("publish"):
                publish_version(self._index_uri, manifest, self._current.index_id if self._current else None)
        new = len(gathered.captions)
        return BuildReport(manifest, self._index_uri, self._runner.seconds, False, new, gathered.to_embed)

    def plan(self) -> BuildPlan:
        """Cleans and counts the captions, and returns what `run` would do with them; nothing is published or kept.

        Raises:
            ConfigError, SchemaError, CheckpointError, StorageError: See `build_index`.
        """
        self._scan()
        with Staging(self._index_uri, self._files_fingerprint()) as staging:
            gathered = self._gather(staging)
            index = self._plan_index(len(gathered.captions))
            with self._runner.stage("calibrate"):
                embed_s = self._encoding.estimate_seconds(gathered.captions, gathered.to_embed)
        new, to_embed = len(gathered.captions), gathered.to_embed
        return BuildPlan(self._index_uri, sum(gathered.rows), gathered.dropped, new, to_embed, embed_s, index)

    def _remove(self) -> BuildReport:
        """Removes what the config names from the current version."""
        base = self._inputs.base
        assert base is not None
        draft = draft_removal(base, self._config.remove, self._runner)
        if draft is None:
            return self._no_op()
        manifest = self._calibrate(draft, [Embeddings(None)] * len(draft.shards))
        with self._runner.stage("publish"):
            publish_version(self._index_uri, manifest, base.manifest.index_id)
        return BuildReport(manifest, self._index_uri, self._runner.seconds, no_op=False)

    def _no_op(self) -> BuildReport:
        assert self._current is not None
        return BuildReport(self._current, self._index_uri, self._runner.seconds, no_op=True)

    def _is_compact(self) -> bool:
        """Returns whether a compaction would only rewrite what is there."""
        current, config = self._current, self._config
        assert current is not None
        is_whole = current.operation == "build" and current.removed is None
        return config.compact and is_whole and config.index_key == "auto" and config.shards == "auto"

    def _options(self) -> dict[str, Any]:
        config = self._config
        return {
            "filters": self._filters,
            "embedding_column": config.embedding_column,
            "index_key": config.index_key,
            "shards": config.shards,
            "memory_budget_gb": config.memory_budget_gb,
            "dtype": self._encoding.dtype,
        }

    def _files_fingerprint(self) -> str:
        """Returns the fingerprint of everything that decides the index's files."""
        return self._inputs.fingerprint(self._encoding.encoder, self._options())

    def _version_fingerprint(self) -> str:
        """Returns the fingerprint of everything that decides the version: its files, and how they are searched."""
        recall = self._config.recall.model_dump(mode="json", exclude={"accept"})
        return hashlib.sha256(json.dumps([self._files_fingerprint(), recall]).encode()).hexdigest()

    def _scan(self) -> None:
        scans = self._runner.run("scan", scan_dump, [(dump, self._columns) for dump in self._dumps])
        self._inputs = replace(self._inputs, scans=tuple(scans))
        for note in filter(None, (scan.note for scan in scans)):
            announce(note)

    def _gather(self, staging: Staging) -> GatheredCaptions:
        return gather_captions(self._config, self._inputs, self._columns, self._encoding.encoder, staging, self._runner)

    def _plan_index(self, new_captions: int) -> IndexPlan:
        base, index_key = self._inputs.base, self._config.index_key
        budget = self._config.memory_budget_gb
        if self._config.compact and index_key == "auto":
            assert self._current is not None
            index_key = with_open_nlist(self._current.index_key)
        if base is None:
            budget_bytes = None if budget is None else budget * 1e9
            plan = plan_index(new_captions, self._encoding.encoder.dim, index_key, self._config.shards, budget_bytes)
            check_trainable(plan, least_training_rows(make_index(plan.index_key, plan.dim)))
            return plan
        manifest = base.manifest
        shards = tuple(plan_shards(new_captions, self._config.shards))
        return IndexPlan(manifest.index_key, new_captions, manifest.dim, 0, shards)

    def _fill(self, gathered: GatheredCaptions, staging: Staging) -> tuple[IndexManifest, list[Embeddings]]:
        """Embeds the captions, trains the template, and writes the shards; returns the version's draft."""
        base, captions = self._inputs.base, gathered.captions
        plan = self._plan_index(len(captions))
        self._runner.check_memory("template", plan.training_bytes if plan.training_rows else 0)
        self._runner.check_memory("shard", plan.shard_bytes)
        most = most_captions_per_image(gathered, self._runner)
        staging.keep()
        vectors = self._embed(gathered)
        template = base.manifest.template if base else self._train(plan, vectors, staging)
        sources = self._inputs.sources(gathered.rows)
        names = tuple(source.name for source in sources)
        first_id = base.manifest.id_count if base else 0
        shards = self._shard(plan, template, first_id, gathered, vectors, names, staging)
        kept = base.manifest if base else None
        draft = IndexManifest(
            encoder=kept.encoder if kept else self._encoding.encoder,
            dim=self._encoding.encoder.dim,
            index_key=plan.index_key,
            nlist=plan.nlist,
            codec=plan.codec,
            embedding_dtype=self._embedding_dtype(gathered),
            template=template,
            shards=(*(kept.shards if kept else ()), *(shard.shard for shard in shards)),
            captions=(*self._grow(gathered, names, staging), *(shard.captions for shard in shards)),
            vectors=(*(kept.vectors if kept else ()), *(shard.vectors for shard in shards if shard.vectors)),
            removed=kept.removed if kept else None,
            max_captions_per_image=most,
            sources=sources,
            filters=self._filters,
            dropped=gathered.dropped,
            operation="add" if kept else "build",
            parents=tuple(parent.manifest.index_id for parent in self._inputs.parents),
            fingerprint=self._version_fingerprint(),
            trained_on=(kept.trained_on or kept.ntotal) if kept else len(captions),
            builder_version=version("smallcap"),
            created_at=utc_now(),
        )
        first_rows = [first - first_id for first in (shard.shard.first_id for shard in shards)]
        embeddings = [Embeddings(None)] * (len(kept.shards) if kept else 0)
        return draft, [*embeddings, *(Embeddings(vectors, first_row) for first_row in first_rows)]

    def _embedding_dtype(self, gathered: GatheredCaptions) -> str:
        if gathered.to_embed:
            return self._encoding.dtype
        parents = self._inputs.parents
        return parents[0].manifest.embedding_dtype if parents else "imported"

    def _embed(self, gathered: GatheredCaptions) -> VectorSlices:
        with self._runner.stage("embed"):
            imported = any(scan.dump.embeddings for scan in self._inputs.scans) or self._config.embedding_column
            if imported and not self._config.trust_embeddings and gathered.to_embed < len(gathered.captions):
                self._encoding.check_imported(gathered.captions, self._config.dumps)
            return self._encoding.embed(gathered.captions, gathered.to_embed, gathered.work_uri)

    def _train(self, plan: IndexPlan, vectors: VectorSlices, staging: Staging) -> FileEntry:
        task = TrainTask(self._index_uri, plan, vectors)
        sizes = Sizes([1], memory_bytes=plan.training_bytes)
        [template] = self._runner.run_recorded(staging, "template", FileEntry, train_template, [task], sizes)
        return template

    def _shard(
        self,
        plan: IndexPlan,
        template: FileEntry,
        first_id: int,
        gathered: GatheredCaptions,
        vectors: VectorSlices,
        names: tuple[str, ...],
        staging: Staging,
    ) -> list[WrittenShard]:
        tasks = [
            ShardTask(
                index_uri=self._index_uri,
                index_key=plan.index_key,
                template=template,
                first_id=first_id + start,
                first_row=start,
                stop_row=stop,
                captions=gathered.captions,
                vectors=vectors,
                source_names=names,
            )
            for start, stop in plan.shards
        ]
        sizes = Sizes([stop - start for start, stop in plan.shards], memory_bytes=plan.shard_bytes)
        return self._runner.run_recorded(staging, "shard", WrittenShard, write_shard, tasks, sizes)

    def _grow(self, gathered: GatheredCaptions, names: tuple[str, ...], staging: Staging) -> list[ShardEntry]:
        """Rewrites the caption files of the base in which captions have gained sources or images."""
        base = self._inputs.base
        if base is None or not any(bucket.grown for bucket in gathered.deduped):
            return list(base.manifest.captions) if base else []
        tasks = [
            GrowTask(base, number, gathered.work_uri, gathered.deduped, names)
            for number in range(len(base.manifest.captions))
        ]
        return self._runner.run_recorded(staging, "grow", ShardEntry, grow_captions, tasks)

    def _calibrate(self, draft: IndexManifest, embeddings: Sequence[Embeddings]) -> IndexManifest:
        with self._runner.stage("calibrate"):
            recall = self._config.recall
            images, tasks = recall.calibration_images, self._image_queries
            queries = self._encoding.image_queries(images, tasks) if images else None
            if self._config.remove:  # captions that must go are removed even if the recall suffers
                recall = recall.model_copy(update={"accept": True})
            index = StoredIndex(self._index_uri, draft, self._config.cache_dir)
            calibration = Calibration(index, embeddings, recall, self._target(), self._runner.run)
            return calibration.run(queries).with_index_id()

    def _target(self) -> float:
        base = self._inputs.base
        inherited = base.manifest.recall_target if base else None
        return self._config.recall.target or inherited or DEFAULT_RECALL
