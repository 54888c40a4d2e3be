"""Runs over every kind of input: tars, Parquet with image bytes, lists with columns to keep, inputs that grow."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from index_builder.build import build_index
from jobs import caption
from jobs.captioning import write
from jobs.captioning.record import Account, load_run_record
from jobs.captioning.work import finish_run, list_work
from smallcap import storage
from smallcap.captioner import Captioner
from smallcap.config import IndexConfig
from smallcap.errors import ConfigError, SchemaError
from smallcap.output.part_files import list_parts
from tests.caption_runs import config_for, jpeg, read_rows, write_images
from tests.hub_server import Hub
from tests.input_files import make_tar


def write_tar(uri: str, first: int, count: int) -> None:
    """Writes a shard as img2dataset lays it out."""
    members: list[tuple[str, bytes]] = []
    for number in range(first, first + count):
        key = f"{number:09d}"
        about = {"key": key, "url": f"https://host/{number}.jpg", "status": "success", "similarity": number / 10}
        members += [(f"{key}.jpg", jpeg(number)), (f"{key}.txt", b"alt"), (f"{key}.json", json.dumps(about).encode())]
    storage.write_bytes(uri, make_tar(*members))


def test_tars_are_read_with_their_keys_and_json(s3: str, index: str, tiny_smallcap: Path) -> None:
    tars, out = f"{s3}/tars", f"{s3}/out"
    for shard in range(2):
        write_tar(storage.join(tars, f"{shard:05d}.tar"), 10 * shard, 12)  # two keys are in both
        storage.write_bytes(storage.join(tars, f"{shard:05d}.parquet"), b"img2dataset's own, not read")
        storage.write_bytes(storage.join(tars, f"{shard:05d}_stats.json"), b"{}")
    config = config_for(tars, index, tiny_smallcap, out, "keep_columns=[url,json]", "output.rows_per_part=4")
    summary = caption.run(config)
    assert summary.new_images == 24
    assert (summary.images.total, summary.record.repeated_ids) == (24, 0)
    rows = read_rows(out)
    assert rows.image_id.nunique() == 24
    qualified = rows[rows.image_id.str.startswith("s3://")]
    assert len(qualified) == 2
    assert list(qualified.image_id) == list(qualified.image_uri)
    rows, numbers = rows.drop(qualified.index), range(22)
    assert list(rows.image_id) == [f"{number:09d}" for number in numbers]
    assert list(rows.url) == [f"https://host/{number}.jpg" for number in numbers]
    assert [json.loads(text)["similarity"] for text in rows.json] == [number / 10 for number in numbers]
    alone = Captioner.from_pretrained(str(tiny_smallcap), index, dtype="float32")
    assert list(rows.caption) == [result.caption for result in alone.caption([jpeg(number) for number in numbers])]
    assert caption.run(config).new_images == 0


def test_a_limited_run_over_tars_goes_on_where_it_stopped(tmp_path: Path, index: str, tiny_smallcap: Path) -> None:
    tars, out = str(tmp_path / "tars"), str(tmp_path / "out")
    for shard in range(3):
        write_tar(f"{tars}/{shard:05d}.tar", 100 * shard, 10)
    assert caption.run(config_for(tars, index, tiny_smallcap, out, "limit=14")).new_images == 14
    assert caption.run(config_for(tars, index, tiny_smallcap, out, "limit=13")).new_images == 0
    assert caption.run(config_for(tars, index, tiny_smallcap, out)).new_images == 16
    assert len(read_rows(out)) == 30


def test_a_damaged_tar_loses_no_image_before_the_damage(tmp_path: Path, index: str, tiny_smallcap: Path) -> None:
    tars, out = tmp_path / "tars", str(tmp_path / "out")
    write_tar(f"{tars}/00000.tar", 0, 10)
    write_tar(f"{tars}/00001.tar", 100, 10)
    whole = (tars / "00001.tar").read_bytes()
    (tars / "00001.tar").write_bytes(whole[: len(whole) // 2])
    (tars / "00002.tar").write_bytes(b"no tar at all")
    (tars / "00003.tar").write_bytes(b"")
    summary = caption.run(config_for(str(tars), index, tiny_smallcap, out))
    rows = read_rows(out)
    assert 10 + 3 < summary.images.ok < 20
    assert summary.images.error == 3
    assert rows[rows.status == "error"].image_uri.str.contains("0000[123].tar").all()
    for shard in (1, 2):  # what was damaged is put right
        write_tar(f"{tars}/{shard:05d}.tar", 100 * shard, 10)
    (tars / "00003.tar").unlink()
    summary = caption.run(config_for(str(tars), index, tiny_smallcap, out), retry_failed=True)
    assert (summary.images.ok, summary.images.errors_by_code) == (30, {"not_found": 1})
    numbers = [*range(10), *range(100, 110), *range(200, 210)]
    rows = read_rows(out)
    assert list(rows[rows.status == "ok"].image_id) == [f"{number:09d}" for number in numbers]
    assert caption.run(config_for(str(tars), index, tiny_smallcap, out)).new_images == 0


def test_parquet_with_image_bytes(s3: str, index: str, tiny_smallcap: Path) -> None:
    """As Hugging Face datasets are stored."""
    source, out = f"{s3}/data", f"{s3}/out"
    structs = [{"bytes": jpeg(number), "path": f"{number}.jpg"} for number in range(9)] + [{"bytes": b"", "path": "no"}]
    table = pa.table({"image": structs, "license": [f"cc-{number % 2}" for number in range(10)]})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=4)
    storage.write_bytes(storage.join(source, "train-00000.parquet"), buffer.getvalue())
    sets = ("input.image_column=image", "keep_columns=[license]")
    summary = caption.run(config_for(source, index, tiny_smallcap, out, *sets))
    rows = read_rows(out)
    assert sorted(rows.image_id) == sorted([*(f"{number}.jpg" for number in range(9)), "no"])
    assert rows.loc["7.jpg"].license == "cc-1"
    assert summary.images.errors_by_code == {"empty": 1}


def test_a_list_keeps_its_columns_types_and_what_it_names_again_is_captioned_once(
    tmp_path: Path, index: str, tiny_smallcap: Path
) -> None:
    images, out = str(tmp_path / "images"), str(tmp_path / "out")
    write_images(images, 6)
    table = pa.table(
        {
            "image_uri": [f"{number:03d}.jpg" for number in range(6)],
            "image_id": [f"id-{number}" for number in range(6)],
            "rating": pa.array([1, None, 3, 4, None, 6], pa.int64()),
            "tags": pa.array([["a"], [], None, ["b", "c"], ["d"], []], pa.list_(pa.string())),
        }
    )
    listing = f"{images}/list.parquet"
    pq.write_table(pa.concat_tables([table, table.slice(2, 2)]), listing)
    summary = caption.run(config_for(listing, index, tiny_smallcap, out, "keep_columns=[rating,tags]"))
    assert summary.record.input is not None
    assert summary.record.input.duplicates == 2
    assert "captioned once: 2 images" in caption.describe(summary)
    written = pa.concat_tables(pq.read_table(part) for part in list_parts(out)).sort_by("image_id")
    assert written.select(["rating", "tags"]).equals(table.select(["rating", "tags"]))
    with pytest.raises(ConfigError, match="keep_columns"):
        caption.run(config_for(listing, index, tiny_smallcap, out))


def test_hugging_face_files_with_the_same_paths(tmp_path: Path, index: str, tiny_smallcap: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for shard in range(2):
        images = [{"bytes": jpeg(3 * shard + number), "path": f"{number:05d}.jpg"} for number in range(3)]
        file = tmp_path / f"in/train-{shard:05d}-of-00002.parquet"
        file.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"image": pa.array(images, kind)}), file)
    out = str(tmp_path / "out")
    summary = caption.run(config_for(str(tmp_path / "in"), index, tiny_smallcap, out, "output.rows_per_part=2"))
    assert summary.record.count_repeated() == 0
    expected = [f"train-{shard:05d}-of-00002/{number:05d}.jpg" for shard in range(2) for number in range(3)]
    assert sorted(read_rows(out).image_id) == expected


def test_the_account_of_a_run(tmp_path: Path, index: str, tiny_smallcap: Path) -> None:
    folder, out = tmp_path / "in", str(tmp_path / "in/out")
    write_images(str(folder), 3)
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "_hidden.jpg").write_bytes(jpeg(0))
    members = [("a.jpg", jpeg(7)), ("a.mask.png", jpeg(8)), ("b.jpg", jpeg(9)), ("a.jpg", jpeg(7))]
    (folder / "in.tar").write_bytes(make_tar(*members))
    config = config_for(str(folder), index, tiny_smallcap, out, "output.write=[webdataset]")
    for relist in (False, True):  # the second time there are files of the run itself in the folder
        summary = caption.run(config, relist=relist)
        assert summary.record.account == Account(seen=9, captioned=5, errors=1, repeats=1, passed_over=2)
    text = caption.describe(summary)
    assert "1 file of in.tar like images, but hidden, links, or beside the image of their sample" in text
    assert "1 file with the ending of an image or a tar, but with a name or folder that begins with . or _" in text
    Path(list_parts(out)[0]).unlink()
    with pytest.raises(SchemaError, match="do not add up"):
        finish_run(config, summary.record, list_work(config, summary.record))


@pytest.fixture
def odd_tars(tmp_path: Path) -> str:
    """Two tars with nine members like images: five rows, two repeats, and two that are passed over."""
    first = [
        ("c.jpg", b"no image"),
        ("a.jpg", jpeg(1)),
        ("a.mask.png", jpeg(2)),
        ("b.jpg", jpeg(3)),
        ("a.jpg", jpeg(1)),
    ]
    second = [("d.jpg", jpeg(4)), ("e.psd", b"8BPS"), ("f.jpg", jpeg(5)), ("d.jpg", jpeg(4))]
    for name, members in (("0.tar", first), ("1.tar", second)):
        storage.write_bytes(f"{tmp_path}/in/{name}", make_tar(*members))
    return f"{tmp_path}/in"


ODD = Account(seen=9, captioned=4, errors=1, repeats=2, passed_over=2)


@pytest.mark.parametrize("written", [1, *(pytest.param(written, marks=pytest.mark.slow) for written in (0, 2, 3))])
def test_the_account_of_a_run_that_was_stopped_is_that_of_an_undisturbed_one(
    odd_tars: str, tmp_path: Path, index: str, tiny_smallcap: Path, written: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = ("output.rows_per_part=2", "compute.batch_size=1")
    config = config_for(odd_tars, index, tiny_smallcap, f"{tmp_path}/out", *sets)
    parts: list[str] = []
    write_part = write.write_part

    def write_some(out: str, name: str, *arguments: Any) -> None:
        if len(parts) == written:
            raise RuntimeError("stopped")
        write_part(out, name, *arguments)
        parts.append(name)

    with monkeypatch.context() as patched:
        patched.setattr(write, "write_part", write_some)
        if written < 3:  # else it is done
            with pytest.raises(RuntimeError, match="stopped"):
                caption.run(config)
        else:
            caption.run(config)
    for retry_failed in (False, True):
        record = caption.run(config, retry_failed=retry_failed).record
        assert record.account == ODD
        assert record.tars.passed_over == {f"{odd_tars}/{number}.tar": 1 for number in range(2)}
        assert load_run_record(config.out) == record


def test_the_account_of_a_limited_run_has_the_tars_that_were_read_to_their_ends(
    odd_tars: str, tmp_path: Path, index: str, tiny_smallcap: Path
) -> None:
    for limit, account in (
        (2, Account(seen=2, captioned=1, errors=1, repeats=0, passed_over=0)),
        (4, Account(seen=6, captioned=3, errors=1, repeats=1, passed_over=1)),
        (9, ODD),
    ):
        config = config_for(odd_tars, index, tiny_smallcap, f"{tmp_path}/out", f"limit={limit}")
        assert caption.run(config).record.account == account


def test_a_folder_with_marks_of_patterns_in_its_name_holds_everything(
    anywhere: str, tmp_path: Path, index: str, tiny_smallcap: Path
) -> None:
    folder, decoy = f"{anywhere}/run [12]*?", f"{anywhere}/run 1xy"
    for number in range(3):
        storage.write_bytes(f"{folder}/in [a]/{number}.jpg", jpeg(number))
    storage.write_bytes(f"{decoy}/in a/9.jpg", jpeg(9))
    for uri in storage.list_files(index):
        storage.write_bytes(f"{folder}/index{uri.removeprefix(index)}", storage.read_bytes(uri))
    storage.write_bytes(f"{folder}/list [1].csv", b"image_uri\nin [a]/0.jpg\n")
    for source, rows in (("in [a]", 3), ("list [1].csv", 1), ("in [a]/*.jpg", 3), ("in [a]/1.jpg", 1)):
        out = f"{folder}/out [{rows}] of {source.replace('/', ' ')}"
        config = config_for(f"{folder}/{source}", f"{folder}/index", tiny_smallcap, out, "output.write=[webdataset]")
        summary = caption.run(config)
        assert (summary.images.ok, len(read_rows(out))) == (rows, rows)
        assert caption.run(config, relist=True).new_images == 0
    assert storage.list_files(decoy) == [f"{decoy}/in a/9.jpg"]


def test_rows_of_a_list_that_cannot_be_read_are_errors_and_take_no_image_with_them(
    tmp_path: Path, index: str, tiny_smallcap: Path
) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
    (tmp_path / "list.tsv").write_text('image_uri\tcap\n0.jpg\t"hello\n1.jpg\n\tno uri\n1.jpg\tworld\n2.jpg\tz\n')
    caption.run(config_for(f"{tmp_path}/list.tsv", index, tiny_smallcap, f"{tmp_path}/out", "keep_columns=[cap]"))
    rows = read_rows(f"{tmp_path}/out")
    assert list(zip(rows.image_id, rows.status, rows.cap.fillna(""), strict=True)) == [
        (f"{tmp_path}/list.tsv#row=2", "error", ""),
        (f"{tmp_path}/list.tsv#row=3", "error", "no uri"),
        ("0.jpg", "ok", '"hello'),
        ("1.jpg", "ok", "world"),
        ("2.jpg", "ok", "z"),
    ]
    assert set(rows.error_code.dropna()) == {"invalid_uri"}


def test_outputs_beside_the_parts(s3: str, index: str, tiny_smallcap: Path) -> None:
    images, out = f"{s3}/images", f"{s3}/out"
    write_images(images, 10)
    storage.write_bytes(storage.join(images, "bad.jpg"), b"no image")
    sets = ("output.save_embeddings=true", "output.write=[webdataset]", "output.rows_per_part=4")
    caption.run(config_for(images, index, tiny_smallcap, out, *sets))
    rows = read_rows(out)
    embeddings = pa.concat_tables(
        pq.read_table(io.BytesIO(storage.read_bytes(uri)))
        for uri in storage.list_folder(storage.join(out, "_embeddings"))
    )
    assert sorted(embeddings["image_id"].to_pylist()) == list(rows[rows.status == "ok"].image_id)
    captioner = Captioner.from_pretrained(str(tiny_smallcap), index, dtype="float32")
    by_id = dict(zip(embeddings["image_id"].to_pylist(), embeddings["embedding"].to_pylist(), strict=True))
    (alone,) = captioner.caption([jpeg(7)])
    assert alone.embedding is not None
    assert by_id["007.jpg"] == pytest.approx(alone.embedding.tolist(), abs=2e-3)
    members: dict[str, bytes] = {}
    for uri in storage.list_files(storage.join(out, "_webdataset")):
        with tarfile.open(fileobj=io.BytesIO(storage.read_bytes(uri))) as tar:
            members |= {entry.name: tar.extractfile(entry).read() for entry in tar}  # type: ignore[union-attr]
    assert len(members) == 30
    assert members["007.jpg"] == jpeg(7)
    assert members["007.txt"].decode() == rows.loc["007.jpg"].caption
    assert json.loads(members["007.json"])["image_id"] == "007.jpg"


def test_captions_and_images_come_from_the_hub(hub: Hub, tmp_path: Path, tiny_clip: Path, tiny_smallcap: Path) -> None:
    """A folder, a tar and Parquet of a private data set are captioned with an index of captions in another."""
    images = {f"{number:03d}.jpg": jpeg(number) for number in range(5)}
    parquet = io.BytesIO()
    pq.write_table(pa.table({"image_id": ["p"], "image": [jpeg(30)]}), parquet)
    lists = b"image_id,image_uri\nlisted,hf://datasets/user/images/folder/001.jpg\n"
    files = {
        **{f"folder/{name}": data for name, data in images.items()},
        "shards/0.tar": make_tar(("t.jpg", jpeg(20))),
        "rows/0.parquet": parquet.getvalue(),
        "list.csv": lists,
    }
    hub.dataset("user/images", files, token="secret")
    hub.dataset("user/captions", {"dump.csv": b"image,caption\n1,a dog\n2,a bus on the road\n3,a boat on the sea\n"})
    index = str(tmp_path / "index")
    build_index(IndexConfig(dumps=("hf://datasets/user/captions/dump.csv",), out=index, encoder=f"hf:{tiny_clip}"))
    sources = [f"hf://datasets/user/images/{name}" for name in ("folder", "shards", "rows", "list.csv")]
    config = config_for(sources[0], index, tiny_smallcap, str(tmp_path / "out"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("HF_TOKEN", "secret")
        summary = caption.run(config.model_copy(update={"images": tuple(sources)}))
    assert (summary.new_images, summary.images.error) == (8, 0)
    rows = read_rows(config.out)
    assert rows.image_uri["003.jpg"] == "hf://datasets/user/images/folder/003.jpg"
    assert rows.image_uri["t"] == "hf://datasets/user/images/shards/0.tar#t.jpg"
    alone = Captioner.from_pretrained(str(tiny_smallcap), index, dtype="float32")
    expected = [jpeg(1), jpeg(20), jpeg(30)]
    assert list(rows.caption[["listed", "t", "p"]]) == [result.caption for result in alone.caption(expected)]
