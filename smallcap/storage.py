"""The doorway to storage: every URI that smallcap reads or writes goes through here.

Local paths, `s3://` (s3fs and, for some requests, `smallcap.s3`; the endpoint from AWS_ENDPOINT_URL), `hf://` for
reading (`smallcap.hub`) and any other fsspec URL look alike to the callers. The hot path of fetching many small objects
is `smallcap.images.fetching`. This module knows nothing about images, indexes or schemas.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import io
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.core import url_to_fs

from smallcap.errors import StorageError
from smallcap.hub import check_writable, hub_filesystem, is_on_hub, kind_on_hub
from smallcap.local_files import as_text, fixed_part, has_marks, local_path, walk
from smallcap.object_state import ListedUri
from smallcap.patience import ride_out
from smallcap.s3 import is_plain_key, open_object, read_object_tail, s3fs_options, update_object, walk_objects
from smallcap.storage_faults import brief
from smallcap.translated import patient, patiently, translated, translated_file

DEFAULT_CACHE_DIR = "~/.cache/smallcap"  # where a node keeps copies of remote files
_CHUNK_BYTES = 8 << 20
_LISTING = "list this path"


def is_local(uri: str) -> bool:
    """Says whether a URI names a path of this machine's own file system."""
    return "://" not in uri or uri.startswith("file://")


def absolute(uri: str) -> str:
    """Returns `uri` without a trailing slash; a local path becomes absolute and loses its `file://`."""
    if is_local(uri):
        return os.path.abspath(os.path.expanduser(uri.removeprefix("file://")))
    return uri.rstrip("/")


def join(uri: str, *components: str) -> str:
    """Joins path components to a URI with single slashes."""
    return "/".join([uri.rstrip("/"), *(component.strip("/") for component in components)])


def suffix_of(uri: str) -> str:
    """Returns the ending of a file's name from its last dot on, in lower case."""
    stem, dot, ending = uri.rpartition("/")[2].rpartition(".")
    return f"{dot}{ending}".lower() if stem else ""


def path_below(folder: str, uri: str) -> str:
    """Returns a file's path below a folder, prefix or pattern; for a file that is listed alone, its name."""
    return uri.removeprefix(folder).lstrip("/") or uri.rpartition("/")[2]


def is_glob(uri: str) -> bool:
    """Says whether a URI is a pattern of names: it has such marks, and nothing exists that is called so."""
    return has_marks(uri) and not exists(uri)


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Returns the fsspec filesystem of a URI and the path inside it.

    Raises:
        StorageError: The protocol is unknown, its package is missing, or it cannot be opened.
    """
    if is_local(uri):
        return fsspec.filesystem("file"), str(local_path(absolute(uri)))
    if is_on_hub(uri):
        return hub_filesystem(uri)
    is_s3 = uri.startswith("s3://")
    options = s3fs_options() if is_s3 else {}
    try:
        # no cache of listings: other processes write to the same places
        if is_s3:  # a key may have ::, which joins two protocols elsewhere
            return fsspec.filesystem("s3", use_listings_cache=False, **options), absolute(uri)[len("s3://") :]
        fs, path = url_to_fs(absolute(uri), use_listings_cache=False)
    except Exception as error:  # each protocol has its own: without a host, an archive, a Java library …
        raise StorageError(
            "Cannot open this kind of URI.",
            where=uri,
            found=brief(error),
            remedy="Use a local path, s3://…, or install the fsspec package of that protocol.",
        ) from error
    return fs, path


@patient("look at this path")
def exists(uri: str) -> bool:
    """Says whether a file or folder exists at `uri`."""
    fs, path = filesystem(uri)
    return kind_on_hub(fs, path) is not None if is_on_hub(uri) else bool(fs.exists(path))


@patient("look at this path")
def is_folder(uri: str) -> bool:
    """Says whether `uri` is a folder, or a prefix with objects below it."""
    fs, path = filesystem(uri)
    return kind_on_hub(fs, path) == "directory" if is_on_hub(uri) else bool(fs.isdir(path))


@patient("look at this path")
def size(uri: str) -> int | None:
    """Returns a file's size in bytes; None if it does not exist."""
    fs, path = filesystem(uri)
    try:
        return int(fs.size(path))
    except FileNotFoundError:
        return None


@patient("look at this path")
def modified_at(uri: str) -> datetime:
    """Returns the time of a file's last change, with a time zone."""
    fs, path = filesystem(uri)
    modified: datetime = fs.modified(path)
    return modified if modified.tzinfo else modified.replace(tzinfo=UTC)


@patient(_LISTING)
def list_folder(uri: str) -> list[str]:
    """Lists the entries of a folder or prefix as sorted URIs, hidden ones included; empty if it does not exist."""
    fs, root = filesystem(uri)
    try:
        names = fs.ls(root, detail=False)
    except FileNotFoundError:
        return []
    return sorted(join(uri, name.rstrip("/").rsplit("/", 1)[-1]) for name in names)


def list_files(uri: str, suffixes: Sequence[str] = ()) -> list[str]:
    """Lists the files below a folder or prefix, sorted; see `iter_files`."""
    return sorted(iter_files(uri, suffixes))


def iter_files(
    uri: str, suffixes: Sequence[str] = (), left_out: Callable[[str, bool], None] | None = None
) -> Iterator[str]:
    """Lists the files below a folder or prefix as a stream: memory does not grow with their number.

    A file's URI yields itself. Hidden files (a component starting with `.` or `_`) are left out, as Hadoop's
    readers do. Files are sorted, except in a local folder of more than 200,000 entries.

    Args:
        uri: Folder, prefix, glob pattern, or file.
        suffixes: Lower-case endings to keep, such as `(".jpg", ".png")`; all files when empty.
        left_out: A function that is called with the URI of each file that is left out, and whether it is hidden.

    Raises:
        StorageError: Nothing exists at `uri`, or the service fails.
    """
    root = fixed = absolute(uri)  # fixed: what every file's URI begins with
    if is_glob(root):
        fixed = fixed_part(root, is_folder)
        paths = _glob(root, fixed)
    elif is_local(root):
        paths = walk(root)
    elif root.startswith("s3://"):
        paths = walk_objects(root)
    else:
        paths = _find(root)
    endings = tuple(suffixes)
    any_file = False
    while True:
        with translated(uri, _LISTING):  # not around the yield: a caller's errors are not the storage's
            path = next(paths, None)
        if path is None:
            break
        any_file = True
        hidden = any(
            component.startswith((".", "_")) and component not in (".", "..")
            for component in path[len(fixed) :].split("/")
        )
        if not hidden and (not endings or path.lower().endswith(endings)):
            yield path
        elif left_out is not None:
            left_out(path, hidden)
    if not any_file and not exists(uri):
        raise StorageError("Cannot list this path: it does not exist.", where=uri, remedy="Check the path.")


def _glob(root: str, fixed: str) -> Iterator[str]:
    fs, pattern = filesystem(root)
    if fixed and is_local(fixed) == is_local(root):  # else the pattern begins in the bucket's name
        pattern = glob.escape(filesystem(fixed)[1]) + root[len(fixed) :]

    def listed() -> dict[str, Any]:
        return {path: entry for path, entry in fs.glob(pattern, detail=True).items() if not fs.isdir(path)}

    found = ride_out(root, _LISTING, listed)
    yield from sorted(ListedUri.of(_uri(root, path), entry) for path, entry in found.items())


def _find(root: str) -> Iterator[str]:
    fs, path = filesystem(root)
    found = ride_out(root, _LISTING, lambda: fs.find(path, detail=True))
    yield from sorted(ListedUri.of(_uri(root, name), entry) for name, entry in found.items())


def _uri(root: str, path: str) -> str:
    """Returns the URI of a path that a filesystem lists for `root`."""
    return as_text(path) if is_local(root) else f"{root.split('://', 1)[0]}://{path}"


@patient("read this file")
def open_ranged(uri: str, buffer_bytes: int = 0) -> IO[bytes]:
    """Opens a file for reading in ranges; on S3 each read is one ranged request, repeated when the connection breaks.

    Args:
        uri: The file.
        buffer_bytes: Bytes to read ahead, for reading from front to back; 0 reads only what is asked for.

    Raises:
        StorageError: It is missing (caused by a `FileNotFoundError`), forbidden (`PermissionError`), or the service
            fails. Reading from the opened file raises the same.
    """
    if is_local(uri):
        return open(local_path(absolute(uri)), "rb", buffering=max(buffer_bytes, io.DEFAULT_BUFFER_SIZE))
    if uri.startswith("s3://") and is_plain_key(uri[len("s3://") :]):
        return open_object(uri, buffer_bytes)
    fs, path = filesystem(uri)
    options = {"cache_type": "none"} if is_on_hub(uri) else {}  # the Hub's client reads 5 MB ahead
    return translated_file(uri, fs.open(path, "rb", **options), buffer_bytes)


@patient("read this file")
def read_bytes(uri: str) -> bytes:
    """Reads one whole file.

    Raises:
        StorageError: It is missing, forbidden, or the service fails.
    """
    fs, path = filesystem(uri)
    return bytes(fs.cat_file(path))


@patient("read this file")
def read_tail(uri: str, length: int) -> bytes:
    """Reads the last bytes of a file, or all of them if there are fewer; on S3 with one request.

    Raises:
        StorageError: It is missing, forbidden, or the service fails.
    """
    if uri.startswith("s3://"):
        return read_object_tail(uri, length)
    fs, path = filesystem(uri)
    return bytes(fs.cat_file(path, start=-length))


@contextmanager
def _staged(uri: str) -> Iterator[Path]:
    """Gives a path next to a local target; what is written there replaces the target unless writing fails."""
    target = Path(absolute(uri))
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        yield staged
        staged.replace(target)
    finally:
        staged.unlink(missing_ok=True)


@patient("write this file")
def write_bytes(uri: str, data: bytes) -> None:
    """Writes one whole file atomically: a reader sees the old content or the new one, never a fragment.

    Raises:
        StorageError: The target cannot be written.
    """
    if is_local(uri):
        with _staged(uri) as staged, staged.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    else:
        fs, path = filesystem(check_writable(uri))
        fs.pipe_file(path, data)


def update_bytes(uri: str, update: Callable[[bytes | None], bytes]) -> None:
    """Replaces a small file by what `update` makes of its content, with no other writer in between.

    On a local disk a lock file makes writers take turns. On S3 the write is conditional on the object's ETag, and
    starts again if another writer came first. For other stores there is no such operation here: the file is read just
    before the write, and if two write in the same instant, the later one wins.

    Args:
        uri: The file.
        update: Turns the current content, or `None` if there is no file, into the new one; may raise to leave the file
            as it is.

    Raises:
        StorageError: The target cannot be read or written.
    """
    if is_local(uri):
        target = Path(absolute(uri))
        with translated(uri, "write this file"):
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.with_name(f".{target.name}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                write_bytes(uri, update(target.read_bytes() if target.exists() else None))
    elif uri.startswith("s3://"):
        signature = uuid.uuid4().hex  # of all attempts: one whose answer was lost is found by it
        patiently(uri, "write this file", lambda: update_object(uri, update, signature))
    else:
        write_bytes(uri, update(read_bytes(uri) if exists(uri) else None))


def upload(local_path: str | Path, uri: str) -> None:
    """Copies a local file to `uri`, atomically for readers of `uri`."""
    _put(uri, local_path)


@patient("write this file")
def _put(uri: str, local_path: str | Path) -> None:
    if is_local(uri):
        with _staged(uri) as staged:
            shutil.copyfile(local_path, staged)
    else:
        fs, path = filesystem(check_writable(uri))
        fs.put_file(str(local_path), path)


def move_in(local_path: Path, uri: str) -> None:
    """Does the same as `upload` for a temporary file, which on a local disk it may just rename."""
    if not is_local(uri):
        upload(local_path, uri)
        return
    with translated(uri, "write this file"), _staged(uri) as staged:
        shutil.move(local_path, staged)


@patient("download this file")
def download(uri: str, local_path: str | Path) -> None:
    """Copies `uri` to a local file whose folder exists."""
    fs, path = filesystem(uri)
    fs.get_file(path, str(local_path))


@contextmanager
def local_file(uri: str) -> Iterator[Path]:
    """Gives a local path to a file: its own if it is local, else that of a temporary download of the same name."""
    if is_local(uri):
        yield local_path(absolute(uri))
        return
    with scratch_folder() as folder:
        path = folder / uri.rsplit("/", 1)[-1]
        download(uri, path)
        yield path


@patient("delete this path")
def remove(uri: str) -> None:
    """Deletes a file, or a folder with all that is in it; does nothing if it does not exist."""
    fs, path = filesystem(check_writable(uri))
    if not is_local(uri) and has_marks(path):  # rm() would take it for a pattern, and delete what fits
        for file in fs.find(path):
            fs.rm_file(file)
    elif fs.exists(path):
        fs.rm(path, recursive=True)


def sha256_file(path: str | Path) -> str:
    """Returns the hexadecimal sha256 of a local file, read once from front to back."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def no_empty_folders(uri: str) -> Iterator[None]:
    """Removes a local folder, and those above it, at the end of a block that has made them and left them empty."""
    folder = Path(absolute(uri))
    missing = [path for path in (folder, *folder.parents) if not path.exists()] if is_local(uri) else []
    try:
        yield
    finally:
        for path in missing:
            with suppress(OSError):  # it was never made, or something is in it
                path.rmdir()


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Gives a temporary local folder that is deleted afterwards."""
    with tempfile.TemporaryDirectory(prefix="smallcap-") as folder:
        yield Path(folder)
