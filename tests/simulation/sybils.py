"""One liar under many names: strangers to every honest node, who take what strangers are given.

A seed has none to eight of them. They buy and do not pay, claim work that nobody asked for, sign
two things under one number, promise presents, start transfers and sell to honest nodes now and
then. What all of them together cost one honest node must stay within its pool (I3).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aivillage.ledger import books
from aivillage.protocols.vouchers import GIFT
from tests.simulation import rings

if TYPE_CHECKING:
    from tests.simulation.world import Node, World


def trade(world: World) -> None:
    """The crook sends out some of its names."""
    if not world.sybils:
        return
    for _ in range(2):
        sybil, node = world.rng.choice(world.sybils), world.rng.choice(world.members)
        if world.chance(0.6):
            world.begin(sybil, node)
        elif world.chance(0.3):
            world.begin(node, sybil)
    if world.chance(world.rates.transfer / 4):
        _promise(world)


def _promise(world: World) -> None:
    """What costs a stranger nothing to say: a present, or a transfer for others to pass on."""
    sybil = world.rng.choice(world.sybils)
    others = world.rng.sample(world.members, 2)
    if world.chance(0.5):
        rings.start(world, sybil, others, world.rng.randint(1, rings.STEP_MAX))
    else:
        world.guard(sybil, lambda: rings.give(world, sybil, others[0]))


def taken_by_strangers(node: Node) -> int:
    """What strangers have of `node` by what really happened, each for what it did not earn here.

    Work that they did here counts, presents of the node's too, and what was paid on a claim: that
    has a bound of its own (I4). Nothing that they signed does.
    """
    taken = 0
    for pair in books.read_pairs(node.db):
        if not pair.known:
            earned = node.received.get(pair.peer, 0) + _given(node, pair.peer) + pair.arrears
            taken += max(0, node.delivered.get(pair.peer, 0) - earned)
    return taken


def _given(node: Node, peer: str) -> int:
    row = books.one(
        node.db,
        "SELECT coalesce(sum(amount), 0) FROM item WHERE mine = 1 AND peer = ? AND kind = ?",
        (peer, GIFT),
    )
    return int(row[0]) if row else 0
