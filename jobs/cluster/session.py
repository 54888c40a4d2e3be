"""Connects a job to Ray: to a given cluster, to the one this process runs in or that runs here, or to a local one."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from jobs.cluster import memory_kills
from jobs.cluster.addresses import (
    Address,
    NoClusterError,
    ask_head,
    find_running,
    parse_address,
    reach,
    wanted_address,
)
from jobs.cluster.liveness import watch_ray
from jobs.cluster.own_packages import worker_environment
from jobs.cluster.ray_colleagues import ray_colleagues
from jobs.cluster.start_errors import explain_join, explain_start
from jobs.cluster.tokens import check_token_for_cluster, make_token_for_local_ray
from jobs.screen import note, write_at
from smallcap.errors import SmallCapError
from smallcap.phrasing import describe_duration

if TYPE_CHECKING:
    import ray.data

_LOCAL_CPUS = 4  # at least; a pool of actors and the tasks that feed it must fit on small machines as well
# How long Ray's client of a head (GCS) tries: twice the first, and the second. By default that is 40 s.
_HEAD_TIMEOUTS = {"RAY_gcs_rpc_server_connect_timeout_s": "2", "RAY_py_gcs_connect_timeout_s": "4"}
# For usage statistics, which are off, for an autoscaler, which one machine lacks, and for logs, which stay in files.
_NEEDLESS = ("start_api_server", "start_monitor", "start_log_monitor")
_SILENCE_S = 5.0  # before a line says what takes long; the next ones come after the double of it


@contextmanager
def on_ray(address: str | None, kept: Callable[[], str]) -> Iterator[None]:
    """Connects to Ray, and watches it while the block runs; its death ends the process with a message, exit code 1.

    Args:
        address: See `connect`.
        kept: Returns in a sentence what of the job's work is kept, for that message.

    Raises:
        RunError: See `connect`; or Ray has died.
    """
    connect(address)
    with watch_ray(kept), ray_colleagues().hear():
        yield


def connect(address: str | None = None) -> None:
    """Connects to a Ray cluster, once per process.

    Args:
        address: Host and port of a cluster's head; `auto` for the one that runs on this machine, `local` for a new one
            that ends with this process. By default it is RAY_ADDRESS (set in `ray job submit`), else the Ray that
            `ray start` has started on this machine, else a new local one.

    Raises:
        ConfigError: The address is none.
        RunError: The cluster does not answer, or refuses this process; or a local Ray does not start.
    """
    _make_settings()
    import ray
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False  # jobs show their own progress
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # see `jobs.cluster.errors`
    logger = logging.getLogger("ray.data")
    logger.setLevel(logging.CRITICAL)  # an exception of a task reaches the caller, which reports it
    # The pinned release has no other way to name resources that it does not count, or the tries of a task.
    warnings.filterwarnings("ignore", "`ray_remote_args", DeprecationWarning)
    warnings.filterwarnings("ignore", "The minimum number of concurrent actors", UserWarning)  # of few images
    if ray.is_initialized():
        return
    cluster = _find_cluster(address)
    with _quiet_start(f"Connecting to Ray at {cluster.text}" if cluster else "Starting Ray") as printed:
        try:
            if cluster:
                _join(cluster)
            else:
                _start()
        except SmallCapError:
            raise
        except Exception as error:
            raise (explain_join(error, cluster, printed()) if cluster else explain_start(error, printed())) from error
    if cluster and cluster.was_found:
        note(
            f"Joined the Ray cluster at {cluster.text}, which already runs on this machine; "
            "--address local starts one for this job alone."
        )


def _make_settings() -> None:
    """Makes the settings that Ray reads when it is imported, and those that its processes inherit."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # An actor shares its cores with loading tasks: threads that spin while they wait would slow down both.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Ray's C++ side prints warnings about Ray Data's actors as errors to the driver's terminal.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # An error that ends a job is told in one message; Ray would print those of the tasks that end with it besides.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    # Loading pauses when the images that wait for the actors are a few times those that the actors hold, not only when
    # half of the object store is full: memory stays flat, and a kill costs few loaded images.
    os.environ.setdefault("RAY_DATA_DOWNSTREAM_CAPACITY_OBJECT_STORE_BUDGET_UTIL_THRESHOLD", "0")
    # The process that writes imports for seconds. Ray would end it after one idle second, and start it for each part.
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "60000")
    for name, value in (_HEAD_TIMEOUTS | memory_kills.SETTINGS).items():
        os.environ.setdefault(name, value)


def _find_cluster(address: str | None) -> Address | None:
    """Returns the cluster to join, where something listens; None where a local Ray is to be started."""
    text, named_by = wanted_address(address)
    if text == "local":
        return None
    if text not in ("", "auto"):
        cluster = parse_address(text, named_by)
        reach(cluster)
        return cluster
    with _quiet_start("Looking for the Ray that runs on this machine"):
        running = find_running(by_process=text == "auto")
    if running is None and text == "auto":
        raise NoClusterError(
            "No Ray cluster runs on this machine.",
            where=f"{named_by} auto",
            remedy="Start one (ray start --head), give the address of another, or --address local for a new local Ray.",
        )
    return running


def _join(cluster: Address) -> None:
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    if cluster.was_found:  # only then does Ray take a token unasked: this machine's Ray is not a stranger
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    check_token_for_cluster()
    if not cluster.is_client:
        ask_head(cluster)
    _init(address=cluster.text)


def _start() -> None:

    for name, seconds in _HEAD_TIMEOUTS.items():  # which this process has read; its Ray keeps Ray's own
        if os.environ.get(name) == seconds:
            del os.environ[name]
    make_token_for_local_ray()
    options = {"address": "local", "num_cpus": max(_LOCAL_CPUS, os.cpu_count() or 1), "include_dashboard": False}
    with _few_processes():
        try:
            _init(**options)
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
            # Ray gives its processes 30 s, which a busy machine may need to read their files; these are in memory now.
            _init(**options)


@contextmanager
def _few_processes() -> Iterator[None]:
    """Ray starts without processes that serve nobody here, for which it would wait: it has no option for that."""
    from ray._private.node import Node

    kept = {name: getattr(Node, name) for name in _NEEDLESS}
    for name in kept:
        setattr(Node, name, lambda node, **options: None)
    try:
        yield
    finally:
        for name, method in kept.items():
            setattr(Node, name, method)


def _init(**options: Any) -> None:
    import ray

    memory_kills.tell_kills_once()  # the thread that hears of them starts with the connection
    ray.init(**options, log_to_driver=False, logging_level=logging.ERROR, runtime_env=worker_environment())


@contextmanager
def _quiet_start(doing: str) -> Iterator[Callable[[], str]]:
    """Holds back what Ray prints while it starts (that its log level was set); says what goes on if it takes long.

    Yields:
        A function that returns what was held back.
    """
    sys.stderr.flush()
    terminal = os.dup(2)
    ended = threading.Event()
    speaker = threading.Thread(target=_speak, args=(doing, terminal, ended), daemon=True)
    with tempfile.TemporaryFile() as held_back:
        os.dup2(held_back.fileno(), 2)
        speaker.start()
        try:
            yield lambda: os.pread(held_back.fileno(), 1 << 20, 0).decode(errors="replace")
        finally:
            ended.set()
            speaker.join()
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)


def _speak(doing: str, terminal: int, ended: threading.Event) -> None:
    waited, pause = 0.0, _SILENCE_S
    while not ended.wait(pause):
        waited += pause
        more = f" ({describe_duration(waited)})" if waited > _SILENCE_S else ""
        write_at(terminal, f"{doing} …{more}", is_news=True)
        pause = 2 * _SILENCE_S


def limit_blocks(dataset: ray.data.Dataset, most_bytes: int) -> None:
    """Limits the size of blocks in a dataset, and in datasets made from it, to `most_bytes` and to Ray's limit.

    Other datasets of the process keep their limits: each has a copy of the settings.
    """
    from ray.data.context import DEFAULT_TARGET_MAX_BLOCK_SIZE

    dataset.context.target_max_block_size = min(most_bytes, DEFAULT_TARGET_MAX_BLOCK_SIZE)
