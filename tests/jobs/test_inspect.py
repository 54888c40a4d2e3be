"""A golden run and golden indexes of format version 1, opened forever; and what else is inspected."""

import json
import shutil
import tarfile
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from jobs.captioning.record import load_run_record
from jobs.cli import app
from jobs.inspect import inspect_path
from jobs.training.record import TrainData, TrainRecord, write_train_record
from smallcap import storage
from smallcap.errors import ConfigError, SchemaError
from smallcap.images.work_list import load_work_list
from smallcap.model.checkpoint import load_checkpoint
from smallcap.output.coverage import Coverage
from smallcap.output.part_files import read_part_infos
from smallcap.output.reading import read_captions
from smallcap.training import feature_store
from tests.train_runs import train_config

GOLDEN = Path(__file__).parents[1] / "golden"
RUN = str(GOLDEN / "run_v1")
IDS = ["10000000.jpg", "10000001.jpg", "broken.jpg"]


def test_a_run_of_version_1_is_read() -> None:
    record = load_run_record(RUN)
    assert record is not None
    assert (record.format_version, record.status, record.run_id) == (1, "complete", "9156e9610be6")
    assert record.images.errors_by_code == {"not_an_image": 1}
    assert record.attempts[0].search_backends == ("cpu",)
    assert read_captions(RUN, "image_id").to_arrow()["image_id"].to_pylist() == IDS
    facts = inspect_path(RUN, samples=2)
    assert (facts["kind"], facts["parts"], len(facts["samples"])) == ("run", 1, 2)
    assert all(len(sample["alternatives"]) == 1 for sample in facts["samples"])
    assert facts["samples"][0]["caption"]
    assert len(facts["samples"][0]["neighbours"]) == 4
    assert facts["scores"] == {
        "captions": 2,
        "empty": 0,
        "clip_score": pytest.approx(0.848716),
        "clip_score_p5": pytest.approx(0.8476),
        "copied_share": pytest.approx(0.35),
    }


def test_nothing_is_left_of_a_run_of_version_1() -> None:
    work = load_work_list(RUN)
    assert work is not None
    assert (work.images, work.sources) == (3, ("images.parquet",))
    parts = list(read_part_infos(RUN))
    assert [Coverage(parts).left(fragment) for fragment in work.fragments] == [None]
    item = Coverage(parts, retry_failed=True).left(work.fragments[0])
    assert item is not None
    assert item.wanted is not None
    assert item.wanted.to_json() == [[2, 3]]


def test_parts_are_read_by_pandas_and_duckdb() -> None:
    part = str(next(Path(RUN).glob("part-*.parquet")))
    frame = pd.read_parquet(part)
    assert list(frame.status) == ["ok", "ok", "error"]
    query = f"select image_id, neighbours[1].text, clip_score from '{part}' where status = 'ok' order by image_id"
    rows = duckdb.sql(query).fetchall()
    assert [row[0] for row in rows] == IDS[:2]
    assert all(nearest and -1 <= score <= 1 for _, nearest, score in rows)


@pytest.mark.parametrize(("name", "rows", "shards"), [("index_v1", 52, 3), ("index_v1_flat", 32, 2)])
def test_an_index_of_version_1_is_inspected(name: str, rows: int, shards: int) -> None:
    facts = inspect_path(str(GOLDEN / name / "index"), samples=3)
    assert (facts["kind"], facts["ntotal"], facts["shards"]) == ("index", rows, shards)
    assert len(facts["samples"]) == 3


def test_failed_images_are_listed_with_their_reasons() -> None:
    facts = inspect_path(RUN, samples=2, errors=True)
    (failed,) = facts["errors"]
    assert (failed["image_id"], failed["image_uri"]) == ("broken.jpg", "s3://golden/images/broken.jpg")
    assert failed["error_code"] == "not_an_image"
    assert failed["error_message"].startswith("The bytes are not those of a known image format.")
    assert "samples" not in facts
    run = CliRunner().invoke
    printed = run(app, ["inspect", RUN, "--errors"], catch_exceptions=False).output
    assert all(text in printed for text in ("broken.jpg", "not_an_image", "The bytes are not those"))
    assert json.loads(run(app, ["inspect", RUN, "--errors", "--json"]).output.splitlines()[-1]) == facts
    with pytest.raises(ConfigError, match=r"(?s)Only runs have failed images.*found: index"):
        inspect_path(str(GOLDEN / "index_v1" / "index"), samples=1, errors=True)


def test_a_runs_tars_are_inspected_beside_the_run_and_alone(anywhere: str, tmp_path: Path) -> None:
    expected = [("10000000", IDS[0], ["jpg", "txt", "json"]), ("10000001", IDS[1], ["jpg", "txt", "json"])]
    (tar,) = (GOLDEN / "run_v1" / "_webdataset").iterdir()
    storage.upload(tar, f"{anywhere}/{tar.name}")
    places = [f"{RUN}/_webdataset", f"{RUN}/_webdataset/", str(tar), anywhere, f"{anywhere}/{tar.name}"]
    for place in places:
        facts = inspect_path(place, samples=5)
        assert (facts["kind"], facts["tars"], facts["images"]) == ("webdataset", 1, 2)
        assert facts["bytes"] == tar.stat().st_size
        assert [(row["key"], row["image_id"], row["files"]) for row in facts["samples"]] == expected
        assert facts["samples"][0]["caption"] == "a rocket and a dog above a tractor on a yellow background"
    assert [inspect_path(place, 0)["run"] is not None for place in places] == [True, True, False, False, False]
    (tmp_path / "damaged.tar").write_bytes(tar.read_bytes()[:3000])
    with pytest.raises(SchemaError, match=r"(?s)cannot be read as WebDataset.*damaged\.tar"):
        inspect_path(str(tmp_path / "damaged.tar"), samples=1)


def test_a_tar_of_others_is_inspected(tmp_path: Path) -> None:
    files = {
        "a.jpg": b"x",
        "a.cls": b"7",
        "b.jpg": b"y",
        "b.json": b'{"caption": "a dog", "key": "12"}',
        "c.json": b"[1]",
    }
    with tarfile.open(tmp_path / "others.tar", "w") as tar:
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
            tar.add(tmp_path / name, name)
    facts = inspect_path(str(tmp_path), samples=5)
    assert facts["samples"] == [
        {"key": "a", "files": ["jpg", "cls"]},
        {"key": "b", "files": ["jpg", "json"], "caption": "a dog"},
        {"key": "c", "files": ["json"]},
    ]


def test_a_model_is_inspected_without_loading_it(tiny_smallcap: Path, anywhere: str) -> None:
    for file in tiny_smallcap.iterdir():
        storage.upload(file, f"{anywhere}/{file.name}")
    for place in (str(tiny_smallcap), anywhere):
        facts = inspect_path(place, samples=5)
        assert (facts["kind"], facts["k"], facts["decoder"]["model_type"]) == ("model", 4, "this_gpt2")
        assert facts["files"]["config.json"] == (tiny_smallcap / "config.json").stat().st_size
        model = load_checkpoint(str(tiny_smallcap))
        assert facts["parameters"] == sum(parameter.numel() for parameter in model.parameters())
        assert facts["encoder"]["patch_size"] == model.config.vision["patch_size"]
    demo = inspect_path("demo", samples=0)
    assert (demo["kind"], demo["retrieval_encoder"]) == ("model", "demo")
    assert "parameters" in CliRunner().invoke(app, ["inspect", "demo"], catch_exceptions=False).output


def test_a_training_run_is_inspected_while_it_goes_on(tmp_path: Path) -> None:
    out = str(tmp_path)
    record = TrainRecord.new(train_config("captions.csv", "index", tmp_path, out), None, None, start_id="demo@0")
    data = TrainData(images=1, examples=2, validation_images=0, errors={"empty": 1}, malformed=0)
    write_train_record(out, record.model_copy(update={"data": data}))
    lines = [{"step": step, "epoch": 1, "loss": 1 / step, "tokens": 9} for step in (1, 2, 3)]
    (tmp_path / "train_log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    rows = [
        {"image_id": "a.jpg", "image_uri": "a.jpg", "status": "ok"},
        {
            "image_id": "b.jpg",
            "image_uri": "b.jpg",
            "status": "error",
            "error_code": "empty",
            "error_message": "Nothing.",
        },
    ]
    fields = pa.schema(
        [(name, pa.string()) for name in ("image_id", "image_uri", "status", "error_code", "error_message")]
    )
    table = feature_store.feature_table(
        pa.Table.from_pylist(rows, schema=fields), [["a", "b"], ["c"]], np.ones((1, 2, 4), np.float16), None
    )
    feature_store.write_part(f"{out}/features/train/{feature_store.part_name(0, 0, True)}", table)
    facts = inspect_path(out, samples=2)
    assert (facts["kind"], facts["status"], facts["steps_done"]) == ("training run", "running", 3)
    assert (facts["checkpoint"], facts["model"], facts["samples"]) == (None, None, lines[1:])
    assert inspect_path(out, samples=0)["samples"] == []
    (failed,) = inspect_path(out, 0, errors=True)["errors"]
    assert failed == {name: rows[1][name] for name in ("image_id", "image_uri", "error_code", "error_message")}


def test_another_folder_is_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"(?s)nothing here.*an index \(current.json\).*found: 1 other file"):
        inspect_path(str(tmp_path), samples=1)
    shutil.rmtree(tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        inspect_path(str(tmp_path), samples=1)
