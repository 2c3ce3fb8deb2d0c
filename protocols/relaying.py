"""What is said on `/aivillage/relay/1`: one question, one answer, then a circuit's raw bytes.

A node behind NAT keeps a stream to a relay on which it said `Reserve`. Who wants to reach it opens
another and says `Reach`; the relay opens one to the target, says `Incoming`, and joins the two. The
ends run Noise over it, as over TCP: what the relay says of either end is never taken for proof.
"""

from __future__ import annotations

from typing import Final

import msgspec

from aivillage.protocols.errors import RequestError
from aivillage.protocols.types import PeerId

RELAY_PROTOCOL: Final = "/aivillage/relay/1"
TALK_BYTES_MAX: Final = 4096
"""A question or an answer: a few short fields, and room for later ones."""
_CIRCUIT: Final = "/p2p-circuit"


class Talk(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="t"):
    """Unknown fields pass."""


class Reserve(Talk, frozen=True, kw_only=True, tag="reserve"):
    """Let others reach me through you, for as long as this stream lives."""


class Reach(Talk, frozen=True, kw_only=True, tag="reach"):
    """Join this stream to `peer`, who has a reservation with you."""

    peer: PeerId


class Incoming(Talk, frozen=True, kw_only=True, tag="incoming"):
    """At the other end of this stream is, so I say, `peer`."""

    peer: PeerId


class Granted(Talk, frozen=True, kw_only=True, tag="granted"):
    """So be it."""


class Refused(Talk, frozen=True, kw_only=True, tag="refused"):
    code: str
    message: str
    next_step: str = ""


Question = Reserve | Reach | Incoming
Answer = Granted | Refused


# ------------------------------------------------------------------ addresses
def is_circuit(address: str) -> bool:
    return f"{_CIRCUIT}/" in address


def circuit_address(relay_address: str, peer: PeerId) -> str:
    """`/ip4/…/p2p/RELAY` -> `/ip4/…/p2p/RELAY/p2p-circuit/p2p/PEER`."""
    return f"{relay_address}{_CIRCUIT}/p2p/{peer}"


def split_circuit(address: str) -> tuple[str, PeerId]:
    """The relay's address, and who is behind it.

    Raises:
        RequestError: `address` is malformed, or leads through more than one relay.
    """
    relay, _, rest = address.partition(f"{_CIRCUIT}/p2p/")
    if "/p2p/" not in relay or not rest or "/" in rest:
        raise RequestError(
            f"{address!r} is no address behind a relay",
            next_step="write /ip4/<ip>/tcp/<port>/p2p/<relay id>/p2p-circuit/p2p/<peer id>",
        )
    return relay, PeerId(rest)
