"""What the tests of reports share: runs whose rows are given, with images that can be read, or not."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from jobs.captioning.record import Attempt, ImageCounts, RunRecord, write_run_record
from jobs.captioning.stage_report import Timeline
from smallcap import storage
from smallcap.config import CaptionConfig
from smallcap.evaluation.shared_words import measure_shared_words
from smallcap.images.row_ranges import RowRanges
from smallcap.options import load_config
from smallcap.output.part_files import PartInfo, write_part
from smallcap.output.schema import SHARED_WORDS_COLUMNS, caption_schema

Row = dict[str, Any]


def caption_row(name: str, caption: str, uri: str = "", score: float = 0.5, neighbours: Sequence[str] = ()) -> Row:
    """A row of a captioned image; its neighbours' scores fall from 0.9 on."""
    scored = [{"caption_id": n, "text": text, "score": 0.9 - n / 10} for n, text in enumerate(neighbours)]
    return {
        **{"image_id": name, "image_uri": uri or name, "width": 60, "height": 40, "caption": caption, "status": "ok"},
        **{"caption_logprob": -3.0, "caption_tokens": 5, "clip_score": score, "neighbours": scored, "alternatives": []},
    }


def error_row(name: str, code: str = "truncated", message: str = "The file ends early.") -> Row:
    """A row of an image that failed."""
    return {
        "image_id": name,
        "image_uri": name,
        "status": "error",
        "error_code": code,
        "error_message": message,
    }


def write_run(out: str, rows: Sequence[Row], kept: pa.Schema | None = None, **options: Any) -> str:
    """Writes a finished run with these rows in parts of a hundred; returns its folder."""
    schema = caption_schema("run", "model", "index", kept)
    for number, start in enumerate(range(0, len(rows), 100)):
        some = rows[start : start + 100]
        errors = Counter(row["error_code"] for row in some if row["status"] == "error")
        failed = [place for place, row in enumerate(some) if row["status"] == "error"]
        info = PartInfo(
            {number: RowRanges.of(np.arange(len(some)))},
            {number: RowRanges.of(np.array(failed))} if failed else {},
            (number,),
            len(some) - len(failed),
            dict(errors),
        )
        table = pa.Table.from_pylist(list(some), schema=schema)
        shared = measure_shared_words(table["caption"], table["neighbours"])
        for name in SHARED_WORDS_COLUMNS:
            table = table.set_column(table.column_names.index(name), name, getattr(shared, name))
        write_part(out, f"part-001-{number:06d}.parquet", table, info, schema)
    config = load_config(CaptionConfig, flags={"images": ["photos"], "index": "index", "model": "demo", "out": out})
    errors = Counter(row["error_code"] for row in rows if row["status"] == "error")
    counts = ImageCounts(
        total=len(rows), ok=len(rows) - errors.total(), error=errors.total(), errors_by_code=dict(errors)
    )
    timeline = Timeline(step_s=1, load=(30, 40, 10), caption=(0, 40, 40), write=(0, 0, 80))
    attempt = Attempt(
        token="token",
        started_at="2026-01-01T10:00:00+00:00",
        images=len(rows),
        seconds=20.0,
        actors=1,
        device="cpu",
        timeline=timeline,
    )
    record = RunRecord.new(config, "0123456789abcdef", "demo", model_id="demo@1234")
    changes = {"status": "complete", "images": counts, "attempts": (attempt,), **options}
    write_run_record(out, record.model_copy(update=changes))
    return out


def photo(width: int = 60, height: int = 40, colour: str = "teal", kind: str = "JPEG") -> bytes:
    """An image file of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, kind)
    return buffer.getvalue()


def noise(side: int, seed: int = 0) -> bytes:
    """An image file that cannot be compressed well."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_photos(folder: Path | str, count: int) -> list[str]:
    """Writes images of one colour each; returns their names."""
    names = [storage.join(str(folder), f"{number:04d}.jpg") for number in range(count)]
    for number, name in enumerate(names):
        storage.write_bytes(name, photo(colour=f"hsl({number * 37 % 360}, 60%, 50%)"))
    return names
