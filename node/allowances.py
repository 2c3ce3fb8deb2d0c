"""What one peer may take of a seller beside credit: its share of the slots, and free reading."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Final

from aivillage.node.config import Settings
from aivillage.protocols.errors import LedgerError, RefusedError
from aivillage.protocols.ports import Book
from aivillage.protocols.types import MicroCredits, PeerId, Seconds, as_credits

WAITING_SECONDS: Final = 15.0
"""Who was turned away asks again within this time: until then half of the slots are not for one."""
READING_PER_EXPOSURE: Final = 16
"""Reading costs a seller some twentieth of its price, so this many exposures are one in work."""
HOUR_SECONDS: Final = 3600.0
KEPT_SHARE: Final = 4
"""One slot in so many is for work under way: new work is the last to come when room runs out."""
PEERS_MAX: Final = 1024
"""Beyond it, those who have nothing left to remember are forgotten."""


class SlotShares:
    """Slots go to whoever comes; while somebody waits, nobody gets more than half of them.

    The last quarter is for attempts that go on with delivered work, and for who is served already.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._for_new = slots - slots // KEPT_SHARE
        self._turned_away: dict[PeerId, Seconds] = {}

    def take(self, peer: PeerId, holders: Iterable[PeerId], *, goes_on: bool = False) -> None:
        """`goes_on`: with what was delivered elsewhere.

        Raises:
            RefusedError: BUSY, `peer` gets none now.
        """
        now, all_of_them = time.monotonic(), list(holders)
        waiting = {p: at for p, at in self._turned_away.items() if now - at < WAITING_SECONDS}
        others_wait = any(other != peer for other in waiting)
        share = max(1, self._slots // 2) if others_wait else self._slots
        if len(all_of_them) >= self._slots or all_of_them.count(peer) >= share:
            self._turned_away = {**waiting, peer: now}
            raise RefusedError("all slots are taken", code="BUSY", next_step="try another peer")
        if not goes_on and self._is_kept_from(peer, all_of_them):
            self._turned_away = {**waiting, peer: now}
            raise RefusedError(
                "the last slots are kept for work under way",
                code="BUSY",
                next_step="try another peer, or again in a moment",
            )
        waiting.pop(peer, None)
        self._turned_away = waiting

    def _is_kept_from(self, peer: PeerId, holders: list[PeerId]) -> bool:
        """Only the last quarter is left, and nobody else has more than a fair share of the rest."""
        if len(holders) < self._for_new or peer in holders:
            return False
        return max(map(holders.count, holders)) <= self._slots // 2


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

    def __init__(self, settings: Settings, book: Book) -> None:
        self._book = book
        self._shares = SlotShares(settings.slots)
        self._reading = FreeReading()

    def require_welcome(self, peer: PeerId) -> None:
        """Raises: RefusedError: OWNER_LIMIT, the owner blocked it."""
        if self._book.policy(peer).blocked:
            raise unwelcome()

    def take_slot(self, peer: PeerId, holders: Iterable[PeerId], *, goes_on: bool) -> None:
        """Raises: RefusedError: BUSY, `peer` gets none now."""
        self._shares.take(peer, holders, goes_on=goes_on)

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
