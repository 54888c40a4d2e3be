"""The training job end to end, on Ray: what it trains, what it leaves alone, and how it goes on."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from jobs import train
from jobs.cli import app
from jobs.inspect import inspect_path
from smallcap import storage
from smallcap.captioner import Captioner
from smallcap.errors import CheckpointError, ConfigError
from smallcap.model.checkpoint import load_checkpoint, save_checkpoint
from smallcap.model.prompt import PromptTemplate
from smallcap.options import load_config
from smallcap.training.feature_store import read_features, read_queries
from tests.train_runs import loss_curve, train_config, write_captioned_images

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


def test_stored_features_are_what_the_encoders_say(
    finished: train.TrainSummary, tiny_smallcap: Path, index: str, source: Path
) -> None:
    (part,) = Path(finished.out).glob("features/train/*.parquet")
    rows, queries = read_features(str(part)), read_queries(str(part))
    assert rows.image_ids == [f"{number:03d}.jpg" for number in range(IMAGES)]
    assert rows.captions[1] == ["a bus on the road", "the bus number 1"]
    captioner = Captioner.from_pretrained(str(tiny_smallcap), index, dtype="float32")
    pixels = [captioner.crop_plan.crop((source.parent / name).read_bytes()) for name in rows.image_ids]
    hidden_states, class_tokens = captioner.encode(pixels)
    embeddings = captioner.embed(pixels, class_tokens)
    torch.testing.assert_close(torch.tensor(rows.features), hidden_states.half(), rtol=1e-2, atol=1e-2)
    assert queries.embeddings == pytest.approx(embeddings, abs=1e-5)


def test_features_of_other_images_are_refused(
    finished: train.TrainSummary, index: str, tiny_smallcap: Path, tmp_path: Path
) -> None:
    other = write_captioned_images(tmp_path / "other", 3)
    shared = f"features={finished.out}/features"
    with pytest.raises(ConfigError, match="inputs_sha256: "):
        train.run(train_config(other, index, tiny_smallcap, tmp_path / "out", shared))


def test_the_command_says_what_there_is_to_do(source: Path, index: str, tiny_smallcap: Path, tmp_path: Path) -> None:
    arguments = ["train", str(source), "--index", index, "--model", str(tiny_smallcap), "--out", str(tmp_path / "out")]
    printed = CliRunner().invoke(app, [*arguments, "--dry-run", "--batch-size", "10"], catch_exceptions=False).output
    assert "Training images in lists: 26, with 50 captions" in printed
    assert "Steps per epoch for lists: 5, in 10 epochs" in printed
    assert "4,256 parameters to train, reduce factor 2" in printed
    assert not (tmp_path / "out").exists()


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
    facts = inspect_path(finished.out, 2, errors=True)
    assert (facts["kind"], facts["steps_done"], facts["model"]) == ("training run", 12, f"{finished.out}/model")
    reasons = [(row["image_id"], row["error_code"]) for row in facts["errors"]]
    assert reasons == [("broken.jpg", "not_an_image"), ("missing.jpg", "not_found")] * 2


def test_the_best_epoch_is_chosen_by_cider(finished: train.TrainSummary) -> None:
    record = finished.record
    assert record.selected_by == "cider"
    best = max(record.epochs, key=lambda epoch: (epoch.cider, -epoch.validation_loss))
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


@pytest.mark.slow
def test_two_workers_have_the_losses_of_one(source: Path, index: str, tiny_smallcap: Path, tmp_path: Path) -> None:
    """Without dropout, which depends on the worker; 48 examples in batches of 10 leave the last one uneven."""
    model = tmp_path / "model"
    shutil.copytree(tiny_smallcap, model)
    values = json.loads((model / "config.json").read_text())
    values["decoder"] |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    (model / "config.json").write_text(json.dumps(values))
    shared = (f"features={tmp_path}/features", f"validation=[{source}]", "optimizer.batch_size=10")
    runs = [
        train.run(train_config(source, index, model, tmp_path / str(workers), f"workers={workers}", *shared))
        for workers in (1, 2)
    ]
    one, two = (loss_curve(run.out) for run in runs)
    assert len(one) == 10
    assert two == pytest.approx(one, rel=1e-4)
    for epoch, other in zip(runs[0].record.epochs, runs[1].record.epochs, strict=True):
        assert other.validation_loss == pytest.approx(epoch.validation_loss, rel=1e-4)
        assert other.cider == pytest.approx(epoch.cider)
    assert runs[1].record.attempts[0].workers == 2


@pytest.mark.slow
def test_a_model_of_parts_is_trained_on_s3(
    source: Path, index: str, tiny_smallcap: Path, tiny_clip: Path, s3: str, tmp_path: Path
) -> None:
    """Images, list and output on S3; the language model is a folder of transformers; nothing is retrieved."""
    decoder = tmp_path / "gpt2"
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256}
    GPT2LMHeadModel(GPT2Config(vocab_size=50257, **sizes)).save_pretrained(decoder)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tiny_smallcap / name, decoder)
    for file in source.parent.iterdir():
        storage.upload(file, f"{s3}/data/{file.name}")
    flags = {
        "sources": [f"{s3}/data/captions.csv"],
        "out": f"{s3}/out",
        "vision_encoder": str(tiny_clip),
        "decoder": str(decoder),
        "retrieval.k": 0,
        "optimizer.epochs": 1,
        "optimizer.batch_size": 16,
        "optimizer.accumulate": 3,
        "dtype": "bfloat16",
        "reduce_factor": 8,
    }
    config = load_config(train.TrainConfig, flags=flags)
    assert "48 captions" not in "".join(train.plan(config).lines())  # two more are of images that cannot be read
    summary = train.run(config)
    assert (summary.record.steps, summary.record.selected_by, summary.record.index_id) == (3, "last", None)
    for uri in storage.list_files(f"{s3}/out/model"):
        storage.download(uri, tmp_path / uri.rsplit("/", 1)[-1])
    model = load_checkpoint(str(tmp_path))
    assert not model.config.rag
    assert (model.config.eos_token_id, model.config.pad_token_id) == (13, 0)
    assert model.config.decoder.cross_attention_reduce_factor == 8
    assert train.run(config).new_steps == 0


@pytest.mark.slow
def test_a_workers_own_error_is_the_runs(source: Path, index: str, tiny_smallcap: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_smallcap, model)
    loaded = load_checkpoint(str(model))
    loaded.config = replace(loaded.config, template=PromptTemplate(with_retrieval="|| " + "word " * 600))
    save_checkpoint(loaded, model)
    with pytest.raises(ConfigError, match="do not fit the decoder's positions"):
        train.run(train_config(source, index, model, tmp_path / "out", f"features={tmp_path}/features"))


def test_a_wrong_model_is_told_before_ray_starts(source: Path, index: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        train.run(train_config(source, index, tmp_path, tmp_path / "out"))
