"""What dishonest nodes do: an honest core whose blobs are rewritten on their way out."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import msgspec

from aivillage.protocols.vouchers import (
    Claim,
    Item,
    SyncReply,
    Voucher,
    VoucherBody,
    decode,
    encode,
    root_of,
    voucher_prefixed,
)

if TYPE_CHECKING:
    from tests.simulation.world import Node, World

LIES = (
    "never_pays",
    "forgets",
    "withholds",
    "claims",
    "inflates_items",
    "contradicts",
    "stops",
    "replays",
    "mutates",
)


SYBILS = (0, 0, 1, 2, 4, 8)
SYBIL_LIES = (
    "never_pays",
    "never_pays",
    "forgets",
    "withholds",
    "claims",
    "inflates_items",
    "contradicts",
    "replays",
    "mutates",
)
"""Who pays is no danger to a pool: what never pays is drawn twice as often."""


def sybils(seed: int) -> list[str]:
    """The lie of each stranger that one liar is.

    Drawn from a sequence of its own, so that worlds without any stay as they were.
    """
    rng = random.Random(f"sybils {seed}")
    return [rng.choice(SYBIL_LIES) for _ in range(rng.choice(SYBILS))]


def wants_to_crash(world: World, node: Node) -> bool:
    """One that forgets on purpose goes down often and comes back with an older disk."""
    return node.lie in {"forgets", "never_pays"} and world.chance(0.02)


def twist(world: World, node: Node, peer: Node, blob: bytes) -> bytes:
    epoch, message = decode(blob)
    if node.lie == "replays":
        world.heard.append(blob)
        return world.rng.choice(world.heard) if world.chance(0.2) else blob
    if node.lie == "mutates" and world.chance(0.2):
        return _mutated(world, blob)
    match node.lie, message:
        case "withholds", SyncReply():
            return encode(epoch, msgspec.structs.replace(message, yours=()))
        case "claims", SyncReply(claims=()):
            return encode(epoch, msgspec.structs.replace(message, claims=_claims(world, peer)))
        case "inflates_items", Voucher():
            return encode(epoch, _resigned(node, message, 0, 50))
        case "contradicts", Voucher() if world.chance(0.3):
            return encode(epoch, _resigned(node, message, -1, 0))
    return blob


def _mutated(world: World, blob: bytes) -> bytes:
    """A byte changed, cut off or put in: it may still be a message."""
    place = world.rng.randrange(len(blob))
    change = world.rng.choice((bytes([world.rng.randrange(256)]), b"", blob[place : place + 1] * 2))
    return blob[:place] + change + blob[place + 1 :]


def _claims(world: World, peer: Node) -> tuple[Claim, ...]:
    """For work that was asked for (all of the ceiling), and for some that never was."""
    asked = peer.db.execute("SELECT attempt, quote_hash FROM intent LIMIT 3").fetchall()
    invented = [(world.rng.randbytes(16), bytes(32))]
    return tuple(Claim(attempt, quote, 1_000, bytes(32)) for attempt, quote in asked + invented)


def _resigned(node: Node, voucher: Voucher, cum_change: int, item_change: int) -> Voucher:
    body: Any = msgspec.msgpack.decode(voucher.body, type=VoucherBody)
    items = tuple(
        Item(i.kind, i.id, i.quote_hash, i.amount + item_change, i.out_hash, i.final)
        for i in voucher.items
    )
    cum = max(0, body.cum + cum_change)
    body = VoucherBody(body.payee, body.lane, body.n, cum, root_of(items))
    encoded = msgspec.msgpack.encode(body)
    return Voucher(encoded, node.signer.sign(voucher_prefixed(encoded)), items)
