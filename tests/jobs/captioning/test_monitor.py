"""The monitor counts."""

import pickle
from types import SimpleNamespace

import pytest

from jobs.captioning import monitor as monitor_module
from jobs.captioning.monitor import RunMonitor
from jobs.captioning.stage_report import StageReport


def test_reports_are_summed_by_stage() -> None:
    monitor = RunMonitor(images=100)
    monitor.report(StageReport("load", 10, 2.0, fetch_s=1.5, retries=3, bytes=1000))
    monitor.report(StageReport("load", 20, 3.0, fetch_s=0.5))
    monitor.report(StageReport("caption", start_s=4.0, worker="a", dtypes=frozenset({"float16"})))
    monitor.report(StageReport("caption", 10, 1.0, worker="a", tokens=99, searched_by=frozenset({"cpu"})))
    monitor.report(StageReport("write", 10, 0.1, errors={"empty": 1}))
    monitor.report(StageReport("write", 10, 0.1, errors={"empty": 1, "truncated": 3}))
    snapshot = pickle.loads(pickle.dumps(monitor.snapshot()))
    assert (snapshot.load.images, snapshot.load.seconds, snapshot.load.fetch_s) == (30, 5.0, 2.0)
    assert (snapshot.load.retries, snapshot.load.bytes) == (3, 1000)
    assert (snapshot.caption.images, snapshot.caption.start_s, snapshot.actors) == (10, 4.0, 1)
    assert (snapshot.caption.searched_by, snapshot.caption.dtypes) == ({"cpu"}, {"float16"})
    assert snapshot.errors == {"truncated": 3, "empty": 2}
    assert list(snapshot.errors) == ["truncated", "empty"]
    assert (snapshot.images, snapshot.expected_images) == (100, 100)
    assert snapshot.first_caption_s is not None


def test_the_number_of_images_in_tars_is_estimated_from_those_that_have_ended() -> None:
    monitor = RunMonitor(images=None, fragments=10)
    monitor.report(StageReport("load", 256, 1.0))
    assert monitor.snapshot().expected_images is None
    monitor.report(StageReport("load", 44, 1.0, ended_fragments=1, ended_images=300))
    monitor.report(StageReport("load", 100, 1.0, ended_fragments=1, ended_images=100))
    assert monitor.snapshot().expected_images == 2000


def test_a_timeline_keeps_every_image_in_few_steps_however_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(monitor_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monitor = RunMonitor(images=None)
    assert monitor.snapshot().timeline is not None
    for _ in range(2000):
        now[0] += 0.7
        monitor.report(StageReport("load", 3, 0.1))
        monitor.report(StageReport("write", 2, 0.1))
        timeline = monitor.snapshot().timeline
        assert timeline is not None
        assert len(timeline.load) * timeline.step_s >= now[0] - 1000
    monitor.report(StageReport("caption", 5, 0.1))
    timeline = monitor.snapshot().timeline
    assert timeline is not None
    assert (sum(timeline.load), sum(timeline.caption), sum(timeline.write)) == (6000, 5, 4000)
    assert (timeline.step_s, len(timeline.load), len(timeline.caption)) == (32.0, 44, 44)
    assert max(timeline.load) - min(timeline.load[:-1]) <= 6


def test_stages_that_have_different_steps_are_told_in_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(monitor_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monitor = RunMonitor(images=None)
    for now[0], images in ((0.5, 1), (1.5, 2), (2.5, 4), (3.5, 8)):
        monitor.report(StageReport("load", images, 0.1))
    now[0] = 100.0
    monitor.report(StageReport("caption", 16, 0.1))
    timeline = monitor.snapshot().timeline
    assert timeline is not None
    assert (timeline.step_s, timeline.load, timeline.caption) == (2.0, (3, 12), (*[0] * 50, 16))
