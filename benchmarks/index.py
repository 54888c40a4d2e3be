"""Builds and searches indexes of made caption embeddings, beside autofaiss on the same vectors and the same queries.

For each number of rows and each index key: wall time by stage, peak memory of the whole process tree, bytes per vector,
recall against brute force, and queries/s of `Retriever.search`. autofaiss chooses its own key and search parameters for
the memory that smallcap's searched shard takes, and builds in that of smallcap's largest process; and once more with
its default memory. It is also measured at the least nprobe or efSearch that reaches smallcap's recall, where there is
one. Both sides run on the same number of cores. What the vectors are is in `index_data`.

    python -m benchmarks.index --rows 100000 1000000 --autofaiss-python AUTOFAISS-VENV/bin/python --json index.json

smallcap's rates include what a captioner needs: the texts, and exclusions and removals where there are any; autofaiss's
are those of its bare faiss index. smallcap's build starts from captions and embeddings and ends with a published,
verified and calibrated version; autofaiss's starts from the embeddings. So the comparison is rather against smallcap.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.index_data import DIM, RECALL_AT, MadeData, make_data, make_encoder, recall
from benchmarks.measuring import PeakMemory, run_watched
from smallcap.machine.description import describe_machine

K = 4
BATCH_SIZES = (1, 64, 1024)
KEYS = ("Flat", "IVF,SQfp16", "IVF,SQ8")
_ROOT = Path(__file__).resolve().parents[1]


class Benchmark:
    """One run: options, a folder to work in, and the results so far.

    Args:
        options: The parsed arguments.
        work: A folder; what lies there is removed as soon as it is measured.
    """

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self._options, self._work = options, work
        self.results: dict[str, Any] = {"machine": describe_machine(options.threads), "runs": []}
        if options.go_on:
            self.results["runs"] = json.loads(options.json.read_bytes())["runs"]

    def run(self) -> None:
        """Measures everything, writing the results again after each step: a long run that is stopped leaves some."""
        encoder = make_encoder(self._work / "clip")
        for rows in self._options.rows:
            _say(f"{rows:,} rows: making vectors, queries and their exact neighbours")
            data = make_data(self._work / "data", rows, self._options.queries)
            ours = [
                self._measured(rows, "smallcap", key) or self._add(rows, self._smallcap(data, key, encoder))
                for key in self._options.keys
            ]
            if self._options.autofaiss_python and rows <= self._options.autofaiss_rows:
                self._autofaiss(data, ours)
            shutil.rmtree(data.folder)

    def _measured(self, rows: int, side: str, key: str) -> dict[str, Any] | None:
        """Returns what a run that is gone on with has measured already."""
        wanted = (rows, side, key)
        return next((run for run in self.results["runs"] if (run["rows"], run["side"], run["key"]) == wanted), None)

    def _add(self, rows: int, result: dict[str, Any]) -> dict[str, Any]:
        self.results["runs"].append({"rows": rows, **result})
        if self._options.json:
            self._options.json.write_text(json.dumps(self.results, indent=2) + "\n")
        return result

    def _smallcap(self, data: MadeData, key: str, encoder: Path) -> dict[str, Any]:
        _say(f"{data.rows:,} rows: smallcap {key}")
        out = self._work / "index"
        module = [sys.executable, "-m", "benchmarks.index_smallcap"]
        arguments = [str(data.folder), str(encoder), str(out), key, str(self._options.threads)]
        built, peak = self._watch([*module, "build", *arguments])
        sizes = ",".join(map(str, BATCH_SIZES))
        arguments = [str(out), str(data.queries), str(K), sizes, str(self._options.seconds)]
        searched, search_peak = self._watch([*module, "search", *arguments])
        found = np.array(searched.pop("found"))
        result = {
            "side": "smallcap",
            "key": key,
            **built,
            "build_s": built["stop"] - built["start"],
            "stages": _by_stage(built, peak),
            "build_memory": _summary(peak),
            "search_memory": _summary(search_peak),
            "bytes_per_vector": {name: built[f"{name}_bytes"] / data.rows for name in ("shard", "vectors", "captions")},
            "recall_measured": {str(at): recall(found, data.truth(), at) for at in RECALL_AT},
            "queries_per_s": searched["queries_per_s"],
        }
        for name in ("start", "stop", "stages_s"):
            del result[name]
        for folder in (out, Path(f"{out}.cache")):
            shutil.rmtree(folder, ignore_errors=True)
        return result

    def _autofaiss(self, data: MadeData, ours: Sequence[dict[str, Any]]) -> None:
        """Builds each index that autofaiss chooses for some memory once, and searches it for all that it stands by."""
        budgets = _budgets(ours) if "equal" in self._options.autofaiss_memory else {}
        if "default" in self._options.autofaiss_memory:
            budgets["autofaiss's default"] = "default"
        module = [self._options.autofaiss_python, "-m", "benchmarks.index_autofaiss"]
        wanted = list(dict.fromkeys(budgets.values()))
        chosen, _ = self._watch([*module, "choose", str(data.rows), str(DIM), ",".join(wanted)])
        self.results["machine"]["autofaiss"] = chosen["versions"]
        keys = chosen["keys"]
        targets = ",".join(dict.fromkeys(str(run["recall_measured"][str(K)]) for run in ours))
        build_memory = str(max(run["build_memory"]["largest_bytes"] for run in ours))
        threads, sizes = str(self._options.threads), ",".join(map(str, BATCH_SIZES))
        for key in dict.fromkeys(key for key in keys.values() if key):
            if self._measured(data.rows, "autofaiss", key):
                continue
            stands_by = [name for name, budget in budgets.items() if keys[budget] == key]
            _say(f"{data.rows:,} rows: autofaiss {key} (for {'; '.join(stands_by)})")
            out = self._work / "autofaiss"
            budget = next(budget for budget in wanted if keys[budget] == key)
            built, peak = self._watch([*module, "build", str(data.embeddings), str(out), budget, build_memory, threads])
            arguments = [str(out), str(data.queries), str(K), sizes, str(self._options.seconds), threads]
            truth = str(data.folder / "truth.npy")
            searched, search_peak = self._watch([*module, "search", *arguments, truth, targets])
            self._add(
                data.rows,
                {
                    "side": "autofaiss",
                    "key": key,
                    "chosen_for": stands_by,
                    "build_s": built["stop"] - built["start"],
                    "build_memory": _summary(peak),
                    "search_memory": _summary(search_peak),
                    "bytes_per_vector": {"index": built["index_bytes"] / data.rows},
                    **searched,
                },
            )
            shutil.rmtree(out)

    def _watch(self, command: Sequence[str]) -> tuple[Any, PeakMemory]:
        return run_watched(command, self._options.threads, {"PYTHONPATH": str(_ROOT)})


def _budgets(ours: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Returns what smallcap's indexes take, in bytes, by what it is: without and with the vectors that rank again."""
    searched = {f"{run['key']}, searched shard": str(run["shard_bytes"]) for run in ours}
    lossy = [run for run in ours if run["vectors_bytes"]]
    return searched | {
        f"{run['key']}, re-ranking vectors too": str(run["shard_bytes"] + run["vectors_bytes"]) for run in lossy
    }


def _by_stage(built: dict[str, Any], peak: PeakMemory) -> list[dict[str, Any]]:
    """Returns each stage's seconds and peaks; the stages follow each other without gaps, the last ends the build."""
    stages: list[dict[str, Any]] = []
    stop = built["stop"]
    for name, seconds in reversed(built["stages_s"].items()):
        largest, total = peak.between(stop - seconds, stop)
        stages.insert(0, {"stage": name, "seconds": seconds, "largest_bytes": largest, "sum_bytes": total})
        stop -= seconds
    return stages


def _summary(peak: PeakMemory) -> dict[str, int]:
    return {
        "largest_bytes": peak.largest_own,
        "sum_bytes": peak.sum_own,
        "largest_resident_bytes": peak.largest_resident,
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def table(results: dict[str, Any]) -> str:
    """Returns the results for people."""
    machine = results["machine"]
    lines = [", ".join(f"{name} {value}" for name, value in machine.items() if name != "autofaiss")]
    if "autofaiss" in machine:
        lines.append("beside " + ", ".join(f"{name} {value}" for name, value in machine["autofaiss"].items()))
    lines.append(f"dim {DIM}, k = {K}; memory: the largest process and the sum of all, without mapped files")
    header = f"{'index':44} {'build':>8} {'largest':>8} {'sum':>8} {'B/vector':>9} {'recall@4':>9} {'@10':>7}"
    header += "".join(f" {f'q/s at {size}':>12}" for size in BATCH_SIZES)
    for rows in dict.fromkeys(run["rows"] for run in results["runs"]):
        lines += ["", f"{rows:,} rows", header]
        runs = [run for run in results["runs"] if run["rows"] == rows]
        for run in runs:
            lines += _smallcap_lines(run) if run["side"] == "smallcap" else _autofaiss_lines(run)
        for run in runs:
            lines += _stage_lines(run) if run["side"] == "smallcap" else []
    return "\n".join(lines)


def _smallcap_lines(run: dict[str, Any]) -> list[str]:
    recalls, apart = run["recall_measured"], run["bytes_per_vector"]
    searched = f", nprobe {run['nprobe']}" if run["nprobe"] else ""
    name = f"smallcap {run['index_key']}{searched}"
    own = ", ".join(f"@{entry['k']} {entry['recall']:.4f}" for entry in run["recall"])
    again = (
        f"{apart['vectors']:,.0f} B/vector of vectors to rank {run['k_factor']} × k again, " if apart["vectors"] else ""
    )
    return [
        _line(name, run, apart["shard"], recalls, run["queries_per_s"]),
        f"    beside the shard {again}{apart['captions']:,.0f} of captions; the builder's own recall {own}",
    ]


def _autofaiss_lines(run: dict[str, Any]) -> list[str]:
    own, size = run["own"], run["bytes_per_vector"]["index"]
    lines = [
        _line(f"autofaiss {run['key']}", run, size, own["recall"], own["queries_per_s"]),
        f"    {own['param'] or 'no parameter'}; chosen for: {'; '.join(run['chosen_for'])}",
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
        memory = build["build_memory"]
        built = (
            f" {build['build_s']:6,.0f} s {memory['largest_bytes'] / 1e9:5.2f} GB {memory['sum_bytes'] / 1e9:5.2f} GB"
        )
    found = f" {size:9,.0f} {recalls['4']:9.4f} {recalls['10']:7.4f}"
    return f"{name:44}{built}{found}" + "".join(f" {rates[str(batch)]:12,.1f}" for batch in BATCH_SIZES)


def _stage_lines(run: dict[str, Any]) -> list[str]:
    stages = (
        f"{stage['stage']} {stage['seconds']:.1f} s {stage['largest_bytes'] / 1e9:.2f} GB"
        for stage in run["stages"]
        if stage["seconds"] >= 0.1
    )
    return [f"{run['index_key']} by stage (largest process): {', '.join(stages)}"]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--keys", nargs="+", default=list(KEYS), help="smallcap's, as of build-index --index-key")
    parser.add_argument("--queries", type=int, default=2048, help="at least the largest batch, 1024")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each of the three rounds of a search")
    parser.add_argument("--threads", type=int, default=2, help="cores that either side may use")
    parser.add_argument("--autofaiss-python", help="an interpreter that has autofaiss; see benchmarks/README.md")
    parser.add_argument("--autofaiss-rows", type=int, default=10**9, help="leave autofaiss out above this many rows")
    parser.add_argument(
        "--autofaiss-memory",
        nargs="+",
        choices=("equal", "default"),
        default=["equal", "default"],
        help="what autofaiss may take: what smallcap's indexes take, and what it takes when it is not told",
    )
    parser.add_argument("--work", type=Path, help="folder for some GB of files; by default a temporary one")
    parser.add_argument("--json", type=Path, help="file for the results, written anew after each step")
    parser.add_argument("--go-on", action="store_true", help="measure what the file of --json does not have yet")
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
