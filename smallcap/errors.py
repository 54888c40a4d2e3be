"""The error taxonomy: what may become a row, and what stops a job.

`RowError` concerns one image and becomes that row's `status`/`error_code`/`error_message`. `RunError` concerns the
run (config, storage service, schema, index, checkpoint) and stops it. Every message says what happened, where, what was
expected, what was found and how to mend it. All errors survive pickling, because Ray carries them between processes.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from smallcap.phrasing import one_line, visible

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ConflictError",
    "ErrorCode",
    "IndexIntegrityError",
    "ManifestError",
    "RowError",
    "RunError",
    "SchemaError",
    "SmallCapError",
    "StorageError",
]

_LONGEST_VALUE = 500  # characters; a message with more is not read


class ErrorCode(StrEnum):
    """Why one image has no caption; the values are part of the schema."""

    NOT_FOUND = "not_found"  # the object does not exist
    FORBIDDEN = "forbidden"  # the object exists, and these credentials may not read it
    EMPTY = "empty"  # zero bytes
    NOT_AN_IMAGE = "not_an_image"  # no known image format's signature
    TRUNCATED = "truncated"  # an image whose data ends early or is damaged
    TOO_LARGE = "too_large"  # more pixels, bytes, memory or work than a decoder may take
    UNSUPPORTED = "unsupported"  # an image format or mode that the decoder refuses
    INVALID_URI = "invalid_uri"  # the row that names the image is malformed, or its URI cannot be read here
    TIMEOUT = "timeout"  # no complete answer in time, in every attempt
    UNAVAILABLE = "unavailable"  # the service failed or refused, in every attempt
    CRASHED = "crashed"  # the image ended the process that decoded it
    UNKNOWN_INDEX = "unknown_index"  # the row names an index that the run does not have


class SmallCapError(Exception):
    """Base of all errors that smallcap raises on purpose.

    Args:
        what: One sentence saying what went wrong.
        where: The URI, file, column or option concerned.
        expected: What would have been right.
        found: What was there instead.
        remedy: What the user can do.
    """

    def __init__(self, what: str, *, where: str = "", expected: str = "", found: str = "", remedy: str = "") -> None:
        self.what, self.where, self.expected, self.found, self.remedy = what, where, expected, found, remedy
        super().__init__(what)

    def __str__(self) -> str:
        """Returns one line for each thing that is said; what comes from elsewhere is escaped and shortened."""
        named = (
            ("where", _shown_place(self.where)),
            ("expected", one_line(self.expected)),
            ("found", one_line(self.found, _LONGEST_VALUE)),
            ("remedy", one_line(self.remedy)),
        )
        return "\n  ".join([one_line(self.what), *(f"{name}: {text}" for name, text in named if text)])

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.__dict__.copy())


def _shown_place(where: str) -> str:
    """Returns a place in one line; line breaks of a name are part of it."""
    return one_line(visible(where, kept=""), _LONGEST_VALUE)


def _rebuild(cls: type[SmallCapError], state: dict[str, Any]) -> SmallCapError:
    error = cls.__new__(cls)
    Exception.__init__(error, state["what"])
    error.__dict__.update(state)
    return error


class RowError(SmallCapError):
    """One image cannot be captioned; the others can. Its message is one line, for it is a cell of a table."""

    def __init__(self, code: ErrorCode, what: str, *, where: str = "", remedy: str = "") -> None:
        super().__init__(what, where=where, remedy=remedy)
        self.code = code

    def __str__(self) -> str:
        what = one_line(self.what, _LONGEST_VALUE)
        if self.where:
            what = f"{what.removesuffix('.')} ({_shown_place(self.where)})."
        return f"{what} {one_line(self.remedy)}".rstrip()


class RunError(SmallCapError):
    """The job cannot go on."""


class ConfigError(RunError):
    """An option, a config file, or what one of them names is wrong."""


class StorageError(RunError):
    """A storage service fails, or a path the job itself needs is missing or unreadable."""


class ConflictError(StorageError):
    """Another process has changed what this one was about to replace; nothing was written."""


class SchemaError(RunError):
    """A Parquet, CSV, JSON or Arrow file lacks columns or types that it must have."""


class ManifestError(RunError):
    """An index manifest or pointer is missing, malformed, or from an unknown format version."""


class IndexIntegrityError(RunError):
    """An index's bytes or contents contradict its manifest, or it does not fit the encoder that queries it."""


class CheckpointError(RunError):
    """A model checkpoint is missing, incomplete, or of an unknown kind."""
