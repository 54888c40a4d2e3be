"""`smallcap calibrate` finds the bound that leaves out captions which references call bad."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from jobs.calibrate import run
from jobs.cli import app
from jobs.terminal.call_options import CalibrateOptions
from smallcap import storage
from smallcap.errors import ConfigError
from smallcap.images.row_ranges import RowRanges
from smallcap.output.part_files import PartInfo, write_part
from smallcap.output.schema import caption_schema

GOLDEN = Path(__file__).parents[1] / "golden" / "run_v1"
COUNT = 400


def make(folder: Path) -> tuple[str, str]:
    """Writes a run of which each fifth caption is wrong and scores low, and references; returns their paths."""
    rng = np.random.default_rng(0)
    nouns = rng.choice(["dog", "cat", "bus", "horse", "boat", "kite"], (COUNT, 2))
    wrong = np.arange(COUNT) % 5 == 0
    rows = [
        {
            "image_id": f"{number}.jpg",
            "status": "ok",
            "caption": "a person" if is_wrong else f"a {one} beside a {other}",
            "clip_score": 0.2 - 0.1 * is_wrong + 0.05 * rng.random(),
            "copied_share": rng.random(),
            "retrieval_score": 0.5,
        }
        for number, (is_wrong, (one, other)) in enumerate(zip(wrong, nouns, strict=True))
    ]
    schema = caption_schema("run", "model", "index")
    info = PartInfo({0: RowRanges.of(np.arange(COUNT))}, {}, (0,), COUNT, {})
    write_part(f"{folder}/out", "part-001-000000.parquet", pa.Table.from_pylist(rows, schema), info, schema)
    storage.write_bytes(f"{folder}/out/_run.json", (GOLDEN / "_run.json").read_bytes())
    lines = [f"{number}.jpg,a {one} beside a {other}" for number, (one, other) in enumerate(nouns)]
    (folder / "references.csv").write_text("\n".join(["image,caption", *lines]))
    return f"{folder}/out", f"{folder}/references.csv"


def test_the_bound_that_pays_is_named_with_its_flag(tmp_path: Path) -> None:
    out, references = make(tmp_path)
    file = f"{tmp_path}/bounds.json"
    result = run(CalibrateOptions(run=out, references=references, keep=0.75, bootstrap=200, out=file))
    assert (result["images"], result["without_score"]) == (COUNT, ["neighbour_agreement"])
    found = result["thresholds"]
    assert found["clip_score"]["pays"]
    assert found["clip_score"]["bound"] == pytest.approx(0.2, abs=0.02)
    assert found["clip_score"]["accepted"] == pytest.approx(0.8, abs=0.06)
    assert found["retrieval_score"]["bound"] is None  # all have the same
    assert json.loads(Path(file).read_text()) == result
    command = ["calibrate", out, "--references", references, "--keep", "0.75", "--bootstrap", "200"]
    printed = CliRunner().invoke(app, command, catch_exceptions=False).output
    assert f"One of: --min-clip-score {found['clip_score']['bound']:.4g}" in printed
    assert "retrieval_score: no bound that accepts 75% leaves better captions." in printed


def test_too_few_images_with_references_are_refused(tmp_path: Path) -> None:
    out, _ = make(tmp_path)
    (tmp_path / "few.csv").write_text("image,caption\n" + "".join(f"{number}.jpg,a dog\n" for number in range(99)))
    with pytest.raises(ConfigError, match=r"(?s)Too few captioned images.*at least 100.*found: 99"):
        run(CalibrateOptions(run=out, references=str(tmp_path / "few.csv")))
