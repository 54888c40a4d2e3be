"""A published index's manifest and pointer: their fields, their identity, and where they live.

    INDEX/
      current.json                      the pointer: which version readers open
      versions/<index_id>/              immutable
        manifest.json  template.faiss  shards/shard-00000.faiss …  captions/captions-00000.arrow …

The authority is docs/formats.md. A change of the fields raises `FORMAT_VERSION`, keeps reading the old one, and gets a
CHANGELOG heading. This module knows nothing of faiss or torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from smallcap import storage
from smallcap.errors import IndexIntegrityError, ManifestError, StorageError

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
POINTER_FILE = "current.json"
TEMPLATE_FILE = "template.faiss"
VERSIONS_FOLDER = "versions"
_FILE = re.compile(r"[\w.-]+(/[\w.-]+)*", re.ASCII)
_INDEX_ID = re.compile(r"[0-9a-f]{16}")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EncoderIdentity(_Record):
    """Which retrieval encoder made the embeddings; equal weights give equal identities wherever they are stored."""

    spec: str  # as the user gave it, for people
    weights_sha256: str  # of the weights file, for comparing
    dim: int = Field(ge=1)


class FileEntry(_Record):
    """One file of the index."""

    file: str  # relative to the version's folder
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @classmethod
    def describe(cls, path: Path, file: str, **fields: Any) -> Self:
        """Returns the entry of a local file that the version will hold as `file`."""
        return cls(file=file, bytes=path.stat().st_size, sha256=storage.sha256_file(path), **fields)

    @field_validator("file")
    @classmethod
    def _stays_inside(cls, file: str) -> str:
        """A reader copies what a manifest names: it must not name a place outside the version."""
        if not _FILE.fullmatch(file) or ".." in file:
            raise ValueError("must be a relative path of letters, digits, '.', '_' and '-', without '..'")
        return file


class ShardEntry(FileEntry):
    """A shard of vectors, or of caption texts, and the global ids in it: [first_id, first_id + rows)."""

    rows: int = Field(ge=0)
    first_id: int = Field(ge=0)


class SourceEntry(_Record):
    """A caption dump's file that the index was built from."""

    uri: str
    rows: int = Field(ge=0)
    sha256: str


class RecallEntry(_Record):
    """Measured agreement with exact search, and the speed at which it was measured."""

    k: int = Field(ge=1)
    recall: float = Field(ge=0, le=1)
    queries: int = Field(ge=1)
    queries_per_s: float = Field(gt=0)
    nprobe: int | None = None


class IndexManifest(_Record):
    """All that a reader must know before it opens an index's files; format version 1."""

    format_version: Literal[1] = 1
    index_id: str = Field("", pattern=r"^([0-9a-f]{16})?$")
    encoder: EncoderIdentity
    dim: int = Field(ge=1)
    metric: Literal["inner_product"] = "inner_product"  # of unit vectors, hence the cosine
    index_key: str
    nlist: int | None = None
    codec: str = "float32"  # of the stored vectors
    embedding_dtype: str = "float32"  # of the encoder's weights while it embedded
    template: FileEntry
    shards: tuple[ShardEntry, ...] = Field(min_length=1)
    captions: tuple[ShardEntry, ...] = Field(min_length=1)
    max_captions_per_image: int = Field(ge=0)  # the over-fetch that excluding an image's own captions needs
    sources: tuple[SourceEntry, ...]
    filters: dict[str, Any]
    dropped: dict[str, int]
    recall: tuple[RecallEntry, ...] = ()
    builder_version: str
    created_at: str

    @property
    def ntotal(self) -> int:
        """Number of vectors, and of captions."""
        return sum(shard.rows for shard in self.shards)

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """Every file of the version but the manifest itself."""
        return (self.template, *self.shards, *self.captions)

    def with_index_id(self) -> IndexManifest:
        """Returns the manifest with its content's id filled in.

        The id hashes what a query's answer depends on: encoder, metric, key and the files' checksums. Two builds of the
        same texts with the same encoder thus have one id, whatever their dates, machines and measured speeds.
        """
        content = {
            "format_version": self.format_version,
            "weights_sha256": self.encoder.weights_sha256,
            "metric": self.metric,
            "index_key": self.index_key,
            "files": [[entry.file, entry.sha256] for entry in self.files],
        }
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return self.model_copy(update={"index_id": digest[:16]})

    def to_json(self) -> str:
        """Returns the manifest as indented JSON."""
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"

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


def version_uri(index_uri: str, index_id: str) -> str:
    """Returns the folder of one version of an index."""
    return storage.join(index_uri, VERSIONS_FOLDER, index_id)


def parse_manifest(data: bytes, where: str) -> IndexManifest:
    """Parses and checks a manifest.

    Raises:
        ManifestError: It is not JSON, has an unknown format version, or lacks or mistypes a field.
    """
    try:
        values = json.loads(data)
        version = values["format_version"]
    except (ValueError, TypeError, KeyError) as error:
        raise ManifestError(
            "This is not an index manifest.", where=where, expected="JSON with format_version", found=str(error)
        ) from error
    if version != FORMAT_VERSION:
        raise ManifestError(
            "The index has a format version that this release cannot read.",
            where=where,
            expected=str(FORMAT_VERSION),
            found=str(version),
            remedy="Upgrade smallcap, or rebuild the index.",
        )
    try:
        return IndexManifest.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"])
        raise ManifestError(
            "A field of the manifest is wrong.", where=f"{where}: {field}", found=problem["msg"]
        ) from error


def load_pointer(index_uri: str) -> str:
    """Returns the id of the version that an index's pointer names.

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
    try:
        index_id = json.loads(data)["index_id"]
    except (ValueError, TypeError, KeyError) as error:
        raise ManifestError("The index pointer is malformed.", where=where, found=str(error)) from error
    if not isinstance(index_id, str) or not _INDEX_ID.fullmatch(index_id):
        raise ManifestError("The index pointer names no index id.", where=where, found=repr(index_id))
    return index_id


def write_pointer(index_uri: str, index_id: str) -> None:
    """Makes `index_id` the version that new readers open; the switch is atomic."""
    pointer = {"format_version": FORMAT_VERSION, "index_id": index_id}
    storage.write_bytes(storage.join(index_uri, POINTER_FILE), (json.dumps(pointer) + "\n").encode())


def load_manifest(index_uri: str, index_id: str | None = None) -> IndexManifest:
    """Loads the manifest of one version of a published index, by default the current one.

    Raises:
        ManifestError: There is no such index or version, or its manifest is malformed.
        IndexIntegrityError: The manifest's content is not the one its folder is named by.
    """
    index_id = index_id or load_pointer(index_uri)
    where = storage.join(version_uri(index_uri, index_id), MANIFEST_FILE)
    manifest = parse_manifest(storage.read_bytes(where), where)
    if manifest.index_id != index_id or manifest.with_index_id().index_id != index_id:
        raise IndexIntegrityError(
            "The manifest does not belong in this version's folder.",
            where=where,
            expected=index_id,
            found=manifest.with_index_id().index_id,
            remedy="Restore the folder from where it was published, or rebuild the index.",
        )
    return manifest
