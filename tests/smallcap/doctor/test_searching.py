from typing import Any

import pytest

from smallcap.doctor.searching import prove_search
from smallcap.index.gpu_search import ExactBlocks
from smallcap.index.retriever import NeighbourSearch
from tests.pretended_cuda.torch_cuda import pretended_cuda


def test_a_sound_search() -> None:
    (finding,) = prove_search("cpu", rows=500)
    assert (finding.status, finding.found) == ("ok", "64 queries in 500 vectors by cpu find the nearest by all scores")


def test_a_search_that_misses_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    search = NeighbourSearch.search

    def one_late(self: NeighbourSearch, queries: Any, k: int) -> Any:
        found = search(self, queries, k + 1)
        return [found[0][:-1], *(nearest[1:] for nearest in found[1:])]

    monkeypatch.setattr(NeighbourSearch, "search", one_late)
    (finding,) = prove_search("cpu", rows=500)
    assert (finding.status, "63 do not get their nearest captions" in finding.found) == ("fail", True)
    assert "--search-device" not in finding.remedy  # it is the CPU's


def test_a_gpus_search_is_compared_with_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended_cuda():
        assert [finding.status for finding in prove_search("cuda", rows=500)] == ["ok", "ok", "ok"]
        candidates = ExactBlocks.candidates

        def swapped(self: ExactBlocks, queries: Any, count: int) -> Any:
            scores, ids = candidates(self, queries, count)
            return scores[::-1], ids[::-1]

        monkeypatch.setattr(ExactBlocks, "candidates", swapped)
        assert [finding.status for finding in prove_search("cuda", rows=500)] == ["ok", "fail", "fail"]


def test_a_gpu_without_room_for_the_index_fails_in_its_own_line() -> None:
    with pretended_cuda(total_bytes=1 << 20):
        search, on_gpu = prove_search("cuda", rows=500)
    assert (search.subject, search.status) == ("search", "ok")
    assert (on_gpu.subject, on_gpu.status) == ("gpu search", "fail")
    assert "cannot be searched on the GPU" in on_gpu.found
