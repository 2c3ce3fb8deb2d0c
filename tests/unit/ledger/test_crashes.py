"""The crash table: each row killed at its instant, in the simulator's world with its faults off."""

import pytest

from aivillage.ledger import books
from aivillage.protocols.errors import PeerError
from aivillage.protocols.vouchers import SyncRequest, encode
from tests.simulation import invariants, ledger_sim
from tests.simulation.world import CEILING, EXPOSURE, STEP_SECONDS, CrashError, World, out_hash


class Scene:
    """A buyer and a seller, linked and synced, with one attempt delivered and accepted."""

    def __init__(self):
        self.world = World(seed=1)
        self.world.rates.calm()
        for node in self.world.nodes:
            node.lie = ""
        self.buyer, self.seller = self.world.nodes[0], self.world.nodes[1]
        self.rest()
        self.attempt, self.amount = bytes(range(16)), 0
        self.buyer.ledger.buying.intend(self.seller.id, self.attempt, b"q", CEILING)
        self.seller.ledger.selling.begin_sale(self.buyer.id, self.attempt, b"q", CEILING)
        self.flush()

    def rest(self):
        for _ in range(200):
            self.world.advance()
            if ledger_sim.at_rest(self.world):
                return
        pytest.fail("no rest")

    def flush(self):
        for node in (self.buyer, self.seller):
            node.runner.flush()

    def deliver(self, amount):
        selling = self.seller.ledger.selling
        selling.want_room(self.buyer.id, amount)
        self.flush()
        assert selling.deliver(self.buyer.id, self.attempt, amount, out_hash(self.attempt, amount))
        self.seller.delivered[self.buyer.id] = amount
        self.amount = amount

    def accept(self):
        self.buyer.ledger.buying.accept(
            self.seller.id, self.attempt, self.amount, out_hash(self.attempt, self.amount)
        )

    def sign(self):
        """Asks for the final voucher; the writer has not run yet."""
        mark = out_hash(self.attempt, self.amount)
        self.buyer.ledger.buying.settle(
            self.seller.id, self.attempt, self.amount, mark, lambda: None, lambda _: None
        )

    def owed(self):
        """What each side's book says that the buyer owes."""
        pairs = ((self.seller, self.buyer, 1), (self.buyer, self.seller, -1))
        return [sign * a.ledger.desk.partner(b.id).pair.balance for a, b, sign in pairs]

    def end(self):
        self.rest()
        invariants.at_every_step(self.world)
        invariants.when_quiet(self.world)


@pytest.fixture
def scene():
    return Scene()


def test_a_unit_accepted_and_not_signed_is_paid_on_a_claim(scene):
    scene.deliver(20)
    scene.accept()
    scene.world.crash(scene.buyer)
    scene.end()
    assert scene.owed() == [20, 20]
    assert scene.buyer.ledger.desk.partner(scene.seller.id).pair.arrears == 20


def test_a_buyer_killed_before_the_commit_sent_nothing(scene):
    scene.deliver(20)
    scene.accept()
    scene.sign()
    scene.world.rates.crash_before_commit = 1.0
    with pytest.raises(CrashError):
        scene.buyer.runner.flush()
    scene.world.rates.calm()
    assert scene.world.vouchers == 0
    scene.world.crash(scene.buyer)
    scene.end()
    assert scene.owed() == [20, 20]  # the claim


@pytest.mark.parametrize("instant", ["crash_after_commit", "crash_sending"])
def test_a_voucher_committed_and_not_sent_is_sent_after_the_restart(scene, instant):
    scene.deliver(20)
    scene.accept()
    scene.sign()
    setattr(scene.world.rates, instant, 1.0)
    with pytest.raises(CrashError):
        scene.buyer.runner.flush()
    scene.world.rates.calm()
    scene.world.crash(scene.buyer)
    scene.end()
    assert scene.owed() == [20, 20]
    assert scene.buyer.ledger.desk.partner(scene.seller.id).pair.arrears == 0


def test_a_reservation_survives_the_seller(scene):
    scene.deliver(EXPOSURE // 2)
    scene.world.crash(scene.seller)
    scene.seller.boot()
    partner = scene.seller.ledger.desk.partner(scene.buyer.id)
    assert partner.delivered == EXPOSURE // 2
    scene.seller.ledger.selling.want_room(scene.buyer.id, EXPOSURE // 2 + 1)
    scene.seller.runner.flush()
    assert scene.seller.ledger.selling.room(scene.buyer.id) == 0


@pytest.mark.parametrize("instant", ["crash_before_commit", "crash_after_commit"])
def test_a_seller_killed_while_booking_books_once(scene, instant):
    scene.deliver(20)
    scene.accept()
    scene.sign()
    scene.buyer.runner.flush()
    scene.world.step += 1
    scene.world.arrive()
    setattr(scene.world.rates, instant, 1.0)
    with pytest.raises(CrashError):
        scene.seller.runner.flush()
    scene.world.rates.calm()
    scene.world.crash(scene.seller)
    scene.end()
    assert scene.owed() == [20, 20]


def test_a_seller_that_forgot_the_attempt_books_the_money_and_does_not_attest(scene):
    scene.deliver(20)
    scene.accept()
    scene.world.crash(scene.seller)
    scene.rest()
    scene.sign()
    scene.end()
    assert scene.owed() == [20, 20]
    rows = scene.buyer.db.execute("SELECT attest FROM voucher_out").fetchall()
    assert [attest for (attest,) in rows][-1] == 0


def test_a_seller_that_knows_the_attempt_attests(scene):
    scene.deliver(20)
    scene.accept()
    scene.sign()
    scene.end()
    rows = scene.buyer.db.execute("SELECT attest FROM voucher_out").fetchall()
    assert rows == [(1,)]


def test_a_buyer_restored_from_a_backup_adopts_what_it_forgot(scene):
    scene.deliver(20)
    backup = scene.buyer.db.serialize("main")
    scene.accept()
    scene.sign()
    scene.end()
    scene.world.crash(scene.buyer)
    scene.buyer.lose(backup)
    assert scene.buyer.db.execute("SELECT count(*) FROM entry").fetchall() == [(0,)]
    scene.end()
    assert scene.owed() == [20, 20]


def test_both_killed_leaves_the_loss_inside_the_exposure(scene):
    scene.deliver(20)
    scene.accept()
    scene.world.crash(scene.buyer)
    scene.world.crash(scene.seller)
    scene.end()
    assert scene.owed() == [0, 0]


def test_an_idle_seller_soon_gives_back_what_it_did_not_use():
    """So that a crash between two sales leaves nothing to heal."""
    scene = Scene()
    scene.deliver(5)
    scene.accept()
    scene.sign()
    scene.seller.ledger.selling.end_sale(scene.buyer.id, scene.attempt)
    for _ in range(int(6 / STEP_SECONDS)):
        scene.world.advance()
    pair = books.read_pair(scene.seller.db, scene.buyer.id)
    assert pair.reserved == pair.paid == 5


def request(scene, number, parts=1):
    blob = encode(scene.buyer.ledger.desk.epoch, SyncRequest(number, 0, parts))
    scene.seller.ledger.receive(scene.buyer.id, blob)


def test_one_round_of_sync_a_second_is_answered():
    scene = Scene()
    scene.flush()
    for number in range(100, 200):
        request(scene, number)
    assert scene.seller.runner.queued <= 1
    scene.world.now += 1
    scene.seller.ledger.tick()
    assert scene.seller.runner.queued <= 2


def test_a_stranger_may_not_fill_memory_with_parts():
    scene = Scene()
    partner = scene.seller.ledger.desk.partner(scene.buyer.id)
    request(scene, 100, 17)
    partner.pair = partner.pair._replace(known=False)
    with pytest.raises(PeerError):
        request(scene, 101, 17)
    assert not partner.link.request or 100 in {p.round for p in partner.link.request.values()}
