"""What the owner lets others have of this machine, in force: asked by the seller at every call.

`run` looks at the machine once a second, ends what runs for others when the node closes, and keeps
what they took today. Everything asked of it in between is a plain call on what is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Final

import msgspec
import trio

from aivillage.node import facts, limits
from aivillage.node.events import Events
from aivillage.node.jobs import Jobs
from aivillage.node.limits import Day, Facts, Limits, Pace, Pause
from aivillage.node.sale import Sale
from aivillage.protocols.errors import ConfigError, RefusedError
from aivillage.protocols.types import MicroCredits, PeerId, Seconds

LOOK_SECONDS: Final = 1.0
SAVE_SECONDS_MAX: Final = 1.0
"""A node that stops waits no longer for a disk that does not answer."""
_SETTING: Final = "owner_limits"
_DAY: Final = "taken_today"


class Kept(msgspec.Struct, frozen=True):
    """The owner's word as it outlasts a restart."""

    limits: Limits = Limits()
    pause: Pause | None = None


def local_now() -> datetime:
    return datetime.now().astimezone()


class Gate:
    """Made by `open_gate`."""

    def __init__(
        self,
        jobs: Jobs,
        folders: Sequence[Path],
        events: Events,
        whose: Callable[[PeerId], PeerId],
        now: Callable[[], datetime] = local_now,
    ) -> None:
        """`folders`: what the cap on the disk counts. `whose`: the name a peer's work counts on."""
        self._jobs = jobs
        self._folders = folders
        self._events = events
        self._whose = whose
        self._names: dict[PeerId, PeerId] = {}
        self.now = now
        self._kept = Kept()
        self._day = Day()
        self._is_day_saved = True
        self._pace = Pace()
        self._others = facts.OtherPrograms()
        self._was_open = True
        self.facts = Facts()
        self.running: Callable[[], list[Sale]] = list
        """What runs for others."""
        self.on_change: Callable[[], None] = _nothing
        """Called when the node opens or closes, or offers something else."""

    @property
    def limits(self) -> Limits:
        return self._kept.limits

    @property
    def pause(self) -> Pause | None:
        """The owner's, while it lasts."""
        pause = self._kept.pause
        over = pause and pause.until_unix and pause.until_unix <= self.now().timestamp()
        return None if over else pause

    @property
    def day(self) -> Day:
        """What others took today."""
        self._day.turn(self.now())
        return self._day

    # ------------------------------------------------------------------ asked by the seller
    def refusal(self) -> RefusedError | None:
        """Why this node does nothing for others now."""
        return self._closed() or self._spent()

    def reasons(self) -> list[str]:
        """All that closes this node to others now."""
        found = limits.closings(self.limits, self.pause, self.facts, self.now())
        spent = self._spent()
        return [why.message for why in (*found, *([spent] if spent else []))]

    def offers(self, operation: str) -> bool:
        """Whether others may ask for it at all."""
        return limits.not_offered(self.limits, operation) is None

    def require_offered(self, operation: str) -> None:
        """Raises: RefusedError: OWNER_LIMIT, others may not ask for it."""
        _raise(limits.not_offered(self.limits, operation))

    def require_today(self, peer: PeerId, worth: MicroCredits = 1) -> None:
        """Raises: RefusedError: OWNER_LIMIT, work worth so much is above what `peer` has today."""
        if limits.has_day(self.limits):
            _raise(limits.over_day(self.limits, self.day, self._name(peer), max(1, worth)))

    def take(self, peer: PeerId, worth: MicroCredits) -> None:
        """Counts what is about to be delivered, also what is never paid: it was worked for.

        Raises:
            RefusedError: OWNER_LIMIT, it is above what `peer` has today; nothing was counted.
        """
        if worth > 0:
            name, day = self._name(peer), self.day
            _raise(limits.over_day(self.limits, day, name, worth))
            day.add(name, worth)
            self._is_day_saved = False

    def _name(self, peer: PeerId) -> PeerId:
        """On whom its work counts, looked up once a second: the book is slow for every token."""
        if peer not in self._names:
            self._names[peer] = self._whose(peer)
        return self._names[peer]

    def wait_seconds(self, size_bytes: int) -> Seconds:
        """How long so much of an answer must wait before it leaves."""
        rate = self.limits.sent_bytes_per_second_max
        return self._pace.wait_seconds(size_bytes, rate, trio.current_time()) if rate else 0.0

    def floor_percent(self, operation: str) -> int:
        """The least that the owner takes for it, in per cent of the default price."""
        return self.limits.price_floor_percent.get(operation, 0)

    # ------------------------------------------------------------------ the owner's word
    async def set_limits(self, wanted: Limits) -> None:
        """In force at once, durable when this returns."""
        self._kept, self._pace = Kept(wanted, self._kept.pause), Pace()
        await self.look()  # what was so when a limit last asked is not what is so now
        await self._keep()

    async def set_pause(self, pause: Pause | None) -> None:
        """Stop or go on; what runs for others has been told to end when this returns."""
        self._kept = Kept(self.limits, pause)
        self._enforce()
        await self._keep()

    async def _keep(self) -> None:
        """After it is in force: the owner's stop waits for no disk."""
        self.on_change()
        await self._jobs.set_durably(_SETTING, msgspec.msgpack.encode(self._kept))

    # ------------------------------------------------------------------ service
    async def load(self) -> None:
        """What a former run was told, and what others took today.

        Raises:
            ConfigError: a later version kept limits that this one cannot hold others to.
        """
        try:
            if stored := await self._jobs.setting(_SETTING):
                self._kept = msgspec.msgpack.decode(stored, type=Kept)
            if stored := await self._jobs.setting(_DAY):
                self._day = msgspec.msgpack.decode(stored, type=Day)
        except msgspec.DecodeError as error:
            raise ConfigError(
                f"the owner's limits in jobs.db cannot be read: {error}",
                next_step="start the version of this program that set them",
            ) from None
        await self.look()

    async def run(self) -> None:
        """Looks, enforces and keeps the day's counts; a crash forgets a second of them."""
        try:
            while True:
                await trio.sleep(LOOK_SECONDS)
                await self.look()
                await self._save_day()
        finally:
            deadline = trio.current_time() + SAVE_SECONDS_MAX
            with trio.CancelScope(deadline=deadline, shield=True):
                await self._save_day()

    async def look(self) -> None:
        """Reads the facts that a limit needs, and enforces what follows."""
        self._names.clear()
        if limits.needs_facts(self.limits):
            now = trio.current_time()
            self.facts = await trio.to_thread.run_sync(self.read_facts, self.limits, now)
        self._enforce()

    def read_facts(self, wanted: Limits, now: Seconds) -> Facts:
        """Blocking; only what `wanted` asks for."""
        busy, disk = wanted.busy_cores_max is not None, wanted.disk_bytes_max is not None
        return Facts(
            on_mains=facts.on_mains() if wanted.mains_only else None,
            busy_cores=self._others.busy_cores(now) if busy else None,
            disk_bytes=facts.disk_bytes(self._folders) if disk else None,
        )

    def _spent(self) -> RefusedError | None:
        """Why nobody has anything more today; what day it is is asked only where that matters."""
        if not limits.has_day(self.limits):
            return None
        return limits.day_is_spent(self.limits, self.day)

    def _closed(self) -> RefusedError | None:
        return limits.closed(self.limits, self.pause, self.facts, self.now())

    def _enforce(self) -> None:
        """What runs ends with the node's closing; not with the day's counts, which end it exactly.

        What was delivered is paid, and goes on elsewhere.
        """
        closed = self._closed()
        if closed is not None:
            for sale in self.running():
                sale.stop(closed)
        refusal = self.refusal()
        if (refusal is None) != self._was_open:
            self._was_open = refusal is None
            reason = refusal.message if refusal else ""
            self._events.emit("closed_to_others" if refusal else "opened_to_others", reason=reason)
            self.on_change()

    async def _save_day(self) -> None:
        if not self._is_day_saved:
            self._is_day_saved = True  # unless more is taken while it is written
            try:
                await self._jobs.set_setting(_DAY, msgspec.msgpack.encode(self._day))
            except BaseException:
                self._is_day_saved = False
                raise


async def open_gate(
    jobs: Jobs,
    folders: Sequence[Path],
    events: Events,
    whose: Callable[[PeerId], PeerId],
) -> Gate:
    """With what the owner said before; nothing was served yet."""
    gate = Gate(jobs, folders, events, whose)
    await gate.load()
    return gate


def _raise(refusal: RefusedError | None) -> None:
    if refusal is not None:
        raise refusal


def _nothing() -> None:
    """Nobody wants to know."""
