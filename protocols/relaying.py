"""What is said on `/aivillage/relay/1`: one question, one answer, then a circuit's raw bytes.

A node behind NAT keeps a stream to a relay on which it said `Reserve`. Who wants to reach it opens
another and says `Reach`; the relay opens one to the target, says `Incoming`, and joins the two. The
ends run Noise over it, as over TCP: what the relay says of either end is never taken for proof.

Who holds a reservation pays for the bytes of its circuits, both directions, as they pass its own
end: the relay bills on the reservation's stream, and is paid by what the holder counted itself.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Final

import msgspec

from aivillage.protocols.errors import RequestError
from aivillage.protocols.types import Amount, Count, MicroCredits, PeerId

RELAY_PROTOCOL: Final = "/aivillage/relay/1"
TALK_BYTES_MAX: Final = 4096
"""A question or an answer: a few short fields, and room for later ones."""
BILL_BYTES: Final = 1 << 20
"""A relay that takes money bills whenever so much was carried, and does no more until it may."""
CIRCUIT_LOSS_BYTES: Final = 1 << 19
"""What a circuit that breaks may have had in flight: a stream's window, a piece at the relay."""
NONCE_BYTES: Final = 16
_CIRCUIT: Final = "/p2p-circuit"

Nonce = Annotated[bytes, msgspec.Meta(max_length=NONCE_BYTES)]


class Talk(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="t"):
    """Unknown fields pass."""


class Reserve(Talk, frozen=True, kw_only=True, tag="reserve"):
    """Let others reach me through you, for as long as this stream lives.

    I pay up to `price_max_...`, and `ceiling_...` in all. A version before prices says neither.
    """

    nonce: Nonce = b""
    price_max_micro_credits_per_gib: Amount = 0
    ceiling_micro_credits: Amount = 0


class Reach(Talk, frozen=True, kw_only=True, tag="reach"):
    """Join this stream to `peer`, who has a reservation with you."""

    peer: PeerId


class Incoming(Talk, frozen=True, kw_only=True, tag="incoming"):
    """At the other end of this stream is, so I say, `peer`."""

    peer: PeerId


class Granted(Talk, frozen=True, kw_only=True, tag="granted"):
    """So be it. Of a reservation: at this price; who asked for none of it pays nothing."""

    nonce: Nonce = b""
    price_micro_credits_per_gib: Amount = 0


class Bill(Talk, frozen=True, kw_only=True, tag="bill"):
    """On a reservation's stream: what I carried to and from you in all since I granted it."""

    carried_bytes: Count


class Refused(Talk, frozen=True, kw_only=True, tag="refused"):
    code: str
    message: str
    next_step: str = ""


Question = Reserve | Reach | Incoming
Answer = Granted | Refused


# ------------------------------------------------------------------ pay
def price_of(carried_bytes: int, price_micro_credits_per_gib: MicroCredits) -> MicroCredits:
    """Both ends compute it, of all bytes since the grant; a part of one is not paid yet."""
    return carried_bytes * price_micro_credits_per_gib >> 30


def agreement(relay: PeerId, holder: PeerId, asked: Reserve, granted: Granted) -> bytes:
    """Names one reservation and its terms: 32 bytes, which neither side could choose alone.

    The ledger's attempt is its beginning, its quote the whole.
    """
    words = (
        "aivillage/relay/1", relay, holder, granted.price_micro_credits_per_gib,
        asked.ceiling_micro_credits, asked.nonce.hex(), granted.nonce.hex(),
    )  # fmt: skip
    return hashlib.sha256("\0".join(map(str, words)).encode()).digest()


def mark(agreed: bytes, carried_bytes: int) -> bytes:
    """What stands in place of an output's hash: the count that was paid."""
    return hashlib.sha256(agreed + carried_bytes.to_bytes(8, "big")).digest()


def tolerance_bytes(circuits: int) -> int:
    """How far a bill may be ahead of the holder's own count after so many circuits.

    A bill overtakes the bytes that it is for, and what was under way when a circuit broke never
    comes. It says when a relay is left, not what it is paid: that is never beyond the count.
    """
    return BILL_BYTES + circuits * CIRCUIT_LOSS_BYTES


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
