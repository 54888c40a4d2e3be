"""How a run is laid out: the precision is one for all its attempts."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.captioning.layout import lay_out
from jobs.captioning.record import Attempt, RunRecord
from smallcap.config import CaptionConfig
from smallcap.machine.cpu_precision import cpu_precision
from tests.in_process_ray import in_process_ray


def config(folder: Path, dtype: str = "auto") -> CaptionConfig:
    retrieval = {"k": 0, "cache_dir": str(folder)}
    values = {"model": "demo", "compute": {"dtype": dtype, "device": "cpu"}, "retrieval": retrieval}
    return CaptionConfig.model_validate({"images": ["images"], "out": str(folder / "out"), **values})


def record(config: CaptionConfig, *dtypes: str) -> RunRecord:
    attempts = tuple(Attempt(token=dtype, started_at="", device="cpu", dtype=dtype) for dtype in dtypes)
    return RunRecord.new(config, None, None, model_id="model").model_copy(update={"attempts": attempts})


def test_auto_is_what_a_node_has_measured(tmp_path: Path) -> None:
    auto = config(tmp_path)
    with in_process_ray():
        layout = lay_out(auto, record(auto))
        found = cpu_precision(str(tmp_path))
        assert (layout.actors.dtype, layout.precision) == (found.dtype, found.describe())
        assert lay_out(auto, record(auto)) == layout


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_keeps_its_precision(tmp_path: Path, dtype: str) -> None:
    auto = config(tmp_path)
    with in_process_ray():
        layout = lay_out(auto, record(auto, dtype, "float32"))
    assert (layout.actors.dtype, layout.precision) == (dtype, f"{dtype}, as when the run began")
    assert not list(tmp_path.iterdir())  # nothing is measured


def test_what_is_asked_for_needs_no_reason(tmp_path: Path) -> None:
    asked = config(tmp_path, "float16")
    with in_process_ray():
        layout = lay_out(asked, record(asked))
    assert (layout.actors.dtype, layout.precision) == ("float16", "")
