"""One try at one seller, as the buyer sees it: accept in order, store, then count as owed.

The buyer pays its own meter, never the seller's word: what it accepted, at the quote's prices.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import msgspec
import trio

from aivillage.models import registry
from aivillage.models.inference import logprobs
from aivillage.models.inference.fingerprint import require_span
from aivillage.models.inference.generate import (
    GenerateRequest,
    GenerateResult,
    Piece,
    joined,
)
from aivillage.models.inference.generate import usage as units
from aivillage.node.gossip import send_or_drop
from aivillage.node.inbox import Inbox
from aivillage.node.jobs import AttemptRow, Jobs
from aivillage.node.link import as_error
from aivillage.node.market import Choice
from aivillage.node.module_runs import EVENT_BYTES_MIN, RUN_BYTES_MAX
from aivillage.node.part_meter import PartMeter
from aivillage.node.verifier import Share
from aivillage.protocols import messages
from aivillage.protocols.codec import pack, unpack
from aivillage.protocols.errors import AivillageError, JobError, PeerError, RequestError
from aivillage.protocols.job import running_hash, token_bytes
from aivillage.protocols.messages import (
    Accepted,
    Call,
    Finished,
    Frame,
    Part,
    Progress,
    Started,
    StepItem,
)
from aivillage.protocols.ports import Book
from aivillage.protocols.pricing import Usage, price_of_rest
from aivillage.protocols.types import AttemptId, JobId, MicroCredits, PeerId, Seconds

WORK_SLACK_SECONDS: Final = 10.0
WORK_SECONDS_MAX: Final = 600.0
"""Of what a seller quotes, no more than this and no more than our own estimate is waited for."""
PROGRESS_SECONDS_MAX: Final = 300.0
"""Signs of life put the deadline off for so long at most; then work must come, or it is over."""
QUIET_SECONDS: Final = 2.0
"""A seller of which nothing came for so long is asked for a sign of life, where another one is at
hand: a cut cable or a closed lid tells nobody. It has as long as for an acknowledgement."""
DRAIN_SECONDS: Final = 1.0
"""A cancelled seller has this long to say that it stopped; what it delivered until then is paid."""


class Output(msgspec.Struct):
    """What a job has so far, over all attempts. `bodies` are the parts, as stored."""

    bodies: list[bytes] = []
    ids: list[int] = []
    text: list[str] = []
    logprobs: list[bytes] = []
    read_bytes: int = 0

    def add_piece(self, piece: Piece) -> bytes:
        body = pack(piece)
        self.bodies.append(body)
        self.ids += piece.token_ids
        self.text.append(piece.text)
        self.logprobs.append(piece.logprobs)
        self.read_bytes = max(self.read_bytes, piece.read_bytes)
        return body

    def whole(self) -> Piece:
        """All of it as one piece, which another engine can go on from."""
        said = b"".join(self.logprobs)
        return Piece(tuple(self.ids), "".join(self.text), self.read_bytes, logprobs=said)

    def result(self, request: GenerateRequest, finished: str) -> GenerateResult:
        """Of an answer that is whole."""
        return joined(request, [self.whole()], finished)


class Attempt:
    """Drives one call of at most `most` usage; `say` shows it to the person.

    `expected` is our own estimate of how long it takes.
    """

    def __init__(
        self,
        *,
        job: JobId,
        attempt: AttemptId,
        choice: Choice,
        output: Output,
        done: Usage,
        most: Usage,
        expected: Seconds,
        book: Book,
        jobs: Jobs,
        say: Callable[[Frame], None],
        acknowledged: Callable[[], None],
        is_other_there: Callable[[], bool],
    ) -> None:
        self.job = job
        self.attempt = attempt
        self.choice = choice
        self.output = output
        self.done = dict(done)
        self.amount: MicroCredits = 0
        self.out_hash = bytes(32)
        self.kernel = ("", "")
        self.started = time.monotonic()
        self.expected: Seconds = min(choice.quote.seconds, expected, WORK_SECONDS_MAX)
        self._is_started = False
        self._is_named_late = False
        """Output was stored before we heard what computes it."""
        self._acknowledged = acknowledged
        self._is_other_there = is_other_there
        self._number = 0
        self._logprobs = 0
        """How many alternatives of each token were asked for."""
        self._fingerprinted = len(output.ids)
        """Up to this token fingerprints came: each begins where the one before it ended."""
        self._book = book
        self._jobs = jobs
        self._most = most
        self._say = say
        self._part_bytes_left = RUN_BYTES_MAX
        self._ended = False
        self._inbox: Inbox[Frame] | None = None
        self._parts: PartMeter | None = None
        self._unstored = 0
        self._all_stored = trio.Event()
        self._scope = trio.CancelScope()
        self._fault: PeerError | None = None
        self._patience: Seconds = WORK_SLACK_SECONDS + 3 * self.expected
        self._worked_at = self._heard_at = trio.current_time()
        self._deadline = self._worked_at + self._patience

    @property
    def seller(self) -> PeerId:
        return self.choice.link.peer

    @property
    def share(self) -> Share:
        """What it gave of an answer, all of it in its last word."""
        return Share(
            attempt=self.attempt, seller=self.seller, kernel="", identical="", first=0, count=0,
            quote=self.choice.envelope,
        )  # fmt: skip

    @property
    def is_stored(self) -> bool:
        """Whether nothing that it delivered waits for the disk."""
        return not (self._unstored or self._is_named_late)

    def row(self, outcome: str) -> AttemptRow:
        """As jobs.db has it."""
        kernel, identical = self.kernel
        return AttemptRow(
            id=self.attempt, job=self.job, seller=self.seller, price=self.amount, outcome=outcome,
            created=time.time(), kernel=kernel, identical=identical, quote=self.choice.envelope,
            done=msgspec.msgpack.encode(self.done),
        )  # fmt: skip

    @property
    def delivered_something(self) -> bool:
        """Whether any output of this job came from this attempt, paid or given away."""
        return self._number > 0

    @property
    def is_late(self) -> bool:
        """Whether it works for longer than both sides thought that it would."""
        return time.monotonic() - self.started > self.expected

    def on_step(self, item: StepItem) -> None:
        """One item off the wire; called by the link's reader, so it only checks and stores."""
        if self._fault is not None or self._ended:
            return  # late, and not paid
        try:
            self._take(item)
        except PeerError as error:
            self._fault = error
            self._scope.cancel()

    async def run(self, call: Call, called: Callable[[], None]) -> Finished:
        """Calls, and returns the seller's last word once all output is stored.

        `called` is once the call has left: for what nobody need wait for.

        Raises:
            PeerError: PEER_LOST or a breach of protocol. JobError: DEADLINE and the like.
        """
        link = self.choice.link
        inbox = self._inbox = link.open_inbox(call.id)
        self._book.intend(
            self.seller, self.attempt, call.quote_hash, call.ceiling_micro_credits,
            soon=not registry.is_served_by_engine(call.operation),
        )  # fmt: skip
        self._parts = PartMeter(call.operation, call.request, call.delivered)
        if registry.is_served_by_engine(call.operation):
            self._logprobs = unpack(GenerateRequest, call.request).logprobs
        try:
            link.send(call)
        finally:
            called()
        with self._scope:
            await self._acknowledge(inbox)
            finished = await self._follow(inbox)
            self._ended = True  # what comes after the last word is late
            await self._stored()
            return finished
        raise self._fault or JobError("the attempt was stopped", code="CANCELLED")

    async def leave(self, call_id: int, *, stopped: bool, finished: bool) -> None:
        """Nothing is accepted after this; what was accepted is stored.

        `stopped`: the seller did nothing wrong, so what it sent before it heard of the end counts.
        """
        if not finished:
            send_or_drop(self.choice.link, messages.Cancel(id=call_id))
        if stopped and self._inbox is not None and not self._ended:
            with trio.move_on_after(DRAIN_SECONDS):
                await self._drain(self._inbox)
        self._ended = True
        self.choice.link.close_inbox(call_id)
        await self._stored()

    async def _drain(self, inbox: Inbox[Frame]) -> None:
        """Returns at the seller's last word; its steps are taken meanwhile."""
        try:
            while not isinstance(await next_frame(inbox), Finished):
                continue
        except AivillageError:
            return  # it said that it stopped, or is gone

    def bill(self, counted: Usage, finished: Finished) -> None:
        """Our own meter of the whole result, at the quote's prices; the seller's must agree.

        Raises:
            PeerError: the seller counts another usage than we do, or the bill is too high.
        """
        if dict(counted) != finished.usage:
            raise PeerError(
                f"the seller counts {finished.usage}, the result shows {dict(counted)}",
                code="BAD_REQUEST",
            )
        amount = price_of_rest(self.choice.quote.terms, counted, self.done)
        if amount > self.choice.price_at_most:
            raise PeerError("the bill is above the quoted ceiling", code="BAD_REQUEST")
        self.amount, self.out_hash = amount, finished.out_hash

    def hash_with(self, body: bytes) -> bytes:
        """The running hash of what was accepted and then `body`."""
        return running_hash(self.out_hash, self.attempt, self._number, body)

    # ------------------------------------------------------------------ waiting
    async def _acknowledge(self, inbox: Inbox[Frame]) -> None:
        wait = self._reply_seconds()
        frame = await frame_by(inbox, trio.current_time() + wait)
        if frame is None:
            raise PeerError(f"no acknowledgement within {wait:.1f} s", code="PEER_LOST")
        if not isinstance(frame, Accepted):
            raise PeerError("work before its acknowledgement", code="BAD_REQUEST")
        self._acknowledged()

    async def _follow(self, inbox: Inbox[Frame]) -> Finished:
        """Frames until the last one; each sign of life renews the deadline, if work comes too."""
        self._beat(worked=True)
        while True:
            frame = await frame_by(inbox, min(self._deadline, self._heard_at + QUIET_SECONDS))
            if frame is not None:
                self._beat(worked=isinstance(frame, Part))
                if isinstance(frame, Finished):
                    return frame
                self._on_frame(frame)
            elif trio.current_time() >= self._deadline:  # steps may have moved it meanwhile
                raise PeerError(f"silent for {self._patience:.0f} s", code="PEER_LOST")
            elif trio.current_time() >= self._heard_at + QUIET_SECONDS:
                await self._probe()

    async def _probe(self) -> None:
        """Raises: PeerError: PEER_LOST, it gives no sign of life, and another one can go on."""
        wait = self._reply_seconds()
        if not await self.choice.link.is_alive(wait) and self._is_other_there():
            raise PeerError(f"no sign of life for {QUIET_SECONDS + wait:.0f} s", code="PEER_LOST")
        self._heard_at = trio.current_time()

    def _reply_seconds(self) -> Seconds:
        """How long a node may take to say what costs it nothing."""
        return min(max(2 + 20 * self.choice.link.rtt_seconds, 2), 30)

    def _beat(self, *, worked: bool) -> None:
        now = self._heard_at = trio.current_time()
        if worked:
            self._worked_at = now
        self._deadline = min(now, self._worked_at + PROGRESS_SECONDS_MAX) + self._patience

    def _on_frame(self, frame: Frame) -> None:
        if isinstance(frame, Progress):
            self._say(frame)
        elif isinstance(frame, Started):
            if self._is_started:
                return  # said again: neither the engine nor its speed changes
            self._is_started = True
            self.kernel = (frame.kernel_class, frame.identical)
            self._is_named_late = self._number > 0
            if not self._number:
                self.started = time.monotonic()  # a peer's speed is that of its warm engine
        elif isinstance(frame, Part):
            if frame.seq != len(self.output.bodies):
                raise PeerError("parts out of order", code="BAD_REQUEST")
            self._part_bytes_left -= EVENT_BYTES_MIN + len(frame.body)
            if self._part_bytes_left < 0:
                raise PeerError("more parts than any run may send", code="BAD_REQUEST")
            self._fold(frame.body, frame.hash8)
            usage = self._counted(frame.body)
            self.output.bodies.append(frame.body)
            self._keep(frame.body, price_of_rest(self.choice.quote.terms, usage, self.done))
            self._say(frame)
        else:
            raise PeerError(f"{type(frame).__name__} in a call", code="BAD_REQUEST")

    # ------------------------------------------------------------------ accepting
    def _counted(self, part: bytes) -> Usage:
        """Of all parts, where they are paid as they come.

        Raises:
            PeerError: it is no part of what was asked for.
        """
        assert self._parts is not None, "made before the call went out"
        try:
            self._parts.take(part)
        except RequestError as error:
            raise PeerError(error.message, code="BAD_REQUEST") from error
        return self._parts.usage

    def _take(self, item: StepItem) -> None:
        output = self.output
        if item.first != len(output.ids):
            raise PeerError("tokens out of order", code="BAD_REQUEST")
        usage = units(
            max(output.read_bytes, item.read_bytes), len(output.ids) + len(item.token_ids)
        )
        if any(count > self._most.get(unit, 0) for unit, count in usage.items()):
            raise PeerError("more was delivered than was asked for", code="BAD_REQUEST")
        self._fold(token_bytes(item.token_ids) + item.fingerprint + item.logprobs, item.hash8)
        self._take_fingerprint(item)
        if not item.token_ids and item.read_bytes <= output.read_bytes:
            return  # nothing to store, nothing to pay, and no sign of work
        piece = Piece(item.token_ids, item.text, item.read_bytes, item.fingerprint, item.logprobs)
        body = output.add_piece(piece)
        self._keep(body, price_of_rest(self.choice.quote.terms, usage, self.done))
        self._beat(worked=True)
        if item.text:
            self._say(messages.Text(id=0, text=item.text))

    def _take_fingerprint(self, item: StepItem) -> None:
        """And log-probabilities, which are only counted: their check is that of the result.

        Raises:
            PeerError: they are of other tokens than came with them, or since the last one.
        """
        try:
            logprobs.require_size(item.logprobs, len(item.token_ids), self._logprobs)
            if not item.fingerprint:
                return
            self._fingerprinted = require_span(
                item.fingerprint, self._fingerprinted, item.first + len(item.token_ids)
            )
        except RequestError as error:
            raise PeerError(error.message, code="BAD_REQUEST") from error

    def _fold(self, body: bytes, hash8: bytes) -> None:
        self.out_hash = self.hash_with(body)
        self._number += 1
        if self.out_hash[:8] != hash8:
            raise PeerError("the running hash does not fit what came", code="BAD_REQUEST")

    def _keep(self, body: bytes, amount: MicroCredits) -> None:
        """Stores a piece; only then is it accepted, and owed."""
        self._unstored += 1
        out_hash = self.out_hash

        def durable() -> None:
            self._unstored -= 1
            self.amount = max(self.amount, amount)
            try:
                self._book.accept(self.seller, self.attempt, self.amount, out_hash)
            finally:
                if not self._unstored:
                    self._all_stored.set()

        place = self.job, len(self.output.bodies) - 1, self.attempt
        self._jobs.keep(place, body, amount, self.kernel, durable)

    async def _stored(self) -> None:
        while self._unstored:
            self._all_stored = trio.Event()
            await self._all_stored.wait()
        if self._is_named_late:
            self._is_named_late = False
            self._jobs.name_kernel(self.attempt, self.kernel)


async def next_frame(inbox: Inbox[Frame]) -> Frame:
    """The next frame of a call; a `Failure` becomes its exception."""
    try:
        frame = await inbox.receive()
    except trio.EndOfChannel:
        raise PeerError("the peer is gone", code="PEER_LOST") from None
    if isinstance(frame, messages.Failure):
        raise as_error(frame)
    return frame


async def frame_by(inbox: Inbox[Frame], deadline: Seconds) -> Frame | None:
    """As `next_frame`; None: there was none by `deadline`, on the loop's clock."""
    if len(inbox):  # costs no turn of the event loop, so no deadline either
        return await next_frame(inbox)
    with trio.CancelScope(deadline=deadline):
        return await next_frame(inbox)
    return None
