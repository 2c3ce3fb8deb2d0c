"""What makes a node reachable that nobody can dial: its relay for others, and its own circuits."""

from __future__ import annotations

from typing import Any

from aivillage.node.addresses import addresses_of
from aivillage.node.circuits import Circuits
from aivillage.node.config import Settings
from aivillage.node.events import Events
from aivillage.node.fares import Fares
from aivillage.node.guard import Tasks
from aivillage.node.herald import Herald
from aivillage.node.jobs import Jobs
from aivillage.node.links import Link, Links
from aivillage.node.punching import Punching
from aivillage.node.relay import Relay, RelayLimits
from aivillage.node.relay_tab import Toll
from aivillage.node.seller import Seller
from aivillage.node.villagers import Villagers
from aivillage.protocols.ports import Book, Transport


class Detours:
    """Built before the links, which dial through it."""

    def __init__(self, transport: Transport, settings: Settings, events: Events) -> None:
        self.circuits = Circuits(transport, events, mode=settings.through_relay)
        self.addresses = addresses_of(transport, settings.announce, self.circuits.addresses)
        self._transport = transport
        self._settings = settings
        self._events = events

    def join(
        self,
        links: Links,
        villagers: Villagers,
        herald: Herald,
        seller: Seller,
        jobs: Jobs,
        book: Book,
        tasks: Tasks,
    ) -> None:
        """Everything is there: relays, and dials for the links, from now on."""
        me, settings = self._transport.peer, self._settings
        toll = Toll(me, book, settings.relay_price_micro_credits_per_gib)
        toll.acquainted = villagers.acquainted
        fares = Fares(
            me, book, settings.relay_price_max_micro_credits_per_gib, settings.ceiling_micro_credits
        )

        def is_busy(link: Link) -> bool:
            return link.waiting or any(sale.link is link for sale in seller.taken())

        self._relay = Relay(
            transport=self._transport, is_member=villagers.is_member, limits=_limits(settings),
            shelf=jobs, events=self._events, incoming=self.circuits.incoming, toll=toll,
        )  # fmt: skip
        self.circuits.join(links, villagers.is_member, tasks, fares)
        self.circuits.meet = Punching(
            self._transport, self._events,
            relay_of=self.circuits.relay_of, is_member=villagers.is_member,
        ).ask  # fmt: skip
        self.circuits.is_busy, self.circuits.on_changed = is_busy, herald.hurry
        for service in (self._relay.run, *self.circuits.services):
            tasks.serve(service)

    def status(self) -> dict[str, Any]:
        """What this node relays for others, and who relays for it."""
        return {
            "carried": self._relay.status(),
            "reachable_through": self.circuits.relays(),
            "paying": {
                fare.relay: {
                    "price_micro_credits_per_gib": fare.price,
                    "counted_bytes": fare.counted_bytes,
                    "micro_credits": fare.amount,
                }
                for fare in self.circuits.fares()
            },
        }


def _limits(settings: Settings) -> RelayLimits | None:
    if not settings.relay:
        return None
    return RelayLimits(
        circuits=settings.relay_circuits,
        bytes_per_second=settings.relay_bytes_per_second,
        bytes_a_day=settings.relay_bytes_a_day,
    )
