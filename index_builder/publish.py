"""Staging and publishing: data first, the marker last.

    INDEX/.staging-<build>/
      owner.json   who builds here, and when it last showed signs of life
      work/        intermediate files
      version/     becomes INDEX/versions/<index_id>/

On a local disk a version appears by one rename. On an object store its files are copied and `manifest.json` is written
last: a version without one does not exist. Readers follow the pointer, which is switched after that.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from types import TracebackType
from typing import Any

from smallcap import storage
from smallcap.errors import ManifestError, SmallCapError, StorageError
from smallcap.index_manifest import (
    MANIFEST_FILE,
    IndexManifest,
    load_manifest,
    load_pointer,
    version_uri,
    write_pointer,
)

_STAGING_PREFIX = ".staging-"
_OWNER_FILE = "owner.json"
_HEARTBEAT_S = 30.0
_SILENCE_S = 600.0  # after which a build on another machine counts as dead

_log = logging.getLogger(__name__)


class Staging:
    """A build's own folder below the index, from `with` to the end of its block.

    Entering removes what dead builds have left. A build is dead when its process is gone, or, on another machine, when
    it has not renewed its owner file for ten minutes.
    """

    def __init__(self, index_uri: str) -> None:
        self._index_uri = index_uri
        self.uri = storage.join(index_uri, f"{_STAGING_PREFIX}{uuid.uuid4().hex[:12]}")
        self.work_uri = storage.join(self.uri, "work")
        self.version_uri = storage.join(self.uri, "version")
        self._stopped = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Staging:
        remove_dead_staging(self._index_uri)
        self._show_life()
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._heart.join()
        try:
            storage.remove(self.uri)
        except SmallCapError as failure:  # the next build removes it; the block's own error matters more
            _log.warning("The staging folder %s stays behind: %s", self.uri, failure)

    def _beat(self) -> None:
        while not self._stopped.wait(_HEARTBEAT_S):
            try:
                self._show_life()
            except StorageError as error:  # a longer outage fails the build's own writes
                _log.warning("Cannot renew %s: %s", self.uri, error)

    def _show_life(self) -> None:
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "alive_at": time.time()}
        storage.write_bytes(storage.join(self.uri, _OWNER_FILE), json.dumps(owner).encode())


def remove_dead_staging(index_uri: str) -> None:
    """Removes the staging folders of builds that no longer run."""
    fs, path = storage.filesystem(index_uri)
    if not storage.exists(index_uri):
        return
    for entry in fs.ls(path, detail=False):
        name = entry.rstrip("/").rsplit("/", 1)[-1]
        uri = storage.join(index_uri, name)
        if name.startswith(_STAGING_PREFIX) and not _is_alive(uri):
            _log.info("Removing %s, left by a build that no longer runs.", uri)
            storage.remove(uri)


def _is_alive(staging_uri: str) -> bool:
    try:
        owner: dict[str, Any] = json.loads(storage.read_bytes(storage.join(staging_uri, _OWNER_FILE)))
        host, pid, alive_at = str(owner["host"]), int(owner["pid"]), float(owner["alive_at"])
    except (StorageError, ValueError, TypeError, KeyError):
        return False  # the owner file is the first thing that a live build writes
    if host != socket.gethostname():
        return time.time() - alive_at < _SILENCE_S
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's process
        return True
    return True


def load_current(index_uri: str) -> IndexManifest | None:
    """Returns the current version's manifest; `None` where nothing is published yet.

    Raises:
        ManifestError: The pointer or the manifest is malformed, or newer than this release.
    """
    try:
        index_id = load_pointer(index_uri)
    except ManifestError as error:
        if isinstance(error.__cause__, StorageError):
            return None
        raise
    return load_manifest(index_uri, index_id)


def publish_version(index_uri: str, staging: Staging, manifest: IndexManifest) -> None:
    """Publishes a staged version and makes it the current one; a version that exists already is left as it is."""
    if not _is_published(index_uri, manifest.index_id):
        target = version_uri(index_uri, manifest.index_id)
        storage.remove(target)  # what a build that died while copying may have left
        data = manifest.to_json().encode()
        if storage.is_local(index_uri):
            storage.write_bytes(storage.join(staging.version_uri, MANIFEST_FILE), data)
            storage.move_folder(staging.version_uri, target)
        else:
            storage.move_folder(staging.version_uri, target)
            storage.write_bytes(storage.join(target, MANIFEST_FILE), data)
    write_pointer(index_uri, manifest.index_id)


def _is_published(index_uri: str, index_id: str) -> bool:
    try:
        load_manifest(index_uri, index_id)
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return False
        raise
    return True
