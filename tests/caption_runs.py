"""What the tests of captioning runs share: small images, configs of tiny models, and the rows of an output."""

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image

from smallcap import storage
from smallcap.config import CaptionConfig
from smallcap.options import load_config
from smallcap.output.part_files import list_parts


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((80, 60)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_images(folder: str, count: int) -> None:
    for number in range(count):
        storage.write_bytes(storage.join(folder, f"{number:03d}.jpg"), jpeg(number))


def config_for(images: str, index: str, model: Path, out: str, *sets: str) -> CaptionConfig:
    flags: dict[str, Any] = {"images": [images], "index": index, "model": str(model), "out": out}
    return load_config(CaptionConfig, flags=flags, sets=["compute.batch_size=8", "compute.dtype=float32", *sets])


def command_for(images: str, index: str, model: Path, out: str, *sets: str) -> list[str]:
    """A captioning command for a process of its own."""
    command = [sys.executable, "-m", "jobs.cli", "caption", images, "--index", index, "--model", str(model)]
    return [*command, "--out", out, *(argument for one in sets for argument in ("--set", one))]


def read_rows(out: str) -> pd.DataFrame:
    """All rows of a run, by image id."""
    tables = [pq.read_table(io.BytesIO(storage.read_bytes(part))).to_pandas() for part in list_parts(out)]
    return pd.concat(tables).set_index("image_id", drop=False).sort_index()


def rows_of(out: str) -> list[tuple[str, str, str]]:
    """Id, status and caption of all rows of a run, by image id."""
    rows = read_rows(out)
    return list(zip(rows.image_id, rows.status, rows.caption, strict=True))


def undisturbed_rows(config: CaptionConfig) -> list[tuple[str, str, str]]:
    """Runs a job in this process, and returns its rows."""
    from jobs import caption
    from tests.in_process_ray import in_process_ray

    with in_process_ray():
        caption.run(config)
    return rows_of(config.out)


class Killed(BaseException):
    """The process ends here."""


@contextmanager
def killed_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Ends the block before the `step`-th change of an output's parts and sidecars, counted from 0."""
    changes: list[str] = []

    def counted(change: Any) -> Any:
        def run(*arguments: Any) -> Any:
            name = str(arguments[-1] if change.__name__ == "move_in" else arguments[0])
            if "/part-" in name:
                if len(changes) == step:
                    raise Killed
                changes.append(name)
            return change(*arguments)

        return run

    with monkeypatch.context() as patch:
        for name in ("write_bytes", "move_in", "remove"):
            patch.setattr(storage, name, counted(getattr(storage, name)))
        yield changes
