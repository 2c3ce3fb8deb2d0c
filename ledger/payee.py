"""The payee's step: book a voucher. Money counts whatever it is for; items explain it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import apsw
import msgspec

from aivillage.ledger import transfers
from aivillage.ledger.books import (
    Cause,
    Leg,
    account_of,
    ensure_peer,
    keep_evidence,
    keep_item,
    one,
    post,
    rows,
)
from aivillage.protocols.types import MicroCredits, PeerId
from aivillage.protocols.vouchers import (
    SERVICE,
    Item,
    ReceiptRow,
    SignedBody,
    Voucher,
    VoucherBody,
    digest,
    lane_epoch,
)


class Booked(NamedTuple):
    """`receipt` is None for a voucher that contradicts another. `items`: those that counted.

    `proof`: the two that contradict each other, where that was not known before.
    """

    lane: bytes
    receipt: ReceiptRow | None
    items: tuple[Item, ...] = ()
    proof: tuple[SignedBody, SignedBody] | None = None


class _Lane(NamedTuple):
    """What is stored of a lane; one that is not stored has 0 vouchers."""

    n: int = 0
    cum: MicroCredits = 0
    attr: MicroCredits = 0
    service: MicroCredits = 0
    vouchers: int = 0
    sealed: int = 0


def book_voucher(
    db: apsw.Connection, peer: PeerId, voucher: Voucher, cause: str, *, attest: bool, at_ms: int
) -> Booked:
    """Books a voucher whose signature, payee and root were checked. `cause`: kind of entry."""
    body = msgspec.msgpack.decode(voucher.body, type=VoucherBody)
    lane = _Lane(*(one(db, _LANE, (peer, body.lane)) or ()))
    follows = body.n > lane.n and body.cum >= lane.cum  # the last of a lane has the highest cum
    if not follows and (answer := _held_against(db, peer, body, voucher, at_ms)):
        return answer
    if body.cum <= lane.cum:  # no money: it may still be news
        is_known = one(db, _KNOWN, (peer,)) is not None
        if _says_nothing(db, peer, body, voucher, lane, is_known=is_known):
            # A neighbour may hear that it came; a stranger would only ask again.
            receipt = ReceiptRow(body.n, digest(voucher.body), False) if is_known else None
            return Booked(body.lane, receipt)
    items = _book(db, peer, body, voucher, lane, (cause, attest, at_ms))
    return Booked(body.lane, ReceiptRow(body.n, digest(voucher.body), attest), items)


_LANE: Final = (
    "SELECT n, cum, attr, service, count, sealed FROM lane_in WHERE peer = ? AND lane = ?"
)
_KNOWN: Final = "SELECT 1 FROM peer WHERE peer = ? AND known = 1"


def _held_against(
    db: apsw.Connection, peer: PeerId, body: VoucherBody, voucher: Voucher, at_ms: int
) -> Booked | None:
    """What became of a voucher that is stored already or contradicts one that is."""
    known = one(
        db,
        "SELECT body, signature, attest FROM voucher_in WHERE peer = ? AND lane = ? AND n = ?",
        (peer, body.lane, body.n),
    )
    if known is not None and known[0] == voucher.body:
        return Booked(body.lane, ReceiptRow(body.n, digest(voucher.body), bool(known[2])))
    rival = known or _rival(db, peer, body)
    if rival is None:
        return None
    proof = (SignedBody(rival[0], rival[1]), SignedBody(voucher.body, voucher.signature))
    bodies = (*rival[:2], voucher.body, voucher.signature)
    is_new = keep_evidence(db, peer, (body.lane, body.n), bodies, at_ms)
    return Booked(body.lane, None, proof=proof if is_new else None)


_STORED: Final = "SELECT body, signature, cum FROM voucher_in WHERE peer = ? AND lane = ?"
_BEFORE: Final = f"{_STORED} AND n < ? ORDER BY n DESC LIMIT 1"
_AFTER: Final = f"{_STORED} AND n > ? ORDER BY n LIMIT 1"


def _rival(db: apsw.Connection, peer: PeerId, body: VoucherBody) -> tuple[bytes, bytes] | None:
    """A stored voucher of the lane that `body` contradicts: cum never falls as n rises.

    It holds for those that are stored, so the two neighbours speak for all.
    """
    place = (peer, body.lane, body.n)
    before, after = one(db, _BEFORE, place), one(db, _AFTER, place)
    if before and before[2] > body.cum:
        return (before[0], before[1])
    if after and after[2] < body.cum:
        return (after[0], after[1])
    return None


def _says_nothing(
    db: apsw.Connection,
    peer: PeerId,
    body: VoucherBody,
    voucher: Voucher,
    lane: _Lane,
    *,
    is_known: bool,
) -> bool:
    """A voucher without money has no news of an attempt or an end: it would only fill the disk.

    A later one made it worthless, and compaction may have dropped it. Work for nothing is news
    of a neighbour's only.
    """
    if is_known and body.n > lane.n:
        return False
    for item in voucher.items:
        row = one(db, _ITEM, (peer, item.kind, item.id))
        amount, final = (row[1], row[2]) if row else (0, not is_known)
        if (item.amount > amount and lane.attr < lane.cum) or (item.final and not final):
            return False
    return True


_ITEM: Final = (
    "SELECT lane, amount, final FROM item WHERE mine = 0 AND peer = ? AND kind = ? AND id = ?"
)


def _book(
    db: apsw.Connection,
    peer: PeerId,
    body: VoucherBody,
    voucher: Voucher,
    old: _Lane,
    how: tuple[str, bool, int],
) -> tuple[Item, ...]:
    kind, attest, at_ms = how
    place = (peer, body.lane)
    if not old.vouchers:
        ensure_peer(db, peer)
    cum = max(old.cum, body.cum)
    db.execute(
        "INSERT INTO voucher_in VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            *(*place, body.n, body.cum, voucher.body, voucher.signature),
            *(msgspec.msgpack.encode(voucher.items), attest),
        ),
    )
    stored = (body.lane, body.n, db.last_insert_rowid())
    counted = _label(db, peer, stored, voucher.items, cum - old.attr)
    attr = old.attr + sum(increase for _, increase in counted)
    money = cum - old.cum
    credit = _service(counted, money, sealed=bool(old.sealed))
    db.execute(
        "INSERT INTO lane_in VALUES (?, ?, ?, ?, ?, ?, ?, 0, NULL) ON CONFLICT DO UPDATE SET n ="
        " excluded.n, cum = excluded.cum, attr = excluded.attr, service = excluded.service,"
        " count = excluded.count, fold = NULL",
        (*place, max(old.n, body.n), cum, attr, old.service + credit, old.vouchers + 1),
    )
    db.execute("UPDATE peer SET paid = paid + ? WHERE peer = ?", (credit, peer))
    earned = [
        Leg(account_of(item.kind, "earned"), item.id, -increase) for item, increase in counted
    ]
    rest = -money - sum(leg.amount for leg in earned)
    cause = Cause(peer, body.lane, body.n, voucher.body, kind)
    post(db, cause, [Leg("peer", None, money), *earned, Leg("unlabelled", None, rest)], at_ms)
    for item, increase in counted:
        transfers.take(db, peer, item, increase, at_ms)
    return tuple(item for item, _ in counted)


def _service(
    counted: list[tuple[Item, MicroCredits]], money: MicroCredits, *, sealed: bool
) -> MicroCredits:
    """What counts as pay for work; on a sealed lane what no item explains counts already."""
    other = sum(increase for item, increase in counted if item.kind not in SERVICE)
    if sealed:
        return max(0, money - other)
    return sum(increase for _, increase in counted) - other


def _label(
    db: apsw.Connection,
    peer: PeerId,
    voucher: tuple[bytes, int, int],
    items: Sequence[Item],
    room: MicroCredits,
) -> list[tuple[Item, MicroCredits]]:
    """Takes the items that the lane's cum covers: (item, increase). Items never exceed cum.

    `voucher`: the stored one that has them, as (lane, n, id).
    """
    counted = []
    for item in items:
        row = one(db, _ITEM, (peer, item.kind, item.id))
        lane, amount, _ = row or (voucher[0], 0, 0)
        increase = max(0, item.amount - amount)
        if lane != voucher[0] or increase > room:
            continue
        room -= increase
        keep_item(db, peer, item, voucher, mine=False)
        counted.append((item, increase))
    return counted


def seal(db: apsw.Connection, peer: PeerId, epoch: int) -> None:
    """The payer of `epoch` showed all it has: what its older lanes leave unexplained is paid."""
    open_lanes = rows(
        db, "SELECT lane, cum - attr FROM lane_in WHERE peer = ? AND sealed = 0", (peer,)
    )
    for lane, rest in open_lanes:
        if lane_epoch(lane) >= epoch:
            continue
        db.execute(
            "UPDATE lane_in SET sealed = 1, service = service + ? WHERE peer = ? AND lane = ?",
            (rest, peer, lane),
        )
        db.execute("UPDATE peer SET paid = paid + ? WHERE peer = ?", (rest, peer))
