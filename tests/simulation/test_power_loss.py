"""Books on a disk whose power is cut: what was sent stays written, and nobody signs twice."""

import random

import apsw
import pytest

from aivillage.ledger import books
from tests.simulation import power_loss
from tests.simulation.power_loss import Disk, NormalNode


@pytest.mark.parametrize("seed", range(12))
def test_no_power_cut_makes_an_honest_node_lose_or_contradict_what_it_sent(seed):
    failure, world = power_loss.run_seed(seed)
    assert failure == ""
    assert world.crashes > 0


def test_without_a_sync_before_sending_the_same_cuts_lose_what_was_sent():
    """The model bites: with synchronous=NORMAL, which the product does not use."""
    failures = [power_loss.run_seed(seed, NormalNode)[0] for seed in range(12)]
    assert any(failure.startswith("kept:") for failure in failures)


def test_the_disk_loses_what_was_not_synced_and_keeps_what_was():
    disk, dice = Disk(), random.Random(1)
    db = apsw.Connection("book", vfs=disk.name)
    db.execute("PRAGMA locking_mode=EXCLUSIVE").fetchall()
    books.configure(db)
    db.execute("CREATE TABLE t(x)")
    db.execute("INSERT INTO t VALUES (1)")
    db.execute("PRAGMA synchronous=OFF")
    for value in range(2, 50):
        db.execute("INSERT INTO t VALUES (?)", (value,))
    before = disk.syncs
    disk.cut_power(dice, db)
    assert disk.syncs == before
    again = apsw.Connection("book", vfs=disk.name)
    again.execute("PRAGMA locking_mode=EXCLUSIVE").fetchall()
    found = [x for (x,) in again.execute("SELECT x FROM t ORDER BY x")]
    assert found[0] == 1
    assert len(found) < 49
    again.close()


def test_the_summary_is_one_line_of_json(capsys):
    assert power_loss.main(["--seeds", "1", "--json"]) == 0
    assert '"failures": 0' in capsys.readouterr().out
