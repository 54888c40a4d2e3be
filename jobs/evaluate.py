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

from jobs.captioning.record import RunRecord, load_existing_run
from jobs.cluster.display import Activity, Display
from jobs.cluster.stopping import stoppable
from smallcap import storage
from smallcap.captions.rows import CaptionColumns
from smallcap.config import EvaluateConfig
from smallcap.evaluation.figures import evaluate_runs, expand_metrics
from smallcap.evaluation.references import References, load_references
from smallcap.evaluation.run_captions import COLUMNS, RunCaptions, collect_run
from smallcap.index.caption_store import read_texts
from smallcap.output.reading import read_captions
from smallcap.output.variant_runs import runs_in
from smallcap.phrasing import describe_count

_ROWS_AT_ONCE = 1_000


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluates one run, or compares several; docs/formats.md describes the result.

    Raises:
        ConfigError: A folder holds no run, no image has references, or pycocoevalcap is not installed.
        SchemaError: The references or the run's parts are malformed.
        RunError: A Java program or the storage fails.
        Stopped: A signal came; nothing is written.
    """
    columns = CaptionColumns(config.text_column, config.image_id_column)
    with stoppable("nothing is written") as signals, Display(signals) as display:
        with display.activity(f"Reading the references: {config.references}"):
            references = load_references(config.references, columns, config.split)
        paths = [run for path in config.runs for run in runs_in(path)]
        records = [load_existing_run(path) for path in paths]
        runs = []
        for path, record in zip(paths, records, strict=True):
            with display.activity(f"Reading {path}", "row", record.images.total) as activity:
                runs.append(collect_run(_tables(path, activity), references, path))
        datastore = read_texts(config.index) if config.index is not None else None
        metrics = expand_metrics(config.metrics)
        captions = describe_count(sum(len(run.captions) for run in runs), "caption")
        with display.activity(f"Scoring {captions}: {', '.join(metrics)}; {config.bootstrap:,} draws of the bootstrap"):
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
            for facts in zip(paths, records, runs, evaluation.runs, strict=True)
        ],
        **{name: getattr(evaluation, name) for name in ("images", "captions_per_image", "tokenizer", "unavailable")},
        "warnings": [*evaluation.warnings, *_warnings(paths, records), *_dropped(references)],
        "options": config.model_dump(mode="json", include={"index", "bootstrap", "seed"}),
    }
    if config.out is not None:
        storage.write_bytes(config.out, (json.dumps(result, indent=2) + "\n").encode())
    return result


def _tables(path: str, activity: Activity) -> Iterator[pa.RecordBatch]:
    """Yields a run's rows, and counts them when they have been taken."""
    for batch in read_captions(path, COLUMNS):
        for start in range(0, len(batch), _ROWS_AT_ONCE):
            rows = batch.slice(start, _ROWS_AT_ONCE)
            yield rows
            activity.done += len(rows)


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
    return [f"{references.where}: rows that are not references were left out: {counts}."] if counts else []


def _warnings(paths: list[str], records: list[RunRecord]) -> list[str]:
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
