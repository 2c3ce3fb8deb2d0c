"""The queue before this node's slots: who came holds a ticket, and hears when its turn is.

`fair_queue.py` says whose turn it is; this is its clock and its tasks.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

import trio

from aivillage.node.config import Settings
from aivillage.node.fair_queue import Ask, Bounds, FairQueue
from aivillage.protocols.errors import AivillageError, RefusedError
from aivillage.protocols.types import PeerId, Seconds

OURSELVES: Final = PeerId("")
"""Whom the owner's own jobs count on."""
UNBOUNDED: Final = 1 << 16


class Ticket:
    """One that has a place or waits for it. `leave` it, however it ended."""

    def __init__(self, places: Places, ask: Ask) -> None:
        self.ask = ask
        self.begun = False
        self._places = places
        self._called = trio.Event()
        self._refusal: AivillageError | None = None

    async def turn(self) -> None:
        """Returns once it has a place.

        Raises:
            RefusedError: BUSY, it waited as long as any may, or somebody with less here came.
        """
        with trio.move_on_after(self._places.wait_seconds_max):
            await self._called.wait()
        if self._refusal is not None:
            raise self._refusal
        if not self.begun:
            raise self._places.too_long(f"no turn came within {self._places.wait_seconds_max:g} s")

    async def called(self) -> None:
        """Returns once it has a place, however long that takes."""
        await self._called.wait()

    def call(self, refusal: AivillageError | None = None) -> None:
        """Its turn has come, or never will."""
        self.begun, self._refusal = refusal is None, refusal
        self._called.set()

    def works(self) -> None:
        """Whatever it needed is there: a model was loaded."""
        self._places.queue.works(self.ask.number, trio.current_time())

    def leave(self, cost: int = 0) -> None:
        """It is over, and did work of so much."""
        self._places.leave(self, cost)


class Places:
    """`kinds`: how many calls of a kind may run at once; see `Ask.kind`."""

    def __init__(self, settings: Settings, kinds: Callable[[str], int]) -> None:
        self.wait_seconds_max: Seconds = settings.queue_seconds
        bounds = Bounds(
            places=settings.slots,
            waiting_max=settings.queue_calls,
            waiting_peer_max=settings.queue_calls_per_peer,
        )
        self.queue = FairQueue(bounds, lambda kind: kinds(kind) if kind else UNBOUNDED)
        self._tickets: dict[int, Ticket] = {}
        self._numbers = itertools.count(1)

    def free_slots(self) -> int:
        """Calls of others that would begin at once."""
        return max(0, self.queue.bounds.places - self.queue.running)

    def number(self) -> int:
        """Of the next ask."""
        return next(self._numbers)

    def wait_seconds(self, ask: Ask) -> Seconds:
        """How long it would wait for its turn."""
        return self.queue.wait_seconds(ask, trio.current_time())

    def enter(self, ask: Ask, deadline_seconds: Seconds) -> Ticket:
        """At once: its place in the queue, or already a slot.

        Raises:
            RefusedError: BUSY, the queue is full, or its turn would come after its deadline.
        """
        now = trio.current_time()
        wait, most = self.wait_seconds(ask), min(deadline_seconds, self.wait_seconds_max)
        if wait >= most:
            raise self.too_long(f"its turn would come in {wait:.0f} s", wait - most)
        dropped = self.queue.enter(ask, now)
        ticket = self._tickets[ask.number] = Ticket(self, ask)
        if dropped is not None:
            self._tickets[dropped.number].call(self.too_long("others had less here than you"))
        self.look()
        return ticket

    def look(self) -> None:
        """Calls whoever has a place now."""
        while (ask := self.queue.begin(trio.current_time())) is not None:
            self._tickets[ask.number].call()

    def leave(self, ticket: Ticket, cost: int) -> None:
        """Its place is another one's; said twice it is no error."""
        if self._tickets.pop(ticket.ask.number, None) is not None:
            self.queue.leave(ticket.ask.number, cost, trio.current_time())
            self.look()

    @asynccontextmanager
    async def own(self, kind: str) -> AsyncIterator[None]:
        """A place for a job of this machine's owner: the next of its kind that is free."""
        ask = Ask(number=self.number(), peer=OURSELVES, kind=kind, own=True)
        ticket = self._tickets[ask.number] = Ticket(self, ask)
        try:
            self.queue.enter(ask, trio.current_time())
            self.look()
            await ticket.called()
            yield
        finally:
            ticket.leave()

    def too_long(self, message: str, seconds: Seconds = 0.0) -> RefusedError:
        """A refusal that says when to come again: once so many seconds of the wait are over."""
        seconds = max(seconds, self.queue.retry_seconds(trio.current_time()))
        return RefusedError(
            message,
            code="BUSY",
            next_step=f"try another peer, or again in {seconds:.1f} s",
            retry_after_seconds=seconds,
        )
