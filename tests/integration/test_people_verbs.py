"""What the owner can say about people, by the real command on real nodes; then both books."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import pytest

from tests.integration import books_on_disk as book
from tests.integration.daemons import Daemon, Done, Yard, settled, wait_for

pytestmark = pytest.mark.slow
NOOP, LINE, EXPOSURE = 10, 100, 80
STEP = EXPOSURE // 4
FLAGS = (
    "--set", f"village_line_micro_credits={LINE}",
    "--set", f"village_exposure_micro_credits={EXPOSURE}",
    "--set", "heartbeat_seconds=1",
    "--set", "netting_seconds=3600",
)  # fmt: skip


@pytest.fixture
def yard(tmp_path: pathlib.Path) -> Iterator[Yard]:
    with Yard(tmp_path) as yard:
        yield yard


def said(daemon: Daemon, *words: str) -> str:
    """A command that must succeed, and what it printed."""
    done = daemon.run(*words)
    assert done.code == 0, (words, done)
    return done.out


def buys(buyer: Daemon, seller: Daemon, jobs: int = 1) -> None:
    for _ in range(jobs):
        job = buyer.submit("mesh.noop", peer=seller.peer, note="x")
        assert buyer.job_ended(job, 30)["state"] == "done"


def tries(buyer: Daemon, seller: Daemon) -> Done:
    return buyer.run("submit", "mesh.noop", "x", "--peer", seller.peer, "--deadline", "2")


def buys_all_it_can(buyer: Daemon, seller: Daemon) -> None:
    while (done := tries(buyer, seller)).code == 0:
        pass
    assert "waiting for credit" in done.text, done


def owes(debtor: Daemon, creditor: Daemon, amount: int) -> None:
    """By both books, once what is on its way has come."""

    def both() -> tuple[int, int]:
        return book.owed(creditor, debtor.peer), -book.owed(debtor, creditor.peer)

    wait_for(lambda: both() == (amount, amount), 20, lambda: f"{both()}, not {amount}")


def test_each_word_of_the_owner_is_in_both_books(yard: Yard) -> None:
    ann, bob, cat = yard.village("ann", "bob", "cat", flags=FLAGS)
    yard.know_each_other(ann, bob, cat)
    trusted(ann, bob)
    given_and_shared(ann, bob)
    blocked(ann, bob)
    released(ann, bob, cat)
    written_off_and_compacted(ann, bob)
    restored(ann, bob, cat)
    settled([ann, bob, cat], 20)
    for one, other in ((ann, bob), (bob, ann)):
        assert "both books agree" in said(one, "audit", "--peer", other.peer)


def trusted(ann: Daemon, bob: Daemon) -> None:
    """A line of the owner's own, past what the village says; the peer hears of it."""
    buys(bob, ann, LINE // NOOP)
    owes(bob, ann, LINE)
    assert "may owe you 0.0005" in said(ann, "trust", bob.peer, "0.0005")
    buys(bob, ann)
    owes(bob, ann, LINE + NOOP)  # nothing of it went around by cat


def given_and_shared(ann: Daemon, bob: Daemon) -> None:
    said(ann, "gift", bob.peer[-8:], "0.00005")
    owes(bob, ann, LINE + NOOP - 50)
    assert "pays nothing for work" in said(ann, "share", bob.peer)
    buys(bob, ann)
    for one in (ann, bob):
        assert said(one, "favours", "--limit", "1").count("0.00001") == 1
    said(ann, "share", bob.peer, "--stop")
    owes(bob, ann, LINE + NOOP - 50)
    buys(bob, ann)
    owes(bob, ann, 70)


def blocked(ann: Daemon, bob: Daemon) -> None:
    assert "is blocked" in said(ann, "block", bob.peer)
    refused = tries(bob, ann)
    assert refused.code != 0, refused
    assert "may owe you 0.0005" in said(ann, "unblock", bob.peer)
    wait_for(lambda: tries(bob, ann).code == 0, 20, "it is served again")
    owes(bob, ann, 80)


def released(ann: Daemon, bob: Daemon, cat: Daemon) -> None:
    """A transfer that bob holds since cat is away is given up, and comes back all the same."""
    buys(ann, cat, STEP // NOOP)
    owes(ann, cat, STEP)
    cat.kill()
    command = ann.spawn("settle", cat.peer, "0.00002")
    wait_for(lambda: book.transfers(bob, "waiting"), 20, "bob holds it")
    (xid,) = book.rings(ann, "open")
    assert xid.hex()[:12] in said(ann, "release")
    assert said(ann, "release", xid.hex()).startswith("gave up 0.00002 credits")
    assert ann.ask("balance")["written_off"] == STEP
    cat.restart()
    command.communicate(timeout=30)
    wait_for(lambda: not ann.ask("balance")["written_off"], 30, "it came back after all")
    owes(bob, ann, 80 - STEP)
    owes(bob, cat, STEP)
    assert said(ann, "release", "--peer", bob.peer).startswith("gave up")


def written_off_and_compacted(ann: Daemon, bob: Daemon) -> None:
    """What is written off is owed all the same, by both books."""
    found = said(ann, "write-off", bob.peer, "0.00003", "--reason", "he moved away")
    assert found.startswith("wrote off 0.00003 credits")
    balance = ann.ask("balance")
    assert (balance["doubtful"], balance["written_off"]) == (30, 30)
    owes(bob, ann, 80 - STEP)
    assert "he moved away" not in said(bob, "history", "--json")
    assert "every proof is still there" in said(ann, "compact")
    assert "the book is right" in said(ann, "audit")


def restored(ann: Daemon, bob: Daemon, cat: Daemon) -> None:
    """What bob signed after the backup is in ann's book again once they have met."""
    archive = str(ann.data_dir.with_suffix(".tar"))
    said(ann, "backup", archive)
    buys(bob, ann, 2)
    owes(bob, ann, 80)
    ann.stop()
    assert "restored node" in said(ann, "restore", archive, "--force")
    assert book.owed(ann, bob.peer) == 60
    ann.restart()
    owes(bob, ann, 80)
    owes(ann, cat, 0)


def test_a_household_of_two_people_has_one_line(yard: Yard) -> None:
    """Each has a node of her own; the shop lends both together what it lends one."""
    shop, mum, kid = yard.village("shop", "mum", "kid", flags=FLAGS)
    yard.know_each_other(shop, mum, kid)
    owner = mum.run("owner", "init", "--json").json["owner"]
    for person in (mum, kid):
        token = mum.run("owner", "adopt", person.peer, "--json").json["token"]
        assert owner[-6:] in said(person, "owner", "join", token)

    def met() -> bool:
        rows = book.rows(shop, "SELECT count(*) FROM peer WHERE owner = ?", owner)
        return rows == [(2,)]

    wait_for(met, 20, "the shop knows that they are one household")
    yard.know_each_other(shop, mum, kid)
    buys(mum, shop, 7)
    buys(kid, shop)
    for person in (kid, mum):
        buys_all_it_can(person, shop)
    settled([shop, mum, kid], 20)
    debts = [book.owed(shop, person.peer) for person in (mum, kid)]
    assert debts >= [70, 10]
    assert 90 <= sum(debts) <= LINE
    shown = said(shop, "balance")
    assert f"owner {owner[-8:]}" in shown
    assert "2 devices" in shown

    buys(shop, mum, 5)  # mum works for it: that makes room for the kid
    assert tries(kid, shop).code == 0
    settled([shop, mum, kid], 20)
    buys(kid, mum)  # at home it costs nothing
    assert book.owed(mum, kid.peer) == 0
