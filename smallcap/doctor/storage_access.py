"""Tries a folder or prefix as smallcap uses it: lists, writes, reads, replaces on a condition, deletes."""

from __future__ import annotations

import fcntl
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from smallcap import storage
from smallcap.doctor.report import Finding, fail, ok
from smallcap.s3 import open_bucket

_FIRST, _SECOND, _LATE = b"first", b"second", b"late"
_NO_CONDITION = (
    "Use a store with conditional writes (S3 itself, or a newer MinIO, Ceph or SeaweedFS): without them two builds "
    "that publish at once can lose a version."
)


def check_storage(uri: str) -> Iterator[Finding]:
    """Tries a place with a small file of its own, which is deleted in the end, as are folders made for it.

    Args:
        uri: A folder or prefix.

    Raises:
        StorageError: One of the steps fails.
    """
    subject = f"storage {uri}"
    start = time.monotonic()
    with _folders_made_for(uri):
        probe = storage.join(uri, f"smallcap-doctor-{uuid.uuid4().hex}")
        try:
            count = len(storage.list_folder(uri))
            storage.write_bytes(probe, _FIRST)
            if storage.read_bytes(probe) != _FIRST or probe.rpartition("/")[2] not in _names(uri):
                remedy = "Use a store that is consistent after a write."
                yield fail(subject, "what was just written cannot be read or listed", remedy)
                return
            storage.write_bytes(probe, _SECOND)
            if storage.read_bytes(probe) != _SECOND:
                yield fail(subject, "a file keeps its old content", "Use a store that is consistent after a write.")
                return
            problem = _conditional_problem(probe)
        finally:
            storage.remove(probe)
        if storage.exists(probe):
            yield fail(subject, "a deleted file is still there", "Use a store that is consistent after a deletion.")
            return
    if problem is not None:
        yield Finding(subject, *problem)
        return
    seconds = time.monotonic() - start
    yield ok(subject, f"lists ({count} there), writes, reads, replaces on a condition, deletes; {seconds:.1f} s")


def _names(uri: str) -> list[str]:
    return [entry.rpartition("/")[2] for entry in storage.list_folder(uri)]


@contextmanager
def _folders_made_for(uri: str) -> Iterator[None]:
    """Removes local folders that were not there before, unless something has come to lie in them."""
    folder = Path(storage.absolute(uri))
    missing = [path for path in (folder, *folder.parents) if not path.exists()] if storage.is_local(uri) else []
    try:
        yield
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()


def _conditional_problem(probe: str) -> tuple[Any, str, str] | None:
    """Returns status, finding and remedy where two writers could overwrite each other's file; else None."""
    if storage.is_local(probe):
        return _lock_problem(probe)
    if not probe.startswith("s3://"):
        return (
            "warn",
            "lists, writes, reads, deletes; smallcap knows no conditional write for this kind of store",
            "Let only one build publish to an index at a time.",
        )
    return _precondition_problem(probe)


def _lock_problem(probe: str) -> tuple[Any, str, str] | None:
    """Tries a lock that must be given and one that must be refused; NFS can lack both."""
    path = storage.absolute(probe)
    with open(path, "rb") as one, open(path, "rb") as other:  # noqa: PTH123 - a path as a string, like URIs
        try:
            fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            found = f"files cannot be locked here ({os.strerror(error.errno or 0)})"
            return "fail", found, "Mount the file system with locks (for NFS: version 4, or a running lock daemon)."
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
    return "fail", "two locks of one file were given at once", "Use a file system whose locks exclude each other."


def _precondition_problem(probe: str) -> tuple[Any, str, str] | None:
    """Tries conditional writes of which one must succeed and two must be refused."""
    import obstore
    from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

    store, key = open_bucket(probe)
    stale: Any = {"e_tag": obstore.head(store, key)["e_tag"]}
    try:
        obstore.put(store, key, _LATE, mode=stale)
    except BaseError as error:
        return "fail", f"a conditional write that must succeed is refused ({type(error).__name__})", _NO_CONDITION
    for mode, refusal, case in (
        ("create", AlreadyExistsError, "that an object is new"),
        (stale, PreconditionError, "an object's ETag"),
    ):
        try:
            obstore.put(store, key, _FIRST, mode=mode)
        except refusal:
            continue
        except BaseError as error:
            return "fail", f"a write on the condition of {case} ends in {type(error).__name__}", _NO_CONDITION
        return "fail", f"the store overwrites whatever the condition says: it ignores {case}", _NO_CONDITION
    if storage.read_bytes(probe) != _LATE:
        return "fail", "a refused write has changed the object", _NO_CONDITION
    return None
