"""The captioning job end to end, on Ray: every image exactly once, whatever the images and the interruptions."""

import io
import json
import runpy
import sys
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image

from index_builder.build import build_index
from jobs import caption
from jobs.captioning.record import load_run_record
from smallcap import storage
from smallcap.captioner import Captioner
from smallcap.config import CaptionConfig, IndexConfig
from smallcap.errors import CheckpointError, ConfigError, ManifestError, SchemaError
from smallcap.evaluation.shared_words import measure_shared_words
from smallcap.model.files import demo_folder
from smallcap.output.part_files import list_parts
from smallcap.output.reading import read_captions
from smallcap.output.schema import CAPTION_COLUMNS, check_caption_schema
from tests.bad_images import BAD_IMAGES
from tests.caption_runs import config_for, jpeg, read_rows, write_images


@pytest.mark.ray
def test_images_become_rows_with_captions_and_neighbours(s3: str, index: str, tiny_smallcap: Path) -> None:
    images, out = storage.join(s3, "images"), storage.join(s3, "out")
    write_images(images, 20)
    summary = caption.run(config_for(images, index, tiny_smallcap, out))
    assert summary.new_images == 20
    rows = read_rows(out)
    assert list(rows.image_id) == [f"{number:03d}.jpg" for number in range(20)]
    assert set(rows.status) == {"ok"}
    assert set(rows.width) == {80}
    assert set(rows.height) == {60}

    captioner = Captioner.from_pretrained(str(tiny_smallcap), index, dtype="float32")
    alone = captioner.caption([jpeg(number) for number in range(20)])
    for row, expected in zip(rows.itertuples(), alone, strict=True):
        assert row.caption == expected.caption
        assert row.caption_logprob == pytest.approx(expected.logprob, abs=1e-3)
        assert row.caption_tokens == expected.num_tokens
        assert row.clip_score == pytest.approx(expected.clip_score, abs=1e-4)
        assert [n["caption_id"] for n in row.neighbours] == [n.caption_id for n in expected.neighbours]

    for part in list_parts(out):
        schema = pq.read_schema(io.BytesIO(storage.read_bytes(part)))
        check_caption_schema(schema, part)
        assert schema.metadata[b"smallcap.run_id"].decode() == summary.record.run_id
    record = json.loads(storage.read_bytes(storage.join(out, "_run.json")))
    assert record["status"] == "complete"
    assert record["images"] == {"total": 20, "ok": 20, "error": 0, "errors_by_code": {}}
    assert record["attempts"][0]["caption_s"] > 0


def test_words_of_captions_and_neighbours_are_compared(finished_run: CaptionConfig) -> None:
    rows = read_captions(finished_run.out).to_arrow()
    shared = measure_shared_words(rows["caption"], rows["neighbours"])
    assert rows["copied_share"].combine_chunks().equals(shared.copied_share)
    assert rows["neighbour_agreement"].combine_chunks().equals(shared.neighbour_agreement)
    assert rows["neighbour_agreement"].null_count == 0


def test_a_finished_run_is_a_no_op_until_the_input_is_listed_again(
    tmp_path: Path, index: str, tiny_smallcap: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, out = str(tmp_path / "images"), str(tmp_path / "out")
    write_images(images, 5)
    config = config_for(images, index, tiny_smallcap, out)
    caption.run(config)
    before = {part: Path(part).stat().st_mtime_ns for part in list_parts(out)}
    with monkeypatch.context() as patched:
        patched.setattr(caption, "_caption", lambda *_: pytest.fail("Ray was started for nothing"))
        assert caption.run(config).new_images == 0
        for number in (5, 6):  # the others would count as overwritten
            storage.write_bytes(f"{images}/{number:03d}.jpg", jpeg(number))
        summary = caption.run(config)
        assert summary.new_images == 0
        assert "--relist" in caption.describe(summary)
    assert caption.run(config, relist=True).new_images == 2
    assert caption.run(config, relist=True).new_images == 0
    assert len(read_rows(out)) == 7
    assert all(Path(part).stat().st_mtime_ns == when for part, when in before.items())


def test_broken_images_are_rows_with_codes(tmp_path: Path, index: str, tiny_smallcap: Path) -> None:
    images, out = tmp_path / "images", str(tmp_path / "out")
    write_images(str(images), 3)
    for name, (data, _) in BAD_IMAGES.items():
        (images / f"{name}.jpg".replace(" ", "-").replace(".jpg.jpg", ".jpg")).write_bytes(data)
    listing = tmp_path / "list.csv"
    uris = [*sorted(str(path) for path in images.iterdir()), str(images / "missing.jpg")]
    listing.write_text("\n".join(["image_uri", *(f'"{uri}"' for uri in uris)]))
    summary = caption.run(config_for(str(listing), index, tiny_smallcap, out))
    rows = read_rows(out)
    assert len(rows) == 3 + len(BAD_IMAGES) + 1
    assert (rows.status == "ok").sum() == 3
    expected = sorted([str(code) for _, code in BAD_IMAGES.values()] + ["not_found"])
    failed = rows[rows.status == "error"]
    assert sorted(failed.error_code) == expected
    assert failed.caption.isna().all()
    assert failed.error_message.str.len().gt(10).all()
    assert summary.images.errors_by_code == {code: expected.count(code) for code in sorted(set(expected))}
    assert "errors (" in caption.describe(summary)


def test_a_text_of_the_input_is_scored_and_the_scores_are_summed_up(
    tmp_path: Path, index: str, tiny_smallcap: Path
) -> None:
    images, out = tmp_path / "images", str(tmp_path / "out")
    write_images(str(images), 6)
    texts = ["a dog", "", "two cats on a sofa", "bus", "a red bus", "x"]
    lines = [f"{images}/{number:03d}.jpg,{text}" for number, text in enumerate(texts)]
    (tmp_path / "list.csv").write_text("\n".join(["image_uri,alt", *lines]))
    given = config_for(str(tmp_path / "list.csv"), index, tiny_smallcap, out, "score_column=alt")
    summary = caption.run(given)
    rows = read_rows(out)
    assert list(rows.alt.fillna("")) == texts
    assert list(rows.alt_clip_score.isna()) == [not text for text in texts]
    better = rows.alt_clip_score > rows.clip_score
    assert list(rows.best_caption) == list(rows.alt.where(better, rows.caption))
    scores = load_run_record(out).scores  # type: ignore[union-attr]
    assert scores == summary.record.scores
    assert scores is not None and (scores.captions, scores.empty) == (6, (rows.caption == "").sum())
    assert scores.clip_score == pytest.approx(rows.clip_score.mean(), abs=1e-5)
    assert scores.clip_score_p5 == pytest.approx(rows.clip_score.min(), abs=1e-4)
    assert scores.copied_share == pytest.approx(rows.copied_share.mean(), abs=1e-5)
    said = caption.describe(summary)
    assert f"Clip score: {rows.clip_score.mean():.3f} on average" in said
    assert "Empty captions: " in said
    with pytest.raises(ConfigError, match=r"(?s)holds no texts.*found: list"):
        listing = [{"image_uri": f"{images}/000.jpg", "alt": ["a", "b"]}]
        pd.DataFrame(listing).to_parquet(tmp_path / "lists.parquet")
        caption.run(given.model_copy(update={"images": (str(tmp_path / "lists.parquet"),), "out": f"{out}-2"}))
    with pytest.raises(ConfigError, match="no retrieval encoder that could compare"):
        update = {"index": None, "retrieval": given.retrieval.model_copy(update={"k": 0}), "out": f"{out}-3"}
        caption.run(given.model_copy(update=update))


def test_the_demos_model_warns_of_images_that_are_not_the_demos(tmp_path: Path) -> None:
    def warning(*images: str, model: str = "demo") -> str:
        return " ".join(caption.demo_warning(model, images))

    own = str(demo_folder() / "images")
    (tmp_path / "link").symlink_to(own)
    assert warning(own, f"file://{own}/10000000.jpg", f"{own}/*.jpg", f"{tmp_path}/link") == ""
    for other in (str(tmp_path), "s3://bucket/images", f"{own}/../..", f"{demo_folder()}-of-mine"):
        assert f"{other} is not of the demo" in warning(own, other)
        assert warning(other, model="a/b") == ""


def test_several_captions_and_fast_decoding_are_written_and_counted(
    tmp_path: Path, index: str, tiny_smallcap: Path
) -> None:
    images, out = str(tmp_path / "images"), str(tmp_path / "out")
    write_images(images, 4)
    Image.new("RGB", (50, 40)).save(tmp_path / "images" / "plain.png")
    sets = ["generation.num_captions=3", "input.decode=fast", "compute.dtype=auto"]
    summary = caption.run(config_for(images, index, tiny_smallcap, out, *sets))
    rows = read_rows(out)
    assert set(rows.status) == {"ok"}
    for row in rows.itertuples():
        assert len(row.alternatives) == 2
        logprobs = [row.caption_logprob, *(other["logprob"] for other in row.alternatives)]
        assert logprobs == sorted(logprobs, reverse=True)
        assert len({row.caption, *(other["caption"] for other in row.alternatives)}) == 3
    attempt = summary.record.attempts[-1]
    assert attempt.decoded_by_pillow == 1
    assert attempt.dtype in ("float32", "bfloat16")
    assert attempt.search_backends == ("cpu",)
    assert summary.record.format_version == 1
    assert "by Pillow" in caption.describe(summary)


def test_samples_do_not_depend_on_batches_or_ids(tmp_path: Path, index: str, tiny_smallcap: Path) -> None:
    captions = []
    for batch_size, rename in ((8, "{}"), (3, "again/{}")):
        images, out = tmp_path / f"images-{batch_size}", str(tmp_path / f"out-{batch_size}")
        for number in range(6):
            path = images / rename.format(f"{number}.jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(number))
        sets = ["generation.do_sample=true", "generation.seed=7", f"compute.batch_size={batch_size}"]
        caption.run(config_for(str(images), index, tiny_smallcap, out, *sets))
        captions.append(list(read_rows(out).caption))
    assert captions[0] == captions[1]
    assert len(set(captions[0])) > 1


def test_only_broken_images_make_a_complete_run(tmp_path: Path, index: str, tiny_smallcap: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "bad.jpg").write_bytes(b"no image")
    out = str(tmp_path / "out")
    summary = caption.run(config_for(str(tmp_path / "images"), index, tiny_smallcap, out))
    assert (summary.images.ok, summary.images.error) == (0, 1)
    assert pq.read_schema(list_parts(out)[0]).equals(CAPTION_COLUMNS, check_metadata=False)


def test_the_job_runs_as_a_module_from_a_config_file(
    tmp_path: Path,
    index: str,
    tiny_smallcap: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As `python -m jobs.caption --config FILE --set …` does."""
    images, out = str(tmp_path / "images"), str(tmp_path / "out")
    write_images(images, 2)
    (tmp_path / "run.yaml").write_text(f"images: [{images}]\nindex: {index}\nmodel: {tiny_smallcap}\n")
    monkeypatch.setattr(sys, "argv", ["caption", "--config", str(tmp_path / "run.yaml"), "--set", f"out={out}"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("jobs.caption", run_name="__main__")
    assert "2 rows: 2 ok, 0 errors" in capsys.readouterr().out
    assert len(read_rows(out)) == 2
    monkeypatch.setattr(sys, "argv", ["caption", "--set", f"out={out}"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("jobs.caption", run_name="__main__")
    assert ended.value.code == 2
    assert "Give IMAGES and --model." in capsys.readouterr().err


def test_changed_options_are_refused_and_named(tmp_path: Path, index: str, tiny_smallcap: Path) -> None:
    images, out = str(tmp_path / "images"), str(tmp_path / "out")
    write_images(images, 4)
    caption.run(config_for(images, index, tiny_smallcap, out, "limit=2"))
    with pytest.raises(ConfigError, match=r"retrieval\.k: null → 2"):
        caption.run(config_for(images, index, tiny_smallcap, out, "retrieval.k=2"))
    free = config_for(images, index, tiny_smallcap, out, "compute.num_actors=2", "compute.batch_size=3")
    assert caption.run(free).new_images == 2  # where it runs, and a higher limit, are no change
    assert len(read_rows(out)) == 4


def test_a_resumed_run_keeps_its_index_version(tmp_path: Path, tiny_clip: Path, tiny_smallcap: Path) -> None:
    dump, index = tmp_path / "dump.csv", str(tmp_path / "index")
    build = IndexConfig(dumps=(str(dump),), out=index, encoder=f"hf:{tiny_clip}")
    dump.write_text("caption\none dog\ntwo dogs\nthree dogs\nfour dogs\n")
    build_index(build)
    images, out = str(tmp_path / "images"), str(tmp_path / "out")
    write_images(images, 4)
    caption.run(config_for(images, index, tiny_smallcap, out, "limit=2"))
    dump.write_text("caption\none bus\ntwo buses\nthree buses\nfour buses\n")
    build_index(build)
    caption.run(config_for(images, index, tiny_smallcap, out))
    texts = {neighbour["text"] for row in read_rows(out).neighbours for neighbour in row}
    assert texts == {"one dog", "two dogs", "three dogs", "four dogs"}


def test_two_encoders_get_their_own_crops(tmp_path: Path, tiny_smallcap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The retrieval encoder is an open_clip model of another image size than the vision encoder."""
    import open_clip
    import torch

    folder = tmp_path / "open-clip"
    folder.mkdir()
    model = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 48, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    torch.save(open_clip.CLIP(**model).state_dict(), folder / "open_clip_pytorch_model.bin")
    (tmp_path / "dump.jsonl").write_text("".join(json.dumps({"caption": f"{n} dogs"}) + "\n" for n in range(6)))
    index, images, out = str(tmp_path / "index"), str(tmp_path / "images"), str(tmp_path / "out")
    build_index(IndexConfig(dumps=(str(tmp_path / "dump.jsonl"),), out=index, encoder=f"open_clip:local-dir:{folder}"))
    write_images(images, 6)
    (tmp_path / "images" / "bad.jpg").write_bytes(b"")
    caption.run(config_for(images, index, tiny_smallcap, out))
    rows = read_rows(out)
    assert list(rows.status).count("ok") == 6
    alone = Captioner.from_pretrained(str(tiny_smallcap), index, dtype="float32").caption(
        [jpeg(number) for number in range(6)]
    )
    assert list(rows.caption[:6]) == [result.caption for result in alone]


def test_what_is_missing_is_named_before_ray_starts(tmp_path: Path, index: str, tiny_smallcap: Path) -> None:
    images, out = str(tmp_path / "images"), str(tmp_path / "out")
    write_images(images, 1)
    with pytest.raises(ManifestError, match="no published index"):
        caption.run(config_for(images, str(tmp_path / "nothing"), tiny_smallcap, out))
    with pytest.raises(CheckpointError, match="no such model folder"):
        caption.run(config_for(images, index, tmp_path / "no" / "model", out))
    assert not (tmp_path / "out" / "_run.json").exists()


def test_a_foreign_parquet_file_in_the_output_is_refused(tmp_path: Path, index: str, tiny_smallcap: Path) -> None:
    images, out = str(tmp_path / "images"), tmp_path / "out"
    write_images(images, 1)
    out.mkdir()
    pd.DataFrame({"x": [1]}).to_parquet(out / "part-foreign.parquet")
    with pytest.raises(SchemaError, match="not a part of a captioning run"):
        caption.run(config_for(images, index, tiny_smallcap, str(out)))


def test_a_failing_store_stops_the_run_with_its_own_message(
    tmp_path: Path, index: str, tiny_smallcap: Path, s3: str
) -> None:
    (tmp_path / "list.txt").write_text("s3://no-such-bucket-at-all/a.jpg\n")
    from smallcap.errors import StorageError

    with pytest.raises(StorageError, match="no-such-bucket-at-all"):
        caption.run(config_for(str(tmp_path / "list.txt"), index, tiny_smallcap, str(tmp_path / "out")))
    record = load_run_record(str(tmp_path / "out"))
    assert record is not None
    assert record.status == "running"
