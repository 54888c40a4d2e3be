"""What a captioning run has to do and has done: its record, its list of work, and the remaining items; without Ray."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.captioning.record import (
    Account,
    ImageCounts,
    RunRecord,
    TarContents,
    check_attempt,
    check_no_variants,
    load_run_record,
    write_run_record,
)
from jobs.captioning.scores import Scores
from jobs.cluster.pinned import check_required_index, check_required_model, pin_indexes, pinned_encoder
from smallcap import storage
from smallcap.config import CaptionConfig
from smallcap.errors import ConfigError
from smallcap.images.fragments import Fragment
from smallcap.images.listing import extend_work_list, make_work_list
from smallcap.images.relisting import store_states
from smallcap.images.work_list import WORK_FOLDER, WorkList, count_images, load_work_list
from smallcap.index.manifest import join_index_ids, share_of
from smallcap.model.files import checkpoint_id, checkpoint_sha256
from smallcap.output.coverage import (
    Coverage,
    NamedPart,
    WorkItem,
    forget_rows,
    qualify_repeated_ids,
    settle,
    work_left,
)
from smallcap.output.interim_parts import join_interim_parts, remove_replaced
from smallcap.output.part_files import read_part_infos, remove_orphans
from smallcap.output.schema import check_kept_columns
from smallcap.phrasing import describe_count


def open_record(config: CaptionConfig, first: RunRecord | None = None) -> RunRecord:
    """Continues the output folder's run, or begins one; pins the index's version for all attempts.

    Args:
        config: The run's config.
        first: The record of another run in one pass with this one, whose index and encoder a new run takes.

    Raises:
        ConfigError: The folder holds a run with other options, a column to keep has a name that the output needs, or
            the index or the model is not the required one.
        RunError: The index or the checkpoint cannot be used.
    """
    check_kept_columns(config.columns_to_keep)
    record = load_run_record(config.out)
    k, cache_dir = config.retrieval.k, config.retrieval.cache_dir
    check_required_index(config.require_index_id, config.index, k, record.index_id if record else None)
    check_required_model(config.require_model_hash, config.model, cache_dir)
    if record is not None:
        record.check_same_run(config, partial(checkpoint_id, config.model, cache_dir), config.out)
        return record.model_copy(update={"retrieval_encoder": pinned_encoder(record, config.out)})
    check_no_variants(config.out)
    if first is not None:
        index_id, encoder = None if k == 0 else first.index_id, first.retrieval_encoder
    else:
        manifests, encoder = pin_indexes(config.index, k, config.retrieval.encoder, cache_dir)
        index_id = join_index_ids(manifests) or None
        if len(manifests) == 1:
            share_of(manifests[0].shards, (0, config.retrieval.partitions))  # refuses what their actors would later
    if config.output.save_embeddings and encoder is None:
        raise ConfigError(
            "There is no retrieval encoder whose embeddings could be saved.",
            where="output.save_embeddings",
            remedy="Give --index, or --set retrieval.encoder=SPEC.",
        )
    if (config.score_column is not None or config.generation.rerank) and encoder is None:
        raise ConfigError(
            "There is no retrieval encoder that could compare texts with images.",
            where="generation.rerank" if config.score_column is None else "score_column",
            remedy="Give --index, or --set retrieval.encoder=SPEC.",
        )
    model_id, sha256 = checkpoint_id(config.model, cache_dir), checkpoint_sha256(config.model, cache_dir)
    return RunRecord.new(config, index_id, encoder, model_id=model_id, model_sha256=sha256)


def list_work(
    config: CaptionConfig, record: RunRecord, relist: bool = False, others: Sequence[tuple[str, RunRecord]] = ()
) -> WorkList:
    """Loads the run's list of work, or makes it where the run is new.

    Args:
        config: The run's config.
        record: Its record.
        relist: Whether to list the input again.
        others: Folders and records of runs with the same list, which lose the same rows where images were overwritten.

    Raises:
        ConfigError: The column whose texts are to be scored has none.
        RunError: The input cannot be listed.
    """
    work = load_work_list(config.out) if record.attempts else None
    if work is None:
        storage.remove(storage.join(config.out, WORK_FOLDER))  # left by a run that never began
        work = make_work_list(config.images, config.input, config.out, config.columns_to_keep)
    elif relist:
        work = extend_work_list(config.images, config.input, config.out)
        if work.relisted and len(work.relisted.overwritten):
            for out, of_run in ((config.out, record), *others):
                write_run_record(out, of_run.model_copy(update={"status": "running"}))  # it lacks rows from now on
                remove_replaced(out)
                forget_rows(out, list(read_part_infos(out)), work.relisted.overwritten)
            store_states(work.fragments.table, work.relisted.overwritten)
    if config.score_column is not None:
        _check_texts(
            work.kept_columns.field(config.score_column), "The column to score holds no texts.", "score_column"
        )
    if (name := config.retrieval.index_column) is not None:
        _check_texts(work.kept_columns.field(name), "The column holds no names of indexes.", "retrieval.index_column")
    return work


def _check_texts(column: pa.Field, what: str, option: str) -> None:
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type) or pa.types.is_null(column.type)):
        raise ConfigError(
            what,
            where=f"{option}: {column.name}",
            expected="a column of strings",
            found=str(column.type),
        )


def _settled_parts(out: str, work: WorkList) -> list[NamedPart]:
    """Returns the footers of all parts, after rows that two parts have were removed from one of them."""
    remove_replaced(out)
    parts = list(read_part_infos(out))
    return list(read_part_infos(out)) if settle(out, parts, work.fragments) else parts


def remaining_items(
    config: CaptionConfig, work: WorkList, retry_failed: bool = False, settled: bool = True
) -> list[WorkItem]:
    """Returns the work items without a row in the output, and, for `retry_failed`, those that failed.

    Unless `settled` is False, rows that two parts have are first removed from one of them.
    """
    parts = _settled_parts(config.out, work) if settled else read_part_infos(config.out)
    coverage = Coverage(parts, retry_failed)

    def count(fragment: Fragment, most: int) -> int:
        return count_images(fragment, most, config.input)

    return list(work_left(work.fragments, coverage, config.limit, count))


def finish_run(config: CaptionConfig, record: RunRecord, work: WorkList) -> RunRecord:
    """Removes repeated ids, interim parts and orphans from the finished output, counts it, and records its end."""
    parts = _settled_parts(config.out, work)
    if pc.any(pc.not_equal(work.fragments.table["kind"], "uris")).as_py():
        qualify_repeated_ids(config.out, parts)  # which changes no count
    if record.attempts:
        check_attempt(config.out, record.attempts[-1])
    join_interim_parts(config.out, parts, config.output.rows_per_row_group)
    remove_orphans(config.out)
    images = ImageCounts.of(info for _, info in parts)
    coverage = Coverage(parts)
    tars = TarContents.of(coverage, work.fragments)
    record = record.model_copy(update={"status": "complete", "images": images, "limit": config.limit, "tars": tars})
    account = _account(record, work, coverage)
    account.check(config.out)
    record = record.model_copy(update={"account": account, "scores": Scores.of(config.out)})
    write_run_record(config.out, record)
    return record


def describe_kept(out: str) -> str:
    """Returns in a sentence what of a run is written, for a message that the run has stopped."""
    images = ImageCounts.of(info for _, info in read_part_infos(out))
    return f"The rows of {describe_count(images.total, 'image')} are written in {out}."


def _account(record: RunRecord, work: WorkList, coverage: Coverage) -> Account:
    """Returns the account of a run: the rows of its list and of the tars that were read, against those of its parts."""
    counts = work.fragments.rows
    tars = [coverage.rows_of(work.fragments[number]) for number in np.flatnonzero(counts < 0).tolist()]
    known = int(counts[counts >= 0].sum()) + sum(rows for rows in tars if rows is not None)
    unread = tars.count(None) if record.limit is None else 0  # tars without an end: a row of each is missing at least
    asked = known if record.limit is None else min(record.limit, known if None not in tars else record.limit)
    repeats, passed_over = record.count_repeated(), sum(record.count_passed_over().values())
    return Account(
        seen=max(asked, coverage.images) + unread + repeats - record.repeated_ids + passed_over,
        captioned=record.images.ok,
        errors=record.images.error,
        repeats=repeats,
        passed_over=passed_over,
    )
