"""The job that builds an index from caption dumps: `smallcap build-index …`, or `python -m jobs.build_index …`."""

from __future__ import annotations

import sys

from index_builder.build import Build, BuildPlan, BuildReport
from index_builder.plan import plan_index, with_open_nlist
from index_builder.versions.removal import COMPACT_ABOVE
from jobs.cluster.session import connect
from jobs.cluster.tasks import RayRunner
from smallcap.config import IndexConfig
from smallcap.index.manifest import IndexManifest
from smallcap.phrasing import describe_count, describe_gb

_RETRAIN_ABOVE = 2.0  # times the number of captions that the template was trained for


def run(config: IndexConfig, address: str | None = None) -> BuildReport:
    """Connects to Ray, builds or changes the index, and publishes it.

    Raises:
        RunError: See `index_builder.build.build_index`.
    """
    return _open(config, address).run()


def plan(config: IndexConfig, address: str | None = None) -> BuildPlan:
    """Connects to Ray, and returns what `run` would do.

    Raises:
        RunError: See `index_builder.build.Build.plan`.
    """
    return _open(config, address).plan()


def _open(config: IndexConfig, address: str | None) -> Build:
    build = Build(config, RayRunner(), _print_progress)  # finds wrong options before Ray starts
    connect(address)
    return build


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
    return ", ".join(f"{count:,} {reason}" for reason, count in dropped.items() if count) or "none"


def _print_progress(stage: str, done: int, total: int) -> None:
    if done == total:
        print(f"{stage}: {done:,} done", file=sys.stderr, flush=True)


if __name__ == "__main__":
    from jobs.cli import main

    main("build-index")
