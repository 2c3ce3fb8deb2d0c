"""What a buyer feeds a running call: in order, bounded, and waited for only so long."""

from __future__ import annotations

from typing import Final

import trio

from aivillage.protocols.errors import JobError, PeerError, RefusedError
from aivillage.protocols.messages import Input
from aivillage.protocols.types import Seconds

INPUTS_WAITING_MAX: Final = 64
"""A prompt of 2,048 tokens in slices of 32, fed at once."""
INPUTS_WAITING_BYTES_MAX: Final = 8 << 20
"""Such a prompt's states in a model 1,024 wide; of a wider one fewer slices may wait."""
INPUT_SECONDS: Final[Seconds] = 60.0
"""A call that is fed nothing for so long has a slot that others want."""


class Inputs:
    """The inputs of one call. `put` is a plain call of the link's reader."""

    def __init__(self, *, taken: bool) -> None:
        """`taken`: whether the operation takes inputs at all."""
        self._taken = taken
        self._seq = 0
        self._ended = False
        self._waiting_bytes = 0
        self._send, self._receive = trio.open_memory_channel[bytes](INPUTS_WAITING_MAX)

    def put(self, frame: Input) -> None:
        """Queues one.

        Raises:
            PeerError: BAD_REQUEST, the call takes none, or it is out of turn.
            RefusedError: BUSY, more wait than may.
        """
        if not self._taken or self._ended or frame.seq != self._seq:
            raise PeerError("an input that this call does not take", code="BAD_REQUEST")
        self._seq += 1
        self._waiting_bytes += len(frame.body)
        count = self._send.statistics().current_buffer_used
        if self._waiting_bytes > INPUTS_WAITING_BYTES_MAX or count >= INPUTS_WAITING_MAX:
            raise RefusedError(
                f"more than {INPUTS_WAITING_MAX} inputs wait", next_step="feed after an answer"
            )
        if frame.body:
            self._send.send_nowait(frame.body)
        if frame.end:
            self._ended = True
            self._send.close()

    async def next(self) -> bytes | None:
        """The next one; None after the last.

        Raises:
            JobError: DEADLINE, none came for a minute.
        """
        with trio.move_on_after(INPUT_SECONDS):
            try:
                body = await self._receive.receive()
            except trio.EndOfChannel:
                return None
            self._waiting_bytes -= len(body)
            return body
        raise JobError(f"no input came for {INPUT_SECONDS:.0f} s", code="DEADLINE")
