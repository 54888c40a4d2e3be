"""The job that builds an index from caption dumps: `python -m jobs.build_index --config FILE --set a.b=c`."""

from __future__ import annotations

import sys

from index_builder.build import BuildReport, build_index
from jobs.config_args import run_job
from jobs.ray_session import connect
from smallcap.config import IndexConfig


def run(config: IndexConfig, address: str | None = None) -> BuildReport:
    """Connects to Ray, builds the index and publishes it.

    Raises:
        RunError: See `index_builder.build.build_index`.
    """
    connect(address)
    return build_index(config, _print_progress)


def describe(report: BuildReport) -> str:
    """Returns what a build did, in a few lines for people."""
    manifest = report.manifest
    if report.no_op:
        built = f"version {manifest.index_id} of {report.index_uri}"
        return f"Nothing to do: {built} was built from the same dumps and options."
    rows = sum(source.rows for source in manifest.sources)
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in manifest.dropped.items() if count) or "none"
    recall = ", ".join(f"recall@{entry.k} {entry.recall:.4f}" for entry in manifest.recall)
    seconds = ", ".join(f"{stage} {spent:.1f} s" for stage, spent in report.seconds.items())
    return "\n".join(
        [
            f"Published version {manifest.index_id} of {report.index_uri}",
            f"  {manifest.ntotal:,} captions of {rows:,} rows in {len(manifest.shards)} shards; dropped: {dropped}",
            f"  {recall} at {manifest.recall[0].queries_per_s:,.0f} queries/s",
            f"  {seconds}",
        ]
    )


def _print_progress(stage: str, done: int, total: int) -> None:
    if done == total:
        print(f"{stage}: {done:,} done", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_job(IndexConfig, lambda config, address: describe(run(config, address)))
