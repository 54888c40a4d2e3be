"""The captioning job's metrics, which reach Prometheus through Ray as `ray_smallcap_…`.

Every process makes its metric objects at its first report; Ray adds the node and the worker. docs/monitoring.md says
how to see the metrics, docs/grafana.json draws them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from jobs.captioning.stage_report import StageReport

# Name: kind, tags besides run_id, description. Ray's histograms need boundaries above 0.
METRICS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "smallcap_images_total": ("counter", ("stage",), "Images that a stage has finished."),
    "smallcap_errors_total": ("counter", ("code",), "Rows that were written as errors, by code."),
    "smallcap_batch_seconds": ("histogram", ("stage",), "Busy seconds of a stage for one batch."),
    "smallcap_tokens_total": ("counter", (), "Caption tokens generated."),
    "smallcap_fetch_retries_total": ("counter", (), "Requests for images that had to be repeated."),
    "smallcap_fetched_bytes_total": ("counter", (), "Bytes of images fetched."),
    "smallcap_neighbour_score": ("histogram", (), "Score of each image's nearest retrieved caption."),
    "smallcap_index_cache_hits_total": ("counter", (), "Index files that the node's cache had when an actor started."),
    "smallcap_index_cache_misses_total": ("counter", (), "Index files that had to be downloaded first."),
    "smallcap_actor_restarts_total": ("counter", (), "Processes of actors that took the place of one that had ended."),
    "smallcap_actor_faults_total": ("counter", ("kind",), "Faults that ended an actor's process, by kind."),
}
_BOUNDARIES = {
    "smallcap_batch_seconds": [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0],
    "smallcap_neighbour_score": [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0],
}


def record_batch(run_id: str, report: StageReport, neighbour_scores: Sequence[float] = ()) -> None:
    """Counts what a stage reports about one batch; without Ray nothing is counted.

    Args:
        run_id: The run's id, with which the metrics are tagged.
        report: The batch's figures.
        neighbour_scores: The score of each image's best neighbour.
    """
    stage = {"stage": report.stage}
    _record("smallcap_images_total", run_id, report.images, stage)
    if report.images:
        _record("smallcap_batch_seconds", run_id, report.seconds, stage)
    _record("smallcap_tokens_total", run_id, report.tokens)
    _record("smallcap_fetch_retries_total", run_id, report.retries)
    if report.stage == "load":
        _record("smallcap_fetched_bytes_total", run_id, report.bytes)
    for code, count in report.errors.items():
        _record("smallcap_errors_total", run_id, count, {"code": code})
    for score in neighbour_scores:
        _record("smallcap_neighbour_score", run_id, score)


def record_index_cache(run_id: str, hits: int, misses: int) -> None:
    """Counts the files of an index that an actor found on its node, and those that it had to download."""
    _record("smallcap_index_cache_hits_total", run_id, hits)
    _record("smallcap_index_cache_misses_total", run_id, misses)


def record_fault(run_id: str, kind: str | None) -> None:
    """Counts a fault of an actor by its kind; None counts a process that took the place of one that had ended."""
    if kind is None:
        _record("smallcap_actor_restarts_total", run_id, 1)
    else:
        _record("smallcap_actor_faults_total", run_id, 1, {"kind": kind})


def _record(name: str, run_id: str, value: float, tags: Mapping[str, str] = MappingProxyType({})) -> None:
    """Counts or observes a value in this process."""
    import ray

    if not ray.is_initialized():
        return
    metric, tags = _process_metrics()[name], {"run_id": run_id, **tags}
    if METRICS[name][0] == "histogram":
        metric.observe(value, tags)
    elif value > 0:  # Ray refuses to count nothing
        metric.inc(value, tags)


@lru_cache(maxsize=1)
def _process_metrics() -> dict[str, Any]:
    """Makes the process's metric objects, once: two with one name would count separately."""
    from ray.util.metrics import Counter, Histogram

    return {
        name: Counter(name, description, tag_keys=("run_id", *tags))
        if kind == "counter"
        else Histogram(name, description, boundaries=_BOUNDARIES[name], tag_keys=("run_id", *tags))
        for name, (kind, tags, description) in METRICS.items()
    }
