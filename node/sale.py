"""One running attempt of somebody else's job, as its seller keeps it."""

from __future__ import annotations

import msgspec
import trio

from aivillage.node.links import Link
from aivillage.node.steps import StepWriter
from aivillage.protocols.errors import AivillageError
from aivillage.protocols.job import running_hash
from aivillage.protocols.messages import Call
from aivillage.protocols.pricing import Terms, Usage, is_free, price_of_rest
from aivillage.protocols.types import AttemptId, MicroCredits, PeerId


class Sale(msgspec.Struct):
    """`listed`: the default prices. `worth`: what was delivered, at those."""

    link: Link
    call: Call
    attempt: AttemptId
    terms: Terms
    listed: Terms
    scope: trio.CancelScope
    steps: StepWriter
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

    def delivered(self, usage: Usage, done: Usage) -> None:
        """Counts what it has now."""
        self.amount = self.price_of(usage, done)
        self.worth = price_of_rest(self.listed, usage, done)

    def stop(self, reason: AivillageError) -> None:
        self.stopped = reason
        self.scope.cancel()
