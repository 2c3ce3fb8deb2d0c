"""One stage of a split answer at one seller: a paid call that is fed, as its buyer sees it.

What is owed is what this side fed and got back: rows times layers, and tokens drawn, at the
quote's prices. Nothing is stored of the states; they are kept in memory by `chain.py`.
"""

from __future__ import annotations

import collections
import secrets
import time
from typing import Final, NamedTuple, TypeVar

import trio

from aivillage.models.inference import stages
from aivillage.models.inference.stages import StageInput, StageOutput, StageRequest
from aivillage.node.attempt import next_frame
from aivillage.node.gossip import send_or_drop
from aivillage.node.inbox import Inbox
from aivillage.node.market import Choice
from aivillage.node.pursuit import BLAMED, REJECTED, SETTLE_SECONDS
from aivillage.node.records import Work
from aivillage.node.trade import Trade
from aivillage.protocols import messages
from aivillage.protocols.codec import pack, unpack
from aivillage.protocols.errors import AivillageError, JobError, PeerError, RequestError
from aivillage.protocols.job import running_hash
from aivillage.protocols.messages import Finished, Frame
from aivillage.protocols.passing import PASSED_MINOR, Passing
from aivillage.protocols.pricing import price
from aivillage.protocols.types import AttemptId, JobId, MicroCredits, PeerId, Seconds

WINDOW: Final = 32
"""Inputs that may be unanswered at a seller, which holds 64: a long prompt waits here."""
START_SECONDS: Final[Seconds] = 60.0
"""To load some layers from a slow disk."""
OUTPUT_SECONDS: Final[Seconds] = 30.0
"""For the output of one input of at most 32 rows, its turn behind others included."""
QUIET_SECONDS: Final[Seconds] = 1.0
"""A stage of which nothing came for so long is asked for a sign of life: all others wait for it."""
END_SECONDS: Final[Seconds] = 2.0
SMALL_ROWS: Final = 4
"""Inputs of so few rows tell how fast a stage decodes."""
_SIGNS_OF_LIFE: Final = (messages.Accepted, messages.Started, messages.Progress)
_F = TypeVar("_F", messages.Started, messages.Part, Finished)


class OtherStatesError(JobError):
    """Two stages contradict each other: nobody knows which of them is right."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="CANCELLED")  # an end that is held against nobody


class _Sent(NamedTuple):
    """An input without an output. `hops`, `draws`: as its `Input` says them."""

    fed: StageInput
    seq: int
    rows: int
    at: Seconds
    is_passed: bool
    """The stage before says that it handed it over."""
    is_sent: bool
    """By us."""


class StageCall:
    """Opened, fed, and closed once. One task awaits at a time."""

    def __init__(
        self,
        job: JobId,
        choice: Choice,
        request: StageRequest,
        trade: Trade,
        ceiling: MicroCredits,
        passing: Passing,
    ) -> None:
        """`passing`: how stages hand their states on, where both sides know how to."""
        self.request = request
        is_able = choice.link.hello.minor >= PASSED_MINOR
        self.passing = passing if is_able else Passing()
        self.is_alone = not self.passing.fed_by
        """Nobody but this node feeds it."""
        self.has_passed = False
        """Its last output is with the next stage."""
        self.choice = choice
        self.amount: MicroCredits = 0
        self.kernel = ("", "")
        self.attempt = AttemptId(secrets.token_bytes(16))
        self._job = job
        self._trade = trade
        self._ceiling = ceiling
        self._call_id = choice.link.next_id()
        self._inbox: Inbox[Frame] | None = None
        self._out_hash = bytes(32)
        self._number = 0
        self._seq = 0
        self._used = (0, 0)
        self._sent: collections.deque[_Sent] = collections.deque()
        self._unsent: collections.deque[tuple[StageInput, int, int]] = collections.deque()
        self._decoded = (0, 0.0)
        self._is_over = False
        """The seller, or the loss of it, ended the call: nothing more of it comes."""

    @property
    def seller(self) -> PeerId:
        return self.choice.link.peer

    def price_of(self, rows: int, draws: int) -> MicroCredits:
        """Of so many rows here."""
        used = stages.used_by(rows, draws, self.request)
        return price(self.choice.quote.terms, stages.units(*used))

    async def open(self, deadline_seconds: Seconds, choice: bytes) -> None:
        """Calls, and returns once the layers are loaded there. `choice`: why here, in JSON.

        Raises:
            AivillageError: the seller refused, failed or is gone.
        """
        trade, link = self._trade, self.choice.link
        trade.jobs.begin_attempt(
            self.attempt, self._job, self.seller, quote=self.choice.envelope, choice=choice
        )
        inbox = self._inbox = link.open_inbox(self._call_id)
        trade.book.intend(self.seller, self.attempt, self.choice.quote_hash, self._ceiling)
        link.send(
            messages.Call(
                id=self._call_id,
                attempt=self.attempt,
                operation=stages.OPERATION,
                request=pack(self.request),
                quote_hash=self.choice.quote_hash,
                ceiling_micro_credits=0 if self.choice.is_free else self._ceiling,
                deadline_seconds=deadline_seconds,
                passing=self.passing,
            )
        )
        started = await self._await(inbox, messages.Started, START_SECONDS)
        self.kernel = (started.kernel_class, started.identical)

    def feed(self, fed: StageInput, hops: int = 0, draws: int = 0) -> None:
        """Queues one input. Raises: PeerError: PEER_LOST.

        `hops`: through how many more stages it goes without us, the last of which draws `draws`.
        """
        self._unsent.append((fed, hops, draws))
        self._send_more()

    def expect(self, fed: StageInput) -> None:
        """The stage before says that it handed this over: its output comes without our doing."""
        if self._unsent:  # in their order: what was handed over and is sent too is dropped there
            self.feed(fed)
        else:
            self._note_sent(fed, is_passed=True)

    async def next(self) -> StageOutput:
        """The output of the oldest input without one.

        Raises:
            PeerError: the seller is gone, or gave what cannot be an output.
            AivillageError: it refused to go on.
        """
        assert self._inbox is not None, "an open call has an inbox"
        part = await self._await(self._inbox, messages.Part, OUTPUT_SECONDS)
        sent = self._sent.popleft()
        self._fold(part)
        output = unpack(StageOutput, part.body)
        if sent.is_passed and not part.fed8:
            self.is_alone = True  # it took ours: what was handed over never came
        if part.fed8 and part.fed8 != stages.input_hash8(sent.fed):
            raise OtherStatesError("a stage was handed other states than we were shown")
        if fault := stages.output_fault(output, sent.rows, sent.fed.draws, self.request):
            raise PeerError(fault, code="BAD_REQUEST")
        self._count(sent.fed, sent.rows)
        self._measure(sent)
        self.has_passed = part.passed
        self._send_more()
        return output

    def _measure(self, sent: _Sent) -> None:
        """How fast it decodes. What was handed over left when we were shown it: one way less."""
        if sent.rows <= SMALL_ROWS and not self._sent:
            layers, seconds = self._decoded
            ways = 1 if sent.is_passed else 2
            spent = time.monotonic() - sent.at - ways * self.choice.link.rtt_seconds / 2
            self._decoded = layers + self.request.last - self.request.first, seconds + spent

    async def close(self, outcome: str) -> None:
        """Ends it and settles what came; `outcome` as of an attempt. Never raises."""
        with trio.CancelScope(shield=True, deadline=trio.current_time() + SETTLE_SECONDS):
            if self._inbox is not None:
                try:
                    if outcome == "done":
                        await self._finish(self._inbox)
                    elif not self._is_over:
                        send_or_drop(self.choice.link, messages.Cancel(id=self._call_id))
                        await self._drain(self._inbox)
                except AivillageError as error:
                    outcome = error.code if outcome == "done" else outcome
                self.choice.link.close_inbox(self._call_id)
            await self._settle(outcome)

    # ------------------------------------------------------------------ waiting
    async def _await(self, inbox: Inbox[Frame], kind: type[_F], seconds: Seconds) -> _F:
        """The next frame of `kind`; signs of life and acknowledgements are passed over."""
        deadline = trio.current_time() + seconds
        while trio.current_time() < deadline:
            frame = None
            with trio.move_on_after(QUIET_SECONDS):
                frame = await self._heard(inbox)
            if isinstance(frame, kind):
                return frame
            if frame is None:
                await self._probe()
                self._feed_what_was_passed()
            elif not isinstance(frame, _SIGNS_OF_LIFE):
                raise PeerError(f"{type(frame).__name__} in a stage's call", code="BAD_REQUEST")
        raise PeerError(f"no {kind.__name__.lower()} within {seconds:.0f} s", code="PEER_LOST")

    async def _heard(self, inbox: Inbox[Frame]) -> Frame:
        """Raises: AivillageError: how the seller ended it."""
        try:
            return await next_frame(inbox)
        except AivillageError:
            self._is_over = True
            raise

    async def _probe(self) -> None:
        """Raises: PeerError: PEER_LOST, it gives no sign of life."""
        wait = min(max(1.0, 20 * self.choice.link.rtt_seconds), 10.0)
        if not await self.choice.link.is_alive(wait):
            raise PeerError(f"no sign of life for {QUIET_SECONDS + wait:.0f} s", code="PEER_LOST")

    async def _drain(self, inbox: Inbox[Frame]) -> None:
        """Takes what it had computed before it heard of the end: that is paid too."""
        with trio.move_on_after(END_SECONDS):
            while True:
                frame = await next_frame(inbox)
                if isinstance(frame, messages.Part) and self._sent:
                    sent = self._sent.popleft()
                    self._fold(frame)
                    self._count(sent.fed, sent.rows)

    async def _finish(self, inbox: Inbox[Frame]) -> None:
        """Raises: PeerError: it counts something else than we do."""
        self.choice.link.send(messages.Input(id=self._call_id, seq=self._seq, end=True))
        finished = await self._await(inbox, Finished, END_SECONDS)
        out_hash = running_hash(self._out_hash, self.attempt, self._number, finished.result)
        if finished.usage != stages.units(*self._used) or finished.out_hash != out_hash:
            raise PeerError("the seller counts another usage than we do", code="BAD_REQUEST")
        self._out_hash = out_hash

    # ------------------------------------------------------------------ counting
    def _send_more(self) -> None:
        while self._unsent and len(self._sent) < WINDOW:
            fed, hops, draws = self._unsent.popleft()
            sent = self._note_sent(fed, is_passed=False)
            self._send(sent, hops, draws)

    def _note_sent(self, fed: StageInput, *, is_passed: bool) -> _Sent:
        rows = stages.rows_of(fed, self.request)
        sent = _Sent(fed, self._seq, rows, time.monotonic(), is_passed, is_sent=not is_passed)
        self._seq += 1
        self._sent.append(sent)
        return sent

    def _send(self, sent: _Sent, hops: int = 0, draws: int = 0) -> None:
        is_alone = self.is_alone and bool(self.passing.fed_by)
        self.choice.link.send(
            messages.Input(
                id=self._call_id, seq=sent.seq, body=pack(sent.fed), hops=hops, draws=draws,
                alone=is_alone,
            )
        )  # fmt: skip

    def _feed_what_was_passed(self) -> None:
        """It gives a sign of life and no output: perhaps what it was handed never came.

        What it has it drops; what it is slow with goes on being handed over.
        """
        for at, sent in enumerate(self._sent):
            if not sent.is_sent:
                self._sent[at] = sent._replace(is_sent=True)
                self._send(sent)

    def _fold(self, part: messages.Part) -> None:
        self._out_hash = running_hash(self._out_hash, self.attempt, self._number, part.body)
        if part.seq != self._number or part.hash8 != self._out_hash[:8]:
            raise PeerError("the running hash does not fit what came", code="BAD_REQUEST")
        self._number += 1

    def _count(self, fed: StageInput, rows: int) -> None:
        """Raises: RequestError: PRICE_ABOVE_CEILING."""
        more = stages.used_by(rows, fed.draws, self.request)
        self._used = self._used[0] + more[0], self._used[1] + more[1]
        amount = price(self.choice.quote.terms, stages.units(*self._used))
        if amount > self._ceiling:
            raise RequestError("the next input is above the ceiling", code="PRICE_ABOVE_CEILING")
        self.amount = amount
        self._trade.book.accept(self.seller, self.attempt, amount, self._out_hash)

    async def _settle(self, outcome: str) -> None:
        trade = self._trade
        try:
            if outcome in REJECTED:
                await trade.book.abandon(self.seller, self.attempt)
            else:
                await trade.book.settle(self.seller, self.attempt, self.amount, self._out_hash)
        except AivillageError as error:  # nothing is lost: SYNC claims it
            trade.events.emit(
                "settle_failed", level=40, job=self._job, peer=self.seller, reason=str(error)
            )
        trade.jobs.name_kernel(self.attempt, self.kernel)
        trade.jobs.end_attempt(self.attempt, self.amount, outcome)
        if outcome == "done" or outcome in BLAMED:
            self._rate(good=outcome == "done")

    def _rate(self, *, good: bool) -> None:
        record = self._trade.discovery.record_of(self.seller)
        record.rate(good=good)
        layers, seconds = self._decoded
        if good and layers and seconds > 0:
            work = Work(stages.OPERATION, self.request.model)
            record.measure(work, self.kernel[0], layers / seconds)
        self._trade.jobs.rate_peer(self.seller, record)
