import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from smallcap.images.dataset import list_images

from smallcap.config import InputConfig
from smallcap.errors import ConfigError, SchemaError, StorageError


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("b.jpg", "a.PNG", "sub/c.webp", "notes.txt", ".hidden.jpg"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(b"x")
    return tmp_path / "photos"


def listed(*sources: Path | str, **options: object) -> dict[str, str]:
    table = list_images([str(source) for source in sources], InputConfig(**options))  # type: ignore[arg-type]
    return dict(zip(table["image_id"].to_pylist(), table["image_uri"].to_pylist(), strict=True))


def test_a_folder_gives_its_images_by_their_path_below_it(photos: Path) -> None:
    assert listed(photos) == {name: f"{photos}/{name}" for name in ("a.PNG", "b.jpg", "sub/c.webp")}
    assert list(listed(photos)) == sorted(listed(photos))


def test_one_file_is_one_image(photos: Path) -> None:
    assert listed(photos / "b.jpg") == {"b.jpg": f"{photos}/b.jpg"}


def test_a_prefix_in_s3(s3: str) -> None:
    from smallcap import storage

    for name in ("in/a.jpg", "in/deep/b.jpg", "out/c.jpg"):
        storage.write_bytes(f"{s3}/{name}", b"x")
    assert listed(f"{s3}/in") == {"a.jpg": f"{s3}/in/a.jpg", "deep/b.jpg": f"{s3}/in/deep/b.jpg"}


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_lists_of_uris(tmp_path: Path, suffix: str) -> None:
    rows = {"image_id": ["one", "two"], "image_uri": ["s3://bucket/1.jpg", "rel/2, two.jpg"], "extra": ["x", "y"]}
    file = tmp_path / f"list{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table(rows), file)
    elif suffix == ".jsonl":
        file.write_text("".join(json.dumps({n: rows[n][i] for n in rows}) + "\n" for i in range(2)))
    else:
        mark = {".csv": ",", ".tsv": "\t"}[suffix]
        lines = [mark.join(rows), *(mark.join(f'"{rows[n][i]}"' for n in rows) for i in range(2))]
        file.write_text("\n".join(lines))
    assert listed(file) == {"one": "s3://bucket/1.jpg", "two": f"{tmp_path}/rel/2, two.jpg"}


def test_without_an_id_column_the_uri_is_the_id(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("s3://bucket/b.jpg\n\nhttps://host/a.jpg\n")
    assert listed(tmp_path / "list.txt") == {uri: uri for uri in ("https://host/a.jpg", "s3://bucket/b.jpg")}


def test_columns_have_the_names_of_the_config(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("key,url\n7,https://host/a.jpg\n")
    assert listed(tmp_path / "list.csv", image_column="url", id_column="key") == {"7": "https://host/a.jpg"}
    with pytest.raises(SchemaError, match=r"input\.image_column"):
        listed(tmp_path / "list.csv")


def test_an_image_named_twice_is_there_once(photos: Path) -> None:
    assert listed(photos, photos) == listed(photos)


def test_of_two_images_with_one_id_the_first_is_taken(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("image_id,image_uri\n7,https://host/b.jpg\n7,https://host/a.jpg\n")
    assert listed(tmp_path / "list.csv") == {"7": "https://host/a.jpg"}


def test_images_in_tars_are_refused(tmp_path: Path) -> None:
    (tmp_path / "00000.tar").write_bytes(b"")
    with pytest.raises(ConfigError, match="tars"):
        listed(tmp_path)


def test_no_images_and_no_path_are_errors(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="There are no images"):
        listed(tmp_path / "empty")
    with pytest.raises(StorageError, match="does not exist"):
        listed(tmp_path / "nothing")


def test_a_row_without_uri_is_named(tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text('{"image_uri": "a.jpg"}\n{"image_uri": null}\n')
    with pytest.raises(SchemaError, match="row 2"):
        listed(tmp_path / "list.jsonl")


def test_a_damaged_list_is_named(tmp_path: Path) -> None:
    (tmp_path / "list.parquet").write_bytes(b"not parquet")
    with pytest.raises(SchemaError, match=r"list\.parquet"):
        listed(tmp_path / "list.parquet")
