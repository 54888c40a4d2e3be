"""Lists the versions of a published index, goes back to one, and removes what no version needs.

A run pins the version it began with, and its actors may open it long after another has become current. A version is
therefore removed only some time after it stopped being current, and a file only some time after it was written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from index_builder.work.staging import is_abandoned, staging_folders
from smallcap import storage
from smallcap.errors import ConfigError, ManifestError
from smallcap.index.manifest import (
    FILES_FOLDER,
    VERSIONS_FOLDER,
    IndexManifest,
    load_manifest,
    load_pointer,
    manifest_uri,
    write_pointer,
)

DEFAULT_GRACE = timedelta(days=1)


@dataclass(frozen=True)
class Version:
    """One published version."""

    manifest: IndexManifest
    is_current: bool
    current_until: str | None  # ISO 8601; None for the current version, and for one that never was current


def list_versions(index_uri: str) -> list[Version]:
    """Returns all versions, newest first.

    Raises:
        ManifestError: There is no published index.
    """
    pointer = load_pointer(index_uri)
    until = {entry.index_id: entry.until for entry in pointer.retired}
    versions = [
        Version(manifest, manifest.index_id == pointer.index_id, until.get(manifest.index_id))
        for manifest in _manifests(index_uri)
    ]
    return sorted(versions, key=lambda version: (version.manifest.created_at, version.is_current), reverse=True)


def _manifests(index_uri: str) -> Iterator[IndexManifest]:
    for folder in storage.list_folder(storage.join(index_uri, VERSIONS_FOLDER)):
        index_id = folder.rsplit("/", 1)[-1]
        if storage.exists(manifest_uri(index_uri, index_id)):  # a version without one does not exist
            yield load_manifest(index_uri, index_id)


def use_version(index_uri: str, wanted: str) -> IndexManifest:
    """Makes a version the current one.

    Args:
        index_uri: The index.
        wanted: The version's id, the beginning of its id, or `previous`: the version that was current before.

    Raises:
        ConfigError: No version or several versions match.
        IndexIntegrityError: The version's manifest is damaged.
    """
    ids = [version.manifest.index_id for version in list_versions(index_uri)]
    if wanted == "previous":
        matches = [entry.index_id for entry in load_pointer(index_uri).retired if entry.index_id in ids][:1]
    else:
        matches = [index_id for index_id in ids if index_id.startswith(wanted)]
    if len(matches) != 1:
        raise ConfigError(
            "There is no such version." if not matches else "Several versions have ids that begin like this.",
            where=index_uri,
            expected=", ".join(ids),
            found=wanted,
            remedy=f"See smallcap index list {index_uri}.",
        )
    manifest = load_manifest(index_uri, matches[0])
    missing = [entry.file for entry in manifest.files if storage.size(storage.join(index_uri, entry.file)) is None]
    if missing:
        raise ManifestError(
            "Files of this version are missing.", where=index_uri, expected=", ".join(missing), remedy="Rebuild it."
        )
    if manifest.index_id != load_pointer(index_uri).index_id:
        write_pointer(index_uri, manifest.index_id)
    return manifest


@dataclass(frozen=True)
class Garbage:
    """What a collection removes, or would remove."""

    versions: tuple[str, ...]
    files: tuple[str, ...]  # URIs
    bytes: int
    staging: tuple[str, ...]  # URIs


def collect_garbage(index_uri: str, grace: timedelta = DEFAULT_GRACE, keep: int = 1, dry_run: bool = False) -> Garbage:
    """Removes versions, files and staging folders that nobody needs any more.

    Args:
        index_uri: The index.
        grace: How long a version stays after it was last current (or was made), and a file after it was written.
        keep: How many former versions stay in any case, latest first.
        dry_run: Whether to remove nothing, and only return what would be removed.

    Returns:
        What was removed.
    """
    versions = list_versions(index_uri)
    before = datetime.now(UTC) - grace
    former = sorted((v for v in versions if not v.is_current), key=_last_needed, reverse=True)
    old = [version.manifest for version in former[keep:] if _last_needed(version) < before]
    needed = {entry.file for v in versions if v.manifest not in old for entry in v.manifest.files}
    folders = staging_folders(index_uri)
    staging = [uri for uri in folders if is_abandoned(uri, grace)]
    files: list[str] = []
    if len(staging) == len(folders):  # what a live build has written is in no manifest yet
        files = [
            uri
            for uri in storage.list_folder(storage.join(index_uri, FILES_FOLDER))
            if f"{FILES_FOLDER}/{uri.rsplit('/', 1)[-1]}" not in needed and storage.modified_at(uri) < before
        ]
    sizes = sum(storage.size(uri) or 0 for uri in files)
    if not dry_run:
        for manifest in old:  # the manifest first: a version without one does not exist
            storage.remove(manifest_uri(index_uri, manifest.index_id))
            storage.remove(storage.join(index_uri, VERSIONS_FOLDER, manifest.index_id))
        for uri in [*files, *staging]:
            storage.remove(uri)
    return Garbage(tuple(manifest.index_id for manifest in old), tuple(files), sizes, tuple(staging))


def _last_needed(version: Version) -> datetime:
    """Returns when a version was made or was last current, whichever is later."""
    return datetime.fromisoformat(max(version.manifest.created_at, version.current_until or ""))


def parse_grace(text: str) -> timedelta:
    """Parses a duration such as `0s`, `90s`, `30m`, `12h` or `7d`.

    Raises:
        ConfigError: The text is not a duration.
    """
    units = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
    number, unit = text[:-1], text[-1:]
    if unit not in units or not number.isdigit():
        raise ConfigError(
            "This is not a duration.", where="--grace", expected="such as 90s, 30m, 12h or 7d", found=text
        )
    return timedelta(**{units[unit]: int(number)})
