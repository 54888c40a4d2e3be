"""Says when a job stands still, or waits for what Ray has no room for: what was asked for, and what there is.

Ray itself waits without a word, for ever where it must.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

from jobs.cluster.addresses import within
from smallcap.phrasing import describe_count, describe_duration, describe_gb

WAITS_S, STILL_S = 60.0, 120.0  # after which what waits for room, and what does not move, is told
_LOOK_EVERY_S = 15.0
_LONGEST_PAUSE_S = 1800.0  # between two lines of one wait, each of which comes after twice the time of the one before
_ANSWER_S = 10.0
_SHOWN = 3  # kinds of requests that a line names
_COUNTED = {"CPU": "CPU", "GPU": "GPU"}  # resources in words, with their nouns

Request = tuple[tuple[str, float], ...]
"""The resources of a task, an actor or a bundle, by name."""


@dataclass(frozen=True)
class Demand:
    """What the whole cluster is asked for and has not started, and what there is."""

    asked: Mapping[Request, int]  # how often each request waits
    nodes: Sequence[tuple[Mapping[str, float], Mapping[str, float]]]  # each node's resources, and what of them is free


def cluster_demand() -> Demand | None:
    """Returns the demand of the cluster that this process is connected to; None where there is none, or no answer."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized() or ray.util.client.ray.is_connected():
        return None
    try:
        return within(_ANSWER_S, _ask)
    except Exception:  # noqa: BLE001 - a line for people; whether Ray lives is watched elsewhere
        return None


def _ask() -> Demand:
    from ray._private.worker import global_worker
    from ray.autoscaler.v2.sdk import get_cluster_resource_state
    from ray.core.generated.autoscaler_pb2 import NodeStatus

    state = get_cluster_resource_state(global_worker.gcs_client)
    asked: Counter[Request] = Counter()
    for waiting in state.pending_resource_requests:
        asked[_request(waiting.request.resources_bundle)] += waiting.count
    for group in state.pending_gang_resource_requests:
        asked.update(_request(request.resources_bundle) for request in group.requests)
    living = [node for node in state.node_states if node.status != NodeStatus.DEAD]
    return Demand(asked, [(dict(node.total_resources), dict(node.available_resources)) for node in living])


def _request(bundle: Mapping[str, float]) -> Request:
    return tuple(sorted((name, round(amount, 4)) for name, amount in bundle.items() if amount))


class Standstill:
    """Notices that nothing moves, or that something waits for room.

    Args:
        demand: Returns what the cluster is asked for; None where that is unknown.
    """

    def __init__(self, demand: Callable[[], Demand | None] = cluster_demand) -> None:
        self._demand = demand
        self._progress: Hashable = object()
        self._moved_at = self._look_at = self._say_at = 0.0
        self._pause_s = WAITS_S
        self._since: dict[Request, float] = {}

    def look(self, progress: Hashable, is_short: bool, now: float) -> str | None:
        """Returns a line where one is due.

        Args:
            progress: Differs whenever something has moved; None where that is not known.
            is_short: Whether the job has less on the cluster than it asked for.
            now: Seconds, as of a clock.
        """
        if progress != self._progress:
            self._progress, self._moved_at = progress, now
            if not is_short:
                self._say_at, self._pause_s = now, WAITS_S
        still_s = now - self._moved_at
        if now < self._look_at or not (is_short or still_s >= WAITS_S):
            return None
        self._look_at = now + _LOOK_EVERY_S
        demand = self._demand()
        if demand is None:
            return None
        lasting = self._lasting(demand, now)
        if still_s < WAITS_S:  # loading tasks, which ask for memory, wait for their turn all the time
            lasting = {request: seconds for request, seconds in lasting.items() if "memory" not in dict(request)}
        is_told = lasting or (still_s >= STILL_S and progress is not None)
        if not is_told or now < self._say_at:
            return None
        self._say_at, self._pause_s = now + self._pause_s, min(2 * self._pause_s, _LONGEST_PAUSE_S)
        return describe_wait(demand, lasting, still_s)

    def _lasting(self, demand: Demand, now: float) -> dict[Request, float]:
        """Returns the requests that have waited for long enough to be told, with the seconds."""
        self._since = {request: self._since.get(request, now) for request in demand.asked}
        waited = {request: now - since for request, since in self._since.items()}
        # The first look comes when nothing has moved for as long: what waits then has most likely waited all the time.
        least_s = WAITS_S if now - self._moved_at < WAITS_S else 0.0
        return {request: seconds for request, seconds in waited.items() if seconds >= least_s}


def describe_wait(demand: Demand, lasting: Mapping[Request, float], still_s: float) -> str:
    """Returns what waits and what there is, in one line.

    Args:
        demand: That of the cluster.
        lasting: The requests that wait, with the seconds; none where something else holds the job up.
        still_s: Seconds in which nothing has moved.
    """
    moved = f"Nothing has moved for {describe_duration(still_s)}. " if still_s >= WAITS_S else ""
    there = _describe_nodes(demand)
    if not lasting:
        return f"{moved}Ray has started all that it was asked for, on {there}. Its logs on the nodes may say more."
    shown = sorted(lasting, key=lambda request: -demand.asked[request])[:_SHOWN]
    asked = ", ".join(f"{demand.asked[request]} × ({_describe_request(request)})" for request in shown)
    more = f" and {len(lasting) - len(shown)} other kinds" if len(lasting) > len(shown) else ""
    too_large = [request for request in shown if not any(_fits(request, total) for total, _ in demand.nodes)]
    if too_large:
        remedy = "No node is large enough for that: add one that is, or ask for less."
    else:
        remedy = "Other jobs or tasks hold the rest: this goes on when they end, or when nodes are added."
    return f"{moved}Ray has no room for what it is asked to start: {asked}{more}. The cluster has {there}. {remedy}"


def _fits(request: Request, node: Mapping[str, float]) -> bool:
    return all(node.get(name, 0.0) >= amount for name, amount in request)


def _describe_request(request: Request) -> str:
    return ", ".join(_describe_amount(name, amount) for name, amount in request)


def _describe_amount(name: str, amount: float) -> str:
    if name in _COUNTED:
        return describe_count(amount, _COUNTED[name])
    if name == "memory":
        return f"{describe_gb(int(amount))} of memory"
    kind, colon, value = name.partition(":")
    return f"a GPU of type {value}" if colon and kind == "accelerator_type" else f"{amount:g} {name}"


def _describe_nodes(demand: Demand) -> str:
    kinds = []
    for name, noun in _COUNTED.items():
        total, free = (sum(node[place].get(name, 0.0) for node in demand.nodes) for place in (0, 1))
        largest = max((node[0].get(name, 0.0) for node in demand.nodes), default=0.0)
        on_one = f", at most {largest:g} on a node" if len(demand.nodes) > 1 else ""
        if total or name == "CPU":
            kinds.append(f"{describe_count(total, noun)} ({round(free, 2):g} free{on_one})")
    memory = sum(free.get("memory", 0.0) for _, free in demand.nodes)
    kinds.append(f"{describe_gb(int(memory))} of free memory")
    return f"{describe_count(len(demand.nodes), 'node')} with {', '.join(kinds)}"
