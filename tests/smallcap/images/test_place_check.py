"""A bucket that becomes forbidden, or goes away, stops a run; objects that do are rows."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smallcap import storage
from smallcap.errors import ErrorCode, RowError, StorageError
from smallcap.images import place_check
from smallcap.images.fetching import FetchOptions, fetch_objects
from smallcap.images.place_check import known_good, unreadable_file
from smallcap.storage_faults import this_node

QUICK = FetchOptions(attempts=2, first_backoff_s=0.01, max_backoff_s=0.05, timeout_s=2.0)
DENIED = {"rates": {"error": 1.0}, "error_status": 403, "error_code": "AccessDenied"}
EXPIRED = {"rates": {"error": 1.0}, "error_status": 400, "error_code": "ExpiredToken"}


@pytest.fixture(autouse=True)
def knows_nothing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that has read nothing yet, and is alone."""
    monkeypatch.setattr(place_check, "_served", {})
    monkeypatch.setattr(place_check.colleagues(), "_shared", {})
    yield


def written(folder: str, count: int) -> list[str]:
    uris = [f"{folder}/{number}.bin" for number in range(count)]
    for uri in uris:
        storage.write_bytes(uri, b"data")
    return uris


def codes(uris: list[str]) -> list[ErrorCode | None]:
    return [data.code if isinstance(data, RowError) else None for data in fetch_objects(uris, QUICK).data]


class TestBuckets:
    @pytest.mark.parametrize("begins_at", [0, 7])
    def test_one_that_is_forbidden_from_some_moment_on(self, s3: str, fault_proxy: Any, begins_at: int) -> None:
        uris = written(s3, 20)
        fault_proxy.plan(**DENIED, begins_at=begins_at)
        with pytest.raises(StorageError, match=r"^Cannot read from this place any more: access denied") as raised:
            fetch_objects(uris, QUICK)
        for word in (s3, "AccessDenied", this_node(), "run the same command again"):
            assert word in str(raised.value)
        fault_proxy.plan()
        assert codes(uris) == [None] * 20

    def test_one_object_is_enough_where_another_was_read_before(self, s3: str, fault_proxy: Any) -> None:
        good, other = written(s3, 2)
        assert codes([good]) == [None]
        assert known_good(s3) == good
        fault_proxy.plan(**DENIED)
        with pytest.raises(StorageError, match="access denied"):
            fetch_objects([other], QUICK)

    def test_what_another_process_has_read_counts(self, s3: str, fault_proxy: Any) -> None:
        good, other = written(s3, 2)
        place_check.colleagues().share(f"served {s3}", good)
        fault_proxy.plan(**DENIED)
        with pytest.raises(StorageError, match="access denied"):
            fetch_objects([other], QUICK)

    def test_credentials_that_expire(self, s3: str, fault_proxy: Any) -> None:
        uris = written(s3, 20)
        fault_proxy.plan(**EXPIRED, begins_at=5)
        with pytest.raises(StorageError, match="they have expired") as raised:
            fetch_objects(uris, QUICK)
        assert "Errno" not in str(raised.value)
        assert this_node() in str(raised.value)

    @pytest.mark.parametrize("reads_before", [0, 1])
    def test_one_that_was_deleted(self, s3_server: str, s3: str, reads_before: int) -> None:
        import s3fs

        fs = s3fs.S3FileSystem(endpoint_url=s3_server)
        bucket = f"{s3}-gone"
        fs.mkdir(bucket)
        uris = written(bucket, 3)
        for uri in uris[:reads_before]:
            assert codes([uri]) == [None]
        fs.rm(bucket, recursive=True)
        with pytest.raises(StorageError, match="the bucket does not exist"):
            fetch_objects(uris, QUICK)


class TestSingleObjects:
    def test_of_which_some_are_forbidden_or_gone_are_rows(self, s3: str, fault_proxy: Any) -> None:
        uris = [*written(s3, 5), f"{s3}/none.bin"]
        fault_proxy.plan(**DENIED, match="/1.bin")
        assert codes(uris) == [None, ErrorCode.FORBIDDEN, None, None, None, ErrorCode.NOT_FOUND]

    def test_that_are_all_forbidden_are_rows_where_the_bucket_lists(self, s3: str, fault_proxy: Any) -> None:
        uris = written(f"{s3}/private", 6)
        fault_proxy.plan(**DENIED, match="/private/")
        assert codes(uris) == [ErrorCode.FORBIDDEN] * 6

    def test_that_are_all_forbidden_are_rows_where_another_is_served(self, s3: str, fault_proxy: Any) -> None:
        (good,) = written(s3, 1)
        assert codes([good]) == [None]
        uris = written(f"{s3}/private", 6)
        fault_proxy.plan(**DENIED, match="private")  # their folder's list as well
        assert codes(uris) == [ErrorCode.FORBIDDEN] * 6

    def test_that_are_all_gone_are_rows(self, s3: str) -> None:
        (good,) = written(s3, 1)
        assert codes([good]) == [None]
        storage.remove(good)
        assert codes([f"{s3}/{number}" for number in range(6)]) == [ErrorCode.NOT_FOUND] * 6

    def test_of_a_bucket_of_which_nothing_is_known_are_rows(self, s3: str, fault_proxy: Any) -> None:
        uris = written(s3, 2)
        fault_proxy.plan(**DENIED)
        assert codes(uris) == [ErrorCode.FORBIDDEN] * 2

    def test_of_web_servers_never_stop_a_run(self, s3: str, fault_proxy: Any) -> None:
        fault_proxy.plan(**DENIED)
        web = [f"{fault_proxy.endpoint}/{number}.jpg" for number in range(20)]
        assert codes(web) == [ErrorCode.FORBIDDEN] * 20


class TestFilesOfImages:
    def test_one_that_is_forbidden_stops_the_run_where_its_bucket_is(self, s3: str, fault_proxy: Any) -> None:
        from smallcap.config import InputConfig
        from smallcap.images.fragments import Fragment
        from smallcap.images.parquet import read_parquet

        fragments = []
        for number in range(2):
            table = pa.table({"image": pa.array([b"x"], pa.binary())})
            buffer = pa.BufferOutputStream()
            pq.write_table(table, buffer)
            storage.write_bytes(f"{s3}/{number}.parquet", buffer.getvalue().to_pybytes())
            fragments.append(Fragment(number, "parquet", f"{s3}/{number}.parquet", 0, 1, ""))

        def read(fragment: Fragment) -> Any:
            return [batch.data for batch in read_parquet(fragment, None, InputConfig(), pa.schema([]))]

        assert read(fragments[0]) == [[b"x"]]
        fault_proxy.plan(**DENIED, match="/1.parquet")
        ((error,),) = read(fragments[1])
        assert error.code == ErrorCode.FORBIDDEN
        fault_proxy.plan(**DENIED)
        with pytest.raises(StorageError, match="access denied"):
            read(fragments[1])


class TestFolders:
    def test_one_that_is_gone_stops_the_run(self, tmp_path: Path) -> None:
        folder = tmp_path / "disk"
        uris = written(str(folder), 5)
        assert codes(uris[:2]) == [None, None]
        Path(uris[4]).unlink()
        assert codes(uris[4:]) == [ErrorCode.NOT_FOUND]
        folder.rename(tmp_path / "elsewhere")
        with pytest.raises(StorageError, match="The folder is gone") as raised:
            fetch_objects(uris[2:4], QUICK)
        assert str(folder) in str(raised.value)
        folder.mkdir()  # where a disk was mounted
        with pytest.raises(StorageError, match="an empty folder"):
            fetch_objects(uris[2:4], QUICK)

    def test_one_of_which_nothing_is_known_gives_rows(self, tmp_path: Path) -> None:
        assert codes([f"{tmp_path}/none/{number}" for number in range(5)]) == [ErrorCode.NOT_FOUND] * 5


def test_other_errors_of_a_file_are_raised() -> None:
    error = StorageError("The service fails.")
    with pytest.raises(StorageError, match="The service fails"):
        unreadable_file(error, "s3://bucket/a.tar")
