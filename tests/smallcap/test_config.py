from pathlib import Path

import pytest
from pydantic import ValidationError

from smallcap.config import CaptionConfig, IndexConfig, config_difference, load_config
from smallcap.errors import ConfigError

REQUIRED = {"images": ["photos"], "index": "index", "model": "demo", "out": "out"}


def test_what_is_not_given_is_left_to_the_checkpoint() -> None:
    config = load_config(CaptionConfig, flags=REQUIRED)
    assert config.retrieval.k is None
    generation = config.generation
    assert (generation.num_beams, generation.max_new_tokens, generation.length_penalty) == (None, None, None)


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: folder\nretrieval: {k: 1}\ngeneration: {num_beams: 1, max_new_tokens: 7}\n")
    flags = REQUIRED | {"retrieval.k": 2, "generation.num_beams": 2, "limit": None}
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
        ("generation.num_beams=zero", "generation.num_beams"),
        ("retrieval.k=-1", "retrieval.k"),
        ("k.b=3", "There is no such option."),
        ("model.name=x", "not a group"),
        ("retrieval.k", "--set group.name=value"),
    ],
)
def test_a_wrong_setting_is_named_with_its_remedy(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?").replace(".", r"\.")):
        load_config(CaptionConfig, flags=REQUIRED, sets=[setting])


def test_a_missing_option_is_named_as_a_flag() -> None:
    with pytest.raises(ConfigError, match="--out"):
        load_config(CaptionConfig, flags={**REQUIRED, "out": None})


def test_retrieval_needs_an_index_and_no_retrieval_does_not() -> None:
    without = {**REQUIRED, "index": None}
    with pytest.raises(ConfigError, match="give --index"):
        load_config(CaptionConfig, flags=without)
    assert load_config(CaptionConfig, flags=without | {"retrieval.k": 0}).index is None


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "just words"])
def test_a_config_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load_config(CaptionConfig, str(file), REQUIRED)


def test_configs_are_frozen() -> None:
    config = load_config(IndexConfig, flags={"dumps": ["a.csv"], "out": "o", "encoder": "demo"})
    with pytest.raises(ValidationError):
        config.out = "elsewhere"


def test_differences_are_named() -> None:
    one = load_config(CaptionConfig, flags=REQUIRED).model_dump(mode="json")
    two = load_config(CaptionConfig, flags=REQUIRED, sets=["retrieval.k=2"]).model_dump(mode="json")
    assert config_difference(one, two) == ["retrieval.k: null → 2"]
    assert config_difference(one, one) == []
