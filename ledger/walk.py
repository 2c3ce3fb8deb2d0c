"""The pass of the audit over the entries: each is worked out anew from what it rests on.

Nothing here relies on a trigger. The chain alone proves little, for whoever writes the file can
hash it anew: so the money of each entry is held against the voucher that it names, and a
correction against the entries before it.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import msgspec

from aivillage.ledger.books import entry_hash
from aivillage.ledger.queries import Query
from aivillage.ledger.tally import Tally, WrongError
from aivillage.protocols.vouchers import ID_BYTES, VoucherBody, digest

PAGE: Final = 2000
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
_SIDES: Final = {"pay": "out", "recover-pay": "out", "receive": "in", "recover-receive": "in"}
_SIGNS: Final = {"out": 1, "in": -1}
"""Of every leg that is not the peer's own: what I bought costs, what I sold earns."""
_FOR: Final = {
    "out": frozenset({"spent", "routed", "gift"}),
    "in": frozenset({"earned", "routed", "gift"}),
}
_body: Final = msgspec.msgpack.Decoder(VoucherBody)
_memo: Final = msgspec.msgpack.Decoder(tuple[int, str, str, str])

Leg = tuple[str, bytes | None, int]


class _Entry(NamedTuple):
    seq: int
    at_ms: int
    kind: str
    peer: str
    lane: bytes
    n: int
    body_hash: bytes
    prev: bytes
    hash: bytes
    cause: bytes | None
    """Its memo, or the voucher of its place; compaction may have dropped the latter."""


def entries(tally: Tally) -> Query[None]:
    """Postings are walked beside their entries: both come in the order of seq.

    Raises:
        WrongError: the first entry that is wrong.
    """
    while page := (yield _ENTRIES, (tally.entries, PAGE)):
        postings = yield _LEGS, (page[0][0], page[-1][0])
        postings.append((0,))  # of no entry: ends the last one's
        at = 0
        for row in page:
            entry = _Entry(*row)
            legs: list[Leg] = []
            while postings[at][0] == entry.seq:
                legs.append(postings[at][1:])
                at += 1
            try:
                _check(tally, entry, legs)
            except ValueError as error:
                raise WrongError(f"entry {entry.seq}: {error}") from None
            tally.entries, tally.prev = entry.seq, entry.hash


def _check(tally: Tally, entry: _Entry, legs: list[Leg]) -> None:
    """Raises: ValueError: what is wrong with it."""
    if entry.seq != tally.entries + 1 or entry.prev != tally.prev:
        raise ValueError(f"does not follow entry {tally.entries}")
    total, sums = 0, tally.sums
    for account, _, amount in legs:
        total += amount
        sums[account] = sums.get(account, 0) + amount
    if total != 0 or len(legs) < 2:
        raise ValueError("its postings do not sum to zero")
    if entry_hash(entry.seq, entry[1:7], legs, entry.prev) != entry.hash:
        raise ValueError("its hash does not match its content")
    side = _SIDES.get(entry.kind)
    if side is None:
        _check_correction(tally, entry, legs)
    else:
        _check_payment(tally, entry, side, legs)


# ------------------------------------------------------------------ by a voucher


def _check_payment(tally: Tally, entry: _Entry, side: str, legs: list[Leg]) -> None:
    """Its money is what its voucher adds to those before it on the lane, and no leg is turned."""
    money, sign = 0, _SIGNS[side]
    for account, id_, amount in legs:
        if account == "peer":
            money -= sign * amount
        elif account in _FOR[side]:
            if sign * amount < 0:
                raise ValueError(f"turns {account} round")
            if account == "routed" and id_ is not None:
                _note_routed(tally, side, id_, amount)
        elif account != "unlabelled":
            raise ValueError(f"moves {account}, which no voucher does")
    if money < 0:
        raise ValueError("takes back what was signed")
    tally.balances[entry.peer] = tally.balances.get(entry.peer, 0) - sign * money
    place = (side, entry.peer, entry.lane)
    top, booked = tally.booked.get(place, (0, 0))
    if money and entry.n <= top:
        raise ValueError("moves money for a voucher that a later one had overtaken")
    booked += money
    tally.booked[place] = (max(top, entry.n), booked)
    _check_cause(tally.cums.get(place, (0, 0)), entry, booked, is_last=entry.n >= top)


def _note_routed(tally: Tally, side: str, xid: bytes, amount: int) -> None:
    tally.routed[xid] = tally.routed.get(xid, 0) + amount
    if side == "out":
        tally.sent[xid] = tally.sent.get(xid, 0) + amount


def _check_cause(signed: tuple[int, int], entry: _Entry, booked: int, *, is_last: bool) -> None:
    """`signed`: the highest n and cum of the lane. `booked`: the money of its entries up to here.

    A voucher may be missing whose words a later one repeats: compaction dropped it. A liar may
    then have put another in its place, with news and no money; no money was booked for that, and
    the lane's last voucher still says the sum.
    """
    if entry.cause is None or digest(entry.cause) != entry.body_hash:
        if entry.n >= signed[0]:
            raise ValueError("the voucher behind it is missing")
        if booked > signed[1]:
            raise ValueError(f"books more than was signed: {booked}, of {signed[1]}")
    elif is_last and booked != (cum := _body.decode(entry.cause).cum):
        raise ValueError(f"its voucher says {cum} in all, the entries of its lane {booked}")


# ------------------------------------------------------------------ by my own word


def _check_correction(tally: Tally, entry: _Entry, legs: list[Leg]) -> None:
    """It moves a doubt, or a transfer of mine, against its cost; never what a peer owes."""
    if entry.lane or entry.n or entry.cause is None:
        raise ValueError("the reason of this correction is missing")
    try:
        memo = _memo.decode(entry.cause)
    except msgspec.DecodeError:
        raise ValueError("its reason cannot be read") from None
    if digest(entry.cause) != entry.body_hash or memo[:3] != (entry.seq, entry.kind, entry.peer):
        raise ValueError("its reason is that of another correction")
    moved = {account: (id_, amount) for account, id_, amount in legs}
    cost = moved.pop("writeoff", None)
    if cost is None or len(legs) != 2 or not moved.keys() & {"doubtful", "routed"}:
        raise ValueError(f"a correction may not move {' and '.join(sorted(moved))}")
    (account, (id_, _)), (of, amount) = next(iter(moved.items())), cost
    if (amount < 0) != (entry.kind == "write-back") or of != id_:
        raise ValueError(f"is no {entry.kind}")
    if account == "doubtful":
        _check_doubt(tally, entry, id_, amount)
    else:
        _check_given_up(tally, entry, id_, amount)


def _check_doubt(tally: Tally, entry: _Entry, id_: bytes | None, amount: int) -> None:
    if id_ is not None or entry.kind == "release":
        raise ValueError(f"is no {entry.kind}")
    doubtful = tally.doubtful[entry.peer] = tally.doubtful.get(entry.peer, 0) + amount
    if doubtful < 0:
        raise ValueError("writes back more than was written off")
    if amount > 0 and doubtful > tally.balances.get(entry.peer, 0):
        raise ValueError("writes off more than is owed")


def _check_given_up(tally: Tally, entry: _Entry, xid: bytes | None, amount: int) -> None:
    if xid is None or len(xid) != ID_BYTES or entry.kind == "write-off":
        raise ValueError(f"is no {entry.kind}")
    given_up = tally.given_up.get(xid, (0, 0))[0] + amount
    if given_up < 0:
        raise ValueError("takes back more than was given up")
    if given_up > tally.sent.get(xid, 0):
        raise ValueError("gives up more than was sent")
    tally.given_up[xid] = (given_up, entry.seq)
    tally.routed[xid] = tally.routed.get(xid, 0) - amount
