"""What people are told of exceptions that storage clients have really raised."""

import io
import os
import re
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from smallcap import storage
from smallcap.errors import RowError, StorageError
from smallcap.images.fetching import FetchOptions, fetch_objects
from smallcap.storage_faults import Cause, diagnose
from smallcap.translated import translated_file

Answer = tuple[int | str, str, dict[str, str]]


class Store(BaseHTTPRequestHandler):
    """A server that gives every request the same answer."""

    protocol_version = "HTTP/1.1"
    answer: Answer

    def answer_it(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, body, headers = self.answer
        if isinstance(status, str):
            threading.Event().wait(3)
            self.close_connection = True
            return
        self.send_response(status)
        for name, text in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body.encode())

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer_it  # noqa: N815 - names of http.server

    def log_message(self, *_: object) -> None:
        pass


def xml(code: str, message: str = "Said by the service.") -> str:
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message></Error>'


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Store) as running:
        running.daemon_threads = True
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{running.server_address[1]}"
        running.shutdown()


@pytest.fixture
def closed() -> Iterator[str]:
    with socket.socket() as bound:  # and nobody listens
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch, single_tries: None) -> None:
    """Clients that try once, with credentials of their own."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("SMALLCAP_STORAGE_PATIENCE_S", "0")


OPERATIONS: dict[str, Callable[[str], Any]] = {  # by obstore, s3fs, and both
    "list": lambda uri: list(storage.iter_files(f"{uri}/folder")),
    "open": lambda uri: storage.open_ranged(f"{uri}/key").read(1),
    "update": lambda uri: storage.update_bytes(f"{uri}/key", lambda _: b"x"),
    "tail": lambda uri: storage.read_tail(f"{uri}/key", 4),
    "read": lambda uri: storage.read_bytes(f"{uri}/key"),
    "write": lambda uri: storage.write_bytes(f"{uri}/key", b"x"),
    "download": lambda uri: storage.download(f"{uri}/key", os.devnull),
}
LOOKS = {  # they ask by HEAD, or take what is missing for an answer
    "exists": lambda uri: storage.exists(f"{uri}/key"),
    "is folder": lambda uri: storage.is_folder(f"{uri}/key"),
    "size": lambda uri: storage.size(f"{uri}/key"),
    "folder": lambda uri: storage.list_folder(f"{uri}/folder"),
    "remove": lambda uri: storage.remove(f"{uri}/key"),
}
REGION = {"x-amz-bucket-region": "eu-west-1"}
REFUSED = "does not accept the credentials"
ANSWERS: dict[str, tuple[Answer, str, str]] = {  # by name: what the service answers, and what is said of it
    "no-bucket": ((404, xml("NoSuchBucket"), {}), "the bucket does not exist", "Check the bucket's name"),
    "denied": ((403, xml("AccessDenied"), {}), r"access denied \(403 AccessDenied", "Check the credentials"),
    "expired": ((400, xml("ExpiredToken"), {}), f"{REFUSED}: they have expired", "AWS_SESSION_TOKEN"),
    "wrong-key": ((403, xml("InvalidAccessKeyId"), {}), f"{REFUSED}: .* wrong", "Set AWS_ACCESS_KEY_ID"),
    "wrong-secret": ((403, xml("SignatureDoesNotMatch"), {}), f"{REFUSED}: .* wrong", "Set AWS_ACCESS_KEY_ID"),
    "clock": ((403, xml("RequestTimeTooSkewed"), {}), "clock is wrong", "Set the clock"),
    "elsewhere": ((301, xml("PermanentRedirect"), REGION), "the bucket is in another region", "Set AWS_REGION"),
    "slow-down": ((503, xml("SlowDown"), {}), r"too busy to answer \(503", "later"),
    "failing": ((500, xml("InternalError"), {}), r"fails \(500", "Check AWS_ENDPOINT_URL"),
    "nobody": ((401, "no", {}), REFUSED, "Set AWS_ACCESS_KEY_ID"),
    "odd": ((418, "teapot", {}), r"fails \(418", "Check AWS_ENDPOINT_URL"),
    "silent": (("silence", "", {}), "did not answer in time", "Check AWS_ENDPOINT_URL"),
}


def told(error: StorageError, cause: str, remedy: str, uri: str) -> None:
    """Checks that an error is one sentence, a place and a remedy."""
    text = str(error)
    lines = text.splitlines()
    assert re.search(cause, lines[0]), text
    assert re.search(remedy, lines[-1]), text
    assert uri in lines[1], text
    assert len(lines) == 3, text
    assert max(map(len, lines)) < 250, text
    assert not re.search(r"Debug source|Errno|RetryError|Traceback|Error\(|\n\n", text), text


@pytest.mark.parametrize("operation", [*OPERATIONS, *LOOKS])
@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_is_told_in_a_sentence(
    server: str, name: str, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Store.answer, cause, remedy = ANSWERS[name]
    if name == "no-bucket" and operation in LOOKS:
        pytest.skip("nothing is there")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{server}")
    with pytest.raises(StorageError) as raised:
        (OPERATIONS | LOOKS)[operation](f"s3://bucket-{name}")
    told(raised.value, cause, remedy, f"s3://bucket-{name}/")
    assert server in str(raised.value)
    assert f"on node {socket.gethostname()}" in str(raised.value)


@pytest.mark.parametrize("operation", [*OPERATIONS, *LOOKS])
@pytest.mark.parametrize("case", ["closed", "unknown name", "no TLS"])
def test_a_connection_that_fails_is_told_in_a_sentence(
    server: str, closed: str, case: str, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint, cause = {
        "closed": (f"http://{closed}", r"cannot be reached \(Connection refused\)"),
        "unknown name": ("http://no-such-host.invalid:9", "the name of no-such-host.invalid:9 cannot be resolved"),
        "no TLS": (f"https://{server}", "no secure connection"),
    }[case]
    remedy = "https://" if case == "no TLS" else "Check AWS_ENDPOINT_URL, the network"
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(StorageError) as raised:
        (OPERATIONS | LOOKS)[operation]("s3://bucket-somewhere")
    told(raised.value, cause, remedy, "s3://bucket-somewhere/")
    assert endpoint.partition("://")[2] in str(raised.value)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_web_page_in_place_of_a_store(server: str, operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Store.answer = (200, "<html>Welcome", {"Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"})
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{server}")
    try:
        OPERATIONS[operation]("s3://bucket-page")
    except StorageError as error:
        assert len(str(error).splitlines()) <= 4
        assert "Debug" not in str(error)


@pytest.mark.parametrize("operation", [*OPERATIONS, *LOOKS])
@pytest.mark.parametrize(
    ("case", "cause"),
    [("none", "no credentials"), ("half", "missing: AWS_SECRET_ACCESS_KEY"), ("no profile", "nobody.* could not be")],
)
def test_credentials_that_are_not_there(
    server: str, case: str, cause: str, operation: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{server}")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    if case != "half":
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    if case == "no profile":
        monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StorageError) as raised:
        (OPERATIONS | LOOKS)[operation](f"s3://bucket-{uuid.uuid4().hex}")  # an open bucket is kept
    assert re.search(cause, str(raised.value))
    assert "Set AWS_ACCESS_KEY_ID" in str(raised.value)
    assert len(str(raised.value).splitlines()) <= 4
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize(
    "endpoint", ["localhost:9000", "nonsense", "http://", "http://host:port", "http://a b", "ftp://x"]
)
def test_an_endpoint_that_is_no_address(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    for operation in (*OPERATIONS.values(), *LOOKS.values()):
        with pytest.raises(StorageError, match=r"not an address(.|\n)*AWS_ENDPOINT_URL(.|\n)*http://HOST:PORT"):
            operation("s3://bucket-nowhere")
    with pytest.raises(StorageError, match="not an address"):
        fetch_objects(["s3://bucket-nowhere/a.jpg"])


def test_what_means_all_objects_is_caused_by_none(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An input that is missing or forbidden is a row; refused credentials and a missing bucket stop the run."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{server}")
    for name, kind in (("no-bucket", None), ("wrong-key", None), ("denied", PermissionError)):
        Store.answer = ANSWERS[name][0]
        with pytest.raises(StorageError) as raised:
            storage.open_ranged(f"s3://bucket-{name}/key")
        cause = raised.value.__cause__
        assert isinstance(cause, kind) if kind else not isinstance(cause, FileNotFoundError | PermissionError)
    Store.answer = (404, xml("NoSuchKey"), {})
    with pytest.raises(StorageError, match="it does not exist") as raised:
        storage.open_ranged("s3://bucket-key/key")
    assert isinstance(raised.value.__cause__, FileNotFoundError)


@pytest.mark.parametrize(
    ("status", "code", "cause"),
    [
        (404, "NoSuchBucket", Cause.NO_BUCKET),
        (404, "ContainerNotFound", Cause.NO_BUCKET),
        (403, "AuthenticationFailed", Cause.REFUSED),
        (401, "AuthenticationRequired", Cause.REFUSED),
        (403, "AuthorizationPermissionMismatch", Cause.FORBIDDEN),
        (429, "rateLimitExceeded", Cause.SLOW_DOWN),
        (503, "ServerBusy", Cause.SLOW_DOWN),
        (404, "BlobNotFound", Cause.MISSING),
    ],
)
@pytest.mark.parametrize("scheme", ["gs", "az"])
def test_google_and_azure(
    server: str, scheme: str, status: int, code: str, cause: Cause, monkeypatch: pytest.MonkeyPatch
) -> None:
    import obstore
    from obstore.store import AzureStore, GCSStore

    for name in ("GOOGLE_BASE_URL", "AZURITE_BLOB_STORAGE_URL"):
        monkeypatch.setenv(name, f"http://{server}")
    for name in ("GOOGLE_SKIP_SIGNATURE", "AZURE_STORAGE_USE_EMULATOR"):
        monkeypatch.setenv(name, "true")
    Store.answer = (status, xml(code), {})
    options: Any = {"client_options": {"allow_http": True}, "retry_config": {"max_retries": 0}}
    store = (GCSStore if scheme == "gs" else AzureStore)("bucket", **options)
    with pytest.raises((OSError, obstore.exceptions.BaseError)) as raised:
        obstore.get(store, "key")
    fault = diagnose(raised.value)
    assert (fault.cause, fault.status, fault.code, fault.host) == (cause, status, code, server)


@pytest.mark.parametrize(
    ("status", "cause"), [(403, "access denied"), (404, "not exist"), (500, "fails"), (503, "busy")]
)
def test_web_servers(server: str, status: int, cause: str) -> None:
    Store.answer = (status, "no", {})
    with pytest.raises(StorageError, match=cause) as raised:
        storage.read_bytes(f"http://{server}/a")
    assert len(str(raised.value).splitlines()) == 3


def test_web_servers_that_cannot_be_reached(closed: str) -> None:
    with pytest.raises(StorageError, match=r"cannot be reached \(Connection refused\)"):
        storage.read_bytes(f"http://{closed}/a")
    with pytest.raises(StorageError, match=r"name of no-such-host.invalid\S* cannot be resolved"):
        storage.read_bytes("http://no-such-host.invalid/a")


def test_a_file_that_breaks_off_is_told_as_well() -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise ConnectionResetError(104, "Connection reset by peer")

    with pytest.raises(StorageError, match=r"the connection to .* broke off"):
        translated_file("https://host/a", Broken(), 0).read(1)


def test_errors_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a name holds the words of other faults."""
    for name in ("timed out.jpg", "InvalidCertificate", "dns error"):
        with pytest.raises(StorageError, match=r": it does not exist\.\n"):
            storage.read_bytes(f"{tmp_path}/{name}")
    (tmp_path / "timed out").touch()
    with pytest.raises(StorageError, match=r"Cannot list this path\.\n.*\n  found: Not a directory: /.*/timed out/a$"):
        storage.list_folder(f"{tmp_path}/timed out/a")
    for number, cause in ((28, "no room left .No space"), (30, "read-only"), (13, "access denied .Permission denied")):

        def fail(descriptor: int, number: int = number) -> None:
            raise OSError(number, os.strerror(number), "file")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(StorageError, match=cause):
            storage.write_bytes(f"{tmp_path}/a", b"x")


def test_an_error_that_was_told_before_is_none_of_this_one(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Store.answer = ANSWERS["wrong-key"][0]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{server}")
    try:
        storage.read_bytes("s3://bucket-first/key")
    except StorageError:
        with pytest.raises(StorageError, match="it does not exist"):
            storage.read_bytes(f"{tmp_path}/second")


@pytest.mark.parametrize("name", ["slow-down", "failing", "odd", "denied"])
def test_rows_are_told_in_one_line(server: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Store.answer = ANSWERS[name][0]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{server}")
    quick = FetchOptions(attempts=2, first_backoff_s=0.01, private_hosts=True)
    uris = [f"s3://bucket-{name}/a\n\x1b[31m.jpg", f"s3://bucket-{name}/b.jpg"]
    if name in ("slow-down", "failing"):  # a bucket that answers nothing else ends the run
        with pytest.raises(StorageError) as raised:
            fetch_objects(uris, quick)
        told(raised.value, "Cannot fetch images: .* (fails|too busy)", "un the same command again", "s3://bucket")
        uris.clear()
    uris.append(f"http://{server}/c.jpg")
    for error in fetch_objects(uris, quick).data:
        assert isinstance(error, RowError)
        assert re.fullmatch(r"[ -~]{10,250}\.", str(error)), str(error)
        assert not re.search("Generic|Debug|Errno|xml", str(error)), str(error)


@pytest.mark.parametrize(
    ("text", "cause", "status"),
    [
        (  # Delta
            "Generic S3 error: Error performing GET http://h:1/b/t in 1.9s, after 3 retries, max_retries: 3, "
            'retry_timeout: 180s  - Server returned non-2xx status code: 503: <?xml version="1.0"?><Error>'
            "<Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>",
            Cause.SLOW_DOWN,
            503,
        ),
        (  # Lance
            "LanceError(IO): Generic S3 error: Client error with status 400 Bad Request: <Error><Code>ExpiredToken"
            "</Code></Error>, /home/runner/lance-io/src/object_store.rs:12:3",
            Cause.EXPIRED,
            400,
        ),
        ("HTTP status server error (500 Internal Server Error) for url (http://h:1/b/t)", Cause.FAILING, 500),
        (  # Arrow's own client
            "When reading information for key 'a' in bucket 'b': AWS Error ACCESS_DENIED during HeadObject operation: "
            "No response body.",
            Cause.FORBIDDEN,
            None,
        ),
        (
            "When listing objects: AWS Error NETWORK_CONNECTION during ListObjectsV2 operation: curlCode: 7",
            Cause.UNREACHED,
            None,
        ),
    ],
)
def test_texts_of_libraries_that_write_tables(text: str, cause: Cause, status: int | None) -> None:
    fault = diagnose(OSError(text))
    assert fault.cause is cause
    assert fault.status == status
    assert "Debug" not in fault.describe()
    assert "\n" not in fault.describe()


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (ConnectionResetError(104, "reset"), True),
        (OSError(116, "Stale file handle"), True),
        (socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"), True),
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), False),
        (OSError(28, "No space left on device"), False),
        (FileNotFoundError(2, "no"), False),
        (OSError("status code: 500"), True),
        (OSError("status code: 429"), True),
        (OSError("status code: 501"), False),
        (OSError("status code: 403"), False),
        (OSError("status code: 400"), False),
        (ValueError("no"), False),
    ],
    ids=str,
)
def test_which_faults_pass(error: Exception, passes: bool) -> None:
    assert diagnose(error).passes == passes
