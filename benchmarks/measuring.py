"""Measures for the benchmarks: steps in separate processes, the memory of a process tree, and queries/s.

It imports only the standard library and numpy, because interpreters without smallcap run it as well.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

_SAMPLE_S = 0.2
_ROUNDS = 3
_MB = 1e6
_ROOT = Path(__file__).resolve().parents[1]
_FIELDS = ("VmRSS", "RssAnon", "RssShmem")


@dataclass
class PeakMemory:
    """The most memory, in bytes, that a tree of processes had at once; it is sampled, so short peaks are missed.

    `own` counts what a process allocated, or shares through Ray's object store. `resident` includes mapped files, which
    the kernel drops when it needs space.
    """

    largest_own: int = 0
    sum_own: int = 0
    largest_resident: int = 0

    def add(self, processes: Iterable[dict[str, int]]) -> None:
        """Adds one sample: `_FIELDS` of each process, in bytes."""
        own, resident = [0], [0]
        for values in processes:
            own.append(values["RssAnon"] + values["RssShmem"])
            resident.append(values["VmRSS"])
        self.largest_own = max(self.largest_own, *own)
        self.sum_own = max(self.sum_own, sum(own))
        self.largest_resident = max(self.largest_resident, *resident)


def environment() -> dict[str, str]:
    """Returns the environment of a process that runs this checkout."""
    return {**os.environ, "PYTHONPATH": str(_ROOT), "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}


def say(text: str) -> None:
    """Prints to stderr what a benchmark does next; stdout is for results."""
    print(text, file=sys.stderr, flush=True)


def smallcap(*arguments: str) -> float:
    """Runs a command of smallcap; returns its wall time in seconds."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "jobs.cli", *arguments], env=environment(), stdout=sys.stderr, check=True)
    return time.perf_counter() - started


def run_watched(
    step: str,
    arguments: Mapping[str, Any],
    cores: int,
    python: str = sys.executable,
    env: Mapping[str, str] | None = None,
) -> tuple[Any, PeakMemory]:
    """Calls a function in a separate process, on a number of cores.

    Args:
        step: The function, as `module:function`.
        arguments: Its keyword arguments, as JSON.
        cores: The number of cores it may use.
        python: The interpreter.
        env: Environment variables to add.

    Returns:
        What the function returned, as JSON, and the peak memory of its process tree; zeros where there is no /proc.

    Raises:
        subprocess.CalledProcessError: The function failed; its messages are on stderr.
    """
    peak = PeakMemory()
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        call = "from benchmarks.measuring import call_step; call_step()"
        command = [python, "-c", call, step, json.dumps(arguments), str(answer)]
        process = subprocess.Popen(
            command,
            env={**environment(), **(env or {})},
            stdout=sys.stderr,
            preexec_fn=lambda: _use_cores(cores),  # noqa: PLW1509 - this process's threads hold no locks that it needs
        )
        stopped = threading.Event()
        watcher = threading.Thread(target=_watch, args=(process.pid, peak, stopped))
        watcher.start()
        try:
            status = process.wait()
        except BaseException:
            process.terminate()  # on ctrl-C: Ray ends with its driver
            raise
        finally:
            stopped.set()
            watcher.join()
        if status:
            raise subprocess.CalledProcessError(status, command)
        return json.loads(answer.read_bytes()), peak


def call_step() -> None:
    """Calls the function that `run_watched` names on the command line, and writes what it returns."""
    step, arguments, answer = sys.argv[1:]
    module, _, function = step.partition(":")
    returned = getattr(import_module(module), function)(**json.loads(arguments))
    Path(answer).write_text(json.dumps(returned))


def _use_cores(count: int) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def _watch(pid: int, peak: PeakMemory, stopped: threading.Event) -> None:
    while not stopped.wait(_SAMPLE_S):
        peak.add(_memory_of_tree(pid).values())


def _memory_of_tree(root: int) -> dict[int, dict[str, int]]:
    """Returns `_FIELDS` in bytes, by process id, for a process and all its descendants."""
    fields: dict[int, dict[str, int]] = {}
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            lines = (folder / "status").read_text().splitlines()
        except OSError:  # the process has ended meanwhile
            continue
        values = dict(line.split(":", 1) for line in lines if ":" in line)
        pid = int(folder.name)
        parents[pid] = int(values["PPid"])
        fields[pid] = {name: int(values.get(name, "0").split()[0]) << 10 for name in _FIELDS}

    def descends(pid: int) -> bool:
        while pid > 1 and pid != root:
            pid = parents.get(pid, 0)
        return pid == root

    return {pid: values for pid, values in fields.items() if descends(pid)}


def ray_memory(driver: int) -> dict[str, float]:
    """Returns the memory of a driver and of the Ray that it started, in MB; zeros if the driver has ended.

    `driver_resident` includes mapped files and shared pages. `driver_own`, `workers_own` and `daemons_own` (Ray's own
    processes) are what they allocated. `object_store` is the pages of the store that were ever written: it reuses them,
    but gives none back.
    """
    sizes = dict.fromkeys(("driver_resident", "driver_own", "workers_own", "daemons_own", "object_store"), 0)
    store: dict[tuple[int, int], int] = {}
    for pid, values in _memory_of_tree(driver).items():
        if pid == driver:
            kind, sizes["driver_resident"] = "driver_own", values["VmRSS"]
        else:
            kind = "workers_own" if _command(pid).startswith("ray::") else "daemons_own"
        sizes[kind] += values["RssAnon"]
        if kind == "daemons_own":
            store.update(_object_store_files(pid))
    sizes["object_store"] = sum(store.values())
    return {kind: size / _MB for kind, size in sizes.items()}


def _command(pid: int) -> str:
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def _object_store_files(pid: int) -> dict[tuple[int, int], int]:
    """Returns the allocated bytes, by device and inode, of the store's nameless files that a process has open."""
    files = {}
    try:
        for link in (Path("/proc") / str(pid) / "fd").iterdir():
            if str(link.readlink()).startswith("/dev/shm/plasma"):
                status = link.stat()
                files[status.st_dev, status.st_ino] = status.st_blocks * 512
    except OSError:  # the process has ended meanwhile, or closed the file
        pass
    return files


def tree_of(root: int) -> list[int]:
    """Returns the ids of a process and of all its descendants."""
    return list(_memory_of_tree(root))


def queries_per_s(
    search: Callable[[np.ndarray], object], queries: np.ndarray, batch_sizes: Sequence[int], seconds: float
) -> dict[int, float]:
    """Returns the rate of a search by batch size: the fastest of several rounds, each with other queries.

    Args:
        search: Takes [B, dim] float32.
        queries: [Q, dim] float32, with Q at least the largest batch size.
        batch_sizes: Numbers of queries that are searched at once.
        seconds: The least duration of a round.
    """
    rates = {}
    for size in batch_sizes:
        batches = [queries[start : start + size] for start in range(0, len(queries) - size + 1, size)]
        search(batches[-1])  # once unmeasured: maps pages, starts threads
        number, best = 0, 0.0
        for _ in range(_ROUNDS):
            start, done = time.perf_counter(), 0
            while done == 0 or time.perf_counter() - start < seconds:
                search(batches[number % len(batches)])
                number, done = number + 1, done + 1
            best = max(best, done * size / (time.perf_counter() - start))
        rates[size] = best
    return rates
