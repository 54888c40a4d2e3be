from __future__ import annotations

import io
import re
import runpy
import sys
from pathlib import Path

import pytest

from jobs import build_index
from jobs.cluster.display import Display
from jobs.cluster.stopping import StopSignals
from smallcap.config import IndexConfig
from smallcap.errors import CheckpointError, ManifestError, StorageError
from smallcap.index.manifest import load_manifest
from tests.job_processes import StartJob


@pytest.fixture
def arguments(tmp_path: Path, tiny_clip: Path) -> list[str]:
    """A command line that builds `tmp_path/index` of two captions in two shards."""
    (tmp_path / "captions.csv").write_text("caption\na dog\na cat\nA dog\n")
    (tmp_path / "build.yaml").write_text(f"dumps: [{tmp_path}/captions.csv]\nencoder: hf:{tiny_clip}\nout: nowhere\n")
    return ["--config", f"{tmp_path}/build.yaml", "--set", f"out={tmp_path}/index", "--set", "shards=2"]


def test_command_line_and_what_it_prints(
    tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "jobs.build_index")  # so that it runs as if it were new
    monkeypatch.setattr(sys, "argv", ["build_index", *arguments])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("jobs.build_index", run_name="__main__")
    printed = capsys.readouterr()
    assert load_manifest(f"{tmp_path}/index").index_id in printed.out
    assert "2 captions of 3 rows in 2 shards, Flat; dropped: 1 duplicate" in printed.out
    assert "recall@4 1.0000" in printed.out
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("jobs.build_index", run_name="__main__")
    assert capsys.readouterr().out.startswith("Nothing to do")


def test_usage_errors(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "jobs.build_index")  # so that it runs as if it were new
    monkeypatch.setattr(sys, "argv", ["build_index", *arguments, "--set", "shard=3"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("jobs.build_index", run_name="__main__")
    assert ended.value.code == 2
    assert "Did you mean shards?" in capsys.readouterr().err


@pytest.mark.own_ray
@pytest.mark.slow
def test_module_starts_its_own_ray(tmp_path: Path, arguments: list[str], start_job: StartJob) -> None:
    job = start_job([sys.executable, "-m", "jobs.build_index", *arguments], tmp_path / "build.log")
    job.wait()
    assert load_manifest(f"{tmp_path}/index").index_id in job.printed()


def test_what_is_missing_is_named_before_ray_starts(
    tmp_path: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_index, "on_shown_ray", lambda *_: pytest.fail("Ray was started for nothing"))
    (tmp_path / "captions.csv").write_text("caption\na dog\n")
    there = IndexConfig(dumps=(f"{tmp_path}/captions.csv",), out=f"{tmp_path}/index", encoder=f"hf:{tiny_clip}")
    for changed, error, message in (
        ({"dumps": (f"{tmp_path}/absent.csv",)}, StorageError, "does not exist"),
        ({"encoder": f"hf:{tmp_path}/absent"}, CheckpointError, "no such model folder"),
        ({"add": True}, ManifestError, "no published index to add to"),
    ):
        for function in (build_index.run, build_index.plan):
            with pytest.raises(error, match=message):
                function(there.model_copy(update=changed))


def test_every_stage_has_words_for_people() -> None:
    """The names of stages as the builder's code gives them."""
    calls = r'(?:run|run_actors)\(\s*"([a-z ]+)"|run_recorded\(\s*staging, "([a-z ]+)"|_run\("([a-z ]+)"'
    code = "".join(path.read_text() for path in Path(build_index.__file__).parents[1].glob("index_builder/**/*.py"))
    named = {name for found in re.findall(calls, code) for name in found if name}
    assert named == set(build_index._STAGES)


def test_stages_are_shown_one_after_the_other() -> None:
    stream = io.StringIO()
    with Display(StopSignals(), stream) as display, build_index.StageDisplay(display, "run") as stages:
        assert stages.place() == ""
        stages.tell("clean", 0, 1_000)
        stages.tell("clean", 600, 1_100)
        assert stages.place() == " while cleaning captions (600 of 1,100 rows done)"
        stages.tell("template", 0, 1)
        assert stages.place() == " while training the index"
        stages.tell("calibrate", 2, 2)
        stages.tell("calibrate", 0, 2)  # another round
        assert stages.place() == " while choosing how lists are searched (0 of 2 shards done)"
