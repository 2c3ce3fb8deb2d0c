"""Small signed news over the links that are open anyway: offers and task advertisements.

Each envelope is verified once and kept if it is news. Nothing is passed on here: offers of others
are asked for (exchange.py), ads walk (search.py), and all of it spends one budget of bytes. A
stranger speaks for itself only: its own offer is heard while it is linked and goes no further, so
that nobody's thousand identities hide a real seller.
"""

from __future__ import annotations

import collections
import hashlib
import random
import time
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import msgspec

from aivillage.node.freshness import left_ms
from aivillage.node.offers import is_farewell
from aivillage.node.views import ByteBudget
from aivillage.protocols.envelope import unseal
from aivillage.protocols.errors import PeerError, RequestError
from aivillage.protocols.messages import Frame, Gossip, Offer, TaskAd
from aivillage.protocols.types import PeerId

GOSSIP_BYTES_MAX: Final = 1024 + 256
"""An offer of 1 KiB and its envelope."""
HOPS_MAX: Final = 8
"""Of an ad on its way; a longer one is a loop."""
FRESH_MAX: Final = 8
"""Neighbours that hear a fresh offer from its seller, in turn; all others ask for it."""
FRAME_BYTES: Final = 48
"""Of a frame around an envelope: what a budget counts beside it."""
SEEN_MAX: Final = 16_384
NEWS_PER_SECOND: Final = 50
"""Verified per neighbour: 50 x 0.11 ms is half a percent of a core."""

DOMAINS: Final[dict[str, type[Offer] | type[TaskAd]]] = {"offer": Offer, "task": TaskAd}
News = Offer | TaskAd


class Neighbour(Protocol):
    """What gossip needs of a link."""

    @property
    def peer(self) -> PeerId: ...
    def send(self, message: Frame, *, may_ride: bool = False) -> None: ...


class Gossiper:
    """Hears news; `accept` says whether it is news to us."""

    def __init__(
        self,
        neighbours: Callable[[], Sequence[Neighbour]],
        is_member: Callable[[PeerId], bool],
        accept: Callable[[PeerId, News, bytes], bool],
        budget: ByteBudget,
    ) -> None:
        self._neighbours = neighbours
        self._is_member = is_member
        self._accept = accept
        self._said = budget
        self.on_offer: Callable[[Offer, bytes], None] = lambda _offer, _envelope: None
        """A member's, kept; its envelope."""
        self.on_ad: Callable[[PeerId, Gossip, TaskAd | None], None] = lambda _from, _ad, _news: None
        """An ad that came from a neighbour; None inside it: the same as before, on another way."""
        self._seen: collections.OrderedDict[bytes, None] = collections.OrderedDict()
        self._budget: dict[PeerId, tuple[float, float]] = {}
        self._told_at: dict[PeerId, float] = {}
        self.dropped = 0

    def publish(self, envelope: bytes) -> None:
        """A fresh offer of our own, to those neighbours that have not had one for longest."""
        gossip = Gossip(topic="offer", envelope=envelope)
        self._remember(gossip)
        neighbours = list(self._neighbours())
        random.shuffle(neighbours)
        neighbours.sort(key=lambda neighbour: self._told_at.get(neighbour.peer, 0.0))
        for neighbour in neighbours[:FRESH_MAX]:
            if self.say(neighbour, gossip, own=True):
                self._told_at[neighbour.peer] = time.monotonic()

    def say(self, neighbour: Neighbour, gossip: Gossip, *, own: bool = False) -> bool:
        """Sends it if the budget for our own news, or for others', allows."""
        size_bytes = len(gossip.envelope) + FRAME_BYTES
        if not self._said.take(size_bytes, time.monotonic(), own=own):
            return False
        return send_or_drop(neighbour, gossip)

    def receive(self, source: PeerId, gossip: Gossip) -> None:
        """Takes news from a neighbour.

        Raises:
            PeerError: it is malformed or forged; the neighbour should have checked.
        """
        if len(gossip.envelope) > GOSSIP_BYTES_MAX:
            raise PeerError("gossip over its limit", code="TOO_LARGE")
        if not self._is_member(source):
            self._hear_stranger(source, gossip)
            return
        kind = DOMAINS.get(gossip.topic)
        if kind is None or gossip.hops > HOPS_MAX:
            return  # a topic of a newer version, or a loop
        if self._has_seen(gossip):
            if kind is TaskAd:
                self.on_ad(source, gossip, None)
            return
        if not self._within_budget(source):
            self.dropped += 1  # not remembered: another neighbour may bring it
            return
        self._remember(gossip)
        signer, news = unseal(gossip.envelope, gossip.topic, kind)
        if not (self._is_current(news) and self._accept(signer, news, gossip.envelope)):
            return
        if isinstance(news, TaskAd):
            self.on_ad(source, gossip, news)
        elif is_farewell(news):
            self._pass_on(source, gossip)
        else:
            self.on_offer(news, gossip.envelope)

    def _pass_on(self, source: PeerId, farewell: Gossip) -> None:
        """Whoever had the offer tells others that may have it: a view is small, so this is rare."""
        onward = msgspec.structs.replace(farewell, hops=farewell.hops + 1)
        others = [n for n in self._neighbours() if n.peer != source and self._is_member(n.peer)]
        for neighbour in random.sample(others, min(FRESH_MAX, len(others))):
            self.say(neighbour, onward)

    def unlearn(self, envelope: bytes) -> None:
        """An offer that found no room is news when it comes again."""
        self._seen.pop(_name(Gossip(topic="offer", envelope=envelope)), None)

    def forget(self, peer: PeerId) -> None:
        self._budget.pop(peer, None)
        self._told_at.pop(peer, None)

    def _is_current(self, news: News) -> bool:
        now_ms = int(time.time() * 1000)
        return left_ms(news.not_after_unix_ms, news.lifetime_ms, now_ms) is not None

    def _hear_stranger(self, source: PeerId, gossip: Gossip) -> None:
        """Its own offer, which nobody hears from us."""
        if gossip.topic != "offer" or gossip.hops or not self._within_budget(source):
            self.dropped += 1
            return
        signer, news = unseal(gossip.envelope, "offer", Offer)
        if signer == source and self._is_current(news):
            self._accept(signer, news, b"")

    def _has_seen(self, gossip: Gossip) -> bool:
        return _name(gossip) in self._seen

    def _remember(self, gossip: Gossip) -> None:
        self._seen[_name(gossip)] = None
        if len(self._seen) > SEEN_MAX:
            self._seen.popitem(last=False)

    def _within_budget(self, peer: PeerId) -> bool:
        """A token bucket per neighbour, full at one second's worth."""
        now = time.monotonic()
        level, at = self._budget.get(peer, (float(NEWS_PER_SECOND), now))
        level = min(NEWS_PER_SECOND, level + (now - at) * NEWS_PER_SECOND)
        self._budget[peer] = (max(0.0, level - 1), now)
        return level >= 1


def _name(gossip: Gossip) -> bytes:
    """Under a wrong topic the same bytes are other news: nobody can hide them that way."""
    return hashlib.sha256(gossip.topic.encode() + b"\0" + gossip.envelope).digest()[:16]


def send_or_drop(neighbour: Neighbour, message: Frame, *, may_ride: bool = False) -> bool:
    """Sends to a neighbour that may just have gone, or take no frames of this size.

    Its link reports a loss itself; what a neighbour does not take, it does without.
    """
    try:
        neighbour.send(message, may_ride=may_ride)
    except (PeerError, RequestError):
        return False
    return True
