"""The record of a folder whose subfolders are the runs of one pass, `_variants.json`: their names, in order."""

from __future__ import annotations

from typing import Literal

from smallcap import storage
from smallcap.errors import SchemaError
from smallcap.records import VersionedRecord, load_record

VARIANTS_FILE = "_variants.json"


class VariantsRecord(VersionedRecord):
    """The content of `_variants.json`."""

    format_version: Literal[1] = 1
    variants: tuple[str, ...]  # each the name of its run's folder

    def write_to(self, out: str) -> None:
        """Writes the record, atomically."""
        self.write(storage.join(out, VARIANTS_FILE))


def load_variants(out: str) -> tuple[str, ...]:
    """Returns the names of the variants in a folder; none where it is no folder of variants.

    Raises:
        SchemaError: The record is malformed, or of an unknown format version.
        StorageError: The service fails.
    """
    record = load_record(VariantsRecord, storage.join(out, VARIANTS_FILE), SchemaError)
    return record.variants if record else ()


def runs_in(path: str) -> list[str]:
    """Returns the folders of the variants in a folder, or the path itself where there are none."""
    return [storage.join(path, name) for name in load_variants(path)] or [path]


def name_variants(path: str) -> str:
    """Returns a remedy for a command that wants one run and was given a folder of variants; empty for other paths."""
    folders = [storage.join(path, name) for name in load_variants(path)]
    return f"It holds variants; name one of them: {', '.join(folders)}." if folders else ""
