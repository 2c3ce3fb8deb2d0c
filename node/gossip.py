"""Small signed news, passed from neighbour to neighbour over the links that are open anyway.

A flood with a memory: each envelope is verified once, kept if it is news, and passed on to every
other member of the village that is linked. Offers and task advertisements are the only news; both
are small and expire. A stranger speaks for itself only: its own offer is heard while it is linked
and goes no further, so that nobody's thousand identities hide a real seller.
"""

from __future__ import annotations

import collections
import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import msgspec

from aivillage.node.freshness import left_ms
from aivillage.protocols.envelope import unseal
from aivillage.protocols.errors import PeerError, RequestError
from aivillage.protocols.messages import Frame, Gossip, Offer, TaskAd
from aivillage.protocols.types import PeerId

GOSSIP_BYTES_MAX: Final = 1024 + 256
"""An offer of 1 KiB and its envelope."""
HOPS_MAX: Final = 8
"""Enough for any village; a longer way is a loop."""
SEEN_MAX: Final = 16_384
NEWS_PER_SECOND: Final = 50
"""Verified per neighbour: 50 x 0.11 ms is half a percent of a core."""

DOMAINS: Final[dict[str, type[Offer] | type[TaskAd]]] = {"offer": Offer, "task": TaskAd}
News = Offer | TaskAd


class Neighbour(Protocol):
    """What gossip needs of a link."""

    @property
    def peer(self) -> PeerId: ...
    def send(self, message: Frame) -> None: ...


class Gossiper:
    """Spreads news; `accept` says whether it is news to us (and so worth passing on)."""

    def __init__(
        self,
        neighbours: Callable[[], Sequence[Neighbour]],
        is_member: Callable[[PeerId], bool],
        accept: Callable[[PeerId, News, bytes], bool],
    ) -> None:
        self._neighbours = neighbours
        self._is_member = is_member
        self._accept = accept
        self._seen: collections.OrderedDict[bytes, None] = collections.OrderedDict()
        self._budget: dict[PeerId, tuple[float, float]] = {}
        self.dropped = 0

    def publish(self, topic: str, envelope: bytes) -> None:
        """Sends news of our own: what we do to everybody linked, what we need to members."""
        gossip = Gossip(topic=topic, envelope=envelope)
        self._remember(gossip)
        for neighbour in self._neighbours():
            if topic == "offer" or self._is_member(neighbour.peer):
                send_or_drop(neighbour, gossip)

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
        if kind is None or gossip.hops > HOPS_MAX or self._has_seen(gossip):
            return  # a topic of a newer version, a loop, or nothing new
        if not self._within_budget(source):
            self.dropped += 1  # not remembered: another neighbour may bring it
            return
        self._remember(gossip)
        signer, news = unseal(gossip.envelope, gossip.topic, kind)
        if self._is_current(news) and self._accept(signer, news, gossip.envelope):
            self._spread(msgspec.structs.replace(gossip, hops=gossip.hops + 1), without=source)

    def forget(self, peer: PeerId) -> None:
        self._budget.pop(peer, None)

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

    def _spread(self, gossip: Gossip, *, without: PeerId) -> None:
        for neighbour in self._neighbours():
            if neighbour.peer != without and self._is_member(neighbour.peer):
                send_or_drop(neighbour, gossip)

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


def send_or_drop(neighbour: Neighbour, message: Frame) -> bool:
    """Sends to a neighbour that may just have gone, or take no frames of this size.

    Its link reports a loss itself; what a neighbour does not take, it does without.
    """
    try:
        neighbour.send(message)
    except (PeerError, RequestError):
        return False
    return True
