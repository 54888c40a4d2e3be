"""Evaluation of captioning runs against reference captions: reads both, and returns the figures as plain values.

Runs as `smallcap evaluate RUN… --references FILE`, or as `python -m jobs.evaluate …` with the same options. It needs no
Ray: a run's captions fit into one process, and its images are not looked at.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from index_builder.dumps.formats import FORMATS, Columns, read_rows
from jobs.captioning.record import RUN_FILE, RunRecord, load_run_record, read_parts
from smallcap import storage
from smallcap.config import EvaluateConfig
from smallcap.errors import ConfigError, SchemaError
from smallcap.evaluation.figures import Evaluation, evaluate_runs, expand_metrics
from smallcap.evaluation.references import References, group_references, parse_references
from smallcap.evaluation.run_captions import COLUMNS, RunCaptions, collect_run
from smallcap.index.caption_store import read_texts


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluates one run, or two side by side; see docs/formats.md for what comes back.

    Raises:
        ConfigError: A folder holds no run, no image has references, or pycocoevalcap is not installed.
        SchemaError: The references or the run's parts are malformed.
        RunError: A Java program or the storage fails.
    """
    references = load_references(config)
    records = [_load_record(path) for path in config.runs]
    runs = [collect_run(_tables(path), references, path) for path in config.runs]
    datastore = read_texts(config.index) if config.index is not None else None
    metrics = expand_metrics(config.metrics)
    evaluation = evaluate_runs(runs, references, metrics, config.bootstrap, config.seed, datastore)
    result = {
        "references": {"uri": config.references, "split": config.split, "images": len(references.captions)},
        "runs": [
            _describe_run(*facts, images=evaluation.images)
            for facts in zip(config.runs, records, runs, evaluation.runs, strict=True)
        ],
        "differences": {name: asdict(figure) for name, figure in evaluation.differences.items()},
        **_common_facts(evaluation),
        "warnings": [*evaluation.warnings, *_warnings(config.runs, records)],
        "options": config.model_dump(mode="json", include={"index", "bootstrap", "seed"}),
    }
    if config.out is not None:
        storage.write_bytes(config.out, (json.dumps(result, indent=2) + "\n").encode())
    return result


def load_references(config: EvaluateConfig) -> References:
    """Loads the reference captions of a JSON file or of a table.

    Raises:
        ConfigError: The file's suffix is of no known kind, or it lacks the split.
        SchemaError: Its content is malformed.
    """
    uri = config.references
    suffix = "." + uri.rpartition(".")[2].lower()
    if suffix not in FORMATS:
        raise ConfigError(
            "References of this kind are unknown.", where=uri, expected="a file ending in " + ", ".join(FORMATS)
        )
    if suffix == ".json":
        try:
            content = json.loads(storage.read_bytes(uri))
        except (ValueError, RecursionError) as error:
            raise SchemaError("This is not a JSON file.", where=uri, found=str(error)) from error
        return parse_references(content, uri, config.split)
    if config.split is not None:
        raise ConfigError(
            "A table of captions has no splits.", where=uri, found=config.split, remedy="Leave --split out."
        )
    return group_references(_table_rows(config), uri)


def _table_rows(config: EvaluateConfig) -> Iterator[tuple[str | None, str]]:
    """Yields the image id and the caption of each row."""
    uri = config.references
    with storage.local_file(uri) as path:
        for row in read_rows(path, uri, Columns(config.text_column, config.image_id_column)):
            if row.problem:
                raise SchemaError("A row of the references is malformed.", where=f"{uri}: line {row.line}")
            yield row.image_id, row.text


def _load_record(path: str) -> RunRecord:
    record = load_run_record(path)
    if record is None:
        raise ConfigError("There is no run in this folder.", where=path, expected=f"a folder with {RUN_FILE}")
    return record


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


def _common_facts(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "images": evaluation.images,
        "captions_per_image": evaluation.captions_per_image,
        "tokenizer": evaluation.tokenizer,
        "unavailable": evaluation.unavailable,
    }


def _warnings(paths: tuple[str, ...], records: list[RunRecord]) -> list[str]:
    """Returns what makes the runs' figures doubtful or incomparable."""
    warnings = [
        f"{path} is not complete; its missing images are not in the figures."
        for path, record in zip(paths, records, strict=True)
        if record.status != "complete"
    ]
    if len({record.retrieval_encoder for record in records}) > 1:
        warnings.append("The runs' CLIPScores come from different encoders and cannot be compared.")
    return warnings


if __name__ == "__main__":
    from jobs.cli import main

    main("evaluate")
