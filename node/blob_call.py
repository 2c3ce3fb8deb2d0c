"""One call for a run of chunks at one source: each is checked when it is whole, kept, then owed.

The money goes the way of every attempt: intent, acceptance by what is stored, a final item.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Final

import trio

from aivillage.models.mesh.fetch import NAME, UNIT, FetchRequest, Kept
from aivillage.node.attempt import frame_by
from aivillage.node.blob_draft import Draft
from aivillage.node.blob_plan import Run
from aivillage.node.gossip import send_or_drop
from aivillage.node.inbox import Inbox
from aivillage.node.market import Choice
from aivillage.node.pricelist import listed
from aivillage.node.pursuit import BLAMED
from aivillage.node.records import Work
from aivillage.node.trade import Trade
from aivillage.protocols import messages
from aivillage.protocols.codec import pack
from aivillage.protocols.errors import AivillageError, PeerError
from aivillage.protocols.job import running_hash
from aivillage.protocols.messages import Call, Finished, Frame, Part, Progress
from aivillage.protocols.pricing import price
from aivillage.protocols.types import AttemptId, JobId, MicroCredits, PeerId, Seconds

QUIET_SECONDS: Final = 2.0
"""A source of which nothing came for so long is asked for a sign of life."""
SILENT_SECONDS: Final = 30.0
"""No chunk and no word for so long: it is left, though it lives."""
PROGRESS_SECONDS_MAX: Final = 300.0
"""Words without a chunk hold it for so long at most."""
DRAIN_SECONDS: Final = 3.0
"""A source that is no longer needed has this long to end its chunk, which is paid."""
CALL_SECONDS: Final = 600.0
SETTLE_SECONDS: Final = 5.0


class BadChunkError(PeerError):
    """A source sent what the hash that it vouched for is not of."""


class ChunkCall:
    """Brings `run` of a blob into `draft`; `got` hears of each chunk that is there."""

    def __init__(
        self,
        *,
        job: JobId,
        trade: Trade,
        choice: Choice,
        draft: Draft,
        run: Run,
        number_from: Callable[[], int],
        got: Callable[[PeerId, int], None],
    ) -> None:
        """`number_from`: a fresh number within the job for each chunk that is paid."""
        self.attempt = AttemptId(secrets.token_bytes(16))
        self.amount: MicroCredits = 0
        self.number = 0
        """Chunks that came so far."""
        self.started = time.monotonic()
        self._job = job
        self._trade = trade
        self._choice = choice
        self._draft = draft
        self._run = run
        self._number_from = number_from
        self._got = got
        self._link = choice.link
        self._id = choice.link.next_id()
        self._out_hash = bytes(32)
        self._buffer = bytearray()
        self._pieces = 0
        self._unstored = 0
        self._all_stored = trio.Event()
        self._scope = trio.CancelScope()

    @property
    def seller(self) -> PeerId:
        return self._link.peer

    @property
    def is_whole(self) -> bool:
        """Whether all of its chunks came."""
        return self.number == self._run.end - self._run.first

    def stop(self) -> None:
        """What it still brings is not needed; what it brought is paid."""
        self._scope.cancel()

    async def bring(self) -> None:
        """To the source's last word, or to `stop`.

        Raises:
            BadChunkError: a chunk is not what its hash says.
            AivillageError: why it ended before; what came is paid.
        """
        trade, outcome = self._trade, "stopped"
        trade.jobs.begin_attempt(self.attempt, self._job, self.seller, quote=self._choice.envelope)
        inbox = self._link.open_inbox(self._id)
        try:
            with self._scope:
                trade.book.intend(
                    self.seller, self.attempt, self._choice.quote_hash, self._choice.price_at_most
                )
                self._link.send(self._call())
                await self._follow(inbox)
                outcome = "done"
        except AivillageError as error:
            outcome = "rejected" if isinstance(error, BadChunkError) else error.code
            raise
        finally:
            deadline = trio.current_time() + DRAIN_SECONDS + SETTLE_SECONDS
            with trio.CancelScope(shield=True, deadline=deadline):
                await self._leave(inbox, outcome)

    def _call(self) -> Call:
        first, end = self._run
        request = FetchRequest(cid=self._draft.manifest.cid.hex(), first=first, count=end - first)
        return Call(
            id=self._id,
            attempt=self.attempt,
            operation=NAME,
            request=pack(request),
            quote_hash=self._choice.quote_hash,
            ceiling_micro_credits=self._choice.price_at_most,
            deadline_seconds=CALL_SECONDS,
        )

    # ------------------------------------------------------------------ what comes
    async def _follow(self, inbox: Inbox[Frame]) -> None:
        worked_at = trio.current_time()
        while True:
            frame = await self._next(inbox, worked_at + PROGRESS_SECONDS_MAX)
            if isinstance(frame, Part):
                worked_at = trio.current_time()
                await self._take(frame)
            elif isinstance(frame, Finished):
                self._require_end(frame)
                return
            elif not isinstance(frame, messages.Accepted | Progress):
                raise PeerError(f"{type(frame).__name__} in a fetch", code="BAD_REQUEST")

    async def _next(self, inbox: Inbox[Frame], last: Seconds) -> Frame:
        """Raises: PeerError: PEER_LOST, it is silent for too long."""
        silent = trio.current_time() + SILENT_SECONDS
        while trio.current_time() < min(silent, last):
            frame = await frame_by(inbox, trio.current_time() + QUIET_SECONDS)
            if frame is not None:
                return frame
            patience = min(max(2 + 20 * self._link.rtt_seconds, 2), SILENT_SECONDS)
            if not await self._link.is_alive(patience):
                raise PeerError("no sign of life", code="PEER_LOST")
        raise PeerError("it brings nothing", code="PEER_LOST")

    async def _take(self, part: Part) -> None:
        """A piece of the chunk that is its turn.

        Raises:
            PeerError: BAD_REQUEST, it is none.
        """
        index = self._run.first + self.number
        if self.is_whole or part.seq != self._pieces or not part.body:
            raise PeerError("pieces out of order", code="BAD_REQUEST")
        self._pieces += 1
        self._buffer += part.body
        size_bytes = self._draft.manifest.size_of(index)
        if len(self._buffer) > size_bytes:
            raise PeerError("more than a chunk came for one", code="BAD_REQUEST")
        if len(self._buffer) == size_bytes:
            await self._take_chunk(index, part.hash8)

    async def _take_chunk(self, index: int, hash8: bytes) -> None:
        body, self._buffer, self._pieces = self._buffer, bytearray(), 0
        name = self._draft.manifest.hash_of(index)
        out_hash = running_hash(self._out_hash, self.attempt, self.number, name)
        if out_hash[:8] != hash8:
            raise PeerError("the running hash does not fit what came", code="BAD_REQUEST")
        if not await trio.to_thread.run_sync(self._draft.write, index, body):
            raise BadChunkError(f"chunk {index} is not what its hash says", code="BAD_REQUEST")
        self._out_hash, self.number = out_hash, self.number + 1
        self._keep(index)
        self._got(self.seller, index)

    def _keep(self, index: int) -> None:
        """Notes a chunk that is in the draft; only then is it accepted, and owed."""
        self._unstored += 1
        out_hash = self._out_hash
        amount = price(self._choice.quote.terms, {UNIT: self.number})

        def durable() -> None:
            self._unstored -= 1
            self.amount = max(self.amount, amount)
            try:
                self._trade.book.accept(self.seller, self.attempt, self.amount, out_hash)
            finally:
                if not self._unstored:
                    self._all_stored.set()

        place = self._job, self._number_from(), self.attempt
        self._trade.jobs.keep(place, pack(Kept(index)), amount, ("", ""), durable)

    def _require_end(self, finished: Finished) -> None:
        """The last word must be about what came, and count what we count."""
        counted = {UNIT: self._run.end - self._run.first}
        if not self.is_whole or finished.out_hash != self._out_hash or finished.usage != counted:
            raise PeerError("the source's last word is not about what came", code="BAD_REQUEST")

    # ------------------------------------------------------------------ its end
    async def _leave(self, inbox: Inbox[Frame], outcome: str) -> None:
        """Nothing is accepted after this; what was accepted is paid."""
        if outcome != "done":
            send_or_drop(self._link, messages.Cancel(id=self._id))
        if outcome == "stopped":
            with trio.move_on_after(DRAIN_SECONDS):
                await self._drain(inbox)
        self._link.close_inbox(self._id)
        while self._unstored:
            self._all_stored = trio.Event()
            await self._all_stored.wait()
        await self._pay()
        self._trade.jobs.end_attempt(self.attempt, self.amount, outcome)
        if outcome == "done" or outcome in BLAMED:
            self._rate(good=outcome == "done")

    async def _drain(self, inbox: Inbox[Frame]) -> None:
        """Returns at the source's last word; the chunk that it was at is taken."""
        try:
            await self._follow(inbox)
        except AivillageError:
            return  # it said that it stopped, or is gone

    async def _pay(self) -> None:
        """The final item. A book that cannot be written loses nothing: SYNC claims it."""
        book, peer, trade = self._trade.book, self.seller, self._trade
        try:
            await book.settle(peer, self.attempt, self.amount, self._out_hash)
            if self._choice.is_free and self.number:
                terms = listed(trade.workers.describe(NAME))
                worth = price(terms, {UNIT: self.number})
                await book.favour(peer, self.attempt, worth, mine=True)
        except AivillageError as error:
            trade.events.emit("settle_failed", level=40, peer=peer, reason=str(error))

    def _rate(self, *, good: bool) -> None:
        record = self._trade.discovery.record_of(self.seller)
        record.rate(good=good)
        if good:
            seconds = max(time.monotonic() - self.started, 1e-3)
            record.measure(Work(NAME), "", self.number / seconds)
        self._trade.jobs.rate_peer(self.seller, record)
