"""What an actor reports of calls that go on at the same time."""

import time

import pytest

from jobs.captioning.caption import BusyTime
from tests.python_process import run_python


def test_time_that_calls_have_in_common_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1, 4, 7, 9, 20, 22])  # a call that begins beside another does not look at the clock
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    busy = BusyTime()
    busy.begin()
    busy.begin()
    seconds = [busy.end()]
    busy.begin()
    seconds += [busy.end(), busy.end()]
    busy.begin()
    seconds.append(busy.end())
    assert seconds == [3, 3, 2, 2]  # busy from 1 to 9 and from 20 to 22


def test_the_driver_imports_what_it_sends_without_torch_and_faiss() -> None:
    modules = "jobs.caption, jobs.captioning.caption, jobs.captioning.load, jobs.captioning.plan, jobs.captioning.write"
    heavy = {"torch", "faiss", "transformers", "open_clip"}
    assert run_python(f"import sys, {modules}; print(sorted({heavy} & sys.modules.keys()))").strip() == "[]"
