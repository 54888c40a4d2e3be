"""Lists that come from elsewhere reach into no machine: what they may name, and what becomes of the rest."""

from pathlib import Path

import pytest

from smallcap import storage
from smallcap.config import InputConfig
from smallcap.errors import ErrorCode, RowError
from smallcap.images.fetching import fetch_objects
from smallcap.images.list_places import REFUSED, with_refusals
from smallcap.images.lists import ImageList

LIST = "s3://bucket/lists/a.txt"


@pytest.mark.parametrize(
    "uri",
    [
        "/etc/passwd",
        "file:///etc/passwd",
        "FILE:///etc/passwd",
        "local:///etc/passwd",
        "simplecache::http://10.0.0.1/a.jpg",
        "zip://a.jpg::http://10.0.0.1/a.zip",
        "zip://a.jpg::file:///a.zip",
        "tar://a.jpg::s3://bucket/a.tar",
        "gs://bucket/a::file:///etc/passwd",
        "abfs://c@a/x::/etc/passwd",
        "ftp://host/a.jpg",
        "sftp://host/a.jpg",
        "smb://host/a.jpg",
        "memory://a.jpg",
        "data:image/png;base64,AAAA",
        "reference://a",
        "refused://a",
    ],
)
@pytest.mark.parametrize("list_uri", [LIST, "https://host/a.csv", "hf://datasets/u/n/a.csv", "gs://b/a.jsonl"])
def test_a_list_from_elsewhere_may_not_name_it(uri: str, list_uri: str) -> None:
    assert with_refusals([uri], list_uri) == [f"{REFUSED}{uri}"]
    (error,) = fetch_objects([f"{REFUSED}{uri}"]).data
    assert isinstance(error, RowError)
    assert (error.code, "--trust-lists" in error.what) == (ErrorCode.FORBIDDEN, True)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://other/a::b.jpg",
        "S3://other/a.jpg",
        "https://host/a::b.jpg",
        "http://host/a.jpg",
        "hf://datasets/u/n/a.jpg",
        "gs://bucket/a.jpg",
        "az://container/a.jpg",
        "",
    ],
)
def test_a_list_from_elsewhere_may_name_it(uri: str) -> None:
    assert with_refusals([uri], LIST) == [uri]


def test_below_its_own_folder_all_protocols_are_read() -> None:
    uris = ["memory://f/lists/x/a.jpg", "memory://f/lists/../a.jpg", "memory://f/b.jpg", "memory://f/lists/x::/etc/a"]
    assert with_refusals(uris, "memory://f/lists/a.txt") == [uris[0], *(f"{REFUSED}{uri}" for uri in uris[1:])]
    assert with_refusals(["/data/a.jpg", "/data/../a.jpg"], LIST, "/data") == [
        "/data/a.jpg",
        f"{REFUSED}/data/../a.jpg",
    ]


def test_a_local_list_may_name_anything(tmp_path: Path) -> None:
    uris = ["/etc/passwd", "simplecache::http://host/a.jpg"]
    assert with_refusals(uris, f"{tmp_path}/a.txt") == uris
    assert with_refusals(uris, f"file://{tmp_path}/a.txt") == uris


def test_rows_of_a_list_in_storage(s3: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    storage.write_bytes(f"{s3}/b.jpg", b"open")
    storage.write_bytes(f"{s3}/list.txt", f"{secret}\nfile://{secret}\nb.jpg\n".encode())
    config = InputConfig()
    (table,) = ImageList(f"{s3}/list.txt", config).tables()
    fetched = fetch_objects(table["image_uri"].to_pylist()).data
    assert [getattr(data, "code", data) for data in fetched] == [ErrorCode.FORBIDDEN, ErrorCode.FORBIDDEN, b"open"]
    assert table["image_id"].to_pylist() == [str(secret), f"file://{secret}", "b.jpg"]
    (table,) = ImageList(f"{s3}/list.txt", config.model_copy(update={"trust_lists": True})).tables()
    assert fetch_objects(table["image_uri"].to_pylist()).data == [b"secret", b"secret", b"open"]
