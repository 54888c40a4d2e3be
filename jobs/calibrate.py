"""Finds bounds for `smallcap filter` on a run whose images have reference captions.

Runs without Ray: the captions of a run with references fit into one process, and images are not read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from jobs.captioning.record import load_existing_run
from jobs.cluster.display import Display
from jobs.cluster.stopping import stoppable
from jobs.terminal.call_options import CalibrateOptions
from smallcap import storage
from smallcap.captions.rows import CaptionColumns
from smallcap.errors import ConfigError
from smallcap.evaluation.caption_metrics import score_captions
from smallcap.evaluation.references import References, load_references
from smallcap.evaluation.thresholds import SCORES, find_threshold
from smallcap.output.reading import read_captions
from smallcap.phrasing import describe_count

_LEAST_IMAGES = 100  # fewer have no bounds worth the name: half of them choose, half of them measure
_FLAGS = {
    "clip_score": "--min-clip-score",
    "copied_share": "--max-copied",
    "retrieval_score": "--min-retrieval-score",
    "neighbour_agreement": "--min-agreement",
}


def run(options: CalibrateOptions) -> dict[str, Any]:
    """Finds the bounds, and returns them with their worth; docs/formats.md describes the result.

    Raises:
        ConfigError: There is no run, too few of its images have references, or pycocoevalcap is not installed.
        SchemaError: The references or the run's parts are malformed.
        Stopped: A signal came; nothing is written.
    """
    columns = CaptionColumns(options.text_column, options.image_id_column)
    load_existing_run(options.run)
    with stoppable("nothing is written") as signals, Display(signals) as display:
        with display.activity(f"Reading the references: {options.references}"):
            references = load_references(options.references, columns, options.split)
        with display.activity(f"Reading {options.run}"):
            rows = _rows(options.run, references)
        with display.activity(f"Scoring {describe_count(len(rows), 'caption')}"):
            captions = {image: row["caption"] for image, row in rows.items()}
            quality = score_captions(captions, references.captions, ["cider"])["cider"].per_image
    known = [name for name in SCORES if any(row.get(name) is not None for row in rows.values())]
    found = {
        name: find_threshold(_values(rows, name), quality, SCORES[name], options.keep, options.bootstrap, options.seed)
        for name in known
    }
    result = {
        "run": options.run,
        "images": len(rows),
        "cider": sum(quality.values()) / len(quality),
        "keep": options.keep,
        "thresholds": {name: asdict(one) | {"pays": one.pays} for name, one in found.items()},
        "without_score": [name for name in SCORES if name not in known],
    }
    if options.out is not None:
        storage.write_bytes(options.out, (json.dumps(result, indent=2) + "\n").encode())
    return result


def _rows(run: str, references: References) -> dict[str, dict[str, Any]]:
    """Returns the captioned rows of images with references, by the image's name there.

    Raises:
        ConfigError: They are too few.
    """
    captions = read_captions(run, status="ok")
    names = [name for name in ("image_id", "caption", *SCORES) if name in captions.schema.names]
    rows = {image: row for row in captions.select(names).rows() if (image := references.find(row["image_id"]))}
    if len(rows) < _LEAST_IMAGES:
        raise ConfigError(
            "Too few captioned images have references.",
            where=references.where,
            expected=f"at least {_LEAST_IMAGES}",
            found=str(len(rows)),
            remedy="Caption more images that have references, and see that their ids are the references' file names.",
        )
    return rows


def _values(rows: dict[str, dict[str, Any]], name: str) -> dict[str, float]:
    return {image: float("nan") if row[name] is None else row[name] for image, row in rows.items()}


def describe(result: dict[str, Any]) -> Iterator[str]:
    """Yields lines for people."""
    yield f"{describe_count(result['images'], 'image')} with references, CIDEr {100 * result['cider']:.1f}."
    flags = []
    for name, found in result["thresholds"].items():
        if found["bound"] is None:
            yield f"{name}: no bound that accepts {result['keep']:.0%} leaves better captions."
            continue
        flag = f"{_FLAGS[name]} {found['bound']:.4g}"
        worth = f"CIDEr {100 * found['gain']:+.1f} [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"
        doubt = "" if found["pays"] else ", maybe by chance"
        yield f"{name}: {flag} accepts {found['accepted']:.0%}; {worth}{doubt}"
        flags += [flag] if found["pays"] else []
    for name in result["without_score"]:
        yield f"{name}: no caption of the run has it."
    yield "Bounds are found on one half of the images and measured on the other, each alone; intervals are of 95%."
    if flags:
        yield f"One of: {', '.join(flags)}"
