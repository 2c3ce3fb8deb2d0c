"""An in-memory network of nodes: the twin of the libp2p transport for simulations and tests.

Streams are reliable and ordered, as TCP's are: `loss` makes a chunk late (a retransmission), it
never makes a hole. A partition stalls what is under way without telling anybody; a cut breaks it
at once. All waiting is trio's own, so an autojump clock runs through it.
"""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Final

import trio

from aivillage.node.transport.pipes import BUFFER_BYTES, LoopbackStream, Pipe, first, lost
from aivillage.protocols.errors import ConfigError, PeerError, RequestError
from aivillage.protocols.ports import SomebodyElseError, Stream, StreamHandler
from aivillage.protocols.types import PeerId

log = logging.getLogger("aivillage.transport")

CONNECT_SECONDS_MAX: Final = 10.0
"""How long a dial or a new stream waits for a partition to heal; libp2p's own limit."""
NAME_BYTES: Final = 64
RETRANSMIT_SECONDS: Final = 0.2
"""What a lost chunk costs: TCP's usual first retransmission timeout."""


class LoopbackNetwork:
    """The wires between nodes, and the switches that break them."""

    def __init__(
        self,
        seed: int = 0,
        latency_seconds: float = 0.0,
        jitter_seconds: float = 0.0,
        loss: float = 0.0,
    ) -> None:
        self.latency_seconds = latency_seconds
        self.jitter_seconds = jitter_seconds
        self.loss = loss
        self.nodes: dict[str, LoopbackTransport] = {}
        self.hidden: set[str] = set()
        """Behind NAT: these dial others, and nobody dials them."""
        self._random = random.Random(seed)
        self._side: dict[str, int] = {}
        self._changed = trio.Event()

    @asynccontextmanager
    async def open(self, name: str, peer: PeerId) -> AsyncIterator[LoopbackTransport]:
        """A node called `name`; leaving the block hangs up and ends its handlers."""
        if name in self.nodes:
            raise ConfigError(
                f"the name {name} is taken in this network", next_step="choose another name"
            )
        async with trio.open_nursery() as nursery:
            node = self.nodes[name] = LoopbackTransport(self, name, peer, nursery)
            try:
                yield node
            finally:
                del self.nodes[name]
                node.hang_up_all()
                nursery.cancel_scope.cancel()

    def delay_seconds(self) -> float:
        """How long the next chunk is under way."""
        delay = self.latency_seconds + self._random.random() * self.jitter_seconds
        while self.loss and self._random.random() < self.loss:
            delay += RETRANSMIT_SECONDS
        return delay

    def partition(self, *groups: Iterable[str]) -> None:
        """Only nodes in the same group hear each other; unnamed ones form one more group."""
        self._side = {name: at for at, group in enumerate(groups, start=1) for name in group}
        self._wake()

    def heal(self) -> None:
        self.partition()

    def cut(self, one: str, other: str) -> None:
        """Breaks every connection between two nodes; both notice at once and may dial again."""
        node = self.nodes.get(one)
        for connection in list(node.connections.values()) if node else []:
            if connection.joins(other):
                connection.break_both()

    def separated(self, one: str, other: str) -> bool:
        return self._side.get(one, 0) != self._side.get(other, 0)

    async def joined(self, one: str, other: str) -> None:
        """Returns when no partition is between the two."""
        while self.separated(one, other):
            await self._changed.wait()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


class LoopbackTransport:
    """A `Transport` whose wires are Python lists."""

    def __init__(
        self, network: LoopbackNetwork, name: str, peer: PeerId, nursery: trio.Nursery
    ) -> None:
        self.network = network
        self.name = name
        self.connections: dict[PeerId, _Connection] = {}
        self.circuits: dict[PeerId, _Connection] = {}
        """Those through a relay; the direct ones are preferred."""
        self.nursery = nursery
        self.village_key: bytes | None = None
        self._refused = (0, "")
        self._peer = peer
        self._handlers: dict[str, StreamHandler] = {}

    @property
    def peer(self) -> PeerId:
        return self._peer

    def addresses(self) -> tuple[str, ...]:
        return (f"/memory/{self.name}/p2p/{self._peer}",)

    def serve(self, protocol: str, handler: StreamHandler) -> None:
        self._handlers[protocol] = handler

    async def dial(self, address: str) -> PeerId:
        peer = _parsed(address)[1]
        if peer == self._peer:
            raise RequestError("this is the node's own address", next_step="dial another node")
        await trio.lowlevel.checkpoint()
        if peer in self.connections:
            return peer
        other = await self._found_at(address)
        if peer not in self.connections:
            _Connection(self, other)
        return peer

    async def probe(self, address: str) -> None:
        await self._found_at(address)

    async def _found_at(self, address: str) -> LoopbackTransport:
        name, peer = _parsed(address)
        await self._round_trip(name, peer)
        other = self.network.nodes.get(name)
        if other is None or name in self.network.hidden:
            raise lost(f"nobody answers at {address}")
        if other.village_key != self.village_key:
            other.refuse(f"{self.name}: it has another village key, or none")
            raise lost(f"{address} has another village key than this node, or none")
        if other.peer != peer:
            raise SomebodyElseError(f"{other.peer} answered at {address}", other.peer)
        return other

    def refuse(self, reason: str) -> None:
        self._refused = self._refused[0] + 1, reason

    def refused(self) -> tuple[int, str]:
        return self._refused

    def host_of(self, peer: PeerId) -> str:
        connection = self.connections.get(peer)
        return connection.other(self).name if connection is not None else ""

    async def open_stream(self, peer: PeerId, protocol: str) -> LoopbackStream:
        connection = self._connection(peer)
        other = connection.other(self)
        await self._round_trip(other.name, peer)
        if connection.broken(self).is_set():
            raise lost(f"the connection to {peer} broke")
        handler = other.handler(protocol)
        if handler is None:
            raise lost(f"{peer} does not speak {protocol}")
        near, far = connection.new_streams(self)
        other.nursery.start_soon(_handle, handler, far, protocol)
        return near

    async def hang_up(self, peer: PeerId) -> None:
        await trio.lowlevel.checkpoint()
        for connection in (self.connections.get(peer), self.circuits.get(peer)):
            if connection is not None:
                connection.hang_up(self)

    def hang_up_all(self) -> None:
        for connection in (*self.connections.values(), *self.circuits.values()):
            connection.hang_up(self)

    async def adopt(self, stream: Stream, peer: PeerId | None) -> PeerId:
        """Only names, and the connection's end, travel on `stream`; the rest goes past it."""
        with trio.move_on_after(CONNECT_SECONDS_MAX):
            try:
                connection = await self._introduced(stream, peer)
            except BaseException:
                with trio.CancelScope(shield=True):
                    await stream.close()
                raise
            self.nursery.start_soon(connection.ride, self, stream)
            return connection.other(self).peer
        raise lost("nobody at the other end")

    async def _introduced(self, stream: Stream, peer: PeerId | None) -> _Connection:
        await stream.write(self.name.encode().ljust(NAME_BYTES))
        other = self.network.nodes.get((await _exactly(stream, NAME_BYTES)).decode().strip())
        if other is None:
            raise lost("nobody at the other end")
        if peer is None:
            await _exactly(stream, 1)  # it knows us by now, and made the connection
            made = self.circuits.get(other.peer)
            if made is None:
                raise lost("the other end left")
            return made
        if other.peer != peer:
            raise SomebodyElseError(f"{other.peer} is at the other end", other.peer)
        connection = _Connection(self, other, relayed=True)
        await stream.write(b"!")
        return connection

    async def seen_by(self, peer: PeerId) -> None:
        """There are no routers here to be met at."""
        await trio.lowlevel.checkpoint()
        self._connection(peer)

    def met(self) -> tuple[PeerId, ...]:
        return ()

    async def meet(self, source: tuple[str, int], address: str, *, begins: bool) -> None:
        await trio.lowlevel.checkpoint()
        raise lost(f"nobody met at {address}")

    def callers(self) -> tuple[PeerId, ...]:
        return tuple(peer for peer, known in self.connections.items() if known.accepted_by(self))

    def handler(self, protocol: str) -> StreamHandler | None:
        return self._handlers.get(protocol)

    def _connection(self, peer: PeerId) -> _Connection:
        connection = self.connections.get(peer) or self.circuits.get(peer)
        if connection is None:
            raise lost(f"not connected to {peer}")
        return connection

    async def _round_trip(self, name: str, peer: PeerId) -> None:
        with trio.move_on_after(CONNECT_SECONDS_MAX) as scope:
            await self.network.joined(self.name, name)
            await trio.sleep(self.network.delay_seconds() + self.network.delay_seconds())
            await self.network.joined(self.name, name)
        if scope.cancelled_caught:
            raise lost(f"{peer} did not answer within {CONNECT_SECONDS_MAX:.0f} s")


class _Connection:
    """What two nodes share; it lists itself with both until it breaks."""

    def __init__(
        self, dialer: LoopbackTransport, acceptor: LoopbackTransport, *, relayed: bool = False
    ) -> None:
        self._ends = (dialer, acceptor)
        self._relayed = relayed
        self._streams: dict[LoopbackTransport, list[LoopbackStream]] = {dialer: [], acceptor: []}
        self._broken = {end: trio.Event() for end in self._ends}
        for end in self._ends:
            self._listing(end)[self.other(end).peer] = self

    def _listing(self, end: LoopbackTransport) -> dict[PeerId, _Connection]:
        return end.circuits if self._relayed else end.connections

    def broken(self, end: LoopbackTransport) -> trio.Event:
        """Set once `end` knows that the connection is gone."""
        return self._broken[end]

    def accepted_by(self, end: LoopbackTransport) -> bool:
        return self._ends[1] is end

    async def ride(self, end: LoopbackTransport, stream: Stream) -> None:
        """Breaks with `stream`, which a relay carries, and takes it along."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first, self._broken[end].wait, nursery.cancel_scope)
            with suppress(PeerError):  # that is an end, too
                while await stream.read(BUFFER_BYTES):
                    continue
            nursery.cancel_scope.cancel()
        self._break(end, at_once=False)
        with trio.CancelScope(shield=True):
            await stream.close()

    def joins(self, name: str) -> bool:
        return any(end.name == name for end in self._ends)

    def other(self, end: LoopbackTransport) -> LoopbackTransport:
        return self._ends[1] if end is self._ends[0] else self._ends[0]

    def new_streams(self, opener: LoopbackTransport) -> tuple[LoopbackStream, LoopbackStream]:
        other = self.other(opener)
        here, away = opener.name, other.name
        there, back = (Pipe(opener.network, *way) for way in ((here, away), (away, here)))
        near = LoopbackStream(other.peer, back, there)
        far = LoopbackStream(opener.peer, there, back)
        for end, stream in ((opener, near), (other, far)):
            alive = [known for known in self._streams[end] if not known.ended]
            self._streams[end] = [*alive, stream]
        return near, far

    def break_both(self) -> None:
        for end in self._ends:
            self._break(end, at_once=True)

    def hang_up(self, end: LoopbackTransport) -> None:
        """`end` forgets the connection now; the other side hears of it as of any chunk."""
        self._break(end, at_once=True)
        other = self.other(end)
        if other.network.nodes.get(other.name) is other:
            other.nursery.start_soon(self._break_later, other, end.name)

    async def _break_later(self, end: LoopbackTransport, other_name: str) -> None:
        arrivals = [stream.last_arrival for stream in self._streams[end]]
        delay = end.network.delay_seconds()
        await trio.sleep_until(max(trio.current_time() + delay, *arrivals, 0.0))
        await end.network.joined(end.name, other_name)
        self._break(end, at_once=False)

    def _break(self, end: LoopbackTransport, *, at_once: bool) -> None:
        peer = self.other(end).peer
        self._broken[end].set()
        if self._listing(end).get(peer) is self:
            del self._listing(end)[peer]
        for stream in self._streams[end]:
            stream.break_(at_once=at_once)
        self._streams[end] = []


async def _exactly(stream: Stream, size_bytes: int) -> bytes:
    found = b""
    while len(found) < size_bytes:
        chunk = await stream.read(size_bytes - len(found))
        if not chunk:
            raise lost("the other end left")
        found += chunk
    return found


async def _handle(handler: StreamHandler, stream: LoopbackStream, protocol: str) -> None:
    """The one place where a handler's failure ends: at its own stream."""
    try:
        await handler(stream)
    except PeerError as error:
        log.info("stream_lost", extra={"peer": stream.peer, "reason": str(error)})
    except Exception as error:
        where = {"protocol": protocol, "peer": stream.peer}
        log.warning("stream_handler_failed", extra=where, exc_info=error)
    with trio.CancelScope(shield=True):
        await stream.close()


def _parsed(address: str) -> tuple[str, PeerId]:
    parts = address.split("/")
    if len(parts) != 5 or (parts[0], parts[1], parts[3]) != ("", "memory", "p2p") or not parts[4]:
        raise RequestError(
            f"{address!r} is no address of this network",
            next_step="write /memory/<name>/p2p/<peer id>",
        )
    return parts[2], PeerId(parts[4])
