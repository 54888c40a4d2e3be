"""Clusters on which actors and the tasks that feed them are short of CPUs, and what other jobs leave of them.

Ray runs in processes of its own; a job joins it by its address.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.captioning.record import load_run_record
from smallcap.index.manifest import load_manifest
from tests.caption_runs import command_for, config_for, rows_of, undisturbed_rows, write_images
from tests.job_processes import JobProcess, StartJob, site_in

pytestmark = [pytest.mark.own_ray, pytest.mark.slow, pytest.mark.timeout(600)]

IMAGES = 600
SETS = ("compute.batch_size=8", "compute.dtype=float32")
MakeCluster = Callable[..., Any]


@pytest.fixture
def make_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[MakeCluster]:
    """A function that starts nodes with so many CPUs, the head first, and returns the cluster."""
    from ray.cluster_utils import Cluster

    clusters: list[Any] = []

    def make(*cpus: int, **environment: str) -> Any:
        for name, value in (site_in(tmp_path, "") | environment).items():
            monkeypatch.setenv(name, value)
        head, *others = cpus
        node = {"object_store_memory": 100 << 20, "include_dashboard": False}
        clusters.append(Cluster(initialize_head=True, head_node_args={"num_cpus": head, **node}))
        for count in others:
            clusters[-1].add_node(num_cpus=count, object_store_memory=100 << 20)
        clusters[-1].wait_for_nodes()
        return clusters[-1]

    yield make
    for cluster in clusters:
        cluster.shutdown()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("images"))
    write_images(folder, IMAGES)
    return folder


@pytest.fixture(scope="module")
def expected(
    images: str, index: str, tiny_smallcap: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[str, str, str]]:
    out = str(tmp_path_factory.mktemp("expected") / "out")
    return undisturbed_rows(config_for(images, index, tiny_smallcap, out, *SETS))


@pytest.fixture
def start(images: str, index: str, tiny_smallcap: Path, tmp_path: Path, start_job: StartJob) -> Callable[..., Any]:
    """Starts a captioning run with a name on a cluster."""

    def start_run(name: str, address: str, *more: str) -> JobProcess:
        command = command_for(images, index, tiny_smallcap, f"{tmp_path}/{name}", *SETS)
        return start_job([*command, "--address", address, *more], tmp_path / f"{name}.log")

    return start_run


@pytest.mark.parametrize("more", [(), ("--num-actors", "2")])
def test_one_cpu_captions(
    more: tuple[str, ...],
    make_cluster: MakeCluster,
    start: Callable[..., JobProcess],
    expected: list[tuple[str, str, str]],
    tmp_path: Path,
) -> None:
    start("out", make_cluster(1).address, *more).wait(300)
    assert rows_of(f"{tmp_path}/out") == expected


@pytest.mark.parametrize("cpus", [(3, 3), (2, 2), (1,)])
def test_two_jobs_side_by_side_end(
    cpus: tuple[int, ...],
    make_cluster: MakeCluster,
    start: Callable[..., JobProcess],
    expected: list[tuple[str, str, str]],
    tmp_path: Path,
) -> None:
    """With the default options; they may share the nodes or run one after the other."""
    address = make_cluster(*cpus).address
    jobs = [start(name, address) for name in ("first", "second")]
    for job in jobs:
        job.wait(400)
    for name in ("first", "second"):
        assert rows_of(f"{tmp_path}/{name}") == expected


def test_every_actor_of_small_nodes_starts(
    make_cluster: MakeCluster, start: Callable[..., JobProcess], tmp_path: Path
) -> None:
    """Loading, which always has more to do, does not keep the CPUs that the second actor needs."""
    job = start("out", make_cluster(2, 2, OPENING_TAKES="0.05").address)
    job.wait(400)
    record = load_run_record(f"{tmp_path}/out")
    assert record is not None
    assert record.attempts[-1].actors == 2


def test_a_job_that_waits_for_another_says_what_for(
    make_cluster: MakeCluster, start: Callable[..., JobProcess], tmp_path: Path
) -> None:
    address = make_cluster(2, OPENING_TAKES="0.3").address
    first = start("first", address)
    first.until(lambda: "loaded" in first.printed(), 200)
    second = start("second", address, "-q")
    second.until(lambda: "Ray has no room" in second.printed(), 200)
    line = next(line for line in second.printed().splitlines() if "Ray has no room" in line)
    assert "1 × (1.9386 CPUs)" in line
    assert "The cluster has 1 node with 2 CPUs (0.0" in line
    first.wait(400)
    second.wait(400)
    assert len(rows_of(f"{tmp_path}/second")) == IMAGES


def test_a_head_without_cpus_writes_nothing(
    make_cluster: MakeCluster,
    start: Callable[..., JobProcess],
    expected: list[tuple[str, str, str]],
    tmp_path: Path,
) -> None:
    """Only the other nodes may have credentials. What writes is held, and tells by its environment whose it is."""
    held = tmp_path / "held"
    cluster = make_cluster(0, 2, HELD=str(held))
    job = start("out", cluster.address)
    job.until(held.exists, 300)
    environment = Path(f"/proc/{held.read_text()}/environ").read_text().split("\0")
    (head,) = cluster.head_node.all_processes["raylet"]
    (raylet,) = (value.partition("=")[2] for value in environment if value.startswith("RAY_RAYLET_PID="))
    assert int(raylet) != head.process.pid
    job.wait(300)
    assert rows_of(f"{tmp_path}/out") == expected


def test_an_index_is_built_beside_a_run(
    make_cluster: MakeCluster,
    start: Callable[..., JobProcess],
    start_job: StartJob,
    tiny_clip: Path,
    tmp_path: Path,
) -> None:
    address = make_cluster(2).address
    rows = [f"a picture of thing {row}" for row in range(3_000)]
    (tmp_path / "captions.csv").write_text("\n".join(["caption", *rows]))
    run = start("out", address)
    command = [*command_for("", "", tiny_clip, "")[:3], "build-index", "captions.csv", "--out", "built"]
    command += ["--encoder", f"hf:{tiny_clip}", "--accept-recall", "--address", address]
    build = start_job(command, tmp_path / "build.log")
    run.wait(400)
    build.wait(400)
    assert load_manifest(str(tmp_path / "built")).ntotal == 3_000
    assert len(rows_of(f"{tmp_path}/out")) == IMAGES
