"""The book as the daemon has it: `async with open_ledger(...) as book`.

Everything that lasts runs on the writer thread; awaits return once it is durable. A cancelled
caller is not a cancelled payment: what was asked for happens, only nobody is told.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import apsw
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aivillage.ledger import corrections
from aivillage.ledger.audit import AuditReport, audit
from aivillage.ledger.compaction import Compacted, Cursor, compact
from aivillage.ledger.compare import View, view
from aivillage.ledger.core import Ledger, PartnerView
from aivillage.ledger.desk import Clock, Done, Failed, Settings
from aivillage.ledger.exposure import Word, exposure_of
from aivillage.ledger.opening import SystemClock, open_file, read_file, unusable
from aivillage.ledger.queries import (
    Balance,
    Favour,
    HistoryRow,
    OpenTransfer,
    Query,
    balance,
    favours,
    history,
    open_transfers,
)
from aivillage.ledger.signing import Ed25519Signer
from aivillage.ledger.store import Store
from aivillage.protocols.errors import AivillageError, NodeError
from aivillage.protocols.ports import Book, Policy
from aivillage.protocols.types import AttemptId, MicroCredits, PeerId, peer_id

T = TypeVar("T")
TICK_SECONDS: Final = 0.05
log = logging.getLogger(__name__)


class NodeBook:
    """`Book` for the daemon. One event loop; plain calls touch memory only."""

    def __init__(self, path: Path, ledger: Ledger) -> None:
        self._path = path
        self._ledger = ledger
        self._rooms: dict[PeerId, trio.Event] = {}
        self._rings: dict[bytes, list[str]] = {}
        self._ring_ended = trio.Event()
        self._fatal: NodeError | None = None
        ledger.desk.on_room = self._wake
        ledger.desk.on_error = _log_error
        ledger.routing.on_end = self._end_ring

    @property
    def epoch(self) -> int:
        return self._ledger.desk.epoch

    @property
    def refusing(self) -> AivillageError | None:
        """Why no new money is taken now (DISK_FULL), or None."""
        return self._ledger.desk.refusing

    # keys

    @property
    def names(self) -> tuple[PeerId, ...]:
        """The ids that this book ever had, the one in force first."""
        return tuple(peer_id(key) for key in self._ledger.desk.keys)

    @property
    def proofs(self) -> tuple[bytes, ...]:
        """Of the changes of its key, the oldest first."""
        return self._ledger.desk.proofs

    def names_of(self, peer: PeerId) -> tuple[PeerId, ...]:
        """The ids that the book has of `peer`, the one in force first."""
        return tuple(peer_id(key) for key in self._ledger.desk.keys_of(peer))

    def knows(self, peer: PeerId) -> bool:
        """Whether the book has anything of `peer`."""
        return self._ledger.desk.knows(peer)

    # links

    def connected(
        self, peer: PeerId, peer_epoch: int, send: Callable[[bytes], None], minor: int = 0
    ) -> None:
        self._ledger.connected(peer, peer_epoch, send, minor)

    def disconnected(self, peer: PeerId) -> None:
        self._ledger.disconnected(peer)

    def receive(self, peer: PeerId, blob: bytes) -> None:
        self._ledger.receive(peer, blob)

    def take_receipt(self, peer: PeerId) -> bytes | None:
        return self._ledger.selling.take_receipt(self._ledger.desk.partner(peer))

    # policy

    async def set_line(
        self, peer: PeerId, line: MicroCredits, exposure: MicroCredits, owner: str | None = None
    ) -> None:
        """What the village lets `peer` owe; the owner's own word, if any, beats it."""
        amounts = (line, exposure)
        await self._durable(functools.partial(self._ledger.certify, peer, amounts, owner))

    async def decree(self, peer: PeerId, word: Word) -> None:
        """The owner's own word on a peer: a line, blocked or not, for nothing or not."""
        await self._durable(functools.partial(self._ledger.decree, peer, word))

    async def set_received(self, peer: PeerId, line: MicroCredits, exposure: MicroCredits) -> None:
        """What `peer` lets me owe, and how much unsigned; vouchers go out at half of the latter."""
        await self._durable(functools.partial(self._ledger.set_received, peer, (line, exposure)))

    async def succeed(self, peer: PeerId, key_peer: PeerId, proof: bytes) -> None:
        """`peer`, by its key in force, goes by another key from now on; its proof was checked.

        Raises:
            RequestError: BAD_REQUEST, the book has that key as somebody else, or has another
                successor of `peer` already.
        """
        await self._durable(functools.partial(self._ledger.succeed, peer, key_peer, proof))

    async def forgive_gap(self, peer: PeerId) -> None:
        """Gives up what was delivered to `peer`, or reserved for it, and never signed for."""
        await self._durable(functools.partial(self._ledger.forgive_gap, peer))

    async def write_off(
        self, peer: PeerId, amount: MicroCredits | None, reason: str
    ) -> MicroCredits:
        """Books what `peer` owes, or `amount` of it, as lost; returns how much that is.

        Raises:
            RequestError: BAD_REQUEST, it does not owe so much.
        """
        desk = self._ledger.desk
        name, at_ms = desk.name(peer), desk.clock.unix_ms()
        return await self._answer(lambda db: corrections.write_off(db, name, amount, reason, at_ms))

    async def favour(
        self, peer: PeerId, attempt: AttemptId, worth: MicroCredits, *, mine: bool
    ) -> None:
        """Notes what work for nothing was worth. `mine`: it was done for me."""
        desk = self._ledger.desk
        row = (mine, desk.name(peer), attempt, worth, desk.clock.unix_ms())
        await self._answer(
            lambda db: db.execute(
                "INSERT INTO favour VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING", row
            ).fetchall()
        )

    async def compact(self, cursor: Cursor) -> Compacted:
        """One portion from `cursor` on: drops what later vouchers say too; see `compaction.py`."""
        at_ms = self._ledger.desk.clock.unix_ms()
        return await self._answer(lambda db: compact(db, cursor, at_ms))

    # spending elsewhere

    async def give(self, peer: PeerId, amount: MicroCredits) -> bytes:
        """A present, durable and on its way when this returns its id.

        Raises:
            RefusedError: NO_PEER, the peer is not here.
            RequestError: BAD_REQUEST, nothing to give.
        """
        gift = os.urandom(16)
        await self._durable(functools.partial(self._ledger.buying.give, peer, amount, gift))
        return gift

    async def route(self, others: Sequence[PeerId], amount: MicroCredits) -> str:
        """Moves a debt around a ring: pays the first of `others`; the last of them pays me.

        Returns `closed`, or `refunded` where somebody on the way could not pass it on. Cancelled,
        it goes on: what is under way counts against the exposure until it ends.

        Raises:
            RequestError, RefusedError, LedgerError: nothing was begun, and why.
        """
        xids: list[bytes] = []

        def start(done: Done, failed: Failed) -> None:
            def begun(xid: bytes) -> None:
                xids.append(xid)
                self._rings[xid] = []
                done()

            self._ledger.routing.start(others, amount, os.urandom(8), begun, failed)

        try:
            await self._durable(start)
            while not self._rings[xids[0]]:
                await self._ring_ended.wait()
            return self._rings[xids[0]][0]
        finally:
            for xid in xids:
                del self._rings[xid]

    def _end_ring(self, xid: bytes, state: str) -> None:
        if xid in self._rings:
            self._rings[xid].append(state)
            self._ring_ended.set()
            self._ring_ended = trio.Event()

    async def release(self, xid: bytes) -> MicroCredits:
        """Gives up an open transfer of mine; returns what that costs.

        Raises:
            RequestError: BAD_REQUEST, none of mine that is open.
        """
        costs: list[MicroCredits] = []

        def start(done: Done, failed: Failed) -> None:
            def released(amount: MicroCredits) -> None:
                costs.append(amount)
                done()

            self._ledger.routing.release(xid, released, failed)

        await self._durable(start)
        return costs[0]

    # buyer

    def intend(
        self,
        peer: PeerId,
        attempt: AttemptId,
        quote_hash: bytes,
        ceiling: MicroCredits,
        *,
        soon: bool = False,
    ) -> None:
        buying = self._ledger.buying
        (buying.intend_soon if soon else buying.intend)(peer, attempt, quote_hash, ceiling)

    def accept(
        self, peer: PeerId, attempt: AttemptId, amount: MicroCredits, out_hash: bytes
    ) -> None:
        self._ledger.buying.accept(peer, attempt, amount, out_hash)

    async def settle(
        self, peer: PeerId, attempt: AttemptId, amount: MicroCredits, out_hash: bytes
    ) -> None:
        settle = self._ledger.buying.settle
        await self._durable(functools.partial(settle, peer, attempt, amount, out_hash))

    def settle_soon(
        self,
        peer: PeerId,
        attempt: AttemptId,
        amount: MicroCredits,
        out_hash: bytes,
        failed: Failed,
    ) -> None:
        self._ledger.buying.settle_soon(peer, attempt, amount, out_hash, failed)

    async def abandon(self, peer: PeerId, attempt: AttemptId) -> None:
        """A cancelled call may not have begun; one that waits goes on."""
        await self._durable(functools.partial(self._ledger.buying.abandon, peer, attempt))

    def owed_to(self, peer: PeerId) -> MicroCredits:
        return max(0, -self._ledger.balance_with(peer))

    def owed_by(self, peer: PeerId) -> MicroCredits:
        return max(0, self._ledger.balance_with(peer))

    # seller

    def begin_sale(
        self, peer: PeerId, attempt: AttemptId, quote_hash: bytes, ceiling: MicroCredits
    ) -> None:
        self._ledger.selling.begin_sale(peer, attempt, quote_hash, ceiling)

    def room(self, peer: PeerId) -> MicroCredits:
        return self._ledger.selling.room(peer)

    def headroom(self, peer: PeerId) -> MicroCredits:
        return self._ledger.selling.headroom(peer)

    def want_room(self, peer: PeerId, amount: MicroCredits) -> None:
        self._ledger.selling.want_room(peer, amount)

    def deliver(
        self, peer: PeerId, attempt: AttemptId, amount: MicroCredits, out_hash: bytes
    ) -> bool:
        return self._ledger.selling.deliver(peer, attempt, amount, out_hash)

    async def room_changed(self, peer: PeerId) -> None:
        await self._rooms.setdefault(self._ledger.desk.name(peer), trio.Event()).wait()

    def end_sale(self, peer: PeerId, attempt: AttemptId) -> None:
        self._ledger.selling.end_sale(peer, attempt)

    # reads

    def view(self, peer: PeerId) -> PartnerView:
        return self._ledger.view(peer)

    def views(self) -> list[PartnerView]:
        return [self._ledger.view(pair.peer) for pair in self._ledger.desk.pairs()]

    def policy(self, peer: PeerId) -> Policy:
        pair = self._ledger.desk.pair(peer)
        exposure = exposure_of(pair, self._ledger.desk.settings.stranger_pool)
        return Policy(
            known=bool(pair.known),
            exposure=exposure,
            blocked=bool(pair.blocked),
            shared=bool(pair.shared),
        )

    async def balance(self) -> Balance:
        return await self._read(balance(self._ledger.desk.settings.stranger_pool))

    async def history(self, limit: int = 50) -> list[HistoryRow]:
        return await self._read(history(limit))

    async def favours(self, limit: int = 50) -> list[Favour]:
        return await self._read(favours(limit))

    async def open_transfers(self) -> list[OpenTransfer]:
        return await self._read(open_transfers())

    async def pair_view(self, peer: PeerId) -> View:
        """What the book says about `peer`, to compare with what its own says."""
        return await self._read(view(self._ledger.desk.name(peer)))

    async def audit(self) -> AuditReport:
        signer = self._ledger.desk.signer
        return await self._read(audit(signer.verify))

    async def _read(self, query: Query[T]) -> T:
        """Over a connection of its own, in a snapshot that has all that ended before the question.

        Readers wait for the writer only where something is still to be signed.
        """
        if self._ledger.buying.sign_ended():
            with suppress(NodeError):  # a full disk: what is written is read all the same
                await self._answer(_nothing)
        return await trio.to_thread.run_sync(read_file, self._path, query)

    async def _answer(self, job: Callable[[apsw.Connection], T]) -> T:
        """What `job` gives, once it is durable."""
        answers: list[T] = []

        def start(done: Done, failed: Failed) -> None:
            def answered(value: T) -> None:
                answers.append(value)
                done()

            self._ledger.desk.submit(job, answered, failed)

        await self._durable(start)
        return answers[0]

    async def _durable(self, start: Callable[[Done, Failed], None]) -> None:
        event, errors = trio.Event(), list[AivillageError]()

        def failed(error: AivillageError) -> None:
            errors.append(error)
            event.set()

        start(event.set, failed)
        await event.wait()
        if errors:
            raise errors[0]

    def _wake(self, peer: PeerId) -> None:
        event = self._rooms.pop(peer, None)
        if event is not None:
            event.set()

    def stop_for(self, error: NodeError) -> None:
        self._fatal = error

    async def run(self) -> None:
        """Does what falls due.

        Raises:
            NodeError: INTERNAL, the ledger can no longer be written; the node must stop.
        """
        while True:
            if self._fatal is not None:
                raise self._fatal
            self._ledger.tick()
            await trio.sleep(TICK_SECONDS)


if TYPE_CHECKING:
    _checked: type[Book] = NodeBook


def _nothing(_db: apsw.Connection) -> None:
    """Only what was asked for before it."""


def _log_error(error: AivillageError) -> None:
    log.error("ledger_step_failed", extra={"code": error.code, "reason": error.message})


@asynccontextmanager
async def open_ledger(
    path: Path,
    key: Ed25519PrivateKey,
    *,
    settings: Settings | None = None,
    clock: Clock | None = None,
) -> AsyncIterator[NodeBook]:
    """The book in `path`, made if missing, open for one boot.

    On a clean exit it signs for what was accepted and waits until that is durable.

    Raises:
        ConfigError: CONFIG, the file is no ledger, or another key's.
    """
    signer, clock = Ed25519Signer(key), clock or SystemClock()
    settings = settings or Settings()
    db = await trio.to_thread.run_sync(open_file, path, signer, clock)
    store = Store(db)
    make = functools.partial(Ledger, db, signer, settings, clock, os.urandom(8), store)
    try:
        try:
            ledger = await trio.to_thread.run_sync(make)
        except apsw.Error as error:
            raise unusable(path, error) from None
        book = NodeBook(path, ledger)
        store.on_fatal = book.stop_for
        store.start()
        async with _stopping(ledger, store), trio.open_nursery() as nursery:
            nursery.start_soon(book.run)
            yield book
            nursery.cancel_scope.cancel()
    finally:
        db.close()


@asynccontextmanager
async def _stopping(ledger: Ledger, store: Store) -> AsyncIterator[None]:
    try:
        yield
    finally:
        ledger.wind_down()
        await store.stop()
