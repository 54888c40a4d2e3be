"""Verifies the files of indexes and models on a node, and downloads them where needed, before anything reads them.

What is local is used in place. The files of a remote index are kept in the node's cache under the names that they have
in the index. Those come from their content, so that versions and indexes share equal files, and an addition costs only
its new shards. Models are kept by their places and versions (`smallcap.model.remote`):

    CACHE/files/…       the files of indexes
    CACHE/models/…      a folder for each version of a model
    CACHE/verified/…    stamps: what was verified, and by their age when it was last used
    CACHE/downloads/…   unfinished downloads
    CACHE/locks/…       one process at a time downloads, or verifies a local index

The sha256 of every file is checked; of a model, whose files nobody lists with checksums, against that of the first
download. A stamp (checksum, size, inode, change time) spares the next process the reading as long as the file stays
untouched. Files arrive only by rename: truncating a mapped file would kill the processes that map it, while replacing
or deleting it does not harm them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from smallcap import storage
from smallcap.errors import CheckpointError, IndexIntegrityError, StorageError
from smallcap.index.manifest import FILES_FOLDER, FileEntry, IndexManifest

MODELS_FOLDER = "models"
_DOWNLOADS_AT_ONCE = 4
_DOWNLOAD_ATTEMPTS = 2  # the first transfer may have been damaged
_IN_USE_S = 300  # a process may be about to map a file that was verified so recently; it is not deleted
_CHUNK_BYTES = 8 << 20

# The section of a faiss file that keeps its lists in another file, which faiss would open by the path written here:
# "ilod", two numbers that faiss takes unchecked, and the length of a vector, which it refuses from 2**40 on. Random
# codes look like this once in 2**56 bytes.
_ON_DISK_LISTS = re.compile(rb"ilod.{16}.{5}\0{3}", re.DOTALL)
_SECTION_BYTES = 28


@dataclass(frozen=True)
class CachedFile:
    """A file that a node keeps a copy of.

    Attributes:
        file: The copy's path below the cache folder.
        uri: Where it is downloaded from.
        bytes: Its size.
        sha256: Its checksum; None where only the download tells it.
    """

    file: str
    uri: str
    bytes: int
    sha256: str | None = None


def open_version_folder(
    index_uri: str,
    manifest: IndexManifest,
    cache_dir: str = storage.DEFAULT_CACHE_DIR,
    entries: Sequence[FileEntry] | None = None,
) -> Path:
    """Returns a local folder that holds the files of a version, verified by the manifest's checksums.

    Args:
        index_uri: The index's folder or prefix.
        manifest: The version's manifest.
        cache_dir: The node's cache folder.
        entries: The files that are needed; by default all of the version.

    Raises:
        IndexIntegrityError: A file differs from its checksum, after a second download where it is remote, or keeps
            its lists in another file.
        StorageError: The cache folder cannot be written or has no room, or the store fails.
    """
    cache = NodeCache(Path(cache_dir).expanduser())
    entries = manifest.files if entries is None else entries
    if storage.is_local(index_uri):
        root = Path(storage.absolute(index_uri))
        cache.verify_in_place(root, entries)
        return root
    files = [
        CachedFile(entry.file, storage.join(index_uri, entry.file), entry.bytes, entry.sha256) for entry in entries
    ]
    cache.fetch(files, {entry.file for entry in manifest.files})
    return cache.root


def missing_files(
    index_uri: str,
    manifest: IndexManifest,
    cache_dir: str = storage.DEFAULT_CACHE_DIR,
    entries: Sequence[FileEntry] | None = None,
) -> list[FileEntry]:
    """Returns the files that `open_version_folder` would have to download to this node; none for a local index."""
    if storage.is_local(index_uri):
        return []
    cache = NodeCache(Path(cache_dir).expanduser())
    return [entry for entry in (manifest.files if entries is None else entries) if not cache.has(entry)]


class NodeCache:
    """One node's cache folder, shared by its processes.

    Args:
        root: The folder; it is made when needed.
        check: What checks a file and returns its sha256; by default `check_file`, which is for indexes.
    """

    def __init__(self, root: Path, check: Callable[[Path, CachedFile], str] | None = None) -> None:
        self.root = root
        self._check = check

    def verify_in_place(self, folder: Path, entries: Sequence[FileEntry]) -> None:
        """Verifies the files of a local index, unless this node has done so and they are untouched since."""
        if all(self._is_verified(folder, entry) for entry in entries):
            return
        with self._locked(_digest(str(folder.resolve()))), ThreadPoolExecutor(_DOWNLOADS_AT_ONCE) as pool:
            for _ in pool.map(lambda entry: self._verify(folder, entry), entries):
                pass

    def has(self, entry: FileEntry | CachedFile) -> bool:
        """Says whether a file is in the cache, verified and untouched since."""
        return self._is_verified(self.root, entry)

    def fetch(self, entries: Sequence[CachedFile], keep: set[str]) -> None:
        """Downloads the files that the cache lacks or has damaged.

        Args:
            entries: The files that are needed.
            keep: Names of files that are not deleted to make room.
        """
        if all(self.has(entry) for entry in entries):
            return
        with self._locked("downloads"):
            downloads = self.root / "downloads"
            shutil.rmtree(downloads, ignore_errors=True)  # left by a process that died: we hold the lock
            downloads.mkdir(parents=True)
            missing = [entry for entry in entries if not self._is_whole(entry)]
            self._make_room(sum(entry.bytes for entry in missing), keep)
            with ThreadPoolExecutor(_DOWNLOADS_AT_ONCE) as pool:
                for _ in pool.map(self._download, missing):
                    pass
            for entry in entries:  # the first files may have waited long for the last
                os.utime(self._stamp(self.root, entry.file))

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Holds a lock that all processes of the node share; the system frees it when the holder dies."""
        path = self.root / "locks" / f"{name}.lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("w")
        except OSError as error:
            raise StorageError(
                "This node's cache folder cannot be written.",
                where=str(self.root),
                found=str(error),
                remedy="Give another folder with --set retrieval.cache_dir=FOLDER.",
            ) from error
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    # --- verifying -------------------------------------------------------------------------------------------------

    def _stamp(self, folder: Path, file: str) -> Path:
        return self.root / "verified" / f"{_digest(str(folder.resolve() / file))}.json"

    def _stamped(self, folder: Path, file: str) -> tuple[str, list[object]] | None:
        """Returns a file's checksum and state when it was verified; None where it never was."""
        try:
            sha256, *state = json.loads(self._stamp(folder, file).read_text())
        except (OSError, ValueError, TypeError):
            return None
        return sha256, state

    def _is_verified(self, folder: Path, entry: FileEntry | CachedFile) -> bool:
        """Says whether a file still matches its stamp, and if so renews the stamp's age."""
        stamped = self._stamped(folder, entry.file)
        try:
            verified = stamped is not None and (
                entry.sha256 in (None, stamped[0]) and stamped[1] == _state(folder / entry.file)
            )
            if verified:
                os.utime(self._stamp(folder, entry.file))  # not the file, whose change time is in the stamp
        except OSError:
            return False
        return verified

    def _verify(self, folder: Path, entry: FileEntry | CachedFile) -> None:
        if self._is_verified(folder, entry):
            return
        path = folder / entry.file
        if not path.is_file():
            raise IndexIntegrityError(
                "A file of the index is missing.", where=str(path), remedy="Restore it, or rebuild the index."
            )
        self._write_stamp(folder, entry, self._checked(path, entry))

    def _checked(self, path: Path, entry: FileEntry | CachedFile) -> str:
        """Checks a file and returns its sha256."""
        if self._check is not None and isinstance(entry, CachedFile):
            return self._check(path, entry)
        return check_file(path, entry)

    def _write_stamp(self, folder: Path, entry: FileEntry | CachedFile, sha256: str) -> None:
        stamp = [sha256, *_state(folder / entry.file)]
        storage.write_bytes(str(self._stamp(folder, entry.file)), json.dumps(stamp).encode())

    # --- downloading -----------------------------------------------------------------------------------------------

    def _is_whole(self, entry: CachedFile) -> bool:
        """Says whether the cache has a whole file; a damaged copy is deleted, to be downloaded again."""
        path = self.root / entry.file
        if not path.exists():
            return False
        stamped = self._stamped(self.root, entry.file)
        known = entry.sha256 or (stamped[0] if stamped else None)
        try:
            if known is not None:
                self._verify(self.root, replace(entry, sha256=known))
                return True
        except (IndexIntegrityError, CheckpointError):
            pass
        path.unlink()
        return False

    def _download(self, entry: CachedFile) -> None:
        target = self.root / entry.file
        target.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(1, _DOWNLOAD_ATTEMPTS + 1):
            partial = self.root / "downloads" / uuid.uuid4().hex
            try:
                storage.download(entry.uri, partial)
                sha256 = self._checked(partial, entry)
                with partial.open("rb") as file:  # the stamp must not outlive the content in a power failure
                    os.fsync(file.fileno())
                partial.replace(target)
                break
            except (IndexIntegrityError, CheckpointError):
                if attempt == _DOWNLOAD_ATTEMPTS:
                    raise
            finally:
                partial.unlink(missing_ok=True)
        self._write_stamp(self.root, entry, sha256)

    def _make_room(self, needed: int, keep: set[str]) -> None:
        """Deletes files of other versions and models, the least recently used ones first, until `needed` bytes fit."""
        free = _free_bytes(self.root)
        for last_used, path in self._deletable(keep) if free < needed else ():
            if free >= needed or time.time() - last_used < _IN_USE_S:
                break
            self._stamp(self.root, str(path.relative_to(self.root))).unlink(missing_ok=True)
            path.unlink()
            free = _free_bytes(self.root)
        if free < needed:
            raise StorageError(
                "What is to be copied to this node does not fit on its disk.",
                where=str(self.root),
                expected=f"{needed} bytes free",
                found=f"{free} bytes free",
                remedy="Free some space, or give another folder with --set retrieval.cache_dir=FOLDER.",
            )

    def _deletable(self, keep: set[str]) -> list[tuple[float, Path]]:
        """Lists the time of last use and the path of each file outside `keep`, longest ago first."""
        deletable = []
        for path in chain(self.root.glob(f"{FILES_FOLDER}/*"), self.root.glob(f"{MODELS_FOLDER}/*/*")):
            name = str(path.relative_to(self.root))
            if name not in keep:
                stamp = self._stamp(self.root, name)
                deletable.append(((stamp if stamp.exists() else path).stat().st_mtime, path))
        return sorted(deletable)


def check_file(path: Path, entry: FileEntry | CachedFile) -> str:
    """Checks a local file's size and sha256 against its manifest entry, and that faiss will open no other file for it.

    Returns:
        The sha256.

    Raises:
        IndexIntegrityError: A check fails.
    """
    size = path.stat().st_size
    if size != entry.bytes:
        raise _damaged(path, f"{entry.bytes} bytes", f"{size} bytes")
    digest, tail, keeps_lists_elsewhere = hashlib.sha256(), b"", False
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            keeps_lists_elsewhere |= _has_on_disk_lists(tail + chunk[:_SECTION_BYTES]) or _has_on_disk_lists(chunk)
            tail = (tail + chunk[-_SECTION_BYTES:])[-_SECTION_BYTES:]
    if digest.hexdigest() != entry.sha256:
        raise _damaged(path, f"sha256 {entry.sha256}", f"sha256 {digest.hexdigest()}")
    if keeps_lists_elsewhere:
        raise IndexIntegrityError(
            "A file of the index keeps its lists in another file.",
            where=str(path),
            expected="lists in the file itself",
            found="on-disk inverted lists (ilod)",
            remedy="Load it where it was built and write it again with lists in memory, or rebuild the index.",
        )
    return digest.hexdigest()


def _has_on_disk_lists(data: bytes) -> bool:
    return _ON_DISK_LISTS.search(data) is not None


def _state(path: Path) -> list[object]:
    status = path.stat()
    return [status.st_size, status.st_ino, status.st_ctime_ns]


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:32]


def _damaged(path: Path, expected: str, found: str) -> IndexIntegrityError:
    return IndexIntegrityError(
        "A file of the index is damaged.",
        where=str(path),
        expected=expected,
        found=found,
        remedy="Restore it from where it was published, or rebuild the index.",
    )
