"""SYNC: after every connection both sides show what they have, and heal what one forgot.

The asking side lists its lanes; the answering side returns what differs. Claims of a seller
whose buyer crashed ride on the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import apsw

from aivillage.ledger import payee, payer
from aivillage.ledger.books import Pair, ensure_peer, one, read_pair, rows
from aivillage.ledger.exposure import RHO
from aivillage.ledger.folds import fold
from aivillage.protocols.types import AMOUNT_MAX, AttemptId, MicroCredits, PeerId
from aivillage.protocols.vouchers import (
    ARREARS,
    HASH_BYTES,
    ITEMS_MAX,
    JOB,
    Claim,
    Item,
    LaneDigest,
    LaneState,
    Voucher,
    lane_of,
)

VOUCHERS_MAX: Final = 4096
"""In one answer; the asking side asks again for the rest."""
_RUNS_MAX: Final = 32


class Epochs(NamedTuple):
    """The boots that run now: mine and the peer's."""

    mine: int
    yours: int


ALL: Final = Epochs(0, 0)
"""As if no boot had ended: every lane is listed."""


def digests(db: apsw.Connection, peer: PeerId, epochs: Epochs) -> tuple[LaneDigest, LaneDigest]:
    """Of the lanes that former boots signed: mine, and the peer's."""
    return fold(db, peer, epochs.mine, mine=True), fold(db, peer, epochs.yours, mine=False)


def own_lanes(db: apsw.Connection, peer: PeerId, since: Epochs = ALL) -> list[LaneState]:
    """What I have of every lane with `peer`, or of those of the boots `since`."""
    mine, yours = (lane_of(epoch, bytes(8)) for epoch in since)
    out = rows(db, "SELECT lane, n FROM lane_out WHERE peer = ? AND lane >= ?", (peer, mine))
    lanes = [LaneState(True, lane, n) for lane, n in out]
    for lane, n, count in rows(
        db, "SELECT lane, n, count FROM lane_in WHERE peer = ? AND lane >= ?", (peer, yours)
    ):
        held = (1, n) if n == count else _runs(db, peer, lane)
        lanes.append(LaneState(False, lane, n, held))
    return lanes


def _runs(db: apsw.Connection, peer: PeerId, lane: bytes) -> tuple[int, ...]:
    """first, last, first, last... of the n that are stored; the newest runs if there are many."""
    runs = rows(
        db,
        "SELECT min(n), max(n) FROM (SELECT n, n - row_number() OVER (ORDER BY n) AS run"
        " FROM voucher_in WHERE peer = ? AND lane = ?) GROUP BY run ORDER BY run DESC LIMIT ?",
        (peer, lane, _RUNS_MAX),
    )
    return tuple(n for run in runs for n in run)


class Answer(NamedTuple):
    pair: Pair
    mine: list[Voucher]
    yours: list[Voucher]
    more: bool
    unconfirmed: int


class Asked(NamedTuple):
    """A whole question. `digest`: of mine and yours, where old lanes are not listed."""

    lanes: Mapping[tuple[bool, bytes], LaneState]
    digest: tuple[LaneDigest, LaneDigest] | None = None


def answer(db: apsw.Connection, peer: PeerId, epochs: Epochs, asked: Asked) -> Answer:
    """What `peer` in its boot lacks; its epoch is durable when the answer leaves."""
    # No row for a stranger without one: with no money in play there is nothing to fence.
    db.execute("UPDATE peer SET epoch = max(epoch, ?) WHERE peer = ?", (epochs.yours, peer))
    if asked.digest is not None and digests(db, peer, epochs) != asked.digest[::-1]:
        return Answer(read_pair(db, peer), [], [], True, payer.count_unreceipted(db, peer))
    since = ALL if asked.digest is None else epochs
    yours = _forgotten(db, peer, asked.lanes, since, VOUCHERS_MAX + 1)
    mine = _unseen(db, peer, asked.lanes, since, VOUCHERS_MAX + 1 - len(yours))
    left = VOUCHERS_MAX - len(yours) - len(mine)
    more = left < 0
    if more:
        yours, mine = yours[:VOUCHERS_MAX], mine[: max(0, VOUCHERS_MAX - len(yours))]
    else:  # what it holds and never confirmed, so that the receipt comes now
        known = set(mine)
        mine += [v for v in payer.unreceipted(db, peer, left) if v not in known]
    unconfirmed = payer.count_unreceipted(db, peer)
    return Answer(read_pair(db, peer), mine, yours, more, unconfirmed)


def _forgotten(
    db: apsw.Connection,
    peer: PeerId,
    lanes: Mapping[tuple[bool, bytes], LaneState],
    since: Epochs,
    limit: int,
) -> list[Voucher]:
    """Vouchers that `peer` signed after the last one it knows, in order of n."""
    found: list[Voucher] = []
    first = lane_of(since.yours, bytes(8))
    held = rows(db, "SELECT lane, n FROM lane_in WHERE peer = ? AND lane >= ?", (peer, first))
    for lane, n in held:
        state = lanes.get((True, lane))
        if state is None or state.n < n:
            newer = rows(
                db,
                "SELECT body, signature, items FROM voucher_in"
                " WHERE peer = ? AND lane = ? AND n > ? ORDER BY n LIMIT ?",
                (peer, lane, state.n if state else 0, limit - len(found)),
            )
            found += [payer.as_voucher(row) for row in newer]
    return found


def _unseen(
    db: apsw.Connection,
    peer: PeerId,
    lanes: Mapping[tuple[bool, bytes], LaneState],
    since: Epochs,
    limit: int,
) -> list[Voucher]:
    """My vouchers that still say something and that `peer` lacks."""
    found: list[Voucher] = []
    first = lane_of(since.mine, bytes(8))
    signed = rows(db, "SELECT lane FROM lane_out WHERE peer = ? AND lane >= ?", (peer, first))
    for (lane,) in signed:
        state = lanes.get((False, lane))
        for hole in _holes(state.held if state else ()):
            if len(found) < limit:
                seen = payer.telling(db, peer, lane, hole, limit - len(found))
                found += [payer.voucher_at(db, peer, lane, n) for n in seen]
    return found


def _holes(runs: Sequence[int]) -> list[tuple[int, int]]:
    """Between the runs that a peer says it holds, whatever it says."""
    holes, start = [], 1
    for first, last in sorted(zip(runs[::2], runs[1::2], strict=False)):
        if start < first:
            holes.append((start, min(first - 1, AMOUNT_MAX)))
        start = max(start, last + 1)
    return [*holes, (start, AMOUNT_MAX)] if start <= AMOUNT_MAX else holes


class Reply(NamedTuple):
    """A whole SYNC_REP, its signatures checked. `mine` is the sender's, with attest."""

    epoch: int
    more: bool
    mine: list[tuple[Voucher, bool]]
    yours: list[Voucher]
    claims: list[Claim]


class Healed(NamedTuple):
    pair: Pair
    booked: list[payee.Booked]
    arrears: list[Voucher]
    unconfirmed: int


def apply_reply(
    db: apsw.Connection,
    wallet: payer.Wallet,
    peer: PeerId,
    reply: Reply,
    running: frozenset[AttemptId],
    at_ms: int,
) -> Healed:
    """Takes in what the other side showed, pays justified claims, seals the lanes of old boots."""
    for voucher in reply.yours:
        payer.adopt(db, peer, voucher, at_ms)
    booked = [
        payee.book_voucher(db, peer, voucher, "recover-receive", attest=attest, at_ms=at_ms)
        for voucher, attest in reply.mine
    ]
    if not reply.more:
        payee.seal(db, peer, reply.epoch)
        db.execute("UPDATE peer SET unsynced = 0 WHERE peer = ? AND unsynced = 1", (peer,))
    arrears = pay_claims(db, wallet, peer, reply.claims, running, at_ms)
    return Healed(read_pair(db, peer), booked, arrears, payer.count_unreceipted(db, peer))


def pay_claims(
    db: apsw.Connection,
    wallet: payer.Wallet,
    peer: PeerId,
    claims: Sequence[Claim],
    running: frozenset[AttemptId],
    at_ms: int,
) -> list[Voucher]:
    """Signs for claims on work that this buyer asked for and forgot, within a budget."""
    ensure_peer(db, peer)  # the budget below is counted in its row
    items = []
    for claim in claims:
        amount = 0 if claim.id in running else justified(db, peer, claim)
        amount = min(amount, arrears_left(db, peer))
        if amount > 0:
            items.append(Item(ARREARS, claim.id, claim.quote_hash, amount, claim.out_hash, True))
            db.execute("UPDATE peer SET arrears = arrears + ? WHERE peer = ?", (amount, peer))
            payer.drop_intent(db, peer, AttemptId(claim.id))
    batches = [items[start : start + ITEMS_MAX] for start in range(0, len(items), ITEMS_MAX)]
    vouchers = [payer.make_voucher(db, wallet, peer, batch, at_ms) for batch in batches]
    return [voucher for voucher in vouchers if voucher is not None]


def justified(db: apsw.Connection, peer: PeerId, claim: Claim) -> MicroCredits:
    """What of `claim` is within an intent of mine and was not paid."""
    intent = one(
        db,
        "SELECT ceiling FROM intent WHERE peer = ? AND attempt = ? AND quote_hash = ?",
        (peer, claim.id, claim.quote_hash),
    )
    paid = dict(
        rows(
            db,
            "SELECT kind, amount FROM item WHERE mine = 1 AND peer = ? AND id = ?",
            (peer, claim.id),
        )
    )
    if intent is None or ARREARS in paid or len(claim.out_hash) != HASH_BYTES:
        return 0
    return min(claim.amount, int(intent[0])) - int(paid.get(JOB, 0))


def arrears_left(db: apsw.Connection, peer: PeerId) -> MicroCredits:
    """Budget for claims: X and 1/16 of what was paid, less the arrears paid already."""
    pair = read_pair(db, peer)
    row = one(db, "SELECT coalesce(sum(service), 0) FROM lane_out WHERE peer = ?", (peer,))
    paid = (row[0] if row else 0) - pair.arrears
    return max(0, pair.received_exposure + max(0, paid) // RHO - pair.arrears)
