"""Images come from public addresses only, unless others are allowed: whatever a URL looks like, and after redirects."""

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from smallcap.errors import ErrorCode, RowError
from smallcap.images import public_addresses
from smallcap.images.fetching import FetchOptions, fetch_objects
from smallcap.images.public_addresses import PrivateAddressError, PublicOnly, is_public

ONCE = FetchOptions(attempts=1, timeout_s=5)

PRIVATE = [
    *("127.0.0.1", "127.8.9.1", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1"),
    *("100.100.100.200", "192.0.0.192", "168.63.129.16", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255"),
    *("::", "::1", "fe80::1", "fe80::1%1", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "::ffff:127.0.0.1"),
    *("::ffff:a9fe:a9fe", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::1", "2002:7f00:1::", "2002:a9fe:a9fe::1"),
    *("2130706433", "0177.0.0.1", "127.1", "0x7f.0.0.1", "no address", ""),
]
PUBLIC = ["8.8.8.8", "93.184.216.34", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"]


@pytest.mark.parametrize(("address", "public"), [(one, False) for one in PRIVATE] + [(one, True) for one in PUBLIC])
def test_addresses(address: str, public: bool) -> None:
    assert is_public(address) is public


class _Web(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        target = self.path.removeprefix("/to/")
        self.send_response(302 if target != self.path else 200)
        if target != self.path:
            self.send_header("Location", target)
        self.send_header("Content-Length", "0" if target != self.path else "5")
        self.end_headers()
        if target == self.path:
            self.wfile.write(b"image")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Web) as server:
        server.asked = []  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def refused(uri: str, options: FetchOptions = ONCE) -> str:
    """The message of an image that is refused."""
    (error,) = fetch_objects([uri], options).data
    assert isinstance(error, RowError), error
    assert error.code == ErrorCode.FORBIDDEN, str(error)
    assert "--allow-private-hosts" in str(error)
    return str(error)


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "localhost", "LOCALHOST.", "a.localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "127.1"),
        *("2130706433", "0x7f000001", "0177.0.0.1", "0x7f.1", "127.0.0.1.", "①②⑦.⓪.⓪.①", "[64:ff9b::7f00:1]"),
        *("169.254.169.254", "[fd00:ec2::254]", "metadata.google.internal", "Metadata.Google.Internal.", "metadata"),
        *("instance-data.ec2.internal", "[fe80::1]"),
    ],
)
def test_hosts_that_are_spelt_out(host: str, web: ThreadingHTTPServer) -> None:
    (error,) = fetch_objects([f"http://{host}:{web.server_port}/a.jpg"], ONCE).data
    assert isinstance(error, RowError)
    assert error.code in (ErrorCode.FORBIDDEN, ErrorCode.INVALID_URI)
    assert web.asked == []  # type: ignore[attr-defined]


def test_it_is_allowed_where_someone_says_so(web: ThreadingHTTPServer) -> None:
    uri = f"http://127.0.0.1:{web.server_port}/a.jpg"
    assert "127.0.0.1" in refused(uri)
    assert fetch_objects([uri], FetchOptions(private_hosts=True)).data == [b"image"]


def test_names_are_judged_by_what_they_resolve_to(web: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each connection goes to an address that was judged, so a second answer of the resolver cannot pass."""
    lookup = socket.getaddrinfo
    answers = ["127.0.0.1", "10.1.2.3"]

    def resolve(host: Any, port: Any, *arguments: Any, **options: Any) -> Any:
        if host != "rebinding.example.com":
            return lookup(host, port, *arguments, **options)
        return lookup(answers.pop(0), port, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert "127.0.0.1" in refused(f"http://rebinding.example.com:{web.server_port}/a.jpg")
    assert answers == ["10.1.2.3"]  # asked once
    assert web.asked == []  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "target", ["http://127.0.0.2:1/x", "http://169.254.169.254/latest/meta-data", "http://metadata.google.internal/x"]
)
def test_each_redirect_is_judged(target: str, web: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(public_addresses, "is_public", lambda address: address == "127.0.0.1" or is_public(address))
    base = f"http://127.0.0.1:{web.server_port}"
    assert fetch_objects([f"{base}/a.jpg", f"{base}/to/{base}/b.jpg"], ONCE).data == [b"image", b"image"]
    refused(f"{base}/to/{target}")


def test_a_redirect_to_a_file_is_no_image(web: ThreadingHTTPServer) -> None:
    uri = f"http://127.0.0.1:{web.server_port}/to/file:///etc/passwd"
    (error,) = fetch_objects([uri], FetchOptions(attempts=1, private_hosts=True)).data
    assert isinstance(error, RowError)


def test_chained_urls_of_the_web_are_refused_where_no_host_can_be_judged(web: ThreadingHTTPServer) -> None:
    for uri in ("simplecache::http://127.0.0.1/a.jpg", "zip://a.jpg::https://127.0.0.1/a.zip"):
        refused(uri)
    assert web.asked == []  # type: ignore[attr-defined]


def test_the_environments_proxy_is_reached_and_private_targets_are_not(
    web: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{web.server_port}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert fetch_objects(["http://pictures.example.com/a.jpg"], ONCE).data == [b"image"]
    refused("http://10.0.0.1/a.jpg")
    refused("http://metadata.google.internal/a.jpg")
    assert web.asked == ["http://pictures.example.com/a.jpg"]  # type: ignore[attr-defined]


def test_all_addresses_of_a_name_give_one_message() -> None:
    place = (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("10.0.0.1", 80))
    with pytest.raises(PrivateAddressError) as first:
        PublicOnly().make_socket(place)
    with pytest.raises(PrivateAddressError) as second:
        PublicOnly().make_socket((socket.AF_INET6, socket.SOCK_STREAM, 0, "", ("::1", 80, 0, 0)))
    assert str(first.value) == str(second.value)  # else aiohttp makes another exception of both
