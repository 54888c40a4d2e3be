import gc
import subprocess
import sys
import time
from collections.abc import Iterator

import pyarrow as pa
import pytest

from jobs.cluster.session import limit_blocks, own_errors
from smallcap.errors import ErrorCode, RowError, StorageError


@pytest.mark.ray
def test_an_error_of_a_task_arrives_as_itself() -> None:
    import ray

    def fail(batch: pa.Table) -> pa.Table:
        raise StorageError("The disk is full.", where="s3://bucket")

    with pytest.raises(StorageError) as caught, own_errors():
        ray.data.range(4).map_batches(fail, batch_format="pyarrow").materialize()
    assert type(caught.value) is StorageError
    assert str(caught.value) == "The disk is full.\n  where: s3://bucket"


def fail_in_actors(error: Exception) -> None:
    import ray

    class Failing:
        def __call__(self, batch: pa.Table) -> pa.Table:
            raise error

    gc.collect()  # what other tests have left
    with own_errors():
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


@pytest.mark.ray
def test_blocks_are_limited_for_one_dataset_alone() -> None:
    import ray

    def four_tables(batch: pa.Table) -> Iterator[pa.Table]:
        for _ in range(4):
            yield pa.table({"bytes": [b"0" * 1000]})

    def blocks(limit: int | None) -> int:
        dataset = ray.data.from_arrow(pa.table({"item": [0]}))
        if limit is not None:
            limit_blocks(dataset, limit)
        return int(dataset.map_batches(four_tables, batch_format="pyarrow").materialize().num_blocks())

    assert blocks(1000) == 4
    assert blocks(None) == 1


def test_other_errors_pass_unchanged() -> None:
    with pytest.raises(ZeroDivisionError), own_errors():
        _ = 1 / 0
    with pytest.raises(RowError), own_errors():
        raise RowError(ErrorCode.EMPTY, "It is empty.")


def test_the_commands_import_ray_data_only_after_its_settings_are_made() -> None:
    code = "import sys, jobs.cli, jobs.caption, jobs.cluster.session; print('ray.data' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
