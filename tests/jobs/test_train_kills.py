"""A training run whose processes are all killed goes on to the loss curve and the weights of an undisturbed one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.job_processes import StartJob
from tests.train_runs import loss_curve, write_captioned_images

pytestmark = [pytest.mark.own_ray, pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_killed_run(index: str, tiny_smallcap: Path, tmp_path: Path, start_job: StartJob) -> None:
    source = write_captioned_images(tmp_path / "images", 24)
    command = [sys.executable, "-m", "jobs.cli", "train", str(source), "--index", index, "--model", str(tiny_smallcap)]
    command += ["--epochs", "12", "--batch-size", "8", "--dtype", "float32", "--retrieval", "c-sample-k"]
    command += ["--set", "features=features", "--set", "checkpoint_steps=4"]
    interrupted, straight = tmp_path / "interrupted", tmp_path / "straight"

    # Relative paths, as people give them.
    job = start_job([*command, "--out", "interrupted"], tmp_path / "killed.log")
    job.until(lambda: list(interrupted.glob("checkpoints/*/checkpoint.json")), 200)
    job.kill_all()
    record = json.loads((interrupted / "train.json").read_text())
    assert record["status"] == "running"
    assert not (interrupted / "model").exists()

    start_job([*command, "--out", "interrupted"], tmp_path / "again.log").wait(240)
    start_job([*command, "--out", str(straight)], tmp_path / "straight.log").wait(240)
    record = json.loads((interrupted / "train.json").read_text())
    assert [attempt["first_step"] > 0 for attempt in record["attempts"]] == [False, True]
    assert loss_curve(interrupted).tolist() == loss_curve(straight).tolist()
    models = [(out / "model" / "model.safetensors").read_bytes() for out in (interrupted, straight)]
    assert models[0] == models[1]
