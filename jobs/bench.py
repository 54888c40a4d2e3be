"""The benchmark of one machine, without Ray: `smallcap bench`."""

from __future__ import annotations

import torch

from jobs.terminal.call_options import BenchOptions
from smallcap import storage
from smallcap.benchmark.stages import BenchmarkOptions, BenchmarkResult, run_benchmark


def run(options: BenchOptions) -> BenchmarkResult:
    """Measures every stage and the whole loop, and writes the figures to a file if one is named."""
    chosen = options.model_dump(exclude={"json_file"})
    if options.device == "auto":
        chosen["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    result = run_benchmark(BenchmarkOptions(**chosen))
    if options.json_file:
        storage.write_bytes(options.json_file, (result.to_json() + "\n").encode())
    return result
