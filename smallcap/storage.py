"""The doorway to storage: every URI that smallcap reads or writes goes through here.

Local paths, `s3://` (s3fs; the endpoint from AWS_ENDPOINT_URL) and any other fsspec URL look alike to the callers. The
hot path of fetching many small objects (`fetch_objects`) uses obstore for S3, asynchronously and without a HEAD request
each. This module knows nothing of images, indexes or schemas.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import fsspec
from fsspec.core import url_to_fs

from smallcap.errors import ErrorCode, RowError, RunError, StorageError

if TYPE_CHECKING:
    from obstore.store import S3Credential, S3Store

FETCH_CONCURRENCY = 64
_CHUNK_BYTES = 8 << 20
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
    try:
        # no cache of listings: other processes write to the same places
        fs, path = url_to_fs(absolute(uri), use_listings_cache=False)
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
        while not _update_s3(uri, update):
            pass
    else:
        write_bytes(uri, update(read_bytes(uri) if exists(uri) else None))


def _update_s3(uri: str, update: Callable[[bytes | None], bytes]) -> bool:
    """Returns whether the object was still the one that was read when it was replaced."""
    import obstore
    from obstore.exceptions import AlreadyExistsError, PreconditionError

    bucket, _, key = uri.removeprefix("s3://").partition("/")
    with _translated(uri, "write this file"):
        store = _s3_store(bucket, _s3_endpoint())
        try:
            response = obstore.get(store, key)
            found, e_tag = bytes(response.bytes()), response.meta["e_tag"]
        except FileNotFoundError:
            found, e_tag = None, None
        try:
            obstore.put(store, key, update(found), mode="create" if found is None else {"e_tag": e_tag})
        except (AlreadyExistsError, PreconditionError):
            return False
        return True


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
    """Lists the files below a folder or prefix, sorted; a file's own URI lists as itself.

    Hidden files (a component starting with `.` or `_`) are left out, as Hadoop's readers do.

    Args:
        uri: Folder, prefix, glob pattern, or file.
        suffixes: Lower-case endings to keep, such as `(".jpg", ".png")`; all files when empty.

    Raises:
        StorageError: Nothing exists at `uri`, or the service fails.
    """
    fs, root = filesystem(uri)
    with _translated(uri, "list this path"):
        if any(mark in root for mark in "*?["):
            found = [path for path in fs.glob(root) if not fs.isdir(path)]
        else:
            found = fs.find(root)
    if not found and not exists(uri):
        raise StorageError("Cannot list this path: it does not exist.", where=uri, remedy="Check the path.")
    prefix = "" if is_local(uri) else uri.split("://", 1)[0] + "://"
    kept = []
    for path in found:
        inside = path[len(root) :] if path.startswith(root) else path
        hidden = any(part.startswith((".", "_")) for part in inside.split("/") if part)
        if not hidden and (not suffixes or path.lower().endswith(tuple(suffixes))):
            kept.append(prefix + path)
    return sorted(kept)


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


def fetch_objects(uris: Sequence[str], concurrency: int = FETCH_CONCURRENCY) -> list[bytes | RowError]:
    """Fetches many objects at once; a missing or forbidden one becomes its row's error.

    Args:
        uris: Local paths, s3:// and other fsspec URIs in any mix.
        concurrency: Most requests in flight.

    Returns:
        For each URI, in order, its bytes or a `RowError` (`not_found`, `forbidden`).

    Raises:
        StorageError: The service itself fails (no such bucket, no credentials, retries used up).
    """
    results: dict[str, bytes | RowError] = {}
    on_s3 = sorted({uri for uri in uris if uri.startswith("s3://")})
    elsewhere = sorted({uri for uri in uris if not uri.startswith("s3://")})
    if on_s3:
        results.update(asyncio.run(_fetch_s3(on_s3, concurrency)))
    if elsewhere:
        with ThreadPoolExecutor(max_workers=min(concurrency, len(elsewhere))) as pool:
            results.update(zip(elsewhere, pool.map(_fetch_one, elsewhere), strict=True))
    return [results[uri] for uri in uris]


def _fetch_one(uri: str) -> bytes | RowError:
    try:
        if is_local(uri):
            return Path(absolute(uri)).read_bytes()
        fs, path = filesystem(uri)
        return bytes(fs.cat_file(path))
    except FileNotFoundError:
        return RowError(ErrorCode.NOT_FOUND, "There is no such image.", where=uri)
    except IsADirectoryError:
        return RowError(ErrorCode.NOT_FOUND, "This is a folder, not an image.", where=uri)
    except PermissionError:
        return RowError(ErrorCode.FORBIDDEN, "The image may not be read with these credentials.", where=uri)
    except StorageError:
        raise
    except Exception as error:
        raise StorageError("Cannot fetch images.", where=uri, found=f"{type(error).__name__}: {error}") from error


async def _fetch_s3(uris: Iterable[str], concurrency: int) -> dict[str, bytes | RowError]:
    gate = asyncio.Semaphore(concurrency)
    endpoint = _s3_endpoint()

    async def fetch(uri: str) -> tuple[str, bytes | RowError]:
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        async with gate:
            return uri, await _get_s3_object(_s3_store(bucket, endpoint), uri, key)

    return dict(await asyncio.gather(*(fetch(uri) for uri in uris)))


def _s3_endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


@lru_cache
def _s3_store(bucket: str, endpoint: str | None) -> S3Store:
    """Opens a bucket with botocore's credentials and region, so that fetching and s3fs see the same account."""
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
        client_options={"allow_http": bool(endpoint and endpoint.startswith("http://"))},
        credential_provider=provide,
    )


async def _get_s3_object(store: S3Store, uri: str, key: str) -> bytes | RowError:
    from obstore.exceptions import PermissionDeniedError

    try:
        response = await store.get_async(key)
        return bytes(await response.bytes_async())
    except FileNotFoundError as error:
        if "NoSuchBucket" in str(error):
            raise StorageError("The bucket does not exist.", where=uri, remedy="Check the bucket's name.") from error
        return RowError(ErrorCode.NOT_FOUND, "There is no such image.", where=uri)
    except PermissionDeniedError:
        return RowError(ErrorCode.FORBIDDEN, "The image may not be read with these credentials.", where=uri)
    except Exception as error:
        raise StorageError(
            "The object store fails after retries.",
            where=uri,
            found=f"{type(error).__name__}: {error}",
            remedy="Check AWS_ENDPOINT_URL, the credentials and the service; then run the same command again.",
        ) from error
