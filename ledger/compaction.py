"""Makes room: what a later voucher says too goes, what a proof or a claim needs stays.

The schema refuses to drop the last word on any item or lane, whoever asks. Entries are never
dropped: they are the history, and their hashes chain on without the vouchers' bytes. A portion
looks at a bounded number of rows, so that the writer is free for money in between.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import apsw
import msgspec

from aivillage.ledger.books import one, rows
from aivillage.ledger.exposure import DAY_MS

LOOKED_AT_ONCE: Final = 2000
"""Vouchers in one portion: some 30 ms of the writer's time where all of them go."""
INTENT_DAYS: Final = 30
"""A claim that comes later than this is too late."""


class Cursor(NamedTuple):
    """Where a portion begins: after a row of those taken (`in`), then of those given (`out`)."""

    side: str = "in"
    id: int = 0


class Compacted(msgspec.Struct, frozen=True, kw_only=True):
    """How many vouchers were looked at, and how many rows went.

    `after`: where the next portion begins; None: this was the last one of the round.
    """

    looked: int
    vouchers: int
    receipts: int
    intents: int
    after: Cursor | None


_LOOKED: Final = """
  SELECT count(*), max(id) FROM
    (SELECT id FROM voucher_{side} WHERE id > ? ORDER BY id LIMIT ?)
"""
_SUPERSEDED: Final = """
  DELETE FROM voucher_{side} AS v WHERE v.id > ?2 AND v.id <= ?3
    AND v.n < (SELECT l.n FROM lane_{side} l WHERE l.peer = v.peer AND l.lane = v.lane {unproven})
    AND NOT EXISTS (SELECT 1 FROM item i WHERE i.mine = ?1 AND i.voucher = v.id)
  RETURNING {receipt}
"""
# The last that was confirmed stays: what the lane says of receipts can be checked for ever.
_UNPROVEN: Final = "AND NOT (v.receipt IS NOT NULL AND v.cum = l.confirmed)"
_UNUSED_RECEIPT: Final = """
  DELETE FROM receipt
  WHERE id = ?1 AND NOT EXISTS (SELECT 1 FROM voucher_out WHERE receipt = ?1)
"""
_SIDES: Final = {"in": (0, "NULL", ""), "out": (1, "receipt", _UNPROVEN)}


def compact(db: apsw.Connection, cursor: Cursor, at_ms: int) -> Compacted:
    """One portion; a superseded voucher that comes again is recognised by what it does not say."""
    side, begin = cursor
    mine, receipt, unproven = _SIDES[side]
    looked, end = one(db, _LOOKED.format(side=side), (begin, LOOKED_AT_ONCE)) or (0, None)
    sql = _SUPERSEDED.format(side=side, receipt=receipt, unproven=unproven)
    dropped = rows(db, sql, (mine, begin, end or begin))
    receipts = _drop_receipts(db, {number for (number,) in dropped if number is not None})
    after = Cursor(side, end) if looked == LOOKED_AT_ONCE else None
    intents = 0
    if after is None and side == "in":
        after = Cursor("out")
    elif after is None:
        db.execute("DELETE FROM intent WHERE at_ms < ?", (at_ms - INTENT_DAYS * DAY_MS,))
        intents = db.changes()
    return Compacted(
        looked=looked, vouchers=len(dropped), receipts=receipts, intents=intents, after=after
    )


def _drop_receipts(db: apsw.Connection, numbers: set[int]) -> int:
    """Of the receipts whose vouchers went, those that confirm no other one."""
    dropped = 0
    for number in numbers:
        db.execute(_UNUSED_RECEIPT, (number,))
        dropped += db.changes()
    return dropped
