"""Tells the village what this node does and needs: offers on a beat, on request, to newcomers."""

from __future__ import annotations

import random
from typing import Final

import trio

from aivillage.node.addresses import Addresses
from aivillage.node.discovery import Discovery
from aivillage.node.gossip import Gossiper
from aivillage.node.seller import Seller
from aivillage.protocols.messages import Gossip, TaskAd
from aivillage.protocols.types import PeerId, Seconds

LIVES: Final = 4
"""An offer lives four beats: three may be lost."""
NEWS_FOR_NEWCOMER_MAX: Final = 256
AD_SECONDS: Final = 5.0
"""Between two advertisements of one task, and how long one lives twice over."""
EARLY_SECONDS: Final = 2.0
"""At least, between an offer and an early one: whoever advertises much makes nobody shout."""
ANSWER_SECONDS_MAX: Final = 0.2
"""Answers to an advertisement spread over this, so that a village does not shout at once."""


class Herald:
    """Publishes through the gossiper. `run` is the beat; the rest are plain calls."""

    def __init__(
        self,
        *,
        discovery: Discovery,
        gossiper: Gossiper,
        seller: Seller,
        addresses: Addresses,
        offer_seconds: Seconds,
    ) -> None:
        self._discovery = discovery
        self._gossiper = gossiper
        self._seller = seller
        self._addresses = addresses
        self._offer_seconds = offer_seconds
        self._advertised: dict[str, float] = {}
        self._early = trio.Event()
        discovery.on_wanted = self._on_wanted

    async def run(self) -> None:
        """Offers on a jittered beat, and soon after somebody asked."""
        while True:
            self._early = trio.Event()
            self._gossiper.publish("offer", self._offer())
            earliest = trio.current_time() + EARLY_SECONDS
            with trio.move_on_after(self._offer_seconds * random.uniform(0.8, 1.2)):
                await self._early.wait()
                await trio.sleep_until(earliest)
                await trio.sleep(random.uniform(0, ANSWER_SECONDS_MAX))

    def news_for(self, *, member: bool) -> list[Gossip]:
        """What a fresh neighbour should know: our offer first, then a member all live ones."""
        others = self._discovery.envelopes()[:NEWS_FOR_NEWCOMER_MAX] if member else []
        return [Gossip(topic="offer", envelope=e) for e in (self._offer(), *others)]

    def farewell(self) -> Gossip:
        """Our last word: whoever hears of us from now on hears that we left."""
        return Gossip(topic="offer", envelope=self._discovery.make_farewell())

    def forget(self, stranger: PeerId) -> None:
        self._discovery.forget(stranger)

    def advertise(self, operation: str) -> None:
        """Asks the village who can do `operation`; at most once in a few seconds."""
        now = trio.current_time()
        if now - self._advertised.get(operation, -AD_SECONDS) >= AD_SECONDS:
            self._advertised[operation] = now
            self._gossiper.publish("task", self._discovery.make_task_ad(operation, 2 * AD_SECONDS))

    def _offer(self) -> bytes:
        return self._discovery.make_offer(
            self._seller.operations(),
            self._addresses(),
            self._seller.free_slots(),
            LIVES * self._offer_seconds,
        )

    def _on_wanted(self, ad: TaskAd) -> None:
        if any(operation.name == ad.operation for operation in self._seller.operations()):
            self._early.set()
