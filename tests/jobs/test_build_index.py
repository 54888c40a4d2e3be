from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from jobs import build_index
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
    assert "embed: 2 done" in printed.err
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


@pytest.mark.ray
@pytest.mark.slow
def test_module_starts_its_own_ray(tmp_path: Path, arguments: list[str], start_job: StartJob) -> None:
    job = start_job([sys.executable, "-m", "jobs.build_index", *arguments], tmp_path / "build.log")
    job.wait()
    assert load_manifest(f"{tmp_path}/index").index_id in job.printed()


def test_what_is_missing_is_named_before_ray_starts(
    tmp_path: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_index, "connect", lambda _: pytest.fail("Ray was started for nothing"))
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
