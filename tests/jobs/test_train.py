"""The training job end to end, on Ray: what it trains, what it leaves alone, and how it goes on."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from train_runs import loss_curve, train_config, write_captioned_images

from jobs import train
from smallcap.captioner import Captioner
from smallcap.checkpoint import load_checkpoint
from smallcap.errors import ConfigError

pytestmark = pytest.mark.ray
IMAGES = 24


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images that can be read, one that cannot, and one that is not there."""
    source = write_captioned_images(tmp_path_factory.mktemp("captioned"), IMAGES)
    (source.parent / "broken.jpg").write_bytes(b"no image")
    with source.open("a") as file:
        file.write("\nbroken.jpg,a broken image\nmissing.jpg,an image that is not there")
    return source


@pytest.fixture(scope="module")
def finished(
    source: Path, index: str, tiny_smallcap: Path, tmp_path_factory: pytest.TempPathFactory
) -> train.TrainSummary:
    """A run of two epochs with validation on its own images."""
    out = tmp_path_factory.mktemp("trained") / "out"
    sets = ("optimizer.learning_rate=3e-3", "retrieval.mode=c-sample-k", f"validation=[{source}]", "checkpoint_steps=4")
    return train.run(train_config(source, index, tiny_smallcap, out, *sets))


def test_the_loss_falls_and_the_frozen_weights_stay(finished: train.TrainSummary, tiny_smallcap: Path) -> None:
    record = finished.record
    assert (record.status, record.steps, finished.new_steps) == ("complete", 12, 12)
    curve = loss_curve(finished.out)
    assert len(curve) == 12
    assert curve[-4:].mean() < curve[:4].mean() - 0.05
    assert record.epochs[1].loss < record.epochs[0].loss
    assert record.frozen_sha256_after == record.frozen_sha256

    before, after = (load_checkpoint(str(folder)) for folder in (tiny_smallcap, Path(finished.out) / "model"))
    unchanged = {name: torch.equal(weight, after.get_parameter(name)) for name, weight in before.named_parameters()}
    trained = {f"decoder.{name}" for name in before.decoder.cross_attention_parameters()}
    assert {name for name, same in unchanged.items() if not same} == trained


def test_the_model_captions_with_its_own_tokenizer(finished: train.TrainSummary, index: str, source: Path) -> None:
    captioner = Captioner.from_pretrained(f"{finished.out}/model", index, dtype="float32")
    assert captioner.k == 4
    (result,) = captioner.caption([(source.parent / "000.jpg").read_bytes()])
    assert result.error is None
    assert len(result.neighbours) == 4


def test_bad_images_are_counted(finished: train.TrainSummary) -> None:
    data = finished.record.data
    assert data is not None
    assert (data.images, data.examples, data.validation_images) == (IMAGES, 2 * IMAGES, IMAGES)
    assert data.errors == {"not_an_image": 2, "not_found": 2}  # of training and validation
    assert "left out" in train.describe(finished)


def test_the_best_epoch_is_chosen_by_cider(finished: train.TrainSummary) -> None:
    record = finished.record
    assert record.selected_by == "cider"
    best = max(record.epochs, key=lambda epoch: (epoch.cider, -epoch.epoch))
    assert record.best_epoch == best.epoch
    assert all(epoch.validation_loss is not None for epoch in record.epochs)


def test_a_finished_run_is_a_no_op_and_refuses_other_options(
    finished: train.TrainSummary, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = train.TrainConfig.model_validate(finished.record.config)
    monkeypatch.setattr(train, "_train", lambda *_: pytest.fail("it was trained again"))
    again = train.run(config)
    assert again.new_steps == 0
    assert again.record == finished.record
    with pytest.raises(ConfigError, match=r"optimizer.learning_rate: 0.003 → 0.5"):
        train.run(config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"learning_rate": 0.5})}))
