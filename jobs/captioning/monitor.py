"""Keeps a run's figures while it goes on: stages report to a monitor on the driver's node, and the display asks it.

`RunMonitor` is a plain class that counts. Tasks and actors hold a `MonitorClient`: a report never waits, and does not
fail when the monitor is gone, because no caption may depend on being counted.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from jobs.captioning.distinct_rows import DistinctRows
from jobs.captioning.metrics import record_batch, record_index_cache
from jobs.captioning.stage_report import STAGES, Snapshot, Stage, StageReport, Timeline
from jobs.cluster.side_actor import SideActor

_FIRST_STEP_S = 1.0
_MOST_STEPS = 60


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
        self._steps = {stage: _Steps() for stage in STAGES}
        self._distinct = DistinctRows()
        self._actors: set[str] = set()
        self._first_caption_s: float | None = None

    def report(self, report: StageReport) -> None:
        """Adds one batch's figures; images that came before do not count again, but the time that they took does."""
        stage = report.stage
        if report.rows:
            report = replace(report, images=self._count_new(report))
        self._sums[stage] = self._sums[stage].plus(report)
        self._steps[stage].add(time.monotonic() - self._started, report.images)
        if stage == "caption":
            if report.worker:
                self._actors.add(report.worker)
            if report.images and self._first_caption_s is None:
                self._first_caption_s = max(0.0, time.monotonic() - self._started - report.seconds)

    def _count_new(self, report: StageReport) -> int:
        if report.stage == "load":
            return self._distinct.add_loaded(report.rows, bool(report.ended_fragments))
        return self._distinct.add_captioned(report.rows)

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
            timeline=self._timeline(),
        )

    def _timeline(self) -> Timeline:
        step_s = max(steps.step_s for steps in self._steps.values())
        return Timeline(step_s=step_s, **{stage: steps.widened(step_s) for stage, steps in self._steps.items()})


class _Steps:
    """Counts a stage's images by steps of time, which become twice as long whenever there are too many of them."""

    def __init__(self) -> None:
        self.step_s = _FIRST_STEP_S
        self._images: list[int] = []

    def add(self, elapsed_s: float, images: int) -> None:
        while elapsed_s >= self.step_s * _MOST_STEPS:
            self._images = _in_pairs(self._images)
            self.step_s *= 2
        place = int(elapsed_s / self.step_s)
        self._images += [0] * (place + 1 - len(self._images))
        self._images[place] += images

    def widened(self, step_s: float) -> tuple[int, ...]:
        """Returns the counts of longer steps; `step_s` is the steps' own length times a power of two."""
        images, own_s = self._images, self.step_s
        while own_s < step_s:
            images, own_s = _in_pairs(images), own_s * 2
        return tuple(images)


def _in_pairs(counts: Sequence[int]) -> list[int]:
    return [sum(counts[place : place + 2]) for place in range(0, len(counts), 2)]


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
