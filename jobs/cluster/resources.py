"""The resources of the cluster's nodes, and the threads that a task or an actor uses."""

from __future__ import annotations

import os


def node_resources() -> list[dict[str, float]]:
    """Returns the resources of each living node of the connected cluster, as Ray counts them."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def living_nodes() -> set[str]:
    """Returns the ids of the living nodes of the connected cluster."""
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def limit_torch_threads() -> None:
    """Limits torch's threads to the machine's cores: Ray may count more CPUs than there are."""
    import torch

    torch.set_num_threads(min(torch.get_num_threads(), _cores()))


def set_faiss_threads(cpus: int | None = None) -> None:
    """Gives faiss one thread for each CPU of a task, at most one for each core; by default one for each core.

    Ray sets OMP_NUM_THREADS as well, but a process that has run another task does not read it again.
    """
    import faiss

    faiss.omp_set_num_threads(_cores() if cpus is None else min(cpus, _cores()))


def _cores() -> int:
    return len(os.sched_getaffinity(0))
