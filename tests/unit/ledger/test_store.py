"""The writer thread: groups, all or nothing for each job, and what a full disk does."""

import threading

import apsw
import pytest
import trio

from aivillage.ledger.store import GATHER_SECONDS, Store
from aivillage.protocols.errors import LedgerError, NodeError


@pytest.fixture
async def store(tmp_path):
    db = apsw.Connection(str(tmp_path / "x.db"))
    db.execute("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; CREATE TABLE t(v)").fetchall()
    running = Store(db)
    running.start()
    yield running
    await running.stop()
    db.close()


class Replies:
    """Collects results and errors of jobs."""

    def __init__(self, store):
        self.store, self.results, self.errors = store, [], []

    def add(self, job):
        self.store.submit(job, self.results.append, self.errors.append)

    async def wait(self, count):
        with trio.fail_after(10):
            while len(self.results) + len(self.errors) < count:
                await trio.sleep(0.005)


def insert(value):
    return lambda db: db.execute("INSERT INTO t VALUES (?)", (value,)).fetchall()


def values(db):
    return [row[0] for row in db.execute("SELECT v FROM t").fetchall()]


async def test_results_come_in_order_after_the_commit(store, tmp_path):
    replies = Replies(store)
    seen = []
    other = apsw.Connection(str(tmp_path / "x.db"))
    store.submit(insert(1), lambda _: seen.append(values(other)), replies.errors.append)
    replies.add(values)
    await replies.wait(1)
    assert seen == [[1]]  # another connection sees it: it was committed before the reply
    assert replies.results == [[1]]
    other.close()


async def test_many_jobs_share_a_commit(store):
    replies, gate, commits = Replies(store), threading.Event(), []
    replies.add(lambda db: (db.set_commit_hook(lambda: bool(commits.append(1))), gate.wait(5))[1])
    for value in range(300):
        replies.add(insert(value))
    gate.set()
    await replies.wait(301)
    assert len(commits) <= 4
    assert replies.errors == []


async def test_after_a_crowd_the_writer_waits_for_company_and_alone_it_does_not(
    store, tmp_path, monkeypatch
):
    """A commit costs as much for one as for many; what comes in that moment shares it."""
    replies, commits, waits = Replies(store), [], []

    def wait(seconds):
        waits.append(seconds)
        replies.add(insert("company"))

    monkeypatch.setattr("aivillage.ledger.store.time.sleep", wait)
    replies.add(lambda db: db.set_commit_hook(lambda: bool(commits.append(1))))
    await replies.wait(1)
    replies.add(insert("alone"))
    await replies.wait(2)
    assert (waits, len(commits)) == ([], 2)
    begun, gate = threading.Event(), threading.Event()
    replies.add(lambda db: (begun.set(), gate.wait(5)))
    await trio.to_thread.run_sync(begun.wait, 5)
    for value in range(2):
        replies.add(insert(value))
    gate.set()
    await replies.wait(5)
    assert (waits, len(commits)) == ([], 4)
    replies.add(insert("the next"))
    await replies.wait(7)
    assert (waits, len(commits)) == ([GATHER_SECONDS], 5)


async def test_a_job_that_fails_undoes_only_itself(store):
    replies = Replies(store)

    def fails(db):
        insert("lost")(db)
        raise LedgerError("no")

    def breaks(db):
        insert("lost too")(db)
        raise ZeroDivisionError

    for job in (insert(1), fails, breaks, insert(2), values):
        replies.add(job)
    await replies.wait(5)
    assert replies.results[-1] == [1, 2]
    assert [type(error) for error in replies.errors] == [LedgerError, NodeError]


async def test_a_full_disk_is_an_error_of_its_own_and_passes(store):
    replies = Replies(store)
    replies.add(lambda db: db.execute("PRAGMA max_page_count = 3").fetchall())
    await replies.wait(1)
    replies.add(insert(b"x" * 100_000))
    await replies.wait(2)
    assert [error.code for error in replies.errors] == ["DISK_FULL"]
    replies.add(values)
    await replies.wait(3)
    assert replies.results[-1] == []  # reads go on
    replies.add(lambda db: db.execute("PRAGMA max_page_count = 1000000").fetchall())
    replies.add(insert(7))
    await replies.wait(5)
    assert len(replies.errors) == 1


async def test_a_failed_commit_stops_the_node(store):
    replies, fatal = Replies(store), []
    store.on_fatal = fatal.append

    def poison(db):
        db.set_commit_hook(lambda: True)  # COMMIT turns into a rollback and an error

    replies.add(poison)
    await replies.wait(1)
    assert [error.code for error in fatal] == ["INTERNAL"]
    assert replies.results == []


async def test_a_broken_reply_stops_the_node_and_not_the_loop(store):
    fatal = []
    store.on_fatal = fatal.append
    store.submit(insert(1), lambda _: 1 / 0, fatal.append)
    with trio.fail_after(5):
        while not fatal:
            await trio.sleep(0.005)
    assert "ZeroDivisionError" in fatal[0].message
