"""The audit: recomputes everything that can be recomputed, and names the first thing wrong.

Hash chain, postings, balances, every signature, roots, monotone lanes, items, what counts as
paid. Reads in pages, so that memory does not grow with the book.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from aivillage.ledger.books import Leg, entry_hash
from aivillage.ledger.queries import Query
from aivillage.ledger.signing import verified_receipt, verified_voucher
from aivillage.protocols.errors import PeerError
from aivillage.protocols.types import public_key
from aivillage.protocols.vouchers import (
    Item,
    Receipt,
    Verify,
    Voucher,
    digest,
)

_PAGE: Final = 2000
_items: Final = msgspec.msgpack.Decoder(tuple[Item, ...])


_VOUCHERS: Final = {
    "in": "SELECT rowid, peer, lane, n, cum, body, signature, items FROM voucher_in"
    " WHERE rowid > ? ORDER BY rowid LIMIT ?",
    "out": "SELECT rowid, peer, lane, n, cum, body, signature, items FROM voucher_out"
    " WHERE rowid > ? ORDER BY rowid LIMIT ?",
}
_RECEIPTS: Final = "SELECT id, peer, body, signature FROM receipt WHERE id > ? ORDER BY id LIMIT ?"
_ENTRIES: Final = """
  SELECT seq, at_ms, kind, peer, lane, n, body_hash, prev, hash FROM entry
  WHERE seq > ? ORDER BY seq LIMIT ?
"""
_LEGS: Final = """
  SELECT seq, account, attempt, amount FROM posting WHERE seq BETWEEN ? AND ? ORDER BY seq, leg
"""
_LANES: Final = {
    "in": "SELECT peer, lane, n, cum FROM lane_in",
    "out": "SELECT peer, lane, n, cum FROM lane_out",
}


class AuditReport(msgspec.Struct, frozen=True, kw_only=True):
    """`first_error` names the entry, voucher, lane or peer that is wrong; empty if `ok`."""

    ok: bool
    entries: int
    vouchers: int
    receipts: int
    first_error: str = ""


class _WrongError(Exception):
    """The book contradicts itself here."""


class _Tally:
    """What has been seen so far."""

    def __init__(self) -> None:
        self.entries = self.vouchers = self.receipts = 0
        self.prev = bytes(32)
        self.mine: tuple[bytes, ...] = ()
        self.theirs: dict[str, tuple[bytes, ...]] = {}
        self.memos: set[bytes] = set()
        self.routed: dict[bytes, int] = {}
        self.sums: dict[str, int] = {}
        self.balances: dict[str, int] = {}
        self.bodies: dict[bytes, str] = {}
        self.cums: dict[tuple[str, str, bytes], tuple[int, int]] = {}


def audit(verify: Verify) -> Query[AuditReport]:
    """Checks the whole book. `verify` must be the real thing."""
    tally = _Tally()
    error = ""
    try:
        yield from _keys(tally)
        yield from _vouchers(tally, verify, "in")
        yield from _vouchers(tally, verify, "out")
        yield from _receipts(tally, verify)
        yield from _memos(tally)
        yield from _entries(tally)
        yield from _balances(tally)
        yield from _lanes(tally)
        yield from _transfers(tally)
        yield from _counters()
    except _WrongError as wrong:
        error = str(wrong)
    return AuditReport(
        ok=not error,
        entries=tally.entries,
        vouchers=tally.vouchers,
        receipts=tally.receipts,
        first_error=error,
    )


def _keys(tally: _Tally) -> Query[None]:
    mine = yield "SELECT public_key FROM identity ORDER BY n DESC", ()
    tally.mine = tuple(key for (key,) in mine)
    for name, peer in (yield "SELECT key_peer, peer FROM peer_key ORDER BY n", ()):
        first = tally.theirs.get(peer, (public_key(peer),))
        tally.theirs[peer] = (public_key(name), *first)


def _keys_of(tally: _Tally, peer: str) -> tuple[bytes, ...]:
    return tally.theirs.get(peer) or (public_key(peer),)


def _vouchers(tally: _Tally, verify: Verify, side: str) -> Query[None]:
    last = 0
    while page := (yield _VOUCHERS[side], (last, _PAGE)):
        last = page[-1][0]
        for row in page:
            _check_voucher(tally, verify, side, row[1:])


def _check_voucher(tally: _Tally, verify: Verify, side: str, row: tuple[Any, ...]) -> None:
    peer, lane, n, cum, encoded, signature, items = row
    name = f"voucher {n} {'from' if side == 'in' else 'to'} {peer} on lane {lane.hex()}"
    try:
        theirs = _keys_of(tally, peer)
        payers, payees = (theirs, tally.mine) if side == "in" else (tally.mine, theirs)
        voucher = Voucher(encoded, signature, _items.decode(items))
        body = verified_voucher(voucher, payers, payees, verify)
    except (PeerError, msgspec.DecodeError, ValueError) as error:
        raise _WrongError(f"{name}: {error}") from None
    if (body.lane, body.n, body.cum) != (lane, n, cum):
        raise _WrongError(f"{name}: its row and its signed body differ")
    tally.vouchers += 1
    tally.bodies[digest(encoded)] = name
    last_n, last_cum = tally.cums.get((side, peer, lane), (0, 0))
    if (n > last_n and cum < last_cum) or (n < last_n and cum > last_cum):
        raise _WrongError(f"{name}: cum falls as n rises")
    tally.cums[side, peer, lane] = (max(n, last_n), max(cum, last_cum))


def _receipts(tally: _Tally, verify: Verify) -> Query[None]:
    last = 0
    while page := (yield _RECEIPTS, (last, _PAGE)):
        last = page[-1][0]
        for number, peer, body, signature in page:
            try:
                theirs = _keys_of(tally, peer)
                verified_receipt(Receipt(body, signature), tally.mine, theirs, verify)
            except (PeerError, ValueError) as error:
                raise _WrongError(f"receipt {number} of {peer}: {error}") from None
            tally.receipts += 1


def _memos(tally: _Tally) -> Query[None]:
    for hash_, body in (yield "SELECT hash, body FROM memo", ()):
        if digest(body) != hash_:
            raise _WrongError(f"memo {hash_.hex()}: its text was changed")
        tally.memos.add(hash_)


def _entries(tally: _Tally) -> Query[None]:
    while page := (yield _ENTRIES, (tally.entries, _PAGE)):
        legs: dict[int, list[Leg]] = {}
        for seq, *leg in (yield _LEGS, (page[0][0], page[-1][0])):
            legs.setdefault(seq, []).append(Leg(*leg))
        for row in page:
            _check_entry(tally, row, legs.pop(row[0], []))
        if legs:
            raise _WrongError(f"entry {min(legs)}: has postings and is missing")


def _check_entry(tally: _Tally, row: tuple[Any, ...], legs: list[Leg]) -> None:
    seq, *head, prev, stored = row
    name = f"entry {seq}"
    if seq != tally.entries + 1 or prev != tally.prev:
        raise _WrongError(f"{name}: does not follow entry {tally.entries}")
    if sum(leg.amount for leg in legs) != 0 or len(legs) < 2:
        raise _WrongError(f"{name}: its postings do not sum to zero")
    if entry_hash(seq, tuple(head), legs, prev) != stored:
        raise _WrongError(f"{name}: its hash does not match its content")
    _check_cause(tally, name, head)
    tally.entries, tally.prev = seq, stored
    for leg in legs:
        tally.sums[leg.account] = tally.sums.get(leg.account, 0) + leg.amount
        if leg.account == "peer":
            tally.balances[head[2]] = tally.balances.get(head[2], 0) + leg.amount
        elif leg.account == "routed" and leg.attempt is not None:
            tally.routed[leg.attempt] = tally.routed.get(leg.attempt, 0) + leg.amount


def _check_cause(tally: _Tally, name: str, head: list[Any]) -> None:
    """A voucher, a memo, or a voucher that was dropped since a later one of its lane says more."""
    _, kind, peer, lane, n, cause = head
    if not lane:
        if cause not in tally.memos:
            raise _WrongError(f"{name}: the reason of this correction is missing")
    elif cause not in tally.bodies:
        side = "out" if kind.endswith("pay") else "in"
        if n >= tally.cums.get((side, peer, lane), (0, 0))[0]:
            raise _WrongError(f"{name}: the voucher behind it is missing")


def _balances(tally: _Tally) -> Query[None]:
    for account, amount in (yield "SELECT account, amount FROM account", ()):
        if tally.sums.pop(account, 0) != amount:
            raise _WrongError(f"account {account}: its postings do not add up to {amount}")
    for account, amount in tally.sums.items():
        if amount:
            raise _WrongError(f"account {account}: is missing")
    rows = yield "SELECT peer, amount FROM bal", ()
    stored: dict[str, int] = dict(rows)
    for peer in sorted(stored.keys() | tally.balances.keys()):
        if stored.get(peer, 0) != tally.balances.get(peer, 0):
            raise _WrongError(
                f"balance of {peer}: {stored.get(peer, 0)} is stored,"
                f" its entries give {tally.balances.get(peer, 0)}"
            )
    signed: dict[str, int] = {}
    for (side, peer, _), (_, cum) in tally.cums.items():
        signed[peer] = signed.get(peer, 0) + (cum if side == "in" else -cum)
    for peer, amount in signed.items():
        if tally.balances.get(peer, 0) != amount:
            raise _WrongError(f"balance of {peer}: its vouchers give {amount}")


def _lanes(tally: _Tally) -> Query[None]:
    for side in ("in", "out"):
        for peer, lane, n, cum in (yield _LANES[side], ()):
            if tally.cums.pop((side, peer, lane), None) != (n, cum):
                raise _WrongError(f"lane {lane.hex()} of {peer}: differs from its vouchers")
    for _, peer, lane in tally.cums:
        raise _WrongError(f"lane {lane.hex()} of {peer}: is missing")


_ATTR = """
  SELECT l.peer, l.lane FROM lane_in l WHERE l.attr <> (SELECT coalesce(sum(i.amount), 0)
    FROM item i WHERE i.mine = 0 AND i.peer = l.peer AND i.lane = l.lane) LIMIT 1
"""
_SERVICE = """
  SELECT l.peer, l.lane FROM lane_in l WHERE NOT CASE l.sealed
    WHEN 1 THEN l.service >= (SELECT coalesce(sum(i.amount), 0) FROM item i
      WHERE i.mine = 0 AND i.peer = l.peer AND i.lane = l.lane AND i.kind IN (0, 2))
    ELSE l.service = (SELECT coalesce(sum(i.amount), 0) FROM item i
      WHERE i.mine = 0 AND i.peer = l.peer AND i.lane = l.lane AND i.kind IN (0, 2)) END
  LIMIT 1
"""
_PAID = """
  SELECT p.peer FROM peer p WHERE p.paid <> (SELECT coalesce(sum(l.service), 0)
    FROM lane_in l WHERE l.peer = p.peer) LIMIT 1
"""
_PROOF = """
  SELECT i.peer, i.id FROM item i WHERE NOT EXISTS (SELECT 1 FROM voucher_in v
    WHERE i.mine = 0 AND v.peer = i.peer AND v.lane = i.lane AND v.n = i.last_n
    UNION ALL SELECT 1 FROM voucher_out v
    WHERE i.mine = 1 AND v.peer = i.peer AND v.lane = i.lane AND v.n = i.last_n) LIMIT 1
"""
_TRANSFERS: Final = (
    "SELECT xid, state, amount FROM route",
    "SELECT xid, state, amount FROM transfer",
)
_EXPECTED: Final = {"open": 1, "waiting": -1, "returning": -1}
"""What `routed` shows of a transfer's amount; nothing once it went on, came back or closed."""


def _transfers(tally: _Tally) -> Query[None]:
    """A transfer that ended left nothing in `routed`; one under way left just its amount."""
    expected: dict[bytes, int] = {}
    for select in _TRANSFERS:
        for xid, state, amount in (yield select, ()):
            share = _EXPECTED.get(state, 0) * amount
            expected[xid] = expected.get(xid, 0) + share
    for xid, amount in expected.items():
        if tally.routed.get(xid, 0) > amount:
            raise _WrongError(f"transfer {xid.hex()}: more left than came")


def _counters() -> Query[None]:
    for peer, item in (yield _PROOF, ()):
        raise _WrongError(f"item {item.hex()} of {peer}: the voucher that proves it is missing")
    for peer, lane in (yield _SERVICE, ()):
        raise _WrongError(f"lane {lane.hex()} of {peer}: its items do not add up to its pay")
    for peer, lane in (yield _ATTR, ()):
        raise _WrongError(f"lane {lane.hex()} of {peer}: its items do not add up")
    for (peer,) in (yield _PAID, ()):
        raise _WrongError(f"peer {peer}: what counts as paid is not what its lanes say")
