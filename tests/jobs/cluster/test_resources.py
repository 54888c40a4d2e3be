"""The threads of an actor, where Ray would leave it one."""

import os
import sys
from collections.abc import Iterator

import faiss
import pytest
import torch

from jobs.cluster.resources import use_threads


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads(), faiss.omp_get_max_threads()
    yield
    torch.set_num_threads(before[0])
    faiss.omp_set_num_threads(before[1])


@pytest.mark.parametrize("threads", [1, 2, 1000])
def test_torch_and_faiss_get_the_plans_threads_up_to_the_cores(threads: int) -> None:
    given = min(threads, len(os.sched_getaffinity(0)))
    assert use_threads(threads) == given
    assert (torch.get_num_threads(), faiss.omp_get_max_threads()) == (given, given)


def test_faiss_is_not_imported_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "faiss")
    use_threads(1)
    assert "faiss" not in sys.modules
