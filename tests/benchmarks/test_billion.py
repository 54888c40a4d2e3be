"""The simulation does what a run does, at a small size."""

from pathlib import Path

import pytest

from benchmarks import billion


def test_a_cut_finds_the_parts_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(billion, "ROWS_PER_PART", 5_000)
    figures = billion.cut(300_000)
    assert figures["parts"] == 59
    missing = 5_000 // billion.FRAGMENT_ROWS
    assert missing < figures["left"] <= missing + 2
    assert figures["tasks"] <= 4_000


def test_lists_in_order_and_in_none_hold_the_same_images(tmp_path: Path) -> None:
    for name, in_order in (("a", True), ("b", False)):
        billion.write_lists(str(tmp_path / name), 3_000, in_order)
        listed = billion.list_images(str(tmp_path / name), str(tmp_path / f"{name}-out"))
        assert (listed["images"], listed["fragments"]) == (3_000, 12)


def test_what_is_computed_is_printed() -> None:
    assert "1,000 shards" in list(billion.plans())[-1]
    assert any("20,000 parts" in line for line in billion.requests())
    assert billion.in_flight(3)["images_per_s"] > 0
