"""Puts a statement together from a book: the signed bytes that still say something.

It is verified before it is handed out, so no statement leaves that a stranger would refuse.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from aivillage.ledger import accusing
from aivillage.ledger.documents import (
    VERSION,
    VERSION_KEYS,
    Direction,
    Document,
    Evidence,
    JobProof,
    JobStatement,
    Party,
    PayerPayee,
    Proof,
    ShownItem,
    SignedReceipt,
    SignedVoucher,
    Statement,
)
from aivillage.ledger.queries import Query, Rows, find_peer
from aivillage.ledger.statement import job_proof, summed, verify_document
from aivillage.protocols.envelope import Verify
from aivillage.protocols.errors import RequestError
from aivillage.protocols.types import AttemptId, PeerId, peer_id, public_key
from aivillage.protocols.vouchers import ID_BYTES, Item, digest

_items: Final = msgspec.msgpack.Decoder(tuple[msgspec.Raw, ...])

# The last voucher of a lane, the last to name some item, and the last that was confirmed.
_OUT: Final = """
  WITH telling(lane, n) AS (
    SELECT lane, n FROM lane_out WHERE peer = ?1
    UNION SELECT lane, last_n FROM item WHERE mine = 1 AND peer = ?1
    UNION SELECT lane, max(n) FROM voucher_out
      WHERE peer = ?1 AND receipt IS NOT NULL GROUP BY lane)
  SELECT v.body, v.signature, v.items, v.receipt FROM telling t
  JOIN voucher_out v ON v.peer = ?1 AND v.lane = t.lane AND v.n = t.n ORDER BY v.lane, v.n
"""
_IN: Final = """
  WITH telling(lane, n) AS (
    SELECT lane, n FROM lane_in WHERE peer = ?1
    UNION SELECT lane, last_n FROM item WHERE mine = 0 AND peer = ?1)
  SELECT v.body, v.signature, v.items, NULL FROM telling t
  JOIN voucher_in v ON v.peer = ?1 AND v.lane = t.lane AND v.n = t.n ORDER BY v.lane, v.n
"""
_RECEIPTS: Final = """
  SELECT r.id, r.body, r.signature FROM receipt r
  WHERE r.id IN (SELECT receipt FROM voucher_out WHERE peer = ? AND receipt IS NOT NULL)
  ORDER BY r.id
"""
_TIMES: Final = """
  SELECT (SELECT at_ms FROM entry WHERE peer = ?1 ORDER BY seq LIMIT 1),
    (SELECT at_ms FROM entry WHERE peer = ?1 ORDER BY seq DESC LIMIT 1)
"""
# Kinds 0 and 2, JOB and ARREARS, are documents.SERVICE.
_NAMED: Final = """
  SELECT id FROM item WHERE mine IN (0, 1) AND peer = ? AND kind IN (0, 2) AND id BETWEEN ? AND ?
"""
_ITEMS: Final = """
  SELECT mine, kind, lane, last_n FROM item
  WHERE mine IN (0, 1) AND peer = ? AND kind IN (0, 2) AND id = ? ORDER BY kind
"""
_ONE_OUT: Final = """
  SELECT v.body, v.signature, v.items, r.body, r.signature FROM voucher_out v
  LEFT JOIN receipt r ON r.id = v.receipt WHERE v.peer = ? AND v.lane = ? AND v.n = ?
"""
_ONE_IN: Final = """
  SELECT body, signature, items, NULL, NULL FROM voucher_in
  WHERE peer = ? AND lane = ? AND n = ?
"""


class Issued(NamedTuple):
    """A document, and what it proves."""

    document: Document
    proof: Proof


class _Pair(NamedTuple):
    """This book and the other one's owner: who they are, and all their keys."""

    name: PeerId
    """What the book calls the peer: its first id."""
    parties: tuple[Party, Party]
    keys: PayerPayee
    """Of issuer and peer."""

    @property
    def version(self) -> int:
        return VERSION_KEYS if any(party.successions for party in self.parties) else VERSION

    def alone(self) -> _Pair:
        """This book's own node on both sides."""
        own, keys = self.parties[0], self.keys[0]
        return self._replace(parties=(own, own), keys=(keys, keys))

    def payer_and_payee(self, *, mine: bool) -> PayerPayee:
        issuer, peer = self.keys
        return (issuer, peer) if mine else (peer, issuer)


def statement(peer: str, issued_ms: int, verify: Verify) -> Query[Issued]:
    """All that this book can prove about `peer` (its id, or the end of it).

    Raises:
        RequestError: BAD_REQUEST, no single peer is named so.
        StatementError: the book is damaged; an audit says where.
    """
    pair = yield from _pair(peer)
    to = _summed((yield _IN, (pair.name,)), [], pair.payer_and_payee(mine=False))
    out = yield _OUT, (pair.name,)
    receipts = yield _RECEIPTS, (pair.name,)
    by = _summed(out, receipts, pair.payer_and_payee(mine=True))
    ((since_ms, until_ms),) = yield _TIMES, (pair.name,)
    issuer, other = pair.parties
    document = Statement(
        version=pair.version,
        issuer=issuer,
        peer=other,
        issued_ms=issued_ms,
        since_ms=min(since_ms or 0, until_ms or 0),
        until_ms=max(since_ms or 0, until_ms or 0),
        net=to.total - by.total,
        owed_to_issuer=to,
        owed_by_issuer=by,
    )
    return Issued(document, verify_document(document, verify))


def _later(public_key: bytes, prefixed: bytes, signature: bytes) -> bool:
    """While the sums are taken; every signature is checked in the whole document, once."""
    return True


def _summed(vouchers: Rows, receipts: Rows, keys: PayerPayee) -> Direction:
    """`vouchers`: body, signature, items, number of the receipt."""
    wanted = {row[3] for row in vouchers}
    shown = [SignedReceipt(body=b.hex(), signature=s.hex()) for i, b, s in receipts if i in wanted]
    return summed([_shown(row) for row in vouchers], shown, keys, _later)


def _shown(row: tuple[Any, ...], only: tuple[int, bytes] | None = None) -> SignedVoucher:
    """A stored voucher; where `only` one item (kind, id) is anybody's business, the rest hashed."""
    items = [bytes(raw) for raw in _items.decode(row[2])]
    return SignedVoucher(
        body=row[0].hex(),
        signature=row[1].hex(),
        items=[
            ShownItem(item=raw.hex())
            if only is None or _name_of(raw) == only
            else ShownItem(hash=digest(raw).hex())
            for raw in items
        ],
    )


def _name_of(encoded: bytes) -> tuple[int, bytes]:
    item = msgspec.msgpack.decode(encoded, type=Item)
    return item.kind, item.id


def job_statement(
    peer: str, prefix: str, attempts: Collection[AttemptId], issued_ms: int, verify: Verify
) -> Query[Issued]:
    """What was signed for one attempt: one that begins with `prefix`, or is in `attempts`.

    Raises:
        RequestError: BAD_REQUEST, no single peer or attempt is named so.
        StatementError: the book is damaged; an audit says where.
    """
    pair = yield from _pair(peer)
    attempt = yield from _attempt(pair.name, prefix, attempts)
    found = yield _ITEMS, (pair.name, attempt)
    mine = bool(found[0][0])
    keys = pair.payer_and_payee(mine=mine)
    proofs: list[JobProof] = []
    for _, kind, lane, n in (row for row in found if bool(row[0]) == mine):
        (row,) = yield (_ONE_OUT if mine else _ONE_IN), (pair.name, lane, n)
        receipt = SignedReceipt(body=row[3].hex(), signature=row[4].hex()) if row[3] else None
        proofs.append(job_proof(attempt, _shown(row, only=(kind, attempt)), receipt, keys, _later))
    issuer, other = pair.parties
    document = JobStatement(
        version=pair.version,
        issuer=issuer,
        peer=other,
        issued_ms=issued_ms,
        payer=peer_id(keys[0][0]),
        attempt=attempt.hex(),
        amount=sum(proof.amount for proof in proofs),
        proofs=proofs,
    )
    return Issued(document, verify_document(document, verify))


def evidence(text: str, issued_ms: int, verify: Verify) -> Query[list[Issued]]:
    """What this book holds against `text` (a peer's id, or the end of it), or against everybody.

    Raises:
        RequestError: BAD_REQUEST, no single peer is named so.
        StatementError: the book is damaged; an audit says where.
    """
    own = yield "SELECT public_key FROM identity", ()
    mine = {peer_id(key) for (key,) in own}
    peers = [peer for (peer,) in (yield accusing.ACCUSED, ())]
    if text and not any(name.endswith(text) for name in mine):
        peers = [(yield from find_peer(text))]
    elif text:
        peers = [peer for peer in peers if peer in mine]
    found = []
    for peer in peers:
        rows = yield accusing.KEPT, (peer,)
        pair = yield from _known_pair(peer)
        if peer in mine:
            pair = pair.alone()
        if rows:
            found.append(_accused(pair, rows, issued_ms, verify))
    return found


def _accused(pair: _Pair, rows: Rows, issued_ms: int, verify: Verify) -> Issued:
    issuer, other = pair.parties
    document = Evidence(
        version=pair.version,
        issuer=issuer,
        peer=other,
        issued_ms=issued_ms,
        proofs=[accusing.as_bodies(row) for row in rows],
    )
    return Issued(document, verify_document(document, verify))


def _pair(text: str) -> Query[_Pair]:
    peer = yield from find_peer(text)
    return (yield from _known_pair(peer))


def _known_pair(peer: PeerId) -> Query[_Pair]:
    own = yield "SELECT public_key, proof FROM identity ORDER BY n", ()
    later = yield "SELECT key_peer, proof FROM peer_key WHERE peer = ? ORDER BY n", (peer,)
    theirs = [(public_key(peer), None), *((public_key(name), proof) for name, proof in later)]
    parties = _party(own), _party(theirs)
    issuer, other = (tuple(key for key, _ in reversed(known)) for known in (own, theirs))
    return _Pair(peer, parties, (issuer, other))


def _party(known: Sequence[tuple[Any, ...]]) -> Party:
    """`known`: its keys, each with the proof by the one before it, the oldest first."""
    key = known[-1][0]
    proofs = tuple(proof.hex() for _, proof in known[1:])
    return Party(peer=peer_id(key), public_key=key.hex(), successions=proofs)


def _attempt(peer: PeerId, prefix: str, attempts: Collection[AttemptId]) -> Query[bytes]:
    found: set[bytes] = set()
    if _is_hex(prefix):
        low, high = (bytes.fromhex(prefix.ljust(2 * ID_BYTES, digit)) for digit in "0f")
        found |= {row[0] for row in (yield _NAMED, (peer, low, high))}
    for attempt in attempts:
        found |= {row[0] for row in (yield _NAMED, (peer, attempt, attempt))}
    if len(found) != 1:
        names = ", ".join(sorted(attempt.hex() for attempt in found))
        raise RequestError(
            f"{prefix!r} names {len(found)} attempts: {names}"
            if found
            else f"nothing was signed with this peer for an attempt or job {prefix!r}",
            code="BAD_REQUEST",
            next_step="`aivillage-node history --json --peer PEER` lists attempts in full",
        )
    return found.pop()


def _is_hex(text: str) -> bool:
    return 0 < len(text) <= 2 * ID_BYTES and not set(text) - set("0123456789abcdef")
