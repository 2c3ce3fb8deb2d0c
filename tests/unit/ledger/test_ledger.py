"""Two books on trio, joined by blobs in memory: the whole way of a payment."""

import os
from contextlib import asynccontextmanager

import apsw
import pytest
import trio
import trio.testing
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aivillage.ledger import exposure, reader
from aivillage.ledger.desk import Settings
from aivillage.ledger.ledger import open_ledger
from aivillage.protocols.errors import ConfigError, LedgerError, NodeError, PeerError
from aivillage.protocols.types import AttemptId, peer_id

A, B = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
BUYER = peer_id(A.public_key().public_bytes_raw())
SELLER = peer_id(B.public_key().public_bytes_raw())
QUOTE, OUT = b"q" * 32, b"o" * 32


def join(a, b, loss=lambda: False):
    """Connects two books; a blob is handled on the next turn of the loop."""
    token = trio.lowlevel.current_trio_token()

    def to(book, sender):
        return lambda blob: None if loss() else token.run_sync_soon(book.receive, sender, blob)

    a.connected(SELLER, b.epoch, to(b, BUYER))
    b.connected(BUYER, a.epoch, to(a, SELLER))


@asynccontextmanager
async def pair(folder):
    async with open_ledger(folder / "a.db", A) as a, open_ledger(folder / "b.db", B) as b:
        await b.set_line(BUYER, 10_000, 1_000)
        yield a, b


async def until(condition):
    with trio.fail_after(10):
        while not condition():
            await trio.sleep(0.01)


async def work(a, b, amount, unit=100):
    """The buyer asks, the seller delivers `amount` in units, the buyer accepts each."""
    attempt = AttemptId(os.urandom(16))
    a.intend(SELLER, attempt, QUOTE, amount)
    b.begin_sale(BUYER, attempt, QUOTE, amount)
    for done in range(unit, amount + 1, unit):
        while not b.deliver(BUYER, attempt, done, OUT):
            b.want_room(BUYER, unit)
            with trio.move_on_after(1):
                await b.room_changed(BUYER)
        a.accept(SELLER, attempt, done, OUT)
    return attempt


async def test_a_job_is_delivered_paid_and_receipted(tmp_path):
    async with pair(tmp_path) as (a, b):
        join(a, b)
        attempt = await work(a, b, 3_000)
        await a.settle(SELLER, attempt, 3_000, OUT)
        assert a.owed_to(SELLER) == 3_000
        await until(lambda: b.view(BUYER).owed_to_me == 3_000)
        b.end_sale(BUYER, attempt)
        await until(lambda: a.view(SELLER).synced and b.view(BUYER).synced)
        with trio.fail_after(10):
            while (await a.balance()).in_transit:
                await trio.sleep(0.05)
        for book in (a, b):
            report = await book.audit()
            assert report.ok, report.first_error
            assert report.entries >= 1
        assert (await a.balance()).spent == 3_000
        assert sum(row.amount for row in await b.history()) == 3_000


async def test_a_seller_stops_at_the_exposure(tmp_path):
    async with pair(tmp_path) as (_, b):
        attempt = AttemptId(bytes(16))
        b.begin_sale(BUYER, attempt, QUOTE, 5_000)
        b.want_room(BUYER, 1_000)
        await b.room_changed(BUYER)
        assert b.room(BUYER) == 1_000
        assert b.deliver(BUYER, attempt, 1_000, OUT)
        assert not b.deliver(BUYER, attempt, 1_001, OUT)
        assert b.headroom(BUYER) == 9_000


async def test_a_restart_heals_by_sync(tmp_path):
    async with pair(tmp_path) as (a, b):
        attempt = await work(a, b, 500)
        await a.settle(SELLER, attempt, 500, OUT)  # never connected: nothing arrived
        assert b.view(BUYER).owed_to_me == 0
    async with open_ledger(tmp_path / "a.db", A) as a, open_ledger(tmp_path / "b.db", B) as b:
        join(a, b)
        await until(lambda: b.view(BUYER).owed_to_me == 500)
        assert a.owed_to(SELLER) == 500


async def pay(book, amount):
    attempt = AttemptId(os.urandom(16))
    book.intend(SELLER, attempt, QUOTE, amount)
    await book.settle(SELLER, attempt, amount, OUT)


async def pay_until_refused(book):
    for _ in range(2000):
        await pay(book, 100)


async def test_a_full_disk_stops_new_money_and_not_the_reads(tmp_path):
    pages = "PRAGMA max_page_count = {}"
    async with open_ledger(tmp_path / "a.db", A) as a:
        submit = a._ledger.desk.submit
        submit(lambda db: db.execute(pages.format(1)).fetchall(), lambda _: None)
        with trio.fail_after(30), pytest.raises(NodeError) as refusal:
            await pay_until_refused(a)
        assert refusal.value.code == "DISK_FULL"
        assert a.refusing is not None
        assert a.room(SELLER) == 0
        assert (await a.balance()).spent == a.owed_to(SELLER)
        submit(lambda db: db.execute(pages.format(9999)).fetchall(), lambda _: None)
        before = a.owed_to(SELLER)
        await pay(a, 100)
        assert a.owed_to(SELLER) >= before + 100
        assert a.refusing is None


async def test_a_stranger_gets_nothing_until_the_owner_opens_the_pool(tmp_path):
    for pool in (0, 500):
        settings = Settings(stranger_pool=pool)
        async with open_ledger(tmp_path / f"{pool}.db", B, settings=settings) as b:
            assert b.headroom(BUYER) == pool
            b.want_room(BUYER, 500)
            if pool:
                await b.room_changed(BUYER)
            assert b.room(BUYER) == pool


async def test_a_forged_blob_is_the_peers_error(tmp_path):
    async with pair(tmp_path) as (a, b):
        join(a, b)
        with pytest.raises(PeerError):
            b.receive(BUYER, b"\x93\x01\x01\xc0")
        assert b.view(BUYER).connected


async def test_a_book_refuses_another_key(tmp_path):
    async with open_ledger(tmp_path / "a.db", A):
        pass
    with pytest.raises(ConfigError):
        async with open_ledger(tmp_path / "a.db", B):
            pass


async def test_a_cancelled_caller_is_not_a_cancelled_payment(tmp_path):
    async with pair(tmp_path) as (a, b):
        attempt = await work(a, b, 500)
        with trio.CancelScope() as scope:
            scope.cancel()
            await a.settle(SELLER, attempt, 500, OUT)
        assert scope.cancelled_caught
        await until(lambda: a.owed_to(SELLER) == 500)


async def test_reads_with_and_without_a_daemon_are_the_same(tmp_path):
    async with pair(tmp_path) as (a, b):
        join(a, b)
        attempt = await work(a, b, 3_000)
        await a.settle(SELLER, attempt, 3_000, OUT)
        await until(lambda: b.view(BUYER).owed_to_me == 3_000)
        for book, path in ((a, tmp_path / "a.db"), (b, tmp_path / "b.db")):
            assert await trio.to_thread.run_sync(reader.read_balance, path) == await book.balance()
            assert await trio.to_thread.run_sync(reader.read_history, path) == await book.history()
            assert await trio.to_thread.run_sync(reader.read_audit, path) == await book.audit()


async def test_an_abandoned_attempt_is_never_signed_for_and_never_claimed(tmp_path):
    attempt = AttemptId(os.urandom(16))
    async with pair(tmp_path) as (a, _):
        a.intend(SELLER, attempt, QUOTE, 500)
        a.accept(SELLER, attempt, 300, OUT)
        await a.abandon(SELLER, attempt)
        await a.settle(SELLER, attempt, 500, OUT)
        await trio.sleep(0.4)
        assert a.owed_to(SELLER) == 0
        assert a._ledger.desk.partner(SELLER).unpaid == 0
    db = apsw.Connection(str(tmp_path / "a.db"))
    assert db.execute("SELECT count(*) FROM intent").fetchall() == [(0,)]
    db.close()
    async with open_ledger(tmp_path / "a.db", A) as a:
        assert a.owed_to(SELLER) == 0


async def test_who_waits_for_an_abandoned_attempt_is_told(tmp_path):
    async with pair(tmp_path) as (a, _), trio.open_nursery() as nursery:
        attempt, errors = AttemptId(os.urandom(16)), []

        async def settle():
            try:
                await a.settle(SELLER, attempt, 300, OUT)
            except LedgerError as error:
                errors.append(error.code)

        a.intend(SELLER, attempt, QUOTE, 500)
        a._ledger.desk.partner(SELLER).signing = 1  # another voucher is on its way
        nursery.start_soon(settle)
        await trio.testing.wait_all_tasks_blocked()
        a._ledger.desk.partner(SELLER).signing = 0
        await a.abandon(SELLER, attempt)
        await trio.sleep(0.4)
        assert errors == ["CANCELLED"]
        assert a.owed_to(SELLER) == 0


async def test_a_hash_that_cannot_be_signed_is_refused_at_once(tmp_path):
    async with pair(tmp_path) as (a, _):
        attempt = AttemptId(os.urandom(16))
        a.intend(SELLER, attempt, QUOTE, 500)
        for wrong in (b"o" * 33, b""):
            with pytest.raises(LedgerError):
                a.accept(SELLER, attempt, 300, wrong)
            with pytest.raises(LedgerError):
                await a.settle(SELLER, attempt, 300, wrong)
        await a.settle(SELLER, attempt, 300, OUT)
        assert a.owed_to(SELLER) == 300


async def test_strangers_at_the_end_of_the_pool_do_not_make_the_loop_busy(tmp_path):
    others = [peer_id(bytes([n]) * 32) for n in (7, 8)]
    async with open_ledger(tmp_path / "b.db", B, settings=Settings(stranger_pool=500)) as b:
        submitted, submit = [], b._ledger.desk.submit
        b._ledger.desk.submit = lambda *args: (submitted.append(args), submit(*args))
        b.want_room(others[0], 400)
        await b.room_changed(others[0])
        assert len(submitted) == 1
        b.want_room(others[1], 400)
        assert len(submitted) == 1


async def test_a_reservation_that_fails_wakes_who_waits_and_is_tried_again(tmp_path, monkeypatch):
    calls, reserve = [], exposure.reserve

    def fails_once(*args):
        calls.append(args)
        if len(calls) == 1:
            raise NodeError("no")
        return reserve(*args)

    monkeypatch.setattr(exposure, "reserve", fails_once)
    async with pair(tmp_path) as (_, b):
        b.want_room(BUYER, 100)
        with trio.fail_after(5):
            await b.room_changed(BUYER)
        assert b.room(BUYER) == 0
        b.want_room(BUYER, 100)
        assert not b._ledger.desk.partner(BUYER).reserving  # not at once: no busy loop
        await until(lambda: b.room(BUYER) >= 100)


async def test_only_the_owner_can_read_the_book(tmp_path):
    (tmp_path / "a.db").touch(mode=0o644)
    async with open_ledger(tmp_path / "a.db", A):
        modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    assert modes == dict.fromkeys(["a.db", "a.db-wal", "a.db-shm"], 0o600)


async def test_a_restored_book_delivers_nothing_on_credit_before_it_synced(tmp_path):
    async with pair(tmp_path) as (a, b):
        join(a, b)
        await work(a, b, 100)
    db = apsw.Connection(str(tmp_path / "b.db"))
    db.execute("UPDATE peer SET unsynced = 1")  # as `restore` leaves it
    db.close()
    async with open_ledger(tmp_path / "a.db", A) as a, open_ledger(tmp_path / "b.db", B) as b:
        b.want_room(BUYER, 100)
        await b.room_changed(BUYER)
        assert b.room(BUYER) == b.headroom(BUYER) == 0
        join(a, b)
        await until(lambda: b.room(BUYER) >= 100)
        assert b.headroom(BUYER) > 0
    db = apsw.Connection(str(tmp_path / "b.db"))
    assert db.execute("SELECT unsynced FROM peer").fetchall() == [(0,)]
    db.close()
