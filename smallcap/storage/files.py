"""Files: read, written and copied whole, or read in ranges.

What is written appears whole or not at all: on a local disk a staged file takes the target's place, and an object store
shows an object only when it is complete.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from smallcap.storage.listing import exists
from smallcap.storage.s3 import open_object, read_object_tail, update_object
from smallcap.storage.uris import absolute, filesystem, is_local, storage_errors

_CHUNK_BYTES = 8 << 20


def open_file(uri: str, mode: str = "rb") -> IO[Any]:
    """Opens one file; the caller closes it.

    Raises:
        StorageError: It is missing, forbidden, or the service fails.
    """
    fs, path = filesystem(uri)
    with storage_errors(uri, "open this file"):
        return fs.open(path, mode)


def open_ranged(uri: str, buffer_bytes: int = 0) -> IO[bytes]:
    """Opens a file for reading in ranges; on S3 each read is one ranged request, repeated when the connection breaks.

    Args:
        uri: The file.
        buffer_bytes: Read ahead so much at a time, for reading from front to back; 0 reads what is asked for.

    Raises:
        StorageError: It is missing (caused by a `FileNotFoundError`), forbidden (`PermissionError`), or the service
            fails; also from its `read`.
    """
    with storage_errors(uri, "read this file"):
        if is_local(uri):
            return open(absolute(uri), "rb", buffering=max(buffer_bytes, io.DEFAULT_BUFFER_SIZE))
        if uri.startswith("s3://"):
            return open_object(uri, buffer_bytes)
        fs, path = filesystem(uri)
        return cast("IO[bytes]", fs.open(path, "rb"))


def read_bytes(uri: str) -> bytes:
    """Reads one whole file.

    Raises:
        StorageError: It is missing, forbidden, or the service fails.
    """
    fs, path = filesystem(uri)
    with storage_errors(uri, "read this file"):
        return bytes(fs.cat_file(path))


def read_tail(uri: str, length: int) -> bytes:
    """Reads the last bytes of a file, or all where it has fewer; on S3 with one request.

    Raises:
        StorageError: It is missing, forbidden, or the service fails.
    """
    with storage_errors(uri, "read this file"):
        if uri.startswith("s3://"):
            return read_object_tail(uri, length)
        fs, path = filesystem(uri)
        return bytes(fs.cat_file(path, start=-length))


@contextmanager
def _staged(uri: str) -> Iterator[Path]:
    """Gives a path beside a local target, which takes the target's place unless writing it failed."""
    target = Path(absolute(uri))
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        yield staged
        staged.replace(target)
    finally:
        staged.unlink(missing_ok=True)


def write_bytes(uri: str, data: bytes) -> None:
    """Writes one whole file atomically: a reader sees the old content or the new one, never a part.

    Raises:
        StorageError: The target cannot be written.
    """
    with storage_errors(uri, "write this file"):
        if is_local(uri):
            with _staged(uri) as staged, staged.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        else:
            fs, path = filesystem(uri)
            fs.pipe_file(path, data)


def update_bytes(uri: str, update: Callable[[bytes | None], bytes]) -> None:
    """Replaces a small file by what `update` makes of its content, with no other writer in between.

    On a local disk writers take turns by a lock file; on S3 the write is conditional on the object's ETag, and begins
    again where another writer came first. Other stores have no such operation here: they are read just before the
    write, and of two writers in the same instant the later one wins.

    Args:
        uri: The file.
        update: Is given the present content, or `None` where there is no file; may raise to leave it as it is.

    Raises:
        StorageError: The target cannot be read or written.
    """
    if is_local(uri):
        target = Path(absolute(uri))
        with storage_errors(uri, "write this file"):
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.with_name(f".{target.name}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                write_bytes(uri, update(target.read_bytes() if target.exists() else None))
    elif uri.startswith("s3://"):
        with storage_errors(uri, "write this file"):
            update_object(uri, update)
    else:
        write_bytes(uri, update(read_bytes(uri) if exists(uri) else None))


def upload(local_path: str | Path, uri: str) -> None:
    """Copies a local file to `uri`, atomically for readers of `uri`."""
    with storage_errors(uri, "write this file"):
        if is_local(uri):
            with _staged(uri) as staged:
                shutil.copyfile(local_path, staged)
        else:
            fs, path = filesystem(uri)
            fs.put_file(str(local_path), path)


def move_in(local_path: Path, uri: str) -> None:
    """Like `upload`, for a temporary file that is not needed afterwards: on a local disk it may just be renamed."""
    if not is_local(uri):
        upload(local_path, uri)
        return
    with storage_errors(uri, "write this file"), _staged(uri) as staged:
        shutil.move(local_path, staged)


def download(uri: str, local_path: str | Path) -> None:
    """Copies `uri` to a local file whose folder exists."""
    fs, path = filesystem(uri)
    with storage_errors(uri, "download this file"):
        fs.get_file(path, str(local_path))


@contextmanager
def local_file(uri: str) -> Iterator[Path]:
    """Gives a local path with a file's content: its own when local, else a temporary download of the same name."""
    if is_local(uri):
        yield Path(absolute(uri))
        return
    with scratch_folder() as folder:
        path = folder / uri.rsplit("/", 1)[-1]
        download(uri, path)
        yield path


def remove(uri: str) -> None:
    """Deletes a file, or a folder with all that is in it; nothing happens when there is none."""
    fs, path = filesystem(uri)
    with storage_errors(uri, "delete this path"):
        if fs.exists(path):
            fs.rm(path, recursive=True)


def sha256_file(path: str | Path) -> str:
    """Returns the hexadecimal sha256 of a local file, read once from front to back."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Gives a temporary local folder that is deleted afterwards."""
    with tempfile.TemporaryDirectory(prefix="smallcap-") as folder:
        yield Path(folder)
