"""A worker by itself: what is interrupted goes on to the same curve and weights, bit by bit."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.training.loop import Worker, WorkerSpec
from jobs.training.progress import TrainStep, TrainWatch
from jobs.training.record import choose_best
from jobs.training.start import ModelStart
from smallcap.errors import ConfigError
from smallcap.training.checkpoints import EpochResult, find_train_checkpoint, load_trained_weights
from smallcap.training.example_stream import ExampleStream
from smallcap.training.objective import StepReport
from tests.feature_files import write_store
from tests.train_runs import loss_curve, train_config

STEPS = 2 * 3  # two epochs of 24 examples


@pytest.fixture
def spec(tmp_path: Path, tiny_smallcap: Path) -> WorkerSpec:
    """A run over made-up features, whose validation is on the same kind of images."""
    sets = ("checkpoint_steps=2", "retrieval.mode=sample-k", "optimizer.learning_rate=1e-3")
    config = train_config("x.csv", "index", tiny_smallcap, tmp_path / "out", *sets)
    folders = str(tmp_path / "features"), str(tmp_path / "candidates")
    train, validation = (
        ExampleStream(*folders, write_store(tmp_path, split=split), 8, 2, seed=0) for split in ("train", "validation")
    )
    return WorkerSpec(config, ModelStart(config, None), "float32", train, validation)


class InterruptedWorker(Worker):
    """A worker that stops after so many steps of its own, before the next checkpoint."""

    steps_left = 3

    def _count(self, report: StepReport, epoch: int, seconds: float) -> None:
        super()._count(report, epoch, seconds)
        self.steps_left -= 1
        if not self.steps_left:
            raise InterruptedError


def run_to_end(spec: WorkerSpec, kind: type[Worker] = Worker) -> Worker:
    worker = kind(spec, torch.device("cpu"))
    worker.run()
    return worker


def test_an_interrupted_run_has_the_curve_of_an_undisturbed_one(spec: WorkerSpec, tmp_path: Path) -> None:
    specs = [
        replace(spec, config=spec.config.model_copy(update={"out": str(tmp_path / out)}))
        for out in ("straight", "interrupted")
    ]
    straight = run_to_end(specs[0])
    for _ in range(2):  # each is three steps further than the newest checkpoint, which has two
        with pytest.raises(InterruptedError):
            run_to_end(specs[1], InterruptedWorker)
    run_to_end(specs[1])
    first, second = (loss_curve(spec.config.out) for spec in specs)
    assert len(first) == STEPS
    assert first.tolist() == second.tolist()
    weights, others = (load_trained_weights(spec.config.out, STEPS) for spec in specs)
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())
    assert find_train_checkpoint(specs[1].config.out).epochs == straight.progress.epochs


class AskedToEnd(TrainWatch):
    """A watch in this process that asks to end after so many steps."""

    def ask(self, method: str, *arguments: Any, timeout_s: float | None = None) -> Any:
        if method == "note_step" and arguments[0].step == 4:
            self.ask_to_end()
        return getattr(self, method)(*arguments)


def test_a_worker_that_is_asked_to_end_keeps_its_steps(
    spec: WorkerSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.training.loop._TELL_EVERY_S", 0.0)
    quiet = spec.config.model_copy(update={"checkpoint_steps": None})
    specs = [
        replace(spec, config=quiet.model_copy(update={"out": str(tmp_path / out)})) for out in ("straight", "asked")
    ]
    run_to_end(specs[0])
    watch = AskedToEnd("run")
    run_to_end(replace(specs[1], watch=watch))  # type: ignore[arg-type]
    assert not watch.is_waited_for()
    assert watch.newest() == TrainStep(4, 2, pytest.approx(loss_curve(specs[0].config.out)[3]))
    assert find_train_checkpoint(specs[1].config.out).step == 4  # type: ignore[union-attr]
    run_to_end(specs[1])
    curves = [loss_curve(spec.config.out).tolist() for spec in specs]
    assert curves[0] == curves[1]


def test_a_finished_worker_does_nothing(spec: WorkerSpec) -> None:
    run_to_end(spec)
    marker = next(Path(spec.config.out).rglob("step-000000006/checkpoint.json"))
    before = marker.stat().st_mtime_ns
    run_to_end(spec)
    assert marker.stat().st_mtime_ns == before
    assert set(json.loads(marker.read_text())["epochs"][0]) == set(EpochResult.model_fields)


def test_prompts_that_do_not_fit_are_refused(spec: WorkerSpec) -> None:
    worker = Worker(spec, torch.device("cpu"))
    examples = next(spec.examples.batches(0))
    long = [replace(example, candidates=["word " * 600] * 4) for example in examples]
    with pytest.raises(ConfigError, match="do not fit the decoder's positions"):
        worker.texts.token_batch(long, "top-k", (0,))


def result(epoch: int, loss: float | None = None, cider: float | None = None) -> EpochResult:
    return EpochResult(epoch=epoch, step=epoch, loss=1.0, validation_loss=loss, cider=cider)


def test_the_best_epoch() -> None:
    epochs = (result(1, 1.0, 0.5), result(2, 0.8, 0.9), result(3, 0.7, 0.9), result(4, 0.6, 0.1))
    assert choose_best(epochs) == (epochs[2], "cider")
    without_cider = tuple(epoch.model_copy(update={"cider": None}) for epoch in epochs)
    assert choose_best(without_cider) == (without_cider[3], "validation_loss")
    assert choose_best((result(1), result(2))) == (result(2), "last")
