from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from smallcap import patience
from smallcap.colleagues import Colleagues, colleagues, work_with
from smallcap.errors import ConfigError
from smallcap.patience import patience_s, place_of, ride_out, set_patience
from smallcap.storage_faults import this_node


class Listener(Colleagues):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def tell(self, topic: str, line: str) -> None:
        self.lines.append(line)


@pytest.fixture
def heard() -> Iterator[list[str]]:
    before, listener = colleagues(), Listener()
    work_with(listener)
    yield listener.lines
    work_with(before)


class Clock:
    """A clock that only sleep moves."""

    def __init__(self) -> None:
        self.now, self.slept = 100.0, list[float]()

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept.append(seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(patience, "_outages", patience._Outages())
    monkeypatch.setattr(patience, "time", SimpleNamespace(monotonic=lambda: clock.now, sleep=clock.sleep))
    monkeypatch.setenv("SMALLCAP_STORAGE_PATIENCE_S", "300")
    return clock


def failing_until(clock: Clock, seconds: float, error: type[Exception] = ConnectionResetError) -> Callable[[], str]:
    ends = clock.now + seconds

    def attempt() -> str:
        if clock.now < ends:
            raise error("no")
        return "done"

    return attempt


@pytest.mark.parametrize("seconds", [0.1, 5, 60, 290])
def test_what_passes_within_the_patience_is_ridden_out(clock: Clock, seconds: float) -> None:
    assert ride_out("s3://bucket/key", "read this file", failing_until(clock, seconds)) == "done"
    assert clock.now - 100 < seconds + 16


def test_waits_grow_and_are_drawn(clock: Clock) -> None:
    ride_out("s3://bucket/key", "read this file", failing_until(clock, 250))
    waits, clock.slept = clock.slept, []
    assert waits[0] <= 0.2
    assert max(waits) > 7
    assert len(waits) < 40
    ride_out("s3://bucket/key", "read this file", failing_until(clock, 250))
    assert waits[:3] != clock.slept[:3]


def test_after_the_patience_the_clients_error_is_raised(clock: Clock) -> None:
    with pytest.raises(ConnectionResetError):
        ride_out("s3://bucket/key", "read this file", failing_until(clock, 1e9))
    assert 300 <= clock.now - 100 < 316


@pytest.mark.parametrize("error", [FileNotFoundError, PermissionError, ValueError, ConfigError])
def test_what_no_wait_mends_is_asked_for_once(clock: Clock, error: type[Exception]) -> None:
    with pytest.raises(error):
        ride_out("s3://bucket/key", "read this file", failing_until(clock, 1, error))
    assert clock.slept == []


def test_a_wait_of_more_than_ten_seconds_is_told_once_and_its_end_as_well(clock: Clock, heard: list[str]) -> None:
    ride_out("s3://bucket/key", "read this file", failing_until(clock, 9))
    assert heard == [] or clock.now - 100 >= 10  # the last wait may be longer than what was left
    heard.clear()
    began = clock.now
    ride_out("s3://bucket/key", "read this file", failing_until(clock, 120))
    fails, back = heard
    for word in ("read this file", "s3://bucket/key", "broke off", this_node(), "10 s", "4 min 50 s more"):
        assert word in fails
    assert "answers again: s3://bucket" in back
    assert this_node() in back
    assert "\n" not in fails + back
    assert clock.now - began >= 120


def test_of_many_waits_for_one_place_the_first_is_told(clock: Clock, heard: list[str]) -> None:
    one, other, elsewhere = (patience.Wait(uri, "read this file") for uri in ("s3://b/1", "s3://b/2", "s3://c/1"))
    fault = patience.diagnose(ConnectionResetError("no"))
    clock.now += 11
    for wait in (one, other, elsewhere):
        assert wait.goes_on(fault)
        list(wait.pauses(fault))
    assert len(heard) == 2
    one.end()
    other.end()
    assert [line for line in heard if "again" in line] == [heard[-1]]
    clock.now += 1000
    assert not elsewhere.goes_on(fault)
    assert len(heard) == 3  # the error says it


def test_a_place_that_was_given_up_is_not_waited_for_again_at_once(clock: Clock) -> None:
    for _ in range(2):
        with pytest.raises(ConnectionResetError):
            ride_out("s3://bucket/key", "read this file", failing_until(clock, 1e9))
    assert clock.now - 100 < 316
    assert ride_out("s3://other/key", "read this file", failing_until(clock, 20)) == "done"
    clock.now += 61
    assert ride_out("s3://bucket/key", "read this file", failing_until(clock, 20)) == "done"


def test_the_patience_is_what_was_set_or_the_environments(monkeypatch: pytest.MonkeyPatch, heard: list[str]) -> None:
    monkeypatch.setenv("SMALLCAP_STORAGE_PATIENCE_S", "7")
    assert patience_s() == 7
    set_patience(0)
    assert patience_s() == 0
    set_patience(None)
    assert patience_s() == 7
    monkeypatch.delenv("SMALLCAP_STORAGE_PATIENCE_S")
    assert patience_s() == 300


def test_places() -> None:
    assert [place_of(uri) for uri in ("s3://b/k/l", "s3://b", "/a/b", "hf://datasets/u/n")] == [
        *("s3://b", "s3://b", "/", "hf://datasets")
    ]
