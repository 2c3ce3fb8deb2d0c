"""What every sale goes through before a piece of it leaves: pay, the owner's day, the owner's pace.

Work is never further ahead of its pay than the owner allows.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Final

import trio

from aivillage.node.gate import Gate
from aivillage.node.gossip import send_or_drop
from aivillage.node.sale import Sale, Till, beating
from aivillage.protocols import messages
from aivillage.protocols.errors import LedgerError, RequestError
from aivillage.protocols.ports import Book
from aivillage.protocols.pricing import Usage
from aivillage.protocols.types import MicroCredits

ROOM_SECONDS: Final = 15.0
"""A buyer that has not paid for this long while we wait for room gets no more; its slot is free."""
ROOM_CHECK_SECONDS: Final = 1.0
"""How long we rely on being told of room."""


class Delivery:
    """Where pieces of an answer leave."""

    def __init__(self, book: Book, gate: Gate) -> None:
        self._book = book
        self._gate = gate

    @property
    def till(self) -> Till:
        """For work that the node does itself."""
        return Till(self.deliver, self.pace, self.finish)

    async def deliver(self, sale: Sale, usage: Usage, done: Usage, out_hash: bytes) -> None:
        """Waits until the attempt may have delivered `usage`, and counts it.

        Raises:
            RequestError: PRICE_ABOVE_CEILING, the buyer would not pay it.
            RefusedError: OWNER_LIMIT, it had what the owner lends a day.
            LedgerError: INSUFFICIENT_CREDITS, it did not pay for what it has.
        """
        amount, worth = sale.price_of(usage, done), sale.worth_of(usage, done)
        if amount > sale.call.ceiling_micro_credits:
            raise RequestError("the next unit is above the ceiling", code="PRICE_ABOVE_CEILING")
        self._gate.take(sale.peer, worth - sale.worth)
        await self.wait_for_room(
            sale,
            amount - sale.amount,
            lambda: self._book.deliver(sale.peer, sale.attempt, amount, out_hash),
        )
        sale.amount, sale.worth = amount, worth

    async def wait_for_room(
        self, sale: Sale, amount: MicroCredits, fits: Callable[[], bool]
    ) -> None:
        """Returns once `fits`; the buyer hears meanwhile that we wait for it.

        Raises:
            LedgerError: INSUFFICIENT_CREDITS, it did not pay for what it has.
        """
        end = trio.current_time() + ROOM_SECONDS
        while not fits():
            if trio.current_time() >= end:
                raise LedgerError(
                    f"no payment made room for more within {ROOM_SECONDS:.0f} s",
                    next_step="it comes back as vouchers arrive, or is healed; try again later",
                )
            self._book.want_room(sale.peer, amount)
            with trio.move_on_after(ROOM_CHECK_SECONDS) as patience:
                await self._book.room_changed(sale.peer)
            if patience.cancelled_caught:  # not silence: the buyer would take us for lost
                note = "waiting for payment"
                send_or_drop(sale.link, messages.Progress(id=sale.call.id, done=0, note=note))

    async def pace(self, sale: Sale, size_bytes: int) -> None:
        """Waits until the owner's cap on what leaves lets so much of an answer go."""
        seconds = self._gate.wait_seconds(size_bytes)
        if seconds > 0:
            note = "its owner limits what leaves that node"
            await beating(sale, note, functools.partial(trio.sleep, seconds))

    def finish(self, sale: Sale, result: bytes, usage: Usage) -> None:
        sale.steps.flush()
        send_or_drop(
            sale.link,
            messages.Finished(
                id=sale.call.id,
                attempt=sale.attempt,
                result=result,
                usage=dict(usage),
                out_hash=sale.out_hash,
                seconds=time.monotonic() - sale.started,
            ),
        )
