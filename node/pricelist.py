"""What this node charges: the modules' default prices, scaled by the owner; and signed quotes."""

from __future__ import annotations

import collections
import hashlib
import time
from collections.abc import Callable, Mapping
from typing import Final

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aivillage.models import registry
from aivillage.models.inference.catalogue import DEFAULT
from aivillage.node.identity import peer_of
from aivillage.protocols.envelope import seal, unseal
from aivillage.protocols.errors import PeerError, RefusedError
from aivillage.protocols.messages import OperationInfo, Quote
from aivillage.protocols.pricing import ModelInfo, Terms
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
        percent = 0 if free else self._percent_of(operation)
        return Terms(prices_micro_credits=_scaled(listed(operation).prices_micro_credits, percent))

    def priced(self, operation: OperationInfo) -> OperationInfo:
        """`operation` and each of its models at the owner's prices."""
        percent = self._percent_of(operation)
        models = tuple(
            msgspec.structs.replace(
                model, prices_micro_credits=_scaled(model.prices_micro_credits, percent)
            )
            for model in operation.models
        )
        return msgspec.structs.replace(operation, terms=self.terms(operation), models=models)

    def _percent_of(self, operation: OperationInfo) -> int:
        return max(self._percent, self._floor_percent(operation.name))

    def quote(
        self, operation: OperationInfo, terms: Terms, estimate: dict[str, int], seconds: Seconds
    ) -> bytes:
        """A signed quote, good for a minute and for as many calls as one likes.

        Where `operation` is as one model does it, it is good for that model only.
        """
        model = operation.models[0] if operation.models else ModelInfo(name="")
        quote = Quote(
            seller=peer_of(self._key),
            operation=operation.name,
            terms=terms,
            not_after_unix_ms=int((time.time() + QUOTE_SECONDS) * 1000),
            estimate=estimate,
            seconds=seconds,
            model=model.name,
            active_parameters=model.active_parameters,
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

    def find(self, name: bytes, operation: str, model: str = "") -> Quote:
        """The quote that a call names.

        Raises:
            RefusedError: QUOTE_EXPIRED, not ours, forgotten, over, or for something else.
        """
        quote = self._quotes.get(name)
        is_for_it = quote is not None and (quote.operation, quote.model) == (operation, model)
        if quote and is_for_it and quote.not_after_unix_ms > time.time() * 1000:
            return quote
        raise RefusedError(
            "this quote is not good any more", code="QUOTE_EXPIRED", next_step="ask for a new one"
        )


def _scaled(prices: Mapping[str, int], percent: int) -> dict[str, int]:
    """Rounded up, so that a price never becomes none."""
    return {unit: -(-price * percent // 100) for unit, price in prices.items()}


def listed(operation: OperationInfo) -> Terms:
    """The module's default prices: what work for nothing is worth, on both sides."""
    return operation.terms or Terms(prices_micro_credits={})


def quote_hash(envelope: bytes) -> bytes:
    """What a call and a voucher name a quote by."""
    return hashlib.sha256(envelope).digest()


def listed_by(quote: Quote, operation: OperationInfo) -> Terms:
    """The default prices of what was quoted, also where its model is not here."""
    if not quote.active_parameters:
        return listed(operation)
    module = registry.of_models(operation.name)
    return Terms(prices_micro_credits=module.prices_of(quote.active_parameters))


def read_quote(envelope: bytes, seller: PeerId, operation: str, model: str = "") -> Quote:
    """A peer's quote, checked. Before 1.3 none named its model: there was only the default one.

    Raises:
        PeerError: forged, somebody else's, or for another operation or model.
    """
    signer, quote = unseal(envelope, "quote", Quote)
    is_for_it = not model or (quote.model or DEFAULT) == model
    if signer != seller or quote.seller != seller or quote.operation != operation or not is_for_it:
        raise PeerError("the quote is not the one asked for", code="BAD_REQUEST")
    return quote
