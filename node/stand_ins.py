"""Who has the layers of a split answer's stages loaded already, should one of them be lost.

While an answer is computed, a peer outside of it is asked to load the layers of each stage. That
is a call that nothing is fed to: it costs its buyer nothing, and its seller's owner may refuse it.
What was loaded stays for the next answers too, so this outlives the job that asked for it.
"""

from __future__ import annotations

import collections
from collections.abc import Collection, Sequence
from typing import Final

import msgspec
import trio

from aivillage.models.inference import stages
from aivillage.models.inference.catalogue import KnownModel
from aivillage.models.inference.stages import StageRequest
from aivillage.node.free_call import ASKED_MAX, loaded
from aivillage.node.link import Link
from aivillage.node.market import Need
from aivillage.node.split_plan import STAGES_A_PEER, Placed, stand_bys
from aivillage.node.stage_peers import stage_peers
from aivillage.node.trade import Trade
from aivillage.protocols.codec import pack
from aivillage.protocols.errors import AivillageError, PeerError
from aivillage.protocols.messages import Finished
from aivillage.protocols.types import KernelName, PeerId, Seconds

READY_SECONDS: Final[Seconds] = 300.0
"""Then it is asked again: half of the time after which an idle worker ends."""
REFUSED_SECONDS: Final[Seconds] = 60.0
"""How long whoever said no is not asked."""
READY_MAX: Final = 64
"""Stages of plans of late; one that was forgotten is asked for again, which costs a message."""

Layers = tuple[str, int, int]
Staged = tuple[Placed, KernelName]
"""A stage, and what computes it: whoever stands in gives the same bits."""


class Ready(msgspec.Struct, frozen=True):
    """`link` is the one that it was asked over: a peer that was lost since has nothing loaded."""

    link: Link
    kernel: KernelName
    at: Seconds


class StandIns:
    """One task a model while there is something to prepare, in the nursery given."""

    def __init__(self, trade: Trade, nursery: trio.Nursery) -> None:
        self._trade = trade
        self._nursery = nursery
        self._ready: collections.OrderedDict[Layers, Ready] = collections.OrderedDict()
        self._refused: dict[PeerId, Seconds] = {}
        """Until when each is left in peace."""
        self._chains: dict[str, tuple[Placed, ...]] = {}
        self._wanted: dict[str, tuple[tuple[Staged, ...], Collection[PeerId]]] = {}

    def ready(self, model: str, placed: Placed, kernel: KernelName) -> PeerId | None:
        """Who has these layers loaded, and computes them with these bits."""
        found = self._ready.get((model, placed.first, placed.last))
        if found is None or found.link.closed_because or found.link.peer == placed.peer:
            return None
        fresh = trio.current_time() - found.at < READY_SECONDS
        return found.link.peer if fresh and found.kernel == kernel else None

    def before(self, model: str) -> tuple[Placed, ...]:
        """The stages of its last answer, as they were in the end: these are loaded."""
        return self._chains.get(model, ())

    def prepare(
        self, model: KnownModel, chain: Sequence[Staged], excluded: Collection[PeerId] = ()
    ) -> None:
        """From now on somebody outside of `chain` is to stand by for each of its stages."""
        runs = model.name in self._wanted
        self._chains[model.name] = tuple(placed for placed, _ in chain)
        self._wanted[model.name] = tuple(chain), frozenset(excluded)
        if not runs:
            self._nursery.start_soon(self._run, model)

    async def _run(self, model: KnownModel) -> None:
        """Until what is wanted last was looked at."""
        try:
            done = None
            while (wanted := self._wanted[model.name]) is not done:
                for staged in wanted[0]:
                    if self._wanted[model.name] is wanted:
                        await self._prepare(model, staged, *wanted)
                done = wanted
            ready = [self.ready(model.name, *staged) for staged in done[0]]
            self._trade.events.emit(
                "stand_ins_sought", stages=len(ready), ready=len([*filter(None, ready)])
            )
        except Exception as defect:  # an answer without a stand-in is an answer
            self._trade.events.emit("stand_ins_crashed", level=40, error=repr(defect))
        finally:
            del self._wanted[model.name]

    async def _prepare(
        self,
        model: KnownModel,
        staged: Staged,
        chain: Sequence[Staged],
        excluded: Collection[PeerId],
    ) -> None:
        placed, kernel = staged
        if self.ready(model.name, placed, kernel):
            return
        busy = collections.Counter({one.peer: STAGES_A_PEER for one, _ in chain})
        busy.update(filter(None, (self.ready(model.name, *other) for other in chain)))
        peers = stage_peers(self._trade, model, {*excluded, *self._unwilling()})
        for one in stand_bys(model, peers, placed, busy)[:ASKED_MAX]:
            try:
                await self._ask(model, one.peer, placed, kernel)
            except AivillageError as error:
                self._refused[one.peer] = trio.current_time() + REFUSED_SECONDS
                self._say("stand_in_refused", placed, one.peer, error.message)
            else:
                self._say("stand_in_ready", placed, one.peer)
                return

    async def _ask(
        self, model: KnownModel, peer: PeerId, placed: Placed, kernel: KernelName
    ) -> None:
        """Raises: AivillageError: it cannot be this stage's stand-in."""
        request = StageRequest(
            first=placed.first, last=placed.last, model=model.name, rows=1, ahead=True,
            shape=stages.shape_said(model),
        )  # fmt: skip
        nothing = stages.units(0, 0)
        need = Need(
            operation=stages.OPERATION, request=pack(request),
            usage=nothing, done={}, budget=0, peer=peer,
        )  # fmt: skip
        choice = await self._trade.market.terms_of(peer, need)
        computes = await loaded(choice, need.operation, need.request, until=Finished)
        if computes != kernel:
            raise PeerError("it computes these layers with other bits", code="BAD_REQUEST")
        layers = model.name, placed.first, placed.last
        self._ready.pop(layers, None)
        self._ready[layers] = Ready(choice.link, computes, trio.current_time())
        if len(self._ready) > READY_MAX:
            self._ready.popitem(last=False)

    def _unwilling(self) -> list[PeerId]:
        """Who said no a moment ago."""
        now = trio.current_time()
        self._refused = {peer: until for peer, until in self._refused.items() if until > now}
        return [*self._refused]

    def _say(self, event: str, placed: Placed, peer: PeerId, reason: str = "") -> None:
        layers = f"{placed.first}-{placed.last - 1}"
        self._trade.events.emit(event, peer=peer, layers=layers, reason=reason)
