"""Files on local disks: folders and links walked in order, patterns, names that are not text, and empty folders."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path

_MARKS = "*?["  # of a pattern
_ESCAPED_BYTE = re.compile(rb"\\x([89a-f][0-9a-f])")
_SORTED_ENTRIES = 200_000  # a larger folder is listed in disk order, so that memory stays bounded


def has_marks(name: str) -> bool:
    """Says whether a name may be a pattern."""
    return any(mark in name for mark in _MARKS)


def fixed_part(pattern: str, is_folder: Callable[[str], bool]) -> str:
    r"""Returns the folder in which a pattern begins; one that exists may have marks in its name."""
    parts = pattern.split("/")
    for count in range(len(parts) - 1, 0, -1):
        folder = "/".join(parts[:count])
        if not has_marks(folder) or is_folder(folder):
            return folder
    return ""


def as_text(path: str) -> str:
    r"""Returns a path as text; a byte of it that is not UTF-8 becomes \xNN, which `local_path` understands."""
    return os.fsencode(path).decode(errors="backslashreplace")


def local_path(path: str) -> Path:
    """Returns the path of a file, as it is or as `as_text` gave it; the file need not exist.

    Raises:
        ValueError: It has a null character.
    """
    if "\\x" not in path or os.path.lexists(path):
        return Path(path)
    return Path(os.fsdecode(_ESCAPED_BYTE.sub(lambda found: bytes.fromhex(found[1].decode()), path.encode())))


def is_below(path: str, folder: Path) -> bool:
    """Says whether a path, or a `file://` URI, is that of a folder, or of something in it, by any links."""
    return "://" not in (plain := path.removeprefix("file://")) and local_path(plain).resolve().is_relative_to(folder)


def walk(root: str, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[str]:
    """Yields the files below a folder as text, in the order of their whole paths unless a folder is huge.

    Links to folders are followed, except to one that they lie in.

    Args:
        root: A folder, or a file.
        above: Device and inode of the folders that `root` lies in.
    """
    root = str(local_path(root))
    if os.path.isfile(root):
        yield as_text(root)
        return
    if not os.path.isdir(root):
        return
    status = os.stat(root)
    itself = status.st_dev, status.st_ino
    if itself in above:
        return
    with os.scandir(root) as entries:
        first = list(islice(entries, _SORTED_ENTRIES))
        # A folder sorts as its name with a slash, so that the walk yields whole paths in order.
        first.sort(key=lambda entry: as_text(entry.name) + "/" if entry.is_dir() else as_text(entry.name))
        for entry in chain(first, entries):
            if entry.is_dir():
                yield from walk(entry.path, above | {itself})
            else:
                yield as_text(entry.path)
