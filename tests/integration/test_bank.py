"""The bank test: eight books, random jobs and partitions, and readers that look all the while.

Every snapshot that a reader takes is balanced, and whenever all is quiet the total is 0.
"""

import itertools
import json
import os
import random
import subprocess
import sys
from contextlib import AsyncExitStack, contextmanager
from functools import partial

import apsw
import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aivillage.ledger import reader
from aivillage.ledger.ledger import open_ledger
from aivillage.protocols.errors import AivillageError
from aivillage.protocols.types import AttemptId, peer_id
from tests.house import ROOT

pytestmark = pytest.mark.slow
NODES, ROUNDS, ROUND_SECONDS = 8, 6, 1.0
LINE, EXPOSURE = 5_000, 800
OUT, QUOTE = b"o" * 32, b"q" * 32
KEYS = [Ed25519PrivateKey.from_private_bytes(bytes([n + 1]) * 32) for n in range(NODES)]
IDS = [peer_id(key.public_key().public_bytes_raw()) for key in KEYS]

_UNBALANCED = """
  SELECT seq FROM entry LEFT JOIN posting USING (seq) GROUP BY seq
  HAVING count(amount) < 2 OR sum(amount) <> 0
"""
_BALANCES = """
  SELECT e.peer, sum(p.amount) FROM entry e JOIN posting p USING (seq)
  WHERE p.account = 'peer' GROUP BY e.peer HAVING sum(p.amount) <> 0 ORDER BY e.peer
"""


class Bank:
    def __init__(self, folder, books, seed):
        self.folder, self.books, self.dice = folder, books, random.Random(seed)
        self.links = {}
        self.jobs = self.rings = self.snapshots = 0
        self.trading = True

    # links

    def connect(self, one, other):
        token = trio.lowlevel.current_trio_token()
        link = self.links[one, other] = {"up": True}

        def carry(target, sender, blob):
            if link["up"]:
                self.books[target].receive(IDS[sender], blob)

        for me, you in ((one, other), (other, one)):
            epoch = self.books[you].epoch
            send = partial(token.run_sync_soon, carry, you, me)
            self.books[me].connected(IDS[you], epoch, send, 1)

    def cut(self, one, other):
        """A partition: what is on its way is lost."""
        self.links.pop((one, other))["up"] = False
        self.books[one].disconnected(IDS[other])
        self.books[other].disconnected(IDS[one])

    def connect_all(self):
        for pair in itertools.combinations(range(NODES), 2):
            if pair not in self.links:
                self.connect(*pair)

    # what they do

    async def partitions(self):
        while self.trading:
            await trio.sleep(self.dice.uniform(0.02, 0.1))
            if self.links and self.dice.random() < 0.5:
                self.cut(*self.dice.choice(list(self.links)))
            else:
                missing = set(itertools.combinations(range(NODES), 2)) - set(self.links)
                for pair in sorted(missing)[:2]:
                    self.connect(*pair)

    async def trader(self):
        while self.trading:
            buyer, seller = self.dice.sample(range(NODES), 2)
            if self.dice.random() < 0.15:
                await self.ring()
            else:
                await self.job(buyer, seller, self.dice.randint(1, 300))

    async def job(self, buyer, seller, amount):
        attempt = AttemptId(os.urandom(16))
        book = self.books[seller]
        self.books[buyer].intend(IDS[seller], attempt, QUOTE, amount)
        book.begin_sale(IDS[buyer], attempt, QUOTE, amount)
        book.want_room(IDS[buyer], amount)
        with trio.move_on_after(0.2):
            while not book.deliver(IDS[buyer], attempt, amount, OUT):
                await book.room_changed(IDS[buyer])
            self.books[buyer].accept(IDS[seller], attempt, amount, OUT)
            self.jobs += 1
        with trio.CancelScope(shield=True):
            await self.books[buyer].settle(IDS[seller], attempt, 0, OUT)  # what was accepted
        book.end_sale(IDS[buyer], attempt)

    async def ring(self):
        starter, *others = self.dice.sample(range(NODES), self.dice.randint(3, 4))
        with trio.move_on_after(0.2):
            try:
                await self.books[starter].route([IDS[n] for n in others], EXPOSURE // 8)
                self.rings += 1
            except AivillageError:
                await trio.sleep(0.01)  # a line or a link does not allow it now

    # who looks

    async def watch(self, node):
        while True:
            await trio.to_thread.run_sync(self.look, node)
            self.snapshots += 1
            await trio.sleep(0.01)

    def look(self, node):
        """One snapshot of one file, by a connection of our own."""
        db = apsw.Connection(str(self.folder / f"{node}.db"), flags=apsw.SQLITE_OPEN_READONLY)
        try:
            db.execute("BEGIN")
            assert db.execute(_UNBALANCED).fetchall() == []
            moved = db.execute(_BALANCES).fetchall()
            stored = "SELECT peer, amount FROM bal WHERE amount <> 0 ORDER BY peer"
            assert db.execute(stored).fetchall() == moved
            assert db.execute("SELECT coalesce(sum(amount), 0) FROM account").fetchall() == [(0,)]
            db.execute("ROLLBACK")
        finally:
            db.close()

    # when all is quiet

    def differences(self):
        pairs = itertools.combinations(range(NODES), 2)
        return [pair for pair in pairs if self.owed(*pair) != -self.owed(*pair[::-1])]

    def owed(self, creditor, debtor):
        seen = self.books[creditor].view(IDS[debtor])
        return seen.owed_to_me - seen.owed_by_me

    async def quiet(self):
        """All are linked, nobody trades: within 10 s the books agree, and the total is 0."""
        self.connect_all()
        with trio.fail_after(10):
            while self.differences() or any([(await b.balance()).in_transit for b in self.books]):
                await trio.sleep(0.02)
        balances = [await book.balance() for book in self.books]
        assert sum(peer.net for found in balances for peer in found.peers) == 0


@contextmanager
def reading(folder):
    """The command line's reads go on in another process; all that it saw must add up."""
    command = [sys.executable, "-m", "tests.integration.bank_reader", str(folder)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)
    try:
        yield
        seen = json.loads(process.communicate(timeout=20)[0])
        assert seen["wrong"] == []
        assert seen["snapshots"] > 20
    finally:
        process.kill()
        process.communicate()


async def test_every_snapshot_is_balanced_and_at_every_quiet_point_the_total_is_zero(tmp_path):
    async with AsyncExitStack() as stack:
        books = [
            await stack.enter_async_context(open_ledger(tmp_path / f"{n}.db", key))
            for n, key in enumerate(KEYS)
        ]
        for me, you in itertools.permutations(range(NODES), 2):
            await books[me].set_line(IDS[you], LINE, EXPOSURE)
            await books[me].set_received(IDS[you], LINE, EXPOSURE)
        bank = Bank(tmp_path, books, seed=11)
        bank.connect_all()
        with reading(tmp_path):
            async with trio.open_nursery() as readers:
                for node in range(NODES):
                    readers.start_soon(bank.watch, node)
                for _ in range(ROUNDS):
                    bank.trading = True
                    async with trio.open_nursery() as traders:
                        for _ in range(6):
                            traders.start_soon(bank.trader)
                        traders.start_soon(bank.partitions)
                        await trio.sleep(ROUND_SECONDS)
                        bank.trading = False
                    await bank.quiet()
                readers.cancel_scope.cancel()
        assert bank.jobs > 100
        assert bank.rings > 0
        assert bank.snapshots > 100
    # Only now: a second SQLite library in one process would undo the locks of the first.
    for node in range(NODES):
        report = await trio.to_thread.run_sync(reader.read_audit, tmp_path / f"{node}.db")
        assert report.ok, report.first_error
