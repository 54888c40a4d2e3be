"""`ray job submit` from a folder of the user's: what reaches who submits, and what `ray job stop` leaves behind.

The head is a Ray of its own, which asks for a token or does not. The folder has packages with the names of ours.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.captioning.record import load_run_record
from tests.caption_runs import config_for, read_rows, rows_of, undisturbed_rows, write_images
from tests.job_processes import StartJob, free_port, site_in

pytestmark = [pytest.mark.own_ray, pytest.mark.slow, pytest.mark.timeout(900)]

IMAGES = 900  # enough for a stop to find work
TOKEN = "fedcba9876543210" * 4
BINARIES = Path(sys.executable).parent
STOP_PATIENTLY = '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120"}}'


@dataclass(frozen=True)
class Submitter:
    """A fresh folder, from which jobs are submitted to a head."""

    dashboard: str
    folder: Path
    environment: dict[str, str]

    def ray_job(self, command: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Runs `ray job COMMAND` with these arguments."""
        line = [BINARIES / "ray", "job", command, "--address", self.dashboard, *arguments]
        return subprocess.run(
            line, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=400, check=False
        )

    def submit(self, name: str, *command: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        """Submits a command with the folder as its working directory."""
        given = ("--submission-id", name, "--working-dir", ".", *options)
        return self.ray_job("submit", *given, "--", *command)

    def until(self, condition: Callable[[], object], name: str, seconds: float = 300) -> None:
        """Waits, and fails with the job's log."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.ray_job("logs", name).stdout[-3000:]
            time.sleep(0.2)


def answers(url: str) -> bool:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {TOKEN}"})
    try:
        with urllib.request.urlopen(request, timeout=2):
            return True
    except OSError:
        return False


@pytest.fixture(params=["token", "open"])
def submitter(
    request: pytest.FixtureRequest, tmp_path: Path, start_job: StartJob, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Submitter]:
    pytest.importorskip("aiohttp_cors", reason="ray[default] is not installed")
    for name in [name for name in os.environ if name.startswith(("RAY_", "AWS_"))]:
        monkeypatch.delenv(name)
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    security = token if request.param == "token" else {"RAY_AUTH_MODE": "disabled"}
    port = free_port()
    dashboard = f"http://127.0.0.1:{port}"
    command = [
        BINARIES / "ray", "start", "--head", "--block", f"--port={free_port()}", f"--dashboard-port={port}",
        "--dashboard-host=127.0.0.1", "--dashboard-agent-listen-port=0",
        f"--ray-client-server-port={free_port()}", "--min-worker-port=0", "--max-worker-port=0", "--num-cpus=3",
    ]  # fmt: skip
    folder = tmp_path / "fresh"
    (folder / "jobs").mkdir(parents=True)
    (folder / "jobs" / "__init__.py").write_text("raise SystemExit('another package')")
    environment = {**os.environ, **security}
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as temporary:
        slow = site_in(tmp_path, os.environ.get("PYTHONPATH", "")) | {"OPENING_TAKES": "0.2"}  # s
        path = {"PATH": f"{BINARIES}:{os.environ['PATH']}"}
        head = start_job([*command, f"--temp-dir={temporary}"], tmp_path / "head.log", **security, **slow, **path)
        head.until(lambda: answers(f"{dashboard}/api/version"), 120)
        yield Submitter(dashboard, folder, environment)
        head.kill_all()


def write_config(submitter: Submitter, images: str, index: str, model: Path, out: str) -> None:
    run: dict[str, Any] = {
        "images": [images],
        "index": index,
        "model": str(model),
        "out": out,
        "compute": {"dtype": "float32", "batch_size": 8},
    }
    (submitter.folder / "run.yaml").write_text(yaml.safe_dump(run))


def test_a_submission_fails_stops_and_goes_on(
    submitter: Submitter, index: str, tiny_smallcap: Path, tmp_path: Path
) -> None:
    images, out = f"{tmp_path}/images", f"{tmp_path}/out"
    write_images(images, IMAGES)
    write_config(submitter, images, index, tiny_smallcap, out)
    caption = ("smallcap", "caption", "--config", "run.yaml")

    wrong = submitter.submit("wrong", *caption, "--num-beams", "none")
    assert wrong.returncode == 1  # Ray's own: smallcap's is in the message
    said = wrong.stdout + wrong.stderr
    assert "failed with exit code 2" in said
    assert "--num-beams" in said

    started = submitter.submit("first", *caption, options=("--no-wait", "--runtime-env-json", STOP_PATIENTLY))
    assert started.returncode == 0, started.stdout + started.stderr
    submitter.until(lambda: re.search(r"captioned [1-9]", submitter.ray_job("logs", "first").stdout), "first")
    stopped = submitter.ray_job("stop", "first")
    assert "was stopped" in stopped.stdout + stopped.stderr
    log = submitter.ray_job("logs", "first").stdout
    (kept,) = re.findall(rf"Stopped: (\d+) of {IMAGES} written; the same command goes on", log)
    assert "***" not in log, "Ray's C++ side has printed its stack"
    record = load_run_record(out)
    assert record is not None
    assert record.status == "stopped"
    assert 0 < len(read_rows(out)) == int(kept) < IMAGES

    again = submitter.submit("second", *caption)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "Job 'second' succeeded" in again.stdout + again.stderr
    assert f"{IMAGES} rows: {IMAGES} ok, 0 errors" in again.stdout
    assert rows_of(out) == undisturbed_rows(config_for(images, index, tiny_smallcap, f"{tmp_path}/expected"))


def test_too_many_errors_reach_who_submits(
    submitter: Submitter, index: str, tiny_smallcap: Path, tmp_path: Path
) -> None:
    write_images(f"{tmp_path}/images", 3)
    (tmp_path / "images" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    write_config(submitter, f"{tmp_path}/images", index, tiny_smallcap, f"{tmp_path}/out")
    done = submitter.submit("errors", "smallcap", "caption", "--config", "run.yaml", "--max-error-rate", "0.1")
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert "failed with exit code 3" in said
    assert "Exit code 3: 1 of 4 rows are errors, 25.00%; --max-error-rate allows 10.00%." in said
