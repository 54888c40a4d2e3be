"""What a spec names is checked by open_clip's lists, without importing it; its models are in test_clip_encoder.py."""

from pathlib import Path

import pytest

from smallcap.errors import ConfigError
from smallcap.model import encoder_spec
from smallcap.model.encoder_spec import check_encoder_spec, open_clip_config, parse_pretrained_tags, uses_quick_gelu


@pytest.mark.parametrize("spec", ["RN50x64", "clip:ViT-B-32", "hf:", "open_clip:", "open_clip:RN50x64", ""])
def test_a_spec_of_no_known_form_is_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match="open_clip:RN50x64/openai"):
        check_encoder_spec(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("open_clip:RN50x65/openai", r"no such architecture(.|\n)*Did you mean RN50x64 or "),
        ("open_clip:../RN50x64/openai", "no such architecture"),
        ("open_clip:ViT-B-32/open-ai", r"neither a tag(.|\n)*Did you mean open_clip:ViT-B-32/openai"),
        ("open_clip:ViT-B-32/no/such/file.pt", "neither a tag"),
    ],
)
def test_what_open_clip_does_not_know_is_refused_with_what_is_near(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_encoder_spec(spec)


def test_all_that_open_clip_knows_is_known(tmp_path: Path) -> None:
    import open_clip

    for name, tag in open_clip.list_pretrained():
        assert check_encoder_spec(f"open_clip:{name}/{tag}") == ("open_clip", name, tag)
    for name in open_clip.list_models():
        assert open_clip_config(name) == open_clip.get_model_config(name)
    assert check_encoder_spec("open_clip:ViT-B-32/LAION2B-s34b-b79k")[2] == "LAION2B-s34b-b79k"
    weights = tmp_path / "weights.pt"
    weights.touch()
    assert check_encoder_spec(f"open_clip:ViT-B-32/{weights}")[2] == str(weights)


@pytest.mark.parametrize(
    ("name", "pretrained", "expected"),
    [
        ("RN50x64", "openai", True),
        ("ViT-B-32", "openai", True),
        ("ViT-B-32", "laion2b_s34b_b79k", False),
        ("RN50x64", "weights.pt", True),  # only OpenAI has trained it
        ("ViT-B-32", "weights.pt", False),  # it may be anybody's
        ("ViT-B-32-quickgelu", "weights.pt", False),  # as the name says without being told
        ("no-such-model", "weights.pt", False),
        ("local-dir:folder", None, False),
    ],
)
def test_openais_activation_is_built_where_weights_need_it(name: str, pretrained: str | None, expected: bool) -> None:
    assert uses_quick_gelu(name, pretrained) is expected


def test_a_release_that_declares_its_tags_in_another_way_is_asked_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyError):
        parse_pretrained_tags("_REGISTRY = {}")

    def parse(source: str) -> None:
        raise KeyError

    monkeypatch.setattr(encoder_spec, "parse_pretrained_tags", parse)
    encoder_spec._pretrained_tags.cache_clear()
    try:
        assert check_encoder_spec("open_clip:RN50x64/openai") == ("open_clip", "RN50x64", "openai")
    finally:
        encoder_spec._pretrained_tags.cache_clear()
