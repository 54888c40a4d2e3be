"""Checks Ray: that it starts on this machine, and that a cluster's nodes answer and have the same software.

`smallcap doctor` runs these checks, each in its own process: Ray's C++ side may end a process that it cannot serve.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jobs.cluster.resources import living_nodes, node_resources
from jobs.cluster.session import connect
from jobs.cluster.start_errors import newest_logs
from smallcap.doctor.installation import describe_installation
from smallcap.doctor.report import Finding, fail, ok
from smallcap.phrasing import describe_count, describe_gb

_ANSWER_S = 60.0  # for a task on a node, whose first worker imports smallcap
_SHOWN = 3  # nodes that a line names
_SAME = "Install the same smallcap, Python and Ray on all nodes, and from the same checkout."


def check_local_ray() -> Iterator[Finding]:
    """Starts Ray on this machine as a job without a cluster does, runs a task, and stops it."""
    import ray

    start = time.monotonic()
    connect("local")
    try:
        started = time.monotonic() - start
        (answer,) = _ask_nodes(living_nodes()).values()
        if isinstance(answer, str):
            yield fail("ray", f"a task does not run: {answer}", f"Look at the newest logs in {newest_logs()}.")
            return
        cpus = sum(resources.get("CPU", 0.0) for resources in node_resources())
        yield ok(
            "ray",
            f"{ray.__version__} starts here in {started:.1f} s with {describe_count(cpus, 'CPU')}, and runs a task",
        )
    finally:
        ray.shutdown()


def check_cluster(address: str) -> Iterator[Finding]:
    """Connects to a cluster, runs a task on each node, and compares their software with this machine's.

    Args:
        address: As a job takes it.

    Raises:
        RunError: There is no cluster, or it refuses this process.
    """
    subject = f"cluster {address}"
    connect(address)
    nodes = living_nodes()
    yield ok(subject, f"{describe_count(len(nodes), 'node')}: {_describe_resources(nodes)}")
    answers = _ask_nodes(nodes)
    yield from compare_nodes(subject, answers, {node: _name(nodes[node]) for node in answers})


def _ask_nodes(nodes: Iterable[str]) -> dict[str, dict[str, str] | str]:
    """Returns what each of the nodes, by their ids, has installed; or, in words, why it does not say so."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def describe_node() -> dict[str, str] | str:  # sent by value: a node may lack smallcap, or this module
        try:
            from smallcap.doctor.installation import describe_installation
        except ImportError as error:
            return f"smallcap is missing or older there ({error})"
        return describe_installation()

    asked = {
        node: ray.remote(describe_node)
        .options(num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
        .remote()
        for node in nodes
    }
    deadline = time.monotonic() + _ANSWER_S
    answers: dict[str, dict[str, str] | str] = {}
    for node, answer in asked.items():
        try:
            answers[node] = ray.get(answer, timeout=max(0.0, deadline - time.monotonic()))
        except Exception as error:  # noqa: BLE001 - one node's failure; the others are asked as well
            lines = str(error).strip().splitlines() or [""]
            answers[node] = f"{type(error).__name__}: {lines[-1][:200]}"
    return answers


def compare_nodes(
    subject: str, answers: Mapping[str, dict[str, str] | str], names: Mapping[str, str]
) -> Iterator[Finding]:
    """Compares what nodes have installed with what this machine has.

    Args:
        subject: What the findings are about.
        answers: By node id, the node's `describe_installation`, or why it does not answer.
        names: By node id, how people know the node.
    """
    here = describe_installation()
    silent = {node: answer for node, answer in answers.items() if isinstance(answer, str)}
    for node, answer in silent.items():
        yield fail(subject, f"node {names[node]}: {answer}", f"{_SAME} Look at the node's logs in /tmp/ray.")
    differing = False
    for name, version in here.items():
        others = {node: answer.get(name, "none") for node, answer in answers.items() if not isinstance(answer, str)}
        odd = {node: other for node, other in others.items() if other != version}
        if odd:
            differing = True
            shown = ", ".join(f"{other} on {names[node]}" for node, other in list(odd.items())[:_SHOWN])
            more = f" and {len(odd) - _SHOWN} more" if len(odd) > _SHOWN else ""
            yield fail(subject, f"{name} is {version} here, but {shown}{more}", _SAME)
    if not differing and not silent:
        yield ok(subject, f"{describe_count(len(answers), 'node')} with this machine's Python, packages and source")


def _describe_resources(nodes: Mapping[str, Mapping[str, Any]]) -> str:
    totals = {
        name: sum(node["Resources"].get(name, 0.0) for node in nodes.values()) for name in ("CPU", "GPU", "memory")
    }
    return ", ".join(
        [
            describe_count(totals["CPU"], "CPU"),
            describe_count(totals["GPU"], "GPU"),
            f"{describe_gb(int(totals['memory']))} memory",
        ]
    )


def _name(node: Mapping[str, Any]) -> str:
    return str(node.get("NodeManagerHostname") or node.get("NodeManagerAddress") or node["NodeID"][:8])
