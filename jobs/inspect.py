"""Describes an index or a run: its facts and sample rows, as plain values that print as JSON or as tables."""

from __future__ import annotations

from typing import Any

from jobs.captioning.record import RUN_FILE, load_existing_run, read_parts
from smallcap import storage
from smallcap.errors import ConfigError
from smallcap.index.caption_store import load_caption_sample
from smallcap.index.manifest import POINTER_FILE
from smallcap.output.part_files import list_parts
from smallcap.output.schema import CAPTION_COLUMNS

_MOST_SAMPLES = 10_000


def inspect_path(path: str, samples: int) -> dict[str, Any]:
    """Returns the facts of an index or a run; `kind` says which.

    Args:
        path: The folder or prefix of an index or a run.
        samples: The number of rows to show.

    Raises:
        ConfigError: The path is neither an index nor a run.
        RunError: The index or the run is malformed.
    """
    if storage.exists(storage.join(path, POINTER_FILE)):
        return _inspect_index(path, samples)
    if storage.exists(storage.join(path, RUN_FILE)):
        return _inspect_run(path, samples)
    raise ConfigError(
        "This is neither an index nor a run.", where=path, expected=f"a folder with {POINTER_FILE} or {RUN_FILE}"
    )


def _inspect_index(path: str, samples: int) -> dict[str, Any]:
    manifest, rows = load_caption_sample(path, min(samples, _MOST_SAMPLES))
    return {
        "kind": "index",
        "path": path,
        "ntotal": manifest.ntotal,
        "bytes": sum(entry.bytes for entry in manifest.files),
        "shards": len(manifest.shards),
        "removed": manifest.id_count - manifest.ntotal,
        "recall": {f"recall@{entry.k}": entry.recall for entry in manifest.recall},
        "recall_low": {f"recall@{entry.k}": entry.recall_low for entry in manifest.recall},
        "ceiling": {f"recall@{entry.k}": entry.ceiling for entry in manifest.recall},
        "queries": manifest.recall[0].queries if manifest.recall else None,
        "queries_per_s": max((entry.queries_per_s for entry in manifest.recall), default=None),
        **manifest.model_dump(
            mode="json",
            include={
                *("index_id", "index_key", "nlist", "nprobe", "k_factor", "codec", "dim", "metric", "encoder"),
                *("recall_target", "recall_queries", "operation", "parents", "dropped", "sources", "created_at"),
            },
        ),
        "samples": [{"caption_id": row.caption_id, "text": row.text, "image_id": list(row.image_ids)} for row in rows],
    }


def _inspect_run(path: str, samples: int) -> dict[str, Any]:
    record = load_existing_run(path)
    rows: list[dict[str, Any]] = []
    for _, table in read_parts(path, CAPTION_COLUMNS.names):
        rows += table.slice(0, samples - len(rows)).to_pylist()
        if len(rows) >= samples:
            break
    return {
        "kind": "run",
        "path": path,
        "parts": len(list_parts(path)),
        **record.model_dump(mode="json"),
        "samples": rows,
    }
