"""Whatever is killed, at whatever moment, the output is that of an undisturbed run: each image once, with its caption.

The job runs as its own process with its own Ray. What is killed is found by its title among the processes that carry
this run's mark in their environment. "During a write" is a moment that a `sitecustomize` of the test's makes long: it
holds every part back just before it appears, and says which process is writing.
"""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from jobs.captioning.record import load_run_record
from smallcap import storage
from smallcap.output.part_files import list_parts, read_part_infos
from tests.caption_runs import command_for, config_for, read_rows, rows_of, undisturbed_rows, write_images
from tests.job_processes import JobProcess, StartJob, held_parts, site_in

pytestmark = [pytest.mark.own_ray, pytest.mark.slow, pytest.mark.timeout(600)]

IMAGES = 700  # three fragments
SETS = ("output.rows_per_part=32", "compute.batch_size=8", "compute.dtype=float32")
TITLES = {
    "actor": ("ray::MapWorker(MapBatches(CaptionImages))",),
    "worker": ("ray::MapBatches(load_images)", "ray::Write"),
}


@pytest.fixture
def start(start_job: StartJob, tmp_path: Path) -> StartJob:
    """Starts a captioning command that opens images slowly: else all is loaded before the first part is written."""

    def start_slowly(command: list[str], **environment: str) -> JobProcess:
        site = site_in(tmp_path, os.environ.get("PYTHONPATH", ""))
        return start_job(command, tmp_path / "job.log", **({"OPENING_TAKES": "0.01"} | site | environment))

    return start_slowly


@pytest.fixture
def held(tmp_path: Path) -> Path:
    """The file in which a process says that it holds a part back."""
    return tmp_path / "held"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("images"))
    write_images(folder, IMAGES)
    return folder


@pytest.fixture(scope="module")
def expected(
    images: str, index: str, tiny_smallcap: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[str, str, str]]:
    """The rows of an undisturbed run."""
    out = str(tmp_path_factory.mktemp("expected") / "out")
    return undisturbed_rows(config_for(images, index, tiny_smallcap, out, *SETS))


@pytest.fixture
def out(anywhere: str) -> str:
    return storage.join(anywhere, f"out-{uuid.uuid4().hex[:6]}")


def check(out: str, expected: list[tuple[str, str, str]], attempts: int) -> None:
    assert rows_of(out) == expected
    record = load_run_record(out)
    assert record is not None
    assert (record.status, len(record.attempts)) == ("complete", attempts)
    assert record.images.total == record.images.ok == IMAGES


@pytest.mark.parametrize("moment", ["early", "middle", "during a write"])
def test_a_killed_driver(
    moment: str, out: str, images: str, index: str, tiny_smallcap: Path, expected: list, start: StartJob, held: Path
) -> None:
    """The driver and its whole Ray; then the same command again, which does only what is left."""
    command = command_for(images, index, tiny_smallcap, out, *SETS)
    job = start(command, **(held_parts(held, out) if moment == "during a write" else {}))
    if moment == "early":
        job.until(lambda: job.processes(TITLES["worker"]))
    else:
        job.until((lambda: list_parts(out)) if moment == "middle" else held.exists)
    job.kill_all()
    done = sum(len(rows) for _, info in read_part_infos(out) if info for rows in info.rows.values())
    assert done < IMAGES, "the kill came too late to show anything"
    start(command).wait()
    record = load_run_record(out)
    assert record is not None
    assert record.attempts[-1].images == IMAGES - done
    check(out, expected, attempts=2)


@pytest.mark.parametrize("moment", ["early", "middle", "during a write"])
@pytest.mark.parametrize("victim", ["actor", "worker"])
def test_a_killed_process_of_ray(
    victim: str,
    moment: str,
    out: str,
    images: str,
    index: str,
    tiny_smallcap: Path,
    expected: list,
    start: StartJob,
    held: Path,
) -> None:
    """The job goes on by itself. During a write the worker that dies is the one that writes."""
    hold = moment == "during a write"
    # Tasks share what the actor leaves of the CPUs: in the middle the worker that is there may be one that writes.
    slow_writes = hold or (victim == "worker" and moment == "middle")
    environment = held_parts(held, out) if slow_writes else {}
    if victim == "actor":  # loading paces it, so that it still has work when the moment comes
        environment["OPENING_TAKES"] = "0.05"
    job = start(command_for(images, index, tiny_smallcap, out, *SETS), **environment)
    if hold:
        job.until(held.exists)
    else:
        job.until(lambda: moment == "early" or list_parts(out))
    if hold and victim == "worker":
        os.kill(int(held.read_text()), signal.SIGKILL)
    else:
        job.until(lambda: job.kill_one(TITLES[victim]))
    job.wait()
    check(out, expected, attempts=1)


@pytest.fixture
def second_node(
    s3_server: str, tmp_path: Path, held: Path, out: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, Callable[[], None]]]:
    """A Ray cluster of two nodes that hold parts back: its address, and what kills the raylet of the second."""
    from ray.cluster_utils import Cluster

    for name, value in (held_parts(held, out) | site_in(tmp_path, "") | {"OPENING_TAKES": "0.01"}).items():
        monkeypatch.setenv(name, value)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "include_dashboard": False})
    try:
        node = cluster.add_node(num_cpus=3)
        cluster.wait_for_nodes()
        yield cluster.address, lambda: cluster.remove_node(node, allow_graceful=False)
    finally:
        cluster.shutdown()


@pytest.mark.parametrize("moment", ["early", "middle", "during a write"])
def test_a_killed_node(
    moment: str,
    out: str,
    images: str,
    index: str,
    tiny_smallcap: Path,
    expected: list,
    second_node: tuple[str, Callable[[], None]],
    start: StartJob,
    held: Path,
) -> None:
    """The raylet of a second node dies, and with it what ran there; the first node finishes the run."""
    address, kill_node = second_node
    flags = ("--address", address, "--set", "compute.num_actors=2")
    job = start([*command_for(images, index, tiny_smallcap, out, *SETS), *flags])
    if moment == "early":
        job.until(lambda: (record := load_run_record(out)) and record.attempts)
    else:
        job.until((lambda: list_parts(out)) if moment == "middle" else held.exists)
    kill_node()
    job.wait()
    check(out, expected, attempts=1)


def test_an_image_that_kills_its_process_becomes_a_row(
    index: str, tiny_smallcap: Path, tmp_path: Path, start: StartJob
) -> None:
    """The image is real, and the decoder of this test dies of it; the others of its batch have their captions."""
    images, out = str(tmp_path / "images"), str(tmp_path / "out")
    write_images(images, 40)
    Image.new("RGB", (77, 55), "red").save(tmp_path / "images" / "deadly.png")
    start(command_for(images, index, tiny_smallcap, out, *SETS), OPENING_TAKES="0", DEADLY_SIZE="(77, 55)").wait()
    rows = read_rows(out)
    assert len(rows) == 41
    assert rows.loc["deadly.png"].error_code == "crashed"
    assert (rows.status == "ok").sum() == 40
