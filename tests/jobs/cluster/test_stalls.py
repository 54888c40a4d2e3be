"""A thread notices that nothing happens, and only then. Waits end by events; no figure depends on the machine."""

import threading

import pytest

from jobs.cluster.stalls import StallWatch


class Stalled:
    """Takes the call of a watch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.called = threading.Event()

    def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)
        self.called.set()


def test_a_call_without_progress_is_noticed_once_and_the_first_one_later() -> None:
    stalled = Stalled()
    watch = StallWatch(0.02, stalled)
    with watch.watch():
        assert stalled.called.wait(60)
    stalled.called.clear()
    with watch.watch():
        assert stalled.called.wait(60)
    assert stalled.seconds == pytest.approx([0.06, 0.02])


def test_progress_within_a_call_shortens_the_wait_for_the_next_step() -> None:
    stalled = Stalled()
    watch = StallWatch(0.02, stalled)
    with watch.watch():
        watch.note_progress()
        assert stalled.called.wait(60)
    assert stalled.seconds == [0.02]


def test_nobody_waits_between_calls() -> None:
    stalled = Stalled()
    for _ in range(3):
        threads = threading.active_count()
        with pytest.raises(ZeroDivisionError), StallWatch(60, stalled).watch():
            raise ZeroDivisionError
        with StallWatch(60, stalled).watch():
            pass
        while threading.active_count() > threads:
            threading.Event().wait(0.001)
    assert not stalled.seconds
