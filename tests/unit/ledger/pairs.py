"""Two books that traded with each other, for the tests of what is read from them."""

from __future__ import annotations

import msgspec

from aivillage.protocols.vouchers import (
    Receipt,
    ReceiptBody,
    ReceiptRow,
    digest,
    receipt_prefixed,
)
from tests.unit.ledger.test_steps import (  # the same modules under test
    BUYER,
    SELLER,
    WALLET,
    A,
    B,
    body_of,
    book,
    exposure,
    item,
    payee,
    payer,
    sign,
    take,
)

NAMES = {1: bytes([1]) * 16, 2: bytes([2]) * 16, 3: bytes([3]) * 16}
"""Attempts 1 and 2 of the buyer's; 3 is one that the seller bought from the buyer."""


def receipt_for(vouchers, signer=B, payer_key=A.public_key, attest=True):
    rows = tuple(ReceiptRow(body_of(v).n, digest(v.body), attest) for v in vouchers)
    body = msgspec.msgpack.encode(ReceiptBody(payer_key, body_of(vouchers[0]).lane, rows))
    return Receipt(body, signer.sign(receipt_prefixed(body)))


def note(db, receipt, peer=SELLER):
    body = msgspec.msgpack.decode(receipt.body, type=ReceiptBody)
    with db:
        payer.note_receipt(db, peer, body, receipt)


def traded():
    """(buyer, seller): 70 and 25 paid, of which 95 are confirmed but the last 5; 40 the other way.

    Attempt 1 ended at 70 with the voucher n 3, attempt 2 stands at 30.
    """
    buyer, seller = book(A), book(B)
    exposure.certify(seller, BUYER, 1_000, 160, 1)
    exposure.certify(buyer, SELLER, 1_000, 160, 1)
    vouchers = [
        sign(buyer, item(1, 10)),
        sign(buyer, item(1, 50)),
        sign(buyer, item(1, 70, final=True), item(2, 25)),
    ]
    for voucher in vouchers:
        take(seller, voucher)
    note(buyer, receipt_for(vouchers))
    sign(buyer, item(2, 30))  # never arrives
    back = payer.Wallet(B, WALLET.lane[:8] + b"lane-two")
    with seller:
        voucher = payer.make_voucher(seller, back, BUYER, [item(3, 40, final=True)], 2_000_000)
    with buyer:
        payee.book_voucher(buyer, SELLER, voucher, "receive", attest=True, at_ms=2_000_000)
    return buyer, seller
