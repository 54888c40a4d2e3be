"""What the builder's tests share: running its work items here instead of on Ray."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import index_builder.work.stage_runner as runner_module
from smallcap.machine.actor_plan import ActorPlan


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the work items here, one after the other, last one first: quick, and another schedule than Ray's."""
    run_here(monkeypatch)


@pytest.fixture(scope="module")
def module_in_process() -> Iterator[None]:
    """`in_process` for all of a module."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_here(monkeypatch)
        yield


def run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_tasks(function: Any, items: Any, memory_bytes: int | None = None) -> Iterator[tuple[int, Any]]:
        for position in reversed(range(len(items))):
            yield position, function(items[position])

    def run_actors(actor: Any, arguments: Any, items: Any, plan: ActorPlan) -> Iterator[tuple[int, Any]]:
        yield from run_tasks(actor(*arguments), items)

    monkeypatch.setattr(runner_module, "run_tasks", run_tasks)
    monkeypatch.setattr(runner_module, "run_actors", run_actors)
    monkeypatch.setattr(runner_module, "node_resources", lambda: [{"CPU": 2.0}])
