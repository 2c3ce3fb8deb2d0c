"""Which offers of a large village a node keeps, and which ones it tells: plain functions.

A view is a sample. What is kept of it is shared out among operations, so that a thousand offers of
one operation leave room for the only one of another; what is told is the rarest first.
"""

from __future__ import annotations

import collections
import functools
import hashlib
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from typing import Final

import msgspec

from aivillage.protocols.errors import PeerError
from aivillage.protocols.messages import HAVE_BYTES, OFFERS_PER_ANSWER_MAX, Offer
from aivillage.protocols.types import PeerId

VIEW_MAX: Final = 128
"""Offers kept; what linked peers offer is kept beyond it. Each costs a check and half a kilobyte a
minute, and a buyer asks three sellers at a time."""
MIX: Final = 4
"""Unknown offers that a full view still asks for: so rare ones come in, and a sample stays one."""
FEW: Final = 16
"""Who knows fewer needs somebody to ask, not the rarest: told in one order, all who come at a time
would crowd around the same few."""
_NAME_BYTES: Final = 8


class Held(msgspec.Struct, frozen=True):
    """An offer, and as its seller signed it."""

    offer: Offer
    envelope: bytes
    moved_unix_ms: int = 0
    """When the first one ends that named the addresses of now; 0: they were never others here."""


class ByteBudget:
    """A token bucket of bytes, full at `BURST_SECONDS` worth of them.

    A quarter of it is there for what is our own: others may ask as much as they like, our offer
    still goes out.
    """

    BURST_SECONDS: Final = 8.0
    OWN_SHARE: Final = 0.25

    def __init__(self, bytes_per_second: float) -> None:
        self._rate = bytes_per_second
        self._full = self._level = bytes_per_second * self.BURST_SECONDS
        self._at = 0.0

    def left_bytes(self, now_seconds: float, *, own: bool = False) -> float:
        """What may be said now, of our own or of others'."""
        earned = max(0.0, now_seconds - self._at) * self._rate
        self._level = min(self._full, self._level + earned)
        self._at = now_seconds
        return self._level if own else self._level - self._full * self.OWN_SHARE

    def take(self, size_bytes: int, now_seconds: float, *, own: bool = False) -> bool:
        """Whether there was so much; then it is spent."""
        if self.left_bytes(now_seconds, own=own) < size_bytes:
            return False
        self._level -= size_bytes
        return True


@functools.lru_cache(maxsize=16_384)
def short_name(seller: PeerId) -> bytes:
    """Eight bytes: two of a million sellers share one with a chance of 3 in 100 million."""
    return hashlib.sha256(seller.encode()).digest()[:_NAME_BYTES]


def said(offers: Iterable[Offer]) -> bytes:
    """What of them an asker has, as it travels."""
    return b"".join(
        short_name(offer.seller) + offer.not_after_unix_ms.to_bytes(HAVE_BYTES - _NAME_BYTES, "big")
        for offer in offers
    )


def heard(have: bytes) -> dict[bytes, int]:
    """Short name -> unix ms until which the asker's version is good.

    Raises:
        PeerError: BAD_REQUEST, it is no whole number of entries.
    """
    if len(have) % HAVE_BYTES:
        raise PeerError("a list of offers that is cut", code="BAD_REQUEST")
    entries = (have[at : at + HAVE_BYTES] for at in range(0, len(have), HAVE_BYTES))
    return {e[:_NAME_BYTES]: int.from_bytes(e[_NAME_BYTES:], "big") for e in entries}


def room(kept: int, most: int) -> int:
    """How many unknown offers a view of `kept` asks for."""
    return max(0, most - kept) + MIX


def rarities(offers: Collection[Offer]) -> dict[PeerId, int]:
    """Seller -> how many sellers here do what the fewest do of what it does."""
    counts = collections.Counter(name for offer in offers for name in _names(offer))
    return {o.seller: min(counts[name] for name in _names(o)) for o in offers}


def _names(offer: Offer) -> set[str]:
    """Its operations; who does nothing does one thing that is called nothing."""
    return {operation.name for operation in offer.operations} or {""}


def crowded_out(
    offers: Collection[Offer],
    is_linked: Callable[[PeerId], bool],
    wanted: Container[str],
    pick: Callable[[Sequence[PeerId]], PeerId],
    most: int,
) -> PeerId | None:
    """Whose offer has to go; None where all fit.

    `pick` takes one, by chance, of those whose operations most others do too; what somebody looks
    for just now goes last, what linked peers offer never.
    """
    loose = [offer for offer in offers if not is_linked(offer.seller)]
    if len(loose) <= most:
        return None
    rare = rarities(offers)

    def worth(offer: Offer) -> tuple[bool, int]:
        return any(name in wanted for name in _names(offer)), -rare[offer.seller]

    least = min(map(worth, loose))
    return pick([o.seller for o in loose if worth(o) == least])


def worth_sending(
    held: Collection[Held],
    theirs: Mapping[bytes, int],
    unknown_most: int,
    now_unix_ms: int,
    bytes_most: float,
    chance: Callable[[], float],
) -> list[Held]:
    """What is news to an asker, the rarest first, then those that live longest.

    Who knows few is told anybody: `chance` gives the order then.
    News of a seller that it knows is what at least doubles the time that it still has, and where
    the seller is now if what the asker has is from before it moved: an old address is of no use.
    """
    chosen: list[Held] = []
    for each in _in_order(held, by_chance=chance if len(theirs) < FEW else None):
        until_ms = theirs.get(short_name(each.offer.seller))
        if until_ms is None:
            if unknown_most <= 0:
                continue
            unknown_most -= 1
        elif until_ms >= each.moved_unix_ms and not _doubles(each.offer, until_ms, now_unix_ms):
            continue
        bytes_most -= len(each.envelope)
        if bytes_most < 0 or len(chosen) == OFFERS_PER_ANSWER_MAX:
            break
        chosen.append(each)
    return chosen


def _in_order(held: Collection[Held], by_chance: Callable[[], float] | None) -> list[Held]:
    if by_chance is not None:
        return sorted(held, key=lambda _each: by_chance())
    rare = rarities([each.offer for each in held])
    return sorted(held, key=lambda h: (rare[h.offer.seller], -h.offer.not_after_unix_ms))


def _doubles(offer: Offer, until_ms: int, now_unix_ms: int) -> bool:
    """Whether it lives twice as long as one that is good until then."""
    return offer.not_after_unix_ms - now_unix_ms >= 2 * max(1, until_ms - now_unix_ms)
