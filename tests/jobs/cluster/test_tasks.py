"""Pools of actors on Ray itself."""

import threading

import pyarrow as pa
import pytest

from jobs.cluster.errors import GuardedActor
from jobs.cluster.faults import FaultGuard, FaultGuardClient
from jobs.cluster.side_actor import run_side_actor
from jobs.cluster.tasks import map_in_actors
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
