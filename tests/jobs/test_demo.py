"""The demo as it ships: the whole path with its trained model, and what its captions say of the scenes."""

import json
import re
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from demo.world import named_kinds
from jobs import evaluate
from jobs.cli import app
from jobs.demo import DemoResult, compare_swap, run_demo
from smallcap.config import EvaluateConfig
from smallcap.model.files import demo_folder
from smallcap.output.part_files import list_parts
from tests.caption_runs import read_rows
from tests.in_process_ray import in_process_ray


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, DemoResult]:
    out = str(tmp_path_factory.mktemp("demo"))
    with in_process_ray():
        return out, run_demo(out)


def objects_of_images(references: str) -> dict[str, Counter[str]]:
    """Returns the objects of each image, with their numbers."""
    found = json.loads((demo_folder() / references).read_text())
    names = {image["id"]: image["file_name"] for image in found["images"]}
    return {names[a["image_id"]]: named_kinds(a["caption"]) for a in found["annotations"]}


def share_of_right_captions(run: str, references: str) -> float:
    """Of a run's images, how many have a caption that names exactly their objects; each must have one row."""
    truth = objects_of_images(references)
    rows = [row for part in list_parts(run) for row in pq.read_table(part).to_pylist()]
    assert sorted(row["image_id"] for row in rows) == sorted(truth)
    return sum(named_kinds(row["caption"]) == truth[row["image_id"]] for row in rows) / len(rows)


def test_most_captions_name_exactly_the_objects_of_their_scenes(demo: tuple[str, DemoResult]) -> None:
    _, result = demo
    assert share_of_right_captions(result.summary.out, "references.json") >= 0.7  # 90% of 1,000 others


def test_domains_without_training_are_captioned_after_the_swap_and_not_before(demo: tuple[str, DemoResult]) -> None:
    _, result = demo
    swap = result.swap
    before = share_of_right_captions(swap.before.out, "references-held-out.json")
    after = share_of_right_captions(swap.after.out, "references-held-out.json")
    assert before <= 0.05 < 0.5 <= after  # of 1,000 other scenes: demo/claims.json
    rows = compare_swap(swap)
    assert len(rows) == 24 and all(set(row) == {"image", "before", "after", "reference"} for row in rows)
    assert sum(row["before"] != row["after"] for row in rows) > 12


def test_retrieved_captions_are_of_training_scenes_and_alike(demo: tuple[str, DemoResult]) -> None:
    _, result = demo
    rows = [row for part in list_parts(result.summary.out) for row in pq.read_table(part).to_pylist()]
    for row in rows:
        scores = [neighbour["score"] for neighbour in row["neighbours"]]
        assert len(scores) == 4
        assert scores == sorted(scores, reverse=True)
    assert sum(row["clip_score"] for row in rows) / len(rows) > 0.7


def test_its_captions_are_evaluated_against_its_references(demo: tuple[str, DemoResult]) -> None:
    _, result = demo
    config = EvaluateConfig(
        runs=(result.summary.out,),
        references=str(demo_folder() / "references.json"),
        metrics=("cider", "bleu", "rouge_l"),
        index=result.index,
        bootstrap=200,
    )
    evaluation = evaluate.run(config)
    own = evaluation["runs"][0]
    assert evaluation["images"] == evaluation["references"]["images"] == own["rows"]
    assert (own["without_references"], own["errors"]) == (0, {})
    figures = own["figures"]
    assert figures["cider"]["low"] < figures["cider"]["value"] < figures["cider"]["high"]
    assert figures["cider"]["value"] > 1
    assert figures["novel"]["value"] <= 1 - figures["copied"]["value"]
    assert 0 < figures["retrieval_recall"]["value"] < 1


def test_run_again_it_redoes_nothing(demo: tuple[str, DemoResult]) -> None:
    out, _ = demo
    files = {path: path.stat().st_mtime_ns for path in Path(out).rglob("*") if path.is_file() and path.name != ".lock"}
    again = run_demo(out)
    assert not again.index_was_built
    assert [run.new_images for run in (again.summary, again.swap.before, again.swap.after)] == [0, 0, 0]
    assert files == {path: path.stat().st_mtime_ns for path in files}


def test_each_step_is_told_before_its_captions_and_the_first_caption_is_right(
    demo: tuple[str, DemoResult], capsys: pytest.CaptureFixture[str]
) -> None:
    run_demo(demo[0], show=3)
    printed = capsys.readouterr().out
    order = ("Step 1 of 3", "(clip score", "Step 2 of 3", "Step 3 of 3", "with their own", "Parquet:")
    assert sorted(order, key=printed.index) == list(order)
    first = re.search(r"^(\d+\.jpg)  (.*)  \(clip score", printed, re.MULTILINE)
    assert first is not None and named_kinds(first[2]) == objects_of_images("references.json")[first[1]]


def test_a_quiet_demo_prints_where_its_results_are_and_the_log_has_the_rest(
    demo: tuple[str, DemoResult], tmp_path: Path
) -> None:
    log = tmp_path / "log.txt"
    ended = CliRunner().invoke(app, ["demo", "--out", demo[0], "--show", "2", "-q", "--log-file", str(log)])
    assert ended.exit_code == 0
    assert re.sub(r", .*", "", ended.stdout).splitlines() == [
        f"Parquet: {demo[0]}/captions",
        f"Report: {demo[0]}/captions.html",
        f"Report: {demo[0]}/swap.html",
    ]
    assert ended.stderr == ""
    written = log.read_text()
    for said in ("Step 1 of 3", "(clip score", "Step 3 of 3", "with their own", "Pages with the pictures", "Parquet:"):
        assert written.count(said) == (2 if said == "(clip score" else 1)


@pytest.mark.ray
@pytest.mark.slow
def test_on_ray_it_says_the_same(demo: tuple[str, DemoResult], tmp_path: Path) -> None:
    runs = [(result.summary, result.swap.before, result.swap.after) for result in (demo[1], run_demo(str(tmp_path)))]
    for here, on_ray in zip(*runs, strict=True):
        assert list(read_rows(on_ray.out).caption) == list(read_rows(here.out).caption)
