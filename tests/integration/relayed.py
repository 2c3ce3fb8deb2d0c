"""Nodes that relay and are relayed, on real transports, without the daemon around them."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import trio

from aivillage.node.circuits import Circuits
from aivillage.node.events import Events
from aivillage.node.fares import Fares
from aivillage.node.guard import Tasks
from aivillage.node.links import LinkLimits, Links, open_links
from aivillage.node.relay import Relay, RelayLimits
from aivillage.node.relay_tab import Toll
from aivillage.node.transport.libp2p import open_libp2p
from aivillage.protocols.errors import PeerError
from aivillage.protocols.ports import Transport
from aivillage.protocols.relaying import circuit_address
from aivillage.protocols.types import PeerId
from tests.conftest import make_hello, make_key

ECHO = "/test/echo/1"
NO_BOOK: Any = None
"""Whoever pays nothing needs none."""
PLENTY = RelayLimits(circuits=8, bytes_per_second=1 << 30, bytes_a_day=1 << 40)


class Shelf:
    """The settings of jobs.db, in memory."""

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}

    async def setting(self, key: str) -> bytes | None:
        return self.kept.get(key)

    async def set_setting(self, key: str, value: bytes) -> None:
        self.kept[key] = value


class Node:
    """One end or relay; `members` is who belongs to its village."""

    def __init__(self, transport: Transport, links: Links, tasks: Tasks, village: set[PeerId],
                 limits: RelayLimits | None, mode: str, wanted: int) -> None:  # fmt: skip
        self.transport, self.links, self.events, self.shelf = transport, links, Events(), Shelf()
        self.village = village
        self.circuits = Circuits(transport, self.events, mode=mode, wanted=wanted)
        self.circuits.join(links, self.is_member, tasks, Fares(transport.peer, NO_BOOK, 0, 0))
        self.relay = Relay(
            transport=transport, is_member=self.is_member, limits=limits, shelf=self.shelf,
            events=self.events, incoming=self.circuits.incoming,
            toll=Toll(transport.peer, None, 0),
        )  # fmt: skip
        for service in (self.relay.run, *self.circuits.services):
            tasks.serve(service)
        transport.serve(ECHO, echo)

    def is_member(self, peer: PeerId) -> bool:
        return self.links.get(peer) is not None and peer in self.village

    @property
    def peer(self) -> PeerId:
        return self.transport.peer

    @property
    def address(self) -> str:
        return self.transport.addresses()[0]

    def behind(self, relay: Node) -> str:
        """Where this node is, for others: only there."""
        return circuit_address(relay.address, self.peer)


async def echo(stream: Any) -> None:
    while data := await stream.read(65_536):
        await stream.write(data)


async def echoes(node: Node, peer: PeerId, data: bytes) -> bool:
    """Whether `data` comes back whole from `peer`."""
    stream = await node.transport.open_stream(peer, ECHO)
    found = bytearray()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.write, data)
            while len(found) < len(data):
                found += await stream.read(65_536)
    except* PeerError:
        found.clear()
    await stream.close()
    return bytes(found) == data


async def until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    with trio.fail_after(seconds):
        while not condition():
            await trio.sleep(0.02)


class World:
    """Opens nodes, numbers them, and can end one of them as a crash would."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.village: set[PeerId] = set()
        self._nursery = nursery
        self._ends: dict[PeerId, trio.CancelScope] = {}
        self._number = 0

    async def node(
        self,
        *,
        limits: RelayLimits | None = PLENTY,
        mode: str = "never",
        wanted: int = 1,
        member: bool = True,
        ping_seconds: float = 10.0,
        village_key: bytes | None = None,
    ) -> Node:
        self._number += 1
        node: Node = await self._nursery.start(
            self._live, self._number, limits, mode, wanted, ping_seconds, village_key
        )
        if member:
            self.village.add(node.peer)
        return node

    async def end(self, node: Node) -> None:
        self._ends[node.peer].cancel()
        await trio.sleep(0.05)

    async def _live(self, number, limits, mode, wanted, ping_seconds, key, task_status) -> None:
        pings = LinkLimits(ping_seconds=ping_seconds)
        with trio.CancelScope() as scope:
            async with AsyncExitStack() as stack:
                enter = stack.enter_async_context
                transport = await enter(open_libp2p(make_key(number), "127.0.0.1:0", key))
                hello = functools.partial(make_hello, addresses=transport.addresses())
                links = await enter(open_links(transport, hello, limits=pings))
                nursery = await enter(trio.open_nursery())
                tasks = Tasks(nursery, Events())
                node = Node(transport, links, tasks, self.village, limits, mode, wanted)
                self._ends[node.peer] = scope
                task_status.started(node)
                await trio.sleep_forever()


@asynccontextmanager
async def world() -> AsyncIterator[World]:
    async with trio.open_nursery() as nursery:
        with trio.fail_after(60):
            yield World(nursery)
        nursery.cancel_scope.cancel()
