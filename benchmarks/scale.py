"""Captions many small images with a tiny model and kills the run: has every image one row, and is memory flat?

`smallcap caption` runs as a process with its own Ray, on images in S3 (with the output in S3) and on WebDataset tars
(with the output on disk). SIGKILL ends it and its Ray, and the same command is started again. At the end every image
must have one row, and the captions must be those of an undisturbed run.

    python -m benchmarks.scale --images 200000 --uninterrupted 200000 --plot docs/scale.png --json scale.json

The model is tiny on purpose: at real sizes, captioning hides what listing, fetching, Ray and writing cost. Memory is
read from /proc, so this runs only on Linux.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv
import pyarrow.parquet as pq

from benchmarks.measuring import say
from benchmarks.s3_server import serve_s3
from benchmarks.scale_data import (
    BUCKET,
    IMAGES_PER_TAR,
    image_name,
    image_number,
    make_tiny_model,
    upload_images,
    write_tars,
)
from benchmarks.scale_run import Sample, WatchedRun
from benchmarks.tiny_models import ModelAndIndex
from smallcap import storage
from smallcap.machine.description import describe_machine

KILLS = (0.1, 0.5, 0.9)
MEMORY = {
    "driver_resident": "driver, resident",
    "driver_own": "driver, own",
    "workers_own": "workers, own",
    "daemons_own": "Ray's own processes",
    "object_store": "object store, pages ever used",
}
_OUT_BUCKET = "runs"
_CHEAP = ("-k", "2", "--num-beams", "1", "--dtype", "float32", "--set", "generation.max_new_tokens=8")
_MOST_ROWS_PER_PART = 5000
_PARTS = 40  # the least number of parts, so that a kill in a small run finds some
_TENTHS = 10


@dataclass(frozen=True)
class Input:
    """Images in one kind of place."""

    name: str
    sources: Sequence[str]
    out: str  # folder or prefix for outputs
    sample: Callable[[int], tuple[Sequence[str], int]]  # sources of about this number of images, and their exact number
    fetched: Callable[[], int] | None


@contextmanager
def s3_input(work: Path, images: int) -> Iterator[Input]:
    """Serves the images from S3; the data stay in `work`."""
    with serve_s3(work / "s3", BUCKET, _OUT_BUCKET) as server:
        prefix = f"first-{images}"  # so that it holds no images of a larger run
        upload_images(prefix, images)

        def sample(count: int) -> tuple[Sequence[str], int]:
            listed = work / "sample.csv"
            names = [image_name(number) for number in range(count)]
            columns = {"image_id": names, "image_uri": [f"s3://{BUCKET}/{prefix}/{name}" for name in names]}
            pyarrow.csv.write_csv(pyarrow.table(columns), listed)
            return [str(listed)], count

        out = f"s3://{_OUT_BUCKET}/{time.strftime('%Y%m%d-%H%M%S')}"
        yield Input("s3", [f"s3://{BUCKET}/{prefix}"], out, sample, lambda: server.objects_sent(BUCKET))


@contextmanager
def tar_input(work: Path, images: int) -> Iterator[Input]:
    """Writes the images into tars below `work`, which stay there."""
    folder = work / f"tars-{images}"
    write_tars(folder, images)

    def sample(count: int) -> tuple[Sequence[str], int]:
        tars = sorted(folder.glob("*.tar"))[: max(1, count // IMAGES_PER_TAR)]
        return [str(tar) for tar in tars], min(images, len(tars) * IMAGES_PER_TAR)

    out = work / "runs" / time.strftime("%Y%m%d-%H%M%S")
    yield Input("tars", [str(folder)], str(out), sample, None)


INPUTS = {"s3": s3_input, "tars": tar_input}


class Benchmark:
    """One run: its options, its model, and the results so far."""

    def __init__(self, options: argparse.Namespace, model: ModelAndIndex) -> None:
        self._options, self._model = options, model
        self.results: dict[str, Any] = {"machine": describe_machine(0), "images": options.images, "runs": []}

    def measure(self, image_input: Input) -> bool:
        """Captions with kills and without; says whether every row is there once and both runs agree."""
        options = self._options
        say(f"{image_input.name}: {options.images:,} images, killed at {options.kills or 'no time'}")
        killed = self._watched(image_input, image_input.sources, "killed")
        seconds = killed.run([round(share * options.images) for share in options.kills])
        result: dict[str, Any] = {
            "input": image_input.name,
            "seconds": seconds,
            "no_op_s": killed.run_again(),
            "kills": [vars(kill) for kill in killed.kills],
            "images_per_s_by_tenth": rates_by_tenth(killed.samples, options.images),
            "memory_mb": {kind: max(sample.memory[kind] for sample in killed.samples) for kind in MEMORY},
            "rows": check_rows(killed.out, options.images),
        }
        whole = self._uninterrupted(image_input, killed.out, result) if options.uninterrupted else None
        steady = whole if whole and options.uninterrupted >= options.images else killed
        result["memory_slope_of"] = "uninterrupted run" if steady is whole else "longest start"
        result["memory_slope_mb_per_100k_images"] = memory_slopes(longest_start(steady.samples, steady.starts))
        self.results["runs"].append(result)
        if options.json:
            series = {"killed": killed.record()} | ({"uninterrupted": whole.record()} if whole else {})
            self.results.setdefault("series", {})[image_input.name] = series
            options.json.write_text(json.dumps(self.results) + "\n")
        if options.plot:
            draw(
                options.plot.with_stem(f"{options.plot.stem}-{image_input.name}"),
                killed,
                options.images,
                image_input.name,
            )
        alike = whole is None or result["uninterrupted"]["captions_that_differ"] == 0
        return alike and result["rows"]["as_they_should_be"]

    def _uninterrupted(self, image_input: Input, out: str, result: dict[str, Any]) -> WatchedRun:
        """Captions all images, or a sample, without a kill, and compares the output with that of the killed run."""
        sources, count = image_input.sources, self._options.images
        if self._options.uninterrupted < count:
            sources, count = image_input.sample(self._options.uninterrupted)
        say(f"{image_input.name}: {count:,} images without a kill")
        run = self._watched(image_input, sources, "uninterrupted")
        seconds = run.run([])
        result["uninterrupted"] = {
            "images": count,
            "seconds": seconds,
            "images_per_s_by_tenth": rates_by_tenth(run.samples, count),
            "captions_that_differ": differences(out, run.out, count),
        }
        return run

    def _watched(self, image_input: Input, sources: Sequence[str], name: str) -> WatchedRun:
        out = storage.join(image_input.out, name)
        rows_per_part = max(1, min(_MOST_ROWS_PER_PART, self._options.images // _PARTS))
        command = [sys.executable, "-m", "jobs.cli", "caption", *sources, "--out", out, *_CHEAP]
        command += ["--model", self._model.model, "--index", self._model.index]
        for setting in (f"output.rows_per_part={rows_per_part}", *self._options.set):
            command += ["--set", setting]
        return WatchedRun(command, out, self._options.work / f"{image_input.name}-{name}.log", image_input.fetched)


# --- what the rows say ---------------------------------------------------------------------------------------------


def read_rows(out: str) -> Iterator[dict[str, Any]]:
    """Yields id, status, caption and neighbours of every row of an output."""
    for uri in storage.list_files(out, (".parquet",)):
        data = io.BytesIO(storage.read_bytes(uri))
        yield from pq.read_table(data, columns=["image_id", "status", "caption", "neighbours"]).to_pylist()


def check_rows(out: str, images: int) -> dict[str, Any]:
    """Counts images without a row and with more than one, error rows, and rows of unknown images."""
    rows, errors, strangers = Counter[int](), 0, 0
    for row in read_rows(out):
        number = image_number(row["image_id"])
        if number is None or number >= images:
            strangers += 1
        else:
            rows[number] += 1
            errors += row["status"] != "ok"
    more = sum(count > 1 for count in rows.values())
    found = {"missing": images - len(rows), "more_than_once": more, "errors": errors, "strangers": strangers}
    return found | {"as_they_should_be": not any(found.values())}


def differences(out: str, reference: str, images: int) -> int:
    """Counts those of the first images whose caption or neighbours differ from the reference's."""
    found, expected = (
        {image_number(row["image_id"]): _said(row) for row in read_rows(run)} for run in (out, reference)
    )
    return sum(number not in expected or expected[number] != found.get(number) for number in range(images))


def _said(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["caption"], tuple(neighbour["caption_id"] for neighbour in row["neighbours"] or ())


# --- what the samples say ------------------------------------------------------------------------------------------


def rates_by_tenth(samples: Sequence[Sample], images: int) -> list[float]:
    """Returns images/s in each tenth of the rows, starts included, interpolated between parts."""
    seconds = np.array([0.0, *(sample.seconds for sample in samples)])
    rows = np.maximum.accumulate(np.array([0, *(sample.rows for sample in samples)]))
    rises = np.flatnonzero(np.diff(rows, prepend=-1))
    bounds = np.interp(np.linspace(0, images, _TENTHS + 1), rows[rises], seconds[rises])
    return [round(images / _TENTHS / max(taken, 1e-9), 1) for taken in np.diff(bounds).tolist()]


def longest_start(samples: Sequence[Sample], starts: Sequence[float]) -> list[Sample]:
    """Returns the samples of the start that wrote the most rows."""
    bounds = [*starts, float("inf")]
    by_start = [[sample for sample in samples if start <= sample.seconds < stop] for start, stop in pairwise(bounds)]
    return max(by_start, key=lambda during: during[-1].rows - during[0].rows if during else 0)


def memory_slopes(samples: Sequence[Sample]) -> dict[str, float]:
    """Returns how each kind of memory grows over the second half of the rows, by least squares: MB per 100k images."""
    alive = [sample for sample in samples if sample.memory["driver_own"]]  # the last sample follows the driver's end
    half = [sample for sample in alive if sample.rows >= (alive[0].rows + alive[-1].rows) / 2]
    rows = np.array([sample.rows for sample in half], float)
    if len(half) < 3 or not rows.std():
        return {}
    memory = {name: [sample.memory[name] for sample in half] for name in half[0].memory}
    return {name: round(float(np.polyfit(rows, values, 1)[0]) * 1e5, 2) for name, values in memory.items()}


def draw(path: Path, run: WatchedRun, images: int, name: str) -> None:
    """Draws memory and rows over time, with the kills as vertical lines."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        say("No plot: matplotlib is not installed.")
        return
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    minutes = [sample.seconds / 60 for sample in run.samples]
    for kind, label in MEMORY.items():
        upper.plot(minutes, [sample.memory[kind] for sample in run.samples], label=label)
    upper.set_ylabel("MB")
    upper.set_title(f"smallcap caption, {images:,} images ({name}); dashed: SIGKILL")
    upper.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    lower.plot(minutes, [sample.rows for sample in run.samples])
    lower.set_ylabel("rows in parts")
    lower.set_xlabel("minutes")
    for axes in (upper, lower):
        axes.set_ylim(bottom=0)
        for kill in run.kills:
            axes.axvline(kill.seconds / 60, color="black", linestyle="--", linewidth=0.8)
    figure.savefig(path, dpi=110)


def table(results: dict[str, Any]) -> str:
    """Returns the results as text for people."""
    lines = [", ".join(f"{name} {value}" for name, value in results["machine"].items() if value)]
    for run in results["runs"]:
        counts = ", ".join(f"{run['rows'][name]} {name.replace('_', ' ')}" for name in list(run["rows"])[:-1])
        lines.append(f"{run['input']}: {results['images']:,} images in {run['seconds']:.0f} s; rows: {counts}")
        for kill in run["kills"]:
            vain = "" if kill["fetched_again"] is None else f", {kill['fetched_again']:,} images fetched in vain"
            first = f"first part {kill['first_rows_s']:.1f} s after the next start"
            lines.append(f"  killed at {kill['rows']:,} rows after {kill['seconds']:.0f} s{vain}; {first}")
        peaks = ", ".join(f"{name} {value:,.0f}" for name, value in run["memory_mb"].items())
        slopes = ", ".join(f"{name} {value:+.1f}" for name, value in run["memory_slope_mb_per_100k_images"].items())
        lines += [
            f"  images/s by tenth: {_rates(run)}",
            f"  peak MB: {peaks}",
            f"  MB per 100k images, second half of the {run['memory_slope_of']}: {slopes or 'too few samples'}",
            f"  nothing to do: {run['no_op_s']:.1f} s",
        ]
        if whole := run.get("uninterrupted"):
            seconds = f"{whole['images']:,} images in {whole['seconds']:.0f} s"
            lines += [
                f"  uninterrupted: {seconds}, by tenth {_rates(whole)}",
                f"  captions that differ from it: {whole['captions_that_differ']:,}",
            ]
    return "\n".join(lines)


def _rates(run: dict[str, Any]) -> str:
    return " ".join(f"{rate:.0f}" for rate in run["images_per_s_by_tenth"])


def main() -> None:
    """Prints the results; the last line is JSON. Ends with status 1 if a row is missing, doubled or different."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--inputs", nargs="+", choices=tuple(INPUTS), default=list(INPUTS))
    parser.add_argument(
        "--kills", nargs="*", type=float, default=list(KILLS), help="shares of the rows at which to kill; none: no kill"
    )
    parser.add_argument(
        "--uninterrupted",
        type=int,
        default=20_000,
        help="images of the undisturbed run to compare with; 0: no such run",
    )
    parser.add_argument("--set", action="append", default=[], help="setting for smallcap caption; repeatable")
    parser.add_argument("--work", type=Path, help="work folder, kept with the images; by default a temporary folder")
    parser.add_argument("--plot", type=Path, help="PNG file; the input's name is appended to its name")
    parser.add_argument("--json", type=Path, help="file for the results with all samples")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="smallcap-scale-") as temporary:
        options.work = (options.work or Path(temporary)).resolve()
        options.work.mkdir(parents=True, exist_ok=True)
        benchmark = Benchmark(options, make_tiny_model(options.work / "model"))
        good = True
        for name in options.inputs:
            say(f"{name}: making {options.images:,} images")
            with INPUTS[name](options.work, options.images) as image_input:
                good = benchmark.measure(image_input) and good
    print(table(benchmark.results))
    print(json.dumps({name: value for name, value in benchmark.results.items() if name != "series"}))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
