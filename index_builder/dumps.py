"""Caption dumps: which files they are, their checksums, a local copy to read. Their formats are in `dump_formats`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from index_builder.dump_formats import FORMATS, Columns, read_rows
from smallcap import storage
from smallcap.errors import ConfigError


@dataclass(frozen=True)
class DumpFile:
    """One file of a caption dump.

    Attributes:
        uri: Where it is.
        name: What the caption store calls it: the shortest end of the path that tells it from the other files.
    """

    uri: str
    name: str

    @property
    def suffix(self) -> str:
        """The file's format, as a key of `FORMATS`."""
        return Path(self.uri).suffix.lower()


@dataclass(frozen=True)
class DumpScan:
    """What is known of a dump's file before its captions are cleaned."""

    dump: DumpFile
    bytes: int
    sha256: str


def find_dumps(uris: Sequence[str]) -> list[DumpFile]:
    """Lists the dump files that files, folders, prefixes and globs name: in the order given, each sorted.

    Raises:
        ConfigError: A URI holds no file of a known format.
        StorageError: A URI does not exist or cannot be listed.
    """
    found: dict[str, None] = {}
    for uri in uris:
        files = storage.list_files(uri, tuple(FORMATS))
        if not files:
            raise ConfigError(
                "There is no caption dump here.",
                where=uri,
                expected=f"files ending in {', '.join(FORMATS)}",
                remedy="Convert the dump to one of these, or check the path.",
            )
        found.update(dict.fromkeys(storage.absolute(file) for file in files))
    return [DumpFile(uri, name) for uri, name in zip(found, _short_names(list(found)), strict=True)]


def scan_dump(task: tuple[DumpFile, Columns]) -> DumpScan:
    """Reads a dump's file once for its checksum, and its first row to see that it has the columns asked for.

    Raises:
        SchemaError: It has not.
    """
    dump, columns = task
    with local_copy(dump.uri) as path:
        next(read_rows(path, dump.uri, columns), None)
        return DumpScan(dump, path.stat().st_size, storage.sha256_file(path))


@contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """Gives a local path with a file's content: its own when local, else a temporary download."""
    if storage.is_local(uri):
        yield Path(storage.absolute(uri))
        return
    with storage.scratch_folder() as folder:
        path = folder / f"dump{Path(uri).suffix}"
        storage.download(uri, path)
        yield path


def _short_names(uris: Sequence[str]) -> list[str]:
    """Cuts URIs to as many last components as tell them apart, so that equal content keeps its name when it moves."""
    parts = [uri.split("/") for uri in uris]
    for depth in range(1, max(map(len, parts))):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return list(uris)
