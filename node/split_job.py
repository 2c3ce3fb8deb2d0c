"""An answer of the owner's whose model is split over stages at several peers.

It goes through the states of any job. Nothing of it is kept before its end: after a restart it
begins anew, and what the stages had computed until then is paid.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec
import trio

from aivillage.models.inference import stages
from aivillage.models.inference.generate import GenerateRequest, piece_of
from aivillage.models.inference.logprobs import token_size
from aivillage.models.inference.pace import Pace
from aivillage.models.inference.split import Begun, Draws, Rounds
from aivillage.models.inference.stages import ROWS_MAX, StageRequest
from aivillage.node.attempt import Output
from aivillage.node.chain import STAND_INS_MAX, Chain, Hop, row_bytes
from aivillage.node.choice import RATES
from aivillage.node.draft import Draft, engine_of
from aivillage.node.engines import EngineClient, EngineSession
from aivillage.node.jobs import JobRow
from aivillage.node.market import Need
from aivillage.node.pursuit import Pursuit
from aivillage.node.records import Work
from aivillage.node.split_plan import Placed, Plan, plan, stand_in
from aivillage.node.stage_call import OtherStatesError, StageCall
from aivillage.node.stage_peers import explanation, stage_peers, with_draft
from aivillage.node.stand_ins import StandIns
from aivillage.node.trade import Receipt, Say, Trade
from aivillage.protocols import messages
from aivillage.protocols.codec import pack, unpack
from aivillage.protocols.errors import AivillageError, JobError, RequestError
from aivillage.protocols.job import JobEvent, State, step
from aivillage.protocols.passing import TICKET_BYTES, Passing
from aivillage.protocols.ports import EngineInfo, SessionFrame
from aivillage.protocols.pricing import Usage
from aivillage.protocols.types import MicroCredits, PeerId, Seconds, as_credits

FATAL: Final = frozenset({"PRICE_ABOVE_CEILING", "INTERNAL", "DISK_FULL", "CONFIG"})
"""Errors that another peer would make no better."""
ALONE: Final = Passing()
DRAFT_ROWS_PER_TOKEN: Final = 8
"""Rejected drafts are rows too: after one, a round has four rows."""


class SplitJob:
    """What a `Pursuit` is for a job that one peer does. `before` is the one that chose this.

    `passes_on`: whether stages may hand their states to each other.
    """

    def __init__(
        self,
        before: Pursuit,
        trade: Trade,
        stand_ins: StandIns,
        nursery: trio.Nursery,
        *,
        passes_on: bool,
    ) -> None:
        self.row: JobRow = before.row
        self.say: Say = before.say
        self.state: State = "new"
        self.output = Output()
        self.excluded: dict[PeerId, AivillageError] = {}
        self.result: bytes | None = None
        self.plan: Plan | None = None
        self.resumed_seconds: list[Seconds] = []
        self.seconds_left = before.seconds_left
        self._trade = trade
        self._stand_ins = stand_ins
        self._passes_on = passes_on
        self._nursery = nursery
        self._draft: Draft | None = None
        self._draft_said = before.draft
        self._request = unpack(GenerateRequest, self.row.request)
        self._model = trade.workers.shelf.require_divisible(self._request.model)
        self._spent_before = before.spent
        self._calls: list[StageCall] = []
        self._hops: tuple[Hop, ...] = ()
        self._rows = 0
        self._prompt_tokens = 0
        self._usage: Usage = {}

    @property
    def spent(self) -> MicroCredits:
        return self._spent_before + sum(call.amount for call in self._calls)

    async def run(self) -> None:
        """To a checked result.

        Raises:
            AivillageError: why there is none; what was computed is paid.
        """
        self.move("seek")
        driver = await self._trade.workers.driver(self._request.model)
        guesser = await self._guesser(driver.info)
        async with driver.open_session(self.row.request) as session:
            begun = unpack(Begun, (await anext(session)).body)
            self._prompt_tokens = len(begun.prompt_ids)
            self._rows = self._prompt_tokens + DRAFT_ROWS_PER_TOKEN * self._request.max_tokens
            chain = await self._open(guesser.info.model if guesser else "")
            self._hops = chain.hops
            self._have_stand_ins()
            reading = self._begin_draft(guesser, chain)
            outcome = "stopped"
            try:
                body = await self._answer(session, chain, begun)
                outcome = await self._conclude(body)
            except AivillageError as error:
                outcome = error.code
                raise
            finally:
                reading.cancel()
                self._trade.events.emit(
                    "split_ended", job=self.row.id, stages=len(chain.hops), inputs=chain.fed_count,
                    handed_on=chain.passed_count, outcome=outcome,
                )  # fmt: skip
                with trio.CancelScope(shield=True):  # each call has its own end
                    await chain.close(outcome)
        if self.result is None:
            raise JobError("the result is wrong: nobody knows which stage computed it so")

    def receipt(self) -> Receipt:
        assert self.plan is not None, "a result has a plan"
        return Receipt(
            job=self.row.id,
            operation=self.row.operation,
            sellers=tuple(dict.fromkeys(call.seller for call in self._calls)),
            usage=dict(self._usage),
            seconds=round(time.time() - self.row.created, 3),
            price_micro_credits=self.spent,
            attempts=len(self._calls),
            identical=self._identical(),
            why=f"{self.plan.why}; {self._draft.told()}" if self._draft else self.plan.why,
        )

    def move(self, event: JobEvent) -> None:
        self.state = step(self.state, event)

    def _identical(self) -> str:
        """Guaranteed where every stage promises it, in one kernel class but for its own layers.

        Those names are of the same bits where two had the same layers: the lost and its stand-in.
        """
        kernels = {(call.kernel[0].rpartition("/")[0], call.kernel[1]) for call in self._calls}
        own = {(call.request.first, call.request.last): call.kernel[0] for call in self._calls}
        same = len(kernels) == 1 and {promise for _, promise in kernels} == {"guaranteed"}
        same = same and {call.kernel[0] for call in self._calls} <= {*own.values()}
        return "guaranteed" if same else "best effort"

    # ------------------------------------------------------------------ opening
    async def _open(self, guesser: str) -> Chain:
        """A chain whose stages are all loaded; who refuses is left out of the next plan.

        `guesser`: the model that guesses for it, if any.

        Raises:
            AivillageError: the rest do not hold the model.
        """
        self.move("call")
        while True:
            peers = stage_peers(self._trade, self._model, self.excluded)
            before = self._stand_ins.before(self._request.model)
            self.plan = with_draft(plan(self._model, peers, before), guesser)
            self.say(messages.Progress(id=0, done=0, note=self.plan.why))
            opened: dict[Placed, StageCall] = {}
            passing = self._passing(self.plan.stages)
            async with trio.open_nursery() as nursery:
                for placed in self.plan.stages:
                    nursery.start_soon(self._try_to_open, placed, passing[placed], opened)
            if len(opened) == len(self.plan.stages) and not self._too_dear(opened):
                self.move("acknowledged")
                size = row_bytes(self._model.width)
                return Chain(
                    [Hop(one, opened[one], size, self._replace) for one in self.plan.stages]
                )
            for call in opened.values():
                await call.close("stopped")
            if fatal := [e for e in self.excluded.values() if e.code in FATAL]:
                raise fatal[0]
            if self._too_dear(opened):
                raise _above(self._too_dear(opened), self.row.ceiling)
            if len(self._calls) + len(self.excluded) > STAND_INS_MAX * len(self.plan.stages):
                raise next(iter(self.excluded.values()))

    def _too_dear(self, opened: Mapping[Placed, StageCall]) -> MicroCredits:
        """What the stages may cost together, where that is above the ceiling; else 0."""
        most = self.spent + sum(call.choice.price_at_most for call in opened.values())
        return most if most > self.row.ceiling else 0

    def _passing(self, stages: Sequence[Placed]) -> dict[Placed, Passing]:
        """Who hands to whom: each to the next, unless the owner wants to deal with each alone."""
        if not self._passes_on:
            return dict.fromkeys(stages, Passing())
        tickets = [secrets.token_bytes(TICKET_BYTES) for _ in stages[1:]]
        to = [Passing(to=one.peer, by=by) for one, by in zip(stages[1:], tickets, strict=True)]
        return {
            placed: msgspec.structs.replace(passing, fed_by=fed_by)
            for placed, passing, fed_by in zip(
                stages, [*to, Passing()], [b"", *tickets], strict=True
            )
        }

    async def _try_to_open(
        self, placed: Placed, passing: Passing, opened: dict[Placed, StageCall]
    ) -> None:
        try:
            opened[placed] = await self._call(placed, passing)
        except AivillageError as error:
            self._exclude(placed.peer, error)

    async def _call(self, placed: Placed, passing: Passing = ALONE) -> StageCall:
        """A stage at its peer, loaded. Raises: AivillageError: it is not to be had."""
        request = StageRequest(
            first=placed.first,
            last=placed.last,
            model=self._request.model,
            shape=stages.shape_said(self._model),
            rows=min(ROWS_MAX, self._rows + self._model.context_tokens),
            prompt_tokens=self._prompt_tokens,
            temperature=self._request.temperature,
            top_p=self._request.top_p,
            seed=self._request.seed,
        )
        if placed.last == self._model.layers:
            request = msgspec.structs.replace(
                request,
                format=self._request.format,
                drawn=tuple(self.output.ids) if self._request.format else (),
                logprobs=self._request.logprobs,
            )
        layers = placed.last - placed.first
        rows = self._prompt_tokens + self._request.max_tokens
        drawn = self._request.max_tokens if placed.last == self._model.layers else 0
        need = Need(
            operation=stages.OPERATION,
            request=pack(request),
            usage=stages.units(rows * layers, drawn),
            done={},
            budget=self.row.ceiling - self.spent,
            peer=placed.peer,
        )
        choice = await self._trade.market.terms_of(placed.peer, need)
        ceiling = self.row.ceiling - self.spent
        call = StageCall(self.row.id, choice, request, self._trade, ceiling, passing)
        try:
            await call.open(max(1.0, self.seconds_left()), self._laid_open(placed))
        except BaseException as error:
            await call.close(error.code if isinstance(error, AivillageError) else "stopped")
            raise
        self._calls.append(call)
        return call

    def _laid_open(self, placed: Placed) -> bytes:
        """The plan, kept with the attempt of its first stage: for `jobs show` and `--explain`."""
        if self.plan is None or placed not in self.plan.stages[:1]:
            return b""
        prefer = self.row.prefer or "balanced"
        return msgspec.json.encode(explanation(self.plan, prefer))

    # ------------------------------------------------------------------ a lost stage
    async def _replace(self, hop: Hop, error: AivillageError) -> StageCall:
        """Somebody else for a lost stage, loaded.

        Raises:
            AivillageError: nobody can stand in.
        """
        lost, begun = hop.placed, time.monotonic()
        await hop.call.close(error.code)
        if error.code in FATAL or len(self.resumed_seconds) >= STAND_INS_MAX:
            raise error
        again = isinstance(error, OtherStatesError)  # it reads once more, what we were shown
        if not again:
            self._exclude(lost.peer, error)
        chain = [call.seller for call in self._calls if call.seller not in self.excluded]
        ready = self._stand_ins.ready(self._request.model, lost, hop.call.kernel[0])
        while True:
            peers = stage_peers(self._trade, self._model, self.excluded)
            placed = lost
            if not again:
                peer = stand_in(self._model, peers, lost, chain, ready).peer
                placed = msgspec.structs.replace(lost, peer=peer)
            note = f"{lost.peer[-8:]} is lost; its layers go on at {placed.peer[-8:]}"
            self.say(messages.Progress(id=0, done=0, note=note))
            try:
                call = await self._call(placed)
            except AivillageError as refusal:
                self._exclude(placed.peer, refusal)
                again = False
                continue
            hop.placed = placed
            self.resumed_seconds.append(time.monotonic() - begun)
            self._trade.events.emit(
                "stage_replaced", job=self.row.id, peer=lost.peer, by=placed.peer,
                seconds=round(self.resumed_seconds[-1], 3), was_ready=placed.peer == ready,
            )  # fmt: skip
            self._have_stand_ins()
            return call

    def _have_stand_ins(self) -> None:
        """Somebody stands by for each stage as it is now, from a moment on."""
        chain = [(hop.placed, hop.call.kernel[0]) for hop in self._hops]
        self._stand_ins.prepare(self._model, chain, self.excluded)

    def _exclude(self, peer: PeerId, error: AivillageError) -> None:
        self.excluded[peer] = error
        self._trade.market.forget_quote(peer, Work(stages.OPERATION, self._request.model))
        if error.code == "PEER_LOST":
            self._trade.discovery.unreachable(peer)
        self._trade.events.emit(
            "attempt_failed", job=self.row.id, peer=peer, code=error.code, reason=error.message
        )

    # ------------------------------------------------------------------ guesses of a model here
    async def _guesser(self, driver: EngineInfo) -> EngineClient | None:
        """Whoever guesses, if anybody does.

        Raises:
            RequestError: the model that was said cannot: it means other words by its ids.
        """
        try:
            return await engine_of(self._draft_said, driver, self._trade.workers)
        except RequestError:
            raise
        except AivillageError as error:  # it would have made the answer faster, and no other
            self._draft_lost(self._draft_said, error.message)
            return None

    def _begin_draft(self, guesser: EngineClient | None, chain: Chain) -> trio.CancelScope:
        """Has it read the prompt, beside the stages, until what this gives is cancelled."""
        scope = trio.CancelScope()
        if guesser is not None:
            second = RATES[self.row.prefer or "balanced"]
            pace = Pace(row_price=chain.row_price, second_price=second)
            self._draft = Draft(guesser, self._request, pace)
            self._nursery.start_soon(self._read, self._draft, scope)
        return scope

    async def _read(self, draft: Draft, scope: trio.CancelScope) -> None:
        with scope:
            try:
                await draft.read()
            except Exception as defect:  # an answer without guesses is an answer
                self._trade.events.emit("draft_crashed", level=40, error=repr(defect))
        if draft.lost:
            self._draft_lost(draft.model, draft.lost)

    async def _own_guesses(self, chain: Chain, rounds: Rounds) -> list[int]:
        """Only what leaves enough to pay the rest of the answer without a right guess.

        And what a stand-in for one lost stage would read again.
        """
        draft = self._draft
        if draft is None or draft.lost or not rounds.places:
            return []
        rows = (self.row.ceiling - self.spent) // max(1, chain.row_price)
        again = (self._prompt_tokens + len(rounds.token_ids)) // len(chain.hops)
        found = await draft.guesses(rounds, rows - rounds.tokens_left - again)
        if draft.lost:
            self._draft_lost(draft.model, draft.lost)
        return found

    def _draft_lost(self, model: str, why: str) -> None:
        self._trade.events.emit("draft_lost", job=self.row.id, model=model, reason=why)
        note = f"{model} does not guess: {why}; going on without"
        self.say(messages.Progress(id=0, done=0, note=note))

    # ------------------------------------------------------------------ the answer
    async def _answer(self, session: EngineSession, chain: Chain, begun: Begun) -> bytes:
        """Round by round until the driver says that it is finished.

        A round begins before the driver has said the one before in words, and comes later by none
        of its time. Not where words may end the answer: that round would be computed for nothing.
        """
        rounds = Rounds(
            begun.prompt_ids,
            max_tokens=self._request.max_tokens,
            end_token_ids=begun.end_token_ids,
        )
        goes_on = await self._begin(chain, rounds)
        while True:
            if not goes_on:
                raise _above(self.spent + chain.price_of(rounds.inputs()), self.row.ceiling)
            session.feed(pack(self._counted(rounds, await chain.finish())))
            goes_on = is_ahead = not (self._request.stop or rounds.ended)
            if is_ahead:
                goes_on = await self._begin(chain, rounds)
            frame = await anext(session)
            self._take(frame)
            if frame.finished:
                return pack(self.output.result(self._request, frame.finished))
            if not is_ahead:
                goes_on = await self._begin(chain, rounds)

    async def _begin(self, chain: Chain, rounds: Rounds) -> bool:
        """Whether the next round is within the ceiling, and so has begun."""
        own = await self._own_guesses(chain, rounds)
        inputs = rounds.inputs(own)
        is_paid = self.spent + chain.price_of(inputs) <= self.row.ceiling
        if is_paid:
            if self._draft:
                self._draft.round_begins(inputs, own=bool(own))
            chain.begin(inputs)
        return is_paid

    def _counted(self, rounds: Rounds, draws: Draws) -> Draws:
        """Those draws of a round that belong to the answer."""
        new = rounds.take(draws.token_ids)
        if self._draft:
            self._draft.round_ended(len(new) - 1)
        return Draws(new, draws.logprobs[: len(new) * token_size(self._request.logprobs)])

    def _take(self, frame: SessionFrame) -> None:
        self.output.add_piece(piece_of(frame))
        if frame.text:
            self.say(messages.Text(id=0, text=frame.text))

    async def _conclude(self, body: bytes) -> str:
        """How the stages' attempts end: a wrong answer is paid to nobody, for nobody knows whose.

        The meter is that of the operation; what was paid is each stage's own.
        """
        self.move("finished")
        row, workers = self.row, self._trade.workers
        verdict = await workers.check(row.operation, row.request, body)
        if not verdict.ok:
            return "doubtful"
        self._usage = await workers.meter(row.operation, row.request, body)
        self.move("passed")
        self.result = body
        return "done"


def _above(cost: MicroCredits, ceiling: MicroCredits) -> RequestError:
    return RequestError(
        f"its stages may cost {as_credits(cost)} credits, your ceiling is {as_credits(ceiling)}",
        code="PRICE_ABOVE_CEILING",
        next_step="allow more with --max-price, or ask for less",
    )
