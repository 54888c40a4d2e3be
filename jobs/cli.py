"""The `smallcap` command: every job and look-up, with one way of taking options and of reporting errors.

Exit codes: 0 done, 1 run error, 2 usage, 3 done with more failed rows than `--max-error-rate`.
"""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from jobs.terminal.arguments import EXIT_RUN_ERROR, EXIT_USAGE
from smallcap import __version__, storage
from smallcap.errors import ConfigError, SmallCapError

app = typer.Typer(
    name="smallcap",
    help="Retrieval-augmented image captioning for millions of images on a Ray cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

index_app = typer.Typer(
    help="A published index's versions: list them, go back to one, remove old ones.", no_args_is_help=True
)
app.add_typer(index_app, name="index")

ConfigFile = Annotated[str | None, typer.Option("--config", help="YAML file with options; flags win over it.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="Any option by its dotted name, as a.b=c; repeatable.")]
Address = Annotated[str | None, typer.Option(help="Address of a Ray cluster; by default a local one is started.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, on the last line.")]


def main() -> None:
    """Runs the command line; smallcap's own errors are printed in their words and become exit codes."""
    try:
        app()
    except SmallCapError as error:
        from jobs.terminal.console import print_error

        print_error(error)
        sys.exit(EXIT_USAGE if isinstance(error, ConfigError) else EXIT_RUN_ERROR)


def _version(show: bool) -> None:
    if show:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    out: Annotated[str, typer.Option(help="Folder for the demo's indexes and captions.")] = "out/demo",
    show: Annotated[int, typer.Option(help="How many images to show.")] = 6,
    address: Address = None,
) -> None:
    """Caption the demo's scenes with its small trained model; then swap the datastore, and caption other domains."""
    from jobs import caption as caption_job
    from jobs.demo import compare_swap, run_demo
    from jobs.terminal import console

    result = run_demo(out, address)
    print(f"Index: {'built' if result.index_was_built else 'up to date'}, {result.index}")
    print(caption_job.describe(result.summary), end="\n\n")
    console.print_samples(result.summary.out, show)
    print("\nScenes of domains that the model was not trained on, with the old datastore and with their own:\n")
    console.print_swap(compare_swap(result.swap)[:show])
    print(f"\nParquet: {result.swap.before.out} and {result.swap.after.out}")


@app.command("build-index")
def build_index(
    dumps: Annotated[
        list[str] | None, typer.Argument(help="Caption dumps: CSV, TSV, JSONL, Parquet, COCO JSON, embedding folders.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="The index's folder or prefix.")] = None,
    encoder: Annotated[str | None, typer.Option(help="demo, open_clip:MODEL/PRETRAINED, or hf:ID-OR-PATH.")] = None,
    add: Annotated[bool, typer.Option("--add", help="Add the dumps to the index at --out.")] = False,
    from_indexes: Annotated[
        list[str] | None, typer.Option("--from", help="Take the captions of this index, too; repeatable.")
    ] = None,
    reuse: Annotated[
        list[str] | None, typer.Option(help="Take embeddings of equal texts from this index; repeatable.")
    ] = None,
    remove: Annotated[
        list[str] | None,
        typer.Option(help="source=NAME, image=ID, text=CAPTION, image=@FILE or text=@FILE; repeatable."),
    ] = None,
    compact: Annotated[
        bool, typer.Option("--compact", help="Rebuild without what was removed, newly trained.")
    ] = False,
    text_column: Annotated[str | None, typer.Option(help="Column of the texts.")] = None,
    image_id_column: Annotated[str | None, typer.Option(help="Column of the source images' ids.")] = None,
    embedding_column: Annotated[str | None, typer.Option(help="Parquet column of the texts' embeddings.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Counts a caption's tokens: gpt2, demo, folder or hub id.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longer captions are left out.")] = None,
    drop: Annotated[list[str] | None, typer.Option(help="Leave out urls, markup or repeats; repeatable.")] = None,
    blocklist: Annotated[str | None, typer.Option(help="File of words and phrases, one per line.")] = None,
    index_key: Annotated[
        str | None, typer.Option(help="auto, Flat, IVF,SQfp16, IVF,SQ8, or any key of faiss's factory.")
    ] = None,
    shards: Annotated[int | None, typer.Option(help="Number of shards.")] = None,
    memory_budget_gb: Annotated[float | None, typer.Option(help="Memory of a node that the index may take.")] = None,
    calibration_images: Annotated[
        list[str] | None, typer.Option(help="Images like those to caption, to calibrate with; repeatable.")
    ] = None,
    recall_target: Annotated[float | None, typer.Option(help="Least recall@4 against exact search.")] = None,
    accept_recall: Annotated[
        bool, typer.Option("--accept-recall", help="Publish although the recall target is missed.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count and plan; build nothing.")] = False,
    config: ConfigFile = None,
    sets: Sets = None,
    address: Address = None,
) -> None:
    """Build and publish an index from caption dumps; add to one, or remove from one."""
    from smallcap.config import IndexConfig, load_config

    flags: dict[str, Any] = {
        "dumps": dumps,
        "out": out,
        "encoder": encoder,
        "add": add or None,
        "from_indexes": from_indexes,
        "reuse": reuse,
        "remove": remove,
        "compact": compact or None,
        "text_column": text_column,
        "image_id_column": image_id_column,
        "embedding_column": embedding_column,
        "cleaning.tokenizer": tokenizer,
        "cleaning.max_tokens": max_tokens,
        "cleaning.drop": drop,
        "cleaning.blocklist": blocklist,
        "index_key": index_key,
        "shards": shards,
        "memory_budget_gb": memory_budget_gb,
        "recall.calibration_images": calibration_images,
        "recall.target": recall_target,
        "recall.accept": accept_recall or None,
    }
    resolved = load_config(IndexConfig, config, flags, sets or ())

    from jobs import build_index as job  # imports torch and Ray, which a wrong option need not wait for

    if dry_run:
        print(job.describe_plan(job.plan(resolved, address)))
    else:
        print(job.describe(job.run(resolved, address)))


@index_app.command("list")
def index_list(index: Annotated[str, typer.Argument(help="Published index.")], as_json: AsJson = False) -> None:
    """Show an index's versions, the newest first."""
    from jobs import index as job
    from jobs.terminal import console

    versions = job.list_index(index)
    if as_json:
        print(json.dumps(versions))
    else:
        console.print_versions(versions)


@index_app.command("use")
def index_use(
    index: Annotated[str, typer.Argument(help="Published index.")],
    version: Annotated[str, typer.Argument(help="Id of a version, its beginning, or previous.")],
) -> None:
    """Make another version the current one; runs that have begun keep theirs."""
    from index_builder.versions.lifecycle import use_version

    print(f"Current version of {index}: {use_version(index, version).index_id}")


@index_app.command("gc")
def index_gc(
    index: Annotated[str, typer.Argument(help="Published index.")],
    grace: Annotated[str, typer.Option(help="Keep what was needed or written in this time: 90s, 30m, 12h, 7d.")] = "1d",
    keep: Annotated[int, typer.Option(min=0, help="Former versions to keep in any case.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove versions that have not been current for a while, and files that no version needs."""
    from jobs import index as job

    garbage = job.collect(index, grace, keep, dry_run)
    print(json.dumps(garbage) if as_json else job.describe_garbage(garbage, dry_run))


@app.command()
def caption(
    images: Annotated[
        list[str] | None, typer.Argument(help="Folders, prefixes, image files, or lists of URIs.")
    ] = None,
    index: Annotated[str | None, typer.Option(help="Published index.")] = None,
    model: Annotated[str | None, typer.Option(help="demo, a checkpoint folder, or a Hugging Face id.")] = None,
    out: Annotated[str | None, typer.Option(help="Output folder or prefix.")] = None,
    k: Annotated[int | None, typer.Option("--k", "-k", help="Retrieved captions in the prompt.")] = None,
    num_beams: Annotated[int | None, typer.Option(help="Beams; 1 decodes greedily.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    batch_size: Annotated[str | None, typer.Option(help="Images captioned together, or auto.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N images.")] = None,
    keep_columns: Annotated[
        str | None, typer.Option(help="Columns of lists, or fields of tars' JSON, to pass on: a,b,c.")
    ] = None,
    save_embeddings: Annotated[
        bool | None, typer.Option("--save-embeddings", help="Write image embeddings, too.")
    ] = None,
    write: Annotated[str | None, typer.Option(help="Also write the images with their captions: webdataset.")] = None,
    max_error_rate: Annotated[float | None, typer.Option(help="Exit with 3 above this share of failed rows.")] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try failed images again; the run's folder is enough for that.")
    ] = False,
    relist: Annotated[bool, typer.Option("--relist", help="List the input again and take what is new.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the input, caption a few batches, and say what the run will take.")
    ] = False,
    gpu_hour_cost: Annotated[float | None, typer.Option(help="With --dry-run: $ of one GPU for an hour.")] = None,
    config: ConfigFile = None,
    sets: Sets = None,
    address: Address = None,
) -> None:
    """Caption images. Stopped and started again, it does what is missing."""
    from smallcap.config import CaptionConfig, load_config

    if retry_failed and out is None and config is None and images and len(images) == 1:
        out, images = images[0], None  # a run's folder: its own config holds
    flags: dict[str, Any] = {
        "images": images,
        "index": index,
        "model": model,
        "out": out,
        "limit": limit,
        "keep_columns": keep_columns.split(",") if keep_columns else None,
        "max_error_rate": max_error_rate,
        "retrieval.k": k,
        "generation.num_beams": num_beams,
        "compute.dtype": dtype,
        "compute.batch_size": batch_size if batch_size in (None, "auto") else _as_int("--batch-size", batch_size),
        "output.save_embeddings": save_embeddings,
        "output.write": [write] if write else None,
    }
    base = None
    if retry_failed and images is None and config is None:
        from jobs.captioning.record import load_run_config

        base = load_run_config(out or "")
    resolved = load_config(CaptionConfig, config, flags, sets or (), base)

    from jobs import caption as job  # imports torch and Ray, which a wrong option need not wait for

    if dry_run:
        from jobs.captioning.plan import dry_run as make_plan

        plan = make_plan(resolved, address, gpu_hour_cost)
        print("\n".join(plan.lines()))
        return
    summary = job.run(resolved, address, retry_failed=retry_failed, relist=relist)
    print(job.describe(summary))
    if status := job.exit_status(resolved, summary):
        raise typer.Exit(status)


@app.command()
def train(
    sources: Annotated[
        list[str] | None,
        typer.Argument(help="Images with captions: COCO or Karpathy JSON, CSV, Parquet, WebDataset tars."),
    ] = None,
    index: Annotated[str | None, typer.Option(help="Published index that prompts are made from.")] = None,
    out: Annotated[str | None, typer.Option(help="Output folder or prefix.")] = None,
    model: Annotated[str | None, typer.Option(help="Checkpoint to train further; or else the parts:")] = None,
    vision_encoder: Annotated[str | None, typer.Option(help="CLIP: openai/clip-vit-base-patch32, or a folder.")] = None,
    decoder: Annotated[
        str | None, typer.Option(help="gpt2, facebook/opt-125m, facebook/xglm-564M, or a folder.")
    ] = None,
    reduce_factor: Annotated[int | None, typer.Option(help="Of new cross-attention: 1, 2, 4, 8 or 16.")] = None,
    retrieval_encoder: Annotated[str | None, typer.Option(help="Its spec; by default the index's.")] = None,
    images: Annotated[str | None, typer.Option(help="Folder or prefix of the images that lists name.")] = None,
    validation: Annotated[
        list[str] | None, typer.Option(help="Images with captions to choose the best epoch by; repeatable.")
    ] = None,
    retrieval: Annotated[
        str | None, typer.Option(help="top-k, sample-k (of the nearest 50), or c-sample-k (the nearest and k - 1).")
    ] = None,
    k: Annotated[int | None, typer.Option("--k", "-k", help="Retrieved captions in the prompt; 0 for none.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over all captions.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples of a step, over all workers.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of AdamW, at its highest.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    accumulate: Annotated[int | None, typer.Option(help="Batches that a step is cut into, to save memory.")] = None,
    workers: Annotated[int | None, typer.Option(help="Training processes; by default one per GPU.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N images.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the input and say what there is to do.")] = False,
    config: ConfigFile = None,
    sets: Sets = None,
    address: Address = None,
) -> None:
    """Train cross-attention. Stopped and started again, it goes on from its newest checkpoint."""
    from smallcap.config import load_config
    from smallcap.training.config import TrainConfig

    flags: dict[str, Any] = {
        "sources": sources,
        "index": index,
        "out": out,
        "model": model,
        "vision_encoder": vision_encoder,
        "decoder": decoder,
        "reduce_factor": reduce_factor,
        "retrieval_encoder": retrieval_encoder,
        "images": images,
        "validation": validation,
        "retrieval.mode": retrieval,
        "retrieval.k": k,
        "optimizer.epochs": epochs,
        "optimizer.batch_size": batch_size,
        "optimizer.learning_rate": learning_rate,
        "optimizer.accumulate": accumulate,
        "dtype": dtype,
        "workers": workers,
        "limit": limit,
    }
    resolved = load_config(TrainConfig, config, flags, sets or ())

    from jobs import train as job  # imports torch and Ray, which a wrong option need not wait for

    print("\n".join(job.plan_lines(resolved)) if dry_run else job.describe(job.run(resolved, address)))


@app.command()
def search(
    index: Annotated[str, typer.Option(help="Published index.")],
    image: Annotated[str | None, typer.Option(help="Query by an image.")] = None,
    text: Annotated[str | None, typer.Option(help="Query by a text.")] = None,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="How many captions.")] = 10,
    encoder: Annotated[str | None, typer.Option(help="Retrieval encoder; by default the index's own.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the captions nearest to an image or a text."""
    from dataclasses import asdict

    from jobs import search as job
    from jobs.terminal import console

    neighbours = job.search(index, image, text, k, encoder)
    if as_json:
        print(json.dumps([asdict(neighbour) for neighbour in neighbours]))
    else:
        console.print_neighbours(neighbours)


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="An index or a captioning run.")],
    samples: Annotated[int, typer.Option(min=0, help="How many rows to show.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Say what an index or a run is: counts, settings, sample rows."""
    from jobs.inspect import inspect_path
    from jobs.terminal import console

    facts = inspect_path(path, samples)
    if as_json:
        print(json.dumps(facts))
    else:
        console.print_facts(facts)


@app.command()
def evaluate(
    runs: Annotated[
        list[str] | None, typer.Argument(help="Output of a captioning run, or of two to compare on the same images.")
    ] = None,
    references: Annotated[
        str | None, typer.Option(help="COCO captions, Karpathy's splits, or a table of images and captions.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of Karpathy's splits, the one to take, such as test.")] = None,
    text_column: Annotated[str | None, typer.Option(help="Column of a table's captions.")] = None,
    image_id_column: Annotated[str | None, typer.Option(help="Column of a table's file names or image ids.")] = None,
    metrics: Annotated[str | None, typer.Option(help="Of cider,bleu,rouge_l,meteor,spice; by default all.")] = None,
    index: Annotated[str | None, typer.Option(help="Captions in this index do not count as novel.")] = None,
    bootstrap: Annotated[int | None, typer.Option(help="Draws for the 95% intervals; 0 for none.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the draws.")] = None,
    out: Annotated[str | None, typer.Option(help="Also write the result to this file, as JSON.")] = None,
    config: ConfigFile = None,
    sets: Sets = None,
    as_json: AsJson = False,
) -> None:
    """Score a run's captions against references, or compare two runs, with confidence intervals."""
    from jobs import evaluate as job
    from jobs.terminal.evaluation_table import print_evaluation
    from smallcap.config import EvaluateConfig, load_config

    flags: dict[str, Any] = {
        "runs": runs or None,
        "references": references,
        "split": split,
        "text_column": text_column,
        "image_id_column": image_id_column,
        "metrics": metrics.split(",") if metrics else None,
        "index": index,
        "bootstrap": bootstrap,
        "seed": seed,
        "out": out,
    }
    result = job.run(load_config(EvaluateConfig, config, flags, sets or ()))
    print_evaluation(result)
    if as_json:
        print(json.dumps(result))


@app.command()
def bench(
    photos: Annotated[list[str] | None, typer.Argument(help="Image files; by default one is made.")] = None,
    images: Annotated[int, typer.Option(min=1, help="Images that the whole loop captions.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Images captioned together.")] = 64,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Retrieved captions in the prompt.")] = 4,
    num_beams: Annotated[int, typer.Option(min=1, help="Beams; 1 decodes greedily.")] = 3,
    reduce_factor: Annotated[int, typer.Option(help="Of the cross-attention: 1, 2, 4, 8 or 16.")] = 4,
    retrieval_encoder: Annotated[
        str, typer.Option(help="shared, or an architecture of open_clip: RN50x64.")
    ] = "shared",
    captions: Annotated[int, typer.Option(min=10, help="Captions in the index.")] = 100_000,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    compile: Annotated[bool, typer.Option(help="Compile the encoders with torch.compile.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each stage; the fastest counts.")] = 3,
    json_file: Annotated[str | None, typer.Option("--json", help="Also write the JSON line to this file.")] = None,
) -> None:
    """Measure every stage and the whole captioner on this machine, at real sizes with random weights."""
    import torch

    from jobs.terminal import console
    from smallcap.benchmark.stages import BenchmarkOptions, run_benchmark

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    options = BenchmarkOptions(
        images, batch_size, k, num_beams, reduce_factor, retrieval_encoder, captions, device, dtype, repeats,
        compile, tuple(photos or ()),
    )  # fmt: skip
    result = run_benchmark(options)
    console.print_benchmark(result)
    print(result.to_json())
    if json_file:
        storage.write_bytes(json_file, (result.to_json() + "\n").encode())


def _as_int(flag: str, text: str | None) -> int:
    try:
        return int(text or "")
    except ValueError as error:
        raise ConfigError(
            "An option's value is wrong.", where=flag, expected="a whole number or auto", found=str(text)
        ) from error


if __name__ == "__main__":
    main()
