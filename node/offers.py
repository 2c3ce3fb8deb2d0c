"""The offers of others, and who has left: nobody comes back by an old offer.

An offer is its seller's signed word, and anybody may carry it, also late or out of malice. So of
each seller the number of its newest word is remembered for longer than any older one could be
played again. The last word of a node that stops is an offer of nothing, at no address; from then
on only a newer word of its own brings it back, or meeting it. A key that was replaced has no newer
word. What a third peer says of a seller is never looked at: there is no message for it.
"""

from __future__ import annotations

import collections
import time
from typing import Final

import msgspec

from aivillage.models.inference.catalogue import DEFAULT
from aivillage.node.freshness import left_ms
from aivillage.node.views import Held
from aivillage.protocols.messages import Offer, OfferedOperation
from aivillage.protocols.pricing import Terms, Usage
from aivillage.protocols.types import MicroCredits, PeerId, Seconds

OFFERS_MAX: Final = 10_000
DEPARTED_SECONDS: Final[Seconds] = 3600.0
"""More than `freshness.REPLAY_MS_MAX`: a departure outlives every offer from before it."""

SEQ_MAX: Final = 2**53 - 1


class _Live(msgspec.Struct, frozen=True):
    offer: Offer
    envelope: bytes
    ends: float
    slots: int
    """The most free ones that its offers said while we know it: all of them, idle."""
    moved_unix_ms: int = 0
    """As in `Held`."""


class _LastWord(msgspec.Struct, frozen=True):
    seq: int
    until: float
    departed: bool


class Offers:
    """By seller, on this machine's own steady clock."""

    def __init__(self) -> None:
        self._live: dict[PeerId, _Live] = {}
        self._last: collections.OrderedDict[PeerId, _LastWord] = collections.OrderedDict()

    def take(self, offer: Offer, envelope: bytes) -> bool:
        """Keeps an offer that is its seller's newest word; the signature has been checked."""
        now, seller = time.monotonic(), offer.seller
        left = left_ms(offer.not_after_unix_ms, offer.lifetime_ms, int(time.time() * 1000))
        if left is None or offer.seq <= self._barred(seller, now):
            return False
        if is_farewell(offer):
            self._note(seller, _LastWord(offer.seq, now + DEPARTED_SECONDS, departed=True))
            return self._live.pop(seller, None) is not None  # else nobody heard of it by us
        if seller not in self._live and len(self._live) >= OFFERS_MAX:
            self.all()  # forgets the expired ones
            if len(self._live) >= OFFERS_MAX:
                return False
        slots = max(offer.free_slots, self.slots_of(seller))
        moved = _moved(self._live.get(seller), offer)
        self._live[seller] = _Live(offer, envelope, now + left / 1000, slots, moved)
        self._note(seller, _LastWord(offer.seq, now + DEPARTED_SECONDS, departed=False))
        return True

    def met(self, peer: PeerId) -> None:
        """Direct contact overrides whatever was said, and by whom; its next word counts."""
        self._last.pop(peer, None)

    def replaced(self, peer: PeerId) -> None:
        """Its key is no longer in use: whoever still has it has nothing to offer."""
        self._live.pop(peer, None)
        until = time.monotonic() + DEPARTED_SECONDS
        self._note(peer, _LastWord(SEQ_MAX, until, departed=True))

    def has_left(self, peer: PeerId) -> bool:
        """Whether its last word was goodbye."""
        last = self._last.get(peer)
        return last is not None and last.departed and last.until > time.monotonic()

    def drop_stranger(self, peer: PeerId) -> None:
        """Of a stranger that left nothing stays; it never spoke but for itself."""
        live = self._live.get(peer)
        if live is not None and not live.envelope:
            del self._live[peer]

    def all(self) -> list[Offer]:
        """Offers that are still good; expired ones are forgotten."""
        now = time.monotonic()
        self._live = {peer: live for peer, live in self._live.items() if live.ends >= now}
        return [live.offer for live in self._live.values()]

    def held(self) -> list[Held]:
        """The live offers of members as they were signed."""
        self.all()
        return [
            Held(live.offer, live.envelope, live.moved_unix_ms)
            for live in self._live.values()
            if live.envelope
        ]

    def drop(self, peer: PeerId) -> bytes:
        """Makes room: an offer that is there goes, and may come again. Returns its envelope."""
        live = self._live.pop(peer)
        until = time.monotonic() + DEPARTED_SECONDS
        self._note(peer, _LastWord(live.offer.seq - 1, until, departed=False))
        return live.envelope

    def slots_of(self, seller: PeerId) -> int:
        """How many slots it has, as far as its offers showed."""
        live = self._live.get(seller)
        return live.slots if live is not None else 0

    def _barred(self, seller: PeerId, now: float) -> int:
        """The highest number that is old news."""
        last = self._last.get(seller)
        return last.seq if last is not None and last.until > now else -1

    def _note(self, seller: PeerId, word: _LastWord) -> None:
        self._last.pop(seller, None)
        self._last[seller] = word
        if len(self._last) > OFFERS_MAX:
            self._last.popitem(last=False)


def does(offered: OfferedOperation, operation: str, model: str) -> bool:
    """Whether it is this operation, with this model where one is wanted."""
    if offered.name != operation:
        return False
    return not model or model in (offered.models or (DEFAULT,))


def price_offered(offered: OfferedOperation, usage: Usage, model: str) -> MicroCredits:
    """What `usage` costs by an offer, which does not bind: the quote does."""
    prices = terms_offered(offered, model).prices_micro_credits
    return sum(prices.get(unit, 0) * count for unit, count in usage.items())


def terms_offered(offered: OfferedOperation, model: str) -> Terms:
    """The price of each unit of an operation with `model`."""
    prices = offered.prices_micro_credits
    if model in offered.models:
        prices = dict.fromkeys(prices, offered.models[model])
    return Terms(prices_micro_credits=prices)


def _moved(before: _Live | None, offer: Offer) -> int:
    if before is None:
        return 0
    same = before.offer.addresses == offer.addresses
    return before.moved_unix_ms if same else offer.not_after_unix_ms


def is_farewell(offer: Offer) -> bool:
    """Nothing is offered, and nowhere: an earlier version finds just that in it."""
    return not offer.operations and not offer.addresses
