"""Runs a build's stages: times them, tells their progress, and skips work items whose results are recorded."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from index_builder.work.staging import Staging, run_recorded
from index_builder.work.task_runner import TaskRunner
from smallcap.config import ComputeConfig
from smallcap.errors import ConfigError
from smallcap.machine.actor_plan import ActorPlan, plan_actors

Item = TypeVar("Item")
Result = TypeVar("Result")

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, the number of its units that are done, and the number of all its units, as far as known.

It is called when a stage begins, and whenever an item has ended. Units are rows, or items where rows are not counted.
"""


@dataclass(frozen=True)
class Sizes:
    """How large the items of a stage are.

    Attributes:
        of_items: The rows of each item, or 1 where items are counted.
        counted: A function of an item's position and result that counts its rows, where `of_items` are estimates.
        memory_bytes: How much memory one task needs, where that is much.
    """

    of_items: Sequence[int]
    counted: Callable[[int, Any], int] | None = None
    memory_bytes: int | None = None


class StageRunner:
    """Runs the work items of one build.

    Args:
        tasks: Where they run.
        compute: What actors run on.
        progress: A function that is told of every finished item.

    Attributes:
        seconds: Wall time of each stage, in the order of the stages.
    """

    def __init__(self, tasks: TaskRunner, compute: ComputeConfig, progress: Progress) -> None:
        self._tasks, self._compute = tasks, compute
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self._in_stage = False

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a stage; everything that runs in the block counts as part of this stage."""
        start = time.perf_counter()
        outermost, self._in_stage = not self._in_stage, True
        try:
            yield
        finally:
            if outermost:
                self._in_stage = False
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def run(self, stage: str, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Runs a function over items in tasks; returns the results in order."""
        return self._collect(stage, self._tasks.run_tasks(function, items) if items else (), Sizes([1] * len(items)))

    def run_recorded(
        self,
        staging: Staging,
        stage: str,
        kind: type[Result],
        function: Callable[[Any], Result],
        items: Sequence[Any],
        sizes: Sizes | None = None,
    ) -> list[Result]:
        """Does the same as `run`, but skips items that have a recorded result.

        Args:
            staging: Where results are recorded.
            stage: The stage's name.
            kind: The type of the results.
            function: See `TaskRunner`.
            items: The work.
            sizes: How large the items are; by default they are counted.
        """
        sizes = sizes or Sizes([1] * len(items))
        run = partial(self._tasks.run_tasks, memory_bytes=sizes.memory_bytes)
        return self._collect(stage, run_recorded(staging.results(stage, kind), function, items, run), sizes)

    def run_actors(
        self,
        stage: str,
        actor: Callable[..., Callable[[Item], Result]],
        arguments: Callable[[str], tuple[Any, ...]],
        items: Sequence[Item],
        sizes: Sizes | None = None,
    ) -> list[Result]:
        """Runs items in actors that load a model; returns the results in order.

        Args:
            stage: The stage's name.
            actor: The actors' class.
            arguments: A function of the torch device that returns the arguments of each actor.
            items: The work.
            sizes: How large the items are; by default they are counted.
        """
        plan = self.plan_actors()
        results = self._tasks.run_actors(actor, arguments(plan.device), items, plan)
        return self._collect(stage, results, sizes or Sizes([1] * len(items)))

    def plan_actors(self) -> ActorPlan:
        """Returns how many actors there is room for, and which device they use."""
        return plan_actors(self._compute, self._tasks.node_resources())

    def check_memory(self, stage: str, needed_bytes: int) -> None:
        """Checks that a node has the memory that one task of a stage needs.

        Raises:
            ConfigError: No node has it.
        """
        largest = max((int(node.get("memory", 0)) for node in self._tasks.node_resources()), default=0)
        if largest and needed_bytes > largest:
            raise ConfigError(
                "No node has the memory that this stage needs.",
                where=stage,
                expected=f"{needed_bytes / 1e9:.1f} GB",
                found=f"{largest / 1e9:.1f} GB on the largest node",
                remedy="Use more --shards, an --index-key with fewer lists, or a larger node.",
            )

    def _collect(self, stage: str, results: Iterable[tuple[int, Result]], sizes: Sizes) -> list[Result]:
        """Gathers results in the order of their items, and tells the progress."""
        done, total = 0, sum(sizes.of_items)
        gathered: dict[int, Result] = {}
        with self.stage(stage):
            if sizes.of_items:
                self.progress(stage, 0, total)
            for position, result in results:
                gathered[position] = result
                size = sizes.of_items[position]
                rows = sizes.counted(position, result) if sizes.counted else size
                done, total = done + rows, total + rows - size
                self.progress(stage, done, total)
        return [gathered[position] for position in range(len(sizes.of_items))]
