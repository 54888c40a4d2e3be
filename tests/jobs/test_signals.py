"""Ctrl-C and SIGTERM as shells and `ray job stop` send them: to jobs as processes with a Ray of their own.

A terminal sends Ctrl-C to the whole process group, Ray's processes included.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from jobs.captioning.record import load_run_record
from smallcap.index.manifest import load_manifest
from smallcap.output.part_files import list_parts, read_part_infos
from tests.caption_runs import command_for, config_for, rows_of, undisturbed_rows, write_images
from tests.job_processes import JobProcess, StartJob
from tests.train_runs import loss_curve, write_captioned_images

pytestmark = [pytest.mark.own_ray, pytest.mark.slow, pytest.mark.timeout(600)]

IMAGES = 600
SETS = ("output.rows_per_part=64", "compute.batch_size=8", "compute.dtype=float32")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("images"))
    write_images(folder, IMAGES)
    return folder


def send(job: JobProcess, number: int) -> None:
    """Sends a signal as it comes in practice."""
    if number == signal.SIGINT:
        os.killpg(job.process.pid, number)
    else:
        os.kill(job.process.pid, number)


def check_end(job: JobProcess, number: int) -> str:
    """Waits for the job to end as it should; returns the line that says what is kept."""
    job.wait(120, 128 + number)
    printed = job.printed()
    assert "Traceback" not in printed
    assert "***" not in printed, "Ray's C++ side has printed its stack"
    (line,) = [line for line in printed.splitlines() if line.startswith("Stopped")]
    return line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_captioning_run(
    number: int, images: str, index: str, tiny_smallcap: Path, tmp_path: Path, start_job: StartJob
) -> None:
    out = str(tmp_path / "out")
    command = command_for(images, index, tiny_smallcap, out, *SETS)
    job = start_job(command, tmp_path / "stopped.log")
    job.until(lambda: list_parts(out))
    send(job, number)
    line = check_end(job, number)
    done = sum(len(rows) for _, info in read_part_infos(out) for rows in info.rows.values())
    assert line == f"Stopped: {done} of {IMAGES} written; the same command goes on"
    assert done < IMAGES, "the signal came too late to show anything"
    record = load_run_record(out)
    assert record is not None
    assert record.status == "stopped"

    start_job(command, tmp_path / "again.log").wait()
    expected = undisturbed_rows(config_for(images, index, tiny_smallcap, str(tmp_path / "expected"), *SETS))
    assert rows_of(out) == expected
    assert all(len(Path(part).name.split("-")) == 3 for part in list_parts(out)), "interim parts are left"


def test_a_second_ctrl_c_leaves_nothing_running(
    images: str, index: str, tiny_smallcap: Path, tmp_path: Path, start_job: StartJob
) -> None:
    job = start_job(command_for(images, index, tiny_smallcap, str(tmp_path / "out")), tmp_path / "job.log")
    job.until(lambda: "starting actors" in job.printed())
    send(job, signal.SIGINT)
    time.sleep(0.5)
    send(job, signal.SIGINT)
    job.process.wait(timeout=60)
    assert job.process.returncode == 130
    deadline = time.monotonic() + 60
    while job.processes():
        assert time.monotonic() < deadline, [Path(f"/proc/{left}/cmdline").read_text() for left in job.processes()]
        time.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_training(number: int, index: str, tiny_smallcap: Path, tmp_path: Path, start_job: StartJob) -> None:
    source = write_captioned_images(tmp_path / "images", 24)
    command = [sys.executable, "-m", "jobs.cli", "train", str(source), "--index", index, "--model", str(tiny_smallcap)]
    command += ["--epochs", "40", "--batch-size", "2", "--dtype", "float32", "--out", "out"]
    job = start_job(command, tmp_path / "stopped.log")
    job.until(lambda: list(tmp_path.glob("out/checkpoints/*/checkpoint.json")), 200)
    send(job, number)
    line = check_end(job, number)
    newest = max(int(path.parent.name[5:]) for path in tmp_path.glob("out/checkpoints/*/checkpoint.json"))
    assert line == f"Stopped: {newest} of 960 steps are in a checkpoint; the same command goes on"
    assert json.loads((tmp_path / "out" / "train.json").read_text())["status"] == "stopped"
    assert "step 1" in job.printed() or "Training:" in job.printed()

    start_job(command, tmp_path / "again.log").wait(240)
    record = json.loads((tmp_path / "out" / "train.json").read_text())
    assert record["status"] == "complete"
    assert record["attempts"][1]["first_step"] == newest
    assert len(loss_curve(tmp_path / "out")) == 960


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_index_build(number: int, tiny_clip: Path, tmp_path: Path, start_job: StartJob) -> None:
    rows = [f"a picture of thing {row}" for row in range(20_000)]
    (tmp_path / "captions.csv").write_text("\n".join(["caption", *rows]))
    command = [sys.executable, "-m", "jobs.cli", "build-index", "captions.csv", "--out", "index"]
    command += ["--encoder", f"hf:{tiny_clip}", "--shards", "4", "--accept-recall"]
    job = start_job(command, tmp_path / "stopped.log")
    job.until(lambda: list(tmp_path.glob("index/.staging-*/work/embeddings/*")))
    send(job, number)
    line = check_end(job, number)
    assert re.fullmatch(r"Stopped while [a-z ]+(\([0-9,]+ of [0-9,]+ [a-z]+ done\))?; what has ended is kept, .*", line)
    start_job(command, tmp_path / "again.log").wait()
    assert load_manifest(str(tmp_path / "index")).ntotal == 20_000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_dry_run(
    number: int, images: str, index: str, tiny_smallcap: Path, tmp_path: Path, start_job: StartJob
) -> None:
    command = [*command_for(images, index, tiny_smallcap, str(tmp_path / "out"), *SETS), "--dry-run"]
    job = start_job(command, tmp_path / "stopped.log")
    job.until(lambda: job.processes(("ray::_CalibratingActor",)))
    send(job, number)
    assert check_end(job, number) == "Stopped: a dry run writes nothing"
    assert not (tmp_path / "out").exists()
