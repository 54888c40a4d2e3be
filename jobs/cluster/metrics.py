"""The jobs' metrics, which reach Prometheus through Ray as `ray_smallcap_…`.

Every process makes its metric objects at its first report; Ray adds the node and the worker. docs/monitoring.md says
how to see the metrics, docs/grafana.json draws them, and deploy/alarms.yaml watches them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from types import MappingProxyType
from typing import Any

# Name: kind, tags besides run_id, description. Ray's histograms need boundaries above 0.
METRICS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "smallcap_job_running": ("gauge", ("command",), "1 while a job runs, 0 when it has ended."),
    "smallcap_images_total": ("counter", ("stage",), "Images that a stage has finished."),
    "smallcap_errors_total": ("counter", ("code",), "Rows that were written as errors, by code."),
    "smallcap_batch_seconds": ("histogram", ("stage",), "Busy seconds of a stage for one batch."),
    "smallcap_busy_seconds_total": ("counter", ("stage",), "Seconds for which tasks and actors were busy."),
    "smallcap_tokens_total": ("counter", (), "Caption tokens generated."),
    "smallcap_fetch_retries_total": ("counter", (), "Requests for images that had to be repeated."),
    "smallcap_fetched_bytes_total": ("counter", (), "Bytes of images fetched."),
    "smallcap_neighbour_score": ("histogram", (), "Score of each image's nearest retrieved caption."),
    "smallcap_searched_images_total": ("counter", ("backend",), "Images whose captions were sought by a backend."),
    "smallcap_index_cache_hits_total": ("counter", (), "Index files that the node's cache had when an actor started."),
    "smallcap_index_cache_misses_total": ("counter", (), "Index files that had to be downloaded first."),
    "smallcap_actor_restarts_total": ("counter", (), "Processes of actors that took the place of one that had ended."),
    "smallcap_actor_faults_total": ("counter", ("kind",), "Faults that ended an actor's process, by kind."),
    "smallcap_memory_halvings_total": ("counter", (), "Batches that were halved because a GPU's memory ran out."),
    "smallcap_build_items_total": (
        "counter",
        ("stage",),
        "Rows, captions or shards that a build's stage has finished.",
    ),
    "smallcap_build_seconds_total": ("counter", ("stage",), "Seconds of a build's stage."),
    "smallcap_train_steps_total": ("counter", (), "Training steps."),
    "smallcap_train_tokens_total": ("counter", (), "Tokens of captions that were trained on."),
    "smallcap_train_step_seconds_total": ("counter", (), "Seconds in training steps, without waiting for examples."),
    "smallcap_train_loss": ("gauge", (), "Loss of the newest training step, in nats per token."),
}
_BOUNDARIES = {
    "smallcap_batch_seconds": [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0],
    "smallcap_neighbour_score": [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0],
}


def record(name: str, run_id: str, value: float, tags: Mapping[str, str] = MappingProxyType({})) -> None:
    """Counts, observes or sets a value in this process; without Ray nothing is counted.

    Args:
        name: One of `METRICS`.
        run_id: The id of a captioning run; the output folder of a build or of training.
        value: What is added to a counter, observed by a histogram, or the new value of a gauge.
        tags: The metric's further tags.
    """
    import ray

    if not ray.is_initialized():
        return
    metric, tags = _process_metrics()[name], {"run_id": run_id, **tags}
    kind = METRICS[name][0]
    if kind == "histogram":
        metric.observe(value, tags)
    elif kind == "gauge":
        metric.set(value, tags)
    elif value > 0:  # Ray refuses to count nothing
        metric.inc(value, tags)


def record_fault(run_id: str, kind: str | None) -> None:
    """Counts a fault of an actor by its kind; None counts a process that took the place of one that had ended."""
    if kind is None:
        record("smallcap_actor_restarts_total", run_id, 1)
    else:
        record("smallcap_actor_faults_total", run_id, 1, {"kind": kind})


@contextmanager
def marked_as_running(run_id: str, command: str) -> Iterator[None]:
    """Says in the metrics that a job runs while the block runs, so that one without progress can be told from none."""
    record("smallcap_job_running", run_id, 1, {"command": command})
    try:
        yield
    finally:
        record("smallcap_job_running", run_id, 0, {"command": command})


@lru_cache(maxsize=1)
def _process_metrics() -> dict[str, Any]:
    """Makes the process's metric objects, once: two with one name would count separately."""
    from ray.util.metrics import Counter, Gauge, Histogram

    made: dict[str, Any] = {}
    for name, (kind, tags, description) in METRICS.items():
        keys = ("run_id", *tags)
        if kind == "histogram":
            made[name] = Histogram(name, description, boundaries=_BOUNDARIES[name], tag_keys=keys)
        else:
            made[name] = {"counter": Counter, "gauge": Gauge}[kind](name, description, tag_keys=keys)
    return made
