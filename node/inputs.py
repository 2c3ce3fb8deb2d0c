"""What a buyer feeds a running call: in order, bounded, and waited for only so long."""

from __future__ import annotations

from typing import Final, NamedTuple

import trio

from aivillage.node.inbox import Inbox
from aivillage.protocols.errors import JobError, PeerError, RefusedError
from aivillage.protocols.messages import Input, Passed
from aivillage.protocols.types import Seconds

INPUTS_WAITING_MAX: Final = 64
"""A prompt of 2,048 tokens in slices of 32, fed at once."""
INPUTS_WAITING_BYTES_MAX: Final = 8 << 20
"""Such a prompt's states in a model 1,024 wide; of a wider one fewer slices may wait."""
INPUT_SECONDS: Final[Seconds] = 60.0
"""A call that is fed nothing for so long has a slot that others want."""


class Fed(NamedTuple):
    """One input. `hops`, `draws`: of the stages after this one, as an `Input` says them."""

    body: bytes
    seq: int
    hops: int
    draws: int
    is_passed: bool
    """By the stage before, not by the buyer."""


class Inputs:
    """The inputs of one call. `put` and `pass_in` are plain calls of a link's reader."""

    def __init__(self, *, taken: bool, is_shared: bool = False) -> None:
        """`taken`: whether the operation takes inputs at all; `is_shared`: a neighbour's too."""
        self._taken = taken
        self._was_shared = self._is_shared = is_shared
        self._seq = 0
        self._ended = False
        self._waiting_bytes = 0
        self._inbox: Inbox[Fed] = Inbox()

    def put(self, frame: Input) -> None:
        """Queues one of the buyer's. What the stage before has passed on already is dropped.

        Raises:
            PeerError: BAD_REQUEST, the call takes none, or it is out of turn.
            RefusedError: BUSY, more wait than may.
        """
        self._is_shared = self._is_shared and not frame.alone
        if self._was_shared and frame.body and frame.seq < self._seq:
            return
        if not self._taken or self._ended or frame.seq != self._seq:
            raise PeerError("an input that this call does not take", code="BAD_REQUEST")
        if not self._has_room(len(frame.body)):
            raise RefusedError(
                f"more than {INPUTS_WAITING_MAX} inputs wait", next_step="feed after an answer"
            )
        self._take(Fed(frame.body, frame.seq, frame.hops, frame.draws, is_passed=False))
        if frame.end:
            self._ended = True
            self._inbox.end()

    def pass_in(self, frame: Passed) -> None:
        """Queues one of the stage before, in its turn; else its buyer feeds it. Never raises."""
        is_next = self._is_shared and not self._ended and frame.seq == self._seq
        if is_next and frame.body and self._has_room(len(frame.body)):
            self._take(Fed(frame.body, frame.seq, frame.hops, frame.draws, is_passed=True))

    def _has_room(self, size_bytes: int) -> bool:
        waiting_bytes = self._waiting_bytes + size_bytes
        is_few = len(self._inbox) < INPUTS_WAITING_MAX
        return waiting_bytes <= INPUTS_WAITING_BYTES_MAX and is_few

    def _take(self, fed: Fed) -> None:
        self._seq += 1
        self._waiting_bytes += len(fed.body)
        if fed.body:
            self._inbox.put(fed)

    async def next(self) -> Fed | None:
        """The next one; None after the last.

        Raises:
            JobError: DEADLINE, none came for a minute.
        """
        with trio.move_on_after(INPUT_SECONDS):
            try:
                fed = await self._inbox.receive()
            except trio.EndOfChannel:
                return None
            self._waiting_bytes -= len(fed.body)
            return fed
        raise JobError(f"no input came for {INPUT_SECONDS:.0f} s", code="DEADLINE")
