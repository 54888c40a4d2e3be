"""How many model actors run on a cluster, and with what: the `auto` options of a job resolved for its nodes.

Plain arithmetic over the nodes' resources; it starts nothing and imports no Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from smallcap.config import ComputeConfig
from smallcap.errors import ConfigError

_MOST_CPUS_PER_ACTOR = 4  # more threads than that help one batch of images or texts little


@dataclass(frozen=True)
class ActorPlan:
    """A pool of model actors."""

    device: str  # cpu or cuda
    dtype: str
    num_actors: int  # that it starts with
    cpus_per_actor: float  # Ray's logical CPUs; on CPU also the actor's threads, as far as the node has cores
    gpus_per_actor: float
    max_actors: int  # that it may grow to, where the cluster grows


def plan_actors(compute: ComputeConfig, nodes: Sequence[Mapping[str, float]]) -> ActorPlan:
    """Resolves a job's compute options.

    Args:
        compute: The options.
        nodes: Each node's `CPU` and `GPU`, as Ray counts them.

    Returns:
        A pool that leaves at least one CPU of the cluster to the tasks that feed it: one that takes them all would wait
        for its first batch for ever.

    Raises:
        ConfigError: A GPU is asked for, no node has one, and the pool may not wait for the autoscaler to bring one.
    """
    cpus, gpus = (sum(node.get(resource, 0.0) for node in nodes) for resource in ("CPU", "GPU"))
    if compute.device == "cuda" and not gpus and compute.max_actors is None:
        raise ConfigError(
            "No node of the cluster has a GPU.",
            where="compute.device",
            expected="a GPU for cuda",
            found=f"{len(nodes)} nodes with {cpus:g} CPUs",
            remedy="Set compute.device to cpu or auto; where an autoscaler brings GPU nodes, set compute.max_actors.",
        )
    on_gpu = compute.device == "cuda" or (compute.device == "auto" and gpus > 0)
    for_actors = max(1.0, cpus - 1)
    automatic = max(1, int(gpus // compute.gpus_per_actor if on_gpu else for_actors // _MOST_CPUS_PER_ACTOR))
    most = compute.max_actors or (automatic if compute.num_actors == "auto" else compute.num_actors)
    num_actors = min(automatic, most) if compute.num_actors == "auto" else compute.num_actors
    largest_node = max(node.get("CPU", 0.0) for node in nodes)
    share = min(for_actors / num_actors, largest_node, _MOST_CPUS_PER_ACTOR)  # above one, Ray takes whole CPUs
    return ActorPlan(
        device="cuda" if on_gpu else "cpu",
        dtype=compute.dtype if compute.dtype != "auto" else ("bfloat16" if on_gpu else "float32"),
        num_actors=num_actors,
        cpus_per_actor=0.0 if on_gpu else (share if share < 1 else float(int(share))),
        gpus_per_actor=compute.gpus_per_actor if on_gpu else 0.0,
        max_actors=most,
    )
