import pytest

from smallcap.config import CaptionConfig
from smallcap.errors import ConfigError
from smallcap.options import config_difference, load_config
from smallcap.variant_options import MOST_VARIANTS, make_variants

SHARED = load_config(
    CaptionConfig, flags={"images": ["images"], "index": "s3://b/index", "model": "demo", "out": "s3://b/out"}
)


def test_a_variant_has_options_of_its_own_and_a_folder() -> None:
    texts = [
        "plain",
        "k0:k=0",
        "wide: num-beams=8, generation.num_captions = 2,retrieval.k=2",
        'words:template="A, b: || This\\n shows ",model=s3://bucket/model',
    ]
    plain, k0, wide, words = make_variants(SHARED, texts)
    assert [one.name for one in (plain, k0, wide, words)] == ["plain", "k0", "wide", "words"]
    assert plain.config == SHARED.model_copy(update={"out": "s3://b/out/plain"})
    changes = [config_difference(plain.config.model_dump(), one.config.model_dump()) for one in (k0, wide, words)]
    assert [line.partition(":")[0] for lines in changes for line in lines if not line.startswith("out")] == [
        "retrieval.k",
        *("generation.num_beams", "generation.num_captions", "retrieval.k"),
        *("generation.template", "model"),
    ]
    assert words.config.generation.template == "A, b: || This\n shows "
    assert words.config.model == "s3://bucket/model"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a:decode=fast"], r"(?s)All variants share this option.*--variant a: input\.decode.*outside --variant"),
        (["a:images=[other]"], "All variants share this option"),
        (["a:out=elsewhere"], "All variants share this option"),
        (["a:compute.dtype=float32"], r"--variant a: compute\.dtype"),
        (["a:num_beems=3"], r"(?s)There is no such option.*--variant a: num_beems.*Did you mean generation\.num_beams"),
        (["a:k=many"], r"(?s)value is wrong.*--variant a: retrieval\.k.*whole number.*many"),
        (["a:template"], r"(?s)needs a value.*--variant a: template"),
        (["a:k=0,template"], r"(?s)--variant a: retrieval\.k.*found: '0,template'"),
        (["a:num_beams=2,num_captions=3"], r"(?s)--variant a.*finds no more"),
        (["a:template=words"], r"\|\| once, and words after it"),
        (["a:template=before ||"], r"\|\| once, and words after it"),
        (["a", "b", "a:k=0"], "(?s)Two variants have one name.*--variant a"),
        (["_a:k=0"], "cannot be that of a folder"),
        (["../a:k=0"], "cannot be that of a folder"),
        (["k=0"], "cannot be that of a folder"),
        ([":k=0"], "cannot be that of a folder"),
        ([f"v{number}" for number in range(MOST_VARIANTS + 1)], "too many variants"),
    ],
)
def test_what_is_wrong_is_said_with_the_variant(texts: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_variants(SHARED, texts)
