"""What being reached through relays costs, as the holder of a reservation counts it.

It pays what it counted on its own end of the circuits, never more than was billed, and leaves a
relay whose bill is beyond that count by more than what can be under way.
"""

from __future__ import annotations

import os
from collections import deque
from typing import Final

from aivillage.protocols.errors import PeerError, RefusedError
from aivillage.protocols.ports import Book
from aivillage.protocols.relaying import (
    BILL_BYTES,
    NONCE_BYTES,
    Bill,
    Granted,
    Reserve,
    agreement,
    mark,
    price_of,
    tolerance_bytes,
)
from aivillage.protocols.types import AttemptId, MicroCredits, PeerId

BILLS_WAITING_MAX: Final = 64
"""Bills are cumulative: where more wait for our count to catch up, the latest stands for two."""


class LeftError(PeerError):
    """This relay is not asked again for a day: it billed too much, or its pay is used up."""


class Fares:
    """What this node pays any relay: at most `price_max` a GiB, `ceiling` a reservation."""

    def __init__(
        self, me: PeerId, book: Book, price_max: MicroCredits, ceiling: MicroCredits
    ) -> None:
        self._me = me
        self._book = book
        self._price_max = price_max
        self._ceiling = ceiling

    def ask(self) -> Reserve:
        return Reserve(
            nonce=os.urandom(NONCE_BYTES),
            price_max_micro_credits_per_gib=self._price_max,
            ceiling_micro_credits=self._ceiling,
        )

    def begin(self, relay: PeerId, asked: Reserve, granted: Granted) -> Fare:
        """Raises: RefusedError: PRICE_ABOVE_CEILING, it wants more than was said."""
        if granted.price_micro_credits_per_gib > asked.price_max_micro_credits_per_gib:
            raise RefusedError(
                f"it grants at {granted.price_micro_credits_per_gib} micro-credits a GiB",
                code="PRICE_ABOVE_CEILING",
                next_step="use another relay",
            )
        fare = Fare(self._book, relay, granted, agreement(relay, self._me, asked, granted))
        fare.ceiling = asked.ceiling_micro_credits
        if fare.price:
            self._book.intend(relay, fare.attempt, fare.agreed, fare.ceiling)
        return fare


class Fare:
    """One reservation: what was counted here, what was billed, what is paid."""

    def __init__(self, book: Book, relay: PeerId, granted: Granted, agreed: bytes) -> None:
        self.relay = relay
        self.price = granted.price_micro_credits_per_gib
        self.agreed = agreed
        self.attempt = AttemptId(agreed[:16])
        self.ceiling: MicroCredits = 0
        self.counted_bytes = 0
        self.circuits = 0
        self.paid_bytes = 0
        self._book = book
        self._bills: deque[int] = deque()
        self._billed_bytes = 0

    @property
    def amount(self) -> MicroCredits:
        """What was accepted for payment."""
        return price_of(self.paid_bytes, self.price)

    def count(self, size_bytes: int) -> None:
        """Of a circuit's bytes, either direction, as they pass this end."""
        self.counted_bytes += size_bytes
        while self._bills and self._bills[0] <= self.counted_bytes:
            self.paid_bytes = self._bills.popleft()
            self._book.accept(
                self.relay, self.attempt, self.amount, mark(self.agreed, self.paid_bytes)
            )

    def take(self, bill: Bill) -> None:
        """Pays it as far as it was counted here, now or when the rest arrives.

        Raises:
            LeftError: it is no more than the last one, too far beyond our count, or above the
                ceiling.
        """
        amount = price_of(bill.carried_bytes, self.price)
        if amount <= price_of(self._billed_bytes, self.price):
            raise LeftError("it bills what it billed before", code="BAD_REQUEST")
        ahead = bill.carried_bytes - self.counted_bytes
        if ahead > tolerance_bytes(self.circuits):
            raise LeftError(f"it bills {ahead:,} bytes more than passed here", code="BAD_REQUEST")
        if amount > self.ceiling:
            raise LeftError("what it may cost is used up", code="PRICE_ABOVE_CEILING")
        self._billed_bytes = bill.carried_bytes
        if len(self._bills) == BILLS_WAITING_MAX:
            self._bills.pop()
        self._bills.append(bill.carried_bytes)
        self.count(0)

    def require_more(self) -> None:
        """Raises: LeftError: the next bill would be above the ceiling."""
        if self.price and price_of(self.counted_bytes + BILL_BYTES, self.price) > self.ceiling:
            raise LeftError("what it may cost is used up", code="PRICE_ABOVE_CEILING")

    async def close(self) -> None:
        """Signs for what was accepted, once and for all."""
        if self.price:
            hashed = mark(self.agreed, self.paid_bytes) if self.amount else bytes(32)
            await self._book.settle(self.relay, self.attempt, self.amount, hashed)
