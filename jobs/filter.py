"""Writes the rows of a run whose scores are good enough, and says why others are left out."""

from __future__ import annotations

from typing import Any

from jobs.captioning.record import load_existing_run
from jobs.terminal.call_options import FilterOptions
from smallcap.output.accepting import Bounds, write_accepted
from smallcap.output.reading import read_captions
from smallcap.phrasing import describe_count, describe_counts


def run(options: FilterOptions) -> dict[str, Any]:
    """Writes the file, and returns the bounds and the numbers of rows.

    Raises:
        ConfigError: There is no run, it lacks a score, or the file would be one of its own.
        RunError: The run is damaged, or the storage fails.
    """
    record = load_existing_run(options.run)
    least = {
        "clip_score": options.min_clip_score,
        "retrieval_score": options.min_retrieval_score,
        "neighbour_agreement": options.min_agreement,
    }
    bounds = Bounds(
        {name: bound for name, bound in least.items() if bound is not None},
        {"copied_share": options.max_copied} if options.max_copied is not None else {},
    )
    ids = {f"smallcap.{name}": getattr(record, name) or "" for name in ("run_id", "model_id", "index_id")}
    counts = write_accepted(read_captions(options.run), bounds, options.out, ids)
    return {
        "run": options.run,
        "out": options.out,
        "complete": record.status == "complete",
        "accepted": counts.pop("accepted"),
        "rejected": counts,
    }


def describe(result: dict[str, Any]) -> str:
    """Returns a line or two for people."""
    rejected = {name: count for name, count in result["rejected"].items() if count}
    total = result["accepted"] + sum(rejected.values())
    lines = [f"Accepted: {result['accepted']:,} of {describe_count(total, 'row')}."]
    if rejected:
        lines.append(f"Rejected, each for its first reason: {describe_counts(rejected)}.")
    if not result["complete"]:
        lines.append("The run is not complete: its other rows are missing here.")
    return "\n".join([*lines, f"Parquet: {result['out']}"])
