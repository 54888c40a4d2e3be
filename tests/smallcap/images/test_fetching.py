import asyncio
import contextlib
import os
import socket
import threading
import time
import urllib.request
import uuid
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from smallcap import storage
from smallcap.config import InputConfig
from smallcap.errors import ErrorCode, RowError, StorageError
from smallcap.images.fetching import AdaptiveLimit, FetchOptions, fetch_objects
from smallcap.s3 import s3_store

ON_LOOPBACK = FetchOptions(private_hosts=True)  # where the tests' servers are
QUICK = FetchOptions(attempts=4, first_backoff_s=0.01, max_backoff_s=0.05, private_hosts=True)
SIGNED = "/a%2Fb%7e.jpg?X-Amz-Credential=K%2F2026%2Fus-east-1&X-Amz-Signature=ab%2Bcd%3D%3D&x=a+b"
AZURE = "devstoreaccount1"  # what the emulator's account is called
IMPATIENT = FetchOptions(attempts=2, timeout_s=0.5, first_backoff_s=0.01, private_hosts=True)


def code_of(data: bytes | RowError) -> ErrorCode:
    assert isinstance(data, RowError)
    return data.code


def written(folder: str, count: int, size: int = 3000) -> dict[str, bytes]:
    """Objects of random bytes, by URI."""
    objects = {storage.join(folder, f"{number}.bin"): os.urandom(size) for number in range(count)}
    for uri, data in objects.items():
        storage.write_bytes(uri, data)
    return objects


class Web(BaseHTTPRequestHandler):
    """A web server whose paths say how it answers."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar[Counter[str]] = Counter()
    asked_at: ClassVar[list[float]] = []

    def do_GET(self) -> None:
        self.asked[self.path] += 1
        self.asked_at.append(time.monotonic())
        word = self.path.strip("/").split("/")[0].split("?")[0]
        if word.isdigit():
            self.answer(int(word), b"no")
        elif word == "busy-once":
            first = self.asked[self.path] == 1
            self.answer(429 if first else 200, b"image", {"Retry-After": "1"} if first else {})
        elif "nowhere" in self.path or self.path.endswith("missing"):
            bucket = b"ContainerNotFound" if word in AZURE else b"NoSuchBucket"
            code = bucket if "nowhere" in self.path else b"NoSuchKey"
            self.answer(404, b"<Error><Code>%b</Code></Error>" % code)
        elif word == "moved":
            self.answer(302, b"", {"Location": "/image"})
        elif word == "slow":
            time.sleep(1.5)
            self.answer(200, b"late")
        elif word == "cut":
            self.answer(200, b"imag", {"Content-Length": "5"})
            self.close_connection = True
        elif word == "endless":
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(1000):
                    self.wfile.write(bytes(100_000))
            self.close_connection = True
        else:
            self.answer(200, self.path.encode())

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        object_headers = {"ETag": '"1"', "Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}
        for name, text in ({"Content-Length": str(len(body))} | object_headers | (headers or {})).items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[str]:
    Web.asked.clear()
    Web.asked_at.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Web) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture(params=["local", "s3", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder on the local disk, an empty bucket, and a filesystem that only fsspec knows."""
    if request.param == "memory":
        return f"memory://{tmp_path.name}"
    return str(tmp_path) if request.param == "local" else str(request.getfixturevalue("s3"))


ODD_NAMES = (
    "9.41.00\u202fAM.png",
    "旅行\u3000写真.jpg",
    "a\u00a0b.jpg",
    "می\u200cخواهم.jpg",
    "👨\u200d👩\u200d👧.jpg",
    "soft\u00adhyphen.jpg",
    "a\tb.jpg",
    "a::b.jpg",
    "a\x85\u2028b.jpg",
)


class TestPlaces:
    @pytest.mark.parametrize("name", [*ODD_NAMES, "line\nbreak.jpg"])
    def test_names_on_a_disk_may_have_any_letters(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes(b"x")
        (uri,) = storage.list_files(str(tmp_path))
        assert uri == f"{tmp_path}/{name}"
        assert fetch_objects([uri]).data == [b"x"]

    def test_one_server_that_fails_is_no_reason_to_stop(self) -> None:
        uris = [f"ftp://127.0.0.1:9/{number}.jpg" for number in range(20)]
        codes = {code_of(data) for data in fetch_objects(uris, QUICK).data}
        assert codes == {ErrorCode.UNAVAILABLE}

    def test_order_and_duplicates_are_kept_and_missing_ones_are_rows(self, folder: str) -> None:
        objects = written(folder, 20)
        uris, missing = list(objects), storage.join(folder, "missing.bin")
        fetched = fetch_objects([*reversed(uris), missing, uris[3], missing])
        assert fetched.data[:20] == list(objects.values())[::-1]
        assert fetched.data[21] == objects[uris[3]]
        assert [code_of(fetched.data[place]) for place in (20, 22)] == [ErrorCode.NOT_FOUND] * 2
        assert missing in str(fetched.data[20])
        assert fetched.retries == 0
        assert fetch_objects([]).data == []

    @pytest.mark.parametrize("scheme", ["gs", "az"])
    def test_google_and_azure_are_asked_by_obstore(
        self, web: str, scheme: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("GOOGLE_BASE_URL", "AZURITE_BLOB_STORAGE_URL"):
            monkeypatch.setenv(name, web)
        for name in ("GOOGLE_SKIP_SIGNATURE", "AZURE_STORAGE_USE_EMULATOR"):
            monkeypatch.setenv(name, "true")
        bucket = uuid.uuid4().hex  # an open bucket is kept
        fetched = fetch_objects([f"{scheme}://{bucket}/a/b.jpg", f"{scheme}://{bucket}/missing"], QUICK)
        assert isinstance(fetched.data[0], bytes)
        assert code_of(fetched.data[1]) == ErrorCode.NOT_FOUND
        with pytest.raises(StorageError, match="bucket does not exist"):
            fetch_objects([f"{scheme}://nowhere{bucket}/a.jpg"], QUICK)

    def test_all_places_go_in_one_call(self, s3: str, web: str, tmp_path: Path) -> None:
        uris = [storage.join(place, "x") for place in (s3, str(tmp_path), "memory://mixed")]
        for uri in uris:
            storage.write_bytes(uri, uri.encode())
        fetched = fetch_objects([*uris, f"{web}/x", f"file://{tmp_path}/x"], ON_LOOPBACK)
        assert fetched.data == [*(uri.encode() for uri in uris), b"/x", uris[1].encode()]

    @pytest.mark.parametrize(
        "key", ["a b.jpg", "a%20b.jpg", "a+b#c?d.jpg", "ü/ß.jpg", "x//y.jpg", "x/../z.jpg", "~!@$&'()*", *ODD_NAMES]
    )
    def test_keys_are_taken_as_they_are(self, s3: str, key: str) -> None:
        storage.write_bytes(f"{s3}/{key}", key.encode())
        assert fetch_objects([f"{s3}/{key}"]).data == [key.encode()]

    def test_a_file_above_the_limit_is_not_read(self, folder: str, web: str) -> None:
        (uri,) = written(folder, 1, size=1001)
        small = FetchOptions(max_bytes=1000, private_hosts=True)
        assert code_of(fetch_objects([uri], small).data[0]) == ErrorCode.TOO_LARGE
        assert code_of(fetch_objects([f"{web}/endless"], small).data[0]) == ErrorCode.TOO_LARGE  # says no length
        assert isinstance(fetch_objects([uri], FetchOptions(max_bytes=1001)).data[0], bytes)

    @pytest.mark.parametrize(
        "uri",
        [
            "s3://bucket",
            "s3://bucket/",
            "s3:///key",
            "s3://No Bucket/a",
            "gopher://host/a",
            "http://",
            "http://host/a\nb",
            "http://host/a\u2028b",
            "a\0b",
            "hdfs://host/a.jpg",
            "zip://a.jpg",
            "zip://a.jpg::/none.zip",
            "github://a.jpg",
            "x" * 300,
        ],
    )
    def test_a_malformed_uri_is_a_row(self, s3_server: str, uri: str) -> None:
        fetched = fetch_objects([uri], QUICK)
        assert code_of(fetched.data[0]) == ErrorCode.INVALID_URI
        assert fetched.retries == 0

    def test_folders_and_pipes_are_no_images(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        fetched = fetch_objects([str(tmp_path), str(tmp_path / "pipe")], QUICK)
        assert [code_of(data) for data in fetched.data] == [ErrorCode.NOT_FOUND] * 2

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_a_forbidden_file_is_a_row(self, tmp_path: Path) -> None:
        file = tmp_path / "secret"
        file.write_bytes(b"x")
        file.chmod(0)
        assert code_of(fetch_objects([str(file)]).data[0]) == ErrorCode.FORBIDDEN

    def test_the_options_are_the_configs(self) -> None:
        options = FetchOptions.of(InputConfig(fetch_timeout_s=3, fetch_attempts=2, allow_private_hosts=True))
        assert (options.timeout_s, options.attempts, options.private_hosts) == (3, 2, True)
        assert not FetchOptions.of(InputConfig()).private_hosts


class TestWeb:
    @pytest.mark.parametrize(
        ("asked", "answer"),
        [
            (SIGNED, SIGNED),  # unchanged
            ("/ü b.jpg", "/%C3%BC%20b.jpg"),  # what HTTP cannot carry is quoted
            ("/moved", "/image"),  # redirects are followed
        ],
    )
    def test_what_is_asked_for(self, web: str, asked: str, answer: str) -> None:
        assert fetch_objects([web + asked], ON_LOOPBACK).data == [answer.encode()]

    def test_s3_accepts_a_presigned_url(self, s3: str) -> None:
        import s3fs

        storage.write_bytes(f"{s3}/a b+c.jpg", b"image")
        url = s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"]).sign(f"{s3}/a b+c.jpg")
        assert fetch_objects([url], ON_LOOPBACK).data == [b"image"]

    @pytest.mark.parametrize(
        ("path", "code", "requests"),
        [
            ("404", ErrorCode.NOT_FOUND, 1),
            ("410", ErrorCode.NOT_FOUND, 1),
            ("401", ErrorCode.FORBIDDEN, 1),
            ("403", ErrorCode.FORBIDDEN, 1),
            ("400", ErrorCode.UNAVAILABLE, 1),
            ("429", ErrorCode.UNAVAILABLE, 4),
            ("500", ErrorCode.UNAVAILABLE, 4),
            ("503", ErrorCode.UNAVAILABLE, 4),
            ("cut", ErrorCode.UNAVAILABLE, 4),
        ],
    )
    def test_an_answer_is_a_row_after_its_attempts(self, web: str, path: str, code: ErrorCode, requests: int) -> None:
        fetched = fetch_objects([f"{web}/{path}"], QUICK)
        assert code_of(fetched.data[0]) == code
        assert (fetched.retries, Web.asked[f"/{path}"]) == (requests - 1, requests)

    def test_a_slow_server_is_a_timeout_and_retry_after_is_waited_for(self, web: str) -> None:
        late = fetch_objects([f"{web}/slow"], IMPATIENT).data[0]
        assert code_of(late) == ErrorCode.TIMEOUT
        assert "0.5 s" in str(late)
        Web.asked_at.clear()
        fetched = fetch_objects([f"{web}/busy-once"], FetchOptions(first_backoff_s=0.01, private_hosts=True))
        assert (fetched.data, fetched.retries) == ([b"image"], 1)
        assert Web.asked_at[1] - Web.asked_at[0] >= 1

    def test_dead_hosts_never_end_the_run(self) -> None:
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            port = closed.getsockname()[1]
            uris = [f"http://127.0.0.1:{port}/{number}" for number in range(20)] + ["http://host.invalid/a"]
            fetched = fetch_objects(uris, QUICK)
        assert {code_of(data) for data in fetched.data} == {ErrorCode.UNAVAILABLE}


class TestFaults:
    @pytest.mark.parametrize("fault", ["slow_down", "reset", "truncated", "lost", "slow"])
    def test_every_fault_is_survived_and_counted(self, s3: str, fault_proxy: Any, fault: str) -> None:
        objects = written(s3, 20)
        fault_proxy.plan(schedule=[fault], methods=["GET"], slow_s=3)
        options = FetchOptions(timeout_s=1.0, first_backoff_s=0.01)
        fetched = fetch_objects(list(objects), options)
        assert fetched.data == list(objects.values())
        requests = fault_proxy.done()["requests"]
        assert fetched.retries == requests - 20 >= 20  # a busy machine may answer late once more

    def test_a_mixture_of_faults_is_survived(self, s3: str, fault_proxy: Any) -> None:
        objects = written(s3, 100)
        fault_proxy.plan(seed=1, rates={"slow_down": 0.1, "reset": 0.1, "truncated": 0.1}, methods=["GET"])
        fetched = fetch_objects(list(objects), FetchOptions(attempts=10, first_backoff_s=0.01))
        assert fetched.data == list(objects.values())
        done = fault_proxy.done()
        assert fetched.retries == done["slow_down"] + done["reset"] + done["truncated"] > 20

    @pytest.mark.parametrize(
        ("fault", "code"),
        [("slow_down", "unavailable"), ("truncated", "unavailable"), ("reset", "unavailable"), ("slow", "timeout")],
    )
    def test_one_object_that_always_fails_is_a_row(self, s3: str, fault_proxy: Any, fault: str, code: str) -> None:
        uris = list(written(s3, 20))
        fault_proxy.plan(rates={fault: 1.0}, match="/7.bin", slow_s=2)
        fetched = fetch_objects(uris, IMPATIENT)
        failed = [data for data in fetched.data if isinstance(data, RowError)]
        assert [(str(error.code), error.where) for error in failed] == [(code, uris[7])]
        assert "3 attempts" in str(failed[0])  # the last after another object has shown that the bucket answers

    def test_one_forbidden_object_is_a_row(self, s3: str, fault_proxy: Any) -> None:
        uris = list(written(s3, 3))
        fault_proxy.plan(rates={"error": 1.0}, match="/1.bin", error_status=403, error_code="AccessDenied")
        fetched = fetch_objects(uris, QUICK)
        assert code_of(fetched.data[1]) == ErrorCode.FORBIDDEN
        assert "AccessDenied" in str(fetched.data[1])
        assert fetched.retries == 0


def test_requests_in_flight_halve_once_per_refused_round_and_grow_again() -> None:
    async def run() -> None:
        limit = AdaptiveLimit(16)
        for expected in (8, 4, 4):
            entered = [await limit.enter() for _ in range(limit.limit)]
            for number in entered:
                limit.leave(number, slow_down=True)
            assert limit.limit == expected
        entered = [await limit.enter() for _ in range(4)]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(limit.enter(), 0.01)
        for number in entered:
            limit.leave(number, slow_down=False)
        assert limit.limit == 5
        entered = [await asyncio.wait_for(limit.enter(), 1) for _ in range(5)]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(limit.enter(), 0.01)

    asyncio.run(run())


class TestTheRunsEnd:
    @pytest.mark.parametrize("plan", [{"outage": True}, {"rates": {"slow_down": 1.0}}, {"rates": {"slow": 1.0}}])
    def test_an_outage_in_bounded_time(self, s3: str, fault_proxy: Any, plan: dict[str, Any]) -> None:
        uris = list(written(s3, 40, size=1))
        fault_proxy.plan(**plan)
        began = time.monotonic()
        with pytest.raises(StorageError, match=r"Cannot fetch images: .*in every attempt for") as raised:
            fetch_objects(uris, IMPATIENT)
        assert time.monotonic() - began < 10
        assert s3 in str(raised.value)
        assert "the same command again" in str(raised.value)

    def test_an_endpoint_that_nobody_listens_at(self, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        with pytest.raises(StorageError, match="cannot be reached"):
            fetch_objects([f"{s3}/a.jpg"], QUICK)

    @pytest.mark.parametrize("count", [1, 15])
    def test_a_few_objects_that_fail_are_rows_where_their_bucket_lists(
        self, s3: str, fault_proxy: Any, count: int
    ) -> None:
        fault_proxy.plan(rates={"reset": 1.0}, match="/failing/")
        fetched = fetch_objects([f"{s3}/failing/{number}" for number in range(count)], QUICK)
        assert {code_of(data) for data in fetched.data} == {ErrorCode.UNAVAILABLE}
        fault_proxy.plan(outage=True)
        with pytest.raises(StorageError, match="Cannot fetch images"):
            fetch_objects([f"{s3}/failing/{number}" for number in range(count)], QUICK)

    @pytest.mark.parametrize("count", [1, 40])
    @pytest.mark.parametrize("fault", ["slow_down", "reset", "error"])
    def test_a_store_that_blinks_is_ridden_out(self, s3: str, fault_proxy: Any, fault: str, count: int) -> None:
        """Also where it still lists, and where some of the call's objects were served before."""
        objects = written(s3, count)
        plan = {"rates": {fault: 1.0}, "error_status": 500, "error_code": "InternalError", "for_s": 0.8}
        fault_proxy.plan(**plan, begins_at=count // 3)
        assert fetch_objects(list(objects), QUICK).data == list(objects.values())
        if count > 1:  # a single object that fails while its bucket lists is a row
            fault_proxy.plan(**plan, match="bin")
            assert fetch_objects(list(objects), QUICK).data == list(objects.values())

    def test_a_missing_bucket_ends_the_run(self, s3: str) -> None:
        with pytest.raises(StorageError, match="bucket does not exist"):
            fetch_objects(["s3://no-such-bucket-at-all/a.jpg"])

    @pytest.mark.parametrize(
        ("status", "code"),
        [(403, "SignatureDoesNotMatch"), (400, "ExpiredToken"), (400, "InvalidToken"), (403, "RequestTimeTooSkewed")],
    )
    def test_refused_credentials_and_another_region(self, s3: str, fault_proxy: Any, status: int, code: str) -> None:
        fault_proxy.plan(rates={"error": 1.0}, error_status=status, error_code=code)
        with pytest.raises(StorageError, match="does not accept the credentials") as raised:
            fetch_objects([f"{s3}/a.jpg"], QUICK)
        assert code in str(raised.value)
        assert "AWS_ACCESS_KEY_ID" in str(raised.value)
        assert fault_proxy.done()["requests"] == 1
        fault_proxy.plan(rates={"error": 1.0}, error_status=301, error_code="PermanentRedirect")
        with pytest.raises(StorageError, match="AWS_REGION"):
            fetch_objects([f"{s3}/a.jpg"], QUICK)

    def test_an_unknown_access_key(self, s3: str, s3_server: str) -> None:
        """Refused by the S3 server itself."""
        uris = list(written(s3, 1))
        check_keys(s3_server, "0")
        try:
            with pytest.raises(StorageError, match="InvalidAccessKeyId"):
                fetch_objects(uris)
        finally:
            check_keys(s3_server, "inf")

    def test_no_credentials(self, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
        s3_store.cache_clear()
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
        with pytest.raises(StorageError, match="no credentials"):
            fetch_objects(["s3://without-credentials/a.jpg"])


def check_keys(s3_server: str, after_requests: str) -> None:
    """Has moto check access keys after so many requests."""
    request = urllib.request.Request(
        f"{s3_server}/moto-api/reset-auth", after_requests.encode(), {"Content-Type": "text/plain"}, method="POST"
    )
    urllib.request.urlopen(request).close()
