"""What is said on `/aivillage/punch/1`, through a relay, by two nodes behind routers.

Each says where the relay sees it; then both dial at the same moment, so that each one's router
takes the other's packet for the answer to its own. Who begins is also the one that begins Noise.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Final

from aivillage.protocols.errors import PeerError
from aivillage.protocols.relaying import Talk

PUNCH_PROTOCOL: Final = "/aivillage/punch/1"
PORT_LEAST: Final = 1024
"""Routers map to high ports; below are the services of somebody who asked for nothing."""

_ADDRESS: Final = re.compile(r"/ip4/([0-9.]{7,15})/tcp/([0-9]{1,5})", re.ASCII)
_ALL: Final = ipaddress.IPv4Address("255.255.255.255")


class Meet(Talk, frozen=True, kw_only=True, tag="meet"):
    """`address`: where a relay sees me, `/ip4/<ip>/tcp/<port>`. Said by both."""

    address: str


class Now(Talk, frozen=True, kw_only=True, tag="now"):
    """Dial when you read this; I dial half a round trip after I said it."""


Meeting = Meet | Now


def place(address: str) -> tuple[str, int]:
    """The number and port of a meeting place.

    Raises:
        PeerError: BAD_REQUEST, it is malformed, or no place where a router could be.
    """
    found = _ADDRESS.fullmatch(address)
    if found is None:
        raise _no_place("it is not /ip4/<ip>/tcp/<port>")
    try:
        ip, port = ipaddress.IPv4Address(found[1]), int(found[2])
    except ValueError as error:
        raise _no_place(str(error)) from None
    if not PORT_LEAST <= port < 65_536:
        raise _no_place(f"its port is not within {PORT_LEAST} to 65535")
    if ip.is_loopback or ip.is_link_local or ip.is_multicast or ip.is_unspecified or ip == _ALL:
        raise _no_place("nobody else's router is there")
    return str(ip), port


def _no_place(reason: str) -> PeerError:
    return PeerError(f"no meeting place: {reason}", code="BAD_REQUEST")
