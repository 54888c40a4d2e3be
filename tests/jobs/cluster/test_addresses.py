"""Addresses of clusters: what is one, what listens there, and what runs on this machine. Ray is not needed for it."""

import importlib.util
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from jobs.cluster import addresses
from jobs.cluster.addresses import (
    Address,
    NoClusterError,
    ask_head,
    check_address,
    find_running,
    parse_address,
    reach,
    wanted_address,
    within,
)
from jobs.terminal.call_options import RayCall
from smallcap.errors import ConfigError, RunError
from tests.job_processes import free_port


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)


@pytest.fixture
def listener() -> Iterator[str]:
    """The address of a server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_the_flag_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wanted_address(None) == ("", "")
    monkeypatch.setenv("RAY_ADDRESS", "")
    assert wanted_address(None) == ("", "")
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert wanted_address(None) == ("head:6379", "RAY_ADDRESS")
    assert wanted_address("local") == ("local", "--address")


@pytest.mark.parametrize(
    ("text", "host", "port", "is_client"),
    [
        ("head:6379", "head", 6379, False),
        ("10.0.0.5:6379", "10.0.0.5", 6379, False),
        ("[::1]:6379", "[::1]", 6379, False),
        ("127.0.0.1:1", "127.0.0.1", 1, False),
        ("ray://head:10001", "head", 10001, True),
    ],
)
def test_what_an_address_says(text: str, host: str, port: int, is_client: bool) -> None:
    assert parse_address(text, "--address") == Address(text, "--address", host, port, is_client)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("head", "not an address of a Ray cluster"),
        ("head:", "not an address of a Ray cluster"),
        (":6379", "not an address of a Ray cluster"),
        ("head:port", "not an address of a Ray cluster"),
        ("head:0", "not an address of a Ray cluster"),
        ("head:65536", "not an address of a Ray cluster"),
        ("head:999999999", "not an address of a Ray cluster"),
        ("::1:6379", "not an address of a Ray cluster"),
        ("two words:6379", "not an address of a Ray cluster"),
        ("Auto", "not an address of a Ray cluster"),
        ("redis://head:6379", "not an address of a Ray cluster"),
        ("ray://head", "not an address of a Ray cluster"),
        ("\x1b[2J", "not an address of a Ray cluster"),
        ("http://head:8265", "ray job submit --address http://head:8265"),
        ("https://head", "ray job submit --address https://head"),
    ],
)
def test_what_is_no_address_is_a_usage_error(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_address(text)
    assert words in str(caught.value)
    assert (caught.value.where, caught.value.found) == ("--address", repr(text))
    assert "HOST:PORT" in caught.value.expected


def test_the_flag_is_checked_before_anything_is_imported() -> None:
    for address in (None, "auto", "local", "head:6379"):
        assert RayCall(address=address).address == address
    with pytest.raises(ConfigError, match="ray job submit"):
        RayCall(address="http://head:8265")


def test_a_dashboard_in_the_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")  # as Ray's guides set it for `ray job submit`
    with pytest.raises(ConfigError) as caught:
        check_address(None)
    assert (caught.value.where, caught.value.found) == ("RAY_ADDRESS", repr("http://127.0.0.1:8265"))
    assert "--address local" in caught.value.remedy


def test_a_client_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"ray\[client\]"):
        parse_address("ray://head:10001", "--address")


@pytest.mark.parametrize("text", [None, "auto", "local"])
def test_what_names_no_host_is_not_reached(text: str | None) -> None:
    check_address(text)


def test_nothing_listens() -> None:
    with pytest.raises(NoClusterError) as caught:
        check_address(f"127.0.0.1:{free_port()}")
    assert "nothing listens at that port" in caught.value.found
    assert "ray status" in caught.value.remedy


def test_a_name_that_means_nothing() -> None:
    with pytest.raises(NoClusterError) as caught:
        check_address("no-such-machine.invalid:6379")
    assert "no machine has the name no-such-machine.invalid" in caught.value.found
    with pytest.raises(NoClusterError, match="no machine has the name"):
        check_address(f"{'a' * 70}.invalid:6379")  # too long for a name


def test_packets_that_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "_CONNECTS_S", 0.1)
    monkeypatch.setattr(addresses, "_dial", lambda host, port: time.sleep(5))
    with pytest.raises(NoClusterError, match="a firewall drops what is sent there"):
        check_address("10.0.0.5:6379")


def test_a_network_without_a_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def dial(host: str, port: int) -> None:
        raise OSError(113, "No route to host")

    monkeypatch.setattr(addresses, "_dial", dial)
    with pytest.raises(NoClusterError, match="No route to host"):
        check_address("10.0.0.5:6379")


def test_something_listens(listener: str) -> None:
    check_address(listener)
    reach(parse_address(listener, "--address"))


def test_what_listens_is_no_head(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_head(address: str) -> None:
        raise RuntimeError("Timed  out\nwhile waiting")

    monkeypatch.setattr("ray._raylet.GcsClient", no_head)
    with pytest.raises(NoClusterError) as caught:
        ask_head(parse_address("127.0.0.1:22", "--address"))
    assert "not a head of a Ray cluster" in caught.value.what
    assert caught.value.found == "Timed out while waiting"


class Cluster:
    """A head that names some nodes, as Ray's client of the GCS does."""

    def __init__(self, *ids: bytes) -> None:
        from ray import NodeID
        from ray.core.generated.gcs_pb2 import GcsNodeInfo

        self._nodes = {NodeID(node): GcsNodeInfo(node_id=node, state=GcsNodeInfo.ALIVE) for node in ids}

    def __call__(self, address: str) -> "Cluster":
        return self

    def get_all_node_info(self, timeout: float) -> dict:
        return self._nodes


def test_a_cluster_that_this_machine_is_no_node_of(monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = bytes([1] * 28), bytes([2] * 28)
    monkeypatch.setattr("ray._private.services.find_node_ids", lambda: {here.hex()})
    monkeypatch.setattr("ray._raylet.GcsClient", Cluster(there))
    address = parse_address("10.0.0.5:6379", "--address")
    with pytest.raises(NoClusterError) as caught:
        ask_head(address)
    assert "This machine is not a node" in caught.value.what
    assert "ray start --address 10.0.0.5:6379" in caught.value.remedy
    monkeypatch.setattr("ray._raylet.GcsClient", Cluster(there, here))
    ask_head(address)


class TestFindingARunningRay:
    @pytest.fixture(autouse=True)
    def this_machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("ray._private.services.find_gcs_addresses", frozenset)
        monkeypatch.setattr("jobs.cluster.addresses.ask_head", lambda address: None)

    def left_behind(self, monkeypatch: pytest.MonkeyPatch, text: str | None) -> None:
        monkeypatch.setattr("ray._private.utils.read_ray_address", lambda: text)

    def test_one_that_ray_start_has_started(self, monkeypatch: pytest.MonkeyPatch, listener: str) -> None:
        self.left_behind(monkeypatch, listener)
        found = find_running(by_process=False)
        assert found is not None
        assert (found.text, found.was_found) == (listener, True)
        assert found.where == f"the Ray that runs on this machine, at {listener}"

    @pytest.mark.parametrize("text", [None, "", "junk", "\0"])
    def test_nothing_that_is_an_address(self, monkeypatch: pytest.MonkeyPatch, text: str | None) -> None:
        self.left_behind(monkeypatch, text)
        assert find_running(by_process=False) is None

    def test_a_file_that_a_dead_ray_has_left(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left_behind(monkeypatch, f"127.0.0.1:{free_port()}")
        assert find_running(by_process=False) is None

    def test_a_port_that_something_else_has_taken(self, monkeypatch: pytest.MonkeyPatch, listener: str) -> None:
        def no_head(address: Address) -> None:
            raise NoClusterError("no head")

        self.left_behind(monkeypatch, listener)
        monkeypatch.setattr("jobs.cluster.addresses.ask_head", no_head)
        assert find_running(by_process=False) is None

    def test_a_file_of_another_user(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def read() -> str:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("ray._private.utils.read_ray_address", read)
        assert find_running(by_process=False) is None

    def test_one_that_wants_a_token_is_one(self, monkeypatch: pytest.MonkeyPatch, listener: str) -> None:
        from ray.exceptions import AuthenticationError

        def refuse(address: Address) -> None:
            raise AuthenticationError("no token")

        self.left_behind(monkeypatch, listener)
        monkeypatch.setattr("jobs.cluster.addresses.ask_head", refuse)
        assert find_running(by_process=False) is not None

    def test_the_local_ray_of_another_job_is_joined_only_where_auto_asks_for_it(
        self, monkeypatch: pytest.MonkeyPatch, listener: str
    ) -> None:
        self.left_behind(monkeypatch, None)
        monkeypatch.setattr("ray._private.services.find_gcs_addresses", lambda: frozenset({listener}))
        assert find_running(by_process=False) is None
        found = find_running(by_process=True)
        assert found is not None
        assert found.text == listener


def test_a_call_within_a_time() -> None:
    assert within(5, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 / 0)
    release = threading.Event()
    with pytest.raises(TimeoutError):
        within(0.01, release.wait)
    release.set()


def test_no_cluster_is_an_error_of_the_run() -> None:
    assert issubclass(NoClusterError, RunError)
    assert not issubclass(NoClusterError, ConfigError)
