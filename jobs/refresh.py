"""The refresh of a run: what another index does not touch is carried over, the other images are captioned again.

    parts of the old run → search the new index with their embeddings → carry rows over
    images of the other rows → the captioning job

Runs as `smallcap refresh OLD_RUN --index INDEX --out OUT`.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from jobs import caption
from jobs.captioning.carry import CarrySpec, OldPart, PromptSearch, carry_part, is_carried, parts_done, split_part
from jobs.captioning.changes import CHANGES_FILE, remove_before, write_changes
from jobs.captioning.record import (
    Attempt,
    Refreshed,
    RunRecord,
    load_existing_run,
    load_run_record,
    run_lock,
    write_run_record,
)
from jobs.captioning.routes import Routes
from jobs.captioning.work import describe_kept, list_work, open_record
from jobs.cluster.addresses import check_address
from jobs.cluster.display import Display, on_shown_ray, show_while
from jobs.cluster.stopping import GOES_ON, stoppable
from jobs.cluster.tasks import RayRunner
from smallcap import storage
from smallcap.config import CaptionConfig
from smallcap.errors import ConfigError
from smallcap.images.work_list import copy_work_list
from smallcap.index.manifest import load_manifests, utc_now
from smallcap.index.merged import CaptionSearch, open_indexes
from smallcap.options import load_config
from smallcap.output.part_files import read_part_infos
from smallcap.output.schema import caption_schema
from smallcap.phrasing import describe_count
from smallcap.refresh_config import RefreshConfig
from smallcap.retrieval_config import NamedIndex, RetrievalConfig, default_name

if TYPE_CHECKING:
    from jobs.captioning.retrieval_actors import Partitions

_ROWS_LOOKED_AT = 20_000  # by a dry run


@dataclass(frozen=True)
class RefreshSummary:
    """What a refresh has done."""

    run: caption.RunSummary
    refreshed: Refreshed


@dataclass(frozen=True)
class RefreshPlan:
    """What a refresh would do, by the rows that a dry run has looked at."""

    rows: int  # of the old run
    looked_at: int
    same: int  # of these
    unsearched: int  # of these: rows without embeddings to search with

    def lines(self) -> list[str]:
        """Returns the plan as lines for people."""
        others = self.looked_at - self.same - self.unsearched
        looked_at = describe_count(self.looked_at, "row")
        lines = [f"{others:,} of {looked_at} have other retrieved captions, {self.same:,} have the same."]
        if self.unsearched:
            lines.append(
                f"{self.unsearched:,} have no saved embeddings (of float32): their images would be read and captioned "
                "again. A run with --save-embeddings can be refreshed without that."
            )
        again = self.looked_at - self.same
        if self.looked_at < self.rows:
            share = again / self.looked_at
            total = f"about {share * self.rows:,.0f} of {describe_count(self.rows, 'image')}, by the rows looked at"
        else:
            total = f"{again:,} of {describe_count(self.rows, 'image')}"
        return [*lines, f"Captioned again would be {total}; nothing was written."]


def run(config: RefreshConfig, address: str | None = None, removed: Sequence[str] = ()) -> RefreshSummary:
    """Makes a run anew with another index; the same call goes on with a refresh that was stopped.

    Args:
        config: The run, the index, and where to write.
        address: Address of a Ray cluster; see `jobs.cluster.session.connect` for the default.
        removed: What was removed from the index before, for the record.

    Raises:
        ConfigError: The run cannot be refreshed, or the output holds another run.
        RunError: Storage, index, checkpoint or Ray cannot be used.
        Stopped: A signal came; what was done by then is kept.
    """
    old = load_existing_run(config.run)
    captioning = check(config, old)
    with run_lock(config.out), stoppable() as signals, Display(signals) as display:
        record = _begin(config, old, captioning, removed)
        if record.refreshed is None or record.refreshed.carried is None:
            check_address(address)
            try:
                _carry(config, old, captioning, record, display, address)
            except KeyboardInterrupt:
                if begun := load_run_record(config.out):
                    write_run_record(config.out, begun.model_copy(update={"status": "stopped"}))
                raise signals.stopped(f"Stopped while the new index was searched; {GOES_ON}") from None
    summary = caption.run(captioning, address)
    with run_lock(config.out), show_while("Comparing captions with those before"):
        record = _compare(config.out, summary.record)
    assert record.refreshed is not None, "it was begun above"
    return RefreshSummary(summary, record.refreshed)


def plan(config: RefreshConfig) -> RefreshPlan:
    """Searches the new index for some of a run's images, and writes nothing.

    Raises:
        ConfigError: The run cannot be refreshed, or the output holds another run.
        RunError: Storage or index cannot be used.
    """
    old = load_existing_run(config.run)
    captioning = check(config, old)
    record = open_record(captioning)
    retriever, search = _open_index(captioning, record.index_id or ""), _prompt_search(captioning)
    looked_at = same = unsearched = 0
    for part in _old_parts(config.run):
        split = split_part(config.run, part, search, retriever)
        same += len(split.same)
        unsearched += 0 if split.searched else len(split.others)
        looked_at += len(split.same) + len(split.others)
        if looked_at >= _ROWS_LOOKED_AT:
            break
    return RefreshPlan(old.images.total, looked_at, same, unsearched)


def describe(summary: RefreshSummary) -> str:
    """Returns what a refresh has done, in a few lines for people."""
    refreshed = summary.refreshed
    changes = refreshed.changes or 0
    lines = [
        f"Carried over: {describe_count(refreshed.carried or 0, 'row')}, whose retrieved captions are the same.",
        f"Changed: {describe_count(changes, 'row')}, {refreshed.changed_captions or 0:,} of them with another caption: "
        f"{storage.join(summary.run.out, CHANGES_FILE)}",
    ]
    return "\n".join([*lines, caption.describe(summary.run)])


def check(config: RefreshConfig, old: RunRecord) -> CaptionConfig:
    """Returns the options of the new run, if the old run of this record can be refreshed.

    Raises:
        ConfigError: The old run is not complete, retrieves nothing, or is to be overwritten.
    """
    if storage.absolute(config.run) == storage.absolute(config.out):
        raise ConfigError(
            "A refresh does not change the run that it begins with.", where=config.out, remedy="Give another --out."
        )
    if old.status != "complete":
        raise ConfigError(
            "Only a complete run can be refreshed.",
            where=config.run,
            expected="status complete",
            found=f"status {old.status}",
            remedy="Repeat the run's command until it is done.",
        )
    if old.index_id is None:
        raise ConfigError(
            "The run retrieves nothing, so no index changes it.", where=config.run, expected="a run with an index"
        )
    options = load_config(CaptionConfig, base=old.config)
    compute = config.compute
    if compute.dtype == "auto":  # the old captions' precision
        compute = compute.model_copy(update={"dtype": options.compute.dtype})
    changes = {
        "index": config.index,
        "out": config.out,
        "require_index_id": None,  # it named the old version
        "limit": old.limit,
        "compute": compute,
        "retrieval": _retrieval(config, options, old),
        "output": options.output.model_copy(update={"write": ()}),  # the images of tars would have to be read
    }
    return load_config(CaptionConfig, base=options.model_copy(update=changes).model_dump())  # checks the names


def _retrieval(config: RefreshConfig, options: CaptionConfig, old: RunRecord) -> RetrievalConfig:
    """Returns how the new run retrieves: an index that the old one had keeps its name and weight there."""
    before = {storage.absolute(index.uri): index for index in options.indexes}
    indexes = [before.get(storage.absolute(uri)) or NamedIndex(default_name(uri), uri) for uri in config.index]
    names = config.index_names or (tuple(index.name for index in indexes) if options.retrieval.index_names else ())
    weights = config.index_weights or (
        tuple(index.weight for index in indexes) if options.retrieval.index_weights else ()
    )
    # Its embeddings are those of this encoder. Another one would be refused by the index.
    changes = {"encoder": old.retrieval_encoder, "index_names": names, "index_weights": weights}
    return options.retrieval.model_copy(update=changes)


def _begin(config: RefreshConfig, old: RunRecord, captioning: CaptionConfig, removed: Sequence[str]) -> RunRecord:
    """Continues the refresh in the output folder, or begins one.

    Raises:
        ConfigError: The folder holds another run, or the run's model is not there any more.
    """
    record = open_record(captioning)
    if not record.attempts:
        refreshed = Refreshed(
            run=storage.absolute(config.run), run_id=old.run_id, index_id=old.index_id or "", removed=tuple(removed)
        )
        record = record.model_copy(update={"refreshed": refreshed})
    if record.refreshed is None or record.refreshed.run_id != old.run_id:
        raise ConfigError(
            "The output folder holds a run that is no refresh of this one.",
            where=config.out,
            expected=f"a refresh of run {old.run_id}",
            found=f"a refresh of run {record.refreshed.run_id}" if record.refreshed else f"run {record.run_id}",
            remedy="Give another --out.",
        )
    if record.model_id != old.model_id:
        raise ConfigError(
            "The model is not the one that made the run.",
            where=captioning.model,
            expected=old.model_id,
            found=record.model_id,
            remedy="Restore that model, or caption the images anew with `smallcap caption`.",
        )
    return record


def _carry(
    config: RefreshConfig,
    old: RunRecord,
    captioning: CaptionConfig,
    record: RunRecord,
    display: Display,
    address: str | None,
) -> None:
    """Carries over what stays the same, in an attempt of its own."""
    if not record.attempts:
        copy_work_list(config.run, config.out)
    earlier, attempt = record.attempts, _attempt(old)
    record = record.model_copy(update={"status": "running", "attempts": (*earlier, attempt)})
    write_run_record(config.out, record)
    kept = list_work(captioning, record).kept_columns
    spec = CarrySpec(
        run=config.run,
        out=config.out,
        attempt=attempt,
        search=_prompt_search(captioning),
        schema=caption_schema(record.run_id, record.model_id, record.index_id or "", kept),
        rows_per_row_group=captioning.output.rows_per_row_group,
    )
    done = parts_done(config.out)
    parts = [part for part in _old_parts(config.run) if part.number not in done]
    text = f"Searching {' and '.join(config.index)} for the images of {config.run}"
    with on_shown_ray(display, address, partial(describe_kept, config.out)):
        from jobs.captioning.retrieval_actors import shared_indexes

        with (
            shared_indexes(captioning, record.index_id) as partitions,
            display.activity(text, "part", len(parts)) as shown,
        ):
            open_index = partial(_open_index, captioning, record.index_id or "", partitions)
            carry = partial(_carry_part, spec=spec, open_index=open_index)
            for _ in RayRunner(record.run_id).run_tasks(carry, parts) if parts else ():
                shown.done += 1
    carried = sum(info.ok + sum(info.errors.values()) for name, info in read_part_infos(config.out) if is_carried(name))
    assert record.refreshed is not None, "the caller has begun it"
    ended = attempt.model_copy(
        update={"finished_at": utc_now(), "seconds": round(display.seconds, 3), "images": carried}
    )
    refreshed = record.refreshed.model_copy(update={"carried": carried})
    write_run_record(config.out, record.model_copy(update={"attempts": (*earlier, ended), "refreshed": refreshed}))


def _attempt(old: RunRecord) -> Attempt:
    """Returns an attempt in the old captions' precision, which later attempts on a CPU keep."""
    attempt = Attempt(token=uuid.uuid4().hex, started_at=utc_now())
    computed = next((earlier for earlier in old.attempts if earlier.dtype), attempt)
    return attempt.model_copy(update={"device": computed.device, "dtype": computed.dtype})


def _carry_part(part: OldPart, spec: CarrySpec, open_index: Callable[[], CaptionSearch]) -> None:
    carry_part(part, spec, open_index())


def _open_index(captioning: CaptionConfig, index_id: str, partitions: Sequence[Partitions] = ()) -> CaptionSearch:
    cache_dir = captioning.retrieval.cache_dir
    if partitions:
        from jobs.captioning.retrieval_actors import open_partitioned

        return open_partitioned(partitions, captioning.indexes, cache_dir)
    return open_indexes(captioning.indexes, load_manifests(captioning.index, index_id), cache_dir)


def _prompt_search(captioning: CaptionConfig) -> PromptSearch:
    """Returns how the runs retrieve, where the model may say how many captions."""
    k = captioning.retrieval.k
    if k is None:
        from smallcap.model.checkpoint import load_config as load_model_config
        from smallcap.model.files import resolve_folder

        model = load_model_config(resolve_folder(captioning.model, "smallcap", captioning.retrieval.cache_dir))
        k = model.k if model.rag else 0
    return PromptSearch(k, captioning.retrieval.exclude_own_captions, Routes.of(captioning))


def _old_parts(run: str) -> list[OldPart]:
    return [OldPart(number, name, info) for number, (name, info) in enumerate(read_part_infos(run))]


def _compare(out: str, record: RunRecord) -> RunRecord:
    """Writes the changes, unless they are recorded, and records how many they are."""
    changes = write_changes(out)
    if changes is None or record.refreshed is None:
        return record
    counts = {"changes": changes.rows, "changed_captions": changes.captions}
    record = record.model_copy(update={"refreshed": record.refreshed.model_copy(update=counts)})
    write_run_record(out, record)
    remove_before(out)
    return record
