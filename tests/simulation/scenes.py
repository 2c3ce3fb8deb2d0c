"""Directed scenes: a few nodes, no faults but those that the scene makes, one rule at stake.

A scene that a planted bug must break raises `BrokenError`, as the swarm does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from aivillage.ledger import books, payer, transfers
from aivillage.ledger.exposure import Word
from aivillage.protocols.errors import AivillageError
from aivillage.protocols.vouchers import REFUND, ROUTE, Item, Voucher, decode
from tests.simulation import households, invariants, ledger_sim, rings
from tests.simulation.world import EXPOSURE, LINE, STEP_SECONDS, Node, World, broken

STEP_MAX = EXPOSURE // transfers.STEPS_PER_EXPOSURE


class Village:
    """`size` honest nodes that know each other, all linked and synced."""

    def __init__(self, size: int = 3) -> None:
        self.world = World(seed=1, size=size)
        self.world.rates.calm()
        self.nodes = self.world.nodes
        for node in self.nodes:
            node.lie = ""
            for peer in self.nodes:
                if peer is not node:
                    self.lend(node, peer, LINE)
        self.rest()

    def lend(self, node: Node, peer: Node, line: int) -> None:
        """`node` lets `peer` owe `line`, and `peer` knows."""
        node.ledger.certify(peer.id, (line, EXPOSURE), None, _nothing, _nothing)
        peer.ledger.set_received(node.id, (line, EXPOSURE), _nothing, _nothing)
        for one in (node, peer):
            one.runner.flush()

    def rest(self) -> None:
        for _ in range(400):
            self.step()
            if ledger_sim.at_rest(self.world):
                return
        raise broken("live", "no rest")

    def step(self) -> None:
        self.world.advance()
        invariants.at_every_step(self.world)

    def wait(self, seconds: float) -> None:
        for _ in range(int(seconds / STEP_SECONDS)):
            self.step()

    def part(self, a: Node, b: Node) -> None:
        """They do not reach each other until `meet`."""
        low, high = sorted((a, b), key=lambda node: node.index)
        self.world.apart.add((low.index, high.index))
        self.world.disconnect(low, high)

    def meet(self) -> None:
        self.world.apart.clear()
        self.rest()

    def stop(self, node: Node) -> None:
        """It books what comes and passes nothing on."""
        node.lie = "stops"
        node.ledger.routing.step = lambda: lambda db: []  # type: ignore[method-assign]

    def restore(self, node: Node, image: bytes) -> None:
        """Its disk is an older one."""
        self.world.crash(node)
        node.lose(image)
        node.boot()

    def owes(self, debtor: Node, creditor: Node) -> int:
        """By the creditor's book."""
        return books.read_pair(creditor.db, debtor.id).balance

    def try_ring(self, starter: Node, *others: Node, amount: int) -> bytes | AivillageError:
        """The xid once it is durable, or why not."""
        results: list[bytes | AivillageError] = []
        peers, random_bytes = [node.id for node in others], self.world.rng.randbytes(8)
        routing = starter.ledger.routing
        routing.start(peers, amount, random_bytes, results.append, results.append)
        starter.runner.flush()
        return results[0]

    def ring(self, starter: Node, *others: Node, amount: int) -> bytes:
        xid = self.try_ring(starter, *others, amount=amount)
        assert isinstance(xid, bytes), xid
        return xid

    def sign(self, node: Node, peer: Node, item: Item) -> Voucher:
        """A voucher that the rules would not have let `node` sign; durable, and sent."""
        with node.db:
            wallet = node.ledger.desk.wallet
            voucher = payer.make_voucher(node.db, wallet, peer.id, [item], node.clock.unix_ms())
        assert voucher is not None
        node.ledger.buying.send(node.ledger.desk.partner(peer.id), [voucher])
        return voucher

    def end(self) -> None:
        self.rest()
        invariants.when_quiet(self.world)


def _nothing(*_: object) -> None:
    """Nobody waits for it."""


def state_of(node: Node, xid: bytes) -> str:
    """Of a ring that `node` started."""
    row = books.one(node.db, "SELECT state FROM route WHERE xid = ?", (xid,))
    return str(row[0]) if row else ""


def ended(village: Village, starter: Node, xid: bytes, state: str) -> None:
    village.rest()
    if state_of(starter, xid) != state:
        raise broken("T", f"the ring is {state_of(starter, xid)}, not {state}")


def present(giver: Node, taker: Node, amount: int) -> None:
    giver.ledger.buying.give(taker.id, amount, bytes(16), _nothing, _nothing)
    giver.runner.flush()


# ---------------------------------------------------------------- one rule each


def a_frame_of_an_old_boot_is_not_heard() -> None:
    village = Village()
    giver, taker, _ = village.nodes
    before = giver.db.serialize("main")
    present(giver, taker, 5)
    late = [frame.blob for frame in village.world.frames if frame.target is taker]
    village.restore(giver, before)
    village.rest()
    for blob in late:
        if isinstance(decode(blob or b"")[1], Voucher):
            taker.ledger.receive(giver.id, blob or b"")
    village.end()


def an_epoch_rises_though_the_clock_went_back() -> None:
    """Else the peers would take what the new boot says for what an old one said."""
    village = Village()
    giver, taker, _ = village.nodes
    giver.clock.skew_ms = -600_000
    village.world.crash(giver)
    village.rest()
    present(giver, taker, 5)
    village.end()
    if village.owes(giver, taker) != 5:
        raise broken("live", "a rebooted node is not heard")


def what_is_at_risk_survives_a_restart() -> None:
    village = Village()
    starter, middle, last = village.nodes
    village.stop(middle)
    for _ in range(2 * transfers.STEPS_PER_EXPOSURE):
        village.try_ring(starter, middle, last, amount=STEP_MAX)
        village.world.crash(starter)
        village.rest()
        village.wait(2)


def rings_through_one_peer_share_its_exposure() -> None:
    village = Village(4)
    starter, middle, last, other = village.nodes
    village.stop(middle)
    for number in range(2 * transfers.STEPS_PER_EXPOSURE):
        end = last if number % 2 else other
        village.try_ring(starter, middle, end, amount=STEP_MAX)
        village.step()


def refunds_at_once_stay_within_line_and_exposure() -> None:
    """It spends what was passed on to it, and gives back what was settled long ago."""
    village = Village()
    starter, middle, last = village.nodes
    village.lend(middle, last, EXPOSURE)
    xids: list[bytes] = []
    for batch in range(4):
        for _ in range(4):
            xids.append(village.ring(starter, middle, last, amount=STEP_MAX))
            ended(village, starter, xids[-1], "closed")
        for number in range(3):
            work(village, last, middle, 10 * batch + number, 20)
    last.lie = "gives back"
    for xid in xids:
        village.sign(last, middle, Item(REFUND, xid, b"", STEP_MAX, bytes(32), True))
    village.rest()
    if village.owes(last, middle) - rings.held_back(middle, last.id) > 2 * EXPOSURE:
        raise broken("I14", "what came back at once took a peer over line and exposure")


def a_ring_is_not_closed_with_less() -> None:
    """The thief is the last of a ring of its own that has the same id."""
    village = Village()
    starter, thief, last = village.nodes
    village.stop(thief)
    xid = village.ring(starter, thief, last, amount=STEP_MAX)
    village.wait(2)
    route = tuple(node.signer.public_key for node in (starter, last, thief))
    village.sign(thief, starter, Item(REFUND, xid, b"", 1, bytes(32), True))
    village.sign(thief, starter, Item(ROUTE, xid, b"", 1, bytes(32), True, route))
    ended(village, starter, xid, "open")


def one_id_of_two_neighbours_is_passed_on_once() -> None:
    village = Village(4)
    thief, first, middle, last = village.nodes
    xid = village.ring(thief, middle, last, amount=STEP_MAX)
    village.rest()
    thief.lie = "cheats"
    before = village.owes(first, middle)
    ring = tuple(node.signer.public_key for node in (thief, first, middle, last))
    village.sign(thief, first, Item(ROUTE, xid, b"", STEP_MAX, bytes(32), True, ring))
    village.rest()
    if village.owes(first, middle) != before:
        raise broken("T", "one id was passed on twice")


def an_expired_transfer_goes_back() -> None:
    village = Village()
    starter, middle, last = village.nodes
    village.part(middle, last)
    xid = village.ring(starter, middle, last, amount=STEP_MAX)
    village.wait(village.world.settings.route_seconds + 3)
    village.meet()
    ended(village, starter, xid, "refunded")
    village.end()


def a_restored_middle_asks_before_it_passes_on() -> None:
    """It passed the transfer on, forgot it, and hears of it from the one before it first."""
    village = Village()
    starter, middle, last = village.nodes
    before = middle.db.serialize("main")
    xid = village.ring(starter, middle, last, amount=STEP_MAX)
    ended(village, starter, xid, "closed")
    village.part(middle, last)
    village.restore(middle, before)
    village.wait(3)
    village.world.apart.clear()
    village.world.rates.loss = 1.0
    village.wait(3)
    village.world.rates.loss = 0
    village.rest()
    rings.never_more_out(middle)
    village.end()


def a_refund_is_passed_back() -> None:
    """The last one is lent too little by the one before it, which it alone does not know."""
    village = Village(4)
    starter, middle, other, last = village.nodes
    village.lend(last, other, 0)
    xid = village.ring(starter, middle, other, last, amount=STEP_MAX)
    ended(village, starter, xid, "refunded")
    village.end()


def a_peer_owes_no_more_than_its_line() -> None:
    village = Village()
    starter, middle, last = village.nodes
    village.lend(middle, starter, 20)
    starter.ledger.set_received(middle.id, (LINE, EXPOSURE), _nothing, _nothing)
    starter.runner.flush()
    for _ in range(3):
        village.ring(starter, middle, last, amount=STEP_MAX)
        village.rest()
        if village.owes(starter, middle) > 20:
            raise broken("I14", "a transfer took a peer over its line")
    village.end()


def devices_of_one_owner_share_its_line_in_transfers() -> None:
    village = Village(4)
    phone, laptop, middle, last = village.nodes
    for device in (phone, laptop):
        middle.ledger.certify(device.id, (20, 20), "owner", _nothing, _nothing)
    middle.runner.flush()
    for device in (phone, laptop, phone, laptop):
        village.ring(device, middle, last, amount=STEP_MAX)
        village.rest()
        owed = village.owes(phone, middle) + village.owes(laptop, middle)
        if owed > 20:
            raise broken("I14", f"two devices of one owner owe {owed}")
    village.end()


def a_ring_goes_on_when_a_member_changed_its_key() -> None:
    """The ring names it by its former key; what it signs on the way is by the next one."""
    village = Village()
    starter, middle, last = village.nodes
    village.part(middle, last)
    xid = village.ring(starter, middle, last, amount=STEP_MAX)
    village.wait(2)
    for node in (middle, last):
        village.world.crash(node)
        village.world.rekeys = 1.0
        households.change_key(village.world, node)
        village.world.rekeys = 0.0
        node.boot()
    village.meet()
    ended(village, starter, xid, "closed")
    village.end()


def nobody_passes_on_more_than_the_next_lends() -> None:
    """As far as the middle knows: the next would take more."""
    village = Village()
    starter, middle, last = village.nodes
    middle.ledger.set_received(last.id, (20, EXPOSURE), _nothing, _nothing)
    middle.runner.flush()
    for _ in range(3):
        village.ring(starter, middle, last, amount=STEP_MAX)
        village.rest()
        if village.owes(middle, last) > 20:
            raise broken("I14", "a middle came to owe more than it is lent")


def work(village: Village, buyer: Node, seller: Node, number: int, amount: int) -> bool:
    """Delivered, accepted and signed for; False where the seller has no room for it."""
    attempt, mark = bytes([number]) * 16, bytes([number]) * 32
    buyer.ledger.buying.intend(seller.id, attempt, b"q", amount)
    seller.ledger.selling.begin_sale(buyer.id, attempt, b"q", amount)
    seller.ledger.selling.want_room(buyer.id, amount)
    seller.runner.flush()
    if not seller.ledger.selling.deliver(buyer.id, attempt, amount, mark):
        return False
    seller.delivered[buyer.id] = seller.delivered.get(buyer.id, 0) + amount
    buyer.ledger.buying.settle(seller.id, attempt, amount, mark, _nothing, _nothing)
    seller.ledger.selling.end_sale(buyer.id, attempt)
    village.rest()
    return True


def nobody_works_beyond_the_line() -> None:
    village = Village()
    buyer, seller, _ = village.nodes
    village.lend(seller, buyer, 50)
    done = [work(village, buyer, seller, number, 20) for number in range(4)]
    if village.owes(buyer, seller) > 50 or not done[1]:
        raise broken("I14", "a buyer came to owe more than its line")
    village.end()


def a_proven_liar_has_nothing_passed_on() -> None:
    village = Village()
    starter, middle, last = village.nodes
    with middle.db:
        books.keep_evidence(middle.db, starter.id, (bytes(16), 1), (b"a", b"b", b"c", b"d"), 1)
    xid = village.ring(starter, middle, last, amount=STEP_MAX)
    ended(village, starter, xid, "refunded")


def a_stranger_has_nothing_passed_on() -> None:
    """A blocked peer neither: its line is nothing."""
    village = Village()
    starter, middle, last = village.nodes
    middle.ledger.decree(starter.id, Word(blocked=True), _nothing, _nothing)
    middle.runner.flush()
    xid = village.ring(starter, middle, last, amount=STEP_MAX)
    ended(village, starter, xid, "refunded")


def a_ring_ends_once() -> None:
    """A middle that passed on and pays back as well: a present; the ring stays closed."""
    village = Village()
    starter, middle, last = village.nodes
    xid = village.ring(starter, middle, last, amount=STEP_MAX)
    ended(village, starter, xid, "closed")
    middle.lie = "pays twice"
    village.sign(middle, starter, Item(REFUND, xid, b"", STEP_MAX, bytes(32), True))
    ended(village, starter, xid, "closed")


def what_was_given_up_and_comes_back_is_no_loss() -> None:
    village = Village()
    starter, middle, last = village.nodes
    village.part(middle, last)
    xid = village.ring(starter, middle, last, amount=STEP_MAX)
    village.wait(1)
    starter.ledger.routing.release(xid, _nothing, _nothing)
    starter.runner.flush()
    village.wait(village.world.settings.route_seconds + 3)
    village.meet()
    ended(village, starter, xid, "refunded")
    if books.one(starter.db, "SELECT 1 FROM account WHERE account = 'writeoff' AND amount <> 0"):
        raise broken("T", "what came back is still written off")
    village.end()


def money_without_items_counts_in_the_end() -> None:
    """The payer lost a voucher whose successor had arrived: nobody has its items."""
    village = Village()
    buyer, seller, _ = village.nodes
    before = buyer.db.serialize("main")
    for number in (1, 2):
        attempt = bytes([number]) * 16
        buyer.ledger.buying.intend(seller.id, attempt, b"q", 20)
        buyer.ledger.buying.settle(seller.id, attempt, 20, bytes(32), _nothing, _nothing)
        buyer.runner.flush()
        if number == 1:
            village.world.frames.clear()
    village.world.step += 1
    village.world.arrive()
    seller.runner.flush()
    village.restore(buyer, before)
    village.end()
    if books.read_pair(seller.db, buyer.id).paid != 40:
        raise broken("I12", "money that no item explains does not count as pay")


def proofs_survive_compaction() -> None:
    village = Village()
    giver, taker, _ = village.nodes
    for number in (1, 2):
        giver.ledger.buying.give(taker.id, 5, bytes([number]) * 16, _nothing, _nothing)
        giver.runner.flush()
    village.rest()
    village.world.compact(giver)
    giver.runner.flush()
    village.end()


SCENES: Final[tuple[Callable[[], None], ...]] = (
    a_frame_of_an_old_boot_is_not_heard,
    an_epoch_rises_though_the_clock_went_back,
    what_is_at_risk_survives_a_restart,
    rings_through_one_peer_share_its_exposure,
    an_expired_transfer_goes_back,
    a_restored_middle_asks_before_it_passes_on,
    a_refund_is_passed_back,
    a_peer_owes_no_more_than_its_line,
    devices_of_one_owner_share_its_line_in_transfers,
    a_ring_goes_on_when_a_member_changed_its_key,
    nobody_passes_on_more_than_the_next_lends,
    nobody_works_beyond_the_line,
    a_proven_liar_has_nothing_passed_on,
    a_stranger_has_nothing_passed_on,
    a_ring_ends_once,
    what_was_given_up_and_comes_back_is_no_loss,
    money_without_items_counts_in_the_end,
    proofs_survive_compaction,
    refunds_at_once_stay_within_line_and_exposure,
    a_ring_is_not_closed_with_less,
    one_id_of_two_neighbours_is_passed_on_once,
)
