"""What the tests of training runs share: a folder of small images with captions, and configs of tiny models."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from caption_runs import jpeg

from smallcap.options import load_config
from smallcap.training.config import TrainConfig

NOUNS = ("dog", "bus", "cat", "boat")


def write_captioned_images(folder: Path, count: int) -> Path:
    """Writes `000.jpg` … and `captions.csv` with two captions for each; returns the CSV."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = ["image,caption"]
    for number in range(count):
        (folder / f"{number:03d}.jpg").write_bytes(jpeg(number))
        noun = NOUNS[number % len(NOUNS)]
        rows += [f"{number:03d}.jpg,a {noun} on the road", f"{number:03d}.jpg,the {noun} number {number}"]
    (folder / "captions.csv").write_text("\n".join(rows))
    return folder / "captions.csv"


def train_config(source: Path | str, index: str | None, model: Path, out: Path | str, *sets: str) -> TrainConfig:
    flags: dict[str, Any] = {"sources": [str(source)], "index": index, "model": str(model), "out": str(out)}
    defaults = ["optimizer.epochs=2", "optimizer.batch_size=8", "dtype=float32", "workers=1"]
    return load_config(TrainConfig, flags=flags, sets=[*defaults, *sets])


def loss_curve(out: Path | str) -> np.ndarray:
    """The losses of a run's log; its steps must be 1, 2, 3, …."""
    lines = [json.loads(line) for line in (Path(out) / "train_log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return np.array([line["loss"] for line in lines])
