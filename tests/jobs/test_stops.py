"""A run that is stopped by a signal, or killed at any step, has each image once after the next attempt."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from index_builder import build
from index_builder.shards.filling import ShardTask, WrittenShard
from jobs import build_index, caption
from jobs.captioning.caption import CaptionImages
from jobs.captioning.record import load_run_record
from jobs.cluster.stopping import SIGNALS, Stopped
from smallcap.config import CaptionConfig, IndexConfig
from smallcap.output.part_files import list_parts, read_part_infos
from tests.caption_runs import Killed, config_for, killed_at, rows_of, undisturbed_rows, write_images

IMAGES = 20
SETS = ("compute.batch_size=2", "output.rows_per_part=8", "output.save_embeddings=true", "output.write=[webdataset]")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("images"))
    write_images(folder, IMAGES)
    return folder


@pytest.fixture
def config(images: str, index: str, tiny_smallcap: Path, tmp_path: Path) -> CaptionConfig:
    return config_for(images, index, tiny_smallcap, str(tmp_path / "out"), *SETS)


@pytest.fixture(scope="module")
def expected(
    images: str, index: str, tiny_smallcap: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[str, str, str]]:
    return undisturbed_rows(config_for(images, index, tiny_smallcap, str(tmp_path_factory.mktemp("expected") / "out")))


@contextmanager
def signal_in_batch(number: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sends this process a signal while an actor captions its `batch`-th batch, counted from 0."""
    seen: list[int] = []
    process = CaptionImages.process

    def interrupted(actor: Any, table: Any) -> Any:
        if len(seen) == batch:
            os.kill(os.getpid(), number)
        seen.append(len(table))
        return process(actor, table)

    with monkeypatch.context() as patch:
        patch.setattr(CaptionImages, "process", interrupted)
        yield


def files_of(out: str) -> list[str]:
    """The files of parts below an output."""
    return sorted(path.relative_to(out).as_posix() for path in Path(out).rglob("part-*"))


FULL_FILES = [
    f"{folder}{name}"
    for folder, end in (("_embeddings/", "parquet"), ("", "parquet"), ("_webdataset/", "tar"))
    for name in (f"part-001-00000{number}.{end}" for number in range(3))
]


@pytest.mark.parametrize("number", SIGNALS)
def test_what_is_captioned_is_written_and_the_same_command_goes_on(
    number: int, config: CaptionConfig, expected: list[tuple[str, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    message = r"^Stopped: 14 of 20 written; the same command goes on$"
    with signal_in_batch(number, 7, monkeypatch), pytest.raises(Stopped, match=message) as stopped:
        caption.run(config)
    assert stopped.value.exit_status == 128 + number
    record = load_run_record(config.out)
    assert record is not None
    assert record.status == "stopped"
    assert (record.attempts[0].images, record.attempts[0].finished_at is None) == (14, False)
    names = [Path(uri).name for uri in list_parts(config.out)]
    assert names == ["part-001-000000.parquet", "part-001-000001-0000.parquet"]

    message = r"^Stopped: 18 of 20 written; the same command goes on$"
    with signal_in_batch(number, 2, monkeypatch), pytest.raises(Stopped, match=message):
        caption.run(config)
    assert caption.run(config).new_images == 2
    assert rows_of(config.out) == expected
    record = load_run_record(config.out)
    assert record is not None
    assert (record.status, record.images.total) == ("complete", IMAGES)
    assert not any("-0000." in name for name in files_of(config.out))
    assert record.account is not None
    assert record.account.captioned == IMAGES


def test_a_signal_before_the_first_caption_says_so(config: CaptionConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with signal_in_batch(signal.SIGINT, 0, monkeypatch), pytest.raises(Stopped, match=r"^Stopped: 0 of 20 written;"):
        caption.run(config)
    with monkeypatch.context() as patch, pytest.raises(Stopped, match=r"^Stopped: the same command goes on$"):
        patch.setattr(caption, "list_work", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        caption.run(config)
    record = load_run_record(config.out)
    assert record is not None
    assert record.status == "stopped"


def test_rows_are_saved_by_time_and_the_full_part_replaces_them(
    config: CaptionConfig, expected: list[tuple[str, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.captioning.write._SAVE_EVERY_S", 0.0)
    listed: list[list[str]] = []
    process = CaptionImages.process

    def noted(actor: Any, table: Any) -> Any:
        listed.append(files_of(config.out))
        return process(actor, table)

    monkeypatch.setattr(CaptionImages, "process", noted)
    summary = caption.run(config)
    assert [name for name in listed[3] if "/" not in name] == [f"part-001-000000-000{n}.parquet" for n in range(3)]
    assert [name for name in listed[4] if "/" not in name] == ["part-001-000000.parquet"]
    assert files_of(config.out) == sorted(FULL_FILES)
    assert rows_of(config.out) == expected
    assert summary.new_images == IMAGES
    assert summary.record.attempts[0].images == IMAGES


@pytest.mark.parametrize(
    "step",
    [0, 3, 9, 12, 20, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 2, 5, 8, 11, 14, 17, 19, 21))],
)
def test_whatever_is_interrupted_each_image_has_one_row_after_the_next_attempt(
    step: int, config: CaptionConfig, expected: list[tuple[str, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps of the first part: three interim parts with two sidecars each, the full part, and nine removals."""
    with monkeypatch.context() as saving, killed_at(step, monkeypatch), pytest.raises(Killed):
        saving.setattr("jobs.captioning.write._SAVE_EVERY_S", 0.0)
        caption.run(config)
    done = sum(len(rows) for _, info in read_part_infos(config.out) for rows in info.rows.values())
    assert caption.run(config).new_images == IMAGES - done
    assert rows_of(config.out) == expected
    record = load_run_record(config.out)
    assert record is not None
    assert (record.status, record.images.ok, record.images.total) == ("complete", IMAGES, IMAGES)
    names = files_of(config.out)
    assert not any(name.count("-") > 2 for name in names), "interim parts are left"
    assert len(names) == 3 * len(list_parts(config.out))  # each with its two sidecars


def test_a_killed_end_of_a_run_is_done_again(
    config: CaptionConfig, expected: list[tuple[str, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped attempt leaves an interim part, and the run's end joins it: killed at each of its steps."""
    with signal_in_batch(signal.SIGINT, 2, monkeypatch), pytest.raises(Stopped):
        caption.run(config)
    finish = caption.finish_run

    def killed_end(config: CaptionConfig, step: int) -> None:
        def run(*arguments: Any) -> Any:
            with killed_at(step, monkeypatch):
                return finish(*arguments)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(caption, "finish_run", run)
            caption.run(config)

    killed_end(config, 0)
    for step in range(6):  # two sidecars, the part, and the removal of the interim part and its sidecars
        again = config.model_copy(update={"out": f"{config.out}-{step}"})
        shutil.copytree(config.out, again.out)
        killed_end(again, step)
        assert rows_of(again.out) == expected
        assert caption.run(again).images.total == IMAGES
        assert rows_of(again.out) == expected
        assert not any(name.count("-") > 2 for name in files_of(again.out))


@pytest.mark.parametrize("number", SIGNALS)
def test_a_build_keeps_the_work_items_that_have_ended(
    number: int, tmp_path: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "captions.csv").write_text("\n".join(["caption", *(f"picture {row}" for row in range(100))]))
    config = IndexConfig(
        dumps=(f"{tmp_path}/captions.csv",), out=f"{tmp_path}/index", encoder=f"hf:{tiny_clip}", shards=4
    )
    write = build.write_shard

    def interrupted(task: ShardTask) -> WrittenShard:  # the last task comes first
        if task.first_id == 25 and os.environ.get("INTERRUPT"):
            os.kill(os.getpid(), number)
        return write(task)

    with monkeypatch.context() as patch:
        patch.setattr(build, "write_shard", interrupted)
        patch.setenv("INTERRUPT", "1")
        message = r"^Stopped while filling shards \(50 of 100 captions done\); what has ended is kept, the same command"
        with pytest.raises(Stopped, match=message) as stopped:
            build_index.run(config)
        assert stopped.value.exit_status == 128 + number
    seen: list[tuple[str, int, int]] = []
    report = build.build_index(config, progress=lambda *told: seen.append(told))
    assert report.manifest.ntotal == 100
    assert [told[1:] for told in seen if told[0] == "shard"] == [(0, 100), (25, 100), (50, 100), (75, 100), (100, 100)]
    assert not any(told[0] == "embed" for told in seen)
