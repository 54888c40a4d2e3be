"""The Hugging Face Hub as storage: what is read there, which token goes where, and what a person is told."""

import sys
from pathlib import Path

import pytest

from smallcap import storage
from smallcap.config import CaptionConfig, IndexConfig, InputConfig
from smallcap.errors import RowError, StorageError
from smallcap.images.fetching import fetch_objects
from smallcap.images.sources import ImageSources
from smallcap.options import load_config
from smallcap.training.config import TrainConfig
from tests.hub_server import Hub

IMAGES = {f"images/{number}.jpg": b"image %d" % number for number in range(8)}
FILES = IMAGES | {"README.md": b"read me", "a folder/ü.csv": b"caption,image\na cat,1\n"}
ROOT = "hf://datasets/user/set"


def test_files_are_found_and_read(hub: Hub) -> None:
    hub.dataset("user/set", FILES)
    assert storage.list_files(ROOT) == sorted(f"{ROOT}/{name}" for name in FILES)
    assert storage.list_files(f"{ROOT}/images/[0-3].jpg") == [f"{ROOT}/images/{number}.jpg" for number in range(4)]
    assert storage.list_folder(f"{ROOT}/images") == [f"{ROOT}/{name}" for name in IMAGES]
    assert storage.list_files(f"{ROOT}/images/1.jpg") == [f"{ROOT}/images/1.jpg"]
    assert (storage.exists(ROOT), storage.exists(f"{ROOT}/none")) == (True, False)
    assert (storage.is_folder(f"{ROOT}/images"), storage.is_folder(f"{ROOT}/README.md")) == (True, False)
    assert storage.size(f"{ROOT}/README.md") == 7
    assert storage.read_bytes(f"{ROOT}/a folder/ü.csv") == FILES["a folder/ü.csv"]
    assert storage.read_tail(f"{ROOT}/README.md", 2) == b"me"
    with storage.local_file(f"{ROOT}/images/7.jpg") as path:
        assert path.read_bytes() == b"image 7"


def test_a_file_is_read_in_ranges_without_more(hub: Hub) -> None:
    hub.dataset("user/set", {"large.parquet": bytes(range(256)) * 4000})
    with storage.open_ranged(f"{ROOT}/large.parquet") as file:
        file.seek(-256, 2)
        assert file.read(3) == b"\x00\x01\x02"
    assert hub.bytes_sent < 20_000  # of a million


def test_a_revision_is_read_as_it_was(hub: Hub) -> None:
    repository = hub.dataset("user/set", {"a.txt": b"before"})
    repository.commits.append({"a.txt": b"after"})
    assert storage.read_bytes(f"{ROOT}/a.txt") == b"after"
    assert storage.read_bytes(f"{ROOT}@{repository.sha(0)}/a.txt") == b"before"
    uri = f"{ROOT}@{repository.sha(0)}/a.txt"
    assert storage.list_files(f"{ROOT}@{repository.sha(0)}") == [uri]
    assert fetch_objects([uri]).data == [b"before"]


def test_images_are_fetched_each_by_one_request_and_its_redirect(hub: Hub) -> None:
    hub.dataset("user/set", FILES)
    uris = [f"{ROOT}/{name}" for name in IMAGES]
    assert fetch_objects(uris).data == list(IMAGES.values())
    assert len(hub.requests) == 2 * len(uris)
    codes = [
        error.code.value
        for error in fetch_objects([f"{ROOT}/none.jpg", ROOT, "hf://datasets/user", "hf://datasets/user/no/x.jpg"]).data
        if isinstance(error, RowError)
    ]
    assert codes == ["not_found", "invalid_uri", "invalid_uri", "forbidden"]


def test_a_token_reads_what_is_private_and_goes_nowhere_else(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.dataset("user/set", FILES, token="secret")
    uri = f"{ROOT}/images/1.jpg"
    for read in (storage.read_bytes, storage.list_files, storage.exists):
        with pytest.raises(StorageError, match="no such repository or revision, or does not show it") as refused:
            read(uri)
        assert "HF_TOKEN" in refused.value.remedy
    assert [getattr(error, "code", None) for error in fetch_objects([uri]).data] == ["forbidden"]
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert storage.read_bytes(uri) == b"image 1"
    assert fetch_objects([uri]).data == [b"image 1"]
    assert {token for _, path, token in hub.requests if path.startswith("/stored/")} == {""}


def test_a_service_that_fails_is_not_taken_for_an_empty_place(hub: Hub) -> None:
    hub.dataset("user/set", FILES)
    hub.fails_with = 500
    with pytest.raises(StorageError, match=r"127\.0\.0\.1:\d+ fails"):
        storage.exists(f"{ROOT}/new")


def test_a_service_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="cannot be reached"):
        storage.list_files(ROOT)


@pytest.mark.parametrize("name", ["hf://datasets", "hf://datasets/user", "hf://model", "hf://user/na me/x"])
def test_other_forms_are_refused(name: str, hub: Hub) -> None:
    with pytest.raises(StorageError, match="no place on the Hugging Face Hub") as refused:
        storage.list_files(name)
    assert "hf://datasets/USER/NAME" in refused.value.expected
    assert not hub.requests


@pytest.mark.parametrize("place", [f"{ROOT}/out", "hf://buckets/user/bucket/out", "hf://user/model"])
def test_no_job_writes_there(place: str, hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for write in (
        lambda: storage.write_bytes(place, b""),
        lambda: storage.upload(tmp_path / "file", place),
        lambda: storage.remove(place),
        lambda: load_config(CaptionConfig, flags={"images": ["x"], "model": "demo", "index": "i", "out": place}),
        lambda: load_config(IndexConfig, flags={"dumps": ["x.csv"], "out": place}),
        lambda: load_config(TrainConfig, flags={"sources": ["x.json"], "index": "i", "out": place}),
    ):
        with pytest.raises(StorageError, match="Nothing can be written to the Hugging Face Hub") as refused:
            write()
        assert "--to hf" in refused.value.remedy
    assert not hub.requests


def test_a_missing_package_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(StorageError, match="needs the package huggingface_hub") as missing:
        storage.list_files(ROOT)
    assert missing.value.remedy == "pip install 'smallcap[hf]' on every node"


def test_a_list_of_images_and_its_captions_are_read(hub: Hub) -> None:
    hub.dataset("user/set", FILES | {"list.csv": f"image_id,image_uri\na,{ROOT}/images/1.jpg\n".encode()})
    (table,) = ImageSources([f"{ROOT}/list.csv"], InputConfig()).tables()
    assert table.select(["image_id", "image_uri"]).to_pylist() == [
        {"image_id": "a", "image_uri": f"{ROOT}/images/1.jpg"}
    ]
    (table,) = ImageSources([f"{ROOT}/images"], InputConfig()).tables()
    assert table["image_id"].to_pylist() == [f"{number}.jpg" for number in range(8)]
