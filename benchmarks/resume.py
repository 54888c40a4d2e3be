"""What it costs to find out what a stopped run has left to do: by footers, by ids, and by Ray Data's own checkpoint.

An output of N images is made in parts of 5,000 rows; one part in fifty is missing. Then, each in a process of its own:

- `footers`: all parts' footers are read (`read_part_infos`), and their row ranges taken from fragments of 256 rows.
  A resume costs this.
- `ids`: all ids in the parts are read, and the list of images anti-joined with them by pyarrow. This is what smallcap
  did before.
- `ray`: what `ray.data.checkpoint` does with the same ids: its manager loads, joins and sorts them, and one of its
  filter actors (a run has up to ten) takes them and filters the list. Its files hold nothing but ids, as Ray writes
  them. Ray's start is not counted.

    python -m benchmarks.resume --images 10000000

Files are on a local disk, and mostly in the kernel's cache. `CPU s` is the time of all processes, which a machine with
other work falsifies less than the wall's. Peaks are sampled: `process` is the largest process, `all` the sum, both of
what they allocate or share by Ray's object store.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.measuring import run_watched
from smallcap.images.row_ranges import RowRanges
from smallcap.output.part_files import PartInfo, list_parts, read_part_infos, write_part
from smallcap.output.schema import STATUS_ERROR, STATUS_OK, caption_schema

FRAGMENT_ROWS = 256
PART_ROWS = 5000
_ONE_MISSING_IN = 50  # parts
_ERRORS = 0.01  # share of the rows
_COMPARED = ("footers", "ids", "ray")
_MB = 1e6


def make_output(folder: Path, images: int) -> None:
    """Writes `out/`, `checkpoint/` (the same ids as Ray keeps them) and `list.parquet` (the ids of all images)."""
    (folder / "checkpoint").mkdir()
    schema = caption_schema("benchmark", "model", "index")
    rng = np.random.default_rng(0)
    list_schema = pa.schema([pa.field("image_id", pa.string())])
    with pq.ParquetWriter(folder / "list.parquet", list_schema, compression="zstd", use_dictionary=False) as writer:
        for number, first in enumerate(range(0, images, PART_ROWS)):
            ids = _make_ids(rng, min(PART_ROWS, images - first))
            writer.write_table(pa.table([ids], schema=list_schema))
            failed = rng.random(len(ids)) < _ERRORS
            if number % _ONE_MISSING_IN == _ONE_MISSING_IN - 1:
                continue
            table = _make_rows(ids, failed, schema)
            write_part(str(folder / "out"), f"part-000-{number:06d}.parquet", table, _info(first, failed), schema)
            pq.write_table(pa.table([ids], schema=list_schema), folder / "checkpoint" / f"{number:06d}.parquet")


def _make_ids(rng: np.random.Generator, count: int) -> pa.Array:
    """Returns URLs of 60 characters."""
    digits = rng.bytes(count * 14).hex()
    some = (digits[start : start + 28] for start in range(0, len(digits), 28))
    return pa.array([f"https://images.example.org/{one[:2]}/{one[2:]}.jpg" for one in some])


def _make_rows(ids: pa.Array, failed: np.ndarray, schema: pa.Schema) -> pa.Table:
    columns = {field.name: pa.nulls(len(ids), field.type) for field in schema}
    columns["image_id"] = ids
    columns["caption"] = pc.if_else(pa.array(failed), None, "a dog on a beach")
    columns["status"] = pc.if_else(pa.array(failed), STATUS_ERROR, STATUS_OK)
    columns["error_code"] = pc.if_else(pa.array(failed), "not_found", None)
    return pa.table(columns)


def _info(first: int, failed: np.ndarray) -> PartInfo:
    """Returns what a part holds whose rows follow each other in the list, as rows mostly do."""
    positions = np.arange(first, first + len(failed))
    rows = {fragment: RowRanges.of(inside) for fragment, inside in _by_fragment(positions)}
    failures = {fragment: RowRanges.of(inside) for fragment, inside in _by_fragment(positions[failed])}
    ends = tuple(fragment for fragment, ranges in rows.items() if ranges.contains(np.array([FRAGMENT_ROWS - 1]))[0])
    return PartInfo(rows, failures, ends, int((~failed).sum()), {"not_found": int(failed.sum())})


def _by_fragment(positions: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    fragments = positions // FRAGMENT_ROWS
    for fragment in np.unique(fragments).tolist():
        yield fragment, positions[fragments == fragment] % FRAGMENT_ROWS


def by_footers(folder: Path, images: int) -> dict[str, float]:
    """Measures what a resume costs: the footers, and the difference from the fragments."""
    start, cpu_before = time.perf_counter(), _cpu_s()
    done: dict[int, RowRanges] = {}
    for _, info in read_part_infos(str(folder / "out")):
        assert info is not None
        for fragment, ranges in info.rows.items():
            done[fragment] = done[fragment].union(ranges) if fragment in done else ranges
    read_s = time.perf_counter() - start
    left = {}
    for fragment in range(-(-images // FRAGMENT_ROWS)):
        rows = RowRanges.span(0, min(FRAGMENT_ROWS, images - fragment * FRAGMENT_ROWS))
        if missing := rows.subtract(done.get(fragment, RowRanges())):
            left[fragment] = missing
    total = time.perf_counter() - start
    return {"read_s": read_s, "total_s": total, "cpu_s": _cpu_s() - cpu_before, "left": sum(map(len, left.values()))}


def by_ids(folder: Path, images: int) -> dict[str, float]:
    """Measures the anti-join of the list with the ids in the parts."""
    start, cpu_before = time.perf_counter(), _cpu_s()
    tables = [pq.read_table(part, columns=["image_id"]) for part in list_parts(str(folder / "out"))]
    done = pa.concat_tables(tables)["image_id"]
    read_s = time.perf_counter() - start
    listed = pq.read_table(folder / "list.parquet")
    left = listed.filter(pc.invert(pc.is_in(listed["image_id"], value_set=done)))
    total = time.perf_counter() - start
    return {"read_s": read_s, "total_s": total, "cpu_s": _cpu_s() - cpu_before, "left": len(left)}


def by_ray(folder: Path, images: int) -> dict[str, float]:
    """Measures Ray Data's own manager of checkpoints, and one of its filters on the whole list."""
    import ray
    from ray.data import DataContext
    from ray.data.checkpoint import CheckpointConfig, IdColumnCheckpointManager, NumpyArrayBasedCheckpointFilter

    ray.init(num_cpus=os.cpu_count(), include_dashboard=False, object_store_memory=4 << 30)
    DataContext.get_current().enable_progress_bars = False
    config = CheckpointConfig("image_id", str(folder / "checkpoint"))

    @ray.remote
    class Filter:
        def __init__(self, loaded: list[Any]) -> None:
            self.filter = NumpyArrayBasedCheckpointFilter(config, loaded[0])

        def ready(self) -> None:
            pass

        def count_left(self) -> int:
            batches = pq.ParquetFile(folder / "list.parquet").iter_batches(PART_ROWS)
            blocks = (pa.Table.from_batches([batch]) for batch in batches)
            return sum(len(self.filter.filter_rows_for_block(block)) for block in blocks)

    start, cpu_before = time.perf_counter(), _cpu_s()
    manager = IdColumnCheckpointManager(checkpoint_config=config, data_context=DataContext.get_current())
    loaded, size = manager.load_checkpoint()
    manager_s = time.perf_counter() - start
    actor = Filter.remote([loaded])  # in a list, so that the filter gets the reference, as in a run
    ray.get(actor.ready.remote())
    read_s = time.perf_counter() - start
    left = ray.get(actor.count_left.remote())
    total = time.perf_counter() - start
    cpu_s = _cpu_s() - cpu_before
    ray.shutdown()
    return {"manager_s": manager_s, "read_s": read_s, "total_s": total, "cpu_s": cpu_s, "left": left, "bytes": size}


def _cpu_s() -> float:
    """Returns the CPU seconds of this process and all its descendants, those that have ended included."""
    ticks: dict[int, int] = {}
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()  # from the third on, `state`
        except OSError:  # it has ended meanwhile
            continue
        parents[int(folder.name)] = int(fields[1])
        ticks[int(folder.name)] = sum(map(int, fields[11:15]))  # utime, stime, and those of reaped children
    own = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in own} - own:
        own |= more
    return sum(ticks.get(pid, 0) for pid in own) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Makes the output, measures, and prints a table and, on the last line, JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000_000)
    parser.add_argument("--only", nargs="+", choices=_COMPARED, default=_COMPARED)
    parser.add_argument("--work", type=Path, help="keep the made output in this folder, or take it from there")
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "ANSWER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        way, answer = args.measure
        measured = {"footers": by_footers, "ids": by_ids, "ray": by_ray}[way](args.work, args.images)
        Path(answer).write_text(json.dumps(measured))
        return
    folder = args.work or Path(tempfile.mkdtemp(prefix="smallcap-resume-"))
    try:
        if not (folder / "list.parquet").exists():
            folder.mkdir(parents=True, exist_ok=True)
            make_output(folder, args.images)
        _compare(folder, args.images, args.only)
    finally:
        if args.work is None:
            shutil.rmtree(folder)


def _compare(folder: Path, images: int, ways: tuple[str, ...]) -> None:
    parts = list_parts(str(folder / "out"))
    print(f"{images:,} images, {len(parts):,} parts, {sum(Path(part).stat().st_size for part in parts) / _MB:,.0f} MB")
    print(f"{'way':10s}{'read s':>10s}{'total s':>10s}{'CPU s':>10s}{'process MB':>12s}{'all MB':>10s}{'left':>12s}")
    results = {}
    for way in ways:
        command = [sys.executable, "-m", "benchmarks.resume", "--images", str(images), "--work", str(folder)]
        measured, peak = run_watched([*command, "--measure", way], os.cpu_count() or 1)
        measured |= {"process_bytes": peak.largest_own, "all_bytes": peak.sum_own}
        results[way] = measured
        print(
            f"{way:10s}{measured['read_s']:10.1f}{measured['total_s']:10.1f}{measured['cpu_s']:10.1f}"
            f"{peak.largest_own / _MB:12,.0f}{peak.sum_own / _MB:10,.0f}{measured['left']:12,.0f}",
            flush=True,
        )
    assert len({measured["left"] for measured in results.values()}) == 1, "all must find the same images"
    print(json.dumps({"images": images, "parts": len(parts)} | results))


if __name__ == "__main__":
    main()
