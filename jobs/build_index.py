"""The job that builds an index from caption dumps: `smallcap build-index …`, or `python -m jobs.build_index …`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from index_builder.build import Build, BuildPlan, BuildReport
from index_builder.plan import plan_index, with_open_nlist
from index_builder.versions.removal import COMPACT_ABOVE
from jobs.cluster.addresses import check_address
from jobs.cluster.display import Activity, Display, on_shown_ray
from jobs.cluster.metrics import marked_as_running, record
from jobs.cluster.side_actor import SideActor, run_side_actor
from jobs.cluster.stopping import GOES_ON, stoppable
from jobs.cluster.tasks import ItemRows, RayRunner
from smallcap.config import IndexConfig
from smallcap.index.manifest import IndexManifest
from smallcap.phrasing import describe_count, describe_counts, describe_gb

_STAGES = {  # what people read of a stage, and what is counted
    "scan": ("Reading the dumps for their checksums", "file"),
    "clean": ("Cleaning captions", "row"),
    "dedupe": ("Removing duplicates", "caption"),
    "count images": ("Counting the captions of each image", ""),
    "probe": ("Trying the encoder on a few captions", ""),
    "embed": ("Embedding captions", "caption"),
    "template": ("Training the index", ""),
    "shard": ("Filling shards", "caption"),
    "grow": ("Adding sources to captions", "shard"),
    "remove": ("Removing captions", "shard"),
    "embed images": ("Embedding images to calibrate with", "group"),
    "verify": ("Reading the index back", "shard"),
    "calibrate": ("Choosing how lists are searched", "shard"),
}
_RETRAIN_ABOVE = 2.0  # times the number of captions that the template was trained for


def run(config: IndexConfig, address: str | None = None) -> BuildReport:
    """Connects to Ray, builds or changes the index, and publishes it.

    Raises:
        RunError: See `index_builder.build.build_index`.
        Stopped: A signal came; work items that had ended are kept.
    """
    with _shown(config, address, f"The finished work items of the build are kept below {config.out}.") as build:
        return build.run()


def plan(config: IndexConfig, address: str | None = None) -> BuildPlan:
    """Connects to Ray, and returns what `run` would do.

    Raises:
        RunError: See `index_builder.build.Build.plan`.
        Stopped: A signal came.
    """
    with _shown(config, address, "A dry run writes nothing.") as build:
        return build.plan()


@contextmanager
def _shown(config: IndexConfig, address: str | None, kept: str) -> Iterator[Build]:
    """Yields a build, and shows and stops what the block does with it; `kept` says what is left if Ray dies."""
    with stoppable() as signals, Display(signals) as display, StageDisplay(display, config.out) as stages:
        try:
            check_address(address)  # before what may take long
            runner = RayRunner(config.out)
            build = Build(config, runner, stages.tell)  # finds wrong options before Ray starts
            with (
                on_shown_ray(display, address, lambda: kept),
                marked_as_running(config.out, "build-index"),
                run_side_actor(ItemRows) as runner.item_rows,
            ):
                stages.item_rows = runner.item_rows
                yield build
        except KeyboardInterrupt:
            raise signals.stopped(f"Stopped{stages.place()}; what has ended is kept, {GOES_ON}") from None


class StageDisplay:
    """Shows a build's stages, one after the other.

    Args:
        display: Where they are shown.
        run_id: With which their metrics are tagged.

    Attributes:
        item_rows: An actor that knows the rows of the items that run; None for nobody.
    """

    item_rows: SideActor | None = None

    def __init__(self, display: Display, run_id: str) -> None:
        self._display, self._run_id = display, run_id
        self._told_at = time.monotonic()
        self._shown = ExitStack()
        self._stage: str | None = None
        self._activity: Activity | None = None

    def __enter__(self) -> StageDisplay:
        return self

    def __exit__(self, *error: Any) -> None:
        self._shown.__exit__(*error)

    def tell(self, stage: str, done: int, total: int) -> None:
        """Takes the progress of a stage; see `index_builder.work.stage_runner.Progress`."""
        if self._activity is None or stage != self._stage or done < self._activity.done:  # or another round of it
            self._shown.close()
            text, noun = _STAGES[stage]
            self._activity = self._shown.enter_context(self._display.activity(text, noun))
            self._activity.count_also(self._running_rows)
            self._stage = stage
        self._count(stage, done - self._activity.done)
        self._activity.done, self._activity.total = done, total

    def _count(self, stage: str, new: int) -> None:
        now = time.monotonic()
        record("smallcap_build_items_total", self._run_id, new, {"stage": stage})
        record("smallcap_build_seconds_total", self._run_id, now - self._told_at, {"stage": stage})
        self._told_at = now

    def _running_rows(self) -> int:
        rows = self.item_rows.ask("running", timeout_s=1.0) if self.item_rows is not None else None
        return rows or 0

    def place(self) -> str:
        """Returns where the build is, in words that follow `Stopped`."""
        if self._stage is None or self._activity is None:
            return ""
        text, noun = _STAGES[self._stage]
        of = f" of {self._activity.total:,}" if self._activity.total else ""
        counted = f" ({self._activity.done:,}{of} {noun}s done)" if noun else ""
        return f" while {text[0].lower()}{text[1:]}{counted}"


def describe(report: BuildReport) -> str:
    """Returns what a build did, in a few lines for people."""
    manifest = report.manifest
    if report.no_op:
        return f"Nothing to do: version {manifest.index_id} of {report.index_uri} is up to date."
    rows = sum(source.rows for source in manifest.sources)
    new = ""
    if report.new_captions != manifest.ntotal and manifest.operation == "add":
        new = f" ({report.new_captions:,} new, {report.embedded:,} of them embedded now)"
    seconds = ", ".join(f"{stage} {spent:.1f} s" for stage, spent in report.seconds.items())
    captions, shards = describe_count(manifest.ntotal, "caption"), describe_count(len(manifest.shards), "shard")
    return "\n".join(
        [
            f"Published version {manifest.index_id} of {report.index_uri}",
            f"  {captions}{new} of {describe_count(rows, 'row')} in {shards}, "
            f"{manifest.index_key}; dropped: {_counts(manifest.dropped)}",
            f"  {_recall(manifest)}",
            *(f"  {line}" for line in advice(manifest)),
            f"  {seconds}",
        ]
    )


def describe_plan(plan: BuildPlan) -> str:
    """Returns what a build would do, in a few lines for people."""
    index = plan.index
    shards = describe_count(len(index.shards), "shard")
    training = f", trained on {index.training_rows:,} of them" if index.training_rows else ""
    return "\n".join(
        [
            f"Would publish to {plan.index_uri}; nothing was built.",
            f"  {describe_count(plan.new_captions, 'new caption')} of {describe_count(plan.rows, 'row')}; "
            f"dropped: {_counts(plan.dropped)}",
            f"  {index.index_key} in {shards}{training}",
            f"  memory: training {describe_gb(index.training_bytes if index.training_rows else 0)}, "
            f"writing a shard {describe_gb(index.shard_bytes)}, serving {describe_gb(index.serving_bytes)} mapped",
            f"  {describe_count(plan.to_embed, 'caption')} to embed, about {plan.embed_s:,.0f} s on this cluster",
        ]
    )


def advice(manifest: IndexManifest) -> list[str]:
    """Returns what the user may want to do next: compact the index, or train its lists again."""
    lines = []
    removed = manifest.id_count - manifest.ntotal
    if removed > COMPACT_ABOVE * manifest.id_count:
        share = removed / manifest.id_count
        lines.append(f"{share:.0%} of the captions have been removed, but are still on disk: rebuild with --compact.")
    if manifest.operation != "add":
        return lines
    if manifest.nlist is not None and manifest.ntotal > _RETRAIN_ABOVE * (manifest.trained_on or manifest.ntotal):
        lines.append(
            f"Its lists were trained for {manifest.trained_on:,} captions: rebuild with --compact to train them again."
        )
    usual = with_open_nlist(plan_index(manifest.ntotal, manifest.dim, "auto", "auto").index_key)
    if manifest.index_key == "Flat" and usual != "Flat":
        lines.append(f"At this size {usual} is faster: rebuild with --compact --index-key {usual}.")
    return lines


def _recall(manifest: IndexManifest) -> str:
    entries = ", ".join(
        f"recall@{entry.k} {entry.recall:.4f}" + (f" (at least {entry.recall_low:.4f})" if entry.recall_low else "")
        for entry in manifest.recall
    )
    first = manifest.recall[0]
    lists = f", nprobe {first.nprobe} of {manifest.nlist}" if first.nprobe else ""
    queries = f"{first.queries:,} queries ({manifest.recall_queries or 'captions'})"
    return f"{entries} on {queries}; {first.queries_per_s:,.0f} queries/s{lists}"


def _counts(dropped: dict[str, int]) -> str:
    return describe_counts({reason: count for reason, count in dropped.items() if count}) or "none"


if __name__ == "__main__":
    from jobs.cli import main

    main("build-index")
