"""A refresh against a full run with the new index, on other inputs, stopped at each place, and without embeddings."""

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest

from index_builder.build import build_index
from jobs import caption, refresh
from jobs.captioning import load
from jobs.captioning.record import load_run_record
from smallcap import storage
from smallcap.config import CaptionConfig, CleaningConfig, IndexConfig
from smallcap.errors import ConfigError
from smallcap.model.files import demo_folder
from smallcap.options import load_config
from smallcap.output.part_files import list_parts, read_part_infos
from smallcap.refresh_config import RefreshConfig
from tests.caption_runs import Killed, config_for, killed_at, read_rows
from tests.in_process_ray import in_process_ray
from tests.input_files import make_tar

SETS = ("output.save_embeddings=true", "output.rows_per_part=4", "compute.batch_size=4")
IMAGES = 12


@pytest.fixture(scope="module")
def old_index(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An index of some of the demo's captions."""
    folder = tmp_path_factory.mktemp("index")
    lines = (demo_folder() / "captions.csv").read_text().splitlines()
    (folder / "captions.csv").write_text("\n".join([lines[0], *lines[1::20]]))
    build_index(demo_index(str(folder / "index"), dumps=(str(folder / "captions.csv"),), encoder="demo", shards=2))
    return str(folder / "index")


def demo_index(out: str, **options: Any) -> IndexConfig:
    return IndexConfig(out=out, cleaning=CleaningConfig(tokenizer="demo"), **options)


@pytest.fixture(scope="module")
def old_run(old_index: str, tmp_path_factory: pytest.TempPathFactory) -> CaptionConfig:
    """A run of the demo's model over some of its scenes, and a broken image."""
    folder = tmp_path_factory.mktemp("old")
    for scene in scenes():
        storage.write_bytes(f"{folder}/images/{scene.name}", scene.read_bytes())
    storage.write_bytes(f"{folder}/images/broken.jpg", b"no image")
    config = config_for(f"{folder}/images", old_index, Path("demo"), f"{folder}/out", *SETS)
    with in_process_ray():
        caption.run(config)
    return config


def scenes() -> list[Path]:
    return sorted((demo_folder() / "images").iterdir())[:IMAGES]


@pytest.fixture(scope="module")
def indexes(old_index: str, old_run: CaptionConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The index, and a copy with a caption more, and without one that some images have retrieved."""
    folder = tmp_path_factory.mktemp("new")
    new = str(folder / "index")
    shutil.copytree(old_index, new)
    rows = read_rows(old_run.out)
    held = [[neighbour["text"] for neighbour in _list(row)] for row in rows.itertuples()]
    (folder / "more.csv").write_text(f"caption\n{rows.caption.iloc[0]} there\n")
    build_index(demo_index(new, dumps=(str(folder / "more.csv"),), add=True))
    build_index(IndexConfig(out=new, remove=(f"text={held[1][0]}",)))
    return old_index, new


def refresh_of(config: CaptionConfig, index: str, out: Path) -> RefreshConfig:
    return load_config(RefreshConfig, flags={"run": config.out, "index": index, "out": str(out)})


def full_run(config: CaptionConfig, index: str, out: Path) -> pd.DataFrame:
    full = config.model_copy(update={"index": (index,), "out": str(out)})
    caption.run(full)
    return read_rows(full.out)


def assert_same(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    """Compares all columns; figures of other batches differ in their last digits."""
    assert list(found.columns) == list(expected.columns)
    assert list(found.image_id) == list(expected.image_id)
    for one, other in zip(found.itertuples(), expected.itertuples(), strict=True):
        for name in ("image_uri", "status", "error_code", "error_message", "caption", "width", "height"):
            assert getattr(one, name) == getattr(other, name) or pd.isna(getattr(other, name)), name
        for name in ("caption_logprob", "clip_score"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), abs=1e-4, nan_ok=True), name
        assert _neighbours(one) == _neighbours(other)
        assert _scores(one) == pytest.approx(_scores(other), abs=1e-5)


def _neighbours(row: Any) -> list[tuple[int, str, list[str]]]:
    return [(n["caption_id"], n["text"], list(n["sources"])) for n in _list(row)]


def _scores(row: Any) -> list[float]:
    return [n["score"] for n in _list(row)]


def _list(row: Any) -> Any:
    return row.neighbours if row.neighbours is not None else []


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The images whose bytes were asked for."""
    uris: list[str] = []
    fetch = load.fetch_objects

    def counted(wanted: Any, *arguments: Any) -> Any:
        uris.extend(wanted)
        return fetch(wanted, *arguments)

    monkeypatch.setattr(load, "fetch_objects", counted)
    return uris


def test_a_refresh_is_a_full_run_that_reads_only_images_whose_texts_differ(
    tmp_path: Path, indexes: tuple[str, str], old_run: CaptionConfig, fetched: list[str]
) -> None:
    summary = refresh.run(refresh_of(old_run, indexes[1], tmp_path / "out"))
    read = sorted(uri.rpartition("/")[2] for uri in fetched)
    found, before = read_rows(str(tmp_path / "out")), read_rows(old_run.out)
    assert_same(found, full_run(old_run, indexes[1], tmp_path / "full"))
    differs = [
        image_id
        for image_id in before.image_id
        if [n[1] for n in _neighbours(before.loc[image_id])] != [n[1] for n in _neighbours(found.loc[image_id])]
    ]
    assert 0 < len(differs) < IMAGES
    assert read == differs
    assert summary.run.new_images == len(differs)
    assert summary.refreshed.carried == IMAGES + 1 - len(differs)
    record = load_run_record(str(tmp_path / "out"))
    assert record is not None
    assert (record.status, record.refreshed, record.images.total) == ("complete", summary.refreshed, IMAGES + 1)

    changes = pq.read_table(tmp_path / "out" / "_changes.parquet").to_pylist()
    assert [row["image_id"] for row in changes] == differs
    for row in changes:
        old, new = before.loc[row["image_id"]], found.loc[row["image_id"]]
        assert (row["caption_before"], row["caption_after"]) == (old.caption, new.caption)
        assert [n["text"] for n in row["neighbours_before"]] == [n[1] for n in _neighbours(old)]
        assert [n["text"] for n in row["neighbours_after"]] == [n[1] for n in _neighbours(new)]
    assert summary.refreshed.changes == len(changes)
    assert summary.refreshed.changed_captions == sum(row["caption_before"] != row["caption_after"] for row in changes)
    assert not (tmp_path / "out" / "_refresh").exists()
    assert "_changes.parquet" in refresh.describe(summary)

    again = refresh.run(refresh_of(old_run, indexes[1], tmp_path / "out"))
    assert (again.run.new_images, again.refreshed) == (0, summary.refreshed)
    # The new run can be refreshed as well, back to where it came from.
    back = refresh.run(refresh_of(old_run.model_copy(update={"out": summary.run.out}), indexes[0], tmp_path / "back"))
    assert back.refreshed.carried == summary.refreshed.carried
    assert_same(read_rows(back.run.out), before)


def test_nothing_is_read_and_no_model_loaded_where_no_text_differs(
    tmp_path: Path,
    indexes: tuple[str, str],
    old_run: CaptionConfig,
    fetched: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(caption, "_caption", lambda *_: pytest.fail("There is nothing to caption."))
    summary = refresh.run(refresh_of(old_run, indexes[0], tmp_path / "out"))
    assert (summary.refreshed.carried, summary.refreshed.changes, fetched) == (IMAGES + 1, 0, [])
    assert_same(read_rows(summary.run.out), read_rows(old_run.out))
    assert pq.read_table(tmp_path / "out" / "_changes.parquet").num_rows == 0


@pytest.mark.parametrize("kind", ["tar", "parquet", "limit"])
def test_other_inputs_are_refreshed_as_well(tmp_path: Path, indexes: tuple[str, str], kind: str) -> None:
    images = tmp_path / "images"
    images.mkdir()
    files = {scene.name: scene.read_bytes() for scene in scenes()}
    sets = [*SETS]
    if kind == "parquet":
        pd.DataFrame({"image": list(files.values()), "image_id": list(files)}).to_parquet(images / "images.parquet")
        sets.append("input.image_column=image")
    elif kind == "tar":
        for number in range(2):
            (images / f"{number}.tar").write_bytes(make_tar(*list(files.items())[number * 6 : number * 6 + 6]))
    else:
        for name, data in files.items():
            (images / name).write_bytes(data)
        sets.append("limit=8")
    config = config_for(str(images), indexes[0], Path("demo"), str(tmp_path / "old"), *sets)
    caption.run(config)
    summary = refresh.run(refresh_of(config, indexes[1], tmp_path / "out"))
    assert 0 < summary.run.new_images < len(read_rows(config.out))
    assert_same(read_rows(summary.run.out), full_run(config, indexes[1], tmp_path / "full"))


@pytest.mark.ray
@pytest.mark.slow
def test_on_ray_actors_that_share_the_index_are_asked(
    s3: str, indexes: tuple[str, str], old_run: CaptionConfig
) -> None:
    shared = old_run.retrieval.model_copy(update={"partitions": 2})
    config = old_run.model_copy(update={"out": f"{s3}/old", "retrieval": shared})
    caption.run(config)
    summary = refresh.run(RefreshConfig(run=config.out, index=(indexes[1],), out=f"{s3}/out"))
    assert 0 < summary.run.new_images < IMAGES
    full = config.model_copy(update={"index": (indexes[1],), "out": f"{s3}/full"})
    caption.run(full)
    assert_same(read_rows(f"{s3}/out"), read_rows(full.out))


def test_a_refresh_that_is_killed_goes_on(
    tmp_path: Path, indexes: tuple[str, str], old_run: CaptionConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = refresh_of(old_run, indexes[1], tmp_path / "whole")
    with killed_at(1000, monkeypatch) as changes:
        refresh.run(whole)
    expected = read_rows(whole.out)
    for step in range(len(changes)):
        config = refresh_of(old_run, indexes[1], tmp_path / f"killed-{step}")
        with killed_at(step, monkeypatch), pytest.raises(Killed):
            refresh.run(config)
        summary = refresh.run(config)
        assert_same(read_rows(config.out), expected)
        assert summary.refreshed.changes == len(pq.read_table(tmp_path / f"killed-{step}" / "_changes.parquet"))
        infos = [info for _, info in read_part_infos(config.out)]
        assert sum(len(ranges) for info in infos for ranges in info.rows.values()) == IMAGES + 1
        shutil.rmtree(config.out)


def test_without_embeddings_all_images_are_captioned_again_and_the_plan_says_so(
    tmp_path: Path, indexes: tuple[str, str], old_run: CaptionConfig, fetched: list[str]
) -> None:
    out = tmp_path / "old"
    shutil.copytree(old_run.out, out)
    shutil.rmtree(out / "_embeddings")
    config = refresh_of(old_run.model_copy(update={"out": str(out)}), indexes[1], tmp_path / "out")
    lines = "\n".join(refresh.plan(config).lines())
    assert "have no saved embeddings" in lines
    assert f"{IMAGES} of {IMAGES + 1} images" in lines
    assert not (tmp_path / "out").exists()
    with_them = refresh.plan(refresh_of(old_run, indexes[1], tmp_path / "out"))
    assert "have no saved embeddings" not in "\n".join(with_them.lines())
    summary = refresh.run(config)
    assert len(fetched) == IMAGES
    assert summary.refreshed.carried == 1  # the broken image
    assert summary.refreshed.changes == IMAGES + 1 - with_them.same
    assert_same(read_rows(summary.run.out), full_run(old_run, indexes[1], tmp_path / "full"))


def test_what_cannot_be_refreshed_is_told_before_anything_is_written(
    tmp_path: Path, indexes: tuple[str, str], old_run: CaptionConfig
) -> None:
    def refused(message: str, error: type[Exception] = ConfigError, **flags: str) -> None:
        config = refresh_of(old_run, indexes[1], tmp_path / "out").model_copy(update=flags)
        with pytest.raises(error, match=message):
            refresh.run(config)
        assert not (tmp_path / "out").exists()

    refused("There is no run", run=str(tmp_path))
    refused("does not change the run", out=old_run.out)
    stopped = tmp_path / "stopped"
    shutil.copytree(old_run.out, stopped)
    record = load_run_record(str(stopped))
    assert record is not None
    record.model_copy(update={"status": "stopped"}).write(str(stopped / "_run.json"))
    refused("Only a complete run", run=str(stopped))
    record.model_copy(update={"index_id": None}).write(str(stopped / "_run.json"))
    refused("retrieves nothing", run=str(stopped))
    record.model_copy(update={"model_id": "another@0"}).write(str(stopped / "_run.json"))
    refused("not the one that made the run", run=str(stopped))
    other = tmp_path / "other"
    shutil.copytree(old_run.out, other)
    with pytest.raises(ConfigError, match="other options"):
        refresh.run(refresh_of(old_run, indexes[1], other))
    assert len(list_parts(str(other))) == len(list_parts(old_run.out))
