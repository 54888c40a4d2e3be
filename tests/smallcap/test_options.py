"""What a field of a config class says of its option, and how options are read."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError

from smallcap.config import AutoCount, CaptionConfig, IndexConfig
from smallcap.errors import ConfigError
from smallcap.options import POSITIONAL, Config, Flag, config_difference, list_options, load_config
from smallcap.training.config import TrainConfig

REQUIRED = {"images": ["photos"], "index": "index", "model": "demo", "out": "out"}


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
    columns: Annotated[tuple[str, ...], Flag(has_commas=True)] = ()
    kinds: tuple[Literal["a", "b"], ...] = ("a", "b")
    uris: tuple[str, ...] = ()
    batch_size: AutoCount = "auto"
    add: bool = False


OPTIONS = {option.key: option for option in list_options(Job)}


def test_options_of_groups_come_after_the_jobs_own() -> None:
    groups = ["group.k", "group.share", "group.exact"]
    assert list(OPTIONS) == ["inputs", "columns", "kinds", "uris", "batch_size", "add", *groups]


@pytest.mark.parametrize(
    ("key", "names", "values", "default"),
    [
        ("inputs", ("INPUTS",), "", ""),
        ("kinds", ("--kinds",), "one of a, b", "a,b"),
        ("batch_size", ("--batch-size",), "auto or a whole number of at least 1", "auto"),
        ("add", ("--add",), "", ""),
        ("group.k", ("-k", "--k"), "a whole number from 0 to 64", ""),
        ("group.share", ("--share",), "a number above 0, at most 1", "0.5"),
        ("group.exact", ("--exact",), "", "True"),
    ],
)
def test_an_option_says_how_it_is_given(key: str, names: tuple[str, ...], values: str, default: str) -> None:
    option = OPTIONS[key]
    assert (option.names, option.values, option.default) == (names, values, default)


def test_an_option_knows_its_kind_and_its_docstring() -> None:
    assert [key for key, option in OPTIONS.items() if option.is_required] == ["inputs"]
    assert [key for key, option in OPTIONS.items() if option.is_switch] == ["add", "group.exact"]
    assert [key for key, option in OPTIONS.items() if option.is_list] == ["inputs", "columns", "kinds", "uris"]
    assert [key for key, option in OPTIONS.items() if option.has_commas] == ["columns", "kinds"]
    assert (OPTIONS["group.k"].summary, OPTIONS["group.k"].group) == ("How many there are.", Group)


def test_later_sources_win(tmp_path: Path) -> None:
    unset = load_config(CaptionConfig, flags=REQUIRED)  # is left to the checkpoint
    assert unset.retrieval.k is None
    assert (unset.generation.num_beams, unset.generation.max_new_tokens, unset.generation.length_penalty) == (None,) * 3
    file = tmp_path / "run.yaml"
    file.write_text("model: folder\nretrieval: {k: 1}\ngeneration: {num_beams: 1, max_new_tokens: 7}\n")
    flags = REQUIRED | {"retrieval.k": "2", "generation.num_beams": "2", "limit": None}
    config = load_config(CaptionConfig, str(file), flags, ["generation.num_beams=5", "compute.batch_size=8"])
    assert config.model == "demo"  # a flag over the file
    assert config.retrieval.k == 2
    assert config.generation.num_beams == 5  # a setting over a flag
    assert config.generation.max_new_tokens == 7  # the file over the default
    assert config.compute.batch_size == 8
    assert config.limit is None  # a flag that was not given leaves the default


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("retrieval.kk=3", "Did you mean retrieval.k?"),
        ("modell=demo", "Did you mean model?"),
        ("num_beam=3", "Did you mean generation.num_beams?"),
        ("generation.num_beams=zero", "generation.num_beams\n  expected: a whole number from 1 to 64"),
        ("compute.batch_size=0", "compute.batch_size\n  expected: auto or a whole number from 1 to 4,096\n  found: 0"),
        ("compute.num_actors=true", "compute.num_actors\n  expected: auto or a whole number of at least 1\n"),
        ("limit=1" + "0" * 30, "limit\n  expected: a number between -9,007,199,254,740,992 and 9,007,199,254,740,992"),
        pytest.param("limit=0x" + "f" * 5000, "limit\n  expected: a number between", id="thousands of digits"),
        ("generation.temperature=1e300", "generation.temperature\n  expected: a number from 0.01 to 100"),
        ("input.image_column=7", "input.image_column\n  expected: text\n  found: 7"),
        ("input.image_column=[a, b]", "input.image_column\n  expected: text\n  found: ['a', 'b']"),
        ("images=photos", "images\n  expected: a list such as [a, b], each text\n  found: 'photos'"),
        ("output.write=webdataset", "output.write\n  expected: a list such as [a, b], each webdataset"),
        ("output.clip_score=maybe", "output.clip_score\n  expected: true or false\n  found: 'maybe'"),
        (
            "retrieval=5",
            "retrieval\n  expected: a mapping with cache_dir, encoder, exclude_own_captions, index_column,",
        ),
        ('index="  "', "index\n  expected: a text that is not empty"),
        ('index="a\\eb"', "index\n  expected: a text without control codes\n  found: 'a\\x1bb'"),
        ("index=a\udcffb", "where: --set index\n"),
        ('images=["a\\0b"]', "images\n  expected: a text without control codes"),
        ("=5", "--set a.b=c"),
        ("retrieval..k=5", "--set a.b=c"),
        ("retrieval.k=-1", "retrieval.k"),
        ("generation.length_penalty=.nan", "generation.length_penalty\n  expected: a number"),
        ("compute.device=cuda:1", "compute.device\n  expected: one of auto, cpu, cuda"),
        ("compute.device=gpu", "compute.device\n  expected: one of auto, cpu, cuda\n  found: 'gpu'"),
        ("model=''", "model"),
        ("k.b=3", "There is no such option."),
        ("model.name=x", "not a group"),
        ("retrieval.k", "--set a.b=c"),
        ("retrieval.k=[", "where: --set retrieval.k\n"),
        ("input.image_column=@id", "where: --set input.image_column\n"),
        ("generation.temperature=2", "generation\n  expected: --temperature and --top-p need --do-sample"),
    ],
)
def test_a_wrong_setting_is_named_with_its_remedy(setting: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(CaptionConfig, flags=REQUIRED, sets=[setting])
    assert message in str(caught.value)


def test_a_wrong_value_is_named_as_it_was_given(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("compute: {device: banana}\n")
    with pytest.raises(ConfigError, match=r"where: compute\.device in .*run\.yaml\n"):
        load_config(CaptionConfig, str(file), REQUIRED)
    wrong = REQUIRED | {"retrieval.k": "many"}
    with pytest.raises(ConfigError, match=r"where: --k\n  expected: a whole number from 0 to 64\n  found: 'many'"):
        load_config(CaptionConfig, flags=wrong)
    with pytest.raises(ConfigError, match=r"where: retrieval.k\n"):
        load_config(CaptionConfig, flags=wrong, sets=["retrieval.k=few"])


def test_names_of_files_and_tokens_may_hold_any_character() -> None:
    odd = REQUIRED | {"images": ["a\tb", " "]}
    assert load_config(CaptionConfig, flags=odd).images == ("a\tb", " ")
    given = {"sources": ["x"], "out": "o", "model": "m", "retrieval.k": 0}
    assert load_config(TrainConfig, flags=given, sets=['eos_token="\\n"']).eos_token == "\n"


def test_all_that_is_missing_is_named_at_once_as_it_is_typed() -> None:
    needs_index = "an index is needed for retrieval: give --index, or -k 0 to caption without retrieval."
    with pytest.raises(ConfigError, match=rf"Give IMAGES, --model and --out\. Besides, {needs_index}"):
        load_config(CaptionConfig)
    with pytest.raises(ConfigError, match=r"An option is missing\.\n  remedy: Give --out\.$"):
        load_config(CaptionConfig, flags={**REQUIRED, "out": None})
    without = {**REQUIRED, "index": None}
    with pytest.raises(ConfigError, match="give --index"):
        load_config(CaptionConfig, flags=without)
    assert load_config(CaptionConfig, flags=without | {"retrieval.k": 0}).index == ()
    with pytest.raises(ConfigError, match=r"Give --out\. .*give DUMPS.*; a retrieval encoder .*give --encoder\."):
        load_config(IndexConfig)
    with pytest.raises(ConfigError, match=r"Give SOURCES and --out\. .*give --model, or both .*; an index is needed"):
        load_config(TrainConfig)


def test_a_config_of_another_job_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "index.yaml"
    file.write_text("encoder: demo\ntext_column: caption\n")
    with pytest.raises(ConfigError, match=r"There is no such option\.\n  where: encoder\n"):
        load_config(CaptionConfig, str(file), REQUIRED)


def test_configs_are_frozen_and_differences_are_named() -> None:
    config = load_config(CaptionConfig, flags=REQUIRED)
    with pytest.raises(ValidationError):
        config.out = "elsewhere"
    one = config.model_dump(mode="json")
    two = load_config(CaptionConfig, flags=REQUIRED, sets=["retrieval.k=2"]).model_dump(mode="json")
    assert config_difference(one, two) == ["retrieval.k: null → 2"]
    assert config_difference(one, one) == []
    assert config_difference(one, two, free=["retrieval"]) == []
