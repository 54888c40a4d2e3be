"""What a run is doing, gathered in one small Ray actor: figures of its stages, and images that kill a process.

`RunMonitor` is a plain class and counts. Tasks and actors hold a `MonitorClient`: a report never waits, and never
fails when the monitor is gone, because no caption may depend on its being counted.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self, TypeVar

from jobs.captioning.metrics import CaptionMetrics

Stage = Literal["load", "caption", "write"]
STAGES: tuple[Stage, ...] = ("load", "caption", "write")
Result = TypeVar("Result")

_BEGUN_IN_VAIN = 2  # deaths of the batch after which its images are tried one by one


@dataclass(frozen=True)
class StageReport:
    """What a task or an actor did with one batch; sums over batches are the same class."""

    stage: Stage
    images: int = 0
    seconds: float = 0.0  # busy, of the task or the actor, for these images
    errors: Mapping[str, int] = field(default_factory=dict)  # by code; of `write` only, whose tasks count once
    retries: int = 0  # requests that fetching repeated
    duplicates: int = 0  # images of a tar that were left out, since another one of it has the id
    fetch_s: float = 0.0  # part of `seconds`
    bytes: int = 0  # fetched, or written
    wait_s: float = 0.0  # between this batch and the actor's one before
    start_s: float = 0.0  # that an actor took to load; a report without images says that it is ready
    worker: str = ""  # the actor's name for itself, so that actors can be counted
    tokens: int = 0  # generated
    by_pillow: int = 0  # images that `decode: fast` left to Pillow
    searched_by: frozenset[str] = frozenset()  # backends of the actors' searches
    neighbours: int = 0  # retrieved captions
    neighbour_score_sum: float = 0.0  # of their scores
    ended_fragments: int = 0  # of `load`: fragments whose last image is in this batch
    ended_images: int = 0  # all images of those fragments

    def plus(self, other: StageReport) -> StageReport:
        """Returns the sum of two reports of one stage."""
        sums = {name: getattr(self, name) + getattr(other, name) for name in _SUMMED}
        errors = Counter(self.errors)
        errors.update(other.errors)
        return replace(self, **sums, errors=dict(errors), searched_by=self.searched_by | other.searched_by, worker="")


_SUMMED = tuple(
    name for name in StageReport.__dataclass_fields__ if name not in ("stage", "errors", "searched_by", "worker")
)


@dataclass(frozen=True)
class Snapshot:
    """A run's attempt so far."""

    images: int | None  # to do in this attempt; None where the input has not said yet
    done: int  # rows that were there before the attempt
    fragments: int | None  # to do in this attempt
    elapsed_s: float  # since the monitor was made
    load: StageReport
    caption: StageReport
    write: StageReport
    actors: int  # that have ever been ready
    first_caption_s: float | None  # from the start to the moment when the first batch began to be captioned
    crashed: int  # images that were found to kill their process

    def of(self, stage: Stage) -> StageReport:
        """Returns the sums of one stage."""
        sums: StageReport = getattr(self, stage)
        return sums

    @property
    def errors(self) -> dict[str, int]:
        """The attempt's failed rows by code, most frequent first."""
        return dict(sorted(self.write.errors.items(), key=lambda item: (-item[1], item[0])))

    @property
    def expected_images(self) -> int | None:
        """Images of the attempt, counted or estimated from the fragments that have ended; None before one has."""
        if self.images is not None:
            return self.images
        if not self.load.ended_fragments or not self.fragments:
            return None
        return round(self.load.ended_images / self.load.ended_fragments * self.fragments)


class RunMonitor:
    """Counts what the stages report, and which images were begun and never finished.

    Args:
        images: To do in this attempt; None where tars leave it open.
        done: Rows that are already there.
        fragments: To do in this attempt, for an estimate where `images` is None.
    """

    def __init__(self, images: int | None, done: int = 0, fragments: int | None = None) -> None:
        self._images, self._done, self._fragments = images, done, fragments
        self._started = time.monotonic()
        self._sums: dict[Stage, StageReport] = {stage: StageReport(stage) for stage in STAGES}
        self._actors: set[str] = set()
        self._first_caption_s: float | None = None
        self._begun: Counter[tuple[int, int]] = Counter()  # (fragment, row): times begun and not cleared
        self._alone: set[tuple[int, int]] = set()  # of those, the ones begun by themselves
        self._crashed: set[tuple[int, int]] = set()

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
            done=self._done,
            fragments=self._fragments,
            elapsed_s=time.monotonic() - self._started,
            load=self._sums["load"],
            caption=self._sums["caption"],
            write=self._sums["write"],
            actors=len(self._actors),
            first_caption_s=self._first_caption_s,
            crashed=len(self._crashed),
        )

    def suspect(self, fragment: int, rows: Sequence[int]) -> list[int]:
        """Marks rows as begun; to be called before they are decoded.

        Returns:
            Those that must be left out, for they have killed the processes that tried them: begun twice or more without
            an end, and the last time alone. They are not marked, and no later `cleared` acquits them: a batch that is
            repeated for another reason must not die again.
        """
        images = [(fragment, row) for row in rows]
        for image in images:
            if image in self._alone and self._begun[image] >= _BEGUN_IN_VAIN:
                self._crashed.add(image)
                self._forget(image)
        rest = [image for image in images if image not in self._crashed]
        self._begun.update(rest)
        (self._alone.update if len(rest) == 1 else self._alone.difference_update)(rest)
        return [row for number, row in images if (number, row) in self._crashed]

    def is_suspicious(self, fragment: int, rows: Sequence[int]) -> bool:
        """Says whether a batch was begun twice and never finished, so that its images must be tried one by one."""
        return any(self._begun[fragment, row] >= _BEGUN_IN_VAIN for row in rows)

    def cleared(self, fragment: int, rows: Sequence[int]) -> None:
        """Forgets rows that were decoded, or failed as rows do."""
        for row in rows:
            self._forget((fragment, row))

    def _forget(self, image: tuple[int, int]) -> None:
        self._begun.pop(image, None)
        self._alone.discard(image)


class MonitorClient:
    """A task's, an actor's or the driver's way to the monitor; picklable, and small.

    Args:
        actor: The Ray actor of a `RunMonitor`.
        run_id: What the metrics are tagged with.
    """

    def __init__(self, actor: Any, run_id: str) -> None:
        self._actor, self._run_id = actor, run_id

    def report(self, report: StageReport, neighbour_scores: Sequence[float] = ()) -> None:
        """Counts a batch in the monitor and in this process's metrics; never waits, never fails.

        Args:
            report: The batch's figures.
            neighbour_scores: Each image's best neighbour's, for the metrics' histogram.
        """
        import ray

        CaptionMetrics.of_process(self._run_id).record(report, neighbour_scores)
        try:
            self._actor.report.remote(report)
        except ray.exceptions.RayError:  # it is gone, and the figures with it; the captions are not
            return

    def record_index_cache(self, hits: int, misses: int) -> None:
        """Counts the files of an index that a node had, and those that it had to download, in the metrics alone."""
        CaptionMetrics.of_process(self._run_id).record_index_cache(hits, misses)

    def suspect(self, fragment: int, rows: Sequence[int]) -> list[int]:
        """Marks rows and returns those to leave out; see `RunMonitor.suspect`. Waits for the answer."""
        return self._ask(self._actor.suspect, fragment, list(rows)) or []

    def is_suspicious(self, fragment: int, rows: Sequence[int]) -> bool:
        """See `RunMonitor.is_suspicious`. Waits for the answer."""
        return bool(self._ask(self._actor.is_suspicious, fragment, list(rows)))

    def cleared(self, fragment: int, rows: Sequence[int]) -> None:
        """Forgets rows that were decoded; does not wait."""
        import ray

        try:
            self._actor.cleared.remote(fragment, list(rows))
        except ray.exceptions.RayError:  # as in `report`
            return

    def run_marked(
        self, fragment: int, rows: Sequence[int], work: Callable[[list[int]], list[Result]]
    ) -> list[Result | None]:
        """Runs `work` on the rows that do not kill its process, one by one where one of them may.

        A process's calls reach the monitor in their order. So when a row's `suspect` is answered, its predecessor's
        `cleared`, for which nobody waits, has been counted.

        Args:
            fragment: The rows' fragment.
            rows: Of one batch.
            work: Takes rows and returns a result for each.

        Returns:
            A result for each row; None for those that were left out, which are `crashed`.
        """
        results: dict[int, Result] = {}
        batches = [[row] for row in rows] if self.is_suspicious(fragment, rows) else [list(rows)]
        for batch in batches:
            left_out = set(self.suspect(fragment, batch))
            todo = [row for row in batch if row not in left_out]
            if todo:
                results |= zip(todo, work(todo), strict=True)
                self.cleared(fragment, todo)
        return [results.get(row) for row in rows]

    def snapshot(self, timeout_s: float = 3.0) -> Snapshot | None:
        """Returns the figures so far; None where the monitor does not answer in time.

        A report that is on its way when the pipeline ends may come too late for the last snapshot: what was written is
        counted from the parts.
        """
        return self._ask(self._actor.snapshot, timeout_s=timeout_s)

    def stop(self) -> None:
        """Ends the monitor."""
        import ray

        ray.kill(self._actor)

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Ends the monitor."""
        self.stop()

    @staticmethod
    def _ask(method: Any, *arguments: Any, timeout_s: float | None = None) -> Any:
        import ray

        try:
            return ray.get(method.remote(*arguments), timeout=timeout_s)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            return None


def start_monitor(images: int | None, done: int, run_id: str, fragments: int | None = None) -> MonitorClient:
    """Starts a run's monitor beside the driver, where it lives as long as the driver does and takes no CPU.

    Args:
        images: To do in this attempt; None where tars leave it open.
        done: Rows that are already there.
        run_id: What the metrics are tagged with.
        fragments: To do in this attempt.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote = ray.remote(RunMonitor).options(num_cpus=0, max_restarts=0, max_concurrency=1, scheduling_strategy=here)
    return MonitorClient(remote.remote(images, done, fragments), run_id)
