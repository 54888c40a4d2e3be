"""What a field of a config class says about its option."""

from typing import Annotated, Literal

import pytest
from pydantic import Field

from smallcap.config import POSITIONAL, AutoCount, Config, Flag, Option, list_options


class Group(Config):
    """A group."""

    k: Annotated[int | None, Flag(("-k", "--k"))] = Field(None, ge=0, le=64)
    """How many
    there are."""
    share: float = Field(0.5, gt=0, le=1)
    exact: bool = True


class Job(Config):
    """A job."""

    group: Group = Group()
    inputs: Annotated[tuple[str, ...], POSITIONAL]
    columns: Annotated[tuple[str, ...], Flag(commas=True)] = ()
    kinds: tuple[Literal["a", "b"], ...] = ("a", "b")
    uris: tuple[str, ...] = ()
    batch_size: AutoCount = "auto"
    add: bool = False


OPTIONS = {option.key: option for option in list_options(Job)}


def test_options_of_groups_come_after_the_jobs_own() -> None:
    assert list(OPTIONS) == [
        "inputs",
        "columns",
        "kinds",
        "uris",
        "batch_size",
        "add",
        "group.k",
        "group.share",
        "group.exact",
    ]


@pytest.mark.parametrize(
    ("key", "names", "values", "default"),
    [
        ("inputs", ("INPUTS",), "", ""),
        ("kinds", ("--kinds",), "one of a, b", "a,b"),
        ("batch_size", ("--batch-size",), "auto or a whole number of at least 1", "auto"),
        ("add", ("--add",), "", ""),
        ("group.k", ("-k", "--k"), "a whole number from 0 to 64", ""),
        ("group.share", ("--share",), "a number above 0, at most 1", "0.5"),
        ("group.exact", ("--exact",), "", "true"),
    ],
)
def test_an_option_says_how_it_is_given(key: str, names: tuple[str, ...], values: str, default: str) -> None:
    option = OPTIONS[key]
    assert (option.names, option.values, option.default) == (names, values, default)


def test_an_option_knows_its_kind_and_its_docstring() -> None:
    assert [key for key, option in OPTIONS.items() if option.is_required] == ["inputs"]
    assert [key for key, option in OPTIONS.items() if option.is_switch] == ["add", "group.exact"]
    assert [key for key, option in OPTIONS.items() if option.is_list] == ["inputs", "columns", "kinds", "uris"]
    assert (OPTIONS["group.k"].summary, OPTIONS["group.k"].group) == ("How many there are.", Group)


@pytest.mark.parametrize(
    ("option", "split"), [(OPTIONS["columns"], True), (OPTIONS["kinds"], True), (OPTIONS["uris"], False)]
)
def test_words_with_commas_are_several_values_only_where_values_hold_none(option: Option, split: bool) -> None:
    assert option.split(["a,b", "c"]) == (["a", "b", "c"] if split else ["a,b", "c"])
