"""What the cluster's nodes have, and how many threads a task or an actor takes of its node's cores."""

from __future__ import annotations

import os


def node_resources() -> list[dict[str, float]]:
    """Returns what each living node of the connected cluster has, as Ray counts it."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def limit_torch_threads() -> None:
    """Lowers torch's threads to the cores there are: Ray's CPUs may be more than the machine's."""
    import torch

    torch.set_num_threads(min(torch.get_num_threads(), _cores()))


def set_faiss_threads(cpus: int | None = None) -> None:
    """Gives faiss as many threads as a task has CPUs, at most the cores there are; by default all of these.

    Ray says so in OMP_NUM_THREADS, which a process that has run another task before does not read again.
    """
    import faiss

    faiss.omp_set_num_threads(_cores() if cpus is None else min(cpus, _cores()))


def _cores() -> int:
    return len(os.sched_getaffinity(0))
