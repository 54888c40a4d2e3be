"""Reference captions of each layout, and which image a run's id means."""

import json
from pathlib import Path
from typing import Any

import pytest

from smallcap.captions.rows import CaptionColumns
from smallcap.errors import ConfigError, SchemaError
from smallcap.evaluation.references import ReferenceImage, References, load_references

COLUMNS = CaptionColumns("caption", "image")

COCO = {
    "images": [
        {"id": 42, "file_name": "COCO_val2014_000000000042.jpg"},
        {"id": 7, "file_name": "val/dog.png"},
        {"id": 9, "file_name": "000000000123.jpg"},
        {"id": 8, "file_name": "uncaptioned.png"},
    ],
    "annotations": [
        {"image_id": 42, "caption": "a bus"},
        {"image_id": 7, "caption": "a dog"},
        {"image_id": 42, "caption": "a red bus"},
        {"image_id": 9, "caption": "a cat"},
        {"image_id": 5, "caption": "of an image that is not listed"},
    ],
}
TWICE = {
    "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "a.jpg"}],
    "annotations": [{"image_id": 1, "caption": "x"}, {"image_id": 2, "caption": "y"}],
}
KARPATHY = {
    "images": [
        {"filename": "COCO_val2014_1.jpg", "cocoid": 1, "split": "test", "sentences": [{"raw": "one"}, {"raw": "uno"}]},
        {"filename": "2.jpg", "split": "train", "sentences": [{"raw": "two"}]},
        {"filename": "3.jpg", "split": "test", "sentences": []},
    ]
}


def load(folder: Path, content: Any, split: str | None = None) -> References:
    (folder / "refs.json").write_text(json.dumps(content))
    return load_references(f"{folder}/refs.json", COLUMNS, split)


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> References:
    return load(tmp_path_factory.mktemp("coco"), COCO)


@pytest.mark.parametrize(
    ("image_id", "name"),
    [
        ("COCO_val2014_000000000042.jpg", "COCO_val2014_000000000042.jpg"),
        ("42", "COCO_val2014_000000000042.jpg"),
        ("s3://bucket/val2014/COCO_val2014_000000000042.jpg", "COCO_val2014_000000000042.jpg"),
        ("COCO_val2014_000000000042", "COCO_val2014_000000000042.jpg"),
        ("000000000042.jpg", "COCO_val2014_000000000042.jpg"),  # COCO 2017's name of the same image
        ("photos/dog.jpeg", "val/dog.png"),
        ("7", "val/dog.png"),
        ("photo_7.jpg", None),  # this reference's file name has nothing to do with its id
        ("000000000123.png", "000000000123.jpg"),
        ("123", None),  # this reference's id is 9, so the number in its name is not an id
        ("5", "5"),
        ("8", None),
        ("cat.jpg", None),
        ("", None),
    ],
)
def test_an_image_is_found_by_name_id_stem_or_number(coco: References, image_id: str, name: str | None) -> None:
    assert coco.find(image_id) == name


def test_coco_captions_are_grouped_by_image(coco: References) -> None:
    captions = coco.captions
    assert captions["COCO_val2014_000000000042.jpg"] == ("a bus", "a red bus")
    assert "uncaptioned.png" not in captions
    assert captions["5"] == ("of an image that is not listed",)
    references = References([ReferenceImage("a/1.jpg", ("x",)), ReferenceImage("b/1.jpg", ("y",))], "refs.csv")
    found = {name: references.find(name) for name in ("a/1.jpg", "1.jpg", "c/1.png")}
    assert found == {"a/1.jpg": "a/1.jpg", "1.jpg": None, "c/1.png": None}  # a name that means two images means none


def test_karpathys_splits_are_taken_whole_or_one_by_one(tmp_path: Path) -> None:
    whole = load(tmp_path, KARPATHY)
    assert whole.captions == {"COCO_val2014_1.jpg": ("one", "uno"), "2.jpg": ("two",)}
    test = load(tmp_path, KARPATHY, split="test")
    assert test.captions == {"COCO_val2014_1.jpg": ("one", "uno")}
    assert test.find("000000000001.jpg") == "COCO_val2014_1.jpg"
    with pytest.raises(ConfigError, match="no such split") as error:
        load(tmp_path, KARPATHY, split="val")
    assert error.value.expected == "test, train"


@pytest.mark.parametrize(
    ("content", "where", "found"),
    [
        ({"images": [], "annotations": []}, "refs.json", ""),
        ({"info": {}, "licenses": []}, "refs.json", "info, licenses"),
        ([1, 2], "refs.json", "no JSON object"),
        ({"annotations": [{"image_id": 1, "caption": None}]}, "refs.json: annotations[0]", "None"),
        ({"annotations": [{"image_id": 1, "caption": " "}]}, "refs.json: annotations[0]", "' '"),
        ({"annotations": ["a dog"]}, "refs.json: annotations[0]", "a dog"),
        ({"images": [{"id": None}], "annotations": []}, "refs.json: images[0]", "None"),
        ({"images": [{"sentences": [{"raw": "x"}]}]}, "refs.json: images[0].sentences[0]", ""),
        ({"images": [{"filename": "a.jpg", "sentences": [{}]}]}, "refs.json: images[0].sentences[0]", "{}"),
        (TWICE, "refs.json", "a.jpg"),
    ],
)
def test_broken_references_are_named(tmp_path: Path, content: Any, where: str, found: str) -> None:
    with pytest.raises(SchemaError) as error:
        load(tmp_path, content)
    assert error.value.where == f"{tmp_path}/{where}"
    assert found in error.value.found


def test_a_row_without_an_image_and_a_split_where_there_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "refs.csv").write_text("caption\nx\ny\n")
    with pytest.raises(SchemaError, match=r"No row(.|\n)*--image-id-column") as error:
        load_references(f"{tmp_path}/refs.csv", COLUMNS)
    assert error.value.where == f"{tmp_path}/refs.csv: line 2"
    with pytest.raises(SchemaError, match="no reference captions"):
        References([], "refs.csv")
    with pytest.raises(ConfigError, match="not divided into splits"):
        load(tmp_path, COCO, split="test")


def test_what_is_malformed_in_another_split_is_no_concern(tmp_path: Path) -> None:
    broken = {"filename": "4.jpg", "split": "train", "sentences": [5, {"raw": 5}]}
    content = {"images": [*KARPATHY["images"], broken]}
    assert list(load(tmp_path, content, split="test").captions) == ["COCO_val2014_1.jpg"]
    train = load(tmp_path, content, split="train")
    assert (list(train.captions), train.dropped) == (["2.jpg"], {"malformed": 2})


def test_rows_that_are_no_reference_are_dropped_and_counted(tmp_path: Path) -> None:
    (tmp_path / "refs.csv").write_text('image,caption\na,x\n,y\nb,\nc,one, two\nd,"open\ne,"a\x01"\nf,.\n')
    references = load_references(f"{tmp_path}/refs.csv", COLUMNS)
    assert references.captions == {"a": ("x",)}
    assert references.dropped == {"nameless": 1, "empty": 2, "malformed": 3}
    (tmp_path / "refs.csv").write_text("image,caption\na,.\n")
    with pytest.raises(SchemaError, match=r"no reference captions(.|\n)*1 empty"):
        load_references(f"{tmp_path}/refs.csv", COLUMNS)
