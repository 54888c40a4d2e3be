"""Reads the address of a Ray cluster, and asks whether one answers there; finds the one that runs on this machine.

Ray tries a wrong address for many minutes before it says anything. What is asked here has an answer within seconds.
"""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from smallcap.errors import ConfigError, RunError

_HEAD_ANSWERS_S = 8  # or it is taken for something else than a head; see `jobs.cluster.session`
_CONNECTS_S = 6.0  # a machine answers at once, unless something drops what is sent to it
_THIS_MACHINE = "the Ray that runs on this machine"
_HOST_AND_PORT = re.compile(r"(?P<host>\[[^\[\]\s]+\]|[^:/\[\]\s]+):(?P<port>\d{1,5})")
_EXPECTED = "HOST:PORT of the head, such as 10.0.0.5:6379; or auto, or local"
_LOOK = (
    "On the head node, ray status says whether it runs and ray start has said its address: port 6379, unless another "
    "was chosen (8265 is the dashboard's). --address local starts a Ray for this job alone."
)

Answer = TypeVar("Answer")


class NoClusterError(RunError):
    """No cluster answers at an address, or none that this machine is a node of."""


@dataclass(frozen=True)
class Address:
    """An address that has a host and a port."""

    text: str  # as it was given
    named_by: str  # `--address`, `RAY_ADDRESS`, or what else has given it
    host: str  # in brackets if it is of IPv6
    port: int
    is_client: bool = False  # whether a Ray Client is to connect there

    @property
    def was_found(self) -> bool:
        """Whether nobody has named it: Ray has left it on this machine."""
        return self.named_by == _THIS_MACHINE

    @property
    def where(self) -> str:
        """What a message says of it."""
        return f"{self.named_by}, at {self.text}" if self.was_found else f"{self.named_by} {self.text}"


def wanted_address(address: str | None) -> tuple[str, str]:
    """Returns the text of the address that a job is to use, and who gave it; both are empty where nobody did."""
    if address:
        return address, "--address"
    given = os.environ.get("RAY_ADDRESS", "")
    return given, "RAY_ADDRESS" if given else ""


def parse_address(text: str, named_by: str) -> Address:
    """Returns the parts of an address that names a host.

    Raises:
        ConfigError: The text is no such address, or a Ray Client would be needed and is not installed.
    """
    scheme, _, rest = text.rpartition("://")
    if scheme in ("http", "https"):
        raise ConfigError(
            "This is the address of a dashboard, to which jobs are submitted; it is not an address of a Ray cluster.",
            where=named_by,
            expected=_EXPECTED,
            found=repr(text),
            remedy="On a node of the cluster give its head's address. From elsewhere submit the job: ray job submit "
            f"--address {text} -- smallcap caption … --address local starts a Ray for this job alone.",
        )
    parts = _HOST_AND_PORT.fullmatch(rest)
    if scheme not in ("", "ray") or parts is None or not 0 < int(parts["port"]) < 1 << 16:
        raise ConfigError(
            "This is not an address of a Ray cluster.", where=named_by, expected=_EXPECTED, found=repr(text)
        )
    if scheme and importlib.util.find_spec("grpc") is None:
        raise ConfigError(
            "Ray Client, which such an address is for, is not installed.",
            where=named_by,
            found=repr(text),
            remedy="On a node of the cluster give its head's address, as HOST:6379; or pip install 'ray[client]'.",
        )
    return Address(text, named_by, parts["host"], int(parts["port"]), bool(scheme))


def check_form(address: str | None) -> str | None:
    """Returns the value of `--address`, without looking whether something is there.

    Raises:
        ConfigError: It is not an address.
    """
    if address and address not in ("auto", "local"):
        parse_address(address, "--address")
    return address


def check_address(address: str | None) -> None:
    """Checks quickly, before a job does anything, that something listens where its cluster should be.

    Args:
        address: As `jobs.cluster.session.connect` takes it.

    Raises:
        ConfigError: It is not an address.
        NoClusterError: Nothing listens there.
    """
    text, named_by = wanted_address(address)
    if text not in ("", "auto", "local") and not ("ray" in sys.modules and sys.modules["ray"].is_initialized()):
        reach(parse_address(text, named_by))


def reach(address: Address) -> None:
    """Makes a connection to an address, and closes it.

    Raises:
        NoClusterError: The name means nothing here, or nothing listens there.
    """
    try:
        within(_CONNECTS_S, lambda: _dial(address.host.strip("[]"), address.port))
        return
    except (socket.gaierror, UnicodeError) as error:
        found = f"no machine has the name {address.host} ({error})"
    except TimeoutError:
        found = f"no answer within {_CONNECTS_S:.0f} s: the machine is off, or a firewall drops what is sent there"
    except ConnectionRefusedError:
        found = "the machine is there, and nothing listens at that port"
    except OSError as error:
        found = str(error)
    raise NoClusterError("No Ray cluster answers at this address.", where=address.where, found=found, remedy=_LOOK)


def _dial(host: str, port: int) -> None:
    socket.create_connection((host, port), timeout=_CONNECTS_S).close()


def within(seconds: float, call: Callable[[], Answer]) -> Answer:
    """Returns what a call returns, or raises what it raises; raises TimeoutError where it takes longer.

    A call that is too late goes on in its thread.
    """
    answers: list[Answer | Exception] = []

    def answer() -> None:
        try:
            answers.append(call())
        except Exception as error:  # noqa: BLE001 - raised below
            answers.append(error)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    thread.join(seconds)
    if not answers:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    if isinstance(answers[0], Exception):
        raise answers[0]
    return answers[0]


def ask_head(address: Address) -> None:
    """Asks the head at an address for the cluster's nodes: one of them must be on this machine, as Ray wants it.

    Raises:
        NoClusterError: There is no head, or no node on this machine.
        ray.exceptions.AuthenticationError: The head wants another token.
    """
    from ray._private.services import find_node_ids
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # its stub leaves it out
    from ray.core.generated.gcs_pb2 import GcsNodeInfo
    from ray.exceptions import AuthenticationError

    try:
        nodes = GcsClient(address=f"{address.host}:{address.port}").get_all_node_info(timeout=_HEAD_ANSWERS_S)
    except AuthenticationError:
        raise
    except Exception as error:
        raise NoClusterError(
            "What listens at this address is not a head of a Ray cluster, or it does not answer.",
            where=address.where,
            expected=f"an answer of Ray's GCS within {_HEAD_ANSWERS_S} s",
            found=" ".join(str(error).split())[:300],
            remedy=_LOOK,
        ) from error
    here = set(find_node_ids())
    if not any(node.hex() in here for node, info in nodes.items() if info.state == GcsNodeInfo.ALIVE):
        raise NoClusterError(
            "This machine is not a node of that Ray cluster, so a job cannot join it from here.",
            where=address.where,
            found=f"the head answers, and none of its {len(nodes)} nodes is on this machine",
            remedy=f"Make this machine a node (ray start --address {address.text}), or submit the job from here: "
            "ray job submit --address http://HEAD:8265 -- smallcap caption …",
        )


def find_running(by_process: bool) -> Address | None:
    """Returns the address of a cluster that answers and has a node on this machine; None where there is none.

    What `ray start` has left behind may name a Ray that is dead.

    Args:
        by_process: Whether to look at the processes of this machine as well, as Ray does for `auto`. Among them is the
            local Ray of any other job.
    """
    from ray._private.services import find_gcs_addresses
    from ray._private.utils import read_ray_address
    from ray.exceptions import AuthenticationError

    try:
        named = [read_ray_address() or ""]
    except (OSError, UnicodeDecodeError):
        named = []
    for text in [*named, *(sorted(find_gcs_addresses()) if by_process else [])]:
        try:
            address = parse_address(text, _THIS_MACHINE)
            reach(address)
            ask_head(address)
        except (ConfigError, NoClusterError):
            continue
        except AuthenticationError:  # it answers; whether it lets this process in is seen when it is joined
            return address
        return address
    return None
