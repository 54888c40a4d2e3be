"""The Hugging Face Hub as storage, `hf://`: what is read there, the addresses of its files, and why nothing runs there.

huggingface_hub does the requests. It takes the service's address from HF_ENDPOINT and the token from HF_TOKEN, or from
the file that `hf auth login` leaves. This module knows nothing of images and data sets.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from smallcap.errors import StorageError

if TYPE_CHECKING:
    import fsspec
    from huggingface_hub import HfUri

_SCHEME = "hf://"
_FORMS = "hf://datasets/USER/NAME[@REVISION]/PATH, hf://USER/MODEL/PATH or hf://buckets/USER/NAME/PATH"


def is_on_hub(uri: str) -> bool:
    """Says whether a URI names something on the Hub."""
    return uri.startswith(_SCHEME)


def hub_endpoint() -> str | None:
    """Returns the address of the Hub where another one is set than Hugging Face's own."""
    return os.environ.get("HF_ENDPOINT") or None


def parse_hub_uri(uri: str) -> HfUri:
    """Returns the repository, the revision and the path of a URI.

    Raises:
        StorageError: It has no such form, or huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import parse_hf_uri
        from huggingface_hub.errors import HfUriError
    except ImportError as error:
        raise StorageError(
            "Reading from the Hugging Face Hub needs the package huggingface_hub, version 2 or newer.",
            where=uri,
            found=str(error),
            remedy="pip install 'smallcap[hf]' on every node",
        ) from error
    try:
        return parse_hf_uri(uri)
    except HfUriError as error:
        raise StorageError("This is no place on the Hugging Face Hub.", where=uri, expected=_FORMS) from error


def hub_filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Returns the fsspec filesystem of the Hub and the path inside it; errors are those of `parse_hub_uri`."""
    parse_hub_uri(uri)
    from huggingface_hub import HfFileSystem, get_token

    # With both named, the filesystem of another service or token, and what it remembers, is not used again.
    return HfFileSystem(endpoint=hub_endpoint(), token=get_token()), uri.removeprefix(_SCHEME).rstrip("/")


def kind_on_hub(fs: fsspec.AbstractFileSystem, path: str) -> str | None:
    """Returns `file`, `directory`, or None where nothing is; the filesystem's own answers take a failure for nothing.

    Raises:
        OSError: The service fails, or there is no such repository.
    """
    try:
        return str(fs.info(path)["type"])
    except FileNotFoundError as error:
        if error.__cause__ is not None:  # the repository itself cannot be found
            raise
        return None


def web_address(uri: str) -> tuple[str, dict[str, str]] | None:
    """Returns the web address of a file of a repository and the headers of a request; None for a bucket's file.

    Raises:
        StorageError: The URI names no file.
    """
    place = parse_hub_uri(uri)
    from huggingface_hub import get_token, hf_hub_url

    if place.is_bucket:
        return None
    if not place.path_in_repo:
        raise StorageError("This names a repository, and no file.", where=uri, expected=_FORMS)
    url = hf_hub_url(
        place.id, place.path_in_repo, repo_type=place.type, revision=place.revision, endpoint=hub_endpoint()
    )
    token = get_token()
    return url, {"Authorization": f"Bearer {token}"} if token else {}


def check_writable(uri: str) -> str:
    """Returns a URI at which a job may write.

    Raises:
        StorageError: It is on the Hub. There each file is a commit: those of many workers would refuse each other, and
            a file cannot be replaced on the condition that nobody else has done so.
    """
    if is_on_hub(uri):
        raise StorageError(
            "Nothing can be written to the Hugging Face Hub while a job runs: each file would be a commit there, and "
            "the workers' commits would refuse each other.",
            where=uri,
            expected="a local path, s3://…, or another object store",
            remedy="Write there; then smallcap export OUT --to hf --out hf://datasets/USER/NAME makes one commit of "
            "a run's captions.",
        )
    return uri
