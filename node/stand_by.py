"""Another seller that has the model loaded while one answers, so that its loss costs little.

It is asked with a call that may cost nothing: it loads the model, says so, and is let go before it
reads anything. Any seller knows such a call; its owner's limits and its memory decide.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import trio

from aivillage.node.free_call import ASKED_MAX, loaded
from aivillage.node.market import Choice, Here, Need
from aivillage.node.trade import Say, Trade
from aivillage.protocols import messages
from aivillage.protocols.errors import AivillageError, PeerError
from aivillage.protocols.types import PeerId


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
            kernel = await loaded(choice, need.operation, need.request, until=messages.Started)
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
