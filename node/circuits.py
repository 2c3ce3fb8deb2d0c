"""The ends of circuits: reservations that make this node reachable, and dialling through relays.

A circuit is one more way to a peer. Direct contact is preferred: while a peer is reached through a
relay, its own addresses are tried ever more rarely, and a link that is idle moves over.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final
from weakref import WeakValueDictionary

import trio

from aivillage.node.addresses import is_public
from aivillage.node.events import Events
from aivillage.node.fares import Fare, Fares, LeftError
from aivillage.node.guard import Tasks
from aivillage.node.links import Link, Links
from aivillage.node.relay import TALK_SECONDS
from aivillage.node.relay_talk import ask, hear, refusal, say
from aivillage.protocols.errors import (
    AivillageError,
    LedgerError,
    PeerError,
    RefusedError,
    RequestError,
)
from aivillage.protocols.ports import Stream, Transport
from aivillage.protocols.relaying import (
    RELAY_PROTOCOL,
    Bill,
    Granted,
    Reach,
    circuit_address,
    is_circuit,
    split_circuit,
)
from aivillage.protocols.types import PeerId, Seconds

log = logging.getLogger("aivillage.circuits")

RELAYS: Final = 2
"""Reservations at the same time: one relay may leave, and an offer has room for two addresses."""
AUTO_SECONDS: Final = 60.0
"""Nobody has dialled us for so long: perhaps nobody can."""
LOOK_SECONDS: Final = 1.0
AGAIN_SECONDS: Final = 30.0
"""Before a relay that refused is asked again."""
LEFT_SECONDS: Final = 86_400.0
"""Before a relay is asked again that billed what is not to be paid."""
SETTLE_SECONDS: Final = 2.0
"""For the last voucher of a reservation; the disk may be slow, and the node may be stopping."""
DIRECT_SECONDS: Final = (5.0, 600.0)
"""Between attempts to do without the relay: the first, and the longest."""
DIAL_SECONDS: Final = 10.0


class Carrier:
    """A stream of a relay that carries a connection. The transport closes it with that."""

    def __init__(self, stream: Stream, count: Callable[[int], None] = lambda size: None) -> None:
        """`count` hears of every byte that passes, either direction."""
        self.relay = stream.peer
        self._count = count
        self.closed = trio.Event()
        self.direct_at = trio.current_time() + DIRECT_SECONDS[0]
        self.direct_wait: Seconds = DIRECT_SECONDS[0]
        self._stream = stream

    @property
    def peer(self) -> PeerId:
        return self.relay

    async def read(self, size_bytes_max: int) -> bytes:
        data = await self._stream.read(size_bytes_max)
        self._count(len(data))
        return data

    async def write(self, data: bytes) -> None:
        self._count(len(data))
        await self._stream.write(data)

    async def close(self) -> None:
        self.closed.set()
        await self._stream.close()


class Circuits:
    """Who is reached through whom. Built before the links, which dial through it; see `join`."""

    def __init__(
        self, transport: Transport, events: Events, *, mode: str, wanted: int = RELAYS
    ) -> None:
        """`mode`: auto, always or never."""
        self._transport = transport
        self._events = events
        self._mode = mode
        self._wanted = wanted
        self._held: dict[PeerId, trio.CancelScope] = {}
        self._fares: dict[PeerId, Fare] = {}
        self._asking: set[PeerId] = set()
        self._not_before: dict[PeerId, float] = {}
        self._dialled: dict[PeerId, str] = {}
        self._carriers: dict[PeerId, Carrier] = {}
        self._locks: WeakValueDictionary[PeerId, trio.Lock] = WeakValueDictionary()
        self._called_at = trio.current_time()
        self._moving: set[PeerId] = set()
        self.on_changed: Callable[[], None] = lambda: None
        """Our addresses are others now."""
        self.meet: Callable[[PeerId], Awaitable[str | None]] = _never
        """Connects with a peer directly although neither can be dialled; the address, or None."""
        self.is_busy: Callable[[Link], bool] = lambda link: link.waiting
        """Whether a link may not move to another connection now."""
        self.services = (self.keep_reservations, self.seek_direct_ways)

    def join(
        self, links: Links, is_member: Callable[[PeerId], bool], tasks: Tasks, fares: Fares
    ) -> None:
        """From now on `links` dials through here, and relays are paid by `fares`."""
        self._links, self._is_member, self._tasks = links, is_member, tasks
        self._pay = fares
        links.dial = self.dial

    def addresses(self) -> tuple[str, ...]:
        """Where others reach this node through the relays that it has reservations with."""
        return tuple(
            circuit_address(self._dialled[relay], self._transport.peer) for relay in self._held
        )

    def relay_of(self, peer: PeerId) -> PeerId | None:
        """Through whom `peer` is reached; None: directly, or not at all."""
        carrier = self._carriers.get(peer)
        if carrier is not None and carrier.closed.is_set():
            del self._carriers[peer]
            carrier = None
        return carrier.relay if carrier else None

    def relays(self) -> list[PeerId]:
        """With whom we have reservations."""
        return list(self._held)

    def fares(self) -> list[Fare]:
        """What the relays of our reservations are paid."""
        return list(self._fares.values())

    # ------------------------------------------------------------------ dialling
    async def dial(self, address: str) -> PeerId:
        """As `Transport.dial`, through a relay where the address says so.

        Raises:
            AivillageError: also BUSY, OWNER_LIMIT, NOT_OFFERED: the relay's refusal.
        """
        if not is_circuit(address):
            peer = await self._transport.dial(address)
            self._dialled[peer] = address
            return peer
        relay_address, peer = split_circuit(address)
        if peer == self._transport.peer:
            raise RequestError("this is the node's own address", next_step="dial another node")
        async with self._locks.setdefault(peer, trio.Lock()):
            if not self._links.get(peer) and not self.relay_of(peer):
                # A link first: over it the relay learns that we belong to its village, and its
                # pings say when the relay hangs.
                relay = await self._links.connect(relay_address)
                await self._dial_through(relay.peer, peer)
        return peer

    async def _dial_through(self, relay: PeerId, peer: PeerId) -> None:
        stream = await self._transport.open_stream(relay, RELAY_PROTOCOL)
        try:
            with _in_time():
                await ask(stream, Reach(peer=peer))
        except BaseException:
            with trio.CancelScope(shield=True):
                await stream.close()
            raise
        carrier = Carrier(stream)
        await self._transport.adopt(carrier, peer)
        self._carriers[peer] = carrier
        self._events.emit("circuit_dialled", peer=peer, relay=relay)

    async def incoming(self, stream: Stream) -> None:
        """Somebody dials us through a relay: lives as long as the connection."""
        fare = self._fares.get(stream.peer)
        if fare is None:
            error = RefusedError("no reservation with you", code="NOT_OFFERED")
            await say(stream, refusal(error))
            return
        await say(stream, Granted())
        fare.circuits += 1
        carrier = Carrier(stream, fare.count)
        # Who it is, Noise proves; what the relay said of it is not even looked at.
        peer = await self._transport.adopt(carrier, None)
        self._carriers[peer] = carrier
        self._events.emit("circuit_accepted", peer=peer, relay=stream.peer)
        await carrier.closed.wait()

    # ------------------------------------------------------------------ being reachable
    async def keep_reservations(self) -> None:
        """As many as wanted while nobody can dial us, each anew elsewhere when its relay goes."""
        while True:
            if self._needs_relay():
                missing = self._wanted - len(self._held) - len(self._asking)
                for relay in self._candidates()[: max(0, missing)]:
                    self._asking.add(relay)
                    self._tasks.start_soon(self._hold, relay)
            else:
                for relay, scope in self._held.items():
                    if relay not in self._carrying():  # its circuits would end with it
                        scope.cancel()
            await trio.sleep(LOOK_SECONDS)

    def _carrying(self) -> set[PeerId]:
        """Relays that carry a connection of ours now."""
        return {c.relay for c in self._carriers.values() if not c.closed.is_set()}

    def _needs_relay(self) -> bool:
        now = trio.current_time()
        if self._transport.callers():
            self._called_at = now
        unheard = now - self._called_at >= AUTO_SECONDS
        return self._mode == "always" or (self._mode == "auto" and unheard)

    def _candidates(self) -> list[PeerId]:
        """Villagers whom we dialled, so that others can, and who did not just refuse.

        Those at public addresses first: who is in our own house may be behind the same router.
        """
        now = trio.current_time()
        callers = {*self._transport.callers(), *self._transport.met()}
        found = [
            link.peer
            for link in self._links.all()
            if self._is_member(link.peer)
            and link.peer in self._dialled
            and link.peer not in callers
            and link.peer not in self._held
            and link.peer not in self._asking
            and not self.relay_of(link.peer)
            and self._not_before.get(link.peer, 0.0) <= now
        ]
        return sorted(found, key=lambda peer: not is_public(self._dialled[peer]))

    async def _hold(self, relay: PeerId) -> None:
        """One reservation, from asking for it to its end."""
        pause = LOOK_SECONDS
        try:
            stream = await self._transport.open_stream(relay, RELAY_PROTOCOL)
            try:
                asked = self._pay.ask()
                with _in_time():
                    fare = self._pay.begin(relay, asked, await ask(stream, asked))
                await self._until_it_ends(stream, fare)
            finally:
                with trio.CancelScope(shield=True):
                    await stream.close()
        except LeftError as error:
            pause = LEFT_SECONDS
            self._events.emit("relay_left", level=30, peer=relay, reason=error.message)
            for carrier in [c for c in self._carriers.values() if c.relay == relay]:
                await carrier.close()
        except AivillageError as error:
            pause = AGAIN_SECONDS
            self._events.emit("reservation_refused", peer=relay, reason=error.message)
        finally:
            self._asking.discard(relay)
            self._not_before[relay] = trio.current_time() + pause

    async def _until_it_ends(self, stream: Stream, fare: Fare) -> None:
        """Raises: LeftError: it billed what is not to be paid, or all that it may cost."""
        relay = stream.peer
        self._asking.discard(relay)
        with trio.CancelScope() as scope:
            self._held[relay], self._fares[relay] = scope, fare
            self._events.emit("reservation_made", peer=relay, price=fare.price)
            self.on_changed()
            try:
                await _pay_bills(stream, fare)
            finally:
                del self._held[relay], self._fares[relay]
                self._events.emit("reservation_ended", peer=relay, micro_credits=fare.amount)
                limit = trio.current_time() + SETTLE_SECONDS
                with trio.CancelScope(deadline=limit, shield=True), suppress(LedgerError):
                    await fare.close()  # what fails stays due, and the relay claims it
        self.on_changed()
        fare.require_more()

    # ------------------------------------------------------------------ doing without
    async def seek_direct_ways(self) -> None:
        """Tries the own addresses of whoever is reached through a relay."""
        while True:
            for peer, carrier in list(self._carriers.items()):
                if not self.relay_of(peer) or peer in self._moving:
                    continue
                if trio.current_time() >= carrier.direct_at:
                    self._moving.add(peer)
                    self._tasks.start_soon(self._move, peer, carrier)
            await trio.sleep(LOOK_SECONDS)

    async def _move(self, peer: PeerId, carrier: Carrier) -> None:
        """To a direct connection, where there is one to be had, when nothing is under way."""
        try:
            link = self._links.get(peer)
            address = await self._direct_way(link) if link else None
            if link is not None and address is None:
                address = await self.meet(peer)
            if link is None or address is None:
                return
            if self.is_busy(link):
                return  # a job is worth more than a better way; the next attempt will do
            self._events.emit("direct_way_found", peer=peer, relay=carrier.relay)
            link.close("a direct way was found")
            await link.ended.wait()
            await carrier.close()
            await self._links.connect(address)
        except AivillageError as error:
            self._events.emit("direct_way_lost", peer=peer, reason=error.message)
        finally:
            self._moving.discard(peer)
            carrier.direct_at = trio.current_time() + carrier.direct_wait
            carrier.direct_wait = min(carrier.direct_wait * 2, DIRECT_SECONDS[1])

    async def _direct_way(self, link: Link) -> str | None:
        """The first of a peer's own addresses at which it answers."""
        for address in link.hello.addresses:
            with trio.move_on_after(DIAL_SECONDS):
                try:
                    if not is_circuit(address) and await self.dial(address) == link.peer:
                        return address
                except AivillageError as error:
                    log.debug("no_direct_way", extra={"peer": link.peer, "reason": str(error)})
        return None


async def _pay_bills(stream: Stream, fare: Fare) -> None:
    """Until the relay is gone, or says what is no bill, which is an end too.

    Raises:
        LeftError: a bill is not to be paid.
    """
    try:
        while isinstance(bill := await hear(stream), Bill):
            fare.take(bill)
    except LeftError:
        raise
    except PeerError as error:
        log.debug("reservation_over", extra={"peer": fare.relay, "reason": str(error)})


async def _never(_peer: PeerId) -> None: ...


@contextmanager
def _in_time() -> Iterator[None]:
    """Raises: PeerError: PEER_LOST, it took too long."""
    try:
        with trio.fail_after(2 * TALK_SECONDS):  # the relay itself has to ask
            yield
    except trio.TooSlowError:
        raise PeerError("the relay does not answer", code="PEER_LOST") from None
