"""Runs a function over work items as a Ray Data job, with typed errors and results as they finish.

By default Ray Data keeps only the text of an exception, so the worker hands a `SmallCapError` back as a value and the
driver raises it. Every other exception is a fault or a bug and takes Ray's way. A function must be a pure function of
its item and of immutable files: Ray runs it again after a lost worker.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import pyarrow as pa
import ray
import ray.data

from smallcap.errors import SmallCapError
from smallcap.machine.actor_plan import ActorPlan

Item = TypeVar("Item")
Result = TypeVar("Result")


def run_tasks(
    function: Callable[[Item], Result], items: Sequence[Item], memory_bytes: int | None = None
) -> Iterator[tuple[int, Result]]:
    """Runs `function` on every item in Ray tasks; yields (position of the item, result) in the order of finishing.

    Where there are fewer items than CPUs, they share them: faiss has as many threads as its task has CPUs.

    Args:
        function: Picklable; see the module's docstring.
        items: Small, picklable work descriptions, never the data itself.
        memory_bytes: What one task needs, where that is much; fewer then run at once on a node.

    Raises:
        SmallCapError: The first that a task raised.
    """
    memory = None if memory_bytes is None else min(memory_bytes, _largest_node("memory"))
    cpus = _cpus_per_task(len(items))
    yield from _results(
        _dataset(items).map_batches(
            _Guarded(function, cpus), batch_size=1, batch_format="pyarrow", num_cpus=cpus, memory=memory
        )
    )


def run_actors(
    actor: Callable[..., Callable[[Item], Result]], arguments: tuple[Any, ...], items: Sequence[Item], plan: ActorPlan
) -> Iterator[tuple[int, Result]]:
    """Like `run_tasks` with instances of `actor`, each built once from `arguments` in its own process."""
    dataset = _dataset(items).map_batches(
        _GuardedActor,
        fn_constructor_args=(actor, arguments),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(plan.num_actors, len(items))),
        num_cpus=plan.cpus_per_actor,
        num_gpus=plan.gpus_per_actor,
    )
    yield from _results(dataset)


def node_resources() -> list[dict[str, float]]:
    """Returns what each living node of the connected cluster has, as Ray counts it."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _cpus_per_task(tasks: int) -> int:
    """Returns how many CPUs of one node each of some tasks can have; one of the cluster's is left to Ray Data."""
    cpus = sum(int(node.get("CPU", 0)) for node in node_resources())
    return max(1, min((cpus - 1) // max(1, tasks), _largest_node("CPU")))


def _largest_node(resource: str) -> int:
    """Returns the most of a resource that a single node has."""
    return max(int(node.get(resource, 0)) for node in node_resources())


def _dataset(items: Sequence[Any]) -> ray.data.Dataset:
    rows = [{"position": position, "item": pickle.dumps(item)} for position, item in enumerate(items)]
    return ray.data.from_items(rows, override_num_blocks=len(rows))


def _results(dataset: ray.data.Dataset) -> Iterator[tuple[int, Any]]:
    for row in dataset.iter_rows():
        result = pickle.loads(row["result"])  # noqa: S301 - a worker of this job wrote it
        if isinstance(result, SmallCapError):
            raise result
        yield row["position"], result


class _Guarded(Generic[Item, Result]):
    def __init__(self, function: Callable[[Item], Result], cpus: int = 1) -> None:
        self._function, self._cpus = function, cpus

    def __call__(self, batch: pa.Table) -> pa.Table:
        _use_threads(self._cpus)
        item: Item = pickle.loads(batch["item"][0].as_py())  # noqa: S301 - this job's driver wrote it
        try:
            result: Result | SmallCapError = self._function(item)
        except SmallCapError as error:
            result = error
        return pa.table({"position": batch["position"], "result": pa.array([pickle.dumps(result)], pa.large_binary())})


class _GuardedActor(_Guarded[Any, Any]):
    def __init__(self, actor: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]) -> None:
        use_own_cores()
        try:
            super().__init__(actor(*arguments))
        except SmallCapError as error:  # Ray would restart the actor again and again
            super().__init__(_raise(error))


def _raise(error: SmallCapError) -> Callable[[Any], Any]:
    def function(item: Any) -> Any:
        raise error

    return function


def _use_threads(count: int) -> None:
    """Gives faiss as many threads as the task has CPUs, at most the cores there are.

    Ray says so in OMP_NUM_THREADS, which a process that has run another task before does not read again.
    """
    if count > 1 or "faiss" in sys.modules:
        import faiss

        faiss.omp_set_num_threads(min(count, len(os.sched_getaffinity(0))))


def use_own_cores() -> None:
    """Lowers torch's threads to the cores there are: Ray's CPUs may be more than the machine's."""
    import torch

    torch.set_num_threads(min(torch.get_num_threads(), len(os.sched_getaffinity(0))))
