"""The cluster file is sound as far as can be told offline, and its way of submitting a job works on a local Ray."""

import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from copy import deepcopy
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


COMMANDS = ("setup_commands", "head_setup_commands", "worker_setup_commands")
STARTS = ("head_start_ray_commands", "worker_start_ray_commands")


def check_with_ray(cluster: dict[str, Any]) -> dict[str, Any]:
    """Returns a cluster file as Ray completes it from its own defaults; fails where Ray would refuse it."""
    private = pytest.importorskip("ray.autoscaler._private.util")
    prepared: dict[str, Any] = private.prepare_config(deepcopy(cluster))
    private.validate_config(prepared)
    return prepared


def test_the_cluster_file_fits_rays_schema_and_its_own_check() -> None:
    autoscaler = pytest.importorskip("ray.autoscaler")
    schema = json.loads((Path(autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(CLUSTER, schema)
    check_with_ray(CLUSTER)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(CLUSTER | {"max_worker": 8}, schema)


def test_ray_adds_no_command_that_the_file_does_not_have() -> None:
    prepared = check_with_ray(CLUSTER)
    ours = [command for name in COMMANDS for command in CLUSTER[name]]
    for name in COMMANDS:
        assert set(prepared[name]) <= set(ours), name


def test_the_setup_installs_the_wheel_with_constraints_and_a_python_that_it_needs() -> None:
    setup = CLUSTER["setup_commands"]
    (made,) = (command for command in setup if "uv venv" in command)
    python = re.search(r"--python (\S+)", made)
    assert python and python[1] == "3.11"  # as constraints.txt; uv fetches it where the image has another
    (fetch,) = (command for command in setup if " s3 sync " in command)
    (install,) = (command for command in setup if "uv pip install" in command)
    assert setup.index(made) < setup.index(install) > setup.index(fetch)
    assert "-c ~/smallcap/constraints.txt ~/smallcap/smallcap-*.whl" in install
    constraints = (ROOT / "constraints.txt").read_text()
    for package in ("boto3", "ray[default]"):  # for the autoscaler; for jobs and metrics
        assert package in install
        assert re.search(rf"^{package.partition('[')[0]}==", constraints, re.MULTILINE)
    assert re.search(r"^prometheus_client==", constraints, re.MULTILINE)
    for command in setup:
        subprocess.run(["bash", "-n", "-c", command], check=True)


def test_nothing_depends_on_the_folder_in_which_ray_up_is_called() -> None:
    mounts = [line.strip("# ") for line in TEXT.splitlines() if line.startswith("#   ~/")]
    for mount in [*CLUSTER["file_mounts"].items(), *(line.split(": ") for line in mounts)]:
        assert all(place.startswith(("/", "~/")) for place in mount)


@pytest.mark.parametrize("name", STARTS)
def test_ray_starts_with_python_and_region_and_without_a_number_of_threads(name: str, tmp_path: Path) -> None:
    """As Ray's runner over SSH, which exports OMP_NUM_THREADS=1, starts it."""
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    ray = tmp_path / "venv" / "bin" / "ray"
    ray.write_text('#!/bin/sh\necho "$@"; env\n')
    ray.chmod(0o755)
    given = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "RAY_HEAD_IP": "10.0.0.1"}
    *_, start = CLUSTER[name]
    command = start.replace("ulimit -n 65536", "ulimit -n")  # which may be less here
    runner = f"export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore && ({command})"
    done = subprocess.run(["bash", "-c", runner], env=given, capture_output=True, text=True, check=True).stdout
    assert "OMP_NUM_THREADS" not in done
    assert f"PATH={tmp_path}/venv/bin:" in done
    assert f"AWS_DEFAULT_REGION={CLUSTER['provider']['region']}\n" in done
    assert "start --head" in done if name.startswith("head") else "start --address=10.0.0.1:6379" in done


def allowed(policy: str) -> set[str]:
    statements = json.loads((ROOT / "deploy" / "aws" / f"{policy}-policy.json").read_text())["Statement"]
    actions = [statement["Action"] for statement in statements if statement["Effect"] == "Allow"]
    return {action for some in actions for action in ([some] if isinstance(some, str) else some)}


def test_the_policies_allow_what_the_file_asks_for() -> None:
    images = [kind["node_config"]["ImageId"] for kind in CLUSTER["available_node_types"].values()]
    assert all(image.startswith("resolve:ssm:/aws/service/deeplearning/") for image in images)
    assert {"ssm:GetParameters", "iam:PassRole", "ec2:RunInstances", "ec2:TerminateInstances"} <= allowed("head")
    assert {"s3:GetObject", "s3:ListBucket", "s3:PutObject", "s3:DeleteObject"} <= allowed("worker")
    assert "deploy/aws/head-policy.json" in TEXT
    assert "deploy/aws/worker-policy.json" in TEXT


@pytest.mark.parametrize("cloud", ["gcp", "azure"])
def test_the_changes_for_other_clouds_fit_rays_schema(cloud: str) -> None:
    blocks = re.findall(r"^((?:    .*\n|\n)+)", (ROOT / "docs" / "cluster.md").read_text(), re.MULTILINE)
    (changes,) = (yaml.safe_load(block) for block in blocks if f"type: {cloud}" in block)
    assert set(changes["available_node_types"]) == set(CLUSTER["available_node_types"])
    prepared = check_with_ray(CLUSTER | changes)
    ours = [command for name in COMMANDS for command in (CLUSTER | changes)[name]]
    assert set(prepared["head_setup_commands"]) <= set(ours)


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


def test_every_node_type_has_an_instance_profile_and_no_keys() -> None:
    profiles = [kind["node_config"]["IamInstanceProfile"]["Arn"] for kind in CLUSTER["available_node_types"].values()]
    assert all(profile.startswith("arn:aws:iam::") for profile in profiles)
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
