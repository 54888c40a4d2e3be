"""A node's verified copy of an index version: what a process must have before faiss may read a byte.

A remote version is downloaded once per node, whatever the number of processes; a local one is used in place. Either
way every file's sha256 is checked, and a stamp (size, inode, change time) spares the next process the reading as long
as the files stay untouched. Files only arrive by rename: truncating a mapped file would kill the processes that map it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from smallcap import storage
from smallcap.errors import IndexIntegrityError, StorageError
from smallcap.index_manifest import FileEntry, IndexManifest, version_uri

DEFAULT_CACHE_DIR = "~/.cache/smallcap"
_DOWNLOADS_AT_ONCE = 4
_DOWNLOAD_ATTEMPTS = 2  # a second one, because the first may have met a damaged transfer


def open_version_folder(index_uri: str, manifest: IndexManifest, cache_dir: str = DEFAULT_CACHE_DIR) -> Path:
    """Returns a local folder that holds the version's files, each with the checksum of the manifest.

    Raises:
        IndexIntegrityError: A file differs from its checksum, after a second download where it is remote.
        StorageError: The cache folder cannot be written, has no room, or the store fails.
    """
    cache = Path(cache_dir).expanduser()
    source = version_uri(index_uri, manifest.index_id)
    with _locked(cache / "locks" / f"{manifest.index_id}.lock"):
        if storage.is_local(source):
            folder = Path(storage.absolute(source))
            _verify(folder, manifest, cache)
            return folder
        folder = cache / "indexes" / manifest.index_id
        if folder.exists():
            try:
                _verify(folder, manifest, cache)
                return folder
            except IndexIntegrityError:  # the copy is damaged; the published index may be whole
                shutil.rmtree(folder)
        _download(source, manifest, folder)
        _verify(folder, manifest, cache, known_good=True)
        return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock that all processes of the node share; the system frees it when the holder dies."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise StorageError(
            "The index cache folder cannot be written.",
            where=str(path.parent),
            found=str(error),
            remedy="Give another one with --set retrieval.cache_dir=FOLDER.",
        ) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(source: str, manifest: IndexManifest, folder: Path) -> None:
    needed = sum(entry.bytes for entry in manifest.files)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in folder.parent.glob(f".{folder.name}-*"):  # of a process that died; the lock is ours
        shutil.rmtree(leftover)
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise StorageError(
            "The index does not fit on this node's disk.",
            where=str(folder.parent),
            expected=f"{needed} bytes free",
            found=f"{free} bytes free",
            remedy="Free some space, or give another folder with --set retrieval.cache_dir=FOLDER.",
        )
    for attempt in range(1, _DOWNLOAD_ATTEMPTS + 1):
        partial = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
        try:
            _fetch_files(source, manifest, partial)
            partial.rename(folder)
            return
        except IndexIntegrityError:
            if attempt == _DOWNLOAD_ATTEMPTS:
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _fetch_files(source: str, manifest: IndexManifest, partial: Path) -> None:
    def fetch(entry: FileEntry) -> None:
        target = partial / entry.file
        target.parent.mkdir(parents=True, exist_ok=True)
        storage.download(storage.join(source, entry.file), target)
        check_file(target, entry)

    with ThreadPoolExecutor(_DOWNLOADS_AT_ONCE) as pool:
        for _ in pool.map(fetch, manifest.files):
            pass


def _verify(folder: Path, manifest: IndexManifest, cache: Path, known_good: bool = False) -> None:
    """Checks every file's sha256, unless this node did so before and no file has been touched since."""
    digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    stamp_file = cache / "verified" / f"{manifest.index_id}-{digest}.json"
    stamp = {entry.file: _state(folder / entry.file, entry) for entry in manifest.files}
    if stamp_file.exists() and stamp_file.read_text() == json.dumps(stamp):
        return
    if not known_good:
        for entry in manifest.files:
            check_file(folder / entry.file, entry)
    storage.write_bytes(str(stamp_file), json.dumps(stamp).encode())


def _state(path: Path, entry: FileEntry) -> list[object]:
    if not path.is_file():
        raise IndexIntegrityError(
            "A file of the index is missing.", where=str(path), remedy="Restore it, or rebuild the index."
        )
    status = path.stat()
    return [entry.sha256, status.st_size, status.st_ino, status.st_ctime_ns]


def check_file(path: Path, entry: FileEntry) -> None:
    """Checks a local file's size and sha256 against its manifest entry.

    Raises:
        IndexIntegrityError: One of them differs.
    """
    size = path.stat().st_size
    if size != entry.bytes:
        raise _damaged(path, f"{entry.bytes} bytes", f"{size} bytes")
    sha256 = storage.sha256_file(path)
    if sha256 != entry.sha256:
        raise _damaged(path, f"sha256 {entry.sha256}", f"sha256 {sha256}")


def _damaged(path: Path, expected: str, found: str) -> IndexIntegrityError:
    return IndexIntegrityError(
        "A file of the index is damaged.",
        where=str(path),
        expected=expected,
        found=found,
        remedy="Restore it from where it was published, or rebuild the index.",
    )
