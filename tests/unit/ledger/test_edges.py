"""Each counter beside another peer's, each limit at its last unit: what a sample of small changes
to the ledger's steps (`make mutation`) showed that nobody looked at."""

import apsw
import pytest

from aivillage.ledger import books, exposure, payer, sync
from aivillage.ledger.books import Pair
from aivillage.ledger.exposure import Word
from aivillage.protocols.types import peer_id
from aivillage.protocols.vouchers import JOB, LaneState, lane_of
from tests.unit.ledger.test_steps import (
    BUYER,
    DAY,
    NOW,
    SELLER,
    WALLET,
    A,
    B,
    ask,
    body_of,
    book,
    claim,
    forged,
    item,
    pay,
    sign,
    take,
)

OTHER, THIRD, FOURTH = (peer_id(bytes([n]) * 32) for n in (3, 4, 5))


@pytest.fixture
def buyer():
    return book(A)


@pytest.fixture
def seller():
    db = book(B)
    exposure.certify(db, BUYER, 1_000, 160, NOW)
    return db


def counters(db, peer, *, balance=0, **row):
    """A peer whose row says so, whatever led to it."""
    names = ", ".join(["peer", *row])
    marks = ", ".join(["?"] * (1 + len(row)))
    db.execute(f"INSERT INTO peer({names}) VALUES ({marks})", (peer, *row.values()))
    db.execute("INSERT INTO bal VALUES (?, ?, ?)", (peer, balance, NOW))


# ------------------------------------------------------------------ exposure


def test_what_was_written_off_is_no_gap_any_more(seller):
    counters(seller, OTHER, known=1, exposure=400, reserved=50, paid=20, healed_ms=NOW)
    assert exposure.heal(seller, OTHER, NOW + DAY).written_off == 30
    assert exposure.heal(seller, OTHER, NOW + 2 * DAY).written_off == 30
    assert Pair(OTHER, reserved=50, paid=20, written_off=10).unsigned == 20


def test_a_strangers_share_is_what_it_took_or_owes_and_never_more_than_it_was_lent(seller):
    counters(seller, OTHER, reserved=50, paid=50, balance=20)
    counters(seller, THIRD, reserved=50, paid=20, balance=-30)
    assert exposure.relieve_pool(seller, 1_000, NOW) == 0
    assert exposure.relieve_pool(seller, 1_000, NOW + DAY) == 20 + 30


def test_who_shares_a_strangers_pool_is_counted_to_the_last_micro_credit(seller):
    counters(seller, OTHER, reserved=50, paid=20)
    counters(seller, THIRD, reserved=9, paid=9)
    assert exposure.others_share(seller, books.read_pair(seller, FOURTH)) == 30
    assert exposure.others_share(seller, books.read_pair(seller, OTHER)) == 0


def test_devices_share_with_their_owners_other_known_devices_only(seller):
    counters(seller, OTHER, known=1, owner="ann", balance=5)
    counters(seller, THIRD, known=1, owner="ann", balance=30)
    counters(seller, FOURTH, known=1, owner="bob", balance=11)
    counters(seller, SELLER, known=0, owner="ann", reserved=7)
    assert exposure.others_share(seller, books.read_pair(seller, OTHER)) == 30
    assert exposure.others_share(seller, books.read_pair(seller, FOURTH)) == 0


def test_the_owners_word_makes_a_peer_known(seller):
    pair = exposure.decree(seller, OTHER, Word(line=70), NOW)
    assert (pair.known, pair.line) == (True, 70)


@pytest.mark.parametrize(
    ("before", "now", "healed"), [(1, False, NOW), (1, True, 5), (0, False, 5), (0, None, 5)]
)
def test_only_the_time_of_a_block_that_ends_counts_for_no_healing(seller, before, now, healed):
    counters(seller, OTHER, known=1, blocked=before, healed_ms=5)
    exposure.decree(seller, OTHER, Word(blocked=now), NOW)
    assert books.one(seller, "SELECT healed_ms FROM peer WHERE peer = ?", (OTHER,)) == (healed,)


def test_a_stranger_counts_for_nothing(seller):
    assert books.read_pair(seller, OTHER) == Pair(
        OTHER, known=False, line=0, exposure=0, received_line=0, epoch=0, reserved=0, paid=0,
        written_off=0, arrears=0, balance=0, routed=0, blocked=False, shared=False,
    )  # fmt: skip


# ------------------------------------------------------------------ vouchers


def test_the_same_amount_is_not_signed_twice(buyer):
    assert sign(buyer, item(1, 10)) is not None
    assert sign(buyer, item(1, 10)) is None


def test_a_lane_counts_the_vouchers_that_are_stored(buyer, seller):
    vouchers = [sign(buyer, item(n, 10, final=True)) for n in (1, 2, 3)]
    for voucher in (vouchers[2], vouchers[0], vouchers[0]):
        take(seller, voucher)
    assert books.one(seller, "SELECT n, count FROM lane_in") == (3, 2)


def test_an_older_voucher_of_mine_that_comes_back_makes_its_lane_be_hashed_anew(buyer):
    own = book(A)
    vouchers = [sign(own, item(n, 10, final=True)) for n in (1, 2)]
    with buyer:
        payer.adopt(buyer, SELLER, vouchers[1], NOW)
        buyer.execute("UPDATE lane_out SET fold = x'00'")
        counters(buyer, OTHER)
        buyer.execute("INSERT INTO lane_out VALUES (?, ?, 1, 0, 0, 0, x'01')", (OTHER, WALLET.lane))
        payer.adopt(buyer, SELLER, vouchers[0], NOW)
    folds = dict(books.rows(buyer, "SELECT peer, fold FROM lane_out"))
    assert folds == {SELLER: None, OTHER: b"\x01"}


def test_an_older_voucher_of_mine_that_adds_nothing_is_no_entry(buyer):
    own = book(A)
    vouchers = [sign(own, item(1, 10)), sign(own, item(1, 10, final=True))]
    with buyer:
        for voucher in reversed(vouchers):
            payer.adopt(buyer, SELLER, voucher, NOW)
    assert books.one(buyer, "SELECT count(*) FROM entry") == (1,)
    assert books.one(buyer, "SELECT count(*) FROM voucher_out") == (2,)


def test_an_older_voucher_that_says_less_of_an_item_is_not_kept(seller):
    """Though there is money on its lane that no item explains: one of the first voucher's."""
    take(seller, forged(2, 20, item(2, 10)))
    take(seller, forged(1, 10, item(2, 5)))
    assert books.rows(seller, "SELECT n FROM voucher_in") == [(2,)]
    take(seller, forged(1, 10, item(1, 10)))
    assert books.rows(seller, "SELECT n FROM voucher_in ORDER BY n") == [(1,), (2,)]
    assert books.one(seller, "SELECT cum, attr FROM lane_in") == (20, 20)


def test_a_book_is_read_by_plans_that_no_value_changes(tmp_path):
    db = apsw.Connection(str(tmp_path / "ledger.db"))
    books.configure(db)
    assert db.config(apsw.SQLITE_DBCONFIG_ENABLE_QPSG, -1) == 1
    db.close()


def test_two_copies_of_one_identity_leave_a_proof_of_it(buyer):
    sign(buyer, item(1, 10))
    other = sign(book(A), item(2, 11))
    with buyer:
        payer.adopt(buyer, SELLER, other, NOW)
    (kept,) = books.rows(buyer, "SELECT payer, n, second_body FROM evidence")
    assert kept == (BUYER, 1, other.body)
    assert books.read_pair(buyer, SELLER).balance == -10


def test_the_first_proof_is_news_and_the_same_one_is_not(seller):
    take(seller, forged(1, 10, item(1, 10)))
    liar = forged(1, 11, item(2, 11))
    assert take(seller, liar).proof is not None
    assert take(seller, liar).proof is None


# ------------------------------------------------------------------ claims and SYNC


def test_the_last_micro_credit_of_a_claim_is_paid(buyer):
    payer.intend(buyer, SELLER, bytes([1]) * 16, b"q", 100, NOW)
    sign(buyer, item(1, 99))
    assert pay(buyer, claim(1, 5_000)) == 1


def test_a_claim_is_less_by_what_was_paid_to_its_claimant_for_that_very_work(buyer):
    payer.intend(buyer, SELLER, bytes([1]) * 16, b"q", 100, NOW)
    sign(buyer, item(2, 40))
    (number,) = books.one(buyer, "SELECT max(id) FROM voucher_out")
    for mine, peer in ((0, SELLER), (1, OTHER)):
        said = (mine, peer, JOB, bytes([1]) * 16, WALLET.lane, 50, 1, 0, number)
        buyer.execute("INSERT INTO item VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", said)
    assert sync.justified(buyer, SELLER, claim(1, 5_000)) == 100


def test_an_answer_takes_what_was_forgotten_and_what_was_not_seen_up_to_its_limit(
    buyer, seller, monkeypatch
):
    for number in (1, 2):
        take(seller, sign(buyer, item(number, 10, final=True)))
    wallet = payer.Wallet(B, lane_of(5, b"lane-two"))
    own = []
    for number in (3, 4):
        with seller:
            wanted = [item(number, 10, final=True)]
            own.append(payer.make_voucher(seller, wallet, BUYER, wanted, NOW))
    for most, mine, more in ((3, 1, True), (4, 2, False)):
        monkeypatch.setattr(sync, "VOUCHERS_MAX", most)
        found = ask(seller, BUYER, 6, {})
        assert [body_of(v).n for v in found.yours] == [1, 2]
        assert (found.mine, found.more) == (own[:mine], more)
    seen = {(False, wallet.lane): LaneState(False, wallet.lane, 2, (1, 2))}
    assert ask(seller, BUYER, 6, seen).mine == own, "held, and not confirmed"


def test_a_budget_that_is_spent_pays_nothing(buyer):
    exposure.set_received(buyer, SELLER, 600, 60)
    for number in (1, 2):
        payer.intend(buyer, SELLER, bytes([number]) * 16, b"q", 100, NOW)
    assert pay(buyer, claim(1, 60)) == 60
    assert sync.arrears_left(buyer, SELLER) == 0
    assert pay(buyer, claim(2, 60)) == 0
