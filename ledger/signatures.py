"""The passes of the audit over what somebody signed: keys, vouchers, receipts and proofs.

Signatures are nine tenths of the time of an audit. A voucher is read once.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from aivillage.ledger.queries import Query
from aivillage.ledger.signing import verified_receipt, verified_voucher
from aivillage.ledger.tally import Tally, WrongError
from aivillage.ledger.walk import PAGE
from aivillage.protocols import succession
from aivillage.protocols.envelope import Verify
from aivillage.protocols.errors import PeerError
from aivillage.protocols.types import peer_id
from aivillage.protocols.vouchers import (
    Item,
    Receipt,
    ReceiptBody,
    SignedBody,
    Voucher,
    VoucherBody,
    check_contradiction,
    digest,
)

_items: Final = msgspec.msgpack.Decoder(tuple[Item, ...])
_VOUCHERS: Final = {
    "in": "SELECT id, peer, lane, n, cum, body, signature, items FROM voucher_in"
    " WHERE id > ? ORDER BY id LIMIT ?",
    "out": "SELECT id, peer, lane, n, cum, body, signature, items FROM voucher_out"
    " WHERE id > ? ORDER BY id LIMIT ?",
}
_RECEIPTS: Final = "SELECT id, peer, body, signature FROM receipt WHERE id > ? ORDER BY id LIMIT ?"
_RECEIPTED: Final = """
  SELECT receipt, peer, lane, n, cum, body, attest FROM voucher_out
  WHERE receipt IS NOT NULL AND receipt BETWEEN ? AND ? ORDER BY receipt
"""
_PROOFS: Final = """
  SELECT id, payer, lane, n, first_body, first_signature, second_body, second_signature
  FROM evidence ORDER BY id
"""


def keys(tally: Tally, verify: Verify) -> Query[None]:
    """Each key but the first was named by the one before it, and agreed.

    Raises:
        WrongError: the first that was not.
    """
    former = ""
    for n, key, proof in (yield "SELECT n, public_key, proof FROM identity ORDER BY n", ()):
        if former:
            _check_step(f"key {n} of this book", proof, (former, peer_id(key)), verify)
        former, tally.mine = peer_id(key), (key, *tally.mine)
    rows = yield "SELECT peer, n, key_peer, proof FROM peer_key ORDER BY peer, n", ()
    for peer, n, name, proof in rows:
        known = tally.keys_of(peer)
        if n != len(known) + 1:
            raise WrongError(f"key {n} of {peer}: the one before it is missing")
        step = _check_step(f"key {n} of {peer}", proof, (peer_id(known[0]), name), verify)
        tally.theirs[peer] = (step.new_key, *known)


def _check_step(
    name: str, proof: bytes | None, wanted: tuple[str, str], verify: Verify
) -> succession.Step:
    try:
        step = succession.read(proof or b"", verify)
    except PeerError as error:
        raise WrongError(f"{name}: {error.message}") from None
    if (step.old, step.new) != wanted:
        raise WrongError(f"{name}: its proof is about other keys")
    return step


def vouchers(tally: Tally, verify: Verify, side: str) -> Query[None]:
    """Raises: WrongError: the first voucher that is wrong."""
    last = 0
    while page := (yield _VOUCHERS[side], (last, PAGE)):
        last = page[-1][0]
        for row in page:
            try:
                _check_voucher(tally, verify, side, row)
            except (PeerError, msgspec.DecodeError, ValueError) as error:
                raise WrongError(f"{_voucher_name(side, row)}: {error}") from None


def _voucher_name(side: str, row: tuple[Any, ...]) -> str:
    _, peer, lane, n, *_ = row
    return f"voucher {n} {'from' if side == 'in' else 'to'} {peer} on lane {lane.hex()}"


def _check_voucher(tally: Tally, verify: Verify, side: str, row: tuple[Any, ...]) -> None:
    """Raises: PeerError, DecodeError, ValueError: what is wrong with it."""
    _, peer, lane, n, cum, encoded, signature, items = row
    theirs = tally.keys_of(peer)
    payers, payees = (theirs, tally.mine) if side == "in" else (tally.mine, theirs)
    voucher = Voucher(encoded, signature, _items.decode(items))
    body = verified_voucher(voucher, payers, payees, verify)
    if (body.lane, body.n, body.cum) != (lane, n, cum):
        raise ValueError("its row and its signed body differ")
    tally.vouchers += 1
    place = (side, peer, lane)
    last_n, last_cum = tally.cums.get(place, (0, 0))
    if (n > last_n and cum < last_cum) or (n < last_n and cum > last_cum):
        raise ValueError("cum falls as n rises")
    tally.cums[place] = (max(n, last_n), max(cum, last_cum))


def receipts(tally: Tally, verify: Verify) -> Query[None]:
    """Each is signed, and confirms the vouchers that name it.

    Raises:
        WrongError: the first that is not, or does not.
    """
    last = 0
    while page := (yield _RECEIPTS, (last, PAGE)):
        bodies: dict[int, tuple[str, ReceiptBody]] = {}
        for number, peer, body, signature in page:
            try:
                theirs = tally.keys_of(peer)
                signed = Receipt(body, signature)
                bodies[number] = (peer, verified_receipt(signed, tally.mine, theirs, verify))
            except (PeerError, ValueError) as error:
                raise WrongError(f"receipt {number} of {peer}: {error}") from None
        for row in (yield _RECEIPTED, (last + 1, page[-1][0])):
            _check_receipted(tally, bodies, row)
        last = page[-1][0]
        tally.receipts += len(page)


def _check_receipted(
    tally: Tally, bodies: dict[int, tuple[str, ReceiptBody]], row: tuple[Any, ...]
) -> None:
    number, peer, lane, n, cum, voucher, attest = row
    who, receipt = bodies.get(number, ("", None))
    told = [r for r in receipt.rows if r.n == n] if receipt and receipt.lane == lane else []
    said = {(r.body_hash, int(r.attest)) for r in told}
    if who != peer or (digest(voucher), attest) not in said:
        raise WrongError(f"voucher {n} to {peer} on lane {lane.hex()}: its receipt does not say so")
    place = (peer, lane)
    tally.confirmed[place] = max(cum, tally.confirmed.get(place, 0))


def proofs(tally: Tally, verify: Verify) -> Query[None]:
    """Who is accused really signed both, and they really contradict each other.

    Raises:
        WrongError: the first proof that is none.
    """
    own = {peer_id(key) for key in tally.mine}
    for number, payer, lane, n, *signed in (yield _PROOFS, ()):
        first, second = SignedBody(*signed[:2]), SignedBody(*signed[2:])
        try:
            signers = tally.mine if payer in own else tally.keys_of(payer)
            families = (tally.mine, *tally.theirs.values())
            bodies = check_contradiction(signers, first, second, verify, families)
        except (PeerError, ValueError) as error:
            raise WrongError(f"evidence {number} against {payer}: {error}") from None
        if not _is_about(bodies, lane, n):
            raise WrongError(f"evidence {number} against {payer}: it is about another voucher")


def _is_about(bodies: tuple[VoucherBody, VoucherBody], lane: bytes, n: int) -> bool:
    return bodies[0].lane == lane and n in {body.n for body in bodies}
