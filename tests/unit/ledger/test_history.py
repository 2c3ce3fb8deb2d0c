"""History: what the filters let pass, and that they do not walk through the whole book."""

import itertools
import sqlite3

import pytest

from aivillage.ledger import books, queries
from aivillage.ledger.queries import Movements, history, movements_sql
from aivillage.protocols.errors import RequestError
from aivillage.protocols.types import peer_id
from tests.unit.ledger.pairs import NAMES, traded
from tests.unit.ledger.test_steps import BUYER, SELLER, WALLET, A, book

PEERS = [peer_id(bytes([n]) * 32) for n in range(4)]
START_MS, STEP_MS = 1_700_000_000_000, 60_000
ENTRIES = 6_000


@pytest.fixture(scope="module")
def large():
    """A book of many peers, an entry a minute; the last peer has three entries, all early."""
    db = book(A)
    rare = {100, 200, 300}
    with db:
        for peer in PEERS:
            books.ensure_peer(db, peer)
        for seq in range(ENTRIES):
            peer = PEERS[3] if seq in rare else PEERS[seq % 3]
            kind = "recover-pay" if seq in rare else "pay" if seq % 2 else "receive"
            cause = books.Cause(peer, WALLET.lane, seq + 1, b"", kind)
            legs = [books.Leg("peer", None, 5), books.Leg("earned", NAMES[1], -5)]
            books.post(db, cause, legs, START_MS + seq * STEP_MS)
    return db


def rows_of(db, limit=50, **wanted):
    return queries.run(db, history(limit, Movements(**wanted)))


def steps_of(db, limit, **wanted):
    """(rows, virtual machine steps that SQLite took for them)."""
    steps = itertools.count()
    db.set_progress_handler(lambda: bool(next(steps) < 0), 10)
    try:
        found = rows_of(db, limit, **wanted)
    finally:
        db.set_progress_handler(None)
    return found, 10 * next(steps)


def test_each_filter_lets_pass_what_it_says():
    buyer, seller = traded()
    assert [row.amount for row in rows_of(buyer)] == [40, -5, -20, -25, -40, -10]
    assert [row.attempt for row in rows_of(buyer, 2)] == [NAMES[3], NAMES[2]]
    assert [row.kind for row in rows_of(buyer, kind="receive")] == ["receive"]
    assert [row.account for row in rows_of(buyer, 2)] == ["earned", "spent"]
    assert len(rows_of(buyer, peer=SELLER[-6:])) == 6
    assert len(rows_of(buyer, since_ms=2_000_000)) == 1
    assert len(rows_of(buyer, until_ms=1_999_999, peer=SELLER)) == 5
    assert rows_of(seller, since_ms=1_000_000, until_ms=1_000_000, kind="pay") == []
    assert [row.peer for row in rows_of(seller, 1)] == [BUYER]
    with pytest.raises(RequestError, match="no peer in the book"):
        rows_of(buyer, peer="nobody")


def test_times_are_included_and_come_newest_first(large):
    first, last = START_MS + 10 * STEP_MS, START_MS + 12 * STEP_MS
    found = rows_of(large, since_ms=first, until_ms=last)
    assert [row.seq for row in found] == [13, 12, 11]
    assert rows_of(large, since_ms=last + 1, until_ms=last + 2) == []


def test_a_clock_that_was_set_back_hides_nothing():
    db = book(A)
    with db:
        for n, at_ms in enumerate((5_000, 1_000, 6_000), 1):
            books.ensure_peer(db, SELLER)
            legs = [books.Leg("peer", None, -1), books.Leg("spent", NAMES[1], 1)]
            books.post(db, books.Cause(SELLER, WALLET.lane, n, b"", "pay"), legs, at_ms)
    assert [row.seq for row in rows_of(db, since_ms=4_000)] == [3, 1]
    assert [row.seq for row in rows_of(db)] == [3, 2, 1]


@pytest.mark.parametrize(
    "wanted",
    [
        {},
        {"peer": PEERS[0]},
        {"peer": PEERS[3]},
        {"since_ms": START_MS},
        {"since_ms": START_MS + (ENTRIES - 3) * STEP_MS},
        {"since_ms": START_MS + (ENTRIES + 1) * STEP_MS},
        {"until_ms": START_MS + 5 * STEP_MS},
        {"since_ms": START_MS + 50 * STEP_MS, "until_ms": START_MS + 52 * STEP_MS},
        {"peer": PEERS[3], "since_ms": START_MS + 150 * STEP_MS},
        {"peer": PEERS[1], "since_ms": START_MS, "kind": "pay"},
        {"kind": "pay"},
        {"kind": "recover-pay"},
        {"kind": "write-off"},
        {"kind": "recover-pay", "since_ms": START_MS + 150 * STEP_MS},
        {"kind": "recover-pay", "until_ms": START_MS + 150 * STEP_MS},
    ],
)
def test_a_filter_walks_no_further_than_its_limit(large, wanted):
    found, steps = steps_of(large, 10, **wanted)
    assert len(found) <= 10
    assert steps < 1_500, "a walk through the whole book takes some 100,000"


@pytest.mark.parametrize("library", ["apsw", "sqlite3"])
def test_the_plan_of_each_filter_names_its_index(large, library):
    """In the daemon's SQLite and in Python's own, which the command line reads with."""
    db = large
    if library == "sqlite3":
        db = sqlite3.connect(":memory:")
        db.deserialize(large.serialize("main"))
    for wanted, index in (
        (Movements(peer=PEERS[0]), "entry_peer (peer=?)"),
        (Movements(peer=PEERS[0], since_ms=1), "entry_peer (peer=?)"),
        (Movements(since_ms=1), "entry_at (at_ms>?)"),
        (Movements(since_ms=1, until_ms=2), "entry_at (at_ms>? AND at_ms<?)"),
        (Movements(kind="pay"), "entry_kind (kind=?)"),
        (Movements(kind="pay", since_ms=1), "entry_kind (kind=? AND at_ms>?)"),
    ):
        asked = (wanted.peer, wanted.since_ms, wanted.until_ms, wanted.kind)
        bindings = [value for value in asked if value]
        plan = db.execute(f"EXPLAIN QUERY PLAN {movements_sql(wanted)}", (*bindings, 9))
        told = " ".join(row[3] for row in plan)
        assert index in told
        assert "SCAN" not in told
        assert "TEMP B-TREE FOR ORDER BY" not in told
        assert "SEARCH p USING PRIMARY KEY (seq=?)" in told
    if db is not large:
        db.close()
