"""Reads the images of a WebDataset tar as a stream, and tells whether keys alone identify the images of many tars.

The members of a sample have the same key, the path up to the first dot of the base name, and follow each other. A
sample has one image. Where all its images have further dots in their names, as in 22.05.jpg, each is an image of its
own, whose key ends at the last dot. Other members that look like images are counted. The other conventions of
WebDataset (splits, brace expansion, decoders) are not needed to caption images.
"""

from __future__ import annotations

import io
import json
import math
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
from smallcap.field_values import json_fields
from smallcap.images.bounded_tar import DAMAGED, NoBytesError, TooLargeError, open_tar
from smallcap.images.fragments import FRAGMENT_ROWS, Fragment, InputBatch, LeftOut
from smallcap.images.kinds import (
    IMAGE_EXTENSIONS,
    MAX_IMAGE_BYTES,
    SIGNATURE_BYTES,
    begins_like_image,
    ends_like_image,
)
from smallcap.images.place_check import note_served, unreadable_file
from smallcap.images.row_ranges import RowRanges
from smallcap.phrasing import describe_count

_BLOCK_BYTES = 16 << 20  # read ahead, and one request on S3
_BATCH_BYTES = 64 << 20  # a batch ends with the image that reaches it
_PEEK_BYTES = 16 << 10
_PEEKS_AT_ONCE = 32
_SAMPLE_IMAGES = 8  # the most images with one key that are held to see whether one of them is the sample's own
_SAMPLE_TEXT_BYTES = 16 << 20  # of the json and txt members of one key together
_WHOLE_TEXTS = {"json", "txt"}  # columns that keep a text of a sample as it is; others are fields of its JSON


@dataclass(frozen=True)
class _Image:
    row: int
    image_id: str
    uri: str
    data: bytes | RowError
    kept: dict[str, str | None]


@dataclass(frozen=True)
class _Member:
    """An image of a sample; `key` is its id unless another image has it."""

    name: str
    key: str
    data: bytes | RowError


@dataclass
class _Sample:
    """The members of one key that have been read so far, without images that have become rows."""

    key: str
    names: set[str] = field(default_factory=set)
    images: list[_Member] = field(default_factory=list)
    texts: dict[str, str | RowError] = field(default_factory=dict)  # contents of json and txt, by the member's name
    has_rows: bool = False  # there are too many images for one sample: each is its own

    def is_full(self) -> bool:
        """Says whether there are more images, or more bytes of them, than are held."""
        return len(self.images) > _SAMPLE_IMAGES or sum(map(_size, self.images)) > MAX_IMAGE_BYTES

    def text_room(self) -> int:
        """Returns how many more bytes of texts are held."""
        return _SAMPLE_TEXT_BYTES - sum(len(text) for text in self.texts.values() if isinstance(text, str))


def _size(image: _Image | _Member) -> int:
    return len(image.data) if isinstance(image.data, bytes) else 0


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
    """Streams through a tar and yields its images, each once.

    Where the tar cannot be read to its end, one row follows the images that were read; its id is the tar's URI.

    Args:
        fragment: The tar.
        wanted: The rows to yield; other images are not held. None yields all.
        kept_columns: `json`, `txt`, or fields of the json; strings.

    Raises:
        StorageError: The service fails; a tar that is missing or forbidden gives an error row.
    """
    reader = _TarReader(fragment, wanted, kept_columns.names)
    held: list[_Image] = []
    held_bytes = 0
    for image in reader.images():
        if held and (len(held) == FRAGMENT_ROWS or held_bytes >= _BATCH_BYTES):
            yield _batch(held, kept_columns, reader)
            held, held_bytes = [], 0
        held.append(image)
        held_bytes += _size(image) + sum(len(text or "") for text in image.kept.values())
    if held:
        yield _batch(held, kept_columns, reader, ends=held[-1].row == reader.rows - 1)


def _batch(images: list[_Image], kept_columns: pa.Schema, reader: _TarReader, ends: bool = False) -> InputBatch:
    kept = pa.Table.from_pylist([image.kept for image in images], schema=kept_columns) if len(kept_columns) else None
    return InputBatch(
        rows=np.array([image.row for image in images], dtype=np.int32),
        image_ids=[image.image_id for image in images],
        image_uris=[image.uri for image in images],
        data=[image.data for image in images],
        kept=kept,
        ends_fragment=ends,
        left_out=LeftOut(reader.repeats, reader.passed_over) if ends else LeftOut(),
    )


class _TarReader:
    """Reads one tar from front to back.

    Attributes:
        uri: The tar.
        rows: The number of rows so far, wanted or not.
        repeats, passed_over: What was left out so far, beside rows that are wanted or not; see `LeftOut`.
    """

    def __init__(self, fragment: Fragment, wanted: RowRanges | None, columns: Sequence[str]) -> None:
        self.uri = fragment.uri
        self._fragment, self._wanted, self._columns = fragment, wanted, columns
        self._has_fields = bool(set(columns) - _WHOLE_TEXTS)  # of the samples' JSON
        self._texts = _WHOLE_TEXTS & set(columns) | ({"json"} if self._has_fields else set())
        self._ids: set[str] = set()
        self._contents: dict[str, tuple[tuple[int, int], ...]] = {}  # sizes and checksums, by the image's name
        self.rows = self.repeats = self.passed_over = 0

    def images(self) -> Iterator[_Image]:
        """Yields the wanted images, and then the error where there is one; counts all rows."""
        uri = self.uri
        problem: RowError | None = None
        try:
            with storage.open_ranged(uri, _BLOCK_BYTES) as file, open_tar(file) as tar:
                note_served(uri)
                yield from self._samples(tar)
        except StorageError as error:
            problem = unreadable_file(error, uri)
        except NoBytesError:
            problem = RowError(ErrorCode.EMPTY, "The tar has zero bytes.", where=uri)
        except TooLargeError as error:
            images = describe_count(self.rows, "image")
            problem = RowError(ErrorCode.TOO_LARGE, f"The tar is not read on after {images}: {error}.", where=uri)
        except DAMAGED as error:
            code = ErrorCode.TRUNCATED if self.rows else ErrorCode.NOT_AN_IMAGE
            images = describe_count(self.rows, "image")
            what = f"The tar is damaged or ends early after {images}: {error or type(error).__name__}."
            problem = RowError(code, what, where=uri)
        if problem is None and not self.rows:
            what = f"; it has {describe_count(self.passed_over, 'member')} like images" if self.passed_over else ""
            problem = RowError(ErrorCode.EMPTY, f"The tar has no images{what}.", where=uri)
        if problem is not None:
            if self._is_wanted(self.rows):
                yield _Image(self.rows, uri, uri, problem, {})
            self.rows += 1

    def _samples(self, tar: tarfile.TarFile) -> Iterator[_Image]:
        sample = _Sample("")
        try:
            while (member := tar.next()) is not None:
                name = _decoded(member.name)
                key, extension = _split(name)
                if member.isfile() and extension and (key != sample.key or name in sample.names):
                    yield from self._finish(sample)
                    sample = _Sample(key)
                sample.names.add(name)
                stem, _, ending = name.rpartition(".")
                if not member.isfile() or not extension:
                    self._count_other(tar, member, name)
                elif extension in IMAGE_EXTENSIONS:
                    sample.images.append(_Member(name, key, self._content(tar, member, name, MAX_IMAGE_BYTES)))
                elif ending.lower() in IMAGE_EXTENSIONS:
                    sample.images.append(_Member(name, stem, self._content(tar, member, name, MAX_IMAGE_BYTES)))
                elif ending.lower() in self._texts:
                    text = self._content(tar, member, name, sample.text_room())
                    decoded = text.decode(errors="replace") if isinstance(text, bytes) else text
                    sample.texts[f"{stem}.{ending.lower()}"] = decoded
                else:
                    self._count_other(tar, member, name)
                while sample.is_full():
                    sample.has_rows = True
                    yield from self._row(sample.images.pop(0), sample)
        except (TooLargeError, *DAMAGED):
            yield from self._finish(sample)  # its image may have been read before
            raise
        yield from self._finish(sample)

    def _finish(self, sample: _Sample) -> Iterator[_Image]:
        """Yields the image of a sample: the one with the sample's own key, or else all."""
        own = [] if sample.has_rows else [image for image in sample.images if image.key == sample.key][:1]
        for image in own or sample.images:
            yield from self._row(image, sample)
        self.passed_over += len(sample.images) - len(own) if own else 0

    def _row(self, image: _Member, sample: _Sample) -> Iterator[_Image]:
        before = self._contents.get(image.name, ())
        content = (len(image.data), zlib.crc32(image.data)) if isinstance(image.data, bytes) else (-1, len(before))
        if content in before:
            self.repeats += 1
            return
        self._contents[image.name] = (*before, content)
        place = f"{image.name}#{len(before) + 1}" if before else image.name
        image_id = image.key if image.key not in self._ids else place
        self._ids.add(image_id)
        self.rows += 1
        if self._is_wanted(self.rows - 1):
            uri = f"{self.uri}#{place}"
            texts = {name: sample.texts.get(f"{image.key}.{name}") for name in self._texts}
            kept, problem = self._kept(texts, uri)
            yield _Image(self.rows - 1, self._fragment.id_prefix + image_id, uri, problem or image.data, kept)

    def _kept(self, texts: dict[str, str | RowError | None], uri: str) -> tuple[dict[str, str | None], RowError | None]:
        """Returns the columns to keep of an image whose sample has these texts, and why some cannot be had."""
        problem = next((text for text in texts.values() if isinstance(text, RowError)), None)
        plain = {name: text for name, text in texts.items() if isinstance(text, str)}
        fields = json_fields(plain.get("json")) if self._has_fields else {}
        kept: dict[str, str | None] = dict.fromkeys(self._columns)
        for name in self._columns:
            try:
                kept[name] = plain.get(name) if name in _WHOLE_TEXTS else _field_text(name, fields)
            except ValueError:
                what = f"The field {name} of the sample's JSON is not text, or a number out of range."
                problem = RowError(ErrorCode.INVALID_URI, what, where=uri)
        return kept, problem

    def _content(self, tar: tarfile.TarFile, member: tarfile.TarInfo, name: str, most: int) -> bytes | RowError:
        """Returns a member's bytes; an error, without a byte of it, where its size is above `most`."""
        if member.size > most:
            what = f"The member has {member.size:,} bytes; at most {most:,} are read."
            return RowError(ErrorCode.TOO_LARGE, what, where=f"{self.uri}#{name}")
        file = tar.extractfile(member)
        assert file is not None  # a regular file
        data = file.read()
        if len(data) != member.size:
            raise tarfile.ReadError(f"{name} has {len(data)} of its {member.size} bytes")
        return data

    def _count_other(self, tar: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> None:
        """Counts a member that is not an image of a sample but looks like one: a link, a hidden file, another name."""
        base = name.rpartition("/")[2]
        if base.startswith("._") or not (member.isfile() or member.islnk() or member.issym()):
            return  # macOS adds ._NAME to each file
        if ends_like_image(base) or (member.isfile() and begins_like_image(_start(tar, member))):
            self.passed_over += 1

    def _is_wanted(self, row: int) -> bool:
        return self._wanted is None or bool(self._wanted.contains(np.array([row]))[0])


def _decoded(name: str) -> str:
    """Returns a member's name; bytes that are not UTF-8 become \\xNN, so that different names stay different."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace").removeprefix("./")


def _split(name: str) -> tuple[str, str]:
    """Returns a member's key and its extension in lower case; a hidden file has none."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower() if stem else ""


def _start(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None  # a regular file
    return file.read(SIGNATURE_BYTES)


def _field_text(name: str, fields: dict[str, Any]) -> str | None:
    """Returns a field of a sample's JSON as text; None where there is none.

    Raises:
        ValueError: The field holds half a surrogate pair, or is a number out of range.
    """
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, float) and math.isinf(value):
        raise ValueError(f"{name} is out of range")
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text.encode()
    return text


def _first_key(uri: str) -> str | None:
    """Returns the key of a tar's first member, after a small read; None where that fails: reading the tar tells why."""
    try:
        with storage.open_ranged(uri) as file:
            start = file.read(_PEEK_BYTES)
        with open_tar(io.BytesIO(start), tarfile.BLOCKSIZE) as tar:
            while (member := tar.next()) is not None:
                key, extension = _split(_decoded(member.name))
                if member.isfile() and extension:
                    return key
    except StorageError as error:
        unreadable_file(error, uri)
    except (TooLargeError, *DAMAGED):
        pass
    return None
