"""Connects a job to Ray: to a given cluster, to the one this process runs in, or to a local one."""

from __future__ import annotations

import logging
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from smallcap.errors import RunError

if TYPE_CHECKING:
    import ray.data

_LOCAL_CPUS = 4  # at least; a pool of actors and the tasks that feed it must fit on small machines as well


def connect(address: str | None = None) -> None:
    """Connects to a Ray cluster, once per process.

    Args:
        address: An address for `ray.init`; by default RAY_ADDRESS where it is set (as in `ray job submit`), or else a
            local Ray that starts for this process.

    Raises:
        RunError: The cluster does not answer, or refuses this process.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # An actor shares its cores with loading tasks: threads that spin while they wait would slow down both.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Ray's C++ side prints warnings about Ray Data's actors as errors to the driver's terminal.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # Loading pauses when the images that wait for the actors are a few times those that the actors hold, not only when
    # half of the object store is full: memory stays flat, and a kill costs few loaded images.
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
    logger.setLevel(logging.CRITICAL)  # an exception of a task reaches the caller, which reports it
    if ray.is_initialized():
        return
    address = address or os.environ.get("RAY_ADDRESS")
    with _quiet_start():
        if address and address != "local":
            _join(address)
        else:
            if not os.access(Path.home(), os.W_OK) and "RAY_AUTH_TOKEN_PATH" not in os.environ:
                os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # Ray would write one to ~/.ray
            cpus = max(_LOCAL_CPUS, os.cpu_count() or 1)
            ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)


def _join(address: str) -> None:
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ray.exceptions.AuthenticationError) as error:
        raise RunError(
            "This process cannot join the Ray cluster.",
            where=address,
            expected="a cluster that answers, with this environment's versions of Ray and Python",
            found=str(error),
            remedy="If the cluster asks for a token, set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the token (or keep "
            "it in ~/.ray/auth_token). Otherwise check the address and the versions there.",
        ) from error


@contextmanager
def _quiet_start() -> Iterator[None]:
    """Hides what Ray's C++ side prints while it starts (that its log level was set), unless the start fails."""
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
    """Limits the size of blocks in a dataset, and in datasets made from it, to `most_bytes` and to Ray's limit.

    Other datasets of the process keep their limits: each has a copy of the settings.
    """
    from ray.data.context import DEFAULT_TARGET_MAX_BLOCK_SIZE

    dataset.context.target_max_block_size = min(most_bytes, DEFAULT_TARGET_MAX_BLOCK_SIZE)


@contextmanager
def stage_progress() -> Iterator[None]:
    """Shows Ray Data's progress by stage at a terminal, and not in a log file."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = sys.stderr.isatty()
    try:
        yield
    finally:
        context.enable_progress_bars = False
