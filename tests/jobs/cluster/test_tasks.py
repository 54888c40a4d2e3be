"""Pools of actors on Ray itself."""

import threading

import pyarrow as pa
import pytest

from index_builder.work.reports import report_rows
from jobs.cluster.errors import GuardedActor
from jobs.cluster.faults import FaultGuard, FaultGuardClient
from jobs.cluster.side_actor import run_side_actor
from jobs.cluster.tasks import ItemRows, RayRunner, map_in_actors
from smallcap.machine.actor_plan import ActorPlan


class Meeting(GuardedActor):
    """Its calls end in pairs."""

    def load(self) -> None:
        self._both = threading.Barrier(2)

    def process(self, batch: pa.Table) -> pa.Table:
        self._both.wait(timeout=60)
        return batch.append_column("thread", pa.array([threading.get_ident()] * len(batch)))


@pytest.mark.ray
def test_an_actor_has_the_calls_at_a_time_that_it_is_given_in_lasting_threads() -> None:
    import ray.data

    plan = ActorPlan("cpu", "float32", 1, 1.0, 0.0, 1)
    dataset = ray.data.range(8, override_num_blocks=8)
    with run_side_actor(FaultGuard) as guard:
        rows = map_in_actors(dataset, Meeting, (), 1, plan, FaultGuardClient(guard), calls=2).take_all()
    assert sorted(row["id"] for row in rows) == list(range(8))
    assert len({row["thread"] for row in rows}) == 2


def test_an_item_that_runs_is_known_by_its_rows_until_it_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.cluster.tasks._TELL_EVERY_S", 0.0)
    runner = RayRunner("run")
    with run_side_actor(ItemRows) as rows:
        runner.item_rows = rows

        def work(item: int) -> int | None:
            report_rows(item)
            report_rows(2 * item)
            running: int | None = rows.ask("running")
            return running

        assert dict(runner.run_tasks(work, [10, 20])) == {0: 20, 1: 40}
        assert rows.ask("running") == 0
    assert dict(RayRunner("run").run_tasks(report_rows, [1])) == {0: None}  # nobody is told
