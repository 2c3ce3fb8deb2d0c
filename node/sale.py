"""One running attempt of somebody else's job, as its seller keeps it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple, TypeVar

import msgspec
import trio

from aivillage.node.gossip import send_or_drop
from aivillage.node.inputs import Inputs
from aivillage.node.links import Link
from aivillage.node.places import Ticket
from aivillage.node.steps import StepWriter
from aivillage.protocols.errors import AivillageError
from aivillage.protocols.job import running_hash
from aivillage.protocols.messages import Call, Progress
from aivillage.protocols.pricing import Terms, Usage, is_free, price_of_rest
from aivillage.protocols.types import AttemptId, MicroCredits, PeerId, Seconds

DEADLINE_SECONDS_MAX: Final = 3600.0
BEAT_SECONDS: Final = 2.0
"""A sign of life while nothing can be delivered yet: a model loads, a prompt is read."""

T = TypeVar("T")


class Till(NamedTuple):
    """What a seller has for whoever does the work of a sale; each may raise why it ends there."""

    deliver: Callable[[Sale, Usage, Usage, bytes], Awaitable[None]]
    """(sale, usage, what of it is paid already, hash): returns once so much may be delivered."""
    pace: Callable[[Sale, int], Awaitable[None]]
    """Returns once the owner lets so many bytes leave."""
    finish: Callable[[Sale, bytes, Usage], None]
    """The last word: the result, and what it took."""


class Sale(msgspec.Struct):
    """`listed`: the default prices. `worth`: what was delivered, at those."""

    link: Link
    call: Call
    attempt: AttemptId
    ticket: Ticket
    terms: Terms
    listed: Terms
    scope: trio.CancelScope
    steps: StepWriter
    inputs: Inputs
    out_hash: bytes = bytes(32)
    number: int = 0
    amount: MicroCredits = 0
    worth: MicroCredits = 0
    started: float = 0.0
    stopped: AivillageError | None = None
    """Why this node ended it."""

    @property
    def peer(self) -> PeerId:
        return self.link.peer

    @property
    def is_free(self) -> bool:
        return is_free(self.terms)

    def fold(self, body: bytes) -> bytes:
        """Adds one delivered piece to the running hash."""
        self.out_hash = running_hash(self.out_hash, self.attempt, self.number, body)
        self.number += 1
        return self.out_hash

    def price_of(self, usage: Usage, done: Usage) -> MicroCredits:
        return price_of_rest(self.terms, usage, done)

    def worth_of(self, usage: Usage, done: Usage) -> MicroCredits:
        return price_of_rest(self.listed, usage, done)

    def stop(self, reason: AivillageError) -> None:
        self.stopped = reason
        self.scope.cancel()


async def beating(sale: Sale, note: str, work: Callable[[], Awaitable[T]]) -> T:
    """What `work` gives or raises, with signs of life for the buyer meanwhile."""
    error: AivillageError | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_beat, sale, note)
        try:
            found = await work()
        except AivillageError as refusal:  # a nursery would wrap it
            error = refusal
        nursery.cancel_scope.cancel()
    if error is not None:
        raise error
    return found


async def _beat(sale: Sale, note: str) -> None:
    while True:
        await trio.sleep(BEAT_SECONDS)
        send_or_drop(sale.link, Progress(id=sale.call.id, done=0, note=note))


def deadline_seconds(call: Call) -> Seconds:
    """For the whole work: what the buyer said, within what a seller takes part in."""
    return min(max(call.deadline_seconds, 1.0), DEADLINE_SECONDS_MAX)
