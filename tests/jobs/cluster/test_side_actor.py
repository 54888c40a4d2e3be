"""What a job can do without fails nobody, however it was lost."""

from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, NodeDiedError, OutOfMemoryError

from jobs.cluster.side_actor import SideActor


@pytest.mark.parametrize(
    "error",
    [ActorDiedError(), NodeDiedError("gone"), OutOfMemoryError("1 worker(s) were killed"), GetTimeoutError("late")],
    ids=lambda error: type(error).__name__,
)
def test_a_lost_actor_answers_none(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def get(reference: Any, timeout: float | None) -> None:
        raise error

    monkeypatch.setattr(ray, "get", get)
    assert SideActor(SimpleNamespace(count=SimpleNamespace(remote=lambda: None))).ask("count") is None
