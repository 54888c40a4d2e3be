"""The captioning job's metrics, through Ray to Prometheus, where they are named `ray_smallcap_…`.

Every process has its own, made at its first report; Ray adds the node and the worker. docs/monitoring.md says how to
see them, docs/grafana.json draws them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from jobs.captioning.stage_report import StageReport

# Name: kind, tags beside run_id, description. Ray's histograms want boundaries above 0.
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
}
_BOUNDARIES = {
    "smallcap_batch_seconds": [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0],
    "smallcap_neighbour_score": [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0],
}


class CaptionMetrics:
    """One process's metrics of one run; without Ray it counts nothing."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id

    @staticmethod
    @lru_cache(maxsize=1)
    def of_process(run_id: str) -> CaptionMetrics:
        """Returns this process's metrics, made at the first call."""
        return CaptionMetrics(run_id)

    def record(self, report: StageReport, neighbour_scores: Sequence[float] = ()) -> None:
        """Counts what a stage reports of one batch.

        Args:
            report: The batch's figures.
            neighbour_scores: Each image's best neighbour's.
        """
        self._count("smallcap_images_total", report.images, stage=report.stage)
        if report.images:
            self._observe("smallcap_batch_seconds", report.seconds, stage=report.stage)
        self._count("smallcap_tokens_total", report.tokens)
        self._count("smallcap_fetch_retries_total", report.retries)
        if report.stage == "load":
            self._count("smallcap_fetched_bytes_total", report.bytes)
        for code, count in report.errors.items():
            self._count("smallcap_errors_total", count, code=code)
        for score in neighbour_scores:
            self._observe("smallcap_neighbour_score", score)

    def record_index_cache(self, hits: int, misses: int) -> None:
        """Counts the files of an index that an actor found on its node, and those that it had to download."""
        self._count("smallcap_index_cache_hits_total", hits)
        self._count("smallcap_index_cache_misses_total", misses)

    def _count(self, name: str, value: float, **tags: str) -> None:
        metrics = _metrics_of_process()
        if value > 0 and name in metrics:  # Ray refuses to count nothing
            metrics[name].inc(value, {"run_id": self._run_id, **tags})

    def _observe(self, name: str, value: float, **tags: str) -> None:
        metrics = _metrics_of_process()
        if name in metrics:
            metrics[name].observe(value, {"run_id": self._run_id, **tags})


def _metrics_of_process() -> dict[str, Any]:
    import ray

    return _make_metrics() if ray.is_initialized() else {}


@lru_cache(maxsize=1)
def _make_metrics() -> dict[str, Any]:
    """Makes the process's metric objects, once: two of one name would count the same things apart."""
    from ray.util.metrics import Counter, Histogram

    made: dict[str, Any] = {}
    for name, (kind, tags, description) in METRICS.items():
        keys = ("run_id", *tags)
        if kind == "counter":
            made[name] = Counter(name, description, tag_keys=keys)
        else:
            made[name] = Histogram(name, description, boundaries=_BOUNDARIES[name], tag_keys=keys)
    return made
