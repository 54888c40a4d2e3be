"""Plans for clusters, and whether Ray, which places actors and tasks as it likes, can start what they ask for."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from smallcap.config import ComputeConfig
from smallcap.errors import ConfigError
from smallcap.machine.actor_plan import ActorPlan, plan_actors, tasks_beside


def node(cpus: float, gpus: float = 0) -> dict[str, float]:
    return {"CPU": float(cpus), "GPU": float(gpus)} if gpus else {"CPU": float(cpus)}


@pytest.mark.parametrize(
    ("share", "cards", "actors"),
    [
        (0.1, 1, 10), (0.2, 1, 5), (0.25, 1, 4), (0.3, 1, 3), (0.3333, 1, 3), (1 / 3, 1, 3), (0.4, 1, 2), (0.4, 8, 16),
        (0.5, 8, 16), (0.6, 8, 8), (1, 8, 8), (2, 8, 4), (3, 8, 2), (8, 8, 1),
    ],
)  # fmt: skip
def test_a_share_is_of_one_card_and_several_cards_are_of_one_node(share: float, cards: int, actors: int) -> None:
    compute = ComputeConfig(gpus_per_actor=share)
    assert plan_actors(compute, [node(16, cards)]).num_actors == actors
    assert plan_actors(compute, [node(16, cards), node(64, cards), node(8)]).num_actors == 2 * actors


GPU_CLUSTERS: list[tuple[str, dict[str, Any], list[dict[str, float]], tuple[Any, ...], list[int]]] = [
    # name, options, nodes; actors, CPUs of each, CPUs of a task, threads; tasks on each node
    ("a usual node", {}, [node(8, 1)], (1, 2.0, 1.0, 8), [6]),
    ("a large node", {}, [node(192, 8)], (8, 2.0, 1.0, 16), [176]),
    ("a T4 with 4 CPUs", {}, [node(4, 1)], (1, 1.0, 1.0, 4), [3]),
    ("four actors on it", {"gpus_per_actor": 0.25}, [node(4, 1)], (4, 0.25, 1.0, 1), [3]),
    ("one of four on it", {"gpus_per_actor": 0.25, "max_actors": 1}, [node(4, 1)], (1, 1.0, 1.0, 4), [3]),
    ("3 CPUs", {}, [node(3, 1)], (1, 0.75, 1.0, 3), [2]),
    ("2 CPUs", {}, [node(2, 1)], (1, 0.5, 1.0, 2), [1]),
    ("1 CPU", {}, [node(1, 1)], (1, 0.25, 0.5, 1), [1]),
    ("eight actors on 1 CPU", {"gpus_per_actor": 0.125}, [node(1, 1)], (8, 0.0312, 0.5, 1), [1]),
    ("CPU nodes beside", {}, [node(8, 1), node(32), node(2)], (1, 2.0, 1.0, 8), [6, 32, 2]),
    ("CPU nodes beside small ones", {}, [*[node(1, 1)] * 10, node(4)], (10, 0.25, 0.5, 1), [*[1] * 10, 8]),
    ("few CPUs for many GPUs", {}, [node(4, 4), node(64, 1)], (5, 0.25, 1.0, 1), [3, 63]),
    ("no CPU beside the GPU", {}, [node(0, 1), node(8)], (1, 0.0, 1.0, 1), [0, 8]),
    ("two GPUs each", {"gpus_per_actor": 2}, [node(8, 1), node(16, 3), node(16, 2)], (2, 2.0, 1.0, 16), [8, 14, 14]),
    ("from zero", {"device": "cuda", "max_actors": 8}, [node(8)], (1, 1.0, 1.0, 4), [8]),
    ("from zero, and the head does no work", {"device": "cuda", "max_actors": 8}, [node(0)], (1, 1.0, 1.0, 4), [0]),
    (
        "from zero, in halves",
        {"device": "cuda", "max_actors": 8, "gpus_per_actor": 0.5},
        [node(8)],
        (1, 0.5, 1.0, 2),
        [8],
    ),
    (
        "larger nodes are to come",
        {"device": "cuda", "max_actors": 2, "gpus_per_actor": 4},
        [node(8, 1)],
        (1, 1.0, 1.0, 4),
        [8],
    ),
    ("more than there are, to come", {"num_actors": 3, "max_actors": 5}, [node(8, 2)], (3, 1.0, 1.0, 4), [6]),
]


@pytest.mark.parametrize(("options", "nodes", "expected", "tasks"), [row[1:] for row in GPU_CLUSTERS])
def test_an_actor_on_a_gpu_has_cpus_and_the_others_feed_it(
    options: dict[str, Any], nodes: list[dict[str, float]], expected: tuple[Any, ...], tasks: list[int]
) -> None:
    plan = plan_actors(ComputeConfig(**options), nodes)
    assert (plan.device, plan.dtype) == ("cuda", "auto")
    assert (plan.num_actors, plan.cpus_per_actor, plan.cpus_per_task, plan.threads) == expected
    assert tasks_beside(plan, nodes) == tasks


CPU_CLUSTERS: list[tuple[dict[str, Any], list[float], tuple[Any, ...]]] = [
    # options, CPUs of the nodes; actors, threads and CPUs of each; the most loading tasks
    ({}, [1], (1, 1, 0.9693, 1)),
    ({}, [2], (1, 2, 1.9386, 1)),
    ({}, [3], (1, 3, 2.9079, 1)),
    ({}, [4], (1, 4, 3.8772, 1)),
    ({}, [8], (2, 4, 3.8772, 2)),
    ({}, [16], (4, 4, 3.8772, 4)),
    ({}, [64], (16, 4, 3.8772, 16)),
    ({}, [1, 1], (2, 1, 0.9693, 2)),
    ({}, [2, 2], (2, 2, 1.9386, 2)),
    ({}, [3, 3], (2, 3, 2.9079, 2)),
    ({}, [0, 3, 3], (2, 3, 2.9079, 2)),
    ({}, [64, 2], (16, 4, 3.8772, 17)),
    ({}, [4] * 100, (100, 4, 3.8772, 100)),
    ({"max_actors": 1}, [8], (1, 4, 3.8772, 2)),
    ({"max_actors": 8}, [8], (2, 4, 3.8772, 8)),
    ({"load_cpus": 3}, [8], (2, 4, 3.8772, 3)),
    ({"num_actors": 2}, [4], (2, 2, 1.9386, 1)),
    ({"num_actors": 2}, [1], (2, 1, 0.4846, 1)),
    ({"num_actors": 16}, [8], (16, 1, 0.4846, 2)),
    ({"max_actors": 4}, [0], (1, 4, 3.8772, 4)),
]


@pytest.mark.parametrize(("options", "cpus", "expected"), CPU_CLUSTERS)
def test_actors_on_cpus_take_all_but_a_little_of_each_also_on_small_nodes(
    options: dict[str, Any], cpus: list[float], expected: tuple[Any, ...]
) -> None:
    plan = plan_actors(ComputeConfig(**options), [node(count) for count in cpus])
    assert (plan.device, plan.gpus_per_actor) == ("cpu", 0)
    assert (plan.num_actors, plan.threads, plan.cpus_per_actor, plan.load_tasks) == expected


def typed(name: str, cpus: float, gpus: float) -> dict[str, float]:
    return node(cpus, gpus) | {f"accelerator_type:{name}": 1.0}


def test_actors_run_on_gpus_of_the_type_that_is_asked_for_and_the_other_nodes_feed_them() -> None:
    nodes = [typed("T4", 8, 1), typed("L4", 16, 2), node(8)]
    plan = plan_actors(ComputeConfig(accelerator_type="L4"), nodes)
    assert (plan.num_actors, plan.accelerator_type, tasks_beside(plan, nodes)) == (2, "L4", [8, 12, 8])
    assert plan_actors(ComputeConfig(), nodes).num_actors == 3
    with pytest.raises(ConfigError, match=r"of this type(.|\n)*one of L4, T4\n  found: H100"):
        plan_actors(ComputeConfig(accelerator_type="H100"), nodes)
    with pytest.raises(ConfigError, match=r"expected: a cluster with GPUs"):
        plan_actors(ComputeConfig(accelerator_type="H100"), [node(8)])
    to_come = plan_actors(ComputeConfig(accelerator_type="H100", max_actors=4), nodes)
    assert (to_come.device, to_come.num_actors, to_come.max_actors) == ("cuda", 1, 4)
    with pytest.raises(ValidationError, match="--accelerator-type is of GPUs"):
        ComputeConfig(accelerator_type="L4", device="cpu")


@pytest.mark.parametrize(("cpus", "load_cpus", "tasks"), [(8, 3, 3), (1, 1, 2), (8, "auto", None)])
def test_loading_beside_gpus_may_be_limited(cpus: float, load_cpus: Any, tasks: int | None) -> None:
    assert plan_actors(ComputeConfig(load_cpus=load_cpus), [node(cpus, 1)]).load_tasks == tasks


def test_the_device_is_the_one_asked_for_or_the_one_that_is_there() -> None:
    assert plan_actors(ComputeConfig(device="cpu"), [node(8, 2)]).gpus_per_actor == 0
    assert plan_actors(ComputeConfig(max_actors=8), [node(8)]).device == "cpu"  # `auto` takes what there is
    assert plan_actors(ComputeConfig(dtype="float16"), [node(8, 2)]).dtype == "float16"


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({}, (2, 2)),
        ({"max_actors": 8}, (2, 8)),
        ({"max_actors": 1}, (1, 1)),
        ({"num_actors": 1}, (1, 1)),
        ({"num_actors": 1, "max_actors": 5}, (1, 5)),
        ({"device": "cpu", "max_actors": 6}, (2, 6)),
    ],
)
def test_a_pool_has_what_the_cluster_has_and_may_grow_to_what_is_allowed(
    options: dict[str, Any], sizes: tuple[int, int]
) -> None:
    plan = plan_actors(ComputeConfig(**options), [node(8, 2)])
    assert (plan.num_actors, plan.max_actors) == sizes


@pytest.mark.parametrize(
    ("options", "nodes", "message"),
    [
        ({"device": "cuda"}, [node(8)], r"No node .* has a GPU(.|\n)*set compute\.max_actors"),
        ({"gpus_per_actor": 2}, [node(8, 1), node(8, 1)], r"as many GPUs as an actor asks for(.|\n)*at most 1"),
        ({"gpus_per_actor": 2, "max_actors": 2}, [node(8, 1)], r"set compute\.device to cuda"),
        ({"num_actors": 3}, [node(8, 2)], r"do not hold so many actors(.|\n)*at most 2"),
        ({"num_actors": 20, "gpus_per_actor": 0.4}, [node(64, 8)], r"at most 16"),
        ({}, [node(0, 1)], "has a CPU for the tasks"),
        ({}, [node(0)], "has a CPU for the tasks"),
        ({"num_actors": 100_000, "device": "cpu"}, [node(8)], "do not hold so many actors"),
        ({"num_actors": 64}, [node(4)], r"at most 8 on 4 CPUs\n  found: 64\n  remedy: Leave it at auto"),
        ({"num_actors": 3}, [node(1)], r"at most 2 on 1 CPU\n"),
    ],
)
def test_what_can_never_start_is_refused(options: dict[str, Any], nodes: list[dict[str, float]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_actors(ComputeConfig(**options), nodes)


def test_options_that_contradict_each_other_or_ray() -> None:
    with pytest.raises(ValidationError, match="--max-actors is 2"):
        ComputeConfig(num_actors=3, max_actors=2)
    with pytest.raises(ValidationError, match="whole number"):
        ComputeConfig(gpus_per_actor=1.5)


@dataclass
class RayNode:
    """A node as Ray's raylet allots it: one number of CPUs, and a number for each card."""

    cpus: int
    cards: list[int]

    @classmethod
    def of(cls, resources: Mapping[str, float]) -> "RayNode":
        return cls(int(resources["CPU"] * 10_000), [10_000] * int(resources.get("GPU", 0)))

    def take(self, cpus: float, gpus: float) -> bool:
        cpu_units, gpu_units = round(cpus * 10_000), int(gpus * 10_000)
        whole = gpu_units // 10_000
        fitting = [card for card, left in enumerate(self.cards) if left >= (10_000 if whole else gpu_units)]
        if self.cpus < cpu_units or len(fitting) < (whole or (1 if gpu_units else 0)):
            return False
        self.cpus -= cpu_units
        for card in fitting[: max(1, whole)] if gpu_units else []:
            self.cards[card] -= 10_000 if whole else gpu_units
        return True


def places(
    plan: ActorPlan, nodes: list[dict[str, float]], chance: random.Random, most: int | None = None
) -> tuple[int, int]:
    """Places the plan's actors, or so many, and then tasks, each on any node with room; returns how many there are."""
    cluster = [RayNode.of(resources) for resources in nodes]

    def place(cpus: float, gpus: float) -> bool:
        return any(there.take(cpus, gpus) for there in chance.sample(cluster, len(cluster)))

    actors = sum(place(plan.cpus_per_actor, plan.gpus_per_actor) for _ in range(most or plan.num_actors))
    tasks = 0
    while place(plan.cpus_per_task, 0):
        tasks += 1
    return actors, tasks


@given(
    nodes=st.lists(st.builds(node, st.integers(0, 66), st.sampled_from([0, 0, 1, 1, 2, 4, 8])), min_size=1, max_size=6),
    share=st.one_of(st.sampled_from([0.1, 0.2, 0.25, 0.3, 0.4, 1, 2]), st.floats(0.01, 1)),
    num_actors=st.one_of(st.just("auto"), st.integers(1, 100)),
    device=st.sampled_from(["cpu", "auto"]),
    seed=st.integers(0, 99),
)
def test_wherever_ray_puts_them_all_actors_start_and_are_fed(
    nodes: list[dict[str, float]], share: float, num_actors: Any, device: Any, seed: int
) -> None:
    try:
        plan = plan_actors(ComputeConfig(gpus_per_actor=share, num_actors=num_actors, device=device), nodes)
    except ConfigError:
        cpus, gpus = (sum(resources.get(kind, 0) for resources in nodes) for kind in ("CPU", "GPU"))
        assert not cpus or (gpus and device == "auto") or num_actors > 2 * cpus
        return
    actors, tasks = places(plan, nodes, random.Random(seed))
    assert actors == plan.num_actors
    assert tasks >= 1
    if plan.device == "cpu":
        assert plan.load_tasks is not None
        assert tasks >= plan.load_tasks
        assert places(plan, nodes, random.Random(seed), 1000)[1] >= 1  # other jobs' actors fill the nodes
    if num_actors == "auto" and plan.device == "cuda":
        assert tasks == sum(tasks_beside(plan, nodes))
        more = replace(plan, num_actors=plan.num_actors + 1, cpus_per_actor=0.0)
        assert places(more, nodes, random.Random(seed))[0] == plan.num_actors  # the cards are full
