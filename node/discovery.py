"""Who can do what, at which price, and how well it went so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import msgspec
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aivillage.models.inference.catalogue import DEFAULT
from aivillage.node.choice import UNKNOWN_UNITS_PER_SECOND
from aivillage.node.freshness import LIFETIME_MS_MAX
from aivillage.node.gossip import News
from aivillage.node.identity import peer_of
from aivillage.node.offers import Offers, does
from aivillage.node.records import Record, Work
from aivillage.protocols.codec import pack
from aivillage.protocols.envelope import seal
from aivillage.protocols.messages import Offer, OfferedOperation, OperationInfo, TaskAd
from aivillage.protocols.types import MicroCredits, PeerId, Seconds

OFFER_BYTES_MAX: Final = 1024
UNREACHABLE_SECONDS: Final = 60.0
"""A peer that did not answer is left alone this long, whatever others say of it.

Who has nobody else dials it sooner, where the peer itself has said something new: `reconsider`.
"""
FAREWELL_SECONDS: Final = 120.0
"""As long as an offer: who hears it later hears no older offer either."""


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A peer that says it can do an operation."""

    peer: PeerId
    addresses: tuple[str, ...]
    offered: OfferedOperation
    free_slots: int
    slots: int
    record: Record
    neighbour: bool = False


class _Unreachable(NamedTuple):
    """Until when it is left alone, and the number of its newest offer by then."""

    until: Seconds
    seq: int


class Discovery:
    """Offers heard, which live two minutes, and what was measured of peers."""

    def __init__(self, key: Ed25519PrivateKey, records: dict[PeerId, Record] | None = None) -> None:
        """`records`: what former runs measured."""
        self._key = key
        self.peer = peer_of(key)
        self._offers = Offers()
        self.met, self.has_left = self._offers.met, self._offers.has_left
        self.held, self.offers = self._offers.held, self._offers.all
        self.drop = self._offers.drop
        self.forget = self._offers.drop_stranger
        self._unreachable: dict[PeerId, _Unreachable] = {}
        self.records = {} if records is None else records
        self._seq = int(time.time() * 1000)
        self._changed = trio.Event()
        self.is_neighbour: Callable[[PeerId], bool] = lambda _peer: False

    def record_of(self, peer: PeerId) -> Record:
        return self.records.setdefault(peer, Record())

    def rename(self, old: PeerId, new: PeerId) -> None:
        """A peer changed its key: how it did follows it, and the old key offers nothing."""
        self._offers.replaced(old)
        if old in self.records:
            self.records[new] = self.records.pop(old)

    # ------------------------------------------------------------------ heard
    def accept(self, signer: PeerId, news: News, envelope: bytes) -> bool:
        """Keeps news; False where it is stale, forged in the author's name, or our own.

        Without an envelope it is a stranger's, and for our own ears.
        """
        if isinstance(news, TaskAd):
            return signer == news.buyer != self.peer
        if signer != news.seller or signer == self.peer:
            return False
        if not self._offers.take(news, envelope):
            return False
        self._changed.set()
        self._changed = trio.Event()
        return True

    def candidates(self, operation: str, model: str = "") -> list[Candidate]:
        """Peers that offer `operation`, with `model` where one is named, the best first.

        Not those that were found unreachable just now.
        """
        now = time.monotonic()
        found = [
            Candidate(
                peer=offer.seller,
                addresses=offer.addresses,
                offered=offered,
                free_slots=offer.free_slots,
                slots=self._offers.slots_of(offer.seller),
                record=self.records.get(offer.seller) or Record(),
                neighbour=self.is_neighbour(offer.seller),
            )
            for offer in self.offers()
            for offered in offer.operations
            if does(offered, operation, model) and self._is_worth_asking(offer.seller, now)
        ]
        if len(found) < 2:
            return found
        work = Work(operation, model)
        return sorted(found, key=lambda candidate: _rank(candidate, work))

    def addresses_of(self, seller: PeerId) -> tuple[str, ...]:
        """Where its newest offer says that it is."""
        return next((offer.addresses for offer in self.offers() if offer.seller == seller), ())

    def next_news(self) -> trio.Event:
        """Set at the next offer."""
        return self._changed

    def unreachable(self, peer: PeerId) -> None:
        until = time.monotonic() + UNREACHABLE_SECONDS
        self._unreachable[peer] = _Unreachable(until, self._seq_of(peer))

    def reachable(self, peer: PeerId) -> None:
        """Direct contact overrides what we thought."""
        self._unreachable.pop(peer, None)

    def reconsider(self) -> None:
        """Whoever said something new since we could not reach it is worth one more dial.

        For who found nobody else. Its news makes nobody reachable: it may have been on its way.
        """
        for peer, found in list(self._unreachable.items()):
            if self._seq_of(peer) > found.seq:
                del self._unreachable[peer]

    def _is_worth_asking(self, peer: PeerId, now: float) -> bool:
        found = self._unreachable.get(peer)
        return found is None or found.until <= now

    def _seq_of(self, seller: PeerId) -> int:
        return next((offer.seq for offer in self.offers() if offer.seller == seller), 0)

    # ------------------------------------------------------------------ said
    def make_farewell(self) -> bytes:
        """Our last word: an offer of nothing, at no address."""
        return self.make_offer((), (), 0, FAREWELL_SECONDS)

    def make_offer(
        self,
        operations: Sequence[OperationInfo],
        addresses: Sequence[str],
        free_slots: int,
        lifetime_seconds: Seconds,
    ) -> bytes:
        """An envelope around our offer of at most 1 KiB; what does not fit is not offered.

        The last models go first, then the last operations.
        """
        self._seq += 1
        lifetime_ms = min(int(lifetime_seconds * 1000), LIFETIME_MS_MAX)
        offered = [
            OfferedOperation(
                name=operation.name,
                prices_micro_credits=operation.terms.prices_micro_credits,
                models=_models_offered(operation),
                memory_bytes=operation.memory_bytes,
            )
            for operation in operations
            if operation.terms
        ]
        offer = Offer(
            seller=self.peer,
            seq=self._seq,
            not_after_unix_ms=int(time.time() * 1000) + lifetime_ms,
            lifetime_ms=lifetime_ms,
            addresses=tuple(addresses)[:4],
            operations=tuple(offered),
            free_slots=free_slots,
        )
        while len(pack(offer)) > OFFER_BYTES_MAX and offer.operations:
            offer = _shorter(offer)
        return seal(self._key, "offer", offer)

    def make_task_ad(
        self, operation: str, lifetime_seconds: Seconds, model: str = ""
    ) -> tuple[TaskAd, bytes]:
        """What says: I need `operation` and nobody offers it; and its envelope."""
        self._seq += 1
        ad = TaskAd(
            buyer=self.peer,
            seq=self._seq,
            not_after_unix_ms=int((time.time() + lifetime_seconds) * 1000),
            lifetime_ms=int(lifetime_seconds * 1000),
            operation=operation,
            model=model,
        )
        return ad, seal(self._key, "task", ad)


def _models_offered(operation: OperationInfo) -> dict[str, MicroCredits]:
    """Nothing where it is the one model that is meant where none is said."""
    found = {m.name: max(m.prices_micro_credits.values(), default=0) for m in operation.models}
    return {} if list(found) == [DEFAULT] else found


def _shorter(offer: Offer) -> Offer:
    """Without the last model that is not the only one of its operation, else the last operation."""
    operations = list(offer.operations)
    most = max(range(len(operations)), key=lambda index: len(operations[index].models))
    models = operations[most].models
    if len(models) > 1:
        kept = dict(list(models.items())[:-1])
        operations[most] = msgspec.structs.replace(operations[most], models=kept)
    else:
        operations.pop()
    return msgspec.structs.replace(offer, operations=tuple(operations))


def _rank(candidate: Candidate, work: Work) -> tuple[float, float, bool, int]:
    """Fewer failures first, then measured speed, then members that are linked, then free room."""
    record = candidate.record
    speed = record.speed(work) or UNKNOWN_UNITS_PER_SECOND
    return (round(record.failures, 1), -speed, not candidate.neighbour, -candidate.free_slots)
