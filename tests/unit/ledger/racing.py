"""Eight threads with connections of their own on one book, who all saw the last hundred."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import apsw

from aivillage.ledger import books, corrections, exposure, payee, payer, transfers
from aivillage.protocols.errors import AivillageError
from aivillage.protocols.types import peer_id
from tests.unit.ledger.test_steps import BUYER, NOW, SELLER, WALLET, A, B, book, item

THREADS = 8
THIRD = peer_id(b"\x07" * 32)


def owed_a_hundred(path):
    """A book in `path`: the seller owes it 100 and lends nothing; a third one may owe it 400."""
    other = book(B)
    with other:
        wallet = payer.Wallet(B, WALLET.lane)
        voucher = payer.make_voucher(other, wallet, BUYER, [item(1, 100, final=True)], NOW)
    db = apsw.Connection(str(path))
    books.configure(db)
    books.prepare(db, A.public_key, NOW)
    with db:
        for peer in (SELLER, THIRD):
            exposure.certify(db, peer, 4_000, 4_000, NOW)
        payee.book_voucher(db, SELLER, voucher, "receive", attest=True, at_ms=NOW)
    db.close()


def start_a_ring(db, number):
    """Pays the seller with what it owes; a third one is to owe it instead."""

    def sign(peer, wanted):
        return payer.make_voucher(db, WALLET, peer, [wanted], NOW)

    transfers.start(db, sign, (SELLER, THIRD), 100, bytes([number]) * 16, NOW)


def write_it_off(db, number):
    corrections.write_off(db, SELLER, 100, f"thread {number}", NOW)


def all_at_once(path, move):
    """How it went for each of eight threads: empty, or the code of the error.

    Nobody begins before all have read that the hundred is there.
    """
    all_saw_it, numbers = threading.Barrier(THREADS, timeout=30), itertools.count(1)

    def thread(number):
        db = apsw.Connection(str(path))
        try:
            db.set_busy_timeout(30_000)
            books.configure(db)
            assert books.read_pair(db, SELLER).balance == 100
            all_saw_it.wait()
            return _in_a_transaction(db, lambda: move(db, number))
        finally:
            db.close()

    with ThreadPoolExecutor(THREADS) as pool:
        return sorted(pool.map(thread, itertools.islice(numbers, THREADS)))


def _in_a_transaction(db, call):
    """As the writer of the product has it."""
    db.execute("BEGIN IMMEDIATE")
    try:
        call()
    except AivillageError as error:
        db.execute("ROLLBACK")
        return error.code
    db.execute("COMMIT")
    return ""
