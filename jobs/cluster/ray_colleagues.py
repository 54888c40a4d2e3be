"""Lets the processes of a job on Ray share values, and brings what they tell to the driver's terminal.

Ray's head keeps both, as texts by name, for as long as the job runs: no actor is needed, and a worker of any stage
reaches it. Without Ray, and where the head does not answer, values stay in the process, and lines go to its stderr.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from jobs.screen import tell
from smallcap.colleagues import Colleagues, colleagues, work_with
from smallcap.storage_faults import this_node

_NAMESPACE = b"smallcap"
_LOOK_EVERY_S = 2.0


class RayColleagues(Colleagues):
    """Those of a process that may be a worker, or the driver once `hear` is called."""

    def __init__(self) -> None:
        super().__init__()
        self._is_driver = False

    def share(self, name: str, value: str) -> None:
        """Lets other processes of the job know a value."""
        super().share(name, value)
        _keep(f"shared/{name}", value)

    def recall(self, name: str) -> str | None:
        """Returns a value that this process or another one has shared."""
        return super().recall(name) or _kept(f"shared/{name}")

    def tell(self, topic: str, line: str) -> None:
        """Prints the line, in a worker to its own log, and there leaves it for the driver to print as well."""
        tell(line)
        if not self._is_driver:
            _keep(f"told/{topic} on {this_node()}", line)

    @contextmanager
    def hear(self) -> Iterator[None]:
        """Makes this process the driver: what it has shared reaches its workers, and it prints what they tell."""
        for name, value in self._shared.items():
            _keep(f"shared/{name}", value)
        heard: dict[str, str] = {}
        ended = threading.Event()

        def listen() -> None:
            while not ended.wait(_LOOK_EVERY_S):
                _print_new(heard)

        listener = threading.Thread(target=listen, name="hears workers", daemon=True)
        was_driver, self._is_driver = self._is_driver, True
        listener.start()
        try:
            yield
        finally:
            ended.set()
            listener.join()
            _print_new(heard)
            _forget()
            self._is_driver = was_driver


def ray_colleagues() -> RayColleagues:
    """Returns those of this process."""
    mine = colleagues()
    assert isinstance(mine, RayColleagues), "the package has set them"
    return mine


def join_colleagues() -> None:
    """Makes this process one whose colleagues are on Ray; for the import of this package, in drivers and workers."""
    work_with(RayColleagues())


def _print_new(heard: dict[str, str]) -> None:
    for name in _names("told/"):
        line = _kept(name)
        if line is not None and heard.get(name) != line:
            heard[name] = line
            tell(line)


def _store() -> tuple[Any, str] | None:
    """Returns Ray's store of texts, and what the names of this job begin with; None without Ray."""
    ray = sys.modules.get("ray")
    if ray is None or not getattr(ray, "is_initialized", bool)():
        return None
    from ray.experimental import internal_kv

    return internal_kv, f"{ray.get_runtime_context().get_job_id()}/"


def _keep(name: str, text: str) -> None:
    with suppress(Exception):  # whatever Ray raises without a head: nothing depends on it
        if (found := _store()) is not None:
            store, job = found
            store._internal_kv_put(f"{job}{name}".encode(), text.encode(), overwrite=True, namespace=_NAMESPACE)


def _kept(name: str) -> str | None:
    with suppress(Exception):
        if (found := _store()) is not None:
            store, job = found
            value = store._internal_kv_get(f"{job}{name}".encode(), namespace=_NAMESPACE)
            return None if value is None else str(value, "utf-8")
    return None


def _names(start: str) -> list[str]:
    with suppress(Exception):
        if (found := _store()) is not None:
            store, job = found
            names = store._internal_kv_list(f"{job}{start}".encode(), namespace=_NAMESPACE)
            return sorted(name.decode().removeprefix(job) for name in names)
    return []


def _forget() -> None:
    with suppress(Exception):
        if (found := _store()) is not None:
            store, job = found
            store._internal_kv_del(job.encode(), del_by_prefix=True, namespace=_NAMESPACE)
