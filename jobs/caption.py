"""The captioning job: takes images, and writes Parquet with captions and retrieved neighbours.

    remaining images → load (fetch and decode, CPU tasks) → caption (actor pool) → write parts

Runs as `smallcap caption …` or, for `ray job submit`, as `python -m jobs.caption …` with the same options.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobs.captioning.layout import count_images, lay_out, load_spec
from jobs.captioning.progress import show_progress, stage_table
from jobs.captioning.record import (
    Attempt,
    ImageCounts,
    Input,
    RunRecord,
    describe_passed_over,
    most_counted,
    run_lock,
    write_run_record,
)
from jobs.captioning.stage_report import Snapshot
from jobs.captioning.watch import watch_run
from jobs.captioning.work import finish_run, list_work, open_record, remaining_items
from jobs.cluster.errors import unwrapped_errors
from jobs.cluster.session import connect
from jobs.cluster.tasks import map_in_actors
from jobs.terminal.command_line import EXIT_TOO_MANY_ERRORS
from smallcap.config import CaptionConfig
from smallcap.images.work_list import WorkList
from smallcap.index.manifest import utc_now
from smallcap.output.coverage import WorkItem
from smallcap.output.schema import caption_schema
from smallcap.phrasing import describe_count, describe_counts

if TYPE_CHECKING:
    from jobs.captioning.retrieval_actors import Partitions


@dataclass(frozen=True)
class RunSummary:
    """What a call of the job did, and what its output folder now holds."""

    out: str
    record: RunRecord
    new_images: int  # that got their row in this call, with a caption or an error
    images: ImageCounts  # in the output, from all attempts
    stages: tuple[str, ...] = ()  # where the time of this call went, for people

    @property
    def error_rate(self) -> float:
        """The share of the run's rows that have no caption."""
        return self.images.error / self.images.total if self.images.total else 0.0


def run(
    config: CaptionConfig, address: str | None = None, *, retry_failed: bool = False, relist: bool = False
) -> RunSummary:
    """Captions all images of `config` that have no row in its output yet.

    Args:
        config: What to caption, with which model and index, and where to write.
        address: Address of a Ray cluster; by default the one this process belongs to, or a new local one.
        retry_failed: Whether to try images again whose rows are errors.
        relist: Whether to list the input again and add new images; by default a run keeps its first list.

    Returns:
        The finished run. Where everything is done already, nothing is computed and Ray does not start.

    Raises:
        ConfigError: The options are wrong, or the output holds a run with other options.
        RunError: Storage, index or checkpoint cannot be used.
    """
    with run_lock(config.out):
        record = open_record(config)
        if record.is_done(config.limit) and not (retry_failed or relist):
            return RunSummary(config.out, record, 0, record.images)
        work = list_work(config, record, relist)
        record = record.model_copy(update={"input": Input.of(work)})
        items = remaining_items(config, work, retry_failed)
        new_images = 0
        stages: tuple[str, ...] = ()
        if items:
            record, stages = _caption(config, record, work, items, address)
            new_images = record.attempts[-1].images
        record = finish_run(config, record, work)
    return RunSummary(config.out, record, new_images, record.images, stages)


def describe(summary: RunSummary) -> str:
    """Returns what a call of the job did and where its time went, in a few lines for people."""
    images, record = summary.images, summary.record
    lines = ["Nothing to do: every image has its row."]
    if summary.stages:
        lines = list(summary.stages)
    elif record.input:
        lines.append(f"The input was listed at {record.input.listed_at}; --relist looks for newer images.")
    if repeated := record.count_repeated():
        lines.append(f"Named more than once, captioned once: {describe_count(repeated, 'image')}.")
    lines += describe_passed_over(record.count_passed_over())
    errors = describe_counts(images.errors_by_code)
    rows, failed = describe_count(images.total, "row"), describe_count(images.error, "error")
    counts = f"{rows}: {images.ok:,} ok, {failed}"
    lines.append(counts + (f" ({errors}); --retry-failed tries these images again" if errors else ""))
    lines.append(f"Parquet: {summary.out}/part-*.parquet")
    return "\n".join(lines)


def _caption(
    config: CaptionConfig, record: RunRecord, work: WorkList, items: Sequence[WorkItem], address: str | None
) -> tuple[RunRecord, tuple[str, ...]]:
    """Runs one attempt of the pipeline; returns the run's record and where the time went."""
    connect(address)  # before Ray Data is imported: it reads some of its settings then

    from jobs.captioning.caption import CaptionerSpec, CaptionImages
    from jobs.captioning.load import load_images, start_loading
    from jobs.captioning.write import PartSink

    layout = lay_out(config, record)
    actors = layout.actors
    attempt = Attempt(
        token=uuid.uuid4().hex, started_at=utc_now(), actors=actors.num_actors, device=actors.device, dtype=actors.dtype
    )
    attempts = (*record.attempts, attempt)
    record = record.model_copy(update={"status": "running", "attempts": attempts})
    write_run_record(config.out, record)

    schema = caption_schema(record.run_id, record.model_id, record.index_id or "", work.kept_columns)
    started = time.perf_counter()
    watching = watch_run(record.run_id, count_images(items), len(items))
    with (
        unwrapped_errors(),
        watching as watch,
        show_progress(watch.monitor),
        _partitions(config, record) as partitions,
    ):
        loading = load_spec(config, record, work, layout, watch)
        captioning = CaptionerSpec(config, layout, record.index_id, record.retrieval_encoder, watch.monitor, partitions)
        sink = PartSink(config.out, attempt, len(attempts), schema, layout, watch.monitor)
        loaded = start_loading(items, load_images, loading, layout.images_per_block, actors.cpus_per_task)
        # Writing asks for no CPU: it would wait until loading, which always has more to do, has loaded everything, and
        # a kill would cost all captions.
        captioned = map_in_actors(
            loaded,
            CaptionImages,
            (captioning,),
            layout.images_per_call,
            actors,
            watch.fault_guard,
            layout.calls_at_once,
        )
        captioned.write_datasink(sink, ray_remote_args={"num_cpus": 0})
        snapshot = watch.monitor.snapshot()
    seconds = time.perf_counter() - started
    fast = config.input.decode == "fast"
    stages = stage_table(snapshot, seconds, actors, layout.load_tasks, fast) if snapshot else ()
    attempt = _measured(attempt, snapshot, seconds, fast)
    return record.model_copy(update={"attempts": (*attempts[:-1], attempt)}), tuple(stages)


def _measured(attempt: Attempt, snapshot: Snapshot | None, seconds: float, fast_decode: bool) -> Attempt:
    """Returns the record of a finished attempt, with what its stages reported."""
    ended = attempt.model_copy(update={"finished_at": utc_now(), "seconds": round(seconds, 3)})
    if snapshot is None:
        return ended
    return ended.model_copy(
        update={
            "images": snapshot.write.images,
            "decode_s": round(snapshot.load.seconds, 3),
            "fetch_s": round(snapshot.load.fetch_s, 3),
            "fetch_retries": snapshot.load.retries,
            "repeated_ids": snapshot.load.duplicates,
            "passed_over": most_counted(snapshot.load.passed_over),
            "caption_s": round(snapshot.caption.seconds, 3),
            "write_s": round(snapshot.write.seconds, 3),
            "actors": max(snapshot.actors, 1),
            "decoded_by_pillow": snapshot.load.by_pillow if fast_decode else None,
            "search_backends": tuple(sorted(snapshot.caption.searched_by)),
            "dtype": ", ".join(sorted(snapshot.caption.dtypes)) or attempt.dtype,
        }
    )


@contextmanager
def _partitions(config: CaptionConfig, record: RunRecord) -> Iterator[Partitions | None]:
    """Runs the actors that share the index, where one process is not to hold all of it; yields None where it is."""
    from jobs.captioning.retrieval_actors import run_partitions

    if record.index_id is None or config.index is None or config.retrieval.partitions == 1:
        yield None
        return
    with run_partitions(config.index, record.index_id, config.retrieval) as partitions:
        yield partitions


def exit_status(config: CaptionConfig, summary: RunSummary) -> int:
    """Returns 0, or the status for more failed images than the config accepts."""
    return EXIT_TOO_MANY_ERRORS if summary.error_rate > config.max_error_rate else 0


if __name__ == "__main__":
    from jobs.cli import main

    main("caption")
