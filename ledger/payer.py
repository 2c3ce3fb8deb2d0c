"""The payer's steps: sign vouchers, note receipts, take back what it forgot.

Vouchers are signed on the lane of the running boot only, so that a node that lost its memory
can never contradict itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

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
    key_of,
    one,
    own_keys,
    post,
    rows,
)
from aivillage.ledger.signing import Signer
from aivillage.protocols.types import AttemptId, MicroCredits, PeerId, peer_id
from aivillage.protocols.vouchers import (
    JOB,
    SERVICE,
    Item,
    Receipt,
    ReceiptBody,
    Voucher,
    VoucherBody,
    check_item,
    digest,
    root_of,
    voucher_prefixed,
)

_items = msgspec.msgpack.Decoder(tuple[Item, ...])


class Wallet(NamedTuple):
    """What signing needs: the key and the lane of this boot."""

    signer: Signer
    lane: bytes


class Intent(NamedTuple):
    """What was asked of a peer, and what it may cost."""

    peer: PeerId
    attempt: AttemptId
    quote_hash: bytes
    ceiling: MicroCredits
    at_ms: int


def intend(
    db: apsw.Connection,
    peer: PeerId,
    attempt: AttemptId,
    quote_hash: bytes,
    ceiling: MicroCredits,
    at_ms: int,
) -> None:
    """Remembers what was asked for: only that can be claimed after a crash."""
    db.execute(
        "INSERT INTO intent VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
        (peer, attempt, quote_hash, ceiling, at_ms),
    )


def drop_intent(db: apsw.Connection, peer: PeerId, attempt: AttemptId) -> None:
    db.execute("DELETE FROM intent WHERE peer = ? AND attempt = ?", (peer, attempt))


def make_voucher(
    db: apsw.Connection, wallet: Wallet, peer: PeerId, wanted: Sequence[Item], at_ms: int
) -> Voucher | None:
    """Signs for what `wanted` adds to what was signed before; None when it adds nothing.

    Raises:
        LedgerError: BAD_REQUEST, an item that nobody could read; nothing is stored.
    """
    for item in wanted:
        check_item(item.id, item.out_hash)
    increases = [(item, _increase(db, wallet.lane, peer, item)) for item in wanted]
    fresh = [(item, increase) for item, increase in increases if increase is not None]
    if not fresh:
        return None
    row = one(db, "SELECT n, cum FROM lane_out WHERE peer = ? AND lane = ?", (peer, wallet.lane))
    if row is None:
        ensure_peer(db, peer)
    n, cum = row or (0, 0)
    items = tuple(item for item, _ in fresh)
    total = sum(increase for _, increase in fresh)
    body = VoucherBody(key_of(db, peer), wallet.lane, n + 1, cum + total, root_of(items))
    encoded = msgspec.msgpack.encode(body)
    voucher = Voucher(encoded, wallet.signer.sign(voucher_prefixed(encoded)), items)
    _keep(db, peer, body, voucher, _for_service(fresh))
    _pay(db, Cause(peer, body.lane, body.n, encoded, "pay"), fresh, total, at_ms)
    return voucher


def _increase(db: apsw.Connection, lane: bytes, peer: PeerId, item: Item) -> MicroCredits | None:
    """What `item` adds; None if it says nothing new or stands settled on an earlier lane."""
    row = one(
        db,
        "SELECT lane, amount, final FROM item WHERE mine = 1 AND peer = ? AND kind = ? AND id = ?",
        (peer, item.kind, item.id),
    )
    if row is None:  # work for nothing is signed for too, at its end
        return item.amount if item.amount or (item.final and item.kind == JOB) else None
    if row[0] != lane or row[2] or item.amount < row[1]:
        return None
    return item.amount - row[1] if item.amount > row[1] or item.final else None


def _for_service(increases: Sequence[tuple[Item, MicroCredits]]) -> MicroCredits:
    return sum(increase for item, increase in increases if item.kind in SERVICE)


def _keep(
    db: apsw.Connection, peer: PeerId, body: VoucherBody, voucher: Voucher, service: MicroCredits
) -> None:
    """`service`: what of it is for work."""
    db.execute(
        "INSERT INTO lane_out VALUES (?, ?, ?, ?, ?, 0, NULL) ON CONFLICT DO UPDATE SET n ="
        " excluded.n, cum = excluded.cum, service = service + excluded.service, fold = NULL",
        (peer, body.lane, body.n, body.cum, service),
    )
    _insert(db, peer, body, voucher)


def _insert(db: apsw.Connection, peer: PeerId, body: VoucherBody, voucher: Voucher) -> None:
    items = msgspec.msgpack.encode(voucher.items)
    db.execute(
        "INSERT INTO voucher_out VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, NULL, NULL)",
        (peer, body.lane, body.n, body.cum, voucher.body, voucher.signature, items),
    )
    number = db.last_insert_rowid()
    for item in voucher.items:
        keep_item(db, peer, item, (body.lane, body.n, number), mine=True)
        if item.final and item.kind == JOB:
            drop_intent(db, peer, AttemptId(item.id))


def _pay(
    db: apsw.Connection,
    cause: Cause,
    increases: Sequence[tuple[Item, MicroCredits]],
    money: MicroCredits,
    at_ms: int,
) -> None:
    """Entry of a payment; `money` beyond the items (lost vouchers) stays unlabelled."""
    spent = [Leg(account_of(item.kind, "spent"), item.id, increase) for item, increase in increases]
    rest = money - sum(leg.amount for leg in spent)
    post(db, cause, [Leg("peer", None, -money), *spent, Leg("unlabelled", None, rest)], at_ms)


def adopt(db: apsw.Connection, peer: PeerId, voucher: Voucher, at_ms: int) -> None:
    """Books a voucher of my own that the payee showed to me. The signature was checked."""
    body = msgspec.msgpack.decode(voucher.body, type=VoucherBody)
    place = (peer, body.lane, body.n)
    known = one(
        db,
        "SELECT body, signature FROM voucher_out WHERE peer = ? AND lane = ? AND n = ?",
        place,
    )
    if known is not None:
        if known[0] != voucher.body:  # two copies of this identity ran at once
            proof = (*known, voucher.body, voucher.signature)
            keep_evidence(db, peer_id(own_keys(db)[0]), (body.lane, body.n), proof, at_ms)
        return
    ensure_peer(db, peer)
    row = one(db, "SELECT n, cum FROM lane_out WHERE peer = ? AND lane = ?", place[:2]) or (0, 0)
    money = max(0, body.cum - row[1])
    increases = [(item, _adopted(db, peer, body.lane, item)) for item in voucher.items]
    if body.n > row[0]:
        _keep(db, peer, body, voucher, min(money, _for_service(increases)))
    else:
        _insert(db, peer, body, voucher)
        db.execute("UPDATE lane_out SET fold = NULL WHERE peer = ? AND lane = ?", place[:2])
    _pay(db, Cause(*place, voucher.body, "recover-pay"), increases, money, at_ms)
    for item in voucher.items:
        transfers.adopt(db, peer, item, at_ms)


def _adopted(db: apsw.Connection, peer: PeerId, lane: bytes, item: Item) -> MicroCredits:
    row = one(
        db,
        "SELECT amount FROM item WHERE mine = 1 AND peer = ? AND kind = ? AND id = ? AND lane = ?",
        (peer, item.kind, item.id, lane),
    )
    return max(0, item.amount - (row[0] if row else 0))


def note_receipt(db: apsw.Connection, peer: PeerId, body: ReceiptBody, receipt: Receipt) -> int:
    """Marks the vouchers that `peer` says it booked; returns how many it has yet to confirm."""
    fresh, confirmed = [], 0
    for row in body.rows:
        known = one(
            db,
            "SELECT body, receipt, cum FROM voucher_out WHERE peer = ? AND lane = ? AND n = ?",
            (peer, body.lane, row.n),
        )
        if known and known[1] is None and digest(known[0]) == row.body_hash:
            fresh.append(row)
            confirmed = max(confirmed, known[2])
    if fresh:
        db.execute(
            "INSERT INTO receipt(peer, body, signature) VALUES (?, ?, ?)",
            (peer, receipt.body, receipt.signature),
        )
        number = db.last_insert_rowid()
        for row in fresh:
            db.execute(
                "UPDATE voucher_out SET receipt = ?, attest = ?"
                " WHERE peer = ? AND lane = ? AND n = ?",
                (number, row.attest, peer, body.lane, row.n),
            )
        db.execute(
            "UPDATE lane_out SET confirmed = max(confirmed, ?) WHERE peer = ? AND lane = ?",
            (confirmed, peer, body.lane),
        )
    return count_unreceipted(db, peer)


# The vouchers that still say something: the last to name some attempt. The last of a lane is one.
_TELLING: Final = """
  SELECT v.n FROM voucher_out v WHERE v.peer = ? AND v.lane = ? AND v.n BETWEEN ? AND ?
    AND EXISTS (SELECT 1 FROM item WHERE mine = 1 AND voucher = v.id) ORDER BY v.n LIMIT ?
"""


def telling(
    db: apsw.Connection, peer: PeerId, lane: bytes, between: tuple[int, int], limit: int
) -> list[int]:
    """N of each voucher that says what no later one does, in order."""
    return [n for (n,) in rows(db, _TELLING, (peer, lane, *between, limit))]


def voucher_at(db: apsw.Connection, peer: PeerId, lane: bytes, n: int) -> Voucher:
    """A voucher that is known to be stored."""
    (row,) = rows(
        db,
        "SELECT body, signature, items FROM voucher_out WHERE peer = ? AND lane = ? AND n = ?",
        (peer, lane, n),
    )
    return as_voucher(row)


def as_voucher(row: tuple[Any, ...]) -> Voucher:
    """From the columns body, signature, items: byte for byte what was signed."""
    return Voucher(row[0], row[1], _items.decode(row[2]))


_OPEN = """
  FROM voucher_out v WHERE v.peer = ?1 AND v.receipt IS NULL AND (
    v.n = (SELECT n FROM lane_out WHERE peer = ?1 AND lane = v.lane)
    OR EXISTS (SELECT 1 FROM item WHERE mine = 1 AND voucher = v.id))
"""


def unreceipted(db: apsw.Connection, peer: PeerId, limit: int) -> list[Voucher]:
    """Vouchers to `peer` that it has not confirmed and that are worth sending again."""
    found = rows(
        db,
        f"SELECT body, signature, items {_OPEN} ORDER BY v.lane, v.n LIMIT ?2",
        (peer, limit),
    )
    return [as_voucher(row) for row in found]


def count_unreceipted(db: apsw.Connection, peer: PeerId) -> int:
    ((count,),) = rows(db, f"SELECT count(*) {_OPEN}", (peer,))
    return int(count)
