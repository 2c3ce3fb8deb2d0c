"""All sources of one blob at work: one task each, fast ones take over from slow ones.

A source that lies, refuses or vanishes falls out alone; who comes back, or comes later, joins in.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
import trio

from aivillage.models.mesh.fetch import NAME, UNIT, FetchRequest
from aivillage.node.blob_call import BadChunkError, ChunkCall
from aivillage.node.blob_draft import Draft
from aivillage.node.blob_plan import RUN_MAX, Plan, Run
from aivillage.node.blob_sources import Sources
from aivillage.node.market import Choice, Need
from aivillage.node.records import Work
from aivillage.node.trade import Say, Trade
from aivillage.protocols import messages
from aivillage.protocols.codec import pack
from aivillage.protocols.errors import AivillageError, RefusedError, RequestError
from aivillage.protocols.manifest import CHUNK_BYTES, Manifest
from aivillage.protocols.types import JobId, MicroCredits, PeerId, Seconds, as_credits

SOURCES_MAX: Final = 8
"""At work at the same time: each has a run of chunks on its way, 16 MiB at most."""
RUN_SECONDS: Final = 2.0
"""What a source is asked for at a time, at its speed: soon enough to be taken over from."""
COPY_AFTER: Final = 2.0
"""A source that is at a chunk for so many times as long as we would need is not waited for."""
FIRST_CHUNKS: Final = 2
LOOK_SECONDS: Final = (1.0, 5.0)
"""Between two looks for sources: without any, and with some."""
REFUSED_SECONDS: Final = 3.0
"""How long everybody may refuse before the job does."""
ALONE_SECONDS: Final = 60.0
"""How long a fetch that lost its sources waits for one."""
AGAIN_SECONDS: Final = 5.0
TRIES_MAX: Final = 6
WAITED_FOR: Final = frozenset({"BUSY", "QUOTE_EXPIRED", "INSUFFICIENT_CREDITS"})

Accuse = Callable[[PeerId, JobId, str], Awaitable[None]]
"""(who, in which job, why): a source was found wrong."""


class Tab(msgspec.Struct):
    """What a fetch may cost, over all its sources and restarts."""

    ceiling: MicroCredits
    spent: MicroCredits = 0
    reserved: MicroCredits = 0
    """The most that calls under way may cost."""
    chunks: int = 0
    """Chunks that were paid, or given."""
    attempts: int = 0
    sellers: list[PeerId] = []

    @property
    def left(self) -> MicroCredits:
        return self.ceiling - self.spent - self.reserved

    def number(self) -> int:
        """Of the next chunk within the job."""
        self.chunks += 1
        return self.chunks - 1


class Swarm:
    """Brings what is missing in `draft`. `excluded` has who fell out of this fetch, and why."""

    def __init__(
        self,
        *,
        job: JobId,
        names: tuple[str, ...],
        trade: Trade,
        sources: Sources,
        draft: Draft,
        tab: Tab,
        excluded: dict[PeerId, AivillageError],
        say: Say,
        accuse: Accuse,
    ) -> None:
        """`names`: only these sources, by the ends of their ids."""
        self.plan = Plan(draft.manifest.count, draft.had)
        self.peers: set[PeerId] = set()
        """Who vouched for this manifest."""
        self._job = job
        self._names = names
        self._trade = trade
        self._sources = sources
        self._draft = draft
        self._tab = tab
        self._excluded = excluded
        self._say = say
        self._accuse = accuse
        self._working: set[PeerId] = set()
        self._calls: dict[PeerId, ChunkCall] = {}
        self._chunk_seconds: dict[PeerId, Seconds] = {}
        self._since: dict[PeerId, Seconds] = {}
        """When a source began with the chunk that it is at."""
        self._again_at: dict[PeerId, Seconds] = {}
        self._changed = trio.Event()

    async def bring(self) -> None:
        """Returns when every chunk is there.

        Raises:
            AivillageError: nobody brings the rest; what came stays.
        """
        error: AivillageError | None = None
        async with trio.open_nursery() as nursery:
            try:
                await self._recruit(nursery)
            except AivillageError as found:  # a nursery would wrap it
                error = found
                nursery.cancel_scope.cancel()
        if error is not None:
            raise error

    # ------------------------------------------------------------------ who
    async def _recruit(self, nursery: trio.Nursery) -> None:
        alone_since = trio.current_time()
        while self.plan.missing:
            await self._look(nursery)
            if self._working:
                alone_since = trio.current_time()
            else:
                alone_seconds = trio.current_time() - alone_since
                cid = self._draft.manifest.cid
                require_patience(cid, self._excluded, alone_seconds, ALONE_SECONDS)
            await self._pause(LOOK_SECONDS[bool(self._working)], until_done=True)

    async def _look(self, nursery: trio.Nursery) -> None:
        """Asks who has it, and sets those to work who vouch for the same manifest."""
        now = trio.current_time()
        for peer in [peer for peer, at in self._again_at.items() if at <= now]:
            del self._again_at[peer]
            self._excluded.pop(peer, None)
        if len(self._working) >= SOURCES_MAX:
            return
        manifest, without = self._draft.manifest, {*self._excluded, *self._working}
        held = await self._sources.ask(manifest.cid, self._names, without)
        able = {one.peer for one in self._trade.discovery.candidates(NAME)}
        for peer, answer in held.items():
            if answer.root == manifest.root and peer in able:
                self.peers.add(peer)
                if len(self._working) < SOURCES_MAX:
                    self._working.add(peer)
                    nursery.start_soon(self._work, peer)

    # ------------------------------------------------------------------ one source
    async def _work(self, peer: PeerId) -> None:
        """Run after run, until nothing is missing or the source falls out."""
        tries = 0
        try:
            while self.plan.missing and peer not in self._excluded:
                run = self._next_run(peer)
                if run is None:
                    await self._pause(self._chunk_seconds.get(peer, 1.0))
                    continue
                try:
                    await self._bring(peer, run)
                    tries = 0
                except AivillageError as error:
                    tries += 1
                    self.plan.drop(peer)
                    await self._failed(peer, error, tries)
                finally:
                    self.plan.drop(peer)
        finally:
            self._working.discard(peer)
            self._wake()

    def _next_run(self, peer: PeerId) -> Run | None:
        """None: whatever is missing is on its way, and soon enough."""
        pace = self._chunk_seconds.get(peer)
        most = min(RUN_MAX, max(1, int(RUN_SECONDS / pace))) if pace else FIRST_CHUNKS
        if run := self.plan.take(peer, most):
            return run
        now, ours = trio.current_time(), self._chunk_seconds.get(peer, 1.0)
        for victim in self.plan.at_work():
            is_slow = now - self._since.get(victim, now) > COPY_AFTER * ours
            if is_slow and (run := self.plan.copy(peer, victim)):
                return run
        return None

    async def _bring(self, peer: PeerId, run: Run) -> None:
        """Raises: AivillageError: the run did not come to its end; what came is kept and paid."""
        count, missing = run.end - run.first, self.plan.missing
        choice = await terms(self._trade, self._tab, self._draft.manifest, peer, missing, count)
        if choice.price_at_most > self._tab.left:
            raise RefusedError("what the ceiling leaves is reserved for others", code="BUSY")
        self._tab.reserved += choice.price_at_most
        call = self._calls[peer] = ChunkCall(
            job=self._job, trade=self._trade, choice=choice, draft=self._draft, run=run,
            number_from=self._tab.number, got=self._got,
        )  # fmt: skip
        self._since[peer] = trio.current_time()
        try:
            await call.bring()
        finally:
            del self._calls[peer]
            self._tab.reserved -= choice.price_at_most
            self._tab.spent += call.amount
            self._tab.attempts += 1
            if call.number:
                self._tab.sellers.append(peer)
                seconds = max(time.monotonic() - call.started, 1e-3) / call.number
                self._chunk_seconds[peer] = (self._chunk_seconds.get(peer, seconds) + seconds) / 2

    async def _failed(self, peer: PeerId, error: AivillageError, tries: int) -> None:
        """Waits where waiting helps; else the source is out, and only this one."""
        self._trade.market.forget_quote(peer, Work(NAME))
        self._trade.events.emit(
            "source_failed", job=self._job, peer=peer, code=error.code, reason=error.message
        )
        if error.code in WAITED_FOR and tries < TRIES_MAX:
            await trio.sleep(min(0.1 * 2**tries, 5.0))
            return
        self._excluded[peer] = error
        if isinstance(error, BadChunkError):
            await self._accuse(peer, self._job, error.message)
        elif error.code == "PEER_LOST":
            self._again_at[peer] = trio.current_time() + AGAIN_SECONDS
        what = "is gone" if error.code == "PEER_LOST" else f"is left out ({error.message})"
        self._tell(f"{peer[-8:]} {what}")

    # ------------------------------------------------------------------ what came
    def _got(self, peer: PeerId, index: int) -> None:
        self.plan.got(peer, index)
        self._since[peer] = trio.current_time()
        for source, call in self._calls.items():
            if not call.is_whole and not self.plan.wants(source):
                call.stop()  # others brought the rest of its run
        self._tell(f"from {len(self._calls)}")
        self._wake()

    def _tell(self, note: str) -> None:
        size_bytes = self._draft.manifest.size_bytes
        had_bytes = min(len(self.plan.had) * CHUNK_BYTES, size_bytes)
        self._say(messages.Progress(id=0, done=had_bytes, total=size_bytes, note=note))

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _pause(self, seconds: Seconds, *, until_done: bool = False) -> None:
        """For so long, or until something came; with `until_done` until nothing is missing."""
        with trio.move_on_after(max(seconds, 0.01)):
            await self._changed.wait()
            while until_done and self.plan.missing and self._working:
                await self._changed.wait()


async def terms(
    trade: Trade, tab: Tab, manifest: Manifest, peer: PeerId, missing: int, count: int = 1
) -> Choice:
    """What a source asks for `count` chunks, where the ceiling leaves enough for all `missing`.

    Raises:
        AivillageError: it refuses or is gone; PRICE_ABOVE_CEILING.
    """
    left = tab.ceiling - tab.spent
    need = Need(
        operation=NAME,
        request=pack(FetchRequest(cid=manifest.cid.hex(), count=1)),
        usage={UNIT: count},
        done={},
        budget=left,
        peer=peer,
    )
    choice = await trade.market.terms_of(peer, need)
    all_of_it = choice.quote.terms.prices_micro_credits.get(UNIT, 0) * missing
    if all_of_it > left:
        raise RequestError(
            f"{missing} MiB cost {as_credits(all_of_it)} credits there, your ceiling leaves "
            f"{as_credits(left)}",
            code="PRICE_ABOVE_CEILING",
            next_step="allow more with --max-price",
        )
    return choice


def require_patience(
    cid: bytes, excluded: dict[PeerId, AivillageError], alone: Seconds, most: Seconds
) -> None:
    """Returns while it makes sense to wait for a source, which nobody was for `alone` seconds.

    Raises:
        AivillageError: what those who are there said; NO_PEER, nobody came.
    """
    refusals = [error for error in excluded.values() if error.code != "PEER_LOST"]
    if refusals and alone > REFUSED_SECONDS:
        raise refusals[0]
    if alone > most:
        tried = "; ".join(f"{peer[-8:]}: {e.message}" for peer, e in [*excluded.items()][:4])
        raise RefusedError(
            f"no member here has blob {cid.hex()[:12]} now" + (f" ({tried})" if tried else ""),
            code="NO_PEER",
            next_step="fetch it again when one is back: what came is kept",
        )
