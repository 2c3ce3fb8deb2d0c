"""Three books on trio: rings, presents and the owner's word, through the daemon's interface."""

from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aivillage.ledger.compaction import Cursor
from aivillage.ledger.exposure import Word
from aivillage.ledger.ledger import open_ledger
from aivillage.protocols.errors import LedgerError, RefusedError, RequestError
from aivillage.protocols.types import AttemptId, peer_id

KEYS = [Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in (1, 2, 3)]
A, B, C = NAMES = [peer_id(key.public_key().public_bytes_raw()) for key in KEYS]


def join(books, one, other):
    token = trio.lowlevel.current_trio_token()
    for mine, theirs in ((one, other), (other, one)):
        receive = books[theirs].receive
        books[mine].connected(
            NAMES[theirs],
            books[theirs].epoch,
            lambda blob, receive=receive, mine=mine: token.run_sync_soon(
                receive, NAMES[mine], blob
            ),
            1,
        )


@asynccontextmanager
async def village(folder):
    async with AsyncExitStack() as stack:
        books = [
            await stack.enter_async_context(open_ledger(folder / f"{n}.db", key))
            for n, key in enumerate(KEYS)
        ]
        for book in books:
            for name in NAMES:
                await book.set_line(name, 1_000, 400)
                await book.set_received(name, 1_000, 400)
        for one, other in ((0, 1), (0, 2), (1, 2)):
            join(books, one, other)
        await until(
            lambda: all(
                book.view(name).synced
                for n, book in enumerate(books)
                for m, name in enumerate(NAMES)
                if n != m
            )
        )
        yield books


async def until(condition):
    with trio.fail_after(10):
        while not condition():
            await trio.sleep(0.01)


async def test_a_ring_closes_and_everybody_owes_the_next(tmp_path):
    async with village(tmp_path) as books:
        with trio.fail_after(10):
            assert await books[0].route([B, C], 100) == "closed"
        await until(lambda: books[1].view(A).owed_to_me == 100)
        assert books[0].view(C).owed_to_me == books[0].owed_to(B) == 100
        await until(lambda: books[0].view(B).routed == 0)
        with pytest.raises(LedgerError):
            await books[0].route([B, C], 101)


async def test_a_ring_that_cannot_go_on_comes_back_to_who_waits_for_it(tmp_path):
    async with village(tmp_path) as books:
        await books[1].decree(A, Word(blocked=True))
        assert books[1].view(A).blocked
        with trio.fail_after(10):
            assert await books[0].route([B, C], 100) == "refunded"


async def test_a_ring_that_nobody_ends_is_given_up(tmp_path):
    async with village(tmp_path) as books:
        books[1].disconnected(C)
        with trio.move_on_after(0.2):
            await books[0].route([B, C], 100)
        assert books[0].view(B).routed == 100
        ((xid,),) = books[0]._ledger.desk._runner._db.execute("SELECT xid FROM route")
        assert await books[0].release(xid) == 100
        await until(lambda: books[0].view(B).routed == 0)
        with pytest.raises(RequestError):
            await books[0].release(xid)


async def test_a_present_moves_both_books_and_counts_for_no_work(tmp_path):
    async with village(tmp_path) as books:
        assert len(await books[0].give(B, 30)) == 16
        await until(lambda: books[1].view(A).owed_to_me == 30)
        assert books[1].view(A).paid == 0
        with pytest.raises(RequestError):
            await books[0].give(B, 0)
        books[0].disconnected(B)
        with pytest.raises(RefusedError):
            await books[0].give(B, 1)


async def test_the_owner_writes_off_forgives_and_notes_favours(tmp_path):
    async with village(tmp_path) as books:
        await books[0].give(B, 30)
        await until(lambda: books[1].view(A).owed_to_me == 30)
        assert await books[1].write_off(A, None, "moved away") == 30
        with pytest.raises(RequestError):
            await books[1].write_off(A, 1, "again")
        await books[1].forgive_gap(A)
        for _ in range(2):
            await books[1].favour(A, AttemptId(bytes(16)), 7, mine=False)
        assert (await books[1].compact(Cursor())).after == Cursor("out")
        report = await books[1].audit()
        assert report.ok, report.first_error
        assert {view.peer for view in books[1].views()} >= {A, C}


async def test_a_peer_with_a_new_key_keeps_its_account(tmp_path):
    later = peer_id(Ed25519PrivateKey.from_private_bytes(bytes(32)).public_key().public_bytes_raw())
    async with village(tmp_path) as books:
        await books[0].give(B, 30)
        await books[0].succeed(B, later, b"proof")
        await books[0].succeed(B, later, b"proof")
        assert books[0].owed_to(later) == 30
        with pytest.raises(RequestError):
            await books[0].succeed(C, later, b"proof")
        with pytest.raises(RequestError):
            await books[0].succeed(B, C, b"proof")
