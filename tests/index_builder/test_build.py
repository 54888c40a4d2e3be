from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import index_builder.build as build_module
import index_builder.embedding.encoding as encoding_module
import index_builder.gathering as gathering_module
import index_builder.versions.publish as publish_module
from index_builder.build import BuildReport, build_index
from index_builder.work.task_runner import LocalRunner
from jobs.cluster.tasks import RayRunner
from smallcap import storage
from smallcap.config import CleaningConfig, IndexConfig
from smallcap.errors import CheckpointError, ConfigError, RunError, SchemaError
from smallcap.index.manifest import load_pointer
from smallcap.index.retriever import Retriever
from smallcap.model.clip_encoder import load_retrieval_encoder
from smallcap.model.encoder_spec import resolve_encoder_identity

COLOURS = ("red", "green", "blue", "grey", "white")
THINGS = ("dog", "cat", "ball", "boat", "tree", "kite", "house", "bird")


def write_dump(path: Path, repeats: int = 3) -> Path:
    """Forty different captions, each of some images, in several spellings; and rows that are dropped."""
    lines = ["image,caption"]
    for repeat in range(repeats):
        for row, (colour, thing) in enumerate((colour, thing) for colour in COLOURS for thing in THINGS):
            text = f"A {colour}  {thing} " if repeat % 2 else f"a {colour} {thing}"
            lines.append(f"image{row // 4}-{repeat}.jpg,{text}")
    lines += ["x.jpg,", "x.jpg,too,many", "x.jpg," + "long " * 30]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    return write_dump(tmp_path / "dumps" / "captions.csv")


def config(dump: Path | str, out: Path | str, clip: Path, **options: object) -> IndexConfig:
    return IndexConfig(dumps=(str(dump),), out=str(out), encoder=f"hf:{clip}", **options)  # type: ignore[arg-type]


class LastFirstRunner(LocalRunner):
    """Finishes the last item first."""

    def run_tasks(self, function: Any, items: Any, memory_bytes: int | None = None) -> Iterator[tuple[int, Any]]:
        for position in reversed(range(len(items))):
            yield position, function(items[position])


def files_of(report: BuildReport) -> dict[str, bytes]:
    return {entry.file: (Path(report.index_uri) / entry.file).read_bytes() for entry in report.manifest.files}


def test_a_build_from_dump_to_search(tmp_path: Path, dump: Path, tiny_clip: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    report = build_index(
        config(dump, tmp_path / "index", tiny_clip, shards=3), progress=lambda *step: seen.append(step)
    )
    manifest = report.manifest
    assert not report.no_op
    assert manifest.ntotal == 40
    assert [entry.rows for entry in manifest.shards] == [13, 13, 14]
    assert manifest.dropped == {"duplicate": 80, "empty": 1, "malformed": 1, "too_long": 1}
    assert sum(manifest.dropped.values()) + manifest.ntotal == sum(source.rows for source in manifest.sources)
    assert manifest.max_captions_per_image == 4
    assert manifest.sources[0].uri == str(dump)
    assert manifest.sources[0].sha256 == storage.sha256_file(dump)
    assert manifest.encoder == resolve_encoder_identity(f"hf:{tiny_clip}")
    assert [(entry.k, entry.recall) for entry in manifest.recall] == [(4, 1.0), (10, 1.0)]
    assert ("embed", 40, 40) in seen
    stages = ["scan", "clean", "dedupe", "count images", "embed", "template", "shard", "calibrate", "publish"]
    assert list(report.seconds) == stages
    assert (report.new_captions, report.embedded) == (40, 40)
    names = sorted(path.name for path in (tmp_path / "index").iterdir())
    assert names == [".current.json.lock", "current.json", "files", "versions"]

    encoder = load_retrieval_encoder(f"hf:{tiny_clip}")
    retriever = Retriever.open(report.index_uri, encoder=encoder.identity, cache_dir=str(tmp_path / "cache"))
    [best] = retriever.search(encoder.encode_texts(["a blue kite"]), 1)
    assert best[0].text == "a blue kite"  # the first row's spelling
    assert best[0].score == pytest.approx(1, abs=1e-5)
    [row] = retriever.captions.rows([best[0].caption_id])
    assert (row.sources, row.image_ids) == (("captions.csv",), ("image5-0.jpg", "image5-1.jpg", "image5-2.jpg"))
    [others] = retriever.search(encoder.encode_texts(["a blue kite"]), 40, ["image5-1.jpg"])
    assert len(others) == 36


@pytest.mark.ray
def test_builds_repeat_byte_for_byte_on_every_schedule(tmp_path: Path, dump: Path, tiny_clip: Path) -> None:
    options = {"shards": 3, "index_key": "IVF4,SQ8", "recall": {"target": 0.1}}
    reports = [
        build_index(config(dump, tmp_path / type(runner).__name__, tiny_clip, **options), runner)
        for runner in (RayRunner("run"), LocalRunner(), LastFirstRunner())
    ]
    assert files_of(reports[0]) == files_of(reports[1]) == files_of(reports[2])
    assert len({report.manifest.index_id for report in reports}) == 1


def test_the_same_dumps_and_options_are_a_no_op(tmp_path: Path, dump: Path, tiny_clip: Path, other_clip: Path) -> None:
    first = build_index(config(dump, tmp_path / "index", tiny_clip))
    again = build_index(config(dump, tmp_path / "index", tiny_clip))
    assert again.no_op
    assert again.manifest == first.manifest
    assert list(again.seconds) == ["scan"]
    with dump.open("a") as file:
        file.write("new.jpg,a purple elephant\n")
    second = build_index(config(dump, tmp_path / "index", tiny_clip))
    assert not second.no_op
    assert second.manifest.ntotal == 41
    assert load_pointer(second.index_uri).index_id == second.manifest.index_id
    other = build_index(config(dump, tmp_path / "index", other_clip, cleaning=CleaningConfig(min_words=3)))
    assert len({report.manifest.index_id for report in (first, second, other)}) == 3
    assert len(list((tmp_path / "index" / "versions").iterdir())) == 3


STEPS = {
    "shard": (build_module, "write_shard"),
    "calibrate": (build_module.Calibration, "run"),
    "publish": (build_module, "publish_version"),
    "pointer": (publish_module, "switch_pointer"),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_failure_before_the_marker_leaves_the_old_version_and_what_was_done(
    tmp_path: Path, dump: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    index = tmp_path / "index"
    before = build_index(config(dump, index, tiny_clip)).manifest.index_id
    with dump.open("a") as file:
        file.write("new.jpg,a purple elephant\n")
    changed = config(dump, index, tiny_clip, shards=3)

    def fail(*arguments: object) -> None:
        raise RunError("stopped here")

    with monkeypatch.context() as patch:
        patch.setattr(*STEPS[step], fail)
        with pytest.raises(RunError, match="stopped here"):
            build_index(changed)
    assert Retriever.open(str(index), cache_dir=str(tmp_path / "cache")).index_id == before

    with monkeypatch.context() as patch:
        patch.setattr(encoding_module, "EmbedSlices", fail)  # what was done is not done again
        for name in ("deal_dumps", "dedupe_bucket"):
            patch.setattr(gathering_module, name, fail)
        if step != "shard":
            patch.setattr(build_module, "write_shard", fail)
        after = build_index(changed)
    assert after.manifest.ntotal == 41
    assert not list(index.glob(".staging-*"))
    assert Retriever.open(str(index), cache_dir=str(tmp_path / "cache")).index_id == after.manifest.index_id
    assert files_of(after) == files_of(build_index(config(dump, tmp_path / "at once", tiny_clip, shards=3)))


def test_a_build_from_s3_to_s3(tmp_path: Path, s3: str, tiny_clip: Path) -> None:
    local = write_dump(tmp_path / "captions.csv")
    storage.upload(local, f"{s3}/dumps/part-1/captions.csv")
    storage.write_bytes(f"{s3}/dumps/part-2/captions.jsonl", b'{"caption": "a purple elephant"}\n')
    remote = build_index(config(f"{s3}/dumps", f"{s3}/index", tiny_clip, shards=2))
    assert remote.manifest.ntotal == 41
    assert build_index(config(f"{s3}/dumps", f"{s3}/index", tiny_clip, shards=2)).no_op
    names = {uri.removeprefix(f"{s3}/index/") for uri in storage.list_files(f"{s3}/index")}
    manifest = f"versions/{remote.manifest.index_id}/manifest.json"
    assert names == {"current.json", manifest, *(entry.file for entry in remote.manifest.files)}
    fs, path = storage.filesystem(f"{s3}/index")
    assert not [name for name in fs.find(path) if ".staging" in name]
    retriever = Retriever.open(f"{s3}/index", cache_dir=str(tmp_path / "cache"))
    assert {row.sources for row in retriever.captions.sample(41)} == {("captions.csv",), ("captions.jsonl",)}


@pytest.mark.ray
def test_errors_of_the_workers_keep_their_kind(tmp_path: Path, dump: Path, tiny_clip: Path) -> None:
    with pytest.raises(SchemaError, match="no column of captions"):
        build_index(config(dump, tmp_path / "index", tiny_clip, text_column="text"), RayRunner("run"))
    with pytest.raises(ConfigError, match=r"No caption(.|\n)*too_few_words"):
        build_index(
            config(dump, tmp_path / "index", tiny_clip, cleaning=CleaningConfig(min_words=20)), RayRunner("run")
        )
    assert not (tmp_path / "index" / "current.json").exists()


def test_dumps_and_encoders_that_cannot_be_read(tmp_path: Path, dump: Path, tiny_clip: Path) -> None:
    with pytest.raises(CheckpointError):
        build_index(config(dump, tmp_path / "index", tmp_path / "no-such-clip"))
    (dump.parent / "broken.csv").write_bytes(b"image,caption\na.jpg,fine\nb.jpg,no \xff end\n")
    with pytest.raises(SchemaError, match=r"not UTF-8(.|\n)*line 3"):
        build_index(config(dump.parent, tmp_path / "index", tiny_clip))
    assert not (tmp_path / "index" / "current.json").exists()


@pytest.mark.parametrize(
    ("key", "message"),
    [("IVF41,Flat", "fewer captions than lists"), ("PQ8", "too few captions"), ("PQ5", "faiss does")],
)
def test_a_key_that_does_not_suit_the_captions_is_refused_before_they_are_embedded(
    key: str, message: str, tmp_path: Path, dump: Path, tiny_clip: Path
) -> None:
    stages: list[str] = []
    with pytest.raises(ConfigError, match=message):
        build_index(
            config(dump, tmp_path / "new" / "index", tiny_clip, index_key=key),
            progress=lambda stage, done, total: stages.append(stage),
        )
    assert "embed" not in stages
    assert not (tmp_path / "new").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_an_encoder_that_cannot_be_loaded_fails_once_with_its_own_error(
    tmp_path: Path, dump: Path, tiny_clip: Path
) -> None:
    broken = tmp_path / "broken-clip"
    broken.mkdir()
    for file in tiny_clip.iterdir():
        (broken / file.name).write_bytes(
            file.read_bytes()[:1000] if file.suffix == ".safetensors" else file.read_bytes()
        )
    with pytest.raises(CheckpointError, match="weights file is damaged"):
        build_index(config(dump, tmp_path / "index", broken), RayRunner("run"))


def test_real_captions(tmp_path: Path, shared_data: Path, tiny_clip: Path) -> None:
    lines = (shared_data / "flickr" / "captions.csv").read_text().splitlines(keepends=True)
    (tmp_path / "captions.csv").write_text("".join(lines[:3001]))
    report = build_index(config(tmp_path / "captions.csv", tmp_path / "index", tiny_clip))
    assert report.manifest.sources[0].rows == 3000
    assert report.manifest.ntotal + sum(report.manifest.dropped.values()) == 3000
    assert report.manifest.max_captions_per_image == 5
    assert report.manifest.dropped["too_long"] > 0


def test_unit_vectors_are_required() -> None:
    from index_builder.embedding.slices import _check_unit

    with pytest.raises(RunError, match=r"not unit vectors(.|\n)*caption 11(.|\n)*nan"):
        _check_unit(np.array([[1, 0], [np.nan, 0]], np.float32), 10)
