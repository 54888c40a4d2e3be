"""A takedown: captions leave the index, and the runs whose prompts held them are refreshed.

    captions to remove → the runs that retrieved them → a version of the index without them → refreshes

Each step finds its work in what is published and written: the same command goes on with one that was stopped.
"""

from __future__ import annotations

from dataclasses import dataclass

from index_builder.build import BuildReport
from index_builder.stored import StoredIndex
from index_builder.versions.removal import Removal, find_removed, parse_removals
from jobs import build_index, refresh
from jobs.captioning.changes import CHANGES_FILE
from jobs.captioning.record import RunRecord, load_existing_run
from jobs.trace import traced
from smallcap import storage
from smallcap.config import IndexConfig
from smallcap.errors import ConfigError, SmallCapError
from smallcap.index.manifest import load_manifest
from smallcap.output.reading import read_captions
from smallcap.phrasing import describe_count
from smallcap.refresh_config import ForgetConfig, RefreshConfig


@dataclass(frozen=True)
class Use:
    """What a run has to do with the captions that are removed."""

    run: str
    images: int  # whose prompts held one
    out: str  # where it is refreshed


@dataclass(frozen=True)
class Takedown:
    """What was done.

    Attributes:
        report: Of the index.
        runs: What each run had to do with the captions, and its refresh; None for a run that held none.
    """

    report: BuildReport
    runs: list[tuple[Use, refresh.RefreshSummary | None]]


def run(config: ForgetConfig, address: str | None = None) -> Takedown:
    """Removes captions from an index, and refreshes the runs whose prompts held them.

    Raises:
        ConfigError: A run cannot be refreshed or has another index, or the index has no such source.
        RunError: The index, a run, the storage or Ray cannot be used.
        Stopped: A signal came; what has ended is kept.
    """
    uses = plan(config)  # before anything is changed
    removal = IndexConfig(out=config.index, remove=config.remove, cache_dir=config.cache_dir)
    report = build_index.run(removal, address)
    return Takedown(report, [(use, _refresh(config, use, address) if use.images else None) for use in uses])


def plan(config: ForgetConfig) -> list[Use]:
    """Returns what each run has to do with the captions; errors are those of `run`."""
    current = StoredIndex(config.index, load_manifest(config.index), config.cache_dir)
    removal = parse_removals(config.remove, current)
    records = {run: load_existing_run(run) for run in config.runs}
    names = [storage.absolute(run).rpartition("/")[2] for run in config.runs]
    if len(set(names)) < len(names):
        raise ConfigError(
            "Two runs have the same name, so that both would be refreshed to one folder.",
            where=config.out,
            found=", ".join(names),
            remedy="Give them in separate commands.",
        )
    outs = [storage.join(config.out, name) for name in names]
    for (run, record), out in zip(records.items(), outs, strict=True):
        refresh.check(_refresh_options(config, run, record, out), record)
    return [
        Use(run, len(_held(config, run, record, removal)), out)
        for (run, record), out in zip(records.items(), outs, strict=True)
    ]


def _held(config: ForgetConfig, run: str, record: RunRecord, removal: Removal) -> list[str]:
    """Returns the ids of the images whose prompts held captions that are removed.

    Raises:
        ConfigError: The run's version is not of this index, or is there no more.
    """
    place, version = _version_of(config, run, record)
    shards = range(len(version.manifest.captions))
    found = {shard: find_removed(version, shard, removal).ids for shard in shards}
    if not any(found.values()):
        return []
    captions = read_captions(run, ["image_id", "neighbours"], status="ok")
    if len(record.indexes) == 1:
        held = traced(captions, caption_ids={caption_id for ids in found.values() for caption_id in ids})
    else:  # a text that others have as well has the id of one of them
        texts = {text for shard, ids in found.items() for text in version.texts(shard, ids)}
        held = traced(captions, texts=texts, index=record.indexes[place][0].name)
    return [image_id for batch in held for image_id in batch["image_id"].to_pylist()]


def _version_of(config: ForgetConfig, run: str, record: RunRecord) -> tuple[int, StoredIndex]:
    """Returns which of a run's indexes the captions leave, and its version in this run.

    Raises:
        ConfigError: The index does not have a version of the run.
    """
    failed = None
    places = range(len(record.indexes))
    for place in sorted(places, key=lambda place: not _is_same(record.indexes[place][0].uri, config.index)):
        try:
            manifest = load_manifest(config.index, record.indexes[place][1])
        except SmallCapError as error:
            failed = failed or error
        else:
            return place, StoredIndex(config.index, manifest, config.cache_dir)
    raise ConfigError(
        "The index does not have the version with which the run was made.",
        where=run,
        expected=f"version {' or '.join(index_id for _, index_id in record.indexes)}",
        found=f"{config.index}: {failed}",
        remedy="Give the index of this run; if its version was removed (smallcap index gc), remove the captions "
        "with build-index --remove, and refresh the run.",
    ) from failed


def _is_same(uri: str, other: str) -> bool:
    return storage.absolute(uri) == storage.absolute(other)


def _refresh_options(config: ForgetConfig, run: str, record: RunRecord, out: str) -> RefreshConfig:
    """Returns the options of a run's refresh; of several indexes all others stay, and all names and weights."""
    if len(record.indexes) < 2:
        return RefreshConfig(run=run, index=(config.index,), out=out, compute=config.compute)
    indexes = [index for index, _ in record.indexes]
    uris = [index.uri for index in indexes]
    uris[_version_of(config, run, record)[0]] = config.index
    names, weights = tuple(index.name for index in indexes), tuple(index.weight for index in indexes)
    return RefreshConfig(
        run=run, index=tuple(uris), out=out, index_names=names, index_weights=weights, compute=config.compute
    )


def _refresh(config: ForgetConfig, use: Use, address: str | None) -> refresh.RefreshSummary:
    options = _refresh_options(config, use.run, load_existing_run(use.run), use.out)
    return refresh.run(options, address, removed=config.remove)


def describe_plan(uses: list[Use]) -> list[str]:
    """Returns what there is to do, as lines for people."""
    return [*map(_describe_use, uses), "Nothing was removed or written."]


def describe(done: Takedown) -> list[str]:
    """Returns what was done, as lines for people."""
    lines = build_index.describe(done.report).splitlines()
    for use, summary in done.runs:
        lines.append(_describe_use(use))
        if summary is not None:
            changes, captions = summary.refreshed.changes or 0, summary.refreshed.changed_captions or 0
            lines.append(
                f"  refreshed: {describe_count(changes, 'row')} changed, {captions:,} with another caption: "
                f"{storage.join(use.out, CHANGES_FILE)}"
            )
    if any(summary for _, summary in done.runs):
        lines.append(
            "The old runs still hold the removed texts, and so do the comparisons: delete both when they are no longer "
            "needed."
        )
    return [*lines, "The index's files hold them until it is rebuilt (build-index --compact) and swept (index gc)."]


def _describe_use(use: Use) -> str:
    if not use.images:
        return f"{use.run}: no prompt held them; it stays as it is."
    return f"{use.run}: {describe_count(use.images, 'image')} had them in their prompts."
