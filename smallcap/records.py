"""The JSON files that say what a folder holds (`run.json`, `manifest.json`, …): how they are written and read."""

from __future__ import annotations

import json
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from smallcap import storage
from smallcap.errors import RunError


class Record(BaseModel):
    """Base of these files' contents, and of what lies in them: frozen, and unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class VersionedRecord(Record):
    """The whole content of a file.

    A subclass gives `format_version` the type `Literal` of the one version that this release reads and writes, and that
    version as its default.
    """

    format_version: int

    def to_json(self) -> str:
        """Returns the record as indented JSON."""
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"

    def write(self, uri: str) -> None:
        """Writes the record, atomically."""
        storage.write_bytes(uri, self.to_json().encode())


RecordT = TypeVar("RecordT", bound=VersionedRecord)


def parse_record(kind: type[RecordT], data: bytes, where: str, error: type[RunError]) -> RecordT:
    """Parses and checks a file's content.

    Args:
        kind: What it must be.
        data: The content.
        where: The file's URI.
        error: What to raise.

    Raises:
        error: It is not JSON, has another format version, or lacks or mistypes a field.
    """
    name = where.rsplit("/", 1)[-1]
    try:
        values = json.loads(data)
        version = values["format_version"]
    except (ValueError, TypeError, KeyError) as cause:
        raise error(
            f"{name} is malformed.", where=where, expected="JSON with format_version", found=repr(cause)
        ) from cause
    known = kind.model_fields["format_version"].default
    if version != known:
        raise error(
            f"{name} has a format version that this release cannot read.",
            where=where,
            expected=str(known),
            found=str(version),
            remedy="Use the smallcap release that wrote it, or a newer one.",
        )
    try:
        return kind.model_validate(values)
    except ValidationError as cause:
        problem = cause.errors()[0]
        field = ".".join(map(str, problem["loc"]))
        raise error(f"A field of {name} is wrong.", where=f"{where}: {field}", found=problem["msg"]) from cause


def load_record(kind: type[RecordT], uri: str, error: type[RunError]) -> RecordT | None:
    """Loads and checks a file; None where there is none.

    Raises:
        error: As `parse_record`.
        StorageError: The service fails.
    """
    return parse_record(kind, storage.read_bytes(uri), uri, error) if storage.exists(uri) else None
