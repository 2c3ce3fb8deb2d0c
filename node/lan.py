"""Villagers on the same network, found by multicast DNS, without saying aloud who is there.

A node announces a service under a random name with three numbers: a salt, a tag and a mask over
its public key. Who knows the village's id makes the tag from the salt, recognises the village and
takes the mask off; to everybody else they are random, and others at the next start. What is
heard is a hint where to dial: whoever answers proves who it is, as at any address.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec
import trio

from aivillage.node.dialling import ip_of, is_near
from aivillage.node.events import Events
from aivillage.protocols.types import PeerId, peer_id, public_key

if TYPE_CHECKING:
    from zeroconf import ServiceStateChange, Zeroconf

SERVICE: Final = "_aivillage._tcp.local."
TAG_BYTES: Final = 8
SALT_BYTES: Final = 8
LOOK_SECONDS: Final = 10.0
"""Between two looks whether this machine moved to another network, or joined a village."""
QUERY_MS: Final = 3000
PEERS_MAX: Final = 256
"""More neighbours than one network's villagers: the rest are inventions."""
ADDRESSES_MAX: Final = 4


class Announcement(msgspec.Struct, frozen=True, kw_only=True):
    """The three numbers, as hex digits in the service's text."""

    salt: str
    tag: str
    masked: str


def announcement(village: bytes, peer: PeerId, salt: bytes) -> Announcement:
    return Announcement(
        salt=salt.hex(),
        tag=_derived(village, b"tag", salt)[:TAG_BYTES].hex(),
        masked=_masked(village, salt, public_key(peer)).hex(),
    )


def recognised(village: bytes, heard: Announcement) -> PeerId | None:
    """The peer behind an announcement of this village; None: another village's, or no sense."""
    try:
        salt, masked = bytes.fromhex(heard.salt), bytes.fromhex(heard.masked)
        if len(salt) != SALT_BYTES or len(masked) != 32:
            return None
        tag = _derived(village, b"tag", salt)[:TAG_BYTES].hex()
        if not hmac.compare_digest(tag.encode(), heard.tag.encode()):
            return None
        return peer_id(_masked(village, salt, masked))
    except ValueError:
        return None


def _derived(village: bytes, purpose: bytes, salt: bytes) -> bytes:
    return hmac.digest(village, b"aivillage/lan/1\0" + purpose + b"\0" + salt, "sha256")


def _masked(village: bytes, salt: bytes, body: bytes) -> bytes:
    """On and off again are the same."""
    mask = _derived(village, b"peer", salt)
    return bytes(one ^ other for one, other in zip(body, mask, strict=True))


class Lan:
    """Announces this node on its networks, and keeps where villagers there are found."""

    def __init__(
        self,
        peer: PeerId,
        village: Callable[[], bytes],
        own_addresses: Callable[[], Sequence[str]],
        events: Events,
        *,
        on_found: Callable[[PeerId], object],
    ) -> None:
        self.found: dict[PeerId, tuple[str, ...]] = {}
        self._peer = peer
        self._village = village
        self._own_addresses = own_addresses
        self._events = events
        self._on_found = on_found
        self._names: dict[str, PeerId] = {}

    async def run(self) -> None:
        """Speaks while there is a network to speak on; in tests and on loopback there is none."""
        failed = ""
        while True:
            places = near_places(self._own_addresses())
            if places:
                try:
                    await self._speak(places)
                    failed = ""
                except OSError as error:
                    if str(error) != failed:  # a network without multicast is told of once
                        self._events.emit("lan_not_heard", level=logging.WARNING, reason=str(error))
                    failed = str(error)
            await trio.sleep(LOOK_SECONDS)

    async def _speak(self, places: Mapping[str, int]) -> None:
        """Until this machine has other addresses or belongs to another village."""
        village = self._village()
        spoken = announcement(village, self._peer, secrets.token_bytes(SALT_BYTES))
        token = trio.lowlevel.current_trio_token()

        def tell(name: str, heard: Announcement | None, addresses: Sequence[str]) -> None:
            with contextlib.suppress(trio.RunFinishedError):  # the node is gone; nobody listens
                token.run_sync_soon(self.hear, name, heard, addresses)

        voice = await trio.to_thread.run_sync(_open, places, spoken, tell)
        try:
            while True:
                await trio.sleep(LOOK_SECONDS)
                if near_places(self._own_addresses()) != places or self._village() != village:
                    return
        finally:
            self._names.clear()
            self.found.clear()
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(voice.close)

    def hear(self, name: str, heard: Announcement | None, addresses: Sequence[str]) -> None:
        """A service came, changed or (None) went."""
        peer = recognised(self._village(), heard) if heard is not None else None
        if peer is None:
            gone = self._names.pop(name, None)
            if gone is not None and gone not in self._names.values():
                self.found.pop(gone, None)
            return
        near = [a for a in addresses if (ip := ip_of(a)) and is_near(ip) and not ip.is_loopback]
        places = tuple(f"{address}/p2p/{peer}" for address in near[:ADDRESSES_MAX])
        is_full = name not in self._names and len(self._names) >= PEERS_MAX
        if peer == self._peer or not places or is_full:
            return
        self._names[name] = peer
        if self.found.get(peer) != places:
            self.found[peer] = places
            self._on_found(peer)


def near_places(addresses: Sequence[str]) -> dict[str, int]:
    """Number -> port, of addresses on networks of this house; loopback is no network."""
    found = {}
    for address in addresses:
        ip = ip_of(address)
        parts = address.split("/")
        if ip is not None and is_near(ip) and not ip.is_loopback and parts[3:4] == ["tcp"]:
            found[str(ip)] = int(parts[4])
    return found


Tell = Callable[[str, Announcement | None, Sequence[str]], None]


def _open(places: Mapping[str, int], spoken: Announcement, tell: Tell) -> Zeroconf:
    """Announces and listens, in threads of the library's own. Raises: OSError: no multicast."""
    from zeroconf import Error, IPVersion, ServiceBrowser, ServiceInfo, Zeroconf

    is_old = any("." in place for place in places)
    voice = Zeroconf(
        interfaces=[place for place in places if ("." in place) == is_old],
        ip_version=IPVersion.V4Only if is_old else IPVersion.V6Only,
    )
    try:
        name = f"{secrets.token_hex(8)}.{SERVICE}"
        info = ServiceInfo(
            SERVICE,
            name,
            port=next(iter(places.values())),
            properties=msgspec.to_builtins(spoken),
            parsed_addresses=list(places),
            server=f"{secrets.token_hex(8)}.local.",
        )
        voice.register_service(info)

        def changed(
            zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
        ) -> None:
            if state_change.name == "Removed":
                tell(name, None, ())
                return
            found = zeroconf.get_service_info(service_type, name, timeout=QUERY_MS)
            if found is not None:
                tell(name, _read(found.properties), _addresses(found))

        ServiceBrowser(voice, SERVICE, handlers=[changed])
    except Error as error:
        voice.close()
        raise OSError(f"the network does not carry it: {error!r}") from error
    except BaseException:
        voice.close()
        raise
    return voice


def _read(properties: Mapping[bytes, bytes | None]) -> Announcement | None:
    texts = {
        key.decode("ascii", "replace"): (value or b"").decode("ascii", "replace")
        for key, value in properties.items()
    }
    try:
        return msgspec.convert(texts, Announcement)
    except msgspec.ValidationError:
        return None


def _addresses(found: Any) -> list[str]:
    numbers = found.parsed_addresses()[: 2 * ADDRESSES_MAX]
    return [f"/ip{6 if ':' in ip else 4}/{ip}/tcp/{found.port}" for ip in numbers]
