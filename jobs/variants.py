"""Captions images in several ways in one pass, which loads each image once: `smallcap caption … --variant …`.

Each variant is a captioning run of its own in a folder of its name: with its record, its list of work and its parts.
Whatever reads or goes on with a run does so with a variant. The pass captions what any variant lacks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

from jobs import caption
from jobs.captioning.layout import CaptionLayout, lay_out
from jobs.captioning.monitor import MonitorClient
from jobs.captioning.progress import stage_table
from jobs.captioning.record import Input, load_run_record, run_lock, write_run_record
from jobs.captioning.stage_report import Snapshot
from jobs.captioning.variant_work import VariantRun, list_together, open_runs, write_names
from jobs.captioning.work import describe_kept, finish_run, remaining_items
from jobs.cluster.addresses import check_address
from jobs.cluster.display import Display, on_shown_ray
from jobs.cluster.pinned import check_indexes_are_there
from jobs.cluster.stopping import GOES_ON, stoppable
from smallcap.config import CaptionConfig
from smallcap.images.work_list import WorkList
from smallcap.output.schema import caption_schema
from smallcap.output.variant_runs import VARIANTS_FILE
from smallcap.phrasing import describe_count
from smallcap.variant_options import Variant, make_variants

if TYPE_CHECKING:
    import ray.data

    from jobs.captioning.variants import VariantSink
    from jobs.captioning.write import PartWriter


@dataclass(frozen=True)
class VariantsSummary:
    """What a call of the job did.

    Attributes:
        out: The folder of all variants.
        runs: What it did for each, by name in the order of the command.
        stages: Where the time of this call went, for people.
    """

    out: str
    runs: Mapping[str, caption.RunSummary]
    stages: tuple[str, ...] = ()

    @property
    def new_images(self) -> int:
        """The rows that were written, of all variants."""
        return sum(summary.new_images for summary in self.runs.values())


def run(
    config: CaptionConfig,
    texts: Sequence[str],
    address: str | None = None,
    *,
    retry_failed: bool = False,
    relist: bool = False,
) -> VariantsSummary:
    """Captions all images of `config` in all ways in which they have no row yet.

    Args:
        config: What the variants share; each writes to a folder of its name in `out`.
        texts: The variants, see `smallcap.variant_options.make_variants`.
        address: As for `jobs.caption.run`, also `retry_failed` and `relist`.
        retry_failed: Whether to try images again whose rows are errors.
        relist: Whether to list the input again.

    Raises:
        ConfigError: The options are wrong, or a folder holds a run with other options.
        RunError: Storage, index, checkpoint or Ray cannot be used.
        Stopped: A signal came; what was captioned by then is written.
    """
    variants = make_variants(config, texts)
    with ExitStack() as locks, stoppable() as signals, Display(signals) as display:
        locks.enter_context(run_lock(config.out, VARIANTS_FILE))
        for variant in variants:
            locks.enter_context(run_lock(variant.config.out))
        try:
            summary = _run(config, variants, address, retry_failed, relist, display)
        except KeyboardInterrupt:
            for variant in variants:
                record = load_run_record(variant.config.out)
                if record is not None and record.status == "running":
                    write_run_record(variant.config.out, record.model_copy(update={"status": "stopped"}))
            raise
    return replace(summary, runs={variant.name: summary.runs[variant.name] for variant in variants})


def _run(
    config: CaptionConfig,
    variants: Sequence[Variant],
    address: str | None,
    retry_failed: bool,
    relist: bool,
    display: Display,
) -> VariantsSummary:
    runs = open_runs(config, variants)
    done = [one.record.is_done(config.limit) for one in runs]
    if all(done) and not (retry_failed or relist):
        return _summary(config, runs)
    for one in runs:
        check_indexes_are_there(one.record, config.index)
    check_address(address)  # before what may take long
    with display.activity(f"Listing the images of {', '.join(config.images)}"):
        work = list_together(runs, relist)
        runs = [
            replace(one.with_record(input=Input.of(work)), items=remaining_items(one.config, work, retry_failed))
            for one in runs
        ]
    write_names(config.out, variants)
    stages: tuple[str, ...] = ()
    if any(one.items for one in runs):
        with on_shown_ray(display, address, partial(_describe_kept, runs)):
            captioned, stages = _caption([one for one in runs if one.items], work, display)
        runs = [captioned.get(one.variant.name, one) for one in runs]
    with display.activity(f"Checking what is written to {config.out}"):
        runs = [
            one
            if is_done and not (one.items or relist)
            else replace(one, record=finish_run(one.config, one.record, work))
            for one, is_done in zip(runs, done, strict=True)
        ]
    return _summary(config, runs, work, stages)


def _caption(
    runs: Sequence[VariantRun], work: WorkList, display: Display
) -> tuple[dict[str, VariantRun], tuple[str, ...]]:
    """Runs one attempt of each run in one pipeline; returns the runs by name, and where the time went."""
    from jobs.captioning.write import PartWriter

    first, oldest = runs[0], max(runs, key=lambda one: len(one.record.attempts))  # whose precision all keep
    with display.activity("Looking at the cluster, and choosing a precision"):
        layout = lay_out(first.config, oldest.record)
    if layout.precision:
        display.say(f"Precision: {layout.precision}.")
    begun = [replace(one, record=caption.begin_attempt(one.out, one.record, layout)) for one in runs]
    writers = [PartWriter(len(one.record.attempts), layout.rows_per_part) for one in begun]
    fast = first.config.input.decode == "fast"

    def ended(status: str, snapshot: Snapshot | None, seconds: float) -> list[VariantRun]:
        records = []
        for one, writer in zip(begun, writers, strict=True):
            *before, attempt = one.record.attempts
            last = caption.measured(attempt, snapshot, writer.rows, seconds, fast)
            records.append(one.with_record(status=status, attempts=(*before, last)))
        return records

    try:
        with caption.saying_what_is_kept(*writers):
            snapshot = _run_pipeline(begun, work, layout, writers, display)
    except KeyboardInterrupt:
        for one in ended("stopped", None, display.seconds):
            write_run_record(one.out, one.record)
        rows = describe_count(sum(writer.rows for writer in writers), "row")
        raise display.signals.stopped(f"Stopped: {rows} written by this command; {GOES_ON}") from None
    seconds = display.seconds
    stages = stage_table(snapshot, seconds, layout.actors, layout.load_tasks, fast) if snapshot else ()
    return {one.variant.name: one for one in ended("running", snapshot, seconds)}, tuple(stages)


def _run_pipeline(
    runs: Sequence[VariantRun],
    work: WorkList,
    layout: CaptionLayout,
    writers: Sequence[PartWriter],
    display: Display,
) -> Snapshot | None:
    """Runs the pipeline of the runs' last attempts; returns its figures."""
    from jobs.captioning.variants import CaptionVariants, join_items, load_variant_images
    from jobs.captioning.write import write_each

    def write(captioned: ray.data.Dataset, monitor: MonitorClient) -> None:
        write_each(captioned, list(zip(writers, _sinks(runs, work, layout, monitor), strict=True)))

    pipeline = caption.Pipeline(
        items=join_items([one.items for one in runs]),
        models=tuple(dict.fromkeys(one.config.model for one in runs)),
        load=load_variant_images,
        keys=any(one.config.generation.do_sample for one in runs),
        actor=CaptionVariants,
        arguments=([one.config for one in runs],),
        write=write,
    )
    return caption.run_pipeline(runs[0].config, runs[0].record, work, layout, pipeline, display)


def _sinks(
    runs: Sequence[VariantRun], work: WorkList, layout: CaptionLayout, monitor: MonitorClient
) -> list[VariantSink]:
    from jobs.captioning.variants import VariantSink

    return [
        VariantSink(
            one.out,
            one.record.attempts[-1],
            caption_schema(one.record.run_id, one.record.model_id, one.record.index_id or "", work.kept_columns),
            layout.parts,
            monitor,
            number,
        )
        for number, one in enumerate(runs)
    ]


def _describe_kept(runs: Sequence[VariantRun]) -> str:
    return " ".join(describe_kept(one.out) for one in runs)


def _summary(
    config: CaptionConfig, runs: Sequence[VariantRun], work: WorkList | None = None, stages: tuple[str, ...] = ()
) -> VariantsSummary:
    summaries = {
        one.variant.name: caption.RunSummary(
            one.out,
            one.record,
            one.record.attempts[-1].images if one.items else 0,
            one.record.images,
            work.relisted if work else None,
        )
        for one in runs
    }
    return VariantsSummary(config.out, summaries, stages)


def describe(summary: VariantsSummary) -> str:
    """Returns what a call of the job did for each variant and where its time went, in lines for people."""
    lines = list(summary.stages or ["Nothing to do: every image has its row in every variant."])
    for name, of_variant in summary.runs.items():
        lines += [f"{name}:", *(f"  {line}" for line in caption.describe_output(of_variant))]
    references = f"smallcap evaluate {summary.out} --references FILE"
    return "\n".join([*lines, f"Compare them: smallcap report {summary.out}, or {references}"])


def exit_status(max_error_rate: float, summary: VariantsSummary) -> int:
    """Returns 0, or the status for a larger share of failed images of a variant."""
    return max(caption.exit_status(max_error_rate, of_variant) for of_variant in summary.runs.values())


def explain_exit(max_error_rate: float, summary: VariantsSummary) -> str:
    """Returns why `exit_status` is not 0, in a line for people."""
    failing = (one for one in summary.runs.values() if caption.exit_status(max_error_rate, one))
    return caption.explain_exit(max_error_rate, next(failing))


def demo_warnings(config: CaptionConfig, texts: Sequence[str]) -> list[str]:
    """Returns a line that warns where the demo's model is to caption images that are not the demo's; else none."""
    models = dict.fromkeys(variant.config.model for variant in make_variants(config, texts))
    return list(chain.from_iterable(caption.demo_warning(model, config.images) for model in models))
