"""Runs work items as Ray Data jobs; yields results as they finish, and raises errors without Ray's wrappers."""

from __future__ import annotations

import pickle
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa

from index_builder.work.reports import rows_reported_to
from jobs.cluster.errors import GuardedActor, unwrapped_errors
from jobs.cluster.faults import FaultGuard, FaultGuardClient
from jobs.cluster.metrics import record_fault
from jobs.cluster.resources import actor_resources, node_resources, set_faiss_threads, use_threads
from jobs.cluster.side_actor import SideActor, run_side_actor
from smallcap.machine.actor_plan import ActorPlan

if TYPE_CHECKING:
    import ray.data

_TELL_EVERY_S = 0.5
_ATTEMPTS = 10  # of a task whose process or node is lost; Ray Data would repeat it for ever

Item = TypeVar("Item")
Result = TypeVar("Result")


class ItemRows:
    """How many rows are done of the work items that run; an actor on the driver's node."""

    def __init__(self) -> None:
        self._rows: dict[int, int] = {}

    def note(self, position: int, rows: int) -> None:
        """Takes how many rows of an item are done; 0 when it has ended."""
        self._rows[position] = rows

    def running(self) -> int:
        """Returns the rows of all items that have not ended."""
        return sum(self._rows.values())


class RayRunner:
    """The connected cluster as an `index_builder.work.task_runner.TaskRunner`, which documents the methods.

    Args:
        run_id: With which the metrics are tagged.

    Attributes:
        item_rows: An actor of `ItemRows`, which is told how far the items of `run_tasks` are; None for nobody.
    """

    item_rows: SideActor | None = None

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id

    def node_resources(self) -> list[dict[str, float]]:
        """Returns the resources of each living node."""
        return node_resources()

    def run_tasks(
        self, function: Callable[[Item], Result], items: Sequence[Item], memory_bytes: int | None = None
    ) -> Iterator[tuple[int, Result]]:
        """Runs `function` on every item in Ray tasks; where there are fewer tasks than CPUs, they share the CPUs."""
        memory = None if memory_bytes is None else min(memory_bytes, _largest_node("memory"))
        cpus = _cpus_per_task(len(items))
        yield from _results(
            _dataset(items).map_batches(
                _OnItems(function, cpus, self.item_rows),
                batch_size=1,
                batch_format="pyarrow",
                num_cpus=cpus,
                memory=memory,
                max_retries=_ATTEMPTS,
            )
        )

    def run_actors(
        self, actor: Callable[..., Any], arguments: tuple[Any, ...], items: Sequence[Any], plan: ActorPlan
    ) -> Iterator[tuple[int, Any]]:
        """Does the same with instances of `actor`, each made from `arguments` in a separate process."""
        size = min(plan.num_actors, len(items))
        pool = replace(plan, num_actors=size, max_actors=size)
        with run_side_actor(FaultGuard, partial(record_fault, self._run_id)) as guard:
            faults, arguments = FaultGuardClient(guard), (actor, arguments, plan.threads)
            yield from _results(map_in_actors(_dataset(items), _ItemActor, arguments, 1, pool, faults))


def map_in_actors(
    dataset: ray.data.Dataset,
    actor: type[GuardedActor],
    arguments: tuple[Any, ...],
    rows: int,
    plan: ActorPlan,
    faults: FaultGuardClient,
    calls: int = 1,
) -> ray.data.Dataset:
    """Maps a dataset's Arrow tables in a pool of actors.

    Args:
        dataset: The dataset.
        actor: The actors' class; a call takes a table and returns one.
        arguments: The arguments of each actor's constructor.
        rows: The most rows in a table.
        plan: The pool.
        faults: Counts the faults of the actors, which Ray starts again and again otherwise.
        calls: The calls that go on in an actor at the same time, each in a thread of its own.
    """
    import ray.data

    return dataset.map_batches(
        actor,
        fn_constructor_args=arguments,
        fn_constructor_kwargs={"faults": faults},
        batch_size=rows,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            min_size=plan.num_actors,
            max_size=plan.max_actors,
            max_concurrent_calls_per_actor=calls,
            enable_true_multi_threading=calls > 1,
        ),
        **actor_resources(plan),
    )


def _cpus_per_task(tasks: int) -> int:
    """Returns how many CPUs of one node each task can have; Ray Data keeps one CPU of the cluster."""
    cpus = sum(int(node.get("CPU", 0)) for node in node_resources())
    return max(1, min((cpus - 1) // max(1, tasks), _largest_node("CPU")))


def _largest_node(resource: str) -> int:
    """Returns the most of a resource that a single node has."""
    return max(int(node.get(resource, 0)) for node in node_resources())


def _dataset(items: Sequence[Any]) -> ray.data.Dataset:
    import ray.data  # reads settings that `connect` has made

    rows = [{"position": position, "item": pickle.dumps(item)} for position, item in enumerate(items)]
    return ray.data.from_items(rows, override_num_blocks=len(rows))


def _results(dataset: ray.data.Dataset) -> Iterator[tuple[int, Any]]:
    with unwrapped_errors():
        for row in iter_small_rows(dataset):
            yield row["position"], pickle.loads(row["result"])  # noqa: S301 - a worker of this job wrote it


def iter_small_rows(dataset: ray.data.Dataset) -> Iterator[dict[str, Any]]:
    """Runs a pipeline, and yields its rows as they come; an exception of the caller's thread ends the pipeline.

    Ray Data's `iter_rows` takes blocks in a thread of its own, so that Ctrl-C would leave the pipeline running.
    """
    import ray
    from ray.data.block import BlockAccessor

    for bundle in dataset.iter_internal_ref_bundles():
        for block in ray.get(bundle.block_refs):
            yield from BlockAccessor.for_block(block).to_arrow().to_pylist()


class _OnItems:
    """Runs a function on a row's item.

    Args:
        function: The function.
        cpus: Those of the task, or None in an actor, which has its threads.
        item_rows: What is told how far the item is.
    """

    def __init__(self, function: Callable[[Any], Any], cpus: int | None, item_rows: SideActor | None = None) -> None:
        self._function, self._cpus, self._item_rows = function, cpus, item_rows

    def __call__(self, row: pa.Table) -> pa.Table:
        if self._cpus and (self._cpus > 1 or "faiss" in sys.modules):  # otherwise this would only import faiss
            set_faiss_threads(self._cpus)
        with self._rows_reported(row["position"][0].as_py()):
            result = self._function(pickle.loads(row["item"][0].as_py()))  # noqa: S301 - this job's driver wrote it
        return pa.table({"position": row["position"], "result": pa.array([pickle.dumps(result)], pa.large_binary())})

    @contextmanager
    def _rows_reported(self, position: int) -> Iterator[None]:
        """Tells `item_rows` now and then what the block reports of the item at this position."""
        item_rows = self._item_rows
        if item_rows is None:
            yield
            return
        told_at = time.monotonic()

        def tell(rows: int) -> None:
            nonlocal told_at
            if time.monotonic() - told_at >= _TELL_EVERY_S:
                told_at = time.monotonic()
                item_rows.tell("note", position, rows)

        with rows_reported_to(tell):
            yield
        item_rows.tell("note", position, 0)


class _ItemActor(GuardedActor):
    def load(self, actor: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...], threads: int) -> None:
        use_threads(threads)
        self._on_items = _OnItems(actor(*arguments), cpus=None)

    def process(self, row: pa.Table) -> pa.Table:
        return self._on_items(row)
