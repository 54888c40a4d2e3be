"""How work is handed to loading tasks; what they do with it is tested with the jobs."""

import pickle

import pytest

from jobs.captioning import load as load_stage
from smallcap.images.fragments import Fragment
from smallcap.output.coverage import WorkItem


def test_every_loading_task_has_a_block_until_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_stage, "_MOST_TASKS", 4)
    items = [WorkItem(Fragment(number, "uris", "list.parquet", number, rows=256), None) for number in range(10)]

    def numbers(some: list[WorkItem]) -> list[list[int]]:
        blocks = [block["item"].to_pylist() for block in load_stage.task_inputs(some)]
        return [[pickle.loads(item).fragment.number for item in block] for block in blocks]

    assert numbers(items[:4]) == [[0], [1], [2], [3]]
    assert numbers(items) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
