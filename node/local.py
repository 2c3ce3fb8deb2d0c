"""One job of the owner's on this machine's own workers: no mesh, no credits, the same receipt.

It goes through the states of any job. Nothing of it is kept before its end: a restarted one
begins anew, which costs nobody anything.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import msgspec
import trio

from aivillage.models import registry
from aivillage.models.inference.generate import (
    PROMPT_BYTES_MAX,
    TOKENS_MAX,
    GenerateRequest,
    piece_of,
)
from aivillage.node.attempt import Output
from aivillage.node.choice import Explanation
from aivillage.node.engines import EngineClient
from aivillage.node.jobs import JobRow
from aivillage.node.module_runs import OnCall
from aivillage.node.pursuit import BLAMED, DEADLINE_SECONDS
from aivillage.node.records import work_of
from aivillage.node.resident import kind_of_model
from aivillage.node.trade import Receipt, Say, Trade
from aivillage.protocols import messages
from aivillage.protocols.codec import pack, unpack
from aivillage.protocols.errors import AivillageError, JobError, RefusedError
from aivillage.protocols.job import JobEvent, State, step
from aivillage.protocols.ports import PartEvent, ProgressEvent, ResultEvent, SessionFrame
from aivillage.protocols.pricing import Usage
from aivillage.protocols.types import AttemptId, MicroCredits, PeerId, Seconds

T = TypeVar("T")

BUSY_SECONDS: Final = 0.5
"""Between looks for a free slot, while what reads others' answers has it."""
UNITS_MAX: Final = PROMPT_BYTES_MAX + TOKENS_MAX
"""More than any answer needs: nobody has to pay, so nothing is held back."""


class LocalJob:
    """What a `Pursuit` is for a job on the mesh. `on_call` serves the module's sub-jobs.

    `choice` says why it is here, where nobody had asked for that.
    """

    def __init__(
        self, row: JobRow, trade: Trade, say: Say, choice: Explanation | None = None
    ) -> None:
        self.row = row
        self.say = say
        self.state: State = "new"
        self.output = Output()
        self.spent: MicroCredits = 0
        self.excluded: dict[PeerId, AivillageError] = {}
        self.result: bytes | None = None
        self._trade = trade
        self.on_call: OnCall = no_sub_jobs
        self._started = time.monotonic()
        self._usage: Usage = {}
        self._identical = "best effort"
        self._kernel = ""
        self._choice = choice
        self._worked_from = self._started

    async def restore(self) -> None:
        """Nothing was kept."""

    async def run(self) -> None:
        """To a checked result.

        Raises:
            AivillageError: why there is none.
        """
        self.move("seek")
        self.move("call")
        attempt = AttemptId(secrets.token_bytes(16))
        peer = self._trade.discovery.peer
        laid_open = msgspec.json.encode(self._choice) if self._choice else b""
        self._trade.jobs.begin_attempt(attempt, self.row.id, peer, choice=laid_open)
        outcome = "stopped"
        try:
            self.move("acknowledged")
            body = await self._work()
            seconds = time.monotonic() - self._worked_from
            await self._conclude(body)
            outcome = "done"
            self._measure(seconds)
        except AivillageError as error:
            outcome = error.code
            if outcome in BLAMED:
                self._trade.discovery.record_of(peer).rate(good=False)
            raise
        finally:
            self._trade.jobs.end_attempt(attempt, 0, outcome)

    def receipt(self) -> Receipt:
        return Receipt(
            job=self.row.id,
            operation=self.row.operation,
            sellers=(self._trade.discovery.peer,),
            usage=dict(self._usage),
            seconds=round(time.time() - self.row.created, 3),
            price_micro_credits=0,
            attempts=1,
            identical=self._identical,
            why=self._choice.why if self._choice else "local",
        )

    def seconds_left(self) -> Seconds:
        """Of the owner's deadline, which began with the job, or of ours, which begins anew."""
        if self.row.deadline is None:
            return DEADLINE_SECONDS - (time.monotonic() - self._started)
        return self.row.deadline - (time.time() - self.row.created)

    def move(self, event: JobEvent) -> None:
        self.state = step(self.state, event)

    def _measure(self, seconds: Seconds) -> None:
        """How fast this machine is, as one candidate among others."""
        peer = self._trade.discovery.peer
        record = self._trade.discovery.record_of(peer)
        record.rate(good=True)
        work = work_of(self.row.operation, self.row.request)
        made = sum(self._usage.values())
        record.measure(work, self._kernel, made / max(seconds, 1e-3))
        self._trade.jobs.rate_peer(peer, record)

    # ------------------------------------------------------------------ work
    async def _work(self) -> bytes:
        if registry.is_served_by_engine(self.row.operation):
            return await self._generate()
        return await self._run_module()

    async def _conclude(self, body: bytes) -> None:
        """The check is that of a peer's result: a broken engine of ours is found the same way."""
        self.move("finished")
        row, workers = self.row, self._trade.workers
        verdict = await workers.check(row.operation, row.request, body)
        if not verdict.ok:
            raise JobError(f"the result is wrong: {verdict.reason}")
        self._usage = await workers.meter(row.operation, row.request, body)
        self.move("passed")
        self.result = body

    async def _generate(self) -> bytes:
        """A session of the resident engine that sells, so that the answer is the same bits."""
        self.say(messages.Progress(id=0, done=0, note="on this machine"))
        model = unpack(GenerateRequest, self.row.request).model
        engine = await self._trade.workers.engine(model)
        self._identical, self._kernel = engine.info.identical, engine.info.kernel_class
        async with self._trade.places.own(kind_of_model(model)):
            self._worked_from = time.monotonic()
            return await once_free(lambda: self._session(engine))

    async def _session(self, engine: EngineClient) -> bytes:
        async with engine.open_session(self.row.request) as session:
            session.allow(UNITS_MAX)
            async for frame in session:
                self._take(frame)
                if frame.finished:
                    request = unpack(GenerateRequest, self.row.request)
                    return pack(self.output.result(request, frame.finished))
        raise JobError("the engine stopped before the end")

    def _take(self, frame: SessionFrame) -> None:
        self.output.add_piece(piece_of(frame))
        if frame.text:
            self.say(messages.Text(id=0, text=frame.text))

    async def _run_module(self) -> bytes:
        row = self.row
        async with self._trade.workers.run(
            row.operation,
            row.request,
            deadline_seconds=self.seconds_left(),
            on_call=self.on_call,
        ) as events:
            async for event in events:
                if isinstance(event, ResultEvent):
                    return event.body
                if isinstance(event, ProgressEvent):
                    progress = messages.Progress(
                        id=0, done=event.done, total=event.total, note=event.note
                    )
                    self.say(progress)
                elif isinstance(event, PartEvent):
                    seq = len(self.output.bodies)
                    self.output.bodies.append(event.body)
                    self.say(messages.Part(id=0, seq=seq, body=event.body))
        raise JobError("the module ended without a result")


async def once_free(work: Callable[[], Awaitable[T]]) -> T:
    """What `work` gives, once an engine has a slot for it; raises what else it raises."""
    while True:
        try:
            return await work()
        except RefusedError as error:
            if error.code != "BUSY":
                raise
            await trio.sleep(BUSY_SECONDS)


async def no_sub_jobs(_operation: str, _request: bytes, _budget: int) -> bytes:
    raise RefusedError("this job asks nobody", code="OWNER_LIMIT")
