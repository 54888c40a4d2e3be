"""What several indexes are called, what of that is refused, and that one index is recorded as it always was."""

from typing import Any

import pytest

from smallcap.config import CaptionConfig
from smallcap.errors import ConfigError
from smallcap.option_places import absolute_places
from smallcap.options import load_config
from smallcap.retrieval_config import NamedIndex

A, B = "s3://bucket/news/index", "s3://bucket/date=2024/shop/"


def config(index: Any, *sets: str) -> CaptionConfig:
    flags = {"images": ["images"], "index": index, "model": "demo", "out": "out"}
    return load_config(CaptionConfig, flags=flags, sets=[f"retrieval.{one}" for one in sets])


def test_one_index_is_dumped_as_a_text_and_several_as_a_list() -> None:
    for given, dumped in (("a", "a"), (["a"], "a"), (["a", "b"], ["a", "b"]), (None, None)):
        one = config(given, *(["k=0"] if given is None else []))
        assert one.model_dump(mode="json")["index"] == dumped
        assert load_config(CaptionConfig, base=one.model_dump(mode="json")) == one
    places = absolute_places(CaptionConfig, config([A, "b"]).model_dump(mode="json"), "/base")
    assert places["index"] == [A, "/base/b"]
    assert config(["a"]).retrieval == config("a").retrieval


def test_names_are_the_last_parts_of_uris_unless_they_are_given() -> None:
    assert config([A, B]).indexes == (NamedIndex("index", A), NamedIndex("shop", B))
    named = config([A, B], "index_names=[n, s p]", "index_weights=[1, 0.5]").indexes
    assert named == (NamedIndex("n", A, 1.0), NamedIndex("s p", B, 0.5))
    assert config("/data/index").indexes == (NamedIndex("index", "/data/index"),)


@pytest.mark.parametrize(
    ("index", "sets", "message"),
    [
        ([A, "index"], (), "the same name[^$]*found: index[^$]*--index-names name1,name2"),
        ([A, B], ("index_names=[a, a]",), "the same name"),
        ([A, B], ("index_names=[a, b/c]",), "has a slash"),
        ([A, B], ("index_names=[a]",), "one name and one weight[^$]*expected: 2 of them[^$]*found: 1"),
        ([A], ("index_weights=[1, 2]",), "retrieval.index_weights"),
        ([A, B], ("index_weights=[1, 0]",), "a number above 0"),
        ([A, ""], (), "a text that is not empty"),
        (None, ("k=0", "index_column=where"), "give --index"),
    ],
)
def test_names_and_weights_that_do_not_fit_are_told(index: Any, sets: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(index, *sets)


def test_the_column_that_chooses_an_index_is_kept_once() -> None:
    kept = {"flags": {"images": ["images"], "index": "a", "model": "demo", "out": "out", "keep_columns": ["where"]}}
    for column, columns in (("where", ("where",)), ("other", ("where", "other"))):
        one = load_config(CaptionConfig, **kept, sets=[f"retrieval.index_column={column}"])
        assert one.columns_to_keep == columns
