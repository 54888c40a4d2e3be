"""What people see of any job: activities, rates and what is left, at a terminal and in a log."""

from __future__ import annotations

import io
import signal
import threading
import time

import pytest

from jobs.cluster import display
from jobs.cluster.display import Activity, Display, Rate
from jobs.cluster.stopping import StopSignals


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A display that looks often."""
    monkeypatch.setattr(display, "_POLL_S", 0.01)


class Clock:
    """The time, as the test sets it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(display.time, "monotonic", lambda: self.now)


def wait_for(stream: io.StringIO, text: str) -> None:
    deadline = time.perf_counter() + 60
    while text not in stream.getvalue():
        assert time.perf_counter() < deadline, stream.getvalue()
        time.sleep(0.01)


def test_a_rate_is_of_the_latest_seconds_and_needs_two_changes() -> None:
    rate = Rate()
    rate.add(30, 0)
    rate.add(31, 100)
    assert rate.over(10) is None  # the first change says nothing of the next: something was starting
    for second in range(2, 30):
        rate.add(30 + second, 100 * second)
    assert rate.over(10) == pytest.approx(100)
    for second in range(30, 41):
        rate.add(30 + second, 2900)
    assert rate.over(10) == pytest.approx(200 / 13)  # nothing has changed for a while: it falls


def test_a_rate_of_slow_changes_spans_several() -> None:
    rate = Rate()
    for second in range(100):
        rate.add(second, 64 * (second // 20))
    assert rate.over(10) == pytest.approx(128 / 59)  # 64 every 20 s


def test_an_activity_says_what_is_done_how_fast_and_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    activity = Activity("Embedding captions", "caption", 10_000)
    clock.now += 7
    assert activity.line() == "Embedding captions; 7 s so far"
    assert not activity.is_under_way
    for _ in range(4):
        activity.done += 1_000
        clock.now += 5
        line = activity.line()
    assert line == "Embedding captions: 4,000 of 10,000 captions (200.0/s); about 30 s left; 27 s so far"
    activity.done, activity.total = 10_000, 10_000
    clock.now += 3
    assert activity.summary() == "Embedding captions: 10,000 captions in 30 s, 333.3/s"
    unknown = Activity("Cleaning captions", "row")
    unknown.done = 1
    assert unknown.line() == "Cleaning captions: 1 row; 0 s so far"


def test_a_log_gets_a_line_when_something_begins_while_it_waits_and_more_rarely_while_figures_grow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, stream = Clock(monkeypatch), io.StringIO()
    with Display(StopSignals(), stream) as shown, shown.activity("Loading the model", "image") as activity:
        wait_for(stream, "Loading the model; 0 s so far\n")
        clock.now += 10
        wait_for(stream, "Loading the model; 10 s so far\n")
        activity.done = 5
        clock.now += 29
        time.sleep(0.1)
        assert "39 s" not in stream.getvalue()
        clock.now += 2
        wait_for(stream, "Loading the model: 5 images; 41 s so far\n")
    lines = stream.getvalue().splitlines()
    assert lines[-1] == "Loading the model: 5 images in 41 s, 0.1/s"
    assert len(lines) == 4


def test_what_takes_no_time_is_not_mentioned() -> None:
    stream = io.StringIO()
    with Display(StopSignals(), stream) as shown, shown.activity("Reading what is done"):
        pass
    assert stream.getvalue() == ""


def test_a_terminal_gets_a_live_display_and_lines_that_stay() -> None:
    stream = Terminal()
    with Display(StopSignals(), stream) as shown:
        shown.say("this stays")
        with shown.activity("Embedding captions", "caption", 10) as activity:
            wait_for(stream, "Embedding captions; 0 s so far")
            activity.done = 5
            wait_for(stream, "5 of 10 captions")
            wait_for(stream, "━")
    assert "this stays" in stream.getvalue()


def test_the_innermost_of_what_goes_on_is_shown() -> None:
    stream = io.StringIO()
    with Display(StopSignals(), stream) as shown, shown.activity("outer"), shown.activity("inner"):
        wait_for(stream, "inner;")
    assert "outer" not in stream.getvalue()


def test_a_signal_is_answered_before_all_is_kept() -> None:
    signals, stream = StopSignals(), io.StringIO()
    with Display(signals, stream) as shown, shown.activity("Captioning"):
        signals.number = signal.SIGINT
        wait_for(stream, "Stopping; what is done is kept. A second Ctrl-C leaves at once.\n")


def test_an_error_passes_and_what_has_failed_has_no_summary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "_WORTH_A_LINE_S", 0.0)
    stream = io.StringIO()
    threads = threading.active_count()
    with pytest.raises(ZeroDivisionError), Display(StopSignals(), stream) as shown, shown.activity("Dividing"):
        _ = 1 / 0
    assert " in 0 s" not in stream.getvalue()
    assert threading.active_count() == threads


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_a_reader_that_has_gone_away_does_not_end_the_job(
    kind: type[io.StringIO], capfd: pytest.CaptureFixture[str]
) -> None:
    class Gone(kind):  # type: ignore[misc, valid-type]
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with Display(StopSignals(), Gone()) as shown, shown.activity("Captioning"):
        time.sleep(0.1)
        shown.say("still here")
    assert capfd.readouterr().err == ""
