import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from smallcap.config import ComputeConfig
from smallcap.errors import ConfigError
from smallcap.machine.actor_plan import plan_actors


def test_a_gpu_is_used_where_there_is_one_and_can_be_shared_and_left_alone() -> None:
    plan = plan_actors(ComputeConfig(), [{"CPU": 8}, {"CPU": 16, "GPU": 4}])
    assert (plan.device, plan.dtype, plan.num_actors, plan.gpus_per_actor) == ("cuda", "auto", 4, 1)
    assert plan.cpus_per_actor == 0  # a reserved CPU would be one less for decoding
    assert plan_actors(ComputeConfig(gpus_per_actor=0.5), [{"CPU": 8, "GPU": 2}]).num_actors == 4
    assert plan_actors(ComputeConfig(device="cpu"), [{"CPU": 8, "GPU": 2}]).gpus_per_actor == 0
    with pytest.raises(ConfigError, match="No node of the cluster has a GPU"):
        plan_actors(ComputeConfig(device="cuda"), [{"CPU": 8}])


def test_a_pool_has_what_the_cluster_has_and_may_grow_to_what_is_allowed() -> None:
    nodes = [{"CPU": 8.0, "GPU": 2.0}]
    for compute, sizes in (
        (ComputeConfig(), (2, 2)),
        (ComputeConfig(max_actors=8), (2, 8)),
        (ComputeConfig(max_actors=1), (1, 1)),
        (ComputeConfig(num_actors=3), (3, 3)),
        (ComputeConfig(num_actors=3, max_actors=5), (3, 5)),
        (ComputeConfig(device="cpu", max_actors=6), (1, 6)),
    ):
        plan = plan_actors(compute, nodes)
        assert (plan.num_actors, plan.max_actors) == sizes
    with pytest.raises(ValidationError, match="--max-actors is 2"):
        ComputeConfig(num_actors=3, max_actors=2)


def test_a_pool_may_wait_for_the_autoscalers_first_gpu() -> None:
    plan = plan_actors(ComputeConfig(device="cuda", max_actors=8, gpus_per_actor=0.5), [{"CPU": 8.0}])
    assert (plan.device, plan.dtype, plan.num_actors, plan.max_actors) == ("cuda", "auto", 1, 8)
    assert (plan.cpus_per_actor, plan.gpus_per_actor) == (0.0, 0.5)
    # `auto` takes what there is
    assert plan_actors(ComputeConfig(max_actors=8), [{"CPU": 8.0}]).device == "cpu"
    with pytest.raises(ConfigError, match=r"set compute\.max_actors"):
        plan_actors(ComputeConfig(device="cuda"), [{"CPU": 8.0}])


@given(
    cpus=st.lists(st.integers(1, 64), min_size=1, max_size=4),
    num_actors=st.one_of(st.just("auto"), st.integers(1, 100)),
)
def test_cpu_actors_fit_their_nodes_and_leave_room_for_the_tasks(cpus: list[int], num_actors: int | str) -> None:
    plan = plan_actors(ComputeConfig(num_actors=num_actors), [{"CPU": float(n)} for n in cpus])  # type: ignore[arg-type]
    assert plan.num_actors >= 1
    assert 0 < plan.cpus_per_actor <= max(cpus)
    assert plan.cpus_per_actor < 1 or plan.cpus_per_actor == int(plan.cpus_per_actor)
    if sum(cpus) > 1:
        assert plan.num_actors * plan.cpus_per_actor <= sum(cpus) - 1 + 1e-9
