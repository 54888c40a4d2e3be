"""How many model actors a cluster runs, and with what resources: a job's `auto` options resolved for its nodes.

Everything is counted node by node and in Ray's units, ten-thousandths of a CPU or GPU: no request spans two nodes, and
no fraction two GPUs. This is plain arithmetic; it starts nothing and does not import Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from smallcap.config import ComputeConfig
from smallcap.errors import ConfigError
from smallcap.phrasing import describe_count

Node = Mapping[str, float]
"""A node's `CPU` and `GPU`, as Ray counts them."""

LARGEST_BATCH = {"cpu": 64, "cuda": 512}  # images that go through the model together; larger ones gain little
_TYPE = "accelerator_type:"  # how Ray calls the resource that names the type of a node's GPUs
_UNIT = 10_000  # in one CPU or GPU; Ray cuts off what is finer
_MOST_CPUS_PER_ACTOR = 4  # more threads than that help one batch of images or texts little
# Units of each CPU that actors on CPUs leave to the tasks that feed them. No number of actors fills a node of less than
# 359 CPUs: the rest, 9,693 units, is 27 times the prime 359.
_LEFT_OF_CPU = 307
_FEEDING_UNITS = 100  # of such a task, which shares its node's cores with the actors
_CPUS_PER_FEEDING_TASK = 4  # of which it is one at a time; those that are ahead of the actors wait
_WELL_USED = 0.75  # share of the CPUs that could be used, with which fewer actors of more threads are preferred
_MOST_ACTORS_PER_CPU = 2  # more share cores and memory without captioning more
_MOST_CPUS_BESIDE_GPU = 2  # one thread launches kernels, another prepares the next batch
_SHARE_BESIDE_GPU = 4  # an actor on a GPU takes one of so many of its node's CPUs; the others feed it
_MOST_THREADS = 16  # for a search on the CPU
_TASKS_PER_CPU = (1, 2, 4)  # several only where whole CPUs would leave much unused


@dataclass(frozen=True)
class ActorPlan:
    """A pool of model actors, and the tasks that feed it."""

    device: str  # cpu or cuda
    dtype: str  # auto on a GPU, which is asked when the model is loaded
    num_actors: int  # at the start
    cpus_per_actor: float  # Ray's logical CPUs
    gpus_per_actor: float
    max_actors: int  # if the cluster grows
    cpus_per_task: float = 1.0  # of a task that feeds the actors
    load_tasks: int | None = None  # the most tasks that feed the actors at a time; None for what the CPUs allow
    accelerator_type: str | None = None  # of the actors' GPUs, as Ray names it; None for any
    # For torch and faiss in an actor, up to its node's cores. On a GPU they are more than the actor's CPUs: a search on
    # the CPU that all wait for may use those of the loading tasks, which wait as well.
    threads: int = 1


def plan_actors(compute: ComputeConfig, nodes: Sequence[Node]) -> ActorPlan:
    """Resolves a job's compute options.

    Args:
        compute: The options.
        nodes: The cluster's nodes.

    Returns:
        A pool whose actors and at least one task that feeds them run at the same time, also where actors of other jobs
        fill the nodes. If actors took all of the CPUs, they would wait forever for their first batch.

    Raises:
        ConfigError: The cluster has not what the actors ask for, and the pool may not wait for an autoscaler to bring
            it.
    """
    kind = compute.accelerator_type
    on_gpu = compute.device == "cuda" or (
        compute.device == "auto" and (kind is not None or any(node.get("GPU") for node in nodes))
    )
    if not any(node.get("CPU") for node in nodes) and compute.max_actors is None:
        raise ConfigError(
            "No node of the cluster has a CPU for the tasks that read and load.",
            expected="at least one CPU",
            found=f"nodes: {len(nodes)}",
            remedy="Start Ray with CPUs on some node; if an autoscaler brings nodes, set compute.max_actors.",
        )
    return _plan_on_gpus(compute, nodes) if on_gpu else _plan_on_cpus(compute, nodes)


def actors_on(node: Node, cpus: float, gpus: float) -> int:
    """Returns the most actors that a node holds.

    Args:
        node: The node.
        cpus: CPUs of an actor; 0 asks for none.
        gpus: GPUs of an actor: a fraction of one, or a whole number; 0 asks for none. One of the two is not 0.
    """
    by_cpus = _units(node.get("CPU", 0.0)) // _units(cpus) if cpus else None
    cards = int(node.get("GPU", 0.0))
    by_gpus = None
    if gpus:
        by_gpus = cards // int(gpus) if gpus >= 1 else cards * (_UNIT // _units(gpus))
    return min(places for places in (by_cpus, by_gpus) if places is not None)


def tasks_beside(plan: ActorPlan, nodes: Sequence[Node]) -> list[int]:
    """Returns how many tasks that feed the actors each node runs beside the actors with which the pool starts."""
    left = plan.num_actors
    tasks = []
    for node in _with_gpus_of(plan.accelerator_type, nodes):
        actors = min(left, actors_on(node, plan.cpus_per_actor, plan.gpus_per_actor))
        left -= actors
        free = _units(node.get("CPU", 0.0)) - actors * _units(plan.cpus_per_actor)
        tasks.append(free // _units(plan.cpus_per_task))
    return tasks


def _with_gpus_of(kind: str | None, nodes: Sequence[Node]) -> Sequence[Node]:
    """Returns the nodes as they are for actors that take GPUs of one type, or of any: others have none for them."""
    if kind is None:
        return nodes
    return [node if node.get(f"{_TYPE}{kind}") else {**node, "GPU": 0.0} for node in nodes]


def _plan_on_gpus(compute: ComputeConfig, all_nodes: Sequence[Node]) -> ActorPlan:
    gpus = _units(compute.gpus_per_actor) / _UNIT
    _check_type(compute, all_nodes)
    nodes = _with_gpus_of(compute.accelerator_type, all_nodes)
    fitting = sum(actors_on(node, 0, gpus) for node in nodes)
    _check_gpus(compute, nodes, fitting)
    if not fitting:  # an autoscaler is to bring GPUs; few machines have fewer than four CPUs for one
        nodes = [*nodes, {"CPU": 4.0, "GPU": max(1.0, gpus)}]
    automatic = min(max(1, fitting), compute.max_actors or fitting)
    num_actors = automatic if compute.num_actors == "auto" else compute.num_actors
    max_actors = compute.max_actors or num_actors
    places = [min(actors_on(node, 0, gpus), max_actors) for node in nodes]
    shares = [_units(node.get("CPU", 0.0)) // count for node, count in zip(nodes, places, strict=True) if count]
    of_actor = min(shares) // _SHARE_BESIDE_GPU
    if of_actor > _UNIT:  # Ray gives whole CPUs above one
        of_actor = min(of_actor // _UNIT, _MOST_CPUS_BESIDE_GPU) * _UNIT
    free = [_units(node.get("CPU", 0.0)) - count * of_actor for node, count in zip(nodes, places, strict=True)]
    of_task = _units_per_task(free)
    return ActorPlan(
        device="cuda",
        dtype=compute.dtype,
        num_actors=num_actors,
        cpus_per_actor=of_actor / _UNIT,
        gpus_per_actor=gpus,
        max_actors=max_actors,
        cpus_per_task=of_task / _UNIT,
        load_tasks=None if compute.load_cpus == "auto" else compute.load_cpus * _UNIT // of_task,
        accelerator_type=compute.accelerator_type,
        threads=max(1, min(min(shares) // _UNIT, _MOST_THREADS)),
    )


def _check_type(compute: ComputeConfig, nodes: Sequence[Node]) -> None:
    """Refuses a type of GPU that no node has, unless an autoscaler may bring it."""
    kind = compute.accelerator_type
    types = {name.removeprefix(_TYPE) for node in nodes for name in node if name.startswith(_TYPE) and node.get("GPU")}
    if kind is None or kind in types or compute.max_actors is not None:
        return
    raise ConfigError(
        "No node of the cluster has a GPU of this type.",
        where="compute.accelerator_type",
        expected=f"one of {', '.join(sorted(types))}" if types else "a cluster with GPUs",
        found=kind,
        remedy="Write the type as Ray does, or leave it out; if an autoscaler brings such nodes, set "
        "compute.max_actors.",
    )


def _check_gpus(compute: ComputeConfig, nodes: Sequence[Node], fitting: int) -> None:
    """Refuses a pool that could not start.

    Args:
        compute: The options.
        nodes: The cluster's nodes.
        fitting: How many actors its GPUs hold.
    """
    largest = max((int(node.get("GPU", 0.0)) for node in nodes), default=0)
    asks_for_gpus = compute.device == "cuda" or compute.accelerator_type is not None
    if not fitting and not (asks_for_gpus and compute.max_actors is not None):
        if not largest:
            raise ConfigError(
                "No node of the cluster has a GPU.",
                where="compute.device",
                expected="a GPU for cuda",
                found=f"nodes: {len(nodes)}, CPUs: {sum(node.get('CPU', 0.0) for node in nodes):g}",
                remedy="Set compute.device to cpu or auto; if an autoscaler brings GPU nodes, set compute.max_actors.",
            )
        raise ConfigError(
            "No node of the cluster has as many GPUs as an actor asks for.",
            where="compute.gpus_per_actor",
            expected=f"at most {largest}, the GPUs of the largest node",
            found=f"{compute.gpus_per_actor:g}",
            remedy="Lower it; if an autoscaler brings larger nodes, set compute.device to cuda and compute.max_actors.",
        )
    if compute.max_actors is None and compute.num_actors != "auto" and compute.num_actors > fitting:
        raise ConfigError(
            "The cluster's GPUs do not hold so many actors.",
            where="compute.num_actors",
            expected=f"at most {fitting}, with compute.gpus_per_actor {compute.gpus_per_actor:g}",
            found=str(compute.num_actors),
            remedy="Ask for fewer, or for a smaller share of a GPU; if an autoscaler brings nodes, set "
            "compute.max_actors.",
        )


def _units_per_task(free: Sequence[int]) -> int:
    """Returns the CPU units of a loading task: a whole CPU, or less where that would waste over half of what is free.

    Args:
        free: The CPU units that each node has beside the actors.
    """
    for tasks_per_cpu in _TASKS_PER_CPU:
        units = _UNIT // tasks_per_cpu
        if 2 * sum(there // units * units for there in free) >= sum(free):
            break
    return units


def _plan_on_cpus(compute: ComputeConfig, nodes: Sequence[Node]) -> ActorPlan:
    cpus = [_units(node.get("CPU", 0.0)) for node in nodes]
    if not any(cpus):  # an autoscaler is to bring them
        cpus = [4 * _UNIT]
    asked = None if compute.num_actors == "auto" else compute.num_actors
    if asked is not None and compute.max_actors is None and asked * _UNIT > _MOST_ACTORS_PER_CPU * sum(cpus):
        raise _too_many_on_cpus(asked, cpus)
    num_actors, of_actor = _whole_cpus(cpus, asked, compute.max_actors) or (asked or 1, 0)
    of_actor = of_actor or _equal_shares(cpus, num_actors)
    max_actors = compute.max_actors or num_actors
    return ActorPlan(
        device="cpu",
        dtype="float32" if compute.dtype == "auto" else compute.dtype,
        num_actors=num_actors,
        cpus_per_actor=of_actor * (_UNIT - _LEFT_OF_CPU) // _UNIT / _UNIT,
        gpus_per_actor=0.0,
        max_actors=max_actors,
        cpus_per_task=_FEEDING_UNITS / _UNIT,
        load_tasks=_feeding_tasks(compute, cpus) * -(-max_actors // num_actors),
        threads=max(1, of_actor // _UNIT),
    )


def _feeding_tasks(compute: ComputeConfig, cpus: Sequence[int]) -> int:
    """Returns the most tasks that feed the actors with which a pool starts."""
    if compute.load_cpus != "auto":
        return compute.load_cpus
    return max(sum(there > 0 for there in cpus), -(-sum(cpus) // (_CPUS_PER_FEEDING_TASK * _UNIT)))


def _whole_cpus(cpus: Sequence[int], asked: int | None, most: int | None) -> tuple[int, int] | None:
    """Returns a number of actors and the units of each, whole CPUs; None where some must share a CPU.

    Args:
        cpus: Each node's CPU units.
        asked: The number of actors; None takes what there is.
        most: The most actors, where their number is not given.
    """
    pools = []
    for each in range(_MOST_CPUS_PER_ACTOR, 0, -1):
        count = sum(there // _UNIT // each for there in cpus)
        count = min(count, asked or most or count)
        if count > 0 and count >= (asked or 1):
            pools.append((count, each))
    if not pools:
        return None
    best = max(count * each for count, each in pools)
    count, each = next((count, each) for count, each in pools if asked or count * each >= _WELL_USED * best)
    return count, each * _UNIT


def _equal_shares(cpus: Sequence[int], actors: int) -> int:
    """Returns the CPU units of an actor where not all can have a CPU: the largest that suffice."""
    for parts in range(2, _UNIT + 1):
        units = _UNIT // parts
        if sum(there // units for there in cpus) >= actors:
            return units
    raise _too_many_on_cpus(actors, cpus)


def _too_many_on_cpus(actors: int, cpus: Sequence[int]) -> ConfigError:
    there = sum(cpus) / _UNIT
    return ConfigError(
        "The cluster's CPUs do not hold so many actors.",
        where="compute.num_actors",
        expected=f"auto, or at most {_MOST_ACTORS_PER_CPU * sum(cpus) // _UNIT} on {describe_count(there, 'CPU')}",
        found=str(actors),
        remedy="Leave it at auto, which is fastest on CPUs; if an autoscaler brings nodes, set compute.max_actors.",
    )


def _units(quantity: float) -> int:
    return round(quantity * _UNIT)
