"""Where a build's work items run: what a place must offer, and the simplest place, this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from smallcap.machine.actor_plan import ActorPlan

Item = TypeVar("Item")
Result = TypeVar("Result")


class TaskRunner(Protocol):
    """A place that runs work items.

    It may run an item again, where a worker was lost: functions and actors are pure functions of their item and of
    immutable files. Functions, arguments, items (small descriptions of work, never the data itself) and results can be
    pickled. A `SmallCapError` of an item is raised as itself.
    """

    def node_resources(self) -> Sequence[Mapping[str, float]]:
        """Returns what each node has: `CPU`, and where they are known `GPU` and `memory` in bytes."""

    def run_tasks(
        self, function: Callable[[Item], Result], items: Sequence[Item], memory_bytes: int | None = None
    ) -> Iterator[tuple[int, Result]]:
        """Runs `function` on every item; yields (position of the item, result) in the order of finishing.

        Args:
            function: What is run.
            items: At least one.
            memory_bytes: What one task needs, where that is much; fewer then run at once on a node.
        """

    def run_actors(
        self, actor: Callable[..., Any], arguments: tuple[Any, ...], items: Sequence[Any], plan: ActorPlan
    ) -> Iterator[tuple[int, Any]]:
        """Like `run_tasks` with instances of `actor`, each built once from `arguments`; the plan says how many."""


class LocalRunner:
    """Runs work items in this process, one after the other: enough for small indexes."""

    def node_resources(self) -> list[dict[str, float]]:
        """Returns one CPU, so that one actor is planned, and the GPU if there is one."""
        import torch

        return [{"CPU": 1.0, "GPU": float(torch.cuda.is_available())}]

    def run_tasks(
        self, function: Callable[[Item], Result], items: Sequence[Item], memory_bytes: int | None = None
    ) -> Iterator[tuple[int, Result]]:
        """Runs items in their order; the memory is what the machine has."""
        for position, item in enumerate(items):
            yield position, function(item)

    def run_actors(
        self, actor: Callable[..., Any], arguments: tuple[Any, ...], items: Sequence[Any], plan: ActorPlan
    ) -> Iterator[tuple[int, Any]]:
        """Runs items in their order with one instance, which has all threads of this process."""
        yield from self.run_tasks(actor(*arguments), items)
