"""Where other meshes' credits failed, tried here: each name says what went wrong there."""

import itertools
import os
import random
from contextlib import AsyncExitStack, asynccontextmanager

import apsw
import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aivillage.ledger import reader
from aivillage.ledger.compare import compare, view
from aivillage.ledger.ledger import open_ledger
from aivillage.protocols.errors import AivillageError
from aivillage.protocols.types import AttemptId, peer_id
from tests.unit.ledger import forging, racing
from tests.unit.ledger.test_ledger import OUT, QUOTE, until

KEYS = [Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in (1, 2, 3)]
IDS = [peer_id(key.public_key().public_bytes_raw()) for key in KEYS]


def join(books, one, other):
    token = trio.lowlevel.current_trio_token()

    def to(target, sender):
        return lambda blob: token.run_sync_soon(books[target].receive, IDS[sender], blob)

    for me, you in ((one, other), (other, one)):
        books[me].connected(IDS[you], books[you].epoch, to(you, me), 1)


@asynccontextmanager
async def village(folder, line=10_000, exposure=1_000):
    """Three books, all acquainted."""
    async with AsyncExitStack() as stack:
        books = [
            await stack.enter_async_context(open_ledger(folder / f"{n}.db", key))
            for n, key in enumerate(KEYS)
        ]
        for me, you in itertools.permutations(range(3), 2):
            await books[me].set_line(IDS[you], line, exposure)
            await books[me].set_received(IDS[you], line, exposure)
        for one, other in itertools.combinations(range(3), 2):
            join(books, one, other)
        pairs = list(itertools.permutations(range(3), 2))
        await until(lambda: all(books[me].view(IDS[you]).synced for me, you in pairs))
        yield books


async def pay(books, buyer, seller, amount):
    """One attempt, delivered, accepted and settled."""
    attempt = AttemptId(os.urandom(16))
    books[buyer].intend(IDS[seller], attempt, QUOTE, amount)
    books[seller].begin_sale(IDS[buyer], attempt, QUOTE, amount)
    while not books[seller].deliver(IDS[buyer], attempt, amount, OUT):
        books[seller].want_room(IDS[buyer], amount)
        with trio.fail_after(5):
            await books[seller].room_changed(IDS[buyer])
    books[buyer].accept(IDS[seller], attempt, amount, OUT)
    await books[buyer].settle(IDS[seller], attempt, amount, OUT)
    books[seller].end_sale(IDS[buyer], attempt)


def owes(books, debtor, creditor):
    """What the creditor's book says."""
    seen = books[creditor].view(IDS[debtor])
    return seen.owed_to_me - seen.owed_by_me


async def quiet(books):
    pairs = list(itertools.combinations(range(3), 2))
    await until(lambda: all(owes(books, a, b) == -owes(books, b, a) for a, b in pairs))


@pytest.mark.parametrize(
    ("move", "refusal"),
    [
        (racing.start_a_ring, "INSUFFICIENT_CREDITS"),
        (racing.write_it_off, "BAD_REQUEST"),
    ],
)
def test_eight_threads_that_each_move_the_last_hundred_move_it_once(tmp_path, move, refusal):
    """Read, subtract, write in eight threads took 800 from a balance of 100 elsewhere.

    Each has a connection of its own on the same file, and none begins before all saw the hundred.
    """
    path = tmp_path / "book.db"
    racing.owed_a_hundred(path)
    assert racing.all_at_once(path, move) == ["", *[refusal] * (racing.THREADS - 1)]
    report = reader.read_audit(path)
    assert report.ok, report.first_error
    assert report.entries == 2


async def test_eight_sales_that_enter_before_any_commit_get_the_last_hundred_once(tmp_path):
    """The seller's room: all eight ask for it before the first reservation is durable."""
    async with village(tmp_path, line=100, exposure=100) as books:
        seller, passed = books[1], []
        attempts = [AttemptId(bytes([number]) * 16) for number in range(1, 9)]
        for attempt in attempts:
            seller.begin_sale(IDS[0], attempt, QUOTE, 100)
            seller.want_room(IDS[0], 100)
            assert not seller.deliver(IDS[0], attempt, 100, OUT)  # nothing is durable yet

        async def sell(attempt):
            while not seller.room(IDS[0]) and not passed:
                await seller.room_changed(IDS[0])
            if seller.deliver(IDS[0], attempt, 100, OUT):
                passed.append(attempt)

        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                for attempt in attempts:
                    nursery.start_soon(sell, attempt)
        assert len(passed) == 1
        assert seller.headroom(IDS[0]) == 0
        seller.want_room(IDS[0], 100)
        await trio.sleep(0.2)
        late = [attempt for attempt in attempts if attempt not in passed]
        assert not any(seller.deliver(IDS[0], attempt, 100, OUT) for attempt in late)


async def test_eight_rings_at_once_spend_what_is_owed_once(tmp_path):
    async with village(tmp_path, line=400, exposure=400) as books:
        await pay(books, 1, 0, 100)  # 1 owes 0 a hundred; nobody lends 0 any more than that
        await books[0].set_received(IDS[1], 0, 400)
        await quiet(books)
        closed, refused = [], []

        async def spend():
            try:
                closed.append(await books[0].route((IDS[1], IDS[2]), 100))
            except AivillageError as error:
                refused.append(error.code)

        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                for _ in range(8):
                    nursery.start_soon(spend)
        assert closed == ["closed"]
        assert refused == ["INSUFFICIENT_CREDITS"] * 7
        await quiet(books)
        assert [owes(books, 1, 0), owes(books, 1, 2), owes(books, 2, 0)] == [0, 100, 100]


async def test_the_supply_never_grows(tmp_path):
    """Whatever is paid, given and passed around: all balances together are 0."""
    dice = random.Random(5)
    async with village(tmp_path) as books:
        for _ in range(12):
            buyer, seller = dice.sample(range(3), 2)
            await pay(books, buyer, seller, dice.randint(1, 500))
        await books[2].give(IDS[0], 77)
        with trio.fail_after(5):
            await books[0].route((IDS[2], IDS[1]), 50)
        await quiet(books)
        balances = [await book.balance() for book in books]
        assert sum(peer.net for found in balances for peer in found.peers) == 0
        assert any(peer.net for found in balances for peer in found.peers)


async def test_work_that_only_the_seller_reports_mints_nothing(tmp_path):
    """Reported FLOPs were paid by nobody elsewhere; here nothing moves until the buyer signs."""
    async with village(tmp_path) as books:
        attempt = AttemptId(os.urandom(16))
        books[1].begin_sale(IDS[0], attempt, QUOTE, 1_000)
        books[1].want_room(IDS[0], 500)
        await until(lambda: books[1].room(IDS[0]) >= 500)
        assert books[1].deliver(IDS[0], attempt, 500, OUT)
        books[1].end_sale(IDS[0], attempt)
        view = books[1].view(IDS[0])
        assert (view.delivered, view.paid) == (500, 0)
        await trio.sleep(0.3)
        assert (await books[1].balance()).earned == 0
        assert owes(books, 0, 1) == owes(books, 1, 0) == 0
        assert (await books[1].history()) == []


@pytest.mark.parametrize(("forge", "named"), forging.WAYS, ids=forging.names())
def test_who_credits_itself_on_its_own_file_is_believed_by_nobody(tmp_path, forge, named):
    """Every way that its owner has by SQL, without a trigger in the way: the audit names each."""
    db = forging.seller_book()
    path = tmp_path / "book.db"
    path.write_bytes(db.serialize("main"))
    assert reader.read_audit(path).ok
    forging.without_triggers(db)
    forge(db)
    path.write_bytes(db.serialize("main"))
    report = reader.read_audit(path)
    assert not report.ok
    assert named in report.first_error


def corrections():
    """Those forgeries that need no voucher: the schema alone refuses them."""
    return [forge for forge, _ in forging.WAYS if forge.__name__ in forging.REFUSED]


@pytest.mark.parametrize("forge", corrections())
def test_a_correction_that_moves_what_it_may_not_is_refused_by_the_database(forge):
    db = forging.seller_book()
    before = db.execute("SELECT * FROM bal").fetchall()
    with pytest.raises(apsw.ConstraintError, match=r"correction|written|given up"), db:
        forge(db)
    assert db.execute("SELECT * FROM bal").fetchall() == before


async def test_who_leaves_out_its_own_debts_is_shown_them_by_the_other_book(tmp_path):
    """A book without what it signed is whole in itself; only the peer has the signature."""
    async with village(tmp_path) as books:
        await pay(books, 0, 1, 300)
        await quiet(books)
    db = apsw.Connection(str(tmp_path / "0.db"))
    with pytest.raises(apsw.ConstraintError):
        db.execute("DELETE FROM voucher_out")
    forging.without_triggers(db)
    for table in ("entry", "posting", "voucher_out", "lane_out", "item", "bal", "account"):
        db.execute(f"DELETE FROM {table}")
    db.execute("DELETE FROM receipt")
    db.close()
    assert reader.read_audit(tmp_path / "0.db").ok
    mine = reader.read(tmp_path / "0.db", view(IDS[1]))
    theirs = reader.read(tmp_path / "1.db", view(IDS[0]))
    for found in (compare(theirs, mine), compare(mine, theirs)):
        assert not found.agree
        assert found.differences[0].amount == 300
    assert theirs.balance == 300


async def test_after_five_jobs_both_books_say_the_same(tmp_path):
    """After five requests one side had 5.12 and the other 0 elsewhere."""
    async with village(tmp_path) as books:
        for _ in range(5):
            await pay(books, 0, 1, 102)
        await quiet(books)
        assert owes(books, 0, 1) == 510
        assert owes(books, 1, 0) == -510
        mine, theirs = await books[0].history(), await books[1].history()
        assert len(theirs) == 5
        earned = sorted((row.attempt, row.amount) for row in theirs)
        assert earned == sorted((row.attempt, -row.amount) for row in mine)
