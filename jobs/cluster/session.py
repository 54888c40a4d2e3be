"""Connects a job to Ray: a given cluster, the one this process runs in, or a local one."""

from __future__ import annotations

import gc
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

from smallcap.errors import SmallCapError

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
    context.raise_original_map_exception = True  # see own_errors
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


@contextmanager
def own_errors() -> Iterator[None]:
    """Raises a smallcap error of a task or an actor as itself, without the frames of Ray around it.

    Any other exception passes unchanged, but for the variables in Ray's frames. Either way the failed pipeline's actors
    end, and the next job of this process finds their CPUs free.
    """
    try:
        yield
    except Exception as error:
        _let_go_of_actors(error)
        own = _find_own_error(error)
        if own is None:
            raise
        raise own from None


def _let_go_of_actors(error: BaseException) -> None:
    """Ends the actors that an exception of Ray Data keeps alive, by emptying Ray's frames in its traceback.

    An actor ends when nothing refers to it. The variables of these frames do, as long as someone keeps the exception (a
    notebook or a debugger does), and after that until cycles are collected. The next pipeline, whose actors take all
    CPUs but one, would wait for a CPU to load with.
    """
    seen: set[int] = set()
    left: list[object] = [error]
    while left:
        one = left.pop()
        if not isinstance(one, BaseException) or id(one) in seen:
            continue
        seen.add(id(one))
        for found, _ in traceback.walk_tb(one.__traceback__):
            frame: FrameType | None = found
            while frame is not None and frame.f_globals.get("__name__", "").startswith(("ray.", "threading")):
                with suppress(RuntimeError):  # it is still running
                    frame.clear()
                frame = frame.f_back  # down to the first of the pipeline's thread, which refers to all of it
        left += [getattr(one, "cause", None), one.__cause__, one.__context__]
    gc.collect()


def _find_own_error(error: BaseException | None) -> SmallCapError | None:
    while error is not None:
        cause = getattr(error, "cause", None) or error.__cause__
        if cause is None and isinstance(error, SmallCapError):  # the innermost: Ray's wrappers claim to be one as well
            return error
        error = cause
    return None
