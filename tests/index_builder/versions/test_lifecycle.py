import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

import index_builder.build as build_module
from index_builder.build import BuildReport, build_index
from index_builder.versions.lifecycle import collect_garbage, list_versions, parse_grace, use_version
from jobs.build_index import advice
from smallcap import storage
from smallcap.config import CleaningConfig, IndexConfig
from smallcap.errors import ConfigError, ConflictError, IndexIntegrityError, ManifestError
from smallcap.index.caption_store import load_caption_sample, read_texts
from smallcap.index.manifest import load_manifest, load_pointer, switch_pointer
from smallcap.index.retriever import Retriever
from smallcap.model.clip_encoder import load_retrieval_encoder

WORDS = ("dog", "cat", "ball", "boat", "tree", "kite", "house", "bird", "lamp", "cup")
PLACES = ("park", "sea", "room", "street", "hill", "wood")
GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "index_v1_flat" / "index"

Build = Callable[..., BuildReport]


@pytest.fixture
def build(tmp_path: Path, tiny_clip: Path) -> Build:
    """Builds `tmp_path/index` from rows of (image, text), written to a dump of the given name."""

    def run(rows: Sequence[tuple[str, str]] = (), name: str = "first.csv", **options: object) -> BuildReport:
        if rows:
            lines = ["image,caption", *(f"{image},{text}" for image, text in rows)]
            (tmp_path / name).write_text("\n".join(lines) + "\n")
            options.setdefault("dumps", (str(tmp_path / name),))
        options.setdefault("out", str(tmp_path / "index"))
        options.setdefault("encoder", f"hf:{tiny_clip}")
        options.setdefault("cache_dir", str(tmp_path / "cache"))
        return build_index(IndexConfig(cleaning=CleaningConfig(tokenizer=None), **options))  # type: ignore[arg-type]

    return run


def rows_of(start: int, stop: int) -> list[tuple[str, str]]:
    """Different captions, two of each image."""
    texts = [f"a {word} and a {other} in the {place}" for word in WORDS for other in WORDS for place in PLACES]
    return [(f"image{number // 2}", texts[number]) for number in range(start, stop)]


def open_index(report: BuildReport, tmp_path: Path) -> Retriever:
    return Retriever.open(report.index_uri, cache_dir=str(tmp_path / "cache"))


def queries_of(tiny_clip: Path, *texts: str) -> np.ndarray:
    return load_retrieval_encoder(f"hf:{tiny_clip}").encode_texts(texts)


def nearest(retriever: Retriever, queries: np.ndarray, k: int = 5) -> list[list[tuple[str, float]]]:
    """The neighbours' texts and scores; equal scores in the order of the texts, as ids differ between indexes."""
    return [
        [(n.text, round(n.score, 3)) for n in sorted(row, key=lambda n: (-round(n.score, 3), n.text))]
        for row in retriever.search(queries, k)
    ]


def captions_of(retriever: Retriever) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    return {row.text: (row.sources, row.image_ids) for row in retriever.captions.sample(10_000)}


KEYS = ("Flat", "IVF4,SQfp16", "IVF4,SQ8", "SQ8")


@pytest.mark.parametrize("key", KEYS)
def test_adding_equals_building_at_once(tmp_path: Path, tiny_clip: Path, build: Build, key: str) -> None:
    rows = rows_of(0, 300)
    queries = queries_of(tiny_clip, *(text for _, text in rows[::23]))
    options = {"index_key": key, "recall": {"target": 0.5}}
    first = build(rows[:200], shards=2, **options)
    more = [*rows[200:], ("other-image", rows[5][1].upper()), ("image0", rows[0][1]), ("image9", rows[250][1])]
    added = build(more, "second.csv", add=True, encoder=None, **(options | {"index_key": "auto"}))
    manifest = added.manifest
    assert (added.new_captions, added.embedded, manifest.ntotal) == (100, 100, 300)
    assert (manifest.operation, manifest.parents) == ("add", (first.manifest.index_id,))
    assert manifest.shards[:2] == first.manifest.shards  # files are shared, not copied
    assert manifest.template == first.manifest.template
    assert manifest.trained_on == 200
    assert manifest.dropped["duplicate"] == 3
    assert [source.name for source in manifest.sources] == ["first.csv", "second.csv"]
    assert [source.rows for source in manifest.sources] == [200, 103]
    assert manifest.ntotal + sum(manifest.dropped.values()) == 303

    retriever = open_index(added, tmp_path)
    captions = captions_of(retriever)
    assert captions[rows[5][1]] == (("first.csv", "second.csv"), ("image2", "other-image"))
    assert captions[rows[0][1]] == (("first.csv", "second.csv"), ("image0",))
    assert captions[rows[250][1]] == (("second.csv",), ("image125", "image9"))
    at_once = build(
        (), dumps=(str(tmp_path / "first.csv"), str(tmp_path / "second.csv")), out=str(tmp_path / "once"), **options
    )
    both = open_index(at_once, tmp_path)
    assert captions_of(both) == captions
    if key == "Flat":
        assert nearest(retriever, queries) == nearest(both, queries)
    # The caption that the second dump gave another image is left out for that image, too.
    excluded = retriever.search(queries_of(tiny_clip, rows[5][1]), 300, ["other-image"])[0]
    assert rows[5][1] not in {neighbour.text for neighbour in excluded}


def test_adding_what_is_there_changes_nothing(tmp_path: Path, build: Build) -> None:
    first = build(rows_of(0, 50))
    assert build((), dumps=(str(tmp_path / "first.csv"),), add=True).no_op  # the same file
    again = build([(image, text.upper()) for image, text in rows_of(10, 20)], "again.csv", add=True)
    assert not again.no_op  # another source that has them
    assert (again.new_captions, again.manifest.shards) == (0, first.manifest.shards)
    assert build((), dumps=(str(tmp_path / "again.csv"),), add=True).no_op


def test_adding_needs_an_index_of_the_same_encoder_and_key(tmp_path: Path, other_clip: Path, build: Build) -> None:
    with pytest.raises(ManifestError, match="no published index to add to"):
        build(rows_of(0, 10), add=True)
    build(rows_of(0, 10))
    with pytest.raises(IndexIntegrityError, match="another retrieval encoder"):
        build(rows_of(10, 20), "more.csv", add=True, encoder=f"hf:{other_clip}")
    with pytest.raises(ConfigError, match="the key of that index"):
        build(rows_of(10, 20), "more.csv", add=True, index_key="SQ8")


@pytest.mark.parametrize("key", KEYS)
def test_removing_by_source_image_and_text(tmp_path: Path, tiny_clip: Path, build: Build, key: str) -> None:
    rows = rows_of(0, 120)
    options = {"index_key": key, "recall": {"target": 0.2}, "shards": 3}
    both = [*rows[100:], ("image3", rows[40][1])]
    (tmp_path / "second.csv").write_text("image,caption\n" + "".join(f"{image},{text}\n" for image, text in both))
    build(rows[:100], dumps=(str(tmp_path / "first.csv"), str(tmp_path / "second.csv")), **options)
    (tmp_path / "ids.txt").write_text("image0\nimage20\n")
    (tmp_path / "texts.txt").write_text(rows[30][1].upper() + "\n\n")

    report = build(remove=(f"image=@{tmp_path}/ids.txt", f"text=@{tmp_path}/texts.txt"), encoder=None)
    gone = {rows[number][1] for number in (0, 1, 30, 41)}  # caption 40 is image3's as well
    assert report.manifest.ntotal == 116
    assert report.manifest.dropped["removed"] == 4
    assert report.manifest.removed is not None and report.manifest.removed.rows == 4
    retriever = open_index(report, tmp_path)
    everything = {n.text for n in retriever.search(queries_of(tiny_clip, rows[0][1]), 120)[0]}
    assert everything.isdisjoint(gone)
    if key in ("Flat", "SQ8"):  # no lists to miss any
        assert len(everything) == 116
    assert captions_of(retriever)[rows[40][1]][1] == ("image3",)

    report = build(remove=("source=second.csv",), encoder=None)
    assert report.manifest.ntotal == 96
    assert captions_of(open_index(report, tmp_path))[rows[40][1]][0] == ("first.csv",)
    assert "rebuild with --compact" in advice(report.manifest)[0]
    assert build(remove=("source=second.csv",), encoder=None).no_op

    compacted = build(compact=True, encoder=None, **(options | {"index_key": "auto"}))
    assert compacted.manifest.index_key == {"IVF4,SQfp16": "IVF2,SQfp16", "IVF4,SQ8": "IVF2,SQ8"}.get(key, key)
    assert (compacted.manifest.ntotal, compacted.manifest.id_count, compacted.manifest.removed) == (96, 96, None)
    assert compacted.embedded == 0
    texts = set(captions_of(open_index(compacted, tmp_path)))
    assert texts == {text for _, text in rows[:100]} - gone
    assert advice(compacted.manifest) == []
    assert build(compact=True, encoder=None).no_op

    _, samples = load_caption_sample(report.index_uri, 1000, report.manifest.index_id)
    assert {row.text for row in samples} <= texts  # what was removed is not shown
    live = [text for batch in read_texts(report.index_uri, report.manifest.index_id) for text in batch]
    assert sorted(live) == sorted(texts)

    readded = build(rows[:2], "third.csv", add=True, encoder=None)
    assert (readded.new_captions, readded.manifest.ntotal) == (2, 98)


def test_a_removed_caption_can_come_back(tmp_path: Path, tiny_clip: Path, build: Build) -> None:
    build(rows_of(0, 40))
    [(_, text)] = rows_of(7, 8)
    build(remove=(f"text={text}",), encoder=None)
    report = build(rows_of(7, 8), "again.csv", add=True)
    assert (report.new_captions, report.manifest.ntotal, report.manifest.id_count) == (1, 40, 41)
    [[best]] = open_index(report, tmp_path).search(queries_of(tiny_clip, text), 1)
    assert best.caption_id == 40


def test_what_cannot_be_removed(tmp_path: Path, build: Build) -> None:
    build(rows_of(0, 10))
    with pytest.raises(ConfigError, match=r"no such source(.|\n)*first.csv"):
        build(remove=("source=none.csv",))
    with pytest.raises(ConfigError, match="Nothing would be left"):
        build(remove=(f"source={tmp_path}/first.csv",))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ConfigError, match="empty"):
        build(remove=(f"image=@{tmp_path}/empty.txt",))
    with pytest.raises(ValueError, match="source=NAME"):
        build(remove=("sources=none.csv",))


def test_a_union_of_indexes_embeds_only_for_another_encoder(
    tmp_path: Path, tiny_clip: Path, other_clip: Path, build: Build
) -> None:
    build(rows_of(0, 60), out=str(tmp_path / "a"))
    (tmp_path / "elsewhere").mkdir()
    options = {"index_key": "SQ8", "recall": {"target": 0.2}}
    more = [("x", rows_of(3, 4)[0][1]), *rows_of(60, 100)]
    build(more, "elsewhere/first.csv", out=str(tmp_path / "b"), **options)
    indexes = (str(tmp_path / "a"), str(tmp_path / "b"))
    union = build(from_indexes=indexes, encoder=None, index_key="Flat")
    assert (union.new_captions, union.embedded) == (100, 0)
    assert [source.name for source in union.manifest.sources] == ["first.csv", "first.csv#2"]
    assert union.manifest.parents == tuple(load_manifest(index).index_id for index in indexes)
    captions = captions_of(open_index(union, tmp_path))
    assert captions[rows_of(3, 4)[0][1]] == (("first.csv", "first.csv#2"), ("image1", "x"))
    at_once = build(rows_of(0, 100), "all.csv", out=str(tmp_path / "once"))
    queries = queries_of(tiny_clip, *(text for _, text in rows_of(0, 100)[::9]))
    found, expected = nearest(open_index(union, tmp_path), queries), nearest(open_index(at_once, tmp_path), queries, 1)
    close = zip(found, expected, strict=True)
    assert all(best in {text for text, _ in mine} for mine, [(best, _)] in close)  # float16 mixes up near ties
    other = build(from_indexes=(str(tmp_path / "a"),), encoder=f"hf:{other_clip}")
    assert (other.new_captions, other.embedded) == (60, 60)


def test_embeddings_are_lent(tmp_path: Path, build: Build) -> None:
    build(rows_of(0, 60), out=str(tmp_path / "old"))
    report = build(rows_of(30, 80), "new.csv", reuse=(str(tmp_path / "old"),))
    assert (report.new_captions, report.embedded) == (50, 20)
    assert [source.name for source in report.manifest.sources] == ["new.csv"]


def test_an_index_is_removed_from_and_compacted_without_its_encoder(tmp_path: Path, build: Build) -> None:
    index = tmp_path / "index"
    shutil.copytree(GOLDEN, index)
    old, [row] = load_caption_sample(str(index), 1)
    assert (old.format_version, len(old.shards)) == (1, 2)
    report = build(remove=(f"text={row.text}", "source=texts.jsonl"), encoder=None)
    assert report.manifest.ntotal == old.ntotal - 2
    assert report.manifest.shards == old.shards
    assert use_version(str(index), old.index_id).index_id == old.index_id
    use_version(str(index), "previous")
    compacted = build(compact=True, encoder=None)
    assert compacted.embedded == 0
    captions = captions_of(open_index(compacted, tmp_path))
    assert len(captions) == old.ntotal - 2
    assert row.text not in captions
    assert captions["a red dog"] == (("captions.csv",), ("image0.jpg", "image1.jpg"))
    garbage = collect_garbage(str(index), timedelta(0), keep=0)
    assert set(garbage.versions) == {old.index_id, report.manifest.index_id}
    assert len(captions_of(open_index(compacted, tmp_path))) == old.ntotal - 2


class TestVersions:
    def test_going_back_and_forth(self, anywhere: str, build: Build) -> None:
        first = build(rows_of(0, 20), out=anywhere).manifest.index_id
        second = build(rows_of(20, 40), "second.csv", add=True, out=anywhere).manifest.index_id
        versions = [(v.manifest.index_id, v.is_current) for v in list_versions(anywhere)]
        assert sorted(versions) == sorted([(second, True), (first, False)])
        assert use_version(anywhere, "previous").index_id == first
        assert load_pointer(anywhere).index_id == first
        assert use_version(anywhere, second[:6]).index_id == second
        for wrong in ("zzzz", ""):
            with pytest.raises(ConfigError, match="version"):
                use_version(anywhere, wrong)

    def test_garbage_is_what_no_version_needs(self, tmp_path: Path, anywhere: str, build: Build) -> None:
        first = build(rows_of(0, 20), out=anywhere).manifest
        second = build(rows_of(20, 40), "second.csv", add=True, out=anywhere).manifest
        third = build(rows_of(40, 60), "third.csv", out=anywhere).manifest
        storage.write_bytes(f"{anywhere}/files/stray.bin", b"x" * 100)
        assert collect_garbage(anywhere).files == ()  # all is too young
        would = collect_garbage(anywhere, timedelta(0), keep=1, dry_run=True)
        assert would.versions == (first.index_id,)
        assert len(list_versions(anywhere)) == 3
        done = collect_garbage(anywhere, timedelta(0), keep=1)
        assert done == would
        assert [uri.rsplit("/", 1)[-1] for uri in done.files] == ["stray.bin"]  # the second version needs the first's
        assert done.bytes == 100
        done = collect_garbage(anywhere, timedelta(0), keep=0)
        assert done.versions == (second.index_id,)
        left = {f"files/{uri.rsplit('/', 1)[-1]}" for uri in storage.list_folder(f"{anywhere}/files")}
        assert left == {entry.file for entry in third.files}
        Retriever.open(anywhere, cache_dir=str(tmp_path / "cache"))

    def test_a_version_stays_some_time_after_it_was_current(self, tmp_path: Path, build: Build) -> None:
        index = str(tmp_path / "index")
        first = build(rows_of(0, 20)).manifest
        time.sleep(2.1)  # the pointer's times are in whole seconds
        build(rows_of(0, 30), "second.csv")
        assert collect_garbage(index, timedelta(seconds=2), keep=0, dry_run=True).versions == ()
        time.sleep(2.1)
        assert collect_garbage(index, timedelta(seconds=2), keep=0, dry_run=True).versions == (first.index_id,)

    def test_files_of_a_running_build_stay(self, tmp_path: Path, build: Build) -> None:
        from index_builder.work.staging import Staging

        index = tmp_path / "index"
        build(rows_of(0, 20))
        (index / "files" / "stray.bin").write_bytes(b"x")
        os.utime(index / "files" / "stray.bin", (1, 1))
        with Staging(str(index), "0" * 64):
            assert collect_garbage(str(index), timedelta(0)).files == ()
        assert len(collect_garbage(str(index), timedelta(0)).files) == 1

    def test_durations(self) -> None:
        assert parse_grace("90s") == timedelta(seconds=90)
        assert parse_grace("7d") == timedelta(days=7)
        for wrong in ("", "7", "d", "-1d", "1.5h"):
            with pytest.raises(ConfigError, match="duration"):
                parse_grace(wrong)


def test_of_two_publishers_the_second_is_told(
    tmp_path: Path, anywhere: str, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(rows_of(0, 20), out=anywhere).manifest.index_id
    publish = build_module.publish_version

    def publish_late(*arguments: object) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(build_module, "publish_version", publish)
            build(rows_of(50, 60), "other.csv", add=True, out=anywhere)  # another process, meanwhile
        publish(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "publish_version", publish_late)
        with pytest.raises(ConflictError, match=r"published a version in the meantime(.|\n)*index use"):
            build(rows_of(20, 40), "second.csv", add=True, out=anywhere)
    winner = load_manifest(anywhere)
    assert (winner.ntotal, winner.parents) == (30, (first,))
    report = build((), dumps=(str(tmp_path / "second.csv"),), add=True, out=anywhere)
    assert report.manifest.ntotal == 50
    assert len(list_versions(anywhere)) == 4


def test_of_two_processes_that_publish_at_once_one_wins(anywhere: str, build: Build) -> None:
    """The pointer itself: both have seen the same version, and switch in the same instant."""
    first = build(rows_of(0, 20), out=anywhere).manifest.index_id
    others = [f"{number:016x}" for number in range(6)]

    def publish(index_id: str) -> bool:
        try:
            switch_pointer(anywhere, index_id, first)
        except ConflictError:
            return False
        return True

    with ThreadPoolExecutor(len(others)) as pool:
        won = [index_id for index_id, wins in zip(others, pool.map(publish, others), strict=True) if wins]
    assert won == [load_pointer(anywhere).index_id]


def test_the_same_build_does_not_run_twice_at_once(
    anywhere: str, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build_again(*arguments: object) -> None:
        build(rows_of(0, 20), out=anywhere)

    monkeypatch.setattr(build_module, "publish_version", build_again)
    with pytest.raises(ConflictError, match=r"already running(.|\n)*ten minutes"):
        build(rows_of(0, 20), out=anywhere)
