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
_ITEMS: Final = """
  SELECT kind, id, amount, last_n, final FROM item
  WHERE mine = ? AND peer = ? AND lane = ? ORDER BY kind, id
"""


def fold(db: apsw.Connection, peer: PeerId, epoch: int, *, mine: bool) -> LaneDigest:
    """Of the lanes before the payer's boot `epoch`. `mine`: I am the payer."""
    table, before = "lane_out" if mine else "lane_in", lane_of(epoch, _NONE)
    for lane, n, cum in rows(db, _MISSING.format(table), (peer, before)):
        content = (lane, n, cum, rows(db, _ITEMS, (mine, peer, lane)))
        hash_ = digest(msgspec.msgpack.encode(content))
        db.execute(_KEEP.format(table), (hash_, peer, lane))
    folds = [hash_ for (hash_,) in rows(db, _ALL.format(table), (peer, before))]
    return LaneDigest(len(folds), digest(b"".join(folds)))
