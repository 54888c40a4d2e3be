"""`smallcap filter`: rows whose scores are good enough, the others counted, and a file that is whole or not there."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from jobs.cli import app
from jobs.filter import run
from jobs.terminal.call_options import FilterOptions
from smallcap import storage
from smallcap.errors import ConfigError, SchemaError
from smallcap.images.row_ranges import RowRanges
from smallcap.output import accepting
from smallcap.output.part_files import PartInfo, write_part
from smallcap.output.schema import caption_schema

GOLDEN = Path(__file__).parents[1] / "golden" / "run_v1"
BOUNDS: dict[str, Any] = {"min_clip_score": 0.3, "max_copied": 0.5, "min_retrieval_score": 0.2, "min_agreement": 0.1}


def row(name: str, caption: str | None = "a dog", **scores: float | None) -> dict[str, Any]:
    good = {"clip_score": 0.3, "copied_share": 0.5, "retrieval_score": 0.2, "neighbour_agreement": 0.1}
    return {"image_id": name, "status": "ok", "caption": caption, "kept": len(name), **good, **scores}


ROWS = [
    row("a"),
    row("b", clip_score=0.29),
    row("c", copied_share=0.51, clip_score=0.1),
    row("d", caption=""),
    row("e", caption=" \n"),
    row("f", copied_share=None),
    row("g", clip_score=None),
    {"image_id": "h", "status": "error", "error_code": "empty"},
    row("i", copied_share=0.6),
    row("j", neighbour_agreement=0.0),
    row("k", retrieval_score=0.1),
]


@pytest.fixture
def out(anywhere: str) -> str:
    """A run of two parts, with its record."""
    schema = caption_schema("run", "model", "index", pa.schema([("kept", pa.int32())]))
    for number, rows in enumerate((ROWS[:6], ROWS[6:])):
        table = pa.Table.from_pylist(rows, schema)
        info = PartInfo({number: RowRanges.of(np.arange(len(rows)))}, {}, (number,), len(rows) - number, {})
        write_part(anywhere, f"part-001-00000{number}.parquet", table, info, schema)
    storage.write_bytes(f"{anywhere}/_run.json", (GOLDEN / "_run.json").read_bytes())
    return anywhere


def test_each_row_is_accepted_or_counted_once(out: str) -> None:
    file = f"{out}-accepted.parquet"
    result = run(FilterOptions(run=out, out=file, **BOUNDS))
    rejected = {"error": 1, "empty": 2, "clip_score": 3, "copied_share": 1, "retrieval_score": 1}
    assert (result["accepted"], result["rejected"]) == (2, {**rejected, "neighbour_agreement": 1})
    table = pq.read_table(io.BytesIO(storage.read_bytes(file)))
    assert table["image_id"].to_pylist() == ["a", "f"]
    assert table["kept"].to_pylist() == [1, 1]
    metadata = pq.ParquetFile(io.BytesIO(storage.read_bytes(file))).metadata.metadata
    assert metadata[b"smallcap.model_id"] == b"demo@e2a6d95a4e14"
    said = json.loads(metadata[b"smallcap.filter"])
    assert said["most"] == {"copied_share": 0.5}
    assert said["rows"] == {"accepted": 2, **result["rejected"]}


def test_the_same_rows_and_bounds_give_the_same_bytes(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accepting, "_ROWS_PER_ROW_GROUP", 3)
    files = [f"{out}-{number}.parquet" for number in range(2)]
    for file in files:
        run(FilterOptions(run=out, out=file, min_clip_score=0.2))
    first, second = map(storage.read_bytes, files)
    assert first == second
    footer = pq.ParquetFile(io.BytesIO(first)).metadata
    assert [footer.row_group(number).num_rows for number in range(footer.num_row_groups)] == [3, 3]


def test_a_filter_that_fails_leaves_the_file_as_it_was(out: str) -> None:
    file = f"{out}-accepted.parquet"
    storage.write_bytes(file, b"before")
    part = f"{out}/part-001-000001.parquet"
    data = storage.read_bytes(part)
    storage.write_bytes(part, bytes(500) + data[500:])
    with pytest.raises(SchemaError, match="cannot be read as Parquet"):
        run(FilterOptions(run=out, out=file))
    assert storage.read_bytes(file) == b"before"


def test_a_file_among_the_parts_is_refused(out: str) -> None:
    with pytest.raises(ConfigError, match=r"(?s)take this file for one of its parts.*remedy: .*/_accepted.parquet"):
        run(FilterOptions(run=out, out=f"{out}/accepted.parquet"))
    assert run(FilterOptions(run=out, out=f"{out}/_accepted.parquet"))["accepted"] == 8


def test_the_command_says_what_it_left_out(out: str) -> None:
    command = ["filter", out, "--out", f"{out}-a.parquet", "--max-copied", "0.5"]
    printed = CliRunner().invoke(app, command, catch_exceptions=False).output
    assert printed.splitlines() == [
        "Accepted: 6 of 11 rows.",
        "Rejected, each for its first reason: 1 error, 2 empty, 2 copied_share.",
        f"Parquet: {out}-a.parquet",
    ]
    values = json.loads(CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False).output)
    assert values["accepted"] == 6
