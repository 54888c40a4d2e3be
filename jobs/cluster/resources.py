"""The resources of the cluster's nodes, and the threads that a task or an actor uses."""

from __future__ import annotations

import os
import sys
from typing import Any


def living_nodes() -> dict[str, dict[str, Any]]:
    """Returns what Ray says of each living node of the connected cluster, by the node's id."""
    import ray

    return {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}


def node_resources() -> list[dict[str, float]]:
    """Returns the resources of each living node of the connected cluster, as Ray counts them."""
    return [node["Resources"] for node in living_nodes().values()]


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
