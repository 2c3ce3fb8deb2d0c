"""What the owner of a book could write into it by SQL, each way with a chain that fits.

`traded()` of pairs.py is the book: the seller has 95 in three vouchers of the buyer's, and signed
40 itself. A third peer is known and has no vouchers.
"""

from __future__ import annotations

import apsw
import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aivillage.ledger import books, corrections, payer
from aivillage.ledger.books import Cause, Leg
from aivillage.ledger.compaction import Cursor, compact
from aivillage.ledger.signing import Ed25519Signer
from aivillage.protocols import succession
from aivillage.protocols.types import peer_id, public_key
from aivillage.protocols.vouchers import (
    ROUTE,
    Item,
    ReceiptBody,
    ReceiptRow,
    VoucherBody,
    digest,
    lane_of,
    receipt_prefixed,
    root_of,
    voucher_prefixed,
)
from tests.unit.ledger.pairs import traded
from tests.unit.ledger.test_steps import (
    BUYER,
    NOW,
    SELLER,
    WALLET,
    A,
    B,
    exposure,
    forged,
    item,
    payee,
)

RICH = peer_id(b"\x07" * 32)
MILLION = 1_000_000
EVIL = Ed25519PrivateKey.from_private_bytes(b"\x09" * 32)
XID = b"x" * 16


def seller_book():
    _, seller = traded()
    exposure.certify(seller, RICH, 1_000, 160, 1)
    return seller


def without_triggers(db):
    """Nothing of the schema is in the way any more."""
    db.execute("PRAGMA foreign_keys=OFF")
    for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'trigger'").fetchall():
        db.execute(f"DROP TRIGGER {name}")


def append(db, peer, lane, n, kind, legs, body=b"nothing"):
    """An entry with its postings and the right hash; sums and balances follow as triggers would."""
    books.post(db, Cause(peer, lane, n, body, kind), [Leg(*leg) for leg in legs], NOW)
    _follow(db)


def _follow(db):
    """The kept sums say what the entries say, as triggers would have it."""
    db.execute("DELETE FROM bal; DELETE FROM account")
    db.execute(
        "INSERT INTO bal SELECT peer, sum(amount), 1 FROM entry JOIN posting USING (seq)"
        " WHERE account = 'peer' GROUP BY peer;"
        "INSERT INTO account SELECT account, sum(amount) FROM posting GROUP BY account"
    )


def rehash(db):
    """The whole chain anew: nobody signs it."""
    prev = books.NO_ENTRY
    for seq, *head in books.rows(
        db, "SELECT seq, at_ms, kind, peer, lane, n, body_hash FROM entry ORDER BY seq"
    ):
        legs = books.rows(
            db, "SELECT account, attempt, amount FROM posting WHERE seq = ? ORDER BY leg", (seq,)
        )
        hash_ = books.entry_hash(seq, head, legs, prev)
        db.execute("UPDATE entry SET prev = ?, hash = ? WHERE seq = ?", (prev, hash_, seq))
        prev = hash_
    _follow(db)


def reason(db, kind, peer):
    """A memo for the entry to come."""
    ((seq,),) = db.execute("SELECT max(seq) + 1 FROM entry").fetchall()
    memo = msgspec.msgpack.encode((seq, kind, peer, "mine now"))
    db.execute("INSERT INTO memo VALUES (?, ?)", (digest(memo), memo))
    return memo


def correction(db, peer, kind, *legs):
    append(db, peer, b"", 0, kind, legs, reason(db, kind, peer))


# ------------------------------------------------------------------ each way


def a_correction(db):
    correction(db, RICH, "write-back", ("peer", None, MILLION), ("gift", None, -MILLION))


def a_correction_with_vouchers(db):
    correction(db, BUYER, "write-back", ("peer", None, MILLION), ("gift", None, -MILLION))


def a_correction_of_three_legs(db):
    legs = ("doubtful", None, -5), ("writeoff", None, 6), ("peer", None, -1)
    correction(db, BUYER, "write-off", *legs)


def a_write_back_of_nothing(db):
    correction(db, BUYER, "write-back", ("doubtful", None, 9), ("writeoff", None, -9))


def a_write_off_turned_round(db):
    correction(db, BUYER, "write-off", ("doubtful", None, 9), ("writeoff", None, -9))


def a_write_off_beyond_the_debt(db):
    correction(db, BUYER, "write-off", ("doubtful", None, -99), ("writeoff", None, 99))


def a_write_back_beyond_the_write_off(db):
    correction(db, BUYER, "write-off", ("doubtful", None, -9), ("writeoff", None, 9))
    correction(db, BUYER, "write-back", ("doubtful", None, 10), ("writeoff", None, -10))


def a_release_of_nothing(db):
    correction(db, BUYER, "release", ("routed", XID, -9), ("writeoff", XID, 9))


def _send(db, amount):
    """A transfer that the seller really signed, and gave up."""
    ring = (B.public_key, public_key(BUYER), b"\x01" * 32)
    wallet = payer.Wallet(B, WALLET.lane[:8] + b"lane-two")
    wanted = Item(ROUTE, XID, b"", amount, bytes(32), True, ring)
    payer.make_voucher(db, wallet, BUYER, [wanted], NOW)
    packed = msgspec.msgpack.encode(ring)
    db.execute("INSERT INTO route VALUES (?, ?, ?, 'open', 1, 0)", (XID, amount, packed))
    db.execute("UPDATE route SET state = 'released' WHERE xid = ?", (XID,))
    _follow(db)


def a_release_of_more_than_was_sent(db):
    _send(db, 5)
    correction(db, BUYER, "release", ("routed", XID, -9), ("writeoff", XID, 9))


def a_second_release(db):
    _send(db, 5)
    for _ in range(2):
        correction(db, BUYER, "release", ("routed", XID, -5), ("writeoff", XID, 5))


def a_transfer_that_came_back_without_being_given_up(db):
    _send(db, 5)
    correction(db, BUYER, "write-back", ("routed", XID, 5), ("writeoff", XID, -5))


def a_correction_without_a_reason(db):
    append(db, BUYER, b"", 0, "write-off", (("doubtful", None, -9), ("writeoff", None, 9)))


def a_correction_with_another_ones_reason(db):
    memo = reason(db, "write-off", RICH)
    append(db, BUYER, b"", 0, "write-off", (("doubtful", None, -9), ("writeoff", None, 9)), memo)


def a_payment_without_a_voucher(db):
    append(db, RICH, b"l" * 16, 1, "receive", (("peer", None, MILLION), ("earned", XID, -MILLION)))


def a_payment_for_a_voucher_that_was_dropped(db):
    legs = (("peer", None, MILLION), ("earned", XID, -MILLION))
    append(db, BUYER, WALLET.lane, 2, "receive", legs)


def a_voucher_booked_twice(db):
    ((body,),) = db.execute("SELECT body FROM voucher_in WHERE n = 3").fetchall()
    legs = (("peer", None, 95), ("earned", XID, -95))
    append(db, BUYER, WALLET.lane, 3, "receive", legs, body)


def a_payment_turned_round(db):
    legs = (("peer", None, MILLION), ("spent", XID, -MILLION))
    append(db, BUYER, WALLET.lane[:8] + b"lane-two", 1, "pay", legs)


def a_present_out_of_nothing(db):
    legs = (("gift", XID, -MILLION), ("earned", XID, MILLION))
    append(db, BUYER, WALLET.lane, 2, "receive", legs)


def a_chain_written_anew(db):
    for account, amount in (("peer", MILLION), ("earned", -MILLION)):
        db.execute("UPDATE posting SET amount = ? WHERE seq = 1 AND account = ?", (amount, account))
    rehash(db)


def a_payment_of_mine_left_out(db):
    db.execute("DELETE FROM posting WHERE seq = 4; DELETE FROM entry WHERE seq = 4")
    rehash(db)


def _take(db, voucher, peer=BUYER):
    payee.book_voucher(db, peer, voucher, "receive", attest=True, at_ms=NOW)
    _follow(db)


def a_voucher_that_i_signed_myself(db):
    false = forged(4, MILLION, item(9, 500))
    _take(db, msgspec.structs.replace(false, signature=B.sign(false.body)))


def a_successor_that_nobody_named(db):
    evil = Ed25519Signer(EVIL)
    books.succeed(db, BUYER, peer_id(evil.public_key), b"garbage proof", NOW)
    _pay_by(db, evil)


def a_successor_by_a_proof_of_others(db):
    evil = Ed25519Signer(EVIL)
    proof = succession.make(EVIL, Ed25519PrivateKey.generate(), NOW)
    books.succeed(db, BUYER, peer_id(evil.public_key), proof, NOW)
    _pay_by(db, evil)


def _pay_by(db, signer):
    other = apsw.Connection(":memory:")
    books.prepare(other, signer.public_key, NOW)
    wallet = payer.Wallet(signer, lane_of(5, b"e" * 8))
    _take(db, payer.make_voucher(other, wallet, SELLER, [item(8, MILLION)], NOW))


def a_key_of_mine_that_nobody_named(db):
    books.add_own_key(db, b"\x05" * 32, b"garbage proof", NOW)


def a_reason_written_anew(db):
    corrections.write_off(db, BUYER, 9, "gone", NOW)
    db.execute("UPDATE memo SET body = x'90'")


def a_reason_that_says_nothing(db):
    db.execute("INSERT INTO memo VALUES (?, ?)", (digest(b"mine"), b"mine"))
    legs = (("doubtful", None, -9), ("writeoff", None, 9))
    append(db, BUYER, b"", 0, "write-off", legs, b"mine")


def a_release_of_a_debt(db):
    correction(db, BUYER, "release", ("doubtful", None, -9), ("writeoff", None, 9))


def a_write_off_of_a_transfer(db):
    _send(db, 5)
    correction(db, BUYER, "write-off", ("routed", XID, -5), ("writeoff", XID, 5))


def a_transfer_given_up_for_nothing(db):
    _send(db, 5)


def a_transfer_given_up_and_hidden(db):
    _send(db, 5)
    correction(db, BUYER, "release", ("routed", XID, -5), ("writeoff", XID, 5))
    db.execute("DELETE FROM route")


def a_payment_of_a_cost(db):
    legs = (("writeoff", None, -9), ("unlabelled", None, 9))
    append(db, BUYER, WALLET.lane, 2, "receive", legs)


def a_payment_taken_back(db):
    append(db, BUYER, WALLET.lane, 2, "receive", (("peer", None, -9), ("unlabelled", None, 9)))


def a_dropped_voucher_that_said_more(db):
    for cursor in (Cursor("in"), Cursor("out")):
        compact(db, cursor, NOW)
    db.execute("UPDATE posting SET amount = -1000000 WHERE seq = 2 AND account <> 'peer'")
    db.execute("UPDATE posting SET amount = 1000000 WHERE seq = 2 AND account = 'peer'")
    rehash(db)


def a_successor_out_of_turn(db):
    db.execute("INSERT INTO peer_key VALUES (?, ?, 3, 1, x'00')", (RICH, BUYER))


def a_voucher_of_mine_that_says_less(db):
    lane = WALLET.lane[:8] + b"lane-two"
    wanted = (item(3, 4),)
    body = msgspec.msgpack.encode(VoucherBody(public_key(BUYER), lane, 2, 4, root_of(wanted)))
    items = msgspec.msgpack.encode(wanted)
    row = (BUYER, lane, 2, 4, body, B.sign(voucher_prefixed(body)), items)
    db.execute("INSERT INTO voucher_out VALUES (9, ?, ?, ?, ?, ?, ?, ?, NULL, NULL)", row)


def a_receipt_for_something_else(db):
    lane = WALLET.lane[:8] + b"lane-two"
    rows = (ReceiptRow(1, digest(b"other"), attest=True),)
    body = msgspec.msgpack.encode(ReceiptBody(B.public_key, lane, rows))
    row = (BUYER, body, A.sign(receipt_prefixed(body)))
    db.execute("INSERT INTO receipt VALUES (1, ?, ?, ?)", row)
    db.execute("UPDATE voucher_out SET receipt = 1, attest = 1")
    db.execute("UPDATE lane_out SET confirmed = cum")


def a_proof_about_another_voucher(db):
    one, two = forged(1, 20, item(1, 20)), forged(1, 10, item(2, 10))
    bodies = (one.body, one.signature, two.body, two.signature)
    books.keep_evidence(db, BUYER, (WALLET.lane, 7), bodies, NOW)


def _sql(statement):
    def write(db):
        before = db.total_changes()
        db.execute(statement)
        assert db.total_changes() > before

    return write


PROOF = f"INSERT INTO evidence VALUES (1, '{BUYER}', x'00', 1, x'00', x'00', x'01', x'00', 1)"
WAYS = [
    (a_correction, "entry 5: a correction may not move gift and peer"),
    (a_correction_with_vouchers, "entry 5: a correction may not move gift and peer"),
    (a_correction_of_three_legs, "entry 5: a correction may not move doubtful and peer"),
    (a_write_back_of_nothing, "entry 5: writes back more than was written off"),
    (a_write_off_turned_round, "entry 5: is no write-off"),
    (a_write_off_beyond_the_debt, "entry 5: writes off more than is owed"),
    (a_write_back_beyond_the_write_off, "entry 6: writes back more than was written off"),
    (a_release_of_nothing, "entry 5: gives up more than was sent"),
    (a_release_of_more_than_was_sent, "entry 6: gives up more than was sent"),
    (a_second_release, "entry 7: gives up more than was sent"),
    (a_transfer_that_came_back_without_being_given_up, "entry 6: takes back more than was given"),
    (a_correction_without_a_reason, "entry 5: the reason of this correction is missing"),
    (a_correction_with_another_ones_reason, "entry 5: its reason is that of another correction"),
    (a_payment_without_a_voucher, "entry 5: the voucher behind it is missing"),
    (a_payment_for_a_voucher_that_was_dropped, "entry 5: moves money for a voucher that a later"),
    (a_voucher_booked_twice, "entry 5: moves money for a voucher that a later"),
    (a_payment_turned_round, "entry 5: turns spent round"),
    (a_present_out_of_nothing, "entry 5: turns earned round"),
    (a_chain_written_anew, "entry 1: its voucher says 10 in all, the entries of its lane 1000000"),
    (a_payment_of_mine_left_out, f"balance of {BUYER}: its vouchers give 40 on lane"),
    (a_voucher_that_i_signed_myself, f"voucher 4 from {BUYER}"),
    (a_successor_that_nobody_named, f"key 2 of {BUYER}: "),
    (a_successor_by_a_proof_of_others, f"key 2 of {BUYER}: its proof is about other keys"),
    (a_key_of_mine_that_nobody_named, "key 2 of this book: "),
    (a_reason_written_anew, ": its text was changed"),
    (a_reason_that_says_nothing, "entry 5: its reason cannot be read"),
    (a_release_of_a_debt, "entry 5: is no release"),
    (a_write_off_of_a_transfer, "entry 6: is no write-off"),
    (a_transfer_given_up_for_nothing, f"transfer {XID.hex()}: 0 are booked as given up, and 5"),
    (a_transfer_given_up_and_hidden, f"entry 6: transfer {XID.hex()}: 5 are booked as given up"),
    (a_payment_of_a_cost, "entry 5: moves writeoff, which no voucher does"),
    (a_payment_taken_back, "entry 5: takes back what was signed"),
    (a_dropped_voucher_that_said_more, "entry 2: books more than was signed: 1000010, of 95"),
    (a_successor_out_of_turn, f"key 3 of {BUYER}: the one before it is missing"),
    (a_voucher_of_mine_that_says_less, "cum falls as n rises"),
    (a_receipt_for_something_else, f"voucher 1 to {BUYER} on lane"),
    (a_proof_about_another_voucher, "it is about another voucher"),
    (_sql("DELETE FROM account WHERE account = 'earned'"), "account earned: is missing"),
    (_sql(f"INSERT INTO item VALUES (1, '{BUYER}', 4, x'00', x'00', 5, 1, 1, 0)"), "item 00 of"),
    (_sql("UPDATE bal SET amount = 1000000"), f"balance of {BUYER}: 1000000 is stored"),
    (_sql(f"INSERT INTO bal VALUES ('{RICH}', 1000000, 1)"), f"balance of {RICH}: 1000000 is"),
    (_sql("UPDATE account SET amount = amount + 1"), "account "),
    (_sql("UPDATE posting SET amount = 1000000 WHERE account = 'peer'"), "entry 1: its postings"),
    (_sql(PROOF), f"evidence 1 against {BUYER}: "),
    (_sql("UPDATE peer SET written_off = 100000000"), "peer "),
    (_sql("UPDATE peer SET paid = paid + 1"), "counts as paid"),
    (_sql("UPDATE peer SET arrears = arrears + 1"), "more counts as arrears than was signed"),
    (_sql("UPDATE lane_out SET confirmed = cum"), "40 count as confirmed, receipts say 0"),
    (_sql("UPDATE voucher_out SET attest = 1"), f"voucher 1 to {BUYER}"),
    (_sql("UPDATE item SET amount = amount + 1 WHERE mine = 1"), "its voucher says something else"),
    (_sql(f"INSERT INTO favour_sum VALUES (0, '{BUYER}', 9)"), "its favours do not add up"),
]
"""(forgery, what the audit says first)"""

REFUSED = {
    way.__name__
    for way, _ in WAYS
    if (
        way.__name__.startswith(("a_correction", "a_write", "a_release", "a_second"))
        and way is not a_correction_with_another_ones_reason
    )
    or way is a_transfer_that_came_back_without_being_given_up
}
"""What the schema does not let in: corrections. It cannot read a reason."""


def names():
    """A name for each way, for people."""
    return [
        way.__name__ if way.__name__ != "write" else f"sql {number}"
        for number, (way, _) in enumerate(WAYS)
    ]
