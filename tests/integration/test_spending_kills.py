"""Spending elsewhere on real daemons, each way, where a member dies, forgets or cheats half way.

A transfer is stopped where it should hurt most: the middle was paid and has not paid the next
one. Tests see that in its file, and kill then. One village of four is used for all scenes, so
each speaks of what changed.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from tests.integration import books_on_disk as book
from tests.integration.daemons import Daemon, Yard, paused, settled, wait_for

pytestmark = pytest.mark.slow
NOOP = 10
LINE, EXPOSURE = 1000, 160
STEP = EXPOSURE // 4
FLAGS = (
    "--set", f"village_line_micro_credits={LINE}",
    "--set", f"village_exposure_micro_credits={EXPOSURE}",
    "--set", "netting_seconds=3600",
    "--set", "heartbeat_seconds=3",
)  # fmt: skip


class Village(NamedTuple):
    treasury: Daemon
    ann: Daemon
    bob: Daemon
    cat: Daemon


@pytest.fixture(scope="module")
def one_village(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Village]:
    with Yard(tmp_path_factory.mktemp("spending")) as yard:
        village = Village(*yard.village("tom", "ann", "bob", "cat", flags=FLAGS))
        yard.know_each_other(*village)
        yield village


@pytest.fixture
def village(one_village: Village) -> Village:
    """Everybody runs and is honest, whatever the scene before did."""
    for daemon in one_village:
        if daemon.module != "aivillage" and daemon.running():
            daemon.kill()
        daemon.module = "aivillage"
    up(*(daemon for daemon in one_village if not daemon.running()))
    return one_village


def up(*daemons: Daemon) -> None:
    """Starts all of them again at once."""
    for daemon in daemons:
        daemon.relaunch()
    for daemon in daemons:
        daemon.await_ready()


def work(buyer: Daemon, seller: Daemon, amount: int) -> None:
    """Real jobs, one after the other, each paid."""
    for _ in range(amount // NOOP):
        job = buyer.submit("mesh.noop", peer=seller.peer, note="x")
        assert buyer.job_ended(job, 30)["state"] == "done"


def owes_most(debtor: Daemon, creditor: Daemon, village: Village, more: int = NOOP) -> None:
    """Has `debtor` buy until it owes `creditor` a step, and more than anybody else by `more`:
    rings of the creditor begin with it."""
    others = [book.owed(creditor, other.peer) for other in village if other is not debtor]
    short = max(STEP, more + max(others)) - book.owed(creditor, debtor.peer)
    work(debtor, creditor, max(0, short))


class Ring(NamedTuple):
    """`starter` pays `middle`, which pays `last`, which pays `starter`."""

    starter: Daemon
    middle: Daemon
    last: Daemon

    @property
    def debts(self) -> list[int]:
        """What each owes the one that it pays, by the files of both sides, which must agree."""
        pairs = [(self[n], self[(n + 1) % 3]) for n in range(3)]
        found = [book.owed(creditor, debtor.peer) for debtor, creditor in pairs]
        assert found == [-book.owed(debtor, creditor.peer) for debtor, creditor in pairs]
        return found


def treasury(village: Village) -> Ring:
    """A earned from B, keeps that at the treasury, and spends it at C."""
    a, tom = village.ann, village.treasury
    owes_most(village.bob, a, village)
    deposit = a.run("settle", tom.peer, "0.00004", "--json")
    assert deposit.code == 0, deposit
    owes_most(tom, a, village)
    work(a, village.cat, STEP)
    return Ring(a, tom, village.cat)


def acquaintance(village: Village) -> Ring:
    """B owes A, who owes C: B, whom both know, pays C."""
    owes_most(village.bob, village.ann, village)
    work(village.ann, village.cat, STEP)
    return Ring(village.ann, village.bob, village.cat)


def netting(village: Village) -> Ring:
    """A owes B, B owes C, C owes A."""
    a, b, c = village.ann, village.bob, village.cat
    owes_most(c, a, village)
    work(a, b, STEP)
    work(b, c, STEP)
    return Ring(a, c, b)


WAYS = (treasury, acquaintance, netting)


def meet(*daemons: Daemon) -> None:
    """Returns when each of them has synced with all the others."""

    def met() -> bool:
        for daemon in daemons:
            synced = {peer["peer"] for peer in daemon.ask("peers") if peer["synced"]}
            if not {other.peer for other in daemons if other is not daemon} <= synced:
                return False
        return True

    wait_for(met, 40, f"{[daemon.name for daemon in daemons]} meet")


def begin(ring: Ring, amount: str = "0.00004") -> subprocess.Popen[str]:
    return ring.starter.spawn("settle", ring.last.peer, amount)


def taken_and_not_passed_on(ring: Ring) -> bytes:
    """The transfer that the middle was paid and holds, as its file says."""
    found = wait_for(lambda: book.transfers(ring.middle, "waiting"), 20, "the middle is paid")
    assert len(found) == 1
    assert (book.came(ring.middle, found[0]), book.passed_on(ring.middle, found[0])) == (1, 0)
    return found[0]


def begun_and_taken(ring: Ring) -> bytes:
    """A transfer that the middle was paid and holds; the starter is killed then, so that it looks
    for no other way."""
    command = begin(ring)
    xid = taken_and_not_passed_on(ring)
    ring.starter.kill()
    command.communicate(timeout=30)
    assert book.rings(ring.starter, "open") == {xid: STEP}
    return xid


def last_dies_paid(ring: Ring, xid: bytes) -> None:
    """Starts the last one, which is paid and cannot pay the starter, which hangs; and kills it."""
    with paused(ring.starter):
        up(ring.last)
        wait_for(lambda: book.transfers(ring.last, "waiting") == [xid], 20, "the last is paid")
        assert (book.came(ring.last, xid), book.passed_on(ring.last, xid)) == (1, 0)
        ring.last.kill()


def closed_once(
    village: Village, ring: Ring, xid: bytes, before: list[int], nets: list[int]
) -> None:
    """All of the step moved around, once; nobody is richer or poorer, and all books agree."""
    wait_for(lambda: xid in book.rings(ring.starter, "closed"), 60, "the ring closes")
    settled([*village], 20)
    for member in ring:
        assert (book.came(member, xid), book.passed_on(member, xid)) == (1, 1)
    assert ring.debts == [debt + STEP for debt in before]
    assert [book.net(member) for member in ring] == nets
    assert not book.rings(ring.starter, "open")


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_each_role_killed_half_way_costs_nobody_anything(village: Village, way) -> None:
    """SIGKILL of the middle when it was paid and had not paid on, of the starter whose ring is
    open, and of the last when it was paid and the starter was not."""
    ring = way(village)
    settled([*village], 20)
    before, nets = ring.debts, [book.net(member) for member in ring]
    ring.last.kill()
    xid = begun_and_taken(ring)
    ring.middle.kill()
    up(ring.middle, ring.starter)
    meet(ring.starter, ring.middle)
    assert taken_and_not_passed_on(ring) == xid
    last_dies_paid(ring, xid)
    up(ring.last)
    closed_once(village, ring, xid, before, nets)


def test_a_middle_killed_when_it_signed_and_nobody_had_heard(village: Village) -> None:
    """The next one hangs, so what the middle signed lies in a socket when the middle dies."""
    ring = acquaintance(village)
    settled([*village], 20)
    before, nets = ring.debts, [book.net(member) for member in ring]
    known = {*book.transfers(ring.middle, "forwarded")}
    with paused(ring.last):
        command = begin(ring)
        wait_for(lambda: {*book.transfers(ring.middle, "forwarded")} > known, 20, "it signed")
        ring.middle.kill()
        ring.starter.kill()
        command.communicate(timeout=30)
        (xid,) = book.rings(ring.starter, "open")
        assert (book.passed_on(ring.middle, xid), book.came(ring.last, xid)) == (1, 0)
    up(ring.middle, ring.starter)
    closed_once(village, ring, xid, before, nets)


def test_a_middle_restored_from_a_backup_passes_on_once(village: Village) -> None:
    """It paid the next, forgot that it was paid and that it paid, and is shown both."""
    ring = treasury(village)
    settled([*village], 20)
    before, nets = ring.debts, [book.net(member) for member in ring]
    older = ring.middle.data_dir.with_suffix(".tar")
    done = ring.middle.run("backup", str(older), "--force")
    assert done.code == 0, done
    ring.last.kill()
    xid = begun_and_taken(ring)
    up(ring.starter)
    meet(ring.starter, ring.middle)
    last_dies_paid(ring, xid)
    ring.middle.kill()
    done = ring.middle.run("restore", str(older), "--force")
    assert done.code == 0, done
    assert (book.came(ring.middle, xid), book.passed_on(ring.middle, xid)) == (0, 0)
    up(ring.middle)
    assert taken_and_not_passed_on(ring) == xid  # the last may know better, and is not here
    up(ring.last)
    closed_once(village, ring, xid, before, nets)


def test_a_middle_that_takes_and_keeps_gains_one_exposure_and_no_more(village: Village) -> None:
    """Asked again and again, across a SIGKILL of the starter; the others lose nothing."""
    ring = acquaintance(village)
    owes_most(village.bob, village.ann, village, EXPOSURE)
    settled([*village], 20)
    nets = [book.net(daemon) for daemon in village]
    thief = ring.middle
    thief.kill()
    thief.module = "tests.integration.denying_node"
    up(thief)
    meet(ring.starter, ring.middle)
    taken = 0
    for steps in (3, 1):  # three at a time, and a fourth is all that it may have
        command = begin(ring, f"0.000{steps * STEP // 10:02d}")
        taken += steps
        wait_for(lambda n=taken: len(book.transfers(thief, "waiting")) == n, 20, "it takes them")
        ring.starter.kill()
        command.communicate(timeout=30)
        up(ring.starter)
        meet(ring.starter, ring.middle)

    command = begin(ring)  # whoever refuses, this goes another way
    command.communicate(timeout=30)
    assert len(book.transfers(thief, "waiting")) == taken
    assert sum(book.rings(ring.starter, "open").values()) == taken * STEP == EXPOSURE
    settled([*village], 20)
    gained = [book.net(daemon) - net for daemon, net in zip(village, nets, strict=True)]
    assert gained == [0, -EXPOSURE, EXPOSURE, 0]
