"""Offers of a village of any size, within a budget: each node keeps a view, and asks for news.

A round asks one member, at random, for what it holds that is news to us. Nobody can push offers of
others: a node hears as many as it asked for. Members before 1.2 cannot ask; they are told, by the
same rule and out of the same budget, what they have not been told yet.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from typing import Final

import trio

from aivillage.node import views
from aivillage.node.config import Settings
from aivillage.node.discovery import Discovery
from aivillage.node.gossip import FRAME_BYTES, GOSSIP_BYTES_MAX, Gossiper, send_or_drop
from aivillage.node.guard import Tasks
from aivillage.node.links import Link, Links
from aivillage.node.search import Search
from aivillage.node.views import FEW, VIEW_MAX, ByteBudget, Held
from aivillage.node.villagers import Villagers
from aivillage.protocols.errors import AivillageError, PeerError
from aivillage.protocols.messages import Gossip, Offer, OffersAnswer, OffersQuestion
from aivillage.protocols.types import PeerId

OFFERS_MINOR: Final = 2
ROUNDS_PER_BEAT: Final = 6
"""Questions between two offers of ours: five seconds apart where offers are thirty."""
ANSWER_SECONDS: Final = 5.0
TOLD_MAX: Final = 16
"""Offers that an older member is told in one round."""
ONE_OFFER_BYTES: Final = GOSSIP_BYTES_MAX + FRAME_BYTES


class Exchange:
    """Keeps the view of `discovery` fresh and within its bounds. `run` is the round."""

    def __init__(
        self,
        links: Links,
        villagers: Villagers,
        discovery: Discovery,
        tasks: Tasks,
        settings: Settings,
    ) -> None:
        self._links = links
        self._members, self._is_member = villagers.members, villagers.is_member
        self._discovery = discovery
        self._tasks = tasks
        self._round_seconds = settings.offer_seconds / ROUNDS_PER_BEAT
        self._told: dict[PeerId, dict[bytes, int]] = {}
        self.budget = ByteBudget(settings.gossip_bytes_per_second)
        self.gossiper = Gossiper(links.all, self._is_member, discovery.accept, self.budget)
        self.search = Search(self._members, self.gossiper, discovery)
        self.gossiper.on_offer = self._on_offer

    async def run(self) -> None:
        """Rounds, a jittered while apart."""
        while True:
            await trio.sleep(self._round_seconds * random.uniform(0.8, 1.2))
            members = self._members()
            if members:
                await self._visit(random.choice(members))

    def on_up(self, link: Link) -> None:
        """A fresh member: who knows few asks it at once."""
        if self._is_member(link.peer) and len(self._discovery.held()) < VIEW_MAX // 2:
            self._tasks.start_soon(self._visit, link)

    def on_down(self, link: Link) -> None:
        self._told.pop(link.peer, None)
        self.gossiper.forget(link.peer)

    def on_question(self, link: Link, question: OffersQuestion) -> None:
        """What is news to the asker; to a stranger a village has no offers.

        Whoever has no bytes left for one offer says nothing at all: to enough askers "nothing"
        would cost all that it earns, and none of them would ever hear of anybody.

        Raises:
            PeerError: BAD_REQUEST, what it has cannot be read.
        """
        news: list[Held] = []
        if self._is_member(link.peer):
            news = self._news_for(link, views.heard(question.have), question.room)
        if not news and self._is_short():
            return
        envelopes = tuple(each.envelope for each in news)
        if self.budget.take(sum(map(len, envelopes)) + FRAME_BYTES, time.monotonic()):
            send_or_drop(link, OffersAnswer(id=question.id, envelopes=envelopes))

    async def _visit(self, link: Link) -> None:
        if link.hello.minor < OFFERS_MINOR:
            self._tell(link)
            return
        held = self._discovery.held()
        have = views.said(each.offer for each in held)
        if not self.budget.take(len(have) + FRAME_BYTES, time.monotonic(), own=True):
            return
        question = OffersQuestion(
            id=link.next_id(), have=have, room=views.room(len(held), VIEW_MAX)
        )
        try:
            answer = await link.ask(question, timeout_seconds=ANSWER_SECONDS)
        except AivillageError:
            return  # it is gone or busy: another round asks another one
        try:
            self._take(link, answer)
        except PeerError as error:
            link.fail(error)

    def _take(self, link: Link, answer: object) -> None:
        if not isinstance(answer, OffersAnswer):
            raise PeerError("offers were asked for, something else came", code="BAD_REQUEST")
        for envelope in answer.envelopes:
            self.gossiper.receive(link.peer, Gossip(topic="offer", envelope=envelope, hops=1))

    def _tell(self, link: Link) -> None:
        """Some offers for a member that cannot ask."""
        told = self._told.get(link.peer, {})
        for each in self._news_for(link, told, TOLD_MAX)[:TOLD_MAX]:
            if self.gossiper.say(link, Gossip(topic="offer", envelope=each.envelope, hops=1)):
                told[views.short_name(each.offer.seller)] = each.offer.not_after_unix_ms
        kept = {views.short_name(each.offer.seller) for each in self._discovery.held()}
        self._told[link.peer] = {name: told[name] for name in told.keys() & kept}

    def _news_for(self, link: Link, has: Mapping[bytes, int], unknown_most: int) -> list[Held]:
        """At most half of what the budget has left: whoever asks next gets something too.

        Who knows few gets one offer out of the last bytes, when others get nothing any more.
        """
        now_ms, left = int(time.time() * 1000), self.budget.left_bytes(time.monotonic())
        most = left / 2
        if len(has) < FEW and most < ONE_OFFER_BYTES:
            most, unknown_most = left, min(unknown_most, 1)
        others = [h for h in self._discovery.held() if h.offer.seller != link.peer]
        return views.worth_sending(
            others, has, unknown_most, now_ms, most - FRAME_BYTES, random.random
        )

    def _is_short(self) -> bool:
        return self.budget.left_bytes(time.monotonic()) < ONE_OFFER_BYTES

    def _on_offer(self, offer: Offer, envelope: bytes) -> None:
        """One came in: it may answer an ad, and another one may have to go."""
        self.search.on_offer(offer, envelope)
        offers = [each.offer for each in self._discovery.held()]
        goes = views.crowded_out(
            offers, self._is_linked, self.search.wanted(), random.choice, VIEW_MAX
        )
        if goes is not None:
            self.gossiper.unlearn(self._discovery.drop(goes))

    def _is_linked(self, peer: PeerId) -> bool:
        return self._links.get(peer) is not None
