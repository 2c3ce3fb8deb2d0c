"""The node's models, over the control socket: what is offered, loaded, and why not."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from aivillage.models import registry
from aivillage.node.pricelist import PriceList
from aivillage.node.shelf import listed_with
from aivillage.node.warmth import Warm
from aivillage.node.workers import Workers
from aivillage.protocols.prefixes import PrefixTokens


class ModelsDesk:
    """Answers by name; `handlers()` is the table that the control socket serves."""

    def __init__(self, prices: PriceList, workers: Workers) -> None:
        self._prices = prices
        self._workers = workers

    def handlers(self) -> dict[str, Callable[[dict[str, Any]], Awaitable[Any]]]:
        """What can be asked, by name."""
        return {"models": self.on_models}

    async def on_models(self, _args: dict[str, Any]) -> list[dict[str, Any]]:
        """Every model that is here: price of a token, loaded or not, and why it is not offered."""
        shelf = self._workers.shelf
        warm = {model.name: model for model in self._workers.warm()}
        sold = {model.name for model in shelf.sold()}
        found = []
        for model in shelf.all():
            why = shelf.why_not(model)
            info = self._workers.describe(registry.operation_of(model.format))
            terms = self._prices.terms(listed_with(info, [model]))
            found.append(
                {
                    "name": model.name,
                    "price_micro_credits": max(terms.prices_micro_credits.values()),
                    "is_offered": model.name in sold,
                    "why_not": why.message if why else "",
                    "memory_bytes": model.memory_bytes,
                    "is_loaded": model.name in warm,
                    "is_busy": model.name in warm and warm[model.name].is_busy,
                    "device": warm[model.name].device if model.name in warm else "",
                }
                | _figures(warm.get(model.name))
            )
        return found


def _figures(warm: Warm | None) -> dict[str, Any]:
    """Of a loaded model; nothing of one that is not."""
    prefix = warm.prefix_tokens if warm else PrefixTokens()
    return {
        "worth": round(warm.worth, 3) if warm else 0.0,
        "load_seconds": round(warm.load_seconds, 3) if warm else 0.0,
        "prefix_tokens_read": prefix.read,
        "prefix_tokens_reused": prefix.reused,
    }
