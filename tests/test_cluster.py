"""The cluster file is sound as far as can be told offline, and its way of submitting a job works on a local Ray."""

import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from smallcap.config import CaptionConfig
from smallcap.index.manifest import IndexManifest
from smallcap.machine.actor_plan import plan_actors
from smallcap.model.encoder_spec import resolve_encoder_identity
from smallcap.options import load_config
from tests.caption_runs import read_rows, write_images
from tests.job_processes import StartJob, free_port
from tests.python_process import run_python

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "cluster.yaml").read_text()
CLUSTER = yaml.safe_load(TEXT)
TOKEN = "0123456789abcdef" * 4
HEAD, WORKER = CLUSTER["available_node_types"]["head"], CLUSTER["available_node_types"]["gpu_worker"]


def test_the_cluster_file_passes_rays_own_check() -> None:
    private = pytest.importorskip("ray.autoscaler._private.util")
    private.validate_config(private.prepare_config(yaml.safe_load(TEXT)))


def test_the_cluster_installs_what_is_beside_it() -> None:
    assert CLUSTER["file_mounts"] == {"~/smallcap": "."}
    upgrade, install = (command for command in CLUSTER["setup_commands"] if "pip install" in command)
    assert "'pip>=24.1'" in upgrade  # for faiss-gpu-cuvs
    assert "~/smallcap/constraints.txt" in install
    assert "ray[default]" in install  # for jobs and metrics
    assert (ROOT / "constraints.txt").is_file()
    assert re.search(r"^prometheus_client==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


def test_jobs_and_workers_find_python_and_the_region() -> None:
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        *_, start = CLUSTER[name]
        assert "PATH=~/venv/bin:$PATH" in start
        assert f"AWS_DEFAULT_REGION={CLUSTER['provider']['region']} " in start


@pytest.fixture
def run_config(tmp_path: Path) -> CaptionConfig:
    """The run.yaml that the file's comment shows."""
    (block,) = re.findall(r"^#   images:.*?(?=^#\n)", TEXT, re.MULTILINE | re.DOTALL)
    (tmp_path / "run.yaml").write_text(re.sub(r"^#   ", "", block, flags=re.MULTILINE))
    return load_config(CaptionConfig, str(tmp_path / "run.yaml"))


def test_the_config_in_its_comment_brings_the_gpus_that_the_file_allows(run_config: CaptionConfig) -> None:
    compute = run_config.compute
    plan = plan_actors(compute, [HEAD["resources"]])  # what there is when the job starts
    assert (plan.device, plan.num_actors) == ("cuda", 1)
    assert plan.max_actors == WORKER["max_workers"] * WORKER["resources"]["GPU"] / compute.gpus_per_actor


def test_a_worker_has_what_an_actor_needs(run_config: CaptionConfig) -> None:
    plan = plan_actors(run_config.compute, [HEAD["resources"]])
    assert WORKER["min_workers"] == 0
    assert WORKER["max_workers"] <= CLUSTER["max_workers"]
    assert WORKER["resources"]["GPU"] >= plan.gpus_per_actor
    assert WORKER["resources"]["CPU"] >= plan.cpus_per_actor + 1  # one task at least feeds it
    assert "GPU" not in HEAD["resources"]
    assert "InstanceMarketOptions" not in HEAD["node_config"]


def test_every_node_type_shows_its_instance_profile() -> None:
    profiles = re.findall(r"^      # (IamInstanceProfile: .*)$", TEXT, re.MULTILINE)
    assert len(profiles) == len(CLUSTER["available_node_types"])
    for profile in profiles:
        assert yaml.safe_load(profile)["IamInstanceProfile"]["Arn"].startswith("arn:aws:iam::")
    assert "aws_access_key_id" not in TEXT.lower()


def own_environment() -> dict[str, str]:
    """This process's environment without what other fixtures put there for the session's Ray, and with a token."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
    return environment | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}


@pytest.fixture
def head(tmp_path: Path, start_job: StartJob, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """The addresses of a Ray of this test's own, and of its dashboard, started as the cluster file starts its head."""
    pytest.importorskip("aiohttp_cors", reason="ray[default] is not installed")
    gcs_port, port, binaries = free_port(), free_port(), Path(sys.executable).parent
    command = [
        binaries / "ray", "start", "--head", "--block", f"--port={gcs_port}", f"--dashboard-port={port}",
        "--dashboard-host=127.0.0.1", "--dashboard-agent-listen-port=0",
        f"--ray-client-server-port={free_port()}", "--min-worker-port=0", "--max-worker-port=0", "--num-cpus=4",
    ]  # fmt: skip
    for name in [name for name in os.environ if name.startswith(("RAY_", "AWS_"))]:
        monkeypatch.delenv(name)
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:  # short paths
        path = f"{binaries}:{os.environ['PATH']}"
        job = start_job([*command, f"--temp-dir={folder}"], tmp_path / "head.log", **own_environment() | {"PATH": path})
        job.until(lambda: answers(f"http://127.0.0.1:{port}/api/version"), 90)
        yield f"127.0.0.1:{gcs_port}", f"http://127.0.0.1:{port}"
        job.kill_all()  # and not `ray stop`, which would end every Ray of this machine


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers={"Authorization": f"Bearer {TOKEN}"}), timeout=2
        ):
            return True
    except OSError:
        return False


@pytest.mark.own_ray
@pytest.mark.slow
def test_a_job_is_submitted_to_a_cluster_that_asks_for_a_token(
    head: tuple[str, str],
    tmp_path: Path,
    tiny_clip: Path,
    tiny_smallcap: Path,
    publish_index: Callable[..., IndexManifest],
) -> None:
    cluster, dashboard = head
    vectors = np.eye(16, dtype=np.float32)
    texts = [f"{number} dogs" for number in range(16)]
    publish_index(str(tmp_path / "index"), vectors, texts, encoder=resolve_encoder_identity(f"hf:{tiny_clip}"))
    write_images(f"{tmp_path}/images", 5)
    run: dict[str, Any] = {
        "images": [f"{tmp_path}/images"],
        "index": str(tmp_path / "index"),
        "model": str(tiny_smallcap),
        "out": str(tmp_path / "out"),
        "compute": {"dtype": "float32", "batch_size": 8},
        "retrieval": {"cache_dir": str(tmp_path / "cache")},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    command = [
        Path(sys.executable).parent / "ray", "job", "submit", "--address", dashboard, "--submission-id", "captions",
        "--working-dir", ".", "--", "smallcap", "caption", "--config", str(tmp_path / "run.yaml"),
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env=own_environment(), capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Job 'captions' succeeded" in done.stdout + done.stderr
    assert "5 rows: 5 ok, 0 errors" in done.stdout
    rows = read_rows(f"{tmp_path}/out")
    assert list(rows.image_id) == [f"{number:03d}.jpg" for number in range(5)]
    assert set(rows.status) == {"ok"}
    assert set(map(len, rows.neighbours)) == {4}
    wrong = f"from jobs.cluster.session import connect; connect('{cluster}')"
    with pytest.raises(subprocess.CalledProcessError) as refused:
        run_python(wrong, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN[::-1])
    assert "InvalidAuthToken" in refused.value.stderr
    assert "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN" in refused.value.stderr
