"""Models at URIs: copied to the node once, whole, checked, replaced with the original, and told apart from nothing."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smallcap import storage
from smallcap.captioner import Captioner
from smallcap.errors import CheckpointError, StorageError
from smallcap.model.checkpoint import load_checkpoint
from smallcap.model.clip_encoder import load_retrieval_encoder
from smallcap.model.clip_query import embed_text
from smallcap.model.encoder_spec import load_crop_plan, load_preprocessing, resolve_encoder_identity
from smallcap.model.files import checkpoint_id, checkpoint_sha256, resolve_folder
from smallcap.model.prompt import load_tokenizer
from tests.hub_server import Hub, Repository


def put(folder: Path, uri: str) -> str:
    """Copies a model's folder to a URI."""
    for file in folder.iterdir():
        storage.upload(file, storage.join(uri, file.name))
    return uri


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return f"{tmp_path}/cache"


@pytest.fixture
def model(s3: str, tiny_smallcap: Path) -> str:
    """A SmallCap checkpoint in the bucket."""
    return put(tiny_smallcap, f"{s3}/run/model")


@pytest.fixture
def downloaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are downloaded."""
    names: list[str] = []
    download = storage.download
    monkeypatch.setattr(
        storage, "download", lambda uri, path: (names.append(uri.rpartition("/")[2]), download(uri, path))
    )
    return names


def test_a_model_in_a_bucket_is_the_one_that_was_put_there(
    model: str, tiny_smallcap: Path, cache: str, downloaded: list[str]
) -> None:
    folder = resolve_folder(f"{model}/", "smallcap", cache)
    assert folder.parent == Path(cache, "models")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        file.name: file.read_bytes() for file in tiny_smallcap.iterdir()
    }
    assert len(downloaded) == len(list(folder.iterdir()))
    downloaded.clear()
    remote, local = load_checkpoint(model, cache_dir=cache), load_checkpoint(str(tiny_smallcap))
    digest = local.model_id.partition("@")[2]
    assert remote.model_id == checkpoint_id(model, cache) == f"{model}@{digest}"
    assert checkpoint_sha256(model, cache) == checkpoint_sha256(str(tiny_smallcap))
    assert checkpoint_sha256(model, cache).startswith(digest)
    assert load_crop_plan(model, None, cache_dir=cache) == load_crop_plan(str(tiny_smallcap), None)
    assert load_tokenizer(model, cache).encode("a dog").ids == load_tokenizer(str(tiny_smallcap)).encode("a dog").ids
    assert downloaded == []


def test_the_same_captions_come_from_it(model: str, tiny_smallcap: Path, cache: str) -> None:
    import numpy as np

    image = np.arange(40 * 40 * 3, dtype=np.uint8).reshape(40, 40, 3)
    captions = [
        Captioner.from_pretrained(source, k=0, dtype="float32", cache_dir=cache).caption([image])[0].captions
        for source in (model, str(tiny_smallcap))
    ]
    assert captions[0] == captions[1]


@pytest.mark.parametrize("form", ["hf:{}", "open_clip:local-dir:{}"])
def test_encoders(form: str, s3: str, tiny_clip: Path, cache: str, downloaded: list[str]) -> None:
    if form.startswith("open_clip"):
        pytest.importorskip("open_clip")
        with pytest.raises(CheckpointError, match=r"config(.|\n)*open_clip_config.json"):
            resolve_encoder_identity(form.format(put(tiny_clip, f"{s3}/clip")), cache)
        assert downloaded  # it was fetched, and is no open_clip model
        return
    spec = form.format(put(tiny_clip, f"{s3}/clip"))
    there, here = resolve_encoder_identity(spec, cache), resolve_encoder_identity(f"hf:{tiny_clip}")
    assert (there.spec, there.weights_sha256, there.dim) == (spec, here.weights_sha256, here.dim)
    assert load_preprocessing(spec, cache) == load_preprocessing(f"hf:{tiny_clip}")
    texts = load_retrieval_encoder(spec, cache_dir=cache).encode_texts(["a dog"])
    assert (texts == load_retrieval_encoder(f"hf:{tiny_clip}").encode_texts(["a dog"])).all()


def test_a_search_takes_such_an_encoder(
    s3: str, tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    spec = f"hf:{put(tiny_clip, f'{s3}/clip')}"
    assert (embed_text(spec, "a dog") == embed_text(f"hf:{tiny_clip}", "a dog")).all()
    assert Path(tmp_path, ".cache/smallcap/models").is_dir()


def test_weights_in_a_file_of_their_own(s3: str, cache: str, tmp_path: Path, downloaded: list[str]) -> None:
    weights = tmp_path / "weights.pt"
    weights.write_bytes(b"weights")
    storage.upload(weights, f"{s3}/weights.pt")
    identities = [
        resolve_encoder_identity(f"open_clip:ViT-B-32/{place}", cache) for place in (f"{s3}/weights.pt", weights)
    ]
    assert identities[0].weights_sha256 == identities[1].weights_sha256
    assert downloaded == ["weights.pt"]
    with pytest.raises(StorageError, match="it does not exist"):
        resolve_encoder_identity(f"open_clip:ViT-B-32/{s3}/none.pt", cache)


def test_a_model_on_the_hub_by_its_uri(hub: Hub, tiny_clip: Path, cache: str) -> None:
    repository = hub.repositories["models/user/clip"] = Repository()
    repository.commits[0] |= {file.name: file.read_bytes() for file in tiny_clip.iterdir()}
    for spec in ("hf://user/clip", "hf:hf://user/clip"):
        assert resolve_encoder_identity(spec, cache).weights_sha256 == checkpoint_sha256(str(tiny_clip))
    with pytest.raises(StorageError, match="no such repository"):
        resolve_encoder_identity("hf://user/nothing", cache)


class TestWhatIsMissing:
    def test_no_folder_and_no_model(self, s3: str, cache: str) -> None:
        with pytest.raises(CheckpointError, match=r"no model in this folder(.|\n)*OUT/model") as caught:
            load_checkpoint(f"{s3}/none", cache_dir=cache)
        assert (caught.value.where, caught.value.found) == (f"{s3}/none", "no file, or no such folder")
        storage.write_bytes(f"{s3}/other/a.csv", b"x")
        with pytest.raises(CheckpointError, match=r"found: a\.csv"):
            load_checkpoint(f"{s3}/other", cache_dir=cache)

    def test_no_weights_and_no_config(self, model: str, s3: str, cache: str) -> None:
        storage.remove(f"{model}/model.safetensors")
        with pytest.raises(CheckpointError, match="no weights file") as caught:
            checkpoint_id(model, cache)
        assert caught.value.where == model  # and no folder of the cache
        storage.write_bytes(f"{model}/model.safetensors", b"x")
        storage.remove(f"{model}/config.json")
        with pytest.raises(CheckpointError, match=r"no config\.json") as caught:
            checkpoint_id(model, cache)
        assert caught.value.where == model

    def test_no_bucket_and_no_cache_folder(self, model: str, cache: str, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match="bucket does not exist"):
            checkpoint_id("s3://no-such-bucket-at-all/model", cache)
        (tmp_path / "file").write_text("")
        with pytest.raises(StorageError, match=r"cannot be written(.|\n)*cache_dir"):
            checkpoint_id(model, f"{tmp_path}/file")


class TestCopies:
    def test_a_replaced_model_is_another_one(self, model: str, cache: str, downloaded: list[str]) -> None:
        before = resolve_folder(model, "smallcap", cache)
        old = (before / "config.json").read_bytes()
        storage.write_bytes(f"{model}/config.json", old + b" ")
        after = resolve_folder(model, "smallcap", cache)
        assert after != before
        assert ((before / "config.json").read_bytes(), (after / "config.json").read_bytes()) == (old, old + b" ")

    def test_a_damaged_copy_is_fetched_again(self, model: str, cache: str, downloaded: list[str]) -> None:
        folder = resolve_folder(model, "smallcap", cache)
        weights = folder / "model.safetensors"
        data = weights.read_bytes()
        weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        (folder / "config.json").unlink()
        downloaded.clear()
        assert resolve_folder(model, "smallcap", cache) == folder
        assert weights.read_bytes() == data
        assert sorted(downloaded) == ["config.json", "model.safetensors"]
        os.utime(weights)  # touched, and as it was: read once more, and kept
        downloaded.clear()
        resolve_folder(model, "smallcap", cache)
        assert downloaded == []

    def test_a_transfer_that_is_cut_is_repeated_and_then_an_error(
        self, model: str, cache: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        download, cut = storage.download, [1]

        def cutting(uri: str, path: str | Path) -> None:
            download(uri, path)
            if uri.endswith(".safetensors") and cut:
                cut.pop()
                Path(path).write_bytes(Path(path).read_bytes()[:-1])

        monkeypatch.setattr(storage, "download", cutting)
        load_checkpoint(model, cache_dir=cache)
        shutil.rmtree(cache)
        cut.extend([1, 1])
        with pytest.raises(CheckpointError, match="copy of a model's file is damaged"):
            load_checkpoint(model, cache_dir=cache)

    def test_a_model_that_never_stays_the_same(self, model: str, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
        download = storage.download

        def replacing(uri: str, path: str | Path) -> None:
            download(uri, path)
            if uri.endswith("/config.json"):
                storage.write_bytes(uri, Path(path).read_bytes() + b" ")

        monkeypatch.setattr(storage, "download", replacing)
        with pytest.raises(CheckpointError, match="changes while it is copied"):
            load_checkpoint(model, cache_dir=cache)

    def test_code_and_pickled_optimizers_stay_where_they_are(self, model: str, cache: str) -> None:
        for name in ("modeling.py", "optimizer.pt", "training_args.bin", "pytorch_model.bin", "sub/config.json"):
            storage.write_bytes(f"{model}/{name}", b"x")
        names = {file.name for file in resolve_folder(model, "smallcap", cache).iterdir()}
        assert names.isdisjoint({"modeling.py", "optimizer.pt", "training_args.bin", "pytorch_model.bin", "sub"})

    def test_processes_download_once_and_a_killed_one_harms_nobody(self, model: str, cache: str) -> None:
        context = multiprocessing.get_context("spawn")
        begun = context.Event()
        killed = context.Process(target=_stall, args=(model, cache, begun))
        killed.start()
        assert begun.wait(60)
        assert killed.pid is not None
        os.kill(killed.pid, signal.SIGKILL)
        killed.join()
        results = context.Queue()
        processes = [context.Process(target=_resolve, args=(model, cache, results)) for _ in range(3)]
        for process in processes:
            process.start()
        found = [results.get(timeout=60) for _ in processes]
        for process in processes:
            process.join()
        assert len({folder for folder, _ in found}) == 1
        assert sorted(count > 0 for _, count in found) == [False, False, True]
        assert list(Path(cache, "downloads").iterdir()) == []
        load_checkpoint(model, cache_dir=cache)


def _counting(counts: list[str]) -> Callable[[str, str | Path], None]:
    download = storage.download

    def counted(uri: str, path: str | Path) -> None:
        counts.append(uri)
        download(uri, path)

    return counted


def _resolve(model: str, cache: str, results: Any) -> None:
    counts: list[str] = []
    storage.download = _counting(counts)
    results.put((str(resolve_folder(model, "smallcap", cache)), len(counts)))


def _stall(model: str, cache: str, begun: Any) -> None:
    def stalling(uri: str, path: str | Path) -> None:
        Path(path).write_bytes(b"the beginning")
        begun.set()
        time.sleep(600)

    storage.download = stalling
    resolve_folder(model, "smallcap", cache)
