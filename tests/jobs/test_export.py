"""A run's captions as other files: every image once, nothing lost, and nothing that a spreadsheet would run."""

import csv
import gzip
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml
from typer.testing import CliRunner

from jobs.cli import app
from smallcap import storage
from smallcap.errors import ConfigError
from smallcap.images.row_ranges import RowRanges
from smallcap.output.export import export_captions
from smallcap.output.part_files import PartInfo, write_part
from smallcap.output.reading import read_captions
from smallcap.output.schema import caption_schema

RUN = str(Path(__file__).parents[1] / "golden" / "run_v1")


def export(*arguments: str) -> str:
    return CliRunner().invoke(app, ["export", RUN, *arguments], catch_exceptions=False).output


def test_json_lines_hold_all_that_the_parts_do(anywhere: str) -> None:
    assert export("--to", "jsonl", "--out", f"{anywhere}/a.jsonl") == f"2 rows: {anywhere}/a.jsonl\n"
    rows = [json.loads(line) for line in storage.read_bytes(f"{anywhere}/a.jsonl").splitlines()]
    assert rows == read_captions(RUN, status="ok").to_arrow().to_pylist()
    export("--to", "jsonl", "--out", f"{anywhere}/a.jsonl.gz", "--failed", "--columns", "error_code,image_id")
    lines = gzip.decompress(storage.read_bytes(f"{anywhere}/a.jsonl.gz")).splitlines()
    assert [list(json.loads(line).values()) for line in lines] == [
        [None, "10000000.jpg"],
        [None, "10000001.jpg"],
        ["not_an_image", "broken.jpg"],
    ]


def test_csv_is_read_as_it_was_written(anywhere: str) -> None:
    export("--to", "csv", "--out", f"{anywhere}/a.csv")
    rows = list(csv.DictReader(io.StringIO(storage.read_bytes(f"{anywhere}/a.csv").decode(), newline="")))
    expected = read_captions(RUN, status="ok").to_arrow().to_pylist()
    assert list(rows[0]) == list(expected[0])
    for row, given in zip(rows, expected, strict=True):
        assert row["caption"] == given["caption"]
        assert json.loads(row["neighbours"]) == given["neighbours"]
        assert float(row["caption_logprob"]) == given["caption_logprob"] < 0
        assert row["error_code"] == ""


@pytest.mark.parametrize("raw", [False, True])
def test_a_spreadsheet_runs_no_caption_unless_it_is_wanted(raw: bool, tmp_path: Path) -> None:
    texts = ["=HYPERLINK(1)", "+1", "-1", "@a", "\ta", 'a "dog", =1', "line\nline", "café"]
    schema = caption_schema("run", "model", "index")
    table = pa.Table.from_pylist(
        [{"image_id": str(n), "status": "ok", "caption": text} for n, text in enumerate(texts)], schema=schema
    )
    info = PartInfo({0: RowRanges.of(np.arange(len(texts)))}, {}, (0,), len(texts), {})
    write_part(str(tmp_path), "part-001-000000.parquet", table, info, schema)
    captions = read_captions(tmp_path, "caption")
    assert export_captions(captions, str(tmp_path / "a.csv"), "csv", raw) == len(texts)
    with (tmp_path / "a.csv").open(newline="") as file:
        found = [row["caption"] for row in csv.DictReader(file)]
    assert found == (texts if raw else [f"'{text}" for text in texts[:5]] + texts[5:])
    export_captions(captions, str(tmp_path / "a.jsonl"), "jsonl")
    assert [json.loads(line)["caption"] for line in (tmp_path / "a.jsonl").read_text().splitlines()] == texts


def test_an_export_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("before")
    with pytest.raises(ConfigError, match="no such column"):
        export("--to", "jsonl", "--out", str(tmp_path / "a.jsonl"), "--columns", "image_id,captoin")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


def test_a_card_says_what_made_the_captions(tmp_path: Path) -> None:
    export("--to", "card", "--out", str(tmp_path / "README.md"))
    _, head, text = (tmp_path / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head)["configs"] == [{"config_name": "default", "data_files": "part-*.parquet"}]
    assert "generated for 2 images.\n1 image failed: 1 not_an_image." in text
    for said in ("`demo@e2a6d95a4e14`", "`num_captions=2`", "| `licence` | `int32` |"):
        assert said in text
