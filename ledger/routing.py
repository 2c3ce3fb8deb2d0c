"""When a transfer may move: with whom we are in touch, what waits, and who wants to hear of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import apsw

from aivillage.ledger import payer, transfers
from aivillage.ledger.books import Pair
from aivillage.ledger.buying import Buying
from aivillage.ledger.desk import Desk, Failed, Partner
from aivillage.protocols.errors import RefusedError
from aivillage.protocols.types import MicroCredits, PeerId, Seconds
from aivillage.protocols.vouchers import REFUND, ROUTE, ROUTE_MINOR, Item, Voucher, xid_of

RETRY_SECONDS: Final = 1.0
"""Between two looks at what waits; a voucher that moves a transfer is one too."""


class Routing:
    def __init__(self, desk: Desk, buying: Buying, *, waiting: bool) -> None:
        """`waiting`: a former boot left transfers that wait."""
        self._desk = desk
        self._buying = buying
        self._retry_at: Seconds = 0.0
        self._waiting = waiting
        self.on_end: Callable[[bytes, str], None] = lambda xid, state: None
        """A ring of mine is `closed` or `refunded`."""

    def start(
        self,
        others: Sequence[PeerId],
        amount: MicroCredits,
        random_bytes: bytes,
        begun: Callable[[bytes], None],
        failed: Failed,
    ) -> None:
        """Pays the first of `others` so that the last pays me; `begun` with its id once durable."""
        desk = self._desk
        names = [desk.name(peer) for peer in others]
        if not names or not self._is_ready(desk.partner(names[0])):
            return failed(
                RefusedError(
                    "the first of the ring is not here, or too old for transfers",
                    code="NO_PEER",
                    next_step="try again when `aivillage-node peers` shows it connected",
                )
            )
        at_ms = desk.clock.unix_ms()
        xid = xid_of(at_ms, random_bytes)

        def started(sent: transfers.Sent) -> None:
            self.sent([sent])
            desk.refresh(names[1:])
            begun(xid)

        desk.submit(
            lambda db: transfers.start(db, self._signing(db), names, amount, xid, at_ms),
            started,
            failed,
        )
        return None

    def release(self, xid: bytes, done: Callable[[MicroCredits], None], failed: Failed) -> None:
        """Gives up an open ring of mine; `done` with what that costs."""
        at_ms = self._desk.clock.unix_ms()

        def released(amount: MicroCredits) -> None:
            self._tell_end(xid)
            done(amount)

        self._desk.submit(lambda db: transfers.release(db, xid, at_ms), released, failed)

    # passing on

    def step(self) -> Callable[[apsw.Connection], list[transfers.Sent]]:
        """What to do in the transaction that books a transfer: book and pass on are one."""
        at_ms = self._desk.clock.unix_ms()
        hold_ms = int(self._desk.settings.route_seconds * 1000)
        reach = transfers.Reach(self._ready(), frozenset(self._desk.met), hold_ms)
        return lambda db: transfers.advance(db, self._signing(db), reach, at_ms)

    def sent(self, sent: Sequence[transfers.Sent]) -> None:
        """Durable now."""
        for one in sent:
            self._desk.keep(one.pair)
            self._buying.send(self._desk.partner(one.peer), [one.voucher])

    def booked(self, partner: Partner, items: Sequence[Item]) -> None:
        """Items that counted: what ends a ring of mine is told, what waits is looked at soon."""
        for item in items:
            if item.kind in {ROUTE, REFUND}:
                self._waiting = True
                self._tell_end(item.id)

    def _tell_end(self, xid: bytes) -> None:
        """What the book says of a ring of mine: an item may bring less than the whole."""

        def told(found: tuple[str, list[Pair]]) -> None:
            state, pairs = found
            for pair in pairs:
                self._desk.keep(pair)
            if state in {"closed", "refunded"}:
                self.on_end(xid, state)

        self._desk.submit(lambda db: transfers.standing(db, xid), told)

    def _signing(self, db: apsw.Connection) -> transfers.Sign:
        wallet, at_ms = self._desk.wallet, self._desk.clock.unix_ms()

        def sign(peer: PeerId, item: Item) -> Voucher | None:
            return payer.make_voucher(db, wallet, peer, [item], at_ms)

        return sign

    def _is_ready(self, partner: Partner) -> bool:
        link = partner.link
        synced = link is not None and link.synced and link.minor >= ROUTE_MINOR
        return synced and not partner.pair.unsynced

    def _ready(self) -> frozenset[PeerId]:
        partners = self._desk.partners.values()
        return frozenset(p.pair.peer for p in partners if self._is_ready(p))

    def tick(self) -> None:
        now = self._desk.now()
        if self._waiting and now >= self._retry_at:
            self._retry_at = now + RETRY_SECONDS
            self._look()

    def _look(self) -> None:
        advance = self.step()

        def job(db: apsw.Connection) -> tuple[list[transfers.Sent], bool]:
            return advance(db), bool(transfers.pending(db))

        def done(result: tuple[list[transfers.Sent], bool]) -> None:
            sent, self._waiting = result
            self.sent(sent)

        self._desk.submit(job, done)
