"""What there is at a URI: whether, how large, since when, and which files lie below it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import chain, islice

from smallcap.errors import StorageError
from smallcap.storage.s3 import walk_objects
from smallcap.storage.uris import absolute, filesystem, is_glob, is_local, join, storage_errors

_SORTED_ENTRIES = 200_000  # a folder with more is listed in the order of its disk: names are not held in any number


def exists(uri: str) -> bool:
    """Says whether a file or folder exists at `uri`."""
    fs, path = filesystem(uri)
    with storage_errors(uri, "look at this path"):
        return bool(fs.exists(path))


def is_folder(uri: str) -> bool:
    """Says whether `uri` is a folder, or a prefix with objects below it."""
    fs, path = filesystem(uri)
    with storage_errors(uri, "look at this path"):
        return bool(fs.isdir(path))


def size(uri: str) -> int | None:
    """Returns a file's size in bytes; None where there is no such file."""
    fs, path = filesystem(uri)
    with storage_errors(uri, "look at this path"):
        try:
            return int(fs.size(path))
        except FileNotFoundError:
            return None


def modified_at(uri: str) -> datetime:
    """Returns when a file was last written, with its time zone."""
    fs, path = filesystem(uri)
    with storage_errors(uri, "look at this path"):
        found: datetime = fs.modified(path)
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def list_folder(uri: str) -> list[str]:
    """Lists the names directly in a folder or prefix as URIs, hidden ones included, sorted; empty where it is not."""
    fs, root = filesystem(uri)
    with storage_errors(uri, "list this path"):
        try:
            names = fs.ls(root, detail=False)
        except FileNotFoundError:
            return []
    return sorted(join(uri, name.rstrip("/").rsplit("/", 1)[-1]) for name in names)


def list_files(uri: str, suffixes: Sequence[str] = ()) -> list[str]:
    """Lists the files below a folder or prefix, sorted; see `iter_files`."""
    return sorted(iter_files(uri, suffixes))


def iter_files(uri: str, suffixes: Sequence[str] = ()) -> Iterator[str]:
    """Lists the files below a folder or prefix as a stream: memory does not grow with their number.

    A file's own URI lists as itself. Hidden files (a component starting with `.` or `_`) are left out, as Hadoop's
    readers do. Files are sorted, except in a local folder of more than 200,000 entries.

    Args:
        uri: Folder, prefix, glob pattern, or file.
        suffixes: Lower-case endings to keep, such as `(".jpg", ".png")`; all files when empty.

    Raises:
        StorageError: Nothing exists at `uri`, or the service fails.
    """
    root = fixed = absolute(uri)  # fixed: what of it every file's URI begins with
    if is_glob(root):
        fixed = root[: min(root.index(mark) for mark in "*?[" if mark in root)].rpartition("/")[0]
        found = _glob(root)
    elif is_local(root):
        found = _walk_local(root)
    elif root.startswith("s3://"):
        found = walk_objects(root)
    else:
        found = _find(root)
    endings = tuple(suffixes)
    any_file = False
    while True:
        with storage_errors(uri, "list this path"):  # not around the yield: a caller's errors are not the storage's
            path = next(found, None)
        if path is None:
            break
        any_file = True
        hidden = any(part.startswith((".", "_")) for part in path[len(fixed) :].split("/"))
        if not hidden and (not endings or path.lower().endswith(endings)):
            yield path
    if not any_file and not exists(uri):
        raise StorageError("Cannot list this path: it does not exist.", where=uri, remedy="Check the path.")


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


def _glob(root: str) -> Iterator[str]:
    fs, pattern = filesystem(root)
    yield from sorted(_uri(root, path) for path in fs.glob(pattern) if not fs.isdir(path))


def _find(root: str) -> Iterator[str]:
    fs, path = filesystem(root)
    yield from sorted(_uri(root, found) for found in fs.find(path))


def _uri(root: str, path: str) -> str:
    """Returns the URI of a path that a filesystem lists for `root`."""
    return path if is_local(root) else f"{root.split('://', 1)[0]}://{path}"
