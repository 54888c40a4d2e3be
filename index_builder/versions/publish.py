"""Makes a finished version the current one: files first, then the manifest, then the pointer.

The files are already in their final place, under names that are their fingerprints. On a local disk and on S3, the
pointer is switched only if no other publisher has switched it since this build began.
"""

from __future__ import annotations

from smallcap import storage
from smallcap.errors import ConflictError, IndexIntegrityError, ManifestError, StorageError
from smallcap.index.manifest import IndexManifest, load_manifest, load_pointer, manifest_uri, switch_pointer


def load_current(index_uri: str) -> IndexManifest | None:
    """Returns the current version's manifest; `None` where nothing is published yet.

    Raises:
        ManifestError: The pointer or the manifest is malformed, or of another format version.
    """
    try:
        index_id = load_pointer(index_uri).index_id
    except ManifestError as error:
        if isinstance(error.__cause__, StorageError):
            return None
        raise
    return load_manifest(index_uri, index_id)


def publish_version(index_uri: str, manifest: IndexManifest, seen: str | None) -> None:
    """Writes a version's manifest and makes it the current one.

    Args:
        index_uri: The index.
        manifest: The manifest, with its id; all its files are in the index.
        seen: Id of the version that was current when the build began; None where there was none.

    Raises:
        IndexIntegrityError: A file is missing (an index is never partial).
        ConflictError: Another publisher came first; `index use` can make the new version current.
    """
    for entry in manifest.files:
        found = storage.size(storage.join(index_uri, entry.file))
        if found != entry.bytes:
            raise IndexIntegrityError(
                "A file of the new version is missing.",
                where=storage.join(index_uri, entry.file),
                expected=f"{entry.bytes} bytes",
                found="no file" if found is None else f"{found} bytes",
                remedy="Run the same command again. If `index gc` ran in the meantime, run it after builds instead.",
            )
    storage.write_bytes(manifest_uri(index_uri, manifest.index_id), manifest.to_json().encode())
    try:
        switch_pointer(index_uri, manifest.index_id, seen)
    except ConflictError as error:
        raise ConflictError(
            "Another build has published a version in the meantime; it stays current.",
            where=index_uri,
            expected=f"version {seen} to be current" if seen else "no version yet",
            found=error.found,
            remedy=f"This build's version is published as {manifest.index_id}: smallcap index use {index_uri} "
            f"{manifest.index_id} makes it current. After --add or --remove, run the command again instead.",
        ) from error
