from collections import Counter

import numpy as np
import pytest

from smallcap.training.retrieval_sampling import RetrievalMode, candidates_needed, choose_retrieved


def draws(mode: RetrievalMode, candidates: int = 60, k: int = 4, times: int = 2000) -> list[list[int]]:
    return [choose_retrieved(range(candidates), k, mode, np.random.default_rng(seed)) for seed in range(times)]


@pytest.mark.parametrize("mode", ["sample-k", "c-sample-k"])
def test_draws_are_distinct_in_order_and_from_the_nearest_50(mode: RetrievalMode) -> None:
    assert draws(mode, times=9) == draws(mode, times=9)  # the same states
    for drawn in draws(mode):
        assert drawn == sorted(set(drawn))
        assert len(drawn) == 4
        assert drawn[-1] < 50


def test_sample_k_draws_uniformly() -> None:
    counts = Counter(place for drawn in draws("sample-k") for place in drawn)
    assert len(counts) == 50
    assert all(100 < count < 230 for count in counts.values())  # 160 are expected of 8,000 draws from 50


def test_c_sample_k_keeps_the_nearest() -> None:
    drawn = draws("c-sample-k")
    assert all(first == 0 for first, *_ in drawn)
    counts = Counter(place for _, *others in drawn for place in others)
    assert set(counts) == set(range(1, 50))


@pytest.mark.parametrize("mode", ["top-k", "sample-k", "c-sample-k"])
def test_few_candidates_are_all_taken(mode: RetrievalMode) -> None:
    assert choose_retrieved("ab", 4, mode, np.random.default_rng(0)) == ["a", "b"]
    assert choose_retrieved("ab", 0, mode, np.random.default_rng(0)) == []


def test_how_many_candidates_a_mode_needs_and_top_k_takes_the_nearest() -> None:
    assert [candidates_needed(mode, 4) for mode in ("top-k", "sample-k", "c-sample-k")] == [4, 50, 50]
    assert candidates_needed("sample-k", 0) == 0
    assert choose_retrieved("abcdef", 4, "top-k", np.random.default_rng(0)) == list("abcd")
