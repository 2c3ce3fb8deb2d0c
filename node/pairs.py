"""Both books about one pair, side by side: a peer is asked, and told, of its own pair only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec
import trio

from aivillage.ledger.compare import Comparison, Difference, LaneView, View, compare
from aivillage.ledger.ledger import NodeBook
from aivillage.node.gossip import send_or_drop
from aivillage.node.guard import Tasks
from aivillage.node.links import Link
from aivillage.protocols.errors import PeerError, RefusedError
from aivillage.protocols.messages import PAIR_LANES_MAX, PairLane, PairQuestion, PairView

PAIR_MINOR: Final = 1
ANSWER_SECONDS: Final = 30.0
LANE_BYTES: Final = 40
"""Of one lane in a frame, at most."""
OTHER_BYTES: Final = 256
"""Of the rest of the frame."""
DIFFERENCES_MAX: Final = 20
"""Told at a time: a peer may write a view that differs everywhere."""


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """`left_out`: lanes of older boots that did not fit a frame, and were not compared."""

    agree: bool
    first: str
    differences: list[Difference]
    in_transit: int
    left_out: int


class Pairs:
    """Asks peers for their view of the pair, and answers them."""

    def __init__(self, book: NodeBook, tasks: Tasks) -> None:
        self._book = book
        self._tasks = tasks

    def on_question(self, link: Link, question: PairQuestion) -> None:
        self._tasks.start_soon(self._answer, link, question)

    async def _answer(self, link: Link, question: PairQuestion) -> None:
        view = await self._book.pair_view(link.peer)
        send_or_drop(link, said(view, question.id, link.hello.max_frame_bytes))

    async def compare(self, link: Link) -> Compared:
        """How the peer's book and ours differ about the two of us.

        Raises:
            RefusedError: NOT_OFFERED, its node is too old to be asked.
            PeerError: BAD_REQUEST, it answered something else.
            AivillageError: it did not answer.
        """
        if link.hello.minor < PAIR_MINOR:
            raise RefusedError(
                "that node is of an earlier version, and cannot be asked",
                code="NOT_OFFERED",
                next_step="ask its owner to bring it up to date",
            )
        before = await self._book.pair_view(link.peer)
        question = PairQuestion(id=link.next_id())
        theirs = await link.ask(question, timeout_seconds=ANSWER_SECONDS)
        if not isinstance(theirs, PairView):
            raise PeerError("it answered something else", code="BAD_REQUEST")
        after = await self._book.pair_view(link.peer)
        return await trio.to_thread.run_sync(compared, before, after, theirs)


def said(view: View, call: int, frame_bytes_max: int) -> PairView:
    """A view as it travels: the lanes of the newest boots first, as many as fit."""
    fit = (frame_bytes_max - OTHER_BYTES) // LANE_BYTES // 2
    most = max(0, min(PAIR_LANES_MAX, fit))

    def newest(lanes: Sequence[LaneView]) -> tuple[PairLane, ...]:
        # A lane's name begins with the time of its boot.
        ordered = sorted(lanes, key=lambda lane: lane.lane, reverse=True)
        return tuple(PairLane(lane.lane, lane.n, lane.cum) for lane in ordered[:most])

    return PairView(
        id=call,
        balance=view.balance,
        out=newest(view.out),
        into=newest(view.into),
        out_left_out=max(0, len(view.out) - most),
        into_left_out=max(0, len(view.into) - most),
    )


def compared(before: View, after: View, theirs: PairView) -> Compared:
    """`before` and `after`: our view when the peer was asked, and when it had answered.

    What was signed meanwhile is no difference: so of what we are paid the former counts, and of
    what we pay the latter.
    """
    out_floor = theirs.into[-1].lane if theirs.into_left_out and theirs.into else b""
    into_floor = theirs.out[-1].lane if theirs.out_left_out and theirs.out else b""
    out = tuple(lane for lane in after.out if lane.lane >= out_floor)
    into = tuple(lane for lane in before.into if lane.lane >= into_floor)
    left_out = theirs.out_left_out + theirs.into_left_out
    ours = View(
        owner=after.owner,
        peer=after.peer,
        out=out,
        into=into,
        # Its own contradictions stay, whichever lanes are looked at.
        balance=_signed(into, out) + after.balance - _signed(after.into, after.out),
    )
    their_out, their_into = _lanes(theirs.out), _lanes(theirs.into)
    other = View(
        owner=after.peer,
        peer=after.owner,
        out=their_out,
        into=their_into,
        balance=_signed(their_into, their_out) if left_out else theirs.balance,
    )
    return _told(compare(ours, other), left_out)


def _lanes(lanes: Sequence[PairLane]) -> tuple[LaneView, ...]:
    return tuple(LaneView(lane.lane, lane.n, lane.cum) for lane in lanes)


def _signed(into: Sequence[LaneView], out: Sequence[LaneView]) -> int:
    return sum(lane.cum for lane in into) - sum(lane.cum for lane in out)


def _told(found: Comparison, left_out: int) -> Compared:
    return Compared(
        agree=found.agree,
        first="" if found.agree else found.first,
        differences=found.differences[:DIFFERENCES_MAX],
        in_transit=sum(each.amount for each in found.differences if each.in_transit),
        left_out=left_out,
    )
