"""Several addresses of one peer, tried side by side: the nearest first, the first answer wins.

A list of addresses is a list of guesses. One after the other, each dead one costs its whole
timeout; all at once, a far one may beat the one on the same network by luck. So each begins a
little after the one before it, or at once when that one failed.

Source: Happy Eyeballs Version 2, RFC 8305.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, Iterable
from typing import Final, Generic, TypeVar

import trio

from aivillage.node.links import Link, Links
from aivillage.protocols.errors import AivillageError, PeerError
from aivillage.protocols.types import ADDRESSES_MAX, PeerId, Seconds

STAGGER_SECONDS: Final = 0.15
"""Longer than a round trip on a LAN, and than most between continents: who is near wins."""
NEAR, FAR, RELAYED = range(3)
T = TypeVar("T")
_NEAR_NETWORKS: Final = tuple(
    ipaddress.ip_network(text)
    for text in (
        "127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16",
        "::1/128", "fc00::/7", "fe80::/10",
    )
)  # fmt: skip


async def first_to_answer(
    addresses: Iterable[str], reach: Callable[[str], Awaitable[T]], *, seconds: Seconds
) -> T:
    """What `reach` gives for the first address that it succeeds with; the others are cancelled.

    Each address has `seconds`; at most `ADDRESSES_MAX` are tried.

    Raises:
        AivillageError: all failed; what the first one in line said.
    """
    line = in_order(addresses)[:ADDRESSES_MAX]
    race = _Race(reach, seconds, len(line))
    async with trio.open_nursery() as nursery:
        for at, address in enumerate(line):
            nursery.start_soon(race.run, at, address, nursery.cancel_scope)
            with trio.move_on_after(STAGGER_SECONDS):
                await race.over[at].wait()
        # Nobody is left to start: the nursery waits for those under way.
    if race.won:
        return race.won[0]
    for failure in race.failures:
        if failure is not None:
            raise failure
    raise PeerError("no address of it is known", code="PEER_LOST", next_step="aivillage-node peers")


async def reach_peer(
    links: Links, peer: PeerId, addresses: Iterable[str], *, seconds: Seconds
) -> Link:
    """The link with `peer` at one of `addresses`, which somebody else may have named.

    Raises:
        AivillageError: it is at none of them; what the first one in line said.
    """

    async def reach(address: str) -> Link:
        link = await links.connect(address)
        if link.peer != peer:
            raise PeerError(f"{address} is somebody else", code="PEER_LOST")
        return link

    return await first_to_answer(addresses, reach, seconds=seconds)


async def reach_mover(
    links: Links,
    peer: PeerId,
    addresses: Iterable[str],
    newest: Callable[[], Iterable[str]],
    *,
    seconds: Seconds,
) -> Link:
    """The link with `peer` at `addresses`, or where it says that it is by then.

    A node behind NAT says first where it is itself, and a moment later where its relay is.

    Raises:
        AivillageError: it is nowhere; as `reach_peer`.
    """
    tried: set[str] = set()
    while True:
        fresh = [address for address in addresses if address not in tried]
        link = links.get(peer)
        if link is not None:
            return link
        try:
            return await reach_peer(links, peer, fresh, seconds=seconds)
        except AivillageError:
            tried.update(fresh)
            addresses = newest()
            if tried.issuperset(addresses):
                raise


class _Race(Generic[T]):
    """How the addresses do, by their place in line."""

    def __init__(self, reach: Callable[[str], Awaitable[T]], seconds: Seconds, count: int) -> None:
        self.over = [trio.Event() for _ in range(count)]
        self.failures: list[AivillageError | None] = [None] * count
        self.won: list[T] = []
        self._reach = reach
        self._seconds = seconds

    async def run(self, at: int, address: str, rest: trio.CancelScope) -> None:
        try:
            with trio.fail_after(self._seconds):
                found = await self._reach(address)
        except trio.TooSlowError:
            self.failures[at] = PeerError(f"{address} does not answer", code="PEER_LOST")
        except AivillageError as error:
            self.failures[at] = error
        else:
            self.won.append(found)
            rest.cancel()
        self.over[at].set()


def in_order(addresses: Iterable[str]) -> list[str]:
    """Each once: this machine's network, then the world, then through relays."""
    return sorted(dict.fromkeys(addresses), key=distance)


def distance(address: str) -> int:
    """`NEAR`, `FAR` or `RELAYED`, told from the text alone."""
    if "/p2p-circuit" in address:
        return RELAYED
    ip = ip_of(address)
    if ip is not None:
        return NEAR if is_near(ip) else FAR
    return NEAR if address.startswith("/memory/") else FAR


def ip_of(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The number that `/ip4/...` or `/ip6/...` names."""
    kind, _, rest = address.removeprefix("/").partition("/")
    if kind not in {"ip4", "ip6"}:
        return None
    try:
        ip = ipaddress.ip_address(rest.partition("/")[0])
    except ValueError:
        return None
    return ip.ipv4_mapped or ip if isinstance(ip, ipaddress.IPv6Address) else ip


def is_near(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Loopback, private or link-local: no router in between, or only the house's own.

    Narrower than `is_private`, which also counts reserved blocks that some networks use as public.
    """
    return any(ip.version == network.version and ip in network for network in _NEAR_NETWORKS)
