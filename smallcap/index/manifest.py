"""The manifest and the pointer of a published index: their fields, their identity, and where they live.

    INDEX/
      current.json                         the pointer: which version readers open
      versions/<index_id>/manifest.json    immutable; one for each version
      files/<kind>-<sha256, 32 digits>.*   immutable; named by content, so that versions share equal files

docs/formats.md is the authority. A change of the fields raises `FORMAT_VERSION`, keeps reading version 1, and gets a
CHANGELOG heading. This module knows nothing of faiss or torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import Field, field_validator

from smallcap import storage
from smallcap.errors import ConfigError, ConflictError, IndexIntegrityError, ManifestError, StorageError
from smallcap.records import Record, VersionedRecord, parse_record

FORMAT_VERSION: Final = 1
MANIFEST_FILE = "manifest.json"
POINTER_FILE = "current.json"
VERSIONS_FOLDER = "versions"
FILES_FOLDER = "files"
_MAX_RETIRED = 1000  # former versions that a pointer remembers
_DIGITS_IN_NAME = 32  # digits of the sha256 in a file name
_FILE = re.compile(rf"{FILES_FOLDER}/\w[\w.-]*", re.ASCII)
_INDEX_ID = r"^[0-9a-f]{16}$"
_BETWEEN_IDS = "+"  # of the versions that one run searches


class EncoderIdentity(Record):
    """Which retrieval encoder made the embeddings; equal weights give equal identities wherever they are stored."""

    spec: str  # as the user gave it, for people
    weights_sha256: str  # sha256 of the weights file, for comparing
    dim: int = Field(ge=1)


class FileEntry(Record):
    """One file of the index."""

    file: str  # relative to the index's folder
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @classmethod
    def describe(cls, path: Path, kind: str, **fields: Any) -> Self:
        """Returns the entry of a local file, with a name made from its content.

        Args:
            path: The file; its suffix is kept.
            kind: The start of the name, such as `shard`.
            fields: The fields that the subclass adds.
        """
        sha256 = storage.sha256_file(path)
        name = f"{FILES_FOLDER}/{kind}-{sha256[:_DIGITS_IN_NAME]}{path.suffix}"
        return cls(file=name, bytes=path.stat().st_size, sha256=sha256, **fields)

    @classmethod
    def adopt(cls, path: Path, index_uri: str | Path, kind: str, **fields: Any) -> Self:
        """Does what `describe` does, and moves the temporary file to that name in an index."""
        entry = cls.describe(path, kind, **fields)
        storage.move_in(path, storage.join(str(index_uri), entry.file))
        return entry

    @field_validator("file")
    @classmethod
    def _lies_in_files(cls, file: str) -> str:
        """Readers copy the files that a manifest names, so it must not name a path elsewhere."""
        if not _FILE.fullmatch(file):
            raise ValueError(f"must be {FILES_FOLDER}/ and a name of letters, digits, '.', '_' and '-'")
        return file


class ShardEntry(FileEntry):
    """A shard of vectors or of caption texts, with the global ids [first_id, first_id + rows)."""

    rows: int = Field(ge=0)
    first_id: int = Field(ge=0)


class RemovedEntry(FileEntry):
    """The tombstones: a sorted int64 `.npy` of the ids that are no longer retrieved."""

    rows: int = Field(ge=1)


class SourceEntry(Record):
    """A file that captions came from."""

    uri: str
    name: str  # its name in the caption store
    rows: int = Field(ge=0)
    sha256: str


class RecallEntry(Record):
    """The measured agreement with exact search on held-out queries, and the speed of that search."""

    k: int = Field(ge=1)
    recall: float = Field(ge=0, le=1)
    recall_low: float | None = Field(None, ge=0, le=1)  # lower end of the one-sided 95% interval
    ceiling: float | None = Field(
        None, ge=0, le=1
    )  # recall where every list is searched, so that only the codec limits it
    queries: int = Field(ge=1)
    queries_per_s: float = Field(gt=0)
    nprobe: int | None = None


class RetiredVersion(Record):
    """A version that used to be the current one."""

    index_id: str = Field(pattern=_INDEX_ID)
    until: str  # ISO 8601, UTC


class Pointer(VersionedRecord):
    """The content of `current.json`: the version that new readers open, and the former ones."""

    format_version: Literal[1] = FORMAT_VERSION
    index_id: str = Field(pattern=_INDEX_ID)
    retired: tuple[RetiredVersion, ...] = ()  # newest first


class IndexManifest(VersionedRecord):
    """All that a reader must know before it opens the files of an index."""

    format_version: Literal[1] = FORMAT_VERSION
    index_id: str = Field("", pattern=r"^([0-9a-f]{16})?$")
    encoder: EncoderIdentity
    dim: int = Field(ge=1)
    metric: Literal["inner_product"] = "inner_product"  # the vectors have unit length, so it is the cosine
    index_key: str  # for faiss's index factory
    nlist: int | None = None  # lists of an inverted file
    nprobe: int | None = None  # lists that a query searches
    k_factor: int = Field(1, ge=1)  # candidates per neighbour; 1 where `vectors` rank nothing again
    codec: str = "float32"  # how the shards keep vectors
    embedding_dtype: str = "float32"  # the encoder's precision; "imported" where the dumps had embeddings
    template: FileEntry
    shards: tuple[ShardEntry, ...] = Field(min_length=1)
    captions: tuple[ShardEntry, ...] = Field(min_length=1)
    vectors: tuple[ShardEntry, ...] = ()  # float16 `.npy`, one for each shard, where the shards' own codec is coarser
    removed: RemovedEntry | None = None
    max_captions_per_image: int = Field(ge=0)  # how many more to fetch where an image's own captions are excluded
    sources: tuple[SourceEntry, ...]
    filters: dict[str, Any]
    dropped: dict[str, int]
    operation: Literal["build", "add", "remove"] = "build"
    fingerprint: str = ""  # identifies all inputs and options; the same build again is a no-op
    parents: tuple[str, ...] = ()  # ids of the versions that this one was made from
    trained_on: int | None = Field(None, ge=0)  # captions that there were when the template was trained
    recall_target: float | None = None  # for the lower 95% bound of recall@4; None where the search is exact
    recall_queries: str | None = None  # "images" or "captions with a modality gap"
    recall: tuple[RecallEntry, ...] = ()
    builder_version: str
    created_at: str

    @property
    def id_count(self) -> int:
        """The number of ids; every id is below it."""
        return sum(shard.rows for shard in self.shards)

    @property
    def ntotal(self) -> int:
        """The number of captions that can be retrieved."""
        return self.id_count - (self.removed.rows if self.removed else 0)

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """Every file of the version except the manifest."""
        removed = (self.removed,) if self.removed else ()
        return (self.template, *self.shards, *self.captions, *self.vectors, *removed)

    def with_index_id(self) -> IndexManifest:
        """Returns the manifest with the id of its content.

        The id hashes all that an answer depends on: encoder, metric, key, search settings and the files' checksums.
        Two builds of the same texts with the same encoder thus have the same id, whatever their dates, machines and
        measured speeds.
        """
        content = {
            "format_version": self.format_version,
            "weights_sha256": self.encoder.weights_sha256,
            "metric": self.metric,
            "index_key": self.index_key,
            "nprobe": self.nprobe,
            "k_factor": self.k_factor,
            "files": [[entry.file, entry.sha256] for entry in self.files],
        }
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return self.model_copy(update={"index_id": digest[:16]})

    def check_encoder(self, encoder: EncoderIdentity, where: str) -> None:
        """Checks that a query encoder is the one that built the index.

        Raises:
            IndexIntegrityError: Its weights or its dimension differ.
        """
        if encoder.dim == self.dim and encoder.weights_sha256 == self.encoder.weights_sha256:
            return
        raise IndexIntegrityError(
            "The index was built with another retrieval encoder.",
            where=where,
            expected=_describe(self.encoder),
            found=_describe(encoder),
            remedy="Query with the index's own encoder, or rebuild the index with this one.",
        )


def _describe(encoder: EncoderIdentity) -> str:
    return f"{encoder.spec} (dim {encoder.dim}, weights {encoder.weights_sha256[:12]})"


def utc_now() -> str:
    """Returns the current time as ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def manifest_uri(index_uri: str, index_id: str) -> str:
    """Returns the URI of the manifest of one version."""
    return storage.join(index_uri, VERSIONS_FOLDER, index_id, MANIFEST_FILE)


def load_pointer(index_uri: str) -> Pointer:
    """Returns an index's pointer.

    Raises:
        ManifestError: There is no pointer in `index_uri`, or it is malformed.
    """
    where = storage.join(index_uri, POINTER_FILE)
    try:
        data = storage.read_bytes(where)
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            raise ManifestError(
                "There is no published index here.",
                where=index_uri,
                expected=f"{POINTER_FILE} and {VERSIONS_FOLDER}/",
                remedy="Give the --out of a finished `smallcap build-index`.",
            ) from error
        raise
    return parse_record(Pointer, data, where, ManifestError)


def write_pointer(index_uri: str, index_id: str) -> None:
    """Makes `index_id` the version that new readers open; the switch is atomic."""
    target = storage.join(index_uri, POINTER_FILE)
    storage.update_bytes(target, lambda found: _pointer_bytes(index_id, _parse_pointer(found, target)))


def switch_pointer(index_uri: str, index_id: str, seen: str | None) -> None:
    """Does what `write_pointer` does, if the pointer still names the version `seen`; None means that there is none.

    Raises:
        ConflictError: Another publisher has switched it since; nothing is written.
    """
    target = storage.join(index_uri, POINTER_FILE)

    def switch(found: bytes | None) -> bytes:
        pointer = _parse_pointer(found, target)
        current = pointer.index_id if pointer else None
        if current != seen:
            raise ConflictError(
                "Another publisher has switched the index pointer.", where=target, found=f"version {current}"
            )
        return _pointer_bytes(index_id, pointer)

    storage.update_bytes(target, switch)


def _parse_pointer(data: bytes | None, where: str) -> Pointer | None:
    return None if data is None else parse_record(Pointer, data, where, ManifestError)


def _pointer_bytes(index_id: str, former: Pointer | None) -> bytes:
    """Returns a pointer to `index_id` that remembers the former versions, and until when they were current."""
    retired: dict[str, RetiredVersion] = {}  # newest first
    if former is not None:
        for entry in (RetiredVersion(index_id=former.index_id, until=utc_now()), *former.retired):
            retired.setdefault(entry.index_id, entry)
    retired.pop(index_id, None)
    return Pointer(index_id=index_id, retired=tuple(retired.values())[:_MAX_RETIRED]).to_json().encode()


def load_manifest(index_uri: str, index_id: str | None = None) -> IndexManifest:
    """Loads the manifest of one version of a published index, by default the current one.

    Raises:
        ManifestError: There is no such index or version, or its manifest is malformed.
        IndexIntegrityError: The name of its folder contradicts the manifest's content.
    """
    index_id = index_id or load_pointer(index_uri).index_id
    where = manifest_uri(index_uri, index_id)
    manifest = parse_record(IndexManifest, storage.read_bytes(where), where, ManifestError)
    if manifest.index_id != index_id or manifest.with_index_id().index_id != index_id:
        raise IndexIntegrityError(
            "The manifest does not belong in this folder.",
            where=where,
            expected=index_id,
            found=manifest.with_index_id().index_id,
            remedy="Restore the folder from where it was published, or rebuild the index.",
        )
    return manifest


def join_index_ids(versions: Sequence[IndexManifest | Pointer]) -> str:
    """Returns the ids of the versions that are searched together, in their order, as one text."""
    return _BETWEEN_IDS.join(version.index_id for version in versions)


def split_index_ids(index_id: str | None) -> list[str]:
    """Returns the ids in a text of `join_index_ids`; none for None."""
    return index_id.split(_BETWEEN_IDS) if index_id else []


def load_manifests(uris: Sequence[str], index_id: str | None = None) -> tuple[IndexManifest, ...]:
    """Loads the manifests of indexes that are searched together, by default of their current versions.

    Args:
        uris: The indexes.
        index_id: The ids of their versions, as `join_index_ids` writes them.

    Raises:
        ConfigError: There are more or fewer ids than indexes, or the indexes have different encoders.
        ManifestError: There is no such index or version, or its manifest is malformed.
        IndexIntegrityError: The name of a version's folder contradicts its content.
    """
    ids: Sequence[str | None] = split_index_ids(index_id) or [None] * len(uris)
    if len(ids) != len(uris):
        raise ConfigError(
            "Each index needs the id of its version.",
            where="index_id",
            expected=f"{len(uris)} ids",
            found=str(index_id),
        )
    manifests = tuple(map(load_manifest, uris, ids))
    for manifest, uri in zip(manifests[1:], uris[1:], strict=True):
        first, other = manifests[0].encoder, manifest.encoder
        if (first.weights_sha256, first.dim) != (other.weights_sha256, other.dim):
            raise ConfigError(
                "The indexes have different retrieval encoders, so their scores cannot be compared.",
                where=uri,
                expected=f"{_describe(first)}, as {uris[0]} has",
                found=_describe(other),
                remedy="Leave one out, or embed its captions with the other's encoder: smallcap build-index --from "
                f"{uri} --encoder {first.spec} --out …",
            )
    return manifests


def share_of(entries: Sequence[ShardEntry], partition: tuple[int, int]) -> Sequence[ShardEntry]:
    """Returns the contiguous shards of one partition; all partitions have about equally many rows.

    Raises:
        ConfigError: There are fewer shards than partitions.
    """
    number, count = partition
    if count > len(entries):
        raise ConfigError(
            "The index has fewer shards than the partitions asked for.",
            where="retrieval.partitions",
            expected=f"at most {len(entries)}",
            found=str(count),
            remedy="Ask for fewer partitions, or build the index with more --shards.",
        )
    ends = list(accumulate(entry.rows for entry in entries))
    middles = [end - entry.rows / 2 for end, entry in zip(ends, entries, strict=True)]
    starts = [bisect_left(middles, ends[-1] * place / count) for place in range(count)]
    for place in range(1, count):  # no share is empty, however uneven the shards are
        starts[place] = min(max(starts[place], starts[place - 1] + 1), len(entries) - (count - place))
    bounds = list(pairwise([*starts, len(entries)]))
    first, stop = bounds[number]
    return entries[first:stop]
