"""Transfers on the simulator's world with its faults off: what each member's book says after."""

from __future__ import annotations

import pytest

from aivillage.ledger import books
from aivillage.ledger.audit import audit
from aivillage.ledger.corrections import doubtful
from aivillage.ledger.queries import run
from aivillage.protocols.errors import LedgerError, RefusedError, RequestError
from tests.simulation.scenes import STEP_MAX, Village, ended, present, state_of, work
from tests.simulation.world import EXPOSURE, CrashError

AMOUNT = 12


def owed(village):
    """Who owes whom, by both books, which must agree."""
    found = {}
    for a in village.nodes:
        for b in village.nodes:
            amount = village.owes(a, b)
            assert amount == -village.owes(b, a)
            if amount > 0:
                found[a.index, b.index] = amount
    return found


def net(node):
    row = books.one(node.db, "SELECT coalesce(sum(amount), 0) FROM bal")
    return row[0] if row else 0


def account(node, name):
    row = books.one(node.db, "SELECT amount FROM account WHERE account = ?", (name,))
    return row[0] if row else 0


def through_a_treasury():
    """0 earned at 1, banked it at the treasury, 2, and bought from 3."""
    village = Village(4)
    worker, customer, treasury, shop = village.nodes
    assert work(village, customer, worker, 1, AMOUNT)
    xid = village.ring(worker, customer, treasury, amount=AMOUNT)
    ended(village, worker, xid, "closed")
    assert owed(village) == {(1, 2): AMOUNT, (2, 0): AMOUNT}
    assert work(village, worker, shop, 2, AMOUNT)
    return village, (worker, treasury, shop), {(1, 2): AMOUNT, (2, 3): AMOUNT}


def through_an_acquaintance():
    """0 is owed by 1, whom 2 trusts, and bought from 2."""
    village = Village()
    buyer, acquaintance, seller = village.nodes
    assert work(village, acquaintance, buyer, 1, AMOUNT)
    assert work(village, buyer, seller, 2, AMOUNT)
    return village, (buyer, acquaintance, seller), {(1, 2): AMOUNT}


def netting():
    """0 owes 1 owes 2 owes 0: nobody owes anything in the end."""
    village = Village()
    for debtor, creditor in ((0, 1), (1, 2), (2, 0)):
        assert work(village, village.nodes[debtor], village.nodes[creditor], debtor, AMOUNT)
    a, b, c = village.nodes
    return village, (a, c, b), {}


KINDS = [through_a_treasury, through_an_acquaintance, netting]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def scene(request):
    """(village, members of the ring to come, what is owed once it closed)."""
    return request.param()


def test_a_debt_moves_around_and_the_books_are_exact(scene):
    village, ring, after = scene
    nets = [net(node) for node in village.nodes]
    xid = village.ring(*ring, amount=AMOUNT)
    ended(village, ring[0], xid, "closed")
    assert owed(village) == after
    assert [net(node) for node in village.nodes] == nets
    assert all(account(node, "routed") == 0 for node in village.nodes)
    village.end()


INSTANTS = ["crash_before_commit", "crash_after_commit", "crash_sending"]


def die(village, node, instant, act):
    setattr(village.world.rates, instant, 1.0)
    with pytest.raises(CrashError):
        act()
    village.world.rates.calm()
    village.world.crash(node)


@pytest.mark.parametrize("instant", INSTANTS)
@pytest.mark.parametrize("member", [1, 2])
def test_a_member_killed_while_it_passes_on_costs_nobody_anything(scene, member, instant):
    village, ring, after = scene
    xid = village.ring(*ring, amount=AMOUNT)
    for node in ring[1 : member + 1]:
        village.world.step += 1
        village.world.arrive()
        if node is ring[member]:
            die(village, node, instant, node.runner.flush)
        village.world.flush(node)
    ended(village, ring[0], xid, "closed")
    assert owed(village) == after
    village.end()


@pytest.mark.parametrize("instant", INSTANTS)
def test_a_starter_killed_while_it_begins_has_begun_or_not(scene, instant):
    village, ring, after = scene
    before = owed(village)
    die(village, ring[0], instant, lambda: village.ring(*ring, amount=AMOUNT))
    village.rest()
    assert owed(village) == (before if instant == "crash_before_commit" else after)
    village.end()


@pytest.mark.parametrize("moment", ["before it was paid", "after it passed on"])
def test_a_middle_restored_from_a_backup_asks_its_neighbours(scene, moment):
    village, ring, after = scene
    backup = ring[1].db.serialize("main")
    xid = village.ring(*ring, amount=AMOUNT)
    if moment == "after it passed on":
        village.world.step += 1
        village.world.arrive()
        ring[1].runner.flush()
        backup = ring[1].db.serialize("main")
    ended(village, ring[0], xid, "closed")
    village.restore(ring[1], backup)
    village.rest()
    assert owed(village) == after
    village.end()


def test_a_middle_that_is_down_for_a_while_goes_on_after(scene):
    village, ring, after = scene
    xid = village.ring(*ring, amount=AMOUNT)
    village.world.step += 1
    village.world.arrive()
    ring[1].runner.flush()
    village.world.frames.clear()
    village.world.crash(ring[1])
    ended(village, ring[0], xid, "closed")
    assert owed(village) == after


def test_a_middle_that_keeps_the_money_costs_the_starter_one_exposure_and_the_others_nothing(scene):
    village, ring, _ = scene
    starter, thief, last = ring
    nets = {node.index: net(node) for node in village.nodes}
    village.stop(thief)
    begun = [village.try_ring(*ring, amount=STEP_MAX) for _ in range(9)]
    xids = [one for one in begun if isinstance(one, bytes)]
    assert all(isinstance(one, LedgerError) for one in begun if one not in xids)
    village.wait(2 * village.world.settings.route_seconds)
    assert all(state_of(starter, xid) == "open" for xid in xids)
    lost = len(xids) * STEP_MAX
    assert nets[starter.index] - net(starter) == lost <= EXPOSURE
    assert all(net(n) == nets[n.index] for n in village.nodes if n not in {starter, thief})

    for xid in xids:
        starter.ledger.routing.release(xid, lambda amount: None, pytest.fail)
    starter.runner.flush()
    assert account(starter, "writeoff") == lost
    assert account(starter, "routed") == 0
    assert books.read_pair(starter.db, thief.id).routed == 0
    assert run(starter.db, audit(starter.signer.verify)).ok
    assert last.ledger.desk.partner(starter.id).link.synced


def test_a_middle_that_passes_on_and_denies_it_is_held_to_its_signature(scene):
    """It restores an older book and shows nobody what it signed; both neighbours have proof."""
    village, ring, _ = scene
    starter, liar, last = ring
    before = liar.db.serialize("main")
    nets = [net(starter), net(last)]
    xid = village.ring(*ring, amount=AMOUNT)
    ended(village, starter, xid, "closed")
    owed_then = [village.owes(liar, node) for node in (starter, last)]
    liar.lie = "withholds"
    village.restore(liar, before)
    village.rest()
    assert [village.owes(liar, node) for node in (starter, last)] == owed_then
    assert [net(starter), net(last)] == nets
    for node in (starter, last):
        assert run(node.db, audit(node.signer.verify)).ok


# ---------------------------------------------------------------- time


def test_a_middle_whose_next_it_has_not_met_waits_beyond_the_time():
    """The next may hold a voucher that the middle forgot: only SYNC tells."""
    village = Village()
    starter, middle, last = village.nodes
    village.part(middle, last)
    village.world.crash(middle)
    village.wait(5)
    xid = village.ring(starter, middle, last, amount=AMOUNT)
    village.wait(2 * village.world.settings.route_seconds)
    assert state_of(starter, xid) == "open"
    village.meet()
    ended(village, starter, xid, "refunded")
    assert owed(village) == {}
    village.end()


def test_a_refund_that_comes_after_the_release_is_written_back():
    village = Village()
    starter, middle, last = village.nodes
    village.part(middle, last)
    xid = village.ring(starter, middle, last, amount=AMOUNT)
    village.wait(1)
    costs = []
    starter.ledger.routing.release(xid, costs.append, pytest.fail)
    starter.runner.flush()
    assert costs == [AMOUNT] == [account(starter, "writeoff")]
    village.meet()
    ended(village, starter, xid, "closed")  # in time after all
    assert account(starter, "writeoff") == account(starter, "routed") == 0
    kinds = books.rows(starter.db, "SELECT kind FROM entry WHERE lane = x'' ORDER BY seq")
    assert kinds == [("release",), ("write-back",)]
    assert doubtful(starter.db, middle.id) == 0
    village.end()


@pytest.mark.parametrize("minutes", [-10, 10])
@pytest.mark.parametrize("member", [0, 1, 2])
def test_a_clock_ten_minutes_off_costs_nobody_anything(member, minutes):
    """Each holds a transfer by its own clock from when it came, so the ring just closes."""
    village = Village()
    village.nodes[member].clock.skew_ms = minutes * 60_000
    xid = village.ring(*village.nodes, amount=AMOUNT)
    ended(village, village.nodes[0], xid, "closed")
    assert {net(node) for node in village.nodes} == {0}
    village.end()


# ---------------------------------------------------------------- who may not


@pytest.mark.parametrize("others", [[], [1], [1, 1], [1, 2, 3, 1]])
def test_what_is_no_ring_is_not_started(others):
    village = Village(4)
    refused = village.try_ring(
        village.nodes[0], *(village.nodes[index] for index in others), amount=AMOUNT
    )
    assert isinstance(refused, RequestError | RefusedError)


@pytest.mark.parametrize("amount", [0, -5])
def test_a_transfer_moves_something(amount):
    village = Village()
    assert isinstance(village.try_ring(*village.nodes, amount=amount), RequestError)


def test_a_transfer_above_a_quarter_of_the_exposure_is_refused():
    village = Village()
    assert isinstance(village.try_ring(*village.nodes, amount=STEP_MAX + 1), LedgerError)
    assert isinstance(village.try_ring(*village.nodes, amount=STEP_MAX), bytes)


def test_the_first_must_lend_or_owe_what_is_paid_to_it():
    village = Village()
    starter, first, last = village.nodes
    village.lend(first, starter, STEP_MAX - 1)
    assert isinstance(village.try_ring(starter, first, last, amount=STEP_MAX), LedgerError)
    present(first, starter, 1)
    village.rest()
    assert isinstance(village.try_ring(starter, first, last, amount=STEP_MAX), bytes)


def test_the_last_must_stay_within_its_line():
    village = Village()
    starter, first, last = village.nodes
    village.lend(starter, last, EXPOSURE)
    assert work(village, last, starter, 1, EXPOSURE - AMOUNT)
    assert isinstance(village.try_ring(starter, first, last, amount=AMOUNT + 1), LedgerError)
    assert isinstance(village.try_ring(starter, first, last, amount=AMOUNT), bytes)


def test_nothing_is_started_while_the_first_is_away():
    village = Village()
    starter, first, last = village.nodes
    village.part(starter, first)
    assert isinstance(village.try_ring(starter, first, last, amount=1), RefusedError)


def test_only_an_open_ring_of_mine_is_released():
    village = Village()
    xid = village.ring(*village.nodes, amount=AMOUNT)
    ended(village, village.nodes[0], xid, "closed")
    errors = []
    for one in (xid, bytes(16)):
        village.nodes[0].ledger.routing.release(one, pytest.fail, errors.append)
    village.nodes[0].runner.flush()
    assert [type(error) for error in errors] == [RequestError, RequestError]
