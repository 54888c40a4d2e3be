"""What people see while a run goes on and at its end, from made-up figures."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from jobs.captioning.progress import (
    PipelineView,
    RecentRates,
    find_bottleneck,
    progress_line,
    render,
    stage_table,
)
from jobs.captioning.stage_report import Snapshot, StageReport
from smallcap.machine.actor_plan import ActorPlan

PLAN = ActorPlan("cuda", "auto", 4, 0.0, 1.0, 4)
NOTHING = Snapshot(
    images=1000,
    fragments=4,
    elapsed_s=5.0,
    load=StageReport("load"),
    caption=StageReport("caption"),
    write=StageReport("write"),
    actors=0,
    first_caption_s=None,
)
# After 100 s, 10 of them starting.
FULL = replace(
    NOTHING,
    elapsed_s=100.0,
    actors=4,
    first_caption_s=10.0,
    load=StageReport("load", 1000, 60.0, fetch_s=10.0, by_pillow=3),
    caption=StageReport(
        "caption", 1000, 340.0, start_s=20.0, searched_by=frozenset({"cuda"}), dtypes=frozenset({"bfloat16"})
    ),
    write=StageReport("write", 1000, 2.0, errors={"empty": 2, "truncated": 30}),
)


class Recorded:
    """Gives one snapshot after the other, the last one for ever."""

    def __init__(self, *snapshots: Snapshot | None) -> None:
        self._snapshots = list(snapshots)

    def snapshot(self) -> Snapshot | None:
        return self._snapshots.pop(0) if len(self._snapshots) > 1 else self._snapshots[0]


def at(elapsed_s: float, captioned: int, **changes: object) -> Snapshot:
    return replace(NOTHING, elapsed_s=elapsed_s, actors=1, caption=StageReport("caption", captioned), **changes)  # type: ignore[arg-type]


def test_the_outlook_says_what_is_not_known_yet() -> None:
    rates = RecentRates()
    assert progress_line(NOTHING, rates).endswith("starting actors")
    assert progress_line(at(9, 0), rates).endswith("of 1,000 images: waiting for the first captions")
    of_tars = at(9, 5, images=None)
    assert progress_line(of_tars, rates).endswith("unknown until a tar has been read")
    ended = StageReport("load", 300, ended_fragments=1, ended_images=250)
    for second in range(10, 14):
        rates.add(at(second, 10 * second, images=None, load=ended))
    line = progress_line(at(13, 130, images=None, load=ended), rates)
    assert line.endswith("of about 1,000 images: about 1 min 27 s left")
    assert progress_line(FULL, rates).endswith("writing the last captions")
    assert "errors: 30 truncated, 2 empty;" in progress_line(FULL, rates)


def test_actors_that_were_started_again_are_told() -> None:
    troubled = replace(FULL, restarts=3, faults={"cuda": 1, "stall": 1})
    told = "ctors started again: 3 (faults: 1 cuda, 1 stall)"
    assert told in progress_line(troubled, RecentRates())
    assert any(told in line for line in stage_table(troubled, 100.0, PLAN, 8))
    console = Console(file=io.StringIO(), width=200)
    console.print(render(replace(troubled, faults={}), RecentRates()))
    assert "actors started again: 3\n" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "started again" not in progress_line(FULL, RecentRates())


def test_a_view_counts_from_the_start_of_the_job_and_says_what_is_loaded() -> None:
    view = PipelineView(Recorded(None, NOTHING, FULL, None), before_s=20.0, models="MODEL and the index INDEX")
    assert view.line() == "Starting the pipeline"
    assert not view.is_under_way
    line = view.line()
    assert line == "25 s: loaded 0, captioned 0, written 0; starting actors, which load MODEL and the index INDEX"
    assert not view.is_under_way
    assert view.line().startswith("2 min: loaded 1,000, captioned 1,000, written 1,000; errors: 30 truncated, 2 empty;")
    assert view.is_under_way
    assert view.line().startswith("2 min: ")  # the monitor does not answer: the figures stay
    console = Console(file=io.StringIO(), width=100)
    console.print(view.render())
    assert "fetch and decode" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("changes", "bottleneck", "advice"),
    [
        ({}, "captioning is the bottleneck", "compute.max_actors"),
        ({"first_caption_s": 60.0}, "starting and loading", "5.0 s per actor"),
        ({"caption": 100.0, "load": (380.0, 50.0)}, "decoding is the bottleneck", "--set input.decode=fast"),
        ({"caption": 100.0, "load": (380.0, 300.0)}, "the network is the bottleneck", "region"),
        ({"caption": 100.0, "load": (60.0, 50.0)}, "no stage was at its limit", "longer runs"),
        ({"caption": 100.0, "load": (10.0, 5.0), "write": 90.0}, "writing is the bottleneck", "storage"),
    ],
)
def test_the_bottleneck_is_named(changes: dict[str, object], bottleneck: str, advice: str) -> None:
    snapshot = FULL
    for name, value in changes.items():
        if name == "load":
            seconds, fetch_s = value  # type: ignore[misc]
            snapshot = replace(snapshot, load=replace(FULL.load, seconds=seconds, fetch_s=fetch_s))
        elif name in ("caption", "write"):
            snapshot = replace(snapshot, **{name: replace(FULL.of(name), seconds=value)})  # type: ignore[arg-type]
        else:
            snapshot = replace(snapshot, **{name: value})  # type: ignore[arg-type]
    verdict = find_bottleneck(snapshot, 100.0, PLAN, load_tasks=4)
    assert verdict.startswith(bottleneck)
    assert advice in verdict
    assert "decode=fast" not in find_bottleneck(snapshot, 100.0, PLAN, 4, fast_decode=True)


def test_the_table_at_the_end() -> None:
    lines = stage_table(FULL, 100.0, PLAN, load_tasks=4, fast_decode=True)
    assert lines[0] == "Captioned 1,000 images in 1 min 40 s, 10.0 images/s:"
    text = "\n".join(lines)
    assert "16.7  4 tasks busy 15%, 17% of it fetching, 3 decoded in full by Pillow" in text
    assert "2.9  4 actors busy 85% (cuda, bfloat16, search: cuda)" in text
    assert "Captioning is the bottleneck" in lines[-1]
    assert all(len(line) < 140 for line in lines)
    assert stage_table(replace(NOTHING), 1.0, PLAN, 4)  # nothing was done, and nothing is divided by it


def test_the_live_display_at_its_widest() -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(render(FULL, RecentRates()))
    assert "caption" in console.file.getvalue()  # type: ignore[attr-defined]
