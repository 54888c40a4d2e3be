"""Builds and searches indexes of made caption embeddings with smallcap and, on the same vectors and queries, autofaiss.

For each number of rows and each index key it measures the wall time by stage, the peak memory of the whole process
tree, bytes per vector, recall against brute force, and queries/s of `Retriever.search`. autofaiss chooses its key and
search parameters for the memory of smallcap's searched shard, and builds in that of smallcap's largest process. Then it
does both with its default memory. It is measured again at the smallest nprobe or efSearch that reaches smallcap's
recall, if one does. Both sides run on the same number of cores. `index_data` says what the vectors are.

    python -m benchmarks.index --rows 100000 1000000 --autofaiss-python AUTOFAISS-VENV/bin/python --json index.json

The comparison favours autofaiss. smallcap's rates include what a captioner needs: texts, exclusions and removals;
autofaiss's are those of its bare faiss index. smallcap's build starts from captions and embeddings and ends with a
published, verified and calibrated version; autofaiss's starts from the embeddings.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.index_data import DIM, RECALL_AT, MadeData, make_data, recall
from benchmarks.measuring import PeakMemory, run_watched, say
from benchmarks.tiny_models import make_tiny_clip
from smallcap.machine.description import describe_machine

K = 4
BATCH_SIZES = (1, 64, 1024)
KEYS = ("Flat", "IVF,SQfp16", "IVF,SQ8")


class Benchmark:
    """One run: its options, its work folder, and the results so far.

    Args:
        options: The parsed arguments.
        work: The work folder; its files are removed as soon as they are measured.
    """

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self._options, self._work = options, work
        self.results: dict[str, Any] = {"machine": describe_machine(options.threads), "runs": []}
        if options.go_on:
            self.results["runs"] = json.loads(options.json.read_bytes())["runs"]

    def run(self) -> None:
        """Measures everything, and stores the results after each step, so that a stopped run leaves its results."""
        encoder = make_tiny_clip(self._work / "clip", seed=0, dim=DIM)  # it embeds nothing: the dump has embeddings
        for rows in self._options.rows:
            say(f"{rows:,} rows: making vectors, queries and their exact neighbours")
            data = make_data(self._work / "data", rows, self._options.queries)
            smallcap_runs = [
                self._measured(rows, "smallcap", key) or self._add(rows, self._smallcap(data, key, encoder))
                for key in self._options.keys
            ]
            if self._options.autofaiss_python and rows <= self._options.autofaiss_rows:
                self._autofaiss(data, smallcap_runs)
            shutil.rmtree(data.folder)

    def _measured(self, rows: int, side: str, key: str) -> dict[str, Any] | None:
        """Returns the result that a stopped run has already measured; None if there is none."""
        wanted = (rows, side, key)
        return next((run for run in self.results["runs"] if (run["rows"], run["side"], run["key"]) == wanted), None)

    def _add(self, rows: int, result: dict[str, Any]) -> dict[str, Any]:
        self.results["runs"].append({"rows": rows, **result})
        if self._options.json:
            self._options.json.write_text(json.dumps(self.results, indent=2) + "\n")
        return result

    def _smallcap(self, data: MadeData, key: str, encoder: Path) -> dict[str, Any]:
        say(f"{data.rows:,} rows: smallcap {key}")
        out = self._work / "index"
        build = {"dump": str(data.folder), "encoder": str(encoder), "out": str(out), "key": key}
        built, peak = self._watch("index_smallcap:build", build | {"threads": self._options.threads})
        searched, search_peak = self._watch("index_smallcap:search", {"index": str(out), **self._searching(data)})
        result = {
            "side": "smallcap",
            "key": key,
            **built,
            "build_memory": asdict(peak),
            "search_memory": asdict(search_peak),
            "bytes_per_vector": {name: built[f"{name}_bytes"] / data.rows for name in ("shard", "vectors", "captions")},
            "recall_measured": {str(k): recall(np.array(searched["found"]), data.truth(), k) for k in RECALL_AT},
            "queries_per_s": searched["queries_per_s"],
        }
        for folder in (out, Path(f"{out}.cache")):
            shutil.rmtree(folder, ignore_errors=True)
        return result

    def _autofaiss(self, data: MadeData, smallcap_runs: Sequence[dict[str, Any]]) -> None:
        """Builds and searches each index that autofaiss chooses; an index chosen for several budgets is built once."""
        budgets = _budgets(smallcap_runs) if "equal" in self._options.autofaiss_memory else {}
        if "default" in self._options.autofaiss_memory:
            budgets["autofaiss's default"] = "default"
        wanted = list(dict.fromkeys(budgets.values()))
        chosen, _ = self._watch("index_autofaiss:choose", {"rows": data.rows, "dim": DIM, "budgets": wanted})
        self.results["machine"]["autofaiss"] = chosen["versions"]
        keys, threads = chosen["keys"], {"threads": self._options.threads}
        targets = list(dict.fromkeys(run["recall_measured"][str(K)] for run in smallcap_runs))
        build_memory = max(run["build_memory"]["largest_own"] for run in smallcap_runs)
        for key in dict.fromkeys(key for key in keys.values() if key):
            if self._measured(data.rows, "autofaiss", key):
                continue
            chosen_for = [name for name, budget in budgets.items() if keys[budget] == key]
            say(f"{data.rows:,} rows: autofaiss {key} (for {'; '.join(chosen_for)})")
            out = self._work / "autofaiss"
            budget = next(budget for budget in wanted if keys[budget] == key)
            build = {
                "embeddings": str(data.embeddings),
                "out": str(out),
                "budget": budget,
                "build_memory": build_memory,
            }
            built, peak = self._watch("index_autofaiss:build", build | threads)
            search = {"out": str(out), "truth": str(data.folder / "truth.npy"), "targets": targets}
            search |= self._searching(data) | threads
            searched, search_peak = self._watch("index_autofaiss:search", search)
            result = {
                "side": "autofaiss",
                "key": key,
                "chosen_for": chosen_for,
                "build_s": built["build_s"],
                "build_memory": asdict(peak),
                "search_memory": asdict(search_peak),
                "bytes_per_vector": {"index": built["index_bytes"] / data.rows},
            }
            self._add(data.rows, result | searched)
            shutil.rmtree(out)

    def _searching(self, data: MadeData) -> dict[str, Any]:
        """Returns the arguments that the searches of both sides share."""
        return {"queries": str(data.queries), "k": K, "batches": BATCH_SIZES, "seconds": self._options.seconds}

    def _watch(self, step: str, arguments: dict[str, Any]) -> tuple[Any, PeakMemory]:
        python = self._options.autofaiss_python if step.startswith("index_autofaiss") else sys.executable
        return run_watched(f"benchmarks.{step}", arguments, self._options.threads, python)


def _budgets(smallcap_runs: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Returns the bytes of smallcap's indexes by name, without and with the vectors that rank candidates again."""
    searched = {f"{run['key']}, searched shard": str(run["shard_bytes"]) for run in smallcap_runs}
    lossy = [run for run in smallcap_runs if run["vectors_bytes"]]
    return searched | {
        f"{run['key']}, with re-ranking vectors": str(run["shard_bytes"] + run["vectors_bytes"]) for run in lossy
    }


def table(results: dict[str, Any]) -> str:
    """Returns the results as text for people."""
    machine = results["machine"]
    lines = [", ".join(f"{name} {value}" for name, value in machine.items() if name != "autofaiss")]
    if "autofaiss" in machine:
        lines.append("compared with " + ", ".join(f"{name} {value}" for name, value in machine["autofaiss"].items()))
    lines.append(f"dim {DIM}, k = {K}; memory: the largest process and the sum of all, without mapped files")
    header = f"{'index':44} {'build':>8} {'largest':>8} {'sum':>8} {'B/vector':>9} {'recall@4':>9} {'@10':>7}"
    header += "".join(f" {f'q/s at {size}':>12}" for size in BATCH_SIZES)
    for rows in dict.fromkeys(run["rows"] for run in results["runs"]):
        lines += ["", f"{rows:,} rows", header]
        runs = [run for run in results["runs"] if run["rows"] == rows]
        for run in runs:
            lines += _smallcap_lines(run) if run["side"] == "smallcap" else _autofaiss_lines(run)
        lines += [_stage_line(run) for run in runs if run["side"] == "smallcap"]
    return "\n".join(lines)


def _smallcap_lines(run: dict[str, Any]) -> list[str]:
    size = run["bytes_per_vector"]
    nprobe = f", nprobe {run['nprobe']}" if run["nprobe"] else ""
    again = (
        f"{size['vectors']:,.0f} B/vector of vectors to rank {run['k_factor']} × k again, " if size["vectors"] else ""
    )
    reported = ", ".join(f"@{entry['k']} {entry['recall']:.4f}" for entry in run["recall"])
    return [
        _line(f"smallcap {run['index_key']}{nprobe}", run, size["shard"], run["recall_measured"], run["queries_per_s"]),
        f"    besides the shard {again}{size['captions']:,.0f} of captions; recall by the builder {reported}",
    ]


def _autofaiss_lines(run: dict[str, Any]) -> list[str]:
    chosen, size = run["own"], run["bytes_per_vector"]["index"]
    lines = [
        _line(f"autofaiss {run['key']}", run, size, chosen["recall"], chosen["queries_per_s"]),
        f"    {chosen['param'] or 'no parameter'}; chosen for: {'; '.join(run['chosen_for'])}",
    ]
    for target, reached in run["at_recall"].items():
        name = f"  at recall@4 {float(target):.4f}"
        if reached["reached"]:
            lines.append(_line(f"{name}: {reached['param']}", None, size, reached["recall"], reached["queries_per_s"]))
        else:
            most = reached["most"]
            lines.append(f"{name} not reached: {most['recall@4']:.4f} with {most['param'] or 'its only setting'}")
    return lines


def _line(
    name: str, build: dict[str, Any] | None, size: float, recalls: dict[str, float], rates: dict[str, float]
) -> str:
    built = " " * 27
    if build:
        largest, total = (build["build_memory"][f"{kind}_own"] / 1e9 for kind in ("largest", "sum"))
        built = f" {build['build_s']:6,.0f} s {largest:5.2f} GB {total:5.2f} GB"
    found = f" {size:9,.0f} {recalls['4']:9.4f} {recalls['10']:7.4f}"
    return f"{name:44}{built}{found}" + "".join(f" {rates[str(batch)]:12,.1f}" for batch in BATCH_SIZES)


def _stage_line(run: dict[str, Any]) -> str:
    stages = [f"{name} {seconds:.1f} s" for name, seconds in run["stages_s"].items() if seconds >= 0.1]
    return f"{run['index_key']} by stage: {', '.join(stages)}"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument(
        "--keys", nargs="+", default=list(KEYS), help="smallcap's index keys, as build-index --index-key takes them"
    )
    parser.add_argument("--queries", type=int, default=2048, help="number of queries; at least the largest batch, 1024")
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="least duration of each of the three rounds of a search"
    )
    parser.add_argument("--threads", type=int, default=2, help="cores that either side may use")
    parser.add_argument("--autofaiss-python", help="Python interpreter with autofaiss; see benchmarks/README.md")
    parser.add_argument(
        "--autofaiss-rows", type=int, default=10**9, help="leave autofaiss out above this number of rows"
    )
    parser.add_argument(
        "--autofaiss-memory",
        nargs="+",
        choices=("equal", "default"),
        default=["equal", "default"],
        help="memory that autofaiss may take: as much as smallcap's indexes, or its default",
    )
    parser.add_argument("--work", type=Path, help="folder for some GB of files (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="file for the results, written again after each step")
    parser.add_argument("--go-on", action="store_true", help="measure only what the file of --json lacks")
    options = parser.parse_args(arguments)
    if options.go_on and not (options.json and options.json.exists()):
        parser.error("--go-on needs --json with the results of a run that was stopped")
    if options.queries < max(BATCH_SIZES):
        parser.error(f"--queries must be at least {max(BATCH_SIZES)}")
    return options


def main() -> None:
    """Measures, prints the table, and the results as JSON on the last line."""
    options = parse_arguments()
    if options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.work, prefix="smallcap-index-benchmark-") as work:
        benchmark = Benchmark(options, Path(work))
        benchmark.run()
    print(table(benchmark.results))
    if not options.autofaiss_python:
        print("autofaiss is left out: no --autofaiss-python was given (benchmarks/README.md)")
    print(json.dumps(benchmark.results))


if __name__ == "__main__":
    main()
