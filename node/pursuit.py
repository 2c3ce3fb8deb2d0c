"""One job of the owner's, from new to its end: one function a stage.

Legality is in protocols/job.py; finding a seller in market.py; one call in attempt.py.
"""

from __future__ import annotations

import secrets
import time
from contextlib import nullcontext
from typing import Final

import msgspec
import trio

from aivillage.models import registry
from aivillage.models.inference.generate import Piece, usage
from aivillage.node.attempt import Attempt, Output
from aivillage.node.choice import Explanation
from aivillage.node.jobs import JobRow
from aivillage.node.link import Link
from aivillage.node.market import Choice, Here, Need
from aivillage.node.part_meter import PartMeter
from aivillage.node.pricelist import listed_by
from aivillage.node.records import work_of
from aivillage.node.stage_peers import may_be_split
from aivillage.node.stand_by import StandBy
from aivillage.node.trade import DoubtfulError, Receipt, RejectedError, Say, Trade, Verify
from aivillage.node.verdict import require_ok, require_same
from aivillage.node.verifier import Share
from aivillage.protocols import messages
from aivillage.protocols.codec import pack, unpack
from aivillage.protocols.errors import (
    AivillageError,
    PeerError,
    RequestError,
)
from aivillage.protocols.job import JobEvent, State, step
from aivillage.protocols.messages import Call, Finished
from aivillage.protocols.pricing import Usage, price_of_rest
from aivillage.protocols.types import AttemptId, MicroCredits, PeerId, Seconds

ATTEMPTS_MAX: Final = 8
BUSY_MAX: Final = 8
"""Half a minute of asking again, ever more slowly."""
RETRY_SECONDS_MAX: Final = 10.0
"""Of the wait that a busy seller names, before we look again whether another one has room."""
CREDIT_WAITS_SECONDS: Final = (0.5, 1.0, 2.0)
"""Where all that can do it want to be paid first, what we signed may be on its way."""
DEADLINE_SECONDS: Final = 600.0
SETTLE_SECONDS: Final = 5.0
BLAMED: Final = frozenset(
    {"rejected", "late", "PEER_LOST", "BAD_REQUEST", "JOB_FAILED", "DEADLINE", "INTERNAL"}
)
"""Ends of an attempt that count against the seller; an honest refusal does not."""
REJECTED: Final = frozenset({"rejected", "doubtful"})
"""Ends after a failed verdict."""


class Pursuit:
    """A job on its way. `say` shows it to whoever follows; nobody has to."""

    def __init__(self, row: JobRow, trade: Trade, say: Say) -> None:
        self.row = row
        self.say = say
        self.state: State = "new"
        self.output = Output()
        self.spent: MicroCredits = 0
        self.excluded: dict[PeerId, AivillageError] = {}
        self.result: bytes | None = None
        self.here: Explanation | None = None
        self.is_split = False
        """Nobody has the whole model: peers that have layers of it do it together."""
        self.verify: Verify | None = None
        """Done before anybody gets the result, where its owner asked for that."""
        self.stand_by: StandBy | None = None
        """Has another seller load the model, where its owner asked for that."""
        self.draft = ""
        """Which model guesses where the answer is split; empty: one that is loaded anyhow."""
        self.checked = ""
        self.is_kept = False
        """Its result is stored: a restart has only to end it."""
        self.maker: Share | None = None
        """Of a module's whole result, where one attempt was enough."""
        self._trade = trade
        self._is_engine = registry.is_served_by_engine(row.operation)
        self._sellers: list[PeerId] = []
        self._stopped_by: set[PeerId] = set()
        self._kernels: set[tuple[str, str]] = set()
        self._usage: Usage = {}
        self._why = ""
        self._attempts = 0
        self._busy = 0
        self._credit_waits = 0
        self._started = time.monotonic()

    async def restore(self) -> None:
        """Picks up what was delivered before this node stopped."""
        jobs, row = self._trade.jobs, self.row
        for attempt in await jobs.attempts(row.id):
            self._attempts += attempt.outcome != "BUSY"
            self.spent += attempt.price
            if attempt.price or attempt.kernel or attempt.outcome == "done":
                self._sellers.append(attempt.seller)
                self._kernels.add((attempt.kernel, attempt.identical))
            if not attempt.outcome:
                jobs.end_attempt(AttemptId(attempt.id), attempt.price, "stopped")
        if row.state == "settling" and row.result is not None:
            self.state, self.result, self.is_kept = "settling", row.result, True
            self._usage = await self._trade.workers.meter(row.operation, row.request, row.result)
            return
        for body in await jobs.delivered(row.id):
            if self._is_engine:
                self.output.add_piece(unpack(Piece, body))
            else:
                self.output.bodies.append(body)
        self._forget_reading()

    async def run(self) -> None:
        """To a settled result, or with nothing done to the choice of this machine, or of many.

        Raises:
            AivillageError: nobody did it; what was delivered is paid.
        """
        self.move("seek")
        while self.result is None:
            need = await self._need()
            choice = await self._choose(need)
            if self.is_split:
                return
            if choice is None:
                continue
            if isinstance(choice, Here):
                self.here = choice.explain()
                return
            self.move("call")
            try:
                await self._try(choice, need)
            except AivillageError as error:
                if self.result is not None:
                    return  # whatever failed came after the verdict
                self.move("retry")
                await self._give_up_on(choice.link, error)

    def seconds_left(self) -> Seconds:
        """Of the owner's deadline, which began with the job, or of ours, which begins anew."""
        if self.row.deadline is None:
            return DEADLINE_SECONDS - (time.monotonic() - self._started)
        return self.row.deadline - (time.time() - self.row.created)

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
            checked=self.checked,
        )

    # ------------------------------------------------------------------ stages
    async def _need(self) -> Need:
        row = self.row
        estimate, seconds = await self._trade.workers.estimate(row.operation, row.request)
        is_begun = self._attempts > 0 or bool(self.output.bodies)
        return Need(
            operation=row.operation,
            request=row.request,
            usage=estimate,
            done=self._meter(self.output),
            budget=row.ceiling - self.spent,
            seconds=seconds,
            peer=row.peer,
            prefer=row.prefer or "balanced",
            may_stay=not (row.mesh or row.peer or row.parent or is_begun),
            is_patient=not (row.is_check or self._can_split()),
        )

    async def _choose(self, need: Need) -> Choice | Here | None:
        """The best seller; None: look again, since something was done about the refusals.

        Raises:
            AivillageError: nobody does it.
        """
        if self.stand_by and (ready := await self.stand_by.choice(need, self.excluded)):
            return ready
        try:
            return await self._trade.market.choose(need, self.excluded)
        except AivillageError as error:
            self.is_split = error.code == "NO_PEER" and self._can_split()
            if self.is_split:
                return None
            if self.output.ids and self._readmit("OWNER_LIMIT"):
                await self._begin_anew()  # whoever reads no more for nothing is paid for all of it
                return None
            owing = self._readmit("INSUFFICIENT_CREDITS") or error.code == "INSUFFICIENT_CREDITS"
            if not owing or self._credit_waits >= len(CREDIT_WAITS_SECONDS):
                raise
            self.say(messages.Progress(id=0, done=0, note="waiting for credit"))
            await trio.sleep(CREDIT_WAITS_SECONDS[self._credit_waits])
            self._credit_waits += 1
            return None

    def _can_split(self) -> bool:
        """Whether peers hold the model together now; an answer that is begun is not taken apart."""
        if not self._is_engine or self.row.peer or self.output.bodies:
            return False
        model = work_of(self.row.operation, self.row.request).model
        return may_be_split(self._trade, model)

    def _readmit(self, code: str) -> bool:
        """Lets in again who refused for this reason; whether anybody did.

        Not whose owner ended it midway: that was no refusal to read for nothing.
        """
        kept = {
            peer: error
            for peer, error in self.excluded.items()
            if error.code != code or peer in self._stopped_by
        }
        found, self.excluded = len(kept) < len(self.excluded), kept
        return found

    async def _begin_anew(self) -> None:
        """Nothing is had any more; what was paid for it is spent."""
        self.output = Output()
        self._kernels.clear()
        await self._trade.jobs.forget_delivered(self.row.id)

    def _forget_reading(self) -> None:
        """A seller that gave no token may not have read either: the next one is paid for it."""
        if not self.output.ids:
            self.output.read_bytes = 0

    def _meter(self, output: Output) -> Usage:
        """Usage of what the job has so far; most modules' parts are priced with their result."""
        if self._is_engine:
            return usage(output.read_bytes, len(output.ids))
        return PartMeter(self.row.operation, self.row.request, output.bodies).usage

    async def _try(self, choice: Choice, need: Need) -> None:
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
            most=need.usage,
            expected=need.seconds,
            book=self._trade.book,
            jobs=self._trade.jobs,
            say=self.say,
            acknowledged=lambda: self._acknowledged(need, choice),
            is_other_there=lambda: self._trade.market.has_other(
                need, {choice.link.peer, *self.excluded}
            ),
        )
        call = self._call(attempt)
        self._trade.attempts[choice.link, call.id] = attempt
        outcome = "stopped"
        try:
            finished = await attempt.run(call, lambda: self._called(attempt))
            await self._conclude(attempt, finished, continued=bool(call.delivered))
            outcome = "done"
        except AivillageError as error:
            outcome = _outcome_of(error)
            raise
        finally:
            if self.result is not None:
                outcome = "done"
            with _grace(attempt, outcome):
                await attempt.leave(
                    call.id, stopped=outcome == "stopped", finished=outcome == "done"
                )
            self._trade.attempts.end(choice.link, call.id, had_place=outcome != "BUSY")
            if outcome == "stopped" and self._overtook(attempt):
                outcome = "late"
            with _grace(attempt, outcome):
                await self._leave(attempt, outcome)

    def _called(self, attempt: Attempt) -> None:
        """The call is on its way: time to write down that there is one, and why there."""
        choice = attempt.choice
        self._trade.jobs.begin_attempt(
            attempt.attempt, self.row.id, attempt.seller, quote=choice.envelope, done=attempt.done,
            choice=msgspec.json.encode(choice.explain()),
        )  # fmt: skip

    def _acknowledged(self, need: Need, choice: Choice) -> None:
        self.move("acknowledged")
        if self.stand_by:
            self.stand_by.prepare(need, choice.link.peer, self.excluded)

    def _overtook(self, attempt: Attempt) -> bool:
        """Whether the job's deadline passed while the seller took longer than it had said."""
        return self.state == "working" and self.seconds_left() <= 0 and attempt.is_late

    def _call(self, attempt: Attempt) -> Call:
        row = self.row
        return Call(
            id=attempt.choice.link.next_id(),
            attempt=attempt.attempt,
            operation=row.operation,
            request=row.request,
            quote_hash=attempt.choice.quote_hash,
            ceiling_micro_credits=0 if attempt.choice.is_free else row.ceiling - self.spent,
            deadline_seconds=max(1.0, self.seconds_left()),
            delivered=self._delivered(),
            done=dict(attempt.done),
            fingerprints=self._is_engine,
        )

    def _delivered(self) -> tuple[bytes, ...]:
        """What the seller goes on from: an engine needs the joined piece, a module its parts."""
        output = self.output
        if not self._is_engine:
            return tuple(output.bodies)
        if not output.ids:
            return ()
        return (pack(output.whole()),)

    async def _conclude(self, attempt: Attempt, finished: Finished, *, continued: bool) -> None:
        """Only a result that passes its check is settled.

        Raises:
            RejectedError: it did not pass.
            DoubtfulError: nor did it, and it goes on from what another seller made.
        """
        self.move("finished")
        row, workers = self.row, self._trade.workers
        try:
            require_same(row.operation, attempt, finished)
            await require_ok(self._trade, row, finished.result, continued=continued)
            counted = await workers.meter(row.operation, row.request, finished.result)
            attempt.bill(counted, finished)
            if self.verify is not None:
                self.checked = await self.verify(row, finished.result, attempt.seller)
        except RejectedError:
            raise
        except (PeerError, RequestError) as error:
            raise RejectedError(error.message, code="BAD_REQUEST") from error
        # One step without an await: no cancel or deadline comes between verdict and result.
        self.move("passed")
        self.result, self._usage = finished.result, counted
        settling = msgspec.structs.replace(row, state=self.state, result=finished.result)
        await self._trade.jobs.passed(settling, attempt.row("done"))
        self.is_kept = True

    async def _leave(self, attempt: Attempt, outcome: str) -> None:
        """Ends an attempt: a final item for what was accepted, except after a failed verdict."""
        self._attempts += outcome != "BUSY"
        self.spent += attempt.amount
        if attempt.delivered_something or outcome == "done":
            self._sellers.append(attempt.seller)
            self._kernels.add(attempt.kernel)
        self._why = attempt.choice.why
        is_whole = not (self._is_engine or self.output.bodies)
        if outcome == "done" and self._attempts == 1 and is_whole:
            self.maker = attempt.share
        if attempt.delivered_something and outcome == "OWNER_LIMIT":
            self._stopped_by.add(attempt.seller)
        await self._pay(attempt, owed=outcome not in REJECTED)
        if attempt.choice.is_free and outcome not in REJECTED:
            await self._note_favour(attempt)
        if outcome in REJECTED:
            await self._begin_anew()  # what a liar delivered is no base to go on from
        elif outcome != "done":
            self._forget_reading()
        self._trade.jobs.end_attempt(attempt.attempt, attempt.amount, outcome)
        if outcome == "done" or outcome in BLAMED:
            self._rate(attempt, outcome)

    async def _pay(self, attempt: Attempt, *, owed: bool) -> None:
        """The final item, or after a failed verdict the end of what could be claimed.

        Nobody waits for the voucher: until it goes out, with those of other jobs, the seller's
        exposure covers it, as it covered the work. A book that cannot be written loses nothing:
        the seller claims it at the next SYNC.
        """
        book, peer = self._trade.book, attempt.seller
        try:
            if owed:
                due = (attempt.attempt, attempt.amount, attempt.out_hash)
                book.settle_soon(peer, *due, lambda error: self._not_paid(peer, error))
            else:
                await book.abandon(peer, attempt.attempt)
        except AivillageError as error:
            self._not_paid(peer, error)

    def _not_paid(self, peer: PeerId, error: AivillageError) -> None:
        self._trade.events.emit(
            "settle_failed", level=40, job=self.row.id, peer=peer, reason=str(error)
        )

    async def _note_favour(self, attempt: Attempt) -> None:
        """What was done for nothing, at the default prices: the seller counts the same."""
        terms = listed_by(attempt.choice.quote, self._trade.workers.describe(self.row.operation))
        had = self._meter(self.output) if self.result is None else self._usage
        worth = price_of_rest(terms, had, attempt.done)
        try:
            if worth:
                await self._trade.book.favour(attempt.seller, attempt.attempt, worth, mine=True)
        except AivillageError as error:
            self._trade.events.emit(
                "favour_not_noted", level=30, peer=attempt.seller, reason=str(error)
            )

    def _rate(self, attempt: Attempt, outcome: str) -> None:
        """What we saw of a seller, kept over restarts; never what it says of itself."""
        record = self._trade.discovery.record_of(attempt.seller)
        record.rate(good=outcome == "done")
        if outcome == "done":
            made = sum(self._usage.values()) - sum(attempt.done.values())
            seconds = max(time.monotonic() - attempt.started, 1e-3)
            work = work_of(self.row.operation, self.row.request)
            record.measure(work, attempt.kernel[0], made / seconds)
            self._trade.jobs.rate_peer_seldom(attempt.seller, record)
        else:
            self._trade.jobs.rate_peer(attempt.seller, record)

    def _note_failure(self, peer: PeerId, error: AivillageError) -> None:
        """A quote that did not lead to a result is not used again, unless it was only too soon."""
        if error.code != "BUSY":
            work = work_of(self.row.operation, self.row.request)
            self._trade.market.forget_quote(peer, work)
        self._trade.events.emit(
            "attempt_failed", job=self.row.id, peer=peer, code=error.code, reason=error.message
        )

    async def _give_up_on(self, link: Link, error: AivillageError) -> None:
        """Excludes a seller from this job, or waits where it is only busy.

        Raises:
            AivillageError: `error`, after too many tries.
        """
        trade, peer = self._trade, link.peer
        self._note_failure(peer, error)
        if self._attempts >= ATTEMPTS_MAX or self._busy >= BUSY_MAX:
            raise error
        if isinstance(error, DoubtfulError):
            return  # it may be the one that was right
        if error.code == "TOO_LARGE" and self._delivered():
            await self._begin_anew()  # what is had does not fit a call: done again, it need not
            return
        if error.code in {"BUSY", "QUOTE_EXPIRED"}:
            await self._wait_for_place(peer, error)
            return
        if error.code == "PEER_LOST" and trade.market.is_back(link):
            return  # while we settled with it
        if error.code == "PEER_LOST":
            trade.discovery.unreachable(peer)
        self.excluded[peer] = error
        what = "is gone" if error.code == "PEER_LOST" else f"failed ({error.message})"
        note = f"{peer[-8:]} {what}; going on elsewhere"
        self.say(messages.Progress(id=0, done=0, note=note))

    async def _wait_for_place(self, peer: PeerId, error: AivillageError) -> None:
        """Until a job of ours ends there, or as long as it said; else ever longer, not for ever."""
        told = min(error.retry_after_seconds, RETRY_SECONDS_MAX)
        with trio.move_on_after(max(told, min(0.2 * 2**self._busy, 10.0))):
            if error.code == "BUSY":
                await self._trade.attempts.one_ends(peer)
                return
        work = work_of(self.row.operation, self.row.request)
        self._trade.market.forget_quote(peer, work)
        self._busy += 1

    def move(self, event: JobEvent) -> None:
        """In memory: a restarted job begins anew, whatever it was doing."""
        self.state = step(self.state, event)


def _grace(attempt: Attempt, outcome: str) -> trio.CancelScope | nullcontext[None]:
    """For what an ended attempt still waits for, whoever loses patience; mostly nothing."""
    if outcome == "done" and attempt.is_stored and not attempt.choice.is_free:
        return nullcontext()
    return trio.CancelScope(shield=True, deadline=trio.current_time() + SETTLE_SECONDS)


def _outcome_of(error: AivillageError) -> str:
    if isinstance(error, RejectedError):
        return "doubtful" if isinstance(error, DoubtfulError) else "rejected"
    return error.code
