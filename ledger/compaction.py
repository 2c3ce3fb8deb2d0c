"""Makes room: what a later voucher says too goes, what a proof or a claim needs stays.

The schema refuses to drop the last word on any item or lane, whoever asks. Entries are never
dropped: they are the history, and their hashes chain on without the vouchers' bytes.
"""

from __future__ import annotations

from typing import Final

import apsw
import msgspec

from aivillage.ledger.exposure import DAY_MS

VOUCHERS_AT_ONCE: Final = 2000
"""In one transaction: some 20 ms of the writer's time."""
INTENT_DAYS: Final = 30
"""A claim that comes later than this is too late."""


class Compacted(msgspec.Struct, frozen=True, kw_only=True):
    """How many rows went. `more`: there is more to drop, ask again."""

    vouchers: int
    receipts: int
    intents: int
    more: bool


_SUPERSEDED: Final = """
  DELETE FROM voucher_{side} WHERE rowid IN (
    SELECT v.rowid FROM voucher_{side} v
    JOIN lane_{side} l ON l.peer = v.peer AND l.lane = v.lane
    WHERE v.n < l.n AND NOT EXISTS (SELECT 1 FROM item i
      WHERE i.mine = ?1 AND i.peer = v.peer AND i.lane = v.lane AND i.last_n = v.n)
    LIMIT ?2)
"""
_UNUSED_RECEIPTS: Final = """
  DELETE FROM receipt
  WHERE id NOT IN (SELECT receipt FROM voucher_out WHERE receipt IS NOT NULL)
"""


def compact(db: apsw.Connection, at_ms: int) -> Compacted:
    """One portion; a superseded voucher that comes again is recognised by what it does not say."""
    dropped = 0
    for side, mine in (("in", 0), ("out", 1)):
        db.execute(_SUPERSEDED.format(side=side), (mine, VOUCHERS_AT_ONCE - dropped))
        dropped += db.changes()
    db.execute(_UNUSED_RECEIPTS)
    receipts = db.changes()
    db.execute("DELETE FROM intent WHERE at_ms < ?", (at_ms - INTENT_DAYS * DAY_MS,))
    return Compacted(
        vouchers=dropped,
        receipts=receipts,
        intents=db.changes(),
        more=dropped >= VOUCHERS_AT_ONCE,
    )
