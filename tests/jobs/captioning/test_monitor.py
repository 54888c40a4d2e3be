"""The monitor counts, and finds the image that kills its process; the client outlives the monitor."""

import os
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.captioning.monitor import MonitorClient, RunMonitor, StageReport, start_monitor
from tests.in_process_ray import Handle


def test_reports_are_summed_by_stage() -> None:
    monitor = RunMonitor(images=100, done=7)
    monitor.report(StageReport("load", 10, 2.0, fetch_s=1.5, retries=3, bytes=1000))
    monitor.report(StageReport("load", 20, 3.0, fetch_s=0.5))
    monitor.report(StageReport("caption", start_s=4.0, worker="a"))
    monitor.report(StageReport("caption", 10, 1.0, worker="a", tokens=99, searched_by=frozenset({"cpu"})))
    monitor.report(StageReport("write", 10, 0.1, errors={"empty": 1}))
    monitor.report(StageReport("write", 10, 0.1, errors={"empty": 1, "truncated": 3}))
    snapshot = pickle.loads(pickle.dumps(monitor.snapshot()))
    assert (snapshot.load.images, snapshot.load.seconds, snapshot.load.fetch_s) == (30, 5.0, 2.0)
    assert (snapshot.load.retries, snapshot.load.bytes) == (3, 1000)
    assert (snapshot.caption.images, snapshot.caption.start_s, snapshot.actors) == (10, 4.0, 1)
    assert snapshot.caption.searched_by == {"cpu"}
    assert snapshot.errors == {"truncated": 3, "empty": 2}
    assert list(snapshot.errors) == ["truncated", "empty"]
    assert (snapshot.images, snapshot.done, snapshot.expected_images) == (100, 7, 100)
    assert snapshot.first_caption_s is not None


def test_the_number_of_images_in_tars_is_estimated_from_those_that_have_ended() -> None:
    monitor = RunMonitor(images=None, fragments=10)
    monitor.report(StageReport("load", 256, 1.0))
    assert monitor.snapshot().expected_images is None
    monitor.report(StageReport("load", 44, 1.0, ended_fragments=1, ended_images=300))
    monitor.report(StageReport("load", 100, 1.0, ended_fragments=1, ended_images=100))
    assert monitor.snapshot().expected_images == 2000


def test_the_image_that_kills_its_process_is_found_at_the_fourth_attempt() -> None:
    monitor = RunMonitor(images=8)
    client = MonitorClient(Handle.of(monitor), "run")
    tried: list[list[int]] = []

    def decode(rows: list[int]) -> list[str]:
        tried.append(rows)
        if 5 in rows:
            raise KeyboardInterrupt  # the process ends: nothing after it happens
        return [f"image {row}" for row in rows]

    rows = list(range(8))
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            client.run_marked(2, rows, decode)
    assert tried == [rows, rows, [0], [1], [2], [3], [4], [5]]
    assert client.run_marked(2, rows, decode) == [None if row == 5 else f"image {row}" for row in rows]
    assert monitor.snapshot().crashed == 1
    # Repeated because its result was lost: the image is not tried again, and its neighbours are one batch.
    tried.clear()
    assert client.run_marked(2, rows, decode)[5] is None
    assert all(5 not in batch for batch in tried)
    assert client.run_marked(3, rows[:5], decode) == [f"image {row}" for row in range(5)]


def test_a_batch_that_is_lost_with_its_node_has_no_culprit() -> None:
    monitor = RunMonitor(images=8)
    assert monitor.suspect(0, [0, 1]) == []
    assert monitor.suspect(0, [0, 1]) == []
    assert monitor.is_suspicious(0, [0, 1])
    assert monitor.suspect(0, [0]) == []
    monitor.cleared(0, [0])
    assert monitor.suspect(0, [1]) == []
    monitor.cleared(0, [1])
    assert not monitor.is_suspicious(0, [0, 1])
    assert monitor.suspect(0, [0, 1]) == []


def test_a_batch_of_one_may_die_once() -> None:
    monitor = RunMonitor(images=1)
    assert monitor.suspect(0, [3]) == []
    assert monitor.suspect(0, [3]) == []
    assert monitor.suspect(0, [3]) == [3]
    monitor.cleared(0, [3])
    assert monitor.suspect(0, [3]) == [3]


@given(st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 20), unique=True)), max_size=30))
def test_what_is_cleared_takes_no_memory(batches: list[tuple[int, list[int]]]) -> None:
    monitor = RunMonitor(images=None)
    for fragment, rows in batches:
        assert monitor.suspect(fragment, rows) == []
        monitor.cleared(fragment, rows)
    assert not monitor._begun
    assert not monitor._alone


@pytest.mark.ray
def test_the_actor_lives_beside_the_driver_and_may_be_lost() -> None:
    import ray

    client = start_monitor(images=5, done=0, run_id="run")
    ray.get(ray.remote(lambda: client.report(StageReport("load", 5, 1.0))).remote())
    assert ray.get(ray.remote(lambda: client.suspect(1, [1, 2])).remote()) == []
    snapshot = client.snapshot()
    assert snapshot is not None
    assert snapshot.load.images == 5
    client.stop()
    client.report(StageReport("load", 5, 1.0))
    client.cleared(1, [1, 2])
    assert client.suspect(1, [1, 2]) == []
    assert client.snapshot() is None
    assert ray.get(ray.remote(lambda: client.suspect(1, [1])).remote()) == []


@pytest.mark.ray
def test_an_image_that_kills_its_task_costs_four_attempts_and_no_other_image() -> None:
    import ray

    def decode(rows: list[int]) -> list[str]:
        if 5 in rows:
            os._exit(1)
        return [f"image {row}" for row in rows]

    with start_monitor(images=8, done=0, run_id="run") as client:
        task = ray.remote(max_retries=-1)(lambda: client.run_marked(2, list(range(8)), decode))
        expected = [None if row == 5 else f"image {row}" for row in range(8)]
        assert ray.get(task.remote(), timeout=120) == expected
        snapshot = client.snapshot()
        assert snapshot is not None
        assert snapshot.crashed == 1
