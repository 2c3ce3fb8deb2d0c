"""Tells the village what this node does and needs: offers on a beat and to newcomers, and ads."""

from __future__ import annotations

import random
from typing import Final

import msgspec
import trio

from aivillage.node.addresses import Addresses
from aivillage.node.discovery import Discovery
from aivillage.node.exchange import Exchange
from aivillage.node.records import Work
from aivillage.node.seller import Seller
from aivillage.protocols.messages import Gossip
from aivillage.protocols.types import PeerId, Seconds

LIVES: Final = 4
"""An offer lives four beats: three may be lost."""
EARLY_SECONDS: Final = 2.0
"""At least, between an offer and an early one: whoever changes much makes nobody shout."""
AD_SECONDS: Final = 5.0
"""Between two advertisements of one task, and how long one lives twice over."""


ANYTHING: Final = Work("")


class Herald:
    """Publishes through the exchange. `run` is the beat; the rest are plain calls."""

    def __init__(
        self,
        discovery: Discovery,
        exchange: Exchange,
        seller: Seller,
        addresses: Addresses,
        offer_seconds: Seconds,
    ) -> None:
        self._discovery = discovery
        self._exchange = exchange
        self._seller = seller
        self._addresses = addresses
        self._offer_seconds = offer_seconds
        self._advertised: dict[Work, float] = {}
        self._early = trio.Event()
        exchange.search.own_offer = self._offer_of
        self.services = (self.run, exchange.run)

    async def run(self) -> None:
        """Offers on a jittered beat, and soon after a change."""
        while True:
            self._early = trio.Event()
            self._exchange.gossiper.publish(self._offer())
            earliest = trio.current_time() + EARLY_SECONDS
            with trio.move_on_after(self._offer_seconds * random.uniform(0.8, 1.2)):
                await self._early.wait()
                await trio.sleep_until(earliest)

    def for_newcomer(self) -> Gossip:
        """What a fresh neighbour should know of us."""
        return Gossip(topic="offer", envelope=self._offer())

    def farewell(self) -> Gossip:
        """Our last word: whoever hears of us from now on hears that we left."""
        return Gossip(topic="offer", envelope=self._discovery.make_farewell())

    def hurry(self) -> None:
        """What we offer changed: tell it soon."""
        self._early.set()

    def forget(self, stranger: PeerId) -> None:
        self._discovery.forget(stranger)

    def advertise(self, work: Work) -> None:
        """Asks the village who can do `work`; at most once in a few seconds."""
        now = trio.current_time()
        if now - self._advertised.get(work, -AD_SECONDS) >= AD_SECONDS:
            self._advertised[work] = now
            ad, envelope = self._discovery.make_task_ad(work.operation, 2 * AD_SECONDS, work.model)
            self._exchange.search.advertise(ad, envelope)

    def _offer(self, first: Work = ANYTHING) -> bytes:
        """Our offer; if not all of it fits, then at least `first`."""
        operations = [
            msgspec.structs.replace(
                each, models=tuple(sorted(each.models, key=lambda model: model.name != first.model))
            )
            for each in self._seller.operations()
        ]
        return self._discovery.make_offer(
            sorted(operations, key=lambda operation: operation.name != first.operation),
            self._addresses(),
            self._seller.free_slots(),
            LIVES * self._offer_seconds,
        )

    def _offer_of(self, work: Work) -> bytes | None:
        does = any(
            each.name == work.operation
            and (not each.models or not work.model or work.model in {m.name for m in each.models})
            for each in self._seller.operations()
        )
        return self._offer(work) if does else None
