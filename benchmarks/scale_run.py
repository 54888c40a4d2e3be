"""Watches one `smallcap caption`, its rows and its memory over time, and kills it at given numbers of rows."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from benchmarks.measuring import environment, ray_memory, tree_of
from smallcap import storage
from smallcap.errors import StorageError

_SAMPLE_S = 1.0


class Sample(NamedTuple):
    """One moment of a run."""

    seconds: float  # since the run's first start
    rows: int  # in parts
    memory: dict[str, float]  # MB; see `measuring.ray_memory`


@dataclass
class Kill:
    """One SIGKILL of the driver and of its Ray."""

    seconds: float  # since the run's first start
    rows: int  # in parts, when all its processes were dead
    fetched_again: int | None  # images that S3 had sent to this run and that were in no part
    first_rows_s: float | None = None  # from the next start to its first part


@dataclass
class WatchedRun:
    """A run of one command, over all its starts.

    Attributes:
        command: The command line of `smallcap caption`; its output folder is `out`.
        out: The output folder or prefix.
        log: The file for the command's output.
        fetched: Returns how many images the server has sent to runs since it started; None if nobody counts.
        samples: All samples so far.
        kills: All kills so far.
        starts: The time of each start.
    """

    command: Sequence[str]
    out: str
    log: Path
    fetched: Callable[[], int] | None = None
    samples: list[Sample] = field(default_factory=list)
    kills: list[Kill] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)  # seconds since the first start
    _parts: dict[str, int] = field(default_factory=dict)
    _fetched_before: int = 0

    def run(self, kill_at_rows: Sequence[int]) -> float:
        """Runs to the end, with a kill and a new start at each of these numbers of rows; returns the seconds.

        Raises:
            SystemExit: The command failed without a kill.
        """
        began = time.perf_counter()
        self._fetched_before = self.fetched() if self.fetched else 0
        targets = list(kill_at_rows)
        while not self._start(began, targets[0] if targets else None):
            targets.pop(0)
        return time.perf_counter() - began

    def run_again(self) -> float:
        """Runs the command of a finished run once more; returns the seconds until it finds nothing to do."""
        start = time.perf_counter()
        self._check(self._popen().wait())
        return time.perf_counter() - start

    def rows(self) -> int:
        """Counts the rows of all parts; only new parts are opened."""
        try:
            uris = storage.list_files(self.out, (".parquet",)) if storage.exists(self.out) else []
            for uri in uris:
                if uri not in self._parts:
                    with storage.open_ranged(uri) as file:
                        self._parts[uri] = pq.read_metadata(file).num_rows
        except StorageError:  # a part or the folder was removed meanwhile; the next call sees what is there then
            uris = list(self._parts)
        return sum(self._parts.get(uri, 0) for uri in uris)

    def _start(self, began: float, target: int | None) -> bool:
        """Starts the command and watches it; says whether it ended without a kill."""
        started = time.perf_counter()
        self.starts.append(started - began)
        before = self.rows()
        process = self._popen()
        waiting = self.kills[-1] if self.kills else None
        try:
            while process.poll() is None:
                rows = self.rows()
                memory = ray_memory(process.pid)
                self.samples.append(Sample(time.perf_counter() - began, rows, memory))
                if waiting and waiting.first_rows_s is None and rows > before:
                    waiting.first_rows_s = time.perf_counter() - started
                if target is not None and rows >= target:
                    self._kill(process, began)
                    return False
                threading.Event().wait(_SAMPLE_S)
        except BaseException:  # ctrl-C
            kill_tree(process)
            raise
        self._check(process.returncode)
        if waiting and waiting.first_rows_s is None:
            waiting.first_rows_s = time.perf_counter() - started
        self.samples.append(Sample(time.perf_counter() - began, self.rows(), dict.fromkeys(memory, 0.0)))
        return True

    def _kill(self, process: subprocess.Popen[bytes], began: float) -> None:
        kill_tree(process)
        rows = self.rows()
        again = self.fetched() - self._fetched_before - rows if self.fetched else None
        self.kills.append(Kill(time.perf_counter() - began, rows, again))
        if again is not None:
            self._fetched_before += again

    def _popen(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                self.command,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _check(self, status: int) -> None:
        if status:
            tail = self.log.read_text(errors="replace").splitlines()[-20:]
            print("\n".join(tail), file=sys.stderr)
            raise SystemExit(f"smallcap ended with status {status}; its output is above and in {self.log}.")

    def record(self) -> dict[str, Any]:
        """Returns the samples, kills and starts for JSON."""
        return {
            "starts_s": self.starts,
            "kills": [asdict(kill) for kill in self.kills],
            "samples": [{"seconds": sample.seconds, "rows": sample.rows, **sample.memory} for sample in self.samples],
        }


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kills a driver and the Ray that it started, all at once, and waits until they are gone."""
    pids = tree_of(process.pid)
    for pid in [process.pid, *pids]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(_alive(pid) for pid in pids):
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return ") Z " not in (Path("/proc") / str(pid) / "stat").read_text()
    except OSError:
        return False
