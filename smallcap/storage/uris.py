"""URIs and what opens them: an fsspec filesystem for each, and one error for all that its client may raise."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import fsspec
from fsspec.core import url_to_fs

from smallcap.errors import RunError, StorageError

S3_RETRIES = 6  # with botocore's growing waits about half a minute; s3fs repeats some calls once more by itself


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


def is_glob(uri: str) -> bool:
    """Says whether a URI is a pattern of names."""
    return any(mark in uri for mark in "*?[")


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Returns the fsspec filesystem of a URI and the path inside it.

    Raises:
        StorageError: The protocol is unknown, or its package is missing.
    """
    # The endpoint is named, so that fsspec keeps no filesystem of another endpoint for it.
    s3_options = {"endpoint_url": s3_endpoint(), "config_kwargs": {"retries": {"max_attempts": S3_RETRIES}}}
    try:
        # no cache of listings: other processes write to the same places
        fs, path = url_to_fs(absolute(uri), use_listings_cache=False, **(s3_options if uri.startswith("s3://") else {}))
    except (ValueError, ImportError) as error:
        raise StorageError(
            "Cannot open this kind of URI.",
            where=uri,
            found=str(error),
            remedy="Use a local path, s3://…, or install the fsspec package of that protocol.",
        ) from error
    return fs, path


def s3_endpoint() -> str | None:
    """Returns the address of the S3 service where it is not Amazon's own."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


@contextmanager
def storage_errors(uri: str, doing: str) -> Iterator[None]:
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
