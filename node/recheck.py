"""Answers of others, read once by this node's own engine instead of being done again.

The engine reads prompt and answer in slices between the steps of whoever it serves, in its worker.
This has the rules of what follows (pure), and the job that it is booked as.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, Literal

import msgspec

from aivillage.models.inference.fingerprint import (
    DEVIATION_MAX,
    SPAN_TOKENS_MAX,
    Fingerprint,
    family,
    in_order,
)
from aivillage.models.inference.generate import GenerateRequest
from aivillage.node.buyer import Running
from aivillage.node.jobs import JobRow
from aivillage.node.local import LocalJob, once_free
from aivillage.node.trade import Trade
from aivillage.node.verifier import Answer, Share
from aivillage.protocols.codec import unpack
from aivillage.protocols.errors import AivillageError, JobError, RequestError
from aivillage.protocols.messages import Frame
from aivillage.protocols.ports import EngineInfo
from aivillage.protocols.rechecking import Claim, Finding, OddDraw, OddValue
from aivillage.protocols.types import Seconds

Relation = Literal["same", "near", "other"]
"""Of a class to ours: the same bits, the same up to rounding, or not to be compared."""
GUARANTEED: Final = "guaranteed"

Again = Callable[[JobRow, LocalJob | None], Awaitable[Running]]
"""Records a job and runs it to its end. Raises: AivillageError: it was not begun."""


class Rechecked(msgspec.Struct, frozen=True, kw_only=True):
    """`judged`: the parts that could be. `wrong`: whose is not right, if any, and why."""

    judged: tuple[Share, ...]
    wrong: Share | None = None
    reason: str = ""


def relation(share: Share, own: EngineInfo, *, in_format: bool = False) -> Relation:
    """How its maker's class lies to that of our engine."""
    promised = share.identical == own.identical == GUARANTEED
    if promised and share.kernel == own.kernel_class:
        return "same"
    related = family(share.kernel, in_format=in_format)
    ours = family(own.kernel_class, in_format=in_format)
    return "near" if related and related == ours else "other"


def judgeable(answer: Answer, own: EngineInfo) -> tuple[Share, ...]:
    """The parts that our engine can tell right from wrong.

    In one class tokens alone decide. Elsewhere two tokens may honestly change places, so the
    fingerprints have to be there as well.
    """
    try:
        spans = in_order(answer.fingerprints, len(answer.token_ids))
    except RequestError:  # refused when they came; what an older program kept is looked at no more
        return ()
    last = answer.shares[-1] if answer.shares else None
    found = []
    for share in answer.shares:
        kind = relation(share, own, in_format=answer.in_format)
        if kind == "same" or (kind == "near" and _covers(spans, share, whole=share is last)):
            found.append(share)
    return tuple(found)


def _covers(spans: list[Fingerprint], share: Share, *, whole: bool) -> bool:
    """Whether fingerprints are of all of its tokens; a lost seller could not send the last one."""
    at, end = share.first, share.first + share.count
    for span in spans:
        if span.first == at and span.end <= end:
            at = span.end
    return at == end if whole else end - at < SPAN_TOKENS_MAX


def judged(answer: Answer, own: EngineInfo, finding: Finding) -> Rechecked:
    """What our engine's finding says of those who made the answer.

    Raises:
        JobError: the finding is not about this answer.
    """
    if finding.tokens != len(answer.token_ids):
        raise JobError("the engine looked at another answer")
    shares = judgeable(answer, own)
    faults: list[tuple[int, str]] = []
    told: list[tuple[OddDraw | OddValue, str]] = [
        (odd, f"token {odd.position} is") for odd in finding.odd
    ]
    told += [(odd, f"log-probabilities of token {odd.position} are") for odd in finding.values]
    for odd, what in told:
        share = answer.maker_of(odd.position)
        kind = relation(share, own, in_format=answer.in_format)
        if share in shares and not (odd.near and kind == "near"):
            faults.append((odd.position, f"{what} not what this node computed"))
    for span in finding.spans:
        if answer.maker_of(span.first) in shares and not span.relative <= DEVIATION_MAX:
            text = f"tokens {span.first} to {span.first + span.count - 1} were computed otherwise"
            faults.append((span.first, f"{text} than said: off by {span.relative:.1e}"))
    if not faults:
        return Rechecked(judged=shares)
    place, reason = min(faults)
    return Rechecked(judged=shares, wrong=answer.maker_of(place), reason=reason)


class RecheckJob(LocalJob):
    """A check as a job of this node: shown like one, for nothing, and no measure of its speed."""

    finding: Finding | None = None

    def __init__(self, row: JobRow, trade: Trade, answer: Answer) -> None:
        super().__init__(row, trade, _unheard)
        self._answer = answer

    async def _work(self) -> bytes:
        engine = await self._trade.workers.engine(unpack(GenerateRequest, self.row.request).model)
        answer = self._answer
        claim = Claim(answer.token_ids, answer.fingerprints, answer.logprobs)
        self.finding = await once_free(lambda: engine.recheck(self.row.request, claim))
        return self._answer.result

    async def _conclude(self, body: bytes) -> None:
        """The answer passed the check of every result when it came."""
        self.move("finished")
        self.move("passed")
        self.result = body

    def _measure(self, seconds: Seconds) -> None:
        """Reading is not what this machine sells."""


class Rechecks:
    """This node's own engines, as far as they can look at answers of others."""

    def __init__(self, trade: Trade, again: Again) -> None:
        self._trade = trade
        self._again = again
        self._own: dict[str, EngineInfo] = {}

    async def of(self, row: JobRow, model: str, answer: Answer, *, cold: bool) -> Rechecked | None:
        """None: our engine cannot tell, or is not loaded and not to be (`cold`).

        `row` is the check's own. Raises: AivillageError: the engine failed.
        """
        own = await self._engine_info(model, answer, cold=cold)
        if own is None or not judgeable(answer, own):
            return None
        job = RecheckJob(row, self._trade, answer)
        running = await self._again(row, job)
        if job.finding is None:
            raise running.error or JobError("it ended without a finding")
        return judged(answer, own, job.finding)

    async def _engine_info(self, model: str, answer: Answer, *, cold: bool) -> EngineInfo | None:
        known = self._own.get(model)
        if known is not None and not (known.rechecks and judgeable(answer, known)):
            return None  # not worth loading it
        if not cold and not self._trade.workers.is_loaded(model):
            return None
        try:
            info = (await self._trade.workers.engine(model)).info
        except AivillageError:
            return None  # no weights here, or no room for them: somebody else looks
        self._own[model] = info
        return info if info.rechecks else None


def _unheard(_frame: Frame) -> None:
    """Nobody follows a check."""
