import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smallcap import storage
from smallcap.config import InputConfig
from smallcap.errors import ConfigError, SchemaError, StorageError
from smallcap.images import sources
from smallcap.images.fetching import fetch_objects
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


def test_a_name_that_is_not_utf8_is_escaped_and_fetched(tmp_path: Path) -> None:
    for name in (b"/caf\xe9.jpg", b"/caf\xe8.jpg"):
        Path(os.fsdecode(os.fsencode(tmp_path) + name)).write_bytes(name)
    images = listed(tmp_path)[0]
    assert list(images) == ["caf\\xe8.jpg", "caf\\xe9.jpg"]
    assert fetch_objects(list(images.values())).data == [b"/caf\xe8.jpg", b"/caf\xe9.jpg"]


def test_links_to_folders_are_followed_once_around(tmp_path: Path) -> None:
    write_files(tmp_path, "real/a.jpg", "in/b.jpg")
    (tmp_path / "in/val2014").symlink_to("../real")
    (tmp_path / "real/up").symlink_to("../in")
    (tmp_path / "in/here").symlink_to(".")
    assert list(listed(tmp_path / "in")[0]) == ["b.jpg", "val2014/a.jpg"]


def test_a_path_with_brackets_is_a_path_where_it_exists(tmp_path: Path) -> None:
    write_files(tmp_path, "photos [2024]/a.jpg", "photos [2024]/b?.jpg", "photos [2024]/bc.jpg", "photos 2/c.jpg")
    folder = tmp_path / "photos [2024]"
    assert list(listed(folder)[0]) == ["a.jpg", "b?.jpg", "bc.jpg"]
    assert list(listed(folder / "b?.jpg")[0]) == ["b?.jpg"]
    assert list(listed(folder / "?.jpg")[0].values()) == [f"{folder}/a.jpg"]
    assert list(listed(tmp_path / "photos [2-9]/*.jpg")[0].values()) == [f"{tmp_path}/photos 2/c.jpg"]
    (folder / "list.csv").write_text("image_uri\na.jpg\n")
    assert list(listed(folder / "list.csv")[0].values()) == [f"{folder}/a.jpg"]


OWN = ("part-001-000000.parquet", "_run.json", "_work/x.parquet", "_x/y.jpg", "_webdataset/part-001-000000.tar")


@pytest.mark.parametrize(
    ("source", "out", "names"),
    [
        (".", "out", ["a.jpg", "out2/c.jpg"]),
        ("*", "out", ["a.jpg"]),
        (".", "out/", ["a.jpg", "out2/c.jpg"]),
        (".", "link", ["a.jpg", "out2/c.jpg"]),  # to `out`
        (".", ".", ["a.jpg", "out/b.jpg", "out2/c.jpg"]),
        ("out", ".", ["out/b.jpg"]),
        ("out", "out", ["out/b.jpg"]),
        ("out/b.jpg", "out", ["out/b.jpg"]),
    ],
)
def test_the_runs_own_files_are_no_input(tmp_path: Path, source: str, out: str, names: list[str]) -> None:
    write_files(tmp_path, "a.jpg", "out/b.jpg", "out2/c.jpg")
    if out == "link":
        (tmp_path / "link").symlink_to("out")
    write_files(tmp_path / out, *OWN)
    found = ImageSources([os.path.normpath(tmp_path / source)], InputConfig(), out=str(tmp_path / out))
    uris = [uri for table in found.tables() for uri in table["image_uri"].to_pylist()]
    assert sorted(uri.removeprefix(f"{tmp_path}/") for uri in uris) == names
    assert not found.tars
    assert not found.parquet
    assert not found.passed_over


JPEG_START = b"\xff\xd8\xff\xe0 and more"


def test_files_that_look_like_images_and_are_none_of_them_are_counted(tmp_path: Path) -> None:
    write_files(
        tmp_path, "a.jpg", "_x/b.jpg", ".c.JPEG", "_d.tar", "._a.jpg", "d.psd", "d.jpg.gz", "e.txt", "f", "g.json"
    )
    write_files(tmp_path, "i.zip", "j.tar.zst", "k.TAR.Z", "._l.zip")
    write_files(tmp_path, "h", "l.dat", "m.jpg~", "_x/n", content=JPEG_START)
    (tmp_path / "broken").symlink_to("nothing")
    os.mkfifo(tmp_path / "pipe")  # reading it would not end
    images, found = listed(tmp_path)
    assert list(images) == ["a.jpg"]
    counts = {"hidden": 3, "other_ending": 2, "no_ending": 3, "archive": 3}
    assert found.passed_over == counts
    assert listed(tmp_path, tmp_path, f"{tmp_path}/*")[1].passed_over == counts  # each file once
    _, found = listed(tmp_path, tmp_path / "_d.tar")
    assert found.passed_over == counts | {"hidden": 2}  # what is named is taken


def test_objects_are_looked_into_up_to_a_number(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_OBJECTS_LOOKED_INTO", 2)
    for name, content in (("a", JPEG_START), ("b", b"x"), ("c", JPEG_START), ("d.jpg", b"x"), ("e.zip", b"x")):
        storage.write_bytes(f"{s3}/in/{name}", content)
    assert listed(f"{s3}/in")[1].passed_over == {"no_ending": 1, "not_looked_into": 1, "archive": 1}


def test_parquet_files_with_images_beside_images_are_counted(tmp_path: Path) -> None:
    write_files(tmp_path, "a.jpg", "0.tar", "2.parquet")
    for name in ("0", "1", "3"):
        pq.write_table(pa.table({"image": [b"1"]}), tmp_path / f"{name}.parquet")
    pq.write_table(pa.table({"image": [b"1"], "thumb": [b"1"]}), tmp_path / "4.parquet")
    pq.write_table(pa.table({"image_uri": ["/a.jpg"]}), tmp_path / "list.parquet")
    images, found = listed(tmp_path)
    assert list(images) == ["a.jpg"]
    assert not found.parquet
    assert found.passed_over == {"parquet": 3}  # that of 0.tar belongs to it
    _, found = listed(tmp_path, tmp_path / "3.parquet")
    assert (list(found.parquet), found.passed_over) == ([f"{tmp_path}/3.parquet"], {"parquet": 2})


def test_ids_of_a_wrong_type_are_named_when_the_input_is_listed(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"1"], "image_id": [[1]]}), tmp_path / "a.parquet")
    with pytest.raises(SchemaError, match=r"column of ids(.|\n)*a.parquet: image_id(.|\n)*list<"):
        listed(tmp_path)
