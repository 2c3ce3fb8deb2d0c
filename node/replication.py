"""Does results again, by another peer or here, and draws the consequences; one at a time.

Off the path of jobs: an answer is with its owner before any of this begins, unless the owner
asked for it first. What waits when the node stops is lost, which costs nobody anything: trust
only grows by checks that were made.
"""

from __future__ import annotations

import functools
import random
import secrets
import time
from collections.abc import Callable
from typing import Any, Final

import msgspec
import trio

from aivillage.models import registry
from aivillage.node import compared
from aivillage.node.answers import kept_answer, tokens_said
from aivillage.node.buyer import Buyer
from aivillage.node.config import Settings
from aivillage.node.discovery import Candidate
from aivillage.node.guard import Tasks
from aivillage.node.jobs import CHECK_OF, JobRow
from aivillage.node.pursuit import Pursuit
from aivillage.node.recheck import Again, Rechecked, Rechecks
from aivillage.node.records import work_of
from aivillage.node.reputation import Key, Reputation
from aivillage.node.trade import DoubtfulError, RejectedError, Trade
from aivillage.node.verifier import (
    TRUSTED_FROM,
    Answer,
    Judgement,
    Share,
    Trust,
    judge,
)
from aivillage.node.villagers import Villagers
from aivillage.protocols.errors import AivillageError, JobError, RefusedError
from aivillage.protocols.types import AttemptId, JobId, MicroCredits, PeerId

WAITING_MAX: Final = 64
"""Results that wait to be done again: a burst of jobs. One more is not, and says so."""
TOGETHER_SECONDS: Final = 0.02
"""How long the first waits for others: small jobs end so fast that to wake for each costs more."""
PEERS_TRIED_MAX: Final = 3
"""For one check; who refuses once does so for a reason that lasts."""
BUDGET: Final = "the budget for checks was used up"
ANOTHER_CLASS: Final = "done again in another kernel class"


class Sample(msgspec.Struct, frozen=True):
    """A job that ended; its owner has the result already, if there is one."""

    row: JobRow
    result: bytes | None
    spent: MicroCredits
    is_verified: bool
    """Done again before its owner got it."""
    maker: Share | None = None
    """Who made all of it at the one attempt that there was; None: jobs.db knows."""


class Unchecked(RefusedError):  # noqa: N818 nothing went wrong
    """This result cannot be done again now; the message says why."""


class Verified(msgspec.Struct, frozen=True):
    """What doing a result again showed. `losers` are those found wrong in it."""

    losers: tuple[PeerId, ...] = ()
    said: str = ""


class Replicator:
    """Takes results of jobs that ended, and does some of them again."""

    def __init__(
        self,
        settings: Settings,
        trade: Trade,
        reputation: Reputation,
        again: Again,
    ) -> None:
        self.reputation = reputation
        self.draw: Callable[[], float] = random.SystemRandom().random
        """Numbers in [0, 1) that no seller can foresee."""
        self.shuffle: Callable[[list[PeerId]], None] = random.SystemRandom().shuffle
        self.idle = trio.Event()
        """Set while nothing waits."""
        self.idle.set()
        self._settings = settings
        self._trade = trade
        self._again = again
        self._rechecks = Rechecks(trade, again)
        self._send, self._receive = trio.open_memory_channel[Sample](WAITING_MAX)
        self._own: dict[str, str] = {}
        """Model -> the class of our own engine; empty where it guarantees nothing."""

    # ------------------------------------------------------------------ after the answer
    def on_ended(self, pursuit: Pursuit) -> None:
        """A job of the owner's on the mesh ended, well or not. Never waits."""
        if pursuit.row.is_check:
            return  # booked by who asked for it
        self.reputation.spent(pursuit.spent, is_check=False)
        sample = Sample(
            pursuit.row, pursuit.result, pursuit.spent, is_verified=bool(pursuit.checked),
            maker=pursuit.maker,
        )  # fmt: skip
        operation = pursuit.row.operation
        is_compared = registry.is_served_by_engine(operation) or compared.is_compared(operation)
        if not is_compared and pursuit.result:
            sample = msgspec.structs.replace(sample, result=b"")  # not compared, and may be large
        try:
            self._send.send_nowait(sample)
        except trio.WouldBlock:
            self.reputation.left_out("too many waited")
        else:
            self.idle = trio.Event()

    async def run(self) -> None:
        """Looks at what came, one after the other, for ever."""
        while True:
            is_first = not self._receive.statistics().current_buffer_used
            if is_first:
                self.idle.set()
            sample = await self._receive.receive()
            if is_first:
                await trio.sleep(TOGETHER_SECONDS)
            try:
                await self._look_at(sample)
            except Unchecked as reason:
                self.reputation.left_out(reason.message)
            except AivillageError as error:
                self.reputation.left_out("it failed")
                self._trade.events.emit(
                    "replication_failed", level=30, job=sample.row.id, reason=str(error)
                )

    async def _look_at(self, sample: Sample) -> None:
        row = sample.row
        if sample.maker is None:
            await self._note_rejected(row)
        if sample.result is None:
            return
        if sample.maker is None:
            answer = await kept_answer(self._trade.jobs, row, sample.result)
        else:
            answer = Answer(token_ids=(), shares=(sample.maker,), result=sample.result)
        keys = _keys(row, answer, [share.seller for share in answer.shares])
        self.reputation.done(keys)
        if sample.is_verified or not self._settings.verify_percent_max:
            return
        trusts = [self.reputation.of(key) for key in keys]
        before = self.reputation.checks_spent
        try:
            if self.draw() < max((trust.chance for trust in trusts), default=0.0):
                room = self.reputation.room(self._settings.verify_percent_max)
                await _Check(self, row, room, sample.spent).of(answer)
        finally:
            if trusts and all(trust.count >= TRUSTED_FROM for trust in trusts):
                check = self.reputation.checks_spent - before
                self.reputation.spent_at_trusted(sample.spent, check)

    async def _note_rejected(self, row: JobRow) -> None:
        """Who failed the check of every result is a newcomer again.

        It is not cut off: it was not paid to the end, and the next such result is seen as well.
        """
        model = _model_of(row)
        keys = [
            Key(attempt.seller, row.operation, model, attempt.kernel)
            for attempt in await self._trade.jobs.attempts(row.id)
            if attempt.outcome == "rejected"
            and not self.reputation.is_cut_off(attempt.seller, row.operation)
        ]
        if keys:
            self.reputation.change(keys, Trust.after_wrong)

    # ------------------------------------------------------------------ before the answer
    async def verify(self, row: JobRow, result: bytes) -> Verified:
        """Does a result again at once: its owner waits, and pays for as much again.

        Raises:
            Unchecked: nobody can do it again now.
        """
        answer = await kept_answer(self._trade.jobs, row, result)
        return await _Check(self, row, 2 * row.ceiling, 0).of(answer)

    # ------------------------------------------------------------------ doing it again
    async def recheck(self, row: JobRow, answer: Answer, tried: set[PeerId]) -> Rechecked | None:
        """By our own engine in one pass, for nothing; None where it cannot tell.

        A node that serves may load it where nobody else of the class is there.
        """
        model = _model_of(row)
        if not model or not self._settings.serve or answer.by_result:
            return None
        is_alone = not (answer.kernel and self.others(row, answer.kernel, tried))
        check = _check_row(row, ceiling=0, local=True)
        return await self._rechecks.of(check, model, answer, cold=is_alone)

    async def peer_again(
        self, row: JobRow, peer: PeerId, ceiling: MicroCredits
    ) -> tuple[Answer | AivillageError, MicroCredits]:
        """What a peer answered, or why it did not; and what that cost."""
        check = _check_row(row, ceiling=ceiling, peer=peer)
        running = await self._again(check, None)
        spent, result = running.pursuit.spent, running.pursuit.result
        self.reputation.spent(spent, is_check=True)
        if result is None:
            await self._note_rejected(check)
            return running.error or JobError("it ended without a result"), spent
        return await kept_answer(self._trade.jobs, check, result), spent

    async def here_again(self, row: JobRow, kernel: str, *, cold: bool) -> Answer | None:
        """By our own engine, for nothing; None where it is of another class, or not loaded.

        A node that serves may load it; one that only buys is not made to.
        """
        model = _model_of(row)
        if not model or not self._settings.serve:
            return None
        if compared.is_compared(row.operation):
            return await self._module_again(row)
        if not cold and not self._trade.workers.is_loaded(model):
            return None
        if self._own.get(model, kernel) != kernel:
            return None
        try:
            info = (await self._trade.workers.engine(model)).info
        except AivillageError:
            return None  # no weights here, or no room for them: somebody else does it
        self._own[model] = info.kernel_class if info.identical == "guaranteed" else ""
        if self._own[model] != kernel:
            return None
        running = await self._again(_check_row(row, ceiling=0, local=True), None)
        if running.pursuit.result is None:
            raise running.error or JobError("it ended without a result")
        result = running.pursuit.result
        ids, said = tokens_said(result)
        share = Share(
            attempt=AttemptId(b""), seller=self._trade.discovery.peer, kernel=kernel,
            identical="guaranteed", first=0, count=len(ids),
        )  # fmt: skip
        return Answer(token_ids=ids, shares=(share,), result=result, logprobs=said)

    async def _module_again(self, row: JobRow) -> Answer | None:
        """The same for a module whose results are compared; None where its model is not here."""
        try:
            self._trade.workers.describe_for(row.operation, row.request)
        except AivillageError:
            return None
        running = await self._again(_check_row(row, ceiling=0, local=True), None)
        if running.pursuit.result is None:
            raise running.error or JobError("it ended without a result")
        me = self._trade.discovery.peer
        made = (AttemptId(b""), me, "", "", b"", b"")
        return compared.answer_of(row.operation, [made], running.pursuit.result)

    def others(self, row: JobRow, kernel: str, tried: set[PeerId]) -> list[PeerId]:
        """Who is or may be of that class, in an order that nobody foresees."""
        model = _model_of(row)
        found = []
        for candidate in self._trade.discovery.candidates(row.operation):
            classes = self.reputation.kernels_of(candidate.peer, row.operation, model)
            if self._may(candidate, row, tried) and (kernel in classes or not classes - {""}):
                found.append(candidate.peer)
        self.shuffle(found)
        return found[:PEERS_TRIED_MAX]

    def _may(self, candidate: Candidate, row: JobRow, tried: set[PeerId]) -> bool:
        peer = candidate.peer
        is_out = self.reputation.is_cut_off(peer, row.operation)
        return peer not in tried and not is_out and not self._trade.book.policy(peer).blocked

    async def accuse(self, key: Key, row: JobRow, reason: str, answers: list[Answer]) -> None:
        """Its result was wrong: it is cut off, and chosen less often afterwards."""
        await self.reputation.found_wrong(key, row.id, reason, *answers)
        record = self._trade.discovery.record_of(key.peer)
        record.rate(good=False)
        self._trade.jobs.rate_peer(key.peer, record)
        self.tell("result_wrong", job=row.id, peer=key.peer, reason=reason)

    def tell(self, event: str, **fields: Any) -> None:
        self._trade.events.emit(event, level=30, **fields)

    @property
    def me(self) -> PeerId:
        return self._trade.discovery.peer


class _Check:
    """One result done again, and a third time where the two differ."""

    def __init__(
        self,
        by: Replicator,
        row: JobRow,
        room: MicroCredits,
        price: MicroCredits,
    ) -> None:
        """`room` is left for all of it; no peer is asked where `price` is more."""
        self._by = by
        self._row = row
        self._room = room
        self._price = price
        self._tried: set[PeerId] = set()

    async def of(self, first: Answer) -> Verified:
        """Raises: Unchecked: why it cannot be done again."""
        self._tried |= {share.seller for share in first.shares}
        if looked := await self._by.recheck(self._row, first, self._tried):
            return await self._rechecked(first, looked)
        if not (first.kernel or first.by_result):
            raise Unchecked("its kernel class guarantees nothing")
        second = await self._another(first.kernel)
        rule = compared.rule_of(self._row)
        finding, place = await trio.to_thread.run_sync(rule, first, second)
        if finding == "best effort":
            raise Unchecked(ANOTHER_CLASS)
        if finding == "same":
            self._right(first, second)
            return Verified(said=f"the same at {_who(second, self._by.me)}")
        return await self._disagree(first, second, place)

    async def _rechecked(self, answer: Answer, looked: Rechecked) -> Verified:
        """Our own engine read it: no third is needed."""
        by, row, wrong = self._by, self._row, looked.wrong
        if wrong is None:
            keys = _keys(row, answer, [share.seller for share in looked.judged])
            by.reputation.change(keys, Trust.after_same)
            part = "" if len(looked.judged) == len(answer.shares) else ", in part"
            return Verified(said=f"rechecked at this node{part}")
        (key,) = _keys(row, answer, [wrong.seller])
        await by.accuse(key, row, looked.reason, [answer])
        return Verified((wrong.seller,), looked.reason)

    async def _disagree(self, first: Answer, second: Answer, place: int) -> Verified:
        """A third one decides; our own recomputation needs none."""
        third: Answer | None = None
        verdict: Judgement = "first"
        if second.sellers() != (self._by.me,):
            try:
                third = await self._another(first.kernel)
            except Unchecked as nobody:
                self._by.tell("no_third", job=self._row.id, reason=nobody.message)
            rule = compared.rule_of(self._row)
            verdict = await trio.to_thread.run_sync(judge, first, second, third, rule)
        answers = [answer for answer in (first, second, third) if answer is not None]
        if verdict == "nobody":
            return await self._unsettled(first, second, place, answers)
        wrong, right = (first, second) if verdict == "first" else (second, first)
        loser = wrong.maker_of(place).seller
        (key,) = _keys(self._row, wrong, [loser])
        reason = f"{_item(wrong)} {place} is not what {_who(right, self._by.me)} computed"
        if third is not None:
            reason += f", and {_who(third, self._by.me)}"
            self._right(right, third)
        await self._by.accuse(key, self._row, reason, answers)
        return Verified((loser,) if verdict == "first" else (), reason)

    async def _unsettled(
        self, first: Answer, second: Answer, place: int, answers: list[Answer]
    ) -> Verified:
        """Nobody is accused, and nobody is trusted meanwhile."""
        reputation, row = self._by.reputation, self._row
        keys = self._keys(first) + self._keys(second)
        reputation.change(keys, Trust.after_unsettled)
        whose = f"{_who(second, self._by.me)}'s"
        reason = f"{_item(first)} {place} differs from {whose}; nobody could decide"
        await reputation.keep_evidence("", row.operation, row.id, reason, *answers)
        self._by.tell("disagreement_unsettled", job=row.id, reason=reason)
        return Verified(said=reason)

    def _right(self, *answers: Answer) -> None:
        """They agree: everybody in them is trusted more."""
        keys = [key for answer in answers for key in self._keys(answer)]
        self._by.reputation.change(keys, Trust.after_same)

    def _keys(self, answer: Answer) -> list[Key]:
        others = [seller for seller in answer.sellers() if seller != self._by.me]
        return _keys(self._row, answer, others)

    async def _another(self, kernel: str) -> Answer:
        """An answer of somebody new: of this node, or of a peer of the class.

        Raises:
            Unchecked: there is nobody, or no money.
        """
        by, row = self._by, self._row
        me_too = by.me not in self._tried
        if me_too and (here := await by.here_again(row, kernel, cold=False)):
            self._tried.add(by.me)
            return here
        why = "nobody else of its kernel class was there"
        for peer in by.others(row, kernel, self._tried):
            if self._price > self._room:
                why = BUDGET
                break
            self._tried.add(peer)
            answer, spent = await by.peer_again(row, peer, min(row.ceiling, self._room))
            self._room = max(0, self._room - spent)
            if isinstance(answer, AivillageError):
                why = f"who was asked refused: {answer.code}"
                continue
            if answer.kernel == kernel:
                return answer
            by.reputation.change(_keys(row, answer, [peer]), _seen)  # not asked for it again
            why = ANOTHER_CLASS
        if me_too and (here := await by.here_again(row, kernel, cold=True)):
            self._tried.add(by.me)
            return here
        raise Unchecked(why)


async def require_verified(by: Replicator, row: JobRow, result: bytes, seller: PeerId) -> str:
    """For `submit --verify`: how the result was checked, or why it was not.

    Raises:
        RejectedError: `seller` made it wrong.
        DoubtfulError: who came before `seller` did.
    """
    try:
        found = await by.verify(row, result)
    except AivillageError as reason:  # nobody there, or this node failed: no fault of the seller's
        return f"not checked: {reason.message}"
    if not found.losers:
        return found.said
    kind = RejectedError if seller in found.losers else DoubtfulError
    raise kind(f"the result is wrong: {found.said}", code="BAD_REQUEST")


def _check_row(
    row: JobRow, *, ceiling: MicroCredits, peer: str = "", local: bool = False
) -> JobRow:
    """The same request as a job of its own."""
    return JobRow(
        id=JobId(secrets.token_hex(16)), operation=row.operation, request=row.request,
        state="new", ceiling=ceiling, deadline=None, peer=peer, created=time.time(),
        local=local, parent=f"{CHECK_OF}{row.id}",
    )  # fmt: skip


def _seen(trust: Trust) -> Trust:
    """Nothing follows but that its class is known."""
    return trust


def _model_of(row: JobRow) -> str:
    return work_of(row.operation, row.request).model


def _keys(row: JobRow, answer: Answer, sellers: list[PeerId]) -> list[Key]:
    """What trust in each of `sellers` is about: the class in which it worked here."""
    kernels = {share.seller: share.kernel for share in answer.shares}
    model = _model_of(row)
    return [Key(s, row.operation, model, kernels[s]) for s in dict.fromkeys(sellers)]


def _item(answer: Answer) -> str:
    return "item" if answer.by_result else "token"


def _who(answer: Answer, me: PeerId) -> str:
    return "this node" if answer.sellers() == (me,) else answer.sellers()[0][-8:]


async def open_replicator(
    settings: Settings, trade: Trade, buyer: Buyer, villagers: Villagers, tasks: Tasks
) -> Replicator:
    """With what former runs found out; from now on it hears of every job that ends."""
    reputation = Reputation(trade.jobs)
    await reputation.load()
    replicator = Replicator(settings, trade, reputation, buyer.again)
    villagers.on_succeeded = functools.partial(tasks.start_soon, reputation.rename)
    trade.market.cut_off = reputation.cut_off
    buyer.on_ended = replicator.on_ended
    buyer.verify = functools.partial(require_verified, replicator)
    tasks.serve(replicator.run)
    return replicator
