"""What one peer may take of a seller beside credit and slots: free reading, and what is lent it."""

from __future__ import annotations

import time
from typing import Final

from aivillage.protocols.errors import LedgerError, RefusedError
from aivillage.protocols.ports import Book
from aivillage.protocols.types import MicroCredits, PeerId, Seconds, as_credits

READING_PER_EXPOSURE: Final = 16
"""Reading costs a seller some twentieth of its price, so this many exposures are one in work."""
HOUR_SECONDS: Final = 3600.0
PEERS_MAX: Final = 1024
"""Beyond it, those who have nothing left to remember are forgotten."""


class FreeReading:
    """What was read for nothing, because the buyer said that another seller was paid for it.

    Nobody can prove that, so each peer has a budget that refills within the hour. The last reading
    may overdraw it: a long prompt can be gone on with, only not again and again.
    """

    def __init__(self) -> None:
        self._read: dict[str, tuple[float, Seconds]] = {}

    def take(self, whose: str, amount: MicroCredits, most: MicroCredits) -> None:
        """Counts a reading worth `amount` at our price; `most` is what an hour has.

        Raises:
            RefusedError: OWNER_LIMIT, this budget is used up.
        """
        if not amount:
            return
        now = time.monotonic()
        read, at = self._read.get(whose, (0.0, now))
        read = max(0.0, read - most * (now - at) / HOUR_SECONDS)
        if read >= most:
            raise RefusedError(
                "this node read as much for nothing in the last hour as its owner allows",
                code="OWNER_LIMIT",
                next_step="begin the job anew, at its full price",
            )
        self._read[whose] = (read + amount, now)
        if len(self._read) > PEERS_MAX:  # whoever read last within the hour is still counted
            fresh = {
                key: entry for key, entry in self._read.items() if now - entry[1] < HOUR_SECONDS
            }
            self._read = fresh


class Allowances:
    """The owner's limits for one peer at a time; each refusal is typed and says what to do."""

    def __init__(self, book: Book) -> None:
        self._book = book
        self._reading = FreeReading()

    def require_welcome(self, peer: PeerId) -> None:
        """Raises: RefusedError: OWNER_LIMIT, the owner blocked it."""
        if self._book.policy(peer).blocked:
            raise unwelcome()

    def take_reading(self, peer: PeerId, amount: MicroCredits) -> None:
        """Raises: RefusedError: OWNER_LIMIT, it had its share of reading that nobody pays."""
        policy = self._book.policy(peer)
        whose = peer if policy.known else ""
        self._reading.take(whose, amount, READING_PER_EXPOSURE * policy.exposure)

    def require_credit(self, peer: PeerId, amount: MicroCredits) -> None:
        """What is free is so for whom we know: a stranger needs some of the pool to begin.

        Raises:
            LedgerError: INSUFFICIENT_CREDITS, so much is above its line.
        """
        least = amount if self._book.policy(peer).known else max(1, amount)
        if self._book.headroom(peer) < least:
            raise LedgerError(
                "you owe this node as much as its owner allows",
                code="INSUFFICIENT_CREDITS",
                next_step="earn with it, or ask its owner for a longer line",
            )

    def require_deliverable(self, peer: PeerId, amount: MicroCredits) -> None:
        """A module's result is one delivery: what is dearer than the exposure would wait for ever.

        Raises:
            RefusedError: OWNER_LIMIT, `amount` can never be delivered to this peer.
        """
        exposure = self._book.policy(peer).exposure
        if amount > exposure > 0:  # without any, the line says no
            raise RefusedError(
                f"it may cost {as_credits(amount)} credits, and this node delivers at most "
                f"{as_credits(exposure)} ahead of its pay",
                code="OWNER_LIMIT",
                next_step="ask for less in one job, or its owner for more exposure",
            )


def unwelcome() -> RefusedError:
    """What a blocked peer hears."""
    return RefusedError(
        "this node does no work for you",
        code="OWNER_LIMIT",
        next_step="ask its owner, or try another peer",
    )
