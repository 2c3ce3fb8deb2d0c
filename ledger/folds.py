"""Digests of old lanes: with years of boots, SYNC still says in one blob what is the same.

A lane of a former boot of its payer hardly ever changes, so the hash of what it says is kept in
its row, and dropped when it does.
"""

from __future__ import annotations

from typing import Final

import apsw
import msgspec

from aivillage.ledger.books import rows
from aivillage.protocols.types import PeerId
from aivillage.protocols.vouchers import LaneDigest, digest, lane_of

_NONE: Final = bytes(8)
_MISSING: Final = "SELECT lane, n, cum FROM {} WHERE peer = ? AND lane < ? AND fold IS NULL"
_KEEP: Final = "UPDATE {} SET fold = ? WHERE peer = ? AND lane = ?"
_ALL: Final = "SELECT fold FROM {} WHERE peer = ? AND lane < ? ORDER BY lane"
# By the vouchers of one lane; left to itself, SQLite reads all items for each of them.
_ITEMS: Final = """
  SELECT i.kind, i.id, i.amount, i.last_n, i.final FROM voucher_{} v
  CROSS JOIN item i INDEXED BY item_voucher ON i.mine = ? AND i.voucher = v.id
  WHERE v.peer = ? AND v.lane = ? ORDER BY i.kind, i.id
"""


def fold(db: apsw.Connection, peer: PeerId, epoch: int, *, mine: bool) -> LaneDigest:
    """Of the lanes before the payer's boot `epoch`. `mine`: I am the payer."""
    side, before = "out" if mine else "in", lane_of(epoch, _NONE)
    table, items = f"lane_{side}", _ITEMS.format(side)
    for lane, n, cum in rows(db, _MISSING.format(table), (peer, before)):
        content = (lane, n, cum, rows(db, items, (mine, peer, lane)))
        hash_ = digest(msgspec.msgpack.encode(content))
        db.execute(_KEEP.format(table), (hash_, peer, lane))
    folds = [hash_ for (hash_,) in rows(db, _ALL.format(table), (peer, before))]
    return LaneDigest(len(folds), digest(b"".join(folds)))
