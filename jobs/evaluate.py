"""Evaluates captioning runs against reference captions, and returns the figures as plain values.

Runs as `smallcap evaluate RUN… --references FILE`, or as `python -m jobs.evaluate …` with the same options. It does not
need Ray: the captions of a run fit into one process, and images are not read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from jobs.captioning.record import RunRecord, load_existing_run, read_parts
from smallcap import storage
from smallcap.captions.rows import CaptionColumns
from smallcap.config import EvaluateConfig
from smallcap.evaluation.figures import evaluate_runs, expand_metrics
from smallcap.evaluation.references import References, load_references
from smallcap.evaluation.run_captions import COLUMNS, RunCaptions, collect_run
from smallcap.index.caption_store import read_texts


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluates one run, or compares two; docs/formats.md describes the result.

    Raises:
        ConfigError: A folder holds no run, no image has references, or pycocoevalcap is not installed.
        SchemaError: The references or the run's parts are malformed.
        RunError: A Java program or the storage fails.
    """
    columns = CaptionColumns(config.text_column, config.image_id_column)
    references = load_references(config.references, columns, config.split)
    records = [load_existing_run(path) for path in config.runs]
    runs = [collect_run(_tables(path), references, path) for path in config.runs]
    datastore = read_texts(config.index) if config.index is not None else None
    metrics = expand_metrics(config.metrics)
    evaluation = evaluate_runs(runs, references, metrics, config.bootstrap, config.seed, datastore)
    result = {
        "references": {
            "uri": config.references,
            "split": config.split,
            "images": len(references.captions),
            "dropped": references.dropped,
        },
        "runs": [
            _describe_run(*facts, images=evaluation.images)
            for facts in zip(config.runs, records, runs, evaluation.runs, strict=True)
        ],
        "differences": {name: asdict(figure) for name, figure in evaluation.differences.items()},
        **{name: getattr(evaluation, name) for name in ("images", "captions_per_image", "tokenizer", "unavailable")},
        "warnings": [*evaluation.warnings, *_warnings(config.runs, records), *_dropped(references)],
        "options": config.model_dump(mode="json", include={"index", "bootstrap", "seed"}),
    }
    if config.out is not None:
        storage.write_bytes(config.out, (json.dumps(result, indent=2) + "\n").encode())
    return result


def _tables(path: str) -> Iterator[pa.Table]:
    return (table for _, table in read_parts(path, list(COLUMNS)))


def _describe_run(path: str, record: RunRecord, rows: RunCaptions, measured: Any, images: int) -> dict[str, Any]:
    return {
        "run": path,
        "run_id": record.run_id,
        "model_id": record.model_id,
        "index_id": record.index_id,
        "clip_score_encoder": record.retrieval_encoder,
        "rows": rows.rows,
        "errors": dict(sorted(rows.errors.items())),
        "without_references": rows.unmatched,
        "without_references_examples": rows.examples,
        "only_in_this_run": len(rows.captions) - images,
        **asdict(measured),
    }


def _dropped(references: References) -> list[str]:
    """Returns a warning that names the rows of the references that were left out, if there are any."""
    counts = ", ".join(f"{count} {reason}" for reason, count in sorted(references.dropped.items()))
    return [f"{references.where}: rows that are no reference were left out: {counts}."] if counts else []


def _warnings(paths: tuple[str, ...], records: list[RunRecord]) -> list[str]:
    """Returns reasons why the figures are doubtful or cannot be compared."""
    warnings = [
        f"{path} is not complete; the figures leave out its missing images."
        for path, record in zip(paths, records, strict=True)
        if record.status != "complete"
    ]
    if len({record.retrieval_encoder for record in records}) > 1:
        warnings.append("The CLIPScores of the runs come from different encoders and cannot be compared.")
    return warnings


if __name__ == "__main__":
    from jobs.cli import main

    main("evaluate")
