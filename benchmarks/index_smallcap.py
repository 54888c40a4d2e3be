"""smallcap's side of the index benchmark: steps that `benchmarks.index` runs, each in a watched process."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from benchmarks.measuring import queries_per_s

_LEAST_CPUS = 4  # logical CPUs that Ray is told of, as jobs.cluster.session does on a small machine


def build(dump: str, encoder: str, out: str, key: str, threads: int) -> dict[str, Any]:
    """Builds an index as `smallcap build-index` does, and says how long each stage took."""
    import ray

    from index_builder.build import build_index
    from jobs.cluster.session import connect
    from jobs.cluster.tasks import RayRunner
    from smallcap.config import IndexConfig

    ray.init(num_cpus=max(_LEAST_CPUS, threads), include_dashboard=False, log_to_driver=False)
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
    report = build_index(config, RayRunner(config.out))
    seconds = time.perf_counter() - start
    manifest = report.manifest
    return {
        "build_s": seconds,
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


def search(index: str, queries: str, k: int, batches: list[int], seconds: float) -> dict[str, Any]:
    """Searches an index as the captioner does; returns the neighbours as rows of the dump, and the rates."""
    from benchmarks.index_data import caption_row
    from smallcap.index.retriever import Retriever

    vectors = np.load(queries)
    retriever = Retriever.open(index, cache_dir=f"{index}.cache")
    found = [
        [caption_row(neighbour.text) for neighbour in neighbours]
        for start in range(0, len(vectors), 256)
        for neighbours in retriever.search(vectors[start : start + 256], 10)
    ]
    rates = queries_per_s(lambda batch: retriever.search(batch, k), vectors, batches, seconds)
    return {"found": found, "queries_per_s": rates}
