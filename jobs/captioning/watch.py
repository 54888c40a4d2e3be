"""Runs the one small actor on the driver's node: the monitor, which counts, and the crash guard, which decides rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from jobs.captioning.crash_guard import CrashGuard, CrashGuardClient
from jobs.captioning.monitor import MonitorClient, RunMonitor
from jobs.cluster.side_actor import run_side_actor


@dataclass(frozen=True)
class RunWatch:
    """How a run's tasks and actors reach the monitor and the crash guard."""

    monitor: MonitorClient
    crash_guard: CrashGuardClient


class _WatchActor(RunMonitor, CrashGuard):
    def __init__(self, images: int | None, fragments: int | None) -> None:
        RunMonitor.__init__(self, images, fragments)
        CrashGuard.__init__(self)


@contextmanager
def watch_run(run_id: str, images: int | None, fragments: int | None) -> Iterator[RunWatch]:
    """Watches a run while the block runs.

    Args:
        run_id: The run's id, with which the metrics are tagged.
        images: The number of images to do in this attempt; None where there are uncounted tars.
        fragments: The number of fragments to do in this attempt.
    """
    with run_side_actor(_WatchActor, images, fragments) as actor:
        yield RunWatch(MonitorClient(actor, run_id), CrashGuardClient(actor))
