"""Says whether single objects cannot be had, or whether the place fails that they lie in: a bucket, or a folder.

Objects that are forbidden or gone are rows; a bucket that has become forbidden, or was deleted, stops the run. What
distinguishes them is asked of the place itself, once for a batch of which it has refused something: first for an object
that some process of the job has read before, and else for a list of what lies beside the refused one.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import Any

from smallcap import storage
from smallcap.colleagues import colleagues
from smallcap.errors import ErrorCode, RowError, StorageError
from smallcap.hub import hub_endpoint, is_on_hub, parse_hub_uri
from smallcap.images.fetch_sources import LOCAL, is_object_store, object_store, place_of
from smallcap.local_files import local_path
from smallcap.patience import Wait
from smallcap.s3 import is_plain_key, s3_endpoint
from smallcap.storage_faults import OF_THE_PLACE, Cause, Fault, diagnose, error_of, this_node

_FEW = 4  # so many refused objects of a bucket that gives nothing, not even a list, are not an accident
_TIMEOUT_S = 30.0
_AGAIN = "Then run the same command again."
_ALLOW = (
    "Let these credentials read it again. If only some of its objects are forbidden, let them list it as well, which "
    f"tells the two cases apart, or leave those objects out. {_AGAIN}"
)

_served: dict[str, str] = {}  # by place: the last object that this process has read there
_files_refused: Counter[str] = Counter()  # by place: tars and Parquet files, since it served the last one


def note_served(uri: str) -> None:
    """Remembers that an object was read; the first one of a bucket is told to the job's other processes."""
    place = place_of(uri)
    if place != LOCAL and not (is_object_store(place) and not is_on_hub(uri) and is_plain_key(_key(uri))):
        return
    if place not in _served and place != LOCAL:
        colleagues().share(f"served {place}", uri)
    _served[place] = uri
    _files_refused.pop(place, None)


def known_good(place: str) -> str | None:
    """Returns an object of a place that was read before, here or by another process of the job."""
    return _served.get(place) or (None if place == LOCAL else colleagues().recall(f"served {place}"))


def unreadable_file(error: StorageError, uri: str) -> RowError:
    """Returns the row's error for a tar or Parquet file that is missing or forbidden.

    Raises:
        StorageError: `error` itself, where the service is at fault; or the place serves no other file either.
    """
    if isinstance(error.__cause__, FileNotFoundError | IsADirectoryError):
        check_place(uri, is_gone=True)
        return RowError(ErrorCode.NOT_FOUND, "The file does not exist.", where=uri)
    if isinstance(error.__cause__, PermissionError):
        place = place_of(uri)
        _files_refused[place] += 1
        check_place(uri, is_gone=False, refused=_files_refused[place])
        return RowError(ErrorCode.FORBIDDEN, "These credentials may not read the file.", where=uri)
    raise error


def check_place(uri: str, *, is_gone: bool, refused: int = 1) -> None:
    """Asks a place that has refused an object whether it serves others; other web servers are not asked.

    Args:
        uri: The object.
        is_gone: Whether it is not there; otherwise it is forbidden, or cannot be had for another reason.
        refused: How many objects of the place were refused.

    Raises:
        StorageError: The place fails.
    """
    place = place_of(uri)
    if place == LOCAL:
        _check_folder()
    elif is_on_hub(uri):
        if refused < _FEW:  # a list may name what is in no repository
            return
        fault = _fault_of(uri, lambda: _ask_hub(uri))
        if fault is not None:
            raise _failed(place, fault, uri)
    elif is_object_store(place):
        good = known_good(place)
        if good is not None and good != uri:
            fault = _fault_of(good, lambda: _read_start(good))
            if fault is None:
                return
            if fault.cause is not Cause.MISSING:
                raise _failed(place, fault, uri)
        fault = _fault_of(uri, lambda: _list_beside(uri))
        if fault is not None and (fault.cause in OF_THE_PLACE or (refused >= _FEW and not is_gone)):
            raise _failed(place, fault, uri)


def _read_start(uri: str) -> None:
    """Reads the first byte of an object; raises what the client raises."""
    import obstore

    scheme, bucket, key = _parts(uri)
    try:
        obstore.get(_store(scheme, bucket), key, options={"range": (0, 1)}).bytes()
    except Exception as error:
        fault = diagnose(error)
        if fault.status != 416 and fault.cause is not Cause.NO_STORE:  # it is empty, or came whole from a web server
            raise


def _list_beside(uri: str) -> None:
    """Lists what lies in the folder of an object; raises what the client raises."""
    import obstore

    scheme, bucket, key = _parts(uri)
    folder = key.rpartition("/")[0]
    next(iter(obstore.list(_store(scheme, bucket), folder if is_plain_key(folder) else None)), None)


def ask_once(uri: str) -> None:
    """Asks a place for anything at all; raises what the client raises."""
    if is_on_hub(uri):
        _ask_hub(uri)
    elif is_object_store(place_of(uri)):
        _list_beside(uri)


def _store(scheme: str, bucket: str) -> Any:
    return object_store(scheme, bucket, s3_endpoint() if scheme == "s3" else None, _TIMEOUT_S)


def _parts(uri: str) -> tuple[str, str, str]:
    scheme, _, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    return scheme, bucket, key


def _key(uri: str) -> str:
    return _parts(uri)[2]


def _ask_hub(uri: str) -> None:
    from huggingface_hub import HfApi

    place = parse_hub_uri(uri)
    if not place.is_bucket:
        HfApi(endpoint=hub_endpoint()).repo_info(place.id, repo_type=place.type, revision=place.revision)


def _fault_of(uri: str, ask: Callable[[], None]) -> Fault | None:
    """Returns why a place does not answer a question; None if it does.

    Raises:
        StorageError: It fails for longer than the patience lasts.
    """
    wait = Wait(uri, "look at this place")
    try:
        wait.repeat(ask)
    except StorageError:
        raise
    except Exception as error:  # each client has its own
        fault = diagnose(error)
        if fault.passes:
            raise error_of(fault, "read from this place", place_of(uri), _endpoint(uri), wait.describe()) from error
        return fault
    return None


def _endpoint(uri: str) -> str | None:
    return s3_endpoint() if uri.startswith("s3://") else None


def _failed(place: str, fault: Fault, uri: str) -> StorageError:
    error = error_of(fault, "read from this place any more", place, _endpoint(uri))
    remedy = _ALLOW if fault.cause is Cause.FORBIDDEN else fault.remedy(place)
    return StorageError(error.what, where=error.where, found=error.found or f"refused: {uri}", remedy=remedy)


def _check_folder() -> None:
    """Checks that the folder is still there from which this process has read last, unless the file itself is.

    A disk that was unmounted leaves nothing, or an empty folder.

    Raises:
        StorageError: It is not.
    """
    good = _served.get(LOCAL)
    if good is None or (path := local_path(storage.absolute(good))).exists():
        return
    try:
        with os.scandir(path.parent) as entries:
            if next(entries, None) is not None:
                return
        found = "an empty folder"
    except OSError as error:
        found = error.strerror or str(error)
    raise StorageError(
        "The folder is gone from which images were read, or its disk is.",
        where=f"{path.parent}, on {this_node()}",
        found=found,
        remedy=f"Mount it there again. {_AGAIN}",
    )
