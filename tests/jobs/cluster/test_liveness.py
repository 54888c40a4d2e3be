"""A Ray that dies: servers of this test are its head and its raylet, and one test kills those of a real job."""

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jobs.captioning.record import load_run_record
from jobs.cluster import liveness
from jobs.cluster.liveness import Listener, RayWatch, watch_ray
from smallcap.errors import RunError, StorageError
from smallcap.output.part_files import list_parts
from tests.caption_runs import command_for, write_images
from tests.job_processes import StartJob, site_in
from tests.python_process import run_python


class Deaths:
    """Gathers what a watch says."""

    def __init__(self) -> None:
        self.said: list[RunError] = []
        self.came = threading.Event()

    def __call__(self, error: RunError) -> None:
        self.said.append(error)
        self.came.set()


@pytest.fixture
def deaths() -> Deaths:
    return Deaths()


@pytest.fixture
def head() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.fixture
def raylet(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "raylet"))
        server.listen()
        yield server


def kept() -> str:
    return "The rows of 3 images are written in out."


@contextmanager
def watching(deaths: Deaths, *places: Listener, kept: Callable[[], str] = kept) -> Iterator[RayWatch]:
    watch = RayWatch(places, kept, deaths, every_s=0.02)
    with watch.in_thread():
        yield watch


def head_at(server: socket.socket, patience_s: float = 0.0) -> Listener:
    return Listener("the head (GCS)", server.getsockname(), patience_s)


def raylet_at(server: socket.socket) -> Listener:
    return Listener("the raylet of this machine", server.getsockname())


def test_what_lives_is_left_alone(deaths: Deaths, head: socket.socket, raylet: socket.socket) -> None:
    with watching(deaths, head_at(head), raylet_at(raylet)) as watch:
        assert not deaths.came.wait(0.3)
        assert watch.look() is None


def test_a_head_that_dies(deaths: Deaths, head: socket.socket, raylet: socket.socket) -> None:
    with watching(deaths, head_at(head), raylet_at(raylet)) as watch:
        head.close()
        assert deaths.came.wait(20)
        assert watch.look() is not None
    (error,) = deaths.said
    assert error.where == "the head (GCS)"
    assert "nothing listens there any more" in error.found
    assert error.remedy.startswith(kept())
    assert "the same command goes on" in error.remedy


def test_a_head_that_is_silent_for_a_while(deaths: Deaths, head: socket.socket) -> None:
    address = head.getsockname()
    with watching(deaths, head_at(head, patience_s=1000)) as watch:
        head.close()
        assert not deaths.came.wait(0.3)
        assert watch.look() is not None  # an exception of Ray does not wait
        with socket.create_server(address):
            assert watch.look() is None


def test_patience_ends(deaths: Deaths, head: socket.socket) -> None:
    with watching(deaths, head_at(head, patience_s=1.1)):
        began = time.monotonic()
        head.close()
        assert deaths.came.wait(20)
        assert time.monotonic() - began >= 1.1
    assert "s by now" in deaths.said[0].found


def test_the_end_of_a_raylet_is_noticed_at_once(deaths: Deaths, raylet: socket.socket) -> None:
    watch = RayWatch([raylet_at(raylet)], kept, deaths, every_s=1000)
    with watch.in_thread():
        connection, _ = raylet.accept()
        raylet.close()
        connection.close()
        assert deaths.came.wait(20)
    assert deaths.said[0].where == "the raylet of this machine"


def test_a_raylet_that_closes_a_connection_lives(deaths: Deaths, raylet: socket.socket) -> None:
    with watching(deaths, raylet_at(raylet)):
        raylet.accept()[0].close()
        assert not deaths.came.wait(0.3)


def test_a_file_of_a_socket_that_is_gone(deaths: Deaths, raylet: socket.socket) -> None:
    with watching(deaths, raylet_at(raylet)):
        Path(raylet.getsockname()).unlink()
        assert deaths.came.wait(20)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (TimeoutError(), "does not answer"),
        (OSError(113, "No route to host"), "cannot be reached"),
        (OSError(24, "Too many open files"), ""),  # which says nothing of the place
    ],
    ids=["timeout", "route", "files"],
)
def test_what_a_failed_look_means(monkeypatch: pytest.MonkeyPatch, error: OSError, why: str) -> None:
    def fail(address: object, timeout: float) -> None:
        raise error

    monkeypatch.setattr(socket, "create_connection", fail)
    found = Listener("the head", ("10.0.0.5", 6379)).ask()
    assert why in found
    assert bool(found) == bool(why)


def test_storage_that_is_lost_as_well_delays_nothing(
    deaths: Deaths, head: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> str:
        raise StorageError("no answer")

    monkeypatch.setattr(liveness, "_KEPT_S", 0.1)
    release, place = threading.Event(), head_at(head)
    head.close()
    for unknown in (fail, lambda: str(release.wait())):
        with watching(deaths, place, kept=unknown):
            assert deaths.came.wait(20)
        assert deaths.said.pop().remedy.startswith("What was written before is kept.")
        deaths.came.clear()
    release.set()


def test_an_exception_that_comes_with_rays_death_is_that_message(
    monkeypatch: pytest.MonkeyPatch, head: socket.socket
) -> None:
    monkeypatch.setattr(liveness, "ray_listeners", lambda: [head_at(head, 1000)])
    with pytest.raises(ZeroDivisionError), watch_ray(kept):
        _ = 1 / 0  # a bug
    with pytest.raises(RunError, match="Ray has stopped"), watch_ray(kept):
        head.close()
        raise ConnectionError("from the depths of Ray")


def test_leaving_prints_and_ends_the_process() -> None:
    script = (
        "import os, subprocess, sys; from smallcap.errors import RunError; from jobs.cluster.liveness import leave\n"
        "if os.fork() == 0:\n    sys.stderr = sys.stdout\n    leave(RunError('Ray has stopped.', where='the head'))\n"
        "print(os.waitstatus_to_exitcode(os.wait()[1]))"
    )
    assert run_python(script) == "error: Ray has stopped.\n  where: the head\n1\n"


@pytest.mark.own_ray
@pytest.mark.slow
@pytest.mark.parametrize("victim", ["gcs_server", "raylet"])
def test_a_job_whose_ray_dies_says_so(
    victim: str, index: str, tiny_smallcap: Path, tmp_path: Path, start_job: StartJob
) -> None:
    write_images(f"{tmp_path}/images", 1500)
    out = f"{tmp_path}/out"
    sets = ("output.rows_per_part=32", "compute.batch_size=8", "compute.dtype=float32")
    command = command_for(f"{tmp_path}/images", index, tiny_smallcap, out, *sets)
    slow = site_in(tmp_path, os.environ.get("PYTHONPATH", "")) | {"OPENING_TAKES": "0.2"}  # it outlasts the watch
    job = start_job([*command, "--address", "local"], tmp_path / "job.log", **slow)
    job.until(lambda: list_parts(out), 200)
    pattern = re.compile(rf"/{victim}$")
    (process,) = [
        pid for pid in job.processes() if pattern.search(Path(f"/proc/{pid}/cmdline").read_text().split("\0")[0])
    ]
    os.kill(process, signal.SIGKILL)
    job.wait(60, status=1)
    printed = job.printed()
    assert "error: Ray has stopped, and this job with it." in printed
    assert re.search(r"The rows of [1-9][\d,]* images are written in ", printed)
    assert "Traceback" not in printed
    record = load_run_record(out)
    assert record is not None
    assert record.status == "running"
