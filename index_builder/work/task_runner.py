"""Where a build's work items run: the interface, and the simplest implementation, this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from smallcap.machine.actor_plan import ActorPlan

Item = TypeVar("Item")
Result = TypeVar("Result")


class TaskRunner(Protocol):
    """A place that runs work items.

    It may run an item again where a worker was lost: functions and actors are pure functions of their item and of
    immutable files. Functions, arguments, items (small descriptions of work, never the data itself) and results can be
    pickled. A `SmallCapError` reaches the caller unchanged.
    """

    def node_resources(self) -> Sequence[Mapping[str, float]]:
        """Returns each node's resources: `CPU`, and where they are known `GPU` and `memory` in bytes."""

    def run_tasks(
        self, function: Callable[[Item], Result], items: Sequence[Item], memory_bytes: int | None = None
    ) -> Iterator[tuple[int, Result]]:
        """Runs `function` on every item; yields (position of the item, result) in the order of finishing.

        Args:
            function: The function.
            items: The items, at least one.
            memory_bytes: How much memory one task needs, where that is much; a node then runs fewer tasks at once.
        """

    def run_actors(
        self, actor: Callable[..., Any], arguments: tuple[Any, ...], items: Sequence[Any], plan: ActorPlan
    ) -> Iterator[tuple[int, Any]]:
        """Does the same as `run_tasks` with instances of `actor`, made from `arguments`; the plan says how many."""


class LocalRunner:
    """Runs work items in this process, one at a time: enough for small indexes."""

    def node_resources(self) -> list[dict[str, float]]:
        """Returns one CPU, so that a single actor is planned, and the GPU if there is one."""
        import torch

        return [{"CPU": 1.0, "GPU": float(torch.cuda.is_available())}]

    def run_tasks(
        self, function: Callable[[Item], Result], items: Sequence[Item], memory_bytes: int | None = None
    ) -> Iterator[tuple[int, Result]]:
        """Runs items in their order; `memory_bytes` is ignored."""
        for position, item in enumerate(items):
            yield position, function(item)

    def run_actors(
        self, actor: Callable[..., Any], arguments: tuple[Any, ...], items: Sequence[Any], plan: ActorPlan
    ) -> Iterator[tuple[int, Any]]:
        """Runs items in their order with one instance, which may use all threads of this process."""
        yield from self.run_tasks(actor(*arguments), items)
