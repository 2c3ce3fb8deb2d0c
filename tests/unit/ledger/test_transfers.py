"""Each step of a transfer on three real books: what it books, refuses and gives back."""

import apsw
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aivillage.ledger import books, exposure, payee, payer, transfers
from aivillage.ledger.audit import audit
from aivillage.ledger.queries import run
from aivillage.ledger.signing import Ed25519Signer
from aivillage.protocols.errors import LedgerError, RequestError
from aivillage.protocols.types import peer_id
from aivillage.protocols.vouchers import REFUND, ROUTE, Item, lane_of, xid_of

NOW, LATER = 1_000_000, 1_060_000
LINE, X = 1_000, 400
XID = xid_of(LATER, b"transfer")


class Node:
    """One book; `sent` is what leaves it."""

    def __init__(self, number):
        self.signer = Ed25519Signer(Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32))
        self.id = peer_id(self.signer.public_key)
        self.db = apsw.Connection(":memory:")
        self.db.execute("PRAGMA foreign_keys=ON")
        books.prepare(self.db, self.signer.public_key, NOW)
        self.wallet = payer.Wallet(self.signer, lane_of(number, b"lane-one"))

    def trusts(self, *others, line=LINE):
        for other in others:
            exposure.certify(self.db, other.id, line, X, NOW)
            exposure.set_received(self.db, other.id, line, X)

    def sign(self, peer, item):
        """Inside a transaction, or one of its own."""
        if self.db.in_transaction:
            return payer.make_voucher(self.db, self.wallet, peer, [item], NOW)
        with self.db:
            return payer.make_voucher(self.db, self.wallet, peer, [item], NOW)

    def start(self, *others, amount=100, xid=XID):
        with self.db:
            peers = [other.id for other in others]
            return transfers.start(self.db, self.sign, peers, amount, xid, NOW)

    def take(self, sender, voucher):
        with self.db:
            return payee.book_voucher(
                self.db, sender.id, voucher, "receive", attest=True, at_ms=NOW
            )

    def advance(self, *near, at_ms=NOW, met=()):
        ready = frozenset(other.id for other in near)
        met_or_ready = ready | {other.id for other in met}
        reach = transfers.Reach(ready, met_or_ready, LATER - NOW)
        with self.db:
            return transfers.advance(self.db, self.sign, reach, at_ms)

    def owed_by(self, other):
        return books.read_pair(self.db, other.id).balance

    def state(self, table="transfer"):
        row = books.one(self.db, f"SELECT state FROM {table}")
        return row and row[0]

    def assert_right(self):
        report = run(self.db, audit(self.signer.verify))
        assert report.ok, report.first_error


@pytest.fixture
def nodes():
    a, b, c = Node(1), Node(2), Node(3)
    a.trusts(b, c)
    b.trusts(a, c)
    c.trusts(a, b)
    return a, b, c


def go_around(nodes, start):
    """Every hop of a ring that was just started; all pass it on at once."""
    sender, sent, ring = nodes[0], start, [*nodes[1:], nodes[0]]
    for receiver in ring:
        receiver.take(sender, sent.voucher)
        if receiver is nodes[0]:
            break
        (sent,) = receiver.advance(*(n for n in nodes if n is not receiver))
        sender = receiver


def test_a_ring_moves_one_debt_onto_another_by_the_same_amount(nodes):
    a, b, c = nodes
    go_around(nodes, a.start(b, c))
    assert a.state("route") == "closed"
    assert [b.owed_by(a), c.owed_by(b), a.owed_by(c)] == [100, 100, 100]
    assert [a.owed_by(b), b.owed_by(c), c.owed_by(a)] == [-100, -100, -100]
    assert [sum(n.owed_by(o) for o in nodes if o is not n) for n in nodes] == [0, 0, 0]
    for node in nodes:
        node.assert_right()
        assert books.read_pair(node.db, nodes[0].id).paid == 0  # a transfer pays for no work
    assert books.rows(a.db, "SELECT * FROM route_hop") == []


def test_a_middle_books_and_passes_on_in_one_transaction(nodes):
    a, b, c = nodes
    voucher = a.start(b, c).voucher
    b.take(a, voucher)
    assert b.state() == "waiting"
    (sent,) = b.advance(a, c)
    assert (sent.peer, b.state()) == (c.id, "forwarded")
    assert b.owed_by(a) + b.owed_by(c) == 0
    assert b.advance(a, c) == []  # once


def test_nothing_is_passed_on_before_both_neighbours_are_synced(nodes):
    a, b, c = nodes
    b.take(a, a.start(b, c).voucher)
    assert b.advance(a) == b.advance(c) == b.advance() == []
    assert b.state() == "waiting"
    assert b.owed_by(a) == 100
    b.assert_right()


def test_a_transfer_past_its_time_goes_back(nodes):
    a, b, c = nodes
    b.take(a, a.start(b, c).voucher)
    assert b.advance(a, at_ms=LATER + 1) == []  # the next may show that it was passed on before
    (sent,) = b.advance(a, at_ms=LATER + 1, met=(c,))
    assert (sent.peer, b.state()) == (a.id, "refunded")
    a.take(b, sent.voucher)
    assert a.state("route") == "refunded"
    assert (a.owed_by(b), b.owed_by(a)) == (0, 0)
    for node in (a, b):
        node.assert_right()


def test_one_beyond_its_line_gets_its_transfer_back(nodes):
    a, b, c = nodes
    exposure.certify(b.db, a.id, 99, X, NOW)
    b.take(a, a.start(b, c).voucher)
    (sent,) = b.advance(a, c)
    assert (sent.peer, b.state()) == (a.id, "refunded")


@pytest.mark.parametrize("blocked", ["previous", "next"])
def test_nothing_goes_through_a_middle_that_blocked_a_neighbour(nodes, blocked):
    a, b, c = nodes
    peer = a if blocked == "previous" else c
    exposure.decree(b.db, peer.id, exposure.Word(blocked=True), NOW)
    b.db.execute("UPDATE bal SET amount = -500")  # though it owes it more than that
    b.take(a, a.start(b, c).voucher)
    (sent,) = b.advance(a, c)
    assert sent.peer == a.id


def test_a_payer_that_contradicted_itself_moves_nothing(nodes):
    a, b, c = nodes
    books.keep_evidence(b.db, a.id, (bytes(16), 1), (b"1", b"2", b"3", b"4"), NOW)
    b.take(a, a.start(b, c).voucher)
    (sent,) = b.advance(a, c)
    assert sent.peer == a.id


def test_what_comes_back_is_passed_back_and_frees_the_starter(nodes):
    a, b, c = nodes
    b.take(a, a.start(b, c).voucher)
    (sent,) = b.advance(a, c)
    exposure.certify(c.db, b.id, 0, 0, NOW)  # the line at the end is checked there
    c.take(b, sent.voucher)
    (back,) = c.advance(a, b)
    assert (back.peer, c.state()) == (b.id, "refunded")
    b.take(c, back.voucher)
    assert b.state() == "returning"
    (back,) = b.advance(a, c)
    assert (back.peer, b.state()) == (a.id, "returned")
    a.take(b, back.voucher)
    assert a.state("route") == "refunded"
    for node in nodes:
        node.assert_right()
        assert [node.owed_by(other) for other in nodes if other is not node] == [0, 0]


def test_what_comes_back_beyond_line_and_exposure_is_held_until_its_signer_owes_less(nodes):
    """However many transfers return at once, the owner's risk stays within L + X."""
    a, b, c = nodes
    b.take(a, a.start(b, c).voucher)
    (sent,) = b.advance(a, c)
    exposure.certify(c.db, b.id, 0, 0, NOW)
    c.take(b, sent.voucher)
    (back,) = c.advance(a, b)
    exposure.certify(b.db, c.id, 0, 0, NOW)  # its owner trusts it no more
    b.take(c, back.voucher)
    item = Item(0, bytes(16), b"q", 30, b"o" * 32, False)
    b.take(c, c.sign(b.id, item))  # it owes 30 for work, beyond its line of 0
    assert b.advance(a, c) == []
    assert b.state() == "returning"
    exposure.certify(b.db, c.id, 40, 50, NOW)
    (back,) = b.advance(a, c)
    assert back.peer == a.id


def test_the_starter_risks_at_most_its_exposure_at_each_member(nodes):
    """I6, over all rings together, durable; a step is a quarter of it."""
    a, b, c = nodes
    with pytest.raises(LedgerError, match="more than you risk"):
        a.start(b, c, amount=X // 4 + 1)
    for number in range(4):
        a.start(b, c, xid=xid_of(LATER, bytes([number]) * 8))
    with pytest.raises(LedgerError, match="more than you risk"):
        a.start(b, c, amount=1, xid=xid_of(LATER, b"one-more"))
    assert books.read_pair(a.db, b.id).routed == books.read_pair(a.db, c.id).routed == X
    assert books.read_pair(a.db, b.id).owed == X - 400  # it may come back, and counts


def test_a_ring_that_is_none_is_refused(nodes):
    a, b, c = nodes
    for others, amount in (((b,), 10), ((b, b), 10), ((b, c), 0), ((b, c, b, c, b), 10)):
        with pytest.raises(RequestError):
            a.start(*others, amount=amount)
    stranger = Node(9)
    with pytest.raises(LedgerError):
        a.start(b, stranger)
    assert books.rows(a.db, "SELECT * FROM route") == []


def test_released_is_a_cost_and_what_comes_after_all_is_written_back(nodes):
    a, b, c = nodes
    sent = a.start(b, c)
    with a.db:
        assert transfers.release(a.db, XID, NOW) == 100
    assert books.one(a.db, "SELECT amount FROM account WHERE account = 'writeoff'") == (100,)
    assert books.read_pair(a.db, b.id).routed == 0
    a.assert_right()
    with pytest.raises(RequestError), a.db:
        transfers.release(a.db, XID, NOW)
    go_around(nodes, sent)
    assert a.state("route") == "closed"
    assert books.one(a.db, "SELECT amount FROM account WHERE account = 'writeoff'") == (0,)
    a.assert_right()


def test_a_second_voucher_for_one_transfer_moves_nothing_on(nodes):
    """Its payer gave money away: the middle keeps it, and passes on what it took first."""
    a, b, c = nodes
    ring = (a.signer.public_key, b.signer.public_key, c.signer.public_key)
    b.take(a, a.start(b, c).voucher)
    b.advance(a, c)
    other = Item(ROUTE, XID, b"", 150, bytes(32), True, ring)
    a.db.execute("DROP TRIGGER item_stays; DELETE FROM item")
    a.wallet = payer.Wallet(a.signer, lane_of(9, b"lane-two"))
    b.take(a, a.sign(b.id, other))
    assert b.advance(a, c) == []
    assert b.owed_by(c) == -100


def test_a_forgotten_step_stands_when_it_is_shown(nodes):
    """A middle restored from a backup of before: it adopts what it signed and signs no second."""
    a, b, c = nodes
    before = b.db.serialize("main")
    voucher = a.start(b, c).voucher
    b.take(a, voucher)
    (sent,) = b.advance(a, c)
    b.db.deserialize("main", before)
    b.wallet = payer.Wallet(b.signer, lane_of(99, b"lane-two"))
    with b.db:
        payer.adopt(b.db, c.id, sent.voucher, NOW)
    b.take(a, voucher)
    assert b.state() == "forwarded"
    assert b.advance(a, c) == []
    assert b.owed_by(a) + b.owed_by(c) == 0
    b.assert_right()


def test_a_forgotten_step_stands_beside_what_became_of_other_transfers(nodes):
    a, b, c = nodes
    b.take(a, a.start(b, c, xid=xid_of(LATER, b"earlier1")).voucher)
    b.advance(a, c)
    before = b.db.serialize("main")
    voucher = a.start(b, c).voucher
    b.take(a, voucher)
    (sent,) = b.advance(a, c)
    restored(b, before)
    shown(b, c, sent.voucher)
    b.take(a, voucher)
    states = books.rows(b.db, "SELECT state FROM transfer")
    assert states == [("forwarded",), ("forwarded",)]
    assert b.advance(a, at_ms=LATER + 1, met=(c,)) == []


def restored(node, before, epoch=99):
    """From a backup: it signs on another lane from now on."""
    node.db.deserialize("main", before)
    node.wallet = payer.Wallet(node.signer, lane_of(epoch, b"lane-two"))


def shown(node, peer, voucher):
    """`peer` shows it what it signed."""
    with node.db:
        payer.adopt(node.db, peer.id, voucher, NOW)


def test_what_was_passed_on_and_forgotten_does_not_go_back_when_its_time_is_over(nodes):
    a, b, c = nodes
    b.take(a, a.start(b, c).voucher)
    before = b.db.serialize("main")
    (sent,) = b.advance(a, c)
    restored(b, before)
    shown(b, c, sent.voucher)
    assert b.state() == "forwarded"
    assert b.advance(a, at_ms=LATER + 1, met=(c,)) == []
    b.assert_right()


def test_what_was_given_back_and_forgotten_is_not_passed_on(nodes):
    a, b, c = nodes
    b.take(a, a.start(b, c).voucher)
    before = b.db.serialize("main")
    (sent,) = b.advance(a, at_ms=LATER + 1, met=(c,))
    restored(b, before)
    shown(b, a, sent.voucher)
    assert b.state() == "refunded"
    assert b.advance(a, c) == []
    b.assert_right()


def test_what_came_back_went_back_and_was_forgotten_goes_back_once(nodes):
    a, b, c = nodes
    b.take(a, a.start(b, c).voucher)
    (passed_on,) = b.advance(a, c)
    c.take(b, passed_on.voucher)
    (refund,) = c.advance(b, at_ms=LATER + 1, met=(a,))
    b.take(c, refund.voucher)
    before = b.db.serialize("main")
    assert b.state() == "returning"
    (sent,) = b.advance(a, c)
    restored(b, before)
    shown(b, a, sent.voucher)
    assert b.state() == "returned"
    assert b.advance(a, c) == []
    b.assert_right()


def test_what_came_back_before_the_middle_remembers_that_it_passed_it_on_goes_back(nodes):
    a, b, c = nodes
    b.take(a, a.start(b, c).voucher)
    before = b.db.serialize("main")
    (passed_on,) = b.advance(a, c)
    c.take(b, passed_on.voucher)
    (refund,) = c.advance(b, at_ms=LATER + 1, met=(a,))
    restored(b, before)
    b.take(c, refund.voucher)
    shown(b, c, passed_on.voucher)
    assert b.state() == "returning"
    (sent,) = b.advance(a, c)
    assert (sent.peer, b.state()) == (a.id, "returned")
    b.assert_right()


@pytest.mark.parametrize("end", ["closed", "refunded"])
def test_a_starter_that_forgot_its_ring_knows_its_end_when_it_is_shown(nodes, end):
    a, b, c = nodes
    before = a.db.serialize("main")
    sent = a.start(b, c)
    b.take(a, sent.voucher)
    restored(a, before)
    if end == "closed":
        (passed_on,) = b.advance(a, c)
        c.take(b, passed_on.voucher)
        (last,) = c.advance(a, b)
        a.take(c, last.voucher)
    else:
        (last,) = b.advance(a, at_ms=LATER + 1, met=(c,))
        a.take(b, last.voucher)
    shown(a, b, sent.voucher)
    assert a.state("route") == end
    assert books.read_pair(a.db, b.id).routed == 0
    a.assert_right()


def test_a_ring_has_three_to_five_members_and_moves_one_micro_credit_or_more(nodes):
    a, b, c = nodes
    more = [Node(number) for number in (4, 5, 6)]
    a.trusts(*more)
    a.start(b, c, amount=1, xid=xid_of(LATER, b"smallest"))
    a.start(b, c, *more[:2], xid=xid_of(LATER, b"largest1"))
    with pytest.raises(RequestError, match="3 to 5 members"):
        a.start(b, c, *more, xid=xid_of(LATER, b"larger-1"))


@pytest.mark.parametrize(("line", "state"), [(100, "forwarded"), (99, "refunded")])
def test_a_middle_owes_the_next_one_up_to_its_line_and_no_more(nodes, line, state):
    a, b, c = nodes
    exposure.set_received(b.db, c.id, line, X)
    b.take(a, a.start(b, c).voucher)
    b.advance(a, c)
    assert b.state() == state


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE route SET state = 'open'",
        "UPDATE route SET amount = 1",
        "DELETE FROM route",
        "UPDATE transfer SET state = 'waiting'",
        "UPDATE transfer SET amount = 1",
        "DELETE FROM transfer",
    ],
)
def test_the_schema_lets_a_transfer_end_once(nodes, statement):
    a, b, _ = nodes
    go_around(nodes, a.start(*nodes[1:]))
    node = a if "route" in statement else b
    with pytest.raises(apsw.ConstraintError):
        node.db.execute(statement)


def test_an_audit_names_a_transfer_that_paid_one_side_only(nodes):
    a, b, c = nodes
    b.take(a, a.start(b, c).voucher)
    b.advance(a, c)
    b.db.execute("DROP TRIGGER transfer_moves")
    b.db.execute("UPDATE transfer SET state = 'returning'")
    report = run(b.db, audit(b.signer.verify))
    assert not report.ok
    assert f"transfer {XID.hex()}" in report.first_error


def test_a_ring_that_comes_back_with_less_is_not_closed(nodes):
    """Its last member would keep the rest, and the starter would no longer count it as at risk."""
    a, b, c = nodes
    ring = tuple(node.signer.public_key for node in nodes)
    a.start(b, c)
    a.take(c, c.sign(a.id, Item(ROUTE, XID, b"", 99, bytes(32), True, ring)))
    assert a.state("route") == "open"
    assert books.read_pair(a.db, b.id).routed == 100
    a.take(b, b.sign(a.id, Item(REFUND, XID, b"", 1, bytes(32), True)))
    assert a.state("route") == "open"


def test_a_ring_is_closed_by_its_last_member_only(nodes):
    a, b, c = nodes
    ring = (a.signer.public_key, c.signer.public_key, b.signer.public_key)
    a.start(b, c)
    a.take(b, b.sign(a.id, Item(ROUTE, XID, b"", 100, bytes(32), True, ring)))
    a.take(c, c.sign(a.id, Item(REFUND, XID, b"", 100, bytes(32), True)))
    assert a.state("route") == "open"


def test_a_refund_names_no_ring(nodes):
    a, b, _ = nodes
    refund = b.sign(a.id, Item(REFUND, XID, b"", 5, bytes(32), True))
    assert msgspec.msgpack.decode(refund.body)[3] == 5
    a.take(b, refund)
    assert a.owed_by(b) == 5  # any other refund is just money
    assert a.state("route") is None
