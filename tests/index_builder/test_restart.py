"""What is killed, at whatever moment, is followed by the index that an undisturbed build makes."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from index_builder.build import build_index
from index_builder.work.staging import STAGING_PREFIX
from smallcap.config import CleaningConfig, IndexConfig
from smallcap.index.manifest import load_manifest
from tests.job_processes import JobProcess, StartJob

SCRIPT = Path(__file__).with_name("killed_build.py")


@pytest.fixture(scope="module")
def undisturbed(tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> IndexConfig:
    """The config of a build that nobody kills, and its index: two dumps of 4,000 captions together, in four shards."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for number in range(2):
        rows = (f"image{row // 2},a picture of thing {row} of dump {number}" for row in range(2_000))
        (folder / f"{number}.csv").write_text("\n".join(["image,caption", *rows]) + "\n")
    config = IndexConfig(
        dumps=(f"{folder}/0.csv", f"{folder}/1.csv"),
        out=f"{folder}/index",
        encoder=f"hf:{tiny_clip}",
        index_key="IVF16,SQ8",
        shards=4,
        cleaning=CleaningConfig(tokenizer=None),
        recall={"target": 0.1, "queries": 64},  # type: ignore[arg-type]
        cache_dir=f"{folder}/cache",
    )
    build_index(config)
    return config


@pytest.fixture
def config(tmp_path: Path, undisturbed: IndexConfig) -> IndexConfig:
    """The same build at another place."""
    return undisturbed.model_copy(update={"out": f"{tmp_path}/index"})


@pytest.fixture
def build(start_job: StartJob, config: IndexConfig, tmp_path: Path) -> Callable[..., JobProcess]:
    """Runs a build that kills the victim after so many items of a stage, and waits for its end."""

    def run(stage: str, done: int, victim: str, status: int) -> JobProcess:
        (tmp_path / "config.json").write_text(config.model_dump_json())
        command = [sys.executable, str(SCRIPT), f"{tmp_path}/config.json", stage, str(done), victim]
        job = start_job(command, tmp_path / "build.log")
        job.wait(250, status)
        return job

    return run


def check_same(config: IndexConfig, undisturbed: IndexConfig) -> None:
    """Looks that both builds published the same index, file by file."""
    found, expected = load_manifest(config.out), load_manifest(undisturbed.out)
    assert found.index_id == expected.index_id
    for entry in expected.files:
        assert (Path(config.out) / entry.file).read_bytes() == (Path(undisturbed.out) / entry.file).read_bytes()


def check_restart(
    config: IndexConfig, undisturbed: IndexConfig, stage: str, victim: str, build: Callable[..., JobProcess]
) -> None:
    """Kills a build, looks that nothing is published, and goes on with it in this process."""
    build(stage, 2, victim, -signal.SIGKILL)
    index = Path(config.out)
    assert not (index / "current.json").exists()
    assert len(list(index.glob(f"{STAGING_PREFIX}*"))) == 1
    seen: list[str] = []
    build_index(config, progress=lambda name, done, total: seen.append(name))
    assert not list(index.glob(f"{STAGING_PREFIX}*"))
    check_same(config, undisturbed)
    if stage in ("template", "shard", "calibrate", "pointer"):
        assert "embed" not in seen  # no part of it was left to do


@pytest.mark.parametrize("stage", [pytest.param("embed", marks=pytest.mark.slow), "shard"])
def test_a_killed_driver(config: IndexConfig, undisturbed: IndexConfig, build: Callable, stage: str) -> None:
    check_restart(config, undisturbed, stage, "process", build)


@pytest.mark.slow
@pytest.mark.own_ray
@pytest.mark.parametrize("stage", ["clean", "dedupe", "embed", "template", "shard", "calibrate", "pointer"])
def test_a_killed_driver_of_a_ray(config: IndexConfig, undisturbed: IndexConfig, build: Callable, stage: str) -> None:
    check_restart(config, undisturbed, stage, "driver", build)


@pytest.mark.slow
@pytest.mark.own_ray
@pytest.mark.parametrize("stage", ["scan", "clean", "dedupe", "embed", "shard"])
def test_a_killed_worker(config: IndexConfig, undisturbed: IndexConfig, build: Callable, stage: str) -> None:
    """Kills the first worker seen at work after an item of the stage is finished."""
    assert "killed ray::" in build(stage, 1, "worker", 0).printed()
    check_same(config, undisturbed)
