"""What the frames of one peer cost this node, and how long the next ones wait for that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from aivillage.node.framing import RateLimit
from aivillage.protocols.messages import (
    Fetch,
    Frame,
    Granted,
    Join,
    Ledger,
    ListOperations,
    OffersQuestion,
    PairQuestion,
    QuoteRequest,
    Reach,
    Standing,
)
from aivillage.protocols.types import Seconds

if TYPE_CHECKING:
    from aivillage.node.link import LinkLimits

QUESTIONS: Final = (
    QuoteRequest, Join, Standing, ListOperations, Fetch, Granted, PairQuestion, Reach,
    OffersQuestion,
)  # fmt: skip
"""What costs us far more than the asker."""


class Costs:
    """What a peer's frames may come to: a peer that sends more of them waits its turn."""

    def __init__(self, limits: LinkLimits) -> None:
        self.frames = RateLimit(limits.frames_per_second)
        self.volume = RateLimit(limits.bytes_per_second)
        self._blobs = RateLimit(limits.blobs_per_second, limits.blobs_burst)
        self._questions = RateLimit(limits.questions_per_second, limits.questions_burst)
        self._clear_at: Seconds = 0.0

    def of(self, frame: Frame) -> Seconds:
        """How long after `frame` the next one may be looked at, for what it costs us."""
        if isinstance(frame, Ledger):
            return self._blobs.take(max(1, len(frame.blobs)))
        return self._questions.take(1) if isinstance(frame, QUESTIONS) else 0.0

    async def spend(self, seconds: Seconds) -> None:
        """Waits so long, and until nothing is owed any more."""
        self.owe(seconds)
        if self.is_in_debt():
            await trio.sleep_until(self._clear_at)

    def owe(self, seconds: Seconds) -> None:
        """Nobody waits now: what comes next will."""
        if seconds > 0:
            self._clear_at = max(self._clear_at, trio.current_time() + seconds)

    def is_in_debt(self) -> bool:
        return self._clear_at > 0 and trio.current_time() < self._clear_at
