"""The owner's limits, over the control socket: stop, go on, what is in force, and prices."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec
import trio

from aivillage.node import limits
from aivillage.node.config import Settings
from aivillage.node.desk import PEERS_LISTED_MAX, Desk
from aivillage.node.gate import Gate
from aivillage.node.limits import Day, Limits, Pause
from aivillage.node.pricelist import PriceList, listed
from aivillage.node.workers import Workers
from aivillage.protocols.errors import RequestError

PAUSE_SECONDS_MAX: Final = 366 * 86_400.0
_AT_START: Final = (
    "serve",
    "slots",
    "price_percent",
    "worker_memory_mb",
    "worker_cores",
    "worker_threads",
    "worker_nice",
    "blob_bytes_max",
    "blob_store_bytes_max",
)
"""Settings that limit others too, and want a restart."""


class LimitsDesk:
    """Answers by name; `handlers()` is the table that the control socket serves."""

    def __init__(
        self, gate: Gate, desk: Desk, settings: Settings, prices: PriceList, workers: Workers
    ) -> None:
        self._prices = prices
        self._workers = workers
        self._gate = gate
        self._desk = desk
        self._settings = settings

    def handlers(self) -> dict[str, Callable[[dict[str, Any]], Awaitable[Any]]]:
        """What can be asked, by name."""
        return {
            "pause": self.on_pause,
            "resume": self.on_resume,
            "limits": self.on_limits,
            "limits_set": self.on_limits_set,
            "price": self.on_price,
            "price_set": self.on_price_set,
        }

    async def on_pause(self, args: dict[str, Any]) -> dict[str, Any]:
        """No work for others from now on, for so many seconds or until `resume`."""
        seconds, until = args.get("seconds"), None
        if seconds is not None:
            if not 0 < float(seconds) <= PAUSE_SECONDS_MAX:
                raise RequestError(
                    f"a pause of {float(seconds):g} s makes no sense",
                    next_step="--for 2h; without it the pause lasts until `resume`",
                )
            until = self._gate.now().timestamp() + float(seconds)
        running = len(self._desk.seller.taken())
        await self._gate.set_pause(Pause(until))
        return {"paused": True, "until_unix": until, "ended": running}

    async def on_resume(self, _args: dict[str, Any]) -> dict[str, Any]:
        """Work for others again, as far as other limits let."""
        was_paused = self._gate.pause is not None
        await self._gate.set_pause(None)
        refusal = self._desk.seller.refusal()
        return {"was_paused": was_paused, "refusal": refusal.message if refusal else None}

    async def on_limits(self, _args: dict[str, Any]) -> dict[str, Any]:
        """What is in force, what is so now, and why work is refused."""
        gate, refusal, day = self._gate, self._desk.seller.refusal(), self._gate.day
        everything = Limits(mains_only=True, busy_cores_max=0.0, disk_bytes_max=0)
        now = trio.current_time()
        facts = await trio.to_thread.run_sync(gate.read_facts, everything, now)
        settings = msgspec.to_builtins(self._settings)
        return {
            "refusal": refusal
            and {"code": refusal.code, "message": refusal.message, "next_step": refusal.next_step},
            "reasons": gate.reasons(),
            "paused": None if gate.pause is None else {"until_unix": gate.pause.until_unix},
            "limits": msgspec.to_builtins(gate.limits),
            "now": {
                "local_time": gate.now().isoformat(" ", "minutes"),
                "on_mains": facts.on_mains,
                "busy_cores": None if facts.busy_cores is None else round(facts.busy_cores, 2),
                "disk_bytes": facts.disk_bytes,
                "day_micro_credits": day.total,
                "peer_day_micro_credits": _most(day),
            },
            "unknown": limits.unknown(gate.limits, facts),
            "at_start": {key: settings[key] for key in _AT_START},
            "blocked": [view.peer for view in self._desk.ledger.views() if view.blocked],
        }

    async def on_limits_set(self, args: dict[str, Any]) -> dict[str, Any]:
        """Each key to the value as it was typed."""
        words = {str(key): str(text) for key, text in args["words"].items()}
        await self._gate.set_limits(limits.changed(self._gate.limits, words, self._operations()))
        return await self.on_limits({})

    async def on_price(self, _args: dict[str, Any]) -> list[dict[str, Any]]:
        """What each operation costs here, by unit, and why; and what is carried as a relay."""
        return [
            *(
                {
                    "operation": operation.name,
                    "enabled": operation.enabled,
                    "default_micro_credits": dict(listed(operation).prices_micro_credits),
                    "price_micro_credits": dict(self._prices.terms(operation).prices_micro_credits),
                    "models": {
                        model.name: max(model.prices_micro_credits.values())
                        for model in self._prices.priced(operation).models
                    },
                    "percent": self._settings.price_percent,
                    "floor_percent": self._gate.floor_percent(operation.name),
                }
                for operation in self._workers.operations()
            ),
            self._relaying(),
        ]

    def _relaying(self) -> dict[str, Any]:
        """It is no operation: its price is a setting of its own."""
        price = self._settings.relay_price_micro_credits_per_gib
        return {
            "operation": "relaying",
            "enabled": self._settings.relay,
            "default_micro_credits": {"gib": Settings().relay_price_micro_credits_per_gib},
            "price_micro_credits": {"gib": price},
            "percent": 100,
            "floor_percent": 0,
            "setting": "relay_price_micro_credits_per_gib",
        }

    async def on_price_set(self, args: dict[str, Any]) -> list[dict[str, Any]]:
        """Never cheaper than so many per cent of the default price, from the next call on."""
        name, percent = str(args["operation"]), int(args["floor_percent"])
        wanted = limits.with_floor(self._gate.limits, name, percent, self._operations())
        await self._gate.set_limits(wanted)
        self._prices.withdraw(name)
        return await self.on_price({})

    def _operations(self) -> set[str]:
        return {operation.name for operation in self._workers.operations()}


def _most(day: Day) -> dict[str, int]:
    """Who took most today, and how much."""
    peers = sorted(day.peers.items(), key=lambda entry: -entry[1])[:PEERS_LISTED_MAX]
    return {peer or "strangers": taken for peer, taken in peers}
