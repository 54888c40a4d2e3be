"""Shows people what a job does while it goes on: live at a terminal, or else a line now and then.

A job has one `Display`. It is told what goes on: an activity, with or without counts, or a `View` that says more. A
quiet command shows nothing; the log file has the lines in any case.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, Protocol, TextIO

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from jobs.cluster.session import on_ray
from jobs.cluster.standstill import Standstill
from jobs.cluster.stopping import StopSignals
from jobs.log_file import is_logging, log
from jobs.screen import VisibleConsole, is_quiet, is_verbose
from smallcap.phrasing import describe_count, describe_duration

RATE_OVER_S, ETA_OVER_S = 10.0, 60.0
_POLL_S = 0.5
_LINE_EVERY_S = 30.0  # without a terminal, once figures grow
_WAITING_LINE_EVERY_S = 10.0  # before
_LEAST_CHANGES = 3  # a rate spans at least these, where batches take longer than the times above
_WORTH_A_LINE_S = 1.0
_STOPPING = "Stopping; what is done is kept. A second Ctrl-C leaves at once."


class Rate:
    """How fast a count grows: over the last seconds, or over its last changes where these take longer.

    It falls while nothing changes.
    """

    def __init__(self) -> None:
        self._changes: deque[tuple[float, int]] = deque()
        self._now = 0.0

    def add(self, now: float, count: int) -> None:
        """Adds a count, later than those before."""
        self._now = now
        if count and (not self._changes or self._changes[-1][1] != count):
            self._changes.append((now, count))
        while len(self._changes) > _LEAST_CHANGES and self._changes[1][0] < now - ETA_OVER_S:
            self._changes.popleft()

    def over(self, seconds: float) -> float | None:
        """Returns the growth per second; None before the second change: what came before the first one is unknown."""
        changes = list(self._changes)
        recent = [change for change in changes if change[0] >= self._now - seconds]
        if len(recent) < _LEAST_CHANGES:
            recent = changes[-_LEAST_CHANGES:]
        if len(recent) < 2 or self._now <= recent[0][0]:
            return None
        return (recent[-1][1] - recent[0][1]) / (self._now - recent[0][0])

    def time_left(self, count: int) -> str:
        """Returns in words how long so many more take; empty while that is not known."""
        rate = self.over(ETA_OVER_S)
        return f"about {describe_duration(count / rate)} left" if rate else ""


class View(Protocol):
    """What goes on, as it is shown at one moment."""

    @property
    def is_under_way(self) -> bool:
        """Whether its figures grow, so that fewer lines are enough."""

    @property
    def progress(self) -> Hashable:
        """What differs whenever something has moved; None where that is not known."""

    @property
    def is_short(self) -> bool:
        """Whether it has less on the cluster than it asked for."""

    def render(self) -> RenderableType:
        """Returns what a terminal shows."""

    def line(self) -> str:
        """Returns a line for a log."""


class Activity:
    """Something that takes time, shown with how much of it is done where that is known.

    Args:
        text: What goes on, as `Embedding captions`.
        noun: What is counted, as `caption`.
        total: How many of these there are; None or 0 where that is not known.

    Attributes:
        done: How many are done.
    """

    def __init__(self, text: str, noun: str = "", total: int | None = None) -> None:
        self._text, self._noun = text, noun
        self.total, self.done = total, 0
        self._shown = 0
        self._more: Callable[[], int] | None = None
        self._started, self._rate = time.monotonic(), Rate()

    def count_also(self, more: Callable[[], int]) -> None:
        """Adds what a function says to `done` whenever it is shown: the rows of items that have not ended."""
        self._more = more

    @property
    def is_under_way(self) -> bool:
        """Whether something is done."""
        return self._shown > 0

    @property
    def progress(self) -> Hashable:
        """What is done; None where that is not counted."""
        return (self._text, self._shown) if self._noun else None

    @property
    def is_short(self) -> bool:
        """Nothing is known of that."""
        return False

    def render(self) -> RenderableType:
        """Returns the line, with a bar where the total is known."""
        text = self.line()
        return with_bar(text, min(self._shown, self.total), self.total) if self.total else Text(text)

    def line(self) -> str:
        """Returns what is done, the rate, what is left, and the time so far."""
        elapsed = time.monotonic() - self._started
        # An item's rows are not counted for a moment, when it has ended and its result is on its way.
        self._shown = max(self._shown, self.done + (self._more() if self._more else 0))
        self._rate.add(elapsed, self._shown)
        return "; ".join(filter(None, [self._describe(), self._left(), f"{describe_duration(elapsed)} so far"]))

    @property
    def is_worth_a_line(self) -> bool:
        """Whether it took long enough to be mentioned when it has ended."""
        return time.monotonic() - self._started > _WORTH_A_LINE_S

    def summary(self) -> str:
        """Returns what was done, and how long it took."""
        elapsed = time.monotonic() - self._started
        counted = f": {describe_count(self.done, self._noun)}" if self._noun and self.done else ""
        rate = f", {self.done / elapsed:,.1f}/s" if counted and elapsed else ""
        return f"{self._text}{counted} in {describe_duration(elapsed)}{rate}"

    def _describe(self) -> str:
        done, total = self._shown, self.total
        if not self._noun or not done:
            return self._text
        counted = f"{done:,} of {describe_count(total, self._noun)}" if total else describe_count(done, self._noun)
        rate = self._rate.over(RATE_OVER_S)
        return f"{self._text}: {counted}" + ("" if rate is None else f" ({rate:,.1f}/s)")

    def _left(self) -> str:
        return self._rate.time_left(self.total - self._shown) if self.total and self._shown < self.total else ""


def with_bar(line: str, done: int, total: int) -> Table:
    """Returns a line for a terminal with a bar after it."""
    table = Table.grid(padding=(0, 2))
    table.add_row(Text(line), ProgressBar(total=total, completed=done, width=30))
    return table


class Display:
    """Shows what a job does while the block runs.

    Args:
        signals: Those of the job; the display says when one has come.
        stream: Where it is shown; by default stderr, whatever it is redirected to meanwhile.
    """

    def __init__(self, signals: StopSignals, stream: TextIO | None = None) -> None:
        self.signals, self._began, self._told_stopping = signals, time.monotonic(), False
        self._is_own = stream is None
        self._stream = stream or _lasting_stderr()
        self._is_terminal = self._stream.isatty()
        self._views: list[View] = []
        self._standstill = Standstill()
        self._told: View | None = None  # the last one with a line in a log
        self._said_at = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="display", daemon=True)
        self._console = _Console(self._stream)

    def __enter__(self) -> Display:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        if self._is_own and self._stream is not sys.stderr:
            self._stream.close()

    @property
    def seconds(self) -> float:
        """Seconds since the job began."""
        return time.monotonic() - self._began

    @contextmanager
    def show(self, view: View) -> Iterator[None]:
        """Shows a view while the block runs, in the place of what it is a part of."""
        self._views.append(view)
        try:
            yield
        finally:
            self._views.remove(view)

    @contextmanager
    def activity(self, text: str, noun: str = "", total: int | None = None) -> Iterator[Activity]:
        """Shows an activity while the block runs, and says at its end how long it took; see `Activity`."""
        activity = Activity(text, noun, total)
        with self.show(activity):
            yield activity
        if activity.is_worth_a_line or is_verbose():
            self.say(activity.summary())

    def say(self, line: str) -> None:
        """Prints a line that stays."""
        self._say(line, is_shown=not is_quiet())

    def _say(self, line: str, is_shown: bool) -> None:
        self._said_at = time.monotonic()
        log(line)
        if is_shown:
            with suppress(OSError):  # nobody reads it any more
                self._console.print(Text(line), soft_wrap=True)

    def _run(self) -> None:
        try:
            if self._is_terminal and not is_quiet():
                with Live(console=self._console, auto_refresh=False, transient=True) as live:
                    while not self._ended.wait(_POLL_S):
                        self._tell_stopping()
                        view = self._newest_view()
                        live.update(view.render() if view else Text(""), refresh=True)
                        self._tell_standstill(view)
                        if is_logging():
                            self._say_line(view, is_shown=False)
            else:
                while not self._ended.wait(_POLL_S):
                    self._tell_stopping()
                    view = self._newest_view()
                    self._say_line(view, is_shown=not is_quiet())
                    self._tell_standstill(view)
        except OSError:  # nobody reads it any more
            return

    def _newest_view(self) -> View | None:
        return next(reversed(self._views), None)  # in one step: the job's thread may remove it meanwhile

    def _say_line(self, view: View | None, is_shown: bool) -> None:
        if view is None:
            return
        line = view.line()  # rates need every moment's figures
        every_s = _LINE_EVERY_S if view.is_under_way else _WAITING_LINE_EVERY_S
        if view is not self._told or time.monotonic() - self._said_at >= every_s:
            self._told = view
            self._say(line, is_shown)

    def _tell_standstill(self, view: View | None) -> None:
        line = self._standstill.look(view.progress, view.is_short, time.monotonic()) if view else None
        if line is not None:
            self._say(line, is_shown=True)  # a warning, also where news is left out

    def _tell_stopping(self) -> None:
        if self.signals.number is not None and not self._told_stopping:
            self._told_stopping = True
            self._say(_STOPPING, is_shown=True)  # an answer, also where news is left out


class _Console(VisibleConsole):
    """A console whose errors reach the caller: a job does not end with its reader."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Prints; raises OSError."""
        Console.print(self, *objects, **options)

    def on_broken_pipe(self) -> NoReturn:
        """Raises the error again."""
        raise  # noqa: PLE0704 - rich handles the error when it calls this


@contextmanager
def show_while(text: str) -> Iterator[None]:
    """Shows what goes on while the block runs, outside a job: imports that take long, or a dry run."""
    with Display(StopSignals()) as display, display.activity(text):
        yield


@contextmanager
def on_shown_ray(display: Display, address: str | None, kept: Callable[[], str]) -> Iterator[None]:
    """Does what `jobs.cluster.session.on_ray` does, and takes back the signals that Ray takes over."""
    with on_ray(address, kept):
        display.signals.arm()
        yield


def _lasting_stderr() -> TextIO:
    """Returns stderr as it is now: Ray's start redirects its file descriptor for a while."""
    stream: TextIO = sys.stderr
    if stream is not sys.__stderr__:  # a notebook's, or a test's
        return stream
    return os.fdopen(os.dup(2), "w", encoding=stream.encoding, errors="backslashreplace", buffering=1)
