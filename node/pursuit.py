"""One job of the owner's, from new to its end: one function a stage.

Legality is in protocols/job.py; finding a seller in market.py; one call in attempt.py.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Final

import msgspec
import trio

from aivillage.models import registry
from aivillage.models.inference.generate import GenerateResult, Piece, usage
from aivillage.node.attempt import Attempt, Output
from aivillage.node.discovery import Discovery
from aivillage.node.events import Events
from aivillage.node.jobs import JobRow, Jobs
from aivillage.node.market import Choice, Market, Need
from aivillage.node.workers import Workers
from aivillage.protocols import messages
from aivillage.protocols.codec import pack, unpack
from aivillage.protocols.errors import AivillageError, PeerError
from aivillage.protocols.job import JobEvent, State, step
from aivillage.protocols.messages import Call, Finished, Frame
from aivillage.protocols.ports import Book
from aivillage.protocols.pricing import Usage
from aivillage.protocols.types import AttemptId, MicroCredits, PeerId, Seconds

ATTEMPTS_MAX: Final = 8
BUSY_MAX: Final = 8
"""Half a minute of asking again, ever more slowly."""
DEADLINE_SECONDS: Final = 600.0
SETTLE_SECONDS: Final = 5.0

Say = Callable[[Frame], None]


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """One line for the person: who, what, how long, how much, why."""

    job: str
    operation: str
    sellers: tuple[PeerId, ...]
    usage: dict[str, int]
    seconds: Seconds
    price_micro_credits: MicroCredits
    attempts: int
    identical: str
    why: str


class Trade(msgspec.Struct, frozen=True):
    """What a job needs of the node."""

    jobs: Jobs
    book: Book
    market: Market
    discovery: Discovery
    workers: Workers
    events: Events
    attempts: dict[tuple[PeerId, int], Attempt]


class RejectedError(PeerError):
    """The verdict on a result failed: no final voucher, and nothing of it is kept."""


class Pursuit:
    """A job on its way. `say` shows it to whoever follows; nobody has to."""

    def __init__(self, row: JobRow, trade: Trade, say: Say) -> None:
        self.row = row
        self.say = say
        self.state: State = "new"
        self.output = Output()
        self.spent: MicroCredits = 0
        self.excluded: dict[PeerId, str] = {}
        self.result: bytes | None = None
        self._trade = trade
        self._is_engine = registry.is_served_by_engine(row.operation)
        self._sellers: list[PeerId] = []
        self._kernels: set[tuple[str, str]] = set()
        self._usage: Usage = {}
        self._why = ""
        self._attempts = 0
        self._busy = 0

    async def restore(self) -> None:
        """Picks up what was delivered before this node stopped."""
        await self._trade.jobs.interrupt_attempts(self.row.id)
        for attempt in await self._trade.jobs.attempts(self.row.id):
            self._attempts += 1
            self.spent += attempt.price
            if attempt.price:
                self._sellers.append(attempt.seller)
                self._kernels.add((attempt.kernel, attempt.identical))
        for body in await self._trade.jobs.delivered(self.row.id):
            if self._is_engine:
                self.output.add_piece(unpack(Piece, body))
            else:
                self.output.bodies.append(body)

    async def run(self) -> None:
        """To a settled result.

        Raises:
            AivillageError: nobody did it; what was delivered is paid.
        """
        self.move("seek")
        while self.result is None:
            choice = await self._trade.market.choose(await self._need(), self.excluded)
            self.move("call")
            try:
                await self._try(choice)
            except AivillageError as error:
                self.move("retry")
                await self._give_up_on(choice.link.peer, error)

    def receipt(self) -> Receipt:
        same = len(self._kernels) == 1 and {i for _, i in self._kernels} == {"guaranteed"}
        return Receipt(
            job=self.row.id,
            operation=self.row.operation,
            sellers=tuple(dict.fromkeys(self._sellers)),
            usage=dict(self._usage),
            seconds=round(time.time() - self.row.created, 3),
            price_micro_credits=self.spent,
            attempts=self._attempts,
            identical="guaranteed" if same else "best effort",
            why=self._why,
        )

    # ------------------------------------------------------------------ stages
    async def _need(self) -> Need:
        row = self.row
        estimate, _ = await self._trade.workers.estimate(row.operation, row.request)
        return Need(
            operation=row.operation,
            request=row.request,
            usage=estimate,
            done=self._meter(self.output),
            budget=row.ceiling - self.spent,
            peer=row.peer,
        )

    def _meter(self, output: Output) -> Usage:
        """Usage of what the job has so far; a module's parts are priced with its result."""
        return usage(output.read_bytes, len(output.ids)) if self._is_engine else {}

    async def _try(self, choice: Choice) -> None:
        """One attempt, to a checked result.

        Raises:
            AivillageError: this seller did not do it; what was accepted is settled.
        """
        attempt = Attempt(
            job=self.row.id,
            attempt=AttemptId(secrets.token_bytes(16)),
            choice=choice,
            output=self.output,
            done=self._meter(self.output),
            book=self._trade.book,
            jobs=self._trade.jobs,
            meter=self._meter,
            say=self.say,
            acknowledged=lambda: self.move("acknowledged"),
        )
        call = self._call(attempt)
        await self._trade.jobs.begin_attempt(attempt.attempt, self.row.id, attempt.seller)
        self._trade.attempts[attempt.seller, call.id] = attempt
        outcome = "stopped"
        try:
            finished = await attempt.run(call)
            await self._conclude(attempt, finished)
            outcome = "done"
        except AivillageError as error:
            outcome = "rejected" if isinstance(error, RejectedError) else error.code
            raise
        finally:
            del self._trade.attempts[attempt.seller, call.id]
            with trio.CancelScope(shield=True, deadline=trio.current_time() + SETTLE_SECONDS):
                await self._leave(attempt, call.id, outcome)

    def _call(self, attempt: Attempt) -> Call:
        row = self.row
        left = (row.deadline or DEADLINE_SECONDS) - (time.time() - row.created)
        return Call(
            id=attempt.choice.link.next_id(),
            attempt=attempt.attempt,
            operation=row.operation,
            request=row.request,
            quote_hash=attempt.choice.quote_hash,
            ceiling_micro_credits=row.ceiling - self.spent,
            deadline_seconds=max(1.0, left),
            delivered=self._delivered(),
            done=dict(attempt.done),
        )

    def _delivered(self) -> tuple[bytes, ...]:
        """What the seller goes on from: an engine needs the joined piece, a module its parts."""
        output = self.output
        if not self._is_engine:
            return tuple(output.bodies)
        if not output.ids:
            return ()
        return (pack(Piece(tuple(output.ids), "".join(output.text), output.read_bytes)),)

    async def _conclude(self, attempt: Attempt, finished: Finished) -> None:
        """Only a result that passes its check is settled.

        Raises:
            RejectedError: it did not pass.
        """
        self.move("finished")
        row, workers = self.row, self._trade.workers
        try:
            self._require_same(attempt, finished)
            verdict = await workers.check(row.operation, row.request, finished.result)
            if not verdict.ok:
                raise PeerError(f"the result is wrong: {verdict.reason}", code="BAD_REQUEST")
            counted = await workers.meter(row.operation, row.request, finished.result)
            attempt.bill(counted, finished)
        except AivillageError as error:
            raise RejectedError(error.message, code="BAD_REQUEST") from error
        self.move("passed")
        self.result, self._usage = finished.result, counted

    def _require_same(self, attempt: Attempt, finished: Finished) -> None:
        """The last word must be about what was accepted, piece by piece."""
        if finished.attempt != attempt.attempt:
            raise PeerError("the result names another attempt", code="BAD_REQUEST")
        if not self._is_engine:
            return
        result = unpack(GenerateResult, finished.result)
        if result.token_ids != tuple(self.output.ids) or finished.out_hash != attempt.out_hash:
            raise PeerError("the result is not what was streamed", code="BAD_REQUEST")

    async def _leave(self, attempt: Attempt, call_id: int, outcome: str) -> None:
        """Ends an attempt: a final item for what was accepted, except after a failed verdict."""
        if outcome != "done":
            attempt.stop(call_id)
        if attempt.amount and outcome != "rejected":
            await self._settle(attempt)
        self._attempts += outcome != "BUSY"
        self.spent += attempt.amount
        if attempt.amount:
            self._sellers.append(attempt.seller)
            self._kernels.add(attempt.kernel)
        self._why = attempt.choice.why
        if outcome == "rejected":
            self.output = Output()  # what a liar delivered is no base to go on from
        if outcome not in {"stopped", "BUSY", "QUOTE_EXPIRED"}:
            self._rate(attempt, outcome)
        # Last, since a full disk keeps these waiting until the caller's patience ends.
        if outcome == "rejected":
            await self._trade.jobs.forget_delivered(self.row.id)
        await self._trade.jobs.end_attempt(attempt.attempt, attempt.amount, outcome)

    async def _settle(self, attempt: Attempt) -> None:
        """A book that cannot be written loses nothing: the seller claims it at the next SYNC."""
        try:
            await self._trade.book.settle(
                attempt.seller, attempt.attempt, attempt.amount, attempt.out_hash
            )
        except AivillageError as error:
            self._trade.events.emit(
                "settle_failed", level=40, job=self.row.id, peer=attempt.seller, reason=str(error)
            )

    def _rate(self, attempt: Attempt, outcome: str) -> None:
        record = self._trade.discovery.records.get(attempt.seller)
        made = sum(self._meter(self.output).values()) - sum(attempt.done.values())
        seconds = max(time.monotonic() - attempt.started, 1e-3)
        if record is not None:
            record.rate(good=outcome == "done", units_per_second=made / seconds)

    async def _give_up_on(self, peer: PeerId, error: AivillageError) -> None:
        """Excludes a seller from this job, or waits where it is only busy.

        Raises:
            AivillageError: `error`, after too many tries.
        """
        trade = self._trade
        trade.market.forget_quote(peer, self.row.operation)
        trade.events.emit(
            "attempt_failed", job=self.row.id, peer=peer, code=error.code, reason=error.message
        )
        if self._attempts >= ATTEMPTS_MAX or self._busy >= BUSY_MAX:
            raise error
        if error.code in {"BUSY", "QUOTE_EXPIRED"}:
            self._busy += 1
            await trio.sleep(min(0.1 * 2**self._busy, 10.0) if error.code == "BUSY" else 0)
            return
        if error.code == "PEER_LOST":
            trade.discovery.unreachable(peer)
        self.excluded[peer] = error.message
        note = f"{peer[-8:]} failed ({error.message}); going on elsewhere"
        self.say(messages.Progress(id=0, done=0, note=note))

    def move(self, event: JobEvent) -> None:
        """In memory: a restarted job begins anew, whatever it was doing."""
        self.state = step(self.state, event)
