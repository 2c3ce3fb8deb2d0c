"""Keeps the book small: once a day, in quiet moments, portion by portion."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

import msgspec
import trio

from aivillage.ledger.compaction import Cursor
from aivillage.ledger.ledger import NodeBook
from aivillage.node.events import Events
from aivillage.node.jobs import Jobs

DAY_SECONDS: Final = 86_400.0
LOOK_SECONDS: Final = 60.0
"""Between two looks whether a round is due and nobody works."""
PAUSE_SECONDS: Final = 0.1
"""Between two portions: what came meanwhile is written first."""
_SETTING: Final = "compacted_unix"


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """What one round of compaction looked at, and dropped."""

    looked: int = 0
    vouchers: int = 0
    receipts: int = 0
    intents: int = 0
    seconds: float = 0.0


class Caretaker:
    """`busy`: what runs here now, by kind; where nothing does it is quiet."""

    def __init__(
        self,
        book: NodeBook,
        jobs: Jobs,
        events: Events,
        busy: Sequence[Callable[[], Sequence[object]]],
    ) -> None:
        self._book = book
        self._jobs = jobs
        self._events = events
        self._busy = busy
        self._one = trio.Lock()

    async def run(self) -> None:
        """A round a day; a node that is seldom on does it when it is."""
        while True:
            await trio.sleep(LOOK_SECONDS)
            last = float(await self._jobs.setting(_SETTING) or b"0")
            if self._is_quiet() and time.time() - last >= DAY_SECONDS:
                await self.compact(patient=True)

    async def compact(self, *, patient: bool = False) -> Round:
        """One round. `patient`: between portions it waits until nobody works."""
        async with self._one:
            began, done = time.monotonic(), Round()
            cursor: Cursor | None = Cursor()
            while cursor is not None:
                portion = await self._book.compact(cursor)
                cursor = portion.after
                done = Round(
                    looked=done.looked + portion.looked,
                    vouchers=done.vouchers + portion.vouchers,
                    receipts=done.receipts + portion.receipts,
                    intents=done.intents + portion.intents,
                    seconds=round(time.monotonic() - began, 3),
                )
                if patient:
                    await self._quiet()
            await self._jobs.set_setting(_SETTING, str(time.time()).encode())
        self._events.emit("book_compacted", **msgspec.structs.asdict(done))
        return done

    def _is_quiet(self) -> bool:
        return not any(running() for running in self._busy)

    async def _quiet(self) -> None:
        await trio.sleep(PAUSE_SECONDS)
        while True:
            if self._is_quiet():
                return
            await trio.sleep(LOOK_SECONDS)
