"""What keeps one defect from felling the node: whatever a task raises ends at that task.

Only the ledger's fatal stop is not behind it: a node that cannot write its books must end.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final

import trio

from aivillage.node.events import Events

AGAIN_SECONDS: Final = 1.0
"""Before a service that failed goes on: a moment for whatever it was, not a busy loop."""


async def guarded(
    events: Events, name: str, work: Callable[..., Awaitable[Any]], *args: Any
) -> None:
    """`work` to its end; an exception of it is an event with its traceback."""
    try:
        await work(*args)
    except Exception as defect:
        events.emit("task_failed", level=logging.ERROR, task=name, exc_info=defect)


async def guarded_forever(events: Events, name: str, loop: Callable[[], Awaitable[Any]]) -> None:
    """A service that runs until it is cancelled: when it fails it pauses and goes on."""
    while True:
        await guarded(events, name, loop)
        await trio.sleep(AGAIN_SECONDS)


class Tasks:
    """Starts tasks in a nursery, each behind a guard."""

    def __init__(self, nursery: trio.Nursery, events: Events) -> None:
        self._nursery = nursery
        self._events = events

    def start_soon(self, work: Callable[..., Awaitable[Any]], *args: Any) -> None:
        """One task, named after its function; none where the node is stopping.

        Links end a moment after the services, and bring frames until then.
        """
        if self._nursery.cancel_scope.cancel_called:
            return
        name = getattr(work, "__qualname__", repr(work))
        self._nursery.start_soon(guarded, self._events, name, work, *args)

    def serve(self, *loops: Callable[[], Awaitable[Any]]) -> None:
        """Services that go on after a failure."""
        for loop in loops:
            name = getattr(loop, "__qualname__", repr(loop))
            self._nursery.start_soon(guarded_forever, self._events, name, loop)
