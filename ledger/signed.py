"""What this node signed for one attempt of its own, and what the seller answered to it."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from aivillage.ledger.queries import Query
from aivillage.protocols.types import AttemptId, MicroCredits, PeerId
from aivillage.protocols.vouchers import ARREARS, Item

# Kinds 0 and 2, JOB and ARREARS, pay for work. `last_n` is the voucher with the last word.
_SIGNED: Final = """
  SELECT i.kind, i.amount, i.final, v.items, v.receipt IS NOT NULL OR v.cum <= l.confirmed,
    coalesce(v.attest, 0)
  FROM item i
  JOIN voucher_out v ON v.peer = i.peer AND v.lane = i.lane AND v.n = i.last_n
  JOIN lane_out l ON l.peer = i.peer AND l.lane = i.lane
  WHERE i.mine = 1 AND i.peer = ? AND i.id = ? AND i.kind IN (0, 2) ORDER BY i.kind
"""
# CROSS JOIN fixes the order: few entries of a peer are recoveries, each has a handful of postings.
_RECOVERED: Final = """
  SELECT coalesce(sum(p.amount), 0) FROM entry e CROSS JOIN posting p ON p.seq = e.seq
  WHERE e.peer = ? AND e.kind = 'recover-pay' AND p.account = 'spent' AND p.attempt = ?
"""
_Asked = tuple[PeerId, AttemptId]


class SignedItem(msgspec.Struct, frozen=True, kw_only=True):
    """One cumulative item, as its last voucher says it.

    `arrears`: it was claimed by the seller after a crash, beyond what this node had accepted.
    `attested`: the receipt says that the seller knew this attempt and this output.
    """

    amount: MicroCredits
    final: bool
    arrears: bool
    quote_hash: bytes
    receipt: bool
    attested: bool


class Signed(msgspec.Struct, frozen=True, kw_only=True):
    """All that the book says of one attempt. `intended`: the quote of a call not yet settled.

    `recovered`: what of it this node had forgotten, and the seller showed it at a SYNC.
    """

    items: tuple[SignedItem, ...] = ()
    intended: bytes = b""
    recovered: MicroCredits = 0


def signed_for(asked: list[_Asked]) -> Query[dict[AttemptId, Signed]]:
    """What was signed for each of these (seller, attempt), all from one snapshot."""
    found: dict[AttemptId, Signed] = {}
    for seller, attempt in asked:
        known = yield "SELECT peer FROM peer_key WHERE key_peer = ?", (seller,)
        peer = known[0][0] if known else seller
        intents = yield (
            "SELECT quote_hash FROM intent WHERE peer = ? AND attempt = ?",
            (peer, attempt),
        )
        rows = yield _SIGNED, (peer, attempt)
        ((recovered,),) = (yield _RECOVERED, (peer, attempt)) if rows else [(0,)]
        found[attempt] = Signed(
            items=tuple(_item(attempt, row) for row in rows),
            intended=intents[0][0] if intents else b"",
            recovered=recovered,
        )
    return found


def _item(attempt: AttemptId, row: tuple[Any, ...]) -> SignedItem:
    kind, amount, final, items, receipt, attested = row
    named = msgspec.msgpack.decode(items, type=tuple[Item, ...])
    return SignedItem(
        amount=amount,
        final=bool(final),
        arrears=kind == ARREARS,
        quote_hash=next(i.quote_hash for i in named if (i.kind, i.id) == (kind, attempt)),
        receipt=bool(receipt),
        attested=bool(attested),
    )
