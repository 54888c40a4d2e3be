"""Keeps a run's figures while it goes on: stages report to a monitor on the driver's node, and the display asks it.

`RunMonitor` is a plain class that counts. Tasks and actors hold a `MonitorClient`: a report never waits, and does not
fail when the monitor is gone, because no caption may depend on being counted.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from jobs.captioning.metrics import record_batch, record_index_cache
from jobs.captioning.stage_report import STAGES, Snapshot, Stage, StageReport
from jobs.cluster.side_actor import SideActor


class RunMonitor:
    """Sums what the stages report.

    Args:
        images: The number of images to do in this attempt; None where there are uncounted tars.
        fragments: The number of fragments to do in this attempt, for an estimate where `images` is None.
    """

    def __init__(self, images: int | None, fragments: int | None = None) -> None:
        self._images, self._fragments = images, fragments
        self._started = time.monotonic()
        self._sums: dict[Stage, StageReport] = {stage: StageReport(stage) for stage in STAGES}
        self._actors: set[str] = set()
        self._first_caption_s: float | None = None

    def report(self, report: StageReport) -> None:
        """Adds one batch's figures."""
        stage = report.stage
        self._sums[stage] = self._sums[stage].plus(report)
        if stage == "caption":
            if report.worker:
                self._actors.add(report.worker)
            if report.images and self._first_caption_s is None:
                self._first_caption_s = max(0.0, time.monotonic() - self._started - report.seconds)

    def snapshot(self) -> Snapshot:
        """Returns the figures so far."""
        return Snapshot(
            images=self._images,
            fragments=self._fragments,
            elapsed_s=time.monotonic() - self._started,
            load=self._sums["load"],
            caption=self._sums["caption"],
            write=self._sums["write"],
            actors=len(self._actors),
            first_caption_s=self._first_caption_s,
        )


class MonitorClient:
    """Lets a task, an actor or the driver call the monitor; small and picklable.

    Args:
        actor: The actor of a `RunMonitor`.
        run_id: The run's id, with which the metrics are tagged.
    """

    def __init__(self, actor: SideActor, run_id: str) -> None:
        self._actor, self._run_id = actor, run_id

    def report(self, report: StageReport, neighbour_scores: Sequence[float] = ()) -> None:
        """Counts a batch in the monitor and in this process's metrics; never waits, never fails.

        Args:
            report: The batch's figures.
            neighbour_scores: The score of each image's best neighbour, for the metrics' histogram.
        """
        record_batch(self._run_id, report, neighbour_scores)
        self._actor.tell("report", report)

    def record_index_cache(self, hits: int, misses: int) -> None:
        """Counts, in the metrics alone, the files of an index that a node had and those that it had to download."""
        record_index_cache(self._run_id, hits, misses)

    def snapshot(self, timeout_s: float = 3.0) -> Snapshot | None:
        """Returns the figures so far; None where the monitor does not answer in time.

        A report that is on its way when the pipeline ends may miss the last snapshot; the parts, not the reports, say
        what was written.
        """
        snapshot: Snapshot | None = self._actor.ask("snapshot", timeout_s=timeout_s)
        return snapshot
