"""The libp2p host: TCP, Noise and Yamux, one identity, nothing else switched on."""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aivillage.node.transport import lean, patches
from aivillage.node.transport.psk import Guard
from aivillage.protocols.errors import ConfigError

log = logging.getLogger("aivillage.transport")

CONNECTIONS_MAX: Final = 200
"""About 65 KB each, and one link per peer: more peers than a household's node talks to."""
UPGRADE_SECONDS: Final = 10
"""A socket that has not become a connection by then is dropped; slow WANs need about 1 s."""
SHUTDOWN_SECONDS: Final = 10


@asynccontextmanager
async def run_host(key: Ed25519PrivateKey, listen: str, guard: Guard) -> AsyncIterator[Any]:
    """A running, patched host that listens on `listen` ("ip:port"), with `guard` at its doors.

    Raises:
        ConfigError: `listen` is malformed or taken, or another libp2p is installed.
    """
    address = listen_address(listen)
    host = build_host(key, address)
    guard.stand_before(host.get_network().upgrader)
    stop = trio.Event()
    # A shutdown that is cancelled leaves its listening socket open, so it is only bounded.
    shutdown = trio.CancelScope(shield=True)
    listening = False
    async with trio.open_nursery() as nursery:
        try:
            await nursery.start(_run, host, address, stop, shutdown)
            listening = bool(host.get_network().listeners)
            if listening:
                yield host
        finally:
            shutdown.deadline = trio.current_time() + SHUTDOWN_SECONDS
            stop.set()
    if not listening:
        raise _taken(listen, "the library could not listen there")


def listen_address(listen: str) -> str:
    """`127.0.0.1:4051` -> `/ip4/127.0.0.1/tcp/4051`, after a look whether the port is free."""
    ip_text, _, port_text = listen.rpartition(":")
    try:
        ip, port = ipaddress.ip_address(ip_text.strip("[]")), int(port_text)
        port.to_bytes(2, "big")  # 0..65535
    except (ValueError, OverflowError) as error:
        raise ConfigError(
            f"{listen!r} is no address to listen on: {error}",
            next_step="write ip:port, for example 0.0.0.0:4051",
        ) from None
    family = socket.AF_INET6 if ip.version == 6 else socket.AF_INET
    # libp2p binds with SO_REUSEPORT and would share the port silently with whoever has it.
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((str(ip), port))
        except OSError as error:
            raise _taken(listen, str(error)) from None
    return f"/ip{ip.version}/{ip}/tcp/{port}"


def build_host(key: Ed25519PrivateKey, address: str) -> Any:
    """An unstarted host. Imports libp2p, which takes about half a second."""
    _quiet_library()
    patches.apply()
    import multiaddr
    from libp2p import new_host
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
    from libp2p.network.config import ConnectionConfig
    from libp2p.security.noise.transport import PROTOCOL_ID, Transport

    identity = create_new_key_pair(key.private_bytes_raw())
    host = new_host(
        key_pair=identity,
        listen_addrs=[multiaddr.Multiaddr(address)],
        muxer_preference="YAMUX",
        # The default list accepts /plaintext, where anybody is whoever they say they are.
        sec_opt={PROTOCOL_ID: Transport(identity, create_noise_key_pair().private_key)},
        connection_config=ConnectionConfig(
            min_connections=0,
            low_watermark=0,
            high_watermark=CONNECTIONS_MAX,
            max_connections=CONNECTIONS_MAX,
            inbound_upgrade_timeout=UPGRADE_SECONDS,
            outbound_upgrade_timeout=UPGRADE_SECONDS,
        ),
    )
    _switch_off_extras(host)
    return host


def _switch_off_extras(host: Any) -> None:
    swarm = host.get_network()
    # Its breakers and rates are per process, not per peer: strangers could use up everybody's.
    swarm.set_resource_manager(None)
    # It dials whoever it has heard of up to the middle of the watermarks; we choose our peers.
    swarm.auto_connector.maybe_connect = _nothing
    # Who is not there now is not there: the caller decides when to try again.
    swarm.retry_config.max_retries = 0
    # Outbound identify runs in system tasks, where one exception ends the event loop. What it
    # learns is in our own hello. Inbound identify is still answered.
    for notifee in list(swarm.notifees):
        swarm.remove_notifee(notifee)


async def _nothing() -> None: ...


def _quiet_library() -> None:
    """The library logs every closed connection as an error; our own events say what matters."""
    lean.import_libp2p()  # configures its logger when imported: ours comes after
    for name in list(logging.root.manager.loggerDict):
        if name.partition(".")[0] == "libp2p":
            logging.getLogger(name).setLevel(logging.CRITICAL)


async def _run(
    host: Any,
    address: str,
    stop: trio.Event,
    shutdown: trio.CancelScope,
    task_status: Any = trio.TASK_STATUS_IGNORED,
) -> None:
    import multiaddr

    try:
        with shutdown:
            async with host.run(listen_addrs=[multiaddr.Multiaddr(address)]):
                task_status.started()
                await stop.wait()
                await host.close()
    except* RuntimeError as group:
        # Services that are told to stop while a connection arrives say this; nothing is lost.
        if not stop.is_set() or not _is_benign(group):
            raise


def _is_benign(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(_is_benign(leaf) for leaf in error.exceptions)
    return "Nursery is closed" in str(error)


def _taken(listen: str, reason: str) -> ConfigError:
    port = listen.rpartition(":")[2]
    return ConfigError(
        f"cannot listen on {listen} (port {port}): {reason}",
        next_step=f"stop whoever uses port {port}, or choose another with `listen`",
    )
