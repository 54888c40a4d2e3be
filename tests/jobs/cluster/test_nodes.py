"""The checks of Ray: nodes that agree, differ or say nothing, a real node, and an address where no Ray is."""

from collections.abc import Iterator
from typing import Any

import pytest

from jobs.cluster import nodes
from jobs.cluster.nodes import check_cluster, check_local_ray, compare_nodes
from jobs.cluster.session import connect
from smallcap.doctor.installation import describe_installation
from smallcap.doctor.isolation import Check, Isolation
from smallcap.doctor.report import Finding
from smallcap.errors import RunError
from tests.in_process_ray import in_process_ray

NAMES = {"a": "head", "b": "worker-1", "c": "worker-2"}


def compared(**answers: Any) -> list[Finding]:
    return list(compare_nodes("cluster", answers, NAMES))


def test_nodes_that_agree() -> None:
    here = describe_installation()
    (finding,) = compared(a=here, b=here)
    assert (finding.status, finding.found) == ("ok", "2 nodes with this machine's Python, packages and source")


def test_nodes_that_differ_and_nodes_that_say_nothing() -> None:
    here = describe_installation()
    silent, python, source = compared(
        a=here, b=here | {"python": "3.10.1", "smallcap's source": "0" * 12}, c="smallcap is missing or older there"
    )
    assert {finding.status for finding in (silent, python, source)} == {"fail"}
    assert silent.found == "node worker-2: smallcap is missing or older there"
    assert python.found == f"python is {here['python']} here, but 3.10.1 on worker-1"
    assert source.found.endswith("but 000000000000 on worker-1")


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with in_process_ray():
        monkeypatch.setattr("ray.shutdown", lambda: None)
        yield


@pytest.mark.usefixtures("no_ray")
def test_every_node_is_asked() -> None:
    resources, same = check_cluster("auto")
    assert (resources.status, resources.found) == ("ok", "1 node: 4 CPUs, 0 GPUs, 16.0 GB memory")
    assert same.found == "1 node with this machine's Python, packages and source"
    (local,) = check_local_ray()
    assert (local.status, "with 4 CPUs, and runs a task" in local.found) == ("ok", True)


@pytest.mark.usefixtures("no_ray")
def test_a_node_that_cannot_run_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict[str, str]:
        raise RuntimeError("No module named 'torch'")

    monkeypatch.setattr("smallcap.doctor.installation.describe_installation", broken)
    (local,) = check_local_ray()
    assert (local.status, local.found) == ("fail", "a task does not run: RuntimeError: No module named 'torch'")


def test_nothing_listens_at_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr(nodes, "connect", connect)
    with pytest.raises(RunError, match="nothing listens"):
        list(check_cluster("127.0.0.1:1"))


@pytest.mark.ray
def test_a_real_cluster_and_a_real_local_ray() -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    cluster = Check("cluster", f"{nodes.__name__}:check_cluster", (address,), 100, "Look.")
    local = Check("ray", f"{nodes.__name__}:check_local_ray", (), 100, "Look.")
    with Isolation(lambda *_: None) as isolation:
        resources, same = isolation.run(cluster)
        (started,) = isolation.run(local)
    assert (resources.status, same.status) == ("ok", "ok"), (resources, same)
    assert "1 node: 4 CPUs" in resources.found
    assert started.status == "ok", started
