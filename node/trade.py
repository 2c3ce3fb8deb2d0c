"""What a job needs of the node, and what its owner hears in the end."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec
import trio

from aivillage.node.attempt import Attempt
from aivillage.node.discovery import Discovery
from aivillage.node.events import Events
from aivillage.node.jobs import JobRow, Jobs
from aivillage.node.link import Link
from aivillage.node.market import Market
from aivillage.node.places import Places
from aivillage.node.workers import Workers
from aivillage.protocols.errors import PeerError
from aivillage.protocols.messages import Frame
from aivillage.protocols.ports import Book
from aivillage.protocols.types import MicroCredits, PeerId, Seconds

Say = Callable[[Frame], None]
Verify = Callable[[JobRow, bytes, PeerId], Awaitable[str]]
"""(job, result, seller) -> how it was done again. Raises: RejectedError: it is wrong."""


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """One line for the person: who, what, how long, how much, why."""

    job: str
    operation: str
    sellers: tuple[PeerId, ...]
    usage: dict[str, int]
    seconds: Seconds
    price_micro_credits: MicroCredits
    attempts: int
    identical: str
    why: str
    checked: str = ""
    """For `--verify`: who did it again before the owner got it, or why nobody did."""


class Attempts(dict[tuple[Link, int], Attempt]):
    """Those under way, by link and call: ids begin anew on every link."""

    def __init__(self) -> None:
        super().__init__()
        self._lots: dict[PeerId, trio.lowlevel.ParkingLot] = {}

    def end(self, link: Link, call: int, *, had_place: bool) -> None:
        """It is over: one of those who wait for a place at its seller may have its own."""
        del self[link, call]
        lot = self._lots.get(link.peer)
        if lot is not None and had_place:
            lot.unpark()
            if not lot:
                del self._lots[link.peer]

    async def one_ends(self, peer: PeerId) -> None:
        """Returns when an attempt at `peer` has ended, in turn with others who wait for that."""
        await self._lots.setdefault(peer, trio.lowlevel.ParkingLot()).park()


class Trade(msgspec.Struct, frozen=True):
    """What a job needs of the node."""

    jobs: Jobs
    book: Book
    market: Market
    discovery: Discovery
    workers: Workers
    events: Events
    attempts: Attempts
    places: Places
    """Where this machine's own jobs come first."""


class RejectedError(PeerError):
    """The verdict on a result failed: no final voucher, and nothing of it is kept."""


class DoubtfulError(RejectedError):
    """It failed on what more than one seller made: nobody knows whose part is wrong."""
