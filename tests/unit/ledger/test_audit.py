"""The audit: clean books pass, and each kind of tampering is named."""

import apsw
import msgspec
import pytest

from aivillage.ledger.audit import _ATTR, _SERVICE, audit
from aivillage.ledger.queries import run
from aivillage.protocols.envelope import is_signed_by
from tests.unit.ledger.test_steps import (  # the same modules under test
    BUYER,
    SELLER,
    A,
    B,
    book,
    exposure,
    forged,
    item,
    payer,
    sign,
    take,
)

_TRIGGERS = "SELECT name FROM sqlite_schema WHERE type = 'trigger'"


@pytest.fixture
def books_of_two():
    buyer, seller = book(A), book(B)
    exposure.certify(seller, BUYER, 1_000, 160, 1)
    for amount in range(1, 6):
        take(seller, sign(buyer, item(1, amount * 10), item(2, amount)))
    for db in (buyer, seller):
        for (name,) in db.execute(_TRIGGERS).fetchall():
            db.execute(f"DROP TRIGGER {name}")
    return buyer, seller


def report(db):
    return run(db, audit(is_signed_by))


def test_clean_books_pass(books_of_two):
    for db in books_of_two:
        result = report(db)
        assert (result.ok, result.first_error) == (True, "")
        assert (result.entries, result.vouchers) == (5, 5)


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("UPDATE entry SET at_ms = at_ms + 1 WHERE seq = 3", "entry 3: its hash"),
        ("UPDATE entry SET kind = 'receive' WHERE seq = 3", "entry 3: its hash"),
        ("UPDATE entry SET hash = zeroblob(32) WHERE seq = 2", "entry 2: its hash"),
        ("UPDATE entry SET prev = zeroblob(32) WHERE seq = 4", "entry 4: does not follow"),
        ("UPDATE entry SET body_hash = zeroblob(32) WHERE seq = 4", "entry 4: its hash"),
        ("UPDATE posting SET amount = amount + 1 WHERE seq = 2 AND leg = 0", "entry 2: its post"),
        ("UPDATE posting SET attempt = zeroblob(16) WHERE seq = 5 AND leg = 1", "entry 5: its ha"),
        ("DELETE FROM posting WHERE seq = 5", "entry 5: its postings"),
        ("PRAGMA foreign_keys=OFF; DELETE FROM entry WHERE seq = 1", "entry 2: does not follow"),
        ("PRAGMA foreign_keys=OFF; DELETE FROM entry WHERE seq = 5", "account "),
        ("UPDATE bal SET amount = amount + 1", "balance of"),
        ("UPDATE voucher_{side} SET body = zeroblob(90) WHERE n = 2", "voucher 2"),
        ("UPDATE voucher_{side} SET signature = zeroblob(65) WHERE n = 2", "voucher 2"),
        ("UPDATE voucher_{side} SET items = x'90' WHERE n = 2", "voucher 2"),
        ("UPDATE voucher_{side} SET cum = cum + 1 WHERE n = 5", "voucher 5"),
        ("DELETE FROM voucher_{side} WHERE n = 5", "entry 5: the voucher"),
        ("UPDATE lane_{side} SET cum = cum + 1", "lane "),
        ("UPDATE lane_{side} SET n = n + 1", "lane "),
        ("DELETE FROM lane_{side}", "lane "),
    ],
)
def test_tampering_is_named(books_of_two, statement, named):
    for db, side in zip(books_of_two, ("out", "in"), strict=True):
        before = db.total_changes()
        for part in statement.format(side=side).split("; "):
            db.execute(part)
        if "kind = 'receive'" in statement and side == "in":
            continue  # it is one already
        assert db.total_changes() > before
        result = report(db)
        assert not result.ok
        assert named in result.first_error


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("UPDATE item SET amount = amount + 1", "items do not add up"),
        ("UPDATE peer SET paid = paid - 1", "counts as paid"),
        ("UPDATE lane_in SET attr = attr - 1", "items do not add up"),
    ],
)
def test_a_changed_counter_of_the_seller_is_named(books_of_two, statement, named):
    _, seller = books_of_two
    seller.execute(statement)
    assert named in report(seller).first_error


def test_each_byte_of_a_signed_body_counts(books_of_two):
    buyer, _ = books_of_two
    ((body,),) = buyer.execute("SELECT body FROM voucher_out WHERE n = 3").fetchall()
    for place in range(len(body)):
        changed = bytearray(body)
        changed[place] ^= 1
        buyer.execute("UPDATE voucher_out SET body = ? WHERE n = 3", (bytes(changed),))
        assert "voucher 3" in report(buyer).first_error


def test_a_forged_receipt_is_named(books_of_two):
    buyer, _ = books_of_two
    buyer.execute("INSERT INTO receipt VALUES (1, ?, x'90', zeroblob(65))", (SELLER,))
    assert "receipt 1" in report(buyer).first_error
    assert payer.count_unreceipted(buyer, SELLER) == 1
    assert isinstance(buyer, apsw.Connection)


def test_another_signed_voucher_in_the_place_of_the_booked_one_is_named(books_of_two):
    _, seller = books_of_two
    other = forged(5, 55, item(1, 50), item(3, 5))
    seller.execute(
        "UPDATE voucher_in SET body = ?, signature = ?, items = ? WHERE n = 5",
        (other.body, other.signature, msgspec.msgpack.encode(other.items)),
    )
    assert report(seller).first_error == "entry 5: the voucher behind it is missing"


def test_each_pass_is_heard_of_in_turn(books_of_two):
    heard = []
    run(books_of_two[0], audit(is_signed_by, heard.append))
    assert heard.index("vouchers out") < heard.index("entries") < heard.index("balances")


@pytest.mark.parametrize("query", [_ATTR, _SERVICE])
def test_items_are_summed_by_lane_in_one_pass(books_of_two, query):
    """A node of a thousand boots has a thousand lanes of a peer, and no index of their items."""
    buyer, *_ = books_of_two
    plan = [row[3] for row in buyer.execute(f"EXPLAIN QUERY PLAN {query}")]
    assert not [step for step in plan if "CORRELATED" in step]
