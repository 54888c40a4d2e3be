"""What people see of a run: a live display while it goes on, and at its end where its time went."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from jobs.captioning.stage_report import STAGES, Snapshot, Stage
from smallcap.machine.actor_plan import ActorPlan

_POLL_S = 0.5  # at a terminal
_LINE_EVERY_S = 30.0  # without one
_RATE_OVER_S, _ETA_OVER_S = 10.0, 60.0
_LEAST_CHANGES = 3  # that a rate is taken over, where batches last longer than the time above
_NAMES: dict[Stage, str] = {"load": "fetch and decode", "caption": "caption", "write": "write"}
_PAST: dict[Stage, str] = {"load": "loaded", "caption": "captioned", "write": "written"}
_BUSY, _HALF = 0.8, 0.5  # shares of the time


class SnapshotSource(Protocol):
    """What a display asks for figures: a `MonitorClient`."""

    def snapshot(self) -> Snapshot | None:
        """Returns the figures so far; None where nobody answers."""


class RecentRates:
    """Images/s of each stage over the latest seconds, from one snapshot to the next.

    A batch may take longer than those seconds: a rate then spans the latest few batches. It falls while none ends.
    """

    def __init__(self) -> None:
        self._changes: dict[Stage, deque[tuple[float, int]]] = {stage: deque() for stage in STAGES}
        self._now = 0.0

    def add(self, snapshot: Snapshot) -> None:
        """Notes how far the stages are."""
        self._now = snapshot.elapsed_s
        for stage, changes in self._changes.items():
            images = snapshot.of(stage).images
            if images and (not changes or changes[-1][1] != images):
                changes.append((self._now, images))
            while len(changes) > _LEAST_CHANGES and changes[1][0] < self._now - _ETA_OVER_S:
                changes.popleft()

    def of(self, stage: Stage, over_s: float = _RATE_OVER_S) -> float | None:
        """Returns a stage's images/s; None before its second batch has ended."""
        changes = list(self._changes[stage])
        recent = [change for change in changes if change[0] >= self._now - over_s]
        if len(recent) < _LEAST_CHANGES:
            recent = changes[-_LEAST_CHANGES:]
        if len(recent) < 2 or self._now <= recent[0][0]:
            return None
        return (recent[-1][1] - recent[0][1]) / (self._now - recent[0][0])


@contextmanager
def show_progress(monitor: SnapshotSource, stream: TextIO | None = None) -> Iterator[None]:
    """Shows a run's progress while the block runs: live at a terminal, else as a line every 30 s.

    Args:
        monitor: Where the figures are.
        stream: Where they are shown; by default stderr.
    """
    stream = stream or sys.stderr
    with beside(_draw_live if stream.isatty() else _print_lines, monitor, stream):
        yield


@contextmanager
def beside(show: Callable[..., None], *arguments: Any) -> Iterator[None]:
    """Runs `show(*arguments, ended)` in a thread while the block runs; then sets the event `ended` and waits for it."""
    ended = threading.Event()
    thread = threading.Thread(target=show, args=(*arguments, ended), name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _draw_live(monitor: SnapshotSource, stream: TextIO, ended: threading.Event) -> None:
    rates = RecentRates()
    with Live(console=Console(file=stream), auto_refresh=False, transient=True) as live:
        while not ended.wait(_POLL_S):
            snapshot = monitor.snapshot()
            if snapshot is not None:
                rates.add(snapshot)
                live.update(render(snapshot, rates), refresh=True)


def _print_lines(monitor: SnapshotSource, stream: TextIO, ended: threading.Event) -> None:
    rates = RecentRates()
    while not ended.wait(_LINE_EVERY_S):
        snapshot = monitor.snapshot()
        if snapshot is not None and snapshot.load.images:
            rates.add(snapshot)
            print(progress_line(snapshot, rates), file=stream, flush=True)


def render(snapshot: Snapshot, rates: RecentRates) -> Group:
    """Returns the live display of one moment."""
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
        lines.append(Text("errors: " + _errors(snapshot), style="yellow"))
    return Group(*lines, Text(f"{describe_duration(snapshot.elapsed_s)}, {_outlook(snapshot, rates)}", style="dim"))


def progress_line(snapshot: Snapshot, rates: RecentRates) -> str:
    """Returns one line of a log."""
    done = []
    for stage, verb in _PAST.items():
        rate = rates.of(stage)
        done.append(f"{verb} {snapshot.of(stage).images:,}" + ("" if rate is None else f" ({rate:,.1f}/s)"))
    errors = f"; errors: {_errors(snapshot)}" if snapshot.errors else ""
    return f"{describe_duration(snapshot.elapsed_s)}: {', '.join(done)}{errors}; {_outlook(snapshot, rates)}"


def _errors(snapshot: Snapshot) -> str:
    return ", ".join(f"{count:,} {code}" for code, count in snapshot.errors.items())


def _outlook(snapshot: Snapshot, rates: RecentRates) -> str:
    """Says what remains and how long that takes, or why nobody can know yet."""
    expected = snapshot.expected_images
    captioned = snapshot.caption.images
    if not snapshot.actors and not captioned:
        return "starting actors"
    if expected is None:
        return "how many images there are is known when a first tar has been read"
    total = f"of {'' if snapshot.images is not None else 'about '}{expected:,} images"
    if captioned >= expected:
        return f"{total}: writing what is captioned"
    rate = rates.of("caption", _ETA_OVER_S)
    if not rate:
        return f"{total}: waiting for the first captions" if not captioned else f"{total}: no time estimate yet"
    return f"{total}: about {describe_duration((expected - captioned) / rate)} left"


def describe_count(count: float, noun: str) -> str:
    """Returns a number with its noun: `1 node`, `2,000 nodes`."""
    number = f"{count:,}" if isinstance(count, int) else f"{count:g}"
    return f"{number} {noun}" if count == 1 else f"{number} {noun}s"


def describe_duration(seconds: float) -> str:
    """Returns a duration in its two largest units: `45 s`, `12 min 30 s`, `3 h 20 min`, `2 d 4 h`."""
    whole = max(0, round(seconds))
    units = [(whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "min"), (whole % 60, "s")]
    first = next((place for place, (count, _) in enumerate(units) if count), len(units) - 1)
    return " ".join(f"{count} {unit}" for count, unit in units[first : first + 2] if count) or "0 s"


def find_bottleneck(
    snapshot: Snapshot, seconds: float, plan: ActorPlan, load_tasks: int, fast_decode: bool = False
) -> str:
    """Names the stage that held the others up, in one line with advice.

    Args:
        snapshot: The run's figures at its end.
        seconds: Of the attempt, by the clock.
        plan: The pool of actors.
        load_tasks: Tasks of fetching and decoding that could run at once.
        fast_decode: Whether `input.decode` is `fast`.
    """
    begun_s = min(snapshot.first_caption_s or 0.0, seconds)
    if begun_s > _HALF * seconds:
        loading = f" ({snapshot.caption.start_s / snapshot.actors:.1f} s per actor)" if snapshot.actors else ""
        return (
            f"starting took {describe_duration(begun_s)} of {describe_duration(seconds)}, models included{loading}: "
            "it does not grow with the number of images"
        )
    actors = _count_actors(snapshot, plan)
    busy = snapshot.caption.seconds / actors / max(seconds - begun_s, 1e-9)
    if busy > _BUSY:
        remedy = "more GPUs, or a higher compute.max_actors" if plan.device == "cuda" else "GPUs, or more nodes"
        return f"captioning is the bottleneck, its actors were busy {_share(busy)}: add {remedy}"
    load, write = snapshot.load, snapshot.write
    idle = f"actors waited {_share(1 - busy)} of the time"
    if write.seconds > load.seconds:
        return f"writing is the bottleneck, {idle}: use nearer storage, or larger rows_per_part"
    if load.seconds / max(load_tasks, 1) / seconds < _HALF:
        return f"no stage was at its limit, {idle}: longer runs keep the actors busier"
    if load.fetch_s > _HALF * load.seconds:
        retries = f", {load.retries:,} requests were repeated" if load.retries else ""
        return f"the network is the bottleneck, {idle}{retries}: run in the images' region, or on more nodes"
    faster = "" if fast_decode else ", or --set input.decode=fast"
    return f"decoding is the bottleneck, {idle}: give the cluster more CPUs{faster}"


def stage_table(
    snapshot: Snapshot, seconds: float, plan: ActorPlan, load_tasks: int, fast_decode: bool = False
) -> list[str]:
    """Returns where an attempt's time went, stage by stage, and the bottleneck; see `find_bottleneck` for arguments."""
    actors = _count_actors(snapshot, plan)
    load, caption, write = snapshot.load, snapshot.caption, snapshot.write
    images = max(caption.images, write.images)
    fetching = f", {_share(load.fetch_s / load.seconds)} of it fetching" if load.seconds else ""
    by_pillow = f", {load.by_pillow:,} whole by Pillow" if fast_decode else ""
    search = f", search: {' and '.join(sorted(caption.searched_by))}" if caption.searched_by else ""
    rows: list[tuple[Stage, int, str, str]] = [
        ("load", load_tasks, "task", fetching + by_pillow),
        ("caption", actors, "actor", f" ({plan.device}, {plan.dtype}{search})"),
        ("write", 0, "task", ""),
    ]
    lines = [
        f"Captioned {images:,} images in {describe_duration(seconds)}, {images / max(seconds, 1e-9):,.1f} images/s:",
        f"  {'':16}  {'images':>11}  {'busy s':>9}  {'images/s each':>13}",
    ]
    for stage, workers, noun, more in rows:
        sums = snapshot.of(stage)
        each = f"{sums.images / sums.seconds:,.1f}" if sums.seconds else "–"
        share = ""
        if workers:
            busy = _share(sums.seconds / workers / max(seconds, 1e-9))
            share = f"  {describe_count(workers, noun)} busy {busy}{more}"
        lines.append(f"  {_NAMES[stage]:16}  {sums.images:>11,}  {sums.seconds:>9,.1f}  {each:>13}{share}")
    verdict = find_bottleneck(snapshot, seconds, plan, load_tasks, fast_decode)
    return [*lines, f"  {verdict[0].upper()}{verdict[1:]}."]


def _count_actors(snapshot: Snapshot, plan: ActorPlan) -> int:
    """Returns how many actors there were; one that was lost and replaced has reported under two names."""
    return min(snapshot.actors or plan.num_actors, plan.max_actors)


def _share(part: float) -> str:
    return f"{min(max(part, 0.0), 1.0):.0%}"
