"""What comes of one call, in its order, for the task that waits for it."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

import trio

T = TypeVar("T")


class Inbox(Generic[T]):
    """A queue with one reader. `put` and `end` are plain calls; its owner counts what waits.

    A channel of Trio's is for several on both ends, and takes five times as long to make.
    """

    def __init__(self) -> None:
        self._frames: deque[T] = deque()
        self._ended = False
        self._reader: trio.lowlevel.Task | None = None

    def __len__(self) -> int:
        """How many are here already."""
        return len(self._frames)

    def put(self, frame: T) -> None:
        self._frames.append(frame)
        self._wake()

    def end(self) -> None:
        """Nothing more comes; what is here can still be read."""
        self._ended = True
        self._wake()

    async def receive(self) -> T:
        """The next one; what is here already costs no turn of the loop.

        Raises:
            trio.EndOfChannel: there is none, and none will come.
            trio.BusyResourceError: another task waits for it.
        """
        while not self._frames:
            if self._ended:
                raise trio.EndOfChannel
            if self._reader is not None:
                raise trio.BusyResourceError("two tasks read one inbox")
            self._reader = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._give_up)
        return self._frames.popleft()

    def _wake(self) -> None:
        if self._reader is not None:
            trio.lowlevel.reschedule(self._reader)
            self._reader = None

    def _give_up(self, _raise_cancel: object) -> trio.lowlevel.Abort:
        self._reader = None
        return trio.lowlevel.Abort.SUCCEEDED
