import contextlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest

from smallcap import storage
from smallcap.errors import ConflictError, ErrorCode, RowError, StorageError


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder on the local disk, and an empty bucket."""
    return str(tmp_path) if request.param == "local" else str(request.getfixturevalue("s3"))


def test_what_is_written_is_read(folder: str) -> None:
    uri = storage.join(folder, "a", "b.txt")
    assert not storage.exists(uri)
    storage.write_bytes(uri, b"one")
    storage.write_bytes(uri, b"two")
    assert storage.read_bytes(uri) == b"two"
    assert storage.exists(uri)
    assert storage.is_folder(storage.join(folder, "a"))
    storage.remove(uri)
    storage.remove(uri)  # nothing there is no error
    assert not storage.exists(uri)


def test_listing_is_sorted_filtered_and_without_hidden_files(folder: str) -> None:
    for name in ("b.jpg", "a/c.JPG", "a/d.txt", ".hidden.jpg", "_staging/e.jpg"):
        storage.write_bytes(storage.join(folder, name), b"x")
    listed = storage.list_files(folder, (".jpg",))
    assert [uri.removeprefix(folder) for uri in listed] == ["/a/c.JPG", "/b.jpg"]
    assert storage.list_files(listed[0]) == [listed[0]]
    assert storage.list_files(storage.join(folder, "a", "*.txt")) == [storage.join(folder, "a/d.txt")]


def test_an_update_sees_the_content_and_can_refuse(folder: str) -> None:
    uri = storage.join(folder, "sub", "pointer.json")
    storage.update_bytes(uri, lambda found: b"%r one" % found)
    storage.update_bytes(uri, lambda found: b"%b two" % (found or b""))
    assert storage.read_bytes(uri) == b"None one two"

    def refuse(found: bytes | None) -> bytes:
        raise ConflictError("not now", found=str(found))

    with pytest.raises(ConflictError, match="not now"):
        storage.update_bytes(uri, refuse)
    assert storage.read_bytes(uri) == b"None one two"


def test_no_update_is_lost_among_writers_at_the_same_time(folder: str) -> None:
    """All have read the same content before any of them writes, unless a lock file lets them come one by one."""
    uri = storage.join(folder, "counter")
    together = threading.Barrier(4)

    def count(found: bytes | None) -> bytes:
        with contextlib.suppress(threading.BrokenBarrierError):
            together.wait(timeout=0.5)
        return b"%d" % (int(found or b"0") + 1)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: storage.update_bytes(uri, count), range(4)))
    assert storage.read_bytes(uri) == b"4"


def test_a_folder_lists_what_is_directly_in_it(folder: str) -> None:
    for name in ("b/c.txt", "a.txt", ".hidden/d"):
        storage.write_bytes(storage.join(folder, "sub", name), b"xyz")
    names = ["/.hidden", "/a.txt", "/b"]
    assert [uri.removeprefix(f"{folder}/sub") for uri in storage.list_folder(f"{folder}/sub")] == names
    assert storage.list_folder(f"{folder}/none") == []
    assert (storage.size(f"{folder}/sub/a.txt"), storage.size(f"{folder}/none")) == (3, None)
    assert abs((datetime.now(UTC) - storage.modified_at(f"{folder}/sub/a.txt")).total_seconds()) < 60


def test_temporary_files_are_moved_in_and_remote_ones_read_locally(folder: str, tmp_path: Path) -> None:
    (tmp_path / "scratch.bin").write_bytes(b"bytes")
    storage.move_in(tmp_path / "scratch.bin", storage.join(folder, "sub", "file.bin"))
    with storage.local_file(storage.join(folder, "sub", "file.bin")) as path:
        assert (path.name, path.read_bytes()) == ("file.bin", b"bytes")


def test_files_are_uploaded_and_downloaded(folder: str, tmp_path: Path) -> None:
    (tmp_path / "up").write_bytes(b"bytes")
    storage.upload(tmp_path / "up", storage.join(folder, "sub", "file"))
    storage.download(storage.join(folder, "sub", "file"), tmp_path / "down")
    assert (tmp_path / "down").read_bytes() == b"bytes"


def test_many_objects_are_fetched_in_order_and_missing_ones_are_rows(folder: str) -> None:
    uris = [storage.join(folder, f"{number}.bin") for number in range(20)]
    for number, uri in enumerate(uris):
        storage.write_bytes(uri, bytes([number]))
    missing = storage.join(folder, "missing.bin")
    fetched = storage.fetch_objects([*uris, missing, uris[3]])
    assert fetched[:20] == [bytes([number]) for number in range(20)]
    assert fetched[21] == bytes([3])
    assert isinstance(fetched[20], RowError)
    assert fetched[20].code == ErrorCode.NOT_FOUND
    assert missing in str(fetched[20])


def test_a_missing_path_is_an_error_that_names_it(folder: str) -> None:
    uri = storage.join(folder, "nothing")
    with pytest.raises(StorageError, match="nothing"):
        storage.read_bytes(uri)
    with pytest.raises(StorageError, match="does not exist"):
        storage.list_files(uri)


def test_a_missing_bucket_stops_the_run(s3: str) -> None:
    with pytest.raises(StorageError):
        storage.fetch_objects(["s3://no-such-bucket-at-all/a.jpg"])


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(StorageError, match="Use a local path"):
        storage.read_bytes("gopher://host/file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_forbidden_file_is_a_row(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_bytes(b"x")
    file.chmod(0)
    (fetched,) = storage.fetch_objects([str(file)])
    assert isinstance(fetched, RowError)
    assert fetched.code == ErrorCode.FORBIDDEN


def test_a_failed_write_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = str(tmp_path / "file")
    storage.write_bytes(uri, b"old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(StorageError, match="No space left"):
        storage.write_bytes(uri, b"new")
    assert storage.read_bytes(uri) == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert storage.sha256_file(tmp_path / "abc") == known
