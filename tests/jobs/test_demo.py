"""The demo as it ships: the whole path with its trained model, and what its captions say of the scenes."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from demo.world import named_kinds
from jobs import evaluate
from jobs.demo import DemoResult, run_demo
from smallcap.config import EvaluateConfig
from smallcap.model_files import demo_folder
from smallcap.part_files import list_parts

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def demo(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, DemoResult]:
    out = str(tmp_path_factory.mktemp("demo"))
    return out, run_demo(out)


def test_most_captions_name_exactly_the_objects_of_their_scenes(demo: tuple[str, DemoResult]) -> None:
    _, result = demo
    references = json.loads((demo_folder() / "references.json").read_text())
    names = {image["id"]: image["file_name"] for image in references["images"]}
    truth = {names[a["image_id"]]: named_kinds(a["caption"]) for a in references["annotations"]}
    rows = [row for part in list_parts(result.summary.out) for row in pq.read_table(part).to_pylist()]
    assert {row["image_id"] for row in rows} == set(truth)
    right = sum(named_kinds(row["caption"]) == truth[row["image_id"]] for row in rows)
    assert right >= 0.85 * len(rows)  # 94.8% of 600 other scenes; see demo/README.md


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
    assert again.summary.new_images == 0
    assert files == {path: path.stat().st_mtime_ns for path in files}
