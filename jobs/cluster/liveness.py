"""Watches the Ray that a job runs on. Where its head or this machine's raylet dies, the job says so and ends.

When the head (GCS) is lost, Ray's C++ side ends the driver after a minute by `std::_Exit`: no exception arrives, and
nothing is printed. So a small thread looks whether something still listens where the head and the raylet did.
"""

from __future__ import annotations

import errno
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NoReturn

from jobs.cluster.addresses import within
from jobs.cluster.resources import living_nodes
from jobs.cluster.start_errors import newest_logs
from jobs.screen import VisibleConsole, say_failure, tell
from smallcap.errors import RunError
from smallcap.phrasing import describe_duration

_DIAL_S = 3.0
_KEPT_S = 5.0  # to find out what is written
_RAY_WAITS = "RAY_gcs_rpc_server_reconnect_timeout_s"
_RAY_WAITS_S = 60.0  # for a head that comes back, before Ray's C++ side ends the process
_PATIENCE, _EVERY = 0.6, 1 / 12  # of that time: how long this waits, and how often it looks; the rest is for being late
_UNREACHABLE = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN)


@dataclass(frozen=True)
class Listener:
    """Where a process of Ray listens.

    Args:
        name: How people know it.
        at: Host and port, or the path of a Unix socket.
        patience_s: How long it may be silent; a head may be started again.
    """

    name: str
    at: tuple[str, int] | str
    patience_s: float = 0.0

    def ask(self) -> str:
        """Returns why nothing listens there any more; empty where something does, or where that cannot be told."""
        try:
            self.connect().close()
        except (ConnectionRefusedError, FileNotFoundError):
            return "nothing listens there any more"
        except TimeoutError:
            return "it does not answer any more"
        except OSError as error:  # it may be one of this process, which has too many files open
            return "it cannot be reached any more" if error.errno in _UNREACHABLE else ""
        return ""

    def connect(self) -> socket.socket:
        """Connects; raises OSError."""
        if isinstance(self.at, tuple):
            return socket.create_connection(self.at, timeout=_DIAL_S)
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.settimeout(_DIAL_S)
            connection.connect(self.at)
        except OSError:
            connection.close()
            raise
        return connection


def ray_listeners() -> list[Listener]:
    """Returns where the head and this machine's raylet of the connected cluster listen; none for a Ray Client.

    A place that does not answer now is left out: this process cannot tell whether it lives.
    """
    import ray

    if ray.util.client.ray.is_connected():
        return []
    context = ray.get_runtime_context()
    node = living_nodes().get(context.get_node_id())
    if node is None:
        return []
    host, _, port = context.gcs_address.rpartition(":")
    patience_s = _PATIENCE * _ray_waits_s()
    places = [
        Listener(f"the head (GCS) at {context.gcs_address}", (host.strip("[]"), int(port)), patience_s),
        Listener("the raylet of this machine", node["RayletSocketName"]),
    ]
    return [place for place in places if not place.ask()]


def _ray_waits_s() -> float:
    with suppress(ValueError):
        return float(os.environ.get(_RAY_WAITS, ""))
    return _RAY_WAITS_S


def leave(error: RunError) -> NoReturn:
    """Says why, and ends the process: its main thread may wait for Ray for good."""
    with suppress(Exception, SystemExit):  # nobody may read it, and the process ends in any case
        sys.stdout.flush()
        console = VisibleConsole(sys.stderr)
        if console.is_terminal:
            console.show_cursor()  # a live display hides it
            console.line()
        tell(f"error: {error}")
        say_failure(error, 1)
    os._exit(1)


class RayWatch:
    """Looks at places of Ray, and finds that one is silent for too long.

    Args:
        places: Where Ray listens.
        kept: Returns in a sentence what of the job's work is kept.
        on_death: Called in the watch's thread with what to say.
        every_s: Seconds between two looks. The end of a process on this machine is noticed at once.
    """

    def __init__(
        self,
        places: Sequence[Listener],
        kept: Callable[[], str],
        on_death: Callable[[RunError], object],
        every_s: float,
    ) -> None:
        self._places, self._kept, self._on_death, self._every_s = places, kept, on_death, every_s

    def look(self) -> RunError | None:
        """Returns what to say if a place is silent now, however short; None where Ray lives."""
        silent = ((place, place.ask()) for place in self._places)
        return next((self._error(place, why) for place, why in silent if why), None)

    @contextmanager
    def in_thread(self) -> Iterator[None]:
        """Watches while the block runs."""
        ended, end = socket.socketpair()
        thread = threading.Thread(target=self._watch, args=(ended,), name="ray-watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            end.close()
            thread.join()
            ended.close()

    def _watch(self, ended: socket.socket) -> None:
        silent_since: dict[str, float] = {}
        with selectors.DefaultSelector() as selector:
            selector.register(ended, selectors.EVENT_READ)
            held = self._hold(selector)
            while True:
                ready = [key.fileobj for key, _ in selector.select(self._every_s)]
                if ended in ready:
                    break
                for place in self._places:
                    why = place.ask()
                    if not why:
                        silent_since.pop(place.name, None)
                        continue
                    now = time.monotonic()
                    silent_s = now - silent_since.setdefault(place.name, now)
                    if silent_s >= place.patience_s:
                        self._on_death(self._error(place, why, silent_s))
                        return
                for connection in ready:  # closed by a process that lives
                    selector.unregister(connection)
        for connection in held:
            connection.close()

    def _hold(self, selector: selectors.BaseSelector) -> list[socket.socket]:
        """Keeps a connection to each place on this machine: its end is the end of a process."""
        held = []
        for place in self._places:
            if isinstance(place.at, str):
                with suppress(OSError):
                    held.append(place.connect())
                    selector.register(held[-1], selectors.EVENT_READ)
        return held

    def _error(self, place: Listener, why: str, silent_s: float = 0.0) -> RunError:
        try:
            kept = within(_KEPT_S, self._kept)
        except Exception:  # noqa: BLE001 - the storage may be lost as well, and Ray's death is the news
            kept = "What was written before is kept."
        return RunError(
            "Ray has stopped, and this job with it.",
            where=place.name,
            found=f"{why}, for {describe_duration(silent_s)} by now" if silent_s > 1 else why,
            remedy=f"{kept} When Ray runs again, the same command goes on. Why Ray has stopped is in its logs, on this "
            f"machine in {newest_logs()}.",
        )


@contextmanager
def watch_ray(kept: Callable[[], str]) -> Iterator[None]:
    """Watches the connected Ray while the block runs; its death ends the process with a message and exit code 1.

    Args:
        kept: Returns in a sentence what of the job's work is kept.

    Raises:
        RunError: An exception of the block has come with Ray's death.
    """
    watch = RayWatch(ray_listeners(), kept, leave, _EVERY * _ray_waits_s())
    with watch.in_thread():
        try:
            yield
        except Exception as error:
            lost = watch.look()
            if lost is None:
                raise
            raise lost from error
