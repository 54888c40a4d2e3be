"""Gathers a build's captions: cleans the rows of its inputs, deals them into buckets, and keeps one of equal texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from index_builder.dumps.buckets import (
    Dealt,
    DealTask,
    Deduped,
    DedupeTask,
    UniqueCaptions,
    count_captions_per_image,
    deal_dumps,
    dedupe_bucket,
    plan_counting,
)
from index_builder.inputs import Inputs
from index_builder.stored import DealStoredTask, deal_shard
from index_builder.work.stage_runner import Sizes, StageRunner
from index_builder.work.staging import Staging
from smallcap.captions.rows import CaptionColumns
from smallcap.config import IndexConfig
from smallcap.errors import ConfigError
from smallcap.index.manifest import EncoderIdentity


@dataclass(frozen=True)
class GatheredCaptions:
    """The captions of a build before they are embedded."""

    captions: UniqueCaptions
    deduped: tuple[Deduped, ...]
    rows: list[int]  # of each dump file
    dropped: dict[str, int]
    work_uri: str

    @property
    def to_embed(self) -> int:
        """How many captions have no embedding yet."""
        return sum(bucket.captions - bucket.embedded for bucket in self.deduped)

    @property
    def changes_nothing(self) -> bool:
        """Whether the index that is added to already has all captions, with their sources and images."""
        return not len(self.captions) and not any(bucket.grown for bucket in self.deduped)


def gather_captions(
    config: IndexConfig,
    inputs: Inputs,
    columns: CaptionColumns,
    encoder: EncoderIdentity,
    staging: Staging,
    runner: StageRunner,
) -> GatheredCaptions:
    """Cleans, deals and deduplicates all rows.

    Args:
        config: The build's options.
        inputs: Dumps and indexes; the dumps have been scanned.
        columns: The dumps' columns.
        encoder: The build's encoder; embeddings of other encoders are not taken over.
        staging: Where results are recorded.
        runner: What runs the work items.

    Raises:
        ConfigError: No caption is left, and there is no index to add to.
    """
    tasks, buckets = inputs.deal_tasks(staging.work_uri, columns, config.cleaning, encoder)
    about = [_estimate_rows(task) for task in tasks]
    sizes = Sizes(about, lambda position, result: sum(result.rows) if result.rows else about[position])
    dealt = runner.run_recorded(staging, "clean", Dealt, _deal, tasks, sizes)
    deduped: list[Deduped] = []
    chunks = tuple(chunk for result in dealt for chunk in result.chunks)
    if chunks:
        dedupe_tasks = [DedupeTask(staging.work_uri, bucket, chunks) for bucket in range(buckets)]
        share = sum(about) // buckets
        sizes = Sizes([share] * buckets, lambda _, result: result.captions + result.grown + result.duplicates)
        deduped = runner.run_recorded(staging, "dedupe", Deduped, dedupe_bucket, dedupe_tasks, sizes)
    captions = UniqueCaptions(staging.work_uri, [bucket.captions for bucket in deduped])
    dropped = _count_dropped(inputs, dealt, deduped)
    if not len(captions) and inputs.base is None:
        raise ConfigError(
            "No caption of the dumps passes the filters.",
            where=", ".join([*config.dumps, *config.from_indexes]),
            found=", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "no rows",
            remedy="Check --text-column and the cleaning options.",
        )
    rows = [count for result in dealt for count in result.rows]
    return GatheredCaptions(captions, tuple(deduped), rows, dropped, staging.work_uri)


def _deal(task: DealTask | DealStoredTask) -> Dealt:
    return deal_dumps(task) if isinstance(task, DealTask) else deal_shard(task)


def _estimate_rows(task: DealTask | DealStoredTask) -> int:
    if isinstance(task, DealTask):
        return sum(scan.about_rows for scan, _ in task.dumps)
    return task.index.manifest.captions[task.shard].rows


def _count_dropped(inputs: Inputs, dealt: Sequence[Dealt], deduped: Sequence[Deduped]) -> dict[str, int]:
    dropped = Counter(duplicate=sum(bucket.duplicates for bucket in deduped))
    for counts in [result.dropped for result in dealt] + [parent.manifest.dropped for parent in inputs.parents]:
        dropped.update(counts)
    return dict(sorted(dropped.items()))


def most_captions_per_image(gathered: GatheredCaptions, runner: StageRunner) -> int:
    """Returns the largest number of captions that one image has."""
    tasks = plan_counting(gathered.work_uri, gathered.deduped)
    return max(runner.run("count images", count_captions_per_image, tasks))
