"""What people do to their books now and then: devices of one owner, new keys, debts given up.

Each is drawn from sequences of their own, beside those of the world.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import msgspec

from aivillage.ledger import books, corrections
from aivillage.ledger.signing import Signer
from aivillage.protocols import succession
from aivillage.protocols.envelope import prefix
from aivillage.protocols.papers import Succession
from aivillage.protocols.types import peer_id

if TYPE_CHECKING:
    from tests.simulation.world import Node, World

EXPIRY_DAYS = 3
OWNER = "an owner"


def draw(world: World) -> None:
    """Whether this seed has a household, an end of debts, and people who change keys."""
    rng = random.Random(f"households {world.seed}")
    if rng.random() < 0.4 and len(world.members) > 2:
        world.household = tuple(rng.sample(world.members, 2))
    world.write_offs = rng.choice((0.0, 0.02))
    loses = world.rates.restore or world.rates.lost_tail
    # A book that forgets its own change of key goes by a key that others know as replaced.
    world.rekeys = 0.0 if loses else rng.choice((0.0, 0.5))


def expiry_days(seed: int) -> int:
    return random.Random(f"expiry {seed}").choice((0, 0, EXPIRY_DAYS))


def owner_of(world: World, node: Node) -> str | None:
    return OWNER if node in world.household else None


def trade(world: World) -> None:
    if world.chance(world.write_offs):
        owner, debtor = world.rng.sample(world.members, 2)
        desk, at_ms = owner.ledger.desk, owner.clock.unix_ms()
        world.guard(
            owner,
            lambda: desk.submit(
                lambda db: corrections.write_off(db, debtor.id, None, "given up", at_ms),
                lambda _: None,
                lambda _: None,
            ),
        )


def change_key(world: World, node: Node) -> None:
    """A node that stands still goes by another key from now on; its old one signed that."""
    if not (node.honest and world.chance(world.rekeys)):
        return
    former, node.signer = node.signer, type(node.signer)(node.signer.public_key + b"next")
    proof = succession_of(former, node.signer, node.clock.unix_ms())
    with node.db:
        books.add_own_key(node.db, node.signer.public_key, proof, node.clock.unix_ms())
    node.changes.append((peer_id(former.public_key), peer_id(node.signer.public_key), proof))
    world.first_names[node.changes[-1][1]] = node.id


def succession_of(old: Signer, new: Signer, at_unix_ms: int) -> bytes:
    """As `succession.make`, by whatever signs here."""
    names = [peer_id(signer.public_key) for signer in (old, new)]
    bare = Succession(old=names[0], new=names[1], at_unix_ms=at_unix_ms, consent=b"")
    whole = msgspec.structs.replace(bare, consent=new.sign(succession.consented(bare)))
    body = msgspec.msgpack.encode(whole)
    signature = old.sign(prefix("succession") + body)
    return msgspec.msgpack.encode((old.public_key, body, signature))


def tell_changes(node: Node, peer: Node) -> None:
    """What a hello says first: `node` hears of the keys that `peer` had, if its disk has room."""
    for former, successor, proof in peer.changes:
        node.ledger.succeed(former, successor, proof, lambda: None, node.fails)
    if peer.changes:
        node.world.flush(node)
