"""Variants in one pass: each is the run that it would be alone, and each image is loaded once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from jobs import caption, variants
from jobs.captioning.record import load_run_record
from jobs.cli import app
from jobs.cluster.stopping import Stopped
from jobs.inspect import inspect_path
from smallcap import storage
from smallcap.config import CaptionConfig
from smallcap.errors import ConfigError, StorageError
from smallcap.images.crops import CropPlan
from smallcap.output.part_files import list_parts, read_part_infos
from smallcap.output.reading import read_captions
from smallcap.output.variant_runs import load_variants
from tests.caption_runs import Killed, config_for, jpeg, killed_at, read_rows, rows_of, write_images

IMAGES = 12
SETS = ("compute.batch_size=4", "output.rows_per_part=5", "output.save_embeddings=true")
TEXTS = ("k0:k=0", "plain", "greedy:num_beams=1,k=2", "words:template='Seen\n\n||\n\nThis is '")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("images"))
    write_images(folder, IMAGES - 1)
    storage.write_bytes(f"{folder}/broken.jpg", b"\xff\xd8\xff broken")
    return folder


@pytest.fixture
def config(images: str, index: str, tiny_smallcap: Path, tmp_path: Path) -> CaptionConfig:
    return config_for(images, index, tiny_smallcap, str(tmp_path / "out"), *SETS)


@pytest.fixture(scope="module")
def alone(
    images: str, index: str, tiny_clip: Path, tiny_smallcap: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], pd.DataFrame]:
    """The rows of a run with a variant's options, which is made once."""
    folder, done = tmp_path_factory.mktemp("alone"), {}

    def rows(text: str) -> pd.DataFrame:
        from tests.in_process_ray import in_process_ray

        if text not in done:
            config = config_for(images, index, tiny_smallcap, f"{folder}/{len(done)}", *SETS)
            (variant,) = variants.make_variants(config, [text])
            retrieval = variant.config.retrieval.model_copy(update={"encoder": f"hf:{tiny_clip}"})
            with in_process_ray():
                caption.run(variant.config.model_copy(update={"retrieval": retrieval}))
            done[text] = read_rows(variant.config.out)
        return done[text]

    return rows


def check(out: str, text: str, alone: Callable[[str], pd.DataFrame], attempts: int | None = None) -> None:
    """Checks that a variant has the rows that its options give alone, each once, and a record that says so."""
    folder = f"{out}/{text.partition(':')[0]}"
    found, expected = read_rows(folder), alone(text)
    assert list(found.columns) == list(expected.columns)
    for name in expected.columns:
        for one, other in zip(found[name], expected[name], strict=True):
            assert plain(one) == plain(other), name
    infos = [info for _, info in read_part_infos(folder)]
    assert sum(len(ranges) for info in infos for ranges in info.rows.values()) == IMAGES
    record = load_run_record(folder)
    assert record is not None
    assert (record.status, record.images.ok, record.images.error) == ("complete", IMAGES - 1, 1)
    assert attempts is None or len(record.attempts) == attempts


def plain(value: Any) -> Any:
    """Returns a cell without what differs between batches: the last digits of numbers."""
    if isinstance(value, np.ndarray | list):
        return [plain(one) for one in value]
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, float | np.floating):
        return None if np.isnan(value) else pytest.approx(float(value), abs=2e-3)
    return value


def test_each_variant_is_the_run_that_it_would_be_alone(
    config: CaptionConfig, alone: Callable[[str], pd.DataFrame], monkeypatch: pytest.MonkeyPatch
) -> None:
    cropped: list[str] = []
    crop = CropPlan.crop
    with monkeypatch.context() as patch:
        patch.setattr(CropPlan, "crop", lambda *arguments: cropped.append(arguments[-1]) or crop(*arguments))
        summary = variants.run(config, TEXTS)
    assert len(cropped) == IMAGES  # once, for all variants
    assert list(summary.runs) == ["k0", "plain", "greedy", "words"]
    assert summary.new_images == 4 * IMAGES
    for text in TEXTS:
        check(config.out, text, alone, attempts=1)
    captions = [tuple(read_rows(f"{config.out}/{name}").caption.dropna()) for name in summary.runs]
    assert len(set(captions)) == 4
    said = variants.describe(summary)
    assert f"smallcap report {config.out}" in said
    assert "k0:\n" in said and said.count("12 rows: 11 ok, 1 error") == 4
    # Each goes on as a run of its own.
    (plain_run,) = variants.make_variants(config, ["plain"])
    assert caption.run(plain_run.config).new_images == 0
    assert variants.run(config, TEXTS).new_images == 0


def test_kills_at_any_step_leave_each_variant_each_image_once(
    config: CaptionConfig, alone: Callable[[str], pd.DataFrame], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = TEXTS[1:3]
    with killed_at(-1, monkeypatch) as changes:
        variants.run(config.model_copy(update={"out": str(tmp_path / "whole")}), texts)
    assert len(changes) > 6
    for step in range(1, len(changes), 3):
        here = config.model_copy(update={"out": str(tmp_path / f"out-{step}")})
        with pytest.raises(Killed), killed_at(step, monkeypatch):
            variants.run(here, texts)
        variants.run(here, texts)
        for text in texts:
            check(here.out, text, alone)


def test_a_variant_that_comes_later_or_lacks_some_rows_gets_only_these(
    config: CaptionConfig, alone: Callable[[str], pd.DataFrame], monkeypatch: pytest.MonkeyPatch
) -> None:
    variants.run(config, TEXTS[1:3])
    kept = list_parts(f"{config.out}/plain")
    (lost, info), *_ = read_part_infos(f"{config.out}/greedy")
    storage.remove(f"{config.out}/greedy/{lost}")
    record = load_run_record(f"{config.out}/greedy")
    assert record is not None
    storage.write_bytes(
        f"{config.out}/greedy/_run.json", record.model_copy(update={"status": "running"}).to_json().encode()
    )
    with monkeypatch.context() as patch:
        patch.setattr("jobs.captioning.work.pin_indexes", lambda *_: pytest.fail("the index may have changed since"))
        summary = variants.run(config, [TEXTS[3], *TEXTS[:3]])
    assert {name: one.new_images for name, one in summary.runs.items()} == {
        "words": IMAGES,
        "k0": IMAGES,
        "plain": 0,
        "greedy": sum(map(len, info.rows.values())),
    }
    assert list_parts(f"{config.out}/plain") == kept
    for text in TEXTS:
        check(config.out, text, alone)
    assert load_variants(config.out) == ("plain", "greedy", "words", "k0")


@pytest.mark.parametrize(
    ("what", "error", "said"),
    [
        (KeyboardInterrupt(), Stopped, "Stopped: 8 rows written by this command"),
        (
            StorageError("There is no such bucket."),
            StorageError,
            r"What was captioned is kept \(8 rows by this command",
        ),
    ],
    ids=["stop", "storage"],
)
def test_what_is_captioned_before_the_end_is_kept(
    what: BaseException,
    error: type[Exception],
    said: str,
    config: CaptionConfig,
    alone: Callable[[str], pd.DataFrame],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from jobs.captioning.caption import CaptionImages

    process, seen = CaptionImages.process, []

    def interrupted(actor: Any, table: Any) -> Any:
        seen.append(len(table))
        if len(seen) == 2:
            raise what
        return process(actor, table)

    with monkeypatch.context() as patch, pytest.raises(error, match=said):
        patch.setattr(CaptionImages, "process", interrupted)
        variants.run(config, TEXTS[:2])
    for name in ("k0", "plain"):
        record = load_run_record(f"{config.out}/{name}")
        assert record is not None
        assert (record.status == "stopped") == (error is Stopped)
        assert len(rows_of(f"{config.out}/{name}")) == 4
    variants.run(config, TEXTS[:2])
    for text in TEXTS[:2]:
        check(config.out, text, alone, attempts=2)


def test_failed_and_overwritten_images_are_captioned_again_in_all_variants(
    images: str, config: CaptionConfig, tmp_path: Path
) -> None:
    own = f"{tmp_path}/images"
    shutil.copytree(images, own)
    config = config.model_copy(update={"images": (own,)})
    variants.run(config, TEXTS[:2])
    storage.write_bytes(f"{own}/broken.jpg", jpeg(50))
    retried = variants.run(config, TEXTS[:2], retry_failed=True)
    assert [one.new_images for one in retried.runs.values()] == [1, 1]
    before = rows_of(f"{config.out}/plain")
    storage.write_bytes(f"{own}/002.jpg", jpeg(51))
    storage.write_bytes(f"{own}/new.jpg", jpeg(52))
    storage.remove(f"{own}/001.jpg")
    relisted = variants.run(config, TEXTS[:3], relist=True)
    # The state of broken.jpg is that of the first listing.
    assert [one.new_images for one in relisted.runs.values()] == [3, 3, IMAGES + 1]
    assert "1 image gone from the input" in variants.describe(relisted)
    for name in ("k0", "plain"):
        rows = rows_of(f"{config.out}/{name}")
        assert len(rows) == IMAGES + 1
        assert {row[0] for row in rows} == {row[0] for row in before} | {"new.jpg"}
        assert all(row[1] == "ok" for row in rows)
    assert variants.run(config, TEXTS[:3], relist=True).new_images == 0
    (plain_run,) = variants.make_variants(config, ["plain"])
    assert caption.run(plain_run.config, relist=True).new_images == 0  # its own list has the new states


def test_what_cannot_be_one_pass_is_refused(
    config: CaptionConfig, finished_run: CaptionConfig, tiny_smallcap: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="holds a run without variants"):
        variants.run(config.model_copy(update={"out": finished_run.out}), ["a"])
    variants.run(config, ["a", "b:k=2"])
    with pytest.raises(ConfigError, match=r"(?s)The output folder holds variants.*found: a, b"):
        caption.run(config)
    with pytest.raises(ConfigError, match=r"(?s)holds a run with other options.*retrieval\.k: 2 → 3"):
        variants.run(config, ["a", "b:k=3"])
    with pytest.raises(ConfigError, match=rf"(?s)There is no run.*name one of them: {config.out}/a, {config.out}/b"):
        read_captions(config.out)
    larger = tmp_path / "larger"
    shutil.copytree(tiny_smallcap, larger)
    model = json.loads((larger / "config.json").read_text())
    model["encoder"]["vision_config"]["image_size"] = 48
    (larger / "config.json").write_text(json.dumps(model))
    with pytest.raises(
        ConfigError, match=r"(?s)cannot be captioned in one pass.*crops of a.*Caption c in a run of its"
    ):
        variants.run(config, ["a", f"c:model={larger}"])


def test_the_commands_know_folders_of_variants(config: CaptionConfig, tmp_path: Path) -> None:
    def smallcap(*arguments: str) -> str:
        result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
        assert result.exit_code == 0
        return result.output

    shared = [*config.images, "--index", *config.index, "--model", config.model, "--out", config.out]
    sets = [word for one in (*SETS, "compute.dtype=float32") for word in ("--set", one)]
    given = [word for text in TEXTS[:3] for word in ("--variant", text)]
    told = json.loads(smallcap("caption", *shared, *sets, *given, "--json").splitlines()[-1])
    assert (told["status"], told["new_images"], list(told["variants"])) == (
        "done",
        3 * IMAGES,
        ["k0", "plain", "greedy"],
    )
    assert told["variants"]["greedy"]["images"]["ok"] == IMAGES - 1
    facts = inspect_path(config.out, samples=1)
    assert (facts["kind"], list(facts["variants"]), len(facts["samples"])) == ("variants", ["k0", "plain", "greedy"], 3)
    assert facts["variants"]["greedy"]["generation.num_beams"] == "1"
    assert "variants" in smallcap("inspect", config.out)
    page = str(tmp_path / "report.html")
    said = smallcap("report", config.out, "--out", page)
    assert f"smallcap report {config.out}/k0 {config.out}/greedy shows another" in " ".join(said.split())
    html = Path(page).read_text()
    assert f"{config.out}/plain" in html
    assert f"{config.out}/greedy" not in html
    references = tmp_path / "references.csv"
    rows = read_rows(f"{config.out}/plain").dropna(subset="caption")
    pd.DataFrame({"image": rows.image_id, "caption": rows.caption}).to_csv(references, index=False)
    table = smallcap("evaluate", config.out, "--references", str(references), "--metrics", "rouge_l")
    assert all(f"{letter}: {config.out}/{name}" in table for letter, name in zip("ABC", told["variants"], strict=True))
    assert "100.0 (+" in table  # `plain` against the first
    assert "in brackets the difference to the first" in " ".join(table.split())


@pytest.mark.slow
@pytest.mark.ray
def test_variants_on_ray_and_in_a_bucket(s3: str, config: CaptionConfig, alone: Callable[[str], pd.DataFrame]) -> None:
    config = config.model_copy(update={"out": f"{s3}/out"})
    summary = variants.run(config, TEXTS)
    assert summary.new_images == 4 * IMAGES
    for text in TEXTS:
        check(config.out, text, alone, attempts=1)
