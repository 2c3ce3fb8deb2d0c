"""Two books on trio, joined by blobs in memory: the whole way of a payment."""

import os
from contextlib import asynccontextmanager

import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aivillage.ledger import reader
from aivillage.ledger.desk import Settings
from aivillage.ledger.ledger import open_ledger
from aivillage.protocols.errors import ConfigError, NodeError, PeerError
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
