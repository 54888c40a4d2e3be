"""Owns how each kind of disturbance is done: one function each, which returns when it is done or has been healed.

What lasts until the command has ended is left for the trial to heal.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from mmap import MAP_ANONYMOUS, MAP_POPULATE, MAP_PRIVATE, mmap
from pathlib import Path

from tests.chaos.schedule import Disturbance
from tests.chaos.trial import Trial, memory_used
from tests.job_processes import JobProcess

ACTORS = ("ray::MapWorker", "ray::RayTrainWorker")
TASKS = ("ray::MapBatches", "ray::Write")
SEEN_S = 60.0  # for so long a process of a kind is looked for

Act = Callable[[Trial, Disturbance], None]
KINDS: dict[str, Act] = {}


def _kind(name: str) -> Callable[[Act], Act]:
    def register(act: Act) -> Act:
        KINDS[name] = act
        return act

    return register


@_kind("actor killed")
def kill_actors(trial: Trial, disturbance: Disturbance) -> None:
    """Kills processes that hold a model, wherever they run."""
    for _ in range(disturbance.number):
        _kill_one(trial, ACTORS)
        time.sleep(3)


@_kind("worker killed")
def kill_workers(trial: Trial, disturbance: Disturbance) -> None:
    """Kills processes that load, write, or do a build's or training's work."""
    for _ in range(disturbance.number):
        _kill_one(trial, (*TASKS, *(ACTORS if trial.schedule.job != "caption" else ())))
        time.sleep(1)


def _kill_one(trial: Trial, titles: tuple[str, ...]) -> None:
    deadline = time.monotonic() + SEEN_S
    while time.monotonic() < deadline and _runs(trial):
        if any(node.kill_one(titles) for node in reversed(trial.nodes)):
            return
        time.sleep(0.01)
    trial.outcome.notes.append("no process to kill was seen")


@_kind("node killed")
def kill_node(trial: Trial, disturbance: Disturbance) -> None:
    """Kills the last node and all that runs on it."""
    trial.nodes.pop().kill_all()


@_kind("node added")
def add_node(trial: Trial, disturbance: Disturbance) -> None:
    """Starts another node, and looks whether it gets work."""
    node = trial.start_node(trial.schedule.nodes[-1])
    while _runs(trial):
        if node.processes((*ACTORS, *TASKS)):
            trial.outcome.notes.append("the new node had work")
            return
        time.sleep(0.1)


@_kind("node frozen")
def freeze_node(trial: Trial, disturbance: Disturbance) -> None:
    """Stops all processes of the last node, and lets them go on later."""
    with _frozen(trial.nodes[-1].processes()):
        time.sleep(disturbance.lasts_s)
    if not trial.nodes[-1].processes(("/",)):  # its raylet, which is named by its path, has given up
        trial.nodes.pop()


@_kind("head killed")
def kill_head(trial: Trial, disturbance: Disturbance) -> None:
    """Kills the head; the same cluster is there again when the command has ended."""
    trial.nodes.pop(0).kill_all()

    def start_again() -> None:
        while trial.nodes:
            trial.nodes.pop().kill_all()
        trial.start_cluster()

    trial.heals.append(start_again)


@_kind("driver killed")
def kill_driver(trial: Trial, disturbance: Disturbance) -> None:
    """Kills the command, and starts it again while what it has started may still be at work."""
    _kill_command(trial)
    trial.job = trial.start()


@_kind("driver told to stop")
def stop_driver(trial: Trial, disturbance: Disturbance) -> None:
    """Sends the command Ctrl-C or SIGTERM, by the seed."""
    assert trial.job is not None
    number = signal.SIGINT if trial.schedule.seed % 2 else signal.SIGTERM
    with suppress(ProcessLookupError):
        trial.job.process.send_signal(number)


@_kind("second driver")
def start_second(trial: Trial, disturbance: Disturbance) -> None:
    """Gives the same command a second time; one of the two must give up with a message."""
    second = trial.start(trial.schedule.skew_s)
    trial.end_attempt()
    trial.job = second


@_kind("S3 killed")
def kill_s3(trial: Trial, disturbance: Disturbance) -> None:
    """Kills the S3 server and starts it again, with its data."""
    trial.server.stop(signal.SIGKILL)
    time.sleep(disturbance.lasts_s)
    trial.server.start()


@_kind("S3 frozen")
def freeze_s3(trial: Trial, disturbance: Disturbance) -> None:
    """Stops the S3 server without closing its connections."""
    assert trial.server.process is not None
    with _frozen([trial.server.process.pid]):
        time.sleep(disturbance.lasts_s)


@_kind("S3 unsteady")
def shake_s3(trial: Trial, disturbance: Disturbance) -> None:
    """Has a share of the requests fail in each way that networks know, and others take long."""
    rates = {"slow_down": 0.06, "reset": 0.05, "truncated": 0.04, "lost": 0.03, "slow": 0.02}
    trial.proxy.plan(seed=trial.schedule.seed, rates=rates, for_s=disturbance.lasts_s, slow_s=4)


@_kind("S3 answers 503")
def refuse_for_a_while(trial: Trial, disturbance: Disturbance) -> None:
    """Has every request refused as too many for a while."""
    trial.proxy.plan(rates={"slow_down": 1.0}, for_s=disturbance.lasts_s)


@_kind("credentials expired")
def expire_credentials(trial: Trial, disturbance: Disturbance) -> None:
    """Has every request refused as S3 does when a session's credentials are over, until the command has ended."""
    trial.proxy.plan(rates={"error": 1.0}, error_status=400, error_code="ExpiredToken")
    trial.heals.append(trial.proxy.plan)


@_kind("permission revoked")
def revoke_permission(trial: Trial, disturbance: Disturbance) -> None:
    """Forbids the images after so many requests, until the command has ended."""
    refused = {"rates": {"error": 1.0}, "error_status": 403, "error_code": "AccessDenied"}
    trial.proxy.plan(match="/images", begins_at=disturbance.number, **refused)
    trial.heals.append(trial.proxy.plan)


@_kind("output disk full")
def fill_output(trial: Trial, disturbance: Disturbance) -> None:
    """Leaves the output's disk no room, until the command has ended."""
    _fill(trial, trial.small_disk("output"))


@_kind("cache disk full")
def fill_cache(trial: Trial, disturbance: Disturbance) -> None:
    """Leaves the disk of the last node's cache no room, until the command has ended."""
    _fill(trial, trial.small_disk(f"home-{trial.started_nodes - 1}"))


@_kind("spill disk full")
def fill_spill(trial: Trial, disturbance: Disturbance) -> None:
    """Takes most of the cluster's object store, and leaves the disk that it spills to no room."""
    _fill(trial, trial.small_disk("spill"))
    held = JobProcess([sys.executable, "-c", _HOLDER, trial.address], trial.folder / "holder.log", {})
    held.until(lambda: "held" in held.printed(), 60)
    trial.heals.append(held.kill_all)


_HOLDER = """
import sys, time, numpy, ray
ray.init(sys.argv[1], log_to_driver=False)

@ray.remote(num_cpus=0)
def take(megabytes):
    return numpy.ones(megabytes << 20, numpy.uint8)

nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
by_node = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
taken = [take.options(scheduling_strategy=by_node(node, soft=False)).remote(60) for node in nodes]
ray.wait(taken, num_returns=len(taken))
print("held", flush=True)
time.sleep(3600)
"""


def _fill(trial: Trial, disk: Path) -> None:
    filler = disk / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(1 << 16)):
            pass
    trial.heals.append(lambda: filler.unlink(missing_ok=True))


@_kind("memory taken")
def take_memory(trial: Trial, disturbance: Disturbance) -> None:
    """Takes memory until Ray ends processes of the nodes, keeps it short for a while, and gives it back."""
    end, taken = time.monotonic() + SEEN_S, []
    while time.monotonic() < end and _runs(trial):
        if memory_used() < trial.memory_share + 0.02:
            taken.append(mmap(-1, 256 << 20, flags=MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE))
        else:
            end = min(end, time.monotonic() + disturbance.lasts_s)
            time.sleep(0.05)
    del taken
    if trial.job is not None and "Memory runs low" not in trial.job.log.read_text():
        trial.outcome.notes.append("Ray ended no process for want of memory")


@_kind("cached file damaged")
def damage_cache(trial: Trial, disturbance: Disturbance) -> None:
    """Kills the command, flips a byte in each index file of a node's cache, and starts the command again."""
    _kill_command(trial)
    files = [path for path in (trial.folder / f"home-{trial.started_nodes - 1}").rglob("*.faiss") if path.is_file()]
    for path in files:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(data)
    trial.outcome.notes.append(f"{len(files)} files of a cache damaged")
    trial.job = trial.start()


def _kill_command(trial: Trial) -> None:
    assert trial.job is not None
    trial.job.kill_all()
    trial.end_attempt()


def _runs(trial: Trial) -> bool:
    return trial.job is not None and trial.job.process.poll() is None


@contextmanager
def _frozen(processes: list[int]) -> Iterator[None]:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)
