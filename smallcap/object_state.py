"""What tells whether a file or object was overwritten since it was listed: its size, and its etag or time of change."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# As filesystems call it, the surest first: a time may have whole seconds only.
VERSIONS = ("e_tag", "ETag", "etag", "md5Hash", "generation", "mtime", "last_modified", "LastModified", "updated")
_SIZES = ("size", "Size")


class ListedUri(str):
    """A URI as a listing gave it, with the object's state."""

    __slots__ = ("state",)
    state: str | None

    @classmethod
    def of(cls, uri: str, entry: Mapping[str, Any]) -> ListedUri:
        """Returns the URI of an entry of a listing."""
        listed = cls(uri)
        version = next((entry[name] for name in VERSIONS if entry.get(name) is not None), None)
        size = next((entry[name] for name in _SIZES if entry.get(name) is not None), None)
        listed.state = None if version is None else _state(size, str(version).strip('"'))
        return listed


def state_of(uri: str, path: Path | None) -> str | None:
    """Returns the state of an object; None where its listing did not tell.

    Args:
        uri: Its URI, from the listing.
        path: The file's path, if it is local.
    """
    if path is None:
        return uri.state if isinstance(uri, ListedUri) else None
    try:
        status = path.stat()
    except OSError:  # it is gone, or a link to nothing: reading it says so
        return None
    return _state(status.st_size, str(status.st_mtime_ns))


def _state(size: object, version: str) -> str:
    return f"{size} {version}"
