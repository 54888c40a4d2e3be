"""Makes one request for one object, from a local disk, an object store, a web server or any fsspec filesystem.

The many exceptions of each client become one `FetchFailure` that says whether another attempt may help. A failure of
the whole place (no such bucket, refused credentials) is a `StorageError` at once. This module knows nothing of
attempts, waiting and concurrency; `smallcap.images.fetching` does.
"""

from __future__ import annotations

import asyncio
import errno
import re
import socket
import stat
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from smallcap import patience, storage
from smallcap.errors import ErrorCode, StorageError
from smallcap.hub import is_on_hub, web_address
from smallcap.images.list_places import REFUSED
from smallcap.images.public_addresses import PrivateAddressError, private_address_in
from smallcap.local_files import local_path
from smallcap.s3 import is_plain_key, s3_endpoint, s3_store
from smallcap.storage_faults import (
    OF_THE_PLACE,
    WORTH_REPEATING,
    Cause,
    Fault,
    brief,
    diagnose,
    error_of,
)

if TYPE_CHECKING:
    import aiohttp
    from obstore.store import ObjectStore

LOCAL = "local"
_OBJECT_STORES = ("s3", "gs", "az")
_WEB = ("http", "https")
_CHUNK_BYTES = 256 << 10
_NOT_IN_HTTP = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # names on disks and in object stores may have them
_BUCKET = re.compile(r"[A-Za-z0-9$][A-Za-z0-9$._-]*")
_SLOW_DOWN = {429, 503}
_WEB_IN_CHAIN = re.compile("(?:^|::)https?://", re.IGNORECASE)  # fsspec's own client looks at no address
_ALLOW_HOSTS = "--allow-private-hosts (allow_private_hosts=True in Python) reads it all the same"


@dataclass(eq=False)
class FetchFailure(Exception):  # noqa: N818 - an outcome to be weighed, not an error to be shown
    """One request for one object failed."""

    code: ErrorCode  # the code of the row's error
    what: str  # one sentence for people
    repeat: bool = field(default=False, kw_only=True)  # whether another attempt may help
    retry_after_s: float | None = field(default=None, kw_only=True)  # how long the server asks to wait
    slow_down: bool = field(default=False, kw_only=True)  # whether the server asks for fewer requests
    fault: Fault | None = field(default=None, kw_only=True)  # of an object store or a disk


def place_of(uri: str) -> str:
    """Returns the place of a URI: `local`, or its scheme and its bucket or host, such as `s3://bucket`."""
    return LOCAL if storage.is_local(uri) else patience.place_of(uri)


def is_object_store(place: str) -> bool:
    """Says whether a place is a bucket, without which a run is of no use; a list has many other servers."""
    return place.split("://", 1)[0] in (*_OBJECT_STORES, "hf")


class Sources:
    """Gets objects from everywhere; belongs to one asyncio loop.

    Args:
        executor: The executor that runs blocking reads.
        open_session: A function that opens a session for the web, on first use; it is told whether the session may
            reach public addresses only.
        timeout_s: The time limit of one request to an object store.
        max_bytes: The most bytes of an object; a larger one is `too_large`.
        private_hosts: Whether URLs may lead to addresses that are not public.
    """

    def __init__(
        self,
        executor: Executor,
        open_session: Callable[[bool], aiohttp.ClientSession],
        timeout_s: float,
        max_bytes: int,
        private_hosts: bool = False,
    ) -> None:
        self._executor, self._open_session = executor, open_session
        self._timeout_s, self._max_bytes, self._private_hosts = timeout_s, max_bytes, private_hosts
        self._sessions: dict[bool, aiohttp.ClientSession] = {}  # by whether they reach public addresses only

    async def close(self) -> None:
        """Closes connections to web servers."""
        for session in self._sessions.values():
            await session.close()

    async def get(self, uri: str) -> bytes:
        """Returns the bytes of one object, after one request.

        Raises:
            FetchFailure: The object could not be got.
            StorageError: No object of its place can be got.
        """
        if not uri:
            raise FetchFailure(ErrorCode.INVALID_URI, "This row of the list has no URI, or cannot be read.")
        if uri.startswith(REFUSED):
            raise FetchFailure(ErrorCode.FORBIDDEN, _refusal(uri))
        scheme = place_of(uri).partition("://")[0]
        if scheme in _WEB:
            if _NOT_IN_HTTP.search(uri):
                raise FetchFailure(ErrorCode.INVALID_URI, "The URI contains line breaks or control characters.")
            return await self._get_from_web(uri, public_only=not self._private_hosts)
        if is_on_hub(uri) and (address := _hub_address(uri)):  # fsspec would list the file's folder first
            return await self._get_from_web(*address)  # the Hub's address is the environment's, not the list's
        if scheme in _OBJECT_STORES:
            bucket, _, key = uri.split("://", 1)[1].partition("/")
            if not key or not _BUCKET.fullmatch(bucket):
                raise FetchFailure(ErrorCode.INVALID_URI, f"This is not {scheme}://BUCKET/KEY.")
            if is_plain_key(key):
                return await self._get_from_object_store(scheme, bucket, key)
        if not self._private_hosts and _WEB_IN_CHAIN.search(uri):
            raise FetchFailure(
                ErrorCode.FORBIDDEN, f"Which host a chained URL leads to is not checked; {_ALLOW_HOSTS}."
            )
        read = _read_local if scheme == LOCAL else _read_by_fsspec
        return await asyncio.get_running_loop().run_in_executor(self._executor, read, uri, self._max_bytes)

    async def _get_from_object_store(self, scheme: str, bucket: str, key: str) -> bytes:
        endpoint = s3_endpoint() if scheme == "s3" else None
        try:
            store = object_store(scheme, bucket, endpoint, self._timeout_s)
            response = await store.get_async(key)
            _check_size(response.meta["size"], self._max_bytes)
            return bytes(await response.bytes_async())  # obstore raises for fewer bytes than announced
        except (FetchFailure, StorageError):
            raise
        except Exception as error:  # obstore tells most things only in the text
            raise _object_store_failure(error, f"{scheme}://{bucket}/{key}", endpoint) from error

    async def _get_from_web(self, uri: str, headers: dict[str, str] | None = None, public_only: bool = False) -> bytes:
        import aiohttp
        from yarl import URL

        if public_only not in self._sessions:
            self._sessions[public_only] = self._open_session(public_only)
        try:
            # A signed URL must arrive unchanged; only what HTTP cannot carry is quoted.
            url = URL(uri, encoded=uri.isascii() and " " not in uri)
            async with self._sessions[public_only].get(url, headers=headers) as response:
                _check_status(response.status, response.reason or "", response.headers.get("Retry-After"))
                _check_size(response.content_length or 0, self._max_bytes)
                body = bytearray()
                async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
                    body += chunk
                    _check_size(len(body), self._max_bytes)
                return bytes(body)
        except (aiohttp.InvalidURL, ValueError) as error:
            raise FetchFailure(ErrorCode.INVALID_URI, f"This is not a web address: {error}") from error
        except (aiohttp.ClientConnectorCertificateError, aiohttp.TooManyRedirects) as error:
            raise FetchFailure(ErrorCode.UNAVAILABLE, f"The server cannot be used: {_reason(error)}.") from error
        except TimeoutError:
            raise
        except (aiohttp.ClientError, PrivateAddressError) as error:
            if (address := private_address_in(error)) is not None:
                what = f"The address {address} is not one of the public internet; {_ALLOW_HOSTS}."
                raise FetchFailure(ErrorCode.FORBIDDEN, what) from error
            raise FetchFailure(ErrorCode.UNAVAILABLE, f"The server failed: {_reason(error)}.", repeat=True) from error


def _refusal(uri: str) -> str:
    named = uri.removeprefix(REFUSED)
    kind = "a path of this machine" if storage.is_local(named) else "a URL of this kind"
    return f"A list that comes from storage or the web may not name {kind}; --trust-lists, in a new run, reads it."


def _hub_address(uri: str) -> tuple[str, dict[str, str]] | None:
    try:
        return web_address(uri)
    except StorageError as error:
        raise FetchFailure(ErrorCode.INVALID_URI, f"{error.what} {error.remedy}".rstrip()) from error


def _reason(error: BaseException) -> str:
    return diagnose(error).describe()


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise FetchFailure(ErrorCode.TOO_LARGE, f"The file has {size:,} bytes or more; at most {max_bytes:,} are read.")


def _check_status(status: int, reason: str, retry_after: str | None) -> None:
    if status < 300:
        return
    answer = f"The server answers {status} {reason}.".replace(" .", ".")
    if status in (404, 410):
        raise FetchFailure(ErrorCode.NOT_FOUND, answer)
    if status in (401, 403, 407, 451):
        raise FetchFailure(ErrorCode.FORBIDDEN, answer)
    raise FetchFailure(
        ErrorCode.UNAVAILABLE,
        answer,
        repeat=status in WORTH_REPEATING,
        retry_after_s=_seconds(retry_after),
        slow_down=status in _SLOW_DOWN,
    )


def _seconds(retry_after: str | None) -> float | None:
    """Reads a Retry-After header: seconds, or a date."""
    if retry_after is None:
        return None
    if retry_after.strip().isdigit():
        return float(retry_after)
    try:
        when = parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    return max(0.0, (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def _read_local(uri: str, max_bytes: int) -> bytes:
    try:
        path = local_path(storage.absolute(uri))
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would never end
            raise FetchFailure(ErrorCode.NOT_FOUND, "This is a folder or a device, not a file.")
        _check_size(status.st_size, max_bytes)
        return path.read_bytes()
    except ValueError as error:  # a null character
        raise FetchFailure(ErrorCode.INVALID_URI, f"This is not a path: {error}.") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FetchFailure(ErrorCode.NOT_FOUND, "The image does not exist.") from error
    except PermissionError as error:
        raise FetchFailure(ErrorCode.FORBIDDEN, "This user may not read the image.") from error
    except OSError as error:  # a name that is too long is malformed; a network disk may come back
        if error.errno == errno.ENAMETOOLONG:
            raise FetchFailure(ErrorCode.INVALID_URI, f"This is not a path: {error.strerror}") from error
        fault = diagnose(error)
        what = f"The disk failed: {fault.describe()}."
        raise FetchFailure(ErrorCode.UNAVAILABLE, what, repeat=True, fault=fault) from error


def _read_by_fsspec(uri: str, max_bytes: int) -> bytes:
    try:
        fs, path = storage.filesystem(uri)
    except StorageError as error:
        cause = error.__cause__
        unreached = getattr(cause, "errno", None) in (errno.EHOSTUNREACH, errno.ENETUNREACH)
        if cause is not None and (unreached or isinstance(cause, ConnectionError | TimeoutError | socket.gaierror)):
            raise FetchFailure(ErrorCode.UNAVAILABLE, f"The service failed: {_reason(cause)}.", repeat=True) from error
        raise FetchFailure(ErrorCode.INVALID_URI, f"URIs of this kind cannot be read: {error.found}.") from error
    try:
        _check_size(int(fs.size(path) or 0), max_bytes)
        return bytes(fs.cat_file(path))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise FetchFailure(ErrorCode.NOT_FOUND, "The image does not exist.") from error
    except PermissionError as error:
        raise FetchFailure(ErrorCode.FORBIDDEN, "These credentials may not read the image.") from error
    except FetchFailure:
        raise
    except Exception as error:  # the errors of filesystems have no common base class
        fault = diagnose(error)
        what = f"The service failed: {fault.describe()}."
        raise FetchFailure(ErrorCode.UNAVAILABLE, what, repeat=True, fault=fault) from error


@lru_cache
def object_store(scheme: str, bucket: str, endpoint: str | None, timeout_s: float) -> ObjectStore:
    """Opens a bucket without obstore's retries, which would not be counted; see `smallcap.s3.s3_store`."""
    if scheme == "s3":
        return s3_store(bucket, endpoint, max_retries=0, timeout_s=timeout_s)
    from obstore.exceptions import BaseError
    from obstore.store import AzureStore, GCSStore

    # HTTP without TLS is used only where someone has configured such an endpoint.
    client_options = {"timeout": timedelta(seconds=timeout_s), "allow_http": True}
    options: Any = {"client_options": client_options, "retry_config": {"max_retries": 0}}
    try:
        return GCSStore(bucket, **options) if scheme == "gs" else AzureStore(bucket, **options)
    except (BaseError, ValueError) as error:
        fault = Fault(Cause.BAD_PROFILE, brief(error))
        raise error_of(fault, "open this bucket", f"{scheme}://{bucket}") from error


def _object_store_failure(error: Exception, uri: str, endpoint: str | None) -> FetchFailure:
    """Says what an obstore error means for its object.

    Raises:
        StorageError: It means as much for all others.
    """
    fault = diagnose(error)
    if fault.cause in OF_THE_PLACE:
        raise error_of(fault, "fetch images", uri, endpoint) from error
    if fault.cause is Cause.MISSING:
        return FetchFailure(ErrorCode.NOT_FOUND, "The image does not exist.")
    if fault.cause is Cause.FORBIDDEN:
        answer = f" ({fault.code})" if fault.code else ""
        return FetchFailure(ErrorCode.FORBIDDEN, f"These credentials may not read the image{answer}.")
    if fault.cause is Cause.TIMEOUT:
        return FetchFailure(ErrorCode.TIMEOUT, "The object store did not answer in time.", repeat=True, fault=fault)
    return FetchFailure(
        ErrorCode.UNAVAILABLE,
        f"The object store failed: {fault.describe()}.",
        repeat=fault.status is None or fault.passes,
        slow_down=fault.status in _SLOW_DOWN,
        fault=fault,
    )
