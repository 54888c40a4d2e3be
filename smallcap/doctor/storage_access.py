"""Tries a folder or prefix as smallcap uses it: lists, writes, reads, replaces on a condition, deletes."""

from __future__ import annotations

import fcntl
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from smallcap import storage
from smallcap.doctor.report import Finding, fail, ok, warn
from smallcap.errors import StorageError
from smallcap.s3 import open_bucket

_FIRST, _SECOND, _LATE = b"first", b"second", b"late"
_INCONSISTENT = "Use a store that shows at once what was written or deleted."
_NO_CONDITION = (
    "Use a store with conditional writes (S3 itself, or a newer MinIO, Ceph or SeaweedFS): without them two builds "
    "that publish at once can lose a version."
)


def check_storage(uri: str) -> Iterator[Finding]:
    """Tries a place with a small file in a folder of its own; it is deleted in the end, as are folders made for it.

    Args:
        uri: A folder or prefix.

    Raises:
        StorageError: One of the steps fails.
    """
    subject = f"storage {uri}"
    start = time.monotonic()
    own = storage.join(uri, f"smallcap-doctor-{uuid.uuid4().hex}")
    storage.list_folder(own)  # a service that does not answer ends here, with nothing to clean up
    with storage.no_empty_folders(uri):
        try:
            problem = _problem(subject, storage.join(own, "probe"))
        except BaseException:
            with suppress(StorageError):  # the first error says more
                storage.remove(own)
            raise
        storage.remove(own)
        if problem is None and storage.list_folder(own):
            problem = fail(subject, "a deleted file is still there", _INCONSISTENT)
    if problem is not None:
        yield problem
        return
    seconds = time.monotonic() - start
    yield ok(subject, f"lists, writes, reads, replaces on a condition and deletes, in {seconds:.1f} s")


def _problem(subject: str, probe: str) -> Finding | None:
    """Writes a file twice and replaces it on a condition; returns what is wrong."""
    for content in (_FIRST, _SECOND):
        storage.write_bytes(probe, content)
        if storage.read_bytes(probe) != content:
            return fail(subject, "what was just written cannot be read", _INCONSISTENT)
        if probe not in storage.list_folder(probe.rpartition("/")[0]):
            return fail(subject, "what was just written is not listed", _INCONSISTENT)
    if storage.is_local(probe):
        return _lock_problem(subject, probe)
    if probe.startswith("s3://"):
        return _precondition_problem(subject, probe)
    found = "lists, writes and reads; smallcap knows no conditional write for this kind of store"
    return warn(subject, found, "Let only one build publish to an index at a time.")


def _lock_problem(subject: str, probe: str) -> Finding | None:
    """Tries a lock that must be given and one that must be refused; NFS can lack both."""
    path = storage.absolute(probe)
    with open(path, "rb") as one, open(path, "rb") as other:  # noqa: PTH123 - a path as a string, like URIs
        try:
            fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            found = f"files cannot be locked here ({os.strerror(error.errno or 0)})"
            return fail(
                subject, found, "Mount the file system with locks (for NFS: version 4, or a running lock daemon)."
            )
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
    return fail(
        subject, "two locks of one file were given at once", "Use a file system whose locks exclude each other."
    )


def _precondition_problem(subject: str, probe: str) -> Finding | None:
    """Tries conditional writes of which one must succeed and two must be refused."""
    import obstore
    from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

    store, key = open_bucket(probe)
    stale: Any = {"e_tag": obstore.head(store, key)["e_tag"]}
    try:
        obstore.put(store, key, _LATE, mode=stale)
    except BaseError as error:
        return fail(
            subject, f"a conditional write that must succeed is refused ({type(error).__name__})", _NO_CONDITION
        )
    for mode, refusal, case in (
        ("create", AlreadyExistsError, "that an object is new"),
        (stale, PreconditionError, "an object's ETag"),
    ):
        try:
            obstore.put(store, key, _FIRST, mode=mode)
        except refusal:
            continue
        except BaseError as error:
            return fail(subject, f"a write on the condition of {case} ends in {type(error).__name__}", _NO_CONDITION)
        return fail(subject, f"the store overwrites whatever the condition says: it ignores {case}", _NO_CONDITION)
    if storage.read_bytes(probe) != _LATE:
        return fail(subject, "a refused write has changed the object", _NO_CONDITION)
    return None
