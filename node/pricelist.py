"""What this node charges: the modules' default prices, scaled by the owner; and signed quotes."""

from __future__ import annotations

import collections
import hashlib
import time
from collections.abc import Callable
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aivillage.node.identity import peer_of
from aivillage.protocols.envelope import seal, unseal
from aivillage.protocols.errors import PeerError, RefusedError
from aivillage.protocols.messages import OperationInfo, Quote
from aivillage.protocols.pricing import Terms
from aivillage.protocols.types import PeerId, Seconds

QUOTE_SECONDS: Final = 60.0
QUOTES_MAX: Final = 4096


class PriceList:
    """Posts terms and remembers the quotes that are still good."""

    def __init__(
        self,
        key: Ed25519PrivateKey,
        price_percent: int,
        floor_percent: Callable[[str], int] = lambda _operation: 0,
    ) -> None:
        """`floor_percent`: the least that the owner takes for an operation, whatever the rest."""
        self._key = key
        self._percent = price_percent
        self._floor_percent = floor_percent
        self._quotes: collections.OrderedDict[bytes, Quote] = collections.OrderedDict()

    def terms(self, operation: OperationInfo, *, free: bool = False) -> Terms:
        """The owner's price of each unit: rounded up, so that a price never becomes none.

        `free`: for whom it is done for nothing.
        """
        default = listed(operation).prices_micro_credits
        percent = 0 if free else max(self._percent, self._floor_percent(operation.name))
        return Terms(prices_micro_credits={u: -(-p * percent // 100) for u, p in default.items()})

    def quote(
        self, operation: OperationInfo, terms: Terms, estimate: dict[str, int], seconds: Seconds
    ) -> bytes:
        """A signed quote, good for a minute and for as many calls as one likes."""
        quote = Quote(
            seller=peer_of(self._key),
            operation=operation.name,
            terms=terms,
            not_after_unix_ms=int((time.time() + QUOTE_SECONDS) * 1000),
            estimate=estimate,
            seconds=seconds,
        )
        envelope = seal(self._key, "quote", quote)
        self._quotes[quote_hash(envelope)] = quote
        if len(self._quotes) > QUOTES_MAX:
            self._quotes.popitem(last=False)
        return envelope

    def withdraw(self, operation: str) -> None:
        """Its price changed: no call begins at the old one any more."""
        for name in [n for n, quote in self._quotes.items() if quote.operation == operation]:
            del self._quotes[name]

    def find(self, name: bytes, operation: str) -> Quote:
        """The quote that a call names.

        Raises:
            RefusedError: QUOTE_EXPIRED, not ours, forgotten, over, or for something else.
        """
        quote = self._quotes.get(name)
        if quote and quote.operation == operation and quote.not_after_unix_ms > time.time() * 1000:
            return quote
        raise RefusedError(
            "this quote is not good any more", code="QUOTE_EXPIRED", next_step="ask for a new one"
        )


def listed(operation: OperationInfo) -> Terms:
    """The module's default prices: what work for nothing is worth, on both sides."""
    return operation.terms or Terms(prices_micro_credits={})


def quote_hash(envelope: bytes) -> bytes:
    """What a call and a voucher name a quote by."""
    return hashlib.sha256(envelope).digest()


def read_quote(envelope: bytes, seller: PeerId, operation: str) -> Quote:
    """A peer's quote, checked.

    Raises:
        PeerError: forged, somebody else's, or for another operation.
    """
    signer, quote = unseal(envelope, "quote", Quote)
    if signer != seller or quote.seller != seller or quote.operation != operation:
        raise PeerError("the quote is not the one asked for", code="BAD_REQUEST")
    return quote
