"""Compares captioning in two ways in one pass (`--variant`) with two runs, one after the other, on the same images.

Both are commands as a person gives them, each with a Ray of its own, and the demo's model. CPU time is that of a
command and of all processes below it. The rounds take turns; a ratio below 1 is what one pass saves.

    python -m benchmarks.variants --images 600
    python -m benchmarks.variants --images 600 --photos FOLDER-OF-PHOTOS

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

from benchmarks.job_data import demo_model, repeat_images
from benchmarks.measuring import say
from benchmarks.start import Figures, measure_command
from smallcap.machine.description import describe_machine
from smallcap.model.files import demo_folder

_ROOT = Path(__file__).resolve().parents[1]
_WAYS = {"four": 4, "two": 2}  # neighbours in the prompt


def measure(options: argparse.Namespace, work: Path) -> list[dict[str, Figures]]:
    """Returns the figures of one pass and of two runs, for each round."""
    model = demo_model(work)
    images = str(repeat_images(options.photos, work / "images", options.images))
    caption = ["caption", images, "--index", model.index, "--model", model.model, "--address", "local"]
    variants = [word for name, k in _WAYS.items() for word in ("--variant", f"{name}:k={k}")]
    rounds = []
    for number in range(options.rounds):
        together = measure_command([*caption, *variants, "--out", str(work / f"together-{number}")], _ROOT)
        apart: Figures = {}
        for name, k in _WAYS.items():
            alone = measure_command([*caption, "--k", str(k), "--out", str(work / f"{name}-{number}")], _ROOT)
            apart = {figure: apart.get(figure, 0.0) + value for figure, value in alone.items()}
        rounds.append({"one pass": together, "two runs": apart})
        say(f"round {number}: {json.dumps(rounds[-1])}")
    return rounds


def main() -> None:
    """Prints the round with the least CPU time of each; the last line is JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--photos", type=Path, default=demo_folder() / "images", help="folder of images to repeat")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="smallcap-variants-") as work:
        rounds = measure(options, Path(work))
    least = {way: {figure: min(one[way][figure] for one in rounds) for figure in ("s", "cpu_s")} for way in rounds[0]}
    for figure, name in (("s", "on the clock"), ("cpu_s", "of CPU time")):
        one, two = (least[way][figure] for way in ("one pass", "two runs"))
        print(f"one pass {one:.1f} s, two runs {two:.1f} s {name}: ratio {one / two:.2f}")
    print(json.dumps({"machine": describe_machine(os.cpu_count() or 1), "images": options.images, "least": least}))


if __name__ == "__main__":
    main()
