"""Two books across a change of key: the pair goes on, old proofs stay good, old keys do not."""

import os

import apsw
import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aivillage.ledger import books
from aivillage.ledger.ledger import open_ledger
from aivillage.ledger.opening import SystemClock, open_file
from aivillage.ledger.signing import Ed25519Signer
from aivillage.protocols import succession
from aivillage.protocols.envelope import is_signed_by
from aivillage.protocols.errors import ConfigError, RequestError
from aivillage.protocols.types import AttemptId, peer_id
from aivillage.protocols.vouchers import voucher_prefixed
from tests.unit.ledger.test_ledger import OUT, QUOTE, until

A, A2, A3, B, B2 = (Ed25519PrivateKey.generate() for _ in range(5))


def public(key):
    return key.public_key().public_bytes_raw()


def name(key):
    return peer_id(public(key))


def rotate(path, old, new):
    db = open_file(path, Ed25519Signer(old), SystemClock())
    with db:
        books.add_own_key(db, public(new), succession.make(old, new, 1), 1)
    db.close()


def join(a, b):
    """Each knows the other by its key in force."""
    token = trio.lowlevel.current_trio_token()

    def to(book, sender):
        return lambda blob: token.run_sync_soon(book.receive, sender, blob)

    a.connected(b.names[0], b.epoch, to(b, a.names[0]))
    b.connected(a.names[0], a.epoch, to(a, b.names[0]))


async def equal(a, b, amount):
    buyer, seller = a.names[0], b.names[0]
    await until(lambda: a.view(seller).synced and b.view(buyer).synced)
    await until(lambda: (a.owed_to(seller), b.view(buyer).owed_to_me) == (amount, amount))
    with trio.fail_after(10):
        while (await a.balance()).in_transit:
            await trio.sleep(0.05)
    for book in (a, b):
        report = await book.audit()
        assert report.ok, report.first_error


async def pay(a, b, amount):
    """With tests of the whole way elsewhere: the buyer asks, the seller delivers."""
    attempt, buyer, seller = AttemptId(os.urandom(16)), a.names[0], b.names[0]
    a.intend(seller, attempt, QUOTE, amount)
    b.begin_sale(buyer, attempt, QUOTE, amount)
    while not b.deliver(buyer, attempt, amount, OUT):
        b.want_room(buyer, amount)
        with trio.move_on_after(1):
            await b.room_changed(buyer)
    await a.settle(seller, attempt, amount, OUT)
    b.end_sale(buyer, attempt)


async def test_vouchers_of_the_old_key_arrive_after_a_change_of_both_keys(tmp_path):
    a_db, b_db = tmp_path / "a.db", tmp_path / "b.db"
    async with open_ledger(a_db, A) as a, open_ledger(b_db, B) as b:
        await b.set_line(name(A), 10_000, 1_000)
        await a.set_received(name(B), 10_000, 1_000)
        for _ in range(3):
            await pay(a, b, 300)  # never linked: all three are in flight
        assert b.view(name(A)).owed_to_me == 0
    rotate(a_db, A, A2)
    rotate(b_db, B, B2)
    async with open_ledger(a_db, A2) as a, open_ledger(b_db, B2) as b:
        assert (a.names, b.names) == ((name(A2), name(A)), (name(B2), name(B)))
        await b.succeed(name(A), name(A2), succession.make(A, A2, 1))
        await a.succeed(name(B), name(B2), succession.make(B, B2, 1))
        join(a, b)
        await equal(a, b, 900)
        await pay(a, b, 100)
        await equal(a, b, 1_000)
        assert b.view(name(A2)).line == 10_000  # the pair's, whatever its key
        assert [view.peer for view in b.views()] == [name(A)]
    async with open_ledger(a_db, A2) as a, open_ledger(b_db, B2) as b:
        assert b.names_of(name(A)) == (name(A2), name(A))
        join(a, b)  # both books remember
        await equal(a, b, 1_000)


async def test_what_is_signed_after_a_change_names_the_new_keys(tmp_path):
    a_db, b_db = tmp_path / "a.db", tmp_path / "b.db"
    async with open_ledger(a_db, A) as a, open_ledger(b_db, B) as b:
        await b.set_line(name(A), 10_000, 1_000)
        join(a, b)
        await pay(a, b, 300)
        await equal(a, b, 300)
    rotate(a_db, A, A2)
    rotate(a_db, A2, A3)
    async with open_ledger(a_db, A3) as a, open_ledger(b_db, B) as b:
        await b.succeed(name(A), name(A2), succession.make(A, A2, 1))
        await b.succeed(name(A2), name(A3), succession.make(A2, A3, 1))
        assert b.names_of(name(A2)) == (name(A3), name(A2), name(A))
        join(a, b)
        await pay(a, b, 300)
        await equal(a, b, 600)
    db = apsw.Connection(str(b_db))
    rows = db.execute("SELECT body, signature FROM voucher_in ORDER BY rowid").fetchall()
    db.close()
    signers = [
        next(key for key in (A, A2, A3) if is_signed_by(public(key), voucher_prefixed(body), good))
        for body, good in rows
    ]
    assert (signers[0], signers[-1]) == (A, A3)
    with pytest.raises(ConfigError, match="another key"):
        async with open_ledger(a_db, A2):
            pass


async def test_a_second_successor_of_one_key_is_refused(tmp_path):
    async with open_ledger(tmp_path / "b.db", B) as b:
        await b.set_line(name(A), 10_000, 1_000)
        await b.succeed(name(A), name(A2), succession.make(A, A2, 1))
        await b.succeed(name(A), name(A2), succession.make(A, A2, 1))  # said again at each link
        with pytest.raises(RequestError, match="replaced already"):
            await b.succeed(name(A), name(A3), succession.make(A, A3, 1))
        assert b.names_of(name(A3)) == (name(A3),)
        assert not b.knows(name(A3))


async def test_a_peer_of_its_own_is_nobodys_successor(tmp_path):
    async with open_ledger(tmp_path / "b.db", B) as b:
        await b.set_line(name(A), 10_000, 1_000)
        await b.set_line(name(A2), 10_000, 1_000)
        with pytest.raises(RequestError, match="of its own"):
            await b.succeed(name(A), name(A2), succession.make(A, A2, 1))


async def test_many_payments_in_flight_are_resent_byte_for_byte(tmp_path):
    a_db, b_db = tmp_path / "a.db", tmp_path / "b.db"
    async with open_ledger(a_db, A) as a, open_ledger(b_db, B) as b:
        await b.set_line(name(A), 10_000, 1_000)
        join(a, b)
        await pay(a, b, 500)
        a.disconnected(name(B))
        b.disconnected(name(A))
        for _ in range(5):
            await pay(a, b, 100)
    rotate(a_db, A, A2)
    async with open_ledger(a_db, A2) as a, open_ledger(b_db, B) as b:
        await b.succeed(name(A), name(A2), succession.make(A, A2, 1))
        join(a, b)
        await equal(a, b, 1_000)
