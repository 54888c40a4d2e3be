import faiss
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from index_builder.plan import bytes_per_vector, choose_nlist, nlist_of, plan_index, plan_shards, with_open_nlist
from index_builder.shards.template import make_index, uniform_sample
from smallcap.errors import ConfigError


@pytest.mark.parametrize(
    ("rows", "key"),
    [
        (1, "Flat"),
        (1_000_000, "Flat"),
        (1_000_001, "IVF4096,SQfp16"),
        (10_000_000, "IVF16384,SQfp16"),
        (30_000_000, "IVF16384,SQ8"),
        (100_000_000, "IVF32768_HNSW32,SQ8"),
        (1_000_000_000, "IVF65536_HNSW32,SQ8"),
    ],
)
def test_the_key_follows_from_the_size(rows: int, key: str) -> None:
    plan = plan_index(rows, 512, "auto", "auto")
    assert plan.index_key == key
    assert plan.nlist == nlist_of(key)
    assert plan.training_rows == (0 if key == "Flat" else min(rows, max(100_000, 64 * (plan.nlist or 0))))
    assert len(plan.shards) == -(-rows // 1_000_000)


def test_a_memory_budget_makes_it_coarser_or_says_what_is_needed() -> None:
    assert plan_index(1_000_000, 512, "auto", "auto", 3e9).index_key == "Flat"
    assert plan_index(1_000_000, 512, "auto", "auto", 1.5e9).index_key == "IVF4096,SQfp16"
    assert plan_index(1_000_000, 512, "auto", "auto", 0.6e9).index_key == "IVF4096,SQ8"
    with pytest.raises(ConfigError, match=r"memory budget(.|\n)*at least 0.5(.|\n)*found: 0.4"):
        plan_index(1_000_000, 512, "auto", "auto", 0.4e9)


def test_lists_are_filled_in_chosen_anew_and_may_not_outnumber_the_captions() -> None:
    assert plan_index(40_000, 512, "IVF,SQ8", 3).index_key == "IVF1024,SQ8"
    assert plan_index(40_000, 512, "IVF100,PQ8", 3).index_key == "IVF100,PQ8"
    with pytest.raises(ConfigError, match=r"fewer captions than lists(.|\n)*at least 100(.|\n)*found: 99"):
        plan_index(99, 512, "IVF100,PQ8", 3)
    assert with_open_nlist("IVF4096,SQfp16") == "IVF,SQfp16"
    assert with_open_nlist("IVF32768_HNSW32,SQ8") == "IVF,SQ8"
    for key in ("Flat", "IVF100,PQ8", "HNSW32", "OPQ4,IVF8,PQ4"):
        assert with_open_nlist(key) == key


@given(st.integers(1, 2_000_000_000))
def test_lists_have_enough_to_train_them(rows: int) -> None:
    nlist = choose_nlist(rows)
    assert 1 <= nlist <= 65_536
    assert nlist == 1 or rows // nlist >= 39


@given(st.integers(0, 10_000_000), st.one_of(st.just("auto"), st.integers(1, 50)))
def test_shards_cover_all_rows_and_none_is_empty(rows: int, requested: int) -> None:
    shards = plan_shards(rows, requested)  # type: ignore[arg-type]
    assert [start for start, _ in shards] == [0, *(stop for _, stop in shards)][:-1] or not shards
    assert all(stop > start for start, stop in shards)
    assert sum(stop - start for start, stop in shards) == rows


@pytest.mark.parametrize("key", ["Flat", "IVF4,SQfp16", "IVF4,SQ8", "IVF4,Flat", "SQ8", "IVF4,PQ8"])
def test_bytes_per_vector_are_faiss_own(key: str) -> None:
    listed_id = 8 if key.startswith("IVF") else 0
    assert bytes_per_vector(key, 32) == make_index(key, 32).code_size + listed_id


@given(st.integers(1, 10**9), st.integers(1, 2000))
def test_samples_are_sorted_spread_and_inside(rows: int, count: int) -> None:
    sample = uniform_sample(rows, count)
    assert len(sample) == count
    assert sample[0] >= 0
    assert sample[-1] < rows
    assert (np.diff(sample) >= 0).all()
    if rows >= 2 * count:
        assert len(np.unique(sample)) > count // 2


@pytest.mark.parametrize("key", ["PQ8", "IVF4,PQ8", "OPQ8,IVF4,PQ8", "HNSW8_PQ8"])
def test_no_product_quantizer_orders_its_codes(key: str) -> None:
    index = make_index(key, 32)
    for wrapped in ("index", "storage"):
        while isinstance(getattr(index, wrapped, None), faiss.Index):
            index = faiss.downcast_index(getattr(index, wrapped))
    assert index.do_polysemous_training is False
