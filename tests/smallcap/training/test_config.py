import pytest

from smallcap.errors import ConfigError
from smallcap.options import load_config
from smallcap.training.config import TrainConfig

FLAGS = {"sources": ["dataset_coco.json"], "out": "out", "index": "index", "model": "model"}
PARTS = {"vision_encoder": "openai/clip-vit-base-patch32", "decoder": "gpt2"}


def test_the_defaults_are_the_papers_recipe() -> None:
    config = load_config(TrainConfig, flags={**FLAGS, "model": None, **PARTS})
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.batch_size, optimizer.epochs) == (1e-4, 64, 10)
    assert (config.retrieval.mode, config.retrieval.k, config.reduce_factor) == ("top-k", 4, 4)
    assert optimizer.max_caption_tokens == 25


@pytest.mark.parametrize("changed", [{"model": None}, PARTS, {"model": None, "decoder": "gpt2"}])
def test_training_starts_from_a_model_or_from_two_parts(changed: dict) -> None:
    with pytest.raises(ConfigError, match="give --model, or both --vision-encoder and --decoder"):
        load_config(TrainConfig, flags=FLAGS | changed)


def test_only_without_retrieval_no_index_is_needed() -> None:
    without = {name: value for name, value in FLAGS.items() if name != "index"}
    with pytest.raises(ConfigError, match="an index is needed"):
        load_config(TrainConfig, flags=without)
    assert load_config(TrainConfig, flags=without | {"retrieval.k": 0}).index is None


def test_an_unknown_mode_is_refused_and_a_misspelt_option_corrected() -> None:
    with pytest.raises(ConfigError, match="sample-k"):
        load_config(TrainConfig, flags=FLAGS | {"retrieval.mode": "random"})
    with pytest.raises(ConfigError, match=r"Did you mean optimizer\.learning_rate"):
        load_config(TrainConfig, flags=FLAGS, sets=["optimizer.learning_rat=1"])
