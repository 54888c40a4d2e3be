"""Caption dumps: which files they are, their checksums, local copies to read.

`smallcap.captions` reads them, and `embedded` those that keep embeddings in a second file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from index_builder.dumps.embedded import find_embeddings, read_embedded_rows
from smallcap import storage
from smallcap.captions.reader import CAPTION_SUFFIXES, read_captions
from smallcap.captions.rows import CaptionColumns, CaptionRow
from smallcap.errors import ConfigError


@dataclass(frozen=True)
class DumpFile:
    """One file of a caption dump, with the file of its embeddings if it has one.

    Attributes:
        uri: Where it is.
        name: What the caption store calls it: the shortest end of the path that tells it from the other files.
        embeddings: Where the embeddings of the file's rows are, if they are in a file of their own.
    """

    uri: str
    name: str
    embeddings: str | None = None


@dataclass(frozen=True)
class DumpScan:
    """What is known of a dump's file before its captions are cleaned.

    Attributes:
        dump: The file.
        bytes: Its size, that of its embeddings' file included.
        sha256: Of its content. With embeddings, of the lines "SHA256-OF-CAPTIONS" and "SHA256-OF-EMBEDDINGS".
    """

    dump: DumpFile
    bytes: int
    sha256: str


def find_dumps(uris: Sequence[str]) -> list[DumpFile]:
    """Lists the dump files that files, folders, prefixes and globs name: in the order given, each sorted.

    A folder that is laid out as `embedded` says gives its files of captions the embeddings beside them.

    Raises:
        ConfigError: A URI holds no file of a known format, or embeddings and captions that do not pair up.
        StorageError: A URI does not exist or cannot be listed.
    """
    found: dict[str, str | None] = {}
    for uri in uris:
        listed = storage.list_files(uri)
        files = [file for file in listed if storage.suffix_of(file) in CAPTION_SUFFIXES]
        if not files:
            raise ConfigError(
                "There is no caption dump here.",
                where=uri,
                expected=f"files ending in {', '.join(CAPTION_SUFFIXES)}",
                remedy="Convert the dump to one of these, or check the path.",
            )
        embeddings = find_embeddings(storage.absolute(uri), listed)
        for file in files:
            found[file] = found.get(file) or embeddings.get(file)
    names = short_names(list(found))
    return [DumpFile(uri, name, embeddings) for (uri, embeddings), name in zip(found.items(), names, strict=True)]


def scan_dump(task: tuple[DumpFile, CaptionColumns]) -> DumpScan:
    """Reads a dump's files once for their checksum, and the first row to see that it has the columns asked for.

    Raises:
        SchemaError: It does not have them, or its embeddings have another length than the one asked for.
        IndexIntegrityError: Its embeddings are in a faiss index that is damaged or of another kind.
    """
    dump, columns = task
    with _opened(dump, columns) as (paths, rows):
        next(rows, None)
        digests = [storage.sha256_file(path) for path in paths]
        digest = digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
        return DumpScan(dump, sum(path.stat().st_size for path in paths), digest)


@contextmanager
def open_dump(dump: DumpFile, columns: CaptionColumns) -> Iterator[Iterator[CaptionRow]]:
    """Gives the rows of a dump in order, to be read before the context ends.

    Raises:
        SchemaError, IndexIntegrityError: The dump is damaged, or of another form; also while the rows are read.
    """
    with _opened(dump, columns) as (_, rows):
        yield rows


@contextmanager
def _opened(dump: DumpFile, columns: CaptionColumns) -> Iterator[tuple[list[Path], Iterator[CaptionRow]]]:
    """Gives local paths of a dump's file and, if it has one, of its embeddings' file, and the rows."""
    with ExitStack() as stack:
        paths = [stack.enter_context(storage.local_file(uri)) for uri in (dump.uri, dump.embeddings) if uri is not None]
        file = stack.enter_context(paths[0].open("rb"))
        if dump.embeddings is None:
            yield paths, read_captions(file, dump.uri, columns)
        else:
            yield paths, read_embedded_rows(file, dump.uri, paths[1], dump.embeddings, columns)


def short_names(uris: Sequence[str]) -> list[str]:
    """Cuts URIs to as many last components as tell them apart, so that equal content keeps its name when it moves."""
    paths = [uri.split("/") for uri in uris]
    for depth in range(1, max(map(len, paths))):
        names = ["/".join(path[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return list(uris)
