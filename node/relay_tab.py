"""What a relay is owed for one reservation, as the relay counts it.

The relay's count is a claim like a seller's: it is delivered into the ledger before more is
carried, so what a holder leaves unpaid ends at the exposure that the owner grants it, and the MiB
under way.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

import trio

from aivillage.node.relay_talk import say
from aivillage.protocols.errors import LedgerError, PeerError, RequestError
from aivillage.protocols.ports import Book, Stream
from aivillage.protocols.relaying import (
    BILL_BYTES,
    NONCE_BYTES,
    Bill,
    Granted,
    Reserve,
    agreement,
    mark,
    price_of,
)
from aivillage.protocols.types import AttemptId, MicroCredits, PeerId

BILL_SECONDS: Final = 5.0
"""What is less than `BILL_BYTES` is billed so often; a relay that is killed loses no more."""
ROOM_SECONDS: Final = 15.0
"""A holder that has not paid for so long is carried no further."""
ROOM_CHECK_SECONDS: Final = 1.0
"""How long we rely on being told of room."""


class Toll:
    """Opens tabs at one price. Without a price it needs no book, and nobody pays."""

    def __init__(self, me: PeerId, book: Book | None, price_micro_credits_per_gib: int) -> None:
        self.price = price_micro_credits_per_gib if book is not None else 0
        self.earned: MicroCredits = 0
        """What was delivered since the start, paid or not."""
        self.book = book
        self.acquainted: Callable[[PeerId], Awaitable[None]] = _at_once
        """Returns once what a peer that just came may owe us is in the book."""
        self._me = me

    async def open(self, stream: Stream, asked: Reserve) -> Tab:
        """For whoever reserves on `stream`.

        Raises:
            RequestError: PRICE_ABOVE_CEILING, it does not pay our price.
            LedgerError: INSUFFICIENT_CREDITS, it owes us too much already.
        """
        if asked.price_max_micro_credits_per_gib < self.price or (
            self.price and len(asked.nonce) != NONCE_BYTES
        ):
            raise RequestError(
                f"this relay takes {self.price} micro-credits a GiB",
                code="PRICE_ABOVE_CEILING",
                next_step="raise relay_price_max_micro_credits_per_gib, or use another relay",
            )
        granted = Granted(nonce=os.urandom(NONCE_BYTES), price_micro_credits_per_gib=self.price)
        tab = Tab(self, stream, asked, granted, agreement(self._me, stream.peer, asked, granted))
        if self.price and self.book is not None:
            least = price_of(BILL_BYTES, self.price)
            await self.acquainted(stream.peer)
            lent = min(self.book.headroom(stream.peer), self.book.policy(stream.peer).exposure)
            if lent < least:
                raise LedgerError(
                    f"a MiB is {least} micro-credits here, and its owner lends you {lent}",
                    next_step="pay it, or use another relay",
                )
            self.book.begin_sale(stream.peer, tab.attempt, tab.agreed, asked.ceiling_micro_credits)
            self.book.want_room(stream.peer, least)
        return tab


async def _at_once(_peer: PeerId) -> None: ...


class Circuit(Protocol):
    """What a tab ends with itself."""

    @property
    def scope(self) -> trio.CancelScope: ...


class Tab:
    """One reservation: who holds it, what it was carried, and the circuits that end with it."""

    def __init__(
        self, toll: Toll, stream: Stream, asked: Reserve, granted: Granted, agreed: bytes
    ) -> None:
        self.stream = stream
        self.granted = granted
        self.agreed = agreed
        self.attempt = AttemptId(agreed[:16])
        self.scope = trio.CancelScope()
        self.circuits: set[Circuit] = set()
        self.carried_bytes = 0
        self.amount: MicroCredits = 0
        self.unpaid = False
        """Nothing more is carried: no payment made room for it."""
        self._toll = toll
        self._ceiling = asked.ceiling_micro_credits
        self._billed_bytes = 0
        self._turn = trio.Lock()

    @property
    def holder(self) -> PeerId:
        return self.stream.peer

    async def take(self, size_bytes: int) -> bool:
        """Counts a piece that is to go out, or says that it may not: it would not be paid."""
        self.carried_bytes += size_bytes
        due = self.carried_bytes - self._billed_bytes >= BILL_BYTES
        return not due or await self.bill()

    async def bill_now_and_then(self) -> None:
        while await self.bill():  # noqa: ASYNC110 - time passes, no event
            await trio.sleep(BILL_SECONDS)

    async def bill(self) -> bool:
        """Bills what was carried; False: it is over, and everything with it."""
        async with self._turn:
            carried = self.carried_bytes
            amount = price_of(carried, self._toll.price)
            if amount > self.amount and not self.unpaid:
                self.unpaid = not await self._delivered(amount, carried)
            self._billed_bytes = carried
        if self.unpaid:
            self.scope.cancel()
        return not self.unpaid

    async def _delivered(self, amount: MicroCredits, carried: int) -> bool:
        """Once the ledger lets it owe us so much more; it hears how much it is."""
        book = self._toll.book
        assert book is not None, "there is a price only where there is a book"
        if amount > self._ceiling:
            return False
        with trio.move_on_after(ROOM_SECONDS):
            while not book.deliver(self.holder, self.attempt, amount, mark(self.agreed, carried)):
                book.want_room(self.holder, amount - self.amount)
                with trio.move_on_after(ROOM_CHECK_SECONDS):
                    await book.room_changed(self.holder)
            self._toll.earned += amount - self.amount
            self.amount = amount
            try:
                await say(self.stream, Bill(carried_bytes=carried))
            except PeerError:  # it is gone; what it owes is in the book
                return False
            return True
        return False

    def close(self) -> None:
        """The reservation is over, and so is whatever came in through it."""
        for circuit in self.circuits:
            circuit.scope.cancel()
        if self._toll.price and self._toll.book is not None:
            self._toll.book.end_sale(self.holder, self.attempt)
