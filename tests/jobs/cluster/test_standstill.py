"""A line says what waits and what there is: not too early, again after longer and longer, and whatever is quiet."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping
from typing import Any

import pytest

from jobs.cluster import display, standstill
from jobs.cluster.display import Display
from jobs.cluster.standstill import Demand, Request, Standstill, cluster_demand, describe_wait
from jobs.cluster.stopping import StopSignals
from jobs.screen import choose_printing

ACTOR: Request = (("CPU", 2.9079),)
LOADING: Request = (("CPU", 1.0), ("memory", 512e6))
NODES = [({"CPU": 3.0, "memory": 4e9}, {"CPU": free, "memory": 2e9}) for free in (0.08, 1.0)]


def demand(asked: Mapping[Request, int], nodes: Any = NODES) -> Demand:
    return Demand(asked, nodes)


class Told:
    """What a job is told that looks every half second, with the seconds."""

    def __init__(self) -> None:
        self.asked: dict[Request, int] = {}
        self.now = 1000.0
        self.lines: list[tuple[float, str]] = []
        self._standstill = Standstill(lambda: demand(dict(self.asked)))

    def for_seconds(self, seconds: float, moves: bool = False, is_short: bool = False, counts: bool = True) -> None:
        for _ in range(int(2 * seconds)):
            self.now += 0.5
            progress = None if not counts else self.now if moves else 0
            line = self._standstill.look(progress, is_short, self.now)
            if line is not None:
                self.lines.append((self.now - 1000, line))

    @property
    def times(self) -> list[float]:
        return [round(seconds) for seconds, _ in self.lines]


@pytest.fixture
def told() -> Told:
    return Told()


def test_what_has_no_room_is_told_after_a_minute_and_again_ever_more_rarely(told: Told) -> None:
    told.asked = {ACTOR: 2}
    told.for_seconds(900)
    assert told.times == pytest.approx([60, 120, 240, 480], abs=20)
    assert told.lines[0][1].startswith(
        "Nothing has moved for 1 min. Ray has no room for what it is asked to start: 2 × "
    )


def test_without_a_request_that_waits_it_is_two_minutes(told: Told) -> None:
    told.for_seconds(119)
    assert told.times == []
    told.for_seconds(20)
    assert told.times == pytest.approx([120], abs=15)
    assert "Ray has started all that it was asked for" in told.lines[0][1]


def test_what_is_not_counted_is_silent_unless_something_waits(told: Told) -> None:
    told.for_seconds(600, counts=False)
    assert told.times == []
    told.asked = {(("CPU", 1.0),): 1}
    told.for_seconds(30, counts=False)
    assert len(told.times) == 1


def test_what_moves_is_silent_but_for_actors_that_have_not_started(told: Told) -> None:
    told.asked = {ACTOR: 1, LOADING: 3}
    told.for_seconds(600, moves=True)
    assert told.times == []
    told.for_seconds(59, moves=True, is_short=True)
    assert told.times == []
    told.for_seconds(30, moves=True, is_short=True)
    ((_, line),) = told.lines
    assert line.startswith("Ray has no room for what it is asked to start: 1 × (2.9079 CPUs). The cluster has 2 nodes")
    assert "memory)" not in line


def test_a_second_standstill_is_told_as_early_as_the_first(told: Told) -> None:
    told.asked = {ACTOR: 1}
    told.for_seconds(300)
    told.lines.clear()
    told.for_seconds(5, moves=True)
    began = told.now - 1000
    told.for_seconds(100)
    assert told.times[0] == pytest.approx(began + 60, abs=16)


def test_the_line_says_what_is_asked_for_and_what_there_is() -> None:
    waiting = {ACTOR: 2, LOADING: 1}
    line = describe_wait(demand(waiting), dict.fromkeys(waiting, 60.0), 180.0)
    assert line == (
        "Nothing has moved for 3 min. Ray has no room for what it is asked to start: 2 × (2.9079 CPUs), "
        "1 × (1 CPU, 0.5 GB of memory). The cluster has 2 nodes with 6 CPUs (1.08 free, at most 3 on a node), "
        "4.0 GB of free memory. Other jobs or tasks hold the rest: this goes on when they end, or when nodes are added."
    )


@pytest.mark.parametrize(
    ("request_", "named"),
    [((("CPU", 4.0),), "4 CPUs"), ((("GPU", 1.0), ("accelerator_type:L4", 0.001)), "1 GPU, a GPU of type L4")],
)
def test_what_no_node_can_hold_has_another_remedy(request_: Request, named: str) -> None:
    line = describe_wait(demand({request_: 1}), {request_: 60.0}, 0.0)
    assert f"1 × ({named})" in line
    assert line.endswith("No node is large enough for that: add one that is, or ask for less.")


def test_a_head_that_does_not_answer_hides_no_standstill() -> None:
    def fail() -> Demand:
        raise TimeoutError("no answer within 10 s")

    watch = Standstill(fail)
    lines = [watch.look(0, is_short=True, now=now) for now in range(1000, 1175, 5)]  # the next is due at 1180
    (line,) = filter(None, lines)
    assert line == "Nothing has moved for 2 min, and what waits cannot be found out: no answer within 10 s"


def test_without_ray_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # other tests' Ray may run in this process
    assert cluster_demand() is None


def test_a_quiet_job_says_it_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "_POLL_S", 0.01)
    monkeypatch.setattr(standstill, "WAITS_S", 0.05)
    stream = io.StringIO()
    shown = Display(StopSignals(), stream)
    shown._standstill = Standstill(lambda: demand({ACTOR: 1}))
    choose_printing(quiet=True)
    try:
        with shown, shown.activity("Waiting for room for an actor"):
            deadline = time.perf_counter() + 60
            while "no room" not in stream.getvalue():
                assert time.perf_counter() < deadline
                time.sleep(0.01)
    finally:
        choose_printing()
    assert stream.getvalue().count("\n") == 1
