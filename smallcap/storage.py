"""The doorway to storage: every URI that smallcap reads or writes goes through here.

Local paths, `s3://` (s3fs; the endpoint from AWS_ENDPOINT_URL) and any other fsspec URL look alike to the callers. The
hot path of fetching many small objects is `smallcap.images.fetching`. This module knows nothing of images, indexes or
schemas.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import random
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import fsspec
from fsspec.core import url_to_fs

from smallcap.errors import RunError, StorageError

if TYPE_CHECKING:
    from obstore.store import S3Credential, S3Store

DEFAULT_CACHE_DIR = "~/.cache/smallcap"  # where a node keeps copies of remote files
_CHUNK_BYTES = 8 << 20
_READ_ATTEMPTS = 5  # of one ranged read in a row, beside the client's own
_SORTED_ENTRIES = 200_000  # a folder with more is listed in the order of its disk: names are not held in any number
_S3_RETRIES = 6  # with botocore's growing waits about half a minute; s3fs repeats some calls once more by itself
_WRITER = "smallcap-writer"  # S3 metadata of an object that several processes may replace
_CREDENTIALS_LIFETIME = timedelta(minutes=5)  # after which botocore is asked whether they are still good


def is_local(uri: str) -> bool:
    """Says whether a URI names a path of this machine's own file system."""
    return "://" not in uri or uri.startswith("file://")


def absolute(uri: str) -> str:
    """Returns `uri` without a trailing slash; a local path becomes absolute and loses its `file://`."""
    if is_local(uri):
        return os.path.abspath(os.path.expanduser(uri.removeprefix("file://")))
    return uri.rstrip("/")


def join(uri: str, *parts: str) -> str:
    """Joins path components to a URI with single slashes."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Returns the fsspec filesystem of a URI and the path inside it.

    Raises:
        StorageError: The protocol is unknown, or its package is missing.
    """
    # The endpoint is named, so that fsspec keeps no filesystem of another endpoint for it.
    of_s3 = {"endpoint_url": s3_endpoint(), "config_kwargs": {"retries": {"max_attempts": _S3_RETRIES}}}
    try:
        # no cache of listings: other processes write to the same places
        fs, path = url_to_fs(absolute(uri), use_listings_cache=False, **(of_s3 if uri.startswith("s3://") else {}))
    except (ValueError, ImportError) as error:
        raise StorageError(
            "Cannot open this kind of URI.",
            where=uri,
            found=str(error),
            remedy="Use a local path, s3://…, or install the fsspec package of that protocol.",
        ) from error
    return fs, path


@contextmanager
def _translated(uri: str, doing: str) -> Iterator[None]:
    """Turns the many exceptions of storage clients into one `StorageError`."""
    try:
        yield
    except RunError:
        raise
    except FileNotFoundError as error:
        raise StorageError(f"Cannot {doing}: it does not exist.", where=uri, remedy="Check the path.") from error
    except PermissionError as error:
        raise StorageError(
            f"Cannot {doing}: access denied.", where=uri, found=str(error), remedy="Check the credentials."
        ) from error
    except Exception as error:  # botocore, aiohttp, google-auth … share no base class
        raise StorageError(f"Cannot {doing}.", where=uri, found=f"{type(error).__name__}: {error}") from error


def exists(uri: str) -> bool:
    """Says whether a file or folder exists at `uri`."""
    fs, path = filesystem(uri)
    with _translated(uri, "look at this path"):
        return bool(fs.exists(path))


def is_folder(uri: str) -> bool:
    """Says whether `uri` is a folder, or a prefix with objects below it."""
    fs, path = filesystem(uri)
    with _translated(uri, "look at this path"):
        return bool(fs.isdir(path))


def open_file(uri: str, mode: str = "rb") -> IO[Any]:
    """Opens one file; the caller closes it.

    Raises:
        StorageError: It is missing, forbidden, or the service fails.
    """
    fs, path = filesystem(uri)
    with _translated(uri, "open this file"):
        return fs.open(path, mode)


def read_bytes(uri: str) -> bytes:
    """Reads one whole file.

    Raises:
        StorageError: It is missing, forbidden, or the service fails.
    """
    fs, path = filesystem(uri)
    with _translated(uri, "read this file"):
        return bytes(fs.cat_file(path))


def read_tail(uri: str, length: int) -> bytes:
    """Reads the last bytes of a file, or all where it has fewer; on S3 with one request.

    Raises:
        StorageError: It is missing, forbidden, or the service fails.
    """
    with _translated(uri, "read this file"):
        if uri.startswith("s3://"):
            import obstore
            from obstore.exceptions import BaseError

            bucket, _, key = uri.removeprefix("s3://").partition("/")
            store = s3_store(bucket, s3_endpoint())
            try:
                return bytes(obstore.get(store, key, options={"range": {"suffix": length}}).bytes())
            except BaseError:
                if size(uri) == 0:  # has no range that S3 could serve
                    return b""
                raise
        fs, path = filesystem(uri)
        with fs.open(path, "rb", cache_type="none") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - length))
            return bytes(file.read())


def write_bytes(uri: str, data: bytes) -> None:
    """Writes one whole file atomically: a reader sees the old content or the new one, never a part.

    Raises:
        StorageError: The target cannot be written.
    """
    with _translated(uri, "write this file"):
        if is_local(uri):
            target = Path(absolute(uri))
            target.parent.mkdir(parents=True, exist_ok=True)
            staged = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
            try:
                with staged.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                staged.replace(target)
            finally:
                staged.unlink(missing_ok=True)
        else:
            fs, path = filesystem(uri)
            fs.pipe_file(path, data)  # an object store shows an object only when it is complete


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
        with _translated(uri, "write this file"):
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.with_name(f".{target.name}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                write_bytes(uri, update(target.read_bytes() if target.exists() else None))
    elif uri.startswith("s3://"):
        with _translated(uri, "write this file"):
            _update_s3(uri, update)
    else:
        write_bytes(uri, update(read_bytes(uri) if exists(uri) else None))


def _update_s3(uri: str, update: Callable[[bytes | None], bytes]) -> None:
    """Replaces an object only while it is the one that was read; begins again where it no longer is.

    A write whose answer was lost may have taken place, so each writer signs its object and looks for its signature
    before it writes again.
    """
    import obstore
    from obstore.exceptions import AlreadyExistsError, GenericError, PreconditionError

    bucket, _, key = uri.removeprefix("s3://").partition("/")
    store = s3_store(bucket, s3_endpoint())
    signature = uuid.uuid4().hex
    failures = 0
    while True:
        found, e_tag = None, None
        with suppress(FileNotFoundError):
            response = obstore.get(store, key)
            if response.attributes.get(_WRITER) == signature:
                return
            found, e_tag = bytes(response.bytes()), response.meta["e_tag"]
        mode: Any = "create" if found is None else {"e_tag": e_tag}
        try:
            obstore.put(store, key, update(found), mode=mode, attributes={_WRITER: signature})
            return
        except (AlreadyExistsError, PreconditionError):
            continue
        except GenericError:  # obstore repeats no conditional write whose connection broke
            failures += 1
            if failures > _S3_RETRIES:
                raise
            time.sleep(random.uniform(0, 0.1 * 2**failures))


def upload(local_path: str | Path, uri: str) -> None:
    """Copies a local file to `uri`, atomically for readers of `uri`."""
    with _translated(uri, "write this file"):
        if is_local(uri):
            target = Path(absolute(uri))
            target.parent.mkdir(parents=True, exist_ok=True)
            staged = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
            fs, _ = filesystem(uri)
            try:
                fs.cp_file(str(local_path), str(staged))
                staged.replace(target)
            finally:
                staged.unlink(missing_ok=True)
        else:
            fs, path = filesystem(uri)
            fs.put_file(str(local_path), path)


def move_in(local_path: Path, uri: str) -> None:
    """Like `upload`, for a temporary file that is not needed afterwards: on a local disk it may just be renamed."""
    if not is_local(uri):
        upload(local_path, uri)
        return
    with _translated(uri, "write this file"):
        target = Path(absolute(uri))
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        try:
            shutil.move(local_path, staged)
            staged.replace(target)
        finally:
            staged.unlink(missing_ok=True)


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


def download(uri: str, local_path: str | Path) -> None:
    """Copies `uri` to a local file whose folder exists."""
    fs, path = filesystem(uri)
    with _translated(uri, "download this file"):
        fs.get_file(path, str(local_path))


def remove(uri: str) -> None:
    """Deletes a file, or a folder with all that is in it; nothing happens when there is none."""
    fs, path = filesystem(uri)
    with _translated(uri, "delete this path"):
        if fs.exists(path):
            fs.rm(path, recursive=True)


def list_files(uri: str, suffixes: Sequence[str] = ()) -> list[str]:
    """Lists the files that `iter_files` lists, sorted.

    Raises:
        StorageError: Nothing exists at `uri`, or the service fails.
    """
    return sorted(iter_files(uri, suffixes))


def iter_files(uri: str, suffixes: Sequence[str] = ()) -> Iterator[str]:
    """Lists the files below a folder or prefix as a stream; a file's own URI lists as itself.

    Hidden files (a component starting with `.` or `_`) are left out, as Hadoop's readers do. Files are sorted on S3
    and in local folders of up to 200,000 entries each; elsewhere they come in any order. Memory does not grow with
    their number.

    Args:
        uri: Folder, prefix, glob pattern, or file.
        suffixes: Lower-case endings to keep, such as `(".jpg", ".png")`; all files when empty.

    Raises:
        StorageError: Nothing exists at `uri`, or the service fails.
    """
    root = absolute(uri)
    fixed = root
    if is_glob(root):
        fixed = root[: min(root.index(mark) for mark in "*?[" if mark in root)].rpartition("/")[0]
        found = _walk_fsspec(root)
    elif is_local(root):
        found = _walk_local(root)
    else:
        found = _walk_s3(root) if root.startswith("s3://") else _walk_fsspec(root)
    endings = tuple(suffixes)
    any_file = False
    while True:
        with _translated(uri, "list this path"):  # not around the yield: the caller's own errors are not the storage's
            path = next(found, None)
        if path is None:
            break
        any_file = True
        hidden = any(name.startswith((".", "_")) for name in path[len(fixed) :].split("/"))
        if not hidden and (not endings or path.lower().endswith(endings)):
            yield path
    if not any_file and not exists(uri):
        raise StorageError("Cannot list this path: it does not exist.", where=uri, remedy="Check the path.")


def suffix_of(uri: str) -> str:
    """Returns the ending of a file's name from its last dot on, in lower case."""
    stem, dot, ending = uri.rpartition("/")[2].rpartition(".")
    return f"{dot}{ending}".lower() if stem else ""


def path_below(folder: str, uri: str) -> str:
    """Returns a file's path below a folder, prefix or pattern; a file that is listed by itself has its name."""
    return uri.removeprefix(folder).lstrip("/") or uri.rpartition("/")[2]


def is_glob(uri: str) -> bool:
    """Says whether a URI is a pattern of names."""
    return any(mark in uri for mark in "*?[")


def _walk_local(root: str) -> Iterator[str]:
    """Yields the files below a folder; those of a folder that is not huge in the order of their whole paths."""
    if os.path.isfile(root):
        yield root
        return
    if not os.path.isdir(root):
        return
    with os.scandir(root) as entries:
        first = list(islice(entries, _SORTED_ENTRIES))
        # A folder sorts as its name and a slash: then walking in this order gives whole paths in order.
        first.sort(key=lambda entry: entry.name + "/" if entry.is_dir(follow_symlinks=False) else entry.name)
        for entry in chain(first, entries):
            if entry.is_dir(follow_symlinks=False):
                yield from _walk_local(entry.path)
            else:
                yield entry.path


def _walk_fsspec(root: str) -> Iterator[str]:
    fs, path = filesystem(root)
    found = [other for other in fs.glob(path) if not fs.isdir(other)] if is_glob(root) else fs.find(path)
    prefix = "" if is_local(root) else root.split("://", 1)[0] + "://"
    yield from sorted(prefix + other for other in found)


def _walk_s3(root: str) -> Iterator[str]:
    import obstore

    bucket, _, key = root.removeprefix("s3://").partition("/")
    store = s3_store(bucket, s3_endpoint())
    empty = True
    for page in obstore.list(store, key or None, chunk_size=1000):
        for entry in page:
            empty = False
            yield f"s3://{bucket}/{entry['path']}"
    if empty and key and not root.endswith("/"):
        try:
            obstore.head(store, key)
        except FileNotFoundError:
            return
        yield root  # one object, not a prefix


def open_ranged(uri: str, buffer_bytes: int = 0) -> IO[bytes]:
    """Opens a file for reading in ranges; on S3 each read is one ranged request, repeated when the connection breaks.

    Args:
        uri: The file.
        buffer_bytes: Read ahead so much at a time, for reading from front to back; 0 reads what is asked for.

    Raises:
        StorageError: It is missing (caused by a `FileNotFoundError`), forbidden (`PermissionError`), or the service
            fails; also from its `read`.
    """
    with _translated(uri, "read this file"):
        if is_local(uri):
            return open(absolute(uri), "rb", buffering=max(buffer_bytes, io.DEFAULT_BUFFER_SIZE))
        if uri.startswith("s3://"):
            raw = _S3Object(uri)
            return io.BufferedReader(raw, buffer_bytes) if buffer_bytes else cast("IO[bytes]", raw)
        fs, path = filesystem(uri)
        return cast("IO[bytes]", fs.open(path, "rb"))


class _S3Object(io.RawIOBase):
    """An object of S3 as a file; it is the same object, by its ETag, in all reads."""

    def __init__(self, uri: str) -> None:
        import obstore
        from obstore.exceptions import PermissionDeniedError

        super().__init__()
        self._uri = uri
        bucket, _, self._key = uri.removeprefix("s3://").partition("/")
        self._store = s3_store(bucket, s3_endpoint())
        try:
            meta = obstore.head(self._store, self._key)
        except PermissionDeniedError as error:
            raise PermissionError(str(error)) from error
        self._size, self._e_tag, self._at = meta["size"], meta["e_tag"], 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readall(self) -> bytes:
        return self.read(max(self._size - self._at, 0)) or b""

    def readinto(self, buffer: Any) -> int:
        wanted = memoryview(buffer).cast("B")
        stop = min(self._at + len(wanted), self._size)
        if stop <= self._at:
            return 0
        data = self._read_range(self._at, stop)
        wanted[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _read_range(self, start: int, stop: int) -> memoryview:
        import obstore
        from obstore.exceptions import BaseError, PermissionDeniedError, PreconditionError

        problem: Exception | None = None
        for attempt in range(_READ_ATTEMPTS):
            if attempt:
                time.sleep(0.5 * 2**attempt)
            try:
                options: Any = {"range": (start, stop), "if_match": self._e_tag}
                data = memoryview(obstore.get(self._store, self._key, options=options).bytes())
            except (FileNotFoundError, PermissionDeniedError, PreconditionError) as error:
                raise StorageError(
                    "An object has changed while it was read.",
                    where=self._uri,
                    found=f"{type(error).__name__}: {error}",
                    remedy="Run the same command again, when nobody writes to it.",
                ) from error
            except (BaseError, OSError) as error:
                problem = error
                continue
            if len(data) == stop - start:
                return data
            problem = EOFError(f"{len(data)} bytes instead of {stop - start}")
        raise StorageError(
            "The object store fails after retries.",
            where=self._uri,
            found=f"{type(problem).__name__}: {problem}",
            remedy="Check AWS_ENDPOINT_URL, the credentials and the service; then run the same command again.",
        ) from problem


def list_folder(uri: str) -> list[str]:
    """Lists the names directly in a folder or prefix as URIs, hidden ones included, sorted; empty where it is not."""
    fs, root = filesystem(uri)
    with _translated(uri, "list this path"):
        try:
            names = fs.ls(root, detail=False)
        except FileNotFoundError:
            return []
    return sorted(join(uri, name.rstrip("/").rsplit("/", 1)[-1]) for name in names)


def modified_at(uri: str) -> datetime:
    """Returns when a file was last written, with its time zone."""
    fs, path = filesystem(uri)
    with _translated(uri, "look at this path"):
        found: datetime = fs.modified(path)
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def size(uri: str) -> int | None:
    """Returns a file's size in bytes; None where there is no such file."""
    fs, path = filesystem(uri)
    with _translated(uri, "look at this path"):
        try:
            return int(fs.size(path))
        except FileNotFoundError:
            return None


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


def s3_endpoint() -> str | None:
    """Returns the address of the S3 service where it is not Amazon's own."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


@lru_cache
def s3_store(bucket: str, endpoint: str | None, max_retries: int = 10, timeout_s: float = 30.0) -> S3Store:
    """Opens a bucket with botocore's credentials and region, so that obstore and s3fs see the same account.

    Args:
        bucket: Its name.
        endpoint: `s3_endpoint()`.
        max_retries: How often obstore itself repeats a request.
        timeout_s: Most seconds of one request.

    Raises:
        StorageError: There are no credentials.
    """
    import botocore.session
    from obstore.store import S3Store

    session = botocore.session.get_session()
    credentials = session.get_credentials()
    if credentials is None:
        raise StorageError(
            "There are no credentials for S3.",
            where=f"s3://{bucket}",
            expected="environment variables, a profile, or an instance role, as botocore finds them",
            remedy="Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE.",
        )

    def provide() -> S3Credential:
        frozen = credentials.get_frozen_credentials()  # botocore renews what expires
        ask_again = datetime.now(UTC) + _CREDENTIALS_LIFETIME
        found = {"access_key_id": frozen.access_key, "secret_access_key": frozen.secret_key, "expires_at": ask_again}
        return cast("S3Credential", found | ({"token": frozen.token} if frozen.token else {}))

    return S3Store(
        bucket,
        endpoint=endpoint,
        region=session.get_config_variable("region") or "us-east-1",
        client_options={
            "allow_http": bool(endpoint and endpoint.startswith("http://")),
            "timeout": timedelta(seconds=timeout_s),
        },
        retry_config={"max_retries": max_retries},
        credential_provider=provide,
    )
