"""The `smallcap` command: all jobs and look-ups.

A command's options are the fields of the classes that its function takes. docs/options.md lists the exit codes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.screen import say, say_json, say_lines, say_report, say_result, tell
from jobs.terminal.call_options import (
    BenchCall,
    CalibrateOptions,
    CaptionCall,
    ConfigInitOptions,
    DemoOptions,
    DoctorOptions,
    EvaluateCall,
    ExportOptions,
    FilterOptions,
    IndexGcOptions,
    IndexListOptions,
    IndexUseOptions,
    InspectOptions,
    RayCall,
    ReportOptions,
    SearchOptions,
    TraceOptions,
)
from jobs.terminal.command_line import EXIT_RUN_ERROR, Base, Command, Run, run_app
from smallcap import __version__, storage
from smallcap.config import BenchmarkOptions, CaptionConfig, EvaluateConfig, IndexConfig
from smallcap.local_files import as_text
from smallcap.refresh_config import ForgetConfig, RefreshConfig
from smallcap.training.config import TrainConfig

if TYPE_CHECKING:
    from jobs.caption import RunSummary
    from jobs.variants import VariantsSummary

app = typer.Typer(
    name="smallcap",
    help="Retrieval-augmented image captioning for millions of images on a Ray cluster.",
    no_args_is_help=True,
    add_help_option=False,  # -h is one as well
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
index_app = typer.Typer(
    help="List the versions of an index, go back to one, remove old ones.", no_args_is_help=True, add_help_option=False
)
app.add_typer(index_app, name="index")
config_app = typer.Typer(help="Write a config file to fill in.", no_args_is_help=True, add_help_option=False)
app.add_typer(config_app, name="config")
GROUPS = {"index": index_app, "config": config_app}
COMMANDS: list[Command] = []
_DONE, _NOTHING_TO_DO, _PLANNED = "done", "nothing_to_do", "planned"  # the status of a job, for programs


def main(*command: str) -> None:
    """Runs the command line; a job's module names its command, so that `python -m jobs.NAME` does the same."""
    run_app(app, [*command, *map(as_text, sys.argv[1:])])  # a path may be no UTF-8


def _version(show: bool) -> None:
    if show:
        say(__version__)
        raise typer.Exit


def _help(context: typer.Context, show: bool) -> None:
    if show:
        say(context.get_help())
        raise typer.Exit


_Help = Annotated[bool, typer.Option("-h", "--help", callback=_help, is_eager=True, help="Show this message and exit.")]


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    show_help: _Help = False,
) -> None:
    pass


@index_app.callback()
@config_app.callback()
def _group(show_help: _Help = False) -> None:
    pass


def _show_loading() -> AbstractContextManager[None]:
    """Shows that modules are imported while the block runs, if that takes more than a moment."""
    from jobs.cluster.display import show_while

    return show_while("Loading smallcap and its libraries")


def _say_result(call: RayCall | EvaluateCall, values: Mapping[str, Any], status: str = _DONE, code: int = 0) -> None:
    """Prints the JSON of a job that has ended, if it was asked for."""
    if call.as_json:
        say_result(values, status, code)


def _command(name: str, example: str, base: Base | None = None) -> Callable[[Run], Run]:
    def register(run: Run) -> Run:
        command = Command(name, run, f"smallcap {name} {example}".rstrip(), base)
        command.add_to(GROUPS.get(name.partition(" ")[0], app))
        COMMANDS.append(command)
        return run

    return register


@_command("demo", "")
def demo(options: DemoOptions) -> None:
    """Caption the demo's scenes with its small trained model; then swap the datastore and caption other domains."""
    from jobs.demo import run_demo

    run_demo(options.out, options.address, options.show)


@_command("build-index", "captions.csv --out s3://bucket/index --encoder open_clip:RN50x64/openai")
def build_index(config: IndexConfig, call: RayCall) -> None:
    """Build an index from caption dumps and publish it; add captions to an index, or remove captions."""
    with _show_loading():  # a wrong option fails before
        from jobs import build_index as job
        from jobs import lineage, results

    if call.dry_run:
        plan = job.plan(config, call.address)
        say(job.describe_plan(plan))
        _say_result(call, results.build_plan(plan), _PLANNED)
        return
    with lineage.reported("build-index", lambda: lineage.build_flow(config), call.lineage):
        report = job.run(config, call.address)
    say_report(job.describe(report), slice(1))
    _say_result(call, results.build_result(report), _NOTHING_TO_DO if report.no_op else _DONE)


@_command("index list", "s3://bucket/index")
def index_list(options: IndexListOptions) -> None:
    """Show the versions of an index, newest first."""
    from jobs import index as job
    from jobs.terminal import console

    versions = job.list_index(options.index)
    if options.as_json:
        say_json(versions)
    else:
        console.print_versions(versions)


@_command("index use", "s3://bucket/index previous")
def index_use(options: IndexUseOptions) -> None:
    """Make another version the current one; runs that have begun keep the version they began with."""
    from index_builder.versions.lifecycle import use_version

    say(f"Current version of {options.index}: {use_version(options.index, options.version).index_id}")


@_command("index gc", "s3://bucket/index --grace 7d --dry-run")
def index_gc(options: IndexGcOptions) -> None:
    """Remove versions that have not been current for a while, and files that no version needs."""
    from jobs import index as job

    garbage = job.collect(options.index, options.grace, options.keep, options.dry_run)
    if options.as_json:
        say_json(garbage)
    else:
        say(job.describe_garbage(garbage, options.dry_run))


def _run_to_retry(flags: dict[str, Any], call: CaptionCall) -> Mapping[str, Any] | None:
    """Returns the config of the run whose failed images are tried again, unless another config is given.

    The only argument may be the run's folder.
    """
    if not call.retry_failed or call.config is not None:
        return None
    if "out" not in flags and len(flags.get("images", ())) == 1:
        (flags["out"],) = flags.pop("images")
    if "images" in flags:
        return None

    from jobs.captioning.record import load_existing_run
    from jobs.cluster.pinned import recorded_options

    out = flags.get("out", "")
    return recorded_options(load_existing_run(out), CaptionConfig, out) | {"out": out}


@_command(
    "caption",
    "s3://bucket/images --index s3://bucket/index --model Yova/SmallCap7M --out s3://bucket/captions",
    _run_to_retry,
)
def caption(config: CaptionConfig, call: CaptionCall) -> int:
    """Caption images. To resume a stopped run, repeat the command."""
    if call.variant:
        return _caption_variants(config, call)
    with _show_loading():  # a wrong option fails before
        from jobs import caption as job
        from jobs import lineage, results

    for line in job.demo_warning(config.model, config.images):
        tell(line)
    if call.dry_run:
        from jobs.captioning.plan import dry_run
        from jobs.cluster.display import show_while

        with show_while("Listing the images, and trying the model on a few"):
            plan = dry_run(config, call.address, call.gpu_hour_cost)
        say_lines(plan.lines())
        _say_result(call, results.caption_plan(plan), _PLANNED)
        return 0
    with lineage.reported("caption", lambda: lineage.caption_flow(config), call.lineage):
        summary = job.run(config, call.address, retry_failed=call.retry_failed, relist=call.relist)
    say_report(job.describe(summary), slice(-2, None))
    return _end_captioning(call, job, summary, config.max_error_rate, partial(results.caption_result, summary))


def _end_captioning(
    call: RayCall,
    job: ModuleType,
    summary: RunSummary | VariantsSummary,
    max_error_rate: float,
    result: Callable[[], dict[str, Any]],
) -> int:
    """Returns a captioning command's exit code; says why it is not 0, and prints its JSON if that is asked for.

    Args:
        call: The call.
        job: The module that tells a summary's exit code and explains it.
        summary: What the job did.
        max_error_rate: The accepted share of failed images.
        result: Makes the fields of the JSON.
    """
    code = job.exit_status(max_error_rate, summary)
    reason = {"reason": job.explain_exit(max_error_rate, summary)} if code else {}
    for text in reason.values():
        tell(text)
    if call.as_json:
        say_result(result() | reason, _DONE if summary.new_images else _NOTHING_TO_DO, code)
    return code


def _caption_variants(config: CaptionConfig, call: CaptionCall) -> int:
    """Captions images in several ways."""
    with _show_loading():  # a wrong option fails before
        from jobs import lineage, results
        from jobs import variants as job

    for line in job.demo_warnings(config, call.variant):
        tell(line)
    with lineage.reported("caption", lambda: lineage.variants_flow(config, call.variant), call.lineage):
        summary = job.run(config, call.variant, call.address, retry_failed=call.retry_failed, relist=call.relist)
    say_report(job.describe(summary), slice(-1, None))
    return _end_captioning(call, job, summary, config.max_error_rate, partial(results.variants_result, summary))


@_command("refresh", "s3://bucket/captions --index s3://bucket/index --out s3://bucket/captions-2")
def refresh(config: RefreshConfig, call: RayCall) -> int:
    """Make a run anew with another index: only images whose retrieved captions differ are captioned again."""
    with _show_loading():  # a wrong option fails before
        from jobs import caption as captioning
        from jobs import refresh as job
        from jobs import results

    if call.dry_run:
        from jobs.cluster.display import show_while

        with show_while(f"Searching {' and '.join(config.index)} for the images of {config.run}"):
            plan = job.plan(config)
        say_lines(plan.lines())
        _say_result(call, results.refresh_plan(plan), _PLANNED)
        return 0
    summary = job.run(config, call.address)
    say_report(job.describe(summary), slice(-2, None))
    accepted = summary.run.record.config["max_error_rate"]
    return _end_captioning(call, captioning, summary.run, accepted, partial(results.refresh_result, summary))


@_command("train", "dataset_coco.json --index s3://bucket/index --model Yova/SmallCap7M --out s3://bucket/training")
def train(config: TrainConfig, call: RayCall) -> None:
    """Train cross-attention. To resume a stopped run from its newest checkpoint, repeat the command."""
    with _show_loading():  # a wrong option fails before
        from jobs import lineage, results
        from jobs import train as job

    if call.dry_run:
        plan = job.plan(config)
        say_lines(plan.lines())
        _say_result(call, results.train_plan(plan), _PLANNED)
        return
    with lineage.reported("train", lambda: lineage.train_flow(config), call.lineage):
        summary = job.run(config, call.address)
    say_report(job.describe(summary), slice(-1, None))
    _say_result(call, results.train_result(summary), _DONE if summary.new_steps else _NOTHING_TO_DO)


@_command("config init", "caption --out caption.yaml")
def config_init(options: ConfigInitOptions) -> None:
    """Write a config file with all options of a job, what they mean, and their defaults."""
    from jobs.terminal.config_template import render_template, write_template

    (command,) = (command for command in COMMANDS if command.name == options.job)
    text = render_template(command.name, command.kinds[0])
    if options.out is None:
        say(text.rstrip("\n"))
    else:
        write_template(options.out, text)
        say(f"Written: {options.out}. Fill in what is required, then: smallcap {options.job} --config {options.out}")


@_command("search", "--index s3://bucket/index --text 'a dog on a beach'")
def search(options: SearchOptions) -> None:
    """Show the captions nearest to an image or a text."""
    from dataclasses import asdict

    from jobs import search as job
    from jobs.terminal import console

    neighbours = job.search(options)
    if options.as_json:
        say_json([asdict(neighbour) for neighbour in neighbours])
    else:
        console.print_neighbours(neighbours)


@_command("inspect", "s3://bucket/captions")
def inspect(options: InspectOptions) -> None:
    """Describe an index, a run, a training run, a model or tars: counts, settings, sample rows or failed images."""
    from jobs.inspect import inspect_path
    from jobs.terminal import console

    facts = inspect_path(options.path, options.samples, options.errors)
    if options.as_json:
        say_json(facts)
    else:
        console.print_facts(facts)


@_command("export", "s3://bucket/captions --to jsonl --out captions.jsonl.gz")
def export(options: ExportOptions) -> None:
    """Copy a run's captions to JSON Lines or CSV, or write a card that describes them."""
    from jobs import export as job

    say(job.run(options))


@_command("report", "s3://bucket/captions --out report.html")
def report(options: ReportOptions) -> None:
    """Write a page about a run, two runs side by side, or an index: one HTML file that needs no server."""
    with _show_loading():
        from jobs import report as job

    say(job.run(options))


@_command("filter", "s3://bucket/captions --min-clip-score 0.2 --max-copied 0.8 --out s3://bucket/accepted.parquet")
def filter_rows(options: FilterOptions) -> None:
    """Write the rows of a run whose scores are good enough to a Parquet file, and count the others by reason."""
    from jobs import filter as job

    result = job.run(options)
    if options.as_json:
        say_json(result)
    else:
        say(job.describe(result))


@_command("forget", "s3://bucket/captions --index s3://bucket/index --remove source=web.csv --out s3://bucket/clean")
def forget(config: ForgetConfig, call: RayCall) -> None:
    """Remove captions from an index, and refresh the runs whose prompts held them."""
    with _show_loading():  # a wrong option fails before
        from jobs import forget as job
        from jobs import results

    if call.dry_run:
        uses = job.plan(config)
        say_lines(job.describe_plan(uses))
        _say_result(call, results.forget_plan(uses), _PLANNED)
    else:
        done = job.run(config, call.address)
        say_lines(job.describe(done))
        _say_result(call, results.forget_result(done))


@_command("trace", "s3://bucket/captions --source captions_2021.csv")
def trace(options: TraceOptions) -> None:
    """List the images of a run whose prompts held captions of a dump, of a text or of an id."""
    from jobs import trace as job
    from jobs.terminal import console

    found = job.trace(options)
    if options.out:
        say(job.write(found, options))
    elif options.as_json:
        say_json(list(found.rows()))
    else:
        console.print_traced(found, options.show)


@_command("evaluate", "s3://bucket/captions --references captions_val2014.json")
def evaluate(config: EvaluateConfig, call: EvaluateCall) -> None:
    """Score a run's captions against references, or compare runs, with confidence intervals."""
    with _show_loading():
        from jobs import evaluate as job
    from jobs.terminal.evaluation_table import print_evaluation

    result = job.run(config)
    print_evaluation(result)
    _say_result(call, result)


@_command("calibrate", "s3://bucket/captions --references captions_val2014.json")
def calibrate(options: CalibrateOptions) -> None:
    """Find bounds for `smallcap filter` on a run whose images have references, and say what they are worth."""
    with _show_loading():
        from jobs import calibrate as job

    result = job.run(options)
    say_lines(job.describe(result))
    if options.as_json:
        say_json(result)


@_command("doctor", "--storage s3://bucket/captions --index s3://bucket/index --model Yova/SmallCap7M")
def doctor(options: DoctorOptions) -> int:
    """Check this machine, its GPU, Ray, storage, a model and an index; exit code 1 if a check fails."""
    from jobs import doctor as job

    counts = job.run(options)
    if not options.as_json:
        say(job.summarise(counts))
    return EXIT_RUN_ERROR if counts["fail"] else 0


@_command("bench", "--json bench.json")
def bench(options: BenchmarkOptions, call: BenchCall) -> None:
    """Measure every stage and the whole captioner on this machine, at real sizes with random weights."""
    from smallcap.model.encoder_spec import open_clip_config

    if options.retrieval_encoder != "shared":
        open_clip_config(options.retrieval_encoder)  # before torch is imported
    from jobs import bench as job
    from jobs.terminal import console

    if options.host:
        host = job.run_host(options)
        console.print_host_benchmark(host)
        line = host.to_json()
    else:
        result = job.run(options)
        console.print_benchmark(result)
        line = result.to_json()
    say_json(json.loads(line))
    if call.json_file:
        storage.write_bytes(call.json_file, f"{line}\n".encode())


if __name__ == "__main__":
    main()
