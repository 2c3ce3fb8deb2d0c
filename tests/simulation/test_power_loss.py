"""Books on a disk whose power is cut: what was sent stays written, and nobody signs twice."""

import functools
import random

import apsw
import pytest

from aivillage.ledger import books
from tests.simulation import power_loss
from tests.simulation.power_loss import CarelessNode, Disk, NormalNode

lived = functools.cache(power_loss.run_seed)


@pytest.mark.parametrize("seed", range(12))
def test_no_power_cut_makes_an_honest_node_lose_or_contradict_what_it_sent(seed):
    outcome = lived(seed)
    assert outcome.failure == ""
    assert outcome.crashes > 0


def test_power_goes_inside_commits_too_and_takes_writes_with_it():
    outcomes = [lived(seed) for seed in range(12)]
    assert sum(outcome.cuts_inside for outcome in outcomes) > 0
    assert sum(outcome.lost_writes for outcome in outcomes) > 0
    assert sum(outcome.kills for outcome in outcomes) > 0


def test_without_a_sync_before_sending_the_same_cuts_lose_what_was_sent():
    """The model bites: with synchronous=NORMAL, which the product does not use."""
    failures = [power_loss.run_seed(seed, NormalNode).failure for seed in range(12)]
    assert any(failure.startswith("kept:") for failure in failures)


def test_without_any_sync_the_same_cuts_damage_the_file():
    failures = [power_loss.run_seed(seed, CarelessNode).failure for seed in range(12)]
    assert any(failure.startswith("disk:") for failure in failures)


def opened(disk):
    db = apsw.Connection("book", vfs=disk.name)
    db.execute("PRAGMA locking_mode=EXCLUSIVE").fetchall()
    books.configure(db)
    return db


def unsynced(disk):
    return sum(len(file.unsynced) for file in disk.files.values())


def test_each_commit_of_the_product_s_settings_is_synced_when_it_returns():
    disk = Disk(random.Random(1))
    db = opened(disk)
    db.execute("CREATE TABLE t(x)")
    for value in range(50):
        before = disk.syncs
        db.execute("INSERT INTO t VALUES (?)", (value,))
        assert disk.syncs > before
        assert unsynced(disk) == 0
    db.execute("PRAGMA synchronous=NORMAL")
    db.execute("INSERT INTO t VALUES (?)", (50,))
    assert unsynced(disk) > 0
    db.close()


def left_of_50_rows(seed):
    """1 was synced, the others were not."""
    disk = Disk(random.Random(seed))
    db = opened(disk)
    db.execute("CREATE TABLE t(x)")
    db.execute("INSERT INTO t VALUES (1)")
    db.execute("PRAGMA synchronous=OFF")
    for value in range(2, 50):
        db.execute("INSERT INTO t VALUES (?)", (value,))
    disk.end(db)
    again = opened(disk)
    found = [x for (x,) in again.execute("SELECT x FROM t ORDER BY x")]
    assert found == list(range(1, len(found) + 1))
    again.close()
    return len(found)


def test_the_disk_loses_what_was_not_synced_and_keeps_what_was():
    left = [left_of_50_rows(seed) for seed in range(30)]
    assert min(left) == 1
    assert 49 in left  # the process alone ended, or the drive had written all
    assert len(set(left)) > 2


def test_the_summary_is_one_line_of_json(capsys):
    assert power_loss.main(["--seeds", "1", "--json"]) == 0
    assert '"failures": 0' in capsys.readouterr().out
