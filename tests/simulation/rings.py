"""Transfers, gifts and owners' second thoughts in the simulated world, and what must hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from aivillage.ledger import books, transfers
from aivillage.protocols.errors import AivillageError
from aivillage.protocols.types import PeerId, peer_id
from aivillage.protocols.vouchers import RING_MAX, RING_MIN
from tests.simulation.world import EXPOSURE, Node, World, broken

if TYPE_CHECKING:
    from collections.abc import Sequence

STEP_MAX = EXPOSURE // transfers.STEPS_PER_EXPOSURE


def trade(world: World) -> None:
    """Some ring starts, some present is given, some owner loses patience."""
    if world.chance(world.rates.transfer):
        size = world.rng.randint(RING_MIN, min(RING_MAX, len(world.members)))
        starter, *others = world.rng.sample(world.members, size)
        start(world, starter, others, world.rng.randint(1, STEP_MAX))
    if world.chance(world.rates.transfer / 10):
        giver, taker = world.rng.sample(world.members, 2)
        world.guard(giver, lambda: give(world, giver, taker))
    if world.chance(world.rates.transfer / 20):
        _release(world, world.rng.choice(world.members))


def start(world: World, starter: Node, others: Sequence[Node], amount: int) -> list[bytes]:
    """The xid, once the transfer is durable; nothing where it is refused."""
    begun: list[bytes] = []
    peers, random_bytes = [node.id for node in others], world.rng.randbytes(8)
    world.guard(
        starter,
        lambda: starter.ledger.routing.start(peers, amount, random_bytes, begun.append, _refused),
    )
    return begun


def _refused(_error: AivillageError) -> None:
    """Not now: nothing was begun."""


def give(world: World, giver: Node, taker: Node) -> None:
    amount, gift = world.rng.randint(1, 5), world.rng.randbytes(16)
    giver.ledger.buying.give(taker.id, amount, gift, lambda: None, _refused)


def _release(world: World, owner: Node) -> None:
    row = books.one(owner.db, "SELECT xid FROM route WHERE state = 'open'")
    if row is not None:
        xid = row[0]
        world.guard(owner, lambda: owner.ledger.routing.release(xid, lambda amount: None, _refused))


# ---------------------------------------------------------------- what must hold


_MARKED = """
  SELECT xid, state FROM transfer t
  WHERE (state NOT IN ('waiting', 'refunded') AND NOT EXISTS (SELECT 1 FROM item
      WHERE mine = 1 AND peer = t.next AND kind = 1 AND id = t.xid))
    OR (state IN ('refunded', 'returned') AND NOT EXISTS (SELECT 1 FROM item
      WHERE mine = 1 AND peer = t.previous AND kind = 3 AND id = t.xid))
"""
_MORE_OUT = """
  SELECT attempt, sum(amount) AS more FROM posting
  WHERE account = 'routed' AND attempt NOT IN (SELECT xid FROM route)
  GROUP BY attempt HAVING more > 0
"""


def at_every_step(node: Node) -> None:
    """I6: unconfirmed per member at most X. I7: nobody passes on more than came, nor less."""
    for peer, amount in at_risk(node).items():
        if amount > EXPOSURE:
            raise broken("I6", f"node {node.index} has {amount} under way through {peer}")
    never_more_out(node)
    for xid, state in books.rows(node.db, _MARKED):
        raise broken("I7", f"node {node.index} marked {xid.hex()} {state} without a voucher")


def at_risk(node: Node) -> dict[str, int]:
    """By the open rings themselves, whatever the node keeps count of."""
    amounts: dict[str, int] = {}
    for amount, ring in books.rows(node.db, "SELECT amount, ring FROM route WHERE state = 'open'"):
        for peer in members(node.world, ring)[1:]:
            amounts[peer] = amounts.get(peer, 0) + amount
    return amounts


def members(world: World, ring: bytes) -> tuple[PeerId, ...]:
    """Of a stored ring, the one who started it first; each by its first name."""
    named = (peer_id(key) for key in msgspec.msgpack.decode(ring))
    return tuple(world.first_names.get(name, name) for name in named)


def held_back(node: Node, peer: str) -> int:
    """What `peer` gave back and this node has not: it owes that, and costs nothing yet."""
    row = books.one(
        node.db,
        "SELECT coalesce(sum(amount), 0) FROM transfer WHERE next = ? AND state = 'returning'",
        (peer,),
    )
    return int(row[0]) if row else 0


def never_more_out(node: Node) -> None:
    for xid, more in books.rows(node.db, _MORE_OUT):
        raise broken("I7", f"node {node.index} passed on {more} more of {xid.hex()} than came")


def when_quiet(world: World) -> None:
    """I13: between honest nodes no transfer is stuck, and every ring of theirs has ended."""
    honest = {node.id for node in world.nodes if node.honest}
    for node in world.nodes:
        if not node.honest:
            continue
        for transfer in transfers.pending(node.db):
            if {transfer.previous, transfer.next} <= honest:
                raise broken("I13", f"node {node.index}: {transfer} is stuck")
        for xid, ring in books.rows(node.db, "SELECT xid, ring FROM route WHERE state = 'open'"):
            if {*members(world, ring)} <= honest:
                raise broken("I13", f"node {node.index}: ring {xid.hex()} never ended")
        if all(other.lossless for other in world.nodes):
            never_more_out(node)


def closed(world: World) -> int:
    """Rings that came back to who started them."""
    count = "SELECT count(*) FROM route WHERE state = 'closed'"
    return sum(row[0] for node in world.nodes if (row := books.one(node.db, count)))


def at_rest(world: World) -> bool:
    """Nothing that honest neighbours could move on waits."""
    honest = {node.id for node in world.nodes if node.honest}
    return not any(
        {transfer.previous, transfer.next} <= honest
        for node in world.nodes
        if node.honest
        for transfer in transfers.pending(node.db)
    )
