"""Where Ray is asked to put what, and the threads of an actor, where Ray would leave it one."""

import os
import sys
from collections.abc import Iterator

import faiss
import pytest
import torch

from jobs.cluster import resources
from jobs.cluster.resources import actor_resources, on_working_nodes, use_threads
from smallcap.machine.actor_plan import ActorPlan


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads(), faiss.omp_get_max_threads()
    yield
    torch.set_num_threads(before[0])
    faiss.omp_set_num_threads(before[1])


@pytest.mark.parametrize("threads", [1, 2, 1000])
def test_torch_and_faiss_get_the_plans_threads_up_to_the_cores(threads: int) -> None:
    given = min(threads, len(os.sched_getaffinity(0)))
    assert use_threads(threads) == given
    assert (torch.get_num_threads(), faiss.omp_get_max_threads()) == (given, given)


def test_faiss_is_not_imported_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "faiss")
    use_threads(1)
    assert "faiss" not in sys.modules


def test_what_asks_for_no_cpu_keeps_off_nodes_that_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    cpus = {"a1": 4.0, "b2": 0.0, "c3": None}
    nodes = {
        node: {"Resources": {"GPU": 1.0} | ({} if count is None else {"CPU": count})} for node, count in cpus.items()
    }
    monkeypatch.setattr(resources, "living_nodes", lambda: nodes)
    assert on_working_nodes() == {"label_selector": {"ray.io/node-id": "!in(b2,c3)"}}
    del nodes["b2"], nodes["c3"]
    assert on_working_nodes() == {}


def test_an_actor_asks_for_the_plans_resources() -> None:
    plan = ActorPlan("cuda", "auto", 1, 2.0, 0.5, 1)
    assert actor_resources(plan) == {"num_cpus": 2.0, "num_gpus": 0.5}
    typed = ActorPlan("cuda", "auto", 1, 2.0, 1.0, 1, accelerator_type="L4")
    assert actor_resources(typed) == {"num_cpus": 2.0, "num_gpus": 1.0, "accelerator_type": "L4"}
