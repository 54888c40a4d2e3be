"""Removes captions from an index by tombstones, which readers skip; the vectors stay untouched.

A caption is removed by its text, or when its last source or its last image is removed. A caption that loses only some
of its sources or images keeps the others, in a new caption file. Compacting the index removes texts from the files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np

from index_builder.dumps.cleaning import caption_key
from index_builder.shards.filling import rewrite_captions
from index_builder.stored import StoredIndex
from index_builder.work.stage_runner import StageRunner
from smallcap import storage
from smallcap.errors import ConfigError
from smallcap.index.manifest import IndexManifest, RemovedEntry, ShardEntry, utc_now

COMPACT_ABOVE = 0.1  # share of removed captions above which rebuilding pays


@dataclass(frozen=True)
class Removal:
    """What to remove: names of sources, image ids, and keys of texts."""

    sources: frozenset[str]
    image_ids: frozenset[str]
    text_keys: frozenset[bytes]


@dataclass(frozen=True)
class RemoveTask:
    """One caption file in which to find what is removed."""

    index: StoredIndex
    shard: int
    removal: Removal


@dataclass(frozen=True)
class FoundInShard:
    """What a removal finds in a shard.

    Attributes:
        ids: Captions that are removed.
        changes: The new columns of captions that stay with fewer sources or images.
    """

    ids: list[int]
    changes: dict[int, dict[str, list[str]]]


@dataclass(frozen=True)
class RemovedFromShard:
    """What was removed from a shard."""

    ids: list[int]  # captions that are newly removed
    captions: ShardEntry  # the caption file; a new one where captions have lost sources or images
    changed: int  # how many captions stay with fewer sources or images


def parse_removals(removals: Sequence[str], index: StoredIndex) -> Removal:
    """Parses what `IndexConfig.remove` names.

    Args:
        removals: `source=NAME`, `image=ID`, `text=CAPTION`, `image=@FILE`, `text=@FILE`.
        index: The index, which must have the sources.

    Raises:
        ConfigError: A source is unknown, or a file is empty or not UTF-8.
        StorageError: A file cannot be read.
    """
    sources: set[str] = set()
    image_ids: set[str] = set()
    texts: set[str] = set()
    for removal in removals:
        kind, _, value = removal.partition("=")
        if kind == "source":
            sources.add(_source_name(value, index))
        else:
            (image_ids if kind == "image" else texts).update(_lines(value[1:]) if value.startswith("@") else [value])
    return Removal(frozenset(sources), frozenset(image_ids), frozenset(map(caption_key, texts)))


def _source_name(wanted: str, index: StoredIndex) -> str:
    """Finds a source by its name or its URI."""
    for source in index.manifest.sources:
        if wanted in (source.name, source.uri):
            return source.name
    raise ConfigError(
        "The index has no such source.",
        where=f"remove source={wanted}",
        expected=", ".join(source.name for source in index.manifest.sources[:20]),
        found=wanted,
    )


def _lines(uri: str) -> list[str]:
    try:
        lines = [line.strip() for line in storage.read_bytes(uri).decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ConfigError("The file that says what to remove is not UTF-8.", where=uri, found=str(error)) from error
    if not lines:
        raise ConfigError(
            "The file that says what to remove is empty.", where=uri, expected="one image id or text per line"
        )
    return lines


def remove_from_shard(task: RemoveTask) -> RemovedFromShard:
    """Finds the captions of one shard to remove, and rewrites the caption file where others change.

    Raises:
        IndexIntegrityError: The caption file is damaged.
    """
    found = find_removed(task.index, task.shard, task.removal)
    return RemovedFromShard(found.ids, rewrite_captions(task.index, task.shard, found.changes), len(found.changes))


def find_removed(index: StoredIndex, shard: int, removal: Removal) -> FoundInShard:
    """Finds the captions of one shard to remove, and those that stay with fewer sources or images; writes nothing.

    Raises:
        IndexIntegrityError: The caption file is damaged.
    """
    already = set(index.removed_ids().tolist())
    gone: list[int] = []
    changes: dict[int, dict[str, list[str]]] = {}
    captions = index.captions(shard)
    columns = (captions.column(name).to_pylist() for name in ("caption_id", "text", "source", "image_id"))
    for caption_id, text, sources, image_ids in zip(*columns, strict=True):
        if caption_id in already:
            continue
        change = _without(removal, sources, image_ids or [])
        if change is None or (removal.text_keys and caption_key(text) in removal.text_keys):
            gone.append(caption_id)
        elif change:
            changes[caption_id] = change
    return FoundInShard(gone, changes)


def _without(removal: Removal, sources: Iterable[str], image_ids: Iterable[str]) -> dict[str, list[str]] | None:
    """Returns the columns that change; None where the caption loses all its sources or all its images."""
    change = {}
    for name, values, removed in (
        ("source", list(sources), removal.sources),
        ("image_id", list(image_ids), removal.image_ids),
    ):
        left = [value for value in values if value not in removed]
        if values and not left:
            return None
        if len(left) < len(values):
            change[name] = left
    return change


def write_removed(index_uri: str, ids: np.ndarray) -> RemovedEntry | None:
    """Writes the tombstones, sorted int64 ids, to the index's files; returns None where there are none."""
    if not ids.size:
        return None
    with storage.scratch_folder() as folder:
        np.save(folder / "removed.npy", np.sort(ids.astype(np.int64)))
        return RemovedEntry.adopt(folder / "removed.npy", index_uri, "removed", rows=len(ids))


def draft_removal(base: StoredIndex, removals: Sequence[str], runner: StageRunner) -> IndexManifest | None:
    """Drafts a version without the captions to remove; writes its tombstones and the caption files that change.

    Args:
        base: The version to remove from.
        removals: See `parse_removals`.
        runner: What runs the search through the caption files.

    Returns:
        The draft, still to be calibrated; None where nothing changes.

    Raises:
        ConfigError: See `parse_removals`; or no caption would be left.
    """
    removal = parse_removals(removals, base)
    tasks = [RemoveTask(base, number, removal) for number in range(len(base.manifest.captions))]
    lost = runner.run("remove", remove_from_shard, tasks)
    gone = [caption_id for shard in lost for caption_id in shard.ids]
    if not gone and not any(shard.changed for shard in lost):
        return None
    if len(gone) == base.manifest.ntotal:
        raise ConfigError("Nothing would be left of the index.", where=", ".join(removals))
    dropped = dict(base.manifest.dropped)
    dropped["removed"] = dropped.get("removed", 0) + len(gone)
    return base.manifest.model_copy(
        update={
            "captions": tuple(shard.captions for shard in lost),
            "removed": write_removed(base.uri, np.concatenate([base.removed_ids(), np.array(gone, np.int64)])),
            "dropped": dict(sorted(dropped.items())),
            "operation": "remove",
            "parents": (base.manifest.index_id,),
            "fingerprint": "",
            "builder_version": version("smallcap"),
            "created_at": utc_now(),
        }
    )
