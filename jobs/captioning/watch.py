"""Runs the one small actor on the driver's node: monitor, crash guard and fault guard.

The monitor counts, the crash guard knows images that kill loading tasks, and the fault guard counts faults of model
actors. The two guards know nothing of each other: no fault of a GPU counts against an image.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from jobs.captioning.crash_guard import CrashGuard, CrashGuardClient
from jobs.captioning.monitor import MonitorClient, RunMonitor
from jobs.captioning.stage_report import Snapshot
from jobs.cluster.faults import FaultGuard, FaultGuardClient
from jobs.cluster.metrics import record_fault
from jobs.cluster.side_actor import run_side_actor


@dataclass(frozen=True)
class RunWatch:
    """How a run's tasks and actors reach the monitor and the guards."""

    monitor: MonitorClient
    crash_guard: CrashGuardClient
    fault_guard: FaultGuardClient


class _WatchActor(RunMonitor, CrashGuard, FaultGuard):
    def __init__(self, run_id: str, images: int | None, fragments: int | None) -> None:
        RunMonitor.__init__(self, images, fragments)
        CrashGuard.__init__(self)
        # Counted here: the metrics of a process that ends itself would be lost.
        FaultGuard.__init__(self, partial(record_fault, run_id))

    def snapshot(self) -> Snapshot:
        return replace(super().snapshot(), restarts=self.restarts, faults=dict(self.fault_counts))


@contextmanager
def watch_run(run_id: str, images: int | None, fragments: int | None) -> Iterator[RunWatch]:
    """Watches a run while the block runs.

    Args:
        run_id: The run's id, with which the metrics are tagged.
        images: The number of images to do in this attempt; None where there are uncounted tars.
        fragments: The number of fragments to do in this attempt.
    """
    with run_side_actor(_WatchActor, run_id, images, fragments) as actor:
        yield RunWatch(MonitorClient(actor, run_id), CrashGuardClient(actor), FaultGuardClient(actor))
