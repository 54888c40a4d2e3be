"""Measures how long a stopped run takes to find what is left to do: listing its parts, reading footers, subtracting.

An output of N images is made in parts of 5,000 rows; one part in fifty is missing. A separate process lists the parts,
reads all footers (`read_part_infos`), and subtracts their row ranges from fragments of 256 rows, as a resumed run does.
The listing alone is what resuming would cost if the names of parts said what the footers say.

    python -m benchmarks.resume --images 10000000
    python -m benchmarks.resume --images 10000000 --s3 --work FOLDER

Files are on a local disk, or with `--s3` on an S3 server on this machine; most are in the kernel's cache.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from benchmarks.measuring import run_watched, say
from benchmarks.s3_server import serve_s3
from smallcap import storage
from smallcap.images.row_ranges import RowRanges
from smallcap.output.part_files import PartInfo, list_parts, read_part_infos, write_part
from smallcap.output.schema import STATUS_ERROR, STATUS_OK, caption_schema

FRAGMENT_ROWS = 256
SLICE_ROWS = 5000
_ONE_MISSING_IN = 50  # parts
_ERRORS = 0.01  # share of the rows


def make_output(out: str, images: int) -> None:
    """Writes the parts of a stopped run of `images` images."""
    schema = caption_schema("benchmark", "model", "index")
    rng = np.random.default_rng(0)
    for number, first in enumerate(range(0, images, SLICE_ROWS)):
        if number % _ONE_MISSING_IN == _ONE_MISSING_IN - 1:
            continue
        failed = rng.random(min(SLICE_ROWS, images - first)) < _ERRORS
        info = _part_info(np.arange(first, first + len(failed)), failed)
        write_part(out, f"part-000-{number:06d}.parquet", _make_rows(failed, rng, schema), info, schema)


def _make_rows(failed: np.ndarray, rng: np.random.Generator, schema: pa.Schema) -> pa.Table:
    """Returns rows whose ids are URLs of 60 characters."""
    digits = rng.bytes(len(failed) * 14).hex()
    names = (digits[start : start + 28] for start in range(0, len(digits), 28))
    columns = {field.name: pa.nulls(len(failed), field.type) for field in schema}
    columns["image_id"] = pa.array([f"https://images.example.org/{name[:2]}/{name[2:]}.jpg" for name in names])
    columns["caption"] = pc.if_else(pa.array(failed), None, "a dog on a beach")
    columns["status"] = pc.if_else(pa.array(failed), STATUS_ERROR, STATUS_OK)
    columns["error_code"] = pc.if_else(pa.array(failed), "not_found", None)
    return pa.table(columns)


def _part_info(positions: np.ndarray, failed: np.ndarray) -> PartInfo:
    """Returns what the footer says of a part whose rows have these positions in the list of work."""
    rows, failures = dict(_by_fragment(positions)), dict(_by_fragment(positions[failed]))
    ends = tuple(fragment for fragment, ranges in rows.items() if ranges.stop == FRAGMENT_ROWS)
    return PartInfo(rows, failures, ends, int((~failed).sum()), {"not_found": int(failed.sum())})


def _by_fragment(positions: np.ndarray) -> Iterator[tuple[int, RowRanges]]:
    fragments = positions // FRAGMENT_ROWS
    for fragment in np.unique(fragments).tolist():
        yield fragment, RowRanges.of(positions[fragments == fragment] % FRAGMENT_ROWS)


def find_left(out: str, images: int) -> dict[str, float]:
    """Finds the rows without a part; returns their number, and the wall and CPU time of each step."""
    figures: dict[str, float] = {}

    @contextmanager
    def measured(step: str) -> Iterator[None]:
        start, cpu_start = time.perf_counter(), time.process_time()
        yield
        figures[f"{step}_s"] = time.perf_counter() - start
        figures[f"{step}_cpu_s"] = time.process_time() - cpu_start

    storage.exists(out)  # opens the connection to a store
    with measured("list"):
        figures["parts"] = len(list_parts(out))
    done: dict[int, RowRanges] = {}
    with measured("read"):  # lists once more
        infos = [info for _, info in read_part_infos(out) if info is not None]
    with measured("subtract"):
        for info in infos:
            for fragment, ranges in info.rows.items():
                done[fragment] = done[fragment].union(ranges) if fragment in done else ranges
        left = 0
        for fragment in range(-(-images // FRAGMENT_ROWS)):
            rows = RowRanges.span(0, min(FRAGMENT_ROWS, images - fragment * FRAGMENT_ROWS))
            left += len(rows.subtract(done.get(fragment, RowRanges())))
    return figures | {"left": left}


def main() -> None:
    """Makes the output if it does not exist, measures, and prints JSON on the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000_000)
    parser.add_argument("--s3", action="store_true", help="keep the output on an S3 server on this machine")
    parser.add_argument("--work", type=Path, help="folder to keep the output in; an output that is there is used")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="smallcap-resume-") as temporary:
        work = options.work or Path(temporary)
        with serve_s3(work / "s3", "runs") if options.s3 else nullcontext():
            out = f"s3://runs/{options.images}" if options.s3 else str(work / str(options.images))
            if not list_parts(out):
                say(f"making an output of {options.images:,} images")
                make_output(out, options.images)
            arguments = {"out": out, "images": options.images}
            figures, peak = run_watched("benchmarks.resume:find_left", arguments, os.cpu_count() or 1)
    figures["memory_mb"] = peak.largest_own / 1e6
    print(", ".join(f"{name} {value:,.2f}" for name, value in figures.items()))
    print(json.dumps({"images": options.images, **figures}))


if __name__ == "__main__":
    main()
