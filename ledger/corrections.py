"""What the owner no longer counts on: booked against a cost, never by changing what was written.

A debt stays what the peer signed, so both books still agree; `doubtful` stands beside it until
the peer pays after all.
"""

from __future__ import annotations

from typing import Final

import apsw

from aivillage.ledger.books import Leg, correct, one, rows
from aivillage.ledger.exposure import DAY_MS
from aivillage.protocols.errors import RequestError
from aivillage.protocols.types import MicroCredits, PeerId, as_credits

_DOUBTFUL: Final = """
  SELECT -coalesce(sum(p.amount), 0) FROM entry e JOIN posting p USING (seq)
  WHERE e.peer = ? AND e.lane = x'' AND p.account = 'doubtful'
"""
_ALL_DOUBTFUL: Final = """
  SELECT e.peer, -sum(p.amount) FROM entry e JOIN posting p USING (seq)
  WHERE e.lane = x'' AND p.account = 'doubtful' GROUP BY e.peer HAVING sum(p.amount) <> 0
"""


def doubtful(db: apsw.Connection, peer: PeerId) -> MicroCredits:
    """The part of what `peer` owes me that was written off."""
    ((amount,),) = rows(db, _DOUBTFUL, (peer,))
    return int(amount)


def write_off(
    db: apsw.Connection, peer: PeerId, amount: MicroCredits | None, reason: str, at_ms: int
) -> MicroCredits:
    """Books `amount` (None: all that is left) of what `peer` owes as lost; returns it.

    Raises:
        RequestError: BAD_REQUEST, it does not owe so much, or it was written off before.
    """
    row = one(db, "SELECT amount FROM bal WHERE peer = ?", (peer,))
    left = max(0, row[0] if row else 0) - doubtful(db, peer)
    wanted = left if amount is None else amount
    if not 0 < wanted <= left:
        raise RequestError(
            f"{peer[-8:]} owes {as_credits(max(0, left))} that are not written off",
            next_step="`aivillage-node balance` shows what everybody owes",
        )
    _doubt(db, peer, wanted, "write-off", reason, at_ms)
    return wanted


def _doubt(
    db: apsw.Connection, peer: PeerId, amount: MicroCredits, kind: str, reason: str, at_ms: int
) -> None:
    legs = [Leg("doubtful", None, -amount), Leg("writeoff", None, amount)]
    correct(db, peer, kind, reason, legs, at_ms)


def write_back(db: apsw.Connection, at_ms: int) -> None:
    """Who paid after all is doubted no more than for what it still owes."""
    for peer, amount in rows(db, _ALL_DOUBTFUL):
        row = one(db, "SELECT amount FROM bal WHERE peer = ?", (peer,))
        more = amount - max(0, row[0] if row else 0)
        if more > 0:
            _doubt(db, peer, -more, "write-back", "it was paid after all", at_ms)


def expire(db: apsw.Connection, days: int, at_ms: int) -> None:
    """Writes off what has been owed for `days` without any movement."""
    stale = rows(
        db,
        "SELECT peer FROM bal JOIN peer USING (peer) WHERE amount > 0 AND moved_ms < ?",
        (at_ms - days * DAY_MS,),
    )
    for (peer,) in stale:
        row = one(db, "SELECT amount FROM bal WHERE peer = ?", (peer,))
        left = (row[0] if row else 0) - doubtful(db, peer)
        if left > 0:
            _doubt(db, peer, left, "write-off", f"no movement for {days} days", at_ms)
