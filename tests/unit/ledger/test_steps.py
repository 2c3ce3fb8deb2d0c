"""Each protocol step on a database: what it books, what it refuses, what a trigger forbids."""

import apsw
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aivillage.ledger import books, exposure, payee, payer, sync
from aivillage.ledger.signing import Ed25519Signer
from aivillage.protocols.errors import ConfigError, LedgerError
from aivillage.protocols.types import AMOUNT_MAX, peer_id
from aivillage.protocols.vouchers import (
    ARREARS,
    JOB,
    Claim,
    Item,
    LaneState,
    Voucher,
    VoucherBody,
    lane_of,
    root_of,
    voucher_prefixed,
)

A_KEY, B_KEY = (Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in (1, 2))
A, B = Ed25519Signer(A_KEY), Ed25519Signer(B_KEY)
BUYER, SELLER = peer_id(A.public_key), peer_id(B.public_key)
NOW, DAY = 1_000_000, 86_400_000
WALLET = payer.Wallet(A, lane_of(5, b"lane-one"))


def book(signer):
    db = apsw.Connection(":memory:")
    db.execute("PRAGMA foreign_keys=ON")
    books.prepare(db, signer.public_key, NOW)
    return db


@pytest.fixture
def buyer():
    return book(A)


@pytest.fixture
def seller():
    db = book(B)
    exposure.certify(db, BUYER, 1_000, 160, NOW)
    return db


def item(number, amount, final=False, kind=JOB):
    return Item(kind, bytes([number]) * 16, b"q", amount, b"o" * 32, final)


def sign(buyer, *items):
    with buyer:
        return payer.make_voucher(buyer, WALLET, SELLER, items, NOW)


def take(seller, voucher):
    with seller:
        return payee.book_voucher(seller, BUYER, voucher, "receive", attest=True, at_ms=NOW)


def forged(n, cum, *items):
    """What a dishonest payer signs: any n and cum with any items."""
    body = msgspec.msgpack.encode(VoucherBody(B.public_key, WALLET.lane, n, cum, root_of(items)))
    return Voucher(body, A.sign(voucher_prefixed(body)), items)


def ask(db, peer, epoch, lanes):
    """What `db` answers to a question that lists all lanes."""
    return sync.answer(db, peer, sync.Epochs(1, epoch), sync.Asked(lanes))


def body_of(voucher):
    return msgspec.msgpack.decode(voucher.body, type=VoucherBody)


def lane(db):
    return books.one(db, "SELECT n, cum, attr FROM lane_in")


# payer


def test_vouchers_are_cumulative_on_one_lane(buyer):
    first, second = sign(buyer, item(1, 10)), sign(buyer, item(1, 15), item(2, 5))
    assert [(body_of(v).n, body_of(v).cum) for v in (first, second)] == [(1, 10), (2, 20)]
    assert books.read_pair(buyer, SELLER).balance == -20


@pytest.mark.parametrize(
    "again",
    [item(1, 10, final=True), item(1, 9), item(1, 30), item(2, 0)],
)
def test_what_adds_nothing_or_comes_after_the_end_is_not_signed(buyer, again):
    sign(buyer, item(1, 10, final=True))
    assert sign(buyer, again) is None


def test_a_final_item_without_new_money_is_signed(buyer):
    sign(buyer, item(1, 10))
    assert body_of(sign(buyer, item(1, 10, final=True))).cum == 10


def test_nothing_is_signed_again_for_an_attempt_of_an_earlier_boot(buyer):
    sign(buyer, item(1, 10))
    later = payer.Wallet(A, lane_of(6, b"lane-two"))
    with buyer:
        assert payer.make_voucher(buyer, later, SELLER, [item(1, 20)], NOW) is None
        fresh = payer.make_voucher(buyer, later, SELLER, [item(2, 20)], NOW)
    assert (body_of(fresh).lane, body_of(fresh).n, body_of(fresh).cum) == (later.lane, 1, 20)


def test_only_telling_vouchers_are_sent_again(buyer):
    for amount in (1, 2, 3):
        sign(buyer, item(1, amount))
    sign(buyer, item(2, 1, final=True))
    assert payer.telling(buyer, SELLER, WALLET.lane, (1, 9), 9) == [3, 4]
    assert [body_of(v).n for v in payer.unreceipted(buyer, SELLER, 9)] == [3, 4]


def test_a_forgotten_voucher_is_adopted_once(buyer):
    sign(buyer, item(1, 10))
    image = buyer.serialize("main")
    forgotten = sign(buyer, item(1, 30))
    restored = apsw.Connection(":memory:")
    restored.deserialize("main", image)
    for _ in range(2):
        with restored:
            payer.adopt(restored, SELLER, forgotten, NOW)
    assert books.read_pair(restored, SELLER).balance == -30
    assert books.rows(restored, "SELECT kind FROM entry") == [("pay",), ("recover-pay",)]


@pytest.mark.parametrize(
    ("change", "spent"),
    [
        ({}, 20),
        ({"peer": BUYER}, 30),
        ({"kind": ARREARS}, 30),
        ({"id": bytes([2]) * 16}, 30),
        ({"lane": lane_of(4, b"lane-old")}, 30),
        ({"mine": 0}, 30),
    ],
)
def test_only_the_same_item_of_the_same_lane_was_counted_before(buyer, change, spent):
    """10 of 30 were booked: under another name they were for something else."""
    stored = {"mine": 1, "peer": SELLER, "kind": JOB, "id": bytes([1]) * 16, "lane": WALLET.lane}
    with buyer:
        buyer.execute(
            "INSERT INTO item VALUES (?, ?, ?, ?, ?, 10, 1, 0, 0)", (*(stored | change).values(),)
        )
        payer.adopt(buyer, SELLER, forged(2, 30, item(1, 30)), NOW)
    legs = books.rows(buyer, "SELECT amount FROM posting WHERE account = 'spent'")
    assert legs == [(spent,)]


# payee


def test_the_end_of_work_for_nothing_is_signed_and_moves_no_money(buyer, seller):
    booked = take(seller, sign(buyer, item(2, 0, final=True)))
    assert booked.receipt is not None
    assert books.one(seller, "SELECT amount, final FROM item") == (0, 1)
    assert books.rows(seller, "SELECT * FROM entry") == []
    assert books.read_pair(seller, BUYER).paid == 0


def test_a_voucher_is_booked_once(buyer, seller):
    voucher = sign(buyer, item(1, 10))
    first, second = take(seller, voucher), take(seller, voucher)
    assert first.receipt == second.receipt
    assert books.read_pair(seller, BUYER).balance == 10
    assert books.one(seller, "SELECT count(*) FROM entry") == (1,)


def test_a_late_voucher_gives_its_items_and_no_money(buyer, seller):
    first, second = sign(buyer, item(1, 10)), sign(buyer, item(2, 5))
    take(seller, second)
    assert lane(seller) == (2, 15, 5)
    assert take(seller, first).items == first.items
    assert lane(seller) == (2, 15, 15)
    assert books.read_pair(seller, BUYER).paid == 15


def test_items_never_count_beyond_cum(seller):
    take(seller, forged(1, 10, item(1, 8), item(2, 3)))
    assert lane(seller) == (1, 10, 8)
    assert books.read_pair(seller, BUYER).paid == 8


@pytest.mark.parametrize(("n", "cum"), [(2, 11), (3, 9), (1, 11)])
def test_a_voucher_that_contradicts_another_is_kept_as_evidence(seller, n, cum):
    take(seller, forged(2, 10, item(1, 10)))
    booked = take(seller, forged(n, cum, item(2, 1)))
    assert booked.receipt is None
    assert books.one(seller, "SELECT count(*) FROM evidence") == (1,)
    assert lane(seller) == (2, 10, 10)


def test_unlabelled_money_counts_once_the_lane_is_sealed(seller):
    take(seller, forged(3, 30, item(1, 10)))
    assert books.read_pair(seller, BUYER).paid == 10
    payee.seal(seller, BUYER, 5)
    assert books.read_pair(seller, BUYER).paid == 10  # the lane of this boot is open
    payee.seal(seller, BUYER, 6)
    assert books.read_pair(seller, BUYER).paid == 30
    take(seller, forged(2, 20, item(2, 10)))
    assert books.read_pair(seller, BUYER).paid == 30  # late items explain, they do not add


# exposure


def reserve(db, delivered, unit, peer=BUYER, pool=0):
    return exposure.reserve(db, peer, delivered, unit, pool).reserved


def test_a_reservation_goes_a_step_ahead_up_to_the_exposure(seller):
    assert reserve(seller, 0, 5) == 20  # X/8
    assert reserve(seller, 20, 60) == 80  # the dearest unit, where it is more
    assert reserve(seller, 150, 10) == 160
    assert reserve(seller, 160, 1) == 160


def test_a_unit_above_the_exposure_moves_nothing(seller):
    assert reserve(seller, 0, 161) == 0
    assert reserve(seller, 0, 160) == 160


def test_the_line_counts_what_is_owed(seller):
    take(seller, forged(1, 990, item(1, 990)))
    assert reserve(seller, 990, 10) == 1_000
    assert reserve(seller, 1_000, 1) == 1_000


def test_strangers_share_one_pool(seller):
    names = [peer_id(bytes([n]) * 32) for n in range(3)]
    assert [reserve(seller, 0, 10, name, pool=25) for name in names] == [10, 10, 0]
    assert reserve(seller, 0, 1, names[0], pool=0) == 10


def test_healing_is_bounded_by_what_was_paid_and_by_days(seller):
    take(seller, forged(1, 160, item(1, 160)))
    reserve(seller, 160, 160)
    assert exposure.heal(seller, BUYER, NOW).written_off == 10  # 160/16
    assert exposure.heal(seller, BUYER, NOW + DAY).written_off == 50  # and X/4 a day
    assert exposure.heal(seller, BUYER, NOW).written_off == 50
    assert exposure.heal(seller, BUYER, NOW + 1000 * DAY).written_off == 90  # a jump is one day


def test_late_money_takes_the_place_of_what_was_written_off(seller):
    take(seller, forged(1, 160, item(1, 160)))
    reserve(seller, 160, 160)
    exposure.heal(seller, BUYER, NOW)
    exposure.settle_gap(seller, BUYER, 165)
    assert books.read_pair(seller, BUYER).written_off == 5


# claims


def claim(number, amount):
    return Claim(bytes([number]) * 16, b"q", amount, b"o" * 32)


def pay(buyer, *claims, running=()):
    wallet = payer.Wallet(A, lane_of(9, b"lane-new"))
    with buyer:
        vouchers = sync.pay_claims(buyer, wallet, SELLER, claims, frozenset(running), NOW)
    return sum(i.amount for v in vouchers for i in v.items if i.kind == ARREARS)


def test_a_claim_is_paid_once_up_to_the_ceiling_less_what_was_paid(buyer):
    payer.intend(buyer, SELLER, bytes([1]) * 16, b"q", 100, NOW)
    sign(buyer, item(1, 30))
    assert pay(buyer, claim(1, 5_000)) == 70
    assert pay(buyer, claim(1, 5_000)) == 0
    assert books.read_pair(buyer, SELLER).arrears == 70


def test_claims_for_unknown_running_or_ended_work_are_not_paid(buyer):
    for number in (1, 2):
        payer.intend(buyer, SELLER, bytes([number]) * 16, b"q", 100, NOW)
    sign(buyer, item(1, 30, final=True))
    assert pay(buyer, claim(1, 90), claim(3, 50)) == 0
    assert pay(buyer, claim(2, 90), running=[bytes([2]) * 16]) == 0
    other_quote = Claim(bytes([2]) * 16, b"z", 90, b"o" * 32)
    assert pay(buyer, other_quote) == 0


def test_all_claims_together_stay_within_the_budget(buyer):
    exposure.set_received(buyer, SELLER, 600, 60)
    for number in range(1, 5):
        payer.intend(buyer, SELLER, bytes([number]) * 16, b"q", 100, NOW)
    assert pay(buyer, *(claim(number, 25) for number in range(1, 5))) == 60


# sync


def test_an_answer_shows_what_the_other_side_lacks(buyer, seller):
    vouchers = [sign(buyer, item(n, 10, final=True)) for n in (1, 2, 3)]
    for voucher in vouchers:
        take(seller, voucher)
    key = (True, WALLET.lane)
    nothing = ask(seller, BUYER, 6, {})
    assert nothing.yours == vouchers
    some = ask(seller, BUYER, 6, {key: LaneState(True, WALLET.lane, 2)})
    assert some.yours == vouchers[2:]
    assert books.read_pair(seller, BUYER).epoch == 6


def test_holes_are_named_and_filled(buyer, seller):
    vouchers = [sign(buyer, item(n, 10, final=True)) for n in range(1, 7)]
    for voucher in (vouchers[0], vouchers[1], vouchers[4]):
        take(seller, voucher)
    (state,) = sync.own_lanes(seller, BUYER)
    assert state == LaneState(False, WALLET.lane, 5, (5, 5, 1, 2))
    answer = ask(buyer, SELLER, 1, {(False, WALLET.lane): state})
    missing = [vouchers[2], vouchers[3], vouchers[5]]
    assert answer.mine[:3] == missing
    assert answer.mine[3:] == [vouchers[0], vouchers[1], vouchers[4]]  # held and not confirmed
    assert answer.unconfirmed == 6
    assert ask(buyer, SELLER, 1, {}).mine == vouchers


def test_an_answer_that_is_full_of_what_was_forgotten_asks_for_another_round(
    buyer, seller, monkeypatch
):
    monkeypatch.setattr(sync, "VOUCHERS_MAX", 2)
    vouchers = [sign(buyer, item(n, 10)) for n in range(1, 5)]
    for voucher in vouchers:
        take(seller, voucher)
    first = ask(seller, BUYER, 6, {})
    assert (first.yours, first.more) == (vouchers[:2], True)
    known = {(True, WALLET.lane): LaneState(True, WALLET.lane, 2)}
    second = ask(seller, BUYER, 6, known)
    assert (second.yours, second.more) == (vouchers[2:], False)


# the book


def test_a_boot_epoch_rises_even_if_the_clock_went_back(buyer):
    assert books.start_boot(buyer, 5_000, bytes(8))[0] == 5_000
    assert books.start_boot(buyer, 4_000, bytes(8))[0] == 5_001


def test_a_book_opens_only_for_its_key_and_version(buyer):
    books.prepare(buyer, A.public_key, NOW)
    with pytest.raises(ConfigError, match="another key"):
        books.prepare(buyer, B.public_key, NOW)
    buyer.execute("PRAGMA user_version = 99")
    with pytest.raises(ConfigError, match="version"):
        books.prepare(buyer, A.public_key, NOW)
    other = apsw.Connection(":memory:")
    other.execute("CREATE TABLE x(y)")
    with pytest.raises(ConfigError):
        books.prepare(other, A.public_key, NOW)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entry SET at_ms = 1",
        "DELETE FROM entry",
        "UPDATE posting SET amount = amount + 1",
        "DELETE FROM posting",
        "UPDATE lane_out SET cum = cum - 1",
        "UPDATE lane_out SET n = n - 1",
        "DELETE FROM lane_out",
        "UPDATE voucher_out SET body = x''",
        "DELETE FROM voucher_out",
        "DELETE FROM item",
        "UPDATE item SET amount = amount - 1",
        "INSERT INTO posting VALUES (1, 9, 'peer', NULL, 5)",
        "INSERT INTO boot VALUES (1, zeroblob(16))",
        "UPDATE identity SET public_key = zeroblob(32)",
    ],
)
def test_the_schema_forbids(buyer, statement):
    books.start_boot(buyer, 5_000, bytes(8))
    sign(buyer, item(1, 10))
    with pytest.raises(apsw.ConstraintError):
        buyer.execute(statement)


def test_an_entry_that_does_not_balance_is_refused(buyer):
    cause = books.Cause(SELLER, WALLET.lane, 1, b"body", "pay")
    with pytest.raises(apsw.ConstraintError, match="sums to zero"), buyer:
        books.post(buyer, cause, [books.Leg("peer", None, 5), books.Leg("spent", b"", -4)], NOW)
    with pytest.raises(apsw.ConstraintError), buyer:
        buyer.execute("INSERT INTO posting VALUES (7, 0, 'peer', NULL, 5)")


# what a review found


@pytest.mark.parametrize(
    "wrong",
    [
        Item(JOB, bytes(16), b"q", 5, b"o" * 33, False),
        Item(JOB, bytes(16), b"q", 5, b"", False),
        Item(JOB, bytes(15), b"q", 5, b"o" * 32, False),
    ],
)
def test_what_nobody_could_read_is_not_signed(buyer, wrong):
    with pytest.raises(LedgerError) as refusal:
        sign(buyer, item(1, 5), wrong)
    assert refusal.value.code == "BAD_REQUEST"
    assert books.rows(buyer, "SELECT n FROM voucher_out") == []


def test_the_budget_for_claims_counts_from_the_first_one(buyer):
    for number in range(10):
        payer.intend(buyer, SELLER, bytes([number]) * 16, b"q", 20_000, NOW)
    assert sum(pay(buyer, claim(number, 20_000)) for number in range(10)) <= 20_000 + 20_000 // 16


def test_a_claim_with_a_hash_of_another_size_is_not_paid(buyer):
    payer.intend(buyer, SELLER, bytes(16), b"q", 100, NOW)
    assert pay(buyer, Claim(bytes(16), b"q", 50, b"short")) == 0


def steps_of(db, action):
    """How many times SQLite looked up while it worked: time, without a clock."""
    count = [0]

    def progress():
        count[0] += 1
        return False

    db.set_progress_handler(progress, 1)
    action()
    db.set_progress_handler(None)
    return count[0]


def test_booking_a_voucher_costs_the_same_on_a_long_lane(seller):
    vouchers = [forged(n, n, item(n % 200, n // 200 + 1)) for n in range(1, 601)]
    costs = [steps_of(seller, lambda v=voucher: take(seller, v)) for voucher in vouchers]
    assert costs[-1] < 2 * costs[5]


STRANGER = peer_id(bytes(range(32)))


def test_a_strangers_vouchers_without_money_or_news_are_not_kept():
    db = book(B)
    first, end = forged(1, 5, item(1, 5)), forged(2, 5, item(1, 5, final=True))
    assert take(db, first).receipt
    assert take(db, end).receipt  # an end is news
    for n in range(3, 20):
        empty = forged(n, 5, item(1, 5, final=True), item(n, 0), item(n + 50, 7))
        assert take(db, empty).receipt is None
    assert books.one(db, "SELECT count(*) FROM voucher_in") == (2,)
    assert books.one(db, "SELECT count(*) FROM item") == (1,)


def test_an_epoch_alone_is_no_reason_for_a_row(seller):
    ask(seller, STRANGER, 7, {})
    reserve(seller, 0, 10, STRANGER, pool=0)
    assert books.one(seller, "SELECT count(*) FROM peer") == (1,)


def test_proofs_against_one_payer_are_few(seller):
    for n in range(1, 41):
        take(seller, forged(n, n, item(1, n)))
        take(seller, forged(n, n + 1, item(1, n)))
    assert books.one(seller, "SELECT count(*) FROM evidence") == (books.EVIDENCE_MAX,)


def test_showing_nothing_new_costs_the_same_on_a_long_lane(buyer):
    def ask():
        n = books.one(buyer, "SELECT n FROM lane_out")[0]
        held = {(False, WALLET.lane): LaneState(False, WALLET.lane, n, (1, n))}
        return steps_of(buyer, lambda: sync._unseen(buyer, SELLER, held, sync.ALL, 100))

    costs = []
    for size in (10, 210):
        for number in range(size):
            sign(
                buyer,
                Item(
                    JOB,
                    size.to_bytes(8, "big") + number.to_bytes(8, "big"),
                    b"q",
                    5,
                    bytes(32),
                    True,
                ),
            )
        costs.append(ask())
    assert costs[1] < 2 * costs[0]


@pytest.mark.parametrize(
    ("runs", "holes"),
    [
        ((), [(1, AMOUNT_MAX)]),
        ((5, 5, 1, 2), [(3, 4), (6, AMOUNT_MAX)]),
        ((1, 1 << 63), []),
        ((-9, -3, 7, 2, 3), [(1, 6), (3, AMOUNT_MAX)]),
    ],
)
def test_holes_between_runs_whatever_a_peer_says(runs, holes):
    if runs[:1] == (-9,):
        assert all(first <= last for first, last in sync._holes(runs))
    else:
        assert sync._holes(runs) == holes


@pytest.mark.parametrize(
    ("counters", "share"),
    [
        ({"reserved": 0, "balance": 50}, 0),
        ({"reserved": 40, "paid": 10, "balance": 0}, 30),
        ({"reserved": 40, "paid": 10, "balance": 5}, 35),
        ({"reserved": 40, "paid": 10, "balance": -5}, 30),
        ({"reserved": 40, "paid": 10, "balance": 90}, 40),
        ({"reserved": 10, "paid": 40, "balance": 5}, 5),
        ({"known": True, "reserved": 40, "paid": 10, "balance": 5}, 35),
        ({"known": True, "reserved": 0, "paid": 0, "balance": -5}, 0),
        ({"known": True, "reserved": 0, "paid": 0, "balance": 90}, 90),
    ],
)
def test_a_share_of_a_limit_is_what_may_still_be_owed(counters, share):
    """Of strangers never more than was reserved for them: they could promise for ever."""
    assert exposure.share_of(books.Pair(BUYER, **counters)) == share
