"""Owns one trial: S3, a cluster of several nodes and a job, as processes, and how the job is brought to its end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from benchmarks.s3_server import S3Server, serve_s3
from smallcap.errors import SmallCapError
from smallcap.machine.process_memory import available_bytes, total_bytes
from tests.chaos.schedule import BEFORE, Disturbance, Schedule
from tests.chaos.world import WORK, Caption, Verdict, Work, put_inputs
from tests.conftest import FaultProxy, serve_fault_proxy
from tests.job_processes import JobProcess, free_port, site_in

BUCKET = "chaos"
ATTEMPT_S = 300.0
ATTEMPTS = 5
OBJECT_STORE_BYTES = 100 << 20
SMALL_DISK_BYTES = 64 << 20
_STOPPED = {130, 143, -signal.SIGINT, -signal.SIGTERM}  # exits that were asked for


class NotHereError(Exception):
    """This machine cannot do what a schedule needs."""


@dataclass
class Outcome:
    """What a trial saw.

    Attributes:
        exits: Exit statuses of the commands, one after the other.
        verdict: What became of the work.
        notes: What else is to be told, such as the message of a command that stopped.
        faults: What must not happen.
        seconds: How long the trial took.
    """

    exits: list[int] = field(default_factory=list)
    verdict: Verdict | None = None
    notes: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def is_right(self) -> bool:
        """Whether the work is done as without any disturbance, and nothing happened that must not."""
        return self.verdict is not None and self.verdict.is_right and not self.faults


class Trial:
    """A schedule at work.

    Attributes:
        schedule: What is to happen.
        folder: The trial's own folder.
        server: The S3 server.
        proxy: What stands between the job and the server, and can fail.
        nodes: The running nodes, the head first.
        job: The command that runs.
        out: Where the job writes.
        outcome: What was seen so far.
        heals: What ends the disturbances that last until a command has ended.
        address: The head's.
        kinds: The kinds of the schedule's disturbances.
        memory_share: Share of this machine's memory from which on Ray ends processes, where memory is to be short.
    """

    def __init__(self, schedule: Schedule, world: Path, folder: Path, server: S3Server, proxy: FaultProxy) -> None:
        self.schedule, self.folder, self.server, self.proxy = schedule, folder, server, proxy
        self.work: Work = WORK[schedule.job](world)
        self.nodes: list[JobProcess] = []
        self.started_nodes = 0
        self.outcome = Outcome()
        self.heals: list[Callable[[], None]] = []
        self.job: JobProcess | None = None
        self.out = f"s3://{BUCKET}/out" if schedule.out == "s3" else str(self.small_disk("output") / "out")
        self.kinds = {disturbance.kind for disturbance in schedule.disturbances}
        self._port = free_port()
        self.address = f"127.0.0.1:{self._port}"
        self.memory_share = min(0.9, memory_used() + 0.35)  # two trials need up to 0.3
        self._attempts = 0

    def small_disk(self, name: str) -> Path:
        """Mounts a small disk in the trial's folder, unless it is there; `prepared` unmounts it."""
        path = self.folder / name
        if not path.is_mount():
            path.mkdir(exist_ok=True)
            mount = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK_BYTES}", "chaos", str(path)]
            done = subprocess.run(mount, capture_output=True, text=True, check=False)
            if done.returncode:
                raise NotHereError(f"a small disk cannot be mounted: {done.stderr.strip()}")
        return path

    def start_cluster(self) -> None:
        """Starts the schedule's nodes."""
        for number, cpus in enumerate(self.schedule.nodes):
            is_last = number == len(self.schedule.nodes) - 1
            self.start_node(cpus, self.schedule.skew_s if is_last else 0)

    def start_node(self, cpus: int, skew_s: int = 0) -> JobProcess:
        """Starts a node with a home, and so a cache, of its own; the first one is the head."""
        number, self.started_nodes = self.started_nodes, self.started_nodes + 1
        kinds = self.kinds
        home = self.small_disk(f"home-{number}") if "cache disk full" in kinds else self.folder / f"home-{number}"
        home.mkdir(exist_ok=True)
        command = [
            Path(sys.executable).parent / "ray", "start", "--block", f"--num-cpus={cpus}", "--disable-usage-stats",
            f"--object-store-memory={OBJECT_STORE_BYTES}", "--min-worker-port=0", "--max-worker-port=0",
            "--dashboard-agent-listen-port=0",
        ]  # fmt: skip
        if self.nodes:
            command += [f"--address={self.address}"]
        else:
            ports = [f"--port={self._port}", f"--ray-client-server-port={free_port()}"]
            command += ["--head", *ports, "--include-dashboard=false", f"--temp-dir={self.folder / 'ray'}"]
        if "spill disk full" in kinds:
            command += [f"--object-spilling-directory={self.small_disk('spill')}"]
        environment = self._environment() | {"HOME": str(home), "RAY_health_check_timeout_ms": "10000"}
        if "memory taken" in kinds:
            environment |= {"RAY_memory_usage_threshold": f"{self.memory_share:.2f}"}
            environment |= {"RAY_memory_monitor_refresh_ms": "250"}
        node = JobProcess(command, self.folder / f"node-{number}.log", environment | _clock(skew_s))
        self.nodes.append(node)
        node.until(lambda: "Ray runtime started" in node.log.read_text(), 90)
        return node

    def start(self, skew_s: int = 0) -> JobProcess:
        """Starts the job's command, whose clock may be wrong."""
        self._attempts += 1
        log = self.folder / f"job-{self._attempts}.log"
        command = [*self.work.command(f"s3://{BUCKET}", self.out), "--address", self.address]
        return JobProcess([*command, "--storage-patience-s", "120"], log, self._environment() | _clock(skew_s))

    def disturb(self, kinds: dict[str, Callable[[Trial, Disturbance], None]]) -> None:
        """Does what the schedule says, each thing in its time; what the job is too fast for is noted."""
        for disturbance in self.schedule.disturbances:
            if disturbance.after == BEFORE:
                kinds[disturbance.kind](self, disturbance)
        self.job = self.start()
        for disturbance in self.schedule.disturbances:
            if disturbance.after == BEFORE:
                continue
            if self._reaches(disturbance.after):
                self.say(str(disturbance))
                kinds[disturbance.kind](self, disturbance)
            else:
                self.outcome.notes.append(f"the command had ended before: {disturbance.kind}")

    def finish(self) -> None:
        """Waits for the job's end; repeats its command until it ends well."""
        self.end_attempt()
        while self.outcome.exits[-1] != 0 and self._attempts < ATTEMPTS:
            self.job = self.start()
            self.end_attempt()
        if isinstance(self.work, Caption) and not self.outcome.exits[-1] and (codes := self.work.errors(self.out)):
            self.outcome.notes.append(f"rows with {', '.join(codes)} were tried again")
            self._retry_failed()

    def end_attempt(self) -> None:
        """Waits for the end of the command that runs, notes how it ended, and ends what disturbed it."""
        assert self.job is not None
        try:
            status = self.job.process.wait(ATTEMPT_S)
        except subprocess.TimeoutExpired:
            self.outcome.faults.append(f"a command did not end in {ATTEMPT_S:.0f} s")
            self.job.kill_all()
            status = -signal.SIGKILL
        self.outcome.exits.append(status)
        printed = self.job.log.read_text()
        if "Traceback (most recent call last)" in printed:
            self.outcome.faults.append("a traceback was printed")
        if status not in {0, -signal.SIGKILL} | _STOPPED:
            errors = [line for line in printed.splitlines() if line.startswith("error: ")]
            self.outcome.notes += errors[-1:]
            if not errors:
                self.outcome.faults.append(f"the command ended with {status} and said nothing")
        if status and self.schedule.goes_on:
            self.outcome.faults.append(f"the command ended with {status}; it should have gone on")
        self.say(f"the command ended with {status}")
        while self.heals:
            self.heals.pop()()

    def judge(self) -> None:
        """Compares what was written with what an undisturbed job writes."""
        if self.outcome.exits[-1] == 0:
            self.outcome.verdict = self.work.judge(self.out)

    def keep_logs(self, folder: Path) -> None:
        """Copies what the commands and nodes have printed."""
        folder.mkdir(parents=True, exist_ok=True)
        for log in self.folder.glob("*.log"):
            shutil.copy(log, folder)

    def close(self) -> None:
        """Ends all processes."""
        for process in [self.job, *reversed(self.nodes)]:
            if process is not None:
                process.kill_all()

    def say(self, text: str) -> None:
        """Prints a line with the seed."""
        print(f"[{self.schedule.seed}] {text}", flush=True)

    def _retry_failed(self) -> None:
        command = [*self.work.command(f"s3://{BUCKET}", self.out)[:4], "--retry-failed", self.out]
        command += ["--address", self.address]
        self.job = JobProcess(command, self.folder / "retry.log", self._environment())
        self.end_attempt()

    def _reaches(self, share: float) -> bool:
        """Waits until so much of the work is done; returns whether the job still runs then."""
        assert self.job is not None
        deadline = time.monotonic() + ATTEMPT_S
        while self.job.process.poll() is None and time.monotonic() < deadline:
            try:
                if self.work.progress(self.out) >= share:
                    return True
            except SmallCapError:  # what it reads may be written just now
                pass
            time.sleep(0.1)
        return False

    def _environment(self) -> dict[str, str]:
        takes = {"OPENING_TAKES": "0.1" if "memory taken" in self.kinds else "0.02"}  # s; memory takes long to fill
        slow = site_in(self.folder, os.environ.get("PYTHONPATH", "")) | takes
        own = {"AWS_ENDPOINT_URL": self.proxy.endpoint, "RAY_TMPDIR": str(self.folder)}
        return slow | own | {"RAY_worker_niceness": "0"}  # the commands would keep workers of a lower priority waiting


def _clock(skew_s: int) -> dict[str, str]:
    """Returns the environment in which the time of day is wrong by so many seconds, and nothing else."""
    if not skew_s:
        return {}
    package = find_spec("libfaketime")
    if package is None or not package.submodule_search_locations:
        raise NotHereError("libfaketime is not installed")
    library = Path(package.submodule_search_locations[0]) / "vendor/libfaketime/src/libfaketime.so.1"
    return {
        "LD_PRELOAD": str(library),
        "FAKETIME": f"{skew_s:+d}",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",  # what waits must wait as long as it should
        "FAKETIME_NO_CACHE": "1",
    }


def memory_used() -> float:
    """Returns the share of this machine's memory that is in use."""
    return 1 - available_bytes() / total_bytes()


@contextmanager
def prepared(schedule: Schedule, world: Path) -> Iterator[Trial]:
    """Starts S3 and the cluster of a trial in a folder of its own, and ends and removes all of it."""
    folder = Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))  # short: Ray's sockets lie in it
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.callback(_unmount_all, folder)
        server = stack.enter_context(serve_s3(folder / "s3", BUCKET))
        proxy = stack.enter_context(serve_fault_proxy(server.endpoint))
        trial = Trial(schedule, world, folder, server, proxy)
        stack.callback(trial.close)
        put_inputs(trial.work, f"s3://{BUCKET}")
        trial.start_cluster()
        yield trial


def _unmount_all(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_mount():
            subprocess.run(["umount", "--lazy", str(path)], check=False)
