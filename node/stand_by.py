"""Another seller that has the model loaded while one answers, so that its loss costs little.

It is asked with a call that may cost nothing: it loads the model, says so, and is let go before it
reads anything. Any seller knows such a call; its owner's limits and its memory decide.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Final

import msgspec
import trio

from aivillage.node.attempt import next_frame
from aivillage.node.gossip import send_or_drop
from aivillage.node.market import Choice, Here, Need
from aivillage.node.trade import Say, Trade
from aivillage.protocols import messages
from aivillage.protocols.errors import AivillageError, PeerError
from aivillage.protocols.types import KernelName, PeerId, Seconds

LOAD_SECONDS: Final[Seconds] = 60.0
"""To load a model from a slow disk."""
ASKED_MAX: Final = 3
"""Peers asked, one after the other: all others may be as full."""
_SIGNS_OF_LIFE: Final = (messages.Accepted, messages.Progress)


class StandBy:
    """Of one job, in the nursery of the jobs."""

    def __init__(self, trade: Trade, nursery: trio.Nursery, say: Say) -> None:
        self._trade = trade
        self._nursery = nursery
        self._say = say
        self._refused: dict[PeerId, AivillageError] = {}
        self._scope: trio.CancelScope | None = None
        self.ready: PeerId | None = None

    def prepare(
        self, need: Need, at_work: PeerId, excluded: Mapping[PeerId, AivillageError]
    ) -> None:
        """From now on somebody else than `at_work` is to have the model loaded."""
        self.stop()
        if self.ready == at_work:
            self.ready = None
        if self.ready is None:
            at_once = msgspec.structs.replace(need, is_patient=False, may_stay=False)
            busy = PeerError(f"{at_work[-8:]} answers already", code="BUSY")
            self._scope = trio.CancelScope()
            self._nursery.start_soon(self._seek, at_once, {**excluded, at_work: busy}, self._scope)

    def stop(self) -> None:
        """Nobody is sought any more."""
        if self._scope is not None:
            self._scope.cancel()

    async def choice(self, need: Need, excluded: Mapping[PeerId, AivillageError]) -> Choice | None:
        """The one that is ready, if it still says yes."""
        peer, self.ready = self.ready, None
        if peer is None or peer in excluded:
            return None
        try:
            return await self._trade.market.terms_of(peer, need)
        except AivillageError as error:
            self._tell("stand_by_lost", peer, error.message)
            return None

    async def _seek(
        self, need: Need, excluded: dict[PeerId, AivillageError], scope: trio.CancelScope
    ) -> None:
        with scope:
            try:
                for _ in range(ASKED_MAX):
                    choice = await self._trade.market.choose(need, excluded | self._refused)
                    if isinstance(choice, Here) or await self._is_ready(choice, need):
                        return
            except AivillageError as error:
                self._tell("stand_by_missing", "", error.message)
            except Exception as defect:  # an answer without a stand-by is an answer
                self._trade.events.emit("stand_by_crashed", level=40, error=repr(defect))

    async def _is_ready(self, choice: Choice, need: Need) -> bool:
        peer = choice.link.peer
        try:
            kernel = await loaded(choice, need)
        except AivillageError as error:
            self._refused[peer] = error
            self._tell("stand_by_refused", peer, error.message)
            return False
        self.ready = peer
        self._tell("stand_by_ready", peer, kernel)
        self._say(messages.Progress(id=0, done=0, note=f"{peer[-8:]} stands by, model loaded"))
        return True

    def _tell(self, event: str, peer: str, what: str) -> None:
        self._trade.events.emit(event, peer=peer, what=what)


async def loaded(choice: Choice, need: Need) -> KernelName:
    """What computes the answers of a seller, once it has loaded the model of `need`.

    Raises:
        PeerError: it is gone, is not done in time, or says what cannot be.
        AivillageError: it refused.
    """
    link, call = choice.link, choice.link.next_id()
    inbox = link.open_inbox(call)
    try:
        link.send(
            messages.Call(
                id=call, attempt=secrets.token_bytes(16), operation=need.operation,
                request=need.request, quote_hash=choice.quote_hash,
                ceiling_micro_credits=0, deadline_seconds=LOAD_SECONDS,
            )
        )  # fmt: skip
        with trio.fail_after(LOAD_SECONDS):
            return await _started(inbox)
    except trio.TooSlowError:
        raise PeerError(f"nothing loaded within {LOAD_SECONDS:.0f} s", code="PEER_LOST") from None
    finally:
        send_or_drop(link, messages.Cancel(id=call))
        link.close_inbox(call)


async def _started(inbox: trio.MemoryReceiveChannel[messages.Frame]) -> KernelName:
    while not isinstance(frame := await next_frame(inbox), messages.Started):
        if not isinstance(frame, _SIGNS_OF_LIFE):
            raise PeerError("it did more than load a model", code="BAD_REQUEST")
    return frame.kernel_class
