"""Where others are told to dial this node: the owner's `announce`, else what the network says."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from aivillage.protocols.errors import ConfigError
from aivillage.protocols.ports import Transport
from aivillage.protocols.types import ADDRESS_CHARACTERS_MAX, ADDRESSES_MAX, PeerId

Addresses = Callable[[], tuple[str, ...]]


DIRECT_MAX: Final = 2
"""Of this node's own, where it has others through relays: an offer names four addresses."""


def addresses_of(
    transport: Transport, announce: Sequence[str], circuits: Addresses = tuple
) -> Addresses:
    """What to hand out, as it is at the moment of the call: direct addresses first.

    Raises:
        ConfigError: an entry of `announce` is no host:port.
    """
    told = tuple(_announced(entry, transport.peer) for entry in announce)
    if len(told) > ADDRESSES_MAX:
        raise ConfigError(
            f"announce has {len(told)} addresses", next_step=f"name at most {ADDRESSES_MAX}"
        )

    def addresses() -> tuple[str, ...]:
        direct, through = told or short_list(transport.addresses()), circuits()
        return (*direct[:DIRECT_MAX], *through) if through else direct

    return addresses


def short_list(found: Iterable[str]) -> tuple[str, ...]:
    """As many as a peer takes."""
    fitting = [address for address in found if len(address) <= ADDRESS_CHARACTERS_MAX]
    return tuple(fitting[:ADDRESSES_MAX])


def is_public(address: str) -> bool:
    """Whether `/ip4/…` can be dialled from everywhere; a name is taken for one that can."""
    host = address.split("/")[2]
    try:
        return ipaddress.ip_address(host).is_global
    except ValueError:
        return True


def _announced(entry: str, peer: PeerId) -> str:
    """`example.org:4051` -> `/dns4/example.org/tcp/4051/p2p/...`."""
    host, _, port = entry.strip().rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    is_name = all(part and part.replace("-", "a").isalnum() for part in host.split("."))
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65_536) or len(host) > 200:
        raise _wrong(entry)
    try:
        kind = f"ip{ipaddress.ip_address(host).version}"
    except ValueError:
        if not (is_name and host.isascii()):
            raise _wrong(entry) from None
        kind = "dns4"
    return f"/{kind}/{host}/tcp/{int(port)}/p2p/{peer}"


def _wrong(entry: str) -> ConfigError:
    return ConfigError(
        f"announce: {entry!r} is no host:port", next_step="write something like example.org:4051"
    )
