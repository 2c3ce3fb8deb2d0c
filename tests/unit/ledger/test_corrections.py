"""What the owner no longer counts on, and books of an older schema."""

import pathlib

import apsw
import pytest

from aivillage.ledger import books, corrections, exposure
from aivillage.ledger.audit import audit
from aivillage.ledger.queries import balance, run
from aivillage.protocols.errors import ConfigError, RequestError
from tests.house import ROOT
from tests.simulation.scenes import Village, present

DAY_MS = 86_400_000
DATA = pathlib.Path(ROOT) / "tests" / "data"


@pytest.fixture
def debt():
    """(village, debtor, creditor): 30 are owed."""
    village = Village()
    debtor, creditor, _ = village.nodes
    present(debtor, creditor, 30)
    village.rest()
    return village, debtor, creditor


def cost(node):
    row = books.one(node.db, "SELECT amount FROM account WHERE account = 'writeoff'")
    return row[0] if row else 0


def write_off(debt, amount):
    village, debtor, creditor = debt
    with creditor.db:
        return corrections.write_off(
            creditor.db, debtor.id, amount, "gone", village.world.nodes[0].clock.unix_ms()
        )


def test_a_debt_is_written_off_in_parts_and_stays_what_was_signed(debt):
    assert write_off(debt, 10) == 10
    assert write_off(debt, None) == 20
    village, debtor, creditor = debt
    assert cost(creditor) == 30 == corrections.doubtful(creditor.db, debtor.id)
    assert village.owes(debtor, creditor) == 30
    village.end()


@pytest.mark.parametrize("amount", [0, -1, 31])
def test_no_more_is_written_off_than_is_owed(debt, amount):
    with pytest.raises(RequestError):
        write_off(debt, amount)
    write_off(debt, 30)
    with pytest.raises(RequestError):
        write_off(debt, None)


def test_who_pays_after_all_is_doubted_no_more(debt):
    write_off(debt, None)
    village, debtor, creditor = debt
    creditor.ledger.buying.give(debtor.id, 10, bytes(16), lambda: None, pytest.fail)
    village.rest()
    with creditor.db:
        corrections.write_back(creditor.db, 1)
        corrections.write_back(creditor.db, 1)
    assert cost(creditor) == 20 == corrections.doubtful(creditor.db, debtor.id)
    village.end()


def test_a_debt_without_movement_is_written_off_once(debt):
    village, debtor, creditor = debt
    now = creditor.clock.unix_ms()
    with creditor.db:
        corrections.expire(creditor.db, 30, now + 29 * DAY_MS)
        assert cost(creditor) == 0
        corrections.expire(creditor.db, 30, now + 31 * DAY_MS)
        corrections.expire(creditor.db, 30, now + 32 * DAY_MS)
    assert cost(creditor) == 30
    assert cost(debtor) == 0
    village.end()


def test_the_owner_forgives_a_gap_whole():
    village = Village()
    node, peer, _ = village.nodes
    with node.db:
        exposure.reserve(node.db, peer.id, 0, 20, 0)
        assert exposure.forgive_gap(node.db, peer.id).written_off == 20
        assert exposure.forgive_gap(node.db, peer.id).written_off == 20


def test_what_was_forgiven_though_only_reserved_is_not_given_back():
    """The owner forgives 160 while 141 are delivered; then the sale goes on, and ends."""
    village = Village()
    node, peer, _ = village.nodes
    with node.db:
        node.db.execute("UPDATE peer SET reserved = 160 WHERE peer = ?", (peer.id,))
        exposure.forgive_gap(node.db, peer.id)
        node.db.execute("UPDATE peer SET reserved = 165 WHERE peer = ?", (peer.id,))
        assert exposure.release(node.db, peer.id, 141).reserved == 160
        assert exposure.release(node.db, peer.id, 150).reserved == 160
    report = run(node.db, audit(node.signer.verify))
    assert report.ok, report.first_error


def test_strangers_are_forgiven_a_day_at_most_whatever_the_clock_says():
    village = Village()
    node, _, _ = village.nodes
    with node.db:
        node.db.execute("INSERT INTO peer(peer, reserved) VALUES ('stranger', 20)")
        assert exposure.relieve_pool(node.db, 8, DAY_MS) == 0
        assert exposure.relieve_pool(node.db, 8, 9 * DAY_MS) == 8
        assert exposure.relieve_pool(node.db, 8, 10 * DAY_MS) == 16
        assert exposure.relieve_pool(node.db, 8, 11 * DAY_MS) == 20
        node.db.execute("UPDATE peer SET paid = 15 WHERE peer = 'stranger'")
        assert exposure.relieve_pool(node.db, 8, 11 * DAY_MS) == 5


def old_book(name):
    db = apsw.Connection(":memory:")
    db.deserialize("main", (DATA / name).read_bytes())
    ((key,),) = db.execute("SELECT public_key FROM identity").fetchall()
    return db, key


@pytest.mark.parametrize("name", ["ledger_v1_buyer.db", "ledger_v1_seller.db"])
def test_a_book_of_schema_1_keeps_its_money(name):
    db, key = old_book(name)
    before = [books.rows(db, f"SELECT {what}") for what in WHAT_STAYS]
    books.prepare(db, key, 5)
    assert [books.rows(db, f"SELECT {what}") for what in WHAT_STAYS] == before
    assert books.one(db, "PRAGMA user_version") == (books.SCHEMA_VERSION,)
    assert books.own_keys(db) == (key,)
    assert run(db, balance()).net == before[0][0][0]
    books.prepare(db, key, 6)


WHAT_STAYS = [
    "coalesce(sum(amount), 0) FROM bal",
    "peer, lane, n, cum FROM lane_out ORDER BY 1, 2",
    "peer, lane, n, cum FROM lane_in ORDER BY 1, 2",
    "mine, peer, kind, id, amount FROM item ORDER BY 1, 2, 3, 4",
    "seq, hash FROM entry ORDER BY 1",
    "peer, reserved, paid, written_off FROM peer ORDER BY 1",
]


def test_a_book_of_a_later_schema_is_refused_and_unchanged():
    db, key = old_book("ledger_v1_buyer.db")
    db.execute("PRAGMA user_version = 99")
    with pytest.raises(ConfigError):
        books.prepare(db, key, 5)
    assert books.one(db, "PRAGMA user_version") == (99,)
