"""Who can do what, at which price, and how well it went so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

import msgspec
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aivillage.node.gossip import News
from aivillage.node.identity import peer_of
from aivillage.protocols.codec import pack
from aivillage.protocols.envelope import seal
from aivillage.protocols.messages import Offer, OfferedOperation, OperationInfo, TaskAd
from aivillage.protocols.types import PeerId, Seconds

OFFERS_MAX: Final = 10_000
OFFER_BYTES_MAX: Final = 1024
UNREACHABLE_SECONDS: Final = 60.0
"""A peer that did not answer is left alone this long, whatever others say of it."""
UNKNOWN_UNITS_PER_SECOND: Final = 5.0
"""A pessimistic guess for a peer never measured: never a veto."""
SMOOTHING: Final = 0.3


class Record(msgspec.Struct):
    """What we saw of a peer ourselves."""

    units_per_second: float = 0.0
    good: int = 0
    bad: int = 0

    def rate(self, *, good: bool, units_per_second: float) -> None:
        """Adds one job; the speed is an exponential mean."""
        self.good += good
        self.bad += not good
        if good and units_per_second > 0:
            old = self.units_per_second or units_per_second
            self.units_per_second = old + SMOOTHING * (units_per_second - old)


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A peer that says it can do an operation."""

    peer: PeerId
    addresses: tuple[str, ...]
    offered: OfferedOperation
    free_slots: int
    slots: int
    record: Record
    neighbour: bool = False


class Discovery:
    """Offers heard, which live two minutes, and what was measured of peers."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.peer = peer_of(key)
        self._offers: dict[PeerId, Offer] = {}
        self._envelopes: dict[PeerId, bytes] = {}
        self._slots: dict[PeerId, int] = {}
        """The most free ones that each peer's offers said while we know it: all of them, idle."""
        self._unreachable_until: dict[PeerId, float] = {}
        self.records: dict[PeerId, Record] = {}
        self._seq = int(time.time() * 1000)
        self._changed = trio.Event()
        self.is_neighbour: Callable[[PeerId], bool] = lambda _peer: False
        self.on_wanted: Callable[[TaskAd], None] = lambda _ad: None

    def record_of(self, peer: PeerId) -> Record:
        return self.records.setdefault(peer, Record())

    def rename(self, old: PeerId, new: PeerId) -> None:
        """A peer changed its key: how it did follows it."""
        if old in self.records:
            self.records[new] = self.records.pop(old)

    # ------------------------------------------------------------------ heard
    def accept(self, signer: PeerId, news: News, envelope: bytes) -> bool:
        """Keeps news; False where it is stale, forged in the author's name, or our own.

        Without an envelope it is a stranger's, and for our own ears.
        """
        if isinstance(news, TaskAd):
            if signer != news.buyer or signer == self.peer:
                return False
            self.on_wanted(news)
            return True
        if signer != news.seller or signer == self.peer:
            return False
        old = self._offers.get(signer)
        if not old and len(self._offers) >= OFFERS_MAX:
            self.offers()  # forgets the expired ones
        if (old and old.seq >= news.seq) or (not old and len(self._offers) >= OFFERS_MAX):
            return False
        self._offers[signer] = news
        self._envelopes[signer] = envelope
        self._slots[signer] = max(news.free_slots, self._slots.get(signer, 0))
        self._changed.set()
        self._changed = trio.Event()
        return True

    def offers(self) -> list[Offer]:
        """Offers that are still good; expired ones are forgotten."""
        now = int(time.time() * 1000)
        self._offers = {p: o for p, o in self._offers.items() if o.not_after_unix_ms >= now}
        self._envelopes = {p: self._envelopes[p] for p in self._offers}
        self._slots = {p: self._slots[p] for p in self._offers}
        return list(self._offers.values())

    def envelopes(self) -> list[bytes]:
        """The live offers as their sellers signed them, for a newcomer."""
        self.offers()
        return [envelope for envelope in self._envelopes.values() if envelope]

    def forget(self, peer: PeerId) -> None:
        """Drops the offer of a stranger that left."""
        if self._envelopes.get(peer) == b"":
            del self._offers[peer], self._envelopes[peer], self._slots[peer]

    def candidates(self, operation: str) -> list[Candidate]:
        """Peers that offer `operation` and were not found unreachable just now, best first."""
        now = time.monotonic()
        found = [
            Candidate(
                peer=offer.seller,
                addresses=offer.addresses,
                offered=offered,
                free_slots=offer.free_slots,
                slots=self._slots[offer.seller],
                record=self.records.get(offer.seller) or Record(),
                neighbour=self.is_neighbour(offer.seller),
            )
            for offer in self.offers()
            for offered in offer.operations
            if offered.name == operation and self._unreachable_until.get(offer.seller, 0) <= now
        ]
        return sorted(found, key=_rank)

    def next_news(self) -> trio.Event:
        """Set at the next offer."""
        return self._changed

    def unreachable(self, peer: PeerId) -> None:
        self._unreachable_until[peer] = time.monotonic() + UNREACHABLE_SECONDS

    def reachable(self, peer: PeerId) -> None:
        """Direct contact overrides what we thought."""
        self._unreachable_until.pop(peer, None)

    # ------------------------------------------------------------------ said
    def make_offer(
        self,
        operations: Sequence[OperationInfo],
        addresses: Sequence[str],
        free_slots: int,
        lifetime_seconds: Seconds,
    ) -> bytes:
        """An envelope around our offer of at most 1 KiB; what does not fit is not offered."""
        self._seq += 1
        offered = [
            OfferedOperation(
                name=operation.name,
                prices_micro_credits=operation.terms.prices_micro_credits,
            )
            for operation in operations
            if operation.terms
        ]
        offer = Offer(
            seller=self.peer,
            seq=self._seq,
            not_after_unix_ms=int((time.time() + lifetime_seconds) * 1000),
            addresses=tuple(addresses)[:4],
            operations=tuple(offered),
            free_slots=free_slots,
        )
        while len(pack(offer)) > OFFER_BYTES_MAX and offer.operations:
            offer = msgspec.structs.replace(offer, operations=offer.operations[:-1])
        return seal(self._key, "offer", offer)

    def make_task_ad(self, operation: str, lifetime_seconds: Seconds) -> bytes:
        """An envelope that says: I need `operation` and nobody offers it."""
        self._seq += 1
        return seal(
            self._key,
            "task",
            TaskAd(
                buyer=self.peer,
                seq=self._seq,
                not_after_unix_ms=int((time.time() + lifetime_seconds) * 1000),
                operation=operation,
            ),
        )


def _rank(candidate: Candidate) -> tuple[float, float, bool, int]:
    """Fewer failures first, then measured speed, then members that are linked, then free room."""
    record = candidate.record
    failures = record.bad / (record.good + record.bad + 2)
    speed = record.units_per_second or UNKNOWN_UNITS_PER_SECOND
    return (round(failures, 1), -speed, not candidate.neighbour, -candidate.free_slots)
