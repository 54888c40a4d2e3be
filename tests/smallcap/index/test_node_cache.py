"""The node's cache: files are verified, downloaded once, shared by versions, and deleted when room is needed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from smallcap import storage
from smallcap.errors import IndexIntegrityError, StorageError
from smallcap.index import node_cache as index_cache
from smallcap.index.manifest import FileEntry, IndexManifest
from smallcap.index.node_cache import check_file, missing_files, open_version_folder
from smallcap.index.partition import files_of
from smallcap.index.retriever import Retriever
from tests.index_files import PublishIndex, unit_vectors


def files_in(cache: str) -> set[str]:
    """The cached files' names, as manifests have them."""
    return {f"files/{path.name}" for path in Path(cache, "files").glob("*")}


def needed(manifest: IndexManifest) -> set[str]:
    """The files that a search opens; the template is not needed."""
    return {entry.file for entry in manifest.files} - {manifest.template.file}


@pytest.fixture
def small(s3: str, publish_index: PublishIndex) -> IndexManifest:
    """An index of 20 captions in the bucket."""
    return publish_index(f"{s3}/index", unit_vectors(20), ["t"] * 20)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The URIs that are downloaded."""
    asked: list[str] = []
    download = storage.download
    monkeypatch.setattr(storage, "download", lambda uri, path: (asked.append(uri), download(uri, path)))
    return asked


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read for their checksum."""
    checked: list[str] = []
    check = index_cache.check_file

    def noted(path: Path, entry: FileEntry) -> str:
        checked.append(entry.file)
        return check(path, entry)

    monkeypatch.setattr(index_cache, "check_file", noted)
    return checked


def _open_remote(uri: str, cache: str, results: multiprocessing.Queue[Any]) -> None:
    downloads: list[str] = []
    download = storage.download

    def counted(source: str, path: str | Path) -> None:
        downloads.append(source)
        download(source, path)

    storage.download = counted
    neighbours = Retriever.open(uri, cache_dir=cache).search(unit_vectors(3, seed=2), 4)
    results.put((len(downloads), [[n.caption_id for n in found] for found in neighbours]))


def _stall_in_second_download(uri: str, cache: str, ready: multiprocessing.synchronize.Event) -> None:
    download = storage.download

    def stalling(source: str, path: str | Path) -> None:
        download(source, path)
        if "captions" in source:
            with Path(path).open("r+b") as file:
                file.truncate(10)
            ready.set()
            time.sleep(600)

    storage.download = stalling
    Retriever.open(uri, cache_dir=cache)


class TestDownloads:
    def test_several_processes_download_once(self, s3: str, cache: str, publish_index: PublishIndex) -> None:
        vectors = unit_vectors(60)
        uri = f"{s3}/some/index"
        manifest = publish_index(uri, vectors, ["t"] * 60, shards=3)
        context = multiprocessing.get_context("spawn")
        results = context.Queue()
        processes = [context.Process(target=_open_remote, args=(uri, cache, results)) for _ in range(3)]
        for process in processes:
            process.start()
        found = [results.get(timeout=60) for _ in processes]
        for process in processes:
            process.join()
        assert sorted(count for count, _ in found) == [0, 0, 6]
        expected = np.argsort(-(unit_vectors(3, seed=2) @ vectors.T), axis=1)[:, :4].tolist()
        assert all(neighbours == expected for _, neighbours in found)
        assert files_in(cache) == needed(manifest)
        assert list(Path(cache, "downloads").iterdir()) == []

    def test_a_process_killed_in_the_middle_leaves_nothing_that_harms(
        self, s3: str, cache: str, publish_index: PublishIndex, asked: list[str]
    ) -> None:
        uri = f"{s3}/index"
        manifest = publish_index(uri, unit_vectors(60), ["t"] * 60, shards=2)
        context = multiprocessing.get_context("spawn")
        ready = context.Event()
        process = context.Process(target=_stall_in_second_download, args=(uri, cache, ready))
        process.start()
        assert ready.wait(60)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert list(Path(cache, "downloads").iterdir())
        whole = files_in(cache)
        Retriever.open(uri, cache_dir=cache)
        assert list(Path(cache, "downloads").iterdir()) == []
        assert {uri.removeprefix(f"{s3}/index/") for uri in asked} == needed(manifest) - whole

    def test_versions_and_indexes_share_files(
        self, s3: str, cache: str, publish_index: PublishIndex, asked: list[str]
    ) -> None:
        vectors, texts = unit_vectors(60), [f"t{number}" for number in range(60)]
        before = publish_index(f"{s3}/index", vectors[:40], texts[:40], shards=2)
        Retriever.open(f"{s3}/index", cache_dir=cache)
        after = publish_index(f"{s3}/index", vectors, texts, shards=3)
        asked.clear()
        new = {entry.file for entry in after.files} - {entry.file for entry in before.files}
        missing = missing_files(f"{s3}/index", after, cache, files_of(after))
        assert {entry.file for entry in missing} == new
        Retriever.open(f"{s3}/index", cache_dir=cache)
        assert missing_files(f"{s3}/index", after, cache, files_of(after)) == []
        assert {uri.removeprefix(f"{s3}/index/") for uri in asked} == new
        assert len(new) == 2
        publish_index(f"{s3}/other", vectors, texts, shards=3)
        asked.clear()
        Retriever.open(f"{s3}/other", cache_dir=cache)
        assert asked == []

    def test_a_damaged_copy_is_fetched_again(self, s3: str, cache: str, small: IndexManifest, asked: list[str]) -> None:
        mapped = Retriever.open(f"{s3}/index", cache_dir=cache)
        copy = Path(cache, small.shards[0].file)
        data = copy.read_bytes()
        copy.unlink()  # the file that is mapped stays as it is
        copy.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        asked.clear()
        again = Retriever.open(f"{s3}/index", cache_dir=cache)
        assert len(asked) == 1
        check_file(copy, small.shards[0])
        assert again.search(unit_vectors(1), 3) == mapped.search(unit_vectors(1), 3)

    @pytest.mark.parametrize("harm", ["truncated", "grown", "emptied", "swapped", "other version", "half a stamp"])
    def test_a_copy_that_is_not_what_was_verified_is_never_searched(
        self, harm: str, s3: str, cache: str, publish_index: PublishIndex, asked: list[str]
    ) -> None:
        """Each is found without reading what is whole; only what differs is fetched again."""
        manifest = publish_index(f"{s3}/index", unit_vectors(60), ["t"] * 60, shards=2)
        first = Retriever.open(f"{s3}/index", cache_dir=cache).search(unit_vectors(3, seed=2), 4)
        one, two = (Path(cache, entry.file) for entry in manifest.shards)
        damaged = {manifest.shards[0].file}
        if harm in ("truncated", "grown", "emptied"):
            data = one.read_bytes()
            with one.open("r+b") as file:  # in place, as a disk that is full or a copy that is cut off leaves it
                file.truncate({"truncated": len(data) - 1, "grown": len(data) + 1, "emptied": 0}[harm])
        elif harm == "swapped":
            damaged.add(manifest.shards[1].file)
            one.rename(f"{one}.aside")
            two.rename(one)
            Path(f"{one}.aside").rename(two)
        elif harm == "other version":
            other = publish_index(f"{s3}/other", unit_vectors(60, seed=5), ["t"] * 60, shards=2)
            storage.download(f"{s3}/other/{other.shards[0].file}", one)
        else:  # a process was killed while it wrote what it had verified
            damaged = set()
            stamps = list(Path(cache, "verified").iterdir())
            for stamp in stamps:
                stamp.write_bytes(stamp.read_bytes()[:10])
        asked.clear()
        again = Retriever.open(f"{s3}/index", cache_dir=cache)
        assert {uri.removeprefix(f"{s3}/index/") for uri in asked} == damaged
        assert again.search(unit_vectors(3, seed=2), 4) == first
        check_file(one, manifest.shards[0])
        check_file(two, manifest.shards[1])

    def test_a_damaged_object_is_an_error_after_a_second_try(
        self, s3: str, cache: str, small: IndexManifest, asked: list[str]
    ) -> None:
        damaged = storage.join(f"{s3}/index", small.shards[0].file)
        storage.write_bytes(damaged, storage.read_bytes(damaged)[:-1] + b"\0")
        with pytest.raises(IndexIntegrityError, match=r"damaged(.|\n)*sha256"):
            Retriever.open(f"{s3}/index", cache_dir=cache)
        assert asked.count(damaged) == 2
        assert small.shards[0].file not in files_in(cache)
        assert list(Path(cache, "downloads").iterdir()) == []

    @pytest.mark.usefixtures("small")
    def test_a_transfer_damaged_once(self, s3: str, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: Counter[str] = Counter()
        lock = threading.Lock()
        download = storage.download

        def damaging(uri: str, path: str | Path) -> None:
            download(uri, path)
            with lock:
                asked[uri] += 1
            if asked[uri] == 1:
                Path(path).write_bytes(Path(path).read_bytes()[:-1])

        monkeypatch.setattr(storage, "download", damaging)
        Retriever.open(f"{s3}/index", cache_dir=cache)
        assert set(asked.values()) == {2}


class TestStamps:
    @pytest.mark.parametrize("remote", [True, False])
    def test_a_file_is_read_again_only_when_it_was_touched(
        self,
        remote: bool,
        tmp_path: Path,
        cache: str,
        publish_index: PublishIndex,
        checked: list[str],
        request: pytest.FixtureRequest,
    ) -> None:
        uri = f"{request.getfixturevalue('s3')}/index" if remote else f"{tmp_path}/index"
        manifest = publish_index(uri, unit_vectors(20), ["t"] * 20, shards=2)
        open_version_folder(uri, manifest, cache, manifest.shards[:1])
        assert checked == [manifest.shards[0].file]  # only what is asked for
        root = open_version_folder(uri, manifest, cache)
        assert root == (Path(cache) if remote else tmp_path / "index")
        assert missing_files(uri, manifest, cache) == []
        assert sorted(checked) == sorted(entry.file for entry in manifest.files)
        checked.clear()
        open_version_folder(uri, manifest, cache)
        assert checked == []
        os.utime(root / manifest.shards[1].file)
        open_version_folder(uri, manifest, cache)
        assert checked == [manifest.shards[1].file]

    def test_a_cache_folder_that_cannot_be_written(self, tmp_path: Path, publish_index: PublishIndex) -> None:
        manifest = publish_index(f"{tmp_path}/index", unit_vectors(20), ["t"] * 20)
        (tmp_path / "file").write_text("")
        with pytest.raises(StorageError, match=r"cannot be written(.|\n)*cache_dir"):
            open_version_folder(f"{tmp_path}/index", manifest, f"{tmp_path}/file")


class TestRoom:
    @pytest.fixture
    def disk(self, cache: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
        """A function that pretends the cache's disk to hold so many bytes."""

        def hold(total: int) -> None:
            def free(_: Path) -> int:
                return total - sum(Path(cache, name).stat().st_size for name in files_in(cache))

            monkeypatch.setattr(index_cache, "_free_bytes", free)

        return hold

    def test_what_was_not_used_for_longest_goes_first(
        self, s3: str, cache: str, publish_index: PublishIndex, disk: Callable[[int], None]
    ) -> None:
        manifests = {}
        for number, name in enumerate(["oldest", "older", "old"]):
            manifests[name] = publish_index(f"{s3}/{name}", unit_vectors(500, seed=number), [name] * 500)
            Retriever.open(f"{s3}/{name}", cache_dir=cache)
        mapped = Retriever.open(f"{s3}/oldest", cache_dir=cache)
        hours_ago = {"oldest": 1, "older": 3, "old": 2}
        used = {entry.file: hours_ago[name] for name, manifest in manifests.items() for entry in manifest.files}
        for name in files_in(cache):
            stamp = index_cache.NodeCache(Path(cache))._stamp(Path(cache), name)
            os.utime(stamp, (time.time() - 3600 * used[name],) * 2)

        def cached() -> set[str]:
            """Which of the indexes are whole."""
            return {name for name, manifest in manifests.items() if files_in(cache) >= needed(manifest)}

        new = publish_index(f"{s3}/new", unit_vectors(500, seed=9), ["new"] * 500)
        size = sum(Path(cache, name).stat().st_size for name in files_in(cache))
        disk(size + sum(entry.bytes for entry in new.files[1:]) - 100)
        Retriever.open(f"{s3}/new", cache_dir=cache)
        assert cached() == {"oldest", "old"}
        newest = publish_index(f"{s3}/newest", unit_vectors(1000, seed=10), ["newest"] * 1000)
        disk(sum(entry.bytes for entry in (*new.files[1:], *newest.files[1:])) + 100)
        Retriever.open(f"{s3}/newest", cache_dir=cache)
        assert cached() == set()
        assert new.shards[0].file in files_in(cache)  # used a moment ago
        assert newest.shards[0].file in files_in(cache)
        assert len(mapped.search(unit_vectors(1), 3)[0]) == 3  # its files are gone, its pages are not
        assert not any(Path(cache, "downloads").iterdir())

    def test_no_room_at_all(
        self, s3: str, cache: str, publish_index: PublishIndex, disk: Callable[[int], None], asked: list[str]
    ) -> None:
        publish_index(f"{s3}/index", unit_vectors(500), ["t"] * 500)
        disk(10_000)
        with pytest.raises(StorageError, match=r"does not fit(.|\n)*expected: \d+ bytes free(.|\n)*10000 bytes free"):
            Retriever.open(f"{s3}/index", cache_dir=cache)
        assert asked == []


class TestOnDiskLists:
    """faiss would open a file whose path the index's writer chose."""

    def write(self, folder: Path, key: str) -> Path:
        vectors = unit_vectors(300, 16)
        index = faiss.index_factory(16, key, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors)
        inner = faiss.extract_index_ivf(index)
        lists = faiss.OnDiskInvertedLists(inner.nlist, inner.code_size, str(folder / "elsewhere"))
        inner.replace_invlists(lists)
        index.add(vectors)
        faiss.write_index(index, str(folder / "shard.faiss"))
        del index  # before its lists, which it does not own
        return folder / "shard.faiss"

    @pytest.mark.parametrize("key", ["IVF4,Flat", "IVF4,SQ8", "OPQ4,IVF4,SQ8"])
    def test_they_are_refused_before_faiss_reads(
        self, tmp_path: Path, cache: str, key: str, publish_index: PublishIndex
    ) -> None:
        uri = f"{tmp_path}/index"
        manifest = publish_index(uri, unit_vectors(300, 16), ["t"] * 300, index_key=key, nprobe=4)
        entry = FileEntry.adopt(self.write(tmp_path, key), Path(uri), "shard")
        shard = manifest.shards[0].model_copy(update=entry.model_dump())
        with pytest.raises(IndexIntegrityError, match=r"in another file(.|\n)*ilod"):
            open_version_folder(uri, manifest.model_copy(update={"shards": (shard,)}), cache)

    def test_wherever_they_are(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(index_cache, "_CHUNK_BYTES", 64)
        section = b"ilod" + (4).to_bytes(8, "little") + (64).to_bytes(8, "little") + (4).to_bytes(8, "little")
        path = tmp_path / "x.faiss"
        for before in (*range(30, 70), 500):
            path.write_bytes(b"i" * before + section + b"o" * 40)
            with pytest.raises(IndexIntegrityError, match="ilod"):
                check_file(path, FileEntry.describe(path, "shard"))
        for codes in (b"ilod" + bytes(range(1, 60)) + b"ilod" + b"\xff" * 24 + b"ilod", b"ilod" * 10_000):
            path.write_bytes(codes)  # which only begin like such a section
            check_file(path, FileEntry.describe(path, "shard"))
