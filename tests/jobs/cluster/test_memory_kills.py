"""A page of Ray's for each killed process becomes one line for each node, and the repetitions end."""

from typing import Any

import pytest
from ray._private import worker
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError, OutOfMemoryError, WorkerCrashedError

from jobs.cluster import memory_kills
from jobs.cluster.errors import unwrapped_errors
from jobs.cluster.memory_kills import tell_kills_once
from smallcap.errors import RunError

PAGE = """2 worker(s) were killed due to the node running low on memory.
Memory on the node (IP: {ip}, ID: 9bcd) was 15.20GB / 16.00GB (0.95), which exceeds the memory usage threshold of 0.95.
Refer to the documentation on how to address the out of memory issue."""


def test_the_memory_monitor_is_one_line_for_each_node(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    others: list[Any] = []
    monkeypatch.setattr(worker, "print_to_stdstream", lambda data, ignore_prefix: others.append(data))
    monkeypatch.setattr(memory_kills, "_told", set())
    tell_kills_once()
    tell_kills_once()
    for ip in ("10.0.0.1", "10.0.0.2") * 100:
        page = {"lines": [PAGE.format(ip=ip)], "pid": "raylet", "is_err": False}
        worker.print_to_stdstream(page, ignore_prefix=False)
    worker.print_to_stdstream({"lines": ["A node died."], "pid": "raylet", "is_err": False}, ignore_prefix=False)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "node 10.0.0.1" in lines[0]
    assert "20 times at most" in lines[0]
    assert [data["lines"] for data in others] == [["A node died."]]


@pytest.mark.parametrize(
    ("dead", "expected"),
    [
        (
            OutOfMemoryError(PAGE.format(ip="10.0.0.1")),
            r"because memory ran out(.|\n)*node 10\.0\.0\.1(.|\n)*more memory",
        ),
        (
            ActorDiedError(ActorDiedErrorContext(error_message=PAGE.format(ip="10.0.0.1"), actor_id=bytes(16))),
            r"An actor was ended because memory ran out(.|\n)*node 10\.0\.0\.1(.|\n)*found: 2 worker(.|\n)*more memory",
        ),
        (WorkerCrashedError(), r"ended again and again\.(.|\n)*logs of the kernel"),
    ],
    ids=["memory", "actor", "crash"],
)
def test_a_task_that_is_not_repeated_any_more_is_one_message(dead: Exception, expected: str) -> None:
    with pytest.raises(RunError, match=expected), unwrapped_errors():
        try:
            raise dead
        except Exception as error:
            raise RuntimeError("Ray's own wrapper") from error
