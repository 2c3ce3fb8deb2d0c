"""Earned at one peer, spent at another: on real daemons, by each way there is, across kills."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

import pytest

from tests.integration.daemons import Daemon, Yard, settled, wait_for

pytestmark = pytest.mark.slow
NOOP = 10
LINE, EXPOSURE = 400, 160
STEP = EXPOSURE // 4
FLAGS = (
    "--set", f"village_line_micro_credits={LINE}",
    "--set", f"village_exposure_micro_credits={EXPOSURE}",
    "--set", "netting_seconds=3600",
    "--set", "heartbeat_seconds=0.5",
)  # fmt: skip


@pytest.fixture
def yard(tmp_path: pathlib.Path) -> Iterator[Yard]:
    with Yard(tmp_path) as yard:
        yield yard


def village(yard: Yard, *names: str, flags: tuple[str, ...] = FLAGS) -> list[Daemon]:
    daemons = yard.village(*names, flags=flags)
    yard.know_each_other(*daemons)
    return daemons


def work(buyer: Daemon, seller: Daemon, jobs: int) -> None:
    """Real jobs, one after the other, each paid."""
    for _ in range(jobs):
        job = buyer.submit("mesh.noop", peer=seller.peer, note="x")
        assert buyer.job_ended(job, 30)["state"] == "done"


def owes(debtor: Daemon, creditor: Daemon) -> int:
    """What the creditor's book says that the debtor owes it."""
    peers: list[dict[str, Any]] = creditor.ask("balance")["peers"]
    return sum(peer["net"] for peer in peers if peer["peer"] == debtor.peer)


def debts(*pairs: tuple[Daemon, Daemon]) -> list[int]:
    return [owes(debtor, creditor) for debtor, creditor in pairs]


def test_a_mutual_acquaintance_pays_when_a_line_is_used_up(yard: Yard) -> None:
    """B owes A for work. A has used up its line at C, and goes on: B pays C for it."""
    a, b, c = village(yard, "ann", "bob", "cat")
    work(b, a, 30)
    settled([a, b, c], 10)
    work(a, c, LINE // NOOP)
    settled([a, b, c], 10)
    assert debts((b, a), (a, c)) == [300, LINE]
    work(a, c, 10)  # more than the line, and nobody raised it
    settled([a, b, c], 10)
    moved = owes(b, c)
    assert moved >= 10 * NOOP
    assert debts((b, a), (a, c)) == [300 - moved, LINE + 10 * NOOP - moved]


def test_the_treasury_keeps_what_was_earned_and_pays_elsewhere(yard: Yard) -> None:
    """A deposits at the village's founder what B owes it, and spends that at C later."""
    treasury, a, b, c = village(yard, "tom", "ann", "bob", "cat")
    work(b, a, 20)
    deposit = a.run("settle", treasury.peer, "0.0002", "--json").json
    assert deposit["amount"] == 200
    settled([treasury, a, b, c], 10)
    assert debts((b, a), (treasury, a), (b, treasury)) == [0, 200, 200]
    b.stop()  # who owed it first is not needed any more
    work(a, c, LINE // NOOP + 5)
    b.restart()
    settled([treasury, a, b, c], 20)
    moved = owes(treasury, c)
    assert moved >= 5 * NOOP
    assert debts((treasury, a), (a, c)) == [200 - moved, LINE + 5 * NOOP - moved]


def test_a_ring_of_debts_nets_to_zero(yard: Yard) -> None:
    """A owes B, B owes C, C owes A, the same amount: nobody owes anybody afterwards."""
    a, b, c = village(yard, "ann", "bob", "cat")
    for debtor, creditor in ((a, b), (b, c), (c, a)):
        work(debtor, creditor, 16)
    settled([a, b, c], 10)
    assert debts((a, b), (b, c), (c, a)) == [160, 160, 160]
    done = a.run("settle", b.peer)
    assert done.code == 0, done
    assert done.out.startswith("moved 0.00016 of 0.00016 credits")
    settled([a, b, c], 10)
    assert debts((a, b), (b, c), (c, a)) == [0, 0, 0]
    assert [node.ask("balance")["net"] for node in (a, b, c)] == [0, 0, 0]


def test_a_ring_of_debts_nets_by_itself(yard: Yard) -> None:
    """Nobody asks: beyond a quarter of a line each of the three looks once a second."""
    a, b, c = village(yard, "ann", "bob", "cat", flags=(*FLAGS, "--set", "netting_seconds=1"))
    ring = ((a, b), (b, c), (c, a))
    for debtor, creditor in ring:
        work(debtor, creditor, 16)
    wait_for(lambda: max(map(abs, debts(*ring))) <= LINE // 4, 30, "it is netted")
    settled([a, b, c], 20)
    assert len({*debts(*ring)}) == 1
    assert max(map(abs, debts(*ring))) <= LINE // 4
    assert [node.ask("balance")["net"] for node in (a, b, c)] == [0, 0, 0]
    assert sum(node.ask("events")["counts"].get("debt_netted", 0) for node in (a, b, c))


def test_a_member_killed_among_many_rings_loses_nobody_anything(yard: Yard) -> None:
    """Killed while rings are under way; when it is back, books agree and nothing is stuck.

    At chosen instants: test_spending_kills.py.
    """
    a, b, c = village(yard, "ann", "bob", "cat")
    work(b, a, 36)
    work(a, c, 36)
    settled([a, b, c], 10)
    settling = a.spawn("settle", c.peer)
    wait_for(lambda: owes(b, c), 10, "the first ring closes")
    b.kill()
    settling.communicate(timeout=60)
    b.restart()
    wait_for(lambda: not a.ask("balance").get("held"), 150, "no ring is open any more")
    settled([a, b, c], 30)
    moved = owes(b, c)
    assert 0 < moved <= 360
    assert debts((b, a), (a, c)) == [360 - moved, 360 - moved]


def test_a_member_that_is_away_leaves_the_ring_to_the_next(yard: Yard) -> None:
    """Nobody else to pay: said so, with the reason, and nothing moves."""
    a, b, c = village(yard, "ann", "bob", "cat")
    work(b, a, 5)
    work(a, c, 5)
    settled([a, b, c], 10)
    b.kill()
    wait_for(lambda: a.ask("status")["peers"] == 1, 20, "its absence is noticed")
    refused = a.run("settle", c.peer)
    assert refused.code == 5
    assert "could be moved" in refused.text
    assert owes(a, c) == 50
