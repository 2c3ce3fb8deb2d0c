"""This machine as a candidate for its owner's jobs, once it was measured at such work."""

from __future__ import annotations

from aivillage.node.buyer import Buyer
from aivillage.node.choice import Facts
from aivillage.node.discovery import Discovery
from aivillage.node.market import Need
from aivillage.node.seller import Seller
from aivillage.node.workers import Workers
from aivillage.protocols.errors import AivillageError


class Home:
    """A machine that never did such a job for its owner is no candidate.

    To load a model unasked could make it useless to whoever sits before it; `submit --local` once
    makes it one. What runs here for the owner (`buyer`) and for others (`seller`) is its load.
    """

    def __init__(
        self, workers: Workers, discovery: Discovery, buyer: Buyer, seller: Seller
    ) -> None:
        self._workers = workers
        self._discovery = discovery
        self._buyer = buyer
        self._seller = seller

    def facts(self, need: Need) -> Facts | None:
        """None: this machine cannot do it, or was never measured at it."""
        try:
            self._workers.describe_for(need.operation, need.request)
        except AivillageError:
            return None
        record = self._discovery.records.get(self._discovery.peer)
        speed = record.speed(need.work) if record else 0.0
        if record is None or not speed:
            return None
        return Facts(
            peer=self._discovery.peer,
            units=sum(need.rest.values()),
            units_per_second=speed,
            load=self._buyer.running_here() + len(self._seller.running()),
            rtt_seconds=0.0,
            failures=record.failures,
            here=True,
        )
