"""The captioning job: takes images, and writes Parquet with captions and retrieved neighbours.

    remaining images → load (fetch and decode, CPU tasks) → caption (actor pool) → write parts

Runs as `smallcap caption …`, also under `ray job submit`, or as `python -m jobs.caption …` with the same options.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from jobs.captioning.layout import CaptionLayout, count_images, lay_out, load_spec
from jobs.captioning.progress import PipelineView, stage_table
from jobs.captioning.record import (
    Attempt,
    ImageCounts,
    Input,
    RunRecord,
    describe_passed_over,
    load_run_record,
    run_lock,
    write_run_record,
)
from jobs.captioning.stage_report import Snapshot
from jobs.captioning.watch import watch_run
from jobs.captioning.work import describe_kept, finish_run, list_work, open_record, remaining_items
from jobs.cluster.addresses import check_address
from jobs.cluster.display import Display, on_shown_ray
from jobs.cluster.errors import unwrapped_errors
from jobs.cluster.metrics import marked_as_running
from jobs.cluster.pinned import check_indexes_are_there
from jobs.cluster.resources import wait_for_room
from jobs.cluster.stopping import GOES_ON, stoppable
from jobs.cluster.tasks import map_in_actors
from jobs.screen import detail
from jobs.terminal.command_line import EXIT_TOO_MANY_ERRORS
from smallcap.config import CaptionConfig
from smallcap.errors import StorageError
from smallcap.images.work_list import Relisted, WorkList
from smallcap.index.manifest import utc_now
from smallcap.local_files import is_below
from smallcap.model.files import DEMO, demo_folder
from smallcap.output.coverage import WorkItem
from smallcap.output.schema import caption_schema
from smallcap.phrasing import describe_count, describe_counts, one_line

if TYPE_CHECKING:
    import pyarrow as pa
    import ray.data

    from jobs.captioning.caption import CaptionImages
    from jobs.captioning.monitor import MonitorClient
    from jobs.captioning.write import PartWriter

_SHOWN = 120  # characters of a source


@dataclass(frozen=True)
class RunSummary:
    """What a call of the job did, and what its output folder now holds."""

    out: str
    record: RunRecord
    new_images: int  # that got their row in this call, with a caption or an error
    images: ImageCounts  # in the output, from all attempts
    relisted: Relisted | None = None  # what a relist found out about images that were known
    stages: tuple[str, ...] = ()  # where the time of this call went, for people

    @property
    def error_rate(self) -> float:
        """The share of the run's rows that have no caption."""
        return self.images.error / self.images.total if self.images.total else 0.0


class _Todo(NamedTuple):
    """All of a run's fragments, and what of them is left."""

    work: WorkList
    items: Sequence[WorkItem]


def run(
    config: CaptionConfig, address: str | None = None, *, retry_failed: bool = False, relist: bool = False
) -> RunSummary:
    """Captions all images of `config` that have no row in its output yet.

    Args:
        config: What to caption, with which model and index, and where to write.
        address: Address of a Ray cluster; see `jobs.cluster.session.connect` for the default.
        retry_failed: Whether to try images again whose rows are errors.
        relist: Whether to list the input again, add new images, and caption those again that were overwritten since; by
            default a run keeps its first list.

    Returns:
        The finished run. Where everything is done already, nothing is computed and Ray does not start.

    Raises:
        ConfigError: The options are wrong, or the output holds a run with other options.
        RunError: Storage, index, checkpoint or Ray cannot be used.
        Stopped: A signal came; what was captioned by then is written.
    """
    with run_lock(config.out), stoppable() as signals, Display(signals) as display:
        try:
            return _run(config, address, retry_failed, relist, display)
        except KeyboardInterrupt:
            record = load_run_record(config.out)
            if record is not None and record.status == "running":
                write_run_record(config.out, record.model_copy(update={"status": "stopped"}))
            raise


def _run(config: CaptionConfig, address: str | None, retry_failed: bool, relist: bool, display: Display) -> RunSummary:
    """Runs the job; see `run`."""
    record = open_record(config)
    if record.is_done(config.limit) and not (retry_failed or relist):
        return RunSummary(config.out, record, 0, record.images)
    check_indexes_are_there(record, config.index)
    check_address(address)  # before what may take long
    with display.activity(f"Listing the images of {', '.join(config.images)}"):
        work = list_work(config, record, relist)
        record = record.model_copy(update={"input": Input.of(work)})
        items = remaining_items(config, work, retry_failed)
    new_images = 0
    stages: tuple[str, ...] = ()
    if items:
        # before Ray Data is imported, which reads some of its settings then
        with on_shown_ray(display, address, partial(describe_kept, config.out)):
            record, stages = _caption(config, record, _Todo(work, items), display)
        new_images = record.attempts[-1].images
    with display.activity(f"Checking what is written to {config.out}"):
        record = finish_run(config, record, work)
    return RunSummary(config.out, record, new_images, record.images, work.relisted, stages)


def describe(summary: RunSummary) -> str:
    """Returns what a call of the job did and where its time went, in a few lines for people."""
    lines = ["Nothing to do: every image has its row."]
    if summary.stages:
        lines = list(summary.stages)
    elif listed := summary.record.input:
        lines.append(f"The input was listed at {listed.listed_at}; --relist looks for newer images.")
    return "\n".join([*lines, *describe_output(summary)])


def describe_output(summary: RunSummary) -> list[str]:
    """Returns lines for people about what an output folder holds, and what of the input has no row of its own there."""
    images, record, lines = summary.images, summary.record, []
    if relisted := summary.relisted:
        overwritten, gone = len(relisted.overwritten), relisted.gone
        lines.append(
            f"Listed again: {describe_count(overwritten, 'image')} overwritten since, captioned again; "
            f"{describe_count(gone, 'image')} gone from the input, whose rows stay."
        )
    if repeated := record.count_repeated():
        lines.append(f"Named more than once, captioned once: {describe_count(repeated, 'image')}.")
    lines += describe_passed_over(record.count_passed_over())
    errors = describe_counts(images.errors_by_code)
    rows, failed = describe_count(images.total, "row"), describe_count(images.error, "error")
    counts = f"{rows}: {images.ok:,} ok, {failed}"
    lines += record.scores.describe() if record.scores else ()
    lines += demo_warning(record.config["model"], record.config["images"])
    lines.append(counts + (f" ({errors}); --retry-failed tries these images again" if errors else ""))
    return [*lines, f"Parquet: {summary.out}/part-*.parquet"]


def demo_warning(model: str, images: Sequence[str]) -> list[str]:
    """Returns a line that warns where the demo's model is to caption images that are not the demo's; else none."""
    if model != DEMO:
        return []
    folder = demo_folder().resolve()
    others = [source for source in images if not is_below(source, folder)]
    if not others:
        return []
    return [
        f"Warning: the demo's model knows only drawn scenes, and {one_line(others[0], _SHOWN)} is not of the demo. Its "
        "captions of other images mean nothing; give another --model."
    ]


def _caption(
    config: CaptionConfig, record: RunRecord, todo: _Todo, display: Display
) -> tuple[RunRecord, tuple[str, ...]]:
    """Runs one attempt of the pipeline; returns the run's record and where the time went."""
    from jobs.captioning.write import PartWriter

    with display.activity("Looking at the cluster, and choosing a precision"):
        layout = lay_out(config, record)
    if layout.precision:
        display.say(f"Precision: {layout.precision}.")
    detail(_describe_layout(layout))
    record = begin_attempt(config.out, record, layout)
    *earlier, attempt = record.attempts
    writer = PartWriter(len(record.attempts), layout.rows_per_part)
    fast = config.input.decode == "fast"
    try:
        with saying_what_is_kept(writer):
            snapshot = _run_pipeline(config, record, todo, layout, writer, display)
    except KeyboardInterrupt:
        ended = measured(attempt, None, writer.rows, display.seconds, fast)
        stopped = record.model_copy(update={"status": "stopped", "attempts": (*earlier, ended)})
        write_run_record(config.out, stopped)
        raise display.signals.stopped(_describe_stop(config, record, todo.items, writer.rows)) from None
    seconds = display.seconds
    stages = stage_table(snapshot, seconds, layout.actors, layout.load_tasks, fast) if snapshot else ()
    ended = measured(attempt, snapshot, writer.rows, seconds, fast)
    return record.model_copy(update={"attempts": (*earlier, ended)}), tuple(stages)


def _describe_layout(layout: CaptionLayout) -> str:
    actors = layout.actors
    pool = f"{describe_count(actors.num_actors, 'actor')} on {actors.device} in {actors.dtype}"
    tasks = describe_count(layout.load_tasks, "loading task")
    return f"Plan: {pool}, batches of {layout.batch_size}, {tasks}, parts of {layout.rows_per_part:,} rows"


def begin_attempt(out: str, record: RunRecord, layout: CaptionLayout) -> RunRecord:
    """Records an attempt in the run's folder; returns the record with it."""
    actors = layout.actors
    attempt = Attempt(
        token=uuid.uuid4().hex, started_at=utc_now(), actors=actors.num_actors, device=actors.device, dtype=actors.dtype
    )
    record = record.model_copy(update={"status": "running", "attempts": (*record.attempts, attempt)})
    write_run_record(out, record)
    return record


@contextmanager
def saying_what_is_kept(*writers: PartWriter) -> Iterator[None]:
    """Adds to an error of storage how many rows this command has written, and that it goes on."""
    try:
        yield
    except StorageError as error:
        rows = describe_count(sum(writer.rows for writer in writers), "row")
        error.remedy = f"{error.remedy} What was captioned is kept ({rows} by this command), and {GOES_ON}."
        raise


@dataclass(frozen=True)
class Pipeline:
    """What a pipeline does with which images.

    Attributes:
        items: The work items.
        models: The models that the actors load.
        load: What the loading tasks run, see `jobs.captioning.load.start_loading`.
        keys: Whether captions are sampled, for which each image needs its content key.
        actor: The class of the actors.
        arguments: What an actor is made from, besides its `CaptionerSpec`.
        write: Takes what is captioned, to its end, and what is told of written rows.
    """

    items: Sequence[WorkItem]
    models: Sequence[str]
    load: Callable[..., Iterator[pa.Table]]
    keys: bool
    actor: type[CaptionImages]
    arguments: tuple[Any, ...]
    write: Callable[[ray.data.Dataset, MonitorClient], None]


def run_pipeline(
    config: CaptionConfig,
    record: RunRecord,
    work: WorkList,
    layout: CaptionLayout,
    pipeline: Pipeline,
    display: Display,
) -> Snapshot | None:
    """Runs a pipeline of the record's last attempt; returns its figures."""
    from jobs.captioning.caption import CaptionerSpec
    from jobs.captioning.load import start_loading
    from jobs.captioning.retrieval_actors import shared_indexes

    actors = layout.actors
    with display.activity("Waiting for room for an actor"), unwrapped_errors():
        wait_for_room(actors)
    before_s = display.seconds
    loaded = ", ".join(pipeline.models) + (f" and the index {' and '.join(config.index)}" if config.index else "")
    watching = watch_run(record.run_id, count_images(pipeline.items), len(pipeline.items))
    with (
        unwrapped_errors(),
        marked_as_running(record.run_id, "caption"),
        watching as watch,
        display.show(PipelineView(watch.monitor, before_s, loaded, actors.num_actors)),
        shared_indexes(config, record.index_id) as partitions,
    ):
        loading = replace(load_spec(config, record, work, layout, watch), keys=pipeline.keys)
        captioning = CaptionerSpec(config, layout, record.index_id, record.retrieval_encoder, watch.monitor, partitions)
        captioned = map_in_actors(
            start_loading(pipeline.items, pipeline.load, loading, layout.images_per_block, actors),
            pipeline.actor,
            (captioning, *pipeline.arguments),
            layout.images_per_call,
            actors,
            watch.fault_guard,
            layout.calls_at_once,
        )
        pipeline.write(captioned, watch.monitor)
        snapshot = watch.monitor.snapshot()
    return snapshot.after(before_s) if snapshot else None


def _run_pipeline(
    config: CaptionConfig, record: RunRecord, todo: _Todo, layout: CaptionLayout, writer: PartWriter, display: Display
) -> Snapshot | None:
    """Captions what is left in the record's last attempt; returns its figures."""
    from jobs.captioning.caption import CaptionImages
    from jobs.captioning.load import load_images
    from jobs.captioning.write import PartSink

    schema = caption_schema(record.run_id, record.model_id, record.index_id or "", todo.work.kept_columns)

    def write(captioned: ray.data.Dataset, monitor: MonitorClient) -> None:
        writer.write_all(captioned, PartSink(config.out, record.attempts[-1], schema, layout.parts, monitor))

    keys = config.generation.do_sample
    pipeline = Pipeline(todo.items, (config.model,), load_images, keys, CaptionImages, (), write)
    return run_pipeline(config, record, todo.work, layout, pipeline, display)


def _describe_stop(config: CaptionConfig, record: RunRecord, items: Sequence[WorkItem], new: int) -> str:
    """Returns what to tell who has stopped a run.

    Args:
        config: The run's config.
        record: The run's record.
        items: What was left when the command began.
        new: The images that it has written.
    """
    images, left = record.input.images if record.input else None, count_images(items)
    if images is None or left is None:  # tars that have not been counted
        return f"Stopped: {describe_count(new, 'image')} written by this command; {GOES_ON}"
    total = images if config.limit is None else min(images, config.limit)
    return f"Stopped: {total - left + new:,} of {total:,} written; {GOES_ON}"


def measured(attempt: Attempt, snapshot: Snapshot | None, images: int, seconds: float, fast_decode: bool) -> Attempt:
    """Returns the record of an attempt that has ended, with what its stages reported."""
    ended = attempt.model_copy(update={"finished_at": utc_now(), "seconds": round(seconds, 3), "images": images})
    if snapshot is None:
        return ended
    return ended.model_copy(
        update={
            "decode_s": round(snapshot.load.seconds, 3),
            "fetch_s": round(snapshot.load.fetch_s, 3),
            "fetch_retries": snapshot.load.retries,
            "caption_s": round(snapshot.caption.seconds, 3),
            "write_s": round(snapshot.write.seconds, 3),
            "actors": max(snapshot.actors, 1),
            "decoded_by_pillow": snapshot.load.by_pillow if fast_decode else None,
            "search_backends": tuple(sorted(snapshot.caption.searched_by)),
            "dtype": ", ".join(sorted(snapshot.caption.dtypes)) or attempt.dtype,
            "timeline": snapshot.timeline,
        }
    )


def exit_status(max_error_rate: float, summary: RunSummary) -> int:
    """Returns 0, or the status for a larger share of failed images."""
    return EXIT_TOO_MANY_ERRORS if summary.error_rate > max_error_rate else 0


def explain_exit(max_error_rate: float, summary: RunSummary) -> str:
    """Returns why `exit_status` is not 0, in a line for people."""
    images = summary.images
    return (
        f"Exit code {EXIT_TOO_MANY_ERRORS}: {images.error:,} of {describe_count(images.total, 'row')} are errors, "
        f"{summary.error_rate:.2%}; --max-error-rate allows {max_error_rate:.2%}. "
        f"smallcap inspect {summary.out} --errors lists them."
    )


if __name__ == "__main__":
    from jobs.cli import main

    main("caption")
