"""Checks what the machine, or the container, gives to a run: cores, memory, open files, room for temporary files."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from smallcap.doctor.report import Finding, attempt, ok, warn
from smallcap.machine.process_memory import available_bytes
from smallcap.phrasing import describe_count, describe_gb

_LEAST_MEMORY = 4 << 30  # Ray, a captioner of the published sizes and two loading tasks
_LEAST_SHARED = 2 << 30  # below it Ray keeps its object store on disk
_LEAST_FILES = 8192  # Ray's own recommendation
_LEAST_TEMPORARY = 1 << 30  # the index that proves a GPU's search takes 0.6 GB
_REMEDY = "Look at /proc and /sys/fs/cgroup; this is a Linux of an unusual kind."


def check_machine(shared: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Looks at cores, memory and limits.

    Args:
        shared: The file system of shared memory.
    """
    yield from attempt(
        "threads", lambda: [check_threads(len(os.sched_getaffinity(0)), cpu_quota(), os.environ)], _REMEDY
    )
    yield from attempt("memory", lambda: [check_memory(available_bytes())], _REMEDY)
    yield from attempt("shared memory", lambda: [check_shared_memory(shared)], "Mount a tmpfs at /dev/shm.")
    yield from attempt("open files", lambda: [check_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE))], _REMEDY)
    remedy = "Name a folder that can be written in the environment variable TMPDIR."
    yield from attempt("temporary files", lambda: [check_temporary_files()], remedy)


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Returns the CPUs whose time a container may use; None without a limit.

    Args:
        root: Folder that holds `sys`.
    """
    folder = root / "sys/fs/cgroup"
    try:
        if (folder / "cpu.max").exists():  # control groups, version 2
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return float(quota) / float(period) if float(quota) > 0 else None
    except (OSError, ValueError):  # "max", or no control groups
        return None


def check_threads(cores: int, quota: float | None, environment: Mapping[str, str]) -> Finding:
    """Compares the threads that libraries will start with the cores.

    Args:
        cores: Cores that this process may run on.
        quota: CPUs whose time it may use; None without a limit.
        environment: The environment variables.
    """
    given = environment.get("OMP_NUM_THREADS", "")
    found = describe_count(cores, "core") + (f", OMP_NUM_THREADS={given}" if given else "")
    first = given.partition(",")[0].strip()  # further numbers are for threads that start threads
    if given and not first.isdecimal():
        return warn("threads", found, f"Set OMP_NUM_THREADS to a number, {cores} at most, or leave it unset.")
    wanted = int(first or 0)
    if quota is not None and quota < cores:
        found += f", of whose time the container may use {quota:g}"
        threads = max(1, int(quota))
        if not given or wanted > threads:
            return warn("threads", found, f"Set OMP_NUM_THREADS={threads}, or raise the container's limit.")
    if given and not 1 <= wanted <= cores:
        return warn("threads", found, f"Set OMP_NUM_THREADS to {cores} at most, or leave it unset.")
    return ok("threads", found)


def check_memory(free_bytes: int) -> Finding:
    """Compares the memory that is free with what a run takes at least."""
    found = f"{describe_gb(free_bytes)} free"
    if free_bytes < _LEAST_MEMORY:
        remedy = f"Free memory, or take a machine that has {describe_gb(_LEAST_MEMORY)} free for Ray and the model."
        return warn("memory", found, remedy)
    return ok("memory", found)


def check_shared_memory(folder: Path) -> Finding:
    """Looks at the file system in which Ray keeps what stages hand to each other."""
    size = shutil.disk_usage(folder).total
    if size < _LEAST_SHARED:
        return warn(
            "shared memory",
            f"{folder} has {describe_gb(size)}; Ray will use the disk instead",
            "Give the container more shared memory (Docker's option shm-size), such as a third of its memory.",
        )
    return ok("shared memory", f"{folder} has {describe_gb(size)}")


def check_open_files(soft: int, hard: int) -> Finding:
    """Looks at how many files and connections a process may have open."""
    unlimited = resource.RLIM_INFINITY
    found = f"{'unlimited' if soft == unlimited else f'{soft:,}'} at once"
    if soft != unlimited and soft < _LEAST_FILES:
        most = _LEAST_FILES if hard == unlimited else min(hard, _LEAST_FILES)
        return warn("open files", found, f"ulimit -n {most}, or raise nofile in /etc/security/limits.conf.")
    return ok("open files", found)


def check_temporary_files() -> Finding:
    """Looks at the folder for temporary files.

    Raises:
        FileNotFoundError: None can be written.
    """
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    found = f"{describe_gb(free)} free in {folder}"
    if free < _LEAST_TEMPORARY:
        return warn("temporary files", found, "Free space there, or name a folder on a larger disk in TMPDIR.")
    return ok("temporary files", found)
