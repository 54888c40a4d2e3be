"""A training run whose processes are all killed goes on to the loss curve and the weights of an undisturbed one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from tests.train_runs import loss_curve, write_captioned_images

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
MARK = "SMALLCAP_TEST_RUN"


def start(command: list[str], log: Path) -> tuple[subprocess.Popen[bytes], str]:
    """Starts a command as a process group of its own, with a Ray of its own; all its processes carry the mark."""
    mark = uuid.uuid4().hex
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {MARK: mark}
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=environment, start_new_session=True, stdout=file, stderr=subprocess.STDOUT, cwd=log.parent
        )
    return process, mark


def kill_all(process: subprocess.Popen[bytes], mark: str) -> None:
    """Kills the driver, and what it started, as a machine that goes down does."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                os.kill(int(folder.name), signal.SIGKILL)
        except OSError:  # it has just ended, or is not ours
            continue


def finish(command: list[str], log: Path) -> None:
    process, _ = start(command, log)
    assert process.wait(timeout=240) == 0, log.read_text()[-3000:]


def test_a_killed_run(index: str, tiny_smallcap: Path, tmp_path: Path) -> None:
    source = write_captioned_images(tmp_path / "images", 24)
    command = [sys.executable, "-m", "jobs.cli", "train", str(source), "--index", index, "--model", str(tiny_smallcap)]
    command += ["--epochs", "12", "--batch-size", "8", "--dtype", "float32", "--retrieval", "c-sample-k"]
    command += ["--set", "features=features", "--set", "checkpoint_steps=4"]
    interrupted, straight = tmp_path / "interrupted", tmp_path / "straight"

    # Relative paths, as people give them.
    process, mark = start([*command, "--out", "interrupted"], tmp_path / "killed.log")
    deadline = time.monotonic() + 200
    while not list(interrupted.glob("checkpoints/*/checkpoint.json")):
        assert process.poll() is None, (tmp_path / "killed.log").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    kill_all(process, mark)
    record = json.loads((interrupted / "train.json").read_text())
    assert record["status"] == "running"
    assert not (interrupted / "model").exists()

    finish([*command, "--out", "interrupted"], tmp_path / "again.log")
    finish([*command, "--out", str(straight)], tmp_path / "straight.log")
    record = json.loads((interrupted / "train.json").read_text())
    assert [attempt["first_step"] > 0 for attempt in record["attempts"]] == [False, True]
    assert loss_curve(interrupted).tolist() == loss_curve(straight).tolist()
    models = [(out / "model" / "model.safetensors").read_bytes() for out in (interrupted, straight)]
    assert models[0] == models[1]
