import faiss
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from index_builder.plan import (
    bytes_per_vector,
    check_trainable,
    choose_nlist,
    nlist_of,
    plan_index,
    plan_shards,
    with_open_nlist,
)
from index_builder.shards.template import check_index_key, least_training_rows, make_index, uniform_sample
from smallcap.errors import ConfigError
from tests.index_files import unit_vectors


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


NO_KEYS = {
    "out of reason": "IVF0,Flat IVF99999999999999999999,Flat IVF5000000,Flat PQ0 PQ8x20 PQ8x0 HNSW0 PQ99999 PCA0,Flat",
    "does not know": "banana Flat, ,Flat flat IVF10, IVF10 IVF-5,Flat PQ7 IVF10,PQ7 OPQ7,PQ7 PQ64 BFlat BIVF10 SQ5 "
    "SQ8,SQ8 IVF10,IVF10,Flat IVF٣,Flat IVF10,Flat(abc) ZnLattice3x10_6 LSH ITQ,LSH IMI2x4,PQ8",
    "not served": "NSG32 RQ8x8 LSQ8x8 IVF10,RQ8x8 PRQ2x2x4 IDMap,Flat IDMap2,Flat Flat,RFlat IVF10,Flat,RFlat",
    "cannot train": "PCA64,Flat PCAR33,SQ8 IVF10(RCQ2x5),Flat",
}
KEYS = (
    "auto Flat IVF,Flat IVF,SQfp16 IVF,SQ8 IVF4096,SQ8 IVF65536_HNSW32,PQ8 PQ8 PQ16x4fs PQ8x12 HNSW32 HNSW32_SQ8 "
    "HNSW32,PQ8 SQ4 SQfp16 SQbf16 OPQ8,IVF10,PQ8 OPQ8_16,PQ8 PCA16,IVF10,Flat RR16,Flat L2norm,Flat RaBitQ "
    "IVF10,RaBitQ4 IVF1024(RCQ2x5),Flat"
)


@pytest.mark.parametrize(("message", "key"), [(m, key) for m, keys in NO_KEYS.items() for key in keys.split(" ")])
def test_a_key_that_cannot_be_built_is_refused_before_anything_is_read(message: str, key: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_index_key(key, 32)
    assert caught.value.where == f"index_key={key}"
    assert caught.value.expected


@pytest.mark.parametrize("key", KEYS.split())
def test_a_key_that_can_be_built_is_trained_with_the_captions_it_asks_for(key: str) -> None:
    check_index_key(key, 32)
    plan = plan_index(70_000, 32, key, 1)
    needed = least_training_rows(make_index(plan.index_key, 32))
    check_trainable(plan, needed)
    assert needed == {"PQ8x12": 4096, "PQ16x4fs": 16}.get(key, 256 if "PQ" in key else 0)
    if 0 < needed <= 256 and "IVF" not in key:
        enough = plan_index(needed, 32, key, 1)
        check_trainable(enough, needed)
        make_index(key, 32).train(unit_vectors(needed))  # which raises an error if they are too few
        with pytest.raises(
            ConfigError, match=rf"too few captions(.|\n)*at least {needed} (.|\n)*found: {needed - 1}\n"
        ):
            check_trainable(plan_index(needed - 1, 32, key, 1), needed)


@pytest.mark.parametrize("key", ["PQ8", "IVF4,PQ8", "OPQ8,IVF4,PQ8", "HNSW8_PQ8"])
def test_no_product_quantizer_orders_its_codes(key: str) -> None:
    index = make_index(key, 32)
    for wrapped in ("index", "storage"):
        while isinstance(getattr(index, wrapped, None), faiss.Index):
            index = faiss.downcast_index(getattr(index, wrapped))
    assert index.do_polysemous_training is False
