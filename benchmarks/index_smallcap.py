"""smallcap's side of the index benchmark, each step in a process of its own: `build` an index, `search` it.

    python -m benchmarks.index_smallcap build DUMP ENCODER OUT KEY THREADS ANSWER
    python -m benchmarks.index_smallcap search INDEX QUERIES K BATCHES SECONDS ANSWER

`benchmarks.index` runs both and watches their memory.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

_LEAST_CPUS = 4  # logical ones that Ray is told of, as jobs.cluster.session tells it on a small machine


def build(dump: str, encoder: str, out: str, key: str, threads: str) -> dict[str, Any]:
    """Builds an index as `smallcap build-index` does, and says how long each stage took."""
    import ray

    from index_builder.build import build_index
    from jobs.cluster.session import connect
    from jobs.cluster.tasks import RayRunner
    from smallcap.config import IndexConfig

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=max(_LEAST_CPUS, int(threads)), include_dashboard=False, log_to_driver=False)
    connect()
    config = IndexConfig(
        dumps=(dump,),
        out=out,
        encoder=f"hf:{encoder}",
        index_key=key,
        trust_embeddings=True,
        cache_dir=f"{out}.cache",
    )
    start = time.perf_counter()
    report = build_index(config, RayRunner())
    stop = time.perf_counter()
    manifest = report.manifest
    return {
        "start": start,
        "stop": stop,
        "stages_s": report.seconds,
        "index_key": manifest.index_key,
        "nprobe": manifest.nprobe,
        "k_factor": manifest.k_factor,
        "shards": len(manifest.shards),
        "shard_bytes": sum(entry.bytes for entry in manifest.shards),
        "vectors_bytes": sum(entry.bytes for entry in manifest.vectors),
        "captions_bytes": sum(entry.bytes for entry in manifest.captions),
        "recall": [entry.model_dump(mode="json") for entry in manifest.recall],
    }


def search(index: str, queries: str, k: str, batches: str, seconds: str) -> dict[str, Any]:
    """Searches an index as the captioner does; returns what it found, as rows of the dump, and its rates."""
    from benchmarks.index_data import caption_row
    from benchmarks.measuring import queries_per_s
    from smallcap.index.retriever import Retriever

    vectors = np.load(queries)
    retriever = Retriever.open(index, cache_dir=f"{index}.cache")
    found = [
        [caption_row(neighbour.text) for neighbour in neighbours]
        for start in range(0, len(vectors), 256)
        for neighbours in retriever.search(vectors[start : start + 256], 10)
    ]
    sizes = [int(size) for size in batches.split(",")]
    rates = queries_per_s(lambda batch: retriever.search(batch, int(k)), vectors, sizes, float(seconds))
    return {"found": found, "queries_per_s": rates}


def main() -> None:
    """Runs one step; the last argument names the file for its answer."""
    step, *arguments, answer = sys.argv[1:]
    result = {"build": build, "search": search}[step](*arguments)
    Path(answer).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
