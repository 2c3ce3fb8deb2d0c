"""Transfers: a debt moves around a ring of neighbours until it comes back to who started it.

Each member pays the next the same amount, the last one the first; so what one peer owes me pays
what I owe another, with nobody between who could keep it: a middle books and passes on in one
transaction. Every step here is durable; `routing.py` says when it may be taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import apsw
import msgspec

from aivillage.ledger.books import (
    Leg,
    Pair,
    correct,
    key_of,
    name_of,
    one,
    own_keys,
    read_pair,
    rows,
)
from aivillage.ledger.exposure import others_share
from aivillage.protocols.errors import LedgerError, RequestError
from aivillage.protocols.types import MicroCredits, PeerId, as_credits
from aivillage.protocols.vouchers import (
    REFUND,
    RING_MAX,
    RING_MIN,
    ROUTE,
    Item,
    Voucher,
)

STEPS_PER_EXPOSURE: Final = 4
"""A transfer is at most a quarter of what I risk at each member: four may be under way."""
AT_ONCE: Final = 64
"""Transfers looked at in one transaction; the rest follows in the next."""

Sign = Callable[[PeerId, Item], Voucher | None]
"""Signs one item to a peer, durable with the transaction; None: it was signed before."""


class Transfer(NamedTuple):
    xid: bytes
    previous: PeerId
    next: PeerId
    amount: MicroCredits
    ring: bytes
    state: str
    at_ms: int
    """When it came, by this node's own clock: others' clocks may be wrong."""


class Sent(NamedTuple):
    """A voucher that leaves after the commit, and the counters with its payee."""

    peer: PeerId
    voucher: Voucher
    pair: Pair


# ---------------------------------------------------------------- who starts


def start(
    db: apsw.Connection,
    sign: Sign,
    others: Sequence[PeerId],
    amount: MicroCredits,
    xid: bytes,
    at_ms: int,
) -> Sent:
    """Pays the first of `others`; the last of them is to pay me. What is at risk is durable.

    Raises:
        RequestError: BAD_REQUEST, these peers make no ring.
        LedgerError: INSUFFICIENT_CREDITS, more than I risk, may owe or lend.
    """
    if not RING_MIN <= len(others) + 1 <= RING_MAX or len({*others}) != len(others):
        raise RequestError(f"a ring has {RING_MIN} to {RING_MAX} members, each once")
    if amount < 1:
        raise RequestError("a transfer moves at least one micro-credit")
    pairs = [read_pair(db, peer) for peer in others]
    for pair in pairs:
        _require_risk(pair, amount)
    _require_headroom(db, pairs[0], pairs[-1], amount)
    ring = (own_keys(db)[0], *(key_of(db, peer) for peer in others))
    _open(db, xid, amount, ring, others, at_ms)
    voucher = sign(others[0], Item(ROUTE, xid, b"", amount, bytes(32), True, ring))
    if voucher is None:
        raise RequestError("this transfer was started before")
    return Sent(others[0], voucher, read_pair(db, others[0]))


def _require_risk(pair: Pair, amount: MicroCredits) -> None:
    """I6: what is under way through one peer is never more than its exposure."""
    step = pair.exposure // STEPS_PER_EXPOSURE
    if not pair.known or amount > step or pair.routed + amount > pair.exposure:
        raise LedgerError(
            f"a transfer of {as_credits(amount)} is more than you risk at {pair.peer[-8:]} now",
            next_step="wait for those under way, or trust it with more",
        )


def _require_headroom(db: apsw.Connection, first: Pair, last: Pair, amount: MicroCredits) -> None:
    if amount - first.balance > first.received_line:
        raise LedgerError(
            f"{first.peer[-8:]} neither owes nor lends you {as_credits(amount)}",
            next_step="choose another first member of the ring",
        )
    if _owed_by_owner(db, last) + amount > last.line:
        raise LedgerError(
            f"{last.peer[-8:]} would owe you more than its line",
            next_step="raise its line, or transfer less",
        )


def _owed_by_owner(db: apsw.Connection, pair: Pair) -> MicroCredits:
    """By a known peer and the other devices of its owner: their line is one."""
    return pair.owed + others_share(db, pair)


def _open(
    db: apsw.Connection,
    xid: bytes,
    amount: MicroCredits,
    ring: Sequence[bytes],
    others: Sequence[PeerId],
    at_ms: int,
) -> None:
    packed = msgspec.msgpack.encode(tuple(ring))
    db.execute("INSERT INTO route VALUES (?, ?, ?, 'open', ?, 0)", (xid, amount, packed, at_ms))
    for peer in others:
        db.execute("INSERT INTO route_hop VALUES (?, ?, ?)", (xid, peer, amount))


def _end(db: apsw.Connection, xid: bytes, state: str, at_ms: int) -> None:
    """A ring of mine is closed or came back; what I gave up comes back to the books too."""
    found = one(db, "SELECT state, amount, ring FROM route WHERE xid = ?", (xid,))
    if found is None or found[0] not in {"open", "released"}:
        return
    db.execute("UPDATE route SET state = ?, ended_ms = ? WHERE xid = ?", (state, at_ms, xid))
    if found[0] == "released":
        first = name_of(db, _keys(found[2])[1])
        legs = [Leg("routed", xid, found[1]), Leg("writeoff", xid, -found[1])]
        correct(db, first, "write-back", f"transfer {xid.hex()} {state} after all", legs, at_ms)


def release(db: apsw.Connection, xid: bytes, at_ms: int) -> MicroCredits:
    """Gives up an open transfer of mine: its amount is lost, unless it comes back after all.

    Raises:
        RequestError: BAD_REQUEST, none of mine that is open.
    """
    found = one(db, "SELECT amount, ring FROM route WHERE xid = ? AND state = 'open'", (xid,))
    if found is None:
        raise RequestError(f"no transfer {xid.hex()} of yours is open")
    amount = int(found[0])
    db.execute("UPDATE route SET state = 'released', ended_ms = ? WHERE xid = ?", (at_ms, xid))
    legs = [Leg("routed", xid, -amount), Leg("writeoff", xid, amount)]
    correct(db, name_of(db, _keys(found[1])[1]), "release", f"transfer {xid.hex()}", legs, at_ms)
    return amount


# ---------------------------------------------------------------- who is paid


def take(db: apsw.Connection, peer: PeerId, item: Item, increase: MicroCredits, at_ms: int) -> None:
    """An item of a voucher that was just booked: ends a ring of mine, or waits to go on."""
    if item.kind == ROUTE and item.route[0] in own_keys(db):
        if _is_whole(db, peer, item, -1):
            _end(db, item.id, "closed", at_ms)
    elif item.kind == ROUTE and increase == item.amount:
        db.execute(
            "INSERT INTO transfer VALUES (?, ?, ?, ?, ?, 'waiting', ?) ON CONFLICT DO NOTHING",
            (item.id, peer, _next(db, item), item.amount, _packed(item), at_ms),
        )
        _recall(db, item.id, peer)
    elif item.kind == REFUND:
        _heed_refund(db, item.id)
        if _is_whole(db, peer, item, 1):
            _end(db, item.id, "refunded", at_ms)


def _is_whole(db: apsw.Connection, peer: PeerId, item: Item, member: int) -> bool:
    """Whether all of a ring of mine comes from the `member` who is to end it; less ends nothing."""
    found = one(db, "SELECT amount, ring FROM route WHERE xid = ?", (item.id,))
    if found is None or found[0] != item.amount:
        return False
    return name_of(db, _keys(found[1])[member]) == peer


_RECALLED: Final = """
  UPDATE transfer SET state = ?1 WHERE xid = ?2 AND previous = ?3 AND state = 'waiting'
    AND EXISTS (SELECT 1 FROM item i
      WHERE i.mine = 1 AND i.peer = transfer.{} AND i.kind = ?4 AND i.id = ?2)
    AND NOT EXISTS (SELECT 1 FROM transfer o
      WHERE o.xid = ?2 AND o.previous <> ?3 AND o.state <> 'waiting')
"""


def _recall(db: apsw.Connection, xid: bytes, previous: PeerId) -> None:
    """What I did with a transfer before I forgot that it came stands."""
    for kind, side, state in ((ROUTE, "next", "forwarded"), (REFUND, "previous", "refunded")):
        db.execute(_RECALLED.format(side), (state, xid, previous, kind))
    _heed_refund(db, xid)


def _heed_refund(db: apsw.Connection, xid: bytes) -> None:
    """What I passed on came back; after a loss I may hear of that first."""
    db.execute(
        "UPDATE transfer SET state = 'returning' WHERE xid = ? AND state = 'forwarded'"
        " AND EXISTS (SELECT 1 FROM item i WHERE i.mine = 0 AND i.peer = transfer.next"
        " AND i.kind = ? AND i.id = transfer.xid AND i.amount = transfer.amount)",
        (xid, REFUND),
    )


def _next(db: apsw.Connection, item: Item) -> PeerId:
    """Who comes after me in a ring that was checked: I am in it."""
    mine = next(index for index, key in enumerate(item.route) if key in own_keys(db))
    return name_of(db, item.route[(mine + 1) % len(item.route)])


def _packed(item: Item) -> bytes:
    return msgspec.msgpack.encode(item.route)


def _keys(ring: bytes) -> tuple[bytes, ...]:
    return msgspec.msgpack.decode(ring, type=tuple[bytes, ...])


# ---------------------------------------------------------------- who passes on


class Reach(NamedTuple):
    """Peers that are linked and synced now, and those that were since this node started.

    Nothing is signed before: the peer may show me that I did so, and forgot.
    """

    ready: frozenset[PeerId]
    met: frozenset[PeerId]
    hold_ms: int
    """How long a transfer may wait here before it goes back."""


_PENDING: Final = """
  SELECT xid, previous, next, amount, ring, state, at_ms FROM transfer
  WHERE state IN ('waiting', 'returning') ORDER BY at_ms LIMIT ?
"""


def pending(db: apsw.Connection) -> list[Transfer]:
    """Transfers that wait to go on, or came back from the next and not yet to the previous."""
    return [Transfer(*row) for row in rows(db, _PENDING, (AT_ONCE,))]


def advance(db: apsw.Connection, sign: Sign, reach: Reach, at_ms: int) -> list[Sent]:
    """Passes on, or gives back, what can be now; I7: the sum of what leaves is what came."""
    sent: list[Sent] = []
    for transfer in pending(db):
        step = _step(db, transfer, reach, at_ms)
        if step != "wait":
            sent += _take_step(db, sign, transfer, step)
    return sent


def _step(db: apsw.Connection, transfer: Transfer, reach: Reach, at_ms: int) -> str:
    """`wait`, or the state to come."""
    if transfer.previous not in reach.ready:
        return "wait"
    if transfer.state == "returning":
        return "returned" if _is_worth_it(db, transfer) else "wait"
    is_late = at_ms - transfer.at_ms > reach.hold_ms
    if not is_late and _may_forward(db, transfer):
        return "forwarded" if transfer.next in reach.ready else "wait"
    is_neighbour = read_pair(db, transfer.next).known
    return "wait" if is_neighbour and transfer.next not in reach.met else "refunded"


def _is_worth_it(db: apsw.Connection, transfer: Transfer) -> bool:
    """I14: what came back is the next one's promise, and within its line that is as good as pay.

    Beyond line and exposure it stays here, unpaid, until the next one owes less: so however many
    come back at once, nobody who pays is owed more than its owner allowed.
    """
    after = read_pair(db, transfer.next)
    return _owed_by_owner(db, after) <= after.line + after.exposure


def _take_step(db: apsw.Connection, sign: Sign, transfer: Transfer, step: str) -> list[Sent]:
    if step == "forwarded":
        target, kind, ring = transfer.next, ROUTE, _keys(transfer.ring)
    else:
        target, kind, ring = transfer.previous, REFUND, ()
    item = Item(kind, transfer.xid, b"", transfer.amount, bytes(32), True, ring)
    voucher = sign(target, item)
    db.execute(
        "UPDATE transfer SET state = ? WHERE xid = ? AND previous = ?",
        (step, transfer.xid, transfer.previous),
    )
    return [Sent(target, voucher, read_pair(db, target))] if voucher is not None else []


def _may_forward(db: apsw.Connection, transfer: Transfer) -> bool:
    """Whether the owner's lines allow it: what the previous may owe me, and I may owe the next."""
    previous, after = read_pair(db, transfer.previous), read_pair(db, transfer.next)
    amount = transfer.amount
    rivals = one(
        db,
        "SELECT 1 FROM transfer WHERE xid = ? AND previous <> ?",
        (transfer.xid, transfer.previous),
    )
    liar = one(db, "SELECT 1 FROM evidence WHERE payer = ?", (transfer.previous,))
    return (
        rivals is None
        and liar is None
        and bool(previous.known and after.known)
        and not (previous.blocked or after.blocked)
        and _owed_by_owner(db, previous) <= previous.line
        and amount - after.balance <= after.received_line
    )


def adopt(db: apsw.Connection, peer: PeerId, item: Item, at_ms: int) -> None:
    """A voucher of mine that I had forgotten says what I did with a transfer."""
    if item.kind == ROUTE and item.route[0] in own_keys(db):
        if one(db, "SELECT 1 FROM route WHERE xid = ?", (item.id,)) is None:
            others = [name_of(db, key) for key in item.route[1:]]
            _open(db, item.id, item.amount, item.route, others, at_ms)
            _end_if_known(db, item.id, others, at_ms)
    elif item.kind == ROUTE:
        _mark(db, item.id, "next", peer, "forwarded", ("waiting",))
        _heed_refund(db, item.id)
    elif item.kind == REFUND:
        _mark(db, item.id, "previous", peer, "refunded", ("waiting",))
        _mark(db, item.id, "previous", peer, "returned", ("forwarded", "returning"))


def _end_if_known(db: apsw.Connection, xid: bytes, others: Sequence[PeerId], at_ms: int) -> None:
    """What ends a ring may have arrived before I remembered that I started it."""
    came = (
        "SELECT 1 FROM item JOIN route ON xid = id AND route.amount = item.amount"
        " WHERE mine = 0 AND peer = ? AND kind = ? AND id = ?"
    )
    if one(db, came, (others[-1], ROUTE, xid)):
        _end(db, xid, "closed", at_ms)
    elif one(db, came, (others[0], REFUND, xid)):
        _end(db, xid, "refunded", at_ms)


_MARKED: Final = "UPDATE transfer SET state = ? WHERE xid = ? AND {} = ? AND state = ?"


def _mark(
    db: apsw.Connection, xid: bytes, side: str, peer: PeerId, state: str, before: Sequence[str]
) -> None:
    """`side`: the column that names `peer`."""
    for old in before:
        db.execute(_MARKED.format(side), (state, xid, peer, old))


def standing(db: apsw.Connection, xid: bytes) -> tuple[str, list[Pair]]:
    """State of a ring of mine, and the counters with its members; empty where it is none."""
    found = one(db, "SELECT state, ring FROM route WHERE xid = ?", (xid,))
    if found is None:
        return "", []
    return found[0], [read_pair(db, name_of(db, key)) for key in _keys(found[1])[1:]]
