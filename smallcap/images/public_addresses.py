"""Keeps requests for images within the public internet: a list's URL must not reach what only this network can reach.

An address is judged when a socket for it is made, after names are resolved and on each redirect; the socket connects
to the very address that was judged, so a name that resolves anew cannot pass. Behind a proxy the proxy makes the
connection: there only addresses and names that the URL itself spells out can be judged.
"""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies

if TYPE_CHECKING:
    from aiohttp import ClientRequest, ClientResponse

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# Names at which clouds serve a machine's credentials, and which lead to this machine.
_INTERNAL_NAMES = re.compile(
    r"(?:.*\.)?(?:localhost|localhost\.localdomain|metadata|metadata\.google\.internal|metadata\.goog|"
    r"instance-data|instance-data\.ec2\.internal|instance-data\.[\w-]+\.compute\.internal)"
)
_NUMBERS = re.compile(r"(?:\d+|0x[0-9a-f]*)", re.IGNORECASE)  # a host whose last label is one is an IPv4 address
# Addresses that Python takes for public though services of a cloud or of the own network answer there.
_NOT_PUBLIC = tuple(
    ipaddress.ip_network(network)
    for network in (
        "168.63.129.16/32",  # Azure's platform
        "192.0.0.0/24",  # IETF's own; Oracle's metadata
        "192.88.99.0/24",  # relays of 6to4
        "64:ff9b:1::/48",  # translation to IPv4 within a network
        "fec0::/10",  # site-local
    )
)
_TRANSLATED = ipaddress.IPv6Network("64:ff9b::/96")  # NAT64: the last 32 bits are an IPv4 address
_COMPATIBLE = ipaddress.IPv6Network("::/96")  # an old way to write an IPv4 address


class PrivateAddressError(OSError):
    """A host that is not to be reached; the text is the same for all, for aiohttp joins those of a name's addresses.

    Attributes:
        address: The address or name.
    """

    def __init__(self, address: str) -> None:
        super().__init__(errno.EACCES, "not an address of the public internet")
        self.address = address


def private_address_in(error: BaseException | None) -> str | None:
    """Returns the address that an exception, or one that led to it, refuses; None where none does."""
    while error is not None:
        if isinstance(error, PrivateAddressError):
            return error.address
        error = error.__cause__ or error.__context__
    return None


def is_public(address: str) -> bool:
    """Says whether a numeric address is one of the public internet; what is written in no usual form is not."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return all(
        one.is_global
        and not (one.is_multicast or one.is_reserved)
        and not any(one.version == network.version and one in network for network in _NOT_PUBLIC)
        for one in _with_embedded(parsed)
    )


def _with_embedded(address: _Address) -> Iterator[_Address]:
    """Yields an address, or the IPv4 addresses that an IPv6 address stands for."""
    if isinstance(address, ipaddress.IPv4Address):
        yield address
        return
    last = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if address.ipv4_mapped is not None or address in _TRANSLATED or address in _COMPATIBLE:
        yield last
    elif address.sixtofour is not None:
        yield address.sixtofour
    else:
        yield address


class PublicOnly:
    """What a session of aiohttp needs to reach public addresses only: a maker of sockets, and a middleware."""

    def make_socket(self, place: tuple[Any, ...]) -> socket.socket:
        """Makes the socket for an address as `getaddrinfo` describes it.

        Raises:
            PrivateAddressError: The address is neither public nor that of a proxy from the environment.
        """
        family, kind, protocol, _, address = place
        if not is_public(address[0]) and address[:2] not in self._proxies:
            raise PrivateAddressError(address[0])
        return socket.socket(family, kind, protocol)

    async def check_request(
        self, request: ClientRequest, send: Callable[[ClientRequest], Awaitable[ClientResponse]]
    ) -> ClientResponse:
        """Sends a request, also one to which a server has redirected, unless its host is spelt as a private one.

        Raises:
            PrivateAddressError: It is.
        """
        host = (request.url.raw_host or "").rstrip(".").lower()
        is_address = ":" in host or _NUMBERS.fullmatch(host.rpartition(".")[2]) is not None
        if _INTERNAL_NAMES.fullmatch(host) or (is_address and not is_public(host)):
            raise PrivateAddressError(host)
        return await send(request)

    @cached_property
    def _proxies(self) -> frozenset[tuple[str, int]]:
        """The addresses of the proxies that the environment names; whoever runs the job has chosen them."""
        found: set[tuple[str, int]] = set()
        for scheme, url in getproxies().items():
            if scheme == "no":  # the hosts that are reached without one
                continue
            parts = urlsplit(url if "://" in url else f"http://{url}")
            try:
                port = parts.port or (443 if parts.scheme == "https" else 80)
                found.update((str(place[4][0]), port) for place in socket.getaddrinfo(parts.hostname, port))
            except (OSError, ValueError):  # the request itself says what is wrong with it
                continue
        return frozenset(found)
