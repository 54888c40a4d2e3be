"""The precision of a CPU is measured once; what a measurement finds is not tested here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from smallcap.machine import cpu_precision as module
from smallcap.machine.cpu_precision import CpuPrecision, cpu_precision, describe_cpu
from tests.python_process import run_python


@pytest.fixture
def gains(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the next measurements find; a measurement takes one, or two where the first shows no emulation."""
    found: list[float] = []
    monkeypatch.setattr(module, "_gain", lambda rows: found.pop(0))
    return found


def files(folder: Path) -> list[Path]:
    return [path for path in (folder / "precision").iterdir() if path.suffix == ".json"]


@pytest.mark.parametrize(
    ("measured", "dtype", "reason"),
    [
        ([2.0, 2.44], "bfloat16", "bfloat16; it is 2.4 times as fast as float32, measured on "),
        ([2.0, 1.3], "bfloat16", "it is 1.3 times as fast"),
        ([2.0, 1.2], "float32", "float32; bfloat16 is 1.2 times as fast, so that its rounding gains too little"),
        ([0.01], "float32", "bfloat16 is 0.01 times as fast"),
    ],
    ids=["clearly", "just", "too little", "emulated"],
)
def test_it_is_measured_once(
    tmp_path: Path, gains: list[float], measured: list[float], dtype: str, reason: str
) -> None:
    gains += measured
    first = cpu_precision(str(tmp_path))
    assert not gains
    assert first.dtype == dtype
    assert reason in first.describe()
    assert str(describe_cpu()["cpu"]) in first.describe()
    assert cpu_precision(str(tmp_path)) == first  # there is nothing left to measure


def test_another_machine_measures_for_itself(
    tmp_path: Path, gains: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    gains += [2.0, 2.0, 1.0, 1.0]
    assert cpu_precision(str(tmp_path)).dtype == "bfloat16"
    here = describe_cpu()
    monkeypatch.setattr(module, "describe_cpu", lambda: here | {"flags_sha256": "others"})
    assert cpu_precision(str(tmp_path)).dtype == "float32"
    monkeypatch.undo()
    assert cpu_precision(str(tmp_path)).dtype == "bfloat16"
    assert len(files(tmp_path)) == 2


def changed(content: bytes) -> Iterator[bytes]:
    yield b""
    yield content[:-20]
    yield b"[]"
    yield b"\xff\xfe"
    values: dict[str, Any] = json.loads(content)
    for change in ({"format_version": 2}, {"dtype": "float16"}, {"gain": "fast"}, {"machine": {"cpu": "another"}}):
        yield json.dumps(values | change).encode()


def test_a_damaged_file_is_replaced(tmp_path: Path, gains: list[float]) -> None:
    gains += [2.0, 2.0]
    cpu_precision(str(tmp_path))
    (path,) = files(tmp_path)
    for content in changed(path.read_bytes()):
        path.write_bytes(content)
        gains += [1.0, 1.0]
        assert cpu_precision(str(tmp_path)).dtype == "float32"
        assert cpu_precision(str(tmp_path)).dtype == "float32"
        assert not gains


def test_of_two_that_measure_at_once_the_first_one_counts(
    tmp_path: Path, gains: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    gains += [2.0, 2.0]
    other = cpu_precision(str(tmp_path / "elsewhere"))
    (kept,) = files(tmp_path / "elsewhere")

    def measure(machine: dict[str, str | int]) -> CpuPrecision:
        target = tmp_path / "precision" / kept.name
        target.parent.mkdir()
        target.write_bytes(kept.read_bytes())
        return other.model_copy(update={"dtype": "float32", "gain": 1.0})

    monkeypatch.setattr(module, "_measure", measure)
    assert cpu_precision(str(tmp_path)) == other


def test_without_a_cache_folder_it_is_measured_all_the_same(tmp_path: Path, gains: list[float]) -> None:
    (tmp_path / "file").write_text("")
    gains += [2.0, 2.0, 2.0, 2.0]
    assert cpu_precision(str(tmp_path / "file")).dtype == "bfloat16"
    (tmp_path / "precision").write_text("")
    assert cpu_precision(str(tmp_path)).dtype == "bfloat16"


def test_what_is_kept_needs_no_torch(tmp_path: Path, gains: list[float]) -> None:
    gains += [2.0, 2.0]
    cpu_precision(str(tmp_path))
    code = "import sys; from smallcap.machine.cpu_precision import cpu_precision as find; "
    found = run_python(f"{code}print(find({str(tmp_path)!r}).dtype, 'torch' in sys.modules)")
    assert found.split() == ["bfloat16", "False"]


def test_a_measurement_gives_a_speed(tmp_path: Path) -> None:
    assert cpu_precision(str(tmp_path)).gain > 0
