"""The audit: recomputes everything that can be recomputed, and names the first thing wrong.

Hash chain, postings, every signature (of keys, vouchers, receipts and proofs), what each entry
rests on, balances, monotone lanes, items, what counts as paid and as confirmed. docs/security.md
says which columns are a node's own memory only. Reads in pages, so that memory does not grow with
the book. `signatures.py` has the passes over what was signed, `walk.py` that over the entries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec

from aivillage.ledger import signatures, walk
from aivillage.ledger.queries import Query
from aivillage.ledger.tally import Tally, WrongError
from aivillage.protocols.envelope import Verify
from aivillage.protocols.vouchers import Item, digest

_PAGE: Final = 2000
_items: Final = msgspec.msgpack.Decoder(tuple[Item, ...])
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


def audit(verify: Verify, passed: Callable[[str], None] = lambda name: None) -> Query[AuditReport]:
    """Checks the whole book. `verify` must be the real thing; `passed` hears of each pass's end."""
    tally = Tally()
    passes: dict[str, Query[None]] = {
        "keys": signatures.keys(tally, verify),
        "vouchers in": signatures.vouchers(tally, verify, "in"),
        "vouchers out": signatures.vouchers(tally, verify, "out"),
        "receipts": signatures.receipts(tally, verify),
        "proofs": signatures.proofs(tally, verify),
        "memos": _memos(),
        "entries": walk.entries(tally),
        "balances": _balances(tally),
        "lanes": _lanes(tally),
        "transfers": _transfers(tally),
        "items": _signed_items(),
        "counters": _counters(),
        "confirmed": _confirmed(tally),
    }
    error = ""
    try:
        for name, check in passes.items():
            yield from check
            passed(name)
    except WrongError as wrong:
        error = str(wrong)
    return AuditReport(
        ok=not error,
        entries=tally.entries,
        vouchers=tally.vouchers,
        receipts=tally.receipts,
        first_error=error,
    )


def _memos() -> Query[None]:
    for hash_, body in (yield "SELECT hash, body FROM memo", ()):
        if digest(body) != hash_:
            raise WrongError(f"memo {hash_.hex()}: its text was changed")


def _balances(tally: Tally) -> Query[None]:
    for account, amount in (yield "SELECT account, amount FROM account", ()):
        if tally.sums.pop(account, 0) != amount:
            raise WrongError(f"account {account}: its postings do not add up to {amount}")
    for account, amount in tally.sums.items():
        if amount:
            raise WrongError(f"account {account}: is missing")
    rows = yield "SELECT peer, amount FROM bal", ()
    stored: dict[str, int] = dict(rows)
    for peer in sorted(stored.keys() | tally.balances.keys()):
        if stored.get(peer, 0) != tally.balances.get(peer, 0):
            raise WrongError(
                f"balance of {peer}: {stored.get(peer, 0)} is stored,"
                f" its entries give {tally.balances.get(peer, 0)}"
            )
    # Of every peer, with vouchers or without: a balance is what was signed, and nothing else.
    for place in sorted(tally.cums.keys() | tally.booked.keys()):
        signed, booked = tally.cums.get(place, (0, 0))[1], tally.booked.get(place, (0, 0))[1]
        if signed != booked:
            side, peer, lane = place
            raise WrongError(
                f"balance of {peer}: its vouchers give {signed} on lane {lane.hex()}"
                f" ({side}), the entries {booked}"
            )


def _lanes(tally: Tally) -> Query[None]:
    for side in ("in", "out"):
        for peer, lane, n, cum in (yield _LANES[side], ()):
            if tally.cums.pop((side, peer, lane), None) != (n, cum):
                raise WrongError(f"lane {lane.hex()} of {peer}: differs from its vouchers")
    for _, peer, lane in tally.cums:
        raise WrongError(f"lane {lane.hex()} of {peer}: is missing")


# Items are read once and summed by lane: no index finds those of one.
_ATTR = """
  WITH said(peer, lane, amount) AS (
    SELECT peer, lane, sum(amount) FROM item WHERE mine = 0 GROUP BY peer, lane)
  SELECT l.peer, l.lane FROM lane_in l LEFT JOIN said s ON s.peer = l.peer AND s.lane = l.lane
  WHERE l.attr <> coalesce(s.amount, 0) LIMIT 1
"""
_SERVICE = """
  WITH said(peer, lane, amount) AS (
    SELECT peer, lane, sum(amount) FROM item WHERE mine = 0 AND kind IN (0, 2) GROUP BY peer, lane)
  SELECT l.peer, l.lane FROM lane_in l LEFT JOIN said s ON s.peer = l.peer AND s.lane = l.lane
  WHERE NOT CASE l.sealed WHEN 1 THEN l.service >= coalesce(s.amount, 0)
    ELSE l.service = coalesce(s.amount, 0) END LIMIT 1
"""
_ARREARS = """
  SELECT p.peer FROM peer p WHERE p.arrears > 0 AND p.arrears > (SELECT coalesce(sum(i.amount), 0)
    FROM item i WHERE i.mine = 1 AND i.peer = p.peer AND i.kind = 2) LIMIT 1
"""
_FORGIVEN = "SELECT peer FROM peer WHERE written_off > reserved LIMIT 1"
_UNRECEIPTED = """
  SELECT v.peer, v.lane, v.n FROM voucher_out v WHERE (v.receipt IS NULL) <> (v.attest IS NULL)
    OR v.receipt IS NOT NULL AND NOT EXISTS (SELECT 1 FROM receipt r WHERE r.id = v.receipt)
  LIMIT 1
"""
_FAVOURS: Final = (
    "SELECT mine, peer, sum(worth) FROM favour GROUP BY mine, peer",
    "SELECT mine, peer, worth FROM favour_sum",
)
_PAID = """
  SELECT p.peer FROM peer p WHERE p.paid <> (SELECT coalesce(sum(l.service), 0)
    FROM lane_in l WHERE l.peer = p.peer) LIMIT 1
"""
_TRANSFERS: Final = (
    "SELECT xid, state, amount FROM route",
    "SELECT xid, state, amount FROM transfer",
)
_SIGNED_ITEMS: Final = """
  SELECT i.mine, i.peer, i.kind, i.id, i.amount, i.final, CASE i.mine
    WHEN 1 THEN (SELECT items FROM voucher_out v
      WHERE v.id = i.voucher AND (v.peer, v.lane, v.n) = (i.peer, i.lane, i.last_n))
    ELSE (SELECT items FROM voucher_in v
      WHERE v.id = i.voucher AND (v.peer, v.lane, v.n) = (i.peer, i.lane, i.last_n)) END
  FROM item i WHERE (i.mine, i.peer, i.kind, i.id) > (?, ?, ?, ?)
  ORDER BY i.mine, i.peer, i.kind, i.id LIMIT ?
"""
_EXPECTED: Final = {"open": 1, "waiting": -1, "returning": -1}
"""What `routed` shows of a transfer's amount; nothing once it went on, came back or closed."""


def _transfers(tally: Tally) -> Query[None]:
    """A transfer that ended left nothing in `routed`; one under way left just its amount."""
    expected: dict[bytes, int] = {}
    for select in _TRANSFERS:
        mine = select is _TRANSFERS[0]
        for xid, state, amount in (yield select, ()):
            if mine:
                _check_cost(xid, tally.given_up.pop(xid, (0, 0)), amount * (state == "released"))
            share = _EXPECTED.get(state, 0) * amount
            expected[xid] = expected.get(xid, 0) + share
    for xid, amount in expected.items():
        if tally.routed.get(xid, 0) > amount:
            raise WrongError(f"transfer {xid.hex()}: more left than came")
    for xid, given_up in tally.given_up.items():
        _check_cost(xid, given_up, 0)


def _check_cost(xid: bytes, given_up: tuple[int, int], amount: int) -> None:
    cost, seq = given_up
    if cost != amount:
        where = f"entry {seq}: " if seq else ""
        raise WrongError(
            f"{where}transfer {xid.hex()}: {cost} are booked as given up, and {amount} are"
        )


def _signed_items() -> Query[None]:
    """Each item is as its last voucher says it; a payer who says less later gains nothing by it."""
    after: tuple[Any, ...] = (-1, "", 0, b"")
    while page := (yield _SIGNED_ITEMS, (*after, _PAGE)):
        after = page[-1][:4]
        for mine, peer, kind, id_, amount, final, items in page:
            named = _items.decode(items) if items else ()
            said = [item for item in named if (item.kind, item.id) == (kind, id_)]
            if not said:
                raise WrongError(
                    f"item {id_.hex()} of {peer}: the voucher that proves it is missing"
                )
            if (said[0].amount, int(said[0].final)) != (amount, final) and (
                mine or said[0].amount > amount or said[0].final > final
            ):
                raise WrongError(f"item {id_.hex()} of {peer}: its voucher says something else")


def _counters() -> Query[None]:
    for peer, lane in (yield _SERVICE, ()):
        raise WrongError(f"lane {lane.hex()} of {peer}: its items do not add up to its pay")
    for peer, lane in (yield _ATTR, ()):
        raise WrongError(f"lane {lane.hex()} of {peer}: its items do not add up")
    for (peer,) in (yield _PAID, ()):
        raise WrongError(f"peer {peer}: what counts as paid is not what its lanes say")
    for (peer,) in (yield _ARREARS, ()):
        raise WrongError(f"peer {peer}: more counts as arrears than was signed")
    for (peer,) in (yield _FORGIVEN, ()):
        raise WrongError(f"peer {peer}: more is forgiven than was ever delivered")
    found, kept = set((yield _FAVOURS[0], ())), set((yield _FAVOURS[1], ()))
    for _, peer, _ in sorted(found ^ kept):
        raise WrongError(f"peer {peer}: its favours do not add up")


def _confirmed(tally: Tally) -> Query[None]:
    """What is in transit is what no receipt in the book covers."""
    for peer, lane, n in (yield _UNRECEIPTED, ()):
        raise WrongError(f"voucher {n} to {peer} on lane {lane.hex()}: its receipt is missing")
    for peer, lane, confirmed in (yield "SELECT peer, lane, confirmed FROM lane_out", ()):
        found = tally.confirmed.get((peer, lane), 0)
        if found != confirmed:
            raise WrongError(
                f"lane {lane.hex()} of {peer}: {confirmed} count as confirmed, receipts say {found}"
            )
