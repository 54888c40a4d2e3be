"""Finds the files of caption dumps, and opens local copies of them.

`smallcap.captions` reads their rows; `embedded` reads dumps that keep embeddings in a second file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from index_builder.dumps.embedded import find_embeddings, read_embedded_rows
from smallcap import storage
from smallcap.captions.reader import FORMATS, note_of, open_captions, read_captions
from smallcap.captions.rows import CaptionColumns, CaptionRow
from smallcap.errors import ConfigError
from smallcap.tables import TABLE_SUFFIXES, format_of

_CHECKED_EARLY = 10  # dumps; each is a request or two
_SAMPLE_BYTES = 1 << 20
_LONG_ROW_BYTES = 200


@dataclass(frozen=True)
class DumpFile:
    """One file of a caption dump.

    Attributes:
        uri: Where the file is.
        name: The name in the caption store: the shortest end of the path that tells the file from the others.
        embeddings: Where the file with the rows' embeddings is, if there is one.
    """

    uri: str
    name: str
    embeddings: str | None = None


@dataclass(frozen=True)
class DumpScan:
    """What is known of a dump file before its captions are cleaned.

    Attributes:
        dump: The file.
        bytes: The size of the file and of its embeddings.
        sha256: The sha256 of its content. With embeddings: of the lines "SHA256-OF-CAPTIONS", "SHA256-OF-EMBEDDINGS".
        about_rows: An estimate of the number of rows.
        note: How the file is read, where its first line does not say it.
    """

    dump: DumpFile
    bytes: int
    sha256: str
    about_rows: int
    note: str = ""


def find_dumps(uris: Sequence[str]) -> list[DumpFile]:
    """Lists the dump files that files, folders, prefixes and globs name: in the given order, each sorted.

    In a folder that is laid out as `embedded` says, caption files get the embeddings that belong to them.

    Raises:
        ConfigError: A URI has no file in a known format, or its embeddings and captions do not pair up.
        StorageError: A URI does not exist or cannot be listed.
    """
    embeddings_of: dict[str, str | None] = {}
    for uri in uris:
        listed = storage.list_files(uri)
        # Text without a table's suffix is read where it is named: a folder's notes are not captions.
        files = [file for file in listed if file.lower().endswith(TABLE_SUFFIXES) or _is_named(file, uri)]
        if not files:
            raise ConfigError(
                "There is no caption dump here.",
                where=uri,
                expected=f"files ending in {', '.join(TABLE_SUFFIXES)}",
                remedy="Convert the dump to one of these, or check the path.",
            )
        embeddings = find_embeddings(storage.absolute(uri), listed)
        for file in files:
            embeddings_of[file] = embeddings_of.get(file) or embeddings.get(file)
    names = short_names(list(embeddings_of))
    return [
        DumpFile(uri, name, embeddings) for (uri, embeddings), name in zip(embeddings_of.items(), names, strict=True)
    ]


def _is_named(file: str, uri: str) -> bool:
    return format_of(file) in FORMATS and file == storage.absolute(uri)


def check_columns(dumps: Sequence[DumpFile], columns: CaptionColumns) -> None:
    """Reads the first row of some dumps, so that a wrong column is told before anything is loaded or started.

    Args:
        dumps: The dumps, of which all are scanned later. JSON has no columns, and is read as a whole.
        columns: The requested columns.

    Raises:
        SchemaError: A dump lacks a column, or contradicts its suffix.
    """
    tables = [dump for dump in dumps if dump.embeddings is None and format_of(dump.uri) != ".json"]
    for dump in tables[:_CHECKED_EARLY]:
        with open_captions(dump.uri, columns) as rows:
            next(rows, None)


def scan_dump(task: tuple[DumpFile, CaptionColumns]) -> DumpScan:
    """Computes a dump's checksum, and reads its first row to check that it has the requested columns.

    Raises:
        SchemaError: A column is missing, or the embeddings have the wrong length.
        IndexIntegrityError: The embeddings are in a faiss index that is damaged or of another kind.
    """
    dump, columns = task
    with _opened(dump, columns) as (paths, rows):
        next(rows, None)
        digests = [storage.sha256_file(path) for path in paths]
        digest = digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
        with paths[0].open("rb") as file:
            note = note_of(file, dump.uri, columns)
        about_rows = _estimate_rows(paths[0], dump.uri)
        return DumpScan(dump, sum(path.stat().st_size for path in paths), digest, about_rows, note)


def _estimate_rows(path: Path, uri: str) -> int:
    """Returns about how many rows a dump has, from its beginning, or exactly for Parquet."""
    if format_of(uri) == ".parquet":
        return int(pq.read_metadata(path).num_rows)
    with path.open("rb") as file:
        sample = file.read(_SAMPLE_BYTES)
    bytes_per_line = len(sample) / max(1, sample.count(b"\n"))
    # Compressed files and arrays without line breaks have few lines, or none.
    return round(path.stat().st_size / max(1, min(bytes_per_line, _LONG_ROW_BYTES)))


@contextmanager
def open_dump(dump: DumpFile, columns: CaptionColumns) -> Iterator[Iterator[CaptionRow]]:
    """Yields the iterator over a dump's rows, in order; it must be read before the context ends.

    Raises:
        SchemaError, IndexIntegrityError: The dump is damaged or malformed; reading the rows may raise it as well.
    """
    with _opened(dump, columns) as (_, rows):
        yield rows


@contextmanager
def _opened(dump: DumpFile, columns: CaptionColumns) -> Iterator[tuple[list[Path], Iterator[CaptionRow]]]:
    """Yields the rows, and local paths of the dump file and, if there is one, of the file with its embeddings."""
    with ExitStack() as stack:
        paths = [stack.enter_context(storage.local_file(uri)) for uri in (dump.uri, dump.embeddings) if uri is not None]
        file = stack.enter_context(paths[0].open("rb"))
        if dump.embeddings is None:
            yield paths, read_captions(file, dump.uri, columns)
        else:
            yield paths, read_embedded_rows(file, dump.uri, paths[1], dump.embeddings, columns)


def short_names(uris: Sequence[str]) -> list[str]:
    """Cuts URIs to the last components that tell them apart, so that files keep their names when they move."""
    paths = [uri.split("/") for uri in uris]
    for depth in range(1, max(map(len, paths))):
        names = ["/".join(path[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return list(uris)
