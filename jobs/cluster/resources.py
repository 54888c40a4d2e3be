"""The resources of the cluster's nodes, what jobs ask of them, and the threads that a task or an actor uses."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any

from smallcap.machine.actor_plan import ActorPlan

# Of a task that must not wait for the CPUs that actors hold. It is not 0: a node without CPUs is to do no work, and may
# have neither credentials nor memory for it.
SMALL_TASK_CPUS = 0.001
_LOOK_S = 1.0


def living_nodes() -> dict[str, dict[str, Any]]:
    """Returns what Ray says of each living node of the connected cluster, by the node's id."""
    import ray

    return {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}


def node_resources() -> list[dict[str, float]]:
    """Returns the resources of each living node of the connected cluster, as Ray counts them."""
    return [node["Resources"] for node in living_nodes().values()]


def actor_resources(plan: ActorPlan) -> dict[str, Any]:
    """Returns the options with which Ray places an actor of a plan."""
    resources: dict[str, Any] = {"num_cpus": plan.cpus_per_actor, "num_gpus": plan.gpus_per_actor}
    return resources | ({"accelerator_type": plan.accelerator_type} if plan.accelerator_type else {})


def on_working_nodes() -> dict[str, Any]:
    """Returns the options with which what asks for no CPU runs on nodes that have some, as loading and actors do.

    Otherwise Ray gives it to the driver's node first, which may be a head that is to do no work and has no credentials.
    """
    idle = [node for node, facts in living_nodes().items() if not facts["Resources"].get("CPU")]
    return {"label_selector": {"ray.io/node-id": f"!in({','.join(idle)})"}} if idle else {}


def wait_for_room(plan: ActorPlan) -> None:
    """Waits until the cluster has room for one actor of a plan.

    Before that nothing must load: what is loaded and not taken keeps its task, and the task's memory and CPU, from the
    jobs that have actors.

    Raises:
        KeyboardInterrupt: A signal came.
    """
    import ray

    options = actor_resources(plan)
    placed = ray.remote(_find_room).options(**options, max_retries=-1).remote()
    try:
        while not ray.wait([placed], timeout=_LOOK_S)[0]:
            pass
    except KeyboardInterrupt:
        with suppress(ray.exceptions.RayError):
            ray.cancel(placed, force=True)
        raise


def _find_room() -> None:
    """Does nothing: that it runs says that there was room."""


def use_threads(threads: int) -> int:
    """Gives torch in this process, and faiss in this thread, so many threads, at most one for each core; returns them.

    Ray's OMP_NUM_THREADS is not a measure of them: it is 1 where an actor has less than two CPUs.
    """
    import torch

    threads = min(threads, cores_here())
    torch.set_num_threads(threads)
    if "faiss" in sys.modules:  # otherwise nothing is searched here
        set_faiss_threads(threads)
    return threads


def set_faiss_threads(cpus: int | None = None) -> None:
    """Gives faiss one thread for each CPU of a task, at most one for each core; by default one for each core.

    Ray sets OMP_NUM_THREADS as well, but a process that has run another task does not read it again. OpenMP keeps the
    number for each thread: it holds only in the one that calls this.
    """
    import faiss

    faiss.omp_set_num_threads(cores_here() if cpus is None else min(cpus, cores_here()))


def cores_here() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0))
