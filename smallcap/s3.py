"""S3 operations that s3fs lacks or does slowly: streamed listings, ranged reads of one object, conditional writes.

obstore does them with botocore's credentials, so that both clients see the same account. docs/log.md compares their
times for the same requests.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import IO, TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from smallcap.errors import StorageError
from smallcap.object_state import ListedUri
from smallcap.patience import Wait, ride_out
from smallcap.storage_faults import OF_THE_PLACE, Cause, brief, diagnose, error_of, storage_error

if TYPE_CHECKING:
    from obstore.store import S3Credential, S3Store

S3_RETRIES = 2  # of the clients themselves, which say nothing of it; `smallcap.patience` does the waiting
_LISTING = "list this path"
_WRITER = "smallcap-writer"  # S3 metadata of an object that several processes may replace
_CREDENTIALS_LIFETIME = timedelta(minutes=5)  # after which botocore is asked whether they are still valid


def s3_endpoint() -> str | None:
    """Returns the address of the S3 service; None for Amazon's.

    Raises:
        StorageError: What is set is not an address; obstore would end in a panic of Rust's.
    """
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint and not _is_address(endpoint):
        raise StorageError(
            "The endpoint of S3 is not an address.",
            where="AWS_ENDPOINT_URL_S3" if os.environ.get("AWS_ENDPOINT_URL_S3") else "AWS_ENDPOINT_URL",
            expected="http://HOST:PORT or https://HOST",
            found=repr(endpoint),
        )
    return endpoint


def s3fs_options() -> dict[str, Any]:
    """Returns the options of s3fs; with the endpoint named, fsspec does not use the filesystem of another endpoint."""
    return {"endpoint_url": s3_endpoint(), "config_kwargs": {"retries": {"max_attempts": S3_RETRIES}}}


@lru_cache
def _is_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and text.split() == [text]
    except ValueError:  # a port that is none
        return False


@lru_cache
def s3_store(bucket: str, endpoint: str | None, max_retries: int = S3_RETRIES, timeout_s: float = 30.0) -> S3Store:
    """Opens a bucket with botocore's credentials and region, so that obstore and s3fs see the same account.

    Args:
        bucket: The bucket's name.
        endpoint: The service's address, as `s3_endpoint` returns it.
        max_retries: How often obstore itself repeats a request.
        timeout_s: Seconds that one request may take.

    Raises:
        StorageError: There are no credentials, or they cannot be looked for.
    """
    from obstore.store import S3Store

    credentials, region = _credentials(bucket, endpoint)

    def provide() -> S3Credential:
        frozen = credentials.get_frozen_credentials()  # botocore renews what expires
        ask_again = datetime.now(UTC) + _CREDENTIALS_LIFETIME
        fields = {"access_key_id": frozen.access_key, "secret_access_key": frozen.secret_key, "expires_at": ask_again}
        return cast("S3Credential", fields | ({"token": frozen.token} if frozen.token else {}))

    return S3Store(
        bucket,
        endpoint=endpoint,
        region=region,
        client_options={
            "allow_http": bool(endpoint and endpoint.startswith("http://")),
            "timeout": timedelta(seconds=timeout_s),
        },
        retry_config={"max_retries": max_retries},
        credential_provider=provide,
    )


def _credentials(bucket: str, endpoint: str | None) -> tuple[Any, str]:
    """Returns botocore's credentials and region; errors are those of `s3_store`."""
    import botocore.session
    from botocore.exceptions import BotoCoreError

    session = botocore.session.get_session()
    try:
        credentials = session.get_credentials()
    except BotoCoreError as error:  # a profile that does not exist, half of a key …
        raise storage_error(error, "open this bucket", f"s3://{bucket}", endpoint) from error
    if credentials is None:
        raise StorageError(
            "There are no credentials for S3.",
            where=f"s3://{bucket}",
            expected="environment variables, a profile, or an instance role, as botocore finds them",
            remedy="Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE.",
        )
    return credentials, os.environ.get("AWS_REGION") or session.get_config_variable("region") or "us-east-1"


def s3_settings(uri: str) -> dict[str, str]:
    """Returns what other clients of S3 need for a URI to see the same account, in the names of the environment.

    Temporary credentials are not renewed. Elsewhere than on S3 there are no settings.

    Raises:
        StorageError: There are no credentials, or they cannot be looked for.
    """
    if not uri.startswith("s3://"):
        return {}
    endpoint = s3_endpoint()
    credentials, region = _credentials(uri.removeprefix("s3://").partition("/")[0], endpoint)
    try:
        frozen = credentials.get_frozen_credentials()
    except Exception as error:  # botocore's, or of the program that it has make the credentials
        raise storage_error(error, "get credentials", uri, endpoint) from error
    settings = {
        "AWS_ACCESS_KEY_ID": frozen.access_key,
        "AWS_SECRET_ACCESS_KEY": frozen.secret_key,
        "AWS_SESSION_TOKEN": frozen.token,
        "AWS_REGION": region,
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true" if endpoint and endpoint.startswith("http://") else None,
    }
    return {name: value for name, value in settings.items() if value}


def is_plain_key(key: str) -> bool:
    """Says whether obstore takes a key as it is: one without control characters and without empty or dot segments."""
    segments = key.split("/")
    return not {"", ".", ".."}.intersection(segments) and not any(
        ord(letter) < 32 or letter == "\x7f" for letter in key
    )


def open_bucket(uri: str) -> tuple[S3Store, str]:
    """Returns the bucket of an `s3://` URI, and the key in it."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return s3_store(bucket, s3_endpoint()), key


def walk_objects(root: str) -> Iterator[str]:
    """Yields the URIs of the objects below a prefix, or of a single object, sorted.

    Args:
        root: A prefix, or an object.
    """
    import obstore
    from obstore.exceptions import InvalidPathError

    store, key = open_bucket(root)
    bucket = root.removesuffix(key).rstrip("/")
    uri = ""
    if key and not is_plain_key(key):
        yield from _list_all(bucket, key)
        return
    try:
        for page in _pages(store, key, root):
            for entry in page:
                uri = f"{bucket}/{entry['path']}"
                yield ListedUri.of(uri, entry)
    except InvalidPathError:  # a key that is not plain
        yield from (found for found in _list_all(bucket, key) if found > uri)
        return
    if not uri and key and not root.endswith("/"):
        with suppress(FileNotFoundError):
            yield ListedUri.of(root, ride_out(root, _LISTING, lambda: obstore.head(store, key)))


def _pages(store: S3Store, key: str, root: str) -> Iterator[Any]:
    """Yields the pages of a listing; one that breaks off goes on after the last object that was listed."""
    import obstore

    pages: Any = None
    last: str | None = None

    def next_page() -> Any:
        nonlocal pages
        if pages is None:
            pages = iter(obstore.list(store, key or None, offset=last, chunk_size=1000))
        try:
            return next(pages, None)
        except Exception:
            pages = None
            raise

    while page := ride_out(root, _LISTING, next_page):
        last = page[-1]["path"]
        yield page


def _list_all(bucket: str, key: str) -> Iterator[str]:
    """Yields the URIs of an object and of those below it, whatever their keys are, in the order of the keys."""
    import botocore.session

    client = botocore.session.get_session().create_client("s3", endpoint_url=s3_endpoint())
    name = bucket.removeprefix("s3://")

    def listed(**options: Any) -> Any:
        return ride_out(f"{bucket}/{key}", _LISTING, lambda: client.list_objects_v2(Bucket=name, **options))

    if key:
        first = listed(Prefix=key, MaxKeys=1).get("Contents", [])
        yield from (ListedUri.of(f"{bucket}/{key}", entry) for entry in first if entry["Key"] == key)
    last = ""
    while True:
        page = listed(Prefix=f"{key}/" if key else "", **({"StartAfter": last} if last else {}))
        for entry in page.get("Contents", []):
            last = entry["Key"]
            yield ListedUri.of(f"{bucket}/{last}", entry)
        if not page.get("IsTruncated"):
            return


def read_object_tail(uri: str, length: int) -> bytes:
    """Reads the last bytes of an object, or all of them if there are fewer, with one request."""
    import obstore
    from obstore.exceptions import BaseError

    store, key = open_bucket(uri)
    try:
        return bytes(obstore.get(store, key, options={"range": {"suffix": length}}).bytes())
    except BaseError:
        if obstore.head(store, key)["size"] == 0:  # S3 serves no range of an empty object
            return b""
        raise


def error_of_reading(uri: str) -> Exception | None:
    """Reads the first byte of an object, or lists a bucket; the exception says what the answer to HEAD cannot say."""
    import obstore
    from obstore.exceptions import BaseError

    store, key = open_bucket(uri)
    try:
        if key and is_plain_key(key):
            obstore.get(store, key, options={"range": (0, 1)}).bytes()
        else:
            next(iter(obstore.list(store)), None)
    except (BaseError, OSError) as error:
        return error
    return None


def update_object(uri: str, update: Callable[[bytes | None], bytes], signature: str) -> None:
    """Replaces an object only if it is still the one that was read; starts again if it is not.

    A write whose answer was lost may have taken place, so each writer signs its object and looks for its signature
    before it writes again.

    Args:
        uri: The object.
        update: Turns the current content, or `None` if there is none, into the new one.
        signature: The writer's; when the update is tried again, the same.
    """
    import obstore
    from obstore.exceptions import AlreadyExistsError, PreconditionError

    store, key = open_bucket(uri)
    while True:
        content, e_tag = None, None
        with suppress(FileNotFoundError):
            response = obstore.get(store, key)
            if response.attributes.get(_WRITER) == signature:
                return
            content, e_tag = bytes(response.bytes()), response.meta["e_tag"]
        mode: Any = "create" if content is None else {"e_tag": e_tag}
        with suppress(AlreadyExistsError, PreconditionError):
            obstore.put(store, key, update(content), mode=mode, attributes={_WRITER: signature})
            return


def open_object(uri: str, buffer_bytes: int) -> IO[bytes]:
    """Opens an object for reading in ranges; see `smallcap.storage.open_ranged`."""
    raw = _ObjectFile(uri)
    return io.BufferedReader(raw, buffer_bytes) if buffer_bytes else cast("IO[bytes]", raw)


class _ObjectFile(io.RawIOBase):
    """An S3 object as a file; its ETag ensures that all reads see the same object."""

    def __init__(self, uri: str) -> None:
        import obstore
        from obstore.exceptions import PermissionDeniedError

        super().__init__()
        self._uri = uri
        self._store, self._key = open_bucket(uri)
        try:
            meta = obstore.head(self._store, self._key)
        except PermissionDeniedError as error:
            raise PermissionError(str(error)) from error
        except FileNotFoundError as error:
            raise error_of_reading(uri) or error from error  # it may be the bucket that does not exist
        self._size, self._e_tag, self._position = meta["size"], meta["e_tag"], 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        return self._position

    def readall(self) -> bytes:
        return self.read(max(self._size - self._position, 0)) or b""

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        stop = min(self._position + len(view), self._size)
        if stop <= self._position:
            return 0
        data = self._read_range(self._position, stop)
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _read_range(self, start: int, stop: int) -> memoryview:
        import obstore
        from obstore.exceptions import PermissionDeniedError, PreconditionError

        options: Any = {"range": (start, stop)} | ({"if_match": self._e_tag} if self._e_tag else {})

        def read() -> memoryview:
            data = memoryview(obstore.get(self._store, self._key, options=options).bytes())
            if len(data) < stop - start:
                raise ConnectionResetError(f"{len(data)} bytes instead of {stop - start}")
            return data

        doing = "read this file"
        wait = Wait(self._uri, doing)
        try:
            return wait.repeat(read)
        except Exception as error:
            fault = diagnose(error)
            if fault.cause is Cause.MISSING or isinstance(error, PreconditionError):
                raise StorageError(
                    "The object changed while it was read.",
                    where=self._uri,
                    found=brief(error),
                    remedy="Run the same command again when nobody writes to the object.",
                ) from error
            of_object = PermissionError(str(error)) if isinstance(error, PermissionDeniedError) else error
            cause = None if fault.cause in OF_THE_PLACE else of_object
            raise error_of(fault, doing, self._uri, s3_endpoint(), wait.describe()) from cause
