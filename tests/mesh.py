"""Nodes with links on the in-memory network, and somebody who writes down what they hear."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager

import trio

from aivillage.node.links import LinkLimits, Links, open_links
from aivillage.node.transport.loopback import LoopbackNetwork

LIMITS = LinkLimits()


class Recorder:
    """Writes down what the callbacks hear."""

    def __init__(self, links: Links) -> None:
        self.links = links
        self.events: list[str] = []
        self.frames: list[object] = []
        self.reasons: list[str] = []
        links.on_up = lambda link: self.events.append("up")
        links.on_down = self._down
        links.on_message = lambda link, frame: self.frames.append(frame)

    def _down(self, link, reason) -> None:
        self.events.append("down")
        self.reasons.append(reason)

    @property
    def address(self) -> str:
        return self.links.transport.addresses()[0]

    @property
    def peer(self):
        return self.links.transport.peer


@asynccontextmanager
async def mesh(hello_of, peer_of, *, count=2, limits=LIMITS, network=None, hello=None):
    """`count` nodes with links; node 0 has the lowest PeerId."""
    network = network or LoopbackNetwork()
    peers = sorted(peer_of(at + 1) for at in range(count))
    async with AsyncExitStack() as stack:
        nodes = []
        for at, peer in enumerate(peers):
            transport = await stack.enter_async_context(network.open(f"n{at}", peer))
            links = await stack.enter_async_context(
                open_links(transport, hello or hello_of, limits=limits)
            )
            nodes.append(Recorder(links))
        yield nodes


async def settle(seconds: float = 0.01) -> None:
    await trio.sleep(seconds)
