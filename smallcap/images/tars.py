"""Reads the images of a WebDataset tar as a stream, and tells whether keys alone identify the images of many tars.

The members of a sample have the same key, the path up to the first dot of the base name, and follow each other. The
other conventions of WebDataset (splits, brace expansion, decoders) are not needed to caption images.
"""

from __future__ import annotations

import io
import json
import lzma
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from smallcap import storage
from smallcap.errors import ErrorCode, RowError, StorageError
from smallcap.images.fragments import FRAGMENT_ROWS, Fragment, InputBatch, unreadable_file
from smallcap.images.kinds import IMAGE_EXTENSIONS
from smallcap.images.row_ranges import RowRanges
from smallcap.phrasing import describe_count

_BLOCK_BYTES = 16 << 20  # read ahead, and one request on S3
_BATCH_BYTES = 64 << 20  # a batch ends with the image that reaches it
_PEEK_BYTES = 16 << 10
_PEEKS_AT_ONCE = 32
_DAMAGED = (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError)  # OSError: gzip, bz2


@dataclass(frozen=True)
class _Image:
    row: int
    image_id: str
    uri: str
    data: bytes | RowError
    kept: dict[str, str | None]


@dataclass
class _Sample:
    """The members of one key that have been read so far."""

    key: str
    wanted: bool
    member: str | None = None  # name of the image
    data: bytes = b""
    texts: dict[str, str] = field(default_factory=dict)  # contents of json and txt, by extension


@dataclass
class _Progress:
    rows: int = 0
    duplicates: int = 0


def choose_tar_ids(uris: Sequence[str]) -> Literal["key", "tar/key"]:
    """Says how the images of these tars are told apart: by their keys alone, or by tar and key.

    Only reading all tars would tell whether all keys differ. But the first key of each tar tells whether the writer
    numbered the images of each tar from the same start.
    """
    if len(uris) < 2:
        return "key"
    with ThreadPoolExecutor(min(_PEEKS_AT_ONCE, len(uris))) as pool:
        keys = [key for key in pool.map(_first_key, uris) if key is not None]
    return "key" if len(set(keys)) == len(keys) else "tar/key"


def read_tar(fragment: Fragment, wanted: RowRanges | None, kept_columns: pa.Schema) -> Iterator[InputBatch]:
    """Streams through a tar and yields its images, a repeated key only once.

    Where the tar cannot be read to its end, one row follows the images that were read; its id is the tar's URI.

    Args:
        fragment: The tar.
        wanted: The rows to yield; other images are not held. None yields all.
        kept_columns: `json`, `txt`, or fields of the json; strings.

    Raises:
        StorageError: The service fails; a tar that is missing or forbidden gives an error row.
    """
    progress = _Progress()
    held: list[_Image] = []
    counted = 0
    for image in _images(fragment, wanted, kept_columns.names, progress):
        held_bytes = sum(len(other.data) for other in held if isinstance(other.data, bytes))
        if held and (len(held) == FRAGMENT_ROWS or held_bytes >= _BATCH_BYTES):
            yield _batch(held, kept_columns, False, progress.duplicates - counted)
            held, counted = [], progress.duplicates
        held.append(image)
    if held:
        yield _batch(held, kept_columns, held[-1].row == progress.rows - 1, progress.duplicates - counted)


def _batch(images: list[_Image], kept_columns: pa.Schema, ends: bool, duplicates: int) -> InputBatch:
    kept = pa.Table.from_pylist([image.kept for image in images], schema=kept_columns) if len(kept_columns) else None
    return InputBatch(
        rows=np.array([image.row for image in images], dtype=np.int32),
        image_ids=[image.image_id for image in images],
        image_uris=[image.uri for image in images],
        data=[image.data for image in images],
        kept=kept,
        ends_fragment=ends,
        duplicates=duplicates,
    )


def _images(
    fragment: Fragment, wanted: RowRanges | None, columns: Sequence[str], progress: _Progress
) -> Iterator[_Image]:
    """Yields the wanted images, and then the error where there is one; counts all rows."""
    problem: RowError | None = None
    try:
        with (
            storage.open_ranged(fragment.uri, _BLOCK_BYTES) as file,
            tarfile.open(fileobj=file, mode="r|*", bufsize=1 << 20, tarinfo=_StrictTarInfo) as tar,
        ):
            yield from _samples(tar, fragment, wanted, columns, progress)
    except StorageError as error:
        problem = unreadable_file(error, fragment.uri)
    except _DAMAGED as error:
        code = ErrorCode.TRUNCATED if progress.rows else ErrorCode.NOT_AN_IMAGE
        images = describe_count(progress.rows, "image")
        what = f"The tar is damaged or ends early after {images}: {error or type(error).__name__}."
        problem = RowError(code, what, where=fragment.uri)
    if problem is None and not progress.rows:
        problem = RowError(ErrorCode.EMPTY, "The tar has no images.", where=fragment.uri)
    if problem is not None:
        if wanted is None or wanted.contains(np.array([progress.rows]))[0]:
            yield _Image(progress.rows, fragment.uri, fragment.uri, problem, {})
        progress.rows += 1


def _samples(
    tar: tarfile.TarFile, fragment: Fragment, wanted: RowRanges | None, columns: Sequence[str], progress: _Progress
) -> Iterator[_Image]:
    texts_needed = {name for name in ("json", "txt") if name in columns}
    texts_needed |= {"json"} if set(columns) - {"json", "txt"} else set()
    keys: set[str] = set()
    sample = _Sample("", wanted=False)

    def finish(sample: _Sample) -> Iterator[_Image]:
        if sample.member is None:
            return
        keys.add(sample.key)
        progress.rows += 1
        if sample.wanted:
            uri = f"{fragment.uri}#{sample.member}"
            kept = {name: _kept_value(name, sample.texts) for name in columns}
            yield _Image(progress.rows - 1, fragment.id_prefix + sample.key, uri, sample.data, kept)

    try:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile would hold every header
            name = member.name.encode(errors="surrogateescape").decode(errors="replace").removeprefix("./")
            key, extension = _split(name)
            if not member.isfile() or not extension:
                continue
            if key != sample.key:
                yield from finish(sample)
                is_wanted = wanted is None or bool(wanted.contains(np.array([progress.rows]))[0])
                sample = _Sample(key, wanted=is_wanted and key not in keys)
            if extension in IMAGE_EXTENSIONS:
                if sample.member is not None or key in keys:
                    # It counts with the row before it, so that it counts only once when a tar is read again.
                    before = progress.rows - (sample.member is None)
                    progress.duplicates += wanted is None or bool(wanted.contains(np.array([before]))[0])
                    continue
                data = _content(tar, member) if sample.wanted else b""
                sample.member, sample.data = name, data
            elif extension in texts_needed and sample.wanted:
                sample.texts[extension] = _content(tar, member).decode(errors="replace")
    except _DAMAGED:
        yield from finish(sample)  # its image may have been read before
        raise
    yield from finish(sample)


def _split(name: str) -> tuple[str, str]:
    """Returns a member's key and its extension in lower case; a hidden file has none."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower() if stem else ""


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None  # a regular file
    data = file.read()
    if len(data) != member.size:
        raise tarfile.ReadError(f"{member.name} has {len(data)} of its {member.size} bytes")
    return data


def _kept_value(name: str, texts: dict[str, str]) -> str | None:
    if name in ("json", "txt"):
        return texts.get(name)
    try:
        fields = json.loads(texts.get("json", "null"))
    except ValueError:
        return None
    value: Any = fields.get(name) if isinstance(fields, dict) else None
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _first_key(uri: str) -> str | None:
    """Returns the key of a tar's first member, after a small read; None where that fails: reading the tar tells why."""
    try:
        with storage.open_ranged(uri) as file:
            start = file.read(_PEEK_BYTES)
        with tarfile.open(fileobj=io.BytesIO(start), mode="r|*", bufsize=tarfile.BLOCKSIZE) as tar:
            while (member := tar.next()) is not None:
                key, extension = _split(member.name.removeprefix("./"))
                if member.isfile() and extension:
                    return key
    except (StorageError, *_DAMAGED):
        pass
    return None


class _StrictTarInfo(tarfile.TarInfo):
    """A header that raises an error for a damaged tar, where tarfile just stops."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> _StrictTarInfo:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EmptyHeaderError as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError("it ends without an end mark") from error
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(str(error)) from error
