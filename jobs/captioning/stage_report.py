"""What the stages of a run report about their batches, and the sums that say what the run has done so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from jobs.captioning.distinct_rows import RowsOfFragments
from smallcap.records import Record

Stage = Literal["load", "caption", "write"]
STAGES: tuple[Stage, ...] = ("load", "caption", "write")


@dataclass(frozen=True)
class StageReport:
    """What a task or an actor did with one batch; sums over batches have the same class."""

    stage: Stage
    images: int = 0
    seconds: float = 0.0  # that the task or the actor was busy with these images
    errors: Mapping[str, int] = field(default_factory=dict)  # by code; only from `write`, whose tasks count once
    retries: int = 0  # requests that fetching repeated
    fetch_s: float = 0.0  # the share of fetching in `seconds`
    bytes: int = 0  # fetched
    start_s: float = 0.0  # that an actor took to load; a report without images says that it is ready
    worker: str = ""  # the actor's name, so that actors can be counted
    tokens: int = 0  # generated
    by_pillow: int = 0  # images that `decode: fast` left to Pillow
    searched_by: frozenset[str] = frozenset()  # backends with which the actors search
    dtypes: frozenset[str] = frozenset()  # precisions in which the actors compute
    halvings: int = 0  # batches that were halved because a GPU's memory ran out
    ended_fragments: int = 0  # from `load`: fragments whose last image is in this batch
    ended_images: int = 0  # all images of those fragments
    rows: RowsOfFragments = ()  # from `load` and `caption`: which images; a batch may come again

    def plus(self, other: StageReport) -> StageReport:
        """Returns the sum of two reports of one stage."""
        sums = {name: getattr(self, name) + getattr(other, name) for name in _SUMMED}
        unions = {name: getattr(self, name) | getattr(other, name) for name in _UNITED}
        errors = dict(Counter(self.errors) + Counter(other.errors))
        return replace(self, **sums, **unions, errors=errors, worker="", rows=())


_UNITED = ("searched_by", "dtypes")
_SUMMED = tuple(
    name for name in StageReport.__dataclass_fields__ if name not in ("stage", "worker", "errors", "rows", *_UNITED)
)


class Timeline(Record):
    """How many images each stage finished over time: in the first `step_s` seconds of its pipeline, in the next, …"""

    step_s: float
    load: tuple[int, ...] = ()
    caption: tuple[int, ...] = ()
    write: tuple[int, ...] = ()


@dataclass(frozen=True)
class Snapshot:
    """What an attempt has done so far."""

    images: int | None  # to do in this attempt; None where there are uncounted tars
    fragments: int | None  # to do in this attempt
    elapsed_s: float  # since the monitor was made
    load: StageReport
    caption: StageReport
    write: StageReport
    actors: int  # how many have ever been ready
    first_caption_s: float | None  # from the start until the first batch was given to an actor
    restarts: int = 0  # processes of actors that took the place of one that had ended
    faults: Mapping[str, int] = field(default_factory=dict)  # of actors, by kind
    timeline: Timeline | None = None

    def after(self, seconds: float) -> Snapshot:
        """Returns the same figures with times that count from so many seconds earlier."""
        first = None if self.first_caption_s is None else self.first_caption_s + seconds
        return replace(self, elapsed_s=self.elapsed_s + seconds, first_caption_s=first)

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
        """The attempt's images, counted, or estimated from the fragments that have ended; None before one has."""
        if self.images is not None:
            return self.images
        if not self.load.ended_fragments or not self.fragments:
            return None
        return round(self.load.ended_images / self.load.ended_fragments * self.fragments)
