"""Simulates what a run of a billion images keeps in its driver, and computes what its stores, disks and money take.

No image is fetched and no model runs. Lists of made URIs are listed as a run lists them; work lists of up to a billion
images are cut, matched with the footers of a stopped run's parts, and handed out; 10,000 fragments are in flight in the
crash guard; made vectors are assigned to the lists of an index that a billion captions would have. Each step is a
separate process whose memory is watched. Every figure of docs/scale.md is printed here.

    python -m benchmarks.billion --list 1000000 10000000 --cut 10000000 100000000 1000000000 --json billion.json

The longest list takes about 150 bytes of scratch disk for each image, and the longest cut about 2 KB of memory for each
fragment of 256 images.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.measuring import run_watched, say
from smallcap import storage
from smallcap.config import InputConfig
from smallcap.images import sorting
from smallcap.images.fragments import FRAGMENT_COLUMNS, FRAGMENT_ROWS, FragmentTable
from smallcap.images.listing import FILE_ROWS, make_work_list
from smallcap.images.work_list import WORK_FOLDER
from smallcap.machine.description import describe_machine
from smallcap.output.coverage import Coverage, is_settled, work_left
from smallcap.output.part_files import PartInfo, part_name

BILLION = 1_000_000_000
ROWS_PER_PART = 50_000  # of a run on GPUs
_LIST_ROWS = 1_000_000  # in one made list
_ONE_MISSING_IN = 50  # parts of the stopped run
_CORES = 2
_DIM = 512
_SAMPLE_VECTORS = 20_000
# Published prices, $; us-east-1, S3 Standard, without transfer within the region, which is free.
_PER_GET, _PER_PUT_OR_LIST, _PER_GB_MONTH = 0.0004 / 1000, 0.005 / 1000, 0.023
_GETS_PER_PREFIX_S = 5_500  # that S3 promises for one prefix
_LISTED_AT_ONCE = 1_000
_TAR_IMAGES, _READ_BYTES, _IMAGE_BYTES = 10_000, 16 << 20, 100_000
_OUTPUT_BYTES, _TEXT_BYTES = 150, 60  # of a row of the output (docs/cost.md), of a caption with its ids, compressed


@contextmanager
def _timed(figures: dict[str, Any], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    figures[f"{name}_s"] = time.perf_counter() - started


def write_lists(folder: str, images: int, in_order: bool) -> None:
    """Writes Parquet lists of URIs of 60 characters, in their order or in none."""
    Path(folder).mkdir()
    rng = np.random.default_rng(0)
    for number, first in enumerate(range(0, images, _LIST_ROWS)):
        rows = min(_LIST_ROWS, images - first)
        places = np.arange(first, first + rows) if in_order else rng.permutation(rows) * (images // rows) + number
        uris = pa.array(
            [f"https://images.example.org/{place:012d}/{place % 9973:011d}.jpg" for place in places.tolist()]
        )
        pq.write_table(pa.table({"image_uri": uris}), f"{folder}/{number:05d}.parquet", compression="zstd")


def list_images(lists: str, out: str, run_rows: int = sorting.RUN_ROWS) -> dict[str, Any]:
    """Makes a run's work list of lists of URIs; with short runs there are as many to merge as of a longer list."""
    sorting.RUN_ROWS = run_rows
    figures: dict[str, Any] = {"run_rows": run_rows}
    with _timed(figures, "list"):
        work = make_work_list([f"{lists}/{name.name}" for name in sorted(Path(lists).iterdir())], InputConfig(), out)
    stored = [path.stat().st_size for path in Path(out, WORK_FOLDER).iterdir()]
    return figures | {
        "images": work.images,
        "fragments": len(work.fragments),
        "bytes": sum(stored),
        "files": len(stored),
    }


def cut(images: int) -> dict[str, Any]:
    """Does what a run does that goes on: reads what parts say, finds what is left, and hands it out."""
    from jobs.captioning.load import task_inputs

    figures: dict[str, Any] = {"images": images}
    fragments = _made_fragments(images)
    buffer = pa.BufferOutputStream()
    pq.write_table(fragments.table, buffer, compression="zstd")
    figures |= {"fragments": len(fragments), "fragments_bytes": buffer.getvalue().size}
    footers = list(_made_footers(images))
    figures |= {"parts": len(footers), "footer_bytes": max(map(len, footers))}
    with _timed(figures, "read_footers"):
        parts = [(part_name(0, number), PartInfo.from_json(footer)) for number, footer in enumerate(footers)]
    with _timed(figures, "match"):
        coverage = Coverage(parts)
        assert is_settled(parts)
        left = len(list(work_left(fragments, coverage, None, lambda *_: 0)))
    del footers, parts, coverage
    with _timed(figures, "cut"):
        items = list(work_left(fragments, Coverage([]), None, lambda *_: 0))
    with _timed(figures, "hand_out"):
        inputs = task_inputs(items)
    return figures | {"left": left, "tasks": len(inputs), "handed_bytes": sum(table.nbytes for table in inputs)}


def _made_fragments(images: int) -> FragmentTable:
    count = -(-images // FRAGMENT_ROWS)
    numbers = np.arange(count)
    files = numbers // (FILE_ROWS // FRAGMENT_ROWS)
    names = pa.array([f"s3://bucket/run/_work/listing-000-images-{file:05d}.parquet" for file in range(files[-1] + 1)])
    rows = np.minimum(FRAGMENT_ROWS, images - numbers * FRAGMENT_ROWS)
    columns = [
        pa.array(["uris"]).take(pa.array(np.zeros(count, np.int64))),
        names.take(pa.array(files)),
        pa.array(numbers % (FILE_ROWS // FRAGMENT_ROWS), pa.int32()),
        pa.array(rows, pa.int32()),
        pa.array([""]).take(pa.array(np.zeros(count, np.int64))),
        pa.array(np.zeros(count, bool)),
    ]
    return FragmentTable(pa.table(columns, schema=FRAGMENT_COLUMNS))


def _made_footers(images: int) -> Iterator[str]:
    """Yields what the footers of a stopped run's parts say, as text."""
    for number, first in enumerate(range(0, images, ROWS_PER_PART)):
        if number % _ONE_MISSING_IN == _ONE_MISSING_IN - 1:
            continue
        stop = min(first + ROWS_PER_PART, images)
        fragments = range(first // FRAGMENT_ROWS, -(-stop // FRAGMENT_ROWS))
        rows = {
            fragment: [[max(first - fragment * FRAGMENT_ROWS, 0), min(stop - fragment * FRAGMENT_ROWS, FRAGMENT_ROWS)]]
            for fragment in fragments
        }
        whole = {"rows": rows, "failed": {}, "ends": fragments[:-1], "ok": stop - first, "errors": {}, "left_out": {}}
        yield json.dumps(whole, default=list, separators=(",", ":"))


def in_flight(fragments: int) -> dict[str, Any]:
    """Begins a batch of each fragment in the crash guard, and then clears them, as loading tasks do."""
    from jobs.captioning.crash_guard import CrashGuard

    figures: dict[str, Any] = {"in_flight": fragments}
    guard, rows = CrashGuard(), list(range(FRAGMENT_ROWS))
    with _timed(figures, "begin"):
        for fragment in range(fragments):
            guard.is_suspicious(fragment, rows)
            assert guard.begin(fragment, rows) == []
    with _timed(figures, "clear"):
        for fragment in range(fragments):
            guard.clear(fragment, rows)
    return figures | {"images_per_s": fragments * FRAGMENT_ROWS / (figures["begin_s"] + figures["clear_s"])}


def assign(nlist: int) -> dict[str, Any]:
    """Makes an index's graph of centroids, and assigns made vectors to lists, on one core."""
    import faiss

    from index_builder.shards.template import make_index

    faiss.omp_set_num_threads(1)
    figures: dict[str, Any] = {"nlist": nlist}
    rng = np.random.default_rng(0)
    index = make_index(f"IVF{nlist}{'_HNSW32' if nlist >= 32_768 else ''},SQ8", _DIM)  # as the plan names it
    centroids = rng.standard_normal((nlist, _DIM), np.float32)
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    with _timed(figures, "centroids"):
        index.quantizer.add(centroids)
    vectors = centroids[rng.integers(nlist, size=_SAMPLE_VECTORS)] + 0.02 * rng.standard_normal(
        (_SAMPLE_VECTORS, _DIM), np.float32
    )
    with _timed(figures, "assign"):
        index.quantizer.search(vectors, 1)
    return figures | {"vectors_per_s": _SAMPLE_VECTORS / figures["assign_s"]}


def plans() -> Iterator[str]:
    """Yields what the index's builder plans for up to a billion captions."""
    from index_builder.plan import bytes_per_vector, plan_index

    for rows in (10**6, 10**7, 10**8, BILLION):
        plan = plan_index(rows, _DIM, "auto", "auto")
        rank = 0 if plan.codec in ("float32", "float16") else 2 * _DIM
        disk = plan.serving_bytes + rows * (rank + _TEXT_BYTES)
        yield (
            f"index of {rows:,} captions: {plan.index_key}, {len(plan.shards):,} shards, "
            f"{bytes_per_vector(plan.index_key, _DIM):,} B/vector, {plan.serving_bytes / 1e9:,.1f} GB mapped, "
            f"{disk / 1e9:,.1f} GB on a node's disk, trained on {plan.training_rows:,} captions in "
            f"{plan.training_bytes / 1e9:,.1f} GB, a shard written in {plan.shard_bytes / 1e9:,.1f} GB"
        )


def requests() -> Iterator[str]:
    """Yields the requests of a run of a billion images, and what they cost at S3's published prices."""
    fragments, parts = -(-BILLION // FRAGMENT_ROWS), -(-BILLION // ROWS_PER_PART)
    tar_reads = BILLION // _TAR_IMAGES * -(-_TAR_IMAGES * _IMAGE_BYTES // _READ_BYTES)
    gets = {
        "images, each an object": BILLION,
        "images in tars": tar_reads,
        "fragments": 2 * fragments,
        "footers": parts,
    }
    for name, count in gets.items():
        yield f"GET of {name}: {count:,}, ${count * _PER_GET:,.2f}"
    puts = {
        "LIST of a billion objects": BILLION // _LISTED_AT_ONCE,
        "PUT of parts": parts,
        "PUT of the list": fragments // 256,
    }
    for name, count in puts.items():
        yield f"{name}: {count:,}, ${count * _PER_PUT_OR_LIST:,.2f}"
    for rate in (1_000, 10_000, 100_000):
        days = BILLION / rate / 86_400
        prefixes = -(-rate // _GETS_PER_PREFIX_S)
        yield f"{rate:,} images/s: {days:,.1f} days, {rate * _IMAGE_BYTES * 8 / 1e9:,.1f} Gbit/s, {prefixes} prefixes"
    size = BILLION * _OUTPUT_BYTES
    monthly = size / 1e9 * _PER_GB_MONTH
    yield f"output: {size / 1e9:,.0f} GB, ${monthly:,.2f} a month; {parts:,} parts of {size / parts / 1e6:,.1f} MB"


def main() -> None:
    """Runs the steps, and prints their figures; JSON on the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", type=int, nargs="*", default=[1_000_000], help="images of lists to make and list")
    parser.add_argument(
        "--cut", type=int, nargs="*", default=[10_000_000], help="images of work lists to cut and resume"
    )
    parser.add_argument("--in-flight", type=int, nargs="*", default=[10_000], help="fragments in flight")
    parser.add_argument("--nlist", type=int, nargs="*", default=[4_096, 65_536], help="lists to assign vectors to")
    parser.add_argument("--run-rows", type=int, default=50_000, help="rows of a run where many are to be merged")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    results: list[dict[str, Any]] = []

    def measure(step: str, **arguments: Any) -> None:
        say(f"{step} {arguments}")
        figures, peak = run_watched(f"benchmarks.billion:{step}", arguments, _CORES)
        figures |= {"step": step, "memory_mb": peak.largest_own / 1e6}
        results.append(figures)
        print(f"{step}: " + ", ".join(f"{name} {value:,.6g}" for name, value in figures.items() if name != "step"))
        if options.json:
            options.json.write_text(json.dumps({"machine": describe_machine(_CORES), "steps": results}, indent=2))

    for line in (*plans(), *requests()):
        print(line)
    for fragments in options.in_flight:
        measure("in_flight", fragments=fragments)
    for images in options.cut:
        measure("cut", images=images)
    for images in options.list:
        for in_order, run_rows in ((True, sorting.RUN_ROWS), (False, sorting.RUN_ROWS), (False, options.run_rows)):
            with storage.scratch_folder() as folder:
                write_lists(f"{folder}/lists", images, in_order)
                print(f"list of {images:,} images, {'in order' if in_order else 'in no order'}:")
                measure("list_images", lists=f"{folder}/lists", out=f"{folder}/out", run_rows=run_rows)
    for nlist in options.nlist:
        measure("assign", nlist=nlist)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
