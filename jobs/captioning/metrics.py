"""What the captioning job's stages count; `jobs.cluster.metrics` has the metrics."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.captioning.stage_report import StageReport
from jobs.cluster.metrics import record


def record_batch(run_id: str, report: StageReport, neighbour_scores: Sequence[float] = ()) -> None:
    """Counts what a stage reports about one batch; without Ray nothing is counted.

    Args:
        run_id: The run's id, with which the metrics are tagged.
        report: The batch's figures.
        neighbour_scores: The score of each image's best neighbour.
    """
    stage = {"stage": report.stage}
    record("smallcap_images_total", run_id, report.images, stage)
    if report.images:
        record("smallcap_batch_seconds", run_id, report.seconds, stage)
        record("smallcap_busy_seconds_total", run_id, report.seconds, stage)
    record("smallcap_tokens_total", run_id, report.tokens)
    record("smallcap_fetch_retries_total", run_id, report.retries)
    record("smallcap_memory_halvings_total", run_id, report.halvings)
    if report.stage == "load":
        record("smallcap_fetched_bytes_total", run_id, report.bytes)
    for backend in report.searched_by:
        record("smallcap_searched_images_total", run_id, report.images, {"backend": backend})
    for code, count in report.errors.items():
        record("smallcap_errors_total", run_id, count, {"code": code})
    for score in neighbour_scores:
        record("smallcap_neighbour_score", run_id, score)


def record_index_cache(run_id: str, hits: int, misses: int) -> None:
    """Counts the files of an index that an actor found on its node, and those that it had to download."""
    record("smallcap_index_cache_hits_total", run_id, hits)
    record("smallcap_index_cache_misses_total", run_id, misses)
