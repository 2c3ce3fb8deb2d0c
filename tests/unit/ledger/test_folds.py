"""Digests of old lanes: equal where nothing is missing, cheap however many boots there were."""

import pytest

from aivillage.ledger import books, folds, payer, sync
from aivillage.ledger.folds import fold
from aivillage.protocols.vouchers import BLOB_BYTES_MAX, SyncDigest, encode, lane_of
from tests.unit.ledger.test_steps import BUYER, NOW, SELLER, A, book, item, take
from tests.unit.ledger.test_steps import seller as _seller

seller = _seller
BOOTS = 200


def boots(buyer, seller, count, lost=()):
    """One paid attempt a boot; the vouchers of `lost` boots never arrive."""
    for boot in range(1, count + 1):
        wallet = payer.Wallet(A, lane_of(boot, bytes(8)))
        attempt = item(1, 10, final=True)
        attempt = type(attempt)(0, boot.to_bytes(16, "big"), b"q", 10, b"o" * 32, True)
        with buyer:
            voucher = payer.make_voucher(buyer, wallet, SELLER, [attempt], NOW)
        if boot not in lost:
            take(seller, voucher)


@pytest.fixture
def buyer():
    return book(A)


def test_both_sides_fold_the_same_and_one_blob_says_so(buyer, seller):
    boots(buyer, seller, BOOTS)
    mine = fold(buyer, SELLER, BOOTS, mine=True)
    assert mine == fold(seller, BUYER, BOOTS, mine=False)
    assert mine.count == BOOTS - 1  # the boot that runs is listed
    lanes = sync.own_lanes(buyer, SELLER, sync.Epochs(BOOTS, 1))
    assert [state.n for state in lanes] == [1]
    blob = encode(BOOTS, SyncDigest(1, mine, fold(buyer, SELLER, 1, mine=False), tuple(lanes)))
    assert len(blob) < 200 < BLOB_BYTES_MAX


def test_an_equal_digest_is_answered_with_nothing(buyer, seller):
    boots(buyer, seller, 5)
    epochs = sync.Epochs(5, 1)
    lanes = {(s.mine, s.lane): s for s in sync.own_lanes(buyer, SELLER, epochs)}
    asked = sync.Asked(lanes, sync.digests(buyer, SELLER, epochs))
    answer = sync.answer(seller, BUYER, sync.Epochs(1, 5), asked)
    assert (answer.mine, answer.yours, answer.more) == ([], [], False)


@pytest.mark.parametrize("lost", [1, 3, 4])
def test_a_voucher_that_one_side_lacks_changes_the_digest(buyer, seller, lost):
    boots(buyer, seller, 5, lost={lost})
    epochs = sync.Epochs(5, 1)
    asked = sync.Asked({}, sync.digests(buyer, SELLER, epochs))
    answer = sync.answer(seller, BUYER, sync.Epochs(1, 5), asked)
    assert answer.more
    assert not answer.mine


def test_what_is_learned_later_changes_the_fold_that_was_kept(buyer, seller):
    boots(buyer, seller, 3, lost={2})
    before = fold(seller, BUYER, 3, mine=False)
    missing = payer.voucher_at(buyer, SELLER, lane_of(2, bytes(8)), 1)
    take(seller, missing)
    after = fold(seller, BUYER, 3, mine=False)
    assert before != after == fold(buyer, SELLER, 3, mine=True)
    assert books.rows(seller, "SELECT count(*) FROM lane_in WHERE fold IS NULL") == [(1,)]


@pytest.mark.parametrize("side", ["in", "out"])
def test_a_digest_reads_the_vouchers_of_its_lane_and_their_items(buyer, side):
    """Not all items of all lanes, for each voucher: what SQLite chooses by itself."""
    sql = f"EXPLAIN QUERY PLAN {folds._ITEMS.format(side)}"
    plan = [row[3] for row in buyer.execute(sql, (1, SELLER, bytes(16)))]
    assert "(peer=? AND lane=?)" in plan[0]
    assert "item_voucher (mine=? AND voucher=?)" in plan[1]
