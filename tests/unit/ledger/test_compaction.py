"""Compaction: what goes, what stays, and that nobody is fooled by what went."""

import os
import shutil

import apsw
import msgspec
import pytest

from aivillage.ledger import compaction, payee, payer
from aivillage.ledger.audit import audit
from aivillage.ledger.books import one
from aivillage.ledger.compaction import Cursor, compact
from aivillage.ledger.exposure import DAY_MS
from aivillage.ledger.ledger import open_ledger
from aivillage.ledger.queries import run
from aivillage.protocols.envelope import is_signed_by
from aivillage.protocols.types import AttemptId
from aivillage.protocols.vouchers import Receipt, ReceiptBody, digest, receipt_prefixed
from tests.unit.ledger.pairs import note, receipt_for
from tests.unit.ledger.test_ledger import BUYER, OUT, QUOTE, SELLER, join, pair, until
from tests.unit.ledger.test_ledger import A as KEY_A
from tests.unit.ledger.test_ledger import B as KEY_B
from tests.unit.ledger.test_steps import BUYER as PAYER
from tests.unit.ledger.test_steps import NOW, A, B, book, exposure, item, sign, take
from tests.unit.ledger.test_steps import SELLER as PAYEE

JOBS, VOUCHERS = 5, 6


def compact_all(db):
    """Every portion of a round."""
    cursor, portions = Cursor(), []
    while cursor is not None:
        with db:
            portions.append(compact(db, cursor, NOW))
        cursor = portions[-1].after
    return portions


def proofs(db, side, mine):
    """Every item with the voucher that names it last."""
    return db.execute(
        f"SELECT i.peer, i.kind, i.id, i.amount, v.body, v.signature, v.items FROM item i"
        f" JOIN voucher_{side} v ON v.peer = i.peer AND v.lane = i.lane AND v.n = i.last_n"
        " WHERE i.mine = ? ORDER BY i.id",
        (mine,),
    ).fetchall()


@pytest.fixture
def books_of_two():
    """Jobs one after the other, each paid in several vouchers, each receipted."""
    buyer, seller = book(A), book(B)
    exposure.certify(seller, PAYER, 10_000, 160, 1)
    said = []
    for job in range(1, JOBS + 1):
        for step in range(1, VOUCHERS + 1):
            voucher = sign(buyer, item(job, step * 10, step == VOUCHERS))
            said.append(voucher)
            confirm(buyer, voucher, take(seller, voucher))
    return buyer, seller, said


def confirm(buyer, voucher, booked):
    body = ReceiptBody(A.public_key, booked.lane, (booked.receipt,))
    encoded = msgspec.msgpack.encode(body)
    receipt = Receipt(encoded, B.sign(receipt_prefixed(encoded)))
    with buyer:
        payer.note_receipt(buyer, PAYEE, body, receipt)
    assert digest(voucher.body) == booked.receipt.body_hash


def test_after_compaction_the_audit_passes_and_every_proof_is_there(books_of_two):
    buyer, seller, said = books_of_two
    for db, side, mine in ((buyer, "out", 1), (seller, "in", 0)):
        before = proofs(db, side, mine)
        assert len(before) == JOBS
        assert sum(portion.vouchers for portion in compact_all(db)) == len(said) - JOBS
        assert one(db, f"SELECT count(*) FROM voucher_{side}") == (JOBS,)
        assert proofs(db, side, mine) == before
        report = run(db, audit(is_signed_by))
        assert report.ok, report.first_error
        assert report.entries == len(said)
    assert one(buyer, "SELECT count(*) FROM receipt") == (JOBS,)


def test_a_portion_looks_at_no_more_rows_than_it_may(books_of_two, monkeypatch):
    monkeypatch.setattr(compaction, "LOOKED_AT_ONCE", 4)
    buyer, _, said = books_of_two
    portions = compact_all(buyer)
    assert max(portion.looked for portion in portions) == 4
    assert sum(portion.looked for portion in portions) == len(said)
    assert sum(portion.receipts for portion in portions) == len(said) - JOBS
    assert sum(portion.vouchers for portion in compact_all(buyer)) == 0


def test_a_portion_scans_no_table(books_of_two):
    buyer, _, _ = books_of_two
    mine, receipt, unproven = compaction._SIDES["out"]
    queries = (
        (compaction._LOOKED.format(side="out"), (0, 10)),
        (
            compaction._SUPERSEDED.format(side="out", receipt=receipt, unproven=unproven),
            (mine, 0, 10),
        ),
        (compaction._UNUSED_RECEIPT, (1,)),
    )
    for sql, bindings in queries:
        plan = [row[3] for row in buyer.execute(f"EXPLAIN QUERY PLAN {sql}", bindings)]
        tables = ("v", "l", "i", "receipt", "voucher_out")
        assert not [step for step in plan if step in {f"SCAN {table}" for table in tables}]
    plan = [
        row[3]
        for row in buyer.execute("EXPLAIN QUERY PLAN SELECT 1 FROM voucher_out WHERE receipt = 1")
    ]
    assert "voucher_out_receipt" in plan[0]  # so that dropping a receipt looks at its vouchers only


def test_a_dropped_voucher_that_comes_again_is_recognised_and_changes_nothing(books_of_two):
    _, seller, said = books_of_two
    compact_all(seller)

    def state():
        tables = ("entry", "bal", "lane_in", "item", "voucher_in", "peer", "evidence")
        return [seller.execute(f"SELECT * FROM {table}").fetchall() for table in tables]

    before = state()
    for voucher in said:
        with seller:
            booked = payee.book_voucher(seller, PAYER, voucher, "receive", attest=True, at_ms=NOW)
        assert booked.receipt is not None
        assert booked.receipt.body_hash == digest(voucher.body)
        assert not booked.items
    assert state() == before


@pytest.mark.parametrize("side", ["in", "out"])
def test_the_schema_refuses_to_delete_a_proof(books_of_two, side):
    db = books_of_two[side == "in"]
    kept = {n for (n,) in db.execute("SELECT last_n FROM item")}
    assert len(kept) == JOBS
    for (n,) in db.execute(f"SELECT n FROM voucher_{side}").fetchall():
        if n in kept:
            with pytest.raises(apsw.ConstraintError, match="a proof is never deleted"):
                db.execute(f"DELETE FROM voucher_{side} WHERE n = ?", (n,))
        else:
            db.execute(f"DELETE FROM voucher_{side} WHERE n = ?", (n,))


def test_intents_go_once_a_claim_would_be_too_late(books_of_two):
    buyer, _, _ = books_of_two
    late = NOW + compaction.INTENT_DAYS * DAY_MS
    for number in range(2):
        payer.intend(buyer, PAYEE, AttemptId(bytes([number]) * 16), QUOTE, 10, NOW + number)
    with buyer:
        assert compact(buyer, Cursor("out"), late + 1).intents == 1
    assert one(buyer, "SELECT count(*) FROM intent") == (1,)


def test_what_was_confirmed_stays_proven_though_a_later_voucher_repeats_it():
    """Of six vouchers for one attempt four were confirmed; the fourth is kept with its receipt."""
    buyer = book(A)
    vouchers = [sign(buyer, item(1, 10 * n)) for n in range(1, 7)]
    note(buyer, receipt_for(vouchers[:4]))
    compact_all(buyer)
    assert buyer.execute("SELECT n FROM voucher_out ORDER BY n").fetchall() == [(4,), (6,)]
    report = run(buyer, audit(is_signed_by))
    assert report.ok, report.first_error
    with pytest.raises(apsw.ConstraintError, match="a proof is never deleted"):
        buyer.execute("DELETE FROM voucher_out WHERE n = 4")


async def test_a_restored_payer_is_healed_by_a_payee_that_compacted(tmp_path):
    """What the payee kept is enough: money, items and proofs of all that was forgotten."""
    async with open_ledger(tmp_path / "a.db", KEY_A):
        pass
    shutil.copy(tmp_path / "a.db", tmp_path / "backup.db")
    async with pair(tmp_path) as (a, b):
        join(a, b)
        for _ in range(4):
            attempt = AttemptId(os.urandom(16))
            a.intend(SELLER, attempt, QUOTE, 400)
            owed = a.owed_to(SELLER)
            for amount in (100, 200, 300):
                a.accept(SELLER, attempt, amount, OUT)
                await until(lambda n=owed + amount: a.owed_to(SELLER) == n)
            await a.settle(SELLER, attempt, 400, OUT)
        await until(lambda: b.view(BUYER).owed_to_me == 1_600)
        done = await b.compact(Cursor())
        assert done.vouchers >= 4
    for name in ("a.db", "a.db-wal", "a.db-shm"):
        (tmp_path / name).unlink(missing_ok=True)
    shutil.copy(tmp_path / "backup.db", tmp_path / "a.db")
    async with (
        open_ledger(tmp_path / "a.db", KEY_A) as a,
        open_ledger(tmp_path / "b.db", KEY_B) as b,
    ):
        join(a, b)
        await until(lambda: a.owed_to(SELLER) == 1_600)
        await until(lambda: a.view(SELLER).synced and b.view(BUYER).synced)
        for ledger in (a, b):
            report = await ledger.audit()
            assert report.ok, report.first_error
        assert len({row.attempt for row in await a.history()}) == 4
        assert b.view(BUYER).owed_to_me == 1_600
