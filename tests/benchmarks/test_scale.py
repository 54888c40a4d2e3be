from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.scale import check_rows, differences, longest_start, memory_slopes, rates_by_tenth
from benchmarks.scale_data import image_name, image_number, make_image
from benchmarks.scale_run import Sample


def test_an_images_number_is_read_from_its_id() -> None:
    assert image_number(image_name(12_345)) == 12_345
    assert image_number("0000000-0010000/0012345") == 12_345
    assert image_number("0000000-0010000.tar") is None
    assert make_image(1) == make_image(1) != make_image(2)


def test_missing_doubled_failed_and_strange_rows_are_counted(tmp_path: Path) -> None:
    write_part(tmp_path / "part-001.parquet", ["0000000", "0000001", "0000001", "0000009", "x"], "ok")
    write_part(tmp_path / "part-002.parquet", ["0000002"], "error")
    found = check_rows(str(tmp_path), 4)
    assert found == {"missing": 1, "more_than_once": 1, "errors": 1, "strangers": 2, "as_they_should_be": False}


def test_captions_are_compared_by_image(tmp_path: Path) -> None:
    write_part(tmp_path / "a" / "part-001.parquet", ["0000000", "0000001", "0000002"], "ok")
    write_part(tmp_path / "b" / "part-001.parquet", ["0000002.jpg", "0000000.jpg"], "ok", "0000002.jpg")
    assert differences(str(tmp_path / "a"), str(tmp_path / "b"), 3) == 2


def test_rates_and_slopes_are_those_of_the_rows() -> None:
    samples = [sample(second, 10 * second, 100 + second) for second in range(11)]
    assert rates_by_tenth(samples, 100) == [10.0] * 10
    assert memory_slopes(samples)["driver_own"] == pytest.approx(10_000)
    assert memory_slopes(samples)["workers_own"] == pytest.approx(0, abs=0.01)
    assert longest_start(samples, [0, 4]) == samples[4:]


def sample(seconds: float, rows: int, driver_own: float) -> Sample:
    return Sample(seconds, rows, {"driver_own": driver_own, "workers_own": 5.0})


def write_part(path: Path, ids: list[str], status: str, other: str = "") -> None:
    path.parent.mkdir(exist_ok=True)
    captions = ["another" if image_id == other else "the same" for image_id in ids]
    neighbours = pa.array([[{"caption_id": 1}]] * len(ids))
    columns = {"image_id": ids, "status": [status] * len(ids), "caption": captions, "neighbours": neighbours}
    pq.write_table(pa.table(columns), path)
