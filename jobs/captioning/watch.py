"""The one small actor beside a run's driver: the monitor, which counts, and the crash guard, which decides rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from jobs.captioning.crash_guard import CrashGuard, CrashGuardClient
from jobs.captioning.monitor import MonitorClient, RunMonitor
from jobs.cluster.side_actor import SideActor


@dataclass(frozen=True)
class RunWatch:
    """What a run's tasks and actors report to and ask."""

    monitor: MonitorClient
    crash_guard: CrashGuardClient


class _WatchActor(RunMonitor, CrashGuard):
    def __init__(self, images: int | None, done: int, fragments: int | None) -> None:
        RunMonitor.__init__(self, images, done, fragments)
        CrashGuard.__init__(self)


@contextmanager
def watch_run(images: int | None, done: int, run_id: str, fragments: int | None = None) -> Iterator[RunWatch]:
    """Watches a run while the block runs.

    Args:
        images: To do in this attempt; None where tars leave it open.
        done: Rows that are already there.
        run_id: What the metrics are tagged with.
        fragments: To do in this attempt.
    """
    with SideActor.start(_WatchActor, images, done, fragments) as actor:
        yield RunWatch(MonitorClient(actor, run_id), CrashGuardClient(actor))
