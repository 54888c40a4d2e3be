import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from smallcap.errors import SchemaError
from smallcap.output.webdataset import Sample, image_extension, rewrite_samples, sample_key, write_samples

JPEG, PNG = b"\xff\xd8\xff\xe0 jpeg", b"\x89PNG\r\n"


def sample(image_id: str, data: bytes = JPEG, **record: object) -> Sample:
    return Sample(image_id, data, f"a caption of {image_id}", record)


@pytest.mark.parametrize(
    ("image_id", "key"),
    [
        ("a.jpg", "a"),
        ("folder.v1/a.b.JPEG", "folder.v1/a_b"),
        ("https://host.org/x/y.png?w=1", "host.org/x/y_png?w=1"),
        ("s3://bucket/a.webp", "bucket/a"),
        ("/data/a", "data/a"),
        ("../..//a.b", "_/_/_/a_b"),
        ("shards/00000.tar#0001.jpg", "shards/00000_tar#0001"),
        ("a\x00\n\\b", "a___b"),
        (".jpg", "_"),
        ("", "_"),
        ("folder/", "folder/_"),
        ("雪.jpg", "雪"),
    ],
)
def test_a_key_is_a_relative_path_without_a_dot_in_its_base_name(image_id: str, key: str) -> None:
    assert sample_key(image_id, set()) == key


def test_ids_with_one_key_get_keys_of_their_own(tmp_path: Path) -> None:
    ids = ["a.jpg", "a.png", "a-2", "a.gif"]
    assert write_samples(tmp_path / "t.tar", [sample(i) for i in ids]) == 4
    with tarfile.open(tmp_path / "t.tar") as tar:
        names = tar.getnames()
    assert [name.removesuffix(".jpg") for name in names[::3]] == ["a", "a-2", "a-2-2", "a-3"]


@pytest.mark.parametrize(
    ("head", "extension"),
    [
        (JPEG, "jpg"),
        (PNG, "png"),
        (b"GIF89a", "gif"),
        (b"RIFF....WEBP", "webp"),
        (b"MM\x00*", "tif"),
        (b"\x00\x00\x00 ftypavif", "avif"),
        (b"\x00\x00\x00\x18ftypheic", "heic"),
        (b"\xff\x0a", "jxl"),
        (b"P6 2 2", "bin"),
    ],
)
def test_the_extension_is_that_of_the_bytes(head: bytes, extension: str) -> None:
    assert image_extension(head) == extension


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one.tar", "two.tar"):
        write_samples(tmp_path / name, [sample("a.jpg", width=3), sample("b" * 300 + ".png", PNG)])
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()
    with tarfile.open(tmp_path / "one.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in tar} == {(0, 0, 0, "", 0o644)}


def test_values_that_json_has_not_are_written_as_it_has_them(tmp_path: Path) -> None:
    import datetime

    date = datetime.date(2026, 1, 2)
    given = {"nan": float("nan"), "bytes": b"\x00\x01", "date": date, "deep": [{"x": float("inf")}]}
    write_samples(tmp_path / "t.tar", [sample("a.jpg", **given)])
    with tarfile.open(tmp_path / "t.tar") as tar:
        record = json.load(tar.extractfile("a.json"))  # type: ignore[arg-type]
    expected = {"nan": None, "bytes": "AAE=", "date": "2026-01-02", "deep": [{"x": None}]}
    assert {name: record[name] for name in given} == expected


def without(*dropped: str) -> Callable[[str], str | None]:
    return lambda image_id: None if image_id in dropped else image_id


def test_samples_get_new_ids_in_their_json(tmp_path: Path) -> None:
    write_samples(tmp_path / "all.tar", [sample("a.jpg"), sample("b.jpg")])
    assert rewrite_samples(tmp_path / "all.tar", tmp_path / "new.tar", {"a.jpg": "x/ä.jpg", "b.jpg": "b.jpg"}.get) == 2
    with tarfile.open(tmp_path / "new.tar") as tar:
        assert tar.getnames() == ["a.jpg", "a.txt", "a.json", "b.jpg", "b.txt", "b.json"]
        ids = [json.load(tar.extractfile(name))["image_id"] for name in ("a.json", "b.json")]  # type: ignore[arg-type]
    assert ids == ["x/ä.jpg", "b.jpg"]


def test_samples_are_dropped_by_id_and_the_others_keep_their_keys(tmp_path: Path) -> None:
    write_samples(tmp_path / "all.tar", [sample("x/a.jpg"), sample("x/a.png", PNG), sample("b.jpg")])
    assert rewrite_samples(tmp_path / "all.tar", tmp_path / "left.tar", without("x/a.jpg", "unknown")) == 2
    with tarfile.open(tmp_path / "left.tar") as tar:
        assert tar.getnames() == ["x/a-2.png", "x/a-2.txt", "x/a-2.json", "b.jpg", "b.txt", "b.json"]
        assert tar.extractfile("x/a-2.png").read() == PNG  # type: ignore[union-attr]
    assert rewrite_samples(tmp_path / "left.tar", tmp_path / "none.tar", without("x/a.png", "b.jpg")) == 0
    (tmp_path / "bad.tar").write_bytes(b"no tar")
    with pytest.raises(SchemaError, match="Delete it and the part"):
        rewrite_samples(tmp_path / "bad.tar", tmp_path / "left.tar", without())
