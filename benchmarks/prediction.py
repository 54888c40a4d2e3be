"""Compares what a dry run says that a captioning run will take with what the run then takes, on this machine.

Each dry run and each run is a process of its own with a Ray of its own, and both are timed from the same place: the
call of the job, after Python has started. A ratio above 1 is a run that took longer than it was told.

    python -m benchmarks.prediction --images 48 600 2000
    python -m benchmarks.prediction --photos FOLDER-OF-PHOTOS --images 600 --real-size
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.job_data import demo_model, real_size_model, repeat_images
from benchmarks.measuring import run_watched, say
from smallcap.config import CaptionConfig
from smallcap.machine.description import describe_machine

_SCENES = Path(__file__).resolve().parents[1] / "demo" / "images"
_ACCEPTED = 0.3  # the most that a run may differ from its prediction


def predict(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the seconds that a dry run predicts, and its lines."""
    from jobs.captioning.plan import dry_run

    plan = dry_run(CaptionConfig.model_validate(config), "local")
    return {"seconds": plan.seconds, "start_s": plan.start_s, "lines": plan.lines()}


def run(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the seconds that a run takes."""
    began = time.perf_counter()
    from jobs import caption

    caption.run(CaptionConfig.model_validate(config), "local")
    return {"seconds": time.perf_counter() - began}


def compare(options: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Predicts and runs each number of images; prints the result of each to stderr as soon as it is there."""
    model = real_size_model(work) if options.real_size else demo_model(work)
    cores, found = os.cpu_count() or 1, []
    for number in options.images:
        images = repeat_images(options.photos, work / f"images-{number}", number)
        for turn in range(options.rounds):
            out = str(work / f"out-{number}-{turn}")
            config = {"images": [str(images)], "model": model.model, "index": model.index, "out": out}
            told, _ = run_watched("benchmarks.prediction:predict", {"config": config}, cores)
            took, _ = run_watched("benchmarks.prediction:run", {"config": config}, cores)
            ratio = took["seconds"] / told["seconds"]
            found.append({"images": number, "told_s": told["seconds"], "took_s": took["seconds"], "ratio": ratio})
            say("\n".join(told["lines"]))
            say(json.dumps(found[-1]))
    return found


def table(found: list[dict[str, Any]]) -> str:
    """Returns the comparison as text for people."""
    lines = [f"{'images':>9} {'told, s':>9} {'took, s':>9} {'ratio':>6}"]
    for row in found:
        verdict = "" if abs(row["ratio"] - 1) <= _ACCEPTED else f"  off by more than {_ACCEPTED:.0%}"
        lines.append(f"{row['images']:9,} {row['told_s']:9.1f} {row['took_s']:9.1f} {row['ratio']:6.2f}{verdict}")
    return "\n".join(lines)


def main() -> None:
    """Prints the comparison; the last line is JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[48, 600, 2000])
    parser.add_argument(
        "--photos", type=Path, default=_SCENES, help="folder of images to repeat; by default the demo's scenes"
    )
    parser.add_argument("--real-size", action="store_true", help="the published sizes with random weights")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for the JSON line")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="smallcap-prediction-") as work:
        found = compare(options, Path(work))
    print(table(found))
    line = {"machine": describe_machine(os.cpu_count() or 1), "runs": found}
    print(json.dumps(line))
    if options.json:
        options.json.write_text(json.dumps(line, indent=2) + "\n")


if __name__ == "__main__":
    main()
