"""How far a seller may run ahead of a buyer's signature.

One inequality per pair on durable counters: D - P - F <= X, and with what is owed, <= L.
D (delivered) is reserved durably ahead of delivery, P is paid for service, F written off, X the
exposure and L the line. A crash counts all that was reserved as delivered. All strangers share
one pool W, for what they owe, signed or not.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import apsw

from aivillage.ledger.books import Pair, ensure_peer, one, read_pair, rows
from aivillage.protocols.types import AMOUNT_MAX, MicroCredits, PeerId

RHO: Final = 16
"""1/16 of what a peer ever paid may be written off."""
DAY_MS: Final = 86_400_000


def certify(
    db: apsw.Connection,
    peer: PeerId,
    line: MicroCredits,
    exposure: MicroCredits,
    at_ms: int,
    *,
    owner: str | None = None,
) -> Pair:
    """What its village lets `peer` owe me makes it a known one; `owner`: whose device it is."""
    _acquaint(db, peer, at_ms)
    db.execute(
        "UPDATE peer SET certified_line = ?, certified_exposure = ?, owner = ? WHERE peer = ?",
        (line, exposure, owner, peer),
    )
    return _in_force(db, peer)


class Word(NamedTuple):
    """The owner's word on a peer; None leaves a field as it is.

    `usual`: the exposure of a peer that has a line now and none from anybody. `by_village`: line
    and exposure are again what its village says.
    """

    line: MicroCredits | None = None
    exposure: MicroCredits | None = None
    blocked: bool | None = None
    shared: bool | None = None
    usual: MicroCredits | None = None
    by_village: bool = False


def decree(db: apsw.Connection, peer: PeerId, word: Word, at_ms: int) -> Pair:
    """The owner's word on a peer beats its village's, whatever the village says later.

    The time for which it was blocked counts for no healing.
    """
    _acquaint(db, peer, at_ms)
    db.execute(
        "UPDATE peer SET owner_line = CASE ?1 WHEN 1 THEN NULL ELSE coalesce(?2, owner_line) END,"
        " owner_exposure = CASE ?1 WHEN 1 THEN NULL ELSE coalesce(?3, owner_exposure,"
        " CASE coalesce(certified_exposure, 0) WHEN 0 THEN ?4 END) END,"
        " healed_ms = CASE WHEN blocked = 1 AND ?5 = 0 THEN ?7 ELSE healed_ms END,"
        " blocked = coalesce(?5, blocked), shared = coalesce(?6, shared) WHERE peer = ?8",
        (
            *(word.by_village, word.line, word.exposure, word.usual),
            *(word.blocked, word.shared, at_ms, peer),
        ),
    )
    return _in_force(db, peer)


def _acquaint(db: apsw.Connection, peer: PeerId, at_ms: int) -> None:
    ensure_peer(db, peer)
    db.execute(
        "UPDATE peer SET healed_ms = CASE known WHEN 0 THEN ? ELSE healed_ms END, known = 1"
        " WHERE peer = ?",
        (at_ms, peer),
    )


def _in_force(db: apsw.Connection, peer: PeerId) -> Pair:
    db.execute(
        "UPDATE peer SET"
        " line = CASE blocked WHEN 1 THEN 0 ELSE coalesce(owner_line, certified_line, 0) END,"
        " exposure = CASE blocked WHEN 1 THEN 0"
        " ELSE min(coalesce(owner_exposure, certified_exposure, 0),"
        " coalesce(owner_line, certified_line, 0)) END WHERE peer = ?",
        (peer,),
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


def ceiling(pair: Pair, pool: MicroCredits, others: MicroCredits) -> MicroCredits:
    """The most that `reserved` may be.

    `others`: what those owe, or may owe, who share a limit with this peer: the other devices of
    its owner their line, and all other strangers the pool.
    """
    line_left = line_of(pair, pool) - pair.balance - pair.routed - (others if pair.known else 0)
    most = pair.paid + pair.written_off + min(exposure_of(pair, pool), line_left)
    if not pair.known:
        most = min(most, pair.paid + pool - others - max(0, pair.balance))
    return min(most, AMOUNT_MAX)


def share_of(pair: Pair) -> MicroCredits:
    """What `pair` takes of a limit that it shares with others.

    A stranger never more than it was ever given: promises beyond that would shut out the others.
    """
    if pair.known:
        return max(0, pair.owed)
    return min(pair.reserved, max(0, pair.reserved - pair.paid) + max(0, pair.balance))


_SHARERS: Final = {
    "stranger": "SELECT peer FROM peer LEFT JOIN bal USING (peer) WHERE known = 0 AND peer <> ?1"
    " AND (reserved > paid OR amount > 0)",
    "device": "SELECT peer FROM peer WHERE owner = ?2 AND known = 1 AND peer <> ?1",
}


def others_share(db: apsw.Connection, pair: Pair) -> MicroCredits:
    """What the others take who share a limit with this peer, less what the owner forgave."""
    if pair.known and pair.owner is None:
        return 0
    bindings = (pair.peer, pair.owner) if pair.known else (pair.peer,)
    sharers = rows(db, _SHARERS["device" if pair.known else "stranger"], bindings)
    share = sum(share_of(read_pair(db, peer)) for (peer,) in sharers)
    return share if pair.known else share - relieved(db)


def relieved(db: apsw.Connection) -> MicroCredits:
    """What the owner forgave all strangers together so far."""
    row = one(db, "SELECT relieved FROM pool")
    return int(row[0]) if row else 0


def relieve_pool(db: apsw.Connection, day: MicroCredits, at_ms: int) -> MicroCredits:
    """Forgives strangers up to `day` a day of what they took and did not pay; returns the sum.

    A clock that jumps gives one day at most, and what is paid late takes its place.
    """
    ((share,),) = rows(
        db,
        "SELECT coalesce(sum(min(reserved,"
        " max(0, reserved - paid) + max(0, coalesce(amount, 0)))), 0)"
        " FROM peer LEFT JOIN bal USING (peer) WHERE known = 0",
    )
    before, healed_ms = one(db, "SELECT relieved, healed_ms FROM pool") or (0, at_ms)
    more = day * min(max(0, at_ms - healed_ms), DAY_MS) // DAY_MS
    now = min(int(before) + more, int(share))
    db.execute(
        "INSERT INTO pool VALUES (1, ?1, ?2) ON CONFLICT DO UPDATE SET relieved = ?1,"
        " healed_ms = ?2",
        (now, at_ms),
    )
    return int(now)


def reserve(
    db: apsw.Connection,
    peer: PeerId,
    delivered: MicroCredits,
    unit: MicroCredits,
    pool: MicroCredits,
) -> Pair:
    """Raises `reserved` so that one more `unit` fits, and a step ahead, if the rules allow."""
    pair = read_pair(db, peer)
    most = ceiling(pair, pool, others_share(db, pair))
    step = max(unit, exposure_of(pair, pool) // 8)
    wanted = min(delivered + step, most)
    if wanted < delivered + unit or wanted <= pair.reserved:
        return pair
    ensure_peer(db, peer)
    db.execute("UPDATE peer SET reserved = ? WHERE peer = ?", (wanted, peer))
    return pair._replace(reserved=wanted)


def release(db: apsw.Connection, peer: PeerId, delivered: MicroCredits) -> Pair:
    """Gives back what was reserved and, as the seller of this boot knows, not delivered.

    Not what was forgiven: an owner may forgive what was only reserved.
    """
    db.execute(
        "UPDATE peer SET reserved = min(reserved, max(?, written_off)) WHERE peer = ?",
        (delivered, peer),
    )
    return read_pair(db, peer)


def heal(db: apsw.Connection, peer: PeerId, at_ms: int) -> Pair:
    """Writes off part of a gap that crashes left, for a peer with nothing running.

    In all at most P/16, and X/4 for each day that the pair was known; a clock that jumps gives
    one day at most, and a peer that is blocked gets nothing.
    """
    row = one(db, "SELECT allowance_ms, healed_ms FROM peer WHERE peer = ?", (peer,))
    pair = read_pair(db, peer)
    if row is None or pair.blocked:
        return pair
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


def forgive_gap(db: apsw.Connection, peer: PeerId) -> Pair:
    """The owner gives up what was delivered or reserved and never signed for, all of it."""
    db.execute(
        "UPDATE peer SET written_off = written_off + max(0, reserved - paid - written_off)"
        " WHERE peer = ?",
        (peer,),
    )
    return read_pair(db, peer)


def settle_gap(db: apsw.Connection, peer: PeerId, delivered: MicroCredits) -> None:
    """Late money takes the place of what was written off for it."""
    db.execute(
        "UPDATE peer SET written_off = max(0, min(written_off, ? - paid)) WHERE peer = ?",
        (delivered, peer),
    )
