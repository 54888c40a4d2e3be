"""Puts patience, and the one translator of exceptions, around what storage clients do and files they have opened."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import IO, Any, Concatenate, ParamSpec, TypeVar

from smallcap.errors import RunError
from smallcap.patience import Wait, ride_out
from smallcap.s3 import error_of_reading, s3_endpoint
from smallcap.storage_faults import OF_THE_PLACE, diagnose, error_of

More = ParamSpec("More")
Result = TypeVar("Result")


def patiently(uri: str, doing: str, attempt: Callable[[], Result]) -> Result:
    """Returns what `attempt` returns, after as many calls as it takes while storage fails for passing reasons.

    Args:
        uri: What storage is asked for.
        doing: What could not be done, such as `read this file`.
        attempt: Does it; may be called again after it has failed, or has been done without an answer.

    Raises:
        StorageError: It failed for good; see `translated`.
    """
    wait = Wait(uri, doing)
    with translated(uri, doing, wait):
        return wait.repeat(attempt)


def patient(
    doing: str,
) -> Callable[[Callable[Concatenate[str, More], Result]], Callable[Concatenate[str, More], Result]]:
    """Makes of a function whose first argument is a URI one that asks storage `patiently`."""

    def decorate(function: Callable[Concatenate[str, More], Result]) -> Callable[Concatenate[str, More], Result]:
        @wraps(function)
        def ask(uri: str, /, *arguments: More.args, **options: More.kwargs) -> Result:
            return patiently(uri, doing, lambda: function(uri, *arguments, **options))

        return ask

    return decorate


@contextmanager
def translated(uri: str, doing: str, wait: Wait | None = None) -> Iterator[None]:
    """Turns the many exceptions of storage clients into one `StorageError`.

    Its cause is a `FileNotFoundError` or a `PermissionError` only where the object is missing or forbidden.

    Args:
        uri: What storage is asked for.
        doing: What could not be done.
        wait: The attempts at it, where there may be several.
    """
    try:
        yield
    except RunError:
        raise
    except Exception as error:  # noqa: BLE001 - botocore, aiohttp, google-auth … share no base class
        is_s3 = uri.startswith("s3://")
        fault = diagnose(error)
        if is_s3 and fault.status in (400, 403) and not fault.code:  # as to HEAD, whose answers have no body
            fault = diagnose(error_of_reading(uri) or error)
        tried = wait.describe() if wait and fault.passes else ""
        cause: BaseException | None = error
        while fault.cause in OF_THE_PLACE and isinstance(cause, FileNotFoundError | PermissionError):
            cause = cause.__cause__
        raise error_of(fault, doing, uri, s3_endpoint() if is_s3 else None, tried) from cause


def translated_file(uri: str, file: IO[bytes], buffer_bytes: int) -> IO[bytes]:
    """Returns a file that a client has opened as one whose errors are translated.

    Args:
        uri: Its place.
        file: It.
        buffer_bytes: Bytes to read ahead.
    """
    return io.BufferedReader(_File(uri, file), max(buffer_bytes, io.DEFAULT_BUFFER_SIZE))


class _File(io.RawIOBase):
    """A file of fsspec's whose errors are translated."""

    def __init__(self, uri: str, file: IO[bytes]) -> None:
        super().__init__()
        self._uri, self._file = uri, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with translated(self._uri, "read this file"):
            return self._file.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        place = self._file.tell()

        def read() -> bytes:
            if self._file.tell() != place:  # a read that broke off has moved it
                self._file.seek(place)
            return self._file.read(len(view))

        with translated(self._uri, "read this file"):
            data = ride_out(self._uri, "read this file", read) if self._file.seekable() else read()
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()
