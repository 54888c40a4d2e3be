"""Puts a run's figures into words for people: while it goes on, and at the end a table of where its time went."""

from __future__ import annotations

from typing import Protocol

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from jobs.captioning.stage_report import STAGES, Snapshot, Stage
from jobs.cluster.display import RATE_OVER_S, Rate
from smallcap.machine.actor_plan import ActorPlan
from smallcap.phrasing import describe_count, describe_counts, describe_duration

_STARTING = "Starting the pipeline"
_NAMES: dict[Stage, str] = {"load": "fetch and decode", "caption": "caption", "write": "write"}
_PAST: dict[Stage, str] = {"load": "loaded", "caption": "captioned", "write": "written"}
_BUSY, _HALF = 0.8, 0.5  # fractions of the time


class SnapshotSource(Protocol):
    """Where a view gets its figures: a `MonitorClient`."""

    def snapshot(self) -> Snapshot | None:
        """Returns the figures so far; None where there is no answer."""


class RecentRates:
    """Images/s of each stage over the last seconds, from one snapshot to the next."""

    def __init__(self) -> None:
        self._rates = {stage: Rate() for stage in STAGES}

    def add(self, snapshot: Snapshot) -> None:
        """Adds a snapshot, later than those before."""
        for stage, rate in self._rates.items():
            rate.add(snapshot.elapsed_s, snapshot.of(stage).images)

    def of(self, stage: Stage, over_s: float = RATE_OVER_S) -> float | None:
        """Returns the images/s of a stage; None before its second batch has ended."""
        return self._rates[stage].over(over_s)

    def time_left(self, stage: Stage, images: int) -> str:
        """Returns in words how long a stage takes for so many images; empty while that is not known."""
        return self._rates[stage].time_left(images)


class PipelineView:
    """What a display shows of a running pipeline.

    Args:
        monitor: Where the figures come from.
        before_s: Seconds that the job took before the monitor was there.
        models: What the actors load, in words.
        actors: How many actors were asked for.
    """

    def __init__(self, monitor: SnapshotSource, before_s: float = 0.0, models: str = "", actors: int = 0) -> None:
        self._monitor, self._before_s, self._models, self._actors = monitor, before_s, models, actors
        self._rates = RecentRates()
        self._last: Snapshot | None = None

    @property
    def is_under_way(self) -> bool:
        """Whether an image has been captioned."""
        return self._last is not None and self._last.caption.images > 0

    @property
    def progress(self) -> tuple[float, ...]:
        """The seconds in which the stages were busy, which grow with every batch, and the actors that are ready."""
        if self._last is None:
            return ()
        return (*(self._last.of(stage).seconds for stage in STAGES), self._last.actors, self._last.restarts)

    @property
    def is_short(self) -> bool:
        """Whether actors have not started."""
        return self._last is None or self._last.actors < self._actors

    def render(self) -> RenderableType:
        """Returns the stages as a table."""
        snapshot = self._newest()
        return render(snapshot, self._rates, self._models) if snapshot else Text(_STARTING)

    def line(self) -> str:
        """Returns the stages in a line."""
        snapshot = self._newest()
        return progress_line(snapshot, self._rates, self._models) if snapshot else _STARTING

    def _newest(self) -> Snapshot | None:
        snapshot = self._monitor.snapshot()
        if snapshot is not None:
            self._last = snapshot.after(self._before_s)
            self._rates.add(self._last)
        return self._last


def render(snapshot: Snapshot, rates: RecentRates, models: str = "") -> Group:
    """Returns the live display at one moment; `models` says what the actors load."""
    table = Table(box=None, pad_edge=False, show_header=True, header_style="dim")
    for header, justify in (("", "left"), ("images", "right"), ("images/s", "right"), ("", "left")):
        table.add_column(header, justify=justify)  # type: ignore[arg-type]
    expected = snapshot.expected_images
    for stage in STAGES:
        sums = snapshot.of(stage)
        rate = rates.of(stage)
        bar = ProgressBar(total=max(expected, 1), completed=sums.images, width=30) if expected is not None else ""
        table.add_row(_NAMES[stage], f"{sums.images:,}", "–" if rate is None else f"{rate:,.1f}", bar)
    lines: list[Table | Text] = [table]
    if snapshot.errors:
        lines.append(Text("errors: " + describe_counts(snapshot.errors), style="yellow"))
    if snapshot.restarts:
        lines.append(Text(_restarts(snapshot), style="yellow"))
    return Group(
        *lines, Text(f"{describe_duration(snapshot.elapsed_s)}, {_outlook(snapshot, rates, models)}", style="dim")
    )


def progress_line(snapshot: Snapshot, rates: RecentRates, models: str = "") -> str:
    """Returns one line for a log; `models` says what the actors load."""
    done = []
    for stage, verb in _PAST.items():
        rate = rates.of(stage)
        done.append(f"{verb} {snapshot.of(stage).images:,}" + ("" if rate is None else f" ({rate:,.1f}/s)"))
    errors = f"; errors: {describe_counts(snapshot.errors)}" if snapshot.errors else ""
    errors += f"; {_restarts(snapshot)}" if snapshot.restarts else ""
    return f"{describe_duration(snapshot.elapsed_s)}: {', '.join(done)}{errors}; {_outlook(snapshot, rates, models)}"


def _restarts(snapshot: Snapshot) -> str:
    """Says how many actors were started again, and after what faults; a lost node is none."""
    faults = describe_counts(snapshot.faults)
    return f"actors started again: {snapshot.restarts:,}" + (f" (faults: {faults})" if faults else "")


def _outlook(snapshot: Snapshot, rates: RecentRates, models: str) -> str:
    """Says how many images there are and how long the rest takes, or why that is not known yet."""
    expected = snapshot.expected_images
    captioned = snapshot.caption.images
    if not snapshot.actors and not captioned:
        return "starting actors" + (f", which load {models}" if models else "")
    if expected is None:
        return "the number of images is unknown until a tar has been read"
    total = f"of {'' if snapshot.images is not None else 'about '}{describe_count(expected, 'image')}"
    if captioned >= expected:
        return f"{total}: writing the last captions"
    left = rates.time_left("caption", expected - captioned)
    if not left:
        return f"{total}: waiting for the first captions" if not captioned else f"{total}: no time estimate yet"
    return f"{total}: {left}"


def find_bottleneck(
    snapshot: Snapshot, seconds: float, plan: ActorPlan, load_tasks: int, fast_decode: bool = False
) -> str:
    """Names the stage that held up the others, in one line with advice.

    Args:
        snapshot: The run's figures at its end.
        seconds: Wall time of the attempt.
        plan: The pool of actors.
        load_tasks: The number of loading tasks that could run at once.
        fast_decode: Whether `input.decode` is `fast`.
    """
    begun_s = min(snapshot.first_caption_s or 0.0, seconds)
    if begun_s > _HALF * seconds:
        loading = f" ({snapshot.caption.start_s / snapshot.actors:.1f} s per actor)" if snapshot.actors else ""
        return (
            f"starting and loading the models took {describe_duration(begun_s)} of {describe_duration(seconds)}"
            f"{loading}: this does not grow with the number of images"
        )
    actors = _count_actors(snapshot, plan)
    busy = snapshot.caption.seconds / actors / max(seconds - begun_s, 1e-9)
    if busy > _BUSY:
        return _describe_busy_actors(busy, actors, plan)
    load, write = snapshot.load, snapshot.write
    idle = f"actors waited {_percent(1 - busy)} of the time"
    if write.seconds > load.seconds:
        return f"writing is the bottleneck, {idle}: use storage that is nearer, or raise output.rows_per_part"
    if load.seconds / max(load_tasks, 1) / seconds < _HALF:
        return f"no stage was at its limit, {idle}: longer runs keep the actors busier"
    if load.fetch_s > _HALF * load.seconds:
        retries = f", {describe_count(load.retries, 'request')} repeated" if load.retries else ""
        return f"the network is the bottleneck, {idle}{retries}: run in the region of the images, or on more nodes"
    faster = "" if fast_decode else ", or use --set input.decode=fast"
    return f"decoding is the bottleneck, {idle}: add CPUs{faster}"


def _describe_busy_actors(busy: float, actors: int, plan: ActorPlan) -> str:
    """Says that captioning is the bottleneck, and what would make it faster.

    Args:
        busy: The share of the time in which the actors were busy.
        actors: How many there were.
        plan: What was asked for.
    """
    remedy = "add GPUs, or raise compute.max_actors" if plan.device == "cuda" else "add GPUs or nodes"
    fewer = ""
    if actors < plan.num_actors:
        fewer = f", and the cluster had room for {actors:,} of {plan.num_actors:,}"
        remedy = "let other jobs end, or add nodes"
    return f"captioning is the bottleneck, its actors were busy {_percent(busy)} of the time{fewer}: {remedy}"


def stage_table(
    snapshot: Snapshot, seconds: float, plan: ActorPlan, load_tasks: int, fast_decode: bool = False
) -> list[str]:
    """Returns where an attempt's time went, by stage, and the bottleneck; see `find_bottleneck` for the arguments."""
    actors = _count_actors(snapshot, plan)
    load, caption, write = snapshot.load, snapshot.caption, snapshot.write
    images = max(caption.images, write.images)
    fetching = f", {_percent(load.fetch_s / load.seconds)} of it fetching" if load.seconds else ""
    by_pillow = f", {load.by_pillow:,} decoded in full by Pillow" if fast_decode else ""
    search = f", search: {' and '.join(sorted(caption.searched_by))}" if caption.searched_by else ""
    rows: list[tuple[Stage, int, str, str]] = [
        ("load", load_tasks, "task", fetching + by_pillow),
        ("caption", actors, "actor", f" ({plan.device}, {' and '.join(sorted(caption.dtypes)) or plan.dtype}{search})"),
        ("write", 0, "task", ""),
    ]
    lines = [
        f"Captioned {describe_count(images, 'image')} in {describe_duration(seconds)}, "
        f"{images / max(seconds, 1e-9):,.1f} images/s:",
        f"  {'':16}  {'images':>11}  {'busy s':>9}  {'images/s each':>13}",
    ]
    for stage, workers, noun, more in rows:
        sums = snapshot.of(stage)
        each = f"{sums.images / sums.seconds:,.1f}" if sums.seconds else "–"
        share = ""
        if workers:
            busy = _percent(sums.seconds / workers / max(seconds, 1e-9))
            share = f"  {describe_count(workers, noun)} busy {busy}{more}"
        lines.append(f"  {_NAMES[stage]:16}  {sums.images:>11,}  {sums.seconds:>9,.1f}  {each:>13}{share}")
    if snapshot.restarts:
        lines.append(f"  {_restarts(snapshot).capitalize()}.")
    verdict = find_bottleneck(snapshot, seconds, plan, load_tasks, fast_decode)
    return [*lines, f"  {verdict[0].upper()}{verdict[1:]}."]


def _count_actors(snapshot: Snapshot, plan: ActorPlan) -> int:
    """Returns how many actors there were; an actor that was lost and replaced has reported under two names."""
    return min(snapshot.actors or plan.num_actors, plan.max_actors)


def _percent(fraction: float) -> str:
    return f"{min(max(fraction, 0.0), 1.0):.0%}"
