import gc
import time
from typing import Any

import pyarrow as pa
import pytest

from jobs.cluster.errors import GuardedActor, unwrapped_errors
from jobs.cluster.faults import FaultGuard, FaultGuardClient
from jobs.cluster.side_actor import SideActor, run_side_actor
from jobs.cluster.tasks import map_in_actors
from smallcap.errors import ErrorCode, RowError, RunError, StorageError
from smallcap.machine.actor_plan import ActorPlan


@pytest.mark.ray
def test_an_error_of_a_task_arrives_as_itself() -> None:
    import ray

    def fail(batch: pa.Table) -> pa.Table:
        raise StorageError("The disk is full.", where="s3://bucket")

    with pytest.raises(StorageError) as caught, unwrapped_errors():
        ray.data.range(4).map_batches(fail, batch_format="pyarrow").materialize()
    assert type(caught.value) is StorageError
    assert str(caught.value) == "The disk is full.\n  where: s3://bucket"


def fail_in_actors(error: Exception) -> None:
    import ray

    class Failing:
        def __call__(self, batch: pa.Table) -> pa.Table:
            raise error

    gc.collect()  # what other tests have left
    with unwrapped_errors():
        pool = ray.data.ActorPoolStrategy(size=2)
        ray.data.range(4).map_batches(Failing, batch_format="pyarrow", compute=pool).materialize()


def wait_for_free_cpus() -> None:
    import ray

    deadline = time.monotonic() + 120  # a process takes a while to end on a busy machine
    while ray.available_resources().get("CPU", 0) < ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, "an actor lives as long as its exception"
        time.sleep(0.1)


@pytest.mark.ray
def test_an_error_of_an_actor_arrives_as_itself_and_no_actor_stays() -> None:
    with pytest.raises(StorageError) as kept:
        fail_in_actors(StorageError("The disk is full."))
    assert type(kept.value) is StorageError
    wait_for_free_cpus()


@pytest.mark.ray
def test_a_bug_of_an_actor_arrives_and_no_actor_stays() -> None:
    with pytest.raises(ZeroDivisionError) as kept:
        fail_in_actors(ZeroDivisionError("a bug"))
    wait_for_free_cpus()
    del kept  # not before


class Unloadable(GuardedActor):
    def load(self, error: Exception) -> None:
        raise error

    def process(self, *arguments: Any) -> Any:
        raise AssertionError("It was not loaded.")


def test_an_error_of_a_constructor_is_raised_by_every_call() -> None:
    actor = Unloadable(StorageError("The disk is full."))
    for call in (actor, actor.check, lambda: actor("an argument")):
        with pytest.raises(StorageError, match="full"):
            call()
    with pytest.raises(ZeroDivisionError):  # a bug, which Ray reports
        Unloadable(ZeroDivisionError())


@pytest.mark.ray
def test_an_error_of_a_constructor_arrives_once_as_itself() -> None:
    import ray

    plan = ActorPlan("cpu", "float32", 2, 1.0, 0.0, 2)
    arguments = (StorageError("The disk is full."),)
    with pytest.raises(StorageError) as caught, unwrapped_errors(), run_side_actor(FaultGuard) as guard:
        faults = FaultGuardClient(guard)
        map_in_actors(ray.data.range(4), Unloadable, arguments, 1, plan, faults).materialize()
    assert type(caught.value) is StorageError


def fail_to_import() -> None:
    raise ImportError("libcudart.so.13: cannot open shared object file")


class OfMissingLibrary:
    """Can be sent to an actor, and not be received."""

    def __reduce__(self) -> Any:
        return fail_to_import, ()


@pytest.mark.ray
def test_an_actor_that_cannot_be_made_is_one_message() -> None:
    import ray

    plan = ActorPlan("cpu", "float32", 1, 1.0, 0.0, 1)
    faults = FaultGuardClient(SideActor(None))
    arguments = (OfMissingLibrary(),)
    with pytest.raises(RunError) as caught, unwrapped_errors():
        map_in_actors(ray.data.range(4), Unloadable, arguments, 1, plan, faults).materialize()
    assert "libcudart.so.13: cannot open shared object file" in caught.value.found
    assert caught.value.where.startswith("node ")


def test_other_errors_pass_unchanged() -> None:
    with pytest.raises(ZeroDivisionError), unwrapped_errors():
        _ = 1 / 0
    with pytest.raises(RowError), unwrapped_errors():
        raise RowError(ErrorCode.EMPTY, "It is empty.")
