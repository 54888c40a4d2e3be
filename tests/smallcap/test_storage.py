import contextlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import obstore
import pytest

from smallcap import storage
from smallcap.errors import ConflictError, StorageError


def test_what_is_written_is_read(anywhere: str) -> None:
    uri = storage.join(anywhere, "a", "b.txt")
    assert not storage.exists(uri)
    storage.write_bytes(uri, b"one")
    storage.write_bytes(uri, b"two")
    assert storage.read_bytes(uri) == b"two"
    assert storage.exists(uri)
    assert storage.is_folder(storage.join(anywhere, "a"))
    storage.remove(uri)
    storage.remove(uri)  # nothing there is no error
    assert not storage.exists(uri)


def test_an_update_sees_the_content_and_can_refuse(anywhere: str) -> None:
    uri = storage.join(anywhere, "sub", "pointer.json")
    storage.update_bytes(uri, lambda found: b"%r one" % found)
    storage.update_bytes(uri, lambda found: b"%b two" % (found or b""))
    assert storage.read_bytes(uri) == b"None one two"

    def refuse(found: bytes | None) -> bytes:
        raise ConflictError("not now", found=str(found))

    with pytest.raises(ConflictError, match="not now"):
        storage.update_bytes(uri, refuse)
    assert storage.read_bytes(uri) == b"None one two"


def test_no_update_is_lost_among_writers_at_the_same_time(anywhere: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All have read the same content before any of them writes, unless a lock file lets them come one by one."""
    request, put = threading.Lock(), obstore.put

    def put_alone(*arguments: Any, **options: Any) -> Any:
        with request:  # moto compares the ETag and writes in two steps, where S3 takes one
            return put(*arguments, **options)

    monkeypatch.setattr(obstore, "put", put_alone)
    uri = storage.join(anywhere, "counter")
    together = threading.Barrier(4)

    def count(found: bytes | None) -> bytes:
        with contextlib.suppress(threading.BrokenBarrierError):
            together.wait(timeout=0.5)
        return b"%d" % (int(found or b"0") + 1)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: storage.update_bytes(uri, count), range(4)))
    assert storage.read_bytes(uri) == b"4"


def test_a_folder_lists_what_is_directly_in_it(anywhere: str) -> None:
    for name in ("b/c.txt", "a.txt", ".hidden/d"):
        storage.write_bytes(storage.join(anywhere, "sub", name), b"xyz")
    names = ["/.hidden", "/a.txt", "/b"]
    assert [uri.removeprefix(f"{anywhere}/sub") for uri in storage.list_folder(f"{anywhere}/sub")] == names
    assert storage.list_folder(f"{anywhere}/none") == []
    assert (storage.size(f"{anywhere}/sub/a.txt"), storage.size(f"{anywhere}/none")) == (3, None)
    assert abs((datetime.now(UTC) - storage.modified_at(f"{anywhere}/sub/a.txt")).total_seconds()) < 60


def test_files_are_uploaded_or_moved_in_and_read_locally(anywhere: str, tmp_path: Path) -> None:
    uri = storage.join(anywhere, "sub", "file.bin")
    for number, put in enumerate((storage.upload, storage.move_in)):
        (tmp_path / "scratch.bin").write_bytes(b"bytes%d" % number)
        put(tmp_path / "scratch.bin", uri)
        storage.download(uri, tmp_path / "down")
        assert (tmp_path / "down").read_bytes() == b"bytes%d" % number
        with storage.local_file(uri) as path:
            assert (path.name, path.read_bytes()) == ("file.bin", b"bytes%d" % number)


@pytest.mark.parametrize("fault", ["slow_down", "reset", "lost"])
def test_writes_and_reads_survive_a_failing_service(s3: str, fault_proxy: Any, fault: str, tmp_path: Path) -> None:
    large = os.urandom(6 << 20)  # in parts
    (tmp_path / "large").write_bytes(large)
    fault_proxy.plan(schedule=[fault, fault], methods=["PUT", "POST"])
    storage.write_bytes(f"{s3}/small", b"small")
    storage.upload(tmp_path / "large", f"{s3}/large")
    assert fault_proxy.done()[fault] >= 4
    fault_proxy.plan(schedule=["truncated", "slow_down"], methods=["GET"])
    assert storage.read_bytes(f"{s3}/small") == b"small"
    assert storage.read_bytes(f"{s3}/large") == large


ASKED: dict[str, tuple[Any, Any]] = {  # what is done with a bucket, and what it returns
    "exists": (lambda uri: storage.exists(f"{uri}/in/a"), True),
    "is folder": (lambda uri: storage.is_folder(f"{uri}/in"), True),
    "size": (lambda uri: storage.size(f"{uri}/in/a"), 3),
    "list folder": (lambda uri: len(storage.list_folder(f"{uri}/in")), 2),
    "list": (lambda uri: len(storage.list_files(f"{uri}/in")), 2),
    "list one": (lambda uri: len(storage.list_files(f"{uri}/in/a")), 1),
    "list a pattern": (lambda uri: len(storage.list_files(f"{uri}/in/*")), 2),
    "list odd keys": (lambda uri: len(storage.list_files(f"{uri}/odd//")), 1),
    "open": (lambda uri: storage.open_ranged(f"{uri}/in/a").read(2), b"aa"),
    "read": (lambda uri: storage.read_bytes(f"{uri}/in/a"), b"aaa"),
    "tail": (lambda uri: storage.read_tail(f"{uri}/in/a", 1), b"a"),
    "write": (lambda uri: storage.write_bytes(f"{uri}/out/w", b"w"), None),
    "update": (lambda uri: storage.update_bytes(f"{uri}/out/u", lambda found: (found or b"") + b"u"), None),
    "upload": (lambda uri: storage.upload(__file__, f"{uri}/out/f"), None),
    "download": (lambda uri: storage.download(f"{uri}/in/a", os.devnull), None),
    "remove": (lambda uri: storage.remove(f"{uri}/out/r"), None),
}


@pytest.mark.parametrize("fault", ["slow_down", "reset", "error"])
@pytest.mark.parametrize("operation", ASKED)
def test_everything_rides_out_a_store_that_blinks(
    s3: str, fault_proxy: Any, operation: str, fault: str, single_tries: None
) -> None:
    """Every request fails for a while; nothing but patience repeats one."""
    for name in ("in/a", "in/b", "out/r", "odd//c"):
        storage.write_bytes(f"{s3}/{name}", b"aaa")
    storage.remove(f"{s3}/out/u")  # another case's
    fault_proxy.plan(rates={fault: 1.0}, requests=5, error_status=500, error_code="InternalError")
    ask, answer = ASKED[operation]
    assert ask(s3) == answer
    assert fault_proxy.done()[fault] == 5
    if operation == "remove":
        assert not storage.exists(f"{s3}/out/r")
    if operation == "update":
        assert storage.read_bytes(f"{s3}/out/u") == b"u"


def test_a_store_that_fails_for_good_is_told_after_the_patience(
    s3: str, fault_proxy: Any, single_tries: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMALLCAP_STORAGE_PATIENCE_S", "1.5")
    fault_proxy.plan(rates={"slow_down": 1.0})
    with pytest.raises(StorageError, match=r"too busy to answer \(503.*in every attempt for [12] s"):
        storage.read_bytes(f"{s3}/a")
    requests = fault_proxy.done()["requests"]
    fault_proxy.plan(rates={"error": 1.0}, error_status=403, error_code="AccessDenied")
    with pytest.raises(StorageError, match="access denied"):
        storage.read_bytes(f"{s3}/a")
    assert fault_proxy.done()["requests"] < 3 < requests


@pytest.mark.slow
def test_a_listing_that_breaks_off_goes_on_where_it_was(s3: str, fault_proxy: Any, single_tries: None) -> None:
    names = [f"{s3}/many/{number:04d}" for number in range(1100)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda uri: storage.write_bytes(uri, b""), names))
    fault_proxy.plan(rates={"slow_down": 1.0}, begins_at=1, requests=3)
    assert list(storage.iter_files(f"{s3}/many")) == names
    assert fault_proxy.done()["slow_down"] == 3


def test_an_open_file_rides_out_a_store_that_blinks(s3: str, fault_proxy: Any, single_tries: None) -> None:
    for key in ("plain", "not//plain"):  # read by obstore, and by s3fs
        storage.write_bytes(f"{s3}/{key}", b"0123456789")
        with storage.open_ranged(f"{s3}/{key}") as file:
            fault_proxy.plan(rates={"reset": 1.0}, requests=3)
            assert file.read(4) == b"0123"
            fault_proxy.plan()
            assert file.read() == b"456789"


@pytest.mark.parametrize("fault", ["slow_down", "reset", "lost"])
def test_an_update_takes_place_once_in_spite_of(s3: str, fault_proxy: Any, fault: str) -> None:
    """Also where the first write did arrive, and only its answer was lost."""
    for _ in range(3):
        fault_proxy.plan(schedule=[fault, fault], methods=["PUT"])
        storage.update_bytes(f"{s3}/counter", lambda found: b"%d" % (int(found or b"0") + 1))
        assert fault_proxy.done()[fault] >= 1
    assert storage.read_bytes(f"{s3}/counter") == b"3"


def test_missing_paths_and_unknown_protocols_are_errors(anywhere: str) -> None:
    uri = storage.join(anywhere, "nothing")
    with pytest.raises(StorageError, match="nothing"):
        storage.read_bytes(uri)
    with pytest.raises(StorageError, match="does not exist"):
        storage.read_tail(uri, 3)
    with pytest.raises(StorageError, match="Use a local path"):
        storage.read_bytes("gopher://host/file")


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


def test_the_end_of_a_file_is_read_alone(anywhere: str) -> None:
    for content, tail in ((b"0123456789", b"789"), (b"01", b"01"), (b"", b"")):
        storage.write_bytes(storage.join(anywhere, "file"), content)
        assert storage.read_tail(storage.join(anywhere, "file"), 3) == tail


def test_listing_is_sorted_filtered_and_without_hidden_files_in_a_list_and_as_a_stream(anywhere: str) -> None:
    for name in ("a/1.jpg", "a.jpg", "a-b/2.JPG", "a/b/3.jpg", "c.txt", "_d/4.jpg", "a/.5.jpg", "ü #%20+.jpg"):
        storage.write_bytes(f"{anywhere}/{name}", b"x")
    shown = [f"{anywhere}/{name}" for name in ("a-b/2.JPG", "a.jpg", "a/1.jpg", "a/b/3.jpg", "ü #%20+.jpg")]
    for list_files in (storage.list_files, storage.iter_files):
        assert list(list_files(anywhere, (".jpg",))) == shown
        assert list(list_files(f"{anywhere}/a/*.jpg")) == [f"{anywhere}/a/1.jpg"]
        assert list(list_files(f"{anywhere}/_d/*")) == [f"{anywhere}/_d/4.jpg"]
        assert list(list_files(f"{anywhere}/c.txt")) == [f"{anywhere}/c.txt"]
        with pytest.raises(StorageError, match="does not exist"):
            list(list_files(f"{anywhere}/none"))


def test_keys_that_obstore_refuses_are_listed_among_the_others(s3: str) -> None:
    names = ("a.jpg", "b//c.jpg", "b/../d.jpg", "b/./e.jpg", "e.jpg", "f\tg.jpg")
    for name in names:
        storage.write_bytes(f"{s3}/in/{name}", name.encode())
    listed = sorted(f"{s3}/in/{name}" for name in names)
    assert list(storage.iter_files(f"{s3}/in")) == listed
    assert [storage.read_bytes(uri) for uri in listed] == [uri.removeprefix(f"{s3}/in/").encode() for uri in listed]
    for uri in listed:
        assert list(storage.iter_files(uri)) == [uri]
        with storage.open_ranged(uri) as file:
            assert file.read() == uri.removeprefix(f"{s3}/in/").encode()
    assert list(storage.iter_files(f"{s3}/in/b/")) == [uri for uri in listed if "/b/" in uri]


def test_a_listed_file_whose_name_is_not_utf8_is_read_in_every_way(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/d\xe8/caf\xe9.csv"))
    path.parent.mkdir()
    path.write_bytes(b"x")
    (uri,) = storage.list_files(str(tmp_path))
    assert uri == f"{tmp_path}/d\\xe8/caf\\xe9.csv"
    assert storage.list_files(f"{tmp_path}/d\\xe8") == [uri]  # as the command line has it
    assert storage.is_folder(f"{tmp_path}/d\\xe8")
    assert storage.exists(uri)
    assert storage.size(uri) == 1
    assert storage.read_bytes(uri) == b"x"
    with storage.open_ranged(uri) as file, storage.local_file(uri) as local:
        assert file.read() == local.read_bytes() == b"x"


def test_what_is_removed_is_a_path_whatever_marks_its_name_has(anywhere: str) -> None:
    for name in ("run [12]/a", "run [12]/b/c", "run 1/a", "run 2", "run [*]"):
        storage.write_bytes(f"{anywhere}/{name}", b"x")
    storage.remove(f"{anywhere}/run [12]")
    storage.remove(f"{anywhere}/run [*]")
    storage.remove(f"{anywhere}/run [1-9]")  # which does not exist
    assert storage.list_files(anywhere) == [f"{anywhere}/run 1/a", f"{anywhere}/run 2"]


def test_a_file_is_read_in_ranges(anywhere: str) -> None:
    data, uri = bytes(range(256)) * 40, f"{anywhere}/ü #%20+.bin"
    storage.write_bytes(uri, data)
    for buffer_bytes in (0, 1000):
        with storage.open_ranged(uri, buffer_bytes) as file:
            assert file.read(10) == data[:10]
            assert file.seek(-20, os.SEEK_END) == len(data) - 20
            assert file.read(100) == data[-20:]
            assert file.read(1) == b""
            file.seek(5)
            assert file.read() == data[5:]
    with pytest.raises(StorageError, match="does not exist"):
        storage.open_ranged(f"{uri}.none")


def test_an_object_that_changes_while_it_is_read_is_an_error(s3: str) -> None:
    storage.write_bytes(f"{s3}/a.bin", b"first")
    with storage.open_ranged(f"{s3}/a.bin") as file:
        storage.write_bytes(f"{s3}/a.bin", b"other")
        with pytest.raises(StorageError, match="changed"):
            file.read(3)
