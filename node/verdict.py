"""Whether what a seller gave is an answer to what was asked: only such a result is settled."""

from __future__ import annotations

from aivillage.models import registry
from aivillage.models.inference import logprobs
from aivillage.models.inference.generate import GenerateResult
from aivillage.node.attempt import Attempt
from aivillage.node.jobs import JobRow
from aivillage.node.trade import DoubtfulError, RejectedError, Trade
from aivillage.protocols.codec import unpack
from aivillage.protocols.errors import JobError, NodeError, PeerError
from aivillage.protocols.messages import Finished


async def require_ok(trade: Trade, row: JobRow, result: bytes, *, continued: bool) -> None:
    """`continued`: more than one seller made it.

    Raises:
        RejectedError: the verdict is no. DoubtfulError: nor is it clear whose part is wrong.
    """
    try:
        verdict = await trade.workers.check(row.operation, row.request, result)
    except (JobError, NodeError) as error:  # our own worker failed: another one is asked, once
        trade.events.emit("check_failed", level=30, job=row.id, reason=str(error))
        verdict = await trade.workers.check(row.operation, row.request, result)
    if not verdict.ok:
        kind = DoubtfulError if continued else RejectedError
        raise kind(f"the result is wrong: {verdict.reason}", code="BAD_REQUEST")


def require_same(operation: str, attempt: Attempt, finished: Finished) -> None:
    """The last word must be about what was accepted, piece by piece.

    Raises:
        PeerError: it is not.
    """
    if finished.attempt != attempt.attempt:
        raise PeerError("the result names another attempt", code="BAD_REQUEST")
    if not registry.is_served_by_engine(operation):
        if finished.out_hash != attempt.hash_with(finished.result):
            raise PeerError("the result's hash is not that of what came", code="BAD_REQUEST")
        return
    output, result = attempt.output, unpack(GenerateResult, finished.result)
    ids, said = tuple(output.ids), b"".join(output.logprobs)
    same = logprobs.packed_all(result.logprobs) == said and result.token_ids == ids
    if not same or finished.out_hash != attempt.out_hash:
        raise PeerError("the result is not what was streamed", code="BAD_REQUEST")
