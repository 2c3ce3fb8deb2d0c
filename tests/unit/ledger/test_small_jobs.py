"""Small jobs are signed for together, and what nobody waits for is still paid or claimed."""

import os
from contextlib import asynccontextmanager

import pytest
import trio

from aivillage.ledger.desk import Settings
from aivillage.ledger.ledger import open_ledger
from aivillage.protocols.types import AttemptId
from aivillage.protocols.vouchers import ITEMS_MAX, Voucher, decode
from tests.conftest import make_key, make_peer

QUOTE, OUT = b"q" * 32, b"o" * 32
SELLER = make_peer(2)
NEVER = 3_600.0


@asynccontextmanager
async def buyer(folder, **settings):
    """A book that a seller of exposure 1,000 is linked to, and the vouchers that it sent."""
    async with open_ledger(folder / "a.db", make_key(1), settings=Settings(**settings)) as book:
        sent = []

        def heard(blob):
            message = decode(blob)[1]
            if isinstance(message, Voucher):
                sent.append([item.amount for item in message.items])

        await book.set_received(SELLER, 10_000, 1_000)
        book.connected(SELLER, 1, heard)
        yield book, sent


def small_job(book, amount=10):
    """One that is over at once; its errors are listed."""
    attempt, errors = AttemptId(os.urandom(16)), []
    book.intend(SELLER, attempt, QUOTE, amount, soon=True)
    book.settle_soon(SELLER, attempt, amount, OUT, errors.append)
    return attempt, errors


async def until(condition):
    with trio.fail_after(10):
        while not condition():
            await trio.sleep(0.01)


async def test_sixteen_ends_share_a_voucher_and_fifteen_wait_for_more(tmp_path):
    async with buyer(tmp_path, settle_seconds=NEVER, voucher_seconds=NEVER) as (book, sent):
        for _ in range(ITEMS_MAX - 1):
            small_job(book)
        await trio.sleep(0.2)  # several ticks
        assert sent == []
        small_job(book)
        await until(lambda: sent)
        assert sent == [[10] * ITEMS_MAX]


async def test_an_end_that_stays_alone_is_signed_for_soon(tmp_path):
    async with buyer(tmp_path, voucher_seconds=NEVER) as (book, sent):
        small_job(book)
        await until(lambda: sent)
        assert sent == [[10]]


@pytest.mark.parametrize(("amount", "vouchers"), [(499, []), (500, [[500]])])
async def test_half_of_the_exposure_is_signed_for_at_once(tmp_path, amount, vouchers):
    async with buyer(tmp_path, settle_seconds=NEVER, voucher_seconds=NEVER) as (book, sent):
        small_job(book, amount)
        await trio.sleep(0.2)
        assert sent == vouchers


async def test_who_asks_the_book_sees_what_ended_before(tmp_path):
    async with buyer(tmp_path, settle_seconds=NEVER, voucher_seconds=NEVER) as (book, sent):
        small_job(book)
        assert book.owed_to(SELLER) == 10
        assert book.view(SELLER).owed_by_me == 10
        assert (await book.balance()).net == -10
        assert sent == [[10]]


async def test_a_clean_stop_signs_for_what_ended(tmp_path):
    settings = {"settle_seconds": NEVER, "voucher_seconds": NEVER}
    async with buyer(tmp_path, **settings) as (book, _):
        small_job(book)
    async with buyer(tmp_path, **settings) as (book, _):
        assert (await book.balance()).spent == 10


async def intents(book):
    return await book._answer(lambda db: db.execute("SELECT attempt FROM intent").fetchall())


async def test_an_intent_that_nobody_waits_for_is_stored_at_the_next_tick(tmp_path):
    async with buyer(tmp_path) as (book, _):
        attempt = AttemptId(os.urandom(16))
        book.intend(SELLER, attempt, QUOTE, 10, soon=True)
        with trio.fail_after(10):
            while await intents(book) != [(attempt,)]:
                await trio.sleep(0.01)


async def test_what_was_signed_for_leaves_no_intent_to_claim_on(tmp_path):
    async with buyer(tmp_path, settle_seconds=NEVER, voucher_seconds=NEVER) as (book, sent):
        for _ in range(ITEMS_MAX):
            small_job(book)
        await until(lambda: sent)
        assert await intents(book) == []


async def test_what_a_full_disk_did_not_sign_is_told_and_stays_due(tmp_path):
    async with buyer(tmp_path, settle_seconds=NEVER, voucher_seconds=NEVER) as (book, sent):

        def pages(most):
            book._ledger.desk.submit(
                lambda db: db.execute(f"PRAGMA max_page_count = {most}").fetchall(), lambda _: None
            )

        pages(1)
        ended = []
        while not any(errors for _, errors in ended):  # until the last free page is written
            ended += [small_job(book) for _ in range(ITEMS_MAX)]
            await trio.sleep(0.05)
        assert sum(not errors for _, errors in ended) == sum(map(len, sent))
        pages(1_000_000)
        for attempt, _ in ended:
            await book.settle(SELLER, attempt, 10, OUT)
        assert (await book.balance()).spent == 10 * len(ended)
