"""Writes and reads the JSON files that say what a folder holds (`_run.json`, `manifest.json`, …)."""

from __future__ import annotations

import json
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from smallcap import storage
from smallcap.errors import RunError
from smallcap.redaction import without_secrets


class Record(BaseModel):
    """Base of everything that such a file holds: frozen, and unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class VersionedRecord(Record):
    """The whole content of a file.

    A subclass declares `format_version` as a `Literal` of the only version that this release reads and writes, with
    that version as the default.
    """

    format_version: int

    def to_json(self) -> str:
        """Returns the record as indented JSON, without secrets that its texts hold."""
        return json.dumps(without_secrets(self.model_dump(mode="json")), indent=2, ensure_ascii=False) + "\n"

    def write(self, uri: str) -> None:
        """Writes the record, atomically."""
        storage.write_bytes(uri, self.to_json().encode())


RecordT = TypeVar("RecordT", bound=VersionedRecord)


def parse_record(kind: type[RecordT], data: bytes, where: str, error: type[RunError]) -> RecordT:
    """Parses and checks a file's content.

    Args:
        kind: Class of the record.
        data: The file's content.
        where: The file's URI.
        error: Class of the error to raise.

    Raises:
        error: It is not JSON, has another format version, or a field is missing or wrong.
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
    """Loads and checks a file; returns None if it does not exist.

    Raises:
        error: As `parse_record`.
        StorageError: The service fails.
    """
    return parse_record(kind, storage.read_bytes(uri), uri, error) if storage.exists(uri) else None
