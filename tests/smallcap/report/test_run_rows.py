"""Which rows of a run are shown, and that figures are those of all rows."""

from pathlib import Path

import pytest

from smallcap.output import reading
from smallcap.report.run_rows import fit_texts, read_run_rows
from tests.report_runs import caption_row, error_row, write_run


def names(count: int) -> list[str]:
    return [f"{number:04d}.jpg" for number in range(count)]


def test_a_small_run_is_shown_whole(tmp_path: Path) -> None:
    rows = [caption_row(name, f"a dog {name}") for name in names(250)] + [error_row(f"x{n}.jpg") for n in range(80)]
    read = read_run_rows([write_run(str(tmp_path), rows)], 500)
    assert [row["id"] for row in read.rows] == sorted(row["image_id"] for row in rows)
    assert (read.figures[0].ok, dict(read.figures[0].errors)) == (250, {"truncated": 80})
    first = read.rows[0]
    assert first["runs"][0]["caption"] == "a dog 0000.jpg"
    assert first["runs"][0]["values"]["clip_score"] == 0.5
    assert (first["size"], first["changed"]) == ([60, 40], False)
    assert read.rows[-1]["runs"][0] == {"code": "truncated", "message": "The file ends early."}


@pytest.mark.parametrize("batch_rows", [7, 10_000])
def test_of_a_large_run_the_doubtful_are_shown_and_others_drawn(
    tmp_path: Path, batch_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_BATCH_ROWS", batch_rows)
    rows = [caption_row(name, "a dog", score=number / 1000) for number, name in enumerate(names(900))]
    rows += [error_row(f"x{n}.jpg", code) for n in range(40) for code in [("empty", "timeout")[n % 2]]]
    read = read_run_rows([write_run(str(tmp_path), rows)], 100)
    shown = {row["id"] for row in read.rows}
    assert len(shown) == len(read.rows) == 100
    assert set(names(10)) <= shown, "those with the lowest scores"
    codes = [row["runs"][0].get("code") for row in read.rows]
    assert (codes.count("empty"), codes.count("timeout")) == (5, 5)
    others = sorted(int(name[:4]) for name in shown - set(names(10)) if name[0] != "x")
    assert 300 < sum(others) / len(others) < 600, "they lie all over the run"
    assert read.figures[0].ok == 900
    assert read.figures[0].distributions["clip_score"].count == 900
    assert read.figures[0].distributions["copied_share"].count == 0, "there are no neighbours"
    assert {code: len(examples) for code, examples in read.figures[0].examples.items()} == {"empty": 5, "timeout": 5}


def test_which_are_drawn_depends_on_names_alone(tmp_path: Path) -> None:
    rows = [caption_row(name, "a dog", score=number / 300) for number, name in enumerate(names(300))]
    one = read_run_rows([write_run(str(tmp_path / "one"), rows)], 40)
    other = read_run_rows([write_run(str(tmp_path / "other"), rows[::-1])], 40)
    assert [row["id"] for row in one.rows] == [row["id"] for row in other.rows]


def test_only_images_that_can_be_read_are_drawn(tmp_path: Path) -> None:
    rows = [caption_row(name, "a dog", score=1.0) for name in names(300)]
    read = read_run_rows([write_run(str(tmp_path), rows)], 40, lambda uri: uri < "0100")
    drawn = [row["id"] for row in read.rows if row["id"] >= "0100"]
    assert len(read.rows) == 40
    assert len(drawn) <= 4, "a tenth has the lowest scores, wherever it lies"


def test_two_runs_are_joined_by_their_images(tmp_path: Path) -> None:
    same = [caption_row(name, "a dog") for name in names(500)]
    changed = {"0003.jpg", "0017.jpg", "0400.jpg"}
    others = [
        caption_row(row["image_id"], "a cat") if row["image_id"] in changed else row
        for row in same
        if row["image_id"] != "0001.jpg"
    ]
    others = [error_row("0002.jpg") if row["image_id"] == "0002.jpg" else row for row in others]
    runs = [
        write_run(str(tmp_path / "a"), same),
        write_run(str(tmp_path / "b"), [*others, caption_row("new.jpg", "x")]),
    ]
    read = read_run_rows(runs, 20)
    assert (read.both, read.changed) == (499, 4)
    rows = {row["id"]: row for row in read.rows}
    assert len(rows) == 20
    assert {name for name, row in rows.items() if row["changed"]} == changed | {"0002.jpg"}
    assert [one["caption"] for one in rows["0003.jpg"]["runs"]] == ["a dog", "a cat"]
    assert rows["0002.jpg"]["runs"][1]["code"] == "truncated"
    assert [figures.ok for figures in read.figures] == [500, 499]
    whole = read_run_rows(runs, 1000)
    (missing,) = (row for row in whole.rows if row["id"] == "0001.jpg")
    assert missing["runs"][1] is None


def test_two_runs_without_a_common_image_are_shown(tmp_path: Path) -> None:
    runs = [
        write_run(str(tmp_path / name), [caption_row(f"{name}{number}", "a dog") for number in range(3)])
        for name in "ab"
    ]
    read = read_run_rows(runs, 10)
    assert (read.both, read.changed, len(read.rows)) == (0, 0, 3)


def test_a_run_without_rows_is_shown(tmp_path: Path) -> None:
    read = read_run_rows([write_run(str(tmp_path), [])], 10)
    assert (read.rows, read.figures[0].ok, read.figures[0].errors) == ([], 0, {})


def test_captions_that_are_empty_or_without_figures_are_counted_and_shown(tmp_path: Path) -> None:
    rows = [
        caption_row("a", ""),
        caption_row("b", " \n"),
        caption_row("c", "a dog", score=float("nan")),
        caption_row("d", "x" * 1000, neighbours=["y" * 1000] * 40) | {"clip_score": None, "alternatives": None},
    ]
    read = read_run_rows([write_run(str(tmp_path), rows)], 10)
    assert (read.figures[0].ok, read.figures[0].empty) == (4, 2)
    assert [row["runs"][0]["values"].get("clip_score") for row in read.rows] == [0.5, 0.5, None, None]
    assert len(read.rows[3]["runs"][0]["neighbours"]) == 16


@pytest.mark.parametrize(("most_bytes", "longest"), [(1_000_000, 400), (18_000, 200), (14_000, 100), (10, 50)])
def test_texts_are_shortened_until_they_fit(tmp_path: Path, most_bytes: int, longest: int) -> None:
    rows = [caption_row(f"{'n' * 500}{n}", "x" * 1000, neighbours=["y" * 1000, "short"] * 8) for n in range(4)]
    read = read_run_rows([write_run(str(tmp_path), [*rows, error_row("e", message="z" * 1000)])], 10)
    fit_texts(read.rows, most_bytes)
    row, failed = read.rows[-1], read.rows[0]
    assert (len(row["id"]), len(row["runs"][0]["caption"]), len(failed["runs"][0]["message"])) == (
        501,
        longest,
        longest,
    )
    assert [len(one["text"]) for one in row["runs"][0]["neighbours"][:2]] == [longest, 5]
