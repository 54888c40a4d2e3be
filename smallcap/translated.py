"""Puts the one translator of storage's exceptions around what a client does, and around files that it has opened."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from smallcap.errors import RunError
from smallcap.s3 import error_of_reading, s3_endpoint
from smallcap.storage_faults import OF_THE_PLACE, diagnose, error_of


@contextmanager
def translated(uri: str, doing: str) -> Iterator[None]:
    """Turns the many exceptions of storage clients into one `StorageError`.

    Its cause is a `FileNotFoundError` or a `PermissionError` only where the object is missing or forbidden.
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
        cause: BaseException | None = error
        while fault.cause in OF_THE_PLACE and isinstance(cause, FileNotFoundError | PermissionError):
            cause = cause.__cause__
        raise error_of(fault, doing, uri, s3_endpoint() if is_s3 else None) from cause


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
        with translated(self._uri, "read this file"):
            data = self._file.read(len(view))
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()
