"""A small actor on the driver's node that a job can do without: if it is lost, no call fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class SideActor:
    """Calls the actor from the driver, a task or another actor; small and picklable.

    The calls of one process arrive in their order.

    Args:
        actor: The handle of a Ray actor.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def tell(self, method: str, *arguments: Any) -> None:
        """Calls a method without waiting for it."""
        import ray

        try:
            getattr(self._actor, method).remote(*arguments)
        except ray.exceptions.RayError:  # the actor is gone
            return

    def ask(self, method: str, *arguments: Any, timeout_s: float | None = None) -> Any:
        """Returns what a method returns; None where there is no answer in time."""
        import ray

        try:
            return ray.get(getattr(self._actor, method).remote(*arguments), timeout=timeout_s)
        except ray.exceptions.RayTaskError:  # the method's own
            raise
        except ray.exceptions.RayError:  # the actor is gone, with its node or for want of memory, or late
            return None


@contextmanager
def run_side_actor(actor_class: type, *arguments: Any) -> Iterator[SideActor]:
    """Runs an instance of a class on the driver's node while the block runs; it takes no CPU."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "max_restarts": 0, "max_concurrency": 1, "scheduling_strategy": here}
    actor = ray.remote(actor_class).options(**options).remote(*arguments)
    try:
        yield SideActor(actor)
    finally:
        ray.kill(actor)
