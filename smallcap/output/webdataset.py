"""Writes and reads WebDataset tars of captioned images: `KEY.jpg`, `KEY.txt` and `KEY.json` for each, for trainers.

It knows tars, keys and image signatures, but nothing of runs or parts. The same samples give the same bytes.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
import tarfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from smallcap import storage
from smallcap.errors import SchemaError
from smallcap.images.bounded_tar import StrictTarInfo
from smallcap.images.kinds import IMAGE_EXTENSIONS

_EXTENSIONS = {
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG": "png",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II*\x00": "tif",
    b"MM\x00*": "tif",
    b"RIFF": "webp",
    b"\x00\x00\x01\x00": "ico",
    b"\xff\x0a": "jxl",
    b"\x00\x00\x00\x0cJXL ": "jxl",
    b"\x00\x00\x00\x0cjP  ": "jp2",
}
_BOX_EXTENSIONS = {b"ftypavif": "avif", b"ftypheic": "heic", b"ftypheix": "heic", b"ftypmif1": "heif"}
_IMAGE_EXTENSION = re.compile(rf"\.({'|'.join(IMAGE_EXTENSIONS)}|ico)$", re.IGNORECASE)
_SCHEME = re.compile(r"^[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x1f\x7f\\]")  # a backslash separates folders for some unpackers


@dataclass(frozen=True)
class Sample:
    """One captioned image of a tar."""

    image_id: str
    data: bytes | None  # the image file as it was fetched; None for a sample without it
    caption: str
    record: dict[str, Any]  # the other values of its JSON file, besides id and caption


def image_extension(data: bytes) -> str:
    """Returns the usual extension of an image file by the signature of its bytes; `bin` where it is unknown."""
    for signature, extension in _EXTENSIONS.items():
        if data.startswith(signature):
            return extension
    return _BOX_EXTENSIONS.get(data[4:12], "bin")


def sample_key(image_id: str, taken: Collection[str]) -> str:
    """Returns an image's key: its id as a relative path whose last component has no dot.

    WebDataset ends a key at the first dot of its last component. A scheme, a leading slash and the extension of an
    image are removed; other dots there become `_`, as do empty and relative components and control characters.

    Args:
        image_id: The image's id.
        taken: The keys of the tar so far; where two ids have the same key, the later one gets `-2`, `-3`, ….
    """
    path = _CONTROL.sub("_", _IMAGE_EXTENSION.sub("", _SCHEME.sub("", image_id))).lstrip("/")
    *folders, base = ["_" if name in ("", ".", "..") else name for name in path.split("/")]
    key = "/".join([*folders, base.replace(".", "_")])
    number, unique = 1, key
    while unique in taken:
        number += 1
        unique = f"{key}-{number}"
    return unique


def write_samples(path: Path, samples: Iterable[Sample]) -> int:
    """Writes the samples to a tar in their order; returns how many there are."""
    taken: set[str] = set()
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for sample in samples:
            key = sample_key(sample.image_id, taken)
            taken.add(key)
            record = plain_values({"image_id": sample.image_id, "caption": sample.caption} | sample.record)
            if sample.data is not None:
                _add(tar, f"{key}.{image_extension(sample.data)}", sample.data)
            _add(tar, f"{key}.txt", sample.caption.encode())
            _add(tar, f"{key}.json", json.dumps(record, ensure_ascii=False).encode())
    return len(taken)


def rewrite_samples(source: Path, target: Path, new_id: Callable[[str], str | None]) -> int:
    """Copies a tar with other ids in its JSON members; returns how many samples are left.

    Args:
        source: The tar.
        target: The copy.
        new_id: Returns an image's new id for its old one; None leaves the sample out.

    Raises:
        SchemaError: The tar is damaged.
    """
    try:
        with tarfile.open(source) as tar:
            members = tar.getmembers()
            records = _records(tar, members)
            new_ids = {key: new_id(record["image_id"]) for key, record in records.items()}
            kept = {key for key, image_id in new_ids.items() if image_id is not None}
            with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as copy:
                for member in members:
                    key = _key(member.name)
                    if key not in kept:
                        continue
                    content = _content(tar, member)
                    if member.name.endswith(".json") and new_ids[key] != records[key]["image_id"]:
                        content = json.dumps({**records[key], "image_id": new_ids[key]}, ensure_ascii=False).encode()
                    _add(copy, member.name, content)
    except (tarfile.TarError, ValueError, KeyError) as error:
        raise _damaged(source, error) from error
    return len(kept)


def join_samples(sources: Sequence[Path], target: Path) -> int:
    """Copies the samples of several tars to one, in the order of their image ids; returns how many there are.

    Args:
        sources: The tars; no image is in two of them.
        target: The joined tar.

    Raises:
        SchemaError: A tar is damaged.
    """
    samples: list[tuple[str, str, tarfile.TarFile, list[tarfile.TarInfo]]] = []
    taken: set[str] = set()
    with ExitStack() as opened:
        for source in sources:
            try:
                tar = opened.enter_context(tarfile.open(source))
                members = tar.getmembers()
                records = _records(tar, members)
                by_key = groupby(members, lambda member: _key(member.name))
                samples += [(records[key]["image_id"], key, tar, list(group)) for key, group in by_key]
            except (tarfile.TarError, ValueError, KeyError) as error:
                raise _damaged(source, error) from error
        with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as joined:
            for image_id, old_key, tar, members in sorted(samples, key=lambda sample: sample[0]):
                key = sample_key(image_id, taken)
                taken.add(key)
                for member in members:
                    _add(joined, key + member.name.removeprefix(old_key), _content(tar, member))
    return len(taken)


def _records(tar: tarfile.TarFile, members: Sequence[tarfile.TarInfo]) -> dict[str, dict[str, Any]]:
    """Returns the JSON of each sample by its key."""
    return {_key(member.name): json.loads(_content(tar, member)) for member in members if member.name.endswith(".json")}


def _damaged(source: Path, error: Exception) -> SchemaError:
    return SchemaError(
        "A WebDataset tar of the output cannot be read.",
        where=str(source),
        found=str(error),
        remedy="Delete it and the part of the same name, and start the run again to redo its images.",
    )


def read_samples(uri: str) -> Iterator[dict[str, Any]]:
    """Yields the samples of a tar: their `key`, the `files` by ending, and what their text and JSON say; no images.

    Args:
        uri: Any WebDataset tar that is not compressed.

    Raises:
        SchemaError: The tar is damaged.
        StorageError: It is missing, or the service fails.
    """
    try:
        with storage.open_ranged(uri) as file, tarfile.open(fileobj=file, mode="r:", tarinfo=StrictTarInfo) as tar:
            for key, members in groupby(
                (member for member in tar if member.isfile()), lambda member: _key(member.name)
            ):
                sample: dict[str, Any] = {"key": key, "files": []}
                for member in members:
                    ending = member.name[len(key) + 1 :]
                    sample["files"].append(ending)
                    if ending == "txt":
                        sample["caption"] = _content(tar, member).decode(errors="replace")
                    elif ending == "json":
                        record = json.loads(_content(tar, member))
                        sample = (record if isinstance(record, dict) else {}) | sample
                yield sample
    except (tarfile.TarError, ValueError) as error:
        raise SchemaError(
            "A tar cannot be read as WebDataset.", where=uri, expected="samples of files with one key", found=str(error)
        ) from error


def read_images(uri: str) -> Iterator[tuple[str, str, bytes]]:
    """Yields the images of a tar that `write_samples` has written: id, URI and content.

    Raises:
        SchemaError: The tar is damaged.
        StorageError: It is missing, or the service fails.
    """
    with storage.local_file(uri) as path:
        try:
            with tarfile.open(path) as tar:
                for _, group in groupby(tar, lambda member: _key(member.name)):
                    image, *_, record = group
                    values = json.loads(_content(tar, record))
                    yield values["image_id"], values["image_uri"], _content(tar, image)
        except (tarfile.TarError, ValueError, KeyError) as error:
            raise _damaged(path, error) from error


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # its date and owner are 0, and the owner has no name
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None, "write_samples writes only files"
    return file.read()


def _key(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.split(".", 1)[0]


def plain_values(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row as JSON can hold it: bytes as base64, inf and nan as null, dates and decimals as text."""
    return {name: _plain(value) for name, value in row.items()}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value)
