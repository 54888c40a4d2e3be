"""Lists and collects the versions of an index, as plain values for people and for JSON."""

from __future__ import annotations

from typing import Any

from index_builder.versions.lifecycle import Garbage, collect_garbage, list_versions, parse_grace
from smallcap.phrasing import describe_count


def list_index(index: str) -> list[dict[str, Any]]:
    """Returns the facts of each version of an index, newest first.

    Raises:
        ManifestError: There is no published index.
    """
    return [
        {
            "index_id": version.manifest.index_id,
            "current": version.is_current,
            "current_until": version.current_until,
            "created_at": version.manifest.created_at,
            "operation": version.manifest.operation,
            "parents": list(version.manifest.parents),
            "ntotal": version.manifest.ntotal,
            "index_key": version.manifest.index_key,
            "recall": {f"recall@{entry.k}": entry.recall for entry in version.manifest.recall},
            "sources": [source.name or source.uri for source in version.manifest.sources],
        }
        for version in list_versions(index)
    ]


def collect(index: str, grace: str, keep: int, dry_run: bool) -> dict[str, Any]:
    """Removes what no version needs; returns what was, or would be, removed.

    Raises:
        ConfigError: `grace` is not a duration.
        ManifestError: There is no published index.
    """
    garbage: Garbage = collect_garbage(index, parse_grace(grace), keep, dry_run)
    return {
        "versions": list(garbage.versions),
        "files": list(garbage.files),
        "bytes": garbage.bytes,
        "staging": list(garbage.staging),
    }


def describe_garbage(garbage: dict[str, Any], dry_run: bool) -> str:
    """Returns what was, or would be, removed, in a line for people."""
    nouns = {"versions": "version", "files": "file", "staging": "folder"}
    versions, files, folders = (describe_count(len(garbage[name]), noun) for name, noun in nouns.items())
    done = "Would remove" if dry_run else "Removed"
    size = f"{garbage['bytes'] / 1e6:,.1f} MB"
    return f"{done} {versions}, {files} with {size}, and {folders} of builds that ended early."
