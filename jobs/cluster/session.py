"""Connects a job to Ray: a given cluster, the one this process runs in, or a local one."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ray.data

_LOCAL_CPUS = 4  # logical; on smaller machines a pool of actors and the tasks that feed it must still fit


def connect(address: str | None = None) -> None:
    """Connects to a Ray cluster, once per process.

    Args:
        address: As of `ray.init`; by default RAY_ADDRESS where it is set (as in `ray job submit`), else a local Ray is
            started for this process.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # An actor shares its cores with loading tasks: threads that spin while they wait would take the cores from both.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Ray's C++ side prints its own warnings about Ray Data's actors as errors to the driver's terminal.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # Loading stops when what waits for the actors is a few times what they hold, and not when half of the object store
    # is full: memory stays flat, and a kill costs little that was loaded.
    os.environ.setdefault("RAY_DATA_DOWNSTREAM_CAPACITY_OBJECT_STORE_BUDGET_UTIL_THRESHOLD", "0")
    import ray
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False  # see stage_progress
    context.enable_rich_progress_bars = True
    context.use_ray_tqdm = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # see `jobs.cluster.errors`
    logger = logging.getLogger("ray.data")
    logger.setLevel(logging.CRITICAL)  # an exception of a task reaches the caller, who reports it
    if ray.is_initialized():
        return
    address = address or os.environ.get("RAY_ADDRESS")
    with _quiet_start():
        if address and address != "local":
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            cpus = max(_LOCAL_CPUS, os.cpu_count() or 1)
            ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)


@contextmanager
def _quiet_start() -> Iterator[None]:
    """Holds back what Ray's C++ side prints while it starts (that its log level was set), unless the start fails."""
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as held_back:
        os.dup2(held_back.fileno(), 2)
        try:
            yield
        except BaseException:
            held_back.seek(0)
            os.write(terminal, held_back.read())
            raise
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)


def limit_blocks(dataset: ray.data.Dataset, most_bytes: int) -> None:
    """Has Ray Data end a block of a dataset, and of what is made of it, when it holds so many bytes.

    Never above Ray's own limit. The process's other datasets keep theirs: each has a copy of the settings.
    """
    from ray.data.context import DEFAULT_TARGET_MAX_BLOCK_SIZE

    dataset.context.target_max_block_size = min(most_bytes, DEFAULT_TARGET_MAX_BLOCK_SIZE)


@contextmanager
def stage_progress() -> Iterator[None]:
    """Shows Ray Data's progress by stage to a person at a terminal; a log file does not fill with it."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = sys.stderr.isatty()
    try:
        yield
    finally:
        context.enable_progress_bars = False
