"""A build's staging folder below the index: what the build has finished, and who runs it.

    INDEX/.staging-<fingerprint>/
      owner.json                     the process that builds here, and when it last showed signs of life
      work/                          intermediate files
      results/<stage>/000007.json    the result of a finished work item; written after its files

The folder is named by the fingerprint of everything that decides the outcome. A build that was killed or failed leaves
it behind, and the same command resumes from there. Shards and captions are written to their final place at once: their
names are fingerprints of their contents, and no reader knows them before a manifest names them.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter

from smallcap import storage
from smallcap.errors import ConfigError, ConflictError, SmallCapError, StorageError
from smallcap.images.fetching import fetch_objects

STAGING_PREFIX = ".staging-"
ABANDONED_AFTER = timedelta(days=1)
"""How long the folder of a dead build waits for the same command to resume it."""

_OWNER_FILE = "owner.json"
_HEARTBEAT_S = 30.0
_SILENCE_S = 600.0  # after this time without a sign of life, a build that cannot be looked up counts as dead
_FINGERPRINT_DIGITS = 16
_START_FIELD = 19  # `starttime`, counted from the field after the command's name (proc_pid_stat(5))

_log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


class Staging:
    """The folder of one build, as a context manager; the folder outlasts a block that fails.

    Entering takes over the folder of a dead build with the same fingerprint, and removes the folders of others that
    died more than a day ago. A build is dead when its process is gone, or, where this cannot be looked up, when it has
    not renewed its owner file for ten minutes.

    An error of the options also removes a folder that this call has made, because other options have another folder;
    `keep` ends that.

    Args:
        index_uri: The index.
        fingerprint: The fingerprint of everything that decides the outcome.
    """

    def __init__(self, index_uri: str, fingerprint: str) -> None:
        self._index_uri = index_uri
        self.uri = storage.join(index_uri, f"{STAGING_PREFIX}{fingerprint[:_FINGERPRINT_DIGITS]}")
        self.work_uri = storage.join(self.uri, "work")
        self._is_kept = False
        self._folders = storage.no_empty_folders(index_uri)
        self._stopped = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Staging:
        """Claims the folder; raises `ConflictError` where the same build is running."""
        self._folders.__enter__()
        for uri in staging_folders(self._index_uri):
            if uri != self.uri and is_abandoned(uri, ABANDONED_AFTER):
                _log.info("Removing %s, left by a build that no longer runs.", uri)
                storage.remove(uri)
        self._claim()
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._heart.join()
        try:
            if kind is None or (issubclass(kind, ConfigError) and not self._is_kept):
                storage.remove(self.uri)
            else:
                storage.write_bytes(storage.join(self.uri, _OWNER_FILE), _owner(pid=None))
        except SmallCapError as failure:  # a later build removes the folder; the block's error matters more
            _log.warning("The staging folder %s could not be removed: %s", self.uri, failure)
        finally:
            self._folders.__exit__(kind, error, traceback)

    def keep(self) -> None:
        """Keeps the folder for the next call, whatever error ends this one."""
        self._is_kept = True

    def results(self, stage: str, kind: type[Result]) -> Results[Result]:
        """Returns the recorded results of a stage, which are of type `kind`."""
        return Results(storage.join(self.uri, "results", stage), kind)

    def _claim(self) -> None:
        def claim(found: bytes | None) -> bytes:
            self._is_kept = found is not None
            if found is not None and _is_alive(found):
                raise ConflictError(
                    "The same build is already running.",
                    where=self.uri,
                    found=found.decode(errors="replace"),
                    remedy="Wait for it, or stop it. A build that died with its machine or container is taken over "
                    "after ten minutes.",
                )
            return _owner(os.getpid())

        storage.update_bytes(storage.join(self.uri, _OWNER_FILE), claim)

    def _beat(self) -> None:
        while not self._stopped.wait(_HEARTBEAT_S):
            try:
                storage.write_bytes(storage.join(self.uri, _OWNER_FILE), _owner(os.getpid()))
            except StorageError as error:  # a longer outage makes the build's writes fail
                _log.warning("Cannot renew %s: %s", self.uri, error)


def _owner(pid: int | None) -> bytes:
    """Returns an owner file's content; `pid` is None when the build has ended."""
    process = None if pid is None else _identity(pid)
    owner = {"host": socket.gethostname(), "pid": pid, "process": process, "alive_at": time.time()}
    return json.dumps(owner).encode()


def _is_alive(owner: bytes) -> bool:
    """Says whether the build that wrote an owner file lives.

    A process number proves nothing: containers have few and begin with the same ones, and two machines may have one
    name. Only a number together with the process's start and its machine's does. Where this process cannot look it up,
    the last sign of life decides; one that lies in the future was given by a clock that is wrong.
    """
    try:
        values: dict[str, Any] = json.loads(owner)
        pid, silent_s = values["pid"], abs(time.time() - float(values["alive_at"]))
    except (ValueError, TypeError, KeyError):
        return False
    if pid is None:
        return False
    process, own = values.get("process"), _identity(os.getpid())
    if process and own and process[:2] == own[:2]:
        return _identity(int(pid)) == process
    return silent_s < _SILENCE_S


def _identity(pid: int) -> list[str] | None:
    """Returns what names a process of this machine for ever: the boot, the namespace of its number, and its start.

    None where there is no such process, or the system does not say.
    """
    proc = Path("/proc")
    try:
        boot = (proc / "sys/kernel/random/boot_id").read_text().strip()
        started = (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()[_START_FIELD]
        return [boot, str((proc / "self/ns/pid").readlink()), started]
    except (OSError, IndexError):
        return None


def staging_folders(index_uri: str) -> list[str]:
    """Returns the staging folders below an index."""
    if not storage.exists(index_uri):
        return []
    return [uri for uri in storage.list_folder(index_uri) if uri.rsplit("/", 1)[-1].startswith(STAGING_PREFIX)]


def is_abandoned(staging_uri: str, after: timedelta) -> bool:
    """Returns whether a staging folder's build has been dead for at least the given time."""
    try:
        owner = storage.read_bytes(storage.join(staging_uri, _OWNER_FILE))
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return True  # a live build writes its owner file first
        raise
    if _is_alive(owner):
        return False
    with suppress(ValueError, TypeError, KeyError):
        return time.time() - float(json.loads(owner)["alive_at"]) >= after.total_seconds()
    return True


@dataclass(frozen=True)
class Results(Generic[Result]):
    """The results of a stage's work items, one small JSON file each; an item is finished once its file exists."""

    uri: str
    kind: type[Result]

    def load(self) -> dict[int, Result]:
        """Returns the results of the finished items, by position."""
        if not storage.exists(self.uri):
            return {}
        files = storage.list_files(self.uri, (".json",))
        adapter = TypeAdapter(self.kind)
        contents = fetch_objects(files).data
        return {
            _position(file): adapter.validate_json(content)
            for file, content in zip(files, contents, strict=True)
            if isinstance(content, bytes)
        }

    def save(self, position: int, result: Result) -> None:
        """Records one item's result."""
        data = TypeAdapter(self.kind).dump_json(result)
        storage.write_bytes(storage.join(self.uri, f"{position:06d}.json"), data)


def _position(file: str) -> int:
    return int(file.rsplit("/", 1)[-1].removesuffix(".json"))


Run = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[tuple[int, Any]]]
"""Runs a function over items and yields (position, result) in the order of finishing; see `TaskRunner.run_tasks`."""


def run_recorded(
    results: Results[Result], function: Callable[[Item], Result], items: Sequence[Item], run: Run
) -> Iterator[tuple[int, Result]]:
    """Runs the items that have no result yet; yields (position, result) of all, the recorded ones first."""
    done = {position: result for position, result in results.load().items() if position < len(items)}
    yield from done.items()
    left = [(position, item) for position, item in enumerate(items) if position not in done]
    if left:
        for number, result in run(partial(_run_and_record, function, results), left):
            yield left[number][0], result


def _run_and_record(function: Callable[[Item], Result], results: Results[Result], numbered: tuple[int, Item]) -> Result:
    position, item = numbered
    result = function(item)
    results.save(position, result)
    return result
