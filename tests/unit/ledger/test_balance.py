"""Balance: kept sums only, and every figure explained by the others."""

import itertools

import apsw
import pytest

from aivillage.ledger import corrections, exposure
from aivillage.ledger.books import Cause, Leg, ensure_peer, keep_evidence, post
from aivillage.ledger.exposure import Word
from aivillage.ledger.queries import balance, favours, open_transfers, run
from tests.conftest import make_peer
from tests.unit.ledger.test_steps import BUYER, NOW, SELLER, A, B, book, item, sign, take

DAY = exposure.DAY_MS
BIG = {
    "entry",
    "posting",
    "voucher_in",
    "voucher_out",
    "item",
    "receipt",
    "transfer",
    "route",
    "favour",
}


@pytest.fixture
def seller():
    db = book(B)
    exposure.certify(db, BUYER, 1_000, 160, NOW)
    return db


def owe(db, peer, amount, account="earned"):
    """An entry that makes `peer` owe so much more."""
    legs = [Leg("peer", None, amount), Leg(account, None, -amount)]
    number = len(db.execute("SELECT 1 FROM entry").fetchall()) + 1
    with db:
        ensure_peer(db, peer)
        post(db, Cause(peer, b"l" * 16, number, b"%d" % number, "receive"), legs, NOW)


def rows(found):
    return {peer.peer: peer for peer in found.peers}


def plans(db, query):
    """What SQLite does for each statement of `query`."""
    steps, (sql, bindings) = [], next(query)
    while True:
        plan = db.execute(f"EXPLAIN QUERY PLAN {sql}", bindings).fetchall()
        steps += [row[3] for row in plan]
        try:
            sql, bindings = query.send(db.execute(sql, bindings).fetchall())
        except StopIteration:
            return steps


@pytest.mark.parametrize("query", [balance, open_transfers])
def test_no_table_that_grows_with_the_history_is_scanned(seller, query):
    owe(seller, BUYER, 100)
    with seller:
        corrections.write_off(seller, BUYER, 40, "why", NOW)
    names = {*BIG, "e", "p", "v", "r"}
    steps = plans(seller, query())
    assert steps
    scans = [step for step in steps if step.startswith("SCAN ") and step.split()[1] in names]
    assert [step for step in scans if "entry_correction" not in step] == []
    # Corrections are few, and found by an index of their own.
    entries = [step for step in steps if step.startswith("SCAN e ")]
    assert set(entries) <= {"SCAN e USING INDEX entry_correction"}
    assert bool(entries) == (query is balance)


def test_the_net_is_what_its_named_parts_say(seller):
    other = make_peer(50)
    exposure.certify(seller, other, 1_000, 160, NOW)
    owe(seller, BUYER, 700)
    owe(seller, other, -50, "spent")
    owe(seller, BUYER, 30, "gift")
    owe(seller, BUYER, 8, "unlabelled")
    owe(seller, other, -11, "routed")
    with seller:
        corrections.write_off(seller, BUYER, 200, "why", NOW)
    found = run(seller, balance())
    assert (found.net, found.earned, found.spent) == (677, 700, 50)
    assert (found.gifts, found.unlabelled, found.routed) == (30, 8, 11)
    assert (found.written_off, found.doubtful) == (200, 200)
    lost = found.written_off - found.doubtful
    assert found.net == (
        found.earned - found.spent + found.gifts + found.unlabelled - found.routed - lost
    )
    assert found.net == sum(peer.net for peer in found.peers)
    assert rows(found)[BUYER].doubtful == 200


def test_what_could_come_through_others_is_bounded_by_both_ends(seller):
    debtor, target, blocked, stranger = (make_peer(n) for n in range(51, 55))
    for peer in (debtor, target, blocked):
        exposure.certify(seller, peer, 1_000, 160, NOW)
    exposure.decree(seller, blocked, Word(blocked=True), NOW)
    for peer, amount in ((debtor, 300), (target, -100), (blocked, 500), (stranger, 40)):
        owe(seller, peer, amount)
    exposure.set_received(seller, BUYER, 60, 10)
    found = rows(run(seller, balance()))
    assert found[debtor].spendable == 300
    # What the debtor owes and the buyer lends; the target takes up to its line and what I owe it.
    assert found[target].through_others == 360
    assert found[debtor].through_others == 60
    assert found[blocked].through_others == found[stranger].through_others == 0
    exposure.decree(seller, target, Word(line=150), NOW)
    assert rows(run(seller, balance()))[target].through_others == 250


def test_devices_of_one_owner_stand_together_and_liars_are_counted(seller):
    one, two, alone = make_peer(60), make_peer(61), make_peer(62)
    for peer, owner in ((one, "anna"), (alone, None), (two, "anna")):
        exposure.certify(seller, peer, 1_000, 160, NOW, owner=owner)
    for n in (1, 2):
        keep_evidence(seller, alone, (b"l" * 16, n), (b"a", b"b", b"c", b"d"), NOW)
    found = run(seller, balance())
    owners = [peer.owner for peer in found.peers]
    assert owners == sorted(owners)
    assert {peer.peer for peer in found.peers if peer.owner == "anna"} == {one, two}
    assert rows(found)[alone].proofs == 2
    assert rows(found)[one].proofs == 0


def test_favours_are_summed_per_peer_and_listed_newest_first(seller):
    for number, (mine, worth) in enumerate([(1, 5), (0, 7), (0, 8)]):
        seller.execute(
            "INSERT INTO favour VALUES (?, ?, ?, ?, ?)",
            (mine, BUYER, bytes([number]) * 16, worth, NOW + number),
        )
    row = rows(run(seller, balance()))[BUYER]
    assert (row.helped_me, row.helped_it) == (5, 15)
    assert [favour.worth for favour in run(seller, favours(2))] == [8, 7]


@pytest.fixture(scope="module")
def generous():
    """Five thousand favours, both ways, by ten peers."""
    db = book(B)
    friends = [make_peer(70 + n) for n in range(10)]
    with db:
        for peer in friends:
            ensure_peer(db, peer)
        db.executemany(
            "INSERT INTO favour VALUES (?, ?, ?, ?, ?)",
            [
                (n % 2, friends[n % 10], n.to_bytes(16, "big"), n % 7, NOW + n // 3)
                for n in range(5_000)
            ],
        )
    return db


@pytest.mark.parametrize("query", [balance, lambda: favours(10)], ids=["balance", "favours"])
def test_favours_cost_a_read_the_same_however_many_there_are(generous, query):
    steps = itertools.count()
    generous.set_progress_handler(lambda: bool(next(steps) < 0), 10)
    try:
        run(generous, query())
    finally:
        generous.set_progress_handler(None)
    assert 10 * next(steps) < 2_500, "a walk through all takes some 50,000"


def test_the_kept_sums_of_favours_are_those_of_all(generous):
    found = run(generous, balance())
    assert sum(peer.helped_me for peer in found.peers) == sum(n % 7 for n in range(1, 5_000, 2))
    assert sum(peer.helped_it for peer in found.peers) == sum(n % 7 for n in range(0, 5_000, 2))
    newest = run(generous, favours(4))
    assert [favour.at_ms - NOW for favour in newest] == [1666, 1666, 1665, 1665]


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE favour SET worth = 1000000",
        "DELETE FROM favour",
        "UPDATE favour SET peer = 'somebody'",
    ],
)
def test_a_favour_is_never_changed_or_deleted(generous, statement):
    with pytest.raises(apsw.ConstraintError, match="a favour is never"):
        generous.execute(statement)


@pytest.mark.parametrize("how", ["INSERT OR REPLACE", "INSERT OR IGNORE", "INSERT"])
def test_a_favour_is_noted_once_and_not_over_the_first(generous, how):
    sums = "SELECT * FROM favour_sum"
    before = generous.execute(sums).fetchall()
    row = (0, make_peer(70), bytes(16), 9_999, 1)
    generous.execute(f"{how} INTO favour VALUES (?, ?, ?, ?, ?)", row)
    assert generous.execute(sums).fetchall() == before
    assert generous.execute("SELECT worth FROM favour WHERE attempt = ?", row[2:3]).get == 0


def test_in_transit_is_what_no_receipt_covers():
    buyer, seller = book(A), book(B)
    exposure.certify(seller, BUYER, 1_000, 160, NOW)
    take(seller, sign(buyer, item(1, 70, final=True)))
    assert rows(run(buyer, balance()))[SELLER].in_transit == 70
    with buyer:
        buyer.execute("UPDATE lane_out SET confirmed = 70")
    assert rows(run(buyer, balance()))[SELLER].in_transit == 0


# ------------------------------------------------------------------ the owner's word


def heard(db):
    (row,) = db.execute("SELECT line, exposure FROM peer WHERE peer = ?", (BUYER,)).fetchall()
    return row


def test_the_owners_word_can_be_taken_back(seller):
    exposure.decree(seller, BUYER, Word(line=50, exposure=20), NOW)
    exposure.certify(seller, BUYER, 900, 90, NOW)
    assert heard(seller) == (50, 20)
    exposure.decree(seller, BUYER, Word(by_village=True), NOW)
    assert heard(seller) == (900, 90)


def test_only_a_peer_without_an_exposure_gets_the_usual_one(seller):
    exposure.decree(seller, BUYER, Word(line=500, usual=20), NOW)
    assert heard(seller) == (500, 160)  # its village's
    exposure.certify(seller, BUYER, 0, 0, NOW)
    exposure.decree(seller, BUYER, Word(line=500, usual=20), NOW)
    assert heard(seller) == (500, 20)
    exposure.decree(seller, BUYER, Word(line=0, usual=30), NOW)
    exposure.decree(seller, BUYER, Word(line=700, usual=30), NOW)
    assert heard(seller) == (700, 20)  # the owner's own, kept


def test_a_blocked_peer_heals_nothing_nor_for_that_time(seller):
    seller.execute("UPDATE peer SET reserved = 1000, paid = 160 WHERE peer = ?", (BUYER,))
    exposure.decree(seller, BUYER, Word(blocked=True), NOW)
    for days in range(1, 9):
        assert exposure.heal(seller, BUYER, NOW + days * DAY).written_off == 0
    exposure.decree(seller, BUYER, Word(blocked=False), NOW + 9 * DAY)
    after = exposure.heal(seller, BUYER, NOW + 9 * DAY)
    assert after.written_off == 160 // exposure.RHO  # and not one day of allowance
    after = exposure.heal(seller, BUYER, NOW + 10 * DAY)
    assert after.written_off == 160 // exposure.RHO + 160 // 4
