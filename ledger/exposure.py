"""How far a seller may run ahead of a buyer's signature.

One inequality per pair on durable counters: D - P - F <= X, and with what is owed, <= L.
D (delivered) is reserved durably ahead of delivery, P is paid for service, F written off, X the
exposure and L the line. A crash counts all that was reserved as delivered. All strangers share
one pool W, for what they owe, signed or not.
"""

from __future__ import annotations

from typing import Final

import apsw

from aivillage.ledger.books import Pair, ensure_peer, one, read_pair, rows
from aivillage.protocols.types import AMOUNT_MAX, MicroCredits, PeerId

RHO: Final = 16
"""1/16 of what a peer ever paid may be written off."""
DAY_MS: Final = 86_400_000


def set_line(
    db: apsw.Connection, peer: PeerId, line: MicroCredits, exposure: MicroCredits, at_ms: int
) -> Pair:
    """The owner's word on a peer makes it a known one."""
    ensure_peer(db, peer)
    db.execute(
        "UPDATE peer SET known = 1, line = ?, exposure = ?,"
        " healed_ms = CASE known WHEN 0 THEN ? ELSE healed_ms END WHERE peer = ?",
        (line, exposure, at_ms, peer),
    )
    return read_pair(db, peer)


def set_received(
    db: apsw.Connection, peer: PeerId, line: MicroCredits, exposure: MicroCredits
) -> Pair:
    """What `peer` lets me owe, and how much unsigned: the latter says when vouchers are due."""
    ensure_peer(db, peer)
    db.execute(
        "UPDATE peer SET received_line = ?, received_exposure = ? WHERE peer = ?",
        (line, exposure, peer),
    )
    return read_pair(db, peer)


def line_of(pair: Pair, pool: MicroCredits) -> MicroCredits:
    return pair.line if pair.known else pool


def exposure_of(pair: Pair, pool: MicroCredits) -> MicroCredits:
    return pair.exposure if pair.known else pool


def ceiling(pair: Pair, pool: MicroCredits, strangers: MicroCredits) -> MicroCredits:
    """The most that `reserved` may be. `strangers`: what the other strangers take of `pool`."""
    line_left = line_of(pair, pool) - pair.balance
    most = pair.paid + pair.written_off + min(exposure_of(pair, pool), line_left)
    if not pair.known:
        most = min(most, pair.paid + pool - strangers - max(0, pair.balance))
    return min(most, AMOUNT_MAX)


def strangers_share(db: apsw.Connection, besides: PeerId) -> MicroCredits:
    """What all strangers but one owe or may owe."""
    ((share,),) = rows(
        db,
        "SELECT coalesce(sum(max(0, reserved - paid) + max(0, coalesce(amount, 0))), 0)"
        " FROM peer LEFT JOIN bal USING (peer) WHERE known = 0 AND peer <> ?",
        (besides,),
    )
    return int(share)


def reserve(
    db: apsw.Connection,
    peer: PeerId,
    delivered: MicroCredits,
    unit: MicroCredits,
    pool: MicroCredits,
) -> Pair:
    """Raises `reserved` so that one more `unit` fits, and a step ahead, if the rules allow."""
    pair = read_pair(db, peer)
    share = 0 if pair.known else strangers_share(db, peer)
    most = ceiling(pair, pool, share)
    step = max(unit, exposure_of(pair, pool) // 8)
    wanted = min(delivered + step, most)
    if wanted < delivered + unit or wanted <= pair.reserved:
        return pair
    ensure_peer(db, peer)
    db.execute("UPDATE peer SET reserved = ? WHERE peer = ?", (wanted, peer))
    return pair._replace(reserved=wanted)


def release(db: apsw.Connection, peer: PeerId, delivered: MicroCredits) -> Pair:
    """Gives back what was reserved and, as the seller of this boot knows, not delivered."""
    db.execute(
        "UPDATE peer SET reserved = ? WHERE peer = ? AND reserved > ?", (delivered, peer, delivered)
    )
    return read_pair(db, peer)


def heal(db: apsw.Connection, peer: PeerId, at_ms: int) -> Pair:
    """Writes off part of a gap that crashes left, for a peer with nothing running.

    In all at most P/16, and X/4 for each day that the pair was known; a clock that jumps gives
    one day at most.
    """
    row = one(db, "SELECT allowance_ms, healed_ms FROM peer WHERE peer = ?", (peer,))
    if row is None:
        return read_pair(db, peer)
    pair = read_pair(db, peer)
    allowance_ms = row[0] + min(max(0, at_ms - row[1]), DAY_MS) if pair.known else 0
    day = pair.exposure // 4 * allowance_ms // DAY_MS
    budget = pair.paid // RHO + day - pair.written_off
    more = max(0, min(pair.reserved - pair.paid - pair.written_off, budget))
    db.execute(
        "UPDATE peer SET written_off = written_off + ?, allowance_ms = ?, healed_ms = ?"
        " WHERE peer = ?",
        (more, allowance_ms, at_ms, peer),
    )
    return read_pair(db, peer)


def settle_gap(db: apsw.Connection, peer: PeerId, delivered: MicroCredits) -> None:
    """Late money takes the place of what was written off for it."""
    db.execute(
        "UPDATE peer SET written_off = max(0, min(written_off, ? - paid)) WHERE peer = ?",
        (delivered, peer),
    )
