"""How many model actors a cluster runs, and with what resources: a job's `auto` options resolved for its nodes.

This is plain arithmetic over the nodes' resources; it starts nothing and does not import Ray.
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
    dtype: str  # auto on a GPU, which is asked when the model is loaded
    num_actors: int  # at the start
    cpus_per_actor: float  # Ray's logical CPUs; without a GPU also the actor's threads, up to the node's cores
    gpus_per_actor: float
    max_actors: int  # if the cluster grows


def plan_actors(compute: ComputeConfig, nodes: Sequence[Mapping[str, float]]) -> ActorPlan:
    """Resolves a job's compute options.

    Args:
        compute: The options.
        nodes: Each node's `CPU` and `GPU`, as Ray counts them.

    Returns:
        A pool that leaves at least one CPU of the cluster to the tasks that feed it. If it took all, it would wait
        forever for its first batch.

    Raises:
        ConfigError: A GPU is asked for, no node has one, and the pool may not wait for the autoscaler to bring one.
    """
    cpus, gpus = (sum(node.get(resource, 0.0) for node in nodes) for resource in ("CPU", "GPU"))
    if compute.device == "cuda" and not gpus and compute.max_actors is None:
        raise ConfigError(
            "No node of the cluster has a GPU.",
            where="compute.device",
            expected="a GPU for cuda",
            found=f"nodes: {len(nodes)}, CPUs: {cpus:g}",
            remedy="Set compute.device to cpu or auto; if an autoscaler brings GPU nodes, set compute.max_actors.",
        )
    on_gpu = compute.device == "cuda" or (compute.device == "auto" and gpus > 0)
    cpus_for_actors = max(1.0, cpus - 1)
    automatic = max(1, int(gpus // compute.gpus_per_actor if on_gpu else cpus_for_actors // _MOST_CPUS_PER_ACTOR))
    max_actors = compute.max_actors or (automatic if compute.num_actors == "auto" else compute.num_actors)
    num_actors = min(automatic, max_actors) if compute.num_actors == "auto" else compute.num_actors
    largest_node = max(node.get("CPU", 0.0) for node in nodes)
    share = min(cpus_for_actors / num_actors, largest_node, _MOST_CPUS_PER_ACTOR)  # above one, Ray takes whole CPUs
    return ActorPlan(
        device="cuda" if on_gpu else "cpu",
        dtype="float32" if compute.dtype == "auto" and not on_gpu else compute.dtype,
        num_actors=num_actors,
        cpus_per_actor=0.0 if on_gpu else (share if share < 1 else float(int(share))),
        gpus_per_actor=compute.gpus_per_actor if on_gpu else 0.0,
        max_actors=max_actors,
    )
