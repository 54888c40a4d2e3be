"""A published index's manifest and pointer: their fields, their identity, and where they live.

    INDEX/
      current.json                         the pointer: which version readers open
      versions/<index_id>/manifest.json    immutable; one for each version
      files/<kind>-<sha256, 32 digits>.*   immutable; named by content, so that versions share what they have in common

The authority is docs/formats.md. A change of the fields raises `FORMAT_VERSION` and gets a CHANGELOG heading. This
module knows nothing of faiss or torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import Field, field_validator

from smallcap import storage
from smallcap.errors import ConflictError, IndexIntegrityError, ManifestError, StorageError
from smallcap.records import Record, VersionedRecord, parse_record

FORMAT_VERSION: Final = 1
MANIFEST_FILE = "manifest.json"
POINTER_FILE = "current.json"
VERSIONS_FOLDER = "versions"
FILES_FOLDER = "files"
_MOST_RETIRED = 1000  # former versions that a pointer remembers
_DIGITS_IN_NAME = 32  # of a sha256, in a file's name
_FILE = re.compile(rf"{FILES_FOLDER}/\w[\w.-]*", re.ASCII)
_INDEX_ID = r"^[0-9a-f]{16}$"


class EncoderIdentity(Record):
    """Which retrieval encoder made the embeddings; equal weights give equal identities wherever they are stored."""

    spec: str  # as the user gave it, for people
    weights_sha256: str  # of the weights file, for comparing
    dim: int = Field(ge=1)


class FileEntry(Record):
    """One file of the index."""

    file: str  # relative to the index's folder
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @classmethod
    def describe(cls, path: Path, kind: str, **fields: Any) -> Self:
        """Returns the entry of a local file, under the name that its content gives it.

        Args:
            path: The file; its suffix is kept.
            kind: What the file's name begins with, such as `shard`.
            fields: The subclass's own.
        """
        sha256 = storage.sha256_file(path)
        name = f"{FILES_FOLDER}/{kind}-{sha256[:_DIGITS_IN_NAME]}{path.suffix}"
        return cls(file=name, bytes=path.stat().st_size, sha256=sha256, **fields)

    @classmethod
    def adopt(cls, path: Path, index_uri: str | Path, kind: str, **fields: Any) -> Self:
        """Like `describe`, and moves the temporary file to that name in an index."""
        entry = cls.describe(path, kind, **fields)
        storage.move_in(path, storage.join(str(index_uri), entry.file))
        return entry

    @field_validator("file")
    @classmethod
    def _lies_in_files(cls, file: str) -> str:
        """A reader copies what a manifest names: it must not name a place elsewhere."""
        if not _FILE.fullmatch(file):
            raise ValueError(f"must be {FILES_FOLDER}/ and a name of letters, digits, '.', '_' and '-'")
        return file


class ShardEntry(FileEntry):
    """A shard of vectors, or of caption texts, and the global ids in it: [first_id, first_id + rows)."""

    rows: int = Field(ge=0)
    first_id: int = Field(ge=0)


class RemovedEntry(FileEntry):
    """The tombstones: a sorted int64 `.npy` of the ids that are no longer retrieved."""

    rows: int = Field(ge=1)


class SourceEntry(Record):
    """A file that captions came from."""

    uri: str
    name: str  # what the caption store calls it
    rows: int = Field(ge=0)
    sha256: str


class RecallEntry(Record):
    """Measured agreement with exact search on held-out queries, and the speed at which it was measured."""

    k: int = Field(ge=1)
    recall: float = Field(ge=0, le=1)
    recall_low: float | None = Field(None, ge=0, le=1)  # lower end of the one-sided 95% interval
    ceiling: float | None = Field(None, ge=0, le=1)  # recall with every list searched: what the codec alone allows
    queries: int = Field(ge=1)
    queries_per_s: float = Field(gt=0)
    nprobe: int | None = None


class RetiredVersion(Record):
    """A version that was the current one before."""

    index_id: str = Field(pattern=_INDEX_ID)
    until: str  # ISO 8601, UTC


class Pointer(VersionedRecord):
    """The content of `current.json`: the version that new readers open, and those that were current before it."""

    format_version: Literal[1] = FORMAT_VERSION
    index_id: str = Field(pattern=_INDEX_ID)
    retired: tuple[RetiredVersion, ...] = ()  # newest first


class IndexManifest(VersionedRecord):
    """All that a reader must know before it opens an index's files."""

    format_version: Literal[1] = FORMAT_VERSION
    index_id: str = Field("", pattern=r"^([0-9a-f]{16})?$")
    encoder: EncoderIdentity
    dim: int = Field(ge=1)
    metric: Literal["inner_product"] = "inner_product"  # of unit vectors, hence the cosine
    index_key: str  # of faiss's index factory
    nlist: int | None = None  # of an inverted file
    nprobe: int | None = None  # lists that a query searches
    k_factor: int = Field(1, ge=1)  # candidates per neighbour that `vectors` rank again; 1 where nothing is
    codec: str = "float32"  # of the vectors in the shards
    embedding_dtype: str = "float32"  # of the encoder's weights while it embedded; "imported" where it did not
    template: FileEntry
    shards: tuple[ShardEntry, ...] = Field(min_length=1)
    captions: tuple[ShardEntry, ...] = Field(min_length=1)
    vectors: tuple[ShardEntry, ...] = ()  # float16 `.npy`, one for each shard, where the shards' own codec is coarser
    removed: RemovedEntry | None = None
    max_captions_per_image: int = Field(ge=0)  # the over-fetch that excluding an image's own captions needs
    sources: tuple[SourceEntry, ...]
    filters: dict[str, Any]
    dropped: dict[str, int]
    operation: Literal["build", "add", "remove"] = "build"
    fingerprint: str = ""  # of all inputs and options that decided this version; the same build again is a no-op
    parents: tuple[str, ...] = ()  # ids of the versions that this one was made from
    trained_on: int | None = Field(None, ge=0)  # captions that the template's training saw the whole of
    recall_target: float | None = None  # of recall@4 at its lower 95% bound; None where exact by construction
    recall_queries: str | None = None  # what the recall was measured with: "images" or "captions with a modality gap"
    recall: tuple[RecallEntry, ...] = ()
    builder_version: str
    created_at: str

    @property
    def id_count(self) -> int:
        """Number of ids: every id is below it."""
        return sum(shard.rows for shard in self.shards)

    @property
    def ntotal(self) -> int:
        """Number of captions that can be retrieved."""
        return self.id_count - (self.removed.rows if self.removed else 0)

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """Every file of the version but the manifest itself."""
        removed = (self.removed,) if self.removed else ()
        return (self.template, *self.shards, *self.captions, *self.vectors, *removed)

    def with_index_id(self) -> IndexManifest:
        """Returns the manifest with its content's id filled in.

        The id hashes what a query's answer depends on: encoder, metric, key, search settings and the files' checksums.
        Two builds of the same texts with the same encoder thus have one id, whatever their dates, machines and measured
        speeds.
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
        """Checks that a query encoder lives in this index's embedding space.

        Raises:
            IndexIntegrityError: Its weights or its dimension differ from those that built the index.
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
    """Returns the time now as ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def manifest_uri(index_uri: str, index_id: str) -> str:
    """Returns where the manifest of one version of an index is."""
    return storage.join(index_uri, VERSIONS_FOLDER, index_id, MANIFEST_FILE)


def load_pointer(index_uri: str) -> Pointer:
    """Returns an index's pointer.

    Raises:
        ManifestError: There is no pointer at `index_uri`, or it is malformed.
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
    """Like `write_pointer`, but only while the pointer still names the version `seen`, or `None` where there is none.

    Raises:
        ConflictError: Another publisher has switched it since; nothing is written.
    """
    target = storage.join(index_uri, POINTER_FILE)

    def switch(found: bytes | None) -> bytes:
        pointer = _parse_pointer(found, target)
        current = pointer.index_id if pointer else None
        if current != seen:
            raise ConflictError(
                "The index pointer has been switched meanwhile.", where=target, found=f"version {current}"
            )
        return _pointer_bytes(index_id, pointer)

    storage.update_bytes(target, switch)


def _parse_pointer(data: bytes | None, where: str) -> Pointer | None:
    return None if data is None else parse_record(Pointer, data, where, ManifestError)


def _pointer_bytes(index_id: str, former: Pointer | None) -> bytes:
    """Returns a pointer to `index_id` that remembers which versions were current before, and until when."""
    retired: dict[str, RetiredVersion] = {}  # newest first
    if former is not None:
        for entry in (RetiredVersion(index_id=former.index_id, until=utc_now()), *former.retired):
            retired.setdefault(entry.index_id, entry)
    retired.pop(index_id, None)
    return Pointer(index_id=index_id, retired=tuple(retired.values())[:_MOST_RETIRED]).to_json().encode()


def load_manifest(index_uri: str, index_id: str | None = None) -> IndexManifest:
    """Loads the manifest of one version of a published index, by default the current one.

    Raises:
        ManifestError: There is no such index or version, or its manifest is malformed.
        IndexIntegrityError: The manifest's content is not the one its folder is named by.
    """
    index_id = index_id or load_pointer(index_uri).index_id
    where = manifest_uri(index_uri, index_id)
    manifest = parse_record(IndexManifest, storage.read_bytes(where), where, ManifestError)
    if manifest.index_id != index_id or manifest.with_index_id().index_id != index_id:
        raise IndexIntegrityError(
            "The manifest does not belong in this version's folder.",
            where=where,
            expected=index_id,
            found=manifest.with_index_id().index_id,
            remedy="Restore the folder from where it was published, or rebuild the index.",
        )
    return manifest
