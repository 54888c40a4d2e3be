"""Evaluation from stored runs, as a user meets it: golden runs, references of each kind, both kinds of storage."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from jobs.cli import app
from jobs.evaluate import run
from smallcap import storage
from smallcap.config import EvaluateConfig
from smallcap.errors import ConfigError, SchemaError, SmallCapError
from smallcap.index.caption_store import read_texts

GOLDEN = Path(__file__).parents[1] / "golden"
RUN = str(GOLDEN / "run_v1")
REFERENCES = {
    "10000000.jpg": ["a rocket above a tractor", "a rocket and a tractor on yellow"],
    "10000001.jpg": ["a whale on a red ground", "the whale"],
    "10000002.jpg": ["nobody captioned this one"],
}


def write_coco(folder: str) -> str:
    uri = storage.join(folder, "references.json")
    images = [{"id": number, "file_name": name} for number, name in enumerate(REFERENCES)]
    annotations = [
        {"id": 0, "image_id": number, "caption": caption}
        for number, captions in enumerate(REFERENCES.values())
        for caption in captions
    ]
    storage.write_bytes(uri, json.dumps({"images": images, "annotations": annotations}).encode())
    return uri


def evaluate(runs: Sequence[str], references: str, **options: Any) -> dict[str, Any]:
    given = {"metrics": ("cider", "bleu"), "bootstrap": 50} | options
    return run(EvaluateConfig(runs=tuple(runs), references=references, **given))


def copy_run(source: str, target: str) -> str:
    for path in Path(source).iterdir():
        if path.is_file():
            storage.write_bytes(storage.join(target, path.name), path.read_bytes())
    return target


def replace_captions(run: Path, captions: Sequence[str | None]) -> None:
    part = next(run.glob("part-*"))
    table = pq.read_table(part)
    place = table.schema.get_field_index("caption")
    pq.write_table(table.set_column(place, "caption", pa.array(captions)), part)


@pytest.fixture
def two_runs(tmp_path: Path) -> list[str]:
    """The golden run, and one with other captions."""
    other = copy_run(RUN, str(tmp_path / "other"))
    replace_captions(Path(other), ["a rocket above a tractor", "a chair on a yellow ground", None])
    return [RUN, other]


def test_a_run_is_evaluated_from_any_storage(anywhere: str) -> None:
    stored = copy_run(RUN, storage.join(anywhere, "run"))
    out = storage.join(anywhere, "evaluation.json")
    result = evaluate([stored], write_coco(anywhere), out=out)
    assert json.loads(storage.read_bytes(out)) == result
    assert (result["images"], result["references"]["images"], result["captions_per_image"]) == (2, 3, 2)
    measured = result["runs"][0]
    assert (measured["rows"], measured["errors"], measured["without_references"]) == (3, {"not_an_image": 1}, 0)
    assert (measured["model_id"], measured["index_id"], measured["clip_score_encoder"]) == (
        "demo@e2a6d95a4e14",
        "1adeb9c10471b38c",
        "demo",
    )
    figures = measured["figures"]
    assert figures["clip_score"]["value"] == pytest.approx(2.5 * figures["clip_cosine"]["value"])
    assert 0 < figures["bleu_1"]["value"] <= 1
    assert measured["differences"] == {}


def test_two_runs_side_by_side(tmp_path: Path, two_runs: list[str]) -> None:
    result = evaluate(two_runs, write_coco(str(tmp_path)))
    first, second = (entry["figures"]["bleu_1"]["value"] for entry in result["runs"])
    difference = result["runs"][1]["differences"]["bleu_1"]
    assert difference["value"] == pytest.approx(second - first)
    assert first != second
    assert difference["low"] <= difference["value"] <= difference["high"]


def test_tables_and_karpathys_splits_say_the_same_as_coco(tmp_path: Path) -> None:
    expected = evaluate([RUN], write_coco(str(tmp_path)))["runs"]
    rows = [{"file": name, "text": caption} for name, captions in REFERENCES.items() for caption in captions]
    (tmp_path / "refs.csv").write_text("\n".join(["file,text", *(f"{row['file']},{row['text']}" for row in rows)]))
    (tmp_path / "refs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("refs.csv", "refs.jsonl"):
        found = evaluate([RUN], str(tmp_path / name), text_column="text", image_id_column="file")
        assert found["runs"] == expected
    images = [
        {"filename": name, "split": "test", "sentences": [{"raw": caption} for caption in captions]}
        for name, captions in REFERENCES.items()
    ]
    other = {"filename": "0.jpg", "split": "train", "sentences": [{"raw": "x"}]}
    (tmp_path / "karpathy.json").write_text(json.dumps({"images": [*images, other]}))
    found = evaluate([RUN], str(tmp_path / "karpathy.json"), split="test")
    assert (found["runs"], found["references"]["images"]) == (expected, 3)


def test_the_command_prints_a_table_and_json_last(tmp_path: Path, two_runs: list[str]) -> None:
    references = write_coco(str(tmp_path))
    arguments = ["evaluate", *two_runs, "--references", references, "--metrics", "cider", "--bootstrap", "20", "--json"]
    printed = CliRunner().invoke(app, arguments, catch_exceptions=False).output.splitlines()
    assert json.loads(printed[-1])["images"] == 2
    table = "\n".join(printed[:-1])
    assert "B − A" in table
    assert "1 failed (1 not_an_image)" in table
    assert "fewer than 50 images (here 2) its value says little" in " ".join(table.split())


def test_the_module_does_the_same(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        f"runs: [{RUN}]\nreferences: {write_coco(str(tmp_path))}\nmetrics: [rouge_l]\nbootstrap: 0\n"
    )
    command = [
        sys.executable,
        "-m",
        "jobs.evaluate",
        "--config",
        str(tmp_path / "config.yaml"),
        "--set",
        "seed=3",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["options"] == {"index": None, "bootstrap": 0, "seed": 3}
    assert result["runs"][0]["figures"]["rouge_l"]["low"] is None


def test_metrics_that_cannot_run_are_named_and_the_others_run(tmp_path: Path) -> None:
    arguments = ["evaluate", RUN, "--references", write_coco(str(tmp_path)), "--bootstrap", "0", "--json"]
    empty = tmp_path / "empty"
    empty.mkdir()
    command = [sys.executable, "-m", "jobs.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"PATH": str(empty)})
    result = json.loads(done.stdout.splitlines()[-1])
    assert (set(result["unavailable"]), result["tokenizer"]) == ({"meteor", "spice"}, "ptb-python")
    assert "METEOR did not run. It is a Java program, and no Java runs here" in done.stderr
    assert result["runs"][0]["figures"]["cider"]["value"] is not None


def test_an_incomplete_run_is_said_to_be_one(tmp_path: Path) -> None:
    stored = copy_run(RUN, str(tmp_path / "run"))
    record = json.loads((tmp_path / "run" / "_run.json").read_text())
    (tmp_path / "run" / "_run.json").write_text(
        json.dumps(record | {"status": "running", "retrieval_encoder": "other"})
    )
    warnings = evaluate([stored, RUN], write_coco(str(tmp_path)))["warnings"]
    assert any("is not complete" in warning for warning in warnings)
    assert any("different encoders" in warning for warning in warnings)


def _broken(name: str, content: str, message: str, kind: type[SmallCapError] = SchemaError) -> Any:
    return pytest.param(name, content, message, kind, id=message.partition(":")[0])


@pytest.mark.parametrize(
    ("name", "content", "message", "kind"),
    [
        _broken("refs.json", "{", "not a JSON file"),
        _broken("refs.json", '{"images": []}', "holds no captions"),
        _broken("refs.json", '{"annotations": [{"image_id": 1}]}', "annotations[0]"),
        _broken("refs.csv", "image,caption\na.jpg", "refs.csv: line 2"),
        _broken("refs.csv", "image,text\na.jpg,x", "no column of captions"),
        _broken("refs.csv", "file,caption\na.jpg,x", "No row of the references"),
        _broken("refs.csv", "image,caption\nother.jpg,x", "images named other.jpg", ConfigError),
        _broken("refs.md", "x", "format of this captions file is unknown", ConfigError),
    ],
)
def test_broken_references_are_named(
    tmp_path: Path, name: str, content: str, message: str, kind: type[SmallCapError]
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(kind) as error:
        evaluate([RUN], str(tmp_path / name))
    assert message in str(error.value)


def test_a_split_of_a_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "refs.csv").write_text("image,caption\na.jpg,x")
    with pytest.raises(ConfigError, match="not divided into splits"):
        evaluate([RUN], str(tmp_path / "refs.csv"), split="test")


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run in this folder"):
        evaluate([str(tmp_path)], write_coco(str(tmp_path)))


def test_the_datastores_captions_are_not_novel(tmp_path: Path) -> None:
    index = str(GOLDEN / "index_v1" / "index")
    stored = copy_run(RUN, str(tmp_path / "run"))
    replace_captions(tmp_path / "run", [next(read_texts(index))[0].upper() + ".", "surely nobody has said this", None])
    references = write_coco(str(tmp_path))
    assert evaluate([stored], references)["runs"][0]["figures"]["novel"]["value"] == 1
    assert evaluate([stored], references, index=index)["runs"][0]["figures"]["novel"]["value"] == 0.5


def test_parts_of_something_else_are_refused(tmp_path: Path) -> None:
    stored = copy_run(RUN, str(tmp_path / "run"))
    part = next((tmp_path / "run").glob("part-*"))
    shutil.copyfile(GOLDEN / "README.md", part)
    with pytest.raises(SchemaError, match="cannot be read as Parquet"):
        evaluate([stored], write_coco(str(tmp_path)))
