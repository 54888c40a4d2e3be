"""Each kind of source with images and captions gives the same images, captions and splits."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.training.inputs import TrainInputs, list_inputs
from jobs.training.pairs import captions_of
from smallcap.errors import ConfigError, SchemaError
from smallcap.images.work_list import read_fragment
from tests.caption_runs import jpeg
from tests.train_runs import train_config

CAPTIONS = {"a.jpg": ["a dog", "the dog runs"], "b.jpg": ["a bus"]}
Read = dict[str, dict[str, tuple[str, list[str]]]]


def read_all(inputs: TrainInputs, caption_column: str = "caption") -> Read:
    """Returns URI and captions of each image by split and id, read as the job reads them."""
    found: Read = {"train": {}, "validation": {}}
    for item in inputs.items:
        config = train_config("x", "i", Path("m"), "o").data
        for batch in read_fragment(item.work.fragment, item.work.wanted, config, item.kept):
            assert batch.kept is not None
            captions = captions_of(batch.kept, caption_column)
            for image_id, uri, texts in zip(batch.image_ids, batch.image_uris, captions, strict=True):
                found[item.split][image_id] = (uri, texts)
    return found


def inputs_of(source: Path, tmp_path: Path, *sets: str) -> TrainInputs:
    return list_inputs(train_config(source, "index", Path("model"), "out", *sets), str(tmp_path / "features"))


def write_coco(folder: Path) -> Path:
    images = [{"id": number, "file_name": name} for number, name in enumerate(CAPTIONS)]
    annotations = [
        {"image_id": number, "caption": text} for number, name in enumerate(CAPTIONS) for text in CAPTIONS[name]
    ]
    (folder / "coco.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return folder / "coco.json"


def write_csv(folder: Path) -> Path:
    rows = [f"{name},{text}" for name, texts in CAPTIONS.items() for text in texts]
    (folder / "captions.csv").write_text("\n".join(["image,caption", *rows]))
    return folder / "captions.csv"


def write_jsonl(folder: Path) -> Path:
    rows = [json.dumps({"image": name, "caption": text}) for name, texts in CAPTIONS.items() for text in texts]
    (folder / "captions.jsonl").write_text("\n".join(rows))
    return folder / "captions.jsonl"


def write_parquet_list(folder: Path) -> Path:
    pq.write_table(pa.table({"image": list(CAPTIONS), "captions": list(CAPTIONS.values())}), folder / "list.parquet")
    return folder / "list.parquet"


@pytest.mark.parametrize("write", [write_coco, write_csv, write_jsonl, write_parquet_list])
def test_lists_name_images_below_their_folder(write, tmp_path: Path) -> None:
    inputs = inputs_of(write(tmp_path), tmp_path)
    expected = {name: (f"{tmp_path}/{name}", texts) for name, texts in CAPTIONS.items()}
    assert read_all(inputs) == {"train": expected, "validation": {}}
    assert (inputs.listed_images, inputs.listed_examples, inputs.malformed) == (2, 3, 0)


def test_images_may_lie_elsewhere(tmp_path: Path) -> None:
    found = read_all(inputs_of(write_csv(tmp_path), tmp_path, "images=s3://bucket/images"))
    assert found["train"]["a.jpg"][0] == "s3://bucket/images/a.jpg"


@pytest.fixture
def karpathy(tmp_path: Path) -> Path:
    splits = ("train", "restval", "val", "test")
    images = [
        {
            "filename": f"{split}.jpg",
            "filepath": "2014",
            "split": split,
            "sentences": [{"raw": "A Dog.", "tokens": ["a", "dog"]}, {"raw": f"The {split}."}],
        }
        for split in splits
    ]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    return tmp_path / "dataset_coco.json"


def test_karpathys_splits(karpathy: Path, tmp_path: Path) -> None:
    found = read_all(inputs_of(karpathy, tmp_path))
    assert set(found["train"]) == {"train.jpg", "restval.jpg"}
    assert set(found["validation"]) == {"val.jpg"}
    assert found["train"]["train.jpg"] == (f"{tmp_path}/train.jpg", ["a dog", "The train."])
    (tmp_path / "2014").mkdir()
    (tmp_path / "2014" / "train.jpg").write_bytes(b"")
    assert read_all(inputs_of(karpathy, tmp_path))["validation"]["val.jpg"][0] == f"{tmp_path}/2014/val.jpg"


def test_another_validation_takes_the_place_of_karpathys(karpathy: Path, tmp_path: Path) -> None:
    found = read_all(inputs_of(karpathy, tmp_path, f"validation=[{write_csv(tmp_path)}]"))
    assert set(found["validation"]) == set(CAPTIONS)
    only = read_all(inputs_of(write_csv(tmp_path), tmp_path, f"validation=[{karpathy}]"))
    assert set(only["validation"]) == {"val.jpg"}
    assert set(only["train"]) == set(CAPTIONS)


def test_parquet_with_image_bytes(tmp_path: Path) -> None:
    columns = {
        "image": [{"bytes": jpeg(number), "path": name} for number, name in enumerate(CAPTIONS)],
        "caption": list(CAPTIONS.values()),
    }
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    found = read_all(inputs_of(tmp_path / "train.parquet", tmp_path))
    assert {name: texts for name, (_, texts) in found["train"].items()} == CAPTIONS


def test_webdataset_tars(tmp_path: Path) -> None:
    members = {
        "0.jpg": jpeg(0),
        "0.txt": b"a plain text",
        "0.json": json.dumps({"caption": ["a dog", " two\nlines "]}).encode(),
        "1.jpg": jpeg(1),
        "1.txt": b"a bus",
        "2.jpg": jpeg(2),
    }
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (tmp_path / "00000_stats.json").write_text("{}")
    found = read_all(inputs_of(tmp_path, tmp_path))
    captions = {name: texts for name, (_, texts) in found["train"].items()}
    assert captions == {"0": ["a dog", "two lines"], "1": ["a bus"], "2": []}
    limited = read_all(inputs_of(tmp_path, tmp_path, "limit=2"))
    assert list(limited["train"]) == ["0", "1"]


def test_what_is_read_decides_the_hash(tmp_path: Path) -> None:
    first = inputs_of(write_csv(tmp_path), tmp_path)
    assert inputs_of(write_csv(tmp_path), tmp_path).sha256 == first.sha256
    with (tmp_path / "captions.csv").open("a") as file:
        file.write("\nb.jpg,another caption")
    assert inputs_of(tmp_path / "captions.csv", tmp_path).sha256 != first.sha256


def test_rows_that_cannot_be_read_are_counted(tmp_path: Path) -> None:
    (tmp_path / "captions.csv").write_text('image,caption\na.jpg,a dog\na.jpg,one,too,many\nb.jpg,"  "\n')
    inputs = inputs_of(tmp_path / "captions.csv", tmp_path)
    assert (inputs.listed_examples, inputs.malformed) == (1, 2)


def test_malformed_rows_of_json_and_parquet_are_counted(tmp_path: Path) -> None:
    images = [{"filename": "a.jpg", "split": "train", "sentences": [{"raw": "a dog"}, 5, {"tokens": []}]}, "b", {}]
    (tmp_path / "karpathy.json").write_text(json.dumps({"images": images}))
    inputs = inputs_of(tmp_path / "karpathy.json", tmp_path)
    assert (inputs.listed_examples, inputs.malformed) == (1, 4)
    table = pa.table({"image": ["a.jpg", "b.jpg"], "image_id": ["7", None], "caption": [["a dog", None], ["a bus"]]})
    pq.write_table(table, tmp_path / "list.parquet")
    inputs = inputs_of(tmp_path / "list.parquet", tmp_path)
    assert (inputs.listed_examples, inputs.malformed) == (2, 1)
    ids = {image_id: uri for image_id, (uri, _) in read_all(inputs)["train"].items()}
    assert ids == {"7": f"{tmp_path}/a.jpg", "b.jpg": f"{tmp_path}/b.jpg"}


def test_flickr8ks_file_is_read_where_it_is_named_and_rows_without_images_are_counted(tmp_path: Path) -> None:
    (tmp_path / "Flickr8k.token.txt").write_text('a.jpg#0\ta dog\na.jpg#1\ta "dog runs\nb.jpg#0\n')
    inputs = inputs_of(tmp_path / "Flickr8k.token.txt", tmp_path)
    assert read_all(inputs)["train"] == {"a.jpg": (f"{tmp_path}/a.jpg", ["a dog", 'a "dog runs'])}
    assert inputs.malformed == 1
    (tmp_path / "captions.csv").write_text("image,caption\na.jpg,a dog\n,a cat\n")
    inputs = inputs_of(tmp_path / "captions.csv", tmp_path)
    assert (inputs.listed_examples, inputs.malformed) == (1, 1)


def test_other_images_with_one_name_keep_their_own_captions(tmp_path: Path) -> None:
    for folder, text in (("a", "a dog"), ("b", "a bus")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "captions.csv").write_text(f"image,caption\n1.jpg,{text}\n1.jpg,so {text}\n")
    inputs = inputs_of(tmp_path, tmp_path)
    found = []
    for item in inputs.items:
        config = train_config("x", "i", Path("m"), "o").data
        for batch in read_fragment(item.work.fragment, item.work.wanted, config, item.kept):
            assert batch.kept is not None
            captions = captions_of(batch.kept, "caption")
            found += list(zip(batch.image_ids, batch.image_uris, captions, strict=True))
    assert found == [
        ("1.jpg", f"{tmp_path}/a/1.jpg", ["a dog", "so a dog"]),
        ("1.jpg", f"{tmp_path}/b/1.jpg", ["a bus", "so a bus"]),
    ]
    assert (inputs.listed_images, inputs.listed_examples) == (2, 4)


def test_captions_of_shards_that_are_no_text_are_left_out() -> None:
    table = pa.table(
        {"txt": ["a \x01 code", "a dog"], "json": ['{"caption": ["half \\ud800", "whole"]}', "[" * 100_000]}
    )
    assert captions_of(table, "caption") == [["whole"], ["a dog"]]
    table = pa.table({"txt": ["a \x01 code"], "json": ['{"caption": "half \\ud800"}']})
    assert captions_of(table, "caption") == [[]]


def test_sources_without_images_or_captions_are_refused(tmp_path: Path) -> None:
    (tmp_path / "texts.csv").write_text("caption\na dog\n")
    with pytest.raises(SchemaError, match="No caption names its image"):
        inputs_of(tmp_path / "texts.csv", tmp_path)
    pq.write_table(pa.table({"image": ["a.jpg"], "title": ["a dog"]}), tmp_path / "list.parquet")
    with pytest.raises(SchemaError, match=r"no column of captions(.|\n)*data\.caption_column"):
        inputs_of(tmp_path / "list.parquet", tmp_path)
    pq.write_table(pa.table({"image_id": ["a.jpg"], "caption": ["a dog"]}), tmp_path / "list.parquet")
    with pytest.raises(SchemaError, match="No caption names its image"):
        inputs_of(tmp_path / "list.parquet", tmp_path)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.jpg").write_bytes(jpeg(0))
    with pytest.raises(ConfigError, match="no images with captions"):
        inputs_of(tmp_path / "pictures", tmp_path)
