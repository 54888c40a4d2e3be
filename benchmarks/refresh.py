"""Compares a refresh with a full run, by the share of the images whose retrieved captions change.

A run with saved embeddings is made once, over random crops of the demo's images, with the demo's model or with one
of published sizes whose weights are random. For each share, rare captions are removed from a copy of the index until so
many images had one of them in their prompts. Then two commands are timed with that index, from call to end, with the
start of Ray and model: `smallcap refresh` and `smallcap caption`.

    python -m benchmarks.refresh --images 10000
    python -m benchmarks.refresh --images 500 --shares 0.1
    python -m benchmarks.refresh --real-size --max-new-tokens 12 --shares 0.01

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from benchmarks.job_data import demo_model, real_size_model
from benchmarks.measuring import say, smallcap
from smallcap.model.files import demo_folder
from smallcap.output.reading import read_captions

_SHARES = (0.01, 0.1, 0.5)


def write_crops(folder: Path, images: int) -> None:
    """Writes different images: random crops of the demo's scenes, some of them mirrored."""
    folder.mkdir()
    scenes = sorted((demo_folder() / "images").glob("*.jpg"))
    draw = random.Random(0)
    for number in range(images):
        with Image.open(scenes[number % len(scenes)]) as scene:
            size = draw.uniform(0.6, 1.0)
            width, height = (max(1, int(side * size)) for side in scene.size)
            left, top = (draw.randint(0, whole - part) for whole, part in zip(scene.size, (width, height), strict=True))
            crop = scene.crop((left, top, left + width, top + height))
        (ImageOps.mirror(crop) if draw.random() < 0.5 else crop).save(folder / f"{number:06d}.jpg", quality=90)


def choose_texts(run: str, share: float) -> tuple[list[str], float]:
    """Chooses captions that a share of the images had in their prompts; returns them, and the share that they reach."""
    prompts = [[one["text"] for one in row["neighbours"]] for row in read_captions(run, ["neighbours"]).rows()]
    holders: dict[str, set[int]] = {}
    for image, texts in enumerate(prompts):
        for text in texts:
            holders.setdefault(text, set()).add(image)
    texts, touched = [], set[int]()
    for text in sorted(holders, key=lambda text: (len(holders[text]), text)):
        if len(touched) >= share * len(prompts):
            break
        texts.append(text)
        touched |= holders[text]
    return texts, len(touched) / len(prompts)


def measure(work: Path, old: str, caption: Sequence[str], index: str, share: float) -> dict[str, Any]:
    """Removes captions, refreshes, and captions everything; returns the figures."""
    folder = work / f"share-{share:g}"
    shutil.copytree(index, folder / "index")
    texts, reached = choose_texts(old, share)
    (folder / "texts.txt").write_text("\n".join(texts))
    new = str(folder / "index")
    smallcap("build-index", "--out", new, "--remove", f"text=@{folder / 'texts.txt'}", "--address", "local")
    refreshed = smallcap("refresh", old, "--index", new, "--out", str(folder / "refreshed"), "--address", "local")
    full = smallcap(*caption, "--index", new, "--out", str(folder / "full"))
    record = json.loads((folder / "refreshed" / "_run.json").read_text())
    return {
        "share": share,
        "share_reached": reached,
        "captioned_again": record["attempts"][-1]["images"] if len(record["attempts"]) > 1 else 0,
        "changed_captions": record["refreshed"]["changed_captions"],
        "refresh_seconds": refreshed,
        "full_seconds": full,
        "times_cheaper": full / refreshed,
    }


def main() -> None:
    """Makes the old run, measures each share, and prints JSON on the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--shares", type=float, nargs="+", default=_SHARES)
    parser.add_argument("--dtype", default="auto", help="the precision; in float32 both give the same captions")
    parser.add_argument("--real-size", action="store_true", help="a model of published sizes with random weights")
    parser.add_argument("--max-new-tokens", type=int, default=25, help="the most tokens of a caption")
    parser.add_argument("--work", type=Path, help="folder that does not exist yet, to keep what is made")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="smallcap-refresh-") as temporary:
        work = options.work or Path(temporary) / "work"
        work.mkdir()
        write_crops(work / "images", options.images)
        data = real_size_model(work) if options.real_size else demo_model(work)
        caption = ["caption", str(work / "images"), "--model", data.model, "--save-embeddings", "--address", "local"]
        caption += ["--dtype", options.dtype, "--max-new-tokens", str(options.max_new_tokens)]
        old = str(work / "old")
        say(f"captioning {options.images:,} images for the run to refresh")
        smallcap(*caption, "--index", data.index, "--out", old)
        results = []
        for share in options.shares:
            say(f"refreshing {share:.0%}")
            results.append(measure(work, old, caption, data.index, share))
    for result in results:
        print(", ".join(f"{name} {value:,.2f}" for name, value in result.items()))
    print(json.dumps({"images": options.images, "results": results}))


if __name__ == "__main__":
    main()
