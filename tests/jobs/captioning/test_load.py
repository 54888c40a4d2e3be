"""How work is handed to loading tasks; what they do with it is tested with the jobs."""

import pickle
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from jobs.captioning import load as load_stage
from jobs.captioning.crash_guard import READ_IN_VAIN, CrashGuard, CrashGuardClient
from smallcap.config import InputConfig
from smallcap.errors import ErrorCode, RowError
from smallcap.images.fragments import Fragment, InputBatch
from smallcap.images.row_ranges import RowRanges
from smallcap.output.coverage import WorkItem
from tests.in_process_ray import LocalActor


def test_every_loading_task_has_a_block_until_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_stage, "_MOST_TASKS", 4)
    items = [WorkItem(Fragment(number, "uris", "list.parquet", number, rows=256), None) for number in range(10)]

    def numbers(some: list[WorkItem]) -> list[list[int]]:
        blocks = [block["item"].to_pylist() for block in load_stage.task_inputs(some)]
        return [[pickle.loads(item).fragment.number for item in block] for block in blocks]

    assert numbers(items[:4]) == [[0], [1], [2], [3]]
    assert numbers(items) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]


class Killed(BaseException):
    """The end of a process."""


def loaded(monkeypatch: pytest.MonkeyPatch, item: WorkItem, die_after: int) -> list[InputBatch]:
    """What the loading task reads at last, when reading its fragment kills its process after some batches."""

    def reading(fragment: Fragment, wanted: RowRanges | None, *_: Any) -> Iterator[InputBatch]:
        for start in range(0, die_after, 2):
            rows = np.arange(start, start + 2, dtype=np.int32)
            names = [f"{row}" for row in rows]
            batch = InputBatch(rows, names, names, [b"x", b"y"], None, ends_fragment=False).only(wanted)
            if batch is not None:
                yield batch
        raise Killed

    monkeypatch.setattr(load_stage, "read_fragment", reading)
    guard = CrashGuardClient(LocalActor(CrashGuard()))
    spec: Any = SimpleNamespace(crash_guard=guard, input=InputConfig(), kept_columns=pa.schema([("note", pa.string())]))
    for _ in range(READ_IN_VAIN):
        with pytest.raises(Killed):
            list(load_stage.read_guarded(item, spec))
    return list(load_stage.read_guarded(item, spec))


OPEN_END = np.iinfo(np.int32).max


@pytest.mark.parametrize(
    ("wanted", "row", "ends"),
    [
        (None, 4, True),
        (RowRanges.span(2, OPEN_END), 4, True),
        (RowRanges.span(7, OPEN_END), 7, True),
        (RowRanges.of(np.array([1, 9])), 9, False),
        (RowRanges.of(np.array([8, 9, 12])), 8, False),
    ],
    ids=["all", "rest", "later", "retried", "several"],
)
def test_a_tar_whose_reading_kills_its_process_ends_in_one_row(
    wanted: RowRanges | None, row: int, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = loaded(monkeypatch, WorkItem(Fragment(3, "tar", "a.tar", 0, None), wanted), 4)[-1]
    assert (last.rows.tolist(), last.image_ids, last.ends_fragment) == ([row], ["a.tar"], ends)
    assert last.data is not None
    assert isinstance(last.data[0], RowError)
    assert last.data[0].code == ErrorCode.CRASHED
    assert last.kept is not None
    assert last.kept["note"].to_pylist() == [None]


def test_rows_of_parquet_whose_reading_kills_its_process_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = RowRanges.of(np.array([0, 3, 5, 600]))
    batches = loaded(monkeypatch, WorkItem(Fragment(3, "parquet", "a.parquet", 1, 700), wanted), 4)
    assert [batch.rows.tolist() for batch in batches] == [[0], [3], [5], [600]]
    assert [isinstance((batch.data or [])[0], RowError) for batch in batches] == [False, False, True, True]
    assert not batches[-1].ends_fragment
