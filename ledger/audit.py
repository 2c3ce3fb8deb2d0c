"""The audit: recomputes everything that can be recomputed, and names the first thing wrong.

Hash chain, postings, balances, every signature, roots, monotone lanes, items, what counts as
paid. Reads in pages, so that memory does not grow with the book: what explains an entry is
looked up beside it. Signatures are a pass of their own, and nine tenths of the time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec

from aivillage.ledger.books import entry_hash
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
  SELECT e.seq, e.at_ms, e.kind, e.peer, e.lane, e.n, e.body_hash, e.prev, e.hash,
    CASE WHEN e.lane = x'' THEN (SELECT body FROM memo WHERE hash = e.body_hash)
      WHEN e.kind IN ('pay', 'recover-pay') THEN (SELECT body FROM voucher_out v
        WHERE v.peer = e.peer AND v.lane = e.lane AND v.n = e.n)
      ELSE (SELECT body FROM voucher_in v
        WHERE v.peer = e.peer AND v.lane = e.lane AND v.n = e.n) END
  FROM entry e WHERE e.seq > ? ORDER BY e.seq LIMIT ?
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
        self.routed: dict[bytes, int] = {}
        self.sums: dict[str, int] = {}
        self.balances: dict[str, int] = {}
        self.cums: dict[tuple[str, str, bytes], tuple[int, int]] = {}


def audit(verify: Verify, passed: Callable[[str], None] = lambda name: None) -> Query[AuditReport]:
    """Checks the whole book. `verify` must be the real thing; `passed` hears of each pass's end."""
    tally = _Tally()
    passes: dict[str, Query[None]] = {
        "keys": _keys(tally),
        "vouchers in": _vouchers(tally, verify, "in"),
        "vouchers out": _vouchers(tally, verify, "out"),
        "receipts": _receipts(tally, verify),
        "memos": _memos(),
        "entries": _entries(tally),
        "balances": _balances(tally),
        "lanes": _lanes(tally),
        "transfers": _transfers(tally),
        "counters": _counters(),
    }
    error = ""
    try:
        for name, check in passes.items():
            yield from check
            passed(name)
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
    """Raises: ValueError: `peer` is no peer's id."""
    keys = tally.theirs.get(peer)
    if keys is None:
        keys = tally.theirs[peer] = (public_key(peer),)
    return keys


def _vouchers(tally: _Tally, verify: Verify, side: str) -> Query[None]:
    last = 0
    while page := (yield _VOUCHERS[side], (last, _PAGE)):
        last = page[-1][0]
        for row in page:
            try:
                _check_voucher(tally, verify, side, row)
            except (PeerError, msgspec.DecodeError, ValueError) as error:
                raise _WrongError(f"{_voucher_name(side, row)}: {error}") from None


def _voucher_name(side: str, row: tuple[Any, ...]) -> str:
    _, peer, lane, n, *_ = row
    return f"voucher {n} {'from' if side == 'in' else 'to'} {peer} on lane {lane.hex()}"


def _check_voucher(tally: _Tally, verify: Verify, side: str, row: tuple[Any, ...]) -> None:
    """Raises: PeerError, DecodeError, ValueError: what is wrong with it."""
    _, peer, lane, n, cum, encoded, signature, items = row
    theirs = _keys_of(tally, peer)
    payers, payees = (theirs, tally.mine) if side == "in" else (tally.mine, theirs)
    voucher = Voucher(encoded, signature, _items.decode(items))
    body = verified_voucher(voucher, payers, payees, verify)
    if (body.lane, body.n, body.cum) != (lane, n, cum):
        raise ValueError("its row and its signed body differ")
    tally.vouchers += 1
    place = (side, peer, lane)
    last_n, last_cum = tally.cums.get(place, (0, 0))
    if (n > last_n and cum < last_cum) or (n < last_n and cum > last_cum):
        raise ValueError("cum falls as n rises")
    tally.cums[place] = (max(n, last_n), max(cum, last_cum))


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


def _memos() -> Query[None]:
    for hash_, body in (yield "SELECT hash, body FROM memo", ()):
        if digest(body) != hash_:
            raise _WrongError(f"memo {hash_.hex()}: its text was changed")


def _entries(tally: _Tally) -> Query[None]:
    """Postings are walked beside their entries: both come in the order of seq."""
    while page := (yield _ENTRIES, (tally.entries, _PAGE)):
        postings = yield _LEGS, (page[0][0], page[-1][0])
        postings.append((0,))  # of no entry: ends the last one's
        at = 0
        for seq, *head, prev, stored, cause in page:
            legs = []
            while postings[at][0] == seq:
                legs.append(postings[at][1:])
                at += 1
            if seq != tally.entries + 1 or prev != tally.prev:
                raise _WrongError(f"entry {seq}: does not follow entry {tally.entries}")
            try:
                _check_entry(tally, (seq, head, prev, stored), legs, cause)
            except ValueError as error:
                raise _WrongError(f"entry {seq}: {error}") from None
            tally.entries, tally.prev = seq, stored


def _check_entry(
    tally: _Tally, row: tuple[int, list[Any], bytes, bytes], legs: list[Any], cause: bytes | None
) -> None:
    """`row`: seq, head, previous hash, hash. Raises: ValueError: what is wrong with it."""
    seq, head, prev, stored = row
    peer, total, sums = head[2], 0, tally.sums
    for account, id_, amount in legs:
        total += amount
        sums[account] = sums.get(account, 0) + amount
        if account == "peer":
            tally.balances[peer] = tally.balances.get(peer, 0) + amount
        elif account == "routed" and id_ is not None:
            tally.routed[id_] = tally.routed.get(id_, 0) + amount
    if total != 0 or len(legs) < 2:
        raise ValueError("its postings do not sum to zero")
    if entry_hash(seq, head, legs, prev) != stored:
        raise ValueError("its hash does not match its content")
    if cause is None or digest(cause) != head[5]:
        _check_dropped(tally, head)


def _check_dropped(tally: _Tally, head: list[Any]) -> None:
    """No memo or voucher of it is there: one that a later of its lane says too may be dropped.

    A liar may then have put another in its place, with news and no money; no money was booked for
    that, and the lane's last voucher still says the sum.
    """
    _, kind, peer, lane, n, _ = head
    if not lane:
        raise ValueError("the reason of this correction is missing")
    side = "out" if kind.endswith("pay") else "in"
    if n >= tally.cums.get((side, peer, lane), (0, 0))[0]:
        raise ValueError("the voucher behind it is missing")


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
