"""A takedown: what leaves the index, which runs are refreshed, and that a stopped one goes on."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from index_builder.build import build_index
from jobs import caption, forget, refresh, trace
from jobs.captioning.record import load_run_record
from smallcap.config import CaptionConfig, IndexConfig
from smallcap.errors import ConfigError
from smallcap.index.caption_store import read_texts
from smallcap.index.manifest import load_manifest
from smallcap.options import load_config
from smallcap.output.reading import read_captions
from smallcap.refresh_config import ForgetConfig
from tests.caption_runs import config_for, read_rows, write_images
from tests.index_files import build_text_index

NOUNS, PLACES = ("dog", "bus", "cat"), ("road", "sea", "hill")


@pytest.fixture
def run(tmp_path: Path, tiny_clip: Path, tiny_smallcap: Path) -> CaptionConfig:
    """A run with an index of its own, which a test may change."""
    rows = [f"{n}.jpg,{n} {noun} on the {place}" for n in range(3) for noun in NOUNS for place in PLACES]
    index = build_text_index(tmp_path, tiny_clip, rows)
    write_images(str(tmp_path / "images"), 8)
    sets = ("output.save_embeddings=true", "output.rows_per_part=3")
    config = config_for(str(tmp_path / "images"), index, tiny_smallcap, str(tmp_path / "captions"), *sets)
    caption.run(config)
    return config


def takedown(run: CaptionConfig, out: Path, *removals: str) -> ForgetConfig:
    flags = {"runs": [run.out], "index": run.index[0], "remove": list(removals), "out": str(out)}
    return load_config(ForgetConfig, flags=flags)


def held_text(run: CaptionConfig) -> str:
    text: str = read_rows(run.out).neighbours.iloc[0][0]["text"]
    return text


def texts_of(run: str) -> set[str]:
    rows: Any = read_captions(run, ["neighbours"]).rows()
    return {neighbour["text"] for row in rows for neighbour in row["neighbours"]}


def test_a_text_leaves_the_index_and_the_prompts(tmp_path: Path, run: CaptionConfig) -> None:
    text = held_text(run)
    held = len(trace.traced(read_captions(run.out, ["image_id", "neighbours"]), texts={text}))
    before = texts_of(run.out)
    config = takedown(run, tmp_path / "clean", f"text={text}")
    assert f"{held} image" in forget.describe_plan(forget.plan(config))[0]
    assert not (tmp_path / "clean").exists()
    assert text in texts_of(run.out)

    done = forget.run(config)
    [(use, summary)] = done.runs
    assert summary is not None
    assert use.images == held == summary.refreshed.changes
    assert text not in {one for texts in read_texts(run.index[0]) for one in texts}
    assert text not in texts_of(use.out)
    assert texts_of(run.out) == before  # the old run is as it was
    record = load_run_record(use.out)
    assert record is not None
    assert record.refreshed is not None
    assert record.refreshed.removed == (f"text={text}",)
    assert record.index_id == load_manifest(run.index[0]).index_id
    changed = pq.read_table(tmp_path / "clean" / "captions" / "_changes.parquet")
    assert all(text in [n["text"] for n in row] for row in changed["neighbours_before"].to_pylist())
    assert "delete both" in "\n".join(forget.describe(done))

    again = forget.run(config)
    assert again.report.no_op
    assert [summary.run.new_images for _, summary in again.runs if summary] == [0]


def test_a_takedown_that_stops_after_the_removal_goes_on(
    tmp_path: Path, run: CaptionConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = takedown(run, tmp_path / "clean", f"text={held_text(run)}")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(refresh, "run", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        forget.run(config)
    assert load_manifest(run.index[0]).operation == "remove"
    [(use, summary)] = forget.run(config).runs
    assert summary is not None
    assert use.images == summary.refreshed.changes


def test_a_run_whose_prompts_held_nothing_of_it_stays(tmp_path: Path, run: CaptionConfig) -> None:
    unused = {one for texts in read_texts(run.index[0]) for one in texts} - texts_of(run.out)
    done = forget.run(takedown(run, tmp_path / "clean", f"text={min(unused)}"))
    assert [(use.images, summary) for use, summary in done.runs] == [(0, None)]
    assert not (tmp_path / "clean").exists()
    assert "it stays as it is" in "\n".join(forget.describe(done))


def test_what_cannot_be_forgotten_is_told_before_the_index_changes(tmp_path: Path, run: CaptionConfig) -> None:
    version = load_manifest(run.index[0]).index_id

    def refused(message: str, config: ForgetConfig) -> None:
        with pytest.raises(ConfigError, match=message):
            forget.run(config)
        assert load_manifest(run.index[0]).index_id == version

    text = f"text={held_text(run)}"
    refused("no such source", takedown(run, tmp_path / "clean", "source=other.csv"))
    refused("There is no run", takedown(run, tmp_path / "clean", text).model_copy(update={"runs": (str(tmp_path),)}))
    twice = takedown(run, tmp_path / "clean", text).model_copy(update={"runs": (run.out, run.out)})
    refused("same name", twice)
    refused("does not change the run", takedown(run, tmp_path, text))
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "index", other)
    unused = min({one for texts in read_texts(str(other)) for one in texts} - texts_of(run.out))
    build_index(IndexConfig(out=str(other), remove=(f"text={unused}",)))
    shutil.rmtree(other / "versions" / version)
    elsewhere = takedown(run, tmp_path / "clean", text).model_copy(update={"index": str(other)})
    refused("does not have the version", elsewhere)
    with pytest.raises(ConfigError, match="each must be source=NAME"):
        takedown(run, tmp_path / "clean", "name=x")
