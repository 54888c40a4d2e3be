import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smallcap import storage
from smallcap.config import InputConfig
from smallcap.errors import ConfigError, SchemaError, StorageError
from smallcap.images.sources import ImageSources
from tests.input_files import make_tar, write_files


def listed(*sources: Path | str, keep: tuple[str, ...] = ()) -> tuple[dict[str, str], ImageSources]:
    found = ImageSources([str(source) for source in sources], InputConfig(), keep)
    rows = [row for table in found.tables() for row in table.to_pylist()]
    return {row["image_id"]: row["image_uri"] for row in rows}, found


def test_images_are_called_by_their_path_below_the_source(tmp_path: Path) -> None:
    write_files(tmp_path, "b.jpg", "a.PNG", "sub/c.webp", "notes.txt", ".hidden.jpg")
    names = ("a.PNG", "b.jpg", "sub/c.webp")
    assert list(listed(tmp_path)[0].items()) == [(name, f"{tmp_path}/{name}") for name in names]
    assert listed(tmp_path / "b.jpg")[0] == {"b.jpg": f"{tmp_path}/b.jpg"}


def test_a_folder_of_img2dataset_gives_its_tars_only(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"{number:05d}.tar").write_bytes(make_tar(("a.jpg", b"")))
        pq.write_table(pa.table({"url": ["x"]}), tmp_path / f"{number:05d}.parquet")
        (tmp_path / f"{number:05d}_stats.json").write_text("{}")
    images, found = listed(tmp_path)
    assert not images
    assert [(tar.uri, tar.name) for tar in found.tars.values()] == [
        (f"{tmp_path}/{number:05d}.tar", f"{number:05d}") for number in range(2)
    ]
    assert not found.parquet


def test_images_and_tars_in_one_folder(tmp_path: Path) -> None:
    write_files(tmp_path, "a.jpg", "sub/b.PNG", "sub/c.tar.gz", "d.tgz", "list.parquet", "_work.jpg", "sub/.e.tar")
    images, found = listed(tmp_path)
    assert set(images) == {"a.jpg", "sub/b.PNG"}
    assert {tar.name for tar in found.tars.values()} == {"sub/c", "d"}
    images, found = listed(f"{tmp_path}/*.tgz", f"{tmp_path}/sub/c.tar.gz", tmp_path)
    assert len(found.tars) == 2  # each once


def test_parquet_files_are_images_or_lists_by_their_columns(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    pq.write_table(pa.table({"image": [b"1", b"2"]}), tmp_path / "sub/a.parquet", row_group_size=1)
    pq.write_table(pa.table({"image_uri": ["s3://b/x.jpg"]}), tmp_path / "b.parquet")
    for source in (tmp_path, f"{tmp_path}/**/*.parquet"):
        images, found = listed(source)
        assert images == {"s3://b/x.jpg": "s3://b/x.jpg"}
        (parquet,) = found.parquet.values()
        assert parquet.outline.rows == (1, 1)
    assert listed(tmp_path)[1].parquet[f"{tmp_path}/sub/a.parquet"].name == "sub/a"
    assert listed(tmp_path / "sub/a.parquet")[1].parquet[f"{tmp_path}/sub/a.parquet"].name == "a"


def test_a_glob_of_lists(tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text(f"image_uri\ns3://b/{name}.jpg\n")
    assert set(listed(f"{tmp_path}/*.csv")[0]) == {"s3://b/a.csv.jpg", "s3://b/b.csv.jpg"}
    with pytest.raises(StorageError, match="does not exist"):
        listed(f"{tmp_path}/*.tsv")


def test_a_prefix_on_s3(s3: str) -> None:
    for name in ("in/b.jpg", "in/deep/a.jpg", "in/_x/c.jpg", "in/0.tar", "inner.jpg"):
        storage.write_bytes(f"{s3}/{name}", b"x")
    images, found = listed(f"{s3}/in/")
    assert images == {"b.jpg": f"{s3}/in/b.jpg", "deep/a.jpg": f"{s3}/in/deep/a.jpg"}
    assert set(found.tars) == {f"{s3}/in/0.tar"}
    assert listed(f"{s3}/inner.jpg")[0] == {"inner.jpg": f"{s3}/inner.jpg"}
    assert set(listed(f"{s3}/in/*.jpg")[0].values()) == {f"{s3}/in/b.jpg"}
    with pytest.raises(StorageError, match="does not exist"):
        listed(f"{s3}/none")


def test_kept_columns_must_agree(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("image_uri,width\ns3://b/a.jpg,3\n")
    pq.write_table(pa.table({"image_uri": ["s3://b/b.jpg"], "width": [3]}), tmp_path / "b.parquet")
    (tmp_path / "c.tar").write_bytes(make_tar(("a.jpg", b"")))
    _, found = listed(tmp_path / "a.csv", tmp_path / "c.tar", keep=("width",))
    assert found.kept == pa.schema([("width", pa.string())])
    with pytest.raises(ConfigError, match="different types") as differ:
        listed(tmp_path / "a.csv", tmp_path / "b.parquet", keep=("width",))
    assert "width: int64" in str(differ.value)
    with pytest.raises(SchemaError, match="column to keep is missing"):
        listed(write_files(tmp_path / "photos", "a.jpg"), keep=("width",))


def test_a_name_that_is_not_utf8_is_an_error(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg")).write_bytes(b"x")
    with pytest.raises(SchemaError, match="not UTF-8"):
        listed(tmp_path)
