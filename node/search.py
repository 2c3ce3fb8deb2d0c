"""Looks for a seller that nobody here knows: an ad walks from member to member, its answer back.

Whoever meets the ad and does the operation, or knows an offer of it, sends that offer to whom the
ad came from; there it matches the same ad, and so goes on to the buyer. No address is dialled and
nobody asks twice: the cost of one ad is `HOPS_MAX` frames a walker, however large the village.
"""

from __future__ import annotations

import collections
import hashlib
import random
import time
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from aivillage.node.discovery import Discovery
from aivillage.node.freshness import left_ms
from aivillage.node.gossip import HOPS_MAX, Gossiper, Neighbour
from aivillage.node.offers import does
from aivillage.node.records import Work
from aivillage.protocols.messages import Gossip, Offer, TaskAd
from aivillage.protocols.types import PeerId

WALKERS: Final = 16
"""Neighbours that a buyer sends one ad to."""
PASSES_MAX: Final = 4
"""Of one ad through one node: whoever sends it again and again makes no flood of it."""
ANSWERS_MAX: Final = 3
"""To one ad from one node: a buyer asks so many at a time."""
ADS_MAX: Final = 1024
"""Under way at a time, 50 a second for twice their life; the oldest goes first."""


class Ad(msgspec.Struct):
    """One ad that came by, or one of ours, which came from nobody."""

    work: Work
    not_after_unix_ms: int
    source: PeerId | None = None
    passes: int = 0
    answers: int = 0


class Search:
    """The ads that are under way."""

    def __init__(
        self, members: Callable[[], Sequence[Neighbour]], gossiper: Gossiper, discovery: Discovery
    ) -> None:
        self._members = members
        self._gossiper = gossiper
        self._discovery = discovery
        self._ads: collections.OrderedDict[bytes, Ad] = collections.OrderedDict()
        self.own_offer: Callable[[Work], bytes | None] = lambda _work: None
        """Our offer of some work, if we do it."""
        gossiper.on_ad = self.on_ad

    def advertise(self, ad: TaskAd, envelope: bytes) -> None:
        """Sends an ad of our own on its ways."""
        gossip = Gossip(topic="task", envelope=envelope)
        self._note(gossip, Ad(Work(ad.operation, ad.model), ad.not_after_unix_ms))
        members = list(self._members())
        for member in random.sample(members, min(WALKERS, len(members))):
            self._gossiper.say(member, gossip, own=True)

    def wanted(self) -> set[str]:
        """Operations that are looked for now, here or by way of us."""
        now = int(time.time() * 1000)
        while self._ads and next(iter(self._ads.values())).not_after_unix_ms < now:
            self._ads.popitem(last=False)
        return {ad.work.operation for ad in self._ads.values() if ad.not_after_unix_ms >= now}

    def on_ad(self, source: PeerId, gossip: Gossip, news: TaskAd | None) -> None:
        """An ad came by: answers it, or sends it on its way."""
        if news is not None:
            now_ms = int(time.time() * 1000)
            left = left_ms(news.not_after_unix_ms, news.lifetime_ms, now_ms) or 0
            self._note(gossip, Ad(Work(news.operation, news.model), now_ms + left, source))
            if self._answer_at_once(self._ads[_name(gossip)]):
                return
        ad = self._ads.get(_name(gossip))
        if ad is None or ad.answers or ad.passes >= PASSES_MAX or gossip.hops >= HOPS_MAX:
            return
        others = [member for member in self._members() if member.peer not in (source, ad.source)]
        if others:
            ad.passes += 1
            onward = msgspec.structs.replace(gossip, hops=gossip.hops + 1)
            self._gossiper.say(random.choice(others), onward)

    def on_offer(self, offer: Offer, envelope: bytes) -> None:
        """An offer came: it goes back the way of each ad that it answers."""
        names = {operation.name for operation in offer.operations}
        if names & self.wanted():
            for ad in self._ads.values():
                if any(does(operation, *ad.work) for operation in offer.operations):
                    self._answer(ad, envelope)

    def _answer_at_once(self, ad: Ad) -> bool:
        """With what we offer ourselves, else with what we have heard of."""
        own = self.own_offer(ad.work)
        if own is not None:
            return self._answer(ad, own)
        for held in self._discovery.held():
            if any(does(operation, *ad.work) for operation in held.offer.operations):
                self._answer(ad, held.envelope)
        return ad.answers > 0

    def _answer(self, ad: Ad, envelope: bytes) -> bool:
        source = next((m for m in self._members() if m.peer == ad.source), None)
        if source is None or ad.answers >= ANSWERS_MAX:
            return False
        if not self._gossiper.say(source, Gossip(topic="offer", envelope=envelope, hops=1)):
            return False
        ad.answers += 1
        return True

    def _note(self, gossip: Gossip, ad: Ad) -> None:
        self._ads[_name(gossip)] = ad
        if len(self._ads) > ADS_MAX:
            self._ads.popitem(last=False)


def _name(gossip: Gossip) -> bytes:
    return hashlib.sha256(gossip.envelope).digest()[:16]
