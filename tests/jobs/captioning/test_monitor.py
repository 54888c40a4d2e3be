"""The monitor counts."""

import pickle

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
