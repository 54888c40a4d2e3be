"""Monitor and guard share an actor, which the run outlives."""

import pytest

from jobs.captioning.stage_report import StageReport
from jobs.captioning.watch import watch_run


@pytest.mark.ray
def test_the_actor_lives_beside_the_driver_and_may_be_lost(ray_session: None) -> None:
    import ray

    def work(rows: list[int]) -> list[int]:
        return rows

    with watch_run("run", images=5, fragments=1) as watch:
        monitor, guard = watch.monitor, watch.crash_guard
        ray.get(ray.remote(lambda: monitor.report(StageReport("load", 5, 1.0))).remote())
        assert ray.get(ray.remote(lambda: guard.run_guarded(1, [1, 2], work)).remote()) == [1, 2]
        snapshot = monitor.snapshot()
        assert snapshot is not None
        assert snapshot.load.images == 5
    monitor.report(StageReport("load", 5, 1.0))
    assert guard.run_guarded(1, [1, 2], work) == [1, 2]
    assert monitor.snapshot() is None
    assert ray.get(ray.remote(lambda: guard.run_guarded(1, [1], work)).remote()) == [1]
