"""A run over several indexes: its rows, its record, and what refreshes, traces and takedowns make of it."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest

from index_builder.build import build_index
from jobs import caption, cli, forget, refresh, report, trace
from jobs.captioning.record import load_existing_run, write_run_record
from jobs.terminal.call_options import ReportOptions, TraceOptions
from smallcap.captioner import Captioner
from smallcap.config import CaptionConfig, IndexConfig
from smallcap.errors import ConfigError
from smallcap.index.manifest import load_manifest
from smallcap.options import load_config
from smallcap.output.part_files import list_parts
from smallcap.refresh_config import ForgetConfig, RefreshConfig
from tests.caption_runs import config_for, jpeg, read_rows, write_images
from tests.in_process_ray import in_process_ray

ROUTES = ["news", "shop", "", None, " news ", "gone", "shop", "", "", "news"]  # of images 0 to 9
DUMPS = {
    "news": [f"{n} {noun} on the {place}" for n in range(3) for noun in ("dog", "bus") for place in ("road", "sea")],
    "shop": [f"{n} {noun} in the {place}" for n in range(3) for noun in ("hat", "vest") for place in ("box", "shop")],
}
BOTH = "a dog that both have"
WEIGHTS = (1.0, 0.9)


@pytest.fixture(scope="module")
def made(tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two indexes, `news` and `shop`, and with images and a list of them."""
    folder = tmp_path_factory.mktemp("several")
    for name, texts in DUMPS.items():
        (folder / f"{name}.csv").write_text("\n".join(["caption", *texts, BOTH]))
        build_index(
            IndexConfig(
                dumps=(str(folder / f"{name}.csv"),),
                out=str(folder / name),
                encoder=f"hf:{tiny_clip}",
                shards=2 if name == "news" else 1,
            )
        )
    write_images(str(folder / "images"), len(ROUTES))
    with (folder / "images.csv").open("w", newline="") as file:
        rows = [(f"images/{n:03d}.jpg", f"{n:03d}", route) for n, route in enumerate(ROUTES)]
        csv.writer(file).writerows([("image_uri", "image_id", "where"), *rows])
    return folder


def several(made: Path, model: Path, out: str, *sets: str) -> CaptionConfig:
    """A run over both indexes, whose list chooses among them."""
    options = (
        f"index=[{made}/news, {made}/shop]",
        f"retrieval.index_weights=[{WEIGHTS[0]}, {WEIGHTS[1]}]",
        "retrieval.index_column=where",
        *("output.save_embeddings=true", "output.rows_per_part=4", "compute.batch_size=4"),
    )
    return config_for(f"{made}/images.csv", "", model, out, *options, *sets)


@pytest.fixture(scope="module")
def finished(made: Path, tiny_smallcap: Path, tmp_path_factory: pytest.TempPathFactory) -> CaptionConfig:
    config = several(made, tiny_smallcap, str(tmp_path_factory.mktemp("run") / "out"))
    with in_process_ray():
        caption.run(config)
    return config


def held(row: Any) -> list[tuple[int, str, list[str]]]:
    return [(one["caption_id"], one["text"], list(one["sources"])) for one in row.neighbours]


def captioned(rows: pd.DataFrame) -> list[Any]:
    return list(rows[rows.status == "ok"].itertuples())


def texts_of(rows: pd.DataFrame) -> list[str]:
    return [text for row in captioned(rows) for _, text, _ in held(row)]


def assert_same(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    assert list(found.image_id) == list(expected.image_id)
    for one, other in zip(found.itertuples(), expected.itertuples(), strict=True):
        assert (one.status, one.caption, one.error_code) == (other.status, other.caption, other.error_code)
        if one.status == "ok":
            assert held(one) == held(other)
            scores = [[n["score"] for n in row.neighbours] for row in (one, other)]
            assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_rows_have_the_best_captions_of_the_indexes_that_their_image_names(
    made: Path, tiny_smallcap: Path, finished: CaptionConfig
) -> None:
    rows = read_rows(finished.out)
    uris = [str(made / "news"), str(made / "shop")]
    captioner = Captioner.from_pretrained(str(tiny_smallcap), uris, dtype="float32", index_weights=WEIGHTS)
    names = [(route or "").strip() or None for route in ROUTES]
    known = [place for place, name in enumerate(names) if name != "gone"]
    results = captioner.caption([jpeg(place) for place in known], indexes=[names[place] for place in known])
    for place, result in zip(known, results, strict=True):
        row = rows.iloc[place]
        assert row.caption == result.caption
        assert held(row) == [(one.caption_id, one.text, list(one.sources)) for one in result.neighbours]
        searched = {source.partition("/")[0] for *_, sources in held(row) for source in sources}
        assert searched == {names[place]} if names[place] else searched <= {"news", "shop"}
    refused = rows.iloc[ROUTES.index("gone")]
    assert (refused.status, refused.error_code) == ("error", "unknown_index")
    assert refused.error_message == (
        "The run has no index of the name in where (gone). It has news, shop; a row without a name searches all."
    )
    assert rows["where"].fillna("").tolist() == [route or "" for route in ROUTES]  # kept
    with pytest.raises(ConfigError, match="no index of this name"):
        captioner.caption([jpeg(0)], indexes=["gone"])
    with pytest.raises(ValueError, match="indexes: expected 1 names, one for each image, found 2"):
        captioner.caption([jpeg(0)], indexes=["news", None])


def test_a_text_that_both_have_counts_once_and_has_the_sources_of_both(made: Path, tiny_smallcap: Path) -> None:
    uris = [str(made / "news"), str(made / "shop")]
    captioner = Captioner.from_pretrained(str(tiny_smallcap), uris, dtype="float32", k=26)
    (result,) = captioner.caption([jpeg(0)])
    assert len(result.neighbours) == 25  # of 26 rows
    assert {one.text: one.sources for one in result.neighbours}[BOTH] == ("news/news.csv", "shop/shop.csv")
    weighted = Captioner.from_pretrained(str(tiny_smallcap), uris, k=26, dtype="float32", index_weights=(0.5, 2))
    (result,) = weighted.caption([jpeg(0)])
    assert {one.text: one.sources for one in result.neighbours}[BOTH] == ("shop/shop.csv", "news/news.csv")


def test_the_record_pins_all_versions_and_other_options_are_another_run(
    finished: CaptionConfig, made: Path, tiny_smallcap: Path
) -> None:
    versions = [load_manifest(str(made / name)).index_id for name in ("news", "shop")]
    record = load_existing_run(finished.out)
    assert record.index_id == "+".join(versions)
    assert [(index.name, index.weight, version) for index, version in record.indexes] == [
        ("news", 1.0, versions[0]),
        ("shop", 0.9, versions[1]),
    ]
    assert record.config["index"] == [str(made / "news"), str(made / "shop")]
    for part in list_parts(finished.out):
        assert pq.read_schema(part).metadata[b"smallcap.index_id"].decode() == record.index_id
    assert caption.run(finished).new_images == 0
    for change in ("retrieval.index_weights=[1, 1]", "retrieval.index_names=[a, b]", "retrieval.index_column=other"):
        with pytest.raises(ConfigError, match="other options"):
            caption.run(several(made, tiny_smallcap, finished.out, change))


def test_actors_that_share_the_indexes_change_no_row(
    made: Path, tiny_smallcap: Path, finished: CaptionConfig, tmp_path: Path
) -> None:
    config = several(made, tiny_smallcap, f"{tmp_path}/out", "retrieval.partitions=2")  # shop has one shard
    caption.run(config)
    assert_same(read_rows(config.out), read_rows(finished.out))


def test_what_cannot_be_searched_together_is_told_before_anything_is_written(
    made: Path, tiny_smallcap: Path, other_clip: Path, tmp_path: Path
) -> None:
    dump = str(made / "news.csv")
    build_index(IndexConfig(dumps=(dump,), out=str(tmp_path / "other"), encoder=f"hf:{other_clip}"))
    config = several(made, tiny_smallcap, f"{tmp_path}/out")
    with pytest.raises(ConfigError, match=r"different retrieval encoders[^$]*build-index --from"):
        caption.run(config.model_copy(update={"index": (str(made / "news"), str(tmp_path / "other"))}))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match=r"holds no names of indexes[^$]*retrieval.index_column: number"):
        (tmp_path / "images.jsonl").write_text(json.dumps({"image_uri": str(made / "images/000.jpg"), "number": 1}))
        numbered = several(made, tiny_smallcap, f"{tmp_path}/out", "retrieval.index_column=number")
        caption.run(numbered.model_copy(update={"images": (str(tmp_path / "images.jsonl"),)}))


@pytest.fixture
def changed(made: Path, tmp_path: Path, finished: CaptionConfig) -> Path:
    """Copies of the indexes, of which `shop` lacks a caption that was retrieved and has another one."""
    for name in ("news", "shop"):
        shutil.copytree(made / name, tmp_path / name)
    gone = next(text for text in texts_of(read_rows(finished.out)) if text in DUMPS["shop"])
    (tmp_path / "more.csv").write_text("caption\n9 hats in the shop\n")
    build_index(IndexConfig(dumps=(str(tmp_path / "more.csv"),), out=str(tmp_path / "shop"), add=True))
    build_index(IndexConfig(out=str(tmp_path / "shop"), remove=(f"text={gone}",)))
    return tmp_path


def moved(run: CaptionConfig, folder: Path) -> str:
    """Copies a run, and has it retrieve from the indexes in a folder; returns its place."""
    out = str(folder / "moved")
    shutil.copytree(run.out, out)
    record = load_existing_run(out)
    config = record.config | {"index": [str(folder / "news"), str(folder / "shop")], "out": out}
    write_run_record(out, record.model_copy(update={"config": config}))
    return out


def test_a_refresh_is_a_full_run_and_keeps_weights_by_their_index(
    changed: Path, finished: CaptionConfig, made: Path, tiny_smallcap: Path
) -> None:
    run = moved(finished, changed)
    flags = {"run": run, "index": [str(changed / "news"), str(changed / "shop")], "out": str(changed / "out")}
    planned = refresh.plan(load_config(RefreshConfig, flags=flags))
    summary = refresh.run(load_config(RefreshConfig, flags=flags))
    assert 0 < summary.run.new_images < len(ROUTES)
    assert planned.same + summary.run.new_images == len(ROUTES)
    full = several(changed, tiny_smallcap, str(changed / "full")).model_copy(update={"images": finished.images})
    caption.run(full)
    assert_same(read_rows(summary.run.out), read_rows(full.out))
    assert [index.weight for index, _ in load_existing_run(summary.run.out).indexes] == list(WEIGHTS)

    # One index takes the place of both: images that name the other one cannot be captioned any more.
    alone = load_config(RefreshConfig, flags=flags | {"index": str(changed / "shop"), "out": str(changed / "alone")})
    with pytest.raises(ConfigError, match="one name and one weight"):
        refresh.run(alone.model_copy(update={"index_weights": WEIGHTS}))
    refresh.run(alone)
    found = read_rows(str(changed / "alone"))
    names = [(route or "").strip() or None for route in ROUTES]
    assert [code == "unknown_index" for code in found.error_code] == [name in ("news", "gone") for name in names]
    sources = {source for row in captioned(found) for one in held(row) for source in one[2]}
    assert {"shop.csv"} <= sources <= {"shop.csv", "more.csv"}


def test_captions_are_traced_by_their_index(finished: CaptionConfig, made: Path, index: str) -> None:
    rows = captioned(read_rows(finished.out))

    def traced(**named: Any) -> set[tuple[str, str]]:
        found = trace.trace(load_config(TraceOptions, flags={"run": finished.out, **named}))
        return {(row["image_id"], one["text"]) for row in found.rows() for one in row["neighbours"]}

    def expected(wanted: Any) -> set[tuple[str, str]]:
        return {(row.image_id, one[1]) for row in rows for one in held(row) if wanted(*one)}

    of_shop = expected(lambda n, text, sources: any(source.startswith("shop/") for source in sources))
    assert of_shop
    for source in ("shop.csv", "shop/shop.csv", str(made / "shop.csv")):
        assert traced(source=[source]) == of_shop
    assert traced(index="shop") == traced(index="shop", source=["shop.csv"]) == of_shop
    caption_id, text, _ = next(one for row in rows for one in held(row) if one[2] == ["shop/shop.csv"])
    by_id = traced(index="shop", caption_id=[caption_id])
    assert by_id == expected(lambda n, one, sources: one == text)
    assert traced(index="news", caption_id=[caption_id]) == expected(
        lambda n, _, sources: n == caption_id and sources[0].startswith("news/")
    )
    assert traced(index="shop", text=[text]) == by_id
    assert traced(index="news", text=[text]) == set()
    for message, named in (
        ("no such index[^$]*expected: news, shop", {"index": "index"}),
        ("each has a caption of this id", {"caption_id": [1]}),
        ("no such source", {"source": ["shop.csv"], "index": "news"}),
    ):
        with pytest.raises(ConfigError, match=message):
            traced(**named)


def test_of_one_index_none_is_named(finished_run: CaptionConfig) -> None:
    with pytest.raises(ConfigError, match="does not have several indexes"):
        trace.trace(load_config(TraceOptions, flags={"run": finished_run.out, "index": "index"}))


def test_captions_are_forgotten_in_one_of_the_indexes(changed: Path, finished: CaptionConfig) -> None:
    run = moved(finished, changed)
    before = [load_manifest(str(changed / name)).index_id for name in ("news", "shop")]
    rows = read_rows(run)
    text = next(text for text in texts_of(rows) if text in DUMPS["news"])
    flags = {"runs": [run], "index": str(changed / "news"), "remove": [f"text={text}"], "out": str(changed / "clean")}
    config = load_config(ForgetConfig, flags=flags)
    [use] = forget.plan(config)
    assert use.images == sum(text in [one[1] for one in held(row)] for row in captioned(rows))
    [(_, summary)] = forget.run(config).runs
    assert summary is not None
    record = load_existing_run(use.out)
    assert [version for _, version in record.indexes] == [load_manifest(str(changed / "news")).index_id, before[1]]
    assert [(index.name, index.weight) for index, _ in record.indexes] == [("news", 1.0), ("shop", 0.9)]
    assert text not in texts_of(read_rows(use.out))
    shutil.rmtree(changed / "news" / "versions" / before[0])
    versions = " or ".join(version for _, version in load_existing_run(run).indexes)
    with pytest.raises(ConfigError, match=f"does not have the version[^$]*expected: version {versions}"):
        forget.plan(config)


def test_the_indexes_are_shown(
    finished: CaptionConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = load_existing_run(finished.out)
    report.run(ReportOptions(path=finished.out, out=f"{tmp_path}/report.html"))
    page = (tmp_path / "report.html").read_text()
    monkeypatch.setattr("sys.argv", ["smallcap", finished.out, "--json"])
    with pytest.raises(SystemExit):
        cli.main("inspect")
    facts = json.loads(capsys.readouterr().out)
    assert facts["index_id"] == record.index_id
    assert facts["config"]["index"] == [index.uri for index, _ in record.indexes]
    for index, version in record.indexes:
        assert f"Index {index.name}" in page
        assert f"{index.uri}  (version {version}, weight {index.weight:g})" in page
